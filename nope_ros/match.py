"""The fourth stop: how well each predicted template explains the query, by one matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.latent import Predictor

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


@dataclass(frozen=True)
class TemplateBank:
    """The latents of one object predicted at many rotations.

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
