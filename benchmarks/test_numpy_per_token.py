"""The numpy program gives what the loops give: a baseline that is wrong proves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import naive, numpy_per_token

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 2), (6, 7)])
def test_filter(shape: tuple[int, int]) -> None:
    image = RNG.random(shape)
    image[: shape[0] // 2] = 0.25  # constant windows, whose spread is zero
    np.testing.assert_allclose(numpy_per_token.rank_gaussian(image), naive.rank_gaussian(image), atol=1e-12)


def test_filter_of_nothing_is_nothing() -> None:
    assert not numpy_per_token.rank_gaussian(np.zeros((3, 3))).any()


@pytest.mark.parametrize("size", [(5, 3), (9, 16), (2, 2), (1, 1)])
def test_upsample(size: tuple[int, int]) -> None:
    image = RNG.random((3, 5))
    np.testing.assert_allclose(numpy_per_token.upsample(image, size), naive.upsample(image, size), atol=1e-12)


def test_top_ids_break_ties_by_id() -> None:
    logits = RNG.integers(0, 4, 50).astype(np.float32)
    for k in (1, 7, 50):
        assert numpy_per_token.top_ids(logits, k).tolist() == naive.top_ids(logits, k)


def test_relevance() -> None:
    rankings = np.stack([RNG.permutation(20)[:6] for _ in range(9)])
    rankings[3] = rankings[0]
    own, others = rankings[0], rankings[1:]
    wanted = 1 - np.array(naive.arc_weights([1.0] * 8, [*others.tolist(), own.tolist()], 0.9))
    found = numpy_per_token.relevance(own, others, 0.9)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert found[2] == 1
    assert len(numpy_per_token.relevance(own, others[:0], 0.9)) == 0


@pytest.mark.parametrize("n_context", [0, 1, 6])
def test_remove_interference(n_context: int) -> None:
    own, earlier, weights = RNG.random(10), RNG.random((n_context, 10)), RNG.random(n_context)
    wanted = naive.remove_interference(own, list(earlier), weights.tolist())
    np.testing.assert_allclose(numpy_per_token.remove_interference(own, earlier, weights), wanted, atol=1e-7)


def test_log_prob() -> None:
    logits = RNG.standard_normal((1, 30)).astype(np.float32) * 20
    wanted = naive.log_prob(logits, naive.Slot(0, 4, 4))
    assert numpy_per_token.log_prob(logits[0], 4) == pytest.approx(wanted, abs=1e-5)
