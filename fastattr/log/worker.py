"""`fastattr worker`: explains what waits in an inbox, in a process of its own, each request exactly once."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastattr.adapters import check_model
from fastattr.errors import FastattrError, InputError, SaveError
from fastattr.log import inbox
from fastattr.log.config import LogConfig
from fastattr.log.counting import Change, Complaints, Counts, LogStats
from fastattr.log.processing import Processor
from fastattr.log.recorder import Recorder, new_writer
from fastattr.log.rooms import is_live
from fastattr.log.segments import Destination, open_destination
from fastattr.log.spool import read_spool
from fastattr.log.telemetry import Telemetry

if TYPE_CHECKING:
    from fastattr.adapters import Model

POLL_S = 0.5
TAKE_OVER_EVERY_S = 30.0
CLAIMS = 16  # made durable together
RETRY_S = (0.5, 30.0)  # first and longest wait before what failed is tried again
MAX_FAILURES = 6  # in a row, with `until_empty`; about 15 s


def work(
    config: LogConfig,
    model: Model,
    *,
    stop: threading.Event,
    until_empty: bool = False,
    said: Callable[[str], None] = lambda _line: None,
) -> LogStats:
    """Explain requests until `stop` is set, or nothing waits that is of this model.

    A request is deleted once its record is durable. If this process is killed in between, the next worker finds the
    record by its id and deletes the request; without one it explains it again, and gives up after
    `inbox.MAX_ATTEMPTS` crashes. A request of another model is left for a worker that has it, and one that cannot be read
    at the moment is tried again; one that is broken or cannot be explained is moved to `inbox/given_up`.

    Args:
        config: as the logger's, usually `inbox.read_config(spool)`.
        said: told a line about progress now and then.

    Raises:
        SaveError: the destination or the spool cannot be written to.
        InputError, UnsupportedModelError, StatesError: the model is not wrapped, or cannot be explained as it is now.
    """
    check_model(model)
    inbox.check_destination(config)
    worker = _Worker(config, model, said)
    pause_s = RETRY_S[0]
    n_failures = 0
    while not stop.is_set():
        try:
            if worker.step(stop, until_empty=until_empty):
                break
            n_failures, pause_s = 0, RETRY_S[0]
        except (OSError, FastattrError, MemoryError) as error:  # of the folders; it may pass
            n_failures += 1
            worker.complaints.say("worker", "the worker goes on after %s: %s", type(error).__name__, error)
            if until_empty and n_failures >= MAX_FAILURES:
                break
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])
    return worker.close()


class _Worker:
    """What one worker holds, between claiming requests and deleting them."""

    def __init__(self, config: LogConfig, model: Model, said: Callable[[str], None]) -> None:
        self.complaints = Complaints()
        self._config, self._model, self._said = config, model, said
        self._spool = config.spool_path
        self._destination = open_destination(config.destination, config.storage_options)
        self._destination.check()
        self._writer = new_writer()
        self._counts = Counts()
        self._take_over()
        self._telemetry = Telemetry(self._counts.stats, config.destination) if config.telemetry else None
        self._recorder = Recorder(config, self._destination, self._writer, self._counts)
        self._processor = Processor(config, self._recorder, self._counts, self._telemetry, model)
        self._claimed: list[Path] = []  # explained, and not durable yet
        self._finished: list[Path] = []  # to be deleted or moved as soon as that works
        self._later: dict[Path, _Later] = {}  # claimed, and not to be read at the moment
        self._failed: set[Path] = set()  # of those finished, to be moved
        self._others: set[str] = set()  # of other models
        self._taken_over_s = time.monotonic()

    def step(self, stop: threading.Event, *, until_empty: bool) -> bool:
        """Explain one request, or make durable what was explained, or wait. Returns whether all is done.

        Raises:
            OSError, SaveError: a folder cannot be used now.
        """
        path = self._next()
        if path is not None:
            _explain(self, path)
        if self._claimed and (path is None or len(self._claimed) >= CLAIMS or self._processor.due_s <= 0):
            if self._processor.commit():
                self._finished += self._claimed
                self._claimed = []
                self._delete_finished()
                stats = self._counts.stats()
                n_waiting = sum(path.name not in self._others for path in inbox.waiting(self._spool))
                self._said(f"{stats.written} written, {sum(stats.failed.values())} failed, {n_waiting} waiting")
            else:
                stop.wait(POLL_S)
        elif path is None:
            self._delete_finished()
            self._recorder.tick()
            if self._later:
                if until_empty and all(each.tries >= MAX_FAILURES for each in self._later.values()):
                    return True
                stop.wait(POLL_S)
            elif until_empty or time.monotonic() - self._taken_over_s >= TAKE_OVER_EVERY_S:
                self._taken_over_s = time.monotonic()
                return self._take_over() == 0 and until_empty
            else:
                stop.wait(POLL_S)
        return False

    def close(self) -> LogStats:
        if self._claimed and self._processor.commit():
            self._finished += self._claimed
        try:
            self._delete_finished()
            for path in self._later:
                inbox.put_back(path, self._spool)
        except OSError as error:  # the next worker finds them with the records
            self.complaints.say("finished", "requests stay claimed for now: %s", error)
        self._recorder.close(self._config.exit_timeout_s + 30.0, publish=True)
        if self._telemetry is not None:
            self._telemetry.close()
        if self._others:
            self._said(f"{len(self._others)} left: they are of another model")
        return self._counts.stats()

    def _next(self) -> Path | None:
        for path, later in self._later.items():
            if later.due_s <= time.monotonic():
                return path
        return inbox.claim(self._spool, self._writer, self._others)

    def _give_up(self, path: Path) -> None:
        """Only moved: what could not be explained here may be, by a later version or with more memory."""
        self._finished.append(path)
        self._failed.add(path)
        self._delete_finished()

    def _delete_finished(self) -> None:
        """Delete the requests whose records are durable, and move away those that were given up. Raises `OSError`."""
        while self._finished:
            path = self._finished[-1]
            with suppress(FileNotFoundError):
                if path in self._failed:
                    inbox.move_aside(path, self._spool)
                else:
                    path.unlink()
            self._finished.pop()

    def _take_over(self) -> int:
        taken_over = take_over(self._spool, self._destination, self.complaints)
        if taken_over:
            self._said(f"{taken_over} requests of a worker that died")
        return taken_over


def _explain(worker: _Worker, path: Path) -> None:
    try:
        request = inbox.read_request(path, worker._model)
    except InputError as error:
        worker.complaints.say("model", "a request is left in the inbox: %s", error)
        worker._others.add(path.name)
        worker._later.pop(path, None)
        inbox.put_back(path, worker._spool)
        return
    except SaveError as error:
        worker._later.pop(path, None)
        worker._counts.accept(Change(submitted=1, in_flight=1), sys.maxsize)
        worker._counts.fail(type(error).__name__, 0)
        worker.complaints.say("read", "a request is given up: %s", error)
        worker._give_up(path)
        return
    except (OSError, MemoryError) as error:
        before = worker._later.get(path, _Later())
        pause_s = min(2 * before.pause_s, RETRY_S[1])
        worker._later[path] = _Later(before.tries + 1, pause_s, time.monotonic() + pause_s)
        worker.complaints.say("later", "a request cannot be read now and is tried again: %s", error)
        return
    worker._later.pop(path, None)
    worker._counts.accept(Change(submitted=1, in_flight=1, queue_bytes=request.n_bytes), sys.maxsize)
    if worker._processor.process(request):
        worker._claimed.append(path)
    else:
        worker._give_up(path)


@dataclass(frozen=True)
class _Later:
    """When a request is tried again that could not be read."""

    tries: int = 0
    pause_s: float = 0.5 * RETRY_S[0]
    due_s: float = -math.inf


def take_over(spool: Path, destination: Destination, complaints: Complaints | None = None) -> int:
    """Hand back what dead workers had claimed, but for what they had finished. Returns how many wait again.

    What cannot be taken over now stays for a later call, and keeps nothing else waiting.
    """
    complaints = complaints or Complaints()
    handed = 0
    folder = inbox.inbox_of(spool) / "claimed"
    for claims in sorted(folder.glob("*")) if folder.is_dir() else ():
        try:
            if is_live(spool, claims.name):
                continue
            paths = sorted(claims.glob(f"*{inbox.SUFFIX}"))
            finished = _record_ids(spool, destination, claims.name) if paths else frozenset()
            for path in paths:
                with suppress(FileNotFoundError):  # another worker takes over as well
                    if inbox.parse_name(path)[0] in finished:
                        path.unlink()
                    else:
                        handed += inbox.hand_back(path, spool)
            with suppress(OSError):
                claims.rmdir()
        except (OSError, SaveError) as error:
            complaints.say("take over", "claims of a worker that died stay for now: %s", error)
    return handed


def _record_ids(spool: Path, destination: Destination, writer: str) -> frozenset[str]:
    """Ids of all durable records of a writer. The spool is read first: what is gone from it by then is published."""
    found: set[str] = set()
    for path in sorted((spool / "rooms" / writer).glob("*.spool")):
        try:
            batches = read_spool(path).batches
        except FileNotFoundError:
            continue
        found.update(each for batch in batches for each in batch.column("record_id").to_pylist())
    return frozenset(found) | destination.record_ids(writer)
