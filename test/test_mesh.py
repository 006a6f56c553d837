"""Objects of which there is a mesh: the file, its frame, its scale, and what a restart leaves of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from rendered import photograph

from nope_ros.crop import Crop
from nope_ros.estimator import PoseEstimator, RegisteredObject
from nope_ros.frame import Frame, InputError
from nope_ros.mesh import read_mesh, render_views, view_rotations
from nope_ros.rendering.mesh import Mesh
from nope_ros.rendering.render import Lighting
from nope_ros.rotations import exp, geodesic_distance, look_at
from nope_ros.store import ObjectStore

OFFSET = np.array([0.3, -0.1, 0.05])
K = np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]])


@pytest.fixture(scope="module")
def mesh_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lopsided, coloured shape, 0.2 m across, away from its own origin."""
    parts = [
        trimesh.creation.box((0.14, 0.06, 0.04)),
        trimesh.creation.cylinder(0.02, 0.1).apply_translation([0.05, 0.0, 0.05]),
        trimesh.creation.icosphere(radius=0.03).apply_translation([-0.05, 0.02, 0.03]),
    ]
    for part, colour in zip(parts, ([200, 60, 40, 255], [40, 80, 200, 255], [230, 210, 60, 255]), strict=True):
        part.visual.vertex_colors = np.tile(colour, (len(part.vertices), 1))
    shape = trimesh.util.concatenate(parts).apply_translation(OFFSET)
    path = tmp_path_factory.mktemp("mesh") / "lopsided.ply"
    shape.export(path)
    return path


@pytest.fixture(scope="module")
def registered(estimator: PoseEstimator, mesh_file: Path) -> RegisteredObject:
    """From the mesh, standing on its flat side."""
    torch.set_num_threads(1)
    return estimator.register_mesh(mesh_file, object_id="lopsided", gravity_object=np.array([0.0, 0.0, -1.0]))


def frame_of(mesh: Mesh, R: np.ndarray, t: np.ndarray) -> Frame:
    """The mesh, whose origin is at t."""
    return photograph(mesh, R, t, K, (640, 480), Lighting())


def test_pose_is_of_the_meshs_frame_in_metres(
    estimator: PoseEstimator, registered: RegisteredObject, mesh_file: Path
) -> None:
    """Rotation and translation, although the mesh's origin is far outside the object."""
    mesh = read_mesh(mesh_file)
    rng = np.random.default_rng(0)
    angles, off = [], []
    for _ in range(6):
        R = look_at(np.array([*rng.normal(size=2), rng.uniform(0.3, 1)]))
        centre = np.array([rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(0.5, 0.9)])
        t = centre - R @ OFFSET
        for prior, gravity in (("free", None), ("standing", R @ [0, 0, -1.0])):
            pose = estimator.estimate_frame(frame_of(mesh, R, t), [registered], prior=prior, gravity_camera=gravity)[0]
            assert pose.metric
            angles.append(np.degrees(geodesic_distance(pose.R_camera_object, R)))
            # The origin is an arm's length away from the object: what counts is where that puts the object.
            off.append(np.linalg.norm(pose.t_camera_object + pose.R_camera_object @ OFFSET - centre) / centre[2])
    assert np.median(angles) < 15
    assert np.median(off) < 0.04


def test_views_surround_the_object_and_stand_as_it_does() -> None:
    """The up axis is up in the image of every view, whichever it is."""
    up = np.array([0.0, 1.0, 0.0])
    R = view_rotations(up)
    seen = R @ up
    level = np.abs(seen[:, 2]) < 0.99
    np.testing.assert_allclose(seen[level, 0], 0, atol=1e-9)
    assert (seen[level, 1] < 0).all()  # y points down
    axes = exp(np.random.default_rng(0).normal(size=(200, 3)))[:, 2]
    nearest = np.degrees(np.arccos(np.clip((axes @ R[:, 2].T).max(axis=1), -1, 1)))
    assert nearest.max() < 12


def test_views_of_a_mesh_are_level_where_gravity_is_known(estimator: PoseEstimator, mesh_file: Path) -> None:
    mesh, told = read_mesh(mesh_file), []

    def encode(crops: list[Crop]) -> torch.Tensor:
        told.extend(crop.roll_known for crop in crops)
        return estimator.encode(crops)

    every = view_rotations()
    rotations = every[np.abs(every[:, 2, 2]) < 0.9][:8]
    for gravity in (None, np.array([0.0, 0.0, -1.0])):
        told.clear()
        views = render_views(mesh, rotations, estimator.predictor.crop_size, encode, gravity)
        assert told == [gravity is not None] * 8
    up = views.R[:, :, 2]
    np.testing.assert_allclose(np.arctan2(up[:, 0], -up[:, 1]), 0, atol=1e-6)


def test_store_keeps_a_mesh_object(
    estimator: PoseEstimator, registered: RegisteredObject, mesh_file: Path, tmp_path: Path
) -> None:
    """After a restart the mesh file is not needed, and answers are the same."""
    store = ObjectStore(tmp_path)
    store.save(registered)
    report = store.load_all(estimator.predictor)
    assert not report.problems
    frame = frame_of(read_mesh(mesh_file), look_at(np.array([1.0, 0.5, 0.4])), np.array([0.0, 0.0, 0.9]))
    before, after = estimator.estimate_frame(frame, [registered, report.objects[0]], prior="free")
    assert np.degrees(geodesic_distance(before.R_camera_object, after.R_camera_object)) < 0.5
    np.testing.assert_allclose(before.t_camera_object, after.t_camera_object, atol=2e-3)


def test_diameter_scales(mesh_file: Path) -> None:
    """A mesh of unknown unit is scaled about its own origin."""
    mesh = read_mesh(mesh_file, object_diameter=1.0)
    assert mesh.normalised()[1] == pytest.approx(0.5, rel=1e-5)


def test_bad_files_are_refused_with_a_reason(tmp_path: Path, mesh_file: Path) -> None:
    """What, where, what to do."""
    (tmp_path / "broken.glb").write_bytes(b"not a mesh")
    (tmp_path / "notes.txt").write_text("hello")
    trimesh.Trimesh(vertices=np.zeros((3, 3)), faces=[[0, 1, 2]], process=False).export(tmp_path / "point.ply")
    giant = trimesh.load(mesh_file, force="mesh")
    giant.apply_scale(1000).export(tmp_path / "millimetres.ply")
    for name, reason in (
        ("missing.glb", "no file"),
        ("notes.txt", "not a mesh"),
        ("broken.glb", "cannot be read"),
        ("point.ply", "no triangles"),
        ("millimetres.ply", "millimetres"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            read_mesh(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "folder.glb").mkdir()
    with pytest.raises(InputError, match="no file"):
        read_mesh(tmp_path / "folder.glb")
    with pytest.raises(InputError, match="not a positive length"):
        read_mesh(mesh_file, object_diameter=-1.0)
