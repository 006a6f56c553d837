"""The node on recorded bags, without ROS: the same frames, the same poses, written to a bag beside the first.

    nope-ros bag drive.mcap poses.mcap --id mug --reference-distance 0.6
    nope-ros bag recordings/ poses/ --store ~/.local/share/nope_ros --workers 8

IN is a bag (MCAP or sqlite3) with images (raw or compressed), masks and calibration, or a folder of bags. Objects come
from a store (--store), are registered from the bag's first frame with a mask (--id), or both. Poses, TF, detections and
markers are written with the stamps of their images, on the topics of a node called /nope. A run that was killed goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import InputError
from nope_ros.node import messages, parameters, topics
from nope_ros.node.bagfile import (
    BAG_SUFFIXES,
    IMAGE_TYPE,
    Recorded,
    Topics,
    choose_topics,
    open_bag,
    write_mcap,
)
from nope_ros.node.complaints import Complaints
from nope_ros.node.distro import TransformTree
from nope_ros.node.estimation import estimate, load_estimator, use_threads
from nope_ros.node.gravity import Gravity, ImuGravity, ImuSample, history
from nope_ros.node.interfaces import deserialized, serialized
from nope_ros.node.outputs import Outputs
from nope_ros.node.pairing import FrameMessages, Kind, Pairing
from nope_ros.node.parameters import Settings
from nope_ros.node.registration import register
from nope_ros.srv import RegisterObject
from nope_ros.store import ObjectStore, check_object_id, fingerprint
from nope_ros.tracking import Tracker

NODE = "/nope"
_TF = "tf2_msgs/msg/TFMessage"
_IMU = "sensor_msgs/msg/Imu"
Report = Callable[[int, int], object]


@dataclass(frozen=True)
class Reference:
    """An object to register from the bag itself.

    Attributes:
        object_id: its name.
        frame: which of the frames that have a mask, from 0.
        instance: id in that mask; 0: the only one there is.
        distance: metres from the camera to its centre; 0: unknown.
        diameter: metres; 0: unknown.
    """

    object_id: str
    frame: int = 0
    instance: int = 0
    distance: float = 0.0
    diameter: float = 0.0


@dataclass(frozen=True)
class Job:
    """One bag to process: everything a worker, on this machine or another, needs to know.

    Attributes:
        source: the bag.
        target: the .mcap file to write.
        settings: the node's parameters.
        topics: of the bag.
        depth_topic: of the bag, or "".
        store: folder of registered objects, or None.
        reference: object to register from the bag, or None.
        extras: whether distributions and overlays are written too.
    """

    source: Path
    target: Path
    settings: Settings
    topics: Topics = field(default_factory=Topics)
    depth_topic: str = ""
    store: Path | None = None
    reference: Reference | None = None
    extras: bool = False


@dataclass(frozen=True)
class Summary:
    """What became of a job.

    Attributes:
        target: the file.
        frames: frames that had image, mask and calibration.
        poses: poses in them.
        resumed: frames that an earlier run had done.
        problems: what was wrong with frames, each kind once.
        error: why there is no file, or "".
    """

    target: Path
    frames: int = 0
    poses: int = 0
    resumed: int = 0
    problems: tuple[str, ...] = ()
    error: str = ""


# --- frames ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A frame, when the last of its messages was recorded (ns), and what tells its gravity."""

    received: FrameMessages
    recorded: int
    gravity: Gravity


def moments(job: Job, complain: Callable[[object], object] = lambda problem: None) -> Iterator[Moment]:
    """The frames of a bag as the node's pairing completes them.

    ``complain`` is told of messages that are left out. What a live node waits for after the frame, TF at the image's
    stamp, is read ahead as far as the node would wait.

    Raises:
        InputError: if the bag cannot be read, or a topic is missing.
    """
    settings = job.settings
    with open_bag(job.source) as reader:
        types = {one.topic: one.msgtype for one in reader.connections}
        chosen = choose_topics(types, job.topics)
        if job.depth_topic and types.get(job.depth_topic) != IMAGE_TYPE:
            raise InputError(f"topic {job.depth_topic} is no image topic of {job.source}")
        imu_topic = settings.gravity_imu_topic
        if imu_topic and types.get(imu_topic) != _IMU and types.get(f"/{imu_topic}") != _IMU:
            raise InputError(f"gravity.imu_topic: {imu_topic} is no {_IMU} of {job.source}")
        kinds: dict[str, Kind] = {
            chosen.image: "image",
            chosen.mask: "mask",
            chosen.camera_info: "camera_info",
            **({job.depth_topic: "depth"} if job.depth_topic else {}),
        }
        # As the node has it: no tree unless something is looked up in it.
        tree = TransformTree(history(settings)) if settings.needs_transforms else None
        imu = ImuGravity(history(settings)) if imu_topic else None
        # Waits for nothing: everything that could come in time has been read.
        gravity = Gravity.of(settings, imu=imu, transforms=tree, timeout=0.0)
        if tree is not None:  # latched: a live node has it from the start, whenever it was recorded
            latched = [one for one in reader.connections if one.msgtype == _TF and one.topic.endswith("tf_static")]
            for one, _, data in reader.messages(connections=latched) if latched else ():
                tree.take(deserialized(bytes(data), one.msgtype), static=True)
        wanted = [
            one
            for one in reader.connections
            if one.topic in kinds
            or (tree is not None and one.msgtype == _TF and not one.topic.endswith("tf_static"))
            or (imu is not None and one.topic in (imu_topic, f"/{imu_topic}"))
        ]
        ahead = int(settings.gravity_timeout * 1e9) if tree is not None else 0
        capacity = settings.buffer_megabytes * 1_000_000
        pairing = Pairing(patience=int(settings.mask_patience * 1e9), capacity=capacity, every=True)
        complete: deque[Moment] = deque()
        when = 0
        for connection, when, data in reader.messages(connections=wanted):
            while complete and complete[0].recorded + ahead < when:
                yield complete.popleft()
            message = deserialized(bytes(data), connection.msgtype)
            if connection.topic in kinds:
                kind = kinds[connection.topic]
                try:
                    stamp = messages.checked_stamp(kind, message.header)
                except InputError as error:
                    complain(error)
                    continue
                pairing.add(kind, stamp, message, 0 if kind == "camera_info" else len(message.data))
                while (received := pairing.take(timeout=0)) is not None:
                    complete.append(Moment(received, when, gravity))
            elif connection.msgtype == _TF and tree is not None:
                tree.take(message, static=False)
            elif imu is not None:
                imu.add(ImuSample.of(message))
        pairing.finish()
        while (received := pairing.take(timeout=0)) is not None:
            complete.append(Moment(received, when, gravity))
        yield from complete


def count_frames(job: Job) -> int:
    """How many frames there can be at most: images or masks, whichever are fewer."""
    with open_bag(job.source) as reader:
        chosen = choose_topics({one.topic: one.msgtype for one in reader.connections}, job.topics)
        return min(reader.topics[name].msgcount for name in (chosen.image, chosen.mask))


# --- the journal ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What one frame gave: its messages, and the objects that have markers after it."""

    recorded: list[Recorded]
    marked: frozenset[str]
    poses: int


class Journal:
    """Frames that are done, in a file that survives a kill at any moment. The bag is made of it at the end.

    Each record is its length, its checksum, and a line of JSON followed by the serialized messages. What is behind the
    last whole record is cut off. A journal of other settings, or of another bag, is begun anew.
    """

    _HEAD = struct.Struct("<II")

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.done = 0
        self.poses = 0
        self.marked: frozenset[str] = frozenset()
        end = 0
        if path.exists():
            with path.open("rb") as file:
                first = self._read(file)
                if first is not None and json.loads(first) == identity:
                    end = file.tell()
                    while (record := self._read(file)) is not None:
                        entry = self._entry(record)
                        self.done, self.poses, self.marked = self.done + 1, self.poses + entry.poses, entry.marked
                        end = file.tell()
        self._file: BinaryIO = path.open("r+b" if end else "wb")
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._write(json.dumps(identity).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, entry: Entry) -> None:
        """Keep a frame."""
        head = {
            "marked": sorted(entry.marked),
            "poses": entry.poses,
            "messages": [[one.topic, one.type_name, one.received, len(one.data)] for one in entry.recorded],
        }
        self._write(json.dumps(head).encode() + b"\n" + b"".join(one.data for one in entry.recorded))
        self.done, self.poses, self.marked = self.done + 1, self.poses + entry.poses, entry.marked

    def messages(self) -> Iterator[Recorded]:
        """Everything that was kept, in order."""
        with self.path.open("rb") as file:
            self._read(file)
            while (record := self._read(file)) is not None:
                yield from self._entry(record).recorded

    def _write(self, record: bytes) -> None:
        self._file.write(self._HEAD.pack(len(record), zlib.crc32(record)) + record)
        self._file.flush()

    def _read(self, file: BinaryIO) -> bytes | None:
        head = file.read(self._HEAD.size)
        if len(head) < self._HEAD.size:
            return None
        size, checksum = self._HEAD.unpack(head)
        record = file.read(size)
        return record if len(record) == size and zlib.crc32(record) == checksum else None

    @staticmethod
    def _entry(record: bytes) -> Entry:
        line, _, data = record.partition(b"\n")
        head = json.loads(line)
        recorded, start = [], 0
        for topic, type_name, received, size in head["messages"]:
            recorded.append(Recorded(topic, type_name, received, data[start : start + size]))
            start += size
        return Entry(recorded, frozenset(head["marked"]), head["poses"])


# --- one bag --------------------------------------------------------------------------------------------------------


def process(job: Job, report: Report = lambda done, total: None) -> Summary:
    """Estimate every frame of a bag; goes on where an earlier run was killed.

    Args:
        job: what to do.
        report: called with the frames done and how many there are at most.

    Raises:
        InputError: if the bag, the model, the store or the reference frame cannot be used.
    """
    total = count_frames(job)
    problems: list[str] = []
    complain = Complaints(problems.append)
    estimator = load_estimator(job.settings)
    objects = _objects(job, estimator, complain)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    path = job.target.with_name(f".{job.target.name}.partial")
    with Journal(path, _identity(job, estimator, objects)) as journal:
        resumed = journal.done
        report(resumed, total)
        use_threads(job.settings.threads)
        tracker = Tracker() if job.settings.tracking_enabled else None
        for number, moment in enumerate(moments(job, complain)):
            if number >= resumed:
                journal.add(_frame(moment, job, objects, estimator, tracker, journal.marked, complain))
                report(journal.done, total)
            elif tracker is not None:  # what it knew was lost with the run that was killed
                _frame(moment, job, objects, estimator, tracker, journal.marked, complain)
        summary = Summary(job.target, journal.done, journal.poses, resumed, tuple(problems))
    if summary.frames == 0:
        path.unlink()
        raise InputError(f"{job.source}: no mask has the stamp of an image, or no calibration came")
    write_mcap(job.target, journal.messages())
    path.unlink()
    report(summary.frames, summary.frames)
    return summary


def _objects(job: Job, estimator: PoseEstimator, complain: Complaints) -> list[RegisteredObject]:
    objects: dict[str, RegisteredObject] = {}
    unusable = ""
    if job.store is not None:
        if not job.store.is_dir():
            raise InputError(f"store: {job.store} is not a folder")
        loaded = ObjectStore(job.store).load_all(estimator.predictor, job.settings.batch_size)
        objects |= {one.object_id: one for one in loaded.objects}
        for problem in loaded.problems:
            complain(problem)
        unusable = "".join(f"; {problem}" for problem in loaded.problems)
    if job.reference is not None:
        wanted = job.reference
        check_object_id(wanted.object_id)
        seen = (moment for moment in moments(job) if messages.mask_array(moment.received.mask).any())
        moment = next(islice(seen, wanted.frame, None), None)
        if moment is None:
            raise InputError(
                f"{job.source}: has no frame {wanted.frame} with a mask to register from; does a mask with pixels set "
                "have the stamp of an image, and did a calibration come before?"
            )
        request = RegisterObject.Request(
            object_id=wanted.object_id,
            instance=wanted.instance,
            reference_distance=wanted.distance,
            object_diameter=wanted.diameter,
        )
        rectified = job.settings.rectified
        objects[wanted.object_id] = register(estimator, request, moment.received, moment.gravity, rectified=rectified)
    if not objects:
        raise InputError(f"no object to look for: name a store that holds one, or register one with --id{unusable}")
    return list(objects.values())


def _identity(job: Job, estimator: PoseEstimator, objects: Sequence[RegisteredObject]) -> dict[str, Any]:
    """What a journal must have been begun with for its frames to be this job's."""
    state = job.source.stat()
    told = json.dumps([asdict(job), [fingerprint(one) for one in objects]], default=str)
    return {"source": job.source.name, "size": state.st_size, "changed": state.st_mtime_ns, "job": told}


def _frame(
    moment: Moment,
    job: Job,
    objects: Sequence[RegisteredObject],
    estimator: PoseEstimator,
    tracker: Tracker | None,
    marked: frozenset[str],
    complain: Complaints,
) -> Entry:
    try:
        result = estimate(moment.received, objects, estimator, job.settings, moment.gravity, complain, tracker)
    except InputError as error:
        complain(error)
        return Entry([], marked, 0)
    outputs = Outputs(result, job.settings)
    kept: list[Recorded] = []

    def keep(endpoint: topics.Endpoint, message: Any, topic: str = "") -> None:
        topic = (topic or endpoint.name).replace("~", NODE)
        kept.append(Recorded(topic, endpoint.type_name, moment.recorded, serialized(message, endpoint.type_name)))

    transforms = outputs.transforms(complain)
    if transforms:
        keep(topics.TF, topics.TF.type(transforms=transforms))
    for object_id, pose in outputs.object_poses():
        keep(topics.OBJECT_POSE, pose, topics.object_topic(object_id))
    keep(topics.POSES, outputs.poses())
    keep(topics.DETECTIONS, outputs.detections())
    keep(topics.MARKERS, outputs.markers(marked))
    if job.extras:
        for distribution in outputs.distributions():
            keep(topics.DISTRIBUTION, distribution)
        keep(topics.OVERLAY, outputs.overlay())
    return Entry(kept, outputs.present, len(result.seen))


def attempt(job: Job) -> Summary:
    """As ``process``, with what goes wrong told in the summary: one bad bag does not end the others."""
    try:
        return process(job)
    except InputError as error:
        return Summary(job.target, error=str(error))
    except OSError as error:
        return Summary(job.target, error=f"{job.target}: {error.strerror or error}")
    except Exception as error:  # a damaged bag has many ways to say so
        return Summary(job.target, error=f"{job.source}: {type(error).__name__}: {error}")


# --- command line ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nope-ros bag", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path, help="bag, or folder of bags")
    parser.add_argument("target", metavar="OUT", type=Path, help=".mcap file, or folder for a folder of bags")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--extras", action="store_true", help="write distributions and overlays too (large)")
    objects = parser.add_argument_group("objects")
    objects.add_argument("--store", type=Path, help="folder of registered objects, as the node's storage.directory")
    objects.add_argument("--id", default="", help="register an object of this name from the bag")
    objects.add_argument("--reference-frame", type=int, default=0, help="which frame with a mask (%(default)s)")
    objects.add_argument("--instance", type=int, default=0, help="its id in that mask; 0: the only one there is")
    objects.add_argument("--reference-distance", type=float, default=0.0, help="metres to the object in that frame")
    objects.add_argument("--object-diameter", type=float, default=0.0, help="metres")
    bags = parser.add_argument_group("topics of the bag; found by type and name if left out")
    for name in ("image", "mask", "camera-info", "depth"):
        bags.add_argument(f"--{name}-topic", default="", help="never guessed" if name == "depth" else "")
    node = parser.add_argument_group("parameters of the node")
    node.add_argument("--params-file", default="", help="as for the node, such as config/nope.yaml")
    node.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME:=VALUE", help="may be repeated"
    )
    many = parser.add_argument_group("folders")
    many.add_argument("--workers", type=int, default=1, help="bags at a time, each in a process (%(default)s)")
    many.add_argument("--dask", default="", metavar="ADDRESS", help="on a Dask cluster that sees the same folders")
    return parser


def _settings(given: argparse.Namespace) -> Settings:
    values = parameters.from_file(given.params_file) if given.params_file else {}
    for word in given.parameters:
        name, equals, text = word.partition(":=")
        if not equals:
            raise InputError(f"-p {word}: not NAME:=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"-p {word}: its value is no YAML") from None
        values[name] = "" if value is None else value
    return parameters.settings_from(values)


def jobs(given: argparse.Namespace) -> list[Job]:
    """What the command line asks for.

    Raises:
        InputError: if something of it does not fit.
    """
    settings = _settings(given)
    reference = None
    if given.id:
        if given.reference_frame < 0:
            raise InputError(f"--reference-frame: {given.reference_frame} is negative")
        lengths = (given.reference_distance, given.object_diameter)
        reference = Reference(check_object_id(given.id), given.reference_frame, given.instance, *lengths)
    elif given.store is None:
        raise InputError("which objects? Name a --store, or register one from the bag with --id")
    source = given.source.expanduser()
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    chosen = Topics(given.image_topic, given.mask_topic, given.camera_info_topic)
    store = None if given.store is None else given.store.expanduser().resolve()
    base = Job(source, given.target, settings, chosen, given.depth_topic, store, reference, given.extras)
    if source.is_file() or (source / "metadata.yaml").is_file():
        target = given.target.expanduser()
        if target.suffix != ".mcap":
            raise InputError(f"{target}: name a file that ends in .mcap")
        found = [replace(base, source=source.resolve(), target=target.resolve())]
    else:
        bags = sorted(
            one for one in source.iterdir() if one.suffix in BAG_SUFFIXES or (one / "metadata.yaml").is_file()
        )
        if not bags:
            raise InputError(f"{source}: neither a bag nor a folder of bags")
        folder = given.target.expanduser().resolve()
        found = [replace(base, source=one.resolve(), target=folder / f"{one.stem}.mcap") for one in bags]
        if len({one.target for one in found}) < len(found):
            raise InputError(f"{source}: two bags have the same name but for its end; rename one")
    if any(one.target == one.source for one in found):
        raise InputError("OUT: would replace IN; name another")
    if given.overwrite:
        return found
    there = [one for one in found if one.target.exists()]
    if there and len(found) == 1:
        raise InputError(f"{there[0].target}: exists already; give --overwrite, or name another")
    return [one for one in found if one not in there]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = _parser().parse_args(arguments)
    console = Console()
    try:
        todo = jobs(given)
        summaries = _run(todo, given, console)
    except InputError as error:
        console.print(f"[bold red]nope-ros bag:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    for one in summaries:
        if one.error:
            console.print(
                f"[bold red]{escape(one.target.name)}:[/] {escape(one.error)}", highlight=False, soft_wrap=True
            )
            continue
        earlier = f", {one.resumed} of them earlier" if one.resumed else ""
        console.print(f"{one.target}: {one.frames} frames{earlier}, {one.poses} poses", highlight=False, soft_wrap=True)
        for problem in one.problems:
            console.print(f"  {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not todo:
        console.print("nothing to do: every bag has been processed (--overwrite does it again)")
    return 1 if any(one.error for one in summaries) else 0


def _run(todo: Sequence[Job], given: argparse.Namespace, console: Console) -> list[Summary]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, TimeRemainingColumn(), console=console))
        if len(todo) == 1 and not given.dask:
            task = progress.add_task(todo[0].target.name, total=None)
            return [process(todo[0], lambda done, total: progress.update(task, completed=done, total=total))]
        task = progress.add_task("bags", total=len(todo))
        finished = _on_dask(todo, given.dask) if given.dask else _in_processes(todo, given.workers)
        summaries = []
        for summary in finished:
            summaries.append(summary)
            progress.advance(task)
        return sorted(summaries, key=lambda one: one.target)


def _in_processes(todo: Sequence[Job], workers: int) -> Iterator[Summary]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    if workers < 1:
        raise InputError(f"--workers: {workers} is not positive")
    # Spawned, not forked: a fork of a process that has used OpenMP or CUDA hangs.
    with ProcessPoolExecutor(min(workers, max(len(todo), 1)), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(attempt, job) for job in todo]):
            yield future.result()


def _on_dask(todo: Sequence[Job], address: str) -> Iterator[Summary]:
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--dask: needs the package distributed; pip install distributed") from None
    try:
        client = Client(address, timeout="10s")
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"--dask: no scheduler answers at {address} ({error})") from None
    with client:
        for future in as_completed([client.submit(attempt, job, pure=False) for job in todo]):
            yield future.result()


if __name__ == "__main__":
    sys.exit(main())
