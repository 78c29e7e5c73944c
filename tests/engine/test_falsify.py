"""A false statement is false in one word, judged by reading it against the scene's objects."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.demo import falsify, scenes

SEEDS = st.integers(0, 2**31)
SENTENCE = re.compile(r"A (\w+) (\w+) (\w+) is (?:at|in) the ([\w ]+)\.")


def claims(text: str) -> list[tuple[str, str, str, str]]:
    """Size, colour, shape and place of every sentence; the text holds nothing else."""
    assert SENTENCE.sub("", text).strip() == ""
    return [tuple(match.groups()) for match in SENTENCE.finditer(text)]  # type: ignore[misc]


@given(SEEDS, st.integers(0, 100))
def test_exactly_one_word_differs_and_makes_one_sentence_false(scene_seed: int, seed: int) -> None:
    scene = scenes.make_scene(scene_seed, 48)
    truth = scenes.describe(scene).response
    facts = {(item.size, item.color, item.shape, item.place) for item in scene.objects}
    for statement in falsify.falsify(scene, seed):
        old, new = re.findall(r"\w+|\W", truth), re.findall(r"\w+|\W", statement.response)
        assert len(old) == len(new)
        ((was, now),) = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        start, stop = statement.false.span
        assert statement.response[start:stop] == statement.false.text == now
        assert {was, now} <= scenes.CONTENT_WORDS[statement.false.kind]

        wrong = [claim for claim in claims(statement.response) if claim not in facts]
        assert len(wrong) == 1
        assert len(claims(statement.response)) == len(scene.objects)
        size, color, shape, place = wrong[0]
        fits = {
            "color": any(item.color == color for item in scene.objects),
            "shape": any(item.shape == shape for item in scene.objects),
            "size": any(item.size == size for item in scene.objects),
            "place": any((item.color, item.shape, item.place) == (color, shape, place) for item in scene.objects),
        }
        assert not fits[statement.false.kind]


@given(SEEDS)
def test_the_words_that_stay_are_those_of_the_true_description(scene_seed: int) -> None:
    scene = scenes.make_scene(scene_seed, 48)
    expected = Counter(
        word for item in scene.objects for word in (item.size, item.color, item.shape, *item.place.split())
    )
    for statement in falsify.falsify(scene):
        kept = Counter(word.text for word in statement.true)
        assert kept <= expected
        assert (expected - kept).total() == 1
        for word in statement.true:
            assert statement.response[slice(*word.span)] == word.text
            assert word.text in scenes.CONTENT_WORDS[word.kind]
        assert statement.false.span not in {word.span for word in statement.true}


def test_every_kind_is_made_false_and_only_for_want_of_a_word_left_out() -> None:
    for seed in range(60):
        scene = scenes.make_scene(seed, 48)
        kinds = [statement.false.kind for statement in falsify.falsify(scene)]
        possible = {
            "color": True,  # eight colours, at most four objects
            "shape": True,
            "size": len({item.size for item in scene.objects}) == 1,
            "place": any(item.place != "center" for item in scene.objects),
        }
        assert kinds == [kind for kind in falsify.KINDS if possible[kind]]


def test_seeds_decide_and_differ() -> None:
    scene = scenes.make_scene(5, 48, n_objects=3)
    assert falsify.falsify(scene, 1) == falsify.falsify(scene, 1)
    assert len({statement.response for seed in range(20) for statement in falsify.falsify(scene, seed)}) > 20


@given(SEEDS, st.integers(0, 100))
def test_a_yes_is_given_to_what_is_not_there(scene_seed: int, seed: int) -> None:
    scene = scenes.make_scene(scene_seed, 48)
    statement = falsify.affirm_absent(scene, seed)
    found = re.fullmatch(r"Is there a (\w+) (\w+)\?", statement.prompt)
    assert found is not None
    assert (found[1] in scenes.COLORS, found[2] in scenes.SHAPES) == (True, True)
    assert all((item.color, item.shape) != (found[1], found[2]) for item in scene.objects)
    assert statement.response == f"Yes, there is a {found[1]} {found[2]}."
    assert statement.response[slice(*statement.false.span)] == statement.false.text == "Yes"
    assert statement.true == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A small red circle is at the top left.", ["small", "red", "circle", "top", "left"]),
        ("The background is brown.", ["brown"]),
        ("No, there is no such thing.", []),
        ("It is leftover, starry and bored.", []),  # words, not parts of words
    ],
)
def test_content_words_are_whole_words(text: str, expected: list[str]) -> None:
    assert [word.text for word in falsify.content_words(text)] == expected
