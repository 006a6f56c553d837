"""The renderer obeys the camera conventions, and the cache says where its cameras stood."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from rendered import cuboid, joined

from nope_ros.rendering.mesh import load_mesh, make_mesh
from nope_ros.rendering.render import Lighting, ShadowMaps, all_around, render
from nope_ros.rotations import look_at
from nope_ros.training import render_cache
from nope_ros.training.pairs import DataConfig, RenderCache
from nope_ros.training.procedural import procedural_object
from nope_ros.training.round import round_object
from nope_ros.training.trust import held_out
from nope_ros.training.variant import variant_of

FLAT = Lighting.uniform()
K = np.array([[140.0, 0, 63.5], [0, 150.0, 60.0], [0, 0, 1]])
RED, GREEN, BLUE = (np.array(c) for c in ((200, 20, 20), (20, 200, 20), (20, 20, 200)))


def square(size=1.0, **kwargs):
    """In the plane z = 0 of its frame; with an identity pose its uv run with the image."""
    vertices = 0.5 * size * np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    return make_mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), uv=uv, **kwargs)


def tripod():
    """A red block along +x, a green one along +y, a blue one along +z: no rotation maps it to itself."""
    return joined(
        cuboid((0.2, 0.2, 0.2), (0.8, 0, 0), RED),
        cuboid((0.2, 0.2, 0.2), (0, 0.5, 0), GREEN),
        cuboid((0.2, 0.2, 0.2), (0, 0, 0.6), BLUE),
    )


def random_rotation(rng):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def project(points, R, t, K):
    x = (points @ R.T + t) @ K.T
    return x[:, :2] / x[:, 2:]


@pytest.mark.parametrize("seed", range(5))
def test_rotation_and_translation_follow_the_camera_convention(seed):
    rng = np.random.default_rng(seed)
    mesh = tripod()
    R, t = random_rotation(rng), np.array([rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), 4.0])
    rgb = render(mesh, R, t, K, 128, 128, lighting=FLAT).rgb.astype(int)
    for colour, centre in ((RED, (0.8, 0, 0)), (GREEN, (0, 0.5, 0)), (BLUE, (0, 0, 0.6))):
        others = np.delete(rgb, colour.argmax(), axis=2)
        v, u = np.nonzero((rgb[..., colour.argmax()] > 100) & (others < 60).all(2))
        if len(u) < 25:  # hidden behind another block
            continue
        expected = project(np.array([centre]), R, t, K)[0]
        assert np.hypot(u.mean() - expected[0], v.mean() - expected[1]) < 1.5


@pytest.mark.parametrize("supersampling", [1, 2, 3])
def test_silhouette_is_exact_to_half_a_pixel(supersampling):
    rng = np.random.default_rng(7)
    for seed in range(6):
        mesh = procedural_object(seed).normalised()[0]
        R, t = random_rotation(rng), np.array([0.1, -0.05, 3.5])
        K = np.array([[180.0, 0, 80.2], [0, 170.0, 78.6], [0, 0, 1]])
        view = render(mesh, R, t, K, 160, 160, supersampling=supersampling)
        points = project(mesh.vertices[np.unique(mesh.faces)], R, t, K)
        v, u = np.nonzero(view.coverage)
        # A tip thinner than the sampling may be missed, nothing may stick out.
        assert points[:, 0].min() - 0.5 <= u.min() <= points[:, 0].min() + 1.5
        assert points[:, 0].max() - 1.5 <= u.max() <= points[:, 0].max() + 0.5
        assert points[:, 1].min() - 0.5 <= v.min() <= points[:, 1].min() + 1.5
        assert points[:, 1].max() - 1.5 <= v.max() <= points[:, 1].max() + 0.5


def test_pixel_centres_are_integers():
    # A square from u = 9.5 to 19.5 covers the pixels 10..19 wholly, and no other.
    K = np.array([[10.0, 0, 14.5], [0, 10.0, 14.5], [0, 0, 1]])
    view = render(square(), np.eye(3), (0, 0, 1), K, 32, 32, lighting=FLAT)
    expected = np.zeros((32, 32), np.uint8)
    expected[10:20, 10:20] = 255
    np.testing.assert_array_equal(view.coverage, expected)
    half = render(square(), np.eye(3), (0.05, 0, 1), K, 32, 32, lighting=FLAT)
    assert half.coverage[15, 10] == half.coverage[15, 20] == 128


def test_depth_of_a_slanted_plane_is_exact():
    angle = 0.9
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    t = np.array([0.1, -0.2, 3.0])
    view = render(square(2.0), R, t, K, 128, 128)
    v, u = np.nonzero(view.coverage == 255)
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(len(u))], 1)
    expected = (R[:, 2] @ t) / (rays @ R[:, 2])
    np.testing.assert_allclose(view.depth[v, u], expected, rtol=1e-4)
    assert (view.depth[view.coverage == 0] == 0).all()


def test_nearer_surface_hides_the_farther_in_either_order():
    for order in (1, -1):
        parts = [cuboid((1, 1, 0.1), (0, 0, -0.5), RED), cuboid((0.4, 0.4, 0.1), (0, 0, 0.5), GREEN)][::order]
        mesh = joined(*parts)
        middle = render(mesh, np.eye(3), (0, 0, 4), K, 128, 128, lighting=FLAT).rgb[60, 63]
        assert middle.argmax() == 0
        middle = render(mesh, np.diag([1.0, -1, -1]), (0, 0, 4), K, 128, 128, lighting=FLAT).rgb[60, 63]
        assert middle.argmax() == 1


def test_texture_stands_upright_and_is_perspective_correct():
    texture = np.zeros((64, 64, 3), np.uint8)
    texture[:32, :32], texture[:32, 32:], texture[32:, :32], texture[32:, 32:] = RED, GREEN, BLUE, (180, 180, 180)
    mesh = square(texture=texture)
    view = render(mesh, np.eye(3), (0, 0, 1.5), K, 128, 128, lighting=FLAT).rgb.astype(int)
    for (u, v), colour in {(45, 40): RED, (82, 40): GREEN, (45, 80): BLUE, (82, 80): (180, 180, 180)}.items():
        assert np.abs(view[v, u] - colour).max() < 4
    # Slanted, the border between the halves stays at the projection of the square's middle, not at the image's middle.
    angle = 1.0
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    row = render(mesh, R, (0, 0, 1.2), K, 128, 128, lighting=FLAT).rgb[50].astype(int)
    border = np.nonzero((row[:-1, 0] > row[:-1, 1]) & (row[1:, 0] < row[1:, 1]))[0]
    assert len(border) == 1
    assert abs(border[0] + 0.5 - K[0, 2]) <= 1


def test_light_comes_from_where_it_is_and_both_sides_are_lit():
    angle = np.linspace(0, np.pi, 24), np.linspace(0, 2 * np.pi, 48)
    a, b = np.meshgrid(*angle, indexing="ij")
    vertices = np.stack([np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(23), np.arange(47), indexing="ij")
    q = (48 * i + j).ravel()
    faces = np.concatenate([np.stack([q, q + 48, q + 1], 1), np.stack([q + 1, q + 48, q + 49], 1)])
    light = Lighting(
        directions=np.array([[-0.8, -0.6, 0]], np.float32),  # from the left and above
        colours=np.ones((1, 3), np.float32),
        ambient_sky=(0.05,) * 3,
        ambient_ground=(0.05,) * 3,
        specular=0.0,
    )
    colours = np.full((len(vertices), 3), 160, np.uint8)
    images = []
    for winding in (faces, faces[:, ::-1]):
        mesh = make_mesh(vertices, winding, colours=colours)
        images.append(render(mesh, np.eye(3), (0, 0, 5), K, 128, 128, lighting=light).rgb.astype(int))
        assert images[-1][50, 50, 0] > images[-1][70, 78, 0] + 50
    # Smooth: neighbours differ little inside the lit half.
    assert np.abs(np.diff(images[0][52, 48:60, 0])).max() < 12
    assert np.abs(images[0] - images[1]).max() <= 2


def test_nothing_behind_the_camera_is_drawn():
    assert not render(square(), np.eye(3), (0, 0, -2), K, 64, 64).coverage.any()
    assert not render(square(), np.eye(3), (0, 0, 0), K, 64, 64).coverage.any()


def test_background_shows_through_in_proportion():
    colours = np.tile(RED, (4, 1)).astype(np.uint8)
    K = np.array([[10.0, 0, 14.5], [0, 10.0, 14.5], [0, 0, 1]])
    args = (square(colours=colours), np.eye(3), (0.05, 0, 1), K, 32, 32)
    rgb = render(*args, lighting=FLAT, background=np.array([0, 0, 100], np.uint8)).rgb.astype(int)
    assert np.abs(rgb[15, 10] - [100, 10, 60]).max() <= 3
    assert (rgb[0, 0] == [0, 0, 100]).all()


def test_normalised_undoes():
    mesh = replace(tripod())
    unit, scale, offset = mesh.normalised()
    assert unit.radius == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(unit.vertices * scale + offset, mesh.vertices, atol=1e-6)
    np.testing.assert_allclose(unit.vertices.min(0), -unit.vertices.max(0), atol=1e-6)


def test_loaded_mesh_is_turned_z_up_with_its_texture_upright(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    from PIL import Image

    # Stands upright in a y-up file and faces +z, as glTF has it; the texture's upper half is red.
    texture = np.zeros((32, 32, 3), np.uint8)
    texture[:16], texture[16:] = RED, BLUE
    vertices = np.array([[-1, 0, 0], [1, 0, 0], [1, 2, 0], [-1, 2, 0]], float)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(texture))
    visual = trimesh.visual.TextureVisuals(uv=np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), material=material)
    path = tmp_path / "sign.glb"
    trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False).export(path)
    mesh = load_mesh(path)
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([2, 0, 2], abs=1e-6)
    eye = np.array([0.0, -6, 1])  # +z of the file is −y now
    R = look_at(eye - np.array([0.0, 0, 1]))
    rgb = render(mesh, R, -R @ eye, K, 128, 128, lighting=FLAT).rgb
    assert rgb[45, 63].argmax() == 0
    assert rgb[75, 63].argmax() == 2


def test_procedural_objects_are_sound_varied_and_repeatable():
    meshes = [procedural_object(seed) for seed in range(40)]
    for mesh in meshes:
        assert np.isfinite(mesh.vertices).all()
        assert np.isfinite(mesh.normals).all()
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=-1), 1, atol=1e-4)
        assert 10 <= len(mesh.faces) <= 20_000
        assert mesh.faces.min() >= 0
        assert mesh.faces.max() < len(mesh.vertices)
    assert len({mesh.name.split("_")[2] for mesh in meshes}) >= 8
    assert 5 <= sum(mesh.texture is not None for mesh in meshes) <= 25
    again = procedural_object(3)
    np.testing.assert_array_equal(again.vertices, meshes[3].vertices)
    np.testing.assert_array_equal(again.colours, meshes[3].colours)


def test_round_objects_look_nearly_the_same_all_round_and_are_repeatable():
    """Procedural ones do not: the outline changes by more as the camera goes round, and so do the colours."""

    def change(mesh):
        mesh = mesh.normalised()[0]
        views = []
        for azimuth in (0.3, 1.9, 3.5):
            eye = 5 * np.array([np.cos(azimuth) * 0.9, np.sin(azimuth) * 0.9, 0.43])
            R = look_at(eye)
            views.append(render(mesh, R, -R @ eye, K, 128, 128, lighting=FLAT))
        both = [(a, b) for a, b in zip(views, views[1:] + views[:1], strict=True)]
        outline = np.mean([(a.mask ^ b.mask).sum() / (a.mask | b.mask).sum() for a, b in both])
        colour = np.mean(
            [np.abs(a.rgb[a.mask & b.mask].astype(float) - b.rgb[a.mask & b.mask]).mean() for a, b in both]
        )
        return outline, colour

    meshes = [round_object(seed) for seed in range(30)]
    for mesh in meshes:
        assert np.isfinite(mesh.vertices).all() and np.isfinite(mesh.normals).all()
        assert 1000 < len(mesh.faces) <= 20_000
    ours = np.median([change(mesh) for mesh in meshes], axis=0)
    others = np.median([change(procedural_object(seed)) for seed in range(30)], axis=0)
    assert (ours < 0.5 * others).all(), (ours, others)
    again = round_object(3)
    np.testing.assert_array_equal(again.vertices, meshes[3].vertices)
    np.testing.assert_array_equal(again.colours, meshes[3].colours)
    assert len({mesh.name for mesh in meshes}) == 30
    settings = render_cache.Settings(None, 2, 4, 4, 64, 7, round_objects=3)
    names = [source.name for source in render_cache.find_sources(settings)]
    assert names == ["procedural/7000000", "procedural/7000001", *(f"round/{7000000 + i}" for i in range(3))]
    assert render_cache.find_sources(settings)[2].load().name == "round_7000000"


def test_cache_resumes_and_its_poses_explain_its_images(tmp_path):
    arguments = [
        "--procedural",
        "6",
        "--views",
        "3",
        "--size",
        "64",
        "--workers",
        "1",
        "--seed",
        "5",
        "--out",
        str(tmp_path),
    ]
    render_cache.main(arguments)
    images = np.load(tmp_path / "images.npy").copy()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert images.shape == (18, 64, 64, 4)
    assert manifest["view_count"] == 18
    with np.load(tmp_path / "views.npz") as views:
        names = json.loads(str(views["names"]))
        assert names == [entry["name"] for entry in manifest["objects"]]
        for i in range(18):
            mesh = procedural_object(int(names[views["object_index"][i]].split("/")[1])).normalised()[0]
            R, t, K = views["R_camera_object"][i], views["t_camera_object"][i], views["K"][i]
            np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-5)
            assert np.linalg.det(R) == pytest.approx(1, abs=1e-5)
            # The object's up is up in the image, or not seen from the side at all.
            assert abs(R[0, 2]) < 1e-6
            assert R[1, 2] <= 0
            mask = render(mesh, R, t, K, 64, 64).coverage
            np.testing.assert_allclose(mask.astype(int), images[i, ..., 3].astype(int), atol=64)  # K and R in float32
            assert (mask != images[i, ..., 3]).mean() < 0.01
            border = np.concatenate([images[i, [0, -1], :, 3].ravel(), images[i, :, [0, -1], 3].ravel()])
            assert not (border > 127).any()
    # An interrupted run, of which the part and its images are lost.
    (tmp_path / "parts" / "00000.npz").unlink()
    broken = np.load(tmp_path / "images.npy", mmap_mode="r+")
    broken[:] = 0
    broken.flush()
    render_cache.main(arguments)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)
    with pytest.raises(SystemExit, match="other settings"):
        render_cache.main([*arguments[:-1], str(tmp_path), "--seed", "6"])


def test_held_out_names_are_not_rendered(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    (tmp_path / "train" / "some").mkdir(parents=True)
    for name in ("mug", "ycb_mug", "HOPE_can", "libero"):
        trimesh.creation.box().export(tmp_path / "train" / "some" / f"{name}.glb")
    settings = render_cache.Settings(str(tmp_path / "train"), 1, 2, 3, 64, 0)
    assert [s.name for s in render_cache.find_sources(settings)] == ["some/mug", "procedural/0"]


@pytest.mark.parametrize("seed", range(12))
def test_a_variant_is_another_object_of_the_same_build(seed):
    mesh = procedural_object(seed).normalised()[0]
    same, other = (variant_of(mesh, np.random.default_rng(number)) for number in (seed, seed + 100))
    again = variant_of(mesh, np.random.default_rng(seed))
    np.testing.assert_array_equal(same.vertices, again.vertices)
    if same.texture is not None:
        np.testing.assert_array_equal(same.texture, again.texture)
    assert same.vertices.shape != other.vertices.shape or np.abs(same.vertices - other.vertices).max() > 0.01
    # No face is lost: each is where its vertices went, and none of them far.
    assert len(same.faces) == pytest.approx(len(mesh.faces), rel=0.01)
    assert 0.3 < same.radius < 4
    assert np.isfinite(same.normals).all()
    if same.uv is not None and same.uv.shape[0] == 3 * len(same.faces):  # printed anew
        assert same.uv.min() >= 0
        assert same.uv.max() <= 1


def test_a_print_covers_each_side_with_its_own_picture():
    box = procedural_box()
    sides = set()
    for number in range(40):
        printed = variant_of(box, np.random.default_rng(number))
        if printed.texture is None:
            continue
        cells = np.floor(printed.uv.reshape(-1, 3, 2) * (3, 2)).astype(int)
        assert (cells == cells[:, :1]).all()  # no triangle straddles two pictures
        sides.add(len(np.unique(cells[:, 0] @ (1, 3))))
    assert 6 in sides


def test_variants_follow_all_else_in_a_cache_and_are_held_out_with_their_mesh(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    (tmp_path / "train" / "some").mkdir(parents=True)
    for i in range(40):
        trimesh.creation.box(extents=(1, 2, 1 + i)).export(tmp_path / "train" / "some" / f"box_{i}.glb")
    arguments = ["--meshes", str(tmp_path / "train"), "--procedural", "1", "--views", "2", "--mesh-views", "2"]
    arguments += ["--size", "24", "--workers", "1", "--shadows", "0"]
    render_cache.main([*arguments, "--out", str(tmp_path / "without")])
    render_cache.main([*arguments, "--mesh-variants", "2", "--out", str(tmp_path / "with")])
    without, cache = (RenderCache(DataConfig(cache=str(tmp_path / name))) for name in ("without", "with"))
    assert cache.names[: len(without.names)] == without.names
    np.testing.assert_array_equal(cache.images[: len(without.images)], without.images)
    assert cache.variant.sum() == 80
    assert not cache.procedural[cache.variant].any()
    assert 0 < cache.held_out[cache.variant].sum() < 80
    mesh_of = {name: held for name, held in zip(cache.names, cache.held_out, strict=True) if "#" not in name}
    for name, held in zip(cache.names, cache.held_out, strict=True):
        assert held == mesh_of[name.split("#")[0]]
    # And the refiner is trusted as far as meshes tell that the templates have not seen either.
    assert {name for name, held in mesh_of.items() if held and "procedural" not in name} == set(
        held_out(tmp_path / "train")
    )
    first, second = (cache.images[cache.views[cache.names.index(f"some/box_3#{i}")]] for i in (1, 2))
    assert (first != second).any()


def procedural_box():
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box()
    return make_mesh(box.vertices, box.faces, colours=np.full((8, 3), 200, np.uint8))


def test_renders_are_fast_enough_to_train_on():
    mesh = procedural_object(1).normalised()[0]
    R = np.eye(3)
    render(mesh, R, (0, 0, 3), K, 128, 128)
    best = np.inf
    for _ in range(20):
        started = time.perf_counter()
        render(mesh, R, (0, 0, 3), K, 128, 128)
        best = min(best, time.perf_counter() - started)
    assert best < 0.02  # 1.5 ms where it was written; a busy machine may take longer


def together(*parts):
    vertices, faces = zip(*((mesh.vertices, mesh.faces) for mesh in parts), strict=True)
    starts = np.cumsum([0, *(len(one) for one in vertices)])
    return make_mesh(
        np.concatenate(vertices), np.concatenate([f + start for f, start in zip(faces, starts, strict=False)])
    )


def moved(mesh, t):
    return make_mesh(mesh.vertices + np.asarray(t), mesh.faces)


DOWN = np.diag([1.0, -1, -1])
"""R_camera_object of a camera above the object that looks down on it."""


def test_a_shadow_lies_where_the_light_throws_it():
    mesh = together(square(2.0), moved(square(0.4), (0, 0, 0.5)))
    towards = np.array([[0.5, 0.25, 1.0]]) / np.linalg.norm([0.5, 0.25, 1.0])
    light = Lighting(
        directions=(towards @ DOWN.T).astype(np.float32),
        colours=np.full((1, 3), 0.5, np.float32),
        ambient_sky=(0.1, 0.1, 0.1),
        ambient_ground=(0.1, 0.1, 0.1),
        specular=0.0,
    )
    K = np.array([[200.0, 0, 79.5], [0, 200.0, 79.5], [0, 0, 1]])
    t = np.array([0, 0, 4.0])
    bright = render(mesh, DOWN, t, K, 160, 160, lighting=light).rgb.astype(int)
    shadows = ShadowMaps.of(mesh, towards, 128)
    shaded = render(mesh, DOWN, t, K, 160, 160, lighting=replace(light, shadows=shadows)).rgb.astype(int)
    dark = (bright - shaded).max(axis=2) > 20
    v, u = np.nonzero(dark)
    # The plate is 0.5 above the floor: its shadow lies half as far aside as the light stands, and some is hidden by it.
    corners = np.array([[x, y, 0.5] for x in (-0.2, 0.2) for y in (-0.2, 0.2)]) - 0.5 * towards[0] / towards[0, 2]
    expected = project(corners, DOWN, t, K)
    assert abs(u.min() - expected[:, 0].min()) < 2.5
    assert abs(v.max() - expected[:, 1].max()) < 2.5
    floor = np.array([-0.3, -0.2, 0.0])  # in the middle of the shadow's free part
    x, y = np.round(project(floor[None], DOWN, t, K)[0]).astype(int)
    assert dark[y, x]
    x, y = np.round(project(np.array([[0.6, 0.6, 0.0], [0, 0, 0.5]]), DOWN, t, K)).astype(int).T
    assert not dark[y, x].any()  # the other side of the floor, and the plate itself


def test_nothing_shades_a_convex_object():
    mesh = joined(cuboid((1.0, 0.8, 0.6), colour=(200, 200, 200)))
    rng = np.random.default_rng(3)
    for _ in range(5):
        R = random_rotation(rng)
        plain = Lighting()
        shadows = ShadowMaps.of(mesh, plain.directions @ R, 128)
        assert np.allclose(np.linalg.norm(shadows.directions, axis=1), 1, atol=1e-5)
        t = np.array([0, 0, 4.0])
        a = render(mesh, R, t, K, 128, 128, lighting=plain).rgb.astype(int)
        b = render(mesh, R, t, K, 128, 128, lighting=replace(plain, shadows=shadows)).rgb.astype(int)
        assert np.mean(np.abs(a - b).max(axis=2) > 12) < 0.01  # but for what runs along an edge


def test_a_corner_is_darker_than_an_open_side():
    """Light from all around: between two walls half of it is hidden, at a convex object's faces none."""
    wall = make_mesh(np.array([[0, -1, 0], [0, 1, 0], [0, 1, 2], [0, -1, 2.0]]), np.array([[0, 1, 2], [0, 2, 3]]))
    floor = make_mesh(np.array([[0, -1, 0], [2, -1, 0], [2, 1, 0], [0, 1, 0.0]]), np.array([[0, 1, 2], [0, 2, 3]]))
    mesh = together(wall, floor)
    one, none = (0.5, 0.5, 0.5), np.zeros((0, 3), np.float32)
    even = Lighting(directions=none, colours=none, ambient_sky=one, ambient_ground=one, specular=0.0)
    around = ShadowMaps.of(mesh, all_around(64), 64)
    light = replace(even, around=around)
    R, t = DOWN, np.array([-1.0, 0, 4.0])
    K = np.array([[150.0, 0, 79.5], [0, 150.0, 79.5], [0, 0, 1]])

    def brightness(point, lighting):  # linear; the renderer's shoulder is above this
        x, y = np.round(project(np.array([point]), R, t, K)[0]).astype(int)
        patch = render(mesh, R, t, K, 160, 160, lighting=lighting).rgb[y - 2 : y + 3, x - 2 : x + 3] / 255
        return float(np.mean(((patch + 0.055) / 1.055) ** 2.4))

    assert brightness((1.8, 0, 0), light) == pytest.approx(brightness((1.8, 0, 0), even), rel=0.25)
    assert brightness((0.15, 0, 0), light) == pytest.approx(0.5 * brightness((0.15, 0, 0), even), rel=0.25)


def test_objects_of_a_cache_shade_themselves_if_asked_to(tmp_path):
    def images(shadows):
        out = tmp_path / str(shadows)
        render_cache.build_cache(out, render_cache.Settings(None, 4, 2, 2, 48, 5, shadows=shadows), 1)
        return np.load(out / "images.npy").astype(int)

    without, with_all = images(0.0), images(1.0)
    assert np.array_equal(without[..., 3], with_all[..., 3])  # cameras stand where they stood
    assert (without[..., :3] != with_all[..., :3]).any(axis=(1, 2, 3)).all()


def test_shadow_maps_of_other_lights_are_refused():
    maps = ShadowMaps.of(square(), all_around(3), 8)
    with pytest.raises(ValueError, match="3 shadow maps for 1 lights"):
        Lighting(shadows=maps)
    with pytest.raises(ValueError, match="patches"):
        Lighting(around=maps, patches=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="patches"):
        Lighting(patches=np.ones(2, np.float32))
