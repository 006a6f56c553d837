"""Writes the document of all figures: ``nope-ros report --out docs/benchmark.md``.

Runs ``nope-ros benchmark``, and ``nope-ros evaluate`` on every test set that is given, several sets at a time. What
came of each is kept in a folder, and is run again only when the weights it depends on, or the options, have changed;
an interrupted report goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nope_ros.correspondence import CORRESPONDENCE_WEIGHTS
from nope_ros.evaluation.baselines import AS_LONG, TEMPLATES_ALONE
from nope_ros.evaluation.benchmark import BUSY, step_cells
from nope_ros.evaluation.protocol import EvaluationSet
from nope_ros.frame import InputError
from nope_ros.latent import CONFIG_FILE, find_weights, read_config
from nope_ros.prior import PRIORS, Prior
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS, Refinement

_CREDITS = {
    "pybullet_urdf_models": "Objects: `pybullet_urdf_models` (MIT; about 20 of them are from YCB, CC BY 4.0).",
    "fruit": "Photographs: VierOrange/Voxel-Carving (MIT).",
}

FRUIT = ("green_apple", "mango")
"""Photographs of nearly round things, which are judged apart."""

_REFERENCES = 2  # of a rendered object; the paper's form takes seconds for each

OURS_PART = "ours"
_PLAIN, _REGRESSION, _PAPER, _AS_LONG = "plain", "regression", "paper_form", "as_long"
_FIRST_SEED = "first_seed"  # of a result of several seeds: figures of the first one's pairs
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]
_CELL = {"pairs": 0, "nll": 2}


@dataclass(frozen=True)
class Chapter:
    """One test set, which is a section of the document.

    Attributes:
        key: names its files.
        title: names its section.
        kind: "photos", "meshes" or "procedural".
        folder: of the data, or None.
        objects: those to use, or None for all.
        protocols: to run.
        occlusion: share of each query's box that is hidden.
        ablations: whether ours with parts removed is run too.
        shown: whether pictures of its objects may be published.
        credit: whose objects these pictures show.
    """

    key: str
    title: str
    kind: str
    folder: str | None = None
    objects: tuple[str, ...] | None = None
    protocols: tuple[Prior, ...] = PRIORS
    occlusion: float = 0.0
    ablations: bool = False
    shown: bool = True
    credit: str = ""

    @property
    def exemplary(self) -> Prior:
        """The protocol whose successes and failures are shown."""
        return "upright" if "upright" in self.protocols else self.protocols[0]


@dataclass(frozen=True)
class Job:
    """Some methods on one set.

    Attributes:
        tested: the set.
        part: which methods: ours, those that need no weights, rotation regression, the paper's form, or ours after as
            long a training as that had.
        weights: folder of theirs, or None.
        identity: differs whenever the result would.
        pairs: most pairs of an object; None: all.
        count: of procedural objects.
        seeds: of the draws.
        device: of the networks.
        refinement: of ours.
    """

    tested: Chapter
    part: str
    weights: str | None
    identity: str
    pairs: int | None
    count: int
    seeds: tuple[int, ...]
    device: str
    refinement: Refinement = "none"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.tested.key}-{self.part}"

    @property
    def stamp(self) -> str:
        """Differs whenever its result would."""
        depends_on = {key: value for key, value in asdict(self).items() if key != "weights"}  # but on what they are
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]

    def set_of(self, seed: int) -> EvaluationSet:
        """The test set, as one seed draws it."""
        from nope_ros.evaluation.meshes import mesh_set, procedural_set
        from nope_ros.evaluation.photos import photo_set

        tested, folder = self.tested, Path(self.tested.folder or "")
        if tested.kind == "photos":
            return photo_set(folder, seed, objects=tested.objects, pairs=self.pairs)
        drawn: dict[str, Any] = {"protocols": tested.protocols, "references": _REFERENCES, "pairs": self.pairs}
        if tested.kind == "meshes":
            return mesh_set(folder, seed, objects=tested.objects, **drawn)
        return procedural_set(seed, count=self.count, **drawn)


def run_job(job: Job, folder: Path) -> str:
    """Evaluate; write ``<name>.json`` and, of ours, pictures in ``<name>/``. Returns the name."""
    from nope_ros.estimator import PoseEstimator
    from nope_ros.evaluation.baselines import EstimatorMethod
    from nope_ros.evaluation.evaluate import Report, evaluate_set, methods_for, plain_baselines, trained_baselines
    from nope_ros.evaluation.pictures import write_pictures

    estimator = None
    if job.part == OURS_PART:
        estimator = PoseEstimator.from_pretrained(job.weights, device=job.device, refinement=job.refinement)
    weights = Path(job.weights) if job.weights else None
    trained = trained_baselines(
        weights if job.part == _REGRESSION else None, weights if job.part == _PAPER else None, job.device
    )
    if job.part == _AS_LONG:
        trained = [EstimatorMethod(PoseEstimator.from_pretrained(job.weights, device=job.device), AS_LONG)]
    reports, sets = [], []
    for seed in job.seeds:
        methods = trained
        if estimator is not None:
            methods = methods_for(estimator, ablations=job.tested.ablations)
        elif job.part == _PLAIN:
            methods = plain_baselines(seed)
        sets.append(job.set_of(seed))
        reports.append(
            evaluate_set(
                sets[-1],
                methods,
                job.tested.protocols,
                seed=seed,
                occlusion=job.tested.occlusion,
                model="" if estimator is None else estimator.model_name,
                refinement=job.refinement,
            )
        )
    report = Report.pooled(reports)
    if weights is not None and not job.identity.startswith(_identity(weights)):
        raise InputError(f"{weights} changed while it was evaluated; run the report again")
    if estimator is not None:
        shutil.rmtree(folder / job.name, ignore_errors=True)
        examples = sets[0] if job.tested.shown else None
        write_pictures(report, folder / job.name, examples, (job.tested.exemplary,), job.tested.title)
    unfinished = folder / f".{job.name}.{os.getpid()}"
    values = {"stamp": job.stamp, **report.to_dict()}
    if len(reports) > 1:
        values[_FIRST_SEED] = _within_90(reports[0].to_dict())
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / f"{job.name}.json")
    return job.name


def _within_90(values: dict[str, Any]) -> dict[str, Any]:
    """Of a report's values, the figures of each protocol and method within 90°, without the rest."""
    kept: dict[str, Any] = {}
    for prior in PRIORS:
        if prior in values:
            figures = values[prior]
            own = {"within_90": figures["within_90"]} if "within_90" in figures else {}
            others = {name: {"within_90": one["within_90"]} for name, one in figures["baselines"].items()}
            kept[prior] = {**own, "baselines": others}
    return kept


def results(jobs: Sequence[Job], folder: Path, workers: int) -> dict[str, dict[str, Any]]:
    """What came of each job, by name; those that are not there yet are run, with a bar."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if _kept(job, folder) is None]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"evaluating, {len(jobs) - len(missing)} kept", total=len(missing))
        for name in _run_all(missing, folder, workers):
            bar.update(task, advance=1, description=f"evaluated {name}")
    return {job.name: _kept(job, folder) or {} for job in jobs}


def _run_all(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[str]:
    if workers == 1:
        yield from (run_job(job, folder) for job in jobs)
        return
    # Fresh processes, of one thread each: a forked one would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(run_job, job, folder) for job in jobs]):
            yield done.result()


def _kept(job: Job, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{job.name}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content.get("stamp") == job.stamp else None


# --- The document ---------------------------------------------------------------------------------------------------


_HEAD = """\
# Benchmark

Made by a command, which runs everything below and writes this file:

```sh
{command}
```

Weights: `{identity}`{training}; refinement: {refinement}. One reference image, one answer a query (top-1). Nothing true
of the query is used: crop, centre and scale come from its mask. Seeds {seeds}; of photographs {photo_pairs}
pairs with 5 references an object, of renders at most {pairs} pairs with {references}.{baselines}

* Protocols, by what is known of gravity: **free** nothing; **upright** its direction in both images levels the crops,
  and the object keeps its up axis (341 viewpoints, the paper's); **standing** its direction and the camera's
  elevation are used, so that only a turn about the vertical is left.
* `within 90°`: pairs whose viewing directions are less than 90° apart; beyond that, little is seen in both.
* `sym`: the error modulo the object's symmetry, found by rendering it. Photographs have none marked.
* `50 %`, `90 %`: share of the pairs whose true rotation is in the credible set of that mass; an honest model has these
  numbers there. `nll`: nats against knowing no more than the prior; less is better.
* `translation`: median error of the position, relative to the distance; the reference's distance is known.

"""


def document(
    sections: Sequence[Chapter],
    found: dict[str, dict[str, Any]],
    speed: dict[str, Any] | None,
    pictures: dict[str, dict[str, str]],
    head: str,
) -> str:
    """The whole file.

    Args:
        sections: in the order of their sections.
        found: what came of each job, by name.
        speed: what ``nope-ros benchmark --json`` writes.
        pictures: for each set, paths of its pictures by their kind.
        head: what comes first.
    """
    parts = [head, *_goals(sections, found, speed), *_refined(sections, found)]
    for tested in sections:
        ours = found[f"{tested.key}-{OURS_PART}"]
        others = [found[name] for name in found if name.startswith(f"{tested.key}-") and not name.endswith(OURS_PART)]
        parts += _section(tested, ours, others, pictures.get(tested.key, {}))
    if speed is not None:
        parts += _speed(speed)
    return "\n".join(parts).rstrip() + "\n"


_FIELDS = {
    "Acc15": "acc15",
    "Acc30": "acc30",
    "median": "median_deg",
    "mean": "mean_deg",
    "Acc15 sym": "acc15_sym",
    "Acc30 sym": "acc30_sym",
    "median sym": "median_deg_sym",
    "50 %": "coverage50",
    "90 %": "coverage90",
    "nll": "nll",
    "translation": "translation_relative_median",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _number(value: float | None, field: str = "") -> str:
    if value is None:
        return "–"
    if field == "translation_relative_median":
        return f"{100 * value:.1f} %"
    degree = "°" if field.startswith(("median", "mean")) else ""
    return f"{value:.{_CELL.get(field, 1)}f}{degree}"


def _methods(result: dict[str, Any], prior: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods of a result under one protocol; its own figures, if it has any, under ``name``."""
    figures = result.get(prior)
    if figures is None:
        return
    if "within_90" in figures:
        yield name, figures
    yield from figures["baselines"].items()


def _section(
    tested: Chapter, ours: dict[str, Any], others: Sequence[dict[str, Any]], pictures: dict[str, str]
) -> Iterator[str]:
    yield f"## {tested.title}\n"
    for subset, title in (("within_90", "within 90°"), ("all", "all pairs")):
        rows = []
        for prior in tested.protocols:
            mine = dict(_methods(ours, prior, "**nope_ros**"))
            shown = {name: mine[name] for name in _COMPARED if name in mine}
            for other in others:
                shown |= dict(_methods(other, prior, ""))
            for place, (name, figures) in enumerate(shown.items()):
                scores = figures[subset]
                cells = [_number(scores.get(field), field) for field in _FIELDS.values()]
                rows.append(["" if place else prior, name, str(scores["pairs"]), *cells])
        yield _table([title, "method", "pairs", *_FIELDS], rows)
    yield from _same_pairs(tested, ours, others)
    if tested.ablations:
        yield (
            "Ours with a part removed, within 90°, Acc30 and median (modulo symmetry); the last two are without "
            "refinement too, to be held against the templates alone:\n"
        )
        names = [name for name, _ in _methods(ours, tested.protocols[0], "nope_ros")]
        found = {prior: dict(_methods(ours, prior, "nope_ros")) for prior in tested.protocols}
        yield _table(["", *tested.protocols], [_in_short(name, found) for name in names])
    if tested.kind == "photos":
        yield "Each object, ours, within 90°, Acc30 and median:\n"
        rows = []
        objects = {name for prior in tested.protocols for name in ours.get(prior, {}).get("objects", {})}
        for name in sorted(objects):
            row = [name]
            for prior in tested.protocols:
                scores = ours.get(prior, {}).get("objects", {}).get(name, {}).get("within_90", {})
                row.append(
                    f"{_number(scores.get('acc30'))}, {_number(scores.get('median_deg'), 'median_deg')}"
                    if scores
                    else "–"
                )
            rows.append(row)
        yield _table(["object", *tested.protocols], rows)
    for kind, text in (
        ("reliability", "How often truth is in a credible set, against the mass of the set"),
        ("confidence", "Accuracy against confidence; errors left when only confident answers are kept"),
        ("examples", "Successes (green) and failures (red), drawn at random; axes as estimated, the true ones faint"),
    ):
        if kind in pictures:
            yield f"![{text}]({pictures[kind]})\n"
    if "examples" in pictures and tested.credit:
        yield f"{tested.credit}\n"
    if ours["skipped"]:
        yield f"{len(ours['skipped'])} images could not be used: {'; '.join(ours['skipped'][:3])}\n"
    if tested.kind == "photos" and not tested.shown:
        yield "These photographs carry no licence that allows showing them here.\n"


def _refined(sections: Sequence[Chapter], found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What refinement makes of the templates' answers, on all sets."""
    rows = []
    for tested in sections:
        ours = found[f"{tested.key}-{OURS_PART}"]
        modulo = "" if tested.kind == "photos" else "_sym"
        fields = (
            f"acc15{modulo}",
            f"acc30{modulo}",
            f"median_deg{modulo}",
            "coverage90",
            "translation_relative_median",
        )
        for place, prior in enumerate(prior for prior in tested.protocols if prior in ours):
            methods = dict(_methods(ours, prior, _COMPARED[0]))
            if not methods.keys() >= set(_COMPARED):
                continue
            after, before = (methods[name]["within_90"] for name in _COMPARED)
            cells = [f"{_number(before.get(field), field)} → {_number(after.get(field), field)}" for field in fields]
            rows.append(["" if place else tested.title, prior, *cells])
    if rows:
        yield "## What refinement adds\n"
        yield (
            "The templates' answer → the default's, within 90°; of rendered objects modulo symmetry. "
            "[Every stage alone](refinement.md), with its time and its covariance, on fewer queries.\n"
        )
        yield _table(["set", "known of gravity", "Acc15", "Acc30", "median", "90 %", "translation"], rows)


def _in_short(name: str, found: dict[Prior, dict[str, dict[str, Any]]]) -> list[str]:
    """A row of one method: Acc30 and median within 90°, modulo symmetry, for each protocol."""
    cells = []
    for methods in found.values():
        scores = methods[name]["within_90"]
        cells.append(f"{_number(scores['acc30_sym'])}, {_number(scores['median_deg_sym'], 'median_deg_sym')}")
    return [name, *cells]


def _same_pairs(tested: Chapter, ours: dict[str, Any], others: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Where some methods ran on the first seed's pairs alone: those beside what is known of the others on these."""
    most = max(len(one["seeds"]) for one in (ours, *others))
    if all(len(one["seeds"]) == most for one in others):
        return
    found: dict[Prior, dict[str, dict[str, Any]]] = {prior: {} for prior in tested.protocols}
    for one in (ours, *others):
        figures = one if len(one["seeds"]) < most else one.get(_FIRST_SEED, {})
        for prior in tested.protocols:
            found[prior] |= dict(_methods(figures, prior, "**nope_ros**"))
    names = [name for name in found[tested.protocols[0]] if name in _COMPARED or name not in _ablations(ours)]
    names = [name for name in names if all(name in methods for methods in found.values())]
    if len(names) > 1:
        yield (
            "The first seed's pairs alone, which are all that NOPE's paper form was run on, within 90°, Acc30 and "
            "median (modulo symmetry):\n"
        )
        yield _table(["", *tested.protocols], [_in_short(name, found) for name in names])


_COMPARED = ("**nope_ros**", TEMPLATES_ALONE)
"""Of ours, the rows beside the other methods."""


def _ablations(ours: dict[str, Any]) -> set[str]:
    return {name for prior in PRIORS for name in ours.get(prior, {}).get("baselines", {})}


@dataclass(frozen=True)
class _Goal:
    """A figure to reach: set, protocol, subset, field, and the bound (least, or most where ``below``)."""

    key: str
    prior: Prior
    subset: str
    field: str
    bound: float
    below: bool = False


_GOALS = (
    _Goal("procedural", "upright", "all", "acc30", 88),
    _Goal("procedural", "upright", "all", "median_deg", 7, below=True),
    _Goal("meshes", "upright", "all", "acc30_sym", 80),
    _Goal("meshes", "upright", "all", "median_deg_sym", 10, below=True),
    _Goal("meshes", "free", "within_90", "acc30_sym", 75),
    _Goal("photos", "upright", "within_90", "acc30", 75),
    _Goal("photos", "upright", "within_90", "median_deg", 15, below=True),
    _Goal("photos", "standing", "within_90", "acc30", 82),
    _Goal("photos", "standing", "within_90", "median_deg", 8, below=True),
    _Goal("photos", "free", "within_90", "acc30", 60),
    _Goal("photos", "free", "within_90", "median_deg", 22, below=True),
)


def _goals(
    sections: Sequence[Chapter], found: dict[str, dict[str, Any]], speed: dict[str, Any] | None
) -> Iterator[str]:
    titles = {tested.key: tested.title for tested in sections}
    rows: list[list[str]] = []
    missed: list[str] = []

    def row(what: str, wanted: str, value: float | None, shown: str, reached: bool) -> None:
        if value is not None:
            rows.append([what, wanted, shown, "yes" if reached else "no"])

    for goal in _GOALS:
        if goal.key not in titles:
            continue
        value = found[f"{goal.key}-{OURS_PART}"].get(goal.prior, {}).get(goal.subset, {}).get(goal.field)
        column = next(name for name, field in _FIELDS.items() if field == goal.field)
        subset = "" if goal.subset == "all" else ", within 90°"
        unit = "°" if goal.below else " %"
        sign = "≤" if goal.below else "≥"
        reached = value is not None and (value <= goal.bound if goal.below else value >= goal.bound)
        what = f"{titles[goal.key]}, {goal.prior}{subset}: {column}"
        row(what, f"{sign} {goal.bound:g}{unit}", value, f"{_number(value)}{unit}", reached)
    if {"meshes", "occluded"} <= set(titles):
        whole, part = (
            found[f"{key}-{OURS_PART}"].get("upright", {}).get("all", {}).get("acc30_sym")
            for key in ("meshes", "occluded")
        )
        if whole and part is not None:
            share = 100 * part / whole
            what = "25 % of the box hidden, upright: share of the whole view's Acc30 sym that is left"
            row(what, "≥ 80 %", share, f"{share:.0f} % (the paper: 68 %)", share >= 80)
    for key, title in titles.items():
        cover = {
            prior: figures["all"]["coverage90"]
            for prior, figures in found[f"{key}-{OURS_PART}"].items()
            if prior in PRIORS and "all" in figures and figures["all"]["coverage90"] is not None
        }
        if cover:
            shown = ", ".join(f"{prior} {value:.1f}" for prior, value in cover.items())
            reached = all(86 <= value <= 94 for value in cover.values())
            row(f"{title}: the 90 % set covers", "86–94 %", 1.0, shown, reached)
            missed += [f"{title}: covered too seldom"] if min(cover.values()) < 86 else []
            missed += [f"{title}: covered too often"] if max(cover.values()) > 94 else []
    if speed is not None:
        on_gpu = speed["machine"].get("kind", "cpu") == "cuda"
        for gpu, what, value, bound, unit, below in _speed_goals(speed):
            sign = "≤" if below else "≥"
            wanted = f"{sign} {bound:g}{unit}"
            if gpu is not None and gpu != on_gpu:
                rows.append([what, wanted, "not measured (no GPU)" if gpu else "not measured (on a GPU)", "–"])
                continue
            reached = value <= bound if below else value >= bound
            row(what, wanted, value, f"{value:,.3g}{unit}" if below else f"{value:,.0f}", reached)
    yield "## Goals\n"
    yield "[Refinement and tracking](refinement.md), stage by stage, have goals of their own.\n"
    yield _table(["figure", "goal", "measured", "reached"], rows)
    missed += [line[0] for line in rows if line[-1] == "no"]
    told = [text for begins, text in _REASONS if any(name.startswith(begins) for name in missed)]
    if told:
        yield "### Where it falls short, and why\n"
        yield "\n".join(f"* {text}" for text in told) + "\n"


_CARD = "`nope_ros/weights/rotated_latent/README.md`"
# Why goals are missed, by how the names of their figures begin; each is told while one of them is.
_REASONS = (
    (
        "Procedural objects that training never drew, upright",
        "Procedural objects, upright: the learning curve had not ended. Every stage of training still gained on "
        f"held-out objects, so time is what is missing first ({_CARD}); how far it would carry was not measured.",
    ),
    (
        "Scanned household objects, rendered, free",
        "Rendered objects, free: where nothing is known of gravity, nothing excludes the answers that look alike. Half "
        "a turn of a box or a tool with little print, and the mirrored side of it, are taken for the truth; the same "
        "objects upright are far better. Nor has the network quite learned what a roll does to a crop: the mean of a "
        f"reference over its quarter turns still helps ({_CARD}).",
    ),
    (
        "Photographs: covered too seldom",
        "Photographs, credible sets too narrow: no photograph was used, neither for training nor for the temperature, "
        "which is fitted on held-out renders in weather harsher than training's. That is not yet as harsh as reality.",
    ),
    (
        "Photographs of fruit: covered too seldom",
        "Fruit: of plain round things the network is surer than it should be. The other side of an apple looks much "
        "like the one that it knows, and is taken for it ([limits](limits.md)).",
    ),
    *(
        (
            f"{title}: covered too often",
            f"{title}, credible sets too wide: the temperature is fitted in harsher weather than these renders have, "
            "for the sake of photographs, and one temperature serves both.",
        )
        for title in ("Procedural objects that training never drew", "Scanned household objects, rendered")
    ),
)


def _speed_goals(speed: dict[str, Any]) -> list[tuple[bool | None, str, float, float, str, bool]]:
    """Each goal of speed: whether it is of a GPU (None: of either), what, its value, bound, unit, whether at most."""
    ours = speed["ours"]
    alone = speed["object_megabytes"] + ours["shared_megabytes"]
    seconds, small, grid = speed["registration_seconds"], speed["matching_ms_341"], speed["matching_ms_free"]
    return [
        (False, "registration, full free grid", seconds, 0.5, " s", True),
        (None, "registration, times faster than the paper's way", speed["registration_speedup"], 500, "", False),
        (False, "matching 341 templates", small, 1, " ms", True),
        (False, "matching the free grid", grid, 5, " ms", True),
        (False, "image to rotation, p50", speed["image_to_rotation_ms"]["p50"], 25, " ms", True),
        (None, "one object", speed["object_megabytes"], 20, " MB", True),
        (None, "one object alone, with what all share", alone, 20, " MB", True),
        (True, "registration on a GPU, full free grid (the paper, on a V100: 1.01 s)", 1e3 * seconds, 50, " ms", True),
        (True, "matching 341 templates on a GPU (the paper: 0.18 s)", small, 1, " ms", True),
    ]


def _speed(speed: dict[str, Any]) -> Iterator[str]:
    machine, ours, paper = speed["machine"], speed["ours"], speed["paper"]
    rates = ", ".join(f"{value:,.0f} GFLOP/s in {key}" for key, value in machine["product_gflops"].items())
    yield "## Speed\n"
    busy = " The machine was not idle: times are too long, on both sides." if machine["load"] > BUSY else ""
    parameters = f"{paper['unet_parameters'] / 1e6:.0f} M"
    yield (
        f"`nope-ros benchmark` on {machine['device']}, {machine['threads']} thread(s), PyTorch {machine['torch']}, "
        f"ours in {machine['precision']}, load before the run {machine['load']:.1f}. The paper's way: Stable "
        f"Diffusion's autoencoder and the full-size U-Net ({parameters} parameters) in float32, weights random, one "
        f"template at a time; {paper['templates_timed']} templates were timed, {paper['templates']} are scaled from "
        "them. The limit of a step is its bytes at the rate of a large copy "
        f"({machine['copy_gigabytes_per_second']:.1f} GB/s here) or its operations at that of a large matrix product "
        f"({rates}), whichever takes longer; below one, data came from a cache. The paper's templates are small, so "
        f"that matching {paper['templates']} of them takes next to nothing on either side; what differs is the time "
        f"until they are there.{busy}\n"
    )

    def line(what: str, whose: str, seconds: float | str, step: dict[str, Any] | None = None) -> list[str]:
        known = step_cells(step) if step is not None and "limit_seconds" in step else ("", "", "", "")
        took = seconds if isinstance(seconds, str) else f"{1e3 * seconds:,.3g} ms"
        return [what, whose, took, *known]

    theirs, grid = "the paper's", ours["free_rotations"]
    rows = [
        line(f"registration: {paper['templates']} templates", theirs, f"{paper['registration_seconds']:,.0f} s"),
        line("the same in batches, fastest precision", theirs, f"{paper['registration_batched_seconds']:,.0f} s"),
        line(f"registration: {grid} rotations", "ours", ours["registration"]["seconds"], ours["registration"]),
        line("the same, every next object", "ours", ours["registration_next_seconds"]),
        line("one template", theirs, paper["template"]["seconds"], paper["template"]),
        line("encoding one image", theirs, paper["encode"]["seconds"], paper["encode"]),
        line("encoding one image", "ours", ours["encode"]["seconds"], ours["encode"]),
        line(f"matching {paper['templates']}", theirs, paper["match"]["seconds"], paper["match"]),
        line(f"matching {paper['templates']}", "ours", ours["match_341"]["seconds"], ours["match_341"]),
        line(f"matching {grid}", "ours", ours["match_free"]["seconds"], ours["match_free"]),
        *(
            line(f"{what}, p50 / p95", "ours", f"{speed[key]['p50']:.3g} / {speed[key]['p95']:.3g} ms", step)
            for what, key, step in (
                ("image to rotation, templates alone", "image_to_rotation_ms", ours.get("image_to_rotation")),
                ("image to refined pose", "image_to_pose_ms", None),
            )
        ),
    ]
    yield _table(["step", "whose", "time", "bytes moved", "operations", "limit", "× limit"], rows)
    alone = speed["object_megabytes"] + ours["shared_megabytes"]
    rows = [
        ["the paper's", f"{paper['object_megabytes']:.1f} MB", f"{paper['object_megabytes']:.1f} MB"],
        ["ours", f"{speed['object_megabytes']:.1f} MB", f"{alone:.1f} MB"],
    ]
    yield _table(["held for one object", "its own", "with what all objects share"], rows)


# --- The command ----------------------------------------------------------------------------------------------------


def chapters(meshes: Path | None, photos: Path | None, procedural: int) -> list[Chapter]:
    """The sets of the document, as far as their data are there."""
    sets = []
    if procedural:
        sets.append(Chapter("procedural", "Procedural objects that training never drew", "procedural"))
    if meshes is not None:
        folder = str(meshes)
        credit = " ".join(text for name, text in _CREDITS.items() if (meshes / name).is_dir())
        sets.append(
            Chapter("meshes", "Scanned household objects, rendered", "meshes", folder, ablations=True, credit=credit)
        )
        sets.append(
            Chapter(
                "occluded",
                "The same, 25 % of the box hidden",
                "meshes",
                folder,
                protocols=("upright",),
                occlusion=0.25,
                shown=False,
            )
        )
    if photos is not None:
        names = sorted(path.parent.name for path in photos.glob("*/poses.json")) or [photos.resolve().name]
        fruit = tuple(name for name in names if name in FRUIT)
        rest = tuple(name for name in names if name not in FRUIT)
        folder = str(photos)
        if rest:
            sets.append(Chapter("photos", "Photographs", "photos", folder, rest, ablations=True, shown=False))
        if fruit:
            sets.append(Chapter("fruit", "Photographs of fruit", "photos", folder, fruit, credit=_CREDITS["fruit"]))
    return sets


def _identity(weights: Path) -> str:
    """Of what a folder holds, temperature and all."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update((weights / name).read_bytes())
    return digest.hexdigest()[:12]


# Modules of the evaluation that no result comes from.
_NO_RESULT = ("report.py", "pictures.py", "benchmark.py", "refinement.py", "stages.py")
# Of the training: what draws the renders of a test set.
_RENDERS = ("rendering/mesh.py", "rendering/render.py", "training/procedural.py", "training/render_cache.py")


def _code(kind: str) -> str:
    """Of the modules that a new result on a set of this kind has to follow."""
    package = Path(__file__).parents[1]
    paths = [*package.glob("*.py"), *package.glob("models/*.py")]
    paths += [path for path in package.glob("evaluation/*.py") if path.name not in _NO_RESULT]
    if kind != "photos":
        paths += [package / name for name in _RENDERS]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _published(sections: Sequence[Chapter], work: Path, out: Path) -> dict[str, dict[str, str]]:
    """Copy the pictures that may be shown beside the document; their paths as seen from it."""
    folder = out.parent / "images" / out.stem
    folder.mkdir(parents=True, exist_ok=True)
    published: dict[str, dict[str, str]] = {}
    for tested in sections:
        drawn = work / f"{tested.key}-{OURS_PART}"
        wanted = {kind: drawn / f"{kind}_{tested.kind}.png" for kind in ("reliability", "confidence")}
        if tested.shown:
            wanted["examples"] = drawn / f"examples_{tested.kind}_{tested.exemplary}.png"
        for kind, path in wanted.items():
            if not path.is_file() or tested.key == "occluded":
                continue
            copy = folder / f"{kind}_{tested.key}{'.jpg' if kind == 'examples' else '.png'}"
            if kind == "examples":
                picture = cv2.imread(str(path))
                assert picture is not None
                cv2.imwrite(str(copy), picture, _JPEG)
            else:
                shutil.copyfile(path, copy)
            published.setdefault(tested.key, {})[kind] = copy.relative_to(out.parent).as_posix()
    return published


def main(arguments: Sequence[str] | None = None) -> int:
    """``nope-ros report``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nope-ros report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the document; pictures go to images/ beside it")
    parser.add_argument("--meshes", type=Path, metavar="DIR", help="folder of meshes; without it they are left out")
    parser.add_argument(
        "--photos", type=Path, metavar="DIR", help="folder of photographs; without it they are left out"
    )
    parser.add_argument("--procedural", type=int, default=40, metavar="N", help="procedural objects (%(default)s)")
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="of ours (%(default)s)")
    parser.add_argument("--regression-weights", type=Path, metavar="DIR", help="add rotation regression")
    parser.add_argument("--unet-weights", type=Path, metavar="DIR", help="add NOPE's paper form; takes long, but once")
    parser.add_argument(
        "--as-long-weights", type=Path, metavar="DIR", help="add ours, trained no longer than --unet-weights"
    )
    parser.add_argument("--pairs", type=int, default=20, help="most pairs of a rendered object (%(default)s)")
    parser.add_argument("--photo-pairs", type=int, help="most pairs of a photographed object; all by default")
    parser.add_argument("--seed", type=int, action="append", help="may be given several times (0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/report"), help="folder of results (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="sets at a time (%(default)s)")
    parser.add_argument("--speed", type=Path, metavar="JSON", help="of nope-ros benchmark, in place of running it")
    given = parser.parse_args(arguments)
    for name in ("pairs", "photo_pairs", "workers"):
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: {value} is not positive")
    try:
        text, pictures = run(given)
    except InputError as error:
        print(f"nope-ros report: {error}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    Console().print(f"wrote {given.out} and {sum(map(len, pictures.values()))} pictures", highlight=False)
    return 0


def run(given: argparse.Namespace) -> tuple[str, dict[str, dict[str, str]]]:
    """The document that the arguments ask for, and its pictures.

    Raises:
        InputError: naming what does not fit.
    """
    sections = chapters(given.meshes, given.photos, given.procedural)
    if not sections:
        raise InputError("nothing to evaluate; give --meshes, --photos or --procedural")
    console = Console(stderr=True)
    for name in ("meshes", "photos", "regression_weights", "unet_weights"):
        if getattr(given, name) is None:
            console.print(f"left out: --{name.replace('_', '-')} was not given", style="yellow", highlight=False)
    weights = find_weights(given.predictor)
    seeds = tuple(given.seed or [0])
    identity, training = _identity(weights), read_config(weights).training
    told = ", ".join(f"{training[key]:g} {key}" for key in ("steps", "minutes") if key in training)
    make = partial(Job, count=given.procedural, device=given.device)
    jobs = []
    for tested in sections:
        job = partial(make, pairs=given.photo_pairs if tested.kind == "photos" else given.pairs)
        refiner = "" if given.refinement in ("none", "synthesis") else _identity(CORRESPONDENCE_WEIGHTS)
        # The others cost hours, and change with their own weights alone.
        ours = f"{identity} {refiner} {_code(tested.kind)}"
        jobs.append(job(tested, OURS_PART, str(weights), ours, seeds=seeds, refinement=given.refinement))
        if tested.occlusion:
            continue
        jobs.append(job(tested, _PLAIN, None, "", seeds=seeds))
        for part, folder in (
            (_REGRESSION, given.regression_weights),
            (_PAPER, given.unet_weights),
            (_AS_LONG, given.as_long_weights),
        ):
            if folder is not None:
                # A U-Net runs hundreds of times for each reference; ours is held against it.
                own = seeds if part == _REGRESSION else seeds[:1]
                jobs.append(job(tested, part, str(folder), _identity(find_weights(folder)), seeds=own))
    speed = _speed_figures(given, weights)
    # The dearest first, so that none is left alone at the end.
    cost = {_PAPER: 0, OURS_PART: 1, _AS_LONG: 2, _PLAIN: 3, _REGRESSION: 4}
    found = results(sorted(jobs, key=lambda one: cost[one.part]), given.work, given.workers)
    found = {one.name: found[one.name] for one in jobs}
    pictures = _published(sections, given.work, given.out)
    head = _HEAD.format(
        command=_command(given),
        identity=identity,
        training=f" ({told})" if told else "",
        seeds=", ".join(map(str, seeds)),
        pairs=given.pairs,
        photo_pairs="all" if given.photo_pairs is None else f"at most {given.photo_pairs}",
        references=_REFERENCES,
        refinement=given.refinement,
        baselines="".join(_learnt(given, training.get("minutes"))),
    )
    return document(sections, found, speed, pictures, head), pictures


def _learnt(given: argparse.Namespace, ours: float | None = None) -> Iterator[str]:
    """How long the baselines were trained, and whether for less than our ``ours`` minutes."""
    fewer = "; first seed only, so that its rows are of fewer pairs"
    minutes: dict[Path, float] = {}
    for name, folder, before, note in (
        ("Rotation regression", given.regression_weights, "of the encoder, which began as ours", ""),
        ("NOPE's paper form", given.unet_weights, "of its autoencoder", fewer),
        (AS_LONG.capitalize(), given.as_long_weights, "", fewer),
    ):
        if folder is None:
            continue
        training = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["training"]
        minutes[folder] = training["minutes"]
        told = f"{training['steps']:,} steps, {training['minutes']:g} minutes"
        if "own_minutes" in training:
            told += f", all but {training['own_minutes']:g} of them {before}"
        if folder == given.as_long_weights:
            if minutes[folder] > minutes.get(given.unet_weights, 0.0):
                raise InputError(
                    f"--as-long-weights: {folder} took {minutes[folder]:g} minutes, longer than the paper's form; "
                    "train it anew with a smaller budget_minutes"
                )
            note += ", and templates alone, from nothing, on the same renders"
        elif folder == given.unet_weights and given.as_long_weights is not None and ours is not None:
            note += f"; ours above took {ours:g} minutes, the row after it as many as this"
        elif ours is not None and training["minutes"] < ours:
            note += f"; that is less than our {ours:g} minutes, so that its rows are not of equal training"
        yield f" {name}: {told}{note}."


def _command(given: argparse.Namespace) -> str:
    """What gives the same document; where results are kept, and how many sets run at a time, make no difference."""
    lines = ["nope-ros report"]
    for name in (
        "meshes",
        "photos",
        "procedural",
        "predictor",
        "refinement",
        "regression_weights",
        "unet_weights",
        "as_long_weights",
        "pairs",
        "photo_pairs",
        "seed",
    ):
        value = getattr(given, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                lines.append(f"  --{name.replace('_', '-')} {one}")
    return " \\\n".join([*lines, f"  --out {given.out}"])


def _speed_figures(given: argparse.Namespace, weights: Path) -> dict[str, Any]:
    from nope_ros.evaluation import benchmark

    if given.speed is not None:
        try:
            figures: dict[str, Any] = json.loads(given.speed.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--speed: {given.speed} cannot be read ({error})") from error
        return figures
    options = argparse.Namespace(weights=str(weights), device=given.device, threads=None, templates=3, data=None)
    return benchmark.run(options).to_dict()
