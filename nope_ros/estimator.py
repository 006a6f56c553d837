"""The walk of one frame, for library users: register an object from one image, estimate its pose in others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.crop import Crop, filled, virtual_crop
from nope_ros.depth import reference_depth
from nope_ros.distribution import RotationDistribution
from nope_ros.frame import Camera, Frame, InputError
from nope_ros.latent import Predictor, RotatedLatentPredictor, load_predictor
from nope_ros.match import Bank, HarmonicBank, ViewsBank, common_latents, predict_bank
from nope_ros.mesh import Progress, RenderedViews, read_mesh, render_views, view_rotations
from nope_ros.pose import PoseEstimate, ReferencePose, Sides, check_lengths, pose_estimate
from nope_ros.prior import Hypotheses, Prior, constrained, free_rotations, hypotheses, resolve, upright_rotations
from nope_ros.refine import DEFAULT_REFINEMENT, Query, Refinement, Refiner, Step, load_refiner, moved, steps
from nope_ros.settle import Settling
from nope_ros.stopwatch import stage
from nope_ros.video import KEYFRAMES, Keyframes, Plan, Pose, Scale, Walk, plan_keyframes, radius_by_depth

if TYPE_CHECKING:  # needs numba and trimesh, which whoever has no mesh can do without
    from nope_ros.rendering.mesh import Mesh

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RegisteredObject:
    """An object and what it will look like from everywhere.

    Attributes:
        object_id: its name.
        predictor: what predicts its templates.
        latent: (D,) of the reference view.
        reference: its pose at registration.
        R_virtual_camera: (3, 3) of the reference crop.
        gravity_virtual: (3,) gravity in the reference's virtual camera, or None if it was not known.
        thumbnail: (S, S, 3) uint8 RGB, the reference crop.
        mask: (S, S) uint8, of the reference crop.
        batch_size: templates predicted at a time.
        rendered: renders of the object's mesh, the reference among them, which take the place of predictions; or None.
        keyframes: all views it was registered from, the reference first; None if that is the only one. ``latent`` is
            then what all of them say together, as the reference would show it.
        depth: (n, n) float16 depth of the reference's surface behind the circle's centre, on a grid over its crop, in
            units of the circle's radius there; NaN where there is none. None if the reference had no depth.
    """

    object_id: str
    predictor: Predictor
    latent: Tensor
    reference: ReferencePose
    R_virtual_camera: Array
    gravity_virtual: Array | None
    thumbnail: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    batch_size: int = 1024
    rendered: RenderedViews | None = None
    keyframes: Keyframes | None = None
    depth: NDArray[np.float16] | None = None

    @property
    def gravity_known(self) -> bool:
        """Whether the priors that need gravity can be used."""
        return self.gravity_virtual is not None

    @property
    def metric(self) -> bool:
        """Whether translations are metres."""
        return self.reference.metric

    @property
    def depth_known(self) -> bool:
        """Whether it was measured how deep its parts lie, or follows from a mesh."""
        return self.rendered is not None or self.depth is not None

    @property
    def R_virtual_object(self) -> Array:
        """(3, 3) of the reference crop."""
        R: Array = self.R_virtual_camera @ self.reference.R_camera_object
        return R

    def allocentric(self, delta_R: Array, query: Query) -> Array:
        """Rotations delta_R (..., 3, 3), camera axes, as networks see them: between the two virtual cameras."""
        R_virtual: Array = query.crop.R_virtual_camera @ delta_R @ self.R_virtual_camera.T
        return R_virtual

    def egocentric(self, R_virtual: Array, query: Query) -> Array:
        """The way back: rotations (..., 3, 3) between the virtual cameras as delta_R, camera axes."""
        delta_R: Array = query.crop.R_virtual_camera.T @ R_virtual @ self.R_virtual_camera
        return delta_R

    @cached_property
    def free_bank(self) -> Bank:
        """Templates for any rotation; predicted when first asked for, as an object with gravity may never need them."""
        latent = self.latent
        one_view = self.keyframes is None and self.rendered is None
        if one_view and isinstance(self.predictor, RotatedLatentPredictor):
            latent = self.predictor.of_any_roll(self.latent, self.thumbnail, self.mask)
        return self.bank(free_rotations(), latent)

    @cached_property
    def upright_bank(self) -> Bank:
        """Templates for the viewpoints of an object that keeps its up axis."""
        if self.gravity_virtual is None:
            raise InputError(f"object '{self.object_id}' was registered without gravity")
        return self.bank(upright_rotations(self.gravity_virtual))

    def bank(self, rotations: Array, latent: Tensor | None = None) -> Bank:
        """What the object looks like at rotations (N, 3, 3) from the reference's virtual camera.

        Of one reference view, ``latent`` (D,) may take the place of its own.
        """
        if self.rendered is not None:
            return self.rendered.bank(self.predictor, rotations, self.R_virtual_object)
        if self.keyframes is None:
            return predict_bank(self.predictor, self.latent if latent is None else latent, rotations, self.batch_size)
        views = self.keyframes.R_virtual_object @ self.keyframes.R_virtual_object[0].T
        return predict_bank(
            self.predictor, self.keyframes.latents, rotations, self.batch_size, views, self.keyframes.normalised
        )

    @property
    def temperature(self) -> float:
        """Of the likelihood: the predictor's, and more where keyframes contradict each other."""
        return self.predictor.temperature * (1.0 if self.keyframes is None else self.keyframes.spread)

    def reference_at(self, delta_R: Array, query: Query) -> ReferencePose:
        """The reference for a query that sees the object turned by ``delta_R`` (3, 3), camera axes.

        With a mesh, or from a walk, its size and centre are known from every side; from one image, from that side only.
        """
        sides = self.sides
        if sides is None:
            return self.reference
        return sides.reference_at(int(sides.nearest(self._seen_as(delta_R, query)[None])[0]), self.reference)

    def _seen_as(self, delta_R: Array, query: Query) -> Array:
        """R_virtual_object (3, 3) of a query that sees the object turned by ``delta_R`` (3, 3), camera axes."""
        R_virtual_object: Array = query.crop.R_virtual_camera @ delta_R @ self.reference.R_camera_object
        return R_virtual_object

    @property
    def sides(self) -> Sides | None:
        """What is known of it from several sides: of its mesh, or of the walk around it; None of one reference view."""
        if self.rendered is not None:
            return self.rendered
        return None if self.keyframes is None else self.keyframes.sides

    def angle_from_known(self, delta_R: Array, query: Query) -> float:
        """Angle between the direction of view of a query and the nearest from which the object is known, radians.

        Arguments as of ``reference_at``.
        """
        known = self.R_virtual_object[None] if self.sides is None else self.sides.R
        return _least_angle(known, self._seen_as(delta_R, query))

    @property
    def template_count(self) -> int:
        """Templates predicted at registration."""
        return len(self.first_bank.rotations)

    @property
    def first_bank(self) -> Bank:
        """The templates that were predicted at registration."""
        return self.upright_bank if self.gravity_known else self.free_bank

    def templates(self, query: Query, prior: Prior) -> tuple[Hypotheses, Bank]:
        """The rotations that a prior allows for a query, and what the object looks like at them."""
        possible = hypotheses(prior, self.gravity_virtual, query.gravity_virtual)
        if prior == "free":
            return possible, self.free_bank
        if prior == "upright":
            return possible, self.upright_bank
        return possible, self.bank(possible.rotations)  # few, and other ones for each query's gravity

    def distribution(self, query: Query, prior: Prior) -> tuple[RotationDistribution, float]:
        """The distribution of delta_R in camera axes given a query; whether it is this object at all."""
        with stage("match"):
            possible, bank = self.templates(query, prior)
            match = bank.match(query.latent, self.temperature)
        with stage("pose"):
            return self._egocentric(query, prior, possible, match.log_likelihood), match.similarity

    def harmonics(self, query: Query, prior: Prior) -> Tensor | None:
        """What a query says of every rotation between the virtual cameras, as coefficients of ``flatten_d``.

        None where the log-likelihood is no such sum: with keyframes, renders, a predictor whose latent does not turn.
        """
        bank = self._any_bank(prior)
        return bank.harmonics(query.latent, self.temperature) if isinstance(bank, HarmonicBank) else None

    def harmonics_near(self, query: Query, prior: Prior, rotations: Array) -> Tensor | None:
        """The same (M, Σ(2l+1)²) near each of rotations (M, 3, 3), with keyframes too; see ``ViewsBank``."""
        bank = self._any_bank(prior)
        if not isinstance(bank, HarmonicBank | ViewsBank):
            return None
        return bank.harmonics_near(query.latent, self.temperature, rotations)

    def _any_bank(self, prior: Prior) -> Bank:
        """A bank by whose latents a prior's likelihood goes, whatever its rotations."""
        return self.free_bank if prior == "free" else self.first_bank

    def distribution_of(self, harmonics: Tensor, query: Query, prior: Prior) -> RotationDistribution:
        """As ``distribution``, where ``harmonics`` (Σ(2l+1)²,), as of ``harmonics``, are what is known."""
        possible, bank = self.templates(query, prior)
        assert isinstance(bank, HarmonicBank)
        return self._egocentric(query, prior, possible, bank.log_likelihood(harmonics))

    def _egocentric(
        self, query: Query, prior: Prior, possible: Hypotheses, log_likelihood: Array
    ) -> RotationDistribution:
        spread = self.predictor.errors.spread[prior]
        seen = RotationDistribution.from_log_likelihood(
            possible.rotations, log_likelihood, possible.log_weight, possible.spacing, spread
        )
        # From virtual cameras (allocentric) back to the real ones (egocentric).
        return seen.transformed(query.crop.R_virtual_camera.T, self.R_virtual_camera)

    def allowed(self, R_virtual: Array, query: Query, prior: Prior) -> Array:
        """The nearest delta_R (3, 3), camera axes, that a prior allows; R_virtual (3, 3) is between virtual cameras."""
        return self.egocentric(constrained(R_virtual, prior, self.gravity_virtual, query.gravity_virtual), query)

    def pose_in(
        self,
        query: Query,
        distribution: RotationDistribution,
        similarity: float,
        prior: Prior,
        seen: Array | None = None,
    ) -> PoseEstimate:
        """The pose that a distribution of delta_R in camera axes means in a query.

        Args:
            query: the frame.
            distribution: of it, maybe of those before it too.
            similarity: see ``PoseEstimate``.
            prior: the one used.
            seen: delta_R (3, 3) that says which side of the object is seen; None: that of the best mode.
        """
        if seen is None:
            seen = distribution.mode.R
        turned = self.angle_from_known(seen, query)
        if self.keyframes is not None and not self.keyframes.sized:  # how large it is from other sides is a guess
            turned = _least_angle(self.R_virtual_object[None], self._seen_as(seen, query))
        return pose_estimate(
            self.object_id,
            self.reference_at(seen, query),
            query.crop,
            distribution,
            similarity,
            prior,
            query.frame,
            turned=turned,
        )


def _least_angle(known: Array, R_virtual_object: Array) -> float:
    """The angle between a view's direction (3, 3) and the nearest of several (K, 3, 3), radians."""
    return float(np.arccos(np.clip((known[:, 2] @ R_virtual_object[2]).max(), -1, 1)))


class PoseEstimator:
    """Registers objects and estimates their poses. Calls may come from several threads.

    Example:
        >>> estimator = PoseEstimator.from_pretrained()
        >>> mug = estimator.register(image, mask, K, object_id="mug", reference_distance=0.6)
        >>> pose = estimator.estimate(next_image, next_mask, K, mug)
        >>> pose.R_camera_object, pose.t_camera_object, pose.confidence
    """

    def __init__(
        self, predictor: Predictor, batch_size: int = 1024, refinement: Refinement = DEFAULT_REFINEMENT
    ) -> None:
        self.predictor = predictor
        self.batch_size = batch_size
        self._last: RegisteredObject | None = None
        # A network is one set of buffers on one device: two encodings at once would only slow each other down.
        self._encoding = threading.Lock()
        self._refiners: dict[Step, Refiner] = {}
        self._loading = threading.Lock()
        self.refinement = refinement

    @property
    def refinement(self) -> Refinement:
        """What follows the templates: see ``nope_ros.refine``. May be changed at any time.

        Raises:
            InputError: when set to what is unknown.
            WeightsError: if its weights cannot be used.
        """
        return self._refinement

    @refinement.setter
    def refinement(self, refinement: Refinement) -> None:
        for step in steps(refinement):
            self._refiner(step)  # what is missing is said now, and no frame waits for it
        self._refinement: Refinement = refinement

    def _refiner(self, step: Step) -> Refiner:
        with self._loading:
            if step not in self._refiners:
                self._refiners[step] = load_refiner(step, self.predictor)
            return self._refiners[step]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        batch_size: int = 1024,
        refinement: Refinement = DEFAULT_REFINEMENT,
    ) -> PoseEstimator:
        """Load weights: the packaged ones, or a folder or cached hub name.

        Args:
            path: folder with config.json and model.safetensors, or ``organisation/name`` in the user's hub cache.
            device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
            batch_size: most templates predicted at a time, which bounds memory.
            refinement: what follows the templates: "none", "correspondence", "synthesis" or "both".

        Raises:
            WeightsError: if they are missing, damaged or of another version.
        """
        return cls(load_predictor(path, device=device), batch_size, refinement)

    @property
    def device(self) -> str:
        """Where the network runs."""
        return str(self.predictor.device)

    @property
    def model_name(self) -> str:
        """Name of the predictor."""
        return self.predictor.name

    def register(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.generic],
        K: Array | Camera,
        *,
        object_id: str = "object",
        depth: NDArray[np.generic] | None = None,
        reference_distance: float | None = None,
        object_diameter: float | None = None,
        R_camera_object: Array | None = None,
        t_camera_object: Array | None = None,
        gravity_camera: Array | None = None,
    ) -> RegisteredObject:
        """Register an object from one view.

        Args:
            image: (H, W, 3) uint8 RGB.
            mask: (H, W), anything above zero is the object.
            K: (3, 3) intrinsics of an undistorted image, or a Camera with distortion.
            object_id: its name.
            depth: (H, W) metres; gives metric scale.
            reference_distance: metres from the camera to the object's centre; gives metric scale.
            object_diameter: metres; gives metric scale.
            R_camera_object: (3, 3) the object frame's orientation in this view; the camera's own axes by default.
            t_camera_object: (3,) metres, the object frame's origin in this view; the object's centre by default.
            gravity_camera: (3,) direction of gravity (down) in camera axes; allows the priors that need it.

        Raises:
            InputError: naming what does not fit.
        """
        frame = Frame.from_arrays(image, mask, K, depth)
        return self.register_frame(
            frame,
            object_id=object_id,
            reference_distance=reference_distance,
            object_diameter=object_diameter,
            R_camera_object=R_camera_object,
            t_camera_object=t_camera_object,
            gravity_camera=gravity_camera,
        )

    def register_frame(
        self,
        frame: Frame,
        *,
        object_id: str = "object",
        reference_distance: float | None = None,
        object_diameter: float | None = None,
        R_camera_object: Array | None = None,
        t_camera_object: Array | None = None,
        gravity_camera: Array | None = None,
    ) -> RegisteredObject:
        """As ``register``, from a Frame."""
        gravity = checked_gravity(gravity_camera)
        crop = virtual_crop(frame, self.predictor.crop_size, gravity)
        reference = ReferencePose.from_crop(
            crop,
            frame,
            reference_distance=reference_distance,
            object_diameter=object_diameter,
            R_camera_object=R_camera_object,
            t_camera_object=t_camera_object,
        )
        registered = RegisteredObject(
            object_id=object_id,
            predictor=self.predictor,
            latent=self.encode([crop])[0],
            reference=reference,
            R_virtual_camera=crop.R_virtual_camera,
            gravity_virtual=None if gravity is None else crop.R_virtual_camera @ gravity,
            thumbnail=crop.image,
            mask=crop.mask,
            batch_size=self.batch_size,
            depth=reference_depth(frame, crop, reference),
        )
        return self._ready(registered)

    def register_mesh(
        self,
        mesh: str | Path | Mesh,
        *,
        object_id: str = "object",
        object_diameter: float | None = None,
        gravity_object: Array | None = None,
        progress: Progress | None = None,
    ) -> RegisteredObject:
        """Register an object from a mesh of it: templates are renders, and poses are of the mesh's frame, metric.

        Args:
            mesh: a file that trimesh reads, in metres; or what ``read_mesh`` makes of it.
            object_id: its name.
            object_diameter: metres; a file's mesh is scaled to it.
            gravity_object: (3,) direction of gravity (down) in the mesh's frame as the object stands; allows the priors
                that need it.
            progress: called with the number of views done and their total.

        Raises:
            InputError: naming what is wrong with the file, or with a length.
        """
        gravity = checked_gravity(gravity_object)
        if isinstance(mesh, str | Path):
            mesh = read_mesh(mesh, object_diameter=object_diameter)
        rotations = view_rotations(None if gravity is None else -gravity)
        views = render_views(mesh, rotations, self.predictor.crop_size, self.encode, gravity, progress)
        # The first view is the reference; its virtual camera is taken for the real one.
        distance, offset = float(views.distance[0]), views.offset_object[0]
        origin = np.array([0.0, 0.0, distance]) + views.R[0] @ offset
        registered = RegisteredObject(
            object_id=object_id,
            predictor=self.predictor,
            latent=views.latents[0],
            reference=ReferencePose(
                R_camera_object=views.R[0],
                t_camera_object=origin,
                distance=distance,
                angular_radius=float(views.angular_radius[0]),
                filled=filled(views.crops[0, ..., 3]),
                offset_object=offset,
                metric=True,
            ),
            R_virtual_camera=np.eye(3),
            gravity_virtual=None if gravity is None else views.R[0] @ gravity,
            thumbnail=np.ascontiguousarray(views.crops[0, ..., :3]),
            mask=np.ascontiguousarray(views.crops[0, ..., 3]),
            batch_size=self.batch_size,
            rendered=views,
        )
        return self._ready(registered)

    def register_views(
        self,
        frames: Sequence[Frame],
        *,
        poses: Sequence[Pose] | None = None,
        gravity_camera: Sequence[Array | None] | None = None,
        object_id: str = "object",
        keyframes: int = KEYFRAMES,
    ) -> RegisteredObject:
        """Register an object from a walk around it.

        Args:
            frames: in the order in which they were taken.
            poses: R_camera_fixed (3, 3) and t_camera_fixed (3,), metres, of each: x_camera = R x_fixed + t, where the
                object stands still in the fixed frame. Without them, rotations come from the images.
            gravity_camera: (3,) direction of gravity (down) in camera axes, of each frame, or None.
            object_id: its name.
            keyframes: how many to keep, at most.

        Raises:
            InputError: naming what does not fit.
        """
        for name, given in (("poses", poses), ("gravity_camera", gravity_camera)):
            if given is not None and len(given) != len(frames):
                raise InputError(f"{name}: {len(given)} given for {len(frames)} frames; give one for each frame")
        walk = Walk(self.predictor.crop_size)
        for index, frame in enumerate(frames):
            gravity = None if gravity_camera is None else checked_gravity(gravity_camera[index])
            walk.add(f"frame {index}", frame, gravity_camera=gravity, pose=None if poses is None else poses[index])
        return self.register_walk(walk, object_id=object_id, keyframes=keyframes)

    def register_walk(
        self,
        walk: Walk,
        *,
        object_id: str = "object",
        keyframes: int = KEYFRAMES,
        poses_metric: bool = True,
        reference_distance: float | None = None,
        object_diameter: float | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> RegisteredObject:
        """As ``register_views``, from frames collected one by one.

        Args:
            walk: the frames.
            object_id: its name.
            keyframes: how many to keep, at most.
            poses_metric: whether translations of the camera poses are metres; else one of the next two says.
            reference_distance: metres from the camera to the object's centre in the first frame that is used.
            object_diameter: metres.
            report: told what is being done.

        Raises:
            InputError: naming what does not fit.
        """
        plan = plan_keyframes(
            walk, self.encode, self.predictor, count=keyframes, poses_metric=poses_metric, report=report
        )
        reference, scale = _reference_of(plan, reference_distance, object_diameter)
        unit = float(np.linalg.norm(reference.t_camera_object) / np.linalg.norm(plan.t_camera_object))
        seen = plan.keyframes.sides
        assert seen is not None
        chosen = replace(
            plan.keyframes,
            hull=unit * plan.keyframes.hull,
            distance=unit * seen.distance,
            offset_object=unit * seen.offset_object,
            provenance=replace(plan.keyframes.provenance, scale=scale),
        )
        crop = plan.views[0].crop
        latent = chosen.latents[0]
        if isinstance(self.predictor, RotatedLatentPredictor):
            views = chosen.R_virtual_object @ chosen.R_virtual_object[0].T
            latent = common_latents(self.predictor, chosen.latents, views).mean(dim=0).flatten()
        registered = RegisteredObject(
            object_id=object_id,
            predictor=self.predictor,
            latent=latent,
            reference=reference,
            R_virtual_camera=crop.R_virtual_camera,
            gravity_virtual=-chosen.R_virtual_object[0, :, 2] if plan.gravity_known else None,
            thumbnail=crop.image,
            mask=crop.mask,
            batch_size=self.batch_size,
            keyframes=chosen,
        )
        report("predicting templates")
        return self._ready(registered)

    def _ready(self, registered: RegisteredObject) -> RegisteredObject:
        """With the templates that queries will ask for first; from now on the default of ``estimate``."""
        _ = registered.first_bank
        self._last = registered
        return registered

    def estimate(
        self,
        image: NDArray[np.uint8],
        mask: NDArray[np.generic],
        K: Array | Camera,
        registered: RegisteredObject | None = None,
        *,
        depth: NDArray[np.generic] | None = None,
        prior: Prior | None = None,
        gravity_camera: Array | None = None,
    ) -> PoseEstimate:
        """Estimate an object's pose in one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            mask: (H, W), anything above zero is the object.
            K: (3, 3) intrinsics of an undistorted image, or a Camera with distortion.
            registered: the object; the one registered last by default.
            depth: (H, W) metres; gives the distance of an object whose scale is known.
            prior: what to assume (see ``nope_ros.prior``); by default the strongest that gravity allows.
            gravity_camera: (3,) direction of gravity (down) in camera axes.

        Raises:
            InputError: naming what does not fit.
        """
        registered = registered or self._last
        if registered is None:
            raise InputError("no object is registered; call register() first")
        frame = Frame.from_arrays(image, mask, K, depth)
        return self.estimate_frame(frame, [registered], prior=prior, gravity_camera=gravity_camera)[0]

    def estimate_frame(
        self,
        frame: Frame,
        objects: Sequence[RegisteredObject],
        *,
        prior: Prior | None = None,
        gravity_camera: Array | None = None,
    ) -> list[PoseEstimate]:
        """The pose each of several objects would have in this frame, the frame being encoded once."""
        query = self.look(frame, gravity_camera)
        return [self.refine(query, registered, self.match(query, registered, prior)) for registered in objects]

    # The three steps of an estimate, for callers that decide between objects before the dearest one.

    def look(self, frame: Frame, gravity_camera: Array | None = None) -> Query:
        """Crop and encode a frame; ``gravity_camera`` as in ``estimate``."""
        gravity = checked_gravity(gravity_camera)
        with stage("crop"):
            crop = virtual_crop(frame, self.predictor.crop_size, gravity)
        gravity_virtual = None if gravity is None else crop.R_virtual_camera @ gravity
        return Query(frame, crop, self.encode([crop])[0], gravity_virtual)

    def similarities(self, query: Query, objects: Sequence[RegisteredObject]) -> list[float]:
        """Whether a query is of each object at all, as ``PoseEstimate.similarity``, at a fraction of a pose's cost."""
        with stage("match"):
            return [registered.first_bank.similarity(query.latent) for registered in objects]

    def match(self, query: Query, registered: RegisteredObject, prior: Prior | None = None) -> PoseEstimate:
        """The pose that the templates give; ``prior`` as in ``estimate``."""
        used = resolve(prior, registered.gravity_known, query.gravity_virtual is not None)
        distribution, similarity = registered.distribution(query, used)
        with stage("pose"):
            return registered.pose_in(query, distribution, similarity, used)

    def refine(
        self,
        query: Query,
        registered: RegisteredObject,
        estimate: PoseEstimate,
        refinement: Refinement | None = None,
    ) -> PoseEstimate:
        """The same pose, finer; ``refinement`` in place of the estimator's own, if it is given.

        Where depth was measured of both, refiners only propose: the pose whose surfaces fit best is taken.
        """
        chosen = [self._refiner(step) for step in steps(refinement or self.refinement)]
        if not chosen:
            return estimate
        with stage("refine"):
            if (settled := Settling.of(query, registered)) is not None:
                proposed = [one for refiner in chosen for one in refiner.proposals(query, registered, estimate)]
                return settled.best(estimate, proposed)
            for refiner in chosen:
                refined = refiner.refine(query, registered, estimate)
                if refined is not None:
                    reference = registered.reference_at(estimate.delta_R, query)
                    estimate = moved(estimate, refined, reference)
        return estimate

    def encode(self, crops: Sequence[Crop]) -> Tensor:
        """Latents (B, D) of crops."""
        with self._encoding, stage("encode"), torch.inference_mode():
            return self.predictor.encode(crops)


def _reference_of(
    plan: Plan, reference_distance: float | None, object_diameter: float | None
) -> tuple[ReferencePose, Scale]:
    """The object in the first keyframe, and what made its lengths metres."""
    check_lengths(reference_distance=reference_distance, object_diameter=object_diameter)
    crop = plan.views[0].crop
    axis = crop.R_virtual_camera[2]
    t, radius = plan.t_camera_object, plan.radius
    distance = float(axis @ t)
    factor, scale = 1.0, plan.keyframes.provenance.scale
    if scale != "poses":
        if reference_distance is not None:
            factor, scale = reference_distance / distance, "reference_distance"
        elif object_diameter is not None:
            factor, scale = object_diameter / (2 * radius), "object_diameter"
        elif (by_depth := radius_by_depth(plan.views)) is not None:
            factor, scale = by_depth / radius, "depth"
        else:  # no metres: the first distance is the unit, as elsewhere
            factor = 1 / distance
    pose = ReferencePose(
        R_camera_object=plan.R_camera_object,
        t_camera_object=factor * t,
        distance=factor * distance,
        angular_radius=radius / distance,
        filled=crop.filled,
        offset_object=np.zeros(3),
        metric=scale != "unknown",
    )
    return pose, scale


def checked_gravity(gravity_camera: Array | None) -> Array | None:
    """Gravity as a unit vector, or None.

    Raises:
        InputError: if it is not three finite numbers, or zero.
    """
    if gravity_camera is None:
        return None
    gravity = np.asarray(gravity_camera, dtype=np.float64)
    length = float(np.linalg.norm(gravity))
    if gravity.shape != (3,) or not np.isfinite(length) or length < 1e-6:
        raise InputError(f"gravity_camera: {gravity_camera} is not a direction; give 3 numbers pointing down, or None")
    return gravity / length
