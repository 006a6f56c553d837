"""Between distribution and message: poses finer than the grid they were found on.

A refiner takes an estimate and returns a better one of the same object in the same image, or None where it has nothing
to add. Two systems join here, each usable alone (``Refinement``); with "both", synthesis starts from what
correspondence found. What depends on an object's frame (origin, lever arm) is kept out of refiners: they work with
delta_R and the object's centre, and ``moved`` turns these into a pose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.crop import Crop
from nope_ros.depth import measured_surface
from nope_ros.distribution import CONFIDENCE_RADIUS, Mode, RotationDistribution
from nope_ros.frame import Frame, InputError
from nope_ros.latent import Predictor
from nope_ros.pose import Measured, PoseEstimate, ReferencePose, Stage, place
from nope_ros.prior import Prior
from nope_ros.rotations import geodesic_distance, log

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]
Refinement = Literal["none", "correspondence", "synthesis", "both"]
# What gained most on photographs at more than 10 Hz of a CPU (docs/correspondence.md).
DEFAULT_REFINEMENT: Refinement = "correspondence"


@dataclass(frozen=True)
class Query:
    """One image of an object, looked at once for all registered objects and refiners.

    Attributes:
        frame: image, mask, camera, and depth if there is any.
        crop: the object as its virtual camera sees it.
        latent: (D,) of the crop.
        gravity_virtual: (3,) gravity in the crop's virtual camera, or None if it is not known.
    """

    frame: Frame
    crop: Crop
    latent: Tensor
    gravity_virtual: Array | None

    @cached_property
    def surface(self) -> Array | None:
        """What its depth says of the object: see ``nope_ros.depth.measured_surface``."""
        return measured_surface(self.frame, self.crop)


@dataclass(frozen=True)
class Refined:
    """What a refiner found.

    Attributes:
        stage: which part of it has the last word.
        modes: rotations delta_R (egocentric: from the reference's real camera axes to the query's), the pose first.
        rotation_covariance: (3, 3) of log(R R̂ᵀ) about the first mode, rad², camera axes.
        centre: (3,) of the object in camera axes, in the pose's unit of length: the point of the object that the middle
            of the reference's crop shows at the reference's distance. None: as it was.
        centre_covariance: (3, 3) of it, without what the rotation adds to the origin of the object frame. None: as it
            was.
        distribution: over delta_R, with what the refiner saw of its modes. None: as it was.
        matched: see ``PoseEstimate``.
    """

    stage: Stage
    modes: tuple[Mode, ...]
    rotation_covariance: Array
    centre: Array | None = None
    centre_covariance: Array | None = None
    distribution: RotationDistribution | None = None
    matched: Measured | None = None


class Refiner(Protocol):
    """Something that makes a pose finer."""

    def refine(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> Refined | None:
        """A finer pose, or None if the estimate should be left alone.

        What ``estimate.prior`` excludes stays excluded: with "standing" only a turn about gravity is free, with
        "upright" none about the viewing direction.

        Args:
            query: the image; crop and latent are those the estimate was made from.
            registered: the object; its reference's latent, crop and virtual camera.
            estimate: from the templates, or from the refiner before this one.
        """
        ...

    def proposals(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> list[Refined]:
        """Poses worth trying, believed or not, where depth decides; arguments as of ``refine``."""
        ...


def over_modes(distribution: RotationDistribution, best: Mode, within: Array) -> Array:
    """Covariance (3, 3) of an answer's rotation: that of its mode, and that another mode may be the right one.

    A refiner sharpens one mode; that it is the right one neither pixels nor surfaces tell.

    Args:
        distribution: over delta_R, of the templates.
        best: the answer, and how probable its mode is.
        within: (3, 3) of log(R R̂ᵀ), rad², camera axes, if the mode is right.
    """
    far = geodesic_distance(distribution.rotations, best.R) > CONFIDENCE_RADIUS
    turns, share = log(distribution.rotations[far] @ best.R.T), distribution.probabilities[far]
    if share.sum() == 0:
        return within
    elsewhere = (share[:, None] * turns).T @ turns / share.sum()
    whole: Array = best.probability * within + (1 - best.probability) * elsewhere
    return whole


def weighed(
    query: Query,
    registered: RegisteredObject,
    prior: Prior,
    distribution: RotationDistribution,
    mode: Array,
    measured: Measured,
) -> Measured:
    """What a mode of the templates and a measurement of it say together, each weighed by its precision.

    Args:
        query: the frame.
        registered: the object.
        prior: what it excludes stays excluded.
        distribution: over delta_R, of the templates.
        mode: (3, 3) of it.
        measured: the same rotation; how the answer errs if this is the right mode follows (``over_modes``).
    """
    found = Measured(mode, distribution.moment_within(mode, CONFIDENCE_RADIUS)).together(measured)
    # Between two rotations that gravity allows, but only nearly one of them.
    return replace(found, R=registered.allowed(registered.allocentric(found.R, query), query, prior))


Step = Literal["correspondence", "synthesis"]


def steps(refinement: Refinement) -> tuple[Step, ...]:
    """What a refinement consists of, in order.

    Raises:
        InputError: if it is unknown.
    """
    if refinement not in _STEPS:
        raise InputError(f"refinement '{refinement}' is unknown; known: {', '.join(REFINEMENTS)}")
    return _STEPS[refinement]


_STEPS: dict[Refinement, tuple[Step, ...]] = {
    "none": (),
    "correspondence": ("correspondence",),
    "synthesis": ("synthesis",),
    "both": ("correspondence", "synthesis"),
}
REFINEMENTS: tuple[Refinement, ...] = tuple(_STEPS)


def load_refiner(step: Step, predictor: Predictor) -> Refiner:
    """Make a refiner ready, for estimates by this predictor and on its device.

    Raises:
        WeightsError: if its weights cannot be used.
    """
    if step == "correspondence":
        from nope_ros.correspondence import CorrespondenceRefiner

        return CorrespondenceRefiner.from_pretrained(device=predictor.device)
    from nope_ros.synthesis import SynthesisRefiner

    return SynthesisRefiner()


def moved(estimate: PoseEstimate, refined: Refined, reference: ReferencePose) -> PoseEstimate:
    """The estimate with a refiner's pose in place of its own, placed by ``reference``: a side of the object.

    A refiner that says nothing of the centre leaves it where it was, and the side too: each side has its own centre.
    """
    centre = refined.centre
    if centre is None:
        centre, reference = estimate.centre, estimate.reference
    centre_covariance = refined.centre_covariance
    if centre_covariance is None:
        centre_covariance = estimate.centre_covariance
    placed = place(reference, refined.modes, centre, centre_covariance, refined.rotation_covariance)
    return replace(
        estimate,
        R_camera_object=placed.modes[0].R_camera_object,
        t_camera_object=placed.modes[0].t_camera_object,
        delta_R=refined.modes[0].R,
        covariance=placed.covariance,
        modes=placed.modes,
        stage=refined.stage,
        reference=reference,
        distribution=refined.distribution or estimate.distribution,
        matched=refined.matched or estimate.matched,
    )
