"""The FastAPI recipe under load for a minute, killed in the middle: what does the doctor say?

    python -m benchmarks.log_server

Clients post pictures one after the other; half-way the server gets SIGKILL and is started again, at the end SIGTERM.
What it had reported as durable before the kill must be found, once; what it had only answered may be lost, up to what
waits in memory, and is counted.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr.demo.scenes import HELD_OUT, make_scene
from fastattr.log import read

Row = dict[str, Any]
PATIENCE_S = 120.0


class Server:
    """One start of the recipe."""

    def __init__(self, destination: Path, log: Path) -> None:
        command = [sys.executable, "-u", "-m", "fastattr.log.recipes.fastapi_server", str(destination), "--port", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        until_s = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", log.read_text())):
            if self.process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.port = int(found[1])

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)

    def get(self, path: str) -> Any:
        return self._ask("GET", path)[1]

    def answer(self, picture: bytes, request_id: str) -> bool:
        """Whether the server answered before it was gone."""
        try:
            return self._ask("POST", "/answer", picture, {"X-Request-Id": request_id})[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def load(server: Server, seconds: float, clients: int, name: str) -> tuple[list[str], list[float]]:
    """Ids that were answered, and how long each answer took (ms); ends early where the server is gone."""
    until_s = time.monotonic() + seconds
    pictures = [_png(HELD_OUT + seed) for seed in range(16)]

    def client(number: int) -> list[tuple[str, float]]:
        done = []
        i = 0
        while time.monotonic() < until_s and server.process.poll() is None:
            request_id = f"{name}-{number}-{i}"
            began = time.perf_counter()
            if server.answer(pictures[(number + i) % 16], request_id):
                done.append((request_id, 1e3 * (time.perf_counter() - began)))
            i += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        found = [each for part in pool.map(client, range(clients)) for each in part]
    return [request_id for request_id, _ in found], [spent for _, spent in found]


def measure(seconds: float = 60.0, clients: int = 4) -> Row:
    """The whole minute."""
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder) / "attr"
        first = Server(destination, Path(folder) / "first.log")
        durable: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            """What the server reports as durable, until it is gone."""
            while not stop.wait(0.2):
                try:
                    durable.append(first.get("/healthz")["written"])
                except (OSError, http.client.HTTPException):
                    return

        watching = threading.Thread(target=watch)
        watching.start()
        killing = threading.Timer(seconds / 2, lambda: first.process.send_signal(signal.SIGKILL))
        killing.start()
        answered, spent = load(first, seconds, clients, "a")
        stop.set()
        watching.join()
        first.process.wait()
        second = Server(destination, Path(folder) / "second.log")
        more, more_spent = load(second, seconds / 2, clients, "b")
        second.end(signal.SIGTERM)
        doctor = subprocess.run(
            [sys.executable, "-m", "fastattr", "log", "doctor", str(destination), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = Counter(record.envelope.request_id for record in read(str(destination)))
    both = set(answered) & set(found)
    return {
        "case": "server",
        "seconds": seconds,
        "clients": clients,
        "answered": len(answered) + len(more),
        "answer_p50_ms": round(float(np.quantile(spent + more_spent, 0.5)), 1),
        "answer_p99_ms": round(float(np.quantile(spent + more_spent, 0.99)), 1),
        "records": sum(found.values()),
        "twice": sum(n > 1 for n in found.values()),
        "durable_before_kill": max(durable, default=0),
        "found_from_before_kill": sum(name.startswith("a-") for name in found),
        "answered_before_kill_not_durable": len(answered) - len(both),
        "lost_after_kill": len(set(more) - set(found)),
        "doctor_exit_code": doctor.returncode,
        "doctor": json.loads(doctor.stdout) if doctor.stdout.startswith("{") else doctor.stdout + doctor.stderr,
    }


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    make_scene(seed).image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_server", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "log_server.jsonl")
    parser.add_argument("--seconds", type=float, default=60.0)
    chosen = parser.parse_args()
    row = measure(chosen.seconds)
    print(write_jsonl(chosen.out, [machine("python -m benchmarks.log_server"), row]))
    print(json.dumps(row, indent=2))
    if row["doctor_exit_code"] or row["twice"] or row["found_from_before_kill"] < row["durable_before_kill"]:
        raise SystemExit("something is lost")


if __name__ == "__main__":
    main()
