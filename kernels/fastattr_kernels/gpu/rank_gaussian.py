"""The rank-Gaussian filter: a lane walks down a few rows of one column and keeps three sorted rows at hand.

A row of a window is sorted once and serves the three windows it is part of, so a pixel costs 4.5 loads and 20.5
comparators instead of 9 and 25. Bytes: each map is read once from memory (its neighbours are in the L1 cache) and
written once, 8 bytes a pixel.

NaN comes out of every window it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattr_kernels import backend


@dataclass(frozen=True)
class Tile:
    """What one program covers: `lanes` columns of `rows` pixels."""

    lanes: int
    rows: int
    warps: int


# by architecture; the shape does not matter, because lanes run on from one strip of rows to the next
TILES = {"gfx942": Tile(lanes=64, rows=4, warps=1)}
DEFAULT_TILE = Tile(lanes=32, rows=4, warps=1)


@backend.on_device_of(0)
def rank_gaussian(maps: Tensor, span: Tensor | None = None) -> Tensor:
    """Normalise, then the rank-Gaussian filter; see `reference.rank_gaussian`."""
    tile = TILES.get(backend.architecture(maps.device), DEFAULT_TILE)
    targets, frames, height, width = maps.shape
    out = torch.empty_like(maps, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(triton.cdiv(height, tile.rows) * width, tile.lanes)
    _rank_gaussian[(targets * frames * blocks,)](
        maps.contiguous(),
        None if span is None else span.contiguous(),
        out,
        frames,
        height,
        width,
        blocks,
        ROWS=tile.rows,
        LANES=tile.lanes,
        num_warps=tile.warps,
    )
    return out


@triton.jit
def _rank_gaussian(maps_ptr, span_ptr, out_ptr, frames, height, width, blocks, ROWS: tl.constexpr, LANES: tl.constexpr):
    """One block of lanes of one map, filtered."""
    index = tl.program_id(0) // blocks
    lane = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    column = lane % width
    first = lane // width * ROWS
    low, high = 0.0, 1.0
    if span_ptr is not None:
        low = tl.load(span_ptr + index // frames * 2)
        high = tl.load(span_ptr + index // frames * 2 + 1)
    # an empty span gives zeros below; the reciprocal of a denormal one would be infinite
    scale = 1.0 / tl.maximum(high - low, 1.2e-38, propagate_nan=tl.PropagateNan.ALL)

    offset = index.to(tl.int64) * height * width
    left, right = maps_ptr + offset + _reflect(column - 1, width), maps_ptr + offset + _reflect(column + 1, width)
    middle = maps_ptr + offset + column
    out_ptr += offset + column
    STRETCH: tl.constexpr = span_ptr is not None
    above = _sorted_row(left, middle, right, _reflect(first - 1, height) * width, low, scale, STRETCH)
    here = _sorted_row(left, middle, right, _reflect(first, height) * width, low, scale, STRETCH)
    for step in tl.static_range(ROWS):
        row = first + step
        below = _sorted_row(left, middle, right, _reflect(row + 1, height) * width, low, scale, STRETCH)
        value = _filtered(above, here, below)
        if STRETCH:
            value = tl.where(high <= low, 0.0, value)
        tl.store(out_ptr + row * width, value, mask=row < height)
        above = here
        here = below


@triton.jit
def _reflect(position, size):
    """Mirrored at the first and at the last; what lies further outside belongs to no window and is only kept inside."""
    mirrored = tl.where(position < 0, -position, position)
    return tl.maximum(tl.minimum(mirrored, 2 * (size - 1) - mirrored), 0)


@triton.jit
def _sorted_row(left, middle, right, offset, low, scale, STRETCH: tl.constexpr):
    """Three values of a row, ascending, and their sum."""
    a, b, c = tl.load(left + offset), tl.load(middle + offset), tl.load(right + offset)
    if STRETCH:
        a, b, c = _stretch(a, low, scale), _stretch(b, low, scale), _stretch(c, low, scale)
    total = a + b + c  # before sorting, which loses NaN
    a, b, c = _sort_three(a, b, c)
    return a, b, c, total


@triton.jit
def _stretch(value, low, scale):
    return tl.clamp((value - low) * scale, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _filtered(a, b, c):
    """The weighted sum of nine values, given as three sorted rows."""
    r0, r3, r6 = _sort_three(a[0], b[0], c[0])
    r1, r4, r7 = _sort_three(a[1], b[1], c[1])
    r2, r5, r8 = _sort_three(a[2], b[2], c[2])
    r1, r3 = _sort_two(r1, r3)
    r5, r7 = _sort_two(r5, r7)
    r2, r6 = _sort_two(r2, r6)
    r4, r6 = _sort_two(r4, r6)
    r2, r4 = _sort_two(r2, r4)
    r2, r3 = _sort_two(r2, r3)
    r5, r6 = _sort_two(r5, r6)

    mean = (a[3] + b[3] + c[3]) * (1 / 9)
    squares = _squares(a, mean) + _squares(b, mean) + _squares(c, mean)
    # a rank d away from the median weighs q^(d^2), where 1 / sigma^2 is mean^2 / (squares / 9);
    # without spread q is 0, and NaN is no such case
    even = squares <= 0
    q = tl.where(even, 0.0, tl.exp(-4.5 * mean * mean / tl.where(even, 1.0, squares)))
    q2 = q * q
    q4 = q2 * q2
    q8 = q4 * q4
    q9, q16 = q8 * q, q8 * q8
    total = r4 + q * (r3 + r5) + q4 * (r2 + r6) + q9 * (r1 + r7) + q16 * (r0 + r8)
    return total / (1 + 2 * (q + q4 + q9 + q16))


@triton.jit
def _squares(row, mean):
    return (row[0] - mean) * (row[0] - mean) + (row[1] - mean) * (row[1] - mean) + (row[2] - mean) * (row[2] - mean)


@triton.jit
def _sort_three(a, b, c):
    a, b = _sort_two(a, b)
    b, c = _sort_two(b, c)
    a, b = _sort_two(a, b)
    return a, b, c


@triton.jit
def _sort_two(a, b):
    return tl.minimum(a, b), tl.maximum(a, b)
