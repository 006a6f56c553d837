"""Registered objects on disk: what is needed to predict their templates again, one file each, written atomically.

A template bank is tens of megabytes and takes a fraction of a second to predict, a reference latent is a few kilobytes:
only the latter is kept. Of a mesh its renders are kept, some ten megabytes: the file need not stay where it was.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nope_ros.crop import filled
from nope_ros.estimator import RegisteredObject
from nope_ros.frame import InputError
from nope_ros.latent import Predictor
from nope_ros.mesh import RenderedViews
from nope_ros.pose import ReferencePose
from nope_ros.video import Keyframes, Provenance

_FORMAT_VERSION = "1"
_KEYFRAME_ARRAYS = ("R_virtual_object", "R_camera_object", "R_fixed_object", "t_fixed_object", "hull")
_OPTIONAL_KEYFRAME_ARRAYS = (
    "crops",
    "seen_at",
    "distance",
    "angular_radius",
    "offset_object",
)  # which older files lack
_SUFFIX = ".object.safetensors"
_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")
# An object takes a megabyte, with a mesh ten; a larger file is not one of ours and is not read into memory.
_LARGEST_FILE = 256 * 2**20
_SET_ASIDE = ".unreadable"
# A save takes a fraction of one.
_WRITING_SECONDS = 2.0


class StoreError(InputError):
    """An object could not be written or read."""


def check_object_id(object_id: str) -> str:
    """Refuse names that are unsafe in a file, a topic or a TF frame.

    Raises:
        InputError: saying what is allowed.
    """
    if not _SAFE_ID.fullmatch(object_id):
        shown = object_id if len(object_id) <= 40 else object_id[:40] + "…"
        raise InputError(
            f"object_id: {shown!r} is not allowed; use 1 to 63 letters (a to z), digits, '_', '.' or '-', "
            "starting with a letter, digit or '_'"
        )
    return object_id


@dataclass(frozen=True)
class LoadReport:
    """Objects that were read, and a line for each file that could not be."""

    objects: tuple[RegisteredObject, ...]
    problems: tuple[str, ...]


class ObjectStore:
    """A folder with one file for each registered object.

    Raises:
        StoreError: if the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._known: dict[str, _Signature | None] = {}  # of the files that this process has read or written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"storage: {self.folder} cannot be made ({error.strerror}); choose another folder"
            ) from None

    def _path(self, object_id: str) -> Path:
        return self.folder / (check_object_id(object_id) + _SUFFIX)

    def holds(self, object_id: str, predictor: Predictor) -> bool:
        """Whether there is an object of this name that these weights can use."""
        return _made_with(self._path(object_id), predictor)

    def save(self, registered: RegisteredObject, overwrite: bool = True) -> Path | None:
        """Write an object, whole or not at all, replacing an older one of its name.

        Args:
            registered: the object.
            overwrite: whether to replace also what another process has written there since this one looked.

        Returns:
            Where an older file is now that could not have been loaded (damaged, or of other weights), if there was one.
            Nobody saw it among the registered objects, so nobody meant to replace it.

        Raises:
            StoreError: if the disk is full or the folder is read-only, or without ``overwrite``; an older file is then
                untouched.
        """
        path = self._path(registered.object_id)
        if not overwrite and self._of_another(path) and _made_with(path, registered.predictor):
            raise StoreError(
                f"storage: another node has written '{registered.object_id}' to {self.folder}, and that was left as it "
                "is; this one is registered, but will be gone after a restart: set overwrite, choose another name, or "
                "give each node a folder of its own (storage.directory)"
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        content = save(*_parts(registered))
        afterwards = "an older object of that name will be back" if path.exists() else "it will be gone"
        if len(content) > _LARGEST_FILE:
            raise StoreError(
                f"storage: object '{registered.object_id}' takes {len(content) / 2**20:.0f} MB, a file holds "
                f"{_LARGEST_FILE // 2**20}; it is registered, but after a restart {afterwards}: use fewer views"
            )
        aside = None
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists() and not _made_with(path, registered.predictor):
                aside = path.with_name(path.name + _SET_ASIDE)
                path.replace(aside)
            temporary.replace(path)
            self._known[path.name] = _signature(path)
            _sync_folder(self.folder)
        except OSError as error:
            with suppress(OSError):  # the folder itself may be gone
                temporary.unlink(missing_ok=True)
            raise StoreError(
                f"storage: object '{registered.object_id}' could not be written to {self.folder} ({error.strerror}); "
                f"it is registered, but after a restart {afterwards}: free the disk or choose another folder, then "
                "register it again"
            ) from None
        return aside

    def delete(self, object_id: str) -> None:
        """Remove an object's file, if there is one that this process has read or written.

        Raises:
            StoreError: if it cannot be removed.
        """
        path = self._path(object_id)
        if self._of_another(path):
            return
        try:
            path.unlink(missing_ok=True)
            _sync_folder(self.folder)
        except OSError as error:
            raise StoreError(
                f"storage: '{object_id}' could not be removed from {self.folder} ({error.strerror})"
            ) from None

    def _of_another(self, path: Path) -> bool:
        """Whether another process has written a file since this one read or wrote it."""
        return path.exists() and self._known.get(path.name) != _signature(path)

    def load_all(self, predictor: Predictor, batch_size: int = 1024) -> LoadReport:
        """Read every object; a damaged file, or one made with other weights, is reported and left where it is."""
        self._sweep()
        objects, problems = [], []
        for path in sorted(self.folder.glob("[!.]*" + _SUFFIX)):
            try:
                signature = _signature(path)
                objects.append(self._load(path, predictor, batch_size))
                self._known[path.name] = signature
            except StoreError as error:
                problems.append(str(error))
        return LoadReport(tuple(objects), tuple(problems))

    def _sweep(self) -> None:
        """Remove what saves left half written whose process was killed; one that still runs may be at it."""
        for path in self.folder.glob(f".*{_SUFFIX}.*.partial"):
            number = path.name.split(".")[-2]
            with suppress(OSError):  # gone already, or not ours to remove: it is in nobody's way
                old = time.time() - path.stat().st_mtime > _WRITING_SECONDS
                if old and not (number.isdigit() and _runs(int(number))):
                    path.unlink()

    def _load(self, path: Path, predictor: Predictor, batch_size: int) -> RegisteredObject:
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise StoreError(f"storage: {path} is too large to be a registered object; remove it")
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"storage: {path} is damaged ({error}); register the object again") from None
        if metadata.get("format") != _FORMAT_VERSION:
            raise StoreError(
                f"storage: {path} has format {metadata.get('format')}, this version reads {_FORMAT_VERSION}"
            )
        told = metadata.pop("checksum", None)  # files of before there were checksums have none
        if told is not None and told != _checksum(tensors, metadata):
            raise StoreError(f"storage: {path} is damaged (its checksum differs); register the object again")
        if metadata.get("predictor") != predictor.identity:
            raise StoreError(f"storage: {path} was registered with other weights; register the object again")
        try:
            distance, angular_radius, metric = json.loads(metadata["scale"])
            own = [key for key in tensors if key == "latent" or key.endswith(".latents")]
            arrays = {key: value.numpy() for key, value in tensors.items() if key not in own}
            thumbnail: NDArray[np.uint8] = arrays["thumbnail"]
            # Files of before masks were kept: the crop is black outside it.
            mask = arrays.get("mask", np.where(thumbnail.any(axis=2), np.uint8(255), np.uint8(0)))
            return RegisteredObject(
                object_id=check_object_id(metadata["object_id"]),
                predictor=predictor,
                latent=tensors["latent"].to(predictor.device),
                reference=ReferencePose(
                    arrays["R_camera_object"],
                    arrays["t_camera_object"],
                    float(distance),
                    float(angular_radius),
                    filled(mask),
                    arrays["offset_object"],
                    bool(metric),
                ),
                R_virtual_camera=arrays["R_virtual_camera"],
                gravity_virtual=arrays.get("gravity_virtual"),
                thumbnail=thumbnail,
                mask=mask,
                batch_size=batch_size,
                rendered=_rendered(arrays, tensors, predictor),
                keyframes=_keyframes(metadata, tensors, predictor),
                depth=arrays.get("depth"),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(f"storage: {path} is incomplete ({error}); register the object again") from None


def fingerprint(registered: RegisteredObject) -> str:
    """What differs for any two objects that are not registered alike."""
    return _parts(registered)[1]["checksum"]


def _parts(registered: RegisteredObject) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """An object as a file holds it: tensors, and what is said about them."""
    reference = registered.reference
    tensors = {
        "latent": registered.latent.detach().float().cpu().contiguous(),
        "R_virtual_camera": torch.from_numpy(registered.R_virtual_camera.copy()),
        "R_camera_object": torch.from_numpy(reference.R_camera_object.copy()),
        "t_camera_object": torch.from_numpy(reference.t_camera_object.copy()),
        "offset_object": torch.from_numpy(reference.offset_object.copy()),
        "thumbnail": torch.from_numpy(registered.thumbnail.copy()),
        "mask": torch.from_numpy(registered.mask.copy()),
    }
    if registered.rendered is not None:
        tensors |= _rendered_tensors(registered.rendered)
    if registered.depth is not None:
        tensors["depth"] = torch.from_numpy(registered.depth.copy())
    if registered.gravity_virtual is not None:
        tensors["gravity_virtual"] = torch.from_numpy(registered.gravity_virtual.copy())
    keyframes = registered.keyframes
    if keyframes is not None:
        tensors["keyframes.latents"] = keyframes.latents.detach().float().cpu().contiguous()
        for key in (*_KEYFRAME_ARRAYS, *_OPTIONAL_KEYFRAME_ARRAYS):
            array = getattr(keyframes, key)
            if array is not None:
                tensors[f"keyframes.{key}"] = torch.from_numpy(array.copy())
    metadata = {
        "format": _FORMAT_VERSION,
        "object_id": registered.object_id,
        "predictor": registered.predictor.identity,
        "scale": json.dumps([reference.distance, reference.angular_radius, reference.metric]),
    }
    if keyframes is not None:
        about = {
            "names": keyframes.names,
            "spread": keyframes.spread,
            "normalised": keyframes.normalised,
            "provenance": asdict(keyframes.provenance),
        }
        metadata["keyframes"] = json.dumps(about)
    metadata["checksum"] = _checksum(tensors, metadata)
    return tensors, metadata


_Signature = tuple[int, int, int]


def _signature(path: Path) -> _Signature | None:
    """What differs when a file is written anew; None if it is gone."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _made_with(path: Path, predictor: Predictor) -> bool:
    """Whether a file can be read, and holds an object registered with these weights."""
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("predictor") == predictor.identity)
    except (SafetensorError, OSError):
        return False


def _runs(pid: int) -> bool:
    """Whether another process has this number; in a container each node may be the first process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Of everything in a file: a disk's mistake must not become a wrong pose."""
    value = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(tensor.contiguous().numpy().tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _rendered_tensors(views: RenderedViews) -> dict[str, torch.Tensor]:
    tensors = {
        f"rendered.{field.name}": torch.from_numpy(np.ascontiguousarray(getattr(views, field.name)))
        for field in fields(views)
        if field.name != "latents"
    }
    return tensors | {"rendered.latents": views.latents.detach().half().cpu().contiguous()}


def _rendered(
    arrays: dict[str, NDArray[np.generic]], tensors: dict[str, torch.Tensor], predictor: Predictor
) -> RenderedViews | None:
    if "rendered.latents" not in tensors:
        return None
    given = {key.removeprefix("rendered."): value for key, value in arrays.items() if key.startswith("rendered.")}
    latents = tensors["rendered.latents"].float().to(predictor.device)
    return RenderedViews(latents=latents, **given)  # type: ignore[arg-type]


def _keyframes(metadata: dict[str, str], tensors: dict[str, torch.Tensor], predictor: Predictor) -> Keyframes | None:
    """The keyframes in a file, or None if the object was registered from one view."""
    if "keyframes" not in metadata:
        return None
    about = json.loads(metadata["keyframes"])
    arrays: dict[str, Any] = {key: tensors[f"keyframes.{key}"].numpy() for key in _KEYFRAME_ARRAYS}
    arrays |= {
        key: tensors[f"keyframes.{key}"].numpy() for key in _OPTIONAL_KEYFRAME_ARRAYS if f"keyframes.{key}" in tensors
    }
    return Keyframes(
        names=tuple(about["names"]),
        latents=tensors["keyframes.latents"].to(predictor.device),
        spread=float(about["spread"]),
        normalised=float(about.get("normalised", 1.0)),
        provenance=Provenance(**about["provenance"]),
        **arrays,
    )


def _sync_folder(folder: Path) -> None:
    # The rename is in the folder's own data: without this it may be lost with the power.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
