"""The result files as Markdown, for the README: `python -m benchmarks.table`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.record import RESULTS, read_jsonl

Row = Mapping[str, Any]


def ablation_table(header: Row, rows: Sequence[Row]) -> str:
    """Methods at scales, then what one change to the base does."""
    base = header["base"]
    methods = markdown(
        ("method", "scales", "Obj-IoU", "Func-IoU", "F1-IoU", "gain over one-scale TAM"),
        (
            (*row["value"].split(" ", 1), *_scores(row), _interval(row["gain_over_one_scale_tam"]))
            for row in rows
            if row["factor"] == "method x scales"
        ),
    )
    changes = markdown(
        ("change", "from", "to", "Obj-IoU", "Func-IoU", "F1-IoU", "gain over the base"),
        (
            (
                f"`{row['factor']}`",
                _plain(base[row["factor"]]),
                row["value"],
                *_scores(row),
                _interval(row["gain_over_base"]),
            )
            for row in rows
            if row["factor"] != "method x scales"
        ),
    )
    first = rows[0]
    counted = (
        f"{first['scenes']} held-out scenes, {first['n_nouns']} nouns, {first['n_functions']} function words, "
        f"{first['n_dropped']} dropped; intervals are {header['interval']}."
    )
    scales = _plain(base["scales"])
    return f"{counted}\n\n{methods}\n\nOne change at a time to `{base['method']}` at scales {scales}:\n\n{changes}"


IN_SHORT = ("tam 1", "arc 1", "lens 1 1.5 2", "tam 1 1.5 2", "arc 1 1.5 2", "lens 2", "tam 2", "arc 2")


def ablation_summary(header: Row, rows: Sequence[Row]) -> str:
    """The rows a reader wants first: one scale, several, and the largest alone as a control."""
    chosen = {row["value"]: row for row in rows if row["factor"] == "method x scales"}
    return markdown(
        ("method", "scales", "Obj-IoU", "Func-IoU", "F1-IoU", "F1 over one-scale TAM, 95 % interval"),
        (
            (*name.split(" ", 1), *_scores(chosen[name]), _interval(chosen[name]["gain_over_one_scale_tam"]))
            for name in IN_SHORT
        ),
    )


def postprocessing_table(header: Row, rows: Sequence[Row]) -> str:
    """The engine beside the naive loops."""
    table = markdown(
        ("method", "targets x image x context", "naive loops, CPU s", "engine, CPU s", "ratio"),
        (
            (
                row["method"],
                f"{row['n_targets']} x {row['n_image']} x {row['n_context']}",
                f"{row['naive_cpu_s']:.1f}",
                f"{row['engine_cpu_s']:.3f}",
                f"{row['ratio']:.0f}x",
            )
            for row in rows
        ),
    )
    threads = "one thread" if header["threads"] == 1 else f"{header['threads']} threads"
    return f"{header['cpu']}, {threads}, torch {header['torch']}.\n\n{table}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(row: Row) -> tuple[str, str, str]:
    return f"{row['obj']:.3f}", f"{row['func']:.3f}", f"{row['f1']:.3f}"


def _interval(gain: Row) -> str:
    return f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _plain(value: object) -> str:
    if value is None:
        return "scale^2"
    return " ".join(f"{each:g}" for each in value) if isinstance(value, list | tuple) else str(value)


def main() -> None:
    tables = (
        ("ablation in short", "ablation", ablation_summary),
        ("ablation", "ablation", ablation_table),
        ("post-processing", "postprocessing", postprocessing_table),
    )
    for title, name, table in tables:
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            print(f"### {title}\n\n{table(*read_jsonl(path))}\n")


if __name__ == "__main__":
    main()
