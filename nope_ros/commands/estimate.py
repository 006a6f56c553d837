"""Poses in a recorded sequence, estimated by the library in this process: the same as the node's, without ROS.

nope-ros estimate demo/sequence --out out/estimate
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nope_ros.demo.score import FrameScore, figures, percentiles, score_frame, within
from nope_ros.draw import Drawn, overlay
from nope_ros.estimator import PoseEstimator
from nope_ros.frame import Frame, InputError
from nope_ros.pose import PoseEstimate
from nope_ros.prior import PRIORS
from nope_ros.recording import Moment, open_recording
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS
from nope_ros.tracking import Tracker


def as_json(moment: Moment, estimate: PoseEstimate) -> dict[str, Any]:
    """A pose in plain values: lengths in metres if ``metric``, rotations as matrices."""
    return {
        "name": moment.name,
        "R_camera_object": estimate.R_camera_object.tolist(),
        "t_camera_object": estimate.t_camera_object.tolist(),
        "metric": estimate.metric,
        "delta_R": estimate.delta_R.tolist(),
        "covariance": estimate.covariance.tolist(),
        "confidence": estimate.confidence,
        "ambiguity": estimate.ambiguity.name.lower(),
        "modes": [
            {"R_camera_object": mode.R_camera_object.tolist(), "score": mode.probability} for mode in estimate.modes
        ],
        "similarity": estimate.similarity,
        "prior": estimate.prior,
        "stage": estimate.stage,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="nope-ros estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="folder with poses.json, images and masks; its poses may be left out")
    parser.add_argument("--out", type=Path, help="folder for poses.json and overlays")
    parser.add_argument("--prior", choices=PRIORS, help="what to assume; free keeps gravity back; default: by gravity")
    parser.add_argument("--weights", help="folder of weights; the packaged ones if it is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    parser.add_argument(
        "--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="after the templates (%(default)s)"
    )
    parser.add_argument("--tracking", action="store_true", help="follow the object over the frames, not each alone")
    parser.add_argument(
        "--camera-motion",
        action="store_true",
        help="let tracking know how the camera turned, as TF would tell, from the true poses of an object that stands",
    )
    parser.add_argument("--frames", type=int, help="at most this many, spread over the sequence")
    parser.add_argument("--reference", type=int, default=0, help="which frame to register (%(default)s)")
    parser.add_argument("--reference-distance", type=float, help="metres from the camera to the object in that frame")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        return _run(given, console)
    except InputError as error:
        console.print(f"[bold red]nope-ros estimate:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


def _run(given: argparse.Namespace, console: Console) -> int:
    recording = open_recording(given.data, reference=given.reference, limit=given.frames)
    estimator = PoseEstimator.from_pretrained(given.weights, device=given.device, refinement=given.refinement)
    registered, reference = None, None
    tracker = Tracker() if given.tracking else None
    poses: list[dict[str, Any]] = []
    scores: list[FrameScore] = []
    seconds: list[float] = []
    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise InputError(f"--out: {given.out} cannot be made ({problem.strerror})") from None
    for moment in recording:
        gravity = None if given.prior == "free" else moment.gravity_camera
        frame = Frame.from_arrays(moment.image, moment.mask, moment.camera)
        if registered is None:
            reference = moment.truth
            distance = given.reference_distance
            if distance is None and reference is not None:
                distance = float(np.linalg.norm(reference.t_camera_object))
            registered = estimator.register_frame(
                frame, object_id=recording.name, reference_distance=distance, gravity_camera=gravity
            )
        begin = time.perf_counter()
        query = estimator.look(frame, gravity)
        estimate = estimator.match(query, registered, given.prior)
        if tracker is not None:
            truth = moment.truth if given.camera_motion else None
            R_fixed_camera = None if truth is None else truth.R_camera_object.T
            stamp = None if moment.stamp is None else moment.stamp / 1e9
            estimate = tracker.update(query, registered, estimate, stamp, R_fixed_camera)
        estimate = estimator.refine(query, registered, estimate)
        if tracker is not None:
            estimate = tracker.refined(query, registered, estimate)
        seconds.append(time.perf_counter() - begin)
        poses.append(as_json(moment, estimate))
        if reference is not None and moment.truth is not None:
            t = estimate.t_camera_object
            scores.append(score_frame(reference, moment.truth, estimate.delta_R, t, metric=estimate.metric))
        if given.out is not None:
            drawn = overlay(frame.image, frame.camera.K, [Drawn.of(estimate, frame.mask, frame.camera.K)])
            cv2.imwrite(str(given.out / f"{len(poses) - 1:04d}.jpg"), drawn[..., ::-1])
    if given.out is not None:
        (given.out / "poses.json").write_text(json.dumps(poses, indent=1) + "\n", encoding="utf-8")
    latency = percentiles([1000 * value for value in seconds])
    speed = f"{latency['p50']} ms a frame (p95 {latency['p95']} ms), {estimator.model_name} on {estimator.device}"
    if len(scores) < 2:
        why = "there is one frame only" if len(poses) < 2 else "the folder has no true poses"
        console.print(f"{len(poses)} frames; nothing to compare: {why}. {speed}", highlight=False, soft_wrap=True)
        return 0
    table = Table(title=f"{recording.name}: {len(poses)} frames, prior {poses[-1]['prior']}", title_justify="left")
    for column in ("", "frames", "Acc30 %", "error, median °", "90 % below °"):
        table.add_column(column, justify="left" if not column else "right")
    for name, part in (("all", scores[1:]), ("within 90°", within(scores[1:]))):
        of = figures(part)
        error = of["rotation_error_deg"]
        table.add_row(name, *(str(value) for value in (of["frames"], of["acc30"], error["median"], error["p90"])))
    console.print(table)
    console.print(speed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
