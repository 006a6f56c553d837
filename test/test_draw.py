"""Pictures say what they are given: where axes end, where on the globe the mass is, what stays untouched."""

import cv2
import numpy as np
import pytest

from nope_ros import draw
from nope_ros.distribution import Ambiguity
from nope_ros.rotations import exp, icosphere, look_at, turn_to

K = np.array([[500.0, 0, 319.5], [0, 510.0, 239.5], [0, 0, 1]])
Z_UP = np.array([0.0, 0, 1])


def grey(height=480, width=640):
    return np.full((height, width, 3), 90, np.uint8)


def pixels_like(image, colour, tolerance=60):
    return np.abs(image.astype(int) - np.array(colour)).max(axis=2) <= tolerance


def test_projection_follows_the_pinhole():
    points, depth = draw.project(np.array([[0.1, -0.2, 0.3]]), np.eye(3), np.array([0.05, 0.1, 1.0]), K)
    assert depth == pytest.approx([1.3])
    assert points[0] == pytest.approx([319.5 + 500 * 0.15 / 1.3, 239.5 - 510 * 0.1 / 1.3])


def test_axes_end_where_the_pose_says():
    rng = np.random.default_rng(0)
    looked_at = 0
    for _ in range(10):
        R = look_at(rng.normal(size=3))
        t = np.array([*rng.uniform(-0.1, 0.1, 2), 1.0])
        length = 0.2
        image = draw.draw_axes(grey(), R, t, K, length)
        tips, depth = draw.project(length * np.eye(3), R, t, K)
        origin, _ = draw.project(np.zeros((1, 3)), R, t, K)
        for tip, z, colour in zip(tips, depth, draw.AXES, strict=True):
            if np.linalg.norm(tip - origin[0]) < 40 or z > 1.02:
                continue  # end-on, or behind others
            looked_at += 1
            seen = np.argwhere(pixels_like(image, colour))[:, ::-1]
            # The letter is beyond the arrow's tip; the arrow itself reaches the tip and no other direction.
            assert np.linalg.norm(seen - tip, axis=1).min() < 3
            beside = seen - origin[0]
            along = (tip - origin[0]) / np.linalg.norm(tip - origin[0])
            across = np.abs(beside @ np.array([-along[1], along[0]]))
            reach = beside @ along
            assert across[(reach > 0) & (reach < np.linalg.norm(tip - origin[0]))].max() < 20
    assert looked_at >= 10, "of 30"


def test_axis_towards_the_camera_covers_the_one_away():
    # x points away and to the right, y towards the camera and to the right: both over the same pixels.
    x = np.array([0.6, 0.0, 0.8])
    y = np.array([0.8, 0.0, -0.6])
    R = np.stack([x, y, np.cross(x, y)], axis=1)
    image = draw.draw_axes(grey(), R, np.array([0.0, 0, 1.0]), K, 0.2)
    right = image[236:244, 340:355].astype(int).mean(axis=(0, 1))
    assert right[1] > right[0] + 40, "green is in front"


def test_nothing_is_drawn_of_a_pose_behind_the_camera():
    for z in (-1.0, 0.0, 0.15):  # the last in front, but an axis of it reaches behind
        image = draw.draw_axes(grey(), np.diag([1.0, -1, -1]), np.array([0, 0, z]), K, 0.2)
        assert (image == 90).all()


def test_inputs_stay_as_they_are():
    image, mask = grey(), np.zeros((480, 640), bool)
    mask[200:280, 280:360] = True
    drawn = draw.Drawn(look_at(np.ones(3)), np.array([0, 0, 1.0]), 0.1, 0.4, Ambiguity.FINITE, "mug", False, mask)
    result = draw.overlay(image, K, [drawn])
    assert (image == 90).all()
    assert mask.sum() == 80 * 80
    assert result.shape == image.shape and result.dtype == np.uint8
    assert (result != image).any()


def test_outline_has_the_colour_of_the_ambiguity():
    mask = np.zeros((480, 640), bool)
    cv2.circle(view := mask.view(np.uint8), (320, 240), 90, 1, -1)
    assert view.any()
    for ambiguity in Ambiguity:
        drawn = draw.Drawn(np.eye(3), np.array([0, 0, 1.0]), 0.05, 0.9, ambiguity, mask=mask)
        image = draw.overlay(grey(), K, [drawn])
        assert pixels_like(image, draw.AMBIGUITY_COLOURS[ambiguity], 40)[330, 300:340].any()


def test_a_label_at_the_border_stays_inside():
    mask = np.zeros((480, 640), bool)
    mask[0:30, 600:640] = True
    drawn = draw.Drawn(
        np.eye(3), np.array([0.3, -0.2, 1.0]), 0.05, 1.0, Ambiguity.AXIAL, "a long name indeed", True, mask
    )
    image = draw.overlay(grey(), K, [drawn])
    assert pixels_like(image, draw.BRIGHT, 30)[:40].sum() > 100


@pytest.mark.parametrize("size", [(640, 480), (320, 240), (480, 480), (1280, 720)])
def test_zooming_moves_intrinsics_with_the_pixels(size):
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, y = int(rng.integers(60, 580)), int(rng.integers(60, 420))
        image, mask = np.zeros((480, 640, 3), np.uint8), np.zeros((480, 640), bool)
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
        mask[y - 25 : y + 26, x - 25 : x + 26] = True
        picture, cut, K_zoomed = draw.zoomed(image, mask, K, *size)
        assert picture.shape == (size[1], size[0], 3)
        ray = np.linalg.inv(K) @ [x, y, 1]
        expected = (K_zoomed @ ray)[:2]
        weight = np.maximum(picture[..., 0].astype(float) - 30, 0)  # bars beside the picture are dark, not black
        rows, columns = np.indices(weight.shape)
        found = np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()
        assert found == pytest.approx(expected, abs=0.6)
        columns = np.flatnonzero(cut.any(axis=0))
        rows = np.flatnonzero(cut.any(axis=1))
        assert max(np.ptp(columns) / size[0], np.ptp(rows) / size[1]) > 0.4, "a small object is enlarged"


def test_zooming_leaves_a_large_object_alone():
    mask = np.zeros((480, 640), bool)
    mask[100:400, 200:500] = True
    image, cut, K_zoomed = draw.zoomed(grey(), mask, K, 640, 480)
    assert (K_zoomed == K).all() and (cut == mask).all() and (image == 90).all()


def test_directions_and_rolls_undo_a_view():
    globe = draw.Globe.around(np.array([1.0, 0, 0.3]), Z_UP)
    rng = np.random.default_rng(2)
    for _ in range(20):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        roll = rng.uniform(-3, 3)
        ray = np.array([*rng.uniform(-0.4, 0.4, 2), 1.0])
        # The same view of the object, somewhere else in the image.
        level = look_at(globe.R_globe_object @ direction) @ globe.R_globe_object
        R = turn_to(ray).T @ exp(np.array([0, 0, roll])) @ level
        assert draw.viewing_directions(R[None], ray)[0] == pytest.approx(direction, abs=1e-9)
        assert draw.rolls(R[None], ray, globe)[0] == pytest.approx(roll, abs=1e-9)


@pytest.mark.parametrize("up", [Z_UP, np.array([0.0, -1, 0]), np.array([0.3, -0.5, 0.2])])
def test_globe_is_brightest_where_the_mass_is(up):
    reference = np.array([0.8, 0.5, 0.4])
    globe = draw.Globe.around(reference, up)
    size = 180
    looked_at = 0
    for direction in icosphere(1):
        behind = direction @ reference < 0
        pixel, here = draw.globe_pixel(direction, globe, size, behind=bool(behind))
        assert here
        picture = draw.draw_globe(direction[None], np.ones(1), globe, size, behind=bool(behind)).astype(int).sum(axis=2)
        if np.linalg.norm(pixel - (size - 1) / 2) > 0.44 * size:
            continue  # at the rim, where a spot is a sliver
        looked_at += 1
        rows, columns = np.nonzero(picture > 0.97 * picture.max())
        assert np.hypot(columns.mean() - pixel[0], rows.mean() - pixel[1]) < 5
        other = draw.draw_globe(direction[None], np.ones(1), globe, size, behind=not behind).astype(int).sum(axis=2)
        assert other.max() < picture.max()
    assert looked_at > 20, "of 42"


def test_globe_has_the_reference_in_the_middle_and_up_upwards():
    globe = draw.Globe.around(np.array([2.0, 0, 0.5]), Z_UP)
    middle, here = draw.globe_pixel(np.array([2.0, 0, 0.5]), globe, 200)
    above, _ = draw.globe_pixel(np.array([1.0, 0, 1.0]), globe, 200)
    # Someone at x looking at the origin with z up has y to the right.
    beside, _ = draw.globe_pixel(np.array([1.0, 0.5, 0.2]), globe, 200)
    assert here and middle == pytest.approx([99.5, 99.5])
    assert above[1] < 90
    assert beside[0] > 110
    behind, here = draw.globe_pixel(np.array([-2.0, 0, -0.5]), globe, 200, behind=True)
    assert here and behind == pytest.approx([99.5, 99.5])


def test_density_is_probability_of_being_near():
    directions = icosphere(3)
    at = directions[:1]
    assert draw.globe_density(at, np.ones(1), at) == pytest.approx([1.0])
    even = np.full(len(directions), 1 / len(directions))
    assert draw.globe_density(directions, even, at)[0] < 0.03


def test_brightness_grows_with_probability():
    brightness = draw.colour_of(np.linspace(0, 1, 50)).astype(int).sum(axis=1)
    assert (np.diff(brightness) >= 0).all()
    assert brightness[-1] > 3 * brightness[0]


@pytest.mark.parametrize("roll", [0.0, 0.7, np.pi / 2, -2.2])
def test_dial_shows_roll_clockwise_from_the_top(roll):
    picture = draw.draw_dial(np.array([roll]), np.ones(1), 160).astype(int).sum(axis=2)
    rows, columns = np.nonzero(picture > 0.8 * picture.max())
    angle = np.arctan2(columns.mean() - 79.5, 79.5 - rows.mean())
    assert np.abs(np.angle(np.exp(1j * (angle - roll)))) < np.radians(8)


def test_distribution_and_panel_have_their_sizes():
    R = look_at(icosphere(2))
    ray = np.array([0, 0, 1.0])
    globe = draw.Globe.around(np.array([1.0, 0, 0]), Z_UP)
    views = [draw.Viewpoint.of("reference", R[0], ray, globe), draw.Viewpoint.of("estimate", R[5], ray, globe)]
    picture = draw.draw_distribution(R, np.full(len(R), 1 / len(R)), ray, globe, views, title="t", note="n")
    assert picture.shape == (480, 420, 3)
    panel = draw.draw_panel(grey(100, 130), grey(), picture, facts=[("a", "b")], query_title="q")
    assert panel.shape[0] == 480
    assert panel.shape[1] == 232 + 640 + 420


def test_contact_sheet_places_pictures_in_rows():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    images = [np.full((60, 80, 3), colour, np.uint8) for colour in colours]
    sheet = draw.contact_sheet(images, ["a", "b", "c", "d"], columns=3, cell_width=80, good=[True, False, None])
    centres = [(pixels_like(sheet, colour, 5)) for colour in colours]
    rows, columns = zip(*[np.argwhere(found).mean(axis=0) for found in centres], strict=True)
    assert rows[0] == rows[1] == rows[2] < rows[3]
    assert columns[0] == columns[3] < columns[1] < columns[2]
    with pytest.raises(ValueError, match="needs a picture"):
        draw.contact_sheet([])


def test_reference_is_cut_out_around_its_mask():
    mask = np.zeros((480, 640), bool)
    mask[100:200, 500:620] = True
    image = grey()
    image[mask] = (200, 40, 40)
    picture = draw.mask_only(image, mask)
    assert picture.shape[0] == picture.shape[1]
    assert pixels_like(picture, (200, 40, 40), 5).mean() > 0.4
    assert draw.mask_only(image, np.zeros_like(mask)).shape == (480, 480, 3), "without a mask, the middle"
