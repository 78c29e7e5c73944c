"""The engine agrees with the loops and the numpy program, and takes at most a hundredth of the loops' CPU time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import compiled
from benchmarks.cases import Case
from benchmarks.postprocessing import METHODS, SMALL, compare, difference
from benchmarks.sides import PRODUCTS, Explained, replaced, run_engine, run_naive, run_numpy, stages
from fastattr import ops
from fastattr.types import Method

GOAL = 100
TINY = Case(n_targets=9, n_prompt=3, edge=6, dim=16, vocab=120, seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_engine_takes_a_hundredth_of_the_naive_loops(method: Method) -> None:
    sides = compare(SMALL, method, naive_targets=6, runs=3).sides
    assert sides["naive"].after_products_ratio >= GOAL, sides
    assert sides["numpy per token"].after_products_ratio > 1, sides


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_sides_agree_where_nothing_is_left_out(method: Method, seed: int) -> None:
    readings, head = replace(TINY, seed=seed).states()
    loops = run_naive(readings[0], head, method, TINY.n_targets, k=10)
    assert list(loops.targets) == list(range(TINY.n_targets))
    difference(run_numpy(readings[0], head, method, k=10), loops)
    difference(run_engine(readings, head, method, k=10), loops)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_compiled_is_the_same(method: Method) -> None:
    readings, head = TINY.states()
    plain = {
        "remove_interference": lambda activation, mean, backend: compiled.remove_interference(activation, mean),
        "rank_gaussian": lambda maps, span, backend: compiled.rank_gaussian(maps, span),
    }
    with replaced(plain):
        found = run_engine(readings, head, method)
    difference(found, run_naive(readings[0], head, method, TINY.n_targets))


def test_a_wrong_side_is_refused() -> None:
    readings, head = TINY.states()
    loops = run_naive(readings[0], head, "tam", 2)
    right = run_engine(readings, head, "tam")
    maps, log_prob = right.maps.copy(), right.log_prob.copy()
    maps[loops.targets[1], 2, 3] += 1e-4
    log_prob[0] -= 0.01
    for wrong in (replace(right, maps=maps), replace(right, maps=maps * np.nan), replace(right, log_prob=log_prob)):
        with pytest.raises(ArithmeticError, match="off the naive loops"):
            difference(wrong, loops)


def test_stages_add_up_to_the_whole() -> None:
    explained = Explained([0], np.zeros((1, 1, 1)), np.zeros(1), {PRODUCTS: 3.0, "filter": 1.0, "the rest": 0.5})
    assert (explained.cpu_s, explained.after_products_s) == (4.5, 1.5)


def test_the_engine_runs_its_own_operations_afterwards() -> None:
    own = {name: getattr(ops, name) for name in stages()}
    readings, head = TINY.states()
    run_engine(readings, head, "arc")
    with pytest.raises(ZeroDivisionError), replaced({"rank_gaussian": lambda: 1 / 0}):
        ops.rank_gaussian()
    assert own == {name: getattr(ops, name) for name in stages()}
