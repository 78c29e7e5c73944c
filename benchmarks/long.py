"""Long responses: does time grow as targets times what they are compared with, and does memory stay bounded.

    python -m benchmarks.long

ARC over a full vocabulary, each length in a process of its own. Memory is what is added to hidden states and output
embeddings, the finished maps included.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.cost import cpu_s, in_fresh_process, one_thread, progress
from benchmarks.record import RESULTS, machine, write_jsonl
from benchmarks.sides import PERSISTENCE, TOP_K
from fastattr.method import explain_states
from fastattr.types import AttributionConfig

LENGTHS = (512, 1024, 2048, 4096)
LONGEST = 16_384  # within LIMIT_BYTES by `memory_limit`, results in a file
LIMIT_BYTES = 1_500_000_000
FULL = Case(dim=64, vocab=152_064)
CASES: Mapping[str, Case] = {
    "one scale": replace(FULL, edge=64),
    "three scales, the finest with 4,096 image tokens": replace(FULL, edge=32, scales=(1.0, 1.5, 2.0)),
    "three scales, the coarsest with 4,096 image tokens": replace(FULL, edge=64, scales=(1.0, 1.5, 2.0)),
}


def timed(case: Case, limit_bytes: int | None) -> Callable[[], float]:
    """The whole post-processing of a case."""
    small = replace(case, n_targets=2, n_prompt=2, edge=4, vocab=TOP_K)
    explain(small, None)()  # first uses load libraries
    return partial(cpu_s, explain(case, limit_bytes))


def explain(case: Case, limit_bytes: int | None) -> Callable[[], object]:
    """ARC on the states of a case, which are made here."""
    readings, head = case.states()
    config = AttributionConfig(
        method="arc", scales=case.scales, top_k=TOP_K, rbo_p=PERSISTENCE, filter=True, evidence=False
    )
    return partial(explain_states, readings, head, config, memory_limit=limit_bytes)


def measure(name: str, case: Case, limit_bytes: int | None = None) -> dict[str, Any]:
    """One line of the results."""
    cost = in_fresh_process(timed, case, limit_bytes)
    finest = max(round(case.edge * scale) for scale in case.scales) ** 2
    return {
        "case": name,
        "n_targets": case.n_targets,
        "image_tokens": [round(case.edge * scale) ** 2 for scale in case.scales],
        "vocab": case.vocab,
        "dim": case.dim,
        "cpu_s": float(f"{cost.cpu_s:.4g}"),
        "runs": cost.runs,
        "peak_bytes": cost.peak_bytes,
        "work": case.n_targets * (finest + case.n_targets),
        **({} if limit_bytes is None else {"memory_limit": limit_bytes}),
    }


def growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How time grows with `targets x (image + targets)` over the lengths of one case.

    Returns:
        `exponent`: the least-squares slope of log time over log work (1 is proportional); `ratio`: how much time grew
        from the shortest to the longest relative to the work (at most 1 is no faster).
    """
    first, last = rows[0], rows[-1]
    slope = np.polyfit([math.log(row["work"]) for row in rows], [math.log(row["cpu_s"]) for row in rows], 1)[0]
    ratio = (last["cpu_s"] / first["cpu_s"]) / (last["work"] / first["work"])
    return {"case": first["case"], "exponent": round(float(slope), 3), "ratio": round(ratio, 3)}


def run(
    cases: Mapping[str, Case], lengths: Sequence[int], longest: int, limit_bytes: int = LIMIT_BYTES
) -> list[dict[str, Any]]:
    """Measure every case at every length, and the first at `longest` within a limit of memory.

    The first row is the header; it holds how each case grows.
    """
    asked: list[tuple[str, Case, int | None]] = [
        (name, replace(case, n_targets=length), None) for name, case in cases.items() for length in lengths
    ]
    first, case = next(iter(cases.items()))
    asked.append((f"{first}, within {limit_bytes / 1e9:g} GB", replace(case, n_targets=longest), limit_bytes))
    rows = [measure(*each) for each in progress(asked, lambda each: f"{each[0]}, {each[1].n_targets} targets")]
    with one_thread():
        header = machine("python -m benchmarks.long")
    grew = [growth([row for row in rows if row["case"] == name]) for name in cases]
    return [{**header, "limit_bytes": limit_bytes, "growth": grew}, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "long.jsonl")
    path = parser.parse_args().out
    header, *rows = run(CASES, LENGTHS, LONGEST)
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.table import long_table

    print(long_table(header, rows))


if __name__ == "__main__":
    main()
