"""Models with a fault, named as `tests.batch.loaders:<function>` for workers that load them themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import fastattr
from fastattr.adapters import Model


def deadly(device: str | None) -> Model:
    """Ends its process when it sees a picture of one colour."""
    return _watched(device, lambda pixels: os.abort() if float(pixels.std(dim=(2, 3)).amax(dim=1).min()) == 0 else None)


def stillborn(device: str | None) -> Model:
    os.abort()


def killed_once(device: str | None) -> Model:
    """The first process that explains its fifth row is killed; `FASTATTR_TEST_FLAG` names a file that says it was."""
    seen = 0

    def look(pixels: Tensor) -> None:
        nonlocal seen
        seen += len(pixels)
        if seen >= 5:
            try:
                Path(os.environ["FASTATTR_TEST_FLAG"]).touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    return _watched(device, look)


def _watched(device: str | None, look: Callable[[Tensor], None]) -> Model:
    model = fastattr.load("shapes", device=device)

    def before(module: Any, args: Any, options: dict[str, Any]) -> None:
        look(options["pixel_values"])

    model.hf_model.register_forward_pre_hook(before, with_kwargs=True)
    return model
