"""Checkpoints of the user's: the network is the one that was trained, and a file is never a program."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nope_ros.features import FeatureExtractor
from nope_ros.latent import WeightsError

WIDTH, PATCH, DEPTH = 64, 4, 2


def vit(registers=0, scaled=True, side=16, seed=0):
    """Random weights of a small vision transformer, named as DINOv2 names its own."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": drawn(1, 1, WIDTH),
        "pos_embed": drawn(1, 1 + side**2, WIDTH),
        "mask_token": drawn(1, WIDTH),
        "patch_embed.proj.weight": drawn(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": drawn(WIDTH),
        "norm.weight": 1 + drawn(WIDTH),
        "norm.bias": drawn(WIDTH),
    }
    if registers:
        state["register_tokens"] = drawn(1, registers, WIDTH)
    for index in range(DEPTH):
        parts = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        parts |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in parts.items():
            state[f"blocks.{index}.{name}.weight"], state[f"blocks.{index}.{name}.bias"] = (
                drawn(*shape),
                drawn(shape[0]),
            )
        for name in ("norm1", "norm2"):
            state[f"blocks.{index}.{name}.weight"], state[f"blocks.{index}.{name}.bias"] = (
                1 + drawn(WIDTH),
                drawn(WIDTH),
            )
        if scaled:
            state[f"blocks.{index}.ls1.gamma"], state[f"blocks.{index}.ls2.gamma"] = drawn(WIDTH), drawn(WIDTH)
    return state


@pytest.fixture
def crops():
    return np.random.default_rng(0).integers(0, 255, (2, 96, 96, 4), dtype=np.uint8)


PIXELS = np.array([[[10.0, 20.0], [80.0, 50.0], [np.nan, np.nan]]] * 2, np.float32)


def test_blocks_compute_what_torchs_own_transformer_does(tmp_path):
    state = vit(scaled=False)
    torch.save(state, tmp_path / "dino.pth")
    ours = FeatureExtractor.from_checkpoint(tmp_path / "dino.pth", device="cpu").network
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, 1, 4 * WIDTH, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).eval()
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj"}
    names |= {"mlp.fc1": "linear1", "mlp.fc2": "linear2", "norm1": "norm1", "norm2": "norm2"}
    block = {name.removeprefix("blocks.0."): value for name, value in state.items() if name.startswith("blocks.0.")}
    for old, new in names.items():
        block = {name.replace(old, new): value for name, value in block.items()}
    layer.load_state_dict(block)
    tokens = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.blocks[0](tokens), layer(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_a_file_of_either_kind_gives_the_same_features_and_hidden_places_none(tmp_path, crops, registers):
    state = vit(registers, side=12)  # positions of another size than is asked for
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, tmp_path / "a.pth")
    save_file(state | {"head.weight": torch.zeros(3, WIDTH)}, tmp_path / "b.safetensors")
    a, b = (FeatureExtractor.from_checkpoint(tmp_path / name, device="cpu") for name in ("a.pth", "b.safetensors"))
    found = a.at(crops, PIXELS)
    torch.testing.assert_close(found, b.at(crops, PIXELS))
    torch.testing.assert_close(found.norm(dim=-1), torch.tensor([[1.0, 1.0, 0.0]] * 2))
    assert not torch.allclose(found[0, 0], found[0, 1], atol=0.01), "features depend on where one looks"
    changed = crops.copy()
    changed[0, :40, :40] = 255 - changed[0, :40, :40]
    assert not torch.allclose(a.at(changed, PIXELS)[0, 0], found[0, 0], atol=1e-3), "and on what is there"
    torch.testing.assert_close(a.at(changed, PIXELS)[1], found[1])


def test_a_feature_is_of_the_patch_that_holds_the_pixel(tmp_path):
    """Attention and positions without effect: what is left of a patch is the patch itself."""
    state = {name: value if "proj.weight" in name and "patch" in name else 0 * value for name, value in vit().items()}
    state["norm.weight"] += 1
    save_file(state, tmp_path / "patches.safetensors")
    extractor = FeatureExtractor.from_checkpoint(tmp_path / "patches.safetensors", device="cpu")
    crop = np.zeros((1, 96, 96, 3), np.uint8)
    crop[0, 36:42, 60:66] = [255, 0, 0]  # one of the 16 × 16 patches of 6 pixels: column 10, row 6
    v, u = np.meshgrid(np.arange(16) * 6 + 2.5, np.arange(16) * 6 + 2.5, indexing="ij")
    found = extractor.at(crop, np.stack([u, v], axis=-1).reshape(1, -1, 2))[0].reshape(16, 16, -1)
    background = found[0, 0]
    different = (found @ background < 0.99).nonzero().tolist()
    assert [6, 10] in different and all(abs(row - 6) <= 1 and abs(column - 10) <= 1 for row, column in different)


class Program:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.filterwarnings("ignore")  # torch's, of what it refuses
def test_what_could_be_a_program_is_refused_and_does_not_run(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"cls_token": Program()}))
    torch.save({"cls_token": Program()}, tmp_path / "evil2.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2" / "hubconf.py").write_text("print('this ran')")
    for name, words in (
        ("evil.pth", "more than tensors"),
        ("evil2.pth", "more than tensors"),
        ("script.pt", "more than tensors"),
        ("dinov2", "program, which is not run"),
    ):
        with pytest.raises(WeightsError, match=words):
            FeatureExtractor.from_checkpoint(tmp_path / name, device="cpu")
    assert "this ran" not in capsys.readouterr().out


def test_what_is_no_such_network_says_so(tmp_path):
    state = vit()
    cases = {
        "short.safetensors": ({k: v for k, v in state.items() if not k.startswith("norm")}, "norm"),
        "other.safetensors": ({"layer.weight": torch.zeros(2, 2)}, "DINOv2"),
        "nan.safetensors": (state | {"norm.bias": torch.full((WIDTH,), torch.nan)}, "NaN"),
    }
    for name, (content, words) in cases.items():
        save_file(content, tmp_path / name)
        with pytest.raises(WeightsError, match=words):
            FeatureExtractor.from_checkpoint(tmp_path / name, device="cpu")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:1000])
    for name, words in (("cut.safetensors", "damaged"), ("none.pth", "no file"), ("nan.txt", "no file")):
        with pytest.raises(WeightsError, match=words):
            FeatureExtractor.from_checkpoint(tmp_path / name, device="cpu")
