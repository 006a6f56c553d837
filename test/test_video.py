"""Walks: which frames are used, where the object frame comes from, and what keyframes add. Weights are the shipped."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph
from scipy.spatial.transform import Rotation

from nope_ros import InputError
from nope_ros.averaging import average_rotations
from nope_ros.cli import main
from nope_ros.commands.register import Trajectory, read_trajectory
from nope_ros.crop import virtual_crop
from nope_ros.evaluation.protocol import EvaluationObject, EvaluationSet, View
from nope_ros.evaluation.walk import evaluate_walks
from nope_ros.frame import Frame
from nope_ros.harmonics import rotate, wigner_d
from nope_ros.match import TemplateBank, Turns, ViewsBank, predict_bank, view_weights
from nope_ros.pose import distance_from_depth
from nope_ros.prior import free_rotations
from nope_ros.rendering.mesh import make_mesh
from nope_ros.rendering.render import Lighting, render
from nope_ros.rotations import exp, geodesic_distance, icosphere, look_at
from nope_ros.store import ObjectStore
from nope_ros.training.procedural import procedural_object
from nope_ros.video import Walk, _spread_over_time, _without_outliers, farthest, left_out, meeting_point

K = np.array([[400.0, 0, 159.5], [0, 400.0, 119.5], [0, 0, 1]])
MESH = procedural_object(11).normalised()[0]
CENTRE = np.array([0.3, -0.2, 0.5])  # of the object in the fixed frame
ROUND = [np.array([np.cos(a), np.sin(a), 0.6]) for a in np.arange(10) * 2 * np.pi / 10]


def camera(direction, distance=6.0, roll=0.0):
    """Pose of the fixed frame in a camera that looks at the object."""
    R = exp(np.array([0, 0, roll])) @ look_at(direction)
    return R, np.array([0, 0, distance]) - R @ CENTRE


def frame_at(pose, shift=(0.0, 0.0)):
    R, t = pose
    intrinsics = K + np.array([[0, 0, shift[0]], [0, 0, shift[1]], [0, 0, 0.0]])
    return photograph(MESH, R, t + R @ CENTRE, intrinsics)


@pytest.fixture(scope="module")
def frames():
    return [frame_at(camera(direction)) for direction in ROUND]


@pytest.fixture(scope="module")
def registered(estimator, frames):
    down = [camera(direction)[0] @ [0, 0, -1.0] for direction in ROUND]
    poses = [camera(direction) for direction in ROUND]
    return estimator.register_views(frames, poses=poses, gravity_camera=down, object_id="walked")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_rays_meet_where_they_were_aimed_and_a_stray_one_is_told(seed):
    rng = np.random.default_rng(seed)
    point = rng.normal(size=3)
    directions = rng.normal(size=(9, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centres = point - directions * rng.uniform(1, 5, (9, 1))
    centres[0] += 3 * np.cross(directions[0], rng.normal(size=3))
    found, distances = meeting_point(centres, directions)
    np.testing.assert_allclose(found, point, atol=1e-3)
    assert distances.argmax() == 0


def test_keyframes_are_spread_and_skip_what_shows_nothing_new():
    directions = np.concatenate([icosphere(1)[:1], icosphere(1)[:1], icosphere(1)])
    chosen = farthest(directions, 12)
    apart = np.arccos(np.clip(directions[chosen] @ directions[chosen].T, -1, 1)) + 9 * np.eye(len(chosen))
    assert np.degrees(apart.min()) > 30
    assert len(farthest(directions[:2], 12)) == 1
    blurred_first = farthest(directions, 12, np.arange(len(directions), dtype=float))
    assert blurred_first[0] == 0  # the reference stays the first frame


def test_the_frame_of_a_walk_is_where_the_rays_meet_with_z_up_and_the_first_camera_ahead(registered):
    keyframes = registered.keyframes
    assert keyframes.provenance.poses == "given"
    assert keyframes.provenance.up == "gravity"
    assert keyframes.provenance.scale == "poses"
    assert registered.metric
    np.testing.assert_allclose(keyframes.t_fixed_object, CENTRE, atol=0.15)  # of an object of radius 1
    np.testing.assert_allclose(keyframes.R_fixed_object[:, 2], [0, 0, 1], atol=1e-6)
    towards = keyframes.directions[0]
    assert abs(np.degrees(np.arctan2(towards[1], towards[0]))) < 0.1
    assert keyframes.names[0] == "frame 0"
    assert registered.reference.distance == pytest.approx(6.0, abs=0.2)
    assert 0.5 < registered.reference.radius < 1.1


def test_matches_with_the_nearest_keyframe_make_rotations_finer(estimator, registered):
    before, after = [], []
    for angle in np.arange(0.2, 6.2, 0.6):
        R, t = camera(np.array([np.cos(angle), np.sin(angle), 0.9]))
        query = estimator.look(frame_at((R, t)), R @ [0, 0, -1.0])
        alone = estimator.match(query, registered, "upright")
        found = estimator.refine(query, registered, alone)
        assert found.stage == "offsets" and found.matched is not None
        for one, errors in ((alone, before), (found, after)):
            errors.append(geodesic_distance(one.R_camera_object, R @ registered.keyframes.R_fixed_object))
    assert np.median(after) < 0.85 * np.median(before), (before, after)


@pytest.mark.parametrize("prior", ["free", "upright", "standing"])
def test_an_unseen_view_is_found_in_the_frame_of_the_walk(estimator, registered, prior):
    errors = []
    for angle in (0.3, 2.2, 4.1):
        pose = camera(np.array([np.cos(angle), np.sin(angle), 0.75]))
        seen = frame_at(pose)
        down = pose[0] @ [0, 0, -1.0]
        (found,) = estimator.estimate_frame(seen, [registered], prior=prior, gravity_camera=down)
        R_true = pose[0] @ registered.keyframes.R_fixed_object
        errors.append(np.degrees(geodesic_distance(found.R_camera_object, R_true)))
        t_true = pose[1] + pose[0] @ registered.keyframes.t_fixed_object
        assert np.linalg.norm(found.t_camera_object - t_true) < 0.2 * 6
    assert np.median(errors) < 25


def test_a_walk_whose_first_frame_came_without_gravity_is_level_all_the_same(estimator):
    """An IMU that starts late, and a camera held on its side."""
    poses = [camera(direction, roll=1.5) for direction in ROUND]
    down = [None, *(R @ [0, 0, -1.0] for R, _ in poses[1:])]
    walked = estimator.register_views(
        [frame_at(pose) for pose in poses], poses=poses, gravity_camera=down, object_id="walked"
    )
    assert walked.gravity_known
    assert abs(walked.gravity_virtual[0]) < 0.02 and walked.gravity_virtual[1] > 0.5
    errors = []
    for angle in (0.3, 2.2, 4.1):
        pose = camera(np.array([np.cos(angle), np.sin(angle), 0.75]), roll=1.5)
        level = pose[0] @ [0, 0, -1.0]
        (found,) = estimator.estimate_frame(frame_at(pose), [walked], prior="upright", gravity_camera=level)
        R_true = pose[0] @ walked.keyframes.R_fixed_object
        errors.append(np.degrees(geodesic_distance(found.R_camera_object, R_true)))
    assert np.median(errors) < 25


def test_each_side_has_a_size_and_a_centre_of_its_own(estimator, registered, frames):
    keyframes = registered.keyframes
    for index, name in enumerate(keyframes.names):
        R, t = camera(ROUND[int(name.removeprefix("frame "))])
        query = estimator.look(frames[int(name.removeprefix("frame "))], R @ [0, 0, -1.0])
        crop, at = query.crop, registered.reference_at(R @ camera(ROUND[0])[0].T, query)
        np.testing.assert_array_equal(at.offset_object, keyframes.offset_object[index])
        centre = at.distance * at.angular_radius / crop.angular_radius * crop.R_virtual_camera[2]
        origin = centre + keyframes.R_camera_object[index] @ at.offset_object
        np.testing.assert_allclose(origin, t + R @ keyframes.t_fixed_object, atol=1e-6)
    # Files of before have one side only.
    old = replace(registered, keyframes=replace(keyframes, distance=None))
    assert old.sides is None
    assert old.reference_at(registered.reference.R_camera_object, query) is old.reference


def test_each_bad_frame_is_refused_with_its_reason(frames):
    walk = Walk(96)
    for index, frame in enumerate(frames):
        walk.add(str(index), frame, pose=camera(ROUND[index]))
    assert not walk.refused
    assert "border" in walk.add("cut", frame_at(camera(ROUND[1]), shift=(150.0, 0.0))).reason
    split = frames[2].mask.copy()
    x0, _, x1, _ = frames[2].bbox_xyxy
    split[:, (x0 + x1) // 2 - 8 : (x0 + x1) // 2 + 8] = False
    assert "pieces" in walk.add("split", Frame(frames[2].image, split, frames[2].camera)).reason


def test_blur_and_wrong_masks_are_told_by_the_frames_next_to_them(estimator, frames):
    walk = Walk(estimator.predictor.crop_size)
    textured = []
    rng = np.random.default_rng(0)
    for frame in frames:
        noise = cv2.GaussianBlur(rng.normal(0, 60, frame.image.shape).astype(np.float32), (0, 0), 1.2)
        textured.append(replace(frame, image=np.clip(frame.image + noise, 0, 255).astype(np.uint8)))
    for index, frame in enumerate(textured):
        image, mask = frame.image, frame.mask
        if index == 4:
            image = cv2.GaussianBlur(image, (0, 0), 4.0)
        if index == 7:
            x0, y0, x1, y1 = frame.bbox_xyxy
            mask = mask.copy()
            mask[:, x0 + (x1 - x0) // 4 :] = False
            mask[: y0 + (y1 - y0) // 3] = False
        try:
            walk.add(str(index), Frame(image, mask, frame.camera), pose=camera(ROUND[index]))
        except InputError as error:
            walk.refuse(str(index), str(error))
    registered = estimator.register_walk(walk)
    assert registered.keyframes.provenance.refused >= 2
    assert not {"4", "7"} & set(registered.keyframes.names)


def test_sides_may_differ_where_no_frame_is_known_to_be_next_to_another(frames):
    walk = Walk(96)
    for index, frame in enumerate(frames):
        walk.add(str(index), frame)
    plain = [replace(view, sharpness=0.4 if index % 3 == 0 else 1.0) for index, view in enumerate(walk.views)]
    views = [replace(view, crop=replace(view.crop, angular_radius=0.1 * 2 ** (n % 2))) for n, view in enumerate(plain)]
    views[5] = replace(views[5], sharpness=0.1)
    told = {ordered: _without_outliers(views, given=False, ordered=ordered)[1] for ordered in (False, True)}
    assert [one.name for one in told[False]] == ["5"] and "of the detail of the other frames" in told[False][0].reason
    assert len(told[True]) > 3, "in a walk, that is what blurred frames and wrong masks look like"


def test_a_view_too_thin_to_tell_is_not_taken_for_the_sharpest(frames):
    walk = Walk(96)
    walk.add("0", frames[0])
    views = [replace(walk.views[0], name=str(index), sharpness=0.5 + 0.01 * index) for index in range(9)]
    views[3] = replace(views[3], sharpness=np.inf)
    assert [view.name for view in _spread_over_time(views, 3)] == ["0", "5", "8"]


def test_too_few_frames_say_why(estimator, frames):
    walk = Walk(96)
    for _ in range(5):
        walk.add("cut", frame_at(camera(ROUND[1]), shift=(150.0, 0.0)))
    walk.add("good", frames[0])
    with pytest.raises(InputError, match=r"1 of 6 frames can be used.*border"):
        estimator.register_walk(walk)


def test_a_walk_that_did_not_go_round_is_refused(estimator, frames):
    poses = [camera(ROUND[0] + np.radians(0.8 * index) * np.array([0.0, 0.0, 1.0])) for index in range(6)]
    with pytest.raises(InputError, match=r"6 frames look from 1 direction only .*go round"):
        estimator.register_views([frame_at(pose) for pose in poses], poses=poses)
    with pytest.raises(InputError, match=r"6 frames look from 1 direction only .*go round"):
        estimator.register_views(frames[:1] * 6)
    for few in (-3, 0, 2):
        with pytest.raises(InputError, match=f"keyframes: {few} are too few"):
            estimator.register_views(frames, poses=[camera(one) for one in ROUND], keyframes=few)


def test_poses_that_look_elsewhere_are_refused(estimator, frames):
    poses = [camera(direction) for direction in ROUND]
    inverted = [(R.T, -R.T @ t) for R, t in poses]
    with pytest.raises(InputError, match="poses"):
        estimator.register_views(frames, poses=inverted)
    with pytest.raises(InputError, match="at one place"):
        estimator.register_views(frames, poses=[(R, np.zeros(3)) for R, _ in poses])
    with pytest.raises(InputError, match="poses: 3 given for 10 frames"):
        estimator.register_views(frames, poses=poses[:3])


def test_without_gravity_the_way_round_is_the_turntables_axis(estimator, frames):
    registered = estimator.register_views(frames, poses=[camera(direction) for direction in ROUND])
    assert registered.keyframes.provenance.up == "turntable"
    assert registered.gravity_known
    np.testing.assert_allclose(registered.keyframes.R_fixed_object[:, 2], [0, 0, 1], atol=0.05)


def test_a_way_over_the_top_is_no_turntable(estimator):
    angles = np.radians(np.linspace(-110, 110, 12))
    held = [camera([1.0, 0, 0])[0] @ exp(np.array([0, angle, 0])) for angle in angles]
    poses = [(R, np.array([0, 0, 6.0]) - R @ CENTRE) for R in held]
    registered = estimator.register_views([frame_at(pose) for pose in poses], poses=poses)
    assert registered.keyframes.provenance.up == "image"
    assert registered.keyframes.R_fixed_object[2, 2] > 0.95


def exact_latents(count, seed, noise=0.0):
    """Latents that turn as the predictor says they do, and the rotations."""
    rng = np.random.default_rng(seed)
    R = np.stack([exp(rng.normal(size=3) * 2) for _ in range(count)])
    base = torch.from_numpy(rng.normal(size=(1, 81, 8))).float()
    turned = rotate(base.expand(count, -1, -1), wigner_d(torch.from_numpy(R).float(), 8))
    return turned + noise * torch.from_numpy(rng.normal(size=turned.shape)).float(), R


def test_rotations_are_averaged_over_the_graph_and_strangers_are_found():
    latents, R = exact_latents(9, 1, noise=0.7)
    latents[3] = torch.randn(81, 8, generator=torch.Generator().manual_seed(0))
    found = average_rotations(latents, [None] * 9, temperature=10.0)
    good = [index for index in range(9) if index != 3]
    offsets = np.swapaxes(found.rotations[good], 1, 2) @ R[good]
    spread = np.degrees(geodesic_distance(offsets, offsets[0]))
    assert spread.max() < 5
    assert found.agreeing[3] < 0.5 < found.agreeing[good].min()
    assert found.outliers >= 2
    assert found.residual_deg < 10  # of edges on a grid of 15°


def test_the_order_of_a_walk_tells_half_turns_apart():
    """A thing that looks the same after half a turn, walked round by steps of 30°: pairs alone leave two answers."""
    rng = np.random.default_rng(5)
    base = torch.from_numpy(rng.normal(size=(1, 81, 8))).float()
    half = torch.from_numpy(exp(np.array([[0, 0, np.pi]]))).float()
    base = base + rotate(base, wigner_d(half, 8))
    start = look_at(np.array([1.0, 0, 0.6]))
    R = np.stack([start @ exp(np.array([0, 0, angle])) for angle in np.radians(30.0 * np.arange(12))])
    latents = rotate(base.expand(12, -1, -1), wigner_d(torch.from_numpy(R).float(), 8))
    latents = latents + 0.5 * torch.from_numpy(rng.normal(size=latents.shape)).float()
    for gravity in ([None] * 12, list(-R[:, :, 2])):
        found = average_rotations(latents, gravity, temperature=40.0, ordered=True)
        offsets = np.swapaxes(found.rotations, 1, 2) @ R
        assert np.degrees(geodesic_distance(offsets, offsets[0])).max() < 10
        assert found.agreeing.min() >= 0.25


@pytest.mark.parametrize("level", [False, True])
def test_a_walk_closes_though_every_step_looks_smaller_than_it_was(level):
    """What stays with the camera, as its light does, pulls views near each other together; those farther apart know."""
    rng = np.random.default_rng(1)
    thing, light = torch.from_numpy(rng.normal(size=(2, 1, 81, 8))).float()
    start = look_at(np.array([1.0, 0, 0.6]))
    R = np.stack([start @ exp(np.array([0, 0, angle])) for angle in np.radians(15.0 * np.arange(24))])
    latents = rotate(thing.expand(24, -1, -1), wigner_d(torch.from_numpy(R).float(), 8)) + 0.8 * light
    latents = latents + 0.5 * torch.from_numpy(rng.normal(size=latents.shape)).float()
    gravity = list(-R[:, :, 2]) if level else [None] * 24
    found = average_rotations(latents, gravity, temperature=40.0, ordered=True)
    errors = geodesic_distance(
        found.rotations[:, None] @ np.swapaxes(found.rotations, 1, 2), R[:, None] @ np.swapaxes(R, 1, 2)
    )
    assert np.degrees(errors).max() < 6  # 10 to 14 by those near each other alone


def test_views_agree_on_the_rotation_that_all_of_them_show(estimator):
    predictor = estimator.predictor
    rng = np.random.default_rng(3)
    base = torch.from_numpy(rng.normal(size=(1, *predictor.latent_shape))).float()
    R = np.stack([exp(rng.normal(size=3)) for _ in range(5)])
    latents = rotate(base.expand(5, -1, -1), wigner_d(torch.from_numpy(R).float(), 8)).flatten(1)
    views = R @ R[0].T
    bank = predict_bank(predictor, latents, free_rotations(), views=views)
    assert isinstance(bank, ViewsBank)
    target = free_rotations()[1234]
    query = rotate(latents[:1].reshape(1, *predictor.latent_shape), wigner_d(torch.tensor(target[None]).float(), 8))
    match = bank.match(query.flatten(), predictor.temperature)
    assert int(match.log_likelihood.argmax()) == 1234
    assert match.similarity == pytest.approx(1.0, abs=1e-4)
    # Where templates are stored, each comes from the view nearest to it.
    some = free_rotations()[::97]
    stored = TemplateBank.predict_nearest(predictor, latents, some, views)
    alone = TemplateBank.predict(predictor, latents[0], some)
    torch.testing.assert_close(stored.templates.float(), alone.templates.float(), atol=0.1, rtol=0.05)


def test_weights_follow_the_viewing_direction_only():
    views = np.stack([np.eye(3), exp(np.array([0, 1.2, 0]))])
    rolled = exp(np.array([0, 0, 2.0])) @ views
    weights = view_weights(rolled, views)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert weights[0, 0] > 0.99
    assert weights[1, 1] > 0.99


def test_a_walk_survives_a_restart(tmp_path, estimator, registered, frames):
    store = ObjectStore(tmp_path)
    store.save(registered)
    (loaded,) = store.load_all(estimator.predictor).objects
    assert loaded.keyframes.names == registered.keyframes.names
    assert loaded.keyframes.provenance == registered.keyframes.provenance
    np.testing.assert_array_equal(loaded.sides.distance, registered.sides.distance)
    np.testing.assert_array_equal(loaded.sides.offset_object, registered.sides.offset_object)
    for one, other in zip(
        *(estimator.estimate_frame(frames[3], [each], prior="free") for each in (loaded, registered)), strict=True
    ):
        np.testing.assert_allclose(one.distribution.probabilities, other.distribution.probabilities, atol=1e-6)


def test_evaluation_keeps_keyframes_and_queries_apart(estimator, tmp_path):
    def view(index, direction):
        R, t = camera(direction)
        return View(str(index), R, t + R @ CENTRE, None, lambda: frame_at((R, t)))

    views = tuple(view(index, direction) for index, direction in enumerate(ROUND))
    found = EvaluationSet("photos", "here", 1, lambda: iter([EvaluationObject("one", views, (), ("free",))]))
    report = evaluate_walks(found, estimator, ("free",), keyframes=5, pictures=tmp_path / "pictures")
    drawn = cv2.imread(str(tmp_path / "pictures" / "walk_one_free.png"))
    assert drawn.shape == (480, 1080, 3), "photographs, and two answers"
    assert drawn[:240, :240].std() > 20 and (drawn[:240, :240] != drawn[240:, :240]).mean() > 0.1
    assert (drawn[60:260, 240:660] != drawn[60:260, 660:]).mean() > 0.02
    values = json.loads(report.to_json())
    assert values["single"]["pairs"] == values["video"]["pairs"] == 5
    assert {score.query for score in report.scores}.isdisjoint({score.reference for score in report.scores})
    assert values["video"]["acc30"] >= values["single"]["acc30"]
    noisy = evaluate_walks(found, estimator, ("free",), keyframes=5, pose_noise_deg=5.0)
    assert noisy.to_dict()["pose_noise_deg"] == 5.0
    for method in ("single", "video"):
        assert 0 < values[method]["translation_relative_median"] < 0.2, "the walk's origin, against the true one"
    estimated = evaluate_walks(found, estimator, ("free",), keyframes=5, poses="estimated")
    assert estimated.to_dict()["video"]["translation_relative_median"] is None, "its origin is known by nobody"
    ordered = evaluate_walks(found, estimator, ("free",), keyframes=5, ordered=True)
    walked = {score.reference for score in ordered.scores if score.method == "single"}
    asked = {score.query for score in ordered.scores}
    assert asked in ({str(index) for index in range(start, len(ROUND), 2)} for start in (0, 1)), "every other view"
    assert not walked & asked


# --- the command ----------------------------------------------------------------------------------------------------


def write_walk(folder, frames, poses):
    """A video of the walk, masks, a calibration and a trajectory, as four programs would have left them."""
    size = (frames[0].camera.width, frames[0].camera.height)
    # Lossless, so that masks stay masks.
    video = cv2.VideoWriter(str(folder / "walk.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10.0, size)
    (folder / "masks").mkdir()
    lines = ["# stamp tx ty tz qx qy qz qw"]
    for index, (frame, (R, t)) in enumerate(zip(frames, poses, strict=True)):
        video.write(np.ascontiguousarray(frame.image[..., ::-1]))
        cv2.imwrite(str(folder / "masks" / f"{index:04d}.png"), frame.mask.astype(np.uint8) * 255)
        values = [index / 10, *(-R.T @ t), *Rotation.from_matrix(R.T).as_quat()]
        lines.append(" ".join(f"{value:.9f}" for value in values))
    video.release()
    (folder / "poses.txt").write_text("\n".join(lines))
    calibration = {"image_width": size[0], "image_height": size[1], "camera_matrix": {"data": K.ravel().tolist()}}
    (folder / "camera.yaml").write_text(json.dumps(calibration))


def test_a_video_with_a_trajectory_is_registered_by_the_command(tmp_path, estimator, frames, capsys):
    write_walk(tmp_path, frames, [camera(direction) for direction in ROUND])
    words = ["--video", tmp_path / "walk.avi", "--masks", tmp_path / "masks", "--camera", tmp_path / "camera.yaml"]
    words += ["--poses", tmp_path / "poses.txt", "--z-up", "--store", tmp_path / "store", "--device", "cpu"]
    assert main(["register", "--id", "walked", *map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "up from gravity; lengths: metres, by the poses" in said
    (loaded,) = ObjectStore(tmp_path / "store").load_all(estimator.predictor).objects
    np.testing.assert_allclose(loaded.keyframes.t_fixed_object, CENTRE, atol=0.15)


@pytest.mark.parametrize("line", ["1 2 3", "0 0 0 0 0 0 0 0", "a b c d e f g h"])
def test_a_trajectory_that_is_none_names_its_line(tmp_path, line):
    path = tmp_path / "poses.txt"
    path.write_text(f"# a comment\n0 0 0 0 0 0 0 1\n{line}\n")
    with pytest.raises(InputError, match="line 3"):
        read_trajectory(path)


def test_a_trajectory_is_interpolated_but_not_beyond_its_ends():
    turn = exp(np.array([0, 0, 1.0]))
    trajectory = Trajectory(np.array([1.0, 1.1]), np.stack([np.eye(3), turn]), np.array([[0, 0, 0], [1.0, 0, 0]]))
    R, t = trajectory.at(1.05)
    np.testing.assert_allclose(R.T, exp(np.array([0, 0, 0.5])), atol=1e-9)
    np.testing.assert_allclose(-R.T @ t, [0.5, 0, 0], atol=1e-9)
    assert trajectory.at(0.9) is None
    assert trajectory.at(1.2) is None


def test_what_a_video_lacks_is_asked_for(tmp_path, capsys):
    assert main(["register", "mug", "--video", "walk.mp4", "--store", str(tmp_path)]) == 2
    assert "--masks" in capsys.readouterr().err


def test_views_that_know_a_side_are_not_outvoted_by_those_that_never_saw_it():
    """Two views of opposite sides that look the same: normalised, the one that saw nothing votes as loud."""
    here, there = np.eye(3), exp(np.array([0, np.pi, 0]))
    rotations = np.stack([here, there])
    latents = torch.zeros(2, 81, 5)
    bank = ViewsBank(rotations, latents, Turns(torch.zeros(2, 969)), torch.eye(2), rotations)
    # The first says: as I saw it, surely. The second: the other way round, and little else; but it is not sure at all.
    products = torch.tensor([[9.0, -1.0], [1.0, 1.0]])
    assert bank.fused(products, 0.0).argmax() == 0
    gap = [float(bank.fused(products, one).diff()) for one in (0.0, 0.5, 1.0)]
    assert gap[0] < gap[1] < gap[2], "the more is taken off, the louder who knows little"


def test_keyframes_choose_how_they_are_compared_by_finding_each_other(estimator, registered, frames, tmp_path):
    keyframes = registered.keyframes
    assert keyframes.normalised in (0.0, 0.5, 1.0)
    found = left_out(estimator.predictor, keyframes.latents, keyframes.R_virtual_object)
    assert (found.spread, found.normalised, found.agreement) == (
        keyframes.spread,
        keyframes.normalised,
        keyframes.provenance.agreement,
    )
    changed = replace(registered, keyframes=replace(keyframes, normalised=0.5), object_id="changed")
    store = ObjectStore(tmp_path)
    store.save(changed)
    loaded = store.load_all(estimator.predictor).objects[0]
    assert loaded.keyframes.normalised == 0.5
    np.testing.assert_array_equal(loaded.keyframes.crops, keyframes.crops)
    query = estimator.look(frames[4])
    again = [one.free_bank.match(query.latent, 1.0).log_likelihood for one in (changed, loaded)]
    np.testing.assert_allclose(again[0], again[1], rtol=1e-5)


def test_depth_tells_how_large_each_side_is_without_camera_poses(estimator):
    """A bar seen from its end is not as far away as its outline would have it, were it as large as from its side."""
    trimesh = pytest.importorskip("trimesh")
    bar = trimesh.creation.box((2.4, 0.5, 0.4))
    knob = trimesh.creation.box((0.4, 0.5, 0.5))
    knob.apply_translation((1.0, 0, 0.4))
    both = trimesh.util.concatenate([bar, knob])
    mesh = make_mesh(both.vertices, both.faces)
    frames, gravity = [], []
    for angle in np.radians(np.arange(0, 180, 15)):
        R = look_at(np.array([np.cos(angle), np.sin(angle), 0.35]))
        view = render(mesh, R, np.array([0, 0, 7.0]), K, 320, 240, lighting=Lighting.uniform())
        depth = np.where(view.mask, view.depth, 0).astype(np.float32)
        frames.append(Frame.from_arrays(view.rgb, view.mask, K, depth))
        gravity.append(R @ [0, 0, -1.0])
    for first in (0, 6):  # from the end, from the side
        order = [*range(first, 12), *range(first)]
        registered = estimator.register_views([frames[i] for i in order], gravity_camera=[gravity[i] for i in order])
        assert registered.keyframes.provenance.scale == "depth"
        own = distance_from_depth(frames[first], virtual_crop(frames[first], 96, gravity[first]))
        assert registered.reference.distance == pytest.approx(own, rel=0.02)
        np.testing.assert_allclose(registered.sides.distance, 7.0, rtol=0.2)


def test_how_large_other_sides_are_is_a_guess_without_positions_and_depth(estimator, registered):
    R, t = camera(np.array([-1.0, 0.02, 0.6]))  # next to a keyframe, and behind what the first view sees
    query = estimator.look(frame_at((R, t)), R @ [0, 0, -1.0])
    keyframes = registered.keyframes
    provenance = replace(keyframes.provenance, poses="estimated", scale="reference_distance")
    guessed = replace(registered, keyframes=replace(keyframes, provenance=provenance))
    sure, unsure = (estimator.match(query, one, "standing").centre_covariance for one in (registered, guessed))
    assert np.trace(unsure) > 4 * np.trace(sure)
