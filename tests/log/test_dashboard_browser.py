"""The dashboard in a real browser: what a person sees, points at and presses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fastattr.log import reading
from tests.log.records import NOON, make_record, write_segment
from tests.log.serving import serving

DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 390, "height": 844}
HOSTILE = "<img src=//evil.example/x onerror=alert(1)><script>alert(2)</script>'; DROP VIEW records;--"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, (
        "the dashboard is tested in Chromium, which is not on the PATH; install Debian's package `chromium`"
    )
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def dest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("log")
    records = [
        make_record(
            request_id=HOSTILE if k == 7 else f"request-{k:03}",
            seed=k,
            n_tokens=8 + k % 30,
            time=NOON - timedelta(minutes=30 * k),
            model="one" if k % 4 else HOSTILE,
            metadata={"route": "/chat", HOSTILE: HOSTILE},
            pictures=k == 0,
            error=k % 10 == 3,
            sequence=k,
        )
        for k in range(64)
    ]
    write_segment(dest, records)
    masked = make_record(request_id="masked", sequence=64, time=NOON - timedelta(days=3))
    write_segment(dest, [masked], number=1, content="none")
    return dest


@pytest.fixture(scope="module")
def port(dest: Path) -> Iterator[int]:
    with serving(dest) as port:
        yield port


@pytest.fixture
def open_page(browser: Browser, port: int) -> Iterator[Open]:
    """Opens a page; at the end none may have complained or asked for anything from elsewhere."""
    complaints: list[str] = []
    contexts = []

    def note(url: str) -> None:
        if not url.startswith("data:") and urlsplit(url).netloc != f"127.0.0.1:{port}":
            complaints.append(f"request: {url}")

    def open_at(path: str, **options: object) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: note(request.url))
        page.goto(f"http://127.0.0.1:{port}{path}")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []


def requests(page: Page) -> list[str]:
    return page.locator(".responses .request a").all_inner_texts()


def show(page: Page) -> None:
    with page.expect_navigation():
        page.get_by_role("button", name="Show").click()


def test_the_form_narrows_the_list(open_page: Open) -> None:
    page = open_page("/")
    assert requests(page)[:2] == ["request-000", "request-001"] and len(requests(page)) == 50
    page.get_by_label("errors only").check()
    show(page)
    assert requests(page) == [f"request-{k:03}" for k in range(3, 64, 10)]
    expect(page.get_by_label("errors only")).to_be_checked()
    page.get_by_label("Request id").fill("-03")
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert requests(page) == ["request-033"]
    page.get_by_label("errors only").uncheck()
    page.get_by_label("Request id").fill("")
    page.get_by_label("From").fill((NOON - timedelta(hours=2)).strftime("%Y-%m-%dT%H:%M"))
    page.get_by_label("Until").fill((NOON - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M"))
    page.get_by_label("Order").select_option("oldest")
    show(page)
    assert requests(page) == ["request-004", "request-003"]


def test_lowest_evidence_comes_first(open_page: Open, dest: Path) -> None:
    page = open_page("/")
    page.get_by_label("Order").select_option(label="lowest evidence first")
    show(page)
    means = [
        float(text.replace("\N{MINUS SIGN}", "-")) for text in page.locator("td[data-name=mean]").all_inner_texts()
    ]
    assert means == sorted(means) and means[0] < 0 < means[-1]
    with page.expect_navigation():
        page.get_by_role("link", name="next →").click()
    assert len(requests(page)) == 15
    lowest = reading.summaries(dest, order_by="lowest_evidence", limit=None)
    assert requests(page) == [each.request_id for each in lowest[50:]]


def test_a_click_anywhere_on_a_row_opens_its_report(open_page: Open) -> None:
    page = open_page("/")
    page.locator(".responses tbody tr").nth(0).locator("td.share").click(force=True)  # the link lies over it
    expect(page.get_by_role("heading", level=1)).to_have_text("request-000")
    report = page.frame_locator("iframe")
    expect(report.locator("#response")).to_contain_text("A red circle and a red circle.")
    report.locator(".token").nth(2).hover()
    expect(report.locator("#word")).to_have_text("circle")
    heat = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0)"
    assert report.locator("canvas.overlay").first.evaluate(heat)
    expect(page.get_by_text("/chat")).to_be_visible()


def test_a_report_cannot_reach_the_dashboard(open_page: Open, port: int) -> None:
    page = open_page("/")
    page.locator(".request a").first.click()
    page.frame_locator("iframe").locator(".token").first.wait_for()
    frame = page.frames[1]
    assert frame.evaluate("self.origin") == "null"
    assert (
        frame.evaluate("() => { try { return parent.document.title } catch (e) { return e.name } }") == "SecurityError"
    )


def test_masked_text_is_shown_as_such(open_page: Open) -> None:
    page = open_page("/?q=masked")
    page.locator(".request a").first.click()
    expect(page.get_by_text("This log keeps no text")).to_be_visible()
    assert page.frame_locator("iframe").locator(".token").count() == 8


def test_hostile_values_are_only_text(open_page: Open) -> None:
    page = open_page("/?q=script")
    assert requests(page) == [HOSTILE]
    page.locator(".request a").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
    assert page.locator("dd", has_text=HOSTILE).count() == 1
    page.goto(page.url.split("/response")[0] + "/trends")
    page.get_by_label("Model").select_option(value=HOSTILE)
    show(page)
    expect(page.get_by_text("Responses", exact=True).last).to_be_visible()
    assert "16 in all" in page.locator("figure").last.inner_text()
    assert page.locator("img").count() == 0 and page.locator("script").count() == 0


def test_trends_tell_about_each_point(open_page: Open) -> None:
    page = open_page("/trends?model=one")
    evidence = page.locator("figure").first
    assert evidence.locator("path.limit").count() == evidence.locator("rect.slot").count() > 10
    slot = evidence.locator("rect.slot").nth(3)
    assert "mean" in (title := slot.locator("title").text_content() or "") and "limits" in title
    before = slot.evaluate("r => getComputedStyle(r).fill")
    slot.hover()
    assert slot.evaluate("r => getComputedStyle(r).fill") != before
    box, dot = evidence.locator("svg").bounding_box(), evidence.locator("path.dot").first.bounding_box()
    assert (
        box and dot and dot["width"] < 12 and abs(dot["width"] - dot["height"]) < 2
    )  # round, though the drawing is stretched


@pytest.mark.parametrize("path", ["/", "/trends?model=one", "/response/", "/?q=nothing-like-it"])
def test_a_phone_is_wide_enough(open_page: Open, dest: Path, path: str) -> None:
    address = path + reading.summaries(dest, limit=1)[0].record_id if path == "/response/" else path
    page = open_page(address, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.get_by_role("link", name="Trends").is_visible()


def test_light_and_dark(open_page: Open) -> None:
    for path in ("/", "/trends"):
        shades = {}
        for scheme in ("light", "dark"):
            page = open_page(path, color_scheme=scheme)
            shades[scheme] = page.evaluate(
                "['backgroundColor', 'color'].map(n => +getComputedStyle(document.body)[n].match(/\\d+/)[0])"
            )
        assert shades["light"][0] > 200 > 100 > shades["light"][1]
        assert shades["dark"][0] < 60 < 180 < shades["dark"][1]
