"""Two registered objects, or two recordings of one, brought into one frame by the similarity that fits both best.

After Sommer et al. ("Unsupervised Learning of Category-Level 3D Pose from Object-Centric Videos", CVPR 2024): a surface
with a feature at each point, here a visual hull's radius and our latent's value in 162 directions. A point's *cycle* is
how far it ends from where it began when its best match by appearance in the other object is matched back; points that
return count more. Hypotheses come from four matched points, and from the correlation of the two latents, which for a
latent that turns is one product over all rotations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nope_ros.estimator import RegisteredObject
from nope_ros.frame import InputError
from nope_ros.harmonics import spherical_harmonics, wigner_d
from nope_ros.latent import RotatedLatentPredictor
from nope_ros.match import common_latents, free_turns
from nope_ros.models.rotated_latent import as_template, correlation, flatten_d
from nope_ros.prior import free_rotations
from nope_ros.rotations import exp
from nope_ros.video import HULL_DIRECTIONS

Array = NDArray[np.float64]

GEOMETRY, APPEARANCE = 0.8, 0.2
CYCLE_SCALE = 0.9
"""In shares of the object's extent (Sommer et al.)."""
GATE = 0.72
"""Least score at which two objects are taken to be of one kind; see docs/video.md for how it was chosen."""
_HYPOTHESES = 200
_NEAR = 0.1  # of the extent: a distance at which two surfaces count as half equal


@dataclass(frozen=True)
class Alignment:
    """The similarity x_a = scale · R x_b + t that lays one object over another.

    Attributes:
        scale: of lengths; in the unit of a over that of b.
        R: (3, 3).
        t: (3,).
        geometry: 0..1, how well the surfaces fit.
        appearance: −1..1, how alike the features of places that lie on each other are.
        score: 0.8 geometry + 0.2 appearance.
        correlation: what the two latents say of R, over what each says of itself: 1 for the same object.
        accepted: whether the score reaches the gate.
    """

    scale: float
    R: Array
    t: Array
    geometry: float
    appearance: float
    score: float
    correlation: float
    accepted: bool


@dataclass(frozen=True)
class Surface:
    """Points (N, 3) and unit features (N, C) of an object, its extent, and its latent in its own frame."""

    points: Array
    features: Array
    extent: float
    latent: torch.Tensor

    @classmethod
    def of(cls, registered: RegisteredObject) -> Surface:
        """Of an object registered from a walk.

        Raises:
            InputError: if it was registered otherwise.
        """
        keyframes = registered.keyframes
        if keyframes is None or not isinstance(registered.predictor, RotatedLatentPredictor):
            raise InputError(f"'{registered.object_id}' was not registered from a walk, so its back is unknown")
        latent = common_latents(registered.predictor, keyframes.latents, keyframes.R_virtual_object).mean(dim=0)
        bandwidth = round(latent.shape[0] ** 0.5) - 1
        features = spherical_harmonics(HULL_DIRECTIONS, bandwidth) @ latent.cpu().double().numpy()
        features = features - features.mean(axis=0)  # what all places share tells none of them apart
        features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-12
        points = keyframes.hull[:, None] * HULL_DIRECTIONS
        extent = float(2 * np.percentile(keyframes.hull, 90))  # of a plate too, which reaches far in few directions
        if extent <= 0:
            raise InputError(f"'{registered.object_id}': its outlines contradict each other; register it again")
        return cls(points, features, extent, latent.cpu())


def align(
    a: RegisteredObject, b: RegisteredObject, *, cycles: bool = True, gate: float = GATE, seed: int = 0
) -> Alignment:
    """Lay object b over object a.

    Args:
        a: stays where it is.
        b: is moved.
        cycles: weight points by how well they return; False is for comparison.
        gate: least score that is accepted.
        seed: draws the four-point hypotheses.

    Raises:
        InputError: if one of them was not registered from a walk.
    """
    return align_surfaces(Surface.of(a), Surface.of(b), cycles=cycles, gate=gate, seed=seed)


def align_surfaces(a: Surface, b: Surface, *, cycles: bool = True, gate: float = GATE, seed: int = 0) -> Alignment:
    """As ``align``."""
    rng = np.random.default_rng(seed)
    similar = a.features @ b.features.T
    to_b, to_a = similar.argmax(axis=1), similar.argmax(axis=0)
    cycle_a = np.linalg.norm(a.points - a.points[to_a[to_b]], axis=1) / a.extent
    cycle_b = np.linalg.norm(b.points - b.points[to_b[to_a]], axis=1) / b.extent
    weight_a, weight_b = (np.exp(-one / CYCLE_SCALE) if cycles else np.ones(len(one)) for one in (cycle_a, cycle_b))
    trees = cKDTree(a.points), cKDTree(b.points)

    def judge(scale: float, R: Array, t: Array) -> tuple[float, float, float]:
        moved, back = scale * b.points @ R.T + t, (a.points - t) @ R / scale
        distance_b, near_a = trees[0].query(moved)
        distance_a, near_b = trees[1].query(back)
        fit_b = 1 / (1 + (distance_b / (_NEAR * a.extent)) ** 2)
        fit_a = 1 / (1 + (distance_a / (_NEAR * b.extent)) ** 2)
        alike_b = np.einsum("nc,nc->n", b.features, a.features[near_a])
        alike_a = np.einsum("nc,nc->n", a.features, b.features[near_b])
        geometry = 0.5 * (np.average(fit_b, weights=weight_b) + np.average(fit_a, weights=weight_a))
        appearance = 0.5 * (np.average(alike_b, weights=weight_b) + np.average(alike_a, weights=weight_a))
        return float(GEOMETRY * geometry + APPEARANCE * appearance), float(geometry), float(appearance)

    candidates = [_about_centre(a, b, R) for R in _by_correlation(a, b)]
    for _ in range(_HYPOTHESES):
        four = rng.choice(len(b.points), 4, replace=False, p=weight_b / weight_b.sum())
        found = _umeyama(b.points[four], a.points[to_a[four]])
        if found is not None and 0.5 < found[0] * b.extent / a.extent < 2:
            candidates.append(found)
    both = correlation(a.latent[None], b.latent[None])[0] / (_self_product(a) * _self_product(b)) ** 0.5

    def cosines(rotations: Array) -> Array:
        turned = flatten_d(wigner_d(torch.tensor(rotations, dtype=torch.float32), _bandwidth(a)))
        return np.asarray((turned @ both).double().numpy())

    agreement = cosines(np.stack([R for _, R, _ in candidates]))
    # The surfaces alone took many a chair's back for its front, and the latents' correlation alone many a shelf's.
    scored = [judge(*one)[0] + cosine for one, cosine in zip(candidates, agreement, strict=True)]
    best = candidates[int(np.argmax(scored))]
    for step in (0.15, 0.07, 0.03):  # radians, shares of the extent
        for _ in range(4):
            around = [best]
            for axis in np.concatenate([np.eye(3), -np.eye(3)]):
                around.append((best[0], exp(step * axis) @ best[1], best[2]))
                around.append((best[0], best[1], best[2] + 0.3 * step * a.extent * axis))
            around += [(best[0] * (1 + sign * step), best[1], best[2]) for sign in (-1, 1)]
            better = max(around, key=lambda one: judge(*one)[0])
            if better is best:
                break
            best = better
    score, geometry, appearance = judge(*best)
    cosine = float(cosines(best[1][None])[0])
    return Alignment(*best, geometry, appearance, score, cosine, score >= gate)


def _self_product(surface: Surface) -> float:
    return max(float((surface.latent * as_template(surface.latent)).sum()), 1e-12)


def _bandwidth(surface: Surface) -> int:
    return round(surface.latent.shape[0] ** 0.5) - 1


def _by_correlation(a: Surface, b: Surface, count: int = 8) -> list[Array]:
    """Rotations from b to a at which the latents agree best, at least 30° apart."""
    grid = free_rotations()
    score = free_turns(_bandwidth(a), a.latent.device) @ correlation(a.latent[None], b.latent[None])[0]
    left = score.double().numpy().copy()
    found = []
    for _ in range(count):
        peak = grid[int(np.argmax(left))]
        found.append(peak)
        left[(grid.reshape(-1, 9) @ peak.ravel() - 1) / 2 > np.cos(np.radians(30))] = -np.inf
    return found


def _about_centre(a: Surface, b: Surface, R: Array) -> tuple[float, Array, Array]:
    return a.extent / b.extent, R, np.zeros(3)


def _umeyama(source: Array, target: Array) -> tuple[float, Array, Array] | None:
    """The similarity (scale, R, t) that takes points to points with least squares (Umeyama, PAMI 1991), or None."""
    from_centre, to_centre = source - source.mean(axis=0), target - target.mean(axis=0)
    u, values, vt = np.linalg.svd(to_centre.T @ from_centre)
    spread = float((from_centre**2).sum())
    if spread < 1e-12 or values[1] < 1e-9 * max(values[0], 1e-12):
        return None
    sign = np.array([1.0, 1.0, np.linalg.det(u @ vt)])  # a mirror image is no rotation
    R = u @ np.diag(sign) @ vt
    scale = float((values * sign).sum() / spread)
    if scale <= 0:
        return None
    return scale, R, target.mean(axis=0) - scale * R @ source.mean(axis=0)
