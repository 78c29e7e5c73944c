"""Tiny Llama 4, whose image processor needs torchvision: its choice of tiles is the real one, the rest is done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.utils import is_torchvision_available

from tests.engine import family_models as tiny
from tests.engine.families.borrowed import borrow
from tests.engine.family_models import DIM, PATCH, Tiny

TILE = 4 * PATCH  # pixels; 2 x 2 tokens

REAL = borrow(
    "transformers.models.llama4.image_processing_llama4",
    "get_factors",
    "get_max_res_without_distortion",
    "find_supported_resolutions",
    "get_best_fit",
)


class LaidTiles(PilBackend):  # type: ignore[misc]
    """Lays a picture into the upper left of its tiles, cuts them, and puts the whole behind."""

    model_input_names = ("pixel_values",)
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    resample = PILImageResampling.BILINEAR
    image_mean = image_std = (0.5, 0.5, 0.5)
    size = {"height": TILE, "width": TILE}  # noqa: RUF012  (as transformers writes it)
    max_patches = 6
    resize_to_max_canvas = False

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, return_tensors: str, **options: Any) -> Any:
        tiles: list[np.ndarray] = []
        ratios: list[tuple[int, int]] = []
        for image in images:
            rows, columns, laid = self.lay(image, size)
            whole = self.resize(image, size, PILImageResampling.BILINEAR)
            edge = size.height
            cut = [
                laid[:, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge]
                for row in range(rows)
                for column in range(columns)
            ]
            tiles += cut if len(cut) == 1 else [*cut, whole]
            ratios.append((rows, columns))
        pixels = np.stack(tiles).astype(np.float32) / 127.5 - 1
        data = {"pixel_values": pixels, "aspect_ratios": ratios}
        return transformers.BatchFeature(data, tensor_type=return_tensors)

    def lay(self, image: np.ndarray, size: SizeDict) -> tuple[int, int, np.ndarray]:
        """Rows, columns, and the pixels of all tiles."""
        import torch

        shape = image.shape[-2:]
        choices = torch.tensor(REAL["find_supported_resolutions"](self.max_patches, size))
        height, width = REAL["get_best_fit"](shape, choices, self.resize_to_max_canvas).tolist()
        room = (height, width)
        if not self.resize_to_max_canvas:
            room = (min(max(shape[0], size.height), height), min(max(shape[1], size.height), width))
        inner = REAL["get_max_res_without_distortion"](shape, room)
        resized = self.resize(image, SizeDict(height=inner[0], width=inner[1]), PILImageResampling.BILINEAR)
        laid = np.zeros((3, height, width), resized.dtype)
        laid[:, : inner[0], : inner[1]] = resized
        return height // size.height, width // size.width, laid


def laid_tiles(stretch: bool) -> Any:
    """The real image processor where it is."""
    if not is_torchvision_available():
        return LaidTiles(resize_to_max_canvas=stretch)
    return transformers.Llama4ImageProcessor(size=LaidTiles.size, max_patches=6, resize_to_max_canvas=stretch)


SPECIAL = (
    "<|begin_of_text|>",
    "<|eot|>",
    "<|image|>",
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|header_start|>",
    "<|header_end|>",
)


def llama4(*, stretch: bool = False, mended: bool = True) -> Tiny:
    """With the real `Llama4Processor`.

    The class of transformers 5.24.0 reads `image_outputs` of its text model's output, which has none, and so fails in
    every forward. `mended` puts one there; where the class does not read it, that changes nothing.
    """
    chat = tiny._chat(
        "<|begin_of_text|><|header_start|>{{ message['role'] }}<|header_end|>\\n\\n",
        "<|image|>",
        "<|eot|>",
        "<|header_start|>assistant<|header_end|>\\n\\n",
    )
    tokenizer = tiny.byte_tokenizer(
        SPECIAL, chat, bos_token="<|begin_of_text|>", eos_token="<|eot|>", pad_token="<|eot|>"
    )
    images = laid_tiles(stretch)
    processor = transformers.Llama4Processor(images, tokenizer, patch_size=PATCH, chat_template=chat)
    text = tiny._llama(
        384, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64, no_rope_layers=[1, 0]
    )
    text.pop("model_type")
    text["pad_token_id"] = 1
    config = transformers.Llama4Config(
        vision_config=tiny._tower(
            image_size=TILE,
            patch_size=PATCH,
            vision_output_dim=DIM,
            projector_input_dim=DIM,
            projector_output_dim=DIM,
            intermediate_size=4 * DIM,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )
    held = Tiny(tiny._finish(transformers.Llama4ForConditionalGeneration, config), processor)
    if mended:
        held.hf_model.language_model.register_forward_hook(_without_images)
    return held


def _without_images(_module: Any, _inputs: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def llama4_stretched() -> Tiny:
    """With `resize_to_max_canvas`."""
    return llama4(stretch=True)
