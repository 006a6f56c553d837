"""What the node subscribes to, publishes and serves: one table, from which endpoints are made and documented."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray
from visualization_msgs.msg import MarkerArray

from nope_ros.frame import InputError
from nope_ros.msg import ObjectPoseArray, PoseDistribution, RegistrationProgress
from nope_ros.srv import ListObjects, RegisterFromStream, RegisterObject, UnregisterObject

if TYPE_CHECKING:
    from rclpy.qos import QoSProfile

Direction = Literal["in", "out", "service"]


@dataclass(frozen=True)
class Endpoint:
    """A topic or service.

    Attributes:
        name: before remapping.
        type: message or service class.
        direction: as the node sees it.
        description: what it carries.
    """

    name: str
    type: type
    direction: Direction
    description: str

    @property
    def type_name(self) -> str:
        """As ``ros2 topic list -t`` shows it."""
        package, kind, *_ = self.type.__module__.split(".")
        return f"{package}/{kind}/{self.type.__name__}"


IMAGE = Endpoint("image", Image, "in", "8-bit colour or grey; not used with `compressed`")
IMAGE_COMPRESSED = Endpoint("image/compressed", CompressedImage, "in", "JPEG or PNG; with the parameter `compressed`")
CAMERA_INFO = Endpoint("camera_info", CameraInfo, "in", "calibration: plumb_bob, rational_polynomial or equidistant")
MASK = Endpoint(
    "mask",
    Image,
    "in",
    "mono8 (above 0: the object) or 8UC1/16UC1 instance ids; stamped as its image, may come seconds later",
)
DEPTH = Endpoint(
    "depth",
    Image,
    "in",
    "optional, aligned with the image: 32FC1 m or 16UC1 mm; gives scale at registration, distance in every frame, and "
    "with `refinement` the pose",
)
IMU = Endpoint("<gravity.imu_topic>", Imu, "in", "its accelerometer tells gravity, if the parameter names it")
TF = Endpoint(
    "/tf", TFMessage, "out", "camera → `<tf.prefix><object_id>`, of trusted poses; read too where gravity needs it"
)
OBJECT_POSE = Endpoint(
    "~/objects/<object_id>/pose",
    PoseWithCovarianceStamped,
    "out",
    "one topic for each registered object; also poses that TF is not trusted with: the covariance says so",
)
POSES = Endpoint("~/poses", ObjectPoseArray, "out", "all objects: pose, covariance, confidence, ambiguity, modes")
DETECTIONS = Endpoint(
    "~/detections", Detection3DArray, "out", "the same for users of vision_msgs: hypotheses are the modes"
)
DISTRIBUTION = Endpoint(
    "~/distribution", PoseDistribution, "out", "orientations and their probabilities, one message an object"
)
MARKERS = Endpoint(
    "~/markers", MarkerArray, "out", "for RViz: axes, sphere of probabilities, covariance of the position"
)
OVERLAY = Endpoint("~/overlay", Image, "out", "the undistorted image with the poses drawn in")
PROGRESS = Endpoint("~/registration_progress", RegistrationProgress, "out", "how far a registration from the stream is")
DIAGNOSTICS = Endpoint(
    "/diagnostics", DiagnosticArray, "out", "once a second: rates, times by stage, drops, objects, model, memory"
)
STATUS = Endpoint(
    "~/status",
    String,
    "out",
    "the same in a few lines for people, last poses too; latched, at most once a second, when it has changed",
)
REGISTER = Endpoint(
    "~/register_object", RegisterObject, "service", "learn an object from one image, or from the latest frame"
)
REGISTER_STREAM = Endpoint(
    "~/register_from_stream",
    RegisterFromStream,
    "service",
    "learn an object from a walk around it: start, stop, cancel",
)
UNREGISTER = Endpoint("~/unregister_object", UnregisterObject, "service", "forget an object")
LIST = Endpoint("~/list_objects", ListObjects, "service", "the registered objects")

ENDPOINTS = (
    *(IMAGE, IMAGE_COMPRESSED, CAMERA_INFO, MASK, DEPTH, IMU),
    *(TF, OBJECT_POSE, POSES, DETECTIONS, DISTRIBUTION, MARKERS, OVERLAY, PROGRESS, DIAGNOSTICS, STATUS),
    *(REGISTER, REGISTER_STREAM, UNREGISTER, LIST),
)


# Made anew for each endpoint: rclpy writes a user's overrides into the profile it is given.
def input_qos() -> QoSProfile:
    """As for sensor data: the newest counts."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


def output_qos() -> QoSProfile:
    """Results must arrive."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)


def latched_qos() -> QoSProfile:
    """Who comes late is told what was said last."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def service_qos() -> QoSProfile:
    """Room for many callers: of the default ten calls that wait, the eleventh would push out the first, unanswered."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    return QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)


def object_topic(object_id: str) -> str:
    """Topic of one object's pose. Topics know fewer characters than object ids; others become '_'.

    Raises:
        InputError: if nothing is left of the id.
    """
    token = re.sub(r"[^A-Za-z0-9_]", "_", object_id)
    if not token.strip("_"):
        raise InputError(f"object_id: '{object_id}' makes no topic name; use at least one letter or digit")
    if not token[0].isalpha():
        token = "object_" + token.lstrip("_")  # a topic's part can't begin with a digit; with '_' it would be hidden
    return OBJECT_POSE.name.replace("<object_id>", token)


def table() -> str:
    """Topics and services as a Markdown table."""
    lines = ["| | name | type | |", "| --- | --- | --- | --- |"]
    for endpoint in ENDPOINTS:
        lines.append(f"| {endpoint.direction} | `{endpoint.name}` | {endpoint.type_name} | {endpoint.description} |")
    return "\n".join(lines)
