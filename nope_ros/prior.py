"""Which rotations are possible, given what is known of gravity.

``free``      nothing is known: a grid over all rotations.
``upright``   the object keeps its up axis and gravity levels both crops: viewpoints on the sphere, of which those on
              the camera's side of the horizon count (341 of 642, as in NOPE, Sec. 4).
``standing``  as upright, and gravity is known in the query too: what remains is a turn about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nope_ros.frame import InputError
from nope_ros.rotations import exp, grid_rolls, icosphere, look_at, rotation_grid, turn_to

Array = NDArray[np.float64]
Prior = Literal["free", "upright", "standing"]
PRIORS: tuple[Prior, ...] = ("free", "upright", "standing")

FREEDOM: dict[Prior, int] = {"free": 3, "upright": 2, "standing": 1}
"""In how many directions a rotation can err, as far as gravity is true."""

# Of the grid over all rotations (``rotation_grid``): 4608 of them, 15° apart.
_FREE_LEVEL = 2
# Turns about gravity of an object that stands: 5° apart.
_YAWS = 72


@dataclass(frozen=True)
class Hypotheses:
    """Rotations to choose from.

    Attributes:
        rotations: (N, 3, 3), from the reference's virtual camera to the query's.
        log_weight: (N,) log of the unnormalised probability of each before the image is seen.
        spacing: distance of neighbours, radians; what lies between them is unknown.
    """

    rotations: Array
    log_weight: Array
    spacing: float


def hypotheses(
    prior: Prior, gravity_virtual_reference: Array | None, gravity_virtual_query: Array | None
) -> Hypotheses:
    """The rotations that a prior allows.

    Args:
        prior: see the module.
        gravity_virtual_reference: (3,) gravity in the reference's virtual camera; needed unless "free".
        gravity_virtual_query: (3,) gravity in the query's virtual camera; needed for "standing". For "upright", None
            means a level camera above the horizon.

    Raises:
        InputError: if gravity is missing.
    """
    resolve(prior, gravity_virtual_reference is not None, gravity_virtual_query is not None)
    if prior == "free" or gravity_virtual_reference is None:
        rotations = free_rotations()
        return Hypotheses(rotations, np.zeros(len(rotations)), float(np.radians(15)))
    if prior == "upright":
        below = gravity_virtual_query is not None and gravity_virtual_query[2] < 0
        height = viewpoints()[:, 2]
        weight = np.where(height <= 0 if below else height >= 0, 0.0, -np.inf)
        return Hypotheses(upright_rotations(gravity_virtual_reference), weight, float(np.radians(8)))
    assert gravity_virtual_query is not None
    rotations = standing_rotations(gravity_virtual_reference, gravity_virtual_query)
    # The yaws are 5° apart; the rest is what a swaying IMU and an object not quite as it stood add.
    return Hypotheses(rotations, np.zeros(len(rotations)), float(np.radians(8)))


def elevation(gravity_virtual: Array) -> float:
    """Elevation of a camera above the object's horizon, radians, from gravity (3,) in its own axes."""
    return float(np.arcsin(np.clip(gravity_virtual[2] / np.linalg.norm(gravity_virtual), -1, 1)))


def free_rotations() -> Array:
    """Relative rotations (4608, 3, 3) between virtual cameras when nothing is known, 15° apart."""
    return rotation_grid(_FREE_LEVEL)


def free_rolls() -> tuple[Array, Array]:
    """The same as rotations (192, 3, 3), and rolls (24,), radians, of the reference before each of them."""
    return grid_rolls(_FREE_LEVEL)


def viewpoints() -> Array:
    """Unit vectors (642, 3) from the object to the camera, object z up."""
    return icosphere(3)


def upright_rotations(gravity_virtual_reference: Array) -> Array:
    """Relative rotations (642, 3, 3) from the reference's level crop to the level crop at each viewpoint.

    Azimuth is counted from the reference.
    """
    return _upright_rotations(elevation(gravity_virtual_reference))


@lru_cache(maxsize=64)
def _upright_rotations(elevation: float) -> Array:
    R_reference = look_at(np.array([np.cos(elevation), 0.0, np.sin(elevation)]))
    rotations: Array = look_at(viewpoints()) @ R_reference.T
    rotations.setflags(write=False)
    return rotations


def standing_rotations(gravity_virtual_reference: Array, gravity_virtual_query: Array) -> Array:
    """All rotations (72, 3, 3) that take gravity in the reference to gravity in the query, 5° apart.

    Whatever the cameras' elevations: looking straight down, where azimuth and roll are one, is no special case.
    """
    yaw = exp(np.arange(_YAWS)[:, None] * [0.0, 0.0, 2 * np.pi / _YAWS])
    rotations: Array = turn_to(-gravity_virtual_query).T @ yaw @ turn_to(-gravity_virtual_reference)
    return rotations


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


def constrained(R: Array, prior: Prior, gravity_reference: Array | None, gravity_query: Array | None) -> Array:
    """The nearest rotation (3, 3) between virtual cameras that a prior allows; gravity (3,) in each of them."""
    if prior == "free" or gravity_reference is None:
        return R
    down = R @ gravity_reference
    if prior == "standing" and gravity_query is not None:
        wanted = gravity_query
    else:  # upright: down in the level crop, whatever the elevation
        wanted = np.array([0.0, max(down[1], 0.0), down[2] or 1e-9])
        wanted /= np.linalg.norm(wanted)
    # Along the great circle from where gravity would be to where it may be.
    axis = np.cross(down, wanted)
    sine = np.linalg.norm(axis)
    if sine < 1e-12:
        return R
    turned: Array = exp(axis / sine * np.arctan2(sine, down @ wanted)) @ R
    return turned
