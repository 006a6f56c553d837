"""Says what is wrong when it begins to be, and then not thirty times a second."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# A problem that has not come for so long is over, seconds; when it comes again it is told again.
PERIOD = 10.0
_MOST_KINDS = 200


@dataclass
class _Told:
    last: float
    times: int = 1


class Complaints:
    """Passes a message on when it is new, and when it comes back, then with the number of times it came before.

    Messages that differ only in their numbers are the same problem.

    Attributes:
        total: how many there were.
        last: the last one and when it came (monotonic seconds), or None.
    """

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._told: dict[str, _Told] = {}
        self._lock = threading.Lock()
        self.total = 0
        self.last: tuple[str, float] | None = None

    def __call__(self, problem: object) -> None:
        """Tell of a problem: an exception or a text."""
        text = str(problem)
        kind = re.sub(r"[-+]?[\d.]+", "#", text)[:200]
        now = self._clock()
        with self._lock:
            self.total += 1
            self.last = (text, now)
            told = self._told.get(kind)
            if told is not None and now - told.last < PERIOD:
                told.last = now
                told.times += 1
                return
            if len(self._told) >= _MOST_KINDS:
                self._told.clear()
            self._told[kind] = _Told(now)
        again = f" (as before: {told.times} times until {now - told.last:.0f} s ago)" if told is not None else ""
        self._say(text + again)
