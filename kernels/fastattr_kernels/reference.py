"""What each operation means, in readable torch, for all targets at once; also how a CPU runs it.

Every function takes plain tensors on one device, accumulates in float32 and returns float32 (or
integer ids). Sources: TAM is arXiv 2506.23270, MSEA and ARC are arXiv 2509.22415; RBO is Webber,
Moffat and Zobel, ACM TOIS 2010.

Where tensors are large the work goes block by block through buffers that are written again and again (`out=`):
what is between input and result then stays in the cache, and fresh memory, which costs more than the arithmetic
done in it, is only taken for results.

Matrix products ignore `torch.autocast`. They follow `torch.set_float32_matmul_precision` and `allow_tf32`, which lower the
precision of float32 products in the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

# of logits, and of output embeddings as float32, for one chunk of the vocabulary
CHUNK_BYTES = 16 * 2**20  # on a CPU, so that it stays in the cache
DEVICE_CHUNK_BYTES = 128 * 2**20  # elsewhere, where every chunk costs a dozen launches
GROUP = 32  # neighbouring ids whose greatest logit bounds the others
BLOCK = 128  # targets, or context tokens, worked on together
BLOCK_BYTES = 4 * 2**20  # of maps worked on together, with everything in between
ROUNDING = 1e-6  # relative error of a float32 map after its context is subtracted
ONE = 2**30  # a relevance of 1, in whole numbers


def _blocks(length: int, size: int) -> Iterator[slice]:
    """`range(length)` in consecutive slices of `size`, the last one shorter."""
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))


def _even(length: int, most: int) -> int:
    """The size of as few blocks as it takes, none larger than `most`, all about the same."""
    count = max(1, -(-length // most))
    return max(1, -(-length // count))


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, in which products keep the dtype of their factors."""
    kind = like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _on_matrix_units(hidden: Tensor, rows: Tensor) -> bool:
    """Whether a GPU multiplies these as they are and accumulates in float32; anything else is upcast first."""
    if not (hidden.is_cuda and hidden.dtype == rows.dtype and hidden.dtype in (torch.float16, torch.bfloat16)):
        return False
    if is_compiling():  # a graph cannot try it
        return torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")
    return _mm_gives_float32(hidden.device, hidden.dtype)


@lru_cache(maxsize=64)
def _mm_gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.mm(..., out_dtype=torch.float32)` works here: not before torch 2.8, and not with ROCm. Tried once."""
    sample = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(sample, sample, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def head_logits(
    hidden: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """`lm_head` on chosen rows: `softcap * tanh(logit_scale * (hidden @ rows.T + bias) / softcap)`."""
    with without_autocast(hidden):
        if _on_matrix_units(hidden, rows):
            logits = torch.mm(hidden, rows.T, out_dtype=torch.float32)
        else:
            logits = torch.mm(hidden.float(), rows.float().T, out=out)
    return _finish_(logits, bias, logit_scale, softcap)


def _finish_(logits: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """What a head does to its products, in place."""
    if bias is not None:
        logits += bias.float()
    if logit_scale != 1.0:
        logits *= logit_scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _columns_at_once(hidden: Tensor, weight: Tensor) -> int:
    """The width of one chunk of the vocabulary, in whole groups."""
    if hidden.device.type == "cpu":  # rows of output embeddings should stay in the cache too
        chunk_bytes, numbers = CHUNK_BYTES, max(hidden.shape)
    elif weight.dtype == torch.float32 or _on_matrix_units(hidden, weight):
        chunk_bytes, numbers = DEVICE_CHUNK_BYTES, len(hidden)
    else:
        chunk_bytes, numbers = DEVICE_CHUNK_BYTES, max(hidden.shape)  # rows are upcast into memory of their own
    return max(GROUP, chunk_bytes // (4 * max(1, numbers)) // GROUP * GROUP)


def _logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, vocab: int
) -> Iterator[tuple[int, Tensor]]:
    """The first id and the logits `[position column]` of one chunk of the vocabulary after the other.

    The memory of a chunk is used again for the next. Its columns are whole groups; past the vocabulary they are -inf.
    """
    width = min(vocab, _columns_at_once(hidden, weight))
    buffer = upcast = None
    if not _on_matrix_units(hidden, weight):
        hidden = hidden.float()
        buffer = torch.empty(len(hidden), width, dtype=torch.float32, device=hidden.device)
        if weight.dtype != torch.float32:
            upcast = torch.empty(width, weight.shape[1], dtype=torch.float32, device=weight.device)
    for ids in _blocks(vocab, width):
        count = ids.stop - ids.start
        rows = weight[ids] if upcast is None else upcast[:count].copy_(weight[ids])
        out = None if buffer is None else buffer[:, :count]
        logits = head_logits(hidden, rows, None if bias is None else bias[ids], logit_scale, softcap, out=out)
        if count % GROUP:
            logits = F.pad(logits, (0, -count % GROUP), value=-torch.inf)
        yield ids.start, logits


def vocabulary(weight: Tensor, valid_vocab: int | None, k: int = 1) -> int:
    """The number of valid ids of output embeddings `[vocab dim]`.

    Raises:
        ValueError: `valid_vocab` is above the number of rows, or `k` above the number of valid ids.
    """
    n_rows = weight.shape[0]
    if valid_vocab is not None and not 1 <= valid_vocab <= n_rows:
        raise ValueError(f"valid_vocab is {valid_vocab}, expected 1 to {n_rows}, the rows of the output embeddings")
    vocab = n_rows if valid_vocab is None else valid_vocab
    if not 1 <= k <= vocab:
        raise ValueError(f"k is {k}, expected 1 to {vocab}, the number of ids in the vocabulary")
    return vocab


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
    return head_logits(hidden, rows, bias, logit_scale, softcap).relu_().T.contiguous()


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
        ValueError: when `k` or `valid_vocab` is not within the vocabulary.
    """
    best, _ = _scan_vocabulary(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, with_logsumexp=False)
    return _ids_and_values(best)


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
        ValueError: when `k` or `valid_vocab` is not within the vocabulary.
    """
    best, total = _scan_vocabulary(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, with_logsumexp=True)
    return *_ids_and_values(best), total


def _scan_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int | None,
    *,
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor]:
    """Keys of the top-k `[position k]`, see `_keys`, and log-sum-exp `[position]` if asked for."""
    vocab = vocabulary(weight, valid_vocab, k)
    best = torch.full((len(hidden), k), torch.iinfo(torch.int64).min, dtype=torch.int64, device=hidden.device)
    total = torch.full((len(hidden),), -torch.inf, dtype=torch.float32, device=hidden.device)
    for first_id, logits in _logit_chunks(hidden, weight, bias, logit_scale, softcap, vocab):
        for rows in _blocks(len(hidden), BLOCK):
            _keep_best_(best[rows], logits[rows], first_id)
            if with_logsumexp:
                total[rows] = torch.logaddexp(total[rows], _logsumexp_(logits[rows]))
    return best, total


def _keep_best_(best: Tensor, logits: Tensor, first_id: int) -> None:
    """Merge a chunk of logits `[row column]` into the best keys so far `[row k]`, in place.

    At most k groups of columns can hold a top-k logit: those with the greatest maxima, of equal ones the first.
    Any logit elsewhere has k before it, one from each of these groups. So memory and work are bounded whatever
    the logits are, and few groups are left to look into once good candidates are known.
    """
    k = best.shape[1]
    groups = logits.unflatten(1, (-1, GROUP))
    maxima = groups.amax(dim=2)
    if maxima.isnan().any():
        groups = groups.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        maxima = groups.amax(dim=2)
    first_ids = torch.arange(first_id, first_id + logits.shape[1], GROUP, device=logits.device)
    bounds = _keys(maxima, first_ids)  # no key in a group is greater
    count = min(k, int((bounds > best[:, -1:]).sum(dim=1).amax()))
    chosen = bounds.topk(count, dim=1).indices
    lines = chosen + torch.arange(len(best), device=logits.device)[:, None] * groups.shape[1]
    values = groups.flatten(0, 1).index_select(0, lines.flatten()).view(len(best), count, GROUP)
    ids = first_ids[chosen][:, :, None] + torch.arange(GROUP, device=logits.device)
    best.copy_(torch.cat([best, _keys(values, ids).flatten(1)], dim=1).topk(k, dim=1).values)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that order as logits do: the greater value first, of equal values the lower id. No two are equal."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the zero it equals
    return _ordered(bits).long() * 2**32 - ids


def _ordered(bits: Tensor) -> Tensor:
    """int32 that order as the floats do whose bits they are, and back: negative floats order backwards by their bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _ids_and_values(keys: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ids and float32 values of what `_keys` made."""
    ordered = (keys + (2**32 - 1)) >> 32
    return (ordered * 2**32 - keys).int(), _ordered(ordered.int()).view(torch.float32)


def _logsumexp_(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row `[row column]`, which is overwritten."""
    peak = logits.amax(dim=1, keepdim=True)
    # less than e^-80 of the greatest adds nothing to the sum, but exp is slow where it underflows
    logits.sub_(torch.where(peak.isinf(), 0.0, peak)).clamp_(min=-80.0)
    return logits.exp_().sum(dim=1).log_().add_(peak[:, 0])


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

    Raises:
        ValueError: when `valid_vocab` is not within the vocabulary.
    """
    vocab = vocabulary(weight, valid_vocab)
    total = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)
    for _, logits in _logit_chunks(hidden, weight, bias, logit_scale, softcap, vocab):
        total = torch.logaddexp(total, _logsumexp_(logits))
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
    products = (hidden.float() * weight[ids].float()).sum(1)
    return _finish_(products, None if bias is None else bias[ids], logit_scale, softcap)


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
    k, targets, context = left.shape[1], len(left), len(right)
    table = overlap_table(k, persistence, left.device)
    worths = table.tolist()

    # ids become small numbers; those of `left` by rank, so that the ids at one rank lie together
    ids, numbers = torch.unique(torch.cat([left, right]), return_inverse=True)
    wanted, ranked = numbers[:targets].T.contiguous(), numbers[targets:]

    # for every id that a block of `right` ranks, what its rank is worth to each context token of the block
    relevance = torch.zeros(targets, context, dtype=torch.float32, device=left.device)
    line_of = torch.empty(len(ids), dtype=torch.int64, device=left.device)
    worth = torch.empty(BLOCK * k + 1, BLOCK, dtype=torch.int32, device=left.device)
    buffers = torch.empty(2, targets, BLOCK, dtype=torch.int32, device=left.device)
    for columns in _blocks(context, BLOCK):
        width = columns.stop - columns.start
        first = 0 if n_before is None else min(targets, max(0, columns.start + 1 - n_before))
        line_of.fill_(BLOCK * k)  # the last line stands for "absent"
        line_of[ranked[columns].flatten()] = torch.arange(width * k, device=left.device)
        worth.zero_()
        worth[line_of[ranked[columns]], torch.arange(width, device=left.device)[:, None]] = table
        lines = line_of[wanted[:, first:]]
        common, total = buffers[:, first:]
        total.zero_()
        for rank in range(k):  # the table falls, so table[max(a, b)] = min(table[a], table[b])
            torch.index_select(worth, 0, lines[rank], out=common)
            total += common.clamp_(max=worths[rank])
        # copied before the division: torch divides integers in the default dtype
        relevance[first:, columns].copy_(total[:, :width]).div_(ONE)
    return relevance if n_before is None else relevance.tril_(n_before - 1)


def overlap_table(k: int, persistence: float, device: torch.device) -> Tensor:
    """What a common id is worth, by the deeper of its two ranks: int32 `[k]`, falling, in units of `1 / ONE`.

    Whole numbers add up to the same sum in any order, and the table to exactly `ONE`: identical rankings have
    a relevance of exactly 1. What were left of 1 would pass for interference, because weights are relative.
    """
    depth = torch.arange(1, k + 1, dtype=torch.float64, device="cpu")
    weight = (1 - persistence) * persistence ** (depth - 1) / depth
    table = (weight.flip(0).cumsum(0).flip(0) / (1 - persistence**k) * ONE).round_().int()
    table[0] += ONE - int(table.sum())
    return table.to(device)


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
    weight = 1.0 - relevance
    if scores is not None:
        weight *= scores
    return relevance, weight.masked_fill_(counts.logical_not(), 0.0)  # not multiplied: what does not count may be NaN


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
    mean = torch.empty(len(weight), context_activation.shape[1], dtype=torch.float32, device=weight.device)
    for rows in _blocks(len(weight), len(weight) if n_before is None else BLOCK):
        seen = weight.shape[1] if n_before is None else min(weight.shape[1], n_before + rows.stop)
        with without_autocast(weight):
            torch.mm(weight[rows, :seen], context_activation[:seen], out=mean[rows])
    return mean.div_(torch.where(total > 0, total, 1.0))


def remove_interference(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from each map its best-fitting multiple of the context's (TAM, section 3.2, in closed form).

    `lam_t = <A_t, M_t> / <M_t, M_t>`, `out_t = relu(A_t - lam_t M_t)`; what is left within rounding of zero is zero.

    Args:
        activation, mean: `[target position]`, not negative. A NaN comes out as NaN, also in the extremes.

    Returns:
        the cleaned maps `[target position]`, `lam [target]` (zero where `M_t` is zero), and the least and the
        greatest value of each cleaned map, `[target 2]`.
    """
    cleaned = torch.empty_like(activation, dtype=torch.float32)
    scale, span = cleaned.new_empty(len(cleaned)), cleaned.new_empty(len(cleaned), 2)
    for rows in _blocks(len(activation), BLOCK):
        own, shared = activation[rows], mean[rows]
        norm = (shared * shared).sum(dim=1)
        fit = (own * shared).sum(dim=1) / torch.where(norm == 0, 1.0, norm)
        scale[rows] = torch.where(norm == 0, 0.0, fit)
        left = torch.addcmul(own, scale[rows, None], shared, value=-1)
        # what is within rounding of nothing is nothing: normalisation would blow it up to a map
        torch.mul(left, left > ROUNDING * own, out=cleaned[rows])  # five times as fast as selecting
        span[rows] = _extremes(cleaned[rows])
    return cleaned, scale, span


def _extremes(maps: Tensor) -> Tensor:
    """The least and the greatest value of each target `[target ...]`, `[target 2]`."""
    return torch.stack([maps.flatten(1).amin(dim=1), maps.flatten(1).amax(dim=1)], dim=1)


def stretch(maps: Tensor, span: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Map each target's `span [target 2]` to [0, 1]; what lies outside is clamped, an empty span gives zeros."""
    low, high = span.T.reshape(2, -1, *[1] * (maps.ndim - 1))
    size = torch.where(high <= low, torch.inf, high - low)
    return torch.sub(maps, low, out=out).div_(size).clamp_(0.0, 1.0)


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
    targets, frames, height, width = maps.shape
    flat = maps.reshape(targets * frames, height, width)
    unit = torch.ones(len(flat), 1, 1, dtype=torch.float32, device=maps.device)
    if span is None:
        # a power of two changes no digit and no weight, and keeps squares in the range of float32
        unit = torch.ldexp(unit, flat.amax(dim=(1, 2), keepdim=True).frexp().exponent.clamp(-100, 100))
    else:
        span = span.repeat_interleave(frames, dim=0)

    filtered = torch.empty_like(flat, memory_format=torch.contiguous_format)
    most = max(1, BLOCK_BYTES // (4 * 16 * height * (width + 2)))
    size = _even(len(flat), most)
    padded = torch.empty(size, height + 2, width + 2, dtype=torch.float32, device=maps.device)
    planes = torch.empty(15, size, height, width + 2, dtype=torch.float32, device=maps.device)
    for block in _blocks(len(flat), size):
        if block.stop == len(flat):  # the last block is a whole one too
            block = slice(len(flat) - size, len(flat))
        padded[:, 1:-1, 1:-1] = flat[block]
        _reflect_(padded, 1)
        _reflect_(padded, 2)
        if span is None:
            padded.div_(unit[block])
        else:
            stretch(padded, span[block], out=padded)
        torch.mul(_filter_windows(padded, planes), unit[block], out=filtered[block])
    return filtered.reshape(maps.shape)


def _reflect_(padded: Tensor, dim: int) -> None:
    """Fill the first and the last line of a dimension with the next but one, or the next where there is one only."""
    step = min(2, padded.shape[dim] - 2)
    padded.select(dim, 0).copy_(padded.select(dim, step))
    padded.select(dim, -1).copy_(padded.select(dim, -1 - step))


# what is left to compare where the rows and the columns of nine values `[3 3]` are sorted
_NINE_SORTED = ((1, 3), (5, 7), (2, 6), (2, 3), (5, 6), (3, 4), (4, 5))


def _filter_windows(padded: Tensor, planes: Tensor) -> Tensor:
    """The filter on every 3x3 window of `padded [map h+2 w+2]`: a view `[map h w]` of the scratch `planes`.

    Rows keep their two columns of padding until the end, so that the neighbours on the right are one flat plane
    further on; what this reads across the end of a row lands in those columns.
    """
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    above, here, below = (padded[:, i : i + height] for i in range(3))

    # sums over columns of three and then over windows: of the values, and of their squares
    columns, sums = planes[:2], planes[3:5]
    torch.add(above, here, out=columns[0]).add_(below)
    torch.mul(above, above, out=columns[1]).addcmul_(here, here).addcmul_(below, below)
    left, middle, right = _neighbours(columns)
    torch.add(left, middle, out=_neighbours(sums)[0]).add_(right)

    # ranks: a sorted column serves three windows; then the lowest of three columns are sorted, the middle, the highest
    columns, rows = planes[:3], planes[5:14].unflatten(0, (3, 3))
    _sort_three((above, here, below), *columns)
    _sort_three(_neighbours(columns), *(_neighbours(each)[0] for each in rows))
    ranked = [rows[row, column].flatten() for column in range(3) for row in range(3)]
    spare = planes[14].flatten()
    for a, b in _NINE_SORTED:
        torch.minimum(ranked[a], ranked[b], out=spare)
        torch.maximum(ranked[a], ranked[b], out=ranked[b])
        ranked[a], spare = spare, ranked[a]

    # a rank d away from the median weighs q^(d^2) with q = exp(-mean^2 / (2 variance)). That the variance is a
    # difference of sums does no harm: it is off by 1e-6 of mean^2, and q vanishes below 0.03 of it
    total, squares = sums.flatten(1)
    square = total.mul_(total).clamp_(min=1e-30)  # with the next bound: without spread q is 0
    spread = squares.sub_(square, alpha=1 / 9).clamp_(min=1e-38)
    (q, q4, q9), q16 = planes[:3].flatten(1), spare
    torch.div(square, spread, out=q).mul_(-1 / 18).clamp_(min=-60.0).exp_()  # exp is slow where it underflows
    torch.mul(q, q, out=q4).mul_(q4)
    torch.mul(q4, q4, out=q16)
    torch.mul(q16, q, out=q9)
    q16.mul_(q16)
    result = ranked[4]
    for distance, weight in enumerate((q, q4, q9, q16), start=1):
        result.addcmul_(weight, ranked[4 - distance].add_(ranked[4 + distance]))
    result.div_(q.add_(q4).add_(q9).add_(q16).mul_(2).add_(1))
    return result.view(-1, height, width + 2)[:, :, :width]


def _neighbours(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel of planes in a row, the one after it and the one after that, but for the last two."""
    flat = planes.view(-1)
    return flat[:-2], flat[1:-1], flat[2:]


def _sort_three(values: Sequence[Tensor], low: Tensor, middle: Tensor, high: Tensor) -> None:
    """Sort three planes pixel by pixel into three others."""
    a, b, c = values
    torch.minimum(a, b, out=low)
    torch.maximum(a, b, out=high)
    torch.minimum(high, c, out=middle)
    torch.maximum(high, c, out=high)
    torch.maximum(low, middle, out=middle)
    torch.minimum(low, c, out=low)


def multiscale(
    maps: Sequence[Tensor],
    weights: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    span: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Upsample the maps of every scale to one grid, or to the image's size, and sum them (MSEA).

    Bilinear with half-pixel centres (`align_corners=False`), which is a matrix for the rows and one for the
    columns of a scale. The matrices for the rows stand side by side, so that their product is the sum of all scales.

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
    targets, frames = maps[0].shape[:2]
    height, width = size
    resized = [index for index, each in enumerate(maps) if each.shape[-2:] != (height, width)]
    to_rows = [_interpolation(maps[index].shape[-2], height, weights.device) for index in resized]
    to_columns = [_interpolation(maps[index].shape[-1], width, weights.device).T for index in resized]
    to_all_rows = torch.cat(to_rows, dim=1) if resized else None

    result = torch.empty(targets, frames, height, width, dtype=dtype, device=weights.device)
    extremes = torch.empty(targets, 2, dtype=torch.float32, device=weights.device)
    block_size = max(1, BLOCK_BYTES // (4 * 2 * frames * height * width))
    buffer = torch.empty(min(targets, block_size), frames, height, width, dtype=torch.float32, device=weights.device)
    for block in _blocks(targets, block_size):
        total = result[block] if dtype == torch.float32 else buffer[: block.stop - block.start]
        weight = weights[block, :, None, None, None]
        if to_all_rows is None:
            total.zero_()
        else:
            with without_autocast(weights):
                wide = [
                    (maps[index][block] * weight[:, index]).flatten(0, 1) @ matrix
                    for index, matrix in zip(resized, to_columns, strict=True)
                ]
                torch.matmul(to_all_rows, torch.cat(wide, dim=1), out=total.flatten(0, 1))
        for index, each in enumerate(maps):
            if index not in resized:
                total.addcmul_(each[block], weight[:, index])
        extremes[block] = _extremes(total)
        if dtype == torch.uint8:
            stretch(total, extremes[block] if span is None else span[block], out=total).mul_(255).round_()
        if dtype != torch.float32:
            result[block] = total
    return result, extremes


def _interpolation(size: int, new_size: int, device: torch.device) -> Tensor:
    """`[new_size size]`: how the pixels of one side make up those of another."""
    source = (torch.arange(new_size, dtype=torch.float64, device="cpu") + 0.5) * size / new_size - 0.5
    distance = source.clamp_(0, size - 1)[:, None] - torch.arange(size, device="cpu")
    return (1 - distance.abs()).clamp_(min=0).float().to(device)
