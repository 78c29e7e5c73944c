"""Shards on a Ray cluster: one actor a worker, each with a model of its own. Which machine, and when, is for Ray to decide.

The only module that imports Ray: `pip install ".[ray]"`, run in a clone of the repository.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from fastattr.adapters import hide_loading_bars
from fastattr.batch.output import Failure, open_output
from fastattr.batch.shards import Job, ShardResult, Stopped, Task, Underway, run_shard
from fastattr.errors import FastattrError, InputError

if TYPE_CHECKING:
    from fastattr.adapters import Model

LOCAL = "local"  # the address of a cluster that is started here and ends with the batch
POLL_S = 1.0


@dataclass
class _Worker:
    actor: Any
    task: Task


def run(
    job: Job,
    tasks: Sequence[Task],
    *,
    stop: threading.Event,
    address: str = LOCAL,
    workers: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Generator[ShardResult | Underway, None, None]:
    """Publish every shard; a shard whose actor or node died goes to another, as `Task.after_death` says.

    The output must be a place that every machine reaches, and so must the inputs.

    Args:
        stop: workers finish the rows they are at, and unfinished shards are left.
        address: of a cluster as `ray.init` takes it, or `local`. A connection that exists is used.
        workers: actors; by default as many as the cluster has resources for now.
        num_cpus, num_gpus: of an actor.

    Raises:
        InputError: the cluster cannot be reached, or has no room for a single actor.
        FastattrError: what no other worker would fare better with, or workers die and no row is to blame.
    """
    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    try:
        wanted = _room(num_cpus, num_gpus) if workers is None else workers
        if wanted < 1:
            raise InputError(
                f"the cluster has {ray.cluster_resources()}, but a worker wants {num_cpus:g} CPUs and {num_gpus:g} GPUs"
            )
        if num_gpus and job.device is None:
            job = replace(job, device="cuda")  # Ray shows an actor its own devices only
        untyped: Any = ray.remote  # which says nothing of options that only actors have
        make = untyped(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(_Actor)
        journal = untyped(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Journal).remote()
        yield from _run(job, tasks, stop, wanted, make, journal)
    finally:
        if ours:
            ray.shutdown()


def _run(
    job: Job, tasks: Sequence[Task], stop: threading.Event, wanted: int, make: Any, journal: Any
) -> Generator[ShardResult | Underway, None, None]:
    waiting = deque(tasks)
    idle: list[Any] = []
    busy: dict[Any, _Worker] = {}
    stopping = False
    shared = ray.put(job)
    try:
        while waiting or busy:
            if stop.is_set() and not stopping:
                stopping = True
                waiting.clear()
                ray.get(journal.stop.remote())
            while waiting and len(busy) < wanted:
                task = waiting.popleft()
                actor = idle.pop() if idle else make.remote(shared, journal)
                busy[actor.run.remote(task)] = _Worker(actor, task)
            finished = ray.wait(list(busy), num_returns=1, timeout=POLL_S)[0] if busy else []
            for reference in finished:
                worker = busy.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayActorError:
                    at = ray.get(journal.at.remote(worker.task.shard.number))
                    if not stopping:
                        waiting.append(worker.task.after_death(at))
                    continue
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, FastattrError):
                        raise error.cause from None
                    raise
                idle.append(worker.actor)
                if result is not None:
                    yield result
            for shard, done, failed in ray.get(journal.underway.remote()):
                if any(worker.task.shard.number == shard for worker in busy.values()):
                    yield Underway(shard, done, failed)
    finally:
        for actor in [*idle, *(worker.actor for worker in busy.values()), journal]:
            ray.kill(actor)


def _connect(address: str) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:  # nobody else needs to reach it
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address!r}: {error}; expected {LOCAL}, auto or an address"
        ) from error


def _room(num_cpus: float, num_gpus: float) -> int:
    have = ray.cluster_resources()
    rooms = [int(have.get(name, 0.0) / each) for name, each in (("CPU", num_cpus), ("GPU", num_gpus)) if each > 0]
    return min(rooms, default=1)


class _Journal:
    """Where workers say what they do next, so that it is known when they do not come back."""

    def __init__(self) -> None:
        self._said: dict[int, tuple[tuple[int, ...], int, tuple[Failure, ...]]] = {}
        self._stopped = False

    def step(self, shard: int, rows: tuple[int, ...], done: int, failed: tuple[Failure, ...]) -> bool:
        """Returns whether to stop."""
        earlier = self._said[shard][2] if done and shard in self._said else ()  # with no rows done, a new attempt
        known = tuple(dict.fromkeys(earlier + failed))  # a retried call adds nothing
        self._said[shard] = (rows, done, known)
        return self._stopped

    def at(self, shard: int) -> tuple[int, ...]:
        """The rows that a worker, which has died, was working on."""
        return self._said.pop(shard, ((), 0, ()))[0]

    def underway(self) -> list[tuple[int, int, tuple[Failure, ...]]]:
        return [(shard, done, failed) for shard, (_, done, failed) in self._said.items()]

    def stop(self) -> None:
        self._stopped = True

    def finished(self, shard: int) -> None:
        self._said.pop(shard, None)


class _Actor:
    """A model, loaded with the first shard, so that its errors are told as a shard's."""

    def __init__(self, job: Job, journal: Any) -> None:
        hide_loading_bars()
        self._job, self._journal = job, journal
        self._model: Model | None = None
        self._output = open_output(job.out, job.storage_options)

    def run(self, task: Task) -> ShardResult | None:
        def step(rows: Sequence[int], done: int, failed: Sequence[Failure]) -> None:
            if ray.get(self._journal.step.remote(task.shard.number, tuple(rows), done, tuple(failed))):
                raise Stopped

        result = None
        try:
            if self._model is None:
                self._model = self._job.load_model()
            with suppress(Stopped):
                result = run_shard(self._model, self._job, task, self._output, step)
        except FastattrError:
            raise
        except BaseException:  # after this the device or the memory may not be trusted: end, as a crash would
            traceback.print_exc()
            os._exit(1)
        ray.get(self._journal.finished.remote(task.shard.number))
        return result
