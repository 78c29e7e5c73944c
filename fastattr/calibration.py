"""How far a threshold on evidence can be trusted: measured on words of known truth, kept beside the model.

A word whose evidence is below the threshold is marked. Two shares say how good that mark is: how many invented words
it catches, and how many true words it marks by mistake. What share of the marked words is invented (the precision) is
not stated: it depends on how often a model invents, which words of known truth do not tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastattr.errors import InputError

_Z = 1.959964  # standard deviations of a normal distribution that hold 95 % of it


@dataclass(frozen=True)
class Share:
    """A share of words in [0, 1] and its 95 % interval.

    The interval takes words to be independent. Words about one picture are not quite, so it is somewhat too narrow.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


@dataclass(frozen=True)
class Calibration:
    """A threshold on the evidence of words, and what it did to words of known truth.

    Attributes:
        threshold_nats: a word is marked when its evidence, summed over its tokens, is below this.
        n_true, n_false: how many true and how many invented words were judged, at least one of each.
        true_marked, false_marked: how many of them are marked.
        words: what sort of words these were, for example `colour, shape, size and place words`; the shares hold for
            such words alone.
        dataset: where the words came from.
        model: the name of the model that was judged.

    Raises:
        InputError: a field is of the wrong kind, or the numbers contradict each other.
    """

    threshold_nats: float
    n_true: int
    n_false: int
    true_marked: int
    false_marked: int
    words: str
    dataset: str
    model: str

    def __post_init__(self) -> None:
        threshold = self.threshold_nats
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise InputError(f"threshold_nats is {threshold!r}, expected a finite number of nats")
        for kind, n, marked in (("true", self.n_true, self.true_marked), ("false", self.n_false, self.false_marked)):
            if not _is_count(n) or n < 1:
                raise InputError(f"n_{kind} is {n!r}, expected a whole number of words of at least 1")
            if not _is_count(marked) or not 0 <= marked <= n:
                raise InputError(f"{kind}_marked is {marked!r}, expected a whole number from 0 to n_{kind} = {n}")
        for name in ("words", "dataset", "model"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name} is {text!r}, expected some text")

    @property
    def false_alarms(self) -> Share:
        """The share of true words that is marked."""
        return _wilson(self.true_marked, self.n_true)

    @property
    def caught(self) -> Share:
        """The share of invented words that is marked."""
        return _wilson(self.false_marked, self.n_false)

    def __str__(self) -> str:
        shown = round(self.threshold_nats, 2) + 0.0  # no -0.00
        return (
            f"evidence below {shown:.2f} nats: on {self.n_true + self.n_false:,} {self.words} of "
            f"{self.dataset}, {self.caught} of invented words and {self.false_alarms} of true words are marked"
        )


def calibrate(
    evidence: np.ndarray, true: np.ndarray, *, words: str, dataset: str, model: str, false_alarms: float = 0.05
) -> Calibration:
    """The largest threshold, in whole hundredths of a nat, that marks at most a given share of the true words.

    Evidence is a difference of two log-probabilities; below a hundredth it is their rounding. Where the text leaves no
    choice it is 0 but for that, and a threshold in between would mark words by chance.
    Words that tie with the threshold are not marked, so that where many true words tie, fewer are marked than allowed.

    Args:
        evidence: `[word]` in nats, summed over the tokens of each word.
        true: bool `[word]`; False for an invented word.
        words, dataset, model: see `Calibration`.
        false_alarms: the largest share of the true words that may be marked, in [0, 1).

    Raises:
        InputError: the arrays do not fit, evidence is not finite, true or invented words are missing, or
            `false_alarms` is out of range.
    """
    evidence, true = np.asarray(evidence, np.float64), np.asarray(true)
    if true.dtype != np.bool_ or evidence.ndim != 1 or evidence.shape != true.shape:
        raise InputError(
            f"got evidence of shape {evidence.shape} and true of {true.dtype} {true.shape}, expected numbers and bool, "
            "both [word]"
        )
    n_bad = int((~np.isfinite(evidence)).sum())
    if n_bad:
        raise InputError(f"{n_bad} of {evidence.size} words have evidence that is not finite, expected nats")
    if not 0 <= false_alarms < 1:
        raise InputError(f"false_alarms is {false_alarms!r}, expected a share from 0 to below 1")
    known, invented = np.sort(evidence[true]), evidence[~true]
    if not known.size or not invented.size:
        raise InputError(
            f"got {known.size} true and {invented.size} invented words, expected some of both: a threshold is judged "
            "by what it does to each"
        )
    allowed = int(np.searchsorted(np.arange(1, len(known) + 1) / len(known), false_alarms, side="right"))
    # the lowest that must stay unmarked, down to whole hundredths
    threshold = math.floor(known[allowed] * 100 + 1e-9) / 100
    return Calibration(
        float(threshold),
        n_true=len(known),
        n_false=len(invented),
        true_marked=int((known < threshold).sum()),
        false_marked=int((invented < threshold).sum()),
        words=words,
        dataset=dataset,
        model=model,
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wilson(hits: int, n: int) -> Share:
    """The score interval of a share (Wilson 1927), which stays within [0, 1] and is right for shares near its ends."""
    share, extra = hits / n, _Z**2 / n
    center = (share + extra / 2) / (1 + extra)
    reach = math.sqrt(extra * (share * (1 - share) + extra / 4)) / (1 + extra)
    return Share(share, max(0.0, center - reach), min(1.0, center + reach))
