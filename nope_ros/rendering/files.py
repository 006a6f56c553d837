"""Which files hold meshes; reading them is ``nope_ros.rendering.mesh``'s, which needs more than this does."""

from __future__ import annotations

from pathlib import Path

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl")
"""Kinds of files that hold meshes."""


def mesh_files(folder: Path) -> dict[str, Path]:
    """All meshes under a folder, in order, by their names: the path within it, without suffix."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in MESH_SUFFIXES
    }
