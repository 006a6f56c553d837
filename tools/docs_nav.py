"""For mkdocs: leaves out entries of the navigation whose pages have not been written (yet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Called by mkdocs with its configuration."""
    folder = Path(config["docs_dir"])
    config["nav"] = [
        entry
        for entry in config["nav"]
        if (folder / (entry if isinstance(entry, str) else next(iter(entry.values())))).is_file()
    ]
    return config
