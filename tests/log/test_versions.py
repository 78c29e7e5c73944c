"""Records that earlier versions of the schema wrote, `tests/data/records_v1.*`, are read as they were meant."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastattr
from fastattr.adapters import encode_response
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger, reading
from fastattr.log.record import Record, from_batch
from fastattr.log.schema import SCHEMA
from fastattr.log.spool import read_spool

DATA = Path(__file__).parent.parent / "data"
DAY = "date=2026-11-30"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with one segment of version 1."""
    (tmp_path / DAY).mkdir()
    shutil.copy(DATA / "records_v1.parquet", tmp_path / DAY / "writer-000000.parquet")
    return tmp_path


def in_spool() -> Iterator[Record]:
    found = read_spool(DATA / "records_v1.spool")
    assert (found.damaged_frames, found.torn_bytes) == (0, 0)
    for batch in found.batches:
        assert batch.schema.equals(SCHEMA, check_metadata=True)
        yield from from_batch(batch)


def test_a_record_of_version_1_is_read_from_a_segment_and_from_the_spool(log: Path) -> None:
    why = fastattr.attribute(
        fastattr.load("shapes"),
        make_scene(10_000_003).image,
        "Describe the image.",
        "A large orange diamond.",
        scales=(1.0,),
    )
    for record in (*reading.read(log), *in_spool()):
        kept = record.attribution
        assert record.envelope.request_id == "before"
        assert kept.response == "A large orange diamond."
        assert kept.special == kept.reasoning == ()
        assert float((kept.image[0] - why.image[0]).abs().max()) <= 0.5 / 255 + 1e-5
        torch.testing.assert_close(kept.log_prob, why.log_prob, atol=1e-4, rtol=0)
    assert len(list(in_spool())) == len(list(reading.read(log))) == 1


def test_both_versions_in_one_log(log: Path) -> None:
    model = fastattr.load("shapes")
    ids = encode_response(model, "A red circle.").tolist()
    with AttributionLogger(log, model=model, sample_rate=1.0, content="text") as logger:
        logger.submit_replay("Describe the image.", [make_scene(10_000_003).image], ids, request_id="now")
        assert logger.flush(60)
    assert {record.envelope.request_id for record in reading.read(log)} == {"before", "now"}
    found = reading.query(log, "SELECT request_id, special FROM records ORDER BY request_id")
    assert found.to_pylist() == [{"request_id": "before", "special": None}, {"request_id": "now", "special": []}]
