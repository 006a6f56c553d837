"""Pictures of how far confidence can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nope_ros.evaluation.baselines import OURS
from nope_ros.evaluation.evaluate import Report
from nope_ros.evaluation.metrics import PairScore, reliability

_COLOURS = {"free": "#d55e00", "upright": "#0072b2", "standing": "#009e73"}  # told apart by the colour-blind too
_DPI = 110


def write_pictures(report: Report, folder: Path) -> list[Path]:
    """Draw ``reliability_<kind>.png`` and ``confidence_<kind>.png``; returns their paths, if any."""
    scores: dict[str, list[PairScore]] = {
        prior: [score for score in report.scores if score.method == OURS and score.protocol == prior]
        for prior in report.protocols
    }
    scores = {prior: part for prior, part in scores.items() if any(score.calibration for score in part)}
    if not scores:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("reliability", _reliability_figure), ("confidence", _confidence_figure)):
        path = folder / f"{name}_{report.kind}.png"
        draw(scores, report).savefig(path, dpi=_DPI)
        written.append(path)
    return written


def _reliability_figure(scores: dict[str, list[PairScore]], report: Report) -> Figure:
    """Mass of the credible set against the share of pairs whose truth is in it: an honest model is on the diagonal."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    masses = np.linspace(0, 1, 51)
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=1)
    for prior, part in scores.items():
        axes.plot(100 * masses, 100 * reliability(part, masses), color=_COLOURS[prior], label=prior)
    axes.set(
        xlabel="mass of the credible set, %",
        ylabel="truth is in it, % of pairs",
        title=f"{report.kind}: above the diagonal too modest,\nbelow it too sure",
        xlim=(0, 100),
        ylim=(0, 100),
        aspect="equal",
    )
    axes.legend(frameon=False)
    return figure


def _confidence_figure(scores: dict[str, list[PairScore]], report: Report) -> Figure:
    """Left: error against confidence. Right: what errors remain when only the most confident answers are kept."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for prior, part in scores.items():
        judged = [score for score in part if score.confidence is not None]
        confidence = np.array([score.confidence for score in judged], dtype=float)
        error = np.array([score.error_deg for score in judged])
        _plot_accuracy(left, confidence, error, prior)
        order = np.argsort(-confidence, kind="stable")
        kept = np.arange(1, len(order) + 1)
        wrong = 100 * np.cumsum(error[order] >= 30) / kept
        right.plot(100 * kept / len(kept), wrong, color=_COLOURS[prior], label=prior)
    left.plot([0, 1], [0, 100], color="0.7", linewidth=1)
    left.set(xlabel="confidence (probability within 30°)", ylabel="error below 30°, % of pairs", title=report.kind)
    left.legend(frameon=False)
    right.set(xlabel="most confident answers kept, %", ylabel="of these wrong by 30° or more, %", ylim=(0, None))
    return figure


def _plot_accuracy(axes: Axes, confidence: np.ndarray, error: np.ndarray, prior: str) -> None:
    # Bins of equal numbers, so that none is judged by a handful of pairs.
    edges = np.array_split(np.argsort(confidence), max(1, min(10, len(confidence) // 20)))
    centre: Sequence[float] = [float(confidence[part].mean()) for part in edges]
    hits: Sequence[float] = [100 * float((error[part] < 30).mean()) for part in edges]
    axes.plot(centre, hits, "o-", color=_COLOURS[prior], label=prior, markersize=4)
