"""LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision: what the mosaic shows, how it is broken into rows, what is padding."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.utils import is_torchvision_available

import fastattr
from fastattr import adapters
from fastattr.adapters.families import FAMILIES, Shown
from fastattr.adapters.families.llava_next import best_resolution, unpadded
from fastattr.adapters.hooks import decoder_of
from fastattr.images import read_visuals
from fastattr.types import ImageGroup, View
from fastattr.views import canvas
from tests.engine.families import proof
from tests.engine.families.other_ways import prove_batch_of_attributions
from tests.engine.families.proof import Row, embeddings_at_image_tokens, prove, wrap
from tests.engine.families.tiny_llava import captured
from tests.engine.families.tiny_llava_next import (
    SIDE,
    granite4_vision,
    llava_next,
    llava_next_video,
    llava_onevision,
    llava_onevision_shrunk,
)
from tests.engine.family_models import ANSWER, PATCH, PROMPT, installed_half, picture
from tests.engine.test_wrap_load import saved

VIDEO = "the processor: it needs torchvision for video"
# 67 x 91 in 64 x 64: 8 x 8 cells of which 6 rows show the picture
ROWS = [
    Row("llava_next", llava_next, [(4, 4), (6, 8)], (1, 6, 8), scales=(1.0,)),
    Row("llava_next_video", llava_next_video, [(4, 4), (6, 8)], (1, 6, 8), (1.0,), video=True, stood_in=VIDEO),
    Row("llava_onevision", llava_onevision, [(4, 4), (6, 8)], (1, 6, 8), (1.0,), video=True, stood_in=VIDEO),
    # sqrt(6 * 8 / (2 * 4 * 4)) = 1.22: 6 // 1.22 = 4 rows of 8 // 1.22 = 6
    Row("llava_onevision", llava_onevision_shrunk, [(4, 4), (4, 6)], (1, 4, 6), (1.0,), stood_in=VIDEO),
    Row("granite4_vision", granite4_vision, [(4, 4), (6, 8)], (1, 6, 8), scales=(1.0,)),
]


@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


def test_granite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its picture is not among the input embeddings: what is added at five layers of the decoder must move in its place."""
    monkeypatch.setattr(proof, "embeddings_at_image_tokens", added_at_image_tokens)
    prove(ROWS[-1])


def added_at_image_tokens(model: fastattr.Model, image: Any, scale: float = 1.0) -> tuple[Tensor, ImageGroup]:
    """What all layers add at the positions of the image, side by side, `[position dim]`."""
    encoded, response = proof.read(model, image, scale)
    given: list[dict[int, Tensor]] = []

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs["deepstack_features"])

    handle = decoder_of(model.hf_model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        adapters.replay(model, encoded, response)
    finally:
        handle.remove()
    (group,) = encoded.groups
    placeholders = (encoded.input_ids == model.image_token_id).nonzero().flatten().tolist()
    assert sorted(given[0]) == [0, 1, 2, 3, 4]
    added = torch.cat([given[0][layer].detach() for layer in range(5)], dim=1)
    assert len(added) == len(placeholders)
    return added[[placeholders.index(position) for position in group.positions]], group


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_rows_of_a_batch_are_as_alone(row: Row) -> None:
    """Two pictures of one form, and one of another."""
    prove_batch_of_attributions(wrap(row), [picture(67, 91), picture(67, 91, 5), picture(180, 64)])


@pytest.mark.parametrize("seed", range(4))
def test_resolution_and_padding_are_those_of_transformers(seed: int) -> None:
    """Of 250 sizes of pictures each, among the resolutions of LLaVA-1.6 and OneVision."""
    lists = (
        [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
    )
    draws = np.random.default_rng(seed)
    for _ in range(250):
        size = tuple(int(length) for length in np.exp(draws.uniform(2, 8, 2)))
        resolutions = lists[int(draws.integers(2))]
        resolution = select_best_resolution(size, resolutions)
        assert best_resolution(size, resolutions) == resolution
        canvas = (resolution[0] // 14, resolution[1] // 14)
        rows, columns = unpadded(size, canvas)
        kept = unpad_image(torch.zeros(1, *canvas), size)
        assert kept.shape[1:] == (canvas[0] - 2 * rows, canvas[1] - 2 * columns)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_as_many_placeholders_as_the_processors_of_transformers_write(kind: str) -> None:
    """At the sizes of LLaVA-1.6 and OneVision, also for slim pictures."""
    if kind == "llava_next":
        their_class, tile, cells = LlavaNextProcessor, 336, 24
        resolutions = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    else:
        their_class, tile, cells = LlavaOnevisionProcessor, 384, 27
        resolutions = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]
    theirs = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=resolutions),
        patch_size=14,
        num_additional_image_tokens=0,
        num_image_tokens=cells**2,
        vision_aspect_ratio="anyres_max_9",
    )
    theirs._get_unpadded_features = partial(their_class._get_unpadded_features, theirs)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=14),
        image_grid_pinpoints=resolutions,
        vision_aspect_ratio="anyres_max_9",
    )
    sizes = np.exp(np.random.default_rng(0).uniform(1, 8, (500, 2))).astype(int)
    pictures = FAMILIES[kind].look(Shown(config, None, {"image_sizes": torch.from_numpy(sizes)}, None))
    for (height, width), looks in zip(sizes.tolist(), pictures, strict=True):
        expected = their_class._get_number_of_features(theirs, height, width, tile, tile)
        assert sum(look.n_placeholders for look in looks) == expected, f"{height} x {width}"
        _, extent = canvas(tuple(View(look.grid[1:], look.box) for look in looks))
        assert extent == (0, 0, 1, 1)
    slim = {1, 2} if kind == "llava_next" else {2}  # of an odd number of rows one is always left
    assert {len(looks) for looks in pictures} == slim


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=lambda row: row.make.__name__)
@pytest.mark.parametrize(("size", "breaks"), [((3, 400), 0), ((400, 3), 4)])
def test_of_a_slim_picture_the_whole_alone_is_left(row: Row, size: tuple[int, int], breaks: int) -> None:
    """Of 400 x 3 not one of 4 x 8 cells is left, but for the line breaks."""
    model = wrap(row)
    encoded = adapters.encode(model, read_visuals(picture(*size)), PROMPT)
    assert (encoded.groups[0].grid, encoded.groups[0].views) == ((1, 4, 4), ())
    assert int((encoded.input_ids == model.image_token_id).sum()) == 16 + breaks
    assert fastattr.attribute(model, picture(*size), PROMPT, ANSWER, scales=(1.0,)).image[0].max() > 0


@pytest.mark.parametrize(
    ("size", "mosaic"),
    [
        (
            (30, 200),
            (2, 12),
        ),  # in 32 x 96: 4 x 12 cells, int(30 * 12 / 200) = 1 row of them, (4 - 1) // 2 = 1 out each side
        ((200, 30), (12, 2)),
        ((50, 50), (8, 8)),
        ((31, 63), (4, 8)),  # int(31 * 8 / 63) = 3: nothing is left out
    ],
)
def test_wide_and_tall_pictures_choose_other_mosaics(size: tuple[int, int], mosaic: tuple[int, int]) -> None:
    """And what is left out of one view is no picture: bright padding would move nothing."""
    model = wrap(ROWS[0])
    _, group = embeddings_at_image_tokens(model, picture(*size))
    assert [view.grid for view in group.views] == [(4, 4), mosaic]


def test_cells_left_out_are_whole() -> None:
    """101 x 58 is 64 x 37 of 64 x 64 pixels, from pixel 13; of 8 columns of 8 pixels 2 are left out at each side."""
    _, group = embeddings_at_image_tokens(wrap(ROWS[0]), picture(101, 58))
    whole, mosaic = group.views
    assert whole.box == (0, 0, 1, 1)
    assert mosaic.grid == (8, 4)
    assert mosaic.box == pytest.approx(((16 - 13) / 37, 0, (48 - 13) / 37, 1))
    assert (group.grid, group.extent) == ((1, 8, 5), (0, 0, 1, 1))


def test_line_breaks_are_not_on_the_map() -> None:
    """They do not depend on the picture, unlike every token that is on the map."""
    model = wrap(ROWS[0])
    plain = np.asarray(picture(64, 64))
    before, group = embeddings_at_image_tokens(model, Image.fromarray(plain))
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(255 - plain))
    assert (after - before).norm(dim=1).min() > 1e-3
    encoded = adapters.encode(model, read_visuals(picture(64, 64)), PROMPT)
    placeholders = (encoded.input_ids == model.image_token_id).nonzero().flatten().tolist()
    breaks = [place for place in placeholders if place not in group.positions]
    assert breaks == [placeholders[16 + 9 * row + 8] for row in range(8)]


def test_several_pictures_of_other_forms_in_one_prompt() -> None:
    model = wrap(ROWS[0])
    pictures = [picture(67, 91), picture(30, 200), picture(50, 50)]
    why = fastattr.attribute(model, pictures, PROMPT, ANSWER, scales=(1.0,))
    alone = [fastattr.attribute(model, each, PROMPT, ANSWER, scales=(1.0,)).image[0].shape for each in pictures]
    assert [each.shape for each in why.image] == alone
    assert alone[0][1:] == (1, 6, 8)


@pytest.mark.parametrize("row", ROWS[:3], ids=lambda row: row.make.__name__)
def test_capture_needs_no_picture(row: Row) -> None:
    """The model itself is told the pictures' sizes."""
    model = wrap(row)
    states, out = captured(model, [picture(67, 91), picture(30, 200)])
    without, given = states.attribute(out), states.attribute(out, image=[picture(67, 91), picture(30, 200)])
    assert without.source == given.source == "capture"
    for mine, theirs in zip(without.image, given.image, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("together", [True, False])
def test_captured_pictures_of_onevision_are_explained_as_they_were_given(together: bool) -> None:
    """`apply_chat_template(tokenize=True)` nests them: each is padded to a square, with a line break after it. A flat list is
    cut into tiles."""
    held = llava_onevision()
    model = fastattr.wrap(held.hf_model, held.processor)
    pictures = [picture(32, 64), picture(50, 50)]
    seen = held.processor.image_processor([pictures] if together else pictures, return_tensors="pt")
    assert seen["batch_num_images"].tolist() == ([2] if together else [1, 1])
    n_tokens = 2 * (16 + 1) if together else 16 + 4 * 9 + 16 + 8 * 9
    ids = held.processor.tokenizer(["<image>" * n_tokens + PROMPT], add_special_tokens=False, return_tensors="pt")
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = held.hf_model.generate(**ids, **seen, do_sample=False, max_new_tokens=2, suppress_tokens=never)
    why = states.attribute(out, image=pictures, evidence=True)
    grids = [(1, 2, 4), (1, 4, 4)] if together else [(1, 4, 8), (1, 8, 8)]
    assert [tuple(each.shape[1:]) for each in why.image] == grids
    assert why.evidence is not None and why.evidence.isfinite().all()


def test_pictures_of_onevision_in_one_prompt_are_shown_once_each() -> None:
    """A patch under one cell of the second picture moves that cell most."""
    held = llava_onevision()
    model = fastattr.wrap(held.hf_model, held.processor)
    pictures = [picture(32, 64), picture(64, 48)]

    def given(shown: list[Image.Image]) -> tuple[torch.Tensor, ImageGroup]:
        encoded = adapters.encode(model, read_visuals(shown), PROMPT)
        assert encoded.model_inputs["batch_num_images"].tolist() == [2]
        with torch.no_grad():
            features = held.hf_model.model(input_ids=encoded.input_ids[None], **encoded.model_inputs)
        group = encoded.groups[1]
        return features.last_hidden_state[0, list(group.positions)], group

    before, group = given(pictures)
    # 64 x 48 in the middle of a square of 64, 4 x 4 cells of 16 pixels: a column is half padding at each side
    assert (group.grid, group.views[0].grid) == ((1, 4, 3), (4, 4))
    assert group.views[0].box == pytest.approx((-8 / 48, 0, 56 / 48, 1))
    pixels = np.asarray(pictures[1]).copy()
    pixels[36:44, 28:36] = (255, 0, 255)  # under row 2, column 2 of the square: 8 pixels of padding, then 28 + 8 = 36
    after, _ = given([pictures[0], Image.fromarray(pixels)])
    moved = (after - before).norm(dim=1).view(4, 4)
    assert divmod(int(moved.argmax()), 4) == (2, 2)


def test_frames_of_next_video_are_cropped() -> None:
    """A frame of 64 x 128 shows its middle half; 4 x 4 patches are pooled to 2 x 2."""
    model = wrap(ROWS[1])
    frames = [picture(64, 128, seed) for seed in range(3)]
    before, group = embeddings_at_image_tokens(model, [frames])
    assert (group.grid, group.extent) == ((3, 2, 2), (0.25, 0.0, 0.75, 1.0))

    def painted(columns: slice) -> list[Image.Image]:
        pixels = np.asarray(frames[1]).copy()
        pixels[:, columns] = 0
        return [frames[0], Image.fromarray(pixels), frames[2]]

    outside, _ = embeddings_at_image_tokens(model, [painted(slice(0, 28))])
    torch.testing.assert_close(outside, before, rtol=0, atol=1e-6)
    inside, _ = embeddings_at_image_tokens(model, [painted(slice(68, 96))])
    moved = (inside - before).norm(dim=1).view(3, 2, 2)
    assert moved[[0, 2]].max() == 0
    assert moved[1, :, 1].min() > moved[1, :, 0].max()


def test_a_captured_video_and_a_picture_beside_it() -> None:
    """Each is laid out by its own size: the video is cropped by its, the picture's mosaic unpadded by its own."""
    model = wrap(ROWS[1])
    asked = [[picture(64, 128, seed) for seed in range(3)], picture(67, 91)]
    states, out = captured(model, asked)
    with pytest.raises(fastattr.TokenLayoutError, match=r"crops frames by their size.*pass the pictures, image="):
        states.attribute(out)
    why = states.attribute(out, image=asked)
    assert why.source == "capture"
    assert [tuple(each.shape[1:]) for each in why.image] == [(3, 2, 2), (1, 6, 8)]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_number_of_tokens_is_the_models(scale: float) -> None:
    model = wrap(ROWS[0])
    with pytest.raises(fastattr.ScaleError, match=r"LLaVA-NeXT.*use scales=\(1.0,\)"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(scale,))


PUBLISHED = {  # what directories say of the model beside the settings of pictures; old ones say none of it
    "llava_next_video": {
        "processor_class": "LlavaNextVideoProcessor",
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
    "llava_onevision": {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
    },
}


@pytest.mark.parametrize("said", [True, False], ids=["published", "old"])
@pytest.mark.parametrize("row", ROWS[1:4], ids=lambda row: row.make.__name__)
def test_load(row: Row, said: bool, tmp_path: Path) -> None:
    """Of a directory as on the hub, with the joint class or, without torchvision, its halves joined."""
    held = row.make()
    directory = saved(tmp_path, held, held.processor.image_processor, None)
    if said:
        (directory / "processor_config.json").write_text(json.dumps(PUBLISHED[row.model_type]))
    loaded = fastattr.load(directory)
    assert loaded.takes_videos == is_torchvision_available()
    wrapped = fastattr.wrap(held.hf_model, installed_half(held.processor, directory))
    asked: list[list[Any]] = [[picture(67, 91), picture(30, 200)], [picture(67, 91)]]
    if loaded.takes_videos and row.video:
        asked.append([[picture(SIDE, SIDE, seed) for seed in range(3)]])  # which nobody resizes
    for shown in asked:
        ours, theirs = (fastattr.attribute(each, shown, PROMPT, ANSWER, scales=(1.0,)) for each in (loaded, wrapped))
        assert ours.context_tokens == theirs.context_tokens
        for mine, other in zip(ours.image, theirs.image, strict=True):
            torch.testing.assert_close(mine, other)
