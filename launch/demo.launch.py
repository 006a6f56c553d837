"""The bundled sequence, played into the node in a loop, with RViz where it is asked for.

    ros2 launch nope_ros demo.launch.py rviz:=true

For files with pictures and figures in them, see `nope-ros demo`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import yaml
from ament_index_python.packages import get_package_share_directory
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    SetEnvironmentVariable,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("nope_ros"))


def generate_launch_description() -> LaunchDescription:
    """Arguments, the node, and the player."""
    arguments = [
        DeclareLaunchArgument(
            "data",
            default_value=str(SHARE / "demo" / "sequence"),
            description="folder or bag (see nope_ros.recording)",
        ),
        DeclareLaunchArgument("rate", default_value="5", description="frames a second"),
        DeclareLaunchArgument("loop", default_value="true", description="begin again at the end"),
        DeclareLaunchArgument("gravity", default_value="true", description="tell the node of gravity, on TF"),
        DeclareLaunchArgument(
            "weights", default_value="", description="folder of the weights; empty: the packaged ones"
        ),
        DeclareLaunchArgument("device", default_value="auto", description="auto, cpu, cuda, cuda:1, ..."),
        DeclareLaunchArgument("rviz", default_value="false", description="show it in RViz"),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=processes)])


def processes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The node, and a player that registers the object in the first frame."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ("data", "rate", "loop", "gravity")}
    gravity = given["gravity"].lower() == "true"
    # A folder of its own, so that the demo's object does not stay among the user's.
    folder = Path(tempfile.mkdtemp(prefix="nope_demo_"))
    values = {"storage.directory": str(folder / "objects"), "gravity.frame": "level" if gravity else ""}
    parameters = folder / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}), encoding="utf-8")
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / "launch" / "nope.launch.py")),
        launch_arguments={
            "params_file": str(parameters),
            **{name: LaunchConfiguration(name) for name in ("weights", "device", "rviz")},
        }.items(),
    )
    # The module: a workspace that is only sourced has no `nope-ros` on its path. -P: not that of a checkout one is in.
    words = [sys.executable, "-P", "-m", "nope_ros.cli", "play", given["data"], "--rate", given["rate"]]
    words += ["--register", "object"]
    words += ["--loop"] if given["loop"].lower() == "true" else []
    words += [] if gravity else ["--no-gravity"]
    player = ExecuteProcess(cmd=words, name="player", output="screen")
    end = RegisterEventHandler(OnProcessExit(target_action=player, on_exit=[Shutdown(reason="the sequence has ended")]))
    return [*_room_for_images(), node, player, end]


def _room_for_images() -> list[LaunchDescriptionEntity]:
    """Fast DDS as config/fastdds.xml says, which says why, unless the user has profiles of their own."""
    names = ["FASTDDS_DEFAULT_PROFILES_FILE"]
    if os.environ.get("ROS_DISTRO") == "jazzy":
        names.append("FASTRTPS_DEFAULT_PROFILES_FILE")
    path = str(SHARE / "config" / "fastdds.xml")
    return [SetEnvironmentVariable(name, path) for name in names if name not in os.environ]
