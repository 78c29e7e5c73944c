"""Processes that fork, end without a word, share a directory, are told to stop, or have a clock that goes backwards."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattr
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger, LogStats, read
from fastattr.log.recipes.answering import PROMPT, inputs_of
from tests.engine.samples import make_attribution
from tests.log.faults.counting import FaultCounts, assert_identity, assert_whole, counted, rows_of

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
WHY = make_attribution(pictures=False)

START = """
import json, os, signal, sys, threading, time
from fastattr.log import AttributionLogger
from tests.engine.samples import make_attribution

why = make_attribution(pictures=False)
dest = sys.argv[1]

def say(**values):
    print(json.dumps(values), flush=True)
"""


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it forked can be ended with it
    )


def finished(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """What it said, and its standard error."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):  # it has ended, and all it forked
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines()], err


# --- fork ---------------------------------------------------------------------------------------------------

FORKING = """
logger = AttributionLogger(dest, sample_rate=1.0, segment_age_s=0.05, telemetry=False)
stop = threading.Event()
sent = []

def keep_busy():
    n = 0
    while not stop.is_set():
        if logger.submit_attribution(why, request_id=f"parent {n}"):
            sent.append(f"parent {n}")
        n += 1
        time.sleep(0.001)

busy = threading.Thread(target=keep_busy)
busy.start()
time.sleep(0.05)
children = []
for c in range(12):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            assert logger.stats().submitted == 0
            ids = [f"child {c} {i}" for i in range(5)]
            ok = all(logger.submit_attribution(why, request_id=each) for each in ids) and logger.flush(60)
            if c % 3 == 0:
                os.kill(os.getpid(), signal.SIGKILL) if os.write(writing, json.dumps(ids).encode()) else None
            ok = logger.shutdown(60) and ok
            os.write(writing, json.dumps(ids).encode())
            status = 0 if ok and logger.stats().written == 5 else 2
        finally:
            os._exit(status)
    os.close(writing)
    children.append((child, reading))
for c, (child, reading) in enumerate(children):
    with os.fdopen(reading, "rb") as pipe:
        sent += json.loads(pipe.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-9 if c % 3 == 0 else 0), (c, status)
stop.set()
busy.join()
assert logger.flush(60) and logger.shutdown(60)
with AttributionLogger(dest, sample_rate=1.0, telemetry=False) as after:
    after.submit_attribution(why, request_id="after")  # recovers the children that were killed
say(sent=[*sent, "after"], stats=vars(logger.stats()))
"""


def test_children_of_a_fork_log_on_their_own_while_the_parent_goes_on(
    tmp_path: Path, fault_counts: FaultCounts
) -> None:
    said, _ = finished(script(FORKING, tmp_path))
    stats = LogStats(**said[0]["stats"])
    assert_identity(stats)
    assert stats.in_flight == 0 and stats.written == sum(each.startswith("parent") for each in said[0]["sent"])
    rows = assert_whole(tmp_path)
    assert len({row["writer"] for row in rows}) == 14
    for writer in {row["writer"] for row in rows}:
        owners = {" ".join(row["request_id"].split()[:-1]) for row in rows if row["writer"] == writer}
        assert len(owners) == 1  # nobody writes what another submitted
    fault_counts.check("fork", tmp_path, set(said[0]["sent"]), faults=12)


# --- several writers ----------------------------------------------------------------------------------------

WRITING = """
name = sys.argv[2]
sys.stdin.readline()
sent = []
with AttributionLogger(dest, sample_rate=1.0, segment_bytes=20_000, telemetry=False) as logger:
    for n in range(300):
        if logger.submit_attribution(why, request_id=f"{name} {n}"):
            sent.append(f"{name} {n}")
        if n % 10 == 0:
            logger.flush(60)
say(sent=sent, stats=vars(logger.stats()))
"""


def test_two_processes_write_to_one_directory_at_once(tmp_path: Path, fault_counts: FaultCounts) -> None:
    processes = []
    try:
        for name in ("one", "two"):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", START + WRITING, str(tmp_path), name],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        for each in processes:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        said = [finished(each)[0][0] for each in processes]
    finally:
        for each in processes:
            each.kill()
    for each in said:
        assert_identity(LogStats(**each["stats"]))
        assert len(each["sent"]) == 300
    rows = assert_whole(tmp_path)
    assert len({row["writer"] for row in rows}) == 2
    fault_counts.check("two writers", tmp_path, {each for one in said for each in one["sent"]}, faults=1)


# --- the end of the interpreter -------------------------------------------------------------------------------

ENDING = """
import logging
logging.basicConfig(format="%(message)s")
from fastattr.log import processing
original = processing.explain
busy = threading.Event()

def slow(*arguments):
    if busy.is_set():
        time.sleep(0.05)
    return original(*arguments)

processing.explain = slow
logger = AttributionLogger(dest, sample_rate=1.0, exit_timeout_s=float(sys.argv[2]), telemetry=False)
sent = [str(n) for n in range(400) if logger.submit_attribution(why, request_id=str(n)) and (n or logger.flush(60))]
busy.set()
say(sent=sent, in_flight=logger.stats().in_flight)
"""


@pytest.mark.parametrize("timeout_s", [0.5, 60.0], ids=["too short", "long enough"])
def test_the_interpreter_ends_with_a_full_queue(tmp_path: Path, fault_counts: FaultCounts, timeout_s: float) -> None:
    """What there was time for is found; the rest is in the warning, to the last one."""
    said, err = finished(script(ENDING.replace("0.05", "0.005" if timeout_s > 1 else "0.05"), tmp_path, timeout_s))
    sent = said[0]["sent"]
    assert len(sent) == 400 and said[0]["in_flight"] > 50
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:  # recovers what was not published
        assert logger.submit_attribution(WHY, request_id="after")
    rows = assert_whole(tmp_path)
    found = [row["request_id"] for row in rows if row["request_id"] != "after"]
    warned = re.findall(r"written=(\d+), dropped=\{'shutdown': (\d+)\}, failed=\{\}, in_flight=(\d+)", err)
    if timeout_s > 1:
        assert found == sent and not warned
        dropped = 0
    else:
        assert len(warned) == 1, err
        written, dropped, in_flight = map(int, warned[0])
        assert found[: len(found)] == sent[: len(found)] and 0 < len(found) < 400
        assert written + dropped + in_flight == 400
        assert written <= len(found) <= written + in_flight
    fault_counts.check("interpreter exit", tmp_path, {*found}, faults=1, counted=dropped)


STOPPING = """
logger = AttributionLogger(dest, sample_rate=1.0, telemetry=False)
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
sent = []
n = 0
say(ready=True)
while not stopped.is_set():
    if logger.submit_attribution(why, request_id=str(n)):
        sent.append(str(n))
    n += 1
    stopped.wait(0.001)
assert logger.shutdown(60)
say(sent=sent, stats=vars(logger.stats()))
"""


def test_a_server_that_handles_sigterm_loses_nothing(tmp_path: Path, fault_counts: FaultCounts) -> None:
    process = script(STOPPING, tmp_path)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["ready"]
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = finished(process)
    assert_identity(LogStats(**said[0]["stats"]))
    assert said[0]["sent"]
    assert_whole(tmp_path)
    fault_counts.check("SIGTERM handled", tmp_path, set(said[0]["sent"]), faults=1)


DYING = """
logger = AttributionLogger(dest, sample_rate=1.0, telemetry=False)
sent = [str(n) for n in range(20) if logger.submit_attribution(why, request_id=str(n))]
assert logger.flush(60)
say(sent=sent)
time.sleep(600)
"""


def test_sigterm_that_nobody_handles_loses_only_what_waited(tmp_path: Path, fault_counts: FaultCounts) -> None:
    process = script(DYING, tmp_path)
    try:
        assert process.stdout is not None
        sent = json.loads(process.stdout.readline())["sent"]
        process.terminate()
        assert process.wait(PATIENCE_S) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    assert rows_of(tmp_path) == []
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(WHY, request_id="after")
    assert_whole(tmp_path)
    fault_counts.check("SIGTERM", tmp_path, {*sent, "after"}, faults=1)


# --- the clock ------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards_changes_only_the_times(
    tmp_path: Path, fault_counts: FaultCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    steps = iter([now - i * 3_600_000_000_000 for i in range(40)])  # an hour back at each look
    monkeypatch.setattr(time, "time_ns", lambda: next(steps))
    sent = [f"{i}" for i in range(40)]
    with AttributionLogger(tmp_path, sample_rate=1.0, segment_bytes=20_000) as logger:
        for each in sent:
            assert logger.submit_attribution(WHY, request_id=each)
        assert logger.flush(PATIENCE_S)
    assert_identity(logger.stats())
    rows = assert_whole(tmp_path)
    assert [row["request_id"] for row in rows] == sent  # in the order of submission, not of the clock
    by_time = [each.envelope.request_id for each in read(tmp_path, order_by="oldest")]
    assert by_time == sent[::-1]
    fault_counts.check("clock backwards", tmp_path, set(sent), faults=40)


# --- states that are not numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_states_that_are_no_numbers_are_counted_or_kept_as_such(
    tmp_path: Path, fault_counts: FaultCounts, model: fastattr.Model, value: float
) -> None:
    """Overflow in half precision: the logger says so, and goes on."""
    picture = make_scene(2).image
    inputs = inputs_of(model, picture)
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        for spoiled in (0, 1, 5, None):
            with fastattr.capture(model, buffer=logger.buffer) as states:
                out = model.hf_model.generate(**inputs, max_new_tokens=6, do_sample=False)
            rows = states.read(out[0])[0].clone()
            if spoiled is not None:
                rows[-spoiled:] = value  # all of them for 0
            states.hidden = rows
            assert logger.submit(states, out, request_id=f"{spoiled}", images=[picture], prompt=PROMPT)
        assert logger.flush(PATIENCE_S)
    stats = logger.stats()
    assert_identity(stats)
    assert stats.written + sum(stats.failed.values()) == 4 and set(stats.failed) <= {"StatesError"}
    assert logger.buffer.free_bytes == logger.buffer.held_bytes
    found = {each.envelope.request_id: each.attribution for each in read(tmp_path)}
    assert len(found) == stats.written and "None" in found
    assert all(bool(torch.isfinite(maps).all()) for why in found.values() for maps in why.image)
    assert not found["None"].degenerate.all()
    fault_counts.check("NaN states", tmp_path, set(found), faults=3, counted=counted(stats))


@pytest.mark.parametrize("name", ["log_prob", "evidence", "context", "relevance", "agreement", "raw_range", "residual"])
def test_attributions_that_hold_no_numbers_are_kept(tmp_path: Path, fault_counts: FaultCounts, name: str) -> None:
    import dataclasses

    spoiled = getattr(WHY, name).clone()
    spoiled.view(-1)[::2] = float("nan")
    spoiled.view(-1)[1::4] = float("-inf")
    with AttributionLogger(tmp_path, sample_rate=1.0) as logger:
        assert logger.submit_attribution(dataclasses.replace(WHY, **{name: spoiled}), request_id="spoiled")
        assert logger.submit_attribution(WHY, request_id="sound")
    assert_identity(logger.stats())
    assert_whole(tmp_path)
    assert sum(1 for _ in read(tmp_path)) == 2
    fault_counts.check("NaN attributions", tmp_path, {"spoiled", "sound"}, faults=1)


# --- asyncio ----------------------------------------------------------------------------------------------------


def test_a_task_that_is_cancelled_in_the_middle_of_generate(
    tmp_path: Path, fault_counts: FaultCounts, model: fastattr.Model
) -> None:
    """The thread goes on, as threads do, and nothing of it is logged or kept."""
    picture = make_scene(1).image
    inputs = inputs_of(model, picture)
    logger = AttributionLogger(tmp_path, sample_rate=1.0)
    in_generate, go_on, over = threading.Event(), threading.Event(), threading.Semaphore(0)

    class Waiting:
        """A stopping criterion that holds `generate` up after its first token."""

        def __call__(self, ids: torch.Tensor, _scores: Any) -> torch.Tensor:
            in_generate.set()
            assert go_on.wait(PATIENCE_S)
            return torch.zeros(len(ids), dtype=torch.bool)

    def generate(held_up: bool) -> tuple[Any, Any]:
        try:
            with fastattr.capture(model, buffer=logger.buffer) as states:
                out = model.hf_model.generate(
                    **inputs, max_new_tokens=4, do_sample=False, stopping_criteria=[Waiting()] if held_up else None
                )
            return states, out
        finally:
            over.release()

    async def answer(name: str, held_up: bool) -> None:
        states, out = await asyncio.to_thread(generate, held_up)
        assert logger.submit(states, out, request_id=name, images=[picture], prompt=PROMPT)

    async def serve() -> None:
        task = asyncio.create_task(answer("cancelled", True))
        assert await asyncio.to_thread(in_generate.wait, PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await answer("finished", False)

    try:
        asyncio.run(serve())
        for _ in range(2):
            assert over.acquire(timeout=PATIENCE_S)
    finally:
        go_on.set()
        assert logger.shutdown(PATIENCE_S)
    assert_identity(logger.stats())
    assert logger.stats().submitted == logger.stats().written == 1
    assert logger.buffer.free_bytes == logger.buffer.held_bytes
    assert "generate" not in model.hf_model.__dict__  # no hook is left
    fault_counts.check("cancellation", tmp_path, {"finished"}, faults=1)
