"""What a walk around an object is worth: the same queries against one reference, and against keyframes.

Of each object's views, the walk has those farthest from each other by direction, or, where views are in the order in
which they were taken, every other one; all others are queries, which neither side has seen. ``single`` has one of the
walk's views, drawn anew for each query; ``video`` has all of them, with the poses of their cameras but nothing of the
object: origin and axes are found by registration.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from nope_ros.draw import Globe, draw_distribution, zoomed
from nope_ros.draw import Viewpoint as MarkedView
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.evaluation.metrics import PairScore, Scores, calibration
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet, View, generator
from nope_ros.frame import InputError
from nope_ros.pose import PoseEstimate
from nope_ros.prior import PRIORS, Prior
from nope_ros.refine import Refinement
from nope_ros.rotations import exp, geodesic_distance
from nope_ros.video import KEYFRAMES, Walk, farthest

Array = NDArray[np.float64]
PoseSource = Literal["given", "estimated"]

SINGLE, VIDEO = "single", "video"


@dataclass(frozen=True)
class WalkReport:
    """What came of one evaluation.

    Attributes:
        kind: of the test set.
        source: of the test set.
        model: name of the predictor.
        keyframes: asked for of each object.
        poses: where the registration had camera poses from.
        pose_noise_deg: by which every camera was turned before that.
        ordered: whether views were in the order in which they were taken.
        seed: of all draws.
        refinement: what followed the templates.
        scores: of every query, by either method.
        registration_seconds: of each walk.
        skipped: what could not be used, and why.
    """

    kind: str
    source: str
    model: str
    keyframes: int
    poses: PoseSource
    pose_noise_deg: float
    ordered: bool
    seed: int
    refinement: Refinement
    scores: tuple[PairScore, ...]
    registration_seconds: tuple[float, ...]
    skipped: tuple[str, ...]

    def scores_of(self, prior: Prior, method: str, name: str | None = None) -> Scores:
        """Figures of one method under one protocol, of one object or of all."""
        return Scores.of(
            [
                score
                for score in self.scores
                if (score.protocol, score.method) == (prior, method) and name in (None, score.object_name)
            ]
        )

    @property
    def protocols(self) -> tuple[Prior, ...]:
        """Those that were run."""
        return tuple(prior for prior in PRIORS if any(score.protocol == prior for score in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds: ``single`` and ``video`` under the first protocol on top, then each protocol."""
        values: dict[str, Any] = {
            "set": self.kind,
            "source": self.source,
            "predictor": self.model,
            "keyframes": self.keyframes,
            "poses": self.poses,
            "pose_noise_deg": self.pose_noise_deg,
            "ordered": self.ordered,
            "seed": self.seed,
            "refinement": self.refinement,
            "registration_seconds": round(float(np.median(self.registration_seconds or (0.0,))), 2),
            "skipped": list(self.skipped),
        }
        for prior in self.protocols:
            names = sorted({score.object_name for score in self.scores if score.protocol == prior})
            both = {method: self.scores_of(prior, method).to_dict() for method in (SINGLE, VIDEO)}
            if "protocol" not in values:
                values |= {"protocol": prior, **both}
            values[prior] = {
                **both,
                "objects": {
                    name: {method: self.scores_of(prior, method, name).to_dict() for method in (SINGLE, VIDEO)}
                    for name in names
                },
            }
        return values

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self, objects: bool = False) -> Table:
        """The figures as a table for a terminal; ``objects`` adds a row for each of them."""
        noise = f", camera poses off by {self.pose_noise_deg:g}°" if self.pose_noise_deg else ""
        seconds = float(np.median(self.registration_seconds or (0.0,)))
        title = f"{self.kind}: {self.model}, {self.keyframes} keyframes in {seconds:.1f} s, poses {self.poses}{noise}"
        title += ", in order" if self.ordered else ""
        title += "" if self.refinement == "none" else f", refinement {self.refinement}"
        table = Table(title=title, title_justify="left")
        for column in (
            "protocol",
            "",
            "pairs",
            "Acc30",
            "median °",
            "Acc30 sym",
            "median sym °",
            "50 % set",
            "90 % set",
            "translation %",
        ):
            table.add_column(column, justify="right" if column not in ("protocol", "") else "left")
        for prior in self.protocols:
            for method in (SINGLE, VIDEO):
                table.add_row(prior, method, *_cells(self.scores_of(prior, method)))
            if objects:
                for name in sorted({score.object_name for score in self.scores if score.protocol == prior}):
                    for method in (SINGLE, VIDEO):
                        table.add_row(
                            "", f"  {name} {method}", *_cells(self.scores_of(prior, method, name)), style="dim"
                        )
            table.add_section()
        return table


def _cells(scores: Scores) -> list[str]:
    moved = scores.translation_relative_median
    shown = (
        scores.acc30,
        scores.median_deg,
        scores.acc30_sym,
        scores.median_deg_sym,
        scores.coverage50,
        scores.coverage90,
        None if moved is None else 100 * moved,
    )
    return [str(scores.pairs), *("–" if value is None else f"{value:.1f}" for value in shown)]


def evaluate_walks(
    found: EvaluationSet,
    estimator: PoseEstimator,
    protocols: Sequence[Prior] = PRIORS,
    *,
    seed: int = 0,
    keyframes: int = KEYFRAMES,
    queries: int | None = None,
    poses: PoseSource = "given",
    pose_noise_deg: float = 0.0,
    ordered: bool = False,
    pictures: Path | None = None,
    progress: Progress | None = None,
) -> WalkReport:
    """Register every object of a set from one view and from many, and ask both about the rest of its views.

    Args:
        found: the set; its pairs are not used.
        estimator: what to evaluate.
        protocols: those to run, where the set has them.
        seed: draws keyframes, single references and noise.
        keyframes: of each object; at most half of its views.
        queries: of each object, at most.
        poses: whether registration is given the cameras' poses.
        pose_noise_deg: every camera is turned by this angle about an axis of its own before registration.
        ordered: whether views come as they were taken, by little steps. Every other one is then walked, registration is
            told so, and chooses its keyframes itself.
        pictures: folder for ``walk_<object>_<protocol>.png``: what one view and what all make of the query that looks
            from farthest from its single reference.
        progress: shows how far it is.
    """
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    scores: list[PairScore] = []
    seconds: list[float] = []
    skipped: list[str] = []
    shown: AbstractContextManager[object] = progress if progress is not None else nullcontext()
    with shown:
        task = progress.add_task("video", total=found.count) if progress is not None else None
        for evaluated in found.objects():
            asked = tuple(prior for prior in evaluated.protocols if prior in protocols)
            for level in (False, True):
                part = tuple(prior for prior in asked if (prior != "free") == level)
                if part:
                    rng = generator(seed, evaluated.name, "walk")
                    try:
                        one = _Walked.of(evaluated, estimator, level, rng, keyframes, poses, pose_noise_deg, ordered)
                        found_scores, unread = one.ask(part, queries, pictures)
                        scores += found_scores
                        seconds.append(one.seconds)
                        skipped += [*one.skipped, *unread]
                    except InputError as error:
                        skipped.append(f"{evaluated.name}: {error}")
            if progress is not None and task is not None:
                progress.advance(task)
    return WalkReport(
        found.kind,
        found.source,
        estimator.model_name,
        keyframes,
        poses,
        pose_noise_deg,
        ordered,
        seed,
        estimator.refinement,
        tuple(scores),
        tuple(seconds),
        tuple(dict.fromkeys(skipped)),
    )


@dataclass(frozen=True)
class _Walked:
    """One object, registered from one view (each of the keyframes) and from all of them.

    ``R_truth_object`` (3, 3) and ``origin`` (3,) place the walk's object frame in the true one; the origin is None
    where camera poses were estimated.
    """

    evaluated: EvaluationObject
    estimator: PoseEstimator
    level: bool
    rng: Generator
    chosen: tuple[int, ...]
    singles: dict[int, RegisteredObject]
    together: RegisteredObject
    R_truth_object: Array
    origin: Array | None
    seconds: float
    skipped: tuple[str, ...]

    @classmethod
    def of(
        cls,
        evaluated: EvaluationObject,
        estimator: PoseEstimator,
        level: bool,
        rng: Generator,
        keyframes: int,
        poses: PoseSource,
        noise_deg: float,
        ordered: bool,
    ) -> _Walked:
        views = evaluated.views
        first = int(rng.integers(len(views)))
        chosen = list(range(first % 2, len(views), 2)) if ordered else _spread(views, first, keyframes)
        frames = {index: views[index].read() for index in chosen}
        begin = time.perf_counter()
        walk = Walk(estimator.predictor.crop_size, ordered=ordered)
        for index in chosen:
            view = views[index]
            gravity = view.gravity_camera if level else None
            pose = _noisy(view, noise_deg, rng) if poses == "given" else None
            walk.add(view.name, frames[index], gravity_camera=gravity, pose=pose)
        together = estimator.register_walk(walk, object_id="video", keyframes=keyframes)
        seconds = time.perf_counter() - begin
        kept = together.keyframes
        assert kept is not None
        truth = {view.name: view.R_camera_object for view in views}
        R_truth_object = kept.R_fixed_object
        if poses == "estimated":  # in a frame of their own, which is laid over the true one before errors are counted
            offsets = [truth[name].T @ R for name, R in zip(kept.names, kept.R_camera_object, strict=True)]
            R_truth_object = _chordal_median(np.stack(offsets))
        singles = {}
        for index in chosen:
            view = views[index]
            singles[index] = estimator.register_frame(
                frames[index],
                object_id="single",
                R_camera_object=view.R_camera_object,
                t_camera_object=view.t_camera_object,
                gravity_camera=view.gravity_camera if level else None,
            )
        refused = tuple(f"{evaluated.name} {one.name}: {one.reason}" for one in kept.refused)
        origin = kept.t_fixed_object if poses == "given" else None
        return cls(
            evaluated, estimator, level, rng, tuple(chosen), singles, together, R_truth_object, origin, seconds, refused
        )

    def ask(
        self, protocols: Sequence[Prior], queries: int | None, pictures: Path | None = None
    ) -> tuple[list[PairScore], list[str]]:
        """Scores of both methods on the views that are no keyframes; what could not be read, and why."""
        views = self.evaluated.views
        rest = [index for index in range(len(views)) if index not in self.chosen]
        if queries is not None and queries < len(rest):
            rest = [rest[index] for index in np.sort(self.rng.choice(len(rest), queries, replace=False))]
        scores: list[PairScore] = []
        unread = []
        farthest_apart: dict[Prior, tuple[float, View, View, PoseEstimate, PoseEstimate]] = {}
        for query in rest:
            reference = self.chosen[int(self.rng.integers(len(self.chosen)))]
            view = views[query]
            try:
                frame = view.read()
            except InputError as error:
                unread.append(f"{self.evaluated.name} {view.name}: {error}")
                continue
            for prior in protocols:
                single, video = self.estimator.estimate_frame(
                    frame,
                    [self.singles[reference], self.together],
                    prior=prior,
                    gravity_camera=view.gravity_camera if self.level else None,
                )
                known, origin = np.zeros(3), self.origin
                scores.append(self._score(single, np.eye(3), known, views[reference], view, SINGLE, prior))
                scores.append(self._score(video, self.R_truth_object, origin, None, view, VIDEO, prior))
                apart = scores[-2].direction_deg
                if prior not in farthest_apart or apart > farthest_apart[prior][0]:
                    farthest_apart[prior] = (apart, views[reference], view, single, video)
        if pictures is not None:
            for prior, (_, first, view, single, video) in farthest_apart.items():
                path = pictures / f"walk_{self.evaluated.name.replace('/', '_')}_{prior}.png"
                cv2.imwrite(str(path), self._picture(first, view, single, video)[..., ::-1])
        return scores, unread

    def _picture(self, reference: View, query: View, single: PoseEstimate, video: PoseEstimate) -> NDArray[np.uint8]:
        """The two photographs, and over all viewpoints what one view and what the walk make of the second."""
        frames = [view.read() for view in (reference, query)]
        seen = [zoomed(frame.image, frame.mask, frame.camera.K, 240, 240, fill=0.75)[0] for frame in frames]
        ray, down = query.t_camera_object, query.gravity_camera
        up = np.array([0.0, 0.0, 1.0]) if down is None else -query.R_camera_object.T @ down
        globe = Globe.around(reference.direction, up)
        panels = [np.concatenate(seen)]
        for title, estimate, R_truth_object in (
            ("one reference view", single, np.eye(3)),
            (f"{len(self.chosen)} views of a walk", video, self.R_truth_object),
        ):
            R = estimate.R_camera_object @ R_truth_object.T
            error = np.degrees(geodesic_distance(R, query.R_camera_object))
            panels.append(
                draw_distribution(
                    estimate.orientations @ R_truth_object.T,
                    estimate.distribution.probabilities,
                    ray,
                    globe,
                    [
                        MarkedView.of("truth", query.R_camera_object, ray, globe),
                        MarkedView.of("estimate", R, ray, globe),
                    ],
                    title=title,
                    note=f"error {error:.0f}°, confidence {100 * estimate.confidence:.0f} %",
                )
            )
        return np.concatenate(panels, axis=1)

    def _score(
        self,
        estimate: PoseEstimate,
        R_truth_object: Array,
        origin: Array | None,
        reference: View | None,
        query: View,
        method: str,
        prior: Prior,
    ) -> PairScore:
        R_estimated = estimate.R_camera_object @ R_truth_object.T
        R_true = query.R_camera_object
        # The object's own rotation at its reference tells which delta_R would have been right.
        right = R_true @ R_truth_object @ estimate.reference.R_camera_object.T
        nearest = max(
            (self.evaluated.views[index] for index in self.chosen) if reference is None else [reference],
            key=lambda view: float(view.direction @ query.direction),
        )
        moved = None
        if origin is not None:
            t_true = R_true @ origin + query.t_camera_object
            moved = float(np.linalg.norm(estimate.t_camera_object - t_true) / np.linalg.norm(t_true))
        return PairScore(
            method=method,
            protocol=prior,
            object_name=self.evaluated.name,
            reference=nearest.name,
            query=query.name,
            delta_R=tuple(tuple(float(value) for value in row) for row in estimate.delta_R),
            error_deg=float(np.degrees(geodesic_distance(R_estimated, R_true))),
            error_sym_deg=float(np.degrees(self.evaluated.symmetry.error(R_estimated, R_true))),
            direction_deg=float(np.degrees(np.arccos(np.clip(nearest.direction @ query.direction, -1, 1)))),
            confidence=estimate.confidence,
            calibration=calibration(estimate.distribution, right),
            translation_relative=moved,
        )


def _noisy(view: View, noise_deg: float, rng: Generator) -> tuple[Array, Array]:
    """The camera's pose, turned in place by an angle about a random axis."""
    axis = rng.normal(size=3)
    turn = exp(np.radians(noise_deg) * axis / np.linalg.norm(axis))
    return turn @ view.R_camera_object, turn @ view.t_camera_object


def _spread(views: Sequence[View], first: int, count: int) -> list[int]:
    # Those farthest from each other, at most half of all; the one drawn comes first, as its yaw is the object's.
    order = [*range(first, len(views)), *range(first)]
    directions = np.stack([views[index].direction for index in order])
    chosen = [order[index] for index in farthest(directions, min(count, len(views) // 2))]
    return [chosen[0], *sorted(chosen[1:])]


def _chordal_median(rotations: Array) -> Array:
    """The rotation (3, 3) with the least sum of distances to others (N, 3, 3), by reweighted averages."""
    weights = np.ones(len(rotations))
    mean = rotations[0]
    for _ in range(20):
        u, _, vt = np.linalg.svd(np.einsum("n,nij->ij", weights, rotations))
        mean = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        weights = 1 / (geodesic_distance(rotations, mean) + 0.05)
    return mean
