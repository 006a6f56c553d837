"""The node under load: latency, frames dropped, memory, CPU, and how fast services answer meanwhile.

    nope-ros load --objects 20 --size 1920x1080 --rate 30 --compressed --seconds 30
    nope-ros load --all --seconds 20 --out docs/load.md          # 1, 5, 20 objects; sizes, rates, raw and compressed
    nope-ros load --seconds 1800                                 # does anything grow?

Frames of the bundled sequence, enlarged, go to the node as its own process over DDS, by camera and detector of this
process. On a busy machine the figures are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rich.console import Console
from rich.progress import Progress
from sensor_msgs.msg import CompressedImage

from nope_ros.demo.player import camera_info_message, header, mask_message
from nope_ros.demo.run import bundled_sequence
from nope_ros.demo.sequence import Moment, open_recording
from nope_ros.demo.session import NODE, NodeProcess, SessionError, isolated_ros
from nope_ros.frame import Camera, InputError
from nope_ros.msg import ObjectPoseArray
from nope_ros.node import messages, topics
from nope_ros.srv import ListObjects, RegisterObject

_PICTURES = 5
# Not measured: the first calls of a network are slower, and its memory is still being taken.
_WARM_UP = 3.0


@dataclass(frozen=True)
class Case:
    """One load: registered objects, image size in pixels, frames a second, JPEG or raw, seconds."""

    objects: int
    width: int
    height: int
    rate: float
    compressed: bool
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What was measured. Milliseconds; percent of one core; megabytes."""

    sent: int
    answered: int
    latency_ms: tuple[float, float, float]
    service_ms: tuple[float, float, float]
    cpu_percent: float
    memory_mb: float
    growth_mb_per_minute: float


def pictures(case: Case) -> list[Moment]:
    """A few frames of the bundled sequence at the size of the case."""
    found = []
    for moment in open_recording(bundled_sequence(), limit=_PICTURES):
        size = (case.width, case.height)
        scale = np.diag([case.width / moment.camera.width, case.height / moment.camera.height, 1.0])
        mask = cv2.resize(moment.mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        camera = Camera(scale @ moment.camera.K, *size)
        image = cv2.resize(moment.image, size, interpolation=cv2.INTER_LINEAR)
        found.append(Moment(moment.name, image, mask, camera, moment.gravity_camera))
    return found


class _Sender:
    """Camera and detector. Messages are serialized once; only their stamps, which come first, are written anew."""

    def __init__(self, node: Any, case: Case, shown: Sequence[Moment]) -> None:
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        image = topics.IMAGE_COMPRESSED if case.compressed else topics.IMAGE
        self.publishers = [
            node.create_publisher(endpoint.type, endpoint.name, qos)
            for endpoint in (image, topics.CAMERA_INFO, topics.MASK)
        ]
        self._frames = []
        for moment in shown:
            head = header(moment, 1)
            if case.compressed:
                jpeg = cv2.imencode(".jpg", moment.image[..., ::-1])[1].tobytes()
                picture = CompressedImage(header=head, format="jpeg", data=jpeg)
            else:
                picture = messages.image(head, moment.image)
            whole = (picture, camera_info_message(moment.camera, head), mask_message(moment.mask, head))
            self._frames.append([bytearray(serialize_message(one)) for one in whole])

    def send(self, index: int, stamp: int) -> None:
        for publisher, data in zip(self.publishers, self._frames[index % len(self._frames)], strict=True):
            struct.pack_into("<iI", data, 4, stamp // 10**9, stamp % 10**9)
            publisher.publish(bytes(data))


def measure(case: Case, *, weights: str = "", threads: int = 0, gravity: bool = True) -> Figures:
    """Run one case.

    Raises:
        SessionError: if the node does not start, or refuses an object.
    """
    shown = pictures(case)
    with tempfile.TemporaryDirectory() as folder, isolated_ros():
        parameters: dict[str, Any] = {
            "storage.directory": f"{folder}/objects",
            "compressed": case.compressed,
            "threads": threads,
            "similarity_threshold": -1.0,  # every frame has a pose to publish
            **({"weights": weights} if weights else {}),
        }
        down = shown[0].gravity_camera
        if gravity and down is not None:
            parameters["gravity.vector"] = [float(value) for value in down]
        with NodeProcess(Path(folder) / "log", parameters) as process:
            return _Run(case, shown, process).figures()


class _Run:
    def __init__(self, case: Case, shown: Sequence[Moment], process: NodeProcess) -> None:
        self.case, self.process = case, process
        self.node = rclpy.create_node("load")
        self.arrived: dict[int, float] = {}
        self.sender = _Sender(self.node, case, shown)
        self.node.create_subscription(ObjectPoseArray, f"{NODE}/poses", self._receive, topics.output_qos())
        self.register = self.node.create_client(RegisterObject, f"{NODE}/register_object")
        self.list = self.node.create_client(ListObjects, f"{NODE}/list_objects")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self._spin, daemon=True)
        self.thread.start()
        self._connect(shown)

    def _spin(self) -> None:
        with suppress(ExternalShutdownException):
            self.executor.spin()

    def _receive(self, message: ObjectPoseArray) -> None:
        self.arrived.setdefault(messages.nanoseconds(message.header.stamp), time.monotonic())

    def _wait(self, condition: Any, what: str, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        while not condition():
            self.process.check()
            if time.monotonic() > end:
                raise SessionError(f"waited {timeout:.0f} s for {what}:\n{self.process.tail()}")
            time.sleep(0.005)

    def _connect(self, shown: Sequence[Moment]) -> None:
        self._wait(self.register.service_is_ready, "the node", 120)
        self._wait(lambda: all(one.get_subscription_count() for one in self.sender.publishers), "its inputs")
        time.sleep(1.0)  # the other side knows of us a little later
        for index in range(self.case.objects):
            moment = shown[index % len(shown)]
            head = header(moment, 1)
            request = RegisterObject.Request(object_id=f"object{index}", overwrite=True)
            request.image, request.mask = messages.image(head, moment.image), mask_message(moment.mask, head)
            request.camera_info = camera_info_message(moment.camera, head)
            future = self.register.call_async(request)
            self._wait(future.done, "a registration")
            if not future.result().success:
                raise SessionError(future.result().message)

    def figures(self) -> Figures:
        """Send for the time of the case and measure."""
        sent: dict[int, float] = {}
        services: list[float] = []
        begin = time.monotonic()
        usage: list[tuple[float, float, float]] = []
        pending: tuple[float, Any] | None = None
        while (now := time.monotonic()) - begin < _WARM_UP + self.case.seconds:
            stamp = time.time_ns()
            self.sender.send(len(sent), stamp)
            sent[stamp] = now
            if not usage or now - usage[-1][0] > 1:
                usage.append((now, *_process_usage(self.process.pid)))
            if pending is not None and pending[1].done():
                pending = None
            if pending is None and len(sent) % max(1, round(self.case.rate / 2)) == 0:
                future = self.list.call_async(ListObjects.Request())
                asked = time.monotonic()
                future.add_done_callback(lambda _, asked=asked: services.append(time.monotonic() - asked))
                pending = (now, future)
            due = begin + len(sent) / self.case.rate
            time.sleep(max(0.0, due - time.monotonic()))
        time.sleep(2.0)
        self.process.check()
        self.executor.shutdown()
        self.thread.join(5)
        self.node.destroy_node()
        counted = {stamp: when for stamp, when in sent.items() if when - begin >= _WARM_UP}
        latency = [self.arrived[stamp] - when for stamp, when in counted.items() if stamp in self.arrived]
        used = [one for one in usage if one[0] - begin >= _WARM_UP]
        times, cpu, memory = (np.array([one[i] for one in used]) for i in range(3))
        slope = float(np.polyfit(times / 60, memory, 1)[0]) if len(used) > 2 else 0.0
        percent = 100 * (cpu[-1] - cpu[0]) / max(times[-1] - times[0], 1e-9)
        return Figures(
            len(counted), len(latency), _percentiles(latency), _percentiles(services), percent, memory[-1], slope
        )


def _process_usage(pid: int) -> tuple[float, float]:
    """CPU seconds used so far, and resident megabytes."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return seconds, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    if not seconds:
        return (float("nan"),) * 3
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99)) * 1000
    return float(p50), float(p95), float(p99)


# --- command line ---------------------------------------------------------------------------------------------------


def line(case: Case, figures: Figures) -> str:
    """A row of the table."""
    dropped = 100 * (1 - figures.answered / max(figures.sent, 1))
    cells = [
        str(case.objects),
        f"{case.width}×{case.height}",
        f"{case.rate:g}",
        "JPEG" if case.compressed else "raw",
        " / ".join(f"{value:.0f}" for value in figures.latency_ms),
        f"{figures.answered / case.seconds:.1f}",
        f"{dropped:.0f} %",
        f"{figures.cpu_percent:.0f} %",
        f"{figures.memory_mb:.0f}",
        f"{figures.growth_mb_per_minute:+.1f}",
        " / ".join(f"{value:.0f}" for value in figures.service_ms),
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| objects | image | Hz | | latency p50 / p95 / p99, ms | poses a second | frames left out | CPU | memory, MB "
    "| growth, MB/min | list_objects p50 / p95 / p99, ms |\n|" + " --- |" * 11
)


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    if given.all:
        sizes = ((640, 480), (1920, 1080))
        for (width, height), rate, compressed, objects in product(sizes, (30.0, 60.0), (False, True), (1, 5, 20)):
            yield Case(objects, width, height, rate, compressed, given.seconds)
        return
    width, _, height = given.size.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise InputError(f"--size: {given.size} is not WIDTHxHEIGHT")
    yield Case(given.objects, int(width), int(height), given.rate, given.compressed, given.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=1, help="registered ones; one is in view (%(default)s)")
    parser.add_argument("--size", default="640x480", help="of the images (%(default)s)")
    parser.add_argument("--rate", type=float, default=30.0, help="frames a second (%(default)s)")
    parser.add_argument("--compressed", action="store_true", help="JPEG, not raw")
    parser.add_argument("--seconds", type=float, default=20.0, help="after a warm-up (%(default)s)")
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--weights", default="", help="as the node's parameter")
    parser.add_argument("--threads", type=int, default=0, help="as the node's parameter")
    parser.add_argument("--no-gravity", action="store_true", help="any rotation is possible")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown; .json for the figures themselves")
    given = parser.parse_args(arguments)
    console = Console()
    rows: list[tuple[Case, Figures]] = []
    try:
        cases = list(_cases(given))
        with Progress(console=console) as progress:
            for case in progress.track(cases, description="cases"):
                figures = measure(case, weights=given.weights, threads=given.threads, gravity=not given.no_gravity)
                rows.append((case, figures))
    except (InputError, SessionError) as error:
        console.print(f"nope-ros load: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    table = "\n".join([HEAD, *(line(*row) for row in rows)])
    print(table)
    if given.out is not None and given.out.suffix == ".json":
        plain = [{**vars(case), **vars(figures)} for case, figures in rows]
        given.out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    elif given.out is not None:
        given.out.write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
