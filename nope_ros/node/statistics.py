"""How the node is doing, as a diagnostic status."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

# Latencies are told of this many frames.
_FRAMES = 200


@dataclass(frozen=True)
class Latency:
    """One frame: seconds its estimation took, and seconds from its stamp until its poses were out."""

    estimation: float
    age: float


class Latencies:
    """The last few hundred frames'."""

    def __init__(self) -> None:
        self._last: deque[Latency] = deque(maxlen=_FRAMES)

    def add(self, latency: Latency) -> None:
        """Take in one frame's."""
        self._last.append(latency)

    def values(self) -> dict[str, str]:
        """Key and value for diagnostics; empty before the first frame."""
        last = list(self._last)
        if not last:
            return {}
        estimation = np.percentile([one.estimation for one in last], (50, 95)) * 1000
        age = np.percentile([one.age for one in last], (50, 95)) * 1000
        return {
            "latency p50 (ms)": f"{estimation[0]:.1f}",
            "latency p95 (ms)": f"{estimation[1]:.1f}",
            "stamp to pose p50 (ms)": f"{age[0]:.1f}",
            "stamp to pose p95 (ms)": f"{age[1]:.1f}",
        }


def memory_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def status(name: str, hardware: str, problem: str, values: dict[str, Any]) -> DiagnosticStatus:
    """A diagnostic status: a warning if there is a problem.

    Args:
        name: of the node.
        hardware: what computes.
        problem: told as the message, or "".
        values: in this order.
    """
    return DiagnosticStatus(
        level=DiagnosticStatus.WARN if problem else DiagnosticStatus.OK,
        name=f"{name}: object poses",
        message=problem or "OK",
        hardware_id=hardware,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()],
    )
