"""`fastattr worker`: explains what waits in an inbox, in a process of its own, each request exactly once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastattr.adapters import check_model
from fastattr.errors import FastattrError
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


def work(
    config: LogConfig,
    model: Model,
    *,
    stop: threading.Event,
    until_empty: bool = False,
    said: Callable[[str], None] = lambda _line: None,
) -> LogStats:
    """Explain requests until `stop` is set, or nothing waits.

    A request is deleted once its record is durable. If this process is killed in between, the next worker finds the
    record by its id and deletes the request; without one it explains it again, and gives up after
    `inbox.MAX_ATTEMPTS` crashes.

    Args:
        config: as the logger's, usually `inbox.read_config(spool)`.
        said: told a line about progress now and then.

    Raises:
        SaveError: the destination or the spool cannot be written to.
        InputError, UnsupportedModelError, StatesError: the model is not wrapped, or cannot be explained as it is now.
    """
    check_model(model)
    spool = config.spool_path
    destination = open_destination(config.destination, config.storage_options)
    destination.check()
    counts, complaints = Counts(), Complaints()
    taken_over = take_over(spool, destination)
    if taken_over:
        said(f"{taken_over} requests of a worker that died")
    writer = new_writer()
    telemetry = Telemetry(counts.stats, config.destination) if config.telemetry else None
    recorder = Recorder(config, destination, writer, counts)
    processor = Processor(config, recorder, counts, telemetry, model)
    claimed: list[Path] = []
    taken_over_s = time.monotonic()
    while not stop.is_set():
        path = inbox.claim(spool, writer)
        if path is not None:
            claimed.append(path)
            _explain(path, model, processor, counts, complaints)
        if claimed and (path is None or len(claimed) >= CLAIMS or processor.due_s <= 0):
            if processor.commit():
                for done in claimed:
                    done.unlink()
                claimed = []
                stats = counts.stats()
                said(
                    f"{stats.written} written, {sum(stats.failed.values())} failed, {sum(1 for _ in inbox.waiting(spool))} waiting"
                )
            else:
                stop.wait(POLL_S)
        elif path is None:
            recorder.tick()
            if until_empty or time.monotonic() - taken_over_s >= TAKE_OVER_EVERY_S:
                taken_over_s = time.monotonic()
                if not take_over(spool, destination) and until_empty:
                    break
            else:
                stop.wait(POLL_S)
    if claimed and processor.commit():
        for done in claimed:
            done.unlink()
    recorder.close(config.exit_timeout_s + 30.0, publish=True)
    if telemetry is not None:
        telemetry.close()
    return counts.stats()


def _explain(path: Path, model: Model, processor: Processor, counts: Counts, complaints: Complaints) -> None:
    try:
        request = inbox.read_request(path, model)
    except FastattrError as error:
        counts.accept(Change(submitted=1, in_flight=1), sys.maxsize)
        counts.fail(type(error).__name__, 0)
        complaints.say("read", "%s", error)
        return
    counts.accept(Change(submitted=1, in_flight=1, queue_bytes=request.n_bytes), sys.maxsize)
    processor.process(request)


def take_over(spool: Path, destination: Destination) -> int:
    """Hand back what dead workers had claimed, but for what they had finished. Returns how many wait again."""
    handed = 0
    folder = inbox.inbox_of(spool) / "claimed"
    for claims in sorted(folder.glob("*")) if folder.is_dir() else ():
        if is_live(spool, claims.name):
            continue
        paths = sorted(claims.glob(f"*{inbox.SUFFIX}"))
        finished = _record_ids(spool, destination, claims.name) if paths else frozenset()
        for path in paths:
            try:
                if path.name.removesuffix(inbox.SUFFIX).rsplit(".", 1)[0] in finished:
                    path.unlink()
                else:
                    handed += inbox.hand_back(path, spool)
            except FileNotFoundError:  # another worker takes over as well
                continue
        try:
            claims.rmdir()
        except OSError:
            continue
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
