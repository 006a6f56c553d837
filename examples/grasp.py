"""A grasp planner's side: wait for a pose that can be trusted, in the robot's own frame; register the object first.

    python examples/grasp.py mug --frame base_link --patience 20 --distance 0.62

A pose is taken when the node trusts it, when it is metric, when it is the only answer, and when three in a row agree
within 10 degrees. It is metric if the object was registered with depth, or with its distance or diameter.
What is told is the object in `--frame` at the time of the image, as tf2 has it.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import rclpy
import tf2_ros
from geometry_msgs.msg import Quaternion, TransformStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time

from nope_ros.msg import ObjectPose, ObjectPoseArray
from nope_ros.srv import ListObjects, RegisterObject

AGREE = np.cos(np.radians(10) / 2)


def same(a: Quaternion, b: Quaternion) -> bool:
    """Whether two orientations are within 10 degrees."""
    return abs(a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w) > AGREE


class Waiter(Node):
    """Collects poses of one object until three in a row agree."""

    def __init__(self, object_id: str, node: str) -> None:
        super().__init__("grasp_example")
        self.object_id, self.name = object_id, node
        self.agreeing: list[tuple[Time, Quaternion]] = []
        self.metric = True
        self.buffer = tf2_ros.Buffer()
        self.listener = tf2_ros.TransformListener(self.buffer, self)
        self.create_subscription(ObjectPoseArray, f"{node}/poses", self.receive, 10)

    def receive(self, message: ObjectPoseArray) -> None:
        """Take in the poses of one image."""
        for pose in message.poses:
            if pose.object_id != self.object_id:
                continue
            q = pose.pose.pose.orientation
            self.metric = pose.metric
            sure = pose.trusted and pose.metric and pose.ambiguity == ObjectPose.AMBIGUITY_UNIQUE
            if not sure or (self.agreeing and not same(q, self.agreeing[-1][1])):
                self.agreeing.clear()
            if sure:
                self.agreeing.append((Time.from_msg(message.header.stamp), q))

    def call(self, kind: type, name: str, request: object) -> object:
        """Call a service of the node and wait for its answer."""
        client = self.create_client(kind, f"{self.name}/{name}")
        if not client.wait_for_service(10.0):
            sys.exit(f"there is no {self.name}/{name}; is the node running? `nope-ros doctor` tells")
        future = client.call_async(request)
        rclpy.spin_until_future_complete(self, future)
        return future.result()

    def register(self, distance: float, diameter: float) -> None:
        """Learn the object from the newest frame, unless the node knows it; metres, 0 where not known."""
        known = self.call(ListObjects, "list_objects", ListObjects.Request())
        if self.object_id in known.object_ids:
            return
        request = RegisterObject.Request(
            object_id=self.object_id, reference_distance=distance, object_diameter=diameter
        )
        answer = self.call(RegisterObject, "register_object", request)
        if not answer.success:
            sys.exit(answer.message)
        self.get_logger().info(answer.message)

    def wait(self, frame: str, prefix: str, patience: float) -> TransformStamped | None:
        """The object in a frame, or None if no pose could be trusted in time."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            rclpy.spin_once(self, timeout_sec=0.1)
            if len(self.agreeing) < 3:
                continue
            stamp = self.agreeing[-1][0]
            try:
                return self.buffer.lookup_transform(frame, prefix + self.object_id, stamp, Duration(seconds=0))
            except tf2_ros.TransformException:
                continue  # TF of that moment is still on its way
        return None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("object_id")
    parser.add_argument("--frame", default="base_link", help="in which the pose is wanted (%(default)s)")
    parser.add_argument("--node", default="/nope")
    parser.add_argument("--prefix", default="", help="the node's tf.prefix")
    parser.add_argument("--distance", type=float, default=0.0, help="metres to the object, where it is registered now")
    parser.add_argument("--diameter", type=float, default=0.0, help="of the object, metres; instead of the distance")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds (%(default)s)")
    given = parser.parse_args()
    rclpy.init()
    waiter = Waiter(given.object_id, given.node)
    waiter.register(given.distance, given.diameter)
    found = waiter.wait(given.frame, given.prefix, given.patience)
    if found is None and not waiter.metric:
        print(f"poses of '{given.object_id}' are not metric; unregister it, and give --distance, --diameter or depth")
        return 1
    if found is None:
        print(f"no pose of '{given.object_id}' that can be trusted within {given.patience:g} s; look from another side")
        return 1
    t, q = found.transform.translation, found.transform.rotation
    print(f"{given.object_id} in {given.frame}, metres and quaternion (xyzw):")
    print(f"{t.x:.3f} {t.y:.3f} {t.z:.3f}  {q.x:.3f} {q.y:.3f} {q.z:.3f} {q.w:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
