"""One shard, from rows to one published part. What runs it, a process here or an actor elsewhere, may die at any time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastattr.batch.explaining import OUT_OF_MEMORY, Ready, backing_off, explain_rows, get_ready, load_model
from fastattr.batch.output import Failure, Output
from fastattr.batch.plan import Plan, Shard, writer_of
from fastattr.batch.reach import Reach, reach_of
from fastattr.batch.sources import Fault, Row, read_rows
from fastattr.errors import FastattrError
from fastattr.log.config import Images
from fastattr.log.record import Content, Envelope, to_batch
from fastattr.log.requests import to_png
from fastattr.log.schema import SCHEMA
from fastattr.types import Attribution

if TYPE_CHECKING:
    from fastattr.adapters import Model

CRASHED = "crashed"
MAX_DEATHS = 3  # of workers on one shard, without a row to blame
WINDOW_ROWS = 64  # whose images are in memory
LONGEST_ERROR = 2000  # characters kept of a message

# called with the rows that come next, the number of rows done, and the failures since the last call; may raise `Stopped`
Step = Callable[[Sequence[int], int, Sequence[Failure]], None]


class Stopped(Exception):
    """A worker was told to stop; nothing of its shard is published."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, wherever it is.

    Attributes:
        device: for the model; None lets `fastattr.load` choose.
        storage_options: of the output.
        input_options: of inputs, and of images in the store of their input.
        allow_urls: what else rows may name, see `reach.reach_of`.
        trust_remote_code: as for `fastattr.load`.
    """

    plan: Plan
    out: str
    device: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)  # credentials
    input_options: dict[str, Any] = field(default_factory=dict, repr=False)
    trust_remote_code: bool = False
    allow_urls: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def load_model(self) -> Model:
        """The model of the plan, on the worker's device. Raises as `explaining.load_model` does."""
        return load_model(self.plan.model, self.device, self.plan.dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Task:
    """A shard, and what earlier workers died of. Rows are numbers among all rows of the plan.

    Attributes:
        suspects: rows that were being explained when a worker died; they come first, each alone.
        crashed: rows that ended a worker when they were alone, the second time; they are not tried any more.
        deaths: of workers, without a row to blame.
        attempt: from 1.
    """

    shard: Shard
    suspects: frozenset[int] = frozenset()
    crashed: frozenset[int] = frozenset()
    deaths: int = 0
    attempt: int = 1

    def after_death(self, at: Sequence[int]) -> Task:
        """What to do after a worker died while it was at these rows.

        A row is given up when it has ended two workers: the first may have been killed for another's sake.

        Raises:
            FastattrError: it is no row that ends the workers.
        """
        again = replace(self, attempt=self.attempt + 1)
        if not at:
            if self.deaths + 1 >= MAX_DEATHS:
                raise FastattrError(
                    f"{MAX_DEATHS} workers died at shard {self.shard.number}, and not while they explained a row; what is "
                    "published stays. Find out what ended them (memory?), then run the same command again to go on"
                )
            return replace(again, deaths=self.deaths + 1)
        if len(at) == 1 and at[0] in self.suspects:
            return replace(again, suspects=self.suspects.difference(at), crashed=self.crashed.union(at))
        return replace(again, suspects=self.suspects.union(at))


@dataclass(frozen=True)
class ShardResult:
    """A shard that is published. Counts are of rows."""

    shard: int
    written: int
    failed: int


@dataclass(frozen=True)
class Underway:
    """Progress of a worker on a shard.

    Attributes:
        done: number of rows.
        failed: the failed ones among them, of this attempt.
    """

    shard: int
    done: int
    failed: tuple[Failure, ...]


def run_shard(
    model: Model, job: Job, task: Task, output: Output, step: Step = lambda rows, done, failed: None
) -> ShardResult:
    """Explain the rows of a shard and publish them: failed rows first, then, in one step, the records.

    Rows that were explained before a death or a stop are explained again: nothing of a shard lasts until all of it does.

    Args:
        step: told before every step, so that a death can be blamed on its rows.

    Raises:
        Stopped: by `step`.
        DatasetError: the input is not any more what was planned.
        SaveError: the output cannot be written.
        UnsupportedModelError, BackendError: no row can be explained.
    """
    plan, shard = job.plan, task.shard
    records: dict[int, pa.RecordBatch] = {}
    failures: dict[int, Failure] = {}
    n_told = 0

    def fail(row: Row | Fault, kind: str, error: str) -> None:
        shown = error if len(error) <= LONGEST_ERROR else error[: LONGEST_ERROR - 3] + "..."
        failures[row.number] = Failure(row.id, row.place, kind, shown, task.attempt)

    def telling(rows: Sequence[int]) -> None:
        nonlocal n_told
        fresh = list(islice(failures.values(), n_told, None))
        n_told = len(failures)
        step(rows, len(records) + len(failures), fresh)

    def explain(rows: Sequence[Ready]) -> list[pa.RecordBatch | Exception]:
        telling([each.row.number for each in rows])
        began, began_s = datetime.now(timezone.utc), time.monotonic()
        explained = explain_rows(model, rows, plan.attribution, plan.max_new_tokens)
        explain_ms = 1e3 * (time.monotonic() - began_s) / len(rows)
        return [
            why if isinstance(why, Exception) else _record(plan, shard, each, why, began, explain_ms)
            for each, why in zip(rows, explained, strict=True)
        ]

    reach = reach_of(plan.inputs[shard.input].folder, job.input_options, job.allow_urls)
    telling(())
    for window in _windows(job, task, reach):
        ready = []
        for row in window:
            if isinstance(row, Fault):
                fail(row, type(row.error).__name__, str(row.error))
            elif row.number in task.crashed:
                fail(row, CRASHED, "the process that explained it ended, twice")
            else:
                telling((row.number,))
                try:
                    ready.append(get_ready(row, reach))
                except OUT_OF_MEMORY:
                    raise
                except Exception as error:  # of a decoder or a file system
                    fail(row, type(error).__name__, str(error))
        for each, record in backing_off(sorted(ready, key=lambda each: each.size), explain):
            if isinstance(record, Exception):
                fail(each.row, type(record).__name__, str(record))
            else:
                records[each.row.number] = record
        telling(())  # to read on, or to publish, is no row's fault
    output.write_failures(shard.number, [failures[number] for number in sorted(failures)])
    output.publish(plan.day, writer_of(plan.id, shard.number), _in_order(records))
    return ShardResult(shard.number, len(records), len(failures))


def _windows(job: Job, task: Task, reach: Reach) -> Iterator[list[Row | Fault]]:
    """The suspects one by one, then the others."""
    suspects = (
        (row for row in _rows(job, task.shard, reach) if row.number in task.suspects) if task.suspects else iter(())
    )
    for row in suspects:
        yield [row]
    others = (row for row in _rows(job, task.shard, reach) if row.number not in task.suspects)
    while window := list(islice(others, WINDOW_ROWS)):
        yield window


def _rows(job: Job, shard: Shard, reach: Reach) -> Iterator[Row | Fault]:
    source = job.plan.inputs[shard.input]
    return read_rows(
        source, shard.start, shard.stop, shard.offset, shard.first, job.plan.fields, job.input_options or None, reach
    )


def _record(
    plan: Plan, shard: Shard, each: Ready, why: Attribution, began: datetime, explain_ms: float
) -> pa.RecordBatch | Exception:
    row = each.row
    envelope = make_envelope(
        each,
        why,
        record_id=hashlib.sha256(f"{plan.id}/{row.number}".encode()).hexdigest()[:32],
        writer=writer_of(plan.id, shard.number),
        sequence=0,  # is known when all rows are there
        metadata={"input": plan.inputs[shard.input].name, "row": row.number - shard.first + shard.start + 1},
        began=began,
        explain_ms=explain_ms,
        images=plan.images,
    )
    return to_record(why, envelope, plan.content)


def make_envelope(
    each: Ready,
    why: Attribution,
    *,
    record_id: str,
    writer: str,
    sequence: int,
    metadata: dict[str, Any],
    began: datetime,
    explain_ms: float,
    images: Images,
) -> Envelope:
    """What is known of a row besides its attribution; `request_id` is its id."""
    return Envelope(
        record_id=record_id,
        request_id=each.row.id,
        time=began,
        writer=writer,
        sequence=sequence,
        model_revision=None,
        trace_id=None,
        span_id=None,
        error=False,
        metadata=metadata,
        image_sha256=None if images == "none" else tuple(hashlib.sha256(data).hexdigest() for data in each.images),
        images=tuple(to_png(frames[0]) for frames in why.pictures) if images == "store" else None,
        queued_ms=0.0,
        explain_ms=explain_ms,
    )


def to_record(why: Attribution, envelope: Envelope, content: Content) -> pa.RecordBatch | Exception:
    """One row of the log's schema, or why there can be none."""
    try:
        return to_batch(why, envelope, content)
    except Exception as error:
        return error


def _in_order(records: dict[int, pa.RecordBatch]) -> pa.Table:
    """In the order of the rows, numbered without gaps."""
    table = pa.Table.from_batches([records[number] for number in sorted(records)], schema=SCHEMA)
    place = SCHEMA.get_field_index("sequence")
    return table.set_column(place, SCHEMA.field(place), pa.array(np.arange(len(records)), pa.int64()))
