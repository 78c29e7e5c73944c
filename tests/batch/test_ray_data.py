"""The step of a Ray Data pipeline, called as Ray Data calls it: tables or columns in, tables of as many rows out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattr import AttributionConfig, Model, load
from fastattr.batch import RayExplainer, run
from fastattr.batch.ray_data import OUTPUT
from fastattr.batch.running import Engine
from fastattr.log.record import from_batch
from fastattr.log.schema import SCHEMA
from tests.batch.scenes import ANSWER, PROMPT, UNEQUAL, png, records, write_parquet

LENS = AttributionConfig(method="lens", scales=(1.0,), filter=False, evidence=False)
GOOD = {"id": "good", "image": png(), "prompt": PROMPT, "response": ANSWER}


@pytest.fixture(scope="module")
def explainer() -> RayExplainer:
    return RayExplainer(attribution=LENS)


def test_rows_are_those_of_a_batch(tmp_path: Path, explainer: RayExplainer, inline: Engine) -> None:
    rows = [{**GOOD, "id": f"{k}", "image": png(k)} for k in range(5)]
    run(write_parquet(tmp_path / "in.parquet", rows), tmp_path / "out", attribution=LENS, engine=inline)
    own = ["writer", "sequence", "record_id", "metadata"]
    expected = records(tmp_path / "out").drop_columns(own).to_pylist()
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in GOOD}
    for given_ in (pa.Table.from_pylist(rows), columns):
        table = explainer(given_)
        assert table.schema.equals(OUTPUT)
        assert table["status"].to_pylist() == ["ok"] * 5
        assert table["request_id"].to_pylist() == [f"{k}" for k in range(5)]
        found = table.drop_columns([*own, *UNEQUAL, "status", "error_type", "error_message"])
        assert found.to_pylist() == expected
        assert len(set(table["record_id"].to_pylist())) == 5
    assert len(from_batch(table.select(SCHEMA.names).combine_chunks().to_batches()[0])) == 5


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
CELL = ANY | st.lists(ANY, max_size=2) | st.dictionaries(st.sampled_from(["bytes", "base64", "path", "role"]), ANY)


@settings(max_examples=30)
@given(
    st.lists(st.fixed_dictionaries({name: CELL for name in [*GOOD, "images", "messages", "response_ids"]}), max_size=3)
)
def test_a_row_never_raises(explainer: RayExplainer, rows: list[dict[str, Any]]) -> None:
    names = [*GOOD, "images", "messages", "response_ids"]
    rows = [*rows, {name: GOOD.get(name) for name in names}]
    columns = {}
    for name in names:
        columns[name] = np.empty(len(rows), dtype=object)
        columns[name][:] = [row[name] for row in rows]
    table = explainer(columns)
    assert table.num_rows == len(rows)
    *others, last = table.to_pylist()
    assert last["status"] == "ok" and last["request_id"] == "good"
    for row in others:
        assert row["status"] == "failed" and row["error_type"] and row["error_message"] and row["maps"] is None


def test_how_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def note(name: str, **options: Any) -> Model:
        asked.append(options)
        return load(name)

    monkeypatch.setattr("fastattr.batch.explaining.load", note)
    RayExplainer(attribution=LENS, device="cpu", dtype="bfloat16", trust_remote_code=True)
    assert asked == [{"device": "cpu", "dtype": "bfloat16", "trust_remote_code": True}]


def test_an_empty_batch(explainer: RayExplainer) -> None:
    assert explainer(pa.Table.from_pylist([GOOD]).slice(1)).schema.equals(OUTPUT)
