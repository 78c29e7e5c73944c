"""The logger as a server uses it: what is submitted comes back as it was explained, and every submission is counted."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastattr
from fastattr import AttributionConfig
from fastattr.calibration import Calibration
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger, Logged, LogStats, Record, Submission, processing, read
from fastattr.log.recipes.answering import PROMPT, inputs_of
from fastattr.log.sampling import share_of
from tests.engine.samples import make_attribution

PATIENCE_S = 60.0
N_NEW = 8  # tokens


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return make_scene(3).image


WHY = make_attribution()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., AttributionLogger]]:
    """Makes loggers into `tmp_path / "dest"` that keep everything, and shuts them down."""
    loggers: list[AttributionLogger] = []

    def make(*, model: fastattr.Model | None = None, **options: Any) -> AttributionLogger:
        loggers.append(AttributionLogger(tmp_path / "dest", model=model, **{"sample_rate": 1.0, **options}))
        return loggers[-1]

    yield make
    for each in loggers:
        each.shutdown()
        assert_complete(each.stats())


def assert_complete(stats: LogStats, *, in_flight: int = 0) -> None:
    dropped, failed = sum(stats.dropped.values()), sum(stats.failed.values())
    assert stats.submitted == stats.written + dropped + failed + stats.in_flight
    assert stats.in_flight == in_flight
    if not in_flight:
        assert stats.queue_bytes == 0


def generated(
    model: fastattr.Model, picture: Image.Image, logger: AttributionLogger, **options: Any
) -> tuple[Any, torch.Tensor]:
    """A short answer, and the states it was made with."""
    with fastattr.capture(model, buffer=logger.buffer) as states:
        out = model.hf_model.generate(
            **inputs_of(model, picture), **{"max_new_tokens": N_NEW, "do_sample": False, **options}
        )
    return states, out


def answer_of(model: fastattr.Model, picture: Image.Image, out: torch.Tensor) -> list[int]:
    return out[0, inputs_of(model, picture)["input_ids"].shape[1] :].tolist()


def records(tmp_path: Path) -> list[Record]:
    """In the order of submission."""
    return sorted(read(tmp_path / "dest"), key=lambda each: (each.envelope.writer, each.envelope.sequence))


def only(found: list[Record]) -> Record:
    assert len(found) == 1
    return found[0]


def assert_same_maps(ours: fastattr.Attribution, expected: fastattr.Attribution) -> None:
    """Up to the levels they are stored in, and what two ways of reading the same states differ by."""
    assert ours.token_ids == expected.token_ids
    for one, other in zip(ours.image, expected.image, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.5 / 255 + 2e-3)
    torch.testing.assert_close(ours.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Explaining waits until the event is set; when the block begins to wait for it, one request is being explained."""
    go, explain = threading.Event(), processing.explain

    def wait_for_it(*arguments: Any) -> Any:
        assert go.wait(PATIENCE_S)
        return explain(*arguments)

    monkeypatch.setattr(processing, "explain", wait_for_it)
    try:
        yield go
    finally:
        go.set()
        monkeypatch.setattr(processing, "explain", explain)


# --- what is submitted comes back ---------------------------------------------------------------------------


def test_a_captured_answer_comes_back_as_it_was_explained(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(content="text", images="store", model_revision="r1")
    states, out = generated(model, picture, logger)
    again, _ = generated(model, picture, logger)
    expected = again.attribute(out, image=picture, prompt=PROMPT, evidence=True)
    again.release()

    assert logger.submit(
        states, out, request_id="r-1", images=[picture], prompt=PROMPT, metadata={"user": 7}, error=True
    )
    assert logger.flush() and logger.shutdown()

    found = only(records(tmp_path))
    why, envelope = found.attribution, found.envelope
    for one, other in zip(why.image, expected.image, strict=True):
        torch.testing.assert_close(one, torch.round(other * 255) / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(why.log_prob, expected.log_prob)
    torch.testing.assert_close(why.evidence, expected.evidence)
    assert (why.tokens, why.token_ids, why.response) == (expected.tokens, expected.token_ids, expected.response)
    assert (why.prompt, why.model, why.source) == (PROMPT, model.name, "capture")
    assert why.calibration == model.calibration and why.low_evidence is not None
    np.testing.assert_array_equal(why.pictures[0][0], np.asarray(picture))
    pixels = f"{picture.width} {picture.height} ".encode() + np.asarray(picture).tobytes()
    assert envelope.image_sha256 == (hashlib.sha256(pixels).hexdigest(),)
    assert (envelope.request_id, envelope.metadata, envelope.error) == ("r-1", {"user": 7}, True)
    assert (envelope.model_revision, envelope.sequence) == ("r1", 0)
    assert envelope.trace_id is None and envelope.span_id is None
    assert abs(time.time() - envelope.time.timestamp()) < 3600

    tokens = pq.read_table(next((tmp_path / "dest").glob("date=*/*.parquet"))).column("tokens")[0].as_py()
    lit = [(token["box"], maps[0]) for token, maps in zip(tokens, expected.image[0], strict=True) if maps.max() > 0]
    assert len(lit) > 3
    for (left, top, right, bottom), maps in lit:
        row, column = divmod(int(maps.argmax()), maps.shape[1])
        assert left <= (column + 0.5) / maps.shape[1] <= right and top <= (row + 0.5) / maps.shape[0] <= bottom
    assert logger.buffer.free_bytes == logger.buffer.held_bytes > 0


def test_captured_states_are_explained_as_a_replay_would_be(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(model=model, attribution=AttributionConfig(scales=(1.0,)))
    states, out = generated(model, picture, logger)
    ids = answer_of(model, picture, out)
    expected = fastattr.attribute(model, picture, PROMPT, ids, scales=(1.0,))
    assert logger.submit(states, out, request_id="captured", images=picture, prompt=PROMPT)
    assert logger.submit_replay(PROMPT, [picture], ids, request_id="replayed")
    parts = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    assert logger.submit_replay([{"role": "user", "content": parts}], [picture], torch.tensor(ids), request_id="chat")
    logger.shutdown()
    found = records(tmp_path)
    assert [each.envelope.request_id for each in found] == ["captured", "replayed", "chat"]
    assert [each.attribution.source for each in found] == ["capture", "replay", "replay"]
    for each in found:
        assert_same_maps(each.attribution, expected)
        assert each.attribution.evidence is not None and expected.evidence is not None
        torch.testing.assert_close(each.attribution.evidence, expected.evidence, rtol=1e-3, atol=1e-3)


def test_an_attribution_that_exists_is_kept_as_it_is(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    logger = opened(content="text")
    assert logger.submit_attribution(WHY, request_id="made", metadata={"deep": [{"er": None}]})
    logger.shutdown()
    found = only(records(tmp_path))
    for one, other in zip(found.attribution.image, WHY.image, strict=True):
        torch.testing.assert_close(one, torch.round(other * 255) / 255, rtol=0, atol=1e-6)
    assert (found.attribution.response, found.attribution.notes) == (WHY.response, WHY.notes)
    assert found.envelope.metadata == {"deep": [{"er": None}]}


def test_a_capture_that_does_not_match_is_read_again_and_counted(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(attribution=AttributionConfig(scales=(1.0,), evidence=False))
    states, out = generated(model, picture, logger, num_beams=2)
    assert logger.submit(states, out, request_id="beams", images=[picture], prompt=PROMPT)
    logger.shutdown()
    assert only(records(tmp_path)).attribution.source == "replay"
    assert logger.stats().capture_mismatches == 1
    assert logger.buffer.free_bytes == logger.buffer.held_bytes


def test_pages_come_back_whatever_happens(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger]
) -> None:
    logger = opened(sample_rate=0.5)
    kept = next(str(i) for i in range(100) if share_of(str(i)) < 0.5)
    left = next(str(i) for i in range(100) if share_of(str(i)) >= 0.5)
    for request_id, prompt in ((left, PROMPT), (kept, "Not what it was asked."), (kept, PROMPT)):
        states, out = generated(model, picture, logger)
        assert logger.submit(states, out, request_id=request_id, images=[picture], prompt=prompt) == (
            request_id == kept
        )
    states, out = generated(model, picture, logger)
    assert not logger.submit(states, out, request_id=3, images=[picture])  # type: ignore[arg-type]
    logger.shutdown()
    states, out = generated(model, picture, logger)
    assert not logger.submit(states, out, request_id=kept, images=[picture], prompt=PROMPT)
    assert logger.buffer.free_bytes == logger.buffer.held_bytes > 0
    stats = logger.stats()
    assert stats.written == 1 and sum(stats.failed.values()) == 1
    assert stats.dropped == {"not_sampled": 1, "invalid": 1, "shutdown": 1}


# --- content, images, redaction -----------------------------------------------------------------------------

SECRET = "the secret question"


@pytest.mark.parametrize("content", ["none", "ids", "text"])
@pytest.mark.parametrize("images", ["none", "hash", "store"])
def test_only_what_was_asked_for_is_kept(
    content: str, images: str, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(content=content, images=images)
    word = "unheardof"
    why = replace(make_attribution(("An", " " + word)), token_ids=(123456, 654321), prompt=SECRET)
    buffer = io.BytesIO()
    Image.fromarray(why.pictures[0][0]).save(buffer, format="PNG")
    file = buffer.getvalue()
    (tmp_path / "picture.png").write_bytes(file)
    given = [file, tmp_path / "picture.png", Image.fromarray(why.pictures[0][0])]
    assert logger.submit_attribution(why, request_id="r", images=given)
    logger.shutdown()
    found = only(records(tmp_path))
    row = pq.read_table(next((tmp_path / "dest").glob("date=*/*.parquet"))).to_pylist()[0]
    assert (row["prompt"] == SECRET) is (content == "text") and (row["response"] is None) is (content != "text")
    assert [token["id"] for token in row["tokens"]] == ([None, None] if content == "none" else [123456, 654321])
    assert (word in str(row)) is (SECRET in str(row)) is (content == "text")
    assert found.attribution.response == {"none": "··", "ids": "<123456><654321>", "text": f"An {word}"}[content]
    as_file = hashlib.sha256(file).hexdigest()
    pixels = hashlib.sha256(b"96 64 " + why.pictures[0][0].tobytes()).hexdigest()
    assert row["image_sha256"] == (None if images == "none" else [as_file, as_file, pixels])
    assert (row["images"] is None) is (images != "store")
    if images == "store":
        np.testing.assert_array_equal(found.attribution.pictures[0][0], why.pictures[0][0])


def test_redaction_changes_what_is_kept(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    seen: list[Submission] = []

    def redact(submission: Submission) -> Submission:
        seen.append(submission)
        return replace(submission, request_id="anonymous", metadata={"plan": submission.metadata["plan"]}, images=())

    logger = opened(redact=redact)
    picture = Image.new("RGB", (8, 8))
    assert logger.submit_attribution(
        WHY, request_id="person-17", images=[picture], metadata={"user": "person-17", "plan": "free"}
    )
    logger.shutdown()
    assert (seen[0].request_id, seen[0].prompt, seen[0].images) == ("person-17", WHY.prompt, (picture,))
    found = only(records(tmp_path)).envelope
    assert (found.request_id, found.metadata, found.image_sha256) == ("anonymous", {"plan": "free"}, ())
    everything = b"".join(path.read_bytes() for path in (tmp_path / "dest").rglob("*") if path.is_file())
    assert b"person-17" not in everything


@pytest.mark.parametrize("content", ["none", "ids"])
def test_redaction_cannot_raise_the_content(content: str, opened: Callable[..., AttributionLogger]) -> None:
    logger = opened(content=content, redact=lambda each: replace(each, content="text"))
    assert not logger.submit_attribution(WHY, request_id="r")
    assert logger.stats().dropped == {"redaction_failed": 1}


def test_a_replay_is_never_made_of_what_the_model_was_not_asked(opened: Callable[..., AttributionLogger]) -> None:
    """The map of another prompt or picture would look like a right one."""
    other = Image.new("RGB", (8, 8))
    changes: list[dict[str, Any]] = [{"prompt": "another"}, {"prompt": None}, {"images": ()}, {"images": (other,)}]
    logger = opened(redact=lambda each: replace(each, **changes[each.metadata["change"]]))
    for i in range(len(changes)):
        picture = Image.new("RGB", (8, 8))
        assert not logger.submit_replay(PROMPT, [picture], [1], request_id="r", metadata={"change": i})
    assert logger.stats().dropped == {"redaction_failed": len(changes)}


def test_redaction_can_lower_the_content_of_one_response(
    opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(content="text", redact=lambda each: replace(each, content=each.metadata["keep"]))
    for keep in ("none", "ids", "text"):
        assert logger.submit_attribution(WHY, request_id=keep, metadata={"keep": keep})
    logger.shutdown()
    found = {each.envelope.request_id: each.attribution for each in records(tmp_path)}
    assert [found[name].response == WHY.response for name in ("none", "ids", "text")] == [False, False, True]
    assert [found[name].token_ids == WHY.token_ids for name in ("none", "ids", "text")] == [False, True, True]


def test_a_prompt_that_was_redacted_is_not_kept(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    logger = opened(content="text", redact=lambda each: replace(each, prompt="[redacted]"))
    why = replace(WHY, prompt=SECRET, context_tokens=("the secret", " question", *WHY.tokens))
    logger.submit_attribution(why, request_id="r")
    logger.shutdown()
    everything = "".join(str(pq.read_table(path).to_pylist()) for path in (tmp_path / "dest").glob("date=*/*.parquet"))
    assert "secret" not in everything


def raising(_submission: Submission) -> Submission:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("redact", "reason"),
    [
        (lambda _: None, "redacted"),
        (raising, "redaction_failed"),
        (lambda _: {"request_id": "x"}, "redaction_failed"),
        (lambda each: replace(each, metadata={"x": {1, 2}}), "redaction_failed"),
        (lambda each: replace(each, metadata={1: "x"}), "redaction_failed"),
        (lambda each: replace(each, request_id=None), "redaction_failed"),
        (lambda each: replace(each, images=None), "redaction_failed"),
        (lambda each: replace(each, content="nothing"), "redaction_failed"),
        (lambda each: replace(each, content="None"), "redaction_failed"),
    ],
    ids=["nothing", "raises", "no submission", "no JSON", "no key", "no id", "no images", "no content", "a typo"],
)
def test_where_redaction_fails_nothing_is_kept(
    redact: Any, reason: str, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened(redact=redact)
    assert not logger.submit_attribution(WHY, request_id="person-17", metadata={"a": 1})
    logger.shutdown()
    stats = logger.stats()
    assert (stats.submitted, stats.dropped) == (1, {reason: 1})
    assert not list((tmp_path / "dest").glob("date=*"))


# --- what is kept ---------------------------------------------------------------------------------------------


def test_the_rate_decides_what_is_kept_and_rates_nest(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    ids = [f"r-{i}" for i in range(300)]
    kept: dict[float, set[str]] = {}
    for rate in (0.0, 0.1, 0.3, 1.0):
        logger = opened(sample_rate=rate)
        kept[rate] = {each for each in ids if logger.submit_attribution(WHY, request_id=each)}
        logger.shutdown()
        assert logger.stats().dropped.get("not_sampled", 0) == len(ids) - len(kept[rate])
    assert kept[0.0] == set() and kept[1.0] == set(ids) and kept[0.1] < kept[0.3]
    assert len(kept[0.1]) > 5 and len(kept[0.3]) > 50
    stored = [each.envelope.request_id for each in records(tmp_path)]
    assert sorted(stored) == sorted([*kept[0.1], *kept[0.3], *kept[1.0]])


def test_errors_and_long_answers_have_rates_of_their_own(opened: Callable[..., AttributionLogger]) -> None:
    logger = opened(sample_rate=0.0, error_rate=1.0, long_rate=1.0, long_tokens=9)
    long = make_attribution(("a",) * 9)
    assert not logger.submit_attribution(WHY, request_id="r")
    assert logger.submit_attribution(WHY, request_id="r", error=True)
    assert logger.submit_attribution(long, request_id="r")
    assert not opened(sample_rate=0.0, error_rate=0.0, long_rate=0.0).submit_attribution(
        long, request_id="r", error=True
    )


def test_low_evidence_is_looked_for_among_those_that_are_screened(
    opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    calibration = Calibration(
        threshold_nats=0.05,
        n_true=9,
        n_false=9,
        true_marked=1,
        false_marked=5,
        words="any",
        dataset="x",
        model="by hand",
    )
    high = replace(WHY, evidence=torch.full((len(WHY),), 2.0), calibration=calibration)
    low = replace(high, evidence=torch.full((len(WHY),), 0.01))
    assert not high.low_evidence and low.low_evidence
    logger = opened(sample_rate=0.0, screen_rate=0.6, low_evidence_rate=0.3)
    ids = [str(i) for i in range(60)]
    for each in ids:
        screened = share_of(each) < 0.6
        assert logger.submit_attribution(low, request_id="low " + each) == (share_of("low " + each) < 0.6)
        assert logger.submit_attribution(high, request_id=each) == screened
    logger.shutdown()
    expected = {"low " + each for each in ids if share_of("low " + each) < 0.3}
    assert expected and {each.envelope.request_id for each in records(tmp_path)} == expected
    sequences = [each.envelope.sequence for each in records(tmp_path)]
    assert sequences == list(range(len(expected)))  # what is dropped leaves no gap
    stats = logger.stats()
    n_screened = sum(share_of(each) < 0.6 for each in [*ids, *("low " + each for each in ids)])
    assert stats.dropped == {"not_sampled": 120 - n_screened, "not_low_evidence": n_screened - len(expected)}


# --- it never raises ------------------------------------------------------------------------------------------


class Hostile:
    """Fails at whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"there is no {name}")

    def __iter__(self) -> Iterator[Any]:
        raise ValueError("cannot be counted")

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __str__(self) -> str:
        raise ValueError("cannot be said")


class Releasing:
    """Looks like states."""

    prompt_ids = None
    n_bytes = 10

    def release(self) -> None:
        raise RuntimeError("it will not let go")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.floats() | st.none(), max_size=3),
    st.sampled_from(
        [
            Hostile(),
            Releasing(),
            threading.Lock(),
            object(),
            torch.zeros(2, 3),
            torch.zeros(0),
            torch.full((1, 3), float("nan")),
            np.zeros((2, 2)),
            "x" * 1_000_000,
            "\ud800\0../../etc",
            [{"role": "user"}],
            [{"role": "system", "content": "x"}],
            {"nan": float("nan")},
            {"deep": [[[[object()]]]]},
            {"big": "x" * 1_000_000},
            Image.new("RGB", (1, 1)),
            WHY,
            Path("/no/such/file"),
            print,
            fastattr,
        ]
    ),
)


def mostly(good: Any) -> st.SearchStrategy[Any]:
    """Else nothing would come further than the first check."""
    return st.sampled_from([True, True, True, False]).flatmap(lambda fine: st.just(good) if fine else ANYTHING)


EXTRAS = st.fixed_dictionaries(
    {"request_id": mostly("fine")},
    optional={"images": mostly([Image.new("RGB", (8, 8))]), "metadata": mostly({"a": 1}), "error": ANYTHING},
)


@pytest.fixture(scope="module")
def enduring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttributionLogger]:
    with AttributionLogger(tmp_path_factory.mktemp("hostile"), sample_rate=1.0) as logger:
        yield logger


@settings(max_examples=150)
@given(kind=st.sampled_from(["submit", "replay", "made"]), one=ANYTHING, other=ANYTHING, third=ANYTHING, extras=EXTRAS)
def test_nothing_that_is_submitted_raises(
    enduring: AttributionLogger, kind: str, one: Any, other: Any, third: Any, extras: dict[str, Any]
) -> None:
    before = enduring.stats().submitted
    if kind == "submit":
        accepted = enduring.submit(one, other, prompt=third, **extras)
    elif kind == "replay":
        extras = {name: value for name, value in extras.items() if name != "images"}
        accepted = enduring.submit_replay(one, other, third, **extras)
    else:
        accepted = enduring.submit_attribution(one, **extras)
    assert accepted is True or accepted is False
    stats = enduring.stats()
    assert stats.submitted == before + 1
    assert stats.submitted == (
        stats.written + sum(stats.dropped.values()) + sum(stats.failed.values()) + stats.in_flight
    )


def test_the_thread_lives_on_after_all_of_that(enduring: AttributionLogger) -> None:
    before = enduring.stats().written
    assert enduring.submit_attribution(WHY, request_id="still there")
    assert enduring.flush(PATIENCE_S)
    assert enduring.stats().written > before
    assert_complete(enduring.stats())


def test_states_of_another_answer_fail_and_are_counted(
    model: fastattr.Model, picture: Image.Image, opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened()
    states, out = generated(model, picture, logger)
    assert logger.submit(states, torch.zeros_like(out), request_id="other", images=[picture])
    states, out = generated(model, picture, logger)
    assert logger.submit(states, torch.cat([out, out]), request_id="two rows", images=[picture])
    states, out = generated(model, picture, logger)
    assert logger.submit(states, out, request_id="other picture", images=[picture, picture])
    with fastattr.capture(model, buffer=logger.buffer) as states:
        pass
    assert logger.submit(states, out, request_id="nothing captured", images=[picture])
    states, out = generated(model, picture, logger)
    states.release()
    assert logger.submit(states, out, request_id="released", images=[picture])
    logger.shutdown()
    assert logger.stats().failed == {"InputError": 5}
    assert records(tmp_path) == []
    assert logger.buffer.free_bytes == logger.buffer.held_bytes


# --- threads, tasks, callbacks --------------------------------------------------------------------------------


def test_many_threads_at_once(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    n_threads, n_each = 8, 200
    logger = opened(segment_bytes=1 << 20)
    start = threading.Barrier(n_threads)

    def submit(thread: int) -> None:
        start.wait()
        for i in range(n_each):
            assert logger.submit_attribution(WHY, request_id=f"{thread}-{i}")

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(n_threads)]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        stats = logger.stats()
        assert_complete(stats, in_flight=stats.in_flight)
        time.sleep(0.02)
    for each in threads:
        each.join()
    assert logger.flush(PATIENCE_S) and logger.shutdown()
    tables = [pq.read_table(path) for path in (tmp_path / "dest").glob("date=*/*.parquet")]
    rows = [row for table in tables for row in table.select(["record_id", "request_id", "sequence"]).to_pylist()]
    assert sorted(row["sequence"] for row in rows) == list(range(n_threads * n_each))
    assert len({row["record_id"] for row in rows}) == len(rows)
    assert {row["request_id"] for row in rows} == {f"{t}-{i}" for t in range(n_threads) for i in range(n_each)}
    assert len(tables) > 1


def test_tasks_submit_like_anyone_else(opened: Callable[..., AttributionLogger], tmp_path: Path) -> None:
    logger = opened()

    async def answer(i: int, entered: asyncio.Event) -> None:
        assert logger.submit_attribution(WHY, request_id=f"before {i}")
        entered.set()
        await asyncio.sleep(0 if i % 2 else 3600)  # every other one is cancelled here
        assert logger.submit_attribution(WHY, request_id=f"after {i}")

    async def serve() -> None:
        events = [asyncio.Event() for _ in range(20)]
        tasks = [asyncio.create_task(answer(i, event)) for i, event in enumerate(events)]
        for event in events:
            await event.wait()
        await asyncio.gather(*tasks[1::2])
        for task in tasks[::2]:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError)
            for each in await asyncio.gather(*tasks[::2], return_exceptions=True)
        )
        assert await asyncio.to_thread(logger.flush, PATIENCE_S)

    asyncio.run(serve())
    logger.shutdown()
    expected = {f"before {i}" for i in range(20)} | {f"after {i}" for i in range(1, 20, 2)}
    assert {each.envelope.request_id for each in records(tmp_path)} == expected


def test_a_callback_is_told_of_every_record_that_is_durable(
    opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    told: list[Logged] = []
    logger = opened(on_record=told.append)
    for i in range(5):
        assert logger.submit_attribution(WHY, request_id=str(i), metadata={"i": i}, error=i == 3)
    assert logger.flush()
    assert [(each.request_id, each.metadata, each.error) for each in told] == [
        (str(i), {"i": i}, i == 3) for i in range(5)
    ]
    assert told[0].n_tokens == len(WHY) and WHY.evidence is not None
    assert told[0].mean_evidence == pytest.approx(float(WHY.evidence.mean()), rel=1e-5)
    assert told[0].mean_log_prob == pytest.approx(float(WHY.log_prob.mean()), rel=1e-5)
    logger.shutdown()
    assert [each.envelope.record_id for each in records(tmp_path)] == [each.record_id for each in told]


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_a_callback_that_raises_is_counted_and_nothing_is_lost(
    kind: type[BaseException], opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    def fail(_record: Logged) -> None:
        raise kind("no")

    logger = opened(on_record=fail)
    for i in range(3):
        assert logger.submit_attribution(WHY, request_id=str(i))
        assert logger.flush(PATIENCE_S)
    assert logger.shutdown()
    assert logger.stats().callback_errors == 3
    assert len(records(tmp_path)) == 3


# --- bounds -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_memory_is_dropped_and_what_was_accepted_is_written(
    opened: Callable[..., AttributionLogger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch) as go:
        logger = opened(queue_bytes=400_000)
        accepted = [logger.submit_attribution(WHY, request_id=str(i)) for i in range(100)]
        n = sum(accepted)
        assert accepted == [True] * n + [False] * (100 - n) and 2 < n < 100  # the newest are dropped
        stats = logger.stats()
        assert stats.dropped == {"queue_full": 100 - n} and stats.queue_bytes <= 400_000
        assert_complete(stats, in_flight=n)
        go.set()
        assert logger.flush(PATIENCE_S)
    assert logger.submit_attribution(WHY, request_id="room again")
    logger.shutdown()
    assert [each.envelope.request_id for each in records(tmp_path)] == [*map(str, range(n)), "room again"]


def test_images_count_in_the_memory(opened: Callable[..., AttributionLogger]) -> None:
    logger = opened(queue_bytes=1_000_000)
    assert not logger.submit_attribution(WHY, request_id="large", images=[Image.new("RGB", (1000, 1000))])
    assert not logger.submit_attribution(WHY, request_id="bytes", images=[bytes(1_000_001)])
    assert logger.submit_attribution(WHY, request_id="small", images=[Image.new("RGB", (100, 100))])
    assert logger.stats().dropped == {"queue_full": 2}


def test_a_disk_that_refuses_does_not_keep_the_processor_busy(
    opened: Callable[..., AttributionLogger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(_writer: Any, rows: Any) -> None:
        tries.append(len(rows))
        raise fastattr.SaveError("no room")

    logger = opened()
    with monkeypatch.context() as patched:
        patched.setattr("fastattr.log.spool.SpoolWriter.append", refuse)
        for i in range(100):
            assert logger.submit_attribution(WHY, request_id=str(i))
        until_s = time.monotonic() + PATIENCE_S
        while sum(tries[-1:]) < 64 and time.monotonic() < until_s:
            time.sleep(0.01)
        before = len(tries)
        time.sleep(1.0)
        assert len(tries) - before < 40
        assert not logger.flush(0.2)
        stats = logger.stats()
        assert_complete(stats, in_flight=100)
    assert logger.shutdown(PATIENCE_S)
    assert [each.envelope.request_id for each in records(tmp_path)] == [str(i) for i in range(100)]


# --- the end ----------------------------------------------------------------------------------------------------


def test_the_end_may_come_twice_and_nothing_is_taken_after_it(
    opened: Callable[..., AttributionLogger], tmp_path: Path
) -> None:
    logger = opened()
    assert logger.flush()  # nothing was submitted yet
    with logger as entered:
        assert entered is logger and logger.submit_attribution(WHY, request_id="in time")
    assert logger.shutdown() and logger.shutdown()
    assert not logger.submit_attribution(WHY, request_id="late")
    assert not logger.submit_replay("x", None, [1], request_id="late")
    assert logger.flush()
    assert logger.stats().dropped == {"shutdown": 2}
    assert [each.envelope.request_id for each in records(tmp_path)] == ["in time"]
    tally = json.loads(next((tmp_path / "dest" / "writers").iterdir()).read_text())
    assert tally["closed"] and tally["written"] == 1 and tally["in_flight"] == 0
    assert not list((tmp_path / "dest" / "spool" / "rooms").iterdir())


def test_a_flush_that_has_no_time_says_so(
    opened: Callable[..., AttributionLogger], monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch) as go:
        logger = opened()
        assert logger.submit_attribution(WHY, request_id="r")
        assert not logger.flush(0.05)
        assert logger.stats().in_flight == 1
        go.set()
        assert logger.flush(PATIENCE_S)
        assert logger.stats().written == 1


def test_a_shutdown_that_has_no_time_drops_what_waits_and_ends_later(
    opened: Callable[..., AttributionLogger], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch) as go:
        logger = opened()
        for i in range(5):
            assert logger.submit_attribution(WHY, request_id=str(i))
        until_s = time.monotonic() + PATIENCE_S
        while logger._queue.qsize() > 4 and time.monotonic() < until_s:
            time.sleep(0.005)  # until the first is being explained
        assert not logger.shutdown(0.1)
        stats = logger.stats()
        assert_complete(stats, in_flight=1)
        assert stats.dropped == {"shutdown": 4}
        go.set()
        thread = logger._thread
        assert thread is not None
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert_complete(logger.stats())
    # what it explained is durable, and whoever comes next publishes it
    logger = opened()
    assert logger.submit_attribution(WHY, request_id="next")
    logger.shutdown()
    assert {each.envelope.request_id for each in records(tmp_path)} == {"0", "next"}


def test_nothing_starts_after_the_end(opened: Callable[..., AttributionLogger]) -> None:
    """A shutdown may come while a submission is on its way."""
    loggers: list[AttributionLogger] = []

    def shut_down(submission: Submission) -> Submission:
        loggers[0].shutdown()
        return submission

    loggers.append(opened(redact=shut_down))
    before = threading.active_count()
    assert not loggers[0].submit_attribution(WHY, request_id="r")
    assert loggers[0].stats().dropped == {"shutdown": 1}
    assert_complete(loggers[0].stats())
    assert threading.active_count() == before


# --- a good guest -------------------------------------------------------------------------------------------------


def test_importing_the_package_is_light_and_quiet() -> None:
    code = """
import logging, sys
import fastattr
heavy = {"pyarrow", "duckdb", "fsspec", "opentelemetry", "starlette", "uvicorn", "jinja2", "fastattr.log"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import fastattr.log
ours = logging.getLogger("fastattr")
assert [type(each).__name__ for each in ours.handlers] == ["NullHandler"], ours.handlers
assert not logging.getLogger().handlers and ours.level == logging.NOTSET
assert not {"starlette", "uvicorn", "jinja2", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
