"""Every picture: axes over a frame, the pose distribution on a globe, panels and contact sheets, aligned pairs.

All images are RGB uint8 (H, W, 3). Nothing is changed in place.

The globe (NOPE, Fig. 1) shows from where an object may be seen: a point of it is a viewing direction (from the object
to the camera, object frame), its brightness the probability of that direction whatever the roll. In front is the
hemisphere around the reference view, behind it the one whose surface the reference does not show. Roll has a dial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree

from nope_ros.distribution import Ambiguity
from nope_ros.frame import InputError
from nope_ros.pose import PoseEstimate
from nope_ros.rotations import icosphere, look_at, turn_to

if TYPE_CHECKING:
    from nope_ros.align import Alignment, Surface
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]
Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

BACKGROUND: Colour = (18, 20, 26)
FAINT: Colour = (92, 98, 112)
SOFT: Colour = (164, 170, 182)
BRIGHT: Colour = (240, 242, 246)

AXES: tuple[Colour, Colour, Colour] = ((238, 68, 68), (70, 200, 90), (64, 132, 255))
"""x red, y green, z blue, as everywhere in ROS."""

AMBIGUITY_COLOURS: dict[Ambiguity, Colour] = {
    Ambiguity.UNIQUE: (98, 220, 130),
    Ambiguity.FINITE: (255, 190, 60),
    Ambiguity.AXIAL: (214, 130, 255),
    Ambiguity.UNINFORMATIVE: (255, 104, 92),
}

_GOOD, _BAD = AMBIGUITY_COLOURS[Ambiguity.UNIQUE], AMBIGUITY_COLOURS[Ambiguity.UNINFORMATIVE]

MarkKind = Literal["reference", "truth", "estimate"]
_MARKS: dict[MarkKind, tuple[Colour, str]] = {
    "reference": ((96, 178, 255), "reference view"),
    "truth": ((110, 232, 140), "true view"),
    "estimate": ((255, 255, 255), "estimate"),
}

# Width of the kernel a direction is drawn with: about half the distance of neighbours on the coarsest grid (15°), so
# that single rotations do not show as dots and nothing looks sharper than it is known.
_BLUR = np.radians(7.0)
# Colour follows a power of the probability: a ridge of 2 % is still seen beside a peak of 80 %.
_GAMMA = 0.4
_SHIFT = 4  # OpenCV draws in sixteenths of a pixel


# --- Axes over a frame -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One object to draw over a frame.

    Attributes:
        R_camera_object: (3, 3).
        t_camera_object: (3,), any unit of length.
        axis_length: in that unit.
        confidence: 0..1.
        ambiguity: colours the outline.
        label: shown with the confidence.
        trusted: axes of a pose that is not are drawn faint.
        mask: (H, W) bool, its outline is drawn; or None.
        others: (R, t, probability) of further modes, drawn as thin axes.
    """

    R_camera_object: Array
    t_camera_object: Array
    axis_length: float
    confidence: float
    ambiguity: Ambiguity
    label: str = ""
    trusted: bool = True
    mask: NDArray[np.bool_] | None = None
    others: tuple[tuple[Array, Array, float], ...] = ()

    @classmethod
    def of(cls, estimate: PoseEstimate, mask: NDArray[np.bool_], K: Array, trusted: bool = True) -> Drawn:
        """What to draw for an estimate, its mask (H, W) and intrinsics (3, 3)."""
        return cls(
            R_camera_object=estimate.R_camera_object,
            t_camera_object=estimate.t_camera_object,
            axis_length=axis_length(mask, estimate.t_camera_object, K),
            confidence=estimate.confidence,
            ambiguity=estimate.ambiguity,
            label=estimate.object_id,
            trusted=trusted,
            mask=mask,
            others=tuple((m.R_camera_object, m.t_camera_object, m.probability) for m in estimate.modes[1:]),
        )


def axis_length(mask: NDArray[np.bool_], t_camera_object: Array, K: Array) -> float:
    """A length for axes that suits an object's size in the image: 15 % more than the radius of a disc of its area."""
    radius_px = np.sqrt(max(int(np.count_nonzero(mask)), 64) / np.pi)
    return float(1.15 * radius_px * t_camera_object[2] / np.sqrt(K[0, 0] * K[1, 1]))


def project(points_object: Array, R: Array, t: Array, K: Array) -> tuple[Array, Array]:
    """Pixels (N, 2) and depths (N,) of points (N, 3) of an object frame; K (3, 3) of an undistorted image."""
    camera = points_object @ np.asarray(R).T + np.asarray(t)
    depth = camera[:, 2]
    image = camera @ np.asarray(K).T
    return image[:, :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[:, None], depth


def draw_axes(image: Picture, R: Array, t: Array, K: Array, length: float, *, opacity: float = 1.0) -> Picture:
    """Axes of an object frame, the far ones drawn first, so that what points away is covered by what points here.

    Args:
        image: (H, W, 3).
        R: (3, 3), camera from object.
        t: (3,).
        K: (3, 3) of an undistorted image.
        length: of an axis, in the unit of t.
        opacity: 0..1.
    """
    points, depth = project(np.concatenate([np.zeros((1, 3)), length * np.eye(3)]), R, t, K)
    if not np.isfinite(points).all() or depth.min() <= 0.05 * max(depth[0], 1e-9):
        return image.copy()  # behind the camera: there is nothing to see
    canvas = image.copy()
    width = max(2.0, 0.065 * length * float(K[0, 0]) / depth[0])
    order = sorted(range(1, 4), key=lambda i: -depth[i])
    for i in order:
        if depth[i] > depth[0]:
            _draw_axis(canvas, points[0], points[i], depth[0], depth[i], width, AXES[i - 1], "xyz"[i - 1])
    _disc(canvas, points[0], 0.95 * width, (250, 250, 250))
    for i in order:
        if depth[i] <= depth[0]:
            _draw_axis(canvas, points[0], points[i], depth[0], depth[i], width, AXES[i - 1], "xyz"[i - 1])
    return canvas if opacity >= 1 else _mixed(image, canvas, opacity)


def _draw_axis(
    canvas: Picture, start: Array, end: Array, z_start: float, z_end: float, width: float, colour: Colour, letter: str
) -> None:
    # Away from the camera is darker; perspective makes it thinner too.
    away = np.clip((z_end - z_start) / max(z_start, 1e-9) * 6, -1, 1)
    shade = 1 - 0.28 * max(away, 0.0)
    dark: Colour = (12, 14, 18)
    rgb: Colour = tuple(int(c * shade) for c in colour)  # type: ignore[assignment]  # three in, three out
    half_start, half_end = 0.5 * width, 0.5 * width * z_start / z_end
    along = end - start
    extent = float(np.hypot(*along))
    head = 3.4 * half_end
    if extent < 1.2 * head:  # end-on: an arrow would be all head
        toward = z_end < z_start
        for radius, paint in ((head * 0.75 + 1.4, dark), (head * 0.75, rgb)):
            _disc(canvas, end, radius, paint)
        _disc(canvas, end, head * 0.22, (250, 250, 250) if toward else dark)
        _letter(canvas, letter, end + np.array([1.9 * head, -0.6 * head]), rgb, width)
        return
    unit = along / extent
    normal = np.array([-unit[1], unit[0]])
    neck = end - unit * head
    shaft = np.array(
        [start + normal * half_start, neck + normal * half_end, neck - normal * half_end, start - normal * half_start]
    )
    tip = np.array([end, neck + normal * head * 0.52, neck - normal * head * 0.52])
    for polygon in (shaft, tip):
        cv2.polylines(canvas, [_fixed(polygon)], True, dark, max(2, round(0.55 * width)), cv2.LINE_AA, _SHIFT)
    for polygon in (shaft, tip):
        cv2.fillPoly(canvas, [_fixed(polygon)], rgb, cv2.LINE_AA, _SHIFT)
    # A lighter edge along the shaft makes it look round.
    lit = np.array([start + normal * half_start * 0.35, neck + normal * half_end * 0.35])
    light: Colour = tuple(min(255, int(c * 1.15 + 40)) for c in rgb)  # type: ignore[assignment]  # three in, three out
    cv2.polylines(canvas, [_fixed(lit)], False, light, max(1, round(0.28 * width)), cv2.LINE_AA, _SHIFT)
    _letter(canvas, letter, end + unit * 1.1 * max(head, 9), rgb, width)


def _letter(canvas: Picture, letter: str, centre: Array, colour: Colour, width: float) -> None:
    size = round(float(np.clip(3.2 * width, 12, 30)))
    _text(canvas, letter, (centre[0], centre[1]), size, colour, anchor="mm", bold=True, halo=True)


def draw_outline(image: Picture, mask: NDArray[np.bool_], colour: Colour, thickness: int = 2) -> Picture:
    """A mask's (H, W) outline."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    canvas = image.copy()
    cv2.drawContours(canvas, contours, -1, (12, 14, 18), thickness + 2, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, colour, thickness, cv2.LINE_AA)
    return _mixed(image, canvas, 0.85)


def zoomed(
    image: Picture, mask: NDArray[np.bool_], K: Array, width: int, height: int, *, fill: float = 0.45
) -> tuple[Picture, NDArray[np.bool_], Array]:
    """The part of a frame around a mask, enlarged so that what is drawn over it can be read.

    Args:
        image: (H, W, 3).
        mask: (H, W).
        K: (3, 3) of an undistorted image.
        width: of the result, pixels.
        height: of the result, pixels.
        fill: the least share of its width or height that the mask takes.

    Returns:
        The picture (height, width, 3), its mask, and its intrinsics. A large mask shows all of the frame.
    """
    frame_height, frame_width = mask.shape
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    whole = max(frame_width / width, frame_height / height)
    scale, x, y = 1 / whole, 0.5 * (frame_width - 1), 0.5 * (frame_height - 1)
    if columns.size:
        share = max((columns[-1] - columns[0] + 1) / (whole * width), (rows[-1] - rows[0] + 1) / (whole * height))
        zoom = max(1.0, fill / share)
        scale *= zoom
        # No more is cut away than must be, and nothing beyond the frame comes in.
        half_width, half_height = 0.5 * width / scale, 0.5 * height / scale
        x = _held(0.5 * (columns[0] + columns[-1]), half_width, frame_width)
        y = _held(0.5 * (rows[0] + rows[-1]), half_height, frame_height)
    A = np.array([[scale, 0, 0.5 * (width - 1) - scale * x], [0, scale, 0.5 * (height - 1) - scale * y], [0, 0, 1.0]])
    if np.allclose(A, np.eye(3)) and mask.shape == (height, width):
        return image, mask, K
    flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture: Picture = cv2.warpAffine(image, A[:2], (width, height), flags=flags, borderValue=BACKGROUND)
    soft = cv2.warpAffine(mask.astype(np.float32), A[:2], (width, height), flags=cv2.INTER_LINEAR)
    return picture, soft > 0.5, A @ K


def _held(centre: float, half: float, size: int) -> float:
    return 0.5 * (size - 1) if 2 * half >= size else float(np.clip(centre, half - 0.5, size - 0.5 - half))


def overlay(image: Picture, K: Array, objects: Sequence[Drawn]) -> Picture:
    """A frame with every object's outline, axes and label; K (3, 3) of an undistorted image. Far objects first."""
    canvas = image
    scale = max(image.shape[1] / 640, 0.5)
    ordered = sorted(objects, key=lambda drawn: -float(drawn.t_camera_object[2]))
    for drawn in ordered:
        if drawn.mask is not None and drawn.mask.any():
            canvas = draw_outline(canvas, drawn.mask, AMBIGUITY_COLOURS[drawn.ambiguity], max(1, round(1.6 * scale)))
    for drawn in ordered:
        for R, t, probability in drawn.others:
            if probability >= 0.15:
                canvas = draw_axes(canvas, R, t, K, 0.8 * drawn.axis_length, opacity=0.3)
        opacity = 1.0 if drawn.trusted else 0.45
        canvas = draw_axes(canvas, drawn.R_camera_object, drawn.t_camera_object, K, drawn.axis_length, opacity=opacity)
    canvas = canvas.copy()
    for drawn in ordered:
        _tag(canvas, drawn, K, round(15 * scale))
    return canvas


def _tag(canvas: Picture, drawn: Drawn, K: Array, size: int) -> None:
    """Name, confidence and what kind of answer it is, above the object."""
    name = f"{drawn.label} " if drawn.label else ""
    # One word at most: faint axes say "not trusted" too.
    doubt = "" if drawn.trusted else " · not trusted"
    note = doubt if drawn.ambiguity == Ambiguity.UNIQUE else f" · {drawn.ambiguity.name.lower()}"
    text = f"{name}{100 * drawn.confidence:.0f} %{note}"
    height, width = canvas.shape[:2]
    if drawn.mask is not None and drawn.mask.any():
        columns, rows = np.flatnonzero(drawn.mask.any(axis=0)), np.flatnonzero(drawn.mask.any(axis=1))
        x, y = 0.5 * (columns[0] + columns[-1]), rows[0] - 0.7 * size
    else:
        pixel, _ = project(np.zeros((1, 3)), drawn.R_camera_object, drawn.t_camera_object, K)
        x, y = pixel[0, 0], pixel[0, 1] - 4 * size
    if not (np.isfinite(x) and np.isfinite(y)):
        return
    tips, depth = project(drawn.axis_length * np.eye(3), drawn.R_camera_object, drawn.t_camera_object, K)
    beside = np.abs(tips[:, 0] - x) < 5 * size
    if beside.any() and (depth > 0).all():
        y = max(min(y, tips[beside, 1].min() - 2.2 * size), 2.5 * size)  # above the letters of the axes
    text_width = _glyphs(text, size, True).shape[1]
    pad, swatch = 0.45 * size, 0.7 * size
    box_width, box_height = text_width + 3 * pad + swatch, 1.75 * size
    left = float(np.clip(x - box_width / 2, 2, max(width - box_width - 2, 2)))
    top = float(np.clip(y - box_height, 2, max(height - box_height - 2, 2)))
    _box(canvas, (left, top, left + box_width, top + box_height), (14, 16, 20), 0.35 * size, 0.72)
    middle = top + box_height / 2
    _disc(canvas, np.array([left + pad + swatch / 2, middle]), swatch / 2, AMBIGUITY_COLOURS[drawn.ambiguity])
    _text(canvas, text, (left + 2 * pad + swatch, middle), size, BRIGHT, anchor="lm", bold=True)


# --- The globe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Globe:
    """How a globe of viewing directions is turned.

    Attributes:
        R_globe_object: (3, 3), to axes with z up and x towards the reference view's azimuth.
        front: (3,) globe axes, the direction in the middle of the front hemisphere.
    """

    R_globe_object: Array
    front: Array

    @classmethod
    def around(cls, reference_direction: Array, up: Array) -> Globe:
        """A globe with the reference's viewing direction (3,) in front and ``up`` (3,) up, both in the object frame."""
        front, z = _unit(reference_direction), _unit(up)
        x = front - (front @ z) * z
        if np.linalg.norm(x) < 1e-3:  # seen from right above: any azimuth will do
            x = np.cross(z, np.eye(3)[np.abs(z).argmin()])
        x = _unit(x)
        R = np.stack([x, np.cross(z, x), z])
        return cls(R, R @ front)


@dataclass(frozen=True)
class Viewpoint:
    """A viewpoint to mark: which one, its direction (3,) in the object frame, and its roll in radians."""

    kind: MarkKind
    direction: Array
    roll: float

    @classmethod
    def of(cls, kind: MarkKind, R_camera_object: Array, t_camera_object: Array, globe: Globe) -> Viewpoint:
        """The viewpoint of a pose."""
        ray = _unit(t_camera_object)
        direction = viewing_directions(R_camera_object[None], ray)[0]
        return cls(kind, direction, float(rolls(R_camera_object[None], ray, globe)[0]))


def viewing_directions(R_camera_object: Array, ray: Array) -> Array:
    """Unit vectors (N, 3), object frame, from the object to a camera that sees it along ``ray`` (3,), camera axes."""
    directions: Array = -np.einsum("nij,i->nj", R_camera_object, _unit(ray))
    return directions


def rolls(R_camera_object: Array, ray: Array, globe: Globe) -> Array:
    """Radians (N,) by which the object's image is turned, clockwise as seen, from the globe's up pointing up."""
    seen = turn_to(_unit(ray)) @ R_camera_object @ globe.R_globe_object.T
    level = look_at(-seen[:, 2])
    turned = np.einsum("nij,nkj->nik", seen, level)
    angle: Array = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])
    return angle


def globe_density(directions: Array, probabilities: Array, at: Array) -> Array:
    """Probability near each of ``at`` (M, 3): mass of the directions (N, 3), each spread over some 7° around itself."""
    cosine = at.astype(np.float32) @ directions.astype(np.float32).T
    kernel = np.exp((cosine - 1) * np.float32(1 / _BLUR**2))
    density: Array = (kernel @ probabilities.astype(np.float32)).astype(np.float64)
    return density


@lru_cache(maxsize=8)
def _hemisphere(size: int, front: tuple[float, ...], behind: bool) -> tuple[NDArray[np.intp], Array, Array, Array]:
    """What of a hemisphere's picture (size, size) does not change from frame to frame.

    Returns indices of the nearest sphere points (size, size, 3), their weights, shading and coverage (size, size).
    """
    centre = np.array(front) * (-1 if behind else 1)
    radius = size / 2 - 2
    step = (np.arange(size) + 0.5 - size / 2) / radius
    x, y = np.meshgrid(step, step)
    squared = x * x + y * y
    z = np.sqrt(np.clip(1 - squared, 0, 1))
    scale = np.maximum(np.sqrt(squared), 1.0)
    R = look_at(centre)  # the globe seen from outside: rows are right, down and away
    directions = np.stack([x / scale, y / scale, -z], -1).reshape(-1, 3) @ R
    # Between the three nearest points of a sphere 4° apart: exact enough, and three look-ups a pixel.
    distance, near = cKDTree(icosphere(4)).query(directions, k=3)
    weight = np.exp(-0.5 * (distance / np.radians(3.0)) ** 2)
    weight /= weight.sum(1, keepdims=True)
    light = _unit(np.array([-0.45, -0.6, -0.75]))
    shading = 0.72 + 0.28 * np.clip(np.stack([x, y, -z], -1) @ light, 0, 1)
    coverage = np.clip(0.5 + (1 - np.sqrt(squared)) * radius, 0, 1)
    return near.reshape(size, size, 3), weight.reshape(size, size, 3), shading, coverage


def draw_globe(
    directions: Array,
    probabilities: Array,
    globe: Globe,
    size: int,
    *,
    behind: bool = False,
    viewpoints: Sequence[Viewpoint] = (),
) -> Picture:
    """One hemisphere of viewing directions coloured by probability, (size, size, 3).

    Args:
        directions: (N, 3), object frame.
        probabilities: (N,).
        globe: how the globe is turned.
        size: side of the picture, pixels.
        behind: the far hemisphere, as seen by someone who walked round to it.
        viewpoints: marked where they lie on this hemisphere.
    """
    fine = 2 * size
    near, weight, shading, coverage = _hemisphere(fine, tuple(map(float, globe.front)), behind)
    density = globe_density(directions @ globe.R_globe_object.T, probabilities, icosphere(4))
    level = (density[near] * weight).sum(-1)
    colour = colour_of(level).astype(np.float64) * shading[..., None]
    canvas = np.full((fine, fine, 3), BACKGROUND, np.float64)
    canvas += (colour - canvas) * coverage[..., None]
    picture = canvas.astype(np.uint8)
    picture = _graticule(picture, globe, behind)
    picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    for viewpoint in viewpoints:
        _draw_viewpoint(picture, viewpoint, globe, behind)
    return picture


def globe_pixel(direction: Array, globe: Globe, size: int, behind: bool = False) -> tuple[Array, bool]:
    """Where a direction (3,) of the object frame is on a globe of that size, and whether on this hemisphere."""
    centre = globe.front * (-1 if behind else 1)
    seen = look_at(centre) @ globe.R_globe_object @ _unit(direction)
    return (size - 1) / 2 + (size / 2 - 1) * seen[:2], bool(seen[2] <= 0)


def colour_of(probability: Array) -> Picture:
    """Colours (..., 3) of probabilities (...) near a direction."""
    index = np.round(255 * np.clip(probability, 0, 1) ** _GAMMA).astype(np.uint8)
    colours: Picture = _palette()[index]
    return colours


@lru_cache(maxsize=1)
def _palette() -> Picture:
    bgr = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)
    palette = bgr[:, 0, ::-1].astype(np.float64)
    # Inferno begins at black; lifted towards slate, so that the globe is seen where nothing is probable.
    lift = np.clip(1 - np.arange(256) / 70, 0, 1)[:, None]
    return np.asarray(palette + lift * (np.array([38, 42, 56]) - palette) * 0.92, np.uint8)


def _graticule(picture: Picture, globe: Globe, behind: bool) -> Picture:
    """Lines of elevation and azimuth every 30°, the horizon bolder."""
    size = picture.shape[0]
    canvas = picture.copy()
    sweep = np.linspace(0, 2 * np.pi, 181)
    lines: list[tuple[Array, bool]] = []
    for degrees in (-60, -30, 0, 30, 60):
        a = np.radians(degrees)
        circle = np.stack([np.cos(a) * np.cos(sweep), np.cos(a) * np.sin(sweep), np.full_like(sweep, np.sin(a))], 1)
        lines.append((circle, degrees == 0))
    arc = np.linspace(-np.radians(88), np.radians(88), 120)
    for degrees in range(0, 360, 30):
        a = np.radians(degrees)
        lines.append((np.stack([np.cos(arc) * np.cos(a), np.cos(arc) * np.sin(a), np.sin(arc)], 1), False))
    R = look_at(globe.front * (-1 if behind else 1))
    for line, bold in lines:
        seen = line @ R.T
        pixels = (size - 1) / 2 + (size / 2 - 2) * seen[:, :2]
        visible = seen[:, 2] <= 0.0
        for run in np.split(np.arange(len(line)), np.flatnonzero(np.diff(visible.astype(int))) + 1):
            if visible[run[0]] and len(run) > 1:
                strong = (150, 156, 172) if bold else (104, 110, 126)
                cv2.polylines(canvas, [_fixed(pixels[run])], False, strong, 3 if bold else 2, cv2.LINE_AA, _SHIFT)
    canvas = _mixed(picture, canvas, 0.5)
    centre = np.array([(size - 1) / 2, (size - 1) / 2])
    cv2.circle(canvas, *_fixed_circle(centre, size / 2 - 2), (120, 126, 142), 3, cv2.LINE_AA, _SHIFT)
    return canvas


def _draw_viewpoint(picture: Picture, viewpoint: Viewpoint, globe: Globe, behind: bool) -> None:
    pixel, here = globe_pixel(viewpoint.direction, globe, picture.shape[0], behind)
    if here:
        _mark(picture, viewpoint.kind, pixel, max(5.0, picture.shape[0] / 34))


def _mark(picture: Picture, kind: MarkKind, pixel: Array, radius: float) -> None:
    """Truth is a ring, the estimate a cross that fits inside it, the reference a square around both."""
    colour = _MARKS[kind][0]
    thin, dark = max(2, round(radius / 3.2)), (10, 12, 16)
    for paint, line in ((dark, thin + 2), (colour, thin)):
        if kind == "truth":
            cv2.circle(picture, *_fixed_circle(pixel, radius), paint, line, cv2.LINE_AA, _SHIFT)
        elif kind == "estimate":
            for sign in (-1, 1):
                arm = 0.62 * radius * np.array([1, sign])
                cv2.polylines(
                    picture, [_fixed(np.array([pixel - arm, pixel + arm]))], False, paint, line, cv2.LINE_AA, _SHIFT
                )
        else:
            side = 1.25 * radius
            square = pixel + side * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
            cv2.polylines(picture, [_fixed(square)], True, paint, line, cv2.LINE_AA, _SHIFT)


def draw_dial(angles: Array, probabilities: Array, size: int, viewpoints: Sequence[Viewpoint] = ()) -> Picture:
    """Probability of the roll as bars around a circle (size, size, 3): upright at the top, clockwise as seen."""
    fine = 2 * size
    canvas = np.full((fine, fine, 3), BACKGROUND, np.uint8)
    centre = np.array([(fine - 1) / 2, (fine - 1) / 2])
    inner, outer = 0.30 * fine, 0.44 * fine
    bins = 36
    index = np.round(angles / (2 * np.pi) * bins).astype(int) % bins
    mass = np.bincount(index, weights=probabilities, minlength=bins)
    for i in range(bins):
        middle, half = 2 * np.pi * i / bins, np.pi / bins * 0.82
        sweep = np.linspace(middle - half, middle + half, 6)
        for reach, paint in ((1.0, (34, 37, 46)), (float(np.clip(mass[i], 0, 1)) ** 0.6, _bar_colour(mass[i]))):
            edge = inner + (outer - inner) * reach
            if edge - inner < 0.5:
                continue
            ring = [centre + r * _clock(a) for r, a in [(inner, a) for a in sweep] + [(edge, a) for a in sweep[::-1]]]
            cv2.fillPoly(canvas, [_fixed(np.array(ring))], paint, cv2.LINE_AA, _SHIFT)
    for i in range(12):
        ends = np.array([centre + r * _clock(i * np.pi / 6) for r in (outer + 4, outer + (14 if i % 3 == 0 else 9))])
        cv2.polylines(canvas, [_fixed(ends)], False, FAINT, 3 if i % 3 == 0 else 2, cv2.LINE_AA, _SHIFT)
    for viewpoint in viewpoints:
        if viewpoint.kind == "estimate":
            hand = np.array([centre, centre + 0.86 * inner * _clock(viewpoint.roll)])
            cv2.polylines(canvas, [_fixed(hand)], False, _MARKS["estimate"][0], round(fine / 64), cv2.LINE_AA, _SHIFT)
            _disc(canvas, centre, fine / 46, _MARKS["estimate"][0])
    picture: Picture = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    for viewpoint in viewpoints:
        if viewpoint.kind != "estimate":
            position = centre / 2 + 0.5 * (outer - inner + 2 * inner) / 2 * _clock(viewpoint.roll)
            _mark(picture, viewpoint.kind, position, max(4.0, size / 26))
    return picture


def _bar_colour(mass: float) -> Colour:
    r, g, b = colour_of(np.array(max(mass, 0.02)))
    return int(r), int(g), int(b)


def _clock(angle: float) -> Array:
    return np.array([np.sin(angle), -np.cos(angle)])


def draw_distribution(
    R_camera_object: Array,
    probabilities: Array,
    ray: Array,
    globe: Globe,
    viewpoints: Sequence[Viewpoint] = (),
    *,
    width: int = 420,
    title: str = "",
    note: str = "",
) -> Picture:
    """Both hemispheres side by side, the roll's dial and a legend: (1.14 · width, width, 3).

    Args:
        R_camera_object: (N, 3, 3) orientations of the object.
        probabilities: (N,), their mass.
        ray: (3,) direction in which the camera sees the object, camera axes.
        globe: how the globe is turned.
        viewpoints: what to mark.
        width: of the picture, pixels.
        title: line above.
        note: line below it, smaller.
    """
    unit = width / 420
    canvas = np.full((round(480 * unit), width, 3), BACKGROUND, np.uint8)
    directions = viewing_directions(R_camera_object, ray)
    globe_size = round(196 * unit)
    text = round(13 * unit)
    _text(canvas, title, (16 * unit, 24 * unit), round(16 * unit), BRIGHT, anchor="lm", bold=True)
    _text(canvas, note, (16 * unit, 45 * unit), text, SOFT, anchor="lm")
    top = round(64 * unit)
    for behind, left in ((False, round(9 * unit)), (True, round(215 * unit))):
        picture = draw_globe(directions, probabilities, globe, globe_size, behind=behind, viewpoints=viewpoints)
        canvas[top : top + globe_size, left : left + globe_size] = picture
        caption = "the far side" if behind else "the reference's side"
        _text(canvas, caption, (left + globe_size / 2, top + globe_size + 14 * unit), text, SOFT, anchor="mm")
    dial_size = round(150 * unit)
    dial_top, dial_left = round(306 * unit), round(32 * unit)
    angles = rolls(R_camera_object, ray, globe)
    canvas[dial_top : dial_top + dial_size, dial_left : dial_left + dial_size] = draw_dial(
        angles, probabilities, dial_size, viewpoints
    )
    _text(
        canvas, "in-plane turn", (dial_left + dial_size / 2, dial_top + dial_size + 9 * unit), text, SOFT, anchor="mm"
    )
    x, y = 236 * unit, 326 * unit
    for kind in dict.fromkeys(viewpoint.kind for viewpoint in viewpoints):
        _mark(canvas, kind, np.array([x, y]), 5.5 * unit)
        _text(canvas, _MARKS[kind][1], (x + 16 * unit, y), text, SOFT, anchor="lm")
        y += 25 * unit
    _colour_bar(canvas, 228 * unit, 420 * unit, 168 * unit, unit)
    return canvas


def _colour_bar(canvas: Picture, x: float, y: float, length: float, unit: float) -> None:
    columns = round(length)
    bar = colour_of(np.linspace(0, 1, columns) ** (1 / _GAMMA))
    top, left = round(y), round(x)
    canvas[top : top + round(9 * unit), left : left + columns] = bar
    for value in (0.0, 0.05, 0.25, 1.0):
        at = x + length * value**_GAMMA
        _text(canvas, f"{100 * value:.0f}", (at, y + 19 * unit), round(11 * unit), FAINT, anchor="mm")
    _text(canvas, "% within about 10°", (x, y - 11 * unit), round(12 * unit), FAINT, anchor="lm")


# --- Panels and sheets -----------------------------------------------------------------------------------------------


def draw_panel(
    reference: Picture,
    query: Picture,
    distribution: Picture,
    *,
    query_title: str = "",
    facts: Sequence[tuple[str, str]] = (),
    height: int = 480,
) -> Picture:
    """Reference | query with axes | distribution, side by side; under the reference a list of (name, value)."""
    query = _resized(query, height=height)
    distribution = _resized(distribution, height=height)
    unit = height / 480
    side = round(200 * unit)
    column = np.full((height, side + round(32 * unit), 3), BACKGROUND, np.uint8)
    left, top = round(16 * unit), round(40 * unit)
    _text(column, "one reference view", (left, 24 * unit), round(16 * unit), BRIGHT, anchor="lm", bold=True)
    column[top : top + side, left : left + side] = _resized(_square(reference), height=side)
    cv2.rectangle(
        column, (left, top), (left + side - 1, top + side - 1), _MARKS["reference"][0], max(1, round(2 * unit))
    )
    y = top + side + 30 * unit
    for name, value in facts:
        _text(column, name, (left, y), round(13 * unit), SOFT, anchor="lm")
        _text(column, value, (left + side, y), round(14 * unit), BRIGHT, anchor="rm", bold=True)
        y += 24 * unit
    if query_title:
        query = query.copy()
        _text(
            query,
            query_title,
            (10 * unit, query.shape[0] - 16 * unit),
            round(15 * unit),
            BRIGHT,
            anchor="lm",
            halo=True,
        )
    return np.concatenate([column, query, distribution], axis=1)


def contact_sheet(
    images: Sequence[Picture],
    captions: Sequence[str] = (),
    *,
    columns: int = 6,
    cell_width: int = 256,
    title: str = "",
    good: Sequence[bool | None] = (),
) -> Picture:
    """Pictures in rows; captions below them, coloured by ``good`` (True green, False red, None grey)."""
    if not images:
        raise ValueError("a contact sheet needs a picture")
    columns = min(columns, len(images))
    gap, line, head = 6, 24, 44 if title else 0
    cells = [_resized(image, width=cell_width) for image in images]
    cell_height = max(cell.shape[0] for cell in cells)
    rows = ceil(len(cells) / columns)
    pitch_x, pitch_y = cell_width + gap, cell_height + gap + (line if captions else 0)
    sheet = np.full((head + gap + rows * pitch_y, gap + columns * pitch_x, 3), BACKGROUND, np.uint8)
    if title:
        _text(sheet, title, (2 * gap, head / 2 + 3), 18, BRIGHT, anchor="lm", bold=True)
    for i, cell in enumerate(cells):
        y, x = head + gap + (i // columns) * pitch_y, gap + (i % columns) * pitch_x
        sheet[y : y + cell.shape[0], x : x + cell_width] = cell
        if i < len(captions):
            verdict = good[i] if i < len(good) else None
            colour = {None: SOFT, True: _GOOD, False: _BAD}[verdict]
            _text(sheet, captions[i], (x + 4, y + cell_height + line / 2), 14, colour, anchor="lm")
    return sheet


def stacked(upper: Picture, lower: Picture) -> Picture:
    """Two pictures, one above the other, the lower one resized to the width of the upper."""
    return np.concatenate([upper, _resized(lower, width=upper.shape[1])], axis=0)


def mask_only(image: Picture, mask: NDArray[np.bool_]) -> Picture:
    """The square around a mask (H, W), what is outside the mask dimmed: how a reference view is shown."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not columns.size:
        return _square(image)
    x, y = 0.5 * (columns[0] + columns[-1]), 0.5 * (rows[0] + rows[-1])
    side = 1.24 * max(columns[-1] - columns[0], rows[-1] - rows[0]) + 1  # a margin of 12 %
    dimmed = np.where(mask[..., None], image, (image * 0.35).astype(np.uint8))
    size = round(float(np.clip(side, 64, 512)))
    scale = size / side
    cut = np.array([[scale, 0, size / 2 - scale * x], [0, scale, size / 2 - scale * y]])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture: Picture = cv2.warpAffine(dimmed, cut, (size, size), flags=method, borderValue=BACKGROUND)
    return picture


# --- Pixels ----------------------------------------------------------------------------------------------------------


def _unit(vector: Array) -> Array:
    length = float(np.linalg.norm(vector))
    unit: Array = np.asarray(vector, np.float64) / max(length, 1e-12)
    return unit


def _fixed(points: Array) -> NDArray[np.int32]:
    """Points (N, 2) as OpenCV takes them: (N, 1, 2), in fractions of a pixel."""
    limited = np.clip(points, -8000, 8000)
    return np.round(limited * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)


def _fixed_circle(centre: Array, radius: float) -> tuple[tuple[int, int], int]:
    x, y = np.round(np.clip(centre, -8000, 8000) * (1 << _SHIFT)).astype(int)
    return (int(x), int(y)), max(1, round(radius * (1 << _SHIFT)))


def _disc(canvas: Picture, centre: Array, radius: float, colour: Colour) -> None:
    cv2.circle(canvas, *_fixed_circle(centre, radius), colour, -1, cv2.LINE_AA, _SHIFT)


def _mixed(below: Picture, above: Picture, opacity: float) -> Picture:
    mixed: Picture = cv2.addWeighted(above, opacity, below, 1 - opacity, 0)
    return mixed


def _box(
    canvas: Picture, xyxy: tuple[float, float, float, float], colour: Colour, corner: float, opacity: float
) -> None:
    """A rounded box, in place."""
    x0, y0, x1, y1 = (round(v) for v in xyxy)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, canvas.shape[1]), min(y1, canvas.shape[0])
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    part = canvas[y0:y1, x0:x1]
    filled = part.copy()
    r = max(1, min(round(corner), (x1 - x0) // 2, (y1 - y0) // 2))
    width, height = x1 - x0, y1 - y0
    cv2.rectangle(filled, (r, 0), (width - 1 - r, height - 1), colour, -1)
    cv2.rectangle(filled, (0, r), (width - 1, height - 1 - r), colour, -1)
    for x in (r, width - 1 - r):
        for y in (r, height - 1 - r):
            cv2.circle(filled, (x, y), r, colour, -1, cv2.LINE_AA)
    canvas[y0:y1, x0:x1] = _mixed(part, filled, opacity)


def _resized(image: Picture, *, width: int | None = None, height: int | None = None) -> Picture:
    scale = width / image.shape[1] if width else (height or image.shape[0]) / image.shape[0]
    size = (width or max(1, round(image.shape[1] * scale)), height or max(1, round(image.shape[0] * scale)))
    if size == (image.shape[1], image.shape[0]):
        return image
    resized: Picture = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return resized


def _square(image: Picture) -> Picture:
    side = min(image.shape[:2])
    y, x = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[y : y + side, x : x + side]


@lru_cache(maxsize=32)
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A typeface that every machine has, ``size`` pixels high."""
    import matplotlib  # its fonts are the ones that are there on every machine; none of its code draws here

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    return ImageFont.truetype(path, size) if path.exists() else ImageFont.load_default(size)


@lru_cache(maxsize=1024)
def _glyphs(text: str, size: int, bold: bool) -> Picture:
    """Coverage (height, width) of a line of text; as high for every text of one size."""
    face = font(size, bold)
    width = ceil(face.getlength(text)) + 2
    height = ceil(1.5 * size)
    layer = Image.new("L", (max(width, 1), height))
    ImageDraw.Draw(layer).text((1, height / 2), text, fill=255, font=face, anchor="lm")
    return np.asarray(layer)


def _text(
    canvas: Picture,
    text: str,
    at: tuple[float, float],
    size: int,
    colour: Colour,
    *,
    anchor: Literal["lm", "mm", "rm"] = "lm",
    bold: bool = False,
    halo: bool = False,
) -> None:
    """A line of text, in place; ``at`` is its left, middle or right, at half its height."""
    if not text:
        return
    glyphs = _glyphs(text, max(size, 6), bold)
    if halo:
        glyphs = np.pad(glyphs, 3)
    height, width = glyphs.shape
    left = round(at[0] - {"lm": 0.0, "mm": 0.5, "rm": 1.0}[anchor] * width)
    top = round(at[1] - height / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    if x1 <= x0 or y1 <= y0:
        return
    inside = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
    part = canvas[y0:y1, x0:x1].astype(np.float32)
    if halo:
        around = cv2.GaussianBlur(cv2.dilate(glyphs, np.ones((3, 3), np.uint8)), (0, 0), 1.2)[inside]
        part *= 1 - around.astype(np.float32)[..., None] / 255 * 0.85
    alpha = glyphs[inside].astype(np.float32)[..., None] / 255
    part += (np.array(colour, np.float32) - part) * alpha
    canvas[y0:y1, x0:x1] = part.astype(np.uint8)


def on_white(registered: RegisteredObject) -> NDArray[np.uint8]:
    """The reference (S, S, 3) RGB before white."""
    white: NDArray[np.uint8] = np.maximum(registered.thumbnail, 255 - registered.mask[..., None])
    return white


def draw_pair(
    a: Surface, b: Surface, found: Alignment, path: Path, shown: Sequence[tuple[str, NDArray[np.uint8]]]
) -> None:
    """Both objects as points, of one colour where their features are alike, and one over the other.

    Args:
        a: stays where it is.
        b: is moved.
        found: how.
        path: of the picture.
        shown: of a and of b: name, and a picture of it (S, S, 3), RGB.

    Raises:
        InputError: if the picture cannot be written.
    """
    # It takes a second to import, which no overlay needs.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moved = found.scale * b.points @ found.R.T + found.t
    # One feature of each place: of the first view that sees it.
    first_a, first_b = (one.features[np.arange(len(one.points)), one.seen.argmax(axis=1)] for one in (a, b))
    features = np.concatenate([first_a, first_b])
    basis = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)[2][:3]
    colours = features @ basis.T
    low, high = np.percentile(colours, [2, 98], axis=0)
    colours = np.clip((colours - low) / (high - low), 0, 1)
    colour_a, colour_b = colours[: len(a.points)], colours[len(a.points) :]
    figure = Figure(figsize=(13, 4))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=(0.5, 1, 1, 1))
    for row, (name, picture) in enumerate(shown):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(picture)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    parts = (
        (shown[0][0], [(a.points, colour_a, "o")]),
        (f"{shown[1][0]}, aligned", [(moved, colour_b, "^")]),
        (f"both: {found.score:.2f}", [(a.points, "tab:blue", "o"), (moved, "tab:orange", "^")]),
    )
    reach = float(np.abs(np.concatenate([a.points, moved])).max())
    for index, (title, clouds) in enumerate(parts):
        axes = figure.add_subplot(grid[:, index + 1], projection="3d")
        for points, colour, marker in clouds:
            axes.scatter(*points.T, c=colour, marker=marker, s=18, depthshade=False)
        axes.set_title(title)
        axes.set_box_aspect((1, 1, 1), zoom=1.1)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
        axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (OSError, ValueError) as error:  # of a kind of picture that is unknown
        raise InputError(f"picture: {path} cannot be written ({error}); name a .png elsewhere") from None
