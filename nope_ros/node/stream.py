"""Registration from the stream: frames collected while the node goes on, then registered; without a node."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import InputError
from nope_ros.msg import RegistrationProgress
from nope_ros.node.distro import TransformError, Transforms
from nope_ros.node.gravity import Gravity
from nope_ros.node.pairing import FrameMessages
from nope_ros.node.registration import reference_frame
from nope_ros.srv import RegisterFromStream
from nope_ros.video import KEYFRAMES, Pose, Walk

# A walk of some minutes; crops of it are 100 MB.
MOST_FRAMES = 2500


class StreamRegistration:
    """One walk, from START to STOP or CANCEL. Frames come from one thread, the end from another.

    Args:
        request: of START.
        crop_size: of the predictor.
        transforms: TF, where the request names a fixed frame.

    Attributes:
        object_id: of the object.
        overwrite: whether it may take the place of one of that name.
        walk: what was collected.
    """

    def __init__(self, request: RegisterFromStream.Request, crop_size: int, transforms: Transforms | None) -> None:
        self.object_id: str = request.object_id
        self.overwrite: bool = request.overwrite
        self.walk = Walk(crop_size)
        self._request = request
        self._transforms = transforms
        self._lock = threading.Lock()
        self._closed = False
        self._told = 0  # refusals, of those that were noted
        self._full = False

    def look(self, received: FrameMessages, gravity: Gravity, *, rectified: bool) -> bool:
        """Take in a frame; what is wrong with it is noted. False while the walk is closed."""
        name = f"{received.stamp / 1e9:.3f}"
        with self._lock:
            if self._closed:
                return False
            if len(self.walk) >= MOST_FRAMES:
                if not self._full:  # once: a walk that nobody stops must not grow
                    self._full = True
                    self.walk.refuse(name, f"the walk has {MOST_FRAMES} frames already; stop it")
                return True
            try:
                frame = reference_frame(received, self._request.instance, rectified=rectified)
                pose, down = self._placed(received, gravity)
            except (InputError, TransformError) as error:
                self.walk.refuse(name, str(error))
            else:
                self.walk.add(name, frame, gravity_camera=down, pose=pose)
        return True

    def _placed(self, received: FrameMessages, gravity: Gravity) -> tuple[Pose | None, np.ndarray | None]:
        camera = received.image.header.frame_id
        if self._transforms is None:
            return None, gravity.down(camera, received.stamp)
        pose = self._transforms.pose(camera, self._request.fixed_frame, received.stamp, gravity.timeout)
        return pose, -pose[0][:, 2]

    def end(self) -> None:
        """Take in no more frames."""
        with self._lock:
            self._closed = True

    def go_on(self) -> None:
        """Take in frames again."""
        with self._lock:
            self._closed = False

    def register(self, estimator: PoseEstimator, report: Callable[[str], None]) -> RegisteredObject:
        """Learn the object from what was collected, telling ``report`` what is being done.

        Raises:
            InputError: if that is too little. The walk is closed then too.
        """
        self.end()
        distance = self._request.reference_distance
        return estimator.register_walk(
            self.walk,
            object_id=self.object_id,
            keyframes=self._request.keyframes or KEYFRAMES,
            reference_distance=None if distance == 0 else distance,
            report=report,
        )

    def progress(self, stage: str) -> RegistrationProgress:
        """How far the walk is."""
        refused = self.walk.refused
        last = refused[-1].reason if refused and len(refused) > self._told else ""
        self._told = len(refused)
        return RegistrationProgress(
            object_id=self.object_id,
            stage=stage,
            frames=len(self.walk),
            refused=len(refused),
            problem=last,
            coverage=self.walk.coverage,
        )
