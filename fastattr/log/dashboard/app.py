"""Pages over a log: the list of responses, trends, one response with its report. Reads only, and only what SQL finds.

Everything shown came from models and callers, so: templates escape, no page of ours runs a script, reports run theirs in a
sandbox without an origin, and on loopback requests for other host names are refused (a web site that points its own name
here would otherwise read the log through its visitor's browser); elsewhere there is a token. No part of an address ever
becomes a path.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from fastattr.errors import InputError, SaveError
from fastattr.log import reading
from fastattr.log.dashboard import charts
from fastattr.log.dashboard.guarding import Login, OwnSite, SafeHeaders, server_of

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PAGE = 50  # responses on a page
LAST_PAGE = 1_000_000
PAGES_AT_ONCE = 4  # that are made; others wait

logger = logging.getLogger("fastattr")

_HERE = Path(__file__).parent
# the report brings a policy of its own that allows its one script by digest; this takes the origin away from it
_REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"
_ORDERS = {"newest": "newest first", "oldest": "oldest first", "lowest_evidence": "lowest evidence first"}
_RANGES = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}


def create_app(
    dest: str | Path,
    *,
    token: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Starlette:
    """The web app.

    Args:
        token: only who knows it is answered, under any host name. Without one everybody is, under the names of loopback
            only: a web site that points its own name here would otherwise read the log through its visitor's browser.

    Raises:
        InputError, SaveError: the destination cannot be read.
    """
    reading.open_log(dest, storage_options)
    at_once = threading.BoundedSemaphore(PAGES_AT_ONCE)

    def page(show: Callable[[Request, reading.Log], Response]) -> Callable[[Request], Response]:
        def shown(request: Request) -> Response:
            with at_once:
                return show(request, reading.open_log(dest, storage_options))

        return shown

    def trends(request: Request, log: reading.Log) -> Response:
        return _trends(request, log, *reading.tallies(dest, storage_options))

    return Starlette(
        routes=[
            Route("/", page(_responses), methods=["GET"]),
            Route("/trends", page(trends), methods=["GET"]),
            Route("/response/{record_id}", page(_response), methods=["GET"]),
            Route("/response/{record_id}/report", page(_report), methods=["GET"]),
            Route("/dashboard.css", _style, methods=["GET"]),
        ],
        middleware=[
            Middleware(SafeHeaders, show=_message),
            Middleware(OwnSite, show=_message),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)
            if token is None
            else Middleware(Login, token=token, show=_message),
        ],
        exception_handlers={InputError: _refused, SaveError: _unreadable, HTTPException: _no_page},
    )


def serve(
    dest: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Serve the dashboard until interrupted; on loopback unless another address is named, which needs a token.

    The token is new with every start, and printed.

    Raises:
        InputError, SaveError: the destination cannot be read, or the address cannot be listened on.
    """
    name = f"[{host}]" if ":" in host else host
    token = None if _is_loopback(host) else secrets.token_urlsafe(24)
    app = create_app(dest, token=token, storage_options=storage_options)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"nothing can listen on {host}, port {port}: {error.strerror or error}; choose another port, 0 takes a free one"
        ) from error
    with listening:
        port = listening.getsockname()[1]
        print(f"http://{name}:{port}  (Ctrl+C stops)", flush=True)
        if token is not None:
            reached = socket.gethostname() if host in ("0.0.0.0", "::") else name
            print(f"log in with http://{reached}:{port}/?token={token}", flush=True)
            print(
                "warning: nothing is encrypted: who can listen on the way reads the token and the records; "
                "leave --host out and tunnel instead, for example ssh -L 8765:localhost:8765",
                file=sys.stderr,
                flush=True,
            )
        server_of(app).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- pages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What the form of a page says."""

    filters: reading.Filters
    order: reading.Order
    page: int
    asked: Mapping[str, str]

    def link(self, **changed: str) -> str:
        """The same page with other choices; an empty one is left out."""
        kept = {name: value for name, value in {**self.asked, **changed}.items() if value}
        return "?" + urlencode(kept)


def _chosen(request: Request) -> _Choice:
    names = ("model", "range", "since", "until", "order", "errors", "q", "page")
    asked = {name: value for name in names if (value := request.query_params.get(name, ""))}
    since, until = (_time(name, asked.get(name)) for name in ("since", "until"))
    if (length := asked.get("range")) is not None:
        if length not in _RANGES:
            raise InputError(f"range is {length!r}, expected one of {', '.join(_RANGES)}")
        since = since or datetime.now(timezone.utc) - _RANGES[length]
    number = asked.get("page", "1")
    if not (number.isascii() and number.isdigit() and 1 <= len(number) <= 7 and 1 <= int(number) <= LAST_PAGE):
        raise InputError(f"page is {number!r}, expected a whole number from 1 to {LAST_PAGE}")
    order: Any = asked.get("order", "newest")
    if order not in _ORDERS:
        raise InputError(f"order is {order!r}, expected one of {', '.join(_ORDERS)}")
    filters = reading.Filters(asked.get("model"), since, until, "errors" in asked, asked.get("q"))
    return _Choice(filters, order, int(number), asked)


def _time(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when.astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name} is {text!r}, expected a time such as 2026-11-22T09:30, in UTC") from error


def _responses(request: Request, log: reading.Log) -> Response:
    choice = _chosen(request)
    n = reading.count(log, choice.filters)
    first = (choice.page - 1) * PAGE
    found = reading.summaries(log, choice.filters, order_by=choice.order, limit=PAGE, offset=first)
    evidence = reading.evidence_of(log, found)
    return _render(
        "responses.html",
        log=log,
        choice=choice,
        models=reading.models(log),
        orders=_ORDERS,
        rows=[(each, charts.sparkline(evidence.get(each.record_id, ()))) for each in found],
        n=n,
        first=first,
        last=first + len(found),
        filtered=choice.filters != reading.Filters(),
    )


def _trends(
    request: Request, log: reading.Log, tallies: tuple[reading.Tally, ...], damaged: tuple[reading.Damaged, ...]
) -> Response:
    choice = _chosen(request)
    models = reading.models(log)
    model = models[0][0] if len(models) == 1 else choice.filters.model or ""  # limits are those of one model
    return _render(
        "trends.html",
        log=log,
        choice=choice,
        models=models,
        trends=charts.trends(log, choice.filters, model),
        tallies=tallies,
        lost=charts.losses(tallies),
        damaged=damaged,
        filtered=choice.filters != reading.Filters(),
    )


def _response(request: Request, log: reading.Log) -> Response:
    record_id = request.path_params["record_id"]
    row = reading.fields_of(log, record_id)
    if row is None:
        raise HTTPException(404)
    same = reading.summaries(log, reading.Filters(request_id=row["request_id"]), limit=20)
    others = [each for each in same if each.record_id != record_id]
    return _render(
        "response.html",
        log=log,
        row=row,
        metadata=_pretty(row["metadata"]),
        versions=_pretty(row["versions"]),
        others=others,
    )


def _report(request: Request, log: reading.Log) -> Response:
    record = next(reading.read(log, record_id=request.path_params["record_id"], limit=1), None)
    if record is None:
        raise HTTPException(404)
    with tempfile.TemporaryDirectory(prefix="fastattr-") as folder:
        page = record.attribution.to_html(Path(folder) / "report.html").read_bytes()
    return HTMLResponse(page, headers={"Content-Security-Policy": _REPORT_POLICY})


def _style(request: Request) -> Response:
    return Response((_HERE / "dashboard.css").read_bytes(), media_type="text/css")


def _pretty(text: str) -> list[tuple[str, str]]:
    """JSON object as rows; what is no object is one row, as it is."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return [("", text)]
    if not isinstance(stored, dict):
        return [("", text)]
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in stored.items()]


# --- refusals --------------------------------------------------------------------------------------


def _refused(request: Request, error: Exception) -> Response:
    return _message(400, "This cannot be answered", str(error))


def _unreadable(request: Request, error: Exception) -> Response:
    logger.warning("the dashboard cannot read the log: %s", error)
    return _message(503, "The log cannot be read", str(error))


def _no_page(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return _message(404, "There is no such page", "No response has this id; it may have expired.")
    response = _message(status, "This cannot be answered", "It answers GET requests only.")
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _message(status: int, title: str, text: str) -> Response:
    return _render("message.html", status=status, title=title, text=text)


# --- templates -------------------------------------------------------------------------------------


def _render(template: str, *, status: int = 200, **values: Any) -> Response:
    return HTMLResponse(_TEMPLATES.get_template(template).render(**values), status_code=status)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or value != value:
        return "–"
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _signed(value: float | None) -> str:
    return ("+" if value is not None and round(value, 2) > 0 else "") + _number(value)


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "thousands": lambda n: f"{n:,}".replace(",", "\N{NARROW NO-BREAK SPACE}"),
        "clock": lambda when: f"{when:%Y-%m-%d %H:%M:%S}",
        "percent": lambda share: "–" if share is None or share != share else f"{share:.0%}",
        "kind": charts.kind,
        "field_time": lambda when: "" if when is None else f"{when:%Y-%m-%dT%H:%M}",
    }
    return environment


_TEMPLATES = _templates()
