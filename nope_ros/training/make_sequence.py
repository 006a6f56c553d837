"""Render the sequence that ships with the package: a toy delivery lorry on a table, seen by a hand-held camera.

    python -m nope_ros.training.make_sequence --out demo/sequence

The lorry is modelled and painted here, so that it is ours and in no training set. No two of its sides look alike. The
same NumPy, OpenCV, Pillow and Matplotlib (whose font it is lettered in) give the same pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nope_ros.draw import font
from nope_ros.rendering.mesh import Mesh, make_mesh
from nope_ros.rendering.render import Lighting, render
from nope_ros.rotations import exp, look_at

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]
Quad = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the atlas

FRAMES = 90
WIDTH, HEIGHT = 640, 480
K = np.array([[615.0, 0.0, 321.4], [0.0, 614.2, 238.1], [0.0, 0.0, 1.0]])
SEED = 20240617

CREAM: Colour = (244, 232, 205)
RED: Colour = (206, 52, 44)
TEAL: Colour = (20, 112, 122)
ORANGE: Colour = (245, 152, 38)
DARK: Colour = (38, 40, 46)
GLASS: Colour = (44, 62, 82)
STEEL: Colour = (168, 172, 178)


# --- The lorry -------------------------------------------------------------------------------------------------------

ATLAS = 1024
_LEFT: Quad = (0, 0, 640, 380)
_RIGHT: Quad = (0, 384, 640, 764)
_REAR: Quad = (644, 0, 1024, 330)
_ROOF: Quad = (0, 768, 640, 1024)
_CAB_LEFT: Quad = (644, 334, 1004, 604)
_CAB_RIGHT: Quad = (644, 608, 1004, 878)
_FRONT: Quad = (644, 882, 804, 1024)
_SCREEN: Quad = (808, 882, 1004, 964)
_HUB: Quad = (808, 968, 858, 1018)
_SWATCHES: dict[Colour, Quad] = {
    colour: (864 + 24 * i, 972, 880 + 24 * i, 988) for i, colour in enumerate((CREAM, RED, TEAL, ORANGE, DARK, STEEL))
}


def _lettering(image: Picture, text: str, centre: tuple[float, float], size: int, colour: Colour) -> None:
    canvas = Image.fromarray(image)
    ImageDraw.Draw(canvas).text(centre, text, fill=colour, font=font(size, True), anchor="mm")
    image[:] = np.asarray(canvas)


def _side_left(image: Picture) -> None:
    """Cream, a big name, a red band that rises to the front."""
    image[:] = CREAM
    h, w = image.shape[:2]
    cv2.fillPoly(image, [np.array([[0, h], [0, h - 70], [w, h - 130], [w, h]], np.int32)], RED, cv2.LINE_AA)
    cv2.fillPoly(
        image, [np.array([[0, h - 82], [w, h - 142], [w, h - 156], [0, h - 96]], np.int32)], ORANGE, cv2.LINE_AA
    )
    _lettering(image, "NOPE", (w * 0.47, h * 0.34), 190, TEAL)
    _lettering(image, "one view is enough", (w * 0.5, h * 0.85), 44, CREAM)
    cv2.rectangle(image, (3, 3), (w - 4, h - 4), (120, 100, 80), 5)


def _side_right(image: Picture) -> None:
    """Teal, with a parcel painted on it."""
    image[:] = TEAL
    h, w = image.shape[:2]
    cv2.circle(image, (w // 3, h // 2), 150, ORANGE, -1, cv2.LINE_AA)
    x, y, s = w // 3, h // 2 + 8, 92
    top = np.array([[x, y - s], [x + s, y - s // 2], [x, y], [x - s, y - s // 2]], np.int32)
    left = np.array([[x - s, y - s // 2], [x, y], [x, y + s], [x - s, y + s // 2]], np.int32)
    right = np.array([[x + s, y - s // 2], [x, y], [x, y + s], [x + s, y + s // 2]], np.int32)
    for polygon, colour in ((top, (222, 178, 120)), (left, (186, 138, 84)), (right, (150, 106, 60))):
        cv2.fillPoly(image, [polygon], colour, cv2.LINE_AA)
    tape = np.array([[x - s // 2, y - 3 * s // 4], [x + s // 2, y - s // 4], [x + s // 2, y + s // 5]], np.int32)
    cv2.polylines(image, [tape], False, (240, 226, 190), 16, cv2.LINE_AA)
    _lettering(image, "ROS", (w * 0.76, h * 0.33), 104, CREAM)
    _lettering(image, "2", (w * 0.76, h * 0.68), 150, ORANGE)
    cv2.rectangle(image, (3, 3), (w - 4, h - 4), (10, 60, 66), 5)


def _rear(image: Picture) -> None:
    """A roller door, chevrons below it, lamps."""
    h, w = image.shape[:2]
    image[:] = STEEL
    for y in range(18, h - 84, 22):
        cv2.line(image, (16, y), (w - 17, y), (112, 116, 124), 4)
    cv2.rectangle(image, (0, 0), (w - 1, h - 1), CREAM, 26)
    band = image[h - 78 :]
    band[:] = (248, 226, 60)
    for x in range(-80, w + 80, 84):
        stripe = np.array([[x, 78], [x + 42, 78], [x + 84, 0], [x + 42, 0]], np.int32)
        cv2.fillPoly(band, [stripe], RED, cv2.LINE_AA)
    for x in (34, w - 34):
        cv2.circle(image, (x, h - 98), 20, (150, 16, 20), -1, cv2.LINE_AA)
    _lettering(image, "7", (w * 0.5, h * 0.4), 130, DARK)


def _roof(image: Picture) -> None:
    """Cream, with a hatch and a number towards the rear."""
    h, w = image.shape[:2]
    image[:] = (236, 226, 204)
    cv2.rectangle(image, (60, 46), (210, h - 47), (198, 192, 178), -1)
    cv2.rectangle(image, (60, 46), (210, h - 47), (150, 144, 130), 6)
    cv2.rectangle(image, (w - 70, 0), (w - 30, h), RED, -1)


def _cab_side(image: Picture, mirrored: bool) -> None:
    """Window, door, handle; forward is to the left in the picture of the left side."""
    h, w = image.shape[:2]
    image[:] = RED
    window = np.array([[92, 26], [300, 26], [300, 128], [58, 128]], np.int32)
    cv2.fillPoly(image, [window], GLASS, cv2.LINE_AA)
    cv2.fillPoly(
        image, [np.array([[120, 26], [176, 26], [120, 128], [72, 128]], np.int32)], (92, 120, 146), cv2.LINE_AA
    )
    cv2.polylines(image, [np.array([[70, 250], [52, 132], [92, 18], [310, 18], [310, 250]])], False, (120, 22, 20), 5)
    cv2.rectangle(image, (250, 150), (292, 160), STEEL, -1)
    cv2.rectangle(image, (0, 200), (w, 216), ORANGE if mirrored else CREAM, -1)
    if mirrored:
        image[:] = image[:, ::-1]
        _lettering(image, "express", (w * 0.52, h * 0.66), 38, CREAM)
    else:
        cv2.circle(image, (180, 172), 26, CREAM, -1, cv2.LINE_AA)
        _lettering(image, "7", (180, 172), 38, RED)


def _front(image: Picture) -> None:
    h, w = image.shape[:2]
    image[:] = RED
    cv2.rectangle(image, (44, 16), (w - 45, 70), DARK, -1)
    for y in range(24, 70, 12):
        cv2.line(image, (46, y), (w - 47, y), STEEL, 3)
    for x in (22, w - 23):
        cv2.circle(image, (x, 46), 18, (90, 30, 28), -1, cv2.LINE_AA)
        cv2.circle(image, (x, 46), 15, (255, 246, 214), -1, cv2.LINE_AA)
    cv2.rectangle(image, (0, h - 46), (w, h), STEEL, -1)
    cv2.rectangle(image, (46, h - 42), (w - 47, h - 10), (250, 250, 244), -1)
    _lettering(image, "NP-341", (w / 2, h - 26), 20, DARK)


def _screen(image: Picture) -> None:
    h, w = image.shape[:2]
    image[:] = RED
    cv2.rectangle(image, (12, 8), (w - 13, h - 9), GLASS, -1)
    cv2.fillPoly(image, [np.array([[40, 8], [84, 8], [50, h - 9], [12, h - 9], [12, 60]])], (98, 126, 150), cv2.LINE_AA)
    cv2.line(image, (w // 2, h - 10), (w - 50, 36), DARK, 4, cv2.LINE_AA)


def _hub(image: Picture) -> None:
    h, w = image.shape[:2]
    image[:] = DARK
    cv2.circle(image, (w // 2, h // 2), 15, STEEL, -1, cv2.LINE_AA)
    cv2.circle(image, (w // 2, h // 2), 6, RED, -1, cv2.LINE_AA)


@lru_cache(maxsize=1)
def _atlas() -> Picture:
    atlas = np.full((ATLAS, ATLAS, 3), 128, np.uint8)
    painters: tuple[tuple[Quad, Callable[[Picture], None]], ...] = (
        (_LEFT, _side_left),
        (_RIGHT, _side_right),
        (_REAR, _rear),
        (_ROOF, _roof),
        (_CAB_LEFT, lambda image: _cab_side(image, False)),
        (_CAB_RIGHT, lambda image: _cab_side(image, True)),
        (_FRONT, _front),
        (_SCREEN, _screen),
        (_HUB, _hub),
    )
    for (x0, y0, x1, y1), paint in painters:
        image = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        paint(image)
        atlas[y0:y1, x0:x1] = image
    for colour, (x0, y0, x1, y1) in _SWATCHES.items():
        atlas[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = colour
    return atlas


@dataclass(frozen=True)
class _Part:
    """Triangles with atlas coordinates: vertices (V, 3) in centimetres, faces (F, 3), uv (V, 2) in 0..1."""

    vertices: Array
    faces: NDArray[np.int64]
    uv: Array


def _quad(corners: Sequence[Sequence[float]], where: Quad) -> _Part:
    """Four corners, from the picture's top left clockwise as seen from outside."""
    x0, y0, x1, y1 = where
    # Half a pixel inside, so that neighbours in the atlas do not bleed in.
    uv = np.array([[x0 + 1, y0 + 1], [x1 - 1, y0 + 1], [x1 - 1, y1 - 1], [x0 + 1, y1 - 1]], np.float64) / ATLAS
    return _Part(np.array(corners, np.float64), np.array([[0, 1, 2], [0, 2, 3]]), uv)


def _box(
    low: Sequence[float], high: Sequence[float], colour: Colour, pictures: dict[str, Quad] | None = None
) -> list[_Part]:
    """An upright box; x forward, y left, z up. Sides without a picture are plain."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    where = pictures or {}
    sides = {
        "left": [(x1, y1, z1), (x0, y1, z1), (x0, y1, z0), (x1, y1, z0)],
        "right": [(x0, y0, z1), (x1, y0, z1), (x1, y0, z0), (x0, y0, z0)],
        "front": [(x1, y0, z1), (x1, y1, z1), (x1, y1, z0), (x1, y0, z0)],
        "rear": [(x0, y1, z1), (x0, y0, z1), (x0, y0, z0), (x0, y1, z0)],
        "top": [(x0, y1, z1), (x1, y1, z1), (x1, y0, z1), (x0, y0, z1)],
        "bottom": [(x0, y0, z0), (x1, y0, z0), (x1, y1, z0), (x0, y1, z0)],
    }
    return [_quad(corners, where.get(name, _SWATCHES[colour])) for name, corners in sides.items()]


def _cylinder(
    centre: Sequence[float], axis: int, radius: float, length: float, colour: Colour, lids: Quad | None = None
) -> list[_Part]:
    """A closed cylinder along an axis (0..2); ``lids`` is the picture on both ends."""
    n = 28
    angle = np.linspace(0, 2 * np.pi, n + 1)
    across, other = (axis + 1) % 3, (axis + 2) % 3
    ring = np.zeros((n + 1, 3))
    ring[:, across], ring[:, other] = radius * np.cos(angle), radius * np.sin(angle)
    shift = np.zeros(3)
    shift[axis] = length / 2
    middle = np.asarray(centre, np.float64)
    sx0, sy0, sx1, sy1 = _SWATCHES[colour]
    plain = np.array([(sx0 + sx1) / 2, (sy0 + sy1) / 2]) / ATLAS
    i = np.arange(n)
    wall = np.concatenate([np.stack([i, i + 1, i + n + 1], 1), np.stack([i + 1, i + n + 2, i + n + 1], 1)])
    parts = [_Part(np.concatenate([ring - shift, ring + shift]) + middle, wall, np.tile(plain, (2 * n + 2, 1)))]
    for end in (-1, 1):
        uv = np.tile(plain, (n + 2, 1))
        if lids is not None:
            x0, y0, x1, y1 = lids
            spread = 0.5 + 0.48 * np.stack([np.cos(angle), np.sin(angle)], 1)
            uv = np.concatenate([spread, [[0.5, 0.5]]]) * [x1 - x0, y1 - y0]
            uv = (uv + np.array([x0, y0])) / ATLAS
        fan = np.stack([i, i + 1, np.full(n, n + 1)], 1)
        parts.append(_Part(np.concatenate([ring, np.zeros((1, 3))]) + end * shift + middle, fan, uv))
    return parts


def _cab() -> list[_Part]:
    """The driver's cab: a profile in x and z between two sides."""
    profile = np.array(
        [(4.6, 2.8), (12.3, 2.8), (12.5, 6.3), (10.7, 10.7), (4.6, 10.7)]
    )  # counter-clockwise from the left
    half = 5.0
    low, high = profile.min(0), profile.max(0)
    share = (profile - low) / (high - low)
    parts = []
    for y, (x0, y0, x1, y1), forward in ((half, _CAB_LEFT, -1), (-half, _CAB_RIGHT, 1)):
        u = share[:, 0] if forward > 0 else 1 - share[:, 0]
        uv = np.stack([x0 + 1 + u * (x1 - x0 - 2), y1 - 1 - share[:, 1] * (y1 - y0 - 2)], 1) / ATLAS
        vertices = np.column_stack([profile[:, 0], np.full(5, y), profile[:, 1]])
        parts.append(_Part(vertices, np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4]]), uv))
    edges = ((1, 2, _FRONT), (2, 3, _SCREEN), (3, 4, _SWATCHES[RED]), (4, 0, _SWATCHES[RED]))
    for a, b, where in edges:
        (xa, za), (xb, zb) = profile[a], profile[b]
        parts.append(_quad([(xb, -half, zb), (xb, half, zb), (xa, half, za), (xa, -half, za)], where))
    return parts


def lorry() -> Mesh:
    """The toy: metres, z up, x forward, origin at the centre of its bounding box; 25 cm long."""
    parts = [
        *_box((-12.6, -4.0, 2.0), (12.0, 4.0, 3.2), DARK),
        *_box(
            (-12.6, -5.6, 3.2),
            (3.9, 5.6, 13.0),
            CREAM,
            {"left": _LEFT, "right": _RIGHT, "rear": _REAR, "top": _ROOF},
        ),
        *_cab(),
        *_box((12.2, -5.2, 2.0), (13.0, 5.2, 3.4), STEEL),  # bumper
        *_cylinder((7.2, 2.4, 11.5), 2, 1.1, 1.7, ORANGE),  # beacon, on the driver's side
        *_cylinder((4.25, -4.4, 8.6), 2, 0.55, 11.0, STEEL),  # exhaust, on the other
        *_box((9.4, 5.0, 8.0), (9.8, 6.4, 9.6), DARK),  # mirrors
        *_box((9.4, -6.4, 8.0), (9.8, -5.0, 9.6), DARK),
        *_cylinder((-8.8, 2.0, 13.9), 2, 2.2, 1.7, DARK, _HUB),  # spare wheel on the roof
    ]
    for rail in (-4.2, -1.6):  # ladder
        parts += _box((-11.5, rail - 0.2, 13.4), (3.0, rail + 0.2, 13.9), ORANGE)
    for x in np.arange(-10.5, 2.6, 2.4):
        parts += _box((x - 0.2, -4.2, 13.5), (x + 0.2, -1.6, 13.8), STEEL)
    for x in (-10.6, 2.0):
        parts += _box((x - 0.3, -4.3, 13.0), (x + 0.3, -1.5, 13.4), DARK)
    for x in (8.6, -6.0, -10.0):
        for y in (-4.5, 4.5):
            parts += _cylinder((x, y, 1.95), 1, 1.95, 1.7, DARK, _HUB)
    vertices = np.concatenate([part.vertices for part in parts]) / 100
    starts = np.cumsum([0] + [len(part.vertices) for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts[:-1], strict=True)])
    vertices -= 0.5 * (vertices.min(0) + vertices.max(0))
    uv = np.concatenate([part.uv for part in parts])
    return make_mesh(vertices, faces, uv=uv, texture=_atlas(), name="lorry")


# --- The room --------------------------------------------------------------------------------------------------------

_TABLE = (0.62, 0.46)  # half sides, metres
_PIXELS = 1600  # pixels a metre of the table's picture
_SUN = np.array([0.45, 0.55, 0.95]) / np.linalg.norm([0.45, 0.55, 0.95])


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], grain: tuple[float, float]) -> Array:
    """Noise of standard deviation 1 whose features are ``grain`` pixels large (x, y)."""
    noise = cv2.GaussianBlur(rng.normal(size=shape), (0, 0), sigmaX=grain[0], sigmaY=grain[1])
    scaled: Array = (noise - noise.mean()) / noise.std()
    return scaled


@lru_cache(maxsize=1)
def _table() -> Picture:
    """The table top: planks, and flat things lying on it."""
    rng = np.random.default_rng([SEED, 1])
    w, h = int(2 * _TABLE[0] * _PIXELS), int(2 * _TABLE[1] * _PIXELS)
    planks = 7
    wood = np.zeros((h, w))
    for i in range(planks):
        rows = slice(i * h // planks, (i + 1) * h // planks)
        shape = (rows.stop - rows.start, w)
        bend = _smooth_noise(rng, shape, (220, 14)) * 9 + np.arange(shape[0])[:, None] * 0.45 + rng.uniform(0, 60)
        rings = np.sin(bend) * 0.5 + 0.35 * np.sin(2.3 * bend + 1)
        wood[rows] = 0.07 * rings + 0.05 * _smooth_noise(rng, shape, (60, 1.2)) + rng.normal(0, 0.06)
        wood[rows.start : rows.start + 4] -= 0.3
    top = np.array([176, 128, 84.0]) * (1 + wood)[..., None]

    def at(x: float, y: float) -> tuple[int, int]:
        """Metres from the middle of the table (x right, y up in its picture) → pixel."""
        return int(w / 2 + x * _PIXELS), int(h / 2 - y * _PIXELS)

    def lay(corners: Sequence[tuple[float, float]], colour: Colour, lift: float = 6.0) -> None:
        polygon = np.array([at(*corner) for corner in corners], np.int32)
        shadow = np.zeros((h, w), np.float32)
        cv2.fillPoly(shadow, [polygon + np.array([int(-lift), int(lift)])], 1.0)
        top[:] *= 1 - 0.4 * cv2.GaussianBlur(shadow, (0, 0), lift)[..., None]
        cv2.fillPoly(top, [polygon], colour, cv2.LINE_AA)

    def turned(x: float, y: float, sx: float, sy: float, degrees: float) -> list[tuple[float, float]]:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        corners = ((-sx, -sy), (sx, -sy), (sx, sy), (-sx, sy))
        return [(x + c * a - s * b, y + s * a + c * b) for a, b in corners]

    lay(turned(0.02, -0.01, 0.26, 0.19, 8), (226, 228, 224), 4)  # a sheet of paper with streets drawn on it
    for offset in (-0.10, 0.05):
        street = np.array([at(*p) for p in turned(0.02, -0.01 + offset, 0.25, 0.014, 8)], np.int32)
        cv2.fillPoly(top, [street], (150, 154, 160), cv2.LINE_AA)
    street = np.array([at(*p) for p in turned(0.14, -0.01, 0.014, 0.18, 8)], np.int32)
    cv2.fillPoly(top, [street], (150, 154, 160), cv2.LINE_AA)
    for x, y, radius, green in ((-0.14, 0.12, 0.028, 150), (-0.16, -0.03, 0.022, 170), (0.21, 0.11, 0.026, 140)):
        cv2.circle(top, at(x, y), int(radius * _PIXELS), (110, green, 104), -1, cv2.LINE_AA)
    lay(turned(-0.42, 0.10, 0.10, 0.14, -17), (46, 74, 128), 10)  # notebook
    lay(turned(-0.42, 0.10, 0.085, 0.016, -17), (230, 226, 214), 1)
    lay(turned(0.40, -0.24, 0.055, 0.055, 24), (246, 214, 84), 3)  # note
    lay(turned(0.33, 0.27, 0.11, 0.005, -38), (232, 92, 40), 5)  # pencil
    lay(turned(-0.12, -0.33, 0.09, 0.0045, 12), (60, 150, 90), 5)
    for x, y, radius in ((0.43, 0.02, 0.013), (0.46, 0.05, 0.011), (-0.33, -0.28, 0.012)):
        lay([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in np.linspace(0, 6.2, 24)], (184, 150, 92), 3)
    return np.clip(top, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _panorama() -> Picture:
    """The room all around, out of focus: azimuth −180..180° by elevation 60..−60°."""
    rng = np.random.default_rng([SEED, 2])
    w, h = 2048, 683
    room = np.empty((h, w, 3))
    rise = np.linspace(1, -1, h)[:, None, None]
    room[:] = np.array([188, 184, 174]) + 26 * np.clip(rise, -1, 1)
    floor = int(h * 0.70)
    room[floor:] = np.array([112, 94, 80]) + 30 * np.linspace(-0.6, 0.6, h - floor)[:, None, None]
    room[floor - 14 : floor] = (226, 222, 214)
    for x in (220, 1240):  # windows
        cv2.rectangle(room, (x, 90), (x + 230, 330), (236, 234, 228), -1)
        for i in range(2):
            cv2.rectangle(room, (x + 14 + 106 * i, 104), (x + 110 + 106 * i, 316), (214, 232, 250), -1)
    for left, shelves in ((620, 4), (1660, 3)):  # shelves with books
        cv2.rectangle(room, (left, 150), (left + 300, floor - 10), (126, 92, 62), -1)
        for i in range(shelves):
            y0, y1 = 162 + i * 78, 230 + i * 78
            cv2.rectangle(room, (left + 10, y0), (left + 290, y1), (66, 50, 40), -1)
            x = left + 14
            while x < left + 270:
                thick, tall = int(rng.integers(9, 24)), int(rng.integers(38, 62))
                colour = tuple(float(c) for c in 0.5 * rng.uniform(50, 215, 3) + 0.5 * np.array([120, 96, 74]))
                cv2.rectangle(room, (x, y1 - tall), (x + thick, y1), colour, -1)
                x += thick + int(rng.integers(1, 8))
    cv2.rectangle(room, (1000, 170), (1120, 290), (70, 60, 54), -1)  # a picture
    cv2.rectangle(room, (1010, 180), (1110, 280), (196, 120, 80), -1)
    cv2.circle(room, (1060, 240), 30, (236, 206, 120), -1)
    cv2.rectangle(room, (40, 170), (150, floor), (150, 120, 92), -1)  # a door
    wide = np.concatenate([room[:, -256:], room, room[:, :256]], 1)
    blurred = cv2.GaussianBlur(wide, (0, 0), 9)[:, 256:-256]
    return np.clip(blurred, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _shadow() -> NDArray[np.float32]:
    """How dark the lorry makes the table, 0..1, in the table's pixels."""
    mesh = lorry()
    vertices = mesh.vertices.astype(np.float64)
    vertices[:, 2] -= vertices[:, 2].min()
    w, h = int(2 * _TABLE[0] * _PIXELS), int(2 * _TABLE[1] * _PIXELS)
    layers = []
    for towards, blur, strength in ((_SUN, 9.0, 0.62), (np.array([0, 0, 1.0]), 26.0, 0.55)):
        flat = vertices[:, :2] - vertices[:, 2:] * towards[:2] / towards[2]
        pixels = np.stack([w / 2 + flat[:, 0] * _PIXELS, h / 2 - flat[:, 1] * _PIXELS], 1)
        layer = np.zeros((h, w), np.float32)
        for triangle in pixels[mesh.faces]:
            cv2.fillConvexPoly(layer, np.round(triangle).astype(np.int32), 1.0)
        layers.append(1 - strength * cv2.GaussianBlur(layer, (0, 0), blur))
    return np.asarray(1 - layers[0] * layers[1], np.float32)


@dataclass(frozen=True)
class Shot:
    """A camera pose: x_camera = R x_object + t, metres."""

    R_camera_object: Array
    t_camera_object: Array


def background(shot: Shot, table_height: float) -> Picture:
    """What is behind the lorry (HEIGHT, WIDTH, 3); ``table_height`` is the table's z in the object frame."""
    fine = 2
    y, x = np.mgrid[0 : HEIGHT * fine, 0 : WIDTH * fine]
    pixels = np.stack([(x + 0.5) / fine - 0.5, (y + 0.5) / fine - 0.5, np.ones(x.shape)], -1)
    rays = pixels @ np.linalg.inv(K).T @ shot.R_camera_object  # object axes
    eye = -shot.R_camera_object.T @ shot.t_camera_object
    panorama = _panorama()
    azimuth = np.arctan2(rays[..., 1], rays[..., 0])
    rise = np.arctan2(rays[..., 2], np.hypot(rays[..., 0], rays[..., 1]))
    map_x = ((azimuth / (2 * np.pi) + 0.5) * (panorama.shape[1] - 1)).astype(np.float32)
    map_y = np.clip((0.5 - rise / np.radians(120)) * (panorama.shape[0] - 1), 0, panorama.shape[0] - 1)
    picture = cv2.remap(panorama, map_x, map_y.astype(np.float32), cv2.INTER_LINEAR).astype(np.float32)
    table = _table()
    h, w = table.shape[:2]
    lit = table.astype(np.float32) * (1 - _shadow())[..., None]
    # The board's edge, 2.5 cm below, then its top: two planes are all it takes at this distance.
    for below, light in ((0.025, 0.30), (0.0, 1.0)):
        far = (table_height - below - eye[2]) / np.where(np.abs(rays[..., 2]) < 1e-9, -1e-9, rays[..., 2])
        u = eye[0] + far * rays[..., 0]
        v = eye[1] + far * rays[..., 1]
        on = (far > 0) & (np.abs(u) < _TABLE[0]) & (np.abs(v) < _TABLE[1])
        at_x = (w / 2 + u * _PIXELS).astype(np.float32)
        at_y = (h / 2 - v * _PIXELS).astype(np.float32)
        seen = cv2.remap(lit, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if light == 1.0:
            # Varnish: the window opposite gleams at low angles.
            gleam = np.clip(1 - np.abs(rise) / np.radians(40), 0, 1)[..., None] ** 2
            seen = seen * 1.06 + gleam * np.array([34, 36, 40], np.float32)
        picture = np.where(on[..., None], seen * light, picture)
    shrunk = cv2.resize(np.clip(picture, 0, 255), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return np.round(shrunk).astype(np.uint8)


# --- The camera ------------------------------------------------------------------------------------------------------


def _sway(rng: np.random.Generator, count: int, frames: float) -> Array:
    """Smooth noise that closes on itself, standard deviation 1, features ``frames`` long."""
    spectrum = np.fft.rfft(rng.normal(size=count))
    frequency = np.arange(len(spectrum))
    noise = np.fft.irfft(spectrum * np.exp(-0.5 * (frequency * frames / count * 2) ** 2), count)
    return np.asarray((noise - noise.mean()) / noise.std(), np.float64)


def shots() -> list[Shot]:
    """The hand-held camera's poses: round to one side, back, round to the other, up and down, near and far."""
    rng = np.random.default_rng([SEED, 3])
    s = np.arange(FRAMES) * (2 * np.pi / FRAMES)
    # From a view of the cab and the lettered side to well beyond what that view shows, both ways.
    swing = np.sin(s)
    azimuth = np.radians(38 + 142 * (0.85 * swing + 0.15 * swing**3) + 1.2 * _sway(rng, FRAMES, 6))
    elevation = np.radians(37.5 + 20 * np.sin(2 * s - 0.45) + 1.0 * _sway(rng, FRAMES, 6))
    distance = 0.64 + 0.10 * np.sin(3 * s + 0.4) + 0.012 * _sway(rng, FRAMES, 5)
    aim_x = 0.045 * np.sin(2 * s) + 0.02 * np.sin(5 * s) + 0.006 * _sway(rng, FRAMES, 5)
    aim_y = 0.030 * np.sin(3 * s) + 0.006 * _sway(rng, FRAMES, 5)
    roll = np.radians(6 * np.sin(s + 0.3) + 3 * np.sin(4 * s) + 0.8 * _sway(rng, FRAMES, 5))
    result = []
    for i in range(FRAMES):
        flat = np.cos(elevation[i])
        eye = distance[i] * np.array([flat * np.cos(azimuth[i]), flat * np.sin(azimuth[i]), np.sin(elevation[i])])
        level = look_at(eye)
        target = level.T @ np.array([aim_x[i], aim_y[i], 0.0])
        R = exp(np.array([0, 0, roll[i]])) @ look_at(eye - target)
        result.append(Shot(R, -R @ eye))
    return result


def _lighting(shot: Shot) -> Lighting:
    directions = np.stack([_SUN, np.array([-0.7, -0.3, 0.35]) / np.linalg.norm([-0.7, -0.3, 0.35])])
    return Lighting(
        directions=np.ascontiguousarray(directions @ shot.R_camera_object.T, np.float32),
        colours=np.array([[0.62, 0.60, 0.55], [0.16, 0.18, 0.22]], np.float32),
        ambient_sky=(0.44, 0.45, 0.48),
        ambient_ground=(0.20, 0.17, 0.14),
        up=tuple(map(float, shot.R_camera_object[:, 2])),  # type: ignore[arg-type]  # three in, three out
        specular=0.16,
        shininess=42.0,
    )


def photograph(shot: Shot, index: int) -> tuple[Picture, NDArray[np.bool_]]:
    """A frame (HEIGHT, WIDTH, 3) and its mask (HEIGHT, WIDTH)."""
    mesh = lorry()
    behind = background(shot, float(mesh.vertices[:, 2].min()))
    view = render(
        mesh,
        shot.R_camera_object,
        shot.t_camera_object,
        K,
        WIDTH,
        HEIGHT,
        lighting=_lighting(shot),
        supersampling=3,
        background=behind,
    )
    rng = np.random.default_rng([SEED, 4, index])
    image = cv2.GaussianBlur(view.rgb, (0, 0), 0.45).astype(np.float64)  # a lens is not a renderer
    image += rng.normal(0, 1.2, image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8), view.mask


def surface_points(mesh: Mesh, count: int) -> NDArray[np.float32]:
    """Points (count, 3) evenly on a mesh."""
    rng = np.random.default_rng([SEED, 5])
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(np.float64) for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    face = rng.choice(len(area), count, p=area / area.sum())
    u, v = rng.random((2, count, 1))
    flip = u + v > 1
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    return np.asarray(a[face] + u * (b - a)[face] + v * (c - a)[face], np.float32)


def write_sequence(out: Path, frames: int = FRAMES) -> None:
    """The sequence in the layout that ``nope-ros demo`` reads; an older one in that folder is overwritten."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "masks").mkdir(exist_ok=True)
    entries = []
    for i, shot in enumerate(shots()[:frames]):
        image, mask = photograph(shot, i)
        names = {"file": f"images/{i:04d}.jpg", "mask": f"masks/{i:04d}.png"}
        quality = [cv2.IMWRITE_JPEG_QUALITY, 80]
        cv2.imwrite(str(out / names["file"]), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
        bits = [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 9]
        cv2.imwrite(str(out / names["mask"]), mask.astype(np.uint8) * 255, bits)
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        x0, y0, x1, y1 = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        entries.append(
            {
                **names,
                "width": WIDTH,
                "height": HEIGHT,
                "K": np.round(K, 6).tolist(),
                "R": np.round(shot.R_camera_object, 9).tolist(),
                "t": np.round(shot.t_camera_object, 6).tolist(),
                "bbox_xywh": [x0, y0, x1 - x0, y1 - y0],
                "mask_touches_border": bool(x0 == 0 or y0 == 0 or x1 == WIDTH or y1 == HEIGHT),
            }
        )
        print(f"\r{i + 1} of {frames}", end="", flush=True)
    print()
    np.save(out / "visual_hull_points.npy", surface_points(lorry(), 2000))
    poses = {
        "convention": "x_cam = R x_obj + t ; OpenCV camera (x right, y down, z forward); metres; images undistorted, "
        "K applies as is",
        "object": "lorry",
        "up": [0.0, 0.0, 1.0],
        "images": entries,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in poses.items() if key != "images"]
    lines.append('  "images": [\n    ' + ",\n    ".join(json.dumps(entry) for entry in entries) + "\n  ]")
    (out / "poses.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/sequence"), help="folder (%(default)s)")
    parser.add_argument("--frames", type=int, default=FRAMES, help="the first of them only (%(default)s)")
    given = parser.parse_args(arguments)
    write_sequence(given.out, given.frames)


if __name__ == "__main__":
    main()
