"""The second stop: a virtual camera turned to look at the object, so that networks always see it centred.

Turning (instead of cutting a box out) keeps the view a true perspective one: what the network calls a rotation is then
the rotation between two virtual cameras, and ``R_virtual_camera`` takes it back to the real ones. Cutting a box instead
is wrong by the angle between the object and the optical axis, up to some 20° at the image's border.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from nope_ros.frame import Frame
from nope_ros.rotations import exp, turn_to

Array = NDArray[np.float64]

# The circle around the mask fills this part of the crop; the rest keeps the outline away from the border.
FILL = 0.9
# Closer to the vertical than this (sine of the angle), gravity says nothing about roll.
_VERTICAL = 0.05


@dataclass(frozen=True)
class Crop:
    """An object as a virtual camera sees it.

    Attributes:
        image: (S, S, 3) uint8 RGB, black outside the mask.
        mask: (S, S) uint8, 255 on the object, smooth at its outline.
        R_virtual_camera: (3, 3), real camera axes to virtual camera axes.
        K_virtual: (3, 3) intrinsics of the virtual camera, pixels.
        angular_radius: tangent of half the angle under which the mask's enclosing circle is seen.
        pixel_radius: that circle's radius in pixels of the camera's image: how finely the outline was seen.
        roll_known: whether roll was removed by gravity.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    R_virtual_camera: Array
    K_virtual: Array
    angular_radius: float
    pixel_radius: float
    roll_known: bool

    @cached_property
    def filled(self) -> float:
        """Share of the enclosing circle that the mask fills."""
        return filled(self.mask)


def filled(mask: NDArray[np.uint8]) -> float:
    """Share of its enclosing circle that the mask (S, S) of a crop fills, 0..255 a pixel."""
    circle = np.pi * (FILL * mask.shape[0] / 2) ** 2
    return max(float(mask.sum(dtype=np.int64)) / 255 / circle, 1 / circle)


@dataclass(frozen=True)
class VirtualCamera:
    """Where a crop looks and how far: rotation (3, 3), intrinsics (3, 3), tangent of half the object's angle."""

    R_virtual_camera: Array
    K_virtual: Array
    angular_radius: float

    def rolled(self, roll: float) -> VirtualCamera:
        """The same, turned by ``roll`` radians about its optical axis."""
        return replace(self, R_virtual_camera=exp(np.array([0.0, 0.0, roll])) @ self.R_virtual_camera)


def outline(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> Array:
    """Convex outline (N, 2) of a mask in pixels, specks below 2 % of its area left out.

    Specks are what segmentation networks leave behind; one of them at the other end of the image would otherwise move
    the crop off the object.
    """
    binary = np.ascontiguousarray(mask, dtype=np.uint8)
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    # The area that a contour surrounds misses its own pixels: all of a line's, which is as long as half its contour.
    areas = [max(cv2.contourArea(contour), cv2.arcLength(contour, True) / 2 + 1) for contour in contours]
    least = min(0.02 * sum(areas), max(areas))  # of a mask that is all specks, the largest is the object
    kept = [contour for contour, area in zip(contours, areas, strict=True) if area >= least]
    hull = cv2.convexHull(np.concatenate(kept))
    return hull.reshape(-1, 2).astype(np.float64)


def roll_of_gravity(R_turned_camera: Array, gravity_camera: Array) -> float | None:
    """The roll (radians) that makes gravity point down in the turned camera's image; None if it looks along gravity."""
    gravity = R_turned_camera @ (gravity_camera / np.linalg.norm(gravity_camera))
    if np.hypot(gravity[0], gravity[1]) < _VERTICAL:
        return None
    return float(np.arctan2(gravity[0], gravity[1]))


def virtual_camera(outline_px: Array, K: Array, size: int) -> VirtualCamera:
    """The virtual camera that centres an outline's enclosing circle and makes it fill ``FILL`` of the crop.

    The circle is taken in the turned view, not in the image, where perspective stretches it towards the border; a
    circle (unlike a box) does not change when the camera rolls.

    Args:
        outline_px: (N, 2) outline of the mask, pixels.
        K: (3, 3) intrinsics of the image.
        size: side of the crop, pixels.
    """
    rays = np.column_stack([outline_px, np.ones(len(outline_px))]) @ np.linalg.inv(K).T
    turn = turn_to(rays.mean(axis=0))
    radius = 0.0
    for _ in range(2):  # once to find the circle, once more in the view turned to its centre
        seen = rays @ turn.T
        centre, radius = _enclosing_circle(seen[:, :2] / seen[:, 2:])
        turn = turn_to(turn.T @ np.array([*centre, 1.0]))
    focal = FILL * size / 2 / radius
    middle = (size - 1) / 2  # pixel centres are integers
    K_virtual = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]])
    return VirtualCamera(turn, K_virtual, radius)


def _enclosing_circle(points: Array) -> tuple[Array, float]:
    """Centre (2,) and radius of the smallest circle around points (N, 2)."""
    # OpenCV's tolerances are absolute, 1e-4 and more, and meant for pixels.
    middle, extent = points.mean(axis=0), float(np.ptp(points, axis=0).max())
    unit = max(extent, 1e-12) / 1e4
    centre, radius = cv2.minEnclosingCircle(((points - middle) / unit).astype(np.float32))
    return middle + unit * np.array(centre), unit * radius


def look_through(
    image: NDArray[np.uint8], K: Array, camera: VirtualCamera, size: int, interpolation: int = cv2.INTER_LINEAR
) -> NDArray[np.uint8]:
    """Resample an image (H, W[, C]) into a virtual camera's view (size, size[, C]); black beyond the image."""
    homography = camera.K_virtual @ camera.R_virtual_camera @ np.linalg.inv(K)
    # Large objects are shrunk by area first: bilinear sampling alone would skip pixels and alias.
    shrink = min(int(K[0, 0] / camera.K_virtual[0, 0]), *image.shape[:2])
    if shrink > 1:
        height, width = image.shape[0] // shrink, image.shape[1] // shrink
        image = cv2.resize(image[: height * shrink, : width * shrink], (width, height), interpolation=cv2.INTER_AREA)
        half = (shrink - 1) / 2
        homography = homography @ np.array([[shrink, 0, half], [0, shrink, half], [0, 0, 1.0]])
    return cv2.warpPerspective(image, homography, (size, size), flags=interpolation)


def depth_through(depth: NDArray[np.floating], K: Array, camera: VirtualCamera | Crop, cells: int) -> Array:
    """Depth along a virtual camera's axis at the centres of its crop's cells (cells, cells); NaN where there is none.

    Args:
        depth: (H, W) along the real camera's axis, NaN where unknown; the nearest pixel counts.
        K: (3, 3) of the real camera.
        camera: the virtual one.
        cells: to a side of the crop.
    """
    middle = camera.K_virtual[0, 2]
    stride = (2 * middle + 1) / cells
    along = (np.arange(cells) + 0.5) * stride - 0.5
    v, u = np.meshgrid(along, along, indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ (camera.R_virtual_camera.T @ np.linalg.inv(camera.K_virtual)).T
    rays /= rays[..., 2:]
    pixels = np.round(rays @ K.T).astype(int)
    x, y = pixels[..., 0], pixels[..., 1]
    height, width = depth.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    z = np.where(inside, depth[y.clip(0, height - 1), x.clip(0, width - 1)], np.nan)
    found: Array = (rays @ camera.R_virtual_camera[2]) * z
    return found


def rolled(crop: NDArray[np.uint8], roll: float) -> NDArray[np.uint8]:
    """A crop (S, S, ...) as its virtual camera sees it after a roll: content turns by ``roll`` from x towards y."""
    middle = (crop.shape[0] - 1) / 2
    cosine, sine = np.cos(roll), np.sin(roll)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    shift = middle - turn @ [middle, middle]
    turned: NDArray[np.uint8] = cv2.warpAffine(crop, np.column_stack([turn, shift]), crop.shape[:2])
    return turned


def virtual_crop(frame: Frame, size: int, gravity_camera: Array | None = None) -> Crop:
    """Look at the frame's object.

    Args:
        frame: image, mask and calibration.
        size: side of the crop, pixels.
        gravity_camera: (3,) direction of gravity (down) in camera axes; with it, roll is removed.
    """
    x0, y0, x1, y1 = frame.bbox_xyxy
    points = outline(frame.mask[y0:y1, x0:x1]) + np.array([x0, y0])
    camera = virtual_camera(points, frame.camera.K, size)
    roll = None if gravity_camera is None else roll_of_gravity(camera.R_virtual_camera, np.asarray(gravity_camera))
    if roll is not None:
        camera = camera.rolled(roll)
    # Only the part around the object is resampled: a full-HD frame then costs what a small one does.
    margin = int(0.2 * max(x1 - x0, y1 - y0)) + 4
    left, top = max(x0 - margin, 0), max(y0 - margin, 0)
    part = np.s_[top : y1 + margin, left : x1 + margin]
    K = frame.camera.K - np.array([[0, 0, left], [0, 0, top], [0, 0, 0.0]])
    visible = np.where(frame.mask[part], np.uint8(255), np.uint8(0))
    masked = cv2.bitwise_and(frame.image[part], frame.image[part], mask=visible)
    return Crop(
        image=look_through(masked, K, camera, size),
        mask=look_through(visible, K, camera, size),
        R_virtual_camera=camera.R_virtual_camera,
        K_virtual=camera.K_virtual,
        angular_radius=camera.angular_radius,
        pixel_radius=camera.angular_radius * float(frame.camera.K[0, 0]),
        roll_known=roll is not None,
    )
