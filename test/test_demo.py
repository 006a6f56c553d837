"""The bundled sequence is what it says it is, and the demo runs the real node on it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from nope_ros.demo import player
from nope_ros.demo.score import figures, percentiles, score_frame, within
from nope_ros.frame import Camera, InputError
from nope_ros.latent import DEFAULT_WEIGHTS
from nope_ros.recording import FolderRecording, Moment, Topics, Truth, choose_topics, open_recording, packaged
from nope_ros.rotations import exp, geodesic_distance, look_at, turn_to

ROOT = Path(__file__).resolve().parent.parent
SEQUENCE = ROOT / "demo" / "sequence"
FIELDS = {"file", "mask", "width", "height", "K", "R", "t", "bbox_xywh"}


@pytest.fixture(scope="module")
def poses():
    return json.loads((SEQUENCE / "poses.json").read_text())


# --- the bundled sequence ---------------------------------------------------------------------------------------------


def test_layout(poses):
    assert {"images", "up", "object", "convention"} <= poses.keys()
    assert len(poses["images"]) == 90
    points = np.load(SEQUENCE / "visual_hull_points.npy")
    assert points.ndim == 2 and points.shape[1] == 3
    for entry in poses["images"]:
        assert entry.keys() >= FIELDS
        image = cv2.imread(str(SEQUENCE / entry["file"]))
        mask = cv2.imread(str(SEQUENCE / entry["mask"]), cv2.IMREAD_UNCHANGED)
        assert image.shape == (480, 640, 3) == (entry["height"], entry["width"], 3)
        assert mask.shape == (480, 640) and set(np.unique(mask)) == {0, 255}
        x, y, w, h = cv2.boundingRect(mask)
        assert [x, y, w, h] == entry["bbox_xywh"]
        assert not entry["mask_touches_border"] and min(x, y) > 0 and x + w < 640 and y + h < 480
        R = np.array(entry["R"])
        assert np.allclose(R @ R.T, np.eye(3), atol=1e-7) and np.linalg.det(R) > 0


def test_size_is_a_few_megabytes():
    assert sum(path.stat().st_size for path in SEQUENCE.rglob("*") if path.is_file()) < 4e6


def test_masks_lie_where_the_poses_put_the_object(poses):
    points = np.load(SEQUENCE / "visual_hull_points.npy")
    assert np.abs(points.min(0) + points.max(0)).max() < 0.004, "the origin is the middle of the box"
    for entry in poses["images"][::7]:
        mask = cv2.imread(str(SEQUENCE / entry["mask"]), cv2.IMREAD_UNCHANGED)
        camera = points @ np.array(entry["R"]).T + entry["t"]
        pixels = camera @ np.array(entry["K"]).T
        pixels = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int)
        assert (mask[pixels[:, 1], pixels[:, 0]] > 0).mean() > 0.97
        hull = cv2.convexHull(pixels.astype(np.int32))
        assert cv2.contourArea(hull) > 0.9 * cv2.contourArea(
            cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
        )


def test_camera_moves_as_promised(poses):
    """Around to beyond 90° both ways, from 15° to 60° above, near and far, not quite level; mostly near the start."""
    R = np.array([entry["R"] for entry in poses["images"]])
    t = np.array([entry["t"] for entry in poses["images"]])
    eyes = -np.einsum("nji,nj->ni", R, t)
    directions = eyes / np.linalg.norm(eyes, axis=1, keepdims=True)
    angle = np.degrees(np.arccos(np.clip(directions @ directions[0], -1, 1)))
    assert 0.65 < (angle < 90).mean() < 0.85
    assert angle.max() > 95
    elevation = np.degrees(np.arcsin(directions @ poses["up"]))
    assert 14 < elevation.min() < 20 and 50 < elevation.max() < 60
    distance = np.linalg.norm(t, axis=1)
    assert distance.max() / distance.min() > 1.25
    up = R @ np.array(poses["up"])
    roll = np.degrees(np.arctan2(up[:, 0], -up[:, 1]))
    assert 4 < np.abs(roll).max() < 25
    jump = np.degrees(np.arccos(np.clip((directions[1:] * directions[:-1]).sum(1), -1, 1)))
    assert jump.max() < 15, "a video, not a set of photographs"


def test_gravity_of_a_moment_points_down(poses):
    for moment in FolderRecording(SEQUENCE, limit=8):
        assert np.linalg.norm(moment.gravity_camera) == pytest.approx(1)
        assert moment.gravity_camera[1] > 0.3, "down in the image"
        assert moment.gravity_camera[2] > 0, "away from a camera that looks down"
        assert -moment.truth.R_camera_object.T @ moment.gravity_camera == pytest.approx(poses["up"], abs=1e-6)


def test_script_makes_the_same_frame_again(poses):
    make_sequence = pytest.importorskip("nope_ros.training.make_sequence", reason="needs numba, of the training extra")
    shot = make_sequence.shots()[0]
    entry = poses["images"][0]
    assert shot.R_camera_object == pytest.approx(np.array(entry["R"]), abs=1e-6)
    assert shot.t_camera_object == pytest.approx(np.array(entry["t"]), abs=1e-6)
    image, mask = make_sequence.photograph(shot, 0)
    bundled = cv2.imread(str(SEQUENCE / entry["file"]))[..., ::-1]
    # JPEG, and fonts and rounding of other versions, may differ; the picture may not.
    assert np.abs(image.astype(int) - bundled).mean() < 4
    assert (mask != (cv2.imread(str(SEQUENCE / entry["mask"]), cv2.IMREAD_GRAYSCALE) > 127)).sum() < 100
    again, _ = make_sequence.photograph(shot, 0)
    assert (again == image).all()


# --- reading ----------------------------------------------------------------------------------------------------------


def test_frames_are_spread_and_the_reference_comes_first():
    names = [moment.name for moment in open_recording(SEQUENCE, limit=4)]
    assert names[0] == "0000.jpg" and names[-1] == "0089.jpg" and len(names) == 4
    names = [moment.name for moment in open_recording(SEQUENCE, reference=40, limit=3)]
    assert names[0] == "0040.jpg"
    assert len(open_recording(SEQUENCE)) == 90


def test_poses_may_be_left_out(tmp_path, poses):
    write_folder(tmp_path, poses, lambda entry: [entry.pop(key) for key in ("R", "t")])
    moments = list(open_recording(tmp_path))
    assert all(moment.truth is None and moment.gravity_camera is None for moment in moments)


def write_folder(folder, poses, change=lambda entry: None, count=2):
    entries = [dict(entry) for entry in poses["images"][:count]]
    for entry in entries:
        for key in ("file", "mask"):
            entry[key] = str(SEQUENCE / entry[key])
        change(entry)
    (folder / "poses.json").write_text(json.dumps({**poses, "images": entries}))


def test_bad_folders_are_refused_with_a_reason(tmp_path, poses):
    with pytest.raises(InputError, match="no such"):
        open_recording(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a sequence"):
        open_recording(tmp_path)
    (tmp_path / "poses.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        open_recording(tmp_path)
    (tmp_path / "poses.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="'images' is missing or empty"):
        open_recording(tmp_path)
    whole = (SEQUENCE / poses["images"][0]["file"]).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    for key, value, reason in (
        ("file", "images/none.jpg", "there is no such file"),
        ("file", str(tmp_path / "poses.json"), "cannot be read as an image"),
        ("file", str(tmp_path / "half.jpg"), "half.jpg: cannot be read as an image .*truncated"),
        ("mask", None, r"image 0 \('.*'\): has no mask"),
        ("t", None, "has no t"),
        ("R", (2 * np.eye(3)).tolist(), "not a rotation"),
        ("K", np.zeros((3, 3)).tolist(), "K is not three rows of three numbers with focal lengths above 0"),
        ("K", "abc", "K is not three rows"),
        ("t", [0, 0, float("nan")], "three numbers"),
    ):
        write_folder(tmp_path, poses, lambda entry, key=key, value=value: entry.update({key: value}))
        with pytest.raises(InputError, match=reason):
            list(open_recording(tmp_path))
    with pytest.raises(InputError, match="reference: 7"):
        open_recording(tmp_path, reference=7)
    # Poses that are not asked for may be anything, and masks may be of zeros and ones.
    write_folder(tmp_path, poses, lambda entry: entry.update(R="north", t=None))
    (moment, _) = open_recording(tmp_path, posed=False)
    assert moment.truth is None and moment.gravity_camera is None
    cv2.imwrite(str(tmp_path / "ones.png"), moment.mask.astype(np.uint8))
    write_folder(tmp_path, poses, lambda entry: entry.update(mask=str(tmp_path / "ones.png")))
    assert (next(iter(open_recording(tmp_path))).mask == moment.mask).all()


def write_folder_with_depth(folder, poses, unit=1.0):
    """A walk whose poses are in some unit, and whose depth is the object's distance all over, as PNG in millimetres."""
    (folder / "depth").mkdir()

    def change(entry):
        distance = np.linalg.norm(entry["t"])
        entry["depth"] = f"depth/{Path(entry['file']).stem}.png"
        millimetres = np.full((480, 640), round(1000 * distance), np.uint16)
        millimetres[:40] = 0  # the sensor saw nothing there
        cv2.imwrite(str(folder / entry["depth"]), millimetres)
        entry["t"] = [unit * one for one in entry["t"]]

    write_folder(folder, {**poses, "images": poses["images"][::9]}, change, count=10)


def test_depth_of_a_folder_is_metres(tmp_path, poses):
    write_folder_with_depth(tmp_path, poses)
    for moment in open_recording(tmp_path):
        assert moment.depth.shape == moment.mask.shape and not moment.depth[:40].any()
        assert moment.depth[100, 100] == pytest.approx(np.linalg.norm(moment.truth.t_camera_object), abs=6e-4)
    assert next(iter(open_recording(SEQUENCE))).depth is None
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((480, 640), 7, np.uint8))
    write_folder(tmp_path, poses, lambda entry: entry.update(depth="grey.png"))
    with pytest.raises(InputError, match="16 bits and one channel"):
        list(open_recording(tmp_path))


def test_depth_of_a_walk_gives_metres_where_its_poses_do_not(estimator, tmp_path, poses, capsys):
    from nope_ros.cli import main
    from nope_ros.store import ObjectStore

    write_folder_with_depth(tmp_path, poses, unit=7.0)
    words = ["register", "lorry", "--folder", str(tmp_path), "--store", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--not-metric"]) == 0
    assert "lengths: metres, by depth" in capsys.readouterr().out
    (lorry,) = ObjectStore(tmp_path).load_all(estimator.predictor).objects
    true = np.linalg.norm(poses["images"][0]["t"])
    assert lorry.metric
    # The flat depth lies at the centre, and half a radius in front of it is where a surface is expected.
    assert lorry.reference.distance == pytest.approx(true, rel=0.15)
    assert main([*words, "--not-metric"]) == 2
    assert "'lorry' is registered" in (said := capsys.readouterr().err) and "--overwrite replaces it" in said
    assert main([*words, "--overwrite", "--reference-distance", "0.5"]) == 2
    assert "--reference-distance: the camera poses are in metres already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folder", "walk", "--fixed-frame", "map"], "--fixed-frame does not go with --folder, only with --bag"),
        (["--video", "w.mp4", "--fixed-frame", "map"], "--fixed-frame does not go with --video"),
        (["--bag", "w.mcap", "--fixed-frame", "map", "--poses", "none"], "--fixed-frame takes camera poses from TF"),
        (["--bag", "w.mcap", "--fixed-frame", "map", "--poses", "tum.txt"], "--poses tum.txt does not; give one"),
        (["--bag", "w.mcap", "--poses", "walk/poses.json"], "a bag has stamps"),
        (["--bag", "w.mcap", "--masks", "m.mp4"], "--masks does not go with --bag, only with --video"),
        (["--folder", "walk", "--camera", "c.yaml"], "--camera does not go with --folder"),
        (["--folder", "walk", "--up", "z"], "--up does not go with --folder, only with --mesh"),
        (["--bag", "w.mcap", "--ordered"], "--ordered does not go with --bag, only with --folder"),
        (["--folder", "walk", "--instance", "2"], "--instance does not go with --folder"),
        (["--folder", "walk", "--depth-topic", "/d"], "--depth-topic does not go with --folder"),
        (["--folder", "walk", "--imu-topic", "/imu"], "--imu-topic does not go with --folder"),
        (["--mesh", "m.glb", "--poses", "p.txt"], "--poses does not go with --mesh, only with --folder or --bag"),
        (["--mesh", "m.glb", "--reference-distance", "1"], "--reference-distance does not go with --mesh"),
        (["--mesh", "m.glb", "--keyframes", "8"], "--keyframes does not go with --mesh"),
        (["--mesh", "m.glb", "--z-up"], "--z-up does not go with --mesh"),
        (["--folder", "walk", "--poses", "none", "--z-up"], "--z-up is about camera poses, and there are none"),
        (["--bag", "w.mcap", "--not-metric"], "--not-metric is about camera poses, and there are none"),
    ],
)
def test_register_refuses_options_of_another_source(words, said, tmp_path, capsys):
    from nope_ros.cli import main

    assert main(["register", "mug", *words, "--store", str(tmp_path / "store")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_folder_without_its_poses_has_no_gravity_either(poses):
    from nope_ros.commands.register import Source

    assert all(view.pose is not None and view.gravity_camera is not None for view in Source(SEQUENCE).walk(32).views)
    without = Source(SEQUENCE, poses="none").walk(32)
    assert len(without.views) == len(poses["images"]) and not without.ordered
    assert all(view.pose is None and view.gravity_camera is None for view in without.views)
    assert Source(SEQUENCE, ordered=True).walk(32).ordered


def test_topics_of_a_bag_are_found_or_asked_for():
    image, mask, info = "sensor_msgs/msg/Image", "sensor_msgs/msg/Image", "sensor_msgs/msg/CameraInfo"
    types = {
        "/cam/image_raw": image,
        "/segmentation/mask": mask,
        "/cam/camera_info": info,
        "/tf": "tf2_msgs/msg/TFMessage",
    }
    found = Topics("/cam/image_raw", "/segmentation/mask", "/cam/camera_info")
    assert choose_topics(types, Topics()) == found
    more = {**types, "/cam/image_raw/compressed": "sensor_msgs/msg/CompressedImage", "/depth/image": image}
    assert choose_topics(more, Topics()) == found
    two = {**types, "/other/image_raw": image, "/other/camera_info": info}
    with pytest.raises(InputError, match="2 topics could be the image; name it with --image-topic"):
        choose_topics(two, Topics())
    assert choose_topics(two, Topics(image="/other/image_raw")).camera_info == "/other/camera_info"
    with pytest.raises(InputError, match="no mask topic was found"):
        choose_topics({name: kind for name, kind in types.items() if "mask" not in name}, Topics())
    with pytest.raises(InputError, match="/nothing is not in the bag"):
        choose_topics(types, Topics(mask="/nothing"))


# --- scores -----------------------------------------------------------------------------------------------------------


def truth(azimuth, elevation=0.5, distance=1.0):
    eye = distance * np.array(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
    )
    R = look_at(eye)
    return Truth(R, -R @ eye)


def test_scores_measure_what_they_say():
    reference, query = truth(0.0), truth(np.pi / 2, distance=2.0)
    exact = query.R_camera_object @ reference.R_camera_object.T
    score = score_frame(reference, query, exact, query.t_camera_object, metric=True)
    assert score.rotation_error_deg == pytest.approx(0, abs=1e-5)
    assert score.translation_error_relative == pytest.approx(0)
    assert score.view_angle_deg == pytest.approx(np.degrees(np.arccos(np.sin(0.5) ** 2)))
    off = exp(np.array([0, 0.2, 0])) @ exact
    score = score_frame(reference, query, off, 1.1 * query.t_camera_object, metric=True)
    assert score.rotation_error_deg == pytest.approx(np.degrees(0.2))
    assert score.translation_error_relative == pytest.approx(0.1)
    assert score_frame(reference, query, off, query.t_camera_object, metric=False).translation_error_relative is None


def test_a_missing_pose_counts_as_wrong():
    reference = truth(0.0)
    scores = [
        score_frame(reference, truth(angle), delta, None, metric=True)
        for angle, delta in ((0.1, None), (0.2, truth(0.2).R_camera_object @ reference.R_camera_object.T))
    ]
    assert figures(scores)["acc30"] == 50.0
    assert figures([])["acc30"] is None
    assert figures([])["rotation_error_deg"] == {"median": None, "p90": None}
    assert within([*scores, score_frame(reference, truth(np.pi), None, None, metric=True)]) == scores
    assert percentiles([]) == {"p50": None, "p95": None}
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_lists_and_removes_objects(estimator, tmp_path, capsys):
    from nope_ros.cli import main
    from nope_ros.store import ObjectStore

    moment = next(iter(open_recording(SEQUENCE)))
    registered = estimator.register(moment.image, moment.mask, moment.camera, object_id="mug", reference_distance=0.6)
    ObjectStore(tmp_path).save(registered)
    (tmp_path / "cup.object.safetensors").write_bytes(b"nonsense")
    where = ["--store", str(tmp_path)]
    assert main(["objects", *where]) == 0
    said = capsys.readouterr().out
    assert "mug" in said and "one view" in said and "metres" in said and "cup.object.safetensors" in said
    assert main(["objects", *where, "--remove", "cat"]) == 2
    assert "'cat' is not registered" in capsys.readouterr().err
    assert main(["objects", *where, "--remove", "mug"]) == 0
    assert not ObjectStore(tmp_path).load_all(estimator.predictor).objects


def test_a_command_that_is_stopped_says_so(monkeypatch, capsys):
    from nope_ros import cli
    from nope_ros.commands import objects

    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(objects, "main", interrupted)
    assert cli.main(["objects"]) == 130
    assert capsys.readouterr().err == "nope-ros objects: stopped\n"


def test_command_explains_itself(capsys):
    from nope_ros import cli

    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "nope-ros demo" not in capsys.readouterr().err
    assert cli.main(["dance"]) == 2
    assert "'dance' is unknown" in capsys.readouterr().err
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command.run(["--help"])
        assert ended.value.code == 0
        assert "usage" in capsys.readouterr().out


# --- with ROS ---------------------------------------------------------------------------------------------------------

NO_ROS = "needs ROS 2 and the built interfaces: run `make setup`, then source install/setup.bash"


@pytest.fixture(scope="module")
def ros():
    pytest.importorskip("rclpy", reason=NO_ROS)
    pytest.importorskip("nope_ros.msg", reason=NO_ROS)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    from nope_ros.latent import RotatedLatentPredictor
    from nope_ros.models.rotated_latent import RotatedLatentConfig, RotatedLatentNetwork

    config = RotatedLatentConfig(crop_size=32, widths=(8, 16, 16), bandwidth=2, channels=6, depths=2, lifted_channels=8)
    folder = tmp_path_factory.mktemp("weights")
    RotatedLatentPredictor(RotatedLatentNetwork(config), name="untrained", device="cpu").save_pretrained(folder)
    return folder


def demo(out, *words, timeout=100):
    command = [
        sys.executable,
        "-m",
        "nope_ros.cli",
        "demo",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
        *words,
    ]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_level_transform_holds_gravity_and_nothing_else(ros):
    from nope_ros.demo.player import header, level_transform
    from nope_ros.node.distro import rotation_matrix

    moment = next(iter(open_recording(SEQUENCE)))
    rng = np.random.default_rng(0)
    for down in (*rng.normal(size=(10, 3)), np.array([0, 0, 1.0]), np.array([0, 0, -1.0])):
        transform = level_transform(down, header(moment, 7))
        q = transform.transform.rotation
        R_level_camera = rotation_matrix(np.array([q.x, q.y, q.z, q.w]))
        assert R_level_camera @ down / np.linalg.norm(down) == pytest.approx([0, 0, -1], abs=1e-9)
        # The least turn that does it: its axis is level, so it says nothing about azimuth.
        assert (R_level_camera - R_level_camera.T)[0, 1] == pytest.approx(0, abs=1e-9)
        assert (transform.header.frame_id, transform.child_frame_id) == ("level", moment.frame_id)


def test_reference_frame_is_upright_and_at_the_distance(ros):
    from nope_ros.demo.player import ReferenceFrame

    moment = next(iter(open_recording(SEQUENCE)))
    frame = ReferenceFrame.of(moment, 0.7, moment.gravity_camera)
    R, t = frame.R_camera_object, frame.t_camera_object
    assert np.allclose(R.T @ R, np.eye(3)) and np.linalg.det(R) == pytest.approx(1)
    assert R[:, 2] == pytest.approx(-moment.gravity_camera)
    assert R[:, 0] @ t < 0, "x towards the camera"
    assert np.linalg.norm(t) == pytest.approx(0.7)
    pixel = moment.camera.K @ t
    assert moment.mask[round(pixel[1] / pixel[2]), round(pixel[0] / pixel[2])]
    assert ReferenceFrame.of(moment, 0.7, None).R_camera_object[1, 2] < 0, "up in the image where gravity is unknown"


def test_demo_runs_the_node_on_the_bundled_sequence(ros, untrained, tmp_path):
    from rosbags.highlevel import AnyReader

    shipped = (DEFAULT_WEIGHTS / "model.safetensors").is_file()
    done = demo(tmp_path, "--frames", "6", *([] if shipped else ["--weights", str(untrained)]))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["frames"], summary["poses"]) == (6, 6)
    assert summary["prior"] == "standing" and summary["gravity"] == "TF frame 'level'"
    assert summary["device"] == "cpu" and summary["model"]
    assert 0 < summary["registration_seconds"] < 60
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p95"]
    assert 0 <= summary["rotation_error_deg"]["median"] <= summary["rotation_error_deg"]["p90"] <= 180
    assert 0 <= summary["acc30"] <= 100
    assert summary["translation_error_relative_median"] < 0.3
    assert summary["within_90"]["frames"] < summary["scored_frames"] == 5
    sheet = cv2.imread(str(tmp_path / "contact_sheet.png"))
    assert sheet.shape[1] > 900 and sheet.std() > 20
    assert cv2.imread(str(tmp_path / "distribution.png")).std() > 10
    assert (tmp_path / "overlay.gif").stat().st_size > 1e4
    assert cv2.VideoCapture(str(tmp_path / "overlay.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 6
    with AnyReader([tmp_path / "poses.mcap"]) as bag:
        counts = {connection.topic: connection.msgcount for connection in bag.connections}
        for topic in (
            "/nope/poses",
            "/nope/detections",
            "/nope/distribution",
            "/nope/markers",
            "/nope/objects/lorry/pose",
        ):
            assert counts[topic] == 6, counts
        assert counts["/camera_info"] == counts["/image/compressed"] == 6
        poses = [c for c in bag.connections if c.topic == "/nope/poses"]
        (message, *_) = (bag.deserialize(data, c.msgtype) for c, _, data in bag.messages(connections=poses))
        assert message.poses[0].object_id == "lorry" and message.poses[0].metric
    if not shipped:
        pytest.skip("the demo ran, but with untrained weights: nope_ros/weights/rotated_latent is not there")
    assert summary["within_90"]["acc30"] >= 75
    assert summary["within_90"]["rotation_error_deg"]["median"] < 10
    assert summary["within_90"]["translation_error_relative_median"] < 0.1


def write_bag(path, moments, gravity, depth=None, imu=False):
    """A bag as a robot would record it, masks one frame late.

    Depth is in the image's frame, later than the mask, and lacks that of the second image; depth of a camera beside it
    is there too. The accelerometer feels what gravity says, in the camera's frame.
    """
    from geometry_msgs.msg import TransformStamped, Vector3
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Imu
    from tf2_msgs.msg import TFMessage

    from nope_ros.demo.player import camera_info_message, header, level_transform
    from nope_ros.node import messages
    from nope_ros.node.bagfile import Recorded, write_mcap

    recorded = []
    for i, moment in enumerate(moments):
        stamp = 1_700_000_000_000_000_000 + 100_000_000 * i
        head = header(moment, stamp)
        entries = [
            ("/cam/image", "sensor_msgs/msg/Image", 1, messages.image(head, moment.image)),
            ("/cam/camera_info", "sensor_msgs/msg/CameraInfo", 0, camera_info_message(moment.camera, head)),
            ("/detector/mask", "sensor_msgs/msg/Image", 100_000_003, messages.mask(head, moment.mask)),
        ]
        if gravity:
            level: TransformStamped = level_transform(moment.gravity_camera, head)
            level.header.frame_id = "odom"
            entries.append(("/tf", "tf2_msgs/msg/TFMessage", 2, TFMessage(transforms=[level])))
        if imu:
            felt = Imu(header=head)
            up = -9.8 * moment.gravity_camera / np.linalg.norm(moment.gravity_camera)
            felt.linear_acceleration = Vector3(x=float(up[0]), y=float(up[1]), z=float(up[2]))
            entries.append(("/imu", "sensor_msgs/msg/Imu", 3, felt))
        if depth is not None:
            for topic, frame_id in (("/cam/aligned_depth", head.frame_id), ("/cam/depth", "infrared")):
                its_head = header(replace(moment, frame_id=frame_id), stamp)
                millimetres = np.full(moment.mask.shape, round(1000 * depth[i]), np.uint16)
                measured = messages.image(its_head, np.zeros((*moment.mask.shape, 3), np.uint8))
                measured.encoding, measured.step, measured.data = (
                    "16UC1",
                    2 * moment.mask.shape[1],
                    millimetres.tobytes(),
                )
                if i != 1 or frame_id != head.frame_id:
                    entries.append((topic, "sensor_msgs/msg/Image", 230_000_007, measured))
        recorded += [Recorded(topic, kind, stamp + late, serialize_message(m)) for topic, kind, late, m in entries]
    return write_mcap(path, sorted(recorded, key=lambda message: message.received))


def half_size(moment):
    image = cv2.resize(moment.image, (320, 240), interpolation=cv2.INTER_AREA)
    mask = cv2.resize(moment.mask.astype(np.uint8), (320, 240), interpolation=cv2.INTER_NEAREST) > 0
    K = np.diag([0.5, 0.5, 1]) @ moment.camera.K
    return Moment(moment.name, image, mask, Camera(K, 320, 240), moment.gravity_camera, moment.truth)


def test_bag_is_read_back(ros, tmp_path):
    moments = [half_size(moment) for moment in open_recording(SEQUENCE, limit=4)]
    assert write_bag(tmp_path / "robot.mcap", moments, gravity=True) == 16
    recording = open_recording(tmp_path / "robot.mcap")
    assert recording.topics == Topics("/cam/image", "/detector/mask", "/cam/camera_info")
    read = list(recording)
    assert len(read) == len(recording) == 4
    for before, after in zip(moments, read, strict=True):
        assert (before.image == after.image).all() and (before.mask == after.mask).all()
        assert np.allclose(before.camera.K, after.camera.K)
        assert after.truth is None and after.stamp is not None
    passed_on = [message.topic for moment in read for message in moment.before]
    assert passed_on == ["/tf"] * 4 and read[0].before, "TF comes no later than its frame"
    assert len(list(open_recording(tmp_path, limit=2))) == 2, "the folder that holds the bag will do"
    (tmp_path / "broken.mcap").write_bytes(b"not a bag")
    with pytest.raises(InputError, match="broken"):
        open_recording(tmp_path / "broken.mcap")


def test_rectified_images_of_a_bag_are_not_undistorted_again(ros, tmp_path):
    from nope_ros.commands.register import Source

    moments = [half_size(moment) for moment in open_recording(SEQUENCE, limit=3)]
    bent = [
        replace(one, camera=replace(one.camera, distortion=(-0.3, 0.1, 0.0, 0.0, 0.0), model="plumb_bob"))
        for one in moments
    ]
    write_bag(tmp_path / "rect.mcap", bent, gravity=False)
    for rectified in (False, True):
        cameras = [one.camera for one in open_recording(tmp_path / "rect.mcap", rectified=rectified)]
        assert [one.distorted for one in cameras] == [not rectified] * 3
    plain, right = (Source(bag=tmp_path / "rect.mcap", rectified=one).walk(32).views for one in (False, True))
    straight = [view.crop.image for view in right]
    assert any((view.crop.image != crop).any() for view, crop in zip(plain, straight, strict=True))


def test_depth_of_a_bag_is_that_of_the_image(ros, tmp_path):
    moments = [half_size(moment) for moment in open_recording(SEQUENCE, limit=5)]
    metres = [0.5, 0.6, 0.7, 0.8, 0.9]
    write_bag(tmp_path / "depth.mcap", moments, gravity=False, depth=metres)
    assert all(moment.depth is None for moment in open_recording(tmp_path / "depth.mcap")), "it is asked for"
    found = open_recording(tmp_path / "depth.mcap", depth_topic="")
    assert found.depth_topic == "/cam/aligned_depth"
    read = list(found)
    assert len(read) == 5, "an image whose depth never comes goes without"
    assert [None if one.depth is None else round(float(one.depth[0, 0]), 3) for one in read] == [
        0.5,
        None,
        0.7,
        0.8,
        0.9,
    ]
    named = open_recording(tmp_path / "depth.mcap", depth_topic="/cam/depth")
    assert [round(float(one.depth[0, 0]), 3) for one in named] == metres
    with pytest.raises(InputError, match="no image topic"):
        open_recording(tmp_path / "depth.mcap", depth_topic="/nothing")
    write_bag(tmp_path / "none.mcap", moments, gravity=False)
    assert open_recording(tmp_path / "none.mcap", depth_topic="").depth_topic == ""


@pytest.mark.parametrize("option", ["gravity_frame", "imu_topic"])
def test_gravity_of_a_walk_in_a_bag(ros, tmp_path, option):
    from nope_ros.commands.register import Source

    moments = [half_size(next(iter(open_recording(SEQUENCE))))] * 4  # an IMU is believed at rest
    write_bag(tmp_path / "walk.mcap", moments, gravity=option == "gravity_frame", imu=option == "imu_topic")
    bag = Source(bag=tmp_path / "walk.mcap")
    assert all(view.gravity_camera is None for view in bag.walk(32).views)
    views = replace(bag, **{option: "odom" if option == "gravity_frame" else "/imu"}).walk(32).views
    assert len(views) == 4
    for view, moment in zip(views, moments, strict=True):
        true = moment.gravity_camera / np.linalg.norm(moment.gravity_camera)
        assert np.arccos(np.clip(view.gravity_camera @ true, -1, 1)) < 1e-3
    with pytest.raises(InputError, match=r"/nothing is no sensor_msgs|nothing' was never sent"):
        replace(bag, **{option: "/nothing"}).walk(32)


def write_moving(path, moments, R_map_object):
    """The bag of a robot that carries a camera round: a moving base in a map, and a mount that stays where it is."""
    from geometry_msgs.msg import Quaternion, TransformStamped, Vector3
    from rclpy.serialization import serialize_message
    from scipy.spatial.transform import Rotation
    from tf2_msgs.msg import TFMessage

    from nope_ros.commands.register import Trajectory
    from nope_ros.node.bagfile import Recorded, open_bag, write_mcap

    def transform(parent, child, R, t, when):
        x, y, z, w = (float(one) for one in Rotation.from_matrix(R).as_quat())
        sent = TransformStamped(child_frame_id=child)
        sent.header.frame_id, sent.header.stamp.sec = parent, when // 10**9
        sent.header.stamp.nanosec = when % 10**9
        sent.transform.rotation = Quaternion(x=x, y=y, z=z, w=w)
        sent.transform.translation = Vector3(x=float(t[0]), y=float(t[1]), z=float(t[2]))
        return TFMessage(transforms=[sent])

    write_bag(path, moments, gravity=False)
    start, period = 1_700_000_000_000_000_000, 100_000_000
    with open_bag(path) as reader:
        recorded = [Recorded(c.topic, c.msgtype, when, bytes(data)) for c, when, data in reader.messages()]
    R = np.stack([R_map_object @ moment.truth.R_camera_object.T for moment in moments])
    t = np.stack(
        [
            R_map_object @ (-moment.truth.R_camera_object.T @ moment.truth.t_camera_object) + [4.0, -2.0, 0.7]
            for moment in moments
        ]
    )
    walked = Trajectory(0.1 * np.arange(len(moments)), R, t)
    R_base_camera, t_base_camera = exp(np.array([0.3, -1.1, 0.4])), np.array([0.1, 0.02, 0.5])
    kind = "tf2_msgs/msg/TFMessage"
    mount = transform("base", moments[0].frame_id, R_base_camera, t_base_camera, 0)
    recorded.append(Recorded("/tf_static", kind, start - 5, serialize_message(mount)))
    # TF at stamps of its own, that begin after the first image.
    for when in np.arange(0.2, len(moments) - 1, 0.09):
        R_camera_map, t_camera_map = walked.at(0.1 * float(when))
        R_base_map = R_base_camera @ R_camera_map
        t_base_map = R_base_camera @ t_camera_map + t_base_camera
        stamp = start + int(when * period)
        moved = transform("map", "base", R_base_map.T, -R_base_map.T @ t_base_map, stamp)
        recorded.append(Recorded("/tf", kind, stamp + 3, serialize_message(moved)))
    write_mcap(path, sorted(recorded, key=lambda message: message.received))


def test_a_walk_takes_the_cameras_motion_from_tf(ros, estimator, tmp_path, capsys):
    from nope_ros.cli import main
    from nope_ros.store import ObjectStore

    moments = [half_size(moment) for moment in list(FolderRecording(SEQUENCE))[::6]]
    up = -moments[0].truth.R_camera_object.T @ moments[0].gravity_camera
    R_map_object = exp(np.array([0, 0, 0.8])) @ turn_to(up)
    write_moving(tmp_path / "walk.mcap", moments, R_map_object)
    words = ["register", "mug", "--bag", str(tmp_path / "walk.mcap"), "--store", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--fixed-frame", "map"]) == 0
    said = capsys.readouterr().out
    assert "poses given" in said and "up from gravity" in said and "lengths: metres, by the poses" in said
    assert said.count("no camera pose is known") == 2, "TF began after the first image, and ended before the last"
    (mug,) = ObjectStore(tmp_path).load_all(estimator.predictor).objects
    keyframes = mug.keyframes
    np.testing.assert_allclose(keyframes.R_fixed_object[:, 2], [0, 0, 1], atol=1e-6)
    assert np.linalg.norm(keyframes.t_fixed_object - [4.0, -2.0, 0.7]) < 0.3 * mug.reference.distance
    stamps = {f"{1_700_000_000 + 0.1 * index:.3f}": moment for index, moment in enumerate(moments)}
    truths = [stamps[f"{float(name):.3f}"].truth.R_camera_object for name in keyframes.names]
    for R_found, R_true in zip(keyframes.R_camera_object, truths, strict=True):
        R_expected = R_true @ R_map_object.T @ keyframes.R_fixed_object
        assert np.degrees(geodesic_distance(R_found, R_expected)) < 1.0
    # Laid over a walk of the bag itself, read with the same frame, it stays where it is.
    words_align = ["align", "mug", str(tmp_path / "walk.mcap"), "--fixed-frame", "map", "--store", str(tmp_path)]
    assert main([*words_align, "--device", "cpu", "--out", str(tmp_path / "pair.png"), "--save", "again"]) == 0
    loaded = ObjectStore(tmp_path).load_all(estimator.predictor).objects
    again, mug = sorted(loaded, key=lambda one: one.object_id)
    assert again.object_id == "again" and again.keyframes.provenance.poses == "given"
    assert np.degrees(geodesic_distance(again.reference.R_camera_object, mug.reference.R_camera_object)) < 5
    # In the frame of the robot's own base the camera never moved; and there are frames that nobody sends.
    words.append("--overwrite")
    assert main([*words_align, "--save", "again"]) == 2
    assert "--save: 'again' is registered already" in capsys.readouterr().err
    assert main([*words, "--fixed-frame", "base"]) != 0
    assert "choose a fixed frame in which the camera moves" in capsys.readouterr().err
    assert main([*words, "--fixed-frame", "odom"]) != 0
    assert "frame 'odom' was never sent" in capsys.readouterr().err


def test_demo_plays_a_bag_with_gravity_from_its_tf(ros, untrained, tmp_path):
    write_bag(
        tmp_path / "robot.mcap", [half_size(moment) for moment in open_recording(SEQUENCE, limit=3)], gravity=True
    )
    words = ("--data", str(tmp_path / "robot.mcap"), "--gravity-frame", "odom", "--no-pictures")
    done = demo(tmp_path / "out", *words, "--weights", str(untrained))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["frames"], summary["poses"], summary["prior"]) == (3, 3, "standing")
    assert summary["acc30"] is None and summary["rotation_error_deg"] == {"median": None, "p90": None}
    assert summary["truth"] is False


def test_demo_says_what_is_wrong(ros, untrained, tmp_path):
    done = demo(tmp_path, "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "no such file" in done.stdout
    done = demo(tmp_path, "--weights", str(tmp_path / "none"), "--frames", "2")
    assert done.returncode == 1
    assert "node is not active" in done.stdout and "weights" in done.stdout and "node.log" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_packaged_files_are_found():
    assert packaged("demo/sequence/poses.json") is not None
    assert packaged("config/fastdds.xml") is not None
    assert packaged("nothing/of/the/kind") is None


def test_a_misspelt_option_of_play_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        player.main(["demo/sequence", "--lopp"])
    assert "unknown: --lopp" in capsys.readouterr().err
