"""The engine beside the naive loops and a good numpy program: from hidden states to finished maps, in CPU time.

    python -m benchmarks.postprocessing

All sides run on the same states, in turn, on one thread, and their maps are compared first: a speed-up of a wrong
result is none. Time is given by stage, because the products with the output embeddings are work that no rearrangement
avoids, and a ratio over the whole is mostly about how large the vocabulary was chosen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.compiled import compiled
from benchmarks.cost import one_thread, progress
from benchmarks.record import RESULTS, machine, write_jsonl
from benchmarks.sides import Explained, replaced, run_engine, run_naive, run_numpy
from fastattr.types import Method

TOLERANCE = 1e-5  # of a pixel in [0, 1]
LOG_PROB_TOLERANCE = 1e-4  # nats
METHODS: tuple[Method, ...] = ("tam", "arc")

SMALL = Case()
FULL_VOCABULARY = Case(dim=64, vocab=152_064)


@dataclass(frozen=True)
class Side:
    """CPU seconds of one side: medians of the runs, the range of the whole, and how far it is from the loops.

    Attributes:
        after_products_s: without the products with the output embeddings.
        max_difference: in any pixel of the targets that the naive loops explained.
        ratio, after_products_ratio: how many times the engine's time.
    """

    cpu_s: float
    cpu_range_s: tuple[float, float]
    after_products_s: float
    stage_s: Mapping[str, float]
    max_difference: float
    ratio: float
    after_products_ratio: float


@dataclass(frozen=True)
class Comparison:
    """One line of the results."""

    method: str
    n_targets: int
    n_image: int
    n_context: int
    dim: int
    vocab: int
    runs: int
    naive_targets: int
    sides: Mapping[str, Side]


def compare(
    case: Case, method: Method, *, naive_targets: int = 24, runs: int = 5, with_compiled: bool = False
) -> Comparison:
    """Time all sides on the same states, in turn, so that a busy machine slows all of them.

    Raises:
        ArithmeticError: a side does not give what the naive loops give.
    """
    readings, head = case.states()
    base = readings[0]
    calls: dict[str, Callable[[], Explained]] = {
        "naive": lambda: run_naive(base, head, method, naive_targets),
        "numpy per token": lambda: run_numpy(base, head, method),
        "engine": lambda: run_engine(readings, head, method),
    }
    if with_compiled:
        operations = compiled()

        def run_compiled() -> Explained:
            with replaced(operations):
                return run_engine(readings, head, method)

        calls["engine, compiled"] = run_compiled
    with one_thread():
        first = {side: call() for side, call in calls.items()}  # also compiles and warms up
        differences = {side: difference(explained, first["naive"]) for side, explained in first.items()}
        every = {side: [] for side in calls}
        for _ in range(runs):
            for side, call in calls.items():
                every[side].append(call())
    engine = every["engine"]
    return Comparison(
        method=method,
        n_targets=case.n_targets,
        n_image=case.n_image,
        n_context=case.n_prompt + case.n_targets,
        dim=case.dim,
        vocab=case.vocab,
        runs=runs,
        naive_targets=naive_targets,
        sides={side: _summary(explained, engine, differences[side]) for side, explained in every.items()},
    )


def difference(explained: Explained, loops: Explained) -> float:
    """The largest difference from the naive loops in any pixel of the targets both explained.

    Raises:
        ArithmeticError: it is too large, or log-probabilities differ.
    """
    found = [list(explained.targets).index(t) for t in loops.targets]
    pixels = float(np.abs(explained.maps[found] - loops.maps).max())
    nats = float(np.abs(explained.log_prob - loops.log_prob).max())
    if not (pixels < TOLERANCE and nats < LOG_PROB_TOLERANCE):  # also when one is NaN
        raise ArithmeticError(
            f"maps are {pixels:.1e} and log-probabilities {nats:.1e} nats off the naive loops, expected at most "
            f"{TOLERANCE} and {LOG_PROB_TOLERANCE}; no time is reported for a wrong result"
        )
    return float(f"{pixels:.1e}")


def _summary(every: list[Explained], engine: list[Explained], max_difference: float) -> Side:
    whole = [each.cpu_s for each in every]
    whole_s, after_s = statistics.median(whole), statistics.median(each.after_products_s for each in every)
    return Side(
        cpu_s=_round(whole_s),
        cpu_range_s=(_round(min(whole)), _round(max(whole))),
        after_products_s=_round(after_s),
        stage_s={stage: _round(statistics.median(each.stage_s[stage] for each in every)) for stage in every[0].stage_s},
        max_difference=max_difference,
        ratio=_round(whole_s / statistics.median(each.cpu_s for each in engine)),
        after_products_ratio=_round(after_s / statistics.median(each.after_products_s for each in engine)),
    )


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postprocessing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "postprocessing.jsonl")
    path = parser.parse_args().out
    asked: list[tuple[Case, Method, int]] = [
        (case, method, runs) for case, runs in ((SMALL, 5), (FULL_VOCABULARY, 3)) for method in METHODS
    ]
    rows: list[dict[str, Any]] = [
        asdict(compare(case, method, runs=runs, with_compiled=True))
        for case, method, runs in progress(asked, lambda each: f"{each[1]}, vocabulary {each[0].vocab:,}")
    ]
    with one_thread():
        header = machine("python -m benchmarks.postprocessing")
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.table import postprocessing_stages

    print(postprocessing_stages(header, rows))


if __name__ == "__main__":
    main()
