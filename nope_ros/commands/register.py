"""Registration from recordings: ``nope-ros register NAME --folder|--bag|--video``, and from meshes: ``--mesh``.

nope-ros register box --folder walk
nope-ros register mug --bag walk.mcap --fixed-frame map
nope-ros register mug --video walk.mp4 --masks masks.mp4 --camera camera.yaml --poses trajectory.txt
nope-ros register mug --mesh mug.glb --up z
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from scipy.spatial.transform import Rotation, Slerp

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Camera, Frame, InputError
from nope_ros.node.bagfile import Topics, open_bag
from nope_ros.node.distro import TransformError, TransformTree
from nope_ros.node.gravity import Gravity, ImuGravity, ImuSample
from nope_ros.node.interfaces import deserialized
from nope_ros.recording import POSES_FILE, BagRecording, Moment, open_recording
from nope_ros.store import ObjectStore, check_object_id
from nope_ros.video import KEYFRAMES, Pose, Walk, check_count, summary

Array = NDArray[np.float64]
Found = TypeVar("Found")

# A pose this far from a frame's stamp is no pose of that frame.
_FARTHEST = 0.1
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_TF, _IMU = "tf2_msgs/msg/TFMessage", "sensor_msgs/msg/Imu"

_WALKS = ("folder", "bag", "video")
_BELONGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("masks", "camera"), ("video",)),
    "ordered": ("folder",),
    **dict.fromkeys(("fixed_frame", "gravity_frame", "imu_topic", "instance", "rectified"), ("bag",)),
    **dict.fromkeys(("image_topic", "mask_topic", "camera_info_topic", "depth_topic"), ("bag",)),
    **dict.fromkeys(("poses", "z_up", "not_metric", "keyframes", "reference_distance"), _WALKS),
    "up": ("mesh",),
}
"""Options, and the sources that they are of; all others go with any."""


@dataclass(frozen=True)
class Trajectory:
    """Where a camera was: stamps (N,) in seconds or frame numbers, and its pose in the fixed frame.

    Attributes:
        stamps: (N,) growing.
        R_fixed_camera: (N, 3, 3).
        t_fixed_camera: (N, 3).
    """

    stamps: Array
    R_fixed_camera: Array
    t_fixed_camera: Array

    def at(self, stamp: float) -> Pose | None:
        """R_camera_fixed and t_camera_fixed at a stamp, between its neighbours; None where there are none near."""
        after = int(np.searchsorted(self.stamps, stamp))
        if after < len(self.stamps) and abs(self.stamps[after] - stamp) < 1e-6:
            R, t = self.R_fixed_camera[after], self.t_fixed_camera[after]
        elif 0 < after < len(self.stamps):
            begin, end = self.stamps[after - 1], self.stamps[after]
            share = (stamp - begin) / (end - begin)
            if min(stamp - begin, end - stamp) > _FARTHEST:
                return None
            ends = Rotation.from_matrix(self.R_fixed_camera[after - 1 : after + 1])
            R = Slerp([0.0, 1.0], ends)(share).as_matrix()
            t = (1 - share) * self.t_fixed_camera[after - 1] + share * self.t_fixed_camera[after]
        else:
            return None
        return R.T, -R.T @ t


def read_trajectory(path: Path) -> Trajectory:
    """A trajectory as TUM's tools write it: lines of ``stamp tx ty tz qx qy qz qw``, the camera in the fixed frame.

    Raises:
        InputError: naming the line that does not fit.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"poses: {path} cannot be read ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            row = [float(word) for word in words]
        except ValueError:
            row = []
        if len(row) != 8 or not np.isfinite(row).all() or np.linalg.norm(row[4:]) < 1e-6:
            raise InputError(f"poses: {path}, line {number}: not `stamp tx ty tz qx qy qz qw`")
        rows.append(row)
    if not rows:
        raise InputError(f"poses: {path} holds no pose")
    values = np.array(sorted(rows))
    return Trajectory(values[:, 0], Rotation.from_quat(values[:, 4:]).as_matrix(), values[:, 1:4])


def read_camera(path: Path) -> Camera:
    """A calibration as ROS's camera_calibration writes it.

    Raises:
        InputError: if it is none.
    """
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        K = np.array(content["camera_matrix"]["data"], dtype=np.float64).reshape(3, 3)
        distortion = tuple(float(value) for value in content.get("distortion_coefficients", {}).get("data", ()))
        model = content.get("distortion_model", "plumb_bob" if distortion else "none")
        return Camera(K, int(content["image_width"]), int(content["image_height"]), distortion, model)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"camera: {path} is no calibration with image_width, image_height and camera_matrix ({error})"
        ) from None


def video_moments(path: Path, masks: Path, camera: Camera) -> Iterator[Moment]:
    """Frames of a video file with their masks, stamped from zero.

    Args:
        path: of the video.
        masks: a video of the same frames, white on the object; or a folder of images in the frames' order.
        camera: its calibration.

    Raises:
        InputError: if one of them cannot be read.
    """
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise InputError(f"video: {path} cannot be read; is it there, and a video?")
    rate = video.get(cv2.CAP_PROP_FPS) or 30.0
    for index, mask in enumerate(_masks(masks)):
        more, pixels = video.read()
        if not more:
            break
        yield Moment(
            name=f"frame {index}",
            image=np.ascontiguousarray(pixels[..., ::-1]),
            mask=np.asarray(mask > 127),
            camera=camera,
            stamp=int(index / rate * 1e9),
        )


def _masks(path: Path) -> Iterator[NDArray[np.uint8]]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _IMAGES)
        if not files:
            raise InputError(f"masks: {path} holds no image")
        for file in files:
            mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
            if mask is None:
                raise InputError(f"masks: {file} cannot be read as an image")
            yield np.asarray(mask, np.uint8)
        return
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise InputError(f"masks: {path} is neither a folder of images nor a video")
    while True:
        more, pixels = video.read()
        if not more:
            return
        yield np.asarray(pixels[..., 0], np.uint8)


@dataclass(frozen=True)
class Source:
    """A recording of a walk, and how it is read: the options of the same names on the command line.

    One of folder, bag and video is given.
    """

    folder: Path | None = None
    bag: Path | None = None
    video: Path | None = None
    masks: Path | None = None
    camera: Path | None = None
    poses: str = ""
    ordered: bool = False
    z_up: bool = False
    fixed_frame: str = ""
    gravity_frame: str = ""
    imu_topic: str = ""
    image_topic: str = ""
    mask_topic: str = ""
    camera_info_topic: str = ""
    depth_topic: str = ""
    rectified: bool = False
    instance: int = 0

    @classmethod
    def at(cls, path: Path, *, fixed_frame: str = "") -> Source:
        """The folder or the bag that is at a path; the fixed frame is a bag's.

        Raises:
            InputError: if it is neither.
        """
        if isinstance(open_recording(path), BagRecording):
            return cls(bag=path, fixed_frame=fixed_frame)
        return cls(folder=path)

    def check(self) -> None:
        """Refuse options that contradict each other, or that nothing would come of.

        Raises:
            InputError: saying which, and what to do.
        """
        if self.video is not None and (self.masks is None or self.camera is None):
            raise InputError("video: give --masks (a video or a folder) and --camera (a calibration) with it")
        if self.fixed_frame and self.poses:
            raise InputError(f"--fixed-frame takes camera poses from TF, --poses {self.poses} does not; give one")
        if self.poses.endswith(".json") and self.folder is None:
            raise InputError(
                f"--poses {self.poses}: its poses are numbered as a folder's images, and a "
                f"{'bag' if self.video is None else 'video'} has stamps; give lines of `stamp tx ty tz qx qy qz qw`"
            )

    @property
    def posed(self) -> bool:
        """Whether camera poses are asked for; a folder may turn out to have none."""
        return self.poses != "none" and bool(self.poses or self.fixed_frame or self.folder)

    def walk(self, crop_size: int, progress: Callable[[int, int | None], object] = lambda done, total: None) -> Walk:
        """Look at every frame.

        Args:
            crop_size: of the predictor.
            progress: told how many frames are done, and of how many (of a bag: at most; of a video: not known).

        Raises:
            InputError: if something cannot be read, or TF or the IMU answers for none of the frames.
        """
        self.check()
        trajectory = self._trajectory()
        robot, total = None, None
        moments: Iterable[Moment]
        if self.video is not None:
            assert self.masks is not None and self.camera is not None
            moments = video_moments(self.video, self.masks, read_camera(self.camera))
        else:
            path = self.bag or self.folder
            assert path is not None
            topics = Topics(self.image_topic, self.mask_topic, self.camera_info_topic)
            recording = open_recording(
                path,
                topics=topics,
                depth_topic=self.depth_topic,
                rectified=self.rectified,
                instance=self.instance,
                posed=self.poses != "none",
            )
            if isinstance(recording, BagRecording) != (self.bag is not None):
                raise InputError(f"{path}: is a {'folder' if self.bag else 'bag'}; give it as such")
            if isinstance(recording, BagRecording):
                robot = _Robot(recording.path, self.fixed_frame, self.gravity_frame, self.imu_topic)
            moments, total = recording, len(recording)
        walk = Walk(crop_size, ordered=self.folder is None or self.ordered)  # photographs may be sorted by anything
        for index, moment in enumerate(moments):
            try:
                frame = Frame.from_arrays(moment.image, moment.mask, moment.camera, moment.depth)
            except InputError as error:
                walk.refuse(moment.name, str(error))
            else:
                pose, gravity = self._pose(index, moment, trajectory, robot), self._gravity(moment, robot)
                if gravity is None and pose is not None and (self.z_up or self.fixed_frame):
                    gravity = -pose[0][:, 2]
                walk.add(moment.name, frame, gravity_camera=gravity, pose=pose)
            progress(index + 1, total)
        if robot is not None:
            robot.check()
        return walk

    def _pose(self, index: int, moment: Moment, trajectory: Trajectory | None, robot: _Robot | None) -> Pose | None:
        if trajectory is not None:
            return trajectory.at(index if moment.stamp is None else moment.stamp / 1e9)
        if robot is not None and self.fixed_frame:
            return robot.pose(moment)
        if self.poses == "none" or moment.truth is None:
            return None
        return moment.truth.R_camera_object, moment.truth.t_camera_object

    def _gravity(self, moment: Moment, robot: _Robot | None) -> Array | None:
        if robot is not None:
            return robot.down(moment)
        # A folder knows gravity by its poses only.
        return None if self.poses == "none" else moment.gravity_camera

    def _trajectory(self) -> Trajectory | None:
        if self.poses in ("", "none"):
            return None
        path = Path(self.poses).expanduser()
        return _listed_poses(path) if path.suffix == ".json" else read_trajectory(path)


class _Robot:
    """Where a bag's TF says that the camera was, and which way its TF or its IMU says is down.

    Args:
        path: of the bag.
        fixed_frame: of TF; poses are of it.
        gravity_frame: of TF, its z axis pointing up; or
        imu_topic: of an accelerometer.
    """

    def __init__(self, path: Path, fixed_frame: str, gravity_frame: str, imu_topic: str) -> None:
        self.fixed_frame = fixed_frame
        self._tree = TransformTree(history=None)
        imu = ImuGravity(history=2**62) if imu_topic else None  # all of it
        self._gravity = Gravity(frame=gravity_frame, imu=imu, transforms=self._tree, timeout=0.0)
        self._options = {
            "--fixed-frame": "a frame of the bag's TF in which the object stands still",
            "--gravity-frame": "a frame of the bag's TF whose z axis points up",
            "--imu-topic": "the topic of an accelerometer that TF connects with the camera",
        }
        self._down_from = "--gravity-frame" if gravity_frame else "--imu-topic"
        self._answered: set[str] = set()
        self._silent: dict[str, str] = {}
        if not (fixed_frame or gravity_frame or imu_topic):
            return
        with open_bag(path) as reader:
            if imu is not None and not any((one.topic, one.msgtype) == (imu_topic, _IMU) for one in reader.connections):
                there = ", ".join(sorted({one.topic for one in reader.connections if one.msgtype == _IMU})) or "none"
                raise InputError(f"--imu-topic: {imu_topic} is no {_IMU} of {path}; it holds {there}")
            wanted = [one for one in reader.connections if one.msgtype == _TF or one.topic == imu_topic]
            for connection, _, data in reader.messages(connections=wanted) if wanted else ():
                message = deserialized(bytes(data), connection.msgtype)
                if connection.msgtype == _TF:
                    self._tree.take(message, static=connection.topic.endswith("_static"))
                elif imu is not None:
                    imu.add(ImuSample.of(message))

    def pose(self, moment: Moment) -> Pose | None:
        """R_camera_fixed and t_camera_fixed, or None if TF does not know them."""
        # Asked in this order, TF complains of an unknown fixed frame before it does of where the camera is.
        found = self._ask(
            "--fixed-frame", lambda: self._tree.pose(self.fixed_frame, moment.frame_id, moment.stamp or 0, 0.0)
        )
        return None if found is None else (found[0].T, -found[0].T @ found[1])

    def down(self, moment: Moment) -> Array | None:
        """Unit vector (3,) pointing down in the camera's axes, or None if it is not known, or not asked for."""
        return self._ask(self._down_from, lambda: self._gravity.down(moment.frame_id, moment.stamp or 0))

    def _ask(self, option: str, look: Callable[[], Found]) -> Found | None:
        try:
            found = look()
        except (TransformError, InputError) as error:
            self._silent[option] = str(error)
            return None
        self._answered.add(option)
        return found

    def check(self) -> None:
        """Raise InputError if what was asked for was never known."""
        for option, reason in self._silent.items():
            if option not in self._answered:
                raise InputError(f"{option}: {reason}; name {self._options[option]}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nope-ros register``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the object: its TF frame")
    parser.add_argument("--id", metavar="NAME", help="the same")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, metavar="DIR", help=f"{POSES_FILE} with images, masks and maybe depth")
    source.add_argument("--bag", type=Path, metavar="FILE", help="image, mask and camera_info topics, and maybe depth")
    source.add_argument("--video", type=Path, metavar="FILE", help="with --masks and --camera")
    source.add_argument("--mesh", type=Path, metavar="FILE", help="in metres; its frame is the object's")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="of --video: a video or a folder of images")
    parser.add_argument("--camera", type=Path, metavar="YAML", help="of --video: as camera_calibration writes it")
    parser.add_argument(
        "--poses",
        metavar="FILE",
        default="",
        help="camera in the fixed frame: `stamp tx ty tz qx qy qz qw` (of a folder: frame numbers from 0), or of a "
        f"folder a {POSES_FILE}; 'none': from the images alone, even if the folder has poses",
    )
    parser.add_argument(
        "--ordered", action="store_true", help="of --folder: images are in the order in which they were taken"
    )
    parser.add_argument(
        "--fixed-frame",
        default="",
        help="of --bag: TF frame in which the object stands, z up; without it, camera motion comes from the images",
    )
    down = parser.add_mutually_exclusive_group()
    down.add_argument(
        "--gravity-frame",
        default="",
        help="of --bag: TF frame whose z axis points up; without one of --gravity-frame, --imu-topic and --fixed-frame "
        "a bag gives no gravity",
    )
    down.add_argument("--imu-topic", default="", help="of --bag: an accelerometer that tells gravity")
    parser.add_argument("--z-up", action="store_true", help="the z axis of the poses' fixed frame points up")
    parser.add_argument("--not-metric", action="store_true", help="the poses' lengths are not metres")
    parser.add_argument("--keyframes", type=int, default=KEYFRAMES, help="3 or more, at most (%(default)s)")
    parser.add_argument("--reference-distance", type=float, metavar="METRES", help="in the first frame that is used")
    parser.add_argument("--diameter", type=float, metavar="METRES", help="of the object; a mesh is scaled to it")
    parser.add_argument(
        "--up", choices=("x", "y", "z", "-x", "-y", "-z"), help="axis of --mesh that points up as the object stands"
    )
    for name in ("image", "mask", "camera-info"):
        parser.add_argument(f"--{name}-topic", default="", help="of --bag, where there are several")
    parser.add_argument(
        "--depth-topic", default="", help="of --bag: registered to the image; found if one has its frame and size"
    )
    parser.add_argument(
        "--rectified",
        action="store_true",
        help="of --bag: its images are undistorted already (image_rect): P of camera_info holds, not K and D",
    )
    parser.add_argument("--instance", type=int, default=0, help="of --bag: id of the object in the mask")
    parser.add_argument(
        "--store", type=Path, default=Path("~/.local/share/nope_ros"), help="folder of registered objects (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the object that is registered by this name")
    parser.add_argument("--weights", help="folder of weights; the packaged ones if it is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")


def _check_options(given: argparse.Namespace, source: Source, parser: argparse.ArgumentParser) -> None:
    """Raise InputError for an option that does not go with what is registered from."""
    (from_what,) = (name for name in (*_WALKS, "mesh") if getattr(given, name) is not None)
    for name, sources in _BELONGS.items():
        if from_what not in sources and getattr(given, name) != parser.get_default(name):
            those = " or ".join(f"--{one}" for one in sources)
            raise InputError(f"{_option(name)} does not go with --{from_what}, only with {those}; leave it out")
    source.check()
    for name in ("z_up", "not_metric"):
        if getattr(given, name) and not source.posed:
            raise InputError(f"{_option(name)} is about camera poses, and there are none; leave it out, or give poses")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(words: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros register", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    given = parser.parse_args(words)
    if given.id is not None and given.name not in (None, given.id):
        parser.error(f"NAME is {given.name}, --id {given.id}; give one of them")
    given.name = given.id or given.name
    if given.name is None:
        parser.error("give the object's NAME")
    console = Console()
    try:
        check_object_id(given.name)
        source = Source(**{field.name: getattr(given, field.name) for field in fields(Source)})
        _check_options(given, source, parser)
        check_count(given.keyframes)
        store = ObjectStore(given.store)
        estimator = PoseEstimator.from_pretrained(given.weights, device=given.device)
        if not given.overwrite and store.holds(given.name, estimator.predictor):
            raise InputError(f"'{given.name}' is registered in {store.folder} already; --overwrite replaces it")
        with Progress(console=Console(stderr=True)) as progress:
            if given.mesh is not None:
                registered = _from_mesh(given, estimator, progress)
            else:
                registered = _from_walk(given, source, estimator, progress, console)
        aside = store.save(registered)
    except InputError as error:
        print(f"nope-ros register: {error}", file=sys.stderr)
        return 2
    if aside is not None:
        console.print(f"A file of that name that could not be loaded is now {aside}", highlight=False, soft_wrap=True)
    known = "" if registered.gravity_known else "; which way is up is not known, so any orientation is possible"
    note = known if given.mesh is None or registered.gravity_known else "; without --up, so any orientation is possible"
    console.print(
        f"Registered '{given.name}' in {store.folder}: {registered.template_count} templates{note}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _from_mesh(given: argparse.Namespace, estimator: PoseEstimator, progress: Progress) -> RegisteredObject:
    up = None
    if given.up is not None:
        up = np.zeros(3)
        up["xyz".index(given.up[-1])] = -1.0 if given.up.startswith("-") else 1.0
    task = progress.add_task("rendering", total=None)
    return estimator.register_mesh(
        given.mesh,
        object_id=given.name,
        object_diameter=given.diameter,
        gravity_object=None if up is None else -up,
        progress=lambda done, total: progress.update(task, completed=done, total=total),
    )


def _from_walk(
    given: argparse.Namespace, source: Source, estimator: PoseEstimator, progress: Progress, console: Console
) -> RegisteredObject:
    task = progress.add_task("looking at the frames", total=None)
    walk = source.walk(
        estimator.predictor.crop_size, lambda done, total: progress.update(task, completed=done, total=total)
    )
    registered = estimator.register_walk(
        walk,
        object_id=given.name,
        keyframes=given.keyframes,
        poses_metric=not given.not_metric,
        reference_distance=given.reference_distance,
        object_diameter=given.diameter,
        report=lambda what: progress.update(task, description=what),
    )
    progress.stop()
    assert registered.keyframes is not None
    for option, length, scale in (
        ("--reference-distance", given.reference_distance, "reference_distance"),
        ("--diameter", given.diameter, "object_diameter"),
    ):
        found = registered.keyframes.provenance.scale
        if length is not None and found != scale:
            if found == "poses":
                raise InputError(f"{option}: the camera poses are in metres already; leave it out, or say --not-metric")
            raise InputError(f"{option}: lengths are metres by {_option(found)} already; give one of them")
    for line in summary(registered.keyframes):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return registered


def _listed_poses(path: Path) -> Trajectory:
    """The poses of a poses.json, by the number of the image."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        R = np.array([one["R"] for one in images], dtype=np.float64).reshape(-1, 3, 3)
        t = np.array([one["t"] for one in images], dtype=np.float64).reshape(-1, 3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"poses: {path} holds no list `images` with R and t ({error})") from None
    return Trajectory(np.arange(len(R), dtype=float), np.swapaxes(R, 1, 2), -np.einsum("nji,nj->ni", R, t))
