"""The report in a real browser: what a reader sees, points at and presses."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fastattr.calibration import Calibration
from fastattr.report import notebook_html, overlay, write_html
from fastattr.types import Attribution, AttributionConfig
from tests.engine.test_report import HOSTILE, scene_as_json, synthetic

DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 390, "height": 844}
MADE_UP = Calibration(
    0.43, n_true=900, n_false=300, true_marked=45, false_marked=243, words="content words", dataset="scenes", model="x"
)
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "the report is tested in Chromium, which is not on the PATH; install Debian's package `chromium`"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield running
        running.close()


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens attributions as a report; at the end no page may have complained or asked for anything."""
    complaints: list[str] = []
    contexts = []

    def open_page(attributions: Attribution | Sequence[Attribution], **options: object) -> Page:
        many = (attributions,) if isinstance(attributions, Attribution) else attributions
        path = write_html(many, tmp_path / "report.html")
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: _note_foreign(request.url, path.as_uri(), complaints))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _note_foreign(url: str, own: str, complaints: list[str]) -> None:
    if url != own and not url.startswith("data:"):
        complaints.append(f"request: {url}")


def token(index: int) -> str:
    return f'.token[data-index="{index}"]'


def pixels(page: Page, image: int = 0) -> np.ndarray:
    """uint8 `[H W 4]`: what an overlay canvas holds."""
    uri = page.evaluate("k => document.querySelector(`canvas.overlay[data-image='${k}']`).toDataURL()", image)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def marked(page: Page, name: str) -> list[int]:
    return page.evaluate("name => [...document.querySelectorAll(`.token.${name}`)].map(t => +t.dataset.index)", name)


def rest_pointer(page: Page) -> None:
    page.mouse.move(2, 2)


def test_pointing_at_a_word_draws_its_map(open_report: Open) -> None:
    why = synthetic(grid=(6, 9), n_images=2)
    page = open_report(why)
    assert not pixels(page).any()
    page.hover(token(3))
    assert marked(page, "active") == [3]
    for image in range(2):
        drawn = pixels(page, image)
        # on black, what the canvas adds is what the Python overlay draws
        black = np.zeros((*drawn.shape[:2], 3), np.uint8)
        expected = np.asarray(overlay(black, why.image[image][3, 0], (0, 0, 1, 1)), float)
        shown = drawn[..., :3] * (drawn[..., 3:] / 255.0)
        assert np.abs(shown - expected).max() <= 6  # both round: heat to 256 levels here, colours there
    third = pixels(page)
    page.hover(token(4))
    assert (pixels(page) != third).any()
    rest_pointer(page)
    assert not pixels(page).any()
    assert marked(page, "active") == []


def test_a_pinned_word_stays(open_report: Open) -> None:
    page = open_report(synthetic())
    page.click(token(5))
    kept = pixels(page)
    rest_pointer(page)
    assert marked(page, "pinned") == marked(page, "active") == [5]
    assert (pixels(page) == kept).all() and kept.any()
    page.hover(token(9))  # a glance at another one
    assert marked(page, "pinned") == [5] and marked(page, "active") == [9]
    assert (pixels(page) != kept).any()
    rest_pointer(page)
    assert (pixels(page) == kept).all()
    page.keyboard.press("Escape")
    assert marked(page, "pinned") == marked(page, "active") == []
    assert not pixels(page).any()


def test_a_second_click_lets_go(open_report: Open) -> None:
    page = open_report(synthetic())
    page.click(token(5))
    page.click(token(5))
    rest_pointer(page)
    assert marked(page, "pinned") == []


def test_keys_step_pin_and_let_go(open_report: Open) -> None:
    why = synthetic()
    page = open_report(why)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert marked(page, "active") == [1] and marked(page, "pinned") == []
    page.keyboard.press("Enter")
    assert marked(page, "pinned") == [1]
    page.keyboard.press("ArrowRight")  # the pin travels along
    assert marked(page, "active") == marked(page, "pinned") == [2]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert marked(page, "active") == [0]
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert marked(page, "active") == [len(why) - 1]
    page.keyboard.press("Escape")
    assert marked(page, "active") == marked(page, "pinned") == []


def test_tab_reaches_the_words_once_and_they_speak(open_report: Open) -> None:
    why = replace(
        synthetic("red circle"), evidence=torch.tensor([2.0, -2.0]), log_prob=torch.log(torch.tensor([0.5, 0.25]))
    )
    page = open_report(why)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "low-step"  # above the words, so before them
    page.keyboard.press("Tab")
    assert marked(page, "active") == [0]
    assert page.locator(".token[tabindex='0']").count() == 1
    labels = page.locator(".token").evaluate_all("all => all.map(t => t.ariaLabel)")
    assert labels == ["red, probability 50 %, Seen", "circle, probability 25 %, Against the picture, low evidence"]
    page.keyboard.press("Space")
    assert page.locator(token(0)).get_attribute("aria-pressed") == "true"


def tint(page: Page, selector: str) -> float:
    return page.locator(selector).evaluate("word => Number(word.style.getPropertyValue('--tint') || 0)")


def test_only_words_before_are_tinted_by_how_relevant_they_are(open_report: Open) -> None:
    why = synthetic()
    relevance = torch.rand(why.context.shape, generator=torch.Generator().manual_seed(1))
    n_prompt = len(why.context_tokens) - len(why)
    page = open_report(replace(why, relevance=relevance))
    page.hover(token(6))
    for j in range(n_prompt):
        assert abs(tint(page, f"#prompt .asked >> nth={j}") - relevance[6, j].item()) < 0.04
    for j in range(len(why)):
        expected = relevance[6, n_prompt + j].item() if j < 6 else 0.0
        assert abs(tint(page, token(j)) - expected) < 0.04
    assert "relevance" in page.inner_text("#tint-key")


def test_the_panel_tells_what_is_known(open_report: Open) -> None:
    why = replace(
        synthetic("red blue green", config=AttributionConfig(scales=(1.0, 2.0))),
        log_prob=torch.log(torch.tensor([0.5, 0.25, 0.004])),
        evidence=torch.log(torch.tensor([8.0, 1.1, 0.25])),
        agreement=torch.tensor([[1.0, 0.5], [1.0, 1.2], [1.0, 0.0]]),
        degenerate=torch.tensor([False, False, True]),
    )
    page = open_report(why)
    page.hover(token(0))
    panel = page.inner_text("#panel .reading")
    for part in ("red", "token 1 of 3", "50 %", "−0.69 nats", "+2.08 nats", "Seen", "8× as likely", "2×"):
        assert part in panel
    assert page.locator("#agreement dd span").all_inner_texts() == ["100 %", "50 %"]
    assert "says nothing" not in panel
    page.hover(token(1))
    assert "the picture changes little" in page.inner_text("#verdict")
    page.hover(token(2))
    panel = page.inner_text("#panel .reading")
    for part in ("0.4 %", "−5.52 nats", "−1.39 nats", "Against the picture", "4× less likely", "says nothing"):
        assert part in panel
    assert [marked(page, kind) for kind in ("seen", "even", "against")] == [[0], [1], [2]]


def low_evidence_example() -> Attribution:
    """Of its words, `lamp-post` (three tokens) and `cat` have less than 0.43 nats, and `dog` has less than 0."""
    why = synthetic("A lamp-post, a cat and one red dog.")
    assert why.tokens == ("A", " lamp", "-", "post", ",", " a", " cat", " and", " one", " red", " dog", ".")
    return replace(why, evidence=torch.tensor([-3.0, 1, -1, 0.25, -3, -3, 0.125, -3, 0.5, 2, -0.5, -3]))


def question_marks(page: Page) -> list[int]:
    """Tokens that draw a `?` behind themselves."""
    drawn = page.locator(".token").evaluate_all("all => all.map(t => getComputedStyle(t, '::after').content)")
    return [i for i, content in enumerate(drawn) if content == '"?"']


def test_words_with_low_evidence_are_marked(open_report: Open) -> None:
    why = low_evidence_example()
    page = open_report(replace(why, calibration=MADE_UP))
    assert marked(page, "low") == [1, 2, 3, 6, 10]
    assert question_marks(page) == [3, 6, 10]  # one a word, at its end
    assert page.locator("#response").text_content() == why.response  # the marks are no part of the text
    spoken = page.locator(".token").evaluate_all("all => all.map(t => t.ariaLabel.endsWith('low evidence'))")
    assert [i for i, low in enumerate(spoken) if low] == [1, 2, 3, 6, 10]
    assert page.inner_text("#low-key") == (
        "evidence below 0.43 nats: on 1,200 content words of scenes, 81 % [76, 85] of invented words and 5 % [4, 7] of "
        "true words are marked. What share of the marked words is invented depends on how often the model invents. "
        "English function words are left out."
    )
    page.hover(token(3))
    assert page.inner_text("#low") == "Low evidence “lamp-post” has +0.25 nats, less than +0.43"
    assert page.inner_text("#evidence dd") == "+0.25 nats"  # the token alone
    page.hover(token(9))
    assert not page.locator("#low").is_visible()


def test_without_a_calibration_the_mark_begins_at_nought_and_says_so(open_report: Open) -> None:
    page = open_report(low_evidence_example())
    assert marked(page, "low") == question_marks(page) == [10]
    key = page.inner_text("#low-key")
    assert key.startswith("evidence below 0 nats: the picture makes the word less likely.")
    assert "No calibration exists for this model" in key
    assert "fastattr eval DATASET --calibration FILE makes one" in key
    assert page.inner_text("#low-step") == "1 word with low evidence"


def test_a_button_steps_through_the_marked_words(open_report: Open) -> None:
    page = open_report(replace(low_evidence_example(), calibration=MADE_UP))
    assert page.inner_text("#low-step") == "3 words with low evidence"
    for expected in (1, 6, 10, 1):
        page.click("#low-step")
        rest_pointer(page)
        assert marked(page, "pinned") == marked(page, "active") == [expected]
        assert pixels(page).any()
    page.click(token(8))
    page.click("#low-step")
    assert marked(page, "pinned") == [10]
    page.keyboard.press("Enter")  # the button is still in hand
    assert marked(page, "pinned") == [1]
    page.keyboard.press("ArrowRight")
    assert marked(page, "pinned") == [2]


def test_marks_follow_the_switch(open_report: Open) -> None:
    why = low_evidence_example()
    lens = replace(why, config=replace(why.config, method="lens"), calibration=MADE_UP)
    sure = replace(why, config=replace(why.config, method="tam"), evidence=torch.full((len(why),), 4.0))
    page = open_report([why, lens, sure])
    page.get_by_label("lens").check(force=True)
    assert question_marks(page) == [3, 6, 10]
    page.get_by_label("tam").check(force=True)
    assert question_marks(page) == []
    assert not page.locator("#low-step").is_visible()


def test_without_evidence_nothing_is_said_about_it(open_report: Open) -> None:
    page = open_report(replace(synthetic(), evidence=None))
    assert question_marks(page) == []
    assert not page.locator("#low-step").is_visible()
    page.click(token(2))
    assert not page.locator("#verdict").is_visible()
    assert not page.locator("#evidence").is_visible()
    assert not page.locator(".evidence-key").first.is_visible()


def test_the_switch_changes_maps_and_tints(open_report: Open) -> None:
    other = synthetic(seed=0, config=AttributionConfig(method="tam", scales=(1.0,)), grid=(5, 5))
    page = open_report([synthetic(), other])
    page.click(token(4))
    rest_pointer(page)
    first = pixels(page)
    page.get_by_label("tam").check(force=True)
    assert (pixels(page) != first).any()
    assert marked(page, "pinned") == [4]
    assert "context activation" in page.inner_text("#tint-key")
    assert not page.locator("#agreement").is_visible()
    page.get_by_label("arc").check(force=True)
    assert (pixels(page) == first).all()


def test_the_overlay_lies_on_the_part_the_grid_covers(open_report: Open) -> None:
    page = open_report(synthetic(extent=(0.25, 0.0, 0.75, 0.5)))
    stack, canvas = (page.locator(name).bounding_box() for name in (".stack", "canvas.overlay"))
    assert stack and canvas
    assert abs(canvas["x"] - stack["x"] - 0.25 * stack["width"]) < 1
    assert abs(canvas["y"] - stack["y"]) < 1
    assert abs(canvas["width"] - 0.5 * stack["width"]) < 1
    assert abs(canvas["height"] - 0.5 * stack["height"]) < 1


def test_without_pictures_the_map_is_drawn_on_plain_ground(open_report: Open) -> None:
    page = open_report(replace(synthetic(grid=(4, 8)), pictures=()))
    page.hover(token(1))
    assert pixels(page).any()
    box = page.locator("canvas.overlay").bounding_box()
    assert box and abs(box["width"] / box["height"] - 2) < 0.02
    assert page.locator("figure img").count() == 0


def test_hostile_text_is_only_text(open_report: Open) -> None:
    page = open_report(replace(synthetic(HOSTILE, prompt=HOSTILE), notes=(HOSTILE,), model=HOSTILE))
    assert page.locator("#response").text_content() == HOSTILE
    assert page.locator("#prompt").text_content() == HOSTILE
    assert page.locator("#notes").text_content() == HOSTILE
    for index in range(page.locator(".token").count()):
        page.hover(token(index))
    assert page.locator("script").count() == 2


def test_line_breaks_are_kept(open_report: Open) -> None:
    page = open_report(synthetic("one two\n\nthree"))
    assert page.locator("#response").text_content() == "one two\n\nthree"
    first, third = page.locator(token(0)).bounding_box(), page.locator(token(4)).bounding_box()
    assert first and third
    assert third["y"] > first["y"] + 1.5 * first["height"]
    page.hover(token(2))
    assert marked(page, "active") == [2]
    assert page.inner_text("#word") == "↵"


def test_settings_are_in_the_footer(open_report: Open) -> None:
    page = open_report(replace(synthetic(), notes=("read this",), prompt="Describe the image."))
    page.click("footer summary")
    footer = page.inner_text("footer")
    for part in ("read this", "rbo_p", "0.9", "1, 1.5, 2", "Describe the image.", "grid at 1.5×", "1×12×12", "0.1.0"):
        assert part in footer


# ---- answers that are JSON -------------------------------------------------------------------------


def row(index: int) -> str:
    return f".field >> nth={index}"


def rows_marked(page: Page, name: str) -> list[int]:
    return page.evaluate(
        "name => [...document.querySelectorAll('.field')].flatMap((r, k) => r.classList.contains(name) ? [k] : [])",
        name,
    )


def held(page: Page) -> str:
    return "".join(page.locator(".token.held").all_text_contents())


def test_pointing_at_a_field_draws_its_map_and_its_box_and_marks_its_tokens(open_report: Open) -> None:
    why = scene_as_json()
    page = open_report(why)
    assert page.locator(".field").count() == len(why.fields()) == 16
    assert not page.locator(".stack .frame").is_visible()
    field = why.fields()[1]
    assert (field.name, field.value) == ("objects[0].name", "cyan square")
    assert page.inner_text(row(1)).split() == ["objects[0].name", "cyan", "square", "−0.80"]
    page.hover(row(1))
    assert rows_marked(page, "active") == [1] and marked(page, "active") == []
    assert held(page) == "cyansquare"
    drawn = pixels(page)
    assert field.selection is not None and field.box is not None
    expected = np.asarray(
        overlay(np.zeros((*drawn.shape[:2], 3), np.uint8), field.selection.map[0], (0, 0, 1, 1)), float
    )
    assert np.abs(drawn[..., :3] * (drawn[..., 3:] / 255.0) - expected).max() <= 6
    stack, box = (page.locator(name).bounding_box() for name in (".stack", ".stack .frame"))
    assert stack and box
    scale = stack["width"] / 512
    shown = [box["x"] - stack["x"], box["y"] - stack["y"], box["width"], box["height"]]
    left, top, right, bottom = field.box
    assert np.abs(np.array(shown) - scale * np.array([left, top, right - left, bottom - top])).max() < 1
    assert page.inner_text("#word") == "cyan square"
    assert page.inner_text("#place") == "objects[0].name · 2 tokens"
    assert page.inner_text("#evidence dd") == "−0.80 nats"
    assert field.log_prob is not None
    assert f"{np.exp(field.log_prob) * 100:.0f} %" in page.inner_text("#probability")
    rest_pointer(page)
    assert not pixels(page).any() and held(page) == ""
    assert not page.locator(".stack .frame").is_visible()
    page.hover(token(40))  # a word has no box
    assert pixels(page).any() and not page.locator(".stack .frame").is_visible()


def test_a_field_is_kept_and_let_go(open_report: Open) -> None:
    page = open_report(scene_as_json())
    page.click(row(1))
    rest_pointer(page)
    assert rows_marked(page, "pinned") == [1] and marked(page, "pinned") == []
    assert page.locator(".field button").nth(1).get_attribute("aria-pressed") == "true"
    page.hover(token(40))
    assert marked(page, "active") == [40] and held(page) == ""
    page.click(token(40))
    assert rows_marked(page, "pinned") == [] and marked(page, "pinned") == [40]
    page.click(row(2))
    page.click(row(2))
    rest_pointer(page)
    assert rows_marked(page, "pinned") == marked(page, "pinned") == []


def test_keys_walk_the_fields_and_lead_into_their_tokens(open_report: Open) -> None:
    why = scene_as_json()
    page = open_report(why)
    page.keyboard.press("Tab")
    assert rows_marked(page, "active") == [0]
    assert page.locator(".field button[tabindex='0']").count() == 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert rows_marked(page, "active") == [1] and held(page) == "cyansquare"
    page.keyboard.press("Enter")
    assert rows_marked(page, "pinned") == [1]
    page.keyboard.press("Space")
    assert rows_marked(page, "pinned") == []
    page.keyboard.press("End")
    assert rows_marked(page, "active") == [15]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    selection = why.fields()[1].selection
    assert selection is not None
    assert marked(page, "active") == [selection.targets[0][0]] and rows_marked(page, "active") == []
    page.keyboard.press("ArrowRight")
    assert marked(page, "active") == [selection.targets[0][1]]
    page.keyboard.press("Escape")
    assert marked(page, "active") == rows_marked(page, "active") == []
    spoken = page.locator(".field button").nth(1).get_attribute("aria-label")
    assert spoken and spoken.startswith("objects[0].name: cyan square, probability ")
    assert spoken.endswith(" %, Against the picture")


def test_a_tapped_field_shows_its_place_on_a_phone(open_report: Open) -> None:
    page = open_report(scene_as_json(), viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator(row(13)).tap()  # far down: the table scrolls
    assert rows_marked(page, "pinned") == [13]
    boxes = {name: page.locator(name).bounding_box() for name in (row(13), "#pictures", ".stack .frame", "#panel")}
    picture, table_row, panel = boxes["#pictures"], boxes[row(13)], boxes["#panel"]
    assert picture and table_row and panel and pixels(page).any()
    assert picture["y"] + picture["height"] <= table_row["y"] + 1
    assert table_row["y"] + table_row["height"] <= panel["y"] + 1


def test_no_part_of_the_table_lies_on_the_picture_or_the_panel_of_a_phone(open_report: Open) -> None:
    page = open_report(scene_as_json(), viewport=PHONE)
    page.click(row(4))
    rest_pointer(page)
    for name in ("#pictures", "#panel"):
        covered = page.evaluate(
            """name => {
                const part = document.querySelector(name);
                const covers = (distance) => {
                    window.scrollTo(0, distance);
                    const { left, right, top, bottom } = part.getBoundingClientRect();
                    return [0.05, 0.3, 0.6, 0.95].some((share) => {
                        const found = document.elementFromPoint((left + right) / 2, top + share * (bottom - top));
                        return found !== null && !part.contains(found);
                    });
                };
                return Array.from({ length: 40 }, (_, step) => 25 * step).filter(covers);
            }""",
            name,
        )
        assert covered == [], name


def test_a_field_of_a_video_opens_where_it_was_seen(open_report: Open) -> None:
    why = scene_as_json(frames=3)
    page = open_report(why)
    names = [field.name for field in why.fields()]
    for k in (2, 0, 1):
        page.click(row(names.index(f"objects[{k}].name")))
        assert page.inner_text("figure output") == f"{k + 1} / 3"
        assert page.locator(".stack .frame").is_visible()
    page.locator("figure input").fill("2")
    assert not page.locator(".stack .frame").is_visible()


def test_empty_and_cut_values_say_so(open_report: Open) -> None:
    page = open_report(synthetic('{"a": "", "b": "not to the en'))
    assert page.inner_text(row(0)).split() == ["a", "empty", "–"]
    page.hover(row(0))
    assert rows_marked(page, "active") == [0] and not pixels(page).any()
    assert not page.locator(".stack .frame").is_visible()
    assert page.inner_text("#word") == "empty"
    assert not page.locator("#cut").is_visible()
    assert page.inner_text(f"{row(1)} >> .cut") == "cut off"
    page.hover(row(1))
    assert page.locator("#cut").is_visible()
    assert held(page) == "nottotheen"


def test_hostile_keys_and_values_are_only_text(open_report: Open) -> None:
    page = open_report(synthetic(json.dumps({HOSTILE[:40]: HOSTILE, "x": [HOSTILE]}, ensure_ascii=False)))
    assert page.locator(".field .value").all_text_contents() == [HOSTILE, HOSTILE]
    assert page.locator(".field button").first.text_content() == json.dumps([HOSTILE[:40]], ensure_ascii=False)
    for k in range(2):
        page.hover(row(k))
        assert page.locator("#word").text_content() == HOSTILE
    assert page.locator("script").count() == 2


def test_an_answer_in_words_has_no_table(open_report: Open) -> None:
    page = open_report(synthetic())
    assert page.locator("table").is_hidden()
    assert page.locator(".for-fields:visible").count() == 0
    assert page.evaluate("document.body.classList.contains('structured')") is False


def test_without_evidence_the_table_has_no_column_for_it(open_report: Open) -> None:
    page = open_report(replace(scene_as_json(), evidence=None))
    assert page.inner_text("thead").split() == ["name", "value"]
    assert page.inner_text(row(1)).split() == ["objects[0].name", "cyan", "square"]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_long_tables_scroll_and_long_names_wrap(open_report: Open, viewport: dict[str, int]) -> None:
    rows = [{"n" * 90: "W" * 200, "very long key " * 9: n} for n in range(30)]
    page = open_report(synthetic(json.dumps({"rows": rows})), viewport=viewport)
    for name in ("html", ".scroll"):
        inner, client = page.evaluate("n => (e => [e.scrollWidth, e.clientWidth])(document.querySelector(n))", name)
        assert inner <= client
    tall, shown = page.evaluate("(e => [e.scrollHeight, e.clientHeight])(document.querySelector('.scroll'))")
    assert tall > 2 * shown and shown < viewport["height"] / 1.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rows_stand_out_from_their_ground(open_report: Open, scheme: str) -> None:
    """WCAG AA again, for the table."""
    page = open_report(synthetic('{"a": {"b": 1}, "c": "cut o'), color_scheme=scheme)
    page.click(row(0))
    rest_pointer(page)
    colors = """([text, ground]) => [
        getComputedStyle(document.querySelector(text)).color,
        getComputedStyle(document.querySelector(ground)).backgroundColor,
    ]"""
    pairs = [(".field.pinned i", ".field.pinned"), (".field.pinned .value", ".field.pinned"), ("thead th", "thead th")]
    for text, ground in [*pairs, (".field .cut", ".scroll"), (".field:last-child .evidence-key", ".scroll")]:
        ink, paper = (_luminance(color) for color in page.evaluate(colors, [text, ground]))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, (text, ground, ratio)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_runs_out_of_sight(open_report: Open, scheme: str, viewport: dict[str, int]) -> None:
    long_word = "Donaudampfschifffahrtsgesellschaftskapitaenswitwenrentenauszahlungsstelle"
    attributions = [
        synthetic(f"A {long_word} is here.", n_images=2, frames=2, config=AttributionConfig(scales=scales))
        for scales in [(1.0,), (1.0, 1.25, 1.5, 2.0, 3.0), (2.0,)]
    ]
    page = open_report(attributions, viewport=viewport, color_scheme=scheme)
    page.click(token(1))
    page.click("footer summary")
    inner, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner <= client


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_report: Open, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for text, on the page and, for a pinned word, on its own ground."""
    page = open_report(replace(synthetic(), evidence=torch.full((len(synthetic()),), -1.0)), color_scheme=scheme)
    page.click(token(2))
    rest_pointer(page)
    colors = """([text, ground]) => [
        getComputedStyle(document.querySelector(text)).color,
        getComputedStyle(document.querySelector(ground)).backgroundColor,
    ]"""
    words = [("#response", "body"), ("#model", "body"), (".pinned", ".pinned")]
    verdicts = [("#verdict b", "#panel"), ("#low b", "#panel"), (".swatch.low", "body")]  # which has the marks' colour
    for text, ground in words + verdicts:
        ink, paper = (_luminance(color) for color in page.evaluate(colors, [text, ground]))
        ratio = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert ratio >= 4.5, (text, ground, ratio)
    _, paper = page.evaluate(colors, ["#response", "body"])
    assert (_luminance(paper) < 0.1) == (scheme == "dark")


def _luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(","))
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_tap_pins_and_the_word_stays_in_sight(open_report: Open) -> None:
    page = open_report(synthetic("some words " * 150), viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator(token(2)).tap()
    assert marked(page, "pinned") == [2]
    page.locator(token(150)).dispatch_event("click")  # below the fold, as a word under the panel would be
    assert marked(page, "pinned") == [150]
    box = {name: page.locator(name).bounding_box() for name in (token(150), "#pictures", "#panel")}
    assert box["#pictures"]["y"] + box["#pictures"]["height"] <= box[token(150)]["y"]
    assert box[token(150)]["y"] + box[token(150)]["height"] <= box["#panel"]["y"]
    assert box["#pictures"]["y"] >= 0 and box["#panel"]["y"] + box["#panel"]["height"] <= PHONE["height"] + 1
    assert pixels(page).any()


def test_a_thousand_words_do_not_lag(open_report: Open) -> None:
    medians = {}
    for n in (10, 1000):
        page = open_report(synthetic("word " * (n - 1) + "end", grid=(24, 24)))
        assert page.locator(".token").count() == n
        medians[n] = page.evaluate(
            """() => {
                const words = [...document.querySelectorAll(".token")].slice(-10);
                const times = [];
                for (let round = 0; round < 6; round++) {
                    for (const [i, word] of words.entries()) {
                        const start = performance.now();
                        const place = { clientX: i, clientY: round, pointerType: "mouse", bubbles: true };
                        word.dispatchEvent(new PointerEvent("pointerover", place));
                        document.body.getBoundingClientRect(); // styles and layout count as well
                        times.push(performance.now() - start);
                    }
                }
                return times.sort((a, b) => a - b)[times.length / 2];
            }"""
        )
        assert marked(page, "active") == [n - 1]
    # a hundred times the words; work on each of them at every move would take a hundred times as long
    assert medians[1000] < 50 * max(medians[10], 0.5), medians


def test_a_notebook_cell_is_the_same_page(browser: Browser) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_content(f"<body>{notebook_html([synthetic(HOSTILE)])}</body>")
    frame = page.frame_locator("iframe")
    frame.locator(token(1)).click()
    assert frame.locator(".token.pinned").count() == 1
    assert frame.locator("#response").text_content() == HOSTILE
    page.close()
    assert complaints == []


def thinking() -> Attribution:
    """A response whose first line is reasoning."""
    why = synthetic("<think>maybe a green square</think>\nA red circle.")
    stop = why.response.index("</think>") + len("</think>")
    return replace(why, reasoning=((0, stop),))


def test_reasoning_is_folded_and_can_be_opened(open_report: Open) -> None:
    why = thinking()
    page = open_report(why)
    fold = page.locator("#response details")
    n_folded = sum(1 for _, stop in why.spans if stop <= why.reasoning[0][1])
    assert fold.locator("summary").inner_text() == f"Reasoning · {n_folded} tokens"
    assert not page.locator(token(0)).is_visible() and page.locator(token(n_folded)).is_visible()
    assert page.title().startswith("A red circle.")
    assert page.locator("#response").inner_text().split("tokens")[1].strip() == "A red circle."
    fold.locator("summary").click()
    assert page.locator(token(0)).is_visible()
    page.hover(token(2))
    assert marked(page, "active") == [2]
    fold.locator("summary").click()
    assert not page.locator(token(0)).is_visible()
    assert page.evaluate("document.querySelector('#response').textContent").replace(
        f"Reasoning · {n_folded} tokens", ""
    ) == (why.response)


def test_the_keyboard_skips_folded_tokens(open_report: Open) -> None:
    why = thinking()
    n_folded = sum(1 for _, stop in why.spans if stop <= why.reasoning[0][1])
    page = open_report(why)
    page.keyboard.press("ArrowRight")
    assert marked(page, "active") == [n_folded]
    page.keyboard.press("ArrowLeft")
    assert marked(page, "active") == [n_folded]
    page.keyboard.press("Home")
    assert marked(page, "active") == [n_folded]
    page.locator("#response summary").focus()
    page.keyboard.press("Enter")
    page.locator(token(n_folded)).click()
    page.keyboard.press("ArrowLeft")
    assert marked(page, "active") == [n_folded - 1]
    page.keyboard.press("Home")
    assert marked(page, "active") == [0]


def test_a_response_without_reasoning_has_no_fold(open_report: Open) -> None:
    page = open_report(synthetic("A red circle."))
    assert page.locator("#response details").count() == 0
    page.keyboard.press("ArrowRight")
    assert marked(page, "active") == [0]
