"""What the node's callbacks run on."""

from __future__ import annotations

import threading
import time
from typing import Any

import rclpy
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.node import Node

from nope_ros.node.process import PatientExecutor


class Watched(PatientExecutor):
    """Keeps what it handed to its threads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.handed: list[Any] = []

    def wait_for_ready_callbacks(self, *args: Any, **options: Any) -> Any:
        """As it is, and noted."""
        found = super().wait_for_ready_callbacks(*args, **options)
        self.handed.append(found[0])
        return found


def test_each_callback_is_handed_over_once() -> None:
    context = rclpy.Context()
    rclpy.init(context=context)
    node = Node("patience", context=context)
    executor = Watched(num_threads=4, context=context)
    executor.add_node(node)
    calls: list[int] = []
    for number in range(3):
        group = MutuallyExclusiveCallbackGroup()
        node.create_timer(0.01, lambda number=number: calls.append(number), callback_group=group)
    done = threading.Event()

    def busy() -> None:  # as the thread that estimates, which has Python's lock most of the time
        while not done.is_set():
            sum(range(200))

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            executor.spin_once(timeout_sec=0.1)
    finally:
        done.set()
        worker.join()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
    assert set(calls) == {0, 1, 2} and len(calls) > 30
    assert len(executor.handed) == len({id(one) for one in executor.handed}), "work was handed over twice"
