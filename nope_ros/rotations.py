"""Rotation conventions and grids.

Rotations are numpy arrays (..., 3, 3) acting on column vectors; scipy does the conversions. The object's axes for
viewpoints have z up. A viewpoint is the unit vector from the object to the camera, in the object frame.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]


def relative_rotation(R_camera_object_query: Array, R_camera_object_reference: Array) -> Array:
    """The rotation, in camera axes, that takes the reference view to the query view: R_q R_rᵀ. Shapes (..., 3, 3)."""
    product: Array = R_camera_object_query @ np.swapaxes(R_camera_object_reference, -1, -2)
    return product


def geodesic_distance(R_a: Array, R_b: Array) -> Array:
    """Angle between rotations (..., 3, 3), radians in [0, π].

    Taken from the chord ‖R_a − R_b‖ rather than from the trace: acos loses all digits near zero.
    """
    chord = np.linalg.norm(np.asarray(R_a) - np.asarray(R_b), axis=(-2, -1))
    angle: Array = 2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1))
    return angle


def exp(rotation_vector: Array) -> Array:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3) in radians."""
    vectors = np.asarray(rotation_vector, dtype=np.float64)
    return Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix().reshape(*vectors.shape[:-1], 3, 3)


def log(R: Array) -> Array:
    """Rotation vectors (..., 3) in radians, length at most π, of rotation matrices (..., 3, 3)."""
    R = np.asarray(R)
    return Rotation.from_matrix(R.reshape(-1, 3, 3)).as_rotvec().reshape(*R.shape[:-2], 3)


def exp_jacobian(rotation_vector: Array) -> Array:
    """J (..., 3, 3) of rotation vectors v (..., 3), radians: exp(v + δ) = exp(J δ) exp(v) to first order in δ."""
    angle = np.linalg.norm(rotation_vector, axis=-1)[..., None, None]
    axis = (rotation_vector / np.maximum(angle[..., 0], 1e-12))[..., None, :]
    along = np.swapaxes(axis, -1, -2) * axis
    across = np.cross(np.eye(3), axis)  # rows e_i × axis: the matrix that takes x to axis × x
    kept = np.sinc(angle / np.pi)  # sin θ / θ
    turned = np.sin(angle / 2) * np.sinc(angle / (2 * np.pi))  # (1 − cos θ) / θ
    jacobian: Array = kept * np.eye(3) + (1 - kept) * along + turned * across
    return jacobian


def turn_to(ray: Array) -> Array:
    """Rotation R_virtual_camera (3, 3) of a camera turned to look along a ray (3,), camera axes.

    The turn is the smallest one, so it adds no roll of its own.
    """
    ray = ray / np.linalg.norm(ray)
    axis = np.cross(ray, [0.0, 0.0, 1.0])
    sine = float(np.linalg.norm(axis))
    if sine > 1e-12:
        return exp(axis / sine * np.arctan2(sine, ray[2]))
    # Along the axis already, or against it: half a turn about x.
    return np.diag([1.0, np.sign(ray[2]), np.sign(ray[2])])


def twist(R: Array) -> Array:
    """The turn about z (...,) in R (..., 3, 3), radians: R = R_z(twist) · (a turn about an axis in the xy plane)."""
    angle: Array = np.arctan2(R[..., 1, 0] - R[..., 0, 1], R[..., 0, 0] + R[..., 1, 1])
    return angle


@cache
def icosphere(level: int) -> Array:
    """Unit vectors (10·4^level + 2, 3) of a subdivided icosahedron: 12, 42, 162, 642, 2562 points.

    The icosahedron has a vertex at the pole, the orientation in which 341 of the 642 points have z ≥ 0.
    """
    ring = np.arange(5) * (2 * np.pi / 5)
    height, radius = 1 / 5**0.5, 2 / 5**0.5
    upper = np.stack([radius * np.cos(ring), radius * np.sin(ring), np.full(5, height)], axis=1)
    lower = np.stack(
        [radius * np.cos(ring + np.pi / 5), radius * np.sin(ring + np.pi / 5), np.full(5, -height)], axis=1
    )
    vertices = [np.array([0.0, 0.0, 1.0]), *upper, *lower, np.array([0.0, 0.0, -1.0])]
    near = np.linalg.norm(np.array(vertices)[:, None] - np.array(vertices)[None], axis=-1) < 1.1  # edges are 1.05 long
    faces = [
        (i, j, k) for i in range(12) for j in range(i) for k in range(j) if near[i, j] and near[j, k] and near[i, k]
    ]
    for _ in range(level):
        midpoints: dict[tuple[int, int], int] = {}

        def midpoint(a: int, b: int, midpoints: dict[tuple[int, int], int] = midpoints) -> int:
            key = (min(a, b), max(a, b))
            if key not in midpoints:
                middle = vertices[a] + vertices[b]
                vertices.append(middle / np.linalg.norm(middle))
                midpoints[key] = len(vertices) - 1
            return midpoints[key]

        split = []
        for a, b, c in faces:
            ab, bc, ca = midpoint(a, b), midpoint(b, c), midpoint(c, a)
            split += [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
        faces = split
    result = np.array(vertices)
    result[np.abs(result) < 1e-12] = 0  # points on the equator are on it, whatever the rounding
    result.setflags(write=False)
    return result


def look_at(viewpoint: Array) -> Array:
    """R_camera_object (..., 3, 3) of cameras at viewpoints (..., 3), looking at the origin, object z up in the image.

    Straight above and below, where "up in the image" is undefined, object y takes the place of z.
    """
    forward = -np.asarray(viewpoint) / np.linalg.norm(viewpoint, axis=-1, keepdims=True)
    up = np.broadcast_to([0.0, 0.0, 1.0], forward.shape)
    up = np.where(np.abs(forward[..., 2:]) > 1 - 1e-9, np.array([0.0, 1.0, 0.0]), up)
    right = np.cross(forward, up)
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    return np.stack([right, np.cross(forward, right), forward], axis=-2)


@cache
def rotation_grid(level: int) -> Array:
    """An equivolumetric grid on SO(3), (72·8^level, 3, 3): 72, 576, 4608, 36864 rotations, 60°/2^level apart.

    Viewing directions are the centres of 12·4^level equal-area HEALPix cells (Górski et al. 2005), each with 6·2^level
    rolls; rolls start at a different angle from cell to cell so that no direction is favoured
    (the Hopf construction of Yershova et al. 2010).
    """
    unrolled, rolls = grid_rolls(level)
    grid: Array = (unrolled[:, None] @ exp(rolls[:, None] * [0.0, 0.0, 1.0])).reshape(-1, 3, 3)
    grid.setflags(write=False)
    return grid


def grid_rolls(level: int) -> tuple[Array, Array]:
    """What ``rotation_grid`` is made of: rotations (12·4^level, 3, 3) and rolls about z (6·2^level,) before each."""
    directions = _healpix_centres(2**level)
    polar = np.arccos(directions[:, 2])
    azimuth = np.arctan2(directions[:, 1], directions[:, 0])
    # Roll measured against the direction's own azimuth keeps neighbours aligned: this is the Hopf fibre coordinate.
    unrolled = Rotation.from_euler("ZYZ", np.stack([azimuth, polar, -azimuth], axis=1)).as_matrix()
    count = 6 * 2**level
    return unrolled, np.arange(count) * (2 * np.pi / count)


def _healpix_centres(n_side: int) -> Array:
    """Centres (12·n_side², 3) of the HEALPix cells in ring order."""
    points = []
    for ring in range(1, 4 * n_side):
        if ring < n_side:  # north cap
            z, cells, phase = 1 - ring**2 / (3 * n_side**2), 4 * ring, 0.5
        elif ring <= 3 * n_side:  # belt
            z, cells, phase = 4 / 3 - 2 * ring / (3 * n_side), 4 * n_side, 0.5 * ((ring - n_side + 1) % 2)
        else:  # south cap
            south = 4 * n_side - ring
            z, cells, phase = south**2 / (3 * n_side**2) - 1, 4 * south, 0.5
        azimuth = (np.arange(cells) + phase) * (2 * np.pi / cells)
        radius = np.sqrt(1 - z * z)
        points.append(np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), np.full(cells, z)], axis=1))
    return np.concatenate(points)
