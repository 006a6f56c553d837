"""Parameters: declared from one table, refused with a reason, documented as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import rclpy
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from nope_ros.frame import InputError
from nope_ros.node import parameters, reference, topics
from nope_ros.node.parameters import BY_NAME, SPECS, Settings
from nope_ros.store import check_object_id

ROOT = Path(__file__).parent.parent


@pytest.fixture
def node(ros: None) -> Iterator[Node]:
    node = rclpy.create_node("tested")
    parameters.declare(node)
    yield node
    node.destroy_node()


def test_defaults_are_allowed() -> None:
    assert [spec.problem(spec.default) for spec in SPECS] == [None] * len(SPECS)
    assert len(SPECS) == len(fields(Settings))


def test_declared_as_in_the_table(node: Node) -> None:
    assert parameters.read(node) == Settings()
    for spec in SPECS:
        descriptor = node.describe_parameter(spec.name)
        assert descriptor.description.startswith(spec.description)
        assert descriptor.read_only == (spec.change == "at start")
        assert bool(descriptor.integer_range or descriptor.floating_point_range) == (spec.low is not None)
        if spec.unit:
            assert f"[{spec.unit}]" in descriptor.description


def refusal(name: str, value: Any, active: bool = True) -> str:
    result = parameters.check([Parameter(name, value=value)], active=active)
    assert result.successful == (not result.reason)
    return str(result.reason)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("confidence_threshold", 1.5, "confidence_threshold: 1.5 is not within 0 to 1"),
        ("confidence_threshold", float("nan"), "not finite"),
        ("mask_patience", 0.0, "0.05 to 60 s"),
        ("prior", "sideways", "'sideways' is not one of auto, free, upright, standing"),
        ("device", "gpu", "is not auto, cpu"),
        ("batch_size", 0, "1 to 65536"),
        ("tf.prefix", "/robot/", "begins with '/'"),
        ("tf.prefix", "a b", "spaces"),
        ("gravity.vector", [0.0, 1.0], "2 elements, 3 are needed"),
        ("gravity.vector", [0.0, float("inf"), 0.0], "not finite"),
        ("gravity.imu_topic", "imu data", "is not a topic name"),
        ("storage.directory", " ", "is not a folder"),
        ("weights", "elsewhere", "is in use; deactivate the node"),
    ],
)
def test_refused_with_the_reason(name: str, value: Any, words: str) -> None:
    reason = refusal(name, value)
    assert words in reason and name in reason


def test_accepted() -> None:
    assert refusal("weights", "elsewhere", active=False) == ""
    assert refusal("gravity.vector", [0.0, 9.8, 0.0]) == ""
    assert refusal("use_sim_time", True) == "", "not ours to judge"


@given(st.sampled_from([spec for spec in SPECS if spec.low is not None]), st.floats() | st.integers())
def test_ranges(spec: parameters.Spec, value: float) -> None:
    inside = spec.low <= value <= spec.high  # type: ignore[operator]
    assert (spec.problem(value) is None) == inside


def test_values_given_at_start_are_checked(ros: None) -> None:
    for name, value, error, words in (
        ("confidence_threshold", 3.0, InvalidParameterValueException, "confidence_threshold"),
        ("confidence_threshold", "high", InvalidParameterTypeException, "DOUBLE"),
        ("prior", "sideways", InvalidParameterValueException, "auto, free, upright, standing"),
    ):
        node = rclpy.create_node("refusing", parameter_overrides=[Parameter(name, value=value)])
        node.add_on_set_parameters_callback(lambda changed: parameters.check(changed, active=False))
        with pytest.raises(error, match=words):
            parameters.declare(node)
        node.destroy_node()


# --- documents ------------------------------------------------------------------------------------------------------


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_the_configuration_file_is_the_table() -> None:
    text = (ROOT / "config" / "nope.yaml").read_text()
    assert text == parameters.yaml(), "run python -P -m nope_ros.node.reference"
    values = flat(yaml.safe_load(text)["/**"]["ros__parameters"])
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()} == {
        spec.name: spec.default for spec in SPECS
    }


def test_the_configuration_file_is_read_by_ros(ros: None) -> None:
    node = Node("from_file", cli_args=["--ros-args", "--params-file", str(ROOT / "config" / "nope.yaml")])
    assert "confidence_threshold" in node._parameter_overrides
    parameters.declare(node)
    assert parameters.read(node) == Settings()
    node.destroy_node()


def test_misspelled_parameters_are_told(ros: None, tmp_path: Path) -> None:
    misspelled = {"priro": "free", "use_sim_time": True, "qos_overrides./mask.subscription.depth": 3}
    node = rclpy.create_node(
        "spelling", parameter_overrides=[Parameter(name, value=one) for name, one in misspelled.items()]
    )
    parameters.declare(node)
    assert parameters.unknown(node) == ["priro: is no parameter, and does nothing; did you mean prior?"]
    node.destroy_node()
    path = tmp_path / "nope.yaml"
    for section, values, words in (
        ("nope", {"gravity": {"fraem": "odom"}}, "gravity.fraem: is no parameter, .*did you mean gravity.frame"),
        ("nop", {"prior": "free"}, "has no section nope: or /.*, only nop"),
    ):
        path.write_text(yaml.safe_dump({section: {"ros__parameters": values}}))
        with pytest.raises(InputError, match=words):
            parameters.from_file(str(path))
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": {"of_another_node": 1, "prior": "free"}}}))
    assert parameters.from_file(str(path)) == {"prior": "free"}


def test_tables_name_everything() -> None:
    assert all(f"`{spec.name}`" in parameters.table() for spec in SPECS)
    assert all(f"`{endpoint.name}`" in topics.table() for endpoint in topics.ENDPOINTS)
    assert "| in | `mask` | sensor_msgs/msg/Image |" in topics.table()


def test_readme_has_the_tables() -> None:
    readme = ROOT / "README.md"
    if not readme.exists() or "<!-- topics -->" not in readme.read_text():
        pytest.skip("README.md has no marked tables")
    text = readme.read_text()
    assert text == reference.with_tables(text), "run python -P -m nope_ros.node.reference"


def test_markers_in_a_text() -> None:
    text = "a\n<!-- topics -->\nold\n<!-- /topics -->\nz"
    written = reference.with_tables(text)
    assert "old" not in written and "register_object" in written
    assert written.startswith("a\n") and written.endswith("\nz")
    assert reference.with_tables(written) == written
    with pytest.raises(ValueError, match="missing"):
        reference.with_tables("<!-- topics -->")


def test_writing_the_files(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "README.md").write_text("<!-- parameters -->\n<!-- /parameters -->")
    subprocess.run([sys.executable, "-P", "-m", "nope_ros.node.reference"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "config" / "nope.yaml").read_text() == parameters.yaml()
    assert "`batch_size`" in (tmp_path / "README.md").read_text()


# --- topics of objects ----------------------------------------------------------------------------------------------


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", fullmatch=True))
def test_every_object_id_has_a_topic(object_id: str) -> None:
    check_object_id(object_id)
    try:
        topic = topics.object_topic(object_id)
    except InputError:
        assert not any(letter.isalnum() for letter in object_id)
    else:
        assert validate_topic_name(topic)
        assert not topic.split("/")[2].startswith("_"), "hidden from ros2 topic list"


def test_usual_ids_are_kept() -> None:
    assert topics.object_topic("mug_2") == "~/objects/mug_2/pose"
    assert topics.object_topic("3d-mug") == "~/objects/object_3d_mug/pose"


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(SPECS)
    assert len({endpoint.name for endpoint in topics.ENDPOINTS}) == len(topics.ENDPOINTS)


@pytest.mark.parametrize(
    ("topic", "good"),
    [("", True), ("imu", True), ("/a/b_1", True), ("~/imu", True)]
    + [(name, False) for name in ("imu/", "imu//data", "~imu", "imu/1a", "/", "a b")],
)
def test_topics_are_names_that_ros_takes(topic: str, good: bool) -> None:
    assert (parameters._topic(topic) is None) == good
