"""Plays a recorded sequence as ROS topics: what a camera driver, a segmentation node and TF would publish.

    nope-ros play demo/sequence --rate 10 --loop

Gravity, where the sequence knows it, goes out on /tf as the orientation of the camera in a frame whose z axis points up
(``level``), as odom or map do on a robot; the node uses it with ``-p gravity.frame:=level``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import TransformStamped
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from nope_ros.crop import outline, virtual_camera
from nope_ros.frame import Camera, InputError
from nope_ros.node import distro, messages
from nope_ros.node.bagfile import Topics
from nope_ros.recording import Moment, PassedOn, open_recording, packaged
from nope_ros.rotations import exp, look_at
from nope_ros.srv import RegisterObject

Array = NDArray[np.float64]

LEVEL_FRAME = "level"
"""The frame whose z axis points up."""

# Camera elevation that axes are drawn for where gravity is not known: about how people look at things on a table.
_USUAL_ELEVATION = np.radians(30.0)


def header(moment: Moment, stamp: int) -> Header:
    """The header of all messages of a frame."""
    return Header(stamp=_time(stamp), frame_id=moment.frame_id)


def _time(stamp: int) -> Time:
    return Time(sec=stamp // 10**9, nanosec=stamp % 10**9)


def camera_info_message(camera: Camera, header: Header) -> CameraInfo:
    """A calibration."""
    message = CameraInfo(header=header, width=camera.width, height=camera.height)
    message.distortion_model = "plumb_bob" if camera.model == "none" else camera.model
    message.d = list(camera.distortion) or [0.0] * 5
    message.k = camera.K.ravel().tolist()
    message.r = np.eye(3).ravel().tolist()
    message.p = np.column_stack([camera.K, np.zeros(3)]).ravel().tolist()
    return message


def level_transform(gravity_camera: Array, header: Header) -> TransformStamped:
    """The camera in the level frame: turned so that gravity (3,) points down, about the vertical as little as can be.

    Nothing but gravity is told by it: where the camera is, and where it points, stay unknown.
    """
    transform = TransformStamped(child_frame_id=header.frame_id)
    transform.header = Header(stamp=header.stamp, frame_id=LEVEL_FRAME)
    transform.transform.rotation = messages.quaternion(_turn(-gravity_camera, np.array([0.0, 0.0, 1.0])))
    return transform


def _turn(a: Array, b: Array) -> Array:
    """The smallest rotation (3, 3) that takes direction a (3,) to direction b (3,)."""
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    axis = np.cross(a, b)
    sine, cosine = float(np.linalg.norm(axis)), float(a @ b)
    if sine < 1e-9:
        if cosine > 0:
            return np.eye(3)
        axis = np.cross(a, np.eye(3)[np.abs(a).argmin()])  # opposite: any axis across will do
        sine = float(np.linalg.norm(axis))
    turned: Array = exp(axis / sine * np.arctan2(np.linalg.norm(np.cross(a, b)), cosine))
    return turned


def make_room_for_images() -> None:
    """Have Fast DDS use config/fastdds.xml, which says why, unless the user has profiles of their own.

    It is the sender who needs the room: call this before rclpy.init() in the process that publishes images.
    """
    path = packaged("config/fastdds.xml")
    if path is None:
        return
    names = ["FASTDDS_DEFAULT_PROFILES_FILE"]
    if os.environ.get("ROS_DISTRO") in ("humble", "iron", "jazzy"):
        names.append("FASTRTPS_DEFAULT_PROFILES_FILE")
    for name in names:
        os.environ.setdefault(name, str(path))


class Player:
    """Publishes frames.

    Args:
        node: to publish with.
        gravity: whether to tell gravity on /tf where the sequence knows it.
    """

    def __init__(self, node: Node, *, gravity: bool = True) -> None:
        self._node = node
        self._gravity = gravity
        # Reliable senders serve reliable and best-effort receivers.
        qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        self.image = node.create_publisher(Image, "image", qos)
        self.camera_info = node.create_publisher(CameraInfo, "camera_info", qos)
        self.mask = node.create_publisher(Image, "mask", qos)
        self.tf = node.create_publisher(TFMessage, "/tf", QoSProfile(depth=100))
        self._others: dict[str, Publisher[Any]] = {"/tf": self.tf}

    @property
    def inputs(self) -> tuple[Publisher[Any], Publisher[Any], Publisher[Any]]:
        """What the node must have subscribed to."""
        return self.image, self.camera_info, self.mask

    def stamp(self, moment: Moment) -> int:
        """Nanoseconds: the frame's own, or now."""
        return moment.stamp if moment.stamp is not None else self._node.get_clock().now().nanoseconds

    def send_gravity(self, moment: Moment, stamp: int) -> None:
        """Publish what gravity can be told from at this frame: TF, and what a bag holds."""
        later = 0 if moment.stamp is None else stamp - moment.stamp
        for message in moment.before:
            self._pass_on(message, later)
        if self._gravity and moment.gravity_camera is not None:
            self.tf.publish(TFMessage(transforms=[level_transform(moment.gravity_camera, header(moment, stamp))]))

    def send(self, moment: Moment, stamp: int) -> float:
        """Publish a frame; returns when its image went out (time.monotonic)."""
        head = header(moment, stamp)
        image, mask = messages.image(head, moment.image), messages.mask(head, moment.mask)
        self.camera_info.publish(camera_info_message(moment.camera, head))
        sent = time.monotonic()
        self.image.publish(image)
        self.mask.publish(mask)
        return sent

    def _pass_on(self, message: PassedOn, later: int) -> None:
        """Publish what a bag holds, its stamps so many nanoseconds later."""
        if later:
            for stamped in getattr(message.data, "transforms", [message.data]):
                stamped.header.stamp = _time(distro.nanoseconds(stamped.header.stamp) + later)
        if message.topic not in self._others:
            package, kind, name = message.type_name.split("/")
            latched = message.topic == "/tf_static"
            durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
            qos = QoSProfile(depth=100, durability=durability)
            type_ = getattr(import_module(f"{package}.{kind}"), name)
            self._others[message.topic] = self._node.create_publisher(type_, message.topic, qos)
        self._others[message.topic].publish(message.data)


@dataclass(frozen=True)
class ReferenceFrame:
    """The object frame chosen at registration: R_camera_object (3, 3) and t_camera_object (3,) in the reference view.

    Any frame would do. This one has z up and x towards the camera, which is how axes over an image read best.
    """

    R_camera_object: Array
    t_camera_object: Array

    @classmethod
    def of(cls, moment: Moment, distance: float, gravity_camera: Array | None) -> ReferenceFrame:
        """For a reference view, the distance of the object's centre, and gravity (3,), camera axes, if it is known."""
        camera = moment.camera
        ray = virtual_camera(outline(moment.mask), camera.K, 64).R_virtual_camera[2]
        if gravity_camera is None:
            up = look_at(np.array([np.cos(_USUAL_ELEVATION), 0.0, np.sin(_USUAL_ELEVATION)]))[:, 2]
        else:
            up = -gravity_camera / np.linalg.norm(gravity_camera)
        x = -ray - (-ray @ up) * up
        if np.linalg.norm(x) < 0.02:  # seen from right above
            x = np.array([0.0, 1.0, 0.0]) - up[1] * up
        x = x / np.linalg.norm(x)
        return cls(np.stack([x, np.cross(up, x), up], axis=1), distance * ray)


def registration_request(
    moment: Moment, stamp: int, object_id: str, *, distance: float | None, gravity_known: bool
) -> RegisterObject.Request:
    """What registers an object from a frame.

    Args:
        moment: the frame.
        stamp: nanoseconds; at that time the node looks up gravity.
        object_id: its name.
        distance: metres from the camera to the object's centre, or None.
        gravity_known: whether the object frame's z axis can be put upright.
    """
    head = header(moment, stamp)
    request = RegisterObject.Request(object_id=object_id, overwrite=True)
    request.image = messages.image(head, moment.image)
    request.mask = messages.mask(head, moment.mask)
    request.camera_info = camera_info_message(moment.camera, head)
    if distance is not None:
        chosen = ReferenceFrame.of(moment, distance, moment.gravity_camera if gravity_known else None)
        request.reference_distance = distance
        request.use_reference_pose = True
        request.reference_pose = messages.pose(chosen.R_camera_object, chosen.t_camera_object)
    return request


def add_topic_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which topics of a bag are meant."""
    group = parser.add_argument_group("bags")
    group.add_argument("--image-topic", default="", help="found by type and name if it is left out")
    group.add_argument("--mask-topic", default="", help="likewise")
    group.add_argument("--camera-info-topic", default="", help="likewise")
    group.add_argument("--instance", type=int, default=0, help="the object's id in the mask; 0: anything above 0")


def topics_of(arguments: argparse.Namespace) -> Topics:
    """The topics named on the command line."""
    return Topics(arguments.image_topic, arguments.mask_topic, arguments.camera_info_topic)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros play", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder or bag")
    parser.add_argument("--rate", type=float, default=10.0, help="frames a second (%(default)s)")
    parser.add_argument("--loop", action="store_true", help="begin again at the end")
    parser.add_argument("--no-gravity", action="store_true", help="keep gravity back")
    parser.add_argument("--register", metavar="ID", default="", help="first register the object from the first frame")
    parser.add_argument("--node", default="/nope", help="name of the node that registers it (%(default)s)")
    add_topic_arguments(parser)
    given, ros_arguments = parser.parse_known_args(arguments)
    if ros_arguments and ros_arguments[0] != "--ros-args":
        parser.error(f"unknown: {' '.join(ros_arguments)}")
    if given.rate <= 0:
        parser.error(f"--rate {given.rate} is not positive")
    try:
        recording = open_recording(given.data, topics=topics_of(given), instance=given.instance)
        make_room_for_images()
        # Our own handlers: rclpy's would take the context away in the middle of a frame.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        rclpy.init(args=ros_arguments, signal_handler_options=SignalHandlerOptions.NO)
        try:
            return _play(recording, given)
        finally:
            rclpy.try_shutdown()
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _play(recording: Any, given: argparse.Namespace) -> int:
    node = rclpy.create_node("player")
    player = Player(node, gravity=not given.no_gravity)
    first = True
    while first or given.loop:
        due = time.monotonic()
        for moment in recording:
            # A loop needs stamps that go on; so a bag's own are only kept the first time.
            stamp = player.stamp(moment) if first else node.get_clock().now().nanoseconds
            player.send_gravity(moment, stamp)
            if given.register and not _register(node, player, moment, stamp, given):
                return 1
            given.register = ""
            player.send(moment, stamp)
            due += 1 / given.rate
            time.sleep(max(0.0, due - time.monotonic()))
        first = False
    return 0


def _register(node: Node, player: Player, moment: Moment, stamp: int, given: argparse.Namespace) -> bool:
    """Ask the node to register the object, as often as it takes while the node starts."""
    name = f"{given.node}/register_object"
    client = node.create_client(RegisterObject, name)
    node.get_logger().info(f"waiting for {name}")
    while not client.wait_for_service(1.0):
        pass
    distance = None if moment.truth is None else float(np.linalg.norm(moment.truth.t_camera_object))
    known = not given.no_gravity and moment.gravity_camera is not None
    request = registration_request(moment, stamp, given.register, distance=distance, gravity_known=known)
    patience = 10  # what is sent while two nodes get to know each other may be lost, the transform too
    while True:
        player.send_gravity(moment, stamp)
        future = client.call_async(request)
        rclpy.spin_until_future_complete(node, future)
        response = future.result()
        patience -= response.message.startswith("gravity:")
        if response.success or patience == 0 or not response.message.startswith(("gravity:", "the node is not active")):
            break
        time.sleep(0.5)
    (node.get_logger().info if response.success else node.get_logger().error)(response.message)
    return bool(response.success)


if __name__ == "__main__":
    sys.exit(main())
