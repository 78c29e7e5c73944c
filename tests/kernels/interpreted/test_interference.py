"""Interference in Triton, run in Python, against plain float64 matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastattr_kernels import reference
from fastattr_kernels.gpu import interference as gpu
from fastattr_kernels.gpu.interference import context_mean, remove_interference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ROUNDED = 2.0**-23  # relative error of one float32 operation, doubled
few = settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def poisoned() -> Iterator[None]:
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def positive(seed: int, *shape: int) -> Tensor:
    """A third of it zero, as after a ReLU."""
    values = np.random.default_rng(seed).standard_normal(shape) + 0.4
    return torch.from_numpy(values).relu().float()


def causal(weight: Tensor, n_before: int | None) -> Tensor:
    return weight if n_before is None else weight.tril(n_before - 1)


def worst(actual: Tensor, expected: np.ndarray) -> float:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    return float(np.abs(actual.double().numpy() - expected).max())  # NaN where anything was left unwritten


# --- the mean of the context ---------------------------------------------------------------------


def mean_by_definition(context_activation: Tensor, weight: Tensor) -> np.ndarray:
    """`sum_j w[t,j] A_j / sum_j w[t,j]`, zero where all weights are."""
    w, a = weight.double().numpy(), context_activation.double().numpy()
    total = w.sum(1, keepdims=True)
    return np.divide(w @ a, total, out=np.zeros((len(w), a.shape[1])), where=total > 0)


def assert_mean_as_good_as_torch(context_activation: Tensor, weight: Tensor, n_before: int | None = None) -> None:
    exact = mean_by_definition(context_activation, weight)
    error = worst(context_mean(context_activation, weight, n_before=n_before), exact)
    of_torch = worst(reference.context_mean(context_activation, weight, n_before=n_before), exact)
    greatest = max(1.0, float(exact.max()))
    assert error <= of_torch + 2 * ROUNDED * greatest
    assert error <= 1e-6 * greatest


def test_mean_by_hand() -> None:
    activation = torch.tensor([[1.0, 0.0, 4.0], [3.0, 2.0, 0.0]])
    weight = torch.tensor([[1.0, 3.0], [0.0, 0.5], [0.0, 0.0]])
    assert context_mean(activation, weight).tolist() == [[2.5, 1.5, 1.0], [3.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("n_before", [None, 0, 2, 10_000])
@pytest.mark.parametrize(
    ("targets", "context", "positions"), [(1, 1, 1), (3, 5, 7), (33, 17, 5), (5, 31, 33), (37, 33, 64), (2, 65, 97)]
)
@pytest.mark.parametrize("many_tiles", [1, 512])
def test_mean(
    targets: int, context: int, positions: int, n_before: int | None, many_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MANY_TILES", many_tiles)  # from 1 on tiles are large
    weight = causal(positive(1, targets, context), n_before)
    assert_mean_as_good_as_torch(positive(2, context, positions), weight, n_before)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 20), st.integers(1, 9), st.none() | st.integers(0, 20))
def test_mean_of_any(seed: int, targets: int, context: int, positions: int, n_before: int | None) -> None:
    weight = causal(positive(seed, targets, context), n_before)
    assert_mean_as_good_as_torch(positive(seed + 1, context, positions), weight, n_before)


@pytest.mark.parametrize("beyond", [-1, 0, 1, gpu.TOGETHER + 3])
def test_mean_of_long_context(beyond: int) -> None:
    context = gpu.TOGETHER + beyond
    activation, weight = positive(3, context, 6), positive(4, 3, context)
    assert_mean_as_good_as_torch(activation, weight)
    assert_mean_as_good_as_torch(activation, causal(weight, context - 1), context - 1)


def test_rounding_does_not_grow_with_the_context() -> None:
    """Equal terms round the same way each time: the worst case for a sum that just runs on."""
    context = 8 * gpu.TOGETHER
    activation = torch.linspace(0.1, 0.9, 17).expand(context, 17)
    mean = context_mean(activation, torch.ones(2, context))
    torch.testing.assert_close(mean, activation[:2], rtol=5e-7, atol=0)


def test_mean_reads_nothing_behind_the_causal_edge() -> None:
    targets, n_before = 35, 4
    activation, weight = positive(6, 60, 5), causal(positive(7, targets, 60), n_before)
    expected = mean_by_definition(activation, weight)
    activation[n_before + targets - 1 :] = torch.nan
    assert worst(context_mean(activation, weight, n_before=n_before), expected) <= 1e-6 * expected.max()


@pytest.mark.parametrize("factor", [2.0**-20, 4.0, 2.0**40])
def test_only_the_proportions_of_the_weights_count(factor: float) -> None:
    activation, weight = positive(8, 19, 6), positive(9, 4, 19)
    assert torch.equal(context_mean(activation, weight * factor), context_mean(activation, weight))


def test_a_nan_in_the_context_is_not_averaged_away() -> None:
    activation, weight = positive(10, 6, 4), positive(11, 3, 6) + 0.1
    activation[2, 1] = torch.nan
    weight[1, 3] = torch.nan
    broken = context_mean(activation, weight).isnan()
    assert broken.tolist() == [[False, True, False, False], [True] * 4, [False, True, False, False]]


def test_mean_takes_inputs_that_do_not_lie_together() -> None:
    activation, weight = positive(12, 6, 4), positive(13, 3, 6)
    apart = context_mean(activation.T.contiguous().T, weight.repeat(1, 2)[:, :6])
    assert worst(apart, mean_by_definition(activation, weight)) <= 1e-6


def test_mean_is_bitwise_repeatable() -> None:
    activation, weight = positive(14, 50, 40), causal(positive(15, 35, 50), 15)
    runs = [context_mean(activation, weight, n_before=15) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# --- its removal ---------------------------------------------------------------------------------


def removed_by_definition(activation: Tensor, mean: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`relu(A - lam M)` and the least-squares `lam`, zero where M is."""
    a, m = activation.double().numpy(), mean.double().numpy()
    lam = np.array([(x * y).sum() / (y * y).sum() if y.any() else 0.0 for x, y in zip(a, m, strict=True)])
    return np.maximum(a - lam[:, None] * m, 0.0), lam


def assert_removal_as_good_as_torch(activation: Tensor, mean: Tensor) -> None:
    exact, lam = removed_by_definition(activation, mean)
    cleaned, scale, span = remove_interference(activation, mean)
    of_torch, scale_of_torch, _ = reference.remove_interference(activation, mean)
    # what lies within ROUNDING of nothing may be counted as nothing by one and not by the other
    greatest = float(activation.max())
    assert worst(cleaned, exact) <= worst(of_torch, exact) + (reference.ROUNDING + 2 * ROUNDED) * greatest
    assert worst(cleaned, exact) <= 3e-6 * greatest
    assert worst(scale, lam) <= worst(scale_of_torch, lam) + 2 * ROUNDED * lam.max()
    assert worst(scale, lam) <= 1e-6 * lam.max()
    assert worst(span, np.stack([cleaned.numpy().min(1), cleaned.numpy().max(1)], 1)) == 0.0


def test_removal_by_hand() -> None:
    activation = torch.tensor([[3.0, 1.0, 0.0], [2.0, 4.0, 6.0], [1.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    mean = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    cleaned, scale, span = remove_interference(activation, mean)
    assert cleaned.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 5.0], [0.0, 0.0, 0.0]]
    assert scale.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert span.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("targets", "positions"), [(1, 1), (3, 7), (2, 64), (2, 1024), (3, 1025), (1, 2049), (1, 65_536)]
)
def test_removal(targets: int, positions: int) -> None:
    assert_removal_as_good_as_torch(positive(16, targets, positions), positive(17, targets, positions))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 40), st.sampled_from([1e-6, 1.0, 1e6]))
def test_removal_of_any(seed: int, targets: int, positions: int, size: float) -> None:
    activation = positive(seed, targets, positions)
    assert_removal_as_good_as_torch(activation * size, positive(seed + 1, targets, positions))


def test_the_least_of_a_map_may_be_above_zero() -> None:
    """Where the context is dark everywhere nothing is removed, and what lies behind the row does not count."""
    activation = positive(18, 2, 13) + 0.5
    cleaned, scale, span = remove_interference(activation, torch.zeros_like(activation))
    assert torch.equal(cleaned, activation)
    assert scale.tolist() == [0.0, 0.0]
    assert torch.equal(span, torch.stack(activation.aminmax(dim=1), 1))
    assert (span > 0).all()


@few
@given(seeds, st.floats(0.01, 100.0), st.integers(1, 60))
def test_a_map_that_is_all_interference_vanishes(seed: int, factor: float, positions: int) -> None:
    mean = positive(seed, 2, positions)
    cleaned, scale, span = remove_interference(mean * factor, mean)
    assert cleaned.count_nonzero() == 0
    assert span.count_nonzero() == 0
    expected = torch.where(mean.any(dim=1), factor, 0.0)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("positions", [5, 2050])
@pytest.mark.parametrize("side", ["activation", "mean"])
def test_a_nan_spoils_its_target_and_no_other(side: str, positions: int) -> None:
    maps = {"activation": positive(19, 3, positions), "mean": positive(20, 3, positions)}
    whole = remove_interference(**maps)
    maps[side][1, positions - 2] = torch.nan
    for broken, expected in zip(remove_interference(**maps), whole, strict=True):
        assert broken[1].isnan().all()
        assert torch.equal(broken[[0, 2]], expected[[0, 2]])


def test_half_precision_is_upcast_before_anything_is_computed() -> None:
    activation, mean = (positive(seed, 2, 33).mul(900).half() for seed in (21, 22))  # sums of squares pass 65504
    for of_half, of_float in zip(
        remove_interference(activation, mean), remove_interference(activation.float(), mean.float()), strict=True
    ):
        assert torch.equal(of_half, of_float)
    weight = positive(23, 3, 2).half()
    assert torch.equal(context_mean(activation, weight), context_mean(activation.float(), weight.float()))


def test_removal_takes_inputs_that_do_not_lie_together() -> None:
    activation, mean = positive(24, 3, 6), positive(25, 3, 6)
    apart = remove_interference(activation.T.contiguous().T, mean.repeat(1, 2)[:, :6])
    for result, expected in zip(apart, remove_interference(activation, mean), strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, expected)


def test_removal_is_bitwise_repeatable() -> None:
    activation, mean = positive(26, 3, 2500), positive(27, 3, 2500)
    runs = [torch.cat([each.flatten() for each in remove_interference(activation, mean)]) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
