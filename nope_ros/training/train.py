"""Learn weights: ``nope-ros train CONFIG``, of any kind there is a learner of.

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
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from nope_ros.frame import InputError
from nope_ros.models.rotated_latent import RotatedLatentConfig
from nope_ros.models.rotation_regression import RotationRegressionConfig
from nope_ros.training.correspond import CorrespondenceLearner
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
from nope_ros.training.settings import (
    CorrespondenceTraining,
    RunConfig,
    TrainingConfig,
    of_sizes,
    read_training,
    read_values,
)


def _log(folder: Path, row: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
    print("  ".join(f"{key} {value:.5g}" for key, value in row.items()), flush=True)


def train(config_path: Path, out: Path, overrides: dict[str, object] | None = None) -> int:
    """Train until the budget is spent, resuming from ``out`` if it holds a checkpoint.

    The paper's form is two trainings, one after the other: of its autoencoder (in ``out/autoencoder``), which then
    stands still, and of its U-Net.

    Args:
        config_path: YAML of a ``TrainingConfig`` or ``CorrespondenceTraining``.
        out: folder for checkpoint, log, curves and EMA weights.
        overrides: values that replace the file's, such as ``budget_minutes``.

    Returns:
        The steps that the weights took (those of the U-Net, of the paper's form).

    Raises:
        InputError: if the file, the renders or the weights to start from are wrong; nothing has been written then.
    """
    if read_values(config_path, overrides).get("kind") == "correspondence":
        refiner = read_training(CorrespondenceTraining, config_path, overrides)
        _begin(refiner)
        return _run(CorrespondenceLearner(refiner), refiner, out)
    config = read_training(TrainingConfig, config_path, overrides)
    _begin(config)
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


def _begin(config: RunConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


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
    bare: Learner[Any], config: RunConfig, out: Path, share_of_budget: float = 1.0, prepared: Path | None = None
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
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    bare.to(memory_format=bare.memory_format)  # type: ignore[call-overload]  # torch's stubs leave it out
    before = bare.start_from(Path(config.start)) if config.start else {}
    if prepared is not None:
        before = json.loads(prepared.read_text(encoding="utf-8"))
    optimizer = Muon(bare.parameter_groups(config.weight_decay), lr=config.learning_rate)
    # Every process draws batches of its own.
    seed = config.seed + 1_000_003 * accelerator.process_index
    dataset, held_out = bare.dataset(config, seed), bare.dataset(config, config.seed, validation=True)
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
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * annealed
        for group in optimizer.param_groups:
            group["lr"] = max(rate * group["pace"], 1e-6)
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
def validate(average: AveragedModel, batches: list[Any], accelerator: Accelerator) -> dict[str, float]:
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
