"""One real cluster on this machine: a worker is killed in the middle of a shard, and nobody sees it in the output."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path

from fastattr.log.doctor import examine
from tests.batch.scenes import ROOT, environment, failures, records, write_scenes


def test_a_cluster_whose_worker_is_killed(tmp_path: Path) -> None:
    source, out, flag = write_scenes(tmp_path / "in.jsonl", 30), tmp_path / "out", tmp_path / "flag"
    options = {
        "FASTATTR_TEST_FLAG": str(flag),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),  # else Ray leaves one in the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.batch.ray_job", str(source), str(out), str(flag)],
        cwd=ROOT,
        env={**environment(), **options},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["killed"]
    counts = {"total": 30, "written": 30, "failed": 0, "left": 0, "earlier": 0, "litter": 0}
    assert told["job"] == {"outcome": "done", **counts, "reasons": []}
    assert told["again"] == {**told["job"], "earlier": 30}
    assert sorted(records(out)["request_id"].to_pylist()) == sorted(f"scene-{k}" for k in range(30))
    assert failures(out) == {} and examine(out).healthy
    assert told["steps"] == [["scene-1", "ok", None], ["scene-2", "failed", "ImageError"], ["scene-3", "ok", None]]
