"""How time and memory grow: every operation and the whole post-processing, one factor at a time.

    python -m benchmarks.suite [--smoke]

Each figure comes from a process of its own, on one thread: memory is that of the first call, time the median of those
after it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cost import in_fresh_process, one_thread, progress
from benchmarks.record import RESULTS, machine, write_jsonl
from benchmarks.workloads import DIM, ENGINE, EVERY, N_PROMPT, Size, Workload, timed

BASE = Size()
GRID: Mapping[str, Sequence[int]] = {
    "n_targets": (64, 128, 256, 512, 1024, 2048, 4096),
    "edge": (16, 24, 32, 64, 128),
    "vocab": (32_768, 65_536, 131_072, 262_144),
    "k": (10, 20, 50, 100, 200),
    "n_scales": (1, 2, 3, 4),
}
SMOKE_BASE = Size(n_targets=48, edge=6, vocab=512, k=10)
SMOKE_GRID: Mapping[str, Sequence[int]] = {"n_targets": (16, 48), "n_scales": (1, 2)}


@dataclass(frozen=True)
class Point:
    """One workload at one size, and the factor that makes it differ from the base (None at the base)."""

    workload: Workload
    factor: str | None
    size: Size

    def __str__(self) -> str:
        what = "base" if self.factor is None else f"{self.factor} {getattr(self.size, self.factor)}"
        return f"{self.workload.name}, {what}"


def points(base: Size, grid: Mapping[str, Sequence[int]]) -> Iterator[Point]:
    """Every workload at the base, then with one factor at a time changed."""
    for workload in EVERY:
        start = replace(base, n_scales=max(base.n_scales, workload.least_scales))
        yield Point(workload, None, start)
        for factor in workload.factors:
            for value in grid.get(factor, ()):
                size = replace(start, **{factor: value})
                if size != start and size.n_scales >= workload.least_scales:
                    yield Point(workload, factor, size)


def measure(point: Point, side: str) -> dict[str, Any]:
    """One line of the results."""
    workload, size = point.workload, point.size
    cost = in_fresh_process(timed, workload.name, side, size)
    does_all = side == ENGINE or not workload.sampled
    return {
        "workload": workload.name,
        "side": side,
        "factor": point.factor,
        **asdict(size),
        "n_image": size.n_image,
        "cpu_s": float(f"{cost.cpu_s:.4g}"),
        "runs": cost.runs,
        "peak_bytes": cost.peak_bytes if does_all else None,
    }


def run(*, smoke: bool) -> list[dict[str, Any]]:
    """Measure everything. The first row is the header."""
    began = time.monotonic()
    asked = [
        (point, side)
        for point in points(SMOKE_BASE if smoke else BASE, SMOKE_GRID if smoke else GRID)
        for side in point.workload.sides(point.size)
    ]
    rows = [measure(*each) for each in progress(asked, lambda each: f"{each[0]}: {each[1]}")]
    with one_thread():
        header = machine("python -m benchmarks.suite" + (" --smoke" if smoke else ""))
    header |= {"dim": DIM, "n_prompt": N_PROMPT, "took_s": round(time.monotonic() - began)}
    return [header, *rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in seconds; nothing to conclude from")
    parser.add_argument("--out", type=Path, help="the result file; not written by --smoke unless given")
    parser.add_argument("--plots", type=Path, help="directory of the plots; not drawn by --smoke unless given")
    args = parser.parse_args()
    header, *rows = run(smoke=args.smoke)
    out, plots = args.out, args.plots
    if not args.smoke:
        out, plots = out or RESULTS / "suite.jsonl", plots or RESULTS
    if out is not None:
        print(write_jsonl(out, [header, *rows]))
    if plots is not None:
        from benchmarks.plots import draw

        print(*draw(header, rows, plots), sep="\n")
    from benchmarks.table import suite_table

    print(suite_table(header, rows))


if __name__ == "__main__":
    main()
