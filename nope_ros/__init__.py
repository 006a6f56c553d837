"""Rotation and translation of objects nobody has a model of, from one reference image (NOPE, CVPR 2024)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nope_ros.distribution import Ambiguity, RotationDistribution
    from nope_ros.estimator import PoseEstimator, RegisteredObject
    from nope_ros.frame import Camera, Frame, InputError
    from nope_ros.pose import PoseEstimate, PoseMode
    from nope_ros.tracking import Tracker

__all__ = [
    "Ambiguity",
    "Camera",
    "Frame",
    "InputError",
    "PoseEstimate",
    "PoseEstimator",
    "PoseMode",
    "RegisteredObject",
    "RotationDistribution",
    "Tracker",
]

# Looked up when asked for: nope_ros.msg is part of this package, and whoever reads a message (`ros2 topic echo` on the
# operator's laptop, say) should need neither torch nor OpenCV for it.
_HOME = {
    "Ambiguity": "distribution",
    "RotationDistribution": "distribution",
    "PoseEstimator": "estimator",
    "RegisteredObject": "estimator",
    "Camera": "frame",
    "Frame": "frame",
    "InputError": "frame",
    "PoseEstimate": "pose",
    "PoseMode": "pose",
    "Tracker": "tracking",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
