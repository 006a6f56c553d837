"""Renders of meshes and of procedural objects as a camera in a room would take them.

Cameras are drawn for what a protocol allows: any direction and any roll for ``free``; above the object's horizon, held
about level, for ``upright`` and ``standing``. The object stands anywhere in the image, under light that is new in every
view. Or somebody walks once around it under a light that stays. Masks are true, so what is behind the object does not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nope_ros.evaluation.depth_camera import measured_depth
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet, View, draw_pairs, generator
from nope_ros.evaluation.symmetry import SymmetryCache
from nope_ros.frame import Frame, InputError
from nope_ros.prior import PRIORS, Prior
from nope_ros.rendering.files import MESH_SUFFIXES, mesh_files
from nope_ros.rendering.mesh import Mesh, load_mesh
from nope_ros.rendering.render import render
from nope_ros.rotations import exp, look_at, turn_to
from nope_ros.training.procedural import procedural_object
from nope_ros.training.render_cache import Finish, random_finish, random_lighting

Array = NDArray[np.float64]

FIRST_UNSEEN_SEED = 1_000_000_000
"""Of procedural objects; training counts from zero (``render_cache``: its seed times a million)."""


_WIDTH, _HEIGHT = 640, 480
_FOCAL = (500.0, 900.0)  # pixels: 65° to 39° across
_DISTANCE = (2.5, 8.0)  # object radii
_ROLL_SIGMA = np.radians(10.0)
_VIEWS = 16
_REFERENCES = 4
_HARDLY_SEEN = "is hardly to be seen from anywhere; is the mesh empty, or a line?"
_MARGIN = 4  # pixels between object and image border
_Placement = Callable[[Mesh, Finish, int, str, str, int, bool], tuple[View, ...]]
"""Views of an object: its mesh and finish, the seed, its name, what views are for, how many, and whether with depth."""
RADIUS_WITH_DEPTH = 0.1
"""Metres, of objects that a depth camera sees, as its noise is in metres; else one, and no unit."""


def mesh_set(
    folder: Path,
    seed: int = 0,
    *,
    protocols: Sequence[Prior] = PRIORS,
    objects: Sequence[str] | None = None,
    references: int = _REFERENCES,
    views: int = _VIEWS,
    pairs: int | None = None,
    cache: Path | None = None,
    depth: bool = False,
    up: str | None = None,
    walked: bool = False,
) -> EvaluationSet:
    """Renders of the meshes in a folder and its subfolders.

    A mesh that cannot be used is an object whose views cannot be read, so that whoever evaluates the set names it.

    Args:
        folder: with files that trimesh reads.
        seed: draws cameras, light and references.
        protocols: which views are needed.
        objects: names (``<subfolder>/<file without suffix>`` or the last part) of those to use.
        references: of each object, at most; each is compared with all its other views.
        views: of each object.
        pairs: most pairs of an object.
        cache: file of symmetries found before.
        depth: whether frames hold the depth that a depth camera would have measured.
        up: axis that points up in all the files, of ``rendering.mesh.UP_AXES``; by default as their folders say.
        walked: whether views are from once around the object, in order, under every protocol the same.

    Raises:
        InputError: if there are no meshes, or one named is missing.
    """
    paths = mesh_files(folder)
    if not paths:
        raise InputError(f"meshes: {folder} holds no {', '.join(MESH_SUFFIXES)} file; give a folder of meshes")
    if objects is not None:
        missing = [name for name in objects if not any(_is_named(key, name) for key in paths)]
        if missing:
            raise InputError(f"meshes: {folder} has no object {', '.join(missing)}; it has {', '.join(paths)}")
        paths = {key: path for key, path in paths.items() if any(_is_named(key, name) for name in objects)}
    sources = {name: partial(usable_mesh, path, up) for name, path in paths.items()}
    place = _around if walked else _anywhere
    load = partial(
        _objects, sources, seed, tuple(protocols), references, views, pairs, SymmetryCache(cache), depth, place
    )
    return EvaluationSet("meshes", str(folder), len(sources) * len(_groups(tuple(protocols))), load)


def procedural_set(
    seed: int = 0,
    *,
    protocols: Sequence[Prior] = PRIORS,
    count: int = 60,
    references: int = _REFERENCES,
    views: int = _VIEWS,
    pairs: int | None = None,
    cache: Path | None = None,
    depth: bool = False,
) -> EvaluationSet:
    """Renders of procedural objects that training never draws; arguments as of ``mesh_set``."""
    first = FIRST_UNSEEN_SEED + seed * count
    sources = {f"procedural/{number}": partial(procedural_object, number) for number in range(first, first + count)}
    known = SymmetryCache(cache)
    load = partial(_objects, sources, seed, tuple(protocols), references, views, pairs, known, depth, _anywhere)
    source = f"seeds {first}..{first + count - 1}"
    return EvaluationSet("procedural", source, count * len(_groups(tuple(protocols))), load)


def _is_named(key: str, name: str) -> bool:
    return name in (key, key.rsplit("/", 1)[-1])


def _groups(protocols: tuple[Prior, ...]) -> list[tuple[Prior, ...]]:
    # Protocols that share views.
    groups: list[tuple[Prior, ...]] = [tuple(one for one in protocols if one == "free")]
    groups.append(tuple(one for one in protocols if one != "free"))
    return [group for group in groups if group]


def _objects(
    sources: Mapping[str, Callable[[], Mesh]],
    seed: int,
    protocols: tuple[Prior, ...],
    references: int,
    views: int,
    pairs: int | None,
    cache: SymmetryCache,
    depth: bool,
    place: _Placement,
) -> Iterator[EvaluationObject]:
    for name, load in sources.items():
        try:
            mesh = load().normalised()[0]
        except InputError as error:
            yield from (unusable(name, error, group) for group in _groups(protocols))
            continue
        symmetry = cache.find(mesh)
        finish = random_finish(generator(seed, name, "finish"))
        for group in _groups(protocols):
            kind = "free" if group == ("free",) else "level"
            try:
                seen = place(mesh, finish, seed, name, kind, views, depth)
            except InputError as error:
                yield unusable(name, error, group)
                continue
            drawn = draw_pairs(len(seen), seed, f"{name}/{kind}", references, pairs)
            yield EvaluationObject(name, seen, drawn, group, symmetry)


def usable_mesh(path: Path, up: str | None = None) -> Mesh:
    """A mesh from a file, z up; ``up`` as of ``load_mesh``.

    Raises:
        InputError: if it cannot be read, or has no surface.
    """
    try:
        mesh = load_mesh(path, up=up)
    except ModuleNotFoundError:
        raise  # no fault of the file's
    except Exception as error:  # trimesh has one for each format
        what = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        raise InputError(f"{path} cannot be read as a mesh ({what})") from None
    if len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
        raise InputError(f"{path} holds no triangles, or coordinates that are not finite")
    return mesh


def unusable(name: str, error: InputError, protocols: tuple[Prior, ...]) -> EvaluationObject:
    """An object whose views cannot be read, for the reason that is given: as with a photograph, that ends no run."""

    def read() -> Frame:
        raise error

    view = View("mesh", np.eye(3), np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, -1.0]), read)
    return EvaluationObject(name, (view, view), ((0, 1),), protocols)


def _anywhere(mesh: Mesh, finish: Finish, seed: int, name: str, kind: str, count: int, depth: bool) -> tuple[View, ...]:
    views = []
    for number in range(count):
        rng = generator(seed, name, kind, str(number))
        for _ in range(20):
            R, t, K = random_camera(rng, level=kind == "level")
            light_seed = int(rng.integers(2**32))
            try:
                _photograph(mesh, finish, R, t, K, light_seed)
            except InputError:  # a fork seen end-on has no outline to speak of
                continue
            read = partial(_photograph, mesh, finish, R, t, K, light_seed, depth=depth)
            views.append(_view(f"{kind}/{number}", R, t, read, depth))
            break
        else:
            raise InputError(_HARDLY_SEEN)
    return tuple(views)


def _around(mesh: Mesh, finish: Finish, seed: int, name: str, kind: str, count: int, depth: bool) -> tuple[View, ...]:
    rng = generator(seed, name, "walk")
    cameras = walked_cameras(rng, count)
    light_seed = int(rng.integers(2**32))
    views = []
    for number, (R, t, K) in enumerate(cameras):
        try:
            _photograph(mesh, finish, R, t, K, light_seed, cameras[0][0])
        except InputError:
            continue
        read = partial(_photograph, mesh, finish, R, t, K, light_seed, cameras[0][0], depth, number)
        views.append(_view(f"{kind}/{number}", R, t, read, depth))
    if len(views) < count / 2:
        raise InputError(_HARDLY_SEEN)
    return tuple(views)


def _view(name: str, R: Array, t: Array, read: Callable[[], Frame], depth: bool) -> View:
    return View(name, R, t * (RADIUS_WITH_DEPTH if depth else 1.0), -R[:, 2], read)


def random_camera(rng: Generator, *, level: bool) -> tuple[Array, Array, Array]:
    """R_camera_object (3, 3), t_camera_object (3,) and K (3, 3) for an object of radius one that fits into the image.

    Args:
        rng: source of randomness.
        level: above the horizon and with little roll; else any direction and roll.
    """
    focal = rng.uniform(*_FOCAL)
    K = np.array([[focal, 0, (_WIDTH - 1) / 2], [0, focal, (_HEIGHT - 1) / 2], [0, 0, 1.0]])
    height = rng.uniform(0 if level else -1, 1)
    azimuth = rng.uniform(-np.pi, np.pi)
    flat = np.sqrt(1 - height**2)
    direction = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height])
    roll = rng.normal(0, _ROLL_SIGMA) if level else rng.uniform(-np.pi, np.pi)
    # Nearer than this the object's sphere does not fit into the image.
    nearest = np.hypot(1, focal / (_HEIGHT / 2 - _MARGIN)) * 1.02
    near, far = max(_DISTANCE[0], nearest), _DISTANCE[1]
    distance = 1 / rng.uniform(1 / far, 1 / near)
    for _ in range(100):
        pixel = rng.uniform(0, [_WIDTH, _HEIGHT])
        ray = np.linalg.inv(K) @ [*pixel, 1.0]
        if _fits(ray / np.linalg.norm(ray) * distance, K):
            break
    else:
        ray = np.array([0, 0, 1.0])
    ray = ray / np.linalg.norm(ray)
    R = turn_to(ray).T @ exp(np.array([0.0, 0.0, roll])) @ look_at(direction)
    return R, distance * ray, K


def walked_cameras(rng: Generator, count: int) -> list[tuple[Array, Array, Array]]:
    """Cameras once around an object of radius one, by even steps, as ``random_camera`` gives one.

    Held by hand: up and down in a slow wave, a little nearer and farther, the object about in the image's middle.
    """
    focal = rng.uniform(*_FOCAL)
    K = np.array([[focal, 0, (_WIDTH - 1) / 2], [0, focal, (_HEIGHT - 1) / 2], [0, 0, 1.0]])
    elevation, wave = np.radians([rng.uniform(15, 45), rng.uniform(5, 20)])
    phase, start = rng.uniform(-np.pi, np.pi, 2)
    nearest = max(_DISTANCE[0], 1.25 * np.hypot(1, focal / (_HEIGHT / 2 - _MARGIN)))
    distance = rng.uniform(nearest, max(_DISTANCE[1], nearest))
    cameras = []
    for azimuth in start + np.arange(count) * 2 * np.pi / count:
        azimuth += rng.normal(0, 0.03)
        height = elevation + wave * np.sin(azimuth + phase)
        flat = np.cos(height)
        direction = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(height)])
        R = exp(rng.normal(0, [0.03, 0.03, 0.05])) @ look_at(direction)
        cameras.append((R, -R @ direction * distance * rng.uniform(0.95, 1.05), K))
    return cameras


def _fits(centre: Array, K: Array) -> bool:
    # The unit sphere lies inside the four planes through the camera and the image's sides.
    corners = np.array([[_MARGIN, 0], [_WIDTH - 1 - _MARGIN, 0], [0, _MARGIN], [0, _HEIGHT - 1 - _MARGIN]], dtype=float)
    normals = np.array(
        [
            [K[0, 0], 0, K[0, 2] - corners[0, 0]],
            [-K[0, 0], 0, corners[1, 0] - K[0, 2]],
            [0, K[1, 1], K[1, 2] - corners[2, 1]],
            [0, -K[1, 1], corners[3, 1] - K[1, 2]],
        ]
    )
    return bool((normals @ centre / np.linalg.norm(normals, axis=1) >= 1).all())


def _photograph(
    mesh: Mesh,
    finish: Finish,
    R: Array,
    t: Array,
    K: Array,
    light_seed: int,
    R_light_object: Array | None = None,
    depth: bool = False,
    number: int = 0,
) -> Frame:
    # R_light_object: of the camera for which the light is drawn, that then stays where it is; else for this one.
    rng = np.random.default_rng(light_seed)
    lighting = random_lighting(rng, R if R_light_object is None else R_light_object, finish)
    if R_light_object is not None:
        R_camera_light = R @ R_light_object.T
        x, y, z = R[:, 2].tolist()
        directions = (lighting.directions @ R_camera_light.T).astype(np.float32)
        lighting = replace(lighting, directions=directions, up=(x, y, z))
    behind = np.full(3, rng.integers(40, 200), np.uint8)
    view = render(mesh, R, t, K, _WIDTH, _HEIGHT, lighting=lighting, background=behind)
    measured = None
    if depth:
        noise = np.random.default_rng((light_seed, 1, number) if number else (light_seed, 1))
        wall = float(np.linalg.norm(t)) + noise.uniform(0.5, 3.0)
        measured = measured_depth(RADIUS_WITH_DEPTH * view.depth, float(K[0, 0]), RADIUS_WITH_DEPTH * wall, noise)
    return Frame.from_arrays(view.rgb, view.mask, K, measured)
