"""The README is true: its code prints what it says, its tables are those of the results, its tree is the tree."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from benchmarks.log_report import faults_table, log_table, server_table
from benchmarks.rank_filter import filter_table
from benchmarks.record import RESULTS, read_jsonl
from benchmarks.rival_report import rivals_summary, rivals_table
from benchmarks.sanity import sanity_table
from benchmarks.scaling_report import batch_kill_table, scaling_table
from benchmarks.table import (
    inventions_summary,
    long_table,
    overhead_table,
    postprocessing_table,
    rates_table,
    static_table,
)
from fastattr.adapters import FAMILIES
from fastattr.errors import how_to_install
from fastattr.evaluate import read
from fastattr.evaluate.tables import methods_table
from fastattr.log.schema import as_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_code_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[0], {})
    assert printed.getvalue() == blocks("text")[0]
    assert (tmp_path / "why.html").is_file()


def test_the_tables_are_those_of_the_results() -> None:
    assert methods_table(read(RESULTS / "eval_scenes.jsonl")) in README
    invented = [read(RESULTS / f"eval_scenes-{name}.jsonl") for name in ("erased", "small", "false")]
    assert inventions_summary(invented) in README
    assert rivals_summary(*read_jsonl(RESULTS / "rivals.jsonl")) in README
    assert postprocessing_table(*read_jsonl(RESULTS / "postprocessing.jsonl")) in README
    assert rates_table(*read_jsonl(RESULTS / "rates.jsonl")) in README
    assert log_table(*read_jsonl(RESULTS / "log_load.jsonl")) in README
    assert faults_table(*read_jsonl(RESULTS / "faults.jsonl")) in README
    assert server_table(*read_jsonl(RESULTS / "log_server.jsonl")) in README
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text()
    assert long_table(*read_jsonl(RESULTS / "long.jsonl")) in benchmarks
    assert overhead_table(*read_jsonl(RESULTS / "overhead.jsonl")) in benchmarks
    assert scaling_table(*read_jsonl(RESULTS / "scaling.jsonl")) in benchmarks
    assert batch_kill_table(*read_jsonl(RESULTS / "batch_kill.jsonl")) in benchmarks
    assert filter_table(*read_jsonl(RESULTS / "rank_filter.jsonl")) in benchmarks
    assert rivals_table(*read_jsonl(RESULTS / "rivals.jsonl")) in benchmarks
    assert sanity_table(*read_jsonl(RESULTS / "sanity.jsonl")) in benchmarks
    kernels = (ROOT / "kernels" / "README.md").read_text()
    assert static_table(*read_jsonl(RESULTS / "static.jsonl")) in kernels


def test_the_record_is_documented() -> None:
    assert as_markdown() in (ROOT / "fastattr" / "log" / "README.md").read_text()


def test_as_many_models_as_it_says() -> None:
    assert f"`fastattr models` lists {len(FAMILIES)} model types" in README


def test_the_tree_is_the_tree() -> None:
    folders: list[str] = []
    named = set()
    for line in blocks("tree")[0].splitlines():
        name = line.strip().split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name.rstrip("/")]
        path = ROOT.joinpath(*folders)
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"{path} is in the README but not there"
        named.add(path)
    hidden = {"__pycache__", "shapes", "results", "data"}
    for path in (ROOT / "fastattr").iterdir():
        if path.name not in hidden and path.suffix in ("", ".py"):
            assert path in named, f"{path} is not in the README's tree"


def test_install_lines_work_from_a_clone() -> None:
    """fastattr is not on a package index: `pip install fastattr[log]` would fail or install another package."""
    _, _, listed = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    extras = set(re.findall(r"^(\w+) = \[", listed.partition("\n[")[0], re.MULTILINE))
    files = [ROOT / "README.md", *(ROOT / "fastattr").rglob("*.py"), *(ROOT / "fastattr").rglob("*.md")]
    named: set[str] = set()
    for path in [*files, *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")]:
        for line in path.read_text().splitlines():
            assert not re.search(r"fastattr\[\w", line), f"{path}: {line}"
            for groups in re.findall(r'"\.\[([\w,]+)\]"', line):
                named |= set(groups.split(","))
            named |= set(re.findall(r"how_to_install\(['\"](\w+)['\"]\)", line))
    assert named <= extras, f"there are no extras {named - extras}"
    assert {"log", "eval", "ray", "bench", "test"} <= named
    assert how_to_install("log").endswith('pip install ".[log]"')


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
