"""Writes what is documented from the code: ``config/nope.yaml`` and the tables between markers in ``README.md``.

``python -P -m nope_ros.node.reference`` in the checkout; a test fails where they differ from the code.
"""

from __future__ import annotations

import re
from pathlib import Path

from nope_ros.node import parameters, topics


def topics_table() -> str:
    """Topics and services as a Markdown table."""
    return topics.table()


def parameters_table() -> str:
    """Parameters as a Markdown table."""
    return parameters.table()


def with_tables(readme: str) -> str:
    """A text with what stands between ``<!-- topics -->`` and ``<!-- /topics -->``, and for parameters, written anew.

    Raises:
        ValueError: if a marker has no end.
    """
    for name, table in (("topics", topics_table()), ("parameters", parameters_table())):
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
    readme = Path("README.md")
    if readme.exists():
        readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
