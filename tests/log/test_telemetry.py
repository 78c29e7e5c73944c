"""What the real SDK and a real OTLP receiver get to see of a logger."""

from __future__ import annotations

import gc
import json
import logging
import math
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from fastattr.log import AttributionLogger, read, telemetry
from fastattr.log.counting import LogStats
from fastattr.log.telemetry import Caller, Telemetry, event_attributes
from tests.engine.samples import make_attribution

ROOT = Path(__file__).parents[2]
REQUESTS = {
    "/v1/logs": ExportLogsServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/traces": ExportTraceServiceRequest,
}


class Logger:
    """Stands for a logger: something with counts."""

    def __init__(self, **counts: Any) -> None:
        self.counts = LogStats(**counts)

    def stats(self) -> LogStats:
        return self.counts


# --- over the wire ---------------------------------------------------------------------------------------

# a server with everything set up: it submits inside a span, and a worker finishes when the span is long over
APPLICATION = """
import json, sys, threading
from opentelemetry import metrics, trace, _logs
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from fastattr.log.telemetry import Telemetry, caller
from tests.log.test_telemetry import Logger

busy = Logger(submitted=10, written=5, dropped={"queue_full": 3, "sampled": 1}, failed={"redact": 1}, queue_bytes=4096)
other = Logger(submitted=1, in_flight=1, dropped={"sampled": 0}, capture_mismatches=2, queue_bytes=100,
               handed_over=4, callback_errors=6, thread_errors=2)
told = Telemetry(busy.stats, "s3://key:secret@bucket/attr")
also = Telemetry(other.stats, "runs/attr")  # before an SDK is there, and a second one in the same process
assert caller() is None

address = sys.argv[1]
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(OTLPSpanExporter(address + "/v1/traces")))
_logs.set_logger_provider(LoggerProvider())
_logs.get_logger_provider().add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(address + "/v1/logs")))
reader = PeriodicExportingMetricReader(OTLPMetricExporter(address + "/v1/metrics"), export_interval_millis=3_600_000)
metrics.set_meter_provider(MeterProvider([reader]))

tracer = trace.get_tracer("server")
with tracer.start_as_current_span("POST /answer") as span:
    at = caller()
ids = span.get_span_context()
assert (at.trace_hex, at.span_hex) == (format(ids.trace_id, "032x"), format(ids.span_id, "016x"))

def work():
    with tracer.start_as_current_span("something else of the worker"):
        told.explained(at, 0.3)
        told.evaluated(at, record_id="r-1", request_id="<b>'; DROP TABLE x;--" + chr(0) + chr(0xD800) + "x" * 10**7,
                       model="shapes", model_revision="v3", n_tokens=17, mean_evidence=3.214, low_evidence=2)
        also.evaluated(None, record_id="r-2", request_id="quiet", model="shapes", model_revision=None,
                       n_tokens=1, mean_evidence=None, low_evidence=None)

worker = threading.Thread(target=work)
worker.start()
worker.join()
for provider in (trace.get_tracer_provider(), _logs.get_logger_provider(), metrics.get_meter_provider()):
    provider.shutdown()
"""


@pytest.fixture(scope="module")
def received() -> Iterator[dict[str, list[Any]]]:
    """Everything that the application sent, decoded, by path."""
    received: dict[str, list[Any]] = {path: [] for path in REQUESTS}

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = REQUESTS[self.path]()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request.ParseFromString(body)
            received[self.path].append(request)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}"
            done = subprocess.run(
                [sys.executable, "-c", APPLICATION, address], capture_output=True, text=True, cwd=ROOT
            )
        finally:
            server.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    yield received


def sent_events(received: dict[str, list[Any]]) -> list[Any]:
    return [
        event
        for request in received["/v1/logs"]
        for resource in request.resource_logs
        for scope in resource.scope_logs
        if scope.scope.name == "fastattr"
        for event in scope.log_records
    ]


def sent_metrics(received: dict[str, list[Any]]) -> dict[str, Any]:
    """The last state of every metric by name."""
    return {
        metric.name: metric
        for request in received["/v1/metrics"]
        for resource in request.resource_metrics
        for scope in resource.scope_metrics
        if scope.scope.name == "fastattr"
        for metric in scope.metrics
    }


def plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def test_a_late_event_belongs_to_the_span_that_is_over(received: dict[str, list[Any]]) -> None:
    spans = {
        span.name: span
        for request in received["/v1/traces"]
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    asked = spans["POST /answer"]
    event, orphan = sent_events(received)
    assert (event.trace_id, event.span_id) == (asked.trace_id, asked.span_id)
    assert event.flags & 1 == 1  # sampled, as the span was
    assert event.observed_time_unix_nano > asked.end_time_unix_nano
    assert event.event_name == orphan.event_name == "gen_ai.evaluation.result"
    assert event.severity_number == 9
    # what was submitted outside of any span does not become part of whatever the worker is in
    assert not int.from_bytes(orphan.trace_id, "big") and not int.from_bytes(orphan.span_id, "big")


def test_an_event_says_what_was_found_and_where_the_maps_are(received: dict[str, list[Any]]) -> None:
    event, orphan = sent_events(received)
    attributes = plain(event.attributes)
    request_id = attributes.pop("gen_ai.response.id")
    assert request_id.startswith("<b>'; DROP TABLE x;--\0?xxx") and len(request_id.encode()) <= 256
    assert attributes == {
        "gen_ai.evaluation.name": "fastattr.evidence",
        "gen_ai.evaluation.score.value": 3.214,
        "gen_ai.evaluation.score.label": "low_evidence",
        "gen_ai.evaluation.explanation": "mean evidence of 17 tokens: +3.21 nats; words with low evidence: 2",
        "gen_ai.response.model": "shapes",
        "fastattr.record": "s3://bucket/attr#r-1",  # and no secret
        "fastattr.tokens": 17,
        "fastattr.low_evidence": 2,
        "fastattr.model_revision": "v3",
    }
    assert plain(orphan.attributes) == {
        "gen_ai.evaluation.name": "fastattr.evidence",
        "gen_ai.response.id": "quiet",
        "gen_ai.response.model": "shapes",
        "fastattr.record": "runs/attr#r-2",
        "fastattr.tokens": 1,
    }


def test_metrics_are_the_sum_over_the_loggers_of_the_process(received: dict[str, list[Any]]) -> None:
    found = sent_metrics(received)
    totals = {
        name: {plain(point.attributes).get("reason"): point.as_int for point in metric.sum.data_points}
        for name, metric in found.items()
        if metric.HasField("sum")
    }
    assert totals == {
        "fastattr.log.submitted": {None: 11},
        "fastattr.log.written": {None: 5},
        "fastattr.log.dropped": {"queue_full": 3, "sampled": 1},
        "fastattr.log.failed": {"redact": 1},
        "fastattr.log.handed_over": {None: 4},
        "fastattr.log.capture_mismatches": {None: 2},
        "fastattr.log.callback_errors": {None: 6},
        "fastattr.log.thread_errors": {None: 2},
        "fastattr.log.queue_size": {None: 4196},
        "fastattr.log.in_flight": {None: 1},
    }
    rising = {name for name, metric in found.items() if metric.HasField("sum") and metric.sum.is_monotonic}
    assert rising == set(totals) - {"fastattr.log.queue_size", "fastattr.log.in_flight"}
    assert found["fastattr.log.queue_size"].unit == "By"


def test_durations_are_seconds_in_buckets_that_fit_and_point_at_the_trace(received: dict[str, list[Any]]) -> None:
    metric = sent_metrics(received)["fastattr.log.explain.duration"]
    (point,) = metric.histogram.data_points
    assert (metric.unit, point.count, point.sum) == ("s", 1, 0.3)
    at = list(point.bucket_counts).index(1)
    assert point.explicit_bounds[at - 1] < 0.3 <= point.explicit_bounds[at] <= 2.5 * point.explicit_bounds[at - 1]
    (example,) = point.exemplars
    event, _ = sent_events(received)
    assert (example.trace_id, example.span_id) == (event.trace_id, event.span_id)


# --- with a logger ---------------------------------------------------------------------------------------


def test_a_record_and_its_event_carry_the_span_it_was_submitted_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemoryLogRecordExporter()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    monkeypatch.setattr(telemetry, "get_logger", provider.get_logger)
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("server")
    why = make_attribution()
    with AttributionLogger(tmp_path, sample_rate=1.0) as attributions:
        with tracer.start_as_current_span("request") as span:
            assert attributions.submit_attribution(why, request_id="inside")
        assert attributions.submit_attribution(why, request_id="outside")
        attributions.flush()
    provider.shutdown()
    at = span.get_span_context()
    stored = {record.envelope.request_id: record.envelope for record in read(str(tmp_path))}
    sent = {
        event.log_record.attributes["gen_ai.response.id"]: event.log_record for event in exporter.get_finished_logs()
    }
    assert set(stored) == set(sent) == {"inside", "outside"}
    assert (stored["inside"].trace_id, stored["inside"].span_id) == (f"{at.trace_id:032x}", f"{at.span_id:016x}")
    assert (sent["inside"].trace_id, sent["inside"].span_id) == (at.trace_id, at.span_id)
    assert (stored["outside"].trace_id, stored["outside"].span_id) == (None, None)
    assert not sent["outside"].trace_id and not sent["outside"].span_id
    assert why.evidence is not None
    for name, event in sent.items():
        assert event.attributes["fastattr.record"] == f"{tmp_path}#{stored[name].record_id}"
        assert event.attributes["gen_ai.evaluation.score.value"] == pytest.approx(float(why.evidence.mean()))
        assert event.attributes["fastattr.low_evidence"] == len(why.low_evidence) > 0


# --- limits ----------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(st.characters(codec=None), max_size=40),  # lone surrogates too
    st.builds(lambda part, n: part * n, st.sampled_from(["a", "é", "汉", "🙂", "\0", "\ud800"]), st.integers(0, 3000)),
)


@given(
    texts,
    texts,
    texts,
    texts,
    st.none() | texts,
    st.integers(0, 2**31),
    st.none() | st.floats(width=32),
    st.none() | st.integers(0, 2**31),
)
def test_no_text_makes_an_event_too_large_or_unsound(
    destination: str,
    record_id: str,
    request_id: str,
    model: str,
    revision: str | None,
    n_tokens: int,
    mean_evidence: float | None,
    low_evidence: int | None,
) -> None:
    exporter = InMemoryLogRecordExporter()
    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(SimpleLogRecordProcessor(exporter))
    logged = Logger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "get_logger", provider.get_logger)
        Telemetry(logged.stats, destination).evaluated(
            Caller(1, 2, 1),
            record_id=record_id,
            request_id=request_id,
            model=model,
            model_revision=revision,
            n_tokens=n_tokens,
            mean_evidence=mean_evidence,
            low_evidence=low_evidence,
        )
    (event,) = exporter.get_finished_logs()
    provider.shutdown()
    attributes = event.log_record.attributes
    assert len(attributes) <= 12
    size = sum(len(name.encode()) + len(str(value).encode()) for name, value in attributes.items())
    assert size <= 2048
    for value in attributes.values():
        assert isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))
    if len(request_id.encode("utf-8", "replace")) <= 256:
        assert attributes["gen_ai.response.id"] == request_id.encode("utf-8", "replace").decode()
    if len(record_id.encode("utf-8", "replace")) <= 128:  # whatever the destination, the record is named whole
        assert attributes["fastattr.record"].endswith("#" + record_id.encode("utf-8", "replace").decode())


@pytest.mark.parametrize("mean_evidence", [None, math.nan, math.inf])
def test_evidence_that_is_no_number_is_left_out(mean_evidence: float | None) -> None:
    attributes = event_attributes(
        address="x#y",
        request_id="r",
        model="m",
        model_revision=None,
        n_tokens=3,
        mean_evidence=mean_evidence,
        low_evidence=0,
    )
    assert not {name for name in attributes if "score" in name or "explanation" in name}


@pytest.mark.parametrize(
    ("low_evidence", "label"), [(0, "seen"), (1, "low_evidence"), (None, None)], ids=["seen", "low", "not judged"]
)
def test_labels(low_evidence: int | None, label: str | None) -> None:
    attributes = event_attributes(
        address="x#y",
        request_id="r",
        model="m",
        model_revision=None,
        n_tokens=3,
        mean_evidence=1.0,
        low_evidence=low_evidence,
    )
    assert attributes.get("gen_ai.evaluation.score.label") == label


@pytest.mark.parametrize(
    ("destination", "shown"),
    [
        ("s3://bucket/attr", "s3://bucket/attr#r"),
        ("https://me:secret@host:8080/a?signature=secret#secret", "https://host:8080/a#r"),
        ("/srv/attr", "/srv/attr#r"),
        ("C:\\attr", "C:\\attr#r"),
        ("https://[secret", "#r"),
    ],
)
def test_an_address_holds_no_secret(destination: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Recorder:
        def emit(self, record: LogRecord) -> None:
            assert record.attributes is not None
            seen.append(str(record.attributes["fastattr.record"]))

    monkeypatch.setattr(telemetry, "get_logger", lambda name: Recorder())
    logged = Logger()
    emit(Telemetry(logged.stats, destination))
    assert seen == [shown]


def emit(told: Telemetry) -> None:
    told.evaluated(
        Caller(1, 2, 1),
        record_id="r",
        request_id="q",
        model="m",
        model_revision=None,
        n_tokens=1,
        mean_evidence=0.0,
        low_evidence=0,
    )


# --- life and death --------------------------------------------------------------------------------------


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Reads `fastattr.log.submitted` and `.in_flight` by a reader of its own, with no other logger about."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(telemetry.metrics, "get_meter", provider.get_meter)
    monkeypatch.setattr(telemetry, "_sources", [])
    monkeypatch.setattr(telemetry, "_closed", [])
    telemetry._instruments.cache_clear()

    def read() -> tuple[int | None, int]:
        (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
        points = {metric.name: metric.data.data_points for metric in scope.metrics}
        counted = points.get("fastattr.log.submitted")
        return counted[0].value if counted else None, points["fastattr.log.in_flight"][0].value

    yield read
    telemetry._instruments.cache_clear()
    provider.shutdown()


def test_metrics_keep_no_logger_alive(submitted: Any) -> None:
    gone = Logger(submitted=3)
    dead = Logger.stats.__get__(gone)  # a bound method alone, as Telemetry gets it
    Telemetry(dead, "x")
    assert submitted()[0] == 3
    watched = weakref.ref(gone)
    del gone, dead
    gc.collect()
    assert watched() is None
    assert submitted()[0] is None  # nothing to say is not zero


def test_counts_never_fall_when_a_logger_is_closed_and_gone(submitted: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Logger(submitted=3, in_flight=1), Logger(submitted=4, in_flight=1)
    told, _ = Telemetry(first.stats, "x"), Telemetry(second.stats, "x")
    assert submitted() == (7, 2)
    first.counts = LogStats(submitted=5, in_flight=1)  # it gave up on one
    told.close()
    told.close()
    del first
    gc.collect()
    assert submitted() == (9, 1)
    assert caplog.records == []


FORKED = """
import os, sys, threading
from dataclasses import replace
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from fastattr.log import AttributionLogger, read, telemetry
from fastattr.log.counting import LogStats
from tests.log.test_telemetry import Logger

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader], shutdown_on_exit=False))
old, own = Logger(submitted=1000), Logger(submitted=0)
told = telemetry.Telemetry(old.stats, "x")
telemetry.Telemetry(own.stats, "x")
told.close()

# another thread is reading just now
reading, forked = threading.Event(), threading.Event()
def read():
    with telemetry._lock:
        reading.set()
        forked.wait()
thread = threading.Thread(target=read)
thread.start()
reading.wait()
child = os.fork()
if child:
    forked.set()
    thread.join()
own.counts = replace(own.counts, submitted=7 if child == 0 else 50)
if child == 0:
    anew = telemetry.Telemetry(own.stats, "x")  # a logger begins anew in the child: it is still one logger
(scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics
(point,) = [m.data.data_points[0] for m in scope.metrics if m.name == "fastattr.log.submitted"]
if child == 0:
    os._exit(point.value)
assert point.value == 1050, point.value
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_reports_its_own_counts_and_cannot_hang() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (7, "")


# --- without, and with a broken one -----------------------------------------------------------------------

BARE = """
import json, sys
sys.modules["opentelemetry"] = None  # what import does where a package is not installed
from fastattr.log import AttributionLogger, read, telemetry
from tests.engine.samples import make_attribution

with AttributionLogger(sys.argv[1], sample_rate=1.0) as logger:
    assert logger.submit_attribution(make_attribution(), request_id="r")
(record,) = read(sys.argv[1])
print(json.dumps([telemetry.INSTALLED, telemetry.caller(), record.envelope.request_id, record.envelope.trace_id]))
"""


def test_a_logger_works_without_opentelemetry(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BARE, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, None, "r", None]
    assert done.stderr == ""


def test_a_broken_sdk_reaches_nobody_and_does_not_flood(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SimpleLogRecordProcessor):
        def on_emit(self, log_record: Any) -> None:
            raise RuntimeError("exporter on fire")

    provider = LoggerProvider(shutdown_on_exit=False)
    provider.add_log_record_processor(Broken(InMemoryLogRecordExporter()))
    monkeypatch.setattr(telemetry, "get_logger", provider.get_logger)
    logged = Logger()
    told = Telemetry(logged.stats, "x")
    with caplog.at_level(logging.WARNING, "fastattr"):
        for _ in range(3):
            emit(told)
    provider.shutdown()
    assert [record.getMessage() for record in caplog.records if record.name == "fastattr"] == [
        "OpenTelemetry failed: RuntimeError('exporter on fire')"
    ]


def test_a_broken_tracer_does_not_break_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no context")

    monkeypatch.setattr(telemetry.trace, "get_current_span", fail)
    assert telemetry.caller() is None
