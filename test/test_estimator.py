"""The whole walk with real networks, and objects on disk. Accuracy has its own tests; here the weights are random."""

import os
import resource
import signal
import subprocess
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph

from nope_ros import InputError, PoseEstimator
from nope_ros.distribution import Mode
from nope_ros.latent import RotatedLatentPredictor
from nope_ros.match import TemplateBank, Turns, free_turns, predict_bank
from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork
from nope_ros.prior import free_rotations
from nope_ros.refine import Refined, moved
from nope_ros.rendering.render import Lighting, render
from nope_ros.rotations import exp, geodesic_distance, look_at
from nope_ros.store import ObjectStore, StoreError, check_object_id
from nope_ros.training.procedural import procedural_object

K = np.array([[400.0, 0, 159.5], [0, 400.0, 119.5], [0, 0, 1]])
MESH = procedural_object(5).normalised()[0]
REFERENCE = look_at(np.array([1.0, 0.4, 0.6]))


def seen(R=REFERENCE, t=(0.0, 0.0, 8.0), intrinsics=K):
    frame = photograph(MESH, R, t, intrinsics)
    return frame.image, frame.mask, intrinsics


def gravity(R=REFERENCE):
    return R @ [0, 0, -1.0]


@pytest.fixture(scope="module")
def estimator():
    torch.manual_seed(0)
    network = RotatedLatentNetwork(RotatedLatentConfig(widths=(32, 32, 32), crop_size=64))
    # Untrained latents are tiny; this temperature makes their likelihood as sharp as a trained one's.
    return PoseEstimator(RotatedLatentPredictor(network, temperature=1e-4), refinement="none")


@pytest.mark.parametrize("prior", ["free", "upright", "standing"])
def test_the_reference_itself_has_not_moved(estimator, prior):
    registered = estimator.register(*seen(), gravity_camera=gravity(), reference_distance=8.0)
    pose = estimator.estimate(*seen(), registered, prior=prior, gravity_camera=gravity())
    assert pose.prior == prior
    assert np.degrees(geodesic_distance(pose.delta_R, np.eye(3))) < 12  # nearest of the grid
    np.testing.assert_allclose(pose.t_camera_object, registered.reference.t_camera_object, atol=1e-6)
    assert pose.similarity > 0.6
    assert pose.metric


def test_template_counts_are_those_of_the_grids(estimator):
    assert estimator.register(*seen()).template_count == 4608
    assert estimator.register(*seen(), gravity_camera=gravity()).template_count == 642


def test_an_object_takes_kilobytes_and_shares_what_rotations_need(estimator):
    first, second = (estimator.register(*seen(), object_id=name) for name in "ab")
    assert first.latent.numel() * first.latent.element_size() < 30_000
    assert first.free_bank.turns is second.free_bank.turns


def test_templates_for_any_roll_are_of_the_reference_under_every_roll(estimator):
    known, unknown = estimator.register(*seen(), gravity_camera=gravity()), estimator.register(*seen())
    assert torch.equal(known.upright_bank.latent.flatten(), known.latent)
    rolled = estimator.predictor.of_any_roll(unknown.latent, unknown.thumbnail, unknown.mask)
    torch.testing.assert_close(unknown.free_bank.latent.flatten(), rolled)
    assert not torch.allclose(rolled, unknown.latent, atol=1e-2 * float(rolled.abs().max()))


def test_matching_without_templates_is_matching_with_them(estimator):
    latent = estimator.register(*seen()).latent
    query = estimator.register(*seen(look_at(np.array([0.5, 0.9, 0.2])))).latent
    rotations = free_rotations()[::7]
    stored = TemplateBank.predict(estimator.predictor, latent, rotations).match(query, 1e-3)
    turned = predict_bank(estimator.predictor, latent, rotations).match(query, 1e-3)
    # Half precision rounds the stored ones.
    shift = stored.log_likelihood - turned.log_likelihood
    assert np.ptp(shift) < 0.03 * np.ptp(turned.log_likelihood)


@given(st.integers(0, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_rolls_of_the_grid_are_a_fourier_series(bandwidth, count, seed):
    numbers = sum((2 * degree + 1) ** 2 for degree in range(bandwidth + 1))
    harmonics = torch.randn(count, numbers, generator=torch.Generator().manual_seed(seed))
    few = free_turns(bandwidth, torch.device("cpu"))
    each = Turns.of(free_rotations(), bandwidth, torch.device("cpu"))
    assert len(few.rows) * 24 == len(each.rows)
    torch.testing.assert_close(few.values(harmonics), each.values(harmonics), rtol=0, atol=1e-4)


def test_batches_bound_memory_and_change_nothing(estimator):
    latent = estimator.register(*seen()).latent
    rotations = free_rotations()[:300]
    one = TemplateBank.predict(estimator.predictor, latent, rotations)
    other = TemplateBank.predict(estimator.predictor, latent, rotations, batch_size=100)
    torch.testing.assert_close(one.templates, other.templates)


def test_distance_follows_apparent_size_and_focal_lengths(estimator):
    registered = estimator.register(*seen(), reference_distance=8.0)
    zoomed = K * [[2.0], [2.0], [1.0]]
    zoomed[:2, 2] = K[:2, 2]
    for intrinsics, t in ((K, (0, 0, 12.0)), (K, (1.5, -0.6, 9.0)), (zoomed, (0.3, 0.2, 16.0))):
        # Turned with its ray, the object shows the same face: its size follows from distance alone.
        ray = np.array(t) / np.linalg.norm(t)
        turn = exp(np.array([-np.arcsin(ray[1]), np.arctan2(ray[0], ray[2]), 0]))
        pose = estimator.estimate(*seen(turn @ REFERENCE, t, intrinsics), registered)
        np.testing.assert_allclose(pose.t_camera_object, t, rtol=0, atol=0.03 * np.linalg.norm(t))


@pytest.mark.parametrize(
    "given, distance",
    [({"reference_distance": 2.5}, 2.5), ({"t_camera_object": np.array([0, 0, 3.0])}, 3.0), ({"depth": True}, 8.0)],
)
def test_scale_is_metric_when_a_length_is_known(estimator, given, distance):
    if "depth" in given:
        view = render(MESH, REFERENCE, np.array([0, 0, 8.0]), K, 320, 240, lighting=Lighting.uniform())
        given = {"depth": view.depth}
    registered = estimator.register(*seen(), **given)
    assert registered.metric
    assert registered.reference.t_camera_object[2] == pytest.approx(distance, rel=0.08)


def test_depth_gives_the_distance_of_every_frame(estimator):
    registered = estimator.register(*seen(), reference_distance=8.0)
    # Seen from where it looks smaller than it is: apparent size misleads, depth does not.
    R, t = look_at(np.array([0.2, 1.0, 0.3])), np.array([0.6, -0.4, 9.0])
    view = render(MESH, R, t, K, 320, 240, lighting=Lighting.uniform())
    depth = view.depth.copy()
    rim = view.mask & ~cv2.erode(view.mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
    depth[rim] += 20.0  # the wall behind, mixed in
    depth[::3] = np.nan
    by_size = estimator.estimate(view.rgb, view.mask, K, registered)
    by_depth = estimator.estimate(view.rgb, view.mask, K, registered, depth=depth)
    error = np.linalg.norm(by_depth.t_camera_object - t) / np.linalg.norm(t)
    assert error < 0.05
    assert by_depth.covariance[2, 2] < by_size.covariance[2, 2]
    nothing = np.full(depth.shape, np.nan)
    without = estimator.estimate(view.rgb, view.mask, K, registered, depth=nothing)
    np.testing.assert_allclose(without.t_camera_object, by_size.t_camera_object)
    # Where the unit is the reference distance, metres mean nothing.
    unscaled = estimator.estimate(view.rgb, view.mask, K, estimator.register(*seen()), depth=depth)
    assert not unscaled.metric and np.linalg.norm(unscaled.t_camera_object) < 3


def test_without_a_length_the_reference_distance_is_the_unit(estimator):
    registered = estimator.register(*seen())
    assert not registered.metric
    assert np.linalg.norm(registered.reference.t_camera_object) == pytest.approx(1)


def test_object_diameter_gives_scale(estimator):
    registered = estimator.register(*seen(), object_diameter=2.0)  # the object's bounding sphere
    assert registered.reference.distance == pytest.approx(8.0, rel=0.25)


def test_millimetres_are_not_taken_for_metres(estimator):
    """Whole numbers, as a depth camera's driver stores them, and floats that nobody divided."""
    image, mask = np.full((240, 320, 3), 90, np.uint8), np.zeros((240, 320), np.uint8)
    mask[80:160, 100:200] = 255
    K = np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])
    for depth, words in (
        (np.full(mask.shape, 677, np.uint16), "depth: dtype is uint16; give metres as floats"),
        (np.full(mask.shape, 677.0, np.float32), "depth: the object would be 677 m away; is it in millimetres"),
    ):
        with pytest.raises(InputError, match=words):
            estimator.register(image, mask, K, depth=depth)
    far = np.where(mask > 0, 0.677, 500.0)  # what is behind the object may be as far as it likes
    assert estimator.register(image, mask, K, depth=far).reference.distance == pytest.approx(0.677, rel=0.2)


def test_a_reference_pose_names_the_object_frame(estimator):
    t = np.array([0.1, -0.2, 8.1])
    registered = estimator.register(*seen(), R_camera_object=REFERENCE, t_camera_object=t)
    pose = estimator.estimate(*seen(), registered)
    np.testing.assert_allclose(pose.R_camera_object, pose.delta_R @ REFERENCE, atol=1e-9)
    np.testing.assert_allclose(registered.reference.t_camera_object, t)
    with pytest.raises(InputError, match="not a rotation"):
        estimator.register(*seen(), R_camera_object=np.eye(3) * 2)
    for wrong in ([0, 0, -1.0], [0, 0, 1.0, 1.0], [0, 1.0], [[0], [0], [1.0]]):
        with pytest.raises(InputError, match="in front of the camera"):
            estimator.register(*seen(), t_camera_object=np.array(wrong))
    with pytest.raises(InputError, match="reference_distance"):
        estimator.register(*seen(), reference_distance=-1.0)


def test_covariance_is_symmetric_positive_and_follows_the_lever(estimator):
    registered = estimator.register(*seen(), R_camera_object=REFERENCE, t_camera_object=np.array([0.5, 0.3, 8.0]))
    pose = estimator.estimate(*seen(look_at(np.array([1, -0.3, 0.4]))), registered)
    np.testing.assert_allclose(pose.covariance, pose.covariance.T)
    assert np.linalg.eigvalsh(pose.covariance).min() > 0
    # Sampling: turning the rotation by ω moves an origin off the centre by ω × offset.
    rng = np.random.default_rng(0)
    small = 1e-3 * rng.normal(size=(20000, 3))
    arm = pose.R_camera_object @ registered.reference.offset_object
    moved = exp(small) @ arm - arm
    measured = moved.T @ small / len(small) / 1e-6
    predicted = pose.covariance[:3, 3:] @ np.linalg.inv(pose.covariance[3:, 3:])
    np.testing.assert_allclose(measured, predicted, atol=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_a_pose_that_is_moved_from_side_to_side_keeps_its_centre_and_a_covariance(estimator, seed):
    """Of a mesh or a walk each side has its own centre: who gives one names its side, who gives none keeps both."""
    rng = np.random.default_rng(seed)
    registered = estimator.register(*seen(), R_camera_object=REFERENCE, t_camera_object=np.array([0.5, 0.3, 8.0]))
    pose = estimator.estimate(*seen(look_at(np.array([1, -0.3, 0.4]))), registered)
    centre, own = pose.centre, pose.centre_covariance
    for _ in range(3):
        side = replace(registered.reference, offset_object=rng.normal(size=3))
        modes = (Mode(exp(0.2 * rng.normal(size=3)) @ pose.delta_R, 0.6),)
        as_it_was = moved(pose, Refined("synthesis", pose.delta_modes, 1e-3 * np.eye(3)), side)
        np.testing.assert_allclose(as_it_was.t_camera_object, pose.t_camera_object, atol=1e-9)
        turned = moved(pose, Refined("synthesis", modes, 1e-3 * np.eye(3)), side)
        np.testing.assert_allclose(turned.centre, centre, atol=1e-9)
        np.testing.assert_allclose(turned.centre_covariance, own, atol=1e-9)
        assert turned.reference is pose.reference
        centre, own = centre + 0.1 * rng.normal(size=3), own * rng.uniform(0.5, 1)
        pose = moved(turned, Refined("offsets", modes, 1e-3 * np.eye(3), centre, own), side)
        np.testing.assert_allclose(pose.centre, centre, atol=1e-9)
        np.testing.assert_allclose(pose.centre_covariance, own, atol=1e-9)
        assert pose.reference is side
        assert np.linalg.eigvalsh(turned.covariance).min() > 0 and np.linalg.eigvalsh(pose.covariance).min() > 0


def test_what_the_caller_does_with_its_arrays_afterwards_changes_nothing(estimator):
    R, t, intrinsics = REFERENCE.copy(), np.array([0.5, 0.3, 8.0]), K.copy()
    registered = estimator.register(*seen()[:2], intrinsics, R_camera_object=R, t_camera_object=t)
    before = estimator.estimate(*seen(), registered)
    R[:], t[:], intrinsics[:] = 0, 9, 7
    after = estimator.estimate(*seen(), registered)
    np.testing.assert_array_equal(after.R_camera_object, before.R_camera_object)
    np.testing.assert_array_equal(after.t_camera_object, before.t_camera_object)


def test_gravity_that_is_no_direction_is_refused(estimator):
    for bad in (np.zeros(3), np.array([np.nan, 0, 1]), np.ones(2)):
        with pytest.raises(InputError, match="gravity_camera"):
            estimator.register(*seen(), gravity_camera=bad)


def test_estimating_before_registering_says_so(estimator):
    with pytest.raises(InputError, match=r"register\(\) first"):
        PoseEstimator(estimator.predictor).estimate(*seen())


def test_threads_get_the_answers_one_gets_alone(estimator):
    registered = estimator.register(*seen(), gravity_camera=gravity())
    views = [look_at(np.array([1, y, 0.5])) for y in np.linspace(-1, 1, 6)]
    images = [seen(R) for R in views]
    alone = [estimator.estimate(*image, registered).R_camera_object for image in images]
    together: list = [None] * len(images)

    def work(index):
        together[index] = estimator.estimate(*images[index], registered).R_camera_object

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(together, alone)


# Objects on disk


def test_an_object_comes_back_as_it_was(estimator, tmp_path):
    registered = estimator.register(*seen(), object_id="cup-1", gravity_camera=gravity(), object_diameter=0.2)
    ObjectStore(tmp_path / "deep" / "store").save(registered)
    report = ObjectStore(tmp_path / "deep" / "store").load_all(estimator.predictor)
    assert not report.problems
    (back,) = report.objects
    assert back.object_id == "cup-1" and back.metric and back.gravity_known
    query = seen(look_at(np.array([1, 0.1, 0.5])))
    for prior in ("free", "upright"):
        before = estimator.estimate(*query, registered, prior=prior)
        after = estimator.estimate(*query, back, prior=prior)
        np.testing.assert_array_equal(before.covariance, after.covariance)
        np.testing.assert_array_equal(before.t_camera_object, after.t_camera_object)


def test_what_a_killed_process_left_half_written_goes_and_what_a_running_one_writes_stays(estimator, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    old, fresh = tmp_path / f".a.object.safetensors.{gone.pid}.partial", tmp_path / ".b.object.safetensors.1.partial"
    new = tmp_path / f".c.object.safetensors.{gone.pid}.partial"
    for path in (old, fresh, new):
        path.write_bytes(b"half")
    for path in (old, fresh):
        os.utime(path, (0, 0))
    ObjectStore(tmp_path).load_all(estimator.predictor)
    assert not old.exists(), "its process is gone"
    assert fresh.exists(), "process 1 runs"
    assert new.exists(), "written a moment ago, by a process of another machine perhaps"


def test_a_damaged_or_foreign_file_is_reported_and_the_others_load(estimator, tmp_path):
    store = ObjectStore(tmp_path)
    for name in ("a", "b", "c"):
        store.save(replace(estimator.register(*seen()), object_id=name))
    path = tmp_path / "b.object.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "d.object.safetensors").write_bytes(b"")
    (tmp_path / ".e.object.safetensors.1.partial").write_bytes(b"half")
    report = store.load_all(estimator.predictor)
    assert [o.object_id for o in report.objects] == ["a", "c"]
    assert (
        len(report.problems) == 2
        and "b.object" in report.problems[0]
        and "register the object again" in report.problems[0]
    )
    other = RotatedLatentPredictor(RotatedLatentNetwork(RotatedLatentConfig(widths=(32, 32, 32), crop_size=64)))
    report = store.load_all(other)
    assert not report.objects and any("other weights" in problem for problem in report.problems)


def test_a_file_that_could_not_be_loaded_is_set_aside_not_replaced(estimator, tmp_path):
    """Nobody saw it among the registered objects, so nobody meant to replace it."""
    other = RotatedLatentPredictor(RotatedLatentNetwork(RotatedLatentConfig(widths=(32, 32, 32), crop_size=64)))
    store = ObjectStore(tmp_path)
    assert store.save(replace(estimator.register(*seen()), predictor=other, object_id="mug")) is None
    aside = store.save(replace(estimator.register(*seen()), object_id="mug"))
    assert aside is not None and aside.parent == tmp_path
    assert [one.object_id for one in store.load_all(estimator.predictor).objects] == ["mug"]
    aside.replace(tmp_path / "mug.object.safetensors")  # as who takes the weights of before does
    assert [one.object_id for one in store.load_all(other).objects] == ["mug"]
    assert store.save(replace(estimator.register(*seen()), predictor=other, object_id="mug")) is None


def test_two_nodes_on_one_folder_spare_each_others_objects(estimator, tmp_path):
    one, other = ObjectStore(tmp_path), ObjectStore(tmp_path)
    near, far = (estimator.register(*seen(), reference_distance=distance, object_id="mug") for distance in (0.5, 0.9))

    def stored():
        return [one.reference.distance for one in ObjectStore(tmp_path).load_all(estimator.predictor).objects]

    one.save(near, overwrite=False)
    with pytest.raises(StoreError, match="another node has written 'mug'"):
        other.save(far, overwrite=False)
    assert stored() == [0.5]
    other.delete("mug")
    assert stored() == [0.5], "not one of its own"
    other.save(far, overwrite=True)
    one.delete("mug")
    assert stored() == [0.9]
    one.load_all(estimator.predictor)
    one.save(near, overwrite=False)
    assert stored() == [0.5], "which it has read"
    one.delete("mug")
    assert stored() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere: a read-only folder cannot be made")
def test_a_read_only_folder_is_named(estimator, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="could not be written"):
        ObjectStore(tmp_path).save(estimator.register(*seen()))


def test_a_failed_write_keeps_the_older_file_and_leaves_no_other(estimator, tmp_path):
    store = ObjectStore(tmp_path)
    registered = estimator.register(*seen())
    store.save(registered)
    before = (tmp_path / "object.object.safetensors").read_bytes()
    # A file system without room answers the same way as a limit on the size of files.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StoreError, match=r"could not be written.*an older object of that name will be back"):
            store.save(estimator.register(*seen(), object_diameter=1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["object.object.safetensors"]
    assert (tmp_path / "object.object.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(estimator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        ObjectStore(tmp_path / "file" / "store")


def test_delete_forgets(estimator, tmp_path):
    store = ObjectStore(tmp_path)
    store.save(replace(estimator.register(*seen()), object_id="gone"))
    store.delete("gone")
    store.delete("gone")
    assert not store.load_all(estimator.predictor).objects


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", "a\\b", "x" * 300, "-rf", "a b", "é", "a\n", "\0"])
def test_unsafe_object_ids_are_refused(bad):
    with pytest.raises(InputError, match="object_id"):
        check_object_id(bad)


@pytest.mark.parametrize("good", ["mug", "Mug_2", "box-3.v1", "7"])
def test_safe_object_ids_pass(good):
    assert check_object_id(good) == good
