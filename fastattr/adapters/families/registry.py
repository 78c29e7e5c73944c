"""Families that others bring: registered in a program, or by an installed package."""

from __future__ import annotations

from importlib.metadata import entry_points

from fastattr.adapters.families.family import Family
from fastattr.errors import InputError, UnsupportedModelError

GROUP = "fastattr.adapters"  # entry points: model_type = "package.module:FAMILY"

_registered: dict[str, Family] = {}


def register_adapter(model_type: str, family: Family) -> None:
    """Make a kind of model known for the rest of this process; one that is known already is replaced.

    A package makes its own known to everybody who installs it with an entry point of the group `fastattr.adapters`.
    What a family is, with an example: `fastattr/adapters/README.md`.

    Args:
        model_type: of the model's configuration.

    Raises:
        InputError: one of the two is something else.
    """
    if not isinstance(model_type, str) or not model_type:
        raise InputError(f"model_type is {model_type!r}, expected the model_type of a configuration, as text")
    _registered[model_type] = _checked(family, f"the adapter for {model_type!r}")


def registered_family(model_type: str) -> Family | None:
    """The family that somebody registered for a model type, or that a package brings; None where nobody does.

    Raises:
        UnsupportedModelError: a package brings one, and it cannot be loaded.
    """
    if model_type in _registered:
        return _registered[model_type]
    found = entry_points(group=GROUP, name=model_type)
    if not found:
        return None
    entry = next(iter(found))
    package = "a package" if entry.dist is None else entry.dist.name
    if len(found) > 1:
        packages = sorted({each.value for each in found})
        raise UnsupportedModelError(
            f"{len(found)} packages bring an adapter for {model_type!r}: {', '.join(packages)}; uninstall all but one, or "
            "choose one with register_adapter"
        )
    try:
        family = entry.load()
    except Exception as error:  # somebody else's module may raise anything
        raise UnsupportedModelError(
            f"the adapter that {package} brings for {model_type!r} ({entry.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        return _checked(family, f"what {package} brings for {model_type!r} ({entry.value})")
    except InputError as error:
        raise UnsupportedModelError(str(error)) from error


def registered_types() -> list[str]:
    """Model types that others made known, in order of name."""
    return sorted({*_registered, *(entry.name for entry in entry_points(group=GROUP))})


def _checked(family: object, name: str) -> Family:
    if not isinstance(family, Family):
        raise InputError(f"{name} is a {type(family).__name__}, expected a fastattr.Family")
    for part in ("look", "cell", "enlarge", "watch"):
        value = getattr(family, part)
        if not callable(value) and not (value is None and part in ("enlarge", "watch")):
            raise InputError(f"{name} has {part}={value!r}, expected a function")
    return family
