"""Tables of what logging costs and what it survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattr.evaluate.tables import markdown

Row = Mapping[str, Any]
GOALS = {"submit_p50_us": 20, "submit_p99_us": 200, "records_per_s": 200, "capture": 0.03}


def log_table(header: Row, rows: Sequence[Row]) -> str:
    """What a server pays, and how much a logger takes."""
    submits = {row["burst"]: row for row in rows if row["case"] == "submit"}
    (records,) = (row for row in rows if row["case"] == "records")
    (capture,) = (row for row in rows if row["case"] == "capture")
    (server,) = (row for row in rows if row["case"] == "server")
    lines = []
    for burst, row in sorted(submits.items(), reverse=True):
        how = f"in bursts of {burst}" if burst > 1 else "each after a pause and its capture"
        lines += [
            (
                f"`submit` at {row['load']:g}x what can be explained, {how}: p50",
                f"{row['submit_p50_us']:.0f} us",
                f"{GOALS['submit_p50_us']} us",
                f"`json.dumps` of a small mapping {row['json_p50_us']:.0f} us",
            ),
            (
                f"the same: p99 of {row['n']:,}",
                f"{row['submit_p99_us']:.0f} us",
                f"{GOALS['submit_p99_us']} us",
                f"`json.dumps` {row['json_p99_us']:.0f} us",
            ),
        ]
    lines += [
        (
            f"records of {records['tokens']} tokens, 24 x 24 cells, from `submit_attribution` to Parquet",
            f"{records['published_per_s']:.0f} a second",
            f"{GOALS['records_per_s']} a second",
            f"{records['cpu_ms_per_record']:.1f} ms of CPU and {records['bytes_per_record'] / 1e3:.0f} KB each",
        ),
        (
            f"`capture` over `generate` of {capture['n_new']} tokens, CPU time",
            _share(capture["over_generate"]),
            f"{GOALS['capture']:.0%}",
            f"quartiles {_share(capture['quartiles'][0])}, {_share(capture['quartiles'][1])} of {capture['runs']} pairs",
        ),
        (
            f"capturing all and explaining {server['sample_rate']:.0%} beside `generate`, wall time",
            _share(server["over_generate"]),
            "",
            f"quartiles {_share(server['quartiles'][0])}, {_share(server['quartiles'][1])} of {server['pairs']} pairs",
        ),
    ]
    return f"{header['cpu']}, {header['cores']} cores, torch {header['torch']} with one thread.\n\n" + markdown(
        ("what", "measured", "goal", "beside it"), lines
    )


def faults_table(_header: Row, rows: Sequence[Row]) -> str:
    """What was done to the logger, and what became of the records."""
    names = ("faults", "acknowledged", "checked", "lost", "duplicates", "counted")
    total = {"kind": "all", **{name: sum(row[name] for row in rows) for name in names}}
    return markdown(
        ("fault", "injected", "acknowledged", "records checked", "lost", "twice", "dropped or failed, and counted"),
        ((row["kind"], *(f"{row[name]:,}" for name in names)) for row in (*rows, total)),
    )


def server_table(_header: Row, rows: Sequence[Row]) -> str:
    """A server under load, killed half-way."""
    (row,) = rows
    verdict = "nothing lost" if row["doctor"]["healthy"] else f"{row['doctor']['lost']} lost"
    return markdown(
        (
            "seconds",
            "clients",
            "answers",
            "answer p50",
            "p99",
            "durable before SIGKILL",
            "of before it, found",
            "answered, not yet durable",
            "records",
            "twice",
            "`fastattr log doctor`",
        ),
        [
            (
                f"{row['seconds']:g}",
                str(row["clients"]),
                f"{row['answered']:,}",
                f"{row['answer_p50_ms']:.0f} ms",
                f"{row['answer_p99_ms']:.0f} ms",
                f"{row['durable_before_kill']:,}",
                f"{row['found_from_before_kill']:,}",
                str(row["answered_before_kill_not_durable"]),
                f"{row['records']:,}",
                str(row["twice"]),
                verdict,
            )
        ],
    )


def _share(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"
