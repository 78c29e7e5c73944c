"""Batches in processes of their own, which die, are killed and are told to stop."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.batch_kill import compare, kill_at_random
from benchmarks.batch_kill import write_scenes as write_plain_scenes
from fastattr import AttributionConfig
from fastattr.batch import Progress, Summary, run
from fastattr.batch.local import MAX_EARLY_DEATHS
from fastattr.batch.local import run as run_locally
from fastattr.batch.running import Engine
from fastattr.errors import FastattrError, InputError
from fastattr.log.doctor import examine
from tests.batch.scenes import (
    QUICK,
    command,
    encode,
    environment,
    failures,
    records,
    write_jsonl,
    write_scenes,
)
from tests.batch.scenes import run as run_command

LENS = AttributionConfig(method="lens", scales=(1.0,), filter=False, evidence=False)
N_KILLS, SEED = 3, 20261123


def test_killed_at_random_and_resumed_as_if_nothing_had_happened(tmp_path: Path, inline: Engine) -> None:
    """SIGKILL for the whole process group, again and again; `benchmarks.batch_kill` does the same at length."""
    source, out, plain = write_plain_scenes(tmp_path / "in.jsonl", 150), tmp_path / "out", tmp_path / "plain"
    options = [source, "--out", out, *QUICK, "--workers", "2", "--shard-rows", "6"]
    killed = kill_at_random(command(*options), out, 25, N_KILLS, SEED, environment())
    assert len(killed) == N_KILLS
    run_command(*options)
    run(source, plain, attribution=LENS, shard_rows=6, engine=inline)
    result = compare(out, plain, [f"scene-{k}" for k in range(150)])
    assert result.rows == 150 and result.whole, result
    assert list(out.rglob("*.tmp")) == [], "every part that was begun is finished"
    assert run(source, out, attribution=LENS, shard_rows=6, engine=inline).earlier == 150


def test_a_worker_that_is_killed_costs_nothing_and_a_row_that_crashes_workers_only_itself(tmp_path: Path) -> None:
    """The first in the first shard, from outside, the second in the second."""
    rows = [json.loads(line) for line in write_scenes(tmp_path / "in.jsonl", 12).read_text().splitlines()]
    rows[7]["image"] = {"base64": base64.b64encode(encode(Image.new("RGB", (192, 192), "red"))).decode()}
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    killed: list[int] = []

    def tell(progress: Progress) -> None:
        if progress.done and not killed:
            victim = multiprocessing.active_children()[0].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(progress.shards_done)

    options: dict[str, Any] = {"model": "tests.batch.loaders:deadly", "attribution": LENS, "shard_rows": 6}
    engine = partial(run_locally, workers=1)
    summary = run(source, out, engine=engine, max_error_rate=0.1, tell=tell, **options)
    assert killed == [0]
    assert summary == Summary("done", total=12, written=11, failed=1, left=0, earlier=0)
    assert failures(out) == {
        "scene-7": {
            "id": "scene-7",
            "row": "in.jsonl row 8",
            "error_type": "crashed",
            "error": "the process that explained it ended, twice",
            "attempt": 3,
        }
    }
    ids = records(out)["request_id"].to_pylist()
    assert sorted(ids) == sorted(f"scene-{k}" for k in range(12) if k != 7)
    assert examine(out).healthy
    assert not multiprocessing.active_children()


def test_workers_that_cannot_start_end_the_batch(tmp_path: Path) -> None:
    source = write_scenes(tmp_path / "in.jsonl", 1)
    with pytest.raises(FastattrError, match=f"{MAX_EARLY_DEATHS} workers died .exit code -6. before they explained"):
        run(source, tmp_path / "out", model="tests.batch.loaders:stillborn", engine=partial(run_locally, workers=1))
    with pytest.raises(InputError, match="no model can be loaded from 'nothing'"):
        run(source, tmp_path / "other", model="nothing", engine=partial(run_locally, workers=1))
    assert not multiprocessing.active_children()


def test_told_to_stop_and_gone_on_with(tmp_path: Path, inline: Engine) -> None:
    """SIGTERM for all processes, as a service ends, then Ctrl-C; each time soon, and with nothing half published."""
    source, out = write_scenes(tmp_path / "in.jsonl", 90), tmp_path / "out"
    options = [source, "--out", out, *QUICK, "--workers", "2", "--shard-rows", "15"]
    parts = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command(*options), env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        try:
            until_s = time.monotonic() + 60
            while len(list(out.glob("date=*/*.parquet"))) <= parts and time.monotonic() < until_s:
                time.sleep(0.02)
            os.killpg(process.pid, number)
            _, said = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        assert process.returncode == code, said
        assert "rows left; run the same command again to go on" in said and "Traceback" not in said
        assert _ends(process.pid), "somebody is left behind"
        assert parts < len(list(out.glob("date=*/*.parquet"))) < 6
        parts = len(list(out.glob("date=*/*.parquet")))
        assert list(out.rglob("*.tmp")) == []
        assert records(out).num_rows == 15 * parts
    assert run(source, out, attribution=LENS, shard_rows=15, engine=inline).earlier == 15 * parts
    assert sorted(records(out)["request_id"].to_pylist()) == sorted(f"scene-{k}" for k in range(90))


def test_the_command_gives_up_loudly_and_tells_in_json(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_scenes(tmp_path / "in.jsonl", 10).read_text().splitlines()]
    for each in rows[:3]:
        each["image"] = "none.png"
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out"
    options = [source, "--out", out, *QUICK, "--workers", "1", "--shard-rows", "5"]
    ran = run_command(*options, "--json-progress", "--max-error-rate", "0.2", code=1)
    first, *_, last = map(json.loads, ran.stdout.splitlines())
    assert (first["event"], first["done"], first["total"]) == ("progress", 0, 10)
    assert (last["event"], last["outcome"]) == ("end", "too_many_failures")
    assert last["written"] + last["failed"] + last["left"] == last["total"] == 10 and last["failed"] == 3
    assert [(reason["count"], reason["example"]["id"]) for reason in last["reasons"]] == [(3, "scene-0")]
    ran = run_command(*options, "--max-error-rate", "0.2", code=1)
    assert "GIVEN UP" in ran.stderr and "10 rows: 0 written, 3 failed, 7 left" in ran.stderr
    assert "3 x ImageError: image" in ran.stderr and "(id 'scene-0', in.jsonl row 1)" in ran.stderr
    ran = run_command(source, "--out", out, *QUICK, "--shard-rows", "6", code=2)
    assert "SaveError" in ran.stderr and "shard_rows is 5 there and 6 here" in ran.stderr
    assert "Traceback" not in ran.stderr


def _ends(group: int) -> bool:
    """Whether a process group is empty soon."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
