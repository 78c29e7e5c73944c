"""What a call costs: CPU seconds on one thread, and the memory that a fresh process adds at its peak."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")

STATUS = Path("/proc/self/status")
ENOUGH_S = 1.0  # a call that takes longer is not repeated in a fresh process
REPEATS = 5


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to one thread: CPU time would charge the others for waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def charged(spent_s: dict[str, float], stage: str, times: float = 1.0) -> Iterator[None]:
    """Add the CPU seconds of the block, `times` over, to a stage."""
    began = time.process_time()
    try:
        yield
    finally:
        spent_s[stage] = spent_s.get(stage, 0.0) + times * (time.process_time() - began)


def cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of one call, of all its threads."""
    began = time.process_time()
    call()
    return time.process_time() - began


def in_turn(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """CPU seconds of each call, one after the other `runs` times, so that a busy machine slows all of them."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # first calls load libraries and fill caches
        call()
    for _ in range(runs):
        for name, call in calls.items():
            spent[name].append(cpu_s(call))
    return spent


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        cpu_s: on one thread; the median of `runs`, or the first call where that took over a second.
        peak_bytes: resident memory of a fresh process at its highest during the first call, less what it had
            before; results of the call count, its inputs do not. None where the system does not tell.
    """

    cpu_s: float
    runs: int
    peak_bytes: int | None


def in_fresh_process(build: Callable[..., Callable[[], float]], *args: Any) -> Cost:
    """Measure `build(*args)()`, which returns its CPU seconds, in a process of its own; `build` is not charged.

    Raises:
        RuntimeError: the process ended without a result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([build.__module__])  # each process then starts with it imported
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, build, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process measuring {build.__name__}{args} ended with code {process.exitcode} and no result; -9 means that "
            "the system ran out of memory"
        ) from None
    finally:
        process.join()


def _measure(sender: Connection, build: Callable[..., Callable[[], float]], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sort()  # libraries set up their buffers at the first product
    call = build(*args)
    before = _forget_peak()
    first = call()
    peak = None if before is None else _status_bytes("VmHWM") - before
    spent = [first] if first > ENOUGH_S else [call() for _ in range(REPEATS)]
    sender.send(Cost(statistics.median(spent), len(spent), peak))


def _forget_peak() -> int | None:
    """Give freed memory back, let the peak begin anew, and return what is resident (bytes)."""
    if not STATUS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else the call would use, uncharged, what building its inputs has left
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}, expected a Linux kernel that counts memory")


def progress(items: Sequence[Item], describe: Callable[[Item], str]) -> Iterator[Item]:
    """Go through the items with a bar on a terminal and a line for each elsewhere."""
    if sys.stderr.isatty():
        with tqdm(total=len(items), leave=False) as bar:
            for item in items:
                bar.set_description(describe(item))
                yield item
                bar.update()
        return
    for number, item in enumerate(items, start=1):
        print(f"{number}/{len(items)} {describe(item)}", file=sys.stderr, flush=True)
        yield item
