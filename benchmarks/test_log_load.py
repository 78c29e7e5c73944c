"""The load of the log is measured on what it says, small."""

from __future__ import annotations

from benchmarks.log_load import capture_overhead, made_attribution, measure, records_rate, submit_latency
from benchmarks.log_report import faults_table, log_table
from benchmarks.record import machine


def test_every_submission_is_counted() -> None:
    for burst in (1, 8):
        row = submit_latency(16, burst)
        dropped = row.get("dropped", {})
        assert row["submitted"] == 16 == row["written"] + sum(dropped.values())
        assert set(dropped) <= {"queue_full"}
        assert 0 < row["submit_p50_us"] <= row["submit_p99_us"] <= row["submit_p999_us"]


def test_all_records_are_written_and_of_the_size_they_say() -> None:
    row = records_rate(20)
    assert (row["submitted"], row["written"]) == (20, 20)
    assert row["durable_per_s"] >= row["published_per_s"] > 0
    assert 10_000 < row["bytes_per_record"] < 200 * 24 * 24 + 100_000
    why = made_attribution()
    assert why.image[0].shape == (200, 1, 24, 24) and why.context.shape == (200, 300)
    assert float(why.image[0].min()) >= 0 and float(why.image[0].max()) <= 1
    assert len({float(each.sum()) for each in why.image[0]}) == 200  # no two tokens' maps alike


def test_capture_is_compared_with_the_same_generation() -> None:
    row = capture_overhead(2)
    assert row["generate_ms"] > 0 and 0.5 < row["over_generate"] < 2


def test_the_table_names_every_goal() -> None:
    rows = measure(n_submit=4, n_records=4, runs=2, block=2, processes=False)
    assert [row["case"] for row in rows] == ["submit", "submit", "records", "capture", "server"]
    text = log_table(machine("x"), rows)
    for goal in ("20 us", "200 us", "200 a second", "3%"):
        assert f"| {goal} |" in text


def test_faults_are_summed() -> None:
    rows = [
        {"kind": "a", "faults": 2, "acknowledged": 10, "checked": 9, "lost": 1, "duplicates": 0, "counted": 4},
        {"kind": "b", "faults": 3, "acknowledged": 1, "checked": 1, "lost": 0, "duplicates": 2, "counted": 0},
    ]
    assert faults_table({}, rows).splitlines()[-1] == "| all | 5 | 11 | 10 | 1 | 2 | 4 |"
