"""What `nope-ros load` makes of its measurements: whether memory grows, tables and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nope_ros.demo.load import Case, Figures, growth, read, write
from nope_ros.frame import InputError

HALF_AN_HOUR = np.arange(3.0, 1800.0)


def memory(slope: float, seed: int = 0) -> tuple[tuple[float, float], ...]:
    """Caches that fill for some minutes, images that come and go, and growth in MB/h."""
    noise = np.random.default_rng(seed).normal(0, 2, len(HALF_AN_HOUR))
    megabytes = 500 + 80 * (1 - np.exp(-HALF_AN_HOUR / 60)) + noise + slope * HALF_AN_HOUR / 3600
    return tuple(zip(HALF_AN_HOUR.tolist(), megabytes.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slope", [0.0, 60.0, -60.0])
def test_growth_is_told_from_caches_that_fill(slope: float, seed: int) -> None:
    found = growth(memory(slope, seed))
    assert abs(found.slope - slope) < found.uncertainty < 25
    assert found.grows == (slope > 0)


def test_steps_of_an_allocator_are_no_growth() -> None:
    """Under least squares' own interval most such runs would be called growing or shrinking."""
    called = 0
    for seed in range(200):
        steps = np.random.default_rng(seed).choice([0.0, 4.0, -4.0], len(HALF_AN_HOUR) // 60, p=[0.8, 0.1, 0.1])
        megabytes = 550 + np.cumsum(steps)[np.minimum(HALF_AN_HOUR // 60, len(steps) - 1).astype(int)]
        called += growth(tuple(zip(HALF_AN_HOUR.tolist(), megabytes.tolist(), strict=True))).grows
    assert called <= 0.06 * 200


def figures(seconds: int = 1797) -> Figures:
    latency = tuple((float(second), 20.0 + second % 7) for second in range(3, seconds, 2))
    return Figures(900, 850, (20.0, 25.0, 26.0), (1.0, 2.0, 3.0), 40.0, 150.0, 2, memory(60.0)[:seconds], latency)


def test_pages_get_tables_and_pictures_in_their_places(tmp_path: Path) -> None:
    page = tmp_path / "load.md"
    page.write_text(
        "# Load\n<!-- load -->old<!-- /load -->\nbetween\n<!-- load over time -->old<!-- /load over time -->\n"
    )
    rows = [
        (Case(1, 640, 480, 30.0, False, 1797.0), figures()),
        (Case(5, 640, 480, 30.0, True, 20.0, "none"), figures(20)),
    ]
    write(rows, page)
    text = page.read_text()
    assert "old" not in text and text.index("| 5 | 640×480 | 30 | JPEG | none |") < text.index("between")
    assert "| 1 | 640×480 | 30 | raw | correspondence | 20 / 25 / 26 | 0.5 | 6 % | 40 % | 150 % of 200 % |" in text
    assert "**It grows.** Of 30 minutes, the first 7 are left out" in text and "(images/load.png)" in text
    assert (tmp_path / "images" / "load.png").stat().st_size > 5000
    kept = tmp_path / "load.json"
    write(rows, kept)
    assert [one.growth is None for _, one in read(kept)] == [False, True]
    write(read(kept), page)
    assert page.read_text() == text, "the same figures make the same page"
    kept.write_text('[{"case": {}}]')
    with pytest.raises(InputError, match="no figures of nope-ros load"):
        read(kept)
    page.write_text("<!-- load -->")
    with pytest.raises(InputError, match="has no <!-- /load -->"):
        write(rows, page)
