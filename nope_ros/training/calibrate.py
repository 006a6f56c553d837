"""Fits the temperature of the likelihood on held-out training objects.

    python -m nope_ros.training.calibrate WEIGHTS --cache CACHE

A temperature does not change which rotation is best, only how sure the distribution is. It is chosen so that the true
rotation is as likely as possible (in the mean of log) on objects that training did not see, over the same grids as at
run time, for each of the priors. Test data have no part in it.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from nope_ros.crop import Crop
from nope_ros.latent import CONFIG_FILE, NetworkPredictor, load_predictor, read_config
from nope_ros.match import Bank, predict_bank
from nope_ros.prior import PRIORS, Prior, elevation, hypotheses
from nope_ros.training.augment import AugmentationConfig, training_view
from nope_ros.training.pairs import DataConfig, RenderCache

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What many pairs say, before it is known how loudly.

    Attributes:
        log_likelihood: one (N,) for each pair, at temperature one; N differs between priors.
        log_prior: one (N,) for each pair, normalised.
        truth: index of the rotation nearest to the truth, for each pair.
    """

    log_likelihood: list[NDArray[np.float32]]
    log_prior: list[NDArray[np.float32]]
    truth: list[int]

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


def gather_evidence(
    predictor: NetworkPredictor,
    config: DataConfig,
    prior: Prior,
    *,
    objects: int = 240,
    queries: int = 5,
    augmentation: AugmentationConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Evidence:
    """Pairs of views of held-out objects, half of them meshes where there are enough.

    Args:
        predictor: with any temperature.
        config: names the cache and the split.
        prior: whether gravity is known, as the evaluation's protocols have it.
        objects: how many.
        queries: for each object, against one reference.
        augmentation: what happens to the views; training's by default.
        seed: of all of it.
        progress: show a bar.
    """
    cache = RenderCache(config)
    rng = np.random.default_rng((seed, PRIORS.index(prior)))
    chosen: list[int] = []
    for kind in (~cache.procedural, cache.procedural):
        # Half of each, the rest filled up from the other.
        available = np.flatnonzero(kind & cache.held_out)
        chosen += rng.permutation(available)[: objects // 2 if not chosen else objects - len(chosen)].tolist()
    evidence = Evidence([], [], [])
    for index in track(chosen, prior, disable=not progress, console=Console(stderr=True)):
        _add_object(evidence, predictor, cache, index, prior, queries, augmentation or AugmentationConfig(), rng)
    return evidence


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
        crops.append(Crop(image[..., :3], image[..., 3], np.eye(3), np.eye(3), 0.1, level))
        rotations.append(made.R_virtual_object)
    latents = predictor.encode(crops)
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


def _level(angle: float) -> Array:
    """Gravity (3,) in the virtual camera of a level crop that looks down by an angle."""
    return np.array([0.0, np.cos(angle), np.sin(angle)])


def fit_temperature(evidence: list[Evidence]) -> float:
    """The temperature of the smallest mean negative log-likelihood, each kind of pairs counting the same."""

    def cost(log_temperature: float) -> float:
        return float(np.mean([one.nll(float(np.exp(log_temperature))) for one in evidence]))

    found = minimize_scalar(cost, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def write_temperature(folder: Path, temperature: float, notes: dict[str, object]) -> None:
    """Put the temperature, and how it came about, into a folder's ``config.json``."""
    config = read_config(folder)
    changed = config.model_copy(
        update={"temperature": round(temperature, 5), "training": {**config.training, "calibration": notes}}
    )
    unfinished = folder / f".{CONFIG_FILE}.{os.getpid()}"
    unfinished.write_text(json.dumps(changed.model_dump(), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / CONFIG_FILE)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder of weights; its config.json is changed")
    parser.add_argument("--cache", required=True, help="folder written by nope_ros.training.render_cache")
    parser.add_argument("--objects", type=int, default=240, help="held-out objects to use (%(default)s)")
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
    notes: dict[str, object] = {"held_out_objects": given.objects, "seed": given.seed}
    for prior, evidence in kinds.items():
        notes[prior] = {
            "pairs": len(evidence.truth),
            "nll": round(evidence.nll(temperature), 4),
            "own_temperature": round(fit_temperature([evidence]), 5),
            "coverage50": round(100 * evidence.coverage(temperature, 0.5), 1),
            "coverage90": round(100 * evidence.coverage(temperature, 0.9), 1),
        }
    print(json.dumps({"before": predictor.temperature, "temperature": temperature, **notes}, indent=1))
    if not given.dry_run:
        write_temperature(given.weights, temperature, notes)


if __name__ == "__main__":
    main()
