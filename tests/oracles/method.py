"""The whole method once more: slow NumPy in float64, one token at a time.

It follows the papers' definitions word for word (TAM, arXiv 2506.23270; MSEA and ARC, arXiv 2509.22415;
RBO, Webber, Moffat and Zobel 2010) and shares no code with the package. Loops are welcome here: what
matters is that each function can be checked against its formula by eye.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """`softcap * tanh(logit_scale * (weight @ h + bias) / softcap)`; ids from `valid_vocab` on do not exist."""

    weight: Array
    bias: Array | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    def logits(self, state: Array) -> Array:
        """`[vocab]` of one hidden state `[dim]`."""
        value: Array = self.weight @ state
        if self.bias is not None:
            value = value + self.bias
        value = value * self.logit_scale
        if self.softcap is not None:
            value = self.softcap * np.tanh(value / self.softcap)
        return value[: self.valid_vocab]


@dataclass(frozen=True)
class Reading:
    """One pass over prompt and response at one image scale.

    `images` holds `(positions, (t, h, w))`, `prompt` the user-text positions, `response` a half-open range.
    """

    hidden: Array
    ids: Sequence[int]
    images: Sequence[tuple[Sequence[int], tuple[int, int, int]]]
    prompt: Sequence[int]
    response: tuple[int, int]
    scale: float = 1.0

    @property
    def n_targets(self) -> int:
        return self.response[1] - self.response[0]

    def context(self) -> list[tuple[int, int]]:
        """`(id, position where it is read)`: prompt tokens where they stand, response tokens where predicted."""
        prompt = [(int(self.ids[p]), p) for p in self.prompt]
        return prompt + [(int(self.ids[p]), p - 1) for p in range(*self.response)]

    def predictor(self, target: int) -> int:
        return self.response[0] + target - 1


@dataclass(frozen=True)
class Explained:
    image: list[Array]  # one [target t h w] per image
    context: Array  # [target context]
    relevance: Array | None  # [target context]
    log_prob: Array  # [target]
    agreement: Array  # [target scale]
    raw_range: Array  # [target 2]
    residual: Array  # [target], share of the norm left by interference removal, averaged over scales cleaned apart
    degenerate: Array  # [target]


# --- one formula each ----------------------------------------------------------------------------


def activation(head: Head, state: Array, token: int) -> float:
    """`relu(h . W[x])`."""
    return max(0.0, float(head.logits(state)[token]))


def top_k(logits: Array, k: int) -> list[int]:
    """The ids of a full sort: value descending, then id ascending."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:k]


def rank_biased_overlap(left: Sequence[int], right: Sequence[int], p: float) -> float:
    """`(1-p) sum_d p^(d-1) |S[:d] & T[:d]| / d`, with the sets built at every depth."""
    depths = range(1, len(left) + 1)
    return (1 - p) * sum(p ** (d - 1) * len(set(left[:d]) & set(right[:d])) / d for d in depths)


def relevance(left: Sequence[int], right: Sequence[int], p: float) -> float:
    """Overlap relative to that of a ranking with itself."""
    return rank_biased_overlap(left, right, p) / rank_biased_overlap(left, left, p)


def remove_interference(target: Array, context: Iterable[Array], weights: Sequence[float]) -> tuple[Array, float]:
    """`relu(A - lam M)` and `lam`, M the weighted mean of the context maps and lam the least-squares scale."""
    mean = np.zeros_like(target)
    total = sum(weights)
    for other, weight in zip(context, weights, strict=True):
        if weight > 0:
            mean = mean + weight / total * other
    norm = float((mean * mean).sum())
    scale = float((target * mean).sum()) / norm if norm > 0 else 0.0
    return np.maximum(target - scale * mean, 0.0), scale


def bilinear(grid: Array, height: int, width: int) -> Array:
    """`[h w]` to `[height width]`; output pixel i reads `(i + 1/2) * h / height - 1/2`, clamped to the border."""

    def taps(index: int, size: int, new_size: int) -> list[tuple[int, float]]:
        source = min(max((index + 0.5) * size / new_size - 0.5, 0.0), size - 1.0)
        low = math.floor(source)
        return [(low, 1 - (source - low)), (min(low + 1, size - 1), source - low)]

    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            for y, weight_y in taps(row, grid.shape[0], height):
                for x, weight_x in taps(column, grid.shape[1], width):
                    result[row, column] += weight_y * weight_x * grid[y, x]
    return result


def rank_gaussian(grid: Array) -> Array:
    """The 3x3 rank-Gaussian filter of one `[h w]` map, window by window."""

    def inside(index: int, size: int) -> int:
        if size == 1:
            return 0
        return -index if index < 0 else 2 * (size - 1) - index if index >= size else index

    height, width = grid.shape
    result = np.zeros_like(grid)
    for row in range(height):
        for column in range(width):
            around = [(row + dy, column + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            window = sorted(grid[inside(y, height), inside(x, width)] for y, x in around)
            mean = sum(window) / 9
            deviation = math.sqrt(sum((value - mean) ** 2 for value in window) / 9)
            if window[0] == window[8] or deviation == 0:
                result[row, column] = window[4]
                continue
            sigma = deviation / mean
            weights = [math.exp(-((rank - 4) ** 2) / (2 * sigma**2)) for rank in range(9)]
            result[row, column] = sum(w * v for w, v in zip(weights, window, strict=True)) / sum(weights)
    return result


def log_prob(head: Head, state: Array, token: int) -> float:
    logits = head.logits(state)
    peak = logits.max()
    return float(logits[token] - peak - math.log(np.exp(logits - peak).sum()))


# --- the method ----------------------------------------------------------------------------------


def explain(
    readings: Sequence[Reading],
    head: Head,
    *,
    method: str,
    scale_weights: Sequence[float] | None = None,
    decision_weight: bool = False,
    scale_mean: str = "arithmetic",
    aggregate: str = "before",
    k: int = 50,
    p: float = 0.9,
    arc_weight: str = "product",
    context: str = "all",
    smooth: bool = True,
) -> Explained:
    """Everything the engine reports, for the same prompt and response read at one or several scales."""
    base_index = min(range(len(readings)), key=lambda s: abs(readings[s].scale - 1))
    base = readings[base_index]
    n_prompt, n_targets = len(base.prompt), base.n_targets
    n_context = n_prompt + n_targets
    classes = [token for token, _ in base.context()]
    grids = [_finest([reading.images[i][1] for reading in readings]) for i in range(len(base.images))]
    sides = [math.prod(grid) for grid in grids]

    log_probs = np.array(
        [[log_prob(head, r.hidden[r.predictor(t)], classes[n_prompt + t]) for r in readings] for t in range(n_targets)]
    )
    base_log_prob = log_probs[:, base_index]
    agreement = np.exp(log_probs - base_log_prob[:, None])

    rankings = [top_k(head.logits(base.hidden[at]), k) for _, at in base.context()] if method == "arc" else []
    related = np.zeros((n_targets, n_context))

    context_scores = np.zeros((n_targets, n_context))
    raw_range, residual = np.zeros((n_targets, 2)), np.zeros(n_targets)
    degenerate = np.zeros(n_targets, dtype=bool)
    image: list[list[Array]] = [[] for _ in grids]

    for t in range(n_targets):
        own = classes[n_prompt + t]
        earlier = range(n_prompt + t)
        if method == "arc":
            related[t, : n_prompt + t] = [relevance(rankings[n_prompt + t], rankings[j], p) for j in earlier]
        omega = list(scale_weights) if scale_weights is not None else [r.scale**2 for r in readings]
        if decision_weight:
            omega = [weight * min(1.0, agreed) for weight, agreed in zip(omega, agreement[t], strict=True)]
        omega = [weight / sum(omega) for weight in omega]

        def allowed(j: int, own: int = own) -> bool:
            where = context == "all" or (context == "prompt") == (j < n_prompt)
            return where and classes[j] != own

        def weights(scores: Sequence[float], t: int = t, allowed=allowed) -> list[float]:  # type: ignore[no-untyped-def]
            unlike = [1 - related[t, j] for j in range(n_prompt + t)]
            value = {
                "tam": list(scores),
                "product": [s * u for s, u in zip(scores, unlike, strict=True)],
                "relevance": unlike,
            }["tam" if method == "tam" else arc_weight]
            return [v if allowed(j) else 0.0 for j, v in enumerate(value)]

        own_maps = [_maps(r, head, own) for r in readings]
        scores = [[activation(head, r.hidden[at], own) for _, at in r.context()[: n_prompt + t]] for r in readings]
        mixed_scores = [sum(o * s[j] for o, s in zip(omega, scores, strict=True)) for j in earlier]
        mix = _mix if scale_mean == "arithmetic" else _mix_geometric
        raw = mix(own_maps, omega, grids)
        if method == "lens":
            cleaned, residual[t] = raw, 1.0
        elif aggregate == "before":
            share = np.array(weights(mixed_scores))
            share = share / share.sum() if share.any() else share
            context_maps = [
                [
                    sum(
                        (part * _maps(r, head, classes[j])[i] for j, part in zip(earlier, share, strict=True)),
                        np.zeros(g),
                    )
                    for i, (_, g) in enumerate(r.images)
                ]
                for r in readings
            ]
            cleaned, _ = remove_interference(raw, [mix(context_maps, omega, grids)], [1.0])
            residual[t] = _share(cleaned, raw)
        else:
            parts = []
            for r, maps, s, o in zip(readings, own_maps, scores, omega, strict=True):
                others = [_flatten(_maps(r, head, classes[j])) for j in earlier]
                flat, _ = remove_interference(_flatten(maps), others, weights(s))
                residual[t] += o * _share(flat, _flatten(maps))
                parts.append(_unflatten(flat, [grid for _, grid in r.images]))
            cleaned = mix(parts, omega, grids)

        low = min([cleaned.min(), *mixed_scores])
        high = max([cleaned.max(), *mixed_scores])
        raw_range[t] = low, high
        degenerate[t] = low == high
        if not degenerate[t]:
            cleaned = (cleaned - low) / (high - low)
            context_scores[t, : n_prompt + t] = [(s - low) / (high - low) for s in mixed_scores]
        else:
            cleaned = np.zeros(sum(sides))
        for i, frames in enumerate(_unflatten(cleaned, grids)):
            image[i].append(np.stack([rank_gaussian(f) for f in frames]) if smooth else frames)

    return Explained(
        [np.stack(maps) for maps in image],
        context_scores,
        related if method == "arc" else None,
        base_log_prob,
        agreement,
        raw_range,
        residual,
        degenerate,
    )


def _maps(reading: Reading, head: Head, token: int) -> list[Array]:
    """The activation of one class on every image, each `[t h w]`."""
    return [
        np.array([activation(head, reading.hidden[at], token) for at in positions]).reshape(grid)
        for positions, grid in reading.images
    ]


def _share(left: Array, of: Array) -> float:
    norm = float(np.linalg.norm(of))
    return float(np.linalg.norm(left)) / norm if norm > 0 else 0.0


def _flatten(maps: Sequence[Array]) -> Array:
    return np.concatenate([m.reshape(-1) for m in maps])


def _unflatten(flat: Array, grids: Sequence[tuple[int, int, int]]) -> list[Array]:
    def parts() -> Iterator[Array]:
        start = 0
        for grid in grids:
            stop = start + math.prod(grid)
            yield flat[start:stop].reshape(grid)
            start = stop

    return list(parts())


def _mix(maps: Sequence[Sequence[Array]], omega: Sequence[float], grids: Sequence[tuple[int, int, int]]) -> Array:
    """`[image]`: the maps of every scale brought to the common grids and summed with the scales' weights."""
    total: list[Array] = [np.zeros(grid) for grid in grids]
    for of_scale, weight in zip(maps, omega, strict=True):
        for i, (_, height, width) in enumerate(grids):
            total[i] = total[i] + weight * np.stack([bilinear(frame, height, width) for frame in of_scale[i]])
    return _flatten(total)


def _mix_geometric(
    maps: Sequence[Sequence[Array]], omega: Sequence[float], grids: Sequence[tuple[int, int, int]]
) -> Array:
    """The weighted geometric mean above a hundredth of the highest value of all scales and images."""
    top = max(float(frame.max()) for of_scale in maps for frame in of_scale)
    if top == 0:
        return _flatten([np.zeros(grid) for grid in grids])
    logs = [[np.log(frame + 0.01 * top) for frame in of_scale] for of_scale in maps]
    return np.maximum(np.exp(_mix(logs, omega, grids)) - 0.01 * top, 0.0)


def _finest(grids: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    return max(grids, key=lambda grid: grid[1] * grid[2])


# --- the reference TAM with its quirks -----------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    raw: Array  # [slot image]
    cleaned: Array  # [slot image]
    text_scores: Array  # [slot slot], NaN where the reference keeps nothing
    maps: Array  # [answer h w] in [0, 1]


def tam_slots(reading: Reading, head: Head, *, smooth: bool = True) -> Slots:
    """What the reference computes, slot by slot.

    Slots are the prompt tokens, the last prefill position, then every answer token but the first.
    """
    n_prompt, n_answer = len(reading.prompt), reading.n_targets
    start = reading.response[0]
    positions = [*reading.prompt, *range(start - 1, start - 1 + n_answer)]
    # quirk: slot 0 is explained as what the model would say there; slot n_prompt as the last prefill token
    classes = [int(np.argmax(head.logits(reading.hidden[positions[0]])))]
    classes += [int(reading.ids[p]) for p in reading.prompt[1:]]
    classes += [int(reading.ids[start - 1]), *(int(reading.ids[start + i]) for i in range(1, n_answer))]
    # quirk: repeats are found by the texts of prompt and answer, whatever the class of the slot
    texts = [int(reading.ids[p]) for p in (*reading.prompt, *range(*reading.response))]

    n_slots = n_prompt + n_answer
    raw = [_flatten(_maps(reading, head, token)) for token in classes]
    text_scores = np.full((n_slots, n_slots), np.nan)
    cleaned: list[Array] = []
    maps: list[Array] = []
    for slot in range(n_slots):
        seen = max(slot, n_prompt) + 1  # the whole prefill is scored at once
        text_scores[slot, :seen] = [activation(head, reading.hidden[at], classes[slot]) for at in positions[:seen]]
        weights = [0.0 if texts[j] == texts[slot] else text_scores[slot, j] for j in range(slot)]
        cleaned.append(remove_interference(raw[slot], raw[:slot], weights)[0])
        if slot == 0 or slot > n_prompt:
            scores = text_scores[slot, : max(slot, 1)]
            low, high = min(cleaned[slot].min(), scores.min()), max(cleaned[slot].max(), scores.max())
            _, height, width = reading.images[0][1]
            grid = cleaned[slot].reshape(height, width)
            grid = (grid - low) / (high - low) if high > low else np.zeros_like(grid)
            maps.append(rank_gaussian(grid) if smooth else grid)
    return Slots(np.stack(raw), np.stack(cleaned), text_scores, np.stack(maps))
