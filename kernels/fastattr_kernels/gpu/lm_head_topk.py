"""Ordered top-k of the full vocabulary, and the log-sum-exp, without the logits in memory.

Three roads, one result, the one that `reference.lm_head_summary` defines:

* `filtered_summary`: chunk by chunk, a library product writes float32 logits to a workspace that stays in the L2,
  and a filter keeps what beats the k-th best logit so far.
* `fused_summary`: the same, but the product is ours and also writes the greatest logit of every `GROUP` columns;
  the filter reads only groups that can win.
* `reference.lm_head_summary`: any k.

A filter appends to a fixed number of slots. When they are full it sorts them, keeps the best k and raises its
floor. So slots never overflow, and the host neither waits nor decides: the data change only the time it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattr_kernels import backend, reference

GREATEST_K = 256  # beyond it the slots outgrow the workspace
ROWS = 1024  # positions that share one pass over the output embeddings; such a product is bound by compute
PROGRAMS = 1024  # filters at once; with fewer rows, each row is split
FEWEST_SLOTS = 256
FEWEST_BEST = 16  # one compiled kernel serves all smaller k
MOST_KEYS = 4096  # that one program sorts
STEP = tl.constexpr(16)  # keys compared at once
GROUP = 16  # columns whose greatest logit says whether to read them


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched on one architecture."""

    filtered_bytes: int = 12 * 2**20  # of logits in the workspace: 3072 columns of 1024 rows
    fused_bytes: int = 8 * 2**20  # 128 tiles of the product, one for each multiprocessor
    filter_columns: int = 1024
    filter_warps: int = 4
    product_rows: int = 128
    product_columns: int = 128
    product_dim: int = 64
    product_warps: int = 8
    product_stages: int = 3
    fused: range = range(0)  # numbers of positions that take the fused road


# Chosen from compiled code. Nothing is measured on a GPU yet, so nothing takes the fused road.
LAUNCHES = {
    "sm_90": Launch(product_stages=4),
    "sm_100": Launch(product_stages=4),
    "gfx942": Launch(product_dim=32, product_stages=2),
}


def launch_on(device: torch.device) -> Launch:
    """How the kernels are launched on `device`."""
    return LAUNCHES.get(backend.architecture(device), Launch())


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
    """See `reference.lm_head_topk`."""
    ids, values, _ = _choose(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, with_logsumexp=False)
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
    """See `reference.lm_head_summary`."""
    return _choose(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, with_logsumexp=True)


def _choose(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int | None,
    with_logsumexp: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if k > GREATEST_K:
        road = reference.lm_head_summary
    else:
        launch = launch_on(hidden.device)
        fused = len(hidden) in launch.fused and hidden.dtype == weight.dtype != torch.float32
        road = partial(_filtered, launch=launch, fused=fused, with_logsumexp=with_logsumexp)
    return road(hidden, weight, k, bias, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab)


@backend.on_device_of(0)
def _filtered(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    with_logsumexp: bool = True,
    fused: bool,
    launch: Launch | None = None,
    fewest_slots: int = FEWEST_SLOTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.lm_head_summary` for k up to `GREATEST_K`; without the log-sum-exp the third result is empty.

    Bytes: the output embeddings are read once per `ROWS` positions. Each float32 logit is written once to the
    workspace; it is read once, or if fused one in `GROUP` is and few others are. All of it fits the L2.
    """
    vocab = reference.vocabulary(weight, valid_vocab, k)
    if k > GREATEST_K:
        raise ValueError(f"k is {k}, expected 1 to {min(vocab, GREATEST_K)} for a vocabulary of {vocab} ids")
    if fused and hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, expected {weight.dtype}, as the output embeddings are")
    launch = launch or launch_on(hidden.device)
    positions, dim, device = len(hidden), hidden.shape[1], hidden.device

    # evenly filled blocks of rows, whose views stay aligned; chunks of whole tiles
    blocks = max(1, triton.cdiv(positions, ROWS))
    rows = 16 * max(1, triton.cdiv(positions, 16 * blocks))
    workspace_bytes = launch.fused_bytes if fused else launch.filtered_bytes
    tiles = min(workspace_bytes // (4 * rows * launch.filter_columns), triton.cdiv(vocab, launch.filter_columns))
    width = max(1, tiles) * launch.filter_columns
    best = max(FEWEST_BEST, triton.next_power_of_2(k))
    slots = max(fewest_slots, 2 * best)
    splits = max(1, min(PROGRAMS // rows, tiles, MOST_KEYS // slots))
    splits = triton.next_power_of_2(splits + 1) // 2  # rounded down

    keys = torch.empty(rows, splits, slots, dtype=torch.int64, device=device)
    counts = torch.empty(rows, splits, dtype=torch.int32, device=device)
    floors = torch.empty(rows, splits, dtype=torch.float32, device=device)
    sums = torch.empty(rows, splits, 2, dtype=torch.float32, device=device)
    maxima = sums_of_tiles = None
    if fused:
        logits = torch.empty(rows, width, dtype=torch.float32, device=device)
        maxima = torch.empty(rows, width // GROUP, dtype=torch.float32, device=device)
        sums_of_tiles = torch.empty(rows, width // launch.product_columns, 2, dtype=torch.float32, device=device)
    ids = torch.empty(positions, k, dtype=torch.int32, device=device)
    values = torch.empty(positions, k, dtype=torch.float32, device=device)
    logsumexp = torch.empty(positions if with_logsumexp else 0, dtype=torch.float32, device=device)

    scale = None if logit_scale == 1.0 else logit_scale
    for first_row in range(0, positions, rows):
        block = hidden[first_row : first_row + rows]
        for first in range(0, vocab, width):
            chunk = weight[first : min(vocab, first + width)]
            columns = len(chunk)
            if fused:
                grid = (triton.cdiv(len(block), launch.product_rows), triton.cdiv(columns, launch.product_columns))
                _product[grid](
                    block,
                    chunk,
                    bias,
                    logits,
                    maxima,
                    sums_of_tiles,
                    len(block),
                    columns,
                    dim,
                    first,
                    width,
                    *block.stride(),
                    *chunk.stride(),
                    scale,
                    softcap,
                    WITH_LOGSUMEXP=with_logsumexp,
                    ROWS=launch.product_rows,
                    COLUMNS=launch.product_columns,
                    DIM=launch.product_dim,
                    GROUP=GROUP,
                    num_warps=launch.product_warps,
                    num_stages=launch.product_stages,
                )
            else:
                logits = reference.head_logits(block, chunk, None, 1.0, None)
            _filter[(len(block), splits)](
                logits,
                maxima,
                sums_of_tiles,
                bias,
                keys,
                counts,
                floors,
                sums,
                logits.stride(0),
                columns,
                triton.cdiv(columns, splits * launch.filter_columns) * launch.filter_columns,
                first,
                k,
                scale,
                softcap,
                WITH_LOGSUMEXP=with_logsumexp,
                COLUMNS=launch.filter_columns,
                TILE=launch.product_columns,
                GROUP=GROUP,
                SLOTS=slots,
                num_warps=launch.filter_warps,
            )
            if not fused:
                del logits  # the next chunk takes its place
        _merge[(len(block),)](
            keys,
            counts,
            sums,
            ids[first_row:],
            values[first_row:],
            logsumexp[first_row:],
            k,
            WITH_LOGSUMEXP=with_logsumexp,
            SPLITS=splits,
            SLOTS=slots,
            BEST=best,
            num_warps=8 if splits * slots > 1024 else 4,
        )
    return ids, values, logsumexp


filtered_summary = partial(_filtered, fused=False)
fused_summary = partial(_filtered, fused=True)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32; a finite start needs no care for -inf minus -inf
NO_KEY = tl.constexpr(-(2**63))  # below every key


@triton.jit
def _filter(
    logits,  # float32 [row column]; before bias, scale and soft-cap where there are no maxima
    maxima,  # float32 [row group] or None: the greatest of every GROUP finished logits
    sums_of_tiles,  # float32 [row tile 2] or None: maximum and scaled sum of exponentials of every TILE columns
    bias,  # [vocab] or None
    keys,  # int64 [row split slot], candidates
    counts,  # int32 [row split], slots in use
    floors,  # float32 [row split], what later columns must beat; NaN until k columns are seen
    sums,  # float32 [row split 2], maximum and scaled sum of exponentials
    stride,
    columns,
    columns_per_split,
    first,  # id of the first column
    k,
    scale,
    softcap,
    WITH_LOGSUMEXP: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One split of one row: candidates of this chunk join those of the chunks before."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    logits += tl.program_id(0).to(tl.int64) * stride
    keys += program.to(tl.int64) * SLOTS
    resumed = first > 0
    count = tl.load(counts + program, mask=resumed, other=0)
    floor = tl.load(floors + program, mask=resumed, other=float("nan"))
    maximum = tl.load(sums + program * 2, mask=resumed & WITH_LOGSUMEXP, other=LOWEST)
    total = tl.load(sums + program * 2 + 1, mask=resumed & WITH_LOGSUMEXP, other=0.0)

    lane = tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    for start in range(begin, end, COLUMNS):
        inside = lane < end - start
        if maxima is None:
            read = inside
        else:
            group = tl.arange(0, COLUMNS // GROUP)
            row = maxima + tl.program_id(0).to(tl.int64) * (stride // GROUP)
            greatest = tl.load(row + start // GROUP + group, mask=group * GROUP < end - start, other=-float("inf"))
            wins = tl.broadcast_to(_beats(greatest, floor)[:, None], [COLUMNS // GROUP, GROUP])
            read = inside & wins.reshape([COLUMNS])
        value = tl.load(logits + start + lane, mask=read, other=-float("inf"))
        if maxima is None:
            value = _finish(value, bias, first + start + lane, inside, scale, softcap)
            value = tl.where(inside, value, -float("inf"))

        if WITH_LOGSUMEXP:
            if maxima is None:
                maximum, total = _accumulate(maximum, total, value, 1.0)
            else:
                tile = tl.arange(0, COLUMNS // TILE)
                row = sums_of_tiles + tl.program_id(0).to(tl.int64) * (stride // TILE * 2)
                tile_inside = tile * TILE < end - start
                tile_maximum = tl.load(row + (start // TILE + tile) * 2, mask=tile_inside, other=LOWEST)
                tile_total = tl.load(row + (start // TILE + tile) * 2 + 1, mask=tile_inside, other=0.0)
                maximum, total = _accumulate(maximum, total, tile_maximum, tile_total)

        count, floor = _append(keys, count, floor, value, first + start + lane, read, k, SLOTS)

    tl.store(counts + program, count)
    tl.store(floors + program, floor)
    if WITH_LOGSUMEXP:
        tl.store(sums + program * 2, maximum)
        tl.store(sums + program * 2 + 1, total)


@triton.jit
def _append(keys, count, floor, value, column_id, inside, k, SLOTS: tl.constexpr):
    """Append what beats the floor; whenever the slots are full, keep the best k and raise the floor."""
    wins = inside & _beats(value, floor)
    waiting = tl.sum(wins.to(tl.int32))
    if waiting > 0:  # most tiles end here
        key = _key(value, column_id)
        while waiting > 0:
            place = count + tl.cumsum(wins.to(tl.int32)) - 1
            tl.store(keys + place, key, mask=wins & (place < SLOTS))
            count += waiting
            waiting -= waiting
            if count > SLOTS:
                floor = _keep_best(keys, k, SLOTS)
                # ids ascend, so a later column must be greater: a tie with the k-th best goes to the lower id
                wins = wins & (place >= SLOTS) & _beats(value, floor)
                count = tl.minimum(count, k)
                waiting = tl.sum(wins.to(tl.int32))
    return count, floor


@triton.jit
def _keep_best(keys, k, SLOTS: tl.constexpr):
    """Of full slots, move the best k to the front, in their order, which is that of ids. Returns the k-th value."""
    tl.debug_barrier()  # what other threads appended is seen
    key = tl.load(keys + tl.arange(0, SLOTS))
    ordered = (key >> 32).to(tl.int32)
    kth = _kth(ordered, k, 32)
    greater = (ordered > kth).to(tl.int32)
    equal = (ordered == kth).to(tl.int32)
    kept = (greater > 0) | ((equal > 0) & (tl.cumsum(equal) <= k - tl.sum(greater)))
    tl.debug_barrier()  # all threads have read
    tl.store(keys + tl.cumsum(kept.to(tl.int32)) - 1, key, mask=kept)
    return _ordered(kth).to(tl.float32, bitcast=True)


@triton.jit
def _kth(integers, k, BITS: tl.constexpr):
    """The k-th greatest, found bit by bit: the greatest number that k of the integers reach."""
    kth = tl.full([], -(2 ** (BITS - 1)), integers.dtype)
    bit = kth  # first the sign: flipped, it makes the number greater
    while bit != 0:
        raised = kth ^ bit
        kth = tl.where(tl.sum((integers >= raised).to(tl.int32)) >= k, raised, kth)
        bit = (bit >> 1) & (2 ** (BITS - 1) - 1)
    return kth


@triton.jit
def _merge(
    keys,  # of which the first k of a row are overwritten
    counts,
    sums,
    ids,  # int32 [row k]
    values,  # float32 [row k]
    logsumexp,  # float32 [row]
    k,
    WITH_LOGSUMEXP: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BEST: tl.constexpr,
):
    """The best k candidates of all splits of one row, in order."""
    row = tl.program_id(0).to(tl.int64)
    keys += row * (SPLITS * SLOTS)
    slot = tl.arange(0, SPLITS * SLOTS)
    used = slot % SLOTS < tl.load(counts + row * SPLITS + slot // SLOTS)
    key = tl.load(keys + slot, mask=used, other=NO_KEY)
    kept = key >= _kth(key, k, 64)
    tl.debug_barrier()  # all threads have read
    tl.store(keys + tl.cumsum(kept.to(tl.int32)) - 1, key, mask=kept)
    tl.debug_barrier()  # what other threads stored is seen

    # keys are distinct: as many as are greater come before
    mine = tl.arange(0, BEST)
    key = tl.load(keys + mine, mask=mine < k, other=NO_KEY)
    rank = tl.zeros([BEST], tl.int32)
    for start in range(0, k, STEP):
        other = start + tl.arange(0, STEP)
        other_key = tl.load(keys + other, mask=other < k, other=NO_KEY)
        rank += tl.sum((other_key[None, :] > key[:, None]).to(tl.int32), axis=1)
    tl.store(ids + row * k + rank, _id(key), mask=mine < k)
    tl.store(values + row * k + rank, _value(key), mask=mine < k)
    if WITH_LOGSUMEXP:
        split = row * SPLITS + tl.arange(0, SPLITS)
        split_maximum = tl.load(sums + split * 2)
        maximum = tl.max(split_maximum)
        total = tl.sum(tl.load(sums + split * 2 + 1) * tl.exp(split_maximum - maximum))
        tl.store(logsumexp + row, maximum + tl.log(total))


@triton.jit
def _product(
    hidden,  # [row dim]
    weight,  # [column dim]
    bias,  # [vocab] or None
    logits,  # float32 [row width]
    maxima,  # float32 [row group]
    sums_of_tiles,  # float32 [row tile 2]
    rows,
    columns,
    dim,
    first,  # id of the first column
    width,
    hidden_row_stride,
    hidden_dim_stride,
    weight_row_stride,
    weight_dim_stride,
    scale,
    softcap,
    WITH_LOGSUMEXP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of finished logits, with its maxima over groups and its sums of exponentials."""
    # row tiles run fastest, so that those at work share their output embeddings in the L2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # what lies outside reads the last line and is not written
    hidden += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_row_stride
    weight += tl.minimum(column, columns - 1).to(tl.int64)[None, :] * weight_row_stride
    index = tl.arange(0, DIM)
    hidden += index[None, :] * hidden_dim_stride
    weight += index[:, None] * weight_dim_stride
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, DIM):
        inside = index < dim - start
        left = tl.load(hidden, mask=inside[None, :], other=0.0)
        right = tl.load(weight, mask=inside[:, None], other=0.0)
        product = tl.dot(left, right, product, input_precision="ieee")
        hidden += DIM * hidden_dim_stride
        weight += DIM * weight_dim_stride

    inside = column < columns
    value = _finish(product, bias, (first + column)[None, :], inside[None, :], scale, softcap)
    value = tl.where(inside[None, :], value, -float("inf"))
    is_row = row < rows
    row = row.to(tl.int64)
    tl.store(logits + row[:, None] * width + column[None, :], value, mask=is_row[:, None])
    # NaN ranks with -inf, here as well
    clean = tl.where(value == value, value, -float("inf"))
    greatest = tl.max(clean.reshape([ROWS, COLUMNS // GROUP, GROUP]), axis=2)
    group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    tl.store(maxima + row[:, None] * (width // GROUP) + group[None, :], greatest, mask=is_row[:, None])
    if WITH_LOGSUMEXP:
        maximum = _finite(tl.max(greatest, axis=1))
        total = tl.sum(tl.exp(value - maximum[:, None]), axis=1)
        tile = (row * (width // COLUMNS) + tl.program_id(1)) * 2
        tl.store(sums_of_tiles + tile, maximum, mask=is_row)
        tl.store(sums_of_tiles + tile + 1, total, mask=is_row)


@triton.jit
def _finish(logit, bias, column_id, inside, scale, softcap):
    """`softcap * tanh(scale * (logit + bias) / softcap)`, without what is None."""
    if bias is not None:
        logit += tl.load(bias + column_id, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        logit *= scale
    if softcap is not None:
        logit = softcap * _tanh(logit / softcap)
    return logit


@triton.jit
def _tanh(x):
    """tanh to float32 accuracy: a continued fraction near zero, where the exponential form would cancel."""
    size = tl.minimum(tl.abs(x), 10.0, propagate_nan=tl.PropagateNan.ALL)  # beyond it 1, without overflow
    square = size * size
    near = x * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def _accumulate(maximum, total, value, weight):
    """Add `sum(weight * exp(value))` to what is `total * exp(maximum)`; the maximum rises with the values."""
    raised = tl.maximum(maximum, _finite(tl.max(value)))
    return raised, total * tl.exp(maximum - raised) + tl.sum(weight * tl.exp(value - raised))


@triton.jit
def _finite(maximum):
    """Infinite maxima would give NaN differences; with finite ones the sums become 0 and inf, as they should."""
    return tl.minimum(tl.maximum(maximum, LOWEST), -LOWEST)


@triton.jit
def _beats(value, floor):
    """Not `value > floor`: all that is seen before the floor is known (NaN) must be kept. NaN itself is kept, too."""
    return ~(value <= floor)


@triton.jit
def _key(value, column_id):
    """An integer that sorts as value, then lower id; NaN sorts as -inf, and -0 as 0."""
    value = tl.where(value == value, value, -float("inf"))
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return (_ordered(bits).to(tl.int64) << 32) | (0x7FFFFFFF - column_id).to(tl.int64)


@triton.jit
def _id(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value(key):
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits):
    """Bits of floats as integers of the same order; applied twice it gives the bits back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
