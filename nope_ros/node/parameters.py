"""The node's parameters: one table, from which they are declared, checked, read, documented and written to nope.yaml.

``Settings`` is the table and, as an instance, the values: a frozen snapshot that a frame is processed with throughout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml as yaml_library
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult

from nope_ros.frame import InputError
from nope_ros.prior import PRIORS
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS, Refinement

LONGEST_PATIENCE = 60.0
"""Seconds that ``mask_patience`` may be at most; TF and IMU are kept for as long."""

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.parameter import Parameter

Value = bool | int | float | str | tuple[float, ...]
Change = Literal["any time", "while inactive", "at start"]
Check = Callable[[Any], str | None]

PriorSetting = Literal["auto", "free", "upright", "standing"]


@dataclass(frozen=True)
class Spec:
    """One parameter.

    Attributes:
        name: in ROS; dots group.
        field: name in ``Settings``.
        default: also gives its type.
        description: what it does.
        unit: of the value, or "".
        low: least allowed value.
        high: greatest allowed value.
        choices: the only allowed values.
        change: when it may be changed.
        check: says what is wrong with a value, or None.
    """

    name: str
    field: str
    default: Value
    description: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    change: Change = "any time"
    check: Check | None = None

    @property
    def type(self) -> str:
        """As ROS calls it."""
        if isinstance(self.default, tuple):
            return "double_array"
        return {bool: "bool", int: "integer", float: "double", str: "string"}[type(self.default)]

    @property
    def allowed(self) -> str:
        """The allowed values, for people."""
        if self.choices:
            return ", ".join(self.choices)
        if self.low is None and self.high is None:
            return ""
        return f"{_number(self.low)} to {_number(self.high)}"

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value: names the parameter, the value and what is allowed. None if nothing is."""
        numbers = value if isinstance(self.default, tuple) else [value]
        if isinstance(self.default, tuple) and len(numbers) != len(self.default):
            return f"{self.name}: {list(value)} has {len(numbers)} elements, {len(self.default)} are needed"
        if isinstance(self.default, float | tuple) and not all(math.isfinite(number) for number in numbers):
            return f"{self.name}: {value} is not finite"
        if self.choices and value not in self.choices:
            return f"{self.name}: '{value}' is not one of {self.allowed}"
        low, high = self.low, self.high
        if (low is not None and not value >= low) or (high is not None and not value <= high):  # NaN is not within
            return f"{self.name}: {value} is not within {self.allowed}{self.unit and ' ' + self.unit}"
        wrong = self.check(value) if self.check else None
        return wrong and f"{self.name}: '{value}' {wrong}"

    def descriptor(self) -> ParameterDescriptor:
        """For ``ros2 param describe`` and for tools that draw sliders."""
        unit = f" [{self.unit}]" if self.unit else ""
        constraints = "Only while the node is not active." if self.change == "while inactive" else ""
        if self.choices:
            constraints = f"One of: {self.allowed}. {constraints}".strip()
        descriptor = ParameterDescriptor(
            name=self.name,
            description=self.description + unit,
            additional_constraints=constraints,
            read_only=self.change == "at start",
        )
        if self.low is not None and self.high is not None:
            if isinstance(self.default, int):
                descriptor.integer_range = [IntegerRange(from_value=int(self.low), to_value=int(self.high))]
            else:
                descriptor.floating_point_range = [FloatingPointRange(from_value=self.low, to_value=self.high)]
        return descriptor


def _parameter(default: Value, description: str, *, name: str = "", **options: Any) -> Any:
    return field(default=default, metadata={"name": name, "description": description, **options})


def _device(value: str) -> str | None:
    return None if re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", value) else "is not auto, cpu, cuda or cuda:<number>"


def _frame(value: str) -> str | None:
    if value.startswith("/"):
        return "begins with '/', which TF frames no longer do"
    return None if re.fullmatch(r"\S{0,200}", value) else "has spaces or is too long"


def _topic(value: str) -> str | None:
    part = "[A-Za-z_][A-Za-z0-9_]*"
    name = len(value) <= 200 and re.fullmatch(f"|(~/|/)?{part}(/{part})*", value)
    return None if name else "is not a topic name"


def _folder(value: str) -> str | None:
    return None if value.strip() and "\0" not in value else "is not a folder"


@dataclass(frozen=True)
class Settings:
    """The value of every parameter."""

    autostart: bool = _parameter(
        True, "Configure and activate the node when it starts. Otherwise a lifecycle manager does.", change="at start"
    )
    weights: str = _parameter(
        "",
        "Folder with config.json and model.safetensors, or organisation/name in the hub cache. Empty: the packaged.",
        change="while inactive",
    )
    device: str = _parameter(
        "auto",
        "Where the network runs: auto (a GPU if there is one), cpu, cuda, cuda:1, ...",
        change="while inactive",
        check=_device,
    )
    batch_size: int = _parameter(
        256, "Most templates predicted at a time; bounds memory.", low=1, high=65536, change="while inactive"
    )
    threads: int = _parameter(0, "CPU threads of the network. 0: half of the cores; others work too.", low=0, high=256)
    compressed: bool = _parameter(
        False, "Subscribe to image/compressed (JPEG or PNG) in place of image.", change="at start"
    )
    rectified: bool = _parameter(
        False, "The image is undistorted already: use P of camera_info and no distortion, not K and D."
    )
    mask_patience: float = _parameter(
        5.0,
        "How long an image waits for its mask, and a mask for its image.",
        unit="s",
        low=0.05,
        high=LONGEST_PATIENCE,
    )
    buffer_megabytes: int = _parameter(
        512,
        "Most memory for messages that wait. When it is full, every second waiting image is dropped.",
        unit="MB",
        low=1,
        high=65536,
    )
    max_instances: int = _parameter(
        16, "Most instances of a mask that are looked at, the largest first.", low=1, high=1000
    )
    prior: PriorSetting = _parameter(  # noqa: RUF009  (it makes a dataclass field)
        "auto",
        "What to assume of the orientation. free: nothing. upright: the object keeps its up axis. standing: also, "
        "gravity is known in every image. auto: standing where gravity is known, else free.",
        choices=("auto", *PRIORS),
    )
    refinement: Refinement = _parameter(  # noqa: RUF009  (it makes a dataclass field)
        DEFAULT_REFINEMENT,
        "What follows the templates, for poses finer than their grid. none: nothing, the fastest. correspondence: "
        "matched image points, which also choose among the templates' modes. synthesis: a climb on the likelihood. "
        "both: one after the other.",
        choices=REFINEMENTS,
    )
    tracking_enabled: bool = _parameter(
        False,
        "Follow objects from frame to frame, so that an ambiguous view inherits what earlier ones told. Off: every "
        "frame alone.",
        name="tracking.enabled",
    )
    tracking_fixed_frame: str = _parameter(
        "",
        "TF frame that objects do not move in, such as odom or map: tracking is told how the camera turns in it. "
        "Empty: nothing is known of the camera's motion.",
        name="tracking.fixed_frame",
        check=_frame,
    )
    confidence_threshold: float = _parameter(
        0.5,
        "Least probability that the orientation is within 30 degrees, for a pose to be trusted. Others are published, "
        "but not broadcast on TF.",
        low=0.0,
        high=1.0,
    )
    similarity_threshold: float = _parameter(
        0.4,
        "Least similarity of an image and an object, for the instance to be taken for that object at all.",
        low=-1.0,
        high=1.0,
    )
    distribution_count: int = _parameter(
        500, "Most orientations listed in ~/distribution; the mass of the others is given as a sum.", low=1, high=100000
    )
    tf_publish: bool = _parameter(True, "Broadcast trusted poses on /tf.", name="tf.publish")
    tf_prefix: str = _parameter("", "Put before the object's id to name its TF frame.", name="tf.prefix", check=_frame)
    gravity_vector: tuple[float, float, float] = _parameter(
        (0.0, 0.0, 0.0),
        "Direction of down in the camera's optical frame, of any length. All zero: not used. The first source that is "
        "set counts: gravity.vector, gravity.frame, gravity.imu_topic.",
        name="gravity.vector",
    )
    gravity_frame: str = _parameter(
        "", "TF frame whose z axis points up, such as odom or map. Empty: not used.", name="gravity.frame", check=_frame
    )
    gravity_imu_topic: str = _parameter(
        "",
        "Topic of a sensor_msgs/Imu whose accelerometer tells gravity. Its frame is the camera's or reaches it by TF. "
        "Empty: not used.",
        name="gravity.imu_topic",
        change="while inactive",
        check=_topic,
    )
    gravity_timeout: float = _parameter(
        0.1, "How long to wait for TF at the image's stamp.", name="gravity.timeout", unit="s", low=0.0, high=5.0
    )
    storage_directory: str = _parameter(
        "~/.local/share/nope_ros",
        "Folder of the registered objects; they are loaded when the node is activated. Another node on the same folder "
        "does not see what is registered meanwhile, nor replace or remove it unasked.",
        name="storage.directory",
        change="while inactive",
        check=_folder,
    )
    mesh_directory: str = _parameter(
        "",
        "Folder that register_object may read meshes from (mesh_file). Empty: it reads none.",
        name="mesh.directory",
        change="at start",
    )

    @property
    def fixed_frame(self) -> str:
        """The frame that tracking asks TF for, or an empty string."""
        return self.tracking_fixed_frame if self.tracking_enabled else ""

    @property
    def needs_transforms(self) -> bool:
        """Whether anything is looked up in TF."""
        return bool(self.gravity_frame or self.gravity_imu_topic or self.fixed_frame)


def _spec(entry: Any) -> Spec:
    options = dict(entry.metadata)
    assert entry.default is not MISSING
    return Spec(field=entry.name, default=entry.default, name=options.pop("name") or entry.name, **options)


SPECS: tuple[Spec, ...] = tuple(_spec(entry) for entry in fields(Settings))
BY_NAME: dict[str, Spec] = {spec.name: spec for spec in SPECS}

assert set(get_args(PriorSetting)) == {"auto", *PRIORS}


def check(parameters: Iterable[Parameter[Any]], *, active: bool) -> SetParametersResult:
    """Accept or refuse new values, with the reason. Parameters of others (use_sim_time, QoS) pass.

    Args:
        parameters: name and value; rclpy has checked types by now.
        active: whether the node is, so that some values are in use.
    """
    for parameter in parameters:
        spec = BY_NAME.get(parameter.name)
        if spec is None:
            continue
        problem = spec.problem(parameter.value)
        if problem is None and active and spec.change == "while inactive":
            problem = f"{spec.name}: is in use; deactivate the node, set it, and activate the node again"
        if problem is not None:
            return SetParametersResult(successful=False, reason=problem)
    return SetParametersResult(successful=True)


def declare(node: Node) -> None:
    """Declare every parameter.

    Raises:
        rclpy.exceptions.InvalidParameterValueException: if a value given at start is refused; it says why.
        rclpy.exceptions.InvalidParameterTypeException: if it is of another type.
    """
    for spec in SPECS:
        default = list(spec.default) if isinstance(spec.default, tuple) else spec.default
        node.declare_parameter(spec.name, default, spec.descriptor())


def unknown(node: Node) -> list[str]:
    """A line for each value given at start that is of no parameter: nobody else says that it was misspelled."""
    given: Sequence[str] = list(getattr(node, "_parameter_overrides", {}))
    return [_misspelled(name) for name in given if not node.has_parameter(name) and not _of_ros(name)]


def _of_ros(name: str) -> bool:
    return name == "use_sim_time" or name.startswith("qos_overrides.")


def _misspelled(name: str) -> str:
    near = get_close_matches(name, BY_NAME, n=1)
    return f"{name}: is no parameter, and does nothing" + (f"; did you mean {near[0]}?" if near else "")


def read(node: Node) -> Settings:
    """The values now."""
    values = {spec.field: node.get_parameter(spec.name).value for spec in SPECS}
    values["gravity_vector"] = tuple(values["gravity_vector"])
    return Settings(**values)


def from_file(path: str) -> dict[str, Any]:
    """What a file for ``--params-file`` sets of our parameters, by name; sections of all nodes, and any ``nope``.

    Raises:
        InputError: if it cannot be read, has no such section, or ours names something that is no parameter.
    """
    try:
        with open(path, encoding="utf-8") as file:
            sections = yaml_library.safe_load(file) or {}
        found: dict[str, Any] = {}
        wrong: list[str] = []
        ours = False
        for node, section in sections.items():
            own = node.rsplit("/", 1)[-1] == "nope"
            if node == "/**" or own:
                values = _flat(section["ros__parameters"])
                wrong += [_misspelled(name) for name in values if own and name not in BY_NAME and not _of_ros(name)]
                found |= values
                ours = True
    except (OSError, yaml_library.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no file of ROS parameters ({error})") from None
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    if not ours:
        raise InputError(f"{path}: has no section nope: or /**:, only {', '.join(sections) or 'nothing'}")
    return {name: value for name, value in found.items() if name in BY_NAME}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def settings_from(values: dict[str, Any]) -> Settings:
    """Parameters without a node, by name; the others have their defaults.

    Raises:
        InputError: if a name is unknown or a value is refused.
    """
    fields_: dict[str, Any] = {}
    for name, value in values.items():
        spec = BY_NAME.get(name)
        if spec is None:
            raise InputError(f"{name}: is no parameter; known: {', '.join(BY_NAME)}")
        kind = type(spec.default)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list) and all(type(one) in (int, float) for one in value):
            value = tuple(float(one) for one in value)
        problem = f"{name}: {value!r} is not of type {spec.type}" if type(value) is not kind else spec.problem(value)
        if problem is not None:
            raise InputError(problem)
        fields_[spec.field] = value
    return Settings(**fields_)


# --- documents ------------------------------------------------------------------------------------------------------


def table() -> str:
    """The parameters as a Markdown table."""
    lines = ["| parameter | type | default | allowed | changes | |", "| --- | --- | --- | --- | --- | --- |"]
    for spec in SPECS:
        cells = [
            f"`{spec.name}`",
            spec.type,
            f"`{_yaml(spec.default)}`",
            _with_unit(spec),
            spec.change,
            spec.description,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def yaml() -> str:
    """The parameters' defaults as a file for ``--params-file``, each with its description."""
    lines = [
        "# Every parameter of the node with its default, for a node of any name. Copy it and change what you need.",
        "# Written by `python -P -m nope_ros.node.reference`.",
        "/**:",
        "  ros__parameters:",
    ]
    group = ""
    for spec in SPECS:
        *outer, last = spec.name.split(".")
        indent = "    " + "  " * len(outer)
        if outer and outer[0] != group:
            lines.append(f"    {outer[0]}:")
        group = outer[0] if outer else ""
        note = [_with_unit(spec), "" if spec.change == "any time" else f"changes {spec.change}"]
        text = " ".join([spec.description, *(f"({part})" for part in note if part)])
        lines += [f"{indent}# {line}" for line in _wrapped(text, 116 - len(indent))]
        lines.append(f"{indent}{last}: {_yaml(spec.default)}")
    return "\n".join(lines) + "\n"


def _with_unit(spec: Spec) -> str:
    return f"{spec.allowed} {spec.unit}".strip()


def _yaml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _number(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def _wrapped(text: str, width: int) -> Sequence[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
