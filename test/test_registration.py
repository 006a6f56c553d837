"""What a request to register is taken to mean, and walks that nobody ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from node_process import camera_info_message, image_message

from nope_ros.frame import InputError
from nope_ros.node import stream
from nope_ros.node.gravity import Gravity
from nope_ros.node.pairing import FrameMessages
from nope_ros.node.registration import STALE, requested_messages
from nope_ros.srv import RegisterFromStream, RegisterObject


def frame(stamp: int = 1, mask: Any = None) -> FrameMessages:
    shown = np.zeros((240, 320), np.uint8)
    shown[80:160, 100:200] = 255
    image = np.full((240, 320, 3), 90, np.uint8)
    return FrameMessages(
        stamp,
        image_message(image, "rgb8", stamp),
        image_message(shown if mask is None else mask, "mono8", stamp),
        camera_info_message(stamp),
    )


def test_the_latest_frame_is_taken_only_while_it_is_new() -> None:
    request = RegisterObject.Request(object_id="mug")
    new, old = frame(), replace(frame(), came=time.monotonic() - STALE - 1)
    assert requested_messages(request, new) is new
    with pytest.raises(InputError, match=r"of 61 s ago.*does the segmentation still run"):
        requested_messages(request, old)
    with pytest.raises(InputError, match="no frame"):
        requested_messages(request, None)


def test_a_walk_that_nobody_ends_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_FRAMES", 5)
    walk = stream.StreamRegistration(RegisterFromStream.Request(object_id="mug"), 96, None)
    for index in range(30):
        assert walk.look(frame(index + 1), Gravity(), rectified=False)
    assert len(walk.walk.views) == 5 and len(walk.walk.refused) == 1
    assert "5 frames already; stop it" in walk.walk.refused[0].reason
    walk.end()
    assert not walk.look(frame(99), Gravity(), rectified=False), "it is closed"
    walk.go_on()
    assert walk.look(frame(100), Gravity(), rectified=False)
