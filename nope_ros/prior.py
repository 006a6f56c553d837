"""Which rotations are possible, given what is known of gravity.

``free``      nothing is known: a grid over all rotations.
``upright``   the object keeps its up axis and gravity levels both crops: viewpoints on the sphere, of which those on
              the camera's side of the horizon count (341 of 642, as in NOPE, Sec. 4).
``standing``  as upright, and the query's elevation is read off gravity too: what remains is the yaw.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nope_ros.frame import InputError
from nope_ros.rotations import icosphere, look_at, rotation_grid

Array = NDArray[np.float64]
Prior = Literal["free", "upright", "standing"]
PRIORS: tuple[Prior, ...] = ("free", "upright", "standing")

# Error of an elevation: the viewpoints' own spacing (8°), a swaying IMU, an object not quite as it stood.
ELEVATION_SIGMA = np.radians(5.0)


def elevation(gravity_virtual: Array) -> float:
    """Elevation of a camera above the object's horizon, radians, from gravity (3,) in its own axes."""
    return float(np.arcsin(np.clip(gravity_virtual[2] / np.linalg.norm(gravity_virtual), -1, 1)))


def free_rotations(level: int = 2) -> Array:
    """Relative rotations (N, 3, 3) between virtual cameras when nothing is known: 4608 of them, 15° apart."""
    return rotation_grid(level)


def viewpoints(level: int = 3) -> Array:
    """Unit vectors (642, 3) from the object to the camera, object z up."""
    return icosphere(level)


def upright_rotations(gravity_virtual_reference: Array) -> Array:
    """Relative rotations (642, 3, 3) from the reference's level crop to the level crop at each viewpoint.

    Azimuth is counted from the reference.
    """
    angle = elevation(gravity_virtual_reference)
    R_reference = look_at(np.array([np.cos(angle), 0.0, np.sin(angle)]))
    rotations: Array = look_at(viewpoints()) @ R_reference.T
    return rotations


def log_prior(prior: Prior, gravity_virtual_query: Array | None) -> Array:
    """Log of the (unnormalised) prior probability of each rotation of ``upright_rotations``: (642,).

    Args:
        prior: "upright" or "standing".
        gravity_virtual_query: gravity (3,) in the query's virtual camera; None where only "level" is known (upright):
            the camera is then taken to be above the horizon.

    Raises:
        InputError: for "standing" without the query's gravity.
    """
    height = viewpoints()[:, 2]
    if prior == "standing":
        if gravity_virtual_query is None:
            raise InputError("prior 'standing' needs gravity in this image too; give gravity_camera or use 'free'")
        error = np.arcsin(height) - elevation(gravity_virtual_query)
        weight: Array = -0.5 * (error / ELEVATION_SIGMA) ** 2
        return weight
    below = gravity_virtual_query is not None and gravity_virtual_query[2] < 0
    return np.where(height <= 0 if below else height >= 0, 0.0, -np.inf)


def resolve(prior: Prior | None, reference_knows_gravity: bool, query_knows_gravity: bool) -> Prior:
    """The prior to use: the one asked for, or the strongest that gravity allows.

    Raises:
        InputError: if the prior asked for needs gravity that was not given.
    """
    if prior is None:
        return "standing" if reference_knows_gravity and query_knows_gravity else "free"
    if prior not in PRIORS:
        raise InputError(f"prior '{prior}' is unknown; known: {', '.join(PRIORS)}")
    if prior != "free" and not reference_knows_gravity:
        raise InputError(
            f"prior '{prior}' needs gravity in the reference image; register again with gravity_camera, or use 'free'"
        )
    if prior == "standing" and not query_knows_gravity:
        raise InputError("prior 'standing' needs gravity in this image too; give gravity_camera, or use 'free'")
    return prior
