"""The fourth stop: how well each predicted template explains the query, by one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.harmonics import rotate, wigner_d
from nope_ros.latent import Predictor, RotatedLatentPredictor
from nope_ros.models.rotated_latent import by_roll, correlation, flatten_d
from nope_ros.prior import free_rolls, free_rotations

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """What one query says about one object.

    Attributes:
        log_likelihood: (N,) of each of the bank's rotations, up to a constant.
        similarity: whether it is this object at all, at most 1; see ``Bank.similarity``.
    """

    log_likelihood: Array
    similarity: float


class Bank(Protocol):
    """One object at many rotations.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
    """

    @property
    def rotations(self) -> Array:
        """(N, 3, 3), from the reference's virtual camera to the query's."""
        ...

    def match(self, latent: Tensor, temperature: float) -> Match:
        """Compare a query latent (D,) with the object at every rotation."""
        ...

    def similarity(self, latent: Tensor) -> float:
        """Whether a query latent (D,) is of this object at all: the cosine of what does not depend on the view.

        That is degree 0 of a latent that turns, which is trained to tell objects apart; of any other, the latent of
        the nearest template.
        """
        ...


def predict_bank(
    predictor: Predictor,
    latent: Tensor,
    rotations: Array,
    batch_size: int = 1024,
    views: Array | None = None,
    normalised: float = 1.0,
) -> Bank:
    """What an object is predicted to look like at rotations (N, 3, 3), in the form that matches fastest.

    Args:
        predictor: of the latents.
        latent: (D,) of the reference; or (K, D) of several views of the object, the reference first.
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        batch_size: templates predicted at a time.
        views: (K, 3, 3), from the reference's virtual camera to each view's; of several views only.
        normalised: of several views only; see ``ViewsBank``.
    """
    if views is not None:
        if isinstance(predictor, RotatedLatentPredictor):
            return ViewsBank.of(predictor, latent, rotations, views, normalised)
        return TemplateBank.predict_nearest(predictor, latent, rotations, views, batch_size)
    if isinstance(predictor, RotatedLatentPredictor):
        return HarmonicBank.of(predictor, latent, rotations)
    return TemplateBank.predict(predictor, latent, rotations, batch_size)


_CONCENTRATION = 30.0
"""Of the weights over viewing directions: a view 22° away counts an eighth of one that looked from just there."""


def view_weights(rotations: Array, views: Array) -> Array:
    """How much each view knows of what rotations show: (N, K), each row summing to one.

    Args:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        views: (K, 3, 3), from the reference's virtual camera to each view's.
    """
    # The last rows are the cameras' optical axes in the reference's axes; turning about them shows nothing new.
    cosine = rotations[:, 2] @ views[:, 2].T
    weights = np.exp(_CONCENTRATION * (cosine - cosine.max(axis=1, keepdims=True)))
    normalised: Array = weights / weights.sum(axis=1, keepdims=True)
    return normalised


@dataclass(frozen=True)
class TemplateBank:
    """The latents of one object predicted at many rotations, each of them stored.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        templates: (N, D) in half precision on the predictor's device.
        squared_norms: (N,) float32.
        identities: (K, C) degree 0 of the object's views, of a latent that turns; else None.
    """

    rotations: Array
    templates: Tensor
    squared_norms: Tensor
    identities: Tensor | None = None

    @classmethod
    def predict(cls, predictor: Predictor, latent: Tensor, rotations: Array, batch_size: int = 1024) -> TemplateBank:
        """Predict the templates of a reference latent (D,) at rotations (N, 3, 3)."""
        only = np.zeros(len(rotations), dtype=np.intp)
        return cls.of_views(predictor, latent[None], rotations, only, rotations, batch_size)

    @classmethod
    def predict_nearest(
        cls, predictor: Predictor, latents: Tensor, rotations: Array, views: Array, batch_size: int = 1024
    ) -> TemplateBank:
        """Templates of an object with several views, each predicted from the view that looked from nearest by.

        Not from all of them: a template costs a pass through the network. Arguments as of ``predict_bank``.
        """
        nearest = view_weights(rotations, views).argmax(axis=1)
        turns = rotations @ np.swapaxes(views[nearest], 1, 2)
        return cls.of_views(predictor, latents, rotations, nearest, turns, batch_size)

    @classmethod
    def of_views(
        cls,
        predictor: Predictor,
        latents: Tensor,
        rotations: Array,
        nearest: NDArray[np.intp],
        turns: Array,
        batch_size: int = 1024,
    ) -> TemplateBank:
        """Each template predicted from one of several views; memory is bounded by ``batch_size`` beside the result.

        Args:
            predictor: of the latents.
            latents: (K, D) of the views.
            rotations: (N, 3, 3), from the reference's virtual camera to the query's.
            nearest: (N,) index of the view for each of them.
            turns: (N, 3, 3) from that view's virtual camera to the query's.
            batch_size: templates predicted at a time.
        """
        half = torch.float16 if latents.device.type == "cuda" else torch.bfloat16
        templates = torch.empty(len(rotations), latents.shape[1], dtype=half, device=latents.device)
        for start in range(0, len(rotations), batch_size):
            part = slice(start, start + batch_size)
            R = torch.tensor(turns[part], dtype=torch.float32, device=latents.device)
            own = latents[0] if len(latents) == 1 else latents[torch.from_numpy(nearest[part]).to(latents.device)]
            templates[part] = predictor.predict(own, R).to(half)
        # Norms of what is stored, not of what was rounded, so that a template's distance to itself is zero.
        squared_norms = torch.cat([part.float().square().sum(1) for part in templates.split(batch_size)])
        return cls(rotations, templates, squared_norms)

    def match(self, latent: Tensor, temperature: float) -> Match:
        """Compare a query latent (D,) with every template.

        log p(ΔR) = −‖F(e_r, ΔR) − e_q‖² / 2T + const (NOPE, Eq. 4, whose minus sign the paper drops).
        """
        products = self._products(latent)
        log_likelihood = (products - 0.5 * self.squared_norms) / temperature
        known = self.identities is not None
        similarity = self.similarity(latent) if known else self._nearest(latent, products)
        return Match(log_likelihood.double().cpu().numpy(), similarity)

    def similarity(self, latent: Tensor) -> float:
        """See ``Bank.similarity``."""
        if self.identities is not None:
            return _likeness(latent[: self.identities.shape[1]], self.identities)
        return self._nearest(latent, self._products(latent))

    def _products(self, latent: Tensor) -> Tensor:
        return torch.mv(self.templates, latent.to(self.templates.dtype)).float()

    def _nearest(self, latent: Tensor, products: Tensor) -> float:
        norms = (self.squared_norms * latent.float().square().sum()).sqrt().clamp(min=1e-12)
        return float((products / norms).max())


@dataclass(frozen=True)
class Turns:
    """Rotations in the form in which functions of rotations are evaluated at them.

    Such a function is coefficients of the flattened D(R), its value their scalar product with a row for each rotation.
    But D(R R_z(ψ)) is a Fourier series in ψ with 2L+1 terms. Of a grid that has the same rolls ψ about every viewing
    direction, a row for each direction is enough: for 4608 rotations 192 rows, which are read from a cache in place of
    memory. Nothing is rounded or interpolated by that.

    Attributes:
        rows: (V, Σ(2l+1)²) flattened D of rotations, or of directions.
        rolls: (2L+1, P) of directions: cos nψ of n = 0..L, then sin nψ of n = 1..L; else None, and P is 1.
    """

    rows: Tensor
    rolls: Tensor | None = None

    @classmethod
    def of(cls, rotations: Array, bandwidth: int, device: torch.device, rolls: Array | None = None) -> Turns:
        """Of rotations (V, 3, 3), or of each of them after each of ``rolls`` (P,), radians: R R_z(ψ)."""
        R = torch.tensor(rotations, dtype=torch.float32, device=device)
        rows = flatten_d(wigner_d(R, bandwidth))
        if rolls is None:
            return cls(rows)
        phase = np.arange(bandwidth + 1)[:, None] * rolls
        series = np.concatenate([np.cos(phase), np.sin(phase[1:])])
        return cls(rows, torch.tensor(series, dtype=torch.float32, device=device))

    def values(self, harmonics: Tensor) -> Tensor:
        """Values (V·P, K) of functions (K, Σ(2l+1)²) at the rotations, the rolls of one direction side by side."""
        if self.rolls is None:
            return self.rows @ harmonics.T
        terms = by_roll(harmonics)  # (K, Σ, 2L+1)
        directions = self.rows @ terms.transpose(0, 1).flatten(1)  # (V, K·(2L+1))
        values = directions.unflatten(1, terms.shape[::2]) @ self.rolls  # (V, K, P)
        return values.transpose(1, 2).flatten(0, 1)

    @property
    def operations(self) -> int:
        """Multiplications and additions to evaluate one function."""
        series, rolls = (1, 0) if self.rolls is None else self.rolls.shape
        return 2 * series * (self.rows.numel() + len(self.rows) * rolls)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held in memory."""
        return (self.rows,) if self.rolls is None else (self.rows, self.rolls)

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return sum(one.nbytes for one in self.tensors)


@dataclass(frozen=True)
class HarmonicBank:
    """The same for a latent that turns: no template is stored.

    ⟨e_q, S D(R) e_r⟩ (``nope_ros.models.rotated_latent``) is the scalar product of D(R) with the products of the two
    latents, degree by degree. What depends on rotations alone is computed once for all objects and kept, what depends
    on the object is its latent, and matching is still a matrix product, with a row of 969 numbers for each rotation in
    place of a template of thousands.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        latent: ((L+1)², C) of the reference.
        turns: of the rotations.
    """

    rotations: Array
    latent: Tensor
    turns: Turns

    @classmethod
    def of(cls, predictor: RotatedLatentPredictor, latent: Tensor, rotations: Array) -> HarmonicBank:
        """For a reference latent (D,)."""
        latent = latent.float().reshape(predictor.latent_shape)
        bandwidth = predictor.network.config.bandwidth
        if rotations is free_rotations():
            return cls(rotations, latent, free_turns(bandwidth, latent.device))
        return cls(rotations, latent, Turns.of(rotations, bandwidth, latent.device))

    def match(self, latent: Tensor, temperature: float) -> Match:
        """As ``TemplateBank.match``; turning keeps norms, so the distance differs from the product by a constant."""
        return Match(self.log_likelihood(self.harmonics(latent, temperature)), self.similarity(latent))

    def harmonics(self, latent: Tensor, temperature: float) -> Tensor:
        """What a query latent (D,) says of every rotation, as coefficients (Σ(2l+1)²,) of the flattened D."""
        query = latent.float().reshape(self.latent.shape)
        return correlation(query[None], self.latent[None])[0] / temperature

    def harmonics_near(self, latent: Tensor, temperature: float, rotations: Array) -> Tensor:
        """As of ``ViewsBank``: the same near all of them."""
        return self.harmonics(latent, temperature).expand(len(rotations), -1)

    def log_likelihood(self, harmonics: Tensor) -> Array:
        """Of the bank's rotations (N,), up to a constant, from such coefficients."""
        products: Array = self.turns.values(harmonics[None])[:, 0].double().cpu().numpy()
        return products

    def similarity(self, latent: Tensor) -> float:
        """See ``Bank.similarity``."""
        return _likeness(latent[: self.latent.shape[1]], self.latent[:1])


def _likeness(identity: Tensor, identities: Tensor) -> float:
    """The largest cosine of degree 0 of a latent (C,) with those of several (K, C)."""
    return float(torch.nn.functional.cosine_similarity(identity.float()[None], identities.float()).max())


@dataclass(frozen=True)
class ViewsBank:
    """As ``HarmonicBank``, of an object that several views are known of.

    Each view says, by its own likelihood, what it makes of every rotation. Their mean over all views, which is the
    likelihood under the mean of the latents turned into one frame, knows what all of them agree on; the mean over those
    that looked from near where the hypothesis looks from knows the details. Their logarithms are added: on objects held
    out from training either alone was worse, and so were weights on the sphere's places in place of hypotheses.

    The views near one hypothesis are others than those near the next. Normalised, each view distributes the same
    probability, so that one that never saw this side of a box votes as firmly for half a turn as the one that did votes
    for the truth. As it is, the product of the latents says who knows: it is larger the more both have seen. But then
    hypotheses that no view looked from near are never believed. Which is worse depends on how densely the object was
    walked round, so left-out keyframes decide (``nope_ros.video.left_out``).

    Attributes:
        rotations: (N, 3, 3), from the first view's virtual camera to the query's.
        latents: (K, (L+1)², C), turned into the first view's virtual camera.
        turns: of the rotations.
        near: (N, K) see ``view_weights``.
        views: (K, 3, 3), from the first view's virtual camera to each one's.
        normalised: 0..1, how much of each view's normalisation is taken off before the nearest are compared.
    """

    rotations: Array
    latents: Tensor
    turns: Turns
    near: Tensor
    views: Array
    normalised: float = 1.0

    @classmethod
    def of(
        cls,
        predictor: RotatedLatentPredictor,
        latents: Tensor,
        rotations: Array,
        views: Array,
        normalised: float = 1.0,
    ) -> ViewsBank:
        """For latents (K, D) of views (K, 3, 3), from the first one's virtual camera to each."""
        turned = common_latents(predictor, latents, views)
        first = HarmonicBank.of(predictor, latents[0], rotations)
        near = torch.tensor(view_weights(rotations, views), dtype=torch.float32, device=turned.device)
        return cls(rotations, turned, first.turns, near, views, normalised)

    def match(self, latent: Tensor, temperature: float) -> Match:
        """As ``TemplateBank.match``."""
        log_likelihood = self.fused(self.products(latent, temperature), self.normalised)
        return Match(log_likelihood.double().cpu().numpy(), self.similarity(latent))

    def products(self, latent: Tensor, temperature: float) -> Tensor:
        """What each view makes of each rotation: (N, K)."""
        return self.turns.values(self._correlations(latent)) / temperature

    def _correlations(self, latent: Tensor) -> Tensor:
        query = latent.float().reshape(1, *self.latents.shape[1:])
        return correlation(query.expand(len(self.latents), -1, -1), self.latents)

    def harmonics_near(self, latent: Tensor, temperature: float, rotations: Array) -> Tensor:
        """What ``match`` says of rotations near each of (M, 3, 3), as coefficients (M, Σ(2l+1)²) of the flattened D.

        Up to a constant of each, and with the views' weights as they are there.
        """
        weights = view_weights(rotations, self.views) + 1 / len(self.views)
        each = self._correlations(latent) / temperature
        return torch.tensor(weights, dtype=each.dtype, device=each.device) @ each

    def fused(self, products: Tensor, normalised: float) -> Tensor:
        """What they make of it together: (N,)."""
        total = torch.logsumexp(products, dim=0)
        return (self.near * (products - normalised * total)).sum(dim=1) + (products - total).mean(dim=1)

    def similarity(self, latent: Tensor) -> float:
        """See ``Bank.similarity``."""
        return _likeness(latent[: self.latents.shape[2]], self.latents[:, 0])


def common_latents(predictor: RotatedLatentPredictor, latents: Tensor, views: Array) -> Tensor:
    """Latents (K, D) of views, turned into one frame: (K, (L+1)², C); ``views`` (K, 3, 3) map that frame to theirs."""
    back = torch.tensor(np.swapaxes(views, -1, -2).copy(), dtype=torch.float32, device=latents.device)
    shaped = latents.float().reshape(-1, *predictor.latent_shape)
    return rotate(shaped, wigner_d(back, predictor.network.config.bandwidth))


@lru_cache(maxsize=4)
def free_turns(bandwidth: int, device: torch.device) -> Turns:
    """Of the free grid: the same for every object, and kept."""
    unrolled, rolls = free_rolls()
    return Turns.of(unrolled, bandwidth, device, rolls)
