"""The engine against the naive loops: from hidden states to finished maps, in CPU time.

    python -m benchmarks.postprocessing

The engine explains every target. The naive loops explain a few, spread evenly over the response so that they
see as much context as the average target, and their time is scaled up in proportion; what they share between
targets (activations, rankings) is done in full and not scaled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import naive
from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr import Attribution, attribute_states
from fastattr.types import Method, OutputHead, ScaleStates, TokenLayout

TOP_K = 50
PERSISTENCE = 0.9
TOLERANCE = 1e-5  # of a pixel in [0, 1]; a speed-up of a wrong result is none


@dataclass(frozen=True)
class Case:
    """States of a made-up model, as large as a long description of one image."""

    n_targets: int = 512
    n_prompt: int = 30
    grid: tuple[int, int] = (24, 24)
    dim: int = 256
    vocab: int = 2048
    seed: int = 0

    def states(self) -> tuple[ScaleStates, OutputHead]:
        n_image = self.grid[0] * self.grid[1]
        start = n_image + self.n_prompt
        rng = torch.Generator().manual_seed(self.seed)
        # a shared direction makes neighbours predict alike, as they do in a real model
        shared = torch.randn(self.dim, generator=rng)
        hidden = torch.randn(start + self.n_targets - 1, self.dim, generator=rng) + shared
        weight = torch.randn(self.vocab, self.dim, generator=rng) / self.dim**0.5
        ids = torch.randint(self.vocab, (start + self.n_targets,), generator=rng)
        layout = TokenLayout.from_spans(
            images=[(0, n_image, (1, *self.grid))], prompt=[(n_image, start)], response=(start, start + self.n_targets)
        )
        return ScaleStates(hidden, ids, layout), OutputHead(weight)


@dataclass(frozen=True)
class Naive:
    """What the naive loops gave for a few targets.

    Attributes:
        targets: which were explained.
        maps: `[target h w]` of those.
        shared_s: CPU seconds of the work that targets share.
        loops_s: CPU seconds of the loops over `targets`.
    """

    targets: list[int]
    maps: np.ndarray
    shared_s: float
    loops_s: float

    def cpu_s(self, n_targets: int) -> float:
        """CPU seconds for a whole response."""
        return self.shared_s + self.loops_s * n_targets / len(self.targets)


@dataclass(frozen=True)
class Comparison:
    """One line of the results: CPU seconds on one thread, medians of `runs`, with the least and the most.

    `max_difference` is the largest difference between the two in any pixel of the targets both explained.
    """

    method: str
    n_targets: int
    n_image: int
    n_context: int
    dim: int
    vocab: int
    runs: int
    engine_cpu_s: float
    engine_cpu_range_s: tuple[float, float]
    naive_cpu_s: float
    naive_cpu_range_s: tuple[float, float]
    naive_targets: int
    ratio: float
    max_difference: float


def run_engine(states: ScaleStates, head: OutputHead, method: Method) -> Attribution:
    """Everything the engine computes at one scale, log-probabilities included."""
    return attribute_states(
        states.hidden_states, head, states.input_ids, states.layout, method=method, top_k=TOP_K, rbo_p=PERSISTENCE
    )


def run_naive(states: ScaleStates, head: OutputHead, method: Method, n_targets: int) -> Naive:
    """The same maps for `n_targets` targets spread evenly over the response."""
    layout, ids = states.layout, states.input_ids.tolist()
    slots = [
        naive.Slot(read, ids[p], ids[p]) for p, read in zip(layout.context, layout.context_predictors, strict=True)
    ]
    height, width = layout.images[0].grid[1:]
    reading = naive.Reading(
        states.hidden_states.numpy(),
        head.weight.numpy(),
        np.array(layout.image_positions),
        (height, width),
        tuple(slots),
    )
    targets = [int((i + 0.5) * layout.n_targets / n_targets) for i in range(n_targets)]

    began = time.process_time()
    maps = [naive.activation(reading, slot) for slot in slots]
    rankings = naive.top_ids(reading, TOP_K) if method == "arc" else []
    shared_s = time.process_time() - began

    began = time.process_time()
    finished = []
    for t in (len(layout.prompt) + target for target in targets):
        scores = naive.scores(reading, t)
        weights = naive.tam_weights(reading, t, scores)
        if method == "arc":
            weights = naive.arc_weights(weights, rankings[: t + 1], PERSISTENCE)
        cleaned = naive.remove_interference(maps[t], maps[:t], weights)
        finished.append(naive.finish(reading, cleaned, scores))
    return Naive(targets, np.stack(finished), shared_s, time.process_time() - began)


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to one thread: CPU time would charge the others for waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(case: Case, method: Method, naive_targets: int = 24, runs: int = 5) -> Comparison:
    """Time both on the same states, in turn, so that a busy machine slows both."""
    states, head = case.states()
    engine_s, loops = [], []
    with one_thread():
        engine = run_engine(states, head, method)  # also warms up
        for _ in range(runs):
            began = time.process_time()
            run_engine(states, head, method)
            engine_s.append(time.process_time() - began)
            loops.append(run_naive(states, head, method, naive_targets))
    naive_s = [each.cpu_s(case.n_targets) for each in loops]
    difference = np.abs(engine.image[0][loops[0].targets, 0].numpy() - loops[0].maps).max()
    return Comparison(
        method=method,
        n_targets=case.n_targets,
        n_image=states.layout.n_image,
        n_context=len(states.layout.context),
        dim=case.dim,
        vocab=case.vocab,
        runs=runs,
        engine_cpu_s=round(statistics.median(engine_s), 4),
        engine_cpu_range_s=(round(min(engine_s), 4), round(max(engine_s), 4)),
        naive_cpu_s=round(statistics.median(naive_s), 3),
        naive_cpu_range_s=(round(min(naive_s), 3), round(max(naive_s), 3)),
        naive_targets=naive_targets,
        ratio=round(statistics.median(naive_s) / statistics.median(engine_s), 1),
        max_difference=float(f"{difference:.1e}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.postprocessing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "postprocessing.jsonl")
    path = parser.parse_args().out
    methods: tuple[Method, ...] = ("tam", "arc")
    rows = [asdict(compare(Case(), method)) for method in methods]
    for row in rows:
        if not row["max_difference"] < TOLERANCE:  # also when it is NaN
            raise SystemExit(
                f"{row['method']}: the engine is {row['max_difference']} off the naive loops, nothing written"
            )
        print(f"{row['method']}: {row['naive_cpu_s']:.1f} s / {row['engine_cpu_s']:.3f} s = {row['ratio']:.0f}x")
    with one_thread():
        header = machine("python -m benchmarks.postprocessing")
    print(write_jsonl(path, [header, *rows]))


if __name__ == "__main__":
    main()
