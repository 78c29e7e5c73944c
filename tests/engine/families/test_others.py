"""Aya Vision, Command A Vision, Ovis2, DeepSeek-VL, Janus, PerceptionLM, FastVLM, GOT-OCR2."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import fastattr
from fastattr.adapters.families import family_of
from fastattr.adapters.families.tiles import largest_held_shape, least_enlarged_shape, nearest_shape
from tests.engine.families.other_ways import prove_batch_of_attributions
from tests.engine.families.proof import Row, embeddings_at_image_tokens, prove, wrap
from tests.engine.families.tiny_llava import captured
from tests.engine.families.tiny_others import (
    aya_vision,
    cohere2_vision,
    deepseek_vl,
    deepseek_vl_hybrid,
    fast_vlm,
    got_ocr2,
    got_ocr2_cut,
    janus,
    ovis2,
    perception_lm,
)
from tests.engine.family_models import ANSWER, PROMPT, picture

TIMM = "the vision tower: it needs timm"
TORCHVISION = "the image processor: it needs torchvision"
CHAT = "the processor: it has no chat"

ROWS = [
    Row("aya_vision", aya_vision, [(4, 4)] * 7, (1, 8, 12)),
    Row("cohere2_vision", cohere2_vision, [(4, 4)] * 5, (1, 8, 8), stood_in=TORCHVISION),
    Row("ovis2", ovis2, [(4, 4)] * 3, (1, 8, 4), scales=(1.0,)),
    Row("deepseek_vl", deepseek_vl, [(4, 4)], (1, 3, 4)),
    Row("deepseek_vl_hybrid", deepseek_vl_hybrid, [(4, 4)], (1, 3, 4), scales=(1.0,)),
    Row("janus", janus, [(4, 4)], (1, 3, 4)),
    Row("perception_lm", perception_lm, [(4, 4)] * 5, (1, 8, 8), (1.0,), video=True, stood_in=f"{TIMM}; {TORCHVISION}"),
    Row("fast_vlm", fast_vlm, [(4, 4)], (1, 4, 4), scales=(1.0,), stood_in=TIMM),
    Row("got_ocr2", got_ocr2, [(4, 4)], (1, 4, 4), scales=(1.0,), stood_in=CHAT),
    Row("got_ocr2", got_ocr2_cut, [(4, 4)] * 7, (1, 8, 12), scales=(1.0,), stood_in=CHAT),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_rows_of_a_batch_are_as_alone(row: Row) -> None:
    """Two pictures of one form, and one of another."""
    prove_batch_of_attributions(wrap(row), [picture(67, 91), picture(67, 91, 5), picture(101, 58)])


# --- how many tiles ---------------------------------------------------------------------------------------


def transformers_functions(module: str, *names: str) -> dict[str, Any]:
    """Functions and methods of a module of transformers that cannot be imported without torchvision, by name."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    wanted = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in wanted) == sorted(names)
    held: dict[str, Any] = {"np": np, "math": math, "lru_cache": lru_cache, "reduce": __import__("functools").reduce}
    exec(compile(ast.Module(wanted, []), spec.origin, "exec"), held)
    return {name: held[name] for name in names}


def sizes(seed: int) -> list[tuple[int, int]]:
    """Of pictures, some square and some whole tiles large, where equals must be told apart."""
    draws = np.random.default_rng(seed)
    drawn = np.exp(draws.uniform(3, 8, (120, 2))).astype(int).tolist()
    edges = np.exp(draws.uniform(3, 8, 20)).astype(int).tolist()
    even = (336 * draws.integers(1, 7, (40, 2))).tolist()
    return [(height, width) for height, width in drawn + even] + [(edge, edge) for edge in edges]


def check_shapes(ours: Callable[[tuple[int, int]], tuple[int, int]], theirs: Callable[[int, int], Any]) -> None:
    """`theirs` takes height and width and gives columns and rows."""
    seen = set()
    for seed in range(2):
        for height, width in sizes(seed):
            columns, rows = theirs(height, width)
            assert ours((height, width)) == (rows, columns), f"{height} x {width}"
            seen.add((rows, columns))
    assert len(seen) > 4 and any(rows > columns for rows, columns in seen) and any(r < c for r, c in seen)


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (4, 9)])
def test_nearest_shape_is_that_of_transformers(fewest: int, most: int) -> None:
    check_shapes(
        lambda size: nearest_shape(size, (336, 336), fewest, most),
        lambda height, width: get_optimal_tiled_canvas((height, width), (336, 336), fewest, most),
    )


@pytest.mark.parametrize("most", [6, 12])
def test_least_enlarged_shape_is_that_of_transformers(most: int) -> None:
    theirs = transformers_functions(
        "transformers.models.cohere2_vision.image_processing_cohere2_vision",
        "get_all_supported_aspect_ratios",
        "get_optimal_tiled_canvas",
    )["get_optimal_tiled_canvas"]
    check_shapes(
        lambda size: least_enlarged_shape(size, (336, 336), most),
        lambda height, width: theirs((height, width), (336, 336), 1, most),
    )


@pytest.mark.parametrize("most", [4, 9, 36])
def test_largest_held_shape_is_that_of_transformers(most: int) -> None:
    methods = transformers_functions(
        "transformers.models.perception_lm.image_processing_perception_lm",
        "_factors",
        "_find_supported_aspect_ratios",
        "_get_image_height_width",
        "_fit_image_to_canvas",
        "_find_closest_aspect_ratio",
    )
    their_class = type("Images", (), {**methods, "_factors": staticmethod(methods["_factors"]), "max_num_tiles": most})
    images: Any = their_class()

    def theirs(height: int, width: int) -> Any:
        held = images._fit_image_to_canvas(width, height, 336)
        return held or images._find_closest_aspect_ratio(width, height, 336)

    check_shapes(lambda size: largest_held_shape(size, 336, most), theirs)


# --- what is particular -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[2]], ids=lambda row: row.make.__name__)
def test_pictures_of_other_forms_in_one_prompt_are_cut_apart(row: Row) -> None:
    """A wide, a tall and a small one together have the maps each has alone."""
    model = wrap(row)
    pictures = [picture(60, 200), picture(180, 64), picture(32, 32)]
    alone = [fastattr.attribute(model, each, PROMPT, ANSWER, scales=(1.0,)).image[0].shape for each in pictures]
    together = fastattr.attribute(model, pictures, PROMPT, ANSWER, scales=(1.0,)).image
    assert [each.shape for each in together] == alone
    assert len(set(alone)) == 3 and alone[2][1:] == (1, 4, 4)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[6]], ids=lambda row: row.make.__name__)
def test_capture_without_the_picture_says_to_pass_it(row: Row) -> None:
    model = wrap(row)
    states, out = captured(model, [picture()])
    with pytest.raises(
        fastattr.TokenLayoutError, match=r"cuts pictures into tiles by their size.*pass the pictures, image="
    ):
        states.attribute(out)
    assert states.attribute(out, image=picture()).grids[0][0] == row.grid


def test_ovis_needs_no_picture() -> None:
    """It writes rows and columns into the text."""
    model = wrap(ROWS[2])
    pictures = [picture(60, 200), picture(67, 91)]
    states, out = captured(model, pictures)
    without, given = states.attribute(out), states.attribute(out, image=pictures)
    for mine, theirs in zip(without.image, given.image, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(67, 91), (60, 200), (180, 64), (32, 32), (300, 300)])
@pytest.mark.parametrize("covering", [True, False])
def test_ovis_cuts_as_its_image_processor_says(size: tuple[int, int], covering: bool) -> None:
    held = ovis2(use_covering_area_grid=covering)
    model = fastattr.wrap(held.hf_model, held.processor)
    ((rows, columns),) = held.processor.image_processor(picture(*size), return_tensors="pt")["grids"].tolist()
    _, group = embeddings_at_image_tokens(model, picture(*size))
    if (rows, columns) == (1, 1):
        assert (group.grid, group.views) == ((1, 4, 4), ())
    else:
        whole, *tiles = group.views
        assert whole.box == (0, 0, 1, 1)
        assert [tile.box[:2] for tile in tiles] == [
            (c / columns, r / rows) for r in range(rows) for c in range(columns)
        ]


def test_tiles_that_came_are_held_against_the_picture() -> None:
    """Another picture given to a captured answer than the one it was made for."""
    model = wrap(ROWS[0])
    states, out = captured(model, [picture(67, 91)])
    with pytest.raises(fastattr.TokenLayoutError, match=r"7 tiles, but Aya Vision makes \[4\]"):
        states.attribute(out, image=picture(180, 64))


@pytest.mark.parametrize("row", ROWS[3:6], ids=lambda row: row.make.__name__)
@pytest.mark.parametrize("size", [(32, 128), (128, 32)])
def test_padding_is_no_part_of_the_map(row: Row, size: tuple[int, int]) -> None:
    """A picture four times as wide as high in 32 x 32 pixels is 14 of them high at least: rows of tokens 1 and 2."""
    model = wrap(row)
    plain = np.asarray(picture(*size)) // 2
    before, group = embeddings_at_image_tokens(model, Image.fromarray(plain))
    (view,) = group.views
    assert view.grid == (4, 4) and group.extent == (0, 0, 1, 1)
    assert group.grid in ((1, 1, 4), (1, 2, 4), (1, 4, 1), (1, 4, 2))
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(127 - plain))
    moved = (after - before).norm(dim=1).view(4, 4)
    moved = moved if size[0] < size[1] else moved.T
    assert moved[1:3].min() > 2 * moved[[0, 3]].max()


def test_a_slim_picture_is_shown_wider_than_it_is() -> None:
    """128 x 10 in 32 x 32 pixels would be 2.5 wide; the processor shows it 14 wide, from pixel 9 to 23."""
    model = wrap(ROWS[3])
    _, group = embeddings_at_image_tokens(model, picture(128, 10))
    (view,) = group.views
    assert view.box == pytest.approx((-9 / 14, 0, 23 / 14, 1))


def test_tokens_that_make_no_square_are_refused() -> None:
    held = fast_vlm()
    held.processor.patch_size = 16  # too large: 2 x 2 tokens are written for 4 x 4 that the tower makes
    held.processor.num_additional_image_tokens = 1
    model = fastattr.wrap(held.hf_model, held.processor)
    with pytest.raises(fastattr.TokenLayoutError, match="holds 5 image tokens, expected the square of a number"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("blip", "cross-attention layers"),
        ("blip-2", "a Q-Former reads the image into learned queries.*its attention over the patches would be needed"),
        ("instructblip", "a Q-Former reads the image into learned queries"),
        ("instructblipvideo", "a Q-Former reads the image into learned queries"),
        ("aria", "its projector reads the image into learned queries"),
        ("florence2", "its cross-attention would be needed"),
        ("git", "no placeholders in input_ids.*attribute_states"),
        ("chameleon", "its output head forbids.*would be needed"),
        ("emu3", "register_adapter"),
        ("fuyu", "bare patches.*register_adapter"),
    ],
)
def test_what_cannot_be_explained_says_why(model_type: str, reason: str) -> None:
    with pytest.raises(fastattr.UnsupportedModelError, match=f"{model_type}.*cannot be explained.*{reason}"):
        family_of(SimpleNamespace(model_type=model_type, vision_config=SimpleNamespace()))
