"""The report of videos and of several pictures, in a real browser: time, and which picture a word speaks of."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page

from fastattr.report import overlay, write_html
from fastattr.types import WHOLE_IMAGE, Attribution
from tests.engine import test_report_browser as in_browser
from tests.engine.test_report import payload_of, synthetic
from tests.engine.test_report_browser import PHONE, Open, marked, pixels, rest_pointer, token

browser, open_report = in_browser.browser, in_browser.open_report  # fixtures

SLIDER, PLAY, CLOCK = ".timeline input", ".play", "figure output"


def moving_square(n_frames: int = 12, n_steps: int = 6, words: str = "one two three four") -> Attribution:
    """A square that wanders from left to right; word k looks at it most in step k, and a little in all others."""
    why = synthetic(words)
    pictures = np.full((n_frames, 60, 120, 3), 40, np.uint8)
    for f in range(n_frames):
        left = round(f * 100 / max(1, n_frames - 1))
        pictures[f, 20:40, left : left + 20] = (240, 150, 30)
    maps = torch.zeros(len(why), n_steps, 6, 12)
    for k in range(len(why)):
        for step in range(n_steps):
            cell = round(step * 11 / max(1, n_steps - 1))
            maps[k, step, 2:4, cell] = 0.8 if step == k % n_steps else 0.2
    return replace(
        why,
        image=(maps,),
        pictures=(pictures,),
        picture_sizes=((60, 120),),
        grids=tuple(((n_steps, 6, 12),) for _ in why.config.known_scales),
    )


def side_by_side(*sizes: tuple[int, int], brightest: tuple[int | None, ...]) -> Attribution:
    """Pictures of these (height, width), the map of word k highest in picture `brightest[k]`, dark everywhere for None.

    The others are lit more widely, though less brightly: they have more mass.
    """
    why = synthetic("x" + " x" * (len(brightest) - 1))
    maps = [torch.zeros(len(brightest), 1, height // 16, width // 16) for height, width in sizes]
    for k, best in enumerate(brightest):
        for image in range(len(sizes) if best is not None else 0):
            maps[image][k] = 0.3
            if image == best:
                maps[image][k] = 0.0
                maps[image][k, 0, 1, 1] = 0.4
    return replace(
        why,
        image=tuple(maps),
        pictures=tuple(np.full((1, *size, 3), 90, np.uint8) for size in sizes),
        picture_sizes=sizes,
        extents=(WHOLE_IMAGE,) * len(sizes),
        grids=tuple(tuple((1, h // 16, w // 16) for h, w in sizes) for _ in why.config.known_scales),
    )


def shown_picture(page: Page) -> np.ndarray:
    """uint8 `[H W 3]`: the frame on show."""
    uri = page.locator("figure img").get_attribute("src")
    assert uri
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def frame_of(page: Page) -> int:
    """The frame on show, counted from 0, in words, on the slider and as a screen reader has it."""
    now, count = page.inner_text(CLOCK).split(" / ")
    assert page.locator(SLIDER).input_value() == str(int(now) - 1)
    assert page.locator(SLIDER).get_attribute("aria-valuetext") == f"frame {now} of {count}"
    return int(now) - 1


def stop_clock(page: Page) -> None:
    """From here on the page's time moves by `page.clock.run_for` alone."""
    page.clock.install(time=0)
    page.clock.pause_at(1)


def drawn_heat(page: Page, heat: torch.Tensor) -> float:
    """The largest difference of what the page draws on black from what `overlay` does."""
    drawn = pixels(page)
    expected = np.asarray(overlay(np.zeros((*drawn.shape[:2], 3), np.uint8), heat, WHOLE_IMAGE), float)
    return float(np.abs(drawn[..., :3] * (drawn[..., 3:] / 255.0) - expected).max())


# ---- the slider ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_frames", "n_steps", "frames", "steps"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        (6, 3, [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]),
        (5, 3, [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]),  # the last frame was repeated to fill its step
        (2, 4, [0, 0, 1, 1], [0, 1, 2, 3]),
    ],
)
def test_the_slider_moves_the_frame_and_the_heat(
    open_report: Open, n_frames: int, n_steps: int, frames: list[int], steps: list[int]
) -> None:
    why = moving_square(n_frames, n_steps)
    page = open_report(why)
    page.click(token(1))
    for at, (frame, step) in enumerate(zip(frames, steps, strict=True)):
        page.locator(SLIDER).fill(str(at))
        assert frame_of(page) == at
        difference = shown_picture(page).astype(int) - why.pictures[0][frame]
        assert np.abs(difference).mean() < 4  # JPEG; another frame is at least 30 away
        assert drawn_heat(page, why.image[0][1, step]) <= 6


def test_the_oracle_of_frames_tells_them_apart() -> None:
    pictures = moving_square(6, 6).pictures[0].astype(int)
    assert min(np.abs(pictures[f] - pictures[f + 1]).mean() for f in range(5)) > 10


def test_without_pictures_time_is_that_of_the_map(open_report: Open) -> None:
    why = moving_square(8, 4)
    page = open_report(replace(why, pictures=()))
    page.hover(token(2))
    assert frame_of(page) == 2 and page.inner_text(CLOCK) == "3 / 4"
    assert drawn_heat(page, why.image[0][2, 2]) <= 6
    assert page.locator("figure img").count() == 0


def test_every_place_of_the_timeline_is_the_frame_that_stands_there(open_report: Open) -> None:
    page = open_report(moving_square(7, 4))
    page.hover(token(0))
    box = page.locator(".timeline").bounding_box()
    assert box
    for frame in (3, 0, 6, 1, 5, 2, 4):
        for share in (0.1, 0.9):  # of the frame's place
            page.mouse.click(box["x"] + (frame + share) / 7 * box["width"], box["y"] + box["height"] / 2)
            assert frame_of(page) == frame


def test_bars_show_when(open_report: Open) -> None:
    why = moving_square(7, 4)
    heat = torch.zeros(len(why), 4, 2, 2)
    heat[0, :, 0, 0] = torch.tensor([0.1, 0.0, 0.4, 0.2])
    page = open_report(replace(why, image=(heat,)))
    bars = page.locator(".strip i")
    assert page.locator(".strip").get_attribute("aria-label") == (
        "Strength of the shown word over video 1: no word is shown, or its map is dark"
    )
    page.hover(token(0))
    boxes = bars.evaluate_all(
        "all => all.map(b => [b.getBoundingClientRect().width, b.getBoundingClientRect().height])"
    )
    widths, heights = np.array(boxes).T
    np.testing.assert_allclose(heights / heights.max(), [0.25, 0, 1, 0.5], atol=0.03)  # of the highest: it is *when*
    np.testing.assert_allclose(widths / widths.sum(), [2 / 7, 2 / 7, 2 / 7, 1 / 7], atol=0.01)  # as wide as its frames
    assert bars.evaluate_all("all => all.map(b => b.classList.contains('best'))") == [False, False, True, False]
    assert page.locator(".strip").get_attribute("aria-label") == (
        "Strength of the shown word over video 1: highest at frame 5"
    )
    page.hover(token(1))  # dark
    assert bars.evaluate_all("all => all.map(b => b.offsetHeight)") == [0] * 4


# ---- which frame a word opens at -------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [4, 8, 7])
def test_a_word_opens_the_video_where_its_selection_has_its_box(open_report: Open, n_frames: int) -> None:
    why = moving_square(n_frames, 4, "one two three four")
    heat = torch.zeros(len(why), 4, 3, 3)
    heat[0, 1], heat[0, 2, 1, 1] = 0.5, 0.6  # more mass in the second step, the peak in the third
    heat[1, 1, 0, 0], heat[1, 3, 0, 0] = 0.5003, 0.5004  # which the page's 256 levels cannot tell apart
    heat[2, 1, 0, 0] = 1.0
    why = replace(why, image=(heat,))
    page = open_report(why)
    assert frame_of(page) == 0
    for k, word in enumerate(("one", "two", "three")):
        page.hover(token(k))
        assert frame_of(page) == why[word].frame
        assert frame_of(page) * 4 // n_frames == [2, 3, 1][k]
    before = frame_of(page)
    page.hover(token(3))  # a dark map has no time of its own
    assert frame_of(page) == before and not pixels(page).any()


def test_a_frame_that_the_reader_chose_is_held_until_another_word_is_kept(open_report: Open) -> None:
    page = open_report(moving_square())
    page.click(token(0))
    page.locator(SLIDER).fill("9")
    page.hover(token(2))
    assert frame_of(page) == 9 and marked(page, "active") == [2]  # a glance at another word, on this frame
    rest_pointer(page)
    assert frame_of(page) == 9 and marked(page, "active") == [0]
    page.click(token(3))
    assert frame_of(page) == 6
    page.hover(token(1))
    assert frame_of(page) == 2  # and glances move it again
    page.locator(SLIDER).fill("9")
    page.click(token(3))  # let go
    assert marked(page, "pinned") == [] and frame_of(page) == 9
    page.keyboard.press("Escape")
    page.hover(token(1))
    assert frame_of(page) == 2


def test_a_pin_that_travels_brings_the_video_along(open_report: Open) -> None:
    page = open_report(moving_square())
    page.click(token(0))
    page.locator(SLIDER).fill("9")
    page.locator(token(0)).focus()
    page.keyboard.press("ArrowRight")
    assert marked(page, "pinned") == [1] and frame_of(page) == 2


def test_the_switch_keeps_a_frame_that_was_chosen(open_report: Open) -> None:
    why = moving_square()
    other = replace(why, image=(why.image[0].flip(1),), config=replace(why.config, method="tam"))
    coarse = replace(why, image=(why.image[0][:, :3],), config=replace(why.config, method="lens"))
    page = open_report([why, other, coarse])
    page.click(token(1))
    assert frame_of(page) == 2
    page.get_by_label("tam").check(force=True)
    assert frame_of(page) == 8
    page.locator(SLIDER).fill("5")
    page.get_by_label("lens").check(force=True)
    assert frame_of(page) == 5 and page.locator(".strip i").count() == 3
    assert drawn_heat(page, why.image[0][1, 1]) <= 6  # of three steps, twelve frames: the sixth is of the second


# ---- playing ---------------------------------------------------------------------------------------


def test_play_runs_to_the_end_and_stops_there(open_report: Open) -> None:
    page = open_report(moving_square(4, 2))
    stop_clock(page)
    page.hover(token(0))
    assert page.locator(PLAY).get_attribute("aria-label") == "Play video 1"
    page.click(PLAY)
    assert page.locator(PLAY).get_attribute("aria-label") == "Pause video 1"
    for expected in (1, 2, 3):
        page.clock.run_for(400)
        assert frame_of(page) == expected
    assert page.locator(PLAY).get_attribute("aria-label") == "Play video 1"
    page.clock.run_for(4000)
    assert frame_of(page) == 3
    page.click(PLAY)
    assert frame_of(page) == 0  # from the start again
    page.clock.run_for(400)
    assert frame_of(page) == 1


def test_a_playing_video_is_not_moved_by_words_and_a_paused_one_is_held(open_report: Open) -> None:
    why = moving_square()
    page = open_report(why)
    stop_clock(page)
    page.click(PLAY)
    page.clock.run_for(3 * 400)
    page.click(token(0))
    assert frame_of(page) == 3
    assert drawn_heat(page, why.image[0][0, 1]) <= 6
    page.clock.run_for(400)
    assert frame_of(page) == 4  # and it goes on
    assert drawn_heat(page, why.image[0][0, 2]) <= 6
    page.click(PLAY)
    page.clock.run_for(4000)
    page.hover(token(1))
    assert frame_of(page) == 4
    page.click(token(1))
    assert frame_of(page) == 2


def test_after_the_end_words_move_it_again(open_report: Open) -> None:
    page = open_report(moving_square(4, 4))
    stop_clock(page)
    page.locator(SLIDER).fill("1")
    page.click(PLAY)
    page.clock.run_for(4000)
    assert frame_of(page) == 3
    page.hover(token(1))
    assert frame_of(page) == 1


def test_moving_the_slider_stops_the_video(open_report: Open) -> None:
    page = open_report(moving_square())
    stop_clock(page)
    page.click(PLAY)
    page.locator(SLIDER).fill("8")
    page.clock.run_for(4000)
    assert frame_of(page) == 8
    assert page.locator(PLAY).get_attribute("aria-label") == "Play video 1"


def test_readers_who_ask_for_less_motion_get_a_frame_a_second(open_report: Open) -> None:
    page = open_report(moving_square(), reduced_motion="reduce")
    stop_clock(page)
    page.click(PLAY)
    page.clock.run_for(999)
    assert frame_of(page) == 0
    page.clock.run_for(1)
    assert frame_of(page) == 1
    page.clock.run_for(1000)
    assert frame_of(page) == 2


def test_keys_play_and_step(open_report: Open) -> None:
    page = open_report(moving_square())
    stop_clock(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "play"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert frame_of(page) == 1
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    assert frame_of(page) == 11
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert frame_of(page) == 0
    page.keyboard.press("Space")
    page.clock.run_for(800)
    assert frame_of(page) == 2
    page.keyboard.press("Space")
    page.clock.run_for(800)
    assert frame_of(page) == 2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.evaluate("document.activeElement.ariaLabel") == "Frame of video 1"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert frame_of(page) == 4
    page.keyboard.press("Space")
    page.clock.run_for(400)
    assert frame_of(page) == 5
    page.keyboard.press("Space")
    page.clock.run_for(4000)
    assert frame_of(page) == 5
    assert marked(page, "active") == marked(page, "pinned") == []  # no word has moved
    assert page.evaluate("scrollY") == 0


def test_several_videos_have_their_own_time(open_report: Open) -> None:
    why = moving_square(6, 6)
    still = np.full((1, 60, 120, 3), 90, np.uint8)
    maps = why.image[0]
    both = replace(
        why,
        image=(maps, torch.zeros(len(why), 1, 3, 6), maps[:, :4].flip(1) / 2),
        pictures=(why.pictures[0], still, why.pictures[0][:4]),
        picture_sizes=((60, 120),) * 3,
        extents=(WHOLE_IMAGE,) * 3,
    )
    page = open_report(both)
    assert page.locator("figcaption").all_inner_texts() == ["video 1", "image 2", "video 3"]
    assert page.locator(SLIDER).evaluate_all("all => all.map(s => s.ariaLabel)") == [
        "Frame of video 1",
        "Frame of video 3",
    ]
    page.click(token(1))
    assert page.locator(CLOCK).all_inner_texts() == ["2 / 6", "3 / 4"]
    heights = page.locator(".strip .best").evaluate_all("all => all.map(b => b.offsetHeight)")
    assert abs(heights[1] / heights[0] - 0.5) < 0.05  # one scale for both
    page.locator(SLIDER).first.fill("5")
    page.hover(token(0))
    assert page.locator(CLOCK).all_inner_texts() == ["6 / 6", "4 / 4"]  # only the one that was moved is held


# ---- several pictures ------------------------------------------------------------------------------


def most(page: Page) -> list[int]:
    """The pictures that are outlined; their captions say so, and no others."""
    said = [text.endswith("strongest") for text in page.locator("figcaption").all_inner_texts()]
    drawn = page.locator(".stack").evaluate_all("all => all.map(s => getComputedStyle(s).outlineStyle !== 'none')")
    assert said == drawn
    return [k for k, one in enumerate(drawn) if one]


def test_of_three_images_the_one_with_the_peak_is_outlined(open_report: Open) -> None:
    page = open_report(side_by_side((192, 256), (256, 192), (160, 320), brightest=(2, 0, None, 1)))
    assert page.locator("figcaption").all_inner_texts() == ["image 1", "image 2", "image 3"]
    assert most(page) == []
    for k, expected in enumerate([[2], [0], [], [1]]):
        page.hover(token(k))
        assert most(page) == expected
    page.click(token(0))
    rest_pointer(page)
    assert most(page) == [2]
    assert page.inner_text("#strongest-key") == "of several pictures the one where the map of the word is highest"


def test_one_picture_needs_no_caption(open_report: Open) -> None:
    page = open_report(synthetic())
    page.hover(token(0))
    assert page.locator("figcaption, .strongest, .player").count() == 0
    assert not page.locator("#strongest-key").is_visible() and not page.locator("#bars-key").is_visible()


@pytest.mark.parametrize(("width", "count"), [(1200, 3), (1200, 7), (900, 2), (380, 3), (380, 7)])
def test_pictures_stand_in_rows_and_the_outlined_one_is_in_sight(open_report: Open, width: int, count: int) -> None:
    sizes = [(192, 256), (256, 192), (160, 320), (192, 192), (480, 96), (96, 480), (64, 64)][:count]
    page = open_report(side_by_side(*sizes, brightest=tuple(range(count))), viewport={"width": width, "height": 800})
    boxes = page.locator(".stack").evaluate_all(
        "all => all.map(s => (b => [b.left, b.top, b.right, b.bottom])(s.getBoundingClientRect()))"
    )
    for (height, own), (left, top, right, bottom) in zip(sizes, boxes, strict=True):
        assert abs((right - left) / (bottom - top) - own / height) < 0.1 * own / height
        assert left >= 3 and right <= width - 3  # room for the outline
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]  # side by side or below
    assert boxes[0][1] == boxes[1][1]  # two at least fit beside each other
    for k in range(count):
        page.locator(token(k)).dispatch_event("click")
        inside = page.evaluate(
            """k => {
                const [picture, room] = [document.querySelectorAll(".stack")[k], document.getElementById("pictures")]
                    .map((e) => e.getBoundingClientRect());
                return picture.top >= room.top && (picture.bottom <= room.bottom + 1 || picture.height > room.height - 40);
            }""",
            k,
        )
        assert inside and most(page) == [k]


@pytest.mark.parametrize("viewport", [in_browser.DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_video_with_a_thousand_words_fits(open_report: Open, viewport: dict[str, int]) -> None:
    page = open_report(moving_square(64, 32, "word " * 500 + "end"), viewport=viewport)
    assert page.locator(".token").count() > 500
    page.click(token(40))
    inner, client = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner <= client
    assert frame_of(page) == 2 * (40 % 32)
    timeline, panel = (page.locator(name).bounding_box() for name in (".timeline", "#panel"))
    assert timeline and panel
    assert timeline["width"] > 200 and timeline["y"] + timeline["height"] <= panel["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_bars_and_the_frame_on_the_timeline_stand_out(open_report: Open, scheme: str) -> None:
    """WCAG AA for what is not text: 3 to 1."""
    page = open_report(moving_square(), color_scheme=scheme)
    page.click(token(1))
    color = "([name, which]) => getComputedStyle(document.querySelector(name))[which]"
    ground = in_browser._luminance(page.evaluate(color, [".timeline", "backgroundColor"]))
    for name, which in [(".strip i", "backgroundColor"), (".strip .best", "backgroundColor"), (PLAY, "color")]:
        ink = in_browser._luminance(page.evaluate(color, [name, which]))
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 3, name


# ---- the file --------------------------------------------------------------------------------------


def test_frames_are_small_and_so_is_the_page(tmp_path: Path) -> None:
    why = synthetic("word " * 100)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (16, 24, 32, 3), dtype=np.uint8)
    pictures = np.stack([np.asarray(Image.fromarray(f).resize((1024, 768), Image.Resampling.BICUBIC)) for f in coarse])
    why = replace(why, image=(torch.rand(len(why), 8, 16, 16),), pictures=(pictures,), picture_sizes=((768, 1024),))
    path = write_html([why], tmp_path / "video.html")
    (picture,) = payload_of(path.read_text(encoding="utf-8"))["pictures"]
    assert (picture["width"], picture["height"], len(picture["frames"])) == (1024, 768, 16)
    for uri in picture["frames"]:
        kind, content = uri.split(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as frame:
            assert frame.size == (512, 384)
    maps_bytes = len(why) * 8 * 16 * 16 * 4 / 3
    assert path.stat().st_size < maps_bytes + 16 * 40_000 + 300_000
