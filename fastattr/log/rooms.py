"""Rooms: the part of the spool that belongs to one process for as long as it lives.

A process holds a lock on its room. The system lets go of the lock when the process ends, however it ends, so a room
whose lock can be taken has no owner, and what lies in it wants to be published. POSIX only.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fastattr.errors import SaveError
from fastattr.log.spool import SUFFIX, make_folder, make_private_folder, parse_spool_name

_TRIES, _WAIT_S = 100, 0.01


class Room:
    """The folder of one writer, locked. Make one with `open_room` or `orphans`.

    Attributes:
        path: the folder.
        writer: its name.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._pid = os.getpid()

    @property
    def writer(self) -> str:
        return self.path.name

    def spools(self) -> list[Path]:
        """The spool files in it, oldest first. Raises `SaveError`."""
        try:
            found = [
                (key[1], key[0], path)
                for path in self.path.iterdir()
                if (key := parse_spool_name(path.name)) and not path.is_dir()  # a folder is not ours
            ]
        except OSError as error:
            raise _cannot_use(self.path, error) from error
        return [path for _, _, path in sorted(found)]

    def close(self) -> None:
        """Let go of the room; one without spool files is removed, others wait for `orphans`. In a fork as `forget`."""
        if self._lock < 0:
            return
        if self._pid != os.getpid():
            self.forget()
            return
        with suppress(OSError):  # an empty room left behind costs nothing, the next recovery takes it
            if not any(path.suffix == SUFFIX for path in self.path.iterdir()):
                os.unlink(self.path / "lock")
                os.rmdir(self.path)  # fails where damaged files are kept
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked child may still hold the same lock open
        self.forget()

    def forget(self) -> None:
        """In a forked child: close the inherited lock without letting go of it for the parent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Room:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_room(spool: Path, writer: str) -> Room:
    """Make and lock the room of a new writer.

    Raises:
        SaveError: the folder cannot be written, or another process holds this room.
    """
    path = spool / "rooms" / writer
    try:
        for _ in range(_TRIES):  # between making and locking it, a recovery may take it for an orphan
            if not spool.is_dir():
                make_private_folder(spool)
            make_private_folder(path.parent)
            make_folder(path)
            lock = _take(path)
            if lock is not None:
                return Room(path, lock)
            time.sleep(_WAIT_S)
    except OSError as error:
        raise _cannot_use(path, error) from error
    raise SaveError(f"the room {str(path)!r} is held by another process; every process needs a writer of its own")


def orphans(spool: Path) -> Iterator[Room]:
    """The rooms of processes that are gone, each locked for the caller to close before the next; others are left alone.

    One at a time: a room just made by a process that has not locked it yet looks the same, and must not wait for long.

    Raises:
        SaveError: the folder cannot be read; or, after all others, a room in it cannot be used.
    """
    problem: SaveError | None = None
    try:
        paths = sorted((spool / "rooms").iterdir())
    except FileNotFoundError:
        return  # no process has ever made a room
    except OSError as error:
        raise _cannot_use(spool / "rooms", error) from error
    for path in paths:
        try:
            lock = _take(path) if path.is_dir() and not path.is_symlink() and not _only_damaged(path) else None
        except OSError as error:
            problem = _cannot_use(path, error)
            continue
        if lock is not None:
            yield Room(path, lock)
    if problem is not None:
        raise problem


def is_live(spool: Path, writer: str) -> bool:
    """Whether a process holds the room of this writer. Raises `SaveError`."""
    path = spool / "rooms" / writer
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _cannot_use(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _take(path: Path) -> int | None:
    """Lock a room without waiting; None if someone else has it, or it vanished meanwhile. Raises `OSError`."""
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path / "lock")):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _only_damaged(path: Path) -> bool:
    """Whether a room was recovered before and only keeps damaged files."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return False
    return bool(names) and all(name.endswith(".damaged") for name in names)


def _cannot_use(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"{str(path)!r} cannot be used as a spool: {error.strerror or error}; choose a local folder that can be written"
    )
