"""The threshold on evidence, what it is said to do, and which words it marks."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattr
from fastattr import Attribution, InputError, SaveError, attribute
from fastattr.adapters.model import BUNDLED
from fastattr.calibration import Calibration, calibrate
from fastattr.demo import scenes
from fastattr.storage import read_calibration, write_calibration
from fastattr.text import FUNCTION_WORDS
from tests.engine.samples import make_attribution

NAMES = {"words": "content words", "dataset": "scenes", "model": "by hand"}
MADE_UP = Calibration(0.43, n_true=900, n_false=300, true_marked=45, false_marked=243, **NAMES)


# --- the threshold ----------------------------------------------------------------------------------

# quarters, so that many words tie
words_of_known_truth = st.lists(st.tuples(st.integers(-4, 8), st.booleans()), min_size=2, max_size=60).filter(
    lambda words: len({true for _, true in words}) == 2
)


@given(words_of_known_truth, st.sampled_from([0.0, 0.05, 0.1, 0.29, 0.5, 0.9, 0.99]))
def test_no_higher_threshold_keeps_the_false_alarms_down(words: list[tuple[int, bool]], false_alarms: float) -> None:
    evidence = [quarters / 4 for quarters, _ in words]
    truth = [true for _, true in words]
    found = calibrate(np.array(evidence), np.array(truth), false_alarms=false_alarms, **NAMES)

    def marked(threshold: float, kind: bool) -> int:
        return sum(nats < threshold for nats, true in zip(evidence, truth, strict=True) if true is kind)

    n_true = truth.count(True)
    assert (found.n_true, found.n_false) == (n_true, truth.count(False))
    assert found.true_marked == marked(found.threshold_nats, True)
    assert found.false_marked == marked(found.threshold_nats, False)
    assert found.true_marked / n_true <= false_alarms
    assert marked(math.nextafter(found.threshold_nats, math.inf), True) / n_true > false_alarms


def test_a_threshold_by_hand() -> None:
    # of twenty true words one may be marked: the threshold is the evidence of the second lowest
    true = np.array([0.5, -1.0, *np.arange(1.0, 19.0)])
    invented = np.array([-3.0, 0.25, 0.5, 6.0])
    found = calibrate(np.append(true, invented), np.arange(24) < 20, **NAMES)
    assert found == Calibration(0.5, n_true=20, n_false=4, true_marked=1, false_marked=2, **NAMES)
    # rounding around 0 is no evidence: the threshold is below it
    noise = np.append(np.full(20, 3e-6), np.full(20, -2e-6))
    sparing = calibrate(np.append(noise, [-1.0, -2e-6]), np.arange(42) < 40, **NAMES)
    assert (sparing.threshold_nats, sparing.true_marked, sparing.false_marked) == (-0.01, 0, 1)
    # three true words tie at the threshold, so none of them is marked
    tied = calibrate(np.array([1.0, 1.0, 1.0, 2.0, 0.0]), np.arange(5) < 4, false_alarms=0.5, **NAMES)
    assert (tied.threshold_nats, tied.true_marked, tied.false_marked) == (1.0, 0, 1)


@pytest.mark.parametrize(
    ("evidence", "true", "false_alarms", "message"),
    [
        ([1.0, 2.0], [True, True], 0.05, "2 true and 0 invented words, expected some of both"),
        ([1.0], [False], 0.05, "0 true and 1 invented words"),
        ([1.0, math.nan], [True, False], 0.05, "1 of 2 words have evidence that is not finite"),
        ([1.0, -math.inf], [True, False], 0.05, "1 of 2 words have evidence that is not finite"),
        ([1.0, 2.0], [True], 0.05, r"evidence of shape \(2,\) and true of bool \(1,\)"),
        ([1.0, 2.0], [1, 0], 0.05, "true of int64"),
        ([1.0, 2.0], [True, False], 1.0, "false_alarms is 1.0, expected a share from 0 to below 1"),
        ([1.0, 2.0], [True, False], math.nan, "false_alarms is nan"),
    ],
)
def test_words_that_give_no_threshold(
    evidence: list[float], true: list[object], false_alarms: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(np.array(evidence), np.array(true), false_alarms=false_alarms, **NAMES)


# --- what is said of it -----------------------------------------------------------------------------


@given(st.integers(1, 3000), st.data())
def test_the_interval_holds_what_a_normal_test_would_not_reject(n: int, data: st.DataObject) -> None:
    """Wilson's interval by its definition: its ends lie 1.96 standard errors from the share, by their own errors."""
    hits = data.draw(st.integers(0, n))
    share = dataclasses.replace(MADE_UP, n_true=n, true_marked=hits).false_alarms
    assert share.value == hits / n
    assert 0 <= share.low <= share.value + 1e-12 and share.value - 1e-12 <= share.high <= 1
    for end in (share.low, share.high):
        distance = 1.959964 * math.sqrt(end * (1 - end) / n)
        assert abs(end - share.value) == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_intervals_known_from_tables(hits: int, n: int, low: float, high: float) -> None:
    caught = dataclasses.replace(MADE_UP, n_false=n, false_marked=hits).caught
    assert (caught.low, caught.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_it_says_what_was_measured() -> None:
    assert str(MADE_UP) == (
        "evidence below 0.43 nats: on 1,200 content words of scenes, 81 % [76, 85] of invented words and 5 % [4, 7] of "
        "true words are marked"
    )
    assert str(dataclasses.replace(MADE_UP, threshold_nats=-2e-6)).startswith("evidence below 0.00 nats")


# --- files ------------------------------------------------------------------------------------------


@given(words_of_known_truth)
def test_a_calibration_survives_its_file(tmp_path_factory: pytest.TempPathFactory, words: list[Any]) -> None:
    evidence = np.array([quarters / 3 for quarters, _ in words])
    found = calibrate(evidence, np.array([true for _, true in words]), **NAMES)
    path = tmp_path_factory.getbasetemp() / "calibration.json"
    assert read_calibration(write_calibration(found, path)) == found


def test_nothing_is_written_where_nothing_can_be(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot be written"):
        write_calibration(MADE_UP, tmp_path / "missing" / "calibration.json")


def written(**changes: object) -> str:
    return json.dumps({**dataclasses.asdict(MADE_UP), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1]", "it holds list, expected dataset, false_marked, model"),
        ("{}", "it holds nothing, expected"),
        ('{"threshold_nats": 0.4}', "it holds threshold_nats, expected dataset, false_marked"),
        (written(precision=0.5), "it holds .*precision.*, expected"),
        (written(threshold_nats="0.4"), "threshold_nats is '0.4', expected a finite number"),
        (written(threshold_nats=math.nan), "threshold_nats is nan, expected a finite number"),
        (written(threshold_nats=True), "threshold_nats is True"),
        (written(n_true=0), "n_true is 0, expected a whole number of words of at least 1"),
        (written(n_false=2.5), "n_false is 2.5"),
        (written(true_marked=901), "true_marked is 901, expected a whole number from 0 to n_true = 900"),
        (written(false_marked=-1), "false_marked is -1"),
        (written(words=" "), "words is ' ', expected some text"),
        (written(dataset=None), "dataset is None, expected some text"),
        ("\ud83d", "codec can't decode"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=rf"calibration\.json' cannot be read as a calibration: .*{message}"):
        read_calibration(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read as a calibration: .*No such file"):
        read_calibration(tmp_path / "calibration.json")


# --- beside a model ---------------------------------------------------------------------------------


def test_a_model_brings_its_calibration_to_what_it_explains(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(BUNDLED["shapes"], directory, ignore=shutil.ignore_patterns("calibration.json"))
    picture = scenes.make_scene(30_000_000).image
    words = {"prompt": "List the objects.", "response": "a red circle.", "scales": (1.0,)}

    plain = fastattr.load(directory)
    assert plain.calibration is None
    assert attribute(plain, picture, **words).calibration is None

    write_calibration(MADE_UP, directory / "calibration.json")
    model = fastattr.load(directory)
    assert model.calibration == MADE_UP
    why = attribute(model, picture, **words)
    assert why.calibration == MADE_UP
    assert Attribution.load(why.save(tmp_path / "x.safetensors")).calibration == MADE_UP

    (directory / "calibration.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a calibration"):
        fastattr.load(directory)


# --- which words are marked -------------------------------------------------------------------------


def attribution_of(tokens: tuple[str, ...], evidence: list[float], threshold: float | None = None) -> Attribution:
    calibration = None if threshold is None else dataclasses.replace(MADE_UP, threshold_nats=threshold)
    return dataclasses.replace(make_attribution(tokens), evidence=torch.tensor(evidence), calibration=calibration)


def marked_words(why: Attribution) -> list[str]:
    return [word.text for word in why.low_evidence]


def test_words_below_the_threshold_are_marked() -> None:
    tokens = ("A", " red", " lamp", "shade", " is", " near", " a", " cat", ".")
    why = attribution_of(tokens, [-2.0, 0.5, -1.0, 1.75, -2.0, -2.0, -2.0, -0.25, -2.0])
    assert marked_words(why) == ["cat"]  # lampshade has 0.75 in all
    higher = dataclasses.replace(why, calibration=dataclasses.replace(MADE_UP, threshold_nats=0.75))
    assert marked_words(higher) == ["red", "cat"]  # what equals the threshold is not below it
    above = dataclasses.replace(why, calibration=dataclasses.replace(MADE_UP, threshold_nats=0.8))
    red, lampshade, cat = above.low_evidence
    assert (lampshade.spans, lampshade.targets, lampshade.score) == (((6, 15),), ((2, 3),), 0.75)
    assert torch.equal(lampshade.map, why.image[0][[2, 3]].amax(dim=0))
    assert (red.targets, cat.targets) == (((1,),), ((7,),))


def test_every_occurrence_stands_for_itself() -> None:
    why = attribution_of(("red", " cat", " and", " red", " dog"), [1.0, 1.0, -1.0, -1.0, 1.0])
    (again,) = why.low_evidence
    assert (again.spans, again.targets) == (((12, 15),), ((3,),))


@pytest.mark.parametrize("text", ["it's", "It’s", "T-shirt", "Café", "12", "naïve-looking", "字"])
def test_one_word(text: str) -> None:
    words = marked_words(attribution_of(tuple(f" _{text}."), [-1.0] * (len(text) + 3)))
    assert words == ([] if text.lower().replace("’", "'") == "it's" else [text])


@pytest.mark.parametrize("word", sorted(FUNCTION_WORDS))
def test_function_words_are_never_marked(word: str) -> None:
    for written_as in (word, word.capitalize(), word.upper(), word.replace("'", "’")):
        assert marked_words(attribution_of((written_as, " dogs"), [-1.0, -1.0])) == ["dogs"]


@pytest.mark.parametrize("word", ["Yes", "no", "not", "isn't", "two", "left", "top", "many", "Hund"])
def test_words_that_claim_something_are(word: str) -> None:
    assert marked_words(attribution_of((word,), [-1.0])) == [word]


pieces = st.lists(
    st.tuples(st.sampled_from([" the", " lamp", "shade", "-lit", " ", ", ", "é", " 1", "2", "\n"]), st.integers(-8, 8)),
    min_size=1,
    max_size=20,
)


@given(pieces, st.integers(-8, 8))
def test_marks_by_characters(drawn: list[tuple[str, int]], eighths: int) -> None:
    """Letter by letter: each word collects the tokens that wrote one of its letters."""
    why = attribution_of(tuple(text for text, _ in drawn), [nats / 8 for _, nats in drawn], eighths / 8)
    letters = [(letter, token) for token, (text, _) in enumerate(drawn) for letter in text]
    words: list[tuple[str, set[int]]] = []
    inside = False
    for i, (letter, token) in enumerate(letters):
        joins = letter == "-" and inside and i + 1 < len(letters) and letters[i + 1][0].isalnum()
        if not (letter.isalnum() or joins):
            inside = False
            continue
        if not inside:
            words.append(("", set()))
        text, tokens = words[-1]
        words[-1] = (text + letter, tokens | {token})
        inside = True
    expected = [
        (text, tuple(sorted(tokens)))
        for text, tokens in words
        if text != "the" and sum(drawn[token][1] for token in tokens) < eighths
    ]
    assert [(word.text, *word.targets) for word in why.low_evidence] == expected


def test_without_evidence_there_is_no_telling() -> None:
    with pytest.raises(InputError, match="made without evidence; use attribute with evidence=True"):
        _ = make_attribution(evidence=False).low_evidence
