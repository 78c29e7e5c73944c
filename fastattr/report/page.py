"""The interactive report: a payload of numbers and text, inlined beside a fixed page, style and script.

Everything that came from a model or a user travels in the payload, as JSON, and reaches the page only through
`textContent`. It is never parsed as HTML.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastattr.config import name_of
from fastattr.errors import InputError
from fastattr.fields import Field, path_name, read_fields
from fastattr.report.picture import color_table, frames, quantise
from fastattr.selection import peak_box, peak_step
from fastattr.storage import whole_file
from fastattr.text import reasoning_tokens
from fastattr.types import Attribution, AttributionConfig

PNG_UP_TO = 512  # pixels of the longer side; larger pictures are embedded as JPEG
JPEG_QUALITY = 90
VIDEO_SIDE = 512  # pixels of the longer side of a video's frames, all of them JPEG: there are many
VIDEO_QUALITY = 80

_LONGEST = 200  # characters of a value in the table of fields; the whole of it stands in the response
_LONGEST_NAME = 80

_NEAR = 16  # characters between two prompt tokens that may belong to none that can be found


def write_html(attributions: Sequence[Attribution], path: str | Path) -> Path:
    """Write one self-contained page; several attributions of the same response can be switched in it.

    Raises:
        InputError: there is no attribution, or they do not explain the same response.
        SaveError: the path cannot be written.
    """
    page = page_html(attributions).encode()
    with whole_file(path) as file:
        file.write(page)
    return Path(path)


def notebook_html(attributions: Sequence[Attribution]) -> str:
    """The same page as an `<iframe>` for a notebook cell, closed off from the notebook around it.

    Raises:
        InputError: as `write_html`.
    """
    page = html.escape(page_html(attributions))
    style = "width:100%;height:720px;border:0;border-radius:8px"
    return f'<iframe title="fastattr report" sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'


def page_html(attributions: Sequence[Attribution]) -> str:
    """The self-contained page that `write_html` writes. Raises `InputError` as it does."""
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"digest": digest, "style": style, "script": script, "payload": _inert_json(_payload(attributions))}
    page = _asset("page.html")
    for name, text in parts.items():  # the payload comes last: what it holds is not a place to fill
        page = page.replace(f"[[{name}]]", text, 1)
    return page


def _asset(name: str) -> str:
    return resources.files("fastattr.report").joinpath(name).read_text(encoding="utf-8")


def _inert_json(value: Any) -> str:
    """ASCII JSON that no HTML parser takes for markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _payload(attributions: Sequence[Attribution]) -> dict[str, Any]:
    _check_comparable(attributions)
    first = attributions[0]
    prompt_tokens = first.context_tokens[: len(first.context_tokens) - len(first)]
    prompt = first.prompt or "".join(prompt_tokens)
    illustrated = next((a for a in attributions if a.pictures), first)
    return {
        "model": first.model,
        "response": _passage(first.response, first.spans, first.tokens),
        "folds": _folds(first),
        "fields": [dataclasses.astuple(_row(field)) for field in _fields(first)],
        "prompt": _passage(prompt, _locate(prompt, prompt_tokens), prompt_tokens),
        "pictures": [_picture(illustrated, image) for image in range(len(first.image))],
        "colors": _base64(color_table()),
        "views": [_view(a, label) for a, label in zip(attributions, _labels(attributions), strict=True)],
    }


def _folds(attribution: Attribution) -> list[tuple[int, int]]:
    """Half-open ranges of reasoning tokens; special and empty tokens between them are included."""
    silent = {*attribution.special, *(i for i, (start, stop) in enumerate(attribution.spans) if start == stop)}
    folds: list[tuple[int, int]] = []
    for token in reasoning_tokens(attribution):
        if folds and all(between in silent for between in range(folds[-1][1], token)):
            folds[-1] = (folds[-1][0], token + 1)
        else:
            folds.append((token, token + 1))
    return folds


def _check_comparable(attributions: Sequence[Attribution]) -> None:
    if not attributions:
        raise InputError("no attribution was given, expected at least one to report on")
    first = attributions[0]
    for other in attributions[1:]:
        if (other.response, other.token_ids) != (first.response, first.token_ids):
            raise InputError(
                f"the attributions explain different responses, {_short(first.response)} and {_short(other.response)}; "
                "a report compares methods or scales on one response, so write one report each"
            )
        if other.context_tokens != first.context_tokens or len(other.image) != len(first.image):
            raise InputError(
                f"the attributions explain the same response to different questions, {_short(first.prompt)} about "
                f"{len(first.image)} images and {_short(other.prompt)} about {len(other.image)}; write one report each"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _passage(text: str, spans: Sequence[tuple[int, int]], tokens: Sequence[str]) -> dict[str, Any]:
    pieces, tail = _pieces(text, spans, tokens)
    return {"pieces": [dataclasses.astuple(piece) for piece in pieces], "tail": tail}


@dataclass(frozen=True)
class _Piece:
    """How a token is shown.

    Attributes:
        before: text in front of it that no token holds, and the white space it begins with.
        shown: its own text, or a stand-in.
        is_text: whether `shown` is a part of the text.
    """

    before: str
    shown: str
    is_text: bool


def _pieces(text: str, spans: Iterable[tuple[int, int]], tokens: Iterable[str]) -> tuple[list[_Piece], str]:
    """Cut `text` into one piece a token, and what follows the last. Together they show every character once.

    A token without text of its own (a special token, the second half of an emoji) gets a stand-in.
    """
    pieces = []
    end = 0
    for (start, stop), token in zip(spans, tokens, strict=True):
        before, shown = text[end : max(start, end)], text[max(start, end) : stop]
        end = max(stop, end)
        word = shown.lstrip(" ")
        if word:
            pieces.append(_Piece(before + shown[: len(shown) - len(word)], word, True))
        elif shown:
            pieces.append(_Piece(before, shown, True))
        else:
            name = token.strip() if start == stop else ""
            pieces.append(_Piece(before, name or "·", False))
    return pieces, text[end:]


def _locate(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Spans of tokens in the text they came from, each looked for just behind the one before it.

    Tokens decoded one by one may lack their spaces, or hold half a character; those get an empty span.
    """
    spans = []
    end = 0
    for token in tokens:
        word = token.strip(" ")
        start = text.find(word, end, end + len(word) + _NEAR) if word else -1
        if start < 0:
            spans.append((end, end))
        else:
            end = start + len(word)
            spans.append((start, end))
    return spans


def _fields(attribution: Attribution) -> tuple[Field, ...]:
    """What the table shows: nothing where the response is no JSON, or a single value."""
    try:
        return tuple(field for field in read_fields(attribution) if field.path)
    except InputError:
        return ()


@dataclass(frozen=True)
class _Row:
    """How a field is shown.

    Attributes:
        stem, step: its name in two, `items[0]` and `.price`: only the second differs from row to row.
        is_text: whether the value is a string; others are shown as written.
    """

    stem: str
    step: str
    value: str
    is_text: bool
    complete: bool
    targets: tuple[int, ...]


def _row(field: Field) -> _Row:
    stem = path_name(field.path[:-1]) if len(field.path) > 1 else ""
    step = field.name[len(stem) :]
    written, targets = (field.selection.text, field.selection.targets[0]) if field.selection else ("", ())
    value = field.value if isinstance(field.value, str) else written  # 1.50 is not 1.5
    return _Row(
        stem if len(stem) <= _LONGEST_NAME else f"…{stem[-_LONGEST_NAME:]}",
        step if len(step) <= _LONGEST_NAME else f"{step[:_LONGEST_NAME]}…",
        value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…",
        isinstance(field.value, str),
        field.complete,
        targets,
    )


def _field_boxes(attribution: Attribution, field: Field) -> list[tuple[float, ...] | None]:
    """For each image `(left, top, right, bottom)` as shares of it and the time step; None where there is none."""
    boxes: list[tuple[float, ...] | None] = []
    for image, maps in enumerate(field.selection.maps if field.selection else ()):
        sizes = attribution.picture_sizes
        height, width = sizes[image] if sizes else frames(attribution, image).shape[1:3]
        box, step = peak_box(maps, attribution.extents[image], (height, width)), peak_step(maps)
        if box is None or step is None:
            boxes.append(None)
        else:
            shares = (side / length for side, length in zip(box, (width, height, width, height), strict=True))
            boxes.append((*(round(share, 4) for share in shares), step))
    return boxes


def _picture(attribution: Attribution, image: int) -> dict[str, Any]:
    pictures = frames(attribution, image)
    _, height, width, _ = pictures.shape
    as_uri = _still_uri if len(pictures) == 1 else _frame_uri
    sources = [as_uri(Image.fromarray(picture)) for picture in pictures] if attribution.pictures else []
    return {"frames": sources, "width": width, "height": height}


def _still_uri(picture: Image.Image) -> str:
    if max(picture.size) <= PNG_UP_TO:
        return _data_uri(picture, "PNG")
    return _data_uri(picture, "JPEG", quality=JPEG_QUALITY)


def _frame_uri(picture: Image.Image) -> str:
    shrink = min(1.0, VIDEO_SIDE / max(picture.size))
    width, height = (max(1, round(side * shrink)) for side in picture.size)
    return _data_uri(picture.resize((width, height), Image.Resampling.LANCZOS), "JPEG", quality=VIDEO_QUALITY)


def _data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def _view(attribution: Attribution, label: str) -> dict[str, Any]:
    """What changes with the switch: maps `[target t h w]` and tints `[target context]` as uint8, boxes, and scores.

    `peaks` are the time steps a video opens at, `[target]`, the same as a selection's; levels alone may tie.
    """
    relevance, evidence = attribution.relevance, attribution.evidence
    return {
        "label": label,
        "maps": [
            {
                "grid": heat.shape[1:],
                "extent": extent,
                "levels": _base64(quantise(heat)),
                "peaks": [peak_step(maps) for maps in heat] if heat.shape[1] > 1 else None,
            }
            for heat, extent in zip(attribution.image, attribution.extents, strict=True)
        ],
        "boxes": [_field_boxes(attribution, field) for field in _fields(attribution)],
        "tint": "context" if relevance is None else "relevance",
        "tints": _base64(quantise(attribution.context if relevance is None else relevance)),
        "evidence": None if evidence is None else _finite(evidence),
        "low": None if evidence is None else _low_evidence(attribution, evidence),
        "logProb": _finite(attribution.log_prob),
        "agreement": _finite(attribution.agreement),
        "degenerate": attribution.degenerate.tolist(),
        "explained": None if attribution.explained is None else attribution.explained.tolist(),
        "scales": attribution.config.known_scales,
        "notes": attribution.notes,
        "settings": _settings(attribution),
    }


def _low_evidence(attribution: Attribution, evidence: Tensor) -> dict[str, Any]:
    """The marked words, where the mark begins, and how far it can be trusted."""
    calibration = attribution.calibration
    if calibration is None:
        threshold = 0.0
        key = (
            "evidence below 0 nats: the picture makes the word less likely. No calibration exists for this model, so how "
            "many of such words are invented is not known; fastattr eval DATASET --calibration FILE makes one, to be "
            "kept as calibration.json beside the weights"
        )
    else:
        threshold = calibration.threshold_nats
        key = f"{calibration}. What share of the marked words is invented depends on how often the model invents"
    return {
        "words": [
            {"text": word.text, "targets": word.targets[0], "evidence": _finite(evidence[list(word.targets[0])].sum())}
            for word in attribution.low_evidence
        ],
        "threshold": threshold,
        "key": f"{key}. English function words are left out{', and so is reasoning' if attribution.reasoning else ''}.",
    }


def _settings(attribution: Attribution) -> list[tuple[str, str]]:
    """Name and value of everything needed to get this result again."""
    config, calibration = attribution.config, attribution.calibration
    calibrated = None if calibration is None else f"{calibration.model} on {calibration.dataset}"
    rows = [("model", attribution.model or "not named"), ("source", attribution.source), ("prompt", attribution.prompt)]
    rows.append(("configuration", name_of(config)))
    rows += [(f.name, _written(getattr(config, f.name))) for f in dataclasses.fields(AttributionConfig)]
    for scale, grids in zip(config.known_scales, attribution.grids, strict=False):
        rows.append((f"grid at {scale:g}×", ", ".join("×".join(map(str, grid)) for grid in grids)))
    rows.append(("calibration", _written(calibrated)))
    return [*rows, ("backend that ran", attribution.backend), *attribution.versions]


def _labels(attributions: Sequence[Attribution]) -> list[str]:
    """The name of each configuration, with evidence and backend where they distinguish equal names."""
    names = [name_of(a.config) for a in attributions]
    labels = []
    for name, attribution in zip(names, attributions, strict=True):
        same = [other for other, theirs in zip(attributions, names, strict=True) if theirs == name]
        apart = [f for f in ("evidence", "backend") if len({getattr(other.config, f) for other in same}) > 1]
        labels.append(", ".join([name, *(f"{f} {_written(getattr(attribution.config, f))}" for f in apart)]))
    return labels


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{item:g}" for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)


def _finite(values: Tensor) -> Any:
    """Nested lists in which whatever is not a number is None: JSON has no NaN."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        return round(value, 5) if math.isfinite(value) else None

    return clean(values.tolist())


def _base64(levels: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(levels).tobytes()).decode()
