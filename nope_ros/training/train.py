"""Learn weights: ``nope-ros train CONFIG``, of any kind that ``nope_ros.training.learners`` has.

Training is bounded by wall-clock time, not by steps: the learning rate follows the share of the budget that is spent,
so that a run on a slow machine ends as well-annealed as one on a fast machine. A run resumes from its last checkpoint.

With several processes (``accelerate launch -m nope_ros.cli train CONFIG``) each draws batches of its own; the first
one's clock is everybody's, and it alone writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from nope_ros.frame import InputError
from nope_ros.latent import find_weights, known_fields, read_config
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

KINDS = ("rotated_latent", "regression", "paper_unet", "correspondence")
"""Of networks; the last one's training is ``nope_ros.training.correspond``."""

Config = TypeVar("Config", bound=BaseModel)
Made = TypeVar("Made")


class TrainingConfig(BaseModel):
    """Everything a run depends on, besides the renders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["rotated_latent", "regression", "paper_unet"] = "rotated_latent"
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    network: dict[str, int | float | str | list[int]] = {}  # sizes that differ from the kind's own
    start: str = ""  # folder of weights to go on from, with a new seed; empty: from nothing
    seed: int = Field(default=0, ge=0)
    budget_minutes: float = Field(default=120, gt=0)
    budget_steps: int | None = Field(default=None, gt=0)  # in place of minutes, where a run has to be repeatable
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=200, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    sigma_deg: float = Field(default=5.0, gt=0)  # rotated_latent: width of the target around the truth
    candidate_sets: int = Field(default=8, gt=0)  # rotated_latent: sets of rotations that take turns
    upright_candidates: int = Field(default=3000, gt=0)  # rotated_latent: views in each set
    autoencoder_share: float = Field(default=0.3, gt=0, lt=1)  # paper_unet: of the budget, before the U-Net's turn
    distance: Literal["l1", "l2"] = "l1"  # paper_unet: of latents
    validate_minutes: float = Field(default=10, ge=0)
    validation_batches: int = Field(default=12, gt=0)
    workers: int = Field(default=1, ge=0)
    threads: int = Field(default=1, gt=0)


def read_values(path: Path, overrides: dict[str, object] | None = None) -> dict[str, object]:
    """What a training's file says, not yet checked but for its kind.

    Args:
        path: YAML.
        overrides: values that replace the file's.

    Raises:
        InputError: if it cannot be read, holds no names with values, or another kind than one of ``KINDS``.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file such as config/train/rotated_latent.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise InputError(f"{path} {found}; names with values are needed, as in config/train/rotated_latent.yaml")
    values |= overrides or {}
    if values.get("kind", KINDS[0]) not in KINDS:
        raise InputError(f"{path}: kind: there is no '{values['kind']}'; known: {', '.join(KINDS)}")
    return values


def read_training(model: type[Config], path: Path, overrides: dict[str, object] | None = None) -> Config:
    """A training's file, checked.

    Args:
        model: of its kind.
        path: YAML.
        overrides: values that replace the file's.

    Raises:
        InputError: naming what is wrong in it.
    """
    try:
        return model.model_validate(read_values(path, overrides))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, one['loc']))}: "
            + ("there is no such setting" if one["type"] == "extra_forbidden" else one["msg"])
            for one in error.errors()
        ]
        raise InputError(f"{path}: {'; '.join(wrong[:3])}; docs/training.md tells the settings") from error


def of_sizes(make: Callable[[Made], nn.Module], sizes: type[Made], network: dict[str, Any]) -> Any:
    """What ``make`` makes of a network's sizes, of which a training's file gives those that differ from the usual.

    Raises:
        InputError: if no such network can be made.
    """
    try:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in network.items()}
        return make(sizes(**known_fields(sizes, given)))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"network: {error}; {sizes.__module__} tells the sizes") from error


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def train(config_path: Path, out: Path, overrides: dict[str, object] | None = None) -> int:
    """Train until the budget is spent, resuming from ``out`` if it holds a checkpoint.

    The paper's form is two trainings, one after the other: of its autoencoder (in ``out/autoencoder``), which then
    stands still, and of its U-Net.

    Args:
        config_path: YAML of a TrainingConfig.
        out: folder for checkpoint, log, curves and EMA weights.
        overrides: values that replace the file's, such as ``budget_minutes``.

    Returns:
        The steps that the weights took (those of the U-Net, of the paper's form).

    Raises:
        InputError: if the file, the renders or the weights to start from are wrong; nothing has been written then.
    """
    config = read_training(TrainingConfig, config_path, overrides)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.kind == "rotated_latent":

        def rotated_latent(sizes: RotatedLatentConfig) -> Learner:
            return RotatedLatentLearner(sizes, config.sigma_deg, config.candidate_sets, config.upright_candidates)

        return _run(of_sizes(rotated_latent, RotatedLatentConfig, config.network), config, out)
    if config.kind == "regression":
        return _run(of_sizes(RegressionLearner, RotationRegressionConfig, config.network), config, out)
    from nope_ros.models.paper_unet import PaperUNetConfig

    share, autoencoder = config.autoencoder_share, None
    if not config.network.get("vae"):
        # Once the U-Net has begun, its latents stand still, also where the budget is raised.
        if not (out / CHECKPOINT).exists():
            first = of_sizes(AutoencoderLearner, PaperUNetConfig, config.network)
            _run(first, config, out / "autoencoder", share)
        autoencoder = out / "autoencoder" / WEIGHTS
    torch.manual_seed(config.seed)  # whether or not the autoencoder was trained just now

    def paper_unet(sizes: PaperUNetConfig) -> Learner:
        return PaperUNetLearner(sizes, autoencoder, config.distance)

    prepared = None if autoencoder is None else autoencoder / TRAINING
    learner = of_sizes(paper_unet, PaperUNetConfig, config.network)
    return _run(learner, config, out, 1 if autoencoder is None else 1 - share, prepared)


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
) -> int:
    """One training: of a learner, from its checkpoint in ``out`` or from nothing, to its weights there.

    Args:
        bare: what is trained.
        config: of the training.
        out: folder.
        share_of_budget: that this training may use.
        prepared: JSON that tells the steps and minutes of what this training builds on.

    Returns:
        The steps it took, all of its beginnings together.
    """
    before = read_config(find_weights(config.start)).training if config.start else {}
    if prepared is not None:
        before = json.loads(prepared.read_text(encoding="utf-8"))
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
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
        if accelerator.is_main_process:
            print(f"{out}: resumed after {step} steps, {spent / 60:.1f} minutes")
    elif accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
    if accelerator.num_processes > 1 and len(set(gather_object([step]))) > 1:
        raise InputError(f"{out}: not every process sees the same checkpoint; use a folder that all machines share")
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
        spent, last = _of_the_first(spent + now - last, accelerator), now
        if accelerator.is_main_process and (step % 20 == 0 or share() >= 1):
            # Time left, as far as it is time that ends the run.
            left = (budget - spent) / 60 if budget_steps is None else spent / 60 * (1 / share() - 1)
            row = {"step": step, "minutes": spent / 60, "left": left, "loss": float(np.mean(running)), "rate": rate}
            _log(out, row | bare.figures())
            running.clear()
        judged = share() >= 1 or spent >= next_validation
        if not judged and spent < next_checkpoint:
            continue
        next_checkpoint = spent + CHECKPOINT_SECONDS
        if judged:
            next_validation = spent + config.validate_minutes * 60
        if accelerator.is_main_process:
            _save(checkpoint, learner=bare, average=average, optimizer=optimizer, step=step, spent=spent)
            if judged:
                row = validate(average, validation, accelerator)
                _log(out, {"step": step, "minutes": spent / 60, **{f"val_{k}": v for k, v in row.items()}})
                plot(out, bare.curves)
        accelerator.wait_for_everyone()
        last = time.monotonic()  # neither writing nor validation is training time
    if accelerator.is_main_process:
        finished = average.module
        assert isinstance(finished, Learner)
        total = {"steps": step + before.get("steps", 0), "minutes": round(spent / 60 + before.get("minutes", 0.0), 1)}
        if before:  # what a start had cost counts too
            total |= {f"own_{key}": value for key, value in (("steps", step), ("minutes", round(spent / 60, 1)))}
        finished.export(out / WEIGHTS, total)
    accelerator.wait_for_everyone()  # what comes next may read the weights
    return step


def _of_the_first(seconds: float, accelerator: Accelerator) -> float:
    """The first process's time: by clocks of their own, one would end while others wait for its gradients."""
    if accelerator.num_processes == 1:
        return seconds
    clock: float = broadcast(torch.tensor(seconds, dtype=torch.float64, device=accelerator.device)).item()
    return clock


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
