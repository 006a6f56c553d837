"""Chooses how far to believe the correspondence refiner, on held-out objects of the training side.

    python -m nope_ros.training.trust --meshes ../shared/data/meshes/train

The network says of each mode of the templates how likely it is the right one. That counts, beside the mode's own
probability, as much as makes the right ones likeliest. It also says how large an error it expects. The answer's
rotation is the mean of the templates' mode and of the network's, each weighed by its precision; that of the network
follows from ``Trust.spread``, of which that is chosen, for each prior, whose answers are best among those that make at
most ``--harm`` of the queries worse by more than 2°. Procedural objects are of seeds that neither training nor
evaluation draws, meshes those that training holds out; test data have no part in it. The answers depend on the
templates, so that this is run again when their weights change.
"""

from __future__ import annotations

import argparse
import sys
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

from nope_ros.correspondence import CORRESPONDENCE_WEIGHTS, CorrespondenceRefiner, CorrespondenceWeights
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.meshes import mesh_set, procedural_set
from nope_ros.evaluation.stages import HARM_DEG, OFFSETS, TEMPLATE, Pair, judge_set, spread_row
from nope_ros.frame import InputError
from nope_ros.latent import write_weights
from nope_ros.prior import PRIORS, Prior
from nope_ros.rendering.files import mesh_files
from nope_ros.training.pairs import is_held_out

# Of procedural objects; evaluation begins at 0, tests are below 10.
_SEED = 1000
# A rotation that errs by more is wrong, and how wrong does not matter; degrees.
_WORST_DEG = 20.0
# Of the absolute value of a normal variable of standard deviation 1.
_NORMAL_MEDIAN = 0.6745
# Keyframes of walks: some 45° apart, and some 30°.
_WALKS = (16, 32)
_RIDGE = 1e-3
# Of ``Trust.placed``, to see what matches say of the centre without the outline.
_ALONE = 1e-6
# Of ``Trust.spread``; under the last one nothing is believed but which mode it is.
SPREADS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.2, 1.4, 1.7, 2.0, 2.8, 4.0, 1000.0)


@dataclass(frozen=True)
class Chosen:
    """A spread, and what it does.

    Attributes:
        spread: see ``Trust``.
        placed: see ``Trust``.
        worse_percent: of the queries whose template is right, those that became worse.
        rotation_deg: median of the same, with the templates' before it.
        translation_percent: the same.
        count: how many these are.
    """

    spread: float
    placed: float
    worse_percent: float
    rotation_deg: tuple[float, float]
    translation_percent: tuple[float, float]
    count: int


def choose(pairs: Sequence[Pair], harm: float) -> Chosen:
    """The spread that serves queries of one kind best.

    Args:
        pairs: with a row for each of ``SPREADS``.
        harm: largest share of them that may become worse by more than 2°.
    """
    right = [pair for pair in pairs if pair.right]

    def errors(row: str, field: str = "rotation_deg") -> NDArray[np.float64]:
        return np.array([getattr(pair.errors[row], field) for pair in right])

    def loss(spread: float) -> float:
        return float(np.minimum(errors(spread_row(spread)), _WORST_DEG).mean())

    def worse(spread: float) -> float:
        return float((errors(spread_row(spread)) > errors(TEMPLATE) + HARM_DEG).mean())

    spread = min([one for one in SPREADS if worse(one) <= harm] or SPREADS[-1:], key=loss)
    rotation, translation = (
        [float(np.median(errors(row, field))) for row in (TEMPLATE, spread_row(spread))]
        for field in ("rotation_deg", "translation_percent")
    )
    return Chosen(
        spread=spread,
        placed=round(float(np.median(errors(OFFSETS, "translation_percent"))) / _NORMAL_MEDIAN / 100, 3),
        worse_percent=100 * worse(spread),
        rotation_deg=(rotation[0], rotation[1]),
        translation_percent=(translation[0], translation[1]),
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
    return [name for name in mesh_files(folder) if is_held_out(name)]


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
    spreads: Sequence[float] = (),
) -> list[Pair]:
    """Queries of held-out objects: meshes, and, unless they are registered from these, as many procedural ones.

    Arguments as of ``judge_set``.
    """
    names = held_out(meshes)
    chosen = [names[n] for n in np.random.default_rng(0).permutation(len(names))[:count]]
    drawn: dict[str, Any] = {"protocols": (prior,), "references": 1, "pairs": pairs, "depth": depth}
    if keyframes:
        drawn["views"] = keyframes + pairs
    found = mesh_set(meshes, _SEED, objects=chosen, **drawn)
    folder = meshes if mesh_templates else None
    options: dict[str, Any] = {"depth": depth, "settle": False, "within_deg": within_deg, "progress": True}
    options |= {"keyframes": keyframes, "spreads": spreads}
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
    parser.add_argument("--harm", type=float, default=0.05, help="share that may become worse by 2° (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show, and change nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    estimator = PoseEstimator.from_pretrained(given.predictor, device="cpu")
    refiner = CorrespondenceRefiner.from_pretrained(given.weights, device="cpu")
    size = {"count": given.count, "pairs": given.pairs}
    # Which mode is taken decides what errors are beyond it, so that this comes first. Nobody knows then from how near a
    # query is; where an object is seen from the other side, support misleads, and counts less for it.
    anywhere = {**size, "within_deg": 180.0}

    def of(prior: Prior, **how: Any) -> list[Pair]:
        return gather(estimator, refiner, prior, given.meshes, **how)

    # Objects from meshes have no procedural ones among them. There are twice as many meshes with twice as many queries:
    # of a hundred queries, one more or less that became worse would decide how precise these poses are.
    of_mesh: dict[str, Any] = {"mesh_templates": True, "count": 2 * given.count, "pairs": 2 * given.pairs}
    judged = {
        "with_image": [one for prior in PRIORS for one in of(prior, **anywhere)],
        "with_mesh": of("free", **of_mesh),
    }
    counts = {name: fit_support(pairs) for name, pairs in judged.items()}
    old = refiner.weights

    def updated(weights: CorrespondenceWeights, changes: dict[str, dict[str, Any]]) -> CorrespondenceWeights:
        return weights.model_copy(
            update={name: getattr(weights, name).model_copy(update=values) for name, values in changes.items()}
        )

    counted = {name: {"support": support, "from_near": from_near} for name, (support, from_near) in counts.items()}
    refiner.weights = updated(old, {name: {**values, "placed": _ALONE} for name, values in counted.items()})

    weighed: dict[str, Any] = {**size, "spreads": SPREADS}
    found: dict[str, dict[Prior, Chosen]] = {
        "with_image": {prior: choose(of(prior, **weighed), given.harm) for prior in PRIORS},
        # Depth tells what gravity would; it is the same with it.
        "with_depth": {"free": choose(of("free", depth=True, **weighed), given.harm)},
        "with_mesh": {"free": choose(of("free", **of_mesh, spreads=SPREADS), given.harm)},
        # Of walks one mode is tried, and there is nothing that support could count for.
        "with_walk": {
            prior: choose([one for count in _WALKS for one in of(prior, keyframes=count, **weighed)], given.harm)
            for prior in PRIORS
        },
    }
    table = Table(title=f"{given.weights}", title_justify="left")
    for heading in ("", "queries", "spread", "placed", "worse by 2°", "rotation", "translation"):
        table.add_column(heading, justify="right")
    for name, by_prior in found.items():
        for prior, one in by_prior.items():
            table.add_row(
                f"{name}, {prior}",
                str(one.count),
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
    changes: dict[str, dict[str, Any]] = {
        name: {
            **counted.get(name, {}),
            "spread": {prior: by_prior.get(prior, by_prior["free"]).spread for prior in PRIORS},
            "placed": round(float(np.mean([one.placed for one in by_prior.values()])), 3),
        }
        for name, by_prior in found.items()
    }
    write_weights(given.weights, updated(old, changes).model_dump())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"trust: {error}")
