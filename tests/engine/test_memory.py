"""A memory limit changes where results lie and what is computed again, not what comes out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattr
from benchmarks.cases import Case as Large
from fastattr.memory import Disk, Plan, Shape, plan
from fastattr.method import explain_block, explain_states, predict, share_work
from fastattr.msea import common_grids
from fastattr.types import AttributionConfig
from tests.engine.test_method import Case, cases

CPU = torch.device("cpu")
FIELDS = ("context", "relevance", "log_prob", "agreement", "raw_range", "residual", "degenerate")


def same(ours: Any, expected: Any) -> None:
    for name in FIELDS:
        one, other = getattr(ours, name), getattr(expected, name)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours.image, expected.image, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@given(
    cases(),
    st.sampled_from(["lens", "tam", "arc"]),
    st.sampled_from(["before", "after"]),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_blocks_and_chunks_are_the_whole(case: Case, method: Any, aggregate: Any, size: int, chunk: int) -> None:
    """Targets a few at a time, each with the context before it only, whose activations are computed again in pieces."""
    config = AttributionConfig(method=method, scales=case.scales, aggregate=aggregate, top_k=3, evidence=False)
    readings = [
        fastattr.types.ScaleStates(hidden, ids, layout, scale)
        for hidden, ids, layout, scale in zip(case.hidden, case.ids, case.layouts, case.scales, strict=True)
    ]
    whole = explain_states(readings, case.head, config)
    (predicted,) = predict([readings], case.head, config)
    shared = share_work(readings, case.head, config, common_grids(case.layouts), predicted, keep_lit=False)
    targets = readings[0].layout.n_targets
    for start in range(0, targets, size):
        block = slice(start, min(targets, start + size))
        found = explain_block(shared, block, chunk)
        seen = found.context.shape[1]
        assert seen == len(case.layouts[0].prompt) + block.stop
        clear = (whole.raw_range[block, 1] - whole.raw_range[block, 0]) > 1e-3  # else it is rounding, stretched
        for one, other in zip(found.image, whole.image, strict=True):
            torch.testing.assert_close(one[clear], other[block][clear], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.context[clear], whole.context[block, :seen][clear], rtol=1e-4, atol=1e-4)
        assert not whole.context[block, seen:].any()
        if whole.relevance is not None and found.relevance is not None:
            assert torch.equal(found.relevance, whole.relevance[block, :seen])


def test_on_disk_is_what_is_in_memory() -> None:
    """Large enough that the least memory needs many blocks, chunks and the file."""
    readings, head = Large(n_targets=600, n_prompt=20, edge=20, dim=16, vocab=500, scales=(1.0, 1.5)).states()
    config = AttributionConfig(scales=(1.0, 1.5), evidence=False)
    whole = explain_states(readings, head, config)
    shape = Shape(600, 620, 30 * 30, 20 * 20 + 30 * 30, 50, 16)
    limit = shape.fixed_bytes + 2**21
    cut = plan(shape, CPU, limit)
    assert cut.on_disk and cut.chunk is not None and cut.block < 600
    same(explain_states(readings, head, config, memory_limit=limit), whole)


@given(
    targets=st.integers(1, 20_000),
    prompt=st.integers(0, 5_000),
    pixels=st.integers(1, 20_000),
    scales=st.integers(1, 4),
    dim=st.sampled_from([64, 4096]),
    spare=st.integers(0, 2**34),
)
def test_a_plan_keeps_within_its_limit(
    targets: int, prompt: int, pixels: int, scales: int, dim: int, spare: int
) -> None:
    shape = Shape(targets, prompt + targets, pixels, pixels * scales, 50, dim)
    with pytest.raises(fastattr.InputError, match="expected at least") as refused:
        plan(shape, CPU, 1)
    least = int(str(refused.value).split("at least ")[1].split(":")[0].replace(",", ""))
    limit = least + spare
    cut = plan(shape, CPU, limit)
    assert 1 <= cut.block <= targets
    used = shape.block_bytes(cut.block) + (0 if cut.on_disk else shape.results_bytes)
    used += 2 * shape.lit_bytes if cut.chunk is None else 8 * cut.chunk * shape.image
    assert shape.fixed_bytes + 2 * used <= limit  # as much again for what an allocator cannot use twice
    without = plan(shape, CPU, None)
    assert without == Plan(without.block, None, on_disk=False)


@pytest.mark.parametrize("limit", [1, 0, -1, True, 2.5e9])
def test_too_small_a_limit_says_what_it_takes(limit: Any) -> None:
    readings, head = Large(n_targets=4, n_prompt=2, edge=4, dim=8, vocab=100).states()
    with pytest.raises(
        fastattr.InputError, match=r"memory_limit is .* bytes, expected at least [\d,]+: what 6 context"
    ):
        explain_states(readings, head, AttributionConfig(scales=(1.0,)), memory_limit=limit)


def test_what_cannot_be_limited_is_refused() -> None:
    readings, head = Large(n_targets=4, n_prompt=2, edge=4, dim=8, vocab=100).states()
    config = AttributionConfig(method="tam", scales=(1.0,), compat="tam")
    with pytest.raises(fastattr.InputError, match="compat='tam' explains all tokens in memory"):
        explain_states(readings, head, config, memory_limit=2**30)


def test_a_full_disk_is_said() -> None:
    with pytest.raises(
        fastattr.SaveError, match=r"cannot be laid down in .*; make room, let TMPDIR name another folder"
    ):
        Disk().zeros(2**50)


def test_the_process_stays_within_the_limit(tmp_path: Path) -> None:
    """Resident memory of a process of its own, with results larger than the limit."""
    code = f"""
import torch
from benchmarks.cases import Case
from benchmarks.cost import STATUS, _forget_peak, _status_bytes
from fastattr.method import explain_states
from fastattr.types import AttributionConfig
torch.set_num_threads(1)
config = AttributionConfig(scales=(1.0,), evidence=False, filter=False)
small, head = Case(n_targets=2, n_prompt=2, edge=4, dim=16, vocab=50).states()
explain_states(small, head, config)
readings, head = Case(n_targets=2000, n_prompt=20, edge=120, dim=16, vocab=200).states()
before = _forget_peak()
found = explain_states(readings, head, config, memory_limit={128 * 2**20})
peak = _status_bytes("VmHWM") - before
size = found.image[0].nbytes + found.context.nbytes + found.relevance.nbytes
print(peak, size, float(found.image[0][-1].max()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, size, last = ran.stdout.split()
    assert int(peak) < 128 * 2**20 < int(size)
    assert float(last) > 0
