"""Frames are checked, and crops are true views of a camera turned to the object."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import photograph

from nope_ros.crop import FILL, outline, virtual_camera, virtual_crop
from nope_ros.frame import Camera, Frame, InputError
from nope_ros.pose import ReferencePose, outline_sigma, projective_distance
from nope_ros.rendering.render import Lighting, render
from nope_ros.rotations import exp, geodesic_distance, look_at
from nope_ros.training.procedural import procedural_object

K = np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]])
MESH = procedural_object(5).normalised()[0]
LIGHT = Lighting.uniform()


def frame_at(R, t, intrinsics=K, size=(640, 480)):
    return photograph(MESH, R, t, intrinsics, size)


@pytest.mark.parametrize("t", [(0, 0, 7.0), (2.6, 0, 7.0), (-2.0, 1.8, 8.0), (2.8, -2.0, 7.5)])
def test_a_crop_is_what_the_virtual_camera_would_render(t):
    R = look_at(np.array([1.0, 0.4, 0.5]))
    crop = virtual_crop(frame_at(R, t), 96)
    turn = crop.R_virtual_camera
    direct = render(MESH, turn @ R, turn @ np.asarray(t, dtype=float), crop.K_virtual, 96, 96, lighting=LIGHT)
    both = (crop.mask > 127) & direct.mask
    either = (crop.mask > 127) | direct.mask
    assert both.sum() / either.sum() > 0.95
    assert np.abs(crop.image[both].astype(int) - direct.rgb[both]).mean() < 8


def test_moving_the_object_across_the_image_changes_the_egocentric_rotation_only():
    """The object shows the same face all along; cutting a box would be wrong by the angle it moved."""
    seen = look_at(np.array([1.0, 0.4, 0.5]))  # as the virtual camera shall see it
    centred = virtual_crop(frame_at(seen, (0, 0, 7.0)), 96)
    axis_angle = np.radians(22)
    turn = exp(np.array([0.0, axis_angle, 0.0]))  # the object's ray is turned by 22°, and the object with it
    moved = virtual_crop(frame_at(turn @ seen, turn @ [0, 0, 7.0]), 96)
    assert np.abs(moved.image.astype(int) - centred.image).mean() < 6
    # Both crops show the same virtual rotation, so the egocentric one is the turn itself.
    delta_R = moved.R_virtual_camera.T @ centred.R_virtual_camera
    assert np.degrees(geodesic_distance(delta_R, turn)) < 0.7


@settings(max_examples=15, deadline=None)
@given(st.floats(-np.pi, np.pi), st.floats(-0.3, 0.3), st.floats(-0.2, 0.2))
def test_gravity_removes_roll(roll, x, y):
    level = look_at(np.array([1.0, 0.4, 0.5]))
    R = exp(np.array([0, 0, roll])) @ level
    gravity = R @ [0, 0, -1.0]
    crop = virtual_crop(
        frame_at(R, (x * 7, y * 7, 7.0), size=(320, 240), intrinsics=K * [[0.5], [0.5], [1]]), 64, gravity
    )
    down = crop.R_virtual_camera @ gravity
    assert crop.roll_known
    assert abs(down[0]) < 1e-9 and down[1] > 0


def test_looking_along_gravity_leaves_roll_unknown():
    crop = virtual_crop(frame_at(np.eye(3), (0, 0, 7.0)), 64, np.array([0, 0, 1.0]))
    assert not crop.roll_known


@settings(max_examples=20, deadline=None)
@given(st.floats(4, 20), st.floats(-0.2, 0.2), st.floats(-0.15, 0.15), st.floats(0, 6))
def test_the_object_fills_the_crop_wherever_it_is(distance, x, y, roll):
    frame = frame_at(exp(np.array([0, 0, roll])), (x * distance, y * distance, distance))
    crop = virtual_crop(frame, 96)
    v, u = np.nonzero(crop.mask > 127)
    _, radius = cv2.minEnclosingCircle(np.column_stack([u, v]).astype(np.float32))
    within = 1 + 2 * FILL * 48 * distance / K[0, 0]  # two pixels of the image, and one of the crop
    # Nothing smaller holds the object, and the circle about the crop's middle does. (Where the smallest circle lies
    # is a matter of a pixel here or there for an object that touches it in two points.)
    assert radius == pytest.approx(FILL * 48, abs=within)
    assert np.hypot(u - 47.5, v - 47.5).max() < FILL * 48 + within
    assert (crop.image[crop.mask == 0] == 0).all()


def test_a_speck_of_mask_far_away_does_not_move_the_crop():
    frame = frame_at(np.eye(3), (0, 0, 7.0))
    mask = frame.mask.copy()
    mask[5:8, 5:8] = True
    noisy = virtual_crop(Frame.from_arrays(frame.image, mask, K), 96)
    clean = virtual_crop(frame, 96)
    np.testing.assert_allclose(noisy.K_virtual, clean.K_virtual)
    np.testing.assert_allclose(noisy.R_virtual_camera, clean.R_virtual_camera)


@pytest.mark.parametrize("k1", [-0.2, 0.2])
def test_an_object_cut_by_the_sensor_is_known_to_be_whatever_the_lens(k1):
    """A pincushion lens's sensor, undistorted, ends inside the image."""
    camera = Camera(K, 640, 480, (k1, 0.0, 0.0, 0.0), "plumb_bob")
    image = np.zeros((480, 640, 3), np.uint8)
    for left, cut in ((0, True), (250, False)):
        mask = np.zeros((480, 640), np.uint8)
        mask[180:300, left : left + 120] = 1
        assert Frame.from_arrays(image, mask, camera).touches_border is cut


@settings(max_examples=30, deadline=None)
@given(st.floats(6, 120), st.floats(0, 1), st.floats(0, 1), st.sampled_from([-1, 0, 1]))
def test_an_outline_misleads_by_its_pixels(radius, x, y, grown):
    """A pixel more or less around a small object is a large part of it, and the distance's spread says so."""
    v, u = np.mgrid[:480, :640]
    disc = np.hypot(u - 320 - x, v - 240 - y) <= radius + grown
    frame = Frame.from_arrays(np.zeros((480, 640, 3), np.uint8), disc, K)
    crop = virtual_crop(frame, 96)
    relative = abs(crop.angular_radius * K[0, 0] / radius - 1)
    sigma = outline_sigma(ReferencePose.from_crop(crop, frame), crop, 0.0)
    assert relative < 2 * sigma
    assert sigma > 1.2 / (radius + 2)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.35, 1.0), st.floats(0.35, 1.0), st.floats(0, np.pi))
def test_a_distance_is_the_less_sure_the_more_the_outline_changed_its_form(extent, seen, angle):
    """An ellipse that turns its long side away: its circle shrinks as if it were farther, and fills up."""
    v, u = np.mgrid[:480, :640]
    along = (u - 320) * np.cos(angle) + (v - 240) * np.sin(angle)
    across = (v - 240) * np.cos(angle) - (u - 320) * np.sin(angle)

    def look(length):
        frame = Frame.from_arrays(
            np.zeros((480, 640, 3), np.uint8), np.hypot(along / 100 / length, across / 30) <= 1, K
        )
        return frame, virtual_crop(frame, 96)

    frame, crop = look(extent)
    reference, query = ReferencePose.from_crop(crop, frame), look(seen)[1]
    assert query.filled == pytest.approx(0.3 / seen, rel=0.08)
    error = abs(projective_distance(reference, query) - 1)
    assert error < 2.5 * outline_sigma(reference, query, 1.0) / min(seen, extent)
    assert outline_sigma(reference, query, 1.0) >= outline_sigma(reference, look(extent)[1], 1.0)


@pytest.mark.parametrize(
    "model, coefficients",
    [
        ("plumb_bob", (-0.3, 0.1, 0.001, -0.001, 0.0)),
        ("rational_polynomial", (-0.3, 0.1, 0.001, -0.001, 0.0, 0.02, 0.01, 0.0)),
        ("equidistant", (-0.05, 0.01, 0.0, 0.0)),
    ],
)
def test_undistortion_straightens_what_the_lens_bent(model, coefficients):
    camera = Camera(K, 640, 480, coefficients, model)
    points = np.array([[x, y, 1.0] for x in (-0.4, 0, 0.4) for y in (-0.3, 0, 0.3)])
    project = cv2.fisheye.projectPoints if model == "equidistant" else cv2.projectPoints
    bent = project(points[:, None], np.zeros(3), np.zeros(3), K, np.array(coefficients))[0].reshape(-1, 2)
    straight = points @ K.T
    straight = straight[:, :2] / straight[:, 2:]
    assert np.abs(bent - straight).max() > 3
    image = np.zeros((480, 640), np.uint8)
    for point in bent:
        cv2.circle(image, tuple(np.round(point).astype(int).tolist()), 4, 255, -1)
    _, _, _, found = cv2.connectedComponentsWithStats((camera.undistort(image) > 127).astype(np.uint8))
    for point in straight:
        assert np.linalg.norm(found[1:] - point, axis=1).min() < 1.2


IMAGE = np.zeros((48, 64, 3), np.uint8)
MASK = np.zeros((48, 64), bool)
MASK[10:30, 10:40] = True
SMALL_K = np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": IMAGE.astype(np.float32)}, "image: dtype"),
        ({"image": IMAGE[..., :2]}, "image: shape"),
        ({"mask": MASK[:-1]}, "mask: size 64x47 differs from the image's 64x48"),
        ({"mask": np.zeros_like(MASK)}, "mask: no pixel"),
        ({"mask": np.eye(48, 64, dtype=bool) & (np.arange(64) < 4)}, "at least 8x8"),
        ({"camera": np.full((3, 3), np.nan)}, "NaN"),
        ({"camera": np.zeros((3, 3))}, "focal lengths are fx=0"),
        ({"camera": np.eye(4)}, "shape"),
        ({"camera": Camera(SMALL_K, 32, 24)}, "calibrated for 32x24, the image is 64x48"),
        ({"depth": np.ones((3, 3))}, "depth: size 3x3"),
    ],
)
def test_bad_input_says_what_is_wrong(change, message):
    arguments = {"image": IMAGE, "mask": MASK, "camera": SMALL_K} | change
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Frame.from_arrays(**arguments)


def test_bad_distortion_is_refused():
    with pytest.raises(InputError, match="distortion model 'lens' is unknown"):
        Camera(SMALL_K, 64, 48, (0.1,), "lens")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes 4 or 5"):
        Camera(SMALL_K, 64, 48, (0.1,), "plumb_bob")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1400.0, 3000.0, 9000.0]), st.floats(5, 60))
def test_the_circle_encloses_the_object_however_small_its_angle(seed, focal, radius):
    """A few pixels of a long lens are a ten-thousandth of a radian, where OpenCV's own tolerances are."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, rng.integers(3, 7))
    points = np.array([640, 360]) + radius * np.column_stack([np.cos(angle), np.sin(angle)])
    camera = virtual_camera(points, np.array([[focal, 0, 640.0], [0, focal, 360], [0, 0, 1]]), 96)
    rays = np.column_stack([(points - [640, 360]) / focal, np.ones(len(points))]) @ camera.R_virtual_camera.T
    reach = np.linalg.norm(rays[:, :2] / rays[:, 2:], axis=1)
    assert reach.max() == pytest.approx(camera.angular_radius, rel=2e-3)
    # The smallest circle touches two points that are opposite each other, or three around its centre: it is no larger
    # than the circle that the points were taken from, nor smaller than half of what lies farthest apart.
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert 0.99 * apart / 2 <= focal * camera.angular_radius <= 1.01 * max(radius, apart / np.sqrt(3))


def test_a_line_of_one_pixel_is_no_speck():
    mask = np.zeros((480, 640), np.uint8)
    mask[50:430, 320] = 255  # a cable
    mask[100:112, 100:112] = 255
    assert np.ptp(outline(mask)[:, 1]) == 379


def test_a_long_object_in_a_narrow_image_can_be_looked_at():
    image, mask = np.full((2000, 20, 3), 90, np.uint8), np.ones((2000, 20), bool)
    crop = virtual_crop(Frame.from_arrays(image, mask, np.array([[900.0, 0, 10], [0, 900.0, 1000], [0, 0, 1]])), 64)
    assert crop.mask.max() > 0


@pytest.mark.parametrize("given", [[0.1, 0.0, 0.0, 0.0, 0.0], np.array([[0.1, 0.0, 0.0, 0.0, 0.0]])])
def test_distortion_comes_as_opencv_gives_it(given):
    camera = Camera(K, 640, 480, given, "plumb_bob")
    assert camera.distortion == (0.1, 0.0, 0.0, 0.0, 0.0)
    assert camera.undistort(np.zeros((480, 640, 3), np.uint8)).shape == (480, 640, 3)
    with pytest.raises(InputError, match="list of coefficients"):
        Camera(K, 640, 480, "k1", "plumb_bob")
