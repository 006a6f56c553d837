"""Runs methods over test sets and reports: ``nope-ros evaluate photos|meshes|procedural|bop|video|align|identity``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import alignment, identity
from nope_ros.evaluation.alignment import AlignmentReport
from nope_ros.evaluation.baselines import (
    OURS,
    PAPER_FORM,
    REGRESSION,
    BoxForMask,
    Chance,
    EstimatorMethod,
    GridOnly,
    NoMotion,
    NoPrior,
    NotTurnedBack,
    PaperForm,
    RegressionMethod,
    SiftEssential,
    TemplatesAlone,
)
from nope_ros.evaluation.bop import WORLD_UP, bop_set
from nope_ros.evaluation.identity import IdentityReport
from nope_ros.evaluation.metrics import PairScore, Scores, calibration
from nope_ros.evaluation.protocol import (
    REFERENCES,
    Answer,
    EvaluationObject,
    EvaluationSet,
    Method,
    Occluder,
    View,
    observation,
)
from nope_ros.evaluation.walk import WalkReport, evaluate_walks
from nope_ros.frame import Frame, InputError
from nope_ros.prior import PRIORS, Prior
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS, Refinement
from nope_ros.rotations import geodesic_distance
from nope_ros.video import KEYFRAMES

Array = NDArray[np.float64]

SUBSETS = ("all", "within_90")
_TABLE_WIDTH = 160
_AROUND = 72  # views of a mesh from once around it


@dataclass(frozen=True)
class MethodReport:
    """Figures of one method under one protocol.

    Attributes:
        subsets: for each of ``SUBSETS``, over pairs.
        object_mean: the same, over objects.
        objects: figures of each object, for each of ``SUBSETS``.
    """

    subsets: dict[str, Scores]
    object_mean: dict[str, Scores]
    objects: dict[str, dict[str, Scores]]

    @classmethod
    def of(cls, scores: Sequence[PairScore]) -> MethodReport:
        """The figures of some pairs."""
        by_object: dict[str, list[PairScore]] = defaultdict(list)
        for score in scores:
            by_object[score.object_name].append(score)
        objects = {name: _by_subset(part) for name, part in sorted(by_object.items())}
        return cls(
            _by_subset(scores),
            {subset: Scores.mean([one[subset] for one in objects.values()]) for subset in SUBSETS},
            objects,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the subsets on top."""
        return {
            **{
                subset: {**self.subsets[subset].to_dict(), "object_mean": self.object_mean[subset].to_dict()}
                for subset in SUBSETS
            },
            "objects": {
                name: {subset: scores.to_dict() for subset, scores in subsets.items()}
                for name, subsets in self.objects.items()
            },
        }


def _by_subset(scores: Sequence[PairScore]) -> dict[str, Scores]:
    near = [score for score in scores if score.direction_deg < 90]
    return {"all": Scores.of(scores), "within_90": Scores.of(near)}


@dataclass(frozen=True)
class Report:
    """What came of one evaluation.

    Attributes:
        kind: of the test set.
        source: of the test set.
        model: name of the predictor.
        refinement: what followed the templates.
        seeds: of everything that was drawn.
        occlusion: share of the queries' boxes that was hidden.
        scores: every pair under every protocol by every method.
        skipped: images and meshes that could not be used, and why.
    """

    kind: str
    source: str
    model: str
    seeds: tuple[int, ...]
    occlusion: float
    scores: tuple[PairScore, ...]
    skipped: tuple[str, ...] = ()
    refinement: Refinement = "none"

    @property
    def protocols(self) -> dict[Prior, dict[str, MethodReport]]:
        """For each protocol, the figures of each method; ours first."""
        found: dict[Prior, dict[str, list[PairScore]]] = {}
        for prior in PRIORS:
            for score in self.scores:
                if score.protocol == prior:
                    found.setdefault(prior, {}).setdefault(score.method, []).append(score)
        return {
            prior: {name: MethodReport.of(scores) for name, scores in methods.items()}
            for prior, methods in found.items()
        }

    @classmethod
    def pooled(cls, reports: Sequence[Report]) -> Report:
        """Several seeds as one report: all their pairs count the same."""
        return replace(
            reports[0],
            source=", ".join(dict.fromkeys(report.source for report in reports)),
            seeds=tuple(seed for report in reports for seed in report.seeds),
            scores=tuple(score for report in reports for score in report.scores),
            skipped=tuple(dict.fromkeys(line for report in reports for line in report.skipped)),
        )

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds: the protocols on top, in each ours on top and the others under ``baselines``."""
        values: dict[str, Any] = {
            "set": self.kind,
            "source": self.source,
            "predictor": self.model,
            "refinement": self.refinement,
            "seeds": list(self.seeds),
            "occlusion": self.occlusion,
            "skipped": list(self.skipped),
        }
        for prior, methods in self.protocols.items():
            rest = {name: report.to_dict() for name, report in methods.items() if name != OURS}
            ours = methods[OURS].to_dict() if OURS in methods else {}
            values[prior] = {**ours, "baselines": rest}
        return values

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self, objects: bool = False) -> Table:
        """The figures as a table for a terminal.

        Args:
            objects: add a row for each object.
        """
        hidden = f", {self.occlusion:.0%} of the box hidden" if self.occlusion else ""
        refined = "" if self.refinement == "none" else f", refinement {self.refinement}"
        table = Table(title=f"{self.kind}: {self.model}{refined}{hidden}", title_justify="left")
        for column in ("protocol", "pairs of", "method"):
            table.add_column(column)
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for prior, methods in self.protocols.items():
            for subset in SUBSETS:
                for name, report in methods.items():
                    table.add_row(prior, subset, name, *_cells(report.subsets[subset]))
                    if objects and name == OURS:
                        for object_name, scores in report.objects.items():
                            table.add_row("", "", f"  {object_name}", *_cells(scores[subset]), style="dim")
            table.add_section()
        return table


_COLUMNS = {
    "pairs": "pairs",
    "Acc15": "acc15",
    "Acc30": "acc30",
    "median °": "median_deg",
    "mean °": "mean_deg",
    "Acc30 sym": "acc30_sym",
    "median sym °": "median_deg_sym",
    "50 % set": "coverage50",
    "90 % set": "coverage90",
    "nll": "nll",
    "translation": "translation_relative_median",
}


def _cells(scores: Scores) -> list[str]:
    cells = []
    for field in _COLUMNS.values():
        value = getattr(scores, field)
        digits = 2 if field == "nll" else 3 if field.startswith("translation") else 1
        cells.append("–" if value is None else str(value) if isinstance(value, int) else f"{value:.{digits}f}")
    return cells


def evaluate_set(
    evaluation_set: EvaluationSet,
    methods: Sequence[Method],
    protocols: Sequence[Prior] = PRIORS,
    *,
    seed: int = 0,
    occlusion: float = 0.0,
    model: str = "",
    refinement: Refinement = "none",
    progress: bool = False,
) -> Report:
    """Run methods over a test set.

    Args:
        evaluation_set: objects, views and pairs.
        methods: to compare.
        protocols: those to run, where the set has them.
        seed: draws what is hidden.
        occlusion: share of each query's box that is hidden.
        model: name for the report.
        refinement: for the report.
        progress: show a bar with time left.
    """
    occluder = Occluder(occlusion, seed)
    scores: list[PairScore] = []
    skipped: list[str] = []
    bar = _progress() if progress else None
    shown: AbstractContextManager[object] = bar if bar is not None else nullcontext()
    with shown:
        task = bar.add_task(evaluation_set.kind, total=evaluation_set.count) if bar is not None else None
        for evaluated in evaluation_set.objects():
            asked = tuple(prior for prior in evaluated.protocols if prior in protocols)
            if asked and evaluated.pairs:
                scores += _evaluate_object(evaluated, asked, methods, occluder, skipped)
            if bar is not None and task is not None:
                bar.advance(task)
    return Report(
        kind=evaluation_set.kind,
        source=evaluation_set.source,
        model=model,
        refinement=refinement,
        seeds=(seed,),
        occlusion=occlusion,
        scores=tuple(scores),
        skipped=tuple(dict.fromkeys(skipped)),
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _read(view: View, object_name: str, skipped: list[str]) -> Frame | None:
    try:
        return view.read()
    except InputError as error:
        skipped.append(f"{object_name} {view.name}: {error}")
        return None


def _evaluate_object(
    evaluated: EvaluationObject,
    protocols: Sequence[Prior],
    methods: Sequence[Method],
    occluder: Occluder,
    skipped: list[str],
) -> Iterable[PairScore]:
    name, views = evaluated.name, evaluated.views
    # Priors that use gravity share a registration.
    knowledge: dict[bool, Prior] = {prior != "free": prior for prior in protocols}
    registered: dict[tuple[str, bool, int], Any] = {}
    for reference in sorted({pair[0] for pair in evaluated.pairs}):
        view = views[reference]
        frame = _read(view, name, skipped)
        if frame is None:
            continue
        for gravity, prior in knowledge.items():
            seen = observation(view, frame, prior, f"{name}/{view.name}")
            for method in methods:
                registered[method.name, gravity, reference] = method.register(
                    seen, view.R_camera_object, view.t_camera_object
                )
    usable = {key[2] for key in registered}
    scores: list[PairScore] = []
    by_query: dict[int, list[int]] = defaultdict(list)
    for reference, query in evaluated.pairs:
        if reference in usable:
            by_query[query].append(reference)
    for query, references in by_query.items():
        view = views[query]
        frame = _read(view, name, skipped)
        if frame is None:
            continue
        frame = occluder(frame, name, view.name)
        for prior in protocols:
            seen = observation(view, frame, prior, f"{name}/{view.name}/query")
            for method in methods:
                known = [registered[method.name, prior != "free", reference] for reference in references]
                answers = method.estimate(known, seen, prior)
                scores += [
                    score_pair(answer, evaluated, reference, query, method.name, prior)
                    for answer, reference in zip(answers, references, strict=True)
                ]
    return scores


def score_pair(
    answer: Answer, evaluated: EvaluationObject, reference: int, query: int, method: str, protocol: Prior
) -> PairScore:
    """Compare an answer with the truth; nothing before this knows it."""
    first, second = evaluated.views[reference], evaluated.views[query]
    R_estimated = answer.delta_R @ first.R_camera_object
    delta_R_true = second.R_camera_object @ first.R_camera_object.T
    moved = None
    if answer.t_camera_object is not None:
        t = second.t_camera_object
        moved = float(np.linalg.norm(answer.t_camera_object - t) / np.linalg.norm(t))
    error = float(np.degrees(geodesic_distance(R_estimated, second.R_camera_object)))
    return PairScore(
        method=method,
        protocol=protocol,
        object_name=evaluated.name,
        reference=first.name,
        query=second.name,
        delta_R=tuple(tuple(float(value) for value in row) for row in answer.delta_R),
        error_deg=error,
        error_sym_deg=float(np.degrees(evaluated.symmetry.error(R_estimated, second.R_camera_object))),
        direction_deg=float(np.degrees(np.arccos(np.clip(first.direction @ second.direction, -1, 1)))),
        translation_relative=moved,
        confidence=answer.confidence,
        calibration=None if answer.distribution is None else calibration(answer.distribution, delta_R_true),
    )


def methods_for(
    estimator: PoseEstimator, *, baselines: bool = False, ablations: bool = False, seed: int = 0
) -> list[Method]:
    """Ours, and without what refines it; with ``ablations``, without other parts; with ``baselines``, the untrained."""
    ours = EstimatorMethod(estimator)
    methods: list[Method] = [ours]
    if estimator.refinement != "none":
        methods.append(TemplatesAlone(ours))
    if ablations:
        plain = PoseEstimator(estimator.predictor, estimator.batch_size, "none")  # beside the templates alone
        methods += [GridOnly(ours), NotTurnedBack(ours), BoxForMask(plain), NoPrior(plain)]
    if baselines:
        methods += plain_baselines(seed)
    return methods


def plain_baselines(seed: int = 0) -> list[Method]:
    """Chance, no motion, SIFT: what needs no weights."""
    return [Chance(seed), NoMotion(), SiftEssential()]


def trained_baselines(regression: Path | None, paper_form: Path | None, device: str = "auto") -> list[Method]:
    """The baselines whose weights are given.

    Raises:
        InputError: if weights cannot be used.
    """
    methods: list[Method] = []
    if regression is not None:
        methods.append(RegressionMethod(regression, device))
    if paper_form is not None:
        methods.append(PaperForm(paper_form, device))
    return methods


_BOP = """A dataset in BOP layout. The protocols upright and standing need gravity: it is against the world's z where
scene_camera.json has cam_R_w2c. Nothing in the layout says that z is up, and of some real sets the world's frame is
arbitrary: figures of these protocols then mean nothing, and leave no trace of it. Look at how the scenes' frame was
chosen; --world-up names another axis, or none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nope-ros evaluate``."""
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="photos|meshes|procedural|bop|video|align|identity"
    )
    photos = kinds.add_parser("photos", help="photographs with true poses: DIR/<object>/poses.json")
    photos.add_argument("dir", type=Path, metavar="DIR", help="folder that holds the objects' folders")
    meshes = kinds.add_parser("meshes", help="renders of the meshes in a folder")
    meshes.add_argument("dir", type=Path, metavar="DIR", help="folder of .glb, .obj, .ply or .stl files")
    meshes.add_argument("--up", choices=("x", "y", "z"), help="axis that points up in the files (y)")
    procedural = kinds.add_parser("procedural", help="renders of procedural objects that training never drew")
    procedural.add_argument("--count", type=int, default=60, help="number of objects (%(default)s)")
    bop = kinds.add_parser("bop", help="a dataset in BOP layout", description=_BOP)
    bop.add_argument("dir", type=Path, metavar="DIR", help="folder of the dataset")
    bop.add_argument("--split", required=True, help="folder of scenes in it, such as test")
    bop.add_argument(
        "--world-up",
        choices=WORLD_UP,
        default="z",
        help="axis of the scenes' frame that points up; none: unknown, which leaves the protocol free (%(default)s)",
    )
    video = kinds.add_parser("video", help="a walk around each object against one reference, on photographs or meshes")
    video.add_argument("dir", type=Path, metavar="DIR", help="as of photos, or of meshes")
    add_walk_arguments(video)
    align = kinds.add_parser("align", help="objects of one kind laid over each other, on meshes sorted by name")
    align.add_argument("dir", type=Path, metavar="DIR", help="folder of meshes, <source>/<object>.glb")
    alignment.add_arguments(align)
    told_apart = kinds.add_parser(
        "identity", help="whether registered objects are told apart, on photographs or meshes"
    )
    told_apart.add_argument("dir", type=Path, metavar="DIR", help="as of photos, or of meshes")
    identity.add_arguments(told_apart)
    for kind in (photos, meshes, procedural, bop):
        kind.add_argument(
            "--protocol",
            action="append",
            choices=(*PRIORS, "all"),
            help="what is known of gravity; may be given several times (all)",
        )
        kind.add_argument("--predictor", help="folder of weights; the packaged ones by default")
        kind.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
        kind.add_argument(
            "--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="after the templates (%(default)s)"
        )
        kind.add_argument("--pairs", type=int, help="most pairs of an object")
        kind.add_argument(
            "--seed", type=int, action="append", help="may be given several times: all pairs count then (0)"
        )
        kind.add_argument(
            "--occlusion", type=float, default=0.0, metavar="SHARE", help="of each query's box to hide (%(default)s)"
        )
        kind.add_argument("--baselines", action="store_true", help="add chance, no motion, SIFT + essential matrix")
        kind.add_argument("--regression-weights", type=Path, metavar="DIR", help=f"add {REGRESSION} with these weights")
        kind.add_argument("--unet-weights", type=Path, metavar="DIR", help=f"add {PAPER_FORM} with these weights")
        kind.add_argument("--ablations", action="store_true", help="add ours with a part removed")
        kind.add_argument("--per-object", action="store_true", help="a row for each object")
        kind.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
        kind.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw reliability and confidence there")
        if kind is not procedural:
            kind.add_argument(
                "--objects", type=lambda text: text.split(","), metavar="A,B,...", help="those to use; all by default"
            )
        if kind in (photos, bop):
            kind.add_argument("--references", type=int, default=REFERENCES, help="of each object (%(default)s)")
        if kind is not photos:
            kind.add_argument("--cache", type=Path, help="file of known symmetries; by default the user's")


def add_walk_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``nope-ros evaluate video`` after its folder."""
    parser.add_argument("--keyframes", type=int, default=KEYFRAMES, help="of each object (%(default)s)")
    parser.add_argument(
        "--poses",
        choices=("given", "estimated"),
        default="given",
        help="whether registration is told where the cameras were (%(default)s)",
    )
    parser.add_argument(
        "--pose-noise", type=float, default=0.0, metavar="DEG", help="by which every camera is turned (%(default)s)"
    )
    parser.add_argument(
        "--ordered",
        action="store_true",
        help="views are in the order in which they were taken, by little steps; of meshes: once around",
    )
    parser.add_argument("--protocol", action="append", choices=(*PRIORS, "all"), help="may be repeated (all)")
    parser.add_argument("--queries", type=int, help="most queries of an object")
    parser.add_argument(
        "--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="after the templates (%(default)s)"
    )
    parser.add_argument("--objects", type=lambda text: text.split(","), metavar="A,B,...", help="those to use")
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--per-object", action="store_true", help="a row for each object")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw one view's and the walk's answers there")
    parser.add_argument("--cache", type=Path, help="file of known symmetries of meshes; by default the user's")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run_walks(args: argparse.Namespace, progress: bool = True) -> WalkReport:
    """The evaluation that ``nope-ros evaluate video`` asks for.

    Raises:
        InputError: naming what does not fit.
    """
    for name, least in (("keyframes", 3), ("queries", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: {value} is less than {least}")
    asked = args.protocol or ["all"]
    protocols = tuple(prior for prior in PRIORS if prior in asked or "all" in asked)
    from nope_ros.evaluation.photos import holds_photos, photo_set

    if holds_photos(args.dir):
        found = photo_set(args.dir, args.seed, objects=args.objects)
    else:
        from nope_ros.evaluation.meshes import mesh_set

        views = args.keyframes + max(args.queries or 0, args.keyframes)
        if args.ordered:  # half of them are walked
            views = max(_AROUND, 2 * args.keyframes, 2 * (args.queries or 0))
        options = {"protocols": protocols, "objects": args.objects, "cache": args.cache}
        found = mesh_set(args.dir, args.seed, views=views, walked=args.ordered, **options)
    return evaluate_walks(
        found,
        PoseEstimator.from_pretrained(args.predictor, device=args.device, refinement=args.refinement),
        protocols,
        seed=args.seed,
        keyframes=args.keyframes,
        queries=args.queries,
        poses=args.poses,
        pose_noise_deg=args.pose_noise,
        ordered=args.ordered,
        pictures=args.pictures,
        progress=_progress() if progress else None,
    )


def _sets(args: argparse.Namespace, protocols: Sequence[Prior]) -> list[tuple[int, EvaluationSet]]:
    """The test set for each seed."""
    sets = []
    for seed in args.seed or [0]:
        if args.kind == "photos":
            from nope_ros.evaluation.photos import photo_set

            options = {"objects": args.objects, "references": args.references, "pairs": args.pairs}
            found = photo_set(args.dir, seed, **options)
        elif args.kind == "bop":
            options = {"objects": args.objects, "references": args.references, "pairs": args.pairs}
            found = bop_set(args.dir, args.split, seed, world_up=args.world_up, cache=args.cache, **options)
        else:
            from nope_ros.evaluation.meshes import mesh_set, procedural_set

            options = {"protocols": protocols, "pairs": args.pairs, "cache": args.cache}
            if args.kind == "meshes":
                found = mesh_set(args.dir, seed, objects=args.objects, up=args.up, **options)
            else:
                found = procedural_set(seed, count=args.count, **options)
        sets.append((seed, found))
    return sets


def run(args: argparse.Namespace, progress: bool = True) -> tuple[Report, EvaluationSet]:
    """The evaluation that the arguments ask for, and the test set (of the first seed).

    Raises:
        InputError: naming what does not fit.
    """
    asked = args.protocol or ["all"]
    protocols = tuple(prior for prior in PRIORS if prior in asked or "all" in asked)
    for name in ("pairs", "references", "count"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name}: {value} is not positive")
    if args.kind == "bop" and args.world_up == "none":
        unknown = [prior for prior in asked if prior not in ("free", "all")]
        if unknown:
            raise InputError(f"--protocol {unknown[0]}: needs gravity, which is unknown with --world-up none; use free")
    sets = _sets(args, protocols)
    estimator = PoseEstimator.from_pretrained(args.predictor, device=args.device, refinement=args.refinement)
    trained = trained_baselines(args.regression_weights, args.unet_weights, args.device)
    reports = [
        evaluate_set(
            found,
            [*methods_for(estimator, baselines=args.baselines, ablations=args.ablations, seed=seed), *trained],
            protocols,
            seed=seed,
            occlusion=args.occlusion,
            model=estimator.model_name,
            refinement=estimator.refinement,
            progress=progress,
        )
        for seed, found in sets
    ]
    return Report.pooled(reports), sets[0][1]


def main(args: argparse.Namespace) -> int:
    """``nope-ros evaluate``: evaluates, prints a table, writes what was asked for; returns the exit status."""
    console = Console()
    # Figures cut off at a narrow terminal's edge would be of no use.
    console.width = max(console.width, _TABLE_WIDTH)
    try:
        _check_options(args)
        if args.kind == "video":
            return _main_walks(args, console)
        if args.kind == "align":
            return _main_tables(alignment.run(args, _progress()), args.json, console)
        if args.kind == "identity":
            return _main_tables(identity.run(args, _progress()), args.json, console)
        report, evaluation_set = run(args)
    except InputError as error:
        print(f"nope-ros evaluate: {error}", file=sys.stderr)
        return 2
    console.print(report.table(objects=args.per_object))
    for line in report.skipped:
        console.print(f"not used: {line}", style="yellow", highlight=False)
    if args.baselines:
        for name, option in ((REGRESSION, "--regression-weights"), (PAPER_FORM, "--unet-weights")):
            if getattr(args, option[2:].replace("-", "_")) is None:
                console.print(f"not compared: {name}, which has to be trained; give {option} DIR", style="yellow")
    if not report.scores:
        why = "nothing in the set could be used" if report.skipped else "the set has no pairs for these protocols"
        console.print(f"nothing was evaluated: {why}", style="red")
        return 1
    _write(report, args.json)
    if args.pictures is not None:
        from nope_ros.evaluation.pictures import write_pictures

        for path in write_pictures(report, args.pictures, evaluation_set):
            console.print(f"wrote {path}", highlight=False)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """What every kind has: seeds, and where results go, before hours of work for them.

    Raises:
        InputError: naming the option.
    """
    seeds = args.seed if isinstance(args.seed, list) else [args.seed or 0]
    if min(seeds) < 0:
        raise InputError(f"--seed: {min(seeds)} is negative")
    folder = getattr(args, "pictures", None)
    for option, path in (("--json", args.json), ("--pictures", None if folder is None else folder / ".writable")):
        if path is None:
            continue
        try:
            existed = path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if not existed:
                path.unlink()
        except OSError as error:
            where = path if option == "--json" else folder
            raise InputError(f"{option}: {where} cannot be written ({error.strerror}); name another place") from None


def _main_walks(args: argparse.Namespace, console: Console) -> int:
    report = run_walks(args)
    console.print(report.table(objects=args.per_object))
    for line in report.skipped:
        console.print(f"not used: {line}", style="yellow", highlight=False)
    if not report.scores:
        console.print("nothing was evaluated: no walk could be registered", style="red")
        return 1
    _write(report, args.json)
    return 0


def _main_tables(report: AlignmentReport | IdentityReport, out: Path | None, console: Console) -> int:
    for table in report.tables():
        console.print(table)
    for line in report.skipped:
        console.print(f"not used: {line}", style="yellow", highlight=False)
    _write(report, out)
    return 0


def _write(report: Report | WalkReport | AlignmentReport | IdentityReport, out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.to_json() + "\n", encoding="utf-8")


def _command(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nope-ros evaluate", description=__doc__)
    add_arguments(parser)
    return main(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(_command())
