"""What goes wrong in the field, done to the node; and the table of it.

    NOPE_FAULTS=1 .venv/bin/pytest test/test_faults.py          # at full length, an hour; writes docs/reliability.md
    NOPE_FAULTS=0.1 ...                                         # a tenth of it
    NOPE_FAULTS=1 ... -k random_messages                        # of one only: the table's other rows stay

As a test, counts are small: see ``COUNTS``.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_process import (
    FRAME,
    HEIGHT,
    ROOT,
    WIDTH,
    K,
    NodeProcess,
    Robot,
    answering_node,
    camera_info_message,
    image_message,
    scene,
    set_parameter,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from nope_ros.estimator import PoseEstimator
from nope_ros.frame import InputError
from nope_ros.latent import WeightsError, load_predictor
from nope_ros.node import messages, topics
from nope_ros.node.distro import nanoseconds
from nope_ros.node.estimation import estimate
from nope_ros.node.gravity import Gravity
from nope_ros.node.outputs import Outputs
from nope_ros.node.pairing import FrameMessages
from nope_ros.node.parameters import settings_from
from nope_ros.node.registration import mesh_path, register
from nope_ros.srv import ListObjects, RegisterObject, UnregisterObject
from nope_ros.store import ObjectStore, StoreError

# Share of the full length; 0: as a test among others.
LENGTH = float(os.environ.get("NOPE_FAULTS", "0"))

pytestmark = pytest.mark.timeout(7200 if LENGTH else 120)


@dataclass(frozen=True)
class Counts:
    """How often each is done."""

    kills: int
    messages: int
    calls: int
    flips: int


COUNTS = Counts(kills=3, messages=150, calls=100, flips=60)
if LENGTH:
    COUNTS = Counts(*(max(3, round(LENGTH * count)) for count in (100, 10_000, 1000, 2000)))


@dataclass(frozen=True)
class Row:
    """One fault in the table: what was done, how often, and what was seen."""

    fault: str
    done: str
    seen: str


ROWS: list[Row] = []


@pytest.fixture(scope="module", autouse=True)
def reliability(request: pytest.FixtureRequest) -> Iterator[None]:
    """The table's rows of the faults that were done, after a run at length in which nothing failed."""
    yield
    page = ROOT / "docs" / "reliability.md"
    if LENGTH and request.session.testsfailed == 0:
        page.write_text(table(renewed(page.read_text(encoding="utf-8"), ROWS)), encoding="utf-8")


@pytest.fixture(scope="module")
def estimator(weights: Path) -> PoseEstimator:
    torch.set_num_threads(1)
    return PoseEstimator.from_pretrained(weights, device="cpu", batch_size=256)


@pytest.fixture(scope="module")
def node(ros: None, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with answering_node(tmp_path_factory.mktemp("node"), weights) as node:
        yield node


@pytest.fixture(scope="module")
def storage(node: NodeProcess) -> Path:
    return node.log.parent / "objects"


def stamp_of(message: Any) -> int:
    return nanoseconds(message.header.stamp)


def answers(robot: Robot, poses: str, when: int) -> list[Any]:
    return [message for message in list(robot.received[poses]) if stamp_of(message) == when]


# --- the process and its disk ---------------------------------------------------------------------------------------


def test_killed_while_registering(ros: None, weights: Path, tmp_path: Path) -> None:
    """SIGKILL at a random moment while objects are registered: all that were confirmed are there afterwards."""
    image, mask = scene()
    dice = random.Random(0)
    confirmed: set[str] = set()
    asked: set[str] = set()
    for kill in range(COUNTS.kills + 1):
        node = NodeProcess(
            tmp_path / f"log{kill}", weights, tmp_path / "objects", "--ros-args", "-r", f"__ns:=/kill{kill}"
        )
        robot = Robot(f"/kill{kill}/nope")
        try:
            node.says("Active")
            assert "damaged" not in node.output and "incomplete" not in node.output, node.output
            there = set(robot.objects())
            assert confirmed <= there <= asked, "nothing is lost, and nothing half written is loaded"
            if kill == COUNTS.kills:
                break
            client = robot.node.create_client(RegisterObject, f"{robot.name}/register_object")
            assert client.wait_for_service(10)
            time.sleep(0.3)
            request = RegisterObject.Request(image=image_message(image, "rgb8"), camera_info=camera_info_message())
            request.mask = image_message(mask, "mono8")
            futures = {}
            for index in range(12):
                request.object_id = f"object_{kill}_{index}"
                asked.add(request.object_id)
                futures[request.object_id] = client.call_async(request)
            time.sleep(dice.uniform(0.0, 0.4))
            node.process.send_signal(signal.SIGKILL)
            node.process.wait(60)
            confirmed |= {name for name, future in futures.items() if future.done() and future.result().success}
        finally:
            if node.process.poll() is None:
                node.stop()
            robot.close()
    assert not [path for path in (tmp_path / "objects").iterdir() if path.stat().st_size == 0]
    ROWS.append(
        Row(
            "node killed while it registers and saves",
            f"{COUNTS.kills} kills at random moments, 12 registrations under way at each",
            f"{len(confirmed)} registrations were confirmed; after each restart all of them were there, none damaged",
        )
    )


def test_disk_full(node: NodeProcess, robot: Robot, storage: Path) -> None:
    """No file of the node may grow: what a full disk does."""
    image, mask = scene()
    poses = robot.listen(topics.POSES)
    assert robot.register("before", image, mask).success
    pid = node.process.pid
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        response = robot.register("mug", image, mask)
        assert response.success and "could not be written" in response.message and "after a restart" in response.message
        when = robot.frame(image, mask)
        assert robot.wait(poses, lambda message: stamp_of(message) == when).poses, "it goes on"
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    assert {path.name for path in storage.iterdir()} == {"before.object.safetensors"}, "nothing half written"
    assert robot.register("mug", image, mask, overwrite=True).message.startswith("Registered 'mug'")
    assert (storage / "mug.object.safetensors").exists()
    ROWS.append(
        Row(
            "disk full",
            "no file may grow while an object is registered",
            "the object is registered, the answer says that it will be gone after a restart; older files are "
            "untouched; registered again when there is room, it is saved",
        )
    )


def test_storage_taken_away(node: NodeProcess, robot: Robot, storage: Path) -> None:
    image, mask = scene()
    away = storage.with_name("away")
    storage.rename(away)
    try:
        storage.write_text("not a folder")
        response = robot.register("mug", image, mask)
        assert response.success and "could not be written" in response.message
        assert robot.objects() == ["mug"]
        gone = robot.unregister("mug")
        assert not gone.success and "could not be removed" in gone.message
    finally:
        storage.unlink()
        away.rename(storage)
    ROWS.append(
        Row(
            "folder of objects unmounted, or read-only",
            "taken away under the running node",
            "as with a full disk; unregistering is refused, as the object would come back",
        )
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_read_only_folder(estimator: PoseEstimator, tmp_path: Path) -> None:
    image, mask = scene()
    store = ObjectStore(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="could not be written"):
            store.save(estimator.register(image, mask, K, object_id="mug"))
    finally:
        tmp_path.chmod(0o700)


def test_a_bit_flips_on_the_disk(estimator: PoseEstimator, tmp_path: Path) -> None:
    image, mask = scene()
    store = ObjectStore(tmp_path)
    saved = estimator.register(image, mask, K, object_id="mug", reference_distance=0.5)
    store.save(saved)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    dice = random.Random(0)
    for _ in range(COUNTS.flips):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        loaded = store.load_all(estimator.predictor)
        if loaded.objects:  # where a bit says nothing, such as a space in the header
            (one,) = loaded.objects
            assert torch.equal(one.latent, saved.latent) and one.reference.distance == 0.5 and one.object_id == "mug"
        else:
            assert loaded.problems and "storage: " in loaded.problems[0]
    path.write_bytes(whole[:-100])
    assert "damaged" in store.load_all(estimator.predictor).problems[0]
    path.write_bytes(whole)
    assert [one.object_id for one in store.load_all(estimator.predictor).objects] == ["mug"]
    ROWS.append(
        Row(
            "file of an object corrupted",
            f"{COUNTS.flips} single bits, and a cut",
            "each is told of and left out, or changed nothing; the others are loaded",
        )
    )


def test_weights_damaged_or_of_another_version(weights: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(weights, tmp_path / name)
        return tmp_path / name

    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:2000])
    other = copy("other")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(re.sub(r'"format_version": \d+', '"format_version": 99', config))
    smaller = copy("smaller")
    (smaller / "config.json").write_text(config.replace('"channels": 6', '"channels": 7'))
    garbled = copy("garbled")
    (garbled / "config.json").write_text(config[:40])
    pickled = tmp_path / "model.pt"
    torch.save({}, pickled)
    for path in (cut, other, smaller, garbled, pickled):
        with pytest.raises(WeightsError, match="weights: "):
            load_predictor(path, device="cpu")
    ROWS.append(
        Row(
            "weights cut short, of another version or shape, or a pickle",
            "one of each",
            "refused with what is wrong; the node stays inactive, and is activated when the weights are replaced",
        )
    )


def test_out_of_gpu_memory(estimator: PoseEstimator, ros: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what PyTorch raises where memory ends is raised instead."""
    from nope_ros.node import node as module

    def no_memory(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, "estimate", no_memory)
    node = module.NopeNode()
    try:
        told: list[str] = []
        node._complain = lambda problem: told.append(str(problem))  # type: ignore[assignment]
        node._session = SimpleNamespace(estimator=None, tracker=None)  # type: ignore[assignment]
        node._process(FrameMessages(1, None, None, None))
        assert told and "out of memory" in told[0] and node.failure is None
    finally:
        node._session = None
        node.destroy_node()
    ROWS.append(
        Row(
            "GPU out of memory",
            "PyTorch's exception raised in the estimation (no GPU in the test)",
            "the frame is given up and told of; the next one is tried",
        )
    )


# --- cameras, clocks and masks --------------------------------------------------------------------------------------


def send(robot: Robot, when: int, *, frame: str = FRAME, camera: np.ndarray = K, mask_frame: str = "") -> None:
    image, mask = scene()
    info = camera_info_message(when, camera)
    info.header.frame_id = frame
    robot.publish("camera_info", info)
    robot.publish("image", image_message(image, "rgb8", when, frame))
    robot.publish("mask", image_message(mask, "mono8", when, mask_frame or frame))


def test_camera_restarted_with_another_calibration_and_frame(node: NodeProcess, robot: Robot) -> None:
    image, mask = scene()
    assert robot.register("mug", image, mask, reference_distance=0.5).success
    assert set_parameter(robot, "refinement", "none") == ""  # matches with what untrained templates found say nothing
    poses = robot.listen(topics.POSES)
    now = time.time_ns()
    send(robot, now)
    first = robot.wait(poses, lambda message: stamp_of(message) == now).poses[0]
    wide = K * [[0.5, 1, 1], [1, 0.5, 1], [1, 1, 1]]
    send(robot, now + 1, frame="other_optical", camera=wide)
    second = robot.wait(poses, lambda message: stamp_of(message) == now + 1)
    assert second.header.frame_id == "other_optical"
    ratio = second.poses[0].pose.pose.position.z / first.pose.pose.position.z
    assert ratio == pytest.approx(0.5, rel=0.1), "half the focal length: the same outline is half as far"
    # Its first image comes before its calibration: the old one does not fit.
    robot.publish("image", image_message(image, "rgb8", now + 2, FRAME))
    robot.publish("mask", image_message(mask, "mono8", now + 2, FRAME))
    node.says(f"camera_info: is of the frame 'other_optical', the image of '{FRAME}'")
    send(robot, now + 3)
    robot.wait(poses, lambda message: stamp_of(message) == now + 3)
    assert not answers(robot, poses, now + 2)
    assert set_parameter(robot, "refinement", "correspondence") == ""
    ROWS.append(
        Row(
            "camera restarted with another calibration or frame_id",
            "both, and an image before its calibration",
            "poses follow at once; an image with the calibration of another frame is refused",
        )
    )


def test_clock_set_back(node: NodeProcess, robot: Robot) -> None:
    image, mask = scene()
    assert robot.register("mug", image, mask).success
    poses = robot.listen(topics.POSES)
    now = time.time_ns()
    for _ in range(3):  # a bag in a loop
        for step in range(3):
            when = now - 1000 * 10**9 + step * 10**9
            robot.received[poses].clear()
            robot.publish("image", image_message(image, "rgb8", when))
            time.sleep(0.1)  # as from a detector: after its image
            robot.publish("camera_info", camera_info_message(when))
            robot.publish("mask", image_message(mask, "mono8", when))
            robot.wait(poses, lambda message, when=when: stamp_of(message) == when and message.poses)  # type: ignore[misc]
    ROWS.append(Row("clock set back", "a recording played three times", "poses go on with the first frame of each"))


def test_stamps_missing(node: NodeProcess, robot: Robot) -> None:
    poses = robot.listen(topics.POSES)
    image, mask = scene()
    for _ in range(3):
        robot.frame(image, mask, when=0)
    node.says("image: header.stamp is zero")
    when = robot.frame(image, mask)
    robot.wait(poses, lambda message: stamp_of(message) == when)
    assert not answers(robot, poses, 0)
    ROWS.append(Row("stamps missing", "images and masks stamped zero", "refused with a message; stamped ones are used"))


def test_masks_early_twice_and_of_another_camera(node: NodeProcess, robot: Robot) -> None:
    image, mask = scene()
    assert robot.register("mug", image, mask).success
    poses = robot.listen(topics.POSES)
    now = time.time_ns()
    robot.publish("camera_info", camera_info_message(now))
    robot.publish("mask", image_message(mask, "mono8", now))
    time.sleep(0.3)
    robot.publish("image", image_message(image, "rgb8", now))
    assert robot.wait(poses, lambda message: stamp_of(message) == now).poses
    for _ in range(3):
        robot.publish("mask", image_message(mask, "mono8", now))
    send(robot, now + 10**8, mask_frame="left_camera_optical")
    node.says(f"mask: is of the frame 'left_camera_optical', the image of '{FRAME}'")
    when = robot.frame(image, mask, when=now + 2 * 10**8)
    robot.wait(poses, lambda message: stamp_of(message) == when)
    assert len(answers(robot, poses, now)) == 1 and not answers(robot, poses, now + 10**8)
    ROWS.append(
        Row(
            "masks early, twice, or of another camera",
            "one of each; late ones are in test_node.py",
            "an early one waits for its image, a second one is let go, one of another camera is refused",
        )
    )


# --- anything at all ------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, 1.0, 300.0, 1e30, -1.0])
SIDES = st.sampled_from([0, 1, 7, 8, 120, 240, 320, 20000, 2**32 - 1]) | st.integers(0, 400)
BYTES = st.binary(max_size=300)


def pixels(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


@st.composite
def random_image(draw: Any, encodings: list[str]) -> Image:
    message = Image(
        height=draw(SIDES), width=draw(SIDES), encoding=draw(st.sampled_from(encodings) | st.text(max_size=5))
    )
    message.step = draw(
        st.sampled_from([0, 1, message.width % 2**20, 3 * message.width % 2**20]) | st.integers(0, 2**20)
    )
    message.is_bigendian = draw(st.booleans())
    message.header.frame_id = draw(st.sampled_from(["", FRAME]))
    wanted = min(int(message.step) * int(message.height), 400_000)
    size = draw(st.sampled_from([wanted, max(wanted - 1, 0), 0]))
    message.data = array("B", pixels(draw(st.integers(0, 9)), size))
    return message


@st.composite
def random_camera_info(draw: Any) -> CameraInfo:
    message = camera_info_message()
    message.width, message.height = draw(st.sampled_from([(WIDTH, HEIGHT), (1, 1)]) | st.tuples(SIDES, SIDES))
    message.distortion_model = draw(st.sampled_from(["plumb_bob", "equidistant", "rational_polynomial", "", "other"]))
    message.d = draw(st.lists(NUMBERS, max_size=9))
    if draw(st.booleans()):
        message.k = draw(st.lists(NUMBERS, min_size=9, max_size=9))
    message.p = draw(st.lists(NUMBERS, min_size=12, max_size=12))
    message.binning_x, message.binning_y = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    message.roi.x_offset, message.roi.width = draw(st.integers(0, 500)), draw(st.integers(0, 500))
    return message


@st.composite
def random_frame_messages(draw: Any) -> FrameMessages:
    """Messages each of which may be good or anything."""
    picture, silhouette = scene(draw(st.integers(0, 359)))
    jpeg = cv2.imencode(".png", picture)[1].tobytes()
    cut = draw(st.integers(0, len(jpeg)))
    image = draw(
        st.just(image_message(picture, "rgb8"))
        | random_image(["rgb8", "bgr8", "mono8", "yuv422", "bayer_rggb8", "16UC1"])
        | st.builds(CompressedImage, format=st.text(max_size=4), data=st.just(jpeg) | st.just(jpeg[:cut]) | BYTES)
    )
    some = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 700, (HEIGHT, WIDTH)).astype(np.uint16)
    mask = draw(
        st.sampled_from([image_message(silhouette, "mono8"), image_message(some // 650, "16UC1")])
        | random_image(["mono8", "8UC1", "16UC1", "rgb8"])
    )
    info = draw(st.just(camera_info_message()) | random_camera_info())
    depth = draw(st.none() | random_image(["32FC1", "16UC1", "mono16", "mono8"]))
    return FrameMessages(draw(st.integers(0, 2**62)), image, mask, info, depth)


def test_random_messages(estimator: PoseEstimator) -> None:
    """Whatever comes: poses of finite numbers, or one line that says what is wrong."""
    image, mask = scene()
    known = estimator.register(image, mask, K, object_id="mug")
    node_settings = settings_from({"confidence_threshold": 0.0, "similarity_threshold": -1.0, "max_instances": 3})
    seen = {"poses": 0, "refused": 0}

    @settings(
        max_examples=COUNTS.messages,
        deadline=None,
        database=None,
        derandomize=not LENGTH,
        suppress_health_check=list(HealthCheck),
    )
    @given(random_frame_messages(), st.booleans())
    def attack(received: FrameMessages, rectified: bool) -> None:
        told: list[object] = []
        try:
            result = estimate(received, [known], estimator, node_settings, Gravity(), told.append)
            outputs = Outputs(result, node_settings)
            for pose in outputs.poses().poses:
                seen["poses"] += 1
                numbers = [pose.pose.pose.position.z, pose.confidence, *pose.pose.covariance]
                assert np.isfinite(numbers).all() and pose.pose.pose.position.z > 0
            outputs.detections(), outputs.markers(()), outputs.overlay()
        except InputError as error:
            seen["refused"] += 1
            assert str(error) and "\n" not in str(error) and len(str(error)) < 600
        request = RegisterObject.Request(object_id="cup")
        try:
            register(estimator, request, received, Gravity(), rectified=rectified)
        except InputError as error:
            assert str(error) and "\n" not in str(error)

    attack()
    assert seen["poses"] > 0 and seen["refused"] > 0
    ROWS.append(
        Row(
            "random messages",
            f"{COUNTS.messages} sets of image, mask, calibration and depth, made by hypothesis",
            "poses of finite numbers, or one line that says what is wrong; nothing else",
        )
    )


def test_an_image_that_announces_gigabytes() -> None:
    header = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    header[16:24] = (16000).to_bytes(4, "big") * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="image: "):
        messages.image_array(CompressedImage(format="png", data=array("B", bytes(header))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"
    ROWS.append(Row("sizes that do not fit", "headers that announce gigabytes", "refused before memory is asked for"))


def test_many_calls_at_once(node: NodeProcess, robot: Robot, storage: Path) -> None:
    image, mask = scene()
    dice = random.Random(0)
    kinds = {"register_object": RegisterObject, "unregister_object": UnregisterObject, "list_objects": ListObjects}
    clients = {name: robot.node.create_client(kind, f"/nope/{name}") for name, kind in kinds.items()}
    for client in clients.values():
        assert client.wait_for_service(10)
    robot.objects()
    time.sleep(0.5)
    futures: list[Any] = []
    names = [f"object{index}" for index in range(5)]
    waiting = 20
    for _ in range(COUNTS.calls):
        # Twenty callers, each with one call under way.
        robot.until(lambda: sum(not future.done() for future in futures) < waiting, "answers", 60)
        name = dice.choice(list(kinds))
        request = kinds[name].Request()
        if name != "list_objects":
            request.object_id = dice.choice(names)
        if name == "register_object":
            request.image, request.mask = image_message(image, "rgb8"), image_message(mask, "mono8")
            request.camera_info, request.overwrite = camera_info_message(), True
        futures.append(clients[name].call_async(request))
    robot.until(lambda: all(future.done() for future in futures), "all answers", 60)
    refused = {future.result().message for future in futures if not getattr(future.result(), "success", True)}
    assert all("is not registered" in message for message in refused), refused
    left = robot.objects()
    assert {path.name.removesuffix(".object.safetensors") for path in storage.iterdir()} == set(left)
    ROWS.append(
        Row(
            "many service calls at once",
            f"{COUNTS.calls} calls that register, unregister and list, {waiting} under way at any time",
            "each is answered; memory and disk agree afterwards",
        )
    )


# --- security -------------------------------------------------------------------------------------------------------


def test_policy_is_what_the_node_does(node: NodeProcess, robot: Robot) -> None:
    """The SROS 2 policy allows what the running node has, and nothing else."""
    root = ElementTree.parse(ROOT / "config" / "sros2_policy.xml").getroot()

    def allowed(group: str, action: str) -> set[str]:
        return {
            str(entry.text).replace("~", "/nope") if str(entry.text)[0] in "~/" else f"/{entry.text}"
            for part in root.iter(group)
            if part.get(action) == "ALLOW"
            for entry in part
        }

    image, mask = scene()
    assert robot.register("mug", image, mask).success
    graph = robot.node

    def on_the_graph(ask: Callable[[str, str], Any], expected: set[str], more: Set[str] = frozenset()) -> set[str]:
        """What the node has, once all that is expected is discovered or ten seconds have gone."""
        deadline = time.monotonic() + 10
        while True:
            found = {str(name).replace("/mug/", "/*/") for name, _ in ask("nope", "/")} | more
            if found == expected or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    expected = allowed("topics", "publish")
    assert on_the_graph(graph.get_publisher_names_and_types_by_node, expected) == expected
    expected = allowed("services", "reply")
    tf2s_own = {"/tf2_frames"}  # of its buffer, where a frame is asked for and tf2_ros is there
    assert on_the_graph(graph.get_service_names_and_types_by_node, expected, tf2s_own) == expected
    only_with_a_parameter = {"/image/compressed", "/imu", "/tf", "/tf_static", "/clock"}
    expected = allowed("topics", "subscribe")
    found = on_the_graph(graph.get_subscriber_names_and_types_by_node, expected, only_with_a_parameter)
    assert found == expected
    ours = {endpoint.name for endpoint in topics.ENDPOINTS if "<" not in endpoint.name}
    named = {str(entry.text) for entry in root.iter() if entry.tag in ("topic", "service")}
    assert ours <= named


@pytest.mark.parametrize("object_id", ["../mug", "/etc/passwd", "a/b", "..", ".hidden", "a\0b", "mug\n", "ü", "a" * 64])
def test_names_stay_in_their_folder(estimator: PoseEstimator, tmp_path: Path, object_id: str) -> None:
    image, mask = scene()
    store = ObjectStore(tmp_path / "objects")
    with pytest.raises(InputError, match="is not allowed"):
        store.save(estimator.register(image, mask, K, object_id=object_id))
    with pytest.raises(InputError, match="is not allowed"):
        store.delete(object_id)
    assert [path.name for path in tmp_path.rglob("*")] == ["objects"]


def test_meshes_come_from_their_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "meshes", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (folder / "mug.ply", folder / "sub" / "cup.ply", outside / "secret.ply"):
        path.touch()
    (folder / "out.ply").symlink_to(outside / "secret.ply")
    (folder / "away").symlink_to(outside)
    (folder / "loop.ply").symlink_to(folder / "loop.ply")
    (folder / "in.ply").symlink_to(folder / "mug.ply")
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    for name in ("mug.ply", "sub/cup.ply", "sub/../mug.ply", "in.ply", str(folder / "mug.ply"), "not_there.ply"):
        for root in (folder, linked):
            assert mesh_path(name, str(root)).is_relative_to(folder)
    for name in (
        *("../outside/secret.ply", "sub/../../outside/secret.ply", str(outside / "secret.ply"), "/etc/passwd"),
        *("out.ply", "away/secret.ply", "../outside/not_there.ply", "../meshes_of_another/mug.ply", ".."),
    ):
        with pytest.raises(InputError, match=r"mesh_file: .* leads out of mesh.directory"):
            mesh_path(name, str(folder))
    for name in ("mug\0.ply", "loop.ply/mug.ply", "a" * 5000):
        with pytest.raises(InputError, match="mesh_file: "):
            mesh_path(name, str(folder))
    with pytest.raises(InputError, match=r"start it with the parameter mesh\.directory"):
        mesh_path("mug.ply", "")


# --- the table ------------------------------------------------------------------------------------------------------


def renewed(page: str, rows: list[Row]) -> list[Row]:
    """The rows of a page, those that were done again in place of what they were."""
    done = {row.fault: row for row in rows}
    old = [Row(*line.strip("| ").split(" | ")) for line in page.splitlines() if line.startswith("| ")][1:]
    old = [row for row in old if set(row.fault) != {"-"}]
    kept = [done.pop(row.fault, row) for row in old]
    return kept + list(done.values())


def test_the_table_keeps_what_was_not_done_again() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert table(renewed(page, [])) == page
    again = table(renewed(page, [Row("disk full", "twice", "nothing"), Row("new", "once", "all")]))
    assert again.count("\n| disk full | twice | nothing |\n") == 1 and again.endswith("| new | once | all |\n")
    assert len(again.splitlines()) == len(page.splitlines()) + 1


def table(rows: list[Row]) -> str:
    lines = [
        "# Reliability",
        "",
        "What goes wrong in the field, done to the node on purpose. Written by",
        "`NOPE_FAULTS=1 .venv/bin/pytest test/test_faults.py` (0.1: a tenth); with small numbers part of `make test`.",
        "With `-k`, only the rows of what was done are written anew, so that numbers may be of different runs.",
        "Nothing that was registered is lost, nothing wrong is published, one message says what happened, and the node",
        "goes on without a restart.",
        "",
        "| fault | how often | what was seen |",
        "| --- | --- | --- |",
        *(f"| {row.fault} | {row.done} | {row.seen} |" for row in rows),
        "",
    ]
    return "\n".join(lines)
