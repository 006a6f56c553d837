"""NOPE's own form (Nguyen et al., CVPR 2024): the U-Net predicts the VAE's latent of a view that nobody has seen.

A frozen autoencoder turns the reference's crop into a latent; a U-Net, told the relative rotation through
cross-attention at every level, turns it into the latent of the new view. Trained on the distance between the two, it
predicts the average over all objects that agree with the reference, so that sides nobody saw come out blurred and not
invented.

Both networks are diffusers' own, so that Stable Diffusion's published autoencoder fits. The paper's U-Net is
conditioned on nothing but the rotation; diffusers' also asks for a time, which stays zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn


@dataclass(frozen=True)
class PaperUNetConfig:
    """Sizes of the two networks; the defaults are the compact form. See ``paper`` and ``compact``.

    Attributes:
        crop_size: side of the input, pixels; a multiple of what autoencoder and U-Net divide it by.
        latent_channels: channels of the autoencoder's latent.
        vae_widths: channels of the autoencoder, level by level; each level but the last halves the resolution.
        vae_layers: residual blocks of each level of its encoder.
        vae_norm_groups: groups of its normalisations.
        scaling_factor: brings the latent to unit variance.
        vae: folder, or ``org/name`` in the hub cache, of an autoencoder kept apart from these weights (a subfolder
            ``vae`` is found too); empty if it is stored with them.
        unet_widths: channels of the U-Net, level by level.
        unet_layers: residual blocks of each level.
        heads: of each attention.
        context: numbers in the token that tells the rotation.
    """

    crop_size: int = 64
    latent_channels: int = 8
    vae_widths: tuple[int, ...] = (32, 64, 64)
    vae_layers: int = 1
    vae_norm_groups: int = 8
    scaling_factor: float = 1.0
    vae: str = ""
    unet_widths: tuple[int, ...] = (64, 128, 192)
    unet_layers: int = 1
    heads: int = 4
    context: int = 128

    def __post_init__(self) -> None:
        """Refuse sizes that make no network.

        Raises:
            ValueError: naming the size.
        """
        for name in ("vae_widths", "unet_widths"):
            widths = getattr(self, name)
            if not widths or min(widths) < 1 or max(widths) > 4096:
                raise ValueError(f"{name} {widths} must be between 1 and 4096")
        for name, largest in (
            ("latent_channels", 64),
            ("vae_layers", 8),
            ("unet_layers", 8),
            ("heads", 64),
            ("context", 4096),
            ("crop_size", 1024),
        ):
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} {getattr(self, name)} is not within 1..{largest}")
        if not 0 < self.scaling_factor < 1e6:
            raise ValueError(f"scaling_factor {self.scaling_factor} is not positive")
        if self.vae_norm_groups < 1 or any(width % self.vae_norm_groups for width in self.vae_widths):
            raise ValueError(f"vae_widths {self.vae_widths} do not divide into {self.vae_norm_groups} groups")
        if any(width % 32 or width % self.heads for width in self.unet_widths):
            raise ValueError(f"unet_widths {self.unet_widths} must be multiples of 32 and of heads, {self.heads}")
        divisor = 2 ** (len(self.vae_widths) + len(self.unet_widths) - 2)
        if self.crop_size % divisor:
            raise ValueError(f"crop_size {self.crop_size} is not a multiple of {divisor}")

    @classmethod
    def paper(cls, vae: str = "") -> PaperUNetConfig:
        """The paper's sizes on Stable Diffusion's autoencoder.

        Args:
            vae: where that autoencoder's weights are; empty makes an untrained one of the same size.
        """
        return cls(
            crop_size=256,
            latent_channels=4,
            vae_widths=(128, 256, 512, 512),
            vae_layers=2,
            vae_norm_groups=32,
            scaling_factor=0.18215,
            vae=vae,
            unet_widths=(256, 512, 1024),
            unet_layers=2,
            heads=8,
            context=512,
        )

    @classmethod
    def compact(cls) -> PaperUNetConfig:
        """Sizes that a CPU serves, and trains."""
        return cls()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.crop_size // 2 ** (len(self.vae_widths) - 1)
        return self.latent_channels, side, side

    def to_dict(self) -> dict[str, object]:
        """Plain values for config.json."""
        return asdict(self)


class PaperUNet(nn.Module):
    """Autoencoder and U-Net: reference latent (B, C, h, w) and rotation (B, 3, 3) → predicted latent (B, C, h, w).

    Args:
        config: sizes.
        vae_folder: holds the autoencoder if ``config.vae`` says that it is kept apart.
    """

    vae: Any  # diffusers carries no types
    unet: Any

    def __init__(self, config: PaperUNetConfig, vae_folder: Path | None = None) -> None:
        super().__init__()
        self.config = config
        if config.vae and vae_folder is None:
            raise ValueError(f"vae: '{config.vae}' has to be found first, pass its folder")
        self.vae_is_external = vae_folder is not None
        self.vae = _load_vae(vae_folder, config) if vae_folder else _new_vae(config)
        self.unet = UNet2DConditionModel(
            sample_size=config.latent_shape[1],
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            down_block_types=("CrossAttnDownBlock2D",) * len(config.unet_widths),
            up_block_types=("CrossAttnUpBlock2D",) * len(config.unet_widths),
            block_out_channels=config.unet_widths,
            layers_per_block=config.unet_layers,
            attention_head_dim=config.heads,  # diffusers' name; it is the number of heads
            cross_attention_dim=config.context,
        )
        self.rotation_mlp = nn.Sequential(
            nn.Linear(6, config.context), nn.GELU(), nn.Linear(config.context, config.context)
        )

    def freeze_vae(self) -> None:
        """Keep the autoencoder as it is: the U-Net learns to predict its latents, which must stand still."""
        self.vae.requires_grad_(False)
        self.vae.eval()

    def encode(self, crops: Tensor) -> Tensor:
        """Crops (B, 4, S, S) in −1..1 (RGB black outside the mask, and the mask) → latents (B, C, h, w).

        The autoencoder sees RGB only: black is the paper's mask.
        """
        # The mode: a sample would differ from one call to the next.
        latents: Tensor = self.vae.encode(crops[:, :3]).latent_dist.mode()
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → RGB (B, 3, S, S) in −1..1; shows what a template stands for."""
        images: Tensor = self.vae.decode(latents / self.config.scaling_factor).sample
        return images

    def forward(self, latents: Tensor, R: Tensor) -> Tensor:
        """Latents of the reference (B, C, h, w), and ΔR (B, 3, 3) → latents of the new view (B, C, h, w)."""
        token = self.rotation_mlp(rotation_to_6d(R))[:, None]
        predicted: Tensor = self.unet(latents, 0, encoder_hidden_states=token).sample
        return predicted

    def vae_loss(self, crops: Tensor, kl_weight: float = 1e-6) -> Tensor:
        """The autoencoder's loss on crops (B, 4, S, S) in −1..1: L1 of the reconstruction, and a little divergence.

        The divergence only keeps latents near the origin, so that their distances mean something; its weight is Stable
        Diffusion's.
        """
        posterior = self.vae.encode(crops[:, :3]).latent_dist
        reconstruction = self.vae.decode(posterior.sample()).sample
        # Sum over a latent's numbers for each pixel, as in the evidence bound.
        divergence = posterior.kl().mean() / crops[0, 0].numel()
        loss: Tensor = F.l1_loss(reconstruction, crops[:, :3]) + kl_weight * divergence
        return loss

    @torch.no_grad()
    def fit_scaling_factor(self, crops: Tensor) -> float:
        """Set ``scaling_factor`` so that latents of crops (B, 4, S, S) have unit variance; before the U-Net learns."""
        spread = self.encode(crops).float().std().item() / self.config.scaling_factor
        self.config = replace(self.config, scaling_factor=1.0 / max(spread, 1e-6))
        return self.config.scaling_factor

    def prediction_loss(
        self, latents_reference: Tensor, latents_query: Tensor, delta_R: Tensor, distance: Literal["l1", "l2"] = "l1"
    ) -> Tensor:
        """The U-Net's loss on pairs, in both directions as in the paper.

        Args:
            latents_reference: (B, C, h, w) from ``encode``.
            latents_query: (B, C, h, w) of the same objects, seen otherwise.
            delta_R: (B, 3, 3), R_query · R_referenceᵀ.
            distance: the paper writes L2, its released configurations use L1.
        """
        sources = torch.cat([latents_reference, latents_query])
        targets = torch.cat([latents_query, latents_reference])
        predicted = self(sources, torch.cat([delta_R, delta_R.mT])).float()
        return F.l1_loss(predicted, targets) if distance == "l1" else F.mse_loss(predicted, targets)


def rotation_to_6d(R: Tensor) -> Tensor:
    """The first two rows of R (B, 3, 3): (B, 6), a form of rotation without jumps."""
    return R[:, :2].flatten(1)


def _new_vae(config: PaperUNetConfig) -> Any:
    levels = len(config.vae_widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_widths,
        layers_per_block=config.vae_layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.vae_norm_groups,
        sample_size=config.crop_size,
        scaling_factor=config.scaling_factor,
    )


def _load_vae(folder: Path, config: PaperUNetConfig) -> Any:
    # Never a download, and never a pickle.
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    if vae.config.latent_channels != config.latent_channels or 2 ** (len(vae.config.block_out_channels) - 1) != (
        config.crop_size // config.latent_shape[1]
    ):
        raise ValueError(
            f"the autoencoder in {folder} makes latents of {vae.config.latent_channels} channels at 1/"
            f"{2 ** (len(vae.config.block_out_channels) - 1)} of the crop, the U-Net takes {config.latent_shape} "
            f"of a {config.crop_size} px crop"
        )
    return vae
