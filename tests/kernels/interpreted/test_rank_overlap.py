"""Rank-biased overlap in Triton, run in Python, against its definition: sets, depth by depth, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastattr_kernels import reference
from fastattr_kernels.gpu import rank_overlap as gpu
from fastattr_kernels.gpu.rank_overlap import Tile, arc_weight, rank_overlap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ROUNDED = 2.0**-24  # half the distance between float32 numbers below 1
few = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is not written is NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.TILES, "interpreter", Tile(context=16, warps=1))


def rankings(seed: int, n: int, k: int, vocab: int, dtype: torch.dtype = torch.int32) -> Tensor:
    generator = np.random.default_rng(seed)
    return torch.tensor(np.stack([generator.permutation(vocab)[:k] for _ in range(n)])).to(dtype)


def definition(left: Tensor, right: Tensor, p: float, n_before: int | None = None) -> np.ndarray:
    """`(1-p) sum_d p^(d-1) |S[:d] & T[:d]| / d` over its value for equal rankings; 0 for what stands later."""
    k = left.shape[1]
    result = np.zeros((len(left), len(right)))
    for t, ours in enumerate(left.tolist()):
        for j, theirs in enumerate(right.tolist()):
            if n_before is None or j < n_before + t:
                depths = range(1, k + 1)
                overlap = sum(p ** (d - 1) * len(set(ours[:d]) & set(theirs[:d])) / d for d in depths)
                result[t, j] = (1 - p) * overlap / (1 - p**k)
    return result


def worst(actual: Tensor, expected: np.ndarray) -> float:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    return float(np.abs(actual.double().numpy() - expected).max())  # NaN where anything was left unwritten


def assert_as_good_as_torch(left: Tensor, right: Tensor, p: float, n_before: int | None) -> None:
    exact = definition(left, right, p, n_before)
    error = worst(rank_overlap(left, right, p, n_before=n_before), exact)
    assert error <= worst(reference.rank_overlap(left, right, p, n_before=n_before), exact) + ROUNDED
    assert error <= 1e-6


def test_by_hand() -> None:
    left = torch.tensor([[7, 3, 9]])
    right = torch.tensor([[7, 3, 9], [3, 7, 1], [4, 5, 6], [9, 100, 200]])
    p = 0.5
    equal = 1 + p + p**2
    swapped = p + p**2 * 2 / 3  # nothing at depth 1, both at depth 2, two of three at depth 3
    last = p**2 / 3
    expected = torch.tensor([[1.0, swapped / equal, 0.0, last / equal]])
    torch.testing.assert_close(rank_overlap(left, right, p), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n_before", [None, 0, 3, 10_000])
@pytest.mark.parametrize(
    ("targets", "context", "k"), [(1, 1, 1), (3, 16, 5), (2, 17, 50), (5, 31, 7), (1, 7, 200), (1, 3, 260)]
)
@pytest.mark.usefixtures("small_tiles")
def test_definition(targets: int, context: int, k: int, n_before: int | None) -> None:
    vocab = k + k // 2 + 1
    assert_as_good_as_torch(rankings(1, targets, k, vocab), rankings(2, context, k, vocab), 0.9, n_before)


@few
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 8),
    st.sampled_from([0.1, 0.9, 0.999]),
    st.none() | st.integers(0, 9),
)
def test_definition_of_any(
    seed: int, targets: int, context: int, k: int, spare: int, p: float, n_before: int | None
) -> None:
    assert_as_good_as_torch(
        rankings(seed, targets, k, k + spare), rankings(seed + 1, context, k, k + spare), p, n_before
    )


def test_one_tile_more_than_fits() -> None:
    context = gpu.DEFAULT_TILE.context + 1
    assert_as_good_as_torch(rankings(3, 2, 3, 9), rankings(4, context, 3, 9), 0.9, context - 1)


@pytest.mark.parametrize("k", [1, 5, 50, 200, 255, 256])  # 256 ranks and "absent" no longer fit a byte
@pytest.mark.parametrize("p", [0.5, 0.9])
def test_identical_rankings_have_exactly_one(k: int, p: float) -> None:
    ranked = rankings(k, 1, k, 4 * k)
    assert rank_overlap(ranked, ranked, p).item() == 1.0


def test_disjoint_rankings_have_exactly_nothing() -> None:
    left = rankings(5, 2, 20, 30)
    for right in (left + 30, rankings(6, 3, 20, 30) + 200_000):
        assert rank_overlap(left, right, 0.9).count_nonzero() == 0
        assert rank_overlap(right, left, 0.9).count_nonzero() == 0


@few
@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(0, 6), st.floats(0.05, 0.99))
def test_symmetric_and_bounded(seed: int, n: int, k: int, spare: int, p: float) -> None:
    left, right = rankings(seed, n, k, k + spare), rankings(seed + 1, 3, k, k + spare)
    relevance = rank_overlap(left, right, p)
    assert torch.equal(relevance, rank_overlap(right, left, p).T)
    assert ((relevance >= 0) & (relevance <= 1)).all()


@few
@given(seeds, st.integers(1, 12), st.floats(0.3, 0.95))
def test_a_longer_shared_prefix_overlaps_more(seed: int, k: int, p: float) -> None:
    left = rankings(seed, 1, k, 3 * k)
    right = torch.stack([torch.where(torch.arange(k) < shared, left[0], left[0] + 3 * k) for shared in range(k + 1)])
    relevance = rank_overlap(left, right, p)[0]
    assert (relevance.diff() > 0).all()
    assert relevance[[0, -1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_inputs_need_not_lie_together(dtype: torch.dtype) -> None:
    left, right = rankings(7, 3, 4, 9, dtype), rankings(8, 5, 4, 9, dtype)
    expected = definition(left, right, 0.8)
    assert worst(rank_overlap(left.T.contiguous().T, right.repeat(1, 2)[:, :4], 0.8), expected) <= 1e-6


def table_bytes(context: int, k: int) -> list[int]:
    """Of the table of ranks, at each launch: the launching part runs without data."""
    seen = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
            return self

        def __call__(self, left: Tensor, last: Tensor, ranks: Tensor, *args: Any, **options: Any) -> None:
            seen.append(ranks.numel() * ranks.element_size())

    left, right = (torch.empty(n, k, dtype=torch.int32, device="meta") for n in (2, context))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_overlap_kernel", Recorder())
        gpu.launch(left, right, torch.empty(k + 1, dtype=torch.int32, device="meta"), 152_064)
    return seen


@pytest.mark.parametrize(("context", "k", "blocks"), [(100, 50, 1), (1024, 50, 2), (4096, 50, 8), (1024, 260, 6)])
def test_the_table_is_bounded(context: int, k: int, blocks: int) -> None:
    seen = table_bytes(context, k)
    assert len(seen) == blocks
    assert max(seen) <= gpu.TABLE_BYTES * 1.01  # the line of absent ids comes on top


@pytest.mark.parametrize("n_before", [None, 0, 20])
def test_context_in_blocks(n_before: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = rankings(9, 3, 5, 14), rankings(10, 50, 5, 12)
    whole = rank_overlap(left, right, 0.9, n_before=n_before)
    monkeypatch.setattr(gpu, "TABLE_BYTES", 5 * 16**2)
    assert len(table_bytes(50, 5)) == 4
    assert torch.equal(rank_overlap(left, right, 0.9, n_before=n_before), whole)
    assert worst(whole, definition(left, right, 0.9, n_before)) <= 1e-6


@pytest.mark.parametrize("n_before", [None, 0, 4])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_arc_weight(dtype: torch.dtype | None, n_before: int | None) -> None:
    generator = np.random.default_rng(11)
    left, right = rankings(12, 3, 6, 11), rankings(13, 19, 6, 11)
    counts = torch.from_numpy(generator.random((3, 19)) < 0.6)
    scores = None if dtype is None else torch.from_numpy(generator.random((3, 19)) * 9).to(dtype)
    related = definition(left, right, 0.9, n_before)
    expected = (1 - related) * (1.0 if scores is None else scores.double().numpy()) * counts.numpy()

    relevance, weight = arc_weight(left, right, 0.9, counts, scores, n_before=n_before)
    assert torch.equal(relevance, rank_overlap(left, right, 0.9, n_before=n_before))
    assert worst(relevance, related) <= 1e-6
    of_torch = reference.arc_weight(left, right, 0.9, counts, scores, n_before=n_before)[1]
    assert worst(weight, expected) <= worst(of_torch, expected) + 9 * ROUNDED
    assert worst(weight, expected) <= 1e-5


def test_what_does_not_count_weighs_nothing_whatever_its_score() -> None:
    left, right = rankings(14, 2, 4, 8), rankings(15, 3, 4, 8)
    scores = torch.full((2, 3), math.nan)
    _, weight = arc_weight(left, right, 0.9, torch.zeros(2, 3, dtype=torch.bool), scores)
    assert weight.tolist() == [[0.0] * 3] * 2


def test_context_that_predicts_the_same_is_no_interference_at_all() -> None:
    ranked = rankings(16, 2, 50, 60)
    _, weight = arc_weight(ranked, ranked, 0.9, torch.ones(2, 2, dtype=torch.bool), torch.full((2, 2), 1e30))
    assert weight.diagonal().tolist() == [0.0, 0.0]
    assert (weight + weight.T)[0, 1] > 0


def test_bitwise_repeatable() -> None:
    left, right = rankings(17, 3, 5, 9), rankings(18, 21, 5, 9)
    counts, scores = torch.ones(3, 21, dtype=torch.bool), torch.rand(3, 21)
    runs = [torch.stack(arc_weight(left, right, 0.9, counts, scores, n_before=9)) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
