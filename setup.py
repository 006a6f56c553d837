"""Installs the library and the `nope-ros` command by pip, with no ROS. CMakeLists.txt installs the ROS package."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"


class BuildWithDefinitions(build_py):
    """Puts the definitions of messages into the package, for `nope_ros.node.interfaces`."""

    def run(self):
        """Copy them, unless the package is a link to the checkout, which has them."""
        super().run()
        if self.editable_mode:
            return
        for kind in ("msg", "srv"):
            self._copy(ROOT / kind, Path("nope_ros") / kind)
        for folder in (ROOT / "interfaces").glob("*/msg"):
            self._copy(folder, Path(folder.parent.name) / "msg")

    def _copy(self, folder, place):
        target = Path(self.build_lib) / "nope_ros" / "definitions" / place
        target.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*.msg"), *folder.glob("*.srv")]:
            shutil.copyfile(path, target / path.name)


setup(
    name="nope_ros",
    version="0.1.0",  # The same as in package.xml.
    description="Pose of an unseen object from one reference image (NOPE), as a library and as a ROS 2 node.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    cmdclass={"build_py": BuildWithDefinitions},
    packages=find_packages(include=["nope_ros", "nope_ros.*"]),
    package_data={"nope_ros": ["py.typed", "*.yaml", "**/*.yaml", "weights/*", "weights/**/*"]},
    entry_points={"console_scripts": ["nope-ros = nope_ros.cli:main"]},
    install_requires=[
        "diffusers>=0.32",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "opencv-python>=4.8",
        "pillow>=10",
        "pydantic>=2.7",
        "PyYAML>=6",
        "rich>=13",
        "rosbags>=0.10",
        "rosbags-image>=0.9",
        "safetensors>=0.4",
        "scipy>=1.11",
        "torch>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "mesh": ["numba>=0.60", "trimesh>=4.0"],
        "dask": ["distributed>=2024.5"],
        "train": ["accelerate>=1.0", "numba>=0.60", "trimesh>=4.0"],
        "dev": ["hypothesis>=6.100", "mypy>=1.10", "pytest>=8", "pytest-timeout>=2.3", "ruff>=0.6", "types-PyYAML"],
    },
)
