"""How long the stages of an estimate take: marked where they happen, collected by whoever asks.

    with timed() as seconds:
        estimator.estimate(image, mask, K)
    seconds  # {"crop": 0.002, "encode": 0.014, "match": 0.003, "pose": 0.002}

Where nobody asks, a mark costs half a microsecond. What a GPU does is counted in the stage that waits for its result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

TimedStage = Literal["read", "crop", "encode", "match", "pose", "refine", "publish"]

# Of the thread that asked, so that a registration in another one is not counted.
_collected: ContextVar[dict[TimedStage, float] | None] = ContextVar("collected", default=None)


@contextmanager
def timed() -> Iterator[dict[TimedStage, float]]:
    """Collect seconds by stage from everything this thread does in the block."""
    seconds: dict[TimedStage, float] = {}
    token = _collected.set(seconds)
    try:
        yield seconds
    finally:
        _collected.reset(token)


class stage:
    """Marks a block as a stage. Blocks of one name add up; a block within another counts for both."""

    def __init__(self, name: TimedStage) -> None:
        self._name: TimedStage = name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = _collected.get()
        if seconds is not None:
            seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._begin
