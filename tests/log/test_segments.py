"""Spool files become segments in one step, on disks and in stores; when that fails, nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from fastattr import InputError, SaveError
from fastattr.log.record import to_batch
from fastattr.log.rooms import open_room
from fastattr.log.schema import SCHEMA
from fastattr.log.segments import Destination, Recovered, open_destination, recover
from fastattr.log.spool import SpoolWriter, spool_name
from tests.log.records import make_record

# newer Pythons warn of every fork beside threads; these children do little and leave by os._exit
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

DAY = date(2026, 11, 22)
WRITER = "0123456789abcdef"
KEYS = {"key": "made", "secret": "up"}
IMPATIENT = {"connect_timeout": 0.2, "read_timeout": 0.2, "retries": {"max_attempts": 0}}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a store that speaks S3, with a bucket called `bucket`."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="made", aws_secret_access_key="up", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bucket")
    client.close()
    yield address
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Destination:
    if request.param == "folder":
        return open_destination(tmp_path / "dest")
    if request.param == "file":
        return open_destination(f"file://{tmp_path}/dest")
    if request.param == "memory":
        return open_destination(f"memory://{uuid.uuid4().hex}/attr")
    return open_destination(f"s3://bucket/{uuid.uuid4().hex}", options(request.getfixturevalue("s3")))


def options(address: str) -> dict[str, Any]:
    return {**KEYS, "endpoint_url": address, "config_kwargs": IMPATIENT}


def fill(folder: Path, *, n: int = 3, number: int = 0, first: int = 0, day: date = DAY, writer: str = WRITER) -> Path:
    """A closed spool file of `n` records."""
    path = folder / spool_name(day, number)
    folder.mkdir(parents=True, exist_ok=True)
    with SpoolWriter(path) as spool:
        for sequence in range(first, first + n):
            why, envelope = make_record(seed=sequence, sequence=sequence, writer=writer)
            spool.append([to_batch(why, envelope, "ids")])
        spool.sync()
    return path


def table_of(destination: Destination, path: str) -> pa.Table:
    """What a stranger reads there."""
    if "://" not in path:
        return pq.read_table(path, partitioning=None)
    with fsspec.open(path, "rb", **getattr(destination._store, "options", {})) as file:
        return pq.read_table(file)


def ids(*sequences: int, writer: str = WRITER) -> list[str]:
    return [make_record(sequence=sequence, writer=writer)[1].record_id for sequence in sequences]


def test_a_spool_file_becomes_a_segment(destination: Destination, tmp_path: Path) -> None:
    destination.check()
    assert destination.segments() == []
    spool = fill(tmp_path / "room")
    published = destination.publish(spool, WRITER)
    assert not spool.exists()
    assert (published.n_rows, published.damaged_frames) == (3, 0)
    (segment,) = destination.segments()
    assert published.path == segment.path
    assert segment.path.endswith(f"/date=2026-11-22/{WRITER}-000000.parquet")
    assert (segment.day, segment.writer, segment.number) == (DAY, WRITER, 0)
    table = table_of(destination, segment.path)
    assert table.schema.equals(SCHEMA) and table.schema.metadata == SCHEMA.metadata
    assert all(field.metadata[b"meaning"] for field in table.schema)
    assert table.column("record_id").to_pylist() == ids(0, 1, 2)
    assert destination.record_ids(WRITER) == set(ids(0, 1, 2))
    assert destination.record_ids("another") == set()


def test_publishing_twice_replaces_a_segment_by_itself(destination: Destination, tmp_path: Path) -> None:
    first = destination.publish(fill(tmp_path / "room"), WRITER)
    again = destination.publish(fill(tmp_path / "room"), WRITER)  # a crash left the spool file behind
    assert first == again
    (segment,) = destination.segments()
    assert table_of(destination, segment.path).num_rows == 3


def test_tallies_are_replaced(destination: Destination) -> None:
    destination.write_tally(WRITER, {"writer": WRITER, "written": 1})
    destination.write_tally(WRITER, {"writer": WRITER, "written": 2})
    path = f"{destination.url}/writers/{WRITER}.json"
    with fsspec.open(path, "rb", **getattr(destination._store, "options", {})) as file:
        assert json.loads(file.read()) == {"writer": WRITER, "written": 2}


def test_segments_are_sorted_and_expire_by_day(destination: Destination, tmp_path: Path) -> None:
    today = date(2026, 11, 22)
    days = [date(2027, 1, 1), date(2026, 11, 22), date(2026, 11, 15), date(2026, 11, 14), date(2025, 11, 22)]
    for number, day in enumerate(days):
        destination.publish(fill(tmp_path / "room", n=1, number=number, day=day), WRITER)
    destination.write_tally(WRITER, {})
    assert [segment.day for segment in destination.segments()] == sorted(days)
    assert destination.expire(7, today) == 2
    assert [segment.day for segment in destination.segments()] == [days[2], days[1], days[0]]
    assert destination.expire(7, today) == 0
    destination.check()


@pytest.mark.parametrize("days", [0, -1, True, 1.5, "7"])
def test_only_whole_days_expire(tmp_path: Path, days: Any) -> None:
    with pytest.raises(InputError, match="whole number"):
        open_destination(tmp_path).expire(days, DAY)


def test_nothing_of_others_is_listed_or_deleted(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    destination = open_destination(dest)
    destination.publish(fill(tmp_path / "room", day=date(2020, 1, 1)), WRITER)
    old = dest / "date=2020-01-01"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    strangers = [
        old / "notes.txt",
        old / f".{WRITER}-000007.parquet.tmp",
        dest / "date=2020-02-31" / f"{WRITER}-000000.parquet",
        dest / "date=old" / f"{WRITER}-000000.parquet",
        dest / "2020-01-01" / f"{WRITER}-000000.parquet",
        dest / "date=2020-01-02",
        elsewhere / f"{WRITER}-000000.parquet",
    ]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    (dest / "date=2020-01-03").symlink_to(elsewhere)
    assert [segment.number for segment in destination.segments()] == [0]
    assert destination.expire(1, DAY) == 1
    assert all(path.read_bytes() == b"mine" for path in strangers)
    assert sorted(os.listdir(old)) == [f".{WRITER}-000007.parquet.tmp", "notes.txt"]


def test_an_expired_day_leaves_no_folder(tmp_path: Path) -> None:
    destination = open_destination(tmp_path / "dest")
    destination.publish(fill(tmp_path / "room", day=date(2020, 1, 1)), WRITER)
    destination.expire(1, DAY)
    assert os.listdir(tmp_path / "dest") == []


def test_one_record_is_read_without_the_others(tmp_path: Path) -> None:
    published = open_destination(tmp_path / "dest").publish(fill(tmp_path / "room", n=130), WRITER)
    assert published.path is not None
    with pq.ParquetFile(published.path) as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        codecs = {file.metadata.row_group(0).column(i).compression for i in range(file.metadata.num_columns)}
    assert groups == [64, 64, 2]
    assert codecs == {"ZSTD"}


def test_an_empty_or_torn_spool_file_publishes_what_is_whole(destination: Destination, tmp_path: Path) -> None:
    empty = fill(tmp_path / "room", n=0)
    assert destination.publish(empty, WRITER).path is None
    assert not empty.exists()
    torn = fill(tmp_path / "room", number=1)
    torn.write_bytes(torn.read_bytes()[:-1])
    assert destination.publish(torn, WRITER).n_rows == 2
    assert not torn.exists()
    assert destination.record_ids(WRITER) == set(ids(0, 1))


def test_a_damaged_spool_file_is_kept(tmp_path: Path) -> None:
    destination = open_destination(tmp_path / "dest")
    spool = fill(tmp_path / "room")
    content = bytearray(spool.read_bytes())
    content[len(content) // 2] ^= 1  # in the second of three
    spool.write_bytes(content)
    published = destination.publish(spool, WRITER)
    assert (published.n_rows, published.damaged_frames) == (2, 1)
    assert destination.record_ids(WRITER) == set(ids(0, 2))
    assert not spool.exists()
    assert spool.with_name(spool.name + ".damaged").read_bytes() == content


def test_other_files_are_not_published(tmp_path: Path) -> None:
    destination = open_destination(tmp_path / "dest")
    (tmp_path / "x.txt").write_bytes(b"")
    with pytest.raises(InputError, match="not named like a spool file"):
        destination.publish(tmp_path / "x.txt", WRITER)
    with pytest.raises(SaveError, match="cannot be read"):
        destination.publish(tmp_path / spool_name(DAY, 0), WRITER)


def test_a_destination_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    destination = open_destination(tmp_path / "file" / "dest")
    spool = fill(tmp_path / "room")
    before = spool.read_bytes()
    for act in failing_acts(destination, spool):
        with pytest.raises(SaveError, match="file"):
            act()
    assert spool.read_bytes() == before


@pytest.mark.parametrize(
    ("url", "storage_options", "said"),
    [
        ("", None, "empty"),
        ("nonsense://bucket", None, "nonsense"),
        ("runs", {"key": "x"}, "takes no storage_options"),
    ],
)
def test_bad_addresses_are_refused(url: str, storage_options: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_destination(url, storage_options)


def test_secrets_are_not_shown(s3: str) -> None:
    destination = open_destination("s3://missing/x", {**options(s3), "secret": "hunter2"})
    with pytest.raises(SaveError) as caught:
        destination.check()
    assert "hunter2" not in f"{destination!r} {caught.value}"


def test_a_bucket_that_is_not_there_is_found_at_once(s3: str) -> None:
    with pytest.raises(SaveError, match=r"cannot be written.*bucket.*check the address"):
        open_destination("s3://missing/x", options(s3)).check()


def test_a_store_that_fails_or_hangs_costs_nothing(tmp_path: Path) -> None:
    spool = fill(tmp_path / "room")
    before = spool.read_bytes()
    for server, timeout_s, said in (
        (failing_server, 60.0, "Internal Server Error"),
        (silent_server, 0.5, "no answer within 0.5 s"),
    ):
        with server() as address:
            destination = open_destination("s3://bucket/x", options(address), timeout_s=timeout_s)
            for act in failing_acts(destination, spool):
                with pytest.raises(SaveError, match=f"{said}.*check the address"):
                    act()  # by itself the silent one would take for ever
    assert spool.read_bytes() == before


def test_a_full_disk_leaves_no_piece_of_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = open_destination(tmp_path / "dest")
    spool = fill(tmp_path / "room")
    destination.publish(fill(tmp_path / "other", number=1), WRITER)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, _fails)
            with pytest.raises(SaveError, match=r"No space left.*make room"):
                destination.publish(spool, WRITER)
        assert os.listdir(tmp_path / "dest" / "date=2026-11-22") == [f"{WRITER}-000001.parquet"]
        assert spool.exists()
    destination.publish(spool, WRITER)
    assert len(destination.segments()) == 2


@pytest.mark.parametrize("step", range(11))
def test_a_kill_between_any_two_steps_loses_and_doubles_nothing(tmp_path: Path, step: int) -> None:
    """Kill the publication before its `step`-th system call that changes something, then recover."""
    dest, spool = tmp_path / "dest", tmp_path / "spool"
    child = os.fork()
    if child == 0:
        room = open_room(spool, WRITER)
        path = fill(room.path)
        left = iter(range(step))

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        open_destination(dest).publish(path, WRITER)
        room.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if step < 10 else 0)
    destination = open_destination(dest)
    early = [table_of(destination, segment.path) for segment in destination.segments()]  # whole at any time
    assert all(table.column("record_id").to_pylist() == ids(0, 1, 2) for table in early)
    recover(spool, destination)
    (segment,) = destination.segments()
    assert table_of(destination, segment.path).column("record_id").to_pylist() == ids(0, 1, 2)
    assert list((spool / "rooms").iterdir()) == []
    assert os.listdir(dest / "date=2026-11-22") == [f"{WRITER}-000000.parquet"]


def test_recovery_publishes_what_the_dead_left(destination: Destination, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    for writer, files in (("a", 2), ("b", 0), ("c", 1)):
        folder = spool / "rooms" / writer
        folder.mkdir(parents=True)
        for number in range(files):
            fill(folder, n=2, number=number, first=2 * number, writer=writer)
    (spool / "inbox").mkdir()
    with open_room(spool, "live") as live:
        kept = fill(live.path)
        assert recover(spool, destination) == Recovered(rooms=3, segments=3, rows=6, damaged_frames=0)
        assert kept.exists()
        assert os.listdir(spool / "rooms") == ["live"]
        assert (spool / "inbox").is_dir()
        assert destination.record_ids("a") == set(ids(0, 1, 2, 3, writer="a"))
        assert recover(spool, destination) == Recovered(0, 0, 0, 0)


def test_recovery_deletes_nothing_that_is_not_published(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    files = [fill(spool / "rooms" / writer) for writer in ("a", "b")]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SaveError):
        recover(spool, open_destination(tmp_path / "file"))
    assert all(path.exists() for path in files)
    assert recover(spool, open_destination(tmp_path / "dest")).rows == 6


def test_two_recoveries_at_once_share_the_work(tmp_path: Path) -> None:
    spool, destination = tmp_path / "spool", open_destination(tmp_path / "dest")
    for i in range(6):
        fill(spool / "rooms" / f"w{i}", writer=f"w{i}")
    found: list[Recovered] = []
    threads = [threading.Thread(target=lambda: found.append(recover(spool, destination))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = [sum(values) for values in zip(*map(dataclasses.astuple, found), strict=True)]
    assert total[1:] == [6, 18, 0]
    assert len(destination.segments()) == 6
    assert list((spool / "rooms").iterdir()) == []


def test_a_thread_that_was_given_up_cannot_tear_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One publication hangs with half a file; the same spool is published from elsewhere; then the first goes on."""
    destination, sync = open_destination(tmp_path / "dest"), os.fsync
    spool = fill(tmp_path / "room")
    copy = fill(tmp_path / "copy")
    destination.write_tally("x", {})
    hangs, goes_on = threading.Event(), threading.Event()
    caught: list[SaveError] = []

    def slow(handle: int) -> None:
        if threading.current_thread() is thread and not hangs.is_set():
            hangs.set()
            goes_on.wait(30)
        sync(handle)

    def publish() -> None:
        try:
            destination.publish(copy, WRITER)
        except SaveError as error:
            caught.append(error)

    thread = threading.Thread(target=publish)
    monkeypatch.setattr(os, "fsync", slow)
    thread.start()
    assert hangs.wait(30)
    destination.publish(spool, WRITER)
    goes_on.set()
    thread.join()
    (segment,) = destination.segments()
    assert table_of(destination, segment.path).num_rows == 3
    assert os.listdir(Path(segment.path).parent) == [Path(segment.path).name]


def failing_acts(destination: Destination, spool: Path) -> list[Callable[[], object]]:
    return [destination.check, lambda: destination.publish(spool, WRITER), lambda: destination.write_tally(WRITER, {})]


@contextmanager
def failing_server() -> Iterator[str]:
    """Answers 500 to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _fails(*_: object) -> None:
    raise OSError(28, "No space left on device")
