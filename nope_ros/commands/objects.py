"""The registered objects: what a node will look for when it is activated.

nope-ros objects
nope-ros objects --remove mug

A node that is active keeps what it has loaded: tell it by its service ~/unregister_object instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nope_ros.estimator import RegisteredObject
from nope_ros.frame import InputError
from nope_ros.latent import load_predictor
from nope_ros.store import ObjectStore


def main(words: Sequence[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros objects", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--remove", metavar="NAME", help="delete this object's file")
    parser.add_argument(
        "--store", type=Path, default=Path("~/.local/share/nope_ros"), help="folder of registered objects (%(default)s)"
    )
    parser.add_argument("--weights", help="folder of weights; the packaged ones if it is left out")
    given = parser.parse_args(words)
    console = Console()
    try:
        store = ObjectStore(given.store)
        loaded = store.load_all(load_predictor(given.weights, device="cpu"))
        if given.remove is not None:
            known = ", ".join(one.object_id for one in loaded.objects) or "none"
            if given.remove not in {one.object_id for one in loaded.objects}:
                raise InputError(f"'{given.remove}' is not registered in {store.folder}; registered: {known}")
            store.delete(given.remove)
            console.print(f"Removed '{given.remove}' from {store.folder}", highlight=False, soft_wrap=True)
            return 0
    except InputError as error:
        print(f"nope-ros objects: {error}", file=sys.stderr)
        return 2
    console.print(f"{len(loaded.objects)} in {store.folder}", highlight=False, soft_wrap=True)
    table = Table()
    for column in ("object", "from", "lengths", "gravity"):
        table.add_column(column)
    for one in loaded.objects:
        table.add_row(
            escape(one.object_id),
            _source(one),
            "metres" if one.metric else "unknown",
            "known" if one.gravity_known else "unknown",
        )
    console.print(table)
    for problem in loaded.problems:
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return 0


def _source(registered: RegisteredObject) -> str:
    if registered.rendered is not None:
        return "a mesh"
    if registered.keyframes is not None:
        return f"a walk, {len(registered.keyframes.names)} keyframes"
    return "one view"
