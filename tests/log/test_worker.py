"""The worker process: what servers hand over is explained once, as they would have, and nothing is left waiting."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastattr
from fastattr import AttributionConfig, InputError, adapters
from fastattr.demo.examples import clip, images
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger, LogConfig, LogStats, Record, inbox, read
from fastattr.log.recipes.answering import PROMPT, inputs_of
from fastattr.log.recorder import Recorder, new_writer
from fastattr.log.rooms import open_room
from fastattr.log.sampling import share_of
from fastattr.log.segments import open_destination
from fastattr.log.worker import take_over, work
from tests.engine.family_models import ANSWER, TINY
from tests.engine.samples import make_attribution

PATIENCE_S = 60.0
WHY = make_attribution()


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return make_scene(5).image


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., AttributionLogger]]:
    loggers: list[AttributionLogger] = []

    def make(name: str = "dest", **options: Any) -> AttributionLogger:
        loggers.append(AttributionLogger(tmp_path / name, **{"sample_rate": 1.0, **options}))
        return loggers[-1]

    yield make
    for each in loggers:
        each.shutdown()
        stats = each.stats()
        assert stats.submitted == stats.written + sum(stats.dropped.values()) + sum(stats.failed.values())


def generated(model: fastattr.Model, picture: Image.Image, logger: AttributionLogger) -> tuple[Any, torch.Tensor]:
    with fastattr.capture(model, buffer=logger.buffer) as states:
        out = model.hf_model.generate(**inputs_of(model, picture), max_new_tokens=6, do_sample=False)
    return states, out


def answer(model: fastattr.Model, picture: Image.Image) -> list[int]:
    inputs = inputs_of(model, picture)
    out = model.hf_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def explain_all(dest: Path, model: fastattr.Model) -> LogStats:
    stats = work(inbox.read_config(dest / "spool"), model, stop=threading.Event(), until_empty=True)
    assert stats.submitted == stats.written + sum(stats.dropped.values()) + sum(stats.failed.values())
    return stats


def records(dest: Path) -> dict[str, Record]:
    found = list(read(dest))
    assert len({each.envelope.request_id for each in found}) == len(found)
    return {each.envelope.request_id: each for each in found}


def assert_same(ours: fastattr.Attribution, expected: fastattr.Attribution, atol: float = 1e-6) -> None:
    assert (ours.token_ids, ours.tokens, ours.response) == (expected.token_ids, expected.tokens, expected.response)
    for one, other in zip(ours.image, expected.image, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)
    torch.testing.assert_close(ours.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.evidence, expected.evidence, rtol=1e-3, atol=1e-3)


def inbox_files(dest: Path) -> list[Path]:
    return sorted(path for path in (dest / "spool" / "inbox").rglob("*") if path.is_file())


# --- the same records -----------------------------------------------------------------------------------------


def test_a_replay_without_a_model_waits_for_a_worker(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    dest, ids = tmp_path / "dest", answer(model, picture)
    logger = opened(content="text", model_revision="r3", attribution=AttributionConfig(scales=(1.0,)))
    before = time.time()
    assert logger.submit_replay(PROMPT, [picture], ids, request_id="r-1", metadata={"a": [1]}, error=True)
    assert logger.flush()
    stats = logger.stats()
    assert (stats.written, stats.handed_over, stats.in_flight) == (1, 1, 0)
    assert len(inbox_files(dest)) == 1 and records(dest) == {}
    stats = explain_all(dest, model)
    assert (stats.submitted, stats.written) == (1, 1)
    assert inbox_files(dest) == []
    found = records(dest)["r-1"]
    expected = fastattr.attribute(model, picture, PROMPT, ids, scales=(1.0,))
    assert_same(found.attribution, expected, atol=0.5 / 255 + 1e-4)
    assert found.attribution.prompt == PROMPT and found.attribution.source == "replay"
    assert (found.envelope.metadata, found.envelope.error) == ({"a": [1]}, True)
    assert found.envelope.model_revision == "r3" and found.envelope.sequence == 0
    assert before - 1 <= found.envelope.time.timestamp() <= time.time() + 1
    assert found.envelope.record_id.startswith(logger._writer) and found.envelope.writer != logger._writer


@pytest.mark.parametrize("name", ["best", "tam"])
def test_replays_are_explained_by_the_named_configuration(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path, name: str
) -> None:
    """The logger's thread and a worker give what `attribute` gives; captured states at their own scale."""
    ids = answer(model, picture)
    for room, options in (("thread", {"model": model}), ("worker", {"explain": "worker"})):
        logger = opened(room, content="text", attribution=name, **options)
        assert logger.submit_replay(PROMPT, [picture], ids, request_id="replay")
        states, out = generated(model, picture, logger)
        assert logger.submit(states, out, request_id="captured", images=[picture], prompt=PROMPT)
        logger.shutdown()
    explain_all(tmp_path / "worker", model)
    replayed = fastattr.attribute(model, picture, PROMPT, ids, name)
    captured = fastattr.attribute(model, picture, PROMPT, ids, name, scales=(1.0,), regions=0)
    for room in ("thread", "worker"):
        found = records(tmp_path / room)
        for request, expected in (("replay", replayed), ("captured", captured)):
            ours = found[request].attribution
            assert_same(ours, expected, atol=0.5 / 255 + 1e-4)
            assert ours.config == expected.config


def test_conversations_and_clips_reach_the_worker_whole(
    model: fastattr.Model, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    """Three pictures over two turns, and a video: the record is that of the same call made here."""
    config = AttributionConfig(scales=(1.0,))
    logger = opened(content="text", attribution=config)
    expected = {}
    for name, shown in (("images", images()), ("clip", clip())):
        ids = fastattr.attribute_batch(model, [(shown.images, shown.prompt, None)], config)[0].token_ids
        expected[name] = fastattr.attribute(model, shown.images, shown.prompt, ids, scales=(1.0,))
        assert logger.submit_replay(shown.prompt, shown.images, ids, request_id=name)
    assert logger.flush()
    explain_all(tmp_path / "dest", model)
    found = records(tmp_path / "dest")
    for name, why in expected.items():
        one = found[name].attribution
        assert (one.prompt, one.token_ids, one.context_tokens) == (why.prompt, why.token_ids, why.context_tokens)
        assert [maps.shape for maps in one.image] == [maps.shape for maps in why.image]
        for mine, theirs in zip(one.image, why.image, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1 / 255)


def test_options_of_the_template_and_prompt_ids_reach_the_explanation(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    """Through the inbox and on the logger's own thread: with another prompt than the engine's there is no record."""
    ids = answer(model, picture)
    template = model.processor.tokenizer.chat_template.replace("<assistant>{% endif %}", "<assistant>red {% endif %}")
    assert template != model.processor.tokenizer.chat_template
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    chat = fastattr.Chat([turn], template_options={"chat_template": template})
    plain = model.processor.tokenizer(
        template.split("{%")[0] + f"<user><image>{PROMPT}<assistant>", add_special_tokens=False
    )
    other = model.processor.tokenizer(
        template.split("{%")[0] + f"<user><image>{PROMPT}<assistant>red ", add_special_tokens=False
    )
    expected = fastattr.attribute(model, picture, chat, ids, scales=(1.0,))
    for name, own in (("worker", None), ("thread", model)):
        logger = opened(name, content="text", attribution=AttributionConfig(scales=(1.0,)), model=own)
        assert logger.submit_replay(chat, [picture], ids, request_id="right", prompt_ids=other["input_ids"])
        assert logger.submit_replay(chat, [picture], ids, request_id="wrong", prompt_ids=plain["input_ids"])
        assert logger.submit_replay(PROMPT, [picture], ids, request_id="plain", prompt_ids=plain["input_ids"])
        assert logger.flush()
        stats = explain_all(tmp_path / name, model) if own is None else logger.stats()
        assert stats.failed == {"TokenLayoutError": 1}
        logger.shutdown()
        found = records(tmp_path / name)
        assert set(found) == {"right", "plain"}
        assert_same(found["right"].attribution, expected, atol=0.5 / 255 + 1e-4)
        assert not torch.allclose(found["plain"].attribution.log_prob, expected.log_prob, atol=1e-3)


def test_notes_sizes_and_hashes_of_pictures_reach_the_worker(tmp_path: Path) -> None:
    """Notes, the size that a part asks for, and hashes are those of the thread."""
    held = TINY["qwen2_vl"]()
    model = fastattr.wrap(held.hf_model, held.processor)
    config = AttributionConfig(scales=(1.0,))
    frames = [make_scene(k).image for k in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    sized = {"type": "image", "resized_height": 64, "resized_width": 96}
    parts = [sized, {"type": "image"}, {"type": "text", "text": PROMPT}]
    ids = adapters.encode_response(model, ANSWER).tolist()
    for explain in ("thread", "worker"):
        options: dict[str, Any] = {"sample_rate": 1.0, "explain": explain, "attribution": config}
        with AttributionLogger(tmp_path / explain, model=model, **options) as logger:
            data = "data:image/gif;base64," + base64.b64encode(stream.getvalue()).decode()
            asked = [{"role": "user", "content": parts}]
            assert logger.submit_replay(asked, [frames[0], data], ids, request_id="r")
            assert logger.flush(PATIENCE_S)
    explain_all(tmp_path / "worker", model)
    (thread,), (worker,) = (list(records(tmp_path / each).values()) for each in ("thread", "worker"))
    for record in (thread, worker):
        assert any("only frame 1 of the 3 frames of a GIF is shown" in note for note in record.attribution.notes)
        assert record.envelope.image_sha256 is not None
        assert record.envelope.image_sha256[1] == hashlib.sha256(stream.getvalue()).hexdigest()
    assert worker.attribution.grids == thread.attribution.grids
    assert thread.attribution.grids[0][0] == (1, 4, 6)  # 64 x 96 pixels in cells of 16
    assert worker.attribution.notes == thread.attribution.notes


def test_a_worker_makes_the_record_the_thread_would_have_made(
    model: fastattr.Model, picture: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    picture.save(path)
    file = path.read_bytes()
    for explain in ("thread", "worker"):
        with AttributionLogger(
            tmp_path / explain, sample_rate=1.0, explain=explain, content="text", images="store"
        ) as logger:
            for request_id, image in (("pixels", picture), ("file", file), ("path", path)):
                states, out = generated(model, picture, logger)
                assert logger.submit(states, out, request_id=request_id, images=[image], prompt=PROMPT)
            assert logger.flush(PATIENCE_S)
            assert logger.stats().handed_over == (3 if explain == "worker" else 0)
            assert logger.buffer.free_bytes == logger.buffer.held_bytes > 0
    path.unlink()  # by the time the worker comes
    assert explain_all(tmp_path / "worker", model).written == 3
    thread, worker = records(tmp_path / "thread"), records(tmp_path / "worker")
    as_file = hashlib.sha256(file).hexdigest()
    as_pixels = hashlib.sha256(f"{picture.width} {picture.height} ".encode() + picture.tobytes()).hexdigest()
    for request_id, sha in (("pixels", as_pixels), ("file", as_file), ("path", as_file)):
        one, two = thread[request_id], worker[request_id]
        assert_same(two.attribution, one.attribution)
        assert one.attribution.source == two.attribution.source == "capture"
        assert one.attribution.prompt == two.attribution.prompt == PROMPT
        assert one.envelope.image_sha256 == two.envelope.image_sha256 == (sha,)
        assert (one.attribution.pictures[0] == two.attribution.pictures[0]).all()


def test_a_worker_knows_where_the_answer_ended(model: fastattr.Model, picture: Image.Image, tmp_path: Path) -> None:
    """The end token was an argument of `generate`, which the worker never sees."""
    said = answer(model, picture)
    end = said[4]
    expected = said[: said.index(end)]
    for explain in ("thread", "worker"):
        with AttributionLogger(tmp_path / explain, sample_rate=1.0, explain=explain, content="text") as logger:
            with fastattr.capture(model, buffer=logger.buffer) as states:
                out = model.hf_model.generate(
                    **inputs_of(model, picture), max_new_tokens=6, do_sample=False, eos_token_id=end
                )
            assert int(out[0, -1]) == end
            assert logger.submit(states, out, request_id="ended", images=[picture], prompt=PROMPT)
            assert logger.flush(PATIENCE_S)
    assert explain_all(tmp_path / "worker", model).written == 1
    thread, worker = (records(tmp_path / explain)["ended"].attribution for explain in ("thread", "worker"))
    assert list(thread.token_ids) == list(worker.token_ids) == expected
    assert thread.source == worker.source == "capture"
    assert_same(worker, thread)


def test_an_attribution_that_exists_needs_no_worker(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    logger = opened(explain="worker")
    assert logger.submit_attribution(WHY, request_id="made")
    logger.shutdown()
    assert set(records(tmp_path / "dest")) == {"made"} and logger.stats().handed_over == 0


def test_low_evidence_is_looked_for_by_the_worker_too(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    """The share and the rate of a request travel with it."""
    logger = opened(sample_rate=0.4, screen_rate=1.0, low_evidence_rate=0.0)
    kept = next(str(i) for i in range(100) if share_of(str(i)) < 0.4)
    left = next(str(i) for i in range(100) if share_of(str(i)) >= 0.4)
    ids = answer(model, picture)
    for request_id in (kept, left):
        assert logger.submit_replay(PROMPT, [picture], ids, request_id=request_id)
    logger.shutdown()
    stats = explain_all(tmp_path / "dest", model)
    assert (stats.submitted, stats.written, stats.dropped) == (2, 1, {"not_low_evidence": 1})
    assert set(records(tmp_path / "dest")) == {kept} and inbox_files(tmp_path / "dest") == []


def test_the_place_of_a_relative_destination_is_where_the_logger_ran(
    model: fastattr.Model, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "server")
    with AttributionLogger("attr", sample_rate=1.0) as logger:
        assert logger.submit_replay(PROMPT, [picture], answer(model, picture), request_id="r")
    monkeypatch.chdir(tmp_path / "worker")
    assert explain_all(tmp_path / "server" / "attr", model).written == 1
    assert set(records(tmp_path / "server" / "attr")) == {"r"} and not list((tmp_path / "worker").iterdir())


# --- what cannot be explained ---------------------------------------------------------------------------------


def test_requests_that_fail_are_counted_and_do_not_come_again(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened()
    ids = answer(model, picture)
    assert logger.submit_replay(PROMPT, None, ids, request_id="no picture")
    assert logger.submit_replay(PROMPT, [picture], [10**9], request_id="no such token")
    assert logger.submit_replay(PROMPT, [picture], [], request_id="no answer")
    assert logger.submit_replay(PROMPT, [picture], ids, request_id="sound")
    logger.shutdown()
    stats = explain_all(tmp_path / "dest", model)
    assert (stats.submitted, stats.written, sum(stats.failed.values())) == (3, 1, 2)
    assert set(records(tmp_path / "dest")) == {"sound"}
    assert sorted(path.parent.name for path in inbox_files(tmp_path / "dest")) == ["given_up", "given_up", "inbox"]
    tallies = [json.loads(path.read_text()) for path in (tmp_path / "dest" / "writers").iterdir()]
    assert sorted(sum(each["failed"].values()) for each in tallies) == [0, 2]
    assert explain_all(tmp_path / "dest", model).submitted == 0


def test_requests_that_cannot_be_read_or_written_are_counted(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened()
    assert logger.submit_replay(PROMPT, [tmp_path / "no such picture.png"], [5], request_id="cannot be written")
    assert logger.submit_replay(PROMPT, [picture], answer(model, picture), request_id="sound")
    assert logger.flush()
    assert sum(logger.stats().failed.values()) == 1
    (sound,) = inbox_files(tmp_path / "dest")
    data = sound.read_bytes()
    broken = {
        "empty": b"",
        "text": b"not safetensors",
        "cut": data[: len(data) // 2],
        "other": data.replace(b"record_id", b"rec0rd_id"),
        "no picture": data.replace(b"image.0.0", b"imagE.0.0"),
    }
    for name, content in broken.items():
        sound.with_name(f"{name}.0.request").write_bytes(content)
    stats = explain_all(tmp_path / "dest", model)
    assert (stats.submitted, stats.written, sum(stats.failed.values())) == (6, 1, 5)
    assert set(records(tmp_path / "dest")) == {"sound"}
    aside = {path.name: path.read_bytes() for path in inbox_files(tmp_path / "dest")}
    assert aside == {f"{name}.0.request": content for name, content in broken.items()}
    assert {path.parent.name for path in inbox_files(tmp_path / "dest")} == {"given_up"}
    assert explain_all(tmp_path / "dest", model).submitted == 0


def test_a_spool_that_no_logger_has_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"logger\.json"):
        inbox.read_config(tmp_path)
    (tmp_path / "logger.json").write_text('{"destination": "x", "sample_rate": 7}')
    with pytest.raises(InputError, match="sample_rate"):
        inbox.read_config(tmp_path)


# --- workers that die -----------------------------------------------------------------------------------------


def waiting_request(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], request_id: str = "r"
) -> AttributionLogger:
    logger = opened()
    assert logger.submit_replay(PROMPT, [picture], answer(model, picture), request_id=request_id)
    assert logger.flush()
    return logger


def test_what_a_dead_worker_had_claimed_is_taken_over_until_it_is_given_up(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    dest = tmp_path / "dest"
    waiting_request(model, picture, opened)
    for attempt in range(inbox.MAX_ATTEMPTS):
        (name,) = [path.name for path in inbox_files(dest)]
        assert name.endswith(f".{attempt}.request")
        assert inbox.claim(dest / "spool", f"dead{attempt}") is not None  # and dies
        assert list(inbox.waiting(dest / "spool")) == []
        if attempt < inbox.MAX_ATTEMPTS - 1:
            assert take_over(dest / "spool", open_destination(dest)) == 1
    stats = explain_all(dest, model)
    assert stats.submitted == 0 and records(dest) == {}
    (left,) = inbox_files(dest)
    assert left.parent.name == "given_up"  # for a person to look at


def test_the_second_worker_explains_what_the_first_had_claimed(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    waiting_request(model, picture, opened)
    assert inbox.claim(tmp_path / "dest" / "spool", "dead") is not None
    assert explain_all(tmp_path / "dest", model).written == 1
    assert set(records(tmp_path / "dest")) == {"r"} and inbox_files(tmp_path / "dest") == []


def test_what_a_live_worker_has_claimed_is_left_to_it(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    dest, writer = tmp_path / "dest", new_writer()
    waiting_request(model, picture, opened)
    with open_room(dest / "spool", writer):
        claim = inbox.claim(dest / "spool", writer)
        assert claim is not None
        assert explain_all(dest, model).submitted == 0 and claim.is_file()
    assert explain_all(dest, model).written == 1
    assert set(records(dest)) == {"r"}


def test_what_a_worker_had_finished_when_it_died_is_not_explained_again(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    """The record was durable; the request was not deleted yet."""
    dest = tmp_path / "dest"
    waiting_request(model, picture, opened)
    (request,) = inbox_files(dest)
    data = request.read_bytes()
    assert explain_all(dest, model).written == 1
    claims = dest / "spool" / "inbox" / "claimed" / records(dest)["r"].envelope.writer
    claims.mkdir(parents=True, exist_ok=True)
    (claims / request.name).write_bytes(data)
    assert explain_all(dest, model).submitted == 0
    assert set(records(dest)) == {"r"} and inbox_files(dest) == []


def test_the_same_while_its_record_is_still_in_the_spool(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dest = tmp_path / "dest"
    waiting_request(model, picture, opened)
    (request,) = inbox_files(dest)
    data = request.read_bytes()
    writers: list[str] = []

    def stop_short(self: Recorder, _timeout_s: float, *, publish: bool) -> bool:
        writers.append(self.writer)
        return close(self, 0.0, publish=False)

    close = Recorder.close
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "close", stop_short)
        assert explain_all(dest, model).written == 1
    assert records(dest) == {}
    claims = dest / "spool" / "inbox" / "claimed" / writers[0]
    claims.mkdir(parents=True, exist_ok=True)
    (claims / request.name).write_bytes(data)
    assert explain_all(dest, model).submitted == 0
    assert set(records(dest)) == {"r"} and inbox_files(dest) == []


def test_two_workers_share_the_requests(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    dest, n, ids = tmp_path / "dest", 40, answer(model, picture)
    logger = opened(attribution=AttributionConfig(scales=(1.0,), evidence=False))
    stats: list[LogStats] = []
    config = inbox.read_config(dest / "spool")
    start = threading.Barrier(3)

    def run() -> None:
        start.wait(PATIENCE_S)
        stats.append(work(config, model, stop=threading.Event(), until_empty=True))

    workers = [threading.Thread(target=run) for _ in range(2)]
    for i in range(n):
        assert logger.submit_replay(PROMPT, [picture], ids, request_id=str(i))
    assert logger.flush(PATIENCE_S)
    for each in workers:
        each.start()
    start.wait(PATIENCE_S)
    for each in workers:
        each.join(PATIENCE_S)
    assert sum(each.written for each in stats) == n and len(stats) == 2
    assert set(records(dest)) == {str(i) for i in range(n)} and inbox_files(dest) == []


def test_a_worker_goes_on_until_it_is_stopped(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    dest, stop, said = tmp_path / "dest", threading.Event(), []
    results: list[LogStats] = []
    logger = opened()
    config = LogConfig(str(dest), sync_s=0.0, segment_age_s=0.0)
    worker = threading.Thread(target=lambda: results.append(work(config, model, stop=stop, said=said.append)))
    worker.start()
    try:
        ids = answer(model, picture)
        until_s = time.monotonic() + PATIENCE_S
        for i in range(2):
            assert logger.submit_replay(PROMPT, [picture], ids, request_id=str(i))
            while str(i) not in records(dest) and time.monotonic() < until_s:
                time.sleep(0.02)
    finally:
        stop.set()
        worker.join(PATIENCE_S)
    assert not worker.is_alive() and results[0].written == 2
    assert set(records(dest)) == {"0", "1"} and any("written" in line for line in said)


@pytest.mark.parametrize("rule", ["none", "hash", "store"])
def test_what_is_kept_of_pictures_is_the_rule_of_the_logger_they_came_from(
    tmp_path: Path, model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], rule: str
) -> None:
    """Another logger writes its own rule into the same spool before the worker reads it."""
    options = {"explain": "worker", "attribution": "lens@1", "content": "none"}
    for name, images_ in (("own", rule), ("another", "none" if rule == "store" else "store")):
        logger = opened(images=images_, **options)
        assert logger.submit_replay(PROMPT, [picture], answer(model, picture), request_id=name)
        assert logger.flush(PATIENCE_S)
    waiting = {path: path.read_bytes() for path in inbox.waiting(tmp_path / "dest" / "spool")}
    digest = hashlib.sha256(f"{picture.width} {picture.height} ".encode() + picture.tobytes()).hexdigest()
    assert sum(digest.encode() in data for data in waiting.values()) == (2 if rule == "hash" else 1)
    explain_all(tmp_path / "dest", model)
    kept = records(tmp_path / "dest")["own"].envelope
    assert kept.image_sha256 == (None if rule == "none" else (digest,))
    assert (kept.images is not None) == (rule == "store")
