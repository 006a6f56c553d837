"""What a depth camera would have measured: true depth in, the depth of a cheap structured-light or stereo camera out.

Noise and quantisation grow with the square of the distance (σ = 1.4 mm and a step of 2.9 mm at a metre: Khoshelham and
Elberink, 2012, for the first Kinect). Outlines are off by a pixel, pixels on an edge are lost or hang between the two
surfaces, surfaces seen at a glancing angle are lost, and patches fail for reasons of their own, as shiny ones do.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SIGMA = 0.0014  # metres at one metre
_STEP = 0.0029
_OUTLINE = 1.0  # pixels
_LOST_AT_EDGE = 0.5
_FLYING_AT_EDGE = 0.25
_GLANCING = np.cos(np.radians(78))
_PATCHES = 3  # mean number on the object
_PATCH = 0.06  # radius, of the box's side


def measured_depth(true: NDArray[np.floating], focal: float, behind: float, rng: Generator) -> NDArray[np.float32]:
    """Depth (H, W) as measured, metres; NaN where there is none.

    Args:
        true: (H, W) metres, of the object; 0 where there is none.
        focal: pixels.
        behind: metres, of the wall behind the object.
        rng: source of the noise.
    """
    height, width = true.shape
    on = true > 0
    z = np.where(on, true, behind).astype(np.float32)
    # Outlines shift by what a window of a matcher sees: a smooth random field of displacements.
    jitter = [cv2.GaussianBlur(rng.normal(size=true.shape).astype(np.float32), (0, 0), 3) * 10 for _ in range(2)]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = (columns + _OUTLINE * jitter[0], rows + _OUTLINE * jitter[1])
    z = cv2.remap(z, *moved, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    around = np.ones((3, 3), np.uint8)
    far, near = cv2.dilate(z, around), cv2.erode(z, around)
    slope = (far - near) / 2 * focal / z  # tangent of the angle between the surface's normal and the ray, about
    edge = slope > np.tan(np.arccos(_GLANCING))
    draw = rng.random(true.shape)
    flying = near + (far - near) * rng.random(true.shape).astype(np.float32)
    z = np.where(edge & (draw < _FLYING_AT_EDGE), flying, z)
    lost = edge & (draw > 1 - _LOST_AT_EDGE)
    ys, xs = np.nonzero(on)
    if len(ys):
        side = max(int(np.ptp(xs)), int(np.ptp(ys)), 8)
        patches = np.zeros(true.shape, np.uint8)
        for _ in range(rng.poisson(_PATCHES)):
            place = int(rng.integers(len(ys)))
            axes = tuple(int(1 + side * _PATCH * rng.uniform(0.3, 1.7)) for _ in range(2))
            centre = (int(xs[place]), int(ys[place]))
            cv2.ellipse(patches, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        lost |= patches > 0
    in_metres = z.astype(np.float64)
    in_metres = np.maximum(in_metres + _SIGMA * in_metres**2 * rng.normal(size=true.shape), 0.01)
    in_metres = 1 / (np.maximum(np.round(1 / (in_metres * _STEP)), 1) * _STEP)  # disparity comes in steps
    measured: Floats = np.where(lost, np.nan, in_metres).astype(np.float32)
    return measured
