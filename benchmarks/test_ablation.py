"""The ablation scores the right words and compares what it says it compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.ablation import BASE, ONE_SCALE_TAM, row, variants, words_of
from benchmarks.record import machine, read_jsonl, write_jsonl
from benchmarks.table import ablation_table
from fastattr.demo.scenes import describe, make_scene
from fastattr.metrics import Plausibility


def test_every_noun_is_found_with_the_mask_of_its_object() -> None:
    scene = make_scene(10_000_003, 48, n_objects=3)
    response = describe(scene).response
    letters = [(i, i + 1) for i in range(len(response))]  # one token a character
    nouns, functions = words_of(scene, response, letters)

    spelled = ["".join(response[t] for t in noun.targets) for noun in nouns]
    assert spelled == [word for item in scene.objects for word in (item.color, item.shape)]
    for index, noun in enumerate(nouns):
        np.testing.assert_array_equal(noun.mask, scene.masks[index // 2])
    found = ["".join(response[t] for t in targets).lower() for targets in functions]
    assert found == [w for w in response.lower().replace(".", "").split() if w in ("a", "is", "at", "in", "the")]


def test_a_token_that_holds_the_space_before_a_word_belongs_to_the_word() -> None:
    scene = make_scene(10_000_003, 48, n_objects=1)
    response = describe(scene).response
    stops = [i for i, c in enumerate(response) if c == " "] + [len(response)]
    tokens = list(zip([0, *stops], stops, strict=False))
    nouns, _ = words_of(scene, response, tokens)
    # "A small red circle ...": the colour is the third token, the shape the fourth
    assert [noun.targets for noun in nouns] == [(2,), (3,)]


def test_the_grid_holds_the_base_and_the_reference_and_no_two_rows_alike() -> None:
    configs = [variant.config for variant in variants()]
    assert BASE in configs and ONE_SCALE_TAM in configs
    assert len(set(configs)) == len(configs)


def test_results_survive_the_file_and_the_table_shows_them(tmp_path: Path) -> None:
    def score(obj: float) -> list[Plausibility]:
        return [Plausibility(obj, 0.5, 0.0, n_nouns=2, n_functions=5, n_dropped=1)] * 3

    chosen = [v for v in variants() if v.config in (BASE, ONE_SCALE_TAM) or v.factor == "aggregate"]
    scores = {v.config: score(0.5) for v in chosen} | {ONE_SCALE_TAM: score(0.25)}
    header = machine("test") | {
        "base": {"method": "arc", "scales": BASE.scales, "aggregate": "before"},
        "interval": "95 %",
    }
    header, rows = read_jsonl(write_jsonl(tmp_path / "results.jsonl", [header, *(row(v, scores) for v in chosen)]))

    table = ablation_table(header, rows)
    assert "3 held-out scenes, 6 nouns, 15 function words, 3 dropped" in table
    # F1 of (.25, .5) is 1/3 and of (.5, .5) is 1/2; equal scenes leave no width
    assert "| tam | 1 | 0.250 | 0.500 | 0.333 | +0.000 [+0.000, +0.000] |" in table
    assert "| arc | 1 1.5 2 | 0.500 | 0.500 | 0.500 | +0.167 [+0.167, +0.167] |" in table
    assert "| `aggregate` | before | after | 0.500 | 0.500 | 0.500 | +0.000 [+0.000, +0.000] |" in table
