"""How well registered objects are told apart: every query against a reference of every object of a test set."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from rich.table import Table

from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.evaluation.photos import holds_photos, photo_set
from nope_ros.evaluation.protocol import EvaluationSet
from nope_ros.frame import InputError
from nope_ros.refine import Query

Array = NDArray[np.float64]

# Objects registered at once, and values of the node's parameter similarity_threshold.
_REGISTERED = (2, 7, 20)
_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class IdentityReport:
    """Similarities of queries and objects.

    Attributes:
        kind: of the test set.
        source: of the test set.
        model: name of the predictor.
        objects: (N,) names.
        similarity: (Q, N) of each query with each object.
        own: (Q,) index of the object that each query shows.
        direction_deg: (Q,) between the directions of view of the query and of its object's reference.
        skipped: images that could not be used, and why.
    """

    kind: str
    source: str
    model: str
    objects: tuple[str, ...]
    similarity: Array
    own: NDArray[np.intp]
    direction_deg: Array
    skipped: tuple[str, ...] = ()

    @property
    def subsets(self) -> dict[str, NDArray[np.bool_]]:
        """Which queries (Q,) count for each."""
        return {"all": np.ones(len(self.own), dtype=bool), "within_90": self.direction_deg < 90}

    def told_apart(self, registered: int, subset: str = "all") -> float:
        """Share of queries, %, whose own object is the most similar of so many drawn ones, itself among them."""
        own = np.take_along_axis(self.similarity, self.own[:, None], axis=1)
        rivals = (self.similarity >= own).sum(axis=1) - 1
        others = len(self.objects) - 1
        ways = [comb(int(others - count), registered - 1) for count in rivals[self.subsets[subset]]]
        return 100 * float(np.mean(ways)) / comb(others, registered - 1)

    def taken(self, threshold: float, subset: str = "all") -> tuple[float, float]:
        """Shares, %, of own and of other objects that are at least so similar."""
        similar = self.similarity[self.subsets[subset]] >= threshold
        own = self.own[self.subsets[subset], None] == np.arange(len(self.objects))
        return 100 * float(similar[own].mean()), 100 * float(similar[~own].mean())

    @property
    def registered(self) -> tuple[int, ...]:
        """Numbers of objects for which figures are given."""
        return tuple(count for count in _REGISTERED if count <= len(self.objects))

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        values: dict[str, Any] = {
            "set": self.kind,
            "source": self.source,
            "predictor": self.model,
            "objects": list(self.objects),
            "skipped": list(self.skipped),
        }
        for subset, chosen in self.subsets.items():
            if chosen.any():
                values[subset] = {
                    "queries": int(chosen.sum()),
                    "told_apart": {str(count): self.told_apart(count, subset) for count in self.registered},
                    "taken": {
                        str(threshold): dict(zip(("own", "others"), self.taken(threshold, subset), strict=True))
                        for threshold in _THRESHOLDS
                    },
                }
        return values

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def tables(self) -> list[Table]:
        """The figures for a terminal."""
        subsets = {name: chosen for name, chosen in self.subsets.items() if chosen.any()}
        apart, taken = Table(), Table()
        apart.add_column("objects registered", justify="right")
        taken.add_column("similarity at least", justify="right")
        for name, chosen in subsets.items():
            apart.add_column(f"own the most similar, {name} ({chosen.sum()} queries)", justify="right")
            taken.add_column(f"of own objects, of others, {name}", justify="right")
        for count in self.registered:
            apart.add_row(str(count), *(f"{self.told_apart(count, name):.1f} %" for name in subsets))
        for threshold in _THRESHOLDS:
            cells = (self.taken(threshold, name) for name in subsets)
            taken.add_row(str(threshold), *(f"{own:.1f} %, {others:.1f} %" for own, others in cells))
        return [apart, taken]


def evaluate_identity(
    evaluation_set: EvaluationSet, estimator: PoseEstimator, *, progress: Progress | None = None
) -> IdentityReport:
    """Register one reference of each object, the first of its pairs', and compare all objects with its queries.

    Raises:
        InputError: if fewer than two objects can be used.
    """
    registered: list[RegisteredObject] = []
    names: list[str] = []
    queries: list[tuple[int, Query, float]] = []
    skipped: list[str] = []
    task = None if progress is None else progress.add_task(evaluation_set.kind, total=evaluation_set.count)
    for evaluated in evaluation_set.objects():
        if evaluated.pairs:
            reference = evaluated.views[evaluated.pairs[0][0]]
            compared = [evaluated.views[query] for first, query in evaluated.pairs if first == evaluated.pairs[0][0]]
            try:
                known = estimator.register_frame(reference.read(), gravity_camera=reference.gravity_camera)
            except InputError as error:
                skipped.append(f"{evaluated.name} {reference.name}: {error}")
                compared = []
            else:
                registered.append(known)
                names.append(evaluated.name)
            for view in compared:
                try:
                    query = estimator.look(view.read(), view.gravity_camera)
                except InputError as error:
                    skipped.append(f"{evaluated.name} {view.name}: {error}")
                else:
                    apart = np.degrees(np.arccos(np.clip(reference.direction @ view.direction, -1, 1)))
                    queries.append((len(names) - 1, query, float(apart)))
        if progress is not None and task is not None:
            progress.advance(task)
    if len(names) < 2 or not queries:
        raise InputError(f"{evaluation_set.source}: {len(names)} objects with views; two are needed to tell them apart")
    return IdentityReport(
        kind=evaluation_set.kind,
        source=evaluation_set.source,
        model=estimator.model_name,
        objects=tuple(names),
        similarity=np.array([estimator.similarities(query, registered) for _, query, _ in queries]),
        own=np.array([own for own, _, _ in queries]),
        direction_deg=np.array([apart for _, _, apart in queries]),
        skipped=tuple(skipped),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nope-ros evaluate identity`` after its folder."""
    parser.add_argument("--queries", type=int, default=10, help="of each object, at most (%(default)s)")
    parser.add_argument("--objects", type=lambda text: text.split(","), metavar="A,B,...", help="those to use")
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws views (%(default)s)")
    parser.add_argument("--cache", type=Path, help="file of known symmetries of meshes; by default the user's")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace, progress: Progress) -> IdentityReport:
    """The evaluation that ``nope-ros evaluate identity`` asks for: photographs, where DIR holds them, else meshes.

    Raises:
        InputError: naming what does not fit.
    """
    if args.queries < 1:
        raise InputError(f"--queries: {args.queries} is not positive")
    options: dict[str, Any] = {"objects": args.objects, "references": 1, "pairs": args.queries}
    if holds_photos(args.dir):
        found = photo_set(args.dir, args.seed, **options)
    else:
        from nope_ros.evaluation.meshes import mesh_set

        found = mesh_set(args.dir, args.seed, protocols=("free",), cache=args.cache, **options)
    estimator = PoseEstimator.from_pretrained(args.predictor, device=args.device, refinement="none")
    with progress:
        return evaluate_identity(found, estimator, progress=progress)
