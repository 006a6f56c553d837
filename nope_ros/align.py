"""Two registered objects, or two recordings of one, brought into one frame by the similarity that fits both best.

After Sommer et al. ("Unsupervised Learning of Category-Level 3D Pose from Object-Centric Videos", CVPR 2024): a surface
with features at each point, here a visual hull's radius and our latent's value in 162 directions, or what a network of
the user's shows there in each view. A point's *cycle* is
how far it ends from where it began when its best match by appearance in the other object is matched back; points that
return count more. Hypotheses come from four matched points, and from the correlation of the two latents, which for a
latent that turns is one product over all rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from nope_ros.crop import FILL, Crop
from nope_ros.estimator import RegisteredObject
from nope_ros.features import FeatureExtractor
from nope_ros.frame import InputError
from nope_ros.harmonics import spherical_harmonics
from nope_ros.latent import RotatedLatentPredictor
from nope_ros.match import Turns, common_latents, free_turns
from nope_ros.models.rotated_latent import as_template, correlation
from nope_ros.prior import free_rotations
from nope_ros.rotations import exp
from nope_ros.video import HULL_DIRECTIONS, View, hull_pixels, outline_radii

Array = NDArray[np.float64]

GEOMETRY, APPEARANCE = 0.8, 0.2
CYCLE_SCALE = 0.9
"""In shares of the object's extent (Sommer et al.)."""
GATE = 0.73
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
    """What two objects are compared by.

    Attributes:
        points: (N, 3) of the hull.
        features: (N, V, C) unit features of each point, as each of V views shows it; ours is one for all views.
        seen: (N, V) whether the view shows the point.
        extent: of the object, in the unit of the points.
        latent: ((L+1)², C) in the object's frame.
    """

    points: Array
    features: Array
    seen: NDArray[np.bool_]
    extent: float
    latent: torch.Tensor

    @classmethod
    def of(cls, registered: RegisteredObject, extractor: FeatureExtractor | None = None) -> Surface:
        """Of an object registered from a walk.

        Args:
            registered: the object.
            extractor: what places look like to it; to the latent's own network if there is none.

        Raises:
            InputError: if it was registered otherwise, or before crops were kept, which an extractor needs.
        """
        keyframes = registered.keyframes
        name = f"'{registered.object_id}'"
        if keyframes is None or not isinstance(registered.predictor, RotatedLatentPredictor):
            raise InputError(f"{name} was not registered from a walk, so its back is unknown")
        latent = common_latents(registered.predictor, keyframes.latents, keyframes.R_virtual_object).mean(dim=0)
        points = keyframes.hull[:, None] * HULL_DIRECTIONS
        extent = float(2 * np.percentile(keyframes.hull, 90))  # of a plate too, which reaches far in few directions
        if extent <= 0:
            raise InputError(f"{name}: its outlines contradict each other; register it again")
        if extractor is None:
            bandwidth = round(latent.shape[0] ** 0.5) - 1
            features = spherical_harmonics(HULL_DIRECTIONS, bandwidth) @ latent.cpu().double().numpy()
            features = features - features.mean(axis=0)  # what all places share tells none of them apart
            features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-12
            features, seen = features[:, None], np.ones((len(points), 1), dtype=bool)
        else:
            if keyframes.crops is None or keyframes.seen_at is None:
                raise InputError(f"{name} was registered before its views were kept; register it again")
            # A mean of what several views show of a place is like none of them: all are kept (Sommer et al.).
            found = extractor.at(keyframes.crops, keyframes.seen_at).double().numpy()
            features, seen = np.swapaxes(found, 0, 1), np.isfinite(keyframes.seen_at[..., 0]).T
        return cls(points, features, seen, extent, latent.cpu())

    def likeness(self, other: Surface) -> Array:
        """How alike places look, −1..1: (N, M), of the two views that show them most alike; −1 if none shows one."""
        products = np.einsum("nvc,mwc->nmvw", self.features, other.features, optimize=True)
        both = self.seen[:, None, :, None] & other.seen[None, :, None, :]
        best: Array = np.where(both, products, -1.0).max(axis=(2, 3))
        return best


def align_surfaces(
    a: Surface, b: Surface, *, cycles: bool = True, by_latents: bool = True, gate: float = GATE
) -> Alignment:
    """Lay object b over object a; the same two objects give the same answer.

    Args:
        a: stays where it is.
        b: is moved.
        cycles: weight points by how well they return; False is for comparison.
        by_latents: whether the latents' correlation proposes and chooses; False is for comparison: as published.
        gate: least score that is accepted.
    """
    rng = np.random.default_rng(0)  # draws the four-point hypotheses
    similar = a.likeness(b)
    to_b, to_a = similar.argmax(axis=1), similar.argmax(axis=0)
    weight_a = _weights(a, to_a[to_b], cycles)
    weight_b = _weights(b, to_b[to_a], cycles)
    points_a = torch.from_numpy(a.points)
    every_a, every_b = np.arange(len(a.points)), np.arange(len(b.points))

    def judge(those: _Similarities) -> tuple[Array, Array, Array]:
        moved = torch.from_numpy(those.scale[:, None, None] * np.einsum("hij,nj->hni", those.R, b.points))
        moved = moved + torch.from_numpy(those.t)[:, None]
        # (H, M, N): of every point of b, laid over a, to every point of a.
        distance = torch.cdist(moved, points_a.expand(len(moved), -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
        to_nearest_a, nearest_a = (one.numpy() for one in distance.min(dim=2))
        to_nearest_b, nearest_b = (one.numpy() for one in distance.min(dim=1))
        fit_b = 1 / (1 + (to_nearest_a / (_NEAR * a.extent)) ** 2)
        fit_a = 1 / (1 + (to_nearest_b / those.scale[:, None] / (_NEAR * b.extent)) ** 2)
        alike_b, alike_a = similar[nearest_a, every_b], similar[every_a, nearest_b]
        geometry = 0.5 * (fit_b @ weight_b + fit_a @ weight_a)
        appearance = 0.5 * (alike_b @ weight_b + alike_a @ weight_a)
        return GEOMETRY * geometry + APPEARANCE * appearance, geometry, appearance

    found = [_about_centre(a, b, R) for R in _by_correlation(a, b)] if by_latents else []
    for _ in range(_HYPOTHESES):
        four = rng.choice(len(b.points), 4, replace=False, p=weight_b)
        one = _umeyama(b.points[four], a.points[to_a[four]])
        if one is not None and 0.5 < one[0] * b.extent / a.extent < 2:
            found.append(one)
    candidates = _Similarities.of(found or [_about_centre(a, b, np.eye(3))])
    both = correlation(a.latent[None], b.latent[None])[0] / (_self_product(a) * _self_product(b)) ** 0.5

    def cosines(rotations: Array) -> Array:
        turns = Turns.of(rotations, _bandwidth(a), a.latent.device)
        return np.asarray(turns.values(both[None])[:, 0].double().numpy())

    scored = judge(candidates)[0]
    if by_latents:
        # The surfaces alone took many a chair's back for its front, and the latents' correlation alone many a shelf's.
        scored = scored + cosines(candidates.R)
    best = candidates.one(int(np.argmax(scored)))
    signs = np.concatenate([np.eye(3), -np.eye(3)])
    for step in (0.15, 0.07, 0.03):  # radians, shares of the extent
        for _ in range(4):
            scale, R, t = best
            around = [best, *((scale, exp(step * axis) @ R, t) for axis in signs)]
            around += [(scale, R, t + 0.3 * step * a.extent * axis) for axis in signs]
            around += [(scale * (1 + sign * step), R, t) for sign in (-1, 1)]
            better = int(np.argmax(judge(_Similarities.of(around))[0]))
            if better == 0:
                break
            best = around[better]
    score, geometry, appearance = (float(one[0]) for one in judge(_Similarities.of([best])))
    cosine = float(cosines(best[1][None])[0])
    return Alignment(*best, geometry, appearance, score, cosine, score >= gate)


@dataclass(frozen=True)
class _Similarities:
    """scale (H,), R (H, 3, 3), t (H, 3) of many: x_a = scale R x_b + t."""

    scale: Array
    R: Array
    t: Array

    @classmethod
    def of(cls, those: Sequence[tuple[float, Array, Array]]) -> _Similarities:
        scale, R, t = zip(*those, strict=True)
        return cls(np.array(scale), np.stack(R), np.stack(t))

    def one(self, index: int) -> tuple[float, Array, Array]:
        return float(self.scale[index]), self.R[index], self.t[index]


def _weights(surface: Surface, returned: NDArray[np.intp], cycles: bool) -> Array:
    """Weights (N,) of a surface's points, summing to one: exp(−cycle/0.9), 0 where no view shows the point."""
    cycle = np.linalg.norm(surface.points - surface.points[returned], axis=1) / surface.extent
    weight = np.exp(-cycle / CYCLE_SCALE) if cycles else np.ones(len(cycle))
    weight = weight * surface.seen.any(axis=1) + 1e-9
    normalised: Array = weight / weight.sum()
    return normalised


def _self_product(surface: Surface) -> float:
    return max(float((surface.latent * as_template(surface.latent)).sum()), 1e-12)


def _bandwidth(surface: Surface) -> int:
    return round(surface.latent.shape[0] ** 0.5) - 1


def _by_correlation(a: Surface, b: Surface) -> list[Array]:
    """The eight rotations from b to a at which the latents agree best, at least 30° apart."""
    grid = free_rotations()
    score = free_turns(_bandwidth(a), a.latent.device).values(correlation(a.latent[None], b.latent[None]))
    left = score[:, 0].double().numpy().copy()
    found = []
    for _ in range(8):
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


def in_frame_of_a(b: RegisteredObject, found: Alignment, object_id: str) -> RegisteredObject:
    """Object b once more, its poses being of the frame of a, in which it lies over a.

    Lengths stay b's own: of the similarity x_a = scale · R x_b + t, x_a / scale = R x_b + t / scale is taken over.

    Args:
        b: registered from a walk.
        found: what lays it over a.
        object_id: of the result.

    Raises:
        InputError: if it was registered before all that this takes was kept.
    """
    keyframes, reference = b.keyframes, b.reference
    sides = None if keyframes is None else keyframes.sides
    if keyframes is None or sides is None:
        raise InputError(f"'{b.object_id}' was registered before the sides of a walk were kept; register it again")
    R_b_new, shift = found.R.T, found.t / found.scale  # x_new = R x_b + shift
    R_virtual_object = keyframes.R_virtual_object @ R_b_new
    offset_object = sides.offset_object @ found.R.T - shift
    # The hull is measured anew from the new origin, each keyframe's virtual camera taken for the real one.
    t_virtual_object = np.einsum("kij,kj->ki", R_virtual_object, offset_object)
    t_virtual_object[:, 2] += sides.distance
    views = [_view(crop, radius) for crop, radius in zip(sides.crops, sides.angular_radius, strict=True)]
    hull = outline_radii(views, R_virtual_object, t_virtual_object)
    R_camera_object = reference.R_camera_object @ R_b_new
    return replace(
        b,
        object_id=object_id,
        reference=replace(
            reference,
            R_camera_object=R_camera_object,
            t_camera_object=reference.t_camera_object - R_camera_object @ shift,
            offset_object=found.R @ reference.offset_object - shift,
        ),
        keyframes=replace(
            keyframes,
            R_virtual_object=R_virtual_object,
            R_camera_object=keyframes.R_camera_object @ R_b_new,
            R_fixed_object=keyframes.R_fixed_object @ R_b_new,
            t_fixed_object=keyframes.t_fixed_object - keyframes.R_fixed_object @ R_b_new @ shift,
            hull=hull,
            seen_at=hull_pixels(views, R_virtual_object, t_virtual_object, hull),
            offset_object=offset_object,
        ),
    )


def _view(crop: NDArray[np.uint8], angular_radius: float) -> View:
    """A keyframe's crop (S, S, 4), seen by a camera that looks straight at it."""
    size = crop.shape[0]
    focal, middle = FILL * size / 2 / angular_radius, (size - 1) / 2
    K = np.array([[focal, 0.0, middle], [0.0, focal, middle], [0.0, 0.0, 1.0]])
    image, mask = crop[..., :3], crop[..., 3]
    return View("", Crop(image, mask, np.eye(3), K, float(angular_radius), size / 2, roll_known=True), np.inf)
