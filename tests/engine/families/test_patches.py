"""Models whose pictures are grids of patches as in Qwen-VL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

import fastattr
from fastattr import adapters
from fastattr.adapters.processors import ComposedProcessor, grid_tokens, load_processor
from fastattr.images import read_visuals
from tests.engine.families.proof import Row, embeddings_at_image_tokens, prove
from tests.engine.families.tiny_patches import (
    KimiImages,
    ernie4_5_vl_moe,
    exaone4_5,
    hunyuan_vl,
    kimi_k25,
    lighton_ocr,
    mistral_large4,
    paddleocr_vl,
    video_llama_3,
)
from tests.engine.family_models import ANSWER, PATCH, PROMPT, Tiny, installed_half, picture

VIDEO = "the video processor, which needs torchvision"

ROWS = [
    Row("exaone4_5", exaone4_5, [(4, 6)], (1, 4, 6), video=True),
    Row("paddleocr_vl", paddleocr_vl, [(4, 6)], (1, 4, 6)),
    Row("ernie4_5_vl_moe", ernie4_5_vl_moe, [(4, 6)], (1, 4, 6), stood_in=VIDEO),
    Row("hunyuan_vl", hunyuan_vl, [(4, 6)], (1, 4, 6)),
    Row("kimi_k25", kimi_k25, [(5, 6)], (1, 4, 6), stood_in="the image processor, which needs torchvision"),
    Row("lighton_ocr", lighton_ocr, [(5, 6)], (1, 5, 6)),
    Row("mistral_large4", mistral_large4, [(5, 6)], (1, 5, 6)),
    Row("video_llama_3", video_llama_3, [(8, 11)], (1, 8, 11), stood_in=VIDEO),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # ERNIE's own processor, of NumPy 2
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_family(row: Row) -> None:
    prove(row)


def wrapped(held: Tiny) -> fastattr.Model:
    return fastattr.wrap(held.hf_model, held.processor)


def groups_of(model: fastattr.Model, pictures: object) -> tuple[fastattr.types.ImageGroup, ...]:
    return adapters.encode(model, read_visuals(pictures), PROMPT).groups


# --- HunYuan -------------------------------------------------------------------------------------------------


def test_the_marks_around_hunyuans_rows_are_left_out() -> None:
    model = wrapped(hunyuan_vl())
    example = adapters.encode(model, read_visuals([picture(), picture(48, 32)]), PROMPT)
    every = (example.input_ids == model.image_token_id).nonzero().flatten().tolist()
    assert len(every) == (1 + 4 * 7 + 1) + (1 + 3 * 3 + 1)
    first, second = example.groups
    assert (first.grid, second.grid) == ((1, 4, 6), (1, 3, 2))
    rows = [every[1 + 7 * row : 1 + 7 * row + 6] for row in range(4)]
    assert list(first.positions) == [position for row in rows for position in row]
    rows = [every[30 + 1 + 3 * row : 30 + 1 + 3 * row + 2] for row in range(3)]
    assert list(second.positions) == [position for row in rows for position in row]


# --- Kimi ----------------------------------------------------------------------------------------------------


def test_kimis_padding_is_left_out() -> None:
    """A picture of 36 x 80 in cells of 16: its third row shows a quarter of a cell, and no other pixel counts there."""
    model = wrapped(kimi_k25())
    before, group = embeddings_at_image_tokens(model, picture(36, 80))
    (view,) = group.views
    assert view.grid == (3, 5) and view.box == (0.0, 0.0, 1.0, 48 / 36)
    assert (group.grid, group.extent) == ((1, 2, 5), (0.0, 0.0, 1.0, 1.0))
    changed = np.asarray(picture(36, 80)).copy()
    changed[33:] = 255 - changed[33:]
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(changed))
    moved = (after - before).norm(dim=1).view(3, 5)
    assert moved[2].min() > 3 * moved[:2].max()


def test_kimi_shrinks_large_pictures() -> None:
    """150 x 100 pixels are 18 x 12 patches, of which 60 are allowed: 0.527 of each side, so 79 x 52 pixels."""
    model = wrapped(kimi_k25(max_patches=60))
    wide, small = groups_of(model, [picture(150, 100), picture(30, 30)])
    assert wide.views[0].grid == (5, 4) and wide.views[0].box == (0.0, 0.0, 64 / 52, 80 / 79)
    assert small.views[0].grid == (2, 2) and small.views[0].box == (0.0, 0.0, 32 / 30, 32 / 30)
    why = fastattr.attribute(model, picture(150, 100), PROMPT, ANSWER, scales=(1.0, 2.0), evidence=False)
    assert why.grids[0][0] == (1, 5, 3) and why.grids[1][0] == (1, 10, 8)
    # a little shrunk, to 154 x 123, in as many cells as before
    (little,) = groups_of(wrapped(kimi_k25(max_patches=300)), [picture(160, 128)])
    assert little.views[0].grid == (10, 8) and little.views[0].box == (0.0, 0.0, 128 / 123, 160 / 154)
    longest = wrapped(kimi_k25(longest=8))  # a side of 64 pixels
    (tall,) = groups_of(longest, [picture(128, 64)])
    assert tall.grid == (1, 4, 2) and tall.views == ()


def test_kimi_says_when_its_processor_does_something_else() -> None:
    held = kimi_k25()

    class Half(KimiImages):
        def fetch_images(self, pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
            return [each.resize((40, 40)) for each in pictures]

    held.processor.image_processor = Half()
    with pytest.raises(fastattr.TokenLayoutError, match=r"of \(67, 91\) .*its grid is 3 x 3: .* not known"):
        groups_of(wrapped(held), picture())


def test_capture_of_kimis_pictures_needs_the_pictures() -> None:
    model = wrapped(kimi_k25())
    example = adapters.encode(model, read_visuals(picture()), PROMPT)
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(
            **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), do_sample=False, max_new_tokens=2
        )
    with pytest.raises(fastattr.TokenLayoutError, match=r"Kimi-K2\.5 pads pictures by their size.*image="):
        states.attribute(out)
    assert states.attribute(out, image=picture()).grids[0][0] == (1, 4, 6)


# --- videos, and loading -------------------------------------------------------------------------------------


def test_without_a_video_half_videos_are_shown_as_frames() -> None:
    held = video_llama_3()
    images, token = held.processor.image_processor, "<|image_pad|>"
    composed = ComposedProcessor(images, held.processor.tokenizer, token, grid_tokens(images, token))
    model = fastattr.wrap(held.hf_model, composed)
    assert not model.takes_videos
    (group,) = groups_of(model, [[picture(40, 56, seed) for seed in range(3)]])
    assert group.grid == (3, 5, 7)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_load(tmp_path: Path, row: Row) -> None:
    """What torchvision is needed for is said, and everything else is loaded as it was saved."""
    held = row.make()
    if row.stood_in and row.model_type != "video_llama_3" and not is_torchvision_available():
        held.hf_model.config.save_pretrained(tmp_path)
        with pytest.raises(fastattr.UnsupportedModelError, match=f"{row.model_type}.*install torchvision"):
            load_processor(tmp_path)
        return
    held.hf_model.save_pretrained(tmp_path)
    if row.stood_in or row.model_type in ("exaone4_5", "mistral_large4"):  # whose processors are not whole here
        held.processor.tokenizer.save_pretrained(tmp_path)
        held.processor.image_processor.save_pretrained(tmp_path)
        cells = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "draw_on_frames": False}
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(cells))
    else:
        held.processor.save_pretrained(tmp_path)
    loaded = fastattr.load(tmp_path)
    pictures = [picture(), picture(40, 72)]
    ours = adapters.encode(loaded, read_visuals(pictures), PROMPT)
    theirs = adapters.encode(
        fastattr.wrap(held.hf_model, installed_half(held.processor, tmp_path)), read_visuals(pictures), PROMPT
    )
    assert ours.groups == theirs.groups and torch.equal(ours.input_ids, theirs.input_ids)
    for name, value in ours.model_inputs.items():
        torch.testing.assert_close(value, theirs.model_inputs[name])
