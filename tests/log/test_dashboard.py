"""The dashboard as a server: what it shows, what it refuses, and that nothing in a log becomes markup or a path."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.errors import InputError, SaveError
from fastattr.log import reading
from fastattr.log.dashboard import charts, create_app, serve
from fastattr.log.dashboard.app import _is_loopback
from fastattr.log.reading import Filters
from tests.log.records import NOON, make_record, write_segment
from tests.log.serving import ask, serving

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; DROP VIEW records; --",
    "../../../../etc/passwd",
    "{{ 7 * 7 }}{% for x in y %}",
    "\x00\x1b[31m\u202eright to left",
    "javascript:alert(1)",
    "x" * 900,
    "",
]


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("log")
    ordinary = [
        make_record(
            request_id=f"request-{k:03}",
            seed=k,
            time=NOON - timedelta(minutes=10 * k),
            model="one" if k % 3 else "two",
            evidence=k % 5 != 4,
            error=k % 10 == 3,
            pictures=k == 0,
            sequence=k,
        )
        for k in range(60)
    ]
    hostile = [
        make_record(
            request_id=text,
            seed=k,
            time=NOON - timedelta(days=9, minutes=k),
            model=text or "three",
            metadata={text: text, "nested": {"<b>": [text]}},
            sequence=60 + k,
        )
        for k, text in enumerate(HOSTILE)
    ]
    write_segment(dest, ordinary, number=0)
    write_segment(dest, hostile, number=1, day=(NOON - timedelta(days=9)).date())
    masked = make_record(request_id="masked", sequence=69, time=NOON - timedelta(days=20))
    write_segment(dest, [masked], number=2, content="none")
    (dest / "writers").mkdir()
    tally = {
        "writer": "<i>w", "pid": 1, "host": "<b>h", "started": NOON.isoformat(), "updated": NOON.isoformat(),
        "closed": False, "submitted": 1234, "written": 1227, "dropped": {"<u>full": 5}, "failed": {"StatesError": 2},
        "in_flight": 0, "damaged_frames": 0,
    }  # fmt: skip
    (dest / "writers" / "w.json").write_text(json.dumps(tally))
    return dest


@pytest.fixture(scope="module")
def port(dest: Path) -> Iterator[int]:
    with serving(dest) as port:
        yield port


def shown(body: str) -> list[str]:
    """The request ids of a list, top to bottom; an empty one is shown as `no id`."""
    return [html.unescape(each) for each in re.findall(r'<a href="/response/\w+"><bdi>(.*?)</bdi>', body, re.DOTALL)]


class Markup(HTMLParser):
    """Which tags and attributes a page really has, as a browser would see them."""

    def __init__(self, body: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.feed(body)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]


def page(port: int, path: str) -> str:
    status, _, body = ask(port, path)
    assert status == 200, body
    return body


# --- pages -----------------------------------------------------------------------------------------


def test_the_list_is_paged_newest_first(port: int) -> None:
    first, second = page(port, "/"), page(port, "/?page=2")
    assert shown(first) == [f"request-{k:03}" for k in range(50)]
    assert shown(second)[:10] == [f"request-{k:03}" for k in range(50, 60)]
    assert len(shown(second)) == 20 and "51–70 of 70" in second
    assert 'href="?page=2"' in first and 'rel="next"' not in second
    assert shown(page(port, "/?page=3")) == []


def test_the_list_obeys_its_form(port: int, dest: Path) -> None:
    assert shown(page(port, "/?errors=1")) == [f"request-{k:03}" for k in range(3, 60, 10)]
    assert shown(page(port, "/?model=two&q=REQUEST-00")) == [f"request-{k:03}" for k in (0, 3, 6, 9)]
    since, until = NOON - timedelta(minutes=45), NOON - timedelta(minutes=15)
    clocks = f"/?since={since:%Y-%m-%dT%H:%M}&until={until:%Y-%m-%dT%H:%M}"
    assert shown(page(port, clocks)) == ["request-002", "request-003", "request-004"]
    lowest = [each.request_id or "no id" for each in reading.summaries(dest, order_by="lowest_evidence")]
    assert shown(page(port, "/?order=lowest_evidence")) == lowest
    nothing = page(port, "/?q=" + quote("' OR 1=1 --"))
    assert shown(nothing) == [] and "No response matches" in nothing
    again = page(port, "/?model=two&order=oldest&errors=1&q=re%22quest")
    assert '<option value="two" selected>' in again and '<option value="oldest" selected>' in again
    assert 'value="re&#34;quest"' in again and 'name="errors" value="1" checked' in again


def test_ranges_count_from_now(tmp_path: Path) -> None:
    now = datetime.now(timezone.utc)
    ages = {
        "minutes": timedelta(minutes=5),
        "days": timedelta(days=3),
        "weeks": timedelta(days=20),
        "long": timedelta(days=90),
    }
    write_segment(
        tmp_path,
        [make_record(request_id=name, time=now - age, sequence=k) for k, (name, age) in enumerate(ages.items())],
    )
    with serving(tmp_path) as port:
        for asked, n in (("24h", 1), ("7d", 2), ("30d", 3), ("", 4)):
            assert shown(page(port, f"/?range={asked}")) == list(ages)[:n]


def test_a_response_and_its_report(port: int, dest: Path) -> None:
    for name, word in (("request-000", "circle"), ("request-004", "circle"), ("masked", "·")):
        [summary] = reading.summaries(dest, Filters(search=name))
        body = page(port, f"/response/{summary.record_id}")
        assert f'<bdi class="id">{name}</bdi>' in body
        assert f'sandbox="allow-scripts" src="/response/{summary.record_id}/report"' in body
        status, headers, report = ask(port, f"/response/{summary.record_id}/report")
        assert status == 200 and word in report and "Where each word came from" in report
        assert headers["content-security-policy"] == "sandbox allow-scripts; frame-ancestors 'self'"
        assert "script-src 'sha256-" in report
    assert "keeps no text" in body  # of the masked one
    assert "data:image/png" in ask(port, f"/response/{reading.summaries(dest)[0].record_id}/report")[2]


def test_trends_name_what_was_lost(port: int) -> None:
    body = page(port, "/trends?model=one")
    assert body.count('class="plot"') == 3
    n = sum(1 for k in range(60) if k % 3 and k % 10 != 3)  # errors are left out
    assert f"Centre and limits from the first {n} responses of one" in body
    assert 'class="limit"' in body and 'class="center"' in body
    assert "choose one to see them" in page(port, "/trends")
    assert "dropped: &lt;u&gt;full" in body and "1\N{NARROW NO-BREAK SPACE}234" in body
    assert "No response matches" in page(port, "/trends?model=nobody")
    assert page(port, "/trends?q=request-003").count('class="plot"') == 3  # a single response


def test_an_empty_log_says_what_to_do(tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        for path in ("/", "/trends"):
            body = page(port, path)
            assert "Nothing is published yet" in body and "AttributionLogger" in body


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    segment = write_segment(tmp_path / "log", [make_record(request_id="good")])
    segment.with_name("torn.parquet").write_bytes(b"PAR1" + b"x" * 50)
    with serving(tmp_path / "log") as port:
        body = page(port, "/")
        assert shown(body) == ["good"] and "1 file cannot be read" in body and "torn.parquet" in body
        shutil.rmtree(tmp_path / "log")
        status, _, body = ask(port, "/")
        assert status == 503 and "is not a directory" in body
    with pytest.raises(SaveError, match="is not a directory"):
        create_app(tmp_path / "log")


# --- hostile ---------------------------------------------------------------------------------------


def test_nothing_in_a_log_becomes_markup(port: int, dest: Path) -> None:
    listed = reading.summaries(dest, Filters(until=NOON - timedelta(days=8)), limit=None)
    bodies = [page(port, "/?page=2"), page(port, "/trends"), *(page(port, f"/response/{s.record_id}") for s in listed)]
    assert len(listed) == len(HOSTILE) + 1
    for body in bodies:
        markup = Markup(body)
        assert not markup.tags & {"script", "img", "u", "i", "style", "object", "embed", "base"}
        assert not {name for name in markup.attributes if name.startswith("on") or name in ("style", "srcdoc")}
        assert all(re.match(r"/|\?|data:,$", link) and not link.startswith("//") for link in markup.links)
        assert "{{" not in html.unescape(body).replace(HOSTILE[4], "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in bodies[0] and "49" not in re.findall(
        r"<bdi>(.*?)</bdi>", bodies[0]
    )


def test_hostile_values_are_looked_up_and_never_run(port: int) -> None:
    for text in HOSTILE:
        if text:
            assert len(shown(page(port, f"/?model={quote(text)}"))) == 1
            assert len(shown(page(port, f"/?q={quote(text)}"))) == 1
        assert ask(port, f"/response/{quote(text, safe='')}")[0] in (404, 405)
    assert len(shown(page(port, "/?q=request"))) == 50  # everything is still there


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/response/../../../../etc/passwd",
        "/response/..%2f..%2f..%2fetc%2fpasswd",
        "/response/%2fetc%2fpasswd/report",
        "/response/..\\..\\etc\\passwd",
        "/dashboard.css/../app.py",
        "/app.py",
        "/base.html",
        "/static/app.py",
        "//etc/passwd",
        "/response/",
        "/response/%00",
        "/response/%ff%fe",
        "/writers/w.json",
        "/date=2026-11-22/0123456789abcdef-000000.parquet",
    ],
)
def test_no_address_is_a_path(port: int, path: str) -> None:
    status, _, body = ask(port, path)
    assert status == 404
    assert "root:" not in body and "import" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", None, "0.0.0.0", "[::2]"]
)
def test_other_names_are_refused(port: int, host: str | None) -> None:
    status, headers, body = ask(port, "/", host=host)
    assert status == 400 and "request-" not in body
    if host is not None:  # without any, HTTP itself refuses
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8765", "[::1]", "[::1]:8765"])
def test_own_names_are_answered(port: int, host: str) -> None:
    assert ask(port, "/", host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_only_reads(port: int, method: str) -> None:
    for path in ("/", "/trends", "/response/x", "/response/x/report", "/dashboard.css"):
        status, headers, _ = ask(port, path, method=method)
        assert status == 405 and set(headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "asked",
    [
        "page=0", "page=-1", "page=x", "page=99999999999999999999", "page=%D9%A1", "order=time", "since=yesterday",
        "until=2026-13-01", "since=0001-01-01T00:00%2B23:59", "range=1y",
    ],
)  # fmt: skip
def test_questions_that_make_no_sense(port: int, asked: str) -> None:
    for path in ("/", "/trends"):
        status, headers, body = ask(port, f"{path}?{asked}")
        assert status == 400 and "expected" in body
        assert headers["content-type"].startswith("text/html")


def test_every_answer_is_closed_off(port: int, dest: Path) -> None:
    record = reading.summaries(dest)[0].record_id
    for path in (
        "/",
        "/trends",
        f"/response/{record}",
        "/nothing",
        "/?page=x",
        "/dashboard.css",
        f"/response/{record}/report",
    ):
        _, headers, _ = ask(port, path)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"]
        if path.endswith("/report"):
            assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
        else:
            assert policy.startswith("default-src 'none'; style-src 'self'")
            assert "unsafe" not in policy and "script-src" not in policy and "*" not in policy


# --- serving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_which_addresses_are_loopback(host: str, loopback: bool) -> None:
    assert _is_loopback(host) is loopback


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="choose another port"):
        serve(tmp_path, port=taken.getsockname()[1])


# --- drawings --------------------------------------------------------------------------------------

NUMBER = st.none() | st.floats(width=32)


@given(st.lists(NUMBER, max_size=200))
def test_sparklines_stay_in_their_box(evidence: list[float | None]) -> None:
    bars = charts.sparkline(evidence)
    known = [value for value in evidence if value is not None and math.isfinite(value)]
    assert bool(bars) == bool(known)
    for bar in bars:
        assert bar.x >= 0 and bar.x + bar.width <= charts.WIDTH
        assert bar.y >= 0 and bar.y + bar.height <= charts.HEIGHT
        assert bar.height > 0
    if known:  # the lowest of all is drawn, as it is
        assert charts.kind(min(known)) in {bar.kind for bar in bars}


def test_a_bar_is_as_high_as_its_evidence() -> None:
    bars = charts.sparkline([3.0, -3.0, 0.0, None, -50.0])
    middle = charts.HEIGHT / 2
    assert [bar.kind for bar in bars] == ["seen", "against", "even", "against"]
    assert (bars[0].y + bars[0].height, bars[1].y) == (middle, middle)  # up and down from the middle
    assert bars[0].height == bars[1].height == pytest.approx(middle * 3 / charts.CLIP_NATS, abs=0.1)
    assert bars[3].height == middle  # beyond is cut


@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.booleans(),
)
def test_ticks_are_round_and_hold_what_is_shown(low: float, span: float, whole: bool) -> None:
    ticks, digits = charts._ticks(low, low + span, whole=whole)
    high, slack = low + span, 1e-6 * (1 + abs(low) + span)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 8 and np.allclose(steps, steps[0])
    assert np.allclose([float(f"{tick:.{digits}f}") for tick in ticks], ticks, atol=1e-9)
    if whole:
        assert steps[0] >= 1


@given(st.integers(0, 400 * 365 * 24 * 60))
def test_bins_are_few_and_not_too_few(minutes: int) -> None:
    span = timedelta(minutes=minutes)
    n = span / charts._bin_width(span)
    assert n <= charts._BINS
    assert n >= charts._BINS / 4 or span < charts._BINS * timedelta(minutes=1)


def test_limits_are_those_of_the_first_responses(tmp_path: Path) -> None:
    """Evidence 1 with a spread of 0.5 for 200 responses, then of 0: means of ten lie outside, and are drawn so."""
    draw = np.random.default_rng(7)
    values = np.concatenate([draw.normal(1, 0.5, 200), draw.normal(0, 0.5, 40)])
    records = [
        make_record(
            n_tokens=1,
            grids=((1, 1, 1),),
            evidence=float(v),
            sequence=k,
            time=NOON + timedelta(minutes=k),
            request_id=str(k),
        )
        for k, v in enumerate(values)
    ]
    write_segment(tmp_path, records)
    found = charts.trends(reading.open_log(tmp_path), Filters(), "by hand")
    assert found is not None
    chart = found.charts[0]
    assert chart.limits is not None
    assert (chart.limits.center, chart.limits.sigma) == pytest.approx(
        (values[:200].mean(), values[:200].std(ddof=1)), rel=1e-4
    )
    late = [slot for slot in chart.slots if slot.x >= charts.WIDTH * 0.86]
    early = [slot for slot in chart.slots if slot.x < charts.WIDTH * 0.8]
    assert sum(slot.outside for slot in late) >= len(late) / 2 and not any(slot.outside for slot in early)
    assert chart.n_outside == sum(slot.outside for slot in chart.slots)
    for slot in chart.slots:  # y grows downwards
        assert slot.band is not None and slot.y is not None
        assert 0 <= slot.band[0] < slot.band[1] <= charts.HEIGHT
        assert slot.outside == (not slot.band[0] <= slot.y <= slot.band[1])
    assert found.counts.slots[0].title.startswith(f"{NOON:%Y-%m-%d}")
    assert charts.trends(reading.open_log(tmp_path), Filters(model="nobody"), "") is None


def test_losses_are_summed_over_writers() -> None:
    one = reading.Tally("a", 1, "h", NOON, NOON, True, 10, 5, {"x": 2, "y": 1}, {"e": 1}, 1, 0)
    other = replace(one, writer="b", dropped={"y": 5}, failed={})
    found = charts.losses([one, other])
    assert (found.submitted, found.written, found.in_flight) == (20, 10, 2)
    assert found.dropped == (("y", 6), ("x", 2)) and found.failed == (("e", 1),)
