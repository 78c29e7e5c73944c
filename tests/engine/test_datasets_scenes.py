"""What the bundled scenes say is judged as they were made: which word is false is known before it is asked."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.datasets import Mention, open_dataset
from fastattr.datasets.scenes import SCENES, SMALL, match_sentences, open_scenes, scene_mentions
from fastattr.demo.falsify import content_words, falsify
from fastattr.demo.scenes import COLORS, HELD_OUT, PLACES, SHAPES, SIZES, Scene, describe, erase, make_scene
from fastattr.errors import DatasetError

SEEDS = st.integers(0, 2**31)
SENTENCES = st.builds(
    "A {} {} {} is at the {}.".format,
    *(st.sampled_from(list(values)) for values in (SIZES, COLORS, SHAPES, PLACES)),
)


def texts(response: str, mentions: tuple[Mention, ...], true: bool) -> list[str]:
    return [response[slice(*each.span)] for each in mentions if each.true is true]


def check_masks(scene: Scene, response: str, mentions: tuple[Mention, ...]) -> None:
    """A true colour or shape points at an object that has it; nothing else points anywhere."""
    for mention in mentions:
        word = response[slice(*mention.span)]
        if mention.true and mention.kind in ("color", "shape"):
            (k,) = [k for k, mask in enumerate(scene.masks) if np.array_equal(mask, mention.mask)]
            assert getattr(scene.objects[k], mention.kind) == word
        else:
            assert mention.mask is None


@given(SEEDS)
def test_a_true_description_is_true_in_every_word(seed: int) -> None:
    scene = make_scene(seed, 48)
    response = describe(scene).response
    mentions = scene_mentions(scene, response)
    assert texts(response, mentions, True) == [word.text for word in content_words(response)]
    assert [mention.kind for mention in mentions] == [word.kind for word in content_words(response)]
    pointing = [mention.mask for mention in mentions if mention.mask is not None]
    np.testing.assert_array_equal(pointing, scene.masks.repeat(2, axis=0))  # colour and shape of each, in order


@given(SEEDS, st.integers(0, 100))
def test_a_false_statement_is_false_in_its_word(scene_seed: int, seed: int) -> None:
    scene = make_scene(scene_seed, 48)
    for statement in falsify(scene, seed):
        mentions = scene_mentions(scene, statement.response)
        assert [mention.span for mention in mentions if not mention.true] == [statement.false.span]
        assert [mention.span for mention in mentions if mention.true] == [word.span for word in statement.true]
        check_masks(scene, statement.response, mentions)


@given(SEEDS, st.sampled_from([2, 3, 4]), st.data())
def test_the_words_about_an_erased_object_are_false(seed: int, n_objects: int, data: st.DataObject) -> None:
    scene = make_scene(seed, 48, n_objects=n_objects)
    k = data.draw(st.integers(0, len(scene.objects) - 1))
    response = describe(scene).response
    mentions = scene_mentions(erase(scene, k), response)
    sentences = [f"{sentence}." for sentence in response.rstrip(".").split(". ")]
    start = response.index(sentences[k])
    about = [mention for mention in mentions if start <= mention.span[0] < start + len(sentences[k])]
    assert len(about) == len(content_words(sentences[k]))
    assert [mention for mention in mentions if not mention.true] == about
    check_masks(erase(scene, k), response, mentions)


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 5), min_size=n, max_size=n), min_size=0, max_size=5)
    )
)
def test_sentences_are_matched_so_that_most_words_are_right(right: list[list[int]]) -> None:
    slots = [*range(len(right[0]) if right else 0), *[None] * len(right)]
    gains = {
        order: [0 if k is None else row[k] for row, k in zip(right, order, strict=True)]
        for order in set(permutations(slots, len(right)))
    }
    chosen = match_sentences(right)
    assert chosen in gains  # one to one
    assert (sum(gains[chosen]), gains[chosen]) == max((sum(words), words) for words in gains.values())


@given(SEEDS, st.lists(SENTENCES, max_size=12))
def test_any_sentences_are_judged_word_by_word(seed: int, said: list[str]) -> None:
    scene = make_scene(seed, 48)
    response = " ".join(said)
    mentions = scene_mentions(scene, response)
    assert [mention.span for mention in mentions] == [word.span for word in content_words(response)]
    check_masks(scene, response, mentions)


def test_how_an_answer_is_judged() -> None:
    scene = make_scene(HELD_OUT + 2)
    assert [(item.full_name, item.place) for item in scene.objects] == [
        ("small blue heart", "top"),
        ("large green heart", "bottom left"),
        ("small pink triangle", "bottom"),
        ("large green triangle", "bottom right"),
    ]
    cases = {
        "A small pink triangle is at the bottom. A small blue heart is at the top.": [],  # in any order
        # said again, it can only be about another object: the green heart
        "A small blue heart is at the top. A small blue heart is at the top.": ["small", "blue", "top"],
        "A large green triangle is at the bottom right. " * 2: ["triangle", "right"],
        "A small blue heart is at the top left.": ["left"],
        "A large red star is in the center.": ["red", "star", "center"],
        "A large green heart is at the right. A large green heart is at the left.": ["heart"],
        "A small blue heart is at the top": None,  # unfinished
        "A blue heart is at the top. Blue, small, heart.": None,  # no such sentences
    }
    for response, false in cases.items():
        mentions = scene_mentions(scene, response)
        assert (texts(response, mentions, False) if mentions else None) == false, response


def test_a_repeated_sentence_is_true_once() -> None:
    scene = make_scene(HELD_OUT, 48, n_objects=1)
    response = f"{describe(scene).response} {describe(scene).response}"
    mentions = scene_mentions(scene, response)
    assert [mention.true for mention in mentions] == [True] * (len(mentions) // 2) + [False] * (len(mentions) // 2)


# --- the datasets --------------------------------------------------------------------------------------------


def test_ids_are_held_out_seeds_in_order() -> None:
    assert open_dataset("scenes", n=3).ids == tuple(str(HELD_OUT + k) for k in range(3))
    assert open_dataset("scenes-small", n=3).ids == open_dataset("scenes", n=3).ids
    assert {len(open_dataset(name).ids) for name in SCENES} == {300}
    seeds = range(HELD_OUT, HELD_OUT + 40)
    scenes = {seed: make_scene(seed) for seed in seeds}
    two = [str(seed) for seed in seeds if len(scenes[seed].objects) > 1]
    assert open_dataset("scenes-erased", n=len(two)).ids == tuple(two)
    statements = [f"{seed}:{each.false.kind}" for seed in seeds for each in falsify(scenes[seed])]
    assert open_dataset("scenes-false", n=len(statements)).ids == tuple(statements)


@given(SEEDS)
def test_a_sketch_has_the_objects_of_the_scene(seed: int) -> None:
    assert make_scene(seed, 12).objects == make_scene(seed).objects


@pytest.mark.parametrize("name", SCENES)
def test_samples_are_what_their_names_say(name: str) -> None:
    dataset = open_scenes(name, n=12)
    assert dataset.name == name
    for id in dataset.ids:
        sample, again = dataset.read(id), open_scenes(name, n=1).read(id)
        assert np.array_equal(np.asarray(sample.image), np.asarray(again.image))
        assert (sample.id, sample.prompt, sample.response) == (id, "Describe the image.", again.response)
        scene = make_scene(int(id.split(":")[0]))
        truth = describe(scene).response
        response = truth if sample.response is None else sample.response
        mentions = sample.mentions(response)
        false = texts(response, mentions, False)
        if name == "scenes":
            assert (sample.image.tobytes(), sample.response) == (scene.image.tobytes(), truth)
            assert false == []
        elif name == "scenes-false":
            assert sample.image.tobytes() == scene.image.tobytes()
            assert [each.kind for each in mentions if not each.true] == [id.split(":")[1]]
            assert len(false) == 1
        elif name == "scenes-erased":
            assert sample.response == truth
            kept = [k for k in range(len(scene.objects)) if sample.image.tobytes() == erase(scene, k).image.tobytes()]
            assert len(kept) == 1
            assert false == [word.text for word in content_words(truth.split(".")[kept[0]])]
        else:
            assert sample.response is None
            assert sample.image.size == (SMALL, SMALL)
            assert false == []
        assert all(each.mask is None or each.mask.shape == sample.image.size[::-1] for each in mentions)
        words = [response[slice(*span)] for span in sample.functions(response)]
        assert words == [word for word in response.replace(".", "").split() if word in ("A", "is", "at", "in", "the")]


def test_a_small_picture_is_the_scene_from_further_away() -> None:
    for k in range(8):
        scene = make_scene(HELD_OUT + k)
        sample = open_scenes("scenes-small").read(str(HELD_OUT + k))
        blocks = np.asarray(scene.image, float).reshape(SMALL, 4, SMALL, 4, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(sample.image) - blocks).mean() < 3
        masks = [each.mask for each in sample.mentions(describe(scene).response) if each.kind == "shape"]
        for small, mask in zip(masks, scene.masks, strict=True):
            assert small is not None
            enlarged = small.repeat(4, 0).repeat(4, 1)
            assert (enlarged & mask).sum() / (enlarged | mask).sum() > 0.7


def test_any_object_may_be_the_erased_one() -> None:
    dataset = open_scenes("scenes-erased", n=60)
    erased = set()
    for id in dataset.ids:
        sample = dataset.read(id)
        assert sample.response is not None
        false = next(each for each in sample.mentions(sample.response) if not each.true)
        erased.add((sample.response.count("."), sample.response[: false.span[0]].count(".")))
    assert erased == {(n, k) for n in (2, 3, 4) for k in range(n)}


def test_another_prompt_can_be_asked() -> None:
    assert open_dataset("scenes", n=1, prompt="What is this?").read(str(HELD_OUT)).prompt == "What is this?"


@pytest.mark.parametrize(
    ("name", "id", "message"),
    [
        ("scenes", "x1", "there is no scene 'x1', expected a seed, for example 10000000"),
        (
            "scenes-false",
            "10000000",
            "there is no false statement '10000000'; those about scene 10000000 are of kind col",
        ),
        ("scenes-false", ":color", "there is no scene ''"),
    ],
)
def test_unknown_ids(name: str, id: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_scenes(name, n=1).read(id)
