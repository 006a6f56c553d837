"""Photographs with true poses: ``<object>/poses.json`` beside images and masks.

``poses.json`` holds ``images``, a list of ``file``, ``mask``, ``K``, ``R``, ``t`` (x_camera = R·x_object + t, optical
axes), and ``up``, the object's up axis in its own frame, where gravity is known. ``symmetries_discrete`` and
``symmetries_continuous`` may be given as in BOP's ``models_info.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nope_ros.evaluation.protocol import REFERENCES, EvaluationObject, EvaluationSet, View, draw_pairs
from nope_ros.evaluation.symmetry import Symmetry
from nope_ros.frame import Frame, InputError
from nope_ros.prior import PRIORS

_POSES = "poses.json"


def read_image(path: Path, flags: int = cv2.IMREAD_COLOR) -> NDArray[np.uint8]:
    """An image as OpenCV reads it, RGB if it has colour.

    Raises:
        InputError: if it is not there, or no image.
    """
    image = cv2.imread(str(path), flags)
    if image is None:
        raise InputError(f"{path}: cannot be read as an image; is the data set complete?")
    return np.ascontiguousarray(image[..., ::-1]) if flags == cv2.IMREAD_COLOR else image


def read_frame(image: Path, mask: Path, K: NDArray[np.float64]) -> Frame:
    """One undistorted image of an object: files of the image and of the mask (above 127 is the object), K (3, 3).

    Raises:
        InputError: if a file cannot be read, or they do not fit each other.
    """
    return Frame.from_arrays(read_image(image), read_image(mask, cv2.IMREAD_GRAYSCALE) > 127, K)


def holds_photos(folder: Path) -> bool:
    """Whether a folder is one that ``photo_set`` reads, and not one of meshes."""
    return (folder / _POSES).is_file() or any(folder.glob(f"*/{_POSES}"))


def photo_set(
    folder: Path,
    seed: int = 0,
    *,
    objects: Sequence[str] | None = None,
    references: int = REFERENCES,
    pairs: int | None = None,
) -> EvaluationSet:
    """The photographs in a folder.

    Args:
        folder: of one object, or of folders of objects.
        seed: draws the references.
        objects: names of those to use; all by default.
        references: of each object, at most; each is compared with all its other images.
        pairs: most pairs of an object.

    Raises:
        InputError: if there are none, or an object is missing.
    """
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_POSES}"))}
    if (folder / _POSES).is_file():
        found = {folder.name: folder}
    if not found:
        raise InputError(f"photos: {folder} holds no <object>/{_POSES}; give the folder that holds the objects")
    missing = [name for name in objects or () if name not in found]
    if missing:
        raise InputError(f"photos: {folder} has no object {', '.join(missing)}; it has {', '.join(found)}")
    chosen = list(objects or found)

    def load() -> Iterator[EvaluationObject]:
        for name in chosen:
            yield _read_object(found[name], name, seed, references, pairs)

    return EvaluationSet("photos", str(folder), len(chosen), load)


def _read_object(folder: Path, name: str, seed: int, references: int, pairs: int | None) -> EvaluationObject:
    path = folder / _POSES
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        up = None if content.get("up") is None else np.array(content["up"], dtype=np.float64).reshape(3)
        views = tuple(_view(folder, image, up) for image in content["images"])
        symmetry = Symmetry.from_bop(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"photos: {path} is not as expected ({type(error).__name__}: {error})") from error
    return EvaluationObject(
        name,
        views,
        draw_pairs(len(views), seed, name, references, pairs),
        PRIORS if up is not None else ("free",),
        symmetry,
    )


def _view(folder: Path, image: dict[str, Any], up: NDArray[np.float64] | None) -> View:
    R = np.array(image["R"], dtype=np.float64).reshape(3, 3)
    K = np.array(image["K"], dtype=np.float64).reshape(3, 3)
    return View(
        name=image["file"],
        R_camera_object=R,
        t_camera_object=np.array(image["t"], dtype=np.float64).reshape(3),
        gravity_camera=None if up is None else -R @ up,
        read=partial(read_frame, folder / image["file"], folder / image["mask"], K),
    )
