"""Words that are judged are found where they were put, in any case and number, and nowhere else."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.datasets import FUNCTION_WORDS, function_spans
from fastattr.datasets.words import english, find_names, noun_mentions
from fastattr.errors import DatasetError

# what may be said, and what is named by it: plurals are those of a dictionary
SAID = [
    ("person", "person"),
    ("People", "person"),
    ("bus", "bus"),
    ("buses", "bus"),
    ("knives", "knife"),
    ("mice", "mouse"),
    ("sheep", "sheep"),
    ("glasses", "glass"),
    ("CHILDREN", "child"),
    ("skis", "skis"),
    ("pair of scissors", "scissors"),
    ("bears", "bear"),
    ("teddy bears", "teddy bear"),
    ("Teddy-bear", "teddy bear"),
    ("teddy\n bear", "teddy bear"),
    ("hot dog", "hot dog"),
    ("dogs", "dog"),
    ("T-shirts", "tshirt"),
    ("tshirt", "tshirt"),
    ("x-ray", "x-ray"),
    ("xray", "x-ray"),
]
NAMES = sorted({name for _, name in SAID})
UNNAMED = ["dogged", "business", "ball", "shirt", "A t-shirty thing", "hot", "glass-bottomed", "the"]


def found(response: str, names: list[str], *, parts: bool = False) -> list[tuple[str, set[str]]]:
    return [(response[slice(*span)], set(said)) for span, said in find_names(response, names, parts=parts)]


@given(st.lists(st.sampled_from([*SAID, *((text, None) for text in UNNAMED)]), max_size=8), st.booleans())
def test_names_are_found_where_they_were_put(said: list[tuple[str, str | None]], parts: bool) -> None:
    response, expected = "", []
    for text, name in said:
        response += ", "
        if name is not None:
            words = text.removeprefix("pair of ")
            start = len(response) + len(text) - len(words)
            expected.append(((start, start + len(words)), frozenset({name})))
        elif parts and text == "hot":
            expected.append(((len(response), len(response) + 3), frozenset({"hot dog"})))
        response += text
    assert find_names(response, NAMES, parts=parts) == tuple(expected)


@pytest.mark.parametrize(
    ("response", "names", "expected"),
    [
        (
            "A stop sign post.",
            ["stop sign", "sign post", "sign"],
            [("stop sign", {"stop sign"})],
        ),  # the first of equals
        ("A bear, teddy, bear.", ["teddy bear"], []),
        ("The man men.", ["man"], [("man men", {"man"})]),
        ("The man, men.", ["man"], [("man", {"man"}), ("men", {"man"})]),
        ("The man's dog.", ["man", "dog"], [("man", {"man"}), ("dog", {"dog"})]),
        ("A man's red hat.", ["man's red hat", "hat"], [("man's red hat", {"man's red hat"})]),
        ("Bottles of water.", ["bottle of water"], [("Bottles of water", {"bottle of water"})]),
        ("A Dog.", ["dog", "DOG"], [("Dog", {"dog", "DOG"})]),
        ("", ["dog"], []),
        ("A dog.", [], []),
    ],
)
def test_names(response: str, names: list[str], expected: list[tuple[str, set[str]]]) -> None:
    assert found(response, names) == expected


@pytest.mark.parametrize(
    ("response", "names", "expected"),
    [
        ("A baseball.", ["baseball bat", "baseball glove"], [("baseball", {"baseball bat", "baseball glove"})]),
        ("A baseball glove.", ["baseball bat", "baseball glove"], [("baseball glove", {"baseball glove"})]),
        ("Bears.", ["bear", "teddy bear"], [("Bears", {"bear"})]),  # a whole name is no part of another
        ("A brick wall.", ["red brick wall"], [("brick wall", {"red brick wall"})]),
        ("A wall of brick.", ["red brick wall"], [("wall", {"red brick wall"}), ("brick", {"red brick wall"})]),
        ("A brick wall.", ["red brick", "red wall"], [("brick", {"red brick"}), ("wall", {"red wall"})]),
        ("Hydrants and the top of a water bottle.", ["fire hydrant", "bottle of the water"],
         [("Hydrants", {"fire hydrant"}), ("water bottle", {"bottle of the water"})]),
    ],
)  # fmt: skip
def test_a_word_of_a_longer_name_may_stand_for_it(
    response: str, names: list[str], expected: list[tuple[str, set[str]]]
) -> None:
    assert found(response, names, parts=True) == expected


def test_a_mention_is_true_where_the_picture_shows_the_thing() -> None:
    bat, glove = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    bat[0, 0] = glove[1, 2] = True
    masks = {"baseball bat": bat, "baseball glove": glove, "ball": None, "ball boy": None}
    response = "Baseball, a glove and two balls."
    both, one, none = noun_mentions(response, masks, parts=True)
    assert [response[slice(*each.span)] for each in (both, one, none)] == ["Baseball", "glove", "balls"]
    assert [each.kind for each in (both, one, none)] == ["noun"] * 3
    assert [each.true for each in (both, one, none)] == [True, True, False]
    assert both.mask is not None and np.array_equal(np.argwhere(both.mask), [[0, 0], [1, 2]])
    assert one.mask is not None and np.array_equal(one.mask, glove)
    assert none.mask is None


@given(
    st.lists(st.tuples(st.sampled_from(["A", "dog", "the", "There", "at", "two", "andy", "and", "it"]), st.booleans()))
)
def test_function_words_are_whole_words_in_any_case(words: list[tuple[str, bool]]) -> None:
    response, expected = "", []
    for word, loud in words:
        response += " "
        if word in ("A", "the", "There", "and", "it"):
            expected.append((len(response), len(response) + len(word)))
        response += word.upper() if loud else word
    assert function_spans(response) == tuple(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It's theirs, isn't there?", ["It", "theirs", "there"]),
        ("An A-frame and a so-and-so", ["An", "and", "a"]),
        ("in on at two of with left", []),  # neither prepositions nor numbers count
        ("Oh, who can or must?", ["Oh", "who", "can", "or", "must"]),
    ],
)
def test_function_words(response: str, expected: list[str]) -> None:
    assert [response[slice(*span)] for span in function_spans(response)] == expected


def test_other_function_words_can_be_asked_for() -> None:
    assert function_spans("The dog is in.", {"is", "in"}) == ((8, 10), (11, 13))
    assert all(word == word.lower() for word in FUNCTION_WORDS)


def test_a_name_needs_a_letter() -> None:
    with pytest.raises(DatasetError, match="a thing is called ' _', expected a name with a letter"):
        find_names("A dog.", ["dog", " _"])


def test_without_inflect_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    english.cache_clear()
    monkeypatch.setitem(sys.modules, "inflect", None)
    with pytest.raises(DatasetError, match=r'needs inflect; in a clone .*: pip install "\.\[eval\]"'):
        english()


def test_a_part_of_a_name_is_no_invention() -> None:
    shown = np.ones((2, 2), bool)
    masks = {"traffic light": None, "couch": shown, "tennis racket": shown, "dog": None}
    found = noun_mentions("A light brown couch, a racket, a dog, traffic lights.", masks, parts=True)
    said = ["A light brown couch, a racket, a dog, traffic lights."[slice(*each.span)] for each in found]
    assert said == ["couch", "racket", "dog", "traffic lights"]
    assert [each.true for each in found] == [True, True, False, False]
