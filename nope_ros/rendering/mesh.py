"""Triangle meshes as the renderer wants them: z up, one texture, a normal per face corner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CREASE_ANGLE = np.radians(40.0)
"""Faces that meet at less than this are shaded as one smooth surface."""

UP_AXIS_DEFAULT = "y"
"""glTF says y is up; sources that were converted without turning are listed in `SOURCE_UP_AXIS`."""

SOURCE_UP_AXIS: dict[str, str] = {
    # Made for Gazebo (z up) and converted without turning: read as y up, tables, cars and shelves lie on their side.
    "aws_bookstore": "z",
    "aws_hospital": "z",
    "aws_small_house": "z",
    "aws_small_warehouse": "z",
    "gazebo_models": "z",
    # Scans on a turntable, z up: read as y up, figures lie on their back and the scissors stand.
    "gso_vima_procedural_colour": "z",
    # Made for PyBullet (z up): read as y up, mugs and jars lie on their side.
    "pybullet_urdf_models": "z",
    # Exported from a body's own frame, unlike the rest of its source (glTF from Poly Haven, y up).
    "drake_models/skydio_2": "z",
    # kaykit_*, drake_models: glTF as its authors wrote it, y up. bullet_random_*: no up, any axis serves.
}
"""Folder of a mesh (or folder/name) → the axis that points up in its file, found by looking at renders of them all."""


@dataclass(frozen=True)
class Mesh:
    """A coloured triangle mesh, z up.

    The albedo of a surface point is the product of what is given: texture × vertex colour (white where neither is).
    """

    vertices: Floats
    """(V, 3), object frame."""
    faces: NDArray[np.int32]
    """(F, 3) vertex indices; the winding need not be consistent, shading is two-sided."""
    normals: Floats
    """(F, 3, 3) unit normal of every face corner, so that a crease needs no duplicated vertices."""
    uv: Floats | None = None
    """(V, 2); (0, 0) is the top left corner of the texture's first pixel, v runs down its rows; repeats."""
    texture: NDArray[np.uint8] | None = None
    """(h, w, 3) sRGB."""
    colours: NDArray[np.uint8] | None = None
    """(V, 3) sRGB."""
    name: str = ""

    @property
    def radius(self) -> float:
        """Largest distance of a vertex from the frame's origin."""
        return float(np.sqrt((self.vertices.astype(np.float64) ** 2).sum(1).max()))

    def normalised(self) -> tuple[Mesh, float, NDArray[np.float64]]:
        """The mesh centred at its bounding-box centre with its farthest vertex at distance 1.

        Returns (mesh, scale, offset) with `vertices_here = scale * vertices_normalised + offset`.
        """
        vertices = self.vertices.astype(np.float64)
        offset = 0.5 * (vertices.min(0) + vertices.max(0))
        vertices -= offset
        scale = float(np.sqrt((vertices**2).sum(1).max())) or 1.0
        return replace(self, vertices=np.ascontiguousarray(vertices / scale, np.float32)), scale, offset

    def rotated(self, R: NDArray[np.floating]) -> Mesh:
        """The mesh with vertices and normals turned by R (3, 3)."""
        R = np.asarray(R, np.float64)
        return replace(
            self,
            vertices=np.ascontiguousarray(self.vertices @ R.T, np.float32),
            normals=np.ascontiguousarray(self.normals @ R.T, np.float32),
        )


def make_mesh(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    *,
    uv: NDArray[np.floating] | None = None,
    texture: NDArray[np.uint8] | None = None,
    colours: NDArray[np.uint8] | None = None,
    crease: float = CREASE_ANGLE,
    name: str = "",
) -> Mesh:
    """A `Mesh` from bare arrays: drops degenerate faces and finds the corner normals (crease in radians)."""
    points = np.ascontiguousarray(vertices, np.float32)
    triangles = np.ascontiguousarray(faces, np.int32)
    triangles = triangles[_face_areas(points, triangles) > 0]
    return Mesh(
        vertices=points,
        faces=triangles,
        normals=corner_normals(points, triangles, crease),
        uv=None if uv is None else np.ascontiguousarray(uv, np.float32),
        texture=None if texture is None else np.ascontiguousarray(texture[..., :3], np.uint8),
        colours=None if colours is None else np.ascontiguousarray(np.asarray(colours)[:, :3], np.uint8),
        name=name,
    )


_TO_Z_UP = {
    "x": [[0, 1, 0], [0, 0, 1], [1, 0, 0]],  # x → z, y → x, z → y
    "y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],  # y → z, z → −y
    "z": None,
}
UP_AXES = tuple(_TO_Z_UP)


def load_mesh(path: str | Path, *, up: str | None = None) -> Mesh:
    """Reads any file trimesh can read and turns it z up.

    up: axis that points up in the file, of `UP_AXES`; by default `SOURCE_UP_AXIS` of the file's folder decides.
    """
    import trimesh  # here, so that renders of procedural objects do not need it

    path = Path(path)
    loaded: Any = trimesh.load(path, force="mesh", process=False)
    uv, texture, colours = _appearance(loaded.visual, len(loaded.vertices))
    mesh = make_mesh(loaded.vertices, loaded.faces, uv=uv, texture=texture, colours=colours, name=path.stem)
    axis = up or SOURCE_UP_AXIS.get(f"{path.parent.name}/{path.stem}")
    axis = axis or SOURCE_UP_AXIS.get(path.parent.name, UP_AXIS_DEFAULT)
    if axis not in _TO_Z_UP:
        raise ValueError(f"{path}: up axis is {axis!r}; give one of {', '.join(UP_AXES)}")
    turn = _TO_Z_UP[axis]
    return mesh if turn is None else mesh.rotated(np.array(turn))


def _appearance(
    visual: Any, vertex_count: int
) -> tuple[Floats | None, NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """(uv, texture, colours) of a trimesh visual, each None where the file has none."""
    if visual.kind != "texture":
        if visual.kind is None:
            return None, None, None
        return None, None, np.asarray(visual.vertex_colors)[:, :3]
    material = visual.material
    image = getattr(material, "baseColorTexture", None)
    if image is None:
        image = getattr(material, "image", None)
    factor = getattr(material, "baseColorFactor", None)
    if factor is None and image is None:
        factor = getattr(material, "diffuse", None)
    colours = None
    if factor is not None:
        tint = np.asarray(factor, np.float64)[:3]
        tint = tint * 255 if np.asarray(factor).dtype.kind == "f" and tint.max() <= 1 else tint
        colours = np.tile(tint.round().astype(np.uint8), (vertex_count, 1))
    if image is None or visual.uv is None:
        return None, None, colours
    # trimesh counts v up from the bottom row, our rasteriser counts rows down as images do.
    uv = np.asarray(visual.uv, np.float32) * (1, -1) + (0, 1)
    return uv, np.asarray(image.convert("RGB")), colours


def corner_normals(vertices: Floats, faces: NDArray[np.int32], crease: float = CREASE_ANGLE) -> Floats:
    """(F, 3, 3) unit normals: area-weighted over the faces around a corner that lie within `crease` of its own face.

    Vertices at one position count as one, since files duplicate them along texture seams.
    """
    if not len(faces):
        return np.zeros((0, 3, 3), np.float32)
    extent = float(np.ptp(vertices, axis=0).max()) or 1.0
    keys = np.round((vertices - vertices.min(0)) * (2**20 / extent)).astype(np.int64)
    _, welded = np.unique(keys[:, 0] << 42 | keys[:, 1] << 21 | keys[:, 2], return_inverse=True)
    return _corner_normals(vertices, faces, welded.astype(np.int32), int(welded.max()) + 1, float(np.cos(crease)))


def _face_areas(vertices: Floats, faces: NDArray[np.int32]) -> Floats:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1)


@njit(cache=True, nogil=True)
def _corner_normals(
    vertices: Floats, faces: NDArray[np.int32], welded: NDArray[np.int32], welded_count: int, cos_crease: float
) -> Floats:
    count = faces.shape[0]
    area = np.zeros((count, 3))  # normals as long as twice the face's area
    unit = np.zeros((count, 3))
    start = np.zeros(welded_count + 1, np.int64)
    for f in range(count):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = float(b[0] - a[0]), float(b[1] - a[1]), float(b[2] - a[2])
        vx, vy, vz = float(c[0] - a[0]), float(c[1] - a[1]), float(c[2] - a[2])
        x, y, z = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = max(np.sqrt(x * x + y * y + z * z), 1e-30)
        area[f, 0], area[f, 1], area[f, 2] = x, y, z
        unit[f, 0], unit[f, 1], unit[f, 2] = x / length, y / length, z / length
        for k in range(3):
            start[welded[faces[f, k]] + 1] += 1
    for i in range(welded_count):
        start[i + 1] += start[i]
    fill = start[:-1].copy()
    around = np.empty(3 * count, np.int64)  # faces around each welded vertex, vertex by vertex
    for f in range(count):
        for k in range(3):
            w = welded[faces[f, k]]
            around[fill[w]] = f
            fill[w] += 1
    normals = np.empty((count, 3, 3), np.float32)
    for f in range(count):
        for k in range(3):
            w = welded[faces[f, k]]
            x = y = z = 0.0
            for i in range(start[w], start[w + 1]):
                g = around[i]
                cosine = unit[f, 0] * unit[g, 0] + unit[f, 1] * unit[g, 1] + unit[f, 2] * unit[g, 2]
                # Faces wound the other way round, common in found meshes, count with their normal turned.
                sign = 1.0 if cosine >= 0 else -1.0
                if cosine * sign >= cos_crease:
                    x += sign * area[g, 0]
                    y += sign * area[g, 1]
                    z += sign * area[g, 2]
            length = np.sqrt(x * x + y * y + z * z)
            if length < 1e-30:
                x, y, z, length = unit[f, 0], unit[f, 1], unit[f, 2], 1.0
            normals[f, k, 0], normals[f, k, 1], normals[f, k, 2] = x / length, y / length, z / length
    return normals
