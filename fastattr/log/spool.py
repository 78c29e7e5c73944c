"""The spool: an append-only file of frames, each whole and readable by itself.

A frame is a header of 24 bytes (magic, length of the payload, its crc32, crc32 of the 20 bytes before) and a payload,
an Arrow IPC stream of one record batch of `schema.SCHEMA`. Whatever happens to the file, the frames that are still
whole are read, and nothing else is.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from fastattr.errors import SaveError
from fastattr.log.schema import SCHEMA, upgrade

MAGIC = b"FATTR\x00\x00\x01"
SUFFIX = ".spool"

_HEADER = struct.Struct("<8sQII")
_NAME = re.compile(r"(\d{4})(\d{2})(\d{2})-(\d{6,})\.spool")


@dataclass(frozen=True)
class SpoolRead:
    """What a spool file holds.

    Attributes:
        batches: one for each whole frame, in the order they were written.
        damaged_frames: places where frames were written that no longer can be read.
        torn_bytes: at the end, of a frame that was never finished.
    """

    batches: tuple[pa.RecordBatch, ...]
    damaged_frames: int
    torn_bytes: int


class SpoolWriter:
    """A new spool file, open for appending. For one thread.

    Attributes:
        path: the file.
        n_bytes, n_rows: what it holds, durable or not.
    """

    def __init__(self, path: Path) -> None:
        """Create the file. Raises `SaveError`, also where there is one already."""
        self.path = path
        self.n_bytes = self.n_rows = 0
        self._durable = (0, 0)
        self._torn = False
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Write one frame of all rows. They are durable after the next `sync`.

        Raises:
            SaveError: the frame cannot be written; the file is as it was before, and may be appended to later.
        """
        table = pa.Table.from_batches(batches, schema=SCHEMA)
        # header and body of each frame, written as they lie: a joined copy of megabytes would hold the interpreter's lock
        pieces = [memoryview(piece) for batch in table.combine_chunks().to_batches() for piece in _frame(batch)]
        size = sum(piece.nbytes for piece in pieces)
        try:
            if self._torn:
                self._cut()
            self._torn = True  # until every byte of the frame is there
            written = 0
            for piece in pieces:
                done = 0
                while done < piece.nbytes:
                    done += os.pwrite(self._file, piece[done:], self.n_bytes + written + done)
                written += piece.nbytes
            self._torn = False
        except OSError as error:
            with suppress(OSError):  # else the next append tries again
                self._cut()
            raise _cannot_write(self.path, error) from error
        self.n_bytes += size
        self.n_rows += table.num_rows

    def sync(self) -> None:
        """Make every frame durable.

        Raises:
            SaveError: it cannot be said what is durable. The frames since the last sync are taken back, so that what
                is reported as failed is not found later.
        """
        try:
            os.fsync(self._file)
            if self._durable == (0, 0):
                sync_folder(self.path.parent)
        except OSError as error:
            self.take_back()
            raise _cannot_write(self.path, error) from error
        self._durable = (self.n_bytes, self.n_rows)

    def take_back(self) -> None:
        """Forget every frame since the last `sync`: what is reported as failed must not be found later."""
        self.n_bytes, self.n_rows = self._durable
        self._torn = True
        with suppress(OSError):  # else the next append tries again
            self._cut()

    def close(self) -> None:
        """Close the file; without `sync`."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)  # which lets go of the file whatever it reports

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _cut(self) -> None:
        os.ftruncate(self._file, self.n_bytes)
        self._torn = False


def read_spool(path: Path) -> SpoolRead:
    """Read every frame that is whole.

    Raises:
        FileNotFoundError: there is no such file, or not any more.
        SaveError: the file cannot be read at all. What it holds never raises.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SaveError(
            f"{str(path)!r} cannot be read: {error.strerror or error}; check the disk and permissions"
        ) from error
    batches: list[pa.RecordBatch] = []
    damaged = position = 0
    while position < len(data):
        header = _read_header(data, position)
        if header is not None:
            batch = _read_batch(data, position + _HEADER.size, header)
            if batch is not None:
                batches.append(batch)
                position += _HEADER.size + header[0]
                continue
        following = _next_frame(data, position, header)
        if following is None and _is_torn(data, position, header):
            return SpoolRead(tuple(batches), damaged, len(data) - position)
        damaged += 1
        position = len(data) if following is None else following
    return SpoolRead(tuple(batches), damaged, 0)


def spool_name(day: date, number: int) -> str:
    """`20261122-000000.spool`."""
    return f"{day:%Y%m%d}-{number:06d}{SUFFIX}"


def parse_spool_name(name: str) -> tuple[date, int] | None:
    """Day and number of a name `spool_name` made, or None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return date(int(match[1]), int(match[2]), int(match[3])), int(match[4])
    except ValueError:
        return None


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that a loss of power does not take them away. Raises `OSError`."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):  # another process was faster; a file in the way shows at the first use
        path.mkdir()
    sync_folder(path.parent)


def make_private_folder(path: Path) -> None:
    """As `make_folder`, for its owner alone, whatever the umask: prompts and pictures wait in it. Raises `OSError`.

    One that was there before stays as it is where somebody else owns it.
    """
    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        sync_folder(path.parent)
    held = path.stat()
    if stat.S_IMODE(held.st_mode) & 0o077 and held.st_uid == os.geteuid():
        path.chmod(0o700)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(handle)


def _frame(batch: pa.RecordBatch) -> tuple[bytes, pa.Buffer]:
    """Header and body."""
    payload = pa.BufferOutputStream()
    with pa.ipc.new_stream(payload, SCHEMA) as stream:
        stream.write_batch(batch)
    body = payload.getvalue()
    header = _HEADER.pack(MAGIC, body.size, zlib.crc32(body), 0)[:-4]
    return header + struct.pack("<I", zlib.crc32(header)), body


def _read_header(data: bytes, position: int) -> tuple[int, int] | None:
    """Length and checksum of the payload, or None where no sound header stands."""
    if len(data) - position < _HEADER.size:
        return None
    magic, length, checksum, own = _HEADER.unpack_from(data, position)
    if magic != MAGIC or own != zlib.crc32(data[position : position + _HEADER.size - 4]):
        return None
    return length, checksum


def _read_batch(data: bytes, start: int, header: tuple[int, int]) -> pa.RecordBatch | None:
    length, checksum = header
    if length > len(data) - start:
        return None
    payload = memoryview(data)[start : start + length]
    if zlib.crc32(payload) != checksum:
        return None
    try:
        with pa.ipc.open_stream(pa.py_buffer(payload)) as stream:
            batches = list(stream)
        if len(batches) != 1:
            return None
        batches[0].validate(full=True)
        return upgrade(batches[0])
    except (pa.ArrowException, OSError, ValueError, MemoryError):
        return None


def _next_frame(data: bytes, position: int, header: tuple[int, int] | None) -> int | None:
    """Where reading goes on after a frame that is not whole; None if nothing sound follows."""
    if header is not None:
        stop = position + _HEADER.size + header[0]
        if stop == len(data) or (stop < len(data) and _read_header(data, stop) is not None):
            return stop
    found = data.find(MAGIC, position + 1)
    while found >= 0 and _read_header(data, found) is None:
        found = data.find(MAGIC, found + 1)
    return None if found < 0 else found


def _is_torn(data: bytes, position: int, header: tuple[int, int] | None) -> bool:
    """Whether the rest of the file is the beginning of a frame, or room that a loss of power left empty."""
    rest = len(data) - position
    if header is not None:
        return header[0] > rest - _HEADER.size
    return rest < _HEADER.size or data.count(0, position) == rest


def _cannot_write(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"{str(path)!r} cannot be written: {error.strerror or error}; make room on the disk, or choose another spool folder"
    )
