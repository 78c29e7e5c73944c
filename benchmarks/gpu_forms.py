"""One operation in several forms: judged against float64 first, and timed only when it is right."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_goals import GOALS

Row = dict[str, Any]
Inputs = tuple[Any, ...]
Call = Callable[..., Any]

ROUNDING = 4e-6  # relative to the largest value: what float32 sums in another order may differ by
BUDGET_MS = 250.0  # of timed work for one figure
FEWEST_RUNS, MOST_RUNS = 10, 200
CALLS_IN_A_GRAPH = 8  # fewer would charge each call for the start of the graph
MOST_BATCHES = 32


@dataclass(frozen=True)
class Ceilings:
    """What a GPU has been seen to reach, in one second: bytes read and written, and FLOPs of a product."""

    bytes: float
    half_flops: float
    single_flops: float


CEILINGS = {"H100": Ceilings(3.0e12, 800e12, 60e12)}


@dataclass(frozen=True)
class Op:
    """One operation on one shape, in several forms.

    Attributes:
        shape: the numbers a reader needs to know the work.
        draw: fresh random inputs from a generator, on the generator's device.
        error: the largest error of outputs for inputs, relative to the largest value, against float64.
        forms: ours. The first is the yardstick: the others may err by its error and `rounding`.
        baselines: what others would run. Judged like ours, not searched for unwritten memory.
        tolerance: how far the yardstick may be off.
        bytes: that must be read and written, each once.
        flops: of products; `half` says whether they run on the matrix units.
        goals: names in `GOALS`, for every form but the yardstick.
        baseline_of: names in `GOALS` whose factor the baselines are the base of.
    """

    name: str
    shape: Mapping[str, Any]
    draw: Callable[[torch.Generator], Inputs]
    error: Callable[[Inputs, Sequence[Tensor]], float]
    forms: Mapping[str, Call]
    baselines: Mapping[str, Call] = field(default_factory=dict)
    tolerance: float = 1e-5
    rounding: float = ROUNDING
    bytes: int = 0
    flops: int = 0
    half: bool = False
    goals: tuple[str, ...] = ()
    baseline_of: tuple[str, ...] = ()


def against(exact: Call) -> Callable[[Inputs, Sequence[Tensor]], float]:
    """The `error` of an operation whose outputs `exact` gives in float64."""

    def error(inputs: Inputs, outputs: Sequence[Tensor]) -> float:
        expected = tensors(exact(*inputs))
        if [each.shape for each in outputs] != [each.shape for each in expected]:
            return math.inf
        return max(relative_error(got, want) for got, want in zip(outputs, expected, strict=True))

    return error


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite where anything is not finite."""
    largest = float(want.abs().amax())
    difference = float((got.double() - want).abs().amax())  # amax keeps NaN
    return difference / (largest or 1.0) if math.isfinite(difference) else math.inf


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a result, one or several."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def measure(op: Op, device: torch.device, seed: int) -> Iterator[Row]:
    """Every form of an operation: right or wrong first, and only if right, how fast. One row each.

    What a form raises becomes the `fault` of its row and the next one is tried.
    """
    allowed = op.tolerance
    for place, (form, call) in enumerate({**op.forms, **op.baselines}.items()):
        ours, yardstick = form in op.forms, place == 0
        row: Row = {"op": op.name, "form": form, "shape": dict(op.shape), "fault": None}
        try:
            row |= judge(op, call, device, seed, allowed, thorough=ours)
            if yardstick and row["fault"] is None:
                allowed = row["max_error"] + op.rounding
            if row["fault"] is None:
                row |= timed(call, batches(op.draw, device, seed), op.bytes, op.flops, op.half)
        except Exception as exception:
            row["fault"] = describe(exception)
        if ours and not yardstick and device.type == "cuda":
            row["goals"] = {name: GOALS[name].met(row) for name in op.goals}
        elif not ours:
            row["baseline_of"] = list(op.baseline_of)
        yield row


def judge(op: Op, call: Call, device: torch.device, seed: int, allowed: float, *, thorough: bool) -> Row:
    """Whether a form is right: its error on fresh inputs, and `fault` in words where it is not.

    The thorough check fills fresh memory with NaN, so that what is never written shows, and asks for the same bits
    again and again. A dry run, where calls take seconds, looks at fewer.
    """
    generator = torch.Generator(device).manual_seed(seed)
    worst = 0.0
    draws, runs = (2, 3) if device.type == "cuda" else (1, 2)
    for _ in range(draws):
        inputs = op.draw(generator)
        with poisoned(thorough):
            outputs = tensors(call(*inputs))
        worst = max(worst, op.error(inputs, outputs))
        del outputs
    row: Row = {"max_error": worst if math.isfinite(worst) else None, "allowed_error": allowed, "fault": None}
    if not worst <= allowed:
        row["fault"] = f"the error {worst:.1e} is above {allowed:.1e}"
    elif thorough:
        first, *others = ([each.clone() for each in tensors(call(*inputs))] for _ in range(runs))
        if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
            row["fault"] = f"{runs} runs on the same inputs gave different bits"
        del first, others
        row["workspace_bytes"] = workspace_bytes(call, inputs)
    return row


@contextmanager
def poisoned(active: bool) -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN and the largest integers."""
    if not active:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations without a deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)  # this fills the memory
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def workspace_bytes(call: Call, inputs: Inputs) -> int | None:
    """Most memory a call holds besides its inputs and results, None without a GPU.

    What it keeps from call to call (tables, the workspace of cuBLAS) is not counted.
    """
    if not torch.cuda.is_available():
        return None
    call(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = call(*inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del outputs  # not before: they are among what is still allocated
    return extra


def batches(draw: Callable[[torch.Generator], Inputs], device: torch.device, seed: int) -> list[Inputs]:
    """Inputs to take turns with: together twice as large as the L2 cache, so that none is found there."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    drawn = [draw(generator)]
    if device.type == "cuda":
        size = sum(each.nbytes for each in flattened(drawn[0]))
        wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        drawn += [draw(generator) for _ in range(min(MOST_BATCHES, math.ceil(wanted / max(1, size))) - 1)]
    return drawn


def flattened(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flattened(value)


def timed(call: Call, drawn: Sequence[Inputs], moved: int, flops: int, half: bool) -> Row:
    """How long a call takes: median with the 10th and 90th percentile, and its share of what the GPU can do.

    `median_ms` is the GPU's own time, from calls replayed as a graph, where the call allows it (`timer` is
    "graph"): launching from Python is not in it. A call that waits for the GPU cannot be replayed; then it is
    the time between two events, launches and waiting included ("events"), which `eager_ms` always is.
    """
    if not torch.cuda.is_available():
        times = [_on_cpu(call, drawn[0])]
        row: Row = {"timer": "cpu clock", "eager_ms": times[0]}
    else:
        times = _eager(call, drawn)
        row = {"timer": "events", "eager_ms": statistics.median(times)}
        if not waits(call, drawn[0]):
            try:
                times, row["timer"] = _replayed(call, drawn), "graph"
            except RuntimeError as error:  # the events' times are good without it
                row["graph_fault"] = describe(error)
    times = sorted(times)
    row |= {"runs": len(times), "median_ms": statistics.median(times)}
    row |= {"low_ms": times[len(times) // 10], "high_ms": times[len(times) * 9 // 10]}
    row |= {"bytes": moved, "flops": flops}
    return row | roofline(row["median_ms"], moved, flops, half)


def roofline(median_ms: float, moved: int, flops: int, half: bool) -> Row:
    """The least time the bytes and FLOPs take, and its share of the measured one; None on an unknown GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    ceilings = next((each for key, each in CEILINGS.items() if key in name), None)
    if ceilings is None or not (moved or flops):
        return {"floor_ms": None, "roofline": None}
    rate = ceilings.half_flops if half else ceilings.single_flops
    floor_ms = max(moved / ceilings.bytes, flops / rate) * 1e3
    return {"floor_ms": floor_ms, "roofline": floor_ms / median_ms}


def waits(call: Call, inputs: Inputs) -> bool:
    """Whether a call waits for the GPU somewhere, for a size or a flag that it needs."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _on_cpu(call: Call, inputs: Inputs) -> float:
    began = time.perf_counter()
    call(*inputs)
    return (time.perf_counter() - began) * 1e3


def _eager(call: Call, drawn: Sequence[Inputs]) -> list[float]:
    """Milliseconds between events around calls from Python."""
    turn = iter(range(2**31))
    return _between_events(lambda: call(*drawn[next(turn) % len(drawn)]))


def _replayed(call: Call, drawn: Sequence[Inputs]) -> list[float]:
    """Milliseconds a call in a graph of calls that take turns with the inputs."""
    calls = max(CALLS_IN_A_GRAPH, len(drawn))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(*drawn[i % len(drawn)])
    return [each / calls for each in _between_events(graph.replay)]


def _between_events(run: Callable[[], Any]) -> list[float]:
    """Milliseconds of each run, as many as the budget allows."""
    _events(run, 2)  # to warm up
    [first] = _events(run, 1)
    return _events(run, min(MOST_RUNS, max(FEWEST_RUNS, int(BUDGET_MS / max(first, 1e-3)))))


def _events(run: Callable[[], Any], runs: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def describe(exception: BaseException) -> str:
    """An exception in one line."""
    lines = str(exception).strip().splitlines() or [""]
    return f"{type(exception).__name__}: {lines[0][:300]}"
