"""Chosen tokens are explained as among all of them; the others cost nothing and say so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattr
from fastattr.demo.scenes import make_scene
from fastattr.method import explain_states, target_blocks
from fastattr.targets import choose_targets
from fastattr.text import TokenText
from fastattr.types import AttributionConfig, ScaleStates
from tests.engine.test_method import Case, cases

PROMPT = "Describe the image."


def said(*tokens: str) -> TokenText:
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    return TokenText("".join(tokens), tokens, tuple(zip([0, *ends[:-1]], ends, strict=True)))


SENTENCE = said("A", " red", " circle", " and", " a", " red", "dish", " square", ".")
JSON = said("Sure", ': {"', "name", '": "', "red", " ball", '", "', "n", '": ', "12", "}", " done")


@pytest.mark.parametrize(
    ("targets", "text", "expected"),
    [
        (["red"], SENTENCE, (1,)),  # not "reddish"
        (["RED circle", "square"], SENTENCE, (1, 2, 7)),
        (["a"], SENTENCE, (0, 4)),
        (re.compile("red"), SENTENCE, (1, 5)),
        (re.compile(r"c\w+e"), SENTENCE, (2,)),
        ([8, 0, 8], SENTENCE, (0, 8)),
        (lambda token: token.endswith("e"), SENTENCE, (2, 7)),
        ("fields", JSON, (4, 5, 9)),
    ],
    ids=["word", "words", "twice", "pattern", "pattern in a token", "indices", "function", "fields"],
)
def test_what_is_chosen(targets: Any, text: TokenText, expected: tuple[int, ...]) -> None:
    assert choose_targets(targets, text) == expected


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["blue"], fastattr.PhraseError, "is not in the response 'A red circle"),
        (re.compile("x+"), fastattr.PhraseError, r"'x\+' is not in the response"),
        (lambda token: False, fastattr.PhraseError, "chooses none of the 9 tokens"),
        ([], fastattr.PhraseError, "chooses none of the 9 tokens"),
        ([9], fastattr.InputError, r"targets holds \[9\], expected indices from 0 to 8"),
        ([-1], fastattr.InputError, r"targets holds \[-1\]"),
        ("red", fastattr.InputError, r"targets is 'red', expected 'fields' or a list of words"),
        ("fields", fastattr.InputError, "JSON"),
        ([True], fastattr.InputError, "targets is a list"),
        (3, fastattr.InputError, "targets is a int, expected 'fields', words"),
    ],
)
def test_options_that_fastattr_sets_itself_are_refused(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_targets(targets, SENTENCE)


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 9))
def test_blocks_hold_every_target_once_and_are_runs(targets: set[int], size: int) -> None:
    blocks = list(target_blocks(sorted(targets), size))
    assert [i for block in blocks for i in range(block.start, block.stop)] == sorted(targets)
    assert all(block.stop - block.start <= size for block in blocks)


@given(cases(), st.sampled_from(["lens", "tam", "arc"]), st.randoms(use_true_random=False))
def test_chosen_targets_are_as_among_all(case: Case, method: Any, random: Any) -> None:
    config = AttributionConfig(method=method, scales=case.scales, top_k=3, evidence=False)
    readings = [
        ScaleStates(hidden, ids, layout, scale)
        for hidden, ids, layout, scale in zip(case.hidden, case.ids, case.layouts, case.scales, strict=True)
    ]
    n = readings[0].layout.n_targets
    chosen = sorted(random.sample(range(n), random.randint(1, n)))
    others = [i for i in range(n) if i not in chosen]
    whole, some = (
        explain_states(readings, case.head, config),
        explain_states(readings, case.head, config, targets=chosen),
    )
    clear = [
        i for i in chosen if float(whole.raw_range[i, 1] - whole.raw_range[i, 0]) > 1e-3
    ]  # else rounding, stretched
    for one, other in zip((*some.image, some.context), (*whole.image, whole.context), strict=True):
        torch.testing.assert_close(one[clear], other[clear], rtol=1e-4, atol=1e-4)
        assert not one[others].any()
    assert torch.equal(some.log_prob, whole.log_prob) and torch.equal(some.agreement, whole.agreement)
    assert not some.degenerate[others].any()


def test_an_attribution_of_some_words(tmp_path: Path) -> None:
    model, scene = fastattr.load("shapes"), make_scene(10_000_003)
    whole = fastattr.attribute(model, scene.image, PROMPT)
    some = fastattr.attribute(model, scene.image, PROMPT, list(whole.token_ids), targets=["blue star"])
    assert some.explained is not None and int(some.explained.sum()) == len(whole["blue star"].targets[0])
    assert some["blue star"].box == whole["blue star"].box and some["blue star"].score == whole["blue star"].score
    assert not some["orange diamond"].maps[0].any() and some["orange diamond"].score == whole["orange diamond"].score
    assert any("2 of" in note and "were asked for" in note for note in some.notes)
    assert not any("all their scores are equal" in note for note in some.notes)
    loaded = fastattr.Attribution.load(some.save(tmp_path / "x.safetensors"))
    assert loaded.explained is not None and torch.equal(loaded.explained, some.explained)
    assert '"explained":[' in some.to_html(tmp_path / "x.html").read_text().replace(" ", "")
    assert whole.explained is None


def test_rows_of_a_batch_are_chosen_from_one_by_one() -> None:
    model = fastattr.load("shapes")
    rows = [(make_scene(seed).image, PROMPT, "A red circle is here.") for seed in (1, 2)]
    for why in fastattr.attribute_batch(model, rows, AttributionConfig(scales=(1.0,)), targets=["red circle"]):
        assert why.explained is not None and why.tokens[int(why.explained.int().argmax())].strip() == "red"
    with pytest.raises(fastattr.InputError, match="leave memory_limit and targets out"):
        case = AttributionConfig(method="tam", scales=(1.0,), compat="tam")
        head = fastattr.OutputHead(torch.ones(4, 2))
        layout = fastattr.TokenLayout.from_spans(images=[(0, 1, (1, 1, 1))], prompt=[], response=(1, 2))
        states = ScaleStates(torch.ones(1, 2), torch.tensor([0, 1]), layout)
        explain_states([states], head, case, targets=[0])
