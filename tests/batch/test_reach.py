"""What a row may name, against files, pipes and a web server that are really there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from fastattr.batch import RayExplainer, reach
from fastattr.batch.reach import Reach, locate, reach_of, read
from fastattr.batch.running import Engine, run
from fastattr.errors import ImageError, InputError
from tests.batch.scenes import ANSWER, PROMPT, failures, png, records, write_jsonl, write_tar

PICTURE = png()


class Web(ThreadingHTTPServer):
    """Answers any path with a picture; `/to/URL` redirects there; `/slow` never ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("X-Token")))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/slow":
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        self.wfile.write(PICTURE)

    def log_message(self, *_: object) -> None:
        pass


def _serving() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


own = pytest.fixture(_serving, name="own")
other = pytest.fixture(_serving, name="other")


def get(name: str, reach: Reach) -> bytes:
    return read(locate(name, reach), reach)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`data` with a picture, and what lies beside it and is no business of a row."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a b.png").write_bytes(PICTURE)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "database").mkdir()  # begins as `data` does
    (tmp_path / "database" / "x.png").write_bytes(b"secret")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "inside.png").symlink_to("sub/a b.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name", ["sub/a b.png", "./sub//a b.png", "{}/sub/a b.png", "file://{}/sub/a%20b.png", "inside.png"]
)
def test_rows_read_files_of_their_folder(folder: Path, name: str) -> None:
    assert get(name.format(folder), reach_of(str(folder))) == PICTURE


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "{}/../secret.png",
        "{}base/x.png",
        "link.png",
        "up/secret.png",
        "file://{}/../secret.png",
        "FILE://{}/%2e%2e/secret.png",
        "local://{}/../secret.png",
        "file://elsewhere{}/sub/a b.png",
        "/etc/hostname",
        "/dev/zero",
        "file:///dev/zero",
        "/proc/self/environ",
        "~/x.png",
        "sub/a b.png::file:///etc/hostname",
        "simplecache::file:///etc/hostname",
        "reference://a::http://example.org/refs.json",
        "https://example.org/a.png",
        "memory://a.png",
        "nothing://x",
        "sub/\0",
    ],
)
def test_rows_read_nothing_else(folder: Path, name: str) -> None:
    with pytest.raises(ImageError):
        get(name.format(folder), reach_of(str(folder)))


@pytest.mark.parametrize("name", ["pipe.png", "sub"])
def test_only_regular_files_are_read_and_none_is_waited_for(folder: Path, name: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(ImageError, match="no regular file"):
        get(name, reach_of(str(folder)))
    assert time.monotonic() - began_s < 5


def test_folders_that_are_allowed(folder: Path) -> None:
    beside = reach_of(str(folder), None, [f"file://{folder.parent}/database/"])
    assert get(f"{folder.parent}/database/x.png", beside) == b"secret"
    with pytest.raises(ImageError, match="not in the folder"):
        get("link.png", beside)


def test_urls_of_the_own_store_and_of_allowed_hosts(own: Web, other: Web) -> None:
    token = {"client_kwargs": {"headers": {"X-Token": "mine"}}}
    rows = reach_of(f"{own.url}/data", token)
    assert get("a.png", rows) == get(f"{own.url}/elsewhere/a.png", rows) == PICTURE
    assert own.asked == [("/data/a.png", "mine"), ("/elsewhere/a.png", "mine")]
    with pytest.raises(ImageError, match="allow_urls or --allow-url"):
        get(f"{other.url}/a.png", rows)
    assert other.asked == []
    allowing = reach_of(f"{own.url}/data", token, [f"{other.url}/pictures"])
    assert get(f"{other.url}/pictures/a b.png?size=1", allowing) == PICTURE
    assert other.asked == [("/pictures/a%20b.png?size=1", None)]  # the token is for its own store
    for name in ("/picturesque/a.png", "/pictures/../a.png", "/pictures/%2e%2e/a.png", "/pictures/%252e%252e/a.png"):
        with pytest.raises(ImageError):
            get(f"{other.url}{name}", allowing)
    assert len(other.asked) == 1


def test_options_of_an_allowed_url_go_there_alone(own: Web, other: Web) -> None:
    allowed = {f"{own.url}/": {"client_kwargs": {"headers": {"X-Token": "yours"}}}, f"{other.url}/": {}}
    rows = reach_of("/data", {"client_kwargs": {"headers": {"X-Token": "mine"}}}, allowed)
    assert get(f"{own.url}/a.png", rows) == get(f"{other.url}/a.png", rows) == PICTURE
    assert (own.asked, other.asked) == ([("/a.png", "yours")], [("/a.png", None)])


def test_a_redirect_goes_no_further_than_a_row(own: Web, other: Web) -> None:
    rows = reach_of("/data", None, [f"{own.url}/"])
    assert get(f"{own.url}/to//a.png", rows) == PICTURE
    with pytest.raises(ImageError, match="redirects to it"):
        get(f"{own.url}/to/{other.url}/a.png", rows)
    assert get(f"{own.url}/to/{other.url}/a.png", reach_of("/data", None, [f"{own.url}/", f"{other.url}/"])) == PICTURE
    token = {"client_kwargs": {"headers": {"X-Token": "mine"}}}
    with pytest.raises(ImageError, match="redirects to it"):  # which would take the token along
        get(f"{own.url}/to/{other.url}/a.png", reach_of(f"{own.url}/data", token, [f"{other.url}/"]))
    assert [token for _, token in other.asked] == [None]


@pytest.mark.parametrize(
    "name",
    [
        "http://allowed.example@{}/a.png",
        "http://allowed.example\\@{}/a.png",
        "http://{}#@allowed.example/a.png",
        " http://{}/a.png",
        "http://{}\t/a.png",
        "http://allowed.example.{}/a.png",
        "reference://a.png::http://{}/refs.json",
        "http://allowed.example/::http://{}/a.png",
    ],
)
def test_no_spelling_of_a_url_reaches_another_host(own: Web, name: str) -> None:
    with pytest.raises(ImageError):
        get(name.format(own.url.removeprefix("http://")), reach_of("/data", None, ["http://allowed.example/"]))
    assert own.asked == []


@pytest.mark.parametrize(
    "url", ["example.org", "https://", "https:///x", "/data", "file://", "zip://a::https://example.org", 5]
)
def test_what_cannot_be_allowed(url: object) -> None:
    with pytest.raises(InputError, match="expected the beginning of a URL"):
        reach_of("/data", None, [url])  # type: ignore[list-item]
    with pytest.raises(InputError, match="expected a list"):
        reach_of("/data", None, "https://example.org/")


def test_sizes_and_times_are_bounded(folder: Path, own: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    allowing = reach_of(str(folder), None, [f"{own.url}/"])
    for name in ("sub/a b.png", f"{own.url}/a.png"):
        with pytest.raises(ImageError, match="larger than 100 bytes"):
            read(locate(name, allowing), allowing, 100)
        assert read(locate(name, allowing), allowing, len(PICTURE)) == PICTURE
    monkeypatch.setattr(reach, "MAX_READ_S", 0.5)
    began_s = time.monotonic()
    with pytest.raises(ImageError):
        get(f"{own.url}/slow", allowing)
    assert time.monotonic() - began_s < 10


def test_a_path_below_a_chain_that_the_operator_gave() -> None:
    with fsspec.open("memory://chained/a.png", "wb") as file:
        file.write(PICTURE)
    rows = reach_of("simplecache::memory://chained")
    assert get("a.png", rows) == PICTURE
    with pytest.raises(ImageError):
        get("simplecache::memory://chained/a.png", rows)


def test_hostile_rows_of_a_batch_fail_alone(
    folder: Path, tmp_path: Path, own: Web, inline: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where parts of messages name the picture; the rows between them are explained."""
    monkeypatch.setenv("SECRET_OF_THE_PROCESS", "top secret")
    part = {"type": "text", "text": PROMPT}
    bad = [f"reference://a.png::{own.url}/refs.json", f"{own.url}/a.png", "pipe.png", "link.png", "/dev/zero"]
    rows = [{"id": f"bad {name}", "image": name, "prompt": PROMPT, "response": ANSWER} for name in bad]
    for key in ("url", "path", "image"):
        messages = [{"role": "user", "content": [{"type": "image", key: bad[0]}, part]}]
        rows += [{"id": f"part {key}", "messages": messages, "response": ANSWER}]  # type: ignore[dict-item]
    rows[2:2] = [{"id": "good", "image": "sub/a b.png", "prompt": PROMPT, "response": ANSWER}]
    out = tmp_path / "out"
    run(write_jsonl(folder / "in.jsonl", rows), out, attribution="lens@1", engine=inline, max_error_rate=1.0)
    assert records(out)["request_id"].to_pylist() == ["good"]
    assert {row["error_type"] for row in failures(out).values()} == {"ImageError"}
    assert len(failures(out)) == len(rows) - 1
    assert own.asked == []
    again = tmp_path / "again"
    run(folder / "in.jsonl", again, attribution="lens@1", engine=inline, max_error_rate=1.0, allow_urls=[own.url])
    assert records(again)["request_id"].to_pylist() == [f"bad {own.url}/a.png", "good"]
    assert own.asked == [("/a.png", None)]


def test_a_step_of_ray_data_reads_no_path_unless_it_is_told_the_folder(folder: Path) -> None:
    row = {"id": ["a"], "image": ["sub/a b.png"], "prompt": [PROMPT], "response": [ANSWER]}
    assert RayExplainer(attribution="lens@1")(row)["error_message"][0].as_py().startswith("a row names 'sub/a b.png'")
    assert RayExplainer(attribution="lens@1", folder=str(folder))(row)["status"].to_pylist() == ["ok"]


def test_pictures_that_lie_in_an_archive_are_bounded_too(
    tmp_path: Path, inline: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [(f"{key}.{part}", data) for key in ("a", "b") for part, data in (("png", PICTURE), ("prompt", b"What?"))]
    files += [("b.1.png", b"x" * 3 * len(PICTURE)), ("c.png", PICTURE), ("c.prompt", b"What?")]
    files = sorted(files)
    monkeypatch.setattr("fastattr.batch.sources.MAX_ROW_BYTES", 2 * len(PICTURE))
    monkeypatch.setattr("fastattr.batch.explaining.MAX_ROW_BYTES", 2 * len(PICTURE))
    out = tmp_path / "out"
    run(write_tar(tmp_path / "in.tar", files), out, attribution="lens@1", engine=inline, max_error_rate=1.0)
    assert records(out)["request_id"].to_pylist() == ["a", "c"]
    assert "more than" in failures(out)["b"]["error"]
