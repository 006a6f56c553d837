"""Pairing: which messages are put together, what is given up, and that nothing grows without bound."""

from __future__ import annotations

import threading
import time
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from nope_ros.node.pairing import NANOSECONDS, Kind, Pairing

SECOND = NANOSECONDS


def pairing(patience: float = 5.0, capacity: int = 1_000_000) -> Pairing:
    return Pairing(patience=int(patience * SECOND), capacity=capacity)


def add(pairing: Pairing, kind: Kind, seconds: float, size: int = 10) -> None:
    pairing.add(kind, round(seconds * SECOND), f"{kind}@{seconds:g}", size)


def test_complete_frame() -> None:
    pairs = pairing()
    add(pairs, "image", 1)
    add(pairs, "mask", 1)
    assert pairs.take(0) is None, "no calibration yet"
    assert not pairs.calibrated
    add(pairs, "camera_info", 0.5)
    received = pairs.take(0)
    assert received is not None
    assert (received.stamp, received.image, received.mask) == (SECOND, "image@1", "mask@1")
    assert (received.camera_info, received.depth) == ("camera_info@0.5", None)
    assert pairs.take(0) is None, "handed out once"
    assert pairs.latest() == received, "and remembered"


def test_mask_three_seconds_late_finds_its_image() -> None:
    pairs = pairing(patience=5)
    add(pairs, "camera_info", 0)
    for step in range(91):  # 30 Hz for 3 s
        add(pairs, "image", step / 30)
    add(pairs, "mask", 0)
    received = pairs.take(0)
    assert received is not None and received.image == "image@0"


def test_mask_before_image() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "mask", 1)
    add(pairs, "image", 1)
    assert pairs.take(0) is not None


def test_stamps_must_be_equal() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "image", 1)
    pairs.add("mask", SECOND + 1, "one nanosecond late")
    assert pairs.take(0) is None


def test_newest_wins_and_the_rest_is_counted() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    for second in (1, 2, 3):
        add(pairs, "image", second)
    for second in (1, 2):
        add(pairs, "mask", second)
    received = pairs.take(0)
    assert received is not None and received.image == "image@2"
    assert (pairs.counts.taken, pairs.counts.skipped, pairs.counts.unmatched) == (1, 1, 0)
    add(pairs, "mask", 1)  # too late: a newer frame has been handed out
    assert pairs.take(0) is None
    add(pairs, "mask", 3)
    received = pairs.take(0)
    assert received is not None and received.image == "image@3"


def test_image_without_mask_expires() -> None:
    pairs = pairing(patience=1)
    add(pairs, "camera_info", 0)
    add(pairs, "image", 1)
    add(pairs, "mask", 1.5)
    add(pairs, "image", 3)
    assert (pairs.counts.unmatched, pairs.counts.orphaned) == (1, 1)
    assert pairs.held_bytes == 10


def test_calibration_of_the_same_stamp_is_preferred() -> None:
    pairs = pairing()
    for second in (1, 2, 3):
        add(pairs, "camera_info", second)
    add(pairs, "image", 2)
    add(pairs, "mask", 2)
    received = pairs.take(0)
    assert received is not None and received.camera_info == "camera_info@2"


def test_depth_of_a_running_camera_is_waited_for() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "depth", 1)
    for second in (1, 1.05):
        add(pairs, "image", second)
        add(pairs, "mask", second)
    received = pairs.take(0)
    assert received is not None and received.depth == "depth@1", "1.05 still waits"
    assert pairs.take(0) is None
    add(pairs, "depth", 1.05)
    received = pairs.take(0)
    assert received is not None and received.depth == "depth@1.05"


def test_depth_that_stopped_or_was_lost_holds_nothing_up() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "depth", 1)
    add(pairs, "image", 1.1)
    add(pairs, "mask", 1.1)
    assert pairs.take(0) is None
    add(pairs, "image", 1.4)  # 0.3 s of images without depth
    received = pairs.take(0)
    assert received is not None and received.image == "image@1.1" and received.depth is None
    add(pairs, "mask", 1.4)
    add(pairs, "depth", 1.5)  # the one of 1.4 was lost
    received = pairs.take(0)
    assert received is not None and received.image == "image@1.4" and received.depth is None


def test_of_a_recording_every_frame_is_handed_out() -> None:
    pairs = Pairing(patience=5 * SECOND, capacity=1_000_000, every=True)
    for second in (1, 1.1, 1.2):
        add(pairs, "image", second)
        add(pairs, "mask", second)
    assert pairs.take(0) is None
    add(pairs, "camera_info", 1.2)  # recorded after three images
    assert [pairs.take(0).stamp / SECOND for _ in range(3)] == [1, 1.1, 1.2]
    add(pairs, "depth", 1.2)
    for second in (1.25, 1.3, 1.35):
        add(pairs, "image", second)
        add(pairs, "mask", second)
    assert pairs.take(0) is None
    add(pairs, "depth", 1.3)  # the one of 1.25 was lost, that of 1.35 will not come
    matches = [pairs.take(0), pairs.take(0)]
    assert [(one.stamp / SECOND, one.depth) for one in matches] == [(1.25, None), (1.3, "depth@1.3")]
    assert pairs.take(0) is None
    pairs.finish()
    assert pairs.take(0).stamp / SECOND == 1.35
    assert (pairs.counts.taken, pairs.counts.skipped) == (6, 0)


def test_what_was_seen_before_the_clock_was_set_back_is_not_the_latest() -> None:
    pairs = pairing()
    for kind in ("camera_info", "image", "mask"):
        add(pairs, kind, 10)
    assert pairs.take(0) is not None and pairs.latest() is not None
    add(pairs, "image", 3)
    assert pairs.latest() is None
    add(pairs, "mask", 3)
    received = pairs.latest()
    assert received is not None and received.image == "image@3"


def test_looped_bag_starts_over() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 10)
    for second in (10, 11, 12):
        add(pairs, "image", second)
    add(pairs, "mask", 12)
    assert pairs.take(0) is not None
    add(pairs, "image", 10)
    add(pairs, "mask", 10)
    received = pairs.take(0)
    assert received is not None and received.image == "image@10"
    assert received.camera_info == "camera_info@10", "the calibration outlives the jump"
    assert pairs.counts.restarts == 1


def test_the_same_stamp_again_is_a_new_frame() -> None:
    # A still image published over and over, as one does when trying things out.
    pairs = pairing()
    add(pairs, "camera_info", 0)
    for _ in range(3):
        add(pairs, "image", 0)
        add(pairs, "mask", 0)
        assert pairs.take(0) is not None


def test_full_buffer_is_thinned_and_keeps_the_old_end() -> None:
    pairs = pairing(patience=10, capacity=100)
    add(pairs, "camera_info", 0)
    for step in range(30):
        add(pairs, "image", step / 10, size=10)
        assert pairs.held_bytes <= 100
    assert pairs.counts.thinned > 0
    for step in range(30):
        add(pairs, "mask", step / 10, size=0)
    received = pairs.take(0)
    assert received is not None and received.image == "image@2.9"


def test_slow_detector_and_small_buffer_still_give_poses() -> None:
    # 30 Hz, masks 3 s late and one a second, room for one second of images.
    pairs = pairing(patience=5, capacity=30 * 10)
    add(pairs, "camera_info", 0)
    taken = 0
    for step in range(30 * 60):
        add(pairs, "image", step / 30)
        late = step - 90
        if late >= 0 and late % 30 == 0:
            pairs.add("mask", round(late / 30 * SECOND), "mask", 0)
        taken += pairs.take(0) is not None
    assert taken >= 5


def test_a_single_message_larger_than_the_buffer_passes() -> None:
    pairs = pairing(capacity=5)
    add(pairs, "camera_info", 0)
    add(pairs, "mask", 1, size=0)
    add(pairs, "image", 1, size=1000)
    assert pairs.take(0) is not None


def test_take_waits_and_wakes() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "image", 1)
    threading.Timer(0.05, add, (pairs, "mask", 1)).start()
    start = time.monotonic()
    assert pairs.take(5.0) is not None
    assert time.monotonic() - start < 2


def test_clear() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    add(pairs, "image", 1)
    add(pairs, "mask", 1)
    pairs.clear()
    assert pairs.latest() is None and pairs.take(0) is None and pairs.held_bytes == 0
    assert pairs.calibrated, "some drivers send it once"
    add(pairs, "image", 2)
    add(pairs, "mask", 2)
    assert pairs.take(0) is not None


def test_a_frame_is_as_old_as_its_image() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    before = time.monotonic()
    add(pairs, "image", 1)
    after = time.monotonic()
    time.sleep(0.05)
    add(pairs, "mask", 1)
    for received in (pairs.latest(), pairs.take(0), pairs.latest()):
        assert received is not None and before <= received.came <= after


def test_depth_that_no_image_has_is_counted() -> None:
    pairs = pairing()
    add(pairs, "camera_info", 0)
    for step in range(4):
        add(pairs, "image", step)
        add(pairs, "depth", step + (0.001 if step < 3 else 0))
        add(pairs, "mask", step)
        add(pairs, "depth", step + 0.5)
        pairs.take(0)
    assert (pairs.counts.depths, pairs.counts.taken, pairs.counts.deep) == (8, 4, 1)


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from(["image", "mask", "camera_info", "depth", "take"]), st.integers(0, 40), st.integers(0, 60)
    ),
    max_size=120,
)


@given(ARRIVALS)
@example([("image", 1, 0), ("mask", 1, 0), ("camera_info", 0, 0), ("take", 0, 0), ("mask", 0, 0)])
def test_any_order_of_arrival(arrivals: list[tuple[Any, int, int]]) -> None:
    """Whatever comes in whatever order: stamps agree, memory is bounded, and every image is accounted for."""
    capacity = 100
    pairs = pairing(patience=1.0, capacity=capacity)
    last, restarts = -1, 0
    for kind, tenth, size in arrivals:
        if kind == "take":
            received = pairs.take(0)
            if received is not None:
                assert received.image == ("image", tenth_of(received.stamp))
                assert received.mask == ("mask", tenth_of(received.stamp))
                assert received.depth in (None, ("depth", tenth_of(received.stamp)))
                assert received.camera_info[0] == "camera_info"
                if pairs.counts.restarts == restarts:
                    assert received.stamp >= last
                last, restarts = received.stamp, pairs.counts.restarts
        else:
            pairs.add(kind, tenth * SECOND // 10, (kind, tenth), size)
        assert pairs.held_bytes <= max(capacity, 3 * 60), "more than the capacity only for one frame that is larger"
    pairs.clear()
    counts = pairs.counts
    assert counts.images == counts.taken + counts.skipped + counts.unmatched
    assert min(vars(counts).values()) >= 0


def tenth_of(stamp: int) -> int:
    return stamp * 10 // SECOND
