"""Phrases, patterns, boxes and scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastattr import InputError, PhraseError
from fastattr.selection import peak_box
from tests.engine.samples import make_attribution


def test_a_phrase_selects_every_occurrence_as_whole_words() -> None:
    selection = make_attribution()["RED  circle"]
    assert selection.text == "red circle"
    assert selection.spans == ((2, 12), (19, 29))
    assert selection.targets == ((1, 2), (5, 6))


def test_a_word_inside_another_is_not_found() -> None:
    with pytest.raises(PhraseError, match="'ed' is not in the response; its words are: A, red, circle, and, a"):
        make_attribution()["ed"]


def test_the_map_is_the_maximum_and_the_score_the_sum_of_each_occurrence() -> None:
    why = make_attribution()
    selection = why["red circle"]
    assert torch.equal(selection.map, why.image[0][[1, 2, 5, 6]].amax(dim=0))
    assert why.evidence is not None
    first, second = why.evidence[[1, 2]].sum(), why.evidence[[5, 6]].sum()
    assert selection.score == pytest.approx(float((first + second) / 2))
    assert "2 occurrences" in repr(selection)


def test_patterns() -> None:
    why = make_attribution(("It", " costs", " 1", "2", ".", "50"))
    found = why.find(r"\d+(\.\d+)?")
    assert found.text == "12.50"
    assert found.targets == ((2, 3, 4, 5),)
    with pytest.raises(PhraseError, match=r"a match of 'x\+' is not in the response"):
        why.find("x+")
    with pytest.raises(InputError, match="not a regular expression"):
        why.find("(")


@pytest.mark.parametrize("phrase", ["", "  ", 3])
def test_nothing_to_select(phrase: object) -> None:
    with pytest.raises(InputError, match="select by a word or phrase"):
        make_attribution()[phrase]  # type: ignore[index]


def test_the_message_of_a_missing_phrase_is_readable() -> None:
    with pytest.raises(PhraseError) as caught:
        make_attribution()["zebra"]
    assert str(caught.value).startswith("'zebra' is not in the response")
    assert isinstance(caught.value, KeyError)


def test_box_of_one_hot_cell() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    # cell (1, 2) covers pixels 40..60 x 20..40 of an 80 x 80 picture; half of a bilinear peak is half a cell further
    left, top, right, bottom = peak_box(maps, (0.0, 0.0, 1.0, 1.0), (80, 80)) or (0, 0, 0, 0)
    assert (left + right) / 2 == pytest.approx(50, abs=1.5)
    assert (top + bottom) / 2 == pytest.approx(30, abs=1.5)
    assert 10 <= right - left <= 30


def test_box_ignores_a_second_weaker_peak_and_respects_the_extent() -> None:
    maps = torch.zeros(1, 2, 8)
    maps[0, :, 0], maps[0, :, 6] = 1.0, 0.8
    # the grid covers the right half of a picture 200 wide
    left, top, right, bottom = peak_box(maps, (0.5, 0.0, 1.0, 1.0), (50, 200)) or (0, 0, 0, 0)
    assert left == pytest.approx(100, abs=1)
    assert right < 130
    assert (top, bottom) == (0, 50)


def test_a_dark_map_has_no_box() -> None:
    assert peak_box(torch.zeros(1, 3, 3), (0.0, 0.0, 1.0, 1.0), (30, 30)) is None


def test_several_images_are_asked_for_by_number() -> None:
    selection = make_attribution(grids=((1, 4, 6), (3, 2, 2)))["red"]
    with pytest.raises(InputError, match=r"2 images; use \.maps\[i\] instead of \.map"):
        _ = selection.map
    assert [tuple(maps.shape) for maps in selection.maps] == [(1, 4, 6), (3, 2, 2)]
    assert len(selection.boxes) == 2
    assert selection.overlay(1).size == (96, 64)
    with pytest.raises(InputError, match="image is 2, but this attribution holds 2 pictures"):
        selection.overlay(2)


def test_without_evidence_and_pictures() -> None:
    selection = make_attribution(evidence=False, pictures=False)["red"]
    assert selection.score is None
    with pytest.raises(InputError, match="made without; pass image="):
        _ = selection.box


def test_tokens_that_share_characters_are_all_selected() -> None:
    why = make_attribution(("see", " ", "é", "é"))
    why = dataclasses.replace(why, response="see é", spans=((0, 3), (3, 4), (4, 5), (4, 5)))
    assert why["é"].targets == ((2, 3),)
