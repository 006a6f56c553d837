"""The loss of the rotated latent: how likely the true rotation is among many, estimated on all of SO(3).

Turning one latent of each pair by the truth first makes the truth the identity for every pair, so that one set of
candidate rotations, and one matrix product, serves the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from nope_ros.harmonics import wigner_d
from nope_ros.models.rotated_latent import correlation, flatten_d, turned
from nope_ros.rotations import rotation_grid


@dataclass(frozen=True)
class Candidates:
    """Rotations to compare with the identity.

    Attributes:
        D: (N, Σ(2l+1)²) their flattened harmonic matrices.
        log_weight: (N,) log of the volume of SO(3) each one stands for.
        target: (N,) what an ideal distribution around the truth gives each.
    """

    D: Tensor
    log_weight: Tensor
    target: Tensor


def candidates(bandwidth: int, sigma_deg: float, seed: int, grid_level: int = 2) -> Candidates:
    """A randomly turned grid over all rotations, and denser samples near the identity, where the hard ones are.

    The samples are weighted by one over their joint density, so that weighted sums are integrals over SO(3) whatever
    the mixture.

    Args:
        bandwidth: L of the latents.
        sigma_deg: standard deviation per axis of the target distribution.
        seed: of the turn and the samples.
        grid_level: of ``rotation_grid``.
    """
    rng = np.random.default_rng(seed)
    grid = rotation_grid(grid_level) @ Rotation.random(rng=rng).as_matrix()
    spreads = {6.0: 192, 15.0: 384, 35.0: 384}  # degrees per axis: number of samples
    local = [np.radians(spread) * rng.normal(size=(count, 3)) for spread, count in spreads.items()]
    rotations = np.concatenate([grid, Rotation.from_rotvec(np.concatenate(local)).as_matrix()])
    angle = Rotation.from_matrix(rotations).magnitude()
    # Density of the uniform distribution in rotation vectors of this length, as the Gaussians' densities are.
    uniform = (1 - np.cos(angle)) / (4 * np.pi**2 * np.maximum(angle, 1e-6) ** 2)
    density = float(len(grid)) * np.ones(len(rotations))
    for spread, count in spreads.items():
        gaussian = np.exp(-0.5 * (angle / np.radians(spread)) ** 2) / (np.sqrt(2 * np.pi) * np.radians(spread)) ** 3
        density += count * gaussian / uniform
    weight = 1 / density
    target = weight * np.exp(-0.5 * (angle / np.radians(sigma_deg)) ** 2)
    D = flatten_d(wigner_d(torch.from_numpy(rotations), bandwidth))
    return Candidates(
        D.float(), torch.from_numpy(np.log(weight)).float(), torch.from_numpy(target / target.sum()).float()
    )


def pose_loss(
    latents_query: Tensor, latents_reference: Tensor, delta_R: Tensor, scale: Tensor, samples: Candidates
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the true rotation, in nats relative to the uniform distribution.

    Args:
        latents_query: (P, (L+1)², C).
        latents_reference: (P, (L+1)², C).
        delta_R: (P, 3, 3) true rotation from reference to query.
        scale: scalar, one over the temperature.
        samples: rotations to compare with.

    Returns:
        Loss (P,): zero means "as good as knowing nothing", negative is better. And the logits (P, N), without weights.
    """
    correlated = correlation(latents_query, turned(latents_reference, delta_R))
    logits = scale * (correlated @ samples.D.T)
    log_normaliser = torch.logsumexp(logits + samples.log_weight, dim=1)
    return log_normaliser - logits @ samples.target, logits
