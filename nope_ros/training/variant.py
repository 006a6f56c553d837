"""Objects that never were, made from a mesh: reshaped, and in other colours or with other pictures on them.

A few hundred meshes are soon known by heart; what is learned of them then says little about the next object. A variant
keeps what real objects have and procedural ones lack (their parts, proportions and wear) and is another object: its
views match those of its siblings only up to what changed.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nope_ros.rendering.mesh import Mesh, make_mesh
from nope_ros.training.procedural import palette, picture

Floats = NDArray[np.float64]

PICTURE = 128
"""Side in pixels of each of the six pictures of a repainted object."""


def variant_of(mesh: Mesh, rng: Generator) -> Mesh:
    """Another object after the likeness of one: z still up, its shape always changed, its surface mostly.

    Args:
        mesh: any.
        rng: source of all randomness.
    """
    vertices = _reshaped(mesh.normalised()[0].vertices.astype(np.float64), rng)
    kind = rng.choice(3, p=(0.25, 0.45, 0.3))
    faces, uv, texture, colours = mesh.faces, mesh.uv, mesh.texture, mesh.colours
    if kind == 1:
        paint = _Repaint(rng)
        texture = None if texture is None else paint(texture)
        colours = None if colours is None or texture is not None else paint(colours)
    elif kind == 2:
        parts = colours is not None and rng.random() < 0.5  # its parts keep their own colours under the print
        colours = colours[faces].reshape(-1, 3) if colours is not None and parts else None
        vertices, faces, uv, texture = _printed(vertices, faces, rng)
    if texture is None and colours is None:
        colours = np.tile(np.clip(palette(rng, 1), 0, 255).astype(np.uint8), (len(vertices), 1))
    return make_mesh(vertices, faces, uv=uv, texture=texture, colours=colours, name=mesh.name)


def _reshaped(vertices: Floats, rng: Generator) -> Floats:
    """Stretched, and at times mirrored, tapered, leaning or bent: what no face, however large, is torn by."""
    x, y, z = vertices.T
    stretch = np.exp(rng.normal(0, 0.22, 3))
    if rng.random() < 0.4:  # what is round about its axis stays so
        stretch[1] = stretch[0]
    mirror = rng.choice((-1, 1))
    if rng.random() < 0.3:
        taper = 1 + rng.uniform(-0.4, 0.4) * z
        x, y = x * taper, y * taper
    if rng.random() < 0.2:
        x, y = x + rng.normal(0, 0.2) * z, y + rng.normal(0, 0.2) * z
    if rng.random() < 0.25:
        x, y, z = ((x, y, z + rng.normal(0, 0.3) * x * x), (x + rng.normal(0, 0.3) * z * z, y, z))[rng.integers(2)]
    return np.stack([mirror * x, y, z], 1) * stretch


class _Repaint:
    """One change of colours for all of an object: hues turned, more or less saturated, lighter or darker."""

    def __init__(self, rng: Generator) -> None:
        angle = rng.uniform(-np.pi, np.pi) if rng.random() < 0.7 else 0.0
        turn = Rotation.from_rotvec(np.full(3, angle / np.sqrt(3))).as_matrix()  # about grey
        grey = np.full((3, 3), 1 / 3)
        self._matrix = grey + (turn - grey) * rng.uniform(0.3, 1.5)
        self._gamma = float(np.exp(rng.normal(0, 0.35)))

    def __call__(self, colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
        mixed = np.clip(colours.reshape(-1, 3) / 255 @ self._matrix.T, 0, 1) ** self._gamma
        return (255 * mixed).round().astype(np.uint8).reshape(colours.shape)


def _printed(
    vertices: Floats, faces: NDArray[np.int32], rng: Generator
) -> tuple[Floats, NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]:
    """Six pictures, one from each side of a box around the object: (vertices, faces, uv, texture)."""
    corners = vertices[faces]
    turn = np.eye(3) if rng.random() < 0.7 else Rotation.random(rng=rng).as_matrix()
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) @ turn
    local = corners @ turn
    axis = np.abs(normal).argmax(1)
    side = 2 * axis + (np.take_along_axis(normal, axis[:, None], 1)[:, 0] < 0)
    low, high = local.min((0, 1)), local.max((0, 1))
    share = (local - low) / np.maximum(high - low, 1e-9)
    across = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    flat = np.take_along_axis(share, across[:, None, :].repeat(3, 1), 2)
    flat[..., 1] = 1 - flat[..., 1]  # rows run down
    inset = 1.5 / PICTURE
    cell = np.stack([side % 3, side // 3], 1)[:, None]
    uv = (cell + inset + flat * (1 - 2 * inset)) / (3, 2)
    colours = palette(rng)
    pictures = [picture(rng, PICTURE, colours) for _ in range(1 if rng.random() < 0.3 else 6)]
    texture = np.vstack([np.hstack([pictures[(3 * row + i) % len(pictures)] for i in range(3)]) for row in range(2)])
    unwelded = np.arange(3 * len(faces), dtype=np.int32).reshape(-1, 3)
    return corners.reshape(-1, 3), unwelded, uv.reshape(-1, 2).astype(np.float32), texture
