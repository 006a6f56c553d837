"""The filter over time: what it inherits, what it leaves again, and how sure it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from nope_ros import PoseEstimator
from nope_ros.distribution import RotationDistribution
from nope_ros.harmonics import degree_slices, wigner_d
from nope_ros.latent import RotatedLatentPredictor
from nope_ros.match import TemplateBank
from nope_ros.models.rotated_latent import (
    RotatedLatentConfig,
    RotatedLatentNetwork,
    bandwidth_of,
    blur_harmonics,
    flatten_d,
    turn_harmonics,
)
from nope_ros.pose import Measured
from nope_ros.prior import PRIORS, free_rotations, standing_rotations, upright_rotations
from nope_ros.refine import Refined, moved
from nope_ros.rotations import exp, geodesic_distance, log, look_at
from nope_ros.synthesis import SynthesisRefiner
from nope_ros.tracking import Tracker, _Camera, _Grid, _multiplied

K = np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]])
REFERENCE = look_at(np.array([1.0, 0.0, 0.6]))
# Together a peak of about 8°, as sharp as real ones.
HEIGHT, WIDTH = 8.0, np.radians(20)


def frame():
    from nope_ros import Frame

    image = np.full((240, 320, 3), 90, np.uint8)
    mask = np.zeros((240, 320), bool)
    mask[80:160, 120:200] = True
    return Frame.from_arrays(image, mask, K)


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    network = RotatedLatentNetwork(RotatedLatentConfig(widths=(32, 32, 32), crop_size=64))
    return PoseEstimator(RotatedLatentPredictor(network, device="cpu"))


@pytest.fixture(scope="module")
def registered(estimator):
    """An object whose latent says of a query's what the query's says: each harmonic in a channel of its own."""
    thing = estimator.register_frame(frame(), object_id="thing", gravity_camera=REFERENCE @ [0, 0, -1.0])
    latent = torch.zeros(estimator.predictor.latent_shape)
    for part in degree_slices(8):
        latent[part, : part.stop - part.start] = torch.eye(part.stop - part.start)
    thing = replace(thing, latent=latent.flatten())
    thing.__dict__["free_bank"] = thing.bank(free_rotations())  # not of the crop under other rolls
    return thing


@pytest.fixture(scope="module")
def on_grid(registered):
    """The same object, as if its templates were stored: the tracker is not told harmonics."""
    thing = replace(registered)
    bank = TemplateBank.predict(thing.predictor, thing.latent, upright_rotations(thing.gravity_virtual))
    thing.__dict__["upright_bank"] = bank
    assert thing.harmonics(None, "upright") is None
    return thing


def peaks(rotations, heights, width):
    """Harmonics of a sum of bumps of these heights, nats, at rotations (K, 3, 3)."""
    degrees = np.arange(9)
    weight = (2 * degrees + 1) * np.exp(-degrees * (degrees + 1) * width**2 / 2)
    weight /= weight @ (2 * degrees + 1)
    blocks = wigner_d(torch.tensor(rotations, dtype=torch.float64), 8)
    heights = torch.tensor(heights, dtype=torch.float64)
    return [w * torch.einsum("k,kmn->mn", heights, block) for w, block in zip(weight, blocks, strict=True)]


class Scene:
    """An object on a table, a camera that walks around it, and latents that say what a test says.

    The crop of the frame looks along the optical axis, so that virtual and real camera are nearly one.
    """

    def __init__(self, estimator, registered, prior="standing"):
        self.estimator, self.registered, self.prior = estimator, registered, prior
        self.tracker = Tracker()
        self.time = 0.0
        look = estimator.look(frame())
        self.turn = look.crop.R_virtual_camera
        self.look = look

    def see(self, azimuth, heights, elevation=0.5, seconds=0.1, known=True, object_yaw=0.0):
        """One frame from an azimuth; ``heights``: {yaw error in degrees: log-likelihood of that peak}."""
        direction = np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        R_camera_fixed = look_at(direction)
        spin = exp(np.array([0, 0, object_yaw]))
        truth = R_camera_fixed @ spin @ REFERENCE.T
        down = R_camera_fixed @ [0, 0, -1.0]
        turns = exp(np.radians([[0, 0, error] for error in heights]))
        seen = self.turn @ R_camera_fixed @ spin @ turns @ REFERENCE.T @ self.registered.R_virtual_camera.T
        latent = torch.zeros(self.estimator.predictor.latent_shape)
        found = peaks(seen, [HEIGHT + height for height in heights.values()], WIDTH)
        for part, block in zip(degree_slices(8), found, strict=True):
            latent[part, : len(block)] = block * self.registered.temperature
        query = replace(
            self.look, latent=latent.flatten(), gravity_virtual=None if self.prior == "free" else self.turn @ down
        )
        alone = self.estimator.match(query, self.registered, self.prior)
        self.query, self.truth = query, truth
        self.time += seconds
        pose = self.tracker.update(query, self.registered, alone, self.time, R_camera_fixed.T if known else None)
        return pose, np.degrees(geodesic_distance(pose.delta_R, truth))


def value(harmonics, rotations):
    D = flatten_d(wigner_d(torch.from_numpy(rotations), bandwidth_of(len(harmonics))))
    return (D @ harmonics).numpy()


@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_harmonics_are_turned_exactly(seed, bandwidth):
    rng = np.random.default_rng(seed)
    count = sum((2 * degree + 1) ** 2 for degree in range(bandwidth + 1))
    assert bandwidth_of(count) == bandwidth
    harmonics = torch.from_numpy(rng.normal(size=count))
    turn, *places = Rotation.random(6, rng=rng).as_matrix()
    np.testing.assert_allclose(
        value(turn_harmonics(harmonics, torch.from_numpy(turn)), turn @ places), value(harmonics, np.array(places))
    )


def test_blurred_harmonics_are_the_mean_over_a_random_walk():
    rng = np.random.default_rng(0)
    harmonics = torch.from_numpy(rng.normal(size=84))
    place = Rotation.random(rng=rng).as_matrix()
    angle = 0.2
    steps = exp(rng.normal(0, angle / 2, (4, 40000, 3)))  # four steps of half the size
    walked = steps[0] @ steps[1] @ steps[2] @ steps[3] @ place
    mean = value(harmonics, walked)
    error = mean.std() / np.sqrt(len(mean))
    blurred = value(blur_harmonics(harmonics, angle), place[None])[0]
    assert abs(mean.mean() - blurred) < 5 * error
    assert abs(value(harmonics, place[None])[0] - blurred) > 10 * error


@pytest.mark.parametrize("prior", PRIORS)
def test_an_ambiguous_view_inherits_what_an_earlier_one_told(estimator, registered, prior):
    scene = Scene(estimator, registered, prior)
    for azimuth in np.arange(0, 1.2, 0.15):
        pose, _ = scene.see(azimuth, {0: 0.0})
    errors = []
    for azimuth in np.arange(1.2, 3.0, 0.15):  # now the false one is the likelier one
        pose, error = scene.see(azimuth, {0: 0.0, 180: 0.3})
        errors.append(error)
    assert max(errors) < 20
    assert pose.stage == "tracking" and pose.prior == prior
    alone, error = Scene(estimator, registered, prior).see(3.0, {0: 0.0, 180: 0.3})
    assert error > 150 and alone.stage == "template"


@pytest.mark.parametrize("prior", ["upright", "standing"])
def test_a_likelihood_without_harmonics_is_followed_on_its_grid(estimator, on_grid, prior):
    scene = Scene(estimator, on_grid, prior)
    for azimuth in np.arange(0, 1.2, 0.15):
        scene.see(azimuth, {0: 0.0})
    errors = [scene.see(azimuth, {0: 0.0, 180: 0.3})[1] for azimuth in np.arange(1.2, 2.4, 0.15)]
    assert max(errors) < 20


@pytest.mark.parametrize("prior", PRIORS)
def test_a_known_motion_costs_no_sharpness(estimator, registered, prior):
    scene = Scene(estimator, registered, prior)
    first, _ = scene.see(0.0, {0: 0.0})
    for azimuth in np.arange(0.1, 1, 0.1):
        last, error = scene.see(azimuth, {0: 0.0})
    assert error < 1
    assert last.covariance[3:, 3:].trace() < first.covariance[3:, 3:].trace()


@pytest.mark.parametrize("known", [True, False])
def test_symmetric_objects_do_not_flip(estimator, registered, known):
    scene = Scene(estimator, registered)
    rng = np.random.default_rng(0)
    alone, tracked = [], []
    for azimuth in np.arange(0, 3.0, 0.05):
        first, second = rng.normal(0, 0.5, 2)
        _, error = scene.see(azimuth, {0: first, 180: second}, known=known)
        tracked.append(error > 90)
        alone.append(second > first)
    flips = lambda sides: int(np.sum(np.diff(np.array(sides, int)) != 0))  # noqa: E731
    assert flips(alone) > 10
    assert flips(tracked) == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_wrong_start_is_left_again(estimator, registered, known):
    scene = Scene(estimator, registered)
    for azimuth in np.arange(0, 0.5, 0.1):
        _, error = scene.see(azimuth, {120: 0.0}, known=known)
    assert error > 100
    errors = [scene.see(azimuth, {0: 0.0}, known=known)[1] for azimuth in np.arange(0.5, 3.0, 0.1)]
    assert errors[-1] < 10
    # And when the object is turned by hand before a camera that stands still.
    for _ in range(100):
        _, error = scene.see(3.0, {0: 0.0}, known=known, object_yaw=1.5)
    assert error < 10


def test_standing_still_makes_it_no_surer(estimator, registered):
    scene = Scene(estimator, registered)
    first, _ = scene.see(1.0, {0: 0.0, 180: -0.4})
    for _ in range(100):
        last, _ = scene.see(1.0, {0: 0.0, 180: -0.4})
    assert abs(last.confidence - first.confidence) < 0.1
    walked = Scene(estimator, registered)
    for azimuth in np.linspace(1, 3, 40):
        last, _ = walked.see(azimuth, {0: 0.0, 180: -0.4})
    assert last.confidence > first.confidence + 0.05


def test_a_first_look_at_the_front_outweighs_a_long_one_at_the_back(estimator, registered, monkeypatch):
    def after():
        scene = Scene(estimator, registered)
        for azimuth in np.linspace(4.5, 2.0, 30):
            scene.see(azimuth, {30.0: 0.0})
        for azimuth in np.linspace(1.0, 0.4, 7):
            _, error = scene.see(azimuth, {0.0: 0.0})
        return error

    weighed = after()
    monkeypatch.setattr("nope_ros.tracking._NEWS_OF_FRONT", 1.0)
    assert weighed < 0.8 * after()


def test_a_sure_look_at_the_front_needs_no_memory(estimator, registered):
    def after(azimuth):
        scene = Scene(estimator, registered)
        for before in np.linspace(azimuth + 2.5, azimuth, 30):
            scene.see(before, {30.0: 0.0, 120.0: 0.0, 210.0: 0.0})
        return scene.see(azimuth, {0.0: 0.0})[1]

    assert after(0.05) < 2.0
    assert after(2.5) > 10.0, "elsewhere one frame does not outweigh thirty"


def test_noise_is_averaged_and_the_spread_says_so(estimator, registered):
    rng = np.random.default_rng(1)
    errors, alone, squared = [], [], []
    for _ in range(30):
        scene = Scene(estimator, registered)
        noise = rng.normal(0, 8, 12)
        for azimuth, off in zip(np.arange(12) * 0.35, noise, strict=True):  # 20° steps
            pose, error = scene.see(azimuth, {off: 0.0})
        errors.append(error)
        alone.append(abs(noise[-1]))
        squared.append(np.radians(error) ** 2 / (pose.covariance[3:, 3:].trace()))
    assert np.median(errors) < 0.7 * np.median(alone)
    assert np.mean(squared) < 1.3


def matched(pose, measured):
    """A pose as a refiner hands it on that keeps its rotation and measures another."""
    found = Refined("offsets", pose.delta_modes, pose.covariance[3:, 3:], matched=measured)
    return moved(pose, found, pose.reference)


def test_what_is_matched_adds_up_and_the_spread_says_so(estimator, registered):
    """Templates that err by 6° whatever the view, and matches of 4° each."""
    rng = np.random.default_rng(2)
    errors, alone, squared, before = [], [], [], []
    for _ in range(20):
        scene = Scene(estimator, registered, "free")
        wrong = float(rng.choice([-6.0, 6.0]))
        for azimuth in np.arange(1.0, 2.2, 0.1):  # on both sides of the reference
            pose, _ = scene.see(azimuth - 1.6, {wrong: 0.0})
            noise = rng.normal(0, np.radians(4.0), 3)
            one = matched(pose, Measured(exp(noise) @ scene.truth, np.eye(3) * np.radians(4.0) ** 2))
            known = scene.tracker.refined(scene.query, registered, one)
        off = log(scene.truth @ known.delta_R.T)
        errors.append(np.degrees(np.linalg.norm(off)))
        alone.append(np.degrees(np.linalg.norm(noise)))
        before.append(np.degrees(geodesic_distance(pose.delta_R, scene.truth)))
        squared.append(off @ np.linalg.solve(known.covariance[3:, 3:], off) / 3)
        assert known.stage == "offsets" and geodesic_distance(known.delta_R, known.mode_rotations[0]) < 1e-6
        np.testing.assert_allclose(known.centre, one.centre, atol=1e-9)
    assert np.median(errors) < 0.8 * min(np.median(alone), np.median(before))
    assert np.mean(squared) < 1.5


def test_matches_are_added_only_where_they_are_of_one_thing(estimator, registered):
    scene = Scene(estimator, registered, "free")

    def step(azimuth, off=0.0, known=True):
        pose, _ = scene.see(azimuth, {off: 0.0}, known=known)
        measured = Measured(exp([0.0, np.radians(8.0), 0.0]) @ scene.truth, np.eye(3) * np.radians(2.0) ** 2)
        one = matched(pose, measured)
        return one, scene.tracker.refined(scene.query, registered, one)

    one, same = step(0.0)
    assert same is one, "of the first frame a refiner has said all"
    one, other = step(0.1)
    assert 0.01 < geodesic_distance(other.delta_R, one.delta_R) < np.radians(8.5)
    one, same = step(0.2, known=False)
    assert same is one, "how the camera moved is not known"
    step(0.3)
    unmatched, _ = scene.see(0.4, {0: 0.0})
    assert scene.tracker.refined(scene.query, registered, unmatched) is unmatched
    one, other = step(0.5)
    assert other is not one, "a frame in which nothing was matched loses nothing"
    scene.registered = replace(registered)
    one, same = step(0.7)
    assert same is one, "registered again, it is another object"


def test_it_starts_anew_when_it_must(estimator, registered):
    def surprised(change):
        scene = Scene(estimator, registered)
        for azimuth in np.arange(0, 1.0, 0.1):
            scene.see(azimuth, {0: 0.0})
        return change(scene)[0].stage == "template"

    assert not surprised(lambda scene: scene.see(1.0, {0: 0.0}, seconds=2.0))
    assert surprised(lambda scene: scene.see(1.0, {0: 0.0}, seconds=8.0))
    assert surprised(lambda scene: scene.see(1.0, {0: 0.0}, seconds=-0.5))

    def registered_again(scene):
        scene.registered = replace(scene.registered)
        return scene.see(1.0, {0: 0.0})

    def reset(scene):
        scene.tracker.reset()
        return scene.see(1.0, {0: 0.0})

    def other_prior(scene):
        scene.prior = "free"
        return scene.see(1.0, {0: 0.0})

    assert surprised(registered_again) and surprised(reset) and surprised(other_prior)


def test_without_stamps_frames_are_even_steps(estimator, registered):
    scene = Scene(estimator, registered)
    query = scene.look
    alone = estimator.match(query, registered, "free")
    tracker = Tracker()
    assert tracker.update(query, registered, alone).stage == "template"
    assert tracker.update(query, registered, alone).stage == "tracking"


def test_looking_straight_down_a_still_object_does_not_turn():
    """Where azimuth and roll are one, gravity that jitters by a fifth of a degree turns the grid by any angle."""
    rng = np.random.default_rng(1)
    down = np.array([0.003, 0.0, 1.0])
    gravity = np.array([0.0, 0.5, 0.85]) / np.linalg.norm([0.5, 0.85])
    truth = standing_rotations(gravity, down / np.linalg.norm(down))[10]
    camera, belief = _Camera(np.eye(3), np.eye(3)), None
    for _ in range(20):
        seen = down + 0.0035 * rng.normal(size=3)
        grid = standing_rotations(gravity, seen / np.linalg.norm(seen))
        off = geodesic_distance(grid, truth)
        alone = RotationDistribution.from_log_likelihood(grid, -0.5 * (off / np.radians(10)) ** 2, spacing=0.14)
        now = _Grid(alone.rotations, alone.probabilities, camera)
        if belief is None:
            belief = now
            continue
        belief, fused = _multiplied(belief, now, 0.1, 1.0, alone)
        assert np.degrees(geodesic_distance(fused.mode.R, truth)) < 6


def test_a_tracked_pose_is_not_climbed_from_in_one_frame(estimator, registered):
    """Also where matches have had a part in it since: synthesis sees this frame alone."""
    scene = Scene(estimator, registered)
    assert not scene.see(0.0, {0: 0.0})[0].tracked
    tracked, _ = scene.see(0.1, {0: 0.0})
    assert tracked.tracked
    later = moved(tracked, Refined("offsets", tracked.delta_modes, 1e-3 * np.eye(3)), tracked.reference)
    assert SynthesisRefiner().refine(scene.query, registered, later) is None
    assert SynthesisRefiner().refine(scene.query, registered, replace(later, tracked=False)) is not None
