"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from fastattr.errors import SaveError


def publish(path: str | Path, content: bytes) -> Path:
    """Put `content` at `path` in one step: a reader sees the old file or the new one, never half of it.

    Raises:
        SaveError: the path cannot be written; nothing is left behind.
    """
    path = Path(path)
    # The rename is atomic only within one file system, so the draft stands beside its destination.
    draft = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as error:
        raise SaveError(
            f"cannot write {path}: {error.strerror or error}; "
            "give the path of a file in a folder that exists and is writable"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where its folder is a file there is no draft to remove either
            draft.unlink(missing_ok=True)
    return path
