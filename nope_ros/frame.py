"""The first stop: one camera image with its mask and calibration, checked once so that nothing later has to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DistortionModel = Literal["none", "plumb_bob", "rational_polynomial", "equidistant"]

# How many coefficients OpenCV takes for each model (CameraInfo calls OpenCV's fisheye model "equidistant").
_COEFFICIENTS: dict[DistortionModel, tuple[int, ...]] = {
    "none": (0,),
    "plumb_bob": (4, 5),
    "rational_polynomial": (8, 12, 14),
    "equidistant": (4,),
}

# Larger than any camera in use; refuses a corrupt header before it asks for memory.
LARGEST_SIDE = 16384

_FARTHEST_DEPTH = 100.0  # metres: no depth camera sees that far, and millimetres taken for metres do
_LONGEST_MESSAGE = 2000


class InputError(ValueError):
    """A bad input: the message says what is wrong, where, and what to do.

    In one line, whatever was put in: a name that holds a line break must not forge lines of a log.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:_LONGEST_MESSAGE])


class NothingSeenError(InputError):
    """A mask that shows no object, or too little of one: nothing is wrong with it but that."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with lens distortion.

    Attributes:
        K: (3, 3) intrinsics in pixels; integer pixel coordinates are pixel centres.
        width: image width in pixels.
        height: image height in pixels.
        distortion: coefficients in OpenCV's order.
        model: name of the distortion model, as in ``sensor_msgs/CameraInfo``.

    Raises:
        InputError: if K is not finite, a focal length is not positive, or the coefficients do not fit the model.
    """

    K: Array
    width: int
    height: int
    distortion: tuple[float, ...] = ()
    model: DistortionModel = "none"

    def __post_init__(self) -> None:
        """Check the calibration."""
        K = np.array(self.K, dtype=np.float64)  # a copy: the caller may go on to use its own
        if K.shape != (3, 3):
            raise InputError(f"camera: K has shape {K.shape}, expected (3, 3)")
        if not np.isfinite(K).all():
            raise InputError("camera: K holds NaN or infinity; publish a calibrated camera_info")
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise InputError(
                f"camera: focal lengths are fx={K[0, 0]:g}, fy={K[1, 1]:g} px; the camera is not calibrated, "
                "publish a camera_info with K filled in"
            )
        if abs(K[2, 2] - 1) > 1e-6 or np.abs(K[2, :2]).max() > 1e-6:
            raise InputError("camera: the last row of K is not [0, 0, 1]")
        if not (0 < self.width <= LARGEST_SIDE and 0 < self.height <= LARGEST_SIDE):
            raise InputError(f"camera: image size {self.width}x{self.height} is not within 1..{LARGEST_SIDE} px")
        if self.model not in _COEFFICIENTS:
            raise InputError(f"camera: distortion model '{self.model}' is unknown; known: {', '.join(_COEFFICIENTS)}")
        try:
            distortion = tuple(np.ravel(np.asarray(self.distortion, dtype=np.float64)).tolist())
        except (TypeError, ValueError):
            raise InputError(f"camera: distortion {self.distortion!r} is no list of coefficients") from None
        if not np.isfinite(distortion).all():
            raise InputError("camera: distortion coefficients hold NaN or infinity")
        if distortion and len(distortion) not in _COEFFICIENTS[self.model]:
            raise InputError(
                f"camera: {len(distortion)} distortion coefficients given, model '{self.model}' takes "
                f"{' or '.join(map(str, _COEFFICIENTS[self.model]))}"
            )
        object.__setattr__(self, "K", K)
        object.__setattr__(self, "distortion", distortion)

    @property
    def distorted(self) -> bool:
        """Whether undistorting would change the image."""
        return self.model != "none" and any(self.distortion)

    def without_distortion(self) -> Camera:
        """The same pinhole, with an ideal lens."""
        return replace(self, distortion=(), model="none")

    def undistort(self, image: NDArray[Any], interpolation: int = cv2.INTER_LINEAR) -> NDArray[Any]:
        """Resample an image (H, W[, C]) as an ideal lens with the same K would have seen it."""
        if not self.distorted:
            return image
        maps = _undistortion_maps(self.K.tobytes(), self.width, self.height, self.distortion, self.model)
        resampled: NDArray[Any] = cv2.remap(image, *maps, interpolation)
        return resampled


@lru_cache(maxsize=8)
def _undistortion_maps(
    K_bytes: bytes, width: int, height: int, distortion: tuple[float, ...], model: DistortionModel
) -> tuple[NDArray[Any], NDArray[Any]]:
    # Kept per calibration: the maps cost ten times more than the resampling itself.
    K = np.frombuffer(K_bytes).reshape(3, 3)
    coefficients = np.array(distortion)
    build = cv2.fisheye.initUndistortRectifyMap if model == "equidistant" else cv2.initUndistortRectifyMap
    map_x, map_y = build(K, coefficients, np.eye(3), K, (width, height), cv2.CV_32FC1)
    return map_x, map_y


# An object of which less than this is left without its rim is thin.
_NOT_THIN = 0.2


@dataclass(frozen=True)
class Frame:
    """One undistorted image of one object.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        mask: (H, W) bool, true on the object.
        camera: calibration without distortion.
        depth: (H, W) float32 metres along z, NaN where unknown; or None.
        cut_by_sensor: whether the mask reached the edge of the image that the lens gave. Undistorted, that edge may
            lie anywhere.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    camera: Camera
    depth: NDArray[np.float32] | None = None
    cut_by_sensor: bool = False
    bbox_xyxy: tuple[int, int, int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Find the mask's bounding box (pixels, right and bottom exclusive)."""
        columns = np.flatnonzero(self.mask.any(axis=0))
        rows = np.flatnonzero(self.mask.any(axis=1))
        if columns.size == 0:
            raise NothingSeenError("mask: no pixel is set; is the object in view, and is the instance id right?")
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        if min(box[2] - box[0], box[3] - box[1]) < 8:
            raise NothingSeenError(
                f"mask: the object is only {box[2] - box[0]}x{box[3] - box[1]} px, at least 8x8 are needed; move closer"
            )
        object.__setattr__(self, "bbox_xyxy", box)

    def mask_within(self, rim: float) -> NDArray[np.uint8]:
        """The mask in its box, without its rim, where depth cameras mix the object with what is behind it.

        Args:
            rim: how wide, as a share of the box's shorter side. A thin object, which is all rim, keeps its mask.
        """
        x0, y0, x1, y1 = self.bbox_xyxy
        mask = self.mask[y0:y1, x0:x1].astype(np.uint8)
        pixels = max(1, round(rim * min(x1 - x0, y1 - y0)))
        inner = cv2.erode(mask, np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8), borderValue=0).astype(np.uint8)
        return inner if inner.sum() >= _NOT_THIN * mask.sum() else mask

    @classmethod
    def from_arrays(
        cls,
        image: NDArray[Any],
        mask: NDArray[Any],
        camera: Camera | Array,
        depth: NDArray[Any] | None = None,
    ) -> Frame:
        """Check the arrays and undistort them.

        Args:
            image: (H, W, 3) uint8 RGB, or (H, W) grey.
            mask: (H, W), anything above zero is the object.
            camera: a Camera, or K (3, 3) of an undistorted image.
            depth: (H, W) metres (floats), zero or NaN where unknown.

        Raises:
            InputError: naming the array that does not fit.
            NothingSeenError: if the mask is empty, or smaller than 8x8 pixels.
        """
        image, mask = np.asarray(image), np.asarray(mask)
        if image.dtype != np.uint8:
            raise InputError(f"image: dtype is {image.dtype}, expected uint8")
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"image: shape is {image.shape}, expected (height, width, 3) RGB")
        height, width = image.shape[:2]
        if mask.shape != (height, width):
            raise InputError(
                f"mask: size {_size(mask)} differs from the image's {width}x{height}; "
                "publish masks at the image's resolution"
            )
        if not isinstance(camera, Camera):
            camera = Camera(np.asarray(camera), width, height)
        if (camera.width, camera.height) != (width, height):
            raise InputError(
                f"camera: calibrated for {camera.width}x{camera.height}, the image is {width}x{height}; "
                "publish the camera_info of this image"
            )
        mask = mask.astype(bool) if mask.dtype == np.bool_ else mask > 0
        if depth is not None:
            depth = np.asarray(depth)
            if depth.shape != (height, width):
                raise InputError(
                    f"depth: size {_size(depth)} differs from the image's {width}x{height}; "
                    "publish depth registered to the image"
                )
            if not np.issubdtype(depth.dtype, np.floating):
                raise InputError(
                    f"depth: dtype is {depth.dtype}; give metres as floats (millimetres are divided by 1000)"
                )
            depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float32)
            near = depth[mask & np.isfinite(depth)]
            if near.size and np.median(near) > _FARTHEST_DEPTH:
                raise InputError(
                    f"depth: the object would be {np.median(near):.0f} m away; is it in millimetres? Give metres"
                )
            # Nearest: interpolated depth at an edge is a point in the air.
            depth = camera.undistort(depth, cv2.INTER_NEAREST)
        cut = bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        mask = camera.undistort(mask.astype(np.uint8), cv2.INTER_NEAREST).astype(bool)
        return cls(camera.undistort(image), mask, camera.without_distortion(), depth, cut)

    @property
    def touches_border(self) -> bool:
        """Whether the mask reaches the edge of the sensor or of the image, so that the object is probably cut off."""
        x0, y0, x1, y1 = self.bbox_xyxy
        width, height = self.camera.width, self.camera.height
        return self.cut_by_sensor or x0 == 0 or y0 == 0 or x1 == width or y1 == height


def _size(array: NDArray[Any]) -> str:
    return "x".join(str(side) for side in reversed(array.shape[:2])) or "0"
