"""How far estimated poses of a sequence are from the true ones, in the figures of ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nope_ros.recording import Truth
from nope_ros.rotations import geodesic_distance, relative_rotation

Array = NDArray[np.float64]

WITHIN = 90.0
"""Degrees between viewing directions beyond which two views share little surface."""


@dataclass(frozen=True)
class FrameScore:
    """One frame against the truth.

    Attributes:
        view_angle_deg: angle between the viewing directions of this frame and of the reference, object frame.
        rotation_error_deg: of ΔR; 180 if there is no pose.
        translation_error_relative: ‖t − t_true‖ / ‖t_true‖; None if there is no pose, or its scale is unknown.
    """

    view_angle_deg: float
    rotation_error_deg: float
    translation_error_relative: float | None


def score_frame(
    reference: Truth, query: Truth, delta_R: Array | None, t_camera_object: Array | None, *, metric: bool
) -> FrameScore:
    """Compare an estimate with the truth.

    Args:
        reference: truth of the frame the object was registered from.
        query: truth of this frame.
        delta_R: (3, 3) estimated R_query R_referenceᵀ, camera axes; None if there is no pose.
        t_camera_object: (3,) estimated; None if there is no pose.
        metric: whether it is in metres.
    """
    cosine = float(np.clip(reference.direction @ query.direction, -1, 1))
    rotation = 180.0
    if delta_R is not None:
        true = relative_rotation(query.R_camera_object, reference.R_camera_object)
        rotation = float(np.degrees(geodesic_distance(delta_R, true)))
    translation = None
    if t_camera_object is not None and metric:
        error = np.linalg.norm(t_camera_object - query.t_camera_object)
        translation = float(error / np.linalg.norm(query.t_camera_object))
    return FrameScore(float(np.degrees(np.arccos(cosine))), rotation, translation)


def figures(scores: Sequence[FrameScore]) -> dict[str, Any]:
    """The figures over some frames, None where there are none; a frame without a pose counts as wrong by 180°."""
    rotation = np.array([score.rotation_error_deg for score in scores])
    translation = [score.translation_error_relative for score in scores if score.translation_error_relative is not None]
    known = len(scores) > 0
    return {
        "frames": len(scores),
        "acc15": _percent(rotation <= 15) if known else None,
        "acc30": _percent(rotation <= 30) if known else None,
        "rotation_error_deg": {
            "median": _rounded(np.median(rotation), 2) if known else None,
            "p90": _rounded(np.percentile(rotation, 90), 2) if known else None,
        },
        "translation_error_relative_median": _rounded(np.median(translation), 4) if translation else None,
    }


def within(scores: Sequence[FrameScore]) -> list[FrameScore]:
    """Those seen from less than ``WITHIN`` degrees away from the reference."""
    return [score for score in scores if score.view_angle_deg < WITHIN]


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """{p50, p95} to one digit after the point, None without values."""
    if not values:
        return {"p50": None, "p95": None}
    return {name: _rounded(np.percentile(values, q), 1) for name, q in (("p50", 50), ("p95", 95))}


def _percent(hits: NDArray[np.bool_]) -> float:
    return round(100 * float(hits.mean()), 1)


def _rounded(value: Any, digits: int) -> float:
    return round(float(value), digits)
