"""Kernels that compile and must not pass: each has one fault that only shows after compilation."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from fastattr_kernels import backend

from benchmarks.launches import Workload

META = torch.device("meta")


def spill() -> None:
    values = torch.empty(64, 131_072, device=META)
    _spilling[(64,)](values, torch.empty_like(values), BLOCK=131_072, num_warps=16)


def shared() -> None:
    factors = torch.empty(1024, 1024, dtype=torch.float16, device=META)
    product = torch.empty(1024, 1024, device=META)
    _product[(64,)](factors, factors, product, 1024, BLOCK=128, DEPTH=256, num_warps=16, num_stages=3)


def narrow() -> None:
    factors = torch.empty(64, 64, dtype=torch.float16, device=META)
    _product[(1,)](
        factors, factors, torch.empty(64, 64, device=META), 64, BLOCK=16, DEPTH=32, num_warps=1, num_stages=2
    )


def crowded() -> None:
    factors = torch.empty(1024, 1024, dtype=torch.float16, device=META)
    few_registers = {"maxnreg": 96} if backend.architecture(META) == "sm_90" else {}
    product = torch.empty(1024, 1024, device=META)
    _product[(64,)](factors, factors, product, 1024, BLOCK=128, DEPTH=64, num_stages=3, **few_registers)


def uncompilable() -> None:
    _uncompilable[(1,)](torch.empty(8, device=META), BLOCK=7)


def grid() -> None:
    _copy[(1, 70_000)](torch.empty(9, device=META)[1:], torch.empty(8, device=META), 1, 2, BLOCK=8)


def with_data() -> None:
    n = torch.ones(1, device=META).item()
    _copy[(n,)](torch.empty(8, device=META), torch.empty(8, device=META), 1, 2, BLOCK=8)


def nothing() -> None:
    torch.empty(8, device=META)


def rounded() -> None:
    factors = torch.empty(64, 64, device=META)
    _product[(1,)](factors, factors, torch.empty(64, 64, device=META), 64, BLOCK=32, DEPTH=32)


WORKLOADS = tuple(
    Workload(launch.__name__, "planted", partial(launch), 0, 0)
    for launch in (spill, shared, narrow, rounded, crowded, uncompilable, grid, with_data, nothing)
)


@triton.jit
def _spilling(values_ptr, out_ptr, BLOCK: tl.constexpr):
    # one program holds the whole row, because its extremes are needed before it is written
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offset)
    low, high = tl.min(values, 0), tl.max(values, 0)
    tl.store(out_ptr + offset, (values - low) / (high - low))


@triton.jit
def _product(left_ptr, right_ptr, out_ptr, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, depth = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, DEPTH):
        left = tl.load(left_ptr + row[:, None] * n + start + depth[None, :])
        right = tl.load(right_ptr + (start + depth)[:, None] * n + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out_ptr + row[:, None] * n + column[None, :], total)


@triton.jit
def _uncompilable(values_ptr, BLOCK: tl.constexpr):
    tl.store(values_ptr + tl.arange(0, BLOCK), 0.0)  # a block of seven


@triton.jit
def _copy(values_ptr, out_ptr, stride, scale, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(out_ptr + offset * stride, tl.load(values_ptr + offset) * scale)


@triton.jit
def _forgotten(values_ptr, BLOCK: tl.constexpr):
    tl.store(values_ptr + tl.arange(0, BLOCK), 0.0)
