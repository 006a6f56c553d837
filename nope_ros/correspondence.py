"""The refiner that looks where each part of the reference is seen: ``refinement: correspondence``.

Of one image the depth of its parts is predicted; of a mesh it is known, and the reference is the render that is nearest
to what the templates found. The network is ``nope_ros.models.correspondence``.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from scipy.spatial.transform import Rotation
from torch import Tensor

from nope_ros.crop import rolled
from nope_ros.depth import Fit, fit, sampled
from nope_ros.distribution import Mode, RotationDistribution
from nope_ros.latent import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    WeightsError,
    crops_to_tensor,
    fastest_dtype,
    known_fields,
    load_state,
    read_state,
    resolve_device,
)
from nope_ros.models.correspondence import (
    CorrespondenceConfig,
    CorrespondenceNetwork,
    RelativePose,
    Step,
    Views,
    directions,
)
from nope_ros.pose import (
    Measured,
    PoseEstimate,
    ReferencePose,
    Stage,
    outline_sigma,
    projective_distance,
    rotation_covariance,
)
from nope_ros.prior import PRIORS, Prior, constrained
from nope_ros.refine import Refined, over_modes, weighed
from nope_ros.rotations import exp, geodesic_distance, twist

if TYPE_CHECKING:
    from nope_ros.estimator import RegisteredObject
    from nope_ros.refine import Query

Array = NDArray[np.float64]

CORRESPONDENCE_WEIGHTS = Path(__file__).parent / "weights" / "correspondence"
_FORMAT_VERSION = 3
_CACHED_VIEWS = 256
# Of the direction of gravity, where it takes a turn out of the rotation's errors; radians.
_GRAVITY_SIGMA = np.radians(2.0)
# Hypotheses whose rolls differ by less look at one image, as in training; radians.
_SAME_ROLL = np.radians(6.0)
# Of the best mode's probability; modes with less are not tried.
_LEAST_SHARE = 0.1
_STAGES: tuple[Literal["affine", "offsets"], ...] = ("affine", "offsets")
# A fit in depth: how near to each other points are that agree, in radii.
_TOLERANCE = 0.12


class Trust(BaseModel):
    """How far to believe the network.

    Its pose and the templates' are two measurements of one thing, and the answer is their mean, each weighed by its
    precision: the rotation by the network's expected error and by the width of the templates' mode, the place by what
    matches and what outlines err.

    Attributes:
        spread: standard deviation of its rotation's error about each axis, relative to the error that it expects; by
            what is known of gravity. Without it, two views alone hardly tell how far a part turned from how deep it
            lies.
        hypotheses: most modes of the templates that are tried.
        first_steps: looks at each of them, before the best goes on.
        steps: looks at the best.
        support: what the network's log odds of a mode being right count beside the log of its probability: below one,
            as templates and network err alike.
        from_near: what a mode that looks from near the reference has to do without (log of its probability, times the
            cosine of the angle between the directions of view): in training, such hypotheses are right more often.
        placed: standard deviation of the object's centre by the matches, relative to its distance; that by its outline
            counts beside it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spread: dict[Prior, Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: dict.fromkeys(PRIORS, 1.0))
    hypotheses: int = Field(default=4, ge=1, le=16)
    first_steps: int = Field(default=3, ge=1, le=16)
    steps: int = Field(default=8, ge=1, le=32)
    support: float = Field(default=0.5, ge=0)
    from_near: float = Field(default=0.0, ge=0)
    placed: float = Field(default=0.03, gt=0)


class CorrespondenceWeights(BaseModel):
    """What ``config.json`` holds.

    Attributes:
        refiner: which class reads the weights.
        format_version: layout of this file and of the weights.
        network: sizes, see ``CorrespondenceConfig``.
        with_mesh: how far to believe the network where depth is known, as of a mesh.
        with_depth: the same where a depth camera saw the reference, so that it is known of one side only.
        with_image: and where it is predicted.
        with_walk: the same, where a walk showed the object from many sides, the nearest of which is compared. All are
            fitted on held-out objects of the training side, unless the model card says otherwise.
        licence: of the weights, an SPDX identifier.
        training: how they came about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    refiner: str = "correspondence"
    format_version: int = Field(default=_FORMAT_VERSION, ge=1)
    network: dict[str, Any]
    with_mesh: Trust = Trust()
    with_depth: Trust = Trust(hypotheses=1, first_steps=1)
    with_image: Trust = Trust(first_steps=1, steps=1)
    with_walk: Trust = Trust(hypotheses=1)
    licence: str = "Apache-2.0"
    training: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Matches:
    """Where the points of a view are seen in the query.

    Attributes:
        points: (N, 3) from the centre of the view's circle, axes of the view's virtual camera, in the pose's unit.
        places: (N, 2) image coordinates in the query's crop, in units of its circle.
        weights: (N,) not negative.
        R_view: (3, 3) from the reference's virtual camera to the view's.
    """

    points: Array
    places: Array
    weights: Array
    R_view: Array


@dataclass(frozen=True)
class Look:
    """What the network says of the best of some hypotheses, and the answers that may be made of it.

    Attributes:
        query: the image.
        registered: the object.
        estimate: whose modes the hypotheses are.
        trust: how far to believe the network.
        distribution: of the estimate, weighed by what was seen of its modes.
        modes: all of the estimate's in the order of their probabilities, which are new; the best first.
        tried: those that were compared, with the probabilities that they had.
        support: of each of these.
        turned: of each of these, the angle between the directions of view of query and reference, radians.
        reference: the object's, with the size and centre that it has in the view that was compared.
        R: (3, 3) from the reference's virtual camera to the query's, after the last step.
        affine_R: (3, 3) the same after what a 2D affine can say.
        centre_virtual: (3,) the reference's centre in the query's virtual camera, in the pose's unit of length.
        affine_centre_virtual: (3,) the same after what a 2D affine can say.
        sigma: expected error of R, radians.
        matches: that these followed from.
    """

    query: Query
    registered: RegisteredObject
    estimate: PoseEstimate
    trust: Trust
    distribution: RotationDistribution
    modes: tuple[Mode, ...]
    tried: tuple[Mode, ...]
    support: tuple[float, ...]
    turned: tuple[float, ...]
    reference: ReferencePose
    R: Array
    affine_R: Array
    centre_virtual: Array
    affine_centre_virtual: Array
    sigma: float
    matches: Matches

    def answer(self) -> Refined:
        """What was found and what the templates had found before, each as far as it is to be believed."""
        query, registered, prior = self.query, self.registered, self.estimate.prior
        best, seen = self.modes[0], self.distribution
        R = registered.allowed(self.R, query, prior)
        if self._known_already:
            delta_R, covariance = best.R, rotation_covariance(seen, best.R)
        else:
            believed = Measured(R, self._covariance(self._believed_sigma))
            together = weighed(query, registered, prior, seen, best.R, believed)
            delta_R = together.R
            covariance = seen.spread * over_modes(seen, Mode(delta_R, best.probability), together.covariance)
        refined = self._refined("offsets", delta_R, self._placed(self.centre_virtual), covariance)
        return replace(refined, matched=Measured(R, self._covariance(self.sigma)))

    def alone(self, stage: Literal["affine", "offsets"]) -> Refined:
        """What one stage found, as far as the prior allows it, and its rotation as if it were certain."""
        if stage == "affine":  # the viewing direction, which is most of it, is the templates'
            return self._certain(stage, self.affine_R, self._placed(self.affine_centre_virtual), None)
        within = self._covariance(self._believed_sigma)
        return self._certain(stage, self.R, self._placed(self.centre_virtual), within)

    def fitted(self) -> Fit | None:
        """Umeyama's fit of the matched points to where the query's depth has them, or None without depth.

        From the axes of the view to those of the query's virtual camera, in metres.
        """
        query, registered, matches = self.query, self.registered, self.matches
        if query.surface is None or not registered.depth_known:
            return None
        y = sampled(query.surface, matches.places, query.crop.angular_radius)
        aligned, axis = np.eye(3), None
        if self.estimate.prior == "standing" and registered.gravity_virtual is not None:
            axis = query.gravity_virtual
            aligned = constrained(aligned, "standing", matches.R_view @ registered.gravity_virtual, axis)
        R = self.R @ matches.R_view.T @ aligned.T
        fitted = fit(
            matches.points @ aligned.T,
            y,
            matches.weights,
            _TOLERANCE * self.reference.radius,
            np.random.default_rng(0),
            axis=axis,
            start=(R, self.centre_virtual),
        )
        return None if fitted is None else replace(fitted, R=fitted.R @ aligned)

    def answer_in_depth(self, fitted: Fit) -> Refined:
        """The pose of a fit in depth, as far as the prior allows it."""
        centre = self.query.crop.R_virtual_camera.T @ fitted.t
        return self._certain("depth", fitted.R @ self.matches.R_view, centre, self._covariance(self._believed_sigma))

    def shifted(self) -> Refined:
        """The estimate's rotation, and the object where the query's depth has the matched points."""
        query, matches, delta_R = self.query, self.matches, self.estimate.delta_R
        assert query.surface is not None
        R = self.registered.allocentric(delta_R, query)
        y = sampled(query.surface, matches.places, query.crop.angular_radius)
        apart = y - matches.points @ (R @ matches.R_view.T).T
        known = np.isfinite(apart).all(-1) & (matches.weights > 0)
        centre = np.median(apart[known], axis=0)
        # The rotation is the estimate's, and so is its mode, whichever was chosen from the image.
        own = min(self.modes, key=lambda mode: float(geodesic_distance(mode.R, delta_R)))
        of_own = replace(self, modes=(own, *(mode for mode in self.modes if mode is not own)))
        return of_own._certain("depth", R, query.crop.R_virtual_camera.T @ centre, None)

    @property
    def _known_already(self) -> bool:
        """Whether the rotation is: many frames say more of it than one comparison with one image does."""
        return self.estimate.tracked and self.registered.rendered is None

    @property
    def _believed_sigma(self) -> float:
        """Standard deviation of R's error about each axis, radians, as far as the network is believed."""
        return self.trust.spread[self.estimate.prior] * self.sigma

    def _covariance(self, sigma: float) -> Array:
        """Of a rotation (3, 3) whose standard deviation about each axis is ``sigma``, radians."""
        if self.estimate.prior == "standing" and self.query.gravity_virtual is not None:
            axis = self.query.crop.R_virtual_camera.T @ self.query.gravity_virtual
            covariance: Array = sigma**2 * np.outer(axis, axis) + _GRAVITY_SIGMA**2 * np.eye(3)
            return covariance
        return sigma**2 * np.eye(3)

    def _certain(self, stage: Stage, R: Array, centre: Array, within: Array | None) -> Refined:
        """A rotation R (3, 3) between virtual cameras that is not weighed against the templates'.

        ``centre`` is the view's, camera axes; ``within`` the covariance of R if its mode is the right one, or None: as
        wide as the distribution around the mode.
        """
        best, seen = self.modes[0], self.distribution
        delta_R = self.registered.allowed(R, self.query, self.estimate.prior)
        if self._known_already:
            delta_R, within = best.R, None
        if within is None:
            covariance = rotation_covariance(seen, best.R)
        else:
            covariance = over_modes(seen, Mode(delta_R, best.probability), within)
        return self._refined(stage, delta_R, centre, covariance)

    def _placed(self, centre_virtual: Array) -> Array:
        """The view's centre (3,), as matches and as the outline have it, each as far as it is to be trusted."""
        crop = self.query.crop
        matched = crop.R_virtual_camera.T @ centre_virtual
        outlined = projective_distance(self.reference, crop) * crop.R_virtual_camera[2]
        turned = self.registered.angle_from_known(self.modes[0].R, self.query)
        apart = outline_sigma(self.reference, crop, turned) ** 2
        together: Array = outlined + apart / (apart + self.trust.placed**2) * (matched - outlined)
        return together

    def _refined(self, stage: Stage, delta_R: Array, centre: Array, covariance: Array) -> Refined:
        """With a rotation (3, 3), the covariance of it (3, 3) and the view's centre (3,), camera axes."""
        best, *others = self.modes
        # From the centre of the view that was compared to that of the estimate's; each side has its own.
        asked = self.registered.reference_at(self.estimate.delta_R, self.query)
        between = delta_R @ asked.R_camera_object @ (self.reference.offset_object - asked.offset_object)
        return Refined(
            stage=stage,
            modes=(Mode(delta_R, best.probability), *others),
            rotation_covariance=covariance,
            centre=centre + between,
            distribution=self.distribution,
        )


@dataclass(frozen=True)
class _Hypothesis:
    """A mode, and the view it is compared with.

    Attributes:
        mode: of the templates.
        R_view: (3, 3) from the reference's virtual camera to the view's.
        reference: the object's, with the size and centre that it has in the view.
        views: the view.
        depth: (1, N) of its points if it is known.
        roll: of the query, that aligns it with the view.
        R: (3, 3) from the view to the query so rolled.
    """

    mode: Mode
    R_view: Array
    reference: ReferencePose
    views: Views
    depth: Tensor | None
    roll: float
    R: Array

    def matches(self, step: Step) -> Matches:
        """Of the only pair of a step."""
        points, targets = step.points[0].double().cpu().numpy(), step.targets[0].double().cpu().numpy()
        unroll = exp(np.array([0.0, 0.0, self.roll]))[:2, :2]
        weights = step.log_weights[0, :, 0].exp().double().cpu().numpy()
        return Matches(points * self.reference.radius, targets[:, :2] @ unroll.T, weights, self.R_view)

    def back(self, pose: RelativePose, rho: float) -> tuple[Array, Array]:
        """The only pair's pose as R and centre_virtual of a ``Look``; ``rho`` is the query's."""
        unroll = exp(np.array([0.0, 0.0, self.roll]))
        x, y = pose.shift[0].double().cpu().numpy()
        z = float(torch.exp(-pose.log_scale[0])) / rho
        # A product of rotations in single precision is one to six digits.
        turn = Rotation.from_matrix(pose.R[0].double().cpu().numpy()).as_matrix()
        return unroll @ turn @ self.R_view, unroll @ np.array([x, y, z]) * self.reference.radius


class CorrespondenceRefiner:
    """See the module. Calls may come from several threads.

    Args:
        network: with its weights.
        weights: what is stored beside them.
        device: "auto", or a device.
    """

    def __init__(
        self, network: CorrespondenceNetwork, weights: CorrespondenceWeights, device: str | torch.device = "auto"
    ) -> None:
        self.device = resolve_device(device)
        self.weights = weights
        self.network = network.eval().requires_grad_(False).to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = fastest_dtype(self.device)
        self._views: OrderedDict[tuple[int, int], _Cached] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None, device: str | torch.device = "auto") -> Self:
        """Read weights; the packaged ones by default.

        Raises:
            WeightsError: if they are missing or damaged.
        """
        folder = CORRESPONDENCE_WEIGHTS if folder is None else Path(folder)
        path = folder / CONFIG_FILE
        try:
            weights = CorrespondenceWeights.model_validate_json(path.read_text(encoding="utf-8"))
            sizes = TypeAdapter(CorrespondenceConfig).validate_python(
                known_fields(CorrespondenceConfig, weights.network)
            )
        except OSError as error:
            raise WeightsError(
                f"weights: {path} cannot be read ({error.strerror}); install the package again"
            ) from None
        except (ValidationError, ValueError) as error:
            raise WeightsError(f"weights: {path} is wrong: {error}") from None
        if weights.refiner != "correspondence" or weights.format_version != _FORMAT_VERSION:
            raise WeightsError(f"weights: {path} is of another refiner or version; install the package again")
        network = CorrespondenceNetwork(sizes)
        load_state(network, read_state(folder), (), folder / WEIGHTS_FILE)
        return cls(network, weights, device)

    def refine(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> Refined:
        """A finer pose, or another mode where it is seen better."""
        return self.look(query, registered, estimate).answer()

    def proposals(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> list[Refined]:
        """All that may be made of one look, for whoever can tell by depth which is right."""
        look = self.look(query, registered, estimate)
        proposed = [look.alone(stage) for stage in _STAGES]
        fitted = look.fitted()
        if fitted is None:
            return proposed
        # Of one view, the matches say better where the object is than how it is turned.
        shifted, in_depth = look.shifted(), look.answer_in_depth(fitted)
        return [*proposed, *([in_depth, shifted] if registered.rendered is not None else [shifted, in_depth])]

    def trust(self, registered: RegisteredObject) -> Trust:
        """How far to believe the network, by what is known of an object."""
        if registered.rendered is not None:
            return self.weights.with_mesh
        if registered.keyframes is not None:
            return self.weights.with_walk
        return self.weights.with_image if registered.depth is None else self.weights.with_depth

    def look(self, query: Query, registered: RegisteredObject, estimate: PoseEstimate) -> Look:
        """What the network makes of an estimate's modes."""
        trust, rho = self.trust(registered), query.crop.angular_radius
        modes = estimate.delta_modes
        # What earlier frames chose, one frame does not choose anew.
        most = 1 if estimate.tracked else trust.hypotheses
        tried = tuple(mode for mode in modes[:most] if mode.probability > _LEAST_SHARE * modes[0].probability)
        turned = np.array([registered.angle_from_known(mode.R, query) for mode in tried])
        hypotheses = self._hypotheses(query, registered, tried)
        with torch.inference_mode():
            search = self._started(query, hypotheses)
            for _ in range(trust.first_steps):
                search = search.advanced()
            assert search.step is not None
            support = search.step.support.double().cpu().numpy()
            evidence = _evidence(tried, support, turned, trust)
            chosen = int(np.argmax(evidence + np.log([mode.probability for mode in tried])))
            search = search.only(chosen)
            for _ in range(trust.steps - trust.first_steps):
                search = search.advanced()
        assert search.step is not None and search.affine is not None
        best = hypotheses[chosen]
        log_weight = np.concatenate([evidence, np.zeros(len(modes) - len(tried))])
        R, centre = best.back(search.step.pose, rho)
        affine_R, affine_centre = best.back(search.affine, rho)
        return Look(
            query=query,
            registered=registered,
            estimate=estimate,
            trust=trust,
            distribution=estimate.distribution.weighed(np.stack([mode.R for mode in modes]), log_weight),
            modes=_reordered(modes, log_weight, best.mode),
            tried=tried,
            support=tuple(support.tolist()),
            turned=tuple(turned.tolist()),
            reference=best.reference,
            R=R,
            affine_R=affine_R,
            centre_virtual=centre,
            affine_centre_virtual=affine_centre,
            sigma=float(search.step.log_sigma[0].exp()),
            matches=best.matches(search.step),
        )

    def _hypotheses(self, query: Query, registered: RegisteredObject, modes: Sequence[Mode]) -> list[_Hypothesis]:
        """Modes, and the views they are compared with; under one roll where their own are nearly the same."""
        hypotheses: list[_Hypothesis] = []
        for mode in modes:
            R_virtual = registered.allocentric(mode.R, query)
            R_view, reference, views, depth = self._reference(registered, R_virtual)
            R = R_virtual @ R_view.T
            # The query is rolled to align with the view, so that features need not know of roll.
            roll = float(twist(R))
            rolls = (one.roll for one in hypotheses)
            roll = next((one for one in rolls if abs(np.angle(np.exp(1j * (one - roll)))) < _SAME_ROLL), roll)
            R_rolled = exp(np.array([0.0, 0.0, -roll])) @ R
            hypotheses.append(_Hypothesis(mode, R_view, reference, views, depth, roll, R_rolled))
        return hypotheses

    def _started(self, query: Query, hypotheses: Sequence[_Hypothesis]) -> _Search:
        """All hypotheses before the first look; the query is encoded once for each roll."""
        crop = query.crop
        rgba = np.dstack([crop.image, crop.mask])
        rolls = list(dict.fromkeys(one.roll for one in hypotheses))
        seen = self._view(np.stack([rolled(rgba, -roll) for roll in rolls]), crop.angular_radius)
        seen = seen[torch.tensor([rolls.index(one.roll) for one in hypotheses], device=self.device)]
        reference = Views(
            *(torch.cat([getattr(one.views, field.name) for one in hypotheses]) for field in fields(Views))
        )
        depths = [one.depth for one in hypotheses if one.depth is not None]
        R = np.stack([one.R for one in hypotheses])
        return _Search.start(self, reference, seen, R, torch.cat(depths) if depths else None)

    def _view(self, rgba: NDArray[np.uint8], rho: float) -> Views:
        size = self.network.config.crop_size
        if rgba.shape[1] != size:  # the predictor has crops of another size
            how = cv2.INTER_AREA if rgba.shape[1] > size else cv2.INTER_LINEAR
            rgba = np.stack([np.asarray(cv2.resize(one, (size, size), interpolation=how), np.uint8) for one in rgba])
        crops = torch.from_numpy(np.ascontiguousarray(rgba)).permute(0, 3, 1, 2).to(self.device)
        pixels = crops_to_tensor(crops).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network.view(pixels, torch.full((len(pixels),), rho, device=self.device))

    def _reference(
        self, registered: RegisteredObject, R_virtual: Array
    ) -> tuple[Array, ReferencePose, Views, Tensor | None]:
        """The view to start from.

        Args:
            registered: the object.
            R_virtual: (3, 3) hypothesis, from the reference's virtual camera to the query's.

        Returns:
            (3, 3) from the reference's virtual camera to the view's, the reference with that view's size and centre,
            the view, and (1, N) the depth of its points if it is known.
        """
        rendered, sides = registered.rendered, registered.sides
        if sides is None:
            view, R_view, reference = -1, np.eye(3), registered.reference
        else:
            view = int(sides.nearest((R_virtual @ registered.R_virtual_object)[None])[0])
            R_view = sides.R[view] @ registered.R_virtual_object.T
            reference = sides.reference_at(view, registered.reference)
        key = (id(registered), view)
        with self._lock:
            known = self._views.get(key)
            if known is not None and known.registered() is registered:  # and not another that has its id now
                self._views.move_to_end(key)
                return R_view, reference, known.views, known.depth
        with torch.inference_mode():
            grid = registered.depth if rendered is None else rendered.depth[view]
            rgba = np.dstack([registered.thumbnail, registered.mask]) if sides is None else sides.crops[view]
            found, depth = self._view(rgba[None], reference.angular_radius), None
            if grid is not None:
                cells = self.network.config.crop_size // 8
                along = max(len(grid) // cells, 1)  # of the grid, in one of the network's points
                at = (np.arange(along * cells) + 0.5) * len(grid) // (along * cells)
                fine = torch.from_numpy(grid[np.ix_(at.astype(int), at.astype(int))].astype(np.float32)).to(self.device)
                depth = fine.unflatten(0, (-1, along)).unflatten(2, (-1, along)).nanmean(dim=(1, 3)).flatten()[None]
        with self._lock:
            for old in [old for old, one in self._views.items() if one.registered() is None]:
                del self._views[old]
            self._views[key] = _Cached(weakref.ref(registered), found, depth)
            if len(self._views) > _CACHED_VIEWS:
                self._views.popitem(last=False)
        return R_view, reference, found, depth


@dataclass(frozen=True)
class _Cached:
    """A view that was looked at before: of which object, which may be gone since, what was seen, and known depth."""

    registered: weakref.ref[RegisteredObject]
    views: Views
    depth: Tensor | None


@dataclass(frozen=True)
class _Search:
    """Hypotheses on their way; all of one kind, depth known or predicted."""

    refiner: CorrespondenceRefiner
    points: Tensor
    valid: Tensor
    correctable: Tensor
    reference: Views
    query: Views
    cosines: tuple[Tensor, Tensor]
    pose: RelativePose
    affine: RelativePose | None = None
    step: Step | None = None

    @classmethod
    def start(
        cls, refiner: CorrespondenceRefiner, reference: Views, query: Views, R: Array, depth: Tensor | None
    ) -> Self:
        """Where rotations R (P, 3, 3) between views say; ``depth`` (P, N) of the reference's points if it is known."""
        network = refiner.network
        points, valid, coarse = network.points(reference)
        if depth is not None:
            known = depth.isfinite()
            there = network.deepened(torch.zeros_like(points), depth.nan_to_num(0), reference.rho)
            points, valid = torch.where(known[..., None], there, points), valid & known
        return cls(
            refiner,
            points,
            valid,
            points.new_full((len(R),), float(depth is None)),
            coarse,
            query,
            network.compare(coarse, query),
            RelativePose.of_rotation(torch.tensor(R, dtype=torch.float32, device=refiner.device)),
        )

    def advanced(self) -> _Search:
        """One look further."""
        network, dtype = self.refiner.network, self.refiner.dtype
        with torch.autocast(self.refiner.device.type, dtype, enabled=dtype != torch.float32):
            step = network.step(
                self.points, self.valid, self.reference, self.query, self.cosines, self.pose, self.correctable
            )
        affine = self.affine
        if affine is None:
            affine, _ = network.solved(
                step.points,
                step.targets,
                step.log_weights,
                self.pose,
                self.query.rho,
                self.correctable,
                directions(affine_only=True).to(step.points),
            )
        return replace(self, points=step.points, pose=step.pose, affine=affine, step=step)

    def only(self, index: int) -> _Search:
        """One of them."""
        if len(self.valid) == 1:
            return self
        one = slice(index, index + 1)
        cells = len(self.cosines[0]) // len(self.valid)
        assert self.affine is not None and self.step is not None
        return replace(
            self,
            points=self.points[one],
            valid=self.valid[one],
            correctable=self.correctable[one],
            reference=self.reference[one],
            query=self.query[one],
            cosines=tuple(volume[index * cells : (index + 1) * cells] for volume in self.cosines),  # type: ignore[arg-type]
            pose=self.pose[one],
            affine=self.affine[one],
            step=self.step[one],
        )


def _evidence(modes: Sequence[Mode], support: Array, turned: Array, trust: Trust) -> Array:
    """(M,) log of how much likelier what was seen of modes is if they are right; other arguments as of ``Look``."""
    evidence = trust.support * support - trust.from_near * np.cos(turned)
    mass = np.array([mode.probability for mode in modes])
    # Of modes that were not compared, this says nothing; of a single one neither, to the last bit.
    evidence -= np.log((mass * np.exp(evidence)).sum() / mass.sum()) if len(modes) > 1 else evidence
    return evidence


def _reordered(modes: Sequence[Mode], log_weight: Array, best: Mode) -> tuple[Mode, ...]:
    """Modes with their probabilities after evidence (M,); what was compared and found best comes first."""
    mass = np.array([mode.probability for mode in modes])
    mass = mass * np.exp(log_weight) / (1 + (mass * np.expm1(log_weight)).sum())
    weighed_anew = [Mode(mode.R, float(share)) for mode, share in zip(modes, mass, strict=True)]
    return tuple(sorted(weighed_anew, key=lambda mode: (mode.R is not best.R, -mode.probability)))
