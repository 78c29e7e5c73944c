"""Loading a model: the options that commands share, and the call of `fastattr.load`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from fastattr.errors import InputError

if TYPE_CHECKING:
    from fastattr.adapters import Model


class DtypeName(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1; by default the GPU if there is one.", show_default=False)
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model; read it first.")
]
Dtype = Annotated[DtypeName, typer.Option(help="Dtype of the weights; auto: as saved.")]


def choose_device(device: str | None) -> str:
    """The device a command runs on: the one asked for, or the GPU if there is one, else the CPU.

    Raises:
        InputError: torch cannot use the device that was asked for.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--device is {device!r}, which cannot be used here ({reason}); expected cpu, or a GPU that torch finds, "
            "for example cuda or cuda:1"
        ) from error
    return device


def load_model(name: str, device: str, dtype: DtypeName, trust: bool) -> Model:
    """`fastattr.load` without the progress bars of transformers. Raises as it does."""
    import fastattr
    from fastattr.adapters import hide_loading_bars

    hide_loading_bars()
    return fastattr.load(name, device=device, dtype=dtype.value, trust_remote_code=trust)
