"""The mean of two folders of weights of one network, as those of a training before and after its last stage.

    python -m nope_ros.training.average A B --share 0.7 --out C

It counts B as much as ``--share`` and A as much as is left. `--out` gets B's ``config.json``, with a note under
``training`` of what it is the mean of, the weights, and SHA256SUMS as packaged weights have them. How sure answers are
was fitted to B: fit it to the mean (``nope_ros.training.calibrate``, or ``trust`` for a refiner).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from nope_ros.frame import InputError
from nope_ros.latent import CONFIG_FILE, WEIGHTS_FILE, WeightsError, find_weights, read_state, write_weights

SUMS_FILE = "SHA256SUMS"


def mean_of(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights between two: ``(1 − share) · first + share · second``, in the second's precision.

    Args:
        first: by name.
        second: by name; what is not a floating-point number (counters) is taken from here.
        share: of the second, 0..1.

    Raises:
        InputError: if they are not of one network, naming what differs.
    """
    differ = [f"{name} is in one of them only" for name in sorted(first.keys() ^ second.keys())]
    differ += [
        f"{name} is {tuple(first[name].shape)} and {tuple(value.shape)}"
        for name, value in second.items()
        if name in first and first[name].shape != value.shape
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise InputError(f"the weights are of different networks: {'; '.join(differ[:3])}{more}")
    return {
        name: first[name].float().lerp(value.float(), share).to(value.dtype) if value.is_floating_point() else value
        for name, value in second.items()
    }


def average(first: Path, second: Path, share: float, out: Path) -> None:
    """Write the mean of two folders of weights; nothing is written before both were read.

    Args:
        first: folder.
        second: folder whose ``config.json`` is kept.
        share: of the second, 0..1.
        out: folder, another one.

    Raises:
        InputError: if a folder is missing or damaged, or they are not of one network.
    """
    first, second = find_weights(first), find_weights(second)
    if out.resolve() in (first.resolve(), second.resolve()):
        raise InputError(f"--out: {out} is one of the two folders, and would be lost; give another one")
    if not 0 <= share <= 1:
        raise InputError(f"--share: {share:g} is not within 0..1")
    before, config = _read_config(first), _read_config(second)
    for key in ("predictor", "refiner", "network"):
        if before.get(key) != config.get(key):
            raise InputError(
                f"the weights are of different networks: '{key}' is {before.get(key)} in {first / CONFIG_FILE} and "
                f"{config.get(key)} in {second / CONFIG_FILE}"
            )
    state = mean_of(read_state(first), read_state(second), share)
    parts = [
        {"share": round(part, 6), "sha256": _sha256(folder / WEIGHTS_FILE)}
        for folder, part in ((first, 1 - share), (second, share))
    ]
    # What was measured of B is not known of the mean.
    training = {key: value for key, value in config.get("training", {}).items() if key != "calibration"}
    config["training"] = {**training, "mean_of": parts}
    write_weights(out, config, state)
    (out / SUMS_FILE).write_text(f"{_sha256(out / WEIGHTS_FILE)}  {WEIGHTS_FILE}\n", encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"weights: {path} cannot be read ({error}); give a folder that a training wrote") from error
    if not isinstance(content, dict) or not isinstance(content.get("training", {}), dict):
        raise WeightsError(f"weights: {path} is of no network; give a folder that a training wrote")
    return content


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="A", help="folder of weights")
    parser.add_argument("second", type=Path, metavar="B", help="folder of weights of the same network, the later ones")
    parser.add_argument("--share", type=float, default=0.5, help="what B counts, 0..1 (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="C", help="folder of the mean")
    given = parser.parse_args(arguments)
    try:
        average(given.first, given.second, given.share, given.out)
    except InputError as error:
        print(f"nope_ros.training.average: {error}", file=sys.stderr)
        return 2
    print(f"weights: {given.out}: {1 - given.share:g} of {given.first} and {given.share:g} of {given.second}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
