"""Converters: every encoding, padding and byte order comes through; every bad message is refused with its reason."""

from __future__ import annotations

from array import array
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
from geometry_msgs.msg import Point, Pose, Quaternion
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from visualization_msgs.msg import Marker

from nope_ros.distribution import RotationDistribution
from nope_ros.frame import InputError
from nope_ros.node import distro, messages
from nope_ros.pose import PoseEstimate, PoseMode, ReferencePose
from nope_ros.rotations import exp, geodesic_distance, icosphere, rotation_grid

HEADER = Header(frame_id="camera_optical")


def padded(pixels: np.ndarray, encoding: str, padding: int = 0, bigendian: bool = False) -> Image:
    """A message with ``padding`` bytes of rubbish behind each row."""
    pixels = pixels.astype(pixels.dtype.newbyteorder(">" if bigendian else "<"))
    rows = np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=199)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, is_bigendian=bigendian)
    message.step = rows.shape[1]
    message.data = array("B", rows.tobytes())
    return message


def pictures(channels: int, dtype: Any = np.uint8) -> Any:
    sides = st.integers(1, 12)
    return sides.flatmap(lambda h: sides.flatmap(lambda w: npst.arrays(dtype, (h, 2 * w, channels))))


@pytest.mark.parametrize(
    ("encoding", "channels", "order"),
    [("rgb8", 3, [0, 1, 2]), ("bgr8", 3, [2, 1, 0]), ("rgba8", 4, [0, 1, 2]), ("bgra8", 4, [2, 1, 0])],
)
@given(data=st.data(), padding=st.integers(0, 9), bigendian=st.booleans())
def test_colour(encoding: str, channels: int, order: list[int], data: Any, padding: int, bigendian: bool) -> None:
    pixels = data.draw(pictures(channels))
    rgb = messages.image_array(padded(pixels, encoding, padding, bigendian))
    assert np.array_equal(rgb, pixels[..., order])


@given(pictures(1), st.integers(0, 9))
def test_grey(pixels: np.ndarray, padding: int) -> None:
    assert np.array_equal(messages.image_array(padded(pixels, "mono8", padding)), np.repeat(pixels, 3, axis=2))


def smooth(height: int = 32, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.dstack([4 * y + 40, 3 * x + 60, 2 * x + 2 * y + 20]).astype(np.uint8)


@pytest.mark.parametrize(
    ("encoding", "code"),
    [
        ("yuv422", cv2.COLOR_RGB2YUV_UYVY),
        ("uyvy", cv2.COLOR_RGB2YUV_UYVY),
        ("yuv422_yuy2", cv2.COLOR_RGB2YUV_YUY2),
        ("yuyv", cv2.COLOR_RGB2YUV_YUY2),
    ],
)
def test_yuv(encoding: str, code: int) -> None:
    rgb = messages.image_array(padded(cv2.cvtColor(smooth(), code), encoding, 8))
    assert np.abs(rgb.astype(int) - smooth()).max() <= 12


@pytest.mark.parametrize(
    ("encoding", "pattern"), [("rggb", "rggb"), ("bggr", "bggr"), ("gbrg", "gbrg"), ("grbg", "grbg")]
)
def test_bayer(encoding: str, pattern: str) -> None:
    rgb = smooth()
    raw = np.empty(rgb.shape[:2], np.uint8)
    for index, colour in enumerate(pattern):  # the four pixels of a cell, row by row
        where = np.s_[index // 2 :: 2, index % 2 :: 2]
        raw[where] = rgb[..., "rgb".index(colour)][where]
    seen = messages.image_array(padded(raw, f"bayer_{encoding}8"))
    assert np.abs(seen.astype(int) - rgb)[2:-2, 2:-2].max() <= 12


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_compressed(extension: str) -> None:
    data = cv2.imencode(extension, cv2.cvtColor(smooth(), cv2.COLOR_RGB2BGR))[1]
    rgb = messages.image_array(CompressedImage(format="jpeg", data=array("B", data.tobytes())))
    assert np.abs(rgb.astype(int) - smooth()).max() <= (0 if extension == ".png" else 40)
    for damaged in (b"", data.tobytes()[:20], b"nothing that is an image"):
        with pytest.raises(InputError, match="image:"):
            messages.image_array(CompressedImage(format="jpeg", data=array("B", damaged)))


@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "32FC1", "8UC3", "nv12", "", "rgb 8"])
def test_other_encodings_are_refused_with_advice(encoding: str) -> None:
    with pytest.raises(InputError, match=r"image: encoding .* publish rgb8 or bgr8"):
        messages.image_array(Image(height=2, width=2, encoding=encoding, step=48, data=array("B", bytes(96))))


@given(pictures(1, np.uint16), st.integers(0, 9), st.booleans())
def test_instance_ids(pixels: np.ndarray, padding: int, bigendian: bool) -> None:
    ids = messages.mask_array(padded(pixels[..., 0], "16UC1", padding, bigendian))
    assert ids.dtype == np.uint16 and np.array_equal(ids, pixels[..., 0])


@given(pictures(1), st.integers(0, 9))
def test_eight_bit_masks(pixels: np.ndarray, padding: int) -> None:
    assert np.array_equal(messages.mask_array(padded(pixels, "8UC1", padding)), pixels[..., 0])
    assert np.array_equal(messages.mask_array(padded(pixels, "mono8", padding)), pixels[..., 0] > 0)


def test_depth() -> None:
    metres = np.array([[0.5, 0.0], [np.nan, np.inf]], np.float32)
    for bigendian in (False, True):
        depth = messages.depth_array(padded(metres, "32FC1", 3, bigendian))
        assert depth.dtype == np.float32
        np.testing.assert_array_equal(depth, [[0.5, np.nan], [np.nan, np.nan]])
        millimetres = padded(np.array([[500, 0], [1, 65535]], np.uint16), "16UC1", 1, bigendian)
        np.testing.assert_allclose(messages.depth_array(millimetres), [[0.5, np.nan], [0.001, 65.535]])
    with pytest.raises(InputError, match="depth: encoding 'mono8'"):
        messages.depth_array(padded(np.zeros((2, 2), np.uint8), "mono8"))


@given(
    height=st.integers(0, 2**32 - 1) | st.integers(0, 40),
    width=st.integers(0, 2**32 - 1) | st.integers(0, 40),
    step=st.integers(0, 2**32 - 1) | st.integers(0, 100),
    encoding=st.sampled_from(["rgb8", "mono8", "16UC1", "32FC1", "yuv422", "8UC1", "bayer_rggb8", "what"]),
    bigendian=st.booleans(),
    data=st.binary(max_size=3000),
)
@settings(max_examples=300)
def test_no_header_breaks_a_converter(
    height: int, width: int, step: int, encoding: str, bigendian: bool, data: bytes
) -> None:
    """Whatever a message claims: an array of that size comes out, or an InputError."""
    message = Image(height=height, width=width, step=step, encoding=encoding, is_bigendian=bigendian)
    message.data = array("B", data)
    for convert in (messages.image_array, messages.mask_array, messages.depth_array):
        try:
            result = convert(message)
        except InputError as error:
            assert str(error).split(":")[0] in ("image", "mask", "depth")
        else:
            assert result.shape[:2] == (height, width)
            assert result.base is None or result.flags["C_CONTIGUOUS"]


@given(pictures(3), st.integers(1, 30))
def test_truncated_data_is_refused(pixels: np.ndarray, missing: int) -> None:
    message = padded(pixels, "rgb8")
    message.data = message.data[: max(0, len(message.data) - missing)]
    with pytest.raises(InputError, match="cut short"):
        messages.image_array(message)


def test_missing_step_is_filled_in() -> None:
    message = padded(smooth(), "rgb8")
    message.step = 0
    assert np.array_equal(messages.image_array(message), smooth())


def test_instances_by_size() -> None:
    ids = np.zeros((4, 8), np.uint16)
    ids[0, :3], ids[1, :5], ids[2, :1] = 700, 2, 9
    assert messages.instances(ids, 10) == [2, 700, 9]
    assert messages.instances(ids, 2) == [2, 700]
    assert messages.instances(np.zeros((2, 2), np.uint16), 5) == []


# --- camera_info ----------------------------------------------------------------------------------------------------

K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])


def info(**more: Any) -> CameraInfo:
    message = CameraInfo(width=640, height=480, k=K.ravel().tolist(), distortion_model="plumb_bob")
    for name, value in more.items():
        setattr(message, name, value)
    return message


def test_camera() -> None:
    camera = messages.camera(info(d=[0.1, -0.2, 0.0, 0.0, 0.05]))
    assert np.array_equal(camera.K, K)
    assert (camera.width, camera.height, camera.model) == (640, 480, "plumb_bob")
    assert camera.distortion == (0.1, -0.2, 0.0, 0.0, 0.05)
    assert not messages.camera(info(d=[0.0] * 5)).distorted
    assert not messages.camera(info(d=[], distortion_model="")).distorted
    assert messages.camera(info(d=[0.1] * 4, distortion_model="fisheye")).model == "equidistant"
    assert messages.camera(info(d=[0.1] * 8, distortion_model="rational_polynomial")).distorted


def test_rectified_camera_uses_p() -> None:
    P = [400.0, 0, 300, -40, 0, 401, 200, 0, 0, 0, 1, 0]
    camera = messages.camera(info(p=P, d=[0.1] * 5), rectified=True)
    assert camera.K[0, 0] == 400 and camera.K[1, 2] == 200 and not camera.distorted
    with pytest.raises(InputError, match="P is all zero"):
        messages.camera(info(), rectified=True)


def test_region_and_binning() -> None:
    message = info(binning_x=2, binning_y=2)
    message.roi.x_offset, message.roi.y_offset, message.roi.width, message.roi.height = 100, 40, 200, 100
    camera = messages.camera(message)
    assert (camera.width, camera.height) == (100, 50)
    np.testing.assert_allclose(camera.K, [[250, 0, 110], [0, 255, 100], [0, 0, 1]])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"k": [0.0] * 9}, "K is all zero"),
        ({"k": [np.nan, *K.ravel()[1:]]}, "NaN"),
        ({"k": [0.0, *K.ravel()[1:]]}, "focal lengths"),
        ({"k": [500.0, 0.0, 320.0, 0.0, 5.0, 240.0, 0.0, 0.0, 1.0]}, "do not fit an image of 640x480"),
        ({"k": [500.0, 0.0, 1e5, 0.0, 500.0, 240.0, 0.0, 0.0, 1.0]}, "far off an image"),
        ({"width": 0}, "image size 0x480"),
        ({"d": [np.nan] * 5}, "distortion coefficients hold NaN"),
        ({"d": [0.1] * 3}, "3 distortion coefficients"),
        ({"d": [0.1] * 5, "distortion_model": "mystery"}, "distortion model 'mystery'"),
    ],
)
def test_bad_camera_info(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        messages.camera(info(**more))
    assert str(caught.value).startswith("camera_info: ")


# --- poses ----------------------------------------------------------------------------------------------------------

VECTORS = npst.arrays(np.float64, 3, elements=st.floats(-np.pi, np.pi))


@given(VECTORS, VECTORS)
def test_pose_there_and_back(vector: np.ndarray, t: np.ndarray) -> None:
    R = exp(vector)
    message = messages.pose(R, t)
    assert message.orientation.w >= 0, "of two quaternions always the same one"
    back, position = messages.pose_arrays(message)
    assert geodesic_distance(back, R) < 1e-7
    assert np.array_equal(position, t)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0, 0, 0, 0), "length 0"),
        ((0, 0, 0, 2), "length 2"),
        ((0, 0, 0, float("nan")), "NaN"),
    ],
)
def test_bad_pose(values: tuple[float, ...], words: str) -> None:
    x, y, z, w = map(float, values)
    with pytest.raises(InputError, match=words):
        messages.pose_arrays(Pose(orientation=Quaternion(x=x, y=y, z=z, w=w)))
    with pytest.raises(InputError, match="NaN"):
        messages.pose_arrays(Pose(position=Point(x=float("inf"))))


def estimate_of(seed: int = 0) -> PoseEstimate:
    random = np.random.default_rng(seed)
    rotations = rotation_grid(1)
    R_reference = Rotation.random(rng=random).as_matrix()
    distribution = RotationDistribution.from_log_likelihood(rotations, 5 * random.normal(size=len(rotations)))
    half = random.normal(size=(6, 6))
    t = np.array([0.1, -0.2, 0.9])
    modes = tuple(PoseMode(mode.R @ R_reference, t, mode.probability) for mode in distribution.modes)
    return PoseEstimate(
        object_id="mug",
        R_camera_object=modes[0].R_camera_object,
        t_camera_object=t,
        metric=True,
        delta_R=distribution.mode.R,
        covariance=half @ half.T,
        distribution=distribution,
        modes=modes,
        similarity=0.7,
        prior="free",
        truncated=False,
        reference=ReferencePose(R_reference, t, 1.0, 0.2, 0.6, np.zeros(3), True),
    )


def matrix(q: Quaternion) -> np.ndarray:
    return Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix()


def test_object_pose() -> None:
    estimate = estimate_of()
    message = messages.object_pose(estimate, 7, trusted=True)
    assert (message.object_id, message.instance, message.prior, message.metric, message.trusted) == (
        "mug",
        7,
        "free",
        True,
        True,
    )
    np.testing.assert_array_equal(np.reshape(message.pose.covariance, (6, 6)), estimate.covariance)
    np.testing.assert_allclose(matrix(message.relative_rotation), estimate.delta_R, atol=1e-12)
    np.testing.assert_allclose(matrix(message.pose.pose.orientation), estimate.R_camera_object, atol=1e-12)
    assert message.confidence == pytest.approx(estimate.confidence, abs=1e-6)
    assert message.ambiguity == int(estimate.ambiguity)
    assert message.entropy == pytest.approx(estimate.distribution.entropy, rel=1e-6)
    assert message.modes[0].pose == message.pose.pose, "as the message's comment promises"
    assert [mode.score for mode in message.modes] == pytest.approx([mode.probability for mode in estimate.modes])
    assert messages.object_poses(HEADER, [message]).poses == [message]


def test_the_same_pose_in_every_message() -> None:
    estimate = estimate_of(1)
    pose = messages.object_pose(estimate, 1, trusted=True).pose
    assert messages.pose_with_covariance_stamped(HEADER, estimate).pose == pose
    transform = messages.transform(HEADER, "robot/mug", estimate)
    assert transform.header == HEADER and transform.child_frame_id == "robot/mug"
    assert transform.transform.rotation == pose.pose.orientation
    assert transform.transform.translation.z == pose.pose.position.z
    detection = messages.detection(HEADER, estimate, np.array([0.0, 0.0, 0.1]), 0.3)
    assert detection.results[0].pose == pose and detection.id == "mug"
    assert {hypothesis.hypothesis.class_id for hypothesis in detection.results} == {"mug"}
    assert all(not np.any(other.pose.covariance) for other in detection.results[1:])
    centre = detection.bbox.center.position
    expected = estimate.t_camera_object + estimate.R_camera_object @ [0, 0, 0.1]
    np.testing.assert_allclose([centre.x, centre.y, centre.z], expected)
    assert detection.bbox.size.x == 0.3


@given(st.integers(0, 1000), st.integers(1, 700))
@settings(max_examples=20, deadline=None)
def test_distribution_message(seed: int, count: int) -> None:
    estimate = estimate_of(seed)
    message = messages.distribution(HEADER, estimate, count)
    probabilities = np.array(message.probabilities)
    assert len(message.orientations) == len(probabilities) == min(count, len(estimate.orientations))
    assert (np.diff(probabilities) <= 0).all(), "most probable first"
    assert probabilities.sum() + message.probability_left_out == pytest.approx(1, abs=1e-5)
    best = np.argmax(estimate.distribution.probabilities)
    np.testing.assert_allclose(matrix(message.orientations[0]), estimate.orientations[best], atol=1e-12)


def test_image_message_there_and_back() -> None:
    message = messages.image(HEADER, smooth())
    assert message.header == HEADER
    assert np.array_equal(messages.image_array(message), smooth())


# --- markers --------------------------------------------------------------------------------------------------------


def test_markers() -> None:
    estimate = estimate_of()
    result = messages.markers(HEADER, [(estimate, 0.1)], gone=["cup"]).markers
    deleted = [marker for marker in result if marker.action == Marker.DELETE]
    drawn = {marker.ns: marker for marker in result if marker.action == Marker.ADD}
    assert {marker.ns for marker in deleted} == {"cup/axes", "cup/probabilities", "cup/covariance"}
    assert set(drawn) == {"mug/axes", "mug/probabilities", "mug/covariance"}
    assert all(marker.header == HEADER for marker in result)
    assert all(abs(np.linalg.norm(q(marker)) - 1) < 1e-9 for marker in drawn.values())
    axes = drawn["mug/axes"]
    assert len(axes.points) == len(axes.colors) == 6
    assert messages.no_markers().markers[0].action == Marker.DELETEALL


def q(marker: Marker) -> list[float]:
    orientation = marker.pose.orientation
    return [orientation.x, orientation.y, orientation.z, orientation.w]


def test_covariance_marker_is_the_covariance() -> None:
    estimate = estimate_of(3)
    marker = messages.markers(HEADER, [(estimate, 0.1)]).markers[-1]
    R, sizes = matrix(marker.pose.orientation), np.array([marker.scale.x, marker.scale.y, marker.scale.z])
    np.testing.assert_allclose(R @ np.diag((sizes / 4) ** 2) @ R.T, estimate.covariance[:3, :3], atol=1e-9)


def test_bright_spot_of_a_sure_pose_faces_the_camera() -> None:
    rotations = rotation_grid(2)
    log_likelihood = np.full(len(rotations), -50.0)
    log_likelihood[1234] = 0
    distribution = RotationDistribution.from_log_likelihood(rotations, log_likelihood)
    t = np.array([0.3, 0.1, 0.8])
    R = rotations[1234]
    estimate = estimate_of()
    estimate = PoseEstimate(
        **{**vars(estimate), "distribution": distribution, "delta_R": R, "R_camera_object": R}
        | {"t_camera_object": t, "modes": (PoseMode(R, t, 1.0),)}
        | {"reference": replace(estimate.reference, R_camera_object=np.eye(3))}
    )
    directions = icosphere(3)
    masses = messages.viewpoint_masses(estimate, directions)
    assert masses.sum() == pytest.approx(1)
    brightest = R @ directions[np.argmax(masses)]  # in the camera's axes, from the object
    assert np.degrees(np.arccos(brightest @ -t / np.linalg.norm(t))) < 6
    marker = messages.markers(HEADER, [(estimate, 0.1)]).markers[1]
    alpha = [colour.a for colour in marker.colors]
    assert np.argmax(alpha) == np.argmax(masses) and max(alpha) == pytest.approx(1)


def test_a_photograph_is_decoded_as_the_sensor_saw_it() -> None:
    """Its calibration is of the sensor's rows and columns, whatever its EXIF data say of how to show it."""
    picture = PIL.Image.fromarray(smooth())
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    kept = BytesIO()
    picture.save(kept, "JPEG", exif=turned)
    message = CompressedImage(format="jpeg", data=array("B", kept.getvalue()))
    assert messages.image_array(message).shape == smooth().shape


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_rows_may_be_padded_also_where_cv_bridge_converts(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reading of such rows goes by whole pixels."""

    class Bridge:
        def imgmsg_to_cv2(self, message: Image, encoding: str) -> np.ndarray:
            assert encoding == "rgb8" and message.encoding == "rgb8"
            rows = np.frombuffer(bytes(message.data), np.uint8)
            return rows.reshape(message.height, int(message.step / 3), 3)[:, : message.width]

    monkeypatch.setattr(distro, "cv_bridge", SimpleNamespace(CvBridge=Bridge))
    rgb = smooth()
    rows = np.pad(rgb.reshape(len(rgb), -1), ((0, 0), (0, padding)))
    message = Image(height=rgb.shape[0], width=rgb.shape[1], encoding="rgb8", step=rows.shape[1])
    message.data = array("B", rows.tobytes())
    np.testing.assert_array_equal(messages.image_array(message), rgb)
