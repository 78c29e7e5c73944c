"""Results as figures with intervals, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastattr.calibration import Calibration, calibrate
from fastattr.errors import InputError
from fastattr.evaluate.judgement import Hiding, Said
from fastattr.evaluate.judging import MASK, RANDOM
from fastattr.evaluate.running import NAMED_FAULTS, Results
from fastattr.metrics import Interval, difference, paired_bootstrap, pool
from fastattr.metrics.invention import (
    auroc,
    auroc_interval,
    average_precision,
    combine,
    drawn_auroc,
    position_bins,
)

HIDING_SCORES = ("deletion_auc", "insertion_auc", "sufficiency", "necessity")
LOG_PROB, EVIDENCE, POSITION, AGREEMENT = "log-probability", "evidence", "position", "agreement"
COMBINED, COMBINED_WORST = "combined", "combined at the worst scale"
FLOOR = 1e-12  # of agreement, whose logarithm is taken


@dataclass(frozen=True)
class Telling:
    """How well a score tells true words from invented ones.

    Attributes:
        score: its name. An AUROC below a half says that lower values speak for a true word.
        auroc: over all pairs.
        within: AUROC over the pairs of words at like positions, with its interval.
        precision: average precision at finding the invented words.
        over_log_prob: `within` less that of the log-probability, with its interval.
    """

    score: str
    auroc: float
    within: Interval
    precision: float
    over_log_prob: Interval


def summary(results: Results) -> str:
    """Everything as Markdown: what was judged, the methods, the inventions."""
    parts = [counts(results)]
    if has_nouns(results):
        parts.append(methods_table(results))
    if both_kinds(results):
        parts += [invention_table(results), kinds_table(results)]
    return "\n\n".join(parts)


def has_nouns(results: Results) -> bool:
    """Whether any word was judged by masks, without which methods cannot be compared."""
    return any(scores.n_nouns for row in results.judged for scores in row.plausibility.values())


def counts(results: Results) -> str:
    """What was judged and what could not be."""
    first = next(iter(results.header["settings"]["methods"]))
    pooled = pool([row.plausibility[first] for row in results.judged])
    words = sum(hiding.order == MASK for row in results.judged for hiding in row.hidings)
    said = [word for row in results.judged for word in row.said]
    text = (
        f"{results.header['dataset']}, {results.header['model']}: {len(results.judged)} samples, {pooled.n_nouns} nouns and "
        f"{pooled.n_functions} function words judged by masks, {pooled.n_dropped} dropped; {words} words judged by hiding "
        f"patches; {len(said)} words said of the picture, {sum(not word.true for word in said)} of them invented."
    )
    if results.skipped:
        named = "; ".join(f"{row.id}: {row.reason}" for row in results.skipped[:NAMED_FAULTS])
        more = f"; and {len(results.skipped) - NAMED_FAULTS} more" if len(results.skipped) > NAMED_FAULTS else ""
        text += f" Skipped: {len(results.skipped)} ({named}{more})."
    return text


# --- methods ---------------------------------------------------------------------------------------


def baseline_of(methods: Sequence[str]) -> str:
    """What differences are taken to: `tam` where it is among the methods, else the first."""
    return "tam" if "tam" in methods else methods[0]


def methods_table(results: Results) -> str:
    """Plausibility and faithfulness of every method, and the differences to the baseline with their intervals."""
    methods = list(results.header["settings"]["methods"])
    base = baseline_of(methods)
    pooled = {name: pool([row.plausibility[name] for row in results.judged]) for name in methods}
    hidden = any(row.hidings for row in results.judged)
    rows = []
    for name in (RANDOM, *methods, MASK) if hidden else methods:
        scores = pooled.get(name)
        cells = [name]
        for score in ("obj", "func", "f1", "pointing"):
            cells.append("" if scores is None else f"{getattr(scores, score):.3f}")
        if hidden:
            cells += [f"{hiding_mean(results, name, score):.3f}" for score in HIDING_SCORES]
        cells.append("" if scores is None else interval(plausibility_gain(results, name, base)))
        if hidden:
            cells += [interval(hiding_gain(results, name, base, score)) for score in HIDING_SCORES[:2]]
        rows.append(cells)
    head = ["method", "Obj-IoU", "Func-IoU", "F1-IoU", "pointing"]
    if hidden:
        head += ["deletion", "insertion", "sufficiency", "necessity"]
    head.append(f"F1 over {base}")
    if hidden:
        head += [f"deletion over {base}", f"insertion over {base}"]
    return markdown(head, rows)


def plausibility_gain(results: Results, name: str, base: str, score: str = "f1") -> Interval:
    """A pooled plausibility score of one method less that of another."""
    mine, theirs = ([row.plausibility[each] for row in results.judged] for each in (name, base))
    return difference(mine, theirs, score)


def hiding_mean(results: Results, order: str, score: str) -> float:
    """Mean over words of a score of one order of patches."""
    return float(_mean_of_words(_hiding_sums(results, order, score)[None])[0])


def hiding_gain(results: Results, order: str, base: str, score: str) -> Interval:
    """A score of one order less that of another on the same words, scenes drawn again."""
    return paired_bootstrap(
        _hiding_sums(results, order, score), _hiding_sums(results, base, score), statistic=_mean_of_words
    )


def _hiding_sums(results: Results, order: str, score: str) -> np.ndarray:
    """`[sample 2]`: words, and their summed score."""
    return np.array(
        [
            (len(values), sum(values))
            for row in results.judged
            if (values := [getattr(each, score) for each in row.hidings if each.order == order])
        ]
    )


def _mean_of_words(sums: np.ndarray) -> np.ndarray:
    words, total = np.moveaxis(sums.sum(axis=-2), -1, 0)
    return total / words


def mean_curve(results: Results, order: str, curve: Callable[[Hiding], Sequence[float]]) -> np.ndarray:
    """Mean probability along a curve of one order, `[step + 1]`."""
    return np.mean([curve(each) for row in results.judged for each in row.hidings if each.order == order], axis=0)


# --- inventions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Every word said of a picture, as columns.

    Attributes:
        true: bool `[word]`.
        picture: int `[word]`; words of one picture are not independent and are drawn together.
        position: int `[word]`.
        kind: `[word]`.
        scores: by name `[word]`, see `Telling.score`.
    """

    true: np.ndarray
    picture: np.ndarray
    position: np.ndarray
    kind: np.ndarray
    scores: Mapping[str, np.ndarray]

    def of_kind(self, kind: str) -> Words:
        """The words of one kind."""
        keep = self.kind == kind
        scores = {name: values[keep] for name, values in self.scores.items()}
        return Words(self.true[keep], self.picture[keep], self.position[keep], self.kind[keep], scores)


def words_of(results: Results) -> Words:
    """All words said, true and invented, with every score that might tell them apart."""
    said: list[tuple[str, Said]] = [(picture_of(row.id), word) for row in results.judged for word in row.said]
    evidence = np.array([word.evidence for _, word in said])
    log_prob = np.array([word.log_prob for _, word in said])
    position = np.array([word.position for _, word in said])
    agreement = np.array([word.agreement for _, word in said])
    worst = np.log(np.maximum(agreement, FLOOR))  # what the word loses where the model says it least
    scores = {
        LOG_PROB: log_prob,
        EVIDENCE: evidence,
        COMBINED: combine(evidence, log_prob),
        COMBINED_WORST: combine(evidence + worst, log_prob + worst),
        POSITION: position.astype(float),
        AGREEMENT: agreement,
    }
    for method, described in said[0][1].descriptors.items():
        for name in described:
            values = np.array([word.descriptors[method][name] for _, word in said])
            scores[f"{name} ({method})"] = values
    return Words(
        np.array([word.true for _, word in said]),
        np.unique([picture for picture, _ in said], return_inverse=True)[1],
        position,
        np.array([word.kind for _, word in said]),
        scores,
    )


def picture_of(id: str) -> str:
    """Samples of one picture have ids that differ after a colon only."""
    return id.partition(":")[0]


def both_kinds(results: Results) -> bool:
    """Whether some words are true and some invented."""
    return len({word.true for row in results.judged for word in row.said}) == 2


def tellings(words: Words) -> list[Telling]:
    """Every score's power to tell, `words` holding both true and invented ones."""
    bins = position_bins(words.position)
    drawn = {name: drawn_auroc(values, words.true, words.picture, bins) for name, values in words.scores.items()}
    return [
        Telling(
            score=name,
            auroc=auroc(values, words.true),
            within=drawn[name].interval,
            precision=average_precision(-values, ~words.true),
            over_log_prob=drawn[name].over(drawn[LOG_PROB]),
        )
        for name, values in words.scores.items()
    ]


def invention_table(results: Results) -> str:
    """Every score at telling invented words from true ones."""
    return markdown(
        ("score", "AUROC", "within position bins", "average precision", "over log-probability, within bins"),
        (
            (
                each.score,
                f"{each.auroc:.3f}",
                level(each.within),
                f"{each.precision:.3f}",
                interval(each.over_log_prob),
            )
            for each in tellings(words_of(results))
        ),
    )


def kinds_table(results: Results) -> str:
    """The same within position bins for each kind of word, the scores that do not depend on maps."""
    words = words_of(results)
    shown = (POSITION, LOG_PROB, EVIDENCE, COMBINED, AGREEMENT, COMBINED_WORST)
    rows = []
    for kind in sorted(set(words.kind.tolist())):
        mine = words.of_kind(kind)
        if len(set(mine.true.tolist())) < 2:
            continue
        bins = position_bins(mine.position)
        intervals = (auroc_interval(mine.scores[name], mine.true, mine.picture, bins) for name in shown)
        rows.append((kind, f"{int((~mine.true).sum())} of {len(mine.true)}", *map(level, intervals)))
    return markdown(("words", "invented", *shown), rows)


def calibration_of(results: Results) -> Calibration:
    """Where low evidence begins for words like these, see `calibrate`.

    Raises:
        InputError: the results do not hold both true and invented words.
    """
    if not both_kinds(results):
        raise InputError(
            f"{results.header['dataset']} does not hold both true and invented words, so there "
            "is nothing to calibrate with; use a dataset that does, for example scenes-erased"
        )
    words = words_of(results)
    kinds = sorted(set(words.kind.tolist()))
    return calibrate(
        words.scores[EVIDENCE],
        words.true,
        words=f"{' and '.join(filter(None, (', '.join(kinds[:-1]), kinds[-1])))} words",
        dataset=results.header["dataset"],
        model=results.header["model"],
    )


# --- Markdown --------------------------------------------------------------------------------------


def interval(value: Interval) -> str:
    """A difference and its interval."""
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def level(value: Interval) -> str:
    """A figure and its interval."""
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
