"""More than can be explained: requests are not held up, and what does not fit is counted."""

from __future__ import annotations

import hashlib
import statistics
import time
from pathlib import Path

import numpy as np

from fastattr.log import AttributionLogger
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, assert_whole, counted

PATIENCE_S = 60.0
N_ROUNDS, N_REQUESTS = 7, 400
WHY = make_attribution(tuple(f" w{i}" for i in range(100)), grids=((1, 16, 16),), pictures=False)
PAYLOAD = bytes(1000)  # short enough that hashing it does not let go of the interpreter


def serve(logger: AttributionLogger | None, period_s: float, name: str, accepted: set[str]) -> float:
    """Requests at a fixed pace, each with a little work of the server's own. Returns ms at the 99th percentile."""
    times_s = []
    due_s = time.perf_counter()
    for i in range(N_REQUESTS):
        due_s += period_s
        time.sleep(max(0.0, due_s - time.perf_counter()))
        began_s = time.perf_counter()
        for _ in range(50):
            hashlib.sha256(PAYLOAD).digest()
        if logger is not None and logger.submit_attribution(WHY, request_id=f"{name} {i}"):
            accepted.add(f"{name} {i}")
        times_s.append(time.perf_counter() - began_s)
    return float(np.percentile(times_s, 99)) * 1e3


def test_ten_times_the_load_holds_no_request_up(tmp_path: Path, fault_counts: FaultCounts) -> None:
    logger = AttributionLogger(tmp_path, sample_rate=1.0, queue_bytes=8_000_000, segment_bytes=1_000_000)
    accepted: set[str] = set()
    try:
        began_s = time.perf_counter()
        for i in range(30):
            assert logger.submit_attribution(WHY, request_id=f"first {i}")
            accepted.add(f"first {i}")
        assert logger.flush(PATIENCE_S)
        period_s = (time.perf_counter() - began_s) / 30 / 10
        without, beside = [], []
        for turn in range(N_ROUNDS):  # in turn, so that whatever else the machine does meets both alike
            assert logger.flush(PATIENCE_S)
            without.append(serve(None, period_s, "", accepted))
            beside.append(serve(logger, period_s, f"{turn}", accepted))
            assert_identity(logger.stats())
    finally:
        assert logger.shutdown(PATIENCE_S)
    stats = logger.stats()
    assert_identity(stats)
    assert stats.submitted == 30 + N_ROUNDS * N_REQUESTS
    assert stats.in_flight == 0 and stats.written == len(accepted)
    assert set(stats.dropped) == {"queue_full"} and not stats.failed  # it was too much, as it should be
    rows = assert_whole(tmp_path)
    assert {row["request_id"] for row in rows} == accepted
    fault_counts.check("10x load", tmp_path, accepted, faults=1, counted=counted(stats))
    added_ms = statistics.median(b - a for a, b in zip(without, beside, strict=True))
    assert added_ms < 1.0, f"p99 without {without}, with {beside} ms"
