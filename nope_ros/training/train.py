"""Learn weights: ``nope-ros train CONFIG``, of any kind that ``nope_ros.training.learners`` has.

Training is bounded by wall-clock time, not by steps: the learning rate follows the share of the budget that is spent,
so that a run on a slow machine ends as well-annealed as one on a fast machine. A run resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from nope_ros.latent import read_config
from nope_ros.models.rotated_latent import RotatedLatentConfig
from nope_ros.models.rotation_regression import RotationRegressionConfig
from nope_ros.training.augment import AugmentationConfig
from nope_ros.training.learners import (
    TRAINING,
    AutoencoderLearner,
    Curves,
    Learner,
    PaperUNetLearner,
    RegressionLearner,
    RotatedLatentLearner,
)
from nope_ros.training.muon import Muon
from nope_ros.training.pairs import Batch, DataConfig, PairDataset


class TrainingConfig(BaseModel):
    """Everything a run depends on, besides the renders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rotated_latent", "regression", "paper_unet"] = "rotated_latent"
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    network: dict[str, int | float | str | list[int]] = {}  # sizes that differ from the kind's own
    start: str = ""  # folder of weights to go on from, with a new seed; empty: from nothing
    seed: int = 0
    budget_minutes: float = Field(default=120, gt=0)
    budget_steps: int | None = Field(default=None, gt=0)  # in place of minutes, where a run has to be repeatable
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    sigma_deg: float = 5.0  # rotated_latent: width of the target around the truth
    candidate_sets: int = 8  # rotated_latent: sets of rotations that take turns
    upright_candidates: int = 3000  # rotated_latent: views in each set
    autoencoder_share: float = Field(default=0.3, gt=0, lt=1)  # paper_unet: of the budget, before the U-Net's turn
    distance: Literal["l1", "l2"] = "l1"  # paper_unet: of latents
    validate_minutes: float = 10
    validation_batches: int = 12
    workers: int = 1
    threads: int = 1


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def train(config_path: Path, out: Path, overrides: dict[str, object] | None = None) -> None:
    """Train until the budget is spent, resuming from ``out`` if it holds a checkpoint.

    The paper's form is two trainings, one after the other: of its autoencoder (in ``out/autoencoder``), which then
    stands still, and of its U-Net.

    Args:
        config_path: YAML of a TrainingConfig.
        out: folder for checkpoint, log, curves and EMA weights.
        overrides: values that replace the file's, such as ``budget_minutes``.
    """
    config = TrainingConfig.model_validate({**yaml.safe_load(config_path.read_text()), **(overrides or {})})
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in config.network.items()}
    if config.kind == "rotated_latent":
        network_config = RotatedLatentConfig(**sizes)  # type: ignore[arg-type]
        _run(
            RotatedLatentLearner(network_config, config.sigma_deg, config.candidate_sets, config.upright_candidates),
            config,
            out,
        )
    elif config.kind == "regression":
        _run(RegressionLearner(RotationRegressionConfig(**sizes)), config, out)  # type: ignore[arg-type]
    else:
        from nope_ros.models.paper_unet import PaperUNetConfig

        paper_config = PaperUNetConfig(**sizes)  # type: ignore[arg-type]
        share, autoencoder = config.autoencoder_share, None
        if not paper_config.vae:
            # Once the U-Net has begun, its latents stand still, also where the budget is raised.
            if not (out / CHECKPOINT).exists():
                _run(AutoencoderLearner(paper_config), config, out / "autoencoder", share)
            autoencoder = out / "autoencoder" / WEIGHTS
        torch.manual_seed(config.seed)  # whether or not the autoencoder was trained just now
        learner = PaperUNetLearner(paper_config, autoencoder, config.distance)
        prepared = None if autoencoder is None else autoencoder / TRAINING
        _run(learner, config, out, 1 if autoencoder is None else 1 - share, prepared)


_Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """An exponential moving average that forgets its first steps sooner, for ``AveragedModel``.

    With the final decay from the start, a short run would end with a good share of its random beginning.
    """

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # an index is not to be averaged: 2.9999 would become 2
            for kept, new in zip(averaged, current, strict=True):
                kept.copy_(new)
            return
        warming = min(decay, (1 + float(count)) / (10 + float(count)))
        get_ema_multi_avg_fn(warming)(averaged, current, count)

    return update


CHECKPOINT = "checkpoint.safetensors"

CHECKPOINT_SECONDS = 300.0
"""What an interruption costs at most."""

WEIGHTS = "weights"
"""Folder, in that of a training, of what it gives."""


def _run(
    bare: Learner, config: TrainingConfig, out: Path, share_of_budget: float = 1.0, prepared: Path | None = None
) -> None:
    """One training: of a learner, from its checkpoint in ``out`` or from nothing, to its weights there.

    Args:
        bare: what is trained.
        config: of the training.
        out: folder.
        share_of_budget: that this training may use.
        prepared: JSON that tells the steps and minutes of what this training builds on.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = read_config(Path(config.start)).training if config.start else {}
    if prepared is not None:
        before = json.loads(prepared.read_text(encoding="utf-8"))
    # A part of the network may be frozen.
    find_unused = DistributedDataParallelKwargs(find_unused_parameters=config.kind == "paper_unet")
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available(), kwargs_handlers=[find_unused])
    bare.to(memory_format=bare.memory_format)  # type: ignore[call-overload]  # torch's stubs leave it out
    if config.start:
        bare.start_from(Path(config.start))
    learned = [p for p in bare.parameters() if p.requires_grad]
    optimizer = Muon(
        [
            {"params": [p for p in learned if p.ndim > 1], "matrix": True, "weight_decay": config.weight_decay},
            {"params": [p for p in learned if p.ndim <= 1], "matrix": False, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    # Every process draws batches of its own.
    seed = config.seed + 1_000_003 * accelerator.process_index
    dataset = PairDataset(config.data, config.augmentation, bare.crop_size, seed)
    held_out = PairDataset(config.data, config.augmentation, bare.crop_size, config.seed, validation=True)
    validation = [
        held_out.batch(np.random.default_rng((1, number))).to(accelerator.device)
        for number in range(config.validation_batches)
    ]
    bare.to(accelerator.device).prepare(dataset, validation)
    average = AveragedModel(bare, multi_avg_fn=moving_average(config.ema_decay), use_buffers=True)
    step, spent = 0, 0.0
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        step, spent = _load(checkpoint, bare, average, optimizer)
        print(f"{out}: resumed after {step} steps, {spent / 60:.1f} minutes")
    dataset.first_batch = step
    loader = DataLoader(
        dataset, batch_size=None, num_workers=config.workers, prefetch_factor=4 if config.workers else None
    )
    learner, optimizer = accelerator.prepare(bare, optimizer)

    budget = config.budget_minutes * 60 * share_of_budget
    budget_steps = None if config.budget_steps is None else max(1, round(config.budget_steps * share_of_budget))

    def share() -> float:
        """Of the budget that is spent, 0..1."""
        return min(spent / budget if budget_steps is None else step / budget_steps, 1.0)

    next_validation = spent + config.validate_minutes * 60
    next_checkpoint = spent + CHECKPOINT_SECONDS
    running: list[float] = []
    learner.train()
    batches = iter(loader)
    last = time.monotonic()
    while share() < 1:
        batch = next(batches).to(accelerator.device)
        annealed = 0.5 * (1 + np.cos(np.pi * share()))
        rate = max(config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * annealed, 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # What is drawn in a step follows from its number, so that a resumed run draws the same.
        torch.manual_seed(seed + 1_000_000_007 * (step + 1))
        with accelerator.autocast():
            loss = learner(batch, step)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(bare)
        step += 1
        running.append(loss.item())
        now = time.monotonic()
        spent, last = spent + now - last, now
        if accelerator.is_main_process and (step % 20 == 0 or share() >= 1):
            # Time left, as far as it is time that ends the run.
            left = (budget - spent) / 60 if budget_steps is None else spent / 60 * (1 / share() - 1)
            row = {"step": step, "minutes": spent / 60, "left": left, "loss": float(np.mean(running)), "rate": rate}
            _log(out, row | bare.figures())
            running.clear()
        judged = share() >= 1 or spent >= next_validation
        if accelerator.is_main_process and (judged or spent >= next_checkpoint):
            next_checkpoint = spent + CHECKPOINT_SECONDS
            _save(checkpoint, learner=bare, average=average, optimizer=optimizer, step=step, spent=spent)
            last = time.monotonic()  # neither writing nor validation is training time
        if accelerator.is_main_process and judged:
            next_validation = spent + config.validate_minutes * 60
            row = validate(average, validation, accelerator)
            _log(out, {"step": step, "minutes": spent / 60, **{f"val_{k}": v for k, v in row.items()}})
            plot(out, bare.curves)
            last = time.monotonic()
    if accelerator.is_main_process:
        finished = average.module
        assert isinstance(finished, Learner)
        total = {"steps": step + before.get("steps", 0), "minutes": round(spent / 60 + before.get("minutes", 0.0), 1)}
        if before:  # what a start had cost counts too
            total |= {f"own_{key}": value for key, value in (("steps", step), ("minutes", round(spent / 60, 1)))}
        finished.export(out / WEIGHTS, total)


@torch.inference_mode()
def validate(average: AveragedModel, batches: list[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Figures of the averaged weights on held-out objects."""
    learner = average.module
    assert isinstance(learner, Learner)
    learner.eval()
    torch.manual_seed(0)
    with accelerator.autocast():
        figures = learner.validate(batches)
    learner.train()
    return figures


def plot(folder: Path, curves: Curves) -> None:
    """Draw the log's curves into ``loss.png``."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "val_loss" in row]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["minutes"] for row in training], [row["loss"] for row in training], label="training", linewidth=1)
    left.plot([row["minutes"] for row in held_out], [row["val_loss"] for row in held_out], "o-", label="held out")
    left.set_title(curves.loss, fontsize="small")
    left.set(xlabel="minutes")
    left.legend()
    for key, name in curves.figures.items():
        judged = [row for row in held_out if f"val_{key}" in row]
        right.plot([row["minutes"] for row in judged], [row[f"val_{key}"] for row in judged], "o-", label=name)
    if len(curves.figures) > 1:
        right.legend()
    right.set_title(curves.title, fontsize="small")
    right.set(xlabel="minutes", ylim=(0, 100 if curves.title.endswith("%") else None))
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
