"""Where a batch writes: a destination of the log's kind, with the plan and the failed rows beside the records.

OUT/plan.json                                  what is being done, written first
OUT/date=<day of the plan>/<plan><shard>-000000.parquet      one a shard; that it is there means that the shard is done
OUT/failed/<shard>.jsonl                       the rows of a shard that failed, written before its records
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.errors import SaveError
from fastattr.log.segments import ROW_GROUP, Destination, open_destination
from fastattr.log.spool import make_folder

PLAN = "plan.json"
_NAMES = re.compile(r"""'[^']*'|"[^"]*"|[^\s:;,]*\d[^\s:;,]*""")  # quoted, or with a digit in it
_FAILURES = re.compile(r"failed/(\d{6,})\.jsonl")


@dataclass(frozen=True)
class Failure:
    """A row that was not explained.

    Attributes:
        id: the caller's; None where the row has no valid one.
        row: file and row in words.
        error_type: name of the exception, or `crashed` where the row ended the process that explained it.
        attempt: how many workers had tried the shard, this one included.
    """

    id: str | None
    row: str
    error_type: str
    error: str
    attempt: int


@dataclass(frozen=True)
class Reason:
    """Why rows failed. Errors that differ only in names and numbers count as one reason.

    Attributes:
        count: number of rows.
        example: one of them.
    """

    count: int
    example: Failure


def reasons_of(failures: Iterable[Failure]) -> tuple[Reason, ...]:
    """The reasons, most frequent first; among equally frequent ones in order of occurrence."""
    alike: dict[tuple[str, str], list[Any]] = {}
    for each in failures:
        counted = alike.setdefault((each.error_type, _NAMES.sub("", each.error)), [0, each])
        counted[0] += 1
    return tuple(sorted((Reason(*counted) for counted in alike.values()), key=lambda reason: -reason.count))


@dataclass(frozen=True)
class Output:
    """Make one with `open_output`."""

    destination: Destination

    @property
    def url(self) -> str:
        return self.destination.url

    def read(self, name: str) -> bytes | None:
        """What is there under a name, or None. Raises `SaveError`."""
        try:
            return self.destination.get(name)
        except SaveError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def write(self, name: str, data: bytes) -> None:
        """Whole and durable, or not at all. Raises `SaveError`."""
        self.destination.put(name, data)

    def publish(self, day: date, writer: str, records: pa.Table) -> None:
        """Put the records of a shard in their place, in one step, also where there are none. Raises `SaveError`."""
        buffer = pa.BufferOutputStream()
        pq.write_table(records, buffer, compression="zstd", row_group_size=ROW_GROUP)
        self.write(f"date={day.isoformat()}/{writer}-000000.parquet", buffer.getvalue().to_pybytes())

    def writers(self) -> frozenset[str]:
        """Whoever has published here. Raises `SaveError`."""
        return frozenset(segment.writer for segment in self.destination.segments())

    def write_failures(self, shard: int, failures: list[Failure]) -> None:
        """Replace what is said of a shard. Raises `SaveError`."""
        name = _failures_name(shard)
        if failures or self.read(name):  # an earlier attempt, which ended before it published, may have had others
            self.write(name, "".join(json.dumps(asdict(each)) + "\n" for each in failures).encode())

    def read_failures(self, shard: int) -> list[Failure]:
        """What `write_failures` wrote. Raises `SaveError`."""
        try:
            return [Failure(**json.loads(line)) for line in (self.read(_failures_name(shard)) or b"").splitlines()]
        except (ValueError, TypeError) as error:
            raise SaveError(
                f"{_failures_name(shard)} in {self.url!r} cannot be read: {error}; delete the output"
            ) from error

    def shards_with_failures(self) -> frozenset[int]:
        """Those `write_failures` wrote about. Raises `SaveError`."""
        if self.destination.is_local:
            folder = Path(self.url) / "failed"
            names = [f"failed/{name}" for name in os.listdir(folder)] if folder.is_dir() else []
        else:
            names = self.destination.names()
        return frozenset(int(match[1]) for name in names if (match := _FAILURES.fullmatch(name)))

    def check_writable(self) -> None:
        """Raises `SaveError` where the output is a local folder that cannot be created or written to."""
        if not self.destination.is_local:
            return
        there = Path(self.url).absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            reason = "is not writable" if there.is_dir() else "is a file"
            raise SaveError(f"{self.url!r} cannot be written: {str(there)!r} {reason}; choose another --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs of this machine off a local folder.

        Raises:
            SaveError: another one is at work there.
        """
        if not self.destination.is_local:
            yield
            return
        folder = Path(self.url)
        try:
            make_folder(folder)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SaveError(
                f"{self.url!r} cannot be written: {error.strerror or error}; choose another --out"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SaveError(
                    f"another batch is at work in {self.url!r}; wait for it, or choose another --out"
                ) from error
            yield
        finally:
            os.close(lock)


def open_output(url: str, storage_options: Mapping[str, Any] | None = None) -> Output:
    """An output at a local path or an fsspec URL. Raises `InputError`."""
    return Output(open_destination(url, storage_options))


def _failures_name(shard: int) -> str:
    return f"failed/{shard:06d}.jsonl"
