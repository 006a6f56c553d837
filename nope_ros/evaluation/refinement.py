"""Writes docs/refinement.md: what each stage after the templates adds, on objects that training never saw.

python -m nope_ros.evaluation.refinement --meshes ../shared/data/meshes/test --sequence demo/sequence
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.stats import chi2

from nope_ros.crop import Crop
from nope_ros.demo.sequence import Moment, open_recording
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.meshes import mesh_set, procedural_set
from nope_ros.evaluation.photos import photo_set
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet
from nope_ros.frame import Frame, InputError
from nope_ros.pose import PoseEstimate
from nope_ros.prior import FREEDOM, PRIORS, Prior
from nope_ros.refine import REFINEMENTS, Refinement
from nope_ros.rotations import exp, geodesic_distance, log, twist
from nope_ros.tracking import Tracker

Array = NDArray[np.float64]

# A template is right if its rotation is this near to the truth, degrees; errors are compared from there.
_RIGHT = 15.0
# An error that changes by more than this from one frame to the next is a jump, degrees.
_JUMP = 45.0
# One that starts from an error below this loses what was found, degrees.
_FOUND = 30.0


@dataclass(frozen=True)
class Outcome:
    """One answer.

    Attributes:
        error: of the rotation, degrees.
        start: error of the templates' answer to the same image, degrees.
        roll: part of the error that is about the viewing direction, degrees.
        translation: ‖t − t_true‖ / ‖t_true‖.
        centre: error of the object's centre in the query's crop, relative to the crop's side.
        scale: error of the distance, relative to it.
        squared: normalised error squared of the rotation, eᵀ Σ⁻¹ e; on average the degrees of freedom that the prior
            leaves, if the covariance is right.
        seconds: that the stage took.
    """

    error: float
    start: float
    roll: float
    translation: float
    centre: float
    scale: float
    squared: float
    seconds: float


def outcome(pose: PoseEstimate, start: PoseEstimate, delta_R: Array, t: Array, crop: Crop, seconds: float) -> Outcome:
    """Compare a pose with the truth; ``crop`` of the query."""
    off = log(delta_R @ pose.delta_R.T)
    seen, true = (crop.K_virtual @ crop.R_virtual_camera @ point for point in (pose.t_camera_object, t))
    between = crop.R_virtual_camera @ delta_R @ pose.delta_R.T @ crop.R_virtual_camera.T
    return Outcome(
        float(np.degrees(np.linalg.norm(off))),
        float(np.degrees(geodesic_distance(start.delta_R, delta_R))),
        float(np.degrees(abs(twist(between)))),
        float(np.linalg.norm(pose.t_camera_object - t) / np.linalg.norm(t)),
        float(np.linalg.norm(seen[:2] / seen[2] - true[:2] / true[2]) / len(crop.image)),
        float(abs(np.log(np.linalg.norm(pose.t_camera_object) / np.linalg.norm(t)))),
        float(off @ np.linalg.solve(pose.covariance[3:, 3:], off)),
        seconds,
    )


def on_pairs(
    found: EvaluationSet, estimator: PoseEstimator, refinements: Sequence[Refinement]
) -> dict[tuple[Prior, str], list[Outcome]]:
    """Each stage's outcomes on a test set's pairs with viewing directions less than 90° apart."""
    outcomes: dict[tuple[Prior, str], list[Outcome]] = defaultdict(list)
    for one in track(found.objects(), found.kind, total=found.count, console=Console(stderr=True)):
        for prior in one.protocols:
            _on_object(one, prior, estimator, refinements, outcomes)
    return outcomes


def _on_object(
    one: EvaluationObject,
    prior: Prior,
    estimator: PoseEstimator,
    refinements: Sequence[Refinement],
    outcomes: dict[tuple[Prior, str], list[Outcome]],
) -> None:
    for reference, index in one.pairs:
        first, second = one.views[reference], one.views[index]
        if first.direction @ second.direction < 0:
            continue
        down = [None, None] if prior == "free" else [first.gravity_camera, second.gravity_camera]
        registered = estimator.register_frame(
            first.read(),
            R_camera_object=first.R_camera_object,
            t_camera_object=first.t_camera_object,
            gravity_camera=down[0],
        )
        delta_R, t = second.R_camera_object @ first.R_camera_object.T, second.t_camera_object
        frame = second.read()
        begin = time.perf_counter()
        query = estimator.look(frame, down[1])
        start = estimator.match(query, registered, prior)
        crop, seconds = query.crop, time.perf_counter() - begin
        outcomes[prior, "template"].append(outcome(start, start, delta_R, t, crop, seconds))
        for refinement in refinements:
            begin = time.perf_counter()
            pose = estimator.refine(query, registered, start, refinement)
            seconds = time.perf_counter() - begin
            outcomes[prior, f"+ {refinement}"].append(outcome(pose, start, delta_R, t, crop, seconds))


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


def on_rolls(found: EvaluationSet, estimator: PoseEstimator, seed: int = 0) -> dict[str, list[Outcome]]:
    """The templates' answers under "free" to views of level cameras, and to the same views after any roll."""
    outcomes: dict[str, list[Outcome]] = {"level": [], "any roll": []}
    rng = np.random.default_rng(seed)
    for one in track(found.objects(), "rolls", total=found.count, console=Console(stderr=True)):
        for reference, index in one.pairs:
            first, second = one.views[reference], one.views[index]
            if first.direction @ second.direction < 0:
                continue
            registered = estimator.register_frame(
                first.read(), R_camera_object=first.R_camera_object, t_camera_object=first.t_camera_object
            )
            frame, angle = second.read(), float(rng.uniform(-np.pi, np.pi))
            for way, roll in (("level", 0.0), ("any roll", angle)):
                turn = exp(np.array([0.0, 0.0, roll]))
                begin = time.perf_counter()
                query = estimator.look(rolled(frame, roll))
                pose = estimator.match(query, registered, "free")
                seconds = time.perf_counter() - begin
                delta_R = turn @ second.R_camera_object @ first.R_camera_object.T
                t = turn @ second.t_camera_object
                outcomes[way].append(outcome(pose, pose, delta_R, t, query.crop, seconds))
    return outcomes


@dataclass(frozen=True)
class Followed:
    """Outcomes of one way over a sequence, how often its error jumped, and how often away from the truth."""

    outcomes: list[Outcome]
    jumps: int
    lost: int


def on_sequence(moments: Sequence[Moment], estimator: PoseEstimator, prior: Prior) -> dict[str, Followed]:
    """A sequence followed with each third of it as the reference, begun a third further on and once around.

    Errors are of frames less than 90° from the reference; jumps are counted over all.
    """
    down = [None if prior == "free" else moment.gravity_camera for moment in moments]
    queries = [
        estimator.look(Frame.from_arrays(moment.image, moment.mask, moment.camera), gravity)
        for moment, gravity in zip(moments, down, strict=True)
    ]
    third = len(moments) // 3
    ways = {"every frame alone": None, "tracking": False, "tracking, camera's motion known": True}
    outcomes: dict[str, list[Outcome]] = {way: [] for way in ways}
    jumps, lost = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for reference in (0, third, 2 * third):
        at_reference = _truth(moments[reference])
        registered = estimator.register_frame(
            queries[reference].frame, t_camera_object=at_reference[1], gravity_camera=down[reference]
        )
        order = [(reference + third + step) % len(moments) for step in range(len(moments))]
        trackers = {way: Tracker() for way in ways}
        before: dict[str, Array] = {}
        for number, index in enumerate(order):
            R, t, direction = _truth(moments[index])
            delta_R = R @ at_reference[0].T
            start = estimator.match(queries[index], registered, prior)
            for way, known in ways.items():
                begin, pose = time.perf_counter(), start
                if known is not None:
                    fixed = R.T if known else None
                    pose = trackers[way].update(queries[index], registered, start, 0.1 * number, fixed)
                seconds = time.perf_counter() - begin
                off = pose.delta_R.T @ delta_R
                if way in before and geodesic_distance(off, before[way]) > np.radians(_JUMP):
                    jumps[way] += 1
                    lost[way] += int(geodesic_distance(before[way], np.eye(3)) < np.radians(_FOUND))
                before[way] = off
                if direction @ at_reference[2] > 0 and index != reference:
                    outcomes[way].append(outcome(pose, start, delta_R, t, queries[index].crop, seconds))
    return {way: Followed(outcomes[way], jumps[way], lost[way]) for way in ways}


def _truth(moment: Moment) -> tuple[Array, Array, Array]:
    if moment.truth is None:
        raise InputError(f"{moment.name}: has no true pose to compare with")
    return moment.truth.R_camera_object, moment.truth.t_camera_object, moment.truth.direction


# --- the document ---------------------------------------------------------------------------------------------------

_HEAD = (
    "| | | pairs | Acc15 | Acc30 | median | right: median | right: roll | right: worse by 2° | translation | centre "
    "| scale | NEES/d | in 90 % | ms |"
)
_FOLLOWED = "| | | frames | Acc15 | Acc30 | median | NEES/d | in 90 % | jumps | lost | ms |"


def row(prior: Prior, stage: str, outcomes: Sequence[Outcome]) -> str:
    """A row under ``_HEAD``."""
    right = [one for one in outcomes if one.start < _RIGHT]
    worse = np.mean([one.error > one.start + 2 for one in right]) if right else np.nan
    cells = [
        *_accuracy(outcomes),
        f"{np.median([one.error for one in right]):.1f}°" if right else "–",
        f"{np.median([one.roll for one in right]):.1f}°" if right else "–",
        f"{100 * worse:.0f} %" if stage.startswith("+") and right else "–",
        f"{100 * np.median([one.translation for one in outcomes]):.1f} %",
        f"{100 * np.median([one.centre for one in outcomes]):.1f} %",
        f"{100 * np.median([one.scale for one in outcomes]):.1f} %",
        *_spread(prior, outcomes),
        _time(outcomes),
    ]
    return "| " + " | ".join([prior, stage, *cells]) + " |"


def followed_row(prior: Prior, way: str, followed: Followed) -> str:
    """A row under ``_FOLLOWED``."""
    cells = [*_accuracy(followed.outcomes), *_spread(prior, followed.outcomes), str(followed.jumps), str(followed.lost)]
    return "| " + " | ".join([prior, way, *cells, _time(followed.outcomes) if "tracking" in way else "–"]) + " |"


def _accuracy(outcomes: Sequence[Outcome]) -> list[str]:
    error = np.array([one.error for one in outcomes])
    shares = [f"{100 * np.mean(error < limit):.0f} %" for limit in (15, 30)]
    return [str(len(error)), *shares, f"{np.median(error):.1f}°"]


def _spread(prior: Prior, outcomes: Sequence[Outcome]) -> list[str]:
    squared, freedom = np.array([one.squared for one in outcomes]), FREEDOM[prior]
    return [f"{squared.mean() / freedom:.2f}", f"{100 * np.mean(squared <= chi2.ppf(0.9, freedom)):.0f} %"]


def _time(outcomes: Sequence[Outcome]) -> str:
    p50, p95 = np.percentile([1000 * one.seconds for one in outcomes], [50, 95])
    return f"{p50:.1f} / {p95:.1f}"


def _table(head: str, rows: Iterable[str]) -> str:
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rows])


_TEXT = """# What follows the templates

Written by `{command}`; predictor `{model}`, one CPU thread. Pairs are of viewing directions less than 90° apart.

* **right**: of the pairs whose templates' answer is within {right:.0f}° of the truth, the median error, the median of
  its part about the viewing direction (roll), and the share that the stage makes worse by more than 2°.
* **centre** of the object in the crop, relative to the crop's side; **scale**: distance, relative to it. Medians.
* **NEES/d**: mean of eᵀ Σ⁻¹ e / d of the rotation, 1 for a Gaussian error of this covariance; **in 90 %**: how often
  the truth is in the 90 % ellipsoid. Gravity is exact here, so a rotation errs in d = 3 (free), 2 (upright) or 1
  (standing) directions. The covariance's spread is fitted for the second (`nope_ros.training.calibrate`): errors have
  heavier tails than a Gaussian.
* **jumps**: how often the error changes by more than {jump:.0f}° from one frame to the next, wrong starts being left
  again included; **lost**: those from an error below {found:.0f}°.
* **ms**: p50 / p95 of the stage alone (crop, network and matching for *template*).

{tables}

## Reading them

Correspondence compares the likeliest modes of the templates with the image and chooses among them: where single answers
are often wrong, more of them are right. Within a mode it gains centre and scale, and under *standing* the turn.

Synthesis climbs on the same likelihood that the templates sample, and the mean of the templates around the best one is
below their grid already. A climb that gains little is as often wrong as right, so it is taken back, and most poses stay
as they were. It is there for predictors whose grid is coarse; the default is `correspondence`.

Tracking is another matter: with the camera's motion known (`tracking.fixed_frame`) views from several sides add up.
Belief is a sum of harmonics over all rotations, which a known motion turns exactly, so steps cost no sharpness. Most is
gained where single frames are often wrong (dino). Where they are within 2° (the bundled sequence under *standing*)
there is little to average: views from the far side err by more than those from near the reference, and in the same
direction for a while. Without the motion, tracking only keeps an answer from jumping. Each run starts a third of the
sequence away from its reference and goes once around, so most starts are guesses, and leaving a wrong one is a jump. A
sequence has no clock of its own; ten frames a second are assumed.
"""


def available(estimator: PoseEstimator) -> list[Refinement]:
    """The refinements that can be had."""
    found: list[Refinement] = []
    for refinement in REFINEMENTS[1:]:
        try:
            estimator.refinement = refinement
        except InputError:
            continue
        found.append(refinement)
    estimator.refinement = "none"
    return found


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
    estimator = PoseEstimator.from_pretrained(given.predictor, device="cpu")
    refinements = available(estimator)
    tables = []
    sets = [("Procedural objects that training never drew", procedural_set(count=given.count, pairs=given.pairs))]
    with_depth = procedural_set(count=given.count, pairs=given.pairs, protocols=("free", "standing"), depth=True)
    sets.append(("The same, seen by a depth camera", with_depth))
    if given.meshes is not None:
        sets.append(("Scanned household objects", mesh_set(given.meshes, pairs=given.pairs)))
    if given.photos is not None:
        sets.append(("Photographs", photo_set(given.photos, pairs=given.pairs)))
    for title, found in sets:
        outcomes = on_pairs(found, estimator, refinements)
        rows = [row(prior, stage, outcomes[prior, stage]) for prior in PRIORS for stage in _stages(outcomes, prior)]
        count = len(outcomes[PRIORS[0], "template"])
        few = f"One pair in {count} is {100 / count:.1f} points; [benchmark](benchmark.md) has many more.\n\n"
        tables.append(f"## {title}\n\n{few if count < 200 else ''}{_table(_HEAD, rows)}")
    rolls = on_rolls(procedural_set(count=given.count, pairs=given.pairs, protocols=("upright",)), estimator)
    rows = [row("free", way, outcomes) for way, outcomes in rolls.items()]
    tables.append(f"## The templates under any roll: the same views of level cameras\n\n{_table(_HEAD, rows)}")
    for folder in given.sequence:
        moments = list(open_recording(folder))[:: given.every]
        rows = []
        for prior in PRIORS:
            followed = on_sequence(moments, estimator, prior)
            rows += [followed_row(prior, way, one) for way, one in followed.items()]
        tables.append(f"## Tracking: {folder.name}, {len(moments)} frames\n\n{_table(_FOLLOWED, rows)}")
    options = [f"--count {given.count}", f"--pairs {given.pairs}"]
    options += [f"--meshes {given.meshes}"] if given.meshes else []
    options += [f"--photos {given.photos}"] if given.photos else []
    options += [f"--sequence {folder}" for folder in given.sequence] + [f"--every {given.every}"]
    command = f"python -m nope_ros.evaluation.refinement {' '.join(options)}"
    text = _TEXT.format(
        command=command, model=estimator.model_name, right=_RIGHT, jump=_JUMP, found=_FOUND, tables="\n\n".join(tables)
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


def _stages(outcomes: dict[tuple[Prior, str], list[Outcome]], prior: Prior) -> list[str]:
    return [stage for found, stage in outcomes if found == prior]


if __name__ == "__main__":
    main()
