"""The documentation: what comes from the code is what the code says, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nope_ros import cli
from nope_ros.node import reference

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


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


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
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
