"""Files, written whole or not at all: an attribution as safetensors with a versioned manifest, a calibration as JSON."""

from __future__ import annotations

import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastattr.calibration import Calibration
from fastattr.config import from_saved
from fastattr.decoding import read_png
from fastattr.errors import InputError, SaveError
from fastattr.types import Attribution

FORMAT = 2

_TENSORS = ("context", "log_prob", "agreement", "raw_range", "residual", "degenerate")
_OPTIONAL_TENSORS = ("relevance", "evidence", "explained")
_TEXTS = (
    "response",
    "tokens",
    "token_ids",
    "spans",
    "context_tokens",
    "prompt",
    "model",
    "source",
    "backend",
    "notes",
    "versions",
)
_SHAPES = ("grids", "extents", "picture_sizes")
_LATER = ("special", "reasoning")  # missing in files of earlier versions
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX")


def is_litter(path: str) -> bool:
    """Whether a file is a by-product of macOS or Windows: `._x`, `.DS_Store`, `__MACOSX/`, `Thumbs.db`, `desktop.ini`."""
    return any(part in _LITTER or part.startswith("._") for part in path.replace("\\", "/").split("/"))


def save(attribution: Attribution, path: str | Path) -> Path:
    """Write everything, pictures as PNG.

    Raises:
        SaveError: the file cannot be written; nothing is left behind.
    """
    tensors = {name: getattr(attribution, name) for name in _TENSORS}
    tensors |= {name: value for name in _OPTIONAL_TENSORS if (value := getattr(attribution, name)) is not None}
    tensors |= {f"image.{i}": maps for i, maps in enumerate(attribution.image)}
    for i, frames in enumerate(attribution.pictures):
        tensors |= {f"picture.{i}.{t}": _to_png(frame) for t, frame in enumerate(frames)}
    manifest = {
        "format": FORMAT,
        "images": len(attribution.image),
        "frames": [len(frames) for frames in attribution.pictures],
        "config": asdict(attribution.config),
        "calibration": None if attribution.calibration is None else asdict(attribution.calibration),
        **{name: getattr(attribution, name) for name in _TEXTS + _SHAPES + _LATER},
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = to_safetensors(contiguous, metadata={"fastattr": json.dumps(manifest)})
    with whole_file(path) as file:
        file.write(data)
    return Path(path)


def load(path: str | Path) -> Attribution:
    """Read what `save` wrote.

    Raises:
        SaveError: the file is missing, broken, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise SaveError(f"{str(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("fastattr")
            if stored is None:
                raise SaveError(
                    f"{str(path)!r} is a safetensors file, but not an attribution: it has no 'fastattr' manifest"
                )
            manifest: Any = json.loads(stored)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise SaveError(
            f"{str(path)!r} cannot be read as an attribution: {error}; expected a .safetensors file that Attribution.save wrote"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise SaveError(f"{str(path)!r} has format {found}, this version reads {FORMAT}; use a matching fastattr")
    try:
        attribution = _from_manifest(manifest, tensors)
        _check_whole(attribution)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise SaveError(f"{str(path)!r} cannot be read as an attribution: {error!r}") from error
    return attribution


def _from_manifest(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Attribution:
    config = from_saved(manifest["config"])
    pictures = tuple(
        np.stack([read_png(tensors[f"picture.{i}.{t}"].numpy().tobytes()) for t in range(frames)])
        for i, frames in enumerate(manifest["frames"])
    )
    values: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
    values |= {name: tensors.get(name) for name in _OPTIONAL_TENSORS}
    values |= {name: _frozen(manifest[name]) for name in _TEXTS + _SHAPES}
    values |= {name: _frozen(manifest.get(name, [])) for name in _LATER}
    calibration = manifest.get("calibration")  # missing in files of earlier versions
    return Attribution(
        image=tuple(tensors[f"image.{i}"] for i in range(manifest["images"])),
        pictures=pictures,
        config=config,
        calibration=None if calibration is None else Calibration(**calibration),
        **values,
    )


def _check_whole(held: Attribution) -> None:
    """That the parts of a file fit together and can be shown. Raises `ValueError`, or what a part of a wrong type raises."""
    n = len(held.tokens)
    texts = (held.response, held.prompt, held.model, held.source, held.backend)
    words = (
        *texts,
        *held.tokens,
        *held.context_tokens,
        *held.notes,
        *(each for pair in held.versions for each in pair),
    )
    if not all(isinstance(each, str) for each in words) or any(len(pair) != 2 for pair in held.versions):
        raise ValueError("a text in it is no text")
    spans = (*held.spans, *held.reasoning)
    if len(held.spans) != n or len(held.token_ids) != n or not all(0 <= a <= b <= len(held.response) for a, b in spans):
        raise ValueError(f"it holds {n} tokens, and spans or ids that do not fit them")
    if not all(0 <= index < n for index in held.special):
        raise ValueError("it holds special tokens that it has not")
    shapes = [tuple(held.context.shape), *(tuple(each.shape[:1]) for each in (held.log_prob, held.agreement))]
    if shapes != [(n, len(held.context_tokens)), (n,), (n,)]:
        raise ValueError(f"it holds {n} tokens and tensors of {shapes}")
    for grid in held.image:
        if grid.ndim != 4 or len(grid) != n or 0 in grid.shape[1:] or not grid.is_floating_point():
            raise ValueError(f"a map is {grid.dtype} {tuple(grid.shape)}, expected floats [{n} t h w]")
    if not len(held.image) == len(held.extents) or len(held.pictures) not in (0, len(held.image)):
        raise ValueError(
            f"it holds {len(held.image)} maps, {len(held.extents)} extents and {len(held.pictures)} pictures"
        )
    if not all(len(box) == 4 and all(math.isfinite(side) for side in box) for box in held.extents):
        raise ValueError("an extent is no box")


def write_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration; `load` finds it as `calibration.json` in a model's directory.

    Raises:
        SaveError: the file cannot be written; nothing is left behind.
    """
    with whole_file(path) as file:
        file.write((json.dumps(asdict(calibration), indent=2) + "\n").encode())
    return Path(path)


def read_calibration(path: str | Path) -> Calibration:
    """Read what `write_calibration` wrote.

    Raises:
        InputError: the file cannot be read, is no JSON, or does not hold exactly the fields of a `Calibration`.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        expected = {field.name for field in fields(Calibration)}
        if not isinstance(stored, dict) or set(stored) != expected:
            held = ", ".join(sorted(stored)) if isinstance(stored, dict) else type(stored).__name__
            raise InputError(f"it holds {held or 'nothing'}, expected {', '.join(sorted(expected))}")
        return Calibration(**stored)
    except (OSError, ValueError, RecursionError) as error:  # InputError, JSON and UTF-8 errors are ValueErrors
        raise InputError(
            f"{str(path)!r} cannot be read as a calibration: {error}; write a new one with "
            "fastattr eval DATASET --calibration FILE, or take it away"
        ) from error


@contextmanager
def whole_file(path: str | Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` only when the block ends without an error.

    Args:
        private: only the owner may read it; else whom the process' umask lets.

    Raises:
        SaveError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    temporary = ""
    try:
        handle, temporary = _make_temporary(path, 0o600 if private else 0o666)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = ""
    except SaveError:  # raised by whoever writes
        raise
    except OSError as error:
        raise SaveError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary:
            with suppress(OSError):  # what went wrong first is what is told
                os.unlink(temporary)


def check_writable(path: str | Path) -> None:
    """Check that `whole_file` could write there, without changing anything.

    Raises:
        SaveError: it could not: the folder is missing or read-only, `path` is a directory, or its name is too long.
    """
    handle, temporary = _make_temporary(Path(path), 0o600)
    os.close(handle)
    os.unlink(temporary)


def _make_temporary(path: Path, mode: int) -> tuple[int, str]:
    """Create the file that is renamed to `path` when it is complete; returns its descriptor and name. Raises `SaveError`.

    The system takes the umask off `mode`. `tempfile.mkstemp` has a fixed mode, and a process can ask for its umask only by
    changing it, for all of its threads.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a directory")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), str(
            temporary
        )
    except (OSError, ValueError) as error:  # a ValueError where the name holds a null character
        raise SaveError(
            f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}; choose a folder that exists "
            "and is writable"
        ) from error


def _to_png(frame: np.ndarray) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _frozen(value: Any) -> Any:
    """JSON lists back to the tuples they were."""
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
