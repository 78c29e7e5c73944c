"""What is charged is what was spent."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.cost import STATUS, charged, cpu_s, in_fresh_process, in_turn

MB = 10**6


def holds(before: int, during: int) -> Callable[[], float]:
    """A call that fills `during` bytes and frees them, when `before` bytes are held and as many were freed."""
    torch.ones(before, dtype=torch.uint8)
    held = torch.ones(before, dtype=torch.uint8)

    def call() -> float:
        torch.ones(during, dtype=torch.uint8)
        return float(len(held))

    return call


def fails() -> Callable[[], float]:
    raise SystemExit(3)


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not count memory")
@pytest.mark.parametrize(("before", "during"), [(0, 100 * MB), (100 * MB, 0), (30 * MB, 20 * MB), (1 * MB, 3 * MB)])
def test_memory_is_that_of_the_call_alone(before: int, during: int) -> None:
    cost = in_fresh_process(holds, before, during)
    assert cost.peak_bytes is not None
    # the system counts pages in batches, so that a megabyte may come or go
    assert abs(cost.peak_bytes - during) < 2 * MB
    assert cost.cpu_s == before  # what the call returns
    assert cost.runs == (1 if before else 5)


def test_a_process_without_result_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"fails\(\) ended with code 3"):
        in_fresh_process(fails)


def test_charged_adds_up_and_scales() -> None:
    spent: dict[str, float] = {}
    for times in (1.0, 3.0):
        with charged(spent, "loop", times):
            spin(0.05)
    assert 0.2 <= spent["loop"] < 0.3


def test_sleep_is_not_charged() -> None:
    assert cpu_s(lambda: time.sleep(0.1)) < 0.05 < cpu_s(lambda: spin(0.06))


def test_calls_are_timed_in_turn_after_a_first_one() -> None:
    order = []
    spent = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, runs=2)
    assert "".join(order) == "ababab"
    assert {name: len(each) for name, each in spent.items()} == {"a": 2, "b": 2}


def spin(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
