"""Set up ROS 2 Kilted and nope_ros on a machine that has no ROS: `.venv/`, then `build/`, `install/` and `log/`.

Needs Python 3.11 or 3.12, a C++ compiler, cmake and make, and nothing else; not root. `make setup` calls it. Each step
leaves a fingerprint of what it was made from in `.venv/setup.json`, and is left out as long as that stays the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "setup.json"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

REQUIREMENTS = [ROOT / name for name in ("requirements.txt", "requirements-dev.txt", "requirements-ros.txt")]
LOCK = ROOT / "requirements-lock.txt"
INTERFACES = ["tf2_msgs", "vision_msgs"]

# What a sourced distribution or workspace adds to the environment. It must not leak into ours.
ROS_VARIABLES = ("AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH", "COLCON_PREFIX_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


def check_machine() -> None:
    """Stop with what is missing and how to get it, before anything is installed."""
    problems = []
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        problems.append(
            f"Python {VERSION} ({sys.executable}): the wheels are for Python 3.11 and 3.12. "
            "Name another with `make setup PYTHON=python3.12`."
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        problems.append(
            f"{header}: Python's headers are missing. On Debian and Ubuntu: apt install python{VERSION}-dev."
        )
    try:
        import ensurepip  # noqa: F401  (its absence is what is being looked for)
        import venv  # noqa: F401
    except ImportError:
        problems.append(f"The venv module is missing. On Debian and Ubuntu: apt install python{VERSION}-venv.")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        problems.append("No C++ compiler. On Debian and Ubuntu: apt install g++.")
    for name in ("cmake", "make"):
        if not shutil.which(name):
            problems.append(f"No {name}. On Debian and Ubuntu: apt install {name}.")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        problems.append(
            f"{sys.platform} on {os.uname().machine}: ROS 2 comes as wheels for x86-64 Linux only. Use a distribution."
        )
    if problems:
        sys.exit("make setup can't start:\n" + "\n".join(f"  * {problem}" for problem in problems))


def fingerprint(parts: Iterable[str | Path]) -> str:
    """Hash of strings, files and the files below folders, with their names."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
            continue
        for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def file_names(*folders: str) -> list[str]:
    """Names of the files below folders, relative to the checkout."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.is_file())


def run(command: Sequence[str | Path], **extra: str) -> None:
    """Run a command in the checkout, with our environment only, and stop where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in ROS_VARIABLES}
    env |= {"PATH": f"{VENV / 'bin'}:{env['PATH']}", "VIRTUAL_ENV": str(VENV), **extra}
    result = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=False)
    if result.returncode:
        sys.exit(f"make setup failed ({result.returncode}): {' '.join(str(word) for word in command)}")


def pip(*arguments: str | Path) -> None:
    """Call the environment's pip: wheels of locked versions, EmPy excepted, which comes as source only."""
    flags = ["--quiet", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--no-binary", "EmPy"]
    # As a variable, the lock also holds for what pip installs to build EmPy.
    run([PYTHON, "-m", "pip", "install", *flags, *arguments], PIP_CONSTRAINT=str(LOCK))


def make_environment() -> None:
    """Create the virtual environment anew."""
    run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", VENV])


def install_wheels() -> None:
    """Install the locked requirements and make the ROS wheels usable on this machine."""
    pip("setuptools")
    pip("torch")  # Alone and first: with everything else in sight, pip may weigh other builds of it for a long time.
    pip(*(word for path in REQUIREMENTS for word in ("-r", path)))
    # opencv-python needs libGL of a desktop. The headless build is the same module without windows.
    if subprocess.run([PYTHON, "-c", "import cv2"], capture_output=True, check=False).returncode:
        print("      opencv-python can't be imported here (no libGL?): opencv-python-headless instead", flush=True)
        run([PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "opencv-python"])
        pip("opencv-python-headless")
    patch_wheels()


def patch_wheels() -> None:
    """Put this interpreter's paths into the wheels' CMake files, which carry those of the machine that built them."""
    tag = f"cp{VERSION.replace('.', '')}"
    built = f"/opt/python/{tag}-{tag}"
    paths = {
        f"{built}/include/python{VERSION}": sysconfig.get_paths()["include"],
        f"{built}/lib/python{VERSION}/site-packages": str(VENV / "lib" / f"python{VERSION}" / "site-packages"),
    }
    for path in (VENV / "share").rglob("*.cmake"):
        text = patched = path.read_text(encoding="utf-8")
        for theirs, ours in paths.items():
            patched = patched.replace(theirs, ours)
        if patched != text:
            path.write_text(patched, encoding="utf-8")


def colcon(*packages: str) -> None:
    """Build packages, given by their folders. Python files are linked, so edits are live."""
    run(
        [
            *[str(VENV / "bin" / "colcon"), "--log-level", "error", "build", "--paths", *packages],
            *["--symlink-install", "--executor", "sequential", "--event-handlers", "console_start_end-"],
            *["--cmake-args", f"-DPython3_EXECUTABLE={PYTHON}", "-DBUILD_TESTING=OFF", "--no-warn-unused-cli"],
        ],
        AMENT_PREFIX_PATH=str(VENV),
        CMAKE_PREFIX_PATH=str(VENV),
        CMAKE_BUILD_PARALLEL_LEVEL=os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(min(os.cpu_count() or 1, 4)),
        COLCON_DEFAULTS_FILE=os.devnull,  # A user's own defaults are for their own workspaces.
    )


def build_interfaces() -> None:
    """Build the message packages a distribution would have; interfaces/COLCON_IGNORE hides them elsewhere."""
    colcon(*(f"interfaces/{name}" for name in INTERFACES))


def build_package() -> None:
    """Build nope_ros and forget the links of files that are gone."""
    colcon(".")
    for path in (ROOT / "install" / "nope_ros").rglob("*"):
        if path.is_symlink() and not path.exists():
            path.unlink()


def install_command() -> None:
    """Install the library, as a link to the checkout, and the `nope-ros` command."""
    pip("--no-deps", "--no-build-isolation", "--editable", ".")


def main() -> None:
    """Do the steps whose fingerprint has changed."""
    check_machine()
    mutex = open(__file__, encoding="utf-8")  # noqa: SIM115  (held until the end)
    fcntl.flock(mutex, fcntl.LOCK_EX)  # A second `make setup` in the same checkout waits for the first.
    base: list[str | Path] = [VERSION, sys.base_prefix, str(VENV)]
    build: list[str | Path] = [*base, ROOT / "requirements-ros.txt", Path(__file__)]
    sources = [ROOT / name for name in ("CMakeLists.txt", "package.xml", "msg", "srv", "scripts")]
    # Python files are linked, not copied: their names matter here, not their content.
    linked = file_names("nope_ros", "launch", "config", "examples")
    steps: list[tuple[str, Callable[[], None], Sequence[str | Path]]] = [
        (f".venv with Python {VERSION}", make_environment, base),
        ("Python packages and ROS 2 Kilted (a few minutes)", install_wheels, [*base, *REQUIREMENTS, LOCK]),
        ("the nope-ros command", install_command, [*base, ROOT / "setup.py"]),
        ("tf2_msgs and vision_msgs", build_interfaces, [*build, ROOT / "interfaces"]),
        ("nope_ros", build_package, [*build, *sources, *linked]),
    ]
    done: dict[str, str] = json.loads(STAMPS.read_text(encoding="utf-8")) if STAMPS.exists() else {}
    if not all((ROOT / "install" / name).is_dir() for name in (*INTERFACES, "nope_ros")):
        done = {name: value for name, value in done.items() if not name.startswith("build_")}
    for title, step, parts in steps:
        name, value = step.__name__, fingerprint(parts)
        if done.get(name) == value:
            continue
        print(f"setup: {title} ...", flush=True)
        start = time.monotonic()
        # A step that fails is tried again; a new environment needs all others again.
        done = {} if step is make_environment else {key: old for key, old in done.items() if key != name}
        if STAMPS.exists():
            STAMPS.write_text(json.dumps(done, indent=2), encoding="utf-8")
        step()
        done[name] = value
        STAMPS.write_text(json.dumps(done, indent=2), encoding="utf-8")
        print(f"setup: {title}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
