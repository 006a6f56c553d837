"""Figures of aligning: what is compared with what, against which truth, and what the gate lets through."""

import json

import numpy as np
import pytest
import trimesh

from nope_ros import InputError
from nope_ros.cli import main
from nope_ros.evaluation.alignment import (
    AlignmentReport,
    PairResult,
    Registered,
    _error_of,
    evaluate_alignment,
    kinds_of,
)
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry
from nope_ros.rotations import exp


def seat(back, colour):
    """A box with a back, which has a front, a left side of its own colour, and an up."""
    parts = [trimesh.creation.box((0.5, 0.5, 0.3)), trimesh.creation.box((0.5, 0.12, back))]
    parts[1].apply_translation([0, -0.25, back / 2])
    parts.append(trimesh.creation.box((0.1, 0.4, 0.5)))
    parts[2].apply_translation([0.3, 0, 0])
    for part, shade in zip(parts, (colour, [200, 190, 60, 255], [40, 60, 220, 255]), strict=True):
        part.visual.vertex_colors = np.tile(shade, (len(part.vertices), 1))
    return trimesh.util.concatenate(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    (root / "kaykit_furniture").mkdir()
    for name, back in (("chair_A", 1.0), ("chair_B", 0.9), ("couch", 0.5), ("cactus", 0.7)):
        seat(back, [180, 60, 60, 255]).export(root / "kaykit_furniture" / f"{name}.glb")
    return root


def test_things_are_of_a_kind_by_name(folder):
    assert kinds_of(folder) == {"chair": ["kaykit_furniture/chair_A", "kaykit_furniture/chair_B"]}
    with pytest.raises(InputError, match="spoon"):
        kinds_of(folder, ["spoon"])
    with pytest.raises(InputError, match="no two objects"):
        kinds_of(folder, ["couch"])


def test_pairs_are_registered_aligned_and_held_against_their_makers_axes(folder, estimator, tmp_path):
    report = evaluate_alignment(folder, estimator, views=8, cache=tmp_path / "symmetry.json", pictures=tmp_path / "out")
    assert [one.name for one in (tmp_path / "out").iterdir()] == [
        "kaykit_furniture_chair_A_kaykit_furniture_chair_B.png"
    ]
    assert [len(report.errors("one kind", arm)) for arm in ("ours", "published, no cycles", "random")] == [1, 1, 1]
    assert len(report.errors("one object", "ours")) == 2
    assert np.median(report.errors("one object", "ours")) < 30
    assert json.loads(report.to_json())["features"] == "latents"


def test_of_no_known_kind_recordings_of_one_object_and_different_objects_are_compared(folder, estimator, tmp_path):
    (tmp_path / "garden").mkdir()
    for name, mesh in (("spade", seat(1.0, [180, 60, 60, 255])), ("bench", seat(0.4, [40, 160, 60, 255]))):
        mesh.export(tmp_path / "garden" / f"{name}.glb")
    assert kinds_of(tmp_path) == {"": ["garden/bench", "garden/spade"]}
    with pytest.raises(InputError, match="no two objects"):
        kinds_of(tmp_path, ["chair"])
    report = evaluate_alignment(tmp_path, estimator, views=8, gate=0.1, cache=tmp_path / "symmetry.json")
    assert {one.relation for one in report.results} == {"one object", "different objects"}
    assert len(report.errors("one object", "ours")) == 2 and len(report.scores("different objects")) == 1
    assert report.calibrated_gate() == pytest.approx(report.scores("different objects")[0] + 1e-3)
    values = json.loads(report.to_json())
    assert values["one object"]["ours"]["pairs"] == 2 and values["one kind"] == {} and "gains" not in values
    assert values["gates"]["asked"]["different objects"] == 100 and values["gates"]["asked"]["different kinds"] is None
    assert [column.header for column in report.tables()[1].columns] == ["gate", "different objects", "one object"]


def test_errors_are_of_rotations_between_sources_and_modulo_either_symmetry():
    turn = exp(np.array([0.0, 0.0, np.pi]))
    half = Symmetry(np.stack([np.eye(3), turn]))
    plain, symmetric = (Registered("chair", "a", 0, None, np.eye(3), one) for one in (NO_SYMMETRY, half))
    assert _error_of(turn, plain, plain) == pytest.approx(180)
    assert _error_of(turn, symmetric, plain) == pytest.approx(0, abs=1e-5)
    assert _error_of(turn, plain, symmetric) == pytest.approx(0, abs=1e-5)
    assert _error_of(exp(np.array([0.1, 0, 0])) @ turn, plain, symmetric) == pytest.approx(np.degrees(0.1))


def made(errors, wrong):
    """A report of pairs with these errors by two arms, and of different kinds with these scores."""
    results = [PairResult("different kinds", "ours", ("a", "b"), None, score) for score in wrong]
    for arm, column in errors.items():
        results += [PairResult("one kind", arm, ("a", "b"), error, 0.8) for error in column]
    return AlignmentReport("meshes", "model", "latents", 16, 0.7, tuple(results), ())


def test_intervals_gains_and_the_gate():
    wrong = np.linspace(0.3, 0.69, 40)
    hits = {"ours": 30, "ours, no cycles": 20, "published": 30, "published, no cycles": 30, "random": 2}
    errors = {arm: [5.0] * good + [90.0] * (40 - good) for arm, good in hits.items()}
    report = made(errors, wrong)
    share, low, high = report.acc30("one kind", "ours")
    assert share == 75 and 55 < low < 66 and 84 < high < 93
    gain, low, high = report.gain("one kind", "ours", "ours, no cycles")
    assert gain == 25 and 5 < low < 25 < high < 45
    assert report.gain("one kind", "published", "published, no cycles") == (0, 0, 0)
    gate = report.calibrated_gate()
    assert report.accepted("different kinds", gate) == pytest.approx(5.0)
    assert report.accepted("different kinds", gate - 0.012) > 5.0, "no lower gate would do"
    assert report.accepted("one kind", gate) == 100
    assert report.accepted("one object", gate) is None
    assert len(report.tables()) == 2
    assert json.loads(report.to_json())["gates"]["asked"]["different kinds"] == 0


def test_the_command_says_what_is_wrong(tmp_path, folder, capsys):
    assert main(["evaluate", "align", str(tmp_path)]) == 2
    assert "no two objects" in capsys.readouterr().err
    assert main(["evaluate", "align", str(folder), "--views", "2"]) == 2
    assert "--views: 2 is less than 4" in capsys.readouterr().err
    assert main(["evaluate", "align", str(folder), "--features", str(tmp_path / "none.pth")]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
