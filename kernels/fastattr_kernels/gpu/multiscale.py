"""Multi-scale sums, upsampled: evaluated at the points where they bend, and drawn as straight lines in between.

Bilinear interpolation bends at the centres of its source pixels and nowhere else. Between the merged centres of all
scales, the knots, the weighted sum is therefore bilinear itself, whatever the number of scales: a pixel costs one
multiply-add and its store.

Bytes onto an image: maps read, knots written and read, all small; result written, 4, 2 or 1 bytes a pixel. Onto a grid
about as coarse as the knots: maps read, result written.

NaN in a map comes out of every pixel that weighs it above zero and of its target's extremes, and at most of the pixels
next to them; uint8 has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattr_kernels import backend
from fastattr_kernels.reference import stretch


@dataclass(frozen=True)
class Tile:
    """What one program covers: a rectangle of points, or of an image `rows` cells by `columns` pixels."""

    rows: int
    columns: int
    warps: int


# by architecture
SUM_TILES: dict[str, Tile] = {}
DEFAULT_SUM_TILE = Tile(rows=16, columns=16, warps=1)
# ... and by the bytes of a pixel, so that a thread of a warp of 32 stores 16 at once; 0 where nothing is stored
IMAGE_TILES = {("gfx942", 4): Tile(rows=8, columns=256, warps=1)}
DEFAULT_IMAGE_TILES = {
    0: Tile(rows=8, columns=256, warps=1),
    1: Tile(rows=8, columns=512, warps=1),
    2: Tile(rows=8, columns=256, warps=1),
    4: Tile(rows=8, columns=256, warps=2),
}
REDUCED = 128  # values looked at together for the extremes of a target


@dataclass(frozen=True)
class Points:
    """Points along one side, as each scale reads them: between which of its pixels, and how far along."""

    size: Tensor  # int32 [scale], the pixels along this side
    index: Tensor  # int32 [scale point]
    fraction: Tensor  # float32 [scale point], to the next pixel; 1 at the last


@dataclass(frozen=True)
class Cells:
    """The pixels along one side of an image, as they lie between the knots."""

    index: Tensor  # int32 [pixel], the cell, and so the knot at its start
    fraction: Tensor  # float32 [pixel], how far along to the next knot
    first: Tensor  # int32 [knot], the first pixel from there on; of the last knot, the number of pixels


@backend.on_device_of(1)
def multiscale(
    maps: Sequence[Tensor],
    weights: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    span: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Upsample the maps of every scale and sum them; see `reference.multiscale`."""
    if not maps:
        raise ValueError("multiscale got no maps, expected at least one scale")
    if dtype not in (torch.float32, torch.float16, torch.uint8):
        raise ValueError(f"dtype is {dtype}, expected float32, float16 or uint8")
    height, width = size
    # a lone pixel is doubled, so that every pixel has a next one or is it
    maps = [each.expand(-1, -1, max(2, each.shape[2]), max(2, each.shape[3])) for each in maps]
    heights, widths = tuple(each.shape[2] for each in maps), tuple(each.shape[3] for each in maps)
    if 2 * len(_knots(heights, height)) * len(_knots(widths, width)) >= height * width:
        rows, columns = _pixels(heights, height, weights.device), _pixels(widths, width, weights.device)
        return _finish(_sum(maps, weights, rows, columns), dtype, span)
    rows, columns = _at_knots(heights, height, weights.device), _at_knots(widths, width, weights.device)
    knots = _sum(maps, weights, rows, columns)

    out = torch.empty(*knots.shape[:2], height, width, dtype=dtype, device=knots.device)
    lines, pixels = _cells(heights, height, knots.device), _cells(widths, width, knots.device)
    if dtype != torch.uint8:
        return out, _reduce(*_draw(knots, lines, pixels, out, None))
    ends = _cells(widths, width, knots.device, ends_only=True)  # where a cell has its extremes, but for rounding
    extremes = _reduce(*_draw(knots, lines, ends, None, None))
    _draw(knots, lines, pixels, out, extremes if span is None else span)
    return out, extremes


def _finish(total: Tensor, dtype: torch.dtype, span: Tensor | None) -> tuple[Tensor, Tensor]:
    """A grid is small, so its extremes and another dtype may take a pass each."""
    extremes = _reduce(total.flatten(1), total.flatten(1))
    if dtype == torch.uint8:
        total = stretch(total, extremes if span is None else span).mul_(255).round_()
    return total.to(dtype), extremes


def _sum(maps: Sequence[Tensor], weights: Tensor, rows: Points, columns: Points) -> Tensor:
    """The weighted sum at each of the points, float32 `[target t row column]`."""
    tile = SUM_TILES.get(backend.architecture(weights.device), DEFAULT_SUM_TILE)
    targets, frames = maps[0].shape[:2]
    n_rows, n_columns = rows.index.shape[1], columns.index.shape[1]
    across = triton.cdiv(n_columns, tile.columns)
    tiles = triton.cdiv(n_rows, tile.rows) * across
    out = torch.empty(targets, frames, n_rows, n_columns, dtype=torch.float32, device=weights.device)
    _sum_kernel[(targets * frames * tiles,)](
        tuple(each.float().contiguous() for each in maps),
        weights.float().contiguous(),
        rows.size,
        rows.index,
        rows.fraction,
        columns.size,
        columns.index,
        columns.fraction,
        out,
        frames,
        n_rows,
        n_columns,
        across,
        tiles,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return out


def _draw(knots: Tensor, rows: Cells, columns: Cells, out: Tensor | None, span: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fill `out [target t h w]`, stretched where there is a span; without one, the extremes found by each program."""
    pixel_bytes = 0 if out is None else out.itemsize
    tile = IMAGE_TILES.get((backend.architecture(knots.device), pixel_bytes), DEFAULT_IMAGE_TILES[pixel_bytes])
    targets, frames, n_rows, n_columns = knots.shape
    height, width = len(rows.index), len(columns.index)
    across = triton.cdiv(width, tile.columns)
    tiles = triton.cdiv(n_rows - 1, tile.rows) * across
    lows, highs = torch.empty(
        2, targets, frames * tiles if span is None else 0, dtype=torch.float32, device=knots.device
    )
    _draw_kernel[(targets * frames * tiles,)](
        knots,
        rows.first,
        rows.fraction,
        columns.index,
        columns.fraction,
        out,
        None if span is None else span.contiguous(),
        lows,
        highs,
        frames,
        n_rows,
        n_columns,
        height,
        width,
        across,
        tiles,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return lows, highs


def _reduce(lows: Tensor, highs: Tensor) -> Tensor:
    """The least of `lows [target n]` and the greatest of `highs`, `[target 2]`."""
    targets, n = lows.shape
    extremes = torch.empty(targets, 2, dtype=torch.float32, device=lows.device)
    _reduce_kernel[(targets,)](lows, highs, extremes, n, BLOCK=REDUCED, num_warps=1)
    return extremes


# the tables below are tiny and belong to the sizes, so they are made once


@lru_cache(maxsize=256)
def _knots(sizes: tuple[int, ...], pixels: int) -> Tensor:
    """Where along `pixels` the sum bends: the centres of the source pixels, and both ends; float64, ascending."""
    centres = torch.cat(
        [(torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * pixels / size - 0.5 for size in sizes]
    )
    end = max(1, pixels - 1)  # two knots make a cell, also around a lone pixel
    inside = centres[(centres > 0) & (centres < end)]
    return torch.cat([inside, inside.new_tensor([0, end])]).unique()


@lru_cache(maxsize=256)
def _pixels(sizes: tuple[int, ...], pixels: int, device: torch.device) -> Points:
    return _points(torch.arange(pixels, dtype=torch.float64, device="cpu"), sizes, pixels, device)


@lru_cache(maxsize=256)
def _at_knots(sizes: tuple[int, ...], pixels: int, device: torch.device) -> Points:
    return _points(_knots(sizes, pixels), sizes, pixels, device)


def _points(points: Tensor, sizes: tuple[int, ...], pixels: int, device: torch.device) -> Points:
    size = torch.tensor(sizes, device="cpu")[:, None]
    sources = ((points + 0.5) * size / pixels - 0.5).clamp_(min=0).minimum(size - 1)
    index = sources.floor().minimum(size - 2)
    return Points(size[:, 0].int().to(device), index.int().to(device), (sources - index).float().to(device))


@lru_cache(maxsize=256)
def _cells(sizes: tuple[int, ...], pixels: int, device: torch.device, *, ends_only: bool = False) -> Cells:
    """All pixels, or the first and the last of each cell."""
    knots = _knots(sizes, pixels)
    first = knots.ceil()
    first[-1] = pixels
    points = (
        torch.cat([first[:-1], first[1:] - 1]).unique()
        if ends_only
        else torch.arange(pixels, dtype=torch.float64, device="cpu")
    )
    index = (torch.searchsorted(knots, points, right=True) - 1).clamp_(max=len(knots) - 2)
    fraction = (points - knots[index]) / (knots[index + 1] - knots[index])
    return Cells(index.int().to(device), fraction.float().to(device), first.int().to(device))


@triton.jit
def _sum_kernel(
    maps,
    weights_ptr,
    heights_ptr,
    row_ptr,
    row_fraction_ptr,
    widths_ptr,
    column_ptr,
    column_fraction_ptr,
    out_ptr,
    frames,
    n_rows,
    n_columns,
    across,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of points of one frame."""
    frame = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    # what lies outside is read as the last point, and not stored
    y, x = tl.minimum(row, n_rows - 1), tl.minimum(column, n_columns - 1)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for scale in tl.static_range(len(maps)):
        height, width = tl.load(heights_ptr + scale), tl.load(widths_ptr + scale)
        source_y = tl.load(row_ptr + scale * n_rows + y)[:, None]
        source_x = tl.load(column_ptr + scale * n_columns + x)[None, :]
        down = tl.load(row_fraction_ptr + scale * n_rows + y)[:, None]
        along = tl.load(column_fraction_ptr + scale * n_columns + x)[None, :]
        corner = maps[scale] + frame.to(tl.int64) * height * width + (source_y * width + source_x)
        top = _between(tl.load(corner), tl.load(corner + 1), along)
        bottom = _between(tl.load(corner + width), tl.load(corner + width + 1), along)
        weight = tl.load(weights_ptr + (frame // frames).to(tl.int64) * len(maps) + scale)
        total = tl.fma(_between(top, bottom, down), weight, total)

    out_ptr += frame.to(tl.int64) * n_rows * n_columns
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    tl.store(out_ptr + row[:, None] * n_columns + column[None, :], total, mask=inside)


@triton.jit
def _draw_kernel(
    knots_ptr,
    first_ptr,
    row_fraction_ptr,
    column_ptr,
    column_fraction_ptr,
    out_ptr,
    span_ptr,
    lows_ptr,
    highs_ptr,
    frames,
    n_rows,
    n_columns,
    height,
    width,
    across,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some cells of one frame, from top to bottom; down a column of pixels the value is linear within a cell."""
    frame = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first_cell = tile // across * ROWS
    last_cell = tl.minimum(first_cell + ROWS, n_rows - 1)
    x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = x < width
    # what lies outside repeats the first column, so that it changes no extreme
    column = tl.load(column_ptr + x, mask=inside, other=0)
    fraction = tl.load(column_fraction_ptr + x, mask=inside, other=0.0)
    knots_ptr += frame.to(tl.int64) * n_rows * n_columns + column
    if out_ptr is not None:
        out_ptr += frame.to(tl.int64) * height * width + x
    low, scale = 0.0, 1.0
    if span_ptr is not None:
        low = tl.load(span_ptr + frame // frames * 2)
        high = tl.load(span_ptr + frame // frames * 2 + 1)
        scale = tl.where(high > low, 1.0 / tl.maximum(high - low, 1.2e-38), 0.0)
    lowest = tl.full((COLUMNS,), float("inf"), tl.float32)
    highest = tl.full((COLUMNS,), float("-inf"), tl.float32)

    bottom = _knot_row(knots_ptr + first_cell * n_columns, fraction, low, scale)
    for cell in range(first_cell, last_cell):
        top = bottom
        bottom = _knot_row(knots_ptr + (cell + 1) * n_columns, fraction, low, scale)
        slope = bottom - top
        start, stop = tl.load(first_ptr + cell), tl.load(first_ptr + cell + 1)
        if span_ptr is None and start < stop:  # rounding keeps the order, so the extremes of a line are its ends
            one = tl.fma(slope, tl.load(row_fraction_ptr + start), top)
            other = tl.fma(slope, tl.load(row_fraction_ptr + stop - 1), top)
            lowest = _lower(lowest, _lower(one, other))
            highest = _higher(highest, _higher(one, other))
        if out_ptr is not None:
            for y in range(start, stop):
                value = tl.fma(slope, tl.load(row_fraction_ptr + y), top)
                if span_ptr is not None:
                    value = _round(value)
                # streamed past the caches, which hold the knots
                tl.store(out_ptr + y * width, value, mask=inside, cache_modifier=".cs")
    if span_ptr is None:
        tl.store(lows_ptr + tl.program_id(0), tl.reduce(lowest, 0, _lower))
        tl.store(highs_ptr + tl.program_id(0), tl.reduce(highest, 0, _higher))


@triton.jit
def _knot_row(knots_ptr, fraction, low, scale):
    """A row of knots at each column of pixels; stretched here, because a stretched line is a line."""
    left, right = tl.load(knots_ptr), tl.load(knots_ptr + 1)
    return (_between(left, right, fraction) - low) * scale


@triton.jit
def _between(start, end, fraction):
    """Exact at both ends."""
    return tl.fma(end, fraction, tl.fma(start, -fraction, start))


@triton.jit
def _round(value):
    """[0, 1] to 0..255; added to 2^23, a number is rounded to its last bits."""
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    return tl.fma(value, 255.0, 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def _reduce_kernel(lows_ptr, highs_ptr, extremes_ptr, n, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        index = tl.minimum(start + tl.arange(0, BLOCK), n - 1)
        lowest = _lower(lowest, tl.load(lows_ptr + target * n + index))
        highest = _higher(highest, tl.load(highs_ptr + target * n + index))
    tl.store(extremes_ptr + target * 2, tl.reduce(lowest, 0, _lower))
    tl.store(extremes_ptr + target * 2 + 1, tl.reduce(highest, 0, _higher))


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
