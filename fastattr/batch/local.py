"""Shards on this machine: a few processes, each with a model of its own, watched by one that has none.

A process that dies takes its shard with it and nothing else. Which rows it was at is known: it said so before.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fastattr.adapters import hide_loading_bars
from fastattr.batch.output import Failure, open_output
from fastattr.batch.shards import Job, ShardResult, Stopped, Task, Underway, run_shard
from fastattr.errors import FastattrError, InputError

MAX_EARLY_DEATHS = 3  # of workers before their first step, one after the other
POLL_S = 0.2
LEAVE_S = 10.0  # to finish a row when the batch is given up; a kill after that loses nothing that is published


@dataclass
class _Worker:
    """As the watching process sees it.

    Attributes:
        task: what it was given; None while it waits.
        started: whether it has a model and has begun with a shard.
        at: the rows it reported as next.
        failed: the failed rows of its shard that it has reported.
    """

    process: BaseProcess
    pipe: Connection
    task: Task | None = None
    started: bool = False
    at: tuple[int, ...] = ()
    failed: tuple[Failure, ...] = ()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    job: Job, tasks: Sequence[Task], *, stop: threading.Event, workers: int | None = None
) -> Generator[ShardResult | Underway, None, None]:
    """Publish every shard. When `stop` is set, workers finish the rows they are at, and unfinished shards are left.

    Args:
        workers: processes; by default one for each GPU, or each core where there is none.

    Raises:
        FastattrError: what no other worker would fare better with, or workers die and no row is to blame.
    """
    n_gpus = torch.cuda.device_count() if job.device is None else 0
    wanted = (n_gpus or cores()) if workers is None else workers
    if wanted < 1:
        raise InputError(f"workers is {wanted}, expected at least 1")
    threads = max(1, cores() // wanted)
    waiting = deque(tasks)
    crew: list[_Worker] = []
    hired = early_deaths = 0
    try:
        while waiting or any(worker.task for worker in crew):
            if stop.is_set():
                waiting.clear()
                for worker in crew:
                    _send(worker, None)
            busy = sum(worker.task is not None for worker in crew)
            while len(crew) < min(wanted, busy + len(waiting)):
                device = f"cuda:{hired % n_gpus}" if n_gpus else job.device
                crew.append(_hire(replace(job, device=device), threads))
                hired += 1
            for worker in crew:
                if worker.task is None and waiting:
                    worker.task, worker.at, worker.failed = waiting.popleft(), (), ()
                    _send(worker, worker.task)
            ready = wait([worker.pipe for worker in crew], timeout=POLL_S)
            for worker in [each for each in crew if each.pipe in ready]:
                try:
                    message: Any = worker.pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):  # it is gone, perhaps in the middle of a word
                    crew.remove(worker)
                    task = worker.task
                    _bury(worker)
                    if task is None or stop.is_set():
                        continue
                    if worker.started:
                        waiting.appendleft(task.after_death(worker.at))
                        continue
                    early_deaths += 1
                    if early_deaths >= MAX_EARLY_DEATHS:
                        raise FastattrError(
                            f"{early_deaths} workers died (exit code {worker.process.exitcode}) before they explained "
                            "anything; what they said stands above. Is there memory for a model a worker? A script "
                            "that calls this needs its if __name__ == '__main__'"
                        ) from None
                    waiting.appendleft(task)
                    continue
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, ShardResult):
                    worker.task = None
                    yield message
                else:
                    worker.started, early_deaths = True, 0
                    worker.at, done, failed = message
                    worker.failed += failed
                    if worker.task is not None:
                        yield Underway(worker.task.shard.number, done, worker.failed)
    finally:
        _dismiss(crew)


def _hire(job: Job, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks and devices in any state
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs, threads), daemon=True)
    resource_tracker.ensure_running()  # its start would lift the mask
    # a terminal or a service signals all processes at once; workers are told by their pipe, from their first moment on
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that its end is the end of the pipe
    return _Worker(process, ours)


def _send(worker: _Worker, message: Task | None) -> None:
    with suppress(OSError):  # it is gone, which the next look at its pipe tells
        worker.pipe.send(message)


def _bury(worker: _Worker) -> None:
    worker.process.join()
    worker.pipe.close()


def _dismiss(crew: Iterable[_Worker]) -> None:
    for worker in crew:
        _send(worker, None)
    until_s = time.monotonic() + LEAVE_S
    for worker in crew:
        worker.process.join(max(0.0, until_s - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
        _bury(worker)


# --- in a worker -----------------------------------------------------------------------------------


def _work(job: Job, pipe: Connection, threads: int) -> None:
    """Shard after shard, until there comes none, or nobody is there any more to send one.

    What is no error of ours ends the process, as a crash would: after it the device or the memory may not be trusted.
    """
    hide_loading_bars()
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # fewer where the environment says so

    def step(rows: Sequence[int], done: int, failed: Sequence[Failure]) -> None:
        pipe.send((tuple(rows), done, tuple(failed)))
        if pipe.poll():  # during a shard nothing comes but the end
            raise Stopped

    with suppress(Stopped, EOFError, BrokenPipeError, ConnectionResetError):
        try:
            model, output = job.load_model(), open_output(job.out, job.storage_options)
            while (task := pipe.recv()) is not None:
                pipe.send(run_shard(model, job, task, output, step))
        except FastattrError as error:
            pipe.send(error)
