"""Bags: read with their topics found, and written as MCAP. Of ROS this needs only the definitions of messages."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer

from nope_ros.frame import InputError
from nope_ros.node.interfaces import define, typestore

BAG_SUFFIXES = (".mcap", ".db3")
IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO_TYPE = "sensor_msgs/msg/CameraInfo"
_MASK_NAME = re.compile(r"mask|segment|label|instance", re.IGNORECASE)


@dataclass(frozen=True)
class Topics:
    """Which topics of a bag to read; empty: found by type and name."""

    image: str = ""
    mask: str = ""
    camera_info: str = ""


@dataclass(frozen=True)
class Recorded:
    """A message: topic, type (``package/msg/Name``), nanoseconds when it was received, and serialized form (CDR)."""

    topic: str
    type_name: str
    received: int
    data: bytes


@contextmanager
def open_bag(path: Path) -> Iterator[AnyReader]:
    """Open a bag: an .mcap or .db3 file, or a folder with metadata.yaml.

    Raises:
        InputError: if it is none, or damaged.
    """
    try:
        # Bags of sqlite3 carry no definitions; those of the messages read here are the same in all distributions.
        with AnyReader([path], default_typestore=typestore()) as reader:
            yield reader
    except (AnyReaderError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a bag ({error})") from None


def choose_topics(types: dict[str, str], wanted: Topics) -> Topics:
    """The topics of a bag that hold image, mask and calibration.

    Args:
        types: of each topic, as ``sensor_msgs/msg/Image``.
        wanted: names given by the user; empty ones are found by type and name.

    Raises:
        InputError: if one is missing, or more than one would do; it lists what is there.
    """
    listed = "; the bag holds " + ", ".join(f"{name} ({kind})" for name, kind in sorted(types.items()))
    for name in (wanted.image, wanted.mask, wanted.camera_info):
        if name and name not in types:
            raise InputError(f"topic {name} is not in the bag{listed}")
    pictures = [name for name, kind in sorted(types.items()) if kind in (IMAGE_TYPE, COMPRESSED_TYPE)]
    depths = [name for name in pictures if "depth" in name.lower()]
    masks = [name for name in pictures if _MASK_NAME.search(name) and types[name] == IMAGE_TYPE]
    images = [name for name in pictures if name not in masks and name not in depths]
    overlays = [name for name in images if "overlay" in name.lower()]
    images = [name for name in images if name not in overlays] or images
    # A raw image and its compressed twin are one choice.
    images = [name for name in images if name.removesuffix("/compressed") not in images or "/compressed" not in name]

    def choose(given: str, found: list[str], what: str, option: str) -> str:
        if given:
            return given
        if len(found) == 1:
            return found[0]
        problem = f"no {what} topic was found" if not found else f"{len(found)} topics could be the {what}"
        raise InputError(f"{problem}; name it with {option}{listed}")

    image = choose(wanted.image, images, "image", "--image-topic")
    infos = [name for name, kind in sorted(types.items()) if kind == CAMERA_INFO_TYPE]
    beside = image.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
    infos = [beside] if beside in infos else infos
    return Topics(
        image=image,
        mask=choose(wanted.mask, [name for name in masks if name != image], "mask", "--mask-topic"),
        camera_info=choose(wanted.camera_info, infos, "camera_info", "--camera-info-topic"),
    )


def write_mcap(path: Path, messages: Iterable[Recorded]) -> int:
    """Write messages, ordered by time, to one .mcap file, replacing an older one; returns how many.

    Raises:
        LookupError: if a message type is defined nowhere on this machine.
    """
    # The writer makes a folder around the file; the file alone is a whole bag, and easier to hand on.
    folder = path.with_name(f".{path.stem}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    connections: dict[str, Connection] = {}
    count = 0
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for message in messages:
            if message.topic not in connections:
                define(message.type_name)
                connections[message.topic] = writer.add_connection(
                    message.topic, message.type_name, typestore=typestore()
                )
            writer.write(connections[message.topic], message.received, message.data)
            count += 1
    (written,) = folder.glob("*.mcap")
    os.replace(written, path)
    shutil.rmtree(folder)
    return count
