"""The sixth stop: from a rotation distribution to a pose in the camera, with its covariance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nope_ros.crop import Crop, filled
from nope_ros.distribution import CONFIDENCE_RADIUS, Ambiguity, Mode, RotationDistribution
from nope_ros.frame import Frame, InputError
from nope_ros.prior import Prior
from nope_ros.rotations import exp, log

Array = NDArray[np.float64]
Stage = Literal["template", "tracking", "affine", "offsets", "depth", "synthesis", "surface"]
"""What a pose comes from: the templates of one frame, of all frames until now, or the refiner that moved it last."""

# Standard deviations: how far an outline misleads about the object when it is seen from elsewhere, relative to its
# radius: about its size, the same for each e-fold by which it fills more or less of its circle (a thing that looks
# longer than it did is seen from its long side now), and about its centre. They grow with the rotation. With these the
# 90 % ellipsoid holds 89 % of the centres of 60 held-out objects, 86 to 92 % whatever the change of form. (To correct
# the size by it lowers the largest errors by a tenth, but not the median, and is worse for boxes that turn a little.)
_SIZE_SIGMA, _FORM_SIGMA, _CENTRE_SIGMA = 0.06, 0.50, 0.10
_SATURATION = np.radians(30)
# With depth the centre is this share of the object's radius behind the surface that is seen, and that errs by so much
# (on renders of objects seen from two sides; the share of the mask's box that is rim).
_BEHIND, _BEHIND_SIGMA, _RIM = 0.5, 0.2, 0.06
# Error of a mask's outline, pixels.
_OUTLINE_SIGMA = 1.5


@dataclass(frozen=True)
class PoseMode:
    """One of the poses that explain the image: rotation (3, 3), translation (3,), probability mass."""

    R_camera_object: Array
    t_camera_object: Array
    probability: float


@dataclass(frozen=True)
class Measured:
    """A rotation delta_R (3, 3), and how far it errs: ``covariance`` (3, 3) of log(R R̂ᵀ), rad², camera axes."""

    R: Array
    covariance: Array

    def together(self, other: Measured) -> Measured:
        """What two independent measurements of one rotation say, each weighed by its precision."""
        gain = self.covariance @ np.linalg.inv(self.covariance + other.covariance)
        left = (np.eye(3) - gain) @ self.covariance
        towards: Array = gain @ log(other.R @ self.R.T)
        return Measured(exp(towards) @ self.R, 0.5 * (left + left.T))


@dataclass(frozen=True)
class PoseEstimate:
    """Where an object is, in camera optical axes.

    Attributes:
        object_id: the registered object's name.
        R_camera_object: (3, 3).
        t_camera_object: (3,), metres if ``metric``, else in units of the reference distance.
        metric: whether the scale is known.
        delta_R: (3, 3) rotation relative to the reference, R_query R_referenceᵀ in camera axes.
        covariance: (6, 6): x, y, z, then the rotation vector of R R̂ᵀ, about the camera's fixed axes.
        distribution: over delta_R.
        modes: the pose's first, then the most probable; refined as the pose is.
        similarity: whether it is this object at all, at most 1: see ``nope_ros.match.Bank``.
        prior: what was assumed of gravity.
        truncated: whether the mask reaches the image border.
        reference: what it was placed by: of a mesh or a walk, the side that was taken to be seen.
        stage: what the pose comes from. The distribution is that of the templates, its modes weighed anew where a
            refiner has compared them; refiners do not narrow it.
        matched: what matches alone say of the rotation, and how far they expect to err; None where none were asked.
        tracked: whether earlier frames have a part in it.
    """

    object_id: str
    R_camera_object: Array
    t_camera_object: Array
    metric: bool
    delta_R: Array
    covariance: Array
    distribution: RotationDistribution
    modes: tuple[PoseMode, ...]
    similarity: float
    prior: Prior
    truncated: bool
    reference: ReferencePose
    stage: Stage = "template"
    matched: Measured | None = None
    tracked: bool = False

    @property
    def centre(self) -> Array:
        """(3,) of the object's outline, which was seen; the origin is its offset further on."""
        seen: Array = self.t_camera_object - self.R_camera_object @ self.reference.offset_object
        return seen

    @property
    def centre_covariance(self) -> Array:
        """(3, 3) of ``centre``: the origin's, less what a turn about the centre moves the origin."""
        lever = lever_arm(self.R_camera_object @ self.reference.offset_object)
        known: Array = self.covariance[:3, :3] - lever @ self.covariance[3:, 3:] @ lever.T
        return known

    @cached_property
    def orientations(self) -> Array:
        """R_camera_object (N, 3, 3) for each rotation of the distribution."""
        return self.distribution.rotations @ self.reference.R_camera_object

    @cached_property
    def confidence(self) -> float:
        """Probability that the rotation is within 30° of the pose's."""
        return self.distribution.mass_within(self.delta_R, CONFIDENCE_RADIUS)

    @property
    def mode_rotations(self) -> Array:
        """delta_R (M, 3, 3) of the modes."""
        return np.array([mode.R_camera_object for mode in self.modes]) @ self.reference.R_camera_object.T

    @property
    def delta_modes(self) -> tuple[Mode, ...]:
        """The modes as rotations delta_R."""
        return tuple(Mode(R, mode.probability) for R, mode in zip(self.mode_rotations, self.modes, strict=True))

    @property
    def ambiguity(self) -> Ambiguity:
        """The kind of answer the distribution is."""
        return self.distribution.ambiguity


@dataclass(frozen=True)
class Sides:
    """An object as it was seen from several sides: what it looks like there, how large it is, and where its centre.

    Attributes:
        R: (V, 3, 3) R_virtual_object of each view.
        crops: (V, S, S, 4) uint8, RGB black outside the mask and the mask.
        distance: (V,) from the camera to the circle's centre, in the unit of the object's poses.
        angular_radius: (V,) tangent of half the angle under which the circle is seen.
        offset_object: (V, 3) from the circle's centre to the object's origin, object frame.
    """

    R: Array
    crops: NDArray[np.uint8]
    distance: Array
    angular_radius: Array
    offset_object: Array

    def nearest(self, R_virtual_object: Array) -> NDArray[np.intp]:
        """Indices (N,) of the views with the nearest direction of view to rotations (N, 3, 3)."""
        found: NDArray[np.intp] = np.argmax(R_virtual_object[:, 2] @ self.R[:, 2].T, axis=1)
        return found

    def reference_at(self, view: int, reference: ReferencePose) -> ReferencePose:
        """The object's reference, with the size and the centre that it has in a view."""
        return replace(
            reference,
            distance=float(self.distance[view]),
            angular_radius=float(self.angular_radius[view]),
            filled=filled(self.crops[view, ..., 3]),
            offset_object=self.offset_object[view],
        )


@dataclass(frozen=True)
class ReferencePose:
    """The object at registration.

    Attributes:
        R_camera_object: (3, 3).
        t_camera_object: (3,) of the object frame's origin.
        distance: from the camera to the centre of the mask's circle, along the virtual camera's axis.
        angular_radius: tangent of half the angle under which the circle was seen.
        filled: share of the circle that the mask fills.
        offset_object: (3,) from the circle's centre to the origin, object frame.
        metric: whether lengths are metres (else the reference distance is one).
    """

    R_camera_object: Array
    t_camera_object: Array
    distance: float
    angular_radius: float
    filled: float
    offset_object: Array
    metric: bool

    @property
    def radius(self) -> float:
        """Of the circle around the object at its distance, in the unit of lengths."""
        return self.distance * self.angular_radius

    @classmethod
    def from_crop(
        cls,
        crop: Crop,
        frame: Frame,
        *,
        reference_distance: float | None = None,
        object_diameter: float | None = None,
        R_camera_object: Array | None = None,
        t_camera_object: Array | None = None,
    ) -> ReferencePose:
        """Place the object at registration.

        Distance comes from the first that is given: the reference pose's translation, ``reference_distance`` (metres
        from the camera to the object's centre), ``object_diameter`` (metres), depth; else it is one, and not metric.

        Raises:
            InputError: if a length is not positive, or the pose is not a rotation or lies behind the camera.
        """
        check_lengths(reference_distance=reference_distance, object_diameter=object_diameter)
        # Copies: who gave them may go on to write into them.
        R = np.eye(3) if R_camera_object is None else np.array(R_camera_object, dtype=np.float64)
        if R.shape != (3, 3) or not np.allclose(R @ R.T, np.eye(3), atol=1e-4) or np.linalg.det(R) < 0:
            raise InputError("reference pose: R_camera_object is not a rotation matrix")
        axis = crop.R_virtual_camera[2]  # the virtual camera's optical axis in camera axes
        distance, metric = 1.0, True
        if t_camera_object is not None:
            t = np.asarray(t_camera_object, dtype=np.float64)
            if t.shape != (3,) or not np.isfinite(t).all() or axis @ t <= 0:
                raise InputError("reference pose: t_camera_object must be 3 finite numbers, in front of the camera")
            distance = float(axis @ t)
        elif reference_distance is not None:
            distance = float(reference_distance)
        elif object_diameter is not None:
            distance = float(object_diameter) / (2 * crop.angular_radius)
        elif frame.depth is not None:
            distance = distance_from_depth(frame, crop)
        else:
            metric = False
        centre = distance * axis
        origin = centre if t_camera_object is None else np.array(t_camera_object, dtype=np.float64)
        return cls(R, origin, distance, crop.angular_radius, crop.filled, R.T @ (origin - centre), metric)


def check_lengths(**lengths: float | None) -> None:
    """Raises InputError, naming the length, if one that is given is not positive."""
    for name, value in lengths.items():
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}: {value} m is not a positive length; leave it out if it is unknown")


def distance_from_depth(frame: Frame, crop: Crop) -> float:
    """Distance of the object's centre: median depth inside the mask, and half the object's radius behind that surface.

    Raises:
        InputError: if less than a tenth of the mask has depth.
    """
    surface = surface_distance(frame, crop)
    if surface is None:
        raise InputError("depth: less than a tenth of the mask has depth; register without depth or move the object")
    return surface / (1 - _BEHIND * crop.angular_radius)


def surface_distance(frame: Frame, crop: Crop) -> float | None:
    """Median depth of the object's surface along the virtual camera's axis, metres; None where too little is known.

    The mask's rim is left out: there depth cameras mix the object with what is behind it.
    """
    if frame.depth is None:
        return None
    x0, y0, x1, y1 = frame.bbox_xyxy
    inner = frame.mask_within(_RIM)
    depth = frame.depth[y0:y1, x0:x1]
    y, x = np.nonzero((inner > 0) & np.isfinite(depth))
    if len(y) < 0.1 * inner.sum():
        return None
    rays = np.column_stack([x + x0, y + y0, np.ones(len(x))]) @ np.linalg.inv(frame.camera.K).T
    return float(np.median((rays * depth[y, x, None]) @ crop.R_virtual_camera[2]))


def projective_distance(reference: ReferencePose, crop: Crop) -> float:
    """Distance of the circle's centre by how much smaller it looks than at registration (NOPE, Sec. 3.5).

    Angles instead of pixels, so both cameras' intrinsics are in it; a circle instead of a box's diagonal, because a box
    changes with in-plane rotation.
    """
    return reference.radius / crop.angular_radius


def outline_sigma(reference: ReferencePose, crop: Crop, turned: float) -> float:
    """Standard deviation of ``projective_distance``, relative to it; ``turned`` as of ``pose_estimate``."""
    form = abs(np.log(reference.filled / crop.filled))
    return float(np.hypot(np.hypot(_SIZE_SIGMA, _FORM_SIGMA * form) * _misled(turned), _blur(crop)))


def _misled(turned: float) -> float:
    # How far the outline may mislead: not at all when nothing turned, fully beyond 30°. In-plane rotation does not
    # change an outline, so only the turn of the viewing direction counts.
    return min(turned / _SATURATION, 1.0)


def _blur(crop: Crop) -> float:
    # What the outline's own error is of the circle's radius: by the pixels of the image or of the crop, whichever are
    # coarser. A mask's errors are a network's, and do not shrink as images grow.
    return _OUTLINE_SIGMA / max(min(crop.pixel_radius, crop.angular_radius * crop.K_virtual[0, 0]), 1.0)


def pose_estimate(
    object_id: str,
    reference: ReferencePose,
    crop: Crop,
    distribution: RotationDistribution,
    similarity: float,
    prior: Prior,
    frame: Frame,
    *,
    turned: float,
) -> PoseEstimate:
    """Put rotation, translation and their spread together.

    Distance follows from how large the object looks, and, where the query has depth and the object's size is known in
    metres, from its surface too, each as far as it is to be trusted.

    Args:
        object_id: the registered object's name.
        reference: the object at registration.
        crop: of the query.
        distribution: over delta_R, in camera axes.
        similarity: see ``PoseEstimate``.
        prior: the one used.
        frame: the query's.
        turned: angle between the directions of view of the reference and of the query, radians.
    """
    axis = crop.R_virtual_camera[2]
    distance = projective_distance(reference, crop)
    delta_R = distribution.mode.R
    sigma_distance = distance * outline_sigma(reference, crop, turned)
    surface = surface_distance(frame, crop) if reference.metric else None
    if surface is not None:
        weights = np.array([sigma_distance, _BEHIND_SIGMA * reference.radius]) ** -2.0
        distance = float(weights @ [distance, surface + _BEHIND * reference.radius] / weights.sum())
        sigma_distance = weights.sum() ** -0.5
    sigma_centre = distance * crop.angular_radius * np.hypot(_CENTRE_SIGMA * _misled(turned), _blur(crop))
    along = np.outer(axis, axis)
    placed = place(
        reference,
        distribution.modes,
        distance * axis,
        sigma_distance**2 * along + sigma_centre**2 * (np.eye(3) - along),
        rotation_covariance(distribution, distribution.mode.R),
    )
    return PoseEstimate(
        object_id=object_id,
        R_camera_object=placed.modes[0].R_camera_object,
        t_camera_object=placed.modes[0].t_camera_object,
        metric=reference.metric,
        delta_R=delta_R,
        covariance=placed.covariance,
        distribution=distribution,
        modes=placed.modes,
        similarity=similarity,
        prior=prior,
        truncated=frame.touches_border,
        reference=reference,
    )


def rotation_covariance(distribution: RotationDistribution, delta_R: Array) -> Array:
    """Covariance (3, 3) of log(R R̂ᵀ) for the answer R̂ = delta_R, rad², camera axes.

    All of the distribution counts, its peak as well as what lies between its modes. Errors have other tails than a
    Gaussian: the spread that comes with the weights makes the 90 % ellipsoid hold 90 % of them.
    """
    covariance: Array = distribution.spread * distribution.moment_about(delta_R)
    return covariance


@dataclass(frozen=True)
class Placed:
    """Poses of the object frame, best first, and the covariance (6, 6) of the first."""

    modes: tuple[PoseMode, ...]
    covariance: Array


def place(
    reference: ReferencePose, modes: Sequence[Mode], centre: Array, centre_covariance: Array, rotation_covariance: Array
) -> Placed:
    """From rotations and where the object's centre is to poses of the object frame.

    Args:
        reference: the object at registration.
        modes: rotations delta_R, best first.
        centre: (3,) of the circle around the object, camera axes; moves with the object as a rigid point of it.
        centre_covariance: (3, 3), independent of the rotation's.
        rotation_covariance: (3, 3) of log(R R̂ᵀ), rad², camera axes.
    """
    poses = []
    for mode in modes:
        R = mode.R @ reference.R_camera_object
        poses.append(PoseMode(R, centre + R @ reference.offset_object, mode.probability))
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = centre_covariance
    covariance[3:, 3:] = rotation_covariance
    lever = lever_arm(poses[0].R_camera_object @ reference.offset_object)
    covariance[:3, 3:] = lever @ rotation_covariance
    covariance[3:, :3] = covariance[:3, 3:].T
    covariance[:3, :3] += lever @ rotation_covariance @ lever.T
    return Placed(tuple(poses), covariance)


def lever_arm(arm: Array) -> Array:
    """How an origin at ``arm`` (3,) from the centre moves when the rotation errs: δt = ω × arm = −[arm]ₓ ω; (3, 3)."""
    x, y, z = arm
    return -np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
