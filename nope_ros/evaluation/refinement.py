"""Writes docs/refinement.md: what each stage after the templates adds, on objects that training never saw.

python -m nope_ros.evaluation.refinement --meshes ../shared/data/meshes/test --sequence demo/sequence
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import le
from pathlib import Path
from textwrap import fill

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.stats import chi2

from nope_ros.correspondence import CorrespondenceRefiner
from nope_ros.crop import Crop
from nope_ros.distribution import CONFIDENCE_RADIUS
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.evaluation.meshes import mesh_set, procedural_set
from nope_ros.evaluation.metrics import PoseError
from nope_ros.evaluation.photos import photo_set
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet, generator
from nope_ros.evaluation.stages import HARM_DEG, RIGHT_DEG, TEMPLATE, partial_answers
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry
from nope_ros.frame import Frame, InputError
from nope_ros.pose import PoseEstimate
from nope_ros.prior import FREEDOM, PRIORS, Prior
from nope_ros.recording import Moment, open_recording
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS, Query, Refinement
from nope_ros.rotations import exp, geodesic_distance, log
from nope_ros.synthesis import Freedom, climb, likelihoods
from nope_ros.tracking import Tracker

Array = NDArray[np.float64]

DEFAULT = f"+ {DEFAULT_REFINEMENT}"
"""The row of what the estimator answers if nothing is said."""

TRACKED, TRACKED_KNOWN = "+ tracking", "+ tracking, camera's motion known"
"""Rows of what the tracker makes of the templates' answers. The node refines these: then the default's name follows."""

LEVEL, ANY_ROLL = "level", "any roll"
"""Rows of the templates' answers to the same views, under both."""

# An error that changes by more than this from one frame to the next is a jump, degrees.
_JUMP = 45.0
# One that starts from an error below this loses what was found, degrees.
_FOUND = 30.0
# A jump by more than this, while the object turned in the camera by less than that, may be a flip, degrees.
_FLIP, _STILL = 60.0, 30.0
# A pose whose error changed by less than this is the same one, degrees.
_MOVED = 0.01
# Climbs start so far from the truth, so many from each distance, of pairs whose directions of view are nearer than
# this, degrees. They are to end this near.
_STARTS, _RUNS, _NEAR, _REACHED = (0.0, 5.0, 10.0, 20.0), 8, 35.0, 5.0


@dataclass(frozen=True)
class Outcome:
    """One answer.

    Attributes:
        error: of the rotation, degrees, modulo the object's symmetry.
        start: error of the templates' answer to the same image, degrees, modulo the symmetry.
        roll: part of the error that is about the viewing direction, degrees, modulo nothing.
        translation: ‖t − t_true‖ / ‖t_true‖.
        centre: error of the object's centre in the query's crop, relative to the crop's side.
        scale: error of the distance, relative to it.
        squared: normalised error squared of the rotation, eᵀ Σ⁻¹ e, modulo nothing; on average the degrees of freedom
            that the prior leaves, if the covariance is right.
        placed: the same of the translation; on average 3.
        seconds: that the stage took.
    """

    error: float
    start: float
    roll: float
    translation: float
    centre: float
    scale: float
    squared: float
    placed: float
    seconds: float


def outcome(
    pose: PoseEstimate,
    start: PoseEstimate,
    R: Array,
    t: Array,
    crop: Crop,
    seconds: float,
    symmetry: Symmetry = NO_SYMMETRY,
) -> Outcome:
    """Compare a pose with the truth, R (3, 3) and t (3,), in camera axes; ``crop`` of the query."""
    off, apart = log(R @ pose.R_camera_object.T), t - pose.t_camera_object
    error = PoseError.of(pose.R_camera_object, pose.t_camera_object, R, t, crop, symmetry)
    return Outcome(
        error=float(np.degrees(error.rotation)),
        start=float(np.degrees(symmetry.error(start.R_camera_object, R))),
        roll=float(np.degrees(error.roll)),
        translation=error.translation,
        centre=error.centre,
        scale=error.scale,
        squared=float(off @ np.linalg.solve(pose.covariance[3:, 3:], off)),
        placed=float(apart @ np.linalg.solve(pose.covariance[:3, :3], apart)),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Stages:
    """The templates, and what may follow them.

    Attributes:
        estimator: gives the templates' answers, and refines them.
        refinements: that can be had.
        refiner: whose affine and offsets are rows of their own; None if it can't be had.
    """

    estimator: PoseEstimator
    refinements: tuple[Refinement, ...]
    refiner: CorrespondenceRefiner | None

    @classmethod
    def of(cls, estimator: PoseEstimator) -> Stages:
        """All that an estimator's predictor has."""
        found: list[Refinement] = []
        for refinement in REFINEMENTS[1:]:
            try:
                estimator.refinement = refinement
            except InputError:
                continue
            found.append(refinement)
        estimator.refinement = "none"
        refiner = CorrespondenceRefiner.from_pretrained(device=estimator.device) if "correspondence" in found else None
        return cls(estimator, tuple(found), refiner)

    def answers(
        self, query: Query, registered: RegisteredObject, template: PoseEstimate
    ) -> Iterator[tuple[str, PoseEstimate, float]]:
        """Of each stage: its row, its pose, and the seconds that it took, the templates not among them."""
        if self.refiner is not None:
            begin = time.perf_counter()
            poses = partial_answers(self.refiner.look(query, registered, template))
            seconds = time.perf_counter() - begin
            for row, pose in poses.items():
                yield row, pose, seconds
        for refinement in self.refinements:
            begin = time.perf_counter()
            pose = self.estimator.refine(query, registered, template, refinement)
            yield f"+ {refinement}", pose, time.perf_counter() - begin


Outcomes = dict[tuple[Prior, str], list[Outcome]]


def on_pairs(found: EvaluationSet, stages: Stages) -> Outcomes:
    """Each stage's outcomes on a test set's pairs with viewing directions less than 90° apart."""
    outcomes: Outcomes = defaultdict(list)
    for one in track(found.objects(), found.kind, total=found.count, console=Console(stderr=True)):
        known = _References(one, stages.estimator)
        for prior in one.protocols:
            for reference, index in one.pairs:
                if one.views[reference].direction @ one.views[index].direction < 0:
                    continue
                second = one.views[index]
                registered, frame = known.registered(reference, prior), second.read()
                begin = time.perf_counter()
                query = stages.estimator.look(frame, None if prior == "free" else second.gravity_camera)
                start = stages.estimator.match(query, registered, prior)
                rows = [(TEMPLATE, start, time.perf_counter() - begin), *stages.answers(query, registered, start)]
                R, t = second.R_camera_object, second.t_camera_object
                for row, pose, seconds in rows:
                    outcomes[prior, row].append(outcome(pose, start, R, t, query.crop, seconds, one.symmetry))
    return outcomes


class _References:
    """Views of an object, each registered when it is first asked for."""

    def __init__(self, one: EvaluationObject, estimator: PoseEstimator) -> None:
        self.one, self.estimator = one, estimator
        self._known: dict[tuple[int, bool], RegisteredObject] = {}

    def registered(self, index: int, prior: Prior) -> RegisteredObject:
        """A view, with gravity unless the prior is "free"."""
        key = (index, prior == "free")
        if key not in self._known:
            view = self.one.views[index]
            self._known[key] = self.estimator.register_frame(
                view.read(),
                R_camera_object=view.R_camera_object,
                t_camera_object=view.t_camera_object,
                gravity_camera=None if prior == "free" else view.gravity_camera,
            )
        return self._known[key]


def rolled(frame: Frame, roll: float) -> Frame:
    """A frame as its camera would have seen it after turning by ``roll`` radians about its optical axis."""
    side = int(np.ceil(np.hypot(frame.camera.width, frame.camera.height)))
    K = frame.camera.K.copy()
    K[:2, 2] = (side - 1) / 2
    homography = K @ exp(np.array([0.0, 0.0, roll])) @ np.linalg.inv(frame.camera.K)

    def turned(image: NDArray[np.generic], flags: int) -> NDArray[np.generic]:
        result: NDArray[np.generic] = cv2.warpPerspective(image, homography, (side, side), flags=flags)
        return result

    mask = turned(frame.mask.astype(np.uint8), cv2.INTER_NEAREST)
    return Frame.from_arrays(turned(frame.image, cv2.INTER_LINEAR), mask, K)


def on_rolls(found: EvaluationSet, stages: Stages, seed: int = 0) -> Outcomes:
    """Answers under "free" to views of level cameras, and to the same views after any roll.

    Rows are the templates' and the default's: "level", "any roll", "level + correspondence", ...
    """
    outcomes: Outcomes = defaultdict(list)
    rng = np.random.default_rng(seed)
    for one in track(found.objects(), "rolls", total=found.count, console=Console(stderr=True)):
        known = _References(one, stages.estimator)
        for reference, index in one.pairs:
            second = one.views[index]
            if one.views[reference].direction @ second.direction < 0:
                continue
            registered = known.registered(reference, "free")
            frame, angle = second.read(), float(rng.uniform(-np.pi, np.pi))
            for way, roll in ((LEVEL, 0.0), (ANY_ROLL, angle)):
                turn = exp(np.array([0.0, 0.0, roll]))
                begin = time.perf_counter()
                query = stages.estimator.look(rolled(frame, roll))
                start = stages.estimator.match(query, registered, "free")
                rows = [(way, start, time.perf_counter() - begin)]
                if DEFAULT_REFINEMENT in stages.refinements:
                    begin = time.perf_counter()
                    pose = stages.estimator.refine(query, registered, start, DEFAULT_REFINEMENT)
                    rows.append((f"{way} {DEFAULT}", pose, time.perf_counter() - begin))
                R, t = turn @ second.R_camera_object, turn @ second.t_camera_object
                for row, pose, seconds in rows:
                    outcomes["free", row].append(outcome(pose, start, R, t, query.crop, seconds, one.symmetry))
    return outcomes


# --- climbs from around the truth -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Climbs:
    """Climbs of synthesis from around the truth, of one prior.

    Attributes:
        pairs: whose likelihoods were climbed.
        above: (N,) of each run whether its loss ended above where it started.
        ends: for each distance of the starts from the truth, degrees, how far from it they ended, degrees.
        apart: the same, how far from where the climb from the truth itself ended.
    """

    pairs: int
    above: NDArray[np.bool_]
    ends: dict[float, Array]
    apart: dict[float, Array]

    def reached(self, away: float) -> float:
        """Share of the starts so far away, degrees, that ended within 5° of the truth, %."""
        return 100 * float((self.ends[away] < _REACHED).mean())

    def agreed(self, away: float) -> float:
        """Share of them that ended within 5° of where the climb from the truth itself did, %."""
        return 100 * float((self.apart[away] < _REACHED).mean())

    @property
    def never_above(self) -> float:
        """Share of runs that never end above their starting loss, %."""
        return 100 * float((~self.above).mean())


def on_starts(found: EvaluationSet, estimator: PoseEstimator, limit: int, seed: int = 0) -> dict[Prior, Climbs]:
    """Climbs of the likelihood of real pairs, from starts drawn around the truth, as far as each prior allows.

    Args:
        found: of its pairs those whose directions of view are less than 35° apart.
        estimator: whose likelihood is climbed, as ``SynthesisRefiner`` does, but no climb is taken back.
        limit: most pairs of an object and protocol; which ones is drawn.
        seed: of pairs and starts.
    """
    ends: dict[Prior, list[Array]] = defaultdict(list)
    apart: dict[Prior, list[Array]] = defaultdict(list)
    above: dict[Prior, list[NDArray[np.bool_]]] = defaultdict(list)
    for one in track(found.objects(), f"{found.kind}, climbs", total=found.count, console=Console(stderr=True)):
        known = _References(one, estimator)
        views = one.views
        near = [(a, b) for a, b in one.pairs if views[a].direction @ views[b].direction > np.cos(np.radians(_NEAR))]
        rng = generator(seed, one.name, "starts")
        near = [near[index] for index in np.sort(rng.permutation(len(near))[:limit])]
        for reference, index in near:
            frame = views[index].read()
            for prior in one.protocols:
                registered = known.registered(reference, prior)
                query = estimator.look(frame, None if prior == "free" else views[index].gravity_camera)
                delta_R = views[index].R_camera_object @ views[reference].R_camera_object.T
                truth = registered.allocentric(delta_R, query)
                freedom = Freedom(prior, registered.gravity_virtual, query.gravity_virtual)
                steps = rng.normal(size=(len(_STARTS), _RUNS, FREEDOM[prior]))
                steps *= np.radians(_STARTS)[:, None, None] / np.linalg.norm(steps, axis=-1, keepdims=True)
                around = np.repeat(truth[None], len(_STARTS) * _RUNS, axis=0)
                starts = freedom.turned(around, steps.reshape(len(around), -1))
                ((_, likelihood, _),) = likelihoods(query, registered, prior, starts)  # of one view
                begun = likelihood(starts).value
                climbed, at = climb(likelihood, starts, freedom)
                above[prior].append(at.value < begun)
                for found_, centre in ((ends, truth), (apart, climbed[0])):  # the first begins at the truth
                    off = np.degrees(geodesic_distance(climbed, centre))
                    found_[prior].append(off.reshape(len(_STARTS), _RUNS))

    def by_start(parts: list[Array]) -> dict[float, Array]:
        return dict(zip(_STARTS, np.concatenate(parts, axis=1), strict=True))

    return {
        prior: Climbs(len(above[prior]), np.concatenate(above[prior]), by_start(ends[prior]), by_start(apart[prior]))
        for prior in above
    }


# --- over time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What was said of one frame of a sequence, beside the truth.

    Attributes:
        R_true: (3, 3) R_camera_object.
        off: (3, 3) from the truth to the answer, object axes: the same in every frame for one and the same mistake.
        listed: (M, 3, 3) the same of all modes that the pose lists.
    """

    R_true: Array
    off: Array
    listed: Array

    @classmethod
    def of(cls, pose: PoseEstimate, R_true: Array) -> Said:
        """A pose beside the truth (3, 3)."""
        modes = np.array([mode.R_camera_object for mode in pose.modes])
        return cls(R_true, pose.R_camera_object.T @ R_true, np.swapaxes(modes, -1, -2) @ R_true)

    @property
    def found(self) -> bool:
        """Whether the answer is near the truth."""
        return bool(geodesic_distance(self.off, np.eye(3)) < np.radians(_FOUND))

    def jumped(self, before: Said, degrees: float = _JUMP) -> bool:
        """Whether the error is another one than in the frame before."""
        return bool(geodesic_distance(self.off, before.off) > np.radians(degrees))

    def flipped(self, before: Said) -> bool:
        """Whether the answer went over from one mode to another, while the object hardly turned.

        Both frames list both of them, so that nothing new was found.
        """
        if not self.jumped(before, _FLIP) or geodesic_distance(self.R_true, before.R_true) > np.radians(_STILL):
            return False
        there_before = geodesic_distance(before.listed, self.off).min() < CONFIDENCE_RADIUS
        here_still = geodesic_distance(self.listed, before.off).min() < CONFIDENCE_RADIUS
        return bool(there_before and here_still)


@dataclass(frozen=True)
class Followed:
    """Outcomes of one way over a sequence.

    Attributes:
        outcomes: of its frames.
        jumps: how often its error jumped.
        lost: how often away from the truth.
        flips: how often between two modes that were both listed before and after.
        righted: how many of these led from a wrong answer to the truth.
    """

    outcomes: list[Outcome]
    jumps: int
    lost: int
    flips: int
    righted: int


def followed(outcomes: list[Outcome], runs: Iterable[Sequence[Said]]) -> Followed:
    """What was said in each run, frame by frame, beside the outcomes."""
    steps = [(before, now) for run in runs for before, now in pairwise(run)]
    jumps = [(before, now) for before, now in steps if now.jumped(before)]
    flips = [(before, now) for before, now in steps if now.flipped(before)]
    return Followed(
        outcomes,
        len(jumps),
        sum(before.found for before, _ in jumps),
        len(flips),
        sum(now.found and not before.found for before, now in flips),
    )


def on_sequence(moments: Sequence[Moment], stages: Stages, prior: Prior) -> dict[str, Followed]:
    """A sequence followed with each third of it as the reference, begun a third further on and once around.

    Errors are of frames less than 90° from the reference; jumps and flips are counted over all. Tracked poses are
    refined as the node does it: by the default, after the tracker, which adds up what matches of all frames say.
    """
    estimator = stages.estimator
    down = [None if prior == "free" else moment.gravity_camera for moment in moments]
    queries: list[Query] = []
    looking: list[float] = []
    for moment, gravity in zip(moments, down, strict=True):
        begin = time.perf_counter()
        queries.append(estimator.look(Frame.from_arrays(moment.image, moment.mask, moment.camera), gravity))
        looking.append(time.perf_counter() - begin)
    third = len(moments) // 3
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    runs: dict[str, list[list[Said]]] = defaultdict(list)
    for reference in (0, third, 2 * third):
        R_reference, t_reference, towards = _truth(moments[reference])
        registered = estimator.register_frame(
            queries[reference].frame,
            R_camera_object=R_reference,
            t_camera_object=t_reference,
            gravity_camera=down[reference],
        )
        order = [(reference + third + step) % len(moments) for step in range(len(moments))]
        trackers = {TRACKED: Tracker(), TRACKED_KNOWN: Tracker()}
        said: dict[str, list[Said]] = defaultdict(list)
        for number, index in enumerate(order):
            query = queries[index]
            R, t, direction = _truth(moments[index])
            begin = time.perf_counter()
            start = estimator.match(query, registered, prior)
            rows = [(TEMPLATE, start, looking[index] + time.perf_counter() - begin)]
            rows += stages.answers(query, registered, start)
            for way, tracker in trackers.items():
                begin = time.perf_counter()
                pose = tracker.update(query, registered, start, 0.1 * number, R.T if way == TRACKED_KNOWN else None)
                seconds = time.perf_counter() - begin
                rows.append((way, pose, seconds))
                if DEFAULT_REFINEMENT in stages.refinements:
                    begin = time.perf_counter()
                    refined = estimator.refine(query, registered, pose, DEFAULT_REFINEMENT)
                    refined = tracker.refined(query, registered, refined)
                    rows.append((f"{way} {DEFAULT}", refined, seconds + time.perf_counter() - begin))
            for row, pose, seconds in rows:
                said[row].append(Said.of(pose, R))
                if direction @ towards > 0 and index != reference:
                    outcomes[row].append(outcome(pose, start, R, t, query.crop, seconds))
        for row, run in said.items():
            runs[row].append(run)
    if not outcomes:
        raise InputError("sequence: no frame is less than 90° from a reference; give more frames (a smaller --every)")
    return {row: followed(outcomes[row], runs[row]) for row in runs}


def _truth(moment: Moment) -> tuple[Array, Array, Array]:
    if moment.truth is None:
        raise InputError(f"{moment.name}: has no true pose to compare with")
    return moment.truth.R_camera_object, moment.truth.t_camera_object, moment.truth.direction


# --- the document ---------------------------------------------------------------------------------------------------

_COLUMNS = (
    "| | | pairs | Acc15 | Acc30 | median | right: median | right: roll | right: worse by 2° | translation | centre "
    "| scale | NEES/d | in 90 % | place in 90 % | "
)
_HEAD = f"{_COLUMNS}ms |"
_FOLLOWED = f"{_COLUMNS}jumps | lost | flips | ms |"
_CLIMBS = (
    "| | pairs | climbs | never above the start | from 0° | from 5° | from 10° | from 20° | median end, from 20° "
    "| same peak, from 5° | from 10° | from 20° |"
)


@dataclass(frozen=True)
class Measured:
    """What is told of in a section: a test set in a word or two, whether a depth camera saw it, what came of it."""

    name: str
    depth: bool
    outcomes: Outcomes


def row(prior: Prior, stage: str, outcomes: Sequence[Outcome], counts: Sequence[str] = ()) -> str:
    """A row under ``_HEAD``; with ``counts``, the cells before its last, under ``_FOLLOWED``."""
    right = _right(outcomes)
    cells = [
        *_accuracy(outcomes),
        f"{_median(right, 'error'):.1f}°" if right else "–",
        f"{_median(right, 'roll'):.1f}°" if right else "–",
        f"{_worse(outcomes):.0f} %" if "+" in stage and right else "–",
        *(f"{100 * _median(outcomes, field):.1f} %" for field in ("translation", "centre", "scale")),
        f"{_nees(prior, outcomes):.2f}",
        f"{_covered(prior, outcomes):.0f} %",
        f"{_placed(outcomes):.0f} %",
        *counts,
        _time(outcomes),
    ]
    return "| " + " | ".join([prior, stage, *cells]) + " |"


def followed_row(prior: Prior, way: str, followed: Followed) -> str:
    """A row under ``_FOLLOWED``."""
    flips = f"{followed.flips} ({followed.righted} to the truth)" if followed.righted else str(followed.flips)
    return row(prior, way, followed.outcomes, [str(followed.jumps), str(followed.lost), flips])


def climbs_row(prior: Prior, climbs: Climbs) -> str:
    """A row under ``_CLIMBS``."""
    cells = [str(climbs.pairs), str(len(climbs.above)), f"{climbs.never_above:.0f} %"]
    cells += [f"{climbs.reached(away):.0f} %" for away in _STARTS]
    cells += [f"{np.median(climbs.ends[_STARTS[-1]]):.1f}°"]
    cells += [f"{climbs.agreed(away):.0f} %" for away in _STARTS[1:]]
    return "| " + " | ".join([prior, *cells]) + " |"


def _right(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if one.start < RIGHT_DEG]


def _median(outcomes: Sequence[Outcome], field: str) -> float:
    return float(np.median([getattr(one, field) for one in outcomes])) if outcomes else float("nan")


def _worse(outcomes: Sequence[Outcome]) -> float:
    right = _right(outcomes)
    return 100 * float(np.mean([one.error > one.start + HARM_DEG for one in right])) if right else float("nan")


def _within(outcomes: Sequence[Outcome], limit: float) -> float:
    return 100 * float(np.mean([one.error < limit for one in outcomes])) if outcomes else float("nan")


def _accuracy(outcomes: Sequence[Outcome]) -> list[str]:
    shares = [f"{_within(outcomes, limit):.0f} %" for limit in (15, 30)]
    return [str(len(outcomes)), *shares, f"{_median(outcomes, 'error'):.1f}°"]


def _nees(prior: Prior, outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([one.squared for one in outcomes])) / FREEDOM[prior]


def _covered(prior: Prior, outcomes: Sequence[Outcome]) -> float:
    return _held([one.squared for one in outcomes], FREEDOM[prior])


def _placed(outcomes: Sequence[Outcome]) -> float:
    return _held([one.placed for one in outcomes], 3)


def _held(squared: Sequence[float], freedom: int) -> float:
    """Share of normalised errors squared, %, that the 90 % ellipsoid holds."""
    return 100 * float(np.mean(np.array(squared) <= chi2.ppf(0.9, freedom)))


def _time(outcomes: Sequence[Outcome]) -> str:
    p50, p95 = np.percentile([1000 * one.seconds for one in outcomes], [50, 95])
    return f"{p50:.1f} / {p95:.1f}"


def _table(head: str, rows: Iterable[str]) -> str:
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rows])


Figure = Callable[[Sequence[Outcome]], float]


def _pose_goals(depth: bool) -> list[tuple[str, str, Figure, Callable[[float], bool]]]:
    """Figures of single images: name, goal, how it is measured, whether a value reaches it."""
    sensor, most = ("with depth", 2) if depth else ("RGB", 5)
    return [
        ("roll error, template right, °", "≤ 5", lambda x: _median(_right(x), "roll"), lambda x: x <= 5),
        ("median error, template right, °", "< 4", lambda x: _median(_right(x), "error"), lambda x: x < 4),
        ("the same, at best", "≤ 2.5", lambda x: _median(_right(x), "error"), lambda x: x <= 2.5),
        (f"right ones made worse by {HARM_DEG:.0f}°, %", "≤ 10", _worse, lambda x: x <= 10),
        ("centre, % of the crop", "≤ 3", lambda x: 100 * _median(x, "centre"), lambda x: x <= 3),
        ("scale, %", "≤ 5", lambda x: 100 * _median(x, "scale"), lambda x: x <= 5),
        (
            f"translation, {sensor}, %",
            f"≤ {most}",
            lambda x: 100 * _median(x, "translation"),
            lambda x: x <= most,
        ),
    ]


def goals(
    sets: Sequence[Measured],
    rolls: Outcomes,
    climbs: Mapping[str, Mapping[Prior, Climbs]],
    sequences: Mapping[str, Mapping[Prior, Mapping[str, Followed]]],
) -> str:
    """A table of the figures to reach and whether they are, for each prior; of the default refinement.

    Args:
        sets: figures of single images.
        rolls: of ``on_rolls``.
        climbs: of ``on_starts``, by the title of the set.
        sequences: of ``on_sequence`` for each prior, by the title of the sequence.
    """
    rows = []

    def judge(figure: str, on: str, goal: str, values: Mapping[Prior, float], reached: Callable[[float], bool]) -> None:
        known = {prior: value for prior, value in values.items() if np.isfinite(value)}
        yes = [prior for prior, value in known.items() if reached(value)]
        verdict = "yes" if len(yes) == len(known) else "no" if not yes else f"only {', '.join(yes)}"
        digits = 0 if all(float(value).is_integer() for value in known.values()) else 1
        cells = [f"{known[prior]:.{digits}f}" if prior in known else "–" for prior in PRIORS]
        if known:
            rows.append("| " + " | ".join([figure, on, goal, *cells, verdict]) + " |")

    level, rolled_ = [rolls.get(("free", f"{way} {DEFAULT}"), []) for way in (LEVEL, ANY_ROLL)]
    gap = {"free": abs(_within(level, 30) - _within(rolled_, 30))}
    judge("Acc30 at no roll and under any: difference, points", "procedural", "≤ 5", gap, lambda x: x <= 5)  # type: ignore[arg-type]
    for one in sets:
        answers = {prior: one.outcomes[prior, DEFAULT] for prior in PRIORS if (prior, DEFAULT) in one.outcomes}
        for figure, goal, value, most in _pose_goals(one.depth):
            judge(figure, one.name, goal, {prior: value(x) for prior, x in answers.items()}, most)
        covered = {prior: _covered(prior, x) for prior, x in answers.items()}
        judge("rotation in its 90 % ellipsoid, %", one.name, "86–94", covered, _calibrated)
        placed = {prior: _placed(x) for prior, x in answers.items()}
        judge("translation in its 90 % ellipsoid, %", one.name, "86–94", placed, _calibrated)
    for title, tracked in sequences.items():
        for way in (TRACKED_KNOWN, TRACKED):
            motion = "motion known" if way == TRACKED_KNOWN else "motion unknown"
            ours = {prior: ways[f"{way} {DEFAULT}"] for prior, ways in tracked.items() if f"{way} {DEFAULT}" in ways}
            if way == TRACKED_KNOWN:
                for figure, row_, alone in (
                    ("tracking", TRACKED_KNOWN, TEMPLATE),
                    ("tracking and refined", f"{TRACKED_KNOWN} {DEFAULT}", DEFAULT),
                ):
                    shares = {
                        prior: 100 * _median(ways[row_].outcomes, "error") / _median(ways[alone].outcomes, "error")
                        for prior, ways in tracked.items()
                        if row_ in ways and alone in ways
                    }
                    what = f"{figure}, {motion}: median, % of every frame's alone"
                    judge(what, title, "≤ 50", shares, lambda x: x <= 50)
                covered = {prior: _covered(prior, one.outcomes) for prior, one in ours.items()}
                judge("tracking and refined: rotation in its 90 % ellipsoid, %", title, "86–94", covered, _calibrated)
            flips = {prior: float(one.flips - one.righted) for prior, one in ours.items()}
            judge(
                f"tracking and refined, {motion}: flips, those to the truth apart", title, "0", flips, lambda x: x == 0
            )
    for title, found in climbs.items():
        never = {prior: one.never_above for prior, one in found.items()}
        judge("climbs that never end above their starting loss, %", title, "≥ 95", never, lambda x: x >= 95)
        for away, least in ((5.0, 95), (10.0, 85), (20.0, 60)):
            reached_ = {prior: one.reached(away) for prior, one in found.items()}
            what = f"climbs from {away:.0f}° that end within {_REACHED:.0f}°, %"
            judge(what, title, f"≥ {least}", reached_, partial(le, least))
    return _table("| figure | on | goal | free | upright | standing | reached |", rows)


# Why goals are missed, by how the names of their figures begin.
_REASONS = {
    "median error, template right": (
        "Median error: from one image the refiner has to predict depth, and two views alone cannot tell a wrong "
        "depth from a wrong turn, so that matches move the templates' answer by a part of the way only. With "
        "depth, or [with a mesh](correspondence.md), the goals are reached."
    ),
    "right ones made worse": (
        "Right answers made worse: how far matches are believed was fitted so that at most 5 % of held-out answers "
        "become worse; on other objects it is up to 12 %."
    ),
    "centre": (
        "Centre: the circle around an outline is not centred on the object where it is seen from another side, and "
        "matches do not always see enough to correct that."
    ),
    "translation in its": (
        "Translation's ellipsoid: fitted on images in harsher weather than these, it is a little wide. With depth "
        "and without gravity it is too narrow: a wrong side that was slid onto the surface fits it well."
    ),
    "rotation in its": (
        "Rotation's ellipsoid: one spread serves renders and photographs; it was fitted in harsher weather than "
        "these renders have."
    ),
    "tracking and refined, motion known: median": (
        "Tracking: on the bundled sequence one frame alone errs by 1 to 2° where gravity is known. What is left of "
        "that after tracking is the same in all frames (with the object standing 0.5, 0.9 and 1.0° from three "
        "references, beside 0.1 to 0.2° that changes from frame to frame): an error that comes with the one "
        "reference, which no number of frames averages out. Dino begins up to 36° off and ends 2 to 5° off."
    ),
    "tracking and refined: rotation": (
        "Ellipsoids of tracked poses: how much frames tell anew was fitted on walks around held-out objects in "
        "harsh weather. The bundled sequence is far easier than these."
    ),
    "tracking and refined, motion unknown": (
        "Flips: dino has no texture and looks alike from several sides; where the camera's motion is unknown, only "
        "the frames themselves can say which side it was."
    ),
    "climbs from": (
        "Climbs: the peak of the likelihood is more than 5° from the truth in many pairs. Climbs from any start "
        "find the same peak (last columns of the tables below)."
    ),
}


def reasons(table: str) -> str:
    """Why the rows of a table of goals that are not all reached fall short, or nothing."""
    missed = [line.removeprefix("| ") for line in table.splitlines() if not line.endswith("| yes |")]
    told = [why for begins, why in _REASONS.items() if any(line.startswith(begins) for line in missed)]
    if not told:
        return ""
    lines = [fill(f"* {why}", 120, subsequent_indent="  ", break_on_hyphens=False) for why in told]
    return "\n".join(["### Where it falls short, and why", "", *lines, "", ""])


def _calibrated(covered: float) -> bool:
    return 86 <= covered <= 94


def reading(
    sets: Sequence[Measured],
    climbs: Mapping[str, Mapping[Prior, Climbs]],
    sequences: Mapping[str, Mapping[Prior, Mapping[str, Followed]]],
) -> str:
    """What the tables say, in words; arguments as of ``goals``."""
    parts = []
    for refinement, what in (
        ("correspondence", "Correspondence compares the likeliest modes of the templates with the image and chooses"
         " among them. Its answer is the mean of the templates' mode and of the offsets' pose, each weighed by its"
         " precision. With depth, what the camera saw is then slid onto the object's surface, which is most of the gain"
         " there."),
        ("synthesis", "Synthesis climbs the very likelihood that the templates sampled. A climb that gains little is"
         " taken back, since the templates' answer is a mean around a peak already. With depth, surfaces are brought"
         " together as above, and the gain is theirs."),
    ):  # fmt: skip
        stage, told = f"+ {refinement}", [what]
        for depth in (False, True):
            those = [one for one in sets if one.depth == depth and any(key[1] == stage for key in one.outcomes)]
            if those:
                told.append(f"{'With depth' if depth else 'Without depth'}, {_changes(those, stage)}.")
        if refinement == "synthesis":
            moved = [
                abs(one.error - one.start) > _MOVED
                for tested in sets
                if not tested.depth
                for (_, name), outcomes in tested.outcomes.items()
                if name == stage
                for one in outcomes
            ]
            if moved:
                told.append(f"Without depth {100 - 100 * np.mean(moved):.0f} % of the poses stay as they were.")
        parts.append(" ".join(told))
    ends = [one for found in climbs.values() for one in found.values()]
    if ends:
        stay = [one.reached(0.0) for one in ends]
        same = [one.agreed(_STARTS[-1]) for one in ends]
        parts.append(
            "A climb never takes a step that leads down, so that none ends above its starting loss. Where it ends is "
            f"another matter: of those begun at the very truth {min(stay):.0f} to {max(stay):.0f} % stay within "
            f"{_REACHED:.0f}° of it. Of the others the likelihood's own peak is elsewhere, which no climb can mend: "
            f"from {_STARTS[-1]:.0f}° away {min(same):.0f} to {max(same):.0f} % end at the very peak that those begun "
            "at the truth end at."
        )
    if sequences:
        parts.append(_tracking_told(sequences))
    return "\n\n".join(fill(part, 120, break_on_hyphens=False) for part in parts)


def _changes(sets: Sequence[Measured], stage: str) -> str:
    """By how much a stage changes the templates' figures, least to most, over sets and priors."""
    measures: tuple[tuple[str, str, Callable[[Sequence[Outcome]], float]], ...] = (
        ("Acc30", " points", lambda x: _within(x, 30)),
        ("the median error of right templates", "°", lambda x: _median(_right(x), "error")),
        ("the centre's error", " % of the crop", lambda x: 100 * _median(x, "centre")),
        ("the distance's", " %", lambda x: 100 * _median(x, "scale")),
    )
    told = []
    for name, unit, value in measures:
        found = [
            (value(outcomes) - value(one.outcomes[prior, TEMPLATE]), f"{one.name}, {prior}")
            for one in sets
            for (prior, row), outcomes in one.outcomes.items()
            if row == stage
        ]
        found = [pair for pair in found if np.isfinite(pair[0])]
        if found:
            (least, at_least), (most, at_most) = min(found), max(found)
            span = f"{least:+.1f} ({at_least}) to {most:+.1f}{unit} ({at_most})"
            told.append(f"{name} by {span if f'{least:.1f}' != f'{most:.1f}' else f'{most:+.1f}{unit}'}")
    return f"it changes {', '.join(told)}"


def _tracking_told(sequences: Mapping[str, Mapping[Prior, Mapping[str, Followed]]]) -> str:
    told = [
        "Tracking, with the camera's motion known (`tracking.fixed_frame`), adds up views from several sides. "
        "Belief is a sum of harmonics over all rotations, which a known motion turns exactly, so that steps cost no "
        "sharpness. The node refines what the tracker says, and the tracker adds up what the matches of all frames say."
    ]
    for title, tracked in sequences.items():
        medians = []
        for prior, ways in tracked.items():
            row = f"{TRACKED_KNOWN} {DEFAULT}" if f"{TRACKED_KNOWN} {DEFAULT}" in ways else TRACKED_KNOWN
            alone = DEFAULT if DEFAULT in ways else TEMPLATE
            before, after = (_median(ways[name].outcomes, "error") for name in (alone, row))
            medians.append(f"{before:.1f} → {after:.1f}° ({prior})")
        told.append(f"On {title} the median goes {', '.join(medians)}.")
        both = [(prior, ways[name].outcomes) for prior, ways in tracked.items() for name in ways if TRACKED in name]
        nees, covered = ([f(prior, x) for prior, x in both] for f in (_nees, _covered))
        width = _width(min(nees), max(nees), min(covered), max(covered))
        told.append(
            f"The covariance of tracked poses is {width} there: NEES/d {min(nees):.2f} to {max(nees):.2f}, "
            f"{min(covered):.0f} to {max(covered):.0f} % in the 90 % ellipsoid."
        )
    told.append(
        "Each run starts a third of the sequence away from its reference and goes once around, so that most starts "
        "are guesses, and leaving a wrong one is a jump. A sequence has no clock of its own; ten frames a second are "
        "assumed."
    )
    return " ".join(told)


def _width(nees_least: float, nees_most: float, covered_least: float, covered_most: float) -> str:
    """How wide covariances are beside the errors, in words."""
    if covered_least > 94:
        return "far too wide" if nees_most < 0.25 else "too wide"
    if covered_most < 86:
        return "far too narrow" if nees_least > 4 else "too narrow"
    return (
        "as wide as the errors" if covered_least >= 86 and covered_most <= 94 else "not of the right width everywhere"
    )


_TEXT = """# What follows the templates

Written by `{command}`; predictor `{model}`, one CPU thread. Pairs are of viewing directions less than 90° apart. Single
errors are modulo the object's symmetry, where one is known (renders). The default refinement is `{default}`.

## Goals

Of the default refinement, by what is known of gravity. The ms columns below are the stages' times; the pipeline's rate
in the node is measured in [load](load.md), poses from a mesh in [correspondence](correspondence.md), and that gradients
match finite differences by the tests.

{goals}

{reasons}## What the columns mean

* **template**: the templates alone. **+ affine**, **+ offsets**: correspondence's pose if this stage alone decides.
  **+ correspondence**: offsets weighed against the templates. **+ synthesis**, **+ both**: see the end.
* **right**: of the pairs whose templates' answer is within {right:.0f}° of the truth, the median error, the median of
  its part about the viewing direction (roll), and the share that the stage makes worse by more than {harm:.0f}°.
* **centre** of the object in the crop, relative to the crop's side; **scale**: distance, relative to it. Medians.
* **NEES/d**: mean of eᵀ Σ⁻¹ e / d of the rotation, 1 for a Gaussian error of this covariance; **in 90 %**: how often
  the truth is in the 90 % ellipsoid. Gravity is exact here, so a rotation errs in d = 3 (free), 2 (upright) or 1
  (standing) directions. The covariance's spread is fitted for the second (`nope_ros.training.calibrate`): errors have
  heavier tails than a Gaussian. **place in 90 %**: the same of the translation. Offsets from one image without gravity
  are never used; they claim no precision, and have NEES/d 0.
* **jumps**: how often the error changes by more than {jump:.0f}° from one frame to the next, wrong starts being left
  again included; **lost**: those from an error below {found:.0f}°.
* **flips**: how often the answer goes over to another mode, more than {flip:.0f}° away, while the object turns by
  less than {still:.0f}° in the camera and both frames list both modes (within {listed:.0f}°). In brackets those that
  lead from a wrong answer to one within {found:.0f}° of the truth: a wrong start that is left.
* **ms**: p50 / p95 of the stage alone (crop, network and matching for *template*; tracking with what refines it).

{tables}

## Reading them

{reading}
"""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--count", type=int, default=30, help="procedural objects (%(default)s)")
    parser.add_argument("--pairs", type=int, default=12, help="of an object and protocol, at most (%(default)s)")
    parser.add_argument("--meshes", type=Path, help="folder of meshes, such as ../shared/data/meshes/test")
    parser.add_argument("--photos", type=Path, help="folder of photographs, such as ../shared/data/real")
    parser.add_argument("--sequence", type=Path, action="append", default=[], help="folder with poses.json")
    parser.add_argument("--every", type=int, default=1, help="use every n-th frame of a sequence (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/refinement.md"), help="(%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stages = Stages.of(PoseEstimator.from_pretrained(given.predictor, device="cpu"))
    text = document(given, stages)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


def document(given: argparse.Namespace, stages: Stages) -> str:
    """Everything that the arguments ask for, measured and written down."""
    drawn = {"count": given.count, "pairs": given.pairs}
    procedural, depth, household, photos = "procedural", "procedural, depth", "household", "photographs"
    seen = {
        procedural: procedural_set(**drawn),
        depth: procedural_set(**drawn, protocols=("free", "standing"), depth=True),
    }
    climbed = {procedural: procedural_set(count=given.count)}
    if given.meshes is not None:
        seen[household], climbed[household] = mesh_set(given.meshes, pairs=given.pairs), mesh_set(given.meshes)
    if given.photos is not None:
        seen[photos], climbed[photos] = photo_set(given.photos, pairs=given.pairs), photo_set(given.photos)
    titles = {
        procedural: "Procedural objects that training never drew",
        depth: "The same, seen by a depth camera",
        household: "Scanned household objects",
        photos: "Photographs",
    }
    tables = []
    sets = [Measured(name, name == depth, on_pairs(found, stages)) for name, found in seen.items()]
    for one in sets:
        rows = [row(prior, stage, x) for prior in PRIORS for (p, stage), x in one.outcomes.items() if p == prior]
        count = len(one.outcomes[PRIORS[0], TEMPLATE])
        few = ""
        if 0 < count < 200:
            few = f"One pair in {count} is {100 / count:.1f} points; [benchmark](benchmark.md) has many more.\n\n"
        tables.append(f"## {titles[one.name]}\n\n{few}{_table(_HEAD, rows)}")
    rolls = on_rolls(procedural_set(**drawn, protocols=("upright",)), stages)
    rows = [row("free", way, outcomes) for (_, way), outcomes in rolls.items()]
    tables.append(f"## Under any roll: the same views of level cameras\n\n{_table(_HEAD, rows)}")
    climbs = {name: on_starts(found, stages.estimator, given.pairs) for name, found in climbed.items()}
    tables.append(_CLIMBED)
    for name, by_prior in climbs.items():
        rows = [climbs_row(prior, by_prior[prior]) for prior in PRIORS if prior in by_prior]
        tables.append(f"{titles[name]}:\n\n{_table(_CLIMBS, rows)}")
    sequences: dict[str, dict[Prior, dict[str, Followed]]] = {}
    for folder in given.sequence:
        moments = list(open_recording(folder))[:: given.every]
        title = f"{folder.resolve().name}, {len(moments)} frames"
        sequences[title] = {prior: on_sequence(moments, stages, prior) for prior in PRIORS}
        rows = [followed_row(prior, way, x) for prior, ways in sequences[title].items() for way, x in ways.items()]
        tables.append(f"## Over time: {title}\n\n{_table(_FOLLOWED, rows)}")
    return _TEXT.format(
        command=_command(given),
        model=stages.estimator.model_name,
        default=DEFAULT_REFINEMENT,
        goals=(table := goals(sets, rolls, climbs, sequences)),
        reasons=reasons(table),
        right=RIGHT_DEG,
        harm=HARM_DEG,
        jump=_JUMP,
        found=_FOUND,
        flip=_FLIP,
        still=_STILL,
        listed=np.degrees(CONFIDENCE_RADIUS),
        tables="\n\n".join(tables),
        reading=reading(sets, climbs, sequences),
    )


_CLIMBED = f"""## Synthesis from around the truth

Climbs of the likelihood that the templates sampled, of real pairs whose directions of view are less than {_NEAR:.0f}°
apart, {_RUNS} starts at each distance from the truth, drawn by seed, in the directions that the prior leaves. No climb
is taken back here. **from x°**: share of the starts x° away that end within {_REACHED:.0f}° of the truth;
**same peak**: that end within {_REACHED:.0f}° of where a climb begun at the truth itself ends."""


def _command(given: argparse.Namespace) -> str:
    options = [f"--count {given.count}", f"--pairs {given.pairs}"]
    options += [f"--meshes {given.meshes}"] if given.meshes else []
    options += [f"--photos {given.photos}"] if given.photos else []
    options += [f"--sequence {folder}" for folder in given.sequence] + [f"--every {given.every}"]
    return f"python -m nope_ros.evaluation.refinement {' '.join(options)}"


if __name__ == "__main__":
    main()
