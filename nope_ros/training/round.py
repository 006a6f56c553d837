"""Things that look nearly the same all round: fruit, eggs, balls, gourds, vases, bowls, candles.

Few of a heap of found or drawn objects are like this, and a network that has seen few is sure of what it cannot know:
it takes one side of an apple for another. What tells the sides of these apart is faint (a blush, streaks, specks, a
dent, a crooked stalk), so that distributions over rotations have to be wide, and how wide depends on the marks.
"""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nope_ros.rendering.mesh import Mesh, make_mesh
from nope_ros.training.procedural import _joined, _sheet

Floats = NDArray[np.float64]

_ROWS, _SEGMENTS = 56, 96


def round_object(seed: int) -> Mesh:
    """The round object of that seed: z up, some 10 thousand faces."""
    rng = np.random.default_rng([0x726F756E, seed])
    around = np.linspace(0, 2 * np.pi, _SEGMENTS + 1)  # the last column is the first again
    down = np.linspace(0, np.pi, _ROWS)
    grown = rng.random() < 0.65
    radius, height = (_fruit if grown else _turned)(rng, down)
    lobes = np.ones(len(around))
    if grown and rng.random() < 0.25:  # tomatoes, pumpkins, peppers
        count, depth = rng.integers(3, 11), rng.uniform(0.01, 0.1)
        lobes = 1 - depth * np.abs(np.cos(0.5 * count * around)) ** rng.uniform(1, 6)
    ring = radius[:, None] * lobes
    body = np.stack([ring * np.cos(around), ring * np.sin(around), np.broadcast_to(height[:, None], ring.shape)], -1)
    if grown:  # nothing that grew is quite round
        body[..., :2] *= np.exp(rng.normal(0, rng.choice((0.01, 0.05, 0.15)), 2))
        body *= 1 + rng.choice((0.0, 0.015, 0.04)) * _field(rng, body, 1.5)[..., None]
        body[..., 0] += rng.normal(0, 0.06) * body[..., 2] + rng.normal(0, 0.08) * body[..., 2] ** 2
    body[:, -1] = body[:, 0]
    parts = [(body, _skin(rng, body, around, down, grown))]
    if grown and rng.random() < 0.6:
        parts.append(_stalk(rng, body[0, 0]))
    patch = _joined([_sheet(points) for points, _ in parts])
    colours = np.concatenate([colour.reshape(-1, 3) for _, colour in parts])
    mesh = make_mesh(patch.vertices, patch.faces, colours=np.round(colours).astype(np.uint8), name=f"round_{seed:06d}")
    if rng.random() < 0.25:  # lying on a side
        axis, angle = rng.normal(size=3), rng.uniform(0, np.pi)
        mesh = mesh.rotated(cv2.Rodrigues(axis / np.linalg.norm(axis) * angle)[0])
    return mesh


def _fruit(rng: Generator, down: Floats) -> tuple[Floats, Floats]:
    """Radius and height along a meridian: balls, eggs, pears, lemons, apples."""
    long = np.exp(rng.normal(0.05, 0.25))
    radius, height = np.sin(down), long * np.cos(down)
    radius = radius * (1 + rng.normal(0, 0.15) * np.cos(down))  # an egg's thick end
    if rng.random() < 0.2:  # a neck, as a pear's or a gourd's
        radius = radius * (1 - rng.uniform(0.1, 0.5) / (1 + np.exp(-rng.uniform(4, 12) * (np.cos(down) - 0.3))))
    if rng.random() < 0.15:  # tips, as a lemon's
        height = height + np.sign(height) * rng.uniform(0.05, 0.25) * np.abs(np.cos(down)) ** rng.uniform(8, 30)
    for end in (1, -1):  # dents, as an apple's
        if rng.random() < 0.55:
            near = np.exp(-((radius / rng.uniform(0.15, 0.5)) ** 2)) * (end * np.cos(down) > 0)
            height = height - end * rng.uniform(0.05, 0.35) * near
    return radius, height


def _turned(rng: Generator, down: Floats) -> tuple[Floats, Floats]:
    """The same of what is made on a lathe or a potter's wheel: vases, bowls, jars, candles, knobs."""
    count, long = len(down), rng.uniform(0.3, 1.6)
    knots = rng.uniform(0.35, 1, (int(rng.integers(2, 6)), 1))
    outer = cv2.resize(knots, (1, count), interpolation=cv2.INTER_CUBIC).ravel().clip(0.2, 1.1)
    z = np.linspace(long, -long, count)
    hollow = rng.random() < 0.5
    rim = 8 if hollow else 3
    inside = np.linspace(0.0, outer[rim] * 0.93, rim)
    outer[:rim] = inside
    z[:rim] = z[rim] if not hollow else np.linspace(z[rim] - rng.uniform(0.2, 1.5) * long, z[rim], rim)
    outer[-1] = outer[0] = 0.0
    z[-1] = z[-2]
    return outer, z


def _skin(rng: Generator, body: Floats, around: Floats, down: Floats, grown: bool) -> Floats:
    """Colours of the body's vertices (R, S, 3), sRGB 0..255."""
    hue = rng.choice((rng.uniform(0, 0.17), rng.uniform(0.17, 0.35), rng.random()), p=(0.55, 0.25, 0.2))
    base = np.array([hue, rng.uniform(0.2, 0.95) if grown else rng.uniform(0, 0.9), rng.uniform(0.3, 0.95)])

    def near(reach: float) -> Floats:
        h, s, v = base + rng.normal(0, reach, 3) * (0.15, 0.5, 0.5)
        return 255 * np.array(colorsys.hsv_to_rgb(h % 1, float(np.clip(s, 0, 1)), float(np.clip(v, 0.05, 1))))

    contrast = float(np.exp(rng.uniform(np.log(0.05), np.log(1.0))))  # faint as a rule
    colours = np.broadcast_to(near(0.0), body.shape)
    latitude = np.broadcast_to(np.cos(down)[:, None], body.shape[:2])
    marks = []
    if rng.random() < 0.5:  # lighter or greener towards an end: the same all round
        marks.append(0.5 + 0.5 * latitude * rng.choice((-1, 1)))
    if rng.random() < 0.6:  # a blush where the sun was
        marks.append(0.5 + 0.6 * _field(rng, body, rng.uniform(0.6, 1.5)))
    if rng.random() < 0.4:  # blotches
        marks.append(0.5 + _field(rng, body, rng.uniform(3, 9)))
    if rng.random() < 0.35:  # streaks from pole to pole, or a potter's rings
        lines = rng.random(len(around) - 1) if grown else rng.random(len(down))
        lines = cv2.GaussianBlur(lines[None].astype(np.float32), (0, 0), rng.uniform(0.6, 2)).ravel()
        lines = (lines - lines.mean()) / max(float(lines.std()), 1e-6) * 0.3 + 0.5
        streaks = np.append(lines, lines[0])[None] * np.sin(down)[:, None] if grown else lines[:, None]
        marks.append(streaks + np.zeros(body.shape[:2]))
    if not grown and rng.random() < 0.4:  # a painted band
        middle, width = rng.uniform(-0.8, 0.8), rng.uniform(0.05, 0.4)
        marks.append((np.abs(latitude - middle) < width).astype(np.float64))
    for mark in marks:
        share = np.clip(mark, 0, 1)[..., None] * rng.uniform(0.3, 1)
        colours = colours * (1 - share) + near(contrast) * share
    if rng.random() < 0.4:  # specks and scars
        specks = rng.random(body.shape[:2]) < np.exp(rng.uniform(np.log(0.002), np.log(0.06)))
        colours = np.where(specks[..., None], colours * (1 - contrast) + near(1.0) * contrast, colours)
    colours = np.clip(colours, 0, 255)
    colours[:, -1] = colours[:, 0]
    return colours


def _field(rng: Generator, points: Floats, frequency: float, waves: int = 8) -> Floats:
    """Smooth noise in about −1..1 at points (..., 3)."""
    directions = rng.normal(size=(waves, 3)) * frequency
    noise: Floats = np.sin(points @ directions.T + rng.uniform(0, 2 * np.pi, waves)).sum(-1) / np.sqrt(2 * waves)
    return noise


def _stalk(rng: Generator, foot: Floats) -> tuple[Floats, Floats]:
    """A crooked stick, thicker at its end: points (R, S, 3) of it, and their colours."""
    along = np.linspace(0, 1, 8)
    length, thick = rng.uniform(0.1, 0.6), rng.uniform(0.02, 0.07)
    lean = rng.normal(0, 0.25, 2)
    bend = rng.normal(0, 0.3, 2)
    path = np.column_stack([along[:, None] * lean + along[:, None] ** 2 * bend, along]) * length + foot
    path[0, 2] -= 0.1
    around = np.linspace(0, 2 * np.pi, 11)
    ring = np.stack([np.cos(around), np.sin(around), 0 * around], -1)
    radius = thick * (1 + rng.uniform(0, 1) * along**4)
    stick = path[:, None] + radius[:, None, None] * ring
    stick = np.concatenate([stick, np.broadcast_to(path[-1], (1, *stick.shape[1:]))])
    colour = 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.3), rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.6)))
    return stick, np.broadcast_to(colour, stick.shape)
