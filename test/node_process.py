"""What node tests share: the node as its own process, and a robot that talks to it over DDS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image

from nope_ros.latent import RotatedLatentPredictor
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.node import topics
from nope_ros.srv import ListObjects, RegisterObject, UnregisterObject

ROOT = Path(__file__).parent.parent
FRAME = "camera_optical"
# One side of a connection knows of it before the other does, and what is sent in between is lost (seconds).
_SETTLE = 0.5
# How long an answer may take on a machine that is busy with other things (seconds). Only a failure takes that long.
_PATIENCE = 30.0
WIDTH, HEIGHT = 320, 240
K = np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])


def write_untrained_weights(folder: Path) -> Path:
    """A small network that has learnt nothing, saved as weights."""
    import torch

    torch.manual_seed(0)
    config = RotatedLatentConfig(crop_size=32, widths=(8, 16, 16), bandwidth=2, channels=6, depths=2, lifted_channels=8)
    RotatedLatentPredictor(RotatedLatentNetwork(config), name="untrained", device="cpu").save_pretrained(folder)
    return folder


def scene(angle: float = 0.0, centre: tuple[int, int] = (160, 120), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) of a coloured box and its mask (H, W)."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    patch = cv2.resize(noise, (96, 64), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((48, 32), angle, 1.0) + np.array([[0, 0, centre[0] - 48], [0, 0, centre[1] - 32]])
    image = cv2.warpAffine(patch, turn, (WIDTH, HEIGHT))
    mask = cv2.warpAffine(np.full(patch.shape[:2], 255, np.uint8), turn, (WIDTH, HEIGHT), flags=cv2.INTER_NEAREST)
    return image, mask


def stamp(nanoseconds: int) -> Time:
    return Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def image_message(pixels: np.ndarray, encoding: str, nanoseconds: int = 0, frame: str = FRAME) -> Image:
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.header.stamp, message.header.frame_id = stamp(nanoseconds), frame
    message.step = pixels.strides[0]
    message.data = array("B", pixels.tobytes())
    return message


def camera_info_message(
    nanoseconds: int = 0, camera: np.ndarray = K, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> CameraInfo:
    message = CameraInfo(width=size[0], height=size[1], k=camera.ravel().tolist(), distortion_model="plumb_bob")
    message.d = [0.0] * 5
    message.header.stamp, message.header.frame_id = stamp(nanoseconds), FRAME
    return message


class Robot:
    """Sends frames, collects what comes back, calls services."""

    def __init__(self, name: str = "/nope") -> None:
        self.name = name
        self.node = rclpy.create_node("robot" + name.replace("/", "_"))
        self.received: dict[str, list[Any]] = defaultdict(list)
        self.arrived: dict[str, list[float]] = defaultdict(list)
        self._publishers: dict[str, Any] = {}
        self._clients: dict[tuple[type, str], Any] = {}
        self._heard: set[str] = set()
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join(5)
        self.node.destroy_node()

    def publish(self, topic: str, message: Any) -> None:
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(type(message), topic, QoSProfile(depth=10))
            self.until(lambda: self._publishers[topic].get_subscription_count() > 0, f"a subscriber of {topic}")
            time.sleep(_SETTLE)
        self._publishers[topic].publish(message)

    def listen(self, endpoint: topics.Endpoint, topic: str = "", qos: QoSProfile | None = None) -> str:
        topic = topic or endpoint.name.replace("~", self.name)
        self.received[topic].clear()
        self.arrived[topic].clear()
        if topic in self._heard:
            return topic
        self._heard.add(topic)

        def receive(message: Any) -> None:
            self.arrived[topic].append(time.monotonic())
            self.received[topic].append(message)

        self.node.create_subscription(endpoint.type, topic, receive, qos or topics.output_qos())
        self.until(lambda: self.node.count_publishers(topic) > 0, f"a publisher of {topic}")
        time.sleep(_SETTLE)
        return topic

    def frame(self, image: np.ndarray, mask: np.ndarray, encoding: str = "mono8", when: int | None = None) -> int:
        """Send a frame to the namespace of the node; returns its stamp."""
        when = time.time_ns() if when is None else when
        namespace = self.name.rpartition("/")[0]
        self.publish(f"{namespace}/image", image_message(image, "rgb8", when))
        self.publish(f"{namespace}/camera_info", camera_info_message(when))
        self.publish(f"{namespace}/mask", image_message(mask, encoding, when))
        return when

    def show(self, image: np.ndarray, mask: np.ndarray) -> Any:
        """Send frames as a camera does, one after another, until poses have come; returns the first of them."""
        poses = self.listen(topics.POSES)
        self.until(lambda: bool(self.frame(image, mask) and self.received[poses]), "an answer to a frame")
        return self.received[poses][0]

    def wait(self, topic: str, condition: Callable[[Any], bool] = lambda _: True, timeout: float = _PATIENCE) -> Any:
        """The first message, received so far or from now on, for which the condition holds."""
        found: list[Any] = []

        def look() -> bool:
            found.extend(message for message in list(self.received[topic]) if condition(message))
            return bool(found)

        self.until(look, f"a message on {topic}", timeout)
        return found[0]

    def until(self, condition: Callable[[], bool], what: str, timeout: float = _PATIENCE) -> None:
        assert self._within(condition, timeout), f"waited {timeout:g} s for {what}"

    @staticmethod
    def _within(condition: Callable[[], bool], timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def call(self, service: type, name: str, request: Any, timeout: float = _PATIENCE) -> Any:
        new = (service, name) not in self._clients
        if new:
            self._clients[service, name] = self.node.create_client(service, name)
        client = self._clients[service, name]
        assert client.wait_for_service(max(timeout, 60.0)), f"no service {name}"  # a node may be starting
        if new:
            time.sleep(_SETTLE)
        future = client.call_async(request)
        if new and not self._within(future.done, timeout / 2):
            # On a busy machine the node may answer before DDS has told it of this client ("failed to send response",
            # rmw_fastrtps says): the request is done and its answer lost. Ask again, as a caller would have to.
            if hasattr(request, "overwrite"):
                request.overwrite = True
            future = client.call_async(request)
        self.until(future.done, f"an answer of {name}", timeout)
        return future.result()

    def register(
        self, object_id: str, pixels: np.ndarray | None = None, silhouette: np.ndarray | None = None, **more: Any
    ) -> Any:
        request = RegisterObject.Request(object_id=object_id)
        if pixels is not None:
            request.image = image_message(pixels, "rgb8")
            request.camera_info = camera_info_message()
        if silhouette is not None:
            request.mask = image_message(silhouette, "mono8" if silhouette.dtype == np.uint8 else "16UC1")
        for name, value in more.items():
            setattr(request, name, value)
        return self.call(RegisterObject, f"{self.name}/register_object", request)

    def unregister(self, object_id: str) -> Any:
        return self.call(
            UnregisterObject, f"{self.name}/unregister_object", UnregisterObject.Request(object_id=object_id)
        )

    def objects(self) -> list[str]:
        return list(self.call(ListObjects, f"{self.name}/list_objects", ListObjects.Request()).object_ids)


class NodeProcess:
    """The node as a user starts it."""

    def __init__(self, log: Path, weights: Path, storage: Path, *arguments: str, **parameters: Any) -> None:
        self.log = log
        values = {
            "weights": str(weights),
            "storage.directory": str(storage),
            "device": "cpu",
            "threads": 1,
            **parameters,
        }
        words = [word for name, value in values.items() for word in ("-p", f"{name}:={_as_yaml(value)}")]
        command = [sys.executable, "-P", "-m", "nope_ros.node.node", *arguments, "--ros-args", *words]
        self._file = log.open("w")
        self.process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, cwd=log.parent)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def says(self, text: str, timeout: float = 2 * _PATIENCE) -> None:
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, f"the node ended:\n{self.output}"
            assert time.monotonic() < end, f"'{text}' was not said:\n{self.output}"
            time.sleep(0.02)

    def is_clean(self) -> bool:
        """Whether nothing was said that people take for a crash."""
        return "Traceback" not in self.output and "exception" not in self.output.lower()

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"the node does not stop:\n{self.output}")
        finally:
            self._file.close()


def reliable(*names: str) -> dict[str, str]:
    """Parameters for inputs that arrive: a busy machine may lose what is sent best-effort, the node's default."""
    return {f"qos_overrides.{name}.subscription.reliability": "reliable" for name in names}


@contextmanager
def answering_node(folder: Path, weights: Path, **parameters: Any) -> Iterator[NodeProcess]:
    """The node as most tests want it: every pose is seen, inputs arrive; at the end it stops and has not crashed."""
    # Untrained weights are sure of nothing.
    values: dict[str, Any] = {"confidence_threshold": 0.0, "similarity_threshold": -1.0}
    values |= reliable("/image", "/mask", "/camera_info")
    node = NodeProcess(folder / "log", weights, folder / "objects", **{**values, **parameters})
    try:
        node.says("Active")
        yield node
    finally:
        assert node.stop() == 0
        assert node.is_clean(), node.output


@contextmanager
def connected_robot() -> Iterator[Robot]:
    """A robot that the node has answered already."""
    robot = Robot()
    try:
        robot.show(*scene())
        yield robot
    finally:
        robot.close()


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def ros_context() -> Iterator[None]:
    """rclpy on a domain of this process's own, on this machine only, with room for images."""
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ.setdefault("FASTDDS_DEFAULT_PROFILES_FILE", str(ROOT / "config" / "fastdds.xml"))
    rclpy.init()
    try:
        yield
    finally:
        rclpy.try_shutdown()


def set_parameter(robot: Robot, name: str, value: Any) -> str:
    """Sets a parameter; returns why it was refused, or ''."""
    kind = {bool: "bool", int: "integer", float: "double", str: "string", list: "double_array"}[type(value)]
    message = ParameterValue(type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"), **{f"{kind}_value": value})
    request = SetParameters.Request(parameters=[Parameter(name=name, value=message)])
    result = robot.call(SetParameters, f"{robot.name}/set_parameters", request).results[0]
    assert result.successful == (not result.reason)
    return str(result.reason)
