"""A recorded sequence through the real node: started as its own process, fed over DDS, everything it says collected."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage

from nope_ros.demo.player import (
    LEVEL_FRAME,
    Player,
    camera_info_message,
    header,
    make_room_for_images,
    registration_request,
)
from nope_ros.msg import ObjectPose, ObjectPoseArray, PoseDistribution
from nope_ros.node import messages, topics
from nope_ros.node.bagfile import Recorded
from nope_ros.node.distro import nanoseconds
from nope_ros.prior import Prior
from nope_ros.recording import Moment, Recording, Truth
from nope_ros.refine import DEFAULT_REFINEMENT, Refinement
from nope_ros.srv import RegisterObject

NODE = "/nope"
# A frame on a slow CPU takes a second; one that has not come after this is lost, and is sent once more.
_FRAME_TIMEOUT = 15.0
# Loading the network on a busy machine with a cold disk.
_START_TIMEOUT = 120.0
_REGISTER_TIMEOUT = 120.0
# Frames in a row without an answer before it is given up.
_PATIENCE = 3


class SessionError(RuntimeError):
    """What went wrong with the node or its topics, and what to look at."""


@dataclass(frozen=True)
class Options:
    """How the node is run.

    Attributes:
        object_id: to register the object under.
        prior: None lets the node choose; "free" also keeps gravity back.
        weights: folder; empty: the packaged ones.
        device: see the node's parameter.
        threads: CPU threads; 0: half of the cores.
        reference_distance: metres; None: from the truth of the first frame if there is one.
        refinement: see the node's parameter.
        tracking: whether the node follows the object.
        fixed_frame: of a bag's TF, for tracking.
        gravity_frame: of a bag's TF, its z axis pointing up.
        imu_topic: of a bag.
    """

    object_id: str
    prior: Prior | None = None
    weights: str = ""
    device: str = "auto"
    threads: int = 0
    reference_distance: float | None = None
    refinement: Refinement = DEFAULT_REFINEMENT
    tracking: bool = False
    fixed_frame: str = ""
    gravity_frame: str = ""
    imu_topic: str = ""

    def gravity_parameters(self, first: Moment) -> dict[str, Any]:
        """The node's parameters that say where gravity comes from; none if it is not known, or kept back."""
        if self.prior == "free":
            return {}
        if self.gravity_frame:
            return {"gravity.frame": self.gravity_frame}
        if self.imu_topic:
            return {"gravity.imu_topic": self.imu_topic}
        return {"gravity.frame": LEVEL_FRAME} if first.gravity_camera is not None else {}


@dataclass(frozen=True)
class Answer:
    """What came back for one frame.

    Attributes:
        name: of the frame.
        stamp: nanoseconds.
        latency: seconds from publishing the image to receiving its pose; None if nothing came.
        pose: None if nothing came, or the object was not found.
        distribution: likewise.
        truth: of the frame, carried along for scoring; the node never hears of it.
    """

    name: str
    stamp: int
    latency: float | None
    pose: ObjectPose | None
    distribution: PoseDistribution | None
    truth: Truth | None = None


@dataclass(frozen=True)
class Run:
    """A sequence's answers, frame by frame, and what else the node said.

    Attributes:
        answers: in the order of the frames.
        registration_seconds: from calling the service to its answer.
        registration: the service's answer.
        reference_R: (3, 3) object orientation chosen at registration; identity if none was.
        diagnostics: last values of /diagnostics.
        recorded: all messages, inputs (images as JPEG, no masks) and outputs.
        resent: frames that had to be sent twice.
    """

    answers: list[Answer]
    registration_seconds: float
    registration: Any
    reference_R: np.ndarray
    diagnostics: dict[str, str]
    recorded: list[Recorded]
    resent: int


class NodeProcess:
    """The node as its own process, its output in a file."""

    def __init__(self, log: Path, parameters: dict[str, Any]) -> None:
        self.log = log
        words = [word for name, value in parameters.items() for word in ("-p", f"{name}:={_yaml(value)}")]
        command = [sys.executable, "-P", "-m", "nope_ros.node.node", "--ros-args", *words]
        self._file = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def check(self) -> None:
        """Raise SessionError, with its last words, if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise SessionError(f"the node has ended with exit code {code}; its last words ({self.log}):\n{self.tail()}")

    def tail(self) -> str:
        """The last 15 lines it wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join("  " + line for line in text.splitlines()[-15:])

    def stop(self) -> int:
        """Ask it to end, insist if it does not; returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._file.close()
        return code


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)


@dataclass
class _Inbox:
    """What has been received; filled by the executor's thread, waited for by the main one."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    recorded: list[Recorded] = field(default_factory=list)
    poses: dict[int, tuple[float, ObjectPoseArray]] = field(default_factory=dict)
    distributions: dict[int, PoseDistribution] = field(default_factory=dict)
    diagnostics: dict[str, str] = field(default_factory=dict)
    diagnosed: float = 0.0

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Whether the condition came to hold within timeout seconds."""
        with self.changed:
            return self.changed.wait_for(condition, timeout)


@contextmanager
def isolated_ros() -> Iterator[None]:
    """ROS on this machine only, and on a domain of its own unless the user chose one.

    A robot's own node would otherwise answer for ours, which has the same name.
    """
    os.environ.setdefault("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    make_room_for_images()
    rclpy.init(args=[])
    try:
        yield
    finally:
        rclpy.try_shutdown()


def run_session(
    recording: Recording, options: Options, out: Path, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Run:
    """Start the node, register the object from the first frame, play every frame and wait for its pose.

    Args:
        recording: to play.
        options: how the node is run.
        out: folder for the node's log and its registered objects.
        progress: called with what is being done, steps done, and all steps (0: unknown).

    Raises:
        SessionError: if the node dies, refuses the object, or nothing comes from it.
    """
    shutil.rmtree(out / "objects", ignore_errors=True)  # of an earlier run
    first = next(iter(recording))
    gravity = options.gravity_parameters(first)
    if options.prior in ("upright", "standing") and not gravity:
        raise SessionError(
            f"prior '{options.prior}' needs gravity, and this sequence does not tell it; use --prior free, or for a "
            "bag --gravity-frame or --imu-topic"
        )
    parameters: dict[str, Any] = {
        "device": options.device,
        "threads": options.threads,
        "prior": options.prior or "auto",
        "refinement": options.refinement,
        "tracking.enabled": options.tracking,
        "tracking.fixed_frame": options.fixed_frame,
        "storage.directory": str((out / "objects").resolve()),
        "distribution_count": 2000,
        # Every frame is to be answered, however busy the machine.
        "mask_patience": 30.0,
        "gravity.timeout": 2.0,
        # Best effort is right for a live camera; a recording is to arrive whole.
        **{
            f"qos_overrides./{topic}.subscription.reliability": "reliable" for topic in ("image", "mask", "camera_info")
        },
        **gravity,
    }
    if options.weights:
        parameters["weights"] = str(Path(options.weights).expanduser())
        if Path(options.weights).expanduser().is_dir():
            parameters["weights"] = str(Path(options.weights).expanduser().resolve())
    with (
        isolated_ros(),
        NodeProcess(out / "node.log", parameters) as process,
        _Client(options, process, needs_tf="gravity.frame" in gravity) as client,
    ):
        progress("starting the node", 0, 0)
        client.connect()
        progress("registering the object", 0, 0)
        seconds, response, R = client.register(first, distance=_distance(first, options), gravity_known=bool(gravity))
        answers = []
        for index, moment in enumerate(recording):
            progress("estimating poses", index, len(recording))
            answers.append(client.ask(moment))
            client.check_answers(answers)
        progress("estimating poses", len(answers), len(answers))
        diagnostics = client.diagnostics()
        return Run(answers, seconds, response, R, diagnostics, list(client.inbox.recorded), client.resent)


def _distance(first: Moment, options: Options) -> float | None:
    if options.reference_distance is not None:
        return options.reference_distance
    return None if first.truth is None else float(np.linalg.norm(first.truth.t_camera_object))


class _Client:
    """The other end of the node's topics and services."""

    def __init__(self, options: Options, process: NodeProcess, *, needs_tf: bool) -> None:
        self.options = options
        self._needs_tf = needs_tf
        self.process = process
        self.inbox = _Inbox()
        self.resent = 0
        self._node = rclpy.create_node("nope_demo")
        # A bag's own gravity comes with its messages; ours would contradict it.
        own_gravity = options.prior != "free" and not options.gravity_frame and not options.imu_topic
        self._player = Player(self._node, gravity=own_gravity)
        self._register = self._node.create_client(RegisterObject, f"{NODE}/register_object")
        self._subscribe()
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            self._executor.spin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        self._thread.join(5)
        self._node.destroy_node()

    def _subscribe(self) -> None:
        self._listened = {}
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        outputs = [topics.TF, topics.POSES, topics.DETECTIONS, topics.DISTRIBUTION, topics.MARKERS, topics.DIAGNOSTICS]
        names = {endpoint.name.replace("~", NODE): endpoint for endpoint in outputs}
        names[topics.object_topic(self.options.object_id).replace("~", NODE)] = topics.OBJECT_POSE
        for name, endpoint in names.items():
            receive = self._receiver(name, endpoint)
            # Raw: what is recorded is what was published, byte for byte.
            self._listened[name] = self._node.create_subscription(endpoint.type, name, receive, reliable, raw=True)

    def _receiver(self, name: str, endpoint: topics.Endpoint) -> Callable[[bytes], None]:
        def receive(data: bytes) -> None:
            now = time.monotonic()
            with self.inbox.changed:
                self.inbox.recorded.append(Recorded(name, endpoint.type_name, time.time_ns(), bytes(data)))
                if endpoint is topics.POSES:
                    poses = deserialize_message(data, ObjectPoseArray)
                    self.inbox.poses.setdefault(nanoseconds(poses.header.stamp), (now, poses))
                elif endpoint is topics.DISTRIBUTION:
                    distribution = deserialize_message(data, PoseDistribution)
                    self.inbox.distributions[nanoseconds(distribution.header.stamp)] = distribution
                elif endpoint is topics.DIAGNOSTICS:
                    for status in deserialize_message(data, DiagnosticArray).status:
                        self.inbox.diagnostics = {pair.key: pair.value for pair in status.values}
                        self.inbox.diagnosed = now
                self.inbox.changed.notify_all()

        return receive

    def connect(self) -> None:
        """Wait until the node's inputs, outputs and services are there."""
        end = time.monotonic() + _START_TIMEOUT
        while not self._register.service_is_ready():
            self.process.check()
            if time.monotonic() > end:
                raise SessionError(
                    f"the node offers no {NODE}/register_object after {_START_TIMEOUT:.0f} s; its last words "
                    f"({self.process.log}):\n{self.process.tail()}"
                )
            time.sleep(0.05)
        end = time.monotonic() + 20
        while missing := self._missing():
            self.process.check()
            if time.monotonic() > end:
                raise SessionError(
                    f"not connected with the node after 20 s: {', '.join(missing)}; its last words "
                    f"({self.process.log}):\n{self.process.tail()}"
                )
            time.sleep(0.05)

    def _missing(self) -> list[str]:
        """Topics that have no other end (yet)."""
        inputs = [pub.topic_name for pub in self._player.inputs if pub.get_subscription_count() == 0]
        if self._needs_tf and self._player.tf.get_subscription_count() < 2:  # one of them is ours
            inputs.append("/tf")
        # An object's own topic begins to exist when it is registered.
        own = topics.object_topic(self.options.object_id).replace("~", NODE)
        outputs = [name for name in self._listened if name != own and self._node.count_publishers(name) == 0]
        return inputs + outputs

    def register(self, moment: Moment, *, distance: float | None, gravity_known: bool) -> tuple[float, Any, np.ndarray]:
        """Call the service; returns its seconds, its answer, and the object's chosen orientation."""
        stamp = self._player.stamp(moment)
        known = gravity_known and moment.gravity_camera is not None
        request = registration_request(moment, stamp, self.options.object_id, distance=distance, gravity_known=known)
        for _ in range(10):
            # TF may be lost while the node is still finding us; a robot sends it all the time.
            self._player.send_gravity(moment, stamp)
            begin = time.monotonic()
            future = self._register.call_async(request)
            while not future.done():
                self.process.check()
                if time.monotonic() - begin > _REGISTER_TIMEOUT:
                    raise SessionError(f"registration is not answered after {_REGISTER_TIMEOUT:.0f} s")
                time.sleep(0.002)
            seconds, response = time.monotonic() - begin, future.result()
            if response.success or not response.message.startswith("gravity:"):
                break
            time.sleep(0.3)
        if not response.success:
            raise SessionError(
                f"the node did not register the object: {response.message}\n"
                f"its last words ({self.process.log}):\n{self.process.tail()}"
            )
        R = messages.pose_arrays(request.reference_pose)[0] if request.use_reference_pose else np.eye(3)
        return seconds, response, R

    def ask(self, moment: Moment) -> Answer:
        """Play a frame and wait for its answer; a frame that was lost on the way is sent once more."""
        stamp = self._player.stamp(moment)
        for attempt in range(2):
            self.resent += attempt
            self._player.send_gravity(moment, stamp)
            sent = self._player.send(moment, stamp)
            if attempt == 0:
                self._record_input(moment, stamp)
            end = time.monotonic() + _FRAME_TIMEOUT
            while not self.inbox.wait(lambda: stamp in self.inbox.poses, 0.2):
                self.process.check()
                if time.monotonic() > end:
                    break
            else:
                break
        if stamp not in self.inbox.poses:
            return Answer(moment.name, stamp, None, None, None, moment.truth)
        received, poses = self.inbox.poses[stamp]
        pose = next((pose for pose in poses.poses if pose.object_id == self.options.object_id), None)
        distribution = None
        if pose is not None:
            self.inbox.wait(lambda: stamp in self.inbox.distributions, 5.0)
            distribution = self.inbox.distributions.get(stamp)
        return Answer(moment.name, stamp, received - sent, pose, distribution, moment.truth)

    def check_answers(self, answers: list[Answer]) -> None:
        """Give up where nothing comes back."""
        self.process.check()
        last = answers[-_PATIENCE:]
        if len(last) == _PATIENCE and all(answer.latency is None for answer in last):
            raise SessionError(
                f"nothing came on {NODE}/poses for {_PATIENCE} frames in a row, each waited for "
                f"{2 * _FRAME_TIMEOUT:.0f} s; the node's last words ({self.process.log}):\n{self.process.tail()}"
            )

    def _record_input(self, moment: Moment, stamp: int) -> None:
        """Keep what was sent, images as JPEG: raw ones would make the bag a hundred times larger."""
        head = header(moment, stamp)
        encoded, jpeg = cv2.imencode(".jpg", moment.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
        inputs: list[tuple[str, str, Any]] = [
            ("/camera_info", topics.CAMERA_INFO.type_name, camera_info_message(moment.camera, head))
        ]
        if encoded:
            image = CompressedImage(header=head, format="jpeg", data=jpeg.tobytes())
            inputs.append(("/image/compressed", topics.IMAGE_COMPRESSED.type_name, image))
        with self.inbox.changed:
            for topic, type_name, message in inputs:
                self.inbox.recorded.append(Recorded(topic, type_name, time.time_ns(), serialize_message(message)))

    def diagnostics(self) -> dict[str, str]:
        """The node's own figures, of a moment after the last frame; empty if they do not come."""
        now = time.monotonic()
        self.inbox.wait(lambda: self.inbox.diagnosed > now, 3.0)
        return dict(self.inbox.diagnostics)
