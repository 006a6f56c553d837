"""Registration from many views: a walk around an object becomes one object frame and a set of keyframes.

After object-centric video learning (Sommer et al., "Unsupervised Learning of Category-Level 3D Pose from
Object-Centric Videos", CVPR 2024), without its structure from motion: a camera that knows where it is (TF, SLAM) gives
the poses, or else our own relative rotations do, made consistent over the graph of views.

    walk = Walk(crop_size)
    walk.add("0001.jpg", frame, pose=(R_camera_fixed, t_camera_fixed))    # or without a pose; tells if it is refused
    plan = plan_keyframes(walk, encode, predictor)                         # which views, and the object frame

The *fixed* frame is any frame in which the object does not move: a map, or a turntable's plate. The *object* frame has
its origin where the views' central rays meet, z up, and the first keyframe at zero yaw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from nope_ros.averaging import average_rotations
from nope_ros.crop import Crop, roll_of_gravity, rolled, virtual_crop
from nope_ros.frame import Frame, InputError
from nope_ros.latent import Predictor, RotatedLatentPredictor
from nope_ros.match import ViewsBank
from nope_ros.pose import Sides, distance_from_depth
from nope_ros.prior import free_rotations
from nope_ros.rotations import exp, geodesic_distance, icosphere

Array = NDArray[np.float64]
Pose = tuple[Array, Array]
"""R_camera_fixed (3, 3) and t_camera_fixed (3,): x_camera = R x_fixed + t."""
Scale = Literal["poses", "depth", "reference_distance", "object_diameter", "unknown"]
"""What made lengths metres."""
Encode = Callable[[Sequence[Crop]], Tensor]

KEYFRAMES = 16
FEWEST = 3
"""Keyframes and frames of a walk, at least: what fewer see is one side."""
# Views nearer to each other than this show the same.
_NOTHING_NEW = np.radians(5.0)
# A mask whose second largest piece is more than this share of it has been cut in two.
_SECOND_PIECE = 0.25
# Relative to the median of its neighbours: a blurred view's detail, a wrong mask's size.
_BLURRED = 0.45
_BLURRED_BEYOND_ALL = 0.2
_SIZE_JUMP = 1.8
_NEIGHBOURS = 4
_NEAR = np.radians(35.0)
# The central ray passes the object's centre at this share of its radius, or the mask shows something else.
_OFF_CENTRE = 0.5
# Views whose relative rotations are estimated where no camera poses are given: the number of pairs grows by its square.
_GRAPH = 32
HULL_DIRECTIONS = icosphere(2)
"""Object frame, (162, 3): where a hull's radius is known."""


@dataclass(frozen=True)
class View:
    """One frame of a walk that can be used.

    Attributes:
        name: of the frame.
        crop: the object in it.
        sharpness: detail within the outline, independent of contrast; comparable between views of one object only.
        gravity_camera: (3,) unit vector, or None.
        pose: of the fixed frame in the camera, or None.
        distance: metres from the camera to the object's centre by depth, or None.
    """

    name: str
    crop: Crop
    sharpness: float
    gravity_camera: Array | None = None
    pose: Pose | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A frame that is not used, and why."""

    name: str
    reason: str


class Walk:
    """Collects the frames of a walk in the order in which they were taken; keeps crops only, some 65 kB a frame.

    Args:
        crop_size: side of the predictor's crops, pixels.
        ordered: whether frames come as they were taken, so that those next to each other show nearly the same; helps
            where camera poses are not given.

    Attributes:
        views: frames that can be used, so far as one frame alone can tell.
        refused: the others.
    """

    def __init__(self, crop_size: int, *, ordered: bool = True) -> None:
        self.crop_size = crop_size
        self.ordered = ordered
        self.views: list[View] = []
        self.refused: list[Refusal] = []

    def __len__(self) -> int:
        return len(self.views) + len(self.refused)

    @property
    def coverage(self) -> float:
        """Share (0..1) of all directions that are less than 30° from a view's; of views with camera poses."""
        seen = [-view.crop.R_virtual_camera[2] @ view.pose[0] for view in self.views if view.pose is not None]
        if not seen:
            return 0.0
        return float(((icosphere(2) @ np.stack(seen).T).max(axis=1) > np.cos(np.radians(30))).mean())

    def add(
        self, name: str, frame: Frame, *, gravity_camera: Array | None = None, pose: Pose | None = None
    ) -> Refusal | None:
        """Look at a frame.

        Args:
            name: for messages.
            frame: image, mask, camera; depth gives metric scale where poses do not.
            gravity_camera: (3,) direction of gravity (down) in camera axes.
            pose: R_camera_fixed (3, 3) and t_camera_fixed (3,).

        Returns:
            Why it is refused, or None.
        """
        if frame.touches_border:
            return self.refuse(name, "the object reaches the image's border, a part of it is not seen")
        pieces = _piece_areas(frame)
        if len(pieces) > 1 and pieces[1] > _SECOND_PIECE * sum(pieces):
            return self.refuse(
                name, f"the mask is in pieces, the second with {pieces[1] / sum(pieces):.0%} of its area"
            )
        if pose is not None and not (
            np.allclose(pose[0] @ pose[0].T, np.eye(3), atol=1e-3)
            and np.linalg.det(pose[0]) > 0
            and np.isfinite(pose[1]).all()
        ):
            return self.refuse(name, "the camera pose is no rotation and translation")
        down = None if gravity_camera is None else gravity_camera / np.linalg.norm(gravity_camera)
        crop = virtual_crop(frame, self.crop_size, down)
        distance = None
        if frame.depth is not None:
            try:
                distance = distance_from_depth(frame, crop)
            except InputError:  # holes in the depth: other frames have it
                distance = None
        self.views.append(View(name, crop, sharpness(crop), down, pose, distance))
        return None

    def refuse(self, name: str, reason: str) -> Refusal:
        """Note a frame that could not even be read."""
        refusal = Refusal(name, reason)
        self.refused.append(refusal)
        return refusal


def _piece_areas(frame: Frame) -> list[float]:
    x0, y0, x1, y1 = frame.bbox_xyxy
    _, _, statistics, _ = cv2.connectedComponentsWithStats(frame.mask[y0:y1, x0:x1].astype(np.uint8))
    return sorted(statistics[1:, cv2.CC_STAT_AREA].astype(float).tolist(), reverse=True)


def sharpness(crop: Crop) -> float:
    """How fine the detail is that a crop shows: energy of its Laplacian over that of its gradient, within the outline.

    A ratio, since the side without print is not a blurred view. The outline, cut by the mask, is always sharp.
    """
    inside = cv2.erode((crop.mask > 250).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    if inside.sum() < 50:
        return np.inf  # too thin to tell
    grey = cv2.cvtColor(crop.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    slope = cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=0.125) ** 2 + cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=0.125) ** 2
    bend = cv2.Laplacian(grey, cv2.CV_32F) ** 2
    return float(bend[inside].mean() / (slope[inside].mean() + 1.0))


@dataclass(frozen=True)
class Provenance:
    """Where an object frame comes from.

    Attributes:
        poses: "given", or "estimated" from our own relative rotations.
        up: "gravity"; "turntable", the axis about which the camera went; or "image", cameras being held upright.
        scale: what made lengths metres: "poses", "depth", "reference_distance", "object_diameter"; or "unknown".
        frames: how many frames the walk had.
        refused: how many of them were not used.
        residual_deg: median disagreement of relative rotations with the poses (estimated poses), degrees.
        edges: relative rotations used (estimated poses).
        outliers: how many of those were found to be wrong.
        off_centre: median distance of the central rays from the origin over the object's radius (given poses).
        agreement: share of keyframes whose rotation the others find within 30°, each left out in turn.
    """

    poses: Literal["given", "estimated"]
    up: Literal["gravity", "turntable", "image"]
    scale: Scale
    frames: int
    refused: int
    residual_deg: float | None = None
    edges: int = 0
    outliers: int = 0
    off_centre: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Keyframes:
    """The views that an object was registered from.

    Attributes:
        names: of the frames.
        latents: (K, D) of the crops.
        R_virtual_object: (K, 3, 3) object frame to each crop's virtual camera.
        R_camera_object: (K, 3, 3) object frame to each camera.
        spread: factor on the temperature, as keyframes contradict each other more or less than in training.
        R_fixed_object: (3, 3), the object frame in the frame of the camera poses.
        t_fixed_object: (3,) its origin there.
        hull: (162,) how far the outlines let the object reach from its origin in each of ``HULL_DIRECTIONS``, in the
            unit of the object's poses.
        provenance: of the object frame.
        refused: frames that were not used, and why; not kept on disk.
        normalised: how keyframes are compared with each other, see ``ViewsBank``.
        crops: (K, S, S, 4) uint8 RGB and mask, for other networks to look at; None in older files.
        seen_at: (K, 162, 2) pixels of the crops at which the hull's points are seen, NaN where hidden; or None.
        distance: (K,) as of ``Sides``, as are the next two; None in older files.
        angular_radius: (K,).
        offset_object: (K, 3).
    """

    names: tuple[str, ...]
    latents: Tensor
    R_virtual_object: Array
    R_camera_object: Array
    spread: float
    R_fixed_object: Array
    t_fixed_object: Array
    hull: Array
    provenance: Provenance
    refused: tuple[Refusal, ...] = ()
    normalised: float = 1.0
    crops: NDArray[np.uint8] | None = None
    seen_at: NDArray[np.float32] | None = None
    distance: Array | None = None
    angular_radius: Array | None = None
    offset_object: Array | None = None

    @property
    def sides(self) -> Sides | None:
        """What the object is from each keyframe's side; None of older files."""
        if self.crops is None or self.distance is None or self.angular_radius is None or self.offset_object is None:
            return None
        return Sides(self.R_virtual_object, self.crops, self.distance, self.angular_radius, self.offset_object)

    @property
    def sized(self) -> bool:
        """Whether it is known how large the object is from each keyframe's side; else all but the first are guesses."""
        return self.provenance.poses == "given" or self.provenance.scale == "depth"

    @property
    def directions(self) -> Array:
        """Unit vectors (K, 3) from the object to each camera, object frame."""
        directions: Array = -self.R_virtual_object[:, 2]
        return directions


@dataclass(frozen=True)
class Plan:
    """A walk made ready for registration.

    Attributes:
        keyframes: see there.
        views: (K) of the keyframes, the reference first.
        R_camera_object: (3, 3) of the first.
        t_camera_object: (3,) of the first, in the unit of the walk: of its poses, or else the object's radius.
        radius: of the object in that unit.
        gravity_known: whether the object's z axis is up in the world.
    """

    keyframes: Keyframes
    views: tuple[View, ...]
    R_camera_object: Array
    t_camera_object: Array
    radius: float
    gravity_known: bool


def plan_keyframes(
    walk: Walk,
    encode: Encode,
    predictor: Predictor,
    *,
    count: int = KEYFRAMES,
    poses_metric: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Choose keyframes and the object frame.

    Args:
        walk: the frames.
        encode: crops to latents (B, D).
        predictor: what made the latents.
        count: of keyframes, at most; not fewer than ``FEWEST``.
        poses_metric: whether translations of the poses are metres.
        report: told what is being done.

    Raises:
        InputError: if fewer than three frames are left, with the most frequent reason; or if all look from one side.
    """
    check_count(count)
    given = sum(view.pose is not None for view in walk.views) >= FEWEST
    oriented = _oriented_by_poses(walk, report) if given else _oriented_by_images(walk, encode, predictor, report)
    views, rotations = list(oriented.views), oriented.rotations
    R_virtual = np.stack([view.crop.R_virtual_camera for view in views]) @ rotations  # of the fixed frame
    chosen = farthest(-R_virtual[:, 2], count, np.array([_crispness(view) for view in views]))
    if len(chosen) < FEWEST:
        directions = "1 direction" if len(chosen) == 1 else f"{len(chosen)} directions"
        raise InputError(
            f"walk: its {len(views)} frames look from {directions} only that differ by "
            f"{np.degrees(_NOTHING_NEW):.0f}° or more; go round the object, or register it from one image"
        )
    up, how = _up(views, rotations)
    R_fixed_object = _frame_of(up, -R_virtual[0, 2])
    if how != "image":  # gravity is known after all, also where a frame came without: crops as if it had had it
        views = [
            view if view.gravity_camera is not None else _levelled(view, -rotation @ up)
            for view, rotation in zip(views, rotations, strict=True)
        ]
    views, rotations = [views[index] for index in chosen], rotations[chosen]
    R_camera_object = rotations @ R_fixed_object
    R_virtual_object = np.stack([view.crop.R_virtual_camera for view in views]) @ R_camera_object
    report(f"encoding {len(views)} keyframes")
    latents = encode([view.crop for view in views])
    left = left_out(predictor, latents, R_virtual_object)
    axes = np.stack([view.crop.R_virtual_camera[2] for view in views])
    angular_radius = np.array([view.crop.angular_radius for view in views])
    if given:
        translations = np.stack([_pose(view)[1] for view in views]) + rotations @ oriented.origin
        distance = (axes * translations).sum(axis=1)
        radius = float(np.median(distance * angular_radius))
    else:  # each camera looks at the centre
        distance, radius = _distances(views), 1.0
        translations = distance[:, None] * axes
    hull = outline_radii(views, R_camera_object, translations)
    from_circle = translations - distance[:, None] * axes  # to the origin, camera axes
    provenance = Provenance(
        poses="given" if given else "estimated",
        up=how,
        scale="poses" if given and poses_metric else "unknown",
        frames=len(walk),
        refused=len(oriented.refused),
        residual_deg=oriented.residual_deg,
        edges=oriented.edges,
        outliers=oriented.outliers,
        off_centre=oriented.off_centre,
        agreement=left.agreement,
    )
    keyframes = Keyframes(
        names=tuple(view.name for view in views),
        latents=latents,
        R_virtual_object=R_virtual_object,
        R_camera_object=R_camera_object,
        spread=left.spread,
        normalised=left.normalised,
        R_fixed_object=R_fixed_object,
        t_fixed_object=oriented.origin,
        hull=hull,
        provenance=provenance,
        refused=oriented.refused,
        crops=np.stack([np.dstack([view.crop.image, view.crop.mask]) for view in views]),
        seen_at=hull_pixels(views, R_camera_object, translations, hull),
        distance=distance,
        angular_radius=angular_radius,
        offset_object=np.einsum("kji,kj->ki", R_camera_object, from_circle),
    )
    return Plan(keyframes, tuple(views), R_camera_object[0], translations[0], radius, how != "image")


def radius_by_depth(views: Sequence[View]) -> float | None:
    """The object's radius, metres, as the views with depth have it; None if none has."""
    measured = [view.distance * view.crop.angular_radius for view in views if view.distance is not None]
    return float(np.median(measured)) if measured else None


def _distances(views: Sequence[View]) -> Array:
    """Of the object's centre from each camera (K,), in radii of the object: as depth has it.

    Where there is none, from where the circle around the outline has that radius, as if all sides were as large.
    """
    radius = radius_by_depth(views)
    return np.array(
        [
            1 / view.crop.angular_radius if radius is None or view.distance is None else view.distance / radius
            for view in views
        ]
    )


@dataclass(frozen=True)
class _Oriented:
    """Views that can be used, with their rotations.

    Attributes:
        views: N of them, at least ``FEWEST``.
        rotations: (N, 3, 3) R_camera_fixed.
        refused: the walk's other frames.
        origin: (3,) of the object in the fixed frame; zero where only rotations are known.
        off_centre: as of ``Provenance``, as are the next three.
        residual_deg: of estimated poses.
        edges: likewise.
        outliers: likewise.
    """

    views: tuple[View, ...]
    rotations: Array
    refused: tuple[Refusal, ...]
    origin: Array = field(default_factory=lambda: np.zeros(3))
    off_centre: float | None = None
    residual_deg: float | None = None
    edges: int = 0
    outliers: int = 0


def _oriented_by_poses(walk: Walk, report: Callable[[str], None]) -> _Oriented:
    """The frame of the camera poses is the fixed frame; the object is where the central rays meet."""
    posed = [view for view in walk.views if view.pose is not None]
    unposed = [Refusal(view.name, "no camera pose is known for it") for view in walk.views if view.pose is None]
    report("looking for blurred frames and wrong masks")
    views, outliers = _without_outliers(posed, given=True, ordered=walk.ordered)
    refused = [*walk.refused, *unposed, *outliers]
    _check_enough(views, refused, walk)
    oriented = _met(views, refused)
    _check_enough(oriented.views, oriented.refused, walk)
    return oriented


def _oriented_by_images(walk: Walk, encode: Encode, predictor: Predictor, report: Callable[[str], None]) -> _Oriented:
    """Rotations from a common frame, made of what the images say about each pair of views."""
    report("looking for blurred frames and wrong masks")
    views, outliers = _without_outliers(walk.views, given=False, ordered=walk.ordered)
    refused = [*walk.refused, *outliers]
    _check_enough(views, refused, walk)
    if not isinstance(predictor, RotatedLatentPredictor):
        raise InputError(
            f"poses: {predictor.name} can't tell camera motion from images alone; give camera poses (TF or a file)"
        )
    views = _spread_over_time(views, _GRAPH)
    report(f"relative rotations of {len(views)} frames")
    latents = encode([view.crop for view in views]).reshape(-1, *predictor.latent_shape)
    averaged = average_rotations(
        latents, [_gravity_virtual(view) for view in views], predictor.temperature, ordered=walk.ordered
    )
    R_virtual_camera = np.stack([view.crop.R_virtual_camera for view in views])
    rotations = np.swapaxes(R_virtual_camera, 1, 2) @ averaged.rotations
    agrees = averaged.agreeing >= 0.25
    refused += [
        Refusal(view.name, "its rotation relative to the others contradicts most of them")
        for view, good in zip(views, agrees, strict=True)
        if not good
    ]
    views = [view for view, good in zip(views, agrees, strict=True) if good]
    _check_enough(views, refused, walk)
    return _Oriented(
        tuple(views),
        rotations[agrees],
        tuple(refused),
        residual_deg=averaged.residual_deg,
        edges=averaged.edges,
        outliers=averaged.outliers,
    )


def check_count(keyframes: int) -> None:
    """Raise InputError if so many keyframes are too few."""
    if keyframes < FEWEST:
        raise InputError(f"keyframes: {keyframes} are too few to know an object from several sides; {FEWEST} at least")


def _check_enough(views: Sequence[View], refused: Sequence[Refusal], walk: Walk) -> None:
    if len(views) >= FEWEST:
        return
    reasons = [refusal.reason for refusal in refused]
    most = f"; refused most often: {max(set(reasons), key=reasons.count)}" if reasons else ""
    raise InputError(f"walk: {len(views)} of {len(walk)} frames can be used, at least {FEWEST} are needed{most}")


def _pose(view: View) -> Pose:
    assert view.pose is not None
    return view.pose


def _gravity_virtual(view: View) -> Array | None:
    return None if view.gravity_camera is None else view.crop.R_virtual_camera @ view.gravity_camera


def _without_outliers(views: Sequence[View], *, given: bool, ordered: bool) -> tuple[list[View], list[Refusal]]:
    """Views that are neither blurred nor of another size than those taken next to them, or from about there; the rest.

    Args:
        views: all with a pose, if poses are given.
        given: whether they are; views from about the same place then count as next to each other.
        ordered: whether views are as they were taken. If neither, none is known to be next to another: sides may well
            differ in size, and only what is blurred beyond all the others is refused.
    """
    count = len(views)
    order = np.arange(count)
    beside = near = np.abs(order[:, None] - order) <= (_NEIGHBOURS if ordered else 0)
    blurred, others = _BLURRED, "the frames next to it"
    size = np.array([view.crop.angular_radius for view in views])
    if given:
        forward = np.stack([view.crop.R_virtual_camera[2] @ _pose(view)[0] for view in views])
        cosine = forward @ forward.T
        near = cosine > np.cos(_NEAR)
        # What detail there is to see changes less from side to side than the outline does: the nearest will do.
        beside = near | (cosine >= -np.sort(-cosine, axis=1)[:, [min(_NEIGHBOURS, count - 1)]])
        centres = np.stack([-_pose(view)[0].T @ _pose(view)[1] for view in views])
        if np.ptp(centres, axis=0).max() < 1e-9:
            raise InputError(
                "poses: all cameras are at one place, so where the object is stays open; choose a fixed frame in "
                "which the camera moves, or leave the poses out"
            )
        middle = meeting_point(centres, forward)[0]
        size = size * np.linalg.norm(centres - middle, axis=1)
    elif not ordered:
        beside = np.ones((count, count), dtype=bool)
        blurred, others = _BLURRED_BEYOND_ALL, "the other frames"
    beside, near = (one & ~np.eye(count, dtype=bool) for one in (beside, near))
    detail = np.array([view.sharpness for view in views])
    kept, refused = [], []
    for index, view in enumerate(views):
        if beside[index].sum() >= 3:
            usual = float(np.median(detail[beside[index]]))
            share = detail[index] / usual if 0 < usual < np.inf else 1.0  # else they are too thin to tell
            if share < blurred:
                refused.append(Refusal(view.name, f"blurred: {share:.0%} of the detail of {others}"))
                continue
        if near[index].sum() >= 3:
            ratio = float(size[index] / np.median(size[near[index]]))
            if not 1 / _SIZE_JUMP < ratio < _SIZE_JUMP:
                refused.append(
                    Refusal(view.name, f"the mask shows the object {ratio:.1f} times as large as the frames next to it")
                )
                continue
        kept.append(view)
    return kept, refused


def meeting_point(centres: Array, directions: Array) -> tuple[Array, Array]:
    """The point nearest to rays, and how far each passes it.

    Least squares with weights 1 / (1 + (distance / 2·median)²)² (Geman–McClure), as a few rays go elsewhere.

    Args:
        centres: (N, 3) where rays begin.
        directions: (N, 3) unit vectors.

    Returns:
        (3,) the point, and (N,) distances.
    """
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    weights = np.ones(len(centres))
    for _ in range(20):
        # A trace of the identity keeps parallel rays, which meet nowhere, from dividing by zero.
        A = np.einsum("n,nij->ij", weights, across) + 1e-9 * np.eye(3)
        point = np.linalg.solve(A, np.einsum("n,nij,nj->i", weights, across, centres))
        distances = np.linalg.norm(np.einsum("nij,nj->ni", across, point - centres), axis=1)
        scale = 2 * np.median(distances) + 1e-12
        weights = 1 / (1 + (distances / scale) ** 2) ** 2
    return point, distances


def _met(views: Sequence[View], refused: Sequence[Refusal]) -> _Oriented:
    """Those of views with poses whose central ray meets those of the others."""
    rotations = np.stack([_pose(view)[0] for view in views])
    translations = np.stack([_pose(view)[1] for view in views])
    centres = -np.einsum("nji,nj->ni", rotations, translations)
    axes = np.stack([view.crop.R_virtual_camera[2] for view in views])
    directions = np.einsum("nji,nj->ni", rotations, axes)
    point, distances = meeting_point(centres, directions)
    along = np.einsum("ni,ni->n", point - centres, directions)
    radius = float(np.median(along * [view.crop.angular_radius for view in views]))
    if radius <= 0:
        raise InputError(
            "poses: the cameras do not look at one point in front of them; the object must stand still in the frame of "
            "the poses, and poses be x_camera = R x_fixed + t"
        )
    # Poses that err by a few degrees move all rays: an outlier is one that errs more than the others do.
    limit = max(_OFF_CENTRE * radius, 3 * float(np.median(distances)))
    good = (distances < limit) & (along > 0)
    strays = [
        Refusal(view.name, f"the mask is {off:.1f} radii away from where others see the object")
        for view, off, meets in zip(views, distances / radius, good, strict=True)
        if not meets
    ]
    return _Oriented(
        tuple(view for view, meets in zip(views, good, strict=True) if meets),
        rotations[good],
        (*refused, *strays),
        origin=point,
        off_centre=float(np.median(distances) / radius),
    )


def _spread_over_time(views: list[View], count: int) -> list[View]:
    """At most this many, one from each stretch of the walk, the sharpest; the first stays first."""
    if len(views) <= count:
        return views
    edges = np.linspace(0, len(views), count + 1).round().astype(int)
    return [views[0]] + [max(views[start:end], key=_crispness) for start, end in pairwise(edges[1:])]


def _crispness(view: View) -> float:
    """To choose by: of a view too thin to tell, nothing is known to be sharp."""
    return view.sharpness if np.isfinite(view.sharpness) else 0.0


def farthest(directions: Array, count: int, sharp: Array | None = None) -> list[int]:
    """Indices of directions (N, 3), each farthest from those before; starts with the first.

    Args:
        directions: unit vectors.
        count: how many, at most; fewer if the rest shows nothing new.
        sharp: (N,) preferred among those nearly as far.
    """
    chosen = [0]
    angle = np.arccos(np.clip(directions @ directions[0], -1, 1))
    while len(chosen) < min(count, len(directions)) and angle.max() > _NOTHING_NEW:
        far = np.flatnonzero(angle >= 0.9 * angle.max())
        best = int(far[np.argmax(angle[far] if sharp is None else sharp[far])])
        chosen.append(best)
        angle = np.minimum(angle, np.arccos(np.clip(directions @ directions[best], -1, 1)))
    return chosen


def _up(views: Sequence[View], rotations: Array) -> tuple[Array, Literal["gravity", "turntable", "image"]]:
    """Up (3,) in the fixed frame, and how it is known; ``rotations`` (N, 3, 3) are R_camera_fixed."""
    felt = [
        -rotation.T @ view.gravity_camera
        for view, rotation in zip(views, rotations, strict=True)
        if view.gravity_camera is not None
    ]
    if felt:
        return _unit(np.median(felt, axis=0)), "gravity"
    image_up = -rotations[:, 1].mean(axis=0)
    directions = -np.stack([view.crop.R_virtual_camera[2] @ R for view, R in zip(views, rotations, strict=True)])
    values, vectors = np.linalg.eigh(np.cov(directions.T))
    # Directions on a circle: thin across its plane, and wide within it.
    axis, upright = vectors[:, 0], float(vectors[:, 0] @ image_up)
    # Directions on a circle: thin across its plane, and wide within it. On one that leads over the top, the axis lies.
    if len(views) >= 6 and values[0] < 0.1**2 and values[1] > 0.4**2 and abs(upright) > 0.3:
        return axis * np.sign(upright), "turntable"
    if np.linalg.norm(image_up) < 0.1:  # held every way: the first is as good as any
        image_up = -rotations[0, 1]
    return _unit(image_up), "image"


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    unit: Array = vector / max(length, 1e-12)
    return unit


def _frame_of(up: Array, direction: Array) -> Array:
    """R_fixed_object (3, 3): z is up, x points to the first camera, as far as that is level."""
    x = direction - up * (up @ direction)
    if np.linalg.norm(x) < 1e-3:  # it looked straight down
        x = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    x = _unit(x)
    return np.stack([x, np.cross(up, x), up], axis=1)


def _levelled(view: View, gravity_camera: Array) -> View:
    crop = view.crop
    roll = roll_of_gravity(crop.R_virtual_camera, gravity_camera)
    if roll is None:
        return replace(view, gravity_camera=gravity_camera)
    image, mask = rolled(crop.image, roll), rolled(crop.mask, roll)
    R = exp(np.array([0.0, 0.0, roll])) @ crop.R_virtual_camera
    return replace(
        view,
        crop=replace(crop, image=image, mask=mask, R_virtual_camera=R, roll_known=True),
        gravity_camera=gravity_camera,
    )


def outline_radii(views: Sequence[View], R_camera_object: Array, t_camera_object: Array) -> Array:
    """How far along each of ``HULL_DIRECTIONS`` points still lie within all outlines but one in ten: (162,).

    Args:
        views: with their crops.
        R_camera_object: (K, 3, 3).
        t_camera_object: (K, 3) of the object's origin.
    """
    steps = 40  # of the radius
    distance = np.linalg.norm(t_camera_object, axis=1)
    reach = float(np.max(distance * [view.crop.angular_radius for view in views])) * 1.1
    radii = (np.arange(steps) + 1) / steps * reach
    points = (HULL_DIRECTIONS[:, None] * radii[:, None]).reshape(-1, 3)
    inside = np.zeros(len(points))
    for view, R, t in zip(views, R_camera_object, t_camera_object, strict=True):
        seen = (points @ R.T + t) @ (view.crop.K_virtual @ view.crop.R_virtual_camera).T
        pixel = np.round(seen[:, :2] / np.maximum(seen[:, 2:], 1e-9)).astype(int)
        size = view.crop.mask.shape[0]
        within = ((pixel >= 0) & (pixel < size)).all(axis=1) & (seen[:, 2] > 0)
        column, row = np.clip(pixel, 0, size - 1).T
        inside += within & (view.crop.mask[row, column] > 127)
    kept = (inside >= 0.9 * len(views)).reshape(-1, steps)
    # The farthest point of the object in that direction: a mug's hollow and its handle's hole do not end it.
    last = np.where(kept.any(axis=1), steps - np.argmax(kept[:, ::-1], axis=1), 0)
    farthest_inside: Array = last / steps * reach
    return farthest_inside


def hull_pixels(
    views: Sequence[View], R_camera_object: Array, t_camera_object: Array, hull: Array
) -> NDArray[np.float32]:
    """Where in each view's crop the hull's points are seen: (K, 162, 2) pixels, NaN where the hull itself hides them.

    Args:
        views: with their crops.
        R_camera_object: (K, 3, 3).
        t_camera_object: (K, 3) of the object's origin.
        hull: (162,) radii in ``HULL_DIRECTIONS``.
    """
    points = hull[:, None] * HULL_DIRECTIONS
    found = np.full((len(views), len(points), 2), np.nan, np.float32)
    for index, (view, R, t) in enumerate(zip(views, R_camera_object, t_camera_object, strict=True)):
        towards = -R.T @ t - points
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        # Steps from each point towards the camera; the surface is in the way where it reaches farther out than they do.
        steps = points[:, None] + np.linspace(0.1, 1.5, 15)[:, None] * np.max(hull) * towards[:, None]
        far = np.linalg.norm(steps, axis=2)
        nearest = np.argmax(steps @ HULL_DIRECTIONS.T, axis=2)
        clear = (far > 0.97 * hull[nearest]).all(axis=1) & (hull > 0)
        pixel = (points @ R.T + t) @ (view.crop.K_virtual @ view.crop.R_virtual_camera).T
        found[index, clear] = pixel[clear, :2] / pixel[clear, 2:]
    return found


_NORMALISED = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class LeftOut:
    """How well keyframes foretell each other.

    Attributes:
        spread: factor on the temperature under which the keyframes' own rotations are most probable, drawn towards one
            as they are few.
        normalised: see ``ViewsBank``; under which most of them are found.
        agreement: share that is found within 30°; None for predictors for which this would take minutes.
    """

    spread: float = 1.0
    normalised: float = 1.0
    agreement: float | None = None


def left_out(predictor: Predictor, latents: Tensor, R_virtual_object: Array) -> LeftOut:
    """Estimate each keyframe from the others.

    Args:
        predictor: what made the latents.
        latents: (K, D).
        R_virtual_object: (K, 3, 3).
    """
    count = len(latents)
    if not isinstance(predictor, RotatedLatentPredictor) or count < FEWEST:
        return LeftOut()
    logits: dict[float, list[Array]] = {normalised: [] for normalised in _NORMALISED}
    truths, hits = [], dict.fromkeys(_NORMALISED, 0)
    for index in range(count):
        others = np.arange(count) != index
        reference = R_virtual_object[others][0]
        views = R_virtual_object[others] @ reference.T
        bank = ViewsBank.of(predictor, latents[others], free_rotations(), views)
        products = bank.products(latents[index], predictor.temperature)
        truth = R_virtual_object[index] @ reference.T
        truths.append(int(np.argmax(bank.rotations.reshape(-1, 9) @ truth.ravel())))
        for normalised in _NORMALISED:
            fused = bank.fused(products, normalised).double().cpu().numpy()
            logits[normalised].append(fused)
            best = bank.rotations[int(np.argmax(fused))]
            hits[normalised] += bool(geodesic_distance(best, truth) < np.radians(30))
    factors = np.exp(np.linspace(np.log(0.7), np.log(3.0), 25))
    cost = {
        normalised: [
            sum(logsumexp(one / factor) - one[truth] / factor for one, truth in zip(fused, truths, strict=True))
            + 0.5 * (np.log(factor) / 0.2) ** 2
            for factor in factors
        ]
        for normalised, fused in logits.items()
    }
    # Of those that find as many, the one to which the truth is least of a surprise.
    best_normalised = max(_NORMALISED, key=lambda one: (hits[one], -min(cost[one])))
    factor = float(factors[int(np.argmin(cost[best_normalised]))])
    return LeftOut(factor, best_normalised, hits[best_normalised] / count)


def summary(keyframes: Keyframes) -> list[str]:
    """What a walk gave, in lines for people: frames refused and why, keyframes, and where the frame comes from."""
    provenance = keyframes.provenance
    lines = [f"{refusal.name}: not used, {refusal.reason}" for refusal in keyframes.refused]
    lines.append(
        f"{provenance.frames} frames, {provenance.refused} not used, {len(keyframes.names)} keyframes: "
        + ", ".join(keyframes.names)
    )
    if provenance.poses == "given":
        lines.append(f"poses given; central rays pass the origin at {provenance.off_centre:.2f} radii (median)")
    else:
        lines.append(
            f"poses estimated from {provenance.edges} relative rotations; {provenance.outliers} contradict the rest, "
            f"the others differ by {provenance.residual_deg:.1f}° (median)"
        )
    lines.append(f"up from {_UP[provenance.up]}; lengths: {_SCALE[provenance.scale]}")
    if provenance.agreement is not None:
        lines.append(
            f"left out in turn, {provenance.agreement:.0%} of the keyframes are found within 30° by the others"
        )
    return lines


_UP = {"gravity": "gravity", "turntable": "the axis the camera went round", "image": "how the camera was held"}
_SCALE = {
    "poses": "metres, by the poses",
    "depth": "metres, by depth",
    "reference_distance": "metres, by the reference distance",
    "object_diameter": "metres, by the diameter",
    "unknown": "the distance in the first keyframe is the unit",
}
