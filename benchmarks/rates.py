"""How near single operations come to what they are made of, in CPU time on one thread.

    python -m benchmarks.rates

Rankings of a full vocabulary against the matrix product alone; the filter against the naive loop, per pixel; maps of
three scales upsampled to an image against the chain of `F.interpolate`. Sides run in turn and are compared first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fastattr_kernels as kernels
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import naive
from benchmarks.cost import cpu_s, in_fresh_process, in_turn, one_thread, progress
from benchmarks.record import RESULTS, machine, write_jsonl

Call = Callable[[], Any]

VOCAB, K = 152_064, 50
CHUNK = 8192  # columns of one product: as fast as the whole product, and its logits need not be kept
MAPS, MAP_EDGES, IMAGE = 512, (24, 36, 48), (448, 448)
MAPS_AT_ONCE = 32  # a block of upsampled maps is 26 MB


@dataclass(frozen=True)
class Rate:
    """One line of the results.

    Attributes:
        per: what the times are for: the whole, or one pixel or map of it.
        engine_s, baseline_s: medians of `runs`.
        ratio: baseline over engine; 1 is as fast as the baseline.
        added_bytes: memory that the engine adds in a fresh process, results included; None where not asked.
    """

    operation: str
    size: str
    baseline: str
    per: str
    engine_s: float
    baseline_s: float
    ratio: float
    goal: float
    runs: int
    added_bytes: int | None = None


def rate(
    operation: str,
    size: str,
    calls: tuple[Call, Call],
    *,
    baseline: str,
    goal: float,
    per: tuple[str, float, float] = ("whole", 1, 1),
    runs: int = 5,
    added_bytes: int | None = None,
) -> Rate:
    """Time engine and baseline in turn.

    Args:
        calls: engine, baseline.
        per: a name, and how many of it the engine and the baseline do in one call.
    """
    with one_thread():
        spent = in_turn({"engine": calls[0], "baseline": calls[1]}, runs)
    engine_s = statistics.median(spent["engine"]) / per[1]
    baseline_s = statistics.median(spent["baseline"]) / per[2]
    figures = (float(f"{value:.4g}") for value in (engine_s, baseline_s, baseline_s / engine_s))
    return Rate(operation, size, baseline, per[0], *figures, goal, runs, added_bytes)


# --- rankings


def head_inputs(n: int, dim: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random states `[n dim]` and output embeddings `[vocab dim]`."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab, dim, dtype=dtype)
    for rows in weight.split(CHUNK):  # no second copy in float32
        rows.copy_(torch.randn(rows.shape, generator=rng))
    return torch.randn(n, dim, generator=rng).to(dtype), weight


def product_alone(hidden: Tensor, weight: Tensor) -> None:
    """The same products in float32, a chunk of the vocabulary at a time, and nothing done with them."""
    out = torch.empty(len(hidden), CHUNK)
    for rows in weight.split(CHUNK):
        torch.mm(hidden, rows.T, out=out if len(rows) == CHUNK else out.new_empty(len(hidden), len(rows)))


def timed_rankings(n: int, dim: int, vocab: int, dtype: torch.dtype) -> Callable[[], float]:
    """For a fresh process: its memory is what the rankings add."""
    inputs = head_inputs(n, dim, vocab, dtype)
    return partial(cpu_s, partial(kernels.lm_head_topk, *inputs, K, backend="torch"))


def rankings(n: int, dim: int, dtype: torch.dtype, *, vocab: int = VOCAB, runs: int = 3) -> Rate:
    """Ordered top-k of the vocabulary against the float32 product alone. Goal: at least 80 % of its rate."""
    hidden, weight = head_inputs(n, dim, vocab, dtype)
    single, single_weight = hidden.float(), weight.float()
    with one_thread():
        ids, _ = kernels.lm_head_topk(hidden[:4], weight, K, backend="torch")
    require(ids, (single[:4].double() @ single_weight.double().T).topk(K).indices.int(), "rankings")
    return rate(
        f"rankings, {str(dtype).removeprefix('torch.')}",
        f"{n} positions, dim {dim}, vocabulary {vocab:,}, k {K}",
        (
            lambda: kernels.lm_head_topk(hidden, weight, K, backend="torch"),
            lambda: product_alone(single, single_weight),
        ),
        baseline="float32 product alone",
        goal=0.8,
        runs=runs,
        added_bytes=in_fresh_process(timed_rankings, n, dim, vocab, dtype).peak_bytes,
    )


# --- filter


def rank_filter(edge: int, *, n_maps: int = MAPS, naive_maps: int = 2) -> Rate:
    """The rank-Gaussian filter against the naive loop, per pixel. Goal: 1000 times."""
    maps = torch.rand(n_maps, 1, edge, edge, generator=torch.Generator().manual_seed(0))
    few = [each.numpy() for each in maps[:naive_maps, 0]]
    filtered = kernels.rank_gaussian(maps, backend="torch")[:naive_maps, 0]
    require(filtered, torch.from_numpy(np.stack([naive.rank_gaussian(each) for each in few])), "filter")
    return rate(
        "filter",
        f"{n_maps} maps of {edge} x {edge}",
        (
            lambda: kernels.rank_gaussian(maps, backend="torch"),
            lambda: [naive.rank_gaussian(each) for each in few],
        ),
        baseline="naive loop",
        goal=1000,
        per=("pixel", maps.numel(), naive_maps * edge**2),
    )


# --- multi-scale


def interpolate_chain(maps: list[Tensor], weights: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Upsample each scale with torch, weigh, sum, and find the extremes."""
    total = sum(
        F.interpolate(each, size=size, mode="bilinear", align_corners=False) * weights[:, s, None, None, None]
        for s, each in enumerate(maps)
    )
    return total, torch.stack(total.flatten(1).aminmax(dim=1), dim=1)


def in_blocks(sum_scales: Callable[..., Any], maps: list[Tensor], weights: Tensor, size: tuple[int, int]) -> None:
    """All maps, a block at a time, as one does to write pictures."""
    for start in range(0, len(weights), MAPS_AT_ONCE):
        block = slice(start, start + MAPS_AT_ONCE)
        sum_scales([each[block, 0][:, None] for each in maps], weights[block], size)


def scales_to_image(*, n_maps: int = MAPS, size: tuple[int, int] = IMAGE) -> list[Rate]:
    """Maps of three scales to an image's size against the chain of interpolations (goal: 20 times) and the loop."""
    maps = [torch.rand(n_maps, 1, edge, edge, generator=torch.Generator().manual_seed(edge)) for edge in MAP_EDGES]
    weights = torch.tensor([[1.0, 2.25, 4.0]]).div(7.25).expand(n_maps, 3).contiguous()
    engine = partial(kernels.multiscale, backend="torch")
    few = [each[:2] for each in maps]
    found, wanted = engine(few, weights[:2], size), interpolate_chain(few, weights[:2], size)
    for ours, theirs in zip(found, wanted, strict=True):
        require(ours, theirs, "multi-scale")

    def loop() -> np.ndarray:
        return sum(naive.upsample(each[0, 0].numpy(), size) * float(weights[0, s]) for s, each in enumerate(maps))

    require(found[0][0, 0], torch.from_numpy(loop()), "multi-scale")
    call = partial(in_blocks, engine, maps, weights, size)
    shape = f"{n_maps} maps, grids {' '.join(map(str, MAP_EDGES))} to {size[0]} x {size[1]}"
    return [
        rate(
            "multi-scale",
            shape,
            (call, partial(in_blocks, interpolate_chain, maps, weights, size)),
            baseline="F.interpolate chain",
            goal=20,
            per=("map", n_maps, n_maps),
        ),
        rate("multi-scale", shape, (call, loop), baseline="naive loop", goal=1000, per=("map", n_maps, 1), runs=3),
    ]


def require(found: Tensor, wanted: Tensor, what: str) -> None:
    """No time is reported for a wrong result.

    Raises:
        ArithmeticError: they differ.
    """
    if not torch.allclose(found.double(), wanted.double(), atol=1e-5):
        worst = float((found.double() - wanted.double()).abs().max())
        raise ArithmeticError(f"{what}: the engine is {worst} off its baseline, expected at most 1e-5")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "rates.jsonl")
    path = parser.parse_args().out
    asked: list[tuple[str, Callable[[], Rate | list[Rate]]]] = [
        ("filter 24 x 24", partial(rank_filter, 24)),
        ("filter 36 x 36", partial(rank_filter, 36)),
        ("multi-scale", scales_to_image),
        ("rankings 1024 x 1024", partial(rankings, 1024, 1024, torch.float32)),
        ("rankings 1024 x 1024, bfloat16", partial(rankings, 1024, 1024, torch.bfloat16)),
        ("rankings 542 x 1536", partial(rankings, 542, 1536, torch.float32)),
    ]
    rates: list[Rate] = []
    for _, call in progress(asked, lambda each: each[0]):
        found = call()
        rates += found if isinstance(found, list) else [found]
    with one_thread():
        header = machine("python -m benchmarks.rates")
    rows = [asdict(each) for each in rates]
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.table import rates_table

    print(rates_table(header, rows))


if __name__ == "__main__":
    main()
