"""Priors, and what is read off a distribution of rotations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from nope_ros.distribution import Ambiguity, RotationDistribution
from nope_ros.frame import InputError
from nope_ros.prior import elevation, free_rotations, hypotheses, resolve, upright_rotations, viewpoints
from nope_ros.rotations import exp, geodesic_distance, look_at

GRID = free_rotations()
TRUTH = exp(np.array([0.4, -0.9, 0.7]))


def around(*centres, sigma_deg=8.0, weights=None):
    """Log-likelihood on the grid of a mixture of Gaussians around rotations."""
    angles = np.stack([geodesic_distance(GRID, centre) for centre in centres])
    terms = -0.5 * (angles / np.radians(sigma_deg)) ** 2
    if weights is not None:
        terms += np.log(weights)[:, None]
    return np.logaddexp.reduce(terms, axis=0)


def distribution(*centres, **options):
    return RotationDistribution.from_log_likelihood(GRID, around(*centres, **options))


def test_probabilities_sum_to_one_whatever_the_scale_of_the_likelihood():
    for scale in (1e-6, 1.0, 1e6):
        d = RotationDistribution.from_log_likelihood(GRID, around(TRUTH) * scale + 1e4)
        assert d.probabilities.sum() == pytest.approx(1)
        assert np.isfinite(d.entropy)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_mode_is_finer_than_the_grid(seed):
    truth = Rotation.random(rng=seed).as_matrix()
    d = distribution(truth)
    assert np.degrees(geodesic_distance(d.mode.R, truth)) < 3.5  # neighbours are 15° apart
    assert d.ambiguity is Ambiguity.UNIQUE
    assert d.confidence > 0.9


def test_credible_sets_are_smallest_and_nested():
    d = distribution(TRUTH, sigma_deg=15)
    half, most = d.credible_set(0.5), d.credible_set(0.9)
    assert set(half) < set(most)
    assert d.probabilities[half].sum() >= 0.5 > d.probabilities[half[:-1]].sum()
    left_out = np.setdiff1d(np.arange(len(GRID)), most)
    assert d.probabilities[left_out].max() <= d.probabilities[most].min()
    assert len(d.credible_set(1.0)) <= len(GRID)


def test_covariance_is_that_of_samples():
    sigma = np.radians([9.0, 14.0, 20.0])
    samples = exp(np.random.default_rng(0).normal(size=(40000, 3)) * sigma) @ TRUTH
    nearest = (samples.reshape(-1, 9) @ GRID.reshape(-1, 9).T).argmax(axis=1)
    counts = np.bincount(nearest, minlength=len(GRID)) + 1e-12
    d = RotationDistribution.from_log_likelihood(GRID, np.log(counts))
    assert np.degrees(geodesic_distance(d.mode.R, TRUTH)) < 6
    spread = np.sqrt(np.linalg.eigvalsh(d.covariance))
    np.testing.assert_allclose(np.degrees(spread), [9, 14, 20], rtol=0.35)
    # The widest axis is the one it was made with, in the axes R maps to.
    assert abs(np.linalg.eigh(d.covariance)[1][:, 2] @ [0, 0, 1]) > 0.9


def test_two_fold_symmetry_has_two_modes_with_half_the_mass_each():
    turned = TRUTH @ exp(np.array([0, 0, np.pi]))
    d = distribution(TRUTH, turned)
    assert d.ambiguity is Ambiguity.FINITE
    first, second = d.modes[:2]
    assert first.probability == pytest.approx(0.5, abs=0.12)
    assert second.probability == pytest.approx(0.5, abs=0.12)
    found = sorted(np.degrees(geodesic_distance(mode.R, TRUTH)) for mode in (first, second))
    assert found[0] < 5 and found[1] > 175


def test_four_fold_symmetry_has_four_modes():
    centres = [TRUTH @ exp(np.array([0, 0, k * np.pi / 2])) for k in range(4)]
    d = distribution(*centres)
    assert d.ambiguity is Ambiguity.FINITE
    assert sum(mode.probability > 0.15 for mode in d.modes) == 4


def test_an_axis_of_revolution_is_axial():
    ring = [TRUTH @ exp(np.array([0, 0, angle])) for angle in np.linspace(0, 2 * np.pi, 60, endpoint=False)]
    d = distribution(*ring)
    assert d.ambiguity is Ambiguity.AXIAL
    wide = np.linalg.eigh(d.covariance)[1][:, 2]
    assert abs(wide @ TRUTH @ [0, 0, 1]) > 0.9  # the spread is about the object's axis, seen in the camera


def test_a_cylinder_is_axial_though_it_may_be_upside_down():
    over = np.diag([1.0, -1.0, -1.0])
    ring = [TRUTH @ exp(np.array([0, 0, angle])) for angle in np.linspace(0, 2 * np.pi, 60, endpoint=False)]
    assert distribution(*ring, *(R @ over for R in ring)).ambiguity is Ambiguity.AXIAL


def test_half_a_turn_about_any_axis_is_not_axial():
    """Of a box: four modes that leave each of its axes where it is, or turned round."""
    box = [TRUTH, *(TRUTH @ np.diag(signs) for signs in ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1]))]
    assert distribution(*box).ambiguity is Ambiguity.FINITE


def test_a_flat_distribution_is_uninformative():
    d = RotationDistribution.from_log_likelihood(GRID, np.zeros(len(GRID)))
    assert d.ambiguity is Ambiguity.UNINFORMATIVE
    assert d.entropy == pytest.approx(np.log(len(GRID)))
    assert d.confidence < 0.03


def test_modes_are_peaks_at_least_20_degrees_apart_and_not_slopes():
    d = distribution(TRUTH, sigma_deg=30)
    assert len([mode for mode in d.modes if mode.probability > 0.1]) == 1
    rng = np.random.default_rng(0)
    d = RotationDistribution.from_log_likelihood(GRID, rng.normal(size=len(GRID)) * 3)
    for i, a in enumerate(d.modes):
        for b in d.modes[:i]:
            assert np.degrees(geodesic_distance(a.R, b.R)) > 10  # peaks are 20° apart; their means may move a little
    assert list(d.modes) == sorted(d.modes, key=lambda mode: -mode.probability)


def test_evidence_on_peaks_is_bayes_rule():
    """Two equal peaks, one of them twice as likely to be seen: two thirds to one third, and within a peak as before."""
    other = TRUTH @ exp(np.array([0.0, np.pi, 0.0]))
    d = distribution(TRUTH, other)
    seen = d.weighed(np.stack([mode.R for mode in d.modes[:2]]), np.log([1.0, 2.0]))
    first, second = (seen.mass_within(mode.R, np.radians(30)) for mode in d.modes)
    assert (first, second) == (pytest.approx(1 / 3, abs=0.01), pytest.approx(2 / 3, abs=0.01))
    assert geodesic_distance(seen.mode.R, d.modes[1].R) < 1e-6, "where a peak is, is the templates' knowledge"
    assert seen.probabilities.sum() == pytest.approx(1)
    np.testing.assert_allclose(d.weighed(d.mode.R[None], np.zeros(1)).probabilities, d.probabilities)


def test_a_change_of_axes_moves_everything_along():
    d = distribution(TRUTH, sigma_deg=12)
    left, right = exp(np.array([0.2, 0.1, -0.5])), exp(np.array([-0.4, 0.3, 0.2]))
    moved = d.transformed(left, right)
    np.testing.assert_allclose(moved.mode.R, left @ d.mode.R @ right, atol=1e-9)
    np.testing.assert_allclose(moved.covariance, left @ d.covariance @ left.T, atol=1e-9)
    assert moved.entropy == d.entropy


# Priors

GRAVITY_30 = look_at(np.array([np.cos(np.radians(30)), 0, np.sin(np.radians(30))])) @ [0, 0, -1.0]


def test_elevation_is_read_off_gravity():
    assert np.degrees(elevation(GRAVITY_30)) == pytest.approx(30)
    assert np.degrees(elevation(np.array([0, 0, 1.0]))) == pytest.approx(90)  # looking straight down


def test_upright_rotations_contain_no_motion_and_keep_gravity_level():
    rotations = upright_rotations(GRAVITY_30)
    assert rotations.shape == (642, 3, 3)
    assert np.degrees(geodesic_distance(rotations, np.eye(3)).min()) < 7
    gravity = rotations @ GRAVITY_30
    sideways = gravity[:, 0][abs(viewpoints()[:, 2]) < 0.999]
    np.testing.assert_allclose(sideways, 0, atol=1e-9)


def test_upright_keeps_341_viewpoints_on_the_cameras_side_of_the_horizon():
    def kept(gravity_query):
        return np.isfinite(hypotheses("upright", GRAVITY_30, gravity_query).log_weight)

    assert kept(GRAVITY_30).sum() == kept(None).sum() == 341
    assert (viewpoints()[kept(GRAVITY_30 * [1, 1, -1])][:, 2] <= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_standing_leaves_the_turn_about_gravity_whatever_the_cameras_do(seed):
    cameras = Rotation.random(2, rng=seed).as_matrix()
    down = np.array([0, 0, -1.0])
    possible = hypotheses("standing", cameras[0] @ down, cameras[1] @ down)
    np.testing.assert_allclose(possible.rotations @ cameras[0] @ down, np.tile(cameras[1] @ down, (72, 1)), atol=1e-9)
    yaw = exp(np.array([0, 0, np.random.default_rng(seed).uniform(-np.pi, np.pi)]))
    truth = cameras[1] @ yaw @ cameras[0].T  # the object stands, but turned
    assert np.degrees(geodesic_distance(possible.rotations, truth).min()) <= 2.5 + 1e-6


def test_standing_works_straight_down_and_straight_up():
    down, up = np.array([0, 0, 1.0]), np.array([0, 0, -1.0])
    for query in (down, up):
        possible = hypotheses("standing", GRAVITY_30, query)
        np.testing.assert_allclose(possible.rotations @ GRAVITY_30, np.tile(query, (72, 1)), atol=1e-9)


def test_the_strongest_prior_that_gravity_allows():
    assert resolve(None, True, True) == "standing"
    assert resolve(None, True, False) == resolve(None, False, True) == "free"
    assert resolve("free", True, True) == "free"
    with pytest.raises(InputError, match="gravity in the reference"):
        resolve("upright", False, True)
    with pytest.raises(InputError, match="gravity in this image"):
        resolve("standing", True, False)
    with pytest.raises(InputError, match="unknown"):
        resolve("sideways", True, True)  # type: ignore[arg-type]
