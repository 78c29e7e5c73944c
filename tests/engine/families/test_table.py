"""`fastattr models` says what the tests prove, and nothing else."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version

from fastattr.adapters.families import FAMILIES, REASONS
from fastattr.adapters.families.table import PROVEN, as_markdown, listed
from fastattr.cli.app import main
from tests.engine.families.table import README, all_rows, table


def test_every_family_is_proven_by_a_row() -> None:
    assert {row.model_type for row in all_rows()} == set(FAMILIES)
    assert len(FAMILIES) >= 25
    assert not set(FAMILIES) & set(REASONS)


def test_the_table_is_that_of_the_rows() -> None:
    """To write it anew: python -m tests.engine.families.table"""
    held = json.loads(PROVEN.read_text())
    version = max((row["proven"] for row in held), key=Version)
    assert held == table(version)
    assert Version(version) <= Version(transformers.__version__)
    assert as_markdown() in README.read_text()


def test_what_it_says_of_video_and_scales_is_what_was_proven() -> None:
    shown = {row.model_type: row for row in listed()}
    for row in all_rows():
        line = shown[row.model_type]
        if row.video:
            assert line.video == "time steps"
        if len(row.scales) > 1:
            assert line.scales == "any"
    for model_type, line in shown.items():
        mine = [row for row in all_rows() if row.model_type == model_type]
        assert any(row.video for row in mine) == (line.video == "time steps"), f"{model_type}: videos are not proven"
        assert any(len(row.scales) > 1 for row in mine) == (line.scales == "any"), (
            f"{model_type}: scales are not proven"
        )


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["fastattr", "models", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    text, _, held = capsys.readouterr().out.rpartition("\n[")
    rows = json.loads("[" + held)
    assert {row["model_type"] for row in rows} == set(FAMILIES)
    for row in rows:
        assert any(row["model_type"] in line and row["family"][:40] in line for line in text.splitlines())
