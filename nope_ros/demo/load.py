"""The node under load: latency, frames dropped, memory, CPU, and how fast services answer meanwhile.

    nope-ros load --objects 20 --size 1920x1080 --rate 30 --compressed --seconds 30
    nope-ros load --objects 1 20 --size 640x480 1920x1080 --out docs/load.md    # some of them
    nope-ros load --all --seconds 20 --out docs/load.md          # 1, 5, 20 objects; sizes, rates, raw and compressed
    nope-ros load --seconds 1800 --out docs/load.md              # does anything grow? A figure, and a verdict

A page that has places for them gets them there: <!-- load --> the table, <!-- load over time --> what a run of ten
minutes or more shows.

Frames of the bundled sequence, enlarged, go to the node as its own process over DDS, by camera and detector of this
process. On a busy machine the figures are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from scipy import stats
from sensor_msgs.msg import CompressedImage

from nope_ros.demo.player import camera_info_message, header
from nope_ros.demo.run import bundled_sequence
from nope_ros.demo.session import NODE, NodeProcess, SessionError, isolated_ros
from nope_ros.frame import Camera, InputError
from nope_ros.msg import ObjectPoseArray
from nope_ros.node import messages, topics
from nope_ros.node.distro import nanoseconds
from nope_ros.recording import Moment, open_recording
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS, Refinement
from nope_ros.srv import ListObjects, RegisterObject

_PICTURES = 5
# Not measured: the first calls of a network are slower, and its memory is still being taken.
_WARM_UP = 3.0
# From this many seconds on it can be said whether memory grows. Its first part, in which allocators and caches fill, is
# left out.
_LONG = 600.0
_SETTLING = 1 / 4
# Growth that matters, MB an hour: a robot that is left running for a week gains less than a gigabyte.
_MATTERS = 5.0


@dataclass(frozen=True)
class Case:
    """One load: registered objects, image size in pixels, frames a second, JPEG or raw, seconds, and a parameter."""

    objects: int
    width: int
    height: int
    rate: float
    compressed: bool
    seconds: float
    refinement: Refinement = DEFAULT_REFINEMENT


@dataclass(frozen=True)
class Growth:
    """Memory over time as a straight line: MB an hour, with half the width of its 95 % interval."""

    slope: float
    uncertainty: float

    @property
    def grows(self) -> bool:
        """Whether memory grows for certain, and by more than matters."""
        return self.slope - self.uncertainty > 0 and self.slope > _MATTERS


@dataclass(frozen=True)
class Figures:
    """What was measured. Milliseconds; percent of one core; megabytes.

    Attributes:
        sent: frames.
        answered: those that had an answer.
        latency_ms: from image to pose: p50, p95, p99.
        service_ms: of list_objects, likewise.
        cpu_percent: of the node.
        others_percent: of all other processes but the camera's, meanwhile.
        cores: of the machine.
        memory: (seconds, MB) once a second.
        latency: (seconds, ms) of each answer.
    """

    sent: int
    answered: int
    latency_ms: tuple[float, float, float]
    service_ms: tuple[float, float, float]
    cpu_percent: float
    others_percent: float
    cores: int
    memory: tuple[tuple[float, float], ...]
    latency: tuple[tuple[float, float], ...]

    @property
    def memory_mb(self) -> float:
        """At the end."""
        return self.memory[-1][1]

    @property
    def growth(self) -> Growth | None:
        """How memory grew after the first quarter; None if the run is too short to tell."""
        return growth(self.memory) if self.memory[-1][0] >= _LONG else None


def growth(memory: Sequence[tuple[float, float]]) -> Growth:
    """A straight line through memory over time: (seconds, MB), its first quarter left out.

    The line goes through the medians of minutes. Memory moves in steps that stay, so neighbouring minutes do not err
    independently, and least squares' own interval would be far too narrow: steps s add up to a random walk, about which
    a line's slope scatters by sqrt(6/5) std(s) / sqrt(n).
    """
    seconds, megabytes = np.array(memory).T
    kept = seconds >= _SETTLING * seconds[-1]
    minute = (seconds[kept] // 60).astype(int)
    numbers = np.unique(minute)
    medians = np.array([np.median(megabytes[kept][minute == number]) for number in numbers])
    slope = np.polyfit(numbers / 60, medians, 1)[0]
    scatter = 60 * np.sqrt(6 / 5) * np.diff(medians).std(ddof=1) / np.sqrt(len(numbers))
    return Growth(float(slope), float(stats.t.ppf(0.975, len(numbers) - 2) * scatter))


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
            whole = (picture, camera_info_message(moment.camera, head), messages.mask(head, moment.mask))
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
            "refinement": case.refinement,
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
        self.arrived.setdefault(nanoseconds(message.header.stamp), time.monotonic())

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
            request.image, request.mask = messages.image(head, moment.image), messages.mask(head, moment.mask)
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
        usage: list[tuple[float, ...]] = []
        pending: tuple[float, Any] | None = None
        while (now := time.monotonic()) - begin < _WARM_UP + self.case.seconds:
            stamp = time.time_ns()
            self.sender.send(len(sent), stamp)
            sent[stamp] = now
            if not usage or now - usage[-1][0] > 1:
                usage.append((now, *_process_usage(self.process.pid), time.process_time(), _machine_seconds()))
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
        waited = [
            (when - begin, self.arrived[stamp] - when) for stamp, when in counted.items() if stamp in self.arrived
        ]
        used = np.array([one for one in usage if one[0] - begin >= _WARM_UP])
        spent = 100 * (used[-1] - used[0]) / max(used[-1, 0] - used[0, 0], 1e-9)
        return Figures(
            sent=len(counted),
            answered=len(waited),
            latency_ms=_percentiles([seconds for _, seconds in waited]),
            service_ms=_percentiles(services),
            cpu_percent=float(spent[1]),
            others_percent=max(float(spent[4] - spent[1] - spent[3]), 0.0),  # two clocks: idle can come out below it
            cores=os.cpu_count() or 1,
            memory=tuple((round(now - begin, 1), round(megabytes, 2)) for now, _, megabytes, *_ in used.tolist()),
            latency=tuple((round(when, 2), round(1000 * seconds, 1)) for when, seconds in waited),
        )


def _process_usage(pid: int) -> tuple[float, float]:
    """CPU seconds used so far, and resident megabytes."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return seconds, pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _machine_seconds() -> float:
    """CPU seconds that all processes of this machine used so far."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


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
        case.refinement,
        " / ".join(f"{value:.0f}" for value in figures.latency_ms),
        f"{figures.answered / case.seconds:.1f}",
        f"{dropped:.0f} %",
        f"{figures.cpu_percent:.0f} %",
        f"{figures.others_percent:.0f} % of {100 * figures.cores} %",
        f"{figures.memory_mb:.0f}",
        " / ".join(f"{value:.0f}" for value in figures.service_ms),
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| objects | image | Hz | | refinement | latency p50 / p95 / p99, ms | poses a second | frames left out | CPU "
    "| of others | memory, MB | list_objects p50 / p95 / p99, ms |\n|" + " --- |" * 12
)


def over_time(case: Case, figures: Figures, picture: str) -> str:
    """What a long run shows, as Markdown around its picture."""
    grown = figures.growth
    assert grown is not None
    verdict = "It grows." if grown.grows else "No growth is seen."
    minutes = case.seconds / 60
    return (
        f"{HEAD}\n{line(case, figures)}\n\n![Memory and latency over time]({picture})\n\n"
        f"**{verdict}** Of {minutes:.0f} minutes, the first {_SETTLING * minutes:.0f} are left out, "
        f"in which caches fill; a line through the medians of the other minutes rises by {grown.slope:+.1f} ± "
        f"{grown.uncertainty:.1f} MB/h (95 %). Growth would be a slope of more than {_MATTERS:g} MB/h whose interval "
        "leaves out zero."
    )


def draw(figures: Figures, path: Path) -> None:
    """Memory with its line, and latency, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    seconds, megabytes = np.array(figures.memory).T
    when, latency = np.array(figures.latency).T
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    above.plot(seconds / 60, megabytes, lw=1)
    grown = figures.growth
    if grown is not None:
        kept = seconds >= _SETTLING * seconds[-1]
        middle = seconds[kept].mean()
        fitted = np.median(megabytes[kept]) + grown.slope * (seconds[kept] - middle) / 3600
        label = f"{grown.slope:+.1f} ± {grown.uncertainty:.1f} MB/h"
        above.plot(seconds[kept] / 60, fitted, "k--", lw=1, label=label)
        above.legend()
    above.set(ylabel="memory of the node, MB", ylim=(0.9 * megabytes.min(), 1.05 * megabytes.max()))
    minute = (when // 60).astype(int)
    for percent in (50, 95, 99):
        levels = [np.percentile(latency[minute == number], percent) for number in np.unique(minute)]
        below.plot(np.unique(minute) + 0.5, levels, ".-", lw=1, label=f"p{percent}")
    below.set(xlabel="minutes", ylabel="image to pose, ms", ylim=(0, None))
    below.legend(ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(rows: Sequence[tuple[Case, Figures]], out: Path) -> None:
    """Tables and pictures into a page, or the figures themselves into a .json file."""
    if out.suffix == ".json":
        plain = [{"case": asdict(case), "figures": asdict(figures)} for case, figures in rows]
        out.write_text(json.dumps(plain) + "\n", encoding="utf-8")
        return
    page = out.read_text(encoding="utf-8") if out.exists() else "<!-- load --><!-- /load -->\n"
    long = [row for row in rows if row[1].growth is not None]
    short = [row for row in rows if row[1].growth is None]
    if short:
        page = _placed(page, "load", "\n".join([HEAD, *(line(*row) for row in short)]), out)
    if long:
        picture = out.parent / "images" / "load.png"
        draw(long[-1][1], picture)
        told = over_time(*long[-1], str(picture.relative_to(out.parent)))
        page = _placed(page, "load over time", told, out)
    out.write_text(page, encoding="utf-8")


def _placed(page: str, name: str, text: str, out: Path) -> str:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in page:
        return f"{page}\n{begin}\n{text}\n{end}\n"
    if end not in page:
        raise InputError(f"{out}: {begin} has no {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def read(path: Path) -> list[tuple[Case, Figures]]:
    """What ``write`` put into a .json file.

    Raises:
        InputError: if it is none.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return [(Case(**one["case"]), Figures(**one["figures"])) for one in plain]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: holds no figures of nope-ros load ({error})") from None


def _cases(given: argparse.Namespace) -> Iterator[Case]:
    if given.all:
        sizes = ((640, 480), (1920, 1080))
        for (width, height), rate, compressed, objects in product(sizes, (30.0, 60.0), (False, True), (1, 5, 20)):
            yield Case(objects, width, height, rate, compressed, given.seconds, given.refinement)
        return
    for size, objects in product(given.size, given.objects):
        width, _, height = size.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise InputError(f"--size: {size} is not WIDTHxHEIGHT")
        yield Case(objects, int(width), int(height), given.rate, given.compressed, given.seconds, given.refinement)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, nargs="+", default=[1], help="registered ones; one is in view (1)")
    parser.add_argument("--size", nargs="+", default=["640x480"], help="of the images (640x480)")
    parser.add_argument("--rate", type=float, default=30.0, help="frames a second (%(default)s)")
    parser.add_argument("--compressed", action="store_true", help="JPEG, not raw")
    parser.add_argument("--seconds", type=float, default=20.0, help="after a warm-up (%(default)s)")
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--weights", default="", help="as the node's parameter")
    parser.add_argument("--threads", type=int, default=0, help="as the node's parameter")
    parser.add_argument("--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="as the node's parameter")
    parser.add_argument("--no-gravity", action="store_true", help="any rotation is possible")
    parser.add_argument(
        "--out", type=Path, action="append", help="write into this page; into .json, the figures themselves; repeatable"
    )
    parser.add_argument("--figures", type=Path, help="a .json of before: measure nothing, write its pages again")
    given = parser.parse_args(arguments)
    console = Console()
    rows: list[tuple[Case, Figures]] = []
    try:
        if given.figures is not None:
            rows = read(given.figures)
        cases = list(_cases(given)) if given.figures is None else []
        with Progress(console=console) as progress:
            for case in progress.track(cases, description="cases"):
                figures = measure(case, weights=given.weights, threads=given.threads, gravity=not given.no_gravity)
                rows.append((case, figures))
                # After each case: what was measured for hours is not lost with the one that fails.
                for out in given.out or ():
                    write(rows, out)
        if given.figures is not None:
            for out in given.out or ():
                write(rows, out)
    except (InputError, SessionError) as error:
        console.print(f"nope-ros load: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join([HEAD, *(line(*row) for row in rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
