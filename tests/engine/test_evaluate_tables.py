"""Tables are figures of the rows, recomputed here word by word; rows survive their file."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.errors import InputError
from fastattr.evaluate import Hiding, Judgement, Results, Said, Skipped, tables
from fastattr.evaluate.judgement import from_line, to_line
from fastattr.metrics import Plausibility

NOTHING = {"image_share": 0.5, "peak_ratio": 2.0, "entropy": 0.5, "area": 0.25}


def said(true: bool, log_prob: float, evidence: float, position: int = 0, kind: str = "color") -> Said:
    return Said("red", kind, true, position, log_prob, evidence, 1.0, {"tam": NOTHING})


def hiding(order: str, deletion: float, insertion: float) -> Hiding:
    return Hiding(order, "red", "color", (1.0, deletion), (0.0, insertion), deletion, insertion, -0.5, 2.0)


def judgement(
    id: str, obj: dict[str, float], words: tuple[Said, ...] = (), hidings: tuple[Hiding, ...] = ()
) -> Judgement:
    scores = {name: Plausibility(value, 1.0, 0.0, 2, 3, 1, 0.1, 0.2, 0.3, 0.4, 0.5) for name, value in obj.items()}
    return Judgement(id, "A red ring.", 4, scores, hidings, words)


def results(*rows: Judgement, skipped: tuple[Skipped, ...] = (), methods: tuple[str, ...] = ("tam", "arc")) -> Results:
    header = {"dataset": "made up", "model": "none", "settings": {"methods": {name: {} for name in methods}}}
    return Results(header, rows, skipped)


def cells(table: str, first: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


numbers = st.floats(-50, 50).map(lambda value: float(f"{value:.4g}"))
shares = st.floats(0, 1).map(lambda value: float(f"{value:.4g}"))


@given(st.lists(shares, min_size=2, max_size=5), numbers, numbers, st.booleans(), st.text(max_size=8))
def test_rows_survive_their_line(curve: list[float], evidence: float, log_prob: float, true: bool, word: str) -> None:
    row = judgement(
        "7:color",
        {"tam": 0.25, "arc": math.nan},
        (replace(said(true, log_prob, evidence), word=word),),
        (replace(hiding("arc", 0.5, 0.25), deletion=tuple(curve)),),
    )
    line = to_line(row)
    assert "\n" not in line and json.loads(line)
    back = from_line(line)
    assert isinstance(back, Judgement)
    assert math.isnan(back.plausibility["arc"].obj)
    whole = {"tam": row.plausibility["tam"]}
    assert replace(back, plausibility=whole) == replace(row, plausibility=whole)
    assert from_line(to_line(Skipped("8", "no mask"))) == Skipped("8", "no mask")


def test_methods_are_pooled_over_words_and_compared_on_the_same_scenes() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        deletion, insertion = rng.random(2)
        orders = {
            "random": (0.9, 0.1),
            "mask": (0.1, 0.9),
            "tam": (deletion, insertion),
            "arc": (deletion - 0.25, insertion),
        }
        found = tuple(hiding(name, *both) for name, both in orders.items())
        # the last scene shows nothing to hide
        rows.append(judgement(str(i), {"tam": 0.25, "arc": 0.5}, hidings=found if i < 11 else ()))
    made = results(*rows)
    table = tables.methods_table(made)
    deleted = [each.deletion_auc for row in rows for each in row.hidings if each.order == "tam"]
    tam, arc = cells(table, "tam"), cells(table, "arc")
    assert tam[1:4] == ["0.250", "1.000", "0.400"]  # 2 * .25 / 1.25
    assert tam[5] == f"{np.mean(deleted):.3f}"
    assert arc[5] == f"{np.mean(deleted) - 0.25:.3f}"
    # equal differences in every scene leave no width
    assert arc[9:] == ["+0.267 [+0.267, +0.267]", "-0.250 [-0.250, -0.250]", "+0.000 [+0.000, +0.000]"]
    assert cells(table, "random")[5:7] == ["0.900", "0.100"]
    assert "11 words judged by hiding patches" in tables.counts(made)


def test_a_score_that_tells_and_one_that_does_not() -> None:
    """Every scene has two true and one invented word; evidence tells them apart, log-probability does not."""
    words = (said(True, -1.0, 3.0), said(True, -3.0, 2.0), said(False, -2.0, -1.0))
    made = results(*(judgement(str(i), {"tam": 0.25, "arc": 0.5}, words) for i in range(5)))
    telling = {each.score: each for each in tables.tellings(tables.words_of(made))}
    assert telling[tables.EVIDENCE].auroc == telling[tables.EVIDENCE].within.mean == 1.0
    assert telling[tables.EVIDENCE].precision == 1.0
    assert telling[tables.LOG_PROB].auroc == 0.5  # one true word is likelier, one is not
    assert telling[tables.POSITION].auroc == 0.5
    assert telling[tables.EVIDENCE].over_log_prob.mean == 0.5
    assert "15 words said of the picture, 5 of them invented" in tables.counts(made)
    assert cells(tables.kinds_table(made), "color")[1] == "5 of 15"


def test_a_word_that_another_scale_does_not_say_is_suspect() -> None:
    """Both words are as likely with the picture as without; only at another scale is the invented one unlikely."""
    true, invented = said(True, -0.1, 0.0), replace(said(False, -0.1, 0.0), agreement=0.01)
    telling = {
        each.score: each
        for each in tables.tellings(
            tables.words_of(results(*(judgement(str(i), {"tam": 0.5}, (true, invented)) for i in range(3))))
        )
    }
    assert telling[tables.COMBINED].auroc == 0.5
    assert telling[tables.AGREEMENT].auroc == telling[tables.COMBINED_WORST].auroc == 1.0


def test_only_words_at_like_positions_are_compared() -> None:
    """The score is the position, and invented words come late: it tells all across positions, nothing within."""
    rows = [
        judgement(str(i), {"tam": 0.5}, (said(True, -float(p), -float(p), p), said(p < 2, -float(p), -float(p), p)))
        for i, p in enumerate([0, 1, 2, 3] * 4)
    ]
    telling = {each.score: each for each in tables.tellings(tables.words_of(results(*rows, methods=("tam",))))}
    pairs = [
        (a.position, b.position)
        for a, b in itertools.product(
            [w for r in rows for w in r.said if w.true], [w for r in rows for w in r.said if not w.true]
        )
    ]
    across = np.mean([1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert telling[tables.LOG_PROB].auroc == pytest.approx(across)
    assert telling[tables.LOG_PROB].within.mean == 0.5


def test_statements_about_one_picture_are_drawn_together() -> None:
    words = (said(True, -1.0, 1.0), said(False, -2.0, 0.0))
    apart = tables.words_of(results(*(judgement(str(i), {"tam": 0.5}, words) for i in range(4)), methods=("tam",)))
    together = tables.words_of(
        results(*(judgement(f"7:{kind}", {"tam": 0.5}, words) for kind in "abcd"), methods=("tam",))
    )
    assert len(set(apart.picture.tolist())) == 4
    assert len(set(together.picture.tolist())) == 1


def test_samples_that_could_not_be_judged_are_counted_and_named() -> None:
    skipped = tuple(Skipped(str(i), f"fault {i}") for i in range(7))
    text = tables.counts(results(judgement("1", {"tam": 0.5, "arc": 0.5}), skipped=skipped))
    assert "Skipped: 7 (0: fault 0; 1: fault 1; 2: fault 2; 3: fault 3; 4: fault 4; and 2 more)" in text


def test_calibration_takes_both_kinds_of_words() -> None:
    words = tuple(said(True, -1.0, float(e)) for e in range(1, 21)) + tuple(
        said(False, -1.0, -float(e)) for e in range(4)
    )
    made = tables.calibration_of(results(judgement("1", {"tam": 0.5}, words), methods=("tam",)))
    # one of twenty true words may be marked
    assert (made.threshold_nats, made.true_marked, made.false_marked, made.n_true, made.n_false) == (2.0, 1, 4, 20, 4)
    assert (made.words, made.dataset, made.model) == ("color words", "made up", "none")
    with pytest.raises(InputError, match="does not hold both true and invented words"):
        tables.calibration_of(results(judgement("1", {"tam": 0.5}, words[:3]), methods=("tam",)))
