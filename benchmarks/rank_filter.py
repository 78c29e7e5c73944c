"""On which grids the rank-Gaussian filter helps: `shapes` shown at one scale after the other, with and without it.

    python -m benchmarks.rank_filter

Plausibility on held-out scenes. A window of 3 x 3 takes away what is smaller, so the answer depends on how many cells
wide things are; those of the scenes are a sixth to a third of a picture.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, machine, rounded, write_jsonl
from fastattr.evaluate import METHODS, Settings, Task, run
from fastattr.evaluate.tables import interval, markdown, plausibility_gain
from fastattr.metrics import Interval, pool

CELLS = (6, 9, 12, 14, 16, 18, 20, 24)  # a side; 6 is what the model is used to
COMPARED = ("lens", "tam")


def measure(n: int, workers: int) -> list[dict[str, Any]]:
    """A row for each method and grid. The first row is the header."""
    configs = {
        f"{method} {cells} {filtered}": replace(METHODS[method], scales=(cells / CELLS[0],), filter=filtered)
        for method in COMPARED
        for cells in CELLS
        for filtered in (False, True)
    }
    with tempfile.TemporaryDirectory() as folder:
        task = Task("scenes", "shapes", n, None, Settings(configs, words=0))
        results = run(task, Path(folder) / "results.jsonl", workers=workers)
    rows = []
    for method in COMPARED:
        for cells in CELLS:
            plain, filtered = (f"{method} {cells} {asked}" for asked in (False, True))
            f1 = [pool([row.plausibility[name] for row in results.judged]).f1 for name in (plain, filtered)]
            gain = rounded(plausibility_gain(results, filtered, plain))
            rows.append({"method": method, "cells": cells, "f1": f1[0], "f1_filtered": f1[1], "gain": gain})
    header = machine(f"python -m benchmarks.rank_filter --n {n}") | {"scenes": len(results.judged)}
    return [header, *rows]


def filter_table(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """F1 without and with the filter, and the difference."""
    return markdown(
        ("method", "cells a side", "F1-IoU without", "with the filter", "difference"),
        (
            (
                row["method"],
                str(row["cells"]),
                f"{row['f1']:.3f}",
                f"{row['f1_filtered']:.3f}",
                interval(Interval(**row["gain"])),
            )
            for row in rows
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_filter", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=60, help="scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "rank_filter.jsonl")
    args = parser.parse_args()
    rows = measure(args.n, args.workers)
    print(filter_table(rows[0], rows[1:]))
    print(write_jsonl(args.out, rows))


if __name__ == "__main__":
    main()
