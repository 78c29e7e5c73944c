"""The report as files: what is in them, that they are whole, and that no text in them becomes markup."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastattr.config import METHODS
from fastattr.demo.scenes import describe_in_detail, make_scene
from fastattr.errors import InputError, SaveError
from fastattr.report import notebook_html, overlay, write_html, write_png
from fastattr.report.picture import MAX_CELLS, MAX_ROWS, MAX_STEPS, color_table
from fastattr.types import WHOLE_IMAGE, Attribution, AttributionConfig, Box

WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s")  # every character belongs to one
HOSTILE = "A <script>alert(1)</script> & </script><!-- \"quoted\" [[payload]]\u2028 and\u2029 'so' on."


def synthetic(
    response: str | None = None,
    *,
    prompt: str | None = None,
    seed: int = 0,
    config: AttributionConfig | None = None,
    n_images: int = 1,
    frames: int = 1,
    grid: tuple[int, int] = (12, 12),
    extent: Box = WHOLE_IMAGE,
) -> Attribution:
    """A seeded attribution of a response about a scene, with random scores of the right shapes."""
    config = (config or AttributionConfig()).resolve((1.0, 1.5, 2.0), vocab=1000)
    scene = make_scene(seed)
    exchange = describe_in_detail(scene)
    response = exchange.response if response is None else response
    prompt = exchange.prompt if prompt is None else prompt
    spans = tuple(match.span() for match in WORD.finditer(response))
    tokens = tuple(response[start:stop] for start, stop in spans)
    prompt_tokens = tuple(WORD.findall(prompt))
    n, n_context = len(tokens), len(prompt_tokens) + len(tokens)
    draw = torch.Generator().manual_seed(seed)
    before = torch.arange(n_context) < (len(prompt_tokens) + torch.arange(n))[:, None]
    context = torch.rand(n, n_context, generator=draw) * before
    picture = np.asarray(scene.image)
    return Attribution(
        response=response,
        tokens=tokens,
        token_ids=tuple(range(n)),
        spans=spans,
        context_tokens=prompt_tokens + tokens,
        image=tuple(torch.rand(n, frames, *grid, generator=draw) for _ in range(n_images)),
        context=context,
        relevance=context.sqrt() if config.method == "arc" else None,
        evidence=torch.randn(n, generator=draw) * 2,
        log_prob=-torch.rand(n, generator=draw),
        agreement=torch.rand(n, len(config.known_scales), generator=draw),
        raw_range=torch.rand(n, 2, generator=draw),
        residual=torch.rand(n, generator=draw),
        degenerate=torch.zeros(n, dtype=torch.bool),
        config=config,
        grids=tuple(((frames, *grid),) * n_images for _ in config.known_scales),
        extents=(extent,) * n_images,
        pictures=(np.stack([np.roll(picture, 8 * f, axis=1) for f in range(frames)]),) * n_images,
        picture_sizes=(picture.shape[:2],) * n_images,
        prompt=prompt,
        model="shapes",
        versions=(("fastattr", "0.1.0"),),
    )


def scene_as_json(seed: int = 7, *, frames: int = 1, n_images: int = 1) -> Attribution:
    """The objects of a scene as a model would list them; each value's tokens look at its object."""
    scene = make_scene(seed, 192, 256, n_objects=3)
    objects = [{"name": o.name, "size": o.size, "center": [round(100 * c) for c in o.center]} for o in scene.objects]
    answer = {"background": scene.background, "objects": objects, "title": None, "framed": True, "note": ""}
    why = synthetic("```json\n" + json.dumps(answer, indent=2) + "\n```", prompt="List the objects as JSON.", seed=seed)
    rows, columns = torch.meshgrid(torch.arange(18), torch.arange(24), indexing="ij")
    maps = torch.full((len(why), frames, 18, 24), 0.02)
    evidence = torch.full((len(why),), 0.1)
    for k, o in enumerate(scene.objects):
        begins, ends = (
            list(re.finditer(pattern, why.response))[k].start() for pattern in (r"\{\s*\"name", r"\}(?=,?\s+[{\]])")
        )
        x, y = o.center[0] * 24 - 0.5, o.center[1] * 18 - 0.5
        heat = (-((columns - x) ** 2 + (rows - y) ** 2) / (2 * (o.radius * 18) ** 2)).exp()
        for target, (start, stop) in enumerate(why.spans):
            if start >= begins and stop <= ends and re.search(r"\w", why.tokens[target]):
                maps[target, k % frames] = heat * (0.5 + 0.5 * ((target * 7) % 5) / 4)
                evidence[target] = ((target * 13) % 7 - 2) * 0.8
    picture = np.asarray(scene.image)
    return replace(
        why,
        image=(maps,) * n_images,
        evidence=evidence,
        grids=tuple(((frames, 18, 24),) * n_images for _ in why.config.known_scales),
        extents=(WHOLE_IMAGE,) * n_images,
        pictures=(np.stack([picture] * frames),) * n_images,
        picture_sizes=((384, 512),) * n_images,
    )


def payload_of(page: str) -> dict:
    (text,) = re.findall(r'<script id="payload" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


def shown(passage: dict) -> str:
    return "".join(before + text for before, text, is_text in passage["pieces"] if is_text or before) + passage["tail"]


# --- the page ---------------------------------------------------------------------------------------


def test_page_holds_the_maps_as_bytes(tmp_path: Path) -> None:
    why = synthetic(n_images=2)
    page = write_html([why], tmp_path / "x.html").read_text(encoding="utf-8")
    (view,) = payload_of(page)["views"]
    for heat, packed in zip(why.image, view["maps"], strict=True):
        assert packed["grid"] == [1, 12, 12]
        levels = bytes_of(packed["levels"]).reshape(len(why), 1, 12, 12)
        np.testing.assert_allclose(levels / 255, heat.numpy(), atol=0.5 / 255 + 1e-6)
    assert why.relevance is not None
    tints = bytes_of(view["tints"]).reshape(why.relevance.shape)
    np.testing.assert_allclose(tints / 255, why.relevance.numpy(), atol=0.5 / 255 + 1e-6)
    assert view["tint"] == "relevance"


def test_words_are_tinted_by_context_where_there_is_no_relevance(tmp_path: Path) -> None:
    why = synthetic(config=AttributionConfig(method="tam", scales=(1.0,)))
    (view,) = payload_of(write_html([why], tmp_path / "x.html").read_text())["views"]
    assert view["tint"] == "context"
    np.testing.assert_allclose(bytes_of(view["tints"]) / 255, why.context.numpy().ravel(), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("text", [HOSTILE, "[[style]] [[script]] [[digest]]", "\ud83d lone surrogate", "شكل أحمر"])
def test_text_never_becomes_markup(tmp_path: Path, text: str) -> None:
    harmless = write_html([synthetic("a word")], tmp_path / "plain.html").read_text(encoding="utf-8")
    why = replace(synthetic(text, prompt=text), model=text, notes=(text,), versions=((text, text),))
    page = write_html([why], tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("<script") == harmless.count("<script") == 2
    assert page.count("</script") == harmless.count("</script") == 2
    assert "\u2028" not in page and "\u2029" not in page
    payload = payload_of(page)
    assert shown(payload["response"]) == shown(payload["prompt"]) == text
    assert payload["views"][0]["notes"] == [text]


def test_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = write_html([synthetic(n_images=2)], tmp_path / "x.html").read_text(encoding="utf-8")
    fixed = page.replace(re.findall(r'application/json">(.*?)</script>', page, re.DOTALL)[0], "")
    assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|\bfetch\(|XMLHttpRequest", fixed)
    assert re.findall(r'(?:src|href)\s*=\s*"(.*?)"', fixed) == ["data:,"]
    assert "default-src 'none'" in fixed
    pictures = payload_of(page)["pictures"]
    assert all(uri.startswith("data:image/") for picture in pictures for uri in picture["frames"])


def test_small_pictures_are_exact_and_large_ones_compressed(tmp_path: Path) -> None:
    why = synthetic()
    large = np.zeros((1, 40, 600, 3), np.uint8)
    (small_page, large_page) = (
        payload_of(write_html([replace(why, pictures=(p,))], tmp_path / "x.html").read_text())["pictures"][0]
        for p in (why.pictures[0], large)
    )
    kind, content = small_page["frames"][0].split(",")
    assert kind == "data:image/png;base64"
    (tmp_path / "inside.png").write_bytes(base64.b64decode(content))
    with Image.open(tmp_path / "inside.png") as inside:
        np.testing.assert_array_equal(np.asarray(inside), why.pictures[0][0])
    assert large_page["frames"][0].startswith("data:image/jpeg;base64,")
    assert (large_page["width"], large_page["height"]) == (600, 40)


def test_without_pictures_the_page_keeps_the_grids_shape(tmp_path: Path) -> None:
    why = replace(synthetic(grid=(4, 8)), pictures=())
    (picture,) = payload_of(write_html([why], tmp_path / "x.html").read_text())["pictures"]
    assert picture["frames"] == []
    assert picture["width"] == 2 * picture["height"]


def test_tokens_that_share_a_character_or_have_no_text_show_it_once(tmp_path: Path) -> None:
    why = replace(
        synthetic("one two three four"),
        response="Ok \N{GRINNING FACE}\n\nend!",
        tokens=("Ok", " \N{GRINNING FACE}", " \N{GRINNING FACE}", "<eos>"),
        spans=((0, 2), (2, 4), (2, 4), (9, 9)),
    )
    response = payload_of(write_html([why], tmp_path / "x.html").read_text())["response"]
    assert response == {
        "pieces": [["", "Ok", True], [" ", "\N{GRINNING FACE}", True], ["", "·", False], ["\n\nend", "<eos>", False]],
        "tail": "!",
    }


def test_prompt_tokens_decoded_without_their_spaces_are_found_in_the_prompt(tmp_path: Path) -> None:
    why = synthetic("one two")
    why = replace(why, prompt="Où  est le chat?", context_tokens=("O", "\ufffd", "est", "le", "chat", "?", *why.tokens))
    prompt = payload_of(write_html([why], tmp_path / "x.html").read_text())["prompt"]
    assert [text for _, text, is_text in prompt["pieces"] if is_text] == ["O", "est", "le", "chat", "?"]
    assert shown(prompt) == "Où  est le chat?"


def test_numbers_that_are_none_become_null(tmp_path: Path) -> None:
    why = synthetic("one two")
    why = replace(why, log_prob=torch.tensor([-math.inf, -1.0]), evidence=torch.tensor([math.nan, 0.25]))
    (view,) = payload_of(write_html([why], tmp_path / "x.html").read_text())["views"]
    assert view["logProb"] == [None, -1.0]
    assert view["evidence"] == [None, 0.25]
    why = replace(why, evidence=torch.tensor([-math.inf, 0.25]))
    (view,) = payload_of(write_html([why], tmp_path / "x.html").read_text())["views"]
    assert view["low"]["words"] == [{"text": "one", "targets": [0], "evidence": None}]


def test_the_fields_of_an_answer_that_is_json_refer_to_its_tokens(tmp_path: Path) -> None:
    why = scene_as_json(frames=2, n_images=2)
    payload = payload_of(write_html([why], tmp_path / "x.html").read_text())
    fields = why.fields()
    assert [stem + step for stem, step, *_ in payload["fields"]] == [field.name for field in fields]
    assert ["objects[1]", ".size"] in [row[:2] for row in payload["fields"]]
    for row, field, boxes in zip(payload["fields"], fields, payload["views"][0]["boxes"], strict=True):
        _, _, value, is_text, complete, targets = row
        assert (json.loads(value) if not is_text else value) == field.value
        assert complete
        if field.value == "":
            assert targets == boxes == []
            continue
        assert field.selection is not None
        assert "".join(why.tokens[target] for target in targets).strip() == why.response[slice(*field.span)]
        for maps, box, (*shares, frame) in zip(field.selection.maps, field.boxes, boxes, strict=True):
            assert box is not None
            np.testing.assert_allclose(np.array(shares) * [512, 384, 512, 384], box, atol=0.05)
            assert maps[frame].max() == maps.max()


@pytest.mark.parametrize("response", ["A red circle [1].", "3", '"red"', "{'a': 1}", "{}"])
def test_other_answers_have_no_fields(tmp_path: Path, response: str) -> None:
    payload = payload_of(write_html([synthetic(response)], tmp_path / "x.html").read_text())
    assert payload["fields"] == payload["views"][0]["boxes"] == []


def test_long_keys_and_values_do_not_swell_the_page(tmp_path: Path) -> None:
    why = replace(synthetic("word"), response=json.dumps({"k" * 20_000: ["v"] * 300, "b": "w" * 20_000}))
    payload = payload_of(write_html([why], tmp_path / "x.html").read_text())
    assert len(payload["fields"]) == 301
    assert len(json.dumps(payload["fields"])) < 301 * 200


def test_the_switch_names_what_differs(tmp_path: Path) -> None:
    configs = [
        AttributionConfig(filter=None),
        AttributionConfig(method="tam", scales=(1.0,)),
        AttributionConfig(filter=False, scale_mean="geometric"),
        AttributionConfig(),
        METHODS["best"],
        AttributionConfig(scales=(1.0,), top_k=20),
    ]
    page = write_html([synthetic(config=config) for config in configs], tmp_path / "x.html").read_text()
    labels = [view["label"] for view in payload_of(page)["views"]]
    assert labels == [
        "arc, filter=None",
        "tam",
        "arc, scale_mean=geometric, filter=False",
        "arc",
        "best",
        "arc@1, top_k=20",
    ]


def test_the_switch_tells_equal_names_apart(tmp_path: Path) -> None:
    why = synthetic(config=AttributionConfig(backend="torch"))
    others = [replace(why, config=replace(why.config, backend="triton")), synthetic(config=METHODS["tam"])]
    page = write_html([why, *others], tmp_path / "x.html").read_text()
    assert [view["label"] for view in payload_of(page)["views"]] == ["arc, backend torch", "arc, backend triton", "tam"]


def test_attributions_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    why = synthetic("a red circle")
    with pytest.raises(InputError, match=r"different responses, 'a red circle' and 'a blue ring'"):
        write_html([why, synthetic("a blue ring")], tmp_path / "x.html")
    with pytest.raises(InputError, match="different questions"):
        write_html([why, synthetic("a red circle", n_images=2)], tmp_path / "x.html")
    with pytest.raises(InputError, match="expected at least one"):
        write_html([], tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_do_not_pair_with_maps_are_refused(tmp_path: Path) -> None:
    why = synthetic(n_images=2)
    for write in (lambda a, p: write_html([a], p), write_png):
        with pytest.raises(InputError, match="1 pictures for 2 maps"):
            write(replace(why, pictures=why.pictures[:1]), tmp_path / "x")


def test_notebook_cell_holds_the_whole_page_closed_off(tmp_path: Path) -> None:
    why = synthetic(HOSTILE)
    cell = notebook_html([why])
    (inside,) = re.fullmatch(r'<iframe [^>]*sandbox="allow-scripts"[^>]* srcdoc="([^"]*)"></iframe>', cell).groups()
    assert html.unescape(inside) == write_html([why], tmp_path / "x.html").read_text(encoding="utf-8")
    assert why._repr_html_() == cell


# --- files whole or not at all ----------------------------------------------------------------------

WRITERS = [lambda why, path: write_html([why], path), write_png]


@pytest.mark.parametrize("write", WRITERS)
def test_writes_return_the_path_and_replace_what_was_there(tmp_path: Path, write) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    assert write(synthetic("one"), str(path)) == path
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", ["folder", "missing/x", "file/x"])
def test_a_path_that_cannot_be_written_is_a_clear_error(tmp_path: Path, write, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SaveError, match=f"{place}' cannot be written: .*choose a folder that exists and is writable"):
        write(synthetic("one"), tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("write", WRITERS)
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, destination: Path) -> None:
        assert Path(source).parent == Path(destination).parent
        raise KeyboardInterrupt

    path = tmp_path / "out"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(synthetic("one"), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- overlays ---------------------------------------------------------------------------------------


def blend(picture: float, level: int) -> np.ndarray:
    red, green, blue, alpha = color_table()[level].astype(float)
    return np.array([red, green, blue]) * alpha / 255 + picture * (1 - alpha / 255)


def test_color_table_is_clear_at_zero_and_ever_brighter() -> None:
    table = color_table()
    assert table.shape == (256, 4)
    assert table[0, 3] == 0
    assert (np.diff(table[:, 3].astype(int)) >= 0).all()
    luminance = table[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) >= -0.5).all() and luminance[-1] > luminance[0] + 100


def test_overlay_of_two_by_two_is_bilinear() -> None:
    # Four pixels across two cells: their centres lie at -0.25, 0.25, 0.75 and 1.25 cells, clamped to 0 and 1.
    heat = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    picture = np.full((4, 4, 3), 100, np.uint8)
    drawn = np.asarray(overlay(picture, heat, WHOLE_IMAGE), float)
    across, down = np.array([0, 0.25, 0.75, 1]), np.array([1, 0.75, 0.25, 0])
    expected = [[blend(100, round(255 * x * y)) for x in across] for y in down]
    np.testing.assert_allclose(drawn, expected, atol=1)
    np.testing.assert_array_equal(drawn[:, 0], 100)


def test_overlay_touches_only_its_extent() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    kept = picture.copy()
    drawn = np.asarray(overlay(picture, torch.ones(3, 3), (0.25, 0.5, 0.75, 1.0)))
    inside = np.zeros((20, 40), bool)
    inside[10:20, 10:30] = True
    np.testing.assert_array_equal(drawn[~inside], picture[~inside])
    np.testing.assert_allclose(drawn[10, 10], blend(picture[10, 10].astype(float), 255), atol=1)
    assert (drawn[inside] != picture[inside]).any(axis=1).all()
    np.testing.assert_array_equal(picture, kept)


def test_no_heat_leaves_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(overlay(picture, torch.zeros(2, 9), WHOLE_IMAGE)), picture)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_overlay_of_thin_pictures_and_grids(size: tuple[int, int]) -> None:
    drawn = overlay(np.zeros((*size, 3), np.uint8), torch.ones(1, 7), (0.999, 0.0, 1.0, 0.001))
    assert drawn.size == size[::-1]
    assert np.asarray(drawn).any()


@pytest.mark.parametrize(
    ("picture", "heat", "extent", "message"),
    [
        (np.zeros((4, 4), np.uint8), torch.zeros(2, 2), WHOLE_IMAGE, r"picture is uint8 of shape \(4, 4\)"),
        (np.zeros((4, 4, 3)), torch.zeros(2, 2), WHOLE_IMAGE, "picture is float64"),
        (np.zeros((4, 4, 3), np.uint8), torch.zeros(1, 2, 2), WHOLE_IMAGE, r"heat has shape \(1, 2, 2\)"),
        (np.zeros((4, 4, 3), np.uint8), torch.zeros(2, 2), (0.5, 0.0, 0.5, 1.0), "extent spans 0.5 to 0.5"),
    ],
)
def test_overlay_refuses_what_it_cannot_draw(picture, heat, extent, message: str) -> None:
    with pytest.raises(InputError, match=message):
        overlay(picture, heat, extent)


# --- the sheet --------------------------------------------------------------------------------------


def sheet_of(why: Attribution, folder: Path) -> np.ndarray:
    with Image.open(write_png(why, folder / "sheet.png")) as sheet:
        return np.asarray(sheet.convert("RGB"))


def test_one_token_with_one_image(tmp_path: Path) -> None:
    why = replace(synthetic("circle"), image=(torch.zeros(1, 1, 3, 3),))
    sheet = sheet_of(why, tmp_path)
    assert sheet.shape == (16 + 180 + 26 + 16, 16 + 180 + 16, 3)
    picture = Image.fromarray(why.pictures[0][0]).resize((180, 180))
    np.testing.assert_array_equal(sheet[16:196, 16:196], np.asarray(picture))
    assert (sheet[196:222] < 100).any()  # the word below it


def test_a_second_image_stands_beside_the_first(tmp_path: Path) -> None:
    one, two = (sheet_of(synthetic("circle", n_images=n), tmp_path) for n in (1, 2))
    assert two.shape[1] == one.shape[1] + 180 + 12
    assert two.shape[0] == one.shape[0]


def plain_video(n_frames: int, heat: torch.Tensor) -> Attribution:
    """`heat [target t h w]` over frames of one grey each, 10 levels brighter every time; a word a target."""
    why = synthetic("x" + " x" * (len(heat) - 1))
    pictures = np.stack([np.full((28, 28, 3), 10 * (f + 1), np.uint8) for f in range(n_frames)])
    return replace(why, image=(heat,), pictures=(pictures,), picture_sizes=((28, 28),))


def strip_of(sheet: np.ndarray, n: int, row: int = 0) -> list[int]:
    """The grey at the middle of each of `n` frames of a row, 112 pixels wide and high, 4 apart, below a line of numbers."""
    y = 16 + 26 + row * (112 + 26 + 12) + 56
    return [int(sheet[y, 16 + k * 116 + 56].mean()) for k in range(n)]


def outlined(sheet: np.ndarray, n: int, row: int = 0) -> list[int]:
    """Which of `n` frames of a row have a line of ink on their left."""
    y = 16 + 26 + row * (112 + 26 + 12) + 56
    return [k for k in range(n) if sheet[y, 16 + k * 116 - 1].max() < 60]


def test_a_video_is_a_strip_of_its_frames_one_row_a_word(tmp_path: Path) -> None:
    heat = torch.zeros(3, 4, 2, 2)
    heat[0, 2], heat[1, 0] = 0.001, 0.001  # too weak to be seen, and still the peak
    sheet = sheet_of(plain_video(4, heat), tmp_path)
    assert [strip_of(sheet, 4, row) for row in range(3)] == [[10, 20, 30, 40]] * 3
    assert [outlined(sheet, 4, row) for row in range(3)] == [[2], [0], []]  # a dark map peaks nowhere
    assert sheet.shape[0] == 16 + 26 + 3 * (112 + 26 + 12) - 12 + 2 * 26 + 16  # two lines of notes


def test_frames_of_a_strip_carry_the_map_of_their_step(tmp_path: Path) -> None:
    heat = torch.zeros(1, 3, 2, 2)
    heat[0, 1] = 1.0
    sheet = sheet_of(plain_video(5, heat), tmp_path)  # steps begin at the first, third and fifth frame
    shown = strip_of(sheet, 3)
    assert shown[0] == 10 and shown[2] == 50
    assert abs(shown[1] - blend(30, 255).mean()) <= 1
    assert outlined(sheet, 3) == [1]


@pytest.mark.parametrize(
    ("n_frames", "n_steps", "first_frames"),
    [
        (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (22, 22, [1, 4, 7, 10, 13, 16, 19, 22]),
        (9, 3, [1, 4, 7]),
        (2, 4, [1, 1, 2, 2]),
    ],
)
def test_a_strip_shows_at_most_eight_steps_evenly_chosen(
    tmp_path: Path, n_frames: int, n_steps: int, first_frames: list[int]
) -> None:
    sheet = sheet_of(plain_video(n_frames, torch.zeros(1, n_steps, 2, 2)), tmp_path)
    assert strip_of(sheet, len(first_frames)) == [10 * f for f in first_frames]
    assert MAX_STEPS == 8
    assert sheet.shape[1] >= 2 * 16 + len(first_frames) * 116 - 4


def test_the_sheet_says_what_of_a_video_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heat = torch.zeros(100, 22, 2, 2)
    heat[:, 1] = 1.0  # the second frame, which is not among the eight
    said: list[str] = []
    draw_text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, *rest: (said.append(text), draw_text(self, at, text, *rest))
    )
    sheet = sheet_of(plain_video(22, heat), tmp_path)
    assert said[:8] == [f"{f}/22" for f in (1, 4, 7, 10, 13, 16, 19, 22)]
    assert said.count("peak at 2/22") == MAX_ROWS == 40
    assert said[-3:] == [
        "video 1: 22 frames, 22 time steps, 8 of them evenly chosen",
        "outlined: where the map of the word peaks",
        "… and 60 more tokens (40 of 100 shown)",
    ]
    assert outlined(sheet, 8) == []


def test_a_video_beside_images_shares_its_rows(tmp_path: Path) -> None:
    why = plain_video(3, torch.zeros(2, 3, 2, 2))
    still = np.full((1, 28, 28, 3), 200, np.uint8)
    both = replace(
        why,
        image=(torch.zeros(2, 1, 3, 3), *why.image),
        pictures=(still, *why.pictures),
        extents=(WHOLE_IMAGE,) * 2,
    )
    sheet = sheet_of(both, tmp_path)
    y = 16 + 26 + 56
    assert [int(sheet[y, x].mean()) for x in (16 + 56, 16 + 112 + 12 + 56, 16 + 112 + 12 + 116 + 56)] == [200, 10, 20]


def test_long_responses_are_cut_and_say_so(tmp_path: Path) -> None:
    height = {
        n: sheet_of(synthetic(" ".join(["word"] * n)), tmp_path).shape[0] for n in (MAX_CELLS, MAX_CELLS + 1, 500)
    }
    rows = math.ceil(MAX_CELLS / 8)  # eight cells of 180 pixels and their gaps fit 1600
    assert height[MAX_CELLS] == 2 * 16 + rows * (180 + 26 + 12) - 12
    assert height[500] == height[MAX_CELLS + 1] == height[MAX_CELLS] + 26


@pytest.mark.parametrize("text", ["\n", "\t", "w" * 400, "\ud83d", "\N{GRINNING FACE}", "字", "a\x00b\r\nc"])
def test_any_token_text_can_be_drawn(tmp_path: Path, text: str) -> None:
    why = replace(synthetic("circle"), response=text, tokens=(text,), spans=((0, len(text)),))
    assert sheet_of(why, tmp_path).shape == (238, 212, 3)


@pytest.mark.parametrize(("n_images", "grid"), [(40, (2, 2)), (1, (1, 50)), (1, (50, 1))])
def test_many_images_and_thin_grids_without_pictures(tmp_path: Path, n_images: int, grid: tuple[int, int]) -> None:
    why = replace(synthetic("red circle", n_images=n_images, grid=grid), pictures=())
    sheet = sheet_of(why, tmp_path)
    assert max(sheet.shape) <= 1700
