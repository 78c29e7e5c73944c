"""Every choice is checked before any work is done."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastattr import AttributionConfig, InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcam"}, "method is 'gradcam', expected one of 'lens', 'tam', 'arc'"),
        ({"scale_mean": "harmonic"}, "scale_mean is 'harmonic', expected one of 'arithmetic', 'geometric'"),
        ({"filter": "auto"}, "filter is 'auto', expected one of None, True, False"),
        ({"regions": -1}, "regions is -1, expected a whole number from 0"),
        ({"regions": True}, "regions is True, expected a whole number from 0"),
        ({"aggregate": "during"}, "aggregate is 'during', expected one of 'before', 'after'"),
        ({"arc_weight": "sum"}, "arc_weight is 'sum'"),
        ({"context": "none"}, "context is 'none'"),
        ({"compat": "eagle"}, "compat is 'eagle', expected one of None, 'tam'"),
        ({"backend": "cuda"}, "backend is 'cuda', expected one of 'auto', 'triton', 'torch'"),
        ({"scales": 1.0}, "scales is 1.0, expected numbers"),
        ({"layer": "last"}, "layer is 'last', expected a whole number"),
        ({"rbo_p": "x"}, "rbo_p is 'x', expected a number"),
        ({"scales": (None,)}, r"scales is \(None,\), expected numbers"),
        ({"scales": (0.0,)}, "scales holds 0.0, expected numbers above 0 and at most 8"),
        ({"scales": (-1.0, 1.0)}, "scales holds -1.0"),
        ({"scales": (1.0, 1e6)}, "scales holds 1000000.0"),
        ({"scales": (1.0, math.nan)}, "scales holds nan"),
        ({"scales": (1.0, math.inf)}, "scales holds inf"),
        ({"scales": (1.0, 2.0, 1)}, "holds a number twice"),
        ({"scales": (1.0, 2.0), "scale_weights": (1.0,)}, "holds 1 numbers for 2 scales"),
        ({"scales": (1.0, 2.0), "scale_weights": (0.0, 0.0)}, "positive sum"),
        ({"scales": (1.0, 2.0), "scale_weights": (2.0, -1.0)}, "numbers of at least 0"),
        ({"scales": (1.0, 2.0), "scale_weights": (1.0, math.nan)}, "numbers of at least 0"),
        ({"top_k": 0}, "top_k is 0, expected a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ({"rbo_p": 0.0}, "rbo_p is 0.0, expected a number between 0 and 1"),
        ({"rbo_p": 1.0}, "rbo_p is 1.0"),
        ({"rbo_p": math.nan}, "rbo_p is nan"),
        ({"compat": "tam"}, "compat='tam' reproduces one-scale TAM, but method is 'arc'"),
        ({"compat": "tam", "method": "tam"}, "scales are None"),
        ({"compat": "tam", "method": "tam", "scales": (1.0, 2.0)}, r"scales are \(1.0, 2.0\)"),
        ({"scales": ()}, "scales is empty, expected at least one number, .* or None for the model's own"),
        ({"scales": "12"}, "scales is '12', expected numbers"),
        ({"scale_weights": 1.0}, "scale_weights is 1.0, expected numbers"),
        ({"scale_weights": (1.0, -1.0)}, "numbers of at least 0"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttributionConfig(**options)


def test_numbers_and_lists_are_taken_as_they_come() -> None:
    config = AttributionConfig(scales=[1, 2], scale_weights=[1, 3])  # type: ignore[arg-type]
    assert config.scales == (1.0, 2.0)
    assert config.scale_weights == (1.0, 3.0)
    assert hash(config) == hash(AttributionConfig(scales=(1.0, 2.0), scale_weights=(1.0, 3.0)))
