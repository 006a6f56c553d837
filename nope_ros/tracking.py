"""An object over time: a Bayes filter over the rotations that its prior allows.

What earlier views told is carried along: posterior = likelihood × what was believed, moved as the camera moved. So an
ambiguous view inherits what an earlier one saw, a symmetric object keeps the one of its poses that was chosen first,
and a wrong start is left again, as belief fades, and never wholly excludes a rotation.

Two views from nearly the same side err in the same way, so a frame counts by how far the camera has moved around the
object since the last one that counted, and standing still does not make the filter surer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nope_ros.distribution import CONFIDENCE_RADIUS, Mode, RotationDistribution
from nope_ros.pose import PoseEstimate, rotation_covariance
from nope_ros.prior import Prior
from nope_ros.refine import Query, Refined, moved
from nope_ros.rotations import geodesic_distance

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]

# Views this far apart, radians, err independently: with it the filter's covariance and probabilities were calibrated on
# renders of held-out training objects, for steps of 6° as for steps of 25°.
_INDEPENDENT = np.radians(60.0)
# Belief fades with these time constants, seconds: with a fixed frame, because the object may be moved; without one,
# because the camera may.
_FADING_FIXED, _FADING_FREE = 5.0, 0.1
# And then the object turns in the camera by this much in a second, as far as anyone knows (a random walk), radians.
_WANDERING = np.radians(60.0)
# How often, on average, belief is not worth anything: another object, a jump. Seconds.
_SURPRISE = 10.0
# Rotations between the grid's are shared among neighbours, by a Gaussian of this share of their distance.
_BLUR = 0.4
# Motion smaller than this share of the grid's distance is gathered before belief is moved.
_UNMOVED = 0.15
# Time between frames that have no stamps, and the longest gap that belief survives, seconds.
_FRAME_TIME, _LONGEST_GAP = 0.1, 5.0
# An answer is kept while no other is this much more probable: those of a symmetric object never are for long.
_FAITH = 3.0
# Rotations of less belief than this are taken together; of the others at most so many are moved.
_NEGLIGIBLE, _MOST_MOVED = 1e-5, 400


@dataclass(frozen=True)
class _Belief:
    """Probabilities (N,) of rotations delta_R (N, 3, 3), as they were when belief was last moved (or begun).

    ``R_fixed_camera`` and ``R_virtual_camera`` (3, 3) are of that moment too. Of the last frame are ``answer``, the
    delta_R (3, 3) that was given, ``seen_from``, its R_fixed_camera, and ``stamp``, seconds.
    """

    registered: RegisteredObject
    prior: Prior
    rotations: Array
    probabilities: Array
    R_fixed_camera: Array | None
    R_virtual_camera: Array
    answer: Array
    seen_from: Array | None
    stamp: float | None


class Tracker:
    """Follows objects. Not for several threads at once.

    Example:
        >>> tracker = Tracker()
        >>> for frame, stamp, R_world_camera in recording:
        ...     query = estimator.look(frame)
        ...     pose = tracker.update(query, mug, estimator.match(query, mug), stamp, R_world_camera)
    """

    def __init__(self) -> None:
        self._beliefs: dict[str, _Belief] = {}

    def reset(self) -> None:
        """Forget everything: the next frame of each object stands alone."""
        self._beliefs.clear()

    def keep(self, objects: Collection[RegisteredObject]) -> None:
        """Forget all objects but these."""
        kept = {id(one) for one in objects}
        self._beliefs = {name: one for name, one in self._beliefs.items() if id(one.registered) in kept}

    def update(
        self,
        query: Query,
        registered: RegisteredObject,
        estimate: PoseEstimate,
        stamp: float | None = None,
        R_fixed_camera: Array | None = None,
    ) -> PoseEstimate:
        """The pose given this frame and those before it.

        Starts anew after a gap of more than 5 s, when time jumps back, and when the object was registered again or its
        prior is another one.

        Args:
            query: the frame.
            registered: the object.
            estimate: of this frame alone, from the templates.
            stamp: seconds; None for frames at even steps, as of a video.
            R_fixed_camera: (3, 3) the camera's orientation in a frame that the object does not move in, such as odom;
                None if it is not known.
        """
        alone = estimate.distribution
        likelihood = np.log(np.maximum(alone.probabilities, 1e-300)) - np.log(
            np.where(alone.prior_probabilities > 0, alone.prior_probabilities, np.inf)
        )
        before = self._beliefs.get(registered.object_id)
        seconds = _FRAME_TIME
        if before is not None and before.stamp is not None and stamp is not None:
            seconds = stamp - before.stamp
        if before is not None and (
            before.registered is not registered
            or before.prior != estimate.prior
            or len(before.rotations) != len(alone.rotations)
            or not 0 <= seconds <= _LONGEST_GAP
        ):
            before = None
        anchor = (R_fixed_camera, query.crop.R_virtual_camera, alone.rotations)
        if before is None:
            fused = alone
        else:
            fixed = R_fixed_camera is not None and before.R_fixed_camera is not None
            if not fixed:  # a fast camera turns far between frames, and nobody tells how far
                seconds = max(seconds, _FRAME_TIME)
            carried, around = _carried(before, query, alone, seconds, R_fixed_camera)
            if carried is None:
                carried = before.probabilities
                anchor = (before.R_fixed_camera, before.R_virtual_camera, before.rotations)
            lost = 1 - np.exp(-seconds / _SURPRISE)
            believed = (1 - lost) * carried + lost * alone.prior_probabilities
            fading = 1 - np.exp(-seconds / (_FADING_FIXED if fixed else _FADING_FREE))
            worth = fading + min(around / _INDEPENDENT, 1.0)
            with np.errstate(divide="ignore"):
                logits = (1 - fading) * np.log(believed) + worth * likelihood
            logits[alone.prior_probabilities == 0] = -np.inf
            weights = np.exp(logits - logits.max())
            fused = RotationDistribution(
                alone.rotations, weights / weights.sum(), alone.prior_probabilities, alone.spacing
            )
        modes, pose = alone.modes, estimate
        if before is not None:
            modes = _faithful(fused.modes, _motion(before.seen_from, R_fixed_camera) @ before.answer)
            pose = registered.pose_in(query, fused, estimate.similarity, estimate.prior)
            found = Refined("tracking", modes, rotation_covariance(fused, modes[0].R))
            reference = registered.reference_at(fused.mode.R, query.crop.R_virtual_camera)
            pose = moved(pose, found, reference)
        R_anchor, virtual_anchor, rotations = anchor
        self._beliefs[registered.object_id] = _Belief(
            registered=registered,
            prior=estimate.prior,
            rotations=rotations,
            probabilities=fused.probabilities,
            R_fixed_camera=R_anchor,
            R_virtual_camera=virtual_anchor,
            answer=modes[0].R,
            seen_from=R_fixed_camera,
            stamp=stamp,
        )
        return pose


def _carried(
    before: _Belief, query: Query, alone: RotationDistribution, seconds: float, R_fixed_camera: Array | None
) -> tuple[Array | None, float]:
    """Belief (N,) on this frame's rotations, and by how much the camera went around the object, radians.

    None in place of belief if next to nothing moved, so that it can stay with the rotations of the same index: sharing
    among neighbours blurs.
    """
    motion, around = _motion(before.R_fixed_camera, R_fixed_camera), 0.0
    if R_fixed_camera is None or before.R_fixed_camera is None:
        width = float(np.hypot(_BLUR * alone.spacing, _WANDERING * np.sqrt(seconds)))
    else:
        # As the virtual cameras see it: panning past an object, or rolling, is no other view of it.
        seen = query.crop.R_virtual_camera @ motion @ before.R_virtual_camera.T
        if geodesic_distance(seen, np.eye(3)) < _UNMOVED * alone.spacing:
            return None, 0.0
        around = float(np.arccos(np.clip(seen[2, 2], -1, 1)))
        width = _BLUR * alone.spacing
    kept = np.argsort(-before.probabilities)[:_MOST_MOVED]
    kept = kept[before.probabilities[kept] > _NEGLIGIBLE]
    cosine = ((motion @ before.rotations[kept]).reshape(-1, 9) @ alone.rotations.reshape(-1, 9).T - 1) / 2
    angle = np.arccos(np.clip(cosine, -1, 1))
    share = np.exp(-0.5 * (angle / width) ** 2) * (alone.prior_probabilities > 0)
    total = share.sum(axis=1, keepdims=True)
    reached = total[:, 0] > 1e-12  # the others went where this frame's prior allows nothing
    carried = (before.probabilities[kept][reached, None] * share[reached] / total[reached]).sum(axis=0)
    rest = max(1.0 - float(carried.sum()), 0.0)
    return carried + rest * alone.prior_probabilities, around


def _motion(R_fixed_before: Array | None, R_fixed_now: Array | None) -> Array:
    """From the camera's axes then to those now (3, 3); as if it stood still where that is not known."""
    return np.eye(3) if R_fixed_before is None or R_fixed_now is None else R_fixed_now.T @ R_fixed_before


def _faithful(modes: tuple[Mode, ...], expected: Array) -> tuple[Mode, ...]:
    """The mode where the last answer should be now comes first, unless another is much more probable."""
    angles = geodesic_distance(np.array([mode.R for mode in modes]), expected)
    nearest = int(np.argmin(angles))
    if angles[nearest] > CONFIDENCE_RADIUS or modes[nearest].probability * _FAITH < modes[0].probability:
        return modes
    return (modes[nearest], *modes[:nearest], *modes[nearest + 1 :])
