"""Tiny LFM2-VL, whose image processor needs torchvision: its choice of tiles and sizes is the real one, the rest is done
by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from tests.engine import family_models as tiny
from tests.engine.families.borrowed import borrow
from tests.engine.family_models import DIM, PATCH, Tiny

TILE = 4 * PATCH  # pixels; 2 x 2 tokens

REAL = borrow(
    "transformers.models.lfm2_vl.image_processing_lfm2_vl",
    "round_by_factor",
    "find_closest_aspect_ratio",
    "_target_ratios",
    "_get_grid_layout",
    "smart_resize",
    "_is_image_too_large",
)


class Options(ImagesKwargs, total=False):  # type: ignore[misc, call-arg]
    return_row_col_info: bool


class NaturalTiles(PilBackend):  # type: ignore[misc]
    """Patches of every tile and of the whole, padded to one length."""

    valid_kwargs = Options
    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    do_resize = do_rescale = do_normalize = do_convert_rgb = do_image_splitting = use_thumbnail = True
    resample = PILImageResampling.BILINEAR
    size = {"height": TILE, "width": TILE}  # noqa: RUF012  (as transformers writes it)
    image_mean = image_std = (0.5, 0.5, 0.5)
    downsample_factor = 2
    min_tiles, max_tiles, tile_size, encoder_patch_size = 2, 6, TILE, PATCH
    min_image_tokens, max_image_tokens, max_pixels_tolerance = 4, 8, 1.5
    _target_ratios, _get_grid_layout = REAL["_target_ratios"], REAL["_get_grid_layout"]
    smart_resize, _is_image_too_large = REAL["smart_resize"], REAL["_is_image_too_large"]

    def _preprocess(self, images: list[np.ndarray], return_tensors: str, **options: Any) -> Any:
        shown: list[np.ndarray] = []
        rows: list[int] = []
        columns: list[int] = []
        sizes: list[tuple[int, int]] = []
        limit = {"max_image_tokens": 8, "encoder_patch_size": PATCH, "downsample_factor": 2}
        for image in images:
            height, width = image.shape[-2:]
            wide, high = self.smart_resize(height, width, min_image_tokens=4, **limit)
            across = down = 1
            if self._is_image_too_large(height, width, max_pixels_tolerance=1.5, **limit):
                across, down, *_ = self._get_grid_layout(height, width, self.min_tiles, self.max_tiles, TILE)
                laid = self._sized(image, down * TILE, across * TILE)
                shown += [
                    laid[:, y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
                    for y in range(down)
                    for x in range(across)
                ]
            shown.append(self._sized(image, high, wide))
            rows.append(down)
            columns.append(across)
            sizes.append((high, wide))
        most = max(8 * 4, (TILE // PATCH) ** 2)
        data = {
            "pixel_values": torch.stack([_padded(_patches(each), most) for each in shown]),
            "pixel_attention_mask": torch.stack(
                [_padded(torch.ones(len(_patches(each)), dtype=torch.long), most) for each in shown]
            ),
            "spatial_shapes": torch.tensor([[length // PATCH for length in each.shape[-2:]] for each in shown]),
            "image_rows": rows,
            "image_cols": columns,
            "image_sizes": sizes,
        }
        return transformers.BatchFeature(data)

    def _sized(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        return self.resize(image, SizeDict(height=height, width=width), PILImageResampling.BILINEAR) / 127.5 - 1


def _patches(image: np.ndarray) -> torch.Tensor:
    """`[patch pixel]`, row by row."""
    shown = torch.from_numpy(image).float().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
    return shown.permute(1, 2, 3, 4, 0).reshape(-1, PATCH * PATCH * 3)


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def natural_tiles() -> Any:
    """The real image processor where it is."""
    if not is_torchvision_available():
        return NaturalTiles()
    return transformers.Lfm2VlImageProcessor(
        size=NaturalTiles.size,
        min_tiles=2,
        max_tiles=6,
        tile_size=TILE,
        encoder_patch_size=PATCH,
        min_image_tokens=4,
        max_image_tokens=8,
        max_pixels_tolerance=1.5,
    )


SPECIAL = (
    "<|startoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
)


def lfm2_vl() -> Tiny:
    """With the real `Lfm2VlProcessor` and a decoder of one convolution and one attention layer."""
    chat = tiny._chat(
        "<|startoftext|><|im_start|>{{ message['role'] }}\\n", "<image>", "<|im_end|>\\n", "<|im_start|>assistant\\n"
    )
    tokenizer = tiny.byte_tokenizer(
        SPECIAL, chat, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    processor = transformers.Lfm2VlProcessor(natural_tiles(), tokenizer, chat_template=chat)
    text = tiny._llama(384, model_type="lfm2", layer_types=["conv", "full_attention"], pad_token_id=2)
    config = transformers.Lfm2VlConfig(
        vision_config=tiny._tower(
            model_type="siglip2_vision_model", patch_size=PATCH, num_patches=16, vision_use_head=False
        ),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=DIM,
    )
    return Tiny(tiny._local(tiny._finish(transformers.Lfm2VlForConditionalGeneration, config)), processor)
