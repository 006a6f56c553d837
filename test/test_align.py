"""One object laid over another: similarities from points, two recordings of one object, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_features import vit

from nope_ros import InputError, PoseEstimator
from nope_ros.align import Surface, align, align_surfaces
from nope_ros.align import _umeyama as umeyama
from nope_ros.cli import main
from nope_ros.features import FeatureExtractor
from nope_ros.frame import Frame
from nope_ros.rotations import exp, geodesic_distance, look_at
from nope_ros.store import ObjectStore
from nope_ros.training.procedural import procedural_object
from nope_ros.training.render import Lighting, render

K = np.array([[400.0, 0, 119.5], [0, 400.0, 119.5], [0, 0, 1]])


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


def walk(estimator, number, first, turned=None, size=1.0):
    """An object registered from eight views of a mesh, in a frame of its own."""
    mesh = procedural_object(number).normalised()[0]
    turned = np.eye(3) if turned is None else turned
    frames, poses = [], []
    for angle in first + np.arange(8) * 2 * np.pi / 8:
        R = look_at(np.array([np.cos(angle), np.sin(angle), 0.5 * np.sin(2 * angle)]))
        t = np.array([0, 0, 5.0])
        view = render(mesh, R, t, K, 240, 240, lighting=Lighting.uniform())
        frames.append(Frame.from_arrays(view.rgb, view.mask, K))
        poses.append((R @ turned.T, t * size))
    return estimator.register_views(frames, poses=poses, object_id=f"object{number}", keyframes=8)


@pytest.fixture(scope="module")
def estimator():
    return PoseEstimator.from_pretrained(device="cpu")


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


def test_the_command_prints_draws_and_refuses(tmp_path, estimator, recordings, capsys):
    store = ObjectStore(tmp_path)
    store.save(recordings[0])
    words = ["object11", "object11", "--store", str(tmp_path), "--device", "cpu"]
    assert main(["align", *words, "--out", str(tmp_path / "pair.png")]) == 0
    assert "accepted" in capsys.readouterr().out
    assert (tmp_path / "pair.png").stat().st_size > 10_000
    assert main(["align", *words, "--gate", "1.5"]) == 1
    assert "refused" in capsys.readouterr().out
    assert main(["align", "object11", "mug", "--store", str(tmp_path), "--device", "cpu"]) == 2
    assert "registered in" in capsys.readouterr().err


def test_one_view_is_not_enough(estimator):
    mesh = procedural_object(11).normalised()[0]
    view = render(
        mesh, look_at(np.array([1.0, 0, 0.5])), np.array([0, 0, 5.0]), K, 240, 240, lighting=Lighting.uniform()
    )
    registered = estimator.register(view.rgb, view.mask, K)
    with pytest.raises(InputError, match="back"):
        Surface.of(registered)
