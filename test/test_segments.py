"""`mask_from_segments`: lists of instances become masks; and the node that does it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_process import Robot, image_message, ros_context
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose

from nope_ros.frame import InputError
from nope_ros.node import messages
from nope_ros.node.segments import instance_ids, message_type

HEIGHT, WIDTH = 120, 160


def disc(x: int, y: int, radius: int = 20) -> np.ndarray:
    return cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (x, y), radius, 255, -1)


def polygons(*layers: tuple[str, np.ndarray]) -> Any:
    """As yolo_msgs/msg/DetectionArray, which is not installed here."""
    found = []
    for name, layer in layers:
        outline = max(cv2.findContours(layer, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=len)[:, 0]
        points = [SimpleNamespace(x=float(x), y=float(y)) for x, y in outline]
        mask = SimpleNamespace(height=HEIGHT, width=WIDTH, data=points)
        found.append(SimpleNamespace(class_name=name, mask=mask))
    return SimpleNamespace(header=Header(), detections=found)


def images(*layers: tuple[str, np.ndarray]) -> Any:
    """As ultralytics_ros/msg/YoloResult, which is not installed here either."""
    detections = Detection2DArray()
    for name, _ in layers:
        hypothesis = ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = name
        detections.detections.append(Detection2D(results=[hypothesis]))
    masks = [image_message(layer, "mono8") for _, layer in layers]
    return SimpleNamespace(header=Header(), detections=detections, masks=masks)


@pytest.mark.parametrize("kind", [polygons, images])
def test_lists_become_ids(kind: Any) -> None:
    cup, bottle, other = disc(40, 60), disc(110, 60), disc(50, 60)
    ids = instance_ids(kind(("cup", cup), ("bottle", bottle), ("cup", other)))
    assert ids is not None and ids.shape == (HEIGHT, WIDTH) and ids.dtype == np.uint16
    np.testing.assert_array_equal(ids == 1, cup > 0)  # the first is on top
    np.testing.assert_array_equal(ids == 2, bottle > 0)
    np.testing.assert_array_equal(ids == 3, (other > 0) & (cup == 0))
    kept = instance_ids(kind(("cup", cup), ("bottle", bottle)), {"bottle"})
    assert kept is not None and set(np.unique(kept)) == {0, 2}
    nothing = instance_ids(kind(("cup", cup)), {"plate"})
    assert nothing is not None and not nothing.any()
    assert instance_ids(kind()) is None
    np.testing.assert_array_equal(messages.mask_array(messages.mask(Header(), ids)), ids)


def test_what_cannot_be_used_is_refused_with_a_reason() -> None:
    mixed = images(("a", disc(40, 60)), ("b", disc(40, 60)[:50]))
    with pytest.raises(InputError, match="differ in size"):
        instance_ids(mixed)
    boxes_only = polygons(("cup", disc(40, 60)))
    boxes_only.detections[0].mask.height = 0
    with pytest.raises(InputError, match="yolov8m-seg"):
        instance_ids(boxes_only)
    with pytest.raises(InputError, match="holds no masks"):
        instance_ids(Detection2DArray(detections=[Detection2D()]))
    with pytest.raises(InputError, match="holds no masks"):
        instance_ids(Image())
    with pytest.raises(InputError, match="is not installed"):
        message_type("yolo_msgs/msg/DetectionArray")
    with pytest.raises(InputError, match="is not like"):
        message_type("os.path/msg/x")
    assert message_type("vision_msgs/msg/Detection2DArray") is Detection2DArray


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=6),
    st.integers(-1, 200) | st.just(2**31 - 1),
    st.integers(-1, 200),
)
def test_any_polygon(points: list[tuple[float, float]], height: int, width: int) -> None:
    mask = SimpleNamespace(height=height, width=width, data=[SimpleNamespace(x=x, y=y) for x, y in points])
    try:
        ids = instance_ids(SimpleNamespace(detections=[SimpleNamespace(class_name="", mask=mask)]))
    except InputError:
        return
    assert ids is not None and ids.shape == (height, width)


def test_the_node(tmp_path: Path) -> None:
    """Started as a user starts it: a type that is not there ends it with a reason, one without masks is told of."""
    command = [sys.executable, "-P", "-m", "nope_ros.node.segments", "--ros-args", "-p"]
    wrong = subprocess.run([*command, "type:=yolo_msgs/msg/DetectionArray"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "is not installed, or its workspace is not sourced" in wrong.stderr + wrong.stdout
    with ros_context(), (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "type:=vision_msgs/msg/Detection2DArray"], stdout=log, stderr=subprocess.STDOUT
        )
        robot = Robot("")
        try:

            def told() -> bool:  # best-effort inputs may be lost, but a detector goes on
                robot.publish("segments", Detection2DArray(detections=[Detection2D()]))
                time.sleep(0.3)
                return "holds no masks" in (tmp_path / "log").read_text()

            robot.until(told, "a reason")
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
            robot.close()
    assert code == 0 and "Traceback" not in (tmp_path / "log").read_text()
