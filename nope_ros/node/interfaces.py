"""Messages where there is no ROS: classes made from their definitions, under the names that ROS gives them.

Everything that turns poses into messages says ``from sensor_msgs.msg import Image`` as any ROS code does. Where rclpy
is installed that is ROS's own class. Elsewhere ``provide()`` has such imports
answered with classes that rosbags knows, or that are made from this package's own .msg and .srv files: same fields,
same defaults, same bytes. So a bag is processed, and the documentation made, by the node's own code without a ROS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

# Packages whose definitions come with this one: its own, and those that rosbags does not know.
_PACKAGES = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGES.parent
# Definitions give this default in a way that rosbags does not keep.
_DEFAULTS: dict[tuple[str, str], Any] = {("geometry_msgs/msg/Quaternion", "w"): 1.0}
_PROVIDED = (
    *("builtin_interfaces", "diagnostic_msgs", "geometry_msgs", "rcl_interfaces", "sensor_msgs", "std_msgs"),
    *("tf2_msgs", "vision_msgs", "visualization_msgs"),
)


def ros_is_here() -> bool:
    """Whether messages are ROS's own."""
    return "rclpy" in sys.modules or find_spec("rclpy") is not None


@cache
def typestore() -> Typestore:
    """What rosbags knows of messages."""
    return get_typestore(Stores.ROS2_JAZZY)


def define(type_name: str) -> None:
    """Make a type, and what it is made of, known to rosbags.

    Args:
        type_name: as ``package/msg/Name``; of a service, ``package/srv/Name_Request`` or ``_Response``.

    Raises:
        LookupError: if it is defined nowhere on this machine.
    """
    store = typestore()
    if type_name in store.fielddefs:
        return
    package, kind, name = type_name.split("/")
    service, _, part = name.rpartition("_") if kind == "srv" else (name, "", "")
    found = next((path for path in _definitions(package, kind, service) if path.is_file()), None)
    if found is None:
        raise LookupError(
            f"{package}/{kind}/{service} is defined neither here nor in a package of AMENT_PREFIX_PATH; is "
            "install/setup.bash sourced?"
        )
    text = found.read_text(encoding="utf-8")
    if kind == "srv":
        text = f"\n{text}\n".split("\n---\n")[part == "Response"]
    as_message = f"{package}/msg/{name}"  # the only kind that rosbags reads
    types = get_types_from_msg(text, as_message)
    types[type_name] = types.pop(as_message)
    for _, fields in types.values():
        for _, description in fields:
            for needed in _names(description):
                if needed not in types:
                    define(needed)
    store.register(types)


def _definitions(package: str, kind: str, name: str) -> Iterator[Path]:
    file = Path(kind, f"{name}.{kind}")
    yield _PACKAGES / "definitions" / package / file  # installed by pip
    yield (_CHECKOUT if package == "nope_ros" else _CHECKOUT / "interfaces" / package) / file
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix:
            yield Path(prefix, "share", package) / file


def _names(description: object) -> list[str]:
    """Message types within a field's description: (kind, content), content a name or a nested description."""
    if isinstance(description, tuple):
        return [name for part in description for name in _names(part)]
    return [description] if isinstance(description, str) and description.count("/") == 2 else []


# --- serialized form ------------------------------------------------------------------------------------------------


def serialized(message: Any, type_name: str) -> bytes:
    """A message as it goes over the wire (CDR).

    By rosbags in any case: ROS's own serializer leaves what was in memory between fields, and equal messages differ.
    """
    define(type_name)
    return bytes(typestore().serialize_cdr(_with_arrays(message, type_name), type_name, little_endian=True))


def deserialized(data: bytes, type_name: str) -> Any:
    """A message from its serialized form (CDR).

    Raises:
        ValueError: if it is none of that type.
    """
    if ros_is_here():
        from importlib import import_module

        from rclpy.serialization import deserialize_message

        package, kind, name = type_name.split("/")
        return deserialize_message(data, getattr(import_module(f"{package}.{kind}"), name))
    from rosbags.serde import SerdeError

    define(type_name)
    try:
        return typestore().deserialize_cdr(data, type_name)
    except SerdeError as error:
        raise ValueError(str(error)) from None


def _with_arrays(message: Any, type_name: str) -> Any:
    """The message with numbers of sequences as arrays, which rosbags wants; itself where there are none."""
    if not _has_numbers(type_name):
        return message
    values = {}
    fields: Any = typestore().fielddefs[type_name][1]
    for name, (kind, content) in fields:
        value = getattr(message, name)
        if kind is Nodetype.NAME:
            value = _with_arrays(value, str(content))
        elif kind is not Nodetype.BASE:
            inner_kind, inner = content[0]
            if inner_kind is Nodetype.NAME:
                value = [_with_arrays(one, str(inner)) for one in value] if _has_numbers(str(inner)) else value
            elif inner[0] not in ("string", "wstring"):
                dtype = {"bool": "bool", "byte": "uint8", "char": "uint8", "octet": "uint8"}.get(inner[0], inner[0])
                value = np.frombuffer(value, dtype) if isinstance(value, bytes) else np.asarray(value, dtype)
        values[name] = value
    return typestore().types[type_name](**values)


@cache
def _has_numbers(type_name: str) -> bool:
    """Whether a message holds a sequence of numbers somewhere."""

    def holds(description: Any) -> bool:
        kind, content = description
        if kind is Nodetype.BASE:
            return False
        if kind is Nodetype.NAME:
            return _has_numbers(content)
        inner_kind, inner = content[0]
        return _has_numbers(inner) if inner_kind is Nodetype.NAME else inner[0] not in ("string", "wstring")

    return any(holds(description) for _, description in typestore().fielddefs[type_name][1])


# --- classes --------------------------------------------------------------------------------------------------------


@cache
def message_class(type_name: str) -> type:
    """A class with the constructor of ROS's: fields by name, all others at their defaults.

    Raises:
        LookupError: if the type is defined nowhere on this machine.
    """
    define(type_name)
    store = typestore()
    constants, fields = store.fielddefs[type_name]
    package, kind, name = type_name.split("/")

    def __init__(self: Any, **values: Any) -> None:
        for field, description in fields:
            if field in values:
                setattr(self, field, values.pop(field))
            elif (type_name, field) in _DEFAULTS:
                setattr(self, field, _DEFAULTS[type_name, field])
            else:
                setattr(self, field, _default(description))
        if values:
            raise TypeError(f"{type_name} has no field {', '.join(values)}")

    members: dict[str, Any] = {constant: value for constant, _, value in constants}
    members |= {"__init__": __init__, "__module__": f"{package}.{kind}"}
    return type(name, (store.types[type_name],), members)


def _default(description: Any) -> Any:
    kind, content = description
    if kind is Nodetype.NAME:
        return message_class(content)()
    if kind is Nodetype.SEQUENCE:
        return []
    if kind is Nodetype.ARRAY:
        inner, length = content
        return [_default(inner) for _ in range(length)]
    base = content[0]
    if base in ("string", "wstring"):
        return ""
    return False if base == "bool" else 0.0 if base.startswith("float") else 0


def _service_class(type_name: str) -> type:
    package, kind, name = type_name.split("/")
    parts = {part: message_class(f"{type_name}_{part}") for part in ("Request", "Response")}
    return type(name, (), {**parts, "__module__": f"{package}.{kind}"})


# --- imports --------------------------------------------------------------------------------------------------------


class _Definitions(MetaPathFinder, Loader):
    """Answers ``import sensor_msgs.msg`` and the like where nobody else does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, kind = fullname.partition(".")
        if kind in ("msg", "srv") and (package in _PROVIDED or package == "nope_ros"):
            return ModuleSpec(fullname, self)
        return ModuleSpec(fullname, self, is_package=True) if package in _PROVIDED and not kind else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, kind = module.__name__.partition(".")

        def look_up(name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            try:
                type_name = f"{package}/{kind}/{name}"
                found = message_class(type_name) if kind == "msg" else _service_class(type_name)
            except LookupError as error:
                raise AttributeError(str(error)) from None
            setattr(module, name, found)
            return found

        if kind:
            module.__getattr__ = look_up  # type: ignore[method-assign]


def provide() -> None:
    """Answer imports of messages, if ROS is not here to do so."""
    if not ros_is_here() and not any(isinstance(finder, _Definitions) for finder in sys.meta_path):
        sys.meta_path.append(_Definitions())  # last: whatever is installed comes first
