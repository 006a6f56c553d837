"""One object laid over another: similarities from points, two recordings of one object, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph
from safetensors.torch import save_file
from test_features import vit

from nope_ros import InputError
from nope_ros.align import Alignment, Surface, align_surfaces, in_frame_of_a
from nope_ros.align import _umeyama as umeyama
from nope_ros.cli import main
from nope_ros.features import FeatureExtractor
from nope_ros.rotations import exp, geodesic_distance, look_at
from nope_ros.store import ObjectStore
from nope_ros.training.procedural import procedural_object

K = np.array([[400.0, 0, 119.5], [0, 400.0, 119.5], [0, 0, 1]])
SEQUENCE = Path(__file__).resolve().parent.parent / "demo" / "sequence"
AHEAD = np.array([0, 0, 5.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_points_give_their_similarity_and_never_a_mirror_image(seed, mirrored):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(4, 3))
    scale, R, t = rng.uniform(0.5, 2), exp(rng.normal(size=3)), rng.normal(size=3)
    target = scale * (points * [1, 1, -1] if mirrored else points) @ R.T + t
    found_scale, found_R, found_t = umeyama(points, target)
    assert np.linalg.det(found_R) == pytest.approx(1)
    if not mirrored:
        assert found_scale == pytest.approx(scale)
        np.testing.assert_allclose(found_R, R, atol=1e-6)
        np.testing.assert_allclose(found_t, t, atol=1e-6)


def test_points_on_a_line_give_none():
    line = np.outer(np.arange(4.0), [1, 2, 3])
    assert umeyama(line, line) is None


def frame_at(number, angle):
    """A frame of a mesh, and its R_camera_mesh."""
    R = look_at(np.array([np.cos(angle), np.sin(angle), 0.5 * np.sin(2 * angle)]))
    return photograph(procedural_object(number).normalised()[0], R, AHEAD, K, (240, 240)), R


def walk(estimator, number, first, turned=None, size=1.0):
    """An object registered from eight views of a mesh, in a frame of its own."""
    turned = np.eye(3) if turned is None else turned
    frames, poses = [], []
    for angle in first + np.arange(8) * 2 * np.pi / 8:
        frame, R = frame_at(number, angle)
        frames.append(frame)
        poses.append((R @ turned.T, AHEAD * size))
    return estimator.register_views(frames, poses=poses, object_id=f"object{number}", keyframes=8)


def align(a, b, extractor=None):
    return align_surfaces(Surface.of(a, extractor), Surface.of(b, extractor))


@pytest.fixture(scope="module")
def recordings(estimator):
    """Two of one object: the second from other views, in another frame, in another unit."""
    turned = exp(np.array([0.4, -0.9, 1.3]))
    return walk(estimator, 11, 0.0), walk(estimator, 11, 0.4, turned, 3.0), turned


def test_two_recordings_of_one_object_get_one_frame(recordings):
    a, b, turned = recordings
    found = align(a, b)
    right = a.keyframes.R_fixed_object.T @ turned.T @ b.keyframes.R_fixed_object
    assert np.degrees(geodesic_distance(found.R, right)) < 12
    assert found.scale == pytest.approx(1 / 3, rel=0.15)
    assert found.accepted
    assert found.score == pytest.approx(0.8 * found.geometry + 0.2 * found.appearance)
    assert found.correlation > 0.7


def test_an_object_lies_over_itself_and_there_is_one_answer(recordings):
    surface = Surface.of(recordings[0])
    found = align_surfaces(surface, surface)
    assert np.degrees(geodesic_distance(found.R, np.eye(3))) < 5
    assert found.score > 0.9
    again = align_surfaces(surface, surface)
    np.testing.assert_array_equal(found.R, again.R)


def test_features_of_another_network_are_kept_for_each_view(tmp_path, estimator, recordings, capsys):
    save_file(vit(), tmp_path / "vit.safetensors")
    extractor = FeatureExtractor.from_checkpoint(tmp_path / "vit.safetensors", device="cpu")
    a, b, _ = recordings
    surface = Surface.of(a, extractor)
    assert surface.features.shape[:2] == surface.seen.shape == (162, 8)
    # Of a solid thing each view shows less than half, and what it shows lies on its side.
    assert 0.2 < surface.seen.mean() < 0.55
    facing = np.einsum("nc,vc->nv", surface.points, a.keyframes.directions)
    assert facing[surface.seen].mean() > 0.2 * surface.extent > facing[~surface.seen].mean()
    # Places that no view shows are like nothing.
    blind = replace(surface, seen=np.zeros_like(surface.seen))
    assert (surface.likeness(blind) == -1).all()
    assert surface.likeness(surface).diagonal()[surface.seen.any(axis=1)] == pytest.approx(1)
    assert align(a, b, extractor=extractor).geometry > 0.8
    ObjectStore(tmp_path).save(a)
    words = ["align", "object11", "object11", "--store", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--features", str(tmp_path / "vit.safetensors"), "--out", str(tmp_path / "pair.png")]) == 0
    assert main([*words, "--features", str(tmp_path / "none.pth")]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
    older = replace(a, keyframes=replace(a.keyframes, crops=None, seen_at=None))
    with pytest.raises(InputError, match="register it again"):
        Surface.of(older, extractor)


def test_the_command_prints_draws_and_refuses(tmp_path, estimator, recordings, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ObjectStore(tmp_path)
    store.save(recordings[0])
    words = ["object11", "object11", "--store", str(tmp_path), "--device", "cpu"]
    assert main(["align", *words, "--out", str(tmp_path / "pair.png")]) == 0
    assert "accepted" in capsys.readouterr().out
    assert (tmp_path / "pair.png").stat().st_size > 10_000
    assert not (tmp_path / "object11_object11.png").exists()
    assert main(["align", *words, "--gate", "1.5"]) == 1
    assert (tmp_path / "object11_object11.png").stat().st_size > 10_000
    assert "refused" in capsys.readouterr().out
    assert main(["align", "object11", "mug", "--store", str(tmp_path), "--device", "cpu"]) == 2
    assert "registered in" in capsys.readouterr().err


def test_an_object_saved_in_the_frame_of_another_has_its_poses(tmp_path, estimator, recordings, capsys):
    """B is a second recording of A, from elsewhere and in another unit: whatever it sees is then posed as A is."""
    a, b, _ = recordings
    store = ObjectStore(tmp_path)
    store.save(replace(a, object_id="a"))
    store.save(replace(b, object_id="b"))
    words = ["align", "a", "b", "--store", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "pair.png")]
    assert main([*words, "--save", "b_as_a"]) == 0
    assert "Stored 'b_as_a'" in capsys.readouterr().out
    (saved,) = (one for one in store.load_all(estimator.predictor).objects if one.object_id == "b_as_a")
    for angle in (0.2, 2.1, 4.4):
        frame, R = frame_at(11, angle)
        (found,) = estimator.estimate_frame(frame, [saved])
        assert np.degrees(geodesic_distance(found.R_camera_object, R @ a.keyframes.R_fixed_object)) < 20
        true = AHEAD + R @ a.keyframes.t_fixed_object  # in the unit of A; three of B's
        np.testing.assert_allclose(found.t_camera_object, 3 * true, atol=1.0)
    again = align(a, saved)
    assert np.degrees(geodesic_distance(again.R, np.eye(3))) < 8
    assert again.scale == pytest.approx(1 / 3, rel=0.15)
    assert np.linalg.norm(again.t) < 0.1 * Surface.of(a).extent
    # Nothing is saved of what is refused, and nothing takes the place of A.
    assert main([*words, "--save", "never", "--gate", "1.5"]) == 1
    assert main([*words, "--save", "a"]) == 2
    assert "give another name" in capsys.readouterr().err
    assert sorted(one.object_id for one in store.load_all(estimator.predictor).objects) == ["a", "b", "b_as_a"]


def test_another_frame_changes_nothing_but_the_frame(estimator, recordings):
    b = recordings[1]
    R, t, scale = exp(np.array([0.3, 1.2, -0.7])), np.array([0.4, -0.9, 1.1]), 2.0
    moved = in_frame_of_a(b, Alignment(scale, R, t, 1.0, 1.0, 1.0, 1.0, accepted=True), "moved")
    for angle in (0.7, 3.0):
        frame, _ = frame_at(11, angle)
        query = estimator.look(frame)
        before, after = (estimator.match(query, one) for one in (b, moved))
        # What follows computes in bfloat16, and rotations of other frames round otherwise.
        finer = [estimator.refine(query, one, start) for one, start in ((b, before), (moved, after))]
        np.testing.assert_allclose(finer[1].R_camera_object @ R, finer[0].R_camera_object, atol=1e-3)
        # x_moved = R x_b + t / scale is the same place in the camera.
        np.testing.assert_allclose(after.R_camera_object @ R, before.R_camera_object, atol=1e-6)
        np.testing.assert_allclose(
            after.t_camera_object + after.R_camera_object @ t / scale, before.t_camera_object, atol=1e-6
        )
        assert after.confidence == pytest.approx(before.confidence)
    still = in_frame_of_a(b, Alignment(1.0, np.eye(3), np.zeros(3), 1.0, 1.0, 1.0, 1.0, accepted=True), "still")
    np.testing.assert_allclose(still.keyframes.hull, b.keyframes.hull, rtol=0.03)
    np.testing.assert_allclose(still.keyframes.seen_at, b.keyframes.seen_at, atol=0.5)
    np.testing.assert_allclose(moved.keyframes.t_fixed_object, _origin_of(b, R, t / scale))
    older = replace(b, keyframes=replace(b.keyframes, crops=None))
    with pytest.raises(InputError, match="register it again"):
        in_frame_of_a(older, align(b, b), "older")


def _origin_of(b, R, shift):
    """Where x_moved = 0 lies in the fixed frame of b."""
    return b.keyframes.R_fixed_object @ (-R.T @ shift) + b.keyframes.t_fixed_object


def test_recordings_are_read_as_register_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    poses = json.loads((SEQUENCE / "poses.json").read_text())
    for name, first in (("one", 0), ("other", 5)):
        images = [dict(entry) for entry in poses["images"][first::10]]
        for entry in images:
            entry.update(file=str(SEQUENCE / entry["file"]), mask=str(SEQUENCE / entry["mask"]))
        (tmp_path / name).mkdir()
        (tmp_path / name / "poses.json").write_text(json.dumps({**poses, "images": images}))
    words = ["align", "one", "other", "--store", str(tmp_path), "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "accepted" in said and "wrote one_other.png" in said
    picture = cv2.imread(str(tmp_path / "one_other.png"))
    column = picture[:, : picture.shape[1] // 8].reshape(-1, 3)
    assert np.ptp(column.astype(int), axis=1).max() > 60, "the references are shown, in colour, on the left"
    assert main([*words, "--fixed-frame", "map"]) == 2
    assert "neither A nor B is a bag" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "pair.nothing")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_one_view_is_not_enough(estimator):
    registered = estimator.register_frame(frame_at(11, 0.5)[0])
    with pytest.raises(InputError, match="back"):
        Surface.of(registered)
