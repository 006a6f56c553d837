"""The third stop: networks behind one two-line interface, and their weights on disk.

    latents = predictor.encode(crops)                        # (B, D)
    templates = predictor.predict(latents[0], rotations)     # (N, D): the object as seen after each rotation

Whatever the network, a rotation's likelihood is that of NOPE (Nguyen et al., CVPR 2024, Eq. 4, whose minus sign the
paper drops): log p(ΔR) ∝ −‖predict(e_r, ΔR) − e_q‖² / (2 · temperature).

Weights are a folder with ``config.json`` and ``model.safetensors``. Nothing here goes to the network, and nothing here
opens a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nope_ros.crop import Crop
from nope_ros.frame import InputError
from nope_ros.harmonics import rotate, wigner_d
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork, as_template
from nope_ros.prior import PRIORS, Prior
from nope_ros.rotations import exp

if TYPE_CHECKING:  # diffusers takes seconds to import; who uses the rotated latent need not wait
    from nope_ros.models.paper_unet import PaperUNet

PredictorKind = Literal["rotated_latent", "paper_unet"]

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "rotated_latent"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Raised when old code could no longer read new files, or would read them wrongly.
FORMAT_VERSION = 2
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class WeightsError(InputError):
    """Weights that cannot be used: the message says which file, what is wrong with it, and what to do."""


class ErrorModel(BaseModel):
    """How errors stand to what distributions say; ``nope_ros.training.calibrate`` fits it on held-out objects.

    Attributes:
        spread: for each prior, the factor on a distribution's second moment with which its 90 % ellipsoid holds 90 % of
            errors: their tails are not a Gaussian's.
        independent_deg: views this far apart, degrees around the object, err independently.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spread: dict[Prior, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=lambda: dict.fromkeys(PRIORS, 1.3)
    )
    independent_deg: float = Field(default=60.0, gt=0, allow_inf_nan=False)

    @field_validator("spread")
    @classmethod
    def _of_every_prior(cls, spread: dict[Prior, float]) -> dict[Prior, float]:
        if set(spread) != set(PRIORS):
            raise ValueError(f"gives {', '.join(spread) or 'nothing'}; needed: {', '.join(PRIORS)}")
        return spread


class PredictorConfig(BaseModel):
    """What ``config.json`` holds.

    Attributes:
        predictor: which class reads the weights.
        format_version: layout of this file and of the weights.
        name: shown to users (diagnostics, summary.json).
        network: sizes of the network, see ``RotatedLatentConfig`` and ``PaperUNetConfig``.
        temperature: of the likelihood; fitted on validation objects of the training side.
        errors: how wide errors are, fitted there too.
        licence: of the weights, an SPDX identifier.
        training: how the weights came about (data, seed, steps); for readers only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    predictor: PredictorKind
    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    name: str = Field(min_length=1, max_length=200)
    network: dict[str, Any]
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    errors: ErrorModel = Field(default_factory=ErrorModel)
    licence: str = "Apache-2.0"
    training: dict[str, Any] = Field(default_factory=dict)


@runtime_checkable
class Predictor(Protocol):
    """What the estimator needs of a network.

    Attributes:
        name: shown to users.
        identity: differs whenever the latents would; an object registered under another one must be registered again.
        crop_size: side of the crops that ``encode`` takes, pixels.
        device: where latents live.
        temperature: of the likelihood.
        errors: how wide errors are.
        latent_shape: what the D numbers of a latent are.
    """

    name: str
    crop_size: int
    device: torch.device
    temperature: float
    errors: ErrorModel

    @property
    def identity(self) -> str:
        """Differs whenever the latents would."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """What the D numbers of a latent are."""
        ...

    def encode(self, crops: Sequence[Crop]) -> Tensor:
        """Crops → latents (B, D), float32."""
        ...

    def predict(self, latent: Tensor, rotations: Tensor) -> Tensor:
        """A reference's latent (D,) and relative rotations ΔR (N, 3, 3) → predicted latents (N, D), float32.

        Latents (N, D) are one for each rotation.
        """
        ...


def crops_to_tensor(crops: Tensor) -> Tensor:
    """Crops (B, 4, S, S) uint8, RGB black outside the mask and the mask 0..255 → what networks take, float in −1..1."""
    return crops.float().div_(127.5).sub_(1.0)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device to compute on; "auto" is the GPU if there is one.

    Raises:
        InputError: if the device is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: '{device}' is unknown; use auto, cpu, cuda or cuda:<index>") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise InputError(f"device: '{device}' is not there, PyTorch sees {count} CUDA devices; use auto or cpu")
    elif resolved.type != "cpu":
        raise InputError(f"device: '{device}' is not supported; use auto, cpu, cuda or cuda:<index>")
    return resolved


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The precision for a network's arithmetic: the fastest that is safe."""
    # bf16 moves a latent by 0.5 % of its norm. It nearly halves the time where the processor has it in hardware; where
    # it has to be emulated it costs more than float32.
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Older PyTorch cannot say; float32 is right everywhere.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


class NetworkPredictor(ABC):
    """What both predictors share: crops in, weights on disk, device and precision.

    The network is taken over: put in evaluation mode, frozen and moved. Calls may come from several threads at once.
    Gradients flow from ``predict`` to its arguments where these ask for them.

    Args:
        network: with its weights.
        name: shown to users.
        temperature: of the likelihood.
        errors: how wide errors are.
        device: "auto", or a device.
        dtype: precision of the network's arithmetic (latents are float32 always); None is the fastest that is safe.
        batch_size: most crops or rotations that go through the network at once; bounds memory, does not change results.
        licence: of the weights.
        training: how the weights came about.
    """

    kind: ClassVar[PredictorKind]
    default_batch_size: ClassVar[int]
    cpu_layout: ClassVar[torch.memory_format] = torch.channels_last

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str = "unnamed",
        temperature: float = 1.0,
        errors: ErrorModel | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        licence: str = "Apache-2.0",
        training: dict[str, Any] | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is not positive")
        self.name = name
        self.temperature = temperature
        self.errors = errors or ErrorModel()
        self.licence = licence
        self.training = training or {}
        self.device = resolve_device(device)
        self.dtype = dtype or fastest_dtype(self.device)
        self.batch_size = batch_size or self.default_batch_size
        network.eval().requires_grad_(False)
        self.layout = self.cpu_layout if self.device.type == "cpu" else torch.channels_last
        self._module = network.to(device=self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.crop_size: int = self._network_config()["crop_size"]

    @classmethod
    @abstractmethod
    def _build(cls, network_config: dict[str, Any], folder: Path | None) -> nn.Module:
        """The network of a checked config, weights not yet loaded; ``folder`` is where config.json was found."""

    @abstractmethod
    def _network_config(self) -> dict[str, Any]:
        """Plain values for config.json."""

    @abstractmethod
    def _encode_batch(self, crops: Tensor, level: Tensor) -> Tensor:
        """(B, 4, S, S) in −1..1 and whether they are level (B,) → (B, *latent_shape)."""

    @abstractmethod
    def _predict_batch(self, latent: Tensor, rotations: Tensor) -> Tensor:
        """(1 or B, *latent_shape) and (B, 3, 3) → (B, *latent_shape)."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """What the D numbers of a latent are."""

    @cached_property
    def identity(self) -> str:
        """Kind and a hash of the network's config and weights; the temperature does not change latents."""
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, self._network_config()], sort_keys=True).encode())
        for key, tensor in sorted(self._module.state_dict().items()):
            digest.update(f"{key} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return f"{self.kind}-{digest.hexdigest()[:16]}"

    def encode(self, crops: Sequence[Crop]) -> Tensor:
        """Crops → latents (B, D), float32.

        Raises:
            InputError: if a crop is not of ``crop_size``.
        """
        for crop in crops:
            if crop.image.shape != (self.crop_size, self.crop_size, 3):
                raise InputError(
                    f"crop: shape is {crop.image.shape}, {self.name} takes ({self.crop_size}, {self.crop_size}, 3)"
                )
        if not crops:
            return torch.zeros(0, int(np.prod(self.latent_shape)), device=self.device)
        stacked = np.stack([np.dstack([crop.image, crop.mask]) for crop in crops])
        level = torch.tensor([crop.roll_known for crop in crops])
        return self.encode_pixels(torch.from_numpy(stacked).permute(0, 3, 1, 2), level)

    @torch.no_grad()
    def encode_pixels(self, crops: Tensor, level: Tensor) -> Tensor:
        """Crops (B, 4, S, S) uint8 as in ``crops_to_tensor`` → latents (B, D), float32.

        ``level`` (B,) says of which of them gravity removed the roll.
        """
        parts = []
        for part, known in zip(crops.split(self.batch_size), level.split(self.batch_size), strict=True):
            pixels = crops_to_tensor(part.to(self.device)).contiguous(memory_format=self.layout)
            with self._autocast():
                parts.append(self._encode_batch(pixels, known.to(self.device)).float().flatten(1))
        return torch.cat(parts)

    def predict(self, latent: Tensor, rotations: Tensor) -> Tensor:
        """A reference's latent (D,), or one for each rotation (N, D), and ΔR (N, 3, 3) → predictions (N, D)."""
        reference = latent.to(self.device, torch.float32).reshape(-1, *self.latent_shape)
        rotations = rotations.to(self.device)
        if len(rotations) == 0:
            return reference.flatten(1)[:0]
        turns = torch.split(rotations, self.batch_size)
        references = [reference] * len(turns) if latent.ndim == 1 else torch.split(reference, self.batch_size)
        parts = [self._predict_batch(*pair).float().flatten(1) for pair in zip(references, turns, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``; a reader never sees half of a file.

        Args:
            folder: made if it is not there.
            dtype: of the floating-point weights in the file, for example ``torch.float16`` to halve it. The predictor
                read back then has its own identity.
        """
        config = PredictorConfig(
            predictor=self.kind,
            name=self.name,
            network=self._network_config(),
            temperature=self.temperature,
            errors=self.errors,
            licence=self.licence,
            training=self.training,
        )
        state = {
            key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for key, tensor in self._stored_state().items()
        }
        write_weights(Path(folder), config.model_dump(), state)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """Read what ``save_pretrained`` wrote.

        Raises:
            WeightsError: if the folder is missing, incomplete, damaged, or of another kind or version.
        """
        folder = Path(folder).expanduser()
        config = read_config(folder)
        if config.predictor != cls.kind:
            raise WeightsError(
                f"weights: {folder / CONFIG_FILE} is of a {config.predictor}, not of a {cls.kind}; use load_predictor()"
            )
        state = read_state(folder)
        try:
            network = cls._build(config.network, folder)
        except WeightsError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise WeightsError(f"weights: 'network' of {folder / CONFIG_FILE} is wrong: {_brief(error)}") from error
        load_state(network, state, cls._elsewhere(network), folder / WEIGHTS_FILE)
        return cls(
            network,
            name=config.name,
            temperature=config.temperature,
            errors=config.errors,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            licence=config.licence,
            training=config.training,
        )

    @classmethod
    def _elsewhere(cls, network: nn.Module) -> tuple[str, ...]:
        """Prefixes of weights that are kept in another folder than the rest."""
        return ()

    def _stored_state(self) -> dict[str, Tensor]:
        elsewhere = self._elsewhere(self._module)
        return {key: value for key, value in self._module.state_dict().items() if not key.startswith(elsewhere)}

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


class RotatedLatentPredictor(NetworkPredictor):
    """A latent of spherical harmonics that ΔR turns exactly; see ``nope_ros.models.rotated_latent``."""

    kind = "rotated_latent"
    default_batch_size = 1024

    network: RotatedLatentNetwork

    def __init__(self, network: RotatedLatentNetwork, **options: Any) -> None:
        self.network = network
        super().__init__(network, **options)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """((L+1)², channels)."""
        return (self.network.config.bandwidth + 1) ** 2, self.network.config.channels

    def of_any_roll(self, latent: Tensor, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Tensor:
        """The mean of the latents of a crop rolled by quarter turns, each turned back exactly.

        The network has to learn what a roll does to a crop, and has not quite. Where queries come with any roll, the
        mean is what they resemble most; where they are level, the latent of the level crop is. Degree 0, which does not
        turn and tells objects apart, stays the crop's own.

        Args:
            latent: (D,) of the crop as it is, perhaps level.
            image: (S, S, 3) of it.
            mask: (S, S).
        """
        crop = torch.from_numpy(np.dstack([image, mask])).permute(2, 0, 1)
        crops = torch.stack([torch.rot90(crop, quarter, (1, 2)) for quarter in range(4)])
        rolled = self.encode_pixels(crops, torch.zeros(4, dtype=torch.bool))
        back = exp(np.array([[0.0, 0.0, quarter * np.pi / 2] for quarter in range(4)]))
        blocks = wigner_d(torch.from_numpy(back).to(rolled), self.network.config.bandwidth)
        mean = rotate(rolled.unflatten(1, self.latent_shape), blocks).mean(dim=0)
        mean[0] = latent.reshape(self.latent_shape)[0]
        return mean.flatten()

    def _encode_batch(self, crops: Tensor, level: Tensor) -> Tensor:
        latents: Tensor = self.network(crops, level)
        return latents

    def _predict_batch(self, latent: Tensor, rotations: Tensor) -> Tensor:
        # Euler angles are found at the precision in which rotations came, and matrices multiplied in float32.
        if not rotations.dtype.is_floating_point or rotations.dtype.itemsize < 4:
            rotations = rotations.float()
        return rotate(
            as_template(latent), [block.float() for block in wigner_d(rotations, self.network.config.bandwidth)]
        )

    @classmethod
    def _build(cls, network_config: dict[str, Any], folder: Path | None) -> RotatedLatentNetwork:
        config = TypeAdapter(RotatedLatentConfig).validate_python(known_fields(RotatedLatentConfig, network_config))
        sizes = [value for entry in config.to_dict().values() for value in _as_tuple(entry)]
        # Bounds far above any use: a damaged config must not ask for all memory.
        if min(sizes) < 1 or max(sizes) > 2048 or config.bandwidth > 32 or config.crop_size > 512 or config.depths > 64:
            raise ValueError(f"a size is out of bounds: {config}")
        if config.crop_size % 16:
            raise ValueError(f"crop_size {config.crop_size} is not a multiple of 16")
        return RotatedLatentNetwork(config)

    def _network_config(self) -> dict[str, Any]:
        return _plain(self.network.config.to_dict())


class PaperUNetPredictor(NetworkPredictor):
    """NOPE's own form: a U-Net that sees ΔR through cross-attention; see ``nope_ros.models.paper_unet``."""

    kind = "paper_unet"
    default_batch_size = 16
    cpu_layout = torch.contiguous_format  # channels last costs it 40 % more: every attention has to turn it round

    network: PaperUNet

    def __init__(self, network: PaperUNet, **options: Any) -> None:
        self.network = network
        super().__init__(network, **options)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the VAE's latent."""
        return self.network.config.latent_shape

    def _encode_batch(self, crops: Tensor, level: Tensor) -> Tensor:
        return self.network.encode(crops)

    def _predict_batch(self, latent: Tensor, rotations: Tensor) -> Tensor:
        with self._autocast():
            templates: Tensor = self.network(latent.expand(len(rotations), -1, -1, -1), rotations.float())
        return templates

    @classmethod
    def _build(cls, network_config: dict[str, Any], folder: Path | None) -> PaperUNet:
        from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig

        config = TypeAdapter(PaperUNetConfig).validate_python(known_fields(PaperUNetConfig, network_config))
        return PaperUNet(config, vae_folder=find_vae(config.vae, folder) if config.vae else None)

    @classmethod
    def _elsewhere(cls, network: nn.Module) -> tuple[str, ...]:
        # A VAE that others publish (Stable Diffusion's) stays where it is.
        return ("vae.",) if getattr(network, "vae_is_external", False) else ()

    def _network_config(self) -> dict[str, Any]:
        return _plain(self.network.config.to_dict())


_PREDICTORS: dict[PredictorKind, type[NetworkPredictor]] = {
    "rotated_latent": RotatedLatentPredictor,
    "paper_unet": PaperUNetPredictor,
}


def load_predictor(
    path: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
) -> NetworkPredictor:
    """Load a predictor of either kind.

    Args:
        path: a folder; or the name ``org/name`` of a model in the user's hub cache (it is not downloaded); None is the
            packaged default.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: precision of the network's arithmetic; None is the fastest that is safe.
        batch_size: most crops or rotations that go through the network at once.

    Raises:
        WeightsError: if there are no usable weights there.
        InputError: if the device is not there.
    """
    folder = find_weights(path)
    kind = _PREDICTORS[read_config(folder).predictor]
    return kind.from_pretrained(folder, device=device, dtype=dtype, batch_size=batch_size)


def find_weights(path: str | Path | None = None) -> Path:
    """The folder that ``load_predictor`` would read.

    Raises:
        WeightsError: if there is none.
    """
    if path is None:
        if not DEFAULT_WEIGHTS.is_dir():
            raise WeightsError(
                f"weights: the default ones are missing from {DEFAULT_WEIGHTS}; install the package again"
            )
        return DEFAULT_WEIGHTS
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise WeightsError(_pickle_message(folder))
        raise WeightsError(f"weights: {folder} is a file; give the folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if isinstance(path, str) and _HUB_NAME.fullmatch(path):
        return find_in_hub_cache(path)
    raise WeightsError(f"weights: there is no folder {folder}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")


def find_in_hub_cache(name: str) -> Path:
    """The folder of a model in the user's hub cache; never downloads.

    Raises:
        WeightsError: if it is not there.
    """
    missing = (
        f"weights: '{name}' is neither a folder nor in the hub cache; give an existing folder, "
        f"or put it there with: hf download {name}"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(f"{missing} (pip install huggingface_hub)") from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise WeightsError(missing) from error


def find_vae(source: str, relative_to: Path | None = None) -> Path:
    """The folder of an autoencoder: a folder, or a name in the user's hub cache; a subfolder ``vae`` is found too.

    Raises:
        WeightsError: if there is none.
    """
    folder = Path(source).expanduser()
    if relative_to is not None and (relative_to / folder).is_dir():
        folder = relative_to / folder
    if not folder.is_dir():
        folder = find_in_hub_cache(source)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / CONFIG_FILE).is_file():
        raise WeightsError(f"weights: {folder} has no {CONFIG_FILE} of an autoencoder; copy or download it again")
    return folder


def read_config(folder: Path) -> PredictorConfig:
    """Read and check ``config.json``.

    Raises:
        WeightsError: if it is missing, damaged, or of another version.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise WeightsError(f"weights: there is no folder {folder}; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not path.is_file():
        pickles = _pickles_in(folder)
        if pickles:
            raise WeightsError(_pickle_message(pickles[0]))
        raise WeightsError(f"weights: {folder} has no {CONFIG_FILE}; give a folder that save_pretrained() wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights: {path} cannot be read ({error}); copy or download it again") from error
    if not isinstance(content, dict) or content.get("predictor") not in _PREDICTORS:
        found = f"'{content.get('predictor')}'" if isinstance(content, dict) else "nothing"
        raise WeightsError(f"weights: {path} names {found} as 'predictor'; known: {', '.join(_PREDICTORS)}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        advice = (
            "install a newer nope_ros" if isinstance(version, int) and version > FORMAT_VERSION else "save it again"
        )
        raise WeightsError(
            f"weights: {path} has format_version {version}, this nope_ros reads {FORMAT_VERSION}; {advice}"
        )
    try:
        return PredictorConfig.model_validate(content)
    except ValidationError as error:
        raise WeightsError(f"weights: {path} is wrong: {_brief(error)}") from error


def known_fields(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values, if the dataclass has all of these fields.

    Raises:
        ValueError: naming those that it lacks; ignoring them would build another network than was trained.
    """
    unknown = set(values) - {field.name for field in fields(config_class)}
    if unknown:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    return values


def read_state(folder: Path) -> dict[str, Tensor]:
    """A folder's ``model.safetensors``.

    Raises:
        WeightsError: if it is missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = _pickles_in(folder)
        if pickles:
            raise WeightsError(_pickle_message(pickles[0]))
        raise WeightsError(f"weights: {folder} has no {WEIGHTS_FILE}; copy or download the folder again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"weights: {path} ({path.stat().st_size} bytes) is damaged or cut short ({error}); copy or "
            "download it again"
        ) from error


def write_weights(folder: Path, config: Mapping[str, object], state: Mapping[str, Tensor] | None = None) -> None:
    """Write a folder's ``config.json``, and before it ``model.safetensors``; a reader never sees half of a file.

    Args:
        folder: made if it is not there.
        config: what ``config.json`` is to hold.
        state: the weights; None leaves those that are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if state is not None:
        unfinished = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
        tensors = {key: tensor.contiguous().cpu() for key, tensor in state.items()}
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / WEIGHTS_FILE)
    unfinished = folder / f".{CONFIG_FILE}.{os.getpid()}"
    unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / CONFIG_FILE)


def load_state(network: nn.Module, state: dict[str, Tensor], elsewhere: tuple[str, ...], path: Path) -> None:
    """Put weights into a network; all of them but those whose names start with ``elsewhere``.

    Raises:
        WeightsError: naming the file's path, if they do not fit or are not finite.
    """
    expected = {key: value for key, value in network.state_dict().items() if not key.startswith(elsewhere)}
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not in the network" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"weights: {path} does not fit the network of its {CONFIG_FILE}: {'; '.join(problems[:3])}{more}; "
            "take both files from the same version"
        )
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"weights: {path} holds NaN or infinity in {broken[0]}; copy or download it again")
    network.load_state_dict(state, strict=False)


def _pickles_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)


def _pickle_message(path: Path) -> str:
    return (
        f"weights: {path} is a pickle, which can run any program when it is opened, so it is not; "
        f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE} (save_pretrained() writes one)"
    )


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'value'}: {one['msg']}" for one in error.errors()[:3])
    return str(error)


def _as_tuple(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _plain(values: dict[str, object]) -> dict[str, Any]:
    # As JSON gives it back, so that a config reads the same before and after it was saved.
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
