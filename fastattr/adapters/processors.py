"""Loading a processor, also where transformers would demand torchvision for a part that is not needed.

The image half and the tokenizer of these processors load without torchvision; only the joint class
asks for it, for video. `ComposedProcessor` joins the two halves for still images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattr.errors import UnsupportedModelError


@dataclass(frozen=True)
class ComposedProcessor:
    """An image processor and a tokenizer, joined by the text that stands for an image.

    Attributes:
        image_token: the placeholder in the rendered chat.
        expand: `(image inputs, index) -> text` that replaces the placeholder of one image.
    """

    image_processor: Any
    tokenizer: Any
    image_token: str
    expand: Callable[[Any, int], str]

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)

    def __call__(self, text: Sequence[str], images: Sequence[Any], return_tensors: str = "pt", **options: Any) -> Any:
        image_inputs = self.image_processor(list(images), return_tensors=return_tensors, **options)
        pieces = text[0].split(self.image_token)
        if len(pieces) != len(images) + 1:
            raise ValueError(f"the text holds {len(pieces) - 1} image placeholders for {len(images)} images")
        expanded = pieces[0] + "".join(self.expand(image_inputs, i) + piece for i, piece in enumerate(pieces[1:]))
        # the template has written the special tokens already
        encoded = self.tokenizer([expanded], add_special_tokens=False, return_tensors=return_tensors)
        taken = self.image_processor.model_input_names  # what is left over only tells how text is expanded
        encoded.update({name: value for name, value in image_inputs.items() if name in taken})
        return encoded


def load_processor(source: str | Path) -> Any:
    """The model's own processor, or the two halves joined where torchvision is missing.

    Raises:
        UnsupportedModelError: torchvision is missing and this family's halves cannot be joined.
    """
    from transformers import AutoConfig, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source)
        return _complete(processor, source) if getattr(processor, "patch_size", 0) is None else processor
    except (ImportError, ValueError, OSError, TypeError) as error:  # TypeError: transformers 5.0 without torchvision
        from transformers.utils import is_torchvision_available

        if is_torchvision_available():
            raise
        model_type = AutoConfig.from_pretrained(source).model_type
        compose = _COMPOSE.get(model_type)
        if compose is None:
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(
                f"the processor of {str(source)!r} ({model_type}) cannot be loaded without torchvision ({reason}); install "
                "torchvision, or pass your own processor to wrap"
            ) from error
        return compose(source)


def _complete(processor: Any, source: str | Path) -> Any:
    """Old LLaVA directories leave out what the processor must know of its model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    if config.vision_config.model_type == "pixtral":
        return _pixtral(source)
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1 if config.vision_feature_select_strategy == "default" else 0
    return processor


def _images(source: str | Path, **options: Any) -> Any:
    # not from the top of transformers, which between 5.0 and 5.23 asks for torchvision before it looks
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, **options)


def _tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


def _qwen(source: str | Path) -> ComposedProcessor:
    image_processor = _images(source)
    token = "<|image_pad|>"

    def expand(inputs: Any, index: int) -> str:
        return token * int(inputs["image_grid_thw"][index].prod() // image_processor.merge_size**2)

    return ComposedProcessor(image_processor, _tokenizer(source), token, expand)


def _pixtral(source: str | Path) -> ComposedProcessor:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    merge = getattr(config, "spatial_merge_size", 1)
    cell = config.vision_config.patch_size * merge
    image_processor = _images(source, patch_size={"height": cell, "width": cell})
    token = "[IMG]"

    def expand(inputs: Any, index: int) -> str:
        height, width = (int(side) // cell for side in inputs["image_sizes"][index])
        return "[IMG_BREAK]".join([token * width] * height) + "[IMG_END]"

    return ComposedProcessor(image_processor, _tokenizer(source), token, expand)


def _smolvlm(source: str | Path) -> ComposedProcessor:
    image_processor = _images(source)
    token, around = "<image>", "<fake_token_around_image>"

    def expand(inputs: Any, index: int) -> str:
        return f"{around}<global-img>{token}{around}"  # one placeholder: `encode` gives it as many as the grid needs

    return ComposedProcessor(image_processor, _tokenizer(source), token, expand)


def _internvl(source: str | Path) -> ComposedProcessor:
    image_processor = _images(source)
    token = "<IMG_CONTEXT>"

    def expand(inputs: Any, index: int) -> str:
        return f"<img>{token}</img>"

    return ComposedProcessor(image_processor, _tokenizer(source), token, expand)


_COMPOSE: dict[str, Callable[[str | Path], ComposedProcessor]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "llava": _pixtral,
    "mistral3": _pixtral,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
}
