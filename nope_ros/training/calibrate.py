"""Fits how sure answers are: temperature of the likelihood, spread of errors, and how much views tell anew.

    python -m nope_ros.training.calibrate WEIGHTS --cache CACHE

A temperature does not change which rotation is best, only how sure the distribution is. It is chosen so that the true
rotation is as likely as possible (in the mean of log) on objects that training did not see, over the same grids as at
run time, for each of the priors. Then, for each prior, the factor on a distribution's second moment with which its 90 %
ellipsoid holds 90 % of the errors; and how far apart views are that a tracker may take for independent, so that its
ellipsoids hold 90 % too. All three go into the folder's ``config.json``. Test data have no part in it.

Reality is farther from training's renders than held-out renders are. So the objects are meshes where the cache has any
(procedural ones are of the very kind training saw most), and what happens to their images is harsher than in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import chi2
from torch import Tensor

from nope_ros.crop import Crop
from nope_ros.distribution import RotationDistribution
from nope_ros.frame import InputError
from nope_ros.latent import (
    ErrorModel,
    NetworkPredictor,
    RotatedLatentPredictor,
    load_predictor,
    read_config,
    write_weights,
)
from nope_ros.match import Bank, HarmonicBank, predict_bank
from nope_ros.prior import FREEDOM, PRIORS, Prior, elevation, hypotheses
from nope_ros.rotations import log
from nope_ros.tracking import Passage, added, frontal, news
from nope_ros.training.augment import AugmentationConfig, training_view
from nope_ros.training.pairs import DataConfig, RenderCache

Array = NDArray[np.float64]

HARSHER = AugmentationConfig(
    occluder_probability=0.3,
    mask_grow=(-3.5, 4.5),
    mask_roughness=3.5,
    missing_piece_probability=0.25,
    gain=(0.35, 1.8),
    gamma=(0.5, 1.8),
    white_balance=0.16,
    saturation=(0.1, 1.6),
    shading=0.7,
    highlight_probability=0.5,
    noise=(0.0, 0.08),
    blur=(0.0, 2.2),
    motion_blur_probability=0.2,
    low_resolution_probability=0.3,
    jpeg_quality=(15, 80),
    clean_probability=0.0,
    gravity_noise_deg=1.0,  # what an IMU's gravity errs
)
"""What happens to the views: more of everything than in training, but as good a gravity as robots have."""


@dataclass(frozen=True)
class Evidence:
    """What many pairs say, before it is known how loudly.

    Attributes:
        log_likelihood: one (N,) for each pair, at temperature one; N differs between priors.
        log_prior: one (N,) for each pair, normalised.
        truth: index of the rotation nearest to the truth, for each pair.
        rotations: one (N, 3, 3) for each pair.
        delta_R: (3, 3) the truth itself, for each pair.
        spacing: of the rotations, radians.
    """

    log_likelihood: list[NDArray[np.float32]]
    log_prior: list[NDArray[np.float32]]
    truth: list[int]
    rotations: list[Array] = field(default_factory=list)
    delta_R: list[Array] = field(default_factory=list)
    spacing: list[float] = field(default_factory=list)

    def nll(self, temperature: float) -> float:
        """Mean of −log(probability of the truth / its prior probability), nats."""
        total = 0.0
        for likelihood, prior, truth in zip(self.log_likelihood, self.log_prior, self.truth, strict=True):
            scaled = likelihood / temperature
            total += float(logsumexp(scaled + prior)) - float(scaled[truth])
        return total / len(self.truth)

    def coverage(self, temperature: float, mass: float) -> float:
        """Share of pairs whose truth is in the credible set of this mass."""
        covered = 0
        for likelihood, prior, truth in zip(self.log_likelihood, self.log_prior, self.truth, strict=True):
            logits = likelihood.astype(np.float64) / temperature + prior
            probability = np.exp(logits - logsumexp(logits))
            covered += probability[probability > probability[truth]].sum() < mass
        return covered / len(self.truth)

    def squared(self, temperature: float) -> Array:
        """Errors (P,) of the answers, squared and normalised by the distributions' second moments."""
        squares = []
        for rotations, likelihood, prior, spacing, truth in zip(
            self.rotations, self.log_likelihood, self.log_prior, self.spacing, self.delta_R, strict=True
        ):
            logits = likelihood.astype(np.float64) / temperature
            seen = RotationDistribution.from_log_likelihood(rotations, logits, prior.astype(np.float64), spacing)
            squares.append(normalised_square(seen, truth))
        return np.array(squares)


def normalised_square(distribution: RotationDistribution, delta_R: Array) -> float:
    """eᵀ M⁻¹ e of a distribution's answer, where e is the rotation vector to the truth and M the second moment."""
    off = log(delta_R @ distribution.mode.R.T)
    return float(off @ np.linalg.solve(distribution.moment_about(distribution.mode.R), off))


def fit_spread(squared: Array, freedom: int) -> float:
    """The factor on second moments with which the 90 % ellipsoid holds 90 % of errors with so many degrees of freedom.

    Args:
        squared: (P,) normalised errors, squared.
        freedom: 1 to 3: an error that gravity excludes does not happen, and has no share in the ellipsoid.
    """
    return float(np.quantile(squared, 0.9) / chi2.ppf(0.9, freedom))


def gather_evidence(
    predictor: NetworkPredictor,
    config: DataConfig,
    prior: Prior,
    *,
    objects: int = 240,
    queries: int = 24,
    augmentation: AugmentationConfig = HARSHER,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """Pairs of views of held-out objects: meshes, or procedural ones if the cache has no held-out mesh.

    Args:
        predictor: with any temperature.
        config: names the cache and the split.
        prior: whether gravity is known, as the evaluation's protocols have it.
        objects: how many.
        queries: for each object, against one reference.
        augmentation: what happens to the views.
        seed: of all of it.
        progress: show a bar.
    """
    cache = RenderCache(config)
    rng = np.random.default_rng((seed, PRIORS.index(prior)))
    chosen = _chosen(cache, objects, rng)
    evidence = Evidence([], [], [])
    for index in track(chosen, prior, disable=not progress, console=Console(stderr=True)):
        _add_object(evidence, predictor, cache, index, prior, queries, augmentation, rng)
    return evidence


def _chosen(cache: RenderCache, objects: int, rng: np.random.Generator) -> list[int]:
    available = np.flatnonzero(~cache.procedural & ~cache.variant & cache.held_out)
    if len(available) == 0:
        available = np.flatnonzero(cache.held_out)
    chosen: list[int] = rng.permutation(available)[:objects].tolist()
    return chosen


def _add_object(
    evidence: Evidence,
    predictor: NetworkPredictor,
    cache: RenderCache,
    index: int,
    prior: Prior,
    queries: int,
    augmentation: AugmentationConfig,
    rng: np.random.Generator,
) -> None:
    level = prior != "free"
    seen = cache.views[index]
    if level:  # as on a table; from below, the other half of the viewpoints counts
        seen = seen[cache.directions[seen][:, 2] > 0]
    views = rng.choice(seen, min(queries + 1, len(seen)), replace=False)
    latents, rotations = _look(predictor, cache, views, level, augmentation, rng)
    # Roll was removed by a gravity that errs, and what errs is believed.
    believed = [_level(elevation(-R[:, 2])) if level else None for R in rotations]
    bank: Bank | None = None
    for latent, R, gravity in zip(latents[1:], rotations[1:], believed[1:], strict=True):
        possible = hypotheses(prior, believed[0], gravity)
        if bank is None or prior == "standing":  # whose rotations depend on the query
            bank = predict_bank(predictor, latents[0], possible.rotations)
        allowed = np.flatnonzero(np.isfinite(possible.log_weight))
        delta_R = R @ rotations[0].T
        evidence.log_likelihood.append(bank.match(latent, 1.0).log_likelihood[allowed].astype(np.float32))
        evidence.log_prior.append(np.full(len(allowed), -np.log(len(allowed)), np.float32))
        evidence.truth.append(int(np.argmax(possible.rotations[allowed].reshape(-1, 9) @ delta_R.ravel())))
        evidence.rotations.append(
            possible.rotations if len(allowed) == len(possible.rotations) else possible.rotations[allowed]
        )
        evidence.delta_R.append(delta_R)
        evidence.spacing.append(possible.spacing)


def _look(
    predictor: NetworkPredictor,
    cache: RenderCache,
    views: NDArray[np.intp],
    level: bool,
    augmentation: AugmentationConfig,
    rng: np.random.Generator,
) -> tuple[Tensor, list[Array]]:
    """Latents (V, D) of views as a robot would see them, and R_virtual_object (3, 3) of each."""
    crops, rotations = [], []
    for view in views:
        made = training_view(
            np.asarray(cache.images[view]),
            cache.R[view],
            cache.K[view],
            size=predictor.crop_size,
            roll=None if level else float(rng.uniform(-np.pi, np.pi)),
            config=augmentation,
            rng=rng,
        )
        image = np.ascontiguousarray(made.crop.transpose(1, 2, 0))
        crops.append(Crop(image[..., :3], image[..., 3], np.eye(3), np.eye(3), 0.1, 50.0, level))
        rotations.append(made.R_virtual_object)
    latents = predictor.encode(crops)
    if not level and isinstance(predictor, RotatedLatentPredictor):  # the first is the reference
        latents[0] = predictor.of_any_roll(latents[0], crops[0].image, crops[0].mask)
    return latents, rotations


_STEP_SECONDS = 0.5
"""Between views of a walk, which are about 20° apart."""


def fit_independence(
    predictor: RotatedLatentPredictor,
    config: DataConfig,
    temperature: float,
    spread: float,
    *,
    objects: int = 240,
    candidates: tuple[float, ...] = (20.0, 35.0, 60.0, 90.0, 130.0),
    seed: int = 0,
    progress: bool = False,
) -> tuple[float, dict[str, float]]:
    """How far apart views must be, degrees, to count as independent: the tracker's ellipsoids then hold 90 % too.

    The camera walks from each view of an object to the nearest that is left; gravity is known ("standing").

    Args:
        predictor: with any temperature.
        config: names the cache and the split.
        temperature: of the likelihood.
        spread: of single frames under "standing".
        objects: how many.
        candidates: degrees, ascending.
        seed: of all of it.
        progress: show a bar.

    Returns:
        The angle, and for each candidate the share of errors, %, that the 90 % ellipsoid holds.
    """
    cache = RenderCache(config)
    rng = np.random.default_rng((seed, len(PRIORS)))
    squared: list[list[float]] = [[] for _ in candidates]
    for index in track(_chosen(cache, objects, rng), "walks", disable=not progress, console=Console(stderr=True)):
        seen = cache.views[index]
        left = [int(view) for view in rng.permutation(seen[cache.directions[seen][:, 2] > 0])]
        if len(left) < 4:
            continue
        reference, order = left[0], [left.pop()]
        while left:
            left.sort(key=lambda view: float(cache.directions[view] @ cache.directions[order[-1]]))
            order.append(left.pop())
        latents, rotations = _look(predictor, cache, np.array([reference, *order]), True, HARSHER, rng)
        down = [_level(elevation(-R[:, 2])) for R in rotations]
        told: list[Tensor] = []
        for number in range(1, len(rotations)):
            possible = hypotheses("standing", down[0], down[number])
            bank = HarmonicBank.of(predictor, latents[0], possible.rotations)
            now = bank.harmonics(latents[number], temperature)
            if number == 1:
                told = [now] * len(candidates)
                continue
            turn = rotations[number] @ rotations[number - 1].T
            passage = Passage(turn, turn, _STEP_SECONDS, known=True)
            alone = RotationDistribution.from_log_likelihood(possible.rotations, bank.log_likelihood(now))
            more = news(frontal(possible.rotations[:, 2, 2], alone.probabilities))
            told = [
                added(before, now, passage, float(np.radians(angle)) / more)
                for before, angle in zip(told, candidates, strict=True)
            ]
            delta_R = rotations[number] @ rotations[0].T
            if order[number - 1] == reference or rotations[number][2] @ rotations[0][2] < 0:
                continue
            for one, belief in zip(squared, told, strict=True):
                fused = RotationDistribution.from_log_likelihood(
                    possible.rotations, bank.log_likelihood(belief), spacing=possible.spacing
                )
                one.append(normalised_square(fused, delta_R))
    limit = spread * chi2.ppf(0.9, FREEDOM["standing"])
    coverage = [100 * float(np.mean(np.array(one) <= limit)) for one in squared]
    # More independent views make it surer, so coverage rises with the angle.
    found = float(np.interp(90.0, np.maximum.accumulate(coverage), candidates))
    return found, {f"{angle:g}": round(share, 1) for angle, share in zip(candidates, coverage, strict=True)}


def _level(angle: float) -> Array:
    """Gravity (3,) in the virtual camera of a level crop that looks down by an angle."""
    return np.array([0.0, np.cos(angle), np.sin(angle)])


def fit_temperature(evidence: list[Evidence]) -> float:
    """The temperature of the smallest mean negative log-likelihood, each kind of pairs counting the same."""

    def cost(log_temperature: float) -> float:
        return float(np.mean([one.nll(float(np.exp(log_temperature))) for one in evidence]))

    found = minimize_scalar(cost, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def write_calibration(folder: Path, temperature: float, errors: ErrorModel, notes: dict[str, object]) -> None:
    """Put what was fitted, and how it came about, into a folder's ``config.json``."""
    config = read_config(folder)
    changed = config.model_copy(
        update={
            "temperature": round(temperature, 5),
            "errors": errors,
            "training": {**config.training, "calibration": notes},
        }
    )
    write_weights(folder, changed.model_dump())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder of weights; its config.json is changed")
    parser.add_argument("--cache", required=True, help="folder written by nope_ros.training.render_cache")
    parser.add_argument("--objects", type=int, default=240, help="held-out objects to use, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="fit, but write nothing")
    given = parser.parse_args(arguments)
    predictor = load_predictor(given.weights, device=given.device)
    config = DataConfig(cache=given.cache)
    kinds = {
        prior: gather_evidence(predictor, config, prior, objects=given.objects, seed=given.seed, progress=True)
        for prior in PRIORS
    }
    temperature = fit_temperature(list(kinds.values()))
    used = len(_chosen(RenderCache(config), given.objects, np.random.default_rng(given.seed)))
    notes: dict[str, object] = {"held_out_objects": used, "seed": given.seed}
    spread: dict[Prior, float] = {}
    for prior, evidence in kinds.items():
        squared, limit = evidence.squared(temperature), chi2.ppf(0.9, FREEDOM[prior])
        spread[prior] = round(fit_spread(squared, FREEDOM[prior]), 3)
        notes[prior] = {
            "pairs": len(evidence.truth),
            "nll": round(evidence.nll(temperature), 4),
            "own_temperature": round(fit_temperature([evidence]), 5),
            "coverage50": round(100 * evidence.coverage(temperature, 0.5), 1),
            "coverage90": round(100 * evidence.coverage(temperature, 0.9), 1),
            "ellipsoid90_without_spread": round(100 * float(np.mean(squared <= limit)), 1),
        }
    independent = predictor.errors.independent_deg
    if isinstance(predictor, RotatedLatentPredictor):
        independent, notes["tracked_ellipsoid90"] = fit_independence(
            predictor, config, temperature, spread["standing"], objects=given.objects, seed=given.seed, progress=True
        )
    errors = ErrorModel(spread=spread, independent_deg=round(independent, 1))
    before = {"temperature": predictor.temperature, "errors": predictor.errors.model_dump()}
    now = {"temperature": temperature, "errors": errors.model_dump()}
    print(json.dumps({"before": before, "now": now, **notes}, indent=1))
    if not given.dry_run:
        write_calibration(given.weights, temperature, errors, notes)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"calibrate: {error}")
