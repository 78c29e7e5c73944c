"""The result files as Markdown, for the README: `python -m benchmarks.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.log_report import faults_table, log_table, server_table
from benchmarks.rank_filter import filter_table
from benchmarks.record import RESULTS, read_jsonl
from benchmarks.rival_report import rivals_table
from benchmarks.sanity import sanity_table
from benchmarks.scaling_report import batch_kill_table, scaling_table
from fastattr.evaluate import Results
from fastattr.evaluate.tables import (
    AGREEMENT,
    COMBINED,
    COMBINED_WORST,
    EVIDENCE,
    LOG_PROB,
    POSITION,
    interval,
    level,
    markdown,
    tellings,
    words_of,
)
from fastattr.metrics import Interval

Row = Mapping[str, Any]


def sweep_table(header: Row, rows: Sequence[Row]) -> str:
    """Methods at scales, then what one change does to the base and to the best, by masks and by hiding patches."""
    head = (
        "Obj-IoU",
        "Func-IoU",
        "F1-IoU",
        "pointing",
        "deletion",
        "insertion",
        "F1 over",
        "deletion over",
        "insertion over",
    )

    def cells(row: Row, base: str) -> tuple[str, ...]:
        gains = row[base]
        shown = (f"{row[name]:.3f}" for name in ("obj", "func", "f1", "pointing", "deletion", "insertion"))
        return (*shown, *(interval(Interval(**gains[name])) for name in ("f1", "deletion", "insertion")))

    methods = markdown(
        ("method and scales", *head),
        ((row["value"], *cells(row, "over_tam")) for row in rows if row["factor"] == "method x scales"),
    )
    changes = markdown(
        ("change", *head),
        (
            (f"{row['factor']}: {row['value']}", *cells(row, "over_base"))
            for row in rows
            if row["factor"] not in ("method x scales", "control")
        ),
    )
    controls = "; ".join(
        f"{row['value']} {row['deletion']:.3f} / {row['insertion']:.3f}" for row in rows if row["factor"] == "control"
    )
    first = rows[0]
    return (
        f"{header['model']}: {header['scenes']} held-out scenes, {first['n_nouns']} nouns, {first['n_functions']} function "
        f"words, {first['n_dropped']} dropped; {header['hidden_words']} words judged by hiding patches. Intervals are "
        f"{header['interval']}.\n\nOver one-scale TAM as published:\n\n{methods}\n\nOver the base, "
        f"`{header['base']['method']}` at scales {_plain(header['base']['scales'])}:\n\n{changes}\n\n"
        f"Deletion / insertion without a method: {controls}."
    )


INVENTION_SCORES = (POSITION, LOG_PROB, EVIDENCE, COMBINED, AGREEMENT, COMBINED_WORST)


def inventions_summary(every: Sequence[Results]) -> str:
    """Telling invented words from true ones within position bins: AUROC of every score that needs no map."""
    rows = []
    for results in every:
        words = words_of(results)
        found = {each.score: each for each in tellings(words)}
        best = max((each for each in found.values() if "(" in each.score), key=lambda each: each.within.mean)
        rows.append(
            (
                results.header["dataset"],
                f"{int((~words.true).sum())} of {len(words.true):,}",
                *(level(found[name].within) for name in INVENTION_SCORES),
                interval(found[COMBINED_WORST].over_log_prob),
                f"{best.score} {best.within.mean:.3f}",
            )
        )
    head = ("words", "invented", *INVENTION_SCORES, "the last over log-probability", "best map descriptor")
    return markdown(head, rows)


def postprocessing_table(header: Row, rows: Sequence[Row]) -> str:
    """The engine beside the naive loops and the numpy program, with and without what all sides multiply."""
    table = markdown(
        (
            "method",
            "vocabulary",
            "after the products: naive",
            "numpy per token",
            "engine",
            "whole: naive",
            "numpy per token",
            "engine",
        ),
        (
            (row["method"], f"{row['vocab']:,}", *_sides(row["sides"], "after_products"), *_sides(row["sides"], ""))
            for row in rows
        ),
    )
    return f"{_targets(rows[0])}; CPU time. {_machine(header)}.\n\n{table}"


def postprocessing_stages(header: Row, rows: Sequence[Row]) -> str:
    """CPU milliseconds of every side by stage."""
    stages = list(dict.fromkeys(stage for row in rows for side in row["sides"].values() for stage in side["stage_s"]))
    table = markdown(
        ("method", "vocabulary", "side", *stages, "whole"),
        (
            (
                row["method"],
                f"{row['vocab']:,}",
                name,
                *(_ms(side["stage_s"][stage]) if stage in side["stage_s"] else "" for stage in stages),
                _ms(side["cpu_s"]),
            )
            for row in rows
            for name, side in row["sides"].items()
        ),
    )
    return f"{_targets(rows[0])}; CPU milliseconds. {_machine(header)}.\n\n{table}"


def _sides(sides: Row, part: str) -> tuple[str, str, str]:
    """Naive, numpy and engine, each with how many times the engine's time it takes."""
    time, ratio = (f"{part}_s", f"{part}_ratio") if part else ("cpu_s", "ratio")
    naive, numpy = (f"{_time(sides[n][time])} ({sides[n][ratio]:.3g}x)" for n in ("naive", "numpy per token"))
    return naive, numpy, _time(sides["engine"][time])


def _targets(row: Row) -> str:
    return f"{row['n_targets']} targets x {row['n_image']} image tokens x {row['n_context']} context tokens"


def suite_table(header: Row, rows: Sequence[Row]) -> str:
    """Every operation at the base, then the whole as its factors grow."""
    by_side: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["workload"], row["factor"], *(row[name] for name in SIZES))
        by_side.setdefault(key, {})[row["side"]] = row

    def line(sides: Mapping[str, Row]) -> tuple[str, ...]:
        engine = sides["engine"]
        others = (sides.get(name) for name in ("numpy per token", "naive"))
        return (
            *(f"{engine[name]:,}" for name in SIZES),
            _time(engine["cpu_s"]),
            _bytes(engine["peak_bytes"]),
            *("" if other is None else _times(other["cpu_s"] / engine["cpu_s"]) for other in others),
        )

    head = ("targets", "image tokens", "vocabulary", "k", "scales", "engine", "its memory", "numpy per token", "naive")
    base = markdown(
        ("operation", *head),
        ((workload, *line(sides)) for (workload, factor, *_), sides in by_side.items() if factor is None),
    )
    growth = markdown(
        ("grows", *head),
        (
            (factor, *line(sides))
            for (workload, factor, *_), sides in by_side.items()
            if workload == "whole" and factor is not None
        ),
    )
    return f"{_machine(header)}, width {header['dim']}.\n\n{base}\n\n{growth}"


def rates_table(header: Row, rows: Sequence[Row]) -> str:
    """Single operations against what they are made of."""
    table = markdown(
        ("operation", "size", "baseline", "per", "baseline takes", "engine takes", "ratio", "goal", "added memory"),
        (
            (
                row["operation"],
                row["size"],
                row["baseline"],
                row["per"],
                _time(row["baseline_s"]),
                _time(row["engine_s"]),
                _times(row["ratio"]),
                f"{row['goal']:g}x",
                _bytes(row["added_bytes"]),
            )
            for row in rows
        ),
    )
    return f"{_machine(header)}.\n\n{table}"


def long_table(header: Row, rows: Sequence[Row]) -> str:
    """Time and memory of long responses, and how they grow."""
    grew = {each["case"]: each for each in header["growth"]}
    table = markdown(
        ("case", "targets", "image tokens", "CPU time", "peak memory over states and weights"),
        (
            (
                row["case"],
                f"{row['n_targets']:,}",
                " ".join(f"{n:,}" for n in row["image_tokens"]),
                _time(row["cpu_s"]),
                _bytes(row["peak_bytes"]),
            )
            for row in rows
        ),
    )
    growth = markdown(
        ("case", "time grows as work to the power of", "time over work, longest against shortest"),
        ((case, f"{each['exponent']:.2f}", f"{each['ratio']:.2f}") for case, each in grew.items()),
    )
    return (
        f"ARC, vocabulary {rows[0]['vocab']:,}, width {rows[0]['dim']}. {_machine(header)}.\n\n{table}\n\n"
        f"Work is targets x (image tokens + targets).\n\n{growth}"
    )


def overhead_table(header: Row, rows: Sequence[Row]) -> str:
    """Generation with and without capture, and explanations, as shares of plain generation."""
    table = markdown(
        ("model", "call", "CPU time", "of plain generation", "peak memory"),
        (
            (
                row["model"],
                row["call"],
                _time(row["cpu_s"]),
                f"{row['over_generate']:.1%}",
                _bytes(row["peak_bytes"]),
            )
            for row in rows
        ),
    )
    return f"{rows[0]['n_new']} new tokens. {_machine(header)}, transformers {header['transformers']}.\n\n{table}"


def static_table(header: Row, rows: Sequence[Row]) -> str:
    """What the compilers made of every kernel: the most registers and shared memory of its variants on each target."""
    kernels = [row for row in rows if row["record"] == "kernel"]
    targets = list(dict.fromkeys(row["target"] for row in kernels))
    names = dict.fromkeys((row["module"].rsplit(".", 1)[1], row["kernel"]) for row in kernels)

    def line(file: str, kernel: str) -> tuple[str, ...]:
        own = [row for row in kernels if (row["module"].rsplit(".", 1)[1], row["kernel"]) == (file, kernel)]
        most = [max(row["registers"] for row in own if row["target"] == target) for target in targets]
        units = sorted({row["matrix_instruction"].split(".")[0] for row in own} - {""})
        return (
            f"`{file}.{kernel}`",
            str(len(own)),
            " / ".join(map(str, most)),
            f"{max(row['shared_bytes'] for row in own):,}",
            str(max(row["spill_bytes"] for row in own)),
            ", ".join(units),
        )

    table = markdown(
        ("kernel", "compiled", f"registers, {' / '.join(targets)}", "shared bytes", "spilled bytes", "matrix units"),
        (line(*name) for name in names),
    )
    return f"Compiled, never run: Triton {header['triton']}.\n\n{table}"


SIZES = ("n_targets", "n_image", "vocab", "k", "n_scales")


def _machine(header: Row) -> str:
    threads = "one thread" if header["threads"] == 1 else f"{header['threads']} threads"
    return f"{header['cpu']}, {threads}, torch {header['torch']}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _bytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f} MB"


def _plain(value: object) -> str:
    if value is None:
        return "scale^2"
    return " ".join(f"{each:g}" for each in value) if isinstance(value, list | tuple) else str(value)


TABLES: tuple[tuple[str, str, Callable[[Row, Sequence[Row]], str]], ...] = (
    ("choices of the method, shapes", "sweep_shapes", sweep_table),
    ("choices of the method, the control", "sweep_control", sweep_table),
    ("the filter on grids", "rank_filter", filter_table),
    ("rivals", "rivals", rivals_table),
    ("sanity", "sanity", sanity_table),
    ("post-processing", "postprocessing", postprocessing_table),
    ("post-processing by stage", "postprocessing", postprocessing_stages),
    ("how it grows", "suite", suite_table),
    ("single operations", "rates", rates_table),
    ("long responses", "long", long_table),
    ("beside generation", "overhead", overhead_table),
    ("scaling", "scaling", scaling_table),
    ("a batch killed", "batch_kill", batch_kill_table),
    ("compiled kernels", "static", static_table),
    ("logging", "log_load", log_table),
    ("a server killed", "log_server", server_table),
    ("faults", "faults", faults_table),
)


def main() -> None:
    for title, name, table in TABLES:
        path = RESULTS / f"{name}.jsonl"
        if path.exists():
            print(f"### {title}\n\n{table(*read_jsonl(path))}\n")


if __name__ == "__main__":
    main()
