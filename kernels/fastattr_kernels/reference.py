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

CHUNK_BYTES = 32 * 2**20  # logits of one chunk of the vocabulary


def _logits(hidden: Tensor, rows: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """`lm_head` on chosen rows: `softcap * tanh(logit_scale * (hidden @ rows.T + bias) / softcap)`."""
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

    Value descending, then id ascending. Memory is one chunk of the vocabulary, whatever its size.

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
    vocab = weight.shape[0] if valid_vocab is None else valid_vocab
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}, expected 1 to {vocab}, the number of ids in the vocabulary")
    positions = hidden.shape[0]
    width = max(k, CHUNK_BYTES // (4 * max(1, positions)))
    best_ids = torch.empty(positions, 0, dtype=torch.int64, device=hidden.device)
    best_values = torch.empty(positions, 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, width):
        stop = min(vocab, start + width)
        chunk_bias = None if bias is None else bias[start:stop]
        values = _logits(hidden, weight[start:stop], chunk_bias, logit_scale, softcap)
        ids = torch.arange(start, stop, device=hidden.device).expand_as(values)
        # what is kept comes first and has lower ids, so a stable sort breaks ties by id
        values, ids = torch.cat([best_values, values], 1), torch.cat([best_ids, ids], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best_values, best_ids = values.gather(1, order), ids.gather(1, order)
    return best_ids.int(), best_values


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
    width = max(1, CHUNK_BYTES // (4 * max(1, hidden.shape[0])))
    total = torch.full((hidden.shape[0],), -torch.inf, device=hidden.device)
    for start in range(0, vocab, width):
        stop = min(vocab, start + width)
        chunk_bias = None if bias is None else bias[start:stop]
        values = _logits(hidden, weight[start:stop], chunk_bias, logit_scale, softcap)
        total = torch.logaddexp(total, values.logsumexp(dim=1))
    logit = (hidden.float() * weight[ids].float()).sum(1)
    if bias is not None:
        logit = logit + bias[ids].float()
    logit = logit * logit_scale
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    return logit - total


def rank_overlap(left: Tensor, right: Tensor, persistence: float) -> Tensor:
    """Rank-biased overlap of every pair of rankings, relative to identical rankings.

    `RBO = (1-p) sum_d p^(d-1) |S[:d] & T[:d]| / d`, truncated at depth k and divided by its value for
    identical rankings, `1 - p^k`. An id at ranks a and b counts from depth `max(a, b)` on, so a pair is
    a sum of table look-ups over common ids.

    Args:
        left: int `[n k]`, right: int `[m k]`; distinct ids within a row.
        persistence: p in (0, 1); larger looks deeper.

    Returns:
        float32 `[n m]` in [0, 1].
    """
    k = left.shape[1]
    depth = torch.arange(1, k + 1, dtype=torch.float64, device=left.device)
    weight = (1 - persistence) * persistence ** (depth - 1) / depth
    from_depth = weight.flip(0).cumsum(0).flip(0)
    # entry k (0-based) stands for "absent": it adds nothing
    table = torch.cat([from_depth, from_depth.new_zeros(1)]) / (1 - persistence**k)
    table = table.float()

    known, compact = torch.unique(right, return_inverse=True)
    rank = torch.full(
        (right.shape[0], len(known)), k, dtype=torch.uint8 if k < 256 else torch.int16, device=right.device
    )
    ranks = torch.arange(k, device=right.device)
    rank.scatter_(1, compact, ranks.to(rank.dtype).expand_as(compact))
    place = torch.searchsorted(known, left).clamp_(max=len(known) - 1)
    present = known[place] == left

    overlap = torch.zeros(left.shape[0], right.shape[0], device=left.device)
    for a in range(k):  # over ranks, not over targets
        theirs = rank[:, place[:, a]].T.long()
        overlap += torch.where(present[:, a, None], table[theirs.clamp(min=a)], 0.0)
    return overlap.clamp_(max=1.0)


def context_mean(context_activation: Tensor, weight: Tensor) -> Tensor:
    """What the context around a target lights up on average (TAM, section 3.2).

    `M_t = sum_j w[t,j] A_j / sum_j w[t,j]`; all targets are one matrix product.

    Args:
        context_activation: `[context position]`.
        weight: `[target context]`, not negative; zero where a context token must not count.

    Returns:
        float32 `[target position]`, zero where no context counts.
    """
    total = weight.sum(dim=1, keepdim=True)
    return (weight @ context_activation) / torch.where(total > 0, total, 1.0)


def remove_interference(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract from each map its best-fitting multiple of the context's (TAM, section 3.2, in closed form).

    `lam_t = <A_t, M_t> / <M_t, M_t>`, `out_t = relu(A_t - lam_t M_t)`.

    Args:
        activation, mean: `[target position]`, not negative.

    Returns:
        the cleaned maps `[target position]`, and `lam [target]` (zero where `M_t` is zero).
    """
    norm = (mean * mean).sum(dim=1)
    scale = torch.where(norm > 0, (activation * mean).sum(dim=1) / torch.where(norm > 0, norm, 1.0), 0.0)
    return (activation - scale[:, None] * mean).relu_(), scale


def rank_gaussian(maps: Tensor) -> Tensor:
    """The rank-Gaussian filter (TAM, section 3.3): a median-like 3x3 smoothing.

    The nine values of each window (reflect padding, edge padding where a side is 1) are sorted and rank
    i is weighted by `exp(-(i-4)^2 / (2 sigma^2))` with `sigma = std / mean` of the window. As sigma goes
    to zero this is the median, which is what a constant or all-zero window gives.

    Args:
        maps: float32 `[target t h w]`, not negative.

    Returns:
        float32 of the same shape.
    """
    target, frames, height, width = maps.shape
    flat = maps.reshape(target * frames, 1, height, width)
    flat = F.pad(flat, (0, 0, 1, 1), mode="reflect" if height > 1 else "replicate")
    flat = F.pad(flat, (1, 1, 0, 0), mode="reflect" if width > 1 else "replicate")[:, 0]
    window = torch.stack([flat[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=-1)
    window = window.sort(dim=-1).values
    mean = window.mean(dim=-1, keepdim=True)
    sigma = window.std(dim=-1, correction=0, keepdim=True) / torch.where(mean > 0, mean, 1.0)
    distance = (torch.arange(9, device=maps.device) - 4.0) ** 2
    weight = torch.where(
        sigma > 0, torch.exp(-distance / (2 * torch.where(sigma > 0, sigma, 1.0) ** 2)), (distance == 0).float()
    )
    filtered = (window * weight).sum(dim=-1) / weight.sum(dim=-1)
    return filtered.reshape(target, frames, height, width)


def multiscale(maps: Sequence[Tensor], weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample the maps of every scale to one grid and sum them (MSEA).

    Bilinear with half-pixel centres (`align_corners=False`).

    Args:
        maps: for each scale `[target t h_s w_s]`.
        weights: `[target scale]`.
        size: `(h, w)` of the result.

    Returns:
        float32 `[target t h w]`.
    """
    total: Tensor | None = None
    for index, scale_maps in enumerate(maps):
        scaled = scale_maps * weights[:, index, None, None, None]
        if scaled.shape[-2:] != size:
            scaled = F.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
        total = scaled if total is None else total + scaled
    if total is None:
        raise ValueError("multiscale got no maps, expected at least one scale")
    return total
