"""Learn the correspondence refiner: ``nope-ros train config/train/correspondence.yaml``.

Batches are groups of views of one object, most of them within sight of each other. Depth of the renders tells where
each cell of one view is in another. A hypothesis is the truth, disturbed as the templates' answers are, or wrong
altogether, as templates are: from another side, mirrored, half a turn off; then the network has to say so. As at run
time, the query has been rolled to align with the hypothesis, not with the truth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from nope_ros.correspondence import CorrespondenceWeights
from nope_ros.crop import FILL, depth_through
from nope_ros.frame import InputError
from nope_ros.harmonics import wigner_d
from nope_ros.latent import (
    WEIGHTS_FILE,
    RotatedLatentPredictor,
    WeightsError,
    crops_to_tensor,
    find_weights,
    load_predictor,
    load_state,
    read_state,
    write_weights,
)
from nope_ros.models.correspondence import (
    CorrespondenceConfig,
    CorrespondenceNetwork,
    RelativePose,
    in_full,
    project,
)
from nope_ros.models.rotated_latent import correlation, flatten_d
from nope_ros.prior import free_rotations
from nope_ros.rotations import exp, twist
from nope_ros.training.augment import AugmentationConfig, training_view
from nope_ros.training.learners import Curves
from nope_ros.training.muon import Muon
from nope_ros.training.pairs import DataConfig, PairDataset, Share
from nope_ros.training.train import (
    CHECKPOINT,
    CHECKPOINT_SECONDS,
    WEIGHTS,
    _load,
    _log,
    _save,
    moving_average,
    of_sizes,
    plot,
    read_training,
)

Array = NDArray[np.float64]

# A hypothesis farther from the truth is wrong; a view rolled by more is not aligned; radians.
_FAR, _ASKEW = np.radians(30), np.radians(30)

CURVES = Curves(
    "loss",
    {"start": "hypothesis", "known1": "depth known", "error1": "depth predicted"},
    "held out: median rotation error, °",
)


class CorrespondenceTraining(BaseModel):
    """Everything a run depends on, besides the renders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["correspondence"]
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    network: dict[str, int | list[int]] = {}
    start: str = ""  # folder of weights to go on from
    trunk: str = ""  # else: weights of a rotated latent whose U-Net the trunk starts from; empty: the packaged ones
    train_from: str = "encode3"  # what comes before this in the trunk stays as it was
    pairs_per_batch: int = Field(default=108, gt=0)
    steps: int = Field(default=2, gt=0)
    most_apart_deg: float = 75.0  # of pairs that teach places; all teach right from wrong
    hypothesis_deg: tuple[float, float] = (1.0, 11.0)  # standard deviation about each axis
    wrong_share: Share = 0.4
    known_depth_share: Share = 0.5  # of the pairs have the reference's true depth, as renders of a mesh have
    close_share: Share = 0.5  # of the groups are drawn within close_deg
    close_deg: float = 30.0
    anywhere_share: Share = 0.15  # of the groups are drawn from all sides
    seed: int = Field(default=0, ge=0)
    budget_minutes: float = Field(default=40, gt=0)
    learning_rate: float = Field(default=2.0e-3, gt=0)
    warmup_steps: int = Field(default=40, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    validate_minutes: float = Field(default=8, ge=0)
    validation_batches: int = Field(default=6, gt=0)
    workers: int = Field(default=1, ge=0)
    threads: int = Field(default=1, gt=0)


@dataclass(frozen=True)
class GroupBatch:
    """Views of G objects, V each, in the axes of their virtual cameras; lengths in object radii.

    Attributes:
        crops: (G, V, 4, S, S) uint8.
        z: (G, V, n, n) depth behind the object's centre at the centres of the cells, in units of the circle; NaN where
            there is none.
        R: (G, V, 3, 3) R_virtual_object.
        t: (G, V, 3) the object's centre.
        rho: (G, V).
    """

    crops: Tensor
    z: Tensor
    R: Tensor
    t: Tensor
    rho: Tensor

    def to(self, device: torch.device | str) -> GroupBatch:
        """On a device."""
        return GroupBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class GroupDataset(PairDataset):
    """An endless stream of groups: an anchor, and views within sight of it, most of them rolled to align with it."""

    needs_depth = True
    roll_noise_deg = 6.0
    astray_share = 0.15  # of the views are rolled anyhow: what a query is under a hypothesis of a wrong roll
    close_share = 0.0
    close_deg = 30.0
    anywhere_share = 0.0

    def batch(self, rng: Generator) -> GroupBatch:  # type: ignore[override]
        """One batch from one generator."""
        chosen = rng.choice(len(self.probability), self.config.objects_per_batch, replace=False, p=self.probability)
        groups = [self._group(index, rng) for index in chosen]
        parts = [np.stack([np.stack([view[part] for view in group]) for group in groups]) for part in range(5)]
        crops, *rest = (torch.from_numpy(part) for part in parts)
        return GroupBatch(crops, *(part.float() for part in rest))

    def _group(self, index: int, rng: Generator) -> list[tuple[NDArray[np.generic], ...]]:
        cache, config = self.cache, self.config
        candidates = cache.views[index]
        first = rng.integers(len(candidates))
        cosine = cache.directions[candidates] @ cache.directions[candidates[first]]
        kind = rng.random()
        within = self.close_deg if kind < self.close_share else config.near_deg
        within = 180.0 if kind > 1 - self.anywhere_share else within
        near = np.flatnonzero(cosine > np.cos(np.radians(within)))
        near = near[near != first]
        if len(near) < config.views_per_object - 1:  # the nearest ones then
            near = np.argsort(-cosine)[1 : config.views_per_object]
        rest = rng.choice(near, config.views_per_object - 1, replace=False)
        roll = None if rng.random() < config.upright_share else float(rng.uniform(-np.pi, np.pi))
        anchor, R_anchor = self._view(candidates[first], roll, rng)
        group = [anchor]
        for other in candidates[rest]:
            off = np.radians(self.roll_noise_deg) * rng.normal()
            if rng.random() < self.astray_share:
                off = rng.uniform(-np.pi, np.pi)
            roll = -float(twist(cache.R[other] @ R_anchor.T)) + off
            group.append(self._view(other, roll, rng)[0])
        return group

    def _view(self, view: int, roll: float | None, rng: Generator) -> tuple[tuple[NDArray[np.generic], ...], Array]:
        cache = self.cache
        assert cache.depth is not None  # it is asked for
        R, t, K = cache.R[view], cache.t[view], cache.K[view]
        made = training_view(
            np.asarray(cache.images[view]), R, K, size=self.size, roll=roll, config=self.augmentation, rng=rng
        )
        camera = made.camera
        t_virtual = camera.R_virtual_camera @ t
        along = depth_through(np.asarray(cache.depth[view], np.float64) + t[2], K, camera, self.size // 4)
        z = (along - t_virtual[2]) / (t_virtual[2] * camera.angular_radius)
        parts = (made.crop, z, made.R_virtual_object, t_virtual, np.array(camera.angular_radius))
        return parts, made.R_virtual_object


@dataclass(frozen=True)
class Truth:
    """P pairs, flattened to indices of views, and what is true of them.

    Attributes:
        reference: (P,) index of the view.
        query: (P,).
        pose: true.
        points: (P, N, 3) of the reference's cells, NaN where there is no surface.
        targets: (P, N, 3) where they are in the query.
        visible: (P, N) whether they are seen there.
        hypothesis: (P, 3, 3).
        wrong: (P,) hypotheses that have nothing to do with the truth.
        learned: (P,) pairs within sight of each other whose hypothesis is about right.
    """

    reference: Tensor
    query: Tensor
    pose: RelativePose
    points: Tensor
    targets: Tensor
    visible: Tensor
    hypothesis: Tensor
    wrong: Tensor
    learned: Tensor


class Templates:
    """What is likely to be taken for the truth: wrong hypotheses, as the packaged templates would make them.

    How far they look from the reference must not give them away: views drawn together are nearer to each other than
    views anywhere, which at run time nobody knows. So each counts as much as makes both kinds as frequent at every
    distance.
    """

    _BINS = 6

    def __init__(self, device: torch.device | str = "cpu") -> None:
        predictor = load_predictor(None, device=device)
        assert isinstance(predictor, RotatedLatentPredictor)
        self.predictor = predictor
        grid = free_rotations()
        rotations = torch.from_numpy(np.array(grid[np.abs(twist(grid)) < _ASKEW])).float()
        self.turns = flatten_d(wigner_d(rotations, predictor.network.config.bandwidth)).to(device)
        self.rotations = rotations.to(device)
        self.seen = torch.ones(2, self._BINS, device=device)  # right and wrong ones at each distance, fading

    @in_full
    @torch.no_grad()
    def wrong(self, latents: Tensor, reference: Tensor, query: Tensor, delta: Tensor) -> Tensor:
        """Rotations (P, 3, 3) at least 30° from the true ones, as probable as the templates find them.

        Args:
            latents: (B, D) of the views.
            reference: (P,) index of the view.
            query: (P,).
            delta: (P, 3, 3) true.
        """
        shaped = latents.unflatten(1, self.predictor.latent_shape)
        logits = correlation(shaped[query], shaped[reference]) @ self.turns.T / self.predictor.temperature
        cosine = (torch.einsum("pij,nij->pn", delta, self.rotations) - 1) / 2
        logits = logits.masked_fill(cosine > np.cos(_FAR), -torch.inf)
        return self.rotations[torch.distributions.Categorical(logits=logits).sample()]

    def weights(self, hypothesis: Tensor, wrong: Tensor) -> Tensor:
        """What each hypothesis counts (P,), from what was seen so far."""
        angle = torch.acos(hypothesis[:, 2, 2].clamp(-1, 1))
        at = (angle / np.pi * self._BINS).long().clamp(max=self._BINS - 1)
        for kind, mine in enumerate((~wrong, wrong)):
            self.seen[kind] = 0.98 * self.seen[kind] + torch.bincount(at[mine], minlength=self._BINS)
        share = self.seen / self.seen.sum(1, keepdim=True)
        ratio = (share[0] / share[1]).clamp(0.2, 5.0)[at]
        return torch.where(wrong, ratio, torch.ones_like(ratio))


@in_full
def choose_pairs(
    batch: GroupBatch,
    cells: Tensor,
    config: CorrespondenceTraining,
    rng: Generator,
    mask: Tensor,
    templates: Templates,
) -> Truth:
    """Ordered pairs of a batch and hypotheses for them; ``cells`` (N, 2), ``mask`` (B, 1, n, n) of the crops."""
    groups, views = batch.rho.shape
    device = batch.rho.device
    R, t = batch.R.flatten(0, 1), batch.t.flatten(0, 1)
    rho, z = batch.rho.flatten(), batch.z.flatten(0, 1)
    first, second = torch.nonzero(~torch.eye(views, dtype=torch.bool)).unbind(1)
    start = torch.arange(groups)[:, None] * views
    reference, query = (start + first).flatten().to(device), (start + second).flatten().to(device)
    delta = R[query] @ R[reference].mT
    # Directions of view in the object's axes.
    towards = F.normalize(-(R.mT @ t[..., None])[..., 0], dim=-1)
    apart = torch.acos((towards[reference] * towards[query]).sum(-1).clamp(-1, 1))
    chosen = torch.from_numpy(rng.permutation(len(reference))[: config.pairs_per_batch]).to(device)
    apart = apart[chosen]
    reference, query, delta = reference[chosen], query[chosen], delta[chosen]

    unit = t[reference, 2] * rho[reference]  # object radii in the reference's unit
    centre = F.pad(t[reference, 2:], (2, 0))
    placed = ((delta @ (centre - t[reference])[..., None])[..., 0] + t[query]) / unit[:, None]
    pose = RelativePose(delta, placed[:, :2], -(rho[query] * placed[:, 2]).log())
    # The mean of what a cell's four quarters show.
    known = z.isfinite().float()
    total = F.avg_pool2d(z.nan_to_num(0)[:, None], 2).flatten(1)
    coarse = total / F.avg_pool2d(known[:, None], 2).flatten(1)
    coarse = coarse[reference]
    points = torch.cat([cells * (1 + rho[reference, None] * coarse)[..., None], coarse[..., None]], dim=-1)
    targets = project(points, pose, rho[query])
    grid = targets[:, :, None, :2] * FILL
    surface = F.grid_sample(z[query, None].nan_to_num(9.0), grid.nan_to_num(9.0), mode="nearest", align_corners=False)
    inside = F.grid_sample(mask[query], grid.nan_to_num(9.0), align_corners=False)[:, 0, :, 0]
    # The query's own centre of depth is that of the object; the reference's, moved, lies elsewhere.
    behind = targets[..., 2] + ((placed[:, 2] * unit - t[query, 2]) / (t[query, 2] * rho[query]))[:, None]
    seen = (surface[:, 0, :, 0] - behind).abs() < 0.15
    on_object = F.avg_pool2d(mask, 2).flatten(1)[reference] > 0.4
    visible = seen & (inside > 0.5) & on_object & coarse.isfinite()

    count = len(chosen)
    sigma = np.radians(rng.uniform(*config.hypothesis_deg, count))
    noise = rng.normal(size=(count, 3)) * sigma[:, None]
    true = delta.double().cpu().numpy()
    # Under a right hypothesis the query is aligned.
    wrong = torch.from_numpy((rng.random(count) < config.wrong_share) | (np.abs(twist(true)) > _ASKEW)).to(device)
    latents = templates.predictor.encode_pixels(batch.crops.flatten(0, 1))
    likely = templates.wrong(latents, reference, query, delta)
    unroll = np.zeros((count, 3))
    unroll[:, 2] = twist(likely.double().cpu().numpy()) * rng.uniform(0.3, 1, count)  # as much roll as right ones have
    spread = np.radians(4) * rng.normal(size=(count, 3))
    noisy, guess = (torch.from_numpy(exp(one)).float().to(device) for one in (noise, spread - unroll))
    hypothesis = torch.where(wrong[:, None, None], guess @ likely, noisy @ delta)
    learned = ~wrong & (apart < np.radians(config.most_apart_deg))
    return Truth(reference, query, pose, points, targets, visible, hypothesis, wrong, learned)


def angle(R_a: Tensor, R_b: Tensor) -> Tensor:
    """Angle (P,) between rotations (P, 3, 3), radians, with a gradient everywhere."""
    chord = ((R_a - R_b).square().sum((1, 2)) + 1e-8).sqrt()
    return 2 * torch.asin((chord / 8**0.5).clamp(max=0.999))


@dataclass(frozen=True)
class Outcome:
    """A batch's loss, its parts for the log, and the pairs' errors (steps + 1, P), radians, with what was expected.

    ``support`` is (steps, P); ``learned`` and ``wrong`` as of ``Truth``.
    """

    loss: Tensor
    parts: dict[str, float]
    errors: Tensor
    log_sigma: Tensor
    support: Tensor
    learned: Tensor
    wrong: Tensor
    known: Tensor


def batch_loss(
    network: CorrespondenceNetwork,
    batch: GroupBatch,
    config: CorrespondenceTraining,
    rng: Generator,
    templates: Templates,
) -> Outcome:
    """Loss of a batch."""
    crops = crops_to_tensor(batch.crops.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
    views = network.view(crops, batch.rho.flatten())
    z_true = batch.z.flatten(0, 1)[:, None]
    surface = z_true.isfinite() & (views.mask > 0.5)
    loss_z = (views.z - z_true.nan_to_num(0)).abs()[surface].mean()
    truth = choose_pairs(batch, network.cells, config, rng, views.mask, templates)
    points, valid, coarse = network.points(views)
    points, valid = points[truth.reference], valid[truth.reference]
    # With a mesh, depth is known. It also lets the rest be learned while depth is still bad.
    known = torch.from_numpy(rng.random(len(points)) < config.known_depth_share).to(points.device)
    measured = known[:, None] & truth.points[..., 2].isfinite()
    points = torch.where(measured[..., None], truth.points.nan_to_num(0), points)
    valid = valid & (measured | ~known[:, None])
    correctable = (~known).to(points)
    reference, query = coarse[truth.reference], views[truth.query]
    cosines = network.compare(reference, query)
    loss_match = _match_loss(cosines[0], truth)
    pose = RelativePose.of_rotation(truth.hypothesis)
    right, visible = truth.learned, truth.visible & truth.learned[:, None]
    weight = visible.float() / visible.sum().clamp(min=1)
    errors, expected, support = [angle(pose.R, truth.pose.R).detach()], [], []
    about_right, counts = (~truth.wrong).float(), templates.weights(truth.hypothesis, truth.wrong)
    loss = 2.0 * loss_z + 0.2 * loss_match
    parts = {"z": loss_z.item(), "match": loss_match.item()}
    for number in range(config.steps):
        step = network.step(points, valid, reference, query, cosines, pose, correctable)
        off = (step.targets - truth.targets.nan_to_num(0)).abs()
        loss_flow = (off[..., :2].sum(-1) * weight).sum()
        deep = (step.points[..., 2] - truth.points[..., 2].nan_to_num(0)).abs()
        loss_depth = ((off[..., 2] + deep) * weight).sum()
        error = angle(step.pose.R, truth.pose.R)
        expected.append(step.log_sigma.detach())
        support.append(step.support.detach())
        loss_support = F.binary_cross_entropy_with_logits(step.support, about_right, counts)
        # Laplace: sigma is the error to expect.
        loss_sigma = (step.log_sigma + error.detach() * (-step.log_sigma).exp()).mean()
        moved = (step.pose.shift - truth.pose.shift).norm(dim=1) + (step.pose.log_scale - truth.pose.log_scale).abs()
        loss_pose = ((4 * error + 2 * moved) * right).sum() / right.sum().clamp(min=1)
        late = 0.5 if number == 0 else 1.0
        loss = loss + late * (2 * loss_flow + loss_depth + loss_pose + 0.1 * loss_sigma + 0.5 * loss_support)
        errors.append(error.detach())
        parts[f"flow{number}"] = loss_flow.item()
        parts[f"error{number}"] = float(np.degrees(error[right & ~known].median().item()))
        parts[f"known{number}"] = float(np.degrees(error[right & known].median().item()))
        pose, points = step.pose.detach(), step.points.detach()
    parts["start"] = float(np.degrees(errors[0][right].median().item()))
    parts["moved"] = moved[right].median().item()
    parts["sigma"], parts["support"] = loss_sigma.item(), loss_support.item()
    told = torch.stack(errors), torch.stack(expected), torch.stack(support)
    return Outcome(loss, {"loss": loss.item(), **parts}, *told, truth.learned, truth.wrong, known)


def _match_loss(cosines: Tensor, truth: Truth, most: int = 1500) -> Tensor:
    """InfoNCE: each visible cell against all places of the query, τ = 0.1."""
    pairs, count = truth.visible.shape
    side = cosines.shape[-1]
    rows = torch.nonzero(truth.visible.flatten())[:, 0]
    rows = rows[torch.randperm(len(rows), device=rows.device)[:most]]
    place = ((truth.targets.reshape(-1, 3)[rows, :2] * FILL + 1) / 2 * side).long().clamp(0, side - 1)
    logits = cosines.reshape(pairs * count, -1)[rows] / 0.1
    return F.cross_entropy(logits, place[:, 1] * side + place[:, 0])


@torch.inference_mode()
def validate(
    network: CorrespondenceNetwork, batches: list[GroupBatch], config: CorrespondenceTraining, templates: Templates
) -> dict[str, float]:
    """Errors on held-out objects."""
    network.eval()
    outcomes = [
        batch_loss(network, batch, config, np.random.default_rng(n), templates) for n, batch in enumerate(batches)
    ]
    network.train()
    row = {key: float(np.mean([one.parts[key] for one in outcomes])) for key in outcomes[0].parts}
    errors = torch.cat([one.errors[:, one.learned & ~one.known] for one in outcomes], dim=1).rad2deg()
    row |= {f"median{n}": errors[n].median().item() for n in range(len(errors))}
    row["worse_by_2"] = (errors[-1] > errors[0] + 2).float().mean().item() * 100
    sigma = torch.cat([one.log_sigma[-1] for one in outcomes])
    final, wrong = torch.cat([one.errors[-1] for one in outcomes]), torch.cat([one.wrong for one in outcomes])
    row["sigma_right"], row["sigma_wrong"] = sigma[~wrong].mean().item(), sigma[wrong].mean().item()
    for number in range(config.steps):
        told = torch.cat([one.support[number] for one in outcomes])
        # How often a right hypothesis has more support than a wrong one.
        row[f"told_apart{number}"] = (told[~wrong][:, None] > told[wrong]).float().mean().item() * 100
    sure = sigma < sigma.median()
    row["median_sure_half"] = final[sure].median().rad2deg().item()
    return row


def make_network(config: CorrespondenceTraining) -> CorrespondenceNetwork:
    """The network, its trunk started from a rotated latent's.

    Raises:
        InputError: if its sizes, or the weights to start from, are wrong.
    """
    network: CorrespondenceNetwork = of_sizes(CorrespondenceNetwork, CorrespondenceConfig, config.network)
    folder = find_weights(config.trunk or None)
    state = read_state(folder)
    try:
        network.trunk.load_state_dict({key: state[key] for key in network.trunk.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise WeightsError(
            f"trunk: {folder} holds no rotated latent of the widths {network.config.widths}; give one under 'trunk', "
            "or its widths under 'network'"
        ) from error
    if config.start:
        folder = find_weights(config.start)
        load_state(network, read_state(folder), (), folder / WEIGHTS_FILE)
    network.trunk.requires_grad_(False)
    parts = list(network.trunk.named_children())
    names = [name for name, _ in parts]
    if config.train_from not in names:
        raise InputError(f"train_from: the trunk has no '{config.train_from}'; it has {', '.join(names)}")
    for _, part in parts[names.index(config.train_from) :]:
        part.requires_grad_(True)
    return network


def train(config_path: Path, out: Path, overrides: dict[str, object] | None = None) -> None:
    """Train until the budget is spent, resuming from ``out`` if it holds a checkpoint; in one process.

    Raises:
        InputError: if the file, the renders or the weights to start from are wrong; nothing has been written then.
    """
    config = read_training(CorrespondenceTraining, config_path, overrides)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise InputError("kind: correspondence trains in one process; start it without `accelerate launch`")
    device = accelerator.device
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    network = make_network(config)
    dataset, held_out = (
        GroupDataset(config.data, config.augmentation, network.config.crop_size, config.seed, validation=held)
        for held in (False, True)
    )
    for drawn in (dataset, held_out):
        drawn.close_share, drawn.close_deg = config.close_share, config.close_deg
        drawn.anywhere_share = config.anywhere_share
    validation = [held_out.batch(np.random.default_rng((1, n))).to(device) for n in range(config.validation_batches)]
    out.mkdir(parents=True, exist_ok=True)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # left out of the stubs
    learned = [p for p in network.parameters() if p.requires_grad]
    trunk = {id(p) for p in network.trunk.parameters()}
    optimizer = Muon(
        [
            {
                "params": [p for p in learned if (p.ndim > 1) == matrix and (id(p) in trunk) == of_trunk],
                "matrix": matrix,
                "weight_decay": config.weight_decay if matrix and not of_trunk else 0.0,
            }
            for matrix, of_trunk in ((True, False), (False, False), (True, True), (False, True))
        ],
        lr=config.learning_rate,
    )
    average = AveragedModel(network, multi_avg_fn=moving_average(config.ema_decay), use_buffers=True)
    step, spent = 0, 0.0
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        step, spent = _load(checkpoint, network, average, optimizer)
        print(f"{out}: resumed after {step} steps, {spent / 60:.1f} minutes")
    dataset.first_batch = step
    loader = DataLoader(
        dataset, batch_size=None, num_workers=config.workers, prefetch_factor=4 if config.workers else None
    )
    budget, last = config.budget_minutes * 60, time.monotonic()
    next_validation = spent + config.validate_minutes * 60
    next_checkpoint = spent + CHECKPOINT_SECONDS
    running: list[dict[str, float]] = []
    templates = Templates(device)
    _train_mode(network)
    batches = iter(loader)
    while spent < budget:
        batch = next(batches).to(device)
        share = spent / budget
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1 + np.cos(np.pi * share))
        for group, factor in zip(optimizer.param_groups, (1.0, 1.0, 0.3, 0.3), strict=True):
            group["lr"] = max(rate * factor, 1e-6)
        # What is drawn in a step follows from its number, so that a resumed run draws the same.
        rng = np.random.default_rng((config.seed, 2, step))
        torch.manual_seed(config.seed + 1_000_000_007 * (step + 1))
        with accelerator.autocast():
            outcome = batch_loss(network, batch, config, rng, templates)
        optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        average.update_parameters(network)
        step += 1
        running.append(outcome.parts)
        now = time.monotonic()
        spent, last = spent + now - last, now
        if step % 10 == 0:
            row = {key: float(np.mean([one[key] for one in running])) for key in running[0]}
            _log(out, {"step": step, "minutes": spent / 60, "left": (budget - spent) / 60, "rate": rate, **row})
            running.clear()
        judged = spent >= min(budget, next_validation)
        if judged or spent >= next_checkpoint:
            next_checkpoint = spent + CHECKPOINT_SECONDS
            _save(checkpoint, learner=network, average=average, optimizer=optimizer, step=step, spent=spent)
            last = time.monotonic()  # neither writing nor validation is training time
        if judged:
            next_validation = spent + config.validate_minutes * 60
            with accelerator.autocast():
                averaged = average.module
                assert isinstance(averaged, CorrespondenceNetwork)
                row = validate(averaged, validation, config, templates)
            _train_mode(network)
            _log(out, {"step": step, "minutes": spent / 60, **{f"val_{key}": value for key, value in row.items()}})
            last = time.monotonic()
            plot(out, CURVES)
    finished = average.module
    assert isinstance(finished, CorrespondenceNetwork)
    export(finished, {"steps": step, "minutes": round(spent / 60, 1)}, out / WEIGHTS)
    folder = out / WEIGHTS
    print(f"weights: {folder}; next: python -m nope_ros.training.trust --weights {folder} --meshes MESHES")


def export(network: CorrespondenceNetwork, training: dict[str, object], folder: Path) -> None:
    """Write weights that ``CorrespondenceRefiner.from_pretrained`` reads, in half precision."""
    state = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in network.config.to_dict().items()}
    weights = CorrespondenceWeights(network=sizes, training=training)
    write_weights(folder, weights.model_dump(), state)


def _train_mode(network: CorrespondenceNetwork) -> None:
    # The trunk's statistics are those of its own, longer training.
    network.train()
    network.trunk.eval()
