"""The engine agrees with the naive loops and takes at most a hundredth of their CPU time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from benchmarks.postprocessing import TOLERANCE, Case, compare, one_thread, run_engine
from fastattr.types import Method

GOAL = 100
METHODS: tuple[Method, ...] = ("tam", "arc")


@pytest.mark.parametrize("method", METHODS)
def test_engine_takes_a_hundredth_of_the_naive_loops(method: Method) -> None:
    comparison = compare(Case(), method)
    assert comparison.max_difference < TOLERANCE
    assert comparison.ratio >= GOAL, comparison


@pytest.mark.parametrize("method", METHODS)
def test_engine_agrees_where_nothing_is_left_out(method: Method) -> None:
    case = Case(n_targets=9, n_prompt=3, grid=(5, 7), dim=16, vocab=120, seed=1)
    assert compare(case, method, naive_targets=9, runs=1).max_difference < TOLERANCE


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("method", METHODS)
def test_cpu_time_of_the_engine(benchmark: Any, method: Method) -> None:
    states, head = Case().states()
    with one_thread():
        maps = benchmark.pedantic(run_engine, args=(states, head, method), rounds=5, warmup_rounds=1)
    assert maps.image[0].shape == (512, 1, 24, 24)
