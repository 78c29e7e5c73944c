"""The bundled scenes as datasets: described truly, falsely, with an object erased, or too small to be seen well."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice

import numpy as np
from PIL import Image

from fastattr.datasets.sample import Dataset, Mention, Sample
from fastattr.datasets.words import function_spans
from fastattr.demo.falsify import ContentWord, content_words, falsify
from fastattr.demo.scenes import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    describe,
    erase,
    make_scene,
)
from fastattr.errors import DatasetError

DEFAULT_SAMPLES = 300
FUNCTION_WORDS = frozenset(("a", "the", "is", "at", "in", "there", "on"))
SMALL = 48  # pixels a side: `shapes`, which is used to 96, sees half of that in each direction

_SKETCH = 12  # pixels a side, quick to draw: a power of two times less than a scene, so that the objects are equal
_POINTED_AT = ("color", "shape")  # a size or a place is nowhere in the picture
_SENTENCE = re.compile(
    rf"\bA (?:{'|'.join(SIZES)}) (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}) is (?:at|in) the (?:{'|'.join(PLACES)})\."
)

_Match = tuple[int, tuple[int, ...], tuple[int | None, ...]]  # words right in all, of each sentence, and the objects


def open_scenes(name: str, n: int | None = None, prompt: str | None = None) -> Dataset:
    """Held-out scenes in the order of their seeds.

    Args:
        name: one of `SCENES`.
        n: how many samples; `DEFAULT_SAMPLES` when None.
        prompt: instead of `Describe the image.`
    """
    ids, read_scene = SCENES[name]

    def read(id: str) -> Sample:
        scene, response = read_scene(id)
        return Sample(
            id,
            scene.image,
            prompt or describe(scene).prompt,
            response,
            partial(scene_mentions, scene),
            partial(function_spans, words=FUNCTION_WORDS),
        )

    return Dataset(name, tuple(islice(ids(), n or DEFAULT_SAMPLES)), read)


def scene_mentions(scene: Scene, response: str) -> tuple[Mention, ...]:
    """The words of every sentence like `A large red circle is at the top left.`, judged by the scene.

    Sentences are matched with objects one to one, so that the number of right words is largest; where that leaves a
    choice, as for a repeated sentence, earlier sentences come first. A word is true if its sentence's object has it, and
    a place word if it is among the words of the object's place. A sentence without an object is false in every word.
    Other text says nothing.
    """
    sentences = [(match.start(), content_words(match.group())) for match in _SENTENCE.finditer(response)]
    right = [[sum(_has(item, word) for word in words) for item in scene.objects] for _, words in sentences]
    mentions = []
    for (start, words), k in zip(sentences, match_sentences(right), strict=True):
        for word in words:
            true = k is not None and _has(scene.objects[k], word)
            mask = scene.masks[k] if true and word.kind in _POINTED_AT else None
            mentions.append(Mention((start + word.span[0], start + word.span[1]), mask, word.kind, true))
    return tuple(mentions)


def match_sentences(right: Sequence[Sequence[int]]) -> tuple[int | None, ...]:
    """The object of each sentence, or None: one to one, with the largest sum of right words.

    Args:
        right: `[sentence object]`, how many words of a sentence are true of an object.
    """
    best: dict[frozenset[int], _Match] = {frozenset(): (0, (), ())}  # by the objects that are taken
    for row in right:
        grown = {taken: (total, (*words, 0), (*chosen, None)) for taken, (total, words, chosen) in best.items()}
        for taken, (total, words, chosen) in best.items():
            for k, n in enumerate(row):
                new, now = (total + n, (*words, n), (*chosen, k)), taken | {k}
                if k not in taken and (now not in grown or new[:2] > grown[now][:2]):
                    grown[now] = new
        best = grown
    return max(best.values(), key=lambda match: match[:2])[2]


def _has(item: SceneObject, word: ContentWord) -> bool:
    return word.text in getattr(item, word.kind).split()


# --- which scenes there are, and what is said about them --------------------------------------------


def _true_ids() -> Iterator[str]:
    return map(str, count(HELD_OUT))


def _false_ids() -> Iterator[str]:
    return (f"{seed}:{said.false.kind}" for seed in count(HELD_OUT) for said in falsify(make_scene(seed, _SKETCH)))


def _erased_ids() -> Iterator[str]:
    return (str(seed) for seed in count(HELD_OUT) if len(make_scene(seed, _SKETCH).objects) > 1)


def _scene(id: str) -> Scene:
    if not id.isdecimal():
        raise DatasetError(f"there is no scene {id!r}, expected a seed, for example {HELD_OUT}")
    return make_scene(int(id))


def _described(id: str) -> tuple[Scene, str]:
    scene = _scene(id)
    return scene, describe(scene).response


def _falsified(id: str) -> tuple[Scene, str]:
    seed, _, kind = id.partition(":")
    scene = _scene(seed)
    said = {statement.false.kind: statement.response for statement in falsify(scene)}
    if kind not in said:
        raise DatasetError(
            f"there is no false statement {id!r}; those about scene {seed} are of kind {', '.join(said)}"
        )
    return scene, said[kind]


def _erased(id: str) -> tuple[Scene, str]:
    scene = _scene(id)
    k = int(np.random.default_rng(scene.seed).integers(len(scene.objects)))
    return erase(scene, k), describe(scene).response


def _small(id: str) -> tuple[Scene, None]:
    scene = _scene(id)
    times = scene.image.width // SMALL
    shares = scene.masks.reshape(-1, SMALL, times, SMALL, times).mean(axis=(2, 4))
    picture = scene.image.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
    return replace(scene, image=picture, masks=shares >= 0.5), None


SCENES: dict[str, tuple[Callable[[], Iterator[str]], Callable[[str], tuple[Scene, str | None]]]] = {
    "scenes": (_true_ids, _described),  # every object, truly
    "scenes-false": (_false_ids, _falsified),  # one word is false, see `falsify`
    "scenes-erased": (_erased_ids, _erased),  # one sentence is about an object that has been erased from the picture
    "scenes-small": (_true_ids, _small),  # the model answers by itself and errs
}
