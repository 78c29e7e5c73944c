"""The spool gives back what was written and whole, and nothing else, whatever happened to its bytes."""

from __future__ import annotations

import os
import resource
import signal
import zlib
from datetime import date
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattr import SaveError
from fastattr.log.record import to_batch
from fastattr.log.schema import SCHEMA
from fastattr.log.spool import SpoolWriter, make_folder, parse_spool_name, read_spool, spool_name
from tests.log.records import make_record

# newer Pythons warn of every fork beside threads; these children do little and leave by os._exit
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

HEADER = 24


@cache
def batches() -> tuple[pa.RecordBatch, ...]:
    """Records that differ in size and in every id."""
    records = [make_record(seed=i, n_tokens=1 + i % 3, sequence=i, grids=((1, 2, 2),)) for i in range(6)]
    return tuple(to_batch(why, envelope, "ids") for why, envelope in records)


@cache
def written(folder: Path) -> tuple[bytes, tuple[int, ...]]:
    """The bytes of a spool of one frame a record, and where each frame ends."""
    path = folder / "20260101-000000.spool"
    ends = []
    with SpoolWriter(path) as spool:
        for batch in batches():
            spool.append([batch])
            ends.append(spool.n_bytes)
    return path.read_bytes(), tuple(ends)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spool")


def test_batches_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.spool"
    with SpoolWriter(path) as spool:
        spool.append(batches()[:4])
        spool.append([])
        spool.append(batches()[4:])
        spool.sync()
        assert (spool.n_rows, spool.n_bytes) == (6, path.stat().st_size)
    read = read_spool(path)
    assert [batch.num_rows for batch in read.batches] == [4, 2]
    assert (read.damaged_frames, read.torn_bytes) == (0, 0)
    assert pa.Table.from_batches(read.batches).equals(pa.Table.from_batches(batches()))
    assert all(batch.schema.equals(SCHEMA, check_metadata=True) for batch in read.batches)


def test_frames_are_laid_out_as_described(folder: Path) -> None:
    data, ends = written(folder)
    start = 0
    for end, batch in zip(ends, batches(), strict=True):
        assert data[start : start + 8] == b"FATTR\x00\x00\x01"
        length, checksum, own = (
            int.from_bytes(data[start + a : start + b], "little") for a, b in ((8, 16), (16, 20), (20, 24))
        )
        payload = data[start + HEADER : start + HEADER + length]
        assert start + HEADER + length == end
        assert checksum == zlib.crc32(payload)
        assert own == zlib.crc32(data[start : start + 20])
        with pa.ipc.open_stream(payload) as stream:  # readable without the frames before it
            assert stream.read_all().to_batches()[0].equals(batch)
        start = end


@settings(max_examples=300)
@given(st.data())
def test_a_torn_tail_costs_the_last_frame_alone(folder: Path, data: st.DataObject) -> None:
    content, ends = written(folder)
    cut = data.draw(st.integers(0, len(content)))
    path = folder / "torn.spool"
    path.write_bytes(content[:cut])
    read = read_spool(path)
    complete = sum(end <= cut for end in ends)
    assert [batch.equals(given) for batch, given in zip(read.batches, batches()[:complete], strict=True)] == [
        True
    ] * complete
    assert read.damaged_frames == 0
    assert read.torn_bytes == cut - (0, *ends)[complete]


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_never_raise_and_invent_nothing(folder: Path, data: st.DataObject) -> None:
    content, ends = written(folder)
    spoiled, hit = bytearray(content), set[int]()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        hit.add(sum(end <= at for end in ends))
        spoiled[at] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / "flipped.spool"
    path.write_bytes(spoiled)
    read = read_spool(path)
    # flips move nothing: exactly the frames that were hit are missing (two flips may undo each other)
    found = [i for i, batch in enumerate(batches()) for each in read.batches if each.equals(batch)]
    assert len(read.batches) == len(found) == len(set(found))
    if bytes(spoiled) != content:
        assert set(range(len(ends))) - set(found) <= hit
        assert read.damaged_frames > 0 or read.torn_bytes > 0


@settings(max_examples=300)
@given(st.data())
def test_missing_and_foreign_bytes_never_raise_and_invent_nothing(folder: Path, data: st.DataObject) -> None:
    content, ends = written(folder)
    at = data.draw(st.integers(0, len(content)))
    if data.draw(st.booleans()):
        gone = data.draw(st.integers(1, 3 * HEADER))
        spoiled, last = content[:at] + content[at + gone :], at + gone
    else:
        more = data.draw(
            st.binary(min_size=1, max_size=64) | st.just(content[:HEADER]) | st.just(content[: ends[0] // 2])
        )
        spoiled, last = content[:at] + more + content[at:], at
    path = folder / "moved.spool"
    path.write_bytes(spoiled)
    found = []
    for each in read_spool(path).batches:
        (match,) = [i for i, batch in enumerate(batches()) if each.equals(batch)]
        found.append(match)
    assert found == sorted(set(found))
    untouched = {i for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)) if end <= at or start >= last}
    assert untouched <= set(found)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read(folder: Path, data: bytes, framed: bool) -> None:
    path = folder / "any.spool"
    header = b"FATTR\x00\x00\x01" + len(data).to_bytes(8, "little") + zlib.crc32(data).to_bytes(4, "little")
    path.write_bytes(header + zlib.crc32(header).to_bytes(4, "little") + data if framed else data)
    read = read_spool(path)
    assert read.batches == ()
    assert bool(read.damaged_frames or read.torn_bytes) == bool(framed or data)


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    header = b"FATTR\x00\x00\x01" + (1 << 62).to_bytes(8, "little") + bytes(4)
    path = tmp_path / "x.spool"
    path.write_bytes(header + zlib.crc32(header).to_bytes(4, "little") + b"short")
    assert read_spool(path).torn_bytes == HEADER + 5


def test_room_that_was_never_written_is_a_torn_tail(tmp_path: Path, folder: Path) -> None:
    content, ends = written(folder)
    path = tmp_path / "x.spool"
    path.write_bytes(content[: ends[1]] + bytes(4096))
    read = read_spool(path)
    assert (len(read.batches), read.damaged_frames, read.torn_bytes) == (2, 0, 4096)


@pytest.mark.parametrize("version", ["0", "1", "3"])
def test_frames_of_another_schema_version_are_damaged(tmp_path: Path, version: str) -> None:
    other = batches()[0].replace_schema_metadata({"fastattr.schema_version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, other.schema) as stream:
        stream.write_batch(other)
    payload = sink.getvalue().to_pybytes()
    header = b"FATTR\x00\x00\x01" + len(payload).to_bytes(8, "little") + zlib.crc32(payload).to_bytes(4, "little")
    path = tmp_path / "x.spool"
    path.write_bytes(header + zlib.crc32(header).to_bytes(4, "little") + payload)
    read = read_spool(path)
    assert (read.batches, read.damaged_frames) == ((), 1)


def test_a_full_disk_takes_nothing_that_was_there(tmp_path: Path, folder: Path) -> None:
    # a child, since the limit cannot be raised again by everyone
    _, ends = written(folder)
    path = tmp_path / "x.spool"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (ends[0] + 1000, hard))
            with SpoolWriter(path) as spool:
                spool.append([batches()[0]])
                try:
                    spool.append([batches()[1]])
                except SaveError as error:
                    said = "make room on the disk" in str(error)
                cut = path.stat().st_size == spool.n_bytes == ends[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                spool.append([batches()[2]])
                spool.sync()
            status = 0 if said and cut else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    read = read_spool(path)
    assert [batch.equals(batches()[i]) for batch, i in zip(read.batches, (0, 2), strict=True)] == [True, True]
    assert (read.damaged_frames, read.torn_bytes) == (0, 0)


def test_a_failed_sync_takes_back_what_is_not_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.spool"
    with SpoolWriter(path) as spool:
        spool.append([batches()[0]])
        spool.sync()
        spool.append([batches()[1]])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _fails)
            with pytest.raises(SaveError, match="Input/output error"):
                spool.sync()
        assert (spool.n_rows, spool.n_bytes) == (1, path.stat().st_size)
        spool.append([batches()[2]])
        spool.sync()
    assert [batch.equals(batches()[i]) for batch, i in zip(read_spool(path).batches, (0, 2), strict=True)] == [
        True,
        True,
    ]


def test_a_cut_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "x.spool", os.pwrite
    with SpoolWriter(path) as spool:
        spool.append([batches()[3]])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:5000], at) if at < 1e4 else _fails())
            patch.setattr(os, "ftruncate", _fails)
            with pytest.raises(SaveError):
                spool.append([batches()[2]])
        assert spool.n_rows == 1
        spool.append([batches()[0]])
    read = read_spool(path)
    assert [batch.equals(batches()[i]) for batch, i in zip(read.batches, (3, 0), strict=True)] == [True, True]
    assert (read.damaged_frames, read.torn_bytes) == (0, 0)


def test_a_spool_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x.spool"
    with SpoolWriter(path):
        pass
    with pytest.raises(SaveError, match="File exists"):
        SpoolWriter(path)
    with pytest.raises(SaveError, match="No such file"):
        SpoolWriter(tmp_path / "missing" / "x.spool")
    with pytest.raises(FileNotFoundError):
        read_spool(tmp_path / "missing.spool")
    with pytest.raises(SaveError, match="cannot be read"):
        read_spool(tmp_path)


@given(st.dates(min_value=date(1970, 1, 1)), st.integers(0, 10**8))
def test_names_are_read_back(day: date, number: int) -> None:
    assert parse_spool_name(spool_name(day, number)) == (day, number)


@pytest.mark.parametrize(
    "name", ["lock", "20261122-00000.spool", "20261322-000000.spool", "20261122-000000.spool.damaged"]
)
def test_other_names_are_none_of_ours(name: str) -> None:
    assert parse_spool_name(name) is None


def test_folders_are_made_once(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def _fails(*_: object) -> None:
    raise OSError(5, "Input/output error")
