"""Scenes as inputs of a batch, the command in a process of its own, and outputs as they can be compared."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from fastattr.demo.scenes import HELD_OUT, make_scene

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Describe the image."
ANSWER = "A red circle."
QUICK = ("--scales", "1", "--no-evidence", "--method", "lens")  # a few hundredths of a second a row
UNEQUAL = ["time", "queued_ms", "explain_ms"]  # between two runs of one plan


def png(seed: int = 0) -> bytes:
    return encode(make_scene(HELD_OUT + seed).image)


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], *, group: int = 1000) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_scenes(path: Path, n: int, *, answer: str | None = ANSWER) -> Path:
    """`n` rows of JSON lines with ids `scene-<k>`; every fifth picture lies in the row, the others beside the file."""
    (path.parent / "pictures").mkdir(exist_ok=True)
    rows = []
    for k in range(n):
        image: Any = f"pictures/{k}.png"
        if k % 5:
            (path.parent / image).write_bytes(png(k))
        else:
            image = {"base64": base64.b64encode(png(k)).decode()}
        rows.append({"id": f"scene-{k}", "image": image, "prompt": PROMPT, "response": answer})
    return write_jsonl(path, rows)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastattr", "batch", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`fastattr batch`, which must end with this exit code."""
    ran = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=120)
    assert ran.returncode == code, f"exit code {ran.returncode}, expected {code}\n{ran.stdout}\n{ran.stderr}"
    return ran


def records(out: Path) -> pa.Table:
    """All records, by id, read without any code of ours, less what may differ between two runs."""
    table = ds.dataset([str(path) for path in sorted(out.glob("date=*/*.parquet"))]).to_table()
    return table.drop_columns(UNEQUAL).sort_by("request_id")


def failures(out: Path) -> dict[str, dict[str, Any]]:
    """What is told of failed rows, by id."""
    lines = [line for path in sorted(out.glob("failed/*.jsonl")) for line in path.read_text().splitlines()]
    found = {row["id"]: row for row in map(json.loads, lines)}
    assert len(found) == len(lines), "a row failed twice"
    return found
