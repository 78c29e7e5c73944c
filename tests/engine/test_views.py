"""Tiles laid back onto their picture: against painting, pixel by pixel, what each view sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattr
from fastattr import AttributionConfig, ImageGroup, OutputHead, TokenLayout, TokenLayoutError, View
from fastattr.method import explain_states
from fastattr.types import Box, ScaleStates
from fastattr.views import canvas, place


def group_of(*views: View) -> ImageGroup:
    grid, extent = canvas(views)
    return ImageGroup(tuple(range(sum(h * w for h, w in (view.grid for view in views)))), grid, extent, views)


def tiles(rows: int, columns: int, side: int) -> list[View]:
    return [
        View((side, side), (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows))
        for r in range(rows)
        for c in range(columns)
    ]


def seen(view: View, field: np.ndarray) -> torch.Tensor:
    """What a view reads of a finely painted picture: the mean of the pixels under each of its cells, 0 for padding."""
    height, width = field.shape
    h, w = view.grid
    left, top, right, bottom = view.box
    cells = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            y0, y1 = (top + (bottom - top) * k / h for k in (i, i + 1))
            x0, x1 = (left + (right - left) * k / w for k in (j, j + 1))
            part = field[
                round(max(0, y0) * height) : round(min(1, y1) * height),
                round(max(0, x0) * width) : round(min(1, x1) * width),
            ]
            cells[i, j] = part.mean() if part.size else 0.0
    return torch.from_numpy(cells).float().flatten()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 6), st.integers(0, 100))
def test_tiles_that_just_fit_are_the_picture(rows: int, columns: int, side: int, seed: int) -> None:
    """Without overlap every value comes back where its pixels are."""
    group = group_of(*tiles(rows, columns, side))
    assert group.grid == (1, rows * side, columns * side)
    assert group.extent == pytest.approx((0, 0, 1, 1))
    field = np.random.default_rng(seed).random((rows * side, columns * side))
    flat = torch.cat([seen(view, field) for view in group.views])
    torch.testing.assert_close(place(flat[None], group)[0, 0], torch.from_numpy(field).float())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.booleans())
def test_what_is_the_same_everywhere_stays_so(rows: int, columns: int, side: int, thumbnail_first: bool) -> None:
    thumbnail = View((side, side), (0, 0, 1, 1))
    views = tiles(rows, columns, side)
    group = group_of(*([thumbnail, *views] if thumbnail_first else [*views, thumbnail]))
    flat = torch.full((2, len(group.positions)), 0.7)
    torch.testing.assert_close(place(flat, group), torch.full((2, *group.grid), 0.7))


def test_each_view_weighs_as_many_tokens_as_it_shows_the_place_with() -> None:
    """Four tiles and the thumbnail, all of 2 x 2: a tile shows a place with four times as many tokens."""
    views = [*tiles(2, 2, 2), View((2, 2), (0, 0, 1, 1))]
    group = group_of(*views)
    flat = torch.cat([torch.ones(16), torch.zeros(4)])[None]
    torch.testing.assert_close(place(flat, group), torch.full((1, 1, 4, 4), 16 / 20))


@given(st.floats(0.05, 0.4), st.integers(0, 20))
def test_padding_is_left_out(border: float, seed: int) -> None:
    """A wide picture on a square with bars above and below: what the bars' tokens hold is nowhere on the map."""
    side = 20
    view = View((side, side), (0.0, -border, 1.0, 1.0 + border))
    group = group_of(view)
    _, height, width = group.grid
    assert width == side and abs(height - side / (1 + 2 * border)) <= 0.5
    rng = np.random.default_rng(seed)
    flat = torch.from_numpy(rng.random((side, side))).float()
    tops = torch.tensor([-border + (1 + 2 * border) * i / side for i in range(side + 1)])
    outside = (tops[1:] <= 0) | (tops[:-1] >= 1)
    spoiled = flat.clone()
    spoiled[outside] = 1e6
    once = place(flat.flatten()[None], group)
    again = place(spoiled.flatten()[None], group)
    # one row at each edge lies half on the picture and may be mixed with its neighbour in the bar
    torch.testing.assert_close(once[..., 1:-1, :], again[..., 1:-1, :])


def test_a_video_of_tiles_keeps_its_steps() -> None:
    views = (*tiles(1, 2, 2), View((2, 2), (0, 0, 1, 1)))
    (_, h, w), extent = canvas(views)
    group = ImageGroup(tuple(range(3 * 12)), (3, h, w), extent, views)
    flat = torch.arange(3.0).repeat_interleave(12)[None]
    assert torch.equal(place(flat, group)[0].amax(dim=(1, 2)), torch.arange(3.0))
    assert torch.equal(place(flat, group)[0].amin(dim=(1, 2)), torch.arange(3.0))


def test_a_picture_with_a_hole_is_refused() -> None:
    with pytest.raises(TokenLayoutError, match="4 of 16 cells of the picture are in none of its 3 views"):
        canvas(tiles(2, 2, 2)[:3])


@pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (0, 1, 1, 0)])
def test_a_view_of_nothing_is_refused(box: Box) -> None:
    with pytest.raises(TokenLayoutError, match="expected at least 1 x 1 cells, left < right and top < bottom"):
        View((2, 2), box)


def test_as_many_positions_as_the_views_need() -> None:
    with pytest.raises(TokenLayoutError, match="holds 3 positions but its 1 views need 4"):
        ImageGroup((0, 1, 2), (1, 2, 2), views=(View((2, 2), (0, 0, 1, 1)),))


@pytest.mark.parametrize("method", ["lens", "tam", "arc"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tiles_that_just_fit_are_explained_as_the_grid_they_make(method: str, order: str) -> None:
    """The same tokens as one grid, row by row, and as four tiles, one after the other: the same maps, at one scale."""
    generator = torch.Generator().manual_seed(0)
    side, n_prompt, n_targets, dim, vocab = 3, 4, 5, 16, 64
    whole = 2 * side
    n = 1 + whole**2 + n_prompt + n_targets
    ids = torch.randint(0, vocab, (n,), generator=generator)
    hidden = torch.randn(n, dim, generator=generator)
    head = OutputHead(torch.randn(vocab, dim, generator=generator))
    on_grid = torch.arange(whole**2).view(2, side, 2, side).permute(0, 2, 1, 3).flatten()  # tile by tile
    response = (n - n_targets, n)
    prompt = tuple(range(1 + whole**2, n - n_targets))
    one = TokenLayout((ImageGroup(tuple(range(1, 1 + whole**2)), (1, whole, whole)),), prompt, response)
    views = tuple(tiles(2, 2, side))
    tiled = ImageGroup(tuple((1 + on_grid).tolist()), (1, whole, whole), views=views)
    config = AttributionConfig(method=method, scales=(1.0,), aggregate=order, top_k=8, evidence=False)  # type: ignore[arg-type]
    expected = explain_states([ScaleStates(hidden, ids, one)], head, config)
    found = explain_states([ScaleStates(hidden, ids, TokenLayout((tiled,), prompt, response))], head, config)
    torch.testing.assert_close(found.image[0], expected.image[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.raw_range, expected.raw_range, rtol=1e-4, atol=1e-5)
    limited = explain_states(
        [ScaleStates(hidden, ids, TokenLayout((tiled,), prompt, response))], head, config, memory_limit=10**8
    )
    torch.testing.assert_close(limited.image[0], found.image[0], rtol=1e-4, atol=1e-5)


def test_the_reference_knows_no_tiles() -> None:
    views = tuple(tiles(1, 2, 1))
    layout = TokenLayout((ImageGroup((1, 2), (1, 1, 2), views=views),), (3,), (4, 6))
    with pytest.raises(fastattr.InputError, match="knows whole pictures only"):
        fastattr.attribute_states(
            torch.randn(6, 8), torch.randn(32, 8), torch.arange(6), layout, compat="tam", method="tam"
        )
