"""LLaVA-1.5 and ViP-LLaVA: cropped, squeezed and padded pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from tests.engine.families.proof import Row, embeddings_at_image_tokens, prove, wrap
from tests.engine.families.tiny_llava import captured, llava_padded, video_llava, vip_llava
from tests.engine.family_models import ANSWER, PROMPT, installed_half, llava_clip, llava_siglip, picture
from tests.engine.test_wrap_load import saved

ROWS = [
    Row("llava", llava_clip, [(4, 4)], (1, 4, 4)),
    Row("llava", llava_siglip, [(4, 4)], (1, 4, 4)),
    Row("llava", llava_padded, [(4, 4)], (1, 3, 4)),
    Row("vipllava", vip_llava, [(4, 4)], (1, 4, 4)),
    Row("video_llava", video_llava, [(4, 4)], (1, 4, 4), stood_in="the processor: it needs torchvision for video"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


def test_padding_is_left_out_of_the_map() -> None:
    """A picture of 32 x 128 in a square of 4 x 4 tokens: one row of the map, out of the two that show some of it."""
    model = wrap(ROWS[2])
    plain = np.asarray(picture(32, 128))
    before, group = embeddings_at_image_tokens(model, Image.fromarray(plain))
    assert (group.grid, group.extent) == ((1, 1, 4), (0.0, 0.0, 1.0, 1.0))
    (view,) = group.views
    assert view.grid == (4, 4) and view.box == (0.0, -1.5, 1.0, 2.5)
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(255 - plain))
    moved = (after - before).norm(dim=1).view(4, 4)
    assert moved[1:3].min() > 3 * moved[[0, 3]].max()


def test_capture_of_padded_pictures_needs_the_pictures() -> None:
    model = wrap(ROWS[2])
    states, out = captured(model, [picture()])
    with pytest.raises(fastattr.TokenLayoutError, match=r"pads pictures by their size.*pass the pictures, image="):
        states.attribute(out)
    assert states.attribute(out, image=picture()).grids[0][0] == (1, 3, 4)


def test_several_padded_pictures_have_maps_of_their_own_form() -> None:
    model = wrap(ROWS[2])
    why = fastattr.attribute(model, [picture(67, 91), picture(91, 40), picture(50, 50)], PROMPT, ANSWER, scales=(1.0,))
    assert [tuple(each.shape[1:]) for each in why.image] == [(1, 3, 4), (1, 4, 2), (1, 4, 4)]
    assert all(torch.isfinite(each).all() for each in why.image)


@pytest.mark.parametrize("row", [ROWS[2], ROWS[3]], ids=lambda row: row.make.__name__)
def test_load_completes_an_old_processor(row: Row, tmp_path: Path) -> None:
    """Directories from before transformers 4.46 do not say what the processor must know of its model."""
    held = row.make()
    directory = saved(tmp_path, held, held.processor.image_processor, "LlavaProcessor")
    ours = fastattr.attribute(fastattr.load(directory), picture(), PROMPT, ANSWER, scales=(1.0,))
    whole = fastattr.wrap(held.hf_model, installed_half(held.processor, directory))
    theirs = fastattr.attribute(whole, picture(), PROMPT, ANSWER, scales=(1.0,))
    torch.testing.assert_close(ours.image[0], theirs.image[0])
