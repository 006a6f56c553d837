"""Gravity from TF, an IMU or a parameter; the tree of frames that stands in for tf2; complaints."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from nope_ros.frame import InputError
from nope_ros.node.complaints import PERIOD, Complaints
from nope_ros.node.distro import TransformError, TransformTree, quaternion_xyzw, rotation_matrix
from nope_ros.node.gravity import Gravity, ImuGravity, ImuSample

SECOND = 1_000_000_000


def turn(*degrees: float) -> np.ndarray:
    return Rotation.from_euler("xyz", degrees, degrees=True).as_quat()


def tree_of(*edges: tuple[str, str, int, np.ndarray]) -> TransformTree:
    tree = TransformTree()
    for parent, child, stamp, xyzw in edges:
        tree.insert(parent, child, stamp, xyzw, static=stamp < 0)
    return tree


# --- the tree -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 7), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_any_tree_against_orientations_in_the_root(size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"frame{i}" for i in range(size)]
    in_root = [np.eye(3)]
    tree = TransformTree()
    for child in range(1, size):
        parent = int(random.integers(child))
        R = Rotation.random(rng=random)
        tree.insert(names[parent], names[child], SECOND, 3 * R.as_quat(), static=bool(random.integers(2)))
        in_root.append(in_root[parent] @ R.as_matrix())
    a, b = random.integers(size, size=2)
    expected = in_root[a].T @ in_root[b]
    np.testing.assert_allclose(tree.rotation(names[a], names[b], SECOND, 0), expected, atol=1e-12)


def test_origins_go_along_with_orientations() -> None:
    tree = TransformTree()
    tree.insert("map", "base", SECOND, turn(0, 0, 90), np.array([1.0, 0, 0]), static=False)
    tree.insert("map", "base", 3 * SECOND, turn(0, 0, 90), np.array([3.0, 0, 0]), static=False)
    tree.insert("base", "camera", SECOND, turn(0, 0, 0), np.array([0, 0.5, 2.0]), static=True)
    R, t = tree.pose("map", "camera", 2 * SECOND, 0)
    np.testing.assert_allclose(t, [2 - 0.5, 0, 2.0], atol=1e-12)
    R_back, t_back = tree.pose("camera", "map", 2 * SECOND, 0)
    np.testing.assert_allclose(R_back @ t + t_back, 0, atol=1e-12)
    np.testing.assert_allclose(R_back, R.T, atol=1e-12)


def test_interpolated_between_stamps_never_beyond() -> None:
    tree = tree_of(("a", "b", SECOND, turn(0, 0, 0)), ("a", "b", 2 * SECOND, turn(0, 0, 90)))
    middle = tree.rotation("a", "b", 3 * SECOND // 2, 0)
    np.testing.assert_allclose(middle, Rotation.from_euler("z", 45, degrees=True).as_matrix(), atol=1e-12)
    with pytest.raises(TransformError, match=r"'b' is 1.000 s behind"):
        tree.rotation("a", "b", 3 * SECOND, 0)
    with pytest.raises(TransformError, match="begins"):
        tree.rotation("a", "b", SECOND // 2, 0)


def test_reasons() -> None:
    tree = tree_of(("a", "b", -1, turn(0, 0, 0)), ("c", "d", -1, turn(0, 0, 0)))
    with pytest.raises(TransformError, match="from 'x' to 'a': frame 'x' was never sent"):
        tree.rotation("a", "x", 0, 0)
    with pytest.raises(TransformError, match="not connected"):
        tree.rotation("b", "d", 0, 0)
    tree = tree_of(("a", "b", -1, turn(0, 0, 0)), ("b", "a", -1, turn(0, 0, 0)), ("e", "f", -1, turn(0, 0, 0)))
    with pytest.raises(TransformError):
        tree.rotation("a", "f", 0, 0)  # a loop ends


def test_waits_for_the_transform() -> None:
    tree = TransformTree()
    threading.Timer(0.05, lambda: tree.insert("/a", "/b", -1, turn(0, 0, 30), static=True)).start()
    assert tree.rotation("a", "b", 0, 5.0).shape == (3, 3)


def test_broken_transforms_are_ignored_and_history_is_bounded() -> None:
    tree = tree_of(("a", "b", SECOND, turn(0, 0, 0)))
    for parent, child, xyzw in (("a", "", turn(0, 0, 0)), ("a", "a", turn(0, 0, 0)), ("a", "b", np.full(4, np.nan))):
        tree.insert(parent, child, 2 * SECOND, xyzw, static=False)
    tree.insert("a", "b", 2 * SECOND, np.zeros(4), static=False)
    np.testing.assert_allclose(tree.rotation("a", "b", SECOND, 0), np.eye(3))
    for step in range(2000):
        tree.insert("a", "b", step * SECOND // 10, turn(0, 0, step), static=False)
    assert len(tree._moving["b"]) <= 101
    tree.insert("a", "b", SECOND, turn(0, 0, 5), static=False)  # the clock was set back
    np.testing.assert_allclose(tree.rotation("a", "b", SECOND, 0), rotation_matrix(turn(0, 0, 5)), atol=1e-12)


def test_a_clock_that_was_set_back_a_little_forgets_what_was_then() -> None:
    tree = tree_of(*(("a", "b", step * SECOND // 10, turn(0, 0, 0)) for step in range(60)))
    for step in range(20):  # a simulation that was reset after six seconds, and the camera turned
        tree.insert("a", "b", step * SECOND // 10, turn(0, 0, 90), static=False)
    now = tree.rotation("a", "b", 3 * SECOND // 2, 0)
    np.testing.assert_allclose(now, rotation_matrix(turn(0, 0, 90)), atol=1e-12)
    tree.insert("a", "b", 17 * SECOND // 10, turn(0, 0, 0), static=False)  # late, but of this time: left out
    np.testing.assert_allclose(tree.rotation("a", "b", 17 * SECOND // 10, 0), now, atol=1e-12)


@given(st.integers(0, 10_000))
def test_quaternions(seed: int) -> None:
    R = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    xyzw = quaternion_xyzw(R)
    assert xyzw[3] >= 0
    np.testing.assert_allclose(rotation_matrix(xyzw), R, atol=1e-12)
    np.testing.assert_array_equal(quaternion_xyzw(np.stack([R, R]))[1], quaternion_xyzw(R[None])[0])


# --- sources --------------------------------------------------------------------------------------------------------

# A camera that looks along x of a level base, in optical axes: down is +y.
LEVEL_CAMERA = Rotation.from_matrix(np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])).as_quat()


def test_none() -> None:
    assert Gravity().down("camera", 0) is None
    assert Gravity().source == "none"


def test_vector() -> None:
    np.testing.assert_allclose(Gravity(vector=np.array([0, 3, 4])).down("camera", 0), [0, 0.6, 0.8])


def test_frame() -> None:
    tree = tree_of(("odom", "base", SECOND, turn(0, 0, 70)), ("base", "camera", -1, LEVEL_CAMERA))
    gravity = Gravity(frame="odom", transforms=tree, timeout=0)
    np.testing.assert_allclose(gravity.down("camera", SECOND), [0, 1, 0], atol=1e-12)
    tree.insert("odom", "base", 2 * SECOND, turn(0, 20, 0), static=False)  # pitched: the nose goes down
    np.testing.assert_allclose(
        gravity.down("camera", 2 * SECOND), [0, np.cos(np.radians(20)), np.sin(np.radians(20))], atol=1e-12
    )
    with pytest.raises(InputError, match=r"gravity: TF from 'odom' to 'camera'"):
        gravity.down("camera", 5 * SECOND)


def imu(*values: float, stamp: int = SECOND, frame: str = "camera") -> ImuGravity:
    source = ImuGravity()
    source.add(ImuSample(stamp, np.array(values), frame))
    return source


def test_imu_at_rest_feels_the_floor_push_up() -> None:
    down = Gravity(imu=imu(0.0, -9.81, 0.0)).down("camera", SECOND)
    np.testing.assert_allclose(down, [0, 1, 0], atol=1e-12)
    tree = tree_of(("imu", "camera", -1, LEVEL_CAMERA))
    down = Gravity(imu=imu(0.0, 0.0, 9.81, frame="imu"), transforms=tree).down("camera", SECOND)
    np.testing.assert_allclose(down, [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (0.0, 0.0, 25.0), (float("nan"), 0.0, 9.8), (0.0, 0.0, 1.0)])
def test_imu_that_does_not_feel_gravity(values: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="gravity: the IMU feels"):
        Gravity(imu=imu(*values)).down("camera", SECOND)


def test_imu_that_is_silent_or_elsewhere() -> None:
    with pytest.raises(InputError, match="sent nothing"):
        Gravity(imu=imu(0.0, 0.0, 9.81)).down("camera", 9 * SECOND)
    with pytest.raises(InputError, match="TF from 'imu'"):
        Gravity(imu=imu(0.0, 0.0, 9.81, frame="imu"), transforms=TransformTree(), timeout=0).down("camera", SECOND)


def test_imu_is_averaged_around_the_image() -> None:
    source = ImuGravity()
    for step in range(200):
        shake = (-1) ** step * 1.0
        source.add(ImuSample(step * SECOND // 100, np.array([shake, 0, 9.81]), "camera"))
    down, _ = source.down(SECOND)
    np.testing.assert_allclose(down, [0, 0, -1], atol=0.02)
    source.add(ImuSample(0, np.array([9.81, 0, 0]), "camera"))  # the clock was set back
    np.testing.assert_allclose(source.down(0)[0], [-1, 0, 0])


def test_imu_is_remembered_for_as_long_as_masks_may_take() -> None:
    source = ImuGravity(history=6 * SECOND)
    for step in range(8000):  # 1 kHz
        source.add(ImuSample(step * SECOND // 1000, np.array([0, 0, 9.81]), "camera"))
        if step == 4000:  # one that overtook another on its way
            source.add(ImuSample((step - 3) * SECOND // 1000, np.array([9.81, 0, 0]), "camera"))
    np.testing.assert_allclose(source.down(3 * SECOND)[0], [0, 0, -1])
    np.testing.assert_allclose(source.down(4 * SECOND)[0], [0, 0, -1])
    with pytest.raises(InputError, match=r"begins 1\.5 s after the image"):
        source.down(SECOND // 2)
    source.history = SECOND
    source.add(ImuSample(8 * SECOND, np.array([0, 0, 9.81]), "camera"))
    with pytest.raises(InputError, match="sent nothing"):
        source.down(3 * SECOND)


# --- complaints -----------------------------------------------------------------------------------------------------


def test_told_when_it_begins_and_when_it_is_back() -> None:
    now, said = [0.0], []
    complain = Complaints(said.append, lambda: now[0])
    for step in range(3000):  # far more than PERIOD, at 30 Hz: it lasts, and nothing changes
        now[0] = step / 30
        complain(InputError(f"mask: only {step} px"))
        complain("image: encoding")
    assert said == ["mask: only 0 px", "image: encoding"]
    now[0] += PERIOD + 0.1
    complain("mask: only 3 px")
    assert said[2:] == ["mask: only 3 px (as before: 3000 times until 10 s ago)"]
    assert complain.total == 6001 and complain.last == ("mask: only 3 px", now[0])


def test_memory_of_complaints_is_bounded() -> None:
    complain = Complaints(lambda _: None, lambda: 0.0)
    for letter in range(2000):
        complain("x" * (letter % 190) + chr(letter + 1000))
    assert len(complain._told) <= 200
