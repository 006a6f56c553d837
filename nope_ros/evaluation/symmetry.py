"""Rotations of an object that no image tells apart, and errors modulo them.

A mesh's symmetry is found in two steps. Its surface points say which turns about its centroid map it onto itself, more
or less: candidates. Renders from all around then decide, since colour and print break symmetries that shape has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from nope_ros.frame import InputError
from nope_ros.rotations import exp, geodesic_distance, icosphere, log, look_at

if TYPE_CHECKING:  # renders need numba, which only those who train or evaluate meshes have
    from nope_ros.rendering.mesh import Mesh

Array = NDArray[np.float64]

TOLERANCE = 0.07
"""Largest difference of two renders that count as equal, as a share of the silhouette's area times full contrast.

Set by looking at renders side by side: turns that leave a plain screwdriver or a cake of soap as it was change 0.03 to
0.07; those that show another side of a print change 0.10 and more."""

_VERSION = 2
_ORDERS = (2, 3, 4, 5, 6)
# No n-fold symmetry of small n has these turns; an axis of revolution has.
_IRREGULAR = np.radians([23.0, 47.0, 101.0, 139.0])
_POINTS = 600
_LOOSE = 0.05  # of the radius: mean distance at which surface points still hint at a symmetry
_SIZE = 64
_SAME_AXIS = np.cos(np.radians(6.0))


@dataclass(frozen=True)
class Symmetry:
    """A group of rotations, object frame.

    Attributes:
        rotations: (N, 3, 3), finite part; the identity is among them.
        axis: (3,) of revolution, or None.
        sphere: whether every rotation looks the same.
    """

    rotations: Array
    axis: Array | None = None
    sphere: bool = False

    @property
    def trivial(self) -> bool:
        """Whether every rotation can be told."""
        return not self.sphere and self.axis is None and len(self.rotations) == 1

    def error(self, R_estimated: Array, R_true: Array) -> float:
        """Smallest angle (radians) between an estimated R_camera_object (3, 3) and the true one times any symmetry."""
        if self.sphere:
            return 0.0
        candidates = R_true @ self.rotations
        if self.axis is None:
            return float(geodesic_distance(candidates, R_estimated).min())
        # The best turn about the axis: where tr(turnᵀ M) = aᵀMa + cos·(tr M − aᵀMa) + sin·tr([a]ₓᵀ M) peaks.
        a = self.axis
        M = np.swapaxes(candidates, -1, -2) @ R_estimated
        along = np.einsum("i,nij,j->n", a, M, a)
        cosine = np.trace(M, axis1=1, axis2=2) - along
        sine = np.einsum("ij,nij->n", _cross_matrix(a), M)
        best = candidates @ exp(np.arctan2(sine, cosine)[:, None] * a)
        return float(geodesic_distance(best, R_estimated).min())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "rotations": log(self.rotations).tolist(),
            "axis": None if self.axis is None else self.axis.tolist(),
            "sphere": self.sphere,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Symmetry:
        """What ``to_dict`` gave."""
        axis = values["axis"]
        return cls(exp(np.array(values["rotations"])), None if axis is None else np.array(axis), bool(values["sphere"]))

    @classmethod
    def from_bop(cls, info: Mapping[str, Any]) -> Symmetry:
        """The entry of one object in a BOP ``models_info.json``."""
        discrete = [
            np.array(matrix, dtype=np.float64).reshape(4, 4)[:3, :3] for matrix in info.get("symmetries_discrete", [])
        ]
        axes = [np.array(one["axis"], dtype=np.float64) for one in info.get("symmetries_continuous", [])]
        axes = [axis / np.linalg.norm(axis) for axis in axes]
        # Two axes of revolution make every rotation.
        sphere = any(abs(axis @ axes[0]) < _SAME_AXIS for axis in axes[1:])
        return cls(np.stack([np.eye(3), *discrete]), axes[0] if axes else None, sphere)


NO_SYMMETRY = Symmetry(np.eye(3)[None])


def _cross_matrix(a: Array) -> Array:
    x, y, z = a
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])


class Comparer:
    """Tells by renders whether a turn about the centroid leaves a mesh looking the same."""

    def __init__(self, mesh: Mesh, centre: Array) -> None:
        from nope_ros.rendering.render import Lighting

        self.mesh = mesh
        self.centre = centre
        used = mesh.vertices[np.unique(mesh.faces)] - centre
        self.radius = float(np.linalg.norm(used, axis=1).max())
        # From all around, and none of them along an axis that meshes like to have.
        self.views = look_at(icosphere(1) @ exp(np.array([0.2, 0.3, 0.1])).T)
        # Light from the camera's side: shape shows in the shading, and turning the object does not turn the light.
        self.light = Lighting(specular=0.0)
        self.seen = [self._render(R) for R in self.views]

    def _render(self, R: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        from nope_ros.rendering.render import render

        distance = 4.0 * self.radius
        focal = 0.5 * _SIZE * np.sqrt(distance**2 - self.radius**2) / self.radius
        K = np.array([[focal, 0, _SIZE / 2 - 0.5], [0, focal, _SIZE / 2 - 0.5], [0, 0, 1.0]])
        t = np.array([0, 0, distance]) - R @ self.centre
        view = render(self.mesh, R, t, K, _SIZE, _SIZE, lighting=self.light)
        coverage = view.coverage.astype(np.float32) / 255
        # A shift of a pixel's fraction is no difference; print finer than this is lost in a crop as well.
        colour = cv2.GaussianBlur(view.rgb.astype(np.float32) / 255 * coverage[..., None], (0, 0), 1.0)
        return colour, cv2.GaussianBlur(coverage, (0, 0), 1.0)

    def difference(self, turn: Array, enough: float = np.inf) -> float:
        """Mean over the views of how much turning the mesh by ``turn`` (3, 3) changes its picture.

        Where one picture has the object and the other has not counts fully, colour by its contrast; the sum is
        relative to the silhouette's area. Stops early where the first views show more than twice ``enough``.
        """
        differences: list[float] = []
        for R, (colour, coverage) in zip(self.views, self.seen, strict=True):
            other_colour, other_coverage = self._render(R @ turn)
            outline = np.abs(coverage - other_coverage)
            changed = np.maximum(np.abs(colour - other_colour).max(axis=2), outline).sum()
            differences.append(float(changed / max(0.5 * (coverage + other_coverage).sum(), 1e-9)))
            if len(differences) >= 6 and np.mean(differences) > 2 * enough:
                break
        return float(np.mean(differences))


def find_symmetry(mesh: Mesh, tolerance: float = TOLERANCE) -> Symmetry:
    """The rotations under which renders of a mesh stay equal within ``tolerance``."""
    points, centre = _surface_points(mesh)
    spread = float(np.linalg.norm(points, axis=1).max())
    candidates = _candidate_axes(points, spread)
    comparer = Comparer(mesh, centre)

    def same(turn: Array) -> bool:
        return comparer.difference(turn, tolerance) <= tolerance

    revolution: list[Array] = []
    finite: list[Array] = []
    tried: list[Array] = []
    for axis, order in candidates:
        if any(abs(axis @ other) > _SAME_AXIS for other in revolution):
            continue
        turn = exp(axis * (2 * np.pi / order))
        if any(geodesic_distance(turn, other) < np.radians(8) for other in tried):
            continue
        tried.append(turn)
        if not same(turn):
            continue
        if np.mean([comparer.difference(exp(axis * angle), tolerance) for angle in _IRREGULAR]) <= tolerance:
            revolution.append(axis)
        finite += [exp(axis * (2 * np.pi * k / order)) for k in range(1, order)]
    if len(revolution) > 1:
        return Symmetry(np.eye(3)[None], None, sphere=True)
    if revolution:
        axis = revolution[0]
        # Of the finite ones only a turn that swaps the axis' ends adds anything.
        flips = [turn for turn in finite if axis @ turn @ axis < -0.9]
        return Symmetry(np.stack([np.eye(3), *flips[:1]]), axis)
    return Symmetry(_closed(finite))


def _surface_points(mesh: Mesh) -> tuple[Array, Array]:
    """Points (N, 3) spread over the surface, about its centroid (3,), which any symmetry keeps in place."""
    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    areas = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    centre: Array = (areas[:, None] * corners.mean(axis=1)).sum(axis=0) / areas.sum()
    rng = np.random.default_rng(0)
    faces = rng.choice(len(areas), 8 * _POINTS, p=areas / areas.sum())
    a, b = np.sort(rng.random((2, len(faces))), axis=0)
    weights = np.stack([a, b - a, 1 - b], axis=1)
    return np.einsum("nk,nki->ni", weights, corners[faces]) - centre, centre


def _candidate_axes(points: Array, spread: float) -> list[tuple[Array, int]]:
    """(axis, order) of turns that map the surface points onto themselves, more or less; best first."""
    from scipy.spatial import cKDTree

    tree = cKDTree(points)
    sample = points[:_POINTS]
    principal = np.linalg.svd(points, full_matrices=False)[2]
    sphere = icosphere(2)
    axes = np.concatenate([principal, np.eye(3), sphere[(sphere @ [0.011, 0.101, 1.0]) > 0]])
    found: list[tuple[float, Array, int]] = []
    for first, axis in enumerate(axes):
        for order in _ORDERS:
            turn = exp(axis * (2 * np.pi / order))
            distance = tree.query(sample @ turn.T)[0].mean() / spread
            if distance > 3 * _LOOSE:
                continue
            if first >= 6:  # an axis of the coarse sphere is some degrees off: let the points pull it into place
                turn, distance = _aligned(turn, sample, points, tree, spread)
                vector = log(turn)
                angle = float(np.linalg.norm(vector))
                if abs(angle - 2 * np.pi / order) > np.radians(6):
                    continue
                axis_here = vector / angle
            else:
                axis_here = axis
            if distance < _LOOSE:
                found.append((distance + 1e-3 * order, axis_here, order))
    found.sort(key=lambda one: one[0])
    return [(axis, order) for _, axis, order in found]


def _aligned(turn: Array, sample: Array, points: Array, tree: Any, spread: float) -> tuple[Array, float]:
    """Iterated closest points, rotation only: the turn (3, 3) near the given one that fits best, and its distance."""
    distance = np.inf
    for _ in range(8):
        moved = sample @ turn.T
        lengths, nearest = tree.query(moved)
        previous, distance = distance, float(lengths.mean() / spread)
        if previous - distance < 1e-4:
            break
        u, _, vt = np.linalg.svd(points[nearest].T @ sample)
        turn = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return turn, distance


def _closed(rotations: Sequence[Array], most: int = 60) -> Array:
    """The group (N, 3, 3) that rotations generate, near copies merged; an icosahedron's 60 are the most there are."""
    group = [np.eye(3)]
    fresh = list(rotations)
    while fresh and len(group) < most:
        candidate = fresh.pop(0)
        # Axes are found to a degree or two, which products add up; turns of one group are 60° apart or more.
        if geodesic_distance(np.stack(group), candidate).min() < np.radians(25):
            continue
        fresh += [candidate @ other for other in group] + [other @ candidate for other in group]
        group.append(candidate)
    return np.stack(group)


class SymmetryCache:
    """Symmetries of meshes in a JSON file, by content, as finding one takes seconds.

    Args:
        path: of the file; by default in the user's cache folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            path = Path(root) / "nope_ros" / "symmetry.json"
        self.path = path

    def find(self, mesh: Mesh) -> Symmetry:
        """The symmetry of a mesh, found now or before.

        Raises:
            InputError: if what was found cannot be kept.
        """
        key = _fingerprint(mesh)
        known = self._read()
        if key not in known:
            # Read again after the search: others may have written meanwhile.
            symmetry = find_symmetry(mesh).to_dict()
            known = {**self._read(), key: {"name": mesh.name, **symmetry}}
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
                unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
                os.replace(unfinished, self.path)
            except OSError as error:
                raise InputError(f"--cache: {self.path} cannot be written ({error.strerror}); name another") from None
        return Symmetry.from_dict(known[key])

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or cut short: it can be made again
            return {}
        return content if isinstance(content, dict) else {}


def _fingerprint(mesh: Mesh) -> str:
    digest = hashlib.sha1(f"{_VERSION} {TOLERANCE}".encode(), usedforsecurity=False)
    for part in (mesh.vertices, mesh.faces, mesh.uv, mesh.texture, mesh.colours):
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
