"""Where records end up: immutable Parquet segments in a local folder or any fsspec store, and what is kept beside them.

A spool file becomes a segment in one atomic step, under a name that the spool file fixes, and only then goes away. So
a process may be killed between any two steps: publishing once more replaces the segment by itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import fsspec
import fsspec.asyn
import fsspec.exceptions
import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.errors import InputError, SaveError
from fastattr.log.rooms import orphans
from fastattr.log.schema import SCHEMA
from fastattr.log.spool import make_folder, parse_spool_name, read_spool, sync_folder

TIMEOUT_S = 120.0
ROW_GROUP = 64  # rows; who wants one record reads this many

_SEGMENT = re.compile(r"date=(\d{4}-\d{2}-\d{2})/([0-9A-Za-z]+)-(\d{6,})\.parquet")


@dataclass(frozen=True)
class Segment:
    """A published segment.

    Attributes:
        path: local path or URL.
        day: on which its spool file was begun.
        writer: the process that wrote the records.
        number: counts the spool files of the writer.
    """

    path: str
    day: date
    writer: str
    number: int


@dataclass(frozen=True)
class Published:
    """What became of a spool file.

    Attributes:
        path: local path or URL of the segment; None where there was nothing to publish.
        n_rows: records in it.
        n_bytes: of the segment.
        damaged_frames: in the spool file, which is then kept as `<name>.damaged`.
    """

    path: str | None
    n_rows: int
    n_bytes: int
    damaged_frames: int


@dataclass(frozen=True)
class Recovered:
    """What processes that were killed had left: their rooms, and what was published from them."""

    rooms: int
    segments: int
    rows: int
    damaged_frames: int


class _Store(Protocol):
    """Named bytes. Every method raises `SaveError`."""

    def address(self, name: str) -> str: ...
    def put(self, name: str, data: bytes) -> None: ...  # whole and durable, or not at all
    def get(self, name: str) -> bytes: ...
    def delete(self, name: str) -> None: ...
    def names(self) -> list[str]: ...  # at least those of segments


@dataclass(frozen=True)
class Destination:
    """A place for records. Make one with `open_destination`."""

    url: str
    _store: _Store = field(repr=False)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine, which can be written to at any time."""
        return isinstance(self._store, _Folder)

    def check(self) -> None:
        """Write a small file, read it back and delete it.

        Raises:
            SaveError: one of these does not work.
        """
        name, data = f".probe-{uuid4().hex}", os.urandom(64)
        self._store.put(name, data)
        try:
            found = self._store.get(name)
        finally:
            self._store.delete(name)
        if found != data:
            raise SaveError(f"{self.url!r} gives back other bytes than were written; choose another destination")

    def put(self, name: str, data: bytes) -> None:
        """Write a file beside the records, whole and durable or not at all. Raises `SaveError`."""
        self._store.put(name, data)

    def get(self, name: str) -> bytes:
        """Read such a file. Raises `SaveError`."""
        return self._store.get(name)

    def names(self) -> list[str]:
        """At least all segments and tallies. Raises `SaveError`."""
        return self._store.names()

    def publish(self, spool: Path, writer: str) -> Published:
        """Turn a spool file that nobody writes to any more into a segment, and delete it.

        Raises:
            InputError: the file is not named like a spool file.
            SaveError: the segment cannot be written, or the spool file not read or removed; then it stays, and
                publishing it once more is safe.
        """
        key = parse_spool_name(spool.name)
        if key is None:
            raise InputError(f"{str(spool)!r} is not named like a spool file, expected YYYYMMDD-NNNNNN.spool")
        day, number = key
        with _saving(f"{str(spool)!r} cannot be read", "check the disk", OSError):
            read = read_spool(spool)
        n_rows, n_bytes, path = sum(batch.num_rows for batch in read.batches), 0, None
        if n_rows:
            name = f"date={day.isoformat()}/{writer}-{number:06d}.parquet"
            data = _to_parquet(read.batches)
            self._store.put(name, data)
            n_bytes, path = len(data), self._store.address(name)
        with _saving(f"{str(spool)!r} cannot be removed after publication", "check permissions", OSError):
            if read.damaged_frames:
                os.replace(spool, spool.with_name(spool.name + ".damaged"))
            else:
                os.unlink(spool)
        return Published(path, n_rows, n_bytes, read.damaged_frames)

    def write_tally(self, writer: str, tally: Mapping[str, Any]) -> None:
        """Replace the tally of a writer. Raises `SaveError`."""
        self._store.put(f"writers/{writer}.json", (json.dumps(dict(tally), indent=2) + "\n").encode())

    def segments(self) -> list[Segment]:
        """Every segment, by day, writer and number. Raises `SaveError`."""
        return [Segment(self._store.address(name), *key) for key, name in sorted(self._segments())]

    def record_ids(self, writer: str) -> frozenset[str]:
        """The ids of all published records of a writer. Raises `SaveError`."""
        found: set[str] = set()
        for (_, owner, _), name in self._segments():
            if owner == writer:
                data = self._store.get(name)
                with _saving(f"{self._store.address(name)!r} is no segment", "move it away", pa.ArrowException):
                    table = pq.read_table(pa.BufferReader(data), columns=["record_id"])
                found.update(table.column("record_id").to_pylist())
        return frozenset(found)

    def expire(self, days: int, today: date) -> int:
        """Delete the segments of days more than `days` before `today`, and nothing else.

        Returns:
            How many segments were deleted.

        Raises:
            InputError: `days` is not a whole number of at least 1.
            SaveError: a segment cannot be deleted.
        """
        if isinstance(days, bool) or not isinstance(days, int) or days < 1:
            raise InputError(f"days is {days!r}, expected a whole number of at least 1")
        old = [name for (day, _, _), name in sorted(self._segments()) if (today - day).days > days]
        for name in old:
            self._store.delete(name)
        return len(old)

    def _segments(self) -> Iterator[tuple[tuple[date, str, int], str]]:
        for name in self._store.names():
            match = _SEGMENT.fullmatch(name)
            if match:
                with suppress(ValueError):  # there is no 31st of February: not ours
                    yield (date.fromisoformat(match[1]), match[2], int(match[3])), name


def open_destination(
    url: str | Path, storage_options: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
) -> Destination:
    """A destination at a local path or an fsspec URL, for example `s3://bucket/attr`. Touches nothing, see `check`.

    Args:
        storage_options: passed to the fsspec file system: credentials, endpoint, retries.
        timeout_s: how long a store may take for one object, with all its retries.

    Raises:
        InputError: the URL is empty, of an unknown kind, or the options do not fit it.
    """
    text = os.fspath(url)
    if not text:
        raise InputError("the destination is empty, expected a folder or a URL such as s3://bucket/attr")
    scheme = text.split("://", 1)[0] if "://" in text else "file"
    if scheme in ("file", "local"):
        if storage_options:
            raise InputError(f"{text!r} is a local folder, which takes no storage_options; leave them out")
        root = Path(text.split("://", 1)[-1])
        return Destination(str(root), _Folder(root))
    store = _Remote(text.rstrip("/"), dict(storage_options or {}), timeout_s)
    try:
        store.file_system()
    except ImportError as error:
        raise InputError(f"{text!r} needs a package that is not installed: {error}") from error
    except Exception as error:  # every file system raises what it likes
        raise InputError(f"{text!r} cannot be used as a destination: {type(error).__name__}: {error}") from error
    return Destination(store.url, store)


def recover(spool: Path, destination: Destination) -> Recovered:
    """Publish what processes that are gone left in the spool, and remove their rooms.

    Raises:
        SaveError: the spool or the destination does not work, for some of it at least; whatever is not published yet
            stays, and what can be published is.
    """
    rooms = 0
    published: list[Published] = []
    problems: list[SaveError] = []
    try:
        for room in orphans(spool):
            with room:
                try:
                    paths = room.spools()
                except SaveError as error:
                    problems.append(error)
                    continue
                for path in paths:
                    try:
                        published.append(destination.publish(path, room.writer))
                    except SaveError as error:
                        if not destination.is_local and os.access(path, os.R_OK):
                            raise  # a store that does not answer would let each of the others wait in vain
                        problems.append(error)
            rooms += 1
    except SaveError as error:
        problems.append(error)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SaveError(f"{problems[0]}{more}") from problems[0]
    return Recovered(
        rooms=rooms,
        segments=sum(each.path is not None for each in published),
        rows=sum(each.n_rows for each in published),
        damaged_frames=sum(each.damaged_frames for each in published),
    )


@dataclass(frozen=True)
class _Folder:
    """A local folder. A file appears under its name only when all of it is on the disk."""

    root: Path

    def address(self, name: str) -> str:
        return str(self.root / name)

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        advice = "make room on the disk, or choose a folder that can be written"
        with _saving(f"{str(path)!r} cannot be written", advice, OSError):
            make_folder(path.parent)
            # a name of its own: a recovery may publish the same while a thread that was given up still hangs in here
            temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            for left in _listed(path.parent):  # by a process that was killed
                if left.startswith(f".{path.name}.") and left.endswith(".tmp"):
                    (path.parent / left).unlink(missing_ok=True)
            sync_folder(path.parent)

    def get(self, name: str) -> bytes:
        with _saving(f"{self.address(name)!r} cannot be read", "check the disk and permissions", OSError):
            return (self.root / name).read_bytes()

    def delete(self, name: str) -> None:
        path = self.root / name
        with _saving(f"{str(path)!r} cannot be deleted", "check permissions", OSError):
            path.unlink(missing_ok=True)
            if path.parent != self.root:
                with suppress(OSError):  # other things may lie there
                    path.parent.rmdir()

    def names(self) -> list[str]:
        with _saving(f"{str(self.root)!r} cannot be listed", "check permissions", OSError):
            return [
                f"{folder}/{name}"
                for folder in _listed(self.root)
                if folder.startswith("date=") and not (self.root / folder).is_symlink()
                for name in _listed(self.root / folder)
            ]


def _listed(folder: Path) -> list[str]:
    """The names in a folder; none where there is no such folder, or not any more."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


@dataclass(frozen=True)
class _Remote:
    """A store behind fsspec, with atomic writes of whole objects, as all object stores have."""

    url: str
    options: dict[str, Any] = field(repr=False)  # credentials
    timeout_s: float

    def file_system(self) -> tuple[Any, str]:
        # made anew each time: fsspec keeps one for each process and thread, and they do not survive a fork
        return fsspec.core.url_to_fs(self.url, **self.options)

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def put(self, name: str, data: bytes) -> None:
        with self._saving(f"{self.address(name)!r} cannot be written"):
            self._do("pipe_file", name, data)

    def get(self, name: str) -> bytes:
        with self._saving(f"{self.address(name)!r} cannot be read"):
            return self._do("cat_file", name)

    def delete(self, name: str) -> None:
        with self._saving(f"{self.address(name)!r} cannot be deleted"), suppress(FileNotFoundError):
            self._do("rm_file", name)

    def names(self) -> list[str]:
        with self._saving(f"{self.url!r} cannot be listed"):
            system, root = self.file_system()
            system.invalidate_cache()
            try:
                return [str(path)[len(root) :].lstrip("/") for path in self._do("find", "")]
            except FileNotFoundError:
                return []

    def _do(self, action: str, name: str, *values: bytes) -> Any:
        system, root = self.file_system()
        path = f"{root}/{name}" if name else root
        if not system.async_impl:
            return getattr(system, action)(path, *values)
        # by this road there is a limit; the timeouts of s3fs itself miss a server that never says "100 Continue"
        try:
            return fsspec.asyn.sync(system.loop, getattr(system, f"_{action}"), path, *values, timeout=self.timeout_s)
        except fsspec.exceptions.FSTimeoutError as error:
            raise TimeoutError(f"no answer within {self.timeout_s:g} s") from error

    def _saving(self, failure: str) -> Any:
        return _saving(failure, "check the address, the credentials and the network", Exception)


@contextmanager
def _saving(failure: str, advice: str, kind: type[Exception]) -> Iterator[None]:
    """Whatever of `kind` goes wrong becomes a `SaveError`."""
    try:
        yield
    except SaveError:
        raise
    except kind as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise SaveError(f"{failure}: {reason}; {advice}") from error


def _to_parquet(batches: tuple[pa.RecordBatch, ...]) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_batches(batches, schema=SCHEMA),
        buffer,
        compression="zstd",
        row_group_size=ROW_GROUP,
        write_page_checksum=True,
    )
    return buffer.getvalue().to_pybytes()
