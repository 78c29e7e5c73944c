"""The filter is judged at the grids it says, against the same maps without it."""

from __future__ import annotations

import pytest

import fastattr
from benchmarks.rank_filter import CELLS, COMPARED, filter_table, measure
from fastattr.demo.scenes import HELD_OUT, make_scene


def test_cells_are_those_of_the_grid() -> None:
    model, scene = fastattr.load("shapes"), make_scene(HELD_OUT)
    scales = [cells / CELLS[0] for cells in CELLS]
    why = fastattr.attribute(model, scene.image, "List the objects.", "a red ring.", scales=scales, evidence=False)
    assert [grid[1:] for (grid,) in why.grids] == [(cells, cells) for cells in CELLS]


def test_rows_and_table() -> None:
    header, *rows = measure(2, workers=1)
    assert header["scenes"] == 2
    assert [(row["method"], row["cells"]) for row in rows] == [(m, c) for m in COMPARED for c in CELLS]
    for row in rows:
        assert row["gain"]["mean"] == pytest.approx(row["f1_filtered"] - row["f1"], abs=1e-6)
    table = filter_table(header, rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[2].startswith(f"| lens | 6 | {rows[0]['f1']:.3f} | {rows[0]['f1_filtered']:.3f} |")
