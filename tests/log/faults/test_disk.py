"""A disk that is full, and folders that are taken away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastattr
from fastattr.log import AttributionLogger
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, assert_whole, counted

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
WHY = make_attribution(pictures=False)

# the soft limit of file sizes stands for the end of the disk: writes come short, then fail
FILLING = """
import json, resource, signal, sys, time
from fastattr.log import AttributionLogger
from tests.engine.samples import make_attribution

def say(**values):
    print(json.dumps(values), flush=True)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
why = make_attribution(pictures=False)
logger = AttributionLogger(sys.argv[1], sample_rate=1.0, sync_s=0.05, queue_bytes=1_500_000, segment_bytes=int(sys.argv[2]), telemetry=False)
n = 0

def submit(count):
    global n
    accepted = []
    for _ in range(count):
        if logger.submit_attribution(why, request_id=str(n)):
            accepted.append(str(n))
        n += 1
    return accepted

before = submit(3)
durable = logger.flush(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
during = []
until = time.monotonic() + 60
while not logger.stats().dropped.get("queue_full", 0) and time.monotonic() < until:
    during += submit(5)
    time.sleep(0.002)
refused = logger.flush(0.5)
full = logger.stats()
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
lifted = logger.flush(60)
after = submit(3)
closed = logger.shutdown(60)
end = logger.stats()
say(before=before, durable=durable, during=during, refused=refused, lifted=lifted, after=after, closed=closed,
    full=vars(full), end=vars(end))
"""


@pytest.mark.parametrize(("segment_bytes", "limit_bytes"), [(1 << 25, 100_000), (1 << 25, 40_000), (30_000, 90_000)])
def test_on_a_full_disk_records_wait_and_are_written_when_there_is_room(
    tmp_path: Path, fault_counts: FaultCounts, segment_bytes: int, limit_bytes: int
) -> None:
    """The spool file reaches the limit; or, with small ones, no segment of several can be written either."""
    dest = tmp_path / "dest"
    done = subprocess.run(
        [sys.executable, "-c", FILLING, str(dest), str(segment_bytes), str(limit_bytes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["durable"] and said["lifted"] and said["closed"]
    for name in ("full", "end"):
        assert_identity(fastattr.log.LogStats(**said[name]))
    full, end = (fastattr.log.LogStats(**said[name]) for name in ("full", "end"))
    accepted = [*said["before"], *said["during"], *said["after"]]
    if segment_bytes > limit_bytes:
        assert not said["refused"] and full.in_flight > 0 and set(full.dropped) == {"queue_full"}
    assert end.in_flight == 0 and not end.failed and end.written == len(accepted)
    assert end.submitted == len(accepted) + counted(end)
    rows = assert_whole(dest)
    assert [row["request_id"] for row in rows] == accepted  # in order, all of them, and nobody else
    fault_counts.check("full disk", dest, set(accepted), faults=1, counted=counted(end))


def test_a_destination_in_the_way_holds_publication_up_and_nothing_else(
    tmp_path: Path, fault_counts: FaultCounts
) -> None:
    """A file where the folder of the day should be: root cannot write there either."""
    dest = tmp_path / "dest"
    logger = AttributionLogger(dest, sample_rate=1.0, segment_bytes=1)
    days = [dest / f"date={time.strftime('%Y-%m-%d', time.gmtime(time.time() + s))}" for s in (0, 86400)]
    for day in days:
        day.write_text("in the way")
    try:
        accepted = [str(i) for i in range(5)]
        for each in accepted:
            assert logger.submit_attribution(WHY, request_id=each)
            assert logger.flush(PATIENCE_S)  # durable all the same
        assert not list(dest.glob("date=*/*.parquet"))
        assert len(list((dest / "spool" / "rooms").glob("*/*.spool"))) == 5
    finally:
        for day in days:
            day.unlink()
        assert logger.shutdown(PATIENCE_S)
    assert_identity(logger.stats())
    assert_whole(dest)
    fault_counts.check("destination in the way", dest, set(accepted), faults=1)


def test_a_spool_that_is_deleted_takes_its_records_with_it_and_logging_goes_on(
    tmp_path: Path, fault_counts: FaultCounts
) -> None:
    """Someone cleans up while the server runs. What was not published is gone; what comes later is not."""
    dest = tmp_path / "dest"
    logger = AttributionLogger(dest, sample_rate=1.0, segment_age_s=0.05)
    try:
        assert logger.submit_attribution(WHY, request_id="gone or published")
        assert logger.flush(PATIENCE_S)
        shutil.rmtree(dest / "spool" / "rooms")
        until_s = time.monotonic() + PATIENCE_S
        later: list[str] = []
        while len(later) < 5 and time.monotonic() < until_s:
            each = f"later {len(later)}"
            assert logger.submit_attribution(WHY, request_id=each)
            assert logger.flush(10.0), logger.stats()
            later.append(each)
            time.sleep(0.06)  # so that each goes into a file of its own
    finally:
        logger.shutdown(10.0)
    assert_identity(logger.stats())
    assert logger.stats().written == 6 and logger.stats().in_flight == 0
    # what lay in the deleted file is gone; it was old enough to be closed when these came
    fault_counts.check("spool deleted", dest, {"later 3", "later 4"}, faults=1)


def test_a_spool_file_that_is_gone_does_not_hold_up_those_behind_it(tmp_path: Path, fault_counts: FaultCounts) -> None:
    dest = tmp_path / "dest"
    logger = AttributionLogger(dest, sample_rate=1.0, segment_bytes=1)
    days = [dest / f"date={time.strftime('%Y-%m-%d', time.gmtime(time.time() + s))}" for s in (0, 86400)]
    for day in days:
        day.write_text("in the way")
    try:
        for each in ("first", "second", "third"):
            assert logger.submit_attribution(WHY, request_id=each)
            assert logger.flush(PATIENCE_S)
        first, *others = sorted((dest / "spool" / "rooms").glob("*/*.spool"))
        assert len(others) == 2
        os.unlink(first)
    finally:
        for day in days:
            day.unlink()
        logger.shutdown(PATIENCE_S)
    assert_identity(logger.stats())
    fault_counts.check("spool file deleted", dest, {"second", "third"}, faults=1)


def test_a_spool_that_refuses_at_the_first_submission_is_tried_at_the_next(
    tmp_path: Path, fault_counts: FaultCounts
) -> None:
    """The disk filled up between the start of the server and its first response."""
    dest = tmp_path / "dest"
    with AttributionLogger(dest, sample_rate=1.0) as logger:
        rooms = dest / "spool" / "rooms"
        rooms.write_text("in the way")
        before = threading.active_count()
        for i in range(5):
            assert not logger.submit_attribution(WHY, request_id=str(i))
        assert threading.active_count() == before
        stats = logger.stats()
        assert sum(stats.dropped.values()) == 5
        assert_identity(stats)
        rooms.unlink()
        assert logger.submit_attribution(WHY, request_id="after")
    assert_identity(logger.stats())
    fault_counts.check("spool in the way", dest, {"after"}, faults=1, counted=5)


def test_an_inbox_that_refuses_is_counted_and_the_next_request_goes_through(
    tmp_path: Path, fault_counts: FaultCounts
) -> None:
    dest = tmp_path / "dest"
    with AttributionLogger(dest, sample_rate=1.0, explain="worker") as logger:
        folder = dest / "spool" / "inbox"
        folder.rmdir()
        folder.write_text("in the way")
        for i in range(3):
            assert logger.submit_replay("What?", None, [1, 2], request_id=str(i))
        assert logger.flush(PATIENCE_S)
        assert sum(logger.stats().failed.values()) == 3
        folder.unlink()
        folder.mkdir()
        assert logger.submit_replay("What?", None, [1, 2], request_id="after")
        assert logger.flush(PATIENCE_S)
    stats = logger.stats()
    assert_identity(stats)
    assert (stats.handed_over, stats.in_flight) == (1, 0)
    waiting = list(folder.glob("*.request"))
    assert len(waiting) == 1
    fault_counts.add("inbox in the way", faults=1, acknowledged=1, checked=len(waiting), counted=counted(stats))
