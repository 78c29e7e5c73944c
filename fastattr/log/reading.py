"""Readers of a log: records, summaries, trends, SQL and exports, over the published segments of any store.

A file that is not a segment (torn, foreign, of a newer version) is named once in a warning and left out; the rest reads.
SQL sees the segments as Arrow data through a connection without any access to files, the network or settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from fastattr.errors import InputError, SaveError
from fastattr.log.record import Record, from_batch
from fastattr.log.schema import SCHEMA, SCHEMA_VERSION, columns_of
from fastattr.storage import whole_file

Order = Literal["newest", "oldest", "lowest_evidence"]
Format = Literal["jsonl", "parquet", "html"]

logger = logging.getLogger("fastattr")

_ORDERS = {
    "newest": "time DESC, record_id",
    "oldest": "time, record_id",
    # a record without evidence has nothing to be low; DuckDB counts NaN as the largest number
    "lowest_evidence": "mean_evidence NULLS LAST, time DESC, record_id",
}
MAX_QUERY_S = 120.0
MAX_QUERY_BYTES = 1 << 32  # of DuckDB at work, and of an answer
_FETCHED_AT_ONCE = 32  # records held in memory while reading whole rows, tens of kilobytes each
_LOOKED_AT_ONCE = 16  # footers read side by side: a store answers each in tens of milliseconds
_ROWS_AT_ONCE = 2048  # of an answer
_ROW_GROUP = 64  # rows of an exported file that are found and read together
_SURROGATE = re.compile("[\ud800-\udfff]")
# in what DuckDB says when its input breaks off
_ARROW_FAILED = ("IOError", "OSError", "FileNotFoundError", "ArrowInvalid")
_SAFE_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")
_PARQUET = ds.ParquetFileFormat()


@dataclass(frozen=True)
class Damaged:
    """A file among the segments that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Tally:
    """What one writer counted of itself: `submitted = written + dropped + failed + in_flight`."""

    writer: str
    pid: int
    host: str
    started: datetime
    updated: datetime
    closed: bool
    submitted: int
    written: int
    dropped: Mapping[str, int]
    failed: Mapping[str, int]
    in_flight: int
    damaged_frames: int
    handed_over: int = 0  # of the written: durable as requests for a worker, which writes their records


@dataclass(frozen=True, eq=False)
class Log:
    """What a destination held when it was opened. Segments never change, so this view stays whole.

    Attributes:
        dest: as it was given.
        segments: paths of the readable files, oldest day first.
        n_bytes: of all of them.
        damaged: files among them that do not read as segments.
        dataset: all rows as a `pyarrow.dataset`, of `schema.SCHEMA`.
    """

    dest: str
    segments: tuple[str, ...]
    n_bytes: int
    damaged: tuple[Damaged, ...]
    dataset: Any = field(repr=False)


Source = str | Path | Log


@dataclass(frozen=True)
class Filters:
    """Which records: all of these hold. Times are aware; `since <= time < until`."""

    model: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    errors_only: bool = False
    search: str | None = None  # a part of the request id, in any case
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            when = getattr(self, name)
            if when is not None and when.tzinfo is None:
                raise InputError(f"{name} is {when}, which has no time zone; give one, for example timezone.utc")


@dataclass(frozen=True)
class Summary:
    """A record without its tokens and maps; the names are the columns of `schema.SCHEMA`."""

    record_id: str
    request_id: str
    time: datetime
    model: str
    model_revision: str | None
    source: str
    error: bool
    n_tokens: int
    mean_log_prob: float
    mean_evidence: float | None
    min_evidence: float | None
    low_evidence: int | None
    mean_image_share: float
    response: str | None


@dataclass(frozen=True)
class Baseline:
    """The first responses of a model's newest version: what later ones are compared with.

    Attributes:
        n: how many.
        evidence: means over the tokens of each that has it, in nats.
        image_share: means over the tokens of each.
    """

    revision: str | None
    n: int
    evidence: tuple[float, ...]
    image_share: tuple[float, ...]


@dataclass(frozen=True)
class Bin:
    """The records of one stretch of time. Means are over responses, not tokens."""

    start: datetime
    n: int
    n_evidence: int  # responses that have evidence
    evidence: float | None
    image_share: float | None
    errors: int


# --- opening ---------------------------------------------------------------------------------------


def open_log(dest: Source, storage_options: Mapping[str, Any] | None = None) -> Log:
    """List the segments of a directory or fsspec URL and check each one's footer; what was checked is remembered.

    Raises:
        SaveError: the destination does not exist or cannot be listed.
    """
    if isinstance(dest, Log):
        return dest
    filesystem, root = _filesystem(dest, storage_options)
    found = _files(filesystem, root, dest)
    with ThreadPoolExecutor(_LOOKED_AT_ONCE, thread_name_prefix="fastattr-footers") as pool:
        checked = list(pool.map(lambda each: _look(filesystem, *each), found))
    sound = [
        (path, size, it)
        for (path, size, _), it in zip(found, checked, strict=True)
        if it is not None and not isinstance(it, Damaged)
    ]
    return Log(
        dest=str(dest),
        segments=tuple(path for path, _, _ in sound),
        n_bytes=sum(size for _, size, _ in sound),
        damaged=tuple(it for it in checked if isinstance(it, Damaged)),
        dataset=ds.FileSystemDataset([it for _, _, it in sound], SCHEMA, _PARQUET, _arrow(filesystem)),
    )


def _filesystem(dest: str | Path, storage_options: Mapping[str, Any] | None) -> tuple[Any, str]:
    if "://" not in str(dest):  # fsspec would read more into some names of folders
        return fsspec.filesystem("file"), os.path.abspath(dest)
    try:
        filesystem, root = url_to_fs(str(dest), **(storage_options or {}))
    except (ImportError, ValueError, TypeError) as error:
        raise InputError(
            f"{str(dest)!r} cannot be opened: {error}; give a directory, or the URL of a store that fsspec knows"
        ) from error
    return filesystem, root.rstrip("/")


def _is_local(filesystem: Any) -> bool:
    return isinstance(filesystem, fsspec.get_filesystem_class("file"))


def _arrow(filesystem: Any) -> Any:
    return pafs.LocalFileSystem() if _is_local(filesystem) else pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))


def _files(filesystem: Any, root: str, dest: object, pattern: str = "date=*/*.parquet") -> list[tuple[str, int, str]]:
    """Path, bytes and a mark of the version of every file of `pattern`, sorted; names that begin with a dot are not ours."""
    if _is_local(filesystem):
        if not Path(root).is_dir():
            raise SaveError(f"{str(dest)!r} is not a directory; give the destination that the logger writes to")
        found = []
        for path in Path(root).glob(pattern):
            try:
                status = path.stat()
            except FileNotFoundError:  # it expired, or was a file that is renamed now
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((str(path), status.st_size, str(status.st_mtime_ns)))
    else:
        folder, name = pattern.split("/")
        wanted = re.compile(re.escape(root) + "/" + "/".join(part.replace("*", "[^/]*") for part in (folder, name)))
        try:
            filesystem.invalidate_cache()  # another process publishes while this one looks
            listed = filesystem.find(root, detail=True).values()
        except Exception as error:  # each store has errors of its own
            raise SaveError(
                f"{str(dest)!r} cannot be listed: {error!r}; check the address and the permissions"
            ) from error
        found = [
            (info["name"], int(info["size"]), str(info.get("ETag") or info.get("mtime") or info.get("created")))
            for info in listed
            if wanted.fullmatch(info["name"])
        ]
    return sorted(each for each in found if not each[0].rsplit("/", 1)[-1].startswith("."))


def _look(filesystem: Any, path: str, size: int, version: str) -> Any:
    """As `_check`; None for a file that has expired since it was listed."""
    try:
        return _check(filesystem, path, size, version)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=1 << 16)
def _check(filesystem: Any, path: str, size: int, version: str) -> Any:
    """The file as a fragment of a dataset with its footer read, or why it is none. A footer is read once a version."""
    arrow = _arrow(filesystem)
    try:
        with arrow.open_input_file(path) as file:
            schema = pq.read_schema(file)
        stored = (schema.metadata or {}).get(b"fastattr.schema_version", b"").decode("ascii", "replace")
        if not stored:
            raise pa.ArrowInvalid("a Parquet file, but not of this log: its schema has no version")
        if not stored.isdigit() or int(stored) > SCHEMA_VERSION:
            raise pa.ArrowInvalid(
                f"schema version {stored}, this fastattr reads up to {SCHEMA_VERSION}; use a newer one"
            )
        if not schema.equals(columns_of(int(stored)), check_metadata=False):
            raise pa.ArrowInvalid(f"its columns are not those of schema version {stored}")
        fragment = _PARQUET.make_fragment(path, arrow)
        fragment.ensure_complete_metadata()
        return fragment
    except FileNotFoundError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None or not isinstance(error, pa.ArrowException | OSError):
            # the store's own trouble, not the file's: to be told, and not to be remembered
            raise SaveError(f"{path!r} cannot be read: {error}; check the permissions and try again") from error
        reason = " ".join(str(error).split())[:300]
        logger.warning("%r is among the segments but cannot be read as one: %s", path, reason)
        return Damaged(path, reason)


def tallies(
    dest: str | Path, storage_options: Mapping[str, Any] | None = None
) -> tuple[tuple[Tally, ...], tuple[Damaged, ...]]:
    """What every writer counted of itself, the first started first, and tallies that cannot be read.

    Raises:
        SaveError: the destination cannot be listed.
    """
    filesystem, root = _filesystem(dest, storage_options)
    read, damaged = [], []
    for path, _, _ in _files(filesystem, root, dest, "writers/*.json"):
        try:
            read.append(_tally(json.loads(filesystem.cat_file(path))))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            damaged.append(Damaged(path, f"not a tally: {error!r}"[:300]))
    return tuple(sorted(read, key=lambda tally: (tally.started, tally.writer))), tuple(damaged)


def _tally(stored: Mapping[str, Any]) -> Tally:
    counts = {name: int(stored[name]) for name in ("pid", "submitted", "written", "in_flight", "damaged_frames")}
    return Tally(
        writer=str(stored["writer"]),
        host=str(stored["host"]),
        started=_aware(datetime.fromisoformat(stored["started"].replace("Z", "+00:00"))),
        updated=_aware(datetime.fromisoformat(stored["updated"].replace("Z", "+00:00"))),
        closed=bool(stored["closed"]),
        dropped={str(reason): int(n) for reason, n in stored["dropped"].items()},
        failed={str(reason): int(n) for reason, n in stored["failed"].items()},
        handed_over=int(stored.get("handed_over", 0)),
        **counts,
    )


def _aware(when: datetime) -> datetime:
    return when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when


# --- SQL -------------------------------------------------------------------------------------------


@contextmanager
def _connect(log: Log) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that sees the records and nothing else: no file, no network, no setting can be reached from it."""
    closed = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    connection = duckdb.connect(":memory:", config=closed)  # type: ignore[arg-type]
    try:
        connection.execute("SET TimeZone = 'UTC'; SET python_enable_replacements = false; SET temp_directory = ''")
        connection.execute(f"SET memory_limit = '{MAX_QUERY_BYTES}B'")
        connection.register("records", log.dataset)
        connection.execute(
            "CREATE VIEW tokens AS "
            "SELECT record_id, request_id, time, model, unnest(tokens, max_depth := 2) FROM records"
        )
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
        yield connection
    finally:
        connection.close()


def _select(log: Log, sql: str, parameters: Sequence[Any] = ()) -> Any:
    """The rows of `sql` as an Arrow table; parameters are bound, never pasted.

    Raises:
        InputError: it is wrong, or takes longer than `MAX_QUERY_S` or more memory than `MAX_QUERY_BYTES`.
        SaveError: a segment cannot be read.
    """
    late = threading.Event()
    with _connect(log) as connection:

        def stop() -> None:
            late.set()
            connection.interrupt()

        timer = threading.Timer(MAX_QUERY_S, stop)
        timer.daemon = True
        timer.start()
        try:
            relation = connection.sql(sql, params=list(parameters))
            return pa.table({}) if relation is None else _bounded(relation, late)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if late.is_set() or isinstance(error, duckdb.InterruptException):
                raise InputError(
                    f"the query takes longer than {MAX_QUERY_S:.0f} s; ask for less, for example with a WHERE on time"
                ) from error
            if any(sign in str(error) for sign in _ARROW_FAILED):
                raise _unreadable(log, error) from error
            raise InputError(f"the query cannot be answered: {_visible(str(error))}") from error
        finally:
            timer.cancel()
            timer.join()  # it may be interrupting the connection, which is closed next


def _bounded(relation: Any, late: threading.Event) -> Any:
    """All rows of an answer, as long as they fit. Raises `InputError`."""
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch  # as DuckDB before 1.4 calls it
    reader = read(_ROWS_AT_ONCE)
    batches, n_bytes = [], 0
    for batch in reader:
        n_bytes += batch.nbytes
        if n_bytes > MAX_QUERY_BYTES:
            raise InputError(
                f"the answer of the query is larger than {MAX_QUERY_BYTES >> 20} MiB; ask for fewer rows or columns, with LIMIT "
                "or an aggregate"
            )
        if late.is_set():
            raise duckdb.InterruptException("it takes too long")
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=reader.schema)


def _visible(text: str) -> str:
    """With control characters as escapes: what DuckDB says quotes values, which a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def query(dest: Source, sql: str, *, storage_options: Mapping[str, Any] | None = None) -> Any:
    """Answer SQL (DuckDB's) over the views `records`, one row a response, and `tokens`, one row a token.

    Returns:
        `pyarrow.Table`.

    Raises:
        InputError: the SQL is wrong, or asks for anything but the records.
        SaveError: the destination cannot be read.
    """
    return _select(open_log(dest, storage_options), sql)


# --- records ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """Finds a row again; the time tells which row groups need not be read."""

    record_id: str
    time: datetime


def read(
    dest: Source,
    *,
    where: str | None = None,
    request_id: str | None = None,
    record_id: str | None = None,
    limit: int | None = None,
    order_by: Order = "newest",
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Record]:
    """Records with their attributions, read a few at a time.

    Args:
        where: an SQL condition over the columns of `schema.SCHEMA`, for example `mean_evidence < 0.5`.
        request_id, record_id: exactly this one.

    Raises:
        InputError: the order is unknown or the condition is wrong.
        SaveError: the destination cannot be read.
    """
    log = open_log(dest, storage_options)
    keys = _keys(log, where, request_id, record_id, limit, order_by)
    return (record for batch in _rows(log, keys) for record in from_batch(batch))


def _keys(
    log: Log,
    where: str | None = None,
    request_id: str | None = None,
    record_id: str | None = None,
    limit: int | None = None,
    order_by: Order = "newest",
) -> list[_Key]:
    conditions: list[str] = []
    parameters: list[Any] = []
    for column, value in (("request_id", request_id), ("record_id", record_id)):
        if value is not None:
            conditions.append(f"{column} = ?")
            parameters.append(_sql_text(value))
    if where is not None:
        conditions.append(f"({where}\n)")  # the line break ends a comment the condition may end with
    sql = f"SELECT record_id, time FROM records{_where(conditions)} ORDER BY {_order(order_by)}"
    if limit is not None:
        sql += " LIMIT ?"
        parameters.append(_natural("limit", limit))
    return [_Key(**row) for row in _select(log, sql, parameters).to_pylist()]


def _rows(log: Log, keys: Sequence[_Key], columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Whole rows in the order of `keys`, some at a time: record batches."""
    for begin in range(0, len(keys), _FETCHED_AT_ONCE):
        chunk = keys[begin : begin + _FETCHED_AT_ONCE]
        table = _fetch(log, chunk, columns)
        place = {record_id: i for i, record_id in enumerate(table["record_id"].to_pylist())}
        order = [place[key.record_id] for key in chunk if key.record_id in place]  # what expired meanwhile is gone
        yield from table.take(order).combine_chunks().to_batches()


def _fetch(log: Log, keys: Sequence[_Key], columns: Sequence[str] | None) -> Any:
    stamp = SCHEMA.field("time").type
    wanted = [
        (ds.field("time") == pa.scalar(key.time, stamp)) & (ds.field("record_id") == key.record_id) for key in keys
    ]
    with _reading(log):
        return log.dataset.to_table(filter=reduce(operator.or_, wanted), columns=columns)


@contextmanager
def _reading(log: Log) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(log, error) from error


def _unreadable(log: Log, error: Exception) -> SaveError:
    return SaveError(f"records of {log.dest!r} cannot be read: {error}; fastattr log doctor names the damaged segment")


def summaries(
    dest: Source,
    filters: Filters = Filters(),
    *,
    order_by: Order = "newest",
    limit: int | None = 50,
    offset: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Summary]:
    """Records without tokens and maps, one page of them.

    Raises:
        InputError: the order is unknown, or a number is negative.
        SaveError: the destination cannot be read.
    """
    conditions, parameters = _conditions(filters)
    columns = ", ".join(each.name for each in fields(Summary))
    sql = f"SELECT {columns} FROM records{_where(conditions)} ORDER BY {_order(order_by)} LIMIT ? OFFSET ?"
    parameters += [None if limit is None else _natural("limit", limit), _natural("offset", offset)]
    return [Summary(**row) for row in _select(open_log(dest, storage_options), sql, parameters).to_pylist()]


def count(dest: Source, filters: Filters = Filters()) -> int:
    """How many records `filters` leave. Raises as `summaries`."""
    conditions, parameters = _conditions(filters)
    sql = f"SELECT count(*) AS n FROM records{_where(conditions)}"
    return int(_select(open_log(dest), sql, parameters).to_pylist()[0]["n"])


def models(dest: Source) -> list[tuple[str, int]]:
    """Names of the models and how many records each has, most first. Raises as `summaries`."""
    rows = _select(open_log(dest), "SELECT model, count(*) AS n FROM records GROUP BY model ORDER BY n DESC, model")
    return [(row["model"], row["n"]) for row in rows.to_pylist()]


def evidence_of(dest: Source, page: Sequence[Summary]) -> dict[str, tuple[float | None, ...]]:
    """The evidence of every token in nats, by record id. Raises as `summaries`."""
    keys = [_Key(each.record_id, each.time) for each in page]
    return {
        str(record_id): tuple(tokens.values.field("evidence").to_pylist())
        for batch in _rows(open_log(dest), keys, ["record_id", "tokens"])
        for record_id, tokens in zip(batch["record_id"], batch["tokens"], strict=True)
    }


def trend(dest: Source, filters: Filters, width: timedelta) -> list[Bin]:
    """The records in stretches of `width`, counted from 1970-01-01 UTC; stretches without records are left out.

    Raises:
        InputError: `width` is not above 0.
        SaveError: the destination cannot be read.
    """
    if width <= timedelta(0):
        raise InputError(f"width is {width}, expected more than 0")
    conditions, parameters = _conditions(filters)
    sql = f"""
        SELECT time_bucket(to_microseconds(?), time, TIMESTAMPTZ '1970-01-01 00:00:00+00') AS start,
               count(*) AS n,
               count(mean_evidence) FILTER (isfinite(mean_evidence)) AS n_evidence,
               avg(mean_evidence) FILTER (isfinite(mean_evidence)) AS evidence,
               avg(mean_image_share) FILTER (isfinite(mean_image_share)) AS image_share,
               count(*) FILTER (error) AS errors
        FROM records{_where(conditions)} GROUP BY 1 ORDER BY 1"""
    rows = _select(open_log(dest), sql, [width // timedelta(microseconds=1), *parameters]).to_pylist()
    return [Bin(**row) for row in rows]


def time_span(dest: Source, filters: Filters = Filters()) -> tuple[datetime, datetime] | None:
    """Times of the first and the last record; None without any. Raises as `summaries`."""
    conditions, parameters = _conditions(filters)
    sql = f"SELECT min(time) AS first, max(time) AS last FROM records{_where(conditions)}"
    row = _select(open_log(dest), sql, parameters).to_pylist()[0]
    return None if row["first"] is None else (row["first"], row["last"])


def baseline(dest: Source, model: str, n: int) -> Baseline:
    """The first `n` responses of the newest version of `model`; errors are left out. Raises as `summaries`."""
    sql = """
        SELECT model_revision, mean_evidence, mean_image_share FROM records
        WHERE model = $1 AND NOT error AND model_revision IS NOT DISTINCT FROM
              (SELECT model_revision FROM records WHERE model = $1 ORDER BY time DESC LIMIT 1)
        ORDER BY time, record_id LIMIT $2"""
    rows = _select(open_log(dest), sql, [_sql_text(model), _natural("n", n)]).to_pylist()
    return Baseline(
        revision=rows[0]["model_revision"] if rows else None,
        n=len(rows),
        evidence=tuple(row["mean_evidence"] for row in rows if row["mean_evidence"] is not None),
        image_share=tuple(row["mean_image_share"] for row in rows),
    )


def fields_of(dest: Source, record_id: str) -> dict[str, Any] | None:
    """Every column of one record but tokens, maps and pictures; None if there is none. Raises as `summaries`."""
    sql = "SELECT * EXCLUDE (tokens, maps, images) FROM records WHERE record_id = ? LIMIT 1"
    rows = _select(open_log(dest), sql, [_sql_text(record_id)]).to_pylist()
    return dict(rows[0]) if rows else None


def _conditions(filters: Filters) -> tuple[list[str], list[Any]]:
    conditions: list[str] = []
    parameters: list[Any] = []
    for condition, value in (
        ("model = ?", filters.model),
        ("request_id = ?", filters.request_id),
        ("time >= ?", filters.since),
        ("time < ?", filters.until),
        ("contains(lower(request_id), lower(?))", filters.search or None),
    ):
        if value is not None:
            conditions.append(condition)
            parameters.append(_sql_text(value) if isinstance(value, str) else value)
    if filters.errors_only:
        conditions.append("error")
    return conditions, parameters


def _where(conditions: Sequence[str]) -> str:
    return " WHERE " + " AND ".join(conditions) if conditions else ""


def _order(name: str) -> str:
    if name not in _ORDERS:
        raise InputError(f"order_by is {name!r}, expected one of {', '.join(map(repr, get_args(Order)))}")
    return _ORDERS[name]


def _natural(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least 0")
    return value


def _sql_text(value: str) -> str:
    """As a record holds it: half a surrogate pair is no UTF-8."""
    return _SURROGATE.sub("\ufffd", value)


# --- exports ---------------------------------------------------------------------------------------


def export(
    dest: Source,
    out: str | Path,
    format: Format = "jsonl",
    *,
    where: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Write records: `jsonl` (oldest first) without maps and pictures, one `parquet` file (in the
    order of the segments), or a folder of `html` reports.

    Returns:
        How many were written.

    Raises:
        InputError: the format is unknown or the condition is wrong.
        SaveError: something cannot be read or written.
    """
    if format not in get_args(Format):
        raise InputError(f"format is {format!r}, expected one of {', '.join(map(repr, get_args(Format)))}")
    log = open_log(dest, storage_options)
    keys = _keys(log, where, order_by="oldest")
    out = Path(out)
    if format == "html":
        return _export_html(log, keys, out)
    with whole_file(out) as file:
        if format == "parquet":
            return _export_parquet(log, keys, file)
        columns = [name for name in SCHEMA.names if name not in ("maps", "images")]
        for row in (row for batch in _rows(log, keys, columns) for row in batch.to_pylist()):
            file.write((json.dumps(plain(row), ensure_ascii=False) + "\n").encode())
    return len(keys)


def _export_parquet(log: Log, keys: Sequence[_Key], file: BinaryIO) -> int:
    """In the order of the segments, which is that of the days: sorting whole rows would hold all of them in memory."""
    wanted = ds.field("record_id").isin(pa.array([key.record_id for key in keys], pa.string()))
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for batch in _batches(log, wanted):
            writer.write_batch(batch)
    return len(keys)


def _batches(log: Log, wanted: Any) -> Iterator[Any]:
    with _reading(log):
        for batch in log.dataset.to_batches(filter=wanted, batch_size=_ROW_GROUP, batch_readahead=2):
            if batch.num_rows:
                yield batch


def _export_html(log: Log, keys: Sequence[_Key], folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{str(folder)!r} cannot be made: {error.strerror}; choose a folder to write into") from error
    for record in (record for batch in _rows(log, keys) for record in from_batch(batch)):
        name = record.envelope.record_id
        if not _SAFE_NAME.fullmatch(name):  # a file may hold anything
            name = hashlib.sha256(name.encode()).hexdigest()
        record.attribution.to_html(folder / f"{name}.html")
    return len(keys)


def plain(value: Any) -> Any:
    """For JSON: times as ISO 8601, bytes as their number, and None for what is not a finite number."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
