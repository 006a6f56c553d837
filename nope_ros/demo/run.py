"""The whole on one recorded sequence: the real node as its own process, fed over ROS topics, drawn and scored.

    nope-ros demo                                   the sequence that comes with the package
    nope-ros demo --data <folder or bag>            any other (see nope_ros.recording)

Writes a video (overlay.mp4, overlay.gif), overview.png, contact_sheet.png, distribution.png, poses.mcap, frames.csv and
summary.json. The true poses of a sequence are for scoring; the node is given the distance of the first frame, so that
its translations are in metres, and gravity, as a robot's TF would.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from nope_ros import draw
from nope_ros.demo.score import FrameScore, figures, percentiles, score_frame, within
from nope_ros.distribution import Ambiguity
from nope_ros.frame import Frame, InputError
from nope_ros.prior import PRIORS
from nope_ros.recording import Moment, Recording, open_recording, packaged
from nope_ros.refine import DEFAULT_REFINEMENT, REFINEMENTS

if TYPE_CHECKING:
    from nope_ros.demo.session import Answer, Run

Array = NDArray[np.float64]
Report = Callable[[str, int, int], None]

_GIF_FRAMES = 45
_GIF_WIDTH = 720
_SHEET_FRAMES = 24
_STRIP_FRAMES = 5
_VIDEO_RATE = 10
_PANEL = (640, 480)
_SAFE = re.compile(r"[^A-Za-z0-9_]+")


def bundled_sequence() -> Path:
    """The sequence that comes with the package."""
    path = packaged("demo/sequence")
    if path is not None:
        return path
    raise InputError("demo/sequence is not here; run this in a checkout of nope_ros, or name a folder with --data")


def summarise(run: Run, scores: Sequence[FrameScore | None], data: str) -> dict[str, Any]:
    """What summary.json holds. The reference's own frame, the first, is not scored."""
    scored = [score for score in scores[1:] if score is not None]
    near = within(scored)
    latencies = [1000 * answer.latency for answer in run.answers if answer.latency is not None]
    poses = [answer.pose for answer in run.answers if answer.pose is not None]
    priors = Counter(pose.prior for pose in poses)
    all_figures = figures(scored)
    node = {
        name: _number(run.diagnostics.get(key))
        for name, key in (("p50", "latency p50 (ms)"), ("p95", "latency p95 (ms)"))
    }
    return {
        "data": data,
        "frames": len(run.answers),
        "poses": len(poses),
        "trusted": sum(pose.trusted for pose in poses),
        "templates": run.registration.template_count,
        "registration_seconds": round(run.registration_seconds, 3),
        "latency_ms": percentiles(latencies),
        "latency_node_ms": node,
        "rotation_error_deg": all_figures["rotation_error_deg"],
        "acc15": all_figures["acc15"],
        "acc30": all_figures["acc30"],
        "translation_error_relative_median": all_figures["translation_error_relative_median"],
        "scored_frames": all_figures["frames"],
        "within_90": figures(near),
        "prior": priors.most_common(1)[0][0] if priors else None,
        "gravity": run.diagnostics.get("gravity"),
        "device": run.diagnostics.get("device"),
        "model": run.diagnostics.get("model"),
        "resent_frames": run.resent,
        "truth": run.answers[0].truth is not None,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


_ANSWERS = {
    Ambiguity.UNIQUE: "one answer",
    Ambiguity.FINITE: "several answers",
    Ambiguity.AXIAL: "free about an axis",
    Ambiguity.UNINFORMATIVE: "hardly any answer",
}


# --- pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What the pictures need of one frame besides its image."""

    index: int
    answer: Answer
    score: FrameScore | None


class Pictures:
    """Draws the answers of one run, frame by frame.

    Args:
        run: what the node said.
        first: the reference frame.
    """

    def __init__(self, run: Run, first: Moment) -> None:
        from nope_ros.demo.player import ReferenceFrame

        self._run = run
        self._reference_truth = first.truth
        frame = Frame.from_arrays(first.image, first.mask, first.camera)
        self._reference = draw.mask_only(frame.image, frame.mask)
        # Where no object frame was chosen at registration, axes are drawn in the one that would have been.
        chosen = ReferenceFrame.of(first, 1.0, first.gravity_camera)
        self._R_reference = run.reference_R
        self._R_object_drawn = run.reference_R.T @ chosen.R_camera_object
        direction = draw.viewing_directions(run.reference_R[None], chosen.t_camera_object)[0]
        self._globe = draw.Globe.around(direction, self._R_object_drawn[:, 2])
        self._viewpoint = draw.Viewpoint.of("reference", run.reference_R, chosen.t_camera_object, self._globe)

    def overlay(self, moment: Moment, shown: Shown, width: int, height: int) -> draw.Picture:
        """A frame, or its part around a small object, with outline and axes."""
        frame = Frame.from_arrays(moment.image, moment.mask, moment.camera)
        image, mask, K = draw.zoomed(frame.image, frame.mask, frame.camera.K, width, height)
        pose = shown.answer.pose
        if pose is None:
            return draw.draw_outline(image, mask, draw.FAINT)
        (R, t), *others = [self._pose(mode.pose) for mode in pose.modes]
        drawn = draw.Drawn(
            R_camera_object=R @ self._R_object_drawn,
            t_camera_object=t,
            axis_length=draw.axis_length(mask, t, K),
            confidence=pose.confidence,
            ambiguity=Ambiguity(pose.ambiguity),
            label=pose.object_id,
            trusted=pose.trusted,
            mask=mask,
            others=tuple(
                (R @ self._R_object_drawn, t, mode.score) for (R, t), mode in zip(others, pose.modes[1:], strict=True)
            ),
        )
        return draw.overlay(image, K, [drawn])

    def distribution(self, shown: Shown, width: int) -> draw.Picture:
        """The globe and the dial."""
        distribution, pose = shown.answer.distribution, shown.answer.pose
        if distribution is None or pose is None:
            height = round(480 * width / 420)
            return np.full((height, width, 3), draw.BACKGROUND, np.uint8)
        xyzw = np.array([[q.x, q.y, q.z, q.w] for q in distribution.orientations])
        R, t = self._pose(pose.pose.pose)
        viewpoints = [self._viewpoint]
        truth = shown.answer.truth
        if truth is not None and self._reference_truth is not None:
            delta = truth.R_camera_object @ self._reference_truth.R_camera_object.T
            viewpoints.append(draw.Viewpoint.of("truth", delta @ self._R_reference, truth.t_camera_object, self._globe))
        viewpoints.append(draw.Viewpoint.of("estimate", R, t, self._globe))
        prior = {"standing": "standing (gravity known)", "upright": "upright (gravity known)"}.get(
            pose.prior, pose.prior
        )
        return draw.draw_distribution(
            _matrices(xyzw),
            np.array(distribution.probabilities),
            t,
            self._globe,
            viewpoints,
            width=width,
            title="seen from where?",
            note=f"prior: {prior} · {_ANSWERS[Ambiguity(pose.ambiguity)]}",
        )

    def panel(self, moment: Moment, shown: Shown) -> draw.Picture:
        """Reference | frame with axes | distribution."""
        facts = []
        pose, score, latency = shown.answer.pose, shown.score, shown.answer.latency
        if pose is not None:
            facts.append(("confidence", f"{100 * pose.confidence:.0f} %"))
        if score is not None:
            facts.append(("turned from reference", f"{score.view_angle_deg:.0f}°"))
            facts.append(("rotation error", f"{score.rotation_error_deg:.1f}°" if pose is not None else "no pose"))
            if score.translation_error_relative is not None:
                facts.append(("translation error", f"{100 * score.translation_error_relative:.1f} %"))
        if latency is not None:
            facts.append(("image to pose", f"{1000 * latency:.0f} ms"))
        return draw.draw_panel(
            self._reference,
            self.overlay(moment, shown, *_PANEL),
            self.distribution(shown, 420),
            query_title=f"frame {shown.index}",
            facts=facts,
            height=_PANEL[1],
        )

    def caption(self, shown: Shown) -> tuple[str, bool | None]:
        """Words under a frame in the contact sheet, and whether it is right."""
        if shown.answer.pose is None:
            return f"{shown.index}  no pose", False
        if shown.index == 0:
            return "0  the reference", None
        if shown.score is None:
            return f"{shown.index}  {100 * shown.answer.pose.confidence:.0f} % confident", None
        error, turned = shown.score.rotation_error_deg, shown.score.view_angle_deg
        return f"{shown.index}  turned {turned:.0f}°, error {error:.0f}°", error <= 30

    @staticmethod
    def _pose(pose: Any) -> tuple[Array, Array]:
        from nope_ros.node.messages import pose_arrays

        return pose_arrays(pose)


def _matrices(xyzw: Array) -> Array:
    from scipy.spatial.transform import Rotation

    return np.asarray(Rotation.from_quat(xyzw).as_matrix(), np.float64)


def draw_all(run: Run, recording: Recording, shown: Sequence[Shown], out: Path, report: Report) -> list[Path]:
    """Video, contact sheet, panel and distribution; returns the files."""
    pictures: Pictures | None = None
    sheet_at = set(np.linspace(0, len(shown) - 1, min(_SHEET_FRAMES, len(shown))).round().astype(int).tolist())
    stride = max(1, -(-len(shown) // _GIF_FRAMES))
    best = _instructive(shown)
    cells: list[draw.Picture] = []
    captions: list[tuple[str, bool | None]] = []
    best_panel: draw.Picture | None = None
    gif: list[Image.Image] = []
    written = []
    video = _Video(out / "overlay.mp4")
    title = recording.name
    for moment, one in zip(recording, shown, strict=False):
        report("drawing", one.index, len(shown))
        pictures = pictures or Pictures(run, moment)
        panel = pictures.panel(moment, one)
        video.add(panel)
        if one.index % stride == 0:
            height = round(panel.shape[0] * _GIF_WIDTH / panel.shape[1])
            gif.append(Image.fromarray(cv2.resize(panel, (_GIF_WIDTH, height), interpolation=cv2.INTER_AREA)))
        if one.index in sheet_at:
            cells.append(pictures.overlay(moment, one, 320, 240))
            captions.append(pictures.caption(one))
        if one.index == best:
            best_panel = panel
            written.append(_write(out / "distribution.png", pictures.distribution(one, 840)))
    report("drawing", len(shown), len(shown))
    words, good = zip(*captions, strict=True)
    columns = min(6, max(3, round(len(cells) ** 0.5 * 1.2)))
    sheet = draw.contact_sheet(cells, words, columns=columns, cell_width=320, title=title, good=good)
    written.insert(0, _write(out / "contact_sheet.png", sheet))
    if best_panel is not None:
        count = min(_STRIP_FRAMES, len(cells))
        some = ((np.arange(count) + 0.5) / count * len(cells)).astype(int)
        strip = draw.contact_sheet(
            [cells[i] for i in some], [words[i] for i in some], columns=len(some), good=[good[i] for i in some]
        )
        written.insert(0, _write(out / "overview.png", draw.stacked(best_panel, strip)))
    written = [*video.close(), _write_gif(out / "overlay.gif", gif, stride), *written]
    return written


def _instructive(shown: Sequence[Shown]) -> int:
    """The frame whose distribution is shown alone: seen from some 60° beside the reference, where it is not trivial."""
    known = [one for one in shown[1:] if one.answer.distribution is not None]
    if not known:
        return 0
    if all(one.score is None for one in known):
        return known[len(known) // 2].index
    return min(known, key=lambda one: abs((one.score.view_angle_deg if one.score else 180) - 60)).index


class _Video:
    """An MPEG-4 file, opened with its first frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def add(self, image: draw.Picture) -> None:
        height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2  # codecs want even sides
        if self._writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self.path), code, _VIDEO_RATE, (width, height))
        self._writer.write(np.ascontiguousarray(image[:height, :width, ::-1]))

    def close(self) -> list[Path]:
        """The file, if this OpenCV could write one."""
        if self._writer is None:
            return []
        opened = self._writer.isOpened()
        self._writer.release()
        return [self.path] if opened and self.path.is_file() and self.path.stat().st_size > 0 else []


def _write(path: Path, image: draw.Picture) -> Path:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path} cannot be written")
    return path


def _write_gif(path: Path, images: Sequence[Image.Image], stride: int) -> Path:
    # One palette for all frames, made from several of them, keeps colours from flickering; no dithering keeps it small.
    sample = images[:: max(1, len(images) // 6)]
    strip = Image.new("RGB", (sample[0].width, sample[0].height * len(sample)))
    for i, image in enumerate(sample):
        strip.paste(image, (0, i * image.height))
    palette = strip.quantize(240, dither=Image.Dither.NONE)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    duration = round(1000 * stride / _VIDEO_RATE)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)
    return path


# --- command line ---------------------------------------------------------------------------------------------------


def _write_frames(path: Path, shown: Sequence[Shown]) -> Path:
    """One line a frame, for those who want to plot."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("frame", "name", "latency_ms", "prior", "confidence", "ambiguity", "trusted"),
                *("view_angle_deg", "rotation_error_deg", "translation_error_relative"),
            ]
        )
        for one in shown:
            pose, score, latency = one.answer.pose, one.score, one.answer.latency
            line: list[Any] = [one.index, one.answer.name, "" if latency is None else round(1000 * latency, 1)]
            if pose is None:
                line += ["", "", "", ""]
            else:
                line += [pose.prior, round(pose.confidence, 4), Ambiguity(pose.ambiguity).name.lower(), pose.trusted]
            if score is None:
                line += ["", "", ""]
            else:
                relative = score.translation_error_relative
                line += [round(score.view_angle_deg, 2), round(score.rotation_error_deg, 2)]
                line.append("" if relative is None else round(relative, 4))
            writer.writerow(line)
    return path


def _scores(run: Run) -> list[FrameScore | None]:
    from nope_ros.node.distro import rotation_matrix
    from nope_ros.node.messages import pose_arrays

    reference = run.answers[0].truth
    scores: list[FrameScore | None] = []
    for answer in run.answers:
        if answer.truth is None or reference is None:
            scores.append(None)
            continue
        delta_R, t, metric = None, None, False
        if answer.pose is not None:
            q = answer.pose.relative_rotation
            delta_R = rotation_matrix(np.array([q.x, q.y, q.z, q.w]))
            t, metric = pose_arrays(answer.pose.pose.pose)[1], answer.pose.metric
        scores.append(score_frame(reference, answer.truth, delta_R, t, metric=metric))
    return scores


def _table(summary: dict[str, Any]) -> Table:
    def show(value: Any, unit: str = "", digits: int = 1) -> str:
        if value is None:
            return "—"
        return f"{value:.{digits}f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    near = summary["within_90"]
    table = Table(title=f"{summary['frames']} frames, {summary['poses']} poses", title_justify="left")
    table.add_column("")
    if not summary["truth"]:
        table.add_column("no true poses, no errors", justify="right")
    else:
        table.add_column(f"all {summary['scored_frames']}", justify="right")
        table.add_column(f"within 90° {near['frames']}", justify="right")
        for name, key in (("Acc30", "acc30"), ("Acc15", "acc15")):
            table.add_row(name, *(show(part[key], " %") for part in (summary, near)))
        for name, key in (("rotation error, median", "median"), ("rotation error, 90 % are below", "p90")):
            table.add_row(name, *(show(part["rotation_error_deg"][key], "°") for part in (summary, near)))
        relative = [part["translation_error_relative_median"] for part in (summary, near)]
        percent = [None if value is None else 100 * value for value in relative]
        table.add_row("translation error, median", *(show(value, " %") for value in percent))
        table.add_section()
    latency, node = summary["latency_ms"], summary["latency_node_ms"]
    table.add_row("image to pose, p50 / p95", f"{show(latency['p50'])} / {show(latency['p95'])} ms")
    table.add_row("in the node, with all its outputs", f"{show(node['p50'])} / {show(node['p95'])} ms")
    table.add_row("registration", show(summary["registration_seconds"], " s", 2))
    table.add_row("prior", show(summary["prior"]))
    table.add_row("model, device", f"{show(summary['model'])}, {show(summary['device'])}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nope-ros demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder or bag; the bundled sequence if it is left out")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--prior", choices=PRIORS, help="what to assume; free keeps gravity back; default: by gravity")
    parser.add_argument(
        "--refinement", default=DEFAULT_REFINEMENT, choices=REFINEMENTS, help="after the templates (%(default)s)"
    )
    parser.add_argument("--tracking", action="store_true", help="follow the object over the frames, not each alone")
    parser.add_argument("--weights", default="", help="folder of weights; the packaged ones if it is left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the network; 0: half of the cores")
    parser.add_argument("--frames", type=int, help="play at most this many, spread over the sequence")
    parser.add_argument("--reference", type=int, default=0, help="which frame of a folder to register (%(default)s)")
    parser.add_argument("--reference-distance", type=float, help="metres from the camera to the object in that frame")
    parser.add_argument("--no-pictures", action="store_true", help="only summary, frames and bag")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    console = Console(stderr=False)
    try:
        from nope_ros.demo import session
        from nope_ros.demo.player import add_topic_arguments
    except ImportError as error:
        console.print(
            f"[red]ROS is not here[/] ({escape(str(error))}): run `make setup`, then source install/setup.bash"
        )
        return 1
    parser = _parser()
    add_topic_arguments(parser)
    bags = parser.add_argument_group("gravity of a bag")
    bags.add_argument("--gravity-frame", default="", help="frame of its TF whose z axis points up, as odom or map")
    bags.add_argument("--imu-topic", default="", help="its sensor_msgs/Imu")
    bags.add_argument(
        "--fixed-frame", default="", help="frame of its TF that the object stands still in, for --tracking"
    )
    given = parser.parse_args(arguments)
    try:
        return _run(given, console)
    except (InputError, session.SessionError) as error:
        # The node's last words hold brackets, which are not rich's.
        console.print(f"[bold red]The demo did not work:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130


def _run(given: argparse.Namespace, console: Console) -> int:
    from nope_ros.demo.player import topics_of
    from nope_ros.demo.session import Options, run_session
    from nope_ros.node.bagfile import write_mcap

    data = Path(given.data) if given.data else bundled_sequence()
    recording = open_recording(
        data, topics=topics_of(given), instance=given.instance, reference=given.reference, limit=given.frames
    )
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    options = Options(
        object_id=_SAFE.sub("_", recording.name).strip("_")[:60] or "object",
        prior=given.prior,
        weights=given.weights,
        device=given.device,
        threads=given.threads,
        reference_distance=given.reference_distance,
        refinement=given.refinement,
        tracking=given.tracking,
        fixed_frame=given.fixed_frame,
        gravity_frame=given.gravity_frame,
        imu_topic=given.imu_topic,
    )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    if progress.tasks[task].total is None:
                        progress.update(task, total=1, completed=1)
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=done, total=total or None)

        run = run_session(recording, options, out, report)
        scores = _scores(run)
        shown = [Shown(index, *both) for index, both in enumerate(zip(run.answers, scores, strict=True))]
        summary = summarise(run, scores, str(given.data or "demo/sequence"))
        files = [out / "summary.json", _write_frames(out / "frames.csv", shown)]
        files[0].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_mcap(out / "poses.mcap", sorted(run.recorded, key=lambda message: message.received))
        files.append(out / "poses.mcap")
        if not given.no_pictures:
            files = draw_all(run, recording, shown, out, report) + files
    console.print(_table(summary))
    for path in files:
        console.print(f"  {path}  [dim]{_size(path)}[/]", highlight=False)
    return 0


def _size(path: Path) -> str:
    kilobytes = path.stat().st_size / 1000
    return f"{kilobytes / 1000:.1f} MB" if kilobytes > 1000 else f"{kilobytes:.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
