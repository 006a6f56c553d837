"""Pictures of how far confidence can be trusted, and of successes and failures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nope_ros.draw import axis_length, contact_sheet, draw_axes, zoomed
from nope_ros.evaluation.baselines import OURS
from nope_ros.evaluation.evaluate import Report
from nope_ros.evaluation.metrics import PairScore, reliability
from nope_ros.evaluation.protocol import EvaluationSet, View
from nope_ros.prior import PRIORS, Prior

_COLOURS = {"free": "#d55e00", "upright": "#0072b2", "standing": "#009e73"}  # told apart by the colour-blind too
_DPI = 110


def write_pictures(
    report: Report,
    folder: Path,
    evaluation_set: EvaluationSet | None = None,
    protocols: Sequence[Prior] = PRIORS,
    title: str | None = None,
) -> list[Path]:
    """Draw ``reliability_<kind>.png`` and ``confidence_<kind>.png``, and ``examples_<kind>_<protocol>.png`` of the set.

    Args:
        report: what to draw.
        folder: made if it is not there.
        evaluation_set: where examples come from; without it there are none.
        protocols: whose examples are drawn; each goes through the whole set once more.
        title: over the figures; by default the report's kind.

    Returns:
        Their paths, none if nothing can be judged.
    """
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
        draw(scores, title or report.kind).savefig(path, dpi=_DPI)
        written.append(path)
    if evaluation_set is not None:
        for prior, part in ((prior, scores[prior]) for prior in protocols if prior in scores):
            sheet = examples(part, evaluation_set)
            if sheet is not None:
                path = folder / f"examples_{report.kind}_{prior}.png"
                cv2.imwrite(str(path), sheet[..., ::-1])
                written.append(path)
    return written


def examples(scores: Sequence[PairScore], evaluation_set: EvaluationSet, count: int = 8) -> NDArray[np.uint8] | None:
    """A sheet of successes (below 15°) and as many failures (above 30°), each from another object as far as they go.

    In each cell the reference with the object's axes, and the query with the axes as estimated, the true ones faint.

    Args:
        scores: of one method under one protocol.
        evaluation_set: that they come from; pairs of other sets are left out.
        count: of each kind.
    """
    # A fixed draw: nobody chooses what is shown.
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = [scores[index] for index in order if scores[index].direction_deg < 90]
    good = _spread([score for score in shuffled if score.error_sym_deg < 15], count)
    bad = _spread([score for score in shuffled if score.error_sym_deg >= 30], count)
    wanted = {(score.object_name, score.reference, score.query): score for score in good + bad}
    cells: dict[tuple[str, str, str], NDArray[np.uint8]] = {}
    for evaluated in evaluation_set.objects():
        views = {view.name: view for view in evaluated.views}
        for key, score in wanted.items():
            if key[0] == evaluated.name and key[1] in views and key[2] in views:
                cells[key] = _example(score, views[key[1]], views[key[2]])
    shown = [key for key in wanted if key in cells]
    if not shown:
        return None
    captions = [f"{key[0].rsplit('/', 1)[-1]}  {wanted[key].error_sym_deg:.0f}°" for key in shown]
    verdicts = [wanted[key].error_sym_deg < 15 for key in shown]
    return contact_sheet([cells[key] for key in shown], captions, columns=4, cell_width=384, good=verdicts)


def _spread(scores: Sequence[PairScore], count: int) -> list[PairScore]:
    taken: dict[str, list[PairScore]] = {}
    for score in scores:
        taken.setdefault(score.object_name, []).append(score)
    turns = max((len(part) for part in taken.values()), default=0)
    one_by_one = [part[turn] for turn in range(turns) for part in taken.values() if turn < len(part)]
    return one_by_one[:count]


def _example(score: PairScore, reference: View, query: View) -> NDArray[np.uint8]:
    pictures = []
    for view, R in ((reference, None), (query, np.array(score.delta_R) @ reference.R_camera_object)):
        frame = view.read()
        image, mask, K = zoomed(frame.image, frame.mask, frame.camera.K, 320, 320, fill=0.6)
        length = axis_length(mask, view.t_camera_object, K)
        if R is None:
            image = draw_axes(image, view.R_camera_object, view.t_camera_object, K, length)
        else:
            image = draw_axes(image, view.R_camera_object, view.t_camera_object, K, length, opacity=0.3)
            image = draw_axes(image, R, view.t_camera_object, K, length)
        pictures.append(image)
    return np.concatenate(pictures, axis=1)


def _reliability_figure(scores: dict[str, list[PairScore]], title: str) -> Figure:
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
        title=title,
        xlim=(0, 100),
        ylim=(0, 100),
        aspect="equal",
    )
    axes.legend(frameon=False, loc="upper left")
    axes.text(2, 74, "above the diagonal: too modest", color="0.4", fontsize="small")
    axes.text(98, 4, "below it: too sure", color="0.4", fontsize="small", horizontalalignment="right")
    return figure


def _confidence_figure(scores: dict[str, list[PairScore]], title: str) -> Figure:
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
    left.set(xlabel="confidence (probability within 30°)", ylabel="error below 30°, % of pairs", title=title)
    left.legend(frameon=False)
    right.set(xlabel="most confident answers kept, %", ylabel="of these wrong by 30° or more, %", ylim=(0, None))
    return figure


def _plot_accuracy(axes: Axes, confidence: np.ndarray, error: np.ndarray, prior: str) -> None:
    # Bins of equal numbers, so that none is judged by a handful of pairs.
    edges = np.array_split(np.argsort(confidence), max(1, min(10, len(confidence) // 20)))
    centre: Sequence[float] = [float(confidence[part].mean()) for part in edges]
    hits: Sequence[float] = [100 * float((error[part] < 30).mean()) for part in edges]
    axes.plot(centre, hits, "o-", color=_COLOURS[prior], label=prior, markersize=4)
