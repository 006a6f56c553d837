"""Rotation and translation of objects nobody has a model of, from one reference image (NOPE, CVPR 2024)."""

from nope_ros.distribution import Ambiguity, RotationDistribution
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Camera, Frame, InputError
from nope_ros.pose import PoseEstimate, PoseMode

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
]
