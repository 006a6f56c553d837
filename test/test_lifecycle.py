"""The node in the test's own process, held up or failing at places that nobody outside can reach."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_process import K, scene
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from nope_ros.frame import InputError
from nope_ros.node.node import NopeNode
from nope_ros.srv import RegisterFromStream


@pytest.fixture
def node(ros: None, weights: Path, tmp_path: Path) -> Iterator[NopeNode]:
    values = {"weights": str(weights), "storage.directory": str(tmp_path / "objects"), "refinement": "none"}
    made = NopeNode(parameter_overrides=[Parameter(name, value=value) for name, value in values.items()])
    try:
        yield made
    finally:
        made.finish()
        made.tidy()
        made.destroy_node()


def during(held: threading.Event, first: Any, second: Any) -> list[BaseException]:
    """Run the second while the first waits for an event; what they raised."""
    raised: list[BaseException] = []

    def told(what: Any) -> None:
        try:
            what()
        except InputError as error:
            raised.append(error)

    threads = [threading.Thread(target=told, args=(what,)) for what in (first, second)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    held.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return raised


def test_a_transition_that_raises_is_told_and_can_be_tried_again(
    node: NopeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("no more publishers")

    with monkeypatch.context() as patched:
        patched.setattr(node, "_publisher", full)
        assert node.trigger_configure() != TransitionCallbackReturn.SUCCESS
    assert "no more publishers" in node._problem(None, node._meter.rates(0.0, node._pairing.counts))[0]
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS


def test_what_is_registered_during_a_deactivation_does_not_stay(
    node: NopeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.start()
    session = node._session
    assert session is not None
    image, mask = scene()
    registered = session.estimator.register(image, mask, K, object_id="mug", reference_distance=0.5)
    held, make = threading.Event(), node.create_publisher

    def slow(*arguments: Any, **options: Any) -> Any:
        held.wait(20)
        return make(*arguments, **options)

    monkeypatch.setattr(node, "create_publisher", slow)
    during(held, lambda: node._keep(registered, session, False), node.trigger_deactivate)
    assert node._objects == {} and node._session is None
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert list(node._objects) == ["mug"], "it is in the store"
    assert node._complain.total == 0
    assert node._objects["mug"].predictor is not session.estimator.predictor
    np.testing.assert_allclose(node._objects["mug"].reference.distance, 0.5)


def test_a_walk_begun_during_a_deactivation_does_not_stay(node: NopeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.start()
    session = node._session
    assert session is not None
    held, check = threading.Event(), node._check_name

    def slow(object_id: str, overwrite: bool) -> None:
        check(object_id, overwrite)
        held.wait(20)

    monkeypatch.setattr(node, "_check_name", slow)
    begin = RegisterFromStream.Request(command=RegisterFromStream.Request.START, object_id="mug")
    raised = during(held, lambda: node._start_stream(begin, session), node.trigger_deactivate)
    assert [str(error) for error in raised] == ["the node was deactivated meanwhile; activate it and start again"]
    assert node._stream is None
