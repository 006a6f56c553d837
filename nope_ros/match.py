"""The fourth stop: how well each predicted template explains the query, by one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.harmonics import wigner_d
from nope_ros.latent import Predictor, RotatedLatentPredictor
from nope_ros.models.rotated_latent import correlation, flatten_d
from nope_ros.prior import free_rotations

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Match:
    """What one query says about one object.

    Attributes:
        log_likelihood: (N,) of each of the bank's rotations, up to a constant.
        similarity: (N,) cosine of query latent and template.
    """

    log_likelihood: Array
    similarity: Array


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


def predict_bank(predictor: Predictor, latent: Tensor, rotations: Array, batch_size: int = 1024) -> Bank:
    """What a reference latent (D,) is predicted to be at rotations (N, 3, 3), in the form that matches fastest."""
    if isinstance(predictor, RotatedLatentPredictor):
        return HarmonicBank.of(predictor, latent, rotations)
    return TemplateBank.predict(predictor, latent, rotations, batch_size)


@dataclass(frozen=True)
class TemplateBank:
    """The latents of one object predicted at many rotations, each of them stored.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        templates: (N, D) in half precision on the predictor's device.
        squared_norms: (N,) float32.
    """

    rotations: Array
    templates: Tensor
    squared_norms: Tensor

    @classmethod
    def predict(cls, predictor: Predictor, latent: Tensor, rotations: Array, batch_size: int = 1024) -> TemplateBank:
        """Predict the templates of a reference latent (D,) at rotations (N, 3, 3).

        Memory beyond the result is bounded by ``batch_size`` templates.
        """
        half = torch.float16 if latent.device.type == "cuda" else torch.bfloat16
        templates = torch.empty(len(rotations), latent.numel(), dtype=half, device=latent.device)
        for start in range(0, len(rotations), batch_size):
            part = torch.tensor(rotations[start : start + batch_size], dtype=torch.float32, device=latent.device)
            templates[start : start + batch_size] = predictor.predict(latent, part)
        # Norms of what is stored, not of what was rounded, so that a template's distance to itself is zero.
        squared_norms = torch.cat([part.float().square().sum(1) for part in templates.split(batch_size)])
        return cls(rotations, templates, squared_norms)

    def match(self, latent: Tensor, temperature: float) -> Match:
        """Compare a query latent (D,) with every template.

        log p(ΔR) = −‖F(e_r, ΔR) − e_q‖² / 2T + const (NOPE, Eq. 4, whose minus sign the paper drops).
        """
        products = torch.mv(self.templates, latent.to(self.templates.dtype)).float()
        squared_norm = latent.float().square().sum()
        log_likelihood = (products - 0.5 * self.squared_norms) / temperature
        similarity = products / (self.squared_norms * squared_norm).sqrt().clamp(min=1e-12)
        return Match(log_likelihood.double().cpu().numpy(), similarity.double().cpu().numpy())

    @property
    def megabytes(self) -> float:
        """Memory of the templates, MB."""
        return self.templates.numel() * self.templates.element_size() / 1e6


@dataclass(frozen=True)
class HarmonicBank:
    """The same for a latent that turns: no template is stored.

    ⟨e_q, D(R) e_r⟩ is the scalar product of D(R) with the products of the two latents, degree by degree. What depends
    on rotations alone is computed once for all objects and kept, what depends on the object is its latent, and matching
    is still one matrix product, with a row of 969 numbers for each rotation in place of a template of thousands.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        latent: ((L+1)², C) of the reference.
        turns: (N, Σ(2l+1)²) the flattened D of the rotations.
    """

    rotations: Array
    latent: Tensor
    turns: Tensor

    @classmethod
    def of(cls, predictor: RotatedLatentPredictor, latent: Tensor, rotations: Array) -> HarmonicBank:
        """For a reference latent (D,)."""
        latent = latent.float().reshape(predictor.latent_shape)
        bandwidth = predictor.network.config.bandwidth
        if rotations is free_rotations():
            return cls(rotations, latent, free_turns(bandwidth, latent.device))
        return cls(rotations, latent, _turns(rotations, bandwidth, latent.device))

    def match(self, latent: Tensor, temperature: float) -> Match:
        """As ``TemplateBank.match``; turning keeps norms, so the distance differs from the product by a constant."""
        query = latent.float().reshape(self.latent.shape)
        products = torch.mv(self.turns, correlation(query[None], self.latent[None])[0])
        similarity = products / (query.norm() * self.latent.norm()).clamp(min=1e-12)
        return Match((products / temperature).double().cpu().numpy(), similarity.double().cpu().numpy())


def _turns(rotations: Array, bandwidth: int, device: torch.device) -> Tensor:
    return flatten_d(wigner_d(torch.tensor(rotations, dtype=torch.float32, device=device), bandwidth))


@lru_cache(maxsize=4)
def free_turns(bandwidth: int, device: torch.device) -> Tensor:
    """The flattened D (N, Σ(2l+1)²) of the free grid: the same for every object, and kept."""
    return _turns(free_rotations(), bandwidth, device)
