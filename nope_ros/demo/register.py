"""Registration from recordings: ``nope-ros register NAME --folder|--bag|--video``, and from meshes: ``--mesh``.

nope-ros register box --folder walk
nope-ros register mug --bag walk.mcap --fixed-frame map
nope-ros register mug --video walk.mp4 --masks masks.mp4 --camera camera.yaml --poses trajectory.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from scipy.spatial.transform import Rotation, Slerp

from nope_ros.demo.sequence import POSES_FILE, Moment, open_recording
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Camera, Frame, InputError
from nope_ros.node.bagfile import Topics
from nope_ros.store import ObjectStore, check_object_id
from nope_ros.video import KEYFRAMES, Pose, Walk, check_count, summary

Array = NDArray[np.float64]

# A pose this far from a frame's stamp is no pose of that frame.
_FARTHEST = 0.1
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


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


def walk_of(
    moments: Iterator[Moment],
    crop_size: int,
    pose_of: Callable[[int, Moment], Pose | None],
    *,
    z_up: bool = False,
    ordered: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> Walk:
    """Look at every frame of a recording.

    Args:
        moments: its frames.
        crop_size: of the predictor.
        pose_of: R_camera_fixed, t_camera_fixed of a frame, given its number.
        z_up: whether the fixed frame's z axis points up, which gives gravity where the recording does not.
        ordered: whether they come as they were taken.
        progress: called after each frame.
    """
    walk = Walk(crop_size, ordered=ordered)
    for index, moment in enumerate(moments):
        try:
            frame = Frame.from_arrays(moment.image, moment.mask, moment.camera)
        except InputError as error:
            walk.refuse(moment.name, str(error))
        else:
            pose = pose_of(index, moment)
            gravity = moment.gravity_camera
            if gravity is None and z_up and pose is not None:
                gravity = -pose[0][:, 2]
            walk.add(moment.name, frame, gravity_camera=gravity, pose=pose)
        progress()
    return walk


def bag_trajectory(path: Path, fixed_frame: str, camera_frame: str, stamps: Sequence[int]) -> Trajectory:
    """Where TF in a bag says that the camera was, at stamps in nanoseconds.

    Raises:
        InputError: if TF knows it at none of them.
    """
    from rosbags.highlevel import AnyReader
    from rosbags.typesys import Stores, get_typestore

    from nope_ros.node.distro import TransformError, TransformTree

    tree = TransformTree(history=None)
    with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        wanted = [one for one in reader.connections if one.msgtype == "tf2_msgs/msg/TFMessage"]
        for connection, _, data in reader.messages(connections=wanted):
            message: Any = reader.deserialize(data, connection.msgtype)
            tree.take(message, static=connection.topic.endswith("_static"))
    found, reason = [], "no frame has a stamp"
    for stamp in stamps:
        try:
            found.append((stamp / 1e9, *tree.pose(fixed_frame, camera_frame, stamp, 0.0)))
        except TransformError as error:
            reason = str(error)
    if not found:
        raise InputError(f"fixed-frame: {reason}; name a frame of the bag's TF in which the object stands still")
    stamps_found, R, t = zip(*found, strict=True)
    return Trajectory(np.array(stamps_found), np.stack(R), np.stack(t))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nope-ros register``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the object: its TF frame")
    parser.add_argument("--id", metavar="NAME", help="the same")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=Path, metavar="DIR", help=f"{POSES_FILE} with images and masks")
    source.add_argument("--bag", type=Path, metavar="FILE", help="image, mask and camera_info topics (needs ROS)")
    source.add_argument("--video", type=Path, metavar="FILE", help="with --masks and --camera")
    source.add_argument("--mesh", type=Path, metavar="FILE", help="in metres; its frame is the object's")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="of --video: a video or a folder of images")
    parser.add_argument("--camera", type=Path, metavar="YAML", help="of --video: as camera_calibration writes it")
    parser.add_argument(
        "--poses",
        metavar="FILE",
        help="camera in the fixed frame: `stamp tx ty tz qx qy qz qw` (of a folder: frame numbers from 0), or a "
        f"{POSES_FILE}; 'none': from the images alone, even if the folder has poses",
    )
    parser.add_argument(
        "--ordered", action="store_true", help="of --folder: images are in the order in which they were taken"
    )
    parser.add_argument("--fixed-frame", default="", help="of --bag: TF frame in which the object stands, z up")
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
    parser.add_argument("--instance", type=int, default=0, help="of --bag: id of the object in the mask")
    parser.add_argument(
        "--store", type=Path, default=Path("~/.local/share/nope_ros"), help="folder of registered objects (%(default)s)"
    )
    parser.add_argument("--weights", help="folder of weights; the packaged ones if it is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")


def main(words: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros register", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    given = parser.parse_args(words)
    if given.id is not None:
        given.name = given.id
    if given.name is None:
        parser.error("give the object's NAME")
    console = Console()
    try:
        check_object_id(given.name)
        check_count(given.keyframes)
        store = ObjectStore(given.store)
        estimator = PoseEstimator.from_pretrained(given.weights, device=given.device)
        with Progress(console=Console(stderr=True)) as progress:
            registered = (_from_mesh if given.mesh else _from_walk)(given, estimator, progress, console)
        store.save(registered)
    except InputError as error:
        print(f"nope-ros register: {error}", file=sys.stderr)
        return 2
    known = "" if registered.gravity_known else "; which way is up is not known, so any orientation is possible"
    note = known if given.mesh is None or registered.gravity_known else "; without --up, so any orientation is possible"
    console.print(
        f"Registered '{given.name}' in {store.folder}: {registered.template_count} templates{note}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _from_mesh(
    given: argparse.Namespace, estimator: PoseEstimator, progress: Progress, console: Console
) -> RegisteredObject:
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
    given: argparse.Namespace, estimator: PoseEstimator, progress: Progress, console: Console
) -> RegisteredObject:
    moments, count, trajectory = _recorded(given)
    task = progress.add_task("looking at the frames", total=count)
    without = given.poses == "none"

    def pose_of(index: int, moment: Moment) -> Pose | None:
        if trajectory is not None:
            return trajectory.at(index if moment.stamp is None else moment.stamp / 1e9)
        if without or moment.truth is None:
            return None
        return moment.truth.R_camera_object, moment.truth.t_camera_object

    walk = walk_of(
        moments,
        estimator.predictor.crop_size,
        pose_of,
        z_up=given.z_up or bool(given.fixed_frame),
        ordered=given.folder is None or given.ordered,  # photographs may have been sorted by anything
        progress=lambda: progress.advance(task),
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
    for line in summary(registered.keyframes):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return registered


def _recorded(given: argparse.Namespace) -> tuple[Iterator[Moment], int | None, Trajectory | None]:
    """The frames asked for, how many, and where the camera was if a file tells."""
    trajectory = None
    if given.poses not in (None, "none"):
        path = Path(given.poses).expanduser()
        trajectory = _listed_poses(path) if path.suffix == ".json" else read_trajectory(path)
    if given.video is not None:
        if given.masks is None or given.camera is None:
            raise InputError("video: give --masks (a video or a folder) and --camera (a calibration) with it")
        return video_moments(given.video, given.masks, read_camera(given.camera)), None, trajectory
    topics = Topics(given.image_topic, given.mask_topic, given.camera_info_topic)
    recording = open_recording(given.bag or given.folder, topics=topics, instance=given.instance)
    if given.fixed_frame and given.bag is not None and trajectory is None:
        seen = [(moment.stamp, moment.frame_id) for moment in recording]
        stamps = [stamp for stamp, _ in seen if stamp is not None]
        trajectory = bag_trajectory(given.bag, given.fixed_frame, seen[0][1], stamps)
    moments = iter(recording)
    if given.poses == "none":  # gravity of a folder comes from its poses
        moments = (replace(moment, truth=None) for moment in recording)
    return moments, len(recording), trajectory


def _listed_poses(path: Path) -> Trajectory:
    """The poses of a poses.json, by the number of the image."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        R = np.array([one["R"] for one in images], dtype=np.float64).reshape(-1, 3, 3)
        t = np.array([one["t"] for one in images], dtype=np.float64).reshape(-1, 3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"poses: {path} holds no list `images` with R and t ({error})") from None
    return Trajectory(np.arange(len(R), dtype=float), np.swapaxes(R, 1, 2), -np.einsum("nji,nj->ni", R, t))
