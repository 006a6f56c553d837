"""`nope-ros bag`: the node's answers on recorded frames, bit for bit, where there is no ROS; and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import Quaternion, TransformStamped
from node_process import (
    FRAME,
    ROOT,
    K,
    NodeProcess,
    Robot,
    camera_info_message,
    image_message,
    reliable,
    ros_context,
    scene,
    stamp,
)
from rclpy.serialization import serialize_message
from rosbags.rosbag2 import StoragePlugin, Writer
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage

from nope_ros.estimator import PoseEstimator
from nope_ros.frame import InputError
from nope_ros.node import bag, topics
from nope_ros.node.bagfile import Recorded, open_bag, write_mcap
from nope_ros.node.distro import nanoseconds
from nope_ros.node.interfaces import define, deserialized, typestore
from nope_ros.node.parameters import settings_from
from nope_ros.srv import RegisterObject
from nope_ros.store import ObjectStore

pytestmark = pytest.mark.timeout(120)

START = 1_700_000_000_000_000_000
PERIOD = 100_000_000
COUNT = 8
# Untrained weights are sure of nothing: every pose is to be seen.
SEEN = {"confidence_threshold": 0.0, "similarity_threshold": -1.0, "threads": 1, "device": "cpu"}

Message = tuple[str, Any]


HIDDEN = """
from importlib.machinery import PathFinder
ROS = {names!r}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *a, **b: None if name.partition(".")[0] in ROS else find(name, *a, **b)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has all libraries, but no package of ROS."""
    folder = tmp_path_factory.mktemp("bare")
    names = set()
    for distribution in metadata.distributions():
        if distribution.metadata["Name"].lower().startswith("ros-"):
            names |= {Path(file).parts[0] for file in distribution.files or ()}
    (folder / "sitecustomize.py").write_text(HIDDEN.format(names=names | {"rclpy", "tf2_msgs", "vision_msgs"}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AMENT", "ROS", "COLCON"))}
    # The library as pip installs it, not the one that colcon built with its messages.
    (folder / "nope_ros").symlink_to(ROOT / "nope_ros")
    return kept | {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": ""}


def without_ros(bare: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *words]
    return subprocess.run(command, env=bare, capture_output=True, text=True, timeout=100, check=False)


def frame(index: int) -> tuple[np.ndarray, np.ndarray]:
    """The box turns, moves, is gone in one frame, and beside something else in another."""
    image, mask = scene(12.0 * index, (150 + 3 * index, 110 + 2 * index))
    ids = (mask > 0).astype(np.uint16) * 700
    if index == 3:
        return image, 0 * ids
    if index == 5:
        other, other_mask = scene(0, (60, 60), seed=4)
        image = np.where(other_mask[..., None] > 0, other, image)
        ids[other_mask > 0] = 9
    return image, ids


def recorded_frames(count: int = COUNT, start: int = START) -> list[tuple[int, Message]]:
    """Messages and when they were recorded; masks come two frames late."""
    found: list[tuple[int, Message]] = []
    for index in range(count):
        when = start + index * PERIOD
        image, ids = frame(index)
        found.append((when + 1, ("/camera/color/image", image_message(image, "rgb8", when))))
        found.append((when + 2, ("/camera/color/camera_info", camera_info_message(when))))
        found.append((when + 2 * PERIOD + 3, ("/detector/mask", image_message(ids, "16UC1", when))))
    return sorted(found, key=lambda one: one[0])


def type_name(message: Any) -> str:
    package, kind, *_ = type(message).__module__.split(".")
    return f"{package}/{kind}/{type(message).__name__}"


def write(path: Path, messages: list[tuple[int, Message]]) -> Path:
    everything = [
        Recorded(topic, type_name(message), when, serialize_message(message)) for when, (topic, message) in messages
    ]
    write_mcap(path, everything)
    return path


def contents(path: Path) -> dict[tuple[str, int], list[bytes]]:
    """Of a bag made by us: serialized messages by topic and stamp."""
    found: dict[tuple[str, int], list[bytes]] = {}
    with open_bag(path) as reader:
        for connection, _, data in reader.messages():
            message = deserialized(bytes(data), connection.msgtype)
            found.setdefault((connection.topic, stamp_of(message)), []).append(bytes(data))
    return found


def stamp_of(message: Any) -> int:
    if hasattr(message, "transforms"):
        message = message.transforms[0]
    if hasattr(message, "markers"):
        message = message.markers[0] if message.markers else None
    return 0 if message is None else nanoseconds(message.header.stamp)


def settings(weights: Path, **more: Any) -> Any:
    return settings_from({**SEEN, "weights": str(weights), **more})


def job(source: Path, target: Path, weights: Path, **more: Any) -> bag.Job:
    reference = bag.Reference("mug", instance=700, distance=0.6)
    return bag.Job(source, target, settings(weights, **more), reference=reference)


# --- as the node ----------------------------------------------------------------------------------------------------


def canonical(data: bytes, type_name: str) -> bytes:
    """The same message with nothing between its fields: ROS's serializer leaves there what was in memory."""
    define(type_name)
    return bytes(typestore().serialize_cdr(typestore().deserialize_cdr(data, type_name), type_name))


DEFAULTS = """
import sys
from nope_ros.node import topics
from nope_ros.node.interfaces import message_class, ros_is_here, serialized
from nope_ros.srv import RegisterObject
assert not ros_is_here()
for endpoint in topics.ENDPOINTS:
    if endpoint.direction != "service":
        print(endpoint.type_name, serialized(endpoint.type(), endpoint.type_name).hex())
name = "nope_ros/srv/RegisterObject_Request"
print(name, serialized(RegisterObject.Request(), name).hex())
from nope_ros.cli import main
assert main(["reference", "topics"]) == 0
"""


def test_messages_made_from_definitions_are_those_of_ros(bare: dict[str, str]) -> None:
    result = without_ros(bare, "-c", DEFAULTS)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    found = dict(line.split() for line in lines if line.count(" ") == 1 and "/" in line)
    expected = {
        endpoint.type_name: canonical(serialize_message(endpoint.type()), endpoint.type_name).hex()
        for endpoint in topics.ENDPOINTS
        if endpoint.direction != "service"
    }
    request = "nope_ros/srv/RegisterObject_Request"
    expected[request] = canonical(serialize_message(RegisterObject.Request()), request).hex()
    assert found == expected
    assert topics.table() in result.stdout, "documentation needs no ROS either"


class Listener:
    """Keeps what the node publishes as it came over the wire."""

    def __init__(self, robot: Robot, object_id: str) -> None:
        self.received: dict[tuple[str, int], list[bytes]] = {}
        wanted = [topics.POSES, topics.DETECTIONS, topics.MARKERS, topics.TF]
        names = {one.name.replace("~", "/nope"): one for one in wanted}
        names[topics.object_topic(object_id).replace("~", "/nope")] = topics.OBJECT_POSE
        self.names = tuple(names)
        for name, endpoint in names.items():

            def receive(data: bytes, name: str = name, endpoint: topics.Endpoint = endpoint) -> None:
                key = (name, stamp_of(deserialized(bytes(data), endpoint.type_name)))
                self.received.setdefault(key, []).append(canonical(bytes(data), endpoint.type_name))

            robot.node.create_subscription(endpoint.type, name, receive, topics.output_qos(), raw=True)
        for name in self.names:
            robot.until(lambda name=name: robot.node.count_publishers(name) > 0, name)  # type: ignore[misc]


def test_as_the_node_bit_for_bit(weights: Path, bare: dict[str, str], tmp_path: Path) -> None:
    """The same frames to the node over DDS, and in a bag to a Python without ROS."""
    messages = recorded_frames()
    remap = ["-r", "image:=/camera/color/image", "-r", "camera_info:=/camera/color/camera_info"]
    inputs = reliable("/camera/color/image", "/camera/color/camera_info", "/detector/mask")
    image, ids = frame(0)
    with ros_context():
        node = NodeProcess(
            *(tmp_path / "log", weights, tmp_path / "objects", "--ros-args", *remap, "-r", "mask:=/detector/mask"),
            **{"confidence_threshold": 0.0, "similarity_threshold": -1.0, "max_instances": 3, **inputs},
        )
        robot = Robot()
        try:
            node.says("Active")
            request = {"instance": 700, "reference_distance": 0.6}
            assert robot.register("mug", image, ids, **request).success
            listener = Listener(robot, "mug")
            time.sleep(0.5)
            masks = 0
            for _, (topic, message) in messages:
                robot.publish(topic, message)
                if topic == "/detector/mask":  # the frame is complete: none is to be skipped
                    when = START + masks * PERIOD
                    masks += 1
                    robot.until(lambda when=when: ("/nope/markers", when) in listener.received or when == 0, "a pose")  # type: ignore[misc]
        finally:
            node.stop()
            robot.close()
    live = {key: value for key, value in listener.received.items() if key[1] != 0}
    write(tmp_path / "drive.mcap", messages)
    words = [f"-p{name}:={value}" for name, value in {**SEEN, "max_instances": 3, "weights": weights}.items()]
    words += ["--id", "mug", "--instance", "700", "--reference-distance", "0.6"]
    result = without_ros(
        bare, "-m", "nope_ros.cli", "bag", str(tmp_path / "drive.mcap"), str(tmp_path / "out.mcap"), *words
    )
    assert result.returncode == 0, result.stdout + result.stderr
    offline = contents(tmp_path / "out.mcap")
    assert offline.keys() == live.keys()
    assert len(offline) >= 4 * COUNT, "poses of all frames but the empty one, on five topics"
    for key, data in live.items():
        assert offline[key] == data, key


# --- in the field ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bag, and what becomes of it."""
    folder = tmp_path_factory.mktemp("processed")
    source = write(folder / "in.mcap", recorded_frames())
    summary = bag.process(job(source, folder / "out.mcap", weights))
    assert (summary.frames, summary.resumed, summary.poses) == (COUNT, 0, COUNT - 1)
    assert any("is the object in view" in problem for problem in summary.problems)
    return source, folder / "out.mcap"


def test_goes_on_after_a_kill(processed: tuple[Path, Path], weights: Path, tmp_path: Path) -> None:
    source, whole = processed
    target = tmp_path / "out.mcap"
    command = [sys.executable, "-P", "-c", KILLED, str(source), str(target), str(weights), "5"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not target.exists()
    journal = tmp_path / ".out.mcap.partial"
    journal.write_bytes(journal.read_bytes()[:-7])  # killed in the middle of a record
    summary = bag.process(job(source, target, weights))
    assert (summary.frames, summary.resumed) == (COUNT, 4)
    assert target.read_bytes() == whole.read_bytes()
    assert not journal.exists()


KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_bag import bag, job
source, target, weights = map(Path, sys.argv[1:4])
def report(done, total):
    if done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
bag.process(job(source, target, weights), report)
"""


def test_other_settings_begin_anew(processed: tuple[Path, Path], weights: Path, tmp_path: Path) -> None:
    source, whole = processed
    target = tmp_path / "out.mcap"

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bag.process(job(source, target, weights, **{"tf.prefix": "other_"}), stop)
    summary = bag.process(job(source, target, weights))
    assert summary.resumed == 0 and target.read_bytes() == whole.read_bytes()


def test_an_object_registered_otherwise_begins_anew(weights: Path, tmp_path: Path) -> None:
    """The same view at another distance: its latent is the same, its poses are not."""
    source = write(tmp_path / "in.mcap", recorded_frames())
    estimator = PoseEstimator.from_pretrained(weights)
    image, ids = frame(0)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    stored = bag.Job(source, tmp_path / "out.mcap", settings(weights), store=tmp_path / "objects")
    for distance in (0.6, 1.2):
        registered = estimator.register(image, ids > 0, K, object_id="mug", reference_distance=distance)
        ObjectStore(tmp_path / "objects").save(registered)
        if distance == 0.6:
            with pytest.raises(KeyboardInterrupt):
                bag.process(stored, stop)
    assert bag.process(stored).resumed == 0
    assert bag.process(stored).resumed == 0, "of a finished job nothing is left"


def as_sqlite(path: Path, messages: list[tuple[int, Message]]) -> Path:
    """The same as a folder of an older distribution, images as JPEG and PNG."""
    with Writer(path, version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections: dict[str, Any] = {}
        for when, (topic, message) in messages:
            if topic.endswith("image"):
                pixels = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
                data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
                topic, message = f"{topic}/compressed", CompressedImage(header=message.header, format="png", data=data)
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, type_name(message), typestore=typestore())
            writer.write(connections[topic], when, serialize_message(message))
    return path


def test_a_folder_in_processes_and_on_dask(
    processed: tuple[Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed: no cluster is tried")
    source, whole = processed
    bags = tmp_path / "bags"
    bags.mkdir()
    os.link(source, bags / "first.mcap")
    as_sqlite(bags / "second", recorded_frames())
    (bags / "damaged.mcap").write_bytes(source.read_bytes()[:5000])
    as_sqlite(bags / "torn", recorded_frames())
    (database,) = (bags / "torn").glob("*.db3")
    content = bytearray(database.read_bytes())
    content[len(content) // 3 : 2 * len(content) // 3] = bytes(len(content) // 3)
    database.write_bytes(content)
    store = tmp_path / "store"
    estimator = PoseEstimator.from_pretrained(weights, device="cpu", batch_size=256)
    image, ids = frame(0)
    K = np.array(camera_info_message().k).reshape(3, 3)
    ObjectStore(store).save(estimator.register(image, ids == 700, K, object_id="mug", reference_distance=0.6))
    words = [f"-p{name}:={value}" for name, value in {**SEEN, "weights": weights}.items()]
    words += ["--store", str(store)]

    def run(out: str, *more: str) -> int:
        code = bag.main([str(bags), str(tmp_path / out), *words, *more])
        names = sorted(path.name for path in (tmp_path / out).iterdir() if not path.name.startswith("."))
        assert names == ["first.mcap", "second.mcap"]
        return code

    assert run("processes", "--workers", "2") == 1, "one is damaged"
    told = capsys.readouterr().out
    assert "damaged.mcap: " in told and "cannot be read as a bag" in told and "torn: " in told
    with distributed.LocalCluster(n_workers=2, processes=False, protocol="tcp", dashboard_address=None) as cluster:
        assert run("dask", "--dask", cluster.scheduler_address) == 1
    for name in ("first.mcap", "second.mcap"):
        one, other = tmp_path / "processes" / name, tmp_path / "dask" / name
        assert one.read_bytes() == other.read_bytes()
        assert contents(one) == contents(whole), "the store's object is the one registered from the frame"
    assert bag.main([str(bags), str(tmp_path / "dask"), *words, "--workers", "1"]) == 1
    assert "damaged" in capsys.readouterr().out, "what is done is not done again"


def test_gravity_from_tf_recorded_after_the_frame(weights: Path, tmp_path: Path) -> None:
    level = Quaternion(x=-0.5, y=0.5, z=-0.5, w=0.5)
    messages = recorded_frames(3)
    for index in range(-1, 4):
        when = START + index * PERIOD + PERIOD // 2
        transform = TransformStamped(header=Header(stamp=stamp(when), frame_id="odom"), child_frame_id=FRAME)
        transform.transform.rotation = level
        messages.append((START + index * PERIOD + 3 * PERIOD - 1, ("/tf", TFMessage(transforms=[transform]))))
    source = write(tmp_path / "in.mcap", sorted(messages, key=lambda one: one[0]))
    made = job(source, tmp_path / "out.mcap", weights, **{"gravity.frame": "odom"})
    bag.process(made)
    with open_bag(tmp_path / "out.mcap") as reader:
        (poses,) = [one for one in reader.connections if one.topic == "/nope/poses"]
        priors = [
            pose.prior
            for _, _, data in reader.messages(connections=[poses])
            for pose in deserialized(bytes(data), poses.msgtype).poses
        ]
    assert priors == ["standing"] * 3
    # A node that waits for nothing does not have it in time.
    with pytest.raises(InputError, match="gravity: TF"):
        bag.process(job(source, tmp_path / "other.mcap", weights, **{"gravity.frame": "odom", "gravity.timeout": 0.0}))


BAD = {
    "no objects": ([], "which objects"),
    "path for a name": (["--id", "../mug"], "object_id: '../mug' is not allowed"),
    "no such frame": (["--id", "mug", "--instance", "700", "--reference-frame", "99"], "no frame 99 with a mask"),
    "no store": (["--store", "nowhere"], "nowhere is not a folder"),
    "no parameter": (["--id", "mug", "-pcolour:=red"], "colour: is no parameter"),
    "bad value": (["--id", "mug", "-pprior:=sideways"], "'sideways' is not one of auto, free, upright, standing"),
    "bad type": (["--id", "mug", "-pthreads:=many"], "threads: 'many' is not of type integer"),
    "no topic": (["--id", "mug", "--mask-topic", "/nothing"], "topic /nothing is not in the bag"),
    "no YAML": (["--id", "mug", "-pprior:=["], "-p prior:=[: its value is no YAML"),
    "no workers": (["--id", "mug", "--workers", "0"], "--workers: 0 is not positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_command(
    case: str, processed: tuple[Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = BAD[case]
    source, target = processed[0], tmp_path / "out.mcap"
    if case == "no workers":
        (tmp_path / "bags").mkdir()
        os.link(source, tmp_path / "bags" / "a.mcap")
        os.link(source, tmp_path / "bags" / "b.mcap")
        source, target = tmp_path / "bags", tmp_path / "out"
    assert bag.main([str(source), str(target), *words, f"-pweights:={weights}"]) == 1
    assert expected in " ".join(capsys.readouterr().out.split())
    assert not target.exists()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
