"""Which form of an operation runs: Triton on a GPU, torch anywhere."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")
OLDEST_TRITON = (3, 6)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def resolve(backend: str, device: torch.device) -> Literal["triton", "torch"]:
    """Decide what runs on `device`.

    `auto` takes Triton where it can run and torch elsewhere; a backend asked for by name runs or explains.

    Raises:
        BackendError: `triton` cannot run on `device`.
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    hindrance = _hindrance(device)
    if hindrance is None:
        return "triton"
    if backend == "auto":
        return "torch"
    raise BackendError(f"backend 'triton' was asked for, but {hindrance}; use backend='auto' or 'torch'")


def architecture(device: torch.device) -> str:
    """What the static configuration tables are keyed by: `sm_90`, `gfx942`, ...; `interpreter` without a GPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on_device_of(index: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Launch on the GPU that holds argument `index`; Triton itself launches on the current one."""

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        name = list(inspect.signature(launch).parameters)[index]

        @wraps(launch)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            held = args[index] if len(args) > index else kwargs[name]
            assert isinstance(held, Tensor)
            with torch.cuda.device_of(held):
                return launch(*args, **kwargs)

        return run

    return decorate


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _hindrance(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the tensors are on {device}, which Triton does not drive"
    try:
        import triton
    except ImportError as error:
        return f"it cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None
