"""What differs between model families: how image tokens lie on the picture, and how to show it larger.

A family is three facts. `grids` reads the token grid of every image from the model's inputs. `cell`
is the side in pixels of the square one image token covers. `enlarge` gives the processor options
that lift its size limit for one call, or None where the architecture fixes the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastattr.errors import TokenLayoutError, UnsupportedModelError
from fastattr.types import WHOLE_IMAGE, Box, Grid

Inputs = Mapping[str, Tensor]
Config = Any  # a transformers configuration
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Family:
    """How one kind of model sees images.

    Attributes:
        name: what people call it.
        grids: `(config, inputs) -> [(t, h, w), ...]`.
        cell: `config -> pixels`, the side of the square one image token covers.
        enlarge: `(processor, size) -> options` for showing an image at `size`; None if it cannot be.
        always: processor options used at every scale.
        interpolates: the vision tower must be told to interpolate its position embeddings.
        crops: whether the processor may keep the centre only, see `extent_of`.
        token_types: the name of the model input that marks image tokens, where the model needs it.
    """

    name: str
    grids: Callable[[Config, Inputs], list[Grid]]
    cell: Callable[[Config], int]
    enlarge: Callable[[Any, Size], dict[str, Any]] | None
    always: Mapping[str, Any] | None = None
    interpolates: bool = False
    crops: bool = False
    token_types: str | None = None


def _merge(config: Config) -> int:
    holder = config if hasattr(config, "spatial_merge_size") else config.vision_config
    return int(getattr(holder, "spatial_merge_size", 1))


def _side(value: Any) -> int:
    """A patch or image size, which some configurations give as a pair."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _patch(config: Config) -> int:
    return _side(config.vision_config.patch_size)


def _merged_patch(config: Config) -> int:
    return _patch(config) * _merge(config)


# --- grids, read from the inputs -------------------------------------------------------------------


def _grids_from_thw(config: Config, inputs: Inputs) -> list[Grid]:
    merge = _merge(config)
    return [(t, h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]


def _grids_from_sizes(config: Config, inputs: Inputs) -> list[Grid]:
    cell = _merged_patch(config)
    return [(1, height // cell, width // cell) for height, width in inputs["image_sizes"].tolist()]


def _grids_from_pixels(cell: Callable[[Config], int]) -> Callable[[Config, Inputs], list[Grid]]:
    def grids(config: Config, inputs: Inputs) -> list[Grid]:
        pixels = inputs["pixel_values"]
        height, width = pixels.shape[-2:]
        images = math.prod(pixels.shape[:-3])
        return [(1, height // cell(config), width // cell(config))] * images

    return grids


def _llava_grids(config: Config, inputs: Inputs) -> list[Grid]:
    return _grids_from_sizes(config, inputs) if "image_sizes" in inputs else _grids_from_pixels(_patch)(config, inputs)


def _fixed_square(config: Config, inputs: Inputs) -> list[Grid]:
    side = math.isqrt(config.mm_tokens_per_image)
    return [(1, side, side)] * math.prod(inputs["pixel_values"].shape[:-3])


# --- one token's side in pixels --------------------------------------------------------------------


def _idefics_cell(config: Config) -> int:
    return _patch(config) * int(config.scale_factor)


def _internvl_cell(config: Config) -> int:
    return round(_patch(config) / config.downsample_ratio)


def _gemma_cell(config: Config) -> int:
    return _side(config.vision_config.image_size) // math.isqrt(config.mm_tokens_per_image)


# --- lifting the processor's limit -----------------------------------------------------------------


def _longest_edge(processor: Any, size: Size) -> dict[str, Any]:
    return {"size": {"longest_edge": max(size)}}


def _pixel_budget(processor: Any, size: Size) -> dict[str, Any]:
    area = size[0] * size[1]
    return {"size": {"shortest_edge": min(area, 56 * 56), "longest_edge": max(2 * area, 56 * 56)}}


def _square_crop(processor: Any, size: Size) -> dict[str, Any]:
    square = {"height": max(size), "width": max(size)}
    if not _keeps_centre(processor):
        return {"size": square}
    return {"size": {"shortest_edge": max(size)}, "crop_size": square}


def _image_half(processor: Any) -> Any:
    return getattr(processor, "image_processor", None)


def _keeps_centre(processor: Any) -> bool:
    """Whether the shorter side is resized and the centre cropped, as in LLaVA-1.5, rather than everything squeezed.

    A processor that does not show its image half is taken to crop.
    """
    images = _image_half(processor)
    if images is None:
        return True
    return bool(getattr(images, "do_center_crop", False)) and "shortest_edge" in images.size


def _square_tile(processor: Any, size: Size) -> dict[str, Any]:
    return {"size": {"height": max(size), "width": max(size)}}


def _idefics_tile(processor: Any, size: Size) -> dict[str, Any]:
    side = max(size)
    return {"size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}}


# --- the table -------------------------------------------------------------------------------------

_QWEN = Family("Qwen2-VL, Qwen2.5-VL", _grids_from_thw, _merged_patch, _pixel_budget, token_types="mm_token_type_ids")
_PIXTRAL = Family("LLaVA with Pixtral, Mistral3", _grids_from_sizes, _merged_patch, _longest_edge)
_CLIP = Family("LLaVA-1.5", _llava_grids, _patch, _square_crop, interpolates=True, crops=True)
_IDEFICS = Family(
    "Idefics3, SmolVLM",
    _grids_from_pixels(_idefics_cell),
    _idefics_cell,
    _idefics_tile,
    always={"do_image_splitting": False},
)
_INTERNVL = Family(
    "InternVL",
    _grids_from_pixels(_internvl_cell),
    _internvl_cell,
    _square_tile,
    always={"crop_to_patches": False},
)
_GEMMA = Family("Gemma3", _fixed_square, _gemma_cell, None, token_types="token_type_ids")

FAMILIES: Mapping[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "llava": _CLIP,
    "mistral3": _PIXTRAL,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _INTERNVL,
    "gemma3": _GEMMA,
}


def family_of(config: Config) -> Family:
    """The family of a model's configuration.

    Raises:
        UnsupportedModelError: no family is known for its `model_type`, or it reads no images.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no vision_config: it reads no images, so there is nothing to map onto. "
            f"Known families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"no adapter is known for model_type {model_type!r}, expected one of {', '.join(FAMILIES)}. Models of other "
            "forms can be explained from their hidden states with attribute_states"
        )
    if model_type == "llava" and config.vision_config.model_type == "pixtral":
        return _PIXTRAL
    return family


def grids_of(family: Family, config: Config, inputs: Inputs) -> list[Grid]:
    """The grid of every image in the model's inputs, in order.

    Raises:
        TokenLayoutError: the inputs lack what the grid is read from.
    """
    try:
        return family.grids(config, inputs)
    except KeyError as missing:
        raise TokenLayoutError(
            f"{family.name} reads its grids from {missing}, but the model's inputs are {', '.join(inputs) or 'empty'}: "
            "the processor must return what the model takes, as tensors, and the prompt must show an image"
        ) from missing


def extent_of(family: Family, processor: Any, size: Size) -> Box:
    """The part of a picture of `size` that its grid covers.

    Raises:
        UnsupportedModelError: the processor pads pictures, so that the grid covers more than the picture.
    """
    height, width = size
    if not family.crops or height == width:
        return WHOLE_IMAGE
    if getattr(_image_half(processor), "do_pad", None):
        raise UnsupportedModelError(
            f"{type(processor).__name__} pads pictures to a square, expected one that crops or squeezes them; turn "
            "do_pad off, or pad the picture yourself"
        )
    if not _keeps_centre(processor):
        return WHOLE_IMAGE
    side = min(height, width)
    return ((1 - side / width) / 2, (1 - side / height) / 2, (1 + side / width) / 2, (1 + side / height) / 2)
