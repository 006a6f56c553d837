"""Both predictors through the same two lines, and weights on disk that are whole, damaged or foreign."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nope_ros.crop import Crop
from nope_ros.frame import InputError
from nope_ros.latent import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ErrorModel,
    NetworkPredictor,
    PaperUNetPredictor,
    Predictor,
    RotatedLatentPredictor,
    WeightsError,
    crops_to_tensor,
    load_predictor,
)
from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig
from nope_ros.models.rotated_latent import (
    RotatedLatentConfig,
    RotatedLatentNetwork,
    as_template,
    correlation,
    turned,
)
from nope_ros.rotations import exp

SMALL_ROTATED = RotatedLatentConfig(
    crop_size=32, widths=(16, 16, 32), bandwidth=3, channels=8, depths=4, lifted_channels=8, sphere_blocks=1
)
SMALL_PAPER = PaperUNetConfig(
    crop_size=32, latent_channels=4, vae_widths=(8, 16), vae_norm_groups=4, unet_widths=(32, 64), heads=2, context=16
)


def _randomised(network: torch.nn.Module) -> torch.nn.Module:
    # Layers that start at zero would hide a mistake.
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def _rotated() -> RotatedLatentPredictor:
    torch.manual_seed(0)
    network = _randomised(RotatedLatentNetwork(SMALL_ROTATED))
    return RotatedLatentPredictor(network, name="small", temperature=0.7, device="cpu", dtype=torch.float32)


def _paper() -> PaperUNetPredictor:
    torch.manual_seed(0)
    network = _randomised(PaperUNet(SMALL_PAPER))
    return PaperUNetPredictor(network, name="paper", temperature=2.0, device="cpu", dtype=torch.float32)


@pytest.fixture(params=[_rotated, _paper], ids=["rotated_latent", "paper_unet"])
def predictor(request: pytest.FixtureRequest) -> NetworkPredictor:
    return request.param()


@pytest.fixture
def saved(predictor: NetworkPredictor, tmp_path: Path) -> Path:
    predictor.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def _crops(count: int, size: int = 32) -> list[Crop]:
    rng = np.random.default_rng(2)
    crops = []
    for _ in range(count):
        mask = (rng.random((size, size)) > 0.4).astype(np.uint8) * 255
        image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8) * (mask[..., None] > 0)
        crops.append(Crop(image.astype(np.uint8), mask, np.eye(3), np.eye(3), 0.2, 50.0, False))
    return crops


def _rotations(count: int) -> Tensor:
    vectors = np.random.default_rng(3).normal(size=(count, 3))
    return torch.from_numpy(np.stack([exp(vector) for vector in vectors]))


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- the two lines


def test_two_lines(predictor: NetworkPredictor) -> None:
    assert isinstance(predictor, Predictor)
    latents = predictor.encode(_crops(2))
    templates = predictor.predict(latents[0], _rotations(5))
    assert latents.shape == (2, int(np.prod(predictor.latent_shape)))
    assert templates.shape == (5, latents.shape[1])
    assert latents.dtype == templates.dtype == torch.float32
    assert not latents.requires_grad and not templates.requires_grad
    assert not torch.allclose(templates[0], templates[1])


def test_batch_size_changes_memory_only(predictor: NetworkPredictor) -> None:
    latents = predictor.encode(_crops(3))
    templates = predictor.predict(latents[0], _rotations(18))
    predictor.batch_size = 1
    assert torch.allclose(predictor.encode(_crops(3)), latents, atol=1e-4)
    assert torch.allclose(predictor.predict(latents[0], _rotations(18)), templates, atol=1e-4)


def test_nothing_to_do_is_done(predictor: NetworkPredictor) -> None:
    latent = predictor.encode(_crops(1))[0]
    assert predictor.encode([]).shape == (0, len(latent))
    assert predictor.predict(latent, torch.zeros(0, 3, 3)).shape == (0, len(latent))


def test_rotation_precision_is_kept_out_of_the_result(predictor: NetworkPredictor) -> None:
    latent = predictor.encode(_crops(1))[0]
    double = predictor.predict(latent, _rotations(4))
    assert torch.allclose(predictor.predict(latent, _rotations(4).float()), double, atol=1e-4)


def test_gradient_reaches_the_rotation(predictor: NetworkPredictor) -> None:
    latent = predictor.encode(_crops(1))[0]
    rotations = _rotations(2).float().requires_grad_()
    predictor.predict(latent, rotations).square()[:, ::2].sum().backward()
    assert rotations.grad is not None
    assert rotations.grad.isfinite().all() and rotations.grad.abs().max() > 0


def test_half_precision_is_close(predictor: NetworkPredictor) -> None:
    exact = predictor.encode(_crops(4))
    predictor.dtype = torch.bfloat16
    rounded = predictor.encode(_crops(4))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_crop_of_another_size_is_refused(predictor: NetworkPredictor) -> None:
    with pytest.raises(InputError, match=r"\(64, 64, 3\).*\(32, 32, 3\)"):
        predictor.encode(_crops(1, size=64))


def test_pixels_span_minus_one_to_one() -> None:
    crops = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert crops_to_tensor(crops).flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_bad_device_is_refused(device: str, saved: Path) -> None:
    with pytest.raises(InputError, match=f"device: '{device}'.*use auto"):
        load_predictor(saved, device=device)


# --- the rotated latent


def test_no_rotation_gives_the_latent_as_a_template() -> None:
    predictor = _rotated()
    latent = predictor.encode(_crops(1))[0].reshape(predictor.latent_shape)
    template = predictor.predict(latent.flatten(), torch.eye(3)[None])[0].reshape(predictor.latent_shape)
    assert torch.allclose(template, as_template(latent), atol=1e-5)


def test_rotations_compose() -> None:
    predictor = _rotated()
    latent = predictor.encode(_crops(1))[0].reshape(1, *predictor.latent_shape)
    first, second = _rotations(2).float()
    at_once = turned(latent, (second @ first)[None])
    assert torch.allclose(turned(turned(latent, first[None]), second[None]), at_once, atol=1e-4)
    assert torch.allclose(turned(at_once, (second @ first).mT[None]), latent, atol=1e-4)
    predicted = predictor.predict(latent.flatten(), (second @ first)[None])[0]
    assert torch.allclose(predicted, as_template(at_once).flatten(), atol=1e-4)


def test_a_latent_of_any_roll_turns_with_its_crop() -> None:
    """Seen after a quarter turn it is the same, turned: what the network makes of a crop alone need not be."""
    predictor = _rotated()
    crop = _crops(1)[0]
    rolled = replace(crop, image=np.rot90(crop.image).copy(), mask=np.rot90(crop.mask).copy())
    own = predictor.encode([crop, rolled])
    before, after = (
        predictor.of_any_roll(latent, one.image, one.mask).reshape(1, *predictor.latent_shape)
        for latent, one in zip(own, (crop, rolled), strict=True)
    )
    quarter = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])  # counterclockwise; y is down
    assert torch.allclose(turned(before, quarter)[:, 1:], after[:, 1:], atol=1e-4 * before.abs().max())
    assert not torch.allclose(before, after, atol=1e-2 * before.abs().max())
    assert torch.equal(after[0, 0], own[1].reshape(predictor.latent_shape)[0]), "what tells objects apart is its own"


def test_the_network_is_told_which_crops_are_level() -> None:
    predictor = _rotated()
    crop = _crops(1)[0]
    level = replace(crop, roll_known=True)
    one, other, again = predictor.encode([crop, level, crop])
    assert torch.allclose(one, again, atol=1e-6) and not torch.allclose(one, other, atol=1e-2 * one.abs().max())
    means = [
        predictor.of_any_roll(latent, crop.image, crop.mask).reshape(predictor.latent_shape) for latent in (one, other)
    ]
    assert torch.equal(means[0][1:], means[1][1:]), "a level crop that is rolled is no longer level"


def test_turning_keeps_the_norm() -> None:
    predictor = _rotated()
    latent = predictor.encode(_crops(1))[0]
    assert torch.allclose(predictor.predict(latent, _rotations(9)).norm(dim=1), latent.norm(), rtol=1e-4)


def test_overlap_without_likeness_is_worse_than_no_overlap() -> None:
    """Features that count against let a latent say that what both views saw differs."""
    like, unlike = torch.zeros(2, 1, 1, 10)
    like[..., 0], unlike[..., 1] = 1.0, 1.0
    like[..., -1] = unlike[..., -1] = 0.8  # both were seen
    unseen = torch.zeros(1, 1, 10)
    alike, different, nothing = (correlation(like, other)[0, 0].item() for other in (like, unlike, unseen))
    assert alike > nothing > different


# --- the paper's form


def test_paper_size_is_the_published_one() -> None:
    with torch.device("meta"):
        network = PaperUNet(PaperUNetConfig.paper())
    predicting = [*network.unet.parameters(), *network.rotation_mlp.parameters()]
    assert round(sum(parameter.numel() for parameter in predicting) / 1e6) == 395
    assert network.config.latent_shape == (4, 32, 32)


def test_compact_size_fits_a_cpu() -> None:
    with torch.device("meta"):
        network = PaperUNet(PaperUNetConfig.compact())
    assert sum(parameter.numel() for parameter in network.parameters()) < 13e6
    assert network.config.latent_shape == (8, 16, 16)


def test_paper_losses_train_what_they_should() -> None:
    torch.manual_seed(0)
    network = PaperUNet(SMALL_PAPER)
    crops = crops_to_tensor(torch.randint(0, 256, (4, 4, 32, 32), dtype=torch.uint8))
    network.vae_loss(crops).backward()
    assert all(parameter.grad is not None for parameter in network.vae.parameters())
    network.fit_scaling_factor(crops)
    network.freeze_vae()
    network.zero_grad()
    latents = network.encode(crops)
    assert latents.std().item() == pytest.approx(1.0, abs=0.01)
    network.prediction_loss(latents[:2], latents[2:], _rotations(2).float()).backward()
    assert all(parameter.grad is None for parameter in network.vae.parameters())
    assert all(parameter.grad is not None for parameter in network.rotation_mlp.parameters())


def test_the_way_back_is_asked_with_the_inverse_rotation() -> None:
    torch.manual_seed(0)
    network = PaperUNet(SMALL_PAPER).eval()
    for layer in (network.rotation_mlp[0], network.rotation_mlp[2]):
        layer.weight.data *= 20  # untrained, the rotation would hardly count
    one, other = torch.randn(2, 2, *SMALL_PAPER.latent_shape)
    delta_R = _rotations(2).float()
    there = (network(one, delta_R) - other).square().mean()
    back = (network(other, delta_R.mT) - one).square().mean()
    wrong_back = (network(other, delta_R) - one).square().mean()
    loss = network.prediction_loss(one, other, delta_R, distance="l2")
    assert torch.allclose(loss, (there + back) / 2, rtol=1e-4)
    assert not torch.allclose(back, wrong_back, rtol=1e-2)


def test_autoencoder_kept_apart(tmp_path: Path) -> None:
    own = _paper()
    own.network.vae.save_pretrained(tmp_path / "downloaded" / "vae")
    config = PaperUNetConfig(**(SMALL_PAPER.to_dict() | {"vae": "../downloaded"}))
    network = PaperUNet(config, vae_folder=tmp_path / "downloaded" / "vae")
    apart = PaperUNetPredictor(network, device="cpu", dtype=torch.float32)
    apart.save_pretrained(tmp_path / "weights")
    assert not any(key.startswith("vae.") for key in load_file(tmp_path / "weights" / WEIGHTS_FILE))
    loaded = load_predictor(tmp_path / "weights", device="cpu", dtype=torch.float32)
    assert loaded.identity == apart.identity
    assert torch.equal(loaded.encode(_crops(1)), own.encode(_crops(1)))
    (tmp_path / "downloaded").rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"'../downloaded' is neither a folder nor in the hub cache"):
        load_predictor(tmp_path / "weights")


# --- weights on disk


def test_round_trip(predictor: NetworkPredictor, saved: Path) -> None:
    loaded = load_predictor(saved, device="cpu", dtype=torch.float32)
    assert type(loaded) is type(predictor)
    assert (loaded.name, loaded.temperature) == (predictor.name, predictor.temperature)
    assert loaded.identity == predictor.identity
    latents = predictor.encode(_crops(1))
    assert torch.equal(loaded.encode(_crops(1)), latents)
    assert torch.equal(loaded.predict(latents[0], _rotations(3)), predictor.predict(latents[0], _rotations(3)))
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_folders_from_before_errors_were_fitted_are_read(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert set(config.pop("errors")["spread"]) == {"free", "upright", "standing"}
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    assert load_predictor(saved, device="cpu").errors == ErrorModel()
    _change(saved / CONFIG_FILE, errors={"spread": {"free": 1.0}})
    with pytest.raises(WeightsError, match="needed: free, upright, standing"):
        load_predictor(saved, device="cpu")


def test_identity_tells_other_weights(predictor: NetworkPredictor, saved: Path) -> None:
    _change(saved / CONFIG_FILE, temperature=9.0)
    assert load_predictor(saved).identity == predictor.identity
    state = load_file(saved / WEIGHTS_FILE)
    first = next(key for key, tensor in state.items() if tensor.is_floating_point())
    state[first] = state[first] + 1e-3
    save_file(state, saved / WEIGHTS_FILE)
    assert load_predictor(saved).identity != predictor.identity


def test_half_size_weights_load(predictor: NetworkPredictor, saved: Path, tmp_path: Path) -> None:
    predictor.save_pretrained(tmp_path / "half", dtype=torch.float16)
    whole, half = ((folder / WEIGHTS_FILE).stat().st_size for folder in (saved, tmp_path / "half"))
    assert half < 0.7 * whole
    latents = load_predictor(tmp_path / "half", device="cpu", dtype=torch.float32).encode(_crops(1))
    assert torch.allclose(latents, predictor.encode(_crops(1)), atol=0.05)


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def _empty(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"")


def _lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _only_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "pytorch_model.bin")


def _only_pickle_without_config(folder: Path) -> None:
    _only_pickle(folder)
    (folder / CONFIG_FILE).unlink()


def _without_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _without_config(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()


def _config_cut_short(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text()[:40])


def _config_of_another_kind(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps({"model_type": "bert"}))


def _newer_version(folder: Path) -> None:
    _change(folder / CONFIG_FILE, format_version=99)


def _bad_temperature(folder: Path) -> None:
    _change(folder / CONFIG_FILE, temperature=-1)


def _unknown_network_field(folder: Path) -> None:
    network = json.loads((folder / CONFIG_FILE).read_text())["network"]
    _change(folder / CONFIG_FILE, network=network | {"colour": 3})


def _bad_network_size(folder: Path) -> None:
    network = json.loads((folder / CONFIG_FILE).read_text())["network"]
    _change(folder / CONFIG_FILE, network=network | {"crop_size": 33})


def _huge_network(folder: Path) -> None:
    network = json.loads((folder / CONFIG_FILE).read_text())["network"]
    _change(folder / CONFIG_FILE, network=network | {"crop_size": 10**9})


def _missing_tensor(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    del state[sorted(state)[0]]
    save_file(state, folder / WEIGHTS_FILE)


def _wrong_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    key = next(key for key in sorted(state) if state[key].ndim)
    state[key] = torch.cat([state[key], state[key]])
    save_file(state, folder / WEIGHTS_FILE)


def _not_a_number(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    key = next(key for key in sorted(state) if state[key].is_floating_point())
    state[key].view(-1)[0] = float("nan")
    save_file(state, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors .*damaged or cut short.*copy or download it again"),
        (_empty, "0 bytes.*damaged or cut short"),
        (_lfs_pointer, "damaged or cut short"),
        (_only_pickle, "pytorch_model.bin is a pickle, which can run any program"),
        (_only_pickle_without_config, "pytorch_model.bin is a pickle"),
        (_without_weights, "has no model.safetensors"),
        (_without_config, "has no config.json"),
        (_config_cut_short, "config.json cannot be read"),
        (_config_of_another_kind, "known: rotated_latent, paper_unet"),
        (_newer_version, "format_version 99.*install a newer nope_ros"),
        (_bad_temperature, "temperature: Input should be greater than 0"),
        (_unknown_network_field, "unknown fields: colour"),
        (_bad_network_size, "crop_size 33 is not a multiple"),
        (_huge_network, "bounds|not within"),
        (_missing_tensor, "is missing.*take both files from the same version"),
        (_wrong_shape, "does not fit the network"),
        (_not_a_number, "holds NaN or infinity"),
    ],
)
def test_damage_is_explained(damage: Callable[[Path], None], message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(WeightsError, match=message) as caught:
        load_predictor(saved)
    assert isinstance(caught.value, InputError)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_other_kind_is_refused(saved: Path, predictor: NetworkPredictor) -> None:
    other = PaperUNetPredictor if predictor.kind == "rotated_latent" else RotatedLatentPredictor
    with pytest.raises(WeightsError, match=f"is of a {predictor.kind}, not of a {other.kind}"):
        other.from_pretrained(saved)


@pytest.mark.parametrize("path", ["/no/such/folder", "nowhere", Path("some") / "name", "../a/b"])
def test_missing_folder(path: str | Path) -> None:
    with pytest.raises(WeightsError, match="there is no folder"):
        load_predictor(path)


def test_a_pickle_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match="is a pickle"):
        load_predictor(tmp_path / "weights.pt")


def test_a_file_instead_of_a_folder(saved: Path) -> None:
    with pytest.raises(WeightsError, match="is a file; give the folder"):
        load_predictor(saved / WEIGHTS_FILE)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_name_in_the_hub_cache(hub_cache: Path) -> None:
    commit = "0" * 40
    model = hub_cache / "models--someone--nope-small"
    predictor = _rotated()
    predictor.save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    assert load_predictor("someone/nope-small").identity == predictor.identity


def test_name_not_in_the_hub_cache(hub_cache: Path) -> None:
    with pytest.raises(WeightsError, match="hf download someone/else"):
        load_predictor("someone/else")
