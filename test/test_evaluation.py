"""Evaluation judges answers by the truth, and shows methods none of it."""

import argparse
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import trimesh
from rendered import cuboid, joined
from scipy.spatial.transform import Rotation

from nope_ros.crop import virtual_crop
from nope_ros.distribution import RotationDistribution
from nope_ros.estimator import PoseEstimator
from nope_ros.evaluation import evaluate
from nope_ros.evaluation.baselines import (
    BOX_FOR_MASK,
    CHANCE,
    GRID_ONLY,
    NO_MOTION,
    NO_PRIOR,
    NOT_TURNED,
    OURS,
    PAPER_FORM,
    REGRESSION,
    SIFT,
    TEMPLATES_ALONE,
    EstimatorMethod,
    NoMotion,
    SiftEssential,
)
from nope_ros.evaluation.bop import bop_set
from nope_ros.evaluation.identity import IdentityReport
from nope_ros.evaluation.meshes import FIRST_UNSEEN_SEED, mesh_set, procedural_set, random_camera, walked_cameras
from nope_ros.evaluation.metrics import Calibration, PairScore, Scores, calibration, reliability
from nope_ros.evaluation.photos import photo_set
from nope_ros.evaluation.pictures import _confidence_figure
from nope_ros.evaluation.protocol import Answer, Observation, Occluder, draw_pairs
from nope_ros.evaluation.symmetry import NO_SYMMETRY, Symmetry, SymmetryCache, find_symmetry
from nope_ros.frame import Frame, InputError
from nope_ros.latent import ErrorModel, PaperUNetPredictor, RotatedLatentPredictor
from nope_ros.models.paper_unet import PaperUNet, PaperUNetConfig
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.models.rotation_regression import RotationRegression, RotationRegressionConfig
from nope_ros.prior import PRIORS, elevation, hypotheses
from nope_ros.rendering.mesh import UP_AXES, load_mesh, make_mesh
from nope_ros.rendering.render import Lighting, render
from nope_ros.rotations import exp, geodesic_distance, look_at, rotation_grid
from nope_ros.training import calibrate, render_cache
from nope_ros.training.pairs import DataConfig, RenderCache

UP = np.array([0.0, 0.0, 1.0])
K = np.array([[300.0, 0, 79.5], [0, 300.0, 59.5], [0, 0, 1]])
WIDTH, HEIGHT = 160, 120


# --- Objects --------------------------------------------------------------------------------------------------------


def tripod():
    red, green, blue = (200, 20, 20), (20, 200, 20), (20, 20, 200)
    return joined(
        cuboid((1.2, 0.3, 0.3), (0.5, 0, 0), red),
        cuboid((0.3, 0.8, 0.3), (0, 0.4, 0), green),
        cuboid((0.3, 0.3, 1.6), (0, 0, 0.2), blue),
    )


def prism(corners, height=1.5, tip=1.0, colours=None):
    """A prism with a regular polygon as its base, its top scaled by ``tip``; z is its axis."""
    angle = np.arange(corners) * 2 * np.pi / corners
    ring = np.column_stack([np.cos(angle), np.sin(angle), np.zeros(corners)])
    vertices = np.concatenate([ring, ring * tip + [0, 0, height], [[0, 0, 0], [0, 0, height]]])
    i, j = np.arange(corners), np.roll(np.arange(corners), -1)
    bottom, top = np.full(corners, 2 * corners), np.full(corners, 2 * corners + 1)
    sides = [np.stack([i, j, i + corners], 1), np.stack([j, j + corners, i + corners], 1)]
    faces = np.concatenate([*sides, np.stack([bottom, j, i], 1), np.stack([top, i + corners, j + corners], 1)])
    return make_mesh(vertices, faces, colours=np.full((len(vertices), 3), 180, np.uint8))


def textured_box():
    rng = np.random.default_rng(3)
    corners, faces, _ = cuboid((1.2, 1.0, 0.8))
    texture = cv2.resize(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8), (256, 256), interpolation=cv2.INTER_CUBIC)
    vertices, uv = corners[faces].reshape(-1, 3), rng.random((len(faces), 1, 2)) * 0.3
    uv = (uv + np.array([[0, 0], [0.7, 0], [0.7, 0.7]])).reshape(-1, 2)
    return make_mesh(vertices, np.arange(len(vertices)).reshape(-1, 3), uv=uv, texture=texture)


def camera_at(azimuth, height, distance=5.0):
    flat = np.sqrt(1 - height**2)
    R = look_at(np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height]))
    return R, np.array([0.1, -0.05, distance])


# --- Data sets on disk ----------------------------------------------------------------------------------------------


POSES = [camera_at(azimuth, height) for azimuth, height in [(0, 0.5), (0.4, 0.3), (1.0, 0.6), (2.2, 0.5), (3.3, 0.2)]]


def write_photos(folder, names=("tripod", "other"), poses=POSES):
    mesh = tripod().normalised()[0]
    for name in names:
        (folder / name / "images").mkdir(parents=True, exist_ok=True)
        (folder / name / "masks").mkdir(exist_ok=True)
        images = []
        for i, (R, t) in enumerate(poses):
            view = render(mesh, R, t, K, WIDTH, HEIGHT)
            cv2.imwrite(str(folder / name / f"images/{i:04d}.png"), view.rgb[..., ::-1])
            cv2.imwrite(str(folder / name / f"masks/{i:04d}.png"), view.mask * np.uint8(255))
            images.append(
                {
                    "file": f"images/{i:04d}.png",
                    "mask": f"masks/{i:04d}.png",
                    "width": WIDTH,
                    "height": HEIGHT,
                    "K": K.tolist(),
                    "R": R.tolist(),
                    "t": t.tolist(),
                }
            )
        (folder / name / "poses.json").write_text(json.dumps({"object": name, "up": UP.tolist(), "images": images}))
    return folder


def write_bop(folder, grey=False):
    """Two objects in each image of one scene whose frame has z up; the second one leans in one image."""
    mesh = tripod().normalised()[0]
    scene = folder / "test" / "000001"
    (scene / "mask_visib").mkdir(parents=True)
    (scene / ("gray" if grey else "rgb")).mkdir()
    truth, cameras, info = {}, {}, {}
    for image, (R, _) in enumerate(POSES):
        canvas = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        truth[str(image)], info[str(image)] = [], []
        for number, side in enumerate((-0.8, 0.8)):
            lean = exp(np.array([1.2, 0, 0])) if image == 2 and number == 1 else np.eye(3)
            t = np.array([side, 0.1, 6.5])
            view = render(mesh, R @ lean, t, K, WIDTH, HEIGHT)
            canvas[view.mask] = view.rgb[view.mask]
            cv2.imwrite(str(scene / f"mask_visib/{image:06d}_{number:06d}.png"), view.mask * np.uint8(255))
            truth[str(image)].append(
                {
                    "cam_R_m2c": (R @ lean).ravel().tolist(),
                    "cam_t_m2c": (1000 * t).tolist(),
                    "obj_id": 5 + number,
                }
            )
            hidden = image == 4 and number == 0
            info[str(image)].append({"visib_fract": 0.05 if hidden else 1.0, "bbox_visib": [0, 0, 40, 40]})
        path = scene / (f"gray/{image:06d}.tif" if grey else f"rgb/{image:06d}.png")
        cv2.imwrite(str(path), canvas[..., 1] if grey else canvas[..., ::-1])
        cameras[str(image)] = {"cam_K": K.ravel().tolist(), "depth_scale": 1.0, "cam_R_w2c": R.ravel().tolist()}
    for name, content in (("scene_gt", truth), ("scene_camera", cameras), ("scene_gt_info", info)):
        (scene / f"{name}.json").write_text(json.dumps(content))
    (folder / "models").mkdir()
    flip = np.diag([-1.0, -1, 1, 1]).ravel().tolist()
    models = {
        "5": {"diameter": 200, "symmetries_discrete": [flip]},
        "6": {"diameter": 200, "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]},
    }
    (folder / "models/models_info.json").write_text(json.dumps(models))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def predictor():
    import torch

    torch.manual_seed(0)
    config = RotatedLatentConfig(
        crop_size=32, widths=(8, 8, 16), bandwidth=3, channels=6, depths=4, lifted_channels=4, sphere_blocks=1
    )
    return RotatedLatentPredictor(RotatedLatentNetwork(config), name="untrained", temperature=0.05, device="cpu")


@pytest.fixture(scope="module")
def estimator(predictor):
    return PoseEstimator(predictor)


def judged(found, estimator, protocols=PRIORS, *, seed=0, occlusion=0.0, baselines=False):
    """What ``nope-ros evaluate`` reports of a set."""
    methods = evaluate.methods_for(estimator, baselines=baselines, seed=seed)
    about = {"model": estimator.model_name, "refinement": estimator.refinement}
    return evaluate.evaluate_set(found, methods, protocols, seed=seed, occlusion=occlusion, **about)


class Oracle:
    """Answers with the truth turned by some degrees; it is told by the test, not by the protocol."""

    name = OURS

    def __init__(self, evaluation_set, degrees=0.0):
        self.truth = {}
        for evaluated in evaluation_set.objects():
            for view in evaluated.views:
                self.truth[f"{evaluated.name}/{view.name}"] = (view.R_camera_object, view.t_camera_object)
        self.turn = exp(np.array([0.0, np.radians(degrees), 0.0]))

    def register(self, reference, R_camera_object, t_camera_object):
        return R_camera_object

    def estimate(self, registered, query, prior):
        R, t = self.truth[query.key.removesuffix("/query")]
        return [Answer(self.turn @ R @ one.T, t_camera_object=1.1 * t) for one in registered]


# --- Metrics --------------------------------------------------------------------------------------------------------


def random_distribution(rng, rotations):
    centre = Rotation.random(rng=rng).as_matrix()
    angle = geodesic_distance(rotations, centre)
    return RotationDistribution.from_log_likelihood(rotations, -0.5 * (angle / 0.5) ** 2)


def test_an_honest_distribution_is_on_the_diagonal():
    rng = np.random.default_rng(0)
    rotations = rotation_grid(1)
    scores = []
    for _ in range(1500):
        distribution = random_distribution(rng, rotations)
        truth = rotations[rng.choice(len(rotations), p=distribution.probabilities)]
        scores.append(score(calibration=calibration(distribution, truth)))
    masses = np.array([0.1, 0.5, 0.9])
    assert np.abs(reliability(scores, masses) - masses).max() < 0.03
    # The credible set holds whole cells, so it covers its mass and the rest of its last cell.
    assert 50 <= Scores.of(scores).coverage50 < 62
    assert 90 <= Scores.of(scores).coverage90 < 94


def test_truth_is_counted_as_the_nearest_cell_that_the_prior_allows():
    rotations = np.stack([np.eye(3), exp(np.array([0.1, 0, 0])), exp(np.array([1.0, 0, 0]))])
    prior = np.log(np.array([0.5, 1e-300, 0.5]))
    prior[1] = -np.inf
    distribution = RotationDistribution.from_log_likelihood(rotations, np.log([0.8, 1.0, 0.2]), prior)
    found = calibration(distribution, exp(np.array([0.11, 0, 0])))
    assert found.cell == pytest.approx(0.8)
    assert found.nll == pytest.approx(-np.log(0.8 * 2))
    assert found.covered(0.5)
    second = calibration(distribution, exp(np.array([0.9, 0, 0])))
    assert second.level == pytest.approx(0.8)
    assert not second.covered(0.8)
    assert second.covered(0.9)


def test_coverage_is_that_of_the_credible_set():
    rng = np.random.default_rng(1)
    rotations = rotation_grid(1)
    for _ in range(100):
        distribution = random_distribution(rng, rotations)
        cell = int(rng.integers(len(rotations)))
        found = calibration(distribution, rotations[cell])
        for mass in (0.5, 0.9, 0.99):
            assert found.covered(mass) == (cell in distribution.credible_set(mass))


def test_knowing_nothing_is_zero_nats():
    rotations = rotation_grid(1)
    flat = RotationDistribution.from_log_likelihood(rotations, np.zeros(len(rotations)))
    assert calibration(flat, Rotation.random(rng=np.random.default_rng(0)).as_matrix()).nll == pytest.approx(0)


def score(error=10.0, sym=5.0, direction=20.0, name="a", **values):
    return PairScore(OURS, "free", name, "r", "q", ((1.0,),), error, sym, direction, **values)


def test_figures_of_a_few_pairs():
    found = Scores.of([score(error, sym=1.0) for error in (5.0, 20.0, 40.0, 100.0)])
    assert (found.acc15, found.acc30, found.median_deg, found.mean_deg) == (25, 50, 30, 41.25)
    assert (found.acc30_sym, found.median_deg_sym, found.coverage90, found.pairs) == (100, 1, None, 4)
    assert Scores.of([]).acc30 is None
    covered = [score(calibration=Calibration(level, 0.1, -1.0)) for level in (0.0, 0.6, 0.95)]
    assert Scores.of(covered).coverage50 == pytest.approx(100 / 3)
    assert Scores.of(covered).coverage90 == pytest.approx(200 / 3)


def test_subsets_and_object_means():
    scores = [score(5.0, name="a")] * 9 + [score(60.0, direction=120.0, name="b")]
    report = evaluate.MethodReport.of(scores)
    assert report.subsets["all"].acc30 == 90
    assert report.subsets["within_90"].pairs == 9
    assert report.object_mean["all"].acc30 == 50
    assert report.objects["b"]["within_90"].acc30 is None
    assert report.object_mean["within_90"].acc30 == 100


# --- Symmetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_error_about_an_axis_is_the_least_over_all_turns(seed):
    rng = np.random.default_rng(seed)
    R_true, R_estimated = Rotation.random(2, rng=rng).as_matrix()
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    flip = exp(np.pi * np.cross(axis, [1, 0, 0]) / np.linalg.norm(np.cross(axis, [1, 0, 0])))
    turns = exp(np.linspace(0, 2 * np.pi, 3601)[:, None] * axis)
    both = np.concatenate([turns, flip @ turns])
    symmetry = Symmetry(np.stack([np.eye(3), flip]), axis)
    expected = geodesic_distance(R_true @ both, R_estimated).min()
    assert symmetry.error(R_estimated, R_true) == pytest.approx(expected, abs=2e-3)
    assert NO_SYMMETRY.error(R_estimated, R_true) == pytest.approx(geodesic_distance(R_estimated, R_true))


def test_models_info_gives_the_symmetry():
    flip = np.diag([-1.0, -1, 1, 1]).ravel().tolist()
    symmetry = Symmetry.from_bop({"symmetries_discrete": [flip]})
    assert symmetry.error(exp(np.pi * UP), np.eye(3)) == pytest.approx(0, abs=1e-7)
    assert symmetry.error(exp(np.pi / 2 * UP), np.eye(3)) == pytest.approx(np.pi / 2)
    axes = [{"axis": [0, 0, 2], "offset": [0, 0, 0]}]
    assert Symmetry.from_bop({"symmetries_continuous": axes}).error(exp(1.1 * UP), np.eye(3)) < 1e-6
    sphere = Symmetry.from_bop({"symmetries_continuous": [*axes, {"axis": [1, 0, 0], "offset": [0, 0, 0]}]})
    assert sphere.error(exp(np.array([0.3, 0.4, 0.5])), np.eye(3)) == 0
    assert Symmetry.from_bop({}).trivial


TILT = exp(np.array([0.3, -0.4, 0.2]))  # not along the axes that a search tries first


def test_a_cylinder_turns_about_its_axis_and_over():
    symmetry = find_symmetry(prism(48).rotated(TILT))
    assert abs(symmetry.axis @ TILT[:, 2]) > np.cos(np.radians(2))
    assert len(symmetry.rotations) == 2
    assert symmetry.rotations[1] @ symmetry.axis == pytest.approx(-symmetry.axis, abs=0.1)


def test_a_cone_does_not_turn_over():
    symmetry = find_symmetry(prism(48, tip=0.3))
    assert abs(symmetry.axis[2]) > 0.999
    assert len(symmetry.rotations) == 1


@pytest.mark.parametrize(("sides", "count"), [((1.0, 1.6, 2.4), 4), ((1.0, 1.0, 1.8), 8), ((1.0, 1.0, 1.0), 24)])
def test_a_box_has_as_many_as_its_sides_say(sides, count):
    symmetry = find_symmetry(joined(cuboid(sides)).rotated(TILT))
    assert symmetry.axis is None
    assert len(symmetry.rotations) == count
    for turn in symmetry.rotations:
        corners = cuboid(sides)[0] @ TILT.T
        moved = corners @ turn.T
        assert np.linalg.norm(moved[:, None] - corners[None], axis=2).min(axis=1).max() < 0.15


def test_three_sides():
    assert len(find_symmetry(prism(3, tip=0.4)).rotations) == 3


def test_colour_breaks_a_symmetry_of_shape():
    parts = [
        cuboid((1.0, 1.0, 0.5), (0, 0, z), colour) for z, colour in ((-0.25, (230, 40, 40)), (0.25, (40, 40, 230)))
    ]
    symmetry = find_symmetry(joined(*parts))
    assert len(symmetry.rotations) == 4
    assert symmetry.rotations[:, 2, 2] == pytest.approx(1, abs=1e-3)


def test_a_tripod_has_none():
    assert find_symmetry(tripod()).trivial


def test_symmetries_are_kept(tmp_path, monkeypatch):
    cache = SymmetryCache(tmp_path / "folder" / "symmetry.json")
    first = cache.find(prism(48))
    monkeypatch.setattr("nope_ros.evaluation.symmetry.find_symmetry", lambda mesh: pytest.fail("searched again"))
    again = SymmetryCache(cache.path).find(prism(48))
    assert again.axis == pytest.approx(first.axis)
    assert again.rotations == pytest.approx(first.rotations)
    with pytest.raises(pytest.fail.Exception):
        cache.find(prism(12))


# --- Protocols ------------------------------------------------------------------------------------------------------


def test_pairs_are_drawn_by_seed_and_name():
    pairs = draw_pairs(12, 0, "mug", references=5)
    assert len(pairs) == 5 * 11
    assert len({reference for reference, _ in pairs}) == 5
    assert all(reference != query for reference, query in pairs)
    assert pairs == draw_pairs(12, 0, "mug", references=5)
    assert pairs != draw_pairs(12, 1, "mug", references=5)
    assert pairs != draw_pairs(12, 0, "cup", references=5)
    assert set(draw_pairs(12, 0, "mug", references=5, limit=10)) < set(pairs)
    assert len(draw_pairs(3, 0, "mug", references=5)) == 3 * 2


def test_an_occluder_hides_its_share_of_the_box():
    frame = photo_frame()
    x0, y0, x1, y1 = frame.bbox_xyxy
    for seed in range(20):
        hidden = Occluder(0.25, seed)(frame, "mug", "0")
        gone = frame.mask & ~hidden.mask
        assert gone.any()
        assert not hidden.image[gone].any()
        assert (hidden.image[hidden.mask] == frame.image[hidden.mask]).all()
        rows, columns = np.nonzero((hidden.image != frame.image).any(axis=2))
        box = (columns.max() - columns.min() + 1) * (rows.max() - rows.min() + 1)
        assert box <= 0.27 * (x1 - x0) * (y1 - y0)
        assert (Occluder(0.25, seed)(frame, "mug", "0").mask == hidden.mask).all()
    assert Occluder(0.0)(frame, "mug", "0") is frame
    with pytest.raises(InputError, match="25"):
        Occluder(25)


def photo_frame():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[30:90, 40:120] = True
    return Frame.from_arrays(np.full((HEIGHT, WIDTH, 3), 200, np.uint8), mask, K)


@pytest.mark.parametrize("level", [False, True])
def test_random_cameras_see_the_whole_object(level):
    rng = np.random.default_rng(0)
    ball = Rotation.random(400, rng=rng).as_matrix()[:, 0]
    heights, rolls = [], []
    for _ in range(60):
        R, t, K_here = random_camera(rng, level=level)
        pixels = (ball @ R.T + t) @ K_here.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        assert (pixels >= 0).all() and (pixels <= [639, 479]).all()
        direction = -R.T @ t / np.linalg.norm(t)
        heights.append(direction[2])
        rolls.append(np.degrees(np.arctan2(-R[0, 2], -R[1, 2])))
    assert (min(heights) >= 0) == level
    assert max(heights) > 0.8
    assert (np.abs(rolls).max() < 120) == level


def test_a_walk_goes_once_around_the_whole_object():
    ball = Rotation.random(400, rng=np.random.default_rng(0)).as_matrix()[:, 0]
    for seed in range(8):
        cameras = walked_cameras(np.random.default_rng(seed), 36)
        for R, t, K_here in cameras:
            pixels = (ball @ R.T + t) @ K_here.T
            pixels = pixels[:, :2] / pixels[:, 2:]
            assert (pixels >= 0).all() and (pixels <= [639, 479]).all()
            assert abs(np.degrees(np.arctan2(-R[0, 2], -R[1, 2]))) < 20, "held about level"
        directions = np.stack([-R.T @ t / np.linalg.norm(t) for R, t, _ in cameras])
        azimuths = np.unwrap(np.arctan2(directions[:, 1], directions[:, 0]))
        assert np.degrees(np.diff(azimuths)) == pytest.approx(10, abs=8)
        assert np.degrees(azimuths[-1] - azimuths[0]) == pytest.approx(350, abs=10)
        assert (directions[:, 2] > -0.1).all() and np.ptp(directions[:, 2]) > 0.1


@pytest.mark.parametrize("prior", ["upright", "standing"])
def test_truth_is_among_the_rotations_that_a_level_camera_allows(prior):
    """Gravity, roll and elevation mean the same to the test set and to the estimator's prior."""
    rng = np.random.default_rng(4)
    mesh = tripod().normalised()[0]
    for _ in range(10):
        views = []
        for _ in range(2):
            R, t, K_here = random_camera(rng, level=True)
            view = render(mesh, R, t, K_here, 640, 480)
            crop = virtual_crop(Frame.from_arrays(view.rgb, view.mask, K_here), 32, -R @ UP)
            views.append((crop.R_virtual_camera @ R, crop.R_virtual_camera @ -R @ UP))
        (R_reference, gravity_reference), (R_query, gravity_query) = views
        possible = hypotheses(prior, gravity_reference, gravity_query)
        grid, weights = possible.rotations, possible.log_weight
        nearest = np.argmin(geodesic_distance(grid, R_query @ R_reference.T))
        # Viewpoints are 8° apart; the steeper the view, the more of a step in azimuth is also a step in roll.
        steep = elevation(gravity_query) > np.radians(60)
        assert geodesic_distance(grid[nearest], R_query @ R_reference.T) < np.radians(30 if steep else 9)
        # Nothing that the prior all but rules out; at the very horizon the nearest viewpoint may be just below it.
        assert weights[nearest] > -4 or elevation(gravity_query) < np.radians(5)


def test_photographs_are_compared_as_the_files_say(photos):
    found = photo_set(photos, references=2)
    perfect = evaluate.evaluate_set(found, [Oracle(found)], PRIORS)
    assert set(perfect.protocols) == set(PRIORS)
    for report in perfect.protocols.values():
        ours = report[OURS].subsets["all"]
        assert ours.pairs == 2 * 2 * 4
        assert ours.acc15 == 100
        assert ours.mean_deg < 1e-5
        assert ours.translation_relative_median == pytest.approx(0.1)
        assert set(report[OURS].objects) == {"tripod", "other"}
        assert 0 < report[OURS].subsets["within_90"].pairs < ours.pairs
    turned = evaluate.evaluate_set(found, [Oracle(found, 20)], ("free",)).protocols["free"][OURS].subsets["all"]
    assert (turned.acc15, turned.acc30) == (0, 100)
    assert turned.median_deg == pytest.approx(20)


def test_directions_less_than_90_degrees_apart_are_near(photos):
    found = photo_set(photos, references=5, objects=["tripod"])
    report = evaluate.evaluate_set(found, [NoMotion()], ("free",))
    views = {view.name: view for evaluated in found.objects() for view in evaluated.views}
    for one in report.scores:
        a, b = (view.R_camera_object.T @ view.t_camera_object for view in (views[one.reference], views[one.query]))
        expected = np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        assert one.direction_deg == pytest.approx(expected)


@pytest.mark.parametrize("prior", PRIORS)
def test_what_the_file_says_of_the_query_changes_scores_but_no_estimate(tmp_path, photos, estimator, prior):
    """Turning each query about its up axis leaves gravity as it is, and is otherwise for the judge alone to know."""
    options = {"references": 1, "objects": ["tripod"]}
    references = {pair[0] for evaluated in photo_set(photos, **options).objects() for pair in evaluated.pairs}
    content = json.loads((photos / "tripod/poses.json").read_text())
    write_photos(tmp_path, ["tripod"])
    for index, image in enumerate(content["images"]):
        if index not in references:
            image["R"] = (np.array(image["R"]) @ exp(0.7 * UP)).tolist()
            image["t"] = (1.5 * np.array(image["t"])).tolist()
            image["bbox_xywh"] = [1, 2, 3, 4]
    (tmp_path / "tripod/poses.json").write_text(json.dumps(content))
    honest = judged(photo_set(photos, **options), estimator, (prior,))
    lied = judged(photo_set(tmp_path, **options), estimator, (prior,))
    assert [one.delta_R for one in honest.scores] == [one.delta_R for one in lied.scores]
    assert [one.confidence for one in honest.scores] == [one.confidence for one in lied.scores]
    assert all(a.error_deg != b.error_deg for a, b in zip(honest.scores, lied.scores, strict=True))
    assert all(
        a.translation_relative != b.translation_relative for a, b in zip(honest.scores, lied.scores, strict=True)
    )


def test_without_gravity_the_free_protocol_is_blind_to_it(photos, estimator):
    seen = []

    class Spy(EstimatorMethod):
        def register(self, reference, R_camera_object, t_camera_object):
            seen.append(reference)
            return super().register(reference, R_camera_object, t_camera_object)

        def estimate(self, registered, query, prior):
            seen.append(query)
            assert (query.gravity_camera is None) == (prior == "free")
            return super().estimate(registered, query, prior)

    evaluate.evaluate_set(photo_set(photos, references=1, objects=["tripod"]), [Spy(estimator)], PRIORS)
    assert len(seen) == 2 + 4 * 3
    assert all(vars(one).keys() == {"frame", "gravity_camera", "key"} for one in seen)


def test_the_same_seed_gives_the_same_report(photos, estimator):
    reports = [
        judged(photo_set(photos, seed, references=2, pairs=5), estimator, seed=seed, occlusion=0.2, baselines=True)
        for seed in (3, 3, 4)
    ]
    assert reports[0].to_json() == reports[1].to_json()
    assert reports[0].to_json() != reports[2].to_json()
    pooled = evaluate.Report.pooled([reports[0], reports[2]])
    assert pooled.seeds == (3, 4)
    assert pooled.protocols["free"][OURS].subsets["all"].pairs == 2 * 2 * 5


def test_the_report_has_the_figures_promised(photos, estimator, tmp_path):
    report = judged(photo_set(photos, references=2), estimator, baselines=True)
    values = json.loads(report.to_json())
    figures = {"acc15", "acc30", "median_deg", "mean_deg", "coverage50", "coverage90", "nll", "pairs"}
    figures |= {f"{name}_sym" for name in ("acc15", "acc30", "median_deg", "mean_deg")}
    figures |= {"translation_relative_median"}
    for prior in PRIORS:
        assert 0 < values[prior]["all"]["translation_relative_median"] < 1
        assert values[prior]["baselines"][NO_MOTION]["all"]["translation_relative_median"] is None
        for subset in ("all", "within_90"):
            assert figures <= set(values[prior][subset])
            assert figures <= set(values[prior][subset]["object_mean"])
            assert figures <= set(values[prior]["objects"]["tripod"][subset])
        assert set(values[prior]["baselines"]) == {CHANCE, NO_MOTION, SIFT, TEMPLATES_ALONE}
        assert values[prior]["baselines"][NO_MOTION]["all"]["nll"] is None
    assert report.table(objects=True).row_count == 3 * 2 * (5 + 2)
    from nope_ros.evaluation.pictures import write_pictures

    pictures = write_pictures(report, tmp_path / "pictures", photo_set(photos, references=2))
    assert {path.name for path in pictures} >= {"reliability_photos.png", "confidence_photos.png"}
    assert len(pictures) > 2
    assert all(cv2.imread(str(path)).std() > 1 for path in pictures)


def test_confidence_is_drawn_against_the_errors_that_it_is_of():
    """A symmetric object's answer shares its probability with its equals: half as sure, half as often within 30°."""
    scores = {"free": [score(180.0, sym=2.0, confidence=0.9), score(2.0, sym=2.0, confidence=0.9)]}
    left, right = _confidence_figure(scores, "two").axes
    assert left.lines[0].get_ydata() == pytest.approx([50])
    assert right.lines[0].get_ydata() == pytest.approx([100, 50])


def test_bad_photo_folders_are_named(tmp_path, photos):
    with pytest.raises(InputError, match=r"poses\.json"):
        photo_set(tmp_path)
    with pytest.raises(InputError, match="no object cat; it has other, tripod"):
        photo_set(photos, objects=["cat"])
    write_photos(tmp_path, ["tripod"])
    (tmp_path / "tripod/masks/0001.png").unlink()
    report = evaluate.evaluate_set(photo_set(tmp_path, references=1), [NoMotion()], ("free",))
    assert "0001.png" in report.skipped[0]
    for content in ("{}", "[]", '{"up": [0, 1], "images": []}', '{"images": [], "symmetries_discrete": [[1]]}'):
        (tmp_path / "tripod/poses.json").write_text(content)
        with pytest.raises(InputError, match="not as expected"):
            list(photo_set(tmp_path).objects())


# --- BOP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey", [False, True])
def test_bop_layout(tmp_path, grey):
    found = bop_set(write_bop(tmp_path, grey), "test", references=2)
    report = evaluate.evaluate_set(found, [Oracle(found)], PRIORS)
    free = report.protocols["free"][OURS]
    # Object 5 is hidden in one of the five images; object 6 leans in one, and then does not stand on the same face.
    assert {name: one["all"].pairs for name, one in free.objects.items()} == {"000005": 2 * 3, "000006": 2 * 4}
    assert free.subsets["all"].mean_deg < 1e-5
    assert free.subsets["all"].translation_relative_median == pytest.approx(0.1)
    standing = report.protocols["standing"][OURS]
    assert standing.objects["000005"]["all"].pairs == 2 * 3
    assert standing.objects["000006"]["all"].pairs in (3, 6)
    assert standing.subsets["all"].mean_deg < 1e-5
    views = {view.name: view for evaluated in found.objects() for view in evaluated.views}
    frame = views["000001/000002_000000"].read()
    assert frame.image.shape == (HEIGHT, WIDTH, 3)
    assert frame.mask.any()
    gravity = views["000001/000001_000000"].gravity_camera
    assert gravity == pytest.approx(-POSES[1][0] @ UP)
    assert views["000001/000001_000000"].t_camera_object == pytest.approx([-0.8, 0.1, 6.5])
    symmetry = {evaluated.name: evaluated.symmetry for evaluated in found.objects()}
    assert symmetry["000005"].error(exp(np.pi * UP), np.eye(3)) < 1e-6
    assert symmetry["000006"].error(exp(0.5 * UP), np.eye(3)) < 1e-6


def test_bop_without_a_world_frame_is_free_only(tmp_path, estimator):
    folder = write_bop(tmp_path)
    path = folder / "test/000001/scene_camera.json"
    cameras = json.loads(path.read_text())
    path.write_text(json.dumps({key: {"cam_K": value["cam_K"]} for key, value in cameras.items()}))
    report = judged(bop_set(folder, "test", references=1, pairs=3), estimator)
    assert set(report.protocols) == {"free"}
    assert report.protocols["free"][OURS].subsets["all"].pairs == 6
    with pytest.raises(InputError, match="its splits are test"):
        bop_set(folder, "val")
    with pytest.raises(InputError, match="no object 9; its ids are 5, 6"):
        bop_set(folder, "test", objects=["9"])
    with pytest.raises(InputError, match="no object mug; its ids are 5, 6"):
        bop_set(folder, "test", objects=["mug", "5"])
    assert [one.name for one in bop_set(folder, "test", objects=["6", "000005"]).objects()][::2] == ["000006", "000005"]


def write_mesh(path, mesh):
    trimesh = pytest.importorskip("trimesh")
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=mesh.colours, process=False).export(path)


def test_bop_symmetries_are_found_where_none_are_marked(tmp_path):
    folder = write_bop(tmp_path / "set")
    (folder / "models/models_info.json").unlink()
    cup = prism(48, tip=0.3)
    write_mesh(folder / "models/obj_000005.ply", replace(cup, vertices=100 * cup.vertices))  # mm
    found = bop_set(folder, "test", references=1, cache=tmp_path / "symmetry.json")
    symmetry = {evaluated.name: evaluated.symmetry for evaluated in found.objects()}
    assert abs(symmetry["000005"].axis[2]) > 0.999
    assert symmetry["000006"].trivial
    before = evaluate.evaluate_set(found, [NoMotion()], PRIORS)
    assert before.skipped == ()
    (folder / "models/obj_000006.ply").write_text("no mesh")
    report = evaluate.evaluate_set(found, [NoMotion()], PRIORS)
    assert len(report.skipped) == 1
    assert "obj_000006.ply cannot be read as a mesh" in report.skipped[0] and "no symmetry" in report.skipped[0]
    assert report.scores == before.scores
    (folder / "models/models_info.json").write_text('{"5": {"symmetries_discrete": [[1, 2]]}}')
    with pytest.raises(InputError, match=r"models_info\.json is not as expected"):
        bop_set(folder, "test")


def test_which_axis_of_a_bop_world_is_up(tmp_path, capsys):
    folder = write_bop(tmp_path)

    def gravity(world_up):
        found = bop_set(folder, "test", references=1, world_up=world_up)
        views = {view.name: view for evaluated in found.objects() for view in evaluated.views}
        return views["000001/000001_000000"].gravity_camera

    for axis, world_up in enumerate("xyz"):
        assert gravity(world_up) == pytest.approx(-POSES[1][0][:, axis])
    assert gravity("none") is None
    found = bop_set(folder, "test", references=1, world_up="none")
    assert {one.protocol for one in evaluate.evaluate_set(found, [NoMotion()], PRIORS).scores} == {"free"}
    asked = ["bop", str(folder), "--split", "test", "--world-up", "none"]
    assert evaluate._command([*asked, "--protocol", "standing"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--protocol standing: needs gravity" in said
    with pytest.raises(SystemExit):
        evaluate._command(["bop", "--help"])
    assert "arbitrary" in capsys.readouterr().out


# --- Renders --------------------------------------------------------------------------------------------------------


def test_pairs_are_of_the_views_of_a_walk_that_could_be_taken(tmp_path):
    write_mesh(tmp_path / "meshes/needle.ply", joined(cuboid((1.0, 0.005, 0.005))))
    found = mesh_set(tmp_path / "meshes", walked=True, views=36, cache=tmp_path / "symmetry.json")
    for evaluated in found.objects():
        assert 18 <= len(evaluated.views) < 36, "end-on there is nothing to see of it"
        assert max(max(pair) for pair in evaluated.pairs) < len(evaluated.views)


def test_the_light_stays_while_one_walks_around_a_mesh(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=3)
    ball.vertices *= [1.0, 0.9, 0.7]  # fewer turns to try than of a sphere
    ball.visual.vertex_colors = np.full((len(ball.vertices), 4), 200, np.uint8)
    (tmp_path / "meshes").mkdir()
    ball.export(tmp_path / "meshes/ball.ply")
    options = {"walked": True, "views": 12, "cache": tmp_path / "symmetry.json"}
    free, level = mesh_set(tmp_path / "meshes", 1, **options).objects()
    assert (free.protocols, level.protocols) == (("free",), ("upright", "standing"))
    images = [(view.read().image, view.read().mask) for view in level.views]
    assert all((view.read().image == image).all() for view, (image, _) in zip(free.views, images, strict=True))
    brighter = []  # how far to the right of its middle the ball is brighter, in parts of its width
    for image, mask in images:
        columns = np.nonzero(mask)[1]
        brightness = image[mask > 0].astype(float).sum(1)
        brighter.append(((columns * brightness).sum() / brightness.sum() - columns.mean()) / np.ptp(columns))
    assert np.abs(brighter).max() > 0.02
    # From the other side, what was bright on the right is bright on the left.
    assert np.corrcoef(brighter[:6], brighter[6:])[0, 1] < -0.8


def test_meshes_are_rendered_for_each_protocol(tmp_path, estimator):
    write_mesh(tmp_path / "meshes/kind/tripod.ply", tripod())
    options = {"cache": tmp_path / "symmetry.json", "pairs": 6}
    report = judged(mesh_set(tmp_path / "meshes", **options), estimator)
    for prior in PRIORS:
        assert report.protocols[prior][OURS].objects["kind/tripod"]["all"].pairs == 6
    found = mesh_set(tmp_path / "meshes", views=8, cache=tmp_path / "symmetry.json", objects=["tripod"])
    for evaluated in found.objects():
        assert evaluated.symmetry.trivial
        heights = [view.direction[2] for view in evaluated.views]
        assert (min(heights) > 0) == (evaluated.protocols != ("free",))
        first, again = evaluated.views[0].read(), evaluated.views[0].read()
        assert (first.image == again.image).all()
        assert not first.touches_border
    perfect = evaluate.evaluate_set(found, [Oracle(found)], PRIORS)
    assert all(one.error_deg < 1e-5 for one in perfect.scores)
    with pytest.raises(InputError, match="no object cat"):
        mesh_set(tmp_path / "meshes", objects=["cat"])
    with pytest.raises(InputError, match="give a folder of meshes"):
        mesh_set(tmp_path / "nothing")


@pytest.mark.parametrize("up", UP_AXES)
def test_the_axis_that_is_up_can_be_said(tmp_path, up):
    """However a mesh lies in its file, it stands as it should if one says which axis is up."""
    stands = tripod()
    lies = exp({"x": np.array([0, np.pi / 2, 0]), "y": np.array([-np.pi / 2, 0, 0]), "z": np.zeros(3)}[up])
    assert lies @ UP == pytest.approx(np.eye(3)["xyz".index(up)], abs=1e-6)
    path = tmp_path / "meshes/thing.ply"
    write_mesh(path, stands.rotated(lies))
    loaded = load_mesh(path, up=up)
    assert loaded.vertices[:, 2] == pytest.approx(stands.vertices[:, 2], abs=1e-6)
    turn = np.linalg.lstsq(stands.vertices, loaded.vertices, rcond=None)[0]
    assert np.linalg.det(turn) == pytest.approx(1, abs=1e-4), "turned, not mirrored"
    options = {"protocols": ("upright",), "views": 2, "references": 1, "cache": tmp_path / "symmetry.json"}
    seen = [
        next(iter(mesh_set(path.parent, up=said, **options).objects())).views[0].read().image for said in (up, None)
    ]
    assert (seen[0] == seen[1]).all() == (up == "y"), "y is what glTF says"


def test_a_mesh_that_cannot_be_used_ends_no_run(tmp_path):
    folder = tmp_path / "meshes/kind"
    write_mesh(folder / "tripod.ply", tripod())
    write_mesh(folder / "needle.ply", joined(cuboid((2.0, 2e-5, 3e-5))))
    (folder / "broken.glb").write_bytes(b"no mesh")
    (folder / "empty.ply").write_text("ply\nformat ascii 1.0\nelement vertex 0\nend_header\n")
    options = {"views": 3, "references": 1, "cache": tmp_path / "symmetry.json"}
    found = mesh_set(folder.parent, **options)
    report = evaluate.evaluate_set(found, [NoMotion()], PRIORS)
    assert {one.object_name for one in report.scores} == {"kind/tripod"}
    assert {one.protocol for one in report.scores} == set(PRIORS)
    said = json.loads(report.to_json())["skipped"]
    assert [line.split()[0] for line in said] == ["kind/broken", "kind/empty", "kind/needle"]
    assert "broken.glb cannot be read as a mesh" in said[0]
    assert "hardly to be seen" in said[2]
    alone = evaluate.evaluate_set(mesh_set(folder.parent, objects=["tripod"], **options), [NoMotion()], PRIORS)
    assert alone.scores == report.scores


def test_procedural_objects_are_none_that_training_drew(tmp_path):
    found = procedural_set(0, protocols=("upright",), count=2, views=3, references=1, cache=tmp_path / "symmetry.json")
    objects = list(found.objects())
    assert len(objects) == found.count == 2
    assert all(int(one.name.split("/")[1]) >= FIRST_UNSEEN_SEED for one in objects)
    assert all(len(one.pairs) == 2 for one in objects)
    other = procedural_set(1, protocols=("upright",), count=2)
    assert other.source != found.source


# --- Baselines ------------------------------------------------------------------------------------------------------


def test_sift_finds_a_small_turn_of_a_printed_box():
    mesh = textured_box().normalised()[0]
    observations, rotations = [], []
    for azimuth in (0.5, 0.65):
        R, t = camera_at(azimuth, 0.5, distance=4.0)
        view = render(mesh, R, t, K * np.array([[3], [3], [1]]), 480, 360, lighting=Lighting.uniform())
        frame = Frame.from_arrays(view.rgb, view.mask, K * np.array([[3], [3], [1]]))
        observations.append(Observation(frame, None, str(azimuth)))
        rotations.append(R)
    sift = SiftEssential()
    registered = sift.register(observations[0], rotations[0], np.zeros(3))
    answer = sift.estimate([registered], observations[1], "free")[0]
    assert np.degrees(geodesic_distance(answer.delta_R, rotations[1] @ rotations[0].T)) < 4
    blank = replace(photo_frame(), image=np.full((HEIGHT, WIDTH, 3), 128, np.uint8))
    nothing = sift.register(Observation(blank, None, "blank"), np.eye(3), np.zeros(3))
    assert sift.estimate([nothing], observations[1], "free")[0].delta_R == pytest.approx(np.eye(3))


def test_what_an_ablation_leaves_out(photos, estimator):
    found = photo_set(photos, references=1, objects=["tripod"])
    report = evaluate.evaluate_set(found, evaluate.methods_for(estimator, ablations=True), PRIORS)
    for prior in PRIORS:
        parts = {
            name: [one for one in report.scores if one.method == name and one.protocol == prior]
            for name in (OURS, TEMPLATES_ALONE, GRID_ONLY, NOT_TURNED, BOX_FOR_MASK, NO_PRIOR)
        }
        for full, alone, grid, turned, boxed, anything in zip(*parts.values(), strict=True):
            assert full.delta_R != grid.delta_R
            assert full.calibration == grid.calibration
            # A crop is turned by some degrees.
            assert 0.2 < np.degrees(geodesic_distance(full.delta_R, turned.delta_R)) < 10
            assert alone.calibration != boxed.calibration
            assert (alone.delta_R == anything.delta_R) == (prior == "free")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of weights that nobody trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    sizes = RotationRegressionConfig(crop_size=32, widths=(8, 8, 8), compared=16, hidden=16)
    RotationRegression(sizes).save_pretrained(folder / "regression")
    config = PaperUNetConfig(crop_size=16, vae_widths=(8, 8), unet_widths=(32, 32), heads=2, context=16)
    PaperUNetPredictor(PaperUNet(config), device="cpu", batch_size=1024).save_pretrained(folder / "unet")
    return folder


def test_what_trained_baselines_may_answer(photos, trained):
    methods = evaluate.trained_baselines(trained / "regression", trained / "unet", "cpu")
    found = photo_set(photos, references=1, objects=["tripod"], pairs=2)
    report = evaluate.evaluate_set(found, methods, PRIORS)
    views = {view.name: view for view in next(iter(found.objects())).views}
    assert {one.method for one in report.scores} == {REGRESSION, PAPER_FORM}
    for one in report.scores:
        reference, query = views[one.reference], views[one.query]
        delta_R = np.array(one.delta_R)
        assert delta_R @ delta_R.T == pytest.approx(np.eye(3), abs=1e-5)
        if one.protocol == "standing":
            # Gravity turns from the one camera to the other, if the object stands; truth does so too.
            assert delta_R @ reference.gravity_camera == pytest.approx(query.gravity_camera, abs=1e-5)


def test_weights_of_another_kind_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="paper_unet"):
        evaluate.trained_baselines(trained / "unet", None, "cpu")
    with pytest.raises(InputError):
        evaluate.trained_baselines(None, trained / "regression", "cpu")
    with pytest.raises(InputError, match="no usable weights"):
        evaluate.trained_baselines(tmp_path, None, "cpu")


def test_chance_and_no_motion(photos, estimator):
    report = judged(photo_set(photos, references=5, objects=["tripod"]), estimator, baselines=True)
    for prior in PRIORS:
        still = [one for one in report.scores if one.method == NO_MOTION and one.protocol == prior]
        assert all(np.array(one.delta_R) == pytest.approx(np.eye(3)) for one in still)
        drawn = [one for one in report.scores if one.method == CHANCE and one.protocol == prior]
        assert len({one.delta_R for one in drawn}) > 1
        assert 40 < np.mean([one.error_deg for one in drawn]) < 160


# --- Command line ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, photos, predictor, capsys):
    predictor.save_pretrained(tmp_path / "weights")
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    out = tmp_path / "out" / "report.json"
    words = [
        "photos",
        str(photos),
        "--predictor",
        str(tmp_path / "weights"),
        "--protocol",
        "upright",
        "--json",
        str(out),
    ]
    words += ["--pairs", "3", "--objects", "tripod", "--device", "cpu", "--seed", "1", "--seed", "2", "--per-object"]
    words += ["--refinement", "none"]
    assert evaluate.main(parser.parse_args([*words, "--pictures", str(tmp_path / "pictures")])) == 0
    values = json.loads(out.read_text())
    assert values["upright"]["all"]["pairs"] == 6
    assert values["seeds"] == [1, 2]
    assert values["refinement"] == "none" and values["upright"]["baselines"] == {}
    assert "free" not in values
    assert "tripod" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pictures").glob("c*.png")} == {"confidence_photos.png"}
    assert evaluate.main(parser.parse_args([*words, "--pairs", "0"])) == 2
    assert "--pairs: 0 is not positive" in capsys.readouterr().err


def test_what_a_user_gets_wrong_is_said_in_one_line_before_the_work(tmp_path, photos, capsys):
    (tmp_path / "file").write_text("")
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    for words, said in (
        (["photos", photos, "--json", tmp_path], f"--json: {tmp_path} cannot be written"),
        (["photos", photos, "--json", tmp_path / "file/out.json"], "cannot be written"),
        (["identity", photos, "--json", tmp_path / "file/out.json"], "cannot be written"),
        (["photos", photos, "--pictures", tmp_path / "file"], f"--pictures: {tmp_path / 'file'} cannot be written"),
        (["photos", photos, "--references", 0], "--references: 0 is not positive"),
        (["procedural", "--count", 0], "--count: 0 is not positive"),
        (["photos", photos, "--seed", -1], "--seed: -1 is negative"),
        (["photos", photos, "--json", kept], "nowhere"),
        (["photos", photos, "--json", tmp_path / "new/out.json"], "nowhere"),
    ):
        # Weights that are not there: whatever is said before is said before the work.
        assert evaluate._command([*map(str, words), *(["--predictor", str(tmp_path / "nowhere")])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("nope-ros evaluate: ") and said in error
    assert kept.read_text() == "before"
    assert not (tmp_path / "new/out.json").exists()


# --- Telling objects apart ------------------------------------------------------------------------------------------


def test_objects_are_told_apart_as_often_as_in_draws():
    """The closed form against drawing which objects are registered."""
    rng = np.random.default_rng(0)
    own = rng.integers(0, 12, 40)
    similarity = rng.normal(size=(40, 12)) + 1.5 * (own[:, None] == np.arange(12))
    report = IdentityReport("", "", "", tuple("abcdefghijkl"), similarity, own, rng.uniform(0, 180, 40))
    right = []
    for _ in range(400):
        for row, mine in zip(similarity, own, strict=True):
            others = rng.choice(np.delete(np.arange(12), mine), 4, replace=False)
            right.append(row[mine] > row[others].max())
    assert report.told_apart(5) == pytest.approx(100 * np.mean(right), abs=1.5)
    near = report.direction_deg < 90
    assert report.told_apart(12, "within_90") == pytest.approx(100 * np.mean(similarity[near].argmax(1) == own[near]))
    is_own = own[:, None] == np.arange(12)
    assert report.taken(0.4) == pytest.approx(
        (100 * (similarity[is_own] >= 0.4).mean(), 100 * (similarity[~is_own] >= 0.4).mean())
    )


def test_identity_is_of_the_whole_set(photos, tmp_path, predictor, capsys):
    predictor.save_pretrained(tmp_path / "weights")
    asked = ["--queries", "3", "--predictor", str(tmp_path / "weights"), "--json", str(tmp_path / "out.json")]
    assert evaluate._command(["identity", str(photos), *asked]) == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["objects"] == ["other", "tripod"] and values["all"]["queries"] == 6
    assert set(values["all"]["told_apart"]) == {"2"}, "two are registered"
    assert "own the most similar" in capsys.readouterr().out
    assert evaluate._command(["identity", str(photos), "--objects", "tripod", *asked]) == 2
    assert "two are needed" in capsys.readouterr().err


# --- Calibration ----------------------------------------------------------------------------------------------------


def test_the_temperature_of_honest_likelihoods_is_found():
    rng = np.random.default_rng(0)
    evidence = calibrate.Evidence([], [], [])
    for _ in range(800):
        logits = rng.normal(0, 2, 60)
        probability = np.exp(logits) / np.exp(logits).sum()
        evidence.log_likelihood.append((3.0 * logits).astype(np.float32))
        evidence.log_prior.append(np.full(60, -np.log(60), np.float32))
        evidence.truth.append(int(rng.choice(60, p=probability)))
    assert calibrate.fit_temperature([evidence]) == pytest.approx(3.0, rel=0.1)
    assert evidence.nll(3.0) < min(evidence.nll(1.5), evidence.nll(6.0), 0.0)
    assert evidence.nll(1e6) == pytest.approx(0, abs=1e-3)
    assert 0.9 <= evidence.coverage(3.0, 0.9) < 0.97


def test_evidence_is_gathered_from_objects_that_training_left_out(tmp_path, predictor):
    settings = render_cache.Settings(None, procedural=6, views=6, mesh_views=0, size=64, seed=0)
    render_cache.build_cache(tmp_path, settings, workers=1)
    config = DataConfig(cache=str(tmp_path), validation_share=0.7)
    left_out = int(RenderCache(config).held_out.sum())
    assert 1 < left_out < 6
    for prior, allowed in (("free", 4608), ("upright", 341), ("standing", 72)):
        evidence = calibrate.gather_evidence(predictor, config, prior, queries=1)
        assert len(evidence.truth) == left_out
        assert all(len(one) == allowed for one in evidence.log_likelihood)
        assert np.isfinite(evidence.nll(predictor.temperature))
        again = calibrate.gather_evidence(predictor, config, prior, queries=1)
        assert again.truth == evidence.truth
        assert calibrate.fit_spread(evidence.squared(predictor.temperature), 3) > 0
    angle, coverage = calibrate.fit_independence(predictor, config, predictor.temperature, 1.0, candidates=(30.0, 90.0))
    assert 30 <= angle <= 90 and len(coverage) == 2


def test_the_spread_of_gaussian_errors_is_found():
    rng = np.random.default_rng(0)
    for freedom in (1, 2, 3):
        squared = 1.7 * (rng.normal(size=(20000, freedom)) ** 2).sum(axis=1)
        assert calibrate.fit_spread(squared, freedom) == pytest.approx(1.7, rel=0.05)


def test_what_was_fitted_is_written_beside_the_weights(tmp_path, predictor):
    predictor.save_pretrained(tmp_path)
    errors = ErrorModel(spread={"free": 0.9, "upright": 1.1, "standing": 1.2}, independent_deg=50)
    calibrate.write_calibration(tmp_path, 0.25, errors, {"seed": 0})
    again = RotatedLatentPredictor.from_pretrained(tmp_path, device="cpu")
    assert again.temperature == 0.25
    assert again.errors == errors
    assert again.training["calibration"] == {"seed": 0}
    assert again.identity == predictor.identity
