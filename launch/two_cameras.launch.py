r"""A node for each of two cameras, each in the camera's namespace, with names in TF that do not collide.

    ros2 launch nope_ros two_cameras.launch.py left:=/left_camera right:=/right_camera params_file:=my.yaml

Under each namespace `image_raw`, `camera_info` and `mask` are expected; poses come out on /left_camera/nope/poses, and
so on. The parameter file has a section for each, `/left_camera/nope:` and `/right_camera/nope:`, with a `tf.prefix` and
a `storage.directory` of its own, as both nodes would write to one folder otherwise. A namespace without a section is
refused.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("nope_ros"))
CAMERAS = {"left": "/left_camera", "right": "/right_camera"}


def generate_launch_description() -> LaunchDescription:
    """Arguments, and a node for each camera."""
    arguments = [
        *(DeclareLaunchArgument(name, default_value=space, description="namespace") for name, space in CAMERAS.items()),
        DeclareLaunchArgument(
            "params_file",
            default_value=str(SHARE / "config" / "two_cameras.yaml"),
            description="parameters of both nodes, in sections",
        ),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=nodes)])


def nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """One launch of the node for each camera."""
    file = LaunchConfiguration("params_file").perform(context)
    sections = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    for name in CAMERAS:
        section = f"/{LaunchConfiguration(name).perform(context).strip('/')}/nope"
        if section not in sections:
            raise RuntimeError(
                f"{file} has no section '{section}:'; copy it, give that node a tf.prefix and a storage.directory of "
                "its own there, and launch with params_file:=<the copy>"
            )
    source = PythonLaunchDescriptionSource(str(SHARE / "launch" / "nope.launch.py"))
    found: list[LaunchDescriptionEntity] = []
    for name in CAMERAS:
        given = {
            "namespace": LaunchConfiguration(name).perform(context),
            "image": "image_raw",
            "params_file": file,
        }
        found.append(IncludeLaunchDescription(source, launch_arguments=given.items()))
    return found
