r"""The node behind a segmentation network that runs already, YOLO or SAM, say.

    ros2 launch nope_ros segmentation.launch.py image:=/camera/color/image_raw camera_info:=/camera/color/camera_info \\
        segments:=/yolo/detections classes:=cup,bottle
    ros2 launch nope_ros segmentation.launch.py image:=... camera_info:=... mask:=/sam/mask

The first is for networks that publish a list (yolo_ros; ultralytics_ros with type:=ultralytics_ros/msg/YoloResult):
beside the node, `mask_from_segments` turns it into one image. The second is for those that publish an image, mono8 or
with ids. Either way the network copies the header of the image that it worked on. Arguments of nope.launch.py can be
given too.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("nope_ros"))
TOPICS = {
    "image": "colour image, the one that the network works on",
    "camera_info": "calibration of the image",
    "mask": "the network's mask, or, of segments, made here",
}
SEGMENTS = {
    "segments": ("", "the network's list of instances; empty: it publishes mask itself"),
    "type": ("yolo_msgs/msg/DetectionArray", "of segments"),
    "classes": ("", "names of the classes to keep, with commas between; empty: all"),
    "namespace": ("", "of the nodes and their relative topics"),
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, the helper where it is needed, and the node."""
    return LaunchDescription(
        [
            *(DeclareLaunchArgument(name, default_value=name, description=text) for name, text in TOPICS.items()),
            *(
                DeclareLaunchArgument(name, default_value=value, description=text)
                for name, (value, text) in SEGMENTS.items()
            ),
            OpaqueFunction(function=nodes),
        ]
    )


def nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes, once the arguments are known."""
    given = {name: LaunchConfiguration(name).perform(context) for name in (*TOPICS, *SEGMENTS)}
    found: list[LaunchDescriptionEntity] = []
    if given["segments"]:
        found.append(
            Node(
                package="nope_ros",
                executable="mask_from_segments",
                name="mask_from_segments",
                namespace=given["namespace"],
                parameters=[{"type": given["type"], "classes": given["classes"]}],
                remappings=[(name, given[name]) for name in ("segments", "mask")],
                output="screen",
            )
        )
    passed = {name: given[name] for name in (*TOPICS, "namespace")}
    source = PythonLaunchDescriptionSource(str(SHARE / "launch" / "nope.launch.py"))
    return [*found, IncludeLaunchDescription(source, launch_arguments=passed.items())]
