"""Records made up by hand, and segments of them, for tests of what comes after the logger."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fastattr import Attribution
from fastattr.log.record import Content, Envelope, to_batch
from tests.engine.samples import make_attribution

NOON = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=timezone.utc)
TODAY = NOON.date()
WORDS = ("A", " red", " circle", " and", " a", " red", " circle", ".")


def make_record(
    *,
    request_id: str = "request",
    seed: int = 0,
    n_tokens: int = 8,
    time: datetime = NOON,
    model: str = "by hand",
    evidence: bool | float = True,
    pictures: bool = False,
    grids: tuple[tuple[int, int, int], ...] = ((1, 4, 6),),
    metadata: Mapping[str, Any] | None = None,
    error: bool = False,
    writer: str = "0123456789abcdef",
    sequence: int = 0,
) -> tuple[Attribution, Envelope]:
    """A random attribution and its envelope; the `record_id` follows from writer and sequence.

    Args:
        evidence: random for True, none for False, else nats for every token.
        pictures: keep them; hashes of them are always there.
    """
    words = tuple(WORDS[i % len(WORDS)] for i in range(n_tokens))
    why = make_attribution(words, grids=grids, evidence=evidence is not False, seed=seed)
    if not isinstance(evidence, bool):
        why = dataclasses.replace(why, evidence=torch.full((n_tokens,), float(evidence)))
    pngs = tuple(_png(frames[0]) for frames in why.pictures)
    envelope = Envelope(
        record_id=UUID(bytes=hashlib.sha256(f"{writer}/{sequence}".encode()).digest()[:16]).hex,
        request_id=request_id,
        time=time,
        writer=writer,
        sequence=sequence,
        model_revision="r1",
        trace_id=f"{seed + 1:032x}",
        span_id=f"{seed + 1:016x}",
        error=error,
        metadata={} if metadata is None else metadata,
        image_sha256=tuple(hashlib.sha256(png).hexdigest() for png in pngs),
        images=pngs if pictures else None,
        queued_ms=1.5,
        explain_ms=20.25,
    )
    return dataclasses.replace(why, model=model, pictures=()), envelope


def write_segment(
    dest: Path,
    records: Sequence[tuple[Attribution, Envelope]],
    *,
    writer: str = "0123456789abcdef",
    day: date = TODAY,
    number: int = 0,
    content: Content = "text",
) -> Path:
    """One published segment, written without the code under test; every envelope's `writer` becomes `writer`."""
    batches = [to_batch(why, dataclasses.replace(envelope, writer=writer), content) for why, envelope in records]
    path = dest / f"date={day.isoformat()}" / f"{writer}-{number:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_batches(batches), path, compression="zstd", row_group_size=64)
    return path


def _png(frame: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()
