"""Chooses when to believe the correspondence refiner, on held-out objects of the training side.

    python -m nope_ros.training.trust --meshes ../shared/data/meshes/train

The network says of each mode of the templates how likely it is the right one. That counts, beside the mode's own
probability, as much as makes the right ones likeliest. It also says how large an error it expects. Below one threshold
its offsets are taken, else below another its affine, else the mode stays as it is. Of all pairs of thresholds that make
at most ``--harm`` of the queries worse by more than 2°, those are chosen whose answers are best: a degree of rotation
counts as much as a hundredth of the distance. How large errors are beside the expected ones follows, for the
covariance. Procedural objects are of seeds that neither training nor evaluation draws, meshes those that training holds
out; test data have no part in it. The answers depend on the templates, so that this is run again when their weights
change.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from scipy.special import logsumexp

from nope_ros.correspondence import CORRESPONDENCE_WEIGHTS, CorrespondenceRefiner, Trust
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.meshes import MESH_SUFFIXES, mesh_set, procedural_set
from nope_ros.evaluation.stages import HARM_DEG, Pair, judge_set
from nope_ros.frame import InputError
from nope_ros.latent import CONFIG_FILE
from nope_ros.prior import PRIORS, Prior
from nope_ros.training.pairs import DataConfig

# Of procedural objects; evaluation begins at 0, tests are below 10.
_SEED = 1000
# An error beyond these is wrong, and how wrong does not matter: degrees, % of the distance.
_WORST_DEG, _WORST_PERCENT = 20.0, 20.0
# Believed queries that tell how large errors are beside expected ones; with fewer all queries tell.
_ENOUGH = 20
# Of the absolute value of a normal variable of standard deviation 1.
_NORMAL_MEDIAN = 0.6745
# Keyframes of walks: some 45° apart, and some 30°.
_WALKS = (16, 32)
_RIDGE = 1e-3
# Of ``Trust.placed``, to see what matches say of the centre without the outline.
_ALONE = 1e-6
_THRESHOLDS = (0.0, *np.geomspace(3, 30, 25))


@dataclass(frozen=True)
class Chosen:
    """Thresholds, and what they do.

    Attributes:
        offsets_deg: see ``Trust``.
        affine_deg: see ``Trust``.
        spread: see ``Trust``.
        placed: see ``Trust``.
        worse_percent: of the queries whose template is right.
        rotation_deg: median of the same, with the templates' before it.
        translation_percent: the same.
        count: how many these are.
    """

    offsets_deg: float
    affine_deg: float
    spread: float
    placed: float
    worse_percent: float
    rotation_deg: tuple[float, float]
    translation_percent: tuple[float, float]
    count: int


def choose(pairs: Sequence[Pair], harm: float, *, offsets: bool = True, axes: int = 3) -> Chosen:
    """The thresholds of the expected error that serve these queries best.

    Args:
        pairs: with the errors of the templates, of the affine and of the offsets.
        harm: largest share of the queries that may become worse by more than 2°.
        offsets: whether offsets may be used at all; the affine's threshold is free in any case.
        axes: about which the answers can err: 3, or 1 where gravity is known.
    """
    right = [pair for pair in pairs if pair.right]
    sigma = np.array([pair.sigma_deg for pair in right])

    def errors(row: str, field: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([getattr(pair.errors[row], field) for pair in right])

    rows = ("template", "+ affine", "+ offsets")
    rotation, translation = (
        np.stack([errors(row, field) for row in rows]) for field in ("rotation_deg", "translation_percent")
    )
    loss = np.minimum(rotation, _WORST_DEG) + np.minimum(translation, _WORST_PERCENT)
    best: tuple[float, float, float] | None = None
    for first in _THRESHOLDS if offsets else (0.0,):
        for second in _THRESHOLDS:
            taken = np.where(sigma < first, 2, np.where(sigma < second, 1, 0))
            at = np.arange(len(right))
            worse = (rotation[taken, at] > rotation[0] + HARM_DEG).mean()
            if second >= first and worse <= harm and (best is None or loss[taken, at].mean() < best[0] - 1e-9):
                best = (float(loss[taken, at].mean()), float(first), float(second))
    assert best is not None  # believing nothing harms nobody
    _, first, second = best
    taken = np.where(sigma < first, 2, np.where(sigma < second, 1, 0))
    at = np.arange(len(right))
    believed = sigma < (first or np.inf)
    if believed.sum() < _ENOUGH:
        believed = np.ones(len(right), dtype=bool)
    ratio = np.minimum(rotation[2, believed], _WORST_DEG) / sigma[believed]
    return Chosen(
        offsets_deg=round(first, 1),
        affine_deg=round(second, 1),
        spread=round(float(np.sqrt((ratio**2).mean() / axes)), 2),
        placed=round(float(np.median(translation[2, believed])) / _NORMAL_MEDIAN / 100, 3),
        worse_percent=100 * float((rotation[taken, at] > rotation[0] + HARM_DEG).mean()),
        rotation_deg=(float(np.median(rotation[0])), float(np.median(rotation[taken, at]))),
        translation_percent=(float(np.median(translation[0])), float(np.median(translation[taken, at]))),
        count=len(right),
    )


def fit_support(pairs: Sequence[Pair]) -> tuple[float, float]:
    """``Trust.support`` and ``Trust.from_near``: with which the right ones of the compared modes are likeliest."""
    decided = [pair.compared for pair in pairs if pair.compared.right.any() and not pair.compared.right.all()]
    if not decided:
        return 0.0, 0.0

    def padded(values: Iterable[NDArray[Any]], empty: float) -> NDArray[np.float64]:
        return np.array(list(zip_longest(*values, fillvalue=empty)), dtype=np.float64)  # (modes, pairs)

    log_mass = padded((one.log_mass for one in decided), -np.inf)
    support = padded((one.support for one in decided), 0.0)
    nearness = padded((np.cos(one.turned) for one in decided), 0.0)
    right = padded((one.right for one in decided), 0.0)

    def cost(weights: NDArray[np.float64]) -> float:
        score = log_mass + weights[0] * support - weights[1] * nearness
        loss = logsumexp(score, axis=0) - logsumexp(score, axis=0, b=right)
        # Of a mesh every mode looks from near a render: what makes next to no difference is left at next to nothing.
        return float(loss.mean()) + _RIDGE * float(weights @ weights)

    found = minimize(cost, np.array([0.5, 0.0]), bounds=((0.0, 2.0), (0.0, 4.0)))
    return round(float(found.x[0]), 2), round(float(found.x[1]), 2)


def held_out(folder: Path) -> list[str]:
    """The meshes under a folder that training never sees: the same ones, by name, as of its cache."""
    names = sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in MESH_SUFFIXES
    )
    share = DataConfig.model_fields["validation_share"].default
    return [name for name in names if zlib.crc32(name.encode()) / 2**32 < share]


def gather(
    estimator: PoseEstimator,
    refiner: CorrespondenceRefiner,
    prior: Prior,
    meshes: Path,
    *,
    count: int,
    pairs: int,
    depth: bool = False,
    mesh_templates: bool = False,
    keyframes: int = 0,
    within_deg: float = 90.0,
) -> list[Pair]:
    """Queries of held-out objects: meshes, and, unless they are registered from these, as many procedural ones."""
    names = held_out(meshes)
    chosen = [names[n] for n in np.random.default_rng(0).permutation(len(names))[:count]]
    drawn: dict[str, Any] = {"protocols": (prior,), "references": 1, "pairs": pairs, "depth": depth}
    if keyframes:
        drawn["views"] = keyframes + pairs
    found = mesh_set(meshes, _SEED, objects=chosen, **drawn)
    folder = meshes if mesh_templates else None
    options: dict[str, Any] = {"depth": depth, "settle": False, "within_deg": within_deg, "progress": True}
    options["keyframes"] = keyframes
    judged = list(judge_set(found, estimator, refiner, prior, mesh_folder=folder, **options))
    if not mesh_templates:
        made = procedural_set(_SEED, count=count, **drawn)
        judged += judge_set(made, estimator, refiner, prior, **options)
    return judged


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", type=Path, required=True, help="folder of the training's meshes")
    parser.add_argument("--weights", type=Path, default=CORRESPONDENCE_WEIGHTS, help="changed in place (the packaged)")
    parser.add_argument("--predictor", help="folder of weights; the packaged ones by default")
    parser.add_argument("--count", type=int, default=30, help="meshes, and procedural objects (%(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="queries of an object (%(default)s)")
    parser.add_argument("--harm", type=float, default=0.08, help="share that may become worse by 2° (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show, and change nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    estimator = PoseEstimator.from_pretrained(given.predictor, device="cpu")
    refiner = CorrespondenceRefiner.from_pretrained(given.weights, device="cpu")
    size = {"count": given.count, "pairs": given.pairs}
    # Which mode is taken decides what errors are beyond it, so that this comes first. Nobody knows then from how near a
    # query is; where an object is seen from the other side, support misleads, and counts less for it.
    anywhere = {**size, "within_deg": 180.0}

    def walks(prior: Prior) -> list[Pair]:
        """Of sparse walks and of dense ones."""
        found = [gather(estimator, refiner, prior, given.meshes, keyframes=count, **size) for count in _WALKS]
        return [pair for pairs in found for pair in pairs]

    judged = {
        "with_image": [one for prior in PRIORS for one in gather(estimator, refiner, prior, given.meshes, **anywhere)],
        "with_mesh": gather(estimator, refiner, "free", given.meshes, mesh_templates=True, **size),
        "with_walk": [one for prior in PRIORS for one in walks(prior)],
    }
    counts = {name: fit_support(pairs) for name, pairs in judged.items()}
    refiner.weights = refiner.weights.model_copy(
        update={
            name: getattr(refiner.weights, name).model_copy(
                update={"support": support, "from_near": from_near, "placed": _ALONE}
            )
            for name, (support, from_near) in counts.items()
        }
    )
    free = gather(estimator, refiner, "free", given.meshes, **size)
    standing = gather(estimator, refiner, "standing", given.meshes, **size)
    meshes = gather(estimator, refiner, "free", given.meshes, mesh_templates=True, **size)
    found = {
        # Of one image offsets need gravity; the affine serves both, so that neither may be harmed.
        "with_image": choose(standing, given.harm, axes=1),
        "without gravity": choose(free, given.harm, offsets=False),
        "with_depth": choose(gather(estimator, refiner, "free", given.meshes, depth=True, **size), given.harm),
        "with_mesh": choose(meshes, given.harm),
        "with_walk": choose(walks("standing"), given.harm, axes=1),
        "walk without gravity": choose(walks("free"), given.harm, offsets=False),
    }
    table = Table(title=f"{given.weights}", title_justify="left")
    for heading in (
        "",
        "queries",
        "offsets below",
        "affine below",
        "spread",
        "placed",
        "worse by 2°",
        "rotation",
        "translation",
    ):
        table.add_column(heading, justify="right")
    for name, one in found.items():
        table.add_row(
            name,
            str(one.count),
            f"{one.offsets_deg:.1f}°",
            f"{one.affine_deg:.1f}°",
            f"{one.spread:.2f}",
            f"{100 * one.placed:.1f} %",
            f"{one.worse_percent:.0f} %",
            f"{one.rotation_deg[0]:.1f}° → {one.rotation_deg[1]:.1f}°",
            f"{one.translation_percent[0]:.1f} % → {one.translation_percent[1]:.1f} %",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table, f"support counts, and from near: {counts}")
    if given.dry_run:
        return
    path, old = given.weights / CONFIG_FILE, refiner.weights

    def changed(trust: Trust, one: Chosen, affine_deg: float | None = None) -> Trust:
        affine = one.affine_deg if affine_deg is None else affine_deg
        return trust.model_copy(
            update={
                "offsets_deg": one.offsets_deg,
                "affine_deg": max(affine, one.offsets_deg),
                "spread": one.spread,
                "placed": one.placed,
            }
        )

    image, level = found["with_image"], found["without gravity"].affine_deg
    walk, level_walk = found["with_walk"], found["walk without gravity"].affine_deg
    new = old.model_copy(
        update={
            "with_image": changed(old.with_image, image, min(level, image.affine_deg)),
            "with_depth": changed(old.with_depth, found["with_depth"]),
            "with_mesh": changed(old.with_mesh, found["with_mesh"]),
            "with_walk": changed(old.with_walk, walk, min(level_walk, walk.affine_deg)),
        }
    )
    path.write_text(json.dumps(new.model_dump(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"trust: {error}")
