"""Masks for robots that have only boxes: a detector's boxes, or a click, become masks by GrabCut.

    ros2 run nope_ros mask_from_boxes --ros-args -r image:=/camera/color/image_raw -r detections:=/detector/boxes

A node beside the main one, whose ``mask`` it publishes: instance ids in the order of the boxes, stamped as the image.
A click (geometry_msgs/PointStamped, x and y in pixels) gives the mask of what is there in the newest image, to register
it. GrabCut (Rother et al. 2004) tells colours apart, not objects: a segmentation network makes better masks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import PointStamped
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from vision_msgs.msg import Detection2DArray

from nope_ros.frame import InputError
from nope_ros.node import messages
from nope_ros.node.complaints import Complaints
from nope_ros.node.distro import nanoseconds

# GrabCut's time grows with its pixels; an outline needs no more than this many along the longer side.
_LONGEST = 160
_ROUNDS = 4
# Around a box, so that GrabCut sees what background looks like. Share of its size.
_MARGIN = 0.4
# Images that wait for their boxes.
_WAITING = 60
_MOST_BOXES = 100


@dataclass(frozen=True)
class Box:
    """Pixels: centre and full size."""

    x: float
    y: float
    width: float
    height: float

    @classmethod
    def around(cls, x: float, y: float, image_height: int) -> Box:
        """For a click: a third of the image's height around it."""
        return cls(x, y, image_height / 3, image_height / 3)


def cut_out(rgb: NDArray[np.uint8], box: Box, *, seed: bool = False) -> NDArray[np.bool_]:
    """The object in a box.

    Args:
        rgb: (H, W, 3).
        box: around it, in pixels.
        seed: whether the box's centre is on the object for certain, as a click is.

    Returns:
        (H, W).

    Raises:
        InputError: if the box is not in the image, or there is nothing to tell apart in it.
    """
    height, width = rgb.shape[:2]
    numbers = (box.x, box.y, box.width, box.height)
    if not np.isfinite(numbers).all() or min(box.width, box.height) < 8:
        raise InputError(f"detections: a box of {box.width:g}x{box.height:g} px is too small, or holds NaN")
    inner = _clipped(box, 1.0, width, height)
    outer = _clipped(box, 1 + 2 * _MARGIN, width, height)
    if min(inner[2] - inner[0], inner[3] - inner[1]) < 8:
        raise InputError(f"detections: the box at {box.x:g}, {box.y:g} px is not in the image of {width}x{height} px")
    part = rgb[outer[1] : outer[3], outer[0] : outer[2]]
    scale = min(1.0, _LONGEST / max(part.shape[:2]))
    small = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    labels = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    x0, y0, x1, y1 = ((np.array(inner) - np.array([*outer[:2], *outer[:2]])) * scale).round().astype(int).tolist()
    labels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = cv2.GC_PR_FGD  # a long thin box is less than a pixel high here
    if seed:
        if not (0 <= box.x < width and 0 <= box.y < height):
            raise InputError(f"detections: {box.x:g}, {box.y:g} px is not in the image of {width}x{height} px")
        centre = (round((box.x - outer[0]) * scale), round((box.y - outer[1]) * scale))
        cv2.circle(labels, centre, max(2, round(0.06 * (x1 - x0))), cv2.GC_FGD, -1)
    if not np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).any():
        raise InputError(f"detections: the box at {box.x:g}, {box.y:g} px is too thin to tell what is in it")
    if not (labels == cv2.GC_BGD).any():
        raise InputError("detections: the box fills the image, so nothing tells the object from what is behind it")
    cv2.setRNGSeed(0)  # GrabCut begins with clusters drawn at random; the same image gives the same mask
    empty = np.zeros((1, 65), np.float64)
    cv2.grabCut(small, labels, None, empty, empty.copy(), _ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    count, pieces, sizes, _ = cv2.connectedComponentsWithStats(found)
    if count < 2:
        raise InputError(f"detections: nothing in the box at {box.x:g}, {box.y:g} px differs from what is around it")
    largest = 1 + int(np.argmax(sizes[1:, cv2.CC_STAT_AREA]))
    whole = np.zeros((height, width), np.uint8)
    piece = (pieces == largest).astype(np.uint8) * 255
    piece = cv2.resize(piece, part.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    whole[outer[1] : outer[3], outer[0] : outer[2]] = piece
    return whole > 127


def instance_ids(rgb: NDArray[np.uint8], boxes: Sequence[Box], complain: Complaints) -> NDArray[np.uint16]:
    """Ids (H, W) of the objects in boxes, 1 for the first; where they overlap, the smaller box wins."""
    ids = np.zeros(rgb.shape[:2], np.uint16)
    order = sorted(range(len(boxes)), key=lambda index: -boxes[index].width * boxes[index].height)
    for index in order[-_MOST_BOXES:]:
        try:
            ids[cut_out(rgb, boxes[index])] = index + 1
        except InputError as error:
            complain(error)
    return ids


def boxes_of(message: Detection2DArray) -> list[Box]:
    """The boxes of a message."""
    found = []
    for detection in message.detections:
        centre = detection.bbox.center
        place = getattr(centre, "position", centre)  # vision_msgs 4 and later; before it was a Pose2D of its own
        found.append(Box(place.x, place.y, detection.bbox.size_x, detection.bbox.size_y))
    return found


def _clipped(box: Box, factor: float, width: int, height: int) -> tuple[int, int, int, int]:
    half = np.array([box.width, box.height]) * factor / 2
    low = np.clip(np.array([box.x, box.y]) - half, 0, [width, height]).round().astype(int)
    high = np.clip(np.array([box.x, box.y]) + half, 0, [width, height]).round().astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; returns the exit code."""
    from rclpy.node import Node

    from nope_ros.node import topics
    from nope_ros.node.process import run

    class MaskFromBoxes(Node):
        """See the module."""

        def __init__(self) -> None:
            super().__init__("mask_from_boxes")
            self.declare_parameter("compressed", False)
            self._complain = Complaints(self.get_logger().warning)
            self._images: dict[int, Any] = {}
            compressed = bool(self.get_parameter("compressed").value)
            type_, name = (CompressedImage, "image/compressed") if compressed else (Image, "image")
            self.create_subscription(type_, name, self._keep, topics.input_qos())
            self.create_subscription(Detection2DArray, "detections", self._detected, topics.input_qos())
            self.create_subscription(PointStamped, "click", self._clicked, topics.output_qos())
            self._mask = self.create_publisher(Image, "mask", topics.output_qos())

        def _keep(self, message: Any) -> None:
            self._images[nanoseconds(message.header.stamp)] = message
            while len(self._images) > _WAITING:
                del self._images[next(iter(self._images))]

        def _detected(self, message: Detection2DArray) -> None:
            image = self._images.get(nanoseconds(message.header.stamp))
            if image is None:
                self._complain("detections: no image has their stamp; the detector must copy the header of its image")
                return
            try:
                ids = instance_ids(messages.image_array(image), boxes_of(message), self._complain)
            except InputError as error:
                self._complain(error)
                return
            self._mask.publish(messages.mask(image.header, ids))

        def _clicked(self, message: PointStamped) -> None:
            if not self._images:
                self._complain("click: no image has come yet")
                return
            image = next(reversed(self._images.values()))
            try:
                rgb = messages.image_array(image)
                found = cut_out(rgb, Box.around(message.point.x, message.point.y, rgb.shape[0]), seed=True)
            except InputError as error:
                self._complain(str(error).replace("detections: ", "click: ", 1))
                return
            self._mask.publish(messages.mask(image.header, found.astype(np.uint16)))

    return run("mask_from_boxes", MaskFromBoxes, arguments)


if __name__ == "__main__":
    sys.exit(main())
