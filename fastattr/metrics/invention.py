"""Does a score tell invented words from true ones, and how sure is that?

`labels` are True for the words that should score *higher*: with evidence or log-probability, the true words. To rank
the invented words first, as average precision wants it, negate the score and the labels. Position confounds such
scores (later words are more certain), so `auroc_within` compares only words of one bin. Words of one scene are not
independent, so intervals come from drawing whole scenes.

Nothing here is ever NaN: a score that is not a number, or words that give no pair to compare, raise `InputError`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastattr.errors import InputError
from fastattr.metrics.bootstrap import Interval

SURPRISE_FLOOR_NATS = 0.01  # least surprise of a blanked image in `combine`, which divides by it


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of the pairs (True word, False word) in which the True word scores higher; a tie counts half.

    This is the area under the ROC curve (Hanley and McNeil 1982).

    Args:
        scores: `[word]`, infinities allowed.
        labels: bool `[word]`.

    Raises:
        InputError: the arrays do not fit, a score is NaN, or a class is empty.
    """
    return auroc_within(scores, labels, np.zeros(np.shape(scores), int))


def auroc_within(scores: np.ndarray, labels: np.ndarray, bins: np.ndarray) -> float:
    """AUROC over the pairs of words that share a bin: every pair counts once, so bins weigh by their pairs.

    Args:
        scores: `[word]`.
        labels: bool `[word]`.
        bins: int `[word]`, for example from `position_bins`; cross them with another grouping by numbering both.

    Raises:
        InputError: the arrays do not fit, a score is NaN, or no bin holds both classes.
    """
    bins = np.asarray(bins)
    scores, labels = _checked(scores, labels, bins=bins)
    wins, pairs = 0.0, 0
    for each in np.unique(bins):
        inside = bins == each
        higher, lower = scores[inside & labels], np.sort(scores[inside & ~labels])
        below = np.searchsorted(lower, higher, "left") + np.searchsorted(lower, higher, "right")
        wins += below.sum() / 2  # what is equal was counted once, what is less twice
        pairs += len(higher) * len(lower)
    if not pairs:
        raise _no_pairs(labels)
    return float(wins / pairs)


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the True words of the precision at the threshold that just lets them in.

    Words with equal scores pass a threshold together, so each of them gets the precision behind the whole tie: the
    order of the words never matters. All scores equal give the share of True words.

    Args:
        scores: `[word]`.
        labels: bool `[word]`.

    Raises:
        InputError: the arrays do not fit, a score is NaN, or a class is empty.
    """
    scores, labels = _checked(scores, labels)
    if labels.all() or not labels.any():
        raise _no_pairs(labels)
    order = np.argsort(scores)[::-1]
    ordered, hits = scores[order], labels[order].cumsum()
    ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)  # the last word of each tie
    gained = np.diff(hits[ends], prepend=0)
    return float((gained * hits[ends] / (ends + 1)).sum() / hits[-1])


@dataclass(frozen=True, eq=False)
class DrawnAuroc:
    """An AUROC and what becomes of it when whole scenes are drawn again: made once, compared with as many as wanted.

    Attributes:
        mean: over all words.
        draws: `[draw]`, NaN in draws without a pair to compare, which say nothing and are left out.
    """

    mean: float
    draws: np.ndarray

    @property
    def interval(self) -> Interval:
        """The AUROC as `mean`, with its 95 % interval. Raises `InputError` when no draw holds a pair."""
        return _interval(self.mean, self.draws)

    def over(self, other: DrawnAuroc) -> Interval:
        """This AUROC less another of the same words and draws. Raises `InputError` when no draw holds a pair."""
        return _interval(self.mean - other.mean, self.draws - other.draws)


def drawn_auroc(
    scores: np.ndarray,
    labels: np.ndarray,
    scenes: np.ndarray,
    bins: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
) -> DrawnAuroc:
    """AUROC (within bins, if given) over all words, and over `n` draws of whole scenes with replacement.

    With wins and pairs counted for each two scenes, a draw that holds scene s `c[s]` times has `c @ wins @ c` wins.

    Args:
        scores: `[word]`.
        labels: bool `[word]`.
        scenes: int `[word]`, the scene each word is about.
        bins: int `[word]`; pairs are compared across all words when None.
        n: number of draws.
        seed: decides the draws; equal seeds give equal draws.

    Raises:
        InputError: the arrays do not fit, a score is NaN, or no bin holds both classes.
    """
    bins = np.zeros(np.shape(scores), int) if bins is None else np.asarray(bins)
    scores, labels = _checked(scores, labels, scenes=scenes, bins=bins)
    if n < 1:
        raise InputError(f"the bootstrap was asked for {n} draws, expected at least 1")
    names, scene = np.unique(scenes, return_inverse=True)
    wins, pairs = np.zeros((2, len(names), len(names)))
    negative = ~labels
    for word in np.flatnonzero(labels):
        rivals = np.flatnonzero(negative & (bins == bins[word]))
        won = ((scores[rivals] < scores[word]) + 1.0 * (scores[rivals] <= scores[word])) / 2
        wins[scene[word]] += np.bincount(scene[rivals], won, len(names))
        pairs[scene[word]] += np.bincount(scene[rivals], minlength=len(names))
    if not pairs.any():
        raise _no_pairs(labels)
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)
    drawn_wins, drawn_pairs = ((counts @ table * counts).sum(axis=1) for table in (wins, pairs))
    drawn = np.where(drawn_pairs > 0, drawn_wins / np.maximum(drawn_pairs, 1), np.nan)
    return DrawnAuroc(float(wins.sum() / pairs.sum()), drawn)


def auroc_interval(
    scores: np.ndarray,
    labels: np.ndarray,
    scenes: np.ndarray,
    bins: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUROC and its 95 % interval; arguments and errors as for `drawn_auroc`, and an error when no draw holds a pair."""
    return drawn_auroc(scores, labels, scenes, bins, n, seed).interval


def auroc_difference(
    a: np.ndarray,
    b: np.ndarray,
    labels: np.ndarray,
    scenes: np.ndarray,
    bins: np.ndarray | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUROC of score `a` minus that of `b` on the same words and draws; otherwise as `auroc_interval`."""
    return drawn_auroc(a, labels, scenes, bins, n, seed).over(drawn_auroc(b, labels, scenes, bins, n, seed))


def combine(evidence: np.ndarray, log_prob: np.ndarray) -> np.ndarray:
    """One score from both, for each word alone and without labels.

    With the image a word's surprise is `s = -log_prob`, with the image blanked it is `b = evidence - log_prob`. The
    score is minus the geometric mean of `s` and of the share of the surprise that the image left, `s / b`. A likely
    word scores near 0; of two equally unlikely words, the one that was likelier without the image scores lower.

    Our own choice, to be judged beside log-probability alone: on the bundled model it gained a little for sentences
    about objects that are not in the picture, by their place words, and lost a little on words the model misread.
    Evidence tells that the image caused a word, not that it was read rightly.

    Args:
        evidence, log_prob: `[word]` in nats, of the same words.

    Returns:
        `[word]`, at most 0, higher for words the image bears out.

    Raises:
        InputError: the arrays do not fit, or a value is not finite.
    """
    evidence, log_prob = np.asarray(evidence, np.float64), np.asarray(log_prob, np.float64)
    _check_scores(evidence, log_prob=log_prob)
    n_bad = int((~np.isfinite(evidence) | ~np.isfinite(log_prob)).sum())
    if n_bad:
        raise InputError(
            f"{n_bad} of {evidence.size} words have evidence or log_prob that is not finite, expected nats"
        )
    return log_prob / np.sqrt(np.maximum(evidence - log_prob, SURPRISE_FLOOR_NATS))


def position_bins(positions: np.ndarray, n_bins: int = 4) -> np.ndarray:
    """Cut positions into at most `n_bins` bins of about equally many words.

    Equal positions share a bin, the later one where they lie on an edge.

    Args:
        positions: `[word]`, for example the index of the word's first token.

    Returns:
        int `[word]` in 0..n_bins-1.

    Raises:
        InputError: no positions, or `n_bins` is below 1.
    """
    positions = np.asarray(positions, np.float64)
    if positions.ndim != 1 or not positions.size or n_bins < 1:
        raise InputError(
            f"position_bins got positions of shape {positions.shape} and n_bins={n_bins}, expected [word] with at "
            "least one word and one bin"
        )
    edges = np.quantile(positions, np.arange(1, n_bins) / n_bins)
    return np.searchsorted(edges, positions, side="right")


def _interval(mean: float, drawn: np.ndarray) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if not known.size:
        raise InputError(
            f"none of {len(drawn)} draws of scenes holds a pair to compare, expected some; give more scenes with "
            "both kinds of words, or more draws"
        )
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def _checked(scores: np.ndarray, labels: np.ndarray, **others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if labels.dtype != np.bool_:
        raise InputError(f"labels are {labels.dtype}, expected bool [word]: True where the score should be higher")
    _check_scores(scores, labels=labels, **others)
    return scores, labels


def _check_scores(scores: np.ndarray, **others: np.ndarray) -> None:
    for name, values in others.items():
        if scores.ndim != 1 or np.shape(values) != scores.shape:
            raise InputError(
                f"got scores of shape {scores.shape} and {name} of shape {np.shape(values)}, expected [word] for both"
            )
    n_nan = int(np.isnan(scores).sum())
    if n_nan:
        raise InputError(f"{n_nan} of {scores.size} scores are NaN, expected numbers; leave those words out and say so")


def _no_pairs(labels: np.ndarray) -> InputError:
    n_true = int(labels.sum())
    return InputError(
        f"got {n_true} words labelled True and {labels.size - n_true} labelled False, expected both kinds (in one "
        "bin): there is no pair to compare; give more words or fewer bins"
    )
