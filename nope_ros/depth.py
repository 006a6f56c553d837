"""What a depth camera saw of an object, a fit of it to correspondences, and one to a surface.

Depth images have holes, noise that grows with the square of the distance, points in the air where a pixel saw two
surfaces, and background where a mask is too large; ``measured_surface`` leaves these out. ``fit`` is Umeyama's (1991)
inside RANSAC, ``slide`` the point-to-plane variant of iterated closest points (Chen and Medioni, 1992). This is
geometry alone; ``nope_ros.settle`` chooses poses by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nope_ros.crop import FILL, Crop
from nope_ros.frame import Frame
from nope_ros.pose import ReferencePose
from nope_ros.rotations import exp, log

Array = NDArray[np.float64]

# To a side of the grid on which a surface is kept.
_CELLS = 48
# Between neighbouring pixels depth may step by this many widths of a pixel (a surface seen at 80°) and by the noise of
# a depth camera, metres for one at a metre.
_STEEPEST, _NOISE = 6.0, 0.005
# A mask's outermost pixels, as a share of its box's shorter side, often show what is behind the object.
_RIM = 0.02
# What is farther than this from the median surface is not the object, in radii of its circle.
_DEEPEST = 1.5
# Fewer points than this say nothing.
_LEAST = 12

# ``fit`` draws three points so many times.
_DRAWS = 200

# Sliding takes at most so many steps, and begins with this many tolerances.
_STEPS, _FIRST = 16, 8.0
# The information that holds a slide's start, as a share of all points' together.
_DAMPING = 5e-4


def surface_pixels(frame: Frame, radius: float) -> tuple[Array, Array, Array] | None:
    """The pixels of a frame whose depth is the object's.

    Args:
        frame: with mask and depth.
        radius: of the object, relative to its distance.

    Returns:
        x, y (N,) pixels, and z (N,) metres; None where too little is known.
    """
    if frame.depth is None:
        return None
    x0, y0, x1, y1 = frame.bbox_xyxy
    mask = frame.mask[y0:y1, x0:x1].astype(np.uint8)
    inner = frame.mask_within(_RIM)
    depth = frame.depth[y0:y1, x0:x1]
    known = np.isfinite(depth) & (mask > 0)
    if (known & (inner > 0)).sum() < _LEAST:
        return None
    around = np.ones((3, 3), np.uint8)
    farthest = cv2.dilate(np.where(known, depth, 0).astype(np.float32), around)
    nearest = cv2.erode(np.where(known, depth, 1e6).astype(np.float32), around)
    middle = float(np.median(depth[known & (inner > 0)]))
    smooth = farthest - nearest < _STEEPEST * middle / frame.camera.K[0, 0] + _NOISE * middle**2
    near = np.abs(depth - middle) < _DEEPEST * radius * middle
    y, x = np.nonzero(known & (inner > 0) & smooth & near)
    if len(y) < max(_LEAST, 0.05 * mask.sum()):
        return None
    return x.astype(np.float64) + x0, y.astype(np.float64) + y0, depth[y, x].astype(np.float64)


def measured_surface(frame: Frame, crop: Crop) -> Array | None:
    """Points (48, 48, 3) on the surface, metres, axes of the crop's virtual camera; NaN where none is known.

    Each is the mean of what a cell of the crop shows. None if there is no depth, or too little of it.
    """
    seen = surface_pixels(frame, crop.angular_radius)
    if seen is None:
        return None
    x, y, z = seen
    points = (np.column_stack([x, y, np.ones_like(x)]) @ np.linalg.inv(frame.camera.K).T) * z[:, None]
    points = points @ crop.R_virtual_camera.T
    place = (points[:, :2] / points[:, 2:]) / crop.angular_radius * FILL
    index = np.floor((place + 1) / 2 * _CELLS).astype(int)
    inside = ((index >= 0) & (index < _CELLS)).all(axis=1)
    flat = index[inside, 1] * _CELLS + index[inside, 0]
    count = np.bincount(flat, minlength=_CELLS**2)
    total = np.stack([np.bincount(flat, points[inside, n], _CELLS**2) for n in range(3)], axis=-1)
    with np.errstate(invalid="ignore"):
        mean: Array = total / count[:, None]
    return mean.reshape(_CELLS, _CELLS, 3)


def reference_depth(frame: Frame, crop: Crop, reference: ReferencePose) -> NDArray[np.float16] | None:
    """What a registered object keeps of its reference's depth; see ``RegisteredObject``.

    None where there is none, or where it contradicts the distance that the user gave.
    """
    surface = measured_surface(frame, crop)
    if surface is None or not reference.metric:
        return None
    z = (surface[..., 2] - reference.distance) / reference.radius
    if abs(float(np.nanmedian(z))) > 1:
        return None
    return z.astype(np.float16)


def sampled(surface: Array, places: Array, rho: float) -> Array:
    """Points (N, 3) of a surface (n, n, 3) at image coordinates (N, 2) in units of the circle, ``rho`` its tangent.

    Between the grid's points depth is interpolated; NaN in holes and across steps.
    """
    n = len(surface)
    z = surface[..., 2]
    at = (places * FILL + 1) / 2 * n - 0.5
    low = np.floor(at).astype(int)
    part = at - low
    total, weight, least, most = (np.full(len(places), value) for value in (0.0, 0.0, np.inf, -np.inf))
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = low[:, 0] + dx, low[:, 1] + dy
            inside = (x >= 0) & (x < n) & (y >= 0) & (y < n)
            value = np.where(inside, z[y.clip(0, n - 1), x.clip(0, n - 1)], np.nan)
            share = np.where(dx, part[:, 0], 1 - part[:, 0]) * np.where(dy, part[:, 1], 1 - part[:, 1])
            share = np.where(np.isfinite(value), share, 0.0)
            total, weight = total + share * np.nan_to_num(value), weight + share
            least, most = np.fmin(least, value), np.fmax(most, value)
    with np.errstate(invalid="ignore", divide="ignore"):
        depth = total / weight
    depth = np.where((weight > 0.4) & (most - least < 0.3 * rho * depth), depth, np.nan)
    return np.column_stack([places * rho, np.ones(len(places))]) * depth[:, None]


def normals_of(surface: Array) -> Array:
    """Unit normals (n, n, 3) towards the camera of a surface (n, n, 3); NaN where a neighbour is missing."""
    right, down = np.full_like(surface, np.nan), np.full_like(surface, np.nan)
    right[:, 1:-1] = surface[:, 2:] - surface[:, :-2]
    down[1:-1] = surface[2:] - surface[:-2]
    normal = np.cross(down, right)
    with np.errstate(invalid="ignore", divide="ignore"):
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        towards = -np.sign((normal * surface).sum(-1, keepdims=True))
    found: Array = normal * towards
    return found


@dataclass(frozen=True)
class Fit:
    """y ≈ R x + t.

    Attributes:
        R: (3, 3).
        t: (3,).
        count: number of points that agree.
        error: root mean square of their distances, in y's unit.
    """

    R: Array
    t: Array
    count: int
    error: float


def aligned(x: Array, y: Array, weights: Array, axis: Array | None = None) -> tuple[Array, Array]:
    """What brings points x to y, both (..., N, 3), with the least squared distances (Umeyama, 1991).

    Args:
        x: points.
        y: where they are.
        weights: (..., N).
        axis: (3,) unit vector about which alone x may turn; None: about any.

    Returns:
        Rotations (..., 3, 3) and translations (..., 3).
    """
    w = (weights / weights.sum(-1, keepdims=True).clip(1e-12))[..., None]
    x_mean, y_mean = (w * x).sum(-2, keepdims=True), (w * y).sum(-2, keepdims=True)
    x_centred, y_centred = x - x_mean, y - y_mean
    covariance = np.swapaxes(w * y_centred, -1, -2) @ x_centred
    if axis is None:
        U, S, Vt = np.linalg.svd(covariance)
        flip = np.ones_like(S)
        flip[..., 2] = np.sign(np.linalg.det(U @ Vt))
        R = (U * flip[..., None, :]) @ Vt
    else:
        C = covariance
        across = np.stack([C[..., 2, 1] - C[..., 1, 2], C[..., 0, 2] - C[..., 2, 0], C[..., 1, 0] - C[..., 0, 1]], -1)
        along = np.trace(C, axis1=-2, axis2=-1) - C @ axis @ axis
        R = exp(np.arctan2(across @ axis, along)[..., None] * axis)
    t = (y_mean - x_mean @ np.swapaxes(R, -1, -2))[..., 0, :]
    return R, t


def fit(
    x: Array,
    y: Array,
    weights: Array,
    tolerance: float,
    rng: Generator,
    *,
    axis: Array | None = None,
    start: tuple[Array, Array] | None = None,
) -> Fit | None:
    """Umeyama's fit to the points that agree, found by RANSAC.

    Draws compete by the weight that agrees with them, not by its share of what they could see: with few points that
    share is easily large.

    Args:
        x: (N, 3).
        y: (N, 3), NaN where it is not known.
        weights: (N,) not negative; draws prefer large ones.
        tolerance: of agreement, in y's unit.
        rng: source of the draws.
        axis: (3,) unit vector about which alone x may turn; None: about any.
        start: R (3, 3) and t (3,) to compete with the draws.

    Returns:
        None if fewer than six points are known.
    """
    known = np.isfinite(y).all(-1) & np.isfinite(x).all(-1) & (weights > 0)
    if known.sum() < 6:
        return None
    x, y, weights = x[known], y[known], weights[known] / weights[known].sum()
    chosen = np.stack([rng.choice(len(x), 3, replace=False, p=weights) for _ in range(_DRAWS)])
    R, t = aligned(x[chosen], y[chosen], np.ones(chosen.shape), axis)
    if start is not None:
        R, t = np.concatenate([start[0][None], R]), np.concatenate([start[1][None], t])

    def distance(R: Array, t: Array) -> Array:
        moved = x @ np.swapaxes(R, -1, -2) + t[..., None, :]
        found: Array = np.linalg.norm(moved - y, axis=-1)
        return found

    agreed = (weights * np.clip(1 - (distance(R, t) / tolerance) ** 2, 0, None)).sum(-1)
    best = int(np.argmax(agreed))
    R, t = R[best], t[best]
    for _ in range(10):
        bowl = np.clip(1 - (distance(R, t) / tolerance) ** 2, 0, None)  # Tukey's weights
        if (bowl > 0).sum() < 6:
            break
        R, t = aligned(x, y, weights * bowl, axis)
    apart = distance(R, t)
    inside = apart < tolerance
    error = float(np.sqrt(np.mean(apart[inside] ** 2))) if inside.any() else np.inf
    return Fit(R, t, int(inside.sum()), error)


@dataclass(frozen=True)
class Model:
    """The surface of an object as far as it is known, in its own frame.

    Attributes:
        points: (M, 3).
        normals: (M, 3) unit vectors, outwards.
        radius: of the object, in the points' unit.
    """

    points: Array
    normals: Array
    radius: float

    @cached_property
    def tree(self) -> cKDTree:
        """To find the nearest of the points."""
        return cKDTree(self.points)


@dataclass(frozen=True)
class Slid:
    """Where ``slide`` ended.

    Attributes:
        R: (3, 3) R_camera_object.
        t: (3,).
        after: mean squared distance between the surfaces, cut at the tolerance, relative to it.
        information: (6, 6) of a turn about the object's centre and a shift in radii, camera axes, if the distances
            between the surfaces, in radii, had a standard deviation of one.
        overlap: share of the seen points that have a partner.
    """

    R: Array
    t: Array
    after: float
    information: Array
    overlap: float


def slide(
    seen: Array,
    normals: Array,
    model: Model,
    R: Array,
    t: Array,
    centre: Array,
    *,
    tolerance: float,
    axis: Array | None = None,
) -> Slid | None:
    """Slide what was seen onto the object's surface: iterated closest points, point to plane.

    Where the shape does not say how to turn, as of a sphere, nothing turns: a little damping holds what the surfaces
    leave open.

    Args:
        seen: (N, 3) camera axes.
        normals: (N, 3) of it, towards the camera; NaN where not known.
        model: of the object.
        R: (3, 3) R_camera_object to start from.
        t: (3,).
        centre: (3,) camera axes, that turns are about.
        tolerance: of the last steps, in radii of the object: more apart does not belong together.
        axis: (3,) unit vector about which alone the object may turn; None: about any.

    Returns:
        None if too little of what was seen is near to what is known.
    """
    radius = model.radius
    keep = np.isfinite(seen).all(-1) & np.isfinite(normals).all(-1)
    seen, normals = seen[keep], normals[keep]
    if len(seen) < _LEAST:
        return None
    free = np.eye(6)
    if axis is not None:
        free[:3, :3] = np.outer(axis, axis)

    def pairs(R: Array, t: Array, limit: float) -> tuple[Array, Array, NDArray[np.bool_]]:
        """Distances to the planes of the nearest points, in radii, these planes' normals, and which count."""
        apart, nearest = model.tree.query((seen - t) @ R)
        normal = model.normals[nearest] @ R.T
        distance = ((seen - t - model.points[nearest] @ R.T) * normal).sum(-1) / radius
        facing = (normal * normals).sum(-1) > 0.5
        return distance, normal, (apart < 2 * limit * radius) & (np.abs(distance) < limit) & facing

    R_start, start = R, centre
    limits = np.geomspace(_FIRST * tolerance, tolerance, _STEPS - 4)
    information = np.zeros((6, 6))
    for number in range(_STEPS):
        limit = float(limits[min(number, len(limits) - 1)])
        distance, normal, good = pairs(R, t, limit)
        if good.sum() < _LEAST:
            return None
        bowl = np.where(good, 1 - (distance / limit) ** 2, 0.0) ** 2
        arm = (seen - centre) / radius
        J = np.concatenate([np.cross(arm, normal), normal], axis=-1) @ free
        information = (J * bowl[:, None]).T @ J
        held = _DAMPING * len(seen) * np.eye(6)
        # What was moved since the start pulls back.
        moved = np.concatenate([log(R @ R_start.T), (centre - start) / radius])
        step = free @ np.linalg.solve(information + held, (J * bowl[:, None]).T @ distance - held @ moved)
        turn = exp(step[:3])
        R, t = turn @ R, turn @ (t - centre) + centre + radius * step[3:]
        centre = centre + radius * step[3:]
        if np.abs(step).max() < 1e-4 and number >= len(limits):
            break
    distance, _, good = pairs(R, t, tolerance)
    after = float(np.where(good, (distance / tolerance) ** 2, 1.0).mean())
    return Slid(R, t, after, information, float(good.mean()))
