r"""The node on a robot's topics.

    ros2 launch nope_ros nope.launch.py image:=/camera/color/image_raw camera_info:=/camera/color/camera_info \
        mask:=/segmentation/mask params_file:=my.yaml rviz:=true

Raw images of 640 x 480 px and more are larger than Fast DDS's shared memory by default; see config/fastdds.xml.

`--show-args` lists all arguments. An argument wins over the file, and the file over the node's defaults.
"""

from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

SHARE = Path(get_package_share_directory("nope_ros"))

TOPICS = {
    "image": "colour image; with compressed:=true the one that <image>/compressed belongs to",
    "camera_info": "calibration of the image",
    "mask": "mask of the objects, with the stamp of its image",
    "depth": "depth aligned with the image; optional",
}
# Arguments that are parameters of the node. Empty: left to params_file.
PARAMETERS = {
    "autostart": "configure and activate the node (true), or leave it to a lifecycle manager (false)",
    "compressed": "subscribe to <image>/compressed",
    "device": "auto, cpu, cuda, cuda:1, ...",
    "weights": "folder of the weights",
    "use_sim_time": "time from /clock",
}


def generate_launch_description() -> LaunchDescription:
    """Arguments, the node, and RViz where it is asked for."""
    arguments = [
        DeclareLaunchArgument("namespace", default_value="", description="of the node and its relative topics"),
        *(DeclareLaunchArgument(name, default_value=name, description=text) for name, text in TOPICS.items()),
        *(DeclareLaunchArgument(name, default_value="", description=text) for name, text in PARAMETERS.items()),
        DeclareLaunchArgument(
            "params_file", default_value=str(SHARE / "config" / "nope.yaml"), description="parameters of the node"
        ),
        DeclareLaunchArgument("log_level", default_value="info", description="of the node"),
        DeclareLaunchArgument("rviz", default_value="false", description="show poses, markers and overlay in RViz"),
        DeclareLaunchArgument("rviz_frame", default_value="camera_optical_frame", description="RViz's fixed frame"),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=nodes)])


def nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The processes, once the arguments are known."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ("namespace", *TOPICS, *PARAMETERS)}
    remappings = [(name, given[name]) for name in TOPICS]
    remappings.append(("image/compressed", f"{given['image']}/compressed"))
    parameters = {name: _value(given[name]) for name in PARAMETERS if given[name]}
    base = "/".join(["", *filter(None, given["namespace"].split("/")), "nope"])
    node = Node(
        package="nope_ros",
        executable="nope_node",
        name="nope",
        namespace=given["namespace"],
        parameters=[LaunchConfiguration("params_file"), parameters],
        remappings=remappings,
        arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
        output="screen",
        emulate_tty=True,
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        name="rviz_nope",
        arguments=["-d", str(SHARE / "config" / "nope.rviz"), "-f", LaunchConfiguration("rviz_frame")],
        parameters=[{name: value for name, value in parameters.items() if name == "use_sim_time"}],
        # The displays name the topics of a node without a namespace.
        remappings=[(f"/nope/{topic}", f"{base}/{topic}") for topic in ("markers", "overlay", "objects/object/pose")],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    return [node, rviz]


def _value(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
