"""The fifth stop: the probability of every relative rotation, and what a robot wants to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nope_ros.rotations import exp, geodesic_distance, icosphere, log, turn_to

Array = NDArray[np.float64]

MODE_SEPARATION = np.radians(20.0)
CONFIDENCE_RADIUS = np.radians(30.0)
# A mode is the mean over this radius around itself. For a peak of 8° that is ten times finer than the nearest point of
# a 15° grid (7.6° off at the median); a smaller radius sees too few points of the grid, a larger one the next mode.
_PEAK_RADIUS = np.radians(24.0)
_MOST_MODES = 8
# Modes are looked for among so many of the most probable rotations, and not where one is less probable than this share
# of the most probable.
_CANDIDATES, _LEAST_PEAK = 512, 0.002

# What the ambiguity goes by. Of an image that tells less than this, nats, too little is known: it less than halves what
# was possible before.
_LEAST_INFORMATION = 0.7
# Confidence (probability within 30° of the mode) from which an answer is the only one, whatever else there is; and from
# which it is where neither an axis nor a few modes explain the image.
_SURE, _FAIRLY_SURE = 0.7, 0.4
# Modes of at least this share of the first one's probability are as good as it; together they have to hold this much.
_STRONG_MODE, _STRONG_TOGETHER = 0.3, 0.5
# Whether an axis explains the image is asked of the credible set of this mass.
_AXIAL_MASS = 0.9
# Mean squared cosine between an axis and where it is turned to, above which it stays: some 30°.
_AXIS_STAYS = 0.75
# It is turned by any angle if so many bins of the circle hold more than this share of the set each.
_BINS, _LEAST_BINS, _LEAST_IN_BIN = 12, 10, 0.02


class Ambiguity(IntEnum):
    """What kind of answer a distribution is."""

    UNIQUE = 0
    FINITE = 1  # a few distinct rotations explain the image, as with a 2-fold symmetric object
    AXIAL = 2  # any turn about one axis explains it, as with an axis of revolution
    UNINFORMATIVE = 3  # the image says next to nothing


@dataclass(frozen=True)
class Mode:
    """One peak: its rotation (3, 3) and the probability mass around it."""

    R: Array
    probability: float


@dataclass(frozen=True)
class RotationDistribution:
    """A discrete distribution over rotations.

    Attributes:
        rotations: (N, 3, 3).
        probabilities: (N,), summing to one.
        prior_probabilities: (N,) before the image was seen; entropy is judged against it.
        spacing: distance of neighbouring rotations, radians.
        spread: factor on the second moment by which errors turned out to be wider than the distribution.
    """

    rotations: Array
    probabilities: Array
    prior_probabilities: Array
    spacing: float
    spread: float = 1.0

    @classmethod
    def from_log_likelihood(
        cls,
        rotations: Array,
        log_likelihood: Array,
        log_prior: Array | None = None,
        spacing: float = np.radians(15),
        spread: float = 1.0,
    ) -> RotationDistribution:
        """Normalise prior times likelihood (each (N,), in nats, up to a constant)."""
        if log_prior is None:
            log_prior = np.zeros(len(rotations))
        return cls(rotations, _normalised(log_likelihood + log_prior), _normalised(log_prior), spacing, spread)

    def transformed(self, left: Array, right: Array) -> RotationDistribution:
        """The distribution of left @ R @ right (each (3, 3)): a change of axes on either side."""
        return replace(self, rotations=left @ self.rotations @ right)

    def mass_within(self, R: Array, angle: float) -> float:
        """Probability that the rotation is within ``angle`` radians of R (3, 3)."""
        return float(self.probabilities[geodesic_distance(self.rotations, R) <= angle].sum())

    def credible_set(self, mass: float) -> NDArray[np.intp]:
        """Indices of the fewest rotations that hold ``mass`` (0..1) together, most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        count = int(np.searchsorted(np.cumsum(self.probabilities[order]), mass * (1 - 1e-12))) + 1
        return order[:count]

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """Peaks at least 20° apart, most probable first; each rotation's mass goes to its nearest peak within 30°."""
        order = np.argsort(-self.probabilities, kind="stable")[:_CANDIDATES]
        order = order[self.probabilities[order] > _LEAST_PEAK * self.probabilities[order[0]]]
        candidates = self.rotations[order]
        near = _angles(candidates, candidates) < MODE_SEPARATION
        # A peak has no more probable rotation nearby; anything else is the slope of one.
        peaks = candidates[~np.tril(near, -1).any(axis=1)][:_MOST_MODES]
        angles = _angles(peaks, self.rotations)
        owner = np.where(angles.min(axis=0) <= CONFIDENCE_RADIUS, angles.argmin(axis=0), -1)
        modes = [
            Mode(self._mean_around(peak, angles[index]), float(self.probabilities[owner == index].sum()))
            for index, peak in enumerate(peaks)
        ]
        return tuple(sorted(modes, key=lambda mode: -mode.probability))

    def weighed(self, peaks: Array, log_weight: Array) -> RotationDistribution:
        """The distribution after evidence on some peaks: what is around each counts exp(``log_weight``) times as much.

        Args:
            peaks: (M, 3, 3); a rotation within 30° belongs to the nearest of them, of others nothing new is known.
            log_weight: (M,) log of how much likelier the evidence is if that peak is right than if it is not.
        """
        if not log_weight.any():
            return self
        angles = _angles(peaks, self.rotations)
        weight = np.where(angles.min(axis=0) <= CONFIDENCE_RADIUS, log_weight[angles.argmin(axis=0)], 0.0)
        with np.errstate(divide="ignore"):
            return replace(self, probabilities=_normalised(np.log(self.probabilities) + weight))

    @property
    def mode(self) -> Mode:
        """The most probable peak."""
        return self.modes[0]

    @cached_property
    def entropy(self) -> float:
        """Entropy in nats."""
        p = self.probabilities[self.probabilities > 0]
        return float(-(p * np.log(p)).sum())

    @cached_property
    def confidence(self) -> float:
        """Probability that the rotation is within 30° of the mode."""
        return self.mass_within(self.mode.R, CONFIDENCE_RADIUS)

    @cached_property
    def covariance(self) -> Array:
        """``moment_about`` the mode."""
        return self.moment_about(self.mode.R)

    def moment_about(self, R: Array) -> Array:
        """Second moment (3, 3) of log(R_k Rᵀ), rad², in the axes that R (3, 3) maps to (the camera's).

        Includes the variance within one cell of the grid, so that a sharp answer is not taken for an exact one.
        """
        vectors, weights = self._around(R)
        moment: Array = (weights[:, None] * vectors).T @ vectors
        return moment + np.eye(3) * self.spacing**2 / 12

    def moment_within(self, R: Array, angle: float) -> Array:
        """The same, of what lies within ``angle`` radians of R (3, 3) alone: how wide one mode is."""
        vectors, weights = self._around(R)
        weights = np.where(np.linalg.norm(vectors, axis=1) <= angle, weights, 0.0)
        moment: Array = (weights[:, None] * vectors).T @ vectors / max(weights.sum(), 1e-12)
        return moment + np.eye(3) * self.spacing**2 / 12

    def _around(self, R: Array) -> tuple[Array, Array]:
        """log(R_k Rᵀ) (K, 3) and probabilities (K,); what is left out is, together, below a hundredth of a percent."""
        kept = self.probabilities > 1e-8
        return log(self.rotations[kept] @ R.T), self.probabilities[kept]

    @cached_property
    def ambiguity(self) -> Ambiguity:
        """The kind of answer this is."""
        prior = self.prior_probabilities[self.prior_probabilities > 0]
        information = float(-(prior * np.log(prior)).sum()) - self.entropy
        if information < _LEAST_INFORMATION:
            return Ambiguity.UNINFORMATIVE
        if self.confidence >= _SURE:
            return Ambiguity.UNIQUE
        if self._turns_about_an_axis():
            return Ambiguity.AXIAL
        strong = [mode for mode in self.modes if mode.probability >= _STRONG_MODE * self.mode.probability]
        if len(strong) > 1 and sum(mode.probability for mode in strong) >= _STRONG_TOGETHER:
            return Ambiguity.FINITE
        return Ambiguity.UNIQUE if self.confidence >= _FAIRLY_SURE else Ambiguity.UNINFORMATIVE

    def _turns_about_an_axis(self) -> bool:
        # An axis of revolution stays where it is, or is turned round (a cylinder upside down), and what is
        # perpendicular to it points everywhere.
        kept = self.credible_set(_AXIAL_MASS)
        weight = self.probabilities[kept] / self.probabilities[kept].sum()
        turns = self.rotations[kept] @ self.mode.R.T
        axes = icosphere(3)
        axes = axes[axes[:, 2] >= 0]
        products = (axes[:, :, None] * axes[:, None, :]).reshape(-1, 9)
        stays = (products @ turns.reshape(-1, 9).T) ** 2 @ weight
        if stays.max() < _AXIS_STAYS:
            return False
        axis = axes[np.argmax(stays)]
        u, v = turn_to(axis)[:2]
        across = turns @ u
        angles = np.arctan2(across @ v, across @ u)
        share, _ = np.histogram(angles, bins=_BINS, range=(-np.pi, np.pi), weights=weight)
        return bool((share > _LEAST_IN_BIN).sum() >= _LEAST_BINS)

    def _mean_around(self, peak: Array, angle: Array) -> Array:
        # angle (N,): of every rotation to the peak. The circle moves with its mean: start with all it may reach.
        near = angle <= 2 * _PEAK_RADIUS
        rotations, probabilities = self.rotations[near], self.probabilities[near]
        for _ in range(3):
            vectors = log(rotations @ peak.T)
            weights = probabilities * (np.linalg.norm(vectors, axis=1) <= _PEAK_RADIUS)
            peak = exp(weights @ vectors / weights.sum()) @ peak
        return peak


def _normalised(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    total: Array = weights / weights.sum()
    return total


def _angles(a: Array, b: Array) -> Array:
    # From the trace, by one product: enough digits for comparing with whole degrees.
    trace = a.reshape(len(a), 9) @ b.reshape(len(b), 9).T
    angle: Array = np.arccos(np.clip((trace - 1) / 2, -1, 1))
    return angle
