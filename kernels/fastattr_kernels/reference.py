"""What each operation means, in readable torch, for all targets at once.

Every function takes plain tensors on one device, accumulates in float32 and returns float32 (or
integer ids). Sources: TAM is arXiv 2506.23270, MSEA and ARC are arXiv 2509.22415; RBO is Webber,
Moffat and Zobel, ACM TOIS 2010.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 32 * 2**20  # of logits, and of output embeddings as float32, for one chunk of the vocabulary
ROUNDING = 1e-6  # relative error of a float32 map after its context is subtracted
ONE = 2**30  # a relevance of 1, in whole numbers
BLOCK = 128  # targets whose context is cut to what stands before them
GROUP = 32  # columns whose maximum bounds the top-k


def _logits(hidden: Tensor, rows: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """`lm_head` on chosen rows: `softcap * tanh(logit_scale * (hidden @ rows.T + bias) / softcap)`."""
    if hidden.is_cuda and hidden.dtype == rows.dtype and hidden.dtype in (torch.float16, torch.bfloat16):
        logits = torch.mm(hidden, rows.T, out_dtype=torch.float32)  # the same products, on the matrix units
    else:
        logits = hidden.float() @ rows.float().T
    if bias is not None:
        logits += bias.float()
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def lens(
    hidden: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Token activations `relu(h . W[x])` (TAM, section 3.1): how active each class is at each position.

    Args:
        hidden: `[position dim]`, any floating dtype.
        rows: `[target dim]`, the rows of the output embeddings of the target ids.
        bias: `[target]` or None.

    Returns:
        float32 `[target position]`.
    """
    return _logits(hidden, rows, bias, logit_scale, softcap).relu_().T.contiguous()


def lm_head_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ordered top-k of the full vocabulary, without the logits in memory.

    Value descending, then id ascending. A NaN logit ranks with -inf. Memory is one chunk of the vocabulary,
    whatever its size.

    Args:
        hidden: `[position dim]`.
        weight: `[vocab dim]`.
        k: 1 to the number of valid ids.
        valid_vocab: ids from here on are padding and never ranked.

    Returns:
        ids int32 `[position k]` and values float32 `[position k]`.

    Raises:
        ValueError: when `k` is not within the vocabulary.
    """
    ids, values, _ = lm_head_summary(
        hidden, weight, k, bias, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab
    )
    return ids, values


def lm_head_summary(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lm_head_topk` and the log-sum-exp of the logits, from one pass over the vocabulary.

    A logit minus the log-sum-exp is a log-probability in nats.

    Returns:
        ids int32 `[position k]`, values float32 `[position k]`, log-sum-exp float32 `[position]`.

    Raises:
        ValueError: when `k` is not within the vocabulary.
    """
    vocab = weight.shape[0] if valid_vocab is None else valid_vocab
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}, expected 1 to {vocab}, the number of ids in the vocabulary")
    positions = hidden.shape[0]
    width = max(k, CHUNK_BYTES // (4 * max(1, *hidden.shape)))
    total = torch.full((positions,), -torch.inf, device=hidden.device)
    best_ids = torch.empty(positions, 0, dtype=torch.int64, device=hidden.device)
    best_values = torch.empty(positions, 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, width):
        stop = min(vocab, start + width)
        chunk_bias = None if bias is None else bias[start:stop]
        logits = _logits(hidden, weight[start:stop], chunk_bias, logit_scale, softcap)
        total = torch.logaddexp(total, logits.logsumexp(dim=1))
        values, columns = _topk_columns(logits.nan_to_num_(-torch.inf, torch.inf, -torch.inf), min(k, stop - start))
        # what is kept comes first and has lower ids, so a stable sort breaks ties by id
        values, ids = torch.cat([best_values, values], 1), torch.cat([best_ids, columns + start], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best_values, best_ids = values.gather(1, order), ids.gather(1, order)
    return best_ids.int(), best_values, total


def _topk_columns(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top-k of each row, ties by lower column, without sorting whole rows.

    The k-th largest of the maxima of groups of columns is a lower bound of the k-th largest value, so only
    the few values that reach it are sorted.
    """
    groups = values.shape[1] // GROUP
    if groups < k:
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return values.gather(1, order), order
    maxima = values[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(dim=2)
    bound = maxima.topk(k, dim=1).values[:, -1:]
    rows, columns = (values >= bound).nonzero(as_tuple=True)  # columns ascend within a row
    counts = torch.bincount(rows, minlength=len(values))
    slots = torch.arange(len(rows), device=values.device) - (counts.cumsum(0) - counts)[rows]
    kept = values.new_full((len(values), int(counts.max())), -torch.inf)
    kept_columns = torch.zeros_like(kept, dtype=torch.int64)
    kept[rows, slots], kept_columns[rows, slots] = values[rows, columns], columns
    order = kept.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return kept.gather(1, order), kept_columns.gather(1, order)


def lm_head_log_prob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> Tensor:
    """Log-probability (nats) of one id at each position, without the logits in memory.

    Args:
        hidden: `[position dim]`, the predicting positions.
        weight: `[vocab dim]`.
        ids: int `[position]`.

    Returns:
        float32 `[position]`.
    """
    vocab = weight.shape[0] if valid_vocab is None else valid_vocab
    width = max(1, CHUNK_BYTES // (4 * max(1, *hidden.shape)))
    total = torch.full((hidden.shape[0],), -torch.inf, device=hidden.device)
    for start in range(0, vocab, width):
        stop = min(vocab, start + width)
        chunk_bias = None if bias is None else bias[start:stop]
        values = _logits(hidden, weight[start:stop], chunk_bias, logit_scale, softcap)
        total = torch.logaddexp(total, values.logsumexp(dim=1))
    own = lm_head_logit(hidden, weight, ids, bias, logit_scale=logit_scale, softcap=softcap)
    return own - total


def lm_head_logit(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Logit of one id at each position.

    Args:
        hidden: `[position dim]`, weight: `[vocab dim]`, ids: int `[position]`.

    Returns:
        float32 `[position]`.
    """
    logit = (hidden.float() * weight[ids].float()).sum(1)
    if bias is not None:
        logit = logit + bias[ids].float()
    logit = logit * logit_scale
    return logit if softcap is None else softcap * torch.tanh(logit / softcap)


def rank_overlap(left: Tensor, right: Tensor, persistence: float, *, n_before: int | None = None) -> Tensor:
    """Rank-biased overlap of every pair of rankings, relative to identical rankings.

    `RBO = (1-p) sum_d p^(d-1) |S[:d] & T[:d]| / d`, truncated at depth k and divided by its value for
    identical rankings, `1 - p^k`. An id at ranks a and b counts from depth `max(a, b)` on, so a pair is
    a sum of table look-ups over common ids.

    Args:
        left: int `[target k]`, right: int `[context k]`; distinct ids within a row.
        persistence: p in (0, 1); larger looks deeper.
        n_before: how many context tokens stand before the first target; target t then overlaps with the first
            `n_before + t` only and with the others not at all (0). None compares all pairs.

    Returns:
        float32 `[target context]` in [0, 1].
    """
    k = left.shape[1]
    table = overlap_table(k, persistence, left.device)

    # for every id that `right` ranks, what its rank is worth in each row; the last line stands for "absent"
    known, compact = torch.unique(right, return_inverse=True)
    worth = torch.zeros(len(known) + 1, len(right), dtype=torch.int32, device=right.device)
    worth.scatter_(0, compact.T.contiguous(), table[:, None].expand(k, len(right)))
    line = torch.searchsorted(known, left).clamp_(max=len(known) - 1)
    line = torch.where(known[line] == left, line, len(known))

    # the table falls, so table[max(a, b)] = min(table[a], table[b])
    overlap = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for a in range(k):  # over ranks, not over targets
        overlap += worth[line[:, a]].clamp_(max=int(table[a]))
    relevance = overlap.float() / ONE
    if n_before is None:
        return relevance
    return torch.where(_causal(len(left), len(right), n_before, left.device), relevance, 0.0)


def overlap_table(k: int, persistence: float, device: torch.device) -> Tensor:
    """What a common id is worth, by the deeper of its two ranks: int32 `[k]`, falling, in units of `1 / ONE`.

    Whole numbers add up to the same sum in any order, and the table to exactly `ONE`: identical rankings have
    a relevance of exactly 1. What were left of 1 would pass for interference, because weights are relative.
    """
    depth = torch.arange(1, k + 1, dtype=torch.float64)
    weight = (1 - persistence) * persistence ** (depth - 1) / depth
    table = (weight.flip(0).cumsum(0).flip(0) / (1 - persistence**k) * ONE).round_().int()
    table[0] += ONE - int(table.sum())
    return table.to(device)


def _causal(targets: int, context: int, n_before: int, device: torch.device) -> Tensor:
    """bool `[target context]`: whether the context token stands before the target."""
    return torch.arange(context, device=device) < n_before + torch.arange(targets, device=device)[:, None]


def arc_weight(
    left: Tensor,
    right: Tensor,
    persistence: float,
    counts: Tensor,
    scores: Tensor | None = None,
    *,
    n_before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Relevance of context, and how much of it is interference (ARC, arXiv 2509.22415, section 3.3).

    `w[t,j] = (1 - r[t,j]) s[t,j]` where a pair counts, else 0; without scores `1 - r`.

    Args:
        left, right, persistence, n_before: see `rank_overlap`.
        counts: bool `[target context]`, which context tokens may be interference.
        scores: `[target context]`, not negative.

    Returns:
        relevance and weight, float32 `[target context]` each.
    """
    relevance = rank_overlap(left, right, persistence, n_before=n_before)
    weight = 1.0 - relevance if scores is None else (1.0 - relevance) * scores
    return relevance, torch.where(counts, weight, 0.0)


def context_mean(context_activation: Tensor, weight: Tensor, *, n_before: int | None = None) -> Tensor:
    """What the context around a target lights up on average (TAM, section 3.2).

    `M_t = sum_j w[t,j] A_j / sum_j w[t,j]`; all targets are one matrix product.

    Args:
        context_activation: `[context position]`.
        weight: `[target context]`, not negative; zero where a context token must not count.
        n_before: promises that target t has weight on the first `n_before + t` context tokens only, so that the
            rest need not be read.

    Returns:
        float32 `[target position]`, zero where no context counts.
    """
    total = weight.sum(dim=1, keepdim=True)
    mean = torch.empty(len(weight), context_activation.shape[1], device=weight.device)
    rows = len(weight) if n_before is None else BLOCK
    for start in range(0, len(weight), max(1, rows)):
        stop = min(len(weight), start + rows)
        seen = weight.shape[1] if n_before is None else min(weight.shape[1], n_before + stop)
        torch.mm(weight[start:stop, :seen], context_activation[:seen], out=mean[start:stop])
    return mean / torch.where(total > 0, total, 1.0)


def remove_interference(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from each map its best-fitting multiple of the context's (TAM, section 3.2, in closed form).

    `lam_t = <A_t, M_t> / <M_t, M_t>`, `out_t = relu(A_t - lam_t M_t)`; what is left within rounding of zero is zero.

    Args:
        activation, mean: `[target position]`, not negative.

    Returns:
        the cleaned maps `[target position]`, `lam [target]` (zero where `M_t` is zero), and the least and the
        greatest value of each cleaned map, `[target 2]`.
    """
    norm = (mean * mean).sum(dim=1)
    scale = torch.where(norm > 0, (activation * mean).sum(dim=1) / torch.where(norm > 0, norm, 1.0), 0.0)
    left = activation - scale[:, None] * mean
    # what is within rounding of nothing is nothing: normalisation would blow it up to a map
    cleaned = torch.where(left > ROUNDING * activation, left, 0.0)
    return cleaned, scale, torch.stack(cleaned.aminmax(dim=1), dim=1)


# a sorting network for nine values: 25 compare-exchanges, right for every input of zeros and ones
_NINE_SORTED = (
    *((0, 3), (1, 7), (2, 5), (4, 8), (0, 7), (2, 4), (3, 8), (5, 6), (0, 2), (1, 3), (4, 5), (7, 8)),
    *((1, 4), (3, 6), (5, 7), (0, 1), (2, 4), (3, 5), (6, 8), (2, 3), (4, 5), (6, 7), (1, 2), (3, 4), (5, 6)),
)


def stretch(maps: Tensor, span: Tensor) -> Tensor:
    """Map each target's `span [target 2]` to [0, 1]; what lies outside is clamped, an empty span gives zeros."""
    low, high = span.T.reshape(2, -1, *[1] * (maps.ndim - 1))
    empty = high <= low
    scaled = (maps - low) / torch.where(empty, 1.0, high - low)
    return torch.where(empty, 0.0, scaled).clamp_(0.0, 1.0)


def rank_gaussian(maps: Tensor, span: Tensor | None = None) -> Tensor:
    """The rank-Gaussian filter (TAM, section 3.3): a median-like 3x3 smoothing.

    The nine values of each window (reflect padding, edge padding where a side is 1) are sorted and rank
    i is weighted by `exp(-(i-4)^2 / (2 sigma^2))` with `sigma = std / mean` of the window. As sigma goes
    to zero this is the median, which is what a constant or all-zero window gives.

    Args:
        maps: float32 `[target t h w]`, not negative.
        span: `[target 2]`; where given, it is first stretched to [0, 1], see `stretch`.

    Returns:
        float32 of the same shape.
    """
    if span is not None:
        maps = stretch(maps, span)
    target, frames, height, width = maps.shape
    flat = maps.reshape(target * frames, 1, height, width)
    flat = F.pad(flat, (0, 0, 1, 1), mode="reflect" if height > 1 else "replicate")
    flat = F.pad(flat, (1, 1, 0, 0), mode="reflect" if width > 1 else "replicate")[:, 0]
    ranked = [flat[:, i : i + height, j : j + width].contiguous() for i in range(3) for j in range(3)]
    mean = sum(ranked[1:], ranked[0]) / 9
    variance = sum(((each - mean) ** 2 for each in ranked[1:]), (ranked[0] - mean) ** 2) / 9
    for low, high in _NINE_SORTED:  # nine shifted planes, sorted pixel by pixel
        ranked[low], ranked[high] = torch.minimum(ranked[low], ranked[high]), torch.maximum(ranked[low], ranked[high])

    # a rank d away from the median weighs q^(d^2) with q = exp(-1 / (2 sigma^2)); without spread q is 0
    spread = variance > 0
    q = torch.where(spread, torch.exp(-mean * mean / (2 * torch.where(spread, variance, 1.0))), 0.0)
    q4 = q**4
    q9, q16 = q4 * q4 * q, q4**4
    total = ranked[4] + q * (ranked[3] + ranked[5]) + q4 * (ranked[2] + ranked[6])
    total += q9 * (ranked[1] + ranked[7]) + q16 * (ranked[0] + ranked[8])
    return (total / (1 + 2 * (q + q4 + q9 + q16))).reshape(maps.shape)


def multiscale(
    maps: Sequence[Tensor],
    weights: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    span: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Upsample the maps of every scale to one grid, or to the image's size, and sum them (MSEA).

    Bilinear with half-pixel centres (`align_corners=False`).

    Args:
        maps: for each scale `[target t h_s w_s]`.
        weights: `[target scale]`.
        size: `(h, w)` of the result.
        dtype: float32, float16 or uint8. For uint8 each target's span is stretched to 0..255 and rounded.
        span: `[target 2]`, for uint8; None takes each target's own extremes.

    Returns:
        the sum `[target t h w]` in `dtype`, and each target's extremes before any stretching, float32 `[target 2]`.
    """
    if not maps:
        raise ValueError("multiscale got no maps, expected at least one scale")
    if dtype not in (torch.float32, torch.float16, torch.uint8):
        raise ValueError(f"dtype is {dtype}, expected float32, float16 or uint8")
    total: Tensor | None = None
    for index, scale_maps in enumerate(maps):
        scaled = scale_maps * weights[:, index, None, None, None]
        if scaled.shape[-2:] != size:
            scaled = F.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
        total = scaled if total is None else total + scaled
    assert total is not None
    extremes = torch.stack(total.flatten(1).aminmax(dim=1), dim=1)
    if dtype == torch.uint8:
        total = stretch(total, extremes if span is None else span).mul_(255).round_()
    return total.to(dtype), extremes
