"""A conversation as the text a model reads, and which of its tokens write what was said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import Environment, TemplateError, meta
from torch import Tensor

from fastattr.adapters.model import Model, accepts
from fastattr.chat import Chat, Prompt
from fastattr.errors import InputError, TokenLayoutError
from fastattr.text import decode_tokens
from fastattr.types import ImageGroup

ShownAs = tuple[bool, int]  # whether a picture is shown as a video; else as how many images


def render(model: Model, chat: Chat, shown_as: Sequence[ShownAs]) -> str:
    """The conversation with a placeholder for every picture, where the model is about to answer.

    Raises:
        InputError: the processor has no chat template, or the template rejects the conversation or does not read an option.
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
    _check_options(model, chat, messages)
    options = {**({"tools": list(chat.tools)} if chat.tools else {}), **chat.template_options}
    renderer = model.processor
    if not all(accepts(renderer.apply_chat_template, name) for name in options):
        # a custom processor may not accept options; if its tokenizer renders the chat, use that
        renderer = renderer.tokenizer if _tokenizer_renders(renderer, messages) else renderer
    try:
        return str(renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options))
    except (ValueError, TypeError, TemplateError) as error:
        raise InputError(f"{type(model.processor).__name__} cannot render the chat: {error}") from error


def _check_options(model: Model, chat: Chat, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises `InputError` for options that the template would ignore, where the text of the template is known."""
    given = set(chat.template_options) - {"chat_template"}
    if not given:
        return
    owner = model.processor
    template = chat.template_options.get("chat_template") or getattr(owner, "chat_template", None)
    if template is None and _tokenizer_renders(owner, messages):
        template = getattr(owner.tokenizer, "chat_template", None)
    read = _variables(template) if isinstance(template, str) else None
    if read is None or given <= read:
        return
    own = {*Environment().globals, *getattr(owner.tokenizer, "special_tokens_map", {}), *_TEMPLATE_NAMES}
    known = ", ".join(sorted(read - own)) or "none"
    raise InputError(
        f"template_options holds {', '.join(sorted(given - read))}, which the chat template of {model.name} does not read; "
        f"the options it reads: {known}"
    )


def _tokenizer_renders(processor: Any, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a processor renders chats as its tokenizer does; a custom processor may do something else."""
    try:
        one, other = (
            each.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            for each in (processor, processor.tokenizer)
        )
    except (AttributeError, ValueError, TypeError, TemplateError):
        return False
    return bool(one == other)


_TEMPLATE_NAMES = ("add_generation_prompt", "documents", "messages", "raise_exception", "strftime_now", "tools")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a tag of transformers around answers


@lru_cache
def _variables(template: str) -> frozenset[str] | None:
    """The variables that a chat template reads; None where it is not plain Jinja."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # only parses, so autoescape does not matter
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except TemplateError:
        return None


def template_notes(model: Model, prompt: Prompt) -> tuple[str, ...]:
    """Notes on texts of a conversation that the chat template leaves out or changes."""
    if not isinstance(prompt, Chat):
        return ()
    written = {each.index: each.text for each in _written(model, prompt)}
    notes = []
    for index, (role, text) in enumerate(zip(prompt.roles, prompt.texts, strict=True)):
        said, read = ("".join(each.split()).casefold() for each in (text, written.get(index, "")))
        if said and not read:
            notes.append(f"the chat template leaves out what the {role} said, {_short(text)}, so it is not context")
        elif said != read:
            notes.append(
                f"the chat template writes what the {role} said, {_short(text)}, as {_short(written[index].strip())}; "
                "context is what the model reads"
            )
    return tuple(notes)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def text_positions(model: Model, chat: Chat, input_ids: Tensor, groups: Sequence[ImageGroup]) -> tuple[int, ...]:
    """Positions of the tokens of the conversation's texts, as far as the chat template writes them.

    Where the template changes a text, marks around it show what it becomes, see `_written`. A text is searched between
    the pictures it stands between. Where it occurs there more than once, as for a word that the chat template or the
    processor also writes, the occurrence is taken whose surroundings are most like what the template writes around the
    text. Special tokens are left out.

    Args:
        input_ids: int `[seq]`.
        groups: image tokens of the pictures, in the order of the conversation.

    Raises:
        TokenLayoutError: a text is not in what the model reads, or the chat template leaves out what the user said.
        InputError: the texts hold special tokens alone.
    """
    special = model.special_tokens
    ids = input_ids.tolist()
    written = _written(model, chat)
    texts = dict(zip([each.index for each in written], _read(model, written, special), strict=True))
    moved = list(texts) != sorted(texts)
    said: list[list[_Text]] = [[]]
    index = 0
    for part in chat.parts:
        if part["type"] == "text":
            said[-1] += [texts[index]] if index in texts else []
            index += 1
        else:
            said.append([])
    edges = [(min(group.positions), max(group.positions) + 1) for group in groups]
    stretches = list(zip([0, *(stop for _, stop in edges)], [*(start for start, _ in edges), len(ids)], strict=True))
    found: list[int] | None = None
    if not moved and len(stretches) == len(said) and all(start <= stop for start, stop in stretches):
        each = [_find(model, ids, range(*at), of, special) for at, of in zip(stretches, said, strict=True)]
        found = None if any(one is None for one in each) else [position for one in each for position in one or ()]
        first = all(ids[at] in special for at in range(stretches[-1][0]))  # the processor put all pictures first
    else:
        first = True  # the stretches between pictures are not known, or the template moved texts
    if found is None and first:
        found = _find(model, ids, range(len(ids)), list(texts.values()), special)
    if found is None:
        whole = model.decode([[id for id in ids if id not in model.placeholder_ids]])[0]
        missing = [each.text.strip() for each in written if "".join(each.text.split()) not in "".join(whole.split())]
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


@dataclass(frozen=True)
class _Written:
    """A text as the chat template writes it.

    Attributes:
        index: among the texts of the conversation.
        text: as the model reads it.
        before, behind: what the template writes around it, up to the previous and the next text.
    """

    index: int
    text: str
    before: str
    behind: str


_BEGIN, _END = "\u2042{}\u27e6", "\u27e7{}\u2042"
_PLACE = re.compile("\u2042([0-9]+)\u27e6\u27e7\\1\u2042")
_ANY_MARK = re.compile("\u2042[0-9]+\u27e6|\u27e7[0-9]+\u2042")


def _written(model: Model, chat: Chat) -> list[_Written]:
    """The texts of a conversation in the order in which the chat template writes them, without those it leaves out.

    The conversation is rendered twice: with marks in place of the texts, which shows what the template writes around
    them, and with marks around the texts, which shows what it makes of them.

    Raises:
        TokenLayoutError: the template leaves out a text of the user.
    """
    marks = [(_BEGIN.format(i), _END.format(i)) for i in range(len(chat.texts))]
    around = _render_texts(model, chat, [begin + end for begin, end in marks])
    marked = _render_texts(
        model, chat, [begin + text + end for (begin, end), text in zip(marks, chat.texts, strict=True)]
    )
    pieces = _PLACE.split(around)  # what stands around the marks, and their indices, in turn
    between, indices = pieces[::2], [int(index) for index in pieces[1::2]]
    order = list(dict.fromkeys(indices))
    if len(indices) != len(order):  # a template that writes texts twice
        between = [""] * (len(order) + 1)
    found = []
    for place, index in enumerate(order):
        text = _between_marks(marked, *marks[index], between[place], between[place + 1])
        if text is not None and (text.strip() or not chat.texts[index].strip()):
            found.append(_Written(index, text, between[place], between[place + 1]))
    there = {each.index for each in found}
    left_out = [
        text
        for index, (role, text) in enumerate(zip(chat.roles, chat.texts, strict=True))
        if role == "user" and index not in there
    ]
    if left_out:
        raise TokenLayoutError(
            f"the prompt {left_out[0]!r} is not in the text the model reads: the chat template leaves it out; leave that turn "
            "out too, or if the template reads parts alone, write the content as [{'type': 'text', 'text': ...}]"
        )
    return found


def _between_marks(marked: str, begin: str, end: str, before: str, behind: str) -> str | None:
    """The text between two marks.

    Where the template dropped one mark, the text is cut at what the template writes `before` or `behind` it; None where
    it dropped both.
    """
    first, last = marked.find(begin), marked.find(end)
    if first < 0 and last < 0:
        return None
    if first >= 0:
        first += len(begin)
    if first < 0:
        first = max((match.end() for match in _ANY_MARK.finditer(marked, 0, last)), default=0)
        first += _alike(marked[first:last], before)
    elif last < 0:
        last = next((match.start() for match in _ANY_MARK.finditer(marked, first)), len(marked))
        last -= _alike(reversed(marked[first:last]), reversed(behind))
    return _ANY_MARK.sub("", marked[first:last])


def _render_texts(model: Model, chat: Chat, texts: Sequence[str]) -> str:
    """The conversation with other texts, and a placeholder for every picture."""
    left = iter(texts)

    def changed(content: Any) -> Any:
        if content is None:
            return None
        if isinstance(content, str):
            return next(left)
        return [{"type": "text", "text": next(left)} if each["type"] == "text" else each for each in content]

    messages = tuple({**each, "content": changed(each.get("content"))} for each in chat.messages)
    try:
        return render(model, replace(chat, messages=messages), [(False, 1)] * chat.n_pictures)
    except InputError:
        if chat.template_options:
            raise
        # no chat template: the prompt of a captured response was written by hand
        return "".join(texts)


def _read(model: Model, written: Sequence[_Written], special: Mapping[int, str]) -> list[_Text]:
    """Texts as the tokenizer decodes them, and their surroundings, without special tokens and white space."""
    nothing = re.compile("|".join([r"\s+", *(re.escape(token) for token in sorted(special.values(), key=len)[::-1])]))
    tokenizer = model.processor.tokenizer  # which may normalise, or lack a character
    read = model.decode([tokenizer(each.text, add_special_tokens=False)["input_ids"] for each in written])
    return [
        (nothing.sub("", text), nothing.sub("", each.before), nothing.sub("", each.behind))
        for text, each in zip(read, written, strict=True)
    ]
