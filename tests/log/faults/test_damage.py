"""Bytes that change between the death of a process and its recovery: what is whole is found, what is not is counted."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattr.log import AttributionLogger, LogConfig, read
from fastattr.log.segments import open_destination, recover
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, rows_of

WHY = make_attribution(("A", " red"), grids=((1, 3, 3),), pictures=False)
N_FRAMES = 6
HEADER = struct.Struct(
    "<8sQII"
)  # as the layout says: magic, length, checksum of the payload, checksum of the 20 before


class Left:
    """What a process left: one spool file of several frames, as it was when it died."""

    def __init__(self, folder: Path) -> None:
        logger = AttributionLogger(folder, sample_rate=1.0)
        for i in range(N_FRAMES):
            assert logger.submit_attribution(WHY, request_id=f"{i}")
            assert logger.flush(60)
        logger._shut(60, publish=False)  # as at the end of an interpreter with a remote store
        (spool,) = folder.glob("spool/rooms/*/*.spool")
        self.place = spool.relative_to(folder)
        self.data = spool.read_bytes()
        self.frames = list(frames_of(self.data))  # (start, stop)
        assert len(self.frames) == N_FRAMES


def frames_of(data: bytes) -> Iterator[tuple[int, int]]:
    """By the layout, for a file that is whole."""
    position = 0
    while position < len(data):
        magic, length, checksum, own = HEADER.unpack_from(data, position)
        body = data[position + HEADER.size : position + HEADER.size + length]
        assert magic == b"FATTR\0\0\1" and zlib.crc32(body) == checksum
        assert own == zlib.crc32(data[position : position + 20])
        yield position, position + HEADER.size + length
        position += HEADER.size + length


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return Left(tmp_path_factory.mktemp("left"))


def recovered(left: Left, data: bytes) -> tuple[list[str], int, list[Path]]:
    """Request ids after a recovery of a spool file with this content, damaged frames, and files kept for a person."""
    folder = Path(tempfile.mkdtemp())
    try:
        spool = folder / left.place
        spool.parent.mkdir(parents=True)
        spool.write_bytes(data)
        found = recover(folder / "spool", open_destination(folder))
        assert recover(folder / "spool", open_destination(folder)).rows == 0  # once is enough
        assert not list(folder.rglob("*.spool"))
        kept = list(folder.rglob("*.damaged"))
        assert all(path.read_bytes() == data for path in kept) and len(kept) == (found.damaged_frames > 0)
        ids = [row["request_id"] for row in rows_of(folder)]
        assert found.rows == len(ids)
        return ids, found.damaged_frames, kept
    finally:
        shutil.rmtree(folder)


def test_left_alone_everything_is_found(left: Left) -> None:
    assert recovered(left, left.data) == ([str(i) for i in range(N_FRAMES)], 0, [])


@settings(max_examples=60)
@given(st.data())
def test_a_file_cut_anywhere_keeps_what_was_before_the_cut(
    left: Left, fault_counts: FaultCounts, data: st.DataObject
) -> None:
    start, stop = data.draw(st.sampled_from(left.frames))
    cut = data.draw(st.integers(start, stop))
    ids, damaged, _ = recovered(left, left.data[:cut])
    whole = [str(i) for i, (_, stop) in enumerate(left.frames) if stop <= cut]
    fault_counts.add("spool cut", faults=1, acknowledged=len(whole), checked=len(ids), lost=len({*whole} - {*ids}))
    assert ids == whole and damaged == 0  # a torn end is what a kill leaves, not damage


@settings(max_examples=120)
@given(st.data())
def test_bytes_that_change_cost_only_the_frames_they_are_in(
    left: Left, fault_counts: FaultCounts, data: st.DataObject
) -> None:
    changed = bytearray(left.data)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(changed) - 1))
        span = data.draw(st.integers(1, 40))
        for i in range(position, min(position + span, len(changed))):
            changed[i] ^= data.draw(st.integers(0, 255)) if i == position else 0x55
    intact = [i for i, (start, stop) in enumerate(left.frames) if changed[start:stop] == left.data[start:stop]]
    ids, damaged, _ = recovered(left, bytes(changed))
    fault_counts.add(
        "spool bytes changed",
        faults=1,
        acknowledged=len(intact),
        checked=len(ids),
        lost=len({*map(str, intact)} - {*ids}),
    )
    assert ids == [str(i) for i in intact]
    gone = [i for i in range(N_FRAMES) if i not in intact]
    at_the_end = [i for i in gone if all(j in gone for j in range(i, N_FRAMES))]
    places = [i for i in gone if i + 1 not in gone and i not in at_the_end]
    # neighbours may count as one place, and what reaches the end may look like a frame that was never finished
    assert len(places) <= damaged <= len(gone)


@settings(max_examples=60)
@given(st.data())
def test_bytes_that_come_or_go_cost_only_the_frames_they_are_in(
    left: Left, fault_counts: FaultCounts, data: st.DataObject
) -> None:
    frame = data.draw(st.integers(0, N_FRAMES - 1))
    start, stop = left.frames[frame]
    position = data.draw(st.integers(start + 1, stop - 1))
    if data.draw(st.booleans()):
        gone = data.draw(st.integers(1, stop - position))
        changed = left.data[:position] + left.data[position + gone :]
    else:
        changed = left.data[:position] + data.draw(st.binary(min_size=1, max_size=60)) + left.data[position:]
    others = [str(i) for i in range(N_FRAMES) if i != frame]
    ids, damaged, _ = recovered(left, changed)
    fault_counts.add(
        "spool bytes moved", faults=1, acknowledged=len(others), checked=len(ids), lost=len({*others} - {*ids})
    )
    # the frame itself may survive: what was inserted can be what was there, behind what was removed alike
    assert set(others) <= set(ids) and len(ids) == len(set(ids))
    assert damaged <= 2


@settings(max_examples=60)
@given(junk=st.binary(max_size=400), magic=st.booleans())
def test_a_file_of_anything_is_no_record_and_stops_nobody(left: Left, junk: bytes, magic: bool) -> None:
    ids, _, _ = recovered(left, (b"FATTR\0\0\1" if magic else b"") + junk)
    assert ids == []


def test_a_length_of_exabytes_is_not_believed(left: Left) -> None:
    header = HEADER.pack(b"FATTR\0\0\1", 2**63, 0, 0)[:20]
    header += struct.pack("<I", zlib.crc32(header))
    start = left.frames[3][0]
    ids, damaged, _ = recovered(left, left.data[:start] + header + left.data[start:])
    assert ids == [str(i) for i in range(N_FRAMES)] and damaged == 1


def test_the_tally_of_who_recovers_tells_of_the_damage(left: Left, tmp_path: Path, fault_counts: FaultCounts) -> None:
    """And the reader that is told what is missing finds the rest."""
    changed = bytearray(left.data)
    start, stop = left.frames[2]
    changed[(start + stop) // 2] ^= 0xFF
    (tmp_path / left.place).parent.mkdir(parents=True)
    (tmp_path / left.place).write_bytes(changed)
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(WHY, request_id="after")
    assert_identity(logger.stats())
    (tally,) = (json.loads(path.read_text()) for path in (tmp_path / "writers").glob("*.json"))
    assert tally["damaged_frames"] == 1
    expected = {*(str(i) for i in range(N_FRAMES) if i != 2), "after"}
    assert {each.envelope.request_id for each in read(tmp_path)} == expected
    fault_counts.check("spool damaged", tmp_path, expected, faults=1)


def test_a_damaged_segment_is_left_out_by_readers_and_the_rest_is_found(
    tmp_path: Path, fault_counts: FaultCounts, caplog: pytest.LogCaptureFixture
) -> None:
    with AttributionLogger(tmp_path, sample_rate=1.0, segment_bytes=1) as logger:
        for i in range(3):
            assert logger.submit_attribution(WHY, request_id=f"{i}")
            assert logger.flush(60)
    spoiled = sorted(tmp_path.glob("date=*/*.parquet"))[1]
    spoiled.write_bytes(spoiled.read_bytes()[:-20])
    found = {each.envelope.request_id for each in read(tmp_path)}
    assert found == {"0", "2"} and spoiled.name in caplog.text
    fault_counts.add("segment damaged", faults=1, acknowledged=2, checked=len(found))


def test_damage_to_what_lies_beside_the_records_stops_nobody(tmp_path: Path, fault_counts: FaultCounts) -> None:
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(WHY, request_id="before")
    (tmp_path / "spool" / "logger.json").write_bytes(b"\0\xff{")
    for tally in (tmp_path / "writers").glob("*.json"):
        tally.write_bytes(b"[")
    rooms = tmp_path / "spool" / "rooms"
    (rooms / "a file").write_text("not a room")
    (rooms / "empty").mkdir()
    (rooms / "strange" / "folder").mkdir(parents=True)
    (rooms / "strange" / "20261399-000000.spool").write_text("no such day")
    (tmp_path / "spool" / "inbox" / "x.0.request").write_bytes(b"not safetensors")
    (tmp_path / "date=2026-11-22").mkdir(exist_ok=True)
    (tmp_path / "date=2026-11-22" / ".x-000000.parquet.123.tmp").write_bytes(b"PAR1")
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(WHY, request_id="after")
    assert {each.envelope.request_id for each in read(tmp_path)} == {"before", "after"}
    assert LogConfig.from_mapping(json.loads((tmp_path / "spool" / "logger.json").read_text())).sample_rate == 1.0
    fault_counts.check("litter", tmp_path, {"before", "after"}, faults=8)
