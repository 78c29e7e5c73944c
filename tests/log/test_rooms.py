"""A room belongs to its process for as long as that lives, and to whoever recovers it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest

from fastattr import SaveError
from fastattr.log.rooms import Room, is_live, open_room, orphans
from fastattr.log.spool import spool_name

# newer Pythons warn of every fork beside threads; these children do little and leave by os._exit
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

DAY = date(2026, 11, 22)


def run_in_child(act: Callable[[], bool]) -> bool:
    """What `act` says in a forked child, which keeps every descriptor of ours."""
    child = os.fork()
    if child == 0:
        status = 2
        with suppress(BaseException):
            status = 0 if act() else 1
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1), "the child raised"
    return status == 0


def writers(spool: Path) -> list[str]:
    """The orphans, each let go again."""
    found = []
    for room in orphans(spool):
        with room:
            found.append(room.writer)
    return found


def leave(spool: Path, writer: str, *, files: int = 1) -> None:
    """A room as a killed process leaves it."""

    def begin() -> bool:
        room = open_room(spool, writer)
        for number in range(files):
            (room.path / spool_name(DAY, number)).write_bytes(b"x")
        return True

    assert run_in_child(begin)


def test_a_live_room_is_left_alone(tmp_path: Path) -> None:
    with open_room(tmp_path, "live") as room:
        assert room.writer == "live"
        (room.path / spool_name(DAY, 0)).write_bytes(b"x")
        assert is_live(tmp_path, "live")
        assert writers(tmp_path) == []
        assert run_in_child(lambda: writers(tmp_path) == [])
        with pytest.raises(SaveError, match="held by another process"):
            open_room(tmp_path, "live")
    assert not is_live(tmp_path, "live")
    assert writers(tmp_path) == ["live"]


def test_an_empty_room_goes_away_and_a_full_one_stays(tmp_path: Path) -> None:
    with open_room(tmp_path, "empty") as empty, open_room(tmp_path, "full") as full:
        (full.path / spool_name(DAY, 0)).write_bytes(b"x")
    assert not empty.path.exists()
    assert full.path.is_dir()
    full.close()  # a second time does nothing
    assert writers(tmp_path) == ["full"]


def test_the_room_of_a_killed_process_is_an_orphan(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from fastattr.log.rooms import open_room;"
        "room = open_room(Path(sys.argv[1]), 'killed'); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert is_live(tmp_path, "killed")
        assert writers(tmp_path) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_live(tmp_path, "killed")
        assert writers(tmp_path) == ["killed"]
    assert not (tmp_path / "rooms" / "killed").exists()


def test_spool_files_come_oldest_first_whatever_the_clock_did(tmp_path: Path) -> None:
    with open_room(tmp_path, "w") as room:
        for day, number in ((date(2026, 11, 21), 10), (date(2026, 11, 23), 2), (DAY, 3)):
            (room.path / spool_name(day, number)).write_bytes(b"")
        (room.path / "20261122-000001.spool.damaged").write_bytes(b"")
        assert [path.name for path in room.spools()] == [
            "20261123-000002.spool",
            "20261122-000003.spool",
            "20261121-000010.spool",
        ]


def test_a_child_that_forgets_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    with open_room(tmp_path, "parent") as room:
        assert run_in_child(lambda: room.forget() or True)
        assert is_live(tmp_path, "parent")
        assert run_in_child(lambda: room.close() or True)  # the wrong call does no harm either
        assert is_live(tmp_path, "parent")
        assert room.path.is_dir()


def test_a_child_that_forgot_does_not_keep_a_dead_parent_alive(tmp_path: Path) -> None:
    parent_says, child_says = os.pipe(), os.pipe()

    def parent() -> bool:
        room = open_room(tmp_path, "parent")
        if os.fork() == 0:
            room.forget()
            os.write(child_says[1], b"forgot")
            os.read(parent_says[0], 1)  # lives on until the test is over
            os._exit(0)
        return True

    try:
        assert run_in_child(parent)
        assert os.read(child_says[0], 6) == b"forgot"
        assert not is_live(tmp_path, "parent")
        assert writers(tmp_path) == ["parent"]
    finally:
        os.write(parent_says[1], b".")
        for handle in (*parent_says, *child_says):
            os.close(handle)


def test_closing_lets_go_even_if_a_child_still_has_the_lock_open(tmp_path: Path) -> None:
    parent_says, child_says = os.pipe(), os.pipe()
    room = open_room(tmp_path, "parent")
    (room.path / spool_name(DAY, 0)).write_bytes(b"x")
    child = os.fork()
    if child == 0:
        os.read(parent_says[0], 1)
        os._exit(0)
    try:
        room.close()
        assert writers(tmp_path) == ["parent"]
    finally:
        os.write(parent_says[1], b".")
        os.waitpid(child, 0)
        for handle in (*parent_says, *child_says):
            os.close(handle)


def test_what_a_crash_between_two_steps_leaves_is_an_orphan(tmp_path: Path) -> None:
    (tmp_path / "rooms" / "no-lock-yet").mkdir(parents=True)
    (tmp_path / "rooms" / "file").write_bytes(b"")
    (tmp_path / "rooms" / "link").symlink_to(tmp_path)
    assert writers(tmp_path) == ["no-lock-yet"]
    assert sorted(path.name for path in (tmp_path / "rooms").iterdir()) == ["file", "link"]


def test_damaged_files_stay_and_are_looked_at_once(tmp_path: Path) -> None:
    leave(tmp_path, "w")
    for room in orphans(tmp_path):
        with room:
            (path,) = room.spools()
            path.rename(path.with_name(path.name + ".damaged"))
    assert writers(tmp_path) == []
    assert os.listdir(tmp_path / "rooms" / "w") == ["20261122-000000.spool.damaged"]


def test_no_room_was_ever_made(tmp_path: Path) -> None:
    assert writers(tmp_path / "nothing") == []
    assert not is_live(tmp_path, "nobody")


def test_a_spool_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SaveError, match="choose a local folder"):
        open_room(tmp_path / "file", "w")
    with pytest.raises(SaveError, match="choose a local folder"):
        list(orphans(tmp_path / "file"))
    with pytest.raises(SaveError, match="choose a local folder"):
        is_live(tmp_path / "file", "w")


def test_many_recoveries_and_newcomers_at_once(tmp_path: Path) -> None:
    for i in range(8):
        leave(tmp_path, f"dead{i}")
    taken: list[str] = []
    failures: list[BaseException] = []
    begin = threading.Barrier(6)

    def recover() -> None:
        try:
            begin.wait()
            for _ in range(10):
                for room in orphans(tmp_path):
                    with room:
                        for path in room.spools():
                            time.sleep(0.001)
                            path.unlink()
                            taken.append(room.writer)
        except BaseException as error:
            failures.append(error)

    def arrive(name: int) -> None:
        try:
            begin.wait()
            for turn in range(20):
                with open_room(tmp_path, f"new{name}x{turn}") as room:
                    path = room.path / spool_name(DAY, 0)
                    path.write_bytes(b"x")
                    time.sleep(0.0005)
                    path.unlink()  # fails if someone took it for an orphan
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=recover) for _ in range(3)]
    threads += [threading.Thread(target=arrive, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(taken) == [f"dead{i}" for i in range(8)]  # each once
    assert writers(tmp_path) == []
    assert list((tmp_path / "rooms").iterdir()) == []


def test_a_room_needs_its_own_lock_on_the_disk(tmp_path: Path) -> None:
    # as if a recovery had removed the room between opening and locking
    with open_room(tmp_path, "w") as room:
        os.unlink(room.path / "lock")
        with open_room(tmp_path, "w") as other:
            assert isinstance(other, Room)
            assert is_live(tmp_path, "w")
