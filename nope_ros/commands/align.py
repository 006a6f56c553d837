"""Lay one registered object over another: ``nope-ros align A B``.

A and B are names in the folder of registered objects, or folders, bags (see ``nope-ros register``) of a walk each. A
walk that needs more than --fixed-frame to be read is registered first, and then named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from nope_ros.align import GATE, Surface, align_surfaces, in_frame_of_a
from nope_ros.commands.register import Source
from nope_ros.draw import draw_pair, on_white
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.features import FeatureExtractor
from nope_ros.frame import InputError
from nope_ros.store import ObjectStore, check_object_id


def main(words: Sequence[str]) -> int:
    """Command line; the exit status is 1 where the two are refused."""
    parser = argparse.ArgumentParser(
        prog="nope-ros align", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="stays where it is")
    parser.add_argument("b", metavar="B", help="is moved")
    parser.add_argument("--gate", type=float, default=GATE, help="least score that is accepted (%(default)s)")
    parser.add_argument("--fixed-frame", default="", help="of bags: TF frame in which the object stands, z up")
    parser.add_argument(
        "--save", default="", metavar="NAME", help="store B under this name, its poses then being of the frame of A"
    )
    parser.add_argument("--overwrite", action="store_true", help="of --save: replace an object of that name")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where the pair is drawn (A_B.png in this folder)")
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
        if given.save:
            check_object_id(given.save)
            if given.save == given.a:
                raise InputError(f"--save: '{given.save}' is A, which B would take the place of; give another name")
        sources = {name: _recording(name, given.fixed_frame) for name in (given.a, given.b)}
        if given.fixed_frame and not any(source is not None and source.bag is not None for source in sources.values()):
            raise InputError("--fixed-frame is of the TF of bags, and neither A nor B is a bag; leave it out")
        estimator = PoseEstimator.from_pretrained(given.weights, device=given.device)
        if given.save and not given.overwrite and ObjectStore(given.store).holds(given.save, estimator.predictor):
            raise InputError(f"--save: '{given.save}' is registered already; choose another name, or --overwrite")
        extractor = None
        if given.features is not None:
            extractor = FeatureExtractor.from_checkpoint(given.features, device=given.device)
        objects = [_object(name, sources[name], given.store, estimator) for name in (given.a, given.b)]
        a, b = (Surface.of(one, extractor) for one in objects)
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
    name_a, name_b = (
        name if sources[name] is None else Path(name).expanduser().resolve().stem for name in (given.a, given.b)
    )
    out = given.out if given.out is not None else Path(f"{name_a}_{name_b}.png")
    try:
        draw_pair(a, b, found, out, ((name_a, on_white(objects[0])), (name_b, on_white(objects[1]))))
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
        if given.save and found.accepted:
            store = ObjectStore(given.store)
            store.save(in_frame_of_a(objects[1], found, given.save))
            console.print(f"Stored '{given.save}' in {store.folder}", highlight=False, soft_wrap=True)
    except InputError as error:
        print(f"nope-ros align: {error}", file=sys.stderr)
        return 2
    return 0 if found.accepted else 1


def _recording(name: str, fixed_frame: str) -> Source | None:
    """What lies at a path of this name, or None if nothing does: it is an object's."""
    path = Path(name).expanduser()
    return Source.at(path, fixed_frame=fixed_frame) if path.exists() else None


def _object(name: str, source: Source | None, folder: Path, estimator: PoseEstimator) -> RegisteredObject:
    if source is not None:
        return estimator.register_walk(source.walk(estimator.predictor.crop_size))
    loaded = ObjectStore(folder).load_all(estimator.predictor)
    for one in loaded.objects:
        if one.object_id == name:
            return one
    known = ", ".join(one.object_id for one in loaded.objects) or "none"
    raise InputError(f"'{name}' is neither a recording nor a registered object; registered in {folder}: {known}")
