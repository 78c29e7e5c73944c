"""The rank-Gaussian filter in Triton, run in Python, against its definition: window by window, sorted, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastattr_kernels import reference
from fastattr_kernels.gpu import rank_gaussian as gpu
from fastattr_kernels.gpu.rank_gaussian import Tile, rank_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import method as oracle

few = settings(max_examples=12)
ALLOWED = 2e-7  # more than the torch form is off, relative to the greatest value
SHAPES = [(2, 1, 1, 1), (1, 2, 1, 7), (1, 1, 6, 1), (1, 1, 2, 2), (2, 2, 7, 11), (1, 1, 5, 17), (1, 1, 13, 3)]


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def definition(maps: Tensor, span: Tensor | None = None) -> np.ndarray:
    result = np.zeros(tuple(maps.shape))
    for target, frame in np.ndindex(*maps.shape[:2]):
        grid = maps[target, frame].double().numpy()
        if span is not None:
            low, high = span[target].tolist()
            grid = np.clip((grid - low) / (high - low), 0, 1) if high > low else np.zeros_like(grid)
        result[target, frame] = oracle.rank_gaussian(grid)
    return result


def worst(actual: Tensor, expected: np.ndarray) -> float:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    return float(np.abs(actual.double().numpy() - expected).max())  # NaN where anything was left unwritten


@pytest.mark.parametrize("tile", [Tile(16, 4, 1), Tile(32, 3, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spanned", [False, True])
def test_it_is_the_definition(
    shape: tuple[int, ...], tile: Tile, spanned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of lanes and strips of rows that fit, that end within, and that hold one element more."""
    monkeypatch.setitem(gpu.TILES, "interpreter", tile)
    maps = draw(0, *shape).relu() + 0.01 * draw(1, *shape).abs()
    span = torch.tensor([[0.1, 1.2], [0.0, 0.7]])[: shape[0]] if spanned else None
    expected = definition(maps, span)
    allowed = worst(reference.rank_gaussian(maps, span), expected) + ALLOWED * expected.max()
    assert worst(rank_gaussian(maps, span), expected) <= allowed


def test_every_order_of_nine_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sorts all 512 windows of two values sorts everything.

    The values -1 and 1 keep the mean small, so that the outermost ranks still weigh enough to be seen.
    """
    monkeypatch.setitem(gpu.TILES, "interpreter", Tile(1024, 4, 1))
    maps = torch.where(draw(3, 1, 1, 64, 62) > 0, 1.0, -1.0)
    windows = (maps > 0)[0, 0].unfold(0, 3, 1).unfold(1, 3, 1).flatten(2).int()
    assert len((windows * 2 ** torch.arange(9)).sum(2).unique()) == 512
    assert worst(rank_gaussian(maps), definition(maps)) <= 1e-6


@few
@given(st.one_of(st.sampled_from([0.0, 1e-38, 1e-20, 1.0]), st.floats(0, 2.0**60, width=32)))
def test_constants_stay_as_they_are(value: float) -> None:
    maps = torch.full((1, 1, 3, 4), value)
    once = rank_gaussian(maps)
    assert torch.equal(once, maps)


@few
@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(
            st.lists(
                st.one_of(st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1.0 + 2**-23]), st.floats(0, 2.0**60, width=32)),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=5,
        )
    )
)
def test_it_is_finite_and_stays_within_its_window(grid: list[list[float]]) -> None:
    maps = torch.tensor(grid)[None, None]
    filtered = rank_gaussian(maps)
    highest = torch.nn.functional.max_pool2d(maps, 3, stride=1, padding=1)
    lowest = -torch.nn.functional.max_pool2d(-maps, 3, stride=1, padding=1)
    assert (filtered <= highest * (1 + 1e-5)).all()
    assert (filtered >= lowest * (1 - 1e-5)).all()


def test_an_empty_span_gives_zeros() -> None:
    maps = draw(4, 3, 1, 3, 3)
    span = torch.tensor([[0.5, 0.5], [1.0, -1.0], [0.0, 0.0]])
    assert torch.equal(rank_gaussian(maps, span), torch.zeros_like(maps))


def test_a_denormal_span_gives_no_nan() -> None:
    """Its reciprocal is infinite."""
    maps = torch.tensor([[[[0.0, 1e-40], [1e-41, 1e-39]]]])
    filtered = rank_gaussian(maps, torch.tensor([[0.0, 1e-40]]))
    assert (filtered >= 0).all()
    assert (filtered <= 1).all()


@pytest.mark.parametrize("span", [None, torch.tensor([[0.0, 1.0]])])
def test_nan_comes_out_of_the_windows_it_is_in(span: Tensor | None) -> None:
    """... among them those that see it reflected, and out of no others."""
    maps = draw(5, 1, 1, 6, 6).abs()
    maps[0, 0, 1, 4] = torch.nan
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[0:3, 3:6] = True
    assert torch.equal(rank_gaussian(maps, span).isnan()[0, 0], expected)
    assert torch.equal(reference.rank_gaussian(maps, span).isnan()[0, 0], expected)


def test_a_span_that_is_nan_gives_nan() -> None:
    maps = draw(6, 2, 1, 2, 2)
    assert rank_gaussian(maps, torch.tensor([[torch.nan, 1.0], [0.0, torch.nan]])).isnan().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 5, 7)], ids=str)
def test_it_reads_nothing_around_the_maps(shape: tuple[int, ...]) -> None:
    """What is around them in memory is NaN, and would come out."""
    maps = draw(7, *shape).abs()
    around = torch.full((maps.numel() + 64,), torch.nan)
    inner = around[32:-32].view(shape).copy_(maps)
    assert torch.equal(rank_gaussian(inner), rank_gaussian(maps))


def test_three_runs_agree_to_the_bit_whatever_the_strides() -> None:
    maps, span = draw(8, 1, 2, 6, 5).abs(), torch.tensor([[0.1, 0.9]])
    first = rank_gaussian(maps, span)
    turned = maps.transpose(2, 3).contiguous().transpose(2, 3)
    for again in (maps, turned):
        assert torch.equal(rank_gaussian(again, span), first)
    assert first.is_contiguous()
