"""Is anything lost? Every record, the spool and what the writers counted, held against each other.

A writer numbers its records from 0 without gaps and tells in its tally how many are durable, so what is missing shows:
at the start, in the middle and at the end. What was never durable (in flight when a process was killed) is no loss.
"""

from __future__ import annotations

import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastattr.errors import SaveError
from fastattr.log.config import LogConfig
from fastattr.log.reading import Damaged, Tally, open_log, tallies
from fastattr.log.rooms import is_live
from fastattr.log.spool import SUFFIX, read_spool

_DAY = re.compile(r"/date=(\d{4}-\d{2}-\d{2})/[^/]*$")
_KEYS = ("record_id", "writer", "sequence")
_SHOWN = 20  # findings and notes of one kind that are printed


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: `lost` (durable once, not there any more), `damaged` (cannot be read), `duplicate` (there more than once),
            `miscounted` (a tally that does not add up) or `given_up` (a request that no worker could explain).
        n: how many records, files or requests.
        what: in plain words.
    """

    kind: Literal["lost", "damaged", "duplicate", "miscounted", "given_up"]
    n: int
    what: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        segments, records, n_bytes: readable and published.
        spooled: records that are durable in the spool and not published yet.
        requests: durable requests that wait for a worker.
        writers, submitted, dropped, failed: of all tallies.
        findings: what is wrong; empty when nothing is.
        notes: what is as it should be, and good to know.
    """

    dest: str
    segments: int
    records: int
    n_bytes: int
    spooled: int
    requests: int
    writers: int
    submitted: int
    dropped: Mapping[str, int]
    failed: Mapping[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return not self.findings

    @property
    def lost(self) -> int:
        """Records that were durable and are gone."""
        return sum(finding.n for finding in self.findings if finding.kind == "lost")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "healthy": self.healthy, "lost": self.lost}

    def __str__(self) -> str:
        lines = [
            f"{self.dest}: {_n(self.records, 'record')} in {_n(self.segments, 'segment')}, {self.n_bytes / 1e6:.1f} MB",
            f"{_n(self.spooled, 'record')} in the spool, {_n(self.requests, 'request')} for a worker",
            f"{_n(self.submitted, 'response')} submitted to {_n(self.writers, 'writer')}; dropped: "
            f"{_reasons(self.dropped)}; failed: {_reasons(self.failed)}",
        ]
        lines += _some([f"note: {note}" for note in self.notes])
        lines += _some([f"{finding.kind.replace('_', ' ').upper()}: {finding.what}" for finding in self.findings])
        lines.append("Nothing is lost or damaged." if self.healthy else f"{_n(self.lost, 'record')} lost.")
        return "\n".join(lines)


def examine(
    dest: str | Path, spool: str | Path | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> Diagnosis:
    """Read everything and say what is missing or broken. Nothing is changed, and writers may go on meanwhile.

    Args:
        spool: where the writers of this machine keep their rooms; by default where they do unless told otherwise.

    Raises:
        SaveError: the destination or the spool cannot be read.
    """
    # in the order in which records move, so that one which moves meanwhile is seen twice and never missed
    told, broken = tallies(dest, storage_options)
    rooms = LogConfig(str(dest)).spool_path if spool is None else Path(spool)
    waiting = _read_spool(rooms, required=spool is not None)
    log = open_log(dest, storage_options)
    read = [_read_segment(log.dataset.filesystem, path) for path in log.segments]

    published = pa.concat_tables([_no_keys(), *(each.keys for each in read)])
    everywhere = pa.concat_tables([published, waiting.keys])
    days = [date.fromisoformat(day) for path in log.segments for day in _DAY.findall(path)]
    damaged = [*log.damaged, *(each.damaged for each in read if each.damaged), *broken, *waiting.damaged]
    beside = _is_beside(rooms, dest)
    elsewhere = {t.writer for t in told if not t.closed and not (waiting.exists and (beside or _is_here(t)))}
    missing, notes = _missing(everywhere, told, min(days, default=None), elsewhere)
    findings = [
        *(Finding("damaged", 1, f"{each.path}: {each.reason}") for each in damaged),
        *missing,
        *_duplicates(published),
        *_miscounted(told),
    ]
    if waiting.given_up:
        findings.append(
            Finding(
                "given_up",
                waiting.given_up,
                f"{_n(waiting.given_up, 'request')} crashed every worker, see inbox/given_up",
            )
        )
    return Diagnosis(
        dest=str(dest),
        segments=len(log.segments),
        records=published.num_rows,
        n_bytes=log.n_bytes,
        spooled=waiting.keys.num_rows,
        requests=waiting.requests,
        writers=len(told),
        submitted=sum(tally.submitted for tally in told),
        dropped=_sum(tally.dropped for tally in told),
        failed=_sum(tally.failed for tally in told),
        findings=tuple(findings),
        notes=(*notes, *waiting.notes, *_states(told, waiting.live, known=waiting.exists)),
    )


# --- segments --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Segment:
    keys: Any  # pyarrow.Table of _KEYS
    damaged: Damaged | None


def _read_segment(filesystem: Any, path: str) -> _Segment:
    """Keys of the rows of a segment, all of whose bytes are read."""
    keys = [_no_keys()]
    try:
        with filesystem.open_input_file(path) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            for group in range(file.num_row_groups):
                keys.append(file.read_row_group(group).select(_KEYS).cast(_no_keys().schema))
    except FileNotFoundError:  # it expired meanwhile
        return _Segment(_no_keys(), None)
    except (pa.ArrowException, OSError) as error:
        return _Segment(pa.concat_tables(keys), Damaged(path, " ".join(str(error).split())[:300]))
    return _Segment(pa.concat_tables(keys), None)


def _no_keys() -> Any:
    types = {"record_id": pa.string(), "writer": pa.string(), "sequence": pa.int64()}
    return pa.schema(types).empty_table()


# --- the spool -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Spool:
    keys: Any
    damaged: tuple[Damaged, ...]
    notes: tuple[str, ...]
    live: frozenset[str]
    requests: int
    given_up: int
    exists: bool


def _read_spool(spool: Path, *, required: bool) -> _Spool:
    if required and not spool.is_dir():
        raise SaveError(f"{str(spool)!r} is not a directory; give the spool that the logger was given, or leave it out")
    keys, damaged, notes, live = [_no_keys()], [], [], set()
    for room in _folders(spool / "rooms"):
        if alive := is_live(spool, room.name):
            live.add(room.name)
        left = 0
        for path in sorted(room.iterdir()):
            if path.name.endswith(".damaged"):
                damaged.append(Damaged(str(path), "was damaged when it was published; what could be read of it is"))
            if path.suffix != SUFFIX:
                continue
            try:
                read = read_spool(path)
            except FileNotFoundError:  # published meanwhile
                continue
            keys += [pa.Table.from_batches([batch]).select(_KEYS).cast(_no_keys().schema) for batch in read.batches]
            left += sum(batch.num_rows for batch in read.batches)
            if read.damaged_frames:
                damaged.append(Damaged(str(path), f"{_n(read.damaged_frames, 'frame')} cannot be read"))
            if read.torn_bytes and not alive:
                notes.append(f"{path} ends in {_n(read.torn_bytes, 'byte')} that were never acknowledged as written")
        if not alive and left:
            notes.append(f"{_n(left, 'record')} of a process that is gone ({room.name}); the next start publishes them")
    inbox = spool / "inbox"
    return _Spool(
        keys=pa.concat_tables(keys),
        damaged=tuple(damaged),
        notes=tuple(notes),
        live=frozenset(live),
        requests=sum(1 for pattern in ("*.request", "claimed/*/*.request") for _ in inbox.glob(pattern)),
        given_up=sum(1 for _ in (inbox / "given_up").glob("*.request")),
        exists=spool.is_dir(),
    )


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SaveError(f"{str(parent)!r} cannot be read: {error.strerror or error}; check the permissions") from error


# --- holding them against each other ---------------------------------------------------------------


def _missing(
    keys: Any, told: Sequence[Tally], first_day: date | None, elsewhere: Set[str]
) -> tuple[list[Finding], list[str]]:
    """What is not there of each writer: before its first record, between two, and behind its last.

    The last ones of a writer in `elsewhere` may lie in a spool that cannot be seen from here.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for writer, sequence in zip(keys["writer"].to_pylist(), keys["sequence"].to_pylist(), strict=True):
        numbers[writer].add(sequence)
    tally_of = {tally.writer: tally for tally in told}
    findings, notes = [], []
    for writer in sorted(numbers.keys() | tally_of.keys()):
        there, tally = numbers.get(writer, set()), tally_of.get(writer)
        first, end = min(there, default=0), max(there, default=-1) + 1
        gaps = end - first - len(there)
        if gaps:
            findings.append(
                Finding("lost", gaps, f"{_n(gaps, 'record')} of writer {writer} between {first} and {end - 1}")
            )
        durable = 0 if tally is None else tally.written - tally.handed_over
        if durable > end:
            what = (
                f"{_n(durable - end, 'record')} of writer {writer} behind {end - 1}"
                if end
                else (f"all {_n(durable, 'record')} of writer {writer}")
            )
            expired = not there and tally is not None and first_day is not None and tally.updated.date() < first_day
            if expired:
                notes.append(f"{what} were written before the first day that is kept ({first_day})")
            elif tally is not None and writer in elsewhere:
                notes.append(f"{what} wait in its spool on {tally.host}; run the doctor there")
            else:
                findings.append(Finding("lost", durable - end, f"{what}, which its tally counts as written"))
        elif tally is not None and tally.closed and durable < end:
            findings.append(
                Finding(
                    "miscounted",
                    end - durable,
                    f"writer {writer} closed at {_n(durable, 'record')}, but {end} are numbered",
                )
            )
        if first:
            if tally is not None and first_day is not None and tally.started.date() >= first_day:
                findings.append(Finding("lost", first, f"the first {_n(first, 'record')} of writer {writer}"))
            else:
                notes.append(f"writer {writer} begins at record {first}; older days have expired")
    return findings, notes


def _duplicates(published: Any) -> Iterator[Finding]:
    counts = pc.value_counts(published["record_id"])
    for pair in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        yield Finding("duplicate", pair["counts"] - 1, f"record {pair['values']} is there {pair['counts']} times")


def _miscounted(told: Sequence[Tally]) -> Iterator[Finding]:
    for tally in told:
        landed = tally.written + sum(tally.dropped.values()) + sum(tally.failed.values()) + tally.in_flight
        if landed != tally.submitted:
            yield Finding(
                "miscounted",
                abs(landed - tally.submitted),
                f"writer {tally.writer} was given {tally.submitted} and accounts for {landed}",
            )


def _states(told: Sequence[Tally], live: frozenset[str], *, known: bool) -> Iterator[str]:
    """Writers that did not say goodbye."""
    for tally in told:
        if tally.closed or tally.writer in live:
            continue
        if not known or not _is_here(tally):
            yield f"writer {tally.writer} on {tally.host} is running or was killed; its spool is not here to tell"
        else:
            yield (
                f"writer {tally.writer} was killed after {tally.updated:%Y-%m-%d %H:%M:%S} UTC; of {tally.submitted} "
                f"submitted by then {tally.in_flight} were in flight"
            )


def _is_here(tally: Tally) -> bool:
    return tally.host == socket.gethostname()


def _is_beside(rooms: Path, dest: str | Path) -> bool:
    """Whether the spool lies in the destination, so that all of its writers' rooms are seen from any machine."""
    return rooms.resolve() == (Path(dest) / "spool").resolve()


# --- words -----------------------------------------------------------------------------------------


def _sum(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return {reason: n for reason, n in total.most_common() if n}


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"... and {more} more like these"] if more > 0 else [])]


def _n(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")
