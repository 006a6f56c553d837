"""Training batches: several views of each of several objects, every pair of views of one object being an example.

Encoding costs nearly everything and scoring a pair next to nothing: V views give V(V−1)/2 examples for the price of V.
"""

from __future__ import annotations

import itertools
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import IterableDataset

from nope_ros.crop import roll_of_gravity
from nope_ros.frame import InputError
from nope_ros.rotations import exp
from nope_ros.training.augment import AugmentationConfig, View, training_view
from nope_ros.training.likelihood import PairPrior
from nope_ros.training.render_cache import VARIANT_MARK

Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(BaseModel):
    """Which renders a batch is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: str  # folder written by nope_ros.training.render_cache
    objects_per_batch: int = Field(default=20, gt=0)
    views_per_object: int = Field(default=6, gt=1)
    mesh_share: Share = 0.5  # of the objects in a batch; the rest are procedural
    upright_share: Share = 0.5  # of the objects have roll removed by gravity; the rest any roll
    level_share: Share = 0.6  # of the other objects have one view that is level: gravity is known of it alone
    near_share: Share = 0.75  # of the views are drawn within near_deg of the first view's direction
    near_deg: float = Field(default=90.0, gt=0, le=180)
    # Objects with an asymmetry below symmetric_below are drawn this much as often.
    symmetric_weight: float = Field(default=0.3, gt=0)
    symmetric_below: float = 0.007
    validation_share: Share = 0.08  # of the objects, by hash of their name


@dataclass(frozen=True)
class Batch:
    """Views of objects, V of each.

    Attributes:
        crops: (O, V, 4, S, S) uint8.
        R_virtual_object: (O, V, 3, 3) float32.
        upright: (O,) whether gravity removed the roll of all views of the object.
        level: (O, V) whether it did of this view.
    """

    crops: Tensor
    R_virtual_object: Tensor
    upright: Tensor
    level: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


def is_held_out(name: str, share: float = DataConfig.model_fields["validation_share"].default) -> bool:
    """Whether training never sees an object of this name, as it does not see so large a share of all.

    By name, not by position or random state: the split stays the same whatever else is there. A variant goes where its
    mesh goes, or networks would be judged on objects much like those they learned.
    """
    return zlib.crc32(name.split(VARIANT_MARK)[0].encode()) / 2**32 < share


class RenderCache:
    """Renders on disk, opened without reading them.

    Args:
        config: its ``cache`` is the folder, its ``validation_share`` says which objects are held out.
        depth: whether depth is needed too.

    Raises:
        InputError: if they are missing, unfinished or damaged.
    """

    def __init__(self, config: DataConfig, depth: bool = False) -> None:
        folder = Path(config.cache)
        command = f"nope-ros render --out {folder}{' --depth' if depth else ''}"
        if not (folder / "images.npy").is_file():
            raise InputError(f"data.cache: there are no renders in {folder}; make them: {command}")
        if not (folder / "views.npz").is_file():
            raise InputError(f"data.cache: the renders in {folder} are not finished; give their command again")
        if depth and not (folder / "depth.npy").is_file():
            raise InputError(f"data.cache: the renders in {folder} have no depth; make others: nope-ros render --depth")
        try:
            self._open(folder)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"data.cache: {folder} is damaged ({error}); delete it and make it again") from error
        self.variant = np.array([VARIANT_MARK in name for name in self.names])
        self.held_out = np.array([is_held_out(name, config.validation_share) for name in self.names])

    def _open(self, folder: Path) -> None:
        self.images: NDArray[np.uint8] = np.load(folder / "images.npy", mmap_mode="r")
        depth = folder / "depth.npy"
        self.depth: NDArray[np.float16] | None = np.load(depth, mmap_mode="r") if depth.exists() else None
        with np.load(folder / "views.npz", allow_pickle=False) as views:
            self.R = views["R_camera_object"].astype(np.float64)
            self.t = views["t_camera_object"].astype(np.float64)
            self.K = views["K"].astype(np.float64)
            object_index = views["object_index"]
            self.names: list[str] = json.loads(str(views["names"]))
            self.asymmetry = views["asymmetry"].astype(np.float64)  # NaN where unknown
            self.procedural = views["procedural"].astype(bool)
        order = np.argsort(object_index, kind="stable")
        starts = np.searchsorted(object_index[order], np.arange(len(self.names) + 1))
        self.views = [order[a:b] for a, b in itertools.pairwise(starts)]
        self.directions = -np.einsum("nji,nj->ni", self.R, np.broadcast_to([0.0, 0.0, 1.0], (len(self.R), 3)))


class PairDataset(IterableDataset[Batch]):
    """An endless stream of batches; the stream depends on the seed and the first batch's number alone.

    Raises:
        InputError: if the renders are missing, or too few for a batch.
    """

    needs_depth: ClassVar[bool] = False

    def __init__(
        self,
        config: DataConfig,
        augmentation: AugmentationConfig | None,
        size: int,
        seed: int,
        first_batch: int = 0,
        validation: bool = False,
    ) -> None:
        self.config, self.augmentation, self.size = config, augmentation, size
        self.seed, self.first_batch, self.validation = seed, first_batch, validation
        self.cache = RenderCache(config, self.needs_depth)
        cache = self.cache
        weight = np.where(cache.asymmetry < config.symmetric_below, config.symmetric_weight, 1.0)
        weight *= cache.held_out == validation
        share = np.zeros_like(weight)
        for kind, part in ((cache.procedural, 1 - config.mesh_share), (~cache.procedural, config.mesh_share)):
            total = (weight * kind).sum()
            share += weight * kind * (part / total if total > 0 else 0)
        possible = np.flatnonzero(share)
        views = min((len(cache.views[index]) for index in possible), default=0)
        if len(possible) < config.objects_per_batch or views < config.views_per_object:
            raise InputError(
                f"data: the renders in {config.cache} have {len(possible)} {'held-out' if validation else 'training'} "
                f"objects with {views} views or more, a batch takes {config.objects_per_batch} with "
                f"{config.views_per_object}; render more, or lower objects_per_batch or views_per_object"
            )
        self.probability = share / share.sum()

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        step, first = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.first_batch + first
        while True:
            yield self.batch(np.random.default_rng((self.seed, int(self.validation), number)))
            number += step

    def batch(self, rng: np.random.Generator) -> Batch:
        """One batch from one generator."""
        count = self.config.objects_per_batch
        chosen = rng.choice(len(self.probability), count, replace=False, p=self.probability)
        upright = rng.random(count) < self.config.upright_share
        count_views = self.config.views_per_object
        one = np.arange(count_views) == rng.integers(count_views, size=(count, 1))
        level = upright[:, None] | (one & (rng.random((count, 1)) < self.config.level_share))
        views = [self._views(index, known, rng) for index, known in zip(chosen, level, strict=True)]
        crops = np.stack([[view.crop for view in row] for row in views])
        rotations = np.stack([[view.R_virtual_object for view in row] for row in views])
        R = torch.from_numpy(rotations).float()
        return Batch(torch.from_numpy(crops), R, torch.from_numpy(upright), torch.from_numpy(level))

    def _drawn(self, index: int, rng: np.random.Generator) -> NDArray[np.intp]:
        config, cache = self.config, self.cache
        candidates = cache.views[index]
        first = rng.integers(len(candidates))
        cosine = cache.directions[candidates] @ cache.directions[candidates[first]]
        near = cosine > np.cos(np.radians(config.near_deg))
        weight = np.where(near, config.near_share / near.sum(), (1 - config.near_share) / max((~near).sum(), 1))
        weight[first] = 0
        rest = rng.choice(len(candidates), config.views_per_object - 1, replace=False, p=weight / weight.sum())
        return candidates[[first, *rest]]

    def _views(self, index: int, level: NDArray[np.bool_], rng: np.random.Generator) -> list[View]:
        cache = self.cache
        return [
            training_view(
                np.asarray(cache.images[view]),
                cache.R[view],
                cache.K[view],
                size=self.size,
                roll=None if known else float(rng.uniform(-np.pi, np.pi)),
                config=self.augmentation,
                rng=rng,
            )
            for view, known in zip(self._drawn(index, rng), level, strict=True)
        ]

    def priors(self, rng: np.random.Generator, objects: int = 2000) -> tuple[PairPrior, PairPrior]:
        """How pairs are drawn, against uniform directions and against independent upright views."""
        rows = rng.choice(len(self.probability), objects, p=self.probability)
        directions = np.stack([self.cache.directions[self._drawn(index, rng)] for index in rows])
        first, second = np.triu_indices(directions.shape[1], 1)
        together = np.sum(directions[:, first] * directions[:, second], axis=-1).ravel()
        angle = rng.uniform(-np.pi, np.pi, together.shape)
        a, b = (directions.reshape(-1, 3)[rng.integers(directions.size // 3, size=together.size)] for _ in range(2))
        flat = np.linalg.norm(a[:, :2], axis=1) * np.linalg.norm(b[:, :2], axis=1)
        apart = a[:, 2] * b[:, 2] + flat * np.cos(angle)
        return PairPrior.of(together, rng.uniform(-1, 1, together.size)), PairPrior.of(together, apart)

    def upright_views(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Orientations (count, 3, 3) of views as upright objects have them in a batch."""
        noise = np.radians(self.augmentation.gravity_noise_deg) if self.augmentation else 0.0
        views: list[NDArray[np.float64]] = []
        while len(views) < count:
            R = self.cache.R[rng.integers(len(self.cache.R))]
            roll = roll_of_gravity(np.eye(3), -R[:, 2])
            if roll is None:
                roll = float(rng.uniform(-np.pi, np.pi))
            views.append(exp(np.array([0.0, 0.0, roll + noise * rng.normal()])) @ R)
        return np.stack(views)
