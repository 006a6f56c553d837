"""Assignment of instances to objects."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nope_ros.assignment import assign


def test_each_to_the_best() -> None:
    assert assign(np.array([[0.9, 0.3], [0.4, 0.8]]), 0.2) == [(0, 0), (1, 1)]
    assert assign(np.array([[0.3, 0.9], [0.8, 0.4]]), 0.2) == [(0, 1), (1, 0)]


def test_two_instances_of_one_object() -> None:
    assert assign(np.array([[0.5], [0.9]]), 0.2) == [(1, 0)]


def test_threshold() -> None:
    assert assign(np.array([[0.1, 0.19]]), 0.2) == []
    assert assign(np.array([[0.2]]), 0.2) == [(0, 0)]
    assert assign(np.array([[np.nan, 0.3]]), 0.2) == [(0, 1)]


def test_nothing() -> None:
    assert assign(np.zeros((0, 3)), 0.0) == []
    assert assign(np.zeros((3, 0)), 0.0) == []


@given(
    npst.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.floats(-1, 1)),
    st.floats(-1, 1),
)
def test_against_trying_everything(similarity: np.ndarray, threshold: float) -> None:
    pairs = assign(similarity, threshold)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert all(similarity[pair] >= threshold for pair in pairs)

    def worth(chosen: list[tuple[int, int]]) -> float:
        return sum(similarity[pair] - threshold for pair in chosen if similarity[pair] >= threshold)

    rows, columns = similarity.shape
    if rows <= columns:
        options = [list(zip(range(rows), order, strict=False)) for order in permutations(range(columns), rows)]
    else:
        options = [list(zip(order, range(columns), strict=False)) for order in permutations(range(rows), columns)]
    assert worth(pairs) >= max(worth(option) for option in options) - 1e-6
