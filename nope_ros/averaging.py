"""Rotation averaging: relative rotations of pairs of views made consistent over the graph of all of them.

Needs latents that turn with the object (``RotatedLatentPredictor``); ``nope_ros.video`` asks for it where no camera
poses are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from nope_ros.harmonics import rotate, wigner_d
from nope_ros.match import Turns, free_turns, view_weights
from nope_ros.models.rotated_latent import correlation
from nope_ros.prior import free_rotations, standing_rotations
from nope_ros.rotations import exp, exp_jacobian, geodesic_distance, turn_to
from nope_ros.synthesis import HarmonicObjective

Array = NDArray[np.float64]

_CLOSED = np.radians(20.0)
"""A view that others see this far from where it stands is moved there at once; nearer by small steps."""
_SEEN_BY_BOTH = np.radians(45.0)
"""Between viewing directions up to here, most of what one view sees the other sees too."""
_FEWEST_EDGES = 4
"""Nearest views that each one is held against in any case."""
_BEGINNINGS = 3
_ASKED_AGAIN = (4, 8, 12, 16, 24)
"""Numbers of placed views at which all of them are asked again."""
_SWEEPS = 4
_ALIKE = 0.3
"""Of the largest product with a placed view, against the margin in log-probability: views from near by come first."""
_OUTLIER = np.radians(30.0)
_STEP = np.radians(25.0)
"""Standard deviation of the turn between one view of a walk and the next, of those that are compared."""
_DOWN = np.array([0.0, 0.0, -1.0])


@dataclass(frozen=True)
class Averaged:
    """Rotations that agree with each other.

    Attributes:
        rotations: (N, 3, 3) from a common frame to each view's virtual camera.
        agreeing: (N,) share of each view's relative rotations that agree with the result within 30°.
        residual_deg: median angle between a relative rotation and the result, of those that agree.
        edges: relative rotations used.
        outliers: how many of those do not agree.
    """

    rotations: Array
    agreeing: Array
    residual_deg: float
    edges: int
    outliers: int


def average_rotations(
    latents: Tensor, gravity_virtual: Sequence[Array | None], temperature: float = 1.0, *, ordered: bool = False
) -> Averaged:
    """Rotations of views from what their latents say about each pair of them.

    A pair's distribution has several modes, the right one often not the highest, and of views that look from far apart
    it is wrong more often than right. So no pair is decided by itself. Views are placed one after another, the surest
    first, each where those already placed explain it best together, the nearest most, as a query is against keyframes;
    and from time to time those placed before are asked again. This is done from several beginnings, and what explains
    itself best is kept. Views of a walk in order are moreover expected to differ little from the ones before and after.
    At the end all views move together, to where all pairs are most probable.

    Args:
        latents: (N, (L+1)², C).
        gravity_virtual: of each view; used where all have it, since only yaw is open then.
        temperature: of the likelihood.
        ordered: whether views are in the order of a walk; neighbours are then expected to differ little.
    """
    count = len(latents)
    placing = _Placing.of(latents, gravity_virtual, temperature, ordered=ordered)
    rotations = max((placing.begun_with(view) for view in placing.beginnings(_BEGINNINGS)), key=lambda one: one[1])[0]
    rotations = placing.reconciled(rotations)
    edge = placing.edges()
    angle = geodesic_distance(edge, rotations[:, None] @ np.swapaxes(rotations, -1, -2)[None])
    # What a view says of one that looked from elsewhere is no evidence against either.
    cosine = rotations[:, 2] @ rotations[:, 2].T - 2 * np.eye(count)
    near = (cosine > np.cos(_SEEN_BY_BOTH)) | (
        cosine >= -np.sort(-cosine, axis=1)[:, [min(_FEWEST_EDGES, count - 1) - 1]]
    )
    near |= near.T
    agrees = angle < _OUTLIER
    pairs = np.triu_indices(count, 1)
    used = near[pairs]
    agreeing = (agrees & near).sum(axis=1) / np.maximum(near.sum(axis=1), 1)
    inliers = angle[pairs][used & agrees[pairs]]
    residual = float(np.degrees(np.median(inliers))) if len(inliers) else 180.0
    return Averaged(rotations, agreeing, residual, int(used.sum()), int((used & ~agrees[pairs]).sum()))


@dataclass(frozen=True)
class _Placing:
    """Views to be placed in a common frame; arguments as of ``average_rotations``.

    Attributes:
        latents: (N, (L+1)², C), turned upright where gravity is known.
        level: (N, 3, 3) from each virtual camera's axes to those of its latent.
        grid: (G, 3, 3) what a view's rotation may be: any, or a turn about z.
        turns: of the grid.
        temperature: of the likelihood.
        ordered: whether neighbours are expected to differ little.
    """

    latents: Tensor
    level: Array
    grid: Array
    turns: Turns
    temperature: float
    ordered: bool

    @classmethod
    def of(
        cls, latents: Tensor, gravity_virtual: Sequence[Array | None], temperature: float, *, ordered: bool
    ) -> _Placing:
        known = [one for one in gravity_virtual if one is not None]
        latents = latents.float()
        if len(known) < len(latents):
            level = np.broadcast_to(np.eye(3), (len(latents), 3, 3))
            turns = free_turns(_bandwidth(latents), latents.device)
            return cls(latents, level, free_rotations(), turns, temperature, ordered)
        # With z turned up in each, what remains between two views is a turn about z, the same 72 for all pairs.
        level = np.stack([turn_to(-one) for one in known])
        up = wigner_d(torch.tensor(level, dtype=torch.float32, device=latents.device), _bandwidth(latents))
        grid = standing_rotations(_DOWN, _DOWN)
        return cls(rotate(latents, up), level, grid, _turns(grid, latents), temperature, ordered)

    def likelihoods(self, views: Sequence[int], turned: Tensor) -> Tensor:
        """What latents (K, ...) in the common frame say of the grid's rotations of each of some views: (V, G, K)."""
        both = [correlation(self.latents[view].expand(len(turned), -1, -1), turned) for view in views]
        values = self.turns.values(torch.cat(both)) / self.temperature
        return values.unflatten(1, (len(both), len(turned))).transpose(0, 1)

    def beginnings(self, most: int) -> list[int]:
        """Views to begin with: one of each pair that is alike, sure of its rotation, near in time; pairs share none."""
        count = len(self.latents)
        value = np.full((count, count), -np.inf)
        for i in range(1, count):
            each = self.likelihoods([i], self.latents[:i])[0]
            sure = each.max(dim=0).values + torch.log_softmax(each, dim=0).max(dim=0).values
            value[i, :i] = sure.cpu().numpy()
            if self.ordered:
                value[i, :i] -= 0.5 * (np.arange(i, 0, -1) - 1.0) ** 2
        found: list[int] = []
        while len(found) < most and np.isfinite(value).any():
            i, j = (int(one) for one in np.unravel_index(np.argmax(value), value.shape))
            found.append(j)
            value[[i, j]] = -np.inf
            value[:, [i, j]] = -np.inf
        return found

    def begun_with(self, view: int) -> tuple[Array, float]:
        """Rotations (N, 3, 3) from the common frame to the virtual cameras, and how well they explain each other."""
        count = len(self.latents)
        state = _Placed(self)
        state.put(view, np.eye(3))
        while len(state.views) < count:
            outside = [view for view in range(count) if view not in state.views]
            if self.ordered:  # little steps only: of half turns there is no telling over large ones
                gaps = {view: min(abs(view - one) for one in state.views) for view in outside}
                outside = [view for view in outside if gaps[view] == min(gaps.values())]
            chances = {view: state.chances(view) for view in outside}
            chosen = max(outside, key=lambda view: state.margin(view, chances[view]))
            state.put(chosen, state.polished(chosen, self.grid[int(torch.argmax(chances[chosen]))]))
            if len(state.views) in _ASKED_AGAIN:
                state.ask_again()
        for _ in range(_SWEEPS):
            if not state.ask_again():
                break
        return np.stack([self.level[i].T @ state.R[i] for i in range(count)]), state.explained()

    def reconciled(self, rotations: Array) -> Array:
        """All of (N, 3, 3), common frame to virtual cameras, moved to where all pairs together are likeliest.

        Of a thing that looks much the same from side to side every step is taken for smaller than it was, and a whole
        round comes out as three quarters of one: each view is placed by those near it, which hardly tell. Those from
        farther apart do, each a little, and there are many of them. They only move together, as steps add up.
        """
        count, axes = len(rotations), self.axes
        i, j = np.triu_indices(count, 1)
        products = correlation(self.latents[i], self.latents[j]).double().cpu() / self.temperature
        likelihood = HarmonicObjective(products, _bandwidth(self.latents))
        start = self.level @ rotations

        def placed(steps: Array) -> tuple[Array, Array]:
            vectors = steps.reshape(count, len(axes)) @ axes
            return vectors, exp(vectors) @ start

        def falling(steps: Array) -> tuple[float, Array]:
            vectors, R = placed(steps)
            relative = R[i] @ np.swapaxes(R[j], 1, 2)
            at = likelihood(relative)
            slope = np.zeros((count, 3))
            np.add.at(slope, i, at.gradient)
            # exp(ω) before the first of a pair is exp(−ω) behind its relative rotation.
            np.subtract.at(slope, j, np.einsum("pki,pk->pi", relative, at.gradient))
            slope = np.einsum("nki,nk->ni", exp_jacobian(vectors), slope) @ axes.T
            return -float(at.value.sum()) / count, -slope.ravel() / count

        found = minimize(falling, np.zeros(count * len(axes)), jac=True, method="L-BFGS-B", options={"maxiter": 100})
        together: Array = np.swapaxes(self.level, 1, 2) @ placed(found.x)[1]
        return together

    @property
    def axes(self) -> Array:
        """(A, 3) about which a view may turn."""
        return np.array([[0.0, 0.0, 1.0]]) if len(self.grid) < len(free_rotations()) else np.eye(3)

    def edges(self) -> Array:
        """The relative rotation (N, N, 3, 3), from j to i, that each pair alone believes in most."""
        count = len(self.latents)
        edge = np.broadcast_to(np.eye(3), (count, count, 3, 3)).copy()
        for i in range(1, count):
            each = self.likelihoods([i], self.latents[:i])[0].cpu().numpy()
            best = self.grid[each.argmax(axis=0)]
            edge[i, :i] = self.level[i].T @ best @ self.level[:i]
            edge[:i, i] = np.swapaxes(edge[i, :i], -1, -2)
        return edge


class _Placed:
    """Views of a ``_Placing`` that have their rotation in the common frame."""

    def __init__(self, placing: _Placing) -> None:
        self.placing = placing
        count = len(placing.latents)
        self.views: list[int] = []
        self._near: Tensor | None = None
        self.R = np.broadcast_to(np.eye(3), (count, 3, 3)).copy()
        self.turned = torch.zeros_like(placing.latents)
        self.says = torch.zeros(count, count, len(placing.grid), device=placing.latents.device)  # (of, by, grid)

    def put(self, view: int, R: Array) -> None:
        """Place a view, or move it."""
        placing = self.placing
        if view not in self.views:
            self.views.append(view)
        self.R[view] = R
        self._near = None
        back = torch.tensor(R.T[None].copy(), dtype=torch.float32, device=placing.latents.device)
        self.turned[view] = rotate(placing.latents[view][None], wigner_d(back, _bandwidth(placing.latents)))[0]
        everyone = range(len(placing.latents))
        self.says[:, view] = placing.likelihoods(everyone, self.turned[view][None])[..., 0]

    def chances(self, view: int) -> Tensor:
        """Log-probabilities (G,) of a view's rotation on the grid, given the others that are placed."""
        others = [one for one in self.views if one != view]
        return torch.log_softmax(self._together(view, others, self.placing.grid, self.says[view, others].T), dim=0)

    def _together(self, view: int, others: list[int], rotations: Array, says: Tensor) -> Tensor:
        """As ``ViewsBank.fused``, of rotations (G, 3, 3) of which the others say (G, K)."""
        placing = self.placing
        weights = self._weights(view, others, rotations) + 1 / len(others)
        normalised = says - torch.logsumexp(self.says[view, others], dim=1)
        together = (weights * normalised).sum(dim=1)
        if placing.ordered:
            beside = [max((one for one in others if one < view), default=None)]
            beside += [min((one for one in others if one > view), default=None)]
            for one in beside:
                if one is not None:
                    # Between the cameras, not between the upright latents.
                    R_camera = placing.level[view].T @ rotations
                    angle = geodesic_distance(R_camera, placing.level[one].T @ self.R[one])
                    prior = -0.5 * (angle / (_STEP * abs(view - one))) ** 2
                    together = together + torch.tensor(prior, dtype=torch.float32, device=says.device)
        return together

    def _weights(self, view: int, others: list[int], rotations: Array) -> Tensor:
        placing = self.placing
        # Of a grid of all rotations they are the same for all views that are still to be placed.
        same = len(others) == len(self.views) and len(rotations) == len(free_rotations())
        if same and self._near is not None:
            return self._near
        views = np.stack([placing.level[one].T @ self.R[one] for one in others])
        near = view_weights(placing.level[view].T @ rotations, views)
        weights = torch.tensor(near, dtype=torch.float32, device=placing.latents.device)
        self._near = weights if same else self._near
        return weights

    def margin(self, view: int, chances: Tensor) -> float:
        """How much surer the best rotation of a view is than the best that differs from it, and how alike it is."""
        best = int(torch.argmax(chances))
        grid = self.placing.grid
        other = torch.tensor(geodesic_distance(grid, grid[best]) > _OUTLIER, device=chances.device)
        alike = float(self.says[view, self.views].max())
        return float(chances[best] - chances[other].max()) + _ALIKE * alike

    def polished(self, view: int, R: Array) -> Array:
        """A rotation between those of the grid, by small steps."""
        placing = self.placing
        others = [one for one in self.views if one != view]
        both = correlation(placing.latents[view].expand(len(others), -1, -1), self.turned[others])
        axes = np.concatenate([placing.axes, -placing.axes])
        for step in np.radians([6.0, 3.0]):
            for _ in range(2):
                candidates = np.concatenate([R[None], exp(step * axes) @ R])
                says = _turns(candidates, placing.latents).values(both) / placing.temperature
                best = int(torch.argmax(self._together(view, others, candidates, says)))
                if best == 0:
                    break
                R = candidates[best]
        return R

    def ask_again(self) -> bool:
        """Move every placed view to where the others now see it; whether one went elsewhere."""
        changed = False
        for view in list(self.views):
            best = self.placing.grid[int(torch.argmax(self.chances(view)))]
            turned = float(geodesic_distance(best, self.R[view])) > _CLOSED
            changed |= turned
            self.put(view, self.polished(view, best if turned else self.R[view]))
        return changed

    def explained(self) -> float:
        """Mean log-probability of the rotations that the views have, each given the others."""
        grid = self.placing.grid.reshape(-1, 9)
        return float(
            np.mean([float(self.chances(view)[int(np.argmax(grid @ self.R[view].ravel()))]) for view in self.views])
        )


def _bandwidth(latents: Tensor) -> int:
    return round(latents.shape[1] ** 0.5) - 1


def _turns(rotations: Array, latents: Tensor) -> Turns:
    return Turns.of(rotations, _bandwidth(latents), latents.device)
