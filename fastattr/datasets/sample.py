"""What is judged: a picture, a question, and which words of an answer name something that can be pointed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Mention:
    """A word of a response that names something.

    Attributes:
        span: half-open range of characters of the response.
        mask: bool `[H W]` of the sample's picture, where the thing is; None where there is nothing to point at: a size, a
            place, an invention. Such words are judged for truth alone.
        kind: what sort of word it is, for example `color`, `shape` or `noun`.
        true: whether the picture bears the word out; a false one is an invention.
    """

    span: tuple[int, int]
    mask: np.ndarray | None
    kind: str
    true: bool


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture and question.

    Attributes:
        id: unique in its dataset.
        prompt: the user's text.
        response: what the model is made to say; None lets it answer.
        mentions: from a response to the words in it that name something, in reading order.
        functions: from a response to the characters of each of its function words, which name nothing, as half-open
            ranges in reading order.
    """

    id: str
    image: Image.Image
    prompt: str
    response: str | None
    mentions: Callable[[str], tuple[Mention, ...]]
    functions: Callable[[str], tuple[tuple[int, int], ...]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples by id, read one at a time.

    Attributes:
        name: for tables.
        ids: in a fixed order.
        read: from an id to its sample; raises `DatasetError` that names the file and what is wrong with it.
        content: from an id to a digest of everything `read` uses; it changes with the picture, mask or caption. Empty where
            the id alone determines the sample, as for drawn scenes.
        n_litter: number of files of macOS or Windows in its folders (`._x`, `.DS_Store`), which are skipped.
    """

    name: str
    ids: tuple[str, ...]
    read: Callable[[str], Sample]
    content: Callable[[str], str] = lambda id: ""
    n_litter: int = 0
