"""Every operation of `fastattr_kernels` as data: its work, its inputs, its exact result and its forms.

The exact results are plain float64 code that shares nothing with the package. Sizes are pairs: what a GPU is given,
and what Triton's interpreter can do in a dry run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import fastattr_kernels as kernels
import torch
from fastattr_kernels import reference
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_forms import Call, Inputs, Op, against

PERSISTENCE = 0.9


@dataclass(frozen=True)
class Bench:
    """Where and how a step runs; on a CPU it is a dry run."""

    device: torch.device
    seed: int

    @property
    def dry_run(self) -> bool:
        return self.device.type != "cuda"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry_run else full

    @property
    def dtype(self) -> torch.dtype:
        """Of states and output embeddings; the interpreter cannot multiply bfloat16."""
        return torch.float32 if self.dry_run else torch.bfloat16

    @property
    def dim(self) -> int:
        return self.size(3584, 24)

    @property
    def vocab(self) -> int:
        return self.size(152_064, 300)

    @property
    def k(self) -> int:
        return self.size(50, 5)

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + offset)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def both(function: Call, **options: Any) -> dict[str, Call]:
    """The two backends of a public operation, the yardstick first."""
    return {name: partial(function, **options, backend=name) for name in ("torch", "triton")}


def builders(bench: Bench) -> list[partial[Op]]:
    """One of each operation at the size of its goal."""
    few = bench.size(128, 3)
    return [
        partial(lm_head, bench, few),
        partial(lm_head, bench, few, with_logsumexp=True),
        *(partial(each, bench) for each in (rank_overlap, arc_weight, context_mean, remove_interference)),
        partial(rank_gaussian, bench),
        *(partial(multiscale, bench, dtype) for dtype in (torch.uint8, torch.float32, torch.float16)),
        partial(multiscale, bench, torch.float32, to_grid=True),
    ]


# products with the output embeddings


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in float32 by the library: what a kernel has to beat."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def draw_head(bench: Bench, positions: int) -> Callable[[torch.Generator], Inputs]:
    def draw(generator: torch.Generator) -> Inputs:
        hidden = normal(generator, positions, bench.dim)
        weight = normal(generator, bench.vocab, bench.dim).div_(math.sqrt(bench.dim))
        return hidden.to(bench.dtype), weight.to(bench.dtype)

    return draw


def lm_head(bench: Bench, positions: int, *, with_logsumexp: bool = False, goals: tuple[str, ...] = ()) -> Op:
    """Ordered top-k; the output embeddings are read once."""
    from fastattr_kernels.gpu.lm_head_topk import filtered_summary, fused_summary

    k, dim, vocab = bench.k, bench.dim, bench.vocab
    roads = {
        name: road(bench, summary, with_logsumexp=with_logsumexp)
        for name, summary in (("triton filtered", filtered_summary), ("triton fused", fused_summary))
    }

    def by_library(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        logits = product(hidden, weight)
        values, ids = logits.topk(k, dim=1)
        return (ids.int(), values, logits.logsumexp(1)) if with_logsumexp else (ids.int(), values)

    public = kernels.lm_head_summary if with_logsumexp else kernels.lm_head_topk
    itemsize = bench.dtype.itemsize
    return Op(
        name="lm_head_summary" if with_logsumexp else "lm_head_topk",
        shape={"positions": positions, "dim": dim, "vocab": vocab, "k": k},
        draw=draw_head(bench, positions),
        error=lambda inputs, outputs: float(ranking_errors(inputs, outputs, k).max()),
        forms=both(public, k=k) | roads,
        baselines={"product + torch.topk": by_library},
        tolerance=1e-4,
        bytes=(vocab + positions) * dim * itemsize + positions * k * 8,
        flops=2 * positions * vocab * dim,
        half=True,
        goals=goals,
        baseline_of=goals,
    )


def road(bench: Bench, summary: Call, *, with_logsumexp: bool, **options: Any) -> Call:
    """One road to the top-k, with what is asked for only."""
    asked = 3 if with_logsumexp else 2
    options |= {"with_logsumexp": with_logsumexp}
    if bench.dry_run:
        options["fewest_slots"] = 32  # sorting them takes the interpreter seconds
    return lambda hidden, weight: summary(hidden, weight, bench.k, **options)[:asked]


def ranking_errors(inputs: Inputs, outputs: Any, k: int) -> Tensor:
    """How far each position's ranking is off, float64 `[position]`, relative to its largest logit.

    The id at each rank must have the logit that stands there in the exact order, and the value must be that logit.
    Infinite where ids repeat or do not exist, or where values do not fall, ties by rising id.
    """
    hidden, weight = inputs[:2]
    ids, values = outputs[0].long(), outputs[1]
    logits = hidden.double() @ weight.double().T
    best = logits.topk(k, dim=1).values
    exists = ((ids >= 0) & (ids < len(weight))).all(1)
    own = logits.gather(1, ids.clamp(0, len(weight) - 1))
    falls = (values[:, 1:] < values[:, :-1]) | ((values[:, 1:] == values[:, :-1]) & (ids[:, 1:] > ids[:, :-1]))
    distinct = (ids.sort(1).values.diff(dim=1) > 0).all(1)
    error = torch.maximum((own - best).abs().amax(1), (values - own).abs().amax(1))
    if len(outputs) > 2:
        error = torch.maximum(error, (outputs[2] - logits.logsumexp(1)).abs())
    error = error / best.abs().amax(1)
    right = exists & distinct & falls.all(1) & error.isfinite()
    return torch.where(right, error, math.inf)


def lens(bench: Bench) -> Op:
    """Token activations; the yardstick is cuBLAS with a ReLU, and so far the only form."""
    positions, targets, dim = bench.size(1500, 6), bench.size(512, 5), bench.dim
    itemsize = bench.dtype.itemsize

    def draw(generator: torch.Generator) -> Inputs:
        hidden, rows = normal(generator, positions, dim), normal(generator, targets, dim) / math.sqrt(dim)
        return hidden.to(bench.dtype), rows.to(bench.dtype)

    return Op(
        name="lens",
        shape={"positions": positions, "targets": targets, "dim": dim},
        draw=draw,
        error=against(lambda hidden, rows: (hidden.double() @ rows.double().T).relu().T),
        forms={"torch": kernels.lens},
        baselines={"torch.compile": compiled(bench, reference.lens)},
        bytes=(positions + targets) * dim * itemsize + positions * targets * 4,
        flops=2 * positions * targets * dim,
        half=True,
    )


def compiled(bench: Bench, function: Call) -> Call:
    """`torch.compile` of a torch form, from its first call on; a dry run only traces it."""

    @cache
    def form() -> Call:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, backend="eager" if bench.dry_run else "inductor")

    return lambda *inputs: form()(*inputs)


# rankings


def draw_rankings(generator: torch.Generator, n: int, k: int, vocab: int) -> Tensor:
    """Rankings that share many ids, as neighbours' predictions do: int32 `[n k]`."""
    pool = torch.randperm(vocab, generator=generator, device=generator.device)[: min(vocab, 4 * k)]
    return pool[uniform(generator, n, len(pool)).argsort(1)[:, :k]].int()


def exact_overlap(left: Tensor, right: Tensor, *, n_before: int | None = None) -> Tensor:
    """Rank-biased overlap as it is defined: common ids at every depth, counted. float64 `[target context]`."""
    k = left.shape[1]
    depth = torch.arange(1, k + 1, device=left.device)
    share = (1 - PERSISTENCE) * PERSISTENCE ** (depth.double() - 1) / depth / (1 - PERSISTENCE**k)
    rows = []
    for target in left.split(4):
        same = target[:, None, :, None] == right[None, :, None, :]
        common = same.int().cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32).diagonal(dim1=2, dim2=3)
        rows.append(common.double() @ share)
    overlap = torch.cat(rows)
    return overlap if n_before is None else overlap * before(n_before, len(left), len(right), left.device)


def before(n_before: int, targets: int, context: int, device: torch.device) -> Tensor:
    """bool `[target context]`: whether the context token stands before the target."""
    return torch.ones(targets, context, dtype=torch.bool, device=device).tril(n_before - 1)


def rank_overlap(bench: Bench) -> Op:
    n, k = bench.size(1024, 7), bench.k

    def draw(generator: torch.Generator) -> Inputs:
        return draw_rankings(generator, n, k, bench.vocab), draw_rankings(generator, n, k, bench.vocab)

    return Op(
        name="rank_overlap",
        shape={"targets": n, "context": n, "k": k},
        draw=draw,
        error=against(exact_overlap),
        forms=both(kernels.rank_overlap, persistence=PERSISTENCE),
        bytes=2 * n * k * 4 + n * n * 4,
        goals=("G5",),
    )


def arc_weight(bench: Bench) -> Op:
    targets, prompt, k = bench.size(994, 5), bench.size(30, 2), bench.k
    context = prompt + targets

    def draw(generator: torch.Generator) -> Inputs:
        right = draw_rankings(generator, context, k, bench.vocab)
        counts = before(prompt, targets, context, generator.device) & (uniform(generator, targets, context) < 0.9)
        return right[prompt:], right, counts, uniform(generator, targets, context)

    def exact(left: Tensor, right: Tensor, counts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        relevance = exact_overlap(left, right, n_before=prompt)
        return relevance, torch.where(counts, (1 - relevance) * scores, 0.0)

    def form(backend: str) -> Call:
        return lambda left, right, counts, scores: kernels.arc_weight(
            left, right, PERSISTENCE, counts, scores, n_before=prompt, backend=backend
        )

    return Op(
        name="arc_weight",
        shape={"targets": targets, "context": context, "k": k},
        draw=draw,
        error=against(exact),
        forms={"torch": form("torch"), "triton": form("triton")},
        bytes=(targets + context) * k * 4 + targets * context * (1 + 4 + 4 + 4),
    )


# interference


def context_mean(bench: Bench) -> Op:
    targets, prompt, positions = bench.size(512, 5), bench.size(30, 3), bench.size(576, 9)
    context = prompt + targets

    def draw(generator: torch.Generator) -> Inputs:
        weight = uniform(generator, targets, context) * before(prompt, targets, context, generator.device)
        return normal(generator, context, positions).relu_(), weight

    def exact(activation: Tensor, weight: Tensor) -> Tensor:
        return weight.double() @ activation.double() / weight.double().sum(1, keepdim=True)

    return Op(
        name="context_mean",
        shape={"targets": targets, "context": context, "positions": positions},
        draw=draw,
        error=against(exact),
        forms=both(kernels.context_mean, n_before=prompt),
        baselines={"cuBLAS float32": lambda activation, weight: weight @ activation / weight.sum(1, keepdim=True)},
        bytes=(context * positions + targets * context + targets * positions) * 4,
        flops=2 * positions * targets * (prompt + targets // 2),  # what stands before a target
    )


def remove_interference(bench: Bench) -> Op:
    targets, positions = bench.size(512, 5), bench.size(576, 9)

    def draw(generator: torch.Generator) -> Inputs:
        mean = normal(generator, targets, positions).relu_()
        return mean + normal(generator, targets, positions).relu_(), mean

    def exact(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        activation, mean = activation.double(), mean.double()
        scale = (activation * mean).sum(1) / (mean * mean).sum(1)
        cleaned = (activation - scale[:, None] * mean).relu()
        return cleaned, scale, torch.stack([cleaned.amin(1), cleaned.amax(1)], 1)

    return Op(
        name="remove_interference",
        shape={"targets": targets, "positions": positions},
        draw=draw,
        error=against(exact),
        forms=both(kernels.remove_interference),
        baselines={"torch.compile": compiled(bench, reference.remove_interference)},
        bytes=3 * targets * positions * 4,
    )


# maps


def rank_gaussian(bench: Bench) -> Op:
    targets, frames, side = bench.size(512, 2), bench.size(3, 1), bench.size(24, 5)

    def draw(generator: torch.Generator) -> Inputs:
        maps = normal(generator, targets, frames, side, side).relu_()
        return maps, torch.stack([maps.flatten(1).amin(1), maps.flatten(1).amax(1)], 1)

    def exact(maps: Tensor, span: Tensor) -> Tensor:
        low, high = span.double().T[:, :, None, None, None]
        padded = F.pad((maps.double() - low) / (high - low), (1, 1, 1, 1, 0, 0), mode="reflect")
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).sort(-1).values
        mean, variance = windows.mean(-1, keepdim=True), windows.var(-1, correction=0, keepdim=True)
        distance = torch.arange(-4, 5, device=maps.device).double() ** 2
        weight = torch.exp(-distance * mean**2 / (2 * variance))
        filtered = (windows * weight).sum(-1) / weight.sum(-1)
        return torch.where(variance[..., 0] > 0, filtered, windows[..., 4])

    return Op(
        name="rank_gaussian",
        shape={"targets": targets, "frames": frames, "height": side, "width": side},
        draw=draw,
        error=against(exact),
        forms=both(kernels.rank_gaussian),
        baselines={"torch.compile": compiled(bench, reference.rank_gaussian)},
        bytes=2 * targets * frames * side**2 * 4,
        goals=("G8",),
    )


def multiscale(bench: Bench, dtype: torch.dtype, *, to_grid: bool = False) -> Op:
    targets = bench.size(512, 2)
    sides = [bench.size(full, tiny) for full, tiny in ((16, 3), (24, 4), (32, 5))]
    side = sides[-1] if to_grid else bench.size(448, 12)
    name = str(dtype).removeprefix("torch.")

    def draw(generator: torch.Generator) -> Inputs:
        maps = [normal(generator, targets, 1, each, each).relu_() for each in sides]
        return maps, uniform(generator, targets, len(sides))

    def upsampled(maps: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        """What one writes first: one upsampling a scale, then their sum; uint8 is not rounded yet."""
        weighted = [each * weight[:, None, None, None] for each, weight in zip(maps, weights.T, strict=True)]
        total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for each in weighted:
            total = total + F.interpolate(each, size=(side, side), mode="bilinear", align_corners=False)
        extremes = torch.stack([total.flatten(1).amin(1), total.flatten(1).amax(1)], 1)
        if dtype == torch.uint8:
            low, high = extremes.T[:, :, None, None, None]
            total = (total - low) / (high - low) * 255
        return total, extremes

    def chain(maps: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        total, extremes = upsampled(maps, weights)
        return (total.round_() if dtype == torch.uint8 else total).to(dtype), extremes

    def exact(maps: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        return upsampled([each.double() for each in maps], weights.double())

    baselines: dict[str, Call] = {"F.interpolate chain": chain}
    if dtype == torch.float32:
        baselines["torch.compile"] = compiled(bench, partial(reference.multiscale, size=(side, side)))
    return Op(
        name="multiscale",
        shape={"targets": targets, "scales": len(sides), "height": side, "width": side, "dtype": name},
        draw=draw,
        error=against(exact),
        forms=both(kernels.multiscale, size=(side, side), dtype=dtype),
        baselines=baselines,
        tolerance={torch.float32: 1e-5, torch.float16: 6e-4, torch.uint8: 0.51 / 255}[dtype],
        rounding=1e-5,  # `F.interpolate` finds its place on a map in float32
        bytes=targets * (4 * sum(each**2 for each in sides) + dtype.itemsize * side**2),
        goals=() if to_grid or dtype == torch.float16 else (f"G7 {name}",),
    )
