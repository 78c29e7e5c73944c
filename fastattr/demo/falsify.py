"""Statements about a scene that are false in exactly one word, to ask whether a score notices.

A model made to say them has one word that the picture contradicts, among others that stay true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattr.demo.scenes import COLORS, CONTENT_WORDS, PLACES, SHAPES, SIZES, Scene, SceneObject, describe

KINDS = tuple(CONTENT_WORDS)  # color, shape, size, place

_VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "place": tuple(PLACES)}
_KIND_OF = {word: kind for kind, words in CONTENT_WORDS.items() for word in words}


@dataclass(frozen=True)
class ContentWord:
    """A word of a text that says something about the picture.

    Attributes:
        kind: `color`, `shape`, `size` or `place`; `answer` for the Yes of an answer.
        span: half-open range of characters.
    """

    text: str
    kind: str
    span: tuple[int, int]


@dataclass(frozen=True)
class FalseStatement:
    """A forced response with one false word.

    Attributes:
        prompt, response: what to force on the model.
        false: the false word; its `kind` is that of the statement.
        true: the other content words, in order; the picture bears them out.
    """

    prompt: str
    response: str
    false: ContentWord
    true: tuple[ContentWord, ...]


def content_words(text: str) -> tuple[ContentWord, ...]:
    """The colour, shape, size and place words of a text, in order; `top left` is two words."""
    return tuple(
        ContentWord(match.group(), _KIND_OF[match.group()], match.span())
        for match in re.finditer(r"\w+", text)
        if match.group() in _KIND_OF
    )


def falsify(scene: Scene, seed: int = 0) -> tuple[FalseStatement, ...]:
    """The description of a scene with one word made false: one statement for each kind that allows it.

    A false colour, shape or size is one that no object of the scene has, so it is wrong of whatever the sentence
    could be about and from the moment it is said. A false place differs in one word (`top left`, `top right`); it is
    wrong since an object's colour and shape, said before it, are its own. The centre is never put in or taken out:
    that would change `in` and `at` too.

    Args:
        seed: together with the scene's own decides the words.

    Returns:
        at most one for each of `KINDS`, in their order.
    """
    rng = np.random.default_rng([scene.seed, seed])
    prompt, truth = describe(scene).prompt, content_words(describe(scene).response)
    statements = []
    for kind in KINDS:
        lies = _lies(scene.objects, kind)
        if not lies:
            continue
        response = describe(replace(scene, objects=lies[int(rng.integers(len(lies)))])).response
        said = content_words(response)
        changed = [k for k, (old, new) in enumerate(zip(truth, said, strict=True)) if old.text != new.text]
        (k,) = changed
        statements.append(FalseStatement(prompt, response, said[k], (*said[:k], *said[k + 1 :])))
    return tuple(statements)


def affirm_absent(scene: Scene, seed: int = 0) -> FalseStatement:
    """A Yes to the question whether an object is there that is not.

    The false word is the Yes; what follows names the absent object, so that no word stays true.

    Args:
        seed: together with the scene's own decides the object.
    """
    rng = np.random.default_rng([scene.seed, seed])
    present = {item.name for item in scene.objects}
    absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in present]
    name = absent[int(rng.integers(len(absent)))]
    return FalseStatement(
        f"Is there a {name}?", f"Yes, there is a {name}.", ContentWord("Yes", "answer", (0, len("Yes"))), ()
    )


def _lies(objects: tuple[SceneObject, ...], kind: str) -> list[tuple[SceneObject, ...]]:
    """Every way to get one object wrong in one word of this kind."""
    taken = {getattr(item, kind) for item in objects}
    lies = []
    for k, item in enumerate(objects):
        for value in _VALUES[kind]:
            false = _one_word_off(item.place, value) if kind == "place" else value not in taken
            if false:
                change: dict[str, Any] = {kind: value}
                lies.append((*objects[:k], replace(item, **change), *objects[k + 1 :]))
    return lies


def _one_word_off(place: str, other: str) -> bool:
    a, b = place.split(), other.split()
    return "center" not in (place, other) and len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
