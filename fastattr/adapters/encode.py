"""Pictures and text to model inputs and a token layout, at any image scale."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastattr.adapters.ending import end_tokens
from fastattr.adapters.families import Family, Look, Looks, Shown, looks_of, video_looks_of
from fastattr.adapters.films import frame_size
from fastattr.adapters.hooks import unwrap_peft
from fastattr.adapters.model import Model, accepts
from fastattr.adapters.wording import ShownAs, render, text_positions
from fastattr.chat import Chat, Prompt, as_chat
from fastattr.errors import ImageError, InputError, ScaleError, TokenLayoutError
from fastattr.images import Visual
from fastattr.parts import SIZES, check_whole
from fastattr.types import Box, ImageGroup, TokenLayout, View
from fastattr.views import canvas

MAX_IMAGE_TOKENS = 65_536
# least and most tokens of a picture and of a video frame in qwen-vl-utils
IMAGE_CELLS = (4, 16_384)
VIDEO_CELLS = (128, 768)
MAX_JOINT_TOKENS = 160  # image tokens in one forward of a joint tower: four of the bundled model's pictures


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

    @property
    def n_image(self) -> int:
        return sum(len(group.positions) for group in self.groups)

    def layout(self, n_response: int) -> TokenLayout:
        """The layout once `n_response` tokens follow."""
        start = len(self.input_ids)
        return TokenLayout(self.groups, self.prompt, (start, start + n_response))


def encode(model: Model, visuals: Sequence[Visual], prompt: Prompt, *, scale: float = 1.0) -> EncodedExample:
    """`encode_scales` for one scale."""
    return encode_scales(model, visuals, prompt, (scale,))[0]


def encode_scales(
    model: Model, visuals: Sequence[Visual], prompt: Prompt, scales: Sequence[float]
) -> list[EncodedExample]:
    """Render the chat, process the images at every scale, and find every token's role.

    Where the family or its processor takes no videos, a video is shown as its frames, one image each. Either way it
    comes back as one group `(t, h, w)`.

    Args:
        prompt: the user's text with all images before it, or a conversation with them where they stand.

    Raises:
        InputError: the prompt is empty or holds an image placeholder, or the processor has no chat template.
        ImageError: the processor refuses an image.
        ScaleError: the images cannot be shown at this scale.
        TokenLayoutError: the processor's tokens do not fit its grids.
    """
    chat = as_chat(prompt, len(visuals))
    for text in chat.texts:
        if bool(torch.isin(_tokenise(model, text), torch.tensor(model.placeholder_ids, device="cpu")).any()):
            raise InputError(
                f"the prompt {text!r} holds the image placeholder, which the chat template writes for every image by "
                "itself; expected text only"
            )
    pictures = tuple(_Picture(visual, _is_film(model, visual)) for visual in visuals)
    shown = {picture.film for picture in pictures}
    if len(shown) == 2 and model.film_token_id == model.image_token_id:
        raise InputError(
            f"{model.name} ({model.family.name}) writes one placeholder for images and for videos, so that a prompt holds "
            "either; ask about them apart, or pass the frames of the video as images"
        )
    text = render(model, chat, [picture.shown_as for picture in pictures])
    base = _process_sized(model, text, pictures)  # the other scales are relative to it
    processed = [
        base if scale == 1.0 else _process_scaled(model, text, pictures, base.looks, scale) for scale in scales
    ]
    examples = [_example(model, pictures, chat, each, scale) for each, scale in zip(processed, scales, strict=True)]
    for other in examples[1:]:
        _check_alignment(model, examples[0], other)
    return examples


def _check_alignment(model: Model, one: EncodedExample, other: EncodedExample) -> None:
    """Check that each picture shows the same part at two scales, to within one cell.

    Raises:
        ScaleError: it does not.
    """
    for first, second in zip(one.groups, other.groups, strict=True):
        _, rows, columns = (min(sides) for sides in zip(first.grid, second.grid, strict=True))
        left, top, right, bottom = first.extent
        moved = [abs(a - b) for a, b in zip(first.extent, second.extent, strict=True)]
        if max(moved[0::2]) > (right - left) / columns or max(moved[1::2]) > (bottom - top) / rows:
            raise ScaleError(
                f"{type(model.processor).__name__} shows the part {first.extent} of a picture at scale {one.scale:g} and "
                f"{second.extent} at scale {other.scale:g} (left, top, right, bottom, as fractions), so their maps cannot be "
                "combined; let it resize pictures (do_resize=True), or use scales=(1.0,)"
            )


@dataclass(frozen=True)
class _Picture:
    """An image or video, and how it is shown.

    Attributes:
        film: as a video; otherwise every frame is an image.
    """

    visual: Visual
    film: bool

    @property
    def n_images(self) -> int:
        return 0 if self.film else len(self.visual.frames)

    @property
    def shown_as(self) -> ShownAs:
        return self.film, self.n_images


@dataclass(frozen=True)
class _Processed:
    """What a processor made of pictures.

    Attributes:
        inputs: what the model takes, with as many placeholders as the pictures have tokens.
        looks: at every image (a frame that is shown as one) and at every video.
    """

    inputs: dict[str, Tensor]
    looks: tuple[list[Looks], list[Looks]]


def _is_film(model: Model, visual: Visual) -> bool:
    return len(visual.frames) > 1 and model.takes_videos


def _example(
    model: Model, pictures: Sequence[_Picture], chat: Chat, processed: _Processed, scale: float
) -> EncodedExample:
    input_ids = processed.inputs["input_ids"][0].to(model.device)
    groups = group_images(input_ids, model, [picture.shown_as for picture in pictures], *processed.looks)
    positions = text_positions(model, chat, input_ids, groups)
    model_inputs = {
        name: value.to(model.device, model.hf_model.dtype if value.is_floating_point() else None)
        for name, value in processed.inputs.items()
        if name not in ("input_ids", "attention_mask")  # one unpadded sequence needs no mask
    }
    return EncodedExample(input_ids, model_inputs, groups, positions, scale)


def encode_response(model: Model, response: str | Sequence[int] | Tensor) -> Tensor:
    """Response ids `[target]` on the model's device, without trailing end tokens.

    Text is tokenised without special tokens; ids are kept as they are.

    Raises:
        InputError: the response is empty, or holds half of a character, ids outside the vocabulary or the image
            placeholder.
    """
    if isinstance(response, str):
        check_whole(response, "the response")
        ids = _tokenise(model, response)
        if not response.strip() or len(ids) == 0:
            raise InputError(
                f"the response is {response!r}, expected some text; pass None to let the model generate one"
            )
    else:
        try:
            ids = torch.as_tensor(response, device="cpu").flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(response).__name__
            raise InputError(f"the response is a {kind}, expected text or token ids: {error}") from error
        if len(ids) == 0:
            raise InputError("the response holds no token ids; pass None to let the model generate one")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"the response ids are {ids.dtype}, expected whole numbers")
        ids = ids.long()
    check_response(model, ids)
    ended = ids[: end_tokens(model).length(ids)]
    if len(ended) == 0:
        raise InputError(
            f"the response holds only the end tokens {ids[:5].tolist()}, so there is nothing to explain; pass None to let "
            "the model generate one"
        )
    return ended.to(model.device)


def check_response(model: Model, ids: Tensor) -> None:
    """Raises `InputError` where an id of a response `[target]` is outside the vocabulary or an image placeholder."""
    vocab = model.head.vocab
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if len(wrong):
        raise InputError(
            f"the response holds ids {wrong[:5].tolist()}, expected 0 to {vocab - 1}, the model's vocabulary"
        )
    held = [placeholder for placeholder in model.placeholder_ids if bool((ids == placeholder).any())]
    if held:
        raise InputError(
            f"the response holds the image placeholder (id {held[0]}), which stands for an image and is "
            "never said; expected text tokens only"
        )


def check_prompt(model: Model, encoded: EncodedExample, prompt_ids: Sequence[int] | Tensor) -> None:
    """Check that a prompt is the one an engine reports for its response.

    A run of the same placeholder counts as one in both: their number depends on the scale, and some engines return one
    per picture.

    Args:
        prompt_ids: int `[seq]`, without the response.

    Raises:
        InputError: `prompt_ids` are not token ids.
        TokenLayoutError: the prompts differ; the message shows where.
    """
    try:
        ids = torch.as_tensor(prompt_ids, device="cpu").flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"prompt_ids is a {type(prompt_ids).__name__}, expected token ids: {error}") from error
    if ids.is_floating_point() or ids.dtype == torch.bool or len(ids) == 0:
        raise InputError(f"prompt_ids holds {len(ids)} values of {ids.dtype}, expected token ids")
    given, ours = _joined(model, ids.tolist()), _joined(model, encoded.input_ids.tolist())
    if given == ours:
        return
    at = next((i for i, (one, other) in enumerate(zip(given, ours, strict=False)) if one != other), None)
    at = min(len(given), len(ours)) if at is None else at
    size = model.head.weight.shape[0]
    theirs, mine = (
        "".join(model.decode([[id for id in each[max(0, at - 12) : at + 12] if 0 <= id < size]]))
        for each in (given, ours)
    )
    raise TokenLayoutError(
        f"prompt_ids is not the prompt that {model.name} is given here: they differ from token {at} on (a run of image "
        f"placeholders counted as one), where prompt_ids holds {theirs!r} and the prompt here {mine!r}; pass the messages, "
        "tools and template_options that the engine was given, as a fastattr.Chat"
    )


def _joined(model: Model, ids: Sequence[int]) -> list[int]:
    """Ids with every run of the same placeholder reduced to one."""
    stand_ins = {*model.placeholder_ids, model.film_token_id}
    return [id for i, id in enumerate(ids) if i == 0 or id != ids[i - 1] or id not in stand_ins]


def alike(examples: Sequence[EncodedExample]) -> bool:
    """Whether the examples hold the same tokens and inputs of the same shapes, so that one layout fits them all."""
    first = examples[0]
    shapes = {name: value.shape for name, value in first.model_inputs.items()}
    return all(
        torch.equal(each.input_ids, first.input_ids)
        and {name: value.shape for name, value in each.model_inputs.items()} == shapes
        for each in examples
    )


def stackable(model: Model, examples: Sequence[EncodedExample]) -> list[list[int]]:
    """Indices of examples whose model inputs can be joined into one batch each, in order of first appearance.

    Where the tower's attention spans all images of a batch, small batches are faster than large ones.
    """
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for i, each in enumerate(examples):
        key = tuple(
            (name, value.dtype, () if _per_token(name) else value.shape[1:])
            for name, value in sorted(each.model_inputs.items())
        )
        batches = groups.setdefault(key, [[]])
        held = sum(examples[k].n_image for k in batches[-1])
        full = not model.family.stacks or (model.family.joint and held + each.n_image > MAX_JOINT_TOKENS)
        if full and batches[-1]:
            batches.append([])
        batches[-1].append(i)
    return [batch for batches in groups.values() for batch in batches]


def collate(model: Model, examples: Sequence[EncodedExample], n_tokens: int) -> dict[str, Tensor]:
    """The model inputs of examples that are `stackable`, as one batch of sequences of `n_tokens`.

    The first axis counts patches (Qwen), images (LLaVA, Pixtral, InternVL, Gemma) or examples (Idefics, token types),
    always in reading order, so all are joined along it.
    """
    return {
        name: torch.cat(
            [along(model, name, each.model_inputs[name], n_tokens) for each in examples],
            dim=-1 if name in model.family.along_last else 0,
        )
        for name in examples[0].model_inputs
    }


def along(model: Model, name: str, value: Tensor, n_tokens: int) -> Tensor:
    """A model input as long as the sequence, where it has an entry a token: what follows the prompt is the answer."""
    if not _per_token(name):
        return value
    answer = 1 if name == "attention_mask" else model.family.answer_type
    return nn.functional.pad(value, (0, n_tokens - value.shape[1]), value=answer)


def _per_token(name: str) -> bool:
    return name.endswith("token_type_ids") or name == "attention_mask"


def _tokenise(model: Model, text: str) -> Tensor:
    """Ids `[n]` of plain text, without special tokens around it."""
    encoded = model.processor.tokenizer(text, add_special_tokens=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long, device="cpu").flatten()


# --- images at a scale -----------------------------------------------------------------------------


def _process(model: Model, text: str, pictures: Sequence[_Picture], **options: Any) -> _Processed:
    """Call the processor, give every look as many placeholders as it has tokens, and read how they lie."""
    frames = [frame for picture in pictures if not picture.film for frame in picture.visual.frames]
    films = [list(picture.visual.frames) for picture in pictures if picture.film]
    chosen = {**(model.family.always or {}), **((films and model.family.filmed) or {}), **options}
    chosen = {name: value for name, value in chosen.items() if accepts(model.processor.__call__, name)}
    if films:
        chosen["videos"] = films
        chosen |= _video_metadata(model, [picture.visual for picture in pictures if picture.film])
    if frames or not films:
        chosen["images"] = [frames] if frames and model.family.nested else frames
    try:
        with _on_cpu():
            produced = model.processor(text=[text], return_tensors="pt", **chosen)
    except (ValueError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        sizes = [f"{frame.width} x {frame.height}" for picture in pictures for frame in picture.visual.frames]
        raise ImageError(
            f"{type(model.processor).__name__} refuses images of {', '.join(sizes)} pixels: {error}{_least(model)}"
        ) from error
    inputs = {name: value for name, value in produced.items() if isinstance(value, Tensor) and name != "labels"}
    if "input_ids" not in inputs:
        raise TokenLayoutError(
            f"{type(model.processor).__name__} returned {', '.join(produced) or 'nothing'}, expected input_ids and what "
            "the model takes of an image, as tensors"
        )
    images = [picture.visual.size for picture in pictures for _ in range(picture.n_images)]
    videos = [picture.visual.size for picture in pictures if picture.film]
    n_frames = [len(picture.visual.frames) for picture in pictures if picture.film]
    looks = (
        looks_of(model.family, Shown(model.config, model.processor, inputs, images)) if images else [],
        video_looks_of(model.family, Shown(model.config, model.processor, inputs, videos, n_frames)) if videos else [],
    )
    _check_frames(model, n_frames, looks[1])
    _drop_repeated_bos(inputs, model.processor.tokenizer)
    if images:
        _fit_placeholders(inputs, model.image_token_id, [look.n_placeholders for each in looks[0] for look in each])
    kind = model.family.token_types
    if kind in inspect.signature(unwrap_peft(model.hf_model).forward).parameters:  # older transformers find out
        ids = inputs["input_ids"]
        inputs[kind] = torch.zeros_like(ids)
        for token_id, mark, here in ((model.image_token_id, 1, images), (model.film_token_id, 2, videos)):
            if here:
                inputs[kind][ids == token_id] = mark
    return _Processed(inputs, looks)


def _on_cpu() -> AbstractContextManager[object]:
    """A context in which processors create tensors on the CPU: on a default device "meta" their values would be lost."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _video_metadata(model: Model, films: Sequence[Visual]) -> dict[str, Any]:
    """The option that tells a processor when frames were taken; empty where no video has timing."""
    if all(film.timing is None for film in films) or not accepts(model.processor.__call__, "video_metadata"):
        return {}
    told: list[dict[str, Any]] = []
    for film in films:
        n, timing = len(film.frames), film.timing
        if timing is None:
            told.append({"total_num_frames": n, "fps": None, "frames_indices": list(range(n))})
        else:
            told.append({"total_num_frames": timing.total, "fps": timing.fps, "frames_indices": list(timing.indices)})
    return {"video_metadata": told}


def _check_frames(model: Model, n_frames: Sequence[int], videos: Sequence[Looks]) -> None:
    """Check that no frame was dropped, where the model's configuration gives the number of frames per time step.

    Raises:
        TokenLayoutError: the processor dropped some, as those do that sample frames and have no option against it.
    """
    depth = getattr(getattr(model.config, "vision_config", None), "temporal_patch_size", None)
    for n, looks in zip(n_frames, videos, strict=False):  # their number is checked with that of images
        steps = looks[0].grid[0]
        if depth is not None and steps * depth < n:
            raise TokenLayoutError(
                f"{type(model.processor).__name__} shows a video of {n} frames in {steps} time steps of {depth} frames: it "
                "dropped frames; use a processor that accepts do_sample_frames=False, or pass only the frames to be shown"
            )


def _least(model: Model) -> str:
    """A hint on the smallest size of a picture, for an error message; empty where the family does not define it."""
    cell = model.family.cell(model.config)
    if cell <= 1:
        return ""
    return (
        f"; an image token of {model.family.name} covers {cell} x {cell} pixels: once a picture is resized to what the model "
        "takes, neither side may be much shorter than that"
    )


def _drop_repeated_bos(inputs: dict[str, Tensor], tokenizer: Any) -> None:
    """Keep one beginning-of-sequence token where the chat template writes it and the tokenizer adds another."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = inputs["input_ids"]
    if bos is not None and ids[0, :2].tolist() == [bos, bos]:
        inputs.update({name: value[:, 1:] for name, value in inputs.items() if value.shape == ids.shape})


def _process_sized(model: Model, text: str, pictures: Sequence[_Picture]) -> _Processed:
    """Show every picture at the size its message part asks for, or else at the size the processor chooses.

    Sizes follow qwen-vl-utils: each side is rounded to whole cells, within `min_pixels` and `max_pixels` (per frame for a
    video).

    Raises:
        ImageError: the family does not support sizes of message parts, or its processor shows another size.
    """
    sized = [picture for picture in pictures if picture.visual.sizing is not None]
    if not sized:
        return _process(model, text, pictures)
    if not model.family.sized:
        raise ImageError(
            f"{model.name} ({model.family.name}) chooses the size of pictures by a rule of its own, so {', '.join(SIZES)} of a "
            "message part are not supported; leave them out, or resize the picture"
        )
    shown = [picture if picture.visual.sizing is None else _sized(model, picture) for picture in pictures]
    processed = _process(model, text, shown)
    images, films = iter(processed.looks[0]), iter(processed.looks[1])
    for picture in shown:
        looks = [next(films)] if picture.film else [next(images) for _ in picture.visual.frames]
        cell = _cell(model, picture)
        wanted = tuple(length // cell for length in picture.visual.size)
        came = looks[0][0].grid[1:]
        if picture.visual.sizing is not None and came != wanted:
            raise ImageError(
                f"a message part asks for a picture of {wanted[0] * cell} x {wanted[1] * cell} pixels (height x width), but "
                f"{type(model.processor).__name__} shows it at {came[0] * cell} x {came[1] * cell}; raise the limits in the "
                "processor, or ask for a size within them"
            )
    return processed


def _sized(model: Model, picture: _Picture) -> _Picture:
    """A picture resized as its message part asks. Raises `ImageError` where no size is possible."""
    sizing, cell = picture.visual.sizing, _cell(model, picture)
    assert sizing is not None
    fewest, most = VIDEO_CELLS if picture.film else IMAGE_CELLS
    size = picture.visual.size
    if sizing.height is not None and sizing.width is not None:
        size, limits = (sizing.height, sizing.width), (IMAGE_CELLS[0] * cell**2, IMAGE_CELLS[1] * cell**2)
    else:
        least = fewest * cell**2 if sizing.min_pixels is None else sizing.min_pixels
        largest = most * cell**2 if sizing.max_pixels is None else sizing.max_pixels
        limits = (min(least, largest), max(least, largest))
    try:
        height, width = frame_size(size, 1, cell, limits, counts_all=False)
    except ValueError as error:
        raise ImageError(f"{size[1]} x {size[0]} pixels cannot be shown: {error}") from error
    frames = tuple(frame.resize((width, height), Image.Resampling.BICUBIC) for frame in picture.visual.frames)
    return replace(picture, visual=replace(picture.visual, frames=frames))


def _cell(model: Model, picture: _Picture) -> int:
    of_films = model.family.film_cell if picture.film else None
    return (of_films or model.family.cell)(model.config)


def _process_scaled(
    model: Model, text: str, pictures: Sequence[_Picture], base: tuple[list[Looks], list[Looks]], scale: float
) -> _Processed:
    """Show every picture with `scale` times its looks, from its own pixels, and check that it came out so."""
    every = [look for of_kind in base for looks in of_kind for look in looks]
    if model.family.enlarge is None:
        raise ScaleError(
            f"{model.name} ({model.family.name}) always uses {every[0].n_placeholders} tokens "
            f"{'a tile' if model.family.tiles else 'an image'}, so scale {scale:g} cannot be shown to it; use scales=(1.0,)"
        )
    cell = model.family.cell(model.config)
    film_cell = cell if model.family.film_cell is None else model.family.film_cell(model.config)
    wanted = [_scaled(look, scale) for look in every]
    n_tokens = sum(t * h * w for look in every for t, (h, w) in [(look.grid[0], _scaled(look, scale))])
    if n_tokens > MAX_IMAGE_TOKENS:
        raise ScaleError(
            f"scale {scale:g} needs {n_tokens} image tokens, expected at most {MAX_IMAGE_TOKENS}; use a smaller scale or "
            "image"
        )
    images, films = iter(base[0]), iter(base[1])
    resized = []
    for picture in pictures:
        looks = [next(films)] if picture.film else [next(images) for _ in picture.visual.frames]
        side = film_cell if picture.film else cell
        resized.append(replace(picture, visual=_resize(model.family, picture.visual, looks[0][0], side, scale)))
    size = (max(h for h, _ in wanted) * cell, max(w for _, w in wanted) * cell)
    attempts: list[dict[str, Any]] = [{}]
    if accepts(model.processor.__call__, "size"):
        attempts.append(model.family.enlarge(model.processor, size, scale))
    came: list[tuple[int, int]] = []
    for options in attempts:
        processed = _process(model, text, resized, **options)
        came = [look.grid[1:] for of_kind in processed.looks for looks in of_kind for look in looks]
        if came == wanted:
            return processed
    raise ScaleError(
        f"{type(model.processor).__name__} turns images into grids {came} where scale {scale:g} asks for "
        f"{wanted}: it limits the image size; use smaller scales, or raise the limit in the processor"
    )


def _scaled(look: Look, scale: float) -> tuple[int, int]:
    """`(h, w)` of a look, `scale` times as fine."""
    _, h, w = look.grid
    return max(1, round(h * scale)), max(1, round(w * scale))


def _resize(family: Family, visual: Visual, look: Look, cell: int, scale: float) -> Visual:
    """The picture as the processor is given it: the size of its grid, `scale` times its own where it is cut into tiles (so
    that it is cut alike), or as it is where the processor crops or squeezes it."""
    if family.resized:
        height, width = (length * cell for length in _scaled(look, scale))
    elif family.tiles:
        height, width = (max(1, round(length * scale)) for length in visual.size)
    else:
        return visual
    return replace(
        visual, frames=tuple(frame.resize((width, height), Image.Resampling.BICUBIC) for frame in visual.frames)
    )


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
    inputs["input_ids"] = torch.tensor([fitted], device="cpu")


def group_images(
    input_ids: Tensor,
    model: Model,
    shown_as: Sequence[ShownAs],
    images: Sequence[Looks],
    videos: Sequence[Looks],
) -> tuple[ImageGroup, ...]:
    """Positions, grid and extent of every image or video.

    Args:
        input_ids: int `[seq]`.
        shown_as: for each image or video, how.
        images, videos: the looks at each, in order.

    Raises:
        TokenLayoutError: placeholders, looks and pictures do not fit together.
    """
    n_images, n_videos = sum(n for film, n in shown_as if not film), sum(film for film, _ in shown_as)
    if (len(images), len(videos)) != (n_images, n_videos):
        raise TokenLayoutError(
            f"{type(model.processor).__name__} made {len(images)} images and {len(videos)} videos of {n_images} and "
            f"{n_videos}: it cuts or drops pictures in a way that {model.family.name} is not known for; turn that off in "
            "the processor"
        )
    seen, watched = _runs(input_ids, model.image_token_id, images), _runs(input_ids, model.film_token_id, videos)
    try:
        return tuple(_group([next(watched)] if film else [next(seen) for _ in range(n)]) for film, n in shown_as)
    except TokenLayoutError as error:
        raise TokenLayoutError(f"{model.family.name}: {error}") from error


def _runs(input_ids: Tensor, token_id: int | None, pictures: Sequence[Looks]) -> Iterator[tuple[Looks, list[int]]]:
    """For each picture its looks and the positions of their cells."""
    if not pictures:
        return iter(())
    places = [] if token_id is None else (input_ids == token_id).nonzero().flatten().tolist()
    needed = sum(look.n_placeholders for looks in pictures for look in looks)
    if len(places) != needed:
        grids = [look.grid for looks in pictures for look in looks]
        raise TokenLayoutError(
            f"input_ids holds {len(places)} image tokens (id {token_id}) but the grids {grids} need {needed}"
        )
    start = 0
    found = []
    for looks in pictures:
        cells: list[int] = []
        for look in looks:
            cells += look.cells(places[start : start + look.n_placeholders])
            start += look.n_placeholders
        found.append((looks, cells))
    return iter(found)


def _group(frames: Sequence[tuple[Looks, list[int]]]) -> ImageGroup:
    """One image, or one video whose frames are all looked at alike."""
    looks = frames[0][0]
    positions = tuple(position for _, cells in frames for position in cells)
    t = sum(each[0].grid[0] for each, _ in frames)
    if len(looks) == 1 and _inside(looks[0].box):
        return ImageGroup(positions, (t, *looks[0].grid[1:]), looks[0].box)
    views = tuple(View(look.grid[1:], look.box) for look in looks)
    (_, h, w), extent = canvas(views)
    return ImageGroup(positions, (t, h, w), extent, views)


def _inside(box: Box) -> bool:
    return all(0 <= edge <= 1 for edge in box)
