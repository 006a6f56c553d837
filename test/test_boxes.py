"""`mask_from_boxes`: boxes and clicks become masks; and the node that does it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import PointStamped
from hypothesis import example, given, settings
from hypothesis import strategies as st
from node_process import Robot, image_message, ros_context
from sensor_msgs.msg import Image
from vision_msgs.msg import Detection2D, Detection2DArray

from nope_ros.frame import InputError
from nope_ros.node import messages, topics
from nope_ros.node.boxes import Box, boxes_of, cut_out, instance_ids
from nope_ros.node.complaints import Complaints
from nope_ros.recording import open_recording

ROOT = Path(__file__).parent.parent


def picture() -> tuple[np.ndarray, list[np.ndarray]]:
    """Two discs of many colours on a grey, noisy table, and their masks."""
    random = np.random.default_rng(3)
    image = random.normal(120, 6, (240, 320, 3)).clip(0, 255).astype(np.uint8)
    masks = []
    for centre, colour in (((90, 120), (200, 40, 30)), ((220, 110), (30, 60, 190))):
        mask = cv2.circle(np.zeros((240, 320), np.uint8), centre, 35, 1, -1) > 0
        image[mask] = np.clip(random.normal(colour, 15, (int(mask.sum()), 3)), 0, 255)
        masks.append(mask)
    return image, masks


def box_of(mask: np.ndarray, loose: float = 1.15) -> Box:
    y, x = np.nonzero(mask)
    centre = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    return Box(*map(float, centre), loose * float(np.ptp(x)), loose * float(np.ptp(y)))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_boxes_become_masks() -> None:
    image, masks = picture()
    told: list[str] = []
    nothing = Box(160, 20, 20, 20)
    ids = instance_ids(
        image, [box_of(masks[0]), box_of(masks[1]), Box(1000, 5, 40, 40), nothing], Complaints(told.append)
    )
    assert overlap(ids == 1, masks[0]) > 0.95 and overlap(ids == 2, masks[1]) > 0.95
    assert any("is not in the image" in one for one in told)
    again = instance_ids(image, [box_of(masks[0])], Complaints(told.append))
    assert np.array_equal(again == 1, ids == 1), "the same image gives the same mask"


def test_a_click_becomes_a_mask() -> None:
    image, masks = picture()
    found = cut_out(image, Box.around(85, 115, 240), seed=True)
    assert overlap(found, masks[0]) > 0.95


@pytest.mark.parametrize("seed", [False, True])
@pytest.mark.parametrize(("width", "height"), [(3000, 8), (3800, 8), (8, 2000)])
def test_a_long_thin_box_in_a_large_image(width: int, height: int, seed: bool) -> None:
    image = np.random.default_rng(0).integers(0, 255, (2160, 3840, 3), np.uint8)
    told: list[str] = []
    ids = instance_ids(image, [Box(1920, 1080, width, height)], Complaints(told.append))
    assert ids.shape == (2160, 3840)
    assert told == [] or "detections: " in told[0]
    try:
        assert cut_out(image, Box(1920, 1080, width, height), seed=seed).any()
    except InputError as error:
        assert "detections: " in str(error)


def test_photographs() -> None:
    """How well boxes do on the bundled sequence, whose true masks are known."""
    sequence = ROOT / "demo" / "sequence"
    if not sequence.is_dir():
        pytest.skip("there is no bundled sequence")
    quality = [
        overlap(cut_out(moment.image, box_of(moment.mask, 1.1)), moment.mask)
        for moment in open_recording(sequence, limit=6)
    ]
    assert np.median(quality) > 0.7, quality


@example(0.0, 3221225472.0, 15.0, 6442450944.0, True)
@given(*(st.floats(allow_nan=True, allow_infinity=True, width=32) for _ in range(4)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_box(x: float, y: float, width: float, height: float, seed: bool) -> None:
    image, _ = picture()
    try:
        assert cut_out(image, Box(x, y, width, height), seed=seed).shape == (240, 320)
    except InputError as error:
        assert "detections: " in str(error)


def test_the_node(tmp_path: Path) -> None:
    image, masks = picture()
    log = (tmp_path / "log").open("w")
    with ros_context():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nope_ros.node.boxes"], stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        robot = Robot("")
        try:
            received = robot.listen(topics.MASK, "/mask")
            when = time.time_ns()
            picture_message = image_message(image, "rgb8", when)
            found = Detection2DArray(header=picture_message.header)
            for mask in masks:
                box, detection = box_of(mask), Detection2D()
                detection.bbox.center.position.x, detection.bbox.center.position.y = box.x, box.y
                detection.bbox.size_x, detection.bbox.size_y = box.width, box.height
                found.detections.append(detection)
            assert boxes_of(found)[0] == box_of(masks[0])

            def seen() -> bool:  # best-effort inputs may be lost, but a camera and a detector go on
                robot.publish("image", picture_message)
                robot.publish("detections", found)
                time.sleep(0.3)
                return bool(robot.received[received])

            robot.until(seen, "a mask for boxes")
            answer = robot.wait(received)
            assert isinstance(answer, Image) and answer.header == picture_message.header
            assert overlap(messages.mask_array(answer) == 2, masks[1]) > 0.95
            click = PointStamped()
            click.point.x, click.point.y = 90.0, 120.0
            robot.publish("click", click)
            clicked = messages.mask_array(robot.wait(received, lambda mask: messages.mask_array(mask).max() == 1))
            assert overlap(clicked == 1, masks[0]) > 0.95
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
            robot.close()
    log.close()
    assert code == 0 and "Traceback" not in (tmp_path / "log").read_text()
