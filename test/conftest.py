"""Fixtures that several files share. A module's own of the same name takes its place."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from node_process import NodeProcess, Robot

    from nope_ros.estimator import PoseEstimator

# Imported where it is used: ``node_process`` needs a ROS, which most tests do without.


@pytest.fixture(scope="session")
def estimator() -> "PoseEstimator":
    """With the packaged weights. Of all tests: one that changes its estimator makes its own."""
    from nope_ros.estimator import PoseEstimator

    return PoseEstimator.from_pretrained(device="cpu")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network that has learnt nothing. Of all tests: one that damages them copies them first."""
    from node_process import write_untrained_weights

    return write_untrained_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def ros() -> Iterator[None]:
    """A ROS of this process's own."""
    from node_process import ros_context

    with ros_context():
        yield


@pytest.fixture(scope="module")
def connected(node: "NodeProcess") -> Iterator["Robot"]:
    """A robot that the module's node has answered already."""
    from node_process import connected_robot

    with connected_robot() as robot:
        yield robot


@pytest.fixture
def robot(connected: "Robot") -> Iterator["Robot"]:
    """The same, with no object registered before the test nor after it."""
    yield connected
    for object_id in connected.objects():
        assert connected.unregister(object_id).success
