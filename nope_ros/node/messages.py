"""Messages to arrays and back. Pure functions: no node, no clock, no state.

What comes in is checked here, and an ``InputError`` names the topic, what is wrong with it and what to do.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from typing import TypeVar, get_args

import cv2
import numpy as np
import PIL
import PIL.Image
from geometry_msgs.msg import (
    Point,
    Pose,
    PoseWithCovariance,
    PoseWithCovarianceStamped,
    Quaternion,
    TransformStamped,
    Vector3,
)
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import ColorRGBA, Header
from vision_msgs.msg import BoundingBox3D, Detection3D, Detection3DArray, ObjectHypothesis, ObjectHypothesisWithPose
from visualization_msgs.msg import Marker, MarkerArray

from nope_ros.draw import viewing_directions
from nope_ros.frame import LARGEST_SIDE, Camera, DistortionModel, InputError
from nope_ros.msg import ObjectPose, ObjectPoseArray, PoseDistribution, PoseMode
from nope_ros.node import distro
from nope_ros.pose import PoseEstimate
from nope_ros.rotations import icosphere

Array = NDArray[np.float64]
Pixel = TypeVar("Pixel", np.uint8, np.uint16, np.float32)

MASK_ENCODINGS = ("mono8", "8UC1", "16UC1", "mono16")
DEPTH_ENCODINGS = ("32FC1", "16UC1", "mono16")

# Of an image that is decoded: twice the largest cameras', 400 MB.
_MOST_PIXELS = 2**27

# Colours of the x, y and z axis.
_AXES = ((0.9, 0.1, 0.1), (0.1, 0.7, 0.1), (0.15, 0.35, 1.0))


# --- in -------------------------------------------------------------------------------------------------------------


def image_array(message: Image | CompressedImage) -> NDArray[np.uint8]:
    """The pixels of a colour image, (H, W, 3) RGB.

    Raises:
        InputError: if the encoding is not an 8-bit colour or grey one, or data is missing.
    """
    if isinstance(message, CompressedImage):
        return _decompressed(message)
    known = distro.COLOUR_ENCODINGS
    if message.encoding not in known:
        raise InputError(
            f"image: encoding '{message.encoding}' is not supported; publish rgb8 or bgr8 (also: {', '.join(known)})"
        )
    channels, _ = known[message.encoding]
    if message.encoding.startswith(("yuv", "uyvy")) and message.width % 2:
        raise InputError(f"image: encoding '{message.encoding}' needs an even width, not {message.width}")
    return distro.image_to_rgb(message, _pixels(message, "image", np.uint8, channels))


def _decompressed(message: CompressedImage) -> NDArray[np.uint8]:
    data = np.frombuffer(message.data, np.uint8)
    if data.size == 0:
        raise InputError("image: the compressed image is empty")
    _check_announced_size(data)
    # Mask and calibration are of the sensor's rows and columns, whatever the file says of how to show them.
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None:
        raise InputError(
            f"image: format '{message.format}' ({data.size} bytes) cannot be decoded; was it cut short, or is it "
            "neither JPEG nor PNG?"
        )
    rgb: NDArray[np.uint8] = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB, dst=decoded)
    return rgb


def _check_announced_size(data: NDArray[np.uint8]) -> None:
    # Before anything is decoded: a few bytes can announce gigabytes.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            width, height = PIL.Image.open(BytesIO(data.tobytes())).size
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"image: {error}") from None
    except (PIL.UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return  # the decoder says what is wrong
    if max(width, height) > LARGEST_SIDE or width * height > _MOST_PIXELS:
        raise InputError(f"image: {width}x{height} px are announced, more than any camera has")


def check_together(image: Image | CompressedImage, mask: Image, camera_info: CameraInfo) -> None:
    """Refuse messages of several cameras: where a camera is started anew, or two run in step, stamps are not enough.

    Raises:
        InputError: if the mask or the calibration is of another frame than the image. Empty frames go with any.
    """
    frame = image.header.frame_id
    for name, other, advice in (
        ("mask", mask.header.frame_id, "the segmentation must copy the header of its image"),
        ("camera_info", camera_info.header.frame_id, "publish it with the header of its image"),
    ):
        if frame and other and other != frame:
            raise InputError(f"{name}: is of the frame '{other}', the image of '{frame}'; {advice}")


def checked_stamp(kind: str, header: Header) -> int:
    """The stamp of an image, mask or depth image, nanoseconds.

    Raises:
        InputError: if there is none. All would be taken for the same moment.
    """
    stamp = distro.nanoseconds(header.stamp)
    if stamp == 0 and kind != "camera_info":
        raise InputError(f"{kind}: header.stamp is zero, so nothing tells which image and mask belong together; set it")
    return stamp


def mask_array(message: Image) -> NDArray[np.uint16]:
    """Instance ids (H, W) of a mask, 0 = background. In mono8 anything above 0 is instance 1.

    Raises:
        InputError: if the encoding is none of a mask, or data is missing.
    """
    if message.encoding not in MASK_ENCODINGS:
        raise InputError(
            f"mask: encoding '{message.encoding}' is not supported; publish mono8 (above 0: the object), "
            "or 8UC1 or 16UC1 with instance ids"
        )
    wide = message.encoding in ("16UC1", "mono16")
    ids = (_pixels(message, "mask", np.uint16) if wide else _pixels(message, "mask", np.uint8)).astype(np.uint16)
    return np.minimum(ids, 1) if message.encoding == "mono8" else ids


def instances(ids: NDArray[np.uint16], at_most: int) -> Sequence[int]:
    """The instance ids of a mask, the largest ones first."""
    counts = np.bincount(ids[ids > 0])  # of all of a large image it would take three times as long
    order = np.argsort(-counts, kind="stable")[:at_most]
    return [int(instance) for instance in order if counts[instance] > 0]


def depth_array(message: Image) -> NDArray[np.float32]:
    """Depth (H, W) in metres, NaN where unknown (REP-118: 32FC1 are metres, 16UC1 millimetres).

    Raises:
        InputError: if the encoding is none of depth, or data is missing.
    """
    if message.encoding not in DEPTH_ENCODINGS:
        raise InputError(
            f"depth: encoding '{message.encoding}' is not supported; publish 32FC1 in metres or 16UC1 in millimetres"
        )
    if message.encoding == "32FC1":
        depth = _pixels(message, "depth", np.float32).astype(np.float32)
    else:
        depth = _pixels(message, "depth", np.uint16).astype(np.float32) / np.float32(1000)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def _pixels(message: Image, name: str, dtype: type[Pixel], channels: int = 1) -> NDArray[Pixel]:
    """The data as (H, W[, C]) in this machine's byte order, without the padding at the end of rows."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    if not (0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise InputError(f"{name}: size {width}x{height} is not within 1..{LARGEST_SIDE} px")
    row = width * channels * np.dtype(dtype).itemsize
    step = step or row  # some senders leave it out
    if step < row:
        raise InputError(f"{name}: step is {step} bytes, a row of {width} px in '{message.encoding}' takes {row}")
    # The last row need not be padded.
    needed = step * (height - 1) + row
    data = np.frombuffer(message.data, np.uint8)
    if data.size < needed:
        raise InputError(
            f"{name}: data has {data.size} bytes, {width}x{height} px in '{message.encoding}' take {needed}; "
            "it was cut short"
        )
    rows = np.lib.stride_tricks.as_strided(data, (height, row), (step, 1), writeable=False)
    order = np.dtype(dtype).newbyteorder(">" if message.is_bigendian else "<")
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.ascontiguousarray(rows).view(order).astype(dtype, copy=False).reshape(shape)


def camera(message: CameraInfo, *, rectified: bool = False) -> Camera:
    """Calibration of the image that was sent, region of interest and binning applied.

    Args:
        message: sensor_msgs/CameraInfo.
        rectified: whether the image has been undistorted already; its intrinsics are then those of P.

    Raises:
        InputError: if K is empty, holds NaN, or the distortion model is unknown.
    """
    K = np.array(message.p, dtype=np.float64).reshape(3, 4)[:, :3] if rectified else np.array(message.k).reshape(3, 3)
    if not K.any():
        name = "P" if rectified else "K"
        raise InputError(
            f"camera_info: {name} is all zero, the camera is not calibrated; publish a calibrated camera_info"
        )
    region = message.roi
    binning = np.array([message.binning_x or 1, message.binning_y or 1], dtype=np.float64)
    size = np.array([region.width or message.width, region.height or message.height]) // binning.astype(int)
    K = K.astype(np.float64)
    K[:2, 2] -= [region.x_offset, region.y_offset]
    K[:2] /= binning[:, None]
    _check_plausible(K, size)
    distortion = tuple(float(value) for value in message.d)
    if rectified or not any(distortion):
        return _camera(K, size, (), "none")
    return _camera(K, size, *_distortion(message.distortion_model, distortion))


def _check_plausible(K: Array, size: NDArray[np.integer]) -> None:
    # No lens is outside these. Numbers that are would make sizes overflow later on.
    focal, centre = K[[0, 1], [0, 1]], K[:2, 2]
    if not (focal > 0).all() or not np.isfinite(K).all():
        return  # Camera says what is wrong
    if focal.max() > 4 * focal.min() or focal.min() < 0.05 * size.max() or focal.max() > 1000 * size.max():
        raise InputError(
            f"camera_info: focal lengths fx={K[0, 0]:g}, fy={K[1, 1]:g} px do not fit an image of {size[0]}x{size[1]} "
            "px; calibrate the camera"
        )
    if (np.abs(centre - size / 2) > 10 * size.max()).any():
        raise InputError(
            f"camera_info: the optical axis is at {K[0, 2]:g}, {K[1, 2]:g} px, far off an image of {size[0]}x{size[1]} "
            "px; calibrate the camera"
        )


def _distortion(name: str, coefficients: tuple[float, ...]) -> tuple[tuple[float, ...], DistortionModel]:
    known: dict[str, DistortionModel] = {model: model for model in get_args(DistortionModel)}
    known["fisheye"] = "equidistant"
    if name not in known or name == "none":
        raise InputError(
            f"camera_info: distortion model '{name}' is not supported; known: {', '.join(known)}. "
            "Rectify the image and set the parameter 'rectified'"
        )
    return coefficients, known[name]


def _camera(K: Array, size: NDArray[np.integer], distortion: tuple[float, ...], model: DistortionModel) -> Camera:
    try:
        return Camera(K, int(size[0]), int(size[1]), distortion, model)
    except InputError as error:
        raise InputError(str(error).replace("camera: ", "camera_info: ", 1)) from None


def pose_arrays(message: Pose) -> tuple[Array, Array]:
    """Rotation (3, 3) and translation (3,) of a pose.

    Raises:
        InputError: if a number is not finite, or the quaternion is zero.
    """
    xyzw = np.array([message.orientation.x, message.orientation.y, message.orientation.z, message.orientation.w])
    t = np.array([message.position.x, message.position.y, message.position.z])
    length = float(np.linalg.norm(xyzw))
    if not np.isfinite(xyzw).all() or not np.isfinite(t).all():
        raise InputError("reference_pose: it holds NaN or infinity")
    if abs(length - 1) > 0.01:
        raise InputError(f"reference_pose: the quaternion has length {length:.3g} instead of 1")
    return distro.rotation_matrix(xyzw / length), t


# --- out ------------------------------------------------------------------------------------------------------------


def quaternion(R: Array) -> Quaternion:
    """A rotation matrix (3, 3)."""
    x, y, z, w = distro.quaternion_xyzw(R).tolist()
    return Quaternion(x=x, y=y, z=z, w=w)


def pose(R: Array, t: Array) -> Pose:
    """Rotation (3, 3) and translation (3,)."""
    x, y, z = t.tolist()
    return Pose(position=Point(x=x, y=y, z=z), orientation=quaternion(R))


def pose_with_covariance(estimate: PoseEstimate) -> PoseWithCovariance:
    """The best mode with its covariance."""
    return PoseWithCovariance(
        pose=pose(estimate.R_camera_object, estimate.t_camera_object), covariance=estimate.covariance.ravel().tolist()
    )


def pose_with_covariance_stamped(header: Header, estimate: PoseEstimate) -> PoseWithCovarianceStamped:
    """The best mode with its covariance, in the camera's optical frame."""
    return PoseWithCovarianceStamped(header=header, pose=pose_with_covariance(estimate))


def object_pose(estimate: PoseEstimate, instance: int, *, trusted: bool) -> ObjectPose:
    """An estimate in full."""
    modes = [
        PoseMode(pose=pose(mode.R_camera_object, mode.t_camera_object), score=mode.probability)
        for mode in estimate.modes
    ]
    return ObjectPose(
        object_id=estimate.object_id,
        instance=instance,
        pose=pose_with_covariance(estimate),
        relative_rotation=quaternion(estimate.delta_R),
        prior=estimate.prior,
        confidence=estimate.confidence,
        ambiguity=int(estimate.ambiguity),
        entropy=estimate.distribution.entropy,
        similarity=estimate.similarity,
        metric=estimate.metric,
        trusted=trusted,
        modes=modes,
    )


def object_poses(header: Header, poses: list[ObjectPose]) -> ObjectPoseArray:
    """All objects of an image; empty where none is seen."""
    return ObjectPoseArray(header=header, poses=poses)


def transform(header: Header, child_frame: str, estimate: PoseEstimate) -> TransformStamped:
    """The best mode as a transform from the camera's optical frame."""
    message = TransformStamped(header=header, child_frame_id=child_frame)
    x, y, z = estimate.t_camera_object.tolist()
    message.transform.translation = Vector3(x=x, y=y, z=z)
    message.transform.rotation = quaternion(estimate.R_camera_object)
    return message


def detection(header: Header, estimate: PoseEstimate, centre_object: Array, diameter: float) -> Detection3D:
    """An object with its modes as hypotheses, best first.

    The covariance is that of the first hypothesis. The others have none (all zero: unknown): the spread around a mode
    that is not the best is not computed.

    Args:
        header: of the image.
        estimate: the pose.
        centre_object: (3,) centre of the object in the object frame.
        diameter: of the sphere around it, in the pose's unit of length.
    """
    results = []
    for index, mode in enumerate(estimate.modes):
        hypothesis = ObjectHypothesis(class_id=estimate.object_id, score=float(np.clip(mode.probability, 0, 1)))
        spread = PoseWithCovariance(pose=pose(mode.R_camera_object, mode.t_camera_object))
        if index == 0:
            spread.covariance = estimate.covariance.ravel().tolist()
        results.append(ObjectHypothesisWithPose(hypothesis=hypothesis, pose=spread))
    centre = estimate.t_camera_object + estimate.R_camera_object @ centre_object
    box = BoundingBox3D(center=pose(estimate.R_camera_object, centre), size=Vector3(x=diameter, y=diameter, z=diameter))
    return Detection3D(header=header, results=results, bbox=box, id=estimate.object_id)


def detections(header: Header, found: list[Detection3D]) -> Detection3DArray:
    """All objects of an image; empty where none is seen."""
    return Detection3DArray(header=header, detections=found)


def distribution(header: Header, estimate: PoseEstimate, count: int) -> PoseDistribution:
    """The ``count`` most probable orientations, and what the others have together."""
    probabilities = estimate.distribution.probabilities
    order = np.argsort(-probabilities, kind="stable")[:count]
    quaternions = distro.quaternion_xyzw(estimate.orientations[order])
    listed = probabilities[order].astype(np.float32)
    return PoseDistribution(
        header=header,
        object_id=estimate.object_id,
        prior=estimate.prior,
        orientations=[Quaternion(x=x, y=y, z=z, w=w) for x, y, z, w in quaternions.tolist()],
        probabilities=array("f", listed.tobytes()),
        probability_left_out=float(max(0.0, 1.0 - listed.sum(dtype=np.float64))),
    )


def image(header: Header, rgb: NDArray[np.uint8]) -> Image:
    """A colour image (H, W, 3), RGB."""
    height, width = rgb.shape[:2]
    # An array.array is taken as it is; bytes would be checked one by one.
    data = array("B", np.ascontiguousarray(rgb).tobytes())
    return Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width, data=data)


def mask(header: Header, ids: NDArray[np.uint16] | NDArray[np.bool_]) -> Image:
    """A mask (H, W): instance ids as 16UC1, that of one object (bool) as mono8."""
    height, width = ids.shape
    encoding, pixels = ("mono8", ids * np.uint8(255)) if ids.dtype == np.bool_ else ("16UC1", ids.astype("<u2"))
    step = width * pixels.itemsize
    return Image(
        header=header, height=height, width=width, encoding=encoding, step=step, data=array("B", pixels.tobytes())
    )


def markers(header: Header, estimates: Iterable[tuple[PoseEstimate, float]], gone: Collection[str] = ()) -> MarkerArray:
    """Axes, a sphere of probabilities and an ellipsoid of the position's covariance for each object.

    The sphere is fixed to the object's best pose. A point of it is bright where the camera may be as seen from the
    object: one bright spot that faces the camera for a pose that is sure, several for a symmetric object.

    Args:
        header: of the image.
        estimates: poses, and the radius of each object.
        gone: ids of objects whose markers are to be deleted.
    """
    result = [
        Marker(header=header, ns=f"{object_id}/{part}", action=Marker.DELETE)
        for object_id in gone
        for part in ("axes", "probabilities", "covariance")
    ]
    for estimate, radius in estimates:
        result += [
            _axes(header, estimate, 1.5 * radius),
            _probabilities(header, estimate, 1.2 * radius),
            _ellipsoid(header, estimate),
        ]
    return MarkerArray(markers=result)


def no_markers() -> MarkerArray:
    """Removes every marker."""
    return MarkerArray(markers=[Marker(action=Marker.DELETEALL)])


def _axes(header: Header, estimate: PoseEstimate, length: float) -> Marker:
    marker = Marker(header=header, ns=f"{estimate.object_id}/axes", type=Marker.LINE_LIST)
    marker.pose = pose(estimate.R_camera_object, estimate.t_camera_object)
    marker.scale.x = 0.04 * length
    marker.color.a = 1.0
    for tip, (r, g, b) in zip((length * np.eye(3)).tolist(), _AXES, strict=True):
        marker.points += [Point(), Point(x=tip[0], y=tip[1], z=tip[2])]
        marker.colors += [ColorRGBA(r=r, g=g, b=b, a=1.0)] * 2
    return marker


def viewpoint_masses(estimate: PoseEstimate, directions: Array) -> Array:
    """Probability (D,) that the camera, seen from the object, is in each of the directions (D, 3), object frame."""
    towards = viewing_directions(estimate.orientations, estimate.t_camera_object)
    nearest = np.argmax(towards @ directions.T, axis=1)
    masses = np.bincount(nearest, weights=estimate.distribution.probabilities, minlength=len(directions))
    return masses.astype(np.float64)


def _probabilities(header: Header, estimate: PoseEstimate, radius: float) -> Marker:
    directions = icosphere(3)
    masses = viewpoint_masses(estimate, directions)
    # Square root: a second mode with a tenth of the mass is still to be seen.
    level = np.sqrt(masses / max(masses.max(), 1e-12))
    colours = cv2.applyColorMap((level * 255).astype(np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1] / 255.0
    marker = Marker(header=header, ns=f"{estimate.object_id}/probabilities", type=Marker.POINTS)
    marker.pose = pose(estimate.R_camera_object, estimate.t_camera_object)
    marker.scale.x = marker.scale.y = 0.08 * radius
    marker.color.a = 1.0
    marker.points = [Point(x=x, y=y, z=z) for x, y, z in (radius * directions).tolist()]
    marker.colors = [
        ColorRGBA(r=r, g=g, b=b, a=0.15 + 0.85 * a)
        for (r, g, b), a in zip(colours.tolist(), level.tolist(), strict=True)
    ]
    return marker


def _ellipsoid(header: Header, estimate: PoseEstimate) -> Marker:
    """Two standard deviations of the position each way."""
    variances, axes = np.linalg.eigh(estimate.covariance[:3, :3])
    if np.linalg.det(axes) < 0:
        axes[:, 0] *= -1
    marker = Marker(header=header, ns=f"{estimate.object_id}/covariance", type=Marker.SPHERE)
    marker.pose = pose(axes, estimate.t_camera_object)
    x, y, z = (4 * np.sqrt(np.maximum(variances, 1e-10))).tolist()
    marker.scale = Vector3(x=x, y=y, z=z)
    marker.color = ColorRGBA(r=0.9, g=0.6, b=0.9, a=0.35)
    return marker
