"""What tests share that look at objects of known shape: meshes of blocks, and rendered frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nope_ros.frame import Frame
from nope_ros.rendering.mesh import Mesh, make_mesh
from nope_ros.rendering.render import Lighting, render

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Vertices (N, 3), faces (M, 3) and colours (N, 3)."""


def photograph(
    mesh: Mesh,
    R: np.ndarray,
    t: Sequence[float] | np.ndarray,
    K: np.ndarray,
    size: tuple[int, int] = (320, 240),
    lighting: Lighting | None = None,
) -> Frame:
    """A frame of a mesh at R_camera_mesh and t_camera_mesh; in even light unless another is given."""
    view = render(mesh, R, np.asarray(t, dtype=float), K, *size, lighting=lighting or Lighting.uniform())
    return Frame.from_arrays(view.rgb, view.mask, K)


def cuboid(size: Sequence[float], centre: Sequence[float] = (0, 0, 0), colour: Sequence[int] = (180, 180, 180)) -> Part:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * 0.5 * np.asarray(size) + centre
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))])
    return corners, faces, np.tile(np.uint8(colour), (8, 1))


def joined(*parts: Part) -> Mesh:
    vertices, faces, colours = zip(*parts, strict=True)
    starts = np.cumsum([0, *(len(v) for v in vertices)])
    faces = np.concatenate([f + start for f, start in zip(faces, starts[:-1], strict=True)])
    return make_mesh(np.concatenate(vertices), faces, colours=np.concatenate(colours))
