"""The record of one explained response: one row of Arrow, versioned.

A reader of version N reads every record of version N. A field that content settings mask is null, never empty. A number
that is not finite is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

SCHEMA_VERSION = 2  # 2 added `special` and `reasoning`
TOP_CONTEXT = 16  # context tokens kept a token: all of them would grow with the square of the length


def _field(name: str, kind: pa.DataType, meaning: str, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null, metadata={"meaning": meaning})


CONTEXT = pa.struct(
    [
        _field(
            "index", pa.int32(), "place among the context tokens: first the n_prompt of the prompt, then the response"
        ),
        _field("relevance", pa.float32(), "rank-biased overlap in [0, 1]; null for methods without", null=True),
        _field("weight", pa.float32(), "in [0, 1], normalised with the maps"),
    ]
)

TOKEN = pa.struct(
    [
        _field("position", pa.int32(), "in the response, from 0"),
        _field("id", pa.int32(), "token id; masked by content='none'", null=True),
        _field("text", pa.string(), "what the token adds; only with content='text'", null=True),
        _field("start", pa.int32(), "first character in the response", null=True),
        _field("stop", pa.int32(), "behind the last character in the response", null=True),
        _field("repeat", pa.int32(), "how often the same id stands before it in the response"),
        _field("log_prob", pa.float32(), "nats"),
        _field("evidence", pa.float32(), "nats, log p(token | image) - log p(token | image blanked)", null=True),
        _field("image_share", pa.float32(), "the images' part of the joint mass of image and context, in [0, 1]"),
        _field("peak_ratio", pa.float32(), "largest value of the map over its mean"),
        _field("entropy", pa.float32(), "of the map as a distribution over its cells, in [0, 1]; 1 is flat"),
        _field("area", pa.float32(), "smallest share of the cells that holds 85 % of the mass"),
        _field("residual", pa.float32(), "share of the activation's norm that interference removal left"),
        _field("raw_min", pa.float32(), "before normalisation"),
        _field("raw_max", pa.float32(), "before normalisation"),
        _field("agreement", pa.list_(pa.float32()), "probability at each scale relative to the scale nearest to 1"),
        _field("degenerate", pa.bool_(), "all scores were equal, or one was no number, so the map is all zero"),
        _field("box_image", pa.int32(), "which image holds the peak; null where the map is dark", null=True),
        _field(
            "box",
            pa.list_(pa.float32()),
            "cells of at least half the peak that hang together with it, side by side: left, top, right, bottom as shares of the picture",
            null=True,
        ),
        _field(
            "context",
            pa.list_(CONTEXT),
            f"the {TOP_CONTEXT} context tokens of most relevance (weight without), most first",
        ),
    ]
)

SCHEMA = pa.schema(
    [
        _field("record_id", pa.string(), "unique, made by the logger"),
        _field("request_id", pa.string(), "the caller's; need not be unique"),
        _field("time", pa.timestamp("us", "UTC"), "when it was submitted, by the wall clock"),
        _field("writer", pa.string(), "the process that wrote it"),
        _field("sequence", pa.int64(), "counts the records of one writer from 0 without gaps"),
        _field("model", pa.string(), "name"),
        _field("model_revision", pa.string(), "as configured", null=True),
        _field("source", pa.string(), "replay, capture or states"),
        _field("backend", pa.string(), "triton or torch, what ran"),
        _field("settings", pa.string(), "JSON of the AttributionConfig"),
        _field("calibration", pa.string(), "JSON of the Calibration of evidence", null=True),
        _field("versions", pa.string(), "JSON object: package to version"),
        _field("trace_id", pa.string(), "of the caller's span, 32 hex digits", null=True),
        _field("span_id", pa.string(), "of the caller's span, 16 hex digits", null=True),
        _field("error", pa.bool_(), "the caller marked the response as an error"),
        _field("metadata", pa.string(), "JSON object of the caller's"),
        _field("prompt", pa.string(), "only with content='text'", null=True),
        _field("response", pa.string(), "only with content='text'", null=True),
        _field(
            "context_text", pa.list_(pa.string()), "texts of the prompt's tokens; only with content='text'", null=True
        ),
        _field("n_tokens", pa.int32(), "response tokens"),
        _field("n_prompt", pa.int32(), "context tokens before the response"),
        _field("mean_log_prob", pa.float32(), "nats, over the tokens where it is finite"),
        _field("mean_evidence", pa.float32(), "nats, over the tokens where it is finite", null=True),
        _field("min_evidence", pa.float32(), "nats, of the lowest token", null=True),
        _field("low_evidence", pa.int32(), "words whose evidence is below the calibrated threshold", null=True),
        _field("mean_image_share", pa.float32(), "over the tokens"),
        _field("tokens", pa.list_(TOKEN), "one a response token, in order"),
        _field("maps", pa.binary(), "uint8 of [token t h w] in C order, one image after the other; 255 is 1"),
        _field("grids", pa.list_(pa.list_(pa.int32())), "t, h, w of each image's maps"),
        _field("extents", pa.list_(pa.list_(pa.float32())), "part of the picture each grid covers, as shares"),
        _field("scale_grids", pa.string(), "JSON: for each scale and image the t, h, w that was read"),
        _field(
            "picture_sizes", pa.list_(pa.list_(pa.int32())), "height, width in pixels; empty where no picture was given"
        ),
        _field(
            "image_sha256", pa.list_(pa.string()), "of each picture as it was given; masked by images='none'", null=True
        ),
        _field(
            "images", pa.list_(pa.binary()), "PNG of each picture's first frame; only with images='store'", null=True
        ),
        _field("notes", pa.list_(pa.string()), "what a careful reader should know"),
        _field("queued_ms", pa.float32(), "from submission until explaining began"),
        _field("explain_ms", pa.float32(), "explaining"),
        _field(
            "special",
            pa.list_(pa.int32()),
            "positions of response tokens that are markup, such as the end of a turn; null in version 1",
            null=True,
        ),
        _field(
            "reasoning",
            pa.list_(pa.int32()),
            "positions of response tokens that are reasoning and no answer; null in version 1",
            null=True,
        ),
    ],
    metadata={"fastattr.schema_version": str(SCHEMA_VERSION)},
)

_ADDED = {1: ("special", "reasoning")}  # by the versions after it


def columns_of(version: int) -> pa.Schema:
    """The columns of a version, without metadata. Later versions only add nullable columns at the end."""
    added = {name for since, names in _ADDED.items() if since >= version for name in names}
    return pa.schema([field for field in SCHEMA if field.name not in added])


def upgrade(batch: pa.RecordBatch) -> pa.RecordBatch | None:
    """A record batch of this or an earlier version as one of `SCHEMA`; None if it is neither."""
    stored = (batch.schema.metadata or {}).get(b"fastattr.schema_version", b"")
    if not stored.isdigit() or not 1 <= int(stored) <= SCHEMA_VERSION:
        return None
    if not batch.schema.equals(columns_of(int(stored)), check_metadata=False):
        return None
    held = batch.schema.names
    columns = [
        batch.column(field.name) if field.name in held else pa.nulls(batch.num_rows, field.type) for field in SCHEMA
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def as_markdown() -> str:
    """Every field as a table, for the documentation."""
    lines = ["| field | type | meaning |", "| --- | --- | --- |"]

    def add(fields: Iterable[pa.Field], prefix: str) -> None:
        for each in fields:
            inner = each.type.value_type if pa.types.is_list(each.type) else each.type
            is_struct = pa.types.is_struct(inner)
            kind = "list of structs" if is_struct else str(each.type).replace("element: ", "").replace("item: ", "")
            kind += ", or null" if each.nullable else ""
            lines.append(f"| `{prefix}{each.name}` | {kind} | {each.metadata[b'meaning'].decode()} |")
            if is_struct:
                add(inner, f"{prefix}{each.name}.")

    add(SCHEMA, "")
    return "\n".join(lines)
