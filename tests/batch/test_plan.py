"""A plan is the same whoever makes it, holds every row once, and is not mistaken for another."""

from __future__ import annotations

import dataclasses
import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr import AttributionConfig
from fastattr.batch.output import PLAN, open_output
from fastattr.batch.plan import Plan, settle, shard_of, writer_of
from fastattr.batch.sources import Fields, Input, scan
from fastattr.errors import InputError, SaveError
from tests.batch.scenes import write_jsonl
from tests.log.records import make_record, write_segment

DAY = date(2026, 11, 22)


def make_plan(
    inputs: tuple[Input, ...] = (Input("/data/a.jsonl", 5, 100, "ids", (0, 30, 60)),), **changed: Any
) -> Plan:
    values: dict[str, Any] = {
        "day": DAY, "inputs": inputs, "model": "shapes", "attribution": AttributionConfig(), "fields": Fields(),
        "content": "ids", "images": "hash", "max_new_tokens": 32, "shard_rows": 2, "limit": None,
    }  # fmt: skip
    return Plan(**values | changed)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), shard_rows=st.integers(1, 11))
def test_shards_hold_every_row_once(lengths: list[int], shard_rows: int) -> None:
    inputs = tuple(Input(f"{i}.jsonl", n, 0, "", (0,) * -(-n // shard_rows)) for i, n in enumerate(lengths))
    shards = make_plan(inputs, shard_rows=shard_rows).shards()
    assert [shard.number for shard in shards] == list(range(len(shards)))
    rows = [(shard.input, row) for shard in shards for row in range(shard.start, shard.stop)]
    assert rows == [(i, row) for i, n in enumerate(lengths) for row in range(n)]
    numbers = [shard.first + k for shard in shards for k in range(len(shard))]
    assert numbers == list(range(sum(lengths)))
    assert all(1 <= len(shard) <= shard_rows for shard in shards)


@given(st.text("0123456789abcdef", min_size=12, max_size=12), st.integers(0, 10_000_000))
def test_a_writer_says_its_shard(plan_id: str, number: int) -> None:
    writer = writer_of(plan_id, number)
    assert writer.isalnum() and shard_of(plan_id, writer) == number
    assert shard_of("x" * 12, writer) is None


def test_where_the_input_lies_does_not_matter_but_its_ids_do(tmp_path: Path) -> None:
    plans = []
    for folder, ids in (("here", "abc"), ("there", "abc"), ("other", "abd")):
        (tmp_path / folder).mkdir()
        path = write_jsonl(
            tmp_path / folder / "in.jsonl", [{"id": each, "image": "a.png", "prompt": "?"} for each in ids]
        )
        plans.append(make_plan(scan([str(path)], Fields(), 2)))
    assert plans[0].id == plans[1].id != plans[2].id


CHANGES: dict[str, Any] = {
    "inputs": (Input("/data/a.jsonl", 5, 100, "other ids", (0, 30, 60)),),
    "model": "other",
    "attribution": AttributionConfig(top_k=7),
    "fields": Fields(response="answer"),
    "content": "text",
    "images": "store",
    "max_new_tokens": 33,
    "shard_rows": 3,
    "limit": 5,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_is_refused_with_what_differs(tmp_path: Path, name: str) -> None:
    assert set(CHANGES) == {each.name for each in dataclasses.fields(Plan)} - {"day"}
    output = open_output(str(tmp_path))
    settle(make_plan(), output)
    changed = make_plan(**{name: CHANGES[name]})
    assert changed.id != make_plan().id
    with pytest.raises(SaveError, match=f"holds another batch: {name} is .* there and .* here. Choose another --out"):
        settle(changed, output)


def test_a_plan_of_an_older_version_is_continued(tmp_path: Path) -> None:
    """It wrote `()` for the model's own scales, and `top_k` as a number."""
    output = open_output(str(tmp_path))
    settle(make_plan(), output)
    stored = json.loads((tmp_path / PLAN).read_text())
    assert stored["attribution"]["scales"] == [] and stored["attribution"]["top_k"] == 50
    # computed by the previous version for scales=() and the same options
    assert settle(make_plan(attribution=AttributionConfig()), output).id == stored["id"] == "8eb3b720715a"


def test_the_day_is_that_of_the_first_call(tmp_path: Path) -> None:
    output = open_output(str(tmp_path))
    assert settle(make_plan(), output).day == DAY
    assert settle(make_plan(day=DAY + timedelta(days=1)), output) == make_plan()


def test_the_plan_tells_no_place_of_this_machine(tmp_path: Path) -> None:
    settle(make_plan(), open_output(str(tmp_path)))
    told = json.loads((tmp_path / PLAN).read_text())
    assert told["inputs"] == [{"name": "a.jsonl", "rows": 5, "bytes": 100, "ids": "ids"}]
    assert (told["rows"], told["shards"], told["id"]) == (5, 3, make_plan().id)
    assert "/data" not in (tmp_path / PLAN).read_text()


@pytest.mark.parametrize(
    "stored", ["", "{}", "[]", '{"fastattr_batch": 2, "day": "2026-11-22"}', '{"fastattr_batch": 1}']
)
def test_a_plan_that_cannot_be_read(tmp_path: Path, stored: str) -> None:
    (tmp_path / PLAN).write_text(stored)
    with pytest.raises(SaveError, match="cannot be read"):
        settle(make_plan(), open_output(str(tmp_path)))


def test_a_log_is_no_place_for_a_batch(tmp_path: Path) -> None:
    write_segment(tmp_path, [make_record()])
    with pytest.raises(SaveError, match="they are not of a batch"):
        settle(make_plan(), open_output(str(tmp_path)))
    assert not (tmp_path / PLAN).exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("shard_rows", 0), ("max_new_tokens", True), ("limit", -1), ("content", "all"), ("images", "keep")],
)
def test_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is"):
        make_plan(**{name: value})


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    output = open_output(str(tmp_path / "new" / "out"))
    with output.locked(), pytest.raises(SaveError, match="another batch is at work"), output.locked():
        pass
    with output.locked():
        pass
