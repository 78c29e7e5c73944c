"""Every workload gives the same by every side, and the suite measures, draws and prints them all."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cost import one_thread
from benchmarks.plots import draw
from benchmarks.postprocessing import difference
from benchmarks.suite import BASE, GRID, points, run
from benchmarks.table import suite_table
from benchmarks.workloads import ENGINE, EVERY, NAIVE, NUMPY, Size, Workload

SMALL = Size(n_targets=11, edge=5, vocab=300, k=9, n_scales=2)


@pytest.mark.parametrize("workload", EVERY, ids=lambda workload: workload.name)
def test_sides_agree(workload: Workload) -> None:
    size = SMALL if workload.name != "whole" else Size(n_targets=11, edge=5, vocab=300, k=9)
    inputs = workload.make(size)
    targets = list(range(size.n_targets))
    found = {side: form(inputs, size, targets) for side, form in workload.forms.items()}
    if workload.name == "whole":
        difference(found[ENGINE], found[NAIVE])
        difference(found[NUMPY], found[NAIVE])
        return
    assert found[ENGINE].any()
    for side in (NAIVE, NUMPY):
        np.testing.assert_allclose(found[side], found[ENGINE], atol=1e-5, err_msg=side)


def test_points_change_one_factor_at_a_time() -> None:
    found = list(points(BASE, GRID))
    assert len({str(point) for point in found}) == len(found)
    for point in found:
        start = next(p.size for p in found if p.workload is point.workload and p.factor is None)
        changed = {name for name in GRID if getattr(point.size, name) != getattr(start, name)}
        assert changed == ({point.factor} if point.factor else set())


def test_the_suite(tmp_path: Path) -> None:
    header, *rows = run(smoke=True)
    for workload in EVERY:
        mine = [row for row in rows if row["workload"] == workload.name]
        assert {row["side"] for row in mine if row["factor"] is None} == set(workload.forms)
        assert all(row["cpu_s"] > 0 for row in mine)
    grown = [row for row in rows if row["workload"] == "whole" and row["side"] == NAIVE]
    assert len({row["n_targets"] for row in grown}) == 2
    table = suite_table(header, rows)
    assert all(f"| {workload.name} |" in table for workload in EVERY)
    for path in draw(header, rows, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("workload", EVERY, ids=lambda workload: workload.name)
def test_cpu_time_of_the_engine(benchmark: Any, workload: Workload) -> None:
    size = Size(n_targets=128, n_scales=workload.least_scales, vocab=4096)
    inputs = workload.make(size)
    with one_thread():
        result = benchmark.pedantic(
            workload.forms[ENGINE], args=(inputs, size, range(size.n_targets)), rounds=5, warmup_rounds=1
        )
    assert result is not None
