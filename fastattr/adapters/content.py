"""Digests of a model's files, which tell models of the same name apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils import cached_file

from fastattr.adapters.model import BUNDLED, CALIBRATION_FILE

_CHUNK_BYTES = 1 << 22


def model_content(name: str | Path) -> dict[str, str]:
    """Digests of the files in a model's directory by relative path, or `{"commit": ...}` for a hub id.

    Reads every byte, because a fine-tuned model may differ in its weights alone. The calibration file is left out: it
    does not change what the model computes. Empty where `load` would find no model.
    """
    folder = BUNDLED.get(str(name), Path(name))
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CALIBRATION_FILE)
        return {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    try:
        found = cached_file(str(name), "config.json")
    except (OSError, ValueError):
        return {}
    return {} if found is None else {"commit": Path(found).parent.name}


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()[:16]
