"""The threat model names the test of every promise; here, that each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    tables = text.split("| promise | test |\n|---|---|\n")[1:]
    promises = [line for table in tables for line in table.split("\n\n")[0].splitlines()]
    assert len(promises) > 15
    for line in promises:
        named = re.findall(r"`([^`]*)`", line.rsplit(" | ", 1)[1])
        assert named, line
    path = ""
    for name in re.findall(r"`((?:tests/[\w/]+\.py)?(?:::\w+)?)`", text):
        file, _, test = name.partition("::")
        path = file or path
        found = {
            each.name for each in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(each, ast.FunctionDef)
        }
        assert not test or test in found, name


def test_the_security_policy_leads_there() -> None:
    assert "docs/threat-model.md" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
