"""What a ROS distribution has and PyPI has not: the distribution's own where it imports, else what stands in for it.

The rest of the package asks this module and never looks for cv_bridge, tf2_ros or tf_transformations itself. tf2_msgs
and vision_msgs are only message definitions: ``interfaces/`` builds the same ones where they are missing. launch has no
stand-in: the files in ``launch/`` are for where it is. Nothing here needs a running ROS; ``nope_ros.node.tf`` does.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from importlib.util import find_spec
from typing import Protocol

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp
from sensor_msgs.msg import Image
from tf2_msgs.msg import TFMessage

from nope_ros.node.pairing import JUMP_BACK

Array = NDArray[np.float64]

try:
    import cv_bridge

    # The compiled part fails to import on another NumPy than it was built with.
    from cv_bridge.boost.cv_bridge_boost import cvtColor2 as _  # noqa: F401
except (ImportError, AttributeError):
    cv_bridge = None
try:
    import tf_transformations
except ImportError:
    tf_transformations = None


def providers() -> dict[str, str]:
    """Who does the work of each of the distribution's packages here: "distribution" or "nope_ros"."""
    found = {
        "cv_bridge": cv_bridge is not None,
        "tf2_ros": find_spec("tf2_ros") is not None,
        "tf_transformations": tf_transformations is not None,
    }
    return {name: "distribution" if there else "nope_ros" for name, there in found.items()}


# --- tf_transformations ---------------------------------------------------------------------------------------------


def quaternion_xyzw(R: Array) -> Array:
    """Quaternions (..., 4) with w ≥ 0 of rotation matrices (..., 3, 3)."""
    R = np.asarray(R, dtype=np.float64)
    if tf_transformations is not None and R.ndim == 2:
        matrix = np.eye(4)
        matrix[:3, :3] = R
        xyzw = np.array(tf_transformations.quaternion_from_matrix(matrix))
    else:
        xyzw = Rotation.from_matrix(R.reshape(-1, 3, 3)).as_quat().reshape(*R.shape[:-2], 4)
    # Of the two signs the one that every user of the quaternion would choose, so that equal poses are equal messages.
    signed: Array = np.where(xyzw[..., 3:] < 0, -xyzw, xyzw)
    return signed


def rotation_matrix(xyzw: Array) -> Array:
    """Rotation matrix (3, 3) of a unit quaternion (4,)."""
    if tf_transformations is not None:
        matrix: Array = np.array(tf_transformations.quaternion_matrix(xyzw))[:3, :3]
        return matrix
    return Rotation.from_quat(xyzw).as_matrix()


# --- cv_bridge ------------------------------------------------------------------------------------------------------

# Bytes a pixel, and how OpenCV takes it to RGB (None: it is RGB). OpenCV names a Bayer pattern by its second row.
COLOUR_ENCODINGS: dict[str, tuple[int, int | None]] = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
    "yuv422": (2, cv2.COLOR_YUV2RGB_UYVY),
    "uyvy": (2, cv2.COLOR_YUV2RGB_UYVY),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2RGB_YUYV),
    "yuyv": (2, cv2.COLOR_YUV2RGB_YUYV),
    "bayer_rggb8": (1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr8": (1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg8": (1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg8": (1, cv2.COLOR_BayerGB2RGB),
}
# What every version of cv_bridge converts.
_CV_BRIDGE_CONVERTS = ("rgb8", "bgr8", "rgba8", "bgra8", "mono8")


def image_to_rgb(message: Image, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A colour image as RGB.

    Args:
        message: sensor_msgs/Image of one of ``COLOUR_ENCODINGS``.
        pixels: its data (H, W[, C]), row padding left out.

    Returns:
        (H, W, 3) uint8.
    """
    if cv_bridge is not None and message.encoding in _CV_BRIDGE_CONVERTS:
        if message.step != pixels[0].nbytes:  # it misreads rows whose padding is no multiple of a pixel
            message = Image(height=message.height, width=message.width, encoding=message.encoding)
            message.step = pixels[0].nbytes
            message.data = array("B", pixels.tobytes())  # of bytes, rclpy would check each
        converted: NDArray[np.uint8] = cv_bridge.CvBridge().imgmsg_to_cv2(message, "rgb8")
        return converted
    code = COLOUR_ENCODINGS[message.encoding][1]
    rgb: NDArray[np.uint8] = pixels if code is None else cv2.cvtColor(np.ascontiguousarray(pixels), code)
    return rgb


# --- rclpy ----------------------------------------------------------------------------------------------------------


def nanoseconds(stamp: Time) -> int:
    """A stamp as one number, as ``rclpy.time.Time`` has it."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


# --- tf2_ros --------------------------------------------------------------------------------------------------------


class TransformError(LookupError):
    """A transform is not known (yet): the message says which and why."""


class Transforms(Protocol):
    """Where frames are at a moment."""

    def pose(self, target: str, source: str, stamp: int, timeout: float) -> tuple[Array, Array]:
        """R_target_source (3, 3) and t_target_source (3,), as ``rotation``: x_target = R x_source + t."""
        ...

    def rotation(self, target: str, source: str, stamp: int, timeout: float) -> Array:
        """R_target_source (3, 3) at a stamp in nanoseconds, waited for up to timeout seconds.

        Raises:
            TransformError: if it has not come by then.
        """
        ...


HISTORY = 10_000_000_000
"""Nanoseconds of transforms kept, as tf2 does; a node keeps as much longer as images may wait for their masks."""

_InParent = tuple[Array, Array]  # quaternion and origin


class TransformTree:
    """A tree of frames over the last seconds; interpolated between stamps, never beyond them.

    Args:
        history: nanoseconds of transforms that are kept; None: all, of a clock that only goes forward.

    Attributes:
        history: the same; may be changed.
    """

    def __init__(self, history: int | None = HISTORY) -> None:
        self.history = history
        self._changed = threading.Condition()
        self._parents: dict[str, str] = {}
        self._fixed: dict[str, _InParent] = {}
        self._moving: dict[str, deque[tuple[int, _InParent]]] = defaultdict(deque)

    def take(self, message: TFMessage, *, static: bool) -> None:
        """Take in a message of /tf or /tf_static."""
        for transform in message.transforms:
            q, t = transform.transform.rotation, transform.transform.translation
            stamp = nanoseconds(transform.header.stamp)
            quaternion = np.array([q.x, q.y, q.z, q.w])
            origin = np.array([t.x, t.y, t.z])
            self.insert(transform.header.frame_id, transform.child_frame_id, stamp, quaternion, origin, static=static)

    def insert(
        self, parent: str, child: str, stamp: int, xyzw: Array, origin: Array | None = None, *, static: bool
    ) -> None:
        """Take in a child frame in its parent: quaternion (4,), not necessarily of unit length, and origin (3,)."""
        translation = np.zeros(3) if origin is None else origin
        parent, child = parent.lstrip("/"), child.lstrip("/")
        length = float(np.linalg.norm(xyzw))
        if not parent or not child or parent == child or not np.isfinite([length, *translation]).all() or length < 1e-9:
            return  # as tf2 does: a broken sender must not break the tree
        with self._changed:
            self._parents[child] = parent
            if static:
                self._fixed[child] = (xyzw / length, translation)
            else:
                history = self._moving[child]
                kept = self.history
                if kept is not None and history and stamp < history[-1][0] - JUMP_BACK:
                    history.clear()
                if not history or stamp > history[-1][0]:
                    history.append((stamp, (xyzw / length, translation)))
                while kept is not None and history[0][0] < history[-1][0] - kept:
                    history.popleft()
            self._changed.notify_all()

    def rotation(self, target: str, source: str, stamp: int, timeout: float) -> Array:
        """See ``Transforms.rotation``."""
        return self.pose(target, source, stamp, timeout)[0]

    def pose(self, target: str, source: str, stamp: int, timeout: float) -> tuple[Array, Array]:
        """See ``Transforms.pose``."""
        target, source = target.lstrip("/"), source.lstrip("/")
        found: list[tuple[Array, Array]] = []
        reason = ""

        def look() -> bool:
            nonlocal reason
            try:
                R_target, t_target = self._to_root(target, stamp, source)
                R_source, t_source = self._to_root(source, stamp, target)
                found.append((R_target.T @ R_source, R_target.T @ (t_source - t_target)))
            except TransformError as error:
                reason = str(error)
            return bool(found)

        with self._changed:
            if not self._changed.wait_for(look, timeout):
                raise TransformError(f"TF from '{source}' to '{target}': {reason}")
        return found[0]

    def _to_root(self, frame: str, stamp: int, other: str) -> tuple[Array, Array]:
        """R_common_frame and t_common_frame, up to the root or the nearest ancestor shared with the other frame."""
        ancestors = set(self._chain(other))
        R, t = np.eye(3), np.zeros(3)
        for child in self._chain(frame):
            if child in ancestors:
                return R, t
            if child not in self._parents:
                for name in (frame, other):
                    if name not in self._parents and name not in self._parents.values():
                        raise TransformError(f"frame '{name}' was never sent")
                raise TransformError("they are not connected")
            R_parent, t_parent = self._in_parent(child, stamp)
            R, t = R_parent @ R, R_parent @ t + t_parent
        raise TransformError(f"frame '{frame}' is its own ancestor")

    def _chain(self, frame: str) -> list[str]:
        chain = [frame]
        while chain[-1] in self._parents and len(chain) <= len(self._parents):
            chain.append(self._parents[chain[-1]])
        return chain

    def _in_parent(self, child: str, stamp: int) -> tuple[Array, Array]:
        if child in self._fixed:
            xyzw, translation = self._fixed[child]
            return rotation_matrix(xyzw), translation
        history = self._moving[child]
        after = bisect_left(history, stamp, key=lambda entry: entry[0])
        if after == len(history):
            raise TransformError(f"'{child}' is {(stamp - history[-1][0]) / 1e9:.3f} s behind the image")
        if history[after][0] == stamp:
            xyzw, translation = history[after][1]
            return rotation_matrix(xyzw), translation
        if after == 0:
            raise TransformError(f"'{child}' begins {(history[0][0] - stamp) / 1e9:.3f} s after the image")
        (begin, (q0, p0)), (end, (q1, p1)) = history[after - 1], history[after]
        share = (stamp - begin) / (end - begin)
        turn: Array = Slerp([0, 1], Rotation.from_quat([q0, q1]))(share).as_matrix()
        return turn, (1 - share) * p0 + share * p1
