"""An attribution and what its server says about it, as one row of Arrow and back.

Rows are built column by column: a record of 200 tokens must cost a few milliseconds beside a busy model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastattr.calibration import Calibration
from fastattr.config import from_saved
from fastattr.decoding import read_png
from fastattr.descriptors import describe_levels
from fastattr.errors import ImageError, InputError, SaveError
from fastattr.log.schema import CONTEXT, SCHEMA, TOKEN, TOP_CONTEXT
from fastattr.selection import BOX_LEVEL, count_low_evidence
from fastattr.text import Span, reasoning_tokens
from fastattr.types import Attribution, AttributionConfig

Content = Literal["none", "ids", "text"]

MAX_ID_BYTES = 1 << 10
MAX_METADATA_BYTES = 1 << 16

_MASKED = "·"  # stands for a token of which not even the id is known
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Envelope:
    """What a record holds besides its attribution.

    Attributes:
        record_id: unique, made by the logger.
        request_id: the caller's, see `check_request_id`.
        time: when it was submitted; aware, in UTC.
        writer: the process that wrote it.
        sequence: counts the records of one writer from 0.
        model_revision: as configured, or None.
        trace_id, span_id: of the caller's span as hex digits, or None.
        error: whether the caller marked the response as an error.
        metadata: JSON values, see `check_metadata`.
        image_sha256: of each picture as it was given, or None where masked.
        images: a PNG of each picture's first frame, or None where they are not kept.
        queued_ms: from submission until explaining began.
        explain_ms: explaining.
    """

    record_id: str
    request_id: str
    time: datetime
    writer: str
    sequence: int
    model_revision: str | None
    trace_id: str | None
    span_id: str | None
    error: bool
    metadata: Mapping[str, Any]
    image_sha256: tuple[str, ...] | None
    images: tuple[bytes, ...] | None
    queued_ms: float
    explain_ms: float


@dataclass(frozen=True, eq=False)
class Record:
    """What is read back: an attribution as far as it was kept, and its envelope."""

    envelope: Envelope
    attribution: Attribution


def check_request_id(request_id: str) -> str:
    """The id as it is stored: half surrogate pairs, which UTF-8 cannot say, become U+FFFD.

    Raises:
        InputError: it is no string, or longer than 1 KiB.
    """
    if not isinstance(request_id, str):
        raise InputError(f"request_id is {_short(request_id)}, expected a string")
    if len(request_id) <= MAX_ID_BYTES:  # a huge one is refused before it is encoded
        clean = _utf8(request_id)
        if len(clean.encode()) <= MAX_ID_BYTES:
            return clean
    raise InputError(
        f"request_id {_short(request_id)} is longer than {MAX_ID_BYTES} bytes; keep long values out of ids, "
        "for example by a hash of them"
    )


def check_metadata(metadata: Mapping[str, Any]) -> str:
    """The JSON that is stored.

    Raises:
        InputError: it is no mapping of strings to JSON values, holds NaN or infinity, or is larger than 64 KiB.
    """
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata is {_short(metadata)}, expected a mapping of strings to JSON values")
    length = 0
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise InputError(f"metadata has the key {_short(key)}, expected strings as keys")
        length += len(key) + (len(value) if isinstance(value, str) else 1)
    text = ""
    if length <= MAX_METADATA_BYTES:  # else it is not worth the time to write it out
        try:
            text = _utf8(json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False, separators=(",", ":")))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"metadata is not JSON: {error}; give strings, finite numbers, booleans, None, and lists and mappings of them"
            ) from error
        length = len(text.encode())
    if length > MAX_METADATA_BYTES:
        raise InputError(
            f"metadata is more than {MAX_METADATA_BYTES} bytes of JSON; keep large values elsewhere and their address here"
        )
    return text


def to_batch(why: Attribution, envelope: Envelope, content: Content) -> pa.RecordBatch:
    """One row of `schema.SCHEMA`.

    Numbers that are not finite become NaN; a map that holds one becomes zeros and its token degenerate. Means and
    minima are over the finite numbers.

    Args:
        content: what of the response is kept: nothing, token ids, or ids and all text.

    Raises:
        InputError: the metadata or the request id cannot be stored.
    """
    cells, broken = _clean_maps(why.image)
    by_image = _split(cells, [m.shape[1:] for m in why.image])
    levels = _quantise(cells)
    described = describe_levels(levels, _mass(why.context))
    evidence = None if why.evidence is None else _finite(why.evidence)
    log_prob, n_prompt = _finite(why.log_prob), len(why.context_tokens) - len(why)
    text = content == "text"
    values: dict[str, Any] = {
        "record_id": envelope.record_id,
        "request_id": check_request_id(envelope.request_id),
        "time": envelope.time,
        "writer": envelope.writer,
        "sequence": envelope.sequence,
        "model": _utf8(why.model),
        "model_revision": None if envelope.model_revision is None else _utf8(envelope.model_revision),
        "source": why.source,
        "backend": why.backend,
        "settings": json.dumps(asdict(why.config)),
        "calibration": None if why.calibration is None else json.dumps(asdict(why.calibration)),
        "versions": json.dumps(dict(why.versions)),
        "trace_id": envelope.trace_id,
        "span_id": envelope.span_id,
        "error": envelope.error,
        "metadata": check_metadata(envelope.metadata),
        "prompt": _utf8(why.prompt) if text else None,
        "response": _utf8(why.response) if text else None,
        "context_text": [_utf8(token) for token in why.context_tokens[:n_prompt]] if text else None,
        "n_tokens": len(why),
        "n_prompt": n_prompt,
        "mean_log_prob": _mean(log_prob),
        "mean_evidence": None if evidence is None else _mean(evidence),
        "min_evidence": None if evidence is None else _min(evidence),
        "low_evidence": None if why.evidence is None else count_low_evidence(why, why.evidence),
        "mean_image_share": _mean(_finite(described.image_share)),
        "maps": b"".join(maps.tobytes() for maps in np.split(levels, np.cumsum([m[0].size for m in by_image])[:-1], 1)),
        "grids": [list(maps.shape[1:]) for maps in by_image],
        "extents": why.extents,
        "scale_grids": json.dumps(why.grids),
        "picture_sizes": why.picture_sizes,
        "image_sha256": envelope.image_sha256,
        "images": envelope.images,
        "notes": [_utf8(note) for note in why.notes],
        "queued_ms": envelope.queued_ms,
        "explain_ms": envelope.explain_ms,
        "special": list(why.special),
        "reasoning": list(reasoning_tokens(why)),
    }
    box_image, boxes, lit = _peak_boxes(by_image, why.extents)
    scales = why.agreement.shape[1]
    spans = np.asarray(why.spans, np.int32).reshape(-1, 2)
    raw_range = _finite(why.raw_range)
    tokens: dict[str, Any] = {
        "position": np.arange(len(why), dtype=np.int32),
        "id": None if content == "none" else why.token_ids,
        "text": [_utf8(token) for token in why.tokens] if text else None,
        "start": spans[:, 0] if text else None,
        "stop": spans[:, 1] if text else None,
        "repeat": _repeats(why.token_ids),
        "log_prob": log_prob,
        "evidence": evidence,
        "image_share": described.image_share.numpy(),
        "peak_ratio": described.peak_ratio.numpy(),
        "entropy": described.entropy.numpy(),
        "area": described.area.numpy(),
        "residual": _finite(why.residual),
        "raw_min": raw_range[:, 0],
        "raw_max": raw_range[:, 1],
        "agreement": _lists(_finite(why.agreement).ravel(), np.full(len(why), scales), "agreement"),
        "degenerate": why.degenerate.numpy() | broken,
        "box_image": pa.array(box_image, pa.int32(), mask=~lit),
        "box": _lists(boxes.ravel(), np.where(lit, 4, 0), "box", missing=~lit),
        "context": _top_context(why, n_prompt),
    }
    columns = [_column(tokens[field.name], field.type, len(why)) for field in TOKEN]
    rows = pa.StructArray.from_arrays(columns, fields=list(TOKEN))
    values["tokens"] = pa.ListArray.from_arrays([0, len(why)], rows, type=SCHEMA.field("tokens").type)
    arrays = [values[f.name] if f.name == "tokens" else pa.array([values[f.name]], f.type) for f in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> list[Record]:
    """Every row of a batch of `schema.SCHEMA`.

    Maps are the stored levels over 255. Of the context the stored tokens are kept, the rest is 0. Without text a token
    is called `<id>`, without ids `·` with an id of -1; the response is then made of these.

    Raises:
        InputError: the settings are of a newer version.
        SaveError: a row contradicts itself, or columns are missing.
    """
    missing = [name for name in SCHEMA.names if name not in batch.schema.names]
    if missing:
        raise SaveError(f"the records lack {', '.join(missing)}; read whole records, written by fastattr.log")
    return [_read(batch, row) for row in range(batch.num_rows)]


def from_row(row: Mapping[str, Any]) -> Record:
    """One row as `to_pylist` gives it; `from_batch` is faster.

    Raises:
        InputError, SaveError: as `from_batch`.
    """
    try:
        batch = pa.RecordBatch.from_pylist([dict(row)], schema=SCHEMA)
    except (pa.ArrowException, OverflowError) as error:
        raise SaveError(f"this is not a row of the schema of fastattr.log: {error}") from error
    return from_batch(batch)[0]


def _read(batch: pa.RecordBatch, row: int) -> Record:
    def value(name: str) -> Any:
        return batch.column(name)[row].as_py()

    try:
        return _read_row(batch, row)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        if isinstance(error, InputError) and not isinstance(error, ImageError):
            raise
        raise SaveError(
            f"record {value('record_id')!r} of writer {value('writer')!r} cannot be read: {error}; "
            "fastattr log doctor tells whether its file is damaged"
        ) from error


def _of_first_frames(pictures: Sequence[np.ndarray], grids: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What a reader of a video must know: a log keeps one frame of it."""
    if any(len(picture) < grid[0] for picture, grid in zip(pictures, grids, strict=False)):
        return ("of videos only the first frame was kept: maps of later time steps are shown over it",)
    return ()


def _read_row(batch: pa.RecordBatch, row: int) -> Record:
    values = {
        name: batch.column(name)[row].as_py() for name in SCHEMA.names if name not in ("tokens", "maps", "context_text")
    }
    rows = batch.column("tokens")[row].values
    tokens = dict(zip(TOKEN.names, rows.flatten(), strict=True))
    n, n_prompt = len(rows), values["n_prompt"]
    if n != values["n_tokens"]:
        raise ValueError(f"it says {values['n_tokens']} tokens and holds {n}")
    ids, names, spans, response = _words(tokens, values["response"])
    prompt_names = batch.column("context_text")[row].as_py() or (_MASKED,) * n_prompt
    config = from_saved(json.loads(values["settings"]))
    context, relevance = _context(tokens["context"], n, n_prompt + n, config)
    pictures = tuple(_decode(png) for png in values["images"] or ())
    evidence = tokens["evidence"]
    calibration = values["calibration"]
    attribution = Attribution(
        response=response,
        tokens=names,
        token_ids=ids,
        spans=spans,
        context_tokens=(*prompt_names, *names),
        image=_maps(batch.column("maps")[row].as_py(), values["grids"], n),
        context=context,
        relevance=relevance,
        evidence=None if n and evidence.null_count else _tensor(evidence),
        log_prob=_tensor(tokens["log_prob"]),
        agreement=_tensor(tokens["agreement"].flatten()).reshape(n, -1),
        raw_range=torch.stack([_tensor(tokens["raw_min"]), _tensor(tokens["raw_max"])], dim=1),
        residual=_tensor(tokens["residual"]),
        degenerate=_tensor(tokens["degenerate"]),
        config=config,
        grids=tuple(tuple((t, h, w) for t, h, w in grids) for grids in json.loads(values["scale_grids"])),
        extents=tuple((left, top, right, bottom) for left, top, right, bottom in values["extents"]),
        pictures=pictures,
        picture_sizes=tuple((height, width) for height, width in values["picture_sizes"]),
        prompt=values["prompt"] or "",
        model=values["model"],
        source=values["source"],
        backend=values["backend"],
        notes=(*values["notes"], *_of_first_frames(pictures, values["grids"])),
        versions=tuple(json.loads(values["versions"]).items()),
        calibration=None if calibration is None else Calibration(**json.loads(calibration)),
        special=tuple(values["special"] or ()),
        reasoning=_stretches(values["reasoning"] or (), spans),
    )
    stored = {f.name: values[f.name] for f in fields(Envelope)}
    stored["time"] = values["time"].astimezone(timezone.utc)
    stored["metadata"] = json.loads(values["metadata"])
    stored |= {name: _frozen(values[name]) for name in ("image_sha256", "images")}
    return Record(Envelope(**stored), attribution)


def _mass(context: Tensor) -> np.ndarray:
    """Sum of each target's `[target context]`, without what is no number."""
    values = context.float().numpy()
    mass = values.sum(axis=1, dtype=np.float64)
    return mass if np.isfinite(mass).all() else np.nan_to_num(values, posinf=0.0).sum(axis=1, dtype=np.float64)


def _clean_maps(image: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """float32 `[target cell]` in [0, 1] of all images, and which targets held something that is not a number."""
    cells = torch.cat([maps.flatten(1) for maps in image], dim=1).float().numpy()
    broken = ~np.isfinite(cells).all(axis=1)
    if broken.any():
        cells = np.where(broken[:, None], np.float32(0), cells)
    return cells.clip(0, 1), broken


def _split(cells: np.ndarray, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(-1, *shape) for part, shape in zip(np.split(cells, ends[:-1], axis=1), shapes, strict=True)]


def _quantise(maps: np.ndarray) -> np.ndarray:
    return np.rint(maps * 255).astype(np.uint8)


def _peak_boxes(
    images: Sequence[np.ndarray], extents: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each target looks most: image `[target]`, box `[target lit, 4]` as shares, and bool `[target]` not dark."""
    peaks = np.stack([maps.max(axis=(1, 2, 3)) for maps in images], axis=1)
    image, lit = peaks.argmax(axis=1), peaks.max(axis=1) > 0
    boxes = np.zeros((len(image), 4), np.float32)
    for i, (maps, extent) in enumerate(zip(images, extents, strict=True)):
        chosen = np.flatnonzero(lit & (image == i))
        if not len(chosen):
            continue
        frame, cell = np.divmod(maps[chosen].reshape(len(chosen), -1).argmax(axis=1), maps.shape[2] * maps.shape[3])
        rows, columns = _region(maps[chosen, frame], cell)
        left, top, width, height = extent[0], extent[1], extent[2] - extent[0], extent[3] - extent[1]
        (first_row, last_row), (first_column, last_column) = _ends(rows), _ends(columns)
        boxes[chosen, 0] = left + width * first_column / maps.shape[3]
        boxes[chosen, 1] = top + height * first_row / maps.shape[2]
        boxes[chosen, 2] = left + width * last_column / maps.shape[3]
        boxes[chosen, 3] = top + height * last_row / maps.shape[2]
    return image, boxes[lit], lit


def _region(maps: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What hangs together with `cell [target]` of `maps [target h w]`, side by side, at half its value or more.

    Returns:
        Which rows `[target h]` and which columns `[target w]` hold a cell of it, 1 or 0.
    """
    maps = np.ascontiguousarray(np.moveaxis(maps, 0, -1))
    bright = maps >= BOX_LEVEL * maps.max(axis=(0, 1))
    seed = np.zeros_like(bright)
    seed.reshape(-1, len(cell))[cell, np.arange(len(cell))] = True
    # all targets grow together, eight of them a byte, and neighbours are whole runs of memory apart
    inside, found = np.packbits(bright, axis=-1), np.packbits(seed, axis=-1)
    while True:
        grown = found.copy()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= inside
        if np.array_equal(grown, found):
            break
        found = grown
    rows, columns = (np.bitwise_or.reduce(found, axis=axis) for axis in (1, 0))
    return np.unpackbits(rows, axis=-1, count=len(cell)).T, np.unpackbits(columns, axis=-1, count=len(cell)).T


def _ends(lit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The half-open range of ones in each row of `[row n]`."""
    return lit.argmax(axis=1), lit.shape[1] - lit[:, ::-1].argmax(axis=1)


def _top_context(why: Attribution, n_prompt: int) -> pa.Array:
    """For each target the context tokens before it of most relevance, those alone that have any relevance or weight."""
    weight = why.context.float().numpy()
    relevance = None if why.relevance is None else why.relevance.float().numpy()
    score = weight if relevance is None else relevance
    n, total = weight.shape
    known = np.arange(total) < n_prompt + np.arange(n)[:, None]
    known &= (score >= 0) & (score < np.inf) & ((score > 0) | (weight > 0))
    chosen = known
    if total > TOP_CONTEXT:
        ranked = np.where(known, score, np.float32(-1))
        least = np.partition(ranked, total - TOP_CONTEXT, axis=1)[:, total - TOP_CONTEXT, None]
        above, ties = ranked > least, (ranked == least) & known
        room = TOP_CONTEXT - above.sum(axis=1)
        if (ties.sum(axis=1) > room).any():  # the earlier token wins
            ties &= np.cumsum(ties, axis=1) <= room[:, None]
        chosen = above | ties
    row, column = np.nonzero(chosen)
    count = chosen.sum(axis=1)
    # side by side, at most TOP_CONTEXT a target, to be sorted all at once
    slot = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    width = int(count.max(initial=0))
    scores, columns = np.full((n, width), -1, np.float32), np.zeros((n, width), np.int64)
    scores[row, slot], columns[row, slot] = score[row, column], column
    order = np.argsort(-scores, axis=1, kind="stable")
    column = np.take_along_axis(columns, order, axis=1)[np.arange(width) < count[:, None]]
    values = {
        "index": column.astype(np.int32),
        "relevance": None if relevance is None else relevance[row, column],
        "weight": _finite(weight[row, column]),
    }
    struct = pa.StructArray.from_arrays(
        [_column(values[field.name], field.type, len(column)) for field in CONTEXT], fields=list(CONTEXT)
    )
    return _lists(struct, count, "context")


def _lists(
    values: np.ndarray | pa.Array, lengths: np.ndarray, name: str, *, missing: np.ndarray | None = None
) -> pa.Array:
    """A token's column of lists; `missing [target]` marks those that are null."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    field = TOKEN.field(name)
    if isinstance(values, np.ndarray):
        values = pa.array(values, field.type.value_type)
    mask = None if missing is None else pa.array(missing)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=field.type, mask=mask)


def _column(values: Any, kind: pa.DataType, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, kind)
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def _stretches(places: Sequence[int], spans: Sequence[Span]) -> tuple[Span, ...]:
    """The characters that these tokens cover, as merged ranges."""
    found: list[Span] = []
    for start, stop in (spans[place] for place in places):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def _repeats(ids: Sequence[int]) -> list[int]:
    seen: Counter[int] = Counter()
    repeats = []
    for token in ids:
        repeats.append(seen[token])
        seen[token] += 1
    return repeats


def _finite(values: Tensor | np.ndarray) -> np.ndarray:
    """float32 of the same shape with NaN for whatever is not finite."""
    array = values.float().numpy() if isinstance(values, Tensor) else values
    return np.where(np.isfinite(array), array, np.float32("nan"))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else float("nan")


def _min(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.min()) if len(known) else float("nan")


def _utf8(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) > 40:
        value = value[:40] + "..."
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words(
    tokens: Mapping[str, pa.Array], response: str | None
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[tuple[int, int], ...], str]:
    """Ids, names and spans of the tokens and the text they stand in, as far as they were kept."""
    n = len(tokens["id"])
    known = tokens["id"].null_count == 0
    ids = tuple(tokens["id"].to_pylist()) if known else (-1,) * n
    if response is not None:
        spans = tuple(zip(tokens["start"].to_pylist(), tokens["stop"].to_pylist(), strict=True))
        return ids, tuple(tokens["text"].to_pylist()), spans, response
    names = tuple(f"<{token}>" for token in ids) if known else (_MASKED,) * n
    ends = np.cumsum([len(name) for name in names]).tolist()
    return ids, names, tuple(zip([0, *ends[:-1]], ends, strict=True)), "".join(names)


def _maps(data: bytes, grids: Sequence[Sequence[int]], n: int) -> tuple[Tensor, ...]:
    sizes = [n * int(np.prod(grid)) for grid in grids]
    if sum(sizes) != len(data):
        raise ValueError(f"its grids {grids} need {sum(sizes)} bytes of maps for {n} tokens, it holds {len(data)}")
    levels = torch.from_numpy(np.frombuffer(data, np.uint8).astype(np.float32) / 255)
    return tuple(part.reshape(n, *grid) for part, grid in zip(levels.split(sizes), grids, strict=True))


def _context(kept: pa.Array, n: int, total: int, config: AttributionConfig) -> tuple[Tensor, Tensor | None]:
    row = np.repeat(np.arange(n), kept.value_lengths().to_numpy())
    entries = dict(zip(CONTEXT.names, kept.flatten().flatten(), strict=True)) if len(row) else {}
    if not entries:
        nothing = torch.zeros(n, total, dtype=torch.float32, device="cpu")
        return nothing, nothing.clone() if config.method == "arc" else None
    column = entries["index"].to_numpy()
    if column.min() < 0 or column.max() >= total:
        raise ValueError(f"it names context token {column.max()} of {total}")

    def spread(values: pa.Array) -> Tensor:
        dense = np.zeros((n, total), np.float32)
        dense[row, column] = values.to_numpy()
        return torch.from_numpy(dense)

    relevance = entries["relevance"]
    return spread(entries["weight"]), None if relevance.null_count else spread(relevance)


def _tensor(column: pa.Array) -> Tensor:
    return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False)))


def _decode(png: bytes) -> np.ndarray:
    """uint8 `[1 height width 3]`."""
    return read_png(png)[None]


def _frozen(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
