"""The dashboard on a free port of loopback, for as long as a test needs it."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastattr.log.dashboard import create_app
from fastattr.log.dashboard.guarding import server_of


@contextmanager
def serving(dest: Path, token: str | None = None) -> Iterator[int]:
    """The port of a dashboard over `dest`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(create_app(dest, token=token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server has ended before it began"
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(
    port: int, path: str, *, method: str = "GET", host: str | None = "localhost"
) -> tuple[int, dict[str, str], str]:
    """Status, headers in lower case and body of one request; the path goes out as it is, no Host is sent for None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        response = connection.getresponse()
        body = response.read().decode()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, body
    finally:
        connection.close()
