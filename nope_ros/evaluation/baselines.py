"""What is compared on the same pairs: ours, and what anyone could do instead."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.crop import Crop, virtual_crop
from nope_ros.distribution import RotationDistribution
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.protocol import Answer, Observation, generator
from nope_ros.frame import Frame, InputError
from nope_ros.latent import PaperUNetPredictor, crops_to_tensor, load_predictor, resolve_device
from nope_ros.match import Bank, predict_bank
from nope_ros.models.rotation_regression import RotationRegression
from nope_ros.pose import PoseEstimate
from nope_ros.prior import Hypotheses, Prior, hypotheses
from nope_ros.rotations import rotation_grid, turn_to

Array = NDArray[np.float64]

OURS = "nope_ros"
CHANCE = "chance"
NO_MOTION = "no motion"
SIFT = "SIFT"
TEMPLATES_ALONE = "ours, templates alone"
GRID_ONLY = "ours, grid rotation only"
NOT_TURNED = "ours, crop not turned back"
BOX_FOR_MASK = "ours, box for a mask"
NO_PRIOR = "ours, gravity only levels the crop"
REGRESSION = "rotation regression"
PAPER_FORM = "NOPE's paper form"
AS_LONG = "ours, trained as long as that"


class EstimatorMethod:
    """The product itself, through the calls its users make.

    What it said last is kept, for methods that only change the answer and are asked right after it.

    Attributes:
        matched: the last answers as they were before refinement.
    """

    def __init__(self, estimator: PoseEstimator, name: str = OURS) -> None:
        self.name = name
        self.estimator = estimator
        self._registered: tuple[Observation, Any] | None = None
        self._answered: tuple[Observation, Prior, list[Any], list[Answer]] | None = None
        self.matched: list[Answer] = []

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Templates of the reference."""
        if self._registered is None or self._registered[0] is not reference:
            registered = self.estimator.register_frame(
                reference.frame,
                R_camera_object=R_camera_object,
                t_camera_object=t_camera_object,
                gravity_camera=reference.gravity_camera,
            )
            self._registered = reference, registered
        return self._registered[1]

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """The query is encoded once for all references."""
        last = self._answered
        same = last is not None and last[0] is query and last[1] == prior and len(last[2]) == len(registered)
        if last is None or not same or any(a is not b for a, b in zip(last[2], registered, strict=True)):
            seen = self.estimator.look(query.frame, query.gravity_camera)
            matched = [self.estimator.match(seen, one, prior) for one in registered]
            refined = [self.estimator.refine(seen, one, at) for one, at in zip(registered, matched, strict=True)]
            self.matched = [_answer(one) for one in matched]
            self._answered = last = query, prior, list(registered), [_answer(one) for one in refined]
        return last[3]


def _answer(estimate: PoseEstimate) -> Answer:
    return Answer(estimate.delta_R, estimate.distribution, estimate.t_camera_object, estimate.confidence)


class _OfOurs:
    """Ours but for the answer, which is made from what ours said."""

    def __init__(self, ours: EstimatorMethod) -> None:
        self.ours = ours

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """As ours."""
        return self.ours.register(reference, R_camera_object, t_camera_object)


class TemplatesAlone(_OfOurs):
    """Ours without refinement."""

    name = TEMPLATES_ALONE

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """Ours, as it was before."""
        self.ours.estimate(registered, query, prior)
        return self.ours.matched


class GridOnly(_OfOurs):
    """Ours, but the answer is the most probable rotation of the grid, not the mean of the peak that holds most mass."""

    name = GRID_ONLY

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """Ours, with another rotation."""
        return [
            replace(answer, delta_R=answer.distribution.rotations[np.argmax(answer.distribution.probabilities)])
            for answer in self.ours.estimate(registered, query, prior)
            if answer.distribution is not None
        ]


class NotTurnedBack:
    """Ours, but what the network sees (allocentric) is taken for what the camera sees (egocentric)."""

    name = NOT_TURNED

    def __init__(self, ours: EstimatorMethod) -> None:
        self.ours = ours

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Ours, and the turn of its crop."""
        return self.ours.register(reference, R_camera_object, t_camera_object), _turn(reference)

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """Ours, without the last step."""
        answers = self.ours.estimate([one for one, _ in registered], query, prior)
        turn = _turn(query)
        return [
            replace(answer, delta_R=turn @ answer.delta_R @ turn_reference.T, distribution=None)
            for answer, (_, turn_reference) in zip(answers, registered, strict=True)
        ]


class BoxForMask(EstimatorMethod):
    """Ours, but of the object's outline no more is known than the box around it."""

    def __init__(self, estimator: PoseEstimator) -> None:
        super().__init__(estimator, BOX_FOR_MASK)

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Ours, of the box."""
        return super().register(_boxed(reference), R_camera_object, t_camera_object)

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """Ours, of the box."""
        return super().estimate(registered, _boxed(query), prior)


def _boxed(observation: Observation) -> Observation:
    frame = observation.frame
    x0, y0, x1, y1 = frame.bbox_xyxy
    mask = np.zeros_like(frame.mask)
    mask[y0:y1, x0:x1] = True
    return replace(observation, frame=Frame(frame.image, mask, frame.camera, frame.depth))


class NoPrior(EstimatorMethod):
    """Ours, but any rotation is thought possible; gravity still levels the crops. Under ``free`` the same as ours."""

    def __init__(self, estimator: PoseEstimator) -> None:
        super().__init__(estimator, NO_PRIOR)

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """Ours, on the free grid."""
        return super().estimate(registered, query, "free")


def _turn(observation: Observation) -> Array:
    # The crop's rotation without its roll, which gravity asks for in either case.
    return turn_to(_crop(observation)[0].R_virtual_camera[2])


class NoMotion:
    """Says that nothing turned."""

    name = NO_MOTION

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Nothing."""
        return None

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """The identity."""
        return [Answer(np.eye(3)) for _ in registered]


@dataclass(frozen=True)
class _ReferenceCrop:
    crop: Crop
    gravity_virtual: Array | None
    key: str


class Chance:
    """Draws a rotation from what the protocol allows."""

    name = CHANCE

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Where the crop looks."""
        return _ReferenceCrop(*_crop(reference), reference.key)

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """One rotation drawn from the prior."""
        crop, gravity_virtual = _crop(query)
        answers = []
        for reference in registered:
            possible = hypotheses(prior, reference.gravity_virtual, gravity_virtual)
            flat = np.zeros(len(possible.rotations))
            knows = RotationDistribution.from_log_likelihood(possible.rotations, flat, possible.log_weight)
            egocentric = knows.transformed(crop.R_virtual_camera.T, reference.crop.R_virtual_camera)
            rng = generator(self.seed, reference.key, query.key, prior, "chance")
            drawn = rng.choice(len(flat), p=knows.probabilities)
            answers.append(Answer(egocentric.rotations[drawn]))
        return answers


@dataclass(frozen=True)
class _Keypoints:
    rays: Array  # (N, 2), on the plane z = 1
    descriptors: NDArray[np.float32] | None
    focal: float
    key: str


class SiftEssential:
    """SIFT matches on the object, the essential matrix by RANSAC, and "no motion" where that fails.

    It has no use for gravity: its answer is the same under each protocol.
    """

    name = SIFT
    ratio = 0.8
    threshold_px = 1.0
    side = 480

    def __init__(self) -> None:
        self._sift = cv2.SIFT.create()
        # Each image is asked about under several protocols, and each pair too.
        self._seen: dict[str, _Keypoints] = {}
        self._answers: dict[tuple[str, str], Array] = {}

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Its keypoints."""
        return self._keypoints(reference)

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """One essential matrix for each reference."""
        seen = self._keypoints(query)
        return [Answer(self._rotation(reference, seen)) for reference in registered]

    def _keypoints(self, observation: Observation) -> _Keypoints:
        if observation.key not in self._seen:
            if len(self._seen) >= 256:  # bounds memory; objects come one after the other
                self._seen.clear()
            self._seen[observation.key] = self._detect(observation.key, observation.frame)
        return self._seen[observation.key]

    def _detect(self, key: str, frame: Frame) -> _Keypoints:
        # Objects are often small in the image; SIFT finds more on an enlarged one.
        x0, y0, x1, y1 = frame.bbox_xyxy
        scale = float(np.clip(self.side / max(x1 - x0, y1 - y0), 1, 4))
        size = (round(scale * (x1 - x0)), round(scale * (y1 - y0)))
        grey = cv2.cvtColor(frame.image[y0:y1, x0:x1], cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_CUBIC)
        mask = cv2.resize(frame.mask[y0:y1, x0:x1].astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        points, descriptors = self._sift.detectAndCompute(grey, mask)
        K = frame.camera.K
        enlarged = np.array([point.pt for point in points], dtype=np.float64).reshape(-1, 2)
        pixels = (enlarged + 0.5) * [(x1 - x0) / size[0], (y1 - y0) / size[1]] - 0.5 + [x0, y0]
        rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(K).T
        return _Keypoints(rays[:, :2], descriptors, float(K[0, 0]), key)

    def _rotation(self, reference: _Keypoints, query: _Keypoints) -> Array:
        key = (reference.key, query.key)
        if key not in self._answers:
            self._answers[key] = self._solve(reference, query)
        return self._answers[key]

    def _solve(self, reference: _Keypoints, query: _Keypoints) -> Array:
        if reference.descriptors is None or query.descriptors is None or len(query.descriptors) < 2:
            return np.eye(3)
        matches = cv2.BFMatcher().knnMatch(reference.descriptors, query.descriptors, k=2)
        good = [best for best, second in matches if best.distance < self.ratio * second.distance]
        if len(good) < 6:  # the five-point method, and one to check it
            return np.eye(3)
        first = reference.rays[[match.queryIdx for match in good]]
        second = query.rays[[match.trainIdx for match in good]]
        threshold = self.threshold_px / (0.5 * (reference.focal + query.focal))
        cv2.setRNGSeed(0)
        essential, inliers = cv2.findEssentialMat(
            first, second, np.eye(3), method=cv2.RANSAC, prob=0.999, threshold=threshold
        )
        if essential is None or essential.shape[0] < 3:
            return np.eye(3)
        _, R, _, _ = cv2.recoverPose(essential[:3], first, second, np.eye(3), mask=inliers)
        rotation: Array = np.asarray(R, dtype=np.float64)
        return rotation if np.isfinite(rotation).all() else np.eye(3)


@dataclass(frozen=True)
class _Encoded:
    """A reference as a network keeps it: its crop, gravity in that, and features or a latent."""

    crop: Crop
    gravity_virtual: Array | None
    features: Tensor
    banks: dict[Prior | bool, Bank] = field(default_factory=dict)


def _crop(observation: Observation, size: int = 16) -> tuple[Crop, Array | None]:
    """The crop, and gravity (3,) in its virtual camera."""
    gravity = observation.gravity_camera
    crop = virtual_crop(observation.frame, size, gravity)
    return crop, None if gravity is None else crop.R_virtual_camera @ gravity


def _egocentric(delta_R_virtual: Array, query: Crop, reference: Crop) -> Array:
    turned: Array = query.R_virtual_camera.T @ delta_R_virtual @ reference.R_virtual_camera
    return turned


def _nearest(rotations: Array, R: Array) -> int:
    """Index of the rotation (of (N, 3, 3)) nearest to R (3, 3)."""
    return int(np.argmax(rotations.reshape(-1, 9) @ R.ravel()))


def _possible(prior: Prior, reference: Array | None, query: Array | None) -> Hypotheses:
    found = hypotheses(prior, reference, query)
    allowed = np.isfinite(found.log_weight)
    return Hypotheses(found.rotations[allowed], found.log_weight[allowed], found.spacing)


class RegressionMethod:
    """The rotation straight from both crops (PIZZA's form); where gravity is known, the possible one nearest to it.

    Args:
        weights: folder that ``nope-ros train`` wrote for ``kind: regression``.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: if there are no such weights.
    """

    name = REGRESSION

    def __init__(self, weights: Path, device: str = "auto") -> None:
        self._device = resolve_device(device)
        self._network = RotationRegression.from_pretrained(weights).to(self._device)

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Features of its crop."""
        crop, gravity = _crop(reference, self._network.config.crop_size)
        return _Encoded(crop, gravity, self._features(crop))

    def _features(self, crop: Crop) -> Tensor:
        pixels = torch.from_numpy(np.dstack([crop.image, crop.mask])).permute(2, 0, 1)[None]
        return self._network.features(crops_to_tensor(pixels.to(self._device)))

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """One pass of the head for each reference."""
        crop, gravity = _crop(query, self._network.config.crop_size)
        features = self._features(crop)
        answers = []
        for reference in registered:
            R = self._network.compare(reference.features, features)[0].double().cpu().numpy()
            if prior != "free":
                rotations = _possible(prior, reference.gravity_virtual, gravity).rotations
                R = rotations[_nearest(rotations, R)]
            answers.append(Answer(_egocentric(R, crop, reference.crop)))
        return answers


class PaperForm:
    """NOPE's own form: the nearest template that its U-Net predicts.

    As in the paper templates are viewpoints, 341 on either side of the object's horizon; under ``standing`` a turn
    about the vertical gets the score of the viewpoint nearest to it. For ``free``, which the paper has not, they are
    576 rotations 30° apart: the U-Net is too slow for the finer grid.

    Args:
        weights: folder that ``nope-ros train`` wrote for ``kind: paper_unet``.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: if there are no such weights.
    """

    name = PAPER_FORM

    def __init__(self, weights: Path, device: str = "auto") -> None:
        predictor = load_predictor(weights, device=device)
        if not isinstance(predictor, PaperUNetPredictor):
            raise InputError(f"paper form: {weights} holds a {predictor.kind}; train one with kind: paper_unet")
        self._predictor = predictor

    def register(self, reference: Observation, R_camera_object: Array, t_camera_object: Array) -> Any:
        """Its latent; templates are predicted when they are asked for."""
        crop, gravity = _crop(reference, self._predictor.crop_size)
        return _Encoded(crop, gravity, self._predictor.encode([crop])[0])

    def estimate(self, registered: list[Any], query: Observation, prior: Prior) -> list[Answer]:
        """The best template's rotation."""
        crop, gravity = _crop(query, self._predictor.crop_size)
        latent = self._predictor.encode([crop])[0]
        answers = []
        for reference in registered:
            bank = self._bank(reference, gravity, prior)
            score = bank.match(latent, 1.0).log_likelihood
            rotations = bank.rotations
            if prior == "standing":
                rotations = _possible(prior, reference.gravity_virtual, gravity).rotations
                score = score[[_nearest(bank.rotations, R) for R in rotations]]
            answers.append(Answer(_egocentric(rotations[np.argmax(score)], crop, reference.crop)))
        return answers

    def _bank(self, reference: _Encoded, gravity: Array | None, prior: Prior) -> Bank:
        # One for the free grid, and one for each side of the horizon.
        key: Prior | bool = prior if gravity is None or prior == "free" else bool(gravity[2] < 0)
        if key not in reference.banks:
            if key == "free":
                rotations = rotation_grid(1)
            else:
                rotations = _possible("upright", reference.gravity_virtual, gravity).rotations
            reference.banks[key] = predict_bank(self._predictor, reference.features, rotations)
        return reference.banks[key]
