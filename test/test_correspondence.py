"""The correspondence refiner: its geometry, what it learns from, and what it does for an object with a mesh."""

from __future__ import annotations

import gc
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph

from nope_ros.correspondence import CORRESPONDENCE_WEIGHTS, CorrespondenceRefiner
from nope_ros.crop import VirtualCamera, depth_through, look_through, rolled
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation.meshes import FIRST_UNSEEN_SEED, random_camera
from nope_ros.evaluation.stages import OFFSETS, TEMPLATE, Compared, Pair, StageError
from nope_ros.frame import Frame
from nope_ros.models.correspondence import (
    CorrespondenceConfig,
    CorrespondenceNetwork,
    RelativePose,
    cell_centres,
    directions,
    project,
    solve,
)
from nope_ros.prior import PRIORS, Prior, constrained
from nope_ros.refine import Refined
from nope_ros.rendering.render import Lighting
from nope_ros.rotations import exp, geodesic_distance, look_at, twist
from nope_ros.training.procedural import procedural_object
from nope_ros.training.render_cache import random_finish, random_lighting
from nope_ros.training.trust import SPREADS, choose, fit_support

seeds = st.integers(0, 2**32 - 1)
MESHES = Path(__file__).parents[2] / "shared/data/meshes/train"


def random_pose(rng: np.random.Generator, size: float) -> RelativePose:
    """A turn of up to ``size`` radians about each axis, with shift and scale."""
    R = torch.tensor(exp(rng.uniform(-size, size, (1, 3))))
    return RelativePose(R, torch.tensor(rng.uniform(-0.2, 0.2, (1, 2))), torch.tensor(rng.uniform(-0.2, 0.2, 1)))


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_solving_brings_points_to_their_targets(seed: int) -> None:
    """From true places the true pose follows, whatever the perspective; and weights of nothing change nothing."""
    rng = np.random.default_rng(seed)
    points = torch.tensor(rng.uniform(-0.8, 0.8, (1, 80, 3)))
    rho = torch.tensor(rng.uniform(0.05, 0.4, 1))
    true = random_pose(rng, 1.5)
    start = RelativePose.of_rotation(torch.tensor(exp(rng.uniform(-0.15, 0.15, (1, 3)))) @ true.R)
    targets, weights, damping = project(points, true, rho), torch.ones(1, 80, 2).double(), torch.full((1, 6), 1e-9)
    pose = start
    for _ in range(8):
        pose, _ = solve(points, targets, weights, pose, rho, damping.double(), torch.eye(6).double())
    torch.testing.assert_close(pose.R, true.R, atol=1e-5, rtol=0)
    torch.testing.assert_close(pose.shift, true.shift, atol=1e-5, rtol=0)
    torch.testing.assert_close(pose.log_scale, true.log_scale, atol=1e-5, rtol=0)
    kept, _ = solve(points, targets, 0 * weights, start, rho, torch.ones(1, 6).double(), torch.eye(6).double())
    torch.testing.assert_close(kept.R, start.R)


def test_geometry_is_exact_under_autocast() -> None:
    """Networks run in bfloat16, of which a rotation keeps a quarter of a degree."""
    rng = np.random.default_rng(0)
    points, rho = torch.tensor(rng.uniform(-0.8, 0.8, (1, 80, 3))).float(), torch.tensor([0.2])
    true = random_pose(rng, 0.5)
    pose = RelativePose(true.R.float(), true.shift.float(), true.log_scale.float())
    weights, damping = torch.ones(1, 80, 2), torch.full((1, 6), 1e-4)
    start = RelativePose.of_rotation(pose.R @ torch.tensor(exp(np.array([[0.05, -0.03, 0.1]]))).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (points @ pose.R.mT).dtype == torch.bfloat16, "what it would be"
        targets = project(points, pose, rho)
        found, _ = solve(points, targets, weights, start, rho, damping, torch.eye(6))
    torch.testing.assert_close(targets, project(points, pose, rho))
    expected, _ = solve(points, targets, weights, start, rho, damping, torch.eye(6))
    torch.testing.assert_close(found.R, expected.R)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_an_affine_rolls_shifts_and_scales_only(seed: int) -> None:
    """The viewing direction stays the template's, whatever is seen; a roll, a shift and a scale are found exactly."""
    rng = np.random.default_rng(seed)
    points, rho = torch.tensor(rng.uniform(-0.8, 0.8, (1, 80, 3))), torch.tensor(rng.uniform(0.05, 0.4, 1))
    start = RelativePose.of_rotation(torch.eye(3)[None].double())
    free = directions(affine_only=True).double()
    weights, damping = torch.ones(1, 80, 2).double(), torch.full((1, 6), 1e-9).double()

    def found(true: RelativePose) -> RelativePose:
        pose = start
        for _ in range(8):
            pose, _ = solve(points, project(points, true, rho), weights, pose, rho, damping, free)
        return pose

    turned = random_pose(rng, 0.3)
    np.testing.assert_allclose(found(turned).R[0, 2].numpy(), [0, 0, 1], atol=1e-9)
    rolled = replace(turned, R=torch.tensor(exp(np.array([[0, 0, rng.uniform(-0.5, 0.5)]]))))
    pose = found(rolled)
    torch.testing.assert_close(pose.R, rolled.R, atol=1e-5, rtol=0)
    torch.testing.assert_close(pose.shift, rolled.shift, atol=1e-5, rtol=0)
    torch.testing.assert_close(pose.log_scale, rolled.log_scale, atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_priors_hold_after_refining(seed: int) -> None:
    """Gravity stays where it is known to be, and nothing moves more than that needs."""
    rng = np.random.default_rng(seed)
    g_reference, g_query = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 3)))
    R = exp(rng.normal(size=3))
    standing = constrained(R, "standing", g_reference, g_query)
    np.testing.assert_allclose(standing @ g_reference, g_query, atol=1e-9)
    least = np.arccos(np.clip(R @ g_reference @ g_query, -1, 1))
    np.testing.assert_allclose(geodesic_distance(standing, R), least, atol=1e-6)
    upright = constrained(R, "upright", g_reference, None)
    down = upright @ g_reference
    assert abs(down[0]) < 1e-9 and down[1] > -1e-9
    heights = np.radians(np.linspace(-90, 90, 721))
    level = np.column_stack([np.zeros(721), np.cos(heights), np.sin(heights)])
    nearest = np.arccos(np.clip((level @ (R @ g_reference)).max(), -1, 1))
    np.testing.assert_allclose(geodesic_distance(upright, R), nearest, atol=np.radians(0.25))
    assert constrained(R, "free", None, None) is R


def test_a_rolled_crop_is_what_a_rolled_camera_sees() -> None:
    """The sign of roll, which y down invites to get wrong; and its twist."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 255, (240, 320, 4), dtype=np.uint8), (0, 0), 4)
    K_virtual = np.array([[300.0, 0, 47.5], [0, 300.0, 47.5], [0, 0, 1]])
    straight = VirtualCamera(np.eye(3), K_virtual, 0.1)
    K_image = np.array([[500.0, 0, 159.5], [0, 500.0, 119.5], [0, 0, 1]])
    roll = 0.7
    turn = exp(np.array([0.0, 0.0, roll]))
    seen = look_through(image, K_image, VirtualCamera(turn, K_virtual, 0.1), 96)
    made = rolled(look_through(image, K_image, straight, 96), roll)
    middle = np.s_[20:76, 20:76]
    assert np.abs(seen[middle].astype(float) - made[middle]).mean() < 3
    assert twist(turn @ exp(np.array([0.3, -0.2, 0.0]))) == pytest.approx(roll)


def test_depth_through_a_turned_camera_is_depth_along_its_axis() -> None:
    """A wall seen from an angle: every cell's point lies on it."""
    depth = np.full((240, 320), 2.0)
    K_image = np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]])
    turn = exp(np.array([0.1, -0.2, 0.3]))
    camera = VirtualCamera(turn, np.array([[400.0, 0, 47.5], [0, 400.0, 47.5], [0, 0, 1]]), 0.1)
    z = depth_through(depth, K_image, camera, 24).ravel()
    rays = np.column_stack([cell_centres(24).numpy() * 0.9 * 48 / 400, np.ones(576)])
    points = (rays * z[:, None]) @ turn
    np.testing.assert_allclose(points[:, 2], 2.0, atol=1e-9)


def test_a_mesh_object_is_found_more_exactly() -> None:
    """The whole way: renders, templates, offsets, of objects and light that training never drew; soon enough, too."""
    torch.set_num_threads(1)
    estimator = PoseEstimator.from_pretrained(device="cpu", refinement="correspondence")
    before, after, moved, took = [], [], [], []
    for seed in (FIRST_UNSEEN_SEED + 2, FIRST_UNSEEN_SEED + 5):
        mesh = procedural_object(seed).normalised()[0]
        registered = estimator.register_mesh(mesh)
        rng = np.random.default_rng(seed)
        for _ in range(8):
            R, t, K = random_camera(rng, level=False)
            lighting = random_lighting(rng, R, random_finish(rng))
            query = estimator.look(photograph(mesh, R, t, K, (640, 480), lighting))
            template = estimator.match(query, registered)
            begin = time.process_time()
            pose = estimator.refine(query, registered, template)
            took.append(time.process_time() - begin)
            assert np.linalg.eigvalsh(pose.covariance).min() > 0
            if geodesic_distance(template.R_camera_object, R) < np.radians(20):
                before.append(np.degrees(geodesic_distance(template.R_camera_object, R)))
                after.append(np.degrees(geodesic_distance(pose.R_camera_object, R)))
                moved.append(np.linalg.norm(pose.t_camera_object - t) / np.linalg.norm(t))
    assert len(before) >= 8
    assert np.median(after) < 0.75 * np.median(before)
    assert np.median(moved) < 0.02
    assert np.median(took) < 0.3


def test_matches_and_outline_place_an_object_together(estimator: PoseEstimator) -> None:
    """Each as far as it is to be trusted: the outline less, the farther the query is from the reference."""
    refiner = CorrespondenceRefiner.from_pretrained(device="cpu")
    mesh = procedural_object(FIRST_UNSEEN_SEED + 2).normalised()[0]
    down = np.array([0.0, 0.0, -1.0])
    K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])

    def seen(degrees: float) -> tuple[Frame, np.ndarray]:
        angle = np.radians(degrees)
        R, t = look_at(np.array([np.cos(angle), np.sin(angle), 0.5])), np.array([0.0, 0.0, 5.0])
        return photograph(mesh, R, t, K, (640, 480), Lighting()), R @ down

    frame, gravity = seen(0)
    registered = estimator.register_frame(frame, gravity_camera=gravity, reference_distance=5.0)

    def centre(degrees: float, placed: float) -> np.ndarray:
        trust = refiner.weights.with_image.model_copy(update={"placed": placed})
        refiner.weights = refiner.weights.model_copy(update={"with_image": trust})
        frame, gravity = seen(degrees)
        query = estimator.look(frame, gravity)
        refined = refiner.refine(query, registered, estimator.match(query, registered))
        assert refined is not None and refined.centre is not None
        return refined.centre

    shares = []
    for degrees in (5, 60):
        matched, outlined, together = (centre(degrees, placed) for placed in (1e-6, 1e3, 0.04))
        along = matched - outlined
        shares.append(float((together - outlined) @ along / (along @ along)))
        np.testing.assert_allclose(together, outlined + shares[-1] * along, atol=1e-9)
    assert 0.2 < shares[0] < 0.6 < shares[1] < 0.95


def seen_from(*directions: list[float], x: float = 0.0) -> tuple[list[Frame], list[np.ndarray]]:
    """An object that training never drew, 5 m away and ``x`` beside the axis, from each direction; gravity in each."""
    mesh = procedural_object(FIRST_UNSEEN_SEED + 2).normalised()[0]
    K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])
    rotations = [look_at(np.array(direction)) for direction in directions]
    frames = [photograph(mesh, R, (x, 0.0, 5.0), K, (640, 480), Lighting()) for R in rotations]
    return frames, [R @ [0.0, 0.0, -1.0] for R in rotations]


@pytest.mark.parametrize("prior", ["free", "upright", "standing"])
def test_templates_and_matches_turn_an_object_together(estimator: PoseEstimator, prior: Prior) -> None:
    """The less the network is believed, the nearer to the templates; always as gravity allows, and surer than they."""
    refiner = CorrespondenceRefiner.from_pretrained(device="cpu")
    frames, gravity = seen_from([1.0, 0.0, 0.5], [1.0, 0.3, 0.4], x=0.3)
    level = gravity if prior != "free" else [None, None]
    registered = estimator.register_frame(frames[0], gravity_camera=level[0], reference_distance=5.0)
    query = estimator.look(frames[1], level[1])
    estimate = estimator.match(query, registered, prior)
    look = refiner.look(query, registered, estimate)

    def believed(spread: float) -> Refined:
        trust = look.trust.model_copy(update={"spread": dict.fromkeys(PRIORS, spread)})
        return replace(look, trust=trust).answer()

    answers = {spread: believed(spread) for spread in (1e-6, 0.5, 1.0, 2.0, 1e6)}
    mode, matched = look.modes[0].R, look.alone("offsets").modes[0].R
    # A mode is the mean of a peak, which upright need not be level to the last digit.
    assert geodesic_distance(answers[1e6].modes[0].R, mode) < np.radians(0.05)
    assert geodesic_distance(answers[1e-6].modes[0].R, matched) < np.radians(2.0)
    off = [float(geodesic_distance(one.modes[0].R, mode)) for one in answers.values()]
    assert off == sorted(off, reverse=True) and off[0] > np.radians(0.5)
    sure = [float(np.trace(one.rotation_covariance)) for one in answers.values()]
    assert sure[1] < sure[3] < 1.01 * sure[4]
    for one in answers.values():
        R = query.crop.R_virtual_camera @ one.modes[0].R @ registered.R_virtual_camera.T
        allowed = constrained(R, prior, registered.gravity_virtual, query.gravity_virtual)
        assert geodesic_distance(R, allowed) < 1e-6
        assert np.linalg.eigvalsh(one.rotation_covariance).min() > 0


def test_what_was_tracked_keeps_its_rotation_and_is_placed() -> None:
    estimator = PoseEstimator.from_pretrained(device="cpu", refinement="correspondence")
    frames, gravity = seen_from([1.0, 0.0, 0.5], [1.0, 0.15, 0.5])
    registered = estimator.register_frame(frames[0], gravity_camera=gravity[0], reference_distance=5.0)
    query = estimator.look(frames[1], gravity[1])
    alone = estimator.match(query, registered)
    tracked = replace(alone, stage="tracking", tracked=True)
    kept, turned = (estimator.refine(query, registered, one) for one in (tracked, alone))
    np.testing.assert_allclose(kept.delta_R, tracked.delta_R, atol=1e-12)
    np.testing.assert_allclose(kept.covariance[3:, 3:], tracked.covariance[3:, 3:], atol=1e-9)
    assert np.abs(kept.t_camera_object - tracked.t_camera_object).max() > 1e-4
    assert geodesic_distance(turned.delta_R, alone.delta_R) > np.radians(0.1)


def test_what_is_learned_from_agrees_with_itself(tmp_path: Path) -> None:
    """A cache rendered with depth: true poses bring true points to where the other view has that depth."""
    from nope_ros.training.correspond import GroupDataset, Templates, choose_pairs
    from nope_ros.training.render_cache import main as render_cache
    from nope_ros.training.settings import CorrespondenceTraining

    render_cache(["--procedural", "3", "--views", "16", "--depth", "--workers", "1", "--out", str(tmp_path)])
    config = CorrespondenceTraining.model_validate(
        {
            "kind": "correspondence",
            "data": {
                "cache": str(tmp_path),
                "objects_per_batch": 2,
                "views_per_object": 3,
                "mesh_share": 0.0,
                "near_deg": 65,
                "validation_share": 0.0,
            },
        }
    )
    dataset = GroupDataset(config, 96, 0)
    dataset.augmentation = None
    batch = dataset.batch(np.random.default_rng(0))
    network = CorrespondenceNetwork(CorrespondenceConfig())
    mask = torch.nn.functional.avg_pool2d((batch.crops.flatten(0, 1)[:, 3:] > 127).float(), 4)
    templates = Templates()
    crops = batch.crops.flatten(0, 1)
    finer = torch.nn.functional.interpolate(crops.float(), (160, 160), mode="bilinear").byte()
    coarse = torch.nn.functional.cosine_similarity(templates.latents(finer), templates.latents(crops))
    assert coarse.min() > 0.9, "the refiner's crops may be of another size"
    truth = choose_pairs(batch, network.cells, config, np.random.default_rng(0), mask, templates)
    surface = truth.points[..., 2].isfinite()
    assert truth.visible.sum() > 0.4 * surface.sum()
    off = np.degrees(geodesic_distance(truth.hypothesis.double().numpy(), truth.pose.R.double().numpy()))
    wrong = truth.wrong.numpy()
    assert 0 < wrong.sum() < len(wrong) and off[~wrong].max() < 45 and np.median(off[wrong]) > 40
    # As much evidence of each kind at every distance: nothing to even out where all are equally far.
    far = torch.tensor(exp(np.array([[0.0, 2.0, 0.0]]))).float().expand(300, -1, -1)
    for _ in range(200):
        counts = templates.weights(far, torch.arange(300) < 200)
    assert counts[250] == 1 and counts[0] == pytest.approx(1.0, abs=0.05), "all are at one distance"
    near = torch.eye(3).expand(300, -1, -1)
    for _ in range(200):
        counts = templates.weights(torch.cat([near, far]), torch.arange(600) < 400)
    assert counts[0] == pytest.approx(0.2), "wrong ones where no right one is hardly count"
    assert counts[350] == pytest.approx(4.0, abs=0.2), "a quarter of the wrong ones is where all of the right ones are"
    points = truth.points.nan_to_num(0)
    weights = surface.float()[..., None].expand(-1, -1, 2)
    pose = RelativePose.of_rotation(truth.pose.R)
    rho = batch.rho.flatten()[truth.query]
    for _ in range(5):
        pose, _ = solve(
            points, truth.targets.nan_to_num(0), weights, pose, rho, torch.full((len(rho), 6), 1e-4), torch.eye(6)
        )
    assert float((pose.shift - truth.pose.shift).abs().max()) < 1e-2


def test_weights_say_how_they_came_about() -> None:
    """Config and card, and a network small enough to ship."""
    config = json.loads((CORRESPONDENCE_WEIGHTS / "config.json").read_text())
    assert config["refiner"] == "correspondence" and config["training"]["steps"] > 0
    assert (CORRESPONDENCE_WEIGHTS / "README.md").is_file()
    assert (CORRESPONDENCE_WEIGHTS / "model.safetensors").stat().st_size < 16e6


def test_an_untrained_network_moves_nothing() -> None:
    """Until it has learned, and where a crop is empty, the hypothesis stays."""
    network = CorrespondenceNetwork(CorrespondenceConfig()).eval()
    crops = torch.full((2, 4, 96, 96), -1.0)
    crops[0, 3, 20:70, 20:70] = 1.0
    with torch.inference_mode():
        views = network.view(crops, torch.tensor([0.1, 0.1]))
        points, valid, coarse = network.points(views)
        pose = RelativePose.of_rotation(torch.tensor(exp(np.array([[0.1, 0.2, 0.3]]))).float().expand(2, -1, -1))
        step = network.step(points, valid, coarse, views, network.compare(coarse, views), pose, torch.ones(2))
    assert not valid[1].any()
    assert step.pose.R.isfinite().all() and step.log_sigma.isfinite().all()
    torch.testing.assert_close(step.pose.R, pose.R, atol=1e-5, rtol=0)


def test_the_spread_is_that_of_the_errors_as_far_as_it_harms_nobody() -> None:
    """Two measurements weighed by their precisions are best where these are true; believed less, fewer get worse."""
    rng = np.random.default_rng(0)

    def error(rotation_deg: float) -> StageError:
        return StageError(rotation_deg, 0.0, 0.0, 0.0, 2.0, float("nan"), 0.0)

    def pairs(boast: float) -> list[Pair]:
        """Errors about one axis, of 5° by the templates and ``boast`` times the expected one by the network."""
        made = []
        for _ in range(1000):
            sigma, off = rng.uniform(2, 10), rng.normal(scale=5.0)
            matched = boast * rng.normal() * sigma
            rows = {TEMPLATE: error(abs(off)), OFFSETS: error(abs(matched))}
            for spread in SPREADS:
                gain = 25 / (25 + (spread * sigma) ** 2)
                rows[f"spread {spread:g}"] = error(abs(off + gain * (matched - off)))
            compared = Compared(np.zeros(1), np.zeros(1), np.zeros(1), np.ones(1, dtype=bool))
            made.append(Pair("", rows, sigma, compared))
        return made

    assert 0.8 < choose(pairs(1.0), 0.3).spread < 1.3
    assert 1.4 < choose(pairs(1.7), 0.3).spread < 2.1
    careful = choose(pairs(1.0), 0.05)
    assert 1.3 < careful.spread < 1000 and careful.worse_percent <= 5
    assert careful.rotation_deg[1] < careful.rotation_deg[0]
    assert careful.placed == pytest.approx(0.02 / 0.6745, abs=1e-3)
    assert choose(pairs(1.0), 0.0).worse_percent == 0, "nobody is harmed where little is believed"


def test_support_counts_as_much_as_it_tells() -> None:
    """Fully if its log odds are true and independent of the templates', half if they boast twofold, else not at all.

    If it prefers what looks from near the reference, that is taken back.
    """
    rng = np.random.default_rng(0)

    def pairs(boast: float, from_near: float = 0.0) -> list[Pair]:
        made = []
        for _ in range(3000):
            prior = rng.dirichlet(np.ones(3))
            right = np.arange(3) == rng.choice(3, p=prior)
            # Evidence of unit variance whose mean tells right from wrong by one: its log odds are itself, less a half.
            turned = rng.uniform(0, np.pi, 3)
            support = boast * (rng.normal(size=3) + right) + from_near * np.cos(turned)
            made.append(Pair("", {}, 1.0, Compared(np.log(prior), support, turned, right)))
        return made

    assert fit_support(pairs(1.0)) == pytest.approx((1.0, 0.0), abs=0.1)
    assert fit_support(pairs(2.0)) == pytest.approx((0.5, 0.0), abs=0.1)
    assert fit_support(pairs(1.0, 1.5)) == pytest.approx((1.0, 1.5), abs=0.15)
    for pair in (nothing := pairs(1.0)):
        rng.shuffle(pair.compared.support)
    assert fit_support(nothing)[0] < 0.1
    assert fit_support([]) == (0, 0)


def test_what_was_looked_at_keeps_no_object_in_memory() -> None:
    """Objects that are registered again and again would fill it."""
    estimator = PoseEstimator.from_pretrained(device="cpu")
    K = np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]])
    frame = photograph(procedural_object(2).normalised()[0], np.eye(3), (0.0, 0.0, 5.0), K, lighting=Lighting())
    query = estimator.look(frame)
    seen = []
    for _ in range(3):
        registered = estimator.register_frame(frame)
        assert estimator.refine(query, registered, estimator.match(query, registered)).stage == "offsets"
        seen.append(weakref.ref(registered))
    gc.collect()
    assert [one() is None for one in seen] == [True, True, False], "the last is still in use"
