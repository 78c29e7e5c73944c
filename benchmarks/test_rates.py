"""Rates are measured on results that were compared first."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rates import VOCAB, interpolate_chain, rank_filter, rankings, require, scales_to_image
from benchmarks.record import machine
from benchmarks.table import rates_table


def test_rates_of_small_operations() -> None:
    found = [
        rankings(12, 16, torch.float32, vocab=9000, runs=1),
        rankings(5, 16, torch.bfloat16, vocab=9000, runs=1),
        rank_filter(7, n_maps=6, naive_maps=2),
        *scales_to_image(n_maps=3, size=(50, 60)),
    ]
    for each in found:
        assert each.ratio == pytest.approx(each.baseline_s / each.engine_s, rel=1e-2)
    table = rates_table(machine("test"), [vars(each) for each in found])
    assert table.count("\n|") == 2 + len(found) - 1 + 1
    assert str(VOCAB) not in table


def test_a_wrong_result_is_refused() -> None:
    right = torch.rand(3, 3)
    require(right, right.double(), "something")
    for wrong in (right + 1e-3, right * float("nan")):
        with pytest.raises(ArithmeticError, match="something: the engine is"):
            require(wrong, right, "something")


def test_the_chain_of_one_scale_is_the_weighted_map() -> None:
    maps, weights = torch.rand(2, 1, 4, 5), torch.tensor([[1.0], [0.5]])
    total, extremes = interpolate_chain([maps], weights, (4, 5))
    torch.testing.assert_close(total[:, 0], maps[:, 0] * weights[:, :, None])
    assert extremes[1, 1] == total[1].max() and extremes[1, 0] == total[1].min()
