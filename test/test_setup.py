"""The environment that `make setup` leaves: generated interfaces, DDS on this machine, versions that agree."""

import os
import re
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Skip only where ROS is absent: a distribution or `make setup` that is there but broken must fail.
if not find_spec("rclpy"):
    pytest.skip("needs ROS 2: run `make setup`, then source install/setup.bash", allow_module_level=True)

import rclpy
from rclpy.executors import SingleThreadedExecutor

import nope_ros.msg as messages

PUBLISHER = """
import sys, time
import rclpy
from geometry_msgs.msg import Quaternion
from nope_ros.msg import ObjectPose, ObjectPoseArray, PoseMode

rclpy.init()
node = rclpy.create_node("sender")
publisher = node.create_publisher(ObjectPoseArray, "poses", 1)
pose = ObjectPose(object_id="mug", instance=7, prior="upright", modes=[PoseMode(score=0.25)])
pose.ambiguity = ObjectPose.AMBIGUITY_AXIAL
pose.relative_rotation = Quaternion(x=0.0, y=0.6, z=0.0, w=0.8)
pose.pose.covariance[35] = 0.125
while True:
    publisher.publish(ObjectPoseArray(poses=[pose]))
    time.sleep(0.05)
"""


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    context = rclpy.Context()
    context.init()
    node = rclpy.create_node("receiver", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield node
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()


def spin_until(node, done, timeout=20.0):
    end = time.monotonic() + timeout
    while not done():
        node.executor.spin_once(timeout_sec=0.1)
        assert time.monotonic() < end, f"nothing came within {timeout} s"


def test_message_crosses_processes(node, tmp_path):
    received = []
    node.create_subscription(messages.ObjectPoseArray, "poses", received.append, 1)
    sender = subprocess.Popen([sys.executable, "-c", PUBLISHER], cwd=tmp_path)
    try:
        spin_until(node, lambda: received or sender.poll() is not None)
    finally:
        sender.terminate()
        sender.wait()
    assert received, "the sender ended before anything came"
    (pose,) = received[0].poses
    assert (pose.object_id, pose.instance, pose.prior) == ("mug", 7, "upright")
    assert pose.ambiguity == messages.ObjectPose.AMBIGUITY_AXIAL
    assert pose.relative_rotation.y == 0.6
    assert pose.pose.covariance[35] == 0.125
    assert [mode.score for mode in pose.modes] == [0.25]


def test_service_answers(node):
    from nope_ros.srv import ListObjects

    def answer(_, response):
        response.object_ids, response.metric, response.template_counts = ["mug"], [True], [341]
        return response

    node.create_service(ListObjects, "list_objects", answer)
    client = node.create_client(ListObjects, "list_objects")
    spin_until(node, client.service_is_ready)
    future = client.call_async(ListObjects.Request())
    spin_until(node, future.done)
    assert list(future.result().object_ids) == ["mug"]
    assert list(future.result().template_counts) == [341]


@pytest.mark.parametrize(
    ("package", "name", "type_hash"),
    [
        # Computed from the definitions of ros2/geometry2 and ros-perception/vision_msgs.
        ("tf2_msgs", "TFMessage", "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087"),
        ("vision_msgs", "Detection2DArray", "RIHS01_214274120007f4a683866481336b70310268cfa107aebe9d594a6acf75bda968"),
        ("vision_msgs", "Detection3DArray", "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"),
    ],
)
def test_interfaces_have_the_type_hashes_of_upstream(node, package, name, type_hash):
    message = getattr(__import__(f"{package}.msg").msg, name)
    node.create_publisher(message, "same_type", 1)
    found = []
    spin_until(node, lambda: found or found.extend(node.get_publishers_info_by_topic("/same_type")))
    assert found[0].topic_type == f"{package}/msg/{name}"
    assert str(found[0].topic_type_hash) == type_hash


def test_message_constants():
    pose = messages.ObjectPose
    assert [
        pose.AMBIGUITY_UNIQUE,
        pose.AMBIGUITY_FINITE,
        pose.AMBIGUITY_AXIAL,
        pose.AMBIGUITY_UNINFORMATIVE,
    ] == [0, 1, 2, 3]


def test_messages_need_no_networks(tmp_path):
    # Whoever only reads our topics (ros2 topic echo, another node) has no torch.
    code = (
        "import sys, nope_ros.msg, nope_ros.srv; sys.exit(' '.join({'torch', 'diffusers', 'cv2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stderr.strip() == "", "importing nope_ros.msg loads these"


def test_every_interface_file_is_built():
    listed = set(re.findall(r'"((?:msg|srv)/\w+\.(?:msg|srv))"', (ROOT / "CMakeLists.txt").read_text()))
    assert listed == {f"{path.parent.name}/{path.name}" for kind in ("msg", "srv") for path in (ROOT / kind).iterdir()}


def test_versions_agree():
    (package,) = re.findall(r"<version>(.*)</version>", (ROOT / "package.xml").read_text())
    (library,) = re.findall(r'version="(.*?)"', (ROOT / "setup.py").read_text())
    assert package == library


def test_requirements_are_exact_and_locked():
    name = re.compile(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)$")

    def pins(path):
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        matches = {line: name.match(line) for line in lines if line}
        assert all(matches.values()), (
            f"{path.name}: not exact: {[line for line, match in matches.items() if not match]}"
        )
        return {re.sub(r"[-_.]+", "-", match[1].lower()): match[2] for match in matches.values()}

    lock = pins(ROOT / "requirements-lock.txt")
    for path in ROOT.glob("requirements*.txt"):
        for package, version in pins(path).items():
            assert lock.get(package) == version, f"{path.name}: {package}=={version} is not what is locked"


def test_setuptools_suits_colcon():
    assert int(metadata.version("setuptools").split(".")[0]) < 80


def test_every_python_folder_is_a_package():
    # pip installs only folders with an __init__.py; colcon installs them all.
    folders = {path.parent for path in (ROOT / "nope_ros").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_launch_files_find_the_node():
    prefixes = [Path(prefix) for prefix in os.environ["AMENT_PREFIX_PATH"].split(":")]
    nodes = [path for prefix in prefixes if (path := prefix / "lib" / "nope_ros" / "nope_node").exists()]
    node = nodes[0]  # whatever was sourced before, the first prefix wins
    assert os.access(node, os.X_OK)
    assert Path(node.read_text().splitlines()[0].removeprefix("#!")).samefile(sys.executable)
