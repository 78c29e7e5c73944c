"""What became of every submission: submitted = written + dropped + failed + in flight, at every moment."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("fastattr")

REPEAT_S = 60.0
REQUEST_BYTES = 2048  # of a request's own objects and short texts
FEW = 64  # requests, whose own objects are too little to count
FOLD_AT = 32  # changes; their sum is taken whenever a submission is accepted


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
        thread_errors: unexpected exceptions on the logger's own threads, which went on after each.
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
    thread_errors: int = 0


@dataclass(eq=False)
class Change:
    """What one step adds to `LogStats`; `dropped` and `failed` are reasons and count once.

    Attributes:
        folded: whether it is part of a sum already.
    """

    submitted: int = 0
    written: int = 0
    in_flight: int = 0
    queue_bytes: int = 0
    handed_over: int = 0
    capture_mismatches: int = 0
    callback_errors: int = 0
    thread_errors: int = 0
    dropped: str | None = None
    failed: str | None = None
    folded: bool = False


class Counts:
    """The running form of `LogStats`: every change is one step that keeps the sum.

    A signal handler runs between any two steps of the main thread, and may ask for `stats`, shut the logger down or
    raise. So there is no lock that it could wait for in vain, and nothing that it could leave half done: a change counts
    from the moment it is appended, and a sum of changes is replaced as a whole.
    """

    def __init__(self) -> None:
        self._changes: deque[Change] = deque()
        self._sum: tuple[LogStats, Change | None] = (LogStats(), None)  # up to and including this change
        self._folding: dict[str, object] = {}  # who moves changes to the sum

    def refuse(self, reason: str) -> None:
        """A submission is dropped before it was accepted."""
        self._add(Change(submitted=1, dropped=reason))

    def accept(self, change: Change, limit_bytes: int) -> bool:
        """A submission goes in flight with `change`, unless memory is full."""
        total, waiting = self._read()
        held = total.queue_bytes + sum([each.queue_bytes for each in waiting])
        n = total.in_flight + sum([each.in_flight for each in waiting])
        if held + change.queue_bytes + REQUEST_BYTES * max(0, n - FEW) > limit_bytes:
            self.refuse("queue_full")
            return False
        self._add(change)
        return True

    def has(self, change: Change) -> bool:
        """Whether `change` counts, for callers that were interrupted in `accept`."""
        return change in list(self._changes) or change.folded

    def drop(self, reason: str, n_bytes: int) -> None:
        self._add(Change(in_flight=-1, queue_bytes=-n_bytes, dropped=reason))

    def fail(self, reason: str, n_bytes: int) -> None:
        self._add(Change(in_flight=-1, queue_bytes=-n_bytes, failed=reason))

    def explained(self, request_bytes: int, row_bytes: int, *, mismatch: bool) -> None:
        """A request has become a row, and stays in flight."""
        self._add(Change(queue_bytes=row_bytes - request_bytes, capture_mismatches=int(mismatch)))

    def wrote(self, n: int, n_bytes: int, *, handed_over: bool = False) -> None:
        self._add(Change(written=n, in_flight=-n, queue_bytes=-n_bytes, handed_over=n if handed_over else 0))

    def callback_failed(self) -> None:
        self._add(Change(callback_errors=1))

    def thread_failed(self) -> None:
        self._add(Change(thread_errors=1))

    def stats(self) -> LogStats:
        return _added(*self._read())

    def _add(self, change: Change) -> None:
        self._changes.append(change)
        if len(self._changes) > FOLD_AT:
            self._fold()

    def _read(self) -> tuple[LogStats, Sequence[Change]]:
        """A sum, and the changes since."""
        while True:
            found = self._sum
            waiting = list(self._changes)
            if found is self._sum:  # else changes moved from one to the other meanwhile
                break
        total, last = found
        return total, waiting[waiting.index(last) + 1 :] if last in waiting else waiting

    def _fold(self) -> None:
        """Add the changes to the sum. By one caller at a time; whoever comes meanwhile leaves it to that one."""
        me = object()
        try:
            if self._folding.setdefault("by", me) is me:
                total, waiting = self._read()
                for each in waiting:
                    each.folded = True
                if waiting:
                    self._sum = (_added(total, waiting), waiting[-1])
                last = self._sum[1]
                while last in self._changes:
                    self._changes.popleft()
        finally:  # no call before the one that clears: a signal handler that raises would run behind it
            if self._folding == {"by": me}:
                self._folding.clear()


def _added(total: LogStats, changes: Sequence[Change]) -> LogStats:
    dropped, failed = dict(total.dropped), dict(total.failed)
    for each in changes:
        for reasons, reason in ((dropped, each.dropped), (failed, each.failed)):
            if reason is not None:
                reasons[reason] = reasons.get(reason, 0) + 1
    return LogStats(
        submitted=total.submitted + sum([each.submitted for each in changes]),
        written=total.written + sum([each.written for each in changes]),
        dropped=dropped,
        failed=failed,
        in_flight=total.in_flight + sum([each.in_flight for each in changes]),
        queue_bytes=total.queue_bytes + sum([each.queue_bytes for each in changes]),
        handed_over=total.handed_over + sum([each.handed_over for each in changes]),
        capture_mismatches=total.capture_mismatches + sum([each.capture_mismatches for each in changes]),
        callback_errors=total.callback_errors + sum([each.callback_errors for each in changes]),
        thread_errors=total.thread_errors + sum([each.thread_errors for each in changes]),
    )


class Complaints:
    """Warnings of one kind at most once a minute, with how many were held back. Never raises an `Exception`."""

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
        with suppress(Exception):  # a handler or filter of the application's may raise anything
            logger.warning(message + (f" ({more} more like it were not logged)" if more else ""), *details)
