"""Objects of which there is a mesh: templates are renders of it, not predictions, and everything after is the same.

PicoPose (Liu et al., 2025) renders 162 views; so does this. A rotation between two views is the nearest view's latent,
turned by the few degrees that are left, which the predictor does well. The object's frame is the mesh's own frame, and
the mesh is taken to be in metres, so that poses are metric.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.crop import FILL, Crop, depth_through, virtual_crop
from nope_ros.frame import Frame, InputError
from nope_ros.latent import Predictor, RotatedLatentPredictor
from nope_ros.match import TemplateBank
from nope_ros.pose import Sides, check_lengths
from nope_ros.rendering.files import MESH_SUFFIXES
from nope_ros.rotations import icosphere, look_at, turn_to

if TYPE_CHECKING:  # needs numba and trimesh, which whoever has no mesh can do without
    from nope_ros.rendering.mesh import Mesh

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

_MOST_BYTES = 256 * 2**20
_MOST_FACES = 1_000_000
_SMALLEST, _LARGEST = 0.001, 20.0  # diameter, metres
_RENDER_SIZE = 160  # pixels
_DISTANCE = 4.0  # of the camera, in radii of the mesh
_ENCODED_AT_A_TIME = 32  # others may encode in between


@dataclass(frozen=True)
class RenderedViews(Sides):
    """Renders of a mesh from all around; lengths are metres.

    Attributes:
        latents: (V, D).
        depth: (V, S/4, S/4) float16 depth of the surface behind the circle's centre, in units of the circle's radius
            there; NaN where there is none.
    """

    latents: Tensor
    depth: NDArray[np.float16]

    def bank(self, predictor: Predictor, rotations: Array, R_reference: Array) -> TemplateBank:
        """Templates at rotations (N, 3, 3) from the reference, whose own rotation is ``R_reference`` (3, 3)."""
        wanted = rotations @ R_reference
        nearest = self.nearest(wanted)
        turns = wanted @ np.swapaxes(self.R[nearest], 1, 2)
        bank = TemplateBank.of_views(predictor, self.latents, rotations, nearest, turns)
        if isinstance(predictor, RotatedLatentPredictor):
            bank = replace(bank, identities=self.latents[:, : predictor.latent_shape[1]])
        return bank


def read_mesh(path: str | Path, *, object_diameter: float | None = None) -> Mesh:
    """Read a mesh file, in its own frame, metres.

    Args:
        path: a file that trimesh reads.
        object_diameter: metres; the mesh is scaled to it. None: the mesh is in metres.

    Raises:
        InputError: saying what is wrong with the file.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in MESH_SUFFIXES:
        raise InputError(f"mesh_file: {file} is not a mesh; give a {', '.join(MESH_SUFFIXES)} file")
    if not file.is_file():
        raise InputError(f"mesh_file: there is no file {file}")
    if not os.access(file, os.R_OK):
        raise InputError(f"mesh_file: {file} may not be read by this user; change its permissions")
    if file.stat().st_size > _MOST_BYTES:
        raise InputError(f"mesh_file: {file} is larger than {_MOST_BYTES // 2**20} MB; simplify the mesh")
    try:
        from nope_ros.rendering.mesh import load_mesh
    except ModuleNotFoundError as error:
        raise InputError(f"mesh_file: needs {error.name}; pip install numba trimesh") from None
    try:
        mesh = load_mesh(file, up="z")  # "z": as it is
    except ModuleNotFoundError as error:
        raise InputError(f"mesh_file: needs {error.name}; pip install {error.name}") from None
    except Exception as error:  # trimesh has one for each format
        raise InputError(f"mesh_file: {file} cannot be read as a mesh ({type(error).__name__}: {error})") from None
    if len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
        raise InputError(f"mesh_file: {file} holds no triangles, or coordinates that are not finite")
    if len(mesh.faces) > _MOST_FACES:
        raise InputError(f"mesh_file: {file} has {len(mesh.faces)} faces, at most {_MOST_FACES} are taken; simplify it")
    diameter = 2 * mesh.normalised()[1]
    if object_diameter is not None:
        check_lengths(object_diameter=object_diameter)
        return replace(mesh, vertices=mesh.vertices * np.float32(object_diameter / diameter))
    if not _SMALLEST <= diameter <= _LARGEST:
        raise InputError(
            f"mesh_file: {file} is {diameter:g} m across; meshes are in metres, so scale it (by 0.001 if it is in "
            "millimetres) or give object_diameter"
        )
    return mesh


def view_rotations(up: Array | None = None) -> Array:
    """R_camera_object (163, 3, 3) of cameras all around, the first of which is the reference: level, from a bit above.

    ``up`` (3,) is a unit vector, object frame; z if it is not known.
    """
    R_upright_object = turn_to(np.array([0.0, 0.0, 1.0]) if up is None else up)
    front = np.array([[np.cos(np.radians(30)), 0.0, np.sin(np.radians(30))]])
    rotations: Array = look_at(np.concatenate([front, icosphere(2)])) @ R_upright_object
    return rotations


def render_views(
    mesh: Mesh,
    rotations: Array,
    crop_size: int,
    encode: Callable[[list[Crop]], Tensor],
    gravity_object: Array | None = None,
    progress: Progress | None = None,
) -> RenderedViews:
    """Look at a mesh from all around.

    Args:
        mesh: in metres.
        rotations: (V, 3, 3) R_camera_object.
        crop_size: side of a crop, pixels.
        encode: crops to latents (B, D).
        gravity_object: (3,) direction of gravity (down) in the mesh's frame, if it is known; crops are level then.
        progress: called with the number of views done and their total.
    """
    from nope_ros.rendering.render import render

    unit, radius, offset = mesh.normalised()
    focal = FILL / 2 * _RENDER_SIZE * np.sqrt(_DISTANCE**2 - 1)
    middle = (_RENDER_SIZE - 1) / 2
    K = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]])
    t = np.array([0.0, 0.0, _DISTANCE])
    parts: list[tuple[Array, NDArray[np.uint8], NDArray[np.float16], float, float, Array]] = []
    latents: list[Tensor] = []
    waiting: list[Crop] = []
    for number, R in enumerate(rotations):
        view = render(unit, R, t, K, _RENDER_SIZE, _RENDER_SIZE)
        try:
            down = None if gravity_object is None else R @ gravity_object
            crop = virtual_crop(Frame.from_arrays(view.rgb, view.mask, K), crop_size, down)
        except InputError:  # a sheet seen edge-on shows nothing to compare with
            crop = None
        if crop is not None:
            away = float(crop.R_virtual_camera[2] @ t)
            seen = depth_through(np.where(view.depth > 0, view.depth, np.nan), K, crop, crop_size // 4)
            R_virtual = crop.R_virtual_camera @ R
            # From the circle's centre to the middle of the mesh, and on to the mesh's origin.
            to_middle = R_virtual.T @ (crop.R_virtual_camera @ t - np.array([0.0, 0.0, away]))
            parts.append(
                (
                    R_virtual,
                    np.dstack([crop.image, crop.mask]),
                    ((seen - away) / (away * crop.angular_radius)).astype(np.float16),
                    away * radius,
                    crop.angular_radius,
                    to_middle * radius - offset,
                )
            )
            waiting.append(crop)
        if len(waiting) == _ENCODED_AT_A_TIME:
            latents.append(encode(waiting))
            waiting = []
        if progress is not None:
            progress(number + 1, len(rotations))
    if waiting:
        latents.append(encode(waiting))
    if not parts:
        raise InputError("mesh_file: nothing of the mesh can be seen; is it a single line?")
    R, crops, depth, distance, angular_radius, offset_object = (np.stack([part[n] for part in parts]) for n in range(6))
    return RenderedViews(R, crops, distance, angular_radius, offset_object, torch.cat(latents), depth)
