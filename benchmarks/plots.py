"""The suite's results as pictures: `suite_targets.png` and `suite_factors.png`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.workloads import ENGINE, NAIVE, NUMPY
from fastattr.evaluate.plots import FAINT, INK, STYLE

Row = Mapping[str, Any]

COLORS = {NAIVE: "#b5503c", NUMPY: "#c99a2e", ENGINE: "#2b6c8f"}
FACTORS = {
    "n_targets": "response tokens",
    "n_image": "image tokens",
    "vocab": "vocabulary",
    "k": "depth of the rankings",
    "n_scales": "scales",
}


def draw(header: Row, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the whole post-processing against every factor."""
    whole = [row for row in rows if row["workload"] == "whole"]
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        return [
            _save(_against_targets(header, whole), folder / "suite_targets.png"),
            _save(_against_factors(header, whole), folder / "suite_factors.png"),
        ]


def _against_targets(header: Row, rows: Sequence[Row]) -> Figure:
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9.6, 4.0), constrained_layout=True)
    _lines(time_axes, rows, "n_targets", "cpu_s", named=True)
    _lines(memory_axes, rows, "n_targets", "peak_bytes", named=False)
    time_axes.set_title("CPU time")
    memory_axes.set_title("peak memory")
    figure.supxlabel(f"response tokens (log); {_base(header, rows)}", fontsize=9, color=INK)
    return figure


def _against_factors(header: Row, rows: Sequence[Row]) -> Figure:
    factors = [factor for factor in FACTORS if factor != "n_targets"]
    figure, grid = plt.subplots(2, len(factors), figsize=(12.0, 5.6), sharey="row", constrained_layout=True)
    for column, factor in enumerate(factors):
        top, bottom = grid[:, column]
        _lines(top, rows, factor, "cpu_s", named=factor == "k")
        _lines(bottom, rows, factor, "peak_bytes", named=False)
        top.set_title(FACTORS[factor])
    grid[0, 0].set_ylabel("CPU time")
    grid[1, 0].set_ylabel("peak memory")
    targets = rows[0]["n_targets"]
    figure.supxlabel(f"where not on the axis: {targets} response tokens, {_base(header, rows)}", fontsize=9, color=INK)
    return figure


def _lines(axes: Axes, rows: Sequence[Row], factor: str, figure: str, *, named: bool) -> None:
    """One line for each side, on logarithmic axes, with its name at its end."""
    varied = "edge" if factor == "n_image" else factor
    shown = [row for row in rows if row["factor"] in (None, varied) and row[figure] is not None]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for side, color in COLORS.items():
        line = sorted((row[factor], row[figure]) for row in shown if row["side"] == side)
        if not line:
            continue
        axes.plot(*zip(*line, strict=True), color=color, marker="o", markersize=4, linewidth=1.8, clip_on=False)
        if named:
            where = line[len(line) // 2]
            axes.annotate(side, where, (0, 7), textcoords="offset points", color=color, ha="right", fontsize=9)
    ticks = sorted({row[factor] for row in shown})
    values = [row[figure] for row in rows if row[figure] is not None]
    axes.set_ylim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values))))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    unit: Callable[[float], str] = seconds if figure == "cpu_s" else size
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, color=INK)


def _base(header: Row, rows: Sequence[Row]) -> str:
    base = next(row for row in rows if row["factor"] is None)
    return (
        f"{base['n_image']} image tokens, vocabulary {base['vocab']:,}, depth {base['k']}, width {header['dim']}, "
        f"ARC, one scale, one thread of {header['cpu']}"
    )


def count(value: float) -> str:
    """4096 as `4k`."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def seconds(value: float) -> str:
    """0.02 as `20 ms`."""
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def size(value: float) -> str:
    """Bytes in powers of ten."""
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path
