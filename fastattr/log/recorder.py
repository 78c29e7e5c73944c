"""Rows to durable records, and durable records to published segments. Used by one thread; publishes on another."""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastattr.log.config import LogConfig
from fastattr.log.counting import Complaints, Counts, LogStats
from fastattr.log.rooms import open_room
from fastattr.log.segments import Destination, recover
from fastattr.log.spool import SpoolWriter, spool_name

TALLY_EVERY_S = 5.0
EXPIRE_EVERY_S = 3600.0
RETRY_S = (1.0, 60.0)  # first and longest wait before a publication is tried again


def new_writer() -> str:
    return uuid.uuid4().hex[:16]


class Recorder:
    """The storage of one writer.

    Args:
        writer: from `new_writer`; its room and its segments carry this name.
        counts: what the writer's tally says.

    Raises:
        SaveError: the room cannot be made.
    """

    def __init__(self, config: LogConfig, destination: Destination, writer: str, counts: Counts) -> None:
        self.writer = writer
        self.full = False  # more than `spool_bytes` wait; read by other threads
        self._config = config
        self._room = open_room(config.spool_path, writer)
        self._spool: SpoolWriter | None = None
        self._spool_number = 0
        self._spool_began_s = 0.0
        self._closed = False
        self._complaints = Complaints()
        try:
            self._publisher = Publisher(config, destination, writer, counts)
        except BaseException:  # there can be no more threads
            self._room.close()
            raise

    @property
    def waiting_bytes(self) -> int:
        """What lies in the spool and is not published yet."""
        return self._publisher.waiting_bytes + (0 if self._spool is None else self._spool.n_bytes)

    def write(self, rows: Sequence[pa.RecordBatch]) -> None:
        """Make rows durable: when this returns they are found again, whatever happens.

        Raises:
            SaveError: the disk refuses; nothing was written, and the same rows may be given again. So with any other
                exception.
        """
        if self._spool is None:
            if is_gone(self._room.path):  # someone cleaned up
                self._room.forget()
                self._room = open_room(self._config.spool_path, self.writer)
            today = datetime.now(timezone.utc).date()
            self._spool = SpoolWriter(self._room.path / spool_name(today, self._spool_number))
            self._spool_number += 1
            self._spool_began_s = time.monotonic()
        try:
            self._spool.append(rows)
            self._spool.sync()
        except BaseException:
            self._spool.take_back()
            raise

    def tick(self) -> None:
        """Hand over a spool file that is large or old enough, and see how full the spool is."""
        self.full = self.waiting_bytes > self._config.spool_bytes
        if self._spool is not None and (
            self._spool.n_bytes >= self._config.segment_bytes
            or time.monotonic() - self._spool_began_s >= self._config.segment_age_s
        ):
            self.rotate()

    def rotate(self) -> None:
        """Close the spool file and have it published."""
        if self._spool is None:
            return
        spool, self._spool = self._spool, None
        self._publisher.publish(spool.path, spool.n_bytes)  # first: nothing that goes wrong now forgets it
        self._close(spool)

    def _close(self, spool: SpoolWriter) -> None:
        try:
            spool.close()
        except OSError as error:  # its records were made durable before
            self._complaints.say("close", "%r was closed with an error: %s", str(spool.path), error)

    def close(self, timeout_s: float, *, publish: bool) -> bool:
        """Close the room, after publishing what is there. Returns whether all of it is published.

        Args:
            publish: False leaves it to the next start, which recovers this room.
        """
        if self._closed:
            return True
        self._closed = True
        if publish:
            self.rotate()
        elif self._spool is not None:
            self._close(self._spool)
            self._spool = None
        done = self._publisher.stop(timeout_s if publish else 0.0)
        self._room.close()
        return done

    def forget(self) -> None:
        """In a forked child: let go of what is the parent's without touching it."""
        self._room.forget()


class Publisher:
    """Publishes closed spool files in order, on a thread of its own: a store that hangs holds up nobody else."""

    def __init__(self, config: LogConfig, destination: Destination, writer: str, counts: Counts) -> None:
        self._config, self._destination, self._writer, self._counts = config, destination, writer, counts
        self._paths: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._waiting: list[Path] = []
        self._sizes: dict[Path, int] = {}
        self._started = datetime.now(timezone.utc)
        self._damaged_frames = 0
        self._stopping, self._abandoned = threading.Event(), threading.Event()
        self._complaints = Complaints()
        self._recovered = False
        self._told: LogStats | None = None
        self._tally_s = self._expire_s = -math.inf
        self._wait_s = RETRY_S[0]
        self._thread = threading.Thread(target=self._run, name="fastattr-publisher", daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        return sum(list(self._sizes.values()))

    def publish(self, path: Path, n_bytes: int) -> None:
        self._sizes[path] = n_bytes
        self._paths.put(path)

    def stop(self, timeout_s: float) -> bool:
        """Publish what waits, as long as there is time, and write the last tally. Returns whether nothing is left."""
        self._stopping.set()
        self._paths.put(None)
        self._thread.join(timeout_s)
        self._abandoned.set()
        return not self._thread.is_alive() and not self._sizes

    def _run(self) -> None:
        """Publish until all is done after `stop`, whatever is raised meanwhile."""
        while not self._abandoned.is_set():
            try:
                if self._step():
                    return
            except BaseException as error:
                with suppress(BaseException):  # memory may be short
                    self._complaints.say("thread", "publishing goes on after an unexpected %r", error)
                    self._counts.thread_failed()
                self._abandoned.wait(RETRY_S[0])

    def _step(self) -> bool:
        """Publish what there is, and wait for more. Returns whether everything is done."""
        self._recovered = self._recovered or self._recover()
        self._collect(TALLY_EVERY_S if self._recovered and not self._waiting else self._wait_s)
        n_before = len(self._waiting)
        for path in list(self._waiting):  # one that cannot be published now does not hold up the others
            if self._publish(path):
                self._waiting.remove(path)
        stopping = self._stopping.is_set()
        if self._recovered and len(self._waiting) < n_before:
            self._wait_s = RETRY_S[0]
        elif self._waiting or not self._recovered:
            self._wait_s = RETRY_S[0] if stopping else min(2 * self._wait_s, RETRY_S[1])
        if stopping and not self._waiting and self._paths.empty():
            self._tell(closed=True)
            return True
        now_s = time.monotonic()
        if now_s - self._tally_s >= TALLY_EVERY_S and (stats := self._counts.stats()) != self._told:
            self._tell(closed=False)
            self._tally_s, self._told = now_s, stats
        if self._config.retention_days is not None and now_s - self._expire_s >= EXPIRE_EVERY_S:
            self._expire_s = now_s
            self._expire(self._config.retention_days)
        return False

    def _collect(self, timeout_s: float) -> None:
        """Wait for paths, and take all that are there."""
        try:
            path = self._paths.get(timeout=timeout_s)
            while True:
                if path is not None:
                    self._waiting.append(path)
                path = self._paths.get_nowait()
        except queue.Empty:
            return

    def _recover(self) -> bool:
        """Publish what dead processes left behind."""
        try:
            found = recover(self._config.spool_path, self._destination)
        except Exception as error:  # this thread must live, whatever a store raises
            self._complaints.say("recover", "records of an earlier process stay in the spool for now: %s", error)
            return False
        self._damaged_frames += found.damaged_frames
        return True

    def _publish(self, path: Path) -> bool:
        """Returns whether there is nothing left to do for it."""
        try:
            self._damaged_frames += self._destination.publish(path, self._writer).damaged_frames
        except Exception as error:
            if not is_gone(path):
                self._complaints.say("publish", "a segment stays in the spool and is tried again: %s", error)
                return False
            self._damaged_frames += 1
            self._complaints.say("gone", "someone took a spool file away: %s", error)
        self._sizes.pop(path, None)
        return True

    def _expire(self, days: int) -> None:
        try:
            self._destination.expire(days, datetime.now(timezone.utc).date())
        except Exception as error:
            self._complaints.say("expire", "old records could not be deleted: %s", error)

    def _tell(self, *, closed: bool) -> None:
        tally = as_tally(
            self._counts.stats(),
            writer=self._writer,
            started=self._started,
            closed=closed,
            damaged_frames=self._damaged_frames,
        )
        try:
            self._destination.write_tally(self._writer, tally)
        except Exception as error:
            self._complaints.say("tally", "the counts of this process could not be written: %s", error)


def is_gone(path: Path) -> bool:
    """Whether there is no such path. False where that cannot be told now."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def as_tally(
    stats: LogStats, *, writer: str, started: datetime, closed: bool, damaged_frames: int
) -> Mapping[str, Any]:
    """What a writer says of itself, for `fastattr log doctor`."""
    return {
        "writer": writer,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": started.isoformat(),
        "updated": datetime.now(timezone.utc).isoformat(),
        "closed": closed,
        "submitted": stats.submitted,
        "written": stats.written,
        "handed_over": stats.handed_over,
        "dropped": dict(stats.dropped),
        "failed": dict(stats.failed),
        "in_flight": stats.in_flight,
        "damaged_frames": damaged_frames,
    }
