"""What stands before the pages of the dashboard: headers, a login, other sites' requests, and connections that dawdle."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlencode

import h11
import uvicorn
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # to send the whole of a request's head, and between two requests
ANSWER_S = 300.0  # to make an answer and to take it
COOKIE = "fastattr_token"

POLICY = (
    "default-src 'none'; style-src 'self'; img-src data:; frame-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'self'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

ShowMessage = Callable[[int, str, str], Response]

logger = logging.getLogger("fastattr")


class SafeHeaders:
    """Puts the headers on every answer, refusals and failures too."""

    def __init__(self, app: ASGIApp, show: ShowMessage) -> None:
        self.app, self.show = app, show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        try:
            await self.app(scope, receive, send_safely)
        except Exception:  # a log may hold anything
            if begun or scope["type"] != "http":
                raise
            logger.exception("the dashboard failed")
            failed = self.show(500, "This cannot be shown", "The page failed; the log of the server says why.")
            await failed(scope, receive, send_safely)


class OwnSite:
    """Refuses what another web site asks for through its visitor's browser; following a link from there is fine."""

    def __init__(self, app: ASGIApp, show: ShowMessage) -> None:
        self.app, self.show = app, show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            if foreign and (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) != ("navigate", "document"):
                refused = self.show(403, "This cannot be answered", "Another web site asked for it.")
                await refused(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Login:
    """Answers those who know the token: from an address with `?token=`, once, and from then on by a cookie."""

    def __init__(self, app: ASGIApp, token: str, show: ShowMessage) -> None:
        self.app, self.token, self.show = app, token, show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = QueryParams(scope["query_string"])
        if self._is_right(asked.get("token", "")):
            others = urlencode([(name, value) for name, value in asked.multi_items() if name != "token"])
            # one slash, and no backslash: `//host` would lead to another site
            path = "/" + scope["path"].lstrip("/\\")
            response: Response = RedirectResponse(path + ("?" + others if others else ""), 303)
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            await response(scope, receive, send)
        elif self._is_right(_cookie(Headers(scope=scope).get("cookie", ""))):
            await self.app(scope, receive, send)
        else:
            status = 200 if scope["path"] == "/" else 401  # the front page is the login
            response = self.show(
                status, "Log in", "Open the address with ?token=... that fastattr log serve printed when it started."
            )
            await response(scope, receive, send)

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def _cookie(header: str) -> str:
    try:
        held = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if held is None else held.value


def server_of(app: ASGIApp, **options: Any) -> uvicorn.Server:
    """A server that ends connections which dawdle."""
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, http=_Protocol, ws="none", lifespan="off", **options
    )
    return uvicorn.Server(config)


class _Protocol(H11Protocol):
    """HTTP/1.1 with an end to slow heads and slow readers, and headers on the refusals that no page has seen."""

    _timer: asyncio.TimerHandle | None = None
    _last: Any = None
    _since_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since_s = self.loop.time()
        self._timer = self.loop.call_later(HEADERS_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle = self.cycle
        if cycle is not self._last:
            self._last, self._since_s = cycle, self.loop.time()
        waited_s = self.loop.time() - self._since_s
        if cycle is None or (cycle.response_complete and not self.transport.get_write_buffer_size()):
            if waited_s >= HEADERS_S * 0.9:
                self.transport.abort()
                return
        elif waited_s >= ANSWER_S:
            self.transport.abort()
            return
        self._timer = self.loop.call_later(HEADERS_S, self._look)

    def send_400_response(self, msg: str) -> None:
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "Connection": "close",
            "Content-Security-Policy": POLICY,
        }
        event = h11.Response(status_code=400, headers=list({**headers, **_HEADERS}.items()), reason=b"Bad Request")
        for each in (event, h11.Data(data=msg.encode("ascii", "replace")), h11.EndOfMessage()):
            self.transport.write(self.conn.send(each) or b"")
        self.transport.close()
