"""`nope-ros doctor` names each problem, and only those there are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from node_process import K, camera_info_message, image_message, scene, write_untrained_weights

from nope_ros.commands import doctor
from nope_ros.commands.doctor import Heard, as_shipped, judge
from nope_ros.latent import DEFAULT_WEIGHTS

NOW = 1_700_000_000_000_000_000


def heard(**changes: Any) -> dict[str, Heard]:
    """Five seconds of a healthy robot, with changes."""
    image, mask = scene()
    stamps = [NOW - 100_000_000 * index for index in range(10, 0, -1)]
    last = {
        "image": changes.get("image", image_message(image, "rgb8", stamps[-1])),
        "camera_info": changes.get("camera_info", camera_info_message(stamps[-1])),
        "mask": changes.get("mask", image_message(mask, "mono8", stamps[-1])),
    }
    return {
        name: Heard(f"/{name}", 1, changes.get("quality", ""), [message], changes.get(f"{name}_stamps", stamps), 10)
        for name, message in last.items()
    }


def problems(given: dict[str, Heard], now: int = NOW) -> list[str]:
    return [one.what for one in judge(given, 5.0, now) if one.level != "ok"]


def test_a_healthy_robot() -> None:
    assert problems(heard()) == []


image, mask = scene()
UNWELL = {
    "encoding": ({"image": image_message(image, "rgb16", NOW)}, "encoding 'rgb16' is not supported"),
    "cut short": ({"mask": image_message(mask[:, ::2], "16UC1", NOW)}, "cut short"),
    "no calibration": ({"camera_info": camera_info_message(NOW, 0 * K)}, "K is all zero"),
    "calibration of another size": ({"camera_info": camera_info_message(NOW, K, (64, 48))}, "camera_info is for 64x48"),
    "mask of another size": (
        {"mask": image_message(mask[::2], "mono8", NOW)},
        "the mask is 320x120, the image",
    ),
    "stamps of masks": ({"mask_stamps": [NOW - 5]}, "no mask has the stamp of an image"),
    "zero stamps": ({"image_stamps": [0]}, "header.stamp is zero"),
    "clock": ({"camera_info_stamps": [NOW - 60 * 10**9]}, "60 s behind"),
    "frame": ({"image": image_message(image, "rgb8", NOW, frame="")}, "frame_id is empty"),
    "QoS": ({"quality": "they never connect"}, "they never connect"),
}


@pytest.mark.parametrize("case", UNWELL)
def test_an_unwell_robot(case: str) -> None:
    changes, words = UNWELL[case]
    found = problems(heard(**changes))
    assert any(words in one for one in found), found
    assert len({one.split(":")[0] for one in found}) <= (3 if case == "QoS" else 2), f"nothing else: {found}"


def test_a_camera_that_bins_or_sends_a_region_is_well() -> None:
    info = camera_info_message(NOW, 2 * K, (640, 480))
    info.k[8] = 1.0
    info.binning_x = info.binning_y = 2
    assert problems(heard(camera_info=info)) == []
    info = camera_info_message(NOW, K, (1000, 800))
    info.roi.width, info.roi.height = 320, 240
    assert problems(heard(camera_info=info)) == []


def test_a_rectified_image_needs_no_distortion_model() -> None:
    info = camera_info_message(NOW)
    info.distortion_model, info.d = "of our own", [0.1] * 4
    info.p[0], info.p[5], info.p[2], info.p[6], info.p[10] = K[0, 0], K[1, 1], K[0, 2], K[1, 2], 1.0
    given = heard(camera_info=info)
    assert any("of our own" in one for one in problems(given))
    assert [one.what for one in judge(given, 5.0, NOW, rectified=True) if one.level != "ok"] == []


def test_nothing_comes() -> None:
    silent = {
        name: Heard(f"/{name}", publishers) for name, publishers in (("image", 0), ("camera_info", 1), ("mask", 1))
    }
    found = problems(silent)
    assert "nobody publishes /image" in found[0] and "nothing came" in found[1] and len(found) == 3


def test_packaged_weights_are_as_shipped(tmp_path: Path) -> None:
    for folder in DEFAULT_WEIGHTS.parent.iterdir():
        (found,) = as_shipped(folder)
        assert found.what == f"weights {folder.name} are as shipped", "run make checksums"
    shutil.copytree(folder, tmp_path / "weights")
    weights = tmp_path / "weights" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    (one,) = as_shipped(tmp_path / "weights")
    assert one.level == "problem" and one.what.startswith("model.safetensors: not as shipped")
    weights.unlink()
    assert next(as_shipped(tmp_path / "weights")).what.startswith("model.safetensors: not as shipped")


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_untrained_weights(tmp_path / "weights")
    words = ["--no-live", "--device", "cpu", "--weights", str(weights), "--store"]
    assert doctor.main([*words, str(tmp_path / "new" / "objects")]) == 0
    told = capsys.readouterr().out
    assert "untrained on cpu, sha256 " in told and "0 problems" in told
    assert not (tmp_path / "new").exists(), "it looks and leaves nothing behind"
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "mug.object.safetensors").write_bytes(b"rubbish")
    assert doctor.main([*words, str(tmp_path / "objects")]) == 0
    assert "mug.object.safetensors is damaged" in capsys.readouterr().out
    (weights / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:999])
    assert doctor.main([*words, str(tmp_path / "new" / "objects")]) == 1
    assert "damaged or cut short" in capsys.readouterr().out
