"""Growth is read off the rows as it is, and long responses are measured over states and weights."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.long import growth, run
from benchmarks.table import long_table


def rows(power: float) -> list[dict[str, Any]]:
    works = [100, 300, 1000]
    return [{"case": "x", "work": work, "cpu_s": 1e-3 * work**power} for work in works]


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_growth_is_the_power_of_the_work(power: float) -> None:
    found = growth(rows(power))
    assert found["exponent"] == pytest.approx(power, abs=1e-3)
    assert found["ratio"] == pytest.approx(10 ** (power - 1), abs=1e-3)


def test_long_responses_are_measured() -> None:
    case = Case(edge=6, dim=8, vocab=500, scales=(1.0, 2.0))
    header, *found = run({"two scales": case}, (8, 64), 96, 300 * 2**20)
    assert [row["n_targets"] for row in found] == [8, 64, 96]
    assert [row["work"] for row in found] == [8 * (144 + 8), 64 * (144 + 64), 96 * (144 + 96)]
    assert [row.get("memory_limit") for row in found] == [None, None, 300 * 2**20]
    assert found[0]["image_tokens"] == [36, 144]
    if found[1]["peak_bytes"] is not None:
        assert found[1]["peak_bytes"] > 64 * 144 * 4  # at least the finished maps
    assert "| two scales | 64 | 36 144 |" in long_table(header, found)
