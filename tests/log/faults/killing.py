"""Processes that log until they are killed: forked from a warm parent with one thread, so that each costs little.

Run as a script with a destination; writes one line of JSON for each process, and one about the clean start afterwards.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# where each role is killed, besides at any time: a kill between any two of these must leave what can be recovered
_WRITING = ("open", "pwrite", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir")
STEPS = {
    "made": _WRITING,
    "captured": _WRITING,
    "handing over": ("open", "fsync", "replace"),
    "worker": ("open", "pwrite", "fsync", "replace", "rename", "unlink"),
}
FEW = {"mkdir": 2, "rmdir": 1, "rename": 2}  # come this often at least
BEGIN_S = 0.15  # killed within this time after the fork,
THEN_S = 0.08  # or within this after something was acknowledged
LONGEST_S = 0.5  # or at the latest

OPTIONS: dict[str, Any] = {
    "sample_rate": 1.0,
    "attribution": {"scales": [1.0], "evidence": False},
    "telemetry": False,
    "images": "none",
}


@dataclass(frozen=True)
class Killed:
    """A process that was killed.

    Attributes:
        role: what it did.
        how: `time`, or the step it came to.
        acknowledged: request ids that `flush` said to be durable.
        torn_files: spool files in all rooms afterwards that end in the middle of a frame, behind whole ones.
        left_rooms: rooms in the spool afterwards.
    """

    role: str
    how: str
    acknowledged: list[str]
    torn_files: int
    left_rooms: int


def options_of(dest: str, rng: random.Random) -> dict[str, Any]:
    """Small and quick segments, so that publication happens all the time, or spool files of many frames."""
    size, age_s = rng.choice([(8_000, 0.03), (8_000, 10.0), (1_000_000, 0.03), (1_000_000, 10.0)])
    return {"destination": dest, **OPTIONS, "segment_bytes": size, "segment_age_s": age_s}


def kill_at(step: str, number: int, place: str) -> None:
    """From here on, this process ends at call `number` of `os.<step>`: before it, after it, or in the middle."""
    original: Callable[..., Any] = getattr(os, step)
    calls = iter(range(number + 1))

    def counting(*arguments: Any, **options: Any) -> Any:
        if next(calls, -1) != number - 1:
            return original(*arguments, **options)
        if place == "middle" and step == "pwrite":
            handle, data, offset = arguments
            original(handle, data[: len(data) // 2], offset)
        elif place == "after":
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, step, counting)


def log_made(dest: str, name: str, say: Callable[[list[str]], None], rng: random.Random, _model: Any) -> None:
    from fastattr.log import AttributionLogger
    from tests.engine.samples import make_attribution

    why = make_attribution(("A", " red"), grids=((1, 3, 3),), pictures=False)
    logger = AttributionLogger.from_mapping(options_of(dest, rng))
    n = 0
    while True:
        ids = [f"{name}-{n + i}" for i in range(rng.randint(1, 6))]
        n += len(ids)
        accepted = [logger.submit_attribution(why, request_id=each) for each in ids]
        if all(accepted) and logger.flush():
            say(ids)


def log_captured(dest: str, name: str, say: Callable[[list[str]], None], rng: random.Random, model: Any) -> None:
    import fastattr
    from fastattr.demo.scenes import make_scene
    from fastattr.log import AttributionLogger
    from fastattr.log.recipes.answering import PROMPT, inputs_of

    logger = AttributionLogger.from_mapping(options_of(dest, rng))
    picture = make_scene(1).image
    inputs = inputs_of(model, picture)
    n = 0
    while True:
        with fastattr.capture(model, buffer=logger.buffer) as states:
            out = model.hf_model.generate(**inputs, max_new_tokens=rng.randint(1, 3), do_sample=False)
        if logger.submit(states, out, request_id=f"{name}-{n}", prompt=PROMPT) and logger.flush():
            say([f"{name}-{n}"])
        n += 1


def hand_over(dest: str, name: str, say: Callable[[list[str]], None], rng: random.Random, model: Any) -> None:
    """Replays and captures to the inbox."""
    import fastattr
    from fastattr.demo.scenes import make_scene
    from fastattr.log import AttributionLogger
    from fastattr.log.recipes.answering import PROMPT, inputs_of

    logger = AttributionLogger.from_mapping({**options_of(dest, rng), "explain": "worker"})
    picture = make_scene(1).image
    inputs = inputs_of(model, picture)
    for n in range(3):  # each costs a worker more time than it costs here
        if rng.random() < 0.5:
            accepted = logger.submit_replay(PROMPT, [picture], [5, 6, 7], request_id=f"{name}-{n}")
        else:
            with fastattr.capture(model, buffer=logger.buffer) as states:
                out = model.hf_model.generate(**inputs, max_new_tokens=2, do_sample=False)
            accepted = logger.submit(states, out, request_id=f"{name}-{n}", images=[picture], prompt=PROMPT)
        if accepted and logger.flush():
            say([f"{name}-{n}"])
    os.kill(os.getpid(), signal.SIGKILL)


def explain_inbox(dest: str, _name: str, _say: Callable[[list[str]], None], rng: random.Random, model: Any) -> None:
    from fastattr.log import worker
    from fastattr.log.config import LogConfig

    worker.work(LogConfig.from_mapping(options_of(dest, rng)), model, stop=threading.Event(), until_empty=True)
    os.kill(os.getpid(), signal.SIGKILL)


ROLES: dict[str, Callable[..., None]] = {
    "made": log_made,
    "captured": log_captured,
    "handing over": hand_over,
    "worker": explain_inbox,
}


def begin(role: str, dest: str, name: str, seed: int, model: Any, how: tuple[str, int, str] | None) -> tuple[int, int]:
    """Fork a process that does its role until it is killed. Returns its id, and where its acknowledgements come from."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        if how is not None:
            kill_at(*how)
        ROLES[role](
            dest,
            name,
            lambda ids: os.write(writing, "".join(f"{i}\n" for i in ids).encode()),
            random.Random(seed),
            model,
        )
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)  # nobody should come here


def end(child: int, until_s: float) -> bool:
    """Wait for a process to kill itself, and kill it when it is time. Returns whether it came so far.

    Raises:
        RuntimeError: it ended in another way.
    """
    while time.monotonic() < until_s:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
    reached = time.monotonic() < until_s
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        raise RuntimeError(f"a process ended with {status} before it was killed")
    return reached


def drain(reading: int) -> list[str]:
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode().split()


def look(dest: str) -> tuple[int, int]:
    """Torn spool files and rooms, now."""
    from fastattr.log.spool import read_spool

    rooms = list((Path(dest) / "spool" / "rooms").glob("*"))
    torn = 0
    for path in [path for room in rooms for path in room.glob("*.spool")]:
        with suppress(FileNotFoundError):  # published by a process that still lives
            read = read_spool(path)
            torn += read.torn_bytes > 0 and len(read.batches) > 0
    return torn, len(rooms)


def main(dest: str, n: int, seed: int) -> None:
    import tqdm

    tqdm.tqdm.monitor_interval = 0  # its thread would not survive the fork

    import fastattr
    from fastattr.log import AttributionLogger, reading, worker  # noqa: F401  # warm
    from fastattr.log.config import LogConfig
    from tests.engine.samples import make_attribution

    model = fastattr.load("shapes")
    make_attribution()
    if threading.active_count() != 1:
        raise RuntimeError(f"{threading.enumerate()} would not survive a fork")
    rng = random.Random(seed)
    killed = 0
    while killed < n:
        roles: list[str] = rng.choices(
            [["made"], ["captured"], ["handing over"], ["worker"], ["handing over", "worker"], ["made", "made"]],
            [9, 3, 2, 1, 3, 1],
        )[0]
        children = []
        for role in roles[: n - killed]:
            how = None
            if rng.random() < 0.5:
                step = rng.choice(STEPS[role])
                place = rng.choice(["before", "after", *(["middle"] * 2 if step == "pwrite" else [])])
                how = (step, rng.randint(1, FEW.get(step, 4 if role == "worker" else 8)), place)
            child, reading_end = begin(role, dest, f"{killed + len(children)}", rng.getrandbits(32), model, how)
            children.append((role, how, child, reading_end, time.monotonic()))
        for role, how, child, reading_end, began_s in children:
            if how is not None:
                until_s = began_s + LONGEST_S
            elif role == "worker":
                until_s = began_s + rng.uniform(0.0, LONGEST_S)
            elif rng.random() < 0.4:
                until_s = began_s + rng.uniform(0.0, BEGIN_S)
            else:
                select.select([reading_end], [], [], 4 * LONGEST_S)
                until_s = time.monotonic() + rng.uniform(0.0, THEN_S)
            reached = end(child, until_s)
            torn, rooms = look(dest)
            said = "{0} {2}".format(*how) if how is not None and reached else "time"
            print(json.dumps(asdict(Killed(role, said, drain(reading_end), torn, rooms))), flush=True)
            killed += 1

    began_s = time.monotonic()
    config = LogConfig.from_mapping({"destination": dest, **OPTIONS})
    with AttributionLogger(dest, **{**OPTIONS, "attribution": config.attribution}) as logger:
        logger.submit_attribution(make_attribution(), request_id="clean start")
    worker.work(config, model, stop=threading.Event(), until_empty=True)
    print(json.dumps({"recovery_s": time.monotonic() - began_s}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
