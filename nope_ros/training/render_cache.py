"""Renders the training set once: every object from many sides, upright, as the crop of a virtual camera would see it.

    python -m nope_ros.training.render_cache --meshes meshes/train --procedural 3000 --out cache

Written to `--out`:

* `images.npy`   (N, size, size, 4) uint8: sRGB not multiplied by coverage (black where that is 0), and coverage 0..255.
* `depth.npy`    with `--depth`: (N, size, size) float16, z less the object centre's z; NaN where there is no object.
* `views.npz`    per view: `object_index` (N,), `R_camera_object` (N, 3, 3), `t_camera_object` (N, 3), `K` (N, 3, 3);
                 per object: `first_view`, `view_count`, `asymmetry` (NaN where unknown), `procedural` (bool), and
                 `names` (json, one string).
* `manifest.json` settings, counts, and `objects`: name, asymmetry (null where unknown), first view and view count.

Object frames are z up and scaled so that the farthest vertex is at distance 1 from the origin, the centre of the
bounding box. The object's up axis projects straight up in every image; the trainer adds roll by turning the image.
An object's views depend on the seed and its name only, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numba import njit
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nope_ros.rendering.files import mesh_files
from nope_ros.rendering.mesh import Mesh, load_mesh
from nope_ros.rendering.render import Lighting, ShadowMaps, all_around, render
from nope_ros.rotations import look_at
from nope_ros.training.procedural import procedural_object
from nope_ros.training.round import round_object
from nope_ros.training.variant import variant_of

HELD_OUT = re.compile(r"ycb|hope|libero", re.IGNORECASE)
"""Benchmarks whose objects are for evaluation; a mesh with such a name is never trained on."""

VARIANT_MARK = "#"
"""Between the name of a mesh and the number of a variant of it."""

ROUND = "round/"
"""What names of round objects begin with."""

Pose = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""R_camera_object (3, 3), t_camera_object (3,), K (3, 3)."""

SURROUNDINGS, AROUND_CELLS, SHADOW_CELLS = 24, 48, 128
"""Directions that light from all around comes from, and the sides of their shadow maps and of those of the lights."""

CHUNK = 16
"""Objects rendered between two reports; what an interruption costs at most."""


@dataclass(frozen=True)
class Settings:
    """What determines the cache. Lengths are in object radii, angles in degrees."""

    meshes: str | None
    procedural: int
    views: int
    mesh_views: int
    size: int
    seed: int
    distance: tuple[float, float] = (2.2, 8.0)
    """Camera to object centre; drawn uniformly in its inverse, as what perspective does goes with that."""
    fill: tuple[float, float] = (0.80, 0.98)
    """Share of the half image that the silhouette's farthest side reaches."""
    jitter: float = 0.04
    """How far off the silhouette's centre the camera looks, in shares of the silhouette."""
    from_above: float = 0.4
    """Share of views with elevation uniform in 0..`highest`; the others look from uniform directions on the sphere."""
    highest: float = 75.0
    supersampling: int = 2
    depth: bool = False
    """Keep a depth image of every view: half as large as its colours."""
    shadows: float = 0.75
    """Share of objects whose parts hide lights and surroundings from each other."""
    mesh_variants: int = 0
    """Other objects made from each mesh (`nope_ros.training.variant`), with as many views as a procedural one."""
    round_objects: int = 0
    """Things that look nearly the same all round (`nope_ros.training.round`), with as many views again."""


@dataclass(frozen=True)
class Source:
    """One object: a file, a variant of one, or the seed of a procedural or of a round object."""

    name: str
    path: str | None
    seed: int
    first_view: int
    view_count: int
    asymmetry: float
    variant: int = 0
    """0 is the object in the file."""

    def load(self) -> Mesh:
        """The object, z up, normalised."""
        if self.path is not None:
            mesh = _mesh_of(self.path)
        else:
            mesh = (round_object if self.name.startswith(ROUND) else procedural_object)(self.seed)
        if self.variant:
            mesh = variant_of(mesh, np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), 2]))
        return mesh.normalised()[0]


@lru_cache(maxsize=1)  # variants of one file follow each other
def _mesh_of(path: str) -> Mesh:
    return load_mesh(path)


def find_sources(settings: Settings) -> list[Source]:
    """All objects in order: meshes by path, procedural and round ones by seed, then the variants of each mesh."""
    sources: list[Source] = []
    first = 0
    if settings.meshes is not None:
        root = Path(settings.meshes)
        if not root.is_dir():
            raise SystemExit(f"--meshes {root}: no such folder; give one that holds <source>/<object>.glb")
        index = root.parent / "index.json"
        known = json.loads(index.read_text()).get(root.name, {}) if index.is_file() else {}
        for name, path in mesh_files(root).items():
            if HELD_OUT.search(name):
                continue
            asymmetry = float(known.get(name, {}).get("asymmetry", np.nan))
            sources.append(Source(name, str(path), 0, first, settings.mesh_views, asymmetry))
            first += settings.mesh_views
    for kind, count in (("procedural/", settings.procedural), (ROUND, settings.round_objects)):
        for i in range(count):
            seed = settings.seed * 1_000_000 + i
            sources.append(Source(f"{kind}{seed}", None, seed, first, settings.views, float("nan")))
            first += settings.views
    for mesh in [source for source in sources if source.path is not None]:
        for i in range(1, settings.mesh_variants + 1):
            name = f"{mesh.name}{VARIANT_MARK}{i}"
            sources.append(Source(name, mesh.path, settings.seed, first, settings.views, mesh.asymmetry, i))
            first += settings.views
    return sources


@njit(cache=True, nogil=True)
def _extent(
    vertices: NDArray[np.float32], R: NDArray[np.float64], t: NDArray[np.float64]
) -> tuple[float, float, float, float]:
    """Smallest and largest x/z and y/z of the vertices in the camera: x0, x1, y0, y1."""
    x0 = y0 = np.inf
    x1 = y1 = -np.inf
    for i in range(vertices.shape[0]):
        a, b, c = vertices[i, 0], vertices[i, 1], vertices[i, 2]
        z = R[2, 0] * a + R[2, 1] * b + R[2, 2] * c + t[2]
        x = (R[0, 0] * a + R[0, 1] * b + R[0, 2] * c + t[0]) / z
        y = (R[1, 0] * a + R[1, 1] * b + R[1, 2] * c + t[1]) / z
        x0, x1, y0, y1 = min(x0, x), max(x1, x), min(y0, y), max(y1, y)
    return x0, x1, y0, y1


def random_view(rng: Generator, vertices: NDArray[np.float32], settings: Settings) -> Pose:
    """The pose and intrinsics of a virtual camera turned to the silhouette's centre, about."""
    azimuth = rng.uniform(0, 2 * np.pi)
    if rng.random() < settings.from_above:
        height = np.sin(np.radians(rng.uniform(0, settings.highest)))
    else:
        height = rng.uniform(-1, 1)
    flat = np.sqrt(1 - height * height)
    near, far = settings.distance
    distance = 1 / rng.uniform(1 / far, 1 / near)
    eye = distance * np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height])
    R = look_at(eye)
    x0, x1, y0, y1 = _extent(vertices, R, -R @ eye)
    side = max(x1 - x0, y1 - y0)
    aim = np.array([0.5 * (x0 + x1), 0.5 * (y0 + y1), 1.0])
    aim[:2] += settings.jitter * side * rng.uniform(-1, 1, 2)
    R = look_at(-R.T @ aim)
    t = -R @ eye
    # Nothing is cut off: the focal length follows from the side that reaches farthest from the image's centre.
    reach = max(np.abs(_extent(vertices, R, t)))
    focal = 0.5 * settings.size * rng.uniform(*settings.fill) / reach
    centre = 0.5 * (settings.size - 1)
    return R, t, np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1.0]])


@dataclass(frozen=True)
class Finish:
    """How the object's surface reflects: the same in all its views."""

    specular: float
    shininess: float
    metalness: float


def random_finish(rng: Generator) -> Finish:
    """Matt, satin, glossy or metal."""
    kind = rng.choice(4, p=(0.4, 0.3, 0.22, 0.08))
    specular = (rng.uniform(0, 0.05), rng.uniform(0.05, 0.25), rng.uniform(0.25, 0.8), rng.uniform(0.4, 0.9))[kind]
    shininess = float(np.exp(rng.uniform(np.log(6), np.log((20, 40, 200, 80)[kind]))))
    return Finish(float(specular), shininess, float(rng.uniform(0.5, 1) if kind == 3 else 0))


def random_lighting(rng: Generator, R_camera_object: NDArray[np.float64], finish: Finish) -> Lighting:
    """One to four lights around the object (most from above), or one at the camera, and light from the room."""
    up = R_camera_object[:, 2]
    directions, colours = [], []
    ambient = rng.uniform(0.08, 0.6)
    warm = rng.normal(0, 0.06)
    for i in range(rng.choice([1, 2, 3, 4], p=(0.4, 0.3, 0.2, 0.1))):
        direction = rng.normal(size=3)
        if rng.random() < 0.2:  # flash, or a window behind the photographer
            direction = np.array([0, 0, -1.0]) + rng.normal(0, 0.35, 3)
        elif rng.random() < 0.8 and direction @ up < 0:
            direction = direction - 2 * (direction @ up) * up
        directions.append(direction / max(float(np.linalg.norm(direction)), 1e-9))
        tint = 1 + rng.normal(0, 0.05, 3) + warm * np.array([1, 0, -1])
        colours.append(rng.uniform(0.25, 1.0) * (1 if i == 0 else 0.5) * tint)
    tint = np.clip(1 + rng.normal(0, 0.04, 3) - 0.5 * warm * np.array([1, 0, -1]), 0.5, 1.5)
    sky, ground = ambient * rng.uniform(0.9, 1.3) * tint, ambient * rng.uniform(0.4, 1.0) * tint
    # Exposure meters the scene: a white wall facing the main light comes out near white, give or take.
    brightest = float(np.mean(sky)) + float(np.mean(np.sum(colours, 0))) * 0.6
    exposure = float(np.exp(rng.normal(0, 0.2))) / max(brightest, 0.1)
    return Lighting(
        directions=np.asarray(directions, np.float32),
        colours=np.clip(np.asarray(colours, np.float32), 0, None),
        ambient_sky=tuple(sky),
        ambient_ground=tuple(ground),
        up=tuple(up),
        specular=finish.specular,
        shininess=finish.shininess,
        metalness=finish.metalness,
        exposure=exposure,
    )


def object_views(source: Source, settings: Settings) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16], Pose]]:
    """Yields (image (size, size, 4), depth (size, size) as in depth.npy, (R, t, K)) of every view of one object."""
    rng = np.random.default_rng([settings.seed, zlib.crc32(source.name.encode())])
    mesh = source.load()
    finish = random_finish(rng)
    # Lights may stay with the object (the camera walks around it), with the camera (the object is turned before it), or
    # be new each time. Were they always new, equal shading would be proof of an equal view, and it is not: a network
    # trained so takes a turned, plain object under steady light for one that has not moved.
    steady = rng.choice(3, p=(0.3, 0.4, 0.3))
    rig = random_lighting(np.random.default_rng(int(rng.integers(2**32))), np.eye(3), finish)
    # The rig is made with z up; a level camera has up along −y.
    level = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    used = mesh.vertices[np.unique(mesh.faces)]
    # Its own numbers, so that cameras and lights are the same with and without shadows.
    shade = np.random.default_rng([settings.seed, zlib.crc32(source.name.encode()), 1])
    around = None
    if shade.random() < settings.shadows:
        turn = Rotation.random(rng=shade).as_matrix()
        around = ShadowMaps.of(mesh, all_around(SURROUNDINGS) @ turn, AROUND_CELLS)
        if steady == 0:
            rig = shading(rig, mesh, np.eye(3), around, shade)
    for _ in range(source.view_count):
        R, t, K = random_view(rng, used, settings)
        if steady == 2:
            lighting = random_lighting(rng, R, finish)
        else:
            turn = R if steady == 0 else level
            directions = np.ascontiguousarray(rig.directions @ turn.T, np.float32)
            lighting = replace(rig, directions=directions, up=tuple(R[:, 2]))
        if around is not None and lighting.shadows is None:
            lighting = shading(lighting, mesh, R, around, shade)
        size = settings.size
        view = render(mesh, R, t, K, size, size, lighting=lighting, supersampling=settings.supersampling)
        depth = np.where(view.depth > 0, view.depth - np.float32(t[2]), np.float32(np.nan)).astype(np.float16)
        yield np.dstack([view.rgb, view.coverage]), depth, (R, t, K)


def shading(
    lighting: Lighting, mesh: Mesh, R_camera_object: NDArray[np.float64], around: ShadowMaps, rng: Generator
) -> Lighting:
    """The same light, as far as the object does not hide it from itself, from surroundings bright and dark.

    Args:
        lighting: with directions in camera axes.
        mesh: the object.
        R_camera_object: (3, 3).
        around: of the object.
        rng: source of all randomness.
    """
    evenness = np.exp(rng.uniform(np.log(0.3), np.log(10)))  # from a few windows in the dark to an overcast day
    patches = rng.gamma(evenness, 1 / evenness, len(around.directions)).astype(np.float32)
    shadows = around.for_lights(mesh, lighting.directions @ R_camera_object, SHADOW_CELLS)
    return replace(lighting, shadows=shadows, around=around, patches=patches / max(float(patches.mean()), 1e-6))


def _part_path(out: Path, chunk: int) -> Path:
    return out / "parts" / f"{chunk:05d}.npz"


def _render_chunk(out: str, chunk: int, sources: list[Source], settings: Settings) -> int:
    """Renders some objects into their rows of images.npy; their views go to a part file, written last."""
    images = np.load(Path(out) / "images.npy", mmap_mode="r+")
    depths = np.load(Path(out) / "depth.npy", mmap_mode="r+") if settings.depth else None
    poses = []
    for source in sources:
        for i, (image, depth, pose) in enumerate(object_views(source, settings)):
            images[source.first_view + i] = image
            if depths is not None:
                depths[source.first_view + i] = depth
            poses.append(pose)
    images.flush()
    if depths is not None:
        depths.flush()
    R, t, K = (np.asarray(values, np.float32) for values in zip(*poses, strict=True))
    path = _part_path(Path(out), chunk)
    unfinished = path.with_name(f"unfinished_{path.name}")
    np.savez(unfinished, R=R, t=t, K=K)
    os.replace(unfinished, path)
    return len(poses)


def build_cache(out: Path, settings: Settings, workers: int) -> None:
    """Renders what `out` does not hold yet, then writes views.npz and manifest.json."""
    sources = find_sources(settings)
    if not sources:
        raise SystemExit("nothing to render; give --meshes or --procedural")
    count = sum(source.view_count for source in sources)
    shape = (count, settings.size, settings.size, 4)
    plan = {"settings": asdict(settings), "object_count": len(sources), "view_count": count}
    plan = json.loads(json.dumps(plan))
    out.mkdir(parents=True, exist_ok=True)
    plan_path = out / "plan.json"
    if plan_path.exists() and json.loads(plan_path.read_text()) != plan:
        raise SystemExit(f"{out} holds a cache of other settings; give another --out or delete it")
    if not (out / "images.npy").exists():
        np.lib.format.open_memmap(out / "images.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    if settings.depth and not (out / "depth.npy").exists():
        np.lib.format.open_memmap(out / "depth.npy", mode="w+", dtype=np.float16, shape=shape[:3]).flush()
    plan_path.write_text(json.dumps(plan, indent=1))
    (out / "parts").mkdir(exist_ok=True)
    chunks = [sources[i : i + CHUNK] for i in range(0, len(sources), CHUNK)]
    missing = [i for i in range(len(chunks)) if not _part_path(out, i).exists()]
    _run(out, chunks, missing, settings, workers)

    parts = [np.load(_part_path(out, i)) for i in range(len(chunks))]
    np.savez(
        out / "views.npz",
        object_index=np.repeat(np.arange(len(sources), dtype=np.int32), [s.view_count for s in sources]),
        R_camera_object=np.concatenate([part["R"] for part in parts]),
        t_camera_object=np.concatenate([part["t"] for part in parts]),
        K=np.concatenate([part["K"] for part in parts]),
        first_view=np.array([s.first_view for s in sources], np.int64),
        view_count=np.array([s.view_count for s in sources], np.int64),
        asymmetry=np.array([s.asymmetry for s in sources], np.float32),
        procedural=np.array([s.path is None for s in sources]),
        names=np.array(json.dumps([s.name for s in sources])),
    )
    by_source: dict[str, int] = {}
    for source in sources:
        folder = source.name.split("/")[0]
        by_source[folder] = by_source.get(folder, 0) + 1
    objects = [
        {
            "name": s.name,
            "asymmetry": None if np.isnan(s.asymmetry) else s.asymmetry,
            "first_view": s.first_view,
            "view_count": s.view_count,
        }
        for s in sources
    ]
    manifest = {
        **plan,
        "image_shape": list(shape),
        "held_out": HELD_OUT.pattern,
        "objects_by_source": by_source,
        "objects": objects,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _run(out: Path, chunks: list[list[Source]], missing: list[int], settings: Settings, workers: int) -> None:
    """Renders the missing chunks in processes, with a bar that says how long it will take."""
    from rich import progress as bar  # here, so that a worker process starts without it

    views = sum(s.view_count for i in missing for s in chunks[i])
    parts = (bar.BarColumn(), bar.MofNCompleteColumn(), bar.TimeElapsedColumn(), bar.TimeRemainingColumn())
    started = time.monotonic()
    with bar.Progress(bar.TextColumn("rendering"), *parts) as progress, ProcessPoolExecutor(workers) as pool:
        task = progress.add_task("", total=views)
        jobs = [pool.submit(_render_chunk, str(out), i, chunks[i], settings) for i in missing]
        try:
            for job in as_completed(jobs):
                progress.advance(task, job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    took = time.monotonic() - started
    if views:
        print(f"{views} views in {took:.0f} s: {views / took:.0f} a second")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", help="folder of <source>/<object>.glb")
    parser.add_argument("--procedural", type=int, default=3000, help="number of procedural objects (%(default)s)")
    parser.add_argument(
        "--round", type=int, default=0, help="number of objects that look the same all round (%(default)s)"
    )
    parser.add_argument("--views", type=int, default=24, help="of each procedural object (%(default)s)")
    parser.add_argument("--mesh-views", type=int, default=64, help="of each mesh (%(default)s)")
    parser.add_argument("--mesh-variants", type=int, default=0, help="other objects made from each mesh (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--depth", action="store_true", help="keep depth too: correspondences are learned from it")
    parser.add_argument(
        "--shadows", type=float, default=0.75, help="share of objects that shade themselves (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    given = parser.parse_args(arguments)
    settings = Settings(
        given.meshes,
        given.procedural,
        given.views,
        given.mesh_views,
        given.size,
        given.seed,
        depth=given.depth,
        shadows=given.shadows,
        mesh_variants=given.mesh_variants,
        round_objects=given.round,
    )
    build_cache(given.out, settings, given.workers)


if __name__ == "__main__":
    main()
