"""Where each part of a reference view is seen in a query, and the pose that follows.

PicoPose's three stages (Liu et al., 2025) without CAD: what renders give there is predicted here from one reference. A
head predicts how far in front of the object's centre each cell of a view lies, so that a cell is a point in 3D. A
hypothesis turns these points and projects them into the query; features are compared in windows around these places;
a small network reads them and moves every point, with a weight for each move; and the weighted moves give the pose in
closed form, by one step of Gauss-Newton. First only roll, scale and shift (a 2D affine: stage 2), then all six degrees
of freedom (offsets: stage 3). Weights are learned through the solution, so that a point that is badly known counts
little: RANSAC's task, without its draws.

Coordinates. The circle around the object's mask is the unit: image coordinates have their origin in the crop's middle
and the circle's radius as unit (x right, y down); a view's 3D points have the circle's centre as origin, the radius of
the circle at the object's distance as unit, and the virtual camera's axes. ρ is the tangent of half the angle under
which the circle is seen, so that the camera is 1/ρ away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nope_ros.crop import FILL
from nope_ros.models.rotated_latent import CropUNet, ResidualBlock

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class CorrespondenceConfig:
    """Sizes of the network.

    Attributes:
        crop_size: side of the input, pixels; a multiple of 16.
        widths: channels of the U-Net at 1/4, 1/8 and 1/16 of the input.
        features: channels by which places are compared.
        context: channels that tell the network that moves points about the places.
        window: cells to each side of a place that are compared, on 1/4 and on 1/8 of the input's resolution.
        hidden: channels of the network that moves points.
    """

    crop_size: int = 96
    widths: tuple[int, int, int] = (64, 128, 256)
    features: int = 48
    context: int = 24
    window: int = 3
    hidden: int = 96

    def to_dict(self) -> dict[str, object]:
        """Plain values for config.json."""
        return asdict(self)


@dataclass(frozen=True)
class Views:
    """What is known of views; fields of B views each.

    Attributes:
        features: (B, C, n, n) unit vectors, n = a quarter of the crop's side.
        context: (B, C', n, n).
        z: (B, 1, n, n) depth of the surface behind the circle's centre.
        mask: (B, 1, n, n) share of each cell that is the object.
        rho: (B,) tangent of half the angle under which the circle is seen.
    """

    features: Tensor
    context: Tensor
    z: Tensor
    mask: Tensor
    rho: Tensor

    def __getitem__(self, index: Tensor | slice) -> Views:
        """Some of the views."""
        return Views(self.features[index], self.context[index], self.z[index], self.mask[index], self.rho[index])


@dataclass(frozen=True)
class RelativePose:
    """How the reference's points are seen in the query, for P pairs: image = e^σ (R X + t)_xy / (1 + ρ e^σ (R X)_z).

    Attributes:
        R: (P, 3, 3), from the reference's virtual camera to the query's.
        shift: (P, 2) t, in units of the reference's circle.
        log_scale: (P,) σ: log of how much larger the object looks than the two circles say.
    """

    R: Tensor
    shift: Tensor
    log_scale: Tensor

    @classmethod
    def of_rotation(cls, R: Tensor) -> RelativePose:
        """What a rotation (P, 3, 3) and the circles alone say."""
        return cls(R, R.new_zeros(len(R), 2), R.new_zeros(len(R)))

    def __getitem__(self, index: Tensor | slice) -> RelativePose:
        """Of some of the pairs."""
        return RelativePose(self.R[index], self.shift[index], self.log_scale[index])

    def detach(self) -> RelativePose:
        """Without history."""
        return RelativePose(self.R.detach(), self.shift.detach(), self.log_scale.detach())


@dataclass(frozen=True)
class Step:
    """One look at all places, and the pose that follows.

    Attributes:
        pose: after this step.
        points: (P, N, 3) of the reference, their depth corrected by what this pair shows of it.
        targets: (P, N, 3) where the points are seen in the query (x, y), and how deep they lie there.
        log_weights: (P, N, 2) of the targets' image coordinates and of their depth; −inf outside the mask.
        log_sigma: (P,) log of the expected error of the pose's rotation, radians.
        support: (P,) log odds that the hypothesis was about right, in training's mixture of right and wrong ones.
        information: (P, 6, 6) of rotation vector, shift and log scale, as the weights have it.
    """

    pose: RelativePose
    points: Tensor
    targets: Tensor
    log_weights: Tensor
    log_sigma: Tensor
    support: Tensor
    information: Tensor

    def __getitem__(self, index: Tensor | slice) -> Step:
        """Of some of the pairs."""
        return Step(*(getattr(self, field.name)[index] for field in fields(self)))


def cell_centres(count: int) -> Tensor:
    """Image coordinates (count², 2) of the centres of a view's cells, row by row."""
    along = ((torch.arange(count) + 0.5) / count * 2 - 1) / FILL
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def in_full(function: Callable[P, T]) -> Callable[P, T]:
    """Geometry, kept out of autocast: of a rotation in bfloat16 a quarter of a degree is left."""

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return exact


@in_full
def project(points: Tensor, pose: RelativePose, rho: Tensor) -> Tensor:
    """Reference points (P, N, 3) in the query, ``rho`` (P,): image coordinates and depth there, (P, N, 3)."""
    turned = points @ pose.R.mT
    scale = pose.log_scale.exp()[:, None]
    depth = scale * turned[..., 2]
    size = scale / (1 + rho[:, None] * depth).clamp(min=0.2)
    shifted = turned[..., :2] + pose.shift[:, None]
    return torch.cat([shifted * size[..., None], depth[..., None]], dim=-1)


@in_full
def solve(
    points: Tensor, targets: Tensor, weights: Tensor, pose: RelativePose, rho: Tensor, damping: Tensor, free: Tensor
) -> tuple[RelativePose, Tensor]:
    """The pose that brings points to their targets, by one step of weighted, damped Gauss-Newton.

    Args:
        points: (P, N, 3) of the reference.
        targets: (P, N, 3) as ``project`` gives.
        weights: (P, N, 2) of image coordinates and of depth.
        pose: to start from.
        rho: (P,) of the query.
        damping: (P, 6) how strongly the start is believed, as an information.
        free: (P, 6, 6) or (6, 6) projection onto the directions in which rotation vector (camera axes), shift and log
            scale may move.

    Returns:
        The pose, and the information (P, 6, 6) of rotation vector, shift and log scale.
    """
    turned = points @ pose.R.mT
    scale = pose.log_scale.exp()[:, None]
    x, y, z = (turned + F.pad(pose.shift, (0, 1))[:, None]).unbind(-1)
    rest = (1 + rho[:, None] * scale * z).clamp(min=0.2)
    seen = torch.stack([scale * x / rest, scale * y / rest, scale * z], dim=-1)
    # d(x, y, z) for a rotation vector ω and a shift: ω × Y + t, with Y not yet shifted.
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    X, Y, Z = turned.unbind(-1)
    dx = torch.stack([zero, Z, -Y, one, zero, zero], dim=-1)
    dy = torch.stack([-Z, zero, X, zero, one, zero], dim=-1)
    dz = torch.stack([Y, -X, zero, zero, zero, zero], dim=-1)
    last = zero.new_tensor([0.0, 0, 0, 0, 0, 1.0])
    inverse, perspective = (scale / rest)[..., None], (rho[:, None] * scale**2 / rest**2)[..., None]
    J = torch.stack(
        [
            inverse * dx - perspective * x[..., None] * dz + (scale * x / rest**2)[..., None] * last,
            inverse * dy - perspective * y[..., None] * dz + (scale * y / rest**2)[..., None] * last,
            scale[..., None] * dz + (scale * z)[..., None] * last,
        ],
        dim=-2,
    )  # (P, N, 3, 6)
    J = J @ free[..., None, :, :] if free.ndim == 3 else J @ free
    weight = torch.stack([weights[..., 0], weights[..., 0], weights[..., 1]], dim=-1)
    J, residual = J.flatten(1, 2), (targets - seen).flatten(1)
    weighted = J * weight.flatten(1)[..., None]
    information = weighted.mT @ J + torch.diag_embed(damping)
    step = torch.linalg.solve(information, (weighted.mT @ residual[..., None]))[..., 0]
    moved = RelativePose(
        torch.linalg.matrix_exp(_cross(step[:, :3])) @ pose.R, pose.shift + step[:, 3:5], pose.log_scale + step[:, 5]
    )
    return moved, information


def _cross(vector: Tensor) -> Tensor:
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))


class CorrespondenceNetwork(nn.Module):
    """Looks at views, then moves points between two of them."""

    cells: Tensor
    offsets: Tensor

    def __init__(self, config: CorrespondenceConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = CropUNet(config.crop_size, config.widths)
        width, hidden = self.trunk.features_out, config.hidden
        self.look = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, config.features + config.context + 1, 1),
        )
        across = 2 * config.window + 1
        inputs = 2 * across**2 + 2 * config.context + 12
        self.read = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.think = nn.Sequential(ResidualBlock(hidden), ResidualBlock(hidden), ResidualBlock(hidden))
        self.say = nn.Conv2d(hidden, 6, 1)
        verdict = nn.Linear(hidden, 2)
        self.judge = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), verdict)
        # Starts by moving nothing, by expecting an error of 13°, and by not knowing right from wrong.
        for layer, bias in ((self.say, [0.0] * 6), (verdict, [-1.5, 0.0])):
            assert layer.bias is not None
            nn.init.zeros_(layer.weight)
            layer.bias.data.copy_(torch.tensor(bias))
        # How strongly a hypothesis is believed, where depth is known and where it is predicted.
        self.log_damping = nn.Parameter(torch.zeros(2, 6))
        grid = config.crop_size // 4
        self.register_buffer("cells", cell_centres(grid // 2), persistent=False)
        along = torch.arange(-config.window, config.window + 1) * (2 / grid)
        y, x = torch.meshgrid(along, along, indexing="ij")
        self.register_buffer("offsets", torch.stack([x, y], dim=-1), persistent=False)

    def view(self, crops: Tensor, rho: Tensor) -> Views:
        """Look at crops (B, 4, S, S) in −1..1 whose circles are seen under ``rho`` (B,)."""
        found = self.look(self.trunk.features(crops)).float()
        features, context, z = found.split([self.config.features, self.config.context, 1], dim=1)
        mask = F.avg_pool2d(crops[:, 3:].float() * 0.5 + 0.5, 4)
        return Views(F.normalize(features, dim=1), context, z, mask, rho)

    def points(self, views: Views) -> tuple[Tensor, Tensor, Views]:
        """A view's cells at an eighth of the crop's resolution as points.

        Returns:
            (B, N, 3) points, (B, N) whether they are on the object, and the views at that resolution.
        """
        share = F.avg_pool2d(views.mask, 2)

        def mean(field: Tensor) -> Tensor:  # over what is on the object
            return F.avg_pool2d(field * views.mask, 2) / share.clamp(min=1e-3)

        features = F.normalize(mean(views.features), dim=1)
        pooled = Views(features, mean(views.context), mean(views.z), share, views.rho)
        z = pooled.z.flatten(1)
        return (
            self.deepened(torch.zeros_like(z)[..., None].expand(-1, -1, 3), z, views.rho),
            share.flatten(1) > 0.4,
            pooled,
        )

    def deepened(self, points: Tensor, deeper: Tensor, rho: Tensor) -> Tensor:
        """Points (P, N, 3) at the centres of their view's cells, moved away from its camera by ``deeper`` (P, N)."""
        z = points[..., 2] + deeper
        xy = self.cells * (1 + rho[:, None] * z)[..., None]
        return torch.cat([xy, z[..., None]], dim=-1)

    def solved(
        self,
        points: Tensor,
        targets: Tensor,
        log_weights: Tensor,
        pose: RelativePose,
        rho: Tensor,
        correctable: Tensor,
        free: Tensor | None = None,
    ) -> tuple[RelativePose, Tensor]:
        """``solve`` with the damping that was learned."""
        free = torch.eye(6).to(points) if free is None else free
        damping = self.log_damping.exp()[correctable.long()]
        return solve(points, targets, log_weights.exp(), pose, rho, damping, free)

    def compare(self, reference: Views, query: Views) -> tuple[Tensor, Tensor]:
        """Cosines (P·N, 1, n, n) of every reference cell with every place of the query, and the same at half of n."""
        grid = query.features.shape[-1]
        cosines = reference.features.flatten(2).mT @ query.features.flatten(2)
        fine = cosines.reshape(-1, 1, grid, grid)
        return fine, F.avg_pool2d(fine, 2)

    def step(
        self,
        points: Tensor,
        valid: Tensor,
        reference: Views,
        query: Views,
        cosines: tuple[Tensor, Tensor],
        pose: RelativePose,
        correctable: Tensor,
    ) -> Step:
        """One look and one solution.

        Args:
            points: (P, N, 3) of the reference, from ``points``, as the next two.
            valid: (P, N).
            reference: at the points' resolution.
            query: at full resolution.
            cosines: from ``compare``.
            pose: hypothesis.
            correctable: (P,) 1 where the points' depth is predicted, 0 where it is known.
        """
        pairs, count = valid.shape
        side = round(count**0.5)
        seen = project(points, pose, query.rho)
        place = seen[..., :2] * FILL  # as grid_sample counts
        windows = []
        for level, volume in enumerate(cosines):
            grid = place.reshape(-1, 1, 1, 2) + self.offsets * 2**level
            found = F.grid_sample(volume, grid, align_corners=False)
            windows.append(found.reshape(pairs, count, -1))
        there = torch.cat([query.context, query.z, query.mask], dim=1)
        there = F.grid_sample(there, place[:, :, None], align_corners=False)[..., 0].mT
        inputs = torch.cat(
            [
                *windows,
                there,
                reference.context.flatten(2).mT,
                reference.mask.flatten(2).mT,
                seen,
                seen[..., :2] - self.cells,
                points,
                seen[..., 2:] - there[..., -2:-1],
            ],
            dim=-1,
        )
        h = self.think(self.read(inputs.mT.unflatten(2, (side, side))))
        move, deeper, log_weights = (self.say(h).float().flatten(2).mT).split([3, 1, 2], dim=-1)
        targets = seen + 0.2 * move
        points = self.deepened(points, 0.2 * deeper[..., 0] * correctable[:, None], reference.rho)
        log_weights = log_weights.clamp(-8, 4).masked_fill(~valid[..., None], -torch.inf)
        share = valid.float() / valid.sum(1, keepdim=True).clamp(min=1)
        flat = h.float().flatten(2)
        highest = flat.masked_fill(~valid[:, None], -1e4).amax(2)
        pooled = torch.cat([(flat * share[:, None]).sum(2), highest.clamp(min=0)], dim=1)
        log_sigma, support = self.judge(pooled).float().unbind(1)
        solved, information = self.solved(points, targets, log_weights, pose, query.rho, correctable)
        return Step(solved, points, targets, log_weights, log_sigma.clamp(-4.5, 1.2), support, information)


def directions(affine_only: bool = False) -> Tensor:
    """The projection (6, 6) for ``solve``: everything, or only what a 2D affine can say (roll, shift, scale)."""
    return torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 1] if affine_only else [1.0] * 6))
