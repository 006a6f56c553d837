"""Datasets in BOP layout (T-LESS, LM-O, YCB-V, ...), as their users have them on disk.

    DIR/models/models_info.json (or models_eval/)        diameters and symmetries (optional)
    DIR/models/obj_<id>.ply (or models_eval/)            in millimetres; symmetry is found from it without the former
    DIR/<split>/<scene>/scene_camera.json                cam_K, and cam_R_w2c where the scene's frame is known
    DIR/<split>/<scene>/scene_gt.json                    cam_R_m2c, cam_t_m2c (mm), obj_id for each instance
    DIR/<split>/<scene>/scene_gt_info.json               visib_fract for each instance (optional)
    DIR/<split>/<scene>/rgb/ or gray/                    <image>.png, .jpg or .tif
    DIR/<split>/<scene>/mask_visib/<image>_<instance>.png

Scenes are taken to have z up in their own frame, so where ``cam_R_w2c`` is given gravity is known. Nothing in the
layout says so: of some sets another axis is up, or none. Under ``upright`` and ``standing`` only pairs count in which
the object stands on the same face.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nope_ros.evaluation.photos import read_frame
from nope_ros.evaluation.protocol import REFERENCES, EvaluationObject, EvaluationSet, View, generator
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry, SymmetryCache
from nope_ros.frame import Frame, InputError

Array = NDArray[np.float64]

LEAST_VISIBLE = 0.1
"""Instances that show less of themselves do not count, as in BOP."""
REFERENCE_VISIBLE = 0.9
"""Who registers an object shows all of it."""

WorldUp = Literal["none", "x", "y", "z"]
WORLD_UP: tuple[WorldUp, ...] = ("none", "x", "y", "z")
"""Axes of a scene's frame that may point up; "none": it is not known."""

_PAIRS = 200
_MODELS = ("models_eval", "models", "models_cad", "models_reconst")
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
    world_up: WorldUp = "z",
    cache: Path | None = None,
) -> EvaluationSet:
    """One split of a dataset.

    Args:
        folder: of the dataset.
        split: name of the folder of scenes in it: "test", "test_primesense", ...
        seed: draws the references.
        objects: ids of those to use; all by default.
        references: of each object, at most.
        pairs: most pairs of an object; 200 by default.
        world_up: axis of the scenes' frame that points up; "none": gravity is not known, and only ``free`` has pairs.
        cache: file of symmetries found before.

    Raises:
        InputError: if the layout is another one, or an object that is named is not there.
    """
    scenes = sorted(path.parent for path in (folder / split).glob("*/scene_gt.json"))
    if not scenes:
        present = sorted({path.parent.parent.name for path in folder.glob("*/*/scene_gt.json")})
        advice = f"its splits are {', '.join(present)}" if present else "give a dataset in BOP layout"
        raise InputError(f"bop: {folder / split} holds no <scene>/scene_gt.json; {advice}")
    marked = _read_symmetries(folder)
    by_object: dict[int, list[_Instance]] = defaultdict(list)
    for scene in scenes:
        for instance in _read_scene(scene, world_up):
            by_object[instance.object_id].append(instance)
    known = {str(number): number for number in sorted(by_object)}
    ids = list(known) if objects is None else [name.strip().lstrip("0") or "0" for name in objects]
    missing = [name for name in ids if name not in known]
    if missing:
        raise InputError(f"bop: {folder / split} shows no object {', '.join(missing)}; its ids are {', '.join(known)}")
    chosen = [known[name] for name in ids]

    def load() -> Iterator[EvaluationObject]:
        for number in chosen:
            found = by_object[number]
            symmetry = NO_SYMMETRY
            if marked is not None:
                symmetry = marked.get(number, NO_SYMMETRY)
            elif (model := _model(folder, number)) is not None:
                # These need numba, which whoever has a models_info.json can do without.
                from nope_ros.evaluation.meshes import unusable, usable_mesh

                try:
                    mesh = usable_mesh(model, up="z")  # "z": as it is
                except InputError as error:
                    yield unusable(f"{number:06d}", InputError(f"{error}; no symmetry is taken"), ("free",))
                else:
                    symmetry = SymmetryCache(cache).find(mesh.normalised()[0])
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


def _read_symmetries(folder: Path) -> dict[int, Symmetry] | None:
    """Of each object, as ``models_info.json`` marks them, or None if there is no such file."""
    for name in _MODELS:
        path = folder / name / "models_info.json"
        if path.is_file():
            content = _read_json(path)
            try:
                return {int(number): Symmetry.from_bop(info) for number, info in content.items()}
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"bop: {path} is not as expected ({type(error).__name__}: {error})") from error
    return None


def _model(folder: Path, number: int) -> Path | None:
    # Models made for evaluation may have lost their colour, which breaks symmetries: they come last.
    paths = (folder / name / f"obj_{number:06d}.ply" for name in (*_MODELS[1:], _MODELS[0]))
    return next((path for path in paths if path.is_file()), None)


def _read_scene(scene: Path, world_up: WorldUp) -> Iterator[_Instance]:
    cameras, truth = _read_json(scene / "scene_camera.json"), _read_json(scene / "scene_gt.json")
    info = _read_json(scene / "scene_gt_info.json") if (scene / "scene_gt_info.json").is_file() else {}
    try:
        for image, instances in truth.items():
            camera = cameras[image]
            K = np.array(camera["cam_K"], dtype=np.float64).reshape(3, 3)
            world = None if world_up == "none" else camera.get("cam_R_w2c")
            gravity = None
            if world is not None:
                gravity = -np.array(world, dtype=np.float64).reshape(3, 3)[:, "xyz".index(world_up)]
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
