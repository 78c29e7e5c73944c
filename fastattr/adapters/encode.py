"""Pictures and text to model inputs and a token layout, at any image scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastattr.adapters.families import extent_of, grids_of
from fastattr.adapters.hooks import unwrap_peft
from fastattr.adapters.model import Model, accepts
from fastattr.errors import ImageError, InputError, ScaleError, TokenLayoutError
from fastattr.images import Visual
from fastattr.text import decode_tokens
from fastattr.types import Box, Grid, ImageGroup, TokenLayout

MAX_IMAGE_TOKENS = 65_536


@dataclass(frozen=True)
class EncodedExample:
    """A prompt ready for the model, without a response yet.

    Attributes:
        input_ids: int `[seq]`, on the model's device.
        model_inputs: everything else the model takes, batch of one.
        groups: image tokens, one group per image or video.
        prompt: positions of the user's text.
        scale: of the images, relative to what the processor does by itself.
    """

    input_ids: Tensor
    model_inputs: Mapping[str, Tensor]
    groups: tuple[ImageGroup, ...]
    prompt: tuple[int, ...]
    scale: float

    def layout(self, n_response: int) -> TokenLayout:
        """The layout once `n_response` tokens follow."""
        start = len(self.input_ids)
        return TokenLayout(self.groups, self.prompt, (start, start + n_response))


def encode(model: Model, visuals: Sequence[Visual], prompt: str, *, scale: float = 1.0) -> EncodedExample:
    """`encode_scales` for one scale."""
    return encode_scales(model, visuals, prompt, (scale,))[0]


def encode_scales(
    model: Model, visuals: Sequence[Visual], prompt: str, scales: Sequence[float]
) -> list[EncodedExample]:
    """Render the chat, process the images at every scale, and find every token's role.

    A video is shown as its frames, one image each, and comes back as one group `(t, h, w)`.

    Raises:
        InputError: the prompt is empty or holds an image placeholder, or the processor has no chat template.
        ImageError: the processor refuses an image.
        ScaleError: the images cannot be shown at this scale.
        TokenLayoutError: the processor's tokens do not fit its grids.
    """
    if not prompt.strip():
        raise InputError(
            f"the prompt is {prompt!r}, expected some text: it is the context the response is read against"
        )
    if bool((_tokenise(model, prompt) == model.image_token_id).any()):
        raise InputError(
            f"the prompt {prompt!r} holds the image placeholder, which the chat template writes for every image by itself; "
            "expected text only"
        )
    frames = [frame for visual in visuals for frame in visual.frames]
    content = [{"type": "image"}] * len(frames) + [{"type": "text", "text": prompt}]
    text = _render(model, content)
    base = _process(model, text, frames)  # also what the other scales are relative to
    processed = [base if scale == 1.0 else _process_scaled(model, text, frames, base[1], scale) for scale in scales]
    return [
        _example(model, visuals, prompt, inputs, grids, scale)
        for (inputs, grids), scale in zip(processed, scales, strict=True)
    ]


def _example(
    model: Model,
    visuals: Sequence[Visual],
    prompt: str,
    inputs: Mapping[str, Tensor],
    grids: Sequence[Grid],
    scale: float,
) -> EncodedExample:
    input_ids = inputs["input_ids"][0].to(model.device)
    extents = [(len(visual.frames), extent_of(model.family, model.processor, visual.size)) for visual in visuals]
    groups = group_images(input_ids, model, extents, grids)
    positions = user_text(model, prompt, input_ids)
    model_inputs = {
        name: value.to(model.device, model.hf_model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask")  # one unpadded sequence needs no mask
    }
    return EncodedExample(input_ids, model_inputs, groups, positions, scale)


def encode_response(model: Model, response: str | Sequence[int] | Tensor) -> Tensor:
    """Response ids `[target]` on the model's device. Text is tokenised without special tokens; ids are kept as they are.

    Raises:
        InputError: the response is empty, or holds ids outside the vocabulary or the image placeholder.
    """
    if isinstance(response, str):
        ids = _tokenise(model, response)
        if not response.strip() or len(ids) == 0:
            raise InputError(
                f"the response is {response!r}, expected some text; pass None to let the model generate one"
            )
    else:
        try:
            ids = torch.as_tensor(response).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(response).__name__
            raise InputError(f"the response is a {kind}, expected text or token ids: {error}") from error
        if len(ids) == 0:
            raise InputError("the response holds no token ids; pass None to let the model generate one")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"the response ids are {ids.dtype}, expected whole numbers")
        ids = ids.long()
    vocab = model.head.vocab
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if len(wrong):
        raise InputError(
            f"the response holds ids {wrong[:5].tolist()}, expected 0 to {vocab - 1}, the model's vocabulary"
        )
    if bool((ids == model.image_token_id).any()):
        raise InputError(
            f"the response holds the image placeholder (id {model.image_token_id}), which stands for an image and is "
            "never said; expected text tokens only"
        )
    return ids.to(model.device)


def alike(examples: Sequence[EncodedExample]) -> bool:
    """Whether the examples hold the same tokens and inputs of the same shapes, so that one layout fits them all."""
    first = examples[0]
    shapes = {name: value.shape for name, value in first.model_inputs.items()}
    return all(
        torch.equal(each.input_ids, first.input_ids)
        and {name: value.shape for name, value in each.model_inputs.items()} == shapes
        for each in examples
    )


def stackable(examples: Sequence[EncodedExample]) -> list[list[int]]:
    """Indices of examples whose model inputs can be joined into one batch each, in order of first appearance."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, each in enumerate(examples):
        key = tuple(
            (name, value.dtype, () if _per_token(name) else value.shape[1:])
            for name, value in sorted(each.model_inputs.items())
        )
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def collate(examples: Sequence[EncodedExample], n_tokens: int) -> dict[str, Tensor]:
    """The model inputs of examples that are `stackable`, as one batch of sequences of `n_tokens`.

    The first axis counts patches (Qwen), images (LLaVA, Pixtral, InternVL, Gemma) or examples (Idefics, token types),
    always in reading order, so all are joined along it.
    """
    return {
        name: torch.cat([along(name, each.model_inputs[name], n_tokens) for each in examples])
        for name in examples[0].model_inputs
    }


def along(name: str, value: Tensor, n_tokens: int) -> Tensor:
    """A model input as long as the sequence, where it has an entry a token: what follows the prompt is text."""
    return nn.functional.pad(value, (0, n_tokens - value.shape[1])) if _per_token(name) else value


def _per_token(name: str) -> bool:
    return name.endswith("token_type_ids")


def _render(model: Model, content: list[dict[str, str]]) -> str:
    """The chat in which the user says `content` and the model is about to answer."""
    messages = [{"role": "user", "content": content}]
    try:
        return str(model.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except ValueError as error:
        raise InputError(f"{type(model.processor).__name__} cannot render the chat: {error}") from error


def _tokenise(model: Model, text: str) -> Tensor:
    """Ids `[n]` of plain text, without special tokens around it."""
    encoded = model.processor.tokenizer(text, add_special_tokens=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long).flatten()


# --- images at a scale -----------------------------------------------------------------------------


def _process(
    model: Model, text: str, frames: Sequence[Image.Image], **options: Any
) -> tuple[dict[str, Tensor], list[Grid]]:
    """Call the processor; returns its inputs, with as many placeholders as the images have tokens, and the grids."""
    chosen = {**(model.family.always or {}), **options}
    chosen = {name: value for name, value in chosen.items() if accepts(model.processor.__call__, name)}
    try:
        produced = model.processor(text=[text], images=list(frames), return_tensors="pt", **chosen)
    except (ValueError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        sizes = [f"{frame.width} x {frame.height}" for frame in frames]
        raise ImageError(
            f"{type(model.processor).__name__} refuses images of {', '.join(sizes)} pixels: {error}"
        ) from error
    inputs = {name: value for name, value in produced.items() if isinstance(value, Tensor)}
    if "input_ids" not in inputs:
        raise TokenLayoutError(
            f"{type(model.processor).__name__} returned {', '.join(produced) or 'nothing'}, expected input_ids and what "
            "the model takes of an image, as tensors"
        )
    grids = grids_of(model.family, model.config, inputs)
    _drop_repeated_bos(inputs, model.processor.tokenizer)
    _fit_placeholders(inputs, model.image_token_id, [math.prod(grid) for grid in grids])
    kind = model.family.token_types
    if kind in inspect.signature(unwrap_peft(model.hf_model).forward).parameters:  # older transformers find out
        inputs[kind] = (inputs["input_ids"] == model.image_token_id).long()
    return inputs, grids


def _drop_repeated_bos(inputs: dict[str, Tensor], tokenizer: Any) -> None:
    """Keep one beginning-of-sequence token where the chat template writes it and the tokenizer adds another."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = inputs["input_ids"]
    if bos is not None and ids[0, :2].tolist() == [bos, bos]:
        inputs.update({name: value[:, 1:] for name, value in inputs.items() if value.shape == ids.shape})


def _process_scaled(
    model: Model, text: str, frames: Sequence[Image.Image], base: Sequence[Grid], scale: float
) -> tuple[dict[str, Tensor], list[Grid]]:
    """Show every image with `scale` times the base grid, from its own pixels, and check that it came out so."""
    if model.family.enlarge is None:
        raise ScaleError(
            f"{model.name} ({model.family.name}) always uses {math.prod(base[0])} tokens an image, so scale {scale:g} cannot "
            "be shown to it; use scales=(1.0,)"
        )
    cell = model.family.cell(model.config)
    wanted = [(max(1, round(h * scale)), max(1, round(w * scale))) for _, h, w in base]
    if sum(h * w for h, w in wanted) > MAX_IMAGE_TOKENS:
        raise ScaleError(
            f"scale {scale:g} needs {sum(h * w for h, w in wanted)} image tokens, expected at most {MAX_IMAGE_TOKENS}; "
            "use a smaller scale or image"
        )
    resized = [_resize(frame, h * cell, w * cell, model) for frame, (h, w) in zip(frames, wanted, strict=True)]
    size = (max(h for h, _ in wanted) * cell, max(w for _, w in wanted) * cell)
    attempts: list[dict[str, Any]] = [{}]
    if accepts(model.processor.__call__, "size"):
        attempts.append(model.family.enlarge(model.processor, size))
    grids: list[Grid] = []
    for options in attempts:
        inputs, grids = _process(model, text, resized, **options)
        if [grid[1:] for grid in grids] == wanted:
            return inputs, grids
    raise ScaleError(
        f"{type(model.processor).__name__} turns images into grids {[g[1:] for g in grids]} where scale {scale:g} asks for "
        f"{wanted}: it limits the image size; use smaller scales, or raise the limit in the processor"
    )


def _resize(frame: Image.Image, height: int, width: int, model: Model) -> Image.Image:
    if model.family.crops:  # the processor resizes the shorter side and keeps the centre
        return frame
    return frame.resize((width, height), Image.Resampling.BICUBIC)


# --- roles of tokens -------------------------------------------------------------------------------


def _fit_placeholders(inputs: dict[str, Tensor], image_token_id: int, counts: Sequence[int]) -> None:
    """Give every image as many placeholders as it has tokens, where a processor writes a fixed number."""
    ids = inputs["input_ids"][0].tolist()
    places = [i for i, token in enumerate(ids) if token == image_token_id]
    if len(places) == sum(counts):
        return
    written = len(places) // max(1, len(counts))  # for every image the same number
    starts = places[::written] if written else []
    if len(places) != written * len(counts) or any(
        ids[start : start + written] != [image_token_id] * written for start in starts
    ):
        raise TokenLayoutError(
            f"input_ids holds {len(places)} image tokens (id {image_token_id}) but the images' grids need {list(counts)}"
        )
    fitted: list[int] = []
    done = 0
    for start, count in zip(starts, counts, strict=False):
        fitted += ids[done:start] + [image_token_id] * count
        done = start + written
    fitted += ids[done:]
    inputs["input_ids"] = torch.tensor([fitted])


def group_images(
    input_ids: Tensor, model: Model, visuals: Sequence[tuple[int, Box]], grids: Sequence[Grid]
) -> tuple[ImageGroup, ...]:
    """Positions, grid and extent of every image or video.

    Args:
        input_ids: int `[seq]`.
        visuals: number of frames and covered extent of each image or video.
        grids: of every frame, in order.

    Raises:
        TokenLayoutError: placeholders, grids and images do not fit together.
    """
    positions = (input_ids == model.image_token_id).nonzero().flatten().tolist()
    n_frames = sum(frames for frames, _ in visuals)
    if len(grids) != n_frames:
        raise TokenLayoutError(
            f"{type(model.processor).__name__} made {len(grids)} grids of {n_frames} images: it cuts images into tiles, which is "
            "not supported; turn the splitting off in the processor"
        )
    needed = sum(math.prod(grid) for grid in grids)
    if len(positions) != needed:
        raise TokenLayoutError(
            f"input_ids holds {len(positions)} image tokens (id {model.image_token_id}) but the grids {list(grids)} need {needed}"
        )
    groups, frame, start = [], 0, 0
    for frames, extent in visuals:
        mine = grids[frame : frame + frames]
        stop = start + sum(math.prod(grid) for grid in mine)
        grid = (sum(t for t, _, _ in mine), mine[0][1], mine[0][2])
        groups.append(ImageGroup(tuple(positions[start:stop]), grid, extent))
        frame, start = frame + frames, stop
    return tuple(groups)


def user_text(model: Model, prompt: str, input_ids: Tensor) -> tuple[int, ...]:
    """Positions of the tokens that write `prompt`, by the characters each token decodes to; its last occurrence counts.

    Raises:
        TokenLayoutError: the prompt is not in the text, for example because the chat template rewrites it.
    """
    kept = (input_ids != model.image_token_id).nonzero().flatten().tolist()
    decoded = decode_tokens(input_ids[kept].tolist(), model.decode)
    shown = prompt.strip()
    first = decoded.text.rfind(shown, 0, len(decoded.text.removesuffix(_closing(model))))
    if first < 0:
        raise TokenLayoutError(
            f"the prompt {shown!r} is not in the text the model reads, {decoded.text!r}, so its tokens cannot be found"
        )
    last = first + len(shown)
    return tuple(kept[i] for i, (start, stop) in enumerate(decoded.spans) if start < last and stop > first)


def _closing(model: Model) -> str:
    """What the chat template writes after the user's text, where a prompt like "assistant" must not be looked for."""
    probe = "\N{ASTERISM}"
    try:
        return _render(model, [{"type": "text", "text": probe}]).rpartition(probe)[2]
    except InputError:  # no template: a captured chat was written by hand
        return ""
