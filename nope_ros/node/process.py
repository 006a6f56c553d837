"""A node as a process of its own, from its first to its last signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from nope_ros.frame import InputError


def stop_signal() -> threading.Event:
    """Set when SIGINT or SIGTERM comes: rclpy's own handlers would shut down before a node could say goodbye."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


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
