"""A batch from its inputs to its summary: plan, skip what is published, let an engine do the rest, give up on too many faults."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Protocol

from fastattr.batch import local
from fastattr.batch.output import Failure, Reason, open_output, reasons_of
from fastattr.batch.plan import Plan, settle, shard_of
from fastattr.batch.reach import AllowUrls, reach_of
from fastattr.batch.shards import Job, ShardResult, Task, Underway
from fastattr.batch.sources import Fields, find_inputs, litter_in_folders, scan
from fastattr.config import AnyConfig, configure
from fastattr.errors import InputError
from fastattr.log.config import Images
from fastattr.log.record import Content

FIRST_ROWS = 1000  # of these so many may fail as if all had been done, so that a bad start ends nothing

Outcome = Literal["done", "stopped", "too_many_failures"]


class Engine(Protocol):
    """Publishes shards, in any order: `local.run` or `ray_engine.run`, with their options bound by `functools.partial`."""

    def __call__(
        self, job: Job, tasks: Sequence[Task], *, stop: threading.Event
    ) -> Generator[ShardResult | Underway, None, None]: ...


@dataclass(frozen=True)
class Progress:
    """How far a batch is. All counts but those of shards are of rows.

    Attributes:
        total: of the plan.
        done: explained or failed, by this run and earlier ones, in shards that are published or under way.
        failed: of `done`.
        earlier: of `done`, by earlier runs.
        shards, shards_done: of the plan, and published.
    """

    total: int
    done: int
    failed: int
    earlier: int
    shards: int
    shards_done: int


@dataclass(frozen=True)
class Summary:
    """What a batch came to.

    Attributes:
        outcome: `done`, or what ended it before: `stopped` from outside, or `too_many_failures`.
        written: rows with a record.
        failed: rows without one, listed in `failed/`. In a batch that was given up they include rows of unfinished
            shards, which the same call tries again.
        left: all other rows; `total` is `written + failed + left`.
        earlier: rows among those written and failed that were done before this run.
        litter: number of files of macOS or Windows (`._x`, `.DS_Store`, `Thumbs.db`) in the inputs, which were skipped.
        reasons: why rows failed, the most frequent first.
    """

    outcome: Outcome
    total: int
    written: int
    failed: int
    left: int
    earlier: int
    litter: int = 0
    reasons: tuple[Reason, ...] = field(default=(), compare=False)


class Tell(Protocol):
    def __call__(self, progress: Progress) -> None: ...


def run(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str = "shapes",
    attribution: AnyConfig = None,
    fields: Fields | None = None,
    content: Content = "ids",
    images: Images = "hash",
    max_new_tokens: int = 256,
    shard_rows: int = 256,
    limit: int | None = None,
    max_error_rate: float = 0.05,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    input_options: Mapping[str, Any] | None = None,
    allow_urls: AllowUrls = (),
    engine: Engine = local.run,
    stop: threading.Event | None = None,
    tell: Tell = lambda progress: None,
) -> Summary:
    """Explain every row of the inputs into a directory that all readers of `fastattr.log` understand.

    To go on after whatever ended it, call it again: what is published is skipped, and rows that failed are not tried
    again.

    Args:
        inputs: files or folders, see `sources.find_inputs`; fields of a row, see `sources.Fields`.
        out: a directory or fsspec URL, of this batch alone.
        model: what `fastattr.load` takes, or `package.module:function`, called in each worker with the device.
        attribution: an `AttributionConfig`, the name of one, or a mapping of options; `arc` by default.
        content, images: what records keep, as of `LogConfig`.
        max_error_rate: share of failed rows above which the batch is given up; see `Summary.outcome`.
        device: of the models; by default a GPU for each worker where there are some, else the CPU.
        dtype, trust_remote_code: as for `fastattr.load`.
        storage_options, input_options: for fsspec, of the output and of the inputs; images in the store of their input
            are read with the same.
        allow_urls: what rows may name besides files in the folder of their input and URLs of its store: beginnings of
            URLs, such as `https://images.example.org/`, `s3://bucket/pictures/` or `file:///data/pictures/`. A mapping
            gives each its options for fsspec.
        stop: ends the batch soon after it is set.

    Raises:
        DatasetError: an input cannot be read, none of its first rows has a field that every row needs, or most rows repeat the
            id of an earlier row.
        InputError: an option is out of range.
        SaveError: `out` cannot be written, or holds another batch.
        FastattrError: the model cannot be explained, or workers die and no row is to blame.
    """
    if not isinstance(max_error_rate, int | float) or not 0.0 <= max_error_rate <= 1.0:
        raise InputError(f"max_error_rate is {max_error_rate!r}, expected a share from 0 (none) to 1 (all)")
    names = [inputs] if isinstance(inputs, str | Path) else inputs
    fields = Fields() if fields is None else fields
    allowed = {url: dict(options) for url, options in reach_of(None, None, allow_urls).allowed.items()}
    output = open_output(str(out), storage_options)
    plan = Plan(
        day=datetime.now(timezone.utc).date(),
        inputs=(),
        model=model,
        attribution=configure(attribution),
        fields=fields,
        content=content,
        images=images,
        max_new_tokens=max_new_tokens,
        shard_rows=shard_rows,
        limit=limit,
        dtype=dtype,
    )
    output.check_writable()
    paths = find_inputs([str(name) for name in names], input_options)
    plan = replace(plan, inputs=scan(paths, fields, shard_rows, limit, input_options))
    with output.locked():
        plan = settle(plan, output)
        shards, published = plan.shards(), {shard_of(plan.id, writer) for writer in output.writers()}
        earlier = {shard.number: len(shard) for shard in shards if shard.number in published}
        failures = [
            failure
            for each in sorted(output.shards_with_failures() & earlier.keys())
            for failure in output.read_failures(each)
        ]
        job = Job(
            plan, str(out), device, dict(storage_options or {}), dict(input_options or {}), trust_remote_code, allowed
        )
        tasks = [Task(shard) for shard in shards if shard.number not in earlier]
        done = sum(earlier.values())
        count = _Count(Progress(plan.n_rows, done, len(failures), done, len(shards), len(earlier)))
        tell(count.progress)
        stop = threading.Event() if stop is None else stop
        if tasks and not _too_many(count.progress, max_error_rate):
            with closing(engine(job, tasks, stop=stop)) as events:
                for event in events:
                    count.add(event)
                    if isinstance(event, ShardResult) and event.failed:
                        failures += output.read_failures(event.shard)
                    tell(count.progress)
                    if _too_many(count.progress, max_error_rate):
                        break
        too_many = _too_many(count.progress, max_error_rate)
        unpublished = count.unpublished if too_many else {}
        for shard, failed in unpublished.items():  # so that every failure is in a file
            output.write_failures(shard, failed)
            failures += failed
    left = plan.n_rows - count.published.done - sum(map(len, unpublished.values()))
    return Summary(
        outcome="too_many_failures" if too_many else "stopped" if left else "done",
        total=plan.n_rows,
        written=count.published.done - count.published.failed,
        failed=len(failures),
        left=left,
        earlier=done,
        litter=litter_in_folders([str(name) for name in names], input_options)
        + sum(each.n_litter for each in plan.inputs),
        reasons=reasons_of(failures),
    )


class _Count:
    """What is published, and what is under way, which an accident may take back."""

    def __init__(self, published: Progress) -> None:
        self.published = published
        self._underway: dict[int, Underway] = {}

    def add(self, event: ShardResult | Underway) -> None:
        if isinstance(event, Underway):
            self._underway[event.shard] = event
            return
        self._underway.pop(event.shard, None)
        self.published = replace(
            self.published,
            done=self.published.done + event.written + event.failed,
            failed=self.published.failed + event.failed,
            shards_done=self.published.shards_done + 1,
        )

    @property
    def unpublished(self) -> dict[int, list[Failure]]:
        """Failures by unfinished shard."""
        return {shard: list(each.failed) for shard, each in self._underway.items() if each.failed}

    @property
    def progress(self) -> Progress:
        underway = self._underway.values()
        return replace(
            self.published,
            done=self.published.done + sum(each.done for each in underway),
            failed=self.published.failed + sum(len(each.failed) for each in underway),
        )


def _too_many(progress: Progress, max_error_rate: float) -> bool:
    return progress.failed > max_error_rate * max(progress.done, min(progress.total, FIRST_ROWS))
