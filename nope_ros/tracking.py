"""An object over time: a Bayes filter over the rotations that its prior allows.

What earlier views told is carried along: posterior = likelihood × what was believed, moved as the camera moved. So an
ambiguous view inherits what an earlier one saw, a symmetric object keeps the one of its poses that was chosen first,
and a wrong start is left again, as belief fades, and never wholly excludes a rotation.

The log-likelihood of a latent that turns is a sum of harmonics of the rotation, 969 numbers (``correlation``). Sums of
such sums are of the same form, and a turn of the camera is one matrix for each degree. So belief is kept as these
numbers: over all rotations at once, whatever the grid, and a known motion costs no sharpness. Where the likelihood has
no such form (keyframes, renders of a mesh, other predictors) belief is kept on the grid of the last frame, and carried
over to the next frame's with some blur.

Two views from nearly the same side err in the same way, so a frame counts by how far the camera has moved around the
object since the last one that counted, and standing still does not make the filter surer. Views of the reference's own
side tell more than those of the other (``news``), and one that surely sees it may need no memory at all.

What a refiner measures of a rotation is finer than harmonics can say. Where the camera's motion is known, these
measurements are added up too, about the answer that belief has: ``Tracker.refined``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.distribution import CONFIDENCE_RADIUS, Mode, RotationDistribution
from nope_ros.models.rotated_latent import bandwidth_of, blur_harmonics, turn_harmonics
from nope_ros.pose import Measured, PoseEstimate, rotation_covariance
from nope_ros.prior import Prior
from nope_ros.refine import Query, Refined, moved, weighed
from nope_ros.rotations import geodesic_distance
from nope_ros.synthesis import Freedom, HarmonicObjective, climb

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]

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
_FAITH = 5.0
# A peak farther than this from the mean of the grid's rotations around it is another one, radians.
_PEAK_REACH = np.radians(12.0)
# Of a view of the reference's own side more is new: it is as if views so many times less far apart erred independently.
# Of 1, 2, 3 and 8 this served best on walks around held-out objects, in fair weather and in harsh; without it a long
# look at the back outweighs the first look at the front.
_NEWS_OF_FRONT = 3.0
# A frame that surely sees that side (``frontal``) and is surer than all until now begins anew. Without the first
# condition a bad mask would too.
_FRONT = 0.85
# What matches of an object err is partly the same in every view of it: they say less together than each expects. On
# walks around held-out objects these served best, by little: views so far apart err independently, radians, by so much
# more than they expect. A sum farther than this from the answer is of another mode, or has gone astray, radians.
_MATCHES_INDEPENDENT, _MATCHES_SPREAD, _MATCHES_REACH = np.radians(20.0), 1.2, np.radians(15.0)
# Rotations of less belief than this are taken together; of the others at most so many are moved.
_NEGLIGIBLE, _MOST_MOVED = 1e-5, 400


@dataclass(frozen=True)
class _Camera:
    """How a frame was seen: R_fixed_camera (3, 3), None if it is not known, and R_virtual_camera (3, 3) of the crop."""

    R_fixed_camera: Array | None
    R_virtual_camera: Array


@dataclass(frozen=True)
class Passage:
    """What came to pass between a frame and a later one.

    Attributes:
        motion: (3, 3) from the camera's axes then to those now; as if it stood still where that is not known.
        turn: (3, 3) the same between the virtual cameras.
        seconds: between the frames.
        known: whether the camera's motion is.
    """

    motion: Array
    turn: Array
    seconds: float
    known: bool

    @classmethod
    def between(cls, before: _Camera, now: _Camera, seconds: float) -> Passage:
        """From one camera to the next, so many seconds later."""
        motion, known = np.eye(3), False
        if before.R_fixed_camera is not None and now.R_fixed_camera is not None:
            motion, known = now.R_fixed_camera.T @ before.R_fixed_camera, True
        else:  # a fast camera turns far between frames, and nobody tells how far
            seconds = max(seconds, _FRAME_TIME)
        return cls(motion, now.R_virtual_camera @ motion @ before.R_virtual_camera.T, seconds, known)

    @property
    def around(self) -> float:
        """How far the camera went around what it looks at, radians; zero if that is not known.

        Panning past an object, or rolling, is no other view of it.
        """
        return float(np.arccos(np.clip(self.turn[2, 2], -1, 1))) if self.known else 0.0

    def weights(self, independent: float) -> tuple[float, float]:
        """By how much belief fades, and what the frame is worth.

        Views ``independent`` radians apart err independently (``ErrorModel``).
        """
        fading = 1 - float(np.exp(-self.seconds / (_FADING_FIXED if self.known else _FADING_FREE)))
        return fading, fading + min(self.around / independent, 1.0)


@dataclass(frozen=True)
class _Grid:
    """Probabilities (N,) of rotations delta_R (N, 3, 3), as they were when belief was last moved (or begun).

    ``camera`` is of that moment too.
    """

    rotations: Array
    probabilities: Array
    camera: _Camera


@dataclass(frozen=True)
class _Belief:
    """What is believed of an object after a frame.

    Attributes:
        registered: the object.
        prior: of the frame.
        told: harmonics (Σ(2l+1)²,) of the log-likelihood of all frames, between the virtual cameras; or the grid.
        answer: the delta_R (3, 3) that was given.
        camera: of the frame.
        stamp: seconds, or None.
        matched: what matches of earlier frames, and since ``Tracker.refined`` of this one, say; None if nothing.
        worth: what a measurement of this frame counts beside it.
    """

    registered: RegisteredObject
    prior: Prior
    told: Tensor | _Grid
    answer: Array
    camera: _Camera
    stamp: float | None
    matched: Measured | None
    worth: float

    def seconds_until(self, stamp: float | None) -> float:
        """Until a frame with this stamp; without stamps, frames are at even steps."""
        return _FRAME_TIME if self.stamp is None or stamp is None else stamp - self.stamp


class Tracker:
    """Follows objects. Not for several threads at once.

    Example:
        >>> tracker = Tracker()
        >>> for frame, stamp, R_world_camera in recording:
        ...     query = estimator.look(frame)
        ...     pose = tracker.update(query, mug, estimator.match(query, mug), stamp, R_world_camera)
        ...     pose = tracker.refined(query, mug, estimator.refine(query, mug, pose))
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
        alone, camera = estimate.distribution, _Camera(R_fixed_camera, query.crop.R_virtual_camera)
        told: Tensor | _Grid | None = registered.harmonics(query, estimate.prior)
        if told is None:
            told = _Grid(alone.rotations, alone.probabilities, camera)
        modes, pose = alone.modes, estimate
        matched, worth = None, 1.0
        before = self._before(registered, estimate.prior, stamp)
        if before is not None:
            passage = Passage.between(before.camera, camera, before.seconds_until(stamp))
            motion = passage.motion
            if passage.known and before.matched is not None:
                fading, worth = passage.weights(float(_MATCHES_INDEPENDENT))
                covariance = motion @ before.matched.covariance @ motion.T / (1 - fading)
                matched = Measured(motion @ before.matched.R, covariance)
            if isinstance(told, Tensor):
                assert isinstance(before.told, Tensor)  # of the same object
                told, fused = _summed(before.told, told, passage, query, registered, estimate)
                nearest, *others = _faithful(fused.modes, motion @ before.answer)
                modes = (_sharp(nearest, told, query, registered, estimate.prior), *others)
            else:
                assert isinstance(before.told, _Grid)
                told, fused = _multiplied(before.told, told, passage.seconds, _independent(registered), alone)
                modes = _faithful(fused.modes, motion @ before.answer)
            pose = registered.pose_in(query, fused, estimate.similarity, estimate.prior, modes[0].R)
            found = Refined("tracking", modes, rotation_covariance(fused, modes[0].R))
            pose = replace(moved(pose, found, pose.reference), tracked=True)
        self._beliefs[registered.object_id] = _Belief(
            registered=registered,
            prior=estimate.prior,
            told=told,
            answer=modes[0].R,
            camera=camera,
            stamp=stamp,
            matched=matched,
            worth=worth,
        )
        return pose

    def _before(self, registered: RegisteredObject, prior: Prior, stamp: float | None) -> _Belief | None:
        """What is believed of an object; None if nothing is, or if a frame with this prior and stamp starts anew."""
        before = self._beliefs.get(registered.object_id)
        if before is None or before.registered is not registered or before.prior != prior:
            return None
        return before if 0 <= before.seconds_until(stamp) <= _LONGEST_GAP else None

    def refined(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> PoseEstimate:
        """The refined pose of a frame, with what refiners measured in those before it.

        Args:
            query: the frame, for which ``update`` was called.
            registered: the object.
            estimate: what ``update`` returned, refined. It is left as it is where nothing was matched, where earlier
                frames told nothing or where the camera's motion is not known, and where depth had the last word.
        """
        belief, measured = self._beliefs[registered.object_id], estimate.matched
        if measured is None:
            return estimate
        best = Mode(belief.answer, estimate.modes[0].probability)
        # Of another mode they say nothing, and the less the less of the known side is seen.
        nearness = max(np.cos(registered.angle_from_known(best.R, query)), 0.0)
        weight = best.probability * nearness**2 / _MATCHES_SPREAD**2
        earlier, now = belief.matched, replace(measured, covariance=measured.covariance / max(weight, _NEGLIGIBLE))
        if earlier is None or geodesic_distance(earlier.R, best.R) > _MATCHES_REACH:
            self._beliefs[registered.object_id] = replace(belief, matched=now)
            return estimate
        known = earlier.together(replace(now, covariance=now.covariance / max(belief.worth, _NEGLIGIBLE)))
        self._beliefs[registered.object_id] = replace(belief, matched=known)
        delta_R = weighed(query, registered, estimate.prior, estimate.distribution, best.R, known).R
        # Where belief itself is wrong, so are all measurements about it: they make it finer, not surer.
        covariance = rotation_covariance(estimate.distribution, delta_R)
        modes = (replace(best, R=delta_R), *estimate.delta_modes[1:])
        return moved(estimate, Refined("offsets", modes, covariance), estimate.reference)


def frontal(cosines: Array, probabilities: Array) -> float:
    """How much of the reference's own side a frame sees: mean squared cosine of the angle between directions of view.

    Args:
        cosines: (N,) of that angle, for each rotation.
        probabilities: (N,) of the rotations, of the frame alone.
    """
    return float(probabilities @ np.maximum(cosines, 0.0) ** 2)


def news(front: float) -> float:
    """How many times more a frame tells than a view of the object's other side; ``front`` as of ``frontal``."""
    return 1 + (_NEWS_OF_FRONT - 1) * front


def added(before: Tensor, now: Tensor, passage: Passage, independent: float) -> Tensor:
    """Harmonics (Σ(2l+1)²,) of belief after a frame.

    Args:
        before: of belief until then.
        now: of this frame's log-likelihood.
        passage: from that frame to this one.
        independent: how far apart views are that err independently, radians; ``news`` times less for this frame.
    """
    carried = turn_harmonics(before, torch.from_numpy(passage.turn))
    if not passage.known:
        carried = blur_harmonics(carried, _WANDERING * float(np.sqrt(passage.seconds)))
    fading, worth = passage.weights(independent)
    return (1 - fading) * carried + worth * now


def _independent(registered: RegisteredObject) -> float:
    """How far apart views are that err independently, radians."""
    return float(np.radians(registered.predictor.errors.independent_deg))


def _summed(
    before: Tensor,
    now: Tensor,
    passage: Passage,
    query: Query,
    registered: RegisteredObject,
    estimate: PoseEstimate,
) -> tuple[Tensor, RotationDistribution]:
    """Harmonics of belief after a frame, and what they say; ``estimate`` is of it alone, the rest as of ``added``."""
    alone, front = estimate.distribution, 0.0
    if passage.known:
        cosines = alone.rotations @ registered.R_virtual_camera[2] @ query.crop.R_virtual_camera[2]
        front = frontal(cosines, alone.probabilities)
    told = added(before, now, passage, _independent(registered) / news(front))
    fused = registered.distribution_of(told, query, estimate.prior)
    # And a frame that surely sees the reference's side, and is surer than all before it, needs no memory.
    return (now, alone) if front > _FRONT and alone.entropy < fused.entropy else (told, fused)


def _sharp(mode: Mode, told: Tensor, query: Query, registered: RegisteredObject, prior: Prior) -> Mode:
    """A mode at the very peak of a belief that may be sharper than the grid, if one is within the grid's reach."""
    likelihood = HarmonicObjective(told.double().cpu(), bandwidth_of(len(told)))
    freedom = Freedom(prior, registered.gravity_virtual, query.gravity_virtual)
    climbed, _ = climb(likelihood, registered.allocentric(mode.R, query)[None], freedom)
    peak = registered.egocentric(climbed[0], query)
    return replace(mode, R=peak) if geodesic_distance(peak, mode.R) < _PEAK_REACH else mode


def _multiplied(
    before: _Grid, now: _Grid, seconds: float, independent: float, alone: RotationDistribution
) -> tuple[_Grid, RotationDistribution]:
    """The same on a grid: what to carry on, and what it says; ``seconds`` since the last frame."""
    passage = Passage.between(before.camera, now.camera, seconds)  # since belief was moved, which may be longer ago
    # The rotations themselves, not the camera alone: where it looks straight down, those of the same index turn by any
    # angle while gravity turns by next to nothing.
    strayed = geodesic_distance(passage.motion @ before.rotations, alone.rotations).max() if passage.known else np.inf
    if strayed < _UNMOVED * alone.spacing:
        # Belief stays with the rotations of the same index: sharing among neighbours blurs.
        anchor, carried = before, before.probabilities
        passage = replace(passage, turn=np.eye(3))
    else:
        anchor, carried = now, _carried(before, passage, alone)
    lost = 1 - np.exp(-seconds / _SURPRISE)
    believed = (1 - lost) * carried + lost * alone.prior_probabilities
    fading, worth = passage.weights(independent)
    allowed = alone.prior_probabilities > 0
    likelihood = np.log(np.maximum(alone.probabilities, 1e-300)) - np.log(
        np.where(allowed, alone.prior_probabilities, np.inf)
    )
    with np.errstate(divide="ignore"):
        logits = (1 - fading) * np.log(believed) + worth * likelihood
    logits[~allowed] = -np.inf
    weights = np.exp(logits - logits.max())
    fused = replace(alone, probabilities=weights / weights.sum())
    return replace(anchor, probabilities=fused.probabilities), fused


def _carried(before: _Grid, passage: Passage, alone: RotationDistribution) -> Array:
    """Belief (N,) on the rotations of this frame, of which ``alone`` is."""
    width = _BLUR * alone.spacing
    if not passage.known:
        width = float(np.hypot(width, _WANDERING * np.sqrt(passage.seconds)))
    kept = np.argsort(-before.probabilities)[:_MOST_MOVED]
    kept = kept[before.probabilities[kept] > _NEGLIGIBLE]
    cosine = ((passage.motion @ before.rotations[kept]).reshape(-1, 9) @ alone.rotations.reshape(-1, 9).T - 1) / 2
    angle = np.arccos(np.clip(cosine, -1, 1))
    share = np.exp(-0.5 * (angle / width) ** 2) * (alone.prior_probabilities > 0)
    total = share.sum(axis=1, keepdims=True)
    reached = total[:, 0] > 1e-12  # the others went where this frame's prior allows nothing
    carried = (before.probabilities[kept][reached, None] * share[reached] / total[reached]).sum(axis=0)
    rest = max(1.0 - float(carried.sum()), 0.0)
    moved_on: Array = carried + rest * alone.prior_probabilities
    return moved_on


def _faithful(modes: tuple[Mode, ...], expected: Array) -> tuple[Mode, ...]:
    """The mode where the last answer should be now comes first, unless another is much more probable."""
    angles = geodesic_distance(np.array([mode.R for mode in modes]), expected)
    nearest = int(np.argmin(angles))
    if angles[nearest] > CONFIDENCE_RADIUS or modes[nearest].probability * _FAITH < modes[0].probability:
        return modes
    return (modes[nearest], *modes[:nearest], *modes[nearest + 1 :])
