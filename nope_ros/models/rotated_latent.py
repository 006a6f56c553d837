"""A predictor whose latent is a function in 3D that ΔR turns explicitly, trained on the pose likelihood.

A U-Net lifts one crop to features in a ball around the object, kept as spherical harmonics; predicting a new view is
turning them, which is exact, needs no training and is cheap: F(e_r, ΔR) = S D(ΔR) e_r, where D turns harmonics and S
changes the sign of a fifth of the channels (``as_template``). With one context token, the cross-attention of NOPE's
U-Net adds one vector at every pixel, so rotation has to be learned from scratch there; 3DAHV (Zhao et al., ICLR 2024)
and DVMNet (Zhao et al., CVPR 2024) make the same case for an explicit 3D latent, and Image2Sphere (Klee et al.,
ICLR 2023) for one in harmonics.

Turning keeps norms, so NOPE's likelihood −‖F(e_r, ΔR) − e_q‖² (Nguyen et al., CVPR 2024, Eq. 4) is a scalar product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nope_ros.harmonics import degree_slices, rotate, spherical_harmonics, wigner_d
from nope_ros.rotations import icosphere


@dataclass(frozen=True)
class RotatedLatentConfig:
    """Sizes of the network.

    Attributes:
        crop_size: side of the input, pixels; a multiple of 16.
        widths: channels at 1/4, 1/8 and 1/16 of the input.
        bandwidth: highest spherical harmonic degree L of the latent.
        channels: channels of the latent: what is known of each place on the sphere. Matching hardly depends on it.
        depths: slabs along the optical axis into which each pixel is lifted.
        lifted_channels: channels of a lifted cell.
        sphere_blocks: residual blocks on the sphere after lifting.
    """

    crop_size: int = 128
    widths: tuple[int, int, int] = (64, 128, 256)
    bandwidth: int = 8
    channels: int = 80
    depths: int = 8
    lifted_channels: int = 32
    sphere_blocks: int = 2

    def to_dict(self) -> dict[str, object]:
        """Plain values for config.json."""
        return asdict(self)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same shape."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class _Attention(nn.Module):
    """Self-attention over all positions: parts that belong together lie far apart."""

    def __init__(self, channels: int, positions: int, heads: int = 4) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions, channels) * 0.02)
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            part.reshape(batch, height * width, self.heads, -1).transpose(1, 2)
            for part in self.to_qkv(self.norm(tokens + self.position)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


def _resampled(places: Tensor, count: int) -> Tensor:
    """What is known of the cells of a square, (n², C), for one of other cells (``count``, C)."""
    sides = round(len(places) ** 0.5), round(count**0.5)
    if sides[0] == sides[1]:
        return places
    square = places.T.reshape(1, -1, sides[0], sides[0])
    other = F.interpolate(square.float(), size=(sides[1], sides[1]), mode="bicubic", align_corners=False)
    return other.reshape(places.shape[1], -1).T.to(places.dtype).contiguous()


def downsample(channels_in: int, channels_out: int) -> nn.Sequential:
    """Half the resolution."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class _Up(nn.Module):
    """Double the resolution and join the encoder's features of that resolution."""

    def __init__(self, channels_in: int, channels_skip: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in + channels_skip, channels_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.relu(self.norm(self.conv(torch.cat([x, skip], dim=1))))


class _PerDegree(nn.Module):
    """A linear map of channels, one for each degree: the only linear maps that commute with every rotation."""

    degrees: Tensor

    def __init__(self, bandwidth: int, channels_in: int, channels_out: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(bandwidth + 1, channels_in, channels_out) * gain * channels_in**-0.5)
        degrees = torch.cat([torch.full((2 * degree + 1,), degree) for degree in range(bandwidth + 1)])
        self.register_buffer("degrees", degrees, persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:  # (B, (L+1)², C_in) → (B, (L+1)², C_out)
        weights = self.weight[self.degrees]
        return torch.einsum("bmc,mcd->bmd", coefficients, weights.to(coefficients.dtype))


class _SphereBlock(nn.Module):
    """A residual block in harmonics: to points of a sphere, a small network at each point, and back."""

    to_points: Tensor
    to_harmonics: Tensor

    def __init__(self, bandwidth: int, channels: int) -> None:
        super().__init__()
        points = icosphere(3 if bandwidth > 9 else 2)
        values = spherical_harmonics(points, bandwidth)
        self.register_buffer("to_points", torch.from_numpy(values).float(), persistent=False)
        self.register_buffer("to_harmonics", torch.from_numpy(np.linalg.pinv(values)).float(), persistent=False)
        self.mix = _PerDegree(bandwidth, channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.point1 = nn.Linear(channels, 2 * channels)
        self.point2 = nn.Linear(2 * channels, channels)
        self.out = _PerDegree(bandwidth, channels, channels, gain=0.1)

    def forward(self, coefficients: Tensor) -> Tensor:
        at_points = torch.matmul(self.to_points.to(coefficients.dtype), self.mix(coefficients))
        h = self.point2(F.gelu(self.point1(self.norm(at_points))))
        return coefficients + self.out(torch.matmul(self.to_harmonics.to(h.dtype), h))


def _ball_basis(grid: int, depths: int, bandwidth: int, radii: int = 4) -> np.ndarray:
    """Harmonics times radial bumps at the cells of a ball: (depths·grid·grid, (L+1)²·radii), cells z-major."""
    # The enclosing circle of the mask, which fills 0.9 of the crop, has radius 0.9 here.
    centres = (np.arange(grid) + 0.5) / grid * 2 - 1
    slabs = (np.arange(depths) + 0.5) / depths * 2 - 1
    z, y, x = np.meshgrid(slabs, centres, centres, indexing="ij")
    cells = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    radius = np.linalg.norm(cells, axis=1)
    angular = spherical_harmonics(cells / np.maximum(radius, 1e-9)[:, None], bandwidth)
    bump_centres = np.linspace(0.25, 1.0, radii)
    radial = np.exp(-0.5 * ((radius[:, None] - bump_centres) / 0.15) ** 2) * (radius < 1.2)[:, None]
    basis = (angular[:, :, None] * radial[:, None, :]).reshape(len(cells), -1)
    # Unit columns: cells of unit variance give coefficients of unit variance, whatever the size of the shell.
    return basis / np.linalg.norm(basis, axis=0, keepdims=True)


class CropUNet(nn.Module):
    """Crop → features at a quarter of its resolution, each of which has seen the whole crop.

    Args:
        crop_size: side of the input, pixels; a multiple of 16.
        widths: channels at 1/4, 1/8 and 1/16 of the input.
    """

    def __init__(self, crop_size: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        w1, w2, w3 = widths
        self.stem = nn.Sequential(nn.Conv2d(4, w1, 8, stride=4, padding=2, bias=False), nn.BatchNorm2d(w1), nn.ReLU())
        self.encode1 = nn.Sequential(ResidualBlock(w1), ResidualBlock(w1))
        self.down2, self.encode2 = downsample(w1, w2), nn.Sequential(ResidualBlock(w2), ResidualBlock(w2))
        self.down3 = downsample(w2, w3)
        self.encode3 = nn.Sequential(
            ResidualBlock(w3), ResidualBlock(w3), _Attention(w3, (crop_size // 16) ** 2), ResidualBlock(w3)
        )
        self.up2, self.decode2 = _Up(w3, w2, w2), ResidualBlock(w2)
        self.features_out = w1 + w1 // 2
        self.up1 = _Up(w2, w1, self.features_out)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the same network for crops of another size as a state of this one.

        What was learned of places is resampled. The network then has to get used to seeing everything larger or
        smaller: it takes a few hundred steps of training.
        """
        own, found = self.state_dict(), dict(state)
        for name in found.keys() & own.keys():
            if name.endswith(".position") and found[name].shape[1:] == own[name].shape[1:]:
                found[name] = _resampled(found[name], len(own[name]))
        return found

    def features(self, crops: Tensor, told: Sequence[Tensor] | None = None) -> Tensor:
        """Features (B, features_out, S/4, S/4) of crops (B, 4, S, S).

        Args:
            crops: see ``crops_to_tensor``.
            told: added to what is seen, at 1/4, 1/8 and 1/16 of the input: (B, widths[n], 1, 1) each.
        """
        t1, t2, t3 = told if told is not None else (0.0, 0.0, 0.0)
        x1 = self.encode1(self.stem(crops) + t1)
        x2 = self.encode2(self.down2(x1) + t2)
        x3 = self.encode3(self.down3(x2) + t3)
        features: Tensor = self.up1(self.decode2(self.up2(x3, x2)), x1)
        return features


class RotatedLatentNetwork(CropUNet):
    """Crop → latent: (B, 4, S, S) in −1..1 (RGB black outside the mask, and the mask) → (B, (L+1)², channels).

    It is told which crops are level.
    """

    basis: Tensor

    def __init__(self, config: RotatedLatentConfig) -> None:
        super().__init__(config.crop_size, config.widths)
        self.config = config
        # A level crop may be read otherwise than one of any roll: its up is the object's.
        self.level = nn.ParameterList([nn.Parameter(torch.zeros(width)) for width in config.widths])
        self.lift = nn.Conv2d(self.features_out, config.depths * config.lifted_channels, 1)
        basis = _ball_basis(config.crop_size // 4, config.depths, config.bandwidth)
        self.register_buffer("basis", torch.from_numpy(basis).float(), persistent=False)
        self.radii = basis.shape[1] // (config.bandwidth + 1) ** 2
        inner = config.lifted_channels * 2
        self.mix = _PerDegree(config.bandwidth, config.lifted_channels * self.radii, inner)
        self.blocks = nn.Sequential(*(_SphereBlock(config.bandwidth, inner) for _ in range(config.sphere_blocks)))
        self.out = _PerDegree(config.bandwidth, inner, config.channels, gain=0.1)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``CropUNet.adapted``; a ball of more cells gives larger coefficients, which is taken back."""
        found = super().adapted(state)
        for name, places in state.items():
            if name.endswith(".position") and "mix.weight" in found:
                found["mix.weight"] = found["mix.weight"] * (len(places) / len(found[name])) ** 0.5
        return found

    def forward(self, crops: Tensor, level: Tensor) -> Tensor:
        """Latents (B, (L+1)², channels) of crops (B, 4, S, S), and of whether gravity removed the roll of each (B,)."""
        one = level.to(crops)[:, None, None, None]
        lifted = self.lift(self.features(crops, [one * learned[:, None, None] for learned in self.level]))
        batch = len(lifted)
        cells = lifted.reshape(batch, self.config.lifted_channels, -1)  # (B, C, depth·y·x)
        # Each row: one channel's cells, read by every (harmonic, bump).
        coefficients = torch.matmul(cells, self.basis.to(cells.dtype)).float()
        coefficients = coefficients.reshape(batch, self.config.lifted_channels, -1, self.radii)
        coefficients = coefficients.permute(0, 2, 1, 3).flatten(2)  # (B, (L+1)², C·radii)
        latent: Tensor = self.out(self.blocks(self.mix(coefficients)))
        return latent


def as_template(latents: Tensor) -> Tensor:
    """Latents (..., C) as what a query is compared with: the channels that count against have their sign changed.

    A scalar product of two latents of one kind can say that what both saw is alike, or that they saw nothing in common,
    but never that what both saw differs: a hypothesis under which all is seen and nothing fits would be as good as one
    under which nothing is seen twice. The last fifth of the channels count against, so that overlap has its price.
    """
    against = latents.shape[-1] // 5
    sign = torch.ones(latents.shape[-1], device=latents.device, dtype=latents.dtype)
    sign[latents.shape[-1] - against :] = -1
    return latents * sign


def turned(latents: Tensor, R: Tensor) -> Tensor:
    """Latents (N or 1, (L+1)², C) as seen after the rotations R (N, 3, 3): D(R) e."""
    bandwidth = round(latents.shape[1] ** 0.5) - 1
    return rotate(latents, wigner_d(R, bandwidth))


def correlation(latents_query: Tensor, latents_reference: Tensor) -> Tensor:
    """What two latents (B, (L+1)², C) say about every rotation at once: (B, Σ(2l+1)²).

    Its scalar product with the flattened D_l(R) (see ``flatten_d``) is ⟨e_q, S D(R) e_r⟩.
    """
    bandwidth = round(latents_query.shape[1] ** 0.5) - 1
    latents_reference = as_template(latents_reference)
    return torch.cat(
        [
            torch.einsum("bmc,bnc->bmn", latents_query[:, s], latents_reference[:, s]).flatten(1)
            for s in degree_slices(bandwidth)
        ],
        dim=1,
    )


def flatten_d(D: list[Tensor]) -> Tensor:
    """D_l blocks (N, 2l+1, 2l+1) side by side: (N, Σ(2l+1)²)."""
    return torch.cat([block.flatten(1) for block in D], dim=1)


def by_roll(harmonics: Tensor) -> Tensor:
    """Functions of rotations as Fourier series: (K, Σ(2l+1)²) to (K, Σ(2l+1)², 2L+1).

    The scalar products of the flattened D(R) with the columns are the terms of
    f(R R_z(ψ)) = Σ_n a_n cos nψ + b_n sin nψ: first a_0 to a_L, then b_1 to b_L.
    """
    bandwidth = bandwidth_of(harmonics.shape[1])
    order, mirrored = _orders(bandwidth)
    order, mirrored = order.to(harmonics.device), mirrored.to(harmonics.device)
    terms = harmonics.new_zeros(*harmonics.shape, 2 * bandwidth + 1)
    at = torch.arange(len(order), device=harmonics.device)
    terms[:, at, order.abs()] = harmonics
    # R_z(ψ) takes column n of D to cos nψ times itself and sin nψ times column −n.
    rolled = at[order != 0]
    terms[:, rolled, bandwidth + order[rolled].abs()] = -order[rolled].sign() * harmonics[:, mirrored[rolled]]
    return terms


@cache
def _orders(bandwidth: int) -> tuple[Tensor, Tensor]:
    """Of each entry (m, n) of the flattened D: n (Σ(2l+1)²,), and where (m, −n) stands (Σ(2l+1)²,)."""
    order, mirrored, first = [], [], 0
    for degree in range(bandwidth + 1):
        size = 2 * degree + 1
        block = torch.arange(first, first + size**2).reshape(size, size)
        order.append((torch.arange(size) - degree).repeat(size))
        mirrored.append(block.flip(1).flatten())
        first += size**2
    return torch.cat(order), torch.cat(mirrored)


def turn_harmonics(harmonics: Tensor, R: Tensor) -> Tensor:
    """A function of rotations carried along by a turn R (3, 3) on the left: f(X) becomes f(Rᵀ X), exactly.

    Args:
        harmonics: (Σ(2l+1)²,) coefficients of the flattened D, as ``correlation`` gives them.
        R: the turn.
    """
    parts, first = [], 0
    for block in wigner_d(R[None].to(harmonics), bandwidth_of(len(harmonics))):
        size = block.shape[-1]
        parts.append((block[0] @ harmonics[first : first + size**2].reshape(size, size)).flatten())
        first += size**2
    return torch.cat(parts)


def blur_harmonics(harmonics: Tensor, angle: float) -> Tensor:
    """The same function after a random walk of rotations by ``angle``, radians (standard deviation about each axis)."""
    sizes = [2 * degree + 1 for degree in range(bandwidth_of(len(harmonics)) + 1)]
    kept = [np.full(size**2, np.exp(-(size**2 - 1) * angle**2 / 8)) for size in sizes]  # l(l+1)/2 = ((2l+1)²−1)/8
    return harmonics * torch.from_numpy(np.concatenate(kept)).to(harmonics)


def bandwidth_of(count: int) -> int:
    """L of harmonics of rotations that are so many: Σ(2l+1)² = (L+1)(2L+1)(2L+3)/3."""
    bandwidth = 0
    while (bandwidth + 1) * (2 * bandwidth + 1) * (2 * bandwidth + 3) // 3 < count:
        bandwidth += 1
    return bandwidth
