"""What the fault suite did, in numbers: shown at the end of a run, and written as JSON lines where asked for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastattr.log import LogStats


@dataclass
class Faults:
    """Of one kind.

    Attributes:
        faults: injected.
        acknowledged: submissions that were said to be durable, or accepted and not counted as dropped or failed; but for
            those whose bytes the fault itself destroyed.
        checked: records that were read back.
        lost: acknowledged and not found.
        duplicates: found more than once.
        counted: dropped or failed, as the logger's own counts say.
    """

    kind: str
    faults: int = 0
    acknowledged: int = 0
    checked: int = 0
    lost: int = 0
    duplicates: int = 0
    counted: int = 0


@dataclass
class FaultCounts:
    kinds: dict[str, Faults] = field(default_factory=dict)

    def add(self, kind: str, **numbers: int) -> None:
        """Raises `TypeError` for a number that is not a field of `Faults`."""
        each = self.kinds.setdefault(kind, Faults(kind))
        added = Faults(kind, **numbers)
        for name, value in asdict(added).items():
            if name != "kind":
                setattr(each, name, getattr(each, name) + value)

    def check(self, kind: str, dest: Path, acknowledged: set[str], *, faults: int, counted: int = 0) -> None:
        """Every acknowledged id is in the segments exactly once; the numbers are kept whatever comes out."""
        found = [row["request_id"] for row in rows_of(dest)]
        lost, twice = acknowledged - set(found), len(found) - len(set(found))
        self.add(
            kind,
            faults=faults,
            acknowledged=len(acknowledged),
            checked=len(found),
            lost=len(lost),
            duplicates=twice,
            counted=counted,
        )
        assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged are not found: {sorted(lost)[:5]}"
        assert not twice, f"{twice} of {len(found)} are found more than once"

    def table(self) -> list[str]:
        names = ("faults", "acknowledged", "checked", "lost", "duplicates", "counted")
        total = Faults("all")
        for each in self.kinds.values():
            for name in names:
                setattr(total, name, getattr(total, name) + getattr(each, name))
        lines = [f"{'':32}" + "".join(f"{name:>14}" for name in names)]
        for each in [*self.kinds.values(), total]:
            lines.append(f"{each.kind:32}" + "".join(f"{getattr(each, name):>14,}" for name in names))
        return lines

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in self.kinds.values()))


def tables_of(dest: Path) -> list[pa.Table]:
    """Every segment, read without the code under test. Raises `pa.ArrowInvalid` where one is torn."""
    return [pq.ParquetFile(path).read() for path in sorted(dest.glob("date=*/*.parquet"))]


def rows_of(dest: Path, *columns: str) -> list[dict[str, Any]]:
    """All rows, of a few columns; by writer and sequence."""
    wanted = list({"record_id", "request_id", "writer", "sequence", *columns})
    rows = [row for table in tables_of(dest) for row in table.select(wanted).to_pylist()]
    return sorted(rows, key=lambda row: (row["writer"], row["sequence"]))


def assert_whole(dest: Path) -> list[dict[str, Any]]:
    """Segments read, ids are unique, and every writer's records are counted from 0 without gaps. Returns all rows."""
    rows = rows_of(dest)
    assert len({row["record_id"] for row in rows}) == len(rows)
    by_writer: dict[str, list[int]] = {}
    for row in rows:
        by_writer.setdefault(row["writer"], []).append(row["sequence"])
    for writer, sequences in by_writer.items():
        assert sequences == list(range(len(sequences))), f"writer {writer} has gaps: {sequences}"
    return rows


def assert_identity(stats: LogStats) -> None:
    dropped, failed = sum(stats.dropped.values()), sum(stats.failed.values())
    assert stats.submitted == stats.written + dropped + failed + stats.in_flight, stats


def counted(stats: LogStats) -> int:
    """What was left out, and said so."""
    return sum(stats.dropped.values()) + sum(stats.failed.values())
