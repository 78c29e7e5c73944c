"""Words, phrases and patterns of a response, with the map, box and score of what they select."""

from __future__ import annotations

import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex, TypeVar

import numpy as np
import regex
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastattr.errors import InputError, PhraseError, TokenIndexError
from fastattr.text import FUNCTION_WORDS, answer_text, said_text
from fastattr.types import Attribution, Box
from fastattr.words import phrase_spans, word_spans

T = TypeVar("T")

MAX_PATTERN_S = 5.0  # that `find` looks for a pattern
BOX_LEVEL = 0.5  # of the peak: the region around it that counts as found
_BOX_SIDE = 512  # pixels; maps are upsampled to at most this for boxes


@dataclass(frozen=True, eq=False)
class Selection:
    """Some tokens of a response.

    Attributes:
        attribution: what they were selected from.
        spans: half-open character ranges in the response, one for each occurrence.
        targets: for each occurrence its token indices.
    """

    attribution: Attribution
    spans: tuple[tuple[int, int], ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def text(self) -> str:
        """The first occurrence as written."""
        start, stop = self.spans[0]
        return self.attribution.response[start:stop]

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """For each image `[t h w]` in [0, 1], the maximum over the selected tokens."""
        chosen = sorted({target for occurrence in self.targets for target in occurrence})
        return tuple(maps[chosen].amax(dim=0) for maps in self.attribution.image)

    @property
    def map(self) -> Tensor:
        """`[t h w]` of the only image. Raises `InputError` if there are several: see `maps`."""
        return _only(self.maps, "map", "maps")

    @property
    def frames(self) -> tuple[int | None, ...]:
        """For each image or video the frame where its map peaks, the one `boxes` and `overlay` are of.

        Counts the frames of `attribution.pictures`; 0 for an image, None where the map is dark. Where several frames
        share a time step of the map, it is the first of them.

        Raises:
            InputError: the attribution was made without pictures.
        """
        pictures = self.attribution.pictures
        if not pictures:
            raise InputError("frames are counted in the pictures, but this attribution was made without; pass image=")
        return tuple(_peak_frame(maps, len(shots)) for maps, shots in zip(self.maps, pictures, strict=True))

    @property
    def frame(self) -> int | None:
        """The frame of the only image or video. Raises `InputError` if there are several: see `frames`."""
        return _only(self.frames, "frame", "frames")

    @property
    def boxes(self) -> tuple[Box | None, ...]:
        """For each image the box around its peak, `(left, top, right, bottom)` in pixels; None where the map is dark.

        Of a video it is the box on the frame where the map peaks, see `frames`.
        """
        sizes = self.attribution.picture_sizes
        if not sizes:
            raise InputError("boxes are in pixels of the pictures, but this attribution was made without; pass image=")
        return tuple(
            peak_box(maps, extent, size)
            for maps, extent, size in zip(self.maps, self.attribution.extents, sizes, strict=True)
        )

    @property
    def box(self) -> Box | None:
        """The box of the only image. Raises `InputError` if there are several: see `boxes`."""
        return _only(self.boxes, "box", "boxes")

    @property
    def score(self) -> float | None:
        """Evidence in nats: how much likelier the image makes these words; the mean over occurrences.

        Positive: seen. Around zero or negative: the words would have been said without the image. None if
        the attribution was made with `evidence=False`.
        """
        evidence = self.attribution.evidence
        if evidence is None:
            return None
        return float(torch.stack([evidence[list(occurrence)].sum() for occurrence in self.targets]).mean())

    def overlay(self, image: int | None = None) -> Image.Image:
        """The picture with the map over it; of a video the frame where the map peaks, see `frames`, or the first.

        Args:
            image: which picture; the one where the map is highest if not given.

        Raises:
            InputError: there is no such picture.
        """
        from fastattr.report import overlay

        pictures = self.attribution.pictures
        if image is None:
            peaks = [float(each.max()) for each in self.maps]
            image = peaks.index(max(peaks))
        if not 0 <= image < len(pictures):
            raise InputError(f"image is {image}, but this attribution holds {len(pictures)} pictures")
        maps = self.maps[image]
        frame = _peak_frame(maps, len(pictures[image])) or 0
        return overlay(pictures[image][frame], maps[peak_step(maps) or 0], self.attribution.extents[image])

    def _repr_html_(self) -> str:
        from fastattr.report import selection_html

        return selection_html(self)

    def _repr_png_(self) -> bytes:
        from fastattr.report import selection_png

        return selection_png(self)

    def __repr__(self) -> str:
        score = self.score
        shown = "" if score is None else f", {score:+.2f} nats"
        return f"Selection({self.text!r}, {len(self.spans)} occurrence{'s' if len(self.spans) > 1 else ''}{shown})"


def select_phrase(attribution: Attribution, phrase: str) -> Selection:
    """Every occurrence of a word or phrase as whole words in any case, see `words.phrase_spans`; also in reasoning.

    Special tokens are not words. In scripts without spaces a phrase is selected wherever it occurs.

    Raises:
        InputError: `phrase` is not a non-empty string.
        PhraseError: it does not occur.
    """
    if not isinstance(phrase, str) or not phrase.strip():
        raise InputError(f"select by a word or phrase of the response, got {phrase!r}")
    text = said_text(attribution)
    spans = phrase_spans(text, phrase)
    if not spans:
        raise PhraseError(_no_phrase(text, phrase))
    return Selection(attribution, spans, token_targets(attribution.spans, spans))


def _no_phrase(text: str, phrase: str) -> str:
    found = f"{phrase!r} is not in the response; its words are: {_words_of(text)}"
    if phrase.casefold() not in text.casefold():
        return found
    return f"{found}; it is part of a word: find({re.escape(phrase)!r}) selects parts of words"


def _words_of(text: str) -> str:
    words = list(dict.fromkeys(text[start:stop] for start, stop in word_spans(text)))
    return ", ".join(words[:40]) + (", ..." if len(words) > 40 else "")


def select_tokens(attribution: Attribution, asked: SupportsIndex | slice) -> Selection:
    """One token, or the tokens of a slice as one occurrence.

    Args:
        asked: an index as of a list, negative ones from the end; or a slice without a step.

    Raises:
        InputError: it is neither.
        TokenIndexError: there is no such token, or the slice is empty.
    """
    n = len(attribution)
    if isinstance(asked, slice):
        if asked.step not in (None, 1):
            raise InputError(f"select adjacent tokens by a slice without a step, got step {asked.step}")
        try:
            first, behind, _ = asked.indices(n)
        except TypeError as error:
            raise InputError(f"select tokens by a slice of whole numbers, got {asked}") from error
        if first >= behind:
            raise TokenIndexError(f"the slice {asked.start}:{asked.stop} of a response of {n} tokens is empty")
    else:
        try:
            index = operator.index(asked)
        except TypeError:
            index = None
        if index is None or isinstance(asked, bool):
            raise InputError(f"select by a word or phrase of the response, or the index of a token, got {asked!r}")
        if not -n <= index < n:
            raise TokenIndexError(f"there is no token {index}: the response has {n}, numbered from 0")
        first = index % n
        behind = first + 1
    span = (attribution.spans[first][0], attribution.spans[behind - 1][1])
    return Selection(attribution, (span,), (tuple(range(first, behind)),))


def select_pattern(attribution: Attribution, pattern: str) -> Selection:
    r"""Every match of a regular expression, for example `\d+`.

    Raises:
        InputError: the pattern does not compile, or takes longer than `MAX_PATTERN_S`.
        PhraseError: nothing matches.
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    try:
        matches = compiled.finditer(attribution.response, timeout=MAX_PATTERN_S)
        spans = tuple(match.span() for match in matches if match.end() > match.start())
    except TimeoutError as error:
        raise InputError(
            f"{pattern!r} takes longer than {MAX_PATTERN_S:g} s on a response of {len(attribution.response)} characters; "
            "write it without a repetition within a repetition"
        ) from error
    if not spans:
        raise PhraseError(
            f"a match of {pattern!r} is not in the response; its words are: {_words_of(said_text(attribution))}"
        )
    return Selection(attribution, spans, token_targets(attribution.spans, spans))


def select_low_evidence(attribution: Attribution) -> tuple[Selection, ...]:
    """Every word whose evidence, summed over its tokens, is below the threshold of the calibration, one by one.

    Without a calibration the threshold is 0 nats: the picture makes the word less likely, not more. Low evidence is no
    proof of invention: what the text before already tells is as likely without the picture.

    Only words of the answer are judged, not special tokens, and not reasoning (`attribution.reasoning`), which weighs
    guesses that the model may drop. English function words are left out; in other languages every word is judged. In
    scripts without spaces a run of letters counts as one word.

    Raises:
        InputError: the attribution was made without evidence.
    """
    evidence = attribution.evidence
    if evidence is None:
        raise InputError(
            "low evidence was asked for, but this attribution was made without evidence; use attribute with evidence=True"
        )
    spans, low = _judge_words(attribution, evidence)
    chosen = [tuple(span) for span in spans[low].tolist()]
    return tuple(
        Selection(attribution, (span,), (targets,))
        for span, targets in zip(chosen, token_targets(attribution.spans, chosen), strict=True)
    )


def count_low_evidence(attribution: Attribution, evidence: Tensor) -> int:
    """How many words `select_low_evidence` selects, for `evidence [target]` in nats."""
    return int(_judge_words(attribution, evidence)[1].sum())


def _judge_words(attribution: Attribution, evidence: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Spans `[word 2]` of all words of the answer but function words, and bool `[word]`, whether their evidence is low."""
    threshold = 0.0 if attribution.calibration is None else attribution.calibration.threshold_nats
    text = answer_text(attribution)
    found = [
        (start, stop)
        for start, stop in word_spans(text)
        if text[start:stop].lower().replace("’", "'") not in FUNCTION_WORDS
    ]
    spans = np.array(found, np.int64).reshape(-1, 2)
    starts, stops = np.array(attribution.spans, np.int64).reshape(-1, 2).T
    first, behind = np.searchsorted(stops, spans[:, 0], "right"), np.searchsorted(starts, spans[:, 1], "left")
    nats = np.append(evidence.double().numpy(), 0.0)  # a word at the end ends behind the last token
    with np.errstate(invalid="ignore"):  # infinities of both signs are no number, and not low
        summed = np.add.reduceat(nats, np.stack([first, behind], axis=1).ravel())[::2] if len(spans) else np.empty(0)
    return spans, np.where(first < behind, summed, 0.0) < threshold


def token_targets(
    token_spans: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """The tokens that share a character with each span; token spans are in reading order."""
    starts, stops = zip(*token_spans, strict=True)
    return tuple(tuple(range(bisect_right(stops, first), bisect_left(starts, last))) for first, last in spans)


def peak_step(maps: Tensor) -> int | None:
    """The time step of `maps [t h w]` that holds their highest value, the first where several do; None if all is dark."""
    peaks = maps.flatten(1).amax(dim=1)
    return int(peaks.argmax()) if float(peaks.max()) > 0 else None


def first_frame(step: int, n_steps: int, n_frames: int) -> int:
    """The first of `n_frames` frames that belongs to a time step of a map: frame f is of step `f * n_steps // n_frames`.

    Models merge frames in time, so a step may stand for several. Where there are fewer frames than steps, it is the frame
    on show at that step.

    >>> [first_frame(step, 3, 5) for step in range(3)]
    [0, 2, 4]
    """
    at = step * n_frames
    return at // n_steps if n_frames < n_steps else -(-at // n_steps)


def _peak_frame(maps: Tensor, n_frames: int) -> int | None:
    step = peak_step(maps)
    return None if step is None else first_frame(step, len(maps), n_frames)


def peak_box(maps: Tensor, extent: Box, size: tuple[int, int]) -> Box | None:
    """The box around the strongest response: pixels of at least `BOX_LEVEL` of the peak, connected to it.

    Args:
        maps: `[t h w]`; the time step with the peak counts, see `peak_step`.
        extent: the part of the picture the grid covers, as shares.
        size: `(height, width)` of the picture in pixels.

    Returns:
        `(left, top, right, bottom)` in pixels of the picture, or None for a map of zeros.
    """
    step = peak_step(maps)
    if step is None:
        return None
    frame = maps[step]
    left, top = extent[0] * size[1], extent[1] * size[0]
    covered_width, covered_height = (extent[2] - extent[0]) * size[1], (extent[3] - extent[1]) * size[0]
    shrink = min(1.0, _BOX_SIDE / max(covered_width, covered_height))
    height = max(frame.shape[0], round(covered_height * shrink))
    width = max(frame.shape[1], round(covered_width * shrink))
    fine = F.interpolate(frame[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]

    row, column = divmod(int(fine.argmax()), width)
    found = _region((fine >= BOX_LEVEL * fine.max()).numpy(), row, column)
    step_x, step_y = covered_width / width, covered_height / height
    return (left + found[0] * step_x, top + found[1] * step_y, left + found[2] * step_x, top + found[3] * step_y)


def _region(inside: np.ndarray, row: int, column: int) -> tuple[int, int, int, int]:
    """The box, `(left, top, right, bottom)`, around the pixels that are connected to one of them by their sides.

    Args:
        inside: bool `[h w]`; true at `(row, column)`.
    """
    steps = np.diff(np.pad(inside, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts = [np.flatnonzero(line > 0).tolist() for line in steps]  # of the runs of each row
    stops = [np.flatnonzero(line < 0).tolist() for line in steps]
    first = (row, bisect_right(stops[row], column))
    found, waiting = {first}, [first]
    while waiting:
        y, run = waiting.pop()
        for near in (y - 1, y + 1):
            if not 0 <= near < len(inside):
                continue
            touching = range(bisect_right(stops[near], starts[y][run]), bisect_left(starts[near], stops[y][run]))
            fresh = {(near, other) for other in touching} - found
            found |= fresh
            waiting.extend(fresh)
    return (
        min(starts[y][run] for y, run in found),
        min(y for y, _ in found),
        max(stops[y][run] for y, run in found),
        max(y for y, _ in found) + 1,
    )


def _only(values: Sequence[T], one: str, many: str) -> T:
    if len(values) != 1:
        raise InputError(f"this attribution holds {len(values)} images; use .{many}[i] instead of .{one}")
    return values[0]
