"""Loading a processor, also where transformers would demand torchvision for a part that is not needed.

The image half and the tokenizer of these processors load without torchvision; only the joint class
asks for it, for video. `ComposedProcessor` joins the two halves for still images, `FilmProcessor` makes videos from
them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastattr.adapters.films import Limits, film_patches, frame_size, step_seconds
from fastattr.errors import UnsupportedModelError
from fastattr.video import Timing

_COUNTS = ("num_crops", "num_soft_tokens_per_image")  # named among the model's inputs and not taken by it


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from.

    Attributes:
        name: a directory or a hub id.
        options: for every `from_pretrained`: `trust_remote_code`, `revision`.
    """

    name: str | Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, auto_class: Any, **options: Any) -> Any:
        return auto_class.from_pretrained(self.name, **self.options, **options)


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
        n_images = sum(len(each) if isinstance(each, list) else 1 for each in images)  # they may be nested
        pieces = text[0].split(self.image_token)
        if len(pieces) != n_images + 1:
            raise ValueError(f"the text holds {len(pieces) - 1} image placeholders for {n_images} images")
        expanded = pieces[0] + "".join(self.expand(image_inputs, i) + piece for i, piece in enumerate(pieces[1:]))
        encoded = _encoded(self.tokenizer, expanded, return_tensors)
        taken = self.image_processor.model_input_names  # what is left over only tells how text is expanded
        encoded.update({name: value for name, value in image_inputs.items() if name in taken and name not in _COUNTS})
        return encoded


def _encoded(tokenizer: Any, text: str, return_tensors: str) -> Any:
    """A rendered chat as transformers' processors encode it: with the tokenizer's own special tokens (Vicuna's templates
    do not write the first one), unless the chat begins with its `bos_token`."""
    written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer([text], add_special_tokens=not written, return_tensors=return_tensors)


@dataclass(frozen=True)
class FilmStyle:
    """How a family shows videos.

    Attributes:
        token: the placeholder in the rendered chat.
        write: `(tokens of a time step, (first, last) seconds of every step) -> text` that replaces it.
        limits: pixels by default, at least and at most.
        counts_all: they count the pixels of all frames together, rather than of one frame.
        paced: the model is told the seconds between steps.
        reads_pixels: `min_pixels` and `max_pixels` of a directory come before its `size`; the others know only `size`.
    """

    token: str
    write: Callable[[int, Sequence[tuple[float, float]]], str]
    limits: Limits
    counts_all: bool = True
    paced: bool = False
    reads_pixels: bool = False


@dataclass(frozen=True)
class FilmProcessor(ComposedProcessor):
    """One that reads videos too, as lists of frames. All of them are shown, none is sampled.

    Attributes:
        style: how the family shows videos.
        limits: pixels of a video, at least and at most.
        frames_per_second: of videos without that metadata; 24 is the default of transformers.
    """

    style: FilmStyle
    limits: Limits
    frames_per_second: float = 24.0

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Any] = (),
        return_tensors: str = "pt",
        videos: Sequence[Sequence[Any]] = (),
        do_sample_frames: bool = False,
        video_metadata: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Any:
        if do_sample_frames:
            raise ValueError("do_sample_frames is True, but all frames are shown; pass the ones to be shown")
        shown: dict[str, Any] = {}
        if images:
            shown |= self.image_processor(list(images), return_tensors=return_tensors, **options)
        stills = [self.expand(shown, i) for i in range(len(images))]
        timings = [self._timing(frames, video_metadata[i] if video_metadata else {}) for i, frames in enumerate(videos)]
        films = [
            self._read(frames, options.get("size"), timing.seconds)
            for frames, timing in zip(videos, timings, strict=True)
        ]
        if films:
            shown["pixel_values_videos"] = torch.cat([patches for patches, _, _ in films])
            shown["video_grid_thw"] = torch.tensor([grid for _, grid, _ in films], device="cpu")
            if self.style.paced:
                depth = self.image_processor.temporal_patch_size
                paces = [depth / timing.sampled_fps for timing in timings]
                shown["second_per_grid_ts"] = torch.tensor(paces, dtype=torch.float32, device="cpu")
        marks = {self.image_token: iter(stills), self.style.token: iter([written for _, _, written in films])}
        pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text[0])
        for mark, given, what in ((self.image_token, images, "images"), (self.style.token, videos, "videos")):
            if pieces.count(mark) != len(given):
                raise ValueError(f"the text holds {pieces.count(mark)} placeholders {mark} for {len(given)} {what}")
        expanded = "".join(next(marks[piece]) if piece in marks else piece for piece in pieces)
        encoded = _encoded(self.tokenizer, expanded, return_tensors)
        encoded.update(shown)
        return encoded

    def _timing(self, frames: Sequence[Any], said: Mapping[str, Any]) -> Timing:
        indices = said.get("frames_indices") or range(len(frames))
        return Timing(
            said.get("fps") or self.frames_per_second, tuple(indices), said.get("total_num_frames") or len(frames)
        )

    def _read(self, frames: Sequence[Any], size: Any, seconds: Sequence[float]) -> tuple[torch.Tensor, list[int], str]:
        """Patches, their grid, and the text of one video."""
        images = self.image_processor
        limits = self.limits if size is None else (size["shortest_edge"], size["longest_edge"])
        cell = images.patch_size * images.merge_size
        width, height = frames[0].size
        patches, grid = film_patches(
            images,
            frames,
            frame_size((height, width), len(frames), cell, limits, counts_all=self.style.counts_all),
        )
        steps = step_seconds(seconds, images.temporal_patch_size)
        return patches, grid, self.style.write(grid[1] * grid[2] // images.merge_size**2, steps)


def load_processor(name: str | Path, **options: Any) -> Any:
    """The model's own processor, or the two halves joined where torchvision is missing.

    Args:
        options: for `from_pretrained`: `trust_remote_code`, `revision`.

    Raises:
        UnsupportedModelError: torchvision is missing and this family's halves cannot be joined.
    """
    from transformers import AutoConfig

    source = Source(name, options)
    try:
        processor = _joint(source)
        if type(processor).__name__ == "PaliGemmaProcessor" and processor.chat_template is None:
            processor.chat_template = _AS_SAID.replace("IMAGE", processor.image_token)
        return _complete(processor, source)
    except (ImportError, ValueError, OSError, TypeError, RecursionError) as error:
        # TypeError: transformers 5.0 without torchvision; RecursionError: see `_joint`
        from transformers.utils import is_torchvision_available

        if is_torchvision_available():
            raise
        model_type = source.load(AutoConfig).model_type
        compose = _COMPOSE.get(model_type)
        if compose is None:
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(
                f"the processor of {str(name)!r} ({model_type}) cannot be loaded without torchvision ({reason}); install "
                "torchvision, or pass your own processor to wrap"
            ) from error
        return compose(source)


def _joint(source: Source) -> Any:
    """The joint processor, as `AutoProcessor` loads it.

    LLaVA-NeXT-Video directories that have no video settings are loaded part by part: transformers derives the name of
    the video processor from `LlavaNextImageProcessor`, gets `LlavaNextVideoProcessor`, which is the joint class itself,
    and recurses.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        return source.load(AutoProcessor)
    except RecursionError:
        if not is_torchvision_available() or source.load(AutoConfig).model_type != "llava_next_video":
            raise
    from transformers import LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    settings, _ = LlavaNextVideoProcessor.get_processor_dict(source.name, **source.options)
    parts = [source.load(LlavaNextVideoVideoProcessor), _images(source), _tokenizer(source)]
    return LlavaNextVideoProcessor.from_args_and_dict(parts, settings)


# PaliGemma was taught no turns, only pictures and a text, so its directories have no chat template
_AS_SAID = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def _complete(processor: Any, source: Source) -> Any:
    """Sets what old LLaVA directories leave out: `patch_size`, or for LLaVA-OneVision `num_image_tokens`."""
    from transformers import AutoConfig

    no_patch_size, no_count = (getattr(processor, name, 0) is None for name in ("patch_size", "num_image_tokens"))
    if not no_patch_size and not no_count:
        return processor
    config = source.load(AutoConfig)
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return _pixtral(source)
    strategy = getattr(config, "vision_feature_select_strategy", "default")  # ViP-LLaVA always drops the class token
    processor.vision_feature_select_strategy = strategy
    if no_patch_size:
        processor.patch_size = vision.patch_size
        processor.num_additional_image_tokens = 1 if strategy == "default" else 0
    else:
        processor.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        processor.vision_aspect_ratio = config.vision_aspect_ratio
    return processor


def _images(source: Source, **options: Any) -> Any:
    # not from the top of transformers, which between 5.0 and 5.23 asks for torchvision before it looks
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return source.load(AutoImageProcessor, **options)


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    return source.load(AutoTokenizer)


def grid_tokens(image_processor: Any, token: str) -> Callable[[Any, int], str]:
    def expand(inputs: Any, index: int) -> str:
        return token * int(inputs["image_grid_thw"][index].prod() // image_processor.merge_size**2)

    return expand


def _film_limits(source: Source, style: FilmStyle) -> Limits:
    """Those a model's directory gives for videos, or for everything it is shown, in place of the family's."""
    from transformers.video_processing_utils import BaseVideoProcessor

    said, _ = BaseVideoProcessor.get_video_processor_dict(source.name, **source.options)
    size = said.get("size") or {}
    least, most = size.get("shortest_edge") or style.limits[0], size.get("longest_edge") or style.limits[1]
    if style.reads_pixels:
        least, most = said.get("min_pixels") or least, said.get("max_pixels") or most
    return least, most


def _films(style: FilmStyle, token: str) -> Callable[[Source], FilmProcessor]:
    """Processors whose pictures are grids of patches, for still images and videos."""

    def compose(source: Source) -> FilmProcessor:
        images = _images(source)
        limits = _film_limits(source, style)
        return FilmProcessor(images, _tokenizer(source), token, grid_tokens(images, token), style, limits)

    return compose


def _stills(token: str) -> Callable[[Source], ComposedProcessor]:
    """Processors whose pictures are grids of patches, for still images alone."""

    def compose(source: Source) -> ComposedProcessor:
        images = _images(source)
        return ComposedProcessor(images, _tokenizer(source), token, grid_tokens(images, token))

    return compose


def _plain_steps(n_tokens: int, seconds: Sequence[tuple[float, float]]) -> str:
    return "<|video_pad|>" * n_tokens * len(seconds)


def _timed_steps(n_tokens: int, seconds: Sequence[tuple[float, float]]) -> str:
    """Qwen3-VL writes when the middle of each step is."""
    step = f"<|vision_start|>{'<|video_pad|>' * n_tokens}<|vision_end|>"
    return "".join(f"<{(first + last) / 2:.1f} seconds>{step}" for first, last in seconds)


def _glm_steps(when: Callable[[float], str]) -> Callable[[int, Sequence[tuple[float, float]]], str]:
    """GLM-4V shows a step as an image and writes behind it when it began."""

    def write(n_tokens: int, seconds: Sequence[tuple[float, float]]) -> str:
        step = f"<|begin_of_image|>{'<|image|>' * n_tokens}<|end_of_image|>"
        return "".join(step + when(first) for first, _ in seconds)

    return write


QWEN2_FILMS = FilmStyle("<|video_pad|>", _plain_steps, (128 * 28**2, 768 * 28**2), counts_all=False, reads_pixels=True)
QWEN2_5_FILMS = replace(QWEN2_FILMS, paced=True)
QWEN3_FILMS = FilmStyle("<|video_pad|>", _timed_steps, (128 * 32**2, 768 * 32**2))
GLM_FILMS = FilmStyle("<|video|>", _glm_steps(lambda first: str(int(first))), (112**2, 60_000 * 28**2))
GLM46_FILMS = replace(GLM_FILMS, write=_glm_steps(lambda first: f"{first:.1f} seconds"))


def _pixtral(source: Source) -> ComposedProcessor:
    from transformers import AutoConfig

    config = source.load(AutoConfig)
    merge = getattr(config, "spatial_merge_size", 1)
    cell = config.vision_config.patch_size * merge
    image_processor = _images(source, patch_size={"height": cell, "width": cell})
    token = "[IMG]"

    def expand(inputs: Any, index: int) -> str:
        height, width = (int(side) // cell for side in inputs["image_sizes"][index])
        return "[IMG_BREAK]".join([token * width] * height) + "[IMG_END]"

    return ComposedProcessor(image_processor, _tokenizer(source), token, expand)


def _smolvlm(source: Source) -> ComposedProcessor:
    return join_smolvlm(_images(source, return_row_col_info=True), _tokenizer(source))


def join_smolvlm(image_processor: Any, tokenizer: Any) -> ComposedProcessor:
    """Of Idefics3 and SmolVLM; the image half must return rows and columns of tiles."""
    token, around = "<image>", "<fake_token_around_image>"
    whole = (
        f"{around}<global-img>{token}{around}"  # one placeholder a tile: `encode` gives it as many as its grid needs
    )

    def expand(inputs: Any, index: int) -> str:
        rows, columns = (inputs[name][0][index] for name in ("rows", "cols"))
        tiles = [
            "".join(f"{around}<row_{row + 1}_col_{column + 1}>{token}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join([*tiles, "\n", whole] if tiles else [whole])

    return ComposedProcessor(image_processor, tokenizer, token, expand)


def _internvl(source: Source) -> ComposedProcessor:
    return join_internvl(
        _images(source, crop_to_patches=True), _tokenizer(source)
    )  # the joint class cuts, whatever is saved


def join_internvl(image_processor: Any, tokenizer: Any) -> ComposedProcessor:
    """Of InternVL."""
    token = "<IMG_CONTEXT>"

    def expand(inputs: Any, index: int) -> str:
        return f"<img>{token * int(inputs['num_patches'][index])}</img>"  # one placeholder a tile

    return ComposedProcessor(image_processor, tokenizer, token, expand)


def _llava_next(source: Source) -> ComposedProcessor:
    """LLaVA-NeXT-Video and LLaVA-OneVision, for still images alone."""
    token = "<image>"

    def expand(inputs: Any, index: int) -> str:
        return token * 2  # one placeholder a look, at the whole and at the mosaic of tiles

    return ComposedProcessor(_images(source), _tokenizer(source), token, expand)


def _gemma4(source: Source) -> ComposedProcessor:
    return join_gemma4(_images(source), _tokenizer(source))


def join_gemma4(image_processor: Any, tokenizer: Any) -> ComposedProcessor:
    """Of Gemma 4, without sound."""

    def expand(inputs: Any, index: int) -> str:
        n_tokens = int(inputs["num_soft_tokens_per_image"][index])
        return f"{tokenizer.boi_token}{tokenizer.image_token * n_tokens}{tokenizer.eoi_token}"

    return ComposedProcessor(image_processor, tokenizer, tokenizer.image_token, expand)


def _minicpm(source: Source) -> ComposedProcessor:
    return join_minicpm(_images(source), _tokenizer(source))


def join_minicpm(image_processor: Any, tokenizer: Any) -> ComposedProcessor:
    """Of MiniCPM-V 4.6 and 4.7."""
    token = tokenizer.image_token

    def expand(inputs: Any, index: int) -> str:
        n_looks = [int(n) for n in inputs["num_patches_per_image"]]
        first = sum(n_looks[:index])
        per_token = 4 if image_processor.downsample_mode == "4x" else 16
        counts = [int(h * w) // per_token for h, w in inputs["target_sizes"][first : first + n_looks[index]]]
        _, columns = inputs["grids"][index]
        slices = [f"{tokenizer.slice_start_token}{token * n}{tokenizer.slice_end_token}" for n in counts[1:]]
        lines = ["".join(slices[i : i + columns]) for i in range(0, len(slices), columns or 1)]
        number = f"{tokenizer.image_id_start_token}{index}{tokenizer.image_id_end_token}"
        whole = f"{tokenizer.image_start_token}{token * counts[0]}{tokenizer.image_end_token}"
        return (number if image_processor.use_image_id else "") + whole + "\n".join(lines)

    return ComposedProcessor(image_processor, tokenizer, token, expand)


_COMPOSE: dict[str, Callable[[Source], ComposedProcessor]] = {
    "qwen2_vl": _films(QWEN2_FILMS, "<|image_pad|>"),
    "qwen2_5_vl": _films(QWEN2_5_FILMS, "<|image_pad|>"),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _films(QWEN3_FILMS, "<|image_pad|>")
    ),
    "exaone4_5": _films(QWEN2_FILMS, "<|image_pad|>"),
    "video_llama_3": _stills("<|image_pad|>"),
    **dict.fromkeys(("glm4v", "glm4v_moe"), _films(GLM_FILMS, "<|image|>")),
    **dict.fromkeys(("glm46v", "glm_ocr"), _films(GLM46_FILMS, "<|image|>")),
    "llava": _pixtral,
    "mistral3": _pixtral,
    "mistral_large4": _pixtral,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "llava_next_video": _llava_next,
    "llava_onevision": _llava_next,
    "gemma4": _gemma4,
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), _minicpm),
}
