"""What a training depends on, besides the renders: a YAML file, read and checked before anything is begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from nope_ros.frame import InputError
from nope_ros.latent import known_fields
from nope_ros.training.augment import AugmentationConfig
from nope_ros.training.pairs import DataConfig, Share

KINDS = ("rotated_latent", "regression", "paper_unet", "correspondence")
"""Of networks."""

Config = TypeVar("Config", bound="RunConfig")
Made = TypeVar("Made")


class RunConfig(BaseModel):
    """What every training has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    network: dict[str, int | float | str | list[int]] = {}  # sizes that differ from the kind's own
    start: str = ""  # folder of weights to go on from, with a new seed; empty: from nothing
    seed: int = Field(default=0, ge=0)
    budget_minutes: float = Field(default=120, gt=0)
    budget_steps: int | None = Field(default=None, gt=0)  # in place of minutes, where a run has to be repeatable
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=200, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    validate_minutes: float = Field(default=10, ge=0)
    validation_batches: int = Field(default=12, gt=0)
    workers: int = Field(default=1, ge=0)
    threads: int = Field(default=1, gt=0)


class TrainingConfig(RunConfig):
    """Of what gives a rotation: the rotated latent, and what it is compared with."""

    kind: Literal["rotated_latent", "regression", "paper_unet"] = "rotated_latent"
    sigma_deg: float = Field(default=5.0, gt=0)  # rotated_latent: width of the target around the truth
    candidate_sets: int = Field(default=8, gt=0)  # rotated_latent: sets of rotations that take turns
    upright_candidates: int = Field(default=3000, gt=0)  # rotated_latent: views in each set
    autoencoder_share: float = Field(default=0.3, gt=0, lt=1)  # paper_unet: of the budget, before the U-Net's turn
    distance: Literal["l1", "l2"] = "l1"  # paper_unet: of latents


class CorrespondenceTraining(RunConfig):
    """Of the correspondence refiner."""

    kind: Literal["correspondence"]
    trunk: str = ""  # weights of a rotated latent whose U-Net the trunk starts from; empty: the packaged ones
    train_from: str = "encode3"  # what comes before this in the trunk stays as it was
    pairs_per_batch: int = Field(default=108, gt=0)
    steps: int = Field(default=2, gt=0)
    most_apart_deg: float = 75.0  # of pairs that teach places; all teach right from wrong
    hypothesis_deg: tuple[float, float] = (1.0, 11.0)  # standard deviation about each axis
    wrong_share: Share = 0.4
    known_depth_share: Share = 0.5  # of the pairs have the reference's true depth, as renders of a mesh have
    close_share: Share = 0.5  # of the groups are drawn within close_deg
    close_deg: float = 30.0
    anywhere_share: Share = 0.15  # of the groups are drawn from all sides
    warmup_steps: int = Field(default=40, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    validate_minutes: float = Field(default=8, ge=0)
    validation_batches: int = Field(default=6, gt=0)


def read_values(path: Path, overrides: dict[str, object] | None = None) -> dict[str, object]:
    """What a training's file says, not yet checked but for its kind.

    Args:
        path: YAML.
        overrides: values that replace the file's.

    Raises:
        InputError: if it cannot be read, holds no names with values, or another kind than one of ``KINDS``.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file such as config/train/rotated_latent.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise InputError(f"{path} {found}; names with values are needed, as in config/train/rotated_latent.yaml")
    values |= overrides or {}
    if values.get("kind", KINDS[0]) not in KINDS:
        raise InputError(f"{path}: kind: there is no '{values['kind']}'; known: {', '.join(KINDS)}")
    return values


def read_training(model: type[Config], path: Path, overrides: dict[str, object] | None = None) -> Config:
    """A training's file, checked.

    Args:
        model: of its kind.
        path: YAML.
        overrides: values that replace the file's.

    Raises:
        InputError: naming what is wrong in it.
    """
    try:
        return model.model_validate(read_values(path, overrides))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, one['loc']))}: "
            + ("there is no such setting" if one["type"] == "extra_forbidden" else one["msg"])
            for one in error.errors()
        ]
        raise InputError(f"{path}: {'; '.join(wrong[:3])}; docs/training.md tells the settings") from error


def of_sizes(make: Callable[[Made], nn.Module], sizes: type[Made], network: dict[str, Any]) -> Any:
    """What ``make`` makes of a network's sizes, of which a training's file gives those that differ from the usual.

    Raises:
        InputError: if no such network can be made.
    """
    try:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in network.items()}
        return make(sizes(**known_fields(sizes, given)))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"network: {error}; {sizes.__module__} tells the sizes") from error
