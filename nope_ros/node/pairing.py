"""Which image, mask, calibration and depth belong together. Knows stamps and sizes, nothing of ROS.

A mask comes from a detector that may need seconds, so images wait for it. Frames come faster than poses are estimated,
so of all complete frames only the newest is handed out and the rest counted; of a recording, which can wait, each one.
What waits is bounded in bytes and time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["image", "mask", "camera_info", "depth"]

NANOSECONDS = 1_000_000_000

JUMP_BACK = NANOSECONDS // 2
"""What one sender sends arrives in order up to jitter. What is older than its newest by more than this comes from a
clock that was set back, as when a bag is played in a loop."""

# A frame waits this long for the depth image of a depth camera that is running.
_DEPTH_PATIENCE = NANOSECONDS // 5
_LATE: tuple[Kind, ...] = ("mask", "depth")
# Calibrations kept by stamp, for cameras that zoom; all others send the same one over and over.
_CALIBRATIONS = 64


@dataclass(frozen=True)
class FrameMessages:
    """Messages that belong to one moment.

    Attributes:
        stamp: nanoseconds, of the image.
        image: the image message.
        mask: the mask message of the same stamp.
        camera_info: calibration of the same stamp, or the newest one.
        depth: depth message of the same stamp, or None.
        came: when the image did, monotonic seconds.
    """

    stamp: int
    image: Any
    mask: Any
    camera_info: Any
    depth: Any = None
    came: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True)
class Counts:
    """What has become of the messages so far.

    Attributes:
        images: images received.
        masks: masks received.
        taken: frames handed out.
        skipped: complete frames that a newer one overtook.
        unmatched: images that no mask came for in time.
        orphaned: masks whose image never came, or is gone.
        thinned: images given up because the buffer was full (also in unmatched or skipped).
        restarts: times the clock was set back.
        depths: depth images received.
        deep: frames handed out that had depth.
    """

    images: int = 0
    masks: int = 0
    taken: int = 0
    skipped: int = 0
    unmatched: int = 0
    orphaned: int = 0
    thinned: int = 0
    restarts: int = 0
    depths: int = 0
    deep: int = 0


class Pairing:
    """Collects messages from several threads and hands complete frames to one.

    Attributes:
        patience: nanoseconds an image waits for its mask, and a mask for its image.
        capacity: bytes of images, masks and depth held at most; the newest frame is held whatever its size.
        every: whether complete frames are handed out one after another, the oldest first, and none is overtaken.
    """

    def __init__(self, *, patience: int, capacity: int, every: bool = False) -> None:
        """Start empty."""
        self.patience = patience
        self.capacity = capacity
        self.every = every
        self._changed = threading.Condition()
        self._counts = Counts()
        self._last: FrameMessages | None = None
        self._forget()

    def _forget(self) -> None:
        self._held: dict[Kind, dict[int, tuple[Any, int]]] = {"image": {}, "mask": {}, "depth": {}}
        self._came: dict[int, float] = {}  # when each image did
        self._calibrations: deque[tuple[int, Any]] = deque(maxlen=_CALIBRATIONS)
        self._newest_image: int | None = None
        self._newest_depth: int | None = None
        self._taken_stamp: int | None = None

    @property
    def counts(self) -> Counts:
        """What has become of the messages so far."""
        with self._changed:
            return self._counts

    @property
    def held_bytes(self) -> int:
        """Bytes of the messages that wait."""
        with self._changed:
            return self._bytes()

    @property
    def calibrated(self) -> bool:
        """Whether any calibration has come."""
        with self._changed:
            return bool(self._calibrations)

    def add(self, kind: Kind, stamp: int, message: Any, size: int = 0) -> None:
        """Take in a message.

        Args:
            kind: which topic it came from.
            stamp: nanoseconds of its header.
            message: handed back as it is.
            size: bytes it occupies.
        """
        with self._changed:
            if kind == "image":
                self._begin_image(stamp)
            elif kind == "mask":
                self._count(masks=1)
            elif kind == "depth":
                self._newest_depth = stamp
                self._count(depths=1)
            if kind == "camera_info":
                self._calibrations.append((stamp, message))
            elif self._taken_stamp is not None and stamp < self._taken_stamp:
                # The frame it belongs to was overtaken while this was on its way, and its image counted then.
                self._count(orphaned=kind == "mask", unmatched=kind == "image")
            else:
                if kind == "image" and stamp in self._held["image"]:
                    self._count(skipped=1)  # sent twice
                self._held[kind][stamp] = (message, size)
                if kind == "image":
                    self._came[stamp] = time.monotonic()
                self._expire()
                self._thin(keep=stamp)
            self._changed.notify_all()

    def take(self, timeout: float) -> FrameMessages | None:
        """The newest complete frame, or the oldest with ``every``, waited for up to timeout seconds.

        Everything older is let go.
        """
        with self._changed:
            self._changed.wait_for(self._complete, timeout)
            complete = self._complete()
            if not complete:
                return None
            stamp = complete[0] if self.every else complete[-1]
            self._last = self._messages_of(stamp)
            self._taken_stamp = stamp
            self._count(taken=1, deep=self._last.depth is not None)
            del self._held["image"][stamp], self._held["mask"][stamp], self._came[stamp]
            self._let_go(lambda older: older < stamp)
            self._held["depth"].pop(stamp, None)
            return self._last

    def latest(self) -> FrameMessages | None:
        """The newest complete frame, handed out or not; it stays where it is."""
        with self._changed:
            complete = self._complete()
            return self._messages_of(complete[-1]) if complete else self._last

    def finish(self) -> None:
        """Nothing more will come: frames no longer wait for their depth."""
        with self._changed:
            self._newest_depth = None
            self._changed.notify_all()

    def clear(self) -> None:
        """Let everything go, the latest frame included; counts and the newest calibration stay."""
        with self._changed:
            self._begin_anew()

    def _begin_image(self, stamp: int) -> None:
        if self._newest_image is not None and stamp < self._newest_image - JUMP_BACK:
            self._begin_anew()
            self._count(restarts=1)
        self._newest_image = stamp if self._newest_image is None else max(stamp, self._newest_image)
        self._count(images=1)

    def _begin_anew(self) -> None:
        calibrations = list(self._calibrations)[-1:]  # some drivers send it once
        self._let_go(lambda _: True)
        self._forget()
        self._last = None  # of another time: what it shows may have been put away since
        self._calibrations.extend(calibrations)

    def _expire(self) -> None:
        if self._newest_image is not None:
            limit = self._newest_image - self.patience
            self._let_go(lambda stamp: stamp < limit)

    def _thin(self, keep: int) -> None:
        # Not the oldest image goes, but the one whose neighbours are nearest: a detector slower than the buffer lasts
        # would otherwise never find the image it worked on, and no pose would ever come out.
        while self._bytes() > self.capacity:
            images = sorted(stamp for stamp in self._held["image"] if stamp != keep)
            others = [(stamp, kind) for kind in _LATE for stamp in self._held[kind] if stamp != keep]
            if images:
                gaps = [
                    (after - before, stamp)
                    for before, stamp, after in zip(images, images[1:], images[2:], strict=False)
                ]
                given_up = min(gaps)[1] if gaps else images[0]
                self._let_go(given_up.__eq__)
                self._count(thinned=1)
            elif others:
                stamp, kind = min(others)
                del self._held[kind][stamp]
                self._count(orphaned=kind == "mask")
            else:
                return

    def _let_go(self, is_old: Callable[[int], bool]) -> None:
        images, masks, depths = self._held["image"], self._held["mask"], self._held["depth"]
        for stamp in [stamp for stamp in images if is_old(stamp)]:
            complete = masks.pop(stamp, None) is not None
            del images[stamp], self._came[stamp]
            depths.pop(stamp, None)
            self._count(skipped=complete, unmatched=not complete)
        for stamp in [stamp for stamp in masks if is_old(stamp)]:
            del masks[stamp]
            self._count(orphaned=1)
        for stamp in [stamp for stamp in depths if is_old(stamp)]:
            del depths[stamp]

    def _complete(self) -> list[int]:
        if not self._calibrations:
            return []
        both = self._held["image"].keys() & self._held["mask"].keys()
        return sorted(stamp for stamp in both if not self._waits_for_depth(stamp))

    def _waits_for_depth(self, stamp: int) -> bool:
        if stamp in self._held["depth"] or self._newest_depth is None or self._newest_image is None:
            return False
        running = stamp - self.patience <= self._newest_depth < stamp  # newer than stamp: this one was lost
        return running and self._newest_image - stamp < _DEPTH_PATIENCE

    def _messages_of(self, stamp: int) -> FrameMessages:
        same = [message for other, message in self._calibrations if other == stamp]
        camera_info = same[-1] if same else self._calibrations[-1][1]
        depth = self._held["depth"].get(stamp)
        return FrameMessages(
            stamp=stamp,
            image=self._held["image"][stamp][0],
            mask=self._held["mask"][stamp][0],
            camera_info=camera_info,
            depth=None if depth is None else depth[0],
            came=self._came[stamp],
        )

    def _bytes(self) -> int:
        return sum(size for held in self._held.values() for _, size in held.values())

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + int(n) for name, n in more.items()})
