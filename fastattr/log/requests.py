"""What is queued: a response that is to be explained, and what is known of it before."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fastattr.chat import Chat, Messages, Prompt
from fastattr.errors import InputError
from fastattr.images import Visual, encoded_bytes, read_image
from fastattr.log.config import Images
from fastattr.log.record import Content
from fastattr.parts import plain_part, without_source
from fastattr.types import Attribution

if TYPE_CHECKING:
    from fastattr.adapters import CapturedStates
    from fastattr.log.telemetry import Caller


@dataclass(frozen=True)
class Submission:
    """What a redaction callback sees and returns, changed by `dataclasses.replace`.

    Where it changes the prompt, neither prompt nor any other text is kept. What a replay would ask the model, its
    prompt and images, can only be left or refused as a whole.

    Attributes:
        metadata: the caller's.
        prompt: the user's text or the conversation, if it was given.
        images: as they were given; a video is a list of frames.
        content: what of the response will be kept.
    """

    request_id: str
    metadata: Mapping[str, Any]
    prompt: Prompt | None
    images: tuple[Any, ...]
    content: Content


# written once: on the request's path a union takes longer to make than to ask
_SEQUENCES = (list, tuple)
_ENCODED = (bytes, bytearray, memoryview)

_SHORT_TEXTS_BYTES = 1024  # of a request, part of `counting.REQUEST_BYTES`
_ID_BYTES = 36  # of an int and its place in a tuple


class Captured(NamedTuple):
    """States of a `generate` call, and what it returned."""

    states: CapturedStates
    out: Any


class Replay(NamedTuple):
    """Ids of an answer by any engine, to be read by the model in one forward, and of its prompt if given."""

    response_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] | None = None


class Made(NamedTuple):
    """An attribution that exists already."""

    why: Attribution


class Request(NamedTuple):  # made on the request's path: a third of a frozen dataclass's time
    """One response on its way to a record.

    Attributes:
        record_id: unique.
        time_ns: when it was submitted, by the wall clock.
        queued_s: the same by the monotonic clock of this process.
        share: hash of the request id in [0, 1).
        rate: it is kept where `share` is below this, or below the rate of low evidence.
        n_bytes: what it holds in memory.
        image_sha256: of the pictures as they were given, where it went through the disk; else None.
        keep_images: what of the pictures is kept, as of `LogConfig.images`, by the logger that it came from; None where
            that is the one that explains it.
    """

    record_id: str
    submission: Submission
    job: Captured | Replay | Made
    time_ns: int
    queued_s: float
    caller: Caller | None
    error: bool
    share: float
    rate: float
    n_bytes: int
    image_sha256: tuple[str, ...] | None = None
    keep_images: Images | None = None


def prompt_of(messages: str | Messages | Chat) -> Prompt:
    """The prompt of a request: the user's text, or a conversation.

    Args:
        messages: the text itself, or messages: `{"role": ..., "content": text or parts}` with parts of text,
            `{"type": "text", "text": ...}`, and of images (`image`, `image_url`, ...), whose pictures are given beside
            them; what the parts say of sizes and frames is kept, see `fastattr.parts`. One message of the user with one
            text and no part for images is that text, with its images before it.

    Raises:
        InputError: the messages are broken or end with the assistant's.
    """
    if isinstance(messages, str | Chat):
        return messages
    if not _are_mappings(messages):
        raise InputError(f"the messages are a {type(messages).__name__}, expected text or a list of messages")
    chat = Chat([{**message, "content": _content(message.get("content"))} for message in messages])
    alone = len(chat.messages) == 1 and len(chat.texts) == 1 and chat.messages[0]["role"] == "user"
    return chat.texts[0] if alone and chat.n_pictures == 0 else chat


def _content(content: Any) -> Any:
    """Parts of a message without the pictures they hold: those are given separately, and URLs are not fetched."""
    content = content.tolist() if isinstance(content, np.ndarray) else content
    if not _are_mappings(content):
        return content
    return [without_source(plain_part(part)) for part in content]


def pictures_of(messages: Sequence[Any]) -> list[Any]:
    """The pictures in the parts of messages, in order, which `prompt_of` removes.

    Raises:
        InputError: only some of the parts for pictures hold one.
    """
    held = []
    for message in messages:
        content: Any = message.get("content") if isinstance(message, Mapping) else None
        content = content.tolist() if isinstance(content, np.ndarray) else content
        if _are_mappings(content):
            parts = [plain_part(part) for part in content]
            held += [part.get(part["type"]) for part in parts if part["type"] != "text"]
    if None in held and held != [None] * len(held):
        raise InputError(f"{held.count(None)} of {len(held)} picture parts hold no picture; put it into the part")
    return [] if None in held else held


def to_json(prompt: Prompt | None) -> Any:
    """A prompt as JSON holds it; `from_json` reads it."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if any(callable(tool) for tool in prompt.tools or ()):
        raise InputError("tools holds a function, which a worker cannot be given; pass its JSON schema")
    options = dict(prompt.template_options)
    try:
        json.dumps(options)
    except (TypeError, ValueError) as error:
        raise InputError(f"template_options cannot be written as JSON for a worker: {error}") from error
    return {"messages": list(prompt.messages), "tools": list(prompt.tools or ()), "template_options": options}


def from_json(held: Any) -> Prompt | None:
    """The prompt that `to_json` wrote; requests of earlier versions have no template options."""
    if not isinstance(held, dict):
        return held
    return Chat(held["messages"], held["tools"], held.get("template_options", {}))


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(each, Mapping) for each in values)


def as_images(images: Any) -> tuple[Any, ...]:
    """Images as `attribute` takes them: one, a list of them, or nothing."""
    if images is None:
        return ()
    return tuple(images) if isinstance(images, _SEQUENCES) else (images,)


def bytes_of(job: Captured | Replay | Made, submission: Submission) -> int:
    """What a job and its submission hold in memory, nearly: tensors, pictures, ids and texts."""
    response = job.why.response if isinstance(job, Made) else None
    texts = _text_bytes((submission.prompt, submission.metadata, response))
    held = max(0, texts - _SHORT_TEXTS_BYTES) + sum(map(_image_bytes, submission.images))
    if isinstance(job, Captured):
        return held + job.states.n_bytes
    if isinstance(job, Replay):
        n_ids = len(job.response_ids) + len(job.prompt_ids or ())
        return held + n_ids * _ID_BYTES
    why = job.why
    tensors = [*why.image, why.context, why.relevance, why.log_prob]
    return held + sum([each.nbytes for each in (*tensors, *why.pictures) if each is not None])


def _text_bytes(value: Any) -> int:
    """What strings hold, wherever they stand in messages or metadata."""
    held, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, str | bytes):
            held += sys.getsizeof(each)
        elif isinstance(each, Mapping):
            left += each.keys()
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
        elif isinstance(each, Chat):
            left += (each.messages, each.tools, each.template_options)
    return held


def _image_bytes(image: Any) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height * 4
    if isinstance(image, _SEQUENCES):
        return sum(_image_bytes(frame) for frame in image)
    if isinstance(image, Visual):
        return _image_bytes(image.frames)
    if isinstance(image, str):  # a path, or a whole picture as a data URL
        return sys.getsizeof(image)
    if isinstance(image, _ENCODED):
        return len(image)
    return int(getattr(image, "nbytes", 0))


def digest(image: Any) -> str:
    """SHA-256 of a picture as it was given: of the file's bytes, or of size and RGB pixels where there is no file.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(image, Visual):
        image = image.frames if len(image.frames) > 1 else image.frames[0]
    if isinstance(image, list | tuple):
        return hashlib.sha256("".join(digest(frame) for frame in image).encode()).hexdigest()
    data = encoded_bytes(image)
    if data is not None:
        return hashlib.sha256(data).hexdigest()
    picture = read_image(image)
    return hashlib.sha256(f"{picture.width} {picture.height} ".encode() + picture.tobytes()).hexdigest()


def to_png(frame: np.ndarray) -> bytes:
    """A uint8 `[height width 3]` picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def release(job: Captured | Replay | Made) -> None:
    """Give back the memory of captured states, whatever was passed for them."""
    if isinstance(job, Captured):
        with suppress(Exception):
            job.states.release()


def response_length(job: Captured | Replay | Made) -> int:
    """Response tokens of a job, without waiting for a device."""
    if isinstance(job, Made):
        return len(job.why)
    if isinstance(job, Replay):
        return len(job.response_ids)
    sequences = job.out if isinstance(job.out, Tensor) else getattr(job.out, "sequences", None)
    prompt = job.states.prompt_ids
    return 0 if sequences is None or prompt is None else max(0, sequences.shape[-1] - prompt.shape[0])
