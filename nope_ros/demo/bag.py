"""Writes published messages, as they came over the wire, to an MCAP bag. Of ROS it needs only the definitions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore


@dataclass(frozen=True)
class Recorded:
    """A message: topic, type (``package/msg/Name``), nanoseconds when it was received, and serialized form (CDR)."""

    topic: str
    type_name: str
    received: int
    data: bytes


def write_mcap(path: Path, messages: Iterable[Recorded]) -> int:
    """Write messages to one .mcap file, replacing an older one; returns how many.

    Raises:
        LookupError: if a message type is defined nowhere on this machine.
    """
    ordered = sorted(messages, key=lambda message: message.received)
    typestore = get_typestore(Stores.ROS2_JAZZY)
    # The writer makes a folder around the file; the file alone is a whole bag, and easier to hand on.
    folder = path.with_name(f".{path.stem}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    connections: dict[str, Connection] = {}
    with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for message in ordered:
            if message.topic not in connections:
                _define(typestore, message.type_name)
                connections[message.topic] = writer.add_connection(
                    message.topic, message.type_name, typestore=typestore
                )
            writer.write(connections[message.topic], message.received, message.data)
    (written,) = folder.glob("*.mcap")
    os.replace(written, path)
    shutil.rmtree(folder)
    return len(ordered)


def _define(typestore: Typestore, type_name: str) -> None:
    """Register a type, and what it is made of, from the .msg files of the packages on AMENT_PREFIX_PATH."""
    if type_name in typestore.fielddefs:
        return
    package, _, name = type_name.split("/")
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    paths = [Path(prefix, "share", package, "msg", f"{name}.msg") for prefix in prefixes if prefix]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise LookupError(
            f"{package}/msg/{name}.msg is in no package of AMENT_PREFIX_PATH; is install/setup.bash sourced?"
        )
    types = get_types_from_msg(found.read_text(encoding="utf-8"), type_name)
    for _, fields in types.values():
        for _, description in fields:
            for part in _names(description):
                if part not in types:
                    _define(typestore, part)
    typestore.register(types)


def _names(description: object) -> list[str]:
    """Message types within a field's description: (kind, content), content a name or a nested description."""
    if isinstance(description, tuple):
        return [name for part in description for name in _names(part)]
    return [description] if isinstance(description, str) and description.count("/") == 2 else []
