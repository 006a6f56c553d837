"""Which image is the reference, which the query, and what a method may know of each.

Truth is kept away from methods by type: a method is handed ``Observation``s, which hold no pose. What an observation
holds besides the image follows from the protocol, that is from the prior a robot would use:

``free``      image, mask, intrinsics.
``upright``   and the direction of gravity in both images. Roll is removed by it; of the query's elevation no more is
              used than whether the camera is above or below the object's horizon.
``standing``  the same observations; the query's elevation is used.

Gravity is true here, as a robot's IMU or TF gives it; the object keeps its up axis between reference and query. Crop,
centre and scale come from the mask.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nope_ros.distribution import RotationDistribution
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry
from nope_ros.frame import Frame, InputError
from nope_ros.prior import PRIORS, Prior

Array = NDArray[np.float64]

REFERENCES = 5
"""Reference images drawn for each object, at most."""


@dataclass(frozen=True)
class View:
    """One image of an object and the truth about it.

    Attributes:
        name: differs between views of one object.
        R_camera_object: (3, 3), true.
        t_camera_object: (3,), true; of the object's centre.
        gravity_camera: (3,) direction of gravity (down), or None where the set does not tell.
        read: gives the image; called when it is needed, as a set may not fit into memory.
    """

    name: str
    R_camera_object: Array
    t_camera_object: Array
    gravity_camera: Array | None
    read: Callable[[], Frame]

    @property
    def direction(self) -> Array:
        """Unit vector (3,) from the object to the camera, in the object's frame."""
        towards: Array = -self.R_camera_object.T @ self.t_camera_object
        return towards / np.linalg.norm(towards)


@dataclass(frozen=True)
class EvaluationObject:
    """An object, its views, and which of them are compared.

    Attributes:
        name: of the object.
        views: all of them.
        pairs: (reference, query) indices of views.
        protocols: under which its pairs count.
        symmetry: rotations that cannot be told from an image.
    """

    name: str
    views: tuple[View, ...]
    pairs: tuple[tuple[int, int], ...]
    protocols: tuple[Prior, ...] = PRIORS
    symmetry: Symmetry = NO_SYMMETRY


@dataclass(frozen=True)
class EvaluationSet:
    """A test set.

    Attributes:
        kind: "photos", "meshes", "procedural" or "bop".
        source: where it came from.
        count: how many objects ``objects`` yields.
        objects: makes them one after the other; a name may come twice, for different protocols.
    """

    kind: str
    source: str
    count: int
    objects: Callable[[], Iterator[EvaluationObject]]


@dataclass(frozen=True)
class Observation:
    """What a method sees of one image.

    Attributes:
        frame: image, mask, camera.
        gravity_camera: (3,), or None under the protocol ``free``.
        key: the same for the same image, so that a method may keep what it computed.
    """

    frame: Frame
    gravity_camera: Array | None
    key: str


@dataclass(frozen=True)
class Answer:
    """What a method says of one pair.

    Attributes:
        delta_R: (3, 3) rotation from reference to query, camera axes.
        distribution: over delta_R, or None if the method has none.
        t_camera_object: (3,), or None if the method has none.
        confidence: 0..1, or None.
    """

    delta_R: Array
    distribution: RotationDistribution | None = None
    t_camera_object: Array | None = None
    confidence: float | None = None


class Method(Protocol):
    """Anything that estimates a relative pose."""

    name: str

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """What is kept of a reference. Its pose is the user's choice of frame and scale, so it is given."""
        ...

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """One answer for each reference that ``register`` returned."""
        ...


def observation(view: View, frame: Frame, prior: Prior, key: str) -> Observation:
    """What the protocol shows of a view.

    Raises:
        InputError: if the protocol needs gravity and the view has none.
    """
    if prior == "free":
        return Observation(frame, None, key)
    if view.gravity_camera is None:
        raise InputError(f"protocol '{prior}': gravity is not known in {view.name}; use 'free'")
    return Observation(frame, view.gravity_camera, key)


def generator(seed: int, *names: str) -> Generator:
    """Randomness that depends on the seed and the names alone, not on what else is evaluated."""
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


def draw_pairs(
    count: int, seed: int, name: str, references: int = REFERENCES, limit: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Some references, each with all other views.

    Args:
        count: number of views.
        seed: of the draw.
        name: of the object.
        references: how many, at most.
        limit: most pairs; which ones is drawn too.
    """
    rng = generator(seed, name, "pairs")
    chosen = np.sort(rng.choice(count, min(references, count), replace=False))
    pairs = [(int(reference), query) for reference in chosen for query in range(count) if query != reference]
    if limit is not None and limit < len(pairs):
        pairs = [pairs[index] for index in np.sort(rng.choice(len(pairs), limit, replace=False))]
    return tuple(pairs)


@dataclass(frozen=True)
class Occluder:
    """Hides a rectangle that covers a share of the mask's bounding box, drawn anew for each image.

    What it hides is gone from mask and image, as when a segmentation sees what stands in front.
    """

    share: float = 0.0
    seed: int = 0
    tries: int = field(default=20, repr=False)

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0 <= self.share < 1:
            raise InputError(f"occlusion: {self.share:g} is not a share of the box in 0..1 (0.25 is a quarter)")

    def __call__(self, frame: Frame, *names: str) -> Frame:
        """The frame with a part hidden; ``names`` are those of the object and the view."""
        if self.share == 0:
            return frame
        rng = generator(self.seed, *names, "occluder")
        x0, y0, x1, y1 = frame.bbox_xyxy
        for _ in range(self.tries):
            # Width times height is the share, each at most the whole side.
            width = np.exp(rng.uniform(np.log(self.share), 0.0))
            size = np.round([width * (x1 - x0), self.share / width * (y1 - y0)]).astype(int)
            left = x0 + int(rng.integers(0, x1 - x0 - size[0] + 1))
            top = y0 + int(rng.integers(0, y1 - y0 - size[1] + 1))
            mask, image = frame.mask.copy(), frame.image.copy()
            hidden = np.s_[top : top + size[1], left : left + size[0]]
            mask[hidden], image[hidden] = False, 0
            # A thin object may vanish whole, and of that nothing can be asked.
            if cv2.countNonZero(mask.astype(np.uint8)) >= 0.2 * cv2.countNonZero(frame.mask.astype(np.uint8)):
                try:
                    return Frame(image, mask, frame.camera, frame.depth)
                except InputError:
                    continue
        return frame
