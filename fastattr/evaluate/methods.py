"""The methods an evaluation compares, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastattr.errors import InputError
from fastattr.types import AttributionConfig

# lens and TAM as they are published, at one scale; ARC is MSEA + ARC with the defaults.
# The best is ours, chosen by `benchmarks/results/sweep_*.jsonl` for maps that are right and needed both
METHODS: Mapping[str, AttributionConfig] = {
    "lens": AttributionConfig(method="lens", scales=(1.0,), filter=False, evidence=False),
    "tam": AttributionConfig(method="tam", scales=(1.0,), evidence=False),
    "arc": AttributionConfig(method="arc", evidence=False),
    "best": AttributionConfig(
        method="arc", scale_mean="geometric", context="prompt", filter=None, regions=6, evidence=False
    ),
}


def method_of(name: str) -> AttributionConfig:
    """The configuration of a name, `arc`, or of a name with its own scales, `arc@1` or `lens@1+1.5+2`.

    Raises:
        InputError: there is no such method, or the scales are no numbers.
    """
    base, at, scales = name.partition("@")
    if base not in METHODS:
        raise InputError(
            f"there is no method {base!r}, expected one of {', '.join(METHODS)}, alone or with its scales as in 'tam@1+1.5+2'"
        )
    if not at:
        return METHODS[base]
    try:
        chosen = tuple(float(scale) for scale in scales.split("+"))
    except ValueError as error:
        raise InputError(
            f"the scales of {name!r} are {scales!r}, expected numbers joined by +, for example 'tam@1+1.5+2'"
        ) from error
    return replace(METHODS[base], scales=chosen)
