"""What the stages after the templates are measured by: truths that are known, and words that follow from figures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import refinement as module
from nope_ros.evaluation.photos import photo_set
from nope_ros.evaluation.refinement import (
    DEFAULT,
    TRACKED,
    TRACKED_KNOWN,
    Climbs,
    Outcome,
    Said,
    Stages,
    followed,
    goals,
    on_pairs,
    on_sequence,
    on_starts,
    reading,
    reasons,
    row,
)
from nope_ros.evaluation.stages import (
    AFFINE,
    OFFSETS,
    RIGHT_DEG,
    TEMPLATE,
    Compared,
    Pair,
    StageError,
    StageFigures,
    shared,
)
from nope_ros.prior import PRIORS, Prior
from nope_ros.recording import open_recording, packaged
from nope_ros.rotations import exp

GOOD = Outcome(
    error=2.0, start=3.0, roll=1.0, translation=0.01, centre=0.01, scale=0.01, squared=0.5, placed=1.0, seconds=0.01
)
COMPARED = Compared(np.zeros(1), np.zeros(1), np.zeros(1), np.ones(1, dtype=bool))
WRONG = replace(GOOD, error=170.0, start=171.0, roll=90.0)


def turn(degrees: float, axis: int = 1) -> np.ndarray:
    return exp(np.radians(degrees) * np.eye(3)[axis])


def said(answer: float, *others: float, true: float = 0.0) -> Said:
    """A frame whose answer, and the other modes that it lists, are so many degrees from the truth about one axis."""
    return Said(turn(true, 0), turn(answer), np.stack([turn(one) for one in (answer, *others)]))


@pytest.mark.parametrize(
    ("before", "now", "jumps", "lost", "flips", "righted"),
    [
        (said(0, 180), said(180, 0), 1, 1, 1, 0),  # from one side to the other, both known
        (said(180, 0), said(0, 180), 1, 0, 1, 1),  # back again: a wrong start left
        (said(0), said(180, 0), 1, 1, 0, 0),  # the other mode is new
        (said(0, 180), said(180), 1, 1, 0, 0),  # the first one is gone
        (said(0, 50), said(50, 0), 1, 1, 0, 0),  # too near for a flip
        (said(0, 180), said(180, 0, true=40.0), 1, 1, 0, 0),  # the object was turned
        (said(0, 180), said(5, 180), 0, 0, 0, 0),
        (said(120, 240), said(240, 120), 1, 0, 1, 0),  # between two wrong ones
    ],
)
def test_jumps_and_flips(before: Said, now: Said, jumps: int, lost: int, flips: int, righted: int) -> None:
    found = followed([GOOD], [[before, now]])
    assert (found.jumps, found.lost, found.flips, found.righted) == (jumps, lost, flips, righted)
    assert followed([GOOD], [[before], [now]]).jumps == 0, "another run begins anew"


def test_right_is_one_threshold_for_all_tables() -> None:
    outcomes = [replace(GOOD, start=RIGHT_DEG - 1), replace(GOOD, error=50.0, start=RIGHT_DEG + 1)]
    assert "| 2.0° | 1.0° | 0 % |" in row("free", DEFAULT, outcomes)
    error = StageError(RIGHT_DEG - 1, 0, 0, 0, 0, float("nan"), 0)
    pair = Pair("", {TEMPLATE: error}, 1.0, COMPARED)
    assert pair.right and not replace(pair, errors={TEMPLATE: replace(error, rotation_deg=RIGHT_DEG + 1)}).right


def test_both_modes_of_a_mesh_are_compared_on_the_same_queries() -> None:
    error = StageError(1.0, 0, 0, 0, 0, 0.05, 0)
    whole = [Pair("cup", {TEMPLATE: error}, 1.0, COMPARED, name) for name in ("a", "b", "c")]
    near = [Pair("cup", {TEMPLATE: error}, 1.0, COMPARED, name) for name in ("b", "b", "d")]
    one, other = shared(whole, near)
    assert [pair.query for pair in one] == ["b"] and [pair.query for pair in other] == ["b", "b"]
    assert StageFigures.of(other, TEMPLATE).add_recall_percent == 100


# --- words ----------------------------------------------------------------------------------------------------------


def test_goals_are_judged_for_each_prior() -> None:
    one = module.Measured("Renders", False, {("free", DEFAULT): [GOOD, WRONG, WRONG], ("upright", DEFAULT): [GOOD]})
    bad = replace(GOOD, centre=0.2)
    one.outcomes["standing", DEFAULT] = [bad]
    ends = dict.fromkeys(module._STARTS, np.array([1.0, 9.0]))
    by_prior: dict[Prior, Climbs] = {"free": Climbs(1, np.zeros(4, bool), ends, ends)}
    told = goals([one], {}, {"Renders": by_prior}, {})
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in told.splitlines()]
    verdicts = {line[0]: line[-1] for line in cells}
    assert verdicts["centre, % of the crop"] == "only free, upright"
    assert verdicts["roll error, template right, °"] == "yes"
    assert verdicts["climbs that never end above their starting loss, %"] == "yes"
    assert verdicts["climbs from 5° that end within 5°, %"] == "no"
    assert "Acc30 at no roll" not in told, "what was not measured is not judged"
    why = reasons(told)
    assert "* Centre: " in why and "* Climbs: " in why and "Tracking" not in why, "what is missed, and no more"
    assert reasons("| centre, % of the crop | Renders | ≤ 3 | 1.0 | – | – | yes |") == ""


def test_words_follow_the_figures() -> None:
    def told(after: Outcome) -> str:
        outcomes: module.Outcomes = {("free", TEMPLATE): [GOOD, WRONG], ("free", DEFAULT): [GOOD, after]}
        return " ".join(reading([module.Measured("Renders", False, outcomes)], {}, {}).split())

    assert "it changes Acc30 by +50.0 points" in told(GOOD)
    assert "it changes Acc30 by +0.0 points" in told(WRONG)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.01, 0.07, 100, 100), "far too wide"),
        ((0.4, 0.7, 96, 100), "too wide"),
        ((0.5, 1.4, 85, 100), "not of the right width everywhere"),
        ((0.5, 1.4, 87, 93), "as wide as the errors"),
        ((2.0, 5.0, 60, 80), "too narrow"),
    ],
)
def test_how_wide_a_covariance_is_is_said(figures: tuple[float, float, float, float], words: str) -> None:
    assert module._width(*figures) == words


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages.of(PoseEstimator.from_pretrained(device="cpu"))


@pytest.fixture(scope="module")
def sequence() -> Path:
    folder = packaged("demo/sequence")
    assert folder is not None
    return folder


def test_all_stages_answer_the_same_queries(stages: Stages, sequence: Path) -> None:
    outcomes = on_pairs(photo_set(sequence, pairs=4), stages)
    rows = list(dict.fromkeys(stage for _, stage in outcomes))
    assert rows == [TEMPLATE, AFFINE, OFFSETS, DEFAULT, "+ synthesis", "+ both"]
    starts = {tuple(one.start for one in x) for (prior, _), x in outcomes.items() if prior == "standing"}
    assert len(starts) == 1 and next(iter(starts)), "every row begins with the same answers"
    assert all(one.error == one.start for one in outcomes["standing", TEMPLATE])


def test_climbs_begin_where_they_should(stages: Stages, sequence: Path) -> None:
    found = on_starts(photo_set(sequence, references=1), stages.estimator, 1)
    assert set(found) == set(PRIORS)
    for prior, climbs in found.items():
        assert climbs.pairs == 1 and climbs.never_above == 100, prior
        assert {away: len(ends) for away, ends in climbs.ends.items()} == dict.fromkeys(module._STARTS, module._RUNS)
        assert np.ptp(climbs.ends[0.0]) < 1e-3, "all from the truth end at the same place"
        assert climbs.agreed(0.0) == 100


def test_tracking_is_refined_as_the_node_does_it(stages: Stages, sequence: Path) -> None:
    ways = on_sequence(list(open_recording(sequence, limit=6)), stages, "standing")
    assert {TEMPLATE, AFFINE, DEFAULT, TRACKED, TRACKED_KNOWN, f"{TRACKED} {DEFAULT}"} <= set(ways)
    counts = {len(one.outcomes) for one in ways.values()}
    assert len(counts) == 1 and counts != {0}
    errors = [tuple(one.error for one in ways[name].outcomes) for name in (TRACKED_KNOWN, f"{TRACKED_KNOWN} {DEFAULT}")]
    assert errors[0] != errors[1], "the refiner has a say"


def test_the_document_holds_everything(stages: Stages, sequence: Path) -> None:
    given = argparse.Namespace(count=0, pairs=2, meshes=None, photos=sequence, sequence=[sequence], every=18)
    text = module.document(given, stages)
    for part in ("## Goals", "| free | template |", "## Synthesis from around the truth", "## Over time: sequence"):
        assert part in text, part
    assert text.index("## Goals") < text.index("## Photographs")
    for line in text.splitlines():
        assert not line.startswith("| ") or line.endswith(" |"), line
