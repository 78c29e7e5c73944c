"""Whole batches in this process: what is written, what fails, and where it goes on."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastattr
from fastattr import AttributionConfig
from fastattr.adapters import Model, encode
from fastattr.batch import Progress, Summary, run
from fastattr.batch.explaining import Ready, backing_off, explain_rows, load_model
from fastattr.batch.output import Failure, open_output, reasons_of
from fastattr.batch.plan import Shard
from fastattr.batch.running import Engine
from fastattr.batch.shards import MAX_DEATHS, Job, ShardResult, Task, Underway, run_shard
from fastattr.batch.sources import Row
from fastattr.errors import FastattrError, InputError, SaveError
from fastattr.images import read_visuals
from fastattr.log import read
from fastattr.log.doctor import examine
from fastattr.log.reading import query
from tests.batch.scenes import ANSWER, PROMPT, failures, png, records, write_jsonl, write_scenes

LENS = AttributionConfig(method="lens", scales=(1.0,), evidence=False)


def batch(source: Path, out: Path, engine: Engine, **options: Any) -> Summary:
    return run(source, out, engine=engine, **{"attribution": LENS, "shard_rows": 4, **options})


def test_movies_animations_and_sized_parts(tmp_path: Path, inline: Engine, model: Model) -> None:
    """A movie is a video, an animated picture its first frame with a note; an unsupported size fails the row."""
    frames = [Image.new("RGB", (64, 48), (40 * k, 90, 200)) for k in range(5)]
    gif, clip = io.BytesIO(), tmp_path / "clip.mp4"
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    write_movie(clip, frames)
    sized = {"type": "image", "base64": base64.b64encode(png(0)).decode(), "resized_height": 64, "resized_width": 96}
    asked = [{"role": "user", "content": [sized, {"type": "text", "text": PROMPT}]}]
    gif_part = {"type": "video", "video": "data:image/gif;base64," + base64.b64encode(gif.getvalue()).decode()}
    rows: list[dict[str, Any]] = [
        {"id": "movie", "image": "clip.mp4", "prompt": PROMPT},
        {"id": "gif", "image": {"base64": base64.b64encode(gif.getvalue()).decode()}, "prompt": PROMPT},
        {"id": "gif as video", "messages": [{"role": "user", "content": [gif_part, {"type": "text", "text": PROMPT}]}]},
        {"id": "sized", "messages": asked},
        {"id": "broken", "image": {"base64": base64.b64encode(clip.read_bytes()[:300]).decode()}, "prompt": PROMPT},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", [{**each, "response": ANSWER} for each in rows])
    summary = batch(source, tmp_path / "out", inline, max_error_rate=1.0)
    assert (summary.written, summary.failed) == (3, 2)
    found = {record.envelope.request_id: record.attribution for record in read(tmp_path / "out")}
    assert [found[id].image[0].shape[1] for id in ("movie", "gif", "gif as video")] == [4, 1, 5]
    assert any("4 of the 5 frames of a video are shown" in note for note in found["movie"].notes)
    assert any("only frame 1 of the 5 frames of a GIF is shown" in note for note in found["gif"].notes)
    told = {id: json.dumps(each) for id, each in failures(tmp_path / "out").items()}
    assert (
        "chooses the size of pictures by a rule of its own" in told["sized"] and "cannot be decoded" in told["broken"]
    )


def write_movie(path: Path, frames: Sequence[Image.Image]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = frames[0].size
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def test_records_are_what_attribute_says(tmp_path: Path, inline: Engine, model: Model) -> None:
    """Evidence and all, with generated and given answers, text and ids; read by the log's own readers."""
    answer = model.processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    rows: list[dict[str, Any]] = [
        {"id": "text", "response": ANSWER},
        {"id": "ids", "response_ids": answer},
        {"id": "generated"},
        {"id": "two", "response": ANSWER, "images": [_data_url(0), _data_url(1)]},
    ]
    for each in rows:
        each |= {"prompt": PROMPT} | ({} if "images" in each else {"image": _data_url(0)})
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    config = AttributionConfig(scales=(1.0, 1.5))
    summary = run(
        source, out, attribution=config, content="text", images="store", max_new_tokens=6, shard_rows=3, engine=inline
    )
    assert summary == Summary("done", total=4, written=4, failed=0, left=0, earlier=0)
    found = {record.envelope.request_id: record for record in read(out)}
    assert found.keys() == {each["id"] for each in rows}
    for each in rows:
        response = each.get("response_ids", each.get("response"))
        images = [png(0), png(1)] if "images" in each else [png(0)]
        why = fastattr.attribute(model, images, PROMPT, response, scales=config.scales, max_new_tokens=6)
        record = found[each["id"]]
        assert record.attribution.token_ids == why.token_ids
        assert record.attribution.response == why.response
        assert why.evidence is not None and record.attribution.evidence is not None
        torch.testing.assert_close(record.attribution.evidence, why.evidence)
        for kept, maps in zip(record.attribution.image, why.image, strict=True):
            assert float((kept - maps).abs().max()) <= 0.5 / 255 + 1e-6
        assert len(record.envelope.images or ()) == len(images)
        assert record.envelope.metadata == {"input": "in.jsonl", "row": rows.index(each) + 1}
    assert examine(out).healthy


@pytest.mark.parametrize("name", ["best", "tam"])
def test_a_batch_is_explained_by_the_named_configuration(
    tmp_path: Path, inline: Engine, model: Model, name: str
) -> None:
    row = {"id": "one", "response": ANSWER, "prompt": PROMPT, "image": _data_url(0)}
    run(write_jsonl(tmp_path / "in.jsonl", [row]), tmp_path / "out", attribution=name, engine=inline)
    (record,) = read(tmp_path / "out")
    why = fastattr.attribute(model, png(0), PROMPT, ANSWER, name)
    assert record.attribution.config == why.config
    for kept, maps in zip(record.attribution.image, why.image, strict=True):
        assert float((kept - maps).abs().max()) <= 0.5 / 255 + 1e-6


def test_generated_answers_follow_the_models_configuration(model: Model) -> None:
    """Rows explained together get the answers that transformers generates for each alone."""
    config = model.hf_model.generation_config
    before = config.repetition_penalty
    config.repetition_penalty = 3.0
    try:
        rows = [
            Ready(Row(i, str(i), f"row {i}", (), PROMPT, ANSWER if i == 1 else None), (png(i),), 1) for i in range(3)
        ]
        found = explain_rows(model, rows, LENS, 30)
        for i in (0, 2):
            why = found[i]
            assert isinstance(why, fastattr.Attribution)
            encoded = encode(model, read_visuals(png(i)), PROMPT)
            ids = encoded.input_ids[None]
            inputs = {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
            options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "suppress_tokens": never}
            said = model.hf_model.generate(**inputs, **options)[0, ids.shape[1] :].tolist()
            plain = model.hf_model.generate(**inputs, **options, repetition_penalty=1.0)[0, ids.shape[1] :].tolist()
            said = said[: said.index(config.eos_token_id)] if config.eos_token_id in said else said
            assert list(why.token_ids) == said != plain
    finally:
        config.repetition_penalty = before


def test_shards_do_not_decide_what_is_written(tmp_path: Path, inline: Engine) -> None:
    """But for who wrote a record, and under which number."""
    source = write_scenes(tmp_path / "in.jsonl", 11)
    tables = []
    for shard_rows in (3, 100):
        out = tmp_path / str(shard_rows)
        batch(source, out, inline, shard_rows=shard_rows)
        assert examine(out).healthy
        table = records(out)
        for writer in set(table["writer"].to_pylist()):  # each counts from 0 in the order of the rows
            own = table.filter(pa.compute.equal(table["writer"], writer))
            order = sorted(
                (json.loads(about)["row"], n)
                for about, n in zip(own["metadata"].to_pylist(), own["sequence"].to_pylist(), strict=True)
            )
            assert [n for _, n in order] == list(range(own.num_rows))
        tables.append(table.drop_columns(["writer", "sequence", "record_id"]))
    one, other = tables
    # rows read together round together: numbers agree to a little, and everything else exactly
    numbers = ["mean_log_prob", "mean_evidence", "min_evidence", "mean_image_share"]
    assert one.num_rows == 11
    assert one.drop_columns([*numbers, "tokens", "maps"]).equals(other.drop_columns([*numbers, "tokens", "maps"]))
    for name in numbers:
        if one[name].null_count < one.num_rows:
            np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), atol=1e-3)
    for mine, others in zip(one["maps"].to_pylist(), other["maps"].to_pylist(), strict=True):
        levels = [np.frombuffer(maps, np.uint8).astype(float) for maps in (mine, others)]
        assert np.abs(levels[0] - levels[1]).mean() < 1
    ids = [[[token["id"] for token in row] for row in table["tokens"].to_pylist()] for table in tables]
    assert ids[0] == ids[1]


def test_a_second_run_does_nothing(tmp_path: Path, inline: Engine) -> None:
    source, out = write_scenes(tmp_path / "in.jsonl", 5), tmp_path / "out"
    told: list[Progress] = []
    batch(source, out, inline, tell=told.append)
    assert [(each.done, each.shards_done) for each in told] == [(0, 0), (4, 1), (5, 2)]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert batch(source, out, _refusing) == Summary("done", total=5, written=5, failed=0, left=0, earlier=5)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_store_as_output(tmp_path: Path, inline: Engine) -> None:
    rows = [json.loads(line) for line in write_scenes(tmp_path / "in.jsonl", 6).read_text().splitlines()]
    rows[1]["image"] = "none.png"
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), f"memory://{tmp_path.name}/out"
    options: dict[str, Any] = {"attribution": LENS, "shard_rows": 4, "max_error_rate": 0.5}
    done = run(source, out, engine=inline, **options)
    assert done == Summary("done", total=6, written=5, failed=1, left=0, earlier=0)
    assert run(source, out, engine=_refusing, **options) == replace(done, earlier=6)
    assert {record.envelope.request_id for record in read(out)} == {f"scene-{k}" for k in (0, 2, 3, 4, 5)}
    with pytest.raises(SaveError, match="holds another batch"):
        run(source, out, engine=_refusing, **{**options, "shard_rows": 5})


def test_only_what_is_missing_is_done_again(tmp_path: Path, inline: Engine) -> None:
    source, out = write_scenes(tmp_path / "in.jsonl", 10), tmp_path / "out"
    batch(source, out, inline)
    whole = records(out)
    lost = sorted(out.glob("date=*/*.parquet"))[1]
    lost.unlink()
    lost.with_name(f".{lost.name}.tmp").write_bytes(b"torn")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("date=*/*.parquet")}
    assert batch(source, out, inline).earlier == 6
    assert records(out).equals(whole)
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("date=*/*.parquet")}.items()


def test_rows_that_fail(tmp_path: Path, inline: Engine) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "torn.png").write_bytes(png()[:200])
    good = {"image": _data_url(0), "prompt": PROMPT, "response": ANSWER}
    bad: dict[str, tuple[dict[str, Any], str, str]] = {
        "missing": ({"image": "none.png"}, "ImageError", "none.png"),
        "text": ({"image": "text.png"}, "ImageError", "not in an image format"),
        "torn": ({"image": "torn.png"}, "ImageError", "cannot be decoded"),
        "unprompted": ({"prompt": None}, "InputError", "neither prompt nor messages"),
        "empty": ({"response": ""}, "InputError", "response"),
        "strange": ({"response": [10**9]}, "InputError", "1000000000"),
    }
    rows = [{"id": id, **good, **changed} for id, (changed, _, _) in bad.items()]
    rows.insert(2, {"id": "good", **good})
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    summary = batch(source, out, inline, max_error_rate=1.0)
    assert summary == Summary("done", total=7, written=1, failed=6, left=0, earlier=0)
    assert records(out)["request_id"].to_pylist() == ["good"]
    told = failures(out)
    assert told.keys() == bad.keys()
    for id, (_, kind, reason) in bad.items():
        assert told[id]["error_type"] == kind and reason in told[id]["error"], told[id]
        assert told[id]["attempt"] == 1
        assert told[id]["row"] == f"in.jsonl row {[row['id'] for row in rows].index(id) + 1}"
    assert batch(source, out, _refusing, max_error_rate=1.0) == replace(summary, earlier=7)


def test_a_shard_without_a_good_row_is_done_all_the_same(tmp_path: Path, inline: Engine) -> None:
    source, out = (
        write_jsonl(tmp_path / "in.jsonl", [{"id": str(k), "image": None, "prompt": "?"} for k in range(3)]),
        tmp_path / "out",
    )
    assert batch(source, out, inline, max_error_rate=1.0).failed == 3
    assert [pq.read_metadata(path).num_rows for path in out.glob("date=*/*.parquet")] == [0]
    diagnosis = examine(out)
    assert diagnosis.healthy and (diagnosis.segments, diagnosis.records) == (1, 0)
    assert list(read(out)) == []
    assert query(out, "select count(*) as n from tokens").to_pylist() == [{"n": 0}]
    assert batch(source, out, _refusing, max_error_rate=1.0).earlier == 3


def test_failures_of_an_attempt_that_did_not_publish_are_forgotten(tmp_path: Path, inline: Engine) -> None:
    source, out = write_scenes(tmp_path / "in.jsonl", 2), tmp_path / "out"
    (out / "failed").mkdir(parents=True)
    stale = {"id": "scene-0", "row": "in.jsonl row 1", "error_type": "ImageError", "error": "x", "attempt": 1}
    (out / "failed" / "000000.jsonl").write_text(json.dumps(stale) + "\n")
    assert batch(source, out, inline) == Summary("done", total=2, written=2, failed=0, left=0, earlier=0)
    assert failures(out) == {}


def test_too_many_failures_end_the_batch_and_what_is_there_stays(tmp_path: Path, inline: Engine) -> None:
    rows = [json.loads(line) for line in write_scenes(tmp_path / "in.jsonl", 20).read_text().splitlines()]
    for each in rows[4:12]:
        each["image"] = "none.png"
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    gave_up = batch(source, out, inline, max_error_rate=0.1)
    assert gave_up == Summary("too_many_failures", total=20, written=4, failed=4, left=12, earlier=0)
    assert batch(source, out, _refusing, max_error_rate=0.1) == replace(gave_up, earlier=8)
    done = batch(source, out, inline, max_error_rate=0.4)
    assert done == Summary("done", total=20, written=12, failed=8, left=0, earlier=8)


def test_broken_lines_are_failed_rows_of_the_batch(tmp_path: Path, inline: Engine) -> None:
    good = [json.dumps({"id": f"g{k}", "image": _data_url(k), "prompt": PROMPT, "response": ANSWER}) for k in range(3)]
    broken = ['{"id"', "", '{"id": null}', good[0], json.dumps({"id": "x", "image": {"bytes": 3}, "prompt": "?"})]
    (tmp_path / "in.jsonl").write_text("\n".join([good[0], *broken, *good[1:]]) + "\n")
    out = tmp_path / "out"
    summary = batch(tmp_path / "in.jsonl", out, inline, max_error_rate=1.0)
    assert summary == Summary("done", total=8, written=3, failed=5, left=0, earlier=0)
    assert records(out)["request_id"].to_pylist() == ["g0", "g1", "g2"]
    told = [json.loads(line) for path in sorted(out.glob("failed/*")) for line in path.read_text().splitlines()]
    assert [(each["id"], each["row"]) for each in told] == [
        *((None, f"in.jsonl row {k}") for k in (2, 3, 4)),
        ("g0", "in.jsonl row 5"),
        ("x", "in.jsonl row 6"),
    ]
    assert batch(tmp_path / "in.jsonl", out, _refusing, max_error_rate=1.0) == replace(summary, earlier=8)


def test_a_decoder_that_raises_anything_fails_its_row(
    tmp_path: Path, inline: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_scenes(tmp_path / "in.jsonl", 3)
    ready = fastattr.batch.shards.get_ready

    def strange(row: Row, *options: Any) -> Ready:
        if row.id == "scene-1":
            raise ZeroDivisionError("no such number" + "!" * 5000)
        return ready(row, *options)

    monkeypatch.setattr("fastattr.batch.shards.get_ready", strange)
    assert batch(source, tmp_path / "out", inline, max_error_rate=1.0).written == 2
    (told,) = failures(tmp_path / "out").values()
    assert told["error_type"] == "ZeroDivisionError" and len(told["error"]) == 2000


@pytest.mark.parametrize("shard_rows", [4, 100])
def test_a_batch_that_is_given_up_says_why_and_its_counts_add_up(tmp_path: Path, model: Model, shard_rows: int) -> None:
    """Also in the first shard, which is never published: its failures are written to a file."""
    rows = [json.loads(line) for line in write_scenes(tmp_path / "in.jsonl", 40).read_text().splitlines()]
    for k in range(12):
        rows[k] |= {"image": f"none-{k}.png"} if k % 3 else {"prompt": 3}
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"

    def engine(
        job: Job, tasks: Sequence[Task], *, stop: threading.Event
    ) -> Generator[ShardResult | Underway, None, None]:
        """Reports every step in order, as the workers of `local.run` do."""
        for task in tasks:
            told: list[Underway] = []
            failed: list[Failure] = []

            def step(
                rows: Sequence[int],
                done: int,
                fresh: Sequence[Failure],
                shard: int = task.shard.number,
                told: list[Underway] = told,
                failed: list[Failure] = failed,
            ) -> None:
                failed += fresh
                told.append(Underway(shard, done, tuple(failed)))

            result = run_shard(model, job, task, open_output(str(tmp_path / "elsewhere")), step)
            yield from told
            if shard_rows == 4:
                result = run_shard(model, job, task, open_output(job.out))
                yield result

    summary = batch(source, out, engine, shard_rows=shard_rows, max_error_rate=0.1)
    assert summary.outcome == "too_many_failures" and summary.failed > 4
    assert summary.total == 40 == summary.written + summary.failed + summary.left
    told = failures(out)
    assert len(told) == summary.failed == sum(reason.count for reason in summary.reasons)
    first, second = summary.reasons
    assert first.count > second.count
    assert first.example.error_type == "ImageError" and first.example.id == "scene-1"
    assert "none-1.png" in first.example.error
    assert second.example.id == "scene-0" and "prompt is 3" in second.example.error
    again = batch(source, out, engine, shard_rows=shard_rows, max_error_rate=0.1)
    assert again.reasons == summary.reasons and (again.failed, again.left) == (summary.failed, summary.left)
    if shard_rows == 4:
        done = batch(source, out, engine, shard_rows=shard_rows, max_error_rate=1.0)
        assert done == Summary("done", total=40, written=28, failed=12, left=0, earlier=4)


@given(st.lists(st.sampled_from(["image 'a.png' is gone", "image 'b.png' is gone", "row 7 broke", "row 8 broke", "x"])))
def test_reasons_count_every_failure_once(errors: list[str]) -> None:
    told = [Failure(str(k), f"in.jsonl row {k + 1}", "InputError", error, 1) for k, error in enumerate(errors)]
    reasons = reasons_of(told)
    assert sum(reason.count for reason in reasons) == len(errors)
    kinds = {error.split()[0] for error in errors}
    assert len(reasons) == len(kinds)
    assert [reason.count for reason in reasons] == sorted((reason.count for reason in reasons), reverse=True)
    for reason in reasons:
        kind = reason.example.error.split()[0]
        assert reason.count == sum(error.split()[0] == kind for error in errors)
        assert reason.example == next(each for each in told if each.error.split()[0] == kind)


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_an_output_that_cannot_be_made_is_refused_before_inputs_are_read(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SaveError, match=r"cannot be written: .*file' is a file; choose another --out"):
        batch(tmp_path / "missing.jsonl", tmp_path / place, _refusing)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_publishes_nothing_of_a_shard(
    tmp_path: Path, inline: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_scenes(tmp_path / "in.jsonl", 6), tmp_path / "out"
    original, calls = os.fsync, iter(range(100))

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".tmp") and next(calls) >= 2:  # the plan, the first part
            raise OSError(28, "No space left on device")
        original(handle)

    with monkeypatch.context() as patched, pytest.raises(SaveError, match="No space left on device"):
        patched.setattr(os, "fsync", full)
        batch(source, out, inline)
    assert records(out).num_rows == 4
    assert [path.name for path in out.rglob("*.tmp")] == []
    assert batch(source, out, inline) == Summary("done", total=6, written=6, failed=0, left=0, earlier=4)


def test_hopeless_models_end_the_batch(tmp_path: Path, inline: Engine) -> None:
    source = write_scenes(tmp_path / "in.jsonl", 2)
    with pytest.raises(fastattr.BackendError):
        batch(source, tmp_path / "out", inline, attribution=replace(LENS, backend="triton"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"max_error_rate": 1.5}, "max_error_rate is 1.5"),
        ({"attribution": AttributionConfig(method="tam", scales=(1.0,), compat="tam")}, "compat is 'tam'"),
    ],
)
def test_options_out_of_range(tmp_path: Path, inline: Engine, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        batch(write_scenes(tmp_path / "in.jsonl", 1), tmp_path / "out", inline, **options)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_loaded() -> None:
    for name in ("nothing:here", "json:loads", "json:nothing"):
        with pytest.raises(InputError, match=name):
            load_model(name, None)


# --- memory ----------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 12), max_size=30), limit=st.integers(1, 40), at_once=st.integers(1, 16))
def test_backing_off_gives_every_row_one_result(sizes: list[int], limit: int, at_once: int) -> None:
    """Rows of these sizes, of which `limit` fits at once: a row fails only where it does not fit alone."""
    rows = [Ready(Row(k, str(k), "", (), "", None), (), size) for k, size in enumerate(sorted(sizes))]
    asked: list[int] = []

    def explain(chunk: Sequence[Ready]) -> list[str | Exception]:
        asked.append(len(chunk))
        if sum(each.n_pixels for each in chunk) > limit:
            raise torch.OutOfMemoryError
        return [each.row.id for each in chunk]

    with patch("gc.collect"):  # which takes a while in a process full of torch
        results = list(backing_off(rows, explain, at_once=at_once))
    assert [each for each, _ in results] == rows
    for each, result in results:
        if each.n_pixels <= limit:
            assert result == each.row.id
        else:
            assert isinstance(result, torch.OutOfMemoryError)
    assert asked == sorted(asked, reverse=True) or max(asked) <= at_once


def test_rows_too_large_for_memory_fail_alone(tmp_path: Path, model: Model, inline: Engine) -> None:
    """A model that runs out of memory on more than one picture at once."""
    rows = [{"id": str(k), "image": _data_url(k), "prompt": PROMPT, "response": ANSWER} for k in range(6)]
    rows[2] |= {"image": None, "images": [_data_url(7), _data_url(8)]}

    def forward(module: Any, args: Any, options: dict[str, Any]) -> None:
        if len(options["pixel_values"]) > 1:
            raise torch.OutOfMemoryError("no room for this picture")

    hook = model.hf_model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
        summary = batch(source, out, inline, max_error_rate=0.5)
    finally:
        hook.remove()
    assert (summary.written, summary.failed) == (5, 1), failures(out)
    assert failures(out)["2"]["error_type"] == "OutOfMemoryError"


# --- deaths ----------------------------------------------------------------------------------------


@given(killers=st.sets(st.integers(0, 15), max_size=5), chunk=st.integers(1, 16), data=st.data())
def test_rows_that_end_their_worker_are_found(killers: set[int], chunk: int, data: st.DataObject) -> None:
    """Whatever is explained together, all killers are given up, no other row, and after two deaths each and few more."""
    task = Task(Shard(0, 0, 0, 16, 0, 0))
    order = data.draw(st.permutations(range(16)))
    for _ in range(100):
        alone = [[row] for row in sorted(task.suspects)]
        others = [row for row in order if row not in task.suspects | task.crashed]
        chunks = alone + [others[k : k + chunk] for k in range(0, len(others), chunk)]
        died_at = next((each for each in chunks if killers.intersection(each)), None)
        if died_at is None:
            break
        task = task.after_death(died_at)
    assert task.crashed == killers
    assert task.attempt <= 1 + 2 * len(killers)


def test_workers_that_die_without_a_row_end_the_batch() -> None:
    task = Task(Shard(3, 0, 0, 16, 0, 0))
    for _ in range(MAX_DEATHS - 1):
        task = task.after_death(())
    with pytest.raises(FastattrError, match="shard 3, and not while they explained a row"):
        task.after_death(())


def test_crashed_rows_are_told(tmp_path: Path, model: Model) -> None:
    source, out = write_scenes(tmp_path / "in.jsonl", 5), tmp_path / "out"

    def engine(
        job: Job, tasks: Sequence[Task], *, stop: threading.Event
    ) -> Generator[ShardResult | Underway, None, None]:
        for task in tasks:
            crashed = frozenset({1, 4})
            yield run_shard(model, job, replace(task, crashed=crashed, attempt=5), open_output(job.out))

    assert batch(source, out, engine, max_error_rate=0.5).failed == 2
    told = failures(out)
    assert told.keys() == {"scene-1", "scene-4"}
    assert {(each["error_type"], each["attempt"]) for each in told.values()} == {("crashed", 5)}


def _data_url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(seed)).decode()


def _refusing(
    job: Job, tasks: Sequence[Task], *, stop: threading.Event
) -> Generator[ShardResult | Underway, None, None]:
    raise AssertionError("there is nothing to do")
    yield
