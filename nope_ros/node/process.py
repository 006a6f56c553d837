"""A node as a process of its own, from its first to its last signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.executors import MultiThreadedExecutor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from nope_ros.frame import InputError


def stop_signal() -> threading.Event:
    """Set when SIGINT or SIGTERM comes: rclpy's own handlers would shut down before a node could say goodbye."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


class PatientExecutor(MultiThreadedExecutor):
    """An executor of several threads that hands each of them its work once.

    rclpy's hands a callback to the pool again and again until a thread has begun it, without a pause, and so keeps
    that thread, and the one that estimates, from Python's global lock: large images made the node ten times slower.
    """

    _handed_over: Any = None

    def wait_for_ready_callbacks(self, *args: Any, **options: Any) -> Any:
        """As rclpy's, once the last one has begun; not for ever, as one that awaits something seems not to have."""
        limit = time.monotonic() + 0.1
        last = self._handed_over
        while last is not None and not (last.executing() or last.done()) and time.monotonic() < limit:
            time.sleep(1e-4)
        found = super().wait_for_ready_callbacks(*args, **options)
        self._handed_over = found[0]
        return found


def run(name: str, make: Callable[[], Node], arguments: list[str] | None) -> int:
    """Spin a node on one thread until a signal comes; returns the exit code.

    Args:
        name: of the node, for the log if it cannot be made.
        make: the node; an InputError says why there is none.
        arguments: of the command line.
    """
    stop = stop_signal()
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = make()
    except InputError as error:
        rclpy.logging.get_logger(name).fatal(str(error))
        rclpy.shutdown()
        return 1
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not stop.is_set():
        executor.spin_once(timeout_sec=0.2)
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown()
    return 0
