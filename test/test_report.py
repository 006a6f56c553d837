"""The document of all figures: what is in it, and when it is made anew."""

import argparse
import json

import pytest

from nope_ros.cli import main
from nope_ros.demo.sequence import packaged
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import report as module
from nope_ros.evaluation.evaluate import evaluate_set, methods_for
from nope_ros.evaluation.protocol import EvaluationSet
from nope_ros.evaluation.report import chapters, document

SPEED = {
    "registration_seconds": 0.1,
    "registration_speedup": 2000.0,
    "matching_ms_341": 0.5,
    "matching_ms_free": 6.0,
    "image_to_rotation_ms": {"p50": 20.0, "p95": 30.0},
    "image_to_pose_ms": {"p50": 60.0, "p95": 90.0},
    "object_megabytes": 2.6,
    "ours": {
        "registration_next_seconds": 0.01,
        "shared_megabytes": 18.0,
        "free_rotations": 4608,
        **{key: {"seconds": 0.01, "ratio": 2.0} for key in ("registration", "encode", "match_341", "match_free")},
    },
    "paper": {
        "unet_parameters": 395_000_000,
        "templates": 341,
        "templates_timed": 3,
        "registration_seconds": 285.0,
        "registration_batched_seconds": 78.0,
        "object_megabytes": 5.6,
        **{key: {"seconds": 0.8, "ratio": 1.5} for key in ("template", "template_batched", "encode", "match")},
    },
    "machine": {
        "device": "a processor",
        "threads": 2,
        "load": 0.1,
        "torch": "2",
        "precision": "bfloat16",
        "copy_gigabytes_per_second": 10.0,
        "product_gflops": {"float32": 100.0},
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of the bundled sequence, by the command."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "speed.json").write_text(json.dumps(SPEED))
    photos = folder / "photos" / "mango"
    photos.mkdir(parents=True)
    sequence = packaged("demo/sequence").resolve()
    for part in ("images", "masks"):
        (photos / part).symlink_to(sequence / part)
    poses = json.loads((sequence / "poses.json").read_text())
    (photos / "poses.json").write_text(json.dumps(poses | {"images": poses["images"][::18]}))
    words = [
        "report",
        "--out",
        str(folder / "docs" / "figures.md"),
        "--photos",
        str(photos.parent),
        "--procedural",
        "0",
    ]
    words += [
        "--speed",
        str(folder / "speed.json"),
        "--work",
        str(folder / "work"),
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    return folder, words


def test_the_document_has_tables_and_pictures_that_are_there(made):
    folder, _ = made
    text = (folder / "docs" / "figures.md").read_text()
    for part in ("## Goals", "## Photographs of fruit", "| free | **nope_ros** |", "| SIFT |", "## Speed", "285 s"):
        assert part in text, part
    pictures = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 3  # reliability, confidence, examples
    assert all((folder / "docs" / path).stat().st_size > 1000 for path in pictures)


def test_results_are_kept_until_something_changes(made, monkeypatch):
    folder, words = made
    ran = []
    job = module.run_job
    monkeypatch.setattr(module, "run_job", lambda one, work: ran.append(one.part) or job(one, work))
    assert main(words) == 0
    assert ran == []
    monkeypatch.setattr(module, "_identity", lambda weights: "others")
    assert main([*words, "--out", str(folder / "other.md")]) == 0
    assert ran == ["ours"]  # what needs no weights stays


def test_how_long_baselines_were_trained_is_told(tmp_path):
    for name, own in (("regression", {"own_steps": 700, "own_minutes": 20.0}), ("unet", {"own_minutes": 250.0})):
        (tmp_path / name).mkdir()
        told = {"training": {"steps": 12345, "minutes": 310.5, **own}}
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    given = argparse.Namespace(regression_weights=tmp_path / "regression", unet_weights=tmp_path / "unet")
    regression, unet = module._learnt(given)
    assert "12,345 steps, 310.5 minutes, all but 20 of them of the encoder" in regression
    assert "all but 250 of them of its autoencoder; first seed only" in unet


def test_photographs_without_a_licence_are_not_shown(tmp_path):
    for name in ("mango", "box"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "poses.json").write_text("{}")
    shown = {section.objects: section.shown for section in chapters(None, tmp_path, 0)}
    assert shown == {("box",): False, ("mango",): True}


def test_goals_are_judged_in_the_right_direction():
    text = document([], {}, SPEED, {}, "")
    verdict = {row.split(" | ")[0][2:]: row.split(" | ")[-1][:-2] for row in text.splitlines() if row.startswith("| ")}
    assert verdict["matching 341 templates"] == "yes"
    assert verdict["matching the free grid"] == "no"
    assert verdict["registration, times faster than the paper's way"] == "yes"


def test_an_ablation_asks_the_estimator_no_second_time(made, monkeypatch):
    # What is left out changes the answer only; three of the five need nothing new. The others have one of their own.
    frame = next(iter(chapters(None, made[0] / "photos", 0)))
    job = module.Job(frame, "ours", None, "", 2, 0, (0,), "cpu")
    evaluated = next(iter(job.set_of(0).objects()))
    encoded = []
    estimator = PoseEstimator.from_pretrained(device="cpu")
    encode = estimator.predictor.encode
    monkeypatch.setattr(estimator.predictor, "encode", lambda crops: encoded.append(len(crops)) or encode(crops))
    found = EvaluationSet("photos", "", 1, lambda: iter([evaluated]))
    evaluate_set(found, methods_for(estimator, ablations=True), ("upright",))
    images = len({pair[0] for pair in evaluated.pairs}) + len({pair[1] for pair in evaluated.pairs})
    assert sum(encoded) == 3 * images  # ours, of the box, on the free grid


def test_nothing_to_evaluate_is_said(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path / "a.md"), "--procedural", "0"]) == 2
    assert "--photos" in capsys.readouterr().err
