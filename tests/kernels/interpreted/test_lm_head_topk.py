"""The vocabulary's top-k and log-sum-exp in Triton, run in Python, against a sort of all logits in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fastattr_kernels.gpu import lm_head_topk as gpu
from fastattr_kernels.gpu.lm_head_topk import Launch, filtered_summary, fused_summary
from torch import Tensor

Road = Callable[..., tuple[Tensor, Tensor, Tensor]]
SLOTS = 32
WIDTH = 128  # columns of a chunk: two tiles of the filter, four of the product
SMALL = Launch(
    filtered_bytes=4 * 16 * WIDTH,
    fused_bytes=4 * 16 * WIDTH,
    filter_columns=64,
    product_rows=16,
    product_columns=32,
    product_dim=16,
)

# NumPy's words for what is meant here: infinite differences, products that are NaN, the logarithm of 0
past_the_greatest = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is not written is NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[filtered_summary, fused_summary], ids=["filtered", "fused"])
def road(request: pytest.FixtureRequest) -> Road:
    def small(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return request.param(*arguments, **options, launch=SMALL, fewest_slots=SLOTS)

    return small


def whole(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their products are exact, so that ties are ties in any precision."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape)).to(dtype)


def fraction(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def all_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> np.ndarray:
    """float64 `[position vocab]`."""
    logits = hidden.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        logits = logits + bias.double().numpy()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    return logits[:, :valid_vocab]


def ordered(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of each row: value descending, then id ascending; NaN as -inf."""
    ranked = np.where(np.isnan(logits), -np.inf, logits)
    ids = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in ranked])
    return ids, np.take_along_axis(ranked, ids, 1)


def logsumexp(logits: np.ndarray) -> np.ndarray:
    greatest = logits.max(axis=1, keepdims=True)
    return greatest[:, 0] + np.log(np.exp(logits - greatest).sum(axis=1))


def same(actual: tuple[Tensor, Tensor, Tensor], logits: np.ndarray, k: int) -> None:
    """Exact, for logits without rounding, but for the log-sum-exp."""
    ids, values, total = actual
    expected_ids, expected_values = ordered(logits, k)
    assert ids.dtype == torch.int32
    assert values.dtype == total.dtype == torch.float32
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_array_equal(values.numpy(), expected_values)
    np.testing.assert_allclose(total.numpy(), logsumexp(logits), rtol=1e-6, atol=1e-5)


def close(actual: tuple[Tensor, Tensor, Tensor], logits: np.ndarray, k: int, gap: float) -> None:
    """Logits within `gap` of each other may change places, no others."""
    ids, values, total = (tensor.numpy() for tensor in actual)
    assert ids.shape == values.shape == (len(logits), k)
    assert (np.diff(values, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    np.testing.assert_allclose(values, np.take_along_axis(logits, ids.astype(np.int64), 1), rtol=0, atol=gap)
    np.testing.assert_allclose(values, ordered(logits, k)[1], rtol=0, atol=gap)
    np.testing.assert_allclose(total, logsumexp(logits), rtol=1e-6, atol=gap)


@pytest.mark.parametrize(
    ("positions", "dim", "vocab", "k"),
    [
        (1, 8, 64, 5),  # one tile
        (3, 13, 65, 1),  # a tile and a column; dim not a multiple of 8
        (2, 20, 129, 16),  # a chunk and a column
        (2, 7, 307, 10),  # primes, three chunks
        (2, 1, 17, 17),  # everything, and fewer columns than a tile
        (1, 5, 131, 40),  # k beyond the number of groups of a chunk
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes(road: Road, positions: int, dim: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    hidden, weight = whole(1, positions, dim, dtype=dtype), whole(2, vocab, dim, dtype=dtype)
    same(road(hidden, weight, k), all_logits(hidden, weight), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fractions(road: Road, dtype: torch.dtype) -> None:
    hidden, weight = fraction(3, 2, 24, dtype=dtype), fraction(4, 500, 24, dtype=dtype)
    close(road(hidden, weight, 12), all_logits(hidden, weight), 12, gap=1e-5)


def test_head_options(road: Road) -> None:
    hidden, weight, bias = whole(5, 2, 12), whole(6, 200, 12), whole(7, 200, dtype=torch.float16)
    options: dict[str, Any] = {"bias": bias, "logit_scale": 0.25, "valid_vocab": 151}
    same(road(hidden, weight, 9, **options), all_logits(hidden, weight, **options), 9)
    options["softcap"] = 3.0
    logits = all_logits(hidden, weight, **options)
    close(road(hidden, weight, 9, **options), logits, 9, gap=2e-6)
    np.testing.assert_array_equal(road(hidden, weight, 9, **options)[0].numpy(), ordered(logits, 9)[0])


@pytest.mark.parametrize("size", [1e-20, 1e-3, 0.4999, 0.5, 1.0, 8.0, 1e4, np.inf])
def test_softcap_is_accurate_near_zero_and_saturates(size: float) -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[size], [-size]], dtype=torch.float32)
    ids, values, _ = filtered_summary(hidden, weight, 2, softcap=1.0, launch=SMALL)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(values.numpy(), [[np.tanh(np.float32(size)), -np.tanh(np.float32(size))]], rtol=3e-7)


def test_ties_go_to_the_lower_id(road: Road) -> None:
    few = whole(8, 5, 6)
    hidden, weight = whole(9, 2, 6), few.repeat(60, 1)
    same(road(hidden, weight, 16), all_logits(hidden, weight), 16)
    zeros = torch.tensor([[1.0]]), torch.tensor([[0.0], [-0.0]]).repeat(40, 1)  # one and the same
    same(road(*zeros, 16), all_logits(*zeros), 16)


@pytest.fixture
def fillings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for every time that slots were full."""
    full: list[None] = []
    keep_best = gpu._keep_best

    def counted(*arguments: Any) -> Any:
        full.append(None)
        return keep_best(*arguments)

    monkeypatch.setattr(gpu, "_keep_best", counted)
    return full


@pytest.mark.parametrize("splits", [1, 2])
def test_ascending_logits_fill_the_slots_over_and_over(
    road: Road, splits: int, fillings: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PROGRAMS", 16 * splits)
    hidden, weight = torch.tensor([[1.0], [-1.0]]), torch.arange(300.0)[:, None] - 150
    same(road(hidden, weight, 16), all_logits(hidden, weight), 16)
    assert len(fillings) >= (300 - splits * SLOTS) // (SLOTS - 16)


def test_equal_logits_fill_the_slots_once(road: Road, fillings: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROGRAMS", 16)
    hidden, weight = torch.ones(1, 4), torch.ones(300, 4)
    same(road(hidden, weight, 16), all_logits(hidden, weight), 16)
    assert len(fillings) == 1


@past_the_greatest
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the greatest of nothing but NaN
def test_minus_infinity_and_nan_rank_last(road: Road) -> None:
    hidden, weight = whole(10, 3, 4), whole(11, 150, 4)
    bias = torch.full((150,), -torch.inf)
    bias[[3, 70, 149]] = torch.tensor([1.0, -2.0, 1.0])
    same(road(hidden, weight, 8, bias), all_logits(hidden, weight, bias), 8)

    hidden[0], hidden[1, 0] = torch.nan, torch.inf  # a row of NaN; NaN and both infinities; a sound row
    ids, values, total = road(hidden, weight, 8)
    expected_ids, expected_values = ordered(all_logits(hidden, weight), 8)
    np.testing.assert_array_equal(ids.numpy(), expected_ids)
    np.testing.assert_array_equal(values.numpy(), expected_values)
    assert total.isnan().tolist() == [True, True, False]

    nothing = torch.full((150,), -torch.inf)
    ids, values, total = road(hidden[2:], weight, 8, nothing)
    assert ids.tolist() == [list(range(8))]
    assert (values == -torch.inf).all()
    assert total.tolist() == [-torch.inf]


@past_the_greatest
def test_infinite_logits(road: Road) -> None:
    hidden, weight = torch.ones(1, 1), whole(12, 140, 1)
    weight[[5, 130]] = torch.inf
    ids, values, total = road(hidden, weight, 3)
    assert ids[0, :2].tolist() == [5, 130]
    assert values[0].tolist() == [torch.inf, torch.inf, 2.0]
    assert total.tolist() == [torch.inf]


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logsumexp_does_not_overflow(road: Road, shift: float) -> None:
    hidden, weight = fraction(13, 2, 4), fraction(14, 200, 4)
    bias = torch.linspace(0, shift, 200)
    logits = all_logits(hidden, weight, bias)
    np.testing.assert_allclose(road(hidden, weight, 2, bias)[2].numpy(), logsumexp(logits), rtol=2e-7, atol=1e-5)


def test_chunks_splits_and_blocks_of_rows_do_not_show(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = fraction(15, 17, 8), fraction(16, 131, 8)
    split = road(hidden, weight, 6)
    monkeypatch.setattr(gpu, "PROGRAMS", 16)  # one filter per row
    monkeypatch.setattr(gpu, "ROWS", 16)  # two blocks
    whole_rows = road(hidden, weight, 6)
    close(split, all_logits(hidden, weight), 6, gap=1e-5)
    close(whole_rows, all_logits(hidden, weight), 6, gap=1e-5)


def test_views_need_no_copy(road: Road) -> None:
    hidden, weight = whole(17, 4, 20)[::2, ::2], whole(18, 10, 150).T
    same(road(hidden, weight, 4), all_logits(hidden, weight), 4)


def test_three_runs_are_bitwise_equal(road: Road) -> None:
    hidden, weight = fraction(19, 2, 16), fraction(20, 150, 16)
    first, second, third = (road(hidden, weight, 5) for _ in range(3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = whole(21, 1, 6, dtype=torch.float16), whole(22, 300, 6, dtype=torch.float16)
    logits = all_logits(hidden, weight)
    same(gpu.lm_head_summary(hidden, weight, 7), logits, 7)
    ids, values = gpu.lm_head_topk(hidden, weight, 7)
    same((ids, values, torch.from_numpy(logsumexp(logits)).float()), logits, 7)
    same(gpu.lm_head_summary(hidden, weight, 300), logits, 300)  # beyond what the filter serves
    assert [tensor.shape for tensor in gpu.lm_head_summary(hidden[:0], weight, 7)] == [(0, 7), (0, 7), (0,)]

    products = []
    monkeypatch.setattr(gpu, "_product", Recorder(products))
    monkeypatch.setattr(gpu, "_filter", Recorder([]))
    monkeypatch.setattr(gpu, "_merge", Recorder([]))
    monkeypatch.setitem(gpu.LAUNCHES, "interpreter", Launch(fused=range(1, 2)))
    for positions, dtype in ((1, torch.float16), (2, torch.float16), (1, torch.float32)):
        gpu.lm_head_topk(hidden.to(dtype).expand(positions, 6), weight.to(dtype), 7)
        products.append(None)
    assert [bool(product) for product in products] == [True, False, False, False]


class Recorder:
    """Stands for a kernel and runs nothing."""

    def __init__(self, launches: list[Any]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: self.launches.append(grid)


def test_workspace_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("_product", "_filter", "_merge"):
        monkeypatch.setattr(gpu, kernel, Recorder([]))
    allocated: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        tensor = empty(*shape, **options)
        allocated.append(tensor.nbytes)
        return tensor

    def product(hidden: Tensor, rows: Tensor, *_: Any) -> Tensor:
        logits = empty(len(hidden), len(rows), device="meta")
        products.append(logits.nbytes)
        return logits

    products = [0]  # one at a time
    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(gpu.reference, "head_logits", product)
    for road in (filtered_summary, fused_summary):
        for vocab in (32_000, 152_064, 262_144):
            hidden, weight = (empty(n, 64, device="meta", dtype=torch.bfloat16) for n in (1024, vocab))
            allocated.clear()
            road(hidden, weight, 50)
            assert max(products) * (road is filtered_summary) + sum(allocated) <= 16e6
    assert max(products) == Launch().filtered_bytes


@pytest.mark.parametrize(("k", "valid_vocab"), [(0, None), (31, None), (11, 10), (257, None)])
def test_k_out_of_range(road: Road, k: int, valid_vocab: int | None) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1 to (10|30)\b"):
        road(torch.ones(1, 2), torch.ones(30, 2), k, valid_vocab=valid_vocab)


def test_fused_needs_one_dtype() -> None:
    with pytest.raises(ValueError, match=r"hidden is torch\.float32, expected torch\.float16"):
        fused_summary(torch.ones(1, 2), torch.ones(30, 2, dtype=torch.float16), 3)
