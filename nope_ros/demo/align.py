"""Lay one registered object over another: ``nope-ros align A B``.

A and B are names in the folder of registered objects, or folders, bags (see ``nope-ros register``) of a walk each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from nope_ros.align import GATE, Alignment, Surface, align_surfaces
from nope_ros.demo.register import walk_of
from nope_ros.demo.sequence import Moment, open_recording
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.features import FeatureExtractor
from nope_ros.frame import InputError
from nope_ros.store import ObjectStore
from nope_ros.video import Pose

Array = NDArray[np.float64]


def main(words: Sequence[str]) -> int:
    """Command line; the exit status is 1 where the two are refused."""
    parser = argparse.ArgumentParser(
        prog="nope-ros align", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="stays where it is")
    parser.add_argument("b", metavar="B", help="is moved")
    parser.add_argument("--gate", type=float, default=GATE, help="least score that is accepted (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw the pair there")
    parser.add_argument(
        "--store", type=Path, default=Path("~/.local/share/nope_ros"), help="folder of registered objects (%(default)s)"
    )
    parser.add_argument("--weights", help="folder of weights; the packaged ones if it is left out")
    parser.add_argument(
        "--features", type=Path, metavar="FILE", help="checkpoint of DINO, DINOv2 or a ViT; our own by default"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    given = parser.parse_args(words)
    console = Console()
    try:
        estimator = PoseEstimator.from_pretrained(given.weights, device=given.device)
        extractor = None
        if given.features is not None:
            extractor = FeatureExtractor.from_checkpoint(given.features, device=given.device)
        a, b = (Surface.of(_find(name, given.store, estimator), extractor) for name in (given.a, given.b))
    except InputError as error:
        print(f"nope-ros align: {error}", file=sys.stderr)
        return 2
    found = align_surfaces(a, b, gate=given.gate)
    verdict = "accepted" if found.accepted else f"refused: below the gate of {given.gate:g}, not of one kind"
    console.print(
        f"score {found.score:.3f} ({verdict}): geometry {found.geometry:.3f}, appearance {found.appearance:.3f}; "
        f"cosine of the latents {found.correlation:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    if found.accepted:
        console.print(f"x_a = {found.scale:.4f} R x_b + t", highlight=False)
        console.print(
            f"R = {np.array2string(found.R, precision=4, suppress_small=True, prefix='R = ')}", highlight=False
        )
        console.print(f"t = {np.array2string(found.t, precision=4, suppress_small=True)}", highlight=False)
    if given.out is not None:
        draw(a, b, found, given.out, (Path(given.a).name, Path(given.b).name))
        console.print(f"wrote {given.out}", highlight=False)
    return 0 if found.accepted else 1


def _find(name: str, store: Path, estimator: PoseEstimator) -> RegisteredObject:
    if Path(name).expanduser().exists():
        recording = open_recording(name)

        def pose_of(_: int, moment: Moment) -> Pose | None:
            return None if moment.truth is None else (moment.truth.R_camera_object, moment.truth.t_camera_object)

        walk = walk_of(iter(recording), estimator.predictor.crop_size, pose_of, ordered=False)
        return estimator.register_walk(walk, object_id=recording.name)
    loaded = ObjectStore(store).load_all(estimator.predictor)
    for one in loaded.objects:
        if one.object_id == name:
            return one
    known = ", ".join(one.object_id for one in loaded.objects) or "none"
    raise InputError(f"'{name}' is neither a recording nor a registered object; registered in {store}: {known}")


def draw(a: Surface, b: Surface, found: Alignment, path: Path, names: tuple[str, str]) -> None:
    """Both objects as points, of one colour where their features are alike, and one over the other."""
    moved = found.scale * b.points @ found.R.T + found.t
    # One feature of each place: of the first view that sees it.
    first_a, first_b = (one.features[np.arange(len(one.points)), one.seen.argmax(axis=1)] for one in (a, b))
    features = np.concatenate([first_a, first_b])
    basis = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)[2][:3]
    colours = features @ basis.T
    low, high = np.percentile(colours, [2, 98], axis=0)
    colours = np.clip((colours - low) / (high - low), 0, 1)
    colour_a, colour_b = colours[: len(a.points)], colours[len(a.points) :]
    figure = Figure(figsize=(12, 4))
    FigureCanvasAgg(figure)
    parts = (
        (names[0], [(a.points, colour_a, "o")]),
        (f"{names[1]}, aligned", [(moved, colour_b, "^")]),
        (f"both: {found.score:.2f}", [(a.points, "tab:blue", "o"), (moved, "tab:orange", "^")]),
    )
    for index, (title, clouds) in enumerate(parts):
        axes = figure.add_subplot(1, 3, index + 1, projection="3d")
        for points, colour, marker in clouds:
            axes.scatter(*points.T, c=colour, marker=marker, s=18, depthshade=False)
        axes.set_title(title)
        axes.set_box_aspect((1, 1, 1))
        reach = float(np.abs(np.concatenate([a.points, moved])).max())
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
