"""What is learned: a loss, figures on held-out objects and weights to write, for each kind of network.

The loop (``nope_ros.training.train``) is the same for all of them, and so is what is done to views. The refiner's
learner is in ``nope_ros.training.correspond``.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from nope_ros.latent import (
    PaperUNetPredictor,
    RotatedLatentPredictor,
    WeightsError,
    crops_to_tensor,
    find_vae,
    load_predictor,
)
from nope_ros.models.correspondence import in_full
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.models.rotation_regression import RotationRegression, RotationRegressionConfig
from nope_ros.training.likelihood import Candidates, candidates, pose_loss, upright_loss
from nope_ros.training.pairs import Batch, PairDataset
from nope_ros.training.settings import RunConfig

if TYPE_CHECKING:  # diffusers takes seconds to import
    from nope_ros.models.paper_unet import PaperUNetConfig

_IDENTITY_WEIGHT = 0.05
_ENERGY_WEIGHT = 1e-3
_VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
TRAINING = "training.json"
"""Beside an autoencoder's weights: the steps and minutes they took."""


@dataclass(frozen=True)
class Curves:
    """What the picture of a training shows.

    Attributes:
        loss: its name and unit.
        figures: keys of what validation says that are drawn beside it, and their names.
        title: what they are.
    """

    loss: str
    figures: dict[str, str]
    title: str


AnyBatch = TypeVar("AnyBatch")


class Learner(nn.Module, ABC, Generic[AnyBatch]):
    """A network on its way.

    Attributes:
        crop_size: of the views it takes, pixels.
        curves: what its picture shows.
        memory_format: of its weights.
    """

    crop_size: int
    curves: ClassVar[Curves]
    memory_format: ClassVar[torch.memory_format] = torch.channels_last

    def dataset(self, config: RunConfig, seed: int, validation: bool = False) -> PairDataset:
        """What batches are drawn from.

        Raises:
            InputError: if the renders are missing, or too few for a batch.
        """
        return PairDataset(config.data, config.augmentation, self.crop_size, seed, validation=validation)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """What is learned, for ``Muon``."""
        return groups_of(self.parameters(), weight_decay)

    def prepare(self, dataset: PairDataset, held_out: list[AnyBatch]) -> None:
        """Take from the data what the loss needs; before the first step, and again when a training is resumed."""

    @abstractmethod
    def forward(self, batch: AnyBatch, number: int) -> Tensor:
        """The loss of one batch in one step; ``number`` counts steps."""

    @abstractmethod
    def validate(self, batches: list[AnyBatch]) -> dict[str, float]:
        """Figures of held-out objects, among them ``loss``."""

    @abstractmethod
    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """Write weights that can be used; ``training`` tells readers how they came about."""

    def figures(self) -> dict[str, float]:
        """What the log shows beside the loss."""
        return {}

    def start_from(self, folder: Path) -> dict[str, Any]:
        """Take over the weights of a finished training.

        Returns:
            What they say of that training; its ``steps`` and ``minutes`` count as this one's too.

        Raises:
            WeightsError: if they are of another kind, or this kind cannot.
        """
        raise WeightsError(f"start: {folder}: this kind always starts from nothing")


def groups_of(parameters: Iterable[nn.Parameter], weight_decay: float, pace: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups for ``Muon``: matrices, which decay, and the rest; those that are frozen are left out."""
    learned = [p for p in parameters if p.requires_grad]
    return [
        {
            "params": [p for p in learned if (p.ndim > 1) == matrix],
            "matrix": matrix,
            "weight_decay": weight_decay if matrix else 0.0,
            "pace": pace,
        }
        for matrix in (True, False)
    ]


def take_over(folder: Path, load: Callable[[], object]) -> None:
    """Load weights where a network of the same sizes waits for them.

    Raises:
        WeightsError: if it has others.
    """
    try:
        load()
    except RuntimeError as error:  # torch's, with a line for each layer
        raise WeightsError(
            f"start: the network in {folder} has other sizes; give the same under 'network', or start from nothing"
        ) from error


def _pairs(views: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(views, views, offset=1)
    return first, second


def _pixels(crops: Tensor) -> Tensor:
    return crops_to_tensor(crops.flatten(0, 1))


@dataclass(frozen=True)
class PairLogits:
    """Pairs of views: loss (P,), logits (P, N) of the candidates, R_virtual_object (P, 3, 3) of both views."""

    loss: Tensor
    logits: Tensor
    R_query: Tensor
    R_reference: Tensor

    @classmethod
    def none(cls, device: torch.device) -> PairLogits:
        """No pairs."""
        return cls(*(torch.zeros(shape, device=device) for shape in ((0,), (0, 1), (0, 3, 3), (0, 3, 3))))

    @property
    def within_90(self) -> NDArray[np.bool_]:
        """(P,) whether the viewing directions are less than 90° apart."""
        return _within_90(self.R_query, self.R_reference)


def _within_90(R_query: Tensor, R_reference: Tensor) -> NDArray[np.bool_]:
    near: NDArray[np.bool_] = ((R_query[:, 2] * R_reference[:, 2]).sum(1) > 0).cpu().numpy()
    return near


class _Shared(list[Candidates]):
    """Megabytes that never change: the averaged copy of a learner uses the same."""

    def __deepcopy__(self, memo: dict[int, object]) -> _Shared:
        return self


class RotatedLatentLearner(Learner[Batch]):
    """The rotated latent and its temperature, which are learned together, on the pose likelihood.

    Args:
        config: sizes.
        sigma_deg: width of the target around the truth.
        candidate_sets: sets of rotations that take turns.
        upright_candidates: views in each set.
    """

    curves = Curves(
        "negative log-likelihood, nats against knowing the prior",
        {"upright_acc30_within_90": "Acc30"},
        "held out, upright, within 90°: Acc30, %",
    )

    def __init__(
        self, config: RotatedLatentConfig, sigma_deg: float, candidate_sets: int, upright_candidates: int
    ) -> None:
        super().__init__()
        self.network = RotatedLatentNetwork(config)
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        self.crop_size = config.crop_size
        self.sigma_deg, self.candidate_sets, self.upright_candidates = sigma_deg, candidate_sets, upright_candidates
        self.samples = _Shared()

    def prepare(self, dataset: PairDataset, held_out: list[Batch]) -> None:
        """Rotations that might have been drawn, and how often they are."""
        rng = np.random.default_rng((dataset.seed, 2))
        priors = dataset.priors(rng)
        for seed in range(self.candidate_sets):
            views = dataset.upright_views(rng, self.upright_candidates)
            samples = candidates(self.network.config.bandwidth, self.sigma_deg, seed, views, *priors)
            self.samples.append(samples.to(self.log_scale.device))

    def forward(self, batch: Batch, number: int) -> Tensor:
        """Pose likelihood of all pairs, and a little of telling objects apart."""
        latents = self._latents(batch)
        free, level = self._logits(latents, batch, self.samples[number % len(self.samples)])
        pose = (free.loss.sum() + 0.5 * level.loss.sum()) / (len(free.loss) + 0.5 * len(level.loss))
        # Degree 0 does not turn, so the pose says nothing about it: it learns which object this is.
        objects, views = latents.shape[:2]
        embedding = nn.functional.normalize(latents[:, :, 0].flatten(0, 1), dim=-1)
        label = torch.arange(objects).repeat_interleave(views).to(embedding.device)
        same = label[:, None] == label[None]
        similarity = (embedding @ embedding.mT) / 0.1
        others = ~torch.eye(len(label), dtype=torch.bool, device=embedding.device)
        log_share = similarity - torch.logsumexp(similarity.masked_fill(~others, -1e4), dim=1, keepdim=True)
        identity = -(log_share * (same & others)).sum(1) / (same & others).sum(1)
        # What counts for and what counts against could both grow without end and cancel.
        energy = self.log_scale.exp() * latents.square().sum((2, 3)).mean()
        return pose + _IDENTITY_WEIGHT * identity.mean() + _ENERGY_WEIGHT * energy

    def _latents(self, batch: Batch) -> Tensor:
        pixels = _pixels(batch.crops).contiguous(memory_format=torch.channels_last)
        latents: Tensor = self.network(pixels, batch.level.flatten()).float().unflatten(0, batch.crops.shape[:2])
        return latents

    def _logits(self, latents: Tensor, batch: Batch, samples: Candidates) -> tuple[PairLogits, PairLogits]:
        # Scores are differences of large numbers: half precision, good for the network, is too coarse for them.
        with torch.autocast(latents.device.type, enabled=False):
            return self._scored(latents, batch, samples)

    def _scored(self, latents: Tensor, batch: Batch, samples: Candidates) -> tuple[PairLogits, PairLogits]:
        """The rolled pairs of a batch, and the upright ones."""
        first, second = _pairs(latents.shape[1])
        R, scale = batch.R_virtual_object, self.log_scale.exp()
        rolled, upright = ~batch.upright, batch.upright
        both_first, both_second = torch.cat([first, second]), torch.cat([second, first])
        # A rolled pair read backwards has the same candidates; an upright one has others.
        free = PairLogits.none(R.device)
        if rolled.any():
            query, reference = latents[rolled][:, second].flatten(0, 1), latents[rolled][:, first].flatten(0, 1)
            R_query, R_reference = R[rolled][:, second].flatten(0, 1), R[rolled][:, first].flatten(0, 1)
            loss, logits = pose_loss(query, reference, R_query @ R_reference.mT, scale, samples)
            free = PairLogits(loss, logits, R_query, R_reference)
        level = PairLogits.none(R.device)
        if upright.any():
            query = latents[upright][:, both_second].flatten(0, 1)
            reference = latents[upright][:, both_first].flatten(0, 1)
            R_query, R_reference = R[upright][:, both_second].flatten(0, 1), R[upright][:, both_first].flatten(0, 1)
            loss, logits = upright_loss(query, reference, R_query, R_reference, scale, samples)
            level = PairLogits(loss, logits, R_query, R_reference)
        return free, level

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Loss and accuracy: rolled pairs against all rotations, upright ones against upright views."""
        samples = self.samples[0]
        losses: list[Tensor] = []
        rows: dict[str, list[tuple[NDArray[np.float64], NDArray[np.bool_]]]] = defaultdict(list)
        angle_of = samples_angle(samples)
        for batch in batches:
            free, level = self._logits(self._latents(batch), batch, samples)
            if len(free.loss):
                losses.append(free.loss)
                # Candidates are left-multiplied to the truth; their angle is the error of choosing them.
                rows["free"].append((angle_of[free.logits.argmax(1).cpu().numpy()], free.within_90))
            if len(level.loss):
                losses.append(level.loss)
                chosen = samples.views[level.logits.argmax(1)]
                cosine = ((chosen * level.R_query).sum((1, 2)) - 1) / 2
                rows["upright"].append((np.arccos(np.clip(cosine.cpu().numpy(), -1, 1)), level.within_90))
        report = {"loss": float(torch.cat(losses).mean())}
        for name, parts in rows.items():
            error = np.degrees(np.concatenate([error for error, _ in parts]))
            near = np.concatenate([near for _, near in parts])
            report |= {f"{name}_{key}": value for key, value in _accuracy(error, near).items()}
        return report

    def figures(self) -> dict[str, float]:
        """One over the temperature."""
        return {"scale": self.log_scale.exp().item()}

    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """A predictor that ``load_predictor`` reads, in half precision."""
        predictor = RotatedLatentPredictor(
            copy.deepcopy(self.network),
            temperature=torch.exp(-self.log_scale).item(),
            training=training,
            device="cpu",
        )
        predictor.save_pretrained(folder, dtype=torch.float16)
        print(f"weights: {folder}; next: python -m nope_ros.training.calibrate {folder} --cache CACHE")

    def start_from(self, folder: Path) -> dict[str, Any]:
        """Weights, also those for crops of another size, and temperature; the optimiser's state is not kept."""
        predictor = load_predictor(folder, device="cpu")
        if not isinstance(predictor, RotatedLatentPredictor):
            raise WeightsError(f"start: {folder} holds '{predictor.name}', not the network of this training")
        state = predictor.network.state_dict()
        take_over(folder, lambda: self.network.load_state_dict(self.network.adapted(state)))
        self.log_scale.data.fill_(-float(np.log(predictor.temperature)))
        return predictor.training


def _accuracy(error_deg: NDArray[np.float64], near: NDArray[np.bool_]) -> dict[str, float]:
    return {
        "acc30": float((error_deg < 30).mean() * 100),
        "acc30_within_90": float((error_deg[near] < 30).mean() * 100),
        "median_deg_within_90": float(np.median(error_deg[near])),
    }


def samples_angle(samples: Candidates) -> NDArray[np.float64]:
    """Angle (N,) of each candidate from the identity, radians: degree 1 of D is the rotation itself."""
    trace = samples.D[:, 1:10].reshape(-1, 3, 3).diagonal(dim1=1, dim2=2).sum(1)
    angle: NDArray[np.float64] = np.arccos(np.clip((trace.cpu().numpy() - 1) / 2, -1, 1))
    return angle


@in_full
def relative(R_query: Tensor, R_reference: Tensor) -> Tensor:
    """R_query R_referenceᵀ (P, 3, 3)."""
    return R_query @ R_reference.mT


class RegressionLearner(Learner[Batch]):
    """The rotation itself, by the Frobenius distance to the true one; see ``nope_ros.models.rotation_regression``."""

    curves = Curves("Frobenius distance of rotations", {"acc30_within_90": "Acc30"}, "held out, within 90°: Acc30, %")

    def __init__(self, config: RotationRegressionConfig) -> None:
        super().__init__()
        self.network = RotationRegression(config)
        self.crop_size = config.crop_size

    def start_from(self, folder: Path) -> dict[str, Any]:
        """The encoder of a rotated latent: the comparison is then of what is done with the same features."""
        found = load_predictor(folder, device="cpu")
        if not isinstance(found, RotatedLatentPredictor):
            raise WeightsError(f"start: {folder} holds '{found.name}'; a rotated latent's encoder can be taken over")
        take_over(folder, lambda: self.network.start_from(found.network))
        return found.training

    def forward(self, batch: Batch, number: int) -> Tensor:
        """The mean over all pairs, not squared: of several answers that fit, the median and not the middle."""
        estimated, R_query, R_reference = self._rotations(batch)
        return self._distance(estimated, relative(R_query, R_reference)).mean()

    def _rotations(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """ΔR as estimated, and R_virtual_object of queries and references, all (P, 3, 3)."""
        pixels = _pixels(batch.crops).contiguous(memory_format=torch.channels_last)
        features = self.network.features(pixels).unflatten(0, batch.crops.shape[:2])
        first, second = _pairs(batch.crops.shape[1])
        estimated = self.network.compare(features[:, first].flatten(0, 1), features[:, second].flatten(0, 1))
        R = batch.R_virtual_object
        return estimated, R[:, second].flatten(0, 1), R[:, first].flatten(0, 1)

    @staticmethod
    def _distance(estimated: Tensor, true: Tensor) -> Tensor:
        return ((estimated - true).square().sum((1, 2)) + 1e-6).sqrt()

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """Distance and accuracy."""
        distances, near = [], []
        for batch in batches:
            estimated, R_query, R_reference = self._rotations(batch)
            distances.append(self._distance(estimated, relative(R_query, R_reference)).double().cpu().numpy())
            near.append(_within_90(R_query, R_reference))
        distance = np.concatenate(distances)
        error = np.degrees(2 * np.arcsin(np.clip(distance / np.sqrt(8), 0, 1)))
        return {"loss": float(distance.mean()), **_accuracy(error, np.concatenate(near))}

    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """For ``nope-ros evaluate --regression-weights``."""
        self.network.save_pretrained(folder, training)
        print(f"weights: {folder}; compare: nope-ros evaluate ... --baselines --regression-weights {folder}")


class AutoencoderLearner(Learner[Batch]):
    """The autoencoder in whose latents the paper's U-Net predicts; Stable Diffusion's in the paper."""

    curves = Curves("L1 of the reconstruction (−1..1), and divergence", {"loss": "loss"}, "held out: the same")
    memory_format = torch.contiguous_format

    def __init__(self, config: PaperUNetConfig) -> None:
        super().__init__()
        from nope_ros.models.paper_unet import PaperUNet

        self.network = PaperUNet(config)
        self.network.unet.requires_grad_(False)
        self.network.rotation_mlp.requires_grad_(False)
        self.crop_size = config.crop_size

    def forward(self, batch: Batch, number: int) -> Tensor:
        """Of each view by itself."""
        return self.network.vae_loss(_pixels(batch.crops))

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """The loss."""
        losses = [self.network.vae_loss(_pixels(batch.crops)).item() for batch in batches]
        return {"loss": float(np.mean(losses))}

    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """As diffusers keeps an autoencoder."""
        self.network.vae.save_pretrained(folder, safe_serialization=True)
        (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


class PaperUNetLearner(Learner[Batch]):
    """NOPE's U-Net, on the distance between predicted and true latents of a frozen autoencoder.

    Args:
        config: sizes; if it names an autoencoder, that one is used.
        autoencoder: folder of the one that ``AutoencoderLearner`` wrote, if the config names none.
        distance: of latents.
    """

    curves = Curves("distance of latents", {"chosen": "right"}, "held out: truth preferred to 15 random rotations, %")
    memory_format = torch.contiguous_format  # see PaperUNetPredictor

    def __init__(self, config: PaperUNetConfig, autoencoder: Path | None, distance: Literal["l1", "l2"]) -> None:
        super().__init__()
        from nope_ros.models.paper_unet import PaperUNet

        self.network = PaperUNet(config, vae_folder=find_vae(config.vae) if config.vae else None)
        if autoencoder is not None:
            self.network.vae.load_state_dict(load_file(autoencoder / _VAE_WEIGHTS))
        self.network.freeze_vae()
        self.crop_size = config.crop_size
        self.distance: Literal["l1", "l2"] = distance

    def prepare(self, dataset: PairDataset, held_out: list[Batch]) -> None:
        """Bring the latents to unit variance, unless the autoencoder comes with a scale of its own."""
        if not self.network.config.vae:
            self.network.fit_scaling_factor(_pixels(held_out[0].crops))

    def train(self, mode: bool = True) -> PaperUNetLearner:
        """The autoencoder stays as it is."""
        super().train(mode)
        self.network.vae.eval()
        return self

    def forward(self, batch: Batch, number: int) -> Tensor:
        """Of all pairs, in both directions."""
        reference, query, delta_R = self._latents(batch)
        return self.network.prediction_loss(reference, query, delta_R, self.distance)

    def _latents(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of references and queries, each (P, C, h, w), and ΔR (P, 3, 3)."""
        with torch.no_grad():
            latents = self.network.encode(_pixels(batch.crops)).float().unflatten(0, batch.crops.shape[:2])
        first, second = _pairs(batch.crops.shape[1])
        R = batch.R_virtual_object
        delta_R = relative(R[:, second].flatten(0, 1), R[:, first].flatten(0, 1))
        return latents[:, first].flatten(0, 1), latents[:, second].flatten(0, 1), delta_R

    def validate(self, batches: list[Batch]) -> dict[str, float]:
        """The loss; that of taking the reference for the answer; and how often the true rotation fits best of 16."""
        losses, copied, chosen = [], [], []
        rng = np.random.default_rng(0)
        for batch in batches:
            reference, query, delta_R = self._latents(batch)
            losses.append(self.network.prediction_loss(reference, query, delta_R, self.distance).item())
            difference = reference - query
            copied.append((difference.abs() if self.distance == "l1" else difference.square()).mean().item())
            for latent, target, true in zip(reference[:2], query[:2], delta_R[:2], strict=True):
                others = torch.from_numpy(Rotation.random(15, rng=rng).as_matrix()).to(true)
                predicted = self.network(latent.expand(16, -1, -1, -1), torch.cat([true[None], others])).float()
                chosen.append((predicted - target).square().flatten(1).sum(1).argmin().item() == 0)
        return {
            "loss": float(np.mean(losses)),
            "loss_of_copying": float(np.mean(copied)),
            "chosen": 100 * float(np.mean(chosen)),
        }

    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """A predictor that ``load_predictor`` reads, in half precision."""
        predictor = PaperUNetPredictor(
            copy.deepcopy(self.network), name="paper-form U-Net", training=training, device="cpu"
        )
        predictor.save_pretrained(folder, dtype=torch.float16)
        print(f"weights: {folder}; next: python -m nope_ros.training.calibrate {folder} --cache CACHE")
