"""Descriptors against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattr.descriptors import describe_levels, describe_maps
from tests.engine.samples import make_attribution


def test_one_lit_cell_a_flat_map_and_a_dark_one() -> None:
    maps = torch.zeros(3, 1, 2, 4)
    maps[0, 0, 1, 2] = 0.5
    maps[1] = 0.25
    context = torch.tensor([[0.5, 0.0], [1.0, 1.0], [1.0, 0.0]])
    found = describe_maps((maps,), context)
    assert found.image_share.tolist() == [0.5, 0.5, 0.0]
    assert found.peak_ratio.tolist() == [8.0, 1.0, 0.0]
    assert found.entropy.tolist() == pytest.approx([0.0, 1.0, 0.0])
    # 85 % of eight equal cells need seven of them
    assert found.area.tolist() == [1 / 8, 7 / 8, 0.0]


def test_several_images_count_together() -> None:
    first, second = torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, 1, 1)
    first[0, 0, 0, 0], second[0, 1, 0, 0] = 0.6, 0.2
    found = describe_maps((first, second), torch.zeros(1, 0))
    assert found.image_share.item() == 1.0
    assert found.peak_ratio.item() == pytest.approx(0.75 * 4)
    assert found.entropy.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert found.area.item() == 0.5


@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_brightness_alone_changes_only_the_share(seed: int, gain: float) -> None:
    maps = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(seed))
    bright, dim = (describe_maps((maps * g,), torch.ones(2, 3)) for g in (1.0, gain))
    for name in ("peak_ratio", "entropy", "area"):
        torch.testing.assert_close(getattr(bright, name), getattr(dim, name))
    assert (dim.image_share <= bright.image_share).all()


def test_an_attribution_describes_its_own_maps() -> None:
    why = make_attribution(grids=((1, 4, 6), (3, 2, 2)))
    found = why.descriptors
    expected = sum(float(maps[3].sum()) for maps in why.image)
    assert float(found.image_share[3]) == pytest.approx(expected / (expected + float(why.context[3].sum())), rel=1e-5)


@given(
    cells=st.lists(st.lists(st.integers(0, 255), min_size=6, max_size=6), min_size=1, max_size=5),
    context=st.sampled_from([0.0, 1e-3, 2.5]),
)
def test_levels_are_described_as_the_maps_they_stand_for(cells: list[list[int]], context: float) -> None:
    levels = np.array(cells, np.uint8)
    found = describe_levels(levels, np.full(len(cells), context))
    maps = torch.from_numpy(levels).double()[:, None, None] / 255
    expected = describe_maps([maps.float()], torch.full((len(cells), 1), context))
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-5, atol=1e-6)
