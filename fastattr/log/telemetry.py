"""OpenTelemetry: the caller's span, one event a record, and the logger's counts as metrics.

Only the API is used, and nothing happens where it is not installed or no SDK is set up. Maps never leave through here:
an event holds numbers, short texts and the address of the record.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastattr.log.counting import Complaints, LogStats

try:
    from opentelemetry import metrics, trace
    from opentelemetry._logs import LogRecord, SeverityNumber, get_logger
    from opentelemetry.context import Context
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Histogram, Observation

SCOPE = "fastattr"
EVENT = "gen_ai.evaluation.result"
EVALUATION = "fastattr.evidence"
MAX_ATTRIBUTES = 12
MAX_EVENT_BYTES = 2048  # names and values of all attributes together

_ID_BYTES = 256
_NAME_BYTES = 128
_ADDRESS_BYTES = 512
_DURATIONS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Caller:
    """The span in which a response was submitted; it may have ended when the record is finished."""

    trace_id: int
    span_id: int
    trace_flags: int

    @property
    def trace_hex(self) -> str:
        """32 hex digits, as stored."""
        return f"{self.trace_id:032x}"

    @property
    def span_hex(self) -> str:
        """16 hex digits, as stored."""
        return f"{self.span_id:016x}"


def caller() -> Caller | None:
    """The current span of this thread or task, or None outside of any. Never raises; takes about a microsecond."""
    if not INSTALLED:
        return None
    try:
        span = trace.get_current_span().get_span_context()
        return Caller(span.trace_id, span.span_id, int(span.trace_flags)) if span.is_valid else None
    except Exception:  # a tracer of someone else's must not break a request
        return None


class Telemetry:
    """What one logger tells OpenTelemetry. No method raises; failures are logged, at most once a minute.

    The SDK keeps one callback a metric and drops later ones without a word, so that the callbacks belong to the
    process, and each metric is the sum over its loggers.

    Args:
        stats: the logger's `stats`, a bound method. It is held weakly: a forgotten logger is not kept alive.
        destination: where records are written, part of their address in events. Passwords and queries are left out.
    """

    def __init__(self, stats: Callable[[], LogStats], destination: str) -> None:
        self._stats = weakref.WeakMethod(stats)
        self._destination = _public(destination)
        self._complaints = Complaints()
        self._durations: Histogram | None = None
        with self._guarded():
            self._durations = _instruments()
        with _lock:
            # a logger that begins anew after a fork is here already
            _sources[:] = [source for source in _sources if source() is not None and source != self._stats]
            _sources.append(self._stats)

    def explained(self, at: Caller | None, duration_s: float) -> None:
        """Count one explanation into the histogram of durations, with the caller's span as its example."""
        with self._guarded():
            if self._durations is not None:
                self._durations.record(duration_s, context=_context(at))

    def evaluated(
        self,
        at: Caller | None,
        *,
        record_id: str,
        request_id: str,
        model: str,
        model_revision: str | None,
        n_tokens: int,
        mean_evidence: float | None,
        low_evidence: int | None,
    ) -> None:
        """Emit the event `gen_ai.evaluation.result` of a finished record as a child of the caller's span.

        Args:
            at: from `caller()`, when the response was submitted.
            mean_evidence: nats a token; None or not finite where it was not measured.
            low_evidence: words below the calibrated threshold; None where there is no evidence.
        """
        with self._guarded():
            if not INSTALLED:
                return
            attributes = event_attributes(
                address=f"{self._destination}#{_cut(record_id, _NAME_BYTES)}",
                request_id=request_id,
                model=model,
                model_revision=model_revision,
                n_tokens=n_tokens,
                mean_evidence=mean_evidence,
                low_evidence=low_evidence,
            )
            get_logger(SCOPE).emit(
                LogRecord(
                    context=_context(at), severity_number=SeverityNumber.INFO, attributes=attributes, event_name=EVENT
                )
            )

    def close(self) -> None:
        """Take the last counts: metrics go on holding them, and never fall, when the logger is gone."""
        with self._guarded():
            stats = self._stats()
            final = None if stats is None else stats()
            with _lock:
                if self._stats in _sources:
                    _sources.remove(self._stats)
                    if final is not None:
                        _closed.append(final)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._complaints.say("telemetry", "OpenTelemetry failed: %r", error)


def event_attributes(
    *,
    address: str,
    request_id: str,
    model: str,
    model_revision: str | None,
    n_tokens: int,
    mean_evidence: float | None,
    low_evidence: int | None,
) -> dict[str, str | int | float]:
    """The attributes of an event, at most `MAX_ATTRIBUTES` and `MAX_EVENT_BYTES` whatever the texts are.

    `gen_ai.*` are the semantic conventions' names, written out because their constants are deprecated.
    """
    attributes: dict[str, str | int | float] = {
        "gen_ai.evaluation.name": EVALUATION,
        "gen_ai.response.id": _cut(request_id, _ID_BYTES),
        "gen_ai.response.model": _cut(model, _NAME_BYTES),
        "fastattr.record": _cut(address, _ADDRESS_BYTES),
        "fastattr.tokens": n_tokens,
    }
    if model_revision is not None:
        attributes["fastattr.model_revision"] = _cut(model_revision, _NAME_BYTES)
    if mean_evidence is not None and math.isfinite(mean_evidence):
        explanation = f"mean evidence of {n_tokens} tokens: {mean_evidence:+.2f} nats"
        if low_evidence is not None:
            explanation += f"; words with low evidence: {low_evidence}"
            attributes["gen_ai.evaluation.score.label"] = "low_evidence" if low_evidence else "seen"
            attributes["fastattr.low_evidence"] = low_evidence
        attributes["gen_ai.evaluation.score.value"] = float(mean_evidence)
        attributes["gen_ai.evaluation.explanation"] = explanation
    return attributes


def _cut(text: str, limit_bytes: int) -> str:
    """As much of `text` as fits, as sound UTF-8: a lone surrogate would make an exporter fail much later."""
    if len(text) > limit_bytes:  # no need to encode megabytes
        text = text[:limit_bytes] + "..."
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit_bytes else data[: limit_bytes - 3].decode("utf-8", "ignore") + "..."


def _public(destination: str) -> str:
    """A destination without what may be a secret, short enough to leave room for a record's id."""
    try:
        parts = urlsplit(destination)
        if parts.scheme and parts.netloc:
            destination = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        destination = ""
    return _cut(destination, _ADDRESS_BYTES - _NAME_BYTES - 1)


def _context(at: Caller | None) -> Context:
    """A context of nothing but the caller's span: the worker's own surroundings do not belong to the record."""
    if at is None:  # an empty context would count as none given, and the worker's span be taken
        return trace.set_span_in_context(trace.INVALID_SPAN, Context())
    span = trace.SpanContext(at.trace_id, at.span_id, is_remote=False, trace_flags=trace.TraceFlags(at.trace_flags))
    return trace.set_span_in_context(trace.NonRecordingSpan(span), Context())


# --- metrics, one set a process --------------------------------------------------------------------------

_lock = threading.RLock()  # a signal handler may shut down a logger in the middle of starting one
_sources: list[weakref.WeakMethod[Callable[[], LogStats]]] = []
_closed: list[LogStats] = []


def _after_fork() -> None:
    """The lock may have been held in the parent, and what was counted there is not the child's."""
    global _lock
    _lock = threading.RLock()
    _closed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _live_and_closed() -> tuple[list[LogStats], list[LogStats]]:
    with _lock:  # a logger that closes meanwhile is in exactly one of the lists
        live = [stats for source in _sources if (stats := source()) is not None]
        closed = list(_closed)
    return [stats() for stats in live], closed  # without our lock: stats takes the logger's


@functools.cache
def _instruments() -> Histogram | None:
    """Make the instruments, once; before an SDK is set up they are the API's proxies."""
    if not INSTALLED:
        return None
    meter = metrics.get_meter(SCOPE)

    def counter(name: str, read: Callable[[LogStats], int], meaning: str) -> None:
        def observe(_options: CallbackOptions) -> list[Observation]:
            live, closed = _live_and_closed()
            return [metrics.Observation(sum(map(read, live + closed)))] if live or closed else []

        meter.create_observable_counter(f"fastattr.log.{name}", [observe], "{response}", meaning)

    def counter_by_reason(name: str, read: Callable[[LogStats], Mapping[str, int]], meaning: str) -> None:
        def observe(_options: CallbackOptions) -> list[Observation]:
            live, closed = _live_and_closed()
            total: Counter[str] = Counter()
            for stats in live + closed:
                total.update(read(stats))
            return [metrics.Observation(n, {"reason": reason}) for reason, n in total.items()]

        meter.create_observable_counter(f"fastattr.log.{name}", [observe], "{response}", meaning)

    def level(name: str, read: Callable[[LogStats], int], unit: str, meaning: str) -> None:
        def observe(_options: CallbackOptions) -> list[Observation]:
            live, _ = _live_and_closed()
            return [metrics.Observation(sum(map(read, live)))]

        meter.create_observable_up_down_counter(f"fastattr.log.{name}", [observe], unit, meaning)

    counter("submitted", lambda stats: stats.submitted, "Responses given to the logger")
    counter("written", lambda stats: stats.written, "Responses durable on disk")
    counter_by_reason("dropped", lambda stats: stats.dropped, "Responses left out on purpose, by reason")
    counter_by_reason("failed", lambda stats: stats.failed, "Responses lost to an error, by reason")
    counter("handed_over", lambda stats: stats.handed_over, "Of those, requests that wait for a worker process")
    counter("capture_mismatches", lambda stats: stats.capture_mismatches, "Captures that had to be replayed")
    counter("callback_errors", lambda stats: stats.callback_errors, "Exceptions of on_record and on_alert")
    counter("thread_errors", lambda stats: stats.thread_errors, "Unexpected exceptions on the logger's own threads")
    level("queue_size", lambda stats: stats.queue_bytes, "By", "Memory held by waiting responses")
    level("in_flight", lambda stats: stats.in_flight, "{response}", "Responses submitted and not yet settled")
    return meter.create_histogram(
        "fastattr.log.explain.duration",
        "s",
        "Time to explain one response",
        explicit_bucket_boundaries_advisory=_DURATIONS_S,
    )
