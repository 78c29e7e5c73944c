"""Requests to durable records, on one thread: explain, keep or drop, write, tell whoever wants to know."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastattr.errors import SaveError
from fastattr.log.config import LogConfig
from fastattr.log.counting import Complaints, Counts
from fastattr.log.drift import Alert, ControlLimits, DriftMonitor, Stream, read_limits, write_limits
from fastattr.log.explaining import Explained, explain
from fastattr.log.record import Envelope, to_batch
from fastattr.log.recorder import Recorder
from fastattr.log.requests import Request, release
from fastattr.log.telemetry import Telemetry

if TYPE_CHECKING:
    from fastattr.adapters import Model
    from fastattr.log.telemetry import Caller

MAX_PENDING_ROWS = 64
RETRY_S = 0.2


@dataclass(frozen=True)
class Logged:
    """A record that is durable, for the `on_record` callback.

    Attributes:
        time: when it was submitted, in UTC.
        mean_evidence, min_evidence: nats, or None without evidence.
        low_evidence: words below the calibrated threshold, or None without evidence.
        mean_log_prob: nats.
        mean_image_share: the images' part of the maps, in [0, 1].
        trace_id, span_id: of the caller's span as hex digits, or None.
    """

    record_id: str
    request_id: str
    time: datetime
    model: str
    model_revision: str | None
    n_tokens: int
    mean_evidence: float | None
    min_evidence: float | None
    low_evidence: int | None
    mean_log_prob: float
    mean_image_share: float
    error: bool
    metadata: Mapping[str, Any]
    trace_id: str | None
    span_id: str | None


@dataclass(frozen=True, eq=False)
class _Row:
    batch: pa.RecordBatch
    logged: Logged
    caller: Caller | None
    signals: Mapping[str, float]
    n_bytes: int  # asking a nested batch takes a tenth of a millisecond


class Processor:
    """Takes requests one after the other. Never raises: what goes wrong is counted and, now and then, logged."""

    def __init__(
        self,
        config: LogConfig,
        recorder: Recorder,
        counts: Counts,
        telemetry: Telemetry | None,
        model: Model | None,
    ) -> None:
        self.recorder = recorder
        self._config, self._counts, self._telemetry, self._model = config, counts, telemetry, model
        self._monitor: DriftMonitor | None = None
        if config.on_alert is not None:
            known = {} if config.drift_limits is None else read_limits_if_any(Path(config.drift_limits))
            self._monitor = DriftMonitor(known, on_alert=self._alert)
        self._n_limits = 0 if self._monitor is None else len(self._monitor.limits)
        self._complaints = Complaints()
        self._sequence = 0
        self._pending: list[_Row] = []
        self._oldest_s = math.inf
        self._retry_s = -math.inf

    def process(self, request: Request) -> bool:
        """Explain one request; its row waits for `commit`. Returns False where that failed."""
        began_s = time.monotonic()
        try:
            explained = explain(request, self._config, self._model)
            row = self._row(request, explained, began_s)
            if self._telemetry is not None:
                self._telemetry.explained(request.caller, time.monotonic() - began_s)
            if self._monitor is not None and request.share < max(self._config.sample_rate, self._config.screen_rate):
                # what error, length or low evidence let in would not be like the rest
                self._watch(self._monitor, row)
            kept = self._kept(request, row.logged)
        except BaseException as error:  # a callback of the user's or torch may raise anything; the thread must live
            self._counts.fail(type(error).__name__, request.n_bytes)
            self._complaints.say(
                type(error).__name__,
                "response %.80r was not explained: %s: %s",
                request.submission.request_id,
                type(error).__name__,
                error,
            )
            return False
        finally:
            release(request.job)
        if not kept:
            self._counts.drop("not_low_evidence", request.n_bytes)
            return True
        self._pending.append(row)
        self._sequence += 1
        self._oldest_s = min(self._oldest_s, time.monotonic())
        self._counts.explained(request.n_bytes, row.n_bytes, mismatch=explained.mismatch)
        return True

    @property
    def due_s(self) -> float:
        """Seconds until `commit` should be called; infinite where nothing waits."""
        full = len(self._pending) >= MAX_PENDING_ROWS
        due_s = -math.inf if full else self._oldest_s + self._config.sync_s
        return max(0.0, max(due_s, self._retry_s) - time.monotonic())

    def commit(self) -> bool:
        """Make all rows durable. Returns False where the disk refuses; they wait, and a later call tries again."""
        rows, n_bytes = self._pending, sum(row.n_bytes for row in self._pending)
        if rows:
            try:
                self.recorder.write([row.batch for row in rows])
            except BaseException as error:  # nothing is written; also memory may be short for a while
                if not isinstance(error, SaveError):
                    self._counts.thread_failed()
                self._complaints.say("write", "%d records wait in memory: %s", len(rows), error or repr(error))
                self._retry_s = time.monotonic() + RETRY_S
                return False
            self._pending, self._oldest_s = [], math.inf
            self._counts.wrote(len(rows), n_bytes)
            for row in rows:
                try:
                    self._tell(row)
                except BaseException as error:  # even sys.exit() in a callback ends nothing here
                    self._counts.callback_failed()
                    self._complaints.say("callback", "a callback failed: %r", error)
        self.recorder.tick()
        return True

    def abandon(self, reason: str) -> None:
        """Give up rows that cannot be written, at the very end."""
        for row in self._pending:
            self._counts.drop(reason, row.n_bytes)
        self._pending, self._oldest_s = [], math.inf

    def _row(self, request: Request, explained: Explained, began_s: float) -> _Row:
        submission, caller = request.submission, request.caller
        envelope = Envelope(
            record_id=request.record_id,
            request_id=submission.request_id,
            time=datetime.fromtimestamp(request.time_ns / 1e9, timezone.utc),
            writer=self.recorder.writer,
            sequence=self._sequence,
            model_revision=self._config.model_revision,
            trace_id=None if caller is None else caller.trace_hex,
            span_id=None if caller is None else caller.span_hex,
            error=request.error,
            metadata=submission.metadata,
            image_sha256=explained.image_sha256,
            images=explained.images,
            queued_ms=1e3 * (began_s - request.queued_s),
            explain_ms=1e3 * (time.monotonic() - began_s),
        )
        batch = to_batch(explained.why, envelope, submission.content)
        value = {name: batch.column(name)[0].as_py() for name in _LOGGED}
        logged = Logged(
            record_id=envelope.record_id,
            request_id=envelope.request_id,
            time=envelope.time,
            model_revision=envelope.model_revision,
            error=envelope.error,
            metadata=envelope.metadata,
            trace_id=envelope.trace_id,
            span_id=envelope.span_id,
            **value,
        )
        signals = {} if self._monitor is None else signals_of(batch)
        return _Row(batch, logged, caller, signals, batch.nbytes)

    def _watch(self, monitor: DriftMonitor, row: _Row) -> None:
        monitor.observe(row.logged.model, row.logged.model_revision, row.signals)
        limits, path = monitor.limits, self._config.drift_limits
        if len(limits) > self._n_limits and path is not None:  # learned some: the next start need not
            try:
                write_limits(limits, Path(path))
            except SaveError as error:
                self._complaints.say("limits", "%s", error)
        self._n_limits = len(limits)

    def _alert(self, alert: Alert) -> None:
        try:
            if self._config.on_alert is not None:
                self._config.on_alert(alert)
        except BaseException as error:
            self._counts.callback_failed()
            self._complaints.say("on_alert", "on_alert failed: %r", error)

    def _kept(self, request: Request, logged: Logged) -> bool:
        low = bool(logged.low_evidence) and request.share < self._config.low_evidence_rate
        return request.share < request.rate or low

    def _tell(self, row: _Row) -> None:
        logged = row.logged
        if self._telemetry is not None:
            self._telemetry.evaluated(
                row.caller,
                record_id=logged.record_id,
                request_id=logged.request_id,
                model=logged.model,
                model_revision=logged.model_revision,
                n_tokens=logged.n_tokens,
                mean_evidence=logged.mean_evidence,
                low_evidence=logged.low_evidence,
            )
        if self._config.on_record is not None:
            self._config.on_record(logged)


_LOGGED = (
    "model",
    "n_tokens",
    "mean_evidence",
    "min_evidence",
    "low_evidence",
    "mean_log_prob",
    "mean_image_share",
)


def read_limits_if_any(path: Path) -> dict[Stream, ControlLimits]:
    """Limits an earlier process learned; none where there is no file. Raises `InputError` for a broken one."""
    return dict(read_limits(path)) if path.exists() else {}


def signals_of(batch: pa.RecordBatch) -> dict[str, float]:
    """What drift is watched on: means over the tokens of one response, where they are finite."""
    tokens = batch.column("tokens").values
    means = {
        "evidence": batch.column("mean_evidence")[0].as_py(),
        "image_share": batch.column("mean_image_share")[0].as_py(),
        **{
            name: float(np.mean(tokens.field(name).to_numpy(zero_copy_only=False)))
            for name in ("entropy", "peak_ratio", "area")
        },
    }
    low = batch.column("low_evidence")[0].as_py()
    if low is not None:
        means["low_evidence"] = low / batch.column("n_tokens")[0].as_py()
    return {name: value for name, value in means.items() if value is not None and math.isfinite(value)}
