"""A record says what its attribution says, and gives it back as far as it was kept."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastattr import Attribution, AttributionConfig, InputError, SaveError
from fastattr.calibration import Calibration
from fastattr.log.record import Content, Record, check_metadata, check_request_id, from_batch, from_row, to_batch
from fastattr.log.schema import SCHEMA
from tests.log.records import make_record

GRIDS = ((1, 4, 6), (3, 2, 2))
MADE_UP = Calibration(
    0.1, n_true=900, n_false=3, true_marked=45, false_marked=3, words="content words", dataset="scenes", model="x"
)


def row_of(why: Attribution, content: Content = "text", **changes: Any) -> dict[str, Any]:
    envelope = dataclasses.replace(make_record()[1], **changes)
    (row,) = pa.Table.from_batches([to_batch(why, envelope, content)]).to_pylist()
    return row


def round_trip(why: Attribution, content: Content = "text", **changes: Any) -> Record:
    envelope = dataclasses.replace(make_record()[1], **changes)
    (record,) = from_batch(to_batch(why, envelope, content))
    return record


@pytest.mark.parametrize("pictures", [True, False])
def test_a_record_comes_back(pictures: bool) -> None:
    why, envelope = make_record(grids=GRIDS, pictures=pictures, seed=3, metadata={"a": [1, None, "ü"], "b": {"c": 0.5}})
    why = dataclasses.replace(why, calibration=MADE_UP)
    record = from_batch(to_batch(why, envelope, "text"))[0]
    assert record.envelope == envelope
    assert record.envelope.time.tzinfo is timezone.utc
    again = record.attribution
    for ours, theirs in zip(why.image, again.image, strict=True):
        levels = np.floor(ours.numpy().astype(np.float64) * 255 + 0.5)  # no ties among random numbers
        assert theirs.dtype == torch.float32
        assert np.array_equal(theirs.numpy(), levels.astype(np.float32) / np.float32(255))
    told = ("of videos only the first frame was kept: maps of later time steps are shown over it",)
    assert again.notes == why.notes + (told if pictures and any(grid[0] > 1 for grid in GRIDS) else ())
    assert len(again.pictures) == (len(GRIDS) if pictures else 0)
    for ours, theirs in zip(envelope.images or (), again.pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(ours))), theirs[0])
    for field in dataclasses.fields(Attribution):
        if field.name in ("image", "pictures", "context", "relevance", "notes"):
            continue
        ours, theirs = getattr(why, field.name), getattr(again, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
            assert ours.dtype == theirs.dtype
        else:
            assert ours == theirs, field.name
    once_more = from_batch(to_batch(again, envelope, "text"))[0].attribution  # what was quantised stays as it is
    assert all(torch.equal(a, b) for a, b in zip(again.image, once_more.image, strict=True))
    assert torch.equal(again.context, once_more.context)


def test_rows_of_one_batch_do_not_mix() -> None:
    records = [make_record(n_tokens=n, seed=n, sequence=n, evidence=n != 2) for n in (3, 1, 2, 9)]
    table = pa.Table.from_batches([to_batch(*record, "text") for record in records])
    (batch,) = table.combine_chunks().to_batches()
    for slow, fast, (why, envelope) in zip(map(from_row, table.to_pylist()), from_batch(batch), records, strict=True):
        alone = from_batch(to_batch(why, envelope, "text"))[0]
        for found in (slow, fast):
            assert found.envelope == alone.envelope == envelope
            assert found.attribution.response == why.response
            assert torch.equal(found.attribution.context, alone.attribution.context)
            assert torch.equal(found.attribution.image[0], alone.attribution.image[0])
            assert torch.equal(found.attribution.log_prob, why.log_prob)
            assert (found.attribution.evidence is None) == (why.evidence is None)
    assert [record.envelope.sequence for record in from_batch(batch.slice(1, 2))] == [1, 2]


def test_content_is_masked() -> None:
    why = make_record()[0]
    text, ids, none = (row_of(why, content) for content in ("text", "ids", "none"))
    words = ["A", " red", " circle", " and", " a", " red", " circle", "."]
    assert text["prompt"] == "What?"
    assert (text["response"], text["context_text"]) == ("".join(words), ["What", "?"])
    assert [token["text"] for token in text["tokens"]] == words
    assert [text["response"][token["start"] : token["stop"]] for token in text["tokens"]] == words
    for row in (ids, none):
        assert row["prompt"] is row["response"] is row["context_text"] is None
        assert all(token["text"] is token["start"] is token["stop"] is None for token in row["tokens"])
        kept = json.dumps({key: value for key, value in row.items() if key not in ("maps", "time")})
        assert "circle" not in kept
    assert [token["id"] for token in ids["tokens"]] == list(range(8))
    assert all(token["id"] is None for token in none["tokens"])
    by_id, nameless = from_row(ids).attribution, from_row(none).attribution
    assert by_id.tokens == tuple(f"<{i}>" for i in range(8))
    assert (by_id.response, by_id.token_ids) == ("".join(by_id.tokens), tuple(range(8)))
    assert (nameless.tokens, nameless.token_ids) == (("·",) * 8, (-1,) * 8)
    for found in (by_id, nameless):
        assert found.prompt == ""
        assert found.context_tokens == ("·", "·", *found.tokens)
        assert [found.response[slice(*span)] for span in found.spans] == list(found.tokens)


@pytest.mark.parametrize("content", ["text", "ids", "none"])
@pytest.mark.parametrize("pictures", [True, False])
def test_the_report_works_from_a_record(tmp_path: Path, content: Content, pictures: bool) -> None:
    why, envelope = make_record(grids=GRIDS, pictures=pictures)
    again = from_batch(to_batch(why, envelope, content))[0].attribution
    page = again.to_html(tmp_path / "x.html").read_text()
    assert ("data:image/png;base64," in page) == pictures
    again.to_png(tmp_path / "x.png")


def test_summaries() -> None:
    why = make_record()[0]
    why = dataclasses.replace(
        why, token_ids=(5, 7, 5, 5, 7, 9, 5, 1), evidence=torch.tensor([1.0, -1.0, 3.0, 0.5, 0.5, 2.0, -2.5, 1.0])
    )
    row = row_of(why)
    assert [token["repeat"] for token in row["tokens"]] == [0, 0, 1, 2, 1, 0, 3, 0]
    assert (row["mean_evidence"], row["min_evidence"]) == (0.5625, -2.5)
    assert row["low_evidence"] == 2  # the first " red" and the second " circle" are below 0 nats
    assert row["mean_log_prob"] == pytest.approx(sum(why.log_prob.tolist()) / 8)
    assert (row["n_tokens"], row["n_prompt"]) == (8, 2)
    assert [token["position"] for token in row["tokens"]] == list(range(8))
    assert row["mean_image_share"] == pytest.approx(np.mean([token["image_share"] for token in row["tokens"]]))
    stored = dataclasses.replace(why, image=tuple((maps * 255).round() / 255 for maps in why.image))
    for name, values in vars(stored.descriptors).items():
        assert [token[name] for token in row["tokens"]] == pytest.approx(values.tolist(), abs=1e-6)
    without = row_of(dataclasses.replace(why, evidence=None))
    assert without["mean_evidence"] is without["min_evidence"] is without["low_evidence"] is None
    assert all(token["evidence"] is None for token in without["tokens"])


def test_the_row_is_of_the_schema() -> None:
    batch = to_batch(*make_record(pictures=True), "text")
    assert batch.schema.equals(SCHEMA, check_metadata=True)
    batch.validate(full=True)
    for field, column in zip(SCHEMA, batch.columns, strict=True):
        assert field.nullable or column.null_count == 0, field.name


def filled(heat: np.ndarray) -> set[tuple[int, int]]:
    """The cells of `[h w]` that a plain flood from the peak reaches, side by side, at half the peak or more."""
    peak = np.unravel_index(heat.argmax(), heat.shape)
    found, waiting = set(), [(int(peak[0]), int(peak[1]))]
    while waiting:
        y, x = waiting.pop()
        inside = 0 <= y < heat.shape[0] and 0 <= x < heat.shape[1]
        if inside and (y, x) not in found and heat[y, x] >= 0.5 * heat[peak]:
            found.add((y, x))
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from([0.3, 0.6, 0.9]),
)
def test_boxes_are_those_of_a_plain_flood(seed: int, grids: list[tuple[int, int, int]], dark: float) -> None:
    why = make_record(n_tokens=5, grids=tuple(grids))[0]
    random = np.random.default_rng(seed)
    maps = [(random.choice([0, 0.25, 0.5, 1], (5, *grid)) * (random.random((5, *grid)) > dark)) for grid in grids]
    extents = tuple((0.125, 0.25, 0.625, 1.0) if i % 2 else (0.0, 0.0, 1.0, 1.0) for i in range(len(grids)))
    why = dataclasses.replace(why, image=tuple(torch.tensor(m, dtype=torch.float32) for m in maps), extents=extents)
    for i, token in enumerate(row_of(why)["tokens"]):
        peaks = [m[i].max() for m in maps]
        if max(peaks) == 0:
            assert token["box"] is token["box_image"] is None
            continue
        image = peaks.index(max(peaks))
        heat = maps[image][i]
        frame = next(f for f in heat if f.max() == max(peaks))
        cells = filled(frame)
        (_, h, w), (left, top, right, bottom) = grids[image], extents[image]
        expected = [
            left + (right - left) * min(x for _, x in cells) / w,
            top + (bottom - top) * min(y for y, _ in cells) / h,
            left + (right - left) * (max(x for _, x in cells) + 1) / w,
            top + (bottom - top) * (max(y for y, _ in cells) + 1) / h,
        ]
        assert token["box_image"] == image
        assert token["box"] == pytest.approx(expected, abs=1e-6)


def test_a_spiral_is_one_region() -> None:
    path = ["#####.", "....#.", "###.#.", "#.#.#.", "#...#.", "#####."]
    maps = torch.tensor([[[[float(cell == "#") for cell in row] for row in path]]])
    why = dataclasses.replace(make_record(n_tokens=1)[0], image=(maps,))
    (token,) = row_of(why)["tokens"]
    assert token["box"] == pytest.approx([0, 0, 5 / 6, 1])


@given(st.integers(0, 10**6), st.integers(1, 40), st.booleans(), st.sampled_from([2, 50]))
def test_the_context_of_most_relevance_is_kept(seed: int, n: int, arc: bool, levels: int) -> None:
    why = make_record(n_tokens=n)[0]
    random = np.random.default_rng(seed)
    weight, relevance = (random.integers(0, levels, (n, n + 2)).astype(np.float32) / levels for _ in range(2))
    why = dataclasses.replace(
        why,
        context=torch.tensor(weight),
        relevance=torch.tensor(relevance) if arc else None,
        config=AttributionConfig(method="arc" if arc else "tam", scales=(1.0, 1.5, 2.0)),
    )
    row = row_of(why)
    again = from_row(row).attribution
    ranking = relevance if arc else weight
    for i, token in enumerate(row["tokens"]):
        before = [j for j in range(2 + i) if weight[i, j] > 0 or ranking[i, j] > 0]
        best = sorted(before, key=lambda j: (-ranking[i, j], j))[:16]
        assert [entry["index"] for entry in token["context"]] == best
        assert [entry["weight"] for entry in token["context"]] == weight[i, best].tolist()
        assert [entry["relevance"] for entry in token["context"]] == (
            relevance[i, best].tolist() if arc else [None] * len(best)
        )
        expected = np.zeros(n + 2, np.float32)
        expected[best] = weight[i, best]
        assert np.array_equal(again.context[i].numpy(), expected)
        if arc:
            expected[best] = relevance[i, best]
            assert again.relevance is not None
            assert np.array_equal(again.relevance[i].numpy(), expected)
    assert (again.relevance is None) == (not arc)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_and_spoils_nothing_else(tmp_path: Path, bad: float) -> None:
    why = make_record(grids=GRIDS)[0]
    floats = ("context", "relevance", "evidence", "log_prob", "agreement", "raw_range", "residual")
    changed = {name: getattr(why, name).clone() for name in floats}
    for values in changed.values():
        values[3] = bad
    maps = tuple(m.clone() for m in why.image)
    maps[1][5, 2, 1, 1] = bad
    spoiled = dataclasses.replace(why, image=maps, **changed)
    row, clean = row_of(spoiled), row_of(why)
    third, fifth = row["tokens"][3], row["tokens"][5]
    for name in ("log_prob", "evidence", "residual", "raw_min", "raw_max"):
        assert math.isnan(third[name])
        assert [token[name] for i, token in enumerate(row["tokens"]) if i != 3] == [
            token[name] for i, token in enumerate(clean["tokens"]) if i != 3
        ]
    assert all(math.isnan(value) for value in third["agreement"])
    assert third["context"] == []
    assert not third["degenerate"]
    assert fifth["degenerate"]
    assert fifth["box"] is None
    assert fifth["entropy"] == 0.0
    evidence = [token["evidence"] for i, token in enumerate(clean["tokens"]) if i != 3]
    assert row["mean_evidence"] == pytest.approx(np.mean(evidence), rel=1e-6)
    assert row["min_evidence"] == min(evidence)
    again = from_row(row).attribution
    assert all(float(m[5].max()) == 0 for m in again.image)
    assert again.degenerate.tolist() == [i == 5 for i in range(8)]
    assert again.evidence is not None
    assert again.evidence.isnan().tolist() == [i == 3 for i in range(8)]
    assert "NaN" not in again.to_html(tmp_path / "x.html").read_text().split("<script")[1]


def test_no_number_at_all_has_no_mean() -> None:
    why = make_record(evidence=math.nan)[0]
    row = row_of(why)
    assert math.isnan(row["mean_evidence"])
    assert math.isnan(row["min_evidence"])
    assert from_row(row).attribution.evidence is not None


@given(st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_any_number_in_a_map_is_stored(value: float) -> None:
    why = make_record(n_tokens=2)[0]
    maps = why.image[0].clone()
    maps[0, 0, 1, 2] = value
    again = round_trip(dataclasses.replace(why, image=(maps,))).attribution
    expected = 0.0 if not math.isfinite(value) else min(max(value, 0.0), 1.0)
    assert float(again.image[0][0, 0, 1, 2]) == pytest.approx(expected, abs=0.5 / 255 + 1e-6)


def test_half_precision_and_wide_floats_are_stored() -> None:
    why = make_record()[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {
            field.name: getattr(why, field.name).to(dtype)
            for field in dataclasses.fields(why)
            if isinstance(getattr(why, field.name), torch.Tensor) and field.name != "degenerate"
        }
        again = round_trip(dataclasses.replace(why, image=(why.image[0].to(dtype),), **tensors)).attribution
        torch.testing.assert_close(again.log_prob, why.log_prob.to(dtype).float())
        torch.testing.assert_close(again.image[0], why.image[0], atol=0.01, rtol=0)


def test_time_is_kept_to_the_microsecond_in_utc() -> None:
    elsewhere = datetime(2026, 11, 22, 23, 30, 0, 7, tzinfo=timezone(timedelta(hours=-5)))
    assert round_trip(make_record()[0], time=elsewhere).envelope.time == elsewhere


HOSTILE = [
    "",
    "a\x00b",
    "\ud800",
    "\ud83d",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "'; DROP TABLE x; --",
    "\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_stored_as_it_is_but_for_half_surrogates(text: str) -> None:
    why = make_record(n_tokens=1)[0]
    why = dataclasses.replace(
        why,
        response=text,
        tokens=(text,),
        spans=((0, len(text)),),
        context_tokens=(text, text, text),
        prompt=text,
        model=text,
        notes=(text,),
        versions=((text, text),),
    )
    stored = "".join("\ufffd" if 0xD800 <= ord(character) < 0xE000 else character for character in text)
    record = round_trip(why, request_id=text, metadata={"key": text, text: "value"}, model_revision=text)
    assert (record.envelope.request_id, record.envelope.model_revision) == (stored, stored)
    assert record.envelope.metadata == {"key": stored, stored: "value"}
    again = record.attribution
    assert (again.response, again.prompt, again.model) == (stored, stored, stored)
    assert (again.tokens, again.notes, again.spans) == ((stored,), (stored,), ((0, len(text)),))


@pytest.mark.parametrize("good", ["x" * 1024, "é" * 512, "€" * 341, "\ud800" * 341, ""])
def test_ids_of_up_to_a_kibibyte_are_kept(good: str) -> None:
    assert len(check_request_id(good).encode()) <= 1024


@pytest.mark.parametrize("bad", ["x" * 1025, "é" * 513, "€" * 342, "\ud800" * 342, "x" * 10**7, None, 7, b"id"])
def test_other_ids_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="request_id") as caught:
        check_request_id(bad)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "text",
        [("a", 1)],
        {1: "a"},
        {"a": math.nan},
        {"a": [math.inf]},
        {"a": {1, 2}},
        {"a": object()},
        {"a": b"bytes"},
        {"a": np.float32(1)},
        {"a": "x" * 10**7},
        {"a": ["x" * (1 << 16)]},
        {"a": "€" * 30_000},
        {"x" * 70_000: 1},
    ],
)
def test_metadata_that_is_no_json_or_too_large_is_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="metadata") as caught:
        check_metadata(bad)
    assert len(str(caught.value)) < 300
    with pytest.raises(InputError, match="metadata"):
        round_trip(make_record()[0], metadata=bad)


def test_deep_and_circular_metadata_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for bad in (circle, {"a": deep}):
        with pytest.raises(InputError, match="metadata"):
            check_metadata(bad)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_metadata_comes_back(metadata: dict[str, Any]) -> None:
    assert json.loads(check_metadata(metadata)) == metadata


def test_settings_of_a_newer_version_are_named() -> None:
    row = row_of(make_record()[0])
    row["settings"] = json.dumps({**json.loads(row["settings"]), "magic": 1})
    with pytest.raises(InputError, match=r"magic.*version"):
        from_row(row)


def test_settings_of_an_older_version_take_the_defaults() -> None:
    row = row_of(make_record()[0])
    settings = json.loads(row["settings"])
    del settings["regions"]
    row["settings"] = json.dumps(settings)
    assert from_row(row).attribution.config == make_record()[0].config


def test_settings_from_before_scales_could_be_none_are_read() -> None:
    row = row_of(make_record()[0])
    row["settings"] = json.dumps({**json.loads(row["settings"]), "scales": [], "scale_weights": None})
    assert from_row(row).attribution.config.scales is None


@pytest.mark.parametrize(
    "change",
    [
        {"maps": b"short"},
        {"grids": [[1, 4]]},
        {"n_tokens": 7},
        {"settings": "{"},
        {"settings": "[]"},
        {"versions": "7"},
        {"metadata": "{"},
        {"calibration": '{"a": 1}'},
        {"scale_grids": "[[[1]]]"},
        {"images": [b"no png"]},
        {"extents": [[0.0]]},
        {"n_prompt": 0},
    ],
)
def test_a_row_that_contradicts_itself_is_named(change: dict[str, Any]) -> None:
    row = {**row_of(make_record()[0]), **change}
    with pytest.raises(SaveError, match=f"record '{row['record_id']}' of writer '{row['writer']}' cannot be read"):
        from_row(row)


def test_rows_of_something_else_are_refused() -> None:
    with pytest.raises(SaveError, match=r"lack .*maps"):
        from_batch(to_batch(*make_record(), "text").drop_columns(["maps"]))
    with pytest.raises(SaveError, match="not a row"):
        from_row({"record_id": 7})
