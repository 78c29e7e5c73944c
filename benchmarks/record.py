"""Result files: JSON lines, the first of which says where and with what they were measured."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattr.metrics import Interval

RESULTS = Path(__file__).parent / "results"


def machine(command: str) -> dict[str, Any]:
    """The header line: processor, threads, versions, commit and the command that writes the file."""
    from fastattr.evaluate.running import processor  # which a process that only measures never loads

    return {
        "record": "header",
        "command": command,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "numpy": np.__version__,
        "commit": _commit(),
    }


def rounded(interval: Interval) -> dict[str, float]:
    """An interval as it stands in a result file; `Interval(**row)` reads it again."""
    return {name: round(value, 6) for name, value in asdict(interval).items()}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write the rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return unfinished.replace(path)


def read_jsonl(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the rows that follow it."""
    header, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return header, rows


def _triton() -> str | None:
    """Version of triton; None where it is not installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash of the checkout, `+` where it has uncommitted changes; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return found.stdout.strip() + ("+" if changed.strip() else "")
