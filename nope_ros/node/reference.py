"""Writes what is documented from the code: ``config/nope.yaml``, and what is between markers in README.md and docs/.

``python -P -m nope_ros.node.reference`` in the checkout; a test fails where they differ from the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from nope_ros.node import parameters, topics

DOCUMENTS = (Path("README.md"), Path("docs/reference.md"))


def definitions(root: Path) -> str:
    """Messages and services of a checkout, comments and all, as Markdown."""
    parts = []
    for path in (*sorted((root / "msg").glob("*.msg")), *sorted((root / "srv").glob("*.srv"))):
        text = path.read_text(encoding="utf-8").strip()
        parts.append(f"### nope_ros/{path.parent.name}/{path.stem}\n\n```\n{text}\n```")
    return "\n\n".join(parts)


def with_tables(readme: str, root: Path = Path()) -> str:
    """A text with what stands between ``<!-- topics -->`` and ``<!-- /topics -->``, and so on, written anew.

    Args:
        readme: the text; parts without markers stay as they are.
        root: the checkout, for the definitions of messages.

    Raises:
        ValueError: if a marker has no end.
    """
    tables = {"topics": topics.table(), "parameters": parameters.table(), "definitions": definitions(root)}
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if (begin in readme) != (end in readme):
            raise ValueError(f"of {begin} and {end} one is missing")
        readme = re.sub(
            re.escape(begin) + ".*?" + re.escape(end),
            lambda _, text=f"{begin}\n{table}\n{end}": text,  # type: ignore[misc]
            readme,
            flags=re.DOTALL,
        )
    return readme


def main() -> None:
    """Write the files in the current directory."""
    Path("config/nope.yaml").write_text(parameters.yaml(), encoding="utf-8")
    for page in DOCUMENTS:
        if page.exists():
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
