"""Families that read large pictures in tiles: Idefics3, SmolVLM, InternVL, Llama 4, LFM2-VL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import fastattr
from fastattr.adapters.families import Looks, Shown
from fastattr.types import WHOLE_IMAGE
from tests.engine.families import tiny_llama4
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, embeddings_at_image_tokens, prove, read, wrap
from tests.engine.families.tiny_lfm2 import lfm2_vl
from tests.engine.families.tiny_llama4 import llama4
from tests.engine.families.tiny_llava import captured
from tests.engine.families.tiny_tiles import (
    TILE,
    granite_docling,
    granite_docling_fine,
    idefics3_tiles,
    internvl_tiles,
    minicpm,
    minicpm_canvas,
    qianfan_ocr,
    smolvlm_tiles,
)
from tests.engine.family_models import ANSWER, PROMPT, DuckProcessor, installed_half, picture

# By hand, of a picture of 67 x 91 and tiles of 32 x 32: it is made 94 x 128 pixels (3 x 4 tiles) or 70 x 96 (3 x 3);
# 2 x 3 tiles come nearest to its form; shrunk to 64 x 86 it is laid into 64 x 96, of which 5 columns of cells are left.
ROWS = [
    Row("idefics3", idefics3_tiles, [(2, 2)] * 13, (1, 6, 8)),
    Row("smolvlm", smolvlm_tiles, [(2, 2)] * 10, (1, 6, 6)),
    Row("internvl", internvl_tiles, [(2, 2)] * 7, (1, 4, 6)),
    Row("qianfan_ocr", qianfan_ocr, [(2, 2)] * 7, (1, 4, 6)),
    Row("granite_docling", granite_docling, [(2, 2)] * 7, (1, 4, 6), scales=(1.0,)),
    Row("granite_docling", granite_docling_fine, [(4, 4)] * 7, (1, 8, 12), scales=(1.0,)),
    Row("minicpmv4_6", minicpm, [(2, 2), (2, 2), (2, 2)], (1, 2, 4), scales=(1.0,)),
    Row("minicpmv4_7", minicpm_canvas, [(2, 2), (2, 2), (2, 2)], (1, 2, 4), scales=(1.0,)),
    Row(
        "llama4",
        llama4,
        [(2, 2)] * 7,
        (1, 4, 5),
        scales=(1.0,),
        stood_in="cutting into tiles by hand (the image processor needs torchvision)",
        last_good="5.23.0",
    ),
    Row(
        "lfm2_vl",
        lfm2_vl,
        [(2, 2)] * 6 + [(2, 3)],
        (1, 4, 6),
        scales=(1.0,),
        stood_in="cutting into tiles by hand (the image processor needs torchvision)",
    ),
]


def row_of(make: Any) -> Row:
    return next(row for row in ROWS if row.make is make)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_several_images_are_each_cut_by_their_own_size(row: Row) -> None:
    """A wide, a tall and a square picture in one prompt lie as each does alone, one behind the other."""
    model = wrap(row)
    pictures = [picture(32, 120), picture(120, 40), picture(64, 64)]
    encoded, _ = read(model, pictures)
    alone = [read(model, each)[0].groups[0] for each in pictures]
    assert [(group.grid, group.views) for group in encoded.groups] == [(group.grid, group.views) for group in alone]
    wide, tall, _ = encoded.groups
    assert wide.grid[2] > wide.grid[1] and tall.grid[1] > tall.grid[2]
    assert len({len(group.views) for group in encoded.groups}) > 1
    positions = [position for group in encoded.groups for position in group.positions]
    assert positions == sorted(positions) and len(set(positions)) == len(positions)
    why = fastattr.attribute(model, pictures, PROMPT, ANSWER, scales=(1.0,))
    assert [tuple(maps.shape[1:]) for maps in why.image] == [group.grid for group in encoded.groups]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_capture_of_tiles_needs_the_pictures(row: Row) -> None:
    model = wrap(row)
    states, out = captured(model, [picture(), picture(120, 40)])
    with pytest.raises(fastattr.TokenLayoutError, match="pass the pictures, image="):
        states.attribute(out)
    other = [picture(20, 20), picture(30, 30)]  # as many, of other sizes
    with pytest.raises(fastattr.TokenLayoutError, match=r"tiles"):
        states.attribute(out, image=other)
    why = states.attribute(out, image=[picture(), picture(120, 40)])
    assert why.grids[0][0] == row.grid and why.source == "capture"


@pytest.mark.parametrize("row", ROWS[:3], ids=lambda row: row.make.__name__)
def test_a_picture_that_is_shown_once_needs_no_size(row: Row) -> None:
    """With nothing cut, the one tile is the whole."""
    model = wrap(row)
    images = model.processor.image_processor
    images.do_image_splitting = images.crop_to_patches = False
    states, out = captured(model, [picture()])
    assert states.attribute(out).grids[0][0] == (1, 2, 2)
    why = fastattr.attribute(model, [picture(), picture(120, 40)], PROMPT, ANSWER, scales=(1.0, 2.0))
    assert why.grids[0] == ((1, 2, 2), (1, 2, 2)) and why.grids[1] == ((1, 4, 4), (1, 4, 4))


def test_a_processor_that_does_not_show_how_it_cuts_is_refused() -> None:
    """InternVL's own processing behind a processor of somebody's own."""
    model = wrap(row_of(internvl_tiles))
    images = model.processor.image_processor

    def read_images(pictures: Any) -> Any:
        return {"pixel_values": images(pictures, return_tensors="pt")["pixel_values"]}

    duck = DuckProcessor(
        model.processor.tokenizer,
        read_images,
        "<IMG_CONTEXT>",
        lambda seen, _: "<IMG_CONTEXT>" * len(seen["pixel_values"]),
    )
    with pytest.raises(fastattr.TokenLayoutError, match="min_patches, but DuckProcessor shows no image_processor"):
        fastattr.attribute(fastattr.wrap(model.hf_model, duck), picture(), PROMPT, ANSWER, scales=(1.0,))


def test_a_video_is_cut_frame_by_frame() -> None:
    model = wrap(row_of(internvl_tiles))
    (group,) = read(model, [[picture(seed=seed) for seed in range(3)]])[0].groups
    assert group.grid == (3, 4, 6) and len(group.views) == 7
    frames = [picture(seed=seed) for seed in range(3)]
    before, _ = embeddings_at_image_tokens(model, [frames])
    after, _ = embeddings_at_image_tokens(model, [[frames[0], picture(seed=9), frames[2]]])
    moved = (after - before).norm(dim=1).view(3, -1).amax(dim=1)
    assert moved[1] > 1e-3 and moved[[0, 2]].max() == 0


def test_where_a_picture_of_llama4_is_padded_nothing_is_shown() -> None:
    """32 x 90 pixels fill one row of three tiles but for six columns."""
    model = wrap(row_of(llama4))
    before, group = embeddings_at_image_tokens(model, picture(32, 90))
    assert [view.box[2] for view in group.views] == pytest.approx([32 / 90, 64 / 90, 96 / 90, 1.0])
    plain = np.asarray(picture(32, 90)).copy()
    plain[:, -6:] = 255 - plain[:, -6:]
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(plain))
    moved = (after - before).norm(dim=1).view(4, 2, 2)
    assert moved[:2].max() == 0 and moved[2, :, 1].min() > 0 and moved[3, :, 1].min() > 0


def test_a_class_of_llama4_whose_forward_fails_is_refused() -> None:
    """It fails in transformers 5.24.0; the test tries the class instead of reading the version."""
    held = llama4(mended=False)
    try:
        with torch.no_grad():
            held.hf_model(input_ids=torch.arange(20, 24)[None])
    except AttributeError as error:
        expected = rf"Llama4ForConditionalGeneration does not run with transformers {transformers.__version__}.*{error}"
        with pytest.raises(fastattr.UnsupportedModelError, match=expected):
            fastattr.wrap(held.hf_model, held.processor)
    else:
        fastattr.wrap(held.hf_model, held.processor)


# --- the choice of tiles, against transformers' own ------------------------------------------------------------


def sizes(n: int) -> list[tuple[int, int]]:
    """Of all forms, also such whose sides are multiples of a tile or of each other."""
    random = np.random.default_rng(0)
    any_size = random.integers(8, 300, (n, 2)).tolist()
    whole_tiles = (random.integers(1, 9, (n // 3, 2)) * TILE).tolist()
    return [(h, w) for h, w in any_size + whole_tiles + [[h, 2 * h] for h in range(9, 120, 7)]]


def looks_by_size(model: fastattr.Model, size: tuple[int, int], n_tiles: int) -> Looks:
    """What the family makes of a picture of this size, cut as its processor is set."""
    pixels = torch.zeros(n_tiles, 3, TILE, TILE)
    (looks,) = model.family.look(Shown(model.config, model.processor, {"pixel_values": pixels}, [size]))
    return looks


def rows_and_columns(looks: Looks) -> tuple[int, int]:
    tiles = looks if len(looks) == 1 else looks[:-1]
    return len({each.box[1] for each in tiles}), len({each.box[0] for each in tiles})


@pytest.mark.parametrize("longest", [4 * TILE, 5 * TILE + 6])
def test_idefics3_cuts_as_its_image_processor_does(longest: int) -> None:
    real = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": TILE})
    model = wrap(row_of(idefics3_tiles))
    model.processor.image_processor.size = {"longest_edge": longest}
    for height, width in sizes(60):
        seen = real([Image.new("RGB", (width, height))], return_tensors="pt", return_row_col_info=True)
        n = seen["pixel_values"].shape[1]
        expected = (max(1, seen["rows"][0][0]), max(1, seen["cols"][0][0]))
        assert rows_and_columns(looks_by_size(model, (height, width), n)) == expected, (height, width)


def test_internvl_cuts_as_its_image_processor_does() -> None:
    """Tiles by their colours: the picture is a slope from left to right and from top to bottom."""
    real = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=6)
    model = wrap(row_of(internvl_tiles))
    for height, width in sizes(60):
        slope = np.zeros((height, width, 3), np.uint8)
        slope[..., 0] = np.linspace(0, 255, width)[None]
        slope[..., 1] = np.linspace(0, 255, height)[:, None]
        tiles = real([Image.fromarray(slope)], return_tensors="pt")["pixel_values"]
        looks = looks_by_size(model, (height, width), len(tiles))
        for axis, channel in ((0, 0), (1, 1)):
            colour = tiles[:, channel].mean(dim=(1, 2))
            middle = torch.tensor([(look.box[axis] + look.box[axis + 2]) / 2 for look in looks])
            together = torch.stack([colour, middle])
            if middle.std() > 0 and len(looks) > 1:
                assert torch.corrcoef(together)[0, 1] > 0.99, (height, width)
            else:
                assert colour.std(unbiased=False) < 0.05, (height, width)


@pytest.mark.parametrize("stretch", [False, True])
def test_llama4_cuts_as_its_image_processor_does(stretch: bool) -> None:
    held = llama4(stretch=stretch)
    model = fastattr.wrap(held.hf_model, held.processor)
    by_hand = tiny_llama4.LaidTiles(resize_to_max_canvas=stretch)
    square = SizeDict(height=TILE, width=TILE)
    choices = torch.tensor(tiny_llama4.REAL["find_supported_resolutions"](6, square))
    for height, width in sizes(60):
        chosen = tiny_llama4.REAL["get_best_fit"]((height, width), choices, stretch)
        rows, columns = (chosen // TILE).tolist()
        looks = looks_by_size(model, (height, width), rows * columns + (rows * columns > 1))
        assert rows_and_columns(looks) == (rows, columns), (height, width)
        _, _, laid = by_hand.lay(np.full((3, height, width), 255, np.uint8), square)
        filled = [
            np.count_nonzero(laid[0].max(axis=axis)) for axis in (1, 0)
        ]  # pixels of the picture among its padding
        assert looks[0].box == pytest.approx((0, 0, TILE / filled[1], TILE / filled[0])), (height, width)


def test_minicpm_cuts_as_its_image_processor_does() -> None:
    model = wrap(row_of(minicpm))
    for height, width in sizes(60):
        seen = model.processor.image_processor([Image.new("RGB", (width, height))], return_tensors="pt")
        (looks,) = model.family.look(
            Shown(model.config, model.processor, {"target_sizes": seen["target_sizes"]}, [(height, width)])
        )
        assert looks[0].box == WHOLE_IMAGE
        slices = looks[1:]
        grid = [len({each.box[side] for each in slices}) for side in (1, 0)]
        assert grid == list(seen["grids"][0]), (height, width)
        assert [list(each.grid[1:]) for each in looks] == (seen["target_sizes"] // 4).tolist()


def test_lfm2_cuts_as_its_image_processor_does() -> None:
    model = wrap(row_of(lfm2_vl))
    images = model.processor.image_processor
    for height, width in sizes(60):
        if max(height, width) > 4 * min(height, width):  # of such its whole look outgrows the room for it
            continue
        seen = images([Image.new("RGB", (width, height))], return_row_col_info=True, return_tensors="pt")
        (looks,) = model.family.look(Shown(model.config, model.processor, dict(seen), [(height, width)]))
        assert rows_and_columns(looks) == (seen["image_rows"][0], seen["image_cols"][0]), (height, width)
        assert [2 * length for length in looks[-1].grid[1:]] == seen["spatial_shapes"][-1].tolist()


# --- other ways to the states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_a_batch_and_a_decoder_read_what_a_replay_reads(row: Row) -> None:
    prove_other_ways(wrap(row), [picture(), picture(120, 40), picture(67, 91, seed=3)])


ASKED_FOR = ("return_row_col_info", "crop_to_patches")  # by the joint class, not in the directory


@pytest.mark.parametrize(
    ("make", "processor_class"),
    [
        (smolvlm_tiles, "SmolVLMProcessor"),
        (internvl_tiles, "InternVLProcessor"),
        (minicpm, "MiniCPMV4_6Processor"),
        (idefics3_tiles, None),
        (qianfan_ocr, None),
    ],
)
def test_load_joins_the_halves_of_a_processor(tmp_path: Path, make: Any, processor_class: str | None) -> None:
    """A directory as on the hub, of which the joint class needs torchvision, cuts pictures as the objects do."""
    held = make()
    held.hf_model.save_pretrained(tmp_path)
    if processor_class is None:
        held.processor.save_pretrained(tmp_path)
    else:
        for part, name in ((held.processor.tokenizer, "tokenizer"), (held.processor.image_processor, "preprocessor")):
            part.save_pretrained(tmp_path)
            file = tmp_path / f"{name}_config.json"
            settings = json.loads(file.read_text())
            for option in ASKED_FOR:
                settings.pop(option, None)
            file.write_text(json.dumps({**settings, "processor_class": processor_class}))
    images = held.processor.image_processor
    asked_for = {option: getattr(images, option) for option in ASKED_FOR if hasattr(images, option)}
    expected = fastattr.wrap(held.hf_model, installed_half(held.processor, tmp_path, **asked_for))
    ours, theirs = (read(each, [picture(), picture(120, 40)])[0] for each in (fastattr.load(tmp_path), expected))
    assert ours.groups == theirs.groups
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
