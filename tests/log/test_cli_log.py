"""What a person types and sees: `fastattr log ...`."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import fastattr
from fastattr.cli import main
from fastattr.cli.output import printable
from fastattr.errors import how_to_install
from tests.log.records import NOON, make_record, write_segment

COMMAND = (sys.executable, "-c", "from fastattr.cli import main; main()")
ESCAPE = "\x1b[31mred\x07\nnext\u202e\x00"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    dest = tmp_path / "log"
    records = [
        make_record(
            request_id=("first", "second", "second", ESCAPE)[k],
            seed=k,
            time=NOON + timedelta(days=k),
            model=("one", "two")[k % 2],
            evidence=(2.0, -3.0, 0.5, False)[k],
            metadata={"note": ESCAPE},
            sequence=k,
        )
        for k in range(4)
    ]
    write_segment(dest, records)
    return dest


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `fastattr log WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["fastattr", "log", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(monkeypatch, *words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def test_ls(dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(monkeypatch, capsys, "ls", dest).splitlines()
    assert lines[0].split() == ["TIME", "(UTC)", "EVIDENCE", "LOWEST", "TOKENS", "MODEL", "REQUEST", "RECORD"]
    assert [line[:10] for line in lines[1:]] == [f"{NOON + timedelta(days=k):%Y-%m-%d}" for k in (3, 2, 1, 0)]
    assert "+2.00" in lines[4] and "first" in lines[4] and "nan" not in lines[1]
    starts = [line.index(word) for line, word in zip(lines[1:], ("two", "one", "two", "one"), strict=True)]
    assert set(starts) == {lines[0].index("MODEL")}  # columns stand under their names
    lowest = printed(monkeypatch, capsys, "ls", dest, "--lowest-evidence", "--limit", 2).splitlines()
    assert "-3.00" in lowest[1] and "+0.50" in lowest[2] and lowest[3].startswith("2 more;")


def test_ls_filters(dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def requests(*words: object) -> list[str]:
        return [row["request_id"] for row in json.loads(printed(monkeypatch, capsys, "ls", dest, "--json", *words))]

    assert requests("--model", "one") == ["second", "first"]
    assert requests("--since", "2026-11-23", "--until", "2026-11-24T12:00") == ["second"]
    assert requests("--since", "2026-11-24T12:00:00.123456Z") == [ESCAPE, "second"]
    assert requests("--until", "2026-11-22T14:30+02:00") == ["first"]
    days = (datetime.now(timezone.utc) - NOON).days  # how long ago is counted from now
    assert "first" in requests("--since", f"{max(days, 0) + 2}d")
    assert requests("--until", "90000d") == []


def test_show(dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(monkeypatch, capsys, "show", dest, "second")
    newer, older = (make_record(sequence=k)[1].record_id for k in (2, 1))
    assert newer in shown.splitlines()[0] and f"1 older of the same request: {older}" in shown
    assert "A red circle and a red circle." in shown
    told = json.loads(printed(monkeypatch, capsys, "show", dest, older, "--json"))
    assert (told["record_id"], told["model"], told["metadata"]) == (older, "two", {"note": ESCAPE})
    assert len(told["tokens"]) == 8 and told["tokens"][0]["evidence"] == -3.0
    for suffix in ("html", "safetensors", "png", "json"):
        printed(monkeypatch, capsys, "show", dest, "first", "--out", tmp_path / f"x.{suffix}")
    assert fastattr.Attribution.load(tmp_path / "x.safetensors").response == "A red circle and a red circle."
    assert len(json.loads((tmp_path / "x.json").read_text())["image"][0]) == 8
    assert "<html" in (tmp_path / "x.html").read_text()


def test_terminals_are_given_no_orders(
    dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("ls", dest), ("show", dest, ESCAPE), ("query", dest, "SELECT request_id, metadata FROM records")):
        shown = printed(monkeypatch, capsys, *words)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert r"\x1b[31mred" in shown
    assert printable("a\tb\nc\x1b é 漢 \U0001f600") == "a\tb\nc\\x1b é 漢 \U0001f600"


def test_query(dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sql = "SELECT model, count(*) AS n, max(maps) AS m, max(mean_evidence) AS e FROM records GROUP BY model ORDER BY model"
    lines = printed(monkeypatch, capsys, "query", dest, sql).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "n", "m", "e"], ["one", "2", "192", "bytes", "2"], ["two", "2", "192", "bytes", "-3"],
    ]  # fmt: skip
    rows = json.loads(
        printed(monkeypatch, capsys, "query", dest, "SELECT time, 'nan'::FLOAT AS x FROM records", "--json")
    )
    assert {row["time"] for row in rows} == {(NOON + timedelta(days=k)).isoformat() for k in range(4)}
    assert rows[0]["x"] is None
    assert run(monkeypatch, "query", dest, "SELECT * FROM read_text('/etc/passwd')") == 2
    caught = capsys.readouterr()
    assert "root:" not in caught.out + caught.err and "the query cannot be answered" in caught.err


def test_export(
    dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        printed(monkeypatch, capsys, "export", dest, tmp_path / "x.jsonl") == f"4 records in {tmp_path / 'x.jsonl'}\n"
    )
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 4
    printed(monkeypatch, capsys, "export", dest, tmp_path / "x.parquet", "--where", "mean_evidence > 0")
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 2
    assert printed(monkeypatch, capsys, "export", dest, tmp_path / "reports", "--where", "sequence = 1").startswith(
        "1 record in"
    )
    assert [path.suffix for path in (tmp_path / "reports").iterdir()] == [".html"]
    printed(monkeypatch, capsys, "export", dest, tmp_path / "x.txt", "--format", "jsonl")
    assert run(monkeypatch, "export", dest, tmp_path / "y.txt") == 2
    assert "expected .jsonl or .parquet" in capsys.readouterr().err


def test_doctor(
    dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(monkeypatch, capsys, "doctor", dest)
    assert "4 records in 1 segment" in shown and shown.endswith("Nothing is lost or damaged.\n")
    assert json.loads(printed(monkeypatch, capsys, "doctor", dest, "--json"))["healthy"] is True
    write_segment(dest, [make_record(sequence=9)], number=1)
    assert run(monkeypatch, "doctor", dest) == 1
    assert "LOST: 5 records of writer 0123456789abcdef between 0 and 9" in capsys.readouterr().out
    assert run(monkeypatch, "doctor", dest, "--json") == 1
    assert json.loads(capsys.readouterr().out)["lost"] == 5
    assert run(monkeypatch, "doctor", dest, "--spool", tmp_path / "missing") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ls", "missing"), "'missing' is not a directory"),
        (("ls", "nosuch://x"), "give a directory, or the URL of a store"),
        (("ls", "log", "--since", "yesterday"), "--since is 'yesterday', expected a date"),
        (("ls", "log", "--until", "2026-02-30"), "--until is '2026-02-30', expected a date"),
        (("show", "log", "nobody"), "no record and no request has the id 'nobody'"),
        (("show", "log", "first", "--out", "x.txt"), "ends in '.txt'"),
        (("show", "log", "first", "--out", "missing/x.html"), "'missing/x.html' cannot be written"),
        (("query", "log", "SELEC"), "the query cannot be answered"),
        (("export", "log", "missing/x.jsonl"), "'missing/x.jsonl' cannot be written"),
        (("export", "log", "x.jsonl", "--where", "nonsense"), "the query cannot be answered"),
        (("serve", "missing"), "'missing' is not a directory"),
        (("serve", "log", "--host", "no such host"), "nothing can listen on no such host"),
    ],
)
def test_errors_are_one_clear_line(
    dest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(dest.parent)
    assert run(monkeypatch, *words) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert [path.name for path in dest.parent.iterdir()] == ["log"]


def test_missing_packages_are_named(
    dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "fastattr" and "log" in name.split("."):
            raise ModuleNotFoundError("No module named 'duckdb'")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    for words in (
        ("ls", dest),
        ("show", dest, "x"),
        ("query", dest, "x"),
        ("export", dest, "x"),
        ("doctor", dest),
        ("serve", dest),
    ):
        assert run(monkeypatch, *words) == 2
        told = capsys.readouterr().err
        assert "No module named 'duckdb'" in told and how_to_install("log") in told


def test_help_needs_no_optional_package() -> None:
    code = (
        "import sys\n"
        "for name in ('duckdb', 'pyarrow', 'fsspec', 'starlette', 'uvicorn', 'opentelemetry'): sys.modules[name] = None\n"
        "sys.argv = ['fastattr', 'log', '--help']\n"
        "from fastattr.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for name in ("ls", "show", "query", "export", "doctor", "serve"):
        [line] = [line for line in ran.stdout.splitlines() if line.split()[:1] == [name]]
        assert line.endswith(".") and not line.endswith("...")  # whole on one line


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_serve(dest: Path, host: str, warned: bool) -> None:
    words = ("log", "serve", str(dest), "--port", "0", "--host", host)
    with subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": ""},
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            address = re.match(rf"http://{re.escape(host)}:(\d+) ", process.stdout.readline())
            assert address, process.stderr.read()
            url, headers = f"http://127.0.0.1:{address[1]}/", {}
            if warned:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    assert "first" not in answer.read().decode()
                login = re.search(r"/\?token=(\S+)$", process.stdout.readline().strip())
                assert login, process.stderr.read()
                headers = {"Cookie": f"fastattr_token={login[1]}"}
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
                assert "first" in answer.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
    assert ("nothing is encrypted" in said) is warned
    assert "Traceback" not in said and process.returncode in (0, 130, -signal.SIGINT)
