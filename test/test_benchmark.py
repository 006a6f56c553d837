"""The benchmark at sizes that take no time: what it counts is checked, not how fast this machine is."""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from nope_ros.cli import main
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import benchmark as module
from nope_ros.evaluation.benchmark import Benchmark, benchmark, bundled_frames
from nope_ros.frame import InputError
from nope_ros.latent import PaperUNetPredictor, RotatedLatentPredictor
from nope_ros.match import free_turns
from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork


@pytest.fixture(scope="module")
def frames():
    return bundled_frames(3)


@pytest.fixture(scope="module")
def paper():
    sizes = dataclasses.replace(
        PaperUNetConfig.compact(), crop_size=32, unet_widths=(32, 64), vae_widths=(16, 16), context=32
    )
    return PaperUNetPredictor(PaperUNet(sizes), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    config = RotatedLatentConfig(crop_size=32, widths=(16, 16, 32), bandwidth=3, channels=8, depths=4)
    return PoseEstimator(RotatedLatentPredictor(RotatedLatentNetwork(config), device="cpu"))


@pytest.fixture(scope="module")
def measured(estimator, paper, frames) -> Benchmark:
    return benchmark(estimator, paper, frames, templates=2, repeats=4, rate_size=64)


def test_the_file_has_the_figures_that_have_goals(measured):
    content = json.loads(json.dumps(measured.to_dict()))
    assert {
        "registration_seconds",
        "registration_speedup",
        "matching_ms_341",
        "matching_ms_free",
        "image_to_rotation_ms",
        "object_megabytes",
    } <= set(content)
    for key in ("image_to_rotation_ms", "image_to_pose_ms"):
        assert 0 < content[key]["p50"] <= content[key]["p95"]
    assert content["image_to_rotation_ms"]["p50"] < content["image_to_pose_ms"]["p50"], "refinement takes time"
    assert content["machine"]["threads"] == torch.get_num_threads()


def test_the_paper_registers_341_templates_one_after_the_other(measured):
    paper = measured.paper
    assert paper.templates == 341
    assert paper.registration_seconds == pytest.approx(paper.encode.seconds + 341 * paper.template.seconds)
    assert measured.speedup == pytest.approx(paper.registration_seconds / measured.ours.registration.seconds)


def test_bytes_are_those_of_what_is_held(measured, paper, estimator):
    assert measured.paper.object_bytes == 341 * 4 * np.prod(paper.latent_shape)
    numbers = sum((2 * degree + 1) ** 2 for degree in range(4))
    assert measured.ours.match_341.bytes == 341 * 4 * numbers
    # A row for each of 192 directions, and 7 terms of a Fourier series for each of 24 rolls.
    assert measured.ours.match_free.bytes == 192 * 4 * numbers + 7 * 24 * 4
    assert measured.ours.shared_bytes == 192 * 4 * numbers + 7 * 24 * 4 + 4608 * 9 * 8
    # Turns and rotations of the 642 viewpoints, the latent and the picture of one object.
    latent = 4 * np.prod(estimator.predictor.latent_shape)
    assert measured.ours.object_bytes == 642 * (4 * numbers + 9 * 8) + latent + 32 * 32 * 3


def test_a_registration_keeps_nothing_of_an_earlier_one(estimator, paper, frames, monkeypatch):
    cleared = []
    spy = SimpleNamespace(cache_clear=lambda: cleared.append(free_turns.cache_clear()))
    monkeypatch.setattr(module, "free_turns", spy)
    benchmark(estimator, paper, frames, templates=1, repeats=40, rate_size=16)
    assert len(cleared) == 3  # two are timed and one goes before
    assert free_turns.cache_info().misses == 1


def test_limits_follow_from_the_rates(measured):
    rates = measured.machine
    step = measured.ours.match_free
    slowest = max(
        step.bytes / (1e9 * rates.copy_gigabytes_per_second), step.operations / (1e9 * rates.product_gflops["float32"])
    )
    assert step.limit_seconds == pytest.approx(slowest)
    assert step.ratio == pytest.approx(step.seconds / step.limit_seconds)


def test_the_limit_of_a_rotation_is_that_of_its_parts(measured, frames):
    ours, copy = measured.ours, 1e9 * measured.machine.copy_gigabytes_per_second
    image = frames[0].image.nbytes + frames[0].mask.nbytes
    whole = ours.image_to_rotation
    assert whole.bytes == image + ours.encode.bytes + ours.match_free.bytes
    assert whole.limit_seconds == pytest.approx(
        image / copy + ours.encode.limit_seconds + ours.match_free.limit_seconds
    )
    assert 1e3 * whole.seconds == pytest.approx(np.median(ours.image_to_rotation_ms))
    assert json.loads(json.dumps(measured.to_dict()))["ours"]["image_to_rotation"]["bytes"] == whole.bytes


def test_the_terminal_shows_limits_and_all_that_one_object_holds(measured):
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(measured.table())
    shown = console.export_text()
    ours = measured.ours
    for cell in (*ours.encode.cells(), f"{(ours.object_bytes + ours.shared_bytes) / 1e6:.1f} MB"):
        assert cell in shown, cell
    assert measured.machine.kind == "cpu"


def test_every_step_is_reported(estimator, paper, frames):
    said = []
    benchmark(estimator, paper, frames, templates=1, repeats=1, rate_size=16, report=said.append)
    assert len(said) == 9
    assert len(set(said)) == 9


def test_other_predictors_are_refused(paper, frames):
    with pytest.raises(InputError, match="rotated latent"):
        benchmark(PoseEstimator(paper, batch_size=2), paper, frames, templates=1, repeats=1, rate_size=16)


def test_the_command_names_bad_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--templates", "0"])
    assert "--templates" in capsys.readouterr().err
