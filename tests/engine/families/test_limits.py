"""Limits that a user sets on a processor apply at scale 1, and the other scales are relative to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.families import tiny_patches, tiny_qwen
from tests.engine.families.tiny_video import JOINT, real
from tests.engine.family_models import ANSWER, PROMPT, Tiny, llava_pixtral, picture

OLD_NAMES = pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning")  # of transformers
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's own processor

Grids = list[tuple[int, int, int]]
SCALES = (1.0, 1.5, 2.0)


def loaded_with(part: Any, folder: Path, options: dict[str, Any]) -> Any:
    """One half of a processor as `AutoProcessor.from_pretrained(..., **options)` loads each of them."""
    part.save_pretrained(folder)
    return type(part).from_pretrained(folder, **options)


def limited(held: Tiny, folder: Path, **options: Any) -> fastattr.Model:
    processor = held.processor
    for name in ("image_processor", "tokenizer"):
        object.__setattr__(processor, name, loaded_with(getattr(processor, name), folder / name, options))
    return fastattr.wrap(held.hf_model, processor)


def qwen(kind: str) -> Tiny:
    held: Tiny = getattr(tiny_qwen, kind)()
    return Tiny(held.hf_model, real(JOINT[kind], held.processor))


def grids(model: fastattr.Model, shown: Any) -> Grids:
    visuals = read_visuals(shown)
    return [each.groups[0].grid for each in adapters.encode_scales(model, visuals, PROMPT, SCALES)]


# cells have 16 pixels; worked out by hand: with b = sqrt(height * width / limit), floor(height / b / 16) rows of a picture
# that is too large, ceil of one that is too small; then 1.5 and 2 times as many
@OLD_NAMES
@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        # b = 5.41: floor(3.46), floor(4.62)
        ((300, 400), {"max_pixels": 64 * 64}, [(3, 4), (4, 6), (6, 8)]),
        # b = 0.237: ceil(5.28), ceil(7.39)
        ((20, 28), {"min_pixels": 100 * 100}, [(6, 8), (9, 12), (12, 16)]),
        # b = 0.237, then within both
        ((20, 28), {"min_pixels": 100 * 100, "max_pixels": 200 * 200}, [(6, 8), (9, 12), (12, 16)]),
        ((300, 400), {"size": {"shortest_edge": 256, "longest_edge": 64 * 64}}, [(3, 4), (4, 6), (6, 8)]),
        # the processor's own limit of 256 * 256 pixels, b = 9.57: floor(13.06), floor(19.60)
        ((2000, 3000), {}, [(13, 19), (20, 28), (26, 38)]),
        # its own least of 256 pixels, b = 0.370: ceil(0.85), ceil(1.18)
        ((5, 7), {}, [(1, 2), (2, 3), (2, 4)]),
    ],
)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_scales_are_relative_to_what_the_user_allows(
    kind: str, size: tuple[int, int], options: dict[str, Any], expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    model = limited(qwen(kind), tmp_path, **options)
    assert grids(model, picture(*size)) == [(1, *each) for each in expected]


@OLD_NAMES
@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        # Qwen2.5-VL counts the pixels of one frame, b = 5.41
        ("qwen2_5_vl", {"max_pixels": 64 * 64}, [(2, 3, 4), (2, 4, 6), (2, 6, 8)]),
        # Qwen3-VL of all four, b = 10.8: floor(1.73), floor(2.31)
        ("qwen3_vl", {"size": {"shortest_edge": 256, "longest_edge": 64 * 64}}, [(2, 1, 2), (2, 2, 3), (2, 2, 4)]),
    ],
)
def test_videos_too(kind: str, options: dict[str, Any], expected: Grids, tmp_path: Path) -> None:
    model = limited(qwen(kind), tmp_path, **options)
    assert grids(model, [[picture(300, 400, seed) for seed in range(4)]]) == expected


PIXELS = {"max_pixels": 64 * 64}
AREA = {"size": {"shortest_edge": 256, "longest_edge": 64 * 64}}
OF_TWO = {"size": {"shortest_edge": 512, "longest_edge": 2 * 64 * 64}}  # GLM counts both frames of a temporal patch


@OLD_NAMES
@NUMPY
@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (tiny_qwen.qwen2_vl, PIXELS, (3, 4)),
        (lambda: qwen("qwen2_vl"), PIXELS, (3, 4)),
        (tiny_qwen.glm4v, OF_TWO, (3, 4)),
        (lambda: qwen("glm4v"), OF_TWO, (3, 4)),
        (lambda: qwen("glm46v"), OF_TWO, (3, 4)),
        (tiny_patches.paddleocr_vl, PIXELS, (3, 4)),
        (tiny_patches.ernie4_5_vl_moe, AREA, (3, 4)),
        (tiny_patches.hunyuan_vl, PIXELS, (3, 4)),
        (tiny_patches.video_llama_3, PIXELS, (6, 9)),  # cells of 8 pixels
        (tiny_patches.lighton_ocr, {"size": {"longest_edge": 64}}, (3, 4)),  # 48 x 64
        (llava_pixtral, {"size": {"longest_edge": 64}}, (6, 8)),
    ],
)
def test_the_default_explains_at_every_scale(
    make: Callable[[], Tiny], options: dict[str, Any], expected: tuple[int, int], tmp_path: Path
) -> None:
    model = limited(make(), tmp_path, **options)
    why = fastattr.attribute(model, picture(300, 400), PROMPT, ANSWER, evidence=False)
    rows, columns = expected
    assert [grid[0] for grid in why.grids] == [(1, round(rows * s), round(columns * s)) for s in SCALES]


def test_a_limit_changes_nothing_else_at_scale_1(tmp_path: Path) -> None:
    """The model's inputs are those of the processor itself."""
    model = limited(qwen("qwen2_5_vl"), tmp_path, size={"shortest_edge": 256, "longest_edge": 64 * 64})
    shown: Image.Image = picture(300, 400)
    encoded = adapters.encode(model, read_visuals(shown), PROMPT)
    text = model.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}], add_generation_prompt=True
    )
    expected = model.processor(text=[text], images=[shown], return_tensors="pt")
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert (encoded.model_inputs["pixel_values"] == expected["pixel_values"]).all()
