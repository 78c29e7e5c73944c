"""The command for a GPU: it runs through without one, and gives no speed to what is wrong."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fastattr_kernels as kernels
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu, naive
from benchmarks.gpu_forms import Op, Row, against, measure
from benchmarks.gpu_goals import GOALS, gpu_table
from benchmarks.gpu_ops import PERSISTENCE, Bench, arc_weight, rank_gaussian, rank_overlap, ranking_errors
from benchmarks.record import read_jsonl

CPU = torch.device("cpu")
BENCH = Bench(CPU, seed=1)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it: from a checkout, with nothing installed."""
    script = Path(gpu.__file__)
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=script.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# the dry run


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, list[Row]]:
    path = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    finished = command("--dry-run", "--out", str(path))
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return read_jsonl(path)


def test_a_dry_run_takes_every_step_without_a_fault(dry_run: tuple[Row, list[Row]]) -> None:
    _, rows = dry_run
    assert {row["step"] for row in rows} == set(gpu.STEPS)
    assert [row for row in rows if row["fault"] is not None] == []


def test_a_dry_run_judges_the_triton_form_of_every_operation(dry_run: tuple[Row, list[Row]]) -> None:
    judged = {row["op"] for row in dry_run[1] if row["form"] == "triton" and "max_error" in row}
    operations = {name for name in kernels.__all__ if "backend" in _parameters(getattr(kernels, name))} - {"resolve"}
    assert operations <= judged
    roads = {row["form"] for row in dry_run[1] if row["op"] == "lm_head_topk"}
    assert {"triton filtered", "triton fused"} <= roads


def _parameters(thing: Any) -> set[str]:
    return set(inspect.signature(thing).parameters) if inspect.isfunction(thing) else set()


def test_a_dry_run_cannot_be_taken_for_a_gpu(dry_run: tuple[Row, list[Row]]) -> None:
    header, rows = dry_run
    assert header["dry_run"] and "gpu" not in header
    assert all(row["dry_run"] for row in rows)
    assert not any(row.get("goals") or row.get("roofline") for row in rows)
    with pytest.raises(ValueError, match="dry run"):
        gpu_table(header, rows)


def test_without_a_gpu_the_command_says_so() -> None:
    finished = command(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert finished.returncode == 2
    assert "no GPU" in finished.stderr and "--dry-run" in finished.stderr
    assert finished.stdout == ""


def test_a_step_that_hangs_or_fails_costs_one_row() -> None:
    [stopped] = gpu.run_apart(["library"], dry_run=True, seed=0, limit_s=0.0)
    assert stopped["step"] == "library" and "stopped after 0 s" in stopped["fault"]
    [failed] = gpu.run_apart(["no such step"], dry_run=True, seed=0, limit_s=60.0)
    assert "KeyError" in failed["fault"]


# judging


def doubled(values: Tensor) -> Tensor:
    return values * 2


def unwritten(values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    out[:-1] = values[:-1] * 2
    return out


def unsteady(values: Tensor) -> Tensor:
    unsteady.calls += 1  # type: ignore[attr-defined]
    return values * 2 + unsteady.calls * 1e-7  # type: ignore[attr-defined]


unsteady.calls = 0  # type: ignore[attr-defined]


def failing(values: Tensor) -> Tensor:
    raise RuntimeError("out of shared memory")


def planted(wrong: Callable[[Tensor], Tensor]) -> list[Row]:
    op = Op(
        name="double",
        shape={"n": 8},
        draw=lambda generator: (torch.randn(8, generator=generator),),
        error=against(lambda values: values.double() * 2),
        forms={"torch": doubled, "triton": wrong},
        baselines={"library": doubled},
    )
    return list(measure(op, CPU, seed=0))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda values: values * 2 + 1e-4, "is above"),
        (lambda values: (values * 2).index_fill(0, torch.tensor([3]), math.nan), "is above"),
        (lambda values: values[1:] * 2, "is above"),
        (unwritten, "is above"),
        (unsteady, "different bits"),
        (failing, "RuntimeError: out of shared memory"),
    ],
)
def test_what_is_wrong_has_a_fault_and_no_speed(wrong: Callable[[Tensor], Tensor], reason: str) -> None:
    yardstick, bad, library = planted(wrong)
    assert reason in bad["fault"]
    assert not {"median_ms", "eager_ms", "roofline"} & set(bad)
    for good in (yardstick, library):
        assert good["fault"] is None and good["median_ms"] > 0


def test_what_is_right_has_a_speed() -> None:
    assert [row["fault"] for row in planted(doubled)] == [None] * 3
    assert all(row["median_ms"] > 0 for row in planted(doubled))


def right_ranking() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Whole numbers, so that logits are exact; ids 2 and 5 tie."""
    weight = torch.tensor([[1.0], [4.0], [7.0], [3.0], [2.0], [7.0]])
    return (torch.tensor([[1.0]]), weight), torch.tensor([[2, 5, 1, 3]]), torch.tensor([[7.0, 7.0, 4.0, 3.0]])


def test_a_right_ranking_has_no_error() -> None:
    inputs, ids, values = right_ranking()
    assert ranking_errors(inputs, (ids, values), 4).tolist() == [0.0]


@pytest.mark.parametrize(
    ("ids", "values"),
    [
        ([5, 2, 1, 3], [7.0, 7.0, 4.0, 3.0]),  # a tie by falling id
        ([2, 2, 1, 3], [7.0, 7.0, 4.0, 3.0]),  # an id twice
        ([2, 5, 1, 6], [7.0, 7.0, 4.0, 3.0]),  # an id that does not exist
        ([2, 5, 1, 4], [7.0, 7.0, 4.0, 2.0]),  # one is left out
        ([2, 5, 1, 3], [7.0, 7.0, 4.0, 3.1]),  # a value is off
        ([2, 5, 1, 3], [7.0, 7.0, 4.0, math.nan]),
    ],
)
def test_a_wrong_ranking_has_an_error(ids: list[int], values: list[float]) -> None:
    inputs, _, _ = right_ranking()
    assert ranking_errors(inputs, (torch.tensor([ids]), torch.tensor([values])), 4).item() > 1e-2


# what the forms are judged against


def test_the_exact_overlap_is_that_of_the_naive_loops() -> None:
    op = rank_overlap(BENCH)
    left, right = op.draw(BENCH.generator())
    best = naive.rank_biased_overlap(range(BENCH.k), range(BENCH.k), PERSISTENCE)
    overlap = [[naive.rank_biased_overlap(a, b, PERSISTENCE) / best for b in right.tolist()] for a in left.tolist()]
    assert op.error((left, right), [torch.tensor(overlap, dtype=torch.float64)]) < 1e-12
    assert op.error((left, right), [torch.tensor(overlap, dtype=torch.float64) + 1e-3]) > 1e-4


def test_the_exact_arc_weight_counts_only_what_stands_before() -> None:
    op = arc_weight(BENCH)
    left, right, counts, scores = op.draw(BENCH.generator())
    relevance, weight = torch.zeros(2, *counts.shape, dtype=torch.float64)
    best = naive.rank_biased_overlap(range(BENCH.k), range(BENCH.k), PERSISTENCE)
    prompt = len(right) - len(left)
    for t in range(len(left)):
        for j in range(prompt + t):
            overlap = naive.rank_biased_overlap(left[t].tolist(), right[j].tolist(), PERSISTENCE) / best
            relevance[t, j] = overlap
            weight[t, j] = (1 - overlap) * float(scores[t, j]) if counts[t, j] else 0.0
    assert op.error((left, right, counts, scores), [relevance, weight]) < 1e-12


def test_the_exact_filter_is_that_of_the_naive_loops() -> None:
    op = rank_gaussian(BENCH)
    maps, span = op.draw(BENCH.generator())
    low, high = span.double().numpy().T[:, :, None, None, None]
    stretched = (maps.double().numpy() - low) / (high - low)
    filtered = np.stack([[naive.rank_gaussian(frame) for frame in target] for target in stretched])
    assert op.error((maps, span), [torch.from_numpy(filtered)]) < 1e-12


# the table

HEADER = {"dry_run": False, "gpu": "NVIDIA H100", "driver": "580", "torch": "2.11", "triton": "3.6"}


def row(form: str, fault: str | None = None, **figures: Any) -> Row:
    return {"form": form, "fault": fault, "dry_run": False, **figures}


def line_of(goal: str, *rows: Row) -> list[str]:
    [line] = [each for each in gpu_table(HEADER, rows).splitlines() if each.startswith(f"| {goal} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_line_for_every_goal() -> None:
    for goal in GOALS:
        assert line_of(goal)[3:] == ["not measured", "", "no"]


def test_the_table_takes_the_fastest_right_form_and_asks_for_the_factor() -> None:
    fused = row("triton fused", "the error 1.0e-01 is above 1.0e-05", goals={"G1": False})
    filtered = row("triton filtered", median_ms=1.5, roofline=0.93, goals={"G1": True})
    slower = row("triton", median_ms=1.7, roofline=0.82, goals={"G1": False})
    library = partial(row, "product + torch.topk", baseline_of=["G1"])
    *_, achieved, share, met = line_of("G1", fused, filtered, slower, library(median_ms=4.5))
    assert (achieved, share, met) == ("1.5 ms (triton filtered), 3x faster", "93%", "yes")
    assert line_of("G1", filtered, library(median_ms=2.9))[-1] == "no"
    assert line_of("G1", filtered)[-1] == "no"
    assert line_of("G1", slower, library(median_ms=4.5))[-1] == "no"


def test_the_table_shows_no_figure_of_a_wrong_form() -> None:
    wrong = row("triton", "the error 1.0e-01 is above 1.0e-05", goals={"G8": False})
    assert line_of("G8", wrong)[3:] == ["wrong: the error 1.0e-01 is above 1.0e-05", "", "no"]
