"""How the node is doing: for machines on /diagnostics, for people on ~/status."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from nope_ros.distribution import Ambiguity
from nope_ros.node.distro import nanoseconds
from nope_ros.node.estimation import Seen
from nope_ros.node.outputs import Outputs
from nope_ros.node.pairing import Counts, Kind
from nope_ros.node.parameters import Settings
from nope_ros.stopwatch import TimedStage

# Times are told of this many frames.
_FRAMES = 200
# Rates are means of this many seconds: a detector of 2 Hz would otherwise flicker between 1 and 3.
_SECONDS = 5
# How long an input may be silent before that is a problem, seconds; a mask also as long as images wait for it.
_PATIENCE = 3.0
# Stamps this far from the node's clock are of another clock, seconds. The slowest detector is within.
_CLOCKS_APART = 120.0


@dataclass(frozen=True)
class FrameTimes:
    """One frame, in seconds.

    Attributes:
        estimation: from taking it until its poses were out.
        age: from its stamp until its poses were out.
        stages: of the estimation, by stage.
    """

    estimation: float
    age: float
    stages: Mapping[TimedStage, float]


@dataclass(frozen=True)
class Percentiles:
    """Of times, in milliseconds."""

    p50: float
    p95: float


class Times:
    """The last few hundred frames'."""

    def __init__(self) -> None:
        self._last: deque[FrameTimes] = deque(maxlen=_FRAMES)

    def add(self, frame: FrameTimes) -> None:
        """Take in one frame's."""
        self._last.append(frame)

    @property
    def newest(self) -> FrameTimes | None:
        """The last frame's."""
        return self._last[-1] if self._last else None

    def percentiles(self) -> dict[str, Percentiles]:
        """Of "latency" (the estimation), "stamp to pose", and each stage; empty before the first frame.

        A stage that a frame has no need of counts as no time, so that the stages add up to what frames take.
        """
        last = list(self._last)
        if not last:
            return {}
        columns = {
            "latency": [frame.estimation for frame in last],
            "stamp to pose": [frame.age for frame in last],
        }
        for stage in TimedStage.__args__:  # type: ignore[attr-defined]
            if any(stage in frame.stages for frame in last):
                columns[stage] = [frame.stages.get(stage, 0.0) for frame in last]
        return {name: Percentiles(*(1000 * np.percentile(times, (50, 95)))) for name, times in columns.items()}


@dataclass(frozen=True)
class Rates:
    """A second's."""

    images: float = 0.0
    masks: float = 0.0
    frames: float = 0.0
    skipped: float = 0.0
    orphaned: float = 0.0
    thinned: float = 0.0
    depths: float = 0.0
    deep: float = 0.0


class Meter:
    """Rates over the last seconds; asked once a second."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, Counts]] = deque(maxlen=_SECONDS + 1)

    def rates(self, now: float, counts: Counts) -> Rates:
        """Since the oldest time in memory. ``now`` in monotonic seconds."""
        self._seen.append((now, counts))
        then, before = self._seen[0]
        seconds = max(now - then, 1e-3)
        return Rates(
            images=(counts.images - before.images) / seconds,
            masks=(counts.masks - before.masks) / seconds,
            frames=(counts.taken - before.taken) / seconds,
            skipped=(counts.skipped - before.skipped) / seconds,
            orphaned=(counts.orphaned - before.orphaned) / seconds,
            thinned=(counts.thinned - before.thinned) / seconds,
            depths=(counts.depths - before.depths) / seconds,
            deep=(counts.deep - before.deep) / seconds,
        )


@dataclass(frozen=True)
class Input:
    """A topic that poses need, and for how many seconds nothing has come on it."""

    topic: str
    silent: float


def trouble(inputs: Mapping[Kind, Input], rates: Rates, newest: FrameTimes | None, settings: Settings) -> str:
    """What is wrong with what comes in, and what to do about it; or ""."""
    late = {
        one.topic: one.silent
        for kind, one in inputs.items()
        if one.silent > (max(_PATIENCE, settings.mask_patience) if kind == "mask" else _PATIENCE)
    }
    if late:
        return (
            f"nothing has come on {', '.join(late)} for {max(late.values()):.0f} s; does it run, under this name and "
            "with this QoS? `nope-ros doctor` tells"
        )
    if rates.frames == 0 and rates.orphaned > 0:
        return (
            "mask: none has the stamp of an image that still waits; the detector must copy the image's header, and "
            f"answer within mask_patience ({settings.mask_patience:g} s)"
        )
    if rates.thinned > 0:
        return (
            f"buffer_megabytes: {settings.buffer_megabytes} MB are full of images that wait for masks, so some were "
            "let go; raise it, or make masks faster"
        )
    if rates.depths > 0 and rates.frames > 0 and rates.deep == 0:
        return (
            "depth: none has the stamp of an image, so it is not used; publish it with the image's header (aligned "
            "depth), or leave the topic unconnected"
        )
    if newest is not None and abs(newest.age) > _CLOCKS_APART:
        side = "behind" if newest.age > 0 else "ahead of"
        return (
            f"image: stamps are {abs(newest.age):.0f} s {side} this node's clock; "
            "for a bag or a simulation set use_sim_time and play with --clock, else set the clocks (chrony)"
        )
    return ""


@dataclass(frozen=True)
class Sighting:
    """An object's last pose.

    Attributes:
        stamp: nanoseconds, of the image.
        frame_id: of the camera.
        distance: to the origin of the object frame, in metres if ``metric``, else in distances at registration.
        metric: whether it is metres.
        confidence: probability that the orientation is within 30°.
        ambiguity: shape of the distribution.
        trusted: whether TF has it.
    """

    stamp: int
    frame_id: str
    distance: float
    metric: bool
    confidence: float
    ambiguity: Ambiguity
    trusted: bool


def sighting(outputs: Outputs, seen: Seen) -> Sighting:
    """What is told of one object in a frame."""
    header, estimate = outputs.result.header, seen.estimate
    return Sighting(
        stamp=nanoseconds(header.stamp),
        frame_id=header.frame_id,
        distance=float(np.linalg.norm(estimate.t_camera_object)),
        metric=estimate.metric,
        confidence=estimate.confidence,
        ambiguity=estimate.ambiguity,
        trusted=outputs.trusted[estimate.object_id],
    )


@dataclass(frozen=True)
class Health:
    """How the node is doing at one moment.

    Attributes:
        name: of the node, with its namespace.
        active: whether it estimates.
        now: ROS time, nanoseconds.
        model: its name, or "none".
        device: where it runs, or "none".
        gravity: where it is known from.
        objects: each registered one's last sighting, or None.
        counts: what has become of the messages so far.
        rates: over the last seconds.
        times: by name.
        problem: what is wrong and what to do, or ""; "not active: …" where it is not.
        silent: whether no pose can come out because of it.
        more: further values for diagnostics, by key.
    """

    name: str
    active: bool
    now: int
    model: str
    device: str
    gravity: str
    objects: Mapping[str, Sighting | None]
    counts: Counts
    rates: Rates
    times: Mapping[str, Percentiles]
    problem: str
    silent: bool
    more: Mapping[str, object]


def diagnostic(health: Health) -> DiagnosticStatus:
    """For /diagnostics: ERROR where no pose can come out, WARN where something else is wrong."""
    counts, rates = health.counts, health.rates
    values = {
        "state": "active" if health.active else "not active",
        "image rate (Hz)": f"{rates.images:.1f}",
        "mask rate (Hz)": f"{rates.masks:.1f}",
        "frame rate (Hz)": f"{rates.frames:.1f}",
    }
    for name, times in health.times.items():
        values[f"{name} p50 (ms)"] = f"{times.p50:.1f}"
        values[f"{name} p95 (ms)"] = f"{times.p95:.1f}"
    values |= {
        "frames": str(counts.taken),
        "frames skipped for newer ones": str(counts.skipped),
        "images without mask": str(counts.unmatched),
        "masks without image": str(counts.orphaned),
        "images dropped for lack of memory": str(counts.thinned),
        "objects": ", ".join(health.objects) or "none",
        "model": health.model,
        "device": health.device,
        "gravity": health.gravity,
        **{key: str(value) for key, value in health.more.items()},
    }
    trouble = DiagnosticStatus.ERROR if health.silent else DiagnosticStatus.WARN
    return DiagnosticStatus(
        level=trouble if health.problem else DiagnosticStatus.OK,
        name=f"{health.name.lstrip('/')}: object poses",
        message=health.problem or "OK",
        hardware_id=health.device,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )


def text(health: Health) -> str:
    """For ~/status: a few lines for a person."""
    if not health.active:
        return f"{health.name} is {health.problem}"
    rates, counts = health.rates, health.counts
    lines = [
        f"{health.name} is active: {health.model} on {health.device}, gravity: {health.gravity}",
        f"in: image {rates.images:.1f} Hz, mask {rates.masks:.1f} Hz",
        f"out: {rates.frames:.1f} frames a second, {rates.skipped:.1f} skipped for newer ones; "
        f"so far {counts.unmatched} images without mask, {counts.orphaned} masks without image",
        f"objects: {len(health.objects) or 'none registered'}",
        *(f"  {object_id}: {_seen(one, health.now)}" for object_id, one in health.objects.items()),
    ]
    if health.times:
        times = {name: f"{one.p50:.0f} / {one.p95:.0f}" for name, one in health.times.items()}
        latency, age = times.pop("latency"), times.pop("stamp to pose")
        lines.append(f"time of a frame, ms (median / 95 %): {latency}, from its stamp {age}")
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in times.items()))
    lines.append(f"wrong: {health.problem}" if health.problem else "nothing is wrong")
    return "\n".join(lines)


def _seen(sighting: Sighting | None, now: int) -> str:
    if sighting is None:
        return "not seen yet"
    unit = "m" if sighting.metric else "× its distance at registration"
    trusted = "trusted" if sighting.trusted else "not trusted, so not on TF"
    return (
        f"seen {(now - sighting.stamp) / 1e9:.1f} s ago at {sighting.distance:.2f} {unit} in '{sighting.frame_id}', "
        f"confidence {sighting.confidence:.2f}, {sighting.ambiguity.name.lower()}, {trusted}"
    )


def memory_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
