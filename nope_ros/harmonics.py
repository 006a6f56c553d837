"""Functions on the sphere by their harmonic coefficients, and how a rotation turns them.

A function of bandwidth L is (L+1)² coefficients, ordered by degree l and then m = −l..l (index l² + l + m), of real
orthonormal spherical harmonics. A rotation mixes only coefficients of one degree, exactly and without interpolation:
that is why a latent kept in this form can be turned by ΔR at no loss.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln, lpmv
from torch import Tensor


def spherical_harmonics(directions: NDArray[np.float64], bandwidth: int) -> NDArray[np.float64]:
    """Values (N, (L+1)²) of the real spherical harmonics at unit vectors (N, 3)."""
    x, y, z = np.moveaxis(directions, -1, 0)
    polar, azimuth = np.arctan2(np.hypot(x, y), z), np.arctan2(y, x)
    columns = []
    for degree in range(bandwidth + 1):
        for order in range(-degree, degree + 1):
            m = abs(order)
            # Not scipy's sph_harm_y, which distributions do not have yet, nor sph_harm, which it has replaced.
            size = np.exp(0.5 * (gammaln(degree - m + 1) - gammaln(degree + m + 1)))
            value = size * np.sqrt((2 * degree + 1) / (4 * np.pi)) * lpmv(m, degree, np.cos(polar))
            if order != 0:
                value = value * (-1) ** m * np.sqrt(2) * (np.cos(m * azimuth) if order > 0 else np.sin(m * azimuth))
            columns.append(value)
    return np.stack(columns, axis=-1)


def degree_slices(bandwidth: int) -> list[slice]:
    """Where each degree's 2l+1 coefficients stand."""
    return [slice(degree**2, (degree + 1) ** 2) for degree in range(bandwidth + 1)]


@cache
def _z_to_y(bandwidth: int) -> list[Tensor]:
    # D(X) of the quarter turn X about x with X z = y, found from Y(X p) = D(X) Y(p) at more points than unknowns.
    points = np.random.default_rng(0).normal(size=(4 * (bandwidth + 1) ** 2, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    quarter_turn = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    before = spherical_harmonics(points, bandwidth)
    after = spherical_harmonics(points @ quarter_turn.T, bandwidth)
    return [
        torch.from_numpy(np.linalg.lstsq(before[:, s], after[:, s], rcond=None)[0].T.copy())
        for s in degree_slices(bandwidth)
    ]


def _turn_about_z(matrix: Tensor, angle: Tensor, degree: int) -> Tensor:
    # Z(angle) @ matrix: cos(mφ) and sin(mφ) mix by the angle mα; row −m is row m read backwards.
    orders = torch.arange(-degree, degree + 1, device=angle.device, dtype=angle.dtype)
    phase = angle[..., None] * orders
    return phase.cos()[..., None] * matrix - phase.sin()[..., None] * matrix.flip(-2)


def wigner_d(R: Tensor, bandwidth: int) -> list[Tensor]:
    """The matrices D_l(R) with Y(R x) = D(R) Y(x); coefficients c of a function turn into D(R) c.

    From the Euler angles R = R_z(α) R_y(β) R_z(γ), where R_y(β) = X R_z(β) Xᵀ with a fixed quarter turn X, so that
    only turns about z, which are cosines and sines, depend on R.

    Args:
        R: (N, 3, 3) rotations.
        bandwidth: L.

    Returns:
        For each degree l = 0..L a tensor (N, 2l+1, 2l+1).
    """
    beta = torch.atan2(torch.hypot(R[:, 0, 2], R[:, 1, 2]), R[:, 2, 2])
    alpha = torch.atan2(R[:, 1, 2], R[:, 0, 2])
    # γ from what is left of R after undoing α: right at β = 0 and π too, where α is arbitrary.
    sine, cosine = alpha.sin(), alpha.cos()
    gamma = torch.atan2(cosine * R[:, 1, 0] - sine * R[:, 0, 0], cosine * R[:, 1, 1] - sine * R[:, 0, 1])
    result = []
    for degree, quarter in enumerate(_z_to_y(bandwidth)):
        X = quarter.to(R)
        right = _turn_about_z(torch.eye(2 * degree + 1).to(R).expand(len(R), -1, -1), gamma, degree)
        middle = _turn_about_z(X.T @ right, beta, degree)
        result.append(_turn_about_z(X @ middle, alpha, degree))
    return result


def rotate(coefficients: Tensor, D: list[Tensor]) -> Tensor:
    """Turn coefficients (N or 1, (L+1)², C) by D_l (N, 2l+1, 2l+1): (N, (L+1)², C)."""
    parts = [block @ coefficients[:, s] for block, s in zip(D, degree_slices(len(D) - 1), strict=True)]
    return torch.cat(parts, dim=1)


@cache
def generators(bandwidth: int) -> Tensor:
    """What an infinitesimal turn does: D(exp(ω)) = exp(Σ ω_i J_i); (3, (L+1)², (L+1)²) float64, each J antisymmetric.

    J_z mixes orders m and −m; the others are J_z between quarter turns that bring their axis to z.
    """
    size = (bandwidth + 1) ** 2
    about_z = torch.zeros(size, size, dtype=torch.float64)
    for degree, s in enumerate(degree_slices(bandwidth)):
        orders = torch.arange(-degree, degree + 1, dtype=torch.float64)
        about_z[s, s] = -torch.diag(orders).flip(1)
    turns = torch.tensor(
        [[[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], [[1, 0, 0], [0, 0, 1], [0, -1, 0]]], dtype=torch.float64
    )  # z to x about y, and z to y about x
    to_x, to_y = (torch.block_diag(*blocks) for blocks in zip(*wigner_d(turns, bandwidth), strict=True))
    result = torch.stack([to_x @ about_z @ to_x.T, to_y @ about_z @ to_y.T, about_z])
    result[result.abs() < 1e-12] = 0
    return result
