"""The command ``nope-ros``: one word says what to do, the rest goes to the module that does it.

Modules are imported when they are asked for: most need neither ROS nor what training needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Words = Sequence[str]


@dataclass(frozen=True)
class Command:
    """A word, what runs it (given the words after it; returns the exit code), and what it does."""

    word: str
    run: Callable[[Words], int]
    help: str


def _demo(words: Words) -> int:
    from nope_ros.demo import run

    return run.main(words)


def _play(words: Words) -> int:
    from nope_ros.demo import player

    return player.main(words)


def _estimate(words: Words) -> int:
    from nope_ros.commands import estimate

    return estimate.main(words)


def _bag(words: Words) -> int:
    from nope_ros.node import bag

    return bag.main(words)


def _load(words: Words) -> int:
    from nope_ros.demo import load

    return load.main(words)


def _doctor(words: Words) -> int:
    from nope_ros.commands import doctor

    return doctor.main(words)


def _evaluate(words: Words) -> int:
    from nope_ros.evaluation import evaluate

    parser = argparse.ArgumentParser(
        prog="nope-ros evaluate", description=evaluate.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    evaluate.add_arguments(parser)
    return evaluate.main(parser.parse_args(words))


def _benchmark(words: Words) -> int:
    from nope_ros.evaluation import benchmark

    return benchmark.main(words)


def _report(words: Words) -> int:
    from nope_ros.evaluation import report

    return report.main(words)


def _render(words: Words) -> int:
    from nope_ros.training import render_cache

    try:
        render_cache.main(list(words))
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(f"nope-ros render: {error.code}", file=sys.stderr)
        return 2
    return 0


def _train(words: Words) -> int:
    parser = argparse.ArgumentParser(prog="nope-ros train", description="Learn weights; goes on where it stopped.")
    parser.add_argument("config", type=Path, help="YAML, such as config/train/rotated_latent.yaml")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of checkpoint, log and weights; out/train/<config's name> by default",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="values that replace the file's, such as budget_minutes=10"
    )
    given = parser.parse_intermixed_args(words)

    import yaml
    from accelerate import PartialState

    from nope_ros.frame import InputError
    from nope_ros.training.train import train

    overrides: dict[str, object] = {}
    for item in given.overrides:
        name, equals, value = item.partition("=")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            parser.error(f"{item}: not NAME=VALUE")
    out = given.out or Path("out", "train", given.config.stem)
    try:
        train(given.config, out, overrides)
    except InputError as error:
        print(f"nope-ros train: {error}", file=sys.stderr)
        return 2
    PartialState().destroy_process_group()  # with several processes, all are done now
    return 0


def _register(words: Words) -> int:
    from nope_ros.commands import register

    return register.main(words)


def _objects(words: Words) -> int:
    from nope_ros.commands import objects

    return objects.main(words)


def _align(words: Words) -> int:
    from nope_ros.commands import align

    return align.main(words)


def _reference(words: Words) -> int:
    parser = argparse.ArgumentParser(prog="nope-ros reference", description="What the node offers, from its code.")
    parser.add_argument("what", nargs="?", choices=("topics", "parameters", "yaml"), help="both tables by default")
    given = parser.parse_args(words)

    from nope_ros.node import parameters, topics

    if given.what == "yaml":
        print(parameters.yaml(), end="")
        return 0
    tables = {"topics": topics.table, "parameters": parameters.table}
    print("\n\n".join(table() for name, table in tables.items() if given.what in (None, name)))
    return 0


COMMANDS = (
    Command("demo", _demo, "the real node on a recorded sequence: poses, pictures, figures (needs ROS)"),
    Command("play", _play, "a recorded sequence as ROS topics (needs ROS)"),
    Command("estimate", _estimate, "poses in a folder of images, as a library does it"),
    Command("register", _register, "an object from a walk around it (folder, bag or video), or from its mesh"),
    Command("objects", _objects, "which objects are registered; removes one"),
    Command(
        "align", _align, "one registered object laid over another: the similarity, and whether they are of one kind"
    ),
    Command("bag", _bag, "the node on recorded bags, without ROS: poses written to a bag"),
    Command("doctor", _doctor, "what is installed, which device and model, whether topics arrive, and what to do"),
    Command("load", _load, "the node under load: latency, memory, CPU (needs ROS)"),
    Command("evaluate", _evaluate, "figures on photographs, meshes, drawn objects, BOP; walks, alignments, identity"),
    Command("benchmark", _benchmark, "times of ours and of the paper's way, side by side"),
    Command("report", _report, "the document of all figures, docs/benchmark.md"),
    Command("render", _render, "training images of meshes and procedural objects"),
    Command("train", _train, "learn weights from rendered images"),
    Command("reference", _reference, "the node's topics and parameters"),
)


def usage() -> str:
    """What to type."""
    width = max(len(command.word) for command in COMMANDS)
    lines = [f"  {command.word:<{width}}  {command.help}" for command in COMMANDS]
    return "usage: nope-ros COMMAND ...\n\n" + "\n".join(lines) + "\n\n`nope-ros COMMAND --help` tells its options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    command = next((command for command in COMMANDS if command.word == words[0]), None)
    if command is None:
        print(f"nope-ros: '{words[0]}' is unknown\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return command.run(words[1:])
    except KeyboardInterrupt:
        print(f"nope-ros {command.word}: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "nope_ros" and error.name not in ("nope_ros.msg", "nope_ros.srv"):
            raise  # ours, and missing: not a matter of installing something
        wanted = "ROS 2 and the built messages (`make setup`, then source install/setup.bash)"
        needs = wanted if missing in ("rclpy", "nope_ros") or missing.endswith("_msgs") else missing
        print(f"nope-ros {command.word}: needs {needs}; '{error.name}' is not there", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
