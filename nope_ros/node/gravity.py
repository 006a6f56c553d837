"""Which way is down in the camera, from whichever source the parameters name. None where no source is named."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import Imu

from nope_ros.frame import InputError
from nope_ros.node.distro import HISTORY, TransformError, Transforms, nanoseconds
from nope_ros.node.pairing import JUMP_BACK
from nope_ros.node.parameters import Settings

Array = NDArray[np.float64]

# Acceleration of an IMU that only feels gravity is within this of 9.81 m/s²: else it is being pushed, and says little.
_STANDARD = 9.80665
_TOLERANCE = 2.0
# Seconds of samples that are averaged, and how old the newest may be.
_WINDOW = 0.5
_OLDEST = 1.0


@dataclass(frozen=True)
class ImuSample:
    """One measurement: nanoseconds, (3,) m/s² in the IMU's frame, and that frame's name."""

    stamp: int
    acceleration: Array
    frame: str

    @classmethod
    def of(cls, message: Imu) -> ImuSample:
        """What a message says."""
        felt = message.linear_acceleration
        return cls(nanoseconds(message.header.stamp), np.array([felt.x, felt.y, felt.z]), message.header.frame_id)


def history(settings: Settings) -> int:
    """Nanoseconds for which TF and IMU are kept: gravity is asked for when the mask has come."""
    return HISTORY + int(settings.mask_patience * 1e9)


class ImuGravity:
    """The last samples of an accelerometer.

    Args:
        history: nanoseconds that are kept: an image waits for its mask, and gravity is that of the image.

    Attributes:
        history: the same; may be changed.
    """

    def __init__(self, history: int = HISTORY) -> None:
        self.history = history
        self._samples: deque[ImuSample] = deque()
        self._lock = threading.Lock()

    def add(self, sample: ImuSample) -> None:
        """Take in a sample."""
        with self._lock:
            if self._samples and sample.stamp < self._samples[-1].stamp - JUMP_BACK:
                self._samples.clear()
            if not self._samples or sample.stamp >= self._samples[-1].stamp:
                self._samples.append(sample)
            while self._samples[0].stamp < self._samples[-1].stamp - self.history:
                self._samples.popleft()

    def down(self, stamp: int) -> tuple[Array, str]:
        """Unit vector (3,) pointing down in the IMU's frame around a stamp, and that frame's name.

        Raises:
            InputError: if there is no sample of that time, or the IMU is being accelerated.
        """
        with self._lock:
            first = bisect_left(self._samples, stamp - _OLDEST * 1e9, key=lambda sample: sample.stamp)
            last = bisect_right(self._samples, stamp + _OLDEST * 1e9, key=lambda sample: sample.stamp)
            samples = list(islice(self._samples, first, last))
            begins = self._samples[0].stamp - stamp if self._samples else 0
        if not samples:
            late = f"; what is kept of it begins {begins / 1e9:.1f} s after the image" if begins > 0 else ""
            raise InputError(f"gravity: the IMU has sent nothing around the image's stamp{late}")
        nearest = min(abs(sample.stamp - stamp) for sample in samples)
        samples = [sample for sample in samples if abs(sample.stamp - stamp) <= nearest + _WINDOW * 1e9 / 2]
        mean = np.mean([sample.acceleration for sample in samples], axis=0)
        size = float(np.linalg.norm(mean))
        if not abs(size - _STANDARD) <= _TOLERANCE:  # also refuses NaN
            raise InputError(f"gravity: the IMU feels {size:.1f} m/s², not gravity alone; is it in m/s², and at rest?")
        # At rest an accelerometer feels the floor push up.
        return -mean / size, samples[-1].frame


@dataclass(frozen=True)
class Gravity:
    """Where gravity comes from; the first source that is named.

    Attributes:
        vector: (3,) down in the camera's optical frame.
        frame: name of a TF frame whose z points up.
        imu: accelerometer.
        transforms: TF; needed by ``frame``, and by ``imu`` where it sits in another frame than the camera.
        timeout: seconds to wait for TF.
    """

    vector: Array | None = None
    frame: str = ""
    imu: ImuGravity | None = None
    transforms: Transforms | None = None
    timeout: float = 0.1

    @classmethod
    def of(
        cls, settings: Settings, *, imu: ImuGravity | None, transforms: Transforms | None, timeout: float
    ) -> Gravity:
        """The sources that the node's parameters name."""
        vector = np.array(settings.gravity_vector)
        return cls(vector if vector.any() else None, settings.gravity_frame, imu, transforms, timeout)

    @property
    def source(self) -> str:
        """Name of the source, for people."""
        if self.vector is not None:
            return "parameter"
        if self.frame:
            return f"TF frame '{self.frame}'"
        return "none" if self.imu is None else "IMU"

    def down(self, camera_frame: str, stamp: int) -> Array | None:
        """Unit vector (3,) pointing down in the camera's optical frame at a stamp (ns); None without a source.

        Raises:
            InputError: if the source that is named does not answer.
        """
        if self.vector is not None:
            return self.vector / np.linalg.norm(self.vector)
        if self.frame:
            return -self._rotation(camera_frame, self.frame, stamp)[:, 2]
        if self.imu is None:
            return None
        down, frame = self.imu.down(stamp)
        if frame in ("", camera_frame):
            return down
        turned: Array = self._rotation(camera_frame, frame, stamp) @ down
        return turned

    def _rotation(self, target: str, source: str, stamp: int) -> Array:
        if self.transforms is None:
            raise InputError("gravity: TF is not being listened to")
        try:
            return self.transforms.rotation(target, source, stamp, self.timeout)
        except TransformError as error:
            raise InputError(f"gravity: {error}") from None
