"""What is written down about one sample: plain values, one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastattr.metrics import Plausibility


@dataclass(frozen=True)
class Hiding:
    """What became of a word while patches were hidden, or shown, in one order.

    Attributes:
        order: a method's name, `random`, or `mask`: the object's own patches first.
        word, kind: see `Mention`.
        deletion, insertion: the word's probability at equal steps from no patch to all.
        deletion_auc, insertion_auc: areas under them, in [0, 1].
        sufficiency, necessity: at a tenth of the patches, in nats.
    """

    order: str
    word: str
    kind: str
    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    deletion_auc: float
    insertion_auc: float
    sufficiency: float
    necessity: float


@dataclass(frozen=True)
class Said:
    """A word that names something, and what could tell whether it is true.

    Attributes:
        true: whether the picture bears it out.
        position: index of its first token in the response.
        log_prob, evidence: sums over its tokens, in nats.
        agreement: the least probability of its tokens at any scale, relative to the scale nearest to 1.
        descriptors: for each method, means over its tokens, see `Descriptors`.
    """

    word: str
    kind: str
    true: bool
    position: int
    log_prob: float
    evidence: float
    agreement: float
    descriptors: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Judgement:
    """One sample, judged.

    Attributes:
        id: of the sample.
        response: what was explained.
        n_tokens: its length.
        plausibility: for each method.
        hidings: for each word that was chosen and each order.
        said: every word that names something.
        content: of the sample, see `Dataset.content`; empty in files of earlier versions.
    """

    id: str
    response: str
    n_tokens: int
    plausibility: Mapping[str, Plausibility]
    hidings: tuple[Hiding, ...]
    said: tuple[Said, ...]
    content: str = ""


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be judged, and why."""

    id: str
    reason: str


def to_line(row: Judgement | Skipped) -> str:
    """One line of JSON without its end: four digits of every number, null for what is not one."""
    return json.dumps(_plain(asdict(row)), allow_nan=False, separators=(",", ":"))


def from_line(line: str) -> Judgement | Skipped:
    """What `to_line` wrote."""
    row = json.loads(line)
    if "reason" in row:
        return Skipped(**row)
    plausibility = {
        name: Plausibility(
            **dict[str, Any]((key, math.nan if value is None else value) for key, value in scores.items())
        )
        for name, scores in row.pop("plausibility").items()
    }
    hidings = tuple(
        Hiding(**{**each, "deletion": tuple(each["deletion"]), "insertion": tuple(each["insertion"])})
        for each in row.pop("hidings")
    )
    said = tuple(Said(**each) for each in row.pop("said"))
    return Judgement(**row, plausibility=plausibility, hidings=hidings, said=said)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
