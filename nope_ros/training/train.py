"""Learn the weights of the rotated latent: ``nope-ros train CONFIG``.

Training is bounded by wall-clock time, not by steps: the learning rate follows the share of the budget that is spent,
so that a run on a slow machine ends as well-annealed as one on a fast machine. A run resumes from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from nope_ros.latent import RotatedLatentPredictor, WeightsError, crops_to_tensor, load_predictor
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.training.augment import AugmentationConfig
from nope_ros.training.likelihood import Candidates, candidates, pose_loss, upright_loss
from nope_ros.training.muon import Muon
from nope_ros.training.pairs import Batch, DataConfig, PairDataset


class TrainingConfig(BaseModel):
    """Everything a run depends on, besides the renders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    network: dict[str, int | list[int]] = {}
    start: str = ""  # folder of weights to go on from, with a new seed; empty: from nothing
    seed: int = 0
    budget_minutes: float = 120
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    sigma_deg: float = 5.0
    candidate_sets: int = 8
    upright_candidates: int = 3000
    validate_minutes: float = 10
    validation_batches: int = 12
    workers: int = 1
    threads: int = 1

    @property
    def network_config(self) -> RotatedLatentConfig:
        """The network's sizes."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.network.items()}
        return RotatedLatentConfig(**values)  # type: ignore[arg-type]


class _Learner(nn.Module):
    """The network and the temperature, which are learned together."""

    def __init__(self, config: RotatedLatentConfig) -> None:
        super().__init__()
        self.network = RotatedLatentNetwork(config)
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, crops: Tensor) -> Tensor:
        latents: Tensor = self.network(crops)
        return latents


def _pairs(views: int) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(views, views, offset=1)
    return first, second


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
        return ((self.R_query[:, 2] * self.R_reference[:, 2]).sum(1) > 0).cpu().numpy()


def batch_loss(
    model: nn.Module, scale: Tensor, batch: Batch, samples: Candidates, identity_weight: float = 0.05
) -> tuple[Tensor, PairLogits, PairLogits]:
    """Mean loss of all pairs of a batch; the rolled and the upright ones."""
    objects, views = batch.crops.shape[:2]
    pixels = crops_to_tensor(batch.crops.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
    latents = model(pixels).float().unflatten(0, (objects, views))
    first, second = _pairs(views)
    R = batch.R_virtual_object
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
        query, reference = latents[upright][:, both_second].flatten(0, 1), latents[upright][:, both_first].flatten(0, 1)
        R_query, R_reference = R[upright][:, both_second].flatten(0, 1), R[upright][:, both_first].flatten(0, 1)
        loss, logits = upright_loss(query, reference, R_query, R_reference, scale, samples)
        level = PairLogits(loss, logits, R_query, R_reference)
    pose = (free.loss.sum() + 0.5 * level.loss.sum()) / (len(free.loss) + 0.5 * len(level.loss))
    # Degree 0 does not turn, so the pose says nothing about it: it learns which object this is.
    embedding = nn.functional.normalize(latents[:, :, 0].flatten(0, 1), dim=-1)
    label = torch.arange(objects).repeat_interleave(views).to(embedding.device)
    same = label[:, None] == label[None]
    similarity = (embedding @ embedding.mT) / 0.1
    others = ~torch.eye(len(label), dtype=torch.bool, device=embedding.device)
    log_share = similarity - torch.logsumexp(similarity.masked_fill(~others, -1e4), dim=1, keepdim=True)
    identity = -(log_share * (same & others)).sum(1) / (same & others).sum(1)
    return pose + identity_weight * identity.mean(), free, level


@torch.inference_mode()
def validate(model: nn.Module, scale: Tensor, batches: list[Batch], samples: Candidates) -> dict[str, float]:
    """Loss and accuracy on held-out objects: rolled pairs against all rotations, upright ones against upright views."""
    model.eval()
    losses, rows = [], defaultdict(list)
    angle_of = samples_angle(samples)
    for batch in batches:
        _, free, level = batch_loss(model, scale, batch, samples, identity_weight=0.0)
        if len(free.loss):
            losses.append(free.loss)
            # Candidates are left-multiplied to the truth; their angle is the error of choosing them.
            rows["free"].append((angle_of[free.logits.argmax(1).cpu().numpy()], free.within_90))
        if len(level.loss):
            losses.append(level.loss)
            chosen = samples.views[level.logits.argmax(1)]
            cosine = ((chosen * level.R_query).sum((1, 2)) - 1) / 2
            rows["upright"].append((np.arccos(np.clip(cosine.cpu().numpy(), -1, 1)), level.within_90))
    model.train()
    report = {"loss": float(torch.cat(losses).mean())}
    for name, parts in rows.items():
        error = np.degrees(np.concatenate([error for error, _ in parts]))
        near = np.concatenate([near for _, near in parts])
        report |= {
            f"{name}_acc30": float((error < 30).mean() * 100),
            f"{name}_acc30_within_90": float((error[near] < 30).mean() * 100),
            f"{name}_median_deg_within_90": float(np.median(error[near])),
        }
    return report


def samples_angle(samples: Candidates) -> np.ndarray:
    """Angle (N,) of each candidate from the identity, radians: degree 1 of D is the rotation itself."""
    trace = samples.D[:, 1:10].reshape(-1, 3, 3).diagonal(dim1=1, dim2=2).sum(1)
    return np.arccos(np.clip((trace.numpy() - 1) / 2, -1, 1))


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def train(config_path: Path, out: Path, overrides: dict[str, object] | None = None) -> None:
    """Train until the budget is spent, resuming from ``out`` if it holds a checkpoint.

    Args:
        config_path: YAML of a TrainingConfig.
        out: folder for checkpoint, log and EMA weights.
        overrides: values that replace the file's, such as ``budget_minutes``.
    """
    config = TrainingConfig.model_validate({**yaml.safe_load(config_path.read_text()), **(overrides or {})})
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    network_config = config.network_config
    learner = _Learner(network_config)
    learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    matrices = [p for p in learner.parameters() if p.ndim > 1]
    rest = [p for p in learner.parameters() if p.ndim <= 1]
    if config.start:
        start(Path(config.start), learner)
    optimizer = Muon(
        [
            {"params": matrices, "matrix": True, "weight_decay": config.weight_decay},
            {"params": rest, "matrix": False, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    average = AveragedModel(learner, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    step, spent = 0, 0.0
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists():
        step, spent = _load(checkpoint, learner, average, optimizer)
        print(f"resumed after {step} steps, {spent / 60:.1f} minutes")
    dataset = PairDataset(config.data, config.augmentation, network_config.crop_size, config.seed, first_batch=step)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=config.workers, prefetch_factor=4 if config.workers else None
    )
    held_out = PairDataset(config.data, config.augmentation, network_config.crop_size, config.seed, validation=True)
    validation = [held_out.batch(np.random.default_rng((1, n))) for n in range(config.validation_batches)]
    rng = np.random.default_rng((config.seed, 2))
    priors = dataset.priors(rng)
    sets = [
        candidates(
            network_config.bandwidth,
            config.sigma_deg,
            seed,
            dataset.upright_views(rng, config.upright_candidates),
            *priors,
        ).to(accelerator.device)
        for seed in range(config.candidate_sets)
    ]
    learner, optimizer = accelerator.prepare(learner, optimizer)

    budget, last = config.budget_minutes * 60, time.monotonic()
    next_validation = spent + config.validate_minutes * 60
    running: list[float] = []
    learner.train()
    for batch in loader:
        share = min(spent / budget, 1.0)
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1 + np.cos(np.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 1e-6)
        batch = batch.to(accelerator.device)
        bare = accelerator.unwrap_model(learner)
        with accelerator.autocast():
            loss, _, _ = batch_loss(learner, bare.log_scale.exp(), batch, sets[step % len(sets)])
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(bare)
        step += 1
        running.append(loss.item())
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 20 == 0 and accelerator.is_main_process:
            _log(
                out,
                {
                    "step": step,
                    "minutes": spent / 60,
                    "left": (budget - spent) / 60,
                    "loss": float(np.mean(running)),
                    "rate": rate,
                    "scale": bare.log_scale.exp().item(),
                },
            )
            running.clear()
        done = spent >= budget
        if accelerator.is_main_process and (done or spent >= next_validation):
            next_validation = spent + config.validate_minutes * 60
            _save(checkpoint, learner=bare, average=average, optimizer=optimizer, step=step, spent=spent)
            with accelerator.autocast():
                scale = average.module.get_parameter("log_scale").exp()
                row = validate(average.module, scale, validation, sets[0])
            _log(out, {"step": step, "minutes": spent / 60, **{f"val_{k}": v for k, v in row.items()}})
            plot(out)
            last = time.monotonic()  # validation is not training time
        if done:
            break
    if accelerator.is_main_process:
        export(average, step, spent, out / "weights")
        print(
            f"weights: {out / 'weights'}; next: python -m nope_ros.training.calibrate {out / 'weights'} --cache CACHE"
        )


def start(folder: Path, learner: _Learner) -> None:
    """Take over the weights and the temperature of a finished training; its optimiser's state is not kept."""
    predictor = load_predictor(folder, device="cpu")
    if not isinstance(predictor, RotatedLatentPredictor):
        raise WeightsError(f"start: {folder} holds '{predictor.name}', not the network of this training")
    learner.network.load_state_dict(predictor.network.state_dict())
    learner.log_scale.data.fill_(-float(np.log(predictor.temperature)))


def export(average: AveragedModel, step: int, spent: float, folder: Path) -> None:
    """Write the averaged network as a predictor that ``load_predictor`` reads, in half precision."""
    network = copy.deepcopy(average.module.get_submodule("network"))
    assert isinstance(network, RotatedLatentNetwork)
    temperature = float(torch.exp(-average.module.get_parameter("log_scale")))
    predictor = RotatedLatentPredictor(
        network, temperature=temperature, training={"steps": step, "minutes": round(spent / 60, 1)}, device="cpu"
    )
    predictor.save_pretrained(folder, dtype=torch.float16)


def plot(folder: Path) -> None:
    """Draw the log's curves into ``loss.png``."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["minutes"] for row in training], [row["loss"] for row in training], label="training", linewidth=1)
    left.plot([row["minutes"] for row in held_out], [row["val_loss"] for row in held_out], "o-", label="held out")
    left.set(xlabel="minutes", ylabel="nats against knowing nothing", title="negative log-likelihood")
    left.legend()
    right.plot([row["minutes"] for row in held_out], [row["val_upright_acc30_within_90"] for row in held_out], "o-")
    right.set(xlabel="minutes", ylabel="%", title="held out, upright, within 90°: Acc30", ylim=(0, 100))
    figure.savefig(folder / "loss.png", dpi=100)


def _save(
    path: Path, *, learner: nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer, step: int, spent: float
) -> None:
    state = {f"learner.{k}": v for k, v in learner.state_dict().items()}
    state |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    temporary = path.with_suffix(".partial")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    save_file(tensors, temporary, metadata={"step": str(step), "spent": str(spent)})
    temporary.replace(path)


def _load(
    path: Path, learner: nn.Module, average: AveragedModel, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    learner.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("learner.")})
    average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["spent"])
