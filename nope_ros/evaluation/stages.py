"""What each stage of the correspondence refiner adds: ``python -m nope_ros.evaluation.stages KIND [DIR]``.

Rows are the templates alone, what a 2D affine and what offsets make of them, and what the estimator answers, which
weighs templates and offsets by their expected errors. With ``--depth``, references and queries are seen by a depth
camera: then also with offsets fitted in depth, with the templates' answer slid onto the surface, and the answer is the
one of all these whose surfaces fit best. Rotation, roll and harm are judged where the templates are
right (within 20°, modulo the object's symmetry): what is lost before cannot be refined. With ``--mesh-templates``
objects are registered from their meshes; a second and a third table compare that with one image each, on the queries
that both have.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.spatial import KDTree

from nope_ros.correspondence import CorrespondenceRefiner, Look, Trust
from nope_ros.crop import Crop
from nope_ros.distribution import CONFIDENCE_RADIUS
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.evaluation.meshes import RADIUS_WITH_DEPTH, mesh_set, procedural_set
from nope_ros.evaluation.metrics import PoseError
from nope_ros.evaluation.photos import photo_set
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet, View
from nope_ros.frame import Frame, InputError
from nope_ros.pose import PoseEstimate
from nope_ros.prior import PRIORS, Prior
from nope_ros.refine import moved
from nope_ros.rendering.files import mesh_files
from nope_ros.rendering.mesh import load_mesh
from nope_ros.settle import Settling
from nope_ros.video import Walk, farthest

Array = NDArray[np.float64]

RIGHT_DEG = 20.0
"""A template is right if its rotation is this near to the truth, modulo the object's symmetry."""

HARM_DEG = 2.0
"""A right template became worse if its error grew by more than this."""

TEMPLATE, AFFINE, OFFSETS, ANSWER = "template", "+ affine", "+ offsets", "answer"


@dataclass(frozen=True)
class StageError:
    """One answer against the truth.

    Attributes:
        rotation_deg: modulo the object's symmetry.
        roll_deg: turn about the viewing direction, modulo nothing.
        centre_percent: of the object's centre in the crop, % of its side.
        scale_percent: of the distance.
        translation_percent: of the distance to the object.
        add: mean distance of the mesh's points over its diameter (nearest points if it is symmetric), or NaN.
        seconds: from the image to this answer.
    """

    rotation_deg: float
    roll_deg: float
    centre_percent: float
    scale_percent: float
    translation_percent: float
    add: float
    seconds: float


@dataclass(frozen=True)
class Compared:
    """Modes of the templates that were compared, (M,) each.

    Attributes:
        log_mass: log of their probabilities.
        support: see ``nope_ros.correspondence``.
        turned: angle between the directions of view of reference and query, radians.
        right: whether they are.
    """

    log_mass: Array
    support: Array
    turned: Array
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """What the stages say of one query, a view by name: an error for each row, in order; what the network expected."""

    object_name: str
    errors: dict[str, StageError]
    sigma_deg: float
    compared: Compared
    query: str = ""

    @property
    def right(self) -> bool:
        """Whether the template was."""
        return self.errors[TEMPLATE].rotation_deg < RIGHT_DEG


@dataclass(frozen=True)
class StageFigures:
    """One row: medians; shares in %; times in ms."""

    rotation_deg: float
    roll_deg: float
    worse_percent: float
    centre_percent: float
    scale_percent: float
    translation_percent: float
    add_recall_percent: float
    p50_ms: float
    p95_ms: float

    @classmethod
    def of(cls, pairs: Sequence[Pair], row: str) -> StageFigures:
        """Of the queries whose template is right; ADD recall and time are of all."""
        right = [pair for pair in pairs if pair.right]

        def median(name: str) -> float:
            return float(np.median([getattr(pair.errors[row], name) for pair in right])) if right else float("nan")

        worse = [pair.errors[row].rotation_deg > pair.errors[TEMPLATE].rotation_deg + HARM_DEG for pair in right]
        seconds = [pair.errors[row].seconds for pair in pairs]
        add = np.array([pair.errors[row].add for pair in pairs])
        return cls(
            rotation_deg=median("rotation_deg"),
            roll_deg=median("roll_deg"),
            worse_percent=100 * float(np.mean(worse)) if right else float("nan"),
            centre_percent=median("centre_percent"),
            scale_percent=median("scale_percent"),
            translation_percent=median("translation_percent"),
            add_recall_percent=float("nan") if np.isnan(add).any() else 100 * float((add < 0.1).mean()),
            p50_ms=1000 * float(np.median(seconds)),
            p95_ms=1000 * float(np.percentile(seconds, 95)),
        )


class _Model:
    """Points of a mesh for ADD, or none."""

    def __init__(self, points: Array | None) -> None:
        self.points = points
        self.diameter = 0.0 if points is None else float(np.linalg.norm(points[:, None] - points[None], axis=-1).max())

    def add(self, R: Array, t: Array, R_true: Array, t_true: Array, symmetric: bool) -> float:
        if self.points is None:
            return float("nan")
        seen, true = self.points @ R.T + t, self.points @ R_true.T + t_true
        distance = KDTree(seen).query(true)[0] if symmetric else np.linalg.norm(seen - true, axis=1)
        return float(distance.mean()) / self.diameter


def _error(
    estimate: PoseEstimate,
    registered: RegisteredObject,
    view: View,
    crop: Crop,
    evaluated: EvaluationObject,
    model: _Model,
    seconds: float,
) -> StageError:
    R_true, t_true = view.R_camera_object, view.t_camera_object
    R, t = estimate.R_camera_object, estimate.t_camera_object
    if registered.keyframes is not None:  # its frame is the walk's; cameras were given in the true one
        R = R @ registered.keyframes.R_fixed_object.T
        t = t - R @ registered.keyframes.t_fixed_object
    error = PoseError.of(R, t, R_true, t_true, crop, evaluated.symmetry)
    return StageError(
        rotation_deg=float(np.degrees(error.rotation)),
        roll_deg=float(np.degrees(error.roll)),
        centre_percent=100 * error.centre,
        scale_percent=100 * error.scale,
        translation_percent=100 * error.translation,
        add=model.add(R, t, R_true, t_true, not evaluated.symmetry.trivial),
        seconds=seconds,
    )


def spread_row(spread: float) -> str:
    """The row of what the answer would be under another spread of the refiner's trust."""
    return f"spread {spread:g}"


def partial_answers(look: Look) -> dict[str, PoseEstimate]:
    """What a look at the templates' answer makes of it by an affine and by offsets, each for itself: a pose by row."""
    reference = look.registered.reference_at(look.estimate.delta_R, look.query)
    rows: tuple[tuple[str, Literal["affine", "offsets"]], ...] = ((AFFINE, "affine"), (OFFSETS, "offsets"))
    return {row: moved(look.estimate, look.alone(stage), reference) for row, stage in rows}


def judge(
    estimator: PoseEstimator,
    refiner: CorrespondenceRefiner,
    registered: RegisteredObject,
    evaluated: EvaluationObject,
    query: View,
    frame: Frame,
    prior: Prior,
    model: _Model,
    settle: bool = True,
    trusts: Sequence[Trust] = (),
) -> Pair:
    """All stages of one query.

    ``settle`` says whether depth of the query is used; what the answer would be under other ``trusts`` are rows too.
    """
    begin = time.perf_counter()
    seen = estimator.look(frame, None if prior == "free" else query.gravity_camera)
    template = estimator.match(seen, registered, prior)
    matched = time.perf_counter() - begin
    look = refiner.look(seen, registered, template)
    looked = time.perf_counter() - begin
    reference = registered.reference_at(template.delta_R, seen)

    rows = {TEMPLATE: (template, matched)}
    for row, pose in partial_answers(look).items():
        rows[row] = pose, looked
    for trust in trusts:
        believed = replace(look, trust=trust).answer()
        rows[spread_row(trust.spread[prior])] = moved(template, believed, reference), looked
    answer = moved(template, look.answer(), reference)
    if settle and frame.depth is not None:
        # Where too little of it is known, all stays as it was without.
        settling = Settling.of(seen, registered)
        fitted = look.fitted()
        in_depth = template
        if fitted is not None:
            in_depth = moved(template, look.answer_in_depth(fitted), reference)
        rows["+ depth"] = (in_depth, time.perf_counter() - begin)
        begin = time.perf_counter() - matched
        on_surface = template if settling is None else settling.best(template, [])
        rows["template + surface"] = (on_surface, time.perf_counter() - begin)
        if settling is not None:
            begin = time.perf_counter() - matched
            answer = settling.best(template, refiner.proposals(seen, registered, template))
            looked = time.perf_counter() - begin
    rows[ANSWER] = (answer, looked)
    errors = {
        row: _error(pose, registered, query, seen.crop, evaluated, model, seconds)
        for row, (pose, seconds) in rows.items()
    }
    R_true_reference = registered.reference.R_camera_object
    if registered.keyframes is not None:
        R_true_reference = R_true_reference @ registered.keyframes.R_fixed_object.T
    tried = [mode.R @ R_true_reference for mode in look.tried]
    off = np.degrees([evaluated.symmetry.error(R, query.R_camera_object) for R in tried])
    compared = Compared(
        log_mass=np.log([mode.probability for mode in look.tried]),
        support=np.array(look.support),
        turned=np.array(look.turned),
        right=off < np.degrees(CONFIDENCE_RADIUS),
    )
    return Pair(evaluated.name, errors, float(np.degrees(look.sigma)), compared, query.name)


def judge_set(
    found: EvaluationSet,
    estimator: PoseEstimator,
    refiner: CorrespondenceRefiner,
    prior: Prior,
    *,
    mesh_folder: Path | None = None,
    keyframes: int = 0,
    depth: bool = False,
    settle: bool = True,
    within_deg: float = 90.0,
    spreads: Sequence[float] = (),
    progress: bool = False,
) -> Iterator[Pair]:
    """All stages of all queries of a set; ADD where the set is of meshes.

    Args:
        found: the set.
        estimator: gives the templates' answers.
        refiner: follows.
        prior: what is known of gravity.
        mesh_folder: that the set is of, if objects are registered from their meshes; else from the reference views.
        keyframes: of the walk from which each object is registered, cameras known; 0: from a reference. The walk takes
            what views it needs, and queries are the others.
        depth: whether the set has depth, and objects that are not of radius one for it.
        settle: whether the queries' depth is used.
        within_deg: most that the directions of view of reference and query are apart, without a mesh.
        spreads: of the refiner's trust, what it would answer under each is a row too.
        progress: show a bar.
    """
    console = Console(stderr=True, quiet=not progress)
    files = mesh_files(Path(found.source)) if found.kind == "meshes" else {}
    for evaluated in track(found.objects(), found.kind, total=found.count, console=console):
        model, whole = _Model(None), None
        if found.kind == "meshes":
            if evaluated.name not in files:
                raise InputError(f"meshes: {found.source} has no {evaluated.name}")
            mesh = load_mesh(files[evaluated.name]).normalised()[0]
            if depth:
                mesh = replace(mesh, vertices=mesh.vertices * np.float32(RADIUS_WITH_DEPTH))
            step = max(1, len(mesh.vertices) // 500)
            model = _Model(mesh.vertices[::step].astype(np.float64))
        if mesh_folder is not None:
            down = None if prior == "free" else np.array([0.0, 0.0, -1.0])
            whole = estimator.register_mesh(mesh, object_id="mesh", gravity_object=down)
        pairs = {(0, query) for _, query in evaluated.pairs} if whole is not None else set(evaluated.pairs)
        if keyframes:
            try:
                whole, rest = walked(estimator, evaluated, prior, keyframes)
            except InputError:
                continue
            pairs = {(0, query) for query in rest[: len(evaluated.pairs)]}
        frames: dict[int, Frame] = {}
        known: dict[int, RegisteredObject] = {}
        for first, second in sorted(pairs):
            reference, query = evaluated.views[first], evaluated.views[second]
            near = reference.direction @ query.direction > np.cos(np.radians(within_deg))
            if whole is None and not near:
                continue
            try:
                if second not in frames:
                    frames[second] = query.read()
                if whole is None and first not in known:
                    known[first] = estimator.register_frame(
                        reference.read(),
                        R_camera_object=reference.R_camera_object,
                        t_camera_object=reference.t_camera_object,
                        gravity_camera=None if prior == "free" else reference.gravity_camera,
                    )
            except InputError:
                continue
            registered = whole or known[first]
            trusts = [
                refiner.trust(registered).model_copy(update={"spread": dict.fromkeys(PRIORS, spread)})
                for spread in spreads
            ]
            yield judge(estimator, refiner, registered, evaluated, query, frames[second], prior, model, settle, trusts)


def walked(
    estimator: PoseEstimator, evaluated: EvaluationObject, prior: Prior, keyframes: int
) -> tuple[RegisteredObject, list[int]]:
    """An object registered from views all around, and the others, of which it knows nothing.

    Raises:
        InputError: if too few views can be used.
    """
    views = evaluated.views
    chosen = farthest(np.stack([view.direction for view in views]), keyframes)
    walk = Walk(estimator.predictor.crop_size, ordered=False)
    for index in chosen:
        view = views[index]
        down = None if prior == "free" else view.gravity_camera
        walk.add(view.name, view.read(), gravity_camera=down, pose=(view.R_camera_object, view.t_camera_object))
    rest = [index for index in range(len(views)) if index not in set(chosen)]
    return estimator.register_walk(walk, keyframes=keyframes), rest


def table(pairs: Sequence[Pair], title: str) -> Table:
    """The figures of all rows."""
    right = sum(pair.right for pair in pairs)
    drawn = Table(title=f"{title}: {len(pairs)} queries, template right in {right}", title_justify="left")
    drawn.add_column("")
    for field in fields(StageFigures):
        drawn.add_column(field.name.replace("_percent", " %").replace("_deg", " °").replace("_", " "), justify="right")
    for row in pairs[0].errors:
        figures = StageFigures.of(pairs, row)
        drawn.add_row(row, *(f"{value:.2f}" if value == value else "–" for value in asdict(figures).values()))
    return drawn


def shared(one: Sequence[Pair], other: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Those of both sides whose query the other side has too; a side may have a query under several references."""
    first, second = ({(pair.object_name, pair.query) for pair in side} for side in (one, other))
    both = first & second
    kept = [[pair for pair in side if (pair.object_name, pair.query) in both] for side in (one, other)]
    return kept[0], kept[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("photos", "meshes", "procedural"))
    parser.add_argument("dir", type=Path, nargs="?", help="of photographs or meshes")
    parser.add_argument("--protocol", choices=PRIORS, default="free")
    parser.add_argument("--keyframes", type=int, default=0, help="register from a walk of so many views, not from one")
    parser.add_argument("--mesh-templates", action="store_true", help="register from meshes, not from one image each")
    parser.add_argument(
        "--depth", action="store_true", help="references and queries have depth, as measured by a camera"
    )
    parser.add_argument("--count", type=int, default=20, help="procedural objects (%(default)s)")
    parser.add_argument("--objects", type=lambda text: text.split(","), metavar="A,B,...")
    parser.add_argument("--pairs", type=int, default=10, help="most queries of an object (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--refiner", help="folder of weights; the packaged ones by default")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write figures and every query's errors to this file")
    given = parser.parse_args(arguments)
    if given.mesh_templates and given.kind != "meshes":
        parser.error("--mesh-templates needs meshes")
    if (given.dir is None) != (given.kind == "procedural"):
        parser.error("photos and meshes need a folder, procedural has none")
    if given.depth and given.kind == "photos":
        parser.error("--depth: the photographs have none")
    estimator = PoseEstimator.from_pretrained(given.predictor)
    refiner = CorrespondenceRefiner.from_pretrained(given.refiner)
    if given.kind == "photos":
        found = photo_set(given.dir, given.seed, objects=given.objects, pairs=given.pairs)
    elif given.kind == "procedural":
        found = procedural_set(
            given.seed, protocols=(given.protocol,), count=given.count, pairs=given.pairs, depth=given.depth
        )
    else:
        found = mesh_set(
            given.dir,
            given.seed,
            protocols=(given.protocol,),
            objects=given.objects,
            pairs=given.pairs,
            depth=given.depth,
        )

    def judged(mesh_folder: Path | None) -> list[Pair]:
        return list(
            judge_set(
                found,
                estimator,
                refiner,
                given.protocol,
                mesh_folder=mesh_folder,
                keyframes=0 if mesh_folder is not None else given.keyframes,
                depth=given.depth,
                progress=True,
            )
        )

    depth = ", depth" if given.depth else ""
    from_views = (f"a walk of {given.keyframes} views" if given.keyframes else "one image") + depth
    if given.mesh_templates:
        mode = f"mesh templates{depth}"
        pairs = judged(given.dir)
        sides = dict(zip((mode, from_views), shared(pairs, judged(None)), strict=True))
    else:
        mode, pairs, sides = from_views, judged(None), {}
    if not pairs:
        print("nothing was evaluated: the set has no pairs for this protocol")
        return 1
    console = Console()
    console.width = max(console.width, 150)
    console.print(table(pairs, f"{given.kind}, {given.protocol}, {mode}"))
    for side, same in sides.items():
        if same:
            console.print(table(same, f"the queries of both, {side}"))
    if given.json is not None:
        values: dict[str, object] = {"rows": _figures(pairs), "queries": [asdict(pair) for pair in pairs]}
        if sides and all(sides.values()):
            values["same_queries"] = {side: _figures(same) for side, same in sides.items()}
        given.json.write_text(json.dumps(values, indent=1, default=np.ndarray.tolist) + "\n", encoding="utf-8")
    return 0


def _figures(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    return {row: asdict(StageFigures.of(pairs, row)) for row in pairs[0].errors}


if __name__ == "__main__":
    raise SystemExit(main())
