"""Rows to attributions, several at once, and fewer at once where memory does not do."""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from fastattr.adapters import check_model, load
from fastattr.batch.reach import MAX_ROW_BYTES, Reach, read
from fastattr.batch.sources import Row
from fastattr.chat import text_of
from fastattr.errors import BackendError, FastattrError, ImageError, InputError, UnsupportedModelError
from fastattr.images import count_pixels
from fastattr.pipeline import attribute_batch
from fastattr.types import Attribution, AttributionConfig

if TYPE_CHECKING:
    from fastattr.adapters import Model

ROWS_AT_ONCE = 16  # explained together, where memory allows

T = TypeVar("T")

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
HOPELESS = (UnsupportedModelError, BackendError)  # no other row would fare better


@dataclass(frozen=True)
class Ready:
    """A row with its images read, but not decoded.

    Attributes:
        n_pixels: of all its images.
    """

    row: Row
    images: tuple[bytes, ...]
    n_pixels: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows of like sizes want to be explained together."""
        response = self.row.response
        return self.n_pixels, len(text_of(self.row.prompt)) + (0 if response is None else len(response))


def load_model(name: str, device: str | None, dtype: str = "auto", *, trust_remote_code: bool = False) -> Model:
    """`fastattr.load`, or whatever `package.module:function` returns when it is called with the device.

    Raises:
        InputError: there is no such model or function, or it fails.
        UnsupportedModelError: the model has a form fastattr cannot explain.
        OUT_OF_MEMORY: there is none for it.
    """
    try:
        place = None if device is None else torch.device(device)
        if place is not None and place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # also for allocations that name no device
        if ":" not in name or Path(name).exists():
            return load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if dtype != "auto" or trust_remote_code:
            raise InputError(
                f"the model {name!r} is a function, which loads the model itself; dtype and trust_remote_code apply only to "
                "names that fastattr.load takes"
            )
        model = pkgutil.resolve_name(name)(device)
        check_model(model)
        return model
    except (FastattrError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        raise InputError(
            f"the model {name!r} cannot be loaded, expected what fastattr.load takes, or package.module:function: "
            f"{type(error).__name__}: {error}"
        ) from error


def get_ready(row: Row, reach: Reach) -> Ready:
    """Read the images, of which one row may have `MAX_ROW_BYTES`. Raises `ImageError`."""
    images: list[bytes] = []
    left_bytes = MAX_ROW_BYTES
    for image in row.images:
        data = image if isinstance(image, bytes) else read(image, reach, left_bytes)
        left_bytes -= len(data)
        if left_bytes < 0:
            raise ImageError(f"the pictures of the row are more than {MAX_ROW_BYTES >> 20} MiB; make them smaller")
        images.append(data)
    return Ready(row, tuple(images), sum(_pixels(data, named) for data, named in zip(images, row.images, strict=True)))


def explain_rows(
    model: Model, rows: Sequence[Ready], attribution: AttributionConfig, max_new_tokens: int
) -> list[Attribution | Exception]:
    """Explain rows that were put together because they are alike. What is wrong with one row is its result.

    Raises:
        OUT_OF_MEMORY: for all of them, to be tried in smaller parts.
        HOPELESS: the model or the backend cannot explain anything.
        Exception: the device does not work any more.
    """
    try:
        together = [(list(each.images), each.row.prompt, each.row.response) for each in rows]
        return [*attribute_batch(model, together, attribution, max_new_tokens=max_new_tokens)]
    except (*OUT_OF_MEMORY, *HOPELESS):
        raise
    except Exception as error:  # a processor or a model may raise anything
        if _is_broken_device(error):
            raise
        if len(rows) == 1:
            return [error]
    # one of them is at fault: each by itself tells which
    return [result for each in rows for result in explain_rows(model, [each], attribution, max_new_tokens)]


def backing_off(
    rows: Sequence[Ready], explain: Callable[[Sequence[Ready]], Sequence[T | Exception]], *, at_once: int = ROWS_AT_ONCE
) -> Iterator[tuple[Ready, T | Exception]]:
    """Every row with its result; half as many at once from where memory did not do, down to one, which then fails.

    Args:
        rows: the smallest first, so that what was too much stays too much.
    """
    start = 0
    while start < len(rows):
        chunk = rows[start : start + at_once]
        try:
            results = explain(chunk)
        except OUT_OF_MEMORY as error:
            _give_back(error)
            if len(chunk) > 1:
                at_once = len(chunk) // 2
                continue
            results = [error]
        yield from zip(chunk, results, strict=True)
        start += len(chunk)


def _pixels(data: bytes, named: bytes | str) -> int:
    """From the header alone."""
    name = f"the image of {len(data)} bytes" if isinstance(named, bytes) else f"image {named[:200]!r}"
    return count_pixels(data, name)


def _give_back(error: BaseException) -> None:
    error.__traceback__ = None  # its frames hold the tensors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_broken_device(error: BaseException | None) -> bool:
    """After an illegal access every later call fails as well: the process must end, not all the rows."""
    if error is None:
        return False
    broken = isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
    )
    return broken or _is_broken_device(error.__cause__)  # a forward tells it in its own words
