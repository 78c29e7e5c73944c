"""The cost model counts what is computed, and the projection follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import Case
from benchmarks.scaling import (
    LARGE,
    STAGES,
    Gpu,
    Work,
    fit_rates,
    forward_flops,
    measure_stages,
    predicted_s,
    project,
    stage_work,
    work_of,
)
from benchmarks.sides import INTERFERENCE, OVERLAP, PRODUCTS

SMALL = Work(targets=3, prompt=2, image=(4, 9), dim=5, vocab=7, rankings=10)


def test_pairs_are_those_of_a_target_and_what_stands_before_it() -> None:
    assert SMALL.pairs == sum(2 + t for t in range(3))


def test_operations_are_counted_one_by_one() -> None:
    work = stage_work(SMALL)
    context = 5
    at_images = sum(2 * 5 for _ in range(context) for n in (4, 9) for _ in range(n))
    at_context = sum(2 * 5 for _ in range(2) for t in range(3) for _ in range(2 + t))
    over_vocabulary = 2 * 5 * 7 * (context + 3)  # rankings at one scale, log-probabilities at the other
    assert work[PRODUCTS] == at_images + at_context + over_vocabulary
    assert work[OVERLAP] == 10 * SMALL.pairs
    assert work[INTERFERENCE] == 2 * SMALL.pairs * 13


def test_a_forward_of_one_token_uses_every_parameter_once() -> None:
    assert forward_flops(1e9, 10, 100, 1) == pytest.approx(2e9, rel=1e-5)
    assert forward_flops(0, 2, 3, 10) == 2 * 2 * 3 * 100


def test_rates_that_fit_exactly_are_found() -> None:
    rows = []
    for targets in (10, 100):
        work = stage_work(replace(SMALL, targets=targets))
        rows.append({"work": work, "stage_s": {stage: 1e-9 * (i + 1) * work[stage] for i, stage in enumerate(STAGES)}})
    rates = fit_rates(rows)
    assert list(rates.values()) == pytest.approx([1e-9 * (i + 1) for i in range(len(STAGES))])
    assert predicted_s(rates, rows[0]["work"]) == pytest.approx(sum(rows[0]["stage_s"].values()))


def test_stages_of_a_case_are_measured() -> None:
    case = Case(n_targets=8, n_prompt=4, edge=4, dim=16, vocab=200, scales=(1.0, 2.0))
    row = measure_stages(case, repeats=1)
    assert row["work"] == stage_work(work_of(case)) and work_of(case).image == (16, 64)
    assert all(row["stage_s"][stage] > 0 for stage in STAGES)


def test_a_projection_scales_with_gpus_and_nothing_else_of_it_does() -> None:
    few, many = (project(LARGE[0], gpus, 5e4, Gpu()) for gpus in (8, 512))
    assert few["gpu_s_per_million"] == many["gpu_s_per_million"]
    assert few["hours_per_million"] == pytest.approx(64 * many["hours_per_million"], rel=0.02)
    assert sum(few["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert few["log_bytes_per_million"] == 5e10
    assert project(LARGE[1], 8, 5e4, Gpu())["gpu_s_per_million"] > 5 * few["gpu_s_per_million"]
