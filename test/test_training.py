"""Each kind of learner by the one loop, at sizes that take seconds."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rendered import photograph
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from torch.optim.swa_utils import AveragedModel

from nope_ros.cli import main
from nope_ros.correspondence import CorrespondenceRefiner
from nope_ros.crop import virtual_crop
from nope_ros.evaluation.meshes import FIRST_UNSEEN_SEED
from nope_ros.latent import PaperUNetPredictor, RotatedLatentPredictor, load_predictor
from nope_ros.models.correspondence import CorrespondenceConfig
from nope_ros.models.paper_unet import PaperUNetConfig
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.models.rotation_regression import RotationRegression, RotationRegressionConfig, rotation_from_6d
from nope_ros.rotations import look_at
from nope_ros.training import average as averaging
from nope_ros.training import train as module
from nope_ros.training.augment import AugmentationConfig
from nope_ros.training.correspond import CorrespondenceLearner
from nope_ros.training.learners import relative
from nope_ros.training.pairs import DataConfig, PairDataset
from nope_ros.training.procedural import procedural_object
from nope_ros.training.render_cache import Settings, build_cache
from nope_ros.training.settings import CorrespondenceTraining, TrainingConfig, of_sizes, read_training, read_values
from nope_ros.training.train import train

CONFIGS = sorted((Path(__file__).parent.parent / "config" / "train").glob("*.yaml"))

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
    settings = Settings(meshes=None, procedural=8, views=6, mesh_views=6, size=32, seed=0, depth=True)
    build_cache(folder, settings, workers=1)
    return folder


def content(kind, cache, steps, **changes):
    return {
        "kind": kind,
        "data": {
            "cache": str(cache),
            "objects_per_batch": 4,
            "views_per_object": 3,
            "mesh_share": 0.0,
            "validation_share": 0.47,  # four of the eight objects
        },
        "augmentation": {"clean_probability": 1.0},
        "network": KINDS.get(kind, {}),
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


def run(kind, cache, out, steps, **changes):
    out.mkdir(exist_ok=True)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(content(kind, cache, steps, **changes)))
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


def test_views_are_told_level_where_gravity_removed_their_roll(cache):
    """All of an upright object, at most one of another, and that one is as level as the others are not."""
    config = DataConfig(cache=str(cache), objects_per_batch=6, views_per_object=4, mesh_share=0, validation_share=0)
    dataset = PairDataset(config, None, 32, 0)
    batches = [dataset.batch(np.random.default_rng(n)) for n in range(12)]
    upright, level, R = (
        torch.cat([getattr(b, name) for b in batches]) for name in ("upright", "level", "R_virtual_object")
    )
    assert level[upright].all() and set(level[~upright].sum(1).tolist()) == {0, 1}
    roll = torch.atan2(R[..., 0, 2], R[..., 1, 2].neg()).abs().rad2deg()  # of the object's up in the image
    seen = R[..., 2, 2].abs() < 0.95
    assert roll[level & seen].max() < 1 and roll[~level & seen].median() > 45


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
    crops = torch.randint(0, 256, (1, 4, size, size), dtype=torch.uint8)
    latent = predictor.encode_pixels(crops, torch.tensor([False]))
    assert predictor.predict(latent[0], torch.eye(3)[None]).isfinite().all()


def test_words_of_the_command_come_in_any_order(cache, tmp_path):
    run("rotated_latent", cache, tmp_path, 1)
    again = tmp_path / "again"
    assert main(["train", str(tmp_path / "config.yaml"), "--out", str(again), "seed=3", "budget_steps=2"]) == 0
    assert json.loads((again / "weights" / "config.json").read_text())["training"]["steps"] == 2


def test_what_is_trained_goes_where_its_configuration_is_called(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(content("regression", cache, 1)))
    assert main(["train", "tiny.yaml"]) == 0
    assert (tmp_path / "out" / "train" / "tiny" / "weights" / "model.safetensors").is_file()


def refiner(cache, **changes):
    data = {
        "cache": str(cache),
        "objects_per_batch": 2,
        "views_per_object": 3,
        "mesh_share": 0.0,
        "validation_share": 0.47,
    }
    return {
        "kind": "correspondence",
        "data": data,
        "pairs_per_batch": 12,
        "budget_minutes": 1e-4,
        "warmup_steps": 1,
        "validation_batches": 1,
        "workers": 0,
        **changes,
    }


def other_sizes(cache, folder):
    run("rotated_latent", cache, folder, 1, network=KINDS["rotated_latent"] | {"channels": 16})
    return str(folder / "weights")


def without_depth(cache, folder):
    folder.mkdir()
    for name in ("images.npy", "views.npz"):
        (folder / name).symlink_to(cache / name)
    return folder


def of_a_regression(cache, folder):
    run("regression", cache, folder, 1)
    return str(folder / "weights")


MISTAKES = {
    "empty": (lambda cache, tmp: None, "is empty"),
    "no mapping": (lambda cache, tmp: ["data"], "holds a list"),
    "misspelt": (lambda cache, tmp: content("regression", cache, 1, learning_rat=1), "learning_rat: there is no such"),
    "misspelt within": (
        lambda cache, tmp: content("regression", cache, 1, data={"cache": str(cache), "views": 3}),
        "data.views: there is no such setting",
    ),
    "no number": (lambda cache, tmp: content("regression", cache, 1, learning_rate="fast"), "learning_rate: Input"),
    "out of range": (lambda cache, tmp: content("regression", cache, 1, warmup_steps=0), "warmup_steps: Input"),
    "nothing to train on": (lambda cache, tmp: {"kind": "regression"}, "data: Field required"),
    "unknown kind": (lambda cache, tmp: content("regresion", cache, 1), "kind: there is no 'regres"),
    "unknown size": (lambda cache, tmp: content("regression", cache, 1, network={"width": 3}), "unknown fields: width"),
    "no size": (
        lambda cache, tmp: content("rotated_latent", cache, 1, network={"widths": [8, -1, 8]}),
        "nope_ros.models.rotated_latent tells the sizes",
    ),
    "no renders": (
        lambda cache, tmp: content("regression", cache, 1, data={"cache": "nowhere"}),
        "there are no renders in nowhere; make them: nope-ros render --out nowhere",
    ),
    "few renders": (
        lambda cache, tmp: content("regression", cache, 1, data={"cache": str(cache), "objects_per_batch": 50}),
        "a batch takes 50",
    ),
    "start is missing": (
        lambda cache, tmp: content("rotated_latent", cache, 1, start="nowhere"),
        "there is no folder nowhere",
    ),
    "start is of another kind": (
        lambda cache, tmp: content("rotated_latent", cache, 1, start=of_a_regression(cache, tmp / "other")),
        "names 'regression'",
    ),
    "start has other sizes": (
        lambda cache, tmp: content("rotated_latent", cache, 1, start=other_sizes(cache, tmp / "other")),
        "has other sizes",
    ),
    "start of what begins from nothing": (
        lambda cache, tmp: content("paper_unet", cache, 1, start=other_sizes(cache, tmp / "other")),
        "always starts from nothing",
    ),
    "autoencoder is missing": (
        lambda cache, tmp: content("paper_unet", cache, 1, network={"vae": "no where"}),
        "no where",
    ),
    "refiner, no renders": (
        lambda cache, tmp: refiner(tmp / "nowhere"),
        "/nowhere --depth",
    ),
    "refiner, no depth": (lambda cache, tmp: refiner(without_depth(cache, tmp / "flat")), "have no depth"),
    "refiner, start is missing": (lambda cache, tmp: refiner(cache, start="nowhere"), "there is no folder nowhere"),
    "refiner, trunk of other sizes": (
        lambda cache, tmp: refiner(cache, trunk=other_sizes(cache, tmp / "other")),
        "trunk:",
    ),
    "refiner, no such part": (lambda cache, tmp: refiner(cache, train_from="encode9"), "the trunk has no 'encode9'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing_behind(mistake, cache, tmp_path, monkeypatch, capsys):
    make, told = MISTAKES[mistake]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make(cache, tmp_path)) if mistake != "empty" else "")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("nope-ros train: ") and said.err.count("\n") == 1 and told in said.err
    assert not said.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "told"), [("a: [1", "is not YAML"), (None, "No such file")])
def test_a_file_that_cannot_be_read_gets_one_line(text, told, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nope-ros train: {config}") and said.count("\n") == 1 and told in said
    assert not (tmp_path / "out").exists()


def test_nothing_to_render_gets_one_line(tmp_path, capsys):
    assert main(["render", "--procedural", "0", "--out", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nope-ros render: nothing to render") and said.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_the_refiner_learns_and_goes_on_where_it_stopped(cache, tmp_path, capsys):
    config = tmp_path / "refiner.yaml"
    config.write_text(yaml.safe_dump(refiner(cache)))
    out = tmp_path / "out"
    assert main(["train", str(config), "--out", str(out)]) == 0
    folder = out / "weights"
    CorrespondenceRefiner.from_pretrained(folder, device="cpu")
    steps = json.loads((folder / "config.json").read_text())["training"]["steps"]
    assert steps >= 1 and any("val_loss" in row for row in rows(out))
    capsys.readouterr()
    assert main(["train", str(config), "--out", str(out)]) == 0, "the budget is spent"
    assert f"resumed after {steps} steps" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["training"]["steps"] == steps
    spent = rows(out)[-1]["minutes"]
    assert main(["train", str(config), "--out", str(out), f"budget_minutes={spent + 1e-3}"]) == 0
    assert json.loads((folder / "config.json").read_text())["training"]["steps"] > steps


def test_the_refiners_trunk_learns_slowly_and_its_first_part_not_at_all(cache):
    config = CorrespondenceTraining.model_validate(refiner(cache))
    learner = CorrespondenceLearner(config)
    pace = {id(p): group["pace"] for group in learner.parameter_groups(0.02) for p in group["params"]}
    trunk = learner.network.trunk
    first = [*trunk.stem.parameters(), *trunk.encode1.parameters(), *trunk.encode2.parameters()]
    assert not any(id(p) in pace for p in first)
    assert {pace[id(p)] for p in [*trunk.encode3.parameters(), *trunk.up1.parameters()]} == {0.3}
    assert len(pace) == sum(p.requires_grad for p in learner.parameters())
    assert {group["weight_decay"] for group in learner.parameter_groups(0.02) if group["pace"] < 1} == {0.0}
    learner.train()
    assert learner.network.training and not trunk.training


@pytest.mark.parametrize("size", [112, 144, 160])
def test_weights_for_one_size_of_crops_are_a_start_for_another(size):
    """A latent hardly depends on how finely an object is seen, before anything is learned anew."""
    predictor = load_predictor(None, device="cpu", dtype=torch.float32)
    network = RotatedLatentNetwork(replace(predictor.network.config, crop_size=size))
    network.load_state_dict(network.adapted(predictor.network.state_dict()))
    mesh = procedural_object(FIRST_UNSEEN_SEED + 2).normalised()[0]
    K = np.array([[600.0, 0, 159.5], [0, 600.0, 119.5], [0, 0, 1]])
    seen = [photograph(mesh, look_at(np.array(at)), (0, 0, 6.0), K) for at in ([1, 0.2, 0.4], [-0.3, 1, 0.8])]
    other = RotatedLatentPredictor(network, device="cpu", dtype=torch.float32)
    a, b = (p.encode([virtual_crop(frame, p.crop_size) for frame in seen]) for p in (predictor, other))
    alike = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    assert alike.diagonal().min() > 0.8
    assert alike.fliplr().diagonal().max() < alike.diagonal().min() - 0.2
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=0.25, atol=0)


def test_training_starts_from_weights_for_another_size_of_crops(cache, tmp_path):
    run("rotated_latent", cache, tmp_path / "small", 1)
    larger = KINDS["rotated_latent"] | {"crop_size": 48}
    run("rotated_latent", cache, tmp_path / "large", 1, network=larger, start=str(tmp_path / "small" / "weights"))
    assert load_predictor(tmp_path / "large" / "weights", device="cpu").crop_size == 48


# Each process has a clock of its own; the second one's runs three times as fast.
TWO = """
import os, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
if rank:
    true = time.monotonic
    time.monotonic = lambda: 3 * true()
from nope_ros.training.train import train
for kind in sys.argv[2:]:
    out = Path(sys.argv[1], kind)
    steps = train(out / "config.yaml", out)
    (out / f"steps{rank}").write_text(str(steps))
"""


@pytest.mark.timeout(300)  # two interpreters start, perhaps on a busy machine
def test_two_processes_have_one_clock(cache, tmp_path):
    kinds = ("rotated_latent", "paper_unet", "correspondence")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        # Judged at every step: what others would take for time, the first does not count.
        often = {"budget_minutes": 0.02, "validate_minutes": 0}
        values = refiner(cache, **often) if kind == "correspondence" else content(kind, cache, None, **often)
        (tmp_path / kind / "config.yaml").write_text(yaml.safe_dump(values))
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen(
        [*command, script, tmp_path, *kinds], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as both:
        try:
            said = both.communicate(timeout=240)[0].decode()
        except BaseException:
            os.killpg(both.pid, signal.SIGKILL)
            raise
    assert both.returncode == 0, said
    for kind in kinds:
        out = tmp_path / kind
        steps = {int((out / f"steps{rank}").read_text()) for rank in (0, 1)}
        assert len(steps) == 1
        assert (out / "weights" / "model.safetensors").is_file()
        folders = (out / "autoencoder", out) if kind == "paper_unet" else (out,)
        for folder in folders:
            judged = [row["step"] for row in rows(folder) if "val_loss" in row]
            assert judged == list(range(1, len(judged) + 1)), "one process writes"
        assert steps == {judged[-1]}


def folder_of(state, path, **config):
    path.mkdir()
    save_file(state, path / "model.safetensors")
    content = {"predictor": "regression", "network": {"hidden": 2}, "training": {"steps": 7}, **config}
    (path / "config.json").write_text(json.dumps(content))
    return path


def test_the_mean_of_two(tmp_path, capsys):
    one = folder_of({"w": torch.tensor([1.0, 2.0]).half(), "n": torch.tensor(3)}, tmp_path / "one")
    other = folder_of(
        {"w": torch.tensor([2.0, 0.0]).half(), "n": torch.tensor(5)},
        tmp_path / "other",
        training={"steps": 9, "calibration": {"seed": 0}},
        temperature=2.0,
    )
    mean = tmp_path / "mean"
    assert averaging.main([str(one), str(other), "--share", "0.7", "--out", str(mean)]) == 0
    state = load_file(mean / "model.safetensors")
    torch.testing.assert_close(state["w"], torch.tensor([1.7, 0.6]).half())
    assert state["n"] == 5
    config = json.loads((mean / "config.json").read_text())
    assert config["temperature"] == 2.0 and config["training"]["steps"] == 9
    assert "calibration" not in config["training"], "that was of the other"
    digest = hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()
    assert config["training"]["mean_of"][1] == {"share": 0.7, "sha256": digest}
    digest = hashlib.sha256((mean / "model.safetensors").read_bytes()).hexdigest()
    assert (mean / "SHA256SUMS").read_text() == f"{digest}  model.safetensors\n"


def test_the_mean_of_trained_weights_loads(cache, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        run("rotated_latent", cache, tmp_path / name, 1, seed=seed)
    one, other = (tmp_path / name / "weights" for name in ("one", "other"))
    averaging.average(one, other, 0.25, tmp_path / "mean")
    found, first, second = (
        load_predictor(folder, device="cpu").network.stem[0].weight for folder in (tmp_path / "mean", one, other)
    )
    torch.testing.assert_close(found, 0.75 * first + 0.25 * second, rtol=0, atol=1e-3)
    assert not torch.equal(first, second)


def test_no_mean_of_what_does_not_fit(tmp_path, capsys):
    one = folder_of({"w": torch.zeros(2)}, tmp_path / "one")
    wide = folder_of({"w": torch.zeros(3)}, tmp_path / "wide")
    more = folder_of({"w": torch.zeros(2), "v": torch.zeros(1)}, tmp_path / "more")
    another = folder_of({"w": torch.zeros(2)}, tmp_path / "another", network={"hidden": 3})
    mean = tmp_path / "mean"
    for words, told in (
        ([one, wide, "--out", mean], "w is (2,) and (3,)"),
        ([one, more, "--out", mean], "v is in one of them only"),
        ([one, another, "--out", mean], "'network' is"),
        ([one, one, "--share", "7", "--out", mean], "--share: 7 is not within 0..1"),
        ([one, tmp_path / "nowhere", "--out", mean], "there is no folder"),
        ([one, wide, "--out", one], "is one of the two folders"),
    ):
        assert averaging.main([str(word) for word in words]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1
        assert not mean.exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_of_their_kinds(path):
    kind = read_values(path).get("kind", "rotated_latent")
    model = CorrespondenceTraining if kind == "correspondence" else TrainingConfig
    config = read_training(model, path)
    sizes = {
        "rotated_latent": RotatedLatentConfig,
        "regression": RotationRegressionConfig,
        "paper_unet": PaperUNetConfig,
        "correspondence": CorrespondenceConfig,
    }[kind]
    found = of_sizes(lambda sizes: sizes, sizes, config.network)
    assert found == (PaperUNetConfig.paper() if path.stem == "paper_unet_full" else sizes())
    assert f"nope-ros train config/train/{path.name}" in path.read_text()


def test_the_document_tells_the_ranges_of_augmentation():
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    told = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["augmentation"]
    assert told == AugmentationConfig().model_dump(mode="json")


def test_what_is_compared_sees_the_same():
    data = [
        read_training(TrainingConfig, path).data.model_dump(exclude={"objects_per_batch", "views_per_object", "cache"})
        for path in CONFIGS
        if path.stem != "correspondence"
    ]
    assert len(data) == 4 and all(one == data[0] for one in data)


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
