"""Kernels are launched on the GPU that holds their input, which need not be the current one. The GPUs here are fakes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

FIRST, SECOND = 0, 1


class OnSecond(Tensor):
    """On the second GPU, as far as `torch.cuda.device_of` sees."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return SECOND


def second(*shape: int) -> Tensor:
    return torch.rand(*shape).as_subclass(OnSecond)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape).as_subclass(OnSecond)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current GPU, last in the list."""
    held = [FIRST]

    def exchange(index: int) -> int:
        before = held[-1]
        if index >= 0:
            held.append(index)
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return held


CALLS: dict[str, tuple[str, list[str], Callable[[Any], Any]]] = {
    "context_mean": ("interference", ["_context_mean_kernel"], lambda m: m.context_mean(second(5, 8), second(3, 5))),
    "remove_interference": (
        "interference",
        ["_remove_interference_kernel"],
        lambda m: m.remove_interference(second(3, 8), second(3, 8)),
    ),
    "rank_gaussian": ("rank_gaussian", ["_rank_gaussian"], lambda m: m.rank_gaussian(second(2, 1, 4, 4))),
    "rank_overlap": ("rank_overlap", ["_overlap_kernel"], lambda m: m.rank_overlap(ids(2, 4), ids(3, 4), 0.9)),
    "arc_weight": (
        "rank_overlap",
        ["_overlap_kernel"],
        lambda m: m.arc_weight(ids(2, 4), ids(3, 4), 0.9, torch.ones(2, 3, dtype=torch.bool)),
    ),
    "multiscale": (
        "multiscale",
        ["_sum_kernel", "_draw_kernel", "_reduce_kernel"],
        lambda m: m.multiscale([second(2, 1, 3, 3)], second(2, 1), (40, 40)),
    ),
    "lm_head_topk": ("lm_head_topk", ["_filter", "_merge"], lambda m: m.lm_head_topk(second(3, 4), second(9, 4), 2)),
    "lm_head_summary": (
        "lm_head_topk",
        ["_filter", "_merge"],
        lambda m: m.lm_head_summary(second(3, 4), second(9, 4), 2),
    ),
    "fused_summary": (
        "lm_head_topk",
        ["_product", "_filter", "_merge"],
        lambda m: m.fused_summary(second(3, 4), second(9, 4), 2),
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_kernel_is_launched_where_its_input_is(
    name: str, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name, kernels, call = CALLS[name]
    module = importlib.import_module(f"fastattr_kernels.gpu.{module_name}")
    launched: list[tuple[str, int]] = []

    class Recorder:
        def __init__(self, kernel: str) -> None:
            self.kernel = kernel

        def __getitem__(self, _grid: Any) -> Callable[..., None]:
            return lambda *_args, **_options: launched.append((self.kernel, current[-1]))

    for kernel in kernels:
        monkeypatch.setattr(module, kernel, Recorder(kernel))
    call(module)
    assert {kernel for kernel, _ in launched} == set(kernels)
    assert {device for _, device in launched} == {SECOND}
    assert current[-1] == FIRST  # as it was before
