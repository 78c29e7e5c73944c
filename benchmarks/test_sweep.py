"""The sweep changes one thing at a time, and its table says what its rows say."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from benchmarks.record import machine, read_jsonl, write_jsonl
from benchmarks.sweep import BASE, BEST, rows, variants
from benchmarks.table import sweep_table
from fastattr.evaluate import METHODS, Hiding, Judgement, Results
from fastattr.metrics import Plausibility


def test_no_two_variants_are_alike_and_all_can_be_told_apart() -> None:
    listed = variants()
    assert len({variant.name for variant in listed}) == len(listed)
    configs = [variant.config for variant in listed]
    assert BASE in configs and METHODS["tam"] in configs and BEST in configs
    assert len(set(configs)) == len(configs)


def test_a_change_is_to_what_its_name_says() -> None:
    for variant in variants():
        base = BEST if variant.factor.startswith("best, ") else BASE
        name = variant.factor.removeprefix("best, ")
        if name in {field.name for field in fields(BASE)}:
            differ = {f.name for f in fields(base) if getattr(base, f.name) != getattr(variant.config, f.name)}
            assert differ == {name}


def test_rows_survive_the_file_and_the_table_shows_them(tmp_path: Path) -> None:
    listed = variants()

    def judgement(id: int) -> Judgement:
        better = {"tam 1": 0.25, "arc 1 1.5 2": 0.5}
        scores = {v.name: Plausibility(better.get(v.value, 0.75), 1.0, 0.0, 2, 3, 0, *[0.5] * 5) for v in listed}
        hidings = tuple(
            Hiding(name, "red", "color", (1.0, 0.0), (0.0, 1.0), 0.25 if "aggregate" in name else 0.5, 0.75, -1.0, 1.0)
            for name in [*(v.name for v in listed), "random", "mask"]
        )
        return Judgement(str(id), "A red ring.", 4, scores, hidings, ())

    results = Results({}, tuple(judgement(i) for i in range(5)), ())
    header = machine("test") | {
        "model": "none",
        "scenes": 5,
        "hidden_words": 5,
        "base": asdict(BASE),
        "interval": "95 %",
    }
    header, found = read_jsonl(write_jsonl(tmp_path / "x.jsonl", [header, *rows(listed, results, results)]))
    table = sweep_table(header, found)
    assert "5 held-out scenes, 10 nouns, 15 function words, 0 dropped; 5 words judged by hiding patches" in table
    # F1 of (.25, 1) is .4, of (.5, 1) 2/3, of (.75, 1) 6/7; equal scenes leave no width
    assert "| arc 1 1.5 2 | 0.500 | 1.000 | 0.667 | 0.500 | 0.500 | 0.750 | +0.267 [+0.267, +0.267] |" in table
    (after,) = [line for line in table.splitlines() if line.startswith("| aggregate: after |")]
    assert "| 0.250 | 0.750 | +0.190 [+0.190, +0.190] | -0.250 [-0.250, -0.250] | +0.000 [+0.000, +0.000] |" in after
    assert "random 0.500 / 0.750; mask 0.500 / 0.750" in table
    assert [row["value"] for row in found if row["factor"] == "control"] == ["random", "mask"]
    (tam,) = [row for row in found if row["value"] == "tam 1"]
    assert tam["over_tam"]["f1"]["mean"] == pytest.approx(0.0)
