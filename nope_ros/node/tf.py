"""TF for a node that runs: tf2_ros where it is installed, else a listener and a broadcaster of our own."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from nope_ros.node.distro import HISTORY, Array, TransformError, Transforms, TransformTree, rotation_matrix
from nope_ros.node.parameters import LONGEST_PATIENCE

try:
    import tf2_ros
except ImportError:
    tf2_ros = None


class Broadcaster(Protocol):
    """Sends transforms to /tf."""

    def sendTransform(self, transform: list[TransformStamped]) -> None:
        """Send them in one message."""
        ...


def listen(node: Node, history: int = HISTORY) -> Transforms:
    """Start to collect what is on /tf and /tf_static. The node must be spun by another thread than asks.

    Args:
        node: that listens.
        history: nanoseconds of transforms that are kept; tf2's own buffer, which can't be lengthened later, keeps the
            longest that can be wanted.
    """
    longest = HISTORY + int(LONGEST_PATIENCE * 1e9)
    return TransformListener(node, history) if tf2_ros is None else _Tf2Listener(node, longest)


def broadcaster(node: Node) -> Broadcaster:
    """A publisher to /tf."""
    sender: Broadcaster = _Broadcaster(node) if tf2_ros is None else tf2_ros.TransformBroadcaster(node)
    return sender


class _Tf2Listener:
    def __init__(self, node: Node, history: int) -> None:
        self._buffer = tf2_ros.Buffer(cache_time=Duration(nanoseconds=history), node=node)
        self._listener = tf2_ros.TransformListener(self._buffer, node)

    def rotation(self, target: str, source: str, stamp: int, timeout: float) -> Array:
        return self.pose(target, source, stamp, timeout)[0]

    def pose(self, target: str, source: str, stamp: int, timeout: float) -> tuple[Array, Array]:
        time, wait = Time(nanoseconds=stamp), Duration(nanoseconds=int(timeout * 1e9))
        try:
            transform = self._buffer.lookup_transform(target, source, time, wait)
        except tf2_ros.TransformException as error:
            raise TransformError(f"TF from '{source}' to '{target}': {error}") from None
        q, t = transform.transform.rotation, transform.transform.translation
        return rotation_matrix(np.array([q.x, q.y, q.z, q.w])), np.array([t.x, t.y, t.z])


class _Broadcaster:
    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(TFMessage, "/tf", 100)

    def sendTransform(self, transform: list[TransformStamped]) -> None:
        self._publisher.publish(TFMessage(transforms=transform))


class TransformListener(TransformTree):
    """A ``TransformTree`` fed by /tf and /tf_static."""

    def __init__(self, node: Node, history: int) -> None:
        super().__init__(history)
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        group = MutuallyExclusiveCallbackGroup()
        for topic, qos, static in (("/tf", QoSProfile(depth=100), False), ("/tf_static", latched, True)):
            receive = partial(self.take, static=static)
            node.create_subscription(TFMessage, topic, receive, qos, callback_group=group)
