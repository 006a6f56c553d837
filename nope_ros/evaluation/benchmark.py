"""Times ours and the paper's way side by side on one image: ``nope-ros benchmark``.

The paper's way is that of its release: Stable Diffusion's autoencoder and the full-size U-Net in float32, one template
at a time, every template stored. Weights are random, for time does not depend on them. A few of its templates are timed
and the time of 341 is scaled from them. Both sides get the same image, threads and device.

Each figure of ours comes with the least time the machine could take: its operations at the measured rate of a matrix
product, or its bytes at the measured rate of a copy, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nope_ros.crop import virtual_crop
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Frame, InputError
from nope_ros.latent import PaperUNetPredictor, RotatedLatentPredictor
from nope_ros.match import HarmonicBank, free_turns, predict_bank
from nope_ros.prior import free_rotations, hypotheses
from nope_ros.recording import Moment, open_recording, packaged

Array = NDArray[np.float64]

PAPER_TEMPLATES = 341
"""Viewpoints that the paper predicts; it has no in-plane roll."""

BUSY = 0.5
"""Load above which times are too long."""

_TABLE_WIDTH = 110
_BATCH = 16  # of the paper's network, where it is batched


@dataclass(frozen=True)
class Machine:
    """Where the figures come from.

    Attributes:
        device: that ran the networks, in words.
        kind: of device: "cpu" or "cuda".
        threads: CPU threads of both sides.
        load: processes that wanted to run in the last minute, ours not yet among them; above zero, times are too long.
        torch: its version.
        precision: of our network's arithmetic.
        copy_gigabytes_per_second: bytes read and written by a large copy.
        product_gflops: of a large matrix product, for each precision.
    """

    device: str
    kind: str
    threads: int
    load: float
    torch: str
    precision: str
    copy_gigabytes_per_second: float
    product_gflops: dict[str, float]


@dataclass(frozen=True)
class Step:
    """One step's time, and the least that this machine could take for it.

    Attributes:
        seconds: median.
        operations: additions and multiplications.
        bytes: that have to be read or written: weights, templates, turns.
        limit_seconds: the longer of what these take at the measured rates.
    """

    seconds: float
    operations: int
    bytes: int
    limit_seconds: float

    @property
    def ratio(self) -> float:
        """How many times the limit."""
        return self.seconds / self.limit_seconds

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {**asdict(self), "ratio": self.ratio}

    def cells(self) -> tuple[str, str, str, str]:
        """Bytes moved, operations, the limit, and how many times the limit it took, in words."""
        return step_cells(self.to_dict())


@dataclass(frozen=True)
class Ours:
    """Our side.

    Attributes:
        registration: image to templates on the full free grid, nothing kept from an earlier object.
        registration_next_seconds: of any object but the first, whose turns are there already.
        encode: one crop to its latent.
        match_341: a query's latent against the paper's viewpoints.
        match_free: the same against every rotation of the free grid.
        image_to_rotation: the median of the next; its limit is the sum of its parts': an image read, encoded, matched.
        image_to_rotation_ms: (repeats,) image, mask and calibration to pose and distribution, on the free grid.
        image_to_pose_ms: (repeats,) the same with the estimator's refinement.
        object_bytes: held for one object, with gravity known.
        shared_bytes: held once for all objects.
    """

    registration: Step
    registration_next_seconds: float
    encode: Step
    match_341: Step
    match_free: Step
    image_to_rotation: Step
    image_to_rotation_ms: Array
    image_to_pose_ms: Array
    object_bytes: int
    shared_bytes: int

    @property
    def alone_bytes(self) -> int:
        """What a single object needs: its own, and what it would share with others."""
        return self.object_bytes + self.shared_bytes


@dataclass(frozen=True)
class Paper:
    """The paper's side.

    Attributes:
        parameters: of the U-Net.
        templates: how many it predicts for an object.
        timed: how many were timed; the rest is scaled.
        template: one template alone, float32.
        template_batched: its share of a batch in the fastest precision.
        encode: one crop to its latent.
        match: a query's latent against all templates.
        object_bytes: of the templates.
    """

    parameters: int
    templates: int
    timed: int
    template: Step
    template_batched: Step
    encode: Step
    match: Step
    object_bytes: int

    @property
    def registration_seconds(self) -> float:
        """All templates, and the reference encoded once (the release does so for each template)."""
        return self.encode.seconds + self.templates * self.template.seconds

    @property
    def registration_batched_seconds(self) -> float:
        """The same in batches."""
        return self.encode.seconds + self.templates * self.template_batched.seconds


@dataclass(frozen=True)
class Benchmark:
    """Both sides, from one run on one machine."""

    machine: Machine
    ours: Ours
    paper: Paper

    @property
    def speedup(self) -> float:
        """The paper's registration, of 341 templates, over ours, of the free grid."""
        return self.paper.registration_seconds / self.ours.registration.seconds

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds: the figures with a goal on top, then both sides, and the machine."""
        ours, paper = self.ours, self.paper
        return {
            "registration_seconds": ours.registration.seconds,
            "registration_speedup": self.speedup,
            "matching_ms_341": 1e3 * ours.match_341.seconds,
            "matching_ms_free": 1e3 * ours.match_free.seconds,
            "image_to_rotation_ms": _percentiles(ours.image_to_rotation_ms),
            "image_to_pose_ms": _percentiles(ours.image_to_pose_ms),
            "object_megabytes": ours.object_bytes / 1e6,
            "object_alone_megabytes": ours.alone_bytes / 1e6,
            "ours": {
                "registration_next_seconds": ours.registration_next_seconds,
                "shared_megabytes": ours.shared_bytes / 1e6,
                "free_rotations": len(free_rotations()),
                "registration": ours.registration.to_dict(),
                "encode": ours.encode.to_dict(),
                "match_341": ours.match_341.to_dict(),
                "match_free": ours.match_free.to_dict(),
                "image_to_rotation": ours.image_to_rotation.to_dict(),
            },
            "paper": {
                "unet_parameters": paper.parameters,
                "templates": paper.templates,
                "templates_timed": paper.timed,
                "registration_seconds": paper.registration_seconds,
                "registration_batched_seconds": paper.registration_batched_seconds,
                "object_megabytes": paper.object_bytes / 1e6,
                "template": paper.template.to_dict(),
                "template_batched": paper.template_batched.to_dict(),
                "encode": paper.encode.to_dict(),
                "match": paper.match.to_dict(),
            },
            "machine": asdict(self.machine),
        }

    def table(self) -> Table:
        """The figures for a terminal."""
        ours, paper = self.ours, self.paper
        table = Table(
            title=f"{self.machine.device}, {self.machine.threads} threads, PyTorch {self.machine.torch}",
            title_justify="left",
        )
        for column in ("", "time", "moved", "operations", "limit", "× limit"):
            table.add_column(column, justify="left" if not column else "right")

        def row(name: str, seconds: float, step: Step | None = None) -> None:
            table.add_row(name, _time(seconds), *(("", "", "", "") if step is None else step.cells()))

        grid = len(free_rotations())
        table.add_row("the paper's way", style="bold")
        row(f"  registration: {paper.templates} templates", paper.registration_seconds)
        row("  the same in batches", paper.registration_batched_seconds)
        row("  one template", paper.template.seconds, paper.template)
        row("  encoding one image", paper.encode.seconds, paper.encode)
        row(f"  matching {paper.templates}", paper.match.seconds, paper.match)
        table.add_row("  one object", f"{paper.object_bytes / 1e6:.1f} MB")
        table.add_section()
        table.add_row("ours", style="bold")
        row(f"  registration: {grid} rotations", ours.registration.seconds, ours.registration)
        row("  the next object", ours.registration_next_seconds)
        row("  encoding one image", ours.encode.seconds, ours.encode)
        row(f"  matching {paper.templates}", ours.match_341.seconds, ours.match_341)
        row(f"  matching {grid}", ours.match_free.seconds, ours.match_free)
        for name, milliseconds, step in (
            ("rotation", ours.image_to_rotation_ms, ours.image_to_rotation),
            ("refined pose", ours.image_to_pose_ms, None),
        ):
            for percentile, value in _percentiles(milliseconds).items():
                row(f"  image to {name}, {percentile}", value / 1e3, step if percentile == "p50" else None)
        table.add_row("  one object", f"{ours.object_bytes / 1e6:.1f} MB")
        table.add_row("  one object with what all share", f"{ours.alone_bytes / 1e6:.1f} MB")
        table.add_section()
        next_less = paper.registration_batched_seconds / ours.registration_next_seconds
        table.add_row("registration, times less", f"{self.speedup:,.0f}")
        table.add_row("  the next object, theirs in batches", f"{next_less:,.0f}")
        table.add_row("encoding, times less", f"{paper.encode.seconds / ours.encode.seconds:,.0f}")
        table.add_row("matching, times less", f"{paper.match.seconds / ours.match_341.seconds:,.1f}")
        return table


def step_cells(step: Mapping[str, float]) -> tuple[str, str, str, str]:
    """Bytes moved, operations, the limit and how many times the limit it took, of a step's plain values, in words."""
    scale, prefix = next(pair for pair in _PREFIXES if step["operations"] >= pair[0] or pair[0] == 1e6)
    operations = f"{step['operations'] / scale:.3g} {prefix}"
    return f"{step['bytes'] / 1e6:.3g} MB", operations, _time(step["limit_seconds"]), f"{step['ratio']:.1f}"


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def _percentiles(milliseconds: Array) -> dict[str, float]:
    return {f"p{percentile}": float(np.percentile(milliseconds, percentile)) for percentile in (50, 95)}


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


class _Clock:
    """Times calls on a device, and knows how fast it could be."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device = device
        # Far larger than any cache, and long enough to be timed.
        block = torch.ones(size * size * 16, device=device)
        other = torch.empty_like(block)
        self.copy = 2 * block.nbytes / self.fastest(lambda: other.copy_(block))
        self.product = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.randn(size, size, device=device).to(dtype)
            self.product[dtype] = 2 * size**3 / self.fastest(partial(torch.mm, a, a))

    def times(self, call: Callable[[], object], repeats: int) -> Array:
        """Seconds (repeats,) of a call, after one that is not counted."""
        call()
        self._wait()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return np.array(seconds)

    def fastest(self, call: Callable[[], object], repeats: int = 5) -> float:
        """The shortest time: what a limit is made of."""
        return float(self.times(call, repeats).min())

    def step(self, seconds: float, operations: int, moved: int, dtype: torch.dtype) -> Step:
        """A time with its limit."""
        limit = max(operations / self.product.get(dtype, self.product[torch.float32]), moved / self.copy)
        return Step(seconds, operations, moved, limit)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def benchmark(
    estimator: PoseEstimator,
    paper: PaperUNetPredictor,
    frames: Sequence[Moment],
    *,
    templates: int = 3,
    repeats: int = 200,
    rate_size: int = 2048,
    report: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Time both sides.

    Args:
        estimator: ours; its predictor turns its latent.
        paper: of any size, in float32, on the same device.
        frames: the first is registered, all are queries in turn.
        templates: of the paper's that are timed.
        repeats: of what is short.
        rate_size: side of the matrices that the rates are measured with.
        report: told what comes next, nine times.

    Raises:
        InputError: if the predictor is of another kind.
    """
    predictor = estimator.predictor
    if not isinstance(predictor, RotatedLatentPredictor):
        raise InputError("benchmark: ours is the rotated latent; give weights of that kind")
    load = os.getloadavg()[0]
    with torch.inference_mode():
        report("rates of the machine")
        clock = _Clock(predictor.device, rate_size)
        ours = _time_ours(estimator, predictor, frames, clock, repeats, report)
        theirs = _time_paper(paper, frames[0], clock, templates, report)
    machine = Machine(
        device=_device_name(predictor.device),
        kind=predictor.device.type,
        threads=torch.get_num_threads(),
        load=load,
        torch=torch.__version__,
        precision=str(predictor.dtype).removeprefix("torch."),
        copy_gigabytes_per_second=clock.copy / 1e9,
        product_gflops={str(key).removeprefix("torch."): value / 1e9 for key, value in clock.product.items()},
    )
    return Benchmark(machine, ours, theirs)


def _time_ours(
    estimator: PoseEstimator,
    predictor: RotatedLatentPredictor,
    moments: Sequence[Moment],
    clock: _Clock,
    repeats: int,
    report: Callable[[str], None],
) -> Ours:
    report("ours: encoding")
    first = moments[0]
    frame = Frame(first.image, first.mask, first.camera)
    crop = virtual_crop(frame, predictor.crop_size, first.gravity_camera)
    weights = _parameter_bytes(predictor.network)
    operations = _operations(lambda: predictor.encode([crop]))
    encode = clock.step(
        float(np.median(clock.times(lambda: predictor.encode([crop]), max(repeats // 4, 1)))),
        operations,
        weights,
        predictor.dtype,
    )

    report("ours: registration")

    def register() -> RegisteredObject:
        registered = estimator.register_frame(frame)
        _ = registered.free_bank
        return registered

    def register_first() -> None:
        free_turns.cache_clear()
        register()

    again = float(np.median(clock.times(register, max(repeats // 4, 1))))
    registered = register()
    bank = registered.free_bank
    assert isinstance(bank, HarmonicBank)
    registration = clock.step(
        float(np.median(clock.times(register_first, max(repeats // 20, 1)))),
        operations,
        weights + bank.turns.nbytes,
        predictor.dtype,
    )

    report("ours: matching")
    latent = predictor.encode([crop])[0]
    level = np.array([0.0, 1.0, 0.0])
    above = hypotheses("upright", level, level)
    viewpoints = above.rotations[np.isfinite(above.log_weight)]
    small = predict_bank(predictor, latent, viewpoints)
    assert isinstance(small, HarmonicBank)
    steps = []
    for one in (small, bank):
        seconds = float(np.median(clock.times(partial(one.match, latent, predictor.temperature), repeats)))
        steps.append(clock.step(seconds, one.turns.operations, one.turns.nbytes, torch.float32))

    report("ours: image to pose")
    queue = cycle(moments)

    def image_to_rotation() -> None:
        moment = next(queue)
        query = estimator.look(Frame.from_arrays(moment.image, moment.mask, moment.camera))
        estimator.match(query, registered, "free")

    def image_to_pose() -> None:
        moment = next(queue)
        estimator.estimate(moment.image, moment.mask, moment.camera, registered, prior="free")

    looks = clock.times(image_to_rotation, repeats)
    reading = clock.step(0.0, 0, first.image.nbytes + first.mask.nbytes, torch.float32)
    parts = (reading, encode, steps[1])
    with_gravity = estimator.register_frame(frame, gravity_camera=level)
    shared = _storages(bank.turns.tensors)
    own = {
        **_storages([with_gravity.latent, with_gravity.thumbnail]),
        **_bank_storages(with_gravity.upright_bank),
    }
    own = {key: size for key, size in own.items() if key not in shared}
    return Ours(
        registration=registration,
        registration_next_seconds=again,
        encode=encode,
        match_341=steps[0],
        match_free=steps[1],
        image_to_rotation=Step(
            seconds=float(np.median(looks)),
            operations=sum(part.operations for part in parts),
            bytes=sum(part.bytes for part in parts),
            limit_seconds=sum(part.limit_seconds for part in parts),
        ),
        image_to_rotation_ms=1e3 * looks,
        image_to_pose_ms=1e3 * clock.times(image_to_pose, repeats),
        object_bytes=sum(own.values()),
        shared_bytes=sum(shared.values()) + bank.rotations.nbytes,
    )


def _storages(arrays: Sequence[Tensor | NDArray[Any]]) -> dict[int, int]:
    """Bytes of each piece of memory, so that views of one are counted once."""
    sizes = {}
    for array in arrays:
        if isinstance(array, Tensor):
            storage = array.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            sizes[array.ctypes.data] = array.nbytes
    return sizes


def _bank_storages(bank: object) -> dict[int, int]:
    assert isinstance(bank, HarmonicBank)
    return _storages([bank.rotations, bank.latent, *bank.turns.tensors])


def _time_paper(
    paper: PaperUNetPredictor, moment: Moment, clock: _Clock, templates: int, report: Callable[[str], None]
) -> Paper:
    network = paper.network
    crop = virtual_crop(Frame(moment.image, moment.mask, moment.camera), paper.crop_size, moment.gravity_camera)
    report("the paper's way: encoding")
    latent = paper.encode([crop])[0]
    encode = clock.step(
        float(np.median(clock.times(lambda: paper.encode([crop]), templates))),
        _operations(lambda: paper.encode([crop])),
        _parameter_bytes(network.vae.encoder),
        torch.float32,
    )

    report("the paper's way: one template at a time")
    level = np.array([0.0, 1.0, 0.0])
    above = hypotheses("upright", level, level)
    rotations = torch.from_numpy(above.rotations[np.isfinite(above.log_weight)][:PAPER_TEMPLATES]).float()
    queue = iter(range(templates + 1))
    weights = _parameter_bytes(network.unet)
    operations = _operations(lambda: paper.predict(latent, rotations[:1]))

    def template() -> None:
        number = next(queue)
        paper.predict(latent, rotations[number : number + 1])

    one = clock.step(float(np.median(clock.times(template, templates))), operations, weights, torch.float32)

    report("the paper's way: in batches")
    batched = PaperUNetPredictor(network, device=paper.device, batch_size=_BATCH)
    seconds = float(np.median(clock.times(lambda: batched.predict(latent, rotations[:_BATCH]), 1))) / _BATCH
    in_batch = clock.step(seconds, operations, weights // _BATCH, batched.dtype)

    report("the paper's way: matching")
    stored = latent.expand(len(rotations), -1).clone()

    def match() -> Tensor:
        # Its release: differences to all templates, their norms, the nearest.
        return (stored - latent).square().sum(1).sqrt().argsort()

    matching = clock.step(float(np.median(clock.times(match, 20))), 3 * stored.numel(), stored.nbytes, torch.float32)
    return Paper(
        parameters=sum(parameter.numel() for parameter in network.unet.parameters()),
        templates=len(rotations),
        timed=templates,
        template=one,
        template_batched=in_batch,
        encode=encode,
        match=matching,
        object_bytes=stored.nbytes,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def bundled_frames(limit: int = 24) -> list[Moment]:
    """Frames of the bundled sequence.

    Raises:
        InputError: if it is not installed.
    """
    folder = packaged("demo/sequence")
    if folder is None:
        raise InputError("benchmark: demo/sequence is not here; run in the checkout, or give --data a folder like it")
    return list(open_recording(folder, limit=limit))


def paper_predictor(device: str | torch.device) -> PaperUNetPredictor:
    """The paper's networks at full size with random weights, in float32."""
    from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig

    return PaperUNetPredictor(PaperUNet(PaperUNetConfig.paper()), device=device, dtype=torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """``nope-ros benchmark``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="nope-ros benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--weights", help="folder of ours; the packaged ones by default")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides; PyTorch's own choice by default")
    parser.add_argument("--templates", type=int, default=3, help="of the paper's that are timed (%(default)s)")
    parser.add_argument("--data", help="folder of images like demo/sequence, which is the default")
    given = parser.parse_args(arguments)
    for name in ("threads", "templates"):
        value = getattr(given, name)
        if value is not None and not 1 <= value < PAPER_TEMPLATES:
            parser.error(f"--{name}: {value} is not within 1..{PAPER_TEMPLATES - 1}")
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    try:
        result = run(given)
    except InputError as error:
        print(f"nope-ros benchmark: {error}", file=sys.stderr)
        return 2
    console.print(result.table())
    if result.machine.load > BUSY:
        console.print(
            f"the machine was not idle (load {result.machine.load:.1f}): times are too long, on both sides",
            style="yellow",
            highlight=False,
        )
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {given.json}", highlight=False)
    return 0


def run(given: argparse.Namespace) -> Benchmark:
    """The benchmark that the arguments ask for, with a bar.

    Raises:
        InputError: naming what does not fit.
    """
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading images and weights", total=10)

        def report(what: str) -> None:
            bar.update(task, advance=1, description=what)

        frames = bundled_frames() if given.data is None else list(open_recording(given.data, limit=24))
        estimator = PoseEstimator.from_pretrained(given.weights, device=given.device)
        report("the paper's networks")
        paper = paper_predictor(estimator.device)
        result = benchmark(estimator, paper, frames, templates=given.templates, report=report)
        bar.update(task, completed=10, description="done")
    return result


if __name__ == "__main__":
    raise SystemExit(main())
