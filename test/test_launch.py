"""Launch files and RViz's configuration: read in any case, started where a distribution brings launch."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from node_process import (
    Robot,
    camera_info_message,
    image_message,
    ros_context,
    scene,
)
from vision_msgs.msg import BoundingBox2D, Detection2D, Detection2DArray

from nope_ros.node import topics
from nope_ros.node.parameters import BY_NAME

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "launch").glob("*.launch.py"))

# Starts a launch file as `ros2 launch` does, with name:=value after its path.
LAUNCHER = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
path, *words = sys.argv[1:]
given = dict(word.split(":=", 1) for word in words)
service = LaunchService(argv=words)
source = PythonLaunchDescriptionSource(path)
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=given.items())])
)
sys.exit(service.run())
"""


def constants(path: Path) -> dict[str, Any]:
    """Literals assigned at the top of a file."""
    found = {}
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue
    return found


def test_there_are_five() -> None:
    names = ["boxes", "demo", "nope", "segmentation", "two_cameras"]
    assert [path.name for path in FILES] == [f"{name}.launch.py" for name in names]


def test_two_cameras_share_no_folder_and_no_frame() -> None:
    sections = yaml.safe_load((ROOT / "config" / "two_cameras.yaml").read_text())
    cameras = constants(ROOT / "launch" / "two_cameras.launch.py")["CAMERAS"]
    assert set(sections) == {f"{space}/nope" for space in cameras.values()}
    for group, name in (("tf", "prefix"), ("storage", "directory")):
        values = [section["ros__parameters"][group][name] for section in sections.values()]
        assert len(set(values)) == 2 and f"{group}.{name}" in BY_NAME


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_parse_and_say_what_they_do(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "generate_launch_description" in functions


def test_arguments_are_the_nodes_own() -> None:
    values = constants(ROOT / "launch" / "nope.launch.py")
    assert set(values["PARAMETERS"]) - {"use_sim_time"} <= set(BY_NAME)
    inputs = {endpoint.name for endpoint in topics.ENDPOINTS if endpoint.direction == "in"}
    assert set(values["TOPICS"]) <= inputs


def test_rviz_shows_what_the_node_publishes() -> None:
    config = yaml.safe_load((ROOT / "config" / "nope.rviz").read_text())
    displays = config["Visualization Manager"]["Displays"]
    shown = {display["Class"].split("/")[1]: display.get("Topic", {}).get("Value") for display in displays}
    assert {"TF", "MarkerArray", "Image", "PoseWithCovariance"} <= set(shown)
    published = {endpoint.name.replace("~", "/nope") for endpoint in topics.ENDPOINTS if endpoint.direction == "out"}
    published = {name.replace("<object_id>", "object") for name in published}
    assert {topic for topic in shown.values() if topic} <= published


# --- started --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch() -> None:
    pytest.importorskip("launch", reason="launch is not installed: launch files are read, but not started")
    pytest.importorskip("launch_ros", reason="launch_ros is not installed: launch files are read, but not started")


@contextmanager
def launched(log: Path, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as file:
        command = [sys.executable, "-P", "-c", LAUNCHER, str(ROOT / "launch" / name), *words]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
        try:
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            assert process.wait(15) == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


def test_nope_launch(launch: None, weights: Path, tmp_path: Path) -> None:
    parameters = tmp_path / "mine.yaml"
    values = {"similarity_threshold": -1.0, "device": "cuda:77", "storage.directory": str(tmp_path / "objects")}
    parameters.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    words = ["namespace:=arm", "image:=/camera/color", "mask:=/detector/mask", "device:=cpu", f"weights:={weights}"]
    image, mask = scene()
    with ros_context(), launched(tmp_path / "log", "nope.launch.py", *words, f"params_file:={parameters}"):
        robot = Robot("/arm/nope")
        try:
            assert robot.register("mug", image, mask).success
            poses = robot.listen(topics.POSES)
            when = time.time_ns()
            robot.publish("/camera/color", image_message(image, "rgb8", when))
            robot.publish("/arm/camera_info", camera_info_message(when))
            robot.publish("/detector/mask", image_message(mask, "mono8", when))
            assert robot.wait(poses, lambda message: message.poses).poses[0].object_id == "mug"
        finally:
            robot.close()


@pytest.mark.parametrize("listed", [True, False], ids=["a list", "an image"])
def test_segmentation_launch(launch: None, weights: Path, tmp_path: Path, listed: bool) -> None:
    """A network's list, in a namespace, becomes poses; so does its image, without the helper."""
    parameters = tmp_path / "mine.yaml"
    values = {"similarity_threshold": -1.0, "storage.directory": str(tmp_path / "objects"), "weights": str(weights)}
    parameters.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    words = ["namespace:=arm", "image:=/camera/color", "device:=cpu", f"params_file:={parameters}"]
    words += ["segments:=/yolo/result", "type:=vision_msgs/msg/Detection2DArray"] if listed else ["mask:=/sam/mask"]
    image, mask = scene()
    with ros_context(), launched(tmp_path / "log", "segmentation.launch.py", *words):
        robot = Robot("/arm/nope")
        try:
            assert robot.register("mug", image, mask).success
            poses = robot.listen(topics.POSES)
            when = time.time_ns()
            robot.publish("/camera/color", image_message(image, "rgb8", when))
            robot.publish("/arm/camera_info", camera_info_message(when))
            if listed:  # of a type that is installed here and holds no masks: refused aloud, by the helper
                robot.publish("/yolo/result", Detection2DArray(detections=[Detection2D()]))
                robot.until(lambda: "holds no masks" in (tmp_path / "log").read_text(), "a refusal")
                return
            robot.publish("/sam/mask", image_message(mask, "mono8", when))
            assert robot.wait(poses, lambda message: message.poses).poses[0].object_id == "mug"
        finally:
            robot.close()


def test_boxes_launch(launch: None, weights: Path, tmp_path: Path) -> None:
    """A box around an object becomes its mask, and that its pose."""
    parameters = tmp_path / "mine.yaml"
    values = {"similarity_threshold": -1.0, "storage.directory": str(tmp_path / "objects"), "weights": str(weights)}
    parameters.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    words = ["namespace:=arm", "image:=/camera/color", "detections:=/detector/boxes", "device:=cpu"]
    image, mask = scene()
    rows, columns = np.nonzero(mask)
    box = BoundingBox2D(size_x=float(np.ptp(columns)), size_y=float(np.ptp(rows)))
    box.center.position.x, box.center.position.y = float(np.mean(columns)), float(np.mean(rows))
    with ros_context(), launched(tmp_path / "log", "boxes.launch.py", *words, f"params_file:={parameters}"):
        robot = Robot("/arm/nope")
        try:
            assert robot.register("mug", image, mask).success
            poses = robot.listen(topics.POSES)

            def answered() -> bool:  # best-effort, so sent until both nodes have it
                sent = image_message(image, "rgb8", time.time_ns())
                robot.publish("/camera/color", sent)
                robot.publish("/arm/camera_info", camera_info_message(time.time_ns()))
                boxes = [Detection2D(bbox=box)]
                robot.publish("/detector/boxes", Detection2DArray(header=sent.header, detections=boxes))
                time.sleep(0.5)
                return any(message.poses for message in robot.received[poses])

            robot.until(answered, "a pose")
        finally:
            robot.close()


def test_two_cameras_launch(launch: None, weights: Path, tmp_path: Path) -> None:
    """Each node knows its own objects alone, and broadcasts under names of its own."""
    sides = ("front", "back")
    values = {
        side: {
            "similarity_threshold": -1.0,
            "confidence_threshold": 0.0,
            "weights": str(weights),
            "device": "cpu",
            "storage.directory": str(tmp_path / side),
            "tf.prefix": f"{side}_",
        }
        for side in sides
    }
    parameters = tmp_path / "mine.yaml"
    sections = {f"/{side}/nope": {"ros__parameters": values[side]} for side in sides}
    parameters.write_text(yaml.safe_dump(sections))
    words = ["left:=/front", "right:=/back", f"params_file:={parameters}"]
    image, mask = scene()
    with ros_context(), launched(tmp_path / "log", "two_cameras.launch.py", *words):
        robots = {side: Robot(f"/{side}/nope") for side in sides}
        try:
            for side, robot in robots.items():
                assert robot.register(f"mug_of_{side}", image, mask).success
            for side, robot in robots.items():
                assert robot.objects() == [f"mug_of_{side}"]
                transforms = robot.listen(topics.TF)
                when = time.time_ns()
                robot.publish(f"/{side}/image_raw", image_message(image, "rgb8", when))
                robot.publish(f"/{side}/camera_info", camera_info_message(when))
                robot.publish(f"/{side}/mask", image_message(mask, "mono8", when))
                sent = robot.wait(transforms).transforms
                assert [one.child_frame_id for one in sent] == [f"{side}_mug_of_{side}"]
        finally:
            for robot in robots.values():
                robot.close()


def test_two_cameras_launch_without_a_section_is_refused(launch: None, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", LAUNCHER, str(ROOT / "launch" / "two_cameras.launch.py"), "left:=/roof"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert ended.returncode != 0
    assert "has no section '/roof/nope:'" in ended.stdout + ended.stderr


def test_demo_launch(launch: None, weights: Path, tmp_path: Path) -> None:
    sequence = ROOT / "demo" / "sequence"
    if not sequence.is_dir():
        pytest.skip("there is no bundled sequence")
    words = [f"data:={sequence}", f"weights:={weights}", "device:=cpu", "loop:=false", "rate:=10"]
    with ros_context():
        robot = Robot()
        try:
            with launched(tmp_path / "log", "demo.launch.py", *words) as process:
                poses = robot.listen(topics.POSES)
                robot.wait(poses, timeout=30)
                robot.until(lambda: process.poll() is not None, "the end of the sequence", 60)
        finally:
            robot.close()
