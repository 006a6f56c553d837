"""The document of all figures: what is in it, and when it is made anew."""

import argparse
import json

import pytest

from nope_ros.cli import main
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import report as module
from nope_ros.evaluation.evaluate import evaluate_set, methods_for
from nope_ros.evaluation.protocol import EvaluationSet
from nope_ros.evaluation.report import chapters, document
from nope_ros.frame import InputError
from nope_ros.recording import packaged

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
        **{
            key: {"seconds": 0.01, "operations": 2_000_000, "bytes": 1_500_000, "limit_seconds": 0.005, "ratio": 2.0}
            for key in ("registration", "encode", "match_341", "match_free", "image_to_rotation")
        },
    },
    "paper": {
        "unet_parameters": 395_000_000,
        "templates": 341,
        "templates_timed": 3,
        "registration_seconds": 285.0,
        "registration_batched_seconds": 78.0,
        "object_megabytes": 5.6,
        **{
            key: {"seconds": 0.8, "operations": 10**12, "bytes": 4 * 10**9, "limit_seconds": 0.5, "ratio": 1.6}
            for key in ("template", "template_batched", "encode", "match")
        },
    },
    "machine": {
        "device": "a processor",
        "kind": "cpu",
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
    given = argparse.Namespace(as_long_weights=None)
    for name, own in (
        ("regression", {"own_steps": 700, "own_minutes": 20.0}),
        ("unet", {"own_minutes": 250.0}),
        ("as_long", {}),
        ("longer", {"minutes": 311.0}),
    ):
        (tmp_path / name).mkdir()
        told = {"training": {"steps": 12345, "minutes": 310.5, **own}}
        (tmp_path / name / "config.json").write_text(json.dumps(told))
    given.regression_weights, given.unet_weights = tmp_path / "regression", tmp_path / "unet"
    regression, unet = module._learnt(given)
    assert "12,345 steps, 310.5 minutes, all but 20 of them of the encoder" in regression
    assert "all but 250 of them of its autoencoder; first seed only" in unet
    assert "less than" not in unet
    assert all("less than our 563 minutes" in told for told in module._learnt(given, 563.0))
    assert not any("less than" in told for told in module._learnt(given, 200.0))
    given.as_long_weights = tmp_path / "as_long"
    assert "Ours, trained as long as that: 12,345 steps, 310.5 minutes" in list(module._learnt(given))[2]
    assert "less than" not in list(module._learnt(given, 563.0))[2]
    assert "ours above took 563 minutes, the row after it as many as this" in list(module._learnt(given, 563.0))[1]
    given.as_long_weights = tmp_path / "longer"
    with pytest.raises(InputError, match="311 minutes, longer than the paper's form"):
        list(module._learnt(given))


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


def verdicts(speed):
    rows = [
        row.strip("| ").split(" | ") for row in document([], {}, speed, {}, "").splitlines() if row.startswith("| ")
    ]
    return {row[0]: row[2:] for row in rows if len(row) == 4}


def test_goals_of_a_gpu_are_judged_on_one():
    on_cpu, on_gpu = (verdicts(SPEED | {"machine": SPEED["machine"] | {"kind": kind}}) for kind in ("cpu", "cuda"))
    whole, small = (next(name for name in on_cpu if name.startswith(f"{what} on a GPU")) for what in WHAT_A_GPU_DOES)
    assert on_cpu[whole] == on_cpu[small] == ["not measured (no GPU)", "–"]
    assert on_gpu[whole] == ["100 ms", "no"] and on_gpu[small] == ["0.5 ms", "yes"]
    assert on_cpu["matching the free grid"][1] == "no"
    assert on_gpu["matching the free grid"] == ["not measured (on a GPU)", "–"]


WHAT_A_GPU_DOES = ("registration", "matching 341 templates")


def test_what_one_object_holds_alone_is_judged_too():
    assert verdicts(SPEED)["one object"] == ["2.6 MB", "yes"]
    assert verdicts(SPEED)["one object alone, with what all share"] == ["20.6 MB", "no"]
    assert "| ours | 2.6 MB | 20.6 MB |" in document([], {}, SPEED, {}, "")
    small = SPEED | {"ours": SPEED["ours"] | {"shared_megabytes": 9.0}}
    assert verdicts(small)["one object alone, with what all share"] == ["11.6 MB", "yes"]


def test_a_step_says_what_it_moves_and_its_limit():
    text = document([], {}, SPEED, {}, "")
    assert "| one template | the paper's | 800 ms | 4e+03 MB | 1 T | 500 ms | 1.6 |" in text
    assert "| image to rotation, templates alone, p50 / p95 | ours | 20 / 30 ms | 1.5 MB | 2 M | 5 ms | 2.0 |" in text
    older = SPEED | {"ours": {key: value for key, value in SPEED["ours"].items() if key != "image_to_rotation"}}
    assert "20 / 30 ms |  |" in document([], {}, older, {}, "")


def scores(acc30, pairs=10, coverage90=90.0):
    return dict.fromkeys(module._FIELDS.values(), acc30) | {"pairs": pairs, "coverage90": coverage90}


def figures(acc30, **baselines):
    own = {"all": scores(acc30), "within_90": scores(acc30)}
    return {**own, "baselines": {name: figures(value) for name, value in baselines.items()}, "objects": {}}


def test_methods_of_the_first_seed_are_compared_on_its_pairs():
    tested = module.Chapter("photos", "Photographs", "photos", protocols=("upright",))
    first = {"within_90": scores(70.0), "baselines": {"templates": {"within_90": scores(60.0)}}}
    ours = {"seeds": [0, 1], "skipped": [], "upright": figures(80.0, templates=75.0), "first_seed": {"upright": first}}
    paper = {"seeds": [0], "skipped": [], "upright": {"baselines": {"paper": figures(10.0)}}}
    found = {"photos-ours": ours, "photos-paper_form": paper}
    text = document([tested], found, None, {}, "")
    part = text.split("The first seed's pairs alone")[1]
    assert "| **nope_ros** | 70.0, 70.0° |" in part and "| paper | 10.0, 10.0° |" in part
    assert "templates" not in part, "what of ours is no row of the tables is none here"
    kept = {key: value for key, value in ours.items() if key != "first_seed"}
    assert "The first seed's pairs" not in document([tested], found | {"photos-ours": kept}, None, {}, "")
    both = {key: value | {"seeds": [0]} for key, value in found.items()}
    assert "The first seed's pairs" not in document([tested], both, None, {}, "")


def test_reasons_are_told_where_a_goal_is_missed():
    tested = module.Chapter("photos", "Photographs", "photos", protocols=("upright",))

    def text(coverage90):
        ours = {"seeds": [0], "skipped": [], "upright": figures(80.0)}
        ours["upright"]["all"] = scores(80.0, coverage90=coverage90)
        return document([tested], {"photos-ours": ours}, None, {}, "")

    assert "Photographs, credible sets too narrow" in text(80.0)
    assert "short, and why" in text(80.0)
    assert "too narrow" not in text(90.0)
    assert "too narrow" not in text(99.0)


def test_results_follow_the_code_that_makes_them(tmp_path, monkeypatch):
    package = tmp_path / "nope_ros"
    for name in ("pose.py", "models/unet.py", "evaluation/metrics.py", "evaluation/report.py", *module._RENDERS):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    monkeypatch.setattr(module, "__file__", str(package / "evaluation" / "report.py"))

    def changes(name):
        before = module._code("photos"), module._code("meshes")
        (package / name).write_text(f"# {name}")
        return tuple(a != b for a, b in zip(before, (module._code("photos"), module._code("meshes")), strict=True))

    assert changes("evaluation/metrics.py") == changes("pose.py") == changes("models/unet.py") == (True, True)
    assert changes("rendering/render.py") == (False, True)
    assert changes("evaluation/report.py") == (False, False)


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
