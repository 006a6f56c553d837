"""What reality does to a render: masks that are wrong, light that differs, cameras that blur.

A render (RGBA, the object centred, no roll) goes in; what a robot's crop of it would look like comes out, with the
rotation of the virtual camera that made it. The crop is made by ``nope_ros.crop``, the code that runs on the robot.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nope_ros.crop import VirtualCamera, look_through, outline, roll_of_gravity, virtual_camera

Array = NDArray[np.float64]


class AugmentationConfig(BaseModel):
    """Ranges of the augmentation: probabilities in 0..1, lengths in pixels of the 128 px render where not said."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    occluder_probability: float = 0.2
    occluder_share: tuple[float, float] = (0.05, 0.35)  # of the object's box
    mask_grow: tuple[float, float] = (-2.0, 2.5)  # eroded below zero, leaking background above
    mask_roughness: float = 2.0  # standard deviation of the outline's error
    missing_piece_probability: float = 0.15
    gain: tuple[float, float] = (0.5, 1.5)
    gamma: tuple[float, float] = (0.7, 1.4)
    white_balance: float = 0.09  # standard deviation of each channel's log gain
    saturation: tuple[float, float] = (0.4, 1.4)
    shading: float = 0.4  # strongest brightness slope across the object
    highlight_probability: float = 0.2
    noise: tuple[float, float] = (0.0, 0.05)  # standard deviation, of full scale
    blur: tuple[float, float] = (0.0, 1.6)  # Gaussian sigma
    motion_blur_probability: float = 0.1
    low_resolution_probability: float = 0.15
    jpeg_probability: float = 0.4
    jpeg_quality: tuple[int, int] = (25, 90)
    clean_probability: float = 0.1  # no photometric change at all
    gravity_noise_deg: float = 2.5  # error of the gravity direction by which roll is removed


@dataclass(frozen=True)
class View:
    """One training view: (4, S, S) uint8 RGB (black outside the mask) and mask, R_virtual_object (3, 3), the camera."""

    crop: NDArray[np.uint8]
    R_virtual_object: Array
    camera: VirtualCamera


def _smooth_noise(rng: Generator, size: int, cells: int) -> NDArray[np.float32]:
    coarse = rng.normal(size=(cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _background(rng: Generator, size: int) -> NDArray[np.uint8]:
    base = rng.uniform(0, 255, 3)
    if rng.random() < 0.3:
        return np.broadcast_to(base.astype(np.uint8), (size, size, 3)).copy()
    texture = np.stack([_smooth_noise(rng, size, int(rng.integers(2, 24))) for _ in range(3)], axis=-1)
    grey = _smooth_noise(rng, size, int(rng.integers(2, 48)))[..., None]
    return np.clip(base + 30 * texture + 30 * grey, 0, 255).astype(np.uint8)


def damaged_mask(alpha: NDArray[np.uint8], config: AugmentationConfig, rng: Generator) -> NDArray[np.uint8]:
    """The mask (H, W) in 0/255 that a segmentation might give for an object of this coverage (H, W) in 0..255."""
    size = alpha.shape[0]
    true = (alpha > 127).astype(np.uint8)
    inside = cv2.distanceTransform(true, cv2.DIST_L2, 3)
    outside = cv2.distanceTransform(1 - true, cv2.DIST_L2, 3)
    wobble = _smooth_noise(rng, size, int(rng.integers(4, 20))) * abs(rng.normal(0, config.mask_roughness * 0.5))
    mask = (inside - outside + wobble + rng.uniform(*config.mask_grow) * rng.random()) > 0
    x, y, width, height = cv2.boundingRect(true)
    if rng.random() < config.occluder_probability:
        area = rng.uniform(*config.occluder_share) * width * height
        hide = np.zeros_like(true)
        kind = rng.integers(3)
        if kind == 0:  # something in front
            aspect = np.exp(rng.normal(0, 0.5))
            axes = (int((area * aspect / np.pi) ** 0.5) + 1, int((area / aspect / np.pi) ** 0.5) + 1)
            centre = (int(rng.uniform(x, x + width)), int(rng.uniform(y, y + height)))
            cv2.ellipse(hide, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        elif kind == 1:
            side_x, side_y = int(area**0.5 * np.exp(rng.normal(0, 0.4))) + 1, int(area**0.5) + 1
            box = ((rng.uniform(x, x + width), rng.uniform(y, y + height)), (side_x, side_y), rng.uniform(0, 90))
            cv2.fillConvexPoly(hide, cv2.boxPoints(box).astype(np.int32), 1)
        else:  # cut off by the image's border
            angle = rng.uniform(0, 2 * np.pi)
            v, u = np.mgrid[:size, :size]
            along = (u - x - width / 2) * np.cos(angle) + (v - y - height / 2) * np.sin(angle)
            reach = along[true > 0].max() if true.any() else 0
            hide = (along > reach * (1 - 1.2 * rng.uniform(*config.occluder_share))).astype(np.uint8)
        mask &= hide == 0
    if rng.random() < config.missing_piece_probability:
        mask &= _smooth_noise(rng, size, int(rng.integers(4, 12))) < 1.6
    # A mask with next to nothing left teaches nothing: keep the true one.
    if mask.sum() < 0.3 * true.sum():
        mask = true > 0
    return mask.astype(np.uint8) * np.uint8(255)


def photographed(rgb: NDArray[np.uint8], config: AugmentationConfig, rng: Generator) -> NDArray[np.uint8]:
    """The render (H, W, 3) as a camera in other light might have recorded it."""
    if rng.random() < config.clean_probability:
        return rgb
    size = rgb.shape[0]
    levels = np.linspace(0, 1, 256) ** np.exp(rng.uniform(*np.log(config.gamma)))
    image = levels.astype(np.float32)[rgb]
    gain = np.exp(rng.uniform(*np.log(config.gain)) + rng.normal(0, config.white_balance, 3)).astype(np.float32)
    grey = cv2.transform(image, np.full((1, 3), 1 / 3))[..., None]
    image = (grey + (image - grey) * np.float32(rng.uniform(*config.saturation))) * gain
    if rng.random() < 0.5:
        angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, config.shading)
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        image *= (1 + slope * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]))[..., None]
    if rng.random() < config.highlight_probability:
        spot = np.zeros((size, size), np.float32)
        centre = rng.uniform(0.25, 0.75, 2) * size
        axes = (int(rng.uniform(2, 14)), int(rng.uniform(2, 14)))
        cv2.ellipse(spot, (int(centre[0]), int(centre[1])), axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        image += cv2.GaussianBlur(spot, (0, 0), float(rng.uniform(1, 5)))[..., None] * np.float32(rng.uniform(0.2, 0.9))
    sigma = rng.uniform(*config.blur)
    if sigma > 0.4:
        image = cv2.GaussianBlur(image, (0, 0), float(sigma))
    if rng.random() < config.motion_blur_probability:
        length = int(rng.integers(3, 8))
        kernel = np.zeros((length, length), np.float32)
        kernel[length // 2] = 1 / length
        turn = cv2.getRotationMatrix2D((length / 2 - 0.5, length / 2 - 0.5), float(rng.uniform(0, 180)), 1)
        image = cv2.filter2D(image, -1, cv2.warpAffine(kernel, turn, (length, length)))
    if rng.random() < config.low_resolution_probability:
        small = int(size * rng.uniform(0.3, 0.7))
        image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(*config.noise))
    result = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    if rng.random() < config.jpeg_probability:
        quality = int(rng.integers(*config.jpeg_quality))
        result = cv2.imdecode(cv2.imencode(".jpg", result, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    return result


def training_view(
    rgba: NDArray[np.uint8],
    R_camera_object: Array,
    K: Array,
    *,
    size: int,
    roll: float | None,
    config: AugmentationConfig | None,
    rng: Generator,
) -> View:
    """Turn a render into what the network will see on a robot.

    Args:
        rgba: (H, H, 4) uint8, black where alpha is zero.
        R_camera_object: (3, 3) of the render; object z is up.
        K: (3, 3) of the render.
        size: side of the crop, pixels.
        roll: radians of the virtual camera, or None to remove roll by gravity (the object's −z).
        config: ranges; None for no augmentation.
        rng: source of all randomness.
    """
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    mask: NDArray[np.uint8] = (alpha > 127).astype(np.uint8) * np.uint8(255)
    if config is not None:
        mask = damaged_mask(alpha, config, rng)
        visible = (
            alpha.astype(np.uint16)[..., None] * rgb
            + (255 - alpha.astype(np.uint16))[..., None] * (_background(rng, rgb.shape[0]).astype(np.uint16))
        ) // 255
        rgb = photographed(visible.astype(np.uint8), config, rng)
    points = outline(mask)
    camera = virtual_camera(points, K, size)
    if roll is None:
        gravity = -R_camera_object[:, 2]
        roll = roll_of_gravity(camera.R_virtual_camera, gravity)
        if roll is None:
            roll = float(rng.uniform(-np.pi, np.pi))
        elif config is not None:
            roll += np.radians(config.gravity_noise_deg) * rng.normal()
    camera = camera.rolled(roll)
    rgb = cv2.bitwise_and(rgb, rgb, mask=mask)
    crop = np.dstack([look_through(rgb, K, camera, size), look_through(mask, K, camera, size)])
    return View(np.ascontiguousarray(crop.transpose(2, 0, 1)), camera.R_virtual_camera @ R_camera_object, camera)
