"""The shipped weights keep their promises, bounded apart in degrees and in relative distance."""

from pathlib import Path

import numpy as np
import pytest

from nope_ros.demo.score import figures, score_frame, within
from nope_ros.estimator import PoseEstimator
from nope_ros.frame import Frame
from nope_ros.recording import open_recording

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "real"


def judged(estimator, folder, prior, step=1):
    moments = list(open_recording(folder))[::step]
    frames = [Frame.from_arrays(moment.image, moment.mask, moment.camera) for moment in moments]
    gravity = [None if prior == "free" else moment.gravity_camera for moment in moments]
    reference = moments[0].truth
    registered = estimator.register_frame(
        frames[0], reference_distance=float(np.linalg.norm(reference.t_camera_object)), gravity_camera=gravity[0]
    )
    scores, inside = [], []
    for moment, frame, down in list(zip(moments, frames, gravity, strict=True))[1:]:
        (pose,) = estimator.estimate_frame(frame, [registered], prior=prior, gravity_camera=down)
        scores.append(score_frame(reference, moment.truth, pose.delta_R, pose.t_camera_object, metric=pose.metric))
        inside.append(pose.confidence)
    return scores, np.array(inside)


def test_bundled_sequence_within_90_degrees(estimator):
    scores, _ = judged(estimator, ROOT / "demo" / "sequence", "standing")
    found = figures(within(scores))
    assert found["frames"] > 55
    assert found["acc30"] >= 97
    assert found["rotation_error_deg"]["median"] < 5
    assert found["translation_error_relative_median"] < 0.06


def test_bundled_sequence_without_gravity_still_beats_guessing(estimator):
    refined, _ = judged(estimator, ROOT / "demo" / "sequence", "free", step=3)
    assert figures(within(refined))["acc30"] >= 95
    templates = PoseEstimator(estimator.predictor, refinement="none")
    scores, confidence = judged(templates, ROOT / "demo" / "sequence", "free", step=3)
    assert figures(within(scores))["acc30"] >= 85
    wrong = np.array([score.rotation_error_deg > 30 for score in scores])
    assert confidence[wrong].mean() < confidence[~wrong].mean(), "unsure where it errs"


@pytest.mark.parametrize(
    "name, degrees, relative",
    [("ferrari", 12, 0.03), ("mango", 6, 0.06), ("earpods_case", 10, 0.08), ("scotch_box", 6, 0.1)],
)
def test_photographs(estimator, name, degrees, relative):
    if not (PHOTOGRAPHS / name).is_dir():
        pytest.skip(f"no photographs of {name} beside the checkout (../shared/data/real)")
    scores, _ = judged(estimator, PHOTOGRAPHS / name, "standing")
    found = figures(within(scores))
    assert found["rotation_error_deg"]["median"] < degrees  # guessing a yaw gives 90
    assert found["translation_error_relative_median"] < relative
