"""Datasets in BOP layout (T-LESS, LM-O, YCB-V, ...), as their users have them on disk.

    DIR/models/models_info.json (or models_eval/)        diameters and symmetries
    DIR/<split>/<scene>/scene_camera.json                cam_K, and cam_R_w2c where the scene's frame is known
    DIR/<split>/<scene>/scene_gt.json                    cam_R_m2c, cam_t_m2c (mm), obj_id for each instance
    DIR/<split>/<scene>/scene_gt_info.json               visib_fract for each instance (optional)
    DIR/<split>/<scene>/rgb/ or gray/                    <image>.png, .jpg or .tif
    DIR/<split>/<scene>/mask_visib/<image>_<instance>.png

Scenes are taken to have z up in their own frame, so where ``cam_R_w2c`` is given gravity is known. Under ``upright``
and ``standing`` only pairs count in which the object stands on the same face.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nope_ros.evaluation.photos import read_frame
from nope_ros.evaluation.protocol import REFERENCES, EvaluationObject, EvaluationSet, View, generator
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry
from nope_ros.frame import Frame, InputError

Array = NDArray[np.float64]

LEAST_VISIBLE = 0.1
"""Instances that show less of themselves do not count, as in BOP."""
REFERENCE_VISIBLE = 0.9
"""Who registers an object shows all of it."""

_PAIRS = 200
_SMALLEST = 8  # pixels; Frame refuses smaller masks
_SAME_FACE = np.cos(np.radians(10))
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".bmp")


@dataclass(frozen=True)
class _Instance:
    view: View
    object_id: int
    visible: float


def bop_set(
    folder: Path,
    split: str,
    seed: int = 0,
    *,
    objects: Sequence[str] | None = None,
    references: int = REFERENCES,
    pairs: int | None = None,
) -> EvaluationSet:
    """One split of a dataset.

    Args:
        folder: of the dataset.
        split: name of the folder of scenes in it: "test", "test_primesense", ...
        seed: draws the references.
        objects: ids of those to use; all by default.
        references: of each object, at most.
        pairs: most pairs of an object; 200 by default.

    Raises:
        InputError: if the layout is another one.
    """
    scenes = sorted(path.parent for path in (folder / split).glob("*/scene_gt.json"))
    if not scenes:
        present = sorted({path.parent.parent.name for path in folder.glob("*/*/scene_gt.json")})
        advice = f"its splits are {', '.join(present)}" if present else "give a dataset in BOP layout"
        raise InputError(f"bop: {folder / split} holds no <scene>/scene_gt.json; {advice}")
    symmetries = _read_symmetries(folder)
    by_object: dict[int, list[_Instance]] = defaultdict(list)
    for scene in scenes:
        for instance in _read_scene(scene):
            by_object[instance.object_id].append(instance)
    chosen = sorted(by_object) if objects is None else [int(name) for name in objects]
    missing = [str(number) for number in chosen if number not in by_object]
    if missing:
        raise InputError(f"bop: {folder / split} shows no object {', '.join(missing)}")

    def load() -> Iterator[EvaluationObject]:
        for number in chosen:
            found = by_object[number]
            symmetry = symmetries.get(number, NO_SYMMETRY)
            yield from _compared(f"{number:06d}", found, symmetry, seed, references, pairs or _PAIRS)

    return EvaluationSet("bop", f"{folder} {split}", 2 * len(chosen), load)


def _compared(
    name: str, found: list[_Instance], symmetry: Symmetry, seed: int, references: int, limit: int
) -> Iterator[EvaluationObject]:
    rng = generator(seed, name, "pairs")
    views = tuple(instance.view for instance in found)
    visible = np.array([instance.visible for instance in found])
    whole = np.flatnonzero(visible >= min(REFERENCE_VISIBLE, visible.max()))
    chosen = rng.choice(whole, min(references, len(whole)), replace=False)
    # The same image may show the object twice; which of the two is meant is not the question here.
    pairs = [
        (int(reference), query)
        for reference in np.sort(chosen)
        for query in range(len(views))
        if views[query].name.rsplit("_", 1)[0] != views[reference].name.rsplit("_", 1)[0]
    ]
    yield EvaluationObject(name, views, _drawn(pairs, limit, rng), ("free",), symmetry)
    up = [None if v.gravity_camera is None else -v.R_camera_object.T @ v.gravity_camera for v in views]
    standing = []
    for reference, query in pairs:
        a, b = up[reference], up[query]
        if a is not None and b is not None and a @ b > _SAME_FACE:
            standing.append((reference, query))
    yield EvaluationObject(name, views, _drawn(standing, limit, rng), ("upright", "standing"), symmetry)


def _drawn(pairs: list[tuple[int, int]], limit: int, rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    if len(pairs) > limit:
        pairs = [pairs[index] for index in np.sort(rng.choice(len(pairs), limit, replace=False))]
    return tuple(pairs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"bop: {path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"bop: {path} does not hold a JSON object")
    return content


def _read_symmetries(folder: Path) -> dict[int, Symmetry]:
    for name in ("models_eval", "models", "models_cad", "models_reconst"):
        path = folder / name / "models_info.json"
        if path.is_file():
            return {int(number): Symmetry.from_bop(info) for number, info in _read_json(path).items()}
    return {}


def _read_scene(scene: Path) -> Iterator[_Instance]:
    cameras, truth = _read_json(scene / "scene_camera.json"), _read_json(scene / "scene_gt.json")
    info = _read_json(scene / "scene_gt_info.json") if (scene / "scene_gt_info.json").is_file() else {}
    try:
        for image, instances in truth.items():
            camera = cameras[image]
            K = np.array(camera["cam_K"], dtype=np.float64).reshape(3, 3)
            world = camera.get("cam_R_w2c")
            gravity = None if world is None else -np.array(world, dtype=np.float64).reshape(3, 3)[:, 2]
            for number, instance in enumerate(instances):
                details = info.get(image, [{}] * len(instances))[number]
                visible = float(details.get("visib_fract", 1.0))
                box = details.get("bbox_visib", (0, 0, _SMALLEST, _SMALLEST))
                if visible < LEAST_VISIBLE or min(box[2:]) < _SMALLEST:
                    continue
                name = f"{int(image):06d}_{number:06d}"
                view = View(
                    name=f"{scene.name}/{name}",
                    R_camera_object=np.array(instance["cam_R_m2c"], dtype=np.float64).reshape(3, 3),
                    t_camera_object=np.array(instance["cam_t_m2c"], dtype=np.float64) / 1000,
                    gravity_camera=gravity,
                    read=partial(_read_frame, scene, int(image), scene / "mask_visib" / f"{name}.png", K),
                )
                yield _Instance(view, int(instance["obj_id"]), visible)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"bop: {scene} is not as expected ({type(error).__name__}: {error})") from error


def _read_frame(scene: Path, image: int, mask: Path, K: Array) -> Frame:
    for folder in ("rgb", "gray"):
        for suffix in _SUFFIXES:
            path = scene / folder / f"{image:06d}{suffix}"
            if path.is_file():
                return read_frame(path, mask, K)
    raise InputError(f"bop: {scene} has no image {image:06d} in rgb/ or gray/")
