"""Stores that fail, hang, go away and come back: an fsspec file system of our own, and a real S3 server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from fastattr.errors import SaveError
from fastattr.log import AttributionLogger, read, recorder
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, counted

PATIENCE_S = 60.0
WHY = make_attribution(pictures=False)


class Moody(MemoryFileSystem):
    """A store in memory that does what the test says."""

    protocol = "moody"
    store: dict[str, Any] = {}  # noqa: RUF012  # as its base class has it
    pseudo_dirs = [""]  # noqa: RUF012
    mood = "good"
    hanging = threading.Event()
    released = threading.Event()
    failures = 0

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if self.mood == "hangs":
            type(self).failures += 1
            self.hanging.set()
            assert self.released.wait(PATIENCE_S)
        if self.mood == "raises":
            type(self).failures += 1
            raise ConnectionError("the store is not well")
        if self.mood == "loses the answer":
            type(self).failures += 1
            super().pipe_file(path, value, mode, **options)
            raise TimeoutError("it was written, but nobody heard of it")
        super().pipe_file(path, value, mode, **options)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between tries is much in a test."""
    monkeypatch.setattr(recorder, "RETRY_S", (0.02, 0.1))


@pytest.fixture
def moody() -> Iterator[type[Moody]]:
    fsspec.register_implementation("moody", Moody, clobber=True)
    Moody.mood, Moody.failures = "good", 0
    Moody.hanging.clear()
    Moody.released.clear()
    Moody.store.clear()
    yield Moody
    Moody.mood = "good"
    Moody.released.set()


def ids_in(dest: str, **options: Any) -> list[str]:
    return sorted(each.envelope.request_id for each in read(dest, **options))


def until(true: Any) -> bool:
    """Wait for a thread of the logger."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        if true():
            return True
        time.sleep(0.01)
    return False


def spools(folder: Path) -> list[Path]:
    return sorted(folder.glob("rooms/*/*.spool"))


@pytest.mark.parametrize("mood", ["raises", "loses the answer"])
def test_while_the_store_fails_segments_wait_and_are_published_once(
    tmp_path: Path, moody: type[Moody], fault_counts: FaultCounts, mood: str
) -> None:
    dest = f"moody://{uuid4().hex}"
    logger = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0, segment_bytes=1)
    try:
        assert logger.submit_attribution(WHY, request_id="good")
        assert until(lambda: len(spools(tmp_path)) == 0 and logger.stats().written)
        moody.mood = mood
        accepted = ["good", *(f"{mood} {i}" for i in range(10))]
        for each in accepted[1:]:
            assert logger.submit_attribution(WHY, request_id=each)
            assert logger.flush(PATIENCE_S)
        assert until(lambda: moody.failures >= 3)
        assert logger.stats().written == 11 and len(spools(tmp_path)) >= 1
        assert_identity(logger.stats())
        moody.mood = "good"
        assert until(lambda: len(spools(tmp_path)) == 0)
    finally:
        moody.mood = "good"
        assert logger.shutdown(PATIENCE_S)
    found = ids_in(dest)
    assert found == sorted(accepted)
    fault_counts.add(f"store {mood}", faults=moody.failures, acknowledged=len(accepted), checked=len(found))


def test_a_store_that_hangs_holds_up_neither_submissions_nor_records(
    tmp_path: Path, moody: type[Moody], fault_counts: FaultCounts
) -> None:
    dest = f"moody://{uuid4().hex}"
    logger = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0, segment_bytes=1)
    try:
        moody.mood = "hangs"
        assert logger.submit_attribution(WHY, request_id="0")
        assert moody.hanging.wait(PATIENCE_S)
        for i in range(1, 20):
            assert logger.submit_attribution(WHY, request_id=str(i))
            assert logger.flush(PATIENCE_S)
        assert logger.stats().written == 20 and len(spools(tmp_path)) == 20
        moody.mood = "good"
        moody.released.set()
        assert until(lambda: len(spools(tmp_path)) == 0)
    finally:
        moody.released.set()
        assert logger.shutdown(PATIENCE_S)
    found = ids_in(dest)
    assert found == sorted(map(str, range(20)))
    fault_counts.add("store hangs", faults=1, acknowledged=20, checked=len(found))


def test_a_shutdown_does_not_wait_for_a_store_that_hangs_and_the_next_process_publishes(
    tmp_path: Path, moody: type[Moody], fault_counts: FaultCounts
) -> None:
    dest = f"moody://{uuid4().hex}"
    logger = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0, segment_bytes=1)
    try:
        moody.mood = "hangs"
        assert logger.submit_attribution(WHY, request_id="0")
        assert moody.hanging.wait(PATIENCE_S)
        assert logger.submit_attribution(WHY, request_id="1")
        assert not logger.shutdown(0.3)
        stats = logger.stats()
        assert_identity(stats)
        assert stats.written == 2 and stats.in_flight == 0 and len(spools(tmp_path)) == 2
        moody.mood = "good"
        # the first hangs still, and comes back in the middle of what follows
        with AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0) as following:
            assert following.submit_attribution(WHY, request_id="2")
            assert until(lambda: {"0", "1"} <= set(ids_in(dest)))
            moody.released.set()
    finally:
        moody.released.set()
    assert until(lambda: not any(each.name == "fastattr-publisher" for each in threading.enumerate()))
    found = ids_in(dest)
    assert found == ["0", "1", "2"] and spools(tmp_path) == []
    fault_counts.add("store hangs at the end", faults=1, acknowledged=3, checked=len(found))


def test_the_spool_is_bounded_while_the_store_is_away(
    tmp_path: Path, moody: type[Moody], fault_counts: FaultCounts
) -> None:
    dest, bound = f"moody://{uuid4().hex}", 60_000
    logger = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0, segment_bytes=1, spool_bytes=bound)
    try:
        moody.mood = "raises"
        accepted: list[str] = []
        for i in range(40):
            if logger.submit_attribution(WHY, request_id=str(i)):
                accepted.append(str(i))
            assert logger.flush(PATIENCE_S)
        sizes = [path.stat().st_size for path in spools(tmp_path)]
        assert 2 < len(accepted) < 40 and sum(sizes) <= bound + max(sizes)
        assert logger.stats().dropped == {"spool_full": 40 - len(accepted)}
        moody.mood = "good"
        assert until(lambda: len(spools(tmp_path)) == 0)
        assert until(lambda: logger.submit_attribution(WHY, request_id="room again"))
    finally:
        moody.mood = "good"
        assert logger.shutdown(PATIENCE_S)
    stats = logger.stats()
    assert_identity(stats)
    found = ids_in(dest)
    assert found == sorted([*accepted, "room again"])
    fault_counts.add("spool full", faults=1, acknowledged=len(accepted) + 1, checked=len(found), counted=counted(stats))


def test_a_store_that_fails_at_the_start_is_told_and_nothing_is_started(tmp_path: Path, moody: type[Moody]) -> None:
    moody.mood = "raises"
    before = threading.active_count()
    with pytest.raises(SaveError, match="the store is not well"):
        AttributionLogger(f"moody://{uuid4().hex}", spool=str(tmp_path))
    assert threading.active_count() == before


def test_what_a_dead_process_left_is_published_when_the_store_is_back(
    tmp_path: Path, moody: type[Moody], fault_counts: FaultCounts
) -> None:
    """Recovery at the start fails, and is tried again."""
    dest = f"moody://{uuid4().hex}"
    moody.mood = "good"
    dead = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0)
    assert dead.submit_attribution(WHY, request_id="left behind")
    assert dead.flush(PATIENCE_S)
    dead._shut(PATIENCE_S, publish=False)  # as at the end of an interpreter
    assert len(spools(tmp_path)) == 1
    logger = AttributionLogger(dest, spool=str(tmp_path), sample_rate=1.0)
    try:
        moody.mood = "raises"
        assert logger.submit_attribution(WHY, request_id="alive")
        assert logger.flush(PATIENCE_S)
        assert until(lambda: moody.failures >= 1)
        moody.mood = "good"
        assert until(lambda: "left behind" in ids_in(dest))
    finally:
        moody.mood = "good"
        assert logger.shutdown(PATIENCE_S)
    found = ids_in(dest)
    assert found == ["alive", "left behind"]
    fault_counts.add("recovery fails", faults=moody.failures, acknowledged=2, checked=len(found))


def test_an_s3_server_that_is_stopped_and_started_again(
    tmp_path: Path, fault_counts: FaultCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "endpoint_url": f"http://127.0.0.1:{port}",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 5},
    }
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        fsspec.filesystem("s3", **options).mkdir("faults")
        logger = AttributionLogger(
            "s3://faults/attr", spool=str(tmp_path), storage_options=options, sample_rate=1.0, segment_bytes=1
        )
        try:
            assert logger.submit_attribution(WHY, request_id="before")
            assert until(lambda: logger.stats().written == 1 and not spools(tmp_path))
            server.stop()
            for i in range(5):
                assert logger.submit_attribution(WHY, request_id=f"away {i}")
                assert logger.flush(PATIENCE_S)
            assert len(spools(tmp_path)) >= 4
            assert_identity(logger.stats())
            server = ThreadedMotoServer("127.0.0.1", port, verbose=False)  # it has kept what it had
            server.start()
            assert until(lambda: not spools(tmp_path))
        finally:
            assert logger.shutdown(PATIENCE_S)
        assert_identity(logger.stats())
        found = ids_in("s3://faults/attr", storage_options=options)
        assert found == ["away 0", "away 1", "away 2", "away 3", "away 4", "before"]
        fault_counts.add("S3 away", faults=1, acknowledged=6, checked=len(found))
    finally:
        server.stop()
