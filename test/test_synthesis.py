"""Refinement: gradients against differences, climbs on the shipped weights, priors kept, poses put together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph
from scipy.spatial.transform import Rotation

from nope_ros import Frame, InputError
from nope_ros.distribution import Mode, RotationDistribution
from nope_ros.harmonics import generators, wigner_d
from nope_ros.latent import PaperUNetPredictor, RotatedLatentPredictor
from nope_ros.match import TemplateBank, predict_bank
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork, turned
from nope_ros.refine import DEFAULT_REFINEMENT, Refined, moved
from nope_ros.rendering.render import Lighting
from nope_ros.rotations import exp, geodesic_distance, log, look_at
from nope_ros.synthesis import Freedom, HarmonicObjective, PredictedObjective, climb, objective, vote
from nope_ros.training.procedural import procedural_object

K = np.array([[400.0, 0, 159.5], [0, 400.0, 119.5], [0, 0, 1]])
FREE = Freedom("free")


def random_rotations(count, seed=0):
    return Rotation.random(count, rng=seed).as_matrix()


def test_generators_are_what_a_small_turn_does():
    h = 1e-5
    for axis, J in zip(np.eye(3), generators(8), strict=True):
        plus, minus = (
            torch.block_diag(*(block[0] for block in wigner_d(torch.from_numpy(exp(sign * h * axis)[None]), 8)))
            for sign in (1, -1)
        )
        torch.testing.assert_close((plus - minus) / (2 * h), J, atol=1e-7, rtol=0)


def differences(f, rotations, h):
    """Gradient (K, 3) and curvature (K, 3, 3) of a function of rotations, by central differences."""
    step = h * np.eye(3)
    value = lambda omega: f(exp(omega) @ rotations).value  # noqa: E731
    gradient = np.stack([(value(a) - value(-a)) / (2 * h) for a in step], axis=-1)
    curvature = [
        [(value(a + b) - value(a - b) - value(b - a) + value(-a - b)) / (4 * h * h) for b in step] for a in step
    ]
    return gradient, np.moveaxis(np.array(curvature), -1, 0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_gradient_and_curvature_of_the_harmonic_form(seed):
    products = torch.from_numpy(np.random.default_rng(seed).normal(size=969))
    f = HarmonicObjective(products, 8)
    rotations = random_rotations(5, seed)
    at = f(rotations)
    gradient, curvature = differences(f, rotations, 1e-4)
    np.testing.assert_allclose(at.gradient, gradient, atol=1e-4 * np.abs(gradient).max())
    np.testing.assert_allclose(at.curvature, curvature, atol=1e-4 * np.abs(curvature).max())


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return RotatedLatentPredictor(
        RotatedLatentNetwork(RotatedLatentConfig(widths=(32, 32, 32), crop_size=64)), temperature=1e-4, device="cpu"
    )


def test_the_harmonic_form_is_the_likelihood_of_the_bank(small):
    rotations = random_rotations(20)
    query, reference = 1e-2 * torch.randn(2, int(np.prod(small.latent_shape)))
    matched = predict_bank(small, reference, rotations).match(query, small.temperature)
    value = objective(small, query, reference)(rotations).value
    norm = float(reference.double().square().sum()) / (2 * small.temperature)  # which the bank has no need of
    np.testing.assert_allclose(value, matched.log_likelihood - norm, atol=1e-4 * np.ptp(value))


def test_views_of_a_mesh_are_compared_by_the_likelihood_of_its_templates(small):
    """Renders differ in the norms of their latents, which says nothing of which of them was seen."""
    rotations = random_rotations(4)
    query = 1e-2 * torch.randn(int(np.prod(small.latent_shape)))
    latents = torch.stack([scale * 1e-2 * torch.randn(int(np.prod(small.latent_shape))) for scale in (0.5, 1, 2, 3)])
    bank = TemplateBank.of_views(small, latents, rotations, np.arange(4), rotations)
    told = bank.match(query, small.temperature).log_likelihood
    values = [objective(small, query, latent)(R[None]).value[0] for latent, R in zip(latents, rotations, strict=True)]
    np.testing.assert_allclose(np.diff(values), np.diff(told), rtol=0.02, atol=0.02 * np.ptp(told))


def test_near_a_rotation_the_harmonic_form_is_the_likelihood_of_several_views(small):
    """Turned about the viewing direction, views keep their weights, and both forms differ by one constant."""
    query = 1e-2 * torch.randn(int(np.prod(small.latent_shape)))
    latents = 1e-2 * torch.randn(4, int(np.prod(small.latent_shape)))
    views = np.concatenate([np.eye(3)[None], random_rotations(3, 1)])
    for start in random_rotations(3, 2):
        rolled = exp(np.linspace(-1, 1, 9)[:, None] * [0.0, 0.0, 1.0]) @ start
        bank = predict_bank(small, latents, rolled, views=views, normalised=0.5)
        matched = bank.match(query, small.temperature).log_likelihood
        near = bank.harmonics_near(query, small.temperature, np.repeat(start[None], len(rolled), 0))
        value = HarmonicObjective(near.double(), 8)(rolled).value
        np.testing.assert_allclose(np.diff(value), np.diff(matched), atol=1e-4 * np.ptp(matched))


def test_differentiating_the_predictor_is_the_harmonic_form(small):
    rotations = random_rotations(6)
    query, reference = 1e-2 * torch.randn(2, int(np.prod(small.latent_shape)))
    closed, predicted = objective(small, query, reference)(rotations), PredictedObjective(small, query, reference)
    at = predicted(rotations)
    assert at.curvature is None
    np.testing.assert_allclose(at.gradient, closed.gradient, atol=1e-3 * np.abs(closed.gradient).max())
    np.testing.assert_allclose(np.diff(at.value), np.diff(closed.value), atol=1e-3 * np.ptp(closed.value))


def test_gradient_through_the_papers_network(paper):
    query, reference = torch.randn(2, int(np.prod(paper.latent_shape)))
    f = objective(paper, query, reference)
    rotations = random_rotations(2)
    at = f(rotations)
    gradient, _ = differences(f, rotations, 1e-2)
    np.testing.assert_allclose(at.gradient, gradient, atol=0.03 * np.abs(gradient).max())
    found, there = climb(f, rotations, FREE, steps=4)
    assert (there.value >= at.value).all() and (there.value > at.value).any()
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-9)


@pytest.fixture(scope="module")
def paper():
    from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig

    torch.manual_seed(0)
    network = PaperUNet(PaperUNetConfig(crop_size=32, vae_widths=(8, 8), unet_widths=(32, 32), context=16))
    return PaperUNetPredictor(network, temperature=1.0, device="cpu", dtype=torch.float32)


# --- climbs on the shipped weights ----------------------------------------------------------------------------------


def seen(mesh, direction):
    R = look_at(np.array(direction))
    frame = photograph(mesh, R, (0, 0, 8.0), K, lighting=Lighting())
    return frame.image, frame.mask, K, R @ [0, 0, -1.0]


@pytest.fixture(scope="module")
def pairs(estimator):
    """Reference and query latents (D,) of eight objects that training never drew, 35° apart."""
    found = []
    for seed in range(900_000_001, 900_000_009):
        mesh = procedural_object(seed).normalised()[0]
        image, mask, _, _ = seen(mesh, [1, 0.3, 0.6])
        registered = estimator.register(image, mask, K)
        image, mask, _, _ = seen(mesh, [0.8, -0.3, 0.5])
        frame_latent = estimator.register(image, mask, K).latent
        found.append((frame_latent, registered.latent))
    return found


@pytest.mark.parametrize("away, share", [(5, 0.95), (10, 0.85), (20, 0.6)])
def test_starts_near_the_truth_reach_it(estimator, pairs, away, share):
    """The truth is known, and its basin right, where the query is what the predictor expects."""
    rng = np.random.default_rng(away)
    reached = []
    for _, reference in pairs:
        for truth in random_rotations(6, int(rng.integers(2**32))):
            R = torch.from_numpy(truth[None]).float()
            query = turned(reference.reshape(1, *estimator.predictor.latent_shape), R).flatten()
            axes = rng.normal(size=(8, 3))
            starts = exp(np.radians(away) * axes / np.linalg.norm(axes, axis=1, keepdims=True)) @ truth
            found, _ = climb(objective(estimator.predictor, query, reference), starts, FREE)
            reached += list(np.degrees(geodesic_distance(found, truth)) < 5)
    assert np.mean(reached) >= share


def test_no_climb_ends_below_its_start(estimator, pairs):
    for query, reference in pairs:
        f = objective(estimator.predictor, query, reference)
        starts = random_rotations(16)
        assert (climb(f, starts, FREE)[1].value >= f(starts).value).all()


def test_priors_are_kept(estimator, pairs):
    rng = np.random.default_rng(0)
    for query, reference in pairs[:4]:
        f = objective(estimator.predictor, query, reference)
        down_reference, down_query = (np.array([0, np.cos(a), np.sin(a)]) for a in rng.uniform(0.1, 1.2, 2))
        # Standing: all that take one gravity to the other.
        first = Rotation.align_vectors(down_query[None], down_reference[None])[0].as_matrix()
        starts = exp(rng.uniform(-3, 3, (6, 1)) * down_query) @ first
        found, at = climb(f, starts, Freedom("standing", down_reference, down_query))
        np.testing.assert_allclose(found @ down_reference, np.tile(down_query, (6, 1)), atol=1e-9)
        assert (at.value > f(starts).value + 1e-3).any()
        # Upright: up stays vertical in the image, and the camera on its side of the horizon.
        elevation, yaw = rng.uniform(0.05, 1.3, 6), rng.uniform(-3, 3, 6)
        viewpoints = np.stack([np.cos(elevation) * np.cos(yaw), np.cos(elevation) * np.sin(yaw), np.sin(elevation)], 1)
        level = look_at(np.array([np.cos(0.5), 0.0, np.sin(0.5)]))
        starts = look_at(viewpoints) @ level.T
        found, at = climb(f, starts, Freedom("upright", level @ [0, 0, -1.0]))
        up = found @ level[:, 2]
        np.testing.assert_allclose(up[:, 0], 0, atol=1e-9)
        assert (up[:, 1] < 0).all() and (up[:, 2] <= 1e-9).all()
        assert (at.value > f(starts).value + 1e-3).any()


def test_those_that_agree_are_one():
    rotations = exp(np.radians([[0, 0, 0], [0, 0, 6], [0, 90, 0], [180, 0, 0]]))
    masses, kept = vote(rotations, np.array([0.3, 0.25, 0.4, 0.05]), np.array([1.0, 2.0, 5.0, 0.0]), np.radians(10))
    np.testing.assert_allclose(masses, [0.55, 0.4, 0.05])
    assert kept.tolist() == [1, 2, 3]  # the higher of the two speaks for both


# --- through the estimator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["free", "upright", "standing"])
def test_an_estimate_says_what_it_comes_from(estimator, prior):
    mesh = procedural_object(900_000_003).normalised()[0]
    image, mask, _, down = seen(mesh, [1, 0.3, 0.6])
    registered = estimator.register(
        image, mask, K, gravity_camera=down, R_camera_object=np.eye(3), t_camera_object=np.array([0.3, 0.1, 8.0])
    )
    image, mask, _, down = seen(mesh, [1, 0.1, 0.6])
    query = estimator.look(Frame.from_arrays(image, mask, K), down)
    before = estimator.match(query, registered, prior)
    after = estimator.refine(query, registered, before, "synthesis")
    assert (before.stage, after.stage) == ("template", "synthesis")
    assert estimator.refine(query, registered, before, "none") is before
    assert after.distribution is before.distribution and after.metric
    assert [mode.probability for mode in after.modes] == sorted((m.probability for m in after.modes), reverse=True)
    np.testing.assert_allclose(after.R_camera_object, after.modes[0].R_camera_object)
    np.testing.assert_allclose(after.delta_R, after.R_camera_object, atol=1e-9)  # the reference's is the identity
    assert np.linalg.eigvalsh(after.covariance).min() > 0
    assert np.degrees(geodesic_distance(after.delta_R, before.delta_R)) < 20


def test_an_uninformative_distribution_is_left_alone(estimator):
    mesh = procedural_object(900_000_003).normalised()[0]
    image, mask, _, down = seen(mesh, [1, 0.3, 0.6])
    registered = estimator.register(image, mask, K, gravity_camera=down)
    query = estimator.look(Frame.from_arrays(image, mask, K), down)
    found = estimator.match(query, registered, "standing")
    flat = RotationDistribution.from_log_likelihood(
        found.distribution.rotations, np.zeros(len(found.distribution.rotations))
    )
    unsure = replace(found, distribution=flat)
    assert estimator.refine(query, registered, unsure, "synthesis") is unsure


def test_unknown_refinements_are_refused(estimator):
    with pytest.raises(InputError, match=r"refinement 'best' is unknown; known: none, correspondence, synthesis, both"):
        estimator.refinement = "best"
    assert estimator.refinement == DEFAULT_REFINEMENT


def test_a_refiner_speaks_of_the_centre_and_the_pose_of_the_origin(estimator):
    mesh = procedural_object(900_000_003).normalised()[0]
    image, mask, _, _ = seen(mesh, [1, 0.3, 0.6])
    registered = estimator.register(image, mask, K, t_camera_object=np.array([0.3, 0.1, 8.0]))
    before = estimator.estimate(image, mask, K, registered)
    # Nothing new: nothing moves.
    same = Refined("offsets", (Mode(before.delta_R, 1.0),), before.covariance[3:, 3:])
    after = moved(before, same, registered.reference)
    np.testing.assert_allclose(after.t_camera_object, before.t_camera_object, atol=1e-9)
    np.testing.assert_allclose(after.covariance, before.covariance, atol=1e-9)
    # Another centre and rotation: the origin keeps its place in the object.
    R, centre = exp(np.array([0.1, 0.2, -0.3])) @ before.delta_R, np.array([0.0, 1.0, 9.0])
    after = moved(before, Refined("affine", (Mode(R, 1.0),), np.eye(3), centre, np.eye(3)), registered.reference)
    np.testing.assert_allclose(after.delta_R, R)
    in_object = after.R_camera_object.T @ (after.t_camera_object - centre)
    np.testing.assert_allclose(in_object, registered.reference.offset_object, atol=1e-9)
    assert np.linalg.norm(log(after.delta_R @ before.delta_R.T)) == pytest.approx(np.sqrt(0.14))


def test_renders_of_a_mesh_are_turned_as_the_reference_is(estimator, tmp_path):
    import trimesh

    box = trimesh.creation.box((0.1, 0.06, 0.04))
    box.visual.face_colors = np.random.default_rng(0).integers(0, 255, (len(box.faces), 4))
    box.export(tmp_path / "box.glb")
    registered = estimator.register_mesh(tmp_path / "box.glb", object_id="box")
    image, mask, _, _ = seen(procedural_object(900_000_003).normalised()[0], [1, 0.3, 0.6])
    # A query that looks just like one of the renders, and a mode beside it.
    query = replace(estimator.look(Frame.from_arrays(image, mask, K)), latent=registered.rendered.latents[40])
    truth = query.crop.R_virtual_camera.T @ registered.rendered.R[40]
    found = estimator.match(query, registered)
    beside = replace(found.modes[0], R_camera_object=exp(np.radians([3.0, -4, 5])) @ truth)
    delta_R = beside.R_camera_object @ registered.reference.R_camera_object.T
    start = replace(found, R_camera_object=beside.R_camera_object, delta_R=delta_R, modes=(beside,))
    after = estimator.refine(query, registered, start, "synthesis")
    assert np.degrees(geodesic_distance(after.R_camera_object, truth)) < 0.5
