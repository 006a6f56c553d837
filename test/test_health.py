"""How the node says how it is doing: stage times, thresholds, and the lines for people."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from node_process import K, camera_info_message, image_message, scene

from nope_ros.distribution import Ambiguity
from nope_ros.estimator import PoseEstimator
from nope_ros.node.estimation import estimate
from nope_ros.node.gravity import Gravity
from nope_ros.node.health import (
    FrameTimes,
    Health,
    Input,
    Meter,
    Percentiles,
    Rates,
    Sighting,
    Times,
    diagnostic,
    text,
    trouble,
)
from nope_ros.node.pairing import Counts, FrameMessages
from nope_ros.node.parameters import Settings
from nope_ros.stopwatch import TimedStage, stage, timed

SECOND = 10**9


# --- stages ---------------------------------------------------------------------------------------------------------


def test_stages_add_up_and_only_those_who_ask_are_told() -> None:
    def work(name: TimedStage) -> None:
        with stage(name):
            time.sleep(0.01)

    work("read")
    begin = time.perf_counter()
    with timed() as seconds:
        work("crop")
        work("crop")
        other = threading.Thread(target=work, args=("match",))  # a registration, say, while a frame is measured
        other.start()
        other.join()
        with pytest.raises(ValueError), stage("encode"):
            raise ValueError
    assert set(seconds) == {"crop", "encode"}
    assert 0.02 <= seconds["crop"] < time.perf_counter() - begin - 0.01


def test_marks_cost_nothing_that_can_be_measured() -> None:
    """A frame has about ten; a microsecond each would be a ten-thousandth of it."""

    def marks() -> float:
        begin = time.perf_counter()
        for _ in range(1000):
            with stage("crop"):
                pass
        return (time.perf_counter() - begin) / 1000

    assert min(marks() for _ in range(20)) < 5e-6
    with timed():
        assert min(marks() for _ in range(20)) < 10e-6


def test_every_stage_of_a_frame_is_measured(weights: Path) -> None:
    image, mask = scene()
    estimator = PoseEstimator.from_pretrained(weights, device="cpu")
    known = [estimator.register(image, mask, K, object_id="mug")]
    received = FrameMessages(0, image_message(image, "rgb8"), image_message(mask, "mono8"), camera_info_message())
    begin = time.perf_counter()
    with timed() as seconds:
        estimate(
            received, known, estimator, Settings(similarity_threshold=-1.0, refinement="synthesis"), Gravity(), print
        )
    whole = time.perf_counter() - begin
    assert set(seconds) == {"read", "crop", "encode", "match", "pose", "refine"}
    assert 0.7 * whole < sum(seconds.values()) <= whole, "next to nothing happens between the stages"


def test_percentiles_of_the_last_frames() -> None:
    times = Times()
    assert times.percentiles() == {} and times.newest is None
    for index in range(1000):
        refined = {"refine": 0.1} if index % 2 else {}
        times.add(FrameTimes(index / 1000, 0.5, {"crop": index / 1000, **refined}))  # type: ignore[dict-item]
    found = times.percentiles()
    assert list(found) == ["latency", "stamp to pose", "crop", "refine"]
    assert found["crop"] == Percentiles(pytest.approx(899.5), pytest.approx(989.05))
    assert found["stamp to pose"] == Percentiles(pytest.approx(500), pytest.approx(500))
    assert found["refine"].p50 == pytest.approx(50), "a frame that was not refined took no time to refine"


def test_rates_are_of_the_last_seconds() -> None:
    meter, seen = Meter(), []
    for second in range(20):
        seen.append(
            meter.rates(100.0 + second, Counts(images=30 * second, masks=second // 2, taken=2 * min(second, 10)))
        )
    assert seen[0] == Rates()
    assert seen[8].images == pytest.approx(30) and seen[8].frames == pytest.approx(2)
    assert seen[19].frames == 0 and 0.3 < seen[19].masks < 0.7


# --- thresholds -----------------------------------------------------------------------------------------------------


def inputs(**silent: float) -> dict[Any, Input]:
    return {kind: Input(f"/{kind}", silent.get(kind, 0.1)) for kind in ("image", "camera_info", "mask")}


GOOD = Rates(images=30, masks=10, frames=10, skipped=0)
FRAME = FrameTimes(0.02, 0.1, {})


def test_nothing_is_wrong() -> None:
    assert trouble(inputs(), GOOD, FRAME, Settings()) == ""
    assert trouble(inputs(mask=4.5), GOOD, FRAME, Settings()) == "", "within mask_patience"
    assert trouble(inputs(), replace(GOOD, depths=30, deep=5), FRAME, Settings()) == "", "depth may be slower"


@pytest.mark.parametrize(
    ("given", "rates", "newest", "words"),
    [
        ({"image": 3.1}, GOOD, FRAME, "nothing has come on /image for 3 s"),
        ({"image": 9.0, "camera_info": 7.0}, Rates(), None, "nothing has come on /image, /camera_info for 9 s"),
        ({"mask": 5.2}, GOOD, FRAME, "nothing has come on /mask for 5 s"),
        ({}, Rates(images=30, masks=5, orphaned=5), FRAME, "within mask_patience (5 s)"),
        ({}, Rates(images=30, masks=5, frames=5, thinned=1), FRAME, "buffer_megabytes: 512 MB are full"),
        ({}, replace(GOOD, depths=30), FRAME, "depth: none has the stamp of an image"),
        ({}, GOOD, FrameTimes(0.02, 4000.0, {}), "4000 s behind this node's clock; for a bag"),
        ({}, GOOD, FrameTimes(0.02, -4000.0, {}), "4000 s ahead of"),
    ],
)
def test_thresholds(given: dict[str, float], rates: Rates, newest: FrameTimes | None, words: str) -> None:
    assert words in trouble(inputs(**given), rates, newest, Settings())


# --- what is said ---------------------------------------------------------------------------------------------------


def health(**changes: Any) -> Health:
    values: dict[str, Any] = {
        "name": "/arm/nope",
        "active": True,
        "now": 100 * SECOND,
        "model": "rotated_latent",
        "device": "cpu",
        "gravity": "IMU",
        "objects": {
            "mug": Sighting(99 * SECOND + SECOND // 2, "camera", 0.624, True, 0.934, Ambiguity.UNIQUE, True),
            "cup": Sighting(40 * SECOND, "camera", 1.2, False, 0.31, Ambiguity.AXIAL, False),
            "plate": None,
        },
        "counts": Counts(images=300, masks=290, taken=100, skipped=190, unmatched=7, orphaned=3),
        "rates": Rates(images=30.02, masks=29.9, frames=9.8, skipped=20.1),
        "times": {
            "latency": Percentiles(20.2, 31.0),
            "stamp to pose": Percentiles(35.4, 60.0),
            "crop": Percentiles(2, 3),
            "encode": Percentiles(14, 20),
        },
        "problem": "",
        "silent": False,
        "more": {"problems": 2},
    }
    return Health(**{**values, **changes})


def test_lines_for_people() -> None:
    assert text(health()).splitlines() == [
        "/arm/nope is active: rotated_latent on cpu, gravity: IMU",
        "in: image 30.0 Hz, mask 29.9 Hz",
        "out: 9.8 frames a second, 20.1 skipped for newer ones; so far 7 images without mask, 3 masks without image",
        "objects: 3",
        "  mug: seen 0.5 s ago at 0.62 m in 'camera', confidence 0.93, unique, trusted",
        "  cup: seen 60.0 s ago at 1.20 × its distance at registration in 'camera', confidence 0.31, axial, "
        "not trusted, so not on TF",
        "  plate: not seen yet",
        "time of a frame, ms (median / 95 %): 20 / 31, from its stamp 35 / 60",
        "  crop 2 / 3, encode 14 / 20",
        "nothing is wrong",
    ]
    assert text(health(problem="mask: …; do this")).endswith("\nwrong: mask: …; do this")
    assert text(health(objects={}, times={})).splitlines()[3:] == ["objects: none registered", "nothing is wrong"]
    off = text(health(active=False, problem="not active: weights: …"))
    assert off == "/arm/nope is not active: weights: …"


def test_levels_and_values_for_machines() -> None:
    well = diagnostic(health())
    values = {one.key: one.value for one in well.values}
    assert (well.level, well.message) == (DiagnosticStatus.OK, "OK")
    assert well.name == "arm/nope: object poses" and well.hardware_id == "cpu"
    assert values["encode p95 (ms)"] == "20.0" and values["objects"] == "mug, cup, plate"
    assert all(np.isfinite(float(value)) for key, value in values.items() if "(" in key)
    assert diagnostic(health(problem="slow")).level == DiagnosticStatus.WARN
    assert diagnostic(health(problem="no image", silent=True)).level == DiagnosticStatus.ERROR
