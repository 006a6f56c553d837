"""From answers to figures.

Accuracy and errors are of the single answer a method gives (top-1). Coverage and likelihood judge the distribution:
truth is any rotation and a distribution lives on a grid, so truth is counted as the grid's rotation nearest to it,
among those the prior allows. No tolerance is added to that: truth is covered only if its own cell is in the credible
set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from nope_ros.crop import Crop
from nope_ros.distribution import RotationDistribution
from nope_ros.evaluation.symmetry import Symmetry
from nope_ros.prior import Prior
from nope_ros.rotations import twist

Array = NDArray[np.float64]

# Smallest probability that counts: one answer that was quite sure and wrong would otherwise decide the mean.
_LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Calibration:
    """How a distribution stands to the truth.

    Attributes:
        level: probability of all cells more probable than truth's own. Truth is in the credible set of any larger mass.
        cell: probability of truth's own cell.
        nll: −log(cell · number of cells that the prior allows), nats: zero is what knowing nothing gives, less is
            better. Under ``free`` the cells are equal parts of SO(3), so this is −log density relative to the Haar
            measure; under the others relative to what gravity leaves open, so protocols cannot be compared by it.
    """

    level: float
    cell: float
    nll: float

    def covered(self, mass: float) -> bool:
        """Whether truth is in the credible set of this mass."""
        return self.level < mass * (1 - 1e-12)


def calibration(distribution: RotationDistribution, delta_R: Array) -> Calibration:
    """Judge a distribution by the true rotation (3, 3)."""
    allowed = np.flatnonzero(distribution.prior_probabilities > 0)
    rotations = distribution.rotations[allowed].reshape(-1, 9)
    cell = int(allowed[np.argmax(rotations @ np.asarray(delta_R).ravel())])  # largest trace, smallest angle
    order = distribution.credible_set(1.0)
    place = np.flatnonzero(order == cell)
    before = order[: place[0]] if len(place) else order
    probability = float(distribution.probabilities[cell])
    return Calibration(
        level=min(float(distribution.probabilities[before].sum()), 1.0),
        cell=probability,
        nll=-float(np.log(max(probability, _LEAST_PROBABILITY) * len(allowed))),
    )


@dataclass(frozen=True)
class PoseError:
    """How far a pose is from the true one.

    Attributes:
        rotation: angle, radians, modulo the object's symmetry.
        roll: its part about the viewing direction, radians.
        translation: ‖t − t_true‖ / ‖t_true‖.
        centre: of the object in the crop, relative to the crop's side.
        scale: |log| of the distance over the true one.
    """

    rotation: float
    roll: float
    translation: float
    centre: float
    scale: float

    @classmethod
    def of(cls, R: Array, t: Array, R_true: Array, t_true: Array, crop: Crop, symmetry: Symmetry) -> PoseError:
        """Of R (3, 3) and t (3,) in camera axes; ``crop`` is of the query."""
        to_crop = crop.K_virtual @ crop.R_virtual_camera
        seen, true = to_crop @ t, to_crop @ t_true
        off = crop.R_virtual_camera @ R_true @ R.T @ crop.R_virtual_camera.T
        return cls(
            rotation=float(symmetry.error(R, R_true)),
            roll=float(abs(twist(off))),
            translation=float(np.linalg.norm(t - t_true) / np.linalg.norm(t_true)),
            centre=float(np.linalg.norm(seen[:2] / seen[2] - true[:2] / true[2]) / len(crop.image)),
            scale=float(abs(np.log(np.linalg.norm(t) / np.linalg.norm(t_true)))),
        )


@dataclass(frozen=True)
class PairScore:
    """One pair under one protocol by one method.

    Attributes:
        method: its name.
        protocol: its name.
        object_name: of the object.
        reference: name of the reference view.
        query: name of the query view.
        delta_R: (3, 3) as nested tuples, the answer.
        error_deg: angle between answer and truth.
        error_sym_deg: the same, modulo the object's symmetry.
        direction_deg: angle between the two viewing directions in the object's frame.
        translation_relative: ‖t − t_true‖ / ‖t_true‖, or None.
        confidence: 0..1, or None.
        calibration: or None, if the method has no distribution.
    """

    method: str
    protocol: Prior
    object_name: str
    reference: str
    query: str
    delta_R: tuple[tuple[float, ...], ...]
    error_deg: float
    error_sym_deg: float
    direction_deg: float
    translation_relative: float | None = None
    confidence: float | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Scores:
    """Figures of many pairs: percentages 0–100, degrees, nats; None where there is nothing to judge."""

    pairs: int
    acc15: float | None
    acc30: float | None
    median_deg: float | None
    mean_deg: float | None
    acc15_sym: float | None
    acc30_sym: float | None
    median_deg_sym: float | None
    mean_deg_sym: float | None
    coverage50: float | None
    coverage90: float | None
    nll: float | None
    translation_relative_median: float | None

    @classmethod
    def of(cls, scores: Sequence[PairScore]) -> Scores:
        """The figures of some pairs, each pair counting the same."""
        error = np.array([score.error_deg for score in scores])
        error_sym = np.array([score.error_sym_deg for score in scores])
        judged = [score.calibration for score in scores if score.calibration is not None]
        moved = [score.translation_relative for score in scores if score.translation_relative is not None]
        return cls(
            pairs=len(scores),
            **_errors(error, ""),
            **_errors(error_sym, "_sym"),
            coverage50=_percent([one.covered(0.5) for one in judged]),
            coverage90=_percent([one.covered(0.9) for one in judged]),
            nll=_apply(np.mean, [one.nll for one in judged]),
            translation_relative_median=_apply(np.median, moved),
        )

    @classmethod
    def mean(cls, parts: Sequence[Scores]) -> Scores:
        """The average over objects, each object counting the same however many pairs it has."""
        values: dict[str, float | None] = {}
        for field in fields(cls)[1:]:
            given = [value for part in parts if (value := getattr(part, field.name)) is not None]
            values[field.name] = _apply(np.mean, given)
        return cls(pairs=sum(part.pairs for part in parts), **values)

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers, rounded to what they are worth."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def _errors(error: Array, suffix: str) -> dict[str, float | None]:
    return {
        f"acc15{suffix}": _percent(error < 15),
        f"acc30{suffix}": _percent(error < 30),
        f"median_deg{suffix}": _apply(np.median, error),
        f"mean_deg{suffix}": _apply(np.mean, error),
    }


def _percent(hits: Sequence[bool] | NDArray[np.bool_]) -> float | None:
    return 100 * float(np.mean(hits)) if len(hits) else None


def _apply(function: Callable[..., np.floating], values: Sequence[float] | Array) -> float | None:
    return float(function(values)) if len(values) else None


def reliability(scores: Sequence[PairScore], masses: Array) -> Array:
    """Share of pairs (M,) whose truth is within each mass (M,) of their own distribution.

    A credible set holds whole cells and so somewhat more than its mass. Here the last cell counts in part, so that an
    honest distribution gives the diagonal exactly, however coarse its grid.
    """
    judged = [score.calibration for score in scores if score.calibration is not None]
    level = np.array([one.level for one in judged])
    cell = np.maximum([one.cell for one in judged], 1e-12)
    within: Array = np.clip((masses[:, None] - level) / cell, 0, 1).mean(axis=1)
    return within
