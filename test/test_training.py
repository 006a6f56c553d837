"""Each kind of learner by the one loop, at sizes that take seconds."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from torch.optim.swa_utils import AveragedModel

from nope_ros.cli import main
from nope_ros.latent import PaperUNetPredictor, RotatedLatentPredictor, load_predictor
from nope_ros.models.rotation_regression import RotationRegression, rotation_from_6d
from nope_ros.training import train as module
from nope_ros.training.learners import relative
from nope_ros.training.pairs import PairDataset
from nope_ros.training.render_cache import Settings, build_cache
from nope_ros.training.train import train

KINDS = {
    "rotated_latent": {"crop_size": 32, "widths": [8, 16, 16], "bandwidth": 3, "channels": 8, "depths": 4},
    "regression": {"crop_size": 32, "widths": [8, 16, 16], "compared": 16, "hidden": 32},
    "paper_unet": {
        "crop_size": 16,
        "vae_widths": [8, 8],
        "vae_norm_groups": 4,
        "latent_channels": 4,
        "unet_widths": [32, 32],
        "heads": 2,
        "context": 16,
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_cache(folder, Settings(meshes=None, procedural=8, views=6, mesh_views=6, size=32, seed=0), workers=1)
    return folder


def run(kind, cache, out, steps, **changes):
    out.mkdir(exist_ok=True)
    content = {
        "kind": kind,
        "data": {
            "cache": str(cache),
            "objects_per_batch": 4,
            "views_per_object": 3,
            "mesh_share": 0.0,
            "validation_share": 0.47,  # four of the eight objects
        },
        "augmentation": {"clean_probability": 1.0},
        "network": KINDS[kind],
        "budget_steps": steps,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.5,
        "candidate_sets": 2 if kind == "rotated_latent" else 8,
        "upright_candidates": 100,
        "validation_batches": 1,
        "workers": 0,
        **changes,
    }
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    train(config, out)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind, cache, tmp_path, monkeypatch):
    # Always the same few views, which a network can learn by heart.
    batch = PairDataset.batch
    monkeypatch.setattr(PairDataset, "batch", lambda self, rng: batch(self, np.random.default_rng(0)))
    run(kind, cache, tmp_path, 44, autoencoder_share=0.5, learning_rate=1e-2)
    for folder in (tmp_path / "autoencoder", tmp_path) if kind == "paper_unet" else (tmp_path,):
        losses = [row["loss"] for row in rows(folder) if "loss" in row]
        assert losses[-1] < 0.95 * losses[0]
        assert (folder / "loss.png").stat().st_size > 1000
        assert any("val_loss" in row for row in rows(folder))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_as_if_it_had_not_been(kind, cache, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(kind, cache, whole, 4, validate_minutes=0)
    saves = 0
    save = module._save

    def stop_after_two(path, **values):
        nonlocal saves
        save(path, **values)
        saves += 1
        if saves % 2 == 0:
            raise Interrupted

    monkeypatch.setattr(module, "_save", stop_after_two)
    interruptions = 0
    while True:
        try:
            run(kind, cache, parts, 4, validate_minutes=0)
            break
        except Interrupted:
            interruptions += 1
    assert interruptions == 2
    one, other = load_file(whole / "checkpoint.safetensors"), load_file(parts / "checkpoint.safetensors")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_little_is_lost_however_seldom_a_training_is_judged(cache, tmp_path, monkeypatch):
    """A checkpoint is written from time to time, not only where held-out objects are asked."""
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    batch, drawn = PairDataset.batch, 0

    def four(self, rng):
        nonlocal drawn
        drawn += not self.validation
        if drawn > 4:
            raise Interrupted
        return batch(self, rng)

    monkeypatch.setattr(PairDataset, "batch", four)
    with pytest.raises(Interrupted):
        run("regression", cache, tmp_path, 8, validate_minutes=1000)
    assert not (tmp_path / "log.jsonl").exists(), "nothing was judged"
    monkeypatch.setattr(PairDataset, "batch", batch)
    said = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    run("regression", cache, tmp_path, 8, validate_minutes=1000)
    assert any("resumed after 4 steps" in line for line in said)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_load(kind, cache, tmp_path):
    run(kind, cache, tmp_path, 2)
    weights = tmp_path / "weights"
    if kind == "regression":
        network = RotationRegression.from_pretrained(weights)
        crops = torch.rand(2, 4, 32, 32)
        R = network(crops, crops)
        torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-5)
        return
    predictor = load_predictor(weights, device="cpu", dtype=torch.float32)
    assert isinstance(predictor, {"rotated_latent": RotatedLatentPredictor, "paper_unet": PaperUNetPredictor}[kind])
    size = predictor.crop_size
    latent = predictor.encode_pixels(torch.randint(0, 256, (1, 4, size, size), dtype=torch.uint8))
    assert predictor.predict(latent[0], torch.eye(3)[None]).isfinite().all()


def test_words_of_the_command_come_in_any_order(cache, tmp_path):
    run("rotated_latent", cache, tmp_path, 1)
    again = tmp_path / "again"
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(again), "seed=3", "budget_steps=2"]) == 0
    assert json.loads((again / "weights" / "config.json").read_text())["training"]["steps"] == 2


def test_regression_takes_over_the_rotated_latents_encoder(cache, tmp_path):
    run("rotated_latent", cache, tmp_path / "ours", 1)
    weights = tmp_path / "ours" / "weights"
    run("regression", cache, tmp_path / "theirs", 1, start=str(weights), learning_rate=1e-9, weight_decay=0.0)
    ours = load_predictor(weights, device="cpu").network.encode3[1].conv2.weight
    theirs = RotationRegression.from_pretrained(tmp_path / "theirs" / "weights").encoder[10].conv2.weight
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    told = json.loads((tmp_path / "theirs" / "weights" / "config.json").read_text())["training"]
    assert told["steps"] == 2 and told["own_steps"] == 1, "what the start had cost counts too"


def test_a_short_run_forgets_its_random_beginning():
    model = torch.nn.Linear(1, 1)
    average = AveragedModel(model, multi_avg_fn=module.moving_average(0.998))
    with torch.no_grad():
        model.weight.fill_(7.0)
        average.update_parameters(model)  # the first is copied
        model.weight.fill_(1.0)
        for _ in range(60):
            average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1.0, abs=0.05)


def test_what_counts_is_not_averaged():
    model = torch.nn.Linear(1, 1)
    model.register_buffer("index", torch.arange(20))
    average = AveragedModel(model, multi_avg_fn=module.moving_average(0.998), use_buffers=True)
    for _ in range(600):
        average.update_parameters(model)
    assert torch.equal(average.module.index, model.index)


def test_a_finished_training_is_not_repeated(cache, tmp_path):
    run("paper_unet", cache, tmp_path, 4)
    before = {path: path.read_text() for path in tmp_path.rglob("log.jsonl")}
    run("paper_unet", cache, tmp_path, 4)
    assert {path: path.read_text() for path in tmp_path.rglob("log.jsonl")} == before


def test_the_autoencoder_stands_still_while_the_unet_learns(cache, tmp_path):
    run("paper_unet", cache, tmp_path, 8)
    before = load_file(tmp_path / "autoencoder" / "weights" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "checkpoint.safetensors")
    for key, value in before.items():
        torch.testing.assert_close(after[f"learner.network.vae.{key}"], value)
        torch.testing.assert_close(after[f"average.module.network.vae.{key}"], value)
    config = tmp_path / "weights" / "config.json"
    scale = json.loads(config.read_text())["network"]["scaling_factor"]
    assert scale != 1.0
    told = json.loads(config.read_text())["training"]
    assert told["steps"] == 8 > told["own_steps"], "what the autoencoder had cost counts too"
    # Also where the training goes on with a larger budget.
    run("paper_unet", cache, tmp_path, 12)
    again = load_file(tmp_path / "autoencoder" / "weights" / "diffusion_pytorch_model.safetensors")
    assert all(again[key].equal(value) for key, value in before.items())
    assert json.loads(config.read_text())["network"]["scaling_factor"] == scale


def test_names_in_checkpoints_stay(cache, tmp_path):
    # Those of trainings that still run.
    run("rotated_latent", cache, tmp_path, 1)
    names = {key.split(".")[0]: key for key in load_file(tmp_path / "checkpoint.safetensors")}
    assert set(names) == {"learner", "average", "optimizer"}
    stored = load_file(tmp_path / "checkpoint.safetensors")
    assert {"learner.log_scale", "average.module.log_scale", "average.n_averaged"} <= set(stored)
    assert any(key.startswith("learner.network.encode1.0.conv1") for key in stored)


def test_the_truth_is_exact_under_autocast():
    """bfloat16 is for networks: three digits of a rotation are 0.2°."""
    query, reference = (torch.from_numpy(Rotation.random(20, rng=seed).as_matrix()).float() for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = relative(query, reference)
        assert (query @ reference.mT).dtype == torch.bfloat16, "what it would be"
    torch.testing.assert_close(found, query @ reference.mT)


@pytest.mark.parametrize("seed", range(3))
def test_six_numbers_make_a_rotation(seed):
    torch.manual_seed(seed)
    R = rotation_from_6d(torch.randn(50, 6))
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(50, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(50))
    torch.testing.assert_close(rotation_from_6d(R[:, :2].flatten(1)), R, rtol=0, atol=1e-5)
