"""The post-processing by every side, on the same states: from hidden states to finished maps, with time by stage.

The naive loops explain a few targets, spread evenly over the response so that they see as much context as the average
target, and the time of these loops is scaled up in proportion; what targets share (logits, activations, rankings,
log-probabilities) is done in full and not scaled. Every other side explains every target.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from benchmarks import naive, numpy_per_token
from benchmarks.cost import charged
from fastattr import ops
from fastattr.method import explain_states
from fastattr.types import AttributionConfig, Method, OutputHead, ScaleStates

TOP_K = 50
PERSISTENCE = 0.9

PRODUCTS, OVERLAP, INTERFERENCE, SCALES, FILTER, REST = (
    "products with the output embeddings",
    "rank overlap",
    "interference",
    "scales",
    "normalisation and filter",
    "the rest",
)
# what the time of each operation of the engine is spent on
STAGE_OF = {
    "lens": PRODUCTS,
    "lm_head_topk": PRODUCTS,
    "lm_head_summary": PRODUCTS,
    "lm_head_log_prob": PRODUCTS,
    "lm_head_logit": PRODUCTS,
    "arc_weight": OVERLAP,
    "context_mean": INTERFERENCE,
    "remove_interference": INTERFERENCE,
    "multiscale": SCALES,
    "rank_gaussian": FILTER,
    "stretch": FILTER,
}


@dataclass(frozen=True)
class Explained:
    """What one side made of the states.

    Attributes:
        targets: which were explained.
        maps: `[target h w]` of those, in [0, 1].
        log_prob: `[target]` of all targets, in nats.
        stage_s: CPU seconds by stage for the whole response.
    """

    targets: Sequence[int]
    maps: np.ndarray
    log_prob: np.ndarray
    stage_s: Mapping[str, float]

    @property
    def cpu_s(self) -> float:
        return sum(self.stage_s.values())

    @property
    def after_products_s(self) -> float:
        """What is left when the products that no side avoids are taken off."""
        return self.cpu_s - self.stage_s[PRODUCTS]


def read(states: ScaleStates, head: OutputHead) -> tuple[naive.Reading, int]:
    """The same states for the numpy sides, and how many slots stand before the first target."""
    layout, ids = states.layout, states.input_ids.tolist()
    slots = [
        naive.Slot(position, ids[p], ids[p])
        for p, position in zip(layout.context, layout.context_predictors, strict=True)
    ]
    reading = naive.Reading(
        states.hidden_states.numpy(),
        head.weight.numpy(),
        np.array(layout.image_positions),
        layout.images[0].grid[1:],
        tuple(slots),
        prefill=layout.response[0],
    )
    return reading, len(layout.prompt)


def spread(n_targets: int, n_chosen: int) -> list[int]:
    """Targets from the middle of each of `n_chosen` equal parts of the response."""
    return [int((i + 0.5) * n_targets / n_chosen) for i in range(n_chosen)]


def run_naive(states: ScaleStates, head: OutputHead, method: Method, n_chosen: int, k: int = TOP_K) -> Explained:
    """The loops, for `n_chosen` targets."""
    reading, first = read(states, head)
    n_targets = len(reading.slots) - first
    chosen = spread(n_targets, n_chosen)
    times = n_targets / n_chosen
    spent_s: dict[str, float] = {}
    with charged(spent_s, PRODUCTS):
        logits = naive.full_logits(reading)
        raw = [naive.activation(reading, logits, slot) for slot in reading.slots]
        log_prob = [naive.log_prob(logits, slot) for slot in reading.slots[first:]]
        rankings = [naive.top_ids(logits[slot.position], k) for slot in reading.slots] if method == "arc" else []
    maps = []
    for t in (first + target for target in chosen):
        with charged(spent_s, PRODUCTS, times):
            scores = naive.scores(reading, logits, t)
        with charged(spent_s, OVERLAP, times):
            weights = naive.tam_weights(reading, t, scores)
            if method == "arc":
                weights = naive.arc_weights(weights, rankings[: t + 1], PERSISTENCE)
        with charged(spent_s, INTERFERENCE, times):
            cleaned = naive.remove_interference(raw[t], raw[:t], weights)
        with charged(spent_s, FILTER, times):
            maps.append(naive.finish(reading, cleaned, scores))
    return Explained(chosen, np.stack(maps), np.array(log_prob), spent_s)


def run_numpy(states: ScaleStates, head: OutputHead, method: Method, k: int = TOP_K) -> Explained:
    """Vectorised numpy, one target at a time, all of them."""
    reading, first = read(states, head)
    text_ids = np.array([slot.text_id for slot in reading.slots])
    targets = range(len(reading.slots) - first)
    spent_s: dict[str, float] = {}
    with charged(spent_s, PRODUCTS):
        read_off = numpy_per_token.products(reading)
        log_prob = [numpy_per_token.log_prob(read_off.logits[first + t], text_ids[first + t]) for t in targets]
        rankings = np.stack([numpy_per_token.top_ids(row, k) for row in read_off.logits]) if method == "arc" else None
    maps = []
    for t in (first + target for target in targets):
        with charged(spent_s, OVERLAP):
            scores = read_off.scores[t, :t]
            weights = np.where(text_ids[:t] == text_ids[t], 0, scores)
            if rankings is not None:
                relevance = numpy_per_token.relevance(rankings[t], rankings[:t], PERSISTENCE)
                weights = weights * (1 - relevance).astype(np.float32)
        with charged(spent_s, INTERFERENCE):
            cleaned = numpy_per_token.remove_interference(read_off.activation[t], read_off.activation[:t], weights)
        with charged(spent_s, FILTER):
            unit = numpy_per_token.normalise_jointly(cleaned, scores)
            maps.append(numpy_per_token.rank_gaussian(unit.reshape(reading.grid)))
    return Explained(targets, np.stack(maps), np.array(log_prob), spent_s)


def run_engine(readings: Sequence[ScaleStates], head: OutputHead, method: Method, k: int = TOP_K) -> Explained:
    """What the package does, checks included: `explain_states`, each of its operations charged to a stage."""
    config = AttributionConfig(
        method=method,
        scales=tuple(reading.scale for reading in readings),
        top_k=k,
        rbo_p=PERSISTENCE,
        filter=True,
        evidence=False,
    )
    spent_s = {PRODUCTS: 0.0}
    with replaced({name: _charging(getattr(ops, name), spent_s, stage) for name, stage in stages().items()}):
        began = time.process_time()
        maps = explain_states(readings, head, config)
        total_s = time.process_time() - began
    spent_s[REST] = total_s - sum(spent_s.values())
    return Explained(range(len(maps.log_prob)), maps.image[0][:, 0].numpy(), maps.log_prob.numpy(), spent_s)


def stages() -> dict[str, str]:
    """The stage of every operation that the engine uses.

    Raises:
        KeyError: `STAGE_OF` does not say where one belongs.
    """
    return {name: STAGE_OF[name] for name in ops.__all__ if name != "resolve"}


@contextmanager
def replaced(operations: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let the engine run these operations in place of its own."""
    own = {name: getattr(ops, name) for name in operations}
    for name, operation in operations.items():
        setattr(ops, name, operation)
    try:
        yield
    finally:
        for name, operation in own.items():
            setattr(ops, name, operation)


def _charging(operation: Callable[..., Any], spent_s: dict[str, float], stage: str) -> Callable[..., Any]:
    @wraps(operation)
    def run(*args: Any, **kwargs: Any) -> Any:
        with charged(spent_s, stage):
            return operation(*args, **kwargs)

    return run
