"""The loss of the rotated latent: how likely the true rotation is among those that could have been drawn.

What a network is to learn is the likelihood of a rotation, not how often rotations were drawn in training: the prior is
the estimator's, and another one at every use. So the truth competes with rotations of the training's own prior, which
then cancels (van den Oord et al. 2018). Were it compared with the uniform distribution instead, the network would
learn that similar views are frequent in training, and find turned objects unmoved.

Two families of pairs have two priors. Where roll was removed by gravity, the query's view is one of the other upright
views. Where it was not, any rotation may be true, in the measure of pairs that were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from nope_ros.harmonics import wigner_d
from nope_ros.models.rotated_latent import as_template, correlation, flatten_d, turned
from nope_ros.rotations import exp, rotation_grid

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairPrior:
    """How much more often views at an angle were drawn together than if they were drawn independently.

    Attributes:
        log_ratio: (B,) for cosines of the angle between viewing directions in B bins of −1..1.
    """

    log_ratio: Tensor

    @classmethod
    def of(cls, together: Array, apart: Array, bins: int = 20) -> PairPrior:
        """From cosines of views of one object as they are drawn, and of independent ones."""
        edges = np.linspace(-1, 1, bins + 1)
        share = [np.histogram(np.clip(c, -1, 1), edges)[0] / len(c) for c in (together, apart)]
        return cls(torch.from_numpy(np.log((share[0] + 1e-4) / (share[1] + 1e-4))).float())

    def __call__(self, cosine: Tensor) -> Tensor:
        """Log ratio of cosines of any shape."""
        bins = len(self.log_ratio)
        return self.log_ratio[((cosine + 1) * (bins / 2)).long().clamp_(0, bins - 1)]


@dataclass(frozen=True)
class Candidates:
    """Rotations to compare the truth with.

    Attributes:
        D: (N, Σ(2l+1)²) flattened harmonic matrices of rotations left-multiplied to the truth.
        axis: (N, 3) third rows of those rotations.
        log_weight: (N,) log of the volume of SO(3) each one stands for.
        target: (N,) what an ideal distribution around the truth gives each.
        views: (M, 3, 3) orientations R_virtual_object of upright views that might have been drawn.
        D_views: (M, Σ(2l+1)²) their flattened harmonic matrices.
        prior: of rolled pairs against the uniform distribution.
        prior_upright: of upright pairs against independent upright views.
    """

    D: Tensor
    axis: Tensor
    log_weight: Tensor
    target: Tensor
    views: Tensor
    D_views: Tensor
    prior: PairPrior
    prior_upright: PairPrior

    def to(self, device: torch.device) -> Candidates:
        """The same on another device."""
        tensors = (getattr(self, name).to(device) for name in ("D", "axis", "log_weight", "target", "views", "D_views"))
        priors = (PairPrior(prior.log_ratio.to(device)) for prior in (self.prior, self.prior_upright))
        return Candidates(*tensors, *priors)


def candidates(
    bandwidth: int,
    sigma_deg: float,
    seed: int,
    upright_views: Array,
    prior: PairPrior,
    prior_upright: PairPrior,
    grid_level: int = 2,
) -> Candidates:
    """A randomly turned grid over all rotations with denser samples near the truth, where the hard ones are; and views.

    The samples are weighted by one over their joint density, so that weighted sums are integrals over SO(3) whatever
    the mixture.

    Args:
        bandwidth: L of the latents.
        sigma_deg: standard deviation per axis of the target distribution.
        seed: of the turn and the samples.
        upright_views: (M, 3, 3) orientations of upright views, z of the object up; each gets a new yaw.
        prior: see ``Candidates``.
        prior_upright: see ``Candidates``.
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
    yaw = np.zeros((len(upright_views), 3))
    yaw[:, 2] = rng.uniform(-np.pi, np.pi, len(upright_views))
    views = upright_views @ exp(yaw)
    return Candidates(
        D=flatten_d(wigner_d(torch.from_numpy(rotations), bandwidth)).float(),
        axis=torch.from_numpy(rotations[:, 2]).float(),
        log_weight=torch.from_numpy(np.log(weight)).float(),
        target=torch.from_numpy(target / target.sum()).float(),
        views=torch.from_numpy(views).float(),
        D_views=flatten_d(wigner_d(torch.from_numpy(views), bandwidth)).float(),
        prior=prior,
        prior_upright=prior_upright,
    )


def pose_loss(
    latents_query: Tensor, latents_reference: Tensor, delta_R: Tensor, scale: Tensor, samples: Candidates
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the true rotation of rolled pairs, in nats relative to knowing the prior alone.

    Turning one latent of each pair by the truth first makes the truth the identity for every pair, so that one set of
    candidate rotations, and one matrix product, serves the whole batch.

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
    # The viewing direction of the turned query in the reference's camera: third row of the turn times ΔR.
    log_prior = samples.prior(delta_R[:, :, 2] @ samples.axis.T)
    log_weight = samples.log_weight + log_prior
    log_weight = log_weight - torch.logsumexp(log_weight, dim=1, keepdim=True)
    log_normaliser = torch.logsumexp(logits + log_weight, dim=1)
    return log_normaliser - logits @ samples.target, logits


def upright_loss(
    latents_query: Tensor,
    latents_reference: Tensor,
    R_query: Tensor,
    R_reference: Tensor,
    scale: Tensor,
    samples: Candidates,
    jitter_deg: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """The same for pairs whose roll gravity removed, against other upright views of any elevation and azimuth.

    Turning the reference into the object's frame makes the candidates the same for every pair.

    Args:
        latents_query: (P, (L+1)², C).
        latents_reference: (P, (L+1)², C).
        R_query: (P, 3, 3) R_virtual_object.
        R_reference: (P, 3, 3) R_virtual_object.
        scale: scalar, one over the temperature.
        samples: views to compare with.
        jitter_deg: standard deviation per axis by which the truth is blurred.

    Returns:
        Loss (P,) and logits (P, M).
    """
    in_object = turned(latents_reference, R_reference.mT)
    logits = scale * (correlation(latents_query, in_object) @ samples.D_views.T)
    blur = exp(np.radians(jitter_deg) * torch.randn(len(R_query), 3).numpy())
    R_near = torch.from_numpy(blur).to(R_query) @ R_query
    true = scale * (turned(latents_query, R_near.mT) * as_template(in_object)).sum((1, 2))
    log_weight = samples.prior_upright(R_reference[:, 2] @ samples.views[:, 2].T)
    own = samples.prior_upright((R_reference[:, 2] * R_query[:, 2]).sum(1))
    every = torch.cat([logits + log_weight, (true + own)[:, None]], dim=1)
    total = torch.logsumexp(torch.cat([log_weight, own[:, None]], dim=1), dim=1)
    return torch.logsumexp(every, dim=1) - total - true, logits
