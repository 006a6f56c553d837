"""Recorded sequences of one object: a folder of images, masks and ``poses.json``, or a bag.

A folder (see ``demo/sequence``):

    poses.json    "images": a list of {"file", "mask", "K" (3×3), optional "R" (3×3) and "t" (3)}, where
                  x_camera = R x_object + t, optical axes, metres; images undistorted. Optional "depth" of an image:
                  a 16-bit PNG of its size, millimetres along z, 0 where unknown. Optional "up" (3): the object's
                  up axis in its own frame, which gives gravity in every image, and "object": its name.
    images/ masks/    masks: above 127 is the object, or 1 where nothing is more

A bag (MCAP or sqlite3) is decoded by the node's own converters.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from nope_ros.frame import Camera, InputError
from nope_ros.node.bagfile import BAG_SUFFIXES, IMAGE_TYPE, Topics, choose_topics, open_bag
from nope_ros.node.distro import nanoseconds
from nope_ros.node.interfaces import deserialized

if TYPE_CHECKING:
    from rosbags.highlevel import AnyReader
    from rosbags.interfaces import Connection

Array = NDArray[np.float64]

POSES_FILE = "poses.json"
# Sent along with the frames of a bag, as they are: what gravity can be read from.
_PASSED_ON = ("tf2_msgs/msg/TFMessage", "sensor_msgs/msg/Imu")
# Frames of a bag that wait for their masks or depth at once; a slow detector is a second or two behind.
_WAITING = 150


@dataclass(frozen=True)
class Truth:
    """The true pose of the object, x_camera = R x_object + t: R (3, 3), t (3,) metres. For scoring only."""

    R_camera_object: Array
    t_camera_object: Array

    @property
    def direction(self) -> Array:
        """Unit vector (3,) from the object to the camera, object frame."""
        towards: Array = -self.R_camera_object.T @ self.t_camera_object
        return towards / np.linalg.norm(towards)


@dataclass(frozen=True)
class PassedOn:
    """A message of a bag that is published as it is: topic, type and serialized form."""

    topic: str
    type_name: str
    data: bytes


@dataclass(frozen=True)
class Moment:
    """One frame of a sequence.

    Attributes:
        name: of the image file, or the stamp.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.
        camera: its calibration.
        gravity_camera: (3,) direction of gravity (down), or None if the sequence does not tell.
        truth: or None.
        frame_id: of the camera.
        stamp: nanoseconds; None where the sequence has no clock of its own.
        before: messages to publish before this frame.
        depth: (H, W) float32 metres along z, registered to the image, 0 or NaN where unknown; or None.
    """

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    camera: Camera
    gravity_camera: Array | None = None
    truth: Truth | None = None
    frame_id: str = "camera_optical_frame"
    stamp: int | None = None
    before: tuple[PassedOn, ...] = ()
    depth: NDArray[np.float32] | None = None


def packaged(name: str) -> Path | None:
    """A file or folder that comes with the package such as ``demo/sequence``, in the checkout or installed, or None."""
    shares = [Path(prefix, "share", "nope_ros") for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
    for root in (Path.cwd(), Path(__file__).resolve().parents[1], *shares):
        if (root / "nope_ros").is_dir() or root in shares:
            path = root / name
            if path.exists():
                return path
    return None


class Recording(ABC):
    """A sequence; can be read more than once, one frame in memory at a time.

    Attributes:
        name: of the object, or of the file.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames; of a bag at most, as masks may be missing."""

    @abstractmethod
    def __iter__(self) -> Iterator[Moment]:
        """The frames in order."""


def open_recording(
    path: str | Path,
    *,
    topics: Topics | None = None,
    depth_topic: str | None = None,
    rectified: bool = False,
    instance: int = 0,
    reference: int = 0,
    limit: int | None = None,
    posed: bool = True,
) -> Recording:
    """Open a folder or a bag.

    Args:
        path: folder with poses.json, bag folder with metadata.yaml, or an .mcap or .db3 file.
        topics: of a bag.
        depth_topic: of a bag: depth registered to the image; empty: found if there is one; None: not read.
        rectified: whether a bag's images are undistorted already, so that P of camera_info holds, not K and D.
        instance: id of the object in a bag's mask; 0: whatever is above 0.
        reference: index of a folder's reference frame, which is moved to the front.
        limit: most frames, evenly spread over the sequence (of a bag: the first ones).
        posed: whether a folder's poses, and the gravity that follows, are read.

    Raises:
        InputError: if it is neither, or incomplete.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if limit is not None and limit < 1:
        raise InputError(f"frames: {limit} is not positive")
    if (path / POSES_FILE).is_file():
        return FolderRecording(path, reference=reference, limit=limit, posed=posed)
    bags = [path]
    if not (path.suffix in BAG_SUFFIXES or (path / "metadata.yaml").is_file()):
        bags = [entry for entry in path.iterdir() if entry.suffix in BAG_SUFFIXES] if path.is_dir() else []
    if len(bags) == 1:
        return BagRecording(
            bags[0], topics or Topics(), depth_topic=depth_topic, rectified=rectified, instance=instance, limit=limit
        )
    raise InputError(
        f"{path}: neither a sequence (a folder with {POSES_FILE}, images and masks) nor a bag (a folder with "
        "metadata.yaml, or an .mcap or .db3 file)"
    )


class FolderRecording(Recording):
    """Images, masks and poses.json."""

    def __init__(self, folder: Path, *, reference: int = 0, limit: int | None = None, posed: bool = True) -> None:
        self.folder = folder
        self.posed = posed
        try:
            content = json.loads((folder / POSES_FILE).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / POSES_FILE}: cannot be read ({error})") from None
        entries = content.get("images") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{folder / POSES_FILE}: 'images' is missing or empty")
        if not 0 <= reference < len(entries):
            raise InputError(f"reference: {reference} is not within 0..{len(entries) - 1}")
        self.name = str(content.get("object") or folder.name).rsplit("/", 1)[-1]
        up = content.get("up") if posed else None
        self.up = None if up is None else _vector(up, f"{folder / POSES_FILE}: 'up'")
        # Others keep their order: a video with one frame moved is still a video.
        others = [entry for index, entry in enumerate(entries) if index != reference]
        ordered = [entries[reference], *others]
        if limit is not None and limit < len(ordered):
            ordered = [ordered[i] for i in np.unique(np.linspace(0, len(ordered) - 1, limit).round().astype(int))]
        self.entries: list[dict[str, Any]] = ordered

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Moment]:
        for entry in self.entries:
            yield self._moment(entry)

    def _moment(self, entry: dict[str, Any]) -> Moment:
        where = f"{self.folder / POSES_FILE}: image {self.entries.index(entry)} ('{entry.get('file', 'no file')}')"
        lacking = [key for key in ("file", "mask", "K") if entry.get(key) is None]
        if self.posed and (entry.get("R") is None) != (entry.get("t") is None):
            lacking += [key for key in ("R", "t") if entry.get(key) is None]
        if lacking:
            raise InputError(f"{where}: has no {' and no '.join(lacking)}")
        try:
            image_path, mask_path = self.folder / entry["file"], self.folder / entry["mask"]
            depth_path = None if entry.get("depth") is None else self.folder / entry["depth"]
        except TypeError as error:
            raise InputError(f"{where}: file, mask or depth is no path ({error})") from None
        try:
            K = np.array(entry["K"], np.float64)
        except (TypeError, ValueError):
            K = np.zeros(0)
        if K.shape != (3, 3) or not np.isfinite(K).all() or min(K[0, 0], K[1, 1]) <= 0:
            raise InputError(f"{where}: K is not three rows of three numbers with focal lengths above 0")
        rgb = np.ascontiguousarray(_pixels(image_path, cv2.IMREAD_COLOR)[..., ::-1])
        mask = _pixels(mask_path, cv2.IMREAD_GRAYSCALE)
        truth = None
        if self.posed and entry.get("R") is not None:
            R = np.array(entry["R"], np.float64)
            if R.shape != (3, 3) or not np.allclose(R @ R.T, np.eye(3), atol=1e-3) or np.linalg.det(R) < 0:
                raise InputError(f"{where}: R is not a rotation matrix")
            truth = Truth(R, _vector(entry["t"], f"{where}: t"))
        return Moment(
            name=image_path.name,
            image=rgb,
            mask=np.asarray(mask > (127 if mask.max() > 1 else 0)),
            camera=Camera(K, rgb.shape[1], rgb.shape[0]),
            gravity_camera=None if truth is None or self.up is None else -truth.R_camera_object @ self.up,
            truth=truth,
            depth=None if depth_path is None else _millimetres(depth_path),
        )


def _pixels(path: Path, flags: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with PIL.Image.open(path) as file:
            file.load()  # OpenCV makes an image of half a file, the rest of it grey
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None
    pixels: NDArray[np.uint8] | None = cv2.imread(str(path), flags)
    if pixels is None:
        raise InputError(f"{path}: cannot be read as an image")
    return pixels


def _millimetres(path: Path) -> NDArray[np.float32]:
    """Depth (H, W) in metres of a file of millimetres."""
    pixels: NDArray[np.generic] = _pixels(path, cv2.IMREAD_UNCHANGED)
    if pixels.dtype != np.uint16 or pixels.ndim != 2:
        raise InputError(f"{path}: is no depth; store millimetres as a PNG of 16 bits and one channel")
    return pixels.astype(np.float32) / np.float32(1000)


def _vector(values: Any, what: str) -> Array:
    vector = np.array(values, np.float64)
    if vector.shape != (3,) or not np.isfinite(vector).all() or not vector.any():
        raise InputError(f"{what} is not three numbers, not all zero")
    return vector


class BagRecording(Recording):
    """The image, mask and camera_info topics of a bag, and its depth if that is asked for."""

    def __init__(
        self,
        path: Path,
        topics: Topics,
        *,
        depth_topic: str | None = None,
        rectified: bool = False,
        instance: int = 0,
        limit: int | None = None,
    ) -> None:
        self.path = path
        self.rectified = rectified
        self.name = path.stem
        self.instance = instance
        self.limit = limit
        with open_bag(self.path) as reader:
            self.topics = choose_topics({c.topic: c.msgtype for c in reader.connections}, topics)
            counts = {name: reader.topics[name].msgcount for name in (self.topics.image, self.topics.mask)}
            self.depth_topic = "" if depth_topic is None else self._find_depth(reader, depth_topic)
        empty = [name for name, count in counts.items() if count == 0]
        if empty:
            raise InputError(f"{path}: no message on {', '.join(empty)}")
        self.count = min(counts.values())

    def __len__(self) -> int:
        return self.count if self.limit is None else min(self.count, self.limit)

    @cached_property
    def imu_topic(self) -> str:
        """A topic of inertial measurements, or an empty string."""
        with open_bag(self.path) as reader:
            return next((c.topic for c in reader.connections if c.msgtype == "sensor_msgs/msg/Imu"), "")

    def __iter__(self) -> Iterator[Moment]:
        yielded = 0
        for moment in self._pairs():
            yield moment
            yielded += 1
            if self.limit is not None and yielded >= self.limit:
                return
        if yielded == 0:
            raise InputError(
                f"{self.path}: no mask on {self.topics.mask} has the stamp of an image on {self.topics.image}, or no "
                f"calibration came on {self.topics.camera_info}"
            )

    def _find_depth(self, reader: AnyReader, wanted: str) -> str:
        """The depth topic that is wanted, or the one that is measured in the image's frame and size, or none."""
        from nope_ros.node.messages import DEPTH_ENCODINGS

        pictures = {one.topic for one in reader.connections if one.msgtype == IMAGE_TYPE}
        if wanted:
            if wanted not in pictures:
                raise InputError(f"topic {wanted} is no image topic of {self.path}; the bag holds {sorted(pictures)}")
            return wanted

        def first(topic: str) -> Any:
            those = [one for one in reader.connections if one.topic == topic]
            for connection, _, data in reader.messages(connections=those):
                return deserialized(bytes(data), connection.msgtype)
            return None

        image, info = first(self.topics.image), first(self.topics.camera_info)
        found = []
        for topic in sorted(pictures - {self.topics.image, self.topics.mask}):
            one = first(topic) if "depth" in topic.lower() and image is not None and info is not None else None
            if one is not None and one.encoding in DEPTH_ENCODINGS:
                # Depth that is not registered to the image says so by its frame, or by its size.
                aligned = (image.header.frame_id, info.width, info.height)
                found += [topic] * ((one.header.frame_id, one.width, one.height) == aligned)
        if len(found) > 1:
            raise InputError(f"{len(found)} topics could be the depth: {', '.join(found)}; name one with --depth-topic")
        return found[0] if found else ""

    def _pairs(self) -> Iterator[Moment]:
        topics = (self.topics.image, self.topics.mask, *([self.depth_topic] if self.depth_topic else []))
        waiting: dict[str, dict[int, Any]] = {topic: {} for topic in topics}
        camera_info: Any = None
        before: list[PassedOn] = []
        with open_bag(self.path) as reader:
            wanted = [c for c in reader.connections if self._wanted(c)]
            for connection, _, data in reader.messages(connections=wanted):
                if connection.msgtype in _PASSED_ON:
                    before.append(PassedOn(connection.topic, connection.msgtype, bytes(data)))
                    continue
                message = deserialized(bytes(data), connection.msgtype)
                if connection.topic == self.topics.camera_info:
                    camera_info = message
                    continue
                waiting[connection.topic][nanoseconds(message.header.stamp)] = message
                yield from self._complete(waiting, camera_info, before)
                for held in waiting.values():
                    while len(held) > _WAITING:
                        del held[min(held)]
        yield from self._complete(waiting, camera_info, before, ended=True)

    def _complete(
        self, waiting: dict[str, dict[int, Any]], camera_info: Any, before: list[PassedOn], *, ended: bool = False
    ) -> Iterator[Moment]:
        """The frames of which everything has come, which then wait no more."""
        if camera_info is None:
            return
        images, masks = waiting[self.topics.image], waiting[self.topics.mask]
        depths = waiting.get(self.depth_topic, {})
        newest = max(depths, default=-1)
        for stamp in sorted(images.keys() & masks.keys()):
            if self.depth_topic and newest < stamp and not ended and len(images) < _WAITING:
                return  # its depth may still come
            moment = self._moment(stamp, images[stamp], masks[stamp], depths.get(stamp), camera_info, tuple(before))
            for held in waiting.values():
                for old in [other for other in held if other <= stamp]:
                    del held[old]
            if moment is not None:
                before.clear()
                yield moment

    def _moment(
        self, stamp: int, image: Any, mask: Any, depth: Any, camera_info: Any, before: tuple[PassedOn, ...]
    ) -> Moment | None:
        from nope_ros.node import messages

        ids = messages.mask_array(mask)
        object_mask = ids == self.instance if self.instance else ids > 0
        if not object_mask.any():
            return None  # not in view: nothing to play, and the node would say so
        return Moment(
            name=f"{stamp / 1e9:.3f}",
            image=messages.image_array(image),
            mask=object_mask,
            camera=messages.camera(camera_info, rectified=self.rectified),
            frame_id=image.header.frame_id or "camera",
            stamp=stamp,
            before=before,
            depth=None if depth is None else messages.depth_array(depth),
        )

    def _wanted(self, connection: Connection) -> bool:
        chosen = (self.topics.image, self.topics.mask, self.topics.camera_info, self.depth_topic)
        return connection.topic in chosen or connection.msgtype in _PASSED_ON
