"""Which mask instance is which registered object."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


def assign(similarity: NDArray[np.floating], threshold: float) -> list[tuple[int, int]]:
    """Pairs of instance and object, each used at most once, that explain the image best together.

    An instance that no object explains at the threshold or above is left out. So is a second instance of the same
    object, which has one pose.

    Args:
        similarity: (instances, objects), how well each object explains each instance; NaN where it was not compared.
        threshold: the least similarity of a pair.

    Returns:
        Pairs of indices, sorted by instance.
    """
    gain = np.asarray(similarity, dtype=np.float64) - threshold
    possible = gain >= 0  # false for NaN
    # The offset makes any possible pair worth more than none, even one exactly at the threshold.
    worth = np.where(possible, gain + 1e-9, 0.0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True) if possible[row, column]]
