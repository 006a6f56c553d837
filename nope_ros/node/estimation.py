"""From the messages of one moment to the poses of the objects in it: the walk of one frame, without a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from std_msgs.msg import Header

from nope_ros.assignment import assign
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Camera, Frame, InputError, NothingSeenError
from nope_ros.node import messages
from nope_ros.node.distro import TransformError
from nope_ros.node.gravity import Gravity
from nope_ros.node.pairing import FrameMessages
from nope_ros.node.parameters import Settings
from nope_ros.pose import PoseEstimate
from nope_ros.prior import Prior
from nope_ros.refine import Query
from nope_ros.stopwatch import stage
from nope_ros.tracking import Tracker

Array = NDArray[np.float64]
Complain = Callable[[object], None]


@dataclass(frozen=True)
class Seen:
    """An object that was found: its id in the mask, its pixels (H, W), what it is, and where."""

    instance: int
    mask: NDArray[np.bool_]
    registered: RegisteredObject
    estimate: PoseEstimate

    @property
    def centre_object(self) -> Array:
        """Centre of the object (3,) in the object frame."""
        return -self.registered.reference.offset_object

    @property
    def radius(self) -> float:
        """Radius of the object's outline, in the pose's unit of length."""
        return self.registered.reference.radius


@dataclass(frozen=True)
class Result:
    """What was found in one image.

    Attributes:
        header: of the image.
        image: (H, W, 3) RGB, undistorted.
        camera: its calibration, without distortion.
        seen: objects, each at most once.
    """

    header: Header
    image: NDArray[np.uint8]
    camera: Camera
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class Scene:
    """What a frame's messages hold.

    Attributes:
        image: (H, W, 3) RGB, undistorted.
        camera: its calibration, without distortion.
        instances: by its id in the mask, each instance that can be looked at.
    """

    image: NDArray[np.uint8]
    camera: Camera
    instances: dict[int, Frame]


# A camera, DDS and other nodes want cores too, and a network that waits for all its threads waits for the last.
_DEFAULT_THREADS = max(1, torch.get_num_threads() // 2)


def use_threads(count: int) -> None:
    """Let the calling thread compute with so many; 0: half of the cores. OpenMP keeps the number by thread."""
    torch.set_num_threads(count or _DEFAULT_THREADS)


def load_estimator(settings: Settings) -> PoseEstimator:
    """The model that the parameters name.

    Raises:
        InputError: if it is missing, damaged or of another version.
    """
    use_threads(settings.threads)
    return PoseEstimator.from_pretrained(
        settings.weights or None,
        device=settings.device,
        batch_size=settings.batch_size,
        refinement=settings.refinement,
    )


def estimate(
    received: FrameMessages,
    objects: Sequence[RegisteredObject],
    estimator: PoseEstimator,
    settings: Settings,
    gravity: Gravity,
    complain: Complain,
    tracker: Tracker | None = None,
) -> Result:
    """Find the registered objects in a frame.

    Args:
        received: the frame's messages.
        objects: those to look for.
        estimator: the model.
        settings: thresholds and prior.
        gravity: asked for the moment of the image.
        complain: told of what is wrong but can be gone on with.
        tracker: what earlier frames told, where objects are followed if the parameters say so.

    Raises:
        InputError: if the frame cannot be used.
    """
    header = received.image.header
    if tracker is not None:
        tracker.keep(objects if settings.tracking_enabled else ())
    with stage("read"):
        scene = read(received, settings, complain)
    instances, frames = list(scene.instances), list(scene.instances.values())
    if not objects or not frames:
        return Result(header, scene.image, scene.camera, ())
    down = gravity_at(gravity, header.frame_id, received.stamp, complain)
    queries = [estimator.look(frame, down) for frame in frames]
    priors = [prior_of(one, settings, down is not None, complain) for one in objects]
    # Which instance is which object is told by similarities alone; a pose costs more, and one is made for each pair.
    similarity = np.array([estimator.similarities(query, objects) for query in queries])
    R_fixed_camera = orientation_of(header.frame_id, received.stamp, gravity, settings, complain)
    seen = []
    for row, column in assign(similarity, settings.similarity_threshold):
        query, registered = queries[row], objects[column]
        pose = estimator.match(query, registered, priors[column])
        following = tracker if settings.tracking_enabled else None
        if following is not None:
            with stage("pose"):
                pose = following.update(query, registered, pose, received.stamp / 1e9, R_fixed_camera)
        pose = refined(query, registered, pose, estimator, settings, complain)
        if following is not None:
            pose = following.refined(query, registered, pose)
        seen.append(Seen(instances[row], frames[row].mask, registered, pose))
    return Result(header, scene.image, scene.camera, tuple(seen))


def read(received: FrameMessages, settings: Settings, complain: Complain) -> Scene:
    """A frame's messages as arrays, undistorted, an instance at a time.

    Raises:
        InputError: if the frame cannot be used.
    """
    messages.check_together(received.image, received.mask, received.camera_info)
    image = messages.image_array(received.image)
    camera = messages.camera(received.camera_info, rectified=settings.rectified)
    ids = messages.mask_array(received.mask)
    # The whole mask as one object: checks and undistorts the image once for all instances.
    try:
        whole = Frame.from_arrays(image, ids, camera, depth_of(received, image.shape[:2], complain))
    except NothingSeenError as error:  # as when the object has left: whoever follows it is told of no pose
        complain(str(error))
        return Scene(camera.undistort(image), camera.without_distortion(), {})
    cut = np.unique(np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]]))
    ids = camera.undistort(ids, cv2.INTER_NEAREST).astype(np.uint16)
    instances: dict[int, Frame] = {}
    for instance in messages.instances(ids, settings.max_instances):
        try:
            frame = Frame(whole.image, ids == instance, whole.camera, whole.depth, bool(instance in cut))
        except InputError as error:
            complain(f"{error} (instance {instance})")
            continue
        if frame.touches_border:
            complain(
                f"mask: instance {instance} reaches the image's border; the object is cut off, its pose unreliable"
            )
        instances[instance] = frame
    return Scene(whole.image, whole.camera, instances)


def depth_of(received: FrameMessages, shape: tuple[int, ...], complain: Complain) -> NDArray[np.float32] | None:
    """The frame's depth (H, W), metres, or None, after a complaint where what came can't be used."""
    if received.depth is None:
        return None
    try:
        depth = messages.depth_array(received.depth)
    except InputError as error:
        complain(f"{error}; going on without depth")
        return None
    frame, own = received.image.header.frame_id, received.depth.header.frame_id
    if frame and own and own != frame:
        complain(
            f"depth: is of the frame '{own}', the image of '{frame}'; publish depth registered to the image; going on "
            "without depth"
        )
        return None
    if depth.shape != shape:
        complain(
            f"depth: size {depth.shape[1]}x{depth.shape[0]} differs from the image's {shape[1]}x{shape[0]}; publish "
            "depth registered to the image; going on without depth"
        )
        return None
    return depth


def gravity_at(gravity: Gravity, frame_id: str, stamp: int, complain: Complain) -> Array | None:
    """Down in the camera at a moment, or None after a complaint: a pose without gravity is better than none."""
    try:
        return gravity.down(frame_id, stamp)
    except InputError as error:
        complain(f"{error}; going on without gravity")
        return None


def prior_of(registered: RegisteredObject, settings: Settings, gravity_known: bool, complain: Complain) -> Prior | None:
    """What to assume of an object's orientation: None lets gravity decide; 'free' where the prior can't be used."""
    wanted = settings.prior
    if wanted == "auto":
        return None
    needs_query = wanted == "standing"
    if wanted == "free" or (registered.gravity_known and (gravity_known or not needs_query)):
        return wanted
    complain(f"prior: '{wanted}' needs gravity, which is not known for '{registered.object_id}'; using 'free'")
    return "free"


def orientation_of(frame_id: str, stamp: int, gravity: Gravity, settings: Settings, complain: Complain) -> Array | None:
    """R_fixed_camera (3, 3) at a moment (ns) for tracking; None if it is not wanted, or after a complaint not known."""
    if not settings.fixed_frame or gravity.transforms is None:
        return None
    try:
        return gravity.transforms.rotation(settings.fixed_frame, frame_id, stamp, gravity.timeout)
    except TransformError as error:
        complain(f"tracking: {error}; going on without the camera's motion")
        return None


def refined(
    query: Query,
    registered: RegisteredObject,
    estimate: PoseEstimate,
    estimator: PoseEstimator,
    settings: Settings,
    complain: Complain,
) -> PoseEstimate:
    """The estimate as the parameter ``refinement`` wants it; as it is, after a complaint, where that can't be had."""
    try:
        return estimator.refine(query, registered, estimate, settings.refinement)
    except InputError as error:
        complain(f"refinement: {error}; going on without")
        return estimate
