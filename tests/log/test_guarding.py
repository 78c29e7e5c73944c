"""Who is answered by the dashboard: nobody without the token where others reach it, no other site, nobody for ever."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattr.log.dashboard import guarding
from tests.log.records import make_record, write_segment
from tests.log.serving import ask, serving

TOKEN = "the-token-of-this-test"


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("log")
    write_segment(dest, [make_record(request_id=f"request-{k}", sequence=k) for k in range(3)])
    return dest


@pytest.fixture(scope="module")
def port(dest: Path) -> Iterator[int]:
    with serving(dest, TOKEN) as port:
        yield port


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["localhost", "192.168.1.5:8765", "evil.example", "log.internal"])
def test_without_the_token_there_is_no_data_under_any_name(port: int, host: str) -> None:
    for path in ("/", "/trends", "/?token=", "/?token=x", "/response/x/report", "/dashboard.css", f"/?token={TOKEN}x"):
        status, headers, body = get(port, path, Host=host)
        assert status == (200 if path.startswith("/?") or path == "/" else 401)
        assert "request-" not in body and TOKEN not in body + str(headers)
        assert headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    "cookie",
    ["", "fastattr_token=", "fastattr_token=x", "other=the-token-of-this-test", "\xff; =", "fastattr_token=\xff"],
)
def test_other_cookies_do_not_log_in(port: int, cookie: str) -> None:
    status, _, body = get(port, "/trends", Cookie=cookie)
    assert status == 401 and "Log in" in body


def test_the_token_logs_in_and_leaves_the_address(port: int) -> None:
    status, headers, _ = get(port, f"/?q=request-1&token={TOKEN}", Host="192.168.1.5:8765")
    assert (status, headers["location"]) == (303, "/?q=request-1")
    kept = headers["set-cookie"].split("; ")
    assert {each.lower() for each in kept[1:]} >= {"httponly", "samesite=strict"}
    status, _, body = get(port, headers["location"], Host="192.168.1.5:8765", Cookie=f"a=b; {kept[0]}")
    assert status == 200 and "request-1" in body and TOKEN not in body


@pytest.mark.parametrize("path", ["//evil.example/", "/\\evil.example/", "/%2f/evil.example", "/%5cevil.example"])
def test_a_login_leads_to_no_other_site(port: int, path: str) -> None:
    status, headers, _ = get(port, f"{path}?token={TOKEN}")
    assert status == 303 and re.match(r"/[^/\\]", headers["location"])


@pytest.mark.parametrize(
    ("mode", "kind", "site", "status"),
    [
        ("no-cors", "image", "cross-site", 403),
        ("no-cors", "image", "same-site", 403),
        ("navigate", "iframe", "cross-site", 403),
        ("cors", "empty", "cross-site", 403),
        ("navigate", "document", "cross-site", 200),
        ("navigate", "document", "none", 200),
        ("no-cors", "style", "same-origin", 200),
        ("navigate", "iframe", "same-origin", 200),
    ],
)
def test_other_sites_make_it_work_for_nobody(dest: Path, mode: str, kind: str, site: str, status: int) -> None:
    with serving(dest) as port:
        headers = {"Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": kind, "Sec_Fetch_Site": site}
        found, _, body = get(port, "/", **headers)
        assert found == status and ("request-" in body) is (status == 200)


def test_failures_and_malformed_requests_carry_the_same_headers(
    dest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a secret of the process")

    monkeypatch.setattr("fastattr.log.reading.models", fails)
    with serving(dest) as port:
        status, headers, body = ask(port, "/")
        assert status == 500 and "secret" not in body
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nHost\r\n\r\n")
            answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode().lower()
    assert "a secret of the process" in caplog.text
    assert answer.startswith("http/1.1 400")
    for name in ("content-security-policy", "x-content-type-options", "referrer-policy", "cache-control"):
        assert name in headers and f"\r\n{name}: {headers[name].lower()}\r\n" in answer


def test_slow_connections_end_and_others_are_answered_meanwhile(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sends nothing, one that sends a letter now and then, and one that does so after a request."""
    monkeypatch.setattr(guarding, "HEADERS_S", 1.0)
    with serving(dest) as port:
        slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
        slow[2].sendall(b"GET /dashboard.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began_s = time.monotonic()
        open_ = set(slow)
        while open_ and time.monotonic() - began_s < 20:
            for each in list(open_):
                try:
                    if each is not slow[0]:
                        each.sendall(b"G")
                    each.settimeout(0.05)
                    while each.recv(65536):
                        pass
                    open_.discard(each)
                except TimeoutError:
                    continue
                except OSError:
                    open_.discard(each)
            assert ask(port, "/dashboard.css")[0] == 200
        for each in slow:
            each.close()
    assert not open_


def test_serving_elsewhere_than_on_loopback_prints_the_token(dest: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastattr", "log", "serve", str(dest), "--host", "0.0.0.0", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = int(re.search(r":(\d+) ", process.stdout.readline())[1])  # type: ignore[index]
        token = re.search(r"token=(\S{32})$", process.stdout.readline().strip())[1]  # type: ignore[index]
        assert "request-" not in get(port, "/", Host="localhost")[2]
        assert "request-" in get(port, "/", Host="localhost", Cookie=f"fastattr_token={token}")[2]
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert "nothing is encrypted" in said
