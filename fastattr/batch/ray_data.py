"""Attributions within a Ray Data pipeline that exists already, as one of its steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import pyarrow as pa

from fastattr.adapters import hide_loading_bars
from fastattr.batch.explaining import Ready, backing_off, explain_rows, get_ready, load_model
from fastattr.batch.reach import AllowUrls, reach_of
from fastattr.batch.shards import make_envelope, to_record
from fastattr.batch.sources import Fields, to_row
from fastattr.config import AnyConfig, configure
from fastattr.errors import InputError
from fastattr.log.config import Images
from fastattr.log.record import Content, check_request_id
from fastattr.log.schema import SCHEMA

# a row that failed has only its id
OUTPUT = pa.schema(
    [field.with_nullable(True) for field in SCHEMA]
    + [pa.field("status", pa.string()), pa.field("error_type", pa.string()), pa.field("error_message", pa.string())]
)


class RayExplainer:
    """For `dataset.map_batches(RayExplainer, batch_format="pyarrow", concurrency=2, fn_constructor_kwargs={...})`.

    A batch of rows becomes a table of as many, in the same order: the columns of a record of the log, and `status` (`ok`
    or `failed`), `error_type` and `error_message`. A row never raises, however wrong it is; a model that can explain nothing does.

    Args:
        model: what `fastattr.load` takes, or `package.module:function`, called with the device.
        attribution: an `AttributionConfig`, the name of one, or a mapping of options; `arc` by default.
        fields: which column holds what.
        content, images: what records keep, as of `LogConfig`.
        device: of the model; `cuda` where the actors have a GPU each.
        folder: where images that are named by a path lie, a path or a URL; without it rows hold their images, or name
            URLs of `allow_urls`.
        input_options: for fsspec, of the store the folder is in.
        allow_urls: what else rows may name, as of `run`.
    """

    def __init__(
        self,
        model: str = "shapes",
        *,
        attribution: AnyConfig = None,
        fields: Fields | None = None,
        content: Content = "ids",
        images: Images = "hash",
        max_new_tokens: int = 256,
        device: str | None = None,
        folder: str | None = None,
        input_options: Mapping[str, Any] | None = None,
        allow_urls: AllowUrls = (),
    ) -> None:
        hide_loading_bars()
        self._attribution = configure(attribution)
        self._fields = Fields() if fields is None else fields
        self._content, self._images, self._max_new_tokens = content, images, max_new_tokens
        self._reach = reach_of(folder, input_options, allow_urls)
        self._writer, self._sequence = uuid4().hex[:16], 0
        self._model = load_model(model, device)

    def __call__(self, batch: Any) -> pa.Table:
        """Explain a batch: an Arrow table, or a mapping of columns, as Ray Data has them."""
        rows = batch.to_pylist() if isinstance(batch, pa.Table) else _rows(batch)
        ids = [_id(row.get(self._fields.id)) for row in rows]
        results: dict[int, pa.RecordBatch | Exception] = {}
        ready = []
        for number, (row, id) in enumerate(zip(rows, ids, strict=True)):
            try:
                place = f"row {number} of its batch"
                read = to_row(row, self._fields, number=number, id=id, place=place, reach=self._reach)
                ready.append(get_ready(read, self._reach))
            except Exception as error:  # a column may hold anything
                results[number] = error
        for each, result in backing_off(sorted(ready, key=lambda each: each.size), self._explain):
            results[each.row.number] = result
        return pa.concat_tables([OUTPUT.empty_table(), *(_output(id, results[i]) for i, id in enumerate(ids))])

    def _explain(self, rows: Sequence[Ready]) -> list[pa.RecordBatch | Exception]:
        began, began_s = datetime.now(timezone.utc), time.monotonic()
        explained = explain_rows(self._model, rows, self._attribution, self._max_new_tokens)
        explain_ms = 1e3 * (time.monotonic() - began_s) / len(rows)
        records: list[pa.RecordBatch | Exception] = []
        for each, why in zip(rows, explained, strict=True):
            record: pa.RecordBatch | Exception = why
            if not isinstance(why, Exception):
                envelope = make_envelope(
                    each,
                    why,
                    record_id=uuid4().hex,
                    writer=self._writer,
                    sequence=self._sequence,
                    metadata={},
                    began=began,
                    explain_ms=explain_ms,
                    images=self._images,
                )
                record = to_record(why, envelope, self._content)
            self._sequence += not isinstance(record, Exception)
            records.append(record)
        return records


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a mapping of columns, or a data frame."""
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]


def _id(value: Any) -> str:
    """Whatever it is, the row keeps a name."""
    try:
        return check_request_id(str(value))
    except InputError:
        return check_request_id(str(value)[:100])


def _output(id: str, result: pa.RecordBatch | Exception) -> pa.Table:
    if isinstance(result, Exception):
        row = {"request_id": id, "status": "failed", "error_type": type(result).__name__, "error_message": str(result)}
        return pa.Table.from_pylist([row], schema=OUTPUT)
    table = pa.Table.from_batches([result]).cast(pa.schema(list(OUTPUT)[: len(SCHEMA)]))
    for name, value in (("status", "ok"), ("error_type", None), ("error_message", None)):
        table = table.append_column(OUTPUT.field(name), pa.array([value], pa.string()))
    return table
