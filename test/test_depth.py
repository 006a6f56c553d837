"""Poses from measured depth: what is left out of a depth image, the fit to correspondences, the fit to surfaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nope_ros.crop import virtual_crop
from nope_ros.depth import Model, aligned, fit, measured_surface, normals_of, sampled, slide
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.depth_camera import measured_depth
from nope_ros.evaluation.meshes import procedural_set
from nope_ros.evaluation.refinement import rolled
from nope_ros.frame import Frame
from nope_ros.rotations import exp, geodesic_distance
from nope_ros.store import ObjectStore

Array = NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)
K = np.array([[500.0, 0, 159.5], [0, 500.0, 119.5], [0, 0, 1]])


@settings(max_examples=30, deadline=None)
@given(seeds, st.booleans())
def test_a_motion_is_found_again(seed: int, about_axis: bool) -> None:
    """Whatever the rotation, in batches, about any axis or a known one; never a mirror image."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    R = exp(axis * rng.uniform(-3, 3)) if about_axis else exp(rng.normal(size=3) * 2)
    t = rng.normal(size=3)
    x = rng.normal(size=(2, 8, 3))
    x[1, :, 2] = 0  # a plane has a mirror image that fits as well
    y = x @ R.T + t
    weights = rng.uniform(0.1, 1, (2, 8))
    found = aligned(x, y, weights, axis if about_axis else None)
    np.testing.assert_allclose(found[0], np.broadcast_to(R, (2, 3, 3)), atol=1e-7)
    np.testing.assert_allclose(found[1], np.broadcast_to(t, (2, 3)), atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_fit_bears_wrong_matches_and_holes(seed: int) -> None:
    """A third of the matches lead anywhere, a fifth have no depth: the pose is within the noise all the same."""
    rng = np.random.default_rng(seed)
    R, t = exp(rng.normal(size=3)), np.array([0.1, -0.2, 0.8])
    x = rng.uniform(-0.1, 0.1, (90, 3))
    y = x @ R.T + t + 0.002 * rng.normal(size=x.shape)
    y[:30] = t + rng.uniform(-0.1, 0.1, (30, 3))
    y[30:48] = np.nan
    found = fit(x, y, np.ones(90), 0.01, rng)
    assert found is not None
    assert geodesic_distance(found.R, R) < np.radians(2)
    assert np.linalg.norm(found.t - t) < 0.002
    assert 36 <= found.count <= 60 and found.error < 0.006
    assert fit(x, np.full_like(y, np.nan), np.ones(90), 0.01, rng) is None


def ball(rng: np.random.Generator, radius: float = 0.1, away: float = 0.8) -> tuple[Frame, Array]:
    """A ball before a wall as a depth camera sees it, its mask too large by three pixels; the ball's centre."""
    v, u = np.mgrid[0:240, 0:320]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
    centre = np.array([0.05, -0.04, away])
    b, a = rays @ centre, (rays**2).sum(-1)
    rest = b**2 - a * (centre @ centre - radius**2)
    z = np.where(rest > 0, (b - np.sqrt(np.maximum(rest, 0))) / a, 0)
    near = b**2 - a * (centre @ centre - (radius * 1.02) ** 2) > 0  # leaks
    depth = measured_depth(z, 500.0, away + 0.5, rng)
    return Frame.from_arrays(np.full((240, 320, 3), 128, np.uint8), near, K, depth), centre


def test_a_surface_is_what_the_object_shows() -> None:
    """No wall, nothing in the air, in the axes of the virtual camera; places between cells are looked up."""
    frame, centre = ball(np.random.default_rng(0))
    crop = virtual_crop(frame, 96)
    surface = measured_surface(frame, crop)
    assert surface is not None
    known = np.isfinite(surface).all(-1)
    off = np.linalg.norm(surface[known] - crop.R_virtual_camera @ centre, axis=-1) - 0.1
    assert known.sum() > 900
    assert np.abs(off).max() < 0.02 and np.median(np.abs(off)) < 0.001
    points = sampled(surface, np.array([[0.0, 0.0], [0.3, -0.4], [3.0, 0.0]]), crop.angular_radius)
    off = np.linalg.norm(points - crop.R_virtual_camera @ centre, axis=-1) - 0.1
    assert np.abs(off[:2]).max() < 0.003 and np.isnan(points[2]).all()
    normals = normals_of(surface)
    outwards = surface - crop.R_virtual_camera @ centre
    outwards /= np.linalg.norm(outwards, axis=-1, keepdims=True)
    assert np.nanmedian((normals * outwards).sum(-1)) > 0.98
    nothing = np.full_like(frame.depth, np.nan)  # type: ignore[arg-type]
    assert measured_surface(replace(frame, depth=nothing), crop) is None
    assert measured_surface(replace(frame, depth=None), crop) is None


def lumpy(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Points and normals of three sides of a box, radius one."""
    sides = rng.integers(3, size=count)
    normals = np.eye(3)[sides]
    sizes = np.array([0.7, 0.5, 0.4])
    points = rng.uniform(-1, 1, (count, 3)) * sizes
    points[np.arange(count), sides] = sizes[sides]
    return points, normals


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_sliding_brings_surfaces_together(seed: int) -> None:
    """From 5° and 5 % of the radius away, with noise, and with half of what is seen unknown to the model."""
    rng = np.random.default_rng(seed)
    points, normals = lumpy(rng, 3000)
    known = points.sum(axis=1) < 0.9
    model = Model(0.1 * points[known], normals[known], 0.1)
    R, t = exp(rng.normal(size=3)), np.array([0.0, 0.1, 0.7])
    seen, facing = lumpy(rng, 800)
    seen = 0.1 * (seen + 0.004 * rng.normal(size=seen.shape)) @ R.T + t
    turn = rng.normal(size=3)
    turn *= np.radians(5) / np.linalg.norm(turn)
    start = t + 0.005 * np.array([0.6, -0.48, 0.64])
    slid = slide(seen, facing @ R.T, model, exp(turn) @ R, start, start, tolerance=0.04)
    assert slid is not None
    assert geodesic_distance(slid.R, R) < np.radians(1.5)
    assert np.linalg.norm(slid.t - t) < 0.0015


def test_a_ball_does_not_turn() -> None:
    """Its shape says where it is, not how it is turned; nor does a known axis let anything turn about another."""
    rng = np.random.default_rng(1)
    normals = rng.normal(size=(3000, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    model = Model(0.1 * normals, normals, 0.1)
    seen = normals[normals[:, 2] < 0][:900]
    t = np.array([0.0, 0.0, 0.7])
    start = t + np.array([0.006, 0.0, -0.004])
    slid = slide(0.1 * seen + t, seen, model, np.eye(3), start, start, tolerance=0.04)
    assert slid is not None
    assert np.linalg.norm(slid.t - t) < 0.002
    assert geodesic_distance(slid.R, np.eye(3)) < np.radians(1)
    box, facing = lumpy(rng, 2000)
    model, axis = Model(0.1 * box, facing, 0.1), np.array([0.0, 0.0, 1.0])
    turn = exp(np.array([0.05, 0.0, 0.08]))
    slid = slide(0.1 * box + t, facing, model, turn, t, t, tolerance=0.05, axis=axis)
    assert slid is not None
    np.testing.assert_allclose((slid.R @ turn.T)[2], axis, atol=1e-6)
    assert abs(slid.R[1, 0] - slid.R[0, 1]) / 2 < 0.03


def test_a_rolled_frame_is_what_a_rolled_camera_sees() -> None:
    """With gravity rolled as well, the crop is the same; with the sign wrong it would be upside down."""
    rng = np.random.default_rng(0)
    frame, _ = ball(rng)
    speckled = cv2.GaussianBlur(rng.integers(0, 255, frame.image.shape, dtype=np.uint8), (0, 0), 4)
    frame = replace(frame, image=speckled, mask=frame.mask & (np.arange(320) < 215))  # part of a disk
    down = np.array([0.1, 1.0, 0.2])
    turn = exp(np.array([0.0, 0.0, 2.0]))
    straight, turned = virtual_crop(frame, 96, down), virtual_crop(rolled(frame, 2.0), 96, turn @ down)
    np.testing.assert_allclose(turned.R_virtual_camera @ turn, straight.R_virtual_camera, atol=0.01)
    assert np.abs(turned.mask.astype(float) - straight.mask).mean() < 6
    assert np.abs(turned.image.astype(float) - straight.image).mean() < 6


def test_depth_makes_poses_finer(tmp_path: Path) -> None:
    """The whole way, on objects and depth noise that nothing was trained on; and the surface outlives a restart."""
    torch.set_num_threads(1)
    estimator = PoseEstimator.from_pretrained(device="cpu", refinement="correspondence")
    before, after = [], []
    for one in procedural_set(5, protocols=("free",), count=3, pairs=8, views=8, depth=True).objects():
        for first, second in one.pairs:
            view, query = one.views[first], one.views[second]
            if view.direction @ query.direction < 0.5:
                continue
            registered = estimator.register_frame(
                view.read(), R_camera_object=view.R_camera_object, t_camera_object=view.t_camera_object
            )
            assert registered.depth is not None
            seen = estimator.look(query.read())
            template = estimator.match(seen, registered)
            pose = estimator.refine(seen, registered, template)
            assert np.linalg.eigvalsh(pose.covariance).min() > 0
            for estimate, errors in ((template, before), (pose, after)):
                apart = np.linalg.norm(estimate.t_camera_object - query.t_camera_object)
                errors.append(float(apart / np.linalg.norm(query.t_camera_object)))
    assert len(after) >= 5
    assert np.median(after) < 0.02
    store = ObjectStore(tmp_path)
    store.save(registered)
    (kept,) = store.load_all(estimator.predictor).objects
    assert kept.depth is not None
    np.testing.assert_array_equal(kept.depth, registered.depth)
