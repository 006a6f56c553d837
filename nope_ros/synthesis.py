"""Analysis by synthesis: from the best templates uphill to the rotation that explains the image best.

The idea of Neural Object Fitting (Chen et al., ECCV 2020): keep the trained generator fixed, start from several poses,
synthesise, compare, follow the gradient to the pose, keep the best. What is synthesised here is the latent that the
predictor expects after a rotation, and what is compared is the likelihood of NOPE (Nguyen et al., CVPR 2024, Eq. 4).

A latent that turns need not be synthesised at all. Its likelihood ⟨e_q, S D(ΔR) e_r⟩ depends on the two latents through
969 numbers (``correlation``), and D(exp(ω) ΔR) = exp(Σ ω_i J_i) D(ΔR) gives gradient and curvature in closed form. Any
other predictor is differentiated through ``predict``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.distribution import Ambiguity, Mode
from nope_ros.harmonics import degree_slices, generators, wigner_d
from nope_ros.latent import Predictor, RotatedLatentPredictor
from nope_ros.models.rotated_latent import bandwidth_of, correlation
from nope_ros.pose import PoseEstimate, rotation_covariance
from nope_ros.prior import Prior
from nope_ros.refine import Query, Refined
from nope_ros.rotations import exp, geodesic_distance

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]

# A peak of the likelihood, radians: its usual width, where the curvature is unknown, and the widest that is believed.
_PEAK_WIDTH = np.radians(8.0)
_WIDEST_PEAK = np.radians(15.0)
# A climb that gains less than this, nats, is taken back: the templates' answer is a mean around a peak, and no worse
# than a top that is hardly higher. On held-out training objects, of upright answers that were right, this leaves 6 %
# worse by more than 2° and 10 % better by as much, where all climbs together made 23 % worse and 25 % better.
_WORTHWHILE = 0.2
# Most radians for one step of a climb.
_LONGEST_STEP = np.radians(10)
# Hypotheses that end this near to each other, radians, are one, and their probabilities add up.
_AGREEMENT = np.radians(10)


@dataclass(frozen=True)
class Climb:
    """The log-likelihood at K rotations R, and how it changes with ω in exp(ω) R.

    Attributes:
        value: (K,) nats, up to a constant.
        gradient: (K, 3) nats per radian.
        curvature: (K, 3, 3) second derivatives, nats per radian²; None where they are not known.
    """

    value: Array
    gradient: Array
    curvature: Array | None


class Objective(Protocol):
    """The log-likelihood of one query as a function of the rotation between two virtual cameras."""

    def __call__(self, rotations: Array) -> Climb:
        """At rotations (K, 3, 3)."""
        ...


def objective(predictor: Predictor, latent_query: Tensor, latent_reference: Tensor) -> Objective:
    """The log-likelihood of a query's latent (D,) given the reference's (D,), up to what depends on the query alone."""
    if isinstance(predictor, RotatedLatentPredictor):
        shape = predictor.latent_shape
        products = correlation(latent_query.reshape(1, *shape).float(), latent_reference.reshape(1, *shape).float())
        harmonics = products[0].double().cpu() / predictor.temperature
        # ‖F(e_r, R)‖² is the same for every R, and degree 0 is a constant; but views of one mesh differ by it.
        harmonics[0] -= float(latent_reference.double().square().sum()) / (2 * predictor.temperature)
        return HarmonicObjective(harmonics, predictor.network.config.bandwidth)
    return PredictedObjective(predictor, latent_query, latent_reference)


class HarmonicObjective:
    """See the module.

    Args:
        products: (Σ(2l+1)²,) ``correlation`` over temperature, or (K, Σ(2l+1)²), one for each of the K rotations it is
            asked for; float64, on the CPU: there is too little work for more.
        bandwidth: L.
    """

    def __init__(self, products: Tensor, bandwidth: int) -> None:
        self.bandwidth = bandwidth
        sizes = [2 * degree + 1 for degree in range(bandwidth + 1)]
        parts = products.split([size * size for size in sizes], dim=-1)
        self.blocks = [part.reshape(*part.shape[:-1], size, size) for part, size in zip(parts, sizes, strict=True)]

    def __call__(self, rotations: Array) -> Climb:
        """⟨C, exp(Σ ω_i J_i) D(R)⟩ to second order in ω."""
        D = wigner_d(torch.from_numpy(np.ascontiguousarray(rotations)), self.bandwidth)
        turned = [C @ block.mT for C, block in zip(self.blocks, D, strict=True)]  # ⟨C, J D⟩ = ⟨C Dᵀ, J⟩
        found = (torch.cat([block.flatten(1) for block in turned], dim=1) @ _second_order(self.bandwidth)).numpy()
        return Climb(found[:, 0], found[:, 1:4], found[:, 4:].reshape(-1, 3, 3))


@cache
def _second_order(bandwidth: int) -> Tensor:
    # Columns: 1, J_i, (J_i J_j + J_j J_i) / 2, each as its flattened blocks: (Σ(2l+1)², 1 + 3 + 9).
    J = generators(bandwidth)
    products = J[:, None] @ J[None]
    matrices = torch.cat(
        [torch.eye(J.shape[1])[None].to(J), J, ((products + products.transpose(0, 1)) / 2).flatten(0, 1)]
    )
    return torch.cat([matrices[:, s, s].flatten(1) for s in degree_slices(bandwidth)], dim=1).T.contiguous()


class PredictedObjective:
    """See the module.

    Args:
        predictor: any.
        latent_query: (D,).
        latent_reference: (D,).
    """

    def __init__(self, predictor: Predictor, latent_query: Tensor, latent_reference: Tensor) -> None:
        self.predictor = predictor
        # Encoders run in inference mode, whose tensors take part in no gradient; copies do.
        self.query, self.reference = latent_query.float().clone(), latent_reference.float().clone()

    def __call__(self, rotations: Array) -> Climb:
        """−‖F(e_r, R) − e_q‖² / 2T and its gradient."""
        R = torch.tensor(rotations, dtype=torch.float32, device=self.query.device)
        with torch.enable_grad():
            omega = torch.zeros(len(R), 3, device=R.device, requires_grad=True)
            x, y, z = omega.unbind(1)
            zero = torch.zeros_like(x)
            cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)
            # (I + [ω]ₓ) R has the derivative of exp(ω) R at zero, and nothing else is asked of it.
            predicted = self.predictor.predict(self.reference, R + cross @ R)
            value = -(predicted - self.query).square().sum(1) / (2 * self.predictor.temperature)
            (gradient,) = torch.autograd.grad(value.sum(), omega)
        return Climb(value.detach().double().cpu().numpy(), gradient.double().cpu().numpy(), None)


@dataclass(frozen=True)
class Freedom:
    """How a rotation between two virtual cameras may turn without leaving what its prior allows.

    Attributes:
        prior: see ``nope_ros.prior``.
        down_reference: (3,) gravity in the reference's virtual camera; not needed for "free".
        down_query: (3,) gravity in the query's; needed for "standing".
    """

    prior: Prior
    down_reference: Array | None = None
    down_query: Array | None = None

    def axes(self, rotations: Array) -> Array:
        """(K, 3, d) columns that rotations (K, 3, 3) may turn about, on their left: d is 3, 2 ("upright") or 1."""
        count = len(rotations)
        if self.prior == "standing":
            assert self.down_query is not None
            return np.tile(self.down_query[:, None], (count, 1, 1))
        if self.prior == "upright":
            # Up stays vertical in the image if the view turns about it, or about the image's horizontal axis.
            return np.stack([np.tile([1.0, 0.0, 0.0], (count, 1)), self._up(rotations)], axis=-1)
        return np.tile(np.eye(3), (count, 1, 1))

    def turned(self, rotations: Array, steps: Array) -> Array:
        """Rotations (K, 3, 3) turned by steps (K, d), radians, about their axes."""
        axes = self.axes(rotations)
        if self.prior != "upright":
            result: Array = exp(np.einsum("kid,kd->ki", axes, steps)) @ rotations
            return result
        # One after the other: each turn alone keeps up vertical, their sum does not.
        about_up = exp(axes[:, :, 1] * steps[:, 1:]) @ rotations
        turned: Array = exp(axes[:, :, 0] * steps[:, :1]) @ about_up
        # The other side of the horizon is excluded.
        same = self._up(turned)[:, 2] * np.sign(self._up(rotations)[:, 2]) >= 0
        return np.where(same[:, None, None], turned, rotations)

    def _up(self, rotations: Array) -> Array:
        assert self.down_reference is not None
        up: Array = -rotations @ self.down_reference
        return up


def climb(objective: Objective, starts: Array, freedom: Freedom, *, steps: int = 12) -> tuple[Array, Climb]:
    """From starts (K, 3, 3) uphill, all at once; never below where they started.

    Newton's steps where the curvature is known, plain gradients with an adapted length where not; a step that leads
    down is taken back and shortened. Ends when all steps are below a tenth of a degree.

    Args:
        objective: what to climb.
        starts: rotations between the virtual cameras.
        freedom: which turns are allowed.
        steps: most evaluations after the first.

    Returns:
        Rotations (K, 3, 3), and the objective there.
    """
    best = starts
    at = objective(best)
    shorten = np.ones(len(starts))
    for _ in range(steps):
        axes = freedom.axes(best)
        gradient = np.einsum("kid,ki->kd", axes, at.gradient)
        step = gradient * _PEAK_WIDTH**2
        if at.curvature is not None:
            values, vectors = np.linalg.eigh(np.einsum("kid,kij,kje->kde", axes, at.curvature, axes))
            # Uphill on saddles and valleys too: |curvature|, and never flatter than a wide peak.
            scaled = np.einsum("kde,kd->ke", vectors, gradient) / np.maximum(np.abs(values), 1 / _WIDEST_PEAK**2)
            step = np.einsum("kde,ke->kd", vectors, scaled)
        step = step / shorten[:, None]
        length = np.linalg.norm(step, axis=1)
        if (length < np.radians(0.1)).all():
            break
        step *= np.minimum(1, _LONGEST_STEP / np.maximum(length, 1e-12))[:, None]
        tried = freedom.turned(best, step)
        there = objective(tried)
        better = there.value > at.value
        best = np.where(better[:, None, None], tried, best)
        at = Climb(
            np.where(better, there.value, at.value),
            np.where(better[:, None], there.gradient, at.gradient),
            None
            if there.curvature is None or at.curvature is None
            else np.where(better[:, None, None], there.curvature, at.curvature),
        )
        least = 1.0 if at.curvature is not None else 1e-3  # Newton's own length is right; a gradient's may be short
        shorten = np.where(better, np.maximum(shorten / 2, least), shorten * 4)
    return best, at


class SynthesisRefiner:
    """Climbs from every mode of the distribution at once, keeps climbs that gain enough, and lets them vote."""

    def refine(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> Refined | None:
        """See ``Refiner``.

        An uninformative distribution is left alone: any peak of it is noise. So is a tracked pose: this frame's peak
        is worse than the mean of what many frames said.
        """
        if estimate.ambiguity == Ambiguity.UNINFORMATIVE or estimate.tracked:
            return None
        # Egocentric to allocentric, as latents are, and back at the end.
        left, right = query.crop.R_virtual_camera, registered.R_virtual_camera.T
        rotations = left @ (estimate.mode_rotations @ right)
        masses = np.array([mode.probability for mode in estimate.modes])
        values = np.empty(len(rotations))
        for members, likelihood, R_view_reference in likelihoods(query, registered, estimate.prior, rotations):
            down = registered.gravity_virtual
            freedom = Freedom(estimate.prior, None if down is None else R_view_reference @ down, query.gravity_virtual)
            starts = rotations[members] @ R_view_reference.T
            begun = likelihood(starts).value
            climbed, at = climb(likelihood, starts, freedom)
            worthwhile = at.value - begun >= _WORTHWHILE
            rotations[members] = np.where(worthwhile[:, None, None], climbed, starts) @ R_view_reference
            values[members] = np.where(worthwhile, at.value, begun)
        masses, kept = vote(rotations, masses, values, _AGREEMENT)
        found = registered.egocentric(rotations[kept], query)
        modes = tuple(Mode(R, float(mass)) for R, mass in zip(found, masses, strict=True))
        return Refined("synthesis", modes, rotation_covariance(estimate.distribution, found[0]))

    def proposals(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> list[Refined]:
        """See ``Refiner``."""
        refined = self.refine(query, registered, estimate)
        return [] if refined is None else [refined]


def likelihoods(
    query: Query, registered: RegisteredObject, prior: Prior, rotations: Array
) -> list[tuple[NDArray[np.intp], Objective, Array]]:
    """What is climbed from rotations (K, 3, 3): indices, objective, rotation (3, 3) from the reference to its view."""
    everything = np.arange(len(rotations))
    predictor = registered.predictor
    told = registered.harmonics_near(query, prior, rotations)
    if told is not None:  # exactly what the templates were samples of
        return [(everything, HarmonicObjective(told.double().cpu(), bandwidth_of(told.shape[-1])), np.eye(3))]
    if registered.rendered is None:
        return [(everything, objective(predictor, query.latent, registered.latent), np.eye(3))]
    # Of renders each answers for what is seen from near it.
    nearest = registered.rendered.nearest(rotations @ registered.R_virtual_object)
    return [
        (
            np.flatnonzero(nearest == view),
            objective(predictor, query.latent, registered.rendered.latents[view]),
            registered.rendered.R[view] @ registered.R_virtual_object.T,
        )
        for view in np.unique(nearest)
    ]


def vote(rotations: Array, masses: Array, values: Array, agreement: float) -> tuple[Array, NDArray[np.intp]]:
    """Make one of hypotheses that agree.

    Args:
        rotations: (K, 3, 3).
        masses: (K,) probability of each.
        values: (K,) of the objective.
        agreement: radians.

    Returns:
        Probabilities and indices (M,) of those that stand for the others, most probable first.
    """
    together = geodesic_distance(rotations[:, None], rotations[None]) <= agreement
    left = np.ones(len(rotations), bool)
    found: list[tuple[float, int]] = []
    for index in np.argsort(-values, kind="stable"):
        if left[index]:
            members = together[index] & left
            found.append((float(masses[members].sum()), int(index)))
            left &= ~members
    found.sort(key=lambda pair: -pair[0])
    return np.array([mass for mass, _ in found]), np.array([index for _, index in found])
