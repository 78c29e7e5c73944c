"""Tables of all result files have as many cells in every line as in their head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from benchmarks import table
from benchmarks.record import RESULTS, read_jsonl


@pytest.mark.parametrize(("name", "render"), [(name, render) for _, name, render in table.TABLES])
def test_tables_of_results(name: str, render: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], str]) -> None:
    text = render(*read_jsonl(RESULTS / f"{name}.jsonl"))
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    tables = [block for block in blocks if block]
    assert tables
    for block in tables:
        assert len(block) > 2
        assert len({line.count(" | ") for line in block if "---" not in line}) == 1


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.5e-8, "45 ns"), (2e-5, "20 us")]
)
def test_times_have_units(seconds: float, shown: str) -> None:
    assert table._time(seconds) == shown
