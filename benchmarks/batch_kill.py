"""`fastattr batch`, killed with SIGKILL again and again, against a run that nobody disturbs.

    python -m benchmarks.batch_kill

2,000 generated scenes, ten kills of the whole process group at random moments, each followed by the same command. Then
every id must be there exactly once, and every record equal to that of the undisturbed run but for times. How often a
kill left something unfinished says whether the moments were hard ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr.demo.scenes import HELD_OUT, make_scene
from fastattr.log.doctor import examine

PROMPT, ANSWER = "Describe the image.", "A red circle."
UNEQUAL = ["time", "queued_ms", "explain_ms"]  # between two runs of one plan
POLL_S = 0.02
LONGEST_S = 600.0  # without a new part

OPTIONS = ("--method", "lens", "--scales", "1", "--no-evidence", "--workers", "2")


@dataclass(frozen=True)
class Killed:
    """One process group that was killed.

    Attributes:
        after_s: since its start.
        parts: published by then, by this one and those before it.
        unfinished: temporary files of parts that it left.
    """

    after_s: float
    parts: int
    unfinished: int


@dataclass(frozen=True)
class Comparison:
    """An output beside that of an undisturbed run. Counts are of ids."""

    rows: int
    missing: int
    twice: int
    unequal: int
    healthy: bool

    @property
    def whole(self) -> bool:
        return self.healthy and not (self.missing or self.twice or self.unequal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shard-rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--out", type=Path, default=RESULTS / "batch_kill.jsonl")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scenes = write_scenes(Path(folder) / "scenes.jsonl", wanted.scenes)
        options = [str(scenes), *OPTIONS, "--shard-rows", str(wanted.shard_rows)]
        command = [sys.executable, "-m", "fastattr", "batch", *options]
        plain, disturbed = Path(folder) / "plain", Path(folder) / "disturbed"
        began_s = time.monotonic()
        subprocess.run([*command, "--out", str(plain)], check=True)
        plain_s = time.monotonic() - began_s
        began_s = time.monotonic()
        parts = -(-wanted.scenes // wanted.shard_rows)
        killed = kill_at_random([*command, "--out", str(disturbed)], disturbed, parts, wanted.kills, wanted.seed)
        subprocess.run([*command, "--out", str(disturbed)], check=True)
        result = compare(disturbed, plain, [f"scene-{k}" for k in range(wanted.scenes)])
        row = {
            "record": "batch_kill",
            "scenes": wanted.scenes,
            "parts": parts,
            "kills": len(killed),
            "left_unfinished": sum(each.unfinished for each in killed),
            "plain_s": round(plain_s, 1),
            "rows_per_s": round(wanted.scenes / plain_s, 2),
            "disturbed_s": round(time.monotonic() - began_s, 1),
            **asdict(result),
        }
    print(json.dumps(row, indent=2))
    if not result.whole:
        raise SystemExit("rows are missing, there twice, or not equal: nothing is written")
    write_jsonl(wanted.out, [machine("python -m benchmarks.batch_kill"), row])


def write_scenes(path: Path, n: int) -> Path:
    """`n` rows of JSON lines with ids `scene-<k>`, and their pictures beside the file."""
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for k in range(n):
            make_scene(HELD_OUT + k).image.save(folder / f"{k}.png")
            row = {"id": f"scene-{k}", "image": f"pictures/{k}.png", "prompt": PROMPT, "response": ANSWER}
            file.write(json.dumps(row) + "\n")
    return path


def kill_at_random(
    command: Sequence[str], out: Path, parts: int, kills: int, seed: int, env: dict[str, str] | None = None
) -> list[Killed]:
    """Start the command and kill its process group, `kills` times, spread over the batch.

    Args:
        parts: that the whole batch publishes; some are left for the run after the last kill.

    Raises:
        RuntimeError: the command ends by itself, or publishes nothing for ten minutes.
    """
    rng = random.Random(seed)
    killed = []
    for k in range(kills):
        # at a part that this run is the first to reach, and then at any moment of the work on the next ones
        at_part = rng.randint(k * (parts - 2) // kills, (k + 1) * (parts - 2) // kills - 1)
        process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
        began_s = time.monotonic()
        try:
            while _parts(out) <= at_part and process.poll() is None:
                if time.monotonic() - began_s > LONGEST_S:
                    raise RuntimeError(f"part {at_part} did not come within {LONGEST_S:g} s")
                time.sleep(POLL_S)
            time.sleep(rng.uniform(0.0, 0.5))
            if process.poll() is not None:
                raise RuntimeError(
                    f"the command ended by itself with exit code {process.returncode}, before kill {k + 1}"
                )
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        unfinished = sum(1 for _ in out.glob("date=*/.*.tmp"))
        killed.append(Killed(round(time.monotonic() - began_s, 2), _parts(out), unfinished))
    return killed


def compare(out: Path, plain: Path, ids: Sequence[str]) -> Comparison:
    """Every id exactly once in `out`, and its record as it is in `plain`."""
    found, expected = _by_id(out), _by_id(plain)
    return Comparison(
        rows=sum(len(rows) for rows in found.values()),
        missing=sum(id not in found for id in ids),
        twice=sum(len(rows) > 1 for rows in found.values()),
        unequal=sum(found.get(id) != expected.get(id) for id in found.keys() | expected.keys()),
        healthy=examine(out).healthy,
    )


def _by_id(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every id, read without the readers of the log."""
    table: pa.Table = ds.dataset([str(path) for path in sorted(out.glob("date=*/*.parquet"))]).to_table()
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.drop_columns(UNEQUAL).to_pylist():
        found.setdefault(row["request_id"], []).append(row)
    return found


def _parts(out: Path) -> int:
    return sum(1 for path in out.glob("date=*/*.parquet") if not path.name.startswith("."))


if __name__ == "__main__":
    main()
