"""Converts parts of messages in the formats of transformers, Qwen, OpenAI and Anthropic to one form.

    {"type": "text", "text": ...}            also `input_text` and `output_text`
    {"type": "image", "image": source, ...}  without a source the picture is given separately
    {"type": "video", "video": source, ...}

Optional keys: `min_pixels`, `max_pixels`, `resized_height` and `resized_width`; for a video also `fps`, `nframes` (or
`num_frames`), and `video_start` and `video_end` in seconds. Unknown keys are errors, since they may change what the model
sees; the keys in `IGNORED` do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastattr.errors import InputError
from fastattr.images import Kind, Sizing
from fastattr.video import Sampling

TEXTS = ("text", "input_text", "output_text")
KINDS: Mapping[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
SOURCES = ("url", "path", "base64", "source")  # besides the kind itself and `<kind>_url`
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
TIMES = ("fps", "nframes", "num_frames", "video_start", "video_end")
# `detail` chooses a size for OpenAI's own models
IGNORED = ("detail", "cache_control", "id", "uuid", "name", "title", "media_type", "mime_type")
_HALF = re.compile("[\ud800-\udfff]")


def plain_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part in the form above; text parts in that form are returned unchanged.

    Raises:
        InputError: its type or a key is unknown, a value is wrong, or it holds two sources.
    """
    named = part.get("type")
    if named in TEXTS:
        if not isinstance(part.get("text"), str):
            raise InputError(f"a text part without text: {short(part)}")
        return part if named == "text" else {**part, "type": "text"}
    kind = KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise InputError(
            f'the part {short(part)} of no known type, expected {{"type": "text", "text": ...}}, {{"type": "image"}} or '
            f'{{"type": "video"}}, or one of {", ".join((*TEXTS[1:], *(each for each in KINDS if each not in KINDS.values())))}'
        )
    given = {key: value for key, value in part.items() if value is not None and key not in ("type", *IGNORED)}
    options = {key: given.pop(key) for key in (*SIZES, *(TIMES if kind == "video" else ())) if key in given}
    sources = [key for key in (kind, f"{kind}_url", *SOURCES) if key in given]
    unknown = [key for key in given if key not in sources]
    if unknown:
        known = (kind, f"{kind}_url", *SOURCES, *SIZES, *(TIMES if kind == "video" else ()))
        raise InputError(
            f"a part of type {named!r} with the key {unknown[0]!r}, which is not known here and may change what the model sees; "
            f"expected {', '.join(known)}"
        )
    if len(sources) > 1:
        raise InputError(f"a part of type {named!r} with {' and '.join(sources)}, expected one {kind}")
    held = {kind: _source(sources[0], given[sources[0]])} if sources else {}
    plain = {"type": kind, **held, **options}
    if options:  # raise for wrong values early
        sizing_of(plain)
        sampling_of(plain)
    return plain


def sizing_of(part: Mapping[str, Any]) -> Sizing | None:
    """The size a plain part asks for, None without one. Raises `InputError` for wrong values."""
    given = [_positive(part, key, whole=True) for key in SIZES]
    return None if given == [None] * len(SIZES) else Sizing(*given)


def sampling_of(part: Mapping[str, Any]) -> Sampling:
    """The frames a plain part asks for. Raises `InputError` for wrong values."""
    if "nframes" in part and "num_frames" in part:
        raise InputError("a video part holds nframes and num_frames, which mean the same; expected one of them")
    n_frames = _positive(part, "nframes" if "nframes" in part else "num_frames", whole=True)
    start_s = part.get("video_start")
    return Sampling(
        fps=_positive(part, "fps"),
        n_frames=n_frames,
        start_s=None if start_s is None or start_s == 0 else _positive(part, "video_start"),
        end_s=_positive(part, "video_end"),
    )


def without_source(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plain part without its picture."""
    return part if part["type"] == "text" else {key: value for key, value in part.items() if key != part["type"]}


def _source(key: str, value: Any) -> Any:
    """A source that `read_visual` accepts, from the value under a key. Raises `InputError`."""
    if isinstance(value, Mapping) and key.endswith("_url"):  # OpenAI's {"url": ..., "detail": ...}
        return _only(value, "url", key)
    if key == "source":  # Anthropic's
        if not isinstance(value, Mapping):
            raise InputError(f"source is {short(value)}, expected a mapping such as {{'type': 'base64', 'data': ...}}")
        kind = value.get("type")
        if kind == "base64":
            return f"data:{value.get('media_type') or ''};base64,{_only(value, 'data', key)}"
        if kind == "url":
            return _only(value, "url", key)
        raise InputError(f"source is of type {kind!r}, which is not known here, expected 'base64' or 'url'")
    if key == "base64":
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if not isinstance(value, str):
            raise InputError(f"base64 is {short(value)}, expected text")
        return value if value.startswith("data:") else f"data:;base64,{value}"
    return value


def _only(value: Mapping[str, Any], key: str, where: str) -> Any:
    others = [each for each in value if each not in (key, "type", *IGNORED) and value[each] is not None]
    if others or not isinstance(value.get(key), str):
        raise InputError(f"{where} is {short(value)}, expected {key!r} in it, as text, and nothing else")
    return value[key]


def _positive(part: Mapping[str, Any], key: str, *, whole: bool = False) -> Any:
    value = part.get(key)
    if value is None:
        return None
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        raise InputError(f"{key} is {short(value)}, expected a {'whole ' if whole else ''}number above 0")
    return value


def check_whole(text: str, name: str) -> None:
    """Refuse text with half of a character (a lone surrogate), as JSON that was cut and bytes of another encoding leave.

    Raises:
        InputError: no tokenizer reads it.
    """
    half = _HALF.search(text)
    if half is not None:
        raise InputError(
            f"{name} holds {half[0]!r} at character {half.start()}, half of a character, which no tokenizer reads; expected "
            "text of whole characters"
        )


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
