"""Configurations by name, and `configure`, which accepts every form in which a configuration may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal, TypedDict

from fastattr.errors import InputError
from fastattr.types import DEFAULT_SCALES, DEFAULT_TOP_K, AttributionConfig

# lens and TAM as published, at one scale; arc is MSEA + ARC with the defaults, at the model's own scales. best is our
# own, chosen from `benchmarks/results/sweep_*.jsonl` by plausibility and faithfulness
METHODS: Mapping[str, AttributionConfig] = {
    "lens": AttributionConfig(method="lens", scales=(1.0,), filter=False),
    "tam": AttributionConfig(method="tam", scales=(1.0,)),
    "arc": AttributionConfig(method="arc"),
    "best": AttributionConfig(method="arc", scale_mean="geometric", context="prompt", filter=None, regions=6),
}

AnyConfig = AttributionConfig | str | Mapping[str, Any] | None
"""A configuration, the name of one, the options of one as a mapping, or None for the default."""

_NOT_IN_NAMES = ("method", "scales", "evidence", "backend")  # the last two do not change a map


class ConfigChanges(TypedDict, total=False):
    """Options that replace those of a configuration: the fields of `AttributionConfig`, where `method` may be any name."""

    method: str
    scales: Sequence[float] | None
    scale_weights: Sequence[float] | None
    decision_weight: bool
    scale_mean: Literal["arithmetic", "geometric"]
    aggregate: Literal["before", "after"]
    top_k: int | None
    rbo_p: float
    arc_weight: Literal["product", "relevance"]
    context: Literal["all", "prompt", "response"]
    layer: int
    filter: bool | None
    regions: int
    evidence: bool
    compat: Literal["tam"] | None
    backend: Literal["auto", "triton", "torch"]


def method_of(name: str) -> AttributionConfig:
    """The configuration of a name: `lens`, `tam`, `arc` or `best`, or one of them at other scales, as in `tam@1+1.5+2`.

    Raises:
        InputError: there is no such name, or the scales are not numbers.
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


def configure(config: AnyConfig, changes: ConfigChanges | None = None, *, default: str = "arc") -> AttributionConfig:
    """The configuration that is meant by `config` and the options beside it.

    Args:
        config: a configuration, its name, or a mapping of options in which `method` is a name.
        changes: options that replace those of `config`. Where `config` is None, `method` among them names it.
        default: name of the configuration where neither names one.

    Raises:
        InputError: a name or an option does not exist, a value is out of range, or something is given twice.
    """
    options = _known({} if changes is None else changes)
    if isinstance(config, Mapping):
        both = sorted(set(config) & set(options))
        if both:
            raise InputError(f"{', '.join(both)} is given in the configuration and beside it, expected it once")
        options, config = _known(config) | options, None
    if config is None:
        config = options.pop("method", None)
    elif "method" in options:
        raise InputError(
            f"got config={config!r} and method={options['method']!r}, expected one of them: method names a whole configuration"
        )
    if config is None:
        config = method_of(default)
    if isinstance(config, str):
        if "@" in config and "scales" in options:
            raise InputError(
                f"{config!r} names its scales, but scales={options['scales']!r} is given too, expected them once"
            )
        config = method_of(config)
    if not isinstance(config, AttributionConfig):
        raise InputError(
            f"the configuration is a {type(config).__name__}, expected an AttributionConfig or a name: {', '.join(METHODS)}"
        )
    return replace(config, **options)


def refuse_compat(config: AttributionConfig) -> None:
    """Raises `InputError` where `compat` is set, which only `attribute_states` supports."""
    if config.compat is not None:
        raise InputError(f"compat={config.compat!r} is for attribute_states; leave it out")


def name_of(config: AttributionConfig) -> str:
    """The shortest name of a configuration, with the options that differ: `best`, `arc@1`, `arc, top_k=20`.

    Evidence and backend are left out: they do not change a map.
    """
    names = [name for name, base in METHODS.items() if base.method == config.method]
    name = min(names, key=lambda each: len(_differences(config, METHODS[each])))
    base = METHODS[name]
    shown = [f"{option}={_written(getattr(config, option))}" for option in _differences(config, base)]
    if config.scales is None and base.scales is not None:
        shown.append("scales=None")
    elif config.scales is not None and config.scales != (base.scales or DEFAULT_SCALES):
        name += f"@{_written(config.scales)}"
    return ", ".join([name, *shown])


def from_saved(stored: Mapping[str, Any]) -> AttributionConfig:
    """The configuration of a saved attribution or record, also of an earlier version.

    Raises:
        InputError: it holds an option that this version does not know.
    """
    unknown = sorted(set(stored) - set(_OPTIONS))
    if unknown:
        raise InputError(
            f"the settings hold {', '.join(unknown)}, which this version of fastattr does not know; "
            "read it with the version that wrote it, or a newer one"
        )
    scales = stored.get("scales") or None  # earlier versions wrote () for the model's own
    return AttributionConfig(**{**stored, "scales": scales})


_OPTIONS = tuple(field.name for field in fields(AttributionConfig))


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the options. Raises `InputError` where one is unknown."""
    unknown = [str(name) for name in options if name not in _OPTIONS]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; known are {', '.join(_OPTIONS)}")
    return dict(options)


def _differences(config: AttributionConfig, base: AttributionConfig) -> list[str]:
    """Names of the options that differ, except those that `name_of` leaves out or shows as scales."""
    ours, theirs = ({**asdict(each), "top_k": each.top_k or DEFAULT_TOP_K} for each in (config, base))
    return [name for name in _OPTIONS if name not in _NOT_IN_NAMES and ours[name] != theirs[name]]


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(f"{number:g}" for number in value)
    return str(value)
