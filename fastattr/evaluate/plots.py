"""Results as pictures: curves of hidden and shown patches, and bars with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastattr.errors import InputError, how_to_install
from fastattr.evaluate.judging import MASK, RANDOM
from fastattr.evaluate.running import Results
from fastattr.evaluate.tables import (
    baseline_of,
    both_kinds,
    has_nouns,
    hiding_gain,
    mean_curve,
    plausibility_gain,
    tellings,
    words_of,
)
from fastattr.metrics import Interval

try:
    import matplotlib
except ImportError as error:
    raise InputError(f"plots need matplotlib; leave them out with --no-plots, or {how_to_install('eval')}") from error

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#d9d9d9"
PALETTE = ("#2b6c8f", "#b5503c", "#c99a2e", "#5b8c5a", "#7a5c99", "#3f9c9c", "#a0527d", "#666666")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


def draw(results: Results, out: Path) -> list[Path]:
    """Draw what the results hold beside the file `out`: `NAME_curves.png`, `NAME_gains.png`, `NAME_inventions.png`."""
    drawn = []
    with plt.rc_context(STYLE):
        if any(row.hidings for row in results.judged):
            drawn.append(_save(_curves(results), out.with_name(f"{out.stem}_curves.png")))
        if len(_methods(results)) > 1 and has_nouns(results):
            drawn.append(_save(_gains(results), out.with_name(f"{out.stem}_gains.png")))
        if both_kinds(results):
            drawn.append(_save(_inventions(results), out.with_name(f"{out.stem}_inventions.png")))
    return drawn


def _methods(results: Results) -> list[str]:
    return list(results.header["settings"]["methods"])


def _curves(results: Results) -> Figure:
    figure, (deleting, inserting) = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True, constrained_layout=True)
    for axes, title, of in (
        (deleting, "hidden first: lower is better", lambda hiding: hiding.deletion),
        (inserting, "shown first: higher is better", lambda hiding: hiding.insertion),
    ):
        for name in (RANDOM, MASK):
            mean = mean_curve(results, name, of)
            axes.plot(
                np.linspace(0, 1, len(mean)), mean, color="#999999", ls=":" if name == RANDOM else "--", label=name
            )
        for name in _methods(results):
            mean = mean_curve(results, name, of)
            color = _color(_methods(results), name)
            axes.plot(np.linspace(0, 1, len(mean)), mean, color=color, label=name, lw=1.8)
        axes.set_title(title)
        axes.set_ylim(0, 1.02)
        axes.grid(axis="y", color=FAINT, lw=0.6)
    deleting.set_ylabel("probability of the word")
    inserting.legend(frameon=False, loc="lower right")
    figure.supxlabel(f"share of the patches; {_base(results)}", fontsize=9, color=INK)
    return figure


def _gains(results: Results) -> Figure:
    base = baseline_of(_methods(results))
    others = [name for name in _methods(results) if name != base]
    panels = [("F1-IoU: higher is better", [plausibility_gain(results, name, base) for name in others])]
    if any(row.hidings for row in results.judged):
        for title, score in (
            ("deletion: lower is better", "deletion_auc"),
            ("insertion: higher is better", "insertion_auc"),
        ):
            panels.append((title, [hiding_gain(results, name, base, score) for name in others]))
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(3.4 * len(panels), 0.5 * len(others) + 1.4),
        sharey=True,
        constrained_layout=True,
        squeeze=False,
    )
    for panel, (title, gains) in zip(axes[0], panels, strict=True):
        _bars(panel, others, gains, [_color(_methods(results), name) for name in others])
        panel.set_title(title)
    figure.supxlabel(f"difference to {base}, 95 % interval; {_base(results)}", fontsize=9, color=INK)
    return figure


def _inventions(results: Results) -> Figure:
    found = tellings(words_of(results))
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(found) + 1.2), constrained_layout=True)
    _bars(axes, [each.score for each in found], [each.within for each in found], [PALETTE[0]] * len(found), origin=0.5)
    axes.set_title("telling invented words from true ones, within position bins")
    figure.supxlabel(f"AUROC, 95 % interval; {_base(results)}", fontsize=9, color=INK)
    return figure


def _color(methods: list[str], name: str) -> str:
    return PALETTE[methods.index(name) % len(PALETTE)]


def _bars(axes: Axes, names: list[str], values: list[Interval], colors: list[str], origin: float = 0.0) -> None:
    places = np.arange(len(names))[::-1]
    middle = np.array([value.mean for value in values])
    reach = np.array([[value.mean - value.low, value.high - value.mean] for value in values]).T
    axes.barh(places, middle - origin, left=origin, xerr=reach, color=colors, height=0.6, ecolor=INK, capsize=2)
    axes.axvline(origin, color=INK, lw=0.8)
    axes.set_yticks(places, names)
    axes.grid(axis="x", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)


def _base(results: Results) -> str:
    return f"{len(results.judged)} samples of {results.header['dataset']}, {results.header['model']}"


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
