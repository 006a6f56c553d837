r"""For a robot whose detector has only boxes: `mask_from_boxes`, and the node behind it.

    ros2 launch nope_ros boxes.launch.py image:=/camera/color/image_raw camera_info:=/camera/color/camera_info \\
        detections:=/detector/boxes

A click, sent as geometry_msgs/PointStamped (pixels) to `click`, gives one mask, to register an object by.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchDescription

SHARE = Path(get_package_share_directory("nope_ros"))
TOPICS = {
    "image": "colour image",
    "camera_info": "calibration of the image",
    "detections": "vision_msgs/Detection2DArray with the stamp of its image",
    "click": "geometry_msgs/PointStamped, x and y in pixels",
    "mask": "made here, for the node",
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, the helper, and the node."""
    arguments = [
        DeclareLaunchArgument("namespace", default_value="", description="of the nodes and their relative topics"),
        *(DeclareLaunchArgument(name, default_value=name, description=text) for name, text in TOPICS.items()),
    ]
    helper = Node(
        package="nope_ros",
        executable="mask_from_boxes",
        name="mask_from_boxes",
        namespace=LaunchConfiguration("namespace"),
        remappings=[(name, LaunchConfiguration(name)) for name in ("image", "detections", "click", "mask")],
        output="screen",
    )
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "nope.launch.py")),
        launch_arguments={
            name: LaunchConfiguration(name) for name in ("namespace", "image", "camera_info", "mask")
        }.items(),
    )
    return LaunchDescription([*arguments, helper, node])
