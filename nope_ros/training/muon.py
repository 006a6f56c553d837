"""An optimiser that makes every update of a matrix a rotation of full rank: fewer steps for the same loss."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al. 2024), at AdamW's learning rates (Liu et al. 2025).

    Groups with ``matrix=True`` hold parameters of two or more dimensions: convolutions (out, in, k, k) count as out ×
    in·k·k matrices, stacks (N, in, out) as N matrices. The others get AdamW.

    Args:
        groups: parameter groups with ``params``, ``matrix``, ``weight_decay``; and ``pace``, where they are to learn
            at another rate than the others: the factor on it, for whoever sets the rates.
        lr: of both kinds; an update has the root mean square of one of AdamW's, 0.2.
        momentum: of the matrices.
        betas: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "momentum": momentum, "betas": betas, "matrix": False, "pace": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            updates: list[tuple[Tensor, Tensor]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    if not group["matrix"]:
                        state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                if group["matrix"]:
                    momentum = state["exp_avg"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                    updates.append((p, ahead.flatten(1) if p.ndim == 4 else ahead))
                else:
                    first, second = group["betas"]
                    n = state["step"].item()
                    state["exp_avg"].lerp_(p.grad, 1 - first)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                    root = (state["exp_avg_sq"] / (1 - second**n)).sqrt_().add_(1e-8)
                    p.mul_(1 - lr * decay).addcdiv_(state["exp_avg"], root, value=-lr / (1 - first**n))
            updates.sort(key=lambda pair: tuple(pair[1].shape))
            for shape, same in groupby(updates, key=lambda pair: pair[1].shape):
                pairs = list(same)
                stacked = torch.stack([update for _, update in pairs])
                turned = orthogonalised(stacked).mul_(0.2 * max(shape[-2:]) ** 0.5)
                for (p, _), update in zip(pairs, turned, strict=True):
                    p.mul_(1 - lr * decay).add_(update.reshape(p.shape), alpha=-lr)


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """U Vᵀ of matrices (..., m, n) = U S Vᵀ, nearly: a Newton-Schulz iteration that brings S into 0.7..1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
