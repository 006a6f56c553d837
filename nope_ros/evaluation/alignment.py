"""What aligning is worth: pairs of one kind, of one object, and of different kinds, with and without cycles' weight.

Kinds are by name: the network is trained on single objects and is never told what any of them is. Truth is that the
makers of one source turn all things of a kind the same way; errors are modulo the symmetries of both objects. Of meshes
of no known kind, two recordings of one object are laid over each other, and different objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from nope_ros.align import GATE, Alignment, Surface, align_surfaces
from nope_ros.draw import draw_pair, on_white
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.meshes import mesh_set
from nope_ros.evaluation.protocol import EvaluationObject, generator
from nope_ros.evaluation.symmetry import Symmetry
from nope_ros.features import FeatureExtractor
from nope_ros.frame import InputError
from nope_ros.rendering.files import mesh_files
from nope_ros.rotations import exp
from nope_ros.video import Walk

Array = NDArray[np.float64]

# Kinds whose things have a front, of makers who turned them all the same way: seen on renders side by side.
_KINDS = {
    "chair": r"kaykit_(furniture|restaurant)/chair_[A-C]",
    "couch": r"kaykit_furniture/(couch|armchair)(_pillows)?",
    "bed": r"kaykit_(dungeon/bed_(decorated|floor|frame)|furniture/bed_\w+)",
    "wall shelf": r"kaykit_furniture/shelf_[AB]_\w+",
    "shelf": r"kaykit_dungeon/shel(f|ves)\w*",
    "cabinet": r"kaykit_furniture/cabinet_\w+",
    "chest": r"kaykit_dungeon/(chest|trunk)\w*",
    "stove": r"kaykit_restaurant/stove_\w+",
    "fridge": r"kaykit_restaurant/fridge_\w+",
    "kitchen counter": r"kaykit_restaurant/kitchentable_\w+",
    "pan": r"kaykit_restaurant/pan_[AB]",
    "bottle": r"kaykit_dungeon/bottle_\w+",
    "car": r"gazebo_models/(suv|pickup)",
}
# Kinds that may pass for each other, of which nothing is asked.
_ALIKE = (
    {"chair", "couch"},
    {"couch", "bed"},
    {"wall shelf", "shelf"},
    {"stove", "kitchen counter"},
    {"stove", "cabinet"},
    {"cabinet", "kitchen counter"},
    {"cabinet", "chest"},
    {"cabinet", "shelf"},
    {"cabinet", "fridge"},
)

ARMS = ("ours", "ours, no cycles", "published", "published, no cycles", "random")
"""Of methods: with the latents' correlation, or as published; with weights by cycles, or all the same; chance."""
_ARM_OPTIONS = {
    "ours": {},
    "ours, no cycles": {"cycles": False},
    "published": {"by_latents": False},
    "published, no cycles": {"by_latents": False, "cycles": False},
}
_DRAWS = 4000
WRONG_ACCEPTED = 0.05
"""Share of pairs of different kinds that a gate may let through."""


@dataclass(frozen=True)
class Registered:
    """An object, registered from one half of its views.

    Attributes:
        kind: see ``_KINDS``; empty where none is known.
        name: of the object.
        half: 0 or 1: which of two recordings of it.
        surface: what is compared.
        R_source_object: (3, 3), its frame in its source's.
        symmetry: of the object, in its source's frame.
        picture: (S, S, 3) uint8 RGB, its first keyframe.
    """

    kind: str
    name: str
    half: int
    surface: Surface
    R_source_object: Array
    symmetry: Symmetry
    picture: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class PairResult:
    """One pair under one arm: error in degrees (None where there is no truth), and what the method says of itself."""

    relation: str
    arm: str
    names: tuple[str, str]
    error_deg: float | None
    score: float


@dataclass(frozen=True)
class AlignmentReport:
    """What came of one evaluation.

    Attributes:
        source: folder of the meshes.
        model: name of the predictor.
        features: name of the extractor, or "latents".
        views: of each recording.
        gate: that was asked about.
        results: of every pair under every arm.
        skipped: what could not be used, and why.
    """

    source: str
    model: str
    features: str
    views: int
    gate: float
    results: tuple[PairResult, ...]
    skipped: tuple[str, ...]

    def errors(self, relation: str, arm: str) -> Array:
        """Degrees (N,) of one relation's pairs, in an order that is the same for all arms."""
        found = [one.error_deg for one in self.results if (one.relation, one.arm) == (relation, arm)]
        return np.array([error for error in found if error is not None])

    def scores(self, relation: str, arm: str = "ours") -> Array:
        """(N,) of one relation's pairs."""
        return np.array([one.score for one in self.results if (one.relation, one.arm) == (relation, arm)])

    def acc30(self, relation: str, arm: str) -> tuple[float, float, float]:
        """Per cent within 30°, and its 95 % bootstrap interval."""
        return _bootstrap(self.errors(relation, arm) < 30)

    def gain(self, relation: str, arm: str, over: str) -> tuple[float, float, float]:
        """Points that one arm has over another on the same pairs, and their 95 % bootstrap interval."""
        return _bootstrap((self.errors(relation, arm) < 30).astype(float) - (self.errors(relation, over) < 30))

    def calibrated_gate(self) -> float | None:
        """The least score that lets through no more than ``WRONG_ACCEPTED`` of the pairs of different kinds.

        Where no kinds are known, of the pairs of different objects, some of which may be of one kind: a gate that is
        stricter than it need be.
        """
        known = self.scores("different kinds")
        scores = np.sort(known if len(known) else self.scores("different objects"))
        return None if len(scores) == 0 else float(scores[-1 - int(WRONG_ACCEPTED * len(scores))] + 1e-3)

    def accepted(self, relation: str, gate: float) -> float | None:
        """Per cent of one relation's pairs that reach a gate."""
        scores = self.scores(relation)
        return None if len(scores) == 0 else float(100 * (scores >= gate).mean())

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        values: dict[str, Any] = {
            "source": self.source,
            "predictor": self.model,
            "features": self.features,
            "views": self.views,
            "skipped": list(self.skipped),
        }
        for relation in ("one kind", "one object"):
            values[relation] = {
                arm: {
                    "pairs": len(self.errors(relation, arm)),
                    "acc30": self.acc30(relation, arm),
                    "median_deg": float(np.median(self.errors(relation, arm))),
                }
                for arm in ARMS
                if len(self.errors(relation, arm))
            }
        if len(self.errors("one kind", "ours")):
            values["gains"] = {f"{arm} over {over}": self.gain("one kind", arm, over) for arm, over in _COMPARED}
        gates = {"asked": self.gate, "calibrated": self.calibrated_gate()}
        values["gates"] = {
            name: {"gate": gate} | {relation: self.accepted(relation, gate) for relation in _RELATIONS}
            for name, gate in gates.items()
            if gate is not None
        }
        return values

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def tables(self) -> list[Table]:
        """The figures for a terminal."""
        title = f"{self.source}: {self.model}, features {self.features}, {self.views} views"
        errors = Table(title=title, title_justify="left")
        for column in ("pairs of", "", "pairs", "Acc30 (95 %)", "median °"):
            errors.add_column(column, justify="left" if column in ("pairs of", "") else "right")
        for relation in ("one kind", "one object"):
            for arm in ARMS:
                found = self.errors(relation, arm)
                if len(found):
                    cells = _with_interval(self.acc30(relation, arm))
                    errors.add_row(relation, arm, str(len(found)), cells, f"{np.median(found):.1f}")
        if len(self.errors("one kind", "ours")):
            for arm, over in _COMPARED:
                errors.add_row("", f"{arm} over {over}", "", _with_interval(self.gain("one kind", arm, over)), "")
        gates = Table(title="accepted by the gate", title_justify="left")
        relations = [relation for relation in _RELATIONS if len(self.scores(relation))]
        for column in ("gate", *relations):
            gates.add_column(column, justify="right")
        calibrated = self.calibrated_gate()
        for gate in (self.gate, calibrated):
            if gate is not None:
                shares = [self.accepted(relation, gate) for relation in relations]
                shown = f"{gate:.3f}" + (" (calibrated)" if gate == calibrated else "")
                gates.add_row(shown, *(f"{share:.0f} %" for share in shares))
        return [errors, gates]


_RELATIONS = ("different kinds", "different objects", "one kind", "one object")
_COMPARED = (
    ("ours", "ours, no cycles"),
    ("published", "published, no cycles"),
    ("ours", "published, no cycles"),
    ("ours", "random"),
)


def _bootstrap(hits: NDArray[Any]) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    means = 100 * hits[rng.integers(len(hits), size=(_DRAWS, len(hits)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(100 * hits.mean()), float(low), float(high)


def _with_interval(values: tuple[float, float, float]) -> str:
    return f"{values[0]:.0f} ({values[1]:.0f} to {values[2]:.0f})"


def evaluate_alignment(
    folder: Path,
    estimator: PoseEstimator,
    *,
    extractor: FeatureExtractor | None = None,
    views: int = 16,
    kinds: Sequence[str] | None = None,
    pairs: int | None = None,
    gate: float = GATE,
    seed: int = 0,
    cache: Path | None = None,
    pictures: Path | None = None,
    progress: Progress | None = None,
) -> AlignmentReport:
    """Register objects twice each, from views of their own, and lay them over each other.

    Args:
        folder: of meshes, ``<source>/<object>.glb``, in which things of ``_KINDS`` are found by name. If none is,
            all its meshes are taken, of no kind.
        estimator: what to evaluate.
        extractor: of features; the latents' own by default.
        views: of each recording.
        kinds: those to use.
        pairs: most of each relation.
        gate: to ask about.
        seed: draws cameras, light and pairs.
        cache: file of known symmetries.
        pictures: folder in which every pair of one kind is drawn.
        progress: shows how far it is.

    Raises:
        InputError: if fewer than two meshes, or of ``kinds`` fewer than two things of a kind, are there.
    """
    members = kinds_of(folder, kinds)
    names = {name: kind for kind, found in members.items() for name in found}
    found_set = mesh_set(folder, seed, protocols=("free",), objects=list(names), views=2 * views, cache=cache)
    registered: list[Registered] = []
    skipped: list[str] = []
    shown: AbstractContextManager[object] = progress if progress is not None else nullcontext()
    with shown:
        task = progress.add_task("registering", total=len(names)) if progress is not None else None
        for evaluated in found_set.objects():
            for half in range(2):
                try:
                    registered.append(_register(evaluated, names[evaluated.name], half, estimator, extractor))
                except InputError as error:
                    skipped.append(f"{evaluated.name}: {error}")
            if progress is not None and task is not None:
                progress.advance(task)
        chosen = _pairs(registered, pairs, seed)
        if progress is not None:
            task = progress.add_task("aligning", total=len(chosen))
        results: list[PairResult] = []
        for relation, a, b in chosen:
            results += _results(relation, a, b, gate, generator(seed, a.name, b.name, relation))
            if pictures is not None and relation == "one kind":
                _draw(a, b, gate, pictures)
            if progress is not None and task is not None:
                progress.advance(task)
    name = "latents" if extractor is None else extractor.name
    return AlignmentReport(
        str(folder), estimator.model_name, name, views, gate, tuple(results), tuple(dict.fromkeys(skipped))
    )


def kinds_of(folder: Path, kinds: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Names of the objects of each kind that a folder holds; of an empty kind all of them, if it holds none we know.

    Raises:
        InputError: if a kind is unknown, none of those asked for has two, or the folder holds no two meshes.
    """
    unknown = [kind for kind in kinds or () if kind not in _KINDS]
    if unknown:
        raise InputError(f"kinds: {', '.join(unknown)} is none of {', '.join(_KINDS)}")
    stored = list(mesh_files(folder))
    members = {
        kind: [name for name in stored if re.fullmatch(pattern, name)]
        for kind, pattern in _KINDS.items()
        if kinds is None or kind in kinds
    }
    members = {kind: found for kind, found in members.items() if len(found) > 1}
    if not members and kinds is None and len(stored) > 1:
        return {"": stored}
    if not members:
        raise InputError(f"kinds: {folder} holds no two objects of one kind; known by name are {', '.join(_KINDS)}")
    return members


def _register(
    evaluated: EvaluationObject, kind: str, half: int, estimator: PoseEstimator, extractor: FeatureExtractor | None
) -> Registered:
    walk = Walk(estimator.predictor.crop_size, ordered=False)
    views = evaluated.views[half::2]
    for view in views:
        walk.add(view.name, view.read(), pose=(view.R_camera_object, view.t_camera_object))
    registered = estimator.register_walk(walk, object_id="object", keyframes=len(views))
    assert registered.keyframes is not None
    surface = Surface.of(registered, extractor)
    R_source_object = registered.keyframes.R_fixed_object
    picture = on_white(registered)
    return Registered(kind, evaluated.name, half, surface, R_source_object, evaluated.symmetry, picture)


def _draw(a: Registered, b: Registered, gate: float, folder: Path) -> None:
    shown = [(one.name.rsplit("/", 1)[-1], one.picture) for one in (a, b) if one.picture is not None]
    found = align_surfaces(a.surface, b.surface, gate=gate)
    name = "_".join(one.name.replace("/", "_") for one in (a, b))
    draw_pair(a.surface, b.surface, found, folder / f"{name}.png", shown)


def _pairs(found: Sequence[Registered], most: int | None, seed: int) -> list[tuple[str, Registered, Registered]]:
    """All pairs of one kind and of one object, and as many of different kinds; each thing's first recording but one.

    Of objects of no known kind, pairs of different objects take the place of both.
    """
    relations: dict[str, list[tuple[Registered, Registered]]] = {relation: [] for relation in _RELATIONS}
    for a, b in combinations(found, 2):
        if a.name == b.name:
            relations["one object"].append((a, b))
        elif a.half == b.half == 0 and "" in (a.kind, b.kind):
            relations["different objects"].append((a, b))
        elif a.half == b.half == 0 and a.kind == b.kind:
            relations["one kind"].append((a, b))
        elif a.half == b.half == 0 and {a.kind, b.kind} not in _ALIKE:
            relations["different kinds"].append((a, b))
    rng = generator(seed, "pairs")
    limit = max(len(relations["one kind"]), len(relations["one object"]), 100) if most is None else most
    chosen = []
    for relation, pairs in relations.items():
        kept = pairs
        if len(pairs) > limit:
            kept = [pairs[index] for index in np.sort(rng.choice(len(pairs), limit, replace=False))]
        chosen += [(relation, a, b) for a, b in kept]
    return chosen


def _results(relation: str, a: Registered, b: Registered, gate: float, rng: np.random.Generator) -> list[PairResult]:
    names = (a.name, b.name)
    if relation in ("different kinds", "different objects"):
        found = align_surfaces(a.surface, b.surface, gate=gate)
        return [PairResult(relation, "ours", names, None, found.score)]
    results = []
    for arm, options in _ARM_OPTIONS.items():
        if relation == "one kind" or arm == "ours":
            found = align_surfaces(a.surface, b.surface, gate=gate, **options)
            results.append(PairResult(relation, arm, names, _error(found, a, b), found.score))
    q = rng.normal(size=4)
    angle = 2 * np.arctan2(np.linalg.norm(q[1:]), q[0])  # a unit quaternion drawn uniformly
    chance = _error_of(exp(angle * q[1:] / np.linalg.norm(q[1:])), a, b)
    return [*results, PairResult(relation, "random", names, chance, 0.0)]


def _error(found: Alignment, a: Registered, b: Registered) -> float:
    return _error_of(a.R_source_object @ found.R @ b.R_source_object.T, a, b)


def _error_of(R_source: Array, a: Registered, b: Registered) -> float:
    """Degrees by which b's axes are off those of a, both in their source's frame, modulo the symmetries of either."""
    right = np.eye(3)
    return float(np.degrees(min(b.symmetry.error(R_source, right), a.symmetry.error(R_source.T, right))))


def add_arguments(parser: Any) -> None:
    """Arguments of ``nope-ros evaluate align`` after its folder."""
    parser.add_argument("--views", type=int, default=16, help="of each recording (%(default)s)")
    parser.add_argument("--pairs", type=int, help="most pairs of each relation")
    parser.add_argument("--kinds", type=lambda text: text.split(","), metavar="A,B,...", help="those to use")
    parser.add_argument("--gate", type=float, default=GATE, help="to ask about (%(default)s)")
    parser.add_argument("--features", type=Path, metavar="FILE", help="checkpoint of an extractor; our own by default")
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--cache", type=Path, help="file of known symmetries of meshes; by default the user's")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw every pair of one kind there")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run(args: Any, progress: Progress | None = None) -> AlignmentReport:
    """The evaluation that ``nope-ros evaluate align`` asks for.

    Raises:
        InputError: naming what does not fit.
    """
    for name, least in (("views", 4), ("pairs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: {value} is less than {least}")
    extractor = None
    if args.features is not None:
        extractor = FeatureExtractor.from_checkpoint(args.features, device=args.device)
    return evaluate_alignment(
        args.dir,
        PoseEstimator.from_pretrained(args.predictor, device=args.device),
        extractor=extractor,
        views=args.views,
        kinds=args.kinds,
        pairs=args.pairs,
        gate=args.gate,
        seed=args.seed,
        cache=args.cache,
        pictures=args.pictures,
        progress=progress,
    )
