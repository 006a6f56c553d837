"""Objects that nobody modelled: endless, seeded, z up, roughly as large as the unit sphere.

A training set of found meshes is small and its copies look alike; these make up for number and variety. Each object is
a *family* (what it is: a mug, a tool, an animal, a heap of primitives, a sculpture) and a *finish* (how it is coloured:
plain, by part, printed). Real-world likeness matters less than that no two share a shape, and that surfaces carry
marks at many scales, because those marks are what tells one side of an object from another.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np
from numba import njit
from numpy.random import Generator
from numpy.typing import NDArray

from nope_ros.rendering.mesh import Mesh, make_mesh

Floats = NDArray[np.floating]
Colour = NDArray[np.float64]  # (3,) sRGB 0..255

ATLAS = 256
"""Side of the texture in pixels."""


def procedural_object(seed: int) -> Mesh:
    """The object of that seed: z up, at most some 10 thousand faces; the same with the same NumPy and OpenCV."""
    rng = np.random.default_rng([0x6E6F7065, seed])
    names = list(_FAMILIES)
    weights = np.array([_FAMILIES[name][1] for name in names], float)
    name = names[rng.choice(len(names), p=weights / weights.sum())]
    # Without print a carton is a brick, and which of its sides one sees cannot be told.
    shares = (0.05, 0.15, 0.80) if name == "carton" else (0.23, 0.42, 0.35)
    finish = ("plain", "parts", "printed")[rng.choice(3, p=shares)]
    build = _Build(rng, finish, cells_per_side=3 if name in ("carton", "device") else int(rng.integers(1, 3)))
    _FAMILIES[name][0](build)
    mesh = build.mesh(f"procedural_{seed:06d}_{name}_{finish}")
    if rng.random() < 0.12:  # things also fall over
        mesh = mesh.rotated(_quarter_turns(rng))
    return mesh.rotated(_about_z(rng.uniform(0, 2 * np.pi)))


# --- Surfaces: each returns a Patch whose uv fills the unit square --------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """A piece of surface in its own frame."""

    vertices: Floats
    """(V, 3)"""
    faces: NDArray[np.int64]
    """(F, 3)"""
    uv: Floats
    """(V, 2) in 0..1 within its chart; v runs down."""
    chart: NDArray[np.int64]
    """(V,) which picture of the part a vertex carries: sides of a box differ."""

    def moved(self, R: Floats | None = None, t: object = (0, 0, 0), scale: object = 1.0) -> Patch:
        """Scaled in its own frame, then turned by R (3, 3), then shifted by t (3,)."""
        vertices = self.vertices * np.asarray(scale, float)
        if R is not None:
            vertices = vertices @ R.T
        return replace(self, vertices=vertices + np.asarray(t, float))


def _joined(patches: list[Patch]) -> Patch:
    starts = np.cumsum([0] + [len(p.vertices) for p in patches])
    return Patch(
        np.concatenate([p.vertices for p in patches]),
        np.concatenate([p.faces + s for p, s in zip(patches, starts[:-1], strict=True)]),
        np.concatenate([p.uv for p in patches]),
        np.concatenate([p.chart for p in patches]),
    )


@lru_cache(maxsize=256)
def _grid(rows: int, columns: int) -> tuple[NDArray[np.int64], Floats]:
    """Faces (F, 3) and uv (rows·columns, 2) of a grid of vertices."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns - 1), indexing="ij")
    a = (i * columns + j).ravel()
    faces = np.concatenate([np.stack([a, a + columns, a + 1], 1), np.stack([a + 1, a + columns, a + columns + 1], 1)])
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    return faces, np.stack([u.ravel(), v.ravel()], 1)


def _sheet(points: Floats, chart: int = 0) -> Patch:
    """A patch over a grid of points (rows, columns, 3), rows running down."""
    faces, uv = _grid(*points.shape[:2])
    return Patch(points.reshape(-1, 3), faces, uv, np.full(len(uv), chart))


def _box(size: object, bevel: float = 0.0) -> Patch:
    """A box of full side lengths `size` (3,) about the origin; edges rounded with radius `bevel`."""
    half = 0.5 * np.asarray(size, float)
    bevel = float(min(bevel, half.min() * 0.999))
    sides = []
    for chart, (axis, sign) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1))):
        # Right and down in the picture, as someone standing before that side with z up sees it.
        right = np.zeros(3)
        down = np.zeros(3)
        if axis == 2:
            right[0], down[1] = 1, -sign
        else:
            right[1 - axis] = sign if axis == 0 else -sign
            down[2] = -1
        steps = []
        for direction in (right, down):
            h = float(np.abs(direction) @ half)
            arc = bevel * np.array([0.0, 0.29, 1.0])  # two faces over a rounded edge
            steps.append(np.concatenate([-h + arc, h - arc[::-1]]) if bevel > 0 else np.array([-h, h]))
        a, b = np.meshgrid(steps[0], steps[1])
        points = a[..., None] * right + b[..., None] * down
        points[..., axis] = sign * half[axis]
        if bevel > 0:
            core = np.clip(points, bevel - half, half - bevel)
            out = points - core
            points = core + bevel * out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12)
        side = _sheet(points, chart)
        uv = np.stack([a.ravel() / np.ptp(steps[0]) + 0.5, b.ravel() / np.ptp(steps[1]) + 0.5], 1)
        sides.append(replace(side, uv=uv))
    return _joined(sides)


def _lathe(profile: object, segments: int = 28, sweep: float = 2 * np.pi) -> Patch:
    """A profile (n, 2) of (radius, z), top first, turned about z."""
    profile = np.asarray(profile, float)
    angle = np.linspace(0, sweep, segments + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    points = np.empty((len(profile), segments + 1, 3))
    points[..., :2] = profile[:, None, :1] * ring
    points[..., 2] = profile[:, None, 1]
    patch = _sheet(points)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(profile, axis=0), axis=1))])
    uv = patch.uv.copy()
    uv[:, 1] = np.repeat(length / max(length[-1], 1e-9), segments + 1)
    return replace(patch, uv=uv)


def _cylinder(radius: float, height: float, top: float | None = None, bevel: float = 0.0, segments: int = 28) -> Patch:
    """A closed cylinder or cone about z, centred; `top` is the upper radius."""
    upper = radius if top is None else top
    h = 0.5 * height
    b = min(bevel, 0.45 * height, 0.9 * max(min(radius, upper), 1e-3))
    profile = [(0, h), (max(upper - b, 0), h), (upper, h - b), (radius, b - h), (max(radius - b, 0), -h), (0, -h)]
    side = _lathe(profile, segments)
    chart = np.repeat([1, 1, 0, 0, 2, 2], segments + 1)
    uv = side.uv.copy()
    widest = max(radius, upper)
    for row, value in ((2, 0.0), (3, 1.0)):
        uv[row * (segments + 1) : (row + 1) * (segments + 1), 1] = value
    flat = chart > 0
    uv[flat] = 0.5 + 0.5 * side.vertices[flat, :2] / widest * (1, -1)
    return _split_charts(side, uv, chart)


def _split_charts(patch: Patch, uv: Floats, chart: NDArray[np.int64]) -> Patch:
    """Duplicates vertices so that no face spans two charts; the vertex before the border takes the lid's picture."""
    face_chart = chart[patch.faces].max(1)
    corner = patch.faces.ravel()
    wanted = np.repeat(face_chart, 3)
    new_uv = uv[corner].copy()
    foreign = chart[corner] != wanted
    widest = max(np.abs(patch.vertices[:, :2]).max(), 1e-9)
    new_uv[foreign] = 0.5 + 0.5 * patch.vertices[corner[foreign], :2] / widest * (1, -1)
    return Patch(patch.vertices[corner], np.arange(len(corner)).reshape(-1, 3), new_uv, wanted)


def _ball(radii: object = (1, 1, 1), rows: int = 14, segments: int = 24) -> Patch:
    angle = np.linspace(0, np.pi, rows)
    return _lathe(np.stack([np.sin(angle), np.cos(angle)], 1), segments).moved(scale=radii)


def _capsule(radius: float, length: float) -> Patch:
    """About z; `length` is between the centres of its ends."""
    angle = np.linspace(0, np.pi / 2, 6)
    upper = np.stack([radius * np.sin(angle), 0.5 * length + radius * np.cos(angle)], 1)
    return _lathe(np.concatenate([upper, upper[::-1] * (1, -1)]), 20)


def _tube(path: Floats, radius: Floats | float, segments: int = 10, flatness: float = 1.0) -> Patch:
    """A closed tube along a path (n, 3); radius a number or (n,)."""
    path = np.asarray(path, float)
    radius = np.broadcast_to(np.asarray(radius, float), (len(path),))
    tangent = np.gradient(path, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    normal = np.cross(tangent[0], np.eye(3)[np.abs(tangent[0]).argmin()])
    normals = []
    for along in tangent:  # carried along without twist
        normal = normal - along * (normal @ along)
        normal /= np.linalg.norm(normal)
        normals.append(normal)
    across = np.array(normals)
    other = np.cross(tangent, across)
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    ring = across[:, None] * np.cos(angle)[:, None] + flatness * other[:, None] * np.sin(angle)[:, None]
    points = path[:, None] + radius[:, None, None] * ring
    ends = np.broadcast_to(path[[0, -1], None], (2, segments + 1, 3))
    return _sheet(np.concatenate([ends[:1], points, ends[1:]]))


def _torus(radius: float, thickness: float, sweep: float = 2 * np.pi) -> Patch:
    angle = np.linspace(0, sweep, max(int(28 * sweep / 6.3), 8))
    return _tube(np.stack([radius * np.cos(angle), radius * np.sin(angle), 0 * angle], 1), thickness, 12)


def _loft(
    z: object, half_x: object, half_y: object, *, power: float = 2.0, shift: object = 0.0, twist: object = 0.0
) -> Patch:
    """Superellipse sections |x|^power + |y|^power = 1 stacked along z (n,), top first, closed at both ends.

    shift: (n,) or (n, 2) offsets of the sections in x and y. twist: (n,) radians.
    """
    z = np.asarray(z, float)
    n = len(z)
    angle = np.linspace(0, 2 * np.pi, 33)
    c, s = np.cos(angle), np.sin(angle)
    unit = np.stack([np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)], 1)
    section = unit[None] * np.stack([np.broadcast_to(np.asarray(h, float), (n,)) for h in (half_x, half_y)], 1)[:, None]
    turn = np.broadcast_to(np.asarray(twist, float), n)[:, None]
    x = section[..., 0] * np.cos(turn) - section[..., 1] * np.sin(turn)
    y = section[..., 0] * np.sin(turn) + section[..., 1] * np.cos(turn)
    offset = np.asarray(shift, float)
    offset = np.stack([np.broadcast_to(offset, n), np.zeros(n)], 1) if offset.ndim < 2 else offset
    points = np.stack([x + offset[:, :1], y + offset[:, 1:], np.broadcast_to(z[:, None], x.shape)], -1)
    caps = [np.broadcast_to(points[i].mean(0), points[i].shape)[None] for i in (0, -1)]
    return _sheet(np.concatenate([caps[0], points, caps[1]]))


def _extruded(outline: Floats | list[tuple[float, float]], height: float) -> Patch:
    """A simple polygon (n, 2), counter-clockwise, extruded along z and centred in z."""
    outline = np.asarray(outline, float)
    triangles = _ears(np.ascontiguousarray(outline))
    n = len(outline)
    lower, upper = outline.min(0), outline.max(0)
    uv = (outline - lower) / np.maximum(upper - lower, 1e-9) * (1, -1) + (0, 1)
    lids = [np.concatenate([outline, np.full((n, 1), z)], 1) for z in (0.5 * height, -0.5 * height)]
    lid = Patch(
        np.concatenate(lids),
        np.concatenate([triangles, triangles[:, ::-1] + n]),
        np.concatenate([uv, uv]),
        np.repeat([1, 2], n),
    )
    ring = np.concatenate([outline, outline[:1]])
    rim = _sheet(np.stack([np.concatenate([ring, np.full((n + 1, 1), z)], 1) for z in (0.5 * height, -0.5 * height)]))
    return _joined([rim, lid])


@njit(cache=True, nogil=True)
def _ears(outline: Floats) -> NDArray[np.int64]:
    """Triangles (n − 2, 3) of a simple counter-clockwise polygon (n, 2), by cutting ears."""
    n = outline.shape[0]
    left = np.arange(n)
    count = n
    triangles = np.empty((n - 2, 3), np.int64)
    done = 0
    tries = 0
    i = 0
    while count > 3 and tries < 2 * count:
        a, b, c = left[(i - 1) % count], left[i % count], left[(i + 1) % count]
        ux, uy = outline[b, 0] - outline[a, 0], outline[b, 1] - outline[a, 1]
        vx, vy = outline[c, 0] - outline[b, 0], outline[c, 1] - outline[b, 1]
        ear = ux * vy - uy * vx > 0
        if ear:
            for k in range(count):
                p = left[k]
                if p in (a, b, c):
                    continue
                inside = True
                for q, r in ((a, b), (b, c), (c, a)):
                    cross = (outline[r, 0] - outline[q, 0]) * (outline[p, 1] - outline[q, 1]) - (
                        outline[r, 1] - outline[q, 1]
                    ) * (outline[p, 0] - outline[q, 0])
                    if cross < 0:
                        inside = False
                if inside:
                    ear = False
                    break
        if ear:
            triangles[done] = (a, b, c)
            done += 1
            at = i % count
            for k in range(at, count - 1):
                left[k] = left[k + 1]
            count -= 1
            tries = 0
        else:
            i = (i + 1) % count
            tries += 1
    if count >= 3:
        triangles[done] = (left[0], left[1], left[2])
        done += 1
    return triangles[:done]


@njit(cache=True, nogil=True)
def _surface_nets(field: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Vertices (V, 3) in grid steps and faces (F, 3) of the zero surface of a field (n, n, n), negative inside."""
    nx, ny, nz = field.shape
    index = np.full((nx, ny, nz), -1, np.int32)
    capacity = 6 * nx * ny
    vertices = np.empty((capacity, 3), np.float64)
    count = 0
    for x in range(nx - 1):
        for y in range(ny - 1):
            for z in range(nz - 1):
                inside = 0
                for k in range(8):
                    if field[x + (k & 1), y + (k >> 1 & 1), z + (k >> 2)] < 0:
                        inside += 1
                if inside == 0 or inside == 8 or count == capacity:
                    continue
                sx = sy = sz = 0.0
                crossings = 0
                for k in range(8):
                    for axis in range(3):
                        bit = 1 << axis
                        if k & bit:
                            continue
                        m = k | bit
                        p = field[x + (k & 1), y + (k >> 1 & 1), z + (k >> 2)]
                        q = field[x + (m & 1), y + (m >> 1 & 1), z + (m >> 2)]
                        if (p < 0) == (q < 0):
                            continue
                        t = p / (p - q)
                        sx += (k & 1) + (t if axis == 0 else 0.0)
                        sy += (k >> 1 & 1) + (t if axis == 1 else 0.0)
                        sz += (k >> 2) + (t if axis == 2 else 0.0)
                        crossings += 1
                vertices[count, 0] = x + sx / crossings
                vertices[count, 1] = y + sy / crossings
                vertices[count, 2] = z + sz / crossings
                index[x, y, z] = count
                count += 1
    faces = np.empty((6 * count + 6, 3), np.int64)
    made = 0
    for x in range(1, nx - 1):
        for y in range(1, ny - 1):
            for z in range(1, nz - 1):
                p = field[x, y, z] < 0
                for axis in range(3):
                    if axis == 0:
                        q = field[x + 1, y, z] < 0
                        a, b, c, d = index[x, y - 1, z - 1], index[x, y, z - 1], index[x, y, z], index[x, y - 1, z]
                    elif axis == 1:
                        q = field[x, y + 1, z] < 0
                        a, b, c, d = index[x - 1, y, z - 1], index[x - 1, y, z], index[x, y, z], index[x, y, z - 1]
                    else:
                        q = field[x, y, z + 1] < 0
                        a, b, c, d = index[x - 1, y - 1, z], index[x, y - 1, z], index[x, y, z], index[x - 1, y, z]
                    if p == q or a < 0 or b < 0 or c < 0 or d < 0:
                        continue
                    if not p:
                        b, d = d, b
                    faces[made] = (a, b, c)
                    faces[made + 1] = (a, c, d)
                    made += 2
    return vertices[:count], faces[:made]


def _unfolded(vertices: Floats, faces: NDArray[np.integer]) -> Patch:
    """A patch of bare triangles with pictures projected along the axis each face looks most along: six charts."""
    corners = vertices[faces]  # (F, 3, 3)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    axis = np.abs(normal).argmax(1)
    sign = np.sign(normal[np.arange(len(faces)), axis])
    lower = vertices.min(0)
    unit = (corners - lower) / max(np.ptp(vertices, axis=0).max(), 1e-9)
    right = np.where((axis == 0)[:, None], unit[..., 1], unit[..., 0])
    flip = np.where(axis == 0, sign < 0, np.where(axis == 1, sign > 0, False))
    right = np.where(flip[:, None], 1 - right, right)
    up = np.where((axis == 2)[:, None], unit[..., 1], unit[..., 2])
    uv = np.stack([right, 1 - up], -1).reshape(-1, 2)
    chart = np.repeat(2 * axis + (sign < 0), 3)
    return Patch(corners.reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3), uv, chart)


# --- Rotations and chance -------------------------------------------------------------------------------------------


def _about_z(angle: float) -> Floats:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def _about_x(angle: float) -> Floats:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])


def _about_y(angle: float) -> Floats:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1.0, 0], [-s, 0, c]])


def _any_rotation(rng: Generator) -> Floats:
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _quarter_turns(rng: Generator) -> Floats:
    return _about_x(rng.integers(4) * np.pi / 2) @ _about_y(rng.integers(4) * np.pi / 2)


def _smooth_curve(rng: Generator, count: int, low: float, high: float, knots: int = 5) -> Floats:
    """(count,) values wandering smoothly between low and high."""
    return (
        cv2.resize(rng.uniform(low, high, (knots, 1)), (1, count), interpolation=cv2.INTER_CUBIC)
        .ravel()
        .clip(0.8 * low, 1.1 * high)
    )


# --- Colour and print -----------------------------------------------------------------------------------------------


def palette(rng: Generator, count: int = 6) -> Floats:
    """(count, 3) sRGB 0..255 that might stand together on one thing."""
    mood = rng.choice(["vivid", "pastel", "dark", "earth", "grey", "any"], p=[0.28, 0.14, 0.12, 0.16, 0.14, 0.16])
    hue = rng.random()
    spread = rng.choice([0.04, 0.15, 0.5], p=[0.2, 0.35, 0.45])
    colours = []
    for i in range(count):
        h = (hue + rng.uniform(-spread, spread)) % 1
        saturation, value = {
            "vivid": (rng.uniform(0.65, 1), rng.uniform(0.6, 1)),
            "pastel": (rng.uniform(0.15, 0.45), rng.uniform(0.75, 1)),
            "dark": (rng.uniform(0.1, 0.8), rng.uniform(0.06, 0.35)),
            "earth": (rng.uniform(0.25, 0.7), rng.uniform(0.25, 0.8)),
            "grey": (rng.uniform(0, 0.08), rng.uniform(0.08, 0.95)),
            "any": (rng.uniform(0, 1), rng.uniform(0.1, 1)),
        }[mood]
        if mood == "earth":
            h = rng.uniform(0.02, 0.17)
        if i and rng.random() < 0.33:  # an accent: black, white, grey or an outright other hue
            accents = [(0, 0, 0.07), (0, 0, 0.95), (0, 0, 0.5), (rng.random(), 0.85, 0.85)]
            h, saturation, value = accents[rng.integers(4)]
        colours.append(colorsys.hsv_to_rgb(h, saturation, value))
    return 255 * np.array(colours)


def _noise(rng: Generator, size: int, coarsest: int = 3, finest: int = 64, falloff: float = 0.6) -> Floats:
    """(size, size) fractal noise in 0..1."""
    total = np.zeros((size, size), np.float32)
    weight, cells = 1.0, coarsest
    while cells <= min(finest, size):
        octave = rng.random((cells, cells)).astype(np.float32)
        total += weight * cv2.resize(octave, (size, size), interpolation=cv2.INTER_CUBIC)
        weight *= falloff
        cells *= 2
    total -= total.min()
    return (total / max(float(total.max()), 1e-9)).astype(np.float64)


def _ramp(values: Floats, colours: Floats) -> Floats:
    """Values 0..1 of any shape → (…, 3) along the colours in turn."""
    at = np.clip(values, 0, 1) * (len(colours) - 1)
    low = np.minimum(at.astype(int), len(colours) - 2)
    share = (at - low)[..., None]
    return colours[low] * (1 - share) + colours[low + 1] * share


_FONTS = (0, 1, 2, 3, 4, 5, 6, 7, 16 + 2, 16 + 3)
_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&!%+-"))


def _word(rng: Generator, low: int = 2, high: int = 9) -> str:
    return "".join(rng.choice(_LETTERS, rng.integers(low, high)))


def _write(
    rng: Generator, image: NDArray[np.uint8], text: str, box: tuple[float, float, float, float], colour: Colour
) -> None:
    """Text filling a box (x, y, width, height) of the image."""
    font = int(rng.choice(_FONTS))
    (w, h), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(box[2] / max(w, 1), box[3] / max(h, 1))
    thick = max(1, round(scale * rng.uniform(1, 4)))
    origin = (int(box[0]), int(box[1] + 0.5 * (box[3] + h * scale)))
    cv2.putText(image, text, origin, font, scale, colour.tolist(), thick, cv2.LINE_AA)


def _print_label(rng: Generator, size: int, colours: Floats) -> NDArray[np.uint8]:
    image = np.empty((size, size, 3), np.uint8)
    image[:] = colours[0]
    for _ in range(rng.integers(0, 4)):  # bands and fields
        x, y = rng.integers(0, size, 2) if rng.random() < 0.5 else (0, rng.integers(0, size))
        w, h = (size, rng.integers(size // 12, size // 2)) if x == 0 else rng.integers(size // 8, size, 2)
        fill = colours[rng.integers(len(colours))].tolist()
        cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + h)), fill, -1)
    if rng.random() < 0.7:
        _draw_shapes(rng, image, colours, int(rng.integers(1, 4)))
    for _ in range(rng.integers(1, 4)):  # headlines
        w = rng.uniform(0.4, 0.95) * size
        x, y = rng.uniform(0, size - w), rng.uniform(0, 0.8 * size)
        _write(rng, image, _word(rng), (x, y, w, rng.uniform(0.08, 0.3) * size), colours[rng.integers(len(colours))])
    if rng.random() < 0.5:  # small print
        x, y, step = rng.uniform(0, 0.5) * size, rng.uniform(0.2, 0.8) * size, rng.uniform(0.05, 0.08) * size
        ink = colours[rng.integers(len(colours))]
        for i in range(rng.integers(2, 6)):
            _write(rng, image, _word(rng, 6, 18), (x, y + i * step, 0.5 * size, 0.7 * step), ink)
    if rng.random() < 0.35:  # bar code
        x, y = rng.integers(0, int(0.7 * size)), rng.integers(0, int(0.75 * size))
        w, h = int(rng.uniform(0.18, 0.3) * size), int(rng.uniform(0.1, 0.2) * size)
        image[y : y + h, x : x + w] = 255
        bars = rng.random(w) < 0.5
        image[y + 1 : y + h - 1, x : x + w][:, bars[: image[:, x : x + w].shape[1]]] = 12
    return image


def _draw_shapes(rng: Generator, image: NDArray[np.uint8], colours: Floats, count: int) -> None:
    size = image.shape[0]
    for _ in range(count):
        colour = colours[rng.integers(len(colours))].tolist()
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        r = int(rng.uniform(0.05, 0.35) * size)
        kind = rng.integers(5)
        if kind == 0:
            cv2.circle(image, centre, r, colour, -1 if rng.random() < 0.7 else max(r // 4, 1), cv2.LINE_AA)
        elif kind == 1:
            axes = (r, int(r * rng.uniform(0.2, 1)))
            cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
        elif kind == 2:
            angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            points = np.array(centre) + r * np.stack([np.cos(angle), np.sin(angle)], 1)
            cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)
        elif kind == 3:
            points = (np.array(centre) + rng.normal(0, r, (rng.integers(3, 7), 2))).astype(np.int32)
            cv2.polylines(image, [points], bool(rng.random() < 0.5), colour, int(rng.integers(1, 7)), cv2.LINE_AA)
        else:
            outline = _star(rng)
            points = (np.array(centre) + r * outline).astype(np.int32)
            cv2.fillPoly(image, [points], colour, cv2.LINE_AA)


def _print_photo(rng: Generator, size: int, colours: Floats) -> Floats:
    """What a picture looks like from afar: large gradients, objects of all sizes, fine grain."""
    ground = _ramp(_noise(rng, size, 2, 64, rng.uniform(0.4, 0.75)), np.concatenate([colours, palette(rng, 3)]))
    image = np.clip(ground, 0, 255).astype(np.uint8)
    _draw_shapes(rng, image, palette(rng, 8), int(rng.integers(3, 14)))
    if rng.random() < 0.5:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 2.5))), np.uint8)
    return image * (0.6 + 0.6 * _noise(rng, size, 8, 128, 0.8))[..., None]


def _print_pattern(rng: Generator, size: int, colours: Floats) -> Floats:
    """Stripes, plaid, dots, checks, bricks, wood: what repeats."""
    y, x = np.mgrid[:size, :size] / size
    turn = rng.choice([0.0, np.pi / 2, rng.uniform(0, np.pi)])
    a, b = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    count = rng.integers(2, 12)
    kind = rng.integers(6)
    if kind == 0:
        edges = np.sort(rng.random(2 * count))
        which = np.searchsorted(edges, (a - a.min()) / np.ptp(a))
        return colours[rng.integers(0, len(colours), 2 * count + 1)[which]]
    if kind == 1:
        stripe, cross = np.sin(2 * np.pi * count * a) > 0.3, np.sin(2 * np.pi * count * b) > rng.uniform(0, 0.8)
        return 0.5 * (colours[stripe.astype(int)] + colours[2 + cross.astype(int)])
    if kind == 2:
        cell = (np.floor(a * count) + np.floor(b * count)).astype(int) % 2
        return colours[cell]
    if kind == 3:
        fa, fb = (a * count) % 1 - 0.5, (b * count) % 1 - 0.5
        table = rng.integers(1, len(colours), (64, 64))
        dot = fa**2 + fb**2 < rng.uniform(0.04, 0.2)
        spot = table[np.floor(a * count).astype(int) % 64, np.floor(b * count).astype(int) % 64]
        return np.where(dot[..., None], colours[spot], colours[0])
    if kind == 4:
        row = np.floor(y * count)
        column = np.floor(x * count * 0.5 + 0.5 * (row % 2))
        mortar = ((y * count) % 1 < 0.12) | ((x * count * 0.5 + 0.5 * (row % 2)) % 1 < 0.06)
        tone = rng.uniform(0.75, 1.15, (64, 64))[row.astype(int) % 64, column.astype(int) % 64]
        return np.where(mortar[..., None], colours[1], colours[0] * tone[..., None])
    rings = np.sin(count * 4 * (a + 0.15 * _noise(rng, size, 2, 8)) + 3 * _noise(rng, size, 3, 16))
    return _ramp(0.5 + 0.5 * rings, colours[:2]) * (0.85 + 0.3 * _noise(rng, size, 16, 128, 0.9))[..., None]


def _print_noise(rng: Generator, size: int, colours: Floats) -> Floats:
    values = _noise(rng, size, int(rng.integers(2, 7)), 128, rng.uniform(0.35, 0.9))
    if rng.random() < 0.3:  # camouflage: the same in steps
        values = np.floor(values * 5) / 5
    return _ramp(values, colours[: rng.integers(2, len(colours))])


def picture(rng: Generator, size: int, colours: Floats) -> NDArray[np.uint8]:
    """(size, size, 3) of something printed."""
    kinds = (_print_label, _print_photo, _print_pattern, _print_noise)
    image = kinds[rng.choice(4, p=(0.42, 0.2, 0.22, 0.16))](rng, size, rng.permutation(colours))
    image = np.clip(image, 0, 255).astype(np.uint8)  # OpenCV writes and smooths edges on bytes only
    if rng.random() < 0.3:
        _draw_shapes(rng, image, colours, int(rng.integers(1, 5)))
    if rng.random() < 0.35:
        image = image * (0.75 + 0.35 * _noise(rng, size, 2, 64))[..., None]  # wear and dirt
    return np.clip(image, 0, 255).astype(np.uint8)


def _solid_noise(rng: Generator, points: Floats, waves: int = 10, frequency: float = 4.0) -> Floats:
    """(V,) smooth noise in about −1..1 at points (V, 3)."""
    directions = rng.normal(size=(waves, 3)) * frequency * rng.uniform(0.3, 1.2, (waves, 1))
    weight = 1 / np.maximum(np.linalg.norm(directions, axis=1), 0.5)
    phase = rng.uniform(0, 2 * np.pi, waves)
    return (np.sin(points @ directions.T + phase) * weight).sum(1) / np.sqrt(0.5 * (weight**2).sum()) * 0.5


# --- Putting an object together -------------------------------------------------------------------------------------


class _Build:
    """Collects painted patches. Parts that share a `role` share their colour."""

    def __init__(self, rng: Generator, finish: str, cells_per_side: int) -> None:
        self.rng = rng
        self.finish = finish
        self.palette = palette(rng)
        self._cells = cells_per_side
        self._start = int(rng.integers(len(self.palette)))
        self._roles: dict[object, tuple[Colour, int]] = {}
        self._parts: list[tuple[Patch, Floats]] = []

    def add(
        self, patch: Patch, role: object = None, *, t: object = (0, 0, 0), R: Floats | None = None, printed: bool = True
    ) -> None:
        """Adds a patch, turned and shifted. printed=False keeps pictures off it."""
        rng = self.rng
        patch = patch.moved(R, t)
        key = len(self._roles) if role is None else role
        if key not in self._roles:
            first = not self._roles
            picture = int(rng.integers(64)) if printed and (first or rng.random() < 0.75) else -1
            # Neighbours in the order of adding take different colours.
            self._roles[key] = (self.palette[(self._start + len(self._roles)) % len(self.palette)], picture)
        colour, picture = self._roles[key]
        if self.finish == "plain":
            colour = self.palette[0] * (1.0 if rng.random() < 0.7 else rng.uniform(0.85, 1.1))
        colours = np.broadcast_to(np.clip(colour, 0, 255), patch.vertices.shape)
        if self.finish == "printed":
            cells = self._cells**2 - 1
            if cells == 0:  # one picture for all
                cell = np.where(patch.chart >= 0, 0 if picture >= 0 else -1, -1)
                white = np.zeros(len(patch.chart), bool) | (picture < 0)
            else:
                cell = (picture + patch.chart * 5) % cells if picture >= 0 else np.full(len(patch.chart), cells)
                white = np.full(len(patch.chart), picture < 0)
            side = ATLAS // self._cells
            inset = 1.5 / side
            cell = np.maximum(cell, 0)
            local = np.clip(patch.uv, 0, 1) * (1 - 2 * inset) + inset
            corner = np.stack([cell % self._cells, cell // self._cells], 1)
            uv = (corner + local) * side / ATLAS
            # One picture only: unprinted parts take the picture's first pixel row, which mesh() keeps white.
            uv = np.where((white & (cells == 0))[:, None], 0.5 / ATLAS, uv)
            colours = np.where(white[:, None], colours, 255.0)
            patch = replace(patch, uv=uv)
        elif self.finish == "parts" and rng.random() < 0.25:  # a gradient or stain over the part
            other = self.palette[rng.integers(len(self.palette))]
            share = np.clip(0.5 + _solid_noise(rng, patch.vertices, 6, rng.uniform(1, 6)), 0, 1)[:, None]
            colours = colours * (1 - share) + other * share
        self._parts.append((patch, colours))

    def mesh(self, name: str) -> Mesh:
        """The object, bent and squeezed a little at times."""
        rng = self.rng
        whole = _joined([patch for patch, _ in self._parts])
        colours = np.concatenate([colours for _, colours in self._parts])
        vertices = whole.vertices - 0.5 * (whole.vertices.min(0) + whole.vertices.max(0))
        vertices = vertices / max(np.linalg.norm(vertices, axis=1).max(), 1e-9)
        if rng.random() < 0.35:
            vertices = vertices * rng.uniform(0.7, 1.3, 3)
        if rng.random() < 0.15:  # taper and lean
            z = vertices[:, 2:]
            vertices = np.concatenate([vertices[:, :2] * (1 + rng.uniform(-0.35, 0.35) * z), z], 1)
            vertices[:, 0] += rng.uniform(-0.25, 0.25) * vertices[:, 2]
        if rng.random() < 0.07 and len(vertices) > 400:  # a twist would fold coarse faces
            turn = rng.uniform(-1, 1) * vertices[:, 2]
            c, s = np.cos(turn), np.sin(turn)
            x, y = vertices[:, 0], vertices[:, 1]
            vertices = np.stack([c * x - s * y, s * x + c * y, vertices[:, 2]], 1)
        if self.finish == "plain" and rng.random() < 0.3:  # wear, faint
            colours = colours * (1 + 0.08 * _solid_noise(rng, vertices, 8, 8.0)[:, None])
        texture = None
        if self.finish == "printed":
            texture = np.full((ATLAS, ATLAS, 3), 255, np.uint8)
            side = ATLAS // self._cells
            for cell in range(max(self._cells**2 - 1, 1)):
                y, x = cell // self._cells * side, cell % self._cells * side
                texture[y : y + side, x : x + side] = picture(rng, side, self.palette)
            if self._cells == 1:
                texture[:2, :2] = 255
        return make_mesh(
            vertices,
            whole.faces,
            uv=whole.uv if texture is not None else None,
            texture=texture,
            colours=np.clip(np.round(colours), 0, 255).astype(np.uint8),
            name=name,
        )


def _star(rng: Generator) -> Floats:
    """(n, 2) counter-clockwise outline seen from its centre: stars, gears, pebbles."""
    kind = rng.integers(3)
    if kind == 0:
        points = int(rng.integers(3, 9))
        radius = np.tile([1.0, rng.uniform(0.35, 0.8)], points)
    elif kind == 1:
        points = int(rng.integers(6, 14))
        radius = np.tile([1, 1, 0.78, 0.78], points)
    else:
        radius = rng.uniform(0.5, 1, rng.integers(5, 12))
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


_OUTLINES = {
    "L": [(0, 0), (3, 0), (3, 1), (1, 1), (1, 4), (0, 4)],
    "T": [(1, 0), (2, 0), (2, 3), (3, 3), (3, 4), (0, 4), (0, 3), (1, 3)],
    "F": [(0, 0), (1, 0), (1, 1.6), (2, 1.6), (2, 2.5), (1, 2.5), (1, 3), (2.8, 3), (2.8, 4), (0, 4)],
    "E": [(0, 0), (3, 0), (3, 1), (1, 1), (1, 1.6), (2.3, 1.6), (2.3, 2.5), (1, 2.5), (1, 3), (3, 3), (3, 4), (0, 4)],
    "H": [(0, 0), (1, 0), (1, 1.6), (2, 1.6), (2, 0), (3, 0), (3, 4), (2, 4), (2, 2.5), (1, 2.5), (1, 4), (0, 4)],
    "Z": [(0, 0), (3, 0), (3, 1), (1.3, 1), (3, 3), (3, 4), (0, 4), (0, 3), (1.7, 3), (0, 1)],
    "7": [(0.6, 0), (1.7, 0), (3, 3), (3, 4), (0, 4), (0, 3), (1.8, 3)],
    "1": [(0.5, 0), (2.5, 0), (2.5, 0.8), (2, 0.8), (2, 4), (1, 4), (0, 3), (1, 3), (1, 0.8), (0.5, 0.8)],
    "Y": [(1, 0), (2, 0), (2, 1.6), (3, 4), (2, 4), (1.5, 2.6), (1, 4), (0, 4), (1, 1.6)],
    "arrow": [(1, 0), (2, 0), (2, 2.2), (3, 2.2), (1.5, 4), (0, 2.2), (1, 2.2)],
    "house": [(0, 0), (3, 0), (3, 2.3), (1.5, 4), (0, 2.3)],
    "U": [(0, 0), (3, 0), (3, 4), (2, 4), (2, 1), (1, 1), (1, 4), (0, 4)],
    "C": [(0, 0), (3, 0), (3, 1.2), (2, 1.2), (2, 1), (1, 1), (1, 3), (2, 3), (2, 2.8), (3, 2.8), (3, 4), (0, 4)],
}


def _outline(rng: Generator) -> Floats:
    """(n, 2), within ±1, upright in its y."""
    if rng.random() < 0.35:
        return _star(rng)
    points = np.array(list(_OUTLINES.values())[rng.integers(len(_OUTLINES))], float)
    return (points - (1.5, 2)) / 2


def _any_patch(rng: Generator) -> Patch:
    """Some primitive about as large as the unit ball."""
    kind = rng.integers(12)
    a, b, c = rng.uniform(0.25, 1, 3)
    if kind <= 1:
        return _box(2 * np.array([a, b, c]), rng.choice([0, 0.05, 0.15, 0.3]) * min(a, b, c))
    if kind == 2:
        return _cylinder(a, 2 * b, bevel=rng.choice([0, 0.1]) * a)
    if kind == 3:
        return _cylinder(a, 2 * b, top=a * rng.choice([0.0, 0.3, 0.6]))
    if kind == 4:
        return _ball((a, b, c))
    if kind == 5:
        return _capsule(0.5 * a, 1.5 * b)
    if kind == 6:
        return _torus(0.75, 0.12 + 0.2 * a, rng.choice([2 * np.pi, np.pi, 4.5]))
    if kind == 7:
        return _lathe(_any_profile(rng), 24)
    if kind == 8:
        n = 9
        z = np.linspace(1, -1, n)
        half_x, half_y = _smooth_curve(rng, n, 0.2, 0.9), _smooth_curve(rng, n, 0.2, 0.9)
        twist = rng.choice([0, rng.uniform(-0.8, 0.8)]) * z
        shift = np.stack([_smooth_curve(rng, n, 0.01, 0.5), _smooth_curve(rng, n, 0.01, 0.5)], 1)
        return _loft(z, half_x, half_y, power=rng.choice([1.3, 2, 4, 8]), shift=shift, twist=twist)
    if kind == 9:
        return _extruded(_outline(rng), rng.uniform(0.2, 1.2)).moved(_about_x(np.pi / 2))
    if kind == 10:
        angle = np.linspace(0, np.pi, 20)  # superquadric
        e = rng.choice([0.3, 0.6, 1.6])
        z = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** e
        r = np.maximum(np.sin(angle), 0) ** e
        return _loft(z * c, a * r + 1e-4, b * r + 1e-4, power=2 / rng.choice([0.3, 0.7, 1.5]))
    return _blob(rng, rng.uniform(0.1, 0.35))


def _any_profile(rng: Generator) -> Floats:
    """(n, 2) radius and z of something turned on a lathe, closed, top first."""
    n = int(rng.integers(5, 14))
    smooth = rng.random() < 0.6
    radius = _smooth_curve(rng, n, 0.2, 0.9, int(rng.integers(3, 6))) if smooth else rng.uniform(0.2, 0.9, n)
    z = np.linspace(1, -1, n)
    if rng.random() < 0.3:  # steps
        radius, z = np.repeat(radius, 2)[:-1], np.repeat(z, 2)[1:]
    return np.concatenate([[(0, z[0])], np.stack([radius, z], 1), [(0, z[-1])]])


def _blob(rng: Generator, roughness: float, rows: int = 24, segments: int = 40) -> Patch:
    """A ball displaced along its radius by smooth noise."""
    ball = _ball((1, 1, 1), rows, segments)
    bump = _solid_noise(rng, ball.vertices, 12, rng.uniform(1.5, 5))
    return replace(ball, vertices=ball.vertices * (1 + roughness * bump)[:, None] * rng.uniform(0.5, 1, 3))


# --- Families -------------------------------------------------------------------------------------------------------


def _assembly(build: _Build) -> None:
    """Two to eight primitives stuck into each other."""
    rng = build.rng
    tidy = rng.random() < 0.5
    centres = [np.zeros(3)]
    for i in range(rng.integers(2, 9)):
        size = rng.uniform(0.6, 1) if i == 0 else rng.uniform(0.2, 0.65)
        R = _quarter_turns(rng) if tidy else _any_rotation(rng)
        anchor = centres[rng.integers(len(centres))]
        step = rng.normal(size=3)
        if tidy:
            step = np.sign(step) * (np.abs(step) == np.abs(step).max())
        t = anchor + (0 if i == 0 else 1) * step / max(float(np.linalg.norm(step)), 1e-9) * rng.uniform(0.25, 0.6)
        centres.append(t)
        build.add(_any_patch(rng).moved(scale=size), t=t, R=R)


def _sculpture(build: _Build) -> None:
    """Solids melted together and cut into: a signed distance field on a grid, then its zero surface."""
    rng = build.rng
    n = 34
    axis = np.linspace(-1.15, 1.15, n).astype(np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    solids = [_solid(rng, i) for i in range(rng.integers(2, 7))]
    cuts = [_solid(rng, 1 + i) for i in range(rng.choice([0, 1, 2, 3], p=(0.35, 0.3, 0.2, 0.15)))]
    melt = rng.choice([0.01, 0.05, 0.15])
    field = solids[0](grid)
    for solid in solids[1:]:
        value = solid(grid)
        blend = np.maximum(melt - np.abs(field - value), 0) / melt
        field = np.minimum(field, value) - 0.25 * melt * blend * blend
    for cut in cuts:
        field = np.maximum(field, -cut(grid))
    if rng.random() < 0.3:
        field = field + 0.04 * _solid_noise(rng, grid, 8, rng.uniform(3, 8))
    field = field.reshape(n, n, n)
    for side in range(3):  # nothing may leave the grid open
        np.moveaxis(field, side, 0)[[0, 1, -2, -1]] = np.maximum(np.moveaxis(field, side, 0)[[0, 1, -2, -1]], 0.02)
    vertices, faces = _surface_nets(np.ascontiguousarray(field, np.float64))
    if len(faces) < 50:  # cut away altogether
        build.add(_blob(rng, 0.3))
        return
    vertices = axis[0] + vertices * float(axis[1] - axis[0])
    if build.finish == "printed":
        build.add(_unfolded(vertices, faces))
        return
    owner = np.stack([solid(vertices) for solid in solids] + [np.abs(cut(vertices)) for cut in cuts]).argmin(0)
    face_owner = owner[faces].min(1)
    for i in np.unique(face_owner):
        build.add(_unfolded(vertices, faces[face_owner == i]), i)


def _solid(rng: Generator, number: int) -> Callable[[Floats], Floats]:
    """A signed distance (roughly) of some solid as a function of points (P, 3)."""
    R = _quarter_turns(rng) if rng.random() < 0.5 else _any_rotation(rng)
    R = R.astype(np.float32)
    size = np.float32(rng.uniform(0.5, 0.8) if number == 0 else rng.uniform(0.2, 0.55))
    centre = np.zeros(3) if number == 0 else rng.normal(size=3)
    centre = (centre / max(float(np.linalg.norm(centre)), 1e-9) * rng.uniform(0.25, 0.6)).astype(np.float32)
    a, b, c = (np.float32(v) for v in size * rng.uniform(0.4, 1, 3))
    kind = rng.integers(6)

    def distance(points: Floats) -> Floats:
        p = (points.astype(np.float32) - centre) @ R
        x, y, z = p[:, 0], p[:, 1], p[:, 2]
        if kind == 0:
            k = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
            return (k - 1) * min(a, b, c)
        if kind == 1:
            q = np.abs(p) - np.array([a, b, c], np.float32)
            q += 0.05
            return np.sqrt((np.maximum(q, 0) ** 2).sum(1)) + np.minimum(q.max(1), 0) - 0.05
        if kind == 2:
            return np.sqrt(x * x + y * y + np.maximum(np.abs(z) - b, 0) ** 2) - 0.5 * a
        if kind == 3:
            ring = np.sqrt(x * x + y * y) - 0.8 * size
            return np.sqrt(ring * ring + z * z) - 0.3 * a
        radius = np.sqrt(x * x + y * y)
        if kind == 4:
            return np.maximum(radius - a, np.abs(z) - b)
        return np.maximum(0.8 * (radius - a * (0.5 - 0.5 * z / b)), np.abs(z) - b)

    return distance


def _pebble(build: _Build) -> None:
    rng = build.rng
    roughness = rng.uniform(0.1, 0.45)
    if build.finish == "printed":
        build.add(_blob(rng, roughness, 32, 48), "skin")
        return
    patch = _blob(rng, roughness, 40, 64)
    spots = _solid_noise(rng, patch.vertices, 10, rng.uniform(2, 8)) > rng.uniform(0, 0.5)
    inside = spots[patch.faces].all(1)
    for part, role in ((~inside, "skin"), (inside, "spots")):
        if part.any():
            build.add(replace(patch, faces=patch.faces[part]), role)
    if rng.random() < 0.4:  # a stalk
        path = np.stack([np.linspace(0, 0.2, 6), 0.1 * np.linspace(0, 1, 6) ** 2, np.linspace(0.4, 1.1, 6)], 1)
        build.add(_tube(path, 0.05), "stalk")


def _carton(build: _Build) -> None:
    """Boxes as shops sell them, books, bricks; with a flap, a window, a handle or a second box at times."""
    rng = build.rng
    size = rng.uniform(0.25, 1, 3) * (1.6, 1.0, 1.9)
    build.add(_box(size, rng.choice([0.0, 0.02, 0.06])), "box")
    for _ in range(rng.integers(0, 3)):
        kind = rng.integers(4)
        if kind == 0:
            flap = _box((size[0], 0.02, 0.4 * size[2]))
            build.add(flap, "box", R=_about_x(rng.uniform(-0.9, 0.9)), t=(0, 0.5 * size[1], 0.5 * size[2]))
        elif kind == 1:
            other = size * rng.uniform(0.3, 0.8, 3)
            t = (rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), 0.5 * (size[2] + other[2]))
            build.add(_box(other, 0.02), "second", t=t, R=_about_z(rng.uniform(-0.4, 0.4)))
        elif kind == 2:
            side = rng.choice([-1, 1])
            window = _box((size[0] * rng.uniform(0.2, 0.6), 0.03, size[2] * rng.uniform(0.2, 0.5)))
            t = (rng.uniform(-0.2, 0.2) * size[0], side * 0.5 * size[1], rng.uniform(-0.2, 0.2) * size[2])
            build.add(window, "window", t=t)
        else:
            top = _cylinder(0.12, 0.2, bevel=0.02)
            build.add(top, "cap", t=(rng.uniform(-0.3, 0.3) * size[0], 0, 0.5 * size[2] + 0.08), printed=False)


def _cup(build: _Build) -> None:
    """Mugs, bowls, jugs, pots, buckets: hollow things turned on a lathe, with what one holds them by."""
    rng = build.rng
    height, wall = rng.uniform(0.5, 1.9), rng.uniform(0.03, 0.09)
    n = 9
    share = np.linspace(1, 0, n)  # top to bottom
    foot, rim = rng.uniform(0.35, 0.9), rng.uniform(0.6, 1.0)
    radius = foot + (rim - foot) * share ** rng.choice([0.5, 1, 2]) + rng.uniform(-0.15, 0.25) * np.sin(np.pi * share)
    z = height * (share - 0.5)
    outer = np.stack([radius, z], 1)
    inner = np.stack([np.maximum(radius - wall, 0.02), np.maximum(z, wall - 0.5 * height)], 1)[::-1]
    square = rng.random() < 0.15
    segments = int(rng.choice([4, 6, 8])) if square else 36
    build.add(_lathe(np.concatenate([outer, [(0, -0.5 * height)]]), segments), "outside")
    build.add(_lathe(np.concatenate([[(0, wall - 0.5 * height)], inner, outer[:1]]), segments), "inside", printed=False)
    kind = rng.choice(["ear", "two ears", "stick", "bail", "none"], p=(0.5, 0.1, 0.12, 0.1, 0.18))
    at = float(np.interp(0.5, share[::-1], radius[::-1]))
    if kind in ("ear", "two ears"):
        angle = np.linspace(-np.pi / 2, np.pi / 2, 14)
        reach, tall = rng.uniform(0.2, 0.55), rng.uniform(0.2, 0.42) * height
        bend = np.abs(np.cos(angle)) ** rng.choice([0.4, 1])
        path = np.stack([at - 0.06 + reach * bend, 0 * angle, tall * np.sin(angle)], 1)
        ear = _tube(path, rng.uniform(0.04, 0.11), 10, rng.uniform(0.6, 2))
        for turn in (0, np.pi)[: 1 + (kind == "two ears")]:
            build.add(ear, "handle" if rng.random() < 0.6 else "outside", R=_about_z(turn), printed=False)
    elif kind == "stick":
        length = rng.uniform(0.8, 1.8)
        path = np.stack([at + np.linspace(-0.05, length, 8), np.zeros(8), np.linspace(0.2, 0.35, 8) * height], 1)
        build.add(_tube(path, np.linspace(0.06, 0.1, 8), 10, 0.6), "handle", printed=False)
    elif kind == "bail":
        angle = np.linspace(0, np.pi, 18)
        path = np.stack([radius[0] * np.cos(angle), 0 * angle, 0.45 * height + radius[0] * np.sin(angle)], 1)
        build.add(_tube(path, 0.04), "handle", R=_about_x(rng.uniform(-1, 1) * 0.5), printed=False)
    if rng.random() < 0.25:  # spout
        path = np.stack([-at - np.linspace(-0.1, 0.6, 7), np.zeros(7), height * np.linspace(-0.1, 0.45, 7)], 1)
        build.add(_tube(path, np.linspace(0.16, 0.07, 7)), "outside", printed=False)
    if rng.random() < 0.2:  # lid with a knob
        lid = _lathe([(0, 0.16), (0.6 * radius[0], 0.1), (radius[0] * 1.03, 0), (0, 0)], segments)
        build.add(lid, "lid", t=(0, 0, 0.5 * height))
        build.add(_ball((0.12, 0.12, 0.12)), "knob", t=(0, 0, 0.5 * height + 0.24))


def _bottle(build: _Build) -> None:
    """Bottles, cans, jars, tubes, dispensers."""
    rng = build.rng
    height, half = rng.uniform(1.2, 2.2), rng.uniform(0.25, 0.6)
    flat = rng.uniform(0.4, 1) if rng.random() < 0.4 else 1.0
    power = rng.choice([2, 2, 3, 6])
    neck, shoulder = rng.uniform(0.25, 1.0), rng.uniform(0.6, 0.95)
    share = np.array([1, 0.97, shoulder + 0.05, shoulder, *np.linspace(shoulder - 0.06, 0.02, 9), 0])
    body = 1 + rng.uniform(-0.2, 0.1) * np.sin(np.pi * np.clip(share / shoulder, 0, 1) * rng.integers(1, 4)) ** 2
    scale = np.where(share > shoulder, neck + (1 - neck) * np.clip((1 - share) / (1 - shoulder), 0, 1) ** 2, body)
    scale[-1] *= 0.93
    z = height * (share - 0.5)
    build.add(_loft(z, half * scale, half * flat * scale, power=power), "body")
    if rng.random() < 0.5:  # a label around it
        low, high = np.sort(rng.uniform(0.1, shoulder - 0.05, 2))
        if high - low > 0.15:
            ring = np.linspace(high, low, 7)
            around = 1.012 * np.interp(ring, share[::-1], scale[::-1])
            build.add(_loft(height * (ring - 0.5), half * around, half * flat * around, power=power), "label")
    top = 0.5 * height
    r = half * neck * rng.uniform(0.8, 1.1) * min(1.0, flat + 0.2)
    kind = rng.choice(["cap", "pump", "trigger", "open", "ring"], p=(0.5, 0.15, 0.12, 0.13, 0.1))
    if kind == "cap":
        tall = rng.uniform(0.08, 0.4)
        cap = _cylinder(r, tall, top=r * rng.uniform(0.6, 1), bevel=0.02)
        build.add(cap, "cap", t=(0, 0, top + 0.5 * tall), printed=False)
    elif kind == "pump":
        build.add(_cylinder(r * 0.8, 0.14), "cap", t=(0, 0, top + 0.06), printed=False)
        build.add(_cylinder(0.05, 0.3), "stem", t=(0, 0, top + 0.2), printed=False)
        path = np.stack([np.linspace(-0.12, 0.42, 7), np.zeros(7), top + 0.36 - 0.12 * np.linspace(0, 1, 7) ** 3], 1)
        build.add(_tube(path, np.linspace(0.09, 0.04, 7)), "cap", printed=False)
    elif kind == "trigger":
        build.add(_cylinder(r * 0.8, 0.2), "cap", t=(0, 0, top + 0.1), printed=False)
        build.add(_box((0.75, 0.2, 0.2), 0.06), "head", t=(0.15, 0, top + 0.28), printed=False)
        build.add(_box((0.07, 0.12, 0.4), 0.03), "stem", t=(0.3, 0, top + 0.05), R=_about_y(0.4), printed=False)
    elif kind == "ring":
        build.add(_torus(0.2, 0.05), "cap", t=(0, 0, top + 0.18), R=_about_x(np.pi / 2), printed=False)
    if rng.random() < 0.15:
        angle = np.linspace(-np.pi / 2, np.pi / 2, 12)
        path = np.stack([0.85 * half + 0.3 * np.cos(angle), 0 * angle, 0.3 * height * np.sin(angle)], 1)
        build.add(_tube(path, 0.07), "body", printed=False)


def _tool(build: _Build) -> None:
    """A handle along x with something at its end; lies on its side mostly."""
    rng = build.rng
    length = rng.uniform(1.2, 2.0)
    n = 12
    x = np.linspace(-0.5, 0.5, n) * length
    bend = rng.choice([0.0, 0.0, rng.uniform(-0.3, 0.3)])
    path = np.stack([x, bend * (x / length * 2) ** 2, np.zeros(n)], 1)
    grip = rng.uniform(0.05, 0.14)
    handle = _tube(path, grip * _smooth_curve(rng, n, 0.6, 1.0), 12, rng.uniform(0.6, 1.3))
    upright = R = np.eye(3)
    if rng.random() < 0.3:
        upright = _about_y(-np.pi / 2) @ _about_x(rng.uniform(0, 6))
    parts: list[tuple[Patch, object, Floats, tuple[float, float, float]]] = [(handle, "handle", R, (0.0, 0.0, 0.0))]
    end = 0.5 * length
    y = float(bend)
    kind = rng.integers(8)
    if kind == 0:  # hammer
        head = _box((0.25, rng.uniform(0.5, 0.9), 0.24), 0.04)
        parts.append((head, "head", R, (end, y, 0.0)))
        claw = np.stack([end - 0.3 * np.linspace(0, 1, 6) ** 2, y + np.linspace(0.3, 0.75, 6), np.zeros(6)], 1)
        parts.append((_tube(claw, np.linspace(0.1, 0.03, 6)), "head", R, (0.0, 0.0, 0.0)))
    elif kind == 1:  # screwdriver, marker, brush
        parts.append((_cylinder(0.03 + 0.4 * grip, 0.9), "head", _about_y(np.pi / 2), (end + 0.3, y, 0.0)))
        parts.append((_box((0.2, 0.12, 0.03)), "tip", R, (end + 0.8, y, 0.0)))
    elif kind == 2:  # wrench
        sweep = rng.uniform(3.6, 5.2)
        jaw = _torus(0.25, 0.09, sweep)
        parts.append((jaw, "head", _about_z(0.5 * (2 * np.pi - sweep)), (end + 0.25, y, 0.0)))
        if rng.random() < 0.6:
            parts.append((_torus(0.18, 0.07), "head", R, (-end - 0.15, y, 0.0)))
    elif kind == 3:  # knife, spatula, paddle
        outline = np.array([(0, -0.1), (0.9, -0.12), (1.15, 0.02), (1.0, 0.14), (0, 0.14)]) * (1, rng.uniform(0.8, 2.5))
        parts.append((_extruded(outline, 0.05), "head", R, (end - 0.05, y, 0.0)))
    elif kind == 4:  # spoon, ladle, racket
        bowl = _lathe(np.stack([0.4 * np.sin(a := np.linspace(0.0, 1.4, 7)), -0.3 * np.cos(a)], 1), 20)
        parts.append((bowl.moved(scale=(1.3, 1, rng.uniform(0.2, 1))), "head", R, (end + 0.35, y, 0.1)))
    elif kind == 5:  # drill, pistol, hair dryer
        parts.append((_cylinder(0.24, 1.2, top=0.16, bevel=0.05), "body", _about_x(np.pi / 2), (end, y + 0.25, 0.0)))
        parts.append((_cylinder(0.05, 0.5), "tip", _about_x(np.pi / 2), (end, y - 0.55, 0.0)))
        parts.append((_box((0.2, 0.5, 0.35), 0.05), "foot", R, (-end, y, 0.0)))
    elif kind == 6:  # scissors, pliers
        other = handle.moved(_about_z(rng.uniform(0.25, 0.7)))
        parts.append((other, "handle", R, (0.0, 0.0, 0.03)))
        parts.append((_torus(0.2, 0.05), "rings", R, (-end - 0.1, y, 0.0)))
        parts.append((_cylinder(0.1, 0.25), "tip", R, (0.0, 0.0, 0.0)))
    else:  # anything on a stick
        parts.append((_any_patch(rng).moved(scale=0.45), "head", _any_rotation(rng), (end, y, 0.0)))
    if rng.random() < 0.4:
        t = (rng.uniform(-0.4, 0.3) * length, 0.0, 0.0)
        parts.append((_cylinder(grip * 1.3, 0.1), "ring", _about_y(np.pi / 2), t))
    for patch, role, turn, t in parts:
        build.add(patch.moved(turn, t), role, R=upright)


def _vehicle(build: _Build) -> None:
    """Cars, lorries, trains, boats and aeroplanes of a sort; forwards is x."""
    rng = build.rng
    length, width, body = rng.uniform(1.4, 2.2), rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.5)
    power = rng.choice([3, 6, 10])
    n = 10
    along = np.linspace(1, -1, n)
    taper = np.clip(1.05 - np.abs(along) ** rng.choice([4, 8]) * rng.uniform(0.1, 0.6), 0.1, 1)
    hull = _loft(0.5 * length * along, 0.5 * body * taper, 0.5 * width * taper, power=power)
    build.add(hull, "hull", R=_about_y(np.pi / 2))
    kind = rng.choice(["car", "lorry", "boat", "plane"], p=(0.5, 0.25, 0.12, 0.13))
    cabin = rng.uniform(0.2, 0.45)
    at = rng.uniform(-0.25, 0.25) * length
    if kind != "plane":
        top = _loft(
            np.array([1, 0.95, 0.5, 0.0]) * cabin,
            0.5 * length * np.array([0.2, 0.25, 0.35, 0.42]) * rng.uniform(0.7, 1.2),
            0.45 * width * np.array([0.75, 0.8, 0.9, 1]),
            power=8,
        )
        build.add(top, "cabin", t=(at, 0, 0.45 * body), printed=bool(rng.random() < 0.4))
    if kind == "lorry":
        build.add(_box((0.5 * length, width, 0.6), 0.03), "load", t=(-0.2 * length, 0, 0.5 * body + 0.3))
    if kind in ("car", "lorry"):
        wheel, thick = rng.uniform(0.16, 0.26), rng.uniform(0.1, 0.2)
        for x in (-0.32, 0.32) if kind == "car" else (-0.36, -0.12, 0.36):
            for side in (-1, 1):
                t = (x * length, side * 0.48 * width, -0.5 * body)
                build.add(_cylinder(wheel, thick, bevel=0.03), "wheel", R=_about_x(np.pi / 2), t=t, printed=False)
        for side in (-1, 1):
            build.add(_ball((0.05, 0.08, 0.07), 7, 10), "lamp", t=(0.48 * length, side * 0.3 * width, 0), printed=False)
    elif kind == "boat":
        build.add(_cylinder(0.04, 1.0), "mast", t=(at, 0, 0.6), printed=False)
        build.add(_extruded([(0, 0), (0.8, 0), (0, 0.9)], 0.02), "sail", R=_about_x(np.pi / 2), t=(at, 0, 0.2))
    else:
        wing = rng.uniform(0.7, 1.1)
        outline = np.array([(0.3, 0), (-0.1, wing), (-0.35, wing), (-0.2, 0), (-0.35, -wing), (-0.1, -wing)])
        build.add(_extruded(outline, 0.05), "wing", t=(0.1, 0, rng.uniform(-0.1, 0.2)))
        build.add(_extruded(0.4 * outline, 0.04), "wing", t=(-0.45 * length, 0, 0.1))
        fin = _extruded([(0, 0), (0.35, 0), (0.05, 0.5), (-0.1, 0.5)], 0.04)
        build.add(fin, "fin", R=_about_x(np.pi / 2), t=(-0.5 * length, 0, 0.1))
    if rng.random() < 0.5:
        t = (rng.uniform(-0.4, 0.4) * length, rng.uniform(-0.2, 0.2), 0.5 * body + 0.1)
        build.add(_any_patch(rng).moved(scale=0.18), "extra", t=t, R=_quarter_turns(rng))


def _furniture(build: _Build) -> None:
    """Chairs, tables, lamps, shelves."""
    rng = build.rng
    kind = rng.choice(["chair", "table", "lamp", "shelf"], p=(0.4, 0.15, 0.25, 0.2))
    if kind in ("chair", "table"):
        w, d, h = rng.uniform(0.7, 1.1), rng.uniform(0.6, 1.0) * (1.6 if kind == "table" else 1), rng.uniform(0.5, 1.1)
        seat = _box((w, d, rng.uniform(0.05, 0.2)), 0.03)
        build.add(seat, "seat")
        if rng.random() < 0.7:
            splay, leg = rng.uniform(0.7, 1.1), rng.uniform(0.03, 0.07)
            for sx in (-1, 1):
                for sy in (-1, 1):
                    x, y = sx * 0.42 * w, sy * 0.42 * d
                    path = np.linspace((x, y, 0), (x * splay, y * splay, -h), 3)
                    build.add(_tube(path, leg, 8), "leg", printed=False)
        else:
            build.add(_cylinder(0.07, h), "leg", t=(0, 0, -0.5 * h), printed=False)
            build.add(_cylinder(0.4 * w, 0.08, top=0.2 * w), "foot", t=(0, 0, -h), printed=False)
        if kind == "chair":
            tall = rng.uniform(0.5, 1.0)
            back = _box((w, 0.08, tall), 0.03)
            build.add(back, "back", R=_about_x(-rng.uniform(0, 0.35)), t=(0, 0.45 * d, 0.5 * tall))
            for side in (-1, 1)[: rng.integers(0, 3)]:
                build.add(_box((0.08, 0.8 * d, 0.08), 0.02), "arm", t=(side * 0.46 * w, 0, 0.3), printed=False)
                build.add(_box((0.06, 0.06, 0.3)), "arm", t=(side * 0.46 * w, -0.3 * d, 0.15), printed=False)
        else:
            for _ in range(rng.integers(0, 3)):
                t = (rng.uniform(-0.3, 0.3) * w, rng.uniform(-0.3, 0.3) * d, 0.2)
                build.add(_any_patch(rng).moved(scale=0.2), t=t)
    elif kind == "lamp":
        elbow = (rng.uniform(-0.4, 0.4), 0, 0.7)
        joints = np.array([(0, 0, 0), elbow, (rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3), 1.3)])
        build.add(_cylinder(rng.uniform(0.3, 0.5), 0.1, bevel=0.03), "foot")
        for a, b in pairwise(joints):
            build.add(_tube(np.linspace(a, b, 3), 0.05, 8), "arm", printed=False)
        wide, tall = rng.uniform(0.35, 0.6), rng.uniform(0.3, 0.6)
        shade = _lathe([(wide * rng.uniform(0.2, 0.8), tall), (wide, 0)], 28)
        build.add(shade, "shade", R=_about_x(rng.uniform(-1.2, 1.2)), t=joints[-1])
    else:
        w, d, h = rng.uniform(0.7, 1.3), rng.uniform(0.3, 0.5), rng.uniform(1.0, 1.8)
        boards = int(rng.integers(2, 5))
        for side in (-1, 1):
            build.add(_box((0.06, d, h)), "side", t=(side * 0.5 * w, 0, 0))
        if rng.random() < 0.5:
            build.add(_box((w, 0.03, h)), "back", t=(0, 0.5 * d, 0))
        for z in np.linspace(-0.5, 0.5, boards) * h:
            build.add(_box((w, d, 0.05)), "board", t=(0, 0, z))
            x = -0.4 * w
            while x < 0.3 * w and rng.random() < 0.75:
                size = rng.uniform((0.06, 0.5 * d, 0.15), (0.2, 0.9 * d, 0.85 * h / boards))
                build.add(_box(size, 0.01), t=(x, 0, z + 0.5 * size[2]))
                x += size[0] * rng.uniform(1, 1.8)


def _animal(build: _Build) -> None:
    """Four legs or two, a head with ears, a tail; looks along x."""
    rng = build.rng
    length, fat = rng.uniform(0.5, 1.0), rng.uniform(0.25, 0.5)
    two_legs = rng.random() < 0.35
    if two_legs:
        build.add(_ball((fat, fat * rng.uniform(0.9, 1.4), length), 16, 24), "coat")
        neck = np.array([0.0, 0.0, length])
    else:
        build.add(_ball((length, fat, fat * rng.uniform(0.8, 1.2)), 16, 24), "coat")
        neck = np.array([0.85 * length, 0, 0.3 * fat])
    if rng.random() < 0.4:
        build.add(_ball((0.6 * fat, 0.7 * fat, 0.7 * fat)), "belly", t=(0.35 * fat, 0, -0.45 * fat))
    size = rng.uniform(0.2, 0.42)
    head = np.add(neck, (rng.uniform(0, 0.4), 0, rng.uniform(0.15, 0.7)))
    build.add(_tube(np.linspace(0.7 * neck, head, 4), 0.6 * size), "coat")
    build.add(_ball((size * rng.uniform(0.9, 1.3), size, size)), "coat" if rng.random() < 0.6 else "head", t=head)
    snout = rng.uniform(0.2, 0.5)
    turn = _about_y(np.pi / 2 + rng.uniform(-0.1, 0.4))
    nose = _cylinder(0.55 * size, snout, top=rng.uniform(0.05, 0.4) * size, bevel=0.02, segments=16)
    build.add(nose, "snout", R=turn, t=np.add(head, (size + 0.2 * snout, 0, -0.1 * size)), printed=False)
    ear = rng.uniform(0.1, 0.5)
    for side in (-1, 1):
        build.add(
            _ball((0.06, 0.1 + 0.1 * rng.random(), ear), 9, 12),
            "ears",
            R=_about_x(-side * rng.uniform(0.1, 0.6)),
            t=np.add(head, (0, side * 0.6 * size, size + 0.4 * ear)),
            printed=False,
        )
        eye = np.add(head, (0.75 * size, side * 0.5 * size, 0.45 * size))
        build.add(_ball((0.06, 0.06, 0.06), 7, 10), "eyes", t=eye, printed=False)
    leg = rng.uniform(0.3, 0.9)
    feet = [(0.0, -1), (0.0, 1)] if two_legs else [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    for fx, fy in feet:
        hip = np.array([0.65 * length * fx, 0.6 * fat * fy, -0.7 * length if two_legs else 0])
        toe = np.add(hip, (rng.uniform(-0.2, 0.2), 0, -leg - 0.5 * fat))
        build.add(_tube(np.linspace(hip, toe, 5), np.linspace(0.14, 0.08, 5)), "legs", printed=False)
        build.add(_ball((0.14, 0.09, 0.06), 7, 10), "feet", t=np.add(toe, (0.05, 0, 0)), printed=False)
    if two_legs:
        for side in (-1, 1):
            hand = np.array([rng.uniform(-0.2, 0.6), side * (fat + rng.uniform(0.2, 0.5)), rng.uniform(-0.2, 0.9)])
            build.add(_tube(np.linspace((0, side * 0.6 * fat, 0.4 * length), hand, 5), 0.09), "arms", printed=False)
    if rng.random() < 0.8:
        s = np.linspace(0, 1, 9)[:, None]
        start = np.array([-0.2 * fat, 0, -0.6 * length]) if two_legs else np.array([-0.9 * length, 0, 0])
        path = start + s * (-rng.uniform(0.3, 0.8), 0, 0) + s**2 * (0, rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.8))
        build.add(_tube(path, np.linspace(0.09, 0.04, 9)), "tail")
    if rng.random() < 0.3:
        build.add(_any_patch(rng).moved(scale=0.25), "extra", t=np.add(head, (0, 0, size + 0.1)))


def _device(build: _Build) -> None:
    """Remote controls, cameras, radios, phones, kitchen machines: a body with what one presses, turns and reads."""
    rng = build.rng
    size = np.array([rng.uniform(0.4, 1.4), rng.uniform(0.15, 0.9), rng.uniform(0.4, 1.6)])
    bevel = rng.choice([0.02, 0.08, 0.2]) * size.min()
    if rng.random() < 0.3:
        share = np.linspace(1, -1, 7)
        shape = _smooth_curve(rng, 7, 0.7, 1.0)
        body = _loft(0.5 * size[2] * share, 0.5 * size[0] * shape, 0.5 * size[1], power=7)
    else:
        body = _box(size, bevel)
    build.add(body, "body")
    front = -0.5 * size[1]
    if rng.random() < 0.6:
        w, h = size[0] * rng.uniform(0.4, 0.85), size[2] * rng.uniform(0.15, 0.5)
        screen = _box((w, 0.04, h), 0.01)
        build.add(screen, "screen", t=(0, front, rng.uniform(0, 0.22) * size[2]))
    if rng.random() < 0.8:
        columns, rows = rng.integers(1, 5), rng.integers(1, 6)
        step = np.array([0.8 * size[0] / columns, rng.uniform(0.3, 0.6) * size[2] / rows])
        button = 0.35 * step.min()
        for i in range(columns):
            for j in range(rows):
                if rng.random() < 0.15:
                    continue
                key = _cylinder(button, 0.08, segments=12) if (i + j) % 2 else _box((2 * button, 2 * button, 0.08))
                t = ((i + 0.5) * step[0] - 0.4 * size[0], front, -0.45 * size[2] + (j + 0.5) * step[1])
                role = "buttons" if rng.random() < 0.85 else "red button"
                build.add(key, role, R=_about_x(np.pi / 2), t=t, printed=False)
    for _ in range(rng.integers(0, 4)):
        side = rng.integers(6)
        axis, sign = side // 2, 1 - 2 * (side % 2)
        t = rng.uniform(-0.35, 0.35, 3) * size
        t[axis] = sign * 0.5 * size[axis]
        turn = (_about_y(np.pi / 2), _about_x(np.pi / 2), np.eye(3))[axis]
        r = 0.3 * rng.uniform(0.3, 1) * np.delete(size, axis).min()
        knob = _cylinder(r, rng.uniform(0.1, 0.5), top=r * rng.uniform(0.5, 1), bevel=0.02, segments=20)
        build.add(knob, "knob", R=turn, t=t, printed=False)
    if rng.random() < 0.3:  # lens
        r = rng.uniform(0.2, 0.45) * min(size[0], size[2])
        t = (rng.uniform(-0.2, 0.2) * size[0], front - 0.1, rng.uniform(-0.2, 0.2) * size[2])
        build.add(_cylinder(r, 0.4, bevel=0.03), "lens", R=_about_x(np.pi / 2), t=t, printed=False)
    if rng.random() < 0.3:  # aerial or cable
        n = 10
        steps = np.add(rng.normal(0, 0.06, (n, 3)), (0, 0, 0.07))
        path = np.cumsum([(0.3 * size[0], 0, 0.5 * size[2]), *steps], 0)
        build.add(_tube(path, 0.03, 8), "cable", printed=False)
    if rng.random() < 0.3:  # carrying handle
        angle = np.linspace(0, np.pi, 14)
        path = np.stack([0.4 * size[0] * np.cos(angle), 0 * angle, 0.5 * size[2] + 0.3 * np.sin(angle)], 1)
        build.add(_tube(path, 0.05), "handle", printed=False)


def _letters(build: _Build) -> None:
    """Extruded outlines, one to three, standing or stacked."""
    rng = build.rng
    stacked = rng.random() < 0.3
    for i in range(rng.integers(1, 4)):
        patch = _extruded(_outline(rng), rng.uniform(0.2, 0.9))
        if stacked:
            build.add(patch, R=_about_z(rng.uniform(0, 6)), t=(0, 0, 0.5 * i))
        else:
            turn = _about_z(rng.choice([0, rng.uniform(-0.7, 0.7)]))
            build.add(patch, R=turn @ _about_x(np.pi / 2), t=(1.5 * i, 0, 0))
    if rng.random() < 0.4:
        build.add(_box((2.2, 1.0, 0.2), 0.03), "plinth", t=(0.4, 0, -1.05))


_FAMILIES: dict[str, tuple[Callable[[_Build], None], float]] = {
    "assembly": (_assembly, 22),
    "sculpture": (_sculpture, 17),
    "pebble": (_pebble, 5),
    "carton": (_carton, 9),
    "cup": (_cup, 8),
    "bottle": (_bottle, 8),
    "tool": (_tool, 9),
    "vehicle": (_vehicle, 5),
    "furniture": (_furniture, 5),
    "animal": (_animal, 6),
    "device": (_device, 7),
    "letters": (_letters, 4),
}
"""What there is, and how often."""
