"""What is read back is what was written, in the order and choice asked for; SQL reaches nothing else."""

from __future__ import annotations

import json
import logging
import math
import shutil
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from fastattr import Attribution
from fastattr.errors import InputError, SaveError
from fastattr.log import reading
from fastattr.log.reading import Filters
from fastattr.log.record import Envelope
from fastattr.log.schema import SCHEMA
from tests.log.records import NOON, make_record, write_segment

Made = tuple[Attribution, Envelope]
WRITERS = ("a" * 16, "b" * 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Made]]:
    """24 records of two writers and three days, with everything that can be told apart."""
    dest = tmp_path_factory.mktemp("log")
    records = []
    for k in range(24):
        day, writer = k // 8, k % 2
        records.append(
            make_record(
                request_id=f"Request-{k % 20}",  # the last four come back
                seed=k,
                n_tokens=4 + k % 5,
                time=NOON + timedelta(days=day, minutes=7 * k),
                model=("left", "right", "O'Brien; DROP VIEW records --")[k % 3],
                evidence=k % 7 != 6,
                metadata={"k": k},
                error=k % 6 == 5,
                writer=WRITERS[writer],
                sequence=k // 2,
            )
        )
    for day in range(3):
        for writer in range(2):
            part = [records[k] for k in range(24) if k // 8 == day and k % 2 == writer]
            write_segment(dest, part, writer=WRITERS[writer], day=NOON.date() + timedelta(days=day), number=day)
    return dest, records


def mean_evidence(record: Made) -> float | None:
    return None if record[0].evidence is None else float(record[0].evidence.mean())


def ids(records: list[Made]) -> list[str]:
    return [envelope.record_id for _, envelope in records]


def test_read_gives_back_the_same_maps(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    found = list(reading.read(dest))
    assert [record.envelope.record_id for record in found] == ids(records[::-1])  # newest first
    for record, (why, envelope) in zip(found, records[::-1], strict=True):
        assert record.envelope.request_id == envelope.request_id
        assert record.envelope.time == envelope.time
        assert record.envelope.metadata == envelope.metadata
        assert record.attribution.response == why.response
        for kept, given_ in zip(record.attribution.image, why.image, strict=True):
            assert np.array_equal(np.rint(kept.numpy() * 255), np.rint(given_.numpy() * 255))
        if why.evidence is None:
            assert record.attribution.evidence is None
        else:
            assert record.attribution.evidence is not None
            assert np.allclose(record.attribution.evidence, why.evidence)


def test_read_finds_by_id_and_condition(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    log = reading.open_log(dest)
    again = [record.envelope.metadata["k"] for record in reading.read(log, request_id="Request-2")]
    assert again == [22, 2]
    [one] = reading.read(log, record_id=records[5][1].record_id)
    assert one.envelope.metadata == {"k": 5}
    chosen = [
        r.envelope.metadata["k"] for r in reading.read(log, where="error AND n_tokens > 5 -- x", order_by="oldest")
    ]
    assert chosen == [k for k in range(24) if k % 6 == 5 and 4 + k % 5 > 5] and chosen
    assert [r.envelope.metadata["k"] for r in reading.read(log, limit=3)] == [23, 22, 21]
    assert list(reading.read(log, request_id="' OR true --")) == []
    assert list(reading.read(log, request_id="half \ud800 a pair")) == []


def test_lowest_evidence_first(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    found = [record.envelope.record_id for record in reading.read(dest, order_by="lowest_evidence")]
    measured = sorted((r for r in records if r[0].evidence is not None), key=lambda r: mean_evidence(r) or 0.0)
    assert found[: len(measured)] == ids(measured)
    assert set(found[len(measured) :]) == {r[1].record_id for r in records if r[0].evidence is None}


@settings(max_examples=40)
@given(
    model=st.sampled_from([None, "left", "O'Brien; DROP VIEW records --", "nobody"]),
    since=st.none() | st.integers(0, 24),
    until=st.none() | st.integers(0, 24),
    errors_only=st.booleans(),
    search=st.sampled_from([None, "", "request", "T-1", "%", "_"]),
    limit=st.integers(0, 30),
    offset=st.integers(0, 30),
)
def test_summaries_obey_every_filter(
    made: tuple[Path, list[Made]],
    model: str | None,
    since: int | None,
    until: int | None,
    errors_only: bool,
    search: str | None,
    limit: int,
    offset: int,
) -> None:
    dest, records = made
    bound = [None if k is None else NOON + timedelta(days=k // 8, minutes=7 * k) for k in (since, until)]
    kept = [
        envelope
        for why, envelope in records
        if (model is None or why.model == model)
        and (bound[0] is None or envelope.time >= bound[0])
        and (bound[1] is None or envelope.time < bound[1])
        and (envelope.error or not errors_only)
        and (search or "").lower() in envelope.request_id.lower()
    ]
    filters = Filters(model, bound[0], bound[1], errors_only, search)
    log = reading.open_log(dest)
    found = reading.summaries(log, filters, limit=limit, offset=offset)
    assert [each.record_id for each in found] == [e.record_id for e in kept[::-1]][offset : offset + limit]
    assert reading.count(log, filters) == len(kept)


def test_summaries_say_what_the_records_say(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    found = reading.summaries(dest, order_by="oldest")
    assert len(found) == 24
    for summary, (why, envelope) in zip(found, records, strict=True):
        assert (summary.request_id, summary.time, summary.error) == (envelope.request_id, envelope.time, envelope.error)
        assert (summary.model, summary.n_tokens, summary.response) == (why.model, len(why), why.response)
        assert summary.mean_log_prob == pytest.approx(float(why.log_prob.mean()), rel=1e-5)
        if why.evidence is None:
            assert (summary.mean_evidence, summary.min_evidence) == (None, None)
        else:
            assert summary.mean_evidence == pytest.approx(float(why.evidence.mean()), rel=1e-4, abs=1e-5)
            assert summary.min_evidence == pytest.approx(float(why.evidence.min()), rel=1e-5)
    evidence = reading.evidence_of(dest, found[3:9])
    assert set(evidence) == set(ids(records[3:9]))
    for why, envelope in records[3:9]:
        expected = [None] * len(why) if why.evidence is None else pytest.approx(why.evidence.tolist())
        assert list(evidence[envelope.record_id]) == expected
    assert dict(reading.models(dest)) == {"left": 8, "right": 8, "O'Brien; DROP VIEW records --": 8}


@pytest.mark.parametrize("width", [timedelta(minutes=10), timedelta(hours=5), timedelta(days=2)])
def test_trends_are_means_over_time(made: tuple[Path, list[Made]], width: timedelta) -> None:
    dest, records = made
    epoch = datetime(1970, 1, 1, tzinfo=timezone.utc)
    expected: dict[datetime, list[Made]] = {}
    for record in records:
        expected.setdefault(epoch + (record[1].time - epoch) // width * width, []).append(record)
    bins = reading.trend(dest, Filters(), width)
    assert [b.start for b in bins] == sorted(expected)
    for b in bins:
        known = [value for record in expected[b.start] if (value := mean_evidence(record)) is not None]
        assert (b.n, b.n_evidence) == (len(expected[b.start]), len(known))
        assert b.errors == sum(envelope.error for _, envelope in expected[b.start])
        assert b.evidence == (pytest.approx(np.mean(known), abs=1e-5) if known else None)
    assert reading.time_span(dest) == (records[0][1].time, records[-1][1].time)
    assert reading.time_span(dest, Filters(model="nobody")) is None


def test_the_baseline_is_of_the_newest_version(tmp_path: Path) -> None:
    old = [make_record(time=NOON + timedelta(seconds=k), sequence=k, evidence=9.0) for k in range(5)]
    new = [make_record(time=NOON + timedelta(hours=1, seconds=k), sequence=5 + k, evidence=float(k)) for k in range(8)]
    path = write_segment(tmp_path, old + new)
    table = pq.read_table(path)
    revisions = pa.array(["one"] * 5 + [None] * 8, pa.string())
    place = table.schema.get_field_index("model_revision")
    pq.write_table(table.set_column(place, SCHEMA.field("model_revision"), revisions), path)
    first = reading.baseline(tmp_path, "by hand", 6)
    assert (first.revision, first.n, first.evidence) == (None, 6, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0))


# --- SQL -------------------------------------------------------------------------------------------


def test_sql_over_records_and_tokens(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    [row] = reading.query(
        dest, "SELECT count(*) AS n, min(evidence) AS low, max(position) AS last FROM tokens"
    ).to_pylist()
    evidence = np.concatenate([why.evidence for why, _ in records if why.evidence is not None])
    assert row["n"] == sum(len(why) for why, _ in records)
    assert row["low"] == pytest.approx(float(evidence.min()))
    assert row["last"] == max(len(why) for why, _ in records) - 1
    rows = reading.query(
        dest, "SELECT model, count(*) AS n FROM records WHERE error GROUP BY model ORDER BY n"
    ).to_pylist()
    assert {row["model"]: row["n"] for row in rows} == {"O'Brien; DROP VIEW records --": 4}
    [row] = reading.query(
        dest, "SELECT metadata->>'$.k' AS k FROM records WHERE sequence = 3 AND writer LIKE 'b%'"
    ).to_pylist()
    assert row == {"k": "7"}


ESCAPES = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM read_parquet('{segment}')",
    "SELECT * FROM parquet_metadata('{segment}')",
    "SELECT * FROM glob('/*')",
    "COPY (SELECT 1) TO '{folder}/out.csv'",
    "COPY (SELECT 1 AS a) TO '{segment}' (FORMAT parquet)",
    "COPY records FROM '{secret}'",
    "EXPORT DATABASE '{folder}/all'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{folder}/other.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET allowed_directories = ['/']",
    "SET temp_directory = '{folder}'",
    "PRAGMA enable_profiling = 'json'",
    "CREATE PERSISTENT SECRET s (TYPE http)",
    "SELECT 1; SET lock_configuration = false; SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM log",  # a Python variable of the caller
    "SELECT * FROM secret",
    "DELETE FROM records",
    "SELEC",
]


@pytest.mark.parametrize("sql", ESCAPES)
def test_sql_reaches_nothing_but_the_records(tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nhidden\n")
    dest = tmp_path / "log"
    segment = write_segment(dest, [make_record()])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="the query cannot be answered"):
        reading.query(dest, sql.format(secret=secret, segment=segment, folder=tmp_path))
    with pytest.raises(InputError, match="the query cannot be answered"):
        reading.read(dest, where=f"true); {sql.format(secret=secret, segment=segment, folder=tmp_path)}; --")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- files that are not segments -------------------------------------------------------------------


def test_a_broken_file_is_named_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_segment(tmp_path, [make_record(request_id="good")])
    folder = good.parent
    whole = good.read_bytes()
    (folder / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "noise.parquet").write_bytes(bytes(range(256)) * 20)
    pq.write_table(pa.table({"x": [1]}), folder / "foreign.parquet")
    newer = pq.read_table(good).replace_schema_metadata({"fastattr.schema_version": "999"})
    pq.write_table(newer, folder / "newer.parquet")
    fewer = pq.read_table(good).drop_columns(["maps"])
    pq.write_table(fewer, folder / "fewer.parquet")
    (folder / "a folder.parquet").mkdir()
    (folder / ".half-written.parquet").write_bytes(whole[:100])  # a writer's own, not to be complained about
    (tmp_path / "date=2026-01-01").mkdir()
    (tmp_path / "writers").mkdir()
    with caplog.at_level(logging.WARNING, "fastattr"):
        log = reading.open_log(tmp_path)
    broken = {"torn", "empty", "noise", "foreign", "newer", "fewer"}
    assert log.segments == (str(good),)
    assert {Path(each.path).stem for each in log.damaged} == broken
    assert {Path(each.path).stem: each.reason for each in log.damaged}["newer"].startswith(
        "schema version 999, this fastattr"
    )
    assert [record.envelope.request_id for record in reading.read(log)] == ["good"]
    assert len(caplog.records) == len(broken)
    with caplog.at_level(logging.WARNING, "fastattr"):
        assert len(reading.open_log(tmp_path).damaged) == len(broken)
    assert len(caplog.records) == len(broken)  # each is said once, and remembered
    (folder / "torn.parquet").write_bytes(whole)  # a new version of a file is looked at again
    assert len(reading.open_log(tmp_path).damaged) == len(broken) - 1


def test_damage_behind_a_sound_footer_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = write_segment(tmp_path, [make_record(n_tokens=40)])
    data = bytearray(path.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little")
    data[4 : -8 - footer] = bytes(len(data) - 12 - footer)
    path.write_bytes(data)
    log = reading.open_log(tmp_path)
    assert log.damaged == ()
    with pytest.raises(SaveError, match="fastattr log doctor names the damaged segment"):
        list(reading.read(log))
    with pytest.raises(SaveError, match="fastattr log doctor names the damaged segment"):
        reading.query(log, "SELECT max(evidence) FROM tokens")
    with pytest.raises(SaveError, match="fastattr log doctor names the damaged segment"):
        reading.export(log, tmp_path / "x.parquet", "parquet")


def test_an_empty_destination_reads_as_nothing(tmp_path: Path) -> None:
    assert list(reading.read(tmp_path)) == []
    assert reading.summaries(tmp_path) == []
    assert reading.query(tmp_path, "SELECT * FROM tokens").num_rows == 0
    assert reading.time_span(tmp_path) is None
    assert reading.tallies(tmp_path) == ((), ())
    assert reading.export(tmp_path, tmp_path / "x.parquet", "parquet") == 0
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0


def test_a_segment_that_expires_meanwhile_is_no_error(tmp_path: Path) -> None:
    gone = write_segment(tmp_path, [make_record(sequence=0)], number=0)
    write_segment(tmp_path, [make_record(sequence=1)], number=1)
    opened = reading.open_log(tmp_path)
    gone.unlink()
    with pytest.raises(SaveError):  # this view held it
        list(reading.read(opened))
    assert [record.envelope.sequence for record in reading.read(tmp_path)] == [1]


@pytest.mark.parametrize("name", ["it's 100% [odd] *", "ümläut ☃", "a#b?c=d&e", "s3::memory:x"])
def test_destinations_of_any_name(tmp_path: Path, name: str) -> None:
    write_segment(tmp_path / name, [make_record()])
    assert reading.count(tmp_path / name) == 1
    assert len(list(reading.read(str(tmp_path / name)))) == 1


def test_a_store_of_another_kind_reads_alike(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    store = fsspec.filesystem("memory")
    for path in dest.rglob("*.parquet"):
        store.pipe_file(f"/bucket/log/{path.relative_to(dest)}", path.read_bytes())
    store.pipe_file("/bucket/log/date=2026-11-22/torn.parquet", b"PAR1")
    store.pipe_file("/bucket/log/elsewhere/date=2026-11-22/x.parquet", b"not looked at")
    try:
        log = reading.open_log("memory://bucket/log")
        assert len(log.segments) == 6 and len(log.damaged) == 1
        assert [r.envelope.record_id for r in reading.read(log, order_by="oldest")] == ids(records)
        assert reading.query("memory://bucket/log", "SELECT count(*) AS n FROM records").to_pylist() == [{"n": 24}]
    finally:
        store.rm("/bucket", recursive=True)


def test_an_object_store_reads_alike(made: tuple[Path, list[Made]]) -> None:
    dest, records = made
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {
            "key": "made",
            "secret": "up",
            "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-west-1"},
        }
        store = fsspec.filesystem("s3", **options)
        store.mkdir("reading")
        paths = sorted(dest.rglob("*.parquet"))
        for path in paths[:-1]:
            store.pipe_file(f"reading/log/{path.relative_to(dest)}", path.read_bytes())
        store.pipe_file("reading/log/writers/torn.json", b"{")
        assert reading.open_log("s3://reading/log", options).segments == tuple(
            f"reading/log/{path.relative_to(dest)}" for path in paths[:-1]
        )
        elsewhere = fsspec.filesystem("s3", **options, skip_instance_cache=True)  # as another process publishes
        elsewhere.pipe_file(f"reading/log/{paths[-1].relative_to(dest)}", paths[-1].read_bytes())
        found = reading.read("s3://reading/log", order_by="oldest", storage_options=options)
        assert [record.envelope.record_id for record in found] == ids(records)
        assert len(reading.tallies("s3://reading/log", options)[1]) == 1
        with pytest.raises(SaveError, match="cannot be listed"):
            reading.open_log("s3://missing/log", options)
    finally:
        server.stop()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="is not a directory"):
        reading.open_log(tmp_path / "missing")
    with pytest.raises(InputError, match="give a directory, or the URL"):
        reading.open_log("nosuch://x")
    with pytest.raises(InputError, match="order_by is 'random'"):
        reading.read(tmp_path, order_by="random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit is -1"):
        reading.read(tmp_path, limit=-1)
    with pytest.raises(InputError, match="has no time zone"):
        Filters(since=datetime(2026, 1, 1))
    with pytest.raises(InputError, match="format is 'csv'"):
        reading.export(tmp_path, tmp_path / "x", "csv")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width is"):
        reading.trend(tmp_path, Filters(), timedelta(0))


# --- tallies and exports ---------------------------------------------------------------------------


def test_tallies(tmp_path: Path) -> None:
    folder = tmp_path / "writers"
    folder.mkdir()
    told = {
        "writer": "w", "pid": 3, "host": "h", "started": "2026-11-22T10:00:00+00:00", "updated": "2026-11-22T11:00:00Z",
        "closed": True, "submitted": 10, "written": 5, "dropped": {"queue_full": 3}, "failed": {"StatesError": 2},
        "in_flight": 0, "damaged_frames": 0,
    }  # fmt: skip
    (folder / "w.json").write_text(json.dumps(told))
    (folder / "v.json").write_text(json.dumps({**told, "writer": "v", "started": "2026-11-22T09:00:00+00:00"}))
    (folder / "torn.json").write_text('{"writer": ')
    (folder / "list.json").write_text("[1]")
    (folder / "bytes.json").write_bytes(b"\xff\xfe")
    read, damaged = reading.tallies(tmp_path)
    assert [tally.writer for tally in read] == ["v", "w"]
    assert read[1].dropped == {"queue_full": 3} and read[1].updated.hour == 11
    assert {Path(each.path).name for each in damaged} == {"torn.json", "list.json", "bytes.json"}


def test_export_jsonl(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    dest, records = made
    out = tmp_path / "x.jsonl"
    assert reading.export(dest, out, where="NOT error") == 20
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]
    assert [row["record_id"] for row in rows] == [e.record_id for _, e in records if not e.error]
    assert all("maps" not in row and "images" not in row for row in rows)
    assert [len(row["tokens"]) for row in rows] == [len(why) for why, e in records if not e.error]
    assert datetime.fromisoformat(rows[0]["time"]) == records[0][1].time


def test_export_jsonl_has_no_nan(tmp_path: Path) -> None:
    write_segment(tmp_path, [make_record(evidence=math.nan)])
    reading.export(tmp_path, tmp_path / "x.jsonl")
    [row] = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert row["tokens"][0]["evidence"] is None


def test_export_parquet_is_a_segment_again(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    dest, records = made
    day = tmp_path / "date=2026-11-22"
    day.mkdir()
    assert reading.export(dest, day / "all.parquet", "parquet") == 24
    log = reading.open_log(tmp_path)
    assert log.damaged == ()
    assert [r.envelope.record_id for r in reading.read(log, order_by="oldest")] == ids(records)
    assert pq.read_schema(day / "all.parquet").equals(SCHEMA)


def test_export_html_never_names_files_by_what_a_file_says(tmp_path: Path) -> None:
    path = write_segment(tmp_path / "log", [make_record(request_id="../../up"), make_record(sequence=1)])
    table = pq.read_table(path)
    hostile = pa.array(["../../escaped", "fine-1"], pa.string())
    pq.write_table(table.set_column(0, SCHEMA.field("record_id"), hostile), path)
    out = tmp_path / "deep" / "reports"
    assert reading.export(tmp_path / "log", out, "html") == 2
    names = sorted(path.name for path in out.iterdir())
    assert "fine-1.html" in names and len(names) == 2
    assert all("<html" in (out / name).read_text() for name in names)
    shutil.rmtree(tmp_path / "log")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == names


def test_an_export_that_cannot_be_written_leaves_nothing(made: tuple[Path, list[Made]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError):
        reading.export(made[0], tmp_path / "file" / "x.jsonl")
    with pytest.raises(SaveError):
        reading.export(made[0], tmp_path / "file", "html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_days_are_as_given(made: tuple[Path, list[Made]]) -> None:
    """The oracle of this module: its segments lie where the logger would put them."""
    assert {path.name for path in made[0].iterdir()} == {f"date={date(2026, 11, 22 + i).isoformat()}" for i in range(3)}
