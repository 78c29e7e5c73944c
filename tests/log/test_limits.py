"""Queries end, in bounded memory, and nothing that a record holds is obeyed by a terminal."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastattr.errors import InputError
from fastattr.log import AttributionLogger, reading
from fastattr.log.reading import query
from tests.engine.samples import make_attribution

ESCAPE = "\x1b]0;taken\x07\x1b[2J\x1b[31m\x9b31m\u202e"
RAW = (b"\x1b", b"\x07", b"\xc2\x9b", "\u202e".encode())
FOR_EVER = "SELECT count(*) FROM range(10000000) a, range(10000000) b, range(10000000) c"


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("log")
    with AttributionLogger(dest, sample_rate=1.0, content="text") as logger:
        for k in range(3):
            why = dataclasses.replace(make_attribution(), prompt=ESCAPE, model=ESCAPE, notes=(ESCAPE,))
            assert logger.submit_attribution(why, request_id=f"{ESCAPE}{k}", metadata={ESCAPE: ESCAPE})
    return dest


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT request_id, model, metadata, notes FROM records",
        "SELECT {'a': request_id, 'b': [model]} AS x, map([request_id], [1]) AS y FROM records",
        "PIVOT (SELECT request_id, 1 AS x FROM records) ON request_id USING count(*)",
        f'SELECT 1 AS "{ESCAPE}"',
        "SELECT CAST(request_id AS INT) FROM records",
        "SELECT error(request_id) FROM records",
        "SELECT json_extract(request_id, '$.a') FROM records",
        "SELECT strptime(model, '%Y') FROM records",
        f'SELECT "{ESCAPE}" FROM records',
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_no_answer_and_no_error_reaches_the_terminal_raw(dest: Path, sql: str, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    ran = subprocess.run(
        [sys.executable, "-m", "fastattr", "log", "query", str(dest), sql, *options], capture_output=True, timeout=120
    )
    assert ran.returncode in (0, 2) and (ran.stdout or ran.stderr)
    assert not any(raw in ran.stdout + ran.stderr for raw in RAW)
    assert b"u202e" in ran.stdout + ran.stderr  # it is told all the same


def test_errors_of_a_query_are_told_with_escapes_to_a_program_too(dest: Path) -> None:
    with pytest.raises(InputError, match="Conversion Error") as error:
        query(
            dest, "SELECT CASE WHEN i = 100000 THEN CAST(request_id AS INT) ELSE i END FROM records, range(200000) t(i)"
        )
    assert "\x1b" not in str(error.value) and "\\x1b" in str(error.value)


@pytest.mark.parametrize("sql", [FOR_EVER, "SELECT * FROM range(100000000000)"])
def test_a_query_ends(dest: Path, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    monkeypatch.setattr(reading, "MAX_QUERY_S", 1.0)
    began_s = time.monotonic()
    with pytest.raises(InputError, match=r"takes longer than 1 s|larger than 4096 MiB"):
        query(dest, sql)
    assert time.monotonic() - began_s < 30


def test_an_answer_that_is_too_large_is_refused(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_QUERY_BYTES", 1 << 28)
    with pytest.raises(InputError, match="larger than 256 MiB"):
        query(dest, "SELECT i FROM range(1000000000) t(i)")
    with pytest.raises(InputError, match=r"(?i)memory"):
        query(dest, "SELECT count(DISTINCT hash(i, j)) FROM range(100000) t(i), range(100000) u(j)")
    n = 1_000_000
    table = query(dest, f"SELECT i FROM range({n}) t(i)")
    assert table["i"].to_pylist() == list(range(n))


def test_what_a_query_says_of_itself_is_json(dest: Path) -> None:
    assert json.loads(json.dumps(reading.plain(query(dest, "SELECT count(*) AS n FROM records").to_pylist()))) == [
        {"n": 3}
    ]
