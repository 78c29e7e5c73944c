"""Ids and metadata made to break out: they come back as they were, and nothing else happens."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattr.log import AttributionLogger, LogConfig, inbox, read
from fastattr.log.reading import query
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, assert_whole, counted

WHY = make_attribution(("A", " red"), grids=((1, 3, 3),), pictures=False)
PATIENCE_S = 60.0

HOSTILE = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows",
    "a/b/c.parquet",
    "date=2026-11-22/x-000000.parquet",
    "nul\0byte",
    "\0",
    "",
    " ",
    "line\nbreak\r\n\t",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP TABLE records; --",
    "' OR '1'='1",
    "%s%n%d {0} {x.__class__} $(id) `id`",
    "\ud800 half a pair",
    "pair \U0001f600",
    "e\u0301 \u202e right to left \u2066",
    "\ufeff\ufffe\uffff",
    "x" * 1024,
    "é" * 512,
]


def stored(text: str) -> str:
    """Half a surrogate pair cannot be said in UTF-8; the rest comes back as it was."""
    return "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)


def test_hostile_ids_and_metadata_come_back_as_they_were(tmp_path: Path, fault_counts: FaultCounts) -> None:
    dest = tmp_path / "inside" / "dest"
    given_metadata = {text: [text, {text: text}] for text in HOSTILE}
    with AttributionLogger(dest, sample_rate=1.0, content="text", segment_bytes=10_000) as logger:
        for text in HOSTILE:
            why = dataclasses.replace(WHY, prompt=text, model=text, notes=(text,))
            assert logger.submit_attribution(why, request_id=text, metadata={"value": text, text: 1}), text
        assert logger.submit_attribution(WHY, request_id="all", metadata=given_metadata)
    assert_identity(logger.stats())
    assert logger.stats().written == len(HOSTILE) + 1
    assert_whole(dest)
    found = {each.envelope.request_id: each for each in read(dest)}
    assert set(found) == {*map(stored, HOSTILE), "all"}
    for text in HOSTILE:
        record = found[stored(text)]
        assert record.envelope.metadata == {"value": stored(text), stored(text): 1}
        assert (record.attribution.prompt, record.attribution.model) == (stored(text), stored(text))
        assert record.attribution.notes == (stored(text),)
        assert [each.envelope.request_id for each in read(dest, request_id=text)] == [stored(text)]
    assert found["all"].envelope.metadata == json.loads(json.dumps(_stored(given_metadata)))
    # nothing came to lie anywhere else, and no name has anything of an id in it
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.startswith("inside/dest/") for path in files)
    assert not any(word in path for path in files for word in ("passwd", "script", "DROP", "a/b"))
    assert query(dest, "SELECT count(*) AS n FROM records").to_pylist() == [{"n": len(HOSTILE) + 1}]
    fault_counts.check("hostile ids", dest, {*map(stored, HOSTILE), "all"}, faults=len(HOSTILE))


def _stored(value: Any) -> Any:
    if isinstance(value, dict):
        return {stored(key): _stored(each) for key, each in value.items()}
    return [_stored(each) for each in value] if isinstance(value, list) else stored(value)


def test_hostile_ids_go_through_the_inbox(tmp_path: Path, fault_counts: FaultCounts) -> None:
    config = LogConfig(str(tmp_path / "dest"))
    with AttributionLogger(tmp_path / "dest", sample_rate=1.0) as logger:
        for text in HOSTILE:
            assert logger.submit_replay(text or "?", None, [1], request_id=text, metadata={text: text}), text
    assert logger.stats().handed_over == len(HOSTILE)
    assert_identity(logger.stats())
    waiting = list(inbox.waiting(config.spool_path))
    assert len(waiting) == len(HOSTILE) and {path.parent for path in waiting} == {inbox.inbox_of(config.spool_path)}
    fault_counts.add("hostile requests", faults=len(HOSTILE), acknowledged=len(HOSTILE), checked=len(waiting))


@pytest.mark.parametrize(
    "options",
    [
        {"request_id": "x" * 10_000_000},
        {"request_id": "\ud800" * 10_000_000},
        {"request_id": "x" * 1025},
        {"request_id": "x", "metadata": {"big": "x" * 10_000_000}},
        {"request_id": "x", "metadata": {"x" * 10_000_000: 1}},
        {"request_id": "x", "metadata": {str(i): i for i in range(1_000_000)}},
        {"request_id": "x", "metadata": {"list": list(range(100_000))}},
        {"request_id": "x", "metadata": {"nan": float("nan")}},
        {"request_id": b"bytes"},
    ],
    ids=["id", "surrogates", "id by one", "value", "key", "keys", "list", "nan", "bytes"],
)
def test_what_is_too_large_is_refused_and_counted(
    tmp_path: Path, fault_counts: FaultCounts, options: dict[str, Any]
) -> None:
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert not logger.submit_attribution(WHY, **options)
        assert logger.submit_attribution(WHY, request_id="fine")
    assert logger.stats().dropped == {"invalid": 1}
    assert_identity(logger.stats())
    fault_counts.check("too large", tmp_path, {"fine"}, faults=1, counted=counted(logger.stats()))


def test_metadata_that_changes_after_submission_changes_nothing(tmp_path: Path) -> None:
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        metadata: dict[str, Any] = {"a": 1}
        assert logger.submit_attribution(WHY, request_id="r", metadata=metadata)
        metadata["a"], metadata["b"] = 2, object()
    assert next(read(tmp_path)).envelope.metadata == {"a": 1}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=5)
@given(
    batch=st.lists(
        st.tuples(st.text(max_size=60), st.dictionaries(st.text(max_size=10), JSON, max_size=4)),
        min_size=20,
        max_size=60,
    )
)
def test_any_id_and_any_metadata_come_back(
    dest: Path, fault_counts: FaultCounts, batch: list[tuple[str, dict[str, Any]]]
) -> None:
    folder = dest / str(time.monotonic_ns())
    with AttributionLogger(folder, sample_rate=1.0) as logger:
        for request_id, metadata in batch:
            assert logger.submit_attribution(WHY, request_id=request_id, metadata=metadata)
    assert_identity(logger.stats())
    assert_whole(folder)
    found = sorted(read(folder), key=lambda each: each.envelope.sequence)
    assert [(each.envelope.request_id, each.envelope.metadata) for each in found] == [
        (stored(request_id), metadata) for request_id, metadata in batch
    ]
    fault_counts.add("any id", faults=len(batch), acknowledged=len(batch), checked=len(found))
