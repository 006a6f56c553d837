"""Masks from segmentation nodes that publish a list: YOLO's polygons, or an image for each instance.

    ros2 run nope_ros mask_from_segments --ros-args -r segments:=/yolo/detections -p type:=yolo_msgs/msg/DetectionArray

A node beside the main one, whose ``mask`` it publishes: instance ids in the order of the list, under the header of the
list, which is its image's. Two kinds of messages are understood, by their fields, whatever their package is called:

* ``detections[]`` with a polygon each, ``mask.data[]`` in pixels, and the image's ``mask.height`` and ``mask.width``:
  yolo_ros;
* ``masks[]``, an image for each instance: ultralytics_ros.

A segmentation that publishes one image (mono8, or ids) needs no such helper: remap ``mask``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import Image

from nope_ros.frame import LARGEST_SIDE, InputError
from nope_ros.node import messages
from nope_ros.node.complaints import Complaints

_MOST_SEGMENTS = 1000


def instance_ids(message: Any, classes: Collection[str] = ()) -> NDArray[np.uint16] | None:
    """Ids (H, W) of a list's instances, 1 for the first; where they overlap, the earlier one, which is surer, wins.

    Args:
        message: the list.
        classes: names of those to keep; empty: all. The ids of the others are left out, not given to others.

    Returns:
        None where the list is empty, and so is of no size.

    Raises:
        InputError: if the message is no such list, or what it holds does not fit together.
    """
    try:
        if hasattr(message, "masks"):
            names = [_name(one) for one in message.detections.detections]
            layers = [messages.mask_array(one) > 0 for one in message.masks[:_MOST_SEGMENTS]]
        else:
            names = [one.class_name for one in message.detections]
            layers = [_filled(one.mask) for one in message.detections[:_MOST_SEGMENTS]]
    except AttributeError as error:
        raise InputError(
            f"segments: this type of message holds no masks in the way of yolo_ros or ultralytics_ros ({error}); set "
            "the parameter 'type', or publish a mask yourself"
        ) from None
    if not layers:
        return None
    sizes = {layer.shape for layer in layers}
    if len(sizes) > 1:
        raise InputError(f"segments: masks of one list differ in size: {sorted(sizes)}")
    ids = np.zeros(layers[0].shape, np.uint16)
    for index in reversed(range(len(layers))):
        if not classes or (index < len(names) and names[index] in classes):
            ids[layers[index]] = index + 1
    return ids


def _filled(mask: Any) -> NDArray[np.bool_]:
    """A polygon's inside (H, W)."""
    height, width = int(mask.height), int(mask.width)
    if not (0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE):
        raise InputError(
            f"segments: a mask of {width}x{height} px; is the model one that segments (yolov8m-seg.pt, not yolov8m.pt)?"
        )
    points = np.array([(point.x, point.y) for point in mask.data], np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise InputError("segments: a polygon has points that are not finite")
    layer = np.zeros((height, width), np.uint8)
    if len(points) >= 3:
        corners = np.clip(points, -LARGEST_SIDE, 2 * LARGEST_SIDE).round().astype(np.int32)
        cv2.fillPoly(layer, [corners], 1)
    return layer > 0


def _name(detection: Any) -> str:
    """The best hypothesis of a vision_msgs/Detection2D."""
    results: Sequence[Any] = detection.results
    return str(results[0].hypothesis.class_id) if results else ""


def message_type(name: str) -> type:
    """A message's class from ``package/msg/Name``.

    Raises:
        InputError: if it is not installed, or its name is none.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*/msg/[A-Z][A-Za-z0-9]*", name):
        raise InputError(f"type: '{name}' is not like yolo_msgs/msg/DetectionArray")
    package, _, kind = name.split("/")
    try:
        found: type = getattr(import_module(f"{package}.msg"), kind)
    except (ImportError, AttributeError):
        raise InputError(f"type: {name} is not installed, or its workspace is not sourced") from None
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; returns the exit code."""
    from rclpy.node import Node

    from nope_ros.node import topics
    from nope_ros.node.process import run

    class MaskFromSegments(Node):
        """See the module."""

        def __init__(self) -> None:
            super().__init__("mask_from_segments")
            self.declare_parameter("type", "yolo_msgs/msg/DetectionArray")
            self.declare_parameter("classes", "")  # names, with commas between; empty: all
            self._complain = Complaints(self.get_logger().warning)
            self._mask = self.create_publisher(Image, "mask", topics.output_qos())
            self._nothing: NDArray[np.uint16] | None = None
            type_ = message_type(str(self.get_parameter("type").value))
            self.create_subscription(type_, "segments", self._convert, topics.input_qos())

        def _convert(self, message: Any) -> None:
            wanted = {name.strip() for name in str(self.get_parameter("classes").value).split(",")} - {""}
            try:
                ids = instance_ids(message, wanted)
            except InputError as error:
                self._complain(error)
                return
            if ids is None:  # nothing is in view, which is worth saying, at the size that images had before
                ids = self._nothing
            elif self._nothing is None or self._nothing.shape != ids.shape:
                self._nothing = np.zeros_like(ids)
            if ids is not None:
                self._mask.publish(messages.mask(message.header, ids))

    return run("mask_from_segments", MaskFromSegments, arguments)


if __name__ == "__main__":
    sys.exit(main())
