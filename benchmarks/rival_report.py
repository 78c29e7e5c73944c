"""The rivals' results as a table and as a picture, `rivals.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fastattr.evaluate.judging import RANDOM
from fastattr.evaluate.plots import FAINT, INK, STYLE
from fastattr.evaluate.tables import interval, level, markdown
from fastattr.metrics import Interval

Row = Mapping[str, Any]

COLORS = {
    "fastattr": "#2b6c8f",
    "attention": "#c99a2e",
    "gradient": "#b5503c",
    "perturbation": "#6b8f4e",
    "control": INK,
}


def rivals_table(header: Row, rows: Sequence[Row]) -> str:
    """Where the maps lie, what the model makes of them, and what they take."""
    quality = markdown(
        ("method", "Obj-IoU", "Func-IoU", "F1-IoU", "pointing", "deletion", "insertion"),
        (
            (
                row["method"],
                *(f"{row[figure]:.3f}" if figure in row else "" for figure in ("obj", "func", "f1", "pointing")),
                *(f"{row[figure]['mean']:.3f}" for figure in ("deletion", "insertion")),
            )
            for row in rows
        ),
    )
    gaps = markdown(
        ("method", "F1-IoU", "pointing", "deletion", "insertion"),
        (
            (
                row["method"],
                *(
                    interval(Interval(**row[f"{figure}_over_reference"])) if f"{figure}_over_reference" in row else ""
                    for figure in ("f1", "pointing", "deletion", "insertion")
                ),
            )
            for row in rows
            if row["method"] != header["reference"]
        ),
    )
    prices = markdown(
        ("method", "CPU time a token", "forwards a token", "backwards a token", "peak memory"),
        (
            (
                row["method"],
                f"{row['cpu_s_per_token'] * 1e3:.3g} ms",
                f"{row['forwards_per_token']:.3g}",
                f"{row['backwards_per_token']:.3g}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB",
            )
            for row in rows
            if "cpu_s_per_token" in row
        ),
    )
    counted = next(row for row in rows if "n_nouns" in row)
    left_out = "".join(f"\n\nLeft out: {name}. {reason}." for name, reason in header["left_out"].items())
    return (
        f"{header['scenes']} held-out scenes, {counted['n_nouns']} nouns, {counted['n_functions']} function words; judged by "
        f"hiding and showing: {header['judged']}. Less deletion and more insertion is better.\n\n{quality}\n\n"
        f"Differences to {header['reference']} with intervals ({header['interval']}):\n\n{gaps}\n\n"
        f"{header['prices']}.\n\n{prices}\n\n{header['normalisation']}.{left_out}"
    )


def rivals_summary(header: Row, rows: Sequence[Row]) -> str:
    """What a reader wants first: how right, how much needed, at what price."""
    return markdown(
        ("method", "F1-IoU", "pointing", "deletion", "insertion", "CPU time a token"),
        (
            (
                row["method"],
                *(f"{row[figure]:.3f}" if figure in row else "" for figure in ("f1", "pointing")),
                *(level(Interval(**row[figure])) for figure in ("deletion", "insertion")),
                f"{row['cpu_s_per_token'] * 1e3:.3g} ms" if "cpu_s_per_token" in row else "",
            )
            for row in rows
        ),
    )


def draw(header: Row, rows: Sequence[Row], path: Path) -> Path:
    """Deletion against insertion, a point a method with the 95 % intervals of both means: all, and the good corner."""
    chance = next(row for row in rows if row["method"] == RANDOM)
    near = [row for row in rows if row["deletion"]["mean"] < chance["deletion"]["mean"] / 2]
    far = [row for row in rows if row not in near]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, (whole, corner) = plt.subplots(1, 2, figsize=(12.0, 5.6), width_ratios=(2, 3), constrained_layout=True)
        _points(whole, rows)
        _points(corner, near)
        whole.set_title(f"all, {header['scenes']} scenes")
        corner.set_title("the corner of the best")
        for row in far:
            where = row["deletion"]["mean"], row["insertion"]["mean"]
            side = (-7, "right") if row["deletion"]["mean"] > 0.5 else (7, "left")
            whole.annotate(
                row["method"],
                where,
                (side[0], 7),
                textcoords="offset points",
                color=COLORS[row["kind"]],
                fontsize=9,
                ha=side[1],
            )
        _name_beside(corner, near)
        figure.supxlabel(
            "deletion: the word's mean probability while the picture is hidden, less is better", fontsize=10, color=INK
        )
        figure.supylabel("insertion: the same while it is shown, more is better", fontsize=10, color=INK)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return path


def _points(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        x, y = row["deletion"], row["insertion"]
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            color=COLORS[row["kind"]],
            marker="s" if row["kind"] == "control" else "o",
            markersize=6,
            linewidth=0.8,
        )
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _name_beside(axes: Axes, rows: Sequence[Row]) -> None:
    """Names in a column on the right, highest point first, each with a line to its point."""
    ordered = sorted(rows, key=lambda row: row["insertion"]["mean"])
    for height, row in zip(np.linspace(0.02, 0.98, len(ordered)), ordered, strict=True):
        axes.annotate(
            row["method"],
            (row["deletion"]["mean"], row["insertion"]["mean"]),
            (1.04, height),
            textcoords="axes fraction",
            color=COLORS[row["kind"]],
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": COLORS[row["kind"]],
                "linewidth": 0.8,
                "linestyle": ":",
                "relpos": (0, 0.5),
            },
        )
