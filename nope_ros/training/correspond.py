"""Learn the correspondence refiner: ``nope-ros train config/train/correspondence.yaml``.

Batches are groups of views of one object, most of them within sight of each other. Depth of the renders tells where
each cell of one view is in another. A hypothesis is the truth, disturbed as the templates' answers are, or wrong
altogether, as templates are: from another side, mirrored, half a turn off; then the network has to say so. As at run
time, the query has been rolled to align with the hypothesis, not with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from nope_ros.correspondence import CorrespondenceRefiner, CorrespondenceWeights
from nope_ros.crop import FILL, depth_through
from nope_ros.frame import InputError
from nope_ros.harmonics import wigner_d
from nope_ros.latent import (
    RotatedLatentPredictor,
    WeightsError,
    crops_to_tensor,
    find_weights,
    load_predictor,
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
from nope_ros.training.augment import training_view
from nope_ros.training.learners import Curves, Learner, groups_of, take_over
from nope_ros.training.pairs import PairDataset
from nope_ros.training.settings import CorrespondenceTraining, RunConfig, of_sizes

Array = NDArray[np.float64]

# A hypothesis farther from the truth is wrong; a view rolled by more is not aligned; radians.
_FAR, _ASKEW = np.radians(30), np.radians(30)


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

    def __init__(self, training: CorrespondenceTraining, size: int, seed: int, validation: bool = False) -> None:
        super().__init__(training.data, training.augmentation, size, seed, validation=validation)
        self.training = training

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
        within = self.training.close_deg if kind < self.training.close_share else config.near_deg
        within = 180.0 if kind > 1 - self.training.anywhere_share else within
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

    def __deepcopy__(self, memo: dict[int, object]) -> Templates:
        return self  # a learner and its averaged copy see the same

    def latents(self, crops: Tensor) -> Tensor:
        """Of crops (B, 4, S, S) uint8 of any size: (B, D)."""
        size = (self.predictor.crop_size,) * 2
        if crops.shape[-2:] != size:
            crops = F.interpolate(crops.float(), size, mode="bilinear", antialias=True).round().byte()
        return self.predictor.encode_pixels(crops, torch.zeros(len(crops), dtype=torch.bool))

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
    latents = templates.latents(batch.crops.flatten(0, 1))
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
    return Outcome(loss, parts, *told, truth.learned, truth.wrong, known)


def _match_loss(cosines: Tensor, truth: Truth, most: int = 1500) -> Tensor:
    """InfoNCE: each visible cell against all places of the query, τ = 0.1."""
    pairs, count = truth.visible.shape
    side = cosines.shape[-1]
    rows = torch.nonzero(truth.visible.flatten())[:, 0]
    rows = rows[torch.randperm(len(rows), device=rows.device)[:most]]
    place = ((truth.targets.reshape(-1, 3)[rows, :2] * FILL + 1) / 2 * side).long().clamp(0, side - 1)
    logits = cosines.reshape(pairs * count, -1)[rows] / 0.1
    return F.cross_entropy(logits, place[:, 1] * side + place[:, 0])


class CorrespondenceLearner(Learner[GroupBatch]):
    """The refiner, its trunk started from a rotated latent's; see the module.

    Args:
        config: of the training.

    Raises:
        InputError: if its sizes, or the weights of the trunk, are wrong.
    """

    curves = Curves(
        "loss",
        {"start": "hypothesis", "known1": "depth known", "error1": "depth predicted"},
        "held out: median rotation error, °",
    )

    def __init__(self, config: CorrespondenceTraining) -> None:
        super().__init__()
        self.config = config
        self.network: CorrespondenceNetwork = of_sizes(CorrespondenceNetwork, CorrespondenceConfig, config.network)
        self.crop_size = self.network.config.crop_size
        trunk = self.network.trunk
        folder = find_weights(config.trunk or None)
        state = read_state(folder)
        try:
            trunk.load_state_dict(trunk.adapted({key: state[key] for key in trunk.state_dict()}))
        except (KeyError, RuntimeError) as error:
            raise WeightsError(
                f"trunk: {folder} holds no rotated latent of the widths {self.network.config.widths}; give one under "
                "'trunk', or its widths under 'network'"
            ) from error
        parts = dict(trunk.named_children())
        if config.train_from not in parts:
            raise InputError(f"train_from: the trunk has no '{config.train_from}'; it has {', '.join(parts)}")
        for part in list(parts.values())[: list(parts).index(config.train_from)]:
            part.requires_grad_(False)
        self.templates: Templates | None = None
        self._told: list[dict[str, float]] = []  # of the steps that the log has not seen

    def start_from(self, folder: Path) -> dict[str, Any]:
        """All weights; not how far they were believed."""
        found = CorrespondenceRefiner.from_pretrained(find_weights(folder), device="cpu")
        take_over(folder, lambda: self.network.load_state_dict(found.network.state_dict()))
        return found.weights.training

    def dataset(self, config: RunConfig, seed: int, validation: bool = False) -> GroupDataset:
        """Groups of views."""
        return GroupDataset(self.config, self.crop_size, seed, validation)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The trunk, which has learned before, is changed less."""
        own = [p for name, p in self.network.named_parameters() if not name.startswith("trunk.")]
        return groups_of(own, weight_decay) + groups_of(self.network.trunk.parameters(), 0.0, pace=0.3)

    def prepare(self, dataset: PairDataset, held_out: list[GroupBatch]) -> None:
        """The packaged templates, on the same device."""
        self.templates = Templates(self.network.cells.device)

    def train(self, mode: bool = True) -> CorrespondenceLearner:
        """The trunk's statistics are those of its own, longer training."""
        super().train(mode)
        self.network.trunk.eval()
        return self

    def forward(self, batch: GroupBatch, number: int) -> Tensor:
        """Of pairs that follow from the step's number, so that a resumed run draws the same."""
        outcome = self._outcome(batch, np.random.default_rng((self.config.seed, 2, number)))
        self._told.append(outcome.parts)
        return outcome.loss

    def figures(self) -> dict[str, float]:
        """The parts of the loss."""
        told, self._told = self._told, []
        return _means(told)

    def _outcome(self, batch: GroupBatch, rng: Generator) -> Outcome:
        assert self.templates is not None  # ``prepare`` comes first
        return batch_loss(self.network, batch, self.config, rng, self.templates)

    def validate(self, batches: list[GroupBatch]) -> dict[str, float]:
        """Errors on held-out objects."""
        outcomes = [self._outcome(batch, np.random.default_rng(n)) for n, batch in enumerate(batches)]
        row = {"loss": float(np.mean([one.loss.item() for one in outcomes])), **_means([one.parts for one in outcomes])}
        errors = torch.cat([one.errors[:, one.learned & ~one.known] for one in outcomes], dim=1).rad2deg()
        row |= {f"median{n}": errors[n].median().item() for n in range(len(errors))}
        row["worse_by_2"] = (errors[-1] > errors[0] + 2).float().mean().item() * 100
        sigma = torch.cat([one.log_sigma[-1] for one in outcomes])
        final, wrong = torch.cat([one.errors[-1] for one in outcomes]), torch.cat([one.wrong for one in outcomes])
        row["sigma_right"], row["sigma_wrong"] = sigma[~wrong].mean().item(), sigma[wrong].mean().item()
        for number in range(self.config.steps):
            told = torch.cat([one.support[number] for one in outcomes])
            # How often a right hypothesis has more support than a wrong one.
            row[f"told_apart{number}"] = (told[~wrong][:, None] > told[wrong]).float().mean().item() * 100
        sure = sigma < sigma.median()
        row["median_sure_half"] = final[sure].median().rad2deg().item()
        return row

    def export(self, folder: Path, training: dict[str, Any]) -> None:
        """Weights that ``CorrespondenceRefiner.from_pretrained`` reads, in half precision."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.network.state_dict().items()}
        sizes = self.network.config.to_dict()
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
        write_weights(folder, CorrespondenceWeights(network=plain, training=training).model_dump(), state)
        print(f"weights: {folder}; next: python -m nope_ros.training.trust --weights {folder} --meshes MESHES")


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
