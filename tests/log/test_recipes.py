"""Each recipe runs as a user would run it: a process of its own, spoken to over loopback, ended by a signal."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tokenizers import Tokenizer

import fastattr
from fastattr.demo.scenes import make_scene
from fastattr.log import Submission, read
from fastattr.log.recipes.fastapi_server import make_app
from fastattr.log.recipes.with_config_file import redact

RECIPES = Path(fastattr.__file__).parent / "log" / "recipes"
TOKENIZER = Path(fastattr.__file__).parent / "demo" / "shapes" / "tokenizer.json"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Script:
    """A recipe that runs; what it writes goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def find(self, pattern: str) -> str:
        """Wait until it writes something; the first group of the pattern."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            over = self.process.poll() is not None
            if found := re.search(pattern, self.log.read_text()):
                return found.group(1)
            assert not over, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no {pattern} in {self.log.read_text()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


# three that end by themselves share a process: half of the time goes into imports
ONE_BY_ONE = """
import runpy, sys
for words in sys.argv[1:]:
    name, *arguments = words.split()
    sys.argv = [name, *arguments]
    runpy.run_module("fastattr.log.recipes." + name, run_name="__main__")
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Script]]:
    """All recipes, started together; each logs to a folder of its own name."""
    top = tmp_path_factory.mktemp("recipes")
    options = {
        "destination": "config",
        "sample_rate": 1.0,
        "content": "text",
        "images": "none",
        "model_revision": "2026-11-22",
        "attribution": {"method": "lens", "scales": [1.0]},
        "redact": "fastattr.log.recipes.with_config_file:redact",
    }
    (top / "logging.json").write_text(json.dumps(options))
    python = [sys.executable, "-m"]
    commands = {
        "fastapi": [*python, "fastattr.log.recipes.fastapi_server", "fastapi", "--port", "0"],
        "gunicorn": [
            *(*python, "gunicorn", "-c", "python:fastattr.log.recipes.gunicorn_conf", "-b", "127.0.0.1:0"),
            "fastattr.log.recipes.gunicorn_preload:make_app('gunicorn')",
        ],
        "prometheus": [*python, "fastattr.log.recipes.prometheus_metrics", "prometheus", "--port", "0", "--n", "20"],
        "others": [
            *(sys.executable, "-c", ONE_BY_ONE),
            *("structlog_events structlog", "trace_record trace feedback.jsonl", "with_config_file logging.json"),
        ],
    }
    environment = {**os.environ, "HOME": str(top), "PYTHONPATH": str(RECIPES.parents[2]), "OMP_NUM_THREADS": "1"}
    running: dict[str, Script] = {}
    try:
        for name, command in commands.items():
            with open(top / f"{name}.log", "wb") as log:
                process = subprocess.Popen(command, cwd=top, env=environment, stdout=log, stderr=subprocess.STDOUT)
            running[name] = Script(process, top / f"{name}.log")
        yield running
    finally:
        for script in running.values():
            script.process.kill()
            script.process.wait()


def folder(script: Script) -> Path:
    return script.log.parent


def tallies(destination: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((destination / "writers").glob("*.json"))]


def png(seed: int) -> bytes:
    data = io.BytesIO()
    make_scene(seed).image.save(data, format="PNG")
    return data.getvalue()


SIZES_REFUSED = [(1, 1), (8, 8), (16, 16), (200, 1), (1, 200), (4000, 10), (40, 4000)]  # width x height


def blank_png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "grey").save(data, format="PNG")
    return data.getvalue()


def pixels_sha256(picture: Image.Image) -> str:
    return hashlib.sha256(b"%d %d " % picture.size + picture.convert("RGB").tobytes()).hexdigest()


def post(port: int, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/answer", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def said(ids: tuple[int, ...]) -> str:
    return str(Tokenizer.from_file(str(TOKENIZER)).decode(list(ids), skip_special_tokens=True))


def test_fastapi_server(scripts: dict[str, Script]) -> None:
    script = scripts["fastapi"]
    port = int(script.find(r"running on http://127\.0\.0\.1:(\d+)"))
    assert post(port, b"no picture")[0] == 415
    assert post(port, png(0)[:200])[0] == 415
    assert post(port, b"x" * (20 * 2**20 + 1))[0] == 413
    for width, height in SIZES_REFUSED:
        status, body = post(port, blank_png(width, height))
        assert status == 422 and body["detail"].startswith(f"the picture has {width} x {height} pixels, expected")
    hostile = "../../etc/<b>'; DROP TABLE x"
    status, body = post(port, png(0), **{"X-Request-Id": hostile})
    assert (status, body["request_id"]) == (200, hostile)

    # SIGTERM comes while five requests wait for the model
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S) for _ in range(6)]
    for seed, connection in enumerate(connections):
        connection.request("POST", "/answer", png(seed), {"X-Request-Id": f"scene-{seed}"})
    answers, seeds = {hostile: body["answer"]}, {hostile: 0}
    for seed, connection in enumerate(connections):
        answer = connection.getresponse()
        assert answer.status == 200
        answers[f"scene-{seed}"], seeds[f"scene-{seed}"] = json.loads(answer.read())["answer"], seed
        connection.close()
        if seed == 0:
            script.process.send_signal(signal.SIGTERM)
    script.process.wait(PATIENCE_S)
    assert "Traceback" not in script.log.read_text()

    records = {record.envelope.request_id: record for record in read(str(folder(script) / "fastapi"))}
    assert {name: said(record.attribution.token_ids) for name, record in records.items()} == answers
    for name, record in records.items():
        scene = make_scene(seeds[name])
        assert any(item.shape in answers[name] for item in scene.objects)
        assert record.envelope.image_sha256 == (pixels_sha256(scene.image),)
        assert record.envelope.metadata == {"route": "/answer", "cut_off": False}
        assert record.attribution.source == "capture"  # explaining in between has mixed nothing up
    (tally,) = tallies(folder(script) / "fastapi")
    assert (tally["submitted"], tally["written"], tally["in_flight"], tally["closed"]) == (7, 7, 0, True)


def test_gunicorn_workers_log_into_rooms_of_their_own(scripts: dict[str, Script]) -> None:
    script = scripts["gunicorn"]
    port = int(script.find(r"Listening at: http://127\.0\.0\.1:(\d+)"))
    assert post(port, b"no picture")[0] == 415
    assert [post(port, blank_png(*size))[0] for size in SIZES_REFUSED] == [422] * len(SIZES_REFUSED)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: post(port, png(seed), **{"X-Request-Id": f"scene-{seed}"}), range(12)))
    assert [status for status, _ in answers] == [200] * 12
    assert script.stop() == 0
    assert "Traceback" not in script.log.read_text()

    destination = folder(script) / "gunicorn"
    records = list(read(str(destination)))
    assert {record.envelope.request_id: said(record.attribution.token_ids) for record in records} == {
        body["request_id"]: body["answer"] for _, body in answers
    }
    assert len(records) == 12
    done = tallies(destination)
    assert len({tally["writer"] for tally in done}) == len({tally["pid"] for tally in done}) == 2
    assert sum(tally["written"] for tally in done) == 12 and all(tally["closed"] for tally in done)
    for tally in done:  # each counts for itself, from 0
        mine = [each.envelope.sequence for each in records if each.envelope.writer == tally["writer"]]
        assert sorted(mine) == list(range(tally["written"])) and mine


def test_prometheus_metrics(scripts: dict[str, Script]) -> None:
    script = scripts["prometheus"]
    port = int(script.find(r"metrics at http://127\.0\.0\.1:(\d+)/metrics"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/metrics")
    scraped = connection.getresponse().read().decode()
    connection.close()
    assert script.stop() == 0
    values = {
        (sample.name, sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(scraped)
        for sample in family.samples
        if "le" not in sample.labels
    }
    n = len(list(read(str(folder(script) / "prometheus"))))
    assert 0 < n < 20  # half of them, by their ids
    assert values["fastattr_log_submitted_total", None] == 20
    assert values["fastattr_log_written_total", None] == n
    assert values["fastattr_log_dropped_total", "not_sampled"] == 20 - n
    assert values["fastattr_log_explain_duration_seconds_count", None] == n
    assert values["fastattr_log_queue_size_bytes", None] == values["fastattr_log_in_flight", None] == 0


@pytest.fixture
def others(scripts: dict[str, Script]) -> Path:
    """Where the recipes that end by themselves have left their files."""
    script = scripts["others"]
    assert script.process.wait(PATIENCE_S) == 0, script.log.read_text()
    return folder(script)


def evidence_of(destination: Path) -> dict[str, float]:
    """Mean evidence by request id, from the tokens that were stored."""
    found = {}
    for record in read(str(destination)):
        assert record.attribution.evidence is not None
        found[record.envelope.request_id] = float(record.attribution.evidence.mean())
    return found


def test_structlog_events(others: Path, scripts: dict[str, Script]) -> None:
    lines = scripts["others"].log.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith('{"')]
    stored = evidence_of(others / "structlog")
    assert sorted(stored) == ["scene-0", "scene-1", "scene-2"]
    assert {event["request_id"]: event["mean_evidence_nats"] for event in events} == pytest.approx(stored, abs=1e-4)
    for event in events:
        assert (event["event"], event["session"], event["tenant"]) == ("explained", "s-42", "acme")
        assert event["level"] == ("warning" if event["low_evidence"] else "info")


def test_trace_record(others: Path) -> None:
    rows = [json.loads(line) for line in (others / "feedback.jsonl").read_text().splitlines()]
    records = {record.envelope.record_id: record for record in read(str(others / "trace"))}
    assert len(rows) == 3 and {row["id"] for row in rows} == set(records)
    stored = evidence_of(others / "trace")
    for row in rows:
        record = records[row["id"]]
        assert row["target"] == {"request_id": record.envelope.request_id}
        assert row["value"] == pytest.approx(stored[record.envelope.request_id], abs=1e-4)
        assert row["label"] == ("low_evidence" if record.attribution.low_evidence else "seen")
        assert row["metadata"] == {"experiment": "demo", "record": f"trace#{row['id']}"}
        assert len(json.dumps(row)) < 1000  # no maps


def test_with_config_file(others: Path) -> None:
    records = list(read(str(others / "config")))
    assert len(records) == 3
    for record in records:
        assert record.envelope.metadata == {"route": "/answer"}  # and no mail address
        assert record.envelope.model_revision == "2026-11-22"
        assert record.envelope.image_sha256 is None
        assert record.attribution.config.method == "lens"
        assert record.attribution.response.startswith(("A ", "Two ", "Three "))
    stored = b"".join(path.read_bytes() for path in (others / "config").rglob("*") if path.is_file())
    assert b"someone@example.com" not in stored


def test_redaction_of_the_recipe() -> None:
    given = Submission("r", {"tenant": "acme", "user": "x"}, "Is a.b+c@example.com in it?", (), "text")
    left = redact(given)
    assert left is not None
    assert (left.prompt, left.metadata) == ("Is <mail> in it?", {"tenant": "acme"})
    assert redact(Submission("r", {"opted_out": True}, None, (), "ids")) is None


def test_the_readme_names_every_recipe() -> None:
    text = (RECIPES / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+\.py)\)", text))
    assert linked == {path.name for path in RECIPES.glob("*.py")} - {"__init__.py", "answering.py"}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_phone_photo_is_logged_as_the_model_saw_it(orientation: int, tmp_path: Path) -> None:
    """With its orientation applied, on a grid of its aspect ratio; every kind of broken body is refused."""
    scene = make_scene(3).image.resize((192, 96))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    scene.save(stream, "JPEG", exif=exif, quality=95)
    app = make_app(str(tmp_path / "log"), sample_rate=1.0, images="store")
    with TestClient(app) as client:
        assert client.post("/answer", content=stream.getvalue()).status_code == 200
        assert client.post("/answer", content=stream.getvalue()[:400]).status_code == 415
    (record,) = read(tmp_path / "log")
    why = record.attribution
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue())))
    np.testing.assert_array_equal(why.pictures[0][0], np.asarray(upright))
    assert why.picture_sizes == ((upright.height, upright.width),)
    _, rows, columns = why.grids[0][0]
    assert (rows > columns) == (upright.height > upright.width)
