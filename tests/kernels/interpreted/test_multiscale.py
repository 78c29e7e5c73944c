"""Multi-scale sums in Triton, run in Python, against bilinear interpolation pixel by pixel, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastattr_kernels import reference
from fastattr_kernels.gpu import multiscale as gpu
from fastattr_kernels.gpu.multiscale import Tile, multiscale
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import method as oracle

few = settings(max_examples=12)
ALLOWED = 3e-7  # more than the torch form is off, relative to the greatest value
DTYPES = [torch.float32, torch.float16, torch.uint8]
Size = tuple[int, int]

# grids, size, frames; some go straight from the maps to a grid, some by way of knots to an image
GRIDS: list[tuple[list[Size], Size, int]] = [
    ([(1, 1)], (1, 1), 1),
    ([(1, 1), (2, 3)], (1, 9), 1),
    ([(4, 5)], (4, 5), 2),
    ([(3, 2), (5, 7), (2, 9)], (5, 7), 1),
    ([(9, 7)], (5, 4), 1),
    ([(11, 2), (13, 1)], (3, 5), 2),
]
IMAGES: list[tuple[list[Size], Size, int]] = [
    ([(1, 3)], (1, 41), 1),
    ([(3, 1)], (41, 1), 2),
    ([(2, 3), (3, 4)], (16, 32), 1),
    ([(2, 3), (3, 4), (2, 5), (1, 1)], (23, 33), 1),
    ([(2, 2)], (17, 17), 2),
    ([(31, 2)], (13, 47), 1),
]


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is not written is NaN, or 255."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    assert torch.empty(1, dtype=torch.uint8) == 255
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Small maps then take several programs, of which some cover an edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.SUM_TILES, "interpreter", Tile(rows=8, columns=16, warps=1))
        for pixel_bytes in (0, 1, 2, 4):
            patch.setitem(gpu.IMAGE_TILES, ("interpreter", pixel_bytes), Tile(rows=3, columns=32, warps=1))
        patch.setattr(gpu, "REDUCED", 8)
        yield


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def problem(grids: list[Size], frames: int, targets: int = 2, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    maps = [draw(seed + scale, targets, frames, *grid) for scale, grid in enumerate(grids)]
    return maps, draw(seed + 99, targets, len(grids))


def definition(maps: list[Tensor], weights: Tensor, size: Size) -> np.ndarray:
    """`sum_s w_s Up(A_s)`."""
    targets, frames = maps[0].shape[:2]
    result = np.zeros((targets, frames, *size))
    for scale, of_scale in enumerate(maps):
        for target, frame in np.ndindex(targets, frames):
            grid = of_scale[target, frame].double().numpy()
            result[target, frame] += float(weights[target, scale]) * oracle.bilinear(grid, *size)
    return result


def worst(actual: Tensor, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual.double().numpy() - expected).max())  # NaN where anything was left unwritten


def least_and_greatest(total: Tensor) -> Tensor:
    return torch.stack([total.flatten(1).amin(1), total.flatten(1).amax(1)], 1)


@pytest.mark.parametrize(("grids", "size", "frames"), GRIDS + IMAGES, ids=str)
def test_it_is_the_definition(grids: list[Size], size: Size, frames: int) -> None:
    maps, weights = problem(grids, frames)
    expected = definition(maps, weights, size)
    total, extremes = multiscale(maps, weights, size)
    assert total.dtype == extremes.dtype == torch.float32
    allowed = worst(reference.multiscale(maps, weights, size)[0], expected) + ALLOWED * np.abs(expected).max()
    assert worst(total, expected) <= allowed
    assert torch.equal(extremes, least_and_greatest(total))  # to the bit
    assert torch.equal(multiscale(maps, weights, size)[0], total)
    assert torch.equal(multiscale(maps, weights, size)[0], total)

    half, extremes_of_half = multiscale(maps, weights, size, dtype=torch.float16)
    assert torch.equal(half, total.half())
    assert torch.equal(extremes_of_half, extremes)


@pytest.mark.parametrize(
    ("cases", "drawn"), [(GRIDS, 0), (IMAGES, 1)], ids=["straight from the maps", "by way of knots"]
)
def test_which_way_it_goes(
    cases: list[tuple[list[Size], Size, int]], drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the cases of this file are known to cover both."""
    calls: list[Size] = []
    draw_kernel = gpu._draw
    monkeypatch.setattr(gpu, "_draw", lambda *arguments: calls.append((0, 0)) or draw_kernel(*arguments))
    for grids, size, frames in cases:
        before = len(calls)
        multiscale(*problem(grids, frames, targets=1), size)
        assert len(calls) - before == drawn


@pytest.mark.parametrize(("grids", "size", "frames"), GRIDS[2:5] + IMAGES, ids=str)
@pytest.mark.parametrize("span", [None, torch.tensor([[-0.3, 0.4], [0.1, 0.2]])], ids=["own", "given"])
def test_bytes_are_the_stretched_sum(grids: list[Size], size: Size, frames: int, span: Tensor | None) -> None:
    maps, weights = problem(grids, frames)
    total = definition(maps, weights, size)
    image, extremes = multiscale(maps, weights, size, dtype=torch.uint8, span=span)
    assert image.dtype == torch.uint8
    torch.testing.assert_close(extremes, multiscale(maps, weights, size)[1], atol=1e-6, rtol=1e-6)
    low, high = (extremes if span is None else span).double().numpy().T.reshape(2, -1, 1, 1, 1)
    exact = 255 * np.clip((total - low) / (high - low), 0, 1)
    # within rounding to the nearest, with what float32 leaves open
    assert worst(image, exact) <= 0.5 + 255 * 1e-6 * np.abs(total).max() / (high - low).min()
    if span is None:
        assert torch.equal(least_and_greatest(image.float()), torch.tensor([[0.0, 255.0]] * len(image)))


@pytest.mark.parametrize(("grids", "size"), [([(3, 4)], (5, 4)), ([(2, 3)], (19, 23))], ids=str)
def test_an_empty_span_gives_zeros(grids: list[Size], size: Size) -> None:
    maps, weights = problem(grids, 1, targets=3)
    span = torch.tensor([[0.5, 0.5], [1.0, -1.0], [0.0, 1e-42]])
    image, _ = multiscale(maps, weights, size, dtype=torch.uint8, span=span)
    assert (image[:2] == 0).all()
    flat, extremes = multiscale([torch.full((1, 1, 2, 3), 0.7)], torch.ones(1, 1), size, dtype=torch.uint8)
    assert (flat == 0).all()
    torch.testing.assert_close(extremes, torch.full((1, 2), 0.7))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 5), (17, 19)], ids=str)
def test_a_map_of_the_right_size_is_left_alone(size: Size) -> None:
    maps = draw(1, 2, 2, *size)
    assert torch.equal(multiscale([maps], torch.ones(2, 1), size)[0], maps)


@pytest.mark.parametrize("size", [(4, 5), (19, 23)], ids=str)
def test_constants_stay_constant(size: Size) -> None:
    maps = [torch.full((1, 1, *grid), 0.7) for grid in [(2, 3), (3, 2), (1, 1)]]
    total, _ = multiscale(maps, torch.tensor([[0.5, 0.25, 0.25]]), size)
    torch.testing.assert_close(total, torch.full((1, 1, *size), 0.7), atol=0, rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 5), (19, 23)], ids=str)
def test_it_is_linear_in_the_weights(size: Size) -> None:
    maps, left = problem([(2, 3), (3, 4)], 1)
    right = draw(7, 2, 2)
    combined = multiscale(maps, 2 * left - right, size)[0]
    torch.testing.assert_close(
        combined, 2 * multiscale(maps, left, size)[0] - multiscale(maps, right, size)[0], atol=1e-5, rtol=1e-5
    )
    assert (multiscale(maps, torch.zeros(2, 2), size)[0] == 0).all()


@few
@given(
    st.integers(0, 2**32 - 100),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
)
def test_any_size(seed: int, grids: list[Size], size: Size) -> None:
    maps, weights = problem(grids, 1, targets=1, seed=seed)
    total, extremes = multiscale(maps, weights, size)
    expected = definition(maps, weights, size)
    assert worst(total, expected) <= 2e-6 * np.abs(weights.numpy()).sum() * max(float(m.abs().max()) for m in maps)
    assert torch.equal(extremes, least_and_greatest(total))


@pytest.mark.parametrize("size", [(6, 6), (25, 29)], ids=str)
def test_nan_comes_out_of_what_it_weighs_in(size: Size) -> None:
    """... and of the extremes of its target; far from it, and in other targets, nothing changes."""
    maps, weights = problem([(5, 5), (2, 2)], 1)
    clean = multiscale(maps, weights, size)[0]
    weigh = torch.zeros(1, 1, 5, 5)
    weigh[0, 0, 1, 3] = 1.0
    maps[0][0, 0, 1, 3] = torch.nan
    total, extremes = multiscale(maps, weights, size)
    touched = torch.from_numpy(oracle.bilinear(weigh[0, 0].double().numpy(), *size)) > 1e-9
    assert touched.any()
    assert total[0, 0][touched].isnan().all()
    assert extremes[0].isnan().all()
    assert not extremes[1].isnan().any()
    assert torch.equal(total[1], clean[1])
    far = size[0] * 4 // 5  # rows that read the last two rows of the map only
    assert torch.equal(total[0, 0, far:], clean[0, 0, far:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 5), (19, 23)], ids=str)
def test_it_reads_nothing_around_the_maps(size: Size, dtype: torch.dtype) -> None:
    """What is around them in memory is NaN, and would come out."""
    maps, weights = problem([(4, 5), (2, 3), (1, 2)], 2, targets=1)
    inner = []
    for each in maps:
        around = torch.full((each.numel() + 64,), torch.nan)
        inner.append(around[32:-32].view(each.shape).copy_(each))
    for actual, expected in zip(
        multiscale(inner, weights, size, dtype=dtype), multiscale(maps, weights, size, dtype=dtype), strict=True
    ):
        assert torch.equal(actual, expected)


def test_strides_do_not_matter() -> None:
    maps, weights = problem([(4, 5), (2, 3)], 2)
    turned = [each.transpose(2, 3).contiguous().transpose(2, 3) for each in maps]
    for size in [(4, 5), (19, 23)]:
        expected = multiscale(maps, weights, size)[0]
        assert torch.equal(multiscale(turned, weights.T.contiguous().T, size)[0], expected)


@pytest.mark.parametrize("sizes", [(16, 24, 32), (1,), (7, 500), (2, 2)], ids=str)
@pytest.mark.parametrize("pixels", [1, 2, 448, 97])
def test_tables_stay_within_maps_and_knots(sizes: tuple[int, ...], pixels: int) -> None:
    """What the interpreter would not notice on the edge of a large image."""
    sizes, device = tuple(max(2, size) for size in sizes), torch.device("cpu")
    knots = gpu._knots(sizes, pixels)
    assert (knots.diff() > 0).all()
    for points in (gpu._pixels(sizes, pixels, device), gpu._at_knots(sizes, pixels, device)):
        assert points.index.min() >= 0
        assert (points.index.amax(1) <= torch.tensor(sizes) - 2).all()
        assert points.fraction.min() >= 0
        assert points.fraction.max() <= 1
    for cells in (gpu._cells(sizes, pixels, device), gpu._cells(sizes, pixels, device, ends_only=True)):
        assert cells.index.min() >= 0
        assert cells.index.max() <= len(knots) - 2
        assert cells.fraction.min() >= 0
        assert cells.fraction.max() <= 1
        assert cells.first[0] == 0
        assert cells.first[-1] == pixels
        assert (cells.first.diff() >= 0).all()


def test_nothing_and_unknown_dtypes_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one scale"):
        multiscale([], torch.ones(2, 0), (3, 3))
    with pytest.raises(ValueError, match=r"expected float32, float16 or uint8"):
        multiscale([torch.zeros(1, 1, 2, 2)], torch.ones(1, 1), (3, 3), dtype=torch.bfloat16)
