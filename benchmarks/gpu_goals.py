"""What the kernels are to reach on an H100, and what they did: the table of `gpu.py`'s results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a workload is to cost: `metric` of its row at most `limit`.

    Attributes:
        factor: where given, the fastest baseline is to take at least this many times as long.
    """

    workload: str
    metric: str
    limit: float
    factor: float | None = None

    def met(self, row: Row) -> bool:
        """Whether a row stays within the limit and is right; the factor needs other rows, see `gpu_table`."""
        return row.get("fault") is None and row[self.metric] is not None and row[self.metric] <= self.limit


GOALS = {
    "G1": Goal("ARC top-50, 1024 positions, dim 3584, vocabulary 152,064", "median_ms", 1.60, factor=2.0),
    "G2": Goal("the same, 128 positions", "median_ms", 0.42),
    "G3": Goal("workspace of G1, besides the results", "workspace_bytes", 16 * 2**20),
    "G4": Goal("rows of 1,000,000 whose order is wrong beyond rounding", "wrong_rows", 0),
    "G5": Goal("rank overlap, 1024 x 1024 rankings of 50", "median_ms", 0.10),
    "G6": Goal("lens, 1500 image tokens x 512 targets", "median_ms", 0.015, factor=130.0),
    "G7 uint8": Goal("MSEA, 512 maps x 3 scales to 448 x 448, min-max included", "median_ms", 0.057),
    "G7 float32": Goal("the same in float32", "median_ms", 0.165),
    "G8": Goal("rank filter, 512 x 3 grids of 24 x 24", "median_ms", 0.010),
    "G9 time": Goal("all post-processing, 1500 image and 158 text tokens", "median_ms", 0.7),
    "G9 memory": Goal("the same, memory besides the results", "workspace_bytes", 32 * 2**20),
    "G11": Goal("the same, first call with a cold cache", "first_call_s", 2.0),
}


def gpu_table(header: Row, rows: Sequence[Row]) -> str:
    """What was achieved against each goal.

    Raises:
        ValueError: the rows are of a dry run.
    """
    if header["dry_run"] or any(row["dry_run"] for row in rows):
        raise ValueError("these rows are of a dry run, expected those of a GPU: a dry run measures nothing")
    goals = table.markdown(
        ("goal", "workload", "asked", "achieved", "of the roofline", "met"),
        (goal_line(name, rows) for name in GOALS),
    )
    return f"{header['gpu']}, driver {header['driver']}, torch {header['torch']}, Triton {header['triton']}.\n\n{goals}"


def goal_line(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """One goal: the best right form, or why there is none."""
    goal = GOALS[name]
    asked = f"at most {quantity(goal.metric, goal.limit)}" + (f", {goal.factor:g}x faster" if goal.factor else "")
    tried = [row for row in rows if name in row.get("goals", {})]
    right = [row for row in tried if row["fault"] is None and row.get(goal.metric) is not None]
    if not right:
        why = f"wrong: {tried[0]['fault']}" if tried and tried[0]["fault"] else "not measured"
        return name, goal.workload, asked, why, "", "no"
    best = min(right, key=lambda row: row[goal.metric])
    met = best["goals"][name]
    achieved = f"{quantity(goal.metric, best[goal.metric])} ({best['form']})"
    if goal.factor:
        others = [row["median_ms"] for row in rows if name in row.get("baseline_of", ()) and row["fault"] is None]
        ratio = min(others) / best["median_ms"] if others else math.nan
        met = met and ratio >= goal.factor
        achieved += f", {ratio:.3g}x faster" if others else ", nothing to compare with"
    roofline = best.get("roofline")
    share = f"{roofline:.0%}" if goal.metric == "median_ms" and roofline is not None else ""
    return name, goal.workload, asked, achieved, share, "yes" if met else "no"


def quantity(metric: str, value: float) -> str:
    """A figure with its unit."""
    if metric == "median_ms":
        return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1e3:.3g} us"
    if metric == "workspace_bytes":
        return f"{value / 2**20:.3g} MiB"
    return f"{value:.3g} s" if metric == "first_call_s" else f"{value:g}"
