"""Where depth was measured of object and query: which pose brings their surfaces together.

Refiners that look at colours only propose. From each proposal, and from the templates' own answer, what the query shows
is slid onto what is known of the object's surface (``nope_ros.depth.slide``): the reference's own depth, or renders of
the mesh. The pose at whose end least is left between the surfaces is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nope_ros.crop import FILL
from nope_ros.depth import Model, Slid, normals_of, slide
from nope_ros.pose import PoseEstimate, ReferencePose
from nope_ros.refine import Query, Refined, moved, over_modes
from nope_ros.rotations import geodesic_distance

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject

Array = NDArray[np.float64]

# Renders of a mesh that make its surface.
_VIEWS = 4
# The most that surfaces which belong together are apart: of the radius, and of the noise of a depth camera (metres at a
# metre). A reference's surface has noise, too.
_SLACK, _NOISE = 0.04, 0.0025
# A proposal is taken in place of the templates' answer if so much less is left between the surfaces.
_BETTER = 0.7
# How far each point of the surfaces misleads, radii: far more than it errs, since points that lie together err alike.
_SURFACE_SIGMA = 0.03
# Least share of what the query shows that has to have a partner on the object's surface; of a proposal, more.
_OVERLAP, _OVERLAP_PROPOSED = 0.3, 0.5
# A proposal farther than this from the templates' answer is of another mode, which the surface of one view easily fits.
_FARTHEST = np.radians(45)


@dataclass(frozen=True)
class Settling:
    """A query and an object whose surfaces are known.

    Attributes:
        query: with depth.
        registered: with depth or a mesh, metric.
        seen: (N, 3) points of the query, camera axes, metres.
        normals: (N, 3) of them.
    """

    query: Query
    registered: RegisteredObject
    seen: Array
    normals: Array

    @classmethod
    def of(cls, query: Query, registered: RegisteredObject) -> Settling | None:
        """None if one of the two has no depth."""
        if not registered.depth_known or not registered.metric or query.surface is None:
            return None
        R_camera_virtual = query.crop.R_virtual_camera.T
        every_other = np.s_[::2, ::2]
        points, normals = (grid[every_other].reshape(-1, 3) for grid in (query.surface, normals_of(query.surface)))
        return cls(query, registered, points @ R_camera_virtual.T, normals @ R_camera_virtual.T)

    def best(self, estimate: PoseEstimate, proposed: Sequence[Refined]) -> PoseEstimate:
        """The estimate, or what was proposed in its place, slid to where the surfaces fit.

        Of thin objects there are too few points to slide; then the first proposal from depth stands as it is.
        """
        first = self.slid(estimate)
        best, pose = first, estimate
        limit = _BETTER * (1.0 if first is None else first.after)  # where nothing has a partner, the cost is one
        for refined in proposed:
            candidate = moved(estimate, refined, self._reference(estimate))
            turned = geodesic_distance(candidate.R_camera_object, estimate.R_camera_object)
            if self.registered.rendered is None and turned > _FARTHEST:
                continue
            slid = self.slid(candidate)
            if slid is not None and slid.after < limit and slid.overlap > _OVERLAP_PROPOSED:
                best, pose, limit = slid, candidate, slid.after
        if best is not None:
            return self.settled(pose, best)
        in_depth = next((refined for refined in proposed if refined.stage == "depth"), None)
        return estimate if in_depth is None else moved(estimate, in_depth, self._reference(estimate))

    def slid(self, estimate: PoseEstimate) -> Slid | None:
        """Where an estimate ends, or None if its surfaces are too far apart or too small to say."""
        R, R_virtual = estimate.R_camera_object, self.query.crop.R_virtual_camera
        model = model_of(self.registered, R_virtual @ R)
        if model is None:
            return None
        axis = None
        if estimate.prior == "standing" and self.query.gravity_virtual is not None:
            axis = R_virtual.T @ self.query.gravity_virtual
        centre = estimate.centre
        noise = _NOISE * float(centre @ centre) / model.radius
        tolerance = float(np.hypot(_SLACK, noise))
        slid = slide(
            self.seen, self.normals, model, R, estimate.t_camera_object, centre, tolerance=tolerance, axis=axis
        )
        return None if slid is None or slid.overlap < _OVERLAP else slid

    def settled(self, estimate: PoseEstimate, slid: Slid) -> PoseEstimate:
        """The estimate, where it ended."""
        reference = self._reference(estimate)
        R_virtual = self.registered.allocentric(slid.R @ estimate.R_camera_object.T @ estimate.delta_R, self.query)
        delta_R = self.registered.allowed(R_virtual, self.query, estimate.prior)
        found = estimate.delta_modes
        modes = (replace(found[0], R=delta_R), *found[1:])
        centre = slid.t - slid.R @ reference.offset_object
        radius = reference.radius
        # What the estimate knew is sharpened by what the surfaces say; where they leave a turn open, it stays as wide.
        before = np.zeros((6, 6))
        least = 1e-6 * np.eye(3)  # what a prior excludes has no spread
        before[:3, :3] = np.linalg.inv(estimate.covariance[3:, 3:] + least)
        before[3:, 3:] = np.linalg.inv(estimate.centre_covariance / radius**2 + least)
        after = np.linalg.inv(before + slid.information / _SURFACE_SIGMA**2).astype(np.float64)
        rotation = over_modes(estimate.distribution, modes[0], after[:3, :3])
        likely = modes[0].probability  # or another side was slid onto this one's surface
        at = likely * radius**2 * after[3:, 3:] + (1 - likely) * estimate.centre_covariance
        refined = Refined("surface", modes, rotation, centre, at)
        return moved(estimate, refined, reference)

    def _reference(self, estimate: PoseEstimate) -> ReferencePose:
        return self.registered.reference_at(estimate.delta_R, self.query)


def model_of(registered: RegisteredObject, R_virtual_object: Array) -> Model | None:
    """What is known of an object's surface from a side; None if its depth was never seen.

    Args:
        registered: the object.
        R_virtual_object: (3, 3) of the camera that looks at it.
    """
    rendered, reference = registered.rendered, registered.reference
    views: list[tuple[NDArray[np.float16], Array, ReferencePose]] = []
    if rendered is not None:
        nearest = np.argsort(-rendered.R[:, 2] @ R_virtual_object[2])[:_VIEWS]
        views = [(rendered.depth[v], rendered.R[v], rendered.reference_at(int(v), reference)) for v in nearest]
    elif registered.depth is not None:
        views = [(registered.depth, registered.R_virtual_object, reference)]
    points, normals = np.zeros((0, 3)), np.zeros((0, 3))
    for z, R, seen in views:
        along = ((np.arange(len(z)) + 0.5) / len(z) * 2 - 1) / FILL * seen.angular_radius
        y, x = np.meshgrid(along, along, indexing="ij")
        depth = seen.distance * (1 + seen.angular_radius * z.astype(np.float64))
        surface = np.stack([x, y, np.ones_like(x)], axis=-1) * depth[..., None]
        normal = normals_of(surface)
        known = np.isfinite(normal).all(-1)
        # From the camera to the circle's centre, and on to the object's origin.
        points = np.concatenate([points, (surface[known] - [0.0, 0.0, seen.distance]) @ R - seen.offset_object])
        normals = np.concatenate([normals, normal[known] @ R])
    return Model(points, normals, reference.radius) if len(points) else None
