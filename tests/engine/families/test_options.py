"""Options of image processors that change what is shown, with the precedence they have in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import fastattr
from fastattr import adapters
from fastattr.adapters.processors import FilmProcessor
from fastattr.errors import ScaleError, TokenLayoutError
from fastattr.images import read_visuals
from tests.engine.families import tiny_llava, tiny_others, tiny_patches, tiny_qwen, tiny_tiles
from tests.engine.families.proof import prove_places
from tests.engine.families.test_limits import limited
from tests.engine.family_models import ANSWER, PROMPT, Tiny, llava_clip, llava_pixtral, picture


def as_they_are(make: Callable[[], Tiny]) -> fastattr.Model:
    """Its pictures are not resized."""
    held = make()
    held.processor.image_processor.do_resize = False
    return fastattr.wrap(held.hf_model, held.processor)


CROPPED = [llava_clip, tiny_llava.llava_padded, tiny_llava.vip_llava, tiny_others.fast_vlm]


@pytest.mark.parametrize("size", [(67, 91), (64, 96), (20, 50), (33, 21)])
@pytest.mark.parametrize("make", [*CROPPED, tiny_patches.lighton_ocr, llava_pixtral])
def test_parts_cut_off_a_picture_that_is_not_resized_are_not_on_the_map(
    make: Callable[[], Tiny], size: tuple[int, int]
) -> None:
    prove_places(as_they_are(make), *size, 1.0)


@pytest.mark.parametrize("make", [tiny_qwen.qwen2_vl, tiny_qwen.glm4v, tiny_patches.lighton_ocr])
def test_pictures_that_are_not_resized_are_shown_at_every_scale(make: Callable[[], Tiny]) -> None:
    for scale in (1.0, 1.5, 2.0):
        prove_places(as_they_are(make), 64, 96, scale)


def test_a_crop_that_would_hold_more_at_another_scale_is_refused() -> None:
    """32 x 32 pixels of the picture at scale 1, 64 x 64 at scale 2."""
    model = as_they_are(llava_clip)
    with pytest.raises(ScaleError, match=r"shows the part .* at scale 1 and .* at scale 2 .*do_resize=True"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0, 2.0))
    assert fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,)).image[0].max() > 0


@pytest.mark.parametrize(
    ("make", "options", "n_views"),
    [
        (
            tiny_tiles.qianfan_ocr,
            {"max_patches": 2},
            3,
        ),  # 60 x 180 in two tiles and the whole; of six, it would be three
        (tiny_others.aya_vision, {"max_patches": 2}, 3),
        (tiny_others.ovis2, {"crop_to_patches": False}, 0),
        (tiny_tiles.idefics3_tiles, {"size": {"longest_edge": 64}}, 3),  # 1 x 2 tiles of 32 pixels
        (tiny_tiles.idefics3_tiles, {"do_image_splitting": False}, 0),
    ],
)
def test_options_of_loading_are_read_where_transformers_reads_them(
    make: Callable[[], Tiny], options: dict[str, object], n_views: int, tmp_path: Path
) -> None:
    """They are kept with the tokenizer, and take precedence over values set later on the image half."""
    held = make()
    before = {name: getattr(held.processor.image_processor, name) for name in options}
    model = limited(held, tmp_path, **options)
    for name, value in before.items():
        setattr(model.processor.image_processor, name, value)  # changes nothing
    encoded = adapters.encode(model, read_visuals(picture(60, 180)), PROMPT)
    assert len(encoded.groups[0].views) == n_views


class Sampling(FilmProcessor):
    """Shows every second frame, and has no option against it."""

    def __call__(self, text: Any, images: Any = (), return_tensors: str = "pt", videos: Any = ()) -> Any:  # type: ignore[override]
        return super().__call__(text, images, return_tensors, [frames[::2] for frames in videos])


@pytest.mark.parametrize("make", [tiny_qwen.qwen2_vl, tiny_qwen.qwen3_vl, tiny_qwen.glm46v])
def test_frames_that_a_processor_drops_are_an_error(make: Callable[[], Tiny]) -> None:
    held = make()
    parts = {field.name: getattr(held.processor, field.name) for field in fields(held.processor)}
    model = fastattr.wrap(held.hf_model, Sampling(**parts))
    with pytest.raises(TokenLayoutError, match="a video of 8 frames in 2 time steps of 2 frames: it dropped frames"):
        adapters.encode(model, read_visuals([[picture(64, 96, seed) for seed in range(8)]]), PROMPT)
