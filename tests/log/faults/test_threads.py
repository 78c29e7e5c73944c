"""The logger's threads outlive whatever is raised on them, and signal handlers may do anything inside `submit`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastattr
from fastattr import InputError
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger, inbox, recorder
from fastattr.log.processing import Processor
from fastattr.log.recorder import Publisher, Recorder
from fastattr.log.segments import open_destination
from fastattr.log.spool import SpoolWriter
from fastattr.log.worker import take_over, work
from tests.engine.samples import make_attribution
from tests.log.faults.counting import assert_whole, rows_of

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
WHY = make_attribution(pictures=False)


def failing_once(real: Callable[..., Any], error: BaseException, *, after: bool = False) -> Callable[..., Any]:
    """`real`, which raises `error` the first time, before or after its work."""
    left = [error]

    def call(*args: Any, **options: Any) -> Any:
        if left and not after:
            raise left.pop()
        result = real(*args, **options)
        if left:
            raise left.pop()
        return result

    return call


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied"), MemoryError()])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (Recorder, "write", False),
        (Recorder, "tick", False),
        (SpoolWriter, "append", False),
        (SpoolWriter, "sync", False),
        (SpoolWriter, "close", True),
        (Processor, "commit", False),
        (Publisher, "_recover", False),
        (Publisher, "_publish", False),
        (Publisher, "_tell", False),
    ],
)
def test_both_threads_outlive_an_exception_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: bool, error: BaseException
) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", (0.02, 0.1))
    monkeypatch.setattr(recorder, "TALLY_EVERY_S", 0.05)
    monkeypatch.setattr(owner, name, failing_once(getattr(owner, name), error, after=after))
    logger = AttributionLogger(tmp_path, sample_rate=1.0, sync_s=0.01, segment_age_s=0.05)
    for i in range(6):
        assert logger.submit_attribution(WHY, request_id=str(i))
        time.sleep(0.03)
    assert logger.flush(PATIENCE_S) and logger.shutdown(PATIENCE_S)
    stats = logger.stats()
    assert (stats.written, stats.dropped, stats.failed, stats.in_flight) == (6, {}, {}, 0)
    assert sorted(row["request_id"] for row in assert_whole(tmp_path)) == [str(i) for i in range(6)]


def test_an_unexpected_exception_is_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Processor, "commit", failing_once(Processor.commit, RuntimeError("out of the blue")))
    with AttributionLogger(tmp_path, sample_rate=1.0, sync_s=0.01) as logger:
        assert logger.submit_attribution(WHY, request_id="r") and logger.flush(PATIENCE_S)
        assert logger.stats().thread_errors == 1
    assert "out of the blue" in caplog.text


@pytest.mark.parametrize("place", ["handler", "filter"])
def test_logging_of_the_application_that_raises_ends_nothing(tmp_path: Path, place: str) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("the handler is broken")

    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("the filter is broken")

    log, broken = logging.getLogger("fastattr"), Broken()
    log.addHandler(broken) if place == "handler" else log.addFilter(refuse)
    try:
        logger = AttributionLogger(tmp_path, sample_rate=1.0, sync_s=0.01)
        assert not logger.submit_attribution(WHY, request_id=5)  # type: ignore[arg-type]
        assert logger.submit_attribution(replace(WHY, image=()), request_id="fails on the thread")
        assert logger.submit_attribution(WHY, request_id="sound")
        assert logger.flush(PATIENCE_S) and logger.shutdown(PATIENCE_S)
    finally:
        log.removeHandler(broken)
        log.removeFilter(refuse)
    stats = logger.stats()
    assert (stats.submitted, stats.written, stats.dropped, sum(stats.failed.values())) == (3, 1, {"invalid": 1}, 1)


# what a signal handler does in the middle of `submit`, again and again
HANDLING = """
import json, random, signal, sys, time
from fastattr.log import AttributionLogger
from tests.engine.samples import make_attribution

what, destination = sys.argv[1:]
logger = AttributionLogger(destination, sample_rate=1.0, sync_s=0.01, queue_bytes=100_000, telemetry=False)
why = make_attribution(pictures=False)
state = {"armed": False, "fired": 0}

class Timeout(Exception):
    pass

def handle(*_):
    if not state["armed"]:
        return
    state["armed"] = False
    state["fired"] += 1
    if what == "raise":
        raise Timeout
    if what == "exit":
        raise KeyboardInterrupt
    if what == "stats":
        logger.stats()
    if what == "submit":
        logger.submit_attribution(why, request_id="inner")
    if what == "shutdown":
        print(json.dumps(logger.shutdown(20)), flush=True)
        raise SystemExit(0)

signal.signal(signal.SIGALRM, handle)
random_ = random.Random(1)
logger.submit_attribution(why, request_id="first") if what != "shutdown" else None
until_s = time.monotonic() + 3
while time.monotonic() < until_s:
    before, state["armed"] = state["fired"], True
    signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.002 * random_.random())
    try:
        while state["fired"] == before:
            logger.submit_attribution(why, request_id="r", metadata={"a": [1, 2]})
            stats = logger.stats()
            gone = sum(stats.dropped.values()) + sum(stats.failed.values())
            assert stats.submitted == stats.written + gone + stats.in_flight, stats
    except (Timeout, KeyboardInterrupt):
        pass
flushed = logger.flush(60)
stats = logger.stats()
print(json.dumps([flushed, state["fired"], stats.in_flight, stats.queue_bytes, stats.written, logger.shutdown(60)]))
"""


def run_handling(what: str, destination: Path) -> Any:
    command = [sys.executable, "-c", HANDLING, what, str(destination)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["raise", "exit", "stats", "submit"])
def test_counts_add_up_whatever_a_signal_handler_does_inside_submit(tmp_path: Path, what: str) -> None:
    flushed, fired, in_flight, queue_bytes, written, published = run_handling(what, tmp_path)
    assert fired > 50 and flushed and published
    assert (in_flight, queue_bytes) == (0, 0)
    assert written == len(rows_of(tmp_path))


def test_a_signal_handler_may_shut_down_inside_submit(tmp_path: Path) -> None:
    for i in range(4):  # the first signal falls into the start of the thread, more or less
        assert run_handling("shutdown", tmp_path / str(i)) is True


# --- what is durable, and what is not one's own -----------------------------------------------------------


def test_queue_bytes_bounds_what_waits_with_long_prompts(tmp_path: Path) -> None:
    logger = AttributionLogger(tmp_path, sample_rate=1.0, queue_bytes=8_000_000)
    hold = threading.Event()
    logger._take = lambda *_: hold.wait(PATIENCE_S)  # type: ignore[assignment, method-assign]
    accepted = [
        logger.submit_replay(str(i) + "x" * 1_000_000, [Image.new("RGB", (4, 4))], [1], request_id=str(i))
        for i in range(40)
    ]
    hold.set()
    assert 4 <= sum(accepted) <= 8
    logger.shutdown(1.0)


def test_a_spool_of_another_destination_is_refused(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    AttributionLogger(tmp_path / "a", spool=str(spool)).shutdown()
    with pytest.raises(InputError, match="belongs to the destination"):
        AttributionLogger(tmp_path / "b", spool=str(spool))
    AttributionLogger(tmp_path / "a", spool=str(spool)).shutdown()
    AttributionLogger(tmp_path / "c").shutdown()
    (tmp_path / "c").rename(tmp_path / "d")  # a destination may be moved with its spool
    AttributionLogger(tmp_path / "d").shutdown()


@pytest.mark.parametrize("what", ["folder", "loop"])
def test_one_bad_room_keeps_no_other_from_recovery(tmp_path: Path, what: str) -> None:
    bad = tmp_path / "spool" / "rooms" / "0000000000000000"
    bad.mkdir(parents=True)
    (bad / "20260101-000000.spool").mkdir() if what == "folder" else os.symlink("lock", bad / "lock")
    dead = AttributionLogger(tmp_path, sample_rate=1.0, sync_s=0.0)
    assert dead.submit_attribution(WHY, request_id="left") and dead.flush(PATIENCE_S)
    dead._shut(10.0, publish=False)
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(WHY, request_id="next")
        until_s = time.monotonic() + PATIENCE_S
        while not rows_of(tmp_path) and time.monotonic() < until_s:
            time.sleep(0.05)
    assert {row["request_id"] for row in rows_of(tmp_path)} == {"left", "next"}


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


def handed_over(dest: Path, model: fastattr.Model | None, ids: list[int], n: int = 3) -> None:
    with AttributionLogger(dest, model=model, sample_rate=1.0, explain="worker", attribution="lens@1") as logger:
        for i in range(n):
            assert logger.submit_replay("What is it?", [make_scene(5).image], ids, request_id=str(i))
        assert logger.flush(PATIENCE_S) and logger.stats().handed_over == n


def explained(dest: Path, model: fastattr.Model) -> Any:
    return work(inbox.read_config(dest / "spool"), model, stop=threading.Event(), until_empty=True)


def test_a_worker_leaves_the_requests_of_another_model(tmp_path: Path, model: fastattr.Model) -> None:
    ids = model.processor.tokenizer("A red circle.")["input_ids"]
    handed_over(tmp_path / "vocabulary", None, [151643, 9707])
    stranger = replace(model)
    stranger.__dict__["fingerprint"] = "0" * 16
    handed_over(tmp_path / "fingerprint", stranger, ids)
    for dest in (tmp_path / "vocabulary", tmp_path / "fingerprint"):
        before = {path.name: path.read_bytes() for path in inbox.waiting(dest / "spool")}
        assert explained(dest, model).submitted == 0 and rows_of(dest) == []
        assert {path.name: path.read_bytes() for path in inbox.waiting(dest / "spool")} == before and len(before) == 3
    assert explained(tmp_path / "fingerprint", stranger).written == 3


def test_a_request_that_cannot_be_read_for_a_moment_is_explained_later(
    tmp_path: Path, model: fastattr.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over(tmp_path, model, model.processor.tokenizer("A red circle.")["input_ids"])
    error = OSError(24, "Too many open files")
    monkeypatch.setattr(inbox, "read_request", failing_once(inbox.read_request, error))
    stats = explained(tmp_path, model)
    assert (stats.written, stats.failed) == (3, {})
    assert sorted(row["request_id"] for row in rows_of(tmp_path)) == ["0", "1", "2"]


def test_foreign_names_among_the_claims_stop_no_worker(tmp_path: Path, model: fastattr.Model) -> None:
    handed_over(tmp_path, model, model.processor.tokenizer("A red circle.")["input_ids"], n=1)
    claims = tmp_path / "spool" / "inbox" / "claimed" / "dead"
    claims.mkdir(parents=True)
    for name in ("restored.request", "b.x.request"):
        (claims / name).write_bytes(b"x")
    assert take_over(tmp_path / "spool", open_destination(tmp_path)) == 2
    assert explained(tmp_path, model).written == 1
    left = {path.name for path in (tmp_path / "spool" / "inbox" / "given_up").iterdir()}
    assert left == {"restored.1.request", "b.x.1.request"}
