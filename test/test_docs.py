"""The documentation: what comes from the code is what the code says, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nope_ros import cli
from nope_ros.node import reference

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "nope_ros" / "weights").glob("*/README.md"))]


def navigation() -> set[str]:
    """The pages of the site."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return {entry if isinstance(entry, str) else next(iter(entry.values())) for entry in nav}


@pytest.mark.parametrize("page", reference.DOCUMENTS, ids=str)
def test_generated_parts_are_the_codes(page: Path) -> None:
    text = (ROOT / page).read_text()
    assert text == reference.with_tables(text, ROOT), "run python -P -m nope_ros.node.reference"


def test_every_message_is_documented() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for path in (*(ROOT / "msg").iterdir(), *(ROOT / "srv").iterdir()):
        assert f"### nope_ros/{path.parent.name}/{path.stem}\n" in text
        assert path.read_text().strip() in text


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        path = page.parent / target
        assert target.startswith("http") or path.exists(), target


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    words = {command.word for command in cli.COMMANDS}
    assert set(re.findall(r"nope-ros ([a-z]+)", page.read_text())) <= words


def test_navigation_is_the_pages() -> None:
    assert {page.name for page in PAGES} == navigation()


def test_the_python_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed: no mesh to register")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    trimesh.creation.box((0.08, 0.2, 0.05)).export("bottle.glb")
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), "docs/python.md", "exec"), names)
    assert names["pose"].tracked and names["pose"].confidence > 0.5
    assert set(names["objects"]) == {"mug"} and names["bottle"].metric
    assert names["refused"] is None and names["lorry"].keyframes is not None
