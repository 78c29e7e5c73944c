"""The operations and the whole post-processing as data: inputs of any size, and the same work by every side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fastattr_kernels as kernels
import numpy as np
import torch
from torch import Tensor

from benchmarks import naive, numpy_per_token
from benchmarks.cases import Case, on_steps
from benchmarks.cost import cpu_s
from benchmarks.sides import PERSISTENCE, Explained, run_engine, run_naive, run_numpy, spread

N_PROMPT = 30
DIM = 64
SCALES = (1.0, 1.5, 2.0, 2.5)
NAIVE, NUMPY, ENGINE = "naive", "numpy per token", "engine"
N_CHOSEN = {NAIVE: 4, NUMPY: 32}  # targets that a side works on where its time is scaled up to all


@dataclass(frozen=True)
class Size:
    """How large a workload is.

    Attributes:
        edge: image tokens along each edge at scale 1.
        k: depth of the rankings.
    """

    n_targets: int = 512
    edge: int = 24
    vocab: int = 32_768
    k: int = 50
    n_scales: int = 1

    @property
    def n_image(self) -> int:
        return self.edge**2

    @property
    def n_context(self) -> int:
        return N_PROMPT + self.n_targets


TINY = Size(n_targets=2, edge=4, vocab=64, k=4)

# the work of one side: inputs, size, targets -> results of these targets
Form = Callable[[Any, Size, Sequence[int]], Any]


@dataclass(frozen=True)
class Workload:
    """One operation, or all of them.

    Attributes:
        factors: the fields of `Size` that matter.
        make: inputs of a size.
        forms: by side.
        sampled: whether the other sides than the engine work on a few targets only, and their time is scaled up.
            Their memory then means nothing.
        least_scales: with fewer there is nothing to do.
    """

    name: str
    factors: tuple[str, ...]
    make: Callable[[Size], Any]
    forms: Mapping[str, Form]
    sampled: bool = True
    least_scales: int = 1

    def targets(self, side: str, size: Size) -> list[int]:
        """The targets that a side works on."""
        n_chosen = N_CHOSEN.get(side, size.n_targets) if self.sampled else size.n_targets
        return spread(size.n_targets, min(size.n_targets, n_chosen))

    def sides(self, size: Size) -> tuple[str, ...]:
        """Who can do it: the other sides explain one scale."""
        return (ENGINE,) if self.name == "whole" and size.n_scales > 1 else tuple(self.forms)


def timed(name: str, side: str, size: Size) -> Callable[[], float]:
    """A call that does the work and returns the CPU seconds it takes for all targets."""
    workload = WORKLOADS[name]
    workload.forms[side](workload.make(TINY), TINY, [0, 1])  # first uses load libraries
    targets, inputs, form = workload.targets(side, size), workload.make(size), workload.forms[side]

    def call() -> float:
        results: list[Any] = []
        spent_s = cpu_s(lambda: results.append(form(inputs, size, targets)))
        if isinstance(results[0], Explained):
            return results[0].cpu_s  # its loops alone are scaled up
        return spent_s * size.n_targets / len(targets)

    return call


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- lens: classes of all context tokens at every image position


@dataclass(frozen=True)
class Classes:
    """`hidden [image dim]`, `weight [vocab dim]`, `ids [target]`."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor


def _classes(size: Size) -> Classes:
    rng = torch.Generator().manual_seed(0)
    return Classes(
        torch.randn(size.n_image, DIM, generator=rng),
        torch.randn(size.vocab, DIM, generator=rng),
        torch.randint(size.vocab, (size.n_targets,), generator=rng),
    )


def _lens_naive(inputs: Classes, size: Size, targets: Sequence[int]) -> np.ndarray:
    logits = naive.product(inputs.hidden.numpy(), inputs.weight.numpy())
    return np.stack([np.maximum(logits[:, id_], 0) for id_ in inputs.ids.tolist()])


def _lens_numpy(inputs: Classes, size: Size, targets: Sequence[int]) -> np.ndarray:
    hidden, weight = inputs.hidden.numpy(), inputs.weight.numpy()
    return np.stack([np.maximum(naive.product(weight[[id_]], hidden)[0], 0) for id_ in inputs.ids.tolist()])


def _lens_engine(inputs: Classes, size: Size, targets: Sequence[int]) -> np.ndarray:
    return kernels.lens(inputs.hidden, inputs.weight[inputs.ids]).numpy()


# --- rankings: ordered top-k of the vocabulary


def _predictions(size: Size) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.n_targets, DIM, generator=rng) + torch.randn(DIM, generator=rng)
    return on_steps(hidden, 2**-4), on_steps(torch.randn(size.vocab, DIM, generator=rng) / DIM**0.5, 2**-6)


def _rankings_naive(inputs: tuple[Tensor, Tensor], size: Size, targets: Sequence[int]) -> np.ndarray:
    hidden, weight = (each.numpy() for each in inputs)
    return np.stack([naive.top_ids(naive.product(hidden[[t]], weight)[0], size.k) for t in targets])


def _rankings_numpy(inputs: tuple[Tensor, Tensor], size: Size, targets: Sequence[int]) -> np.ndarray:
    hidden, weight = (each.numpy() for each in inputs)
    return np.stack([numpy_per_token.top_ids(naive.product(hidden[[t]], weight)[0], size.k) for t in targets])


def _rankings_engine(inputs: tuple[Tensor, Tensor], size: Size, targets: Sequence[int]) -> np.ndarray:
    return kernels.lm_head_topk(*inputs, size.k, backend="torch")[0].numpy()


# --- rank overlap: every target with all context before it


def _rankings(size: Size) -> Tensor:
    longer = Size(n_targets=size.n_context, vocab=size.vocab)
    return kernels.lm_head_topk(*_predictions(longer), size.k, backend="torch")[0]


def _overlap_naive(ranked: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    rows = ranked.tolist()
    relevance = np.zeros((len(targets), size.n_context), np.float32)
    for row, target in enumerate(targets):
        t = N_PROMPT + target
        relevance[row, :t] = 1 - np.array(naive.arc_weights([1.0] * t, rows[: t + 1], PERSISTENCE))
    return relevance


def _overlap_numpy(ranked: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    rows = ranked.numpy()
    relevance = np.zeros((len(targets), size.n_context), np.float32)
    for row, target in enumerate(targets):
        t = N_PROMPT + target
        relevance[row, :t] = numpy_per_token.relevance(rows[t], rows[:t], PERSISTENCE)
    return relevance


def _overlap_engine(ranked: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    return kernels.rank_overlap(ranked[N_PROMPT:], ranked, PERSISTENCE, n_before=N_PROMPT, backend="torch").numpy()


# --- interference: the context's mean taken off


@dataclass(frozen=True)
class Interference:
    """`maps [context image]`, the last of which are the targets', and causal `weights [target context]`."""

    maps: Tensor
    weights: Tensor


def _interference(size: Size) -> Interference:
    weights = _random(size.n_targets, size.n_context, seed=1).tril_(N_PROMPT - 1)
    return Interference(_random(size.n_context, size.n_image), weights)


def _interference_naive(inputs: Interference, size: Size, targets: Sequence[int]) -> np.ndarray:
    maps, weights = list(inputs.maps.numpy()), inputs.weights.tolist()
    found = []
    for target in targets:
        t = N_PROMPT + target
        found.append(naive.remove_interference(maps[t], maps[:t], weights[target][:t]))
    return np.stack(found)


def _interference_numpy(inputs: Interference, size: Size, targets: Sequence[int]) -> np.ndarray:
    maps, weights = inputs.maps.numpy(), inputs.weights.numpy()
    found = []
    for target in targets:
        t = N_PROMPT + target
        found.append(numpy_per_token.remove_interference(maps[t], maps[:t], weights[target, :t]))
    return np.stack(found)


def _interference_engine(inputs: Interference, size: Size, targets: Sequence[int]) -> np.ndarray:
    mean = kernels.context_mean(inputs.maps, inputs.weights, n_before=N_PROMPT, backend="torch")
    return kernels.remove_interference(inputs.maps[N_PROMPT:], mean, backend="torch")[0].numpy()


# --- filter: nine values a window


def _maps(size: Size) -> Tensor:
    return _random(size.n_targets, 1, size.edge, size.edge)


def _filter_naive(maps: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    return np.stack([naive.rank_gaussian(maps[t, 0].numpy()) for t in targets])


def _filter_numpy(maps: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    return np.stack([numpy_per_token.rank_gaussian(maps[t, 0].numpy()) for t in targets])


def _filter_engine(maps: Tensor, size: Size, targets: Sequence[int]) -> np.ndarray:
    return kernels.rank_gaussian(maps, backend="torch")[:, 0].numpy()


# --- multi-scale: maps of every scale to the finest grid


def _scaled_maps(size: Size) -> list[Tensor]:
    sides = [round(size.edge * scale) for scale in SCALES[: size.n_scales]]
    return [_random(size.n_targets, 1, side, side, seed=side) for side in sides]


def _multiscale_by(upsample: Callable[[np.ndarray, tuple[int, int]], np.ndarray]) -> Form:
    def form(maps: list[Tensor], size: Size, targets: Sequence[int]) -> np.ndarray:
        finest = (maps[-1].shape[2], maps[-1].shape[3])
        return np.stack([sum(upsample(each[t, 0].numpy(), finest) / len(maps) for each in maps) for t in targets])

    return form


def _multiscale_engine(maps: list[Tensor], size: Size, targets: Sequence[int]) -> np.ndarray:
    weights = torch.full((size.n_targets, len(maps)), 1 / len(maps))
    finest = (maps[-1].shape[2], maps[-1].shape[3])
    return kernels.multiscale(maps, weights, finest, backend="torch")[0][:, 0].numpy()


# --- the whole: hidden states to finished maps


def _states(size: Size) -> Any:
    return Case(size.n_targets, N_PROMPT, size.edge, DIM, size.vocab, SCALES[: size.n_scales]).states()


def _whole_naive(inputs: Any, size: Size, targets: Sequence[int]) -> Explained:
    readings, head = inputs
    return run_naive(readings[0], head, "arc", min(size.n_targets, N_CHOSEN[NAIVE]), size.k)


def _whole_numpy(inputs: Any, size: Size, targets: Sequence[int]) -> Explained:
    readings, head = inputs
    return run_numpy(readings[0], head, "arc", size.k)


def _whole_engine(inputs: Any, size: Size, targets: Sequence[int]) -> Explained:
    readings, head = inputs
    return run_engine(readings, head, "arc", size.k)


EVERY = (
    Workload(
        "whole",
        ("n_targets", "edge", "vocab", "k", "n_scales"),
        _states,
        {NAIVE: _whole_naive, NUMPY: _whole_numpy, ENGINE: _whole_engine},
        sampled=False,
    ),
    Workload(
        "lens",
        ("n_targets", "edge", "vocab"),
        _classes,
        {NAIVE: _lens_naive, NUMPY: _lens_numpy, ENGINE: _lens_engine},
        sampled=False,
    ),
    Workload(
        "rankings",
        ("n_targets", "vocab", "k"),
        _predictions,
        {NAIVE: _rankings_naive, NUMPY: _rankings_numpy, ENGINE: _rankings_engine},
    ),
    Workload(
        "rank overlap",
        ("n_targets", "k"),
        _rankings,
        {NAIVE: _overlap_naive, NUMPY: _overlap_numpy, ENGINE: _overlap_engine},
    ),
    Workload(
        "interference",
        ("n_targets", "edge"),
        _interference,
        {NAIVE: _interference_naive, NUMPY: _interference_numpy, ENGINE: _interference_engine},
    ),
    Workload(
        "filter",
        ("n_targets", "edge"),
        _maps,
        {NAIVE: _filter_naive, NUMPY: _filter_numpy, ENGINE: _filter_engine},
    ),
    Workload(
        "multi-scale",
        ("n_targets", "edge", "n_scales"),
        _scaled_maps,
        {
            NAIVE: _multiscale_by(naive.upsample),
            NUMPY: _multiscale_by(numpy_per_token.upsample),
            ENGINE: _multiscale_engine,
        },
        least_scales=2,
    ),
)
WORKLOADS = {workload.name: workload for workload in EVERY}
