"""A conversation as the text a model reads, and which of its tokens write what was said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from fastattr.adapters.model import Model
from fastattr.chat import Chat
from fastattr.errors import InputError, TokenLayoutError
from fastattr.text import decode_tokens
from fastattr.types import ImageGroup

ShownAs = tuple[bool, int]  # whether a picture is shown as a video; else as how many images


def render(model: Model, chat: Chat, shown_as: Sequence[ShownAs]) -> str:
    """The conversation with a placeholder for every picture, where the model is about to answer.

    Raises:
        InputError: the processor has no chat template, or it refuses the conversation.
    """
    left = iter(shown_as)

    def parts(content: Any) -> Any:
        if content is None or isinstance(content, str):
            return content
        shown: list[dict[str, str]] = []
        for part in content:
            if part["type"] == "text":
                shown.append({"type": "text", "text": part["text"]})
            else:
                film, n_images = next(left)
                shown += [{"type": "video"}] if film else [{"type": "image"}] * n_images
        return shown

    messages = [{**message, "content": parts(message.get("content"))} for message in chat.messages]
    options = {"tools": list(chat.tools)} if chat.tools else {}
    try:
        return str(model.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options))
    except (ValueError, TypeError, TemplateError) as error:
        raise InputError(f"{type(model.processor).__name__} cannot render the chat: {error}") from error


def text_positions(model: Model, chat: Chat, input_ids: Tensor, groups: Sequence[ImageGroup]) -> tuple[int, ...]:
    """Positions of the tokens that write what was said.

    A text is looked for between the pictures it was said between. Where its characters stand there more than once, as in
    a word that the chat template or the processor writes too, the place counts whose surroundings are most like what the
    template writes around the text. Special tokens are nobody's words.

    Args:
        input_ids: int `[seq]`.
        groups: image tokens of the pictures, in the order of the conversation.

    Raises:
        TokenLayoutError: a text is not in what the model reads, for example because the chat template rewrites it.
        InputError: the texts hold special tokens alone.
    """
    special = model.special_tokens
    ids = input_ids.tolist()
    said: list[list[_Text]] = [[]]
    texts = iter(_surroundings(model, chat, special))
    for part in chat.parts:
        if part["type"] == "text":
            said[-1].append(next(texts))
        else:
            said.append([])
    edges = [(min(group.positions), max(group.positions) + 1) for group in groups]
    stretches = list(zip([0, *(stop for _, stop in edges)], [*(start for start, _ in edges), len(ids)], strict=True))
    found: list[int] | None = None
    if len(stretches) == len(said) and all(start <= stop for start, stop in stretches):
        each = [_find(model, ids, range(*at), of, special) for at, of in zip(stretches, said, strict=True)]
        found = None if any(one is None for one in each) else [position for one in each for position in one or ()]
        first = all(ids[at] in special for at in range(stretches[-1][0]))  # the processor put all pictures first
    else:
        first = True  # how many images a picture was shown as is not known here
    if found is None and first:
        found = _find(model, ids, range(len(ids)), [text for of in said for text in of], special)
    if found is None:
        whole = model.decode([[id for id in ids if id not in model.placeholder_ids]])[0]
        missing = [text.strip() for text in chat.texts if "".join(text.split()) not in "".join(whole.split())]
        names = f"the prompt {missing[0]!r} is" if missing else "what was said is, in this order,"
        raise TokenLayoutError(
            f"{names} not in the text the model reads, {whole!r}, so its tokens cannot be found; "
            "if the chat template reads parts alone, write the content as [{'type': 'text', 'text': ...}]"
        )
    if not found:
        raise InputError(
            f"the prompt {chat.text!r} holds special tokens alone, expected some text: it is the context the response is "
            "read against"
        )
    return tuple(found)


_Text = tuple[str, str, str]  # what was said, and what the template writes before and behind it; without white space


def _find(
    model: Model, ids: Sequence[int], stretch: range, said: Sequence[_Text], special: Mapping[int, str]
) -> list[int] | None:
    """Positions of the tokens of some texts, in order, within a stretch of the sequence; None if one is not there."""
    if not said:
        return []
    kept = [i for i in stretch if ids[i] not in special]
    decoded = decode_tokens([ids[i] for i in kept], model.decode)
    origin = [at for at, character in enumerate(decoded.text) if not character.isspace()]
    text = "".join(decoded.text[at] for at in origin)
    at_end = stretch.stop == len(ids)
    # no picture lies between them, so they are looked for as one, with what the template writes between
    joined = "".join(shown + behind for shown, _, behind in said[:-1]) + said[-1][0]
    cursor = _place(text, (joined, said[0][1], said[-1][2]), 0, at_end)
    together = cursor is not None
    ranges: list[tuple[int, int]] = []
    for n, each in enumerate(said):
        if not together:  # the template writes some of it otherwise
            cursor = _place(text, each, cursor or 0, at_end and n == len(said) - 1)
        if cursor is None:
            return None
        shown, _, behind = each
        if shown:
            ranges.append((origin[cursor], origin[cursor + len(shown) - 1] + 1))
        cursor += len(shown) + (len(behind) if together else 0)
    return [
        kept[i]
        for i, (start, stop) in enumerate(decoded.spans)
        if any(start < last and stop > first for first, last in ranges)
    ]


def _place(text: str, said: _Text, start: int, at_end: bool) -> int | None:
    """Where a text stands from `start` on; of several places the one whose surroundings are most like the template's.

    Of places that are equally like it the last counts in what ends the prompt, since what a processor writes for a
    picture stands before it, and elsewhere the first, since the next picture's stands behind it.
    """
    shown, before, behind = said
    places = [match.start() for match in re.finditer(f"(?={re.escape(shown)})", text) if match.start() >= start]

    def likeness(place: int) -> int:
        return _alike(reversed(text[:place]), reversed(before)) + _alike(text[place + len(shown) :], behind)

    return max(reversed(places) if at_end else places, key=likeness, default=None)


def _alike(one: Iterable[str], other: Iterable[str]) -> int:
    """How many characters are the same until one differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


_MARK = "\N{ASTERISM}"


def _surroundings(model: Model, chat: Chat, special: Mapping[int, str]) -> list[_Text]:
    """Every text with what the chat template writes around it, up to the texts before and behind."""
    n = len(chat.texts)
    left = iter(range(n))

    def marked(content: Any) -> Any:
        if content is None:
            return None
        if isinstance(content, str):
            return f"{_MARK}{next(left)}{_MARK}"
        return [
            {"type": "text", "text": f"{_MARK}{next(left)}{_MARK}"} if each["type"] == "text" else each
            for each in content
        ]

    probe = Chat(tuple({**each, "content": marked(each.get("content"))} for each in chat.messages), chat.tools)
    try:
        rendered = render(model, probe, [(False, 1)] * chat.n_pictures)
    except InputError:  # no template: a captured chat was written by hand
        rendered = "".join(f"{_MARK}{i}{_MARK}" for i in range(n))
    left_out = [text for i, text in enumerate(chat.texts) if f"{_MARK}{i}{_MARK}" not in rendered]
    if left_out:
        raise TokenLayoutError(
            f"the prompt {left_out[0]!r} is not in the text the model reads: the chat template leaves it out; leave that turn "
            "out too, or if the template reads parts alone, write the content as [{'type': 'text', 'text': ...}]"
        )
    written = re.split(f"{_MARK}[0-9]+{_MARK}", rendered)
    if len(written) != n + 1:  # a template that writes texts twice
        written = [""] * (n + 1)
    nothing = re.compile("|".join([r"\s+", *(re.escape(token) for token in sorted(special.values(), key=len)[::-1])]))
    tokenizer = model.processor.tokenizer  # which may normalise, or lack a character
    read = model.decode([tokenizer(text, add_special_tokens=False)["input_ids"] for text in chat.texts])
    bare = [nothing.sub("", each) for each in (*written, *read)]
    return [(bare[n + 1 + i], bare[i], bare[i + 1]) for i in range(n)]
