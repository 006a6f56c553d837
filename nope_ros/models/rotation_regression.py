"""A baseline: the relative rotation straight from two crops, as PIZZA does it (Nguyen et al., 3DV 2022).

One encoder sees both crops; a head compares their features place by place and says the rotation as six numbers (Zhou et
al., CVPR 2019). It knows one answer and no doubt: no distribution, no second mode.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nope_ros.frame import InputError
from nope_ros.models.rotated_latent import CropUNet, ResidualBlock, downsample

KIND = "regression"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class RotationRegressionConfig:
    """Sizes; those of the encoder are the rotated latent's.

    Attributes:
        crop_size: side of the input, pixels; a multiple of 16.
        widths: channels at 1/4, 1/8 and 1/16 of the input.
        compared: channels of the head.
        hidden: of its last layer but one.
    """

    crop_size: int = 96
    widths: tuple[int, int, int] = (64, 128, 256)
    compared: int = 256
    hidden: int = 512


class RotationRegression(nn.Module):
    """Reference crops and query crops, each (B, 4, S, S) in −1..1 → ΔR (B, 3, 3)."""

    def __init__(self, config: RotationRegressionConfig) -> None:
        super().__init__()
        self.config = config
        w1, w2, w3 = config.widths
        self.encoder = nn.Sequential(
            nn.Conv2d(4, w1, 8, stride=4, padding=2, bias=False),
            nn.BatchNorm2d(w1),
            nn.ReLU(),
            *(ResidualBlock(w1), ResidualBlock(w1)),
            *(downsample(w1, w2), ResidualBlock(w2), ResidualBlock(w2)),
            *(downsample(w2, w3), ResidualBlock(w3), ResidualBlock(w3)),
        )
        compared = config.compared
        self.head = nn.Sequential(
            nn.Conv2d(2 * w3, compared, 3, padding=1, bias=False),
            nn.BatchNorm2d(compared),
            nn.ReLU(),
            ResidualBlock(compared),
            nn.Conv2d(compared, compared // 4, 1),
            nn.Flatten(),
            nn.Linear(compared // 4 * (config.crop_size // 16) ** 2, config.hidden),
            nn.ReLU(),
        )
        self.out = nn.Linear(config.hidden, 6)
        # Starts with "no motion".
        nn.init.normal_(self.out.weight, std=0.01)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def start_from(self, trained: CropUNet) -> None:
        """Take over the layers that the encoder shares with a trained one of the same widths."""
        layers = nn.Sequential(
            *trained.stem, *trained.encode1, trained.down2, *trained.encode2, trained.down3, *list(trained.encode3)[:2]
        )
        self.encoder.load_state_dict(layers.state_dict())

    def features(self, crops: Tensor) -> Tensor:
        """What the encoder keeps of crops (B, 4, S, S): (B, C, S/16, S/16)."""
        encoded: Tensor = self.encoder(crops)
        return encoded

    def compare(self, reference: Tensor, query: Tensor) -> Tensor:
        """Features of both, each (B, C, h, w) → ΔR (B, 3, 3), float32."""
        return rotation_from_6d(self.out(self.head(torch.cat([reference, query], dim=1))).float())

    def forward(self, reference: Tensor, query: Tensor) -> Tensor:
        """Crops of both → ΔR (B, 3, 3)."""
        return self.compare(self.features(reference), self.features(query))

    def save_pretrained(self, folder: Path, training: dict[str, object] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` (half precision)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
            for key, value in self.state_dict().items()
        }
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        content = {"predictor": KIND, "network": asdict(self.config), "training": training or {}}
        (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path) -> RotationRegression:
        """Read what ``save_pretrained`` wrote, ready to use.

        Raises:
            InputError: naming the file that is missing or wrong.
        """
        try:
            content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            if content.get("predictor") != KIND:
                raise InputError(f"regression: {folder / _CONFIG} is of a {content.get('predictor')}; train one first")
            sizes = {
                key: tuple(value) if isinstance(value, list) else value for key, value in content["network"].items()
            }
            network = cls(RotationRegressionConfig(**sizes))  # type: ignore[arg-type]
            network.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"regression: {folder} holds no usable weights ({error})") from error
        return network.eval().requires_grad_(False)


def rotation_from_6d(numbers: Tensor) -> Tensor:
    """Six numbers (B, 6), two rows that need not be at right angles → rotations (B, 3, 3)."""
    first = F.normalize(numbers[:, :3], dim=1)
    second = F.normalize(numbers[:, 3:] - (first * numbers[:, 3:]).sum(1, keepdim=True) * first, dim=1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=1)
