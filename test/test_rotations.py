"""Rotation grids and conventions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from nope_ros.harmonics import degree_slices, rotate, spherical_harmonics, wigner_d
from nope_ros.rotations import (
    exp,
    exp_jacobian,
    geodesic_distance,
    icosphere,
    log,
    look_at,
    relative_rotation,
    rotation_grid,
    turn_to,
)

rotation_vectors = arrays(np.float64, 3, elements=st.floats(-1.8, 1.8)).filter(lambda v: np.linalg.norm(v) < 3.1)
# Near the identity is where careless formulas lose their digits.
small_vectors = arrays(np.float64, 3, elements=st.floats(-1e-6, 1e-6))
many = settings(max_examples=100, deadline=None)


@many
@given(st.one_of(rotation_vectors, small_vectors))
def test_log_undoes_exp(vector):
    np.testing.assert_allclose(log(exp(vector)), vector, atol=1e-9)


@many
@given(st.one_of(rotation_vectors, small_vectors, st.just(np.zeros(3))), rotation_vectors)
def test_the_jacobian_of_exp_is_what_a_small_change_does(vector, change):
    step = 1e-5 * change
    turned = log(exp(vector + step) @ exp(vector - step).T) / 2
    np.testing.assert_allclose(exp_jacobian(vector) @ step, turned, atol=1e-12)


@many
@given(st.one_of(rotation_vectors, small_vectors), rotation_vectors)
def test_geodesic_distance_is_the_turn_between_two_rotations(turn, start):
    R = exp(start)
    assert geodesic_distance(exp(turn) @ R, R) == pytest.approx(np.linalg.norm(turn), abs=1e-9)
    assert geodesic_distance(R @ exp(turn), R) == pytest.approx(np.linalg.norm(turn), abs=1e-9)


@many
@given(rotation_vectors, rotation_vectors, rotation_vectors)
def test_relative_rotation_does_not_depend_on_the_object_frame(query, reference, reframe):
    R_q, R_r, S = exp(query), exp(reference), exp(reframe)
    np.testing.assert_allclose(relative_rotation(R_q @ S, R_r @ S), relative_rotation(R_q, R_r), atol=1e-12)
    np.testing.assert_allclose(relative_rotation(R_q, R_r) @ R_r, R_q, atol=1e-12)


@pytest.mark.parametrize("level, count, upper", [(0, 12, 6), (1, 42, 26), (2, 162, 91), (3, 642, 341)])
def test_icosphere_has_the_published_counts(level, count, upper):
    points = icosphere(level)
    assert len(points) == count
    assert (points[:, 2] >= 0).sum() == upper
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    assert len(np.unique(points.round(9), axis=0)) == count


def test_nearest_of_the_341_viewpoints_is_four_degrees_off_at_the_median():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[:, 2] = abs(directions[:, 2])
    points = icosphere(3)
    upper = points[points[:, 2] >= 0]
    angle = np.degrees(np.arccos(np.clip((directions @ upper.T).max(axis=1), -1, 1)))
    assert 2.5 < np.median(angle) < 4.2 and angle.max() < 7


@pytest.mark.parametrize("level, median, worst", [(1, 15.5, 25), (2, 7.8, 13)])
def test_rotation_grid_covers_all_rotations_evenly(level, median, worst):
    grid = rotation_grid(level)
    assert grid.shape == (72 * 8**level, 3, 3)
    sample = Rotation.random(2000, rng=1).as_matrix()
    trace = sample.reshape(-1, 9) @ grid.reshape(-1, 9).T
    angle = np.degrees(np.arccos(np.clip((trace.max(axis=1) - 1) / 2, -1, 1)))
    assert np.median(angle) < median and angle.max() < worst
    # Equal volume: each rotation is the nearest one of about as many samples.
    owned = np.bincount(trace.argmax(axis=1), minlength=len(grid))
    if level == 1:
        assert owned.max() <= 14  # 3.5 on average; twenty would be a hole elsewhere


@many
@given(arrays(np.float64, 3, elements=st.floats(-1, 1)).filter(lambda v: np.linalg.norm(v) > 0.1))
def test_look_at_sees_the_origin_with_z_up(viewpoint):
    R = look_at(viewpoint)
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(R) == pytest.approx(1)
    np.testing.assert_allclose(R @ (-viewpoint / np.linalg.norm(viewpoint)), [0, 0, 1], atol=1e-9)
    up = R @ [0, 0, 1]
    if abs(up[2]) < 1 - 1e-9:  # else y takes the place of z
        assert abs(up[0]) < 1e-6 and up[1] <= 1e-9  # image y points down


@many
@given(st.floats(-1, 1), st.floats(-1, 1))
def test_turn_to_puts_the_ray_on_the_axis_by_the_smallest_turn(x, y):
    ray = np.array([x, y, 1.0])
    R = turn_to(ray)
    np.testing.assert_allclose(R @ ray / np.linalg.norm(ray), [0, 0, 1], atol=1e-12)
    assert geodesic_distance(R, np.eye(3)) == pytest.approx(np.arctan(np.hypot(x, y)), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.one_of(rotation_vectors, small_vectors), rotation_vectors)
def test_harmonics_turn_exactly_and_compose(first, second):
    bandwidth = 6
    points = icosphere(1)
    R, S = exp(first), exp(second)
    D_R, D_S, D_RS = (wigner_d(torch.from_numpy(M[None].copy()), bandwidth) for M in (R, S, R @ S))
    values = torch.from_numpy(spherical_harmonics(points, bandwidth).T)[None]
    turned = spherical_harmonics(points @ R.T, bandwidth).T
    np.testing.assert_allclose(rotate(values, D_R)[0], turned, atol=1e-8)
    for a, b, c in zip(D_R, D_S, D_RS, strict=True):
        np.testing.assert_allclose(a @ b, c, atol=1e-8)
        np.testing.assert_allclose(a @ a.mT, np.eye(a.shape[-1])[None], atol=1e-9)


@pytest.mark.parametrize("R", [np.eye(3), np.diag([-1, 1, -1.0]), np.diag([1, -1, -1.0]), np.diag([-1, -1, 1.0])])
def test_harmonics_turn_at_the_poles_of_the_euler_angles(R):
    points = icosphere(1)
    D = wigner_d(torch.from_numpy(R[None].copy()), 4)
    values = torch.from_numpy(spherical_harmonics(points, 4).T)[None]
    np.testing.assert_allclose(rotate(values, D)[0], spherical_harmonics(points @ R.T, 4).T, atol=1e-9)


def test_degree_slices_cover_all_coefficients():
    assert [s.stop - s.start for s in degree_slices(3)] == [1, 3, 5, 7]
