"""What became of every submission: submitted = written + dropped + failed + in flight, at every moment."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fastattr")

REPEAT_S = 60.0


@dataclass(frozen=True)
class LogStats:
    """Counts since this process began to log.

    Attributes:
        submitted: calls of `submit`, `submit_replay` and `submit_attribution`.
        written: durable on disk, as records or, `handed_over` of them, as requests for a worker.
        dropped: left out on purpose, by reason: `not_sampled`, `not_low_evidence`, `queue_full`, `spool_full`, `redacted`,
            `redaction_failed`, `shutdown`, `invalid` (an argument is wrong), or the type of an unexpected error.
        failed: lost to an error, by its type.
        in_flight: accepted and neither written, dropped nor failed yet.
        queue_bytes: memory held by those in flight.
        capture_mismatches: captures that were not what `generate` returned and had to be read again.
        callback_errors: exceptions of the user's `on_record` and `on_alert`.
    """

    submitted: int = 0
    written: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    queue_bytes: int = 0
    handed_over: int = 0
    capture_mismatches: int = 0
    callback_errors: int = 0


class Counts:
    """The running form of `LogStats`: every change is one step that keeps the sum."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._submitted = self._written = self._in_flight = self._queue_bytes = 0
        self._handed_over = self._mismatches = self._callback_errors = 0
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    def refuse(self, reason: str) -> None:
        """A submission is dropped before it was accepted."""
        with self._lock:
            self._submitted += 1
            self._dropped[reason] += 1

    def accept(self, n_bytes: int, limit_bytes: int) -> bool:
        """A submission goes in flight, unless memory is full."""
        with self._lock:
            self._submitted += 1
            if self._queue_bytes + n_bytes > limit_bytes:
                self._dropped["queue_full"] += 1
                return False
            self._in_flight += 1
            self._queue_bytes += n_bytes
            return True

    def drop(self, reason: str, n_bytes: int) -> None:
        with self._lock:
            self._dropped[reason] += 1
            self._land(1, n_bytes)

    def fail(self, reason: str, n_bytes: int) -> None:
        with self._lock:
            self._failed[reason] += 1
            self._land(1, n_bytes)

    def explained(self, request_bytes: int, row_bytes: int, *, mismatch: bool) -> None:
        """A request has become a row, and stays in flight."""
        with self._lock:
            self._queue_bytes += row_bytes - request_bytes
            self._mismatches += mismatch

    def wrote(self, n: int, n_bytes: int, *, handed_over: bool = False) -> None:
        with self._lock:
            self._written += n
            self._handed_over += n if handed_over else 0
            self._land(n, n_bytes)

    def callback_failed(self) -> None:
        with self._lock:
            self._callback_errors += 1

    def stats(self) -> LogStats:
        with self._lock:
            return LogStats(
                submitted=self._submitted,
                written=self._written,
                dropped=dict(self._dropped),
                failed=dict(self._failed),
                in_flight=self._in_flight,
                queue_bytes=self._queue_bytes,
                handed_over=self._handed_over,
                capture_mismatches=self._mismatches,
                callback_errors=self._callback_errors,
            )

    def _land(self, n: int, n_bytes: int) -> None:
        self._in_flight -= n
        self._queue_bytes -= n_bytes


class Complaints:
    """Warnings of one kind at most once a minute, with how many were held back."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}
        self._held_back: Counter[str] = Counter()

    def say(self, kind: str, message: str, *details: Any) -> None:
        now = time.monotonic()
        if now - self._said.get(kind, -REPEAT_S) < REPEAT_S:
            self._held_back[kind] += 1
            return
        self._said[kind] = now
        more = self._held_back.pop(kind, 0)
        logger.warning(message + (f" ({more} more like it were not logged)" if more else ""), *details)
