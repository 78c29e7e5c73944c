"""The doctor finds every loss that was planted, and none where nothing is missing."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattr.errors import SaveError
from fastattr.log.doctor import Diagnosis, examine
from fastattr.log.record import to_batch
from fastattr.log.rooms import open_room
from fastattr.log.spool import SpoolWriter, spool_name
from tests.log.records import NOON, make_record, write_segment

WRITER, OTHER = "a" * 16, "b" * 16
DAY = timedelta(days=1)


def publish(dest: Path, numbers: Sequence[int], *, writer: str = WRITER, day: int = 0, number: int = 0) -> Path:
    """A segment of small records with these sequence numbers."""
    records = [make_record(n_tokens=2, grids=((1, 1, 1),), writer=writer, sequence=k, seed=k) for k in numbers]
    return write_segment(dest, records, writer=writer, day=(NOON + day * DAY).date(), number=number)


def spool(room: Path, numbers: Sequence[int], *, writer: str = WRITER, number: int = 9) -> Path:
    room.mkdir(parents=True, exist_ok=True)
    path = room / spool_name(NOON.date(), number)
    with SpoolWriter(path) as file:
        for k in numbers:
            why, envelope = make_record(n_tokens=2, grids=((1, 1, 1),), writer=writer, sequence=k)
            file.append([to_batch(why, envelope, "ids")])
        file.sync()
    return path


def tell(dest: Path, written: int, *, writer: str = WRITER, **changed: Any) -> None:
    told = {
        "writer": writer, "pid": 1, "host": socket.gethostname(), "started": NOON.isoformat(),
        "updated": (NOON + timedelta(hours=1)).isoformat(), "closed": True, "submitted": written, "written": written,
        "dropped": {}, "failed": {}, "in_flight": 0, "damaged_frames": 0,
    }  # fmt: skip
    (dest / "writers").mkdir(parents=True, exist_ok=True)
    (dest / "writers" / f"{writer}.json").write_text(json.dumps(told | changed))


def kinds(diagnosis: Diagnosis) -> list[str]:
    return [finding.kind for finding in diagnosis.findings]


def test_a_whole_log_is_healthy(tmp_path: Path) -> None:
    publish(tmp_path, range(5), number=0)
    publish(tmp_path, range(5, 7), day=1, number=1)
    publish(tmp_path, range(3), writer=OTHER)
    spool(tmp_path / "spool" / "rooms" / WRITER, [7, 8])
    tell(tmp_path, 9, submitted=16, dropped={"queue_full": 4, "not_sampled": 1}, failed={"StatesError": 2})
    tell(tmp_path, 5, writer=OTHER, handed_over=2, submitted=6, dropped={"queue_full": 1})
    inbox = tmp_path / "spool" / "inbox"
    (inbox / "claimed" / "w").mkdir(parents=True)
    for name in ("one.0.request", "claimed/w/two.1.request"):
        (inbox / name).write_bytes(b"")
    found = examine(tmp_path)
    assert found.findings == () and found.healthy and found.lost == 0
    assert (found.segments, found.records, found.spooled, found.requests) == (3, 10, 2, 2)
    assert (found.submitted, found.dropped, found.failed) == (
        22,
        {"queue_full": 5, "not_sampled": 1},
        {"StatesError": 2},
    )
    assert found.n_bytes == sum(path.stat().st_size for path in tmp_path.glob("date=*/*"))
    assert "Nothing is lost or damaged." in str(found)
    assert json.loads(json.dumps(found.as_dict()))["healthy"] is True


def test_an_empty_destination_is_healthy(tmp_path: Path) -> None:
    found = examine(tmp_path)
    assert found.healthy and found.records == found.writers == 0


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_is_taken_away_is_counted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Records are taken from the start, the middle or the end; the tally knows how many there were."""
    total = data.draw(st.integers(1, 12))
    gone = data.draw(st.sets(st.integers(0, total - 1)))
    cut = data.draw(st.integers(0, total))
    dest = tmp_path_factory.mktemp("log")
    kept = [k for k in range(total) if k not in gone]
    publish(dest, range(1), writer=OTHER)  # so that there is a first day
    tell(dest, 1, writer=OTHER)
    if published := [k for k in kept if k < cut]:
        publish(dest, published)
    if waiting := [k for k in kept if k >= cut]:
        spool(dest / "spool" / "rooms" / WRITER, waiting)
    tell(dest, total)
    found = examine(dest)
    assert found.lost == len(gone)
    assert found.healthy == (not gone)
    assert found.records + found.spooled == 1 + len(kept)


def test_a_first_record_above_zero_is_a_note_where_days_expired(tmp_path: Path) -> None:
    publish(tmp_path, [5, 6])
    tell(tmp_path, 7, started=(NOON - 3 * DAY).isoformat())
    tell(tmp_path, 4, writer=OTHER, started=(NOON - 5 * DAY).isoformat(), updated=(NOON - 4 * DAY).isoformat())
    found = examine(tmp_path)
    assert found.healthy
    assert any("begins at record 5" in note for note in found.notes)
    assert any("before the first day that is kept" in note for note in found.notes)


def test_a_writer_without_a_tally_is_judged_by_its_numbers(tmp_path: Path) -> None:
    publish(tmp_path, [0, 1, 3, 6])
    found = examine(tmp_path)
    assert kinds(found) == ["lost"] and found.lost == 3


def test_duplicates(tmp_path: Path) -> None:
    publish(tmp_path, [0, 1, 2], number=0)
    publish(tmp_path, [2, 3], number=1)
    found = examine(tmp_path)
    assert kinds(found) == ["duplicate"] and found.lost == 0 and not found.healthy


def test_a_record_that_moves_while_one_looks_is_no_duplicate(tmp_path: Path) -> None:
    """Published, but the spool file not deleted yet: a crash between the two, or a writer at work."""
    publish(tmp_path, [0, 1])
    spool(tmp_path / "spool" / "rooms" / WRITER, [0, 1])
    assert examine(tmp_path).healthy


def test_damage(tmp_path: Path) -> None:
    good = publish(tmp_path, range(4), number=0)
    torn = publish(tmp_path, range(4, 8), number=1)
    torn.write_bytes(torn.read_bytes()[:-100])
    rotten = publish(tmp_path, range(8, 12), number=2)
    data = bytearray(rotten.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little")
    data[4 : -8 - footer] = bytes(len(data) - 12 - footer)
    rotten.write_bytes(data)
    (tmp_path / "writers").mkdir()
    (tmp_path / "writers" / "c.json").write_text("{")
    found = examine(tmp_path)
    assert kinds(found) == ["damaged"] * 3
    text = str(found)
    assert all(name in text for name in (torn.name, rotten.name, "c.json")) and good.name not in text
    tell(tmp_path, 12)
    assert examine(tmp_path).lost == 8  # and with a tally, how many are gone


def test_spool_damage_and_torn_ends(tmp_path: Path) -> None:
    room = tmp_path / "spool" / "rooms" / WRITER
    path = spool(room, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 7])  # a frame that was never finished
    found = examine(tmp_path)
    assert found.healthy and found.spooled == 3
    assert any("never acknowledged" in note for note in found.notes)
    assert any("3 records of a process that is gone" in note for note in found.notes)
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    path.write_bytes(middle)
    (room / "20261101-000000.spool.damaged").write_bytes(b"x")
    found = examine(tmp_path)
    assert sorted(kinds(found)) == ["damaged", "damaged", "lost"] and found.lost == 1 and found.spooled == 2


def test_a_live_room_is_left_alone(tmp_path: Path) -> None:
    with open_room(tmp_path / "spool", WRITER) as room:
        path = spool(room.path, [0, 1])
        path.write_bytes(path.read_bytes() + b"FATTR")  # its next frame, half written
        tell(tmp_path, 2, submitted=3, in_flight=1, closed=False)
        before = sorted(tmp_path.rglob("*"))
        found = examine(tmp_path)
        assert found.healthy and found.spooled == 2 and found.notes == ()
        assert sorted(tmp_path.rglob("*")) == before
        path.unlink()


def test_killed_writers_are_noted(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    publish(tmp_path, range(3))
    tell(tmp_path, 2, submitted=7, in_flight=5, closed=False)  # told before the third was written
    tell(tmp_path, 0, writer=OTHER, closed=False, host="elsewhere")
    found = examine(tmp_path)
    assert found.healthy
    assert any(f"writer {WRITER} was killed" in note and "5 were in flight" in note for note in found.notes)
    assert any("on elsewhere is running or was killed" in note for note in found.notes)


def test_tallies_that_do_not_add_up(tmp_path: Path) -> None:
    publish(tmp_path, range(3))
    tell(tmp_path, 3, submitted=9, dropped={"queue_full": 2})
    publish(tmp_path, range(4), writer=OTHER)
    tell(tmp_path, 2, writer=OTHER)  # closed, yet it wrote more
    found = examine(tmp_path)
    assert kinds(found) == ["miscounted", "miscounted"] and found.lost == 0
    assert {finding.n for finding in found.findings} == {4, 2}


def test_requests_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "spool" / "inbox" / "given_up"
    folder.mkdir(parents=True)
    (folder / "x.3.request").write_bytes(b"")
    assert kinds(examine(tmp_path)) == ["given_up"]


def test_a_spool_elsewhere(tmp_path: Path) -> None:
    dest, elsewhere = tmp_path / "log", tmp_path / "disk"
    publish(dest, [0, 1])
    tell(dest, 3)
    spool(elsewhere / "rooms" / WRITER, [2])
    assert examine(dest).lost == 1
    assert examine(dest, elsewhere).healthy
    with pytest.raises(SaveError, match="is not a directory"):
        examine(dest, tmp_path / "missing")
    with pytest.raises(SaveError, match="is not a directory"):
        examine(tmp_path / "missing")


def test_what_may_lie_in_the_spool_of_another_machine_is_not_called_lost(tmp_path: Path) -> None:
    dest, elsewhere = tmp_path / "log", tmp_path / "disk"
    publish(dest, [0, 1])
    tell(dest, 5, closed=False, host="another")
    (elsewhere / "rooms").mkdir(parents=True)
    for spool_given in (None, elsewhere):
        found = examine(dest, spool_given)
        assert found.healthy and any("3 records of writer" in note and "on another" in note for note in found.notes)
    tell(dest, 5, closed=False)
    assert examine(dest, elsewhere).lost == 3  # its spool would be here
    (dest / "spool").mkdir()
    tell(dest, 5, closed=False, host="another")
    assert examine(dest).lost == 3  # a spool in the destination is everybody's
    tell(dest, 5, closed=True, host="another")
    assert examine(dest, elsewhere).lost == 3  # who closes has published everything


def test_findings_are_cut_when_there_are_many(tmp_path: Path) -> None:
    for k in range(30):
        writer = f"{k:016x}"
        publish(tmp_path, [0, 2], writer=writer)
    found = examine(tmp_path)
    assert len(found.findings) == found.lost == 30
    assert "... and 10 more like these" in str(found)
    assert len(str(replace(found, findings=()))) < len(str(found)) < 4000


def test_nothing_is_changed(tmp_path: Path) -> None:
    publish(tmp_path, [0, 1])
    spool(tmp_path / "spool" / "rooms" / WRITER, [2])
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    examine(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before
