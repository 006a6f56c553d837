"""The walk of one frame from messages to poses, without a node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from node_process import FRAME, HEIGHT, WIDTH, K, camera_info_message, image_message, scene

from nope_ros.draw import Drawn, overlay
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Frame, InputError
from nope_ros.latent import DEFAULT_WEIGHTS
from nope_ros.node.distro import TransformTree
from nope_ros.node.estimation import Result, Seen, estimate
from nope_ros.node.gravity import Gravity
from nope_ros.node.messages import image_array
from nope_ros.node.outputs import Outputs
from nope_ros.node.pairing import FrameMessages
from nope_ros.node.parameters import Settings
from nope_ros.node.registration import reference_frame
from nope_ros.pose import PoseEstimate
from nope_ros.rotations import geodesic_distance
from nope_ros.tracking import Tracker

DOWN = np.array([0.0, 1.0, 0.3])
ANYTHING = Settings(similarity_threshold=-1.0)


@pytest.fixture(scope="module")
def estimator(weights: Path) -> PoseEstimator:
    return PoseEstimator.from_pretrained(weights, device="cpu")


@pytest.fixture(scope="module")
def objects(estimator: PoseEstimator) -> list[RegisteredObject]:
    image, mask = scene()
    return [
        estimator.register(image, mask, K, object_id="level", gravity_camera=DOWN),
        estimator.register(image, mask, K, object_id="free"),
    ]


def received(
    image: np.ndarray, mask: np.ndarray, camera: np.ndarray = K, encoding: str = "mono8", **info: Any
) -> FrameMessages:
    calibration = camera_info_message(camera=camera)
    for name, value in info.items():
        setattr(calibration, name, value)
    return FrameMessages(0, image_message(image, "rgb8"), image_message(mask, encoding), calibration)


def run(
    estimator: PoseEstimator,
    objects: Sequence[RegisteredObject],
    frame: FrameMessages,
    gravity: Gravity | None = None,
    **more: Any,
) -> tuple[Result, list[str]]:
    said: list[str] = []
    settings = replace(ANYTHING, **more)
    result = estimate(frame, objects, estimator, settings, gravity or Gravity(), lambda text: said.append(str(text)))
    return result, said


def test_objects_without_gravity_get_what_they_can(estimator: PoseEstimator, objects: list[RegisteredObject]) -> None:
    ids = np.zeros((HEIGHT, WIDTH), np.uint16)
    ids[80:150, 60:120], ids[80:150, 200:260] = 1, 2
    frame = received(scene()[0], ids, encoding="16UC1")
    gravity = Gravity(vector=DOWN)

    def priors(result: Result) -> dict[str, str]:
        return {one.estimate.object_id: one.estimate.prior for one in result.seen}

    result, said = run(estimator, objects, frame, gravity)
    assert priors(result) == {"level": "standing", "free": "free"} and not said
    result, said = run(estimator, objects, frame, gravity, prior="upright")
    assert priors(result) == {"level": "upright", "free": "free"}
    assert said == ["prior: 'upright' needs gravity, which is not known for 'free'; using 'free'"]
    result, _ = run(estimator, objects, frame, prior="standing")
    assert priors(result) == {"level": "free", "free": "free"}
    result, _ = run(estimator, objects, frame, gravity, prior="free")
    assert priors(result) == {"level": "free", "free": "free"}


def test_what_was_chosen_is_refined(
    estimator: PoseEstimator, objects: list[RegisteredObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = scene()
    monkeypatch.setattr(estimator.predictor, "temperature", 1e-6)  # sure of itself, as a trained one is
    result, said = run(estimator, objects[:1], received(image, mask), Gravity(vector=DOWN), refinement="synthesis")
    assert [one.estimate.stage for one in result.seen] == ["synthesis"] and not said
    result, said = run(estimator, objects[:1], received(image, mask), Gravity(vector=DOWN))
    assert [one.estimate.stage for one in result.seen] == ["offsets"] and not said, "correspondence, by default"
    result, _ = run(estimator, objects[:1], received(image, mask), Gravity(vector=DOWN), refinement="none")
    assert [one.estimate.stage for one in result.seen] == ["template"]


def test_the_overlay_shows_the_refined_axes(
    estimator: PoseEstimator, objects: list[RegisteredObject], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = scene()
    monkeypatch.setattr(estimator.predictor, "temperature", 1e-6)
    found: dict[str, tuple[Seen, Result]] = {}
    turn = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), 8.0, 1.0)  # half way between rolls of the grid
    turned = [cv2.warpAffine(one, turn, (WIDTH, HEIGHT)) for one in (image, mask.astype(np.uint8) * 255)]
    for refinement in ("none", "synthesis"):
        result, _ = run(estimator, objects[1:], received(turned[0], turned[1]), refinement=refinement)
        (one,) = result.seen
        found[refinement] = one, result
    (template, _), (refined, result) = found.values()
    assert geodesic_distance(template.estimate.R_camera_object, refined.estimate.R_camera_object) > np.radians(0.5)
    shown = image_array(Outputs(result, replace(ANYTHING, confidence_threshold=0.0)).overlay())
    drawn = [overlay(result.image, K, [Drawn.of(one.estimate, one.mask, K)]).astype(int) for one in (refined, template)]
    np.testing.assert_array_equal(shown, drawn[0])
    assert (np.abs(shown - drawn[1]).max(axis=-1) > 60).sum() > 20, "the templates' axes are elsewhere"


def test_objects_are_followed_if_the_parameters_say_so(
    estimator: PoseEstimator, objects: list[RegisteredObject]
) -> None:
    image, mask = scene()
    tree = TransformTree()
    gravity = Gravity(vector=DOWN, transforms=tree, timeout=0.0)
    for stamp in (0, 2_000_000_000):
        tree.insert("odom", "camera_optical", stamp, np.array([0.0, 0.0, 0.0, 1.0]), static=False)
    tracker = Tracker()

    def followed(stamp: float, **more: Any) -> tuple[list[PoseEstimate], list[str]]:
        frame = replace(received(image, mask), stamp=int(stamp * 1e9))
        said: list[str] = []
        usual: dict[str, Any] = {"refinement": "none", "tracking_enabled": True, "tracking_fixed_frame": "odom"}
        settings = replace(ANYTHING, **{**usual, **more})
        result = estimate(
            frame, objects[:1], estimator, settings, gravity, lambda text: said.append(str(text)), tracker
        )
        return [one.estimate for one in result.seen], said

    def stages(stamp: float, **more: Any) -> tuple[list[str], list[str]]:
        found, said = followed(stamp, **more)
        return [one.stage for one in found], said

    assert stages(1.0) == (["template"], [])
    assert stages(1.1) == (["tracking"], [])
    found, said = stages(1.2, tracking_fixed_frame="map")
    assert found == ["tracking"] and len(said) == 1 and "map" in said[0] and "without the camera's motion" in said[0]
    assert stages(1.0) == (["template"], []), "time jumped back"
    assert stages(1.1, tracking_enabled=False) == (["template"], [])
    assert stages(1.2) == (["template"], []), "what was known went with it"
    assert stages(1.3, tracking_fixed_frame="") == (["tracking"], []), "nothing is asked, so nothing is missing"
    estimate(received(image, mask), [], estimator, ANYTHING, gravity, lambda text: None, tracker)
    assert stages(1.35, tracking_fixed_frame="") == (["template"], []), "what is registered no more is forgotten"
    tracker.reset()
    for stamp in (1.4, 1.5):
        (told,), _ = followed(stamp)
        (refined,), _ = followed(stamp, refinement="correspondence")
    assert refined.stage == "offsets"
    assert geodesic_distance(refined.delta_R, told.delta_R) > 1e-4, "what matches of both frames say counts"


def test_small_instances_are_left_out_aloud(estimator: PoseEstimator, objects: list[RegisteredObject]) -> None:
    ids = np.zeros((HEIGHT, WIDTH), np.uint16)
    ids[80:150, 60:120], ids[10:14, 10:14] = 5, 6
    result, said = run(estimator, objects, received(scene()[0], ids, encoding="16UC1"))
    assert [one.instance for one in result.seen] == [5]
    assert any("4x4 px" in text and "instance 6" in text for text in said)


def test_at_most_so_many_instances(estimator: PoseEstimator, objects: list[RegisteredObject]) -> None:
    ids = np.zeros((HEIGHT, WIDTH), np.uint16)
    ids[0] = np.arange(WIDTH) + 10  # a detector gone wild
    ids[50:200, 50:200] = 9
    result, said = run(estimator, objects, received(scene()[0], ids, encoding="16UC1"), max_instances=3)
    assert [one.instance for one in result.seen] == [9]
    assert len(said) == 2, "two of the others were looked at"


def test_nothing_registered_or_in_view(estimator: PoseEstimator, objects: list[RegisteredObject]) -> None:
    image, mask = scene()
    assert run(estimator, [], received(image, mask))[0].seen == ()
    result, said = run(estimator, objects, received(image, 0 * mask))
    assert result.seen == () and said == ["mask: no pixel is set; is the object in view, and is the instance id right?"]
    speck = np.zeros_like(mask)
    speck[100:105, 100:105] = 255
    result, said = run(estimator, objects, received(image, speck))
    assert result.seen == () and said == ["mask: the object is only 5x5 px, at least 8x8 are needed; move closer"]
    with pytest.raises(InputError, match="mask: size 320x100"):
        run(estimator, objects, received(image, 0 * mask[:100]))


def test_distortion_is_taken_out_once(estimator: PoseEstimator, objects: list[RegisteredObject]) -> None:
    image, mask = scene()
    result, _ = run(estimator, objects, received(image, mask, d=[-0.3, 0.1, 0.0, 0.0, 0.0]))
    assert not result.camera.distorted and not np.array_equal(result.image, image)
    assert result.seen[0].mask.sum() != (mask > 0).sum()


def test_instances_cut_by_the_sensor_are_told_through_a_pincushion_lens(
    estimator: PoseEstimator, objects: list[RegisteredObject]
) -> None:
    ids = np.zeros((HEIGHT, WIDTH), np.uint16)
    ids[80:150, :60], ids[80:150, 150:210] = 1, 2
    frame = received(scene()[0], ids, encoding="16UC1", d=[0.3, 0.0, 0.0, 0.0, 0.0])
    result, said = run(estimator, objects, frame)
    assert {one.instance: one.estimate.truncated for one in result.seen} == {1: True, 2: False}
    assert len(said) == 1 and "instance 1 reaches the image's border" in said[0]


@given(
    fx=st.floats(10, 3e5) | st.floats(1e-6, 1e9),
    fy=st.none() | st.floats(1e-6, 1e9),
    cx=st.floats(-4000, 4000) | st.floats(-1e6, 1e6),
    cy=st.floats(-4000, 4000) | st.floats(-1e6, 1e6),
    distortion=st.just([0.0] * 5) | st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5),
    box=st.tuples(st.integers(0, WIDTH), st.integers(0, HEIGHT), st.integers(0, WIDTH), st.integers(0, HEIGHT)),
    seed=st.integers(0, 3),
)
@example(fx=300.0, fy=300.0, cx=160.0, cy=120.0, distortion=[0.0] * 5, box=(0, 0, WIDTH, HEIGHT), seed=0)
@example(fx=300.0, fy=300.0, cx=160.0, cy=120.0, distortion=[0.0] * 5, box=(0, 60, WIDTH, 69), seed=0)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_calibration_and_no_mask_breaks_it(
    estimator: PoseEstimator,
    objects: list[RegisteredObject],
    fx: float,
    fy: float | None,
    cx: float,
    cy: float,
    distortion: list[float],
    box: tuple[int, int, int, int],
    seed: int,
) -> None:
    """Whatever camera and mask: finite poses come out, or an InputError."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    mask[y0:y1, x0:x1] = 255
    if seed:  # holes and specks, as segmentation leaves them
        mask[np.random.default_rng(seed).random(mask.shape) < 0.3 * seed] ^= 255
    frame = received(scene()[0], mask, np.array([[fx, 0, cx], [0, fy or fx, cy], [0, 0, 1]]), d=distortion)
    try:
        result, _ = run(estimator, objects, frame, Gravity(vector=DOWN))
    except InputError:
        return
    for one in result.seen:
        assert np.isfinite(one.estimate.t_camera_object).all()
        assert np.isfinite(one.estimate.covariance).all()
        np.testing.assert_allclose(one.estimate.R_camera_object @ one.estimate.R_camera_object.T, np.eye(3), atol=1e-6)


# --- registration ---------------------------------------------------------------------------------------------------


def test_reference_frame() -> None:
    image, mask = scene()
    frame = reference_frame(received(image, mask), 0, rectified=False)
    assert np.array_equal(frame.mask, mask > 0)
    ids = np.where(mask > 0, 7, 0).astype(np.uint16)
    for instance in (0, 7):
        frame = reference_frame(received(image, ids, encoding="16UC1"), instance, rectified=False)
        assert np.array_equal(frame.mask, mask > 0)
    with pytest.raises(InputError, match="instance: 3 is not in the mask, which holds 7"):
        reference_frame(received(image, ids, encoding="16UC1"), 3, rectified=False)
    ids[0, 0] = 2
    with pytest.raises(InputError, match="holds 2, 7; say which"):
        reference_frame(received(image, ids, encoding="16UC1"), 0, rectified=False)


@pytest.mark.parametrize("prior", ["free", "upright", "standing", None])
def test_objects_are_told_apart_as_by_their_poses(
    estimator: PoseEstimator, objects: list[RegisteredObject], prior: Any
) -> None:
    """The short way to a similarity and the long one agree."""
    known = [one for one in objects if one.gravity_known or prior in ("free", None)] * 3
    image, mask = scene(30)
    query = estimator.look(Frame.from_arrays(image, mask, K), DOWN)
    short = estimator.similarities(query, known)
    long = [estimator.match(query, one, prior).similarity for one in known]
    np.testing.assert_allclose(short, long, atol=1e-5)


@pytest.mark.parametrize(("gravity", "most"), [(Gravity(), 2.0), (Gravity(vector=DOWN), 3.5)], ids=["free", "standing"])
def test_twenty_objects_cost_little_more_than_one(gravity: Gravity, most: float) -> None:
    if not DEFAULT_WEIGHTS.is_dir():
        pytest.skip("the packaged weights are not there")
    image, mask = scene()
    torch.set_num_threads(1)
    shipped = PoseEstimator.from_pretrained(device="cpu")
    twenty = [
        shipped.register(image, mask, K, object_id=f"object{index}", gravity_camera=gravity.vector)
        for index in range(20)
    ]
    seconds: dict[int, list[float]] = {1: [], 20: []}
    for _ in range(6):
        for count, spent in seconds.items():
            begin = time.process_time()
            run(shipped, twenty[:count], received(image, mask), gravity)
            spent.append(time.process_time() - begin)
    assert min(seconds[20]) < most * min(seconds[1]), seconds


@pytest.mark.parametrize(
    ("object_id", "changed", "told"),
    [
        ("level", {}, None),
        (FRAME, {}, "the camera's own frame"),
        ("odom", {"tracking_fixed_frame": "odom"}, "do not move in"),
        ("map", {"gravity_frame": "map"}, "tells gravity"),
        ("odom", {"tracking_fixed_frame": "odom", "tf_prefix": "nope/"}, None),
    ],
)
def test_no_object_takes_the_name_of_a_frame_that_the_node_needs(
    object_id: str,
    changed: dict[str, str],
    told: str | None,
    estimator: PoseEstimator,
    objects: list[RegisteredObject],
) -> None:
    known = replace(objects[0], object_id=object_id)
    asked = replace(ANYTHING, confidence_threshold=0.0, **changed)
    said: list[object] = []
    result = estimate(received(*scene()), [known], estimator, asked, Gravity(), said.append)
    sent = Outputs(result, asked).transforms(said.append)
    assert [one.child_frame_id for one in sent] == ([] if told else [asked.tf_prefix + object_id])
    assert (told in str(said[0]) and "tf.prefix" in str(said[0])) if told else not said
