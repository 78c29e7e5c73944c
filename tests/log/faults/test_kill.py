"""kill -9, again and again, at random points of capture, spool, publication and explanation by a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fastattr.log import read
from tests.log.faults.counting import FaultCounts, assert_whole

N_KILLED = 200
SEED = 20261123
ROOT = Path(__file__).parents[3]


def test_killed_two_hundred_times_nothing_durable_is_lost(tmp_path: Path, fault_counts: FaultCounts) -> None:
    dest = tmp_path / "dest"
    process = subprocess.run(
        [sys.executable, "-m", "tests.log.faults.killing", str(dest), str(N_KILLED), str(SEED)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    *lines, _clean = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == N_KILLED
    assert "Traceback" not in process.stderr

    rows = assert_whole(dest)
    acknowledged = {each for line in lines for each in line["acknowledged"]} | {"clean start"}
    given_up = {
        json.loads(_manifest(path))["request_id"]  # took a worker down three times: kept for a person to look at
        for path in (dest / "spool" / "inbox" / "given_up").glob("*.request")
    }
    assert not given_up & {row["request_id"] for row in rows}
    fault_counts.check("kill -9", dest, acknowledged - given_up, faults=N_KILLED)
    assert len(acknowledged) > N_KILLED
    assert len(given_up) < len(acknowledged) / 20

    # every place was reached: without this the rest would be easy
    roles, hows = Counter(line["role"] for line in lines), Counter(line["how"].split()[0] for line in lines)
    assert set(roles) == {"made", "captured", "handing over", "worker"}, roles
    assert {"time", "open", "pwrite", "fsync", "replace", "unlink"} <= set(hows), hows
    assert sum(line["torn_files"] > 0 for line in lines) >= 3
    assert all(
        any(line["acknowledged"] for line in lines if line["role"] == role) for role in roles if role != "worker"
    )

    # nothing is left that anyone would have to clean up, and all of it reads as attributions
    rooms = dest / "spool" / "rooms"
    assert [path for path in rooms.rglob("*") if path.is_file()] == []
    assert list((dest / "spool" / "inbox").glob("*.request")) == []
    assert list((dest / "spool" / "inbox" / "claimed").rglob("*.request")) == []
    assert sum(1 for _ in read(dest)) == len(rows)
    for path in (dest / "writers").glob("*.json"):
        tally = json.loads(path.read_text())
        assert tally["submitted"] == tally["written"] + tally["in_flight"] + sum(
            [*tally["dropped"].values(), *tally["failed"].values()]
        )
        assert tally["damaged_frames"] == 0


def _manifest(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["request"]
