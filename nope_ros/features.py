"""Features of places on an object by a network of the user's choice: a vision transformer's checkpoint on disk.

A torch.hub checkpoint is a file of tensors without the program that made them; the network is built here, from the
tensors' shapes. That of DINO, DINOv2 (with and without registers) and timm's plain ViT is one: the same names, and what
one of them lacks is left out. Nothing is fetched, and no program of the checkpoint's runs: safetensors are read as they
are, ``.pth`` by torch's reader that makes tensors and nothing else.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nope_ros.latent import WeightsError, resolve_device

# Of the images that they were all trained on.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD = 64
"""Channels of an attention head, in all of them."""
_SIDE = 16
"""Patches to a side of a crop."""
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
# What is wrapped around the weights by those who save more than one network, and what is no part of the features.
_WRAPPERS = ("teacher", "model", "state_dict")
_NO_FEATURES = re.compile(r"(head|mask_token|fc_norm|pre_logits)")


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(width // _HEAD, 1)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mixed


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _Mlp(width, hidden)
        self.ls1, self.ls2 = (_Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        mixed: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return mixed


class VisionTransformer(nn.Module):
    """Images to the features of their patches; arguments are the sizes of the checkpoint's tensors."""

    def __init__(
        self, *, width: int, patch: int, depth: int, hidden: int, positions: int, registers: int, scaled: bool
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.registers, self.patch = registers, patch
        self.blocks = nn.ModuleList(_Block(width, hidden, scaled) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, S/patch, S/patch, width) of normalised images (B, 3, S, S)."""
        patches = self.patch_embed["proj"](images)
        side = patches.shape[-1]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = x + self._positions(side)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(images), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.norm(x)[:, 1 + self.registers :]
        return features.unflatten(1, (side, side))

    def _positions(self, side: int) -> Tensor:
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        stored = round(of_patches.shape[1] ** 0.5)
        if stored == side:
            return self.pos_embed
        grid = of_patches.unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        return torch.cat([of_class, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that says what places in an image look like.

    Attributes:
        name: of the checkpoint.
        network: see there.
    """

    name: str
    network: VisionTransformer

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str = "auto") -> FeatureExtractor:
        """Read a checkpoint file of DINO, DINOv2 or timm's plain ViT: ``.safetensors``, or torch's ``.pth``.

        Raises:
            WeightsError: if it is no file of tensors, or not of such a network.
        """
        path = Path(path).expanduser()
        state = _tensors(path)
        network = _build(state, path)
        return cls(path.stem, network.to(resolve_device(device)).eval())

    def at(self, crops: NDArray[np.uint8], pixels: NDArray[np.floating]) -> Tensor:
        """Unit features (K, N, C) at pixels (K, N, 2) of crops (K, S, S, 3 or 4) RGB; zero where a pixel is NaN."""
        parameter = next(self.network.parameters())
        images = torch.from_numpy(np.ascontiguousarray(crops[..., :3])).to(parameter).permute(0, 3, 1, 2) / 255
        images = F.interpolate(images, (_SIDE * self.network.patch,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(one).to(parameter)[:, None, None] for one in (_MEAN, _DEVIATION))
        size = crops.shape[1]
        where = torch.from_numpy(np.ascontiguousarray(pixels)).to(parameter)
        with torch.inference_mode():
            maps = self.network((images - mean) / deviation).permute(0, 3, 1, 2)
            # Pixel centres are integers; grid_sample's −1..1 goes from border to border.
            grid = ((where + 0.5) / size * 2 - 1).nan_to_num(2.0)
            found = F.grid_sample(maps, grid[:, None], align_corners=False, padding_mode="border")[:, :, 0]
            unit = F.normalize(found.transpose(1, 2), dim=-1)
            return (unit * where.isfinite().all(dim=-1, keepdim=True)).cpu()


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise WeightsError(
            f"features: {path} is a folder; a torch.hub repository is a program, which is not run: give the checkpoint "
            "file itself (.safetensors or .pth)"
        )
    if not path.is_file():
        raise WeightsError(f"features: there is no file {path}; nothing is downloaded, give a checkpoint that is there")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in _PICKLED:
            raise WeightsError(f"features: {path} is neither .safetensors nor one of {', '.join(_PICKLED)}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"features: {path} is damaged, or holds more than tensors, which could be a program and is not opened "
            f"({reason[:120]}); give a file of tensors alone"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"features: {path} holds no table of named tensors")
    return {re.sub(r"^(module\.)?(backbone\.)?", "", str(name)): value for name, value in content.items()}


def _build(state: dict[str, Tensor], path: Path) -> VisionTransformer:
    """The network whose tensors these are."""
    state = {name: value.float() for name, value in state.items() if not _NO_FEATURES.match(name)}
    shape = {name: tuple(value.shape) for name, value in state.items()}
    try:
        width, _, patch, _ = shape["patch_embed.proj.weight"]
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        positions = shape["pos_embed"][1]
        stored = round((positions - 1) ** 0.5)
        if stored**2 != positions - 1 or width % max(width // _HEAD, 1):
            raise ValueError("positions are not of a square, or channels not of whole heads")
        network = VisionTransformer(
            width=width,
            patch=patch,
            depth=depth,
            hidden=shape["blocks.0.mlp.fc1.weight"][0],
            positions=positions,
            registers=shape.get("register_tokens", (1, 0))[1],
            scaled="blocks.0.ls1.gamma" in shape,
        )
        network.load_state_dict(state)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"features: {path} is not of a vision transformer as DINO, DINOv2 and timm name its parts ({reason[:200]})"
        ) from None
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise WeightsError(f"features: {path} holds NaN or infinity in {broken[0]}; copy or download it again")
    return network
