"""What is installed, what works, what arrives, and what to do about the rest.

nope-ros doctor                 # this machine, the model, the store; with ROS, the running node and its topics
nope-ros doctor --image-topic /camera/image_raw --camera-info-topic /camera/camera_info --mask-topic /segmentation/mask
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from nope_ros.frame import Camera, InputError

if TYPE_CHECKING:
    from rclpy.node import Node

Level = Literal["ok", "warning", "problem"]
_MARKS: dict[Level, tuple[str, str]] = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red")}
_NEEDED = ("torch", "numpy", "scipy", "opencv-python", "safetensors", "diffusers", "rosbags", "pydantic", "rich")
_ROS_MESSAGES = ("sensor_msgs", "geometry_msgs", "vision_msgs", "tf2_msgs", "visualization_msgs", "diagnostic_msgs")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do if it is not well."""

    level: Level
    what: str
    advice: str = ""


# --- this machine ---------------------------------------------------------------------------------------------------


def installed() -> Iterator[Finding]:
    """Python, libraries, and what a ROS distribution adds."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    versions = {}
    for name in _NEEDED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "opencv-python" and find_spec("cv2") is not None:
                versions[name] = "as python3-opencv or opencv-python-headless"
                continue
            yield Finding("problem", f"{name} is not installed", "pip install . (or make setup) in the checkout")
    yield Finding("ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    if find_spec("rclpy") is None:
        yield Finding(
            "warning",
            "ROS is not here: the library and `nope-ros bag` work, the node does not",
            "source /opt/ros/<distro>/setup.bash, or make setup && source install/setup.bash",
        )
        return
    distro = os.environ.get("ROS_DISTRO")
    yield Finding("ok", f"ROS 2 {distro}" if distro else "ROS 2 from PyPI wheels")
    missing = [name for name in _ROS_MESSAGES if find_spec(name) is None]
    if missing:
        packages = " ".join(f"ros-{distro or '<distro>'}-{name.replace('_', '-')}" for name in missing)
        yield Finding("problem", f"not installed: {', '.join(missing)}", f"apt install {packages}")
    if find_spec("nope_ros.msg") is None:
        yield Finding(
            "problem",
            "the messages of nope_ros are not built, or not sourced",
            "colcon build --packages-select nope_ros && source install/setup.bash",
        )
    if missing:
        return
    from nope_ros.node.distro import providers  # which imports the messages

    stands_in = {"cv_bridge": "OpenCV", "tf2_ros": "a TF listener of our own", "tf_transformations": "SciPy"}
    for name, provider in providers().items():
        if provider == "distribution":
            yield Finding("ok", f"{name}: the distribution has it")
        elif find_spec(name) is None:
            yield Finding("ok", f"{name}: not installed, {stands_in[name]} does its work")
        else:
            yield Finding("ok", f"{name}: installed, but does not fit this Python; {stands_in[name]} does its work")


def device() -> Iterator[Finding]:
    """What the network would run on."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            level: Level = "ok" if free > 1e9 else "warning"
            advice = "" if level == "ok" else "end what uses it, or set device:=cpu, or lower batch_size"
            yield Finding(level, f"cuda:{index}: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free", advice)
        return
    yield Finding("ok", f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads (no CUDA device is seen)")
    if shutil.which("nvidia-smi") and "+cpu" in torch.__version__:
        yield Finding(
            "warning",
            "there is an NVIDIA driver, but torch is the CPU build",
            "install a CUDA build: https://pytorch.org",
        )


def model(weights: str, place: str) -> Iterator[Finding]:
    """Whether the weights load and compute."""
    import numpy as np

    from nope_ros.correspondence import CORRESPONDENCE_WEIGHTS
    from nope_ros.estimator import PoseEstimator
    from nope_ros.latent import WEIGHTS_FILE, find_weights

    try:
        folder = find_weights(weights or None)
        estimator = PoseEstimator.from_pretrained(weights or None, device=place)
        digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        begin = time.perf_counter()
        image = np.zeros((120, 160, 3), np.uint8)
        mask = np.zeros((120, 160), bool)
        mask[30:90, 40:120] = True
        image[30:90, 40:120] = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        K = np.array([[150.0, 0, 80], [0, 150.0, 60], [0, 0, 1]])
        registered = estimator.register(image, mask, K, object_id="doctor")
        pose = estimator.estimate(image, mask, K, registered)
        took = time.perf_counter() - begin
    except (InputError, OSError, RuntimeError) as error:
        yield Finding("problem", str(error), "check the parameters weights and device")
        return
    yield Finding("ok", f"{estimator.model_name} on {estimator.device}, sha256 {digest[:16]}…, from {folder}")
    for weights_folder in (folder, CORRESPONDENCE_WEIGHTS):
        yield from as_shipped(weights_folder)
    if not np.isfinite(pose.R_camera_object).all():
        yield Finding("problem", "the network gives no numbers", "the weights are damaged: install them again")
    else:
        yield Finding("ok", f"an object registered and found in {took:.1f} s (first call, slower than later ones)")


def as_shipped(folder: Path) -> Iterator[Finding]:
    """Whether weights are those that their SHA256SUMS was made from (`make checksums`)."""
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        yield Finding("ok", f"no {sums.name} beside the weights: they are your own")
        return
    other = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        told, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != told:
            other.append(name)
    if other:
        yield Finding(
            "problem",
            f"{', '.join(other)}: not as shipped ({sums} says otherwise)",
            "damaged, or half of an update: install the package again; if you put them there, `make checksums`",
        )
    else:
        yield Finding("ok", f"weights {folder.name} are as shipped")


def store(folder: Path, weights: str) -> Iterator[Finding]:
    """Whether registered objects can be read and written."""
    from nope_ros.estimator import PoseEstimator
    from nope_ros.store import ObjectStore

    folder = folder.expanduser()
    if not folder.exists():
        parent = next(one for one in folder.absolute().parents if one.exists())
        if os.access(parent, os.W_OK):
            yield Finding("ok", f"{folder} will be made when an object is registered")
        else:
            yield Finding("problem", f"{folder} cannot be made: {parent} is read-only", "set storage.directory")
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            "problem",
            f"{folder} cannot be written ({error.strerror})",
            "objects would be lost at a restart: make room there",
        )
    try:
        loaded = ObjectStore(folder).load_all(PoseEstimator.from_pretrained(weights or None, device="cpu").predictor)
    except InputError as error:
        yield Finding("problem", str(error))
        return
    names = ", ".join(one.object_id for one in loaded.objects) or "no object"
    yield Finding("ok", f"{folder}: {names}")
    for problem in loaded.problems:
        yield Finding("warning", problem)


def transport() -> Iterator[Finding]:
    """The middleware and its room for images."""
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    reach = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    rmw = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp")
    yield Finding("ok", f"ROS_DOMAIN_ID {domain}, discovery {reach}, {rmw}: all must be the same for camera and node")
    if "fastrtps" not in rmw:
        return
    profile = os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE") or os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE")
    if not profile:
        yield Finding(
            "warning",
            "no Fast DDS profile: raw images are larger than its shared memory, and parts of them are lost",
            "FASTDDS_DEFAULT_PROFILES_FILE=<nope_ros>/config/fastdds.xml for camera, segmentation and node "
            "(FASTRTPS_DEFAULT_PROFILES_FILE up to Jazzy)",
        )
    elif not Path(profile).is_file():
        yield Finding("problem", f"the Fast DDS profile {profile} is not there", "correct the variable")
    else:
        yield Finding("ok", f"Fast DDS profile {profile}")
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if free < 200e6:
        yield Finding(
            "warning",
            f"/dev/shm has {free / 1e6:.0f} MB left",
            "in a container: docker run --shm-size=1g, or --ipc=host",
        )


# --- topics ---------------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """What came on one topic while we listened.

    Attributes:
        topic: its name.
        publishers: how many there are.
        quality: a mismatch of QoS, or "".
        messages: the last of them.
        stamps: header stamps, ns.
        count: how many came.
    """

    topic: str
    publishers: int = 0
    quality: str = ""
    messages: list[Any] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    count: int = 0


def judge(heard: dict[str, Heard], seconds: float, now: int, *, rectified: bool = False) -> Iterator[Finding]:
    """What is wrong with what came.

    Args:
        heard: for "image", "camera_info" and "mask".
        seconds: how long was listened.
        now: ROS time at the end, ns.
        rectified: as the node's parameter.
    """
    from nope_ros.node import messages

    for kind, one in heard.items():
        if one.publishers == 0:
            yield Finding(
                "problem",
                f"{kind}: nobody publishes {one.topic}",
                f"start what does, or name another with --{_option(kind)}",
            )
        elif one.quality:
            yield Finding(
                "problem", f"{kind}: {one.topic}: {one.quality}", "make them agree: qos_overrides of the node"
            )
        elif one.count == 0:
            yield Finding(
                "problem",
                f"{kind}: {one.topic} has a publisher, but nothing came in {seconds:.0f} s",
                "is it running? Same ROS_DOMAIN_ID? For images, is the Fast DDS profile set on its side?",
            )
        else:
            yield Finding("ok", f"{kind}: {one.topic} at {one.count / seconds:.1f} Hz{_size(one.messages[-1])}")
    image, mask, info = heard["image"], heard["mask"], heard["camera_info"]
    read: dict[str, Any] = {}  # of each kind the newest message, where it can be read
    for kind, one, convert in (
        ("image", image, messages.image_array),
        ("mask", mask, messages.mask_array),
        ("camera_info", info, lambda message: messages.camera(message, rectified=rectified)),
    ):
        if one.messages:
            try:
                read[kind] = convert(one.messages[-1])
            except InputError as error:
                yield Finding("problem", str(error))
        if one.stamps and one.stamps[-1] == 0:
            yield Finding("problem", f"{kind}: header.stamp is zero", "the driver must stamp its messages")
        elif one.stamps and abs(now - one.stamps[-1]) > 5e9:
            behind = (now - one.stamps[-1]) / 1e9
            yield Finding(
                "warning",
                f"{kind}: stamps are {abs(behind):.0f} s {'behind' if behind > 0 else 'ahead of'} this machine's clock",
                "a bag or a simulation? Set use_sim_time. Another machine? Synchronize the clocks (chrony)",
            )
    if image.messages and not image.messages[-1].header.frame_id:
        yield Finding("problem", "image: header.frame_id is empty: no TF can come out", "set it in the camera driver")
    yield from _fit(image, mask, read.get("camera_info"))


def _fit(image: Heard, mask: Heard, camera: Camera | None) -> Iterator[Finding]:
    size = {name: _dimensions(one.messages[-1]) for name, one in (("image", image), ("mask", mask)) if one.messages}
    # The camera's region of interest and binning are applied.
    if camera is not None and size.get("image") and (camera.width, camera.height) != size["image"]:
        yield Finding(
            "problem",
            f"camera_info is for {camera.width}x{camera.height}, the image is {_by(size['image'])}",
            "publish the camera_info of this image; mind binning, ROI and resizing nodes",
        )
    if size.get("mask") and size.get("image") and size["mask"] != size["image"]:
        yield Finding(
            "problem",
            f"the mask is {_by(size['mask'])}, the image {_by(size['image'])}",
            "resize masks (nearest neighbour) to the image",
        )
    if image.stamps and mask.stamps:
        matching = len(set(image.stamps) & set(mask.stamps))
        if matching == 0:
            yield Finding(
                "problem",
                "no mask has the stamp of an image",
                "the segmentation must copy the header of the image it worked on",
            )
        else:
            yield Finding("ok", f"{matching} of {len(mask.stamps)} masks have the stamp of an image that came")


def _dimensions(message: Any) -> tuple[int, int] | None:
    if hasattr(message, "encoding"):
        return message.width, message.height
    from nope_ros.node import messages

    try:
        height, width = messages.image_array(message).shape[:2]
    except InputError:
        return None
    return width, height


def _by(size: tuple[int, int] | None) -> str:
    return "of unknown size" if size is None else f"{size[0]}x{size[1]}"


def _size(message: Any) -> str:
    if hasattr(message, "encoding"):
        return f", {message.width}x{message.height} {message.encoding}"
    return f", {message.format}" if hasattr(message, "format") else f", {message.width}x{message.height}"


def _option(kind: str) -> str:
    return kind.replace("_", "-")


def listen(given: argparse.Namespace) -> Iterator[Finding]:
    """The running node and its topics."""
    import rclpy

    rclpy.init(args=[])
    node = rclpy.create_node("nope_doctor")
    try:
        _spin(node, 1.5)  # until the others are known
        try:
            yield from _node(node, given.node)
            rectified = _switched_on(node, given.node, "rectified")
            if _switched_on(node, given.node, "use_sim_time"):
                node.set_parameters([rclpy.parameter.Parameter("use_sim_time", value=True)])  # stamps are of that clock
        except TimeoutError:
            yield Finding("problem", f"the node {given.node} does not answer", "look at its log; restart it")
            rectified = False
        names = _inputs(node, given)
        if isinstance(names, str):
            yield Finding("warning", names, "name them with --image-topic, --camera-info-topic and --mask-topic")
            return
        heard = _hear(node, names, given.seconds)
        yield from judge(heard, given.seconds, node.get_clock().now().nanoseconds, rectified=rectified)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


def _spin(node: Node, seconds: float) -> None:
    import rclpy

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.05)


def _node(node: Node, name: str) -> Iterator[Finding]:
    from lifecycle_msgs.srv import GetState

    from nope_ros.srv import ListObjects

    found = _ask(node, GetState, f"{name}/get_state", GetState.Request())
    if found is None:
        yield Finding(
            "problem",
            f"no node {name} is running",
            "ros2 launch nope_ros nope.launch.py ...; in a namespace: --node /arm/nope",
        )
        return
    state = found.current_state.label
    if state == "active":
        yield Finding("ok", f"the node {name} is active")
    else:
        yield Finding(
            "problem", f"the node {name} is {state}", f"ros2 lifecycle set {name} activate; its log says why it is not"
        )
    objects = _ask(node, ListObjects, f"{name}/list_objects", ListObjects.Request())
    if objects is not None:
        names = ", ".join(objects.object_ids)
        if names:
            yield Finding("ok", f"registered objects: {names}")
        elif state == "active":
            yield Finding("warning", "no object is registered", f"ros2 service call {name}/register_object ...")


def _switched_on(node: Node, name: str, parameter: str) -> bool:
    """A parameter of the node's; False where there is no node."""
    from rcl_interfaces.srv import GetParameters

    found = _ask(node, GetParameters, f"{name}/get_parameters", GetParameters.Request(names=[parameter]))
    return found is not None and any(value.bool_value for value in found.values)


def _ask(node: Node, kind: Any, name: str, request: Any) -> Any:
    """A service's answer, or None where there is no such service.

    Raises:
        TimeoutError: if it does not answer.
    """
    import rclpy

    client = node.create_client(kind, name)
    if not client.wait_for_service(2.0):
        return None
    future = client.call_async(request)
    rclpy.spin_until_future_complete(node, future, timeout_sec=5)
    if future.result() is None:
        raise TimeoutError(name)
    return future.result()


def _inputs(node: Node, given: argparse.Namespace) -> dict[str, tuple[str, str]] | str:
    """Name and type of each input, or why they are not known."""
    from nope_ros.node.bagfile import CAMERA_INFO_TYPE, COMPRESSED_TYPE, IMAGE_TYPE, Topics, choose_topics

    known = {name: kinds[0] for name, kinds in node.get_topic_names_and_types()}
    space, _, name = given.node.rpartition("/")
    try:
        listened = dict(node.get_subscriber_names_and_types_by_node(name, space or "/"))
    except RuntimeError:  # rclpy's NodeNameNonExistentError
        listened = {}
    own = {name: kinds[0] for name, kinds in listened.items()}
    wanted = Topics(given.image_topic, given.mask_topic, given.camera_info_topic)
    for names in (wanted.image, wanted.mask, wanted.camera_info):
        if names and names not in known:
            known[names] = IMAGE_TYPE if names != wanted.camera_info else CAMERA_INFO_TYPE
    try:
        chosen = choose_topics({**(own or known), **{n: known[n] for n in vars(wanted).values() if n}}, wanted)
    except InputError as error:
        return f"topics: {str(error).replace('the bag', 'the graph')}"
    kinds = {**known, **own}
    if kinds.get(chosen.image) not in (IMAGE_TYPE, COMPRESSED_TYPE):
        kinds[chosen.image] = IMAGE_TYPE
    return {
        "image": (chosen.image, kinds[chosen.image]),
        "camera_info": (chosen.camera_info, CAMERA_INFO_TYPE),
        "mask": (chosen.mask, IMAGE_TYPE),
    }


def _hear(node: Node, names: dict[str, tuple[str, str]], seconds: float) -> dict[str, Heard]:
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import CameraInfo, CompressedImage, Image

    from nope_ros.node.distro import nanoseconds

    types = {one.__name__: one for one in (CameraInfo, CompressedImage, Image)}
    heard = {}
    for kind, (topic, type_name) in names.items():
        one = heard[kind] = Heard(topic)

        def receive(message: Any, one: Heard = one) -> None:
            one.count += 1
            one.stamps.append(nanoseconds(message.header.stamp))
            one.messages[:] = [message]

        # Best effort hears every sender.
        quality = QoSProfile(depth=20, reliability=ReliabilityPolicy.BEST_EFFORT)
        node.create_subscription(types[type_name.rpartition("/")[2]], topic, receive, quality)
        offers = [info.qos_profile for info in node.get_publishers_info_by_topic(topic)]
        asks = [
            info.qos_profile
            for info in node.get_subscriptions_info_by_topic(topic)
            if info.node_name != node.get_name()
        ]
        one.publishers = len(offers)
        for offer in offers:
            for ask in asks:
                if (ask.reliability, offer.reliability) == (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT):
                    one.quality = "a subscriber wants it reliable, the publisher is best effort: they never connect"
                if (ask.durability, offer.durability) == (
                    DurabilityPolicy.TRANSIENT_LOCAL,
                    DurabilityPolicy.VOLATILE,
                ):
                    one.quality = "a subscriber wants it transient local, the publisher is volatile: they never connect"
    _spin(node, seconds)
    return heard


# --- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        prog="nope-ros doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="", help="as the node's parameter")
    parser.add_argument("--device", default="auto", help="as the node's parameter")
    parser.add_argument(
        "--store", type=Path, default=Path("~/.local/share/nope_ros"), help="storage.directory (%(default)s)"
    )
    parser.add_argument("--node", default="/nope", help="name of the node (%(default)s)")
    for name in ("image", "camera-info", "mask"):
        parser.add_argument(f"--{name}-topic", default="", help="topic; by default what the node subscribes to")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to listen (%(default)s)")
    parser.add_argument("--no-live", action="store_true", help="leave the running node and its topics alone")
    given = parser.parse_args(arguments)
    sections = [
        ("Installed", installed()),
        ("Device", device()),
        ("Model", model(given.weights, given.device)),
        ("Registered objects", store(given.store, given.weights)),
    ]
    if find_spec("rclpy") is not None and not given.no_live:
        sections += [("Transport", transport()), ("Node and topics", listen(given))]
    console = Console()
    problems = warnings = 0
    for title, findings in sections:
        console.print(f"\n[bold]{title}[/]")
        for one in findings:
            mark, colour = _MARKS[one.level]
            problems, warnings = problems + (one.level == "problem"), warnings + (one.level == "warning")
            console.print(Text(f"  {mark} ", colour).append(one.what, "default"), soft_wrap=True)
            if one.advice:
                console.print(Text(f"      → {one.advice}", "dim"), soft_wrap=True)
    console.print(f"\n{problems} problems, {warnings} warnings", highlight=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
