"""The values of an answer that is JSON, each with the tokens that wrote it, and so with its place in the picture.

The JSON may be the whole response, stand in a fenced block or follow some prose; it may be cut off. It is RFC 8259 and
what models write besides: commas before a closing bracket, raw line breaks in strings, and `NaN`, `Infinity` and
`-Infinity`, as the json module reads them. Nothing else is repaired: a wrong guess would put a box on the wrong place.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastattr.errors import InputError
from fastattr.selection import Selection, token_targets
from fastattr.text import TokenText, answer_text, show_ids
from fastattr.types import Attribution, Box

Value = str | int | float | bool | None
Path = tuple[str | int, ...]

MAX_DEPTH = 256

_SPACE = re.compile(r"[ \t\r\n]*")
_LETTERS = re.compile(r'(?:[^"\\]+|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*')
_LETTER_CUT = re.compile(r"(?:\\(?:u[0-9A-Fa-f]{0,3})?)?\Z")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CUT = re.compile(r"(?:\.|[eE][+-]?)?\Z")
_WORDS: dict[str, Value] = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
_LONGEST_WORD = max(map(len, _WORDS))
_KEY = re.compile(r"[^\W\d]\w*")

_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})(?:[ \t]*json\w*)?\s*(?=[{\[])", re.MULTILINE | re.IGNORECASE)
_EMPTY = re.compile(r"\[\s*\]|\{\s*\}")
_OPENING = re.compile(r"(?!\[\s*(?:[0-9]+\s*)?\]|\{\s*\})[{\[]")  # in prose, [1] is a footnote and [ ] a box to tick

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Field:
    """One value of a JSON answer: a string, a number, true, false or null.

    Attributes:
        path: keys and indices that lead to it, from the outside in; empty where the whole answer is one value.
        value: as `json.loads` reads it. Numbers beyond a float's reach are infinite, and so are whole numbers of more
            digits than Python turns into an int (4,300 by default).
        span: half-open character range in the response; of a string what stands inside the quotes, escapes as written.
        complete: False where the response breaks off inside the value, or so close behind a number that it might go on.
        selection: its tokens, with maps, boxes and score as everywhere; None for an empty string.
    """

    path: Path
    value: Value
    span: tuple[int, int]
    complete: bool
    selection: Selection | None

    @property
    def name(self) -> str:
        """The path as one would write it: `items[2].price`, `["unit price"][0]`; `$` for the empty one."""
        return path_name(self.path)

    @property
    def boxes(self) -> tuple[Box | None, ...]:
        """For each image the box around its peak, `(left, top, right, bottom)` in pixels; None where the map is dark.

        Without images for an empty string: no token wrote it.

        Raises:
            InputError: the attribution was made without pictures.
        """
        return () if self.selection is None else self.selection.boxes

    @property
    def box(self) -> Box | None:
        """The box of the only image, None where there is none.

        Raises:
            InputError: there are several images, see `boxes`, or no pictures.
        """
        return None if self.selection is None else self.selection.box

    @property
    def score(self) -> float | None:
        """Evidence in nats, summed over the tokens: how much likelier the image makes the value.

        None for an empty string and where the attribution was made with `evidence=False`.
        """
        return None if self.selection is None else self.selection.score

    @property
    def log_prob(self) -> float | None:
        """In nats, summed over the tokens: the value's own, given all that stands before it. None for an empty string."""
        if self.selection is None:
            return None
        (targets,) = self.selection.targets
        return float(self.selection.attribution.log_prob[list(targets)].sum())


def read_fields(attribution: Attribution) -> tuple[Field, ...]:
    """The values of a response that is JSON, in the order they are written; a repeated key gives a field each time.

    The first fenced block that is JSON counts, else the first `{` or `[` that begins some; text before and after it
    and the model's reasoning (see `fastattr.reasoning`) are ignored. Of an answer that is cut off, everything up to there
    is returned, the last value perhaps incomplete.

    A field's targets are the tokens that share a character with its span. Tokenizers also make tokens of a value's end
    and the quotes and commas behind it: such a token counts where it holds more of the value than punctuation or white
    space, and then whole, or where no other token holds the value.

    Raises:
        InputError: the response holds no JSON, JSON nested more than `MAX_DEPTH` deep, or token ids without their text, or it
            ends before the answer begins.
    """
    text = attribution.response
    if text == show_ids([attribution.token_ids])[0]:
        raise InputError(
            f"fields are read from the text of the response, but it is the token ids {_shown(text)}; "
            "make the attribution with a tokenizer"
        )
    return tuple(
        Field(
            leaf.path,
            leaf.value,
            (leaf.start, leaf.stop),
            leaf.complete,
            Selection(attribution, ((leaf.start, leaf.stop),), (targets,)) if targets else None,
        )
        for leaf, targets in _with_targets(text, attribution.spans, _read_answer(attribution))
    )


def field_targets(said: TokenText) -> tuple[int, ...]:
    """The tokens that hold the values of a response that is JSON, ascending. Raises `InputError`, see `read_fields`."""
    found = _with_targets(said.text, said.spans, _read_answer(said))
    return tuple(sorted({target for _, targets in found for target in targets}))


def path_name(path: Path) -> str:
    """A path as one would write it.

    >>> path_name(("items", 2, "unit price"))
    'items[2]["unit price"]'
    """
    parts = []
    for step in path:
        if isinstance(step, int):
            parts.append(f"[{step}]")
        elif _KEY.fullmatch(step):
            parts.append(f".{step}")
        else:
            parts.append(f"[{json.dumps(step, ensure_ascii=False)}]")
    return "".join(parts).removeprefix(".") or "$"


# ---- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    path: Path
    value: Value
    start: int
    stop: int
    complete: bool


def _with_targets(text: str, spans: Spans, leaves: Sequence[_Leaf]) -> Iterator[tuple[_Leaf, tuple[int, ...]]]:
    if not leaves:
        return
    shared = token_targets(spans, [(leaf.start, leaf.stop) for leaf in leaves])
    for leaf, targets in zip(leaves, shared, strict=True):
        if leaf.start == leaf.stop:
            yield leaf, ()
        else:
            yield leaf, tuple(target for target in targets if _spells(text, spans[target], leaf)) or targets


def _spells(text: str, span: tuple[int, int], leaf: _Leaf) -> bool:
    """Whether a token lies within the value or holds more of it than punctuation and white space."""
    start, stop = span
    if leaf.start <= start and stop <= leaf.stop:
        return True
    held = text[max(start, leaf.start) : min(stop, leaf.stop)]
    return any(unicodedata.category(letter)[0] not in "PZC" for letter in held)


# ---- JSON with positions -------------------------------------------------------------------------


class _NotJson(Exception):
    """Something else stands where JSON should go on.

    Attributes:
        at: where.
        begun: whether what came before can only have been meant as JSON.
    """

    def __init__(self, at: int, expected: str, begun: bool) -> None:
        super().__init__(at, expected, begun)
        self.at, self.expected, self.begun = at, expected, begun


@dataclass(frozen=True)
class _Reading:
    """One JSON value.

    Attributes:
        stop: the character behind it; the end of the text where it is cut off.
        whole: whether it is not.
    """

    leaves: tuple[_Leaf, ...]
    stop: int
    whole: bool


def _read_answer(why: Attribution | TokenText) -> tuple[_Leaf, ...]:
    """The leaves of the JSON after any reasoning. Raises `InputError`."""
    text = answer_text(why)
    if why.reasoning and not text.strip():
        start, stop = why.reasoning[-1]
        raise InputError(
            "fields are read from the answer, but the response ends with the model's reasoning, at character "
            f"{stop}, which begins at character {start}; let it write more, with a larger max_new_tokens. If the reasoning was "
            "removed from this response, pass the response as the model wrote it"
        )
    return _read_leaves(text)


def _read_leaves(text: str) -> tuple[_Leaf, ...]:
    """The leaves of the JSON a response holds. Raises `InputError`."""
    start = _end(_SPACE, text, 1 if text.startswith("\ufeff") else 0)
    try:
        reading = _read_value(text, start)
        if _end(_SPACE, text, reading.stop) == len(text) and (reading.whole or text.startswith(("{", "["), start)):
            return reading.leaves
    except _NotJson:
        pass  # it may still hold some
    for fence in _FENCE.finditer(text):
        try:
            return _read_value(text, fence.end()).leaves
        except _NotJson:
            pass
    broken, at = "", 0
    while opening := _OPENING.search(text, at):
        try:
            return _read_value(text, opening.start()).leaves
        except _NotJson as wrong:
            broken = broken or (
                f"; what begins at character {opening.start()} breaks at character {wrong.at}: "
                f"expected {wrong.expected}, found {_shown(text[wrong.at :])}"
            )
            if wrong.begun:  # what it holds further in would come with a wrong path
                break
            at = wrong.at
    else:
        if _EMPTY.search(text):
            return ()
    raise InputError(
        "fields are read from a response that is JSON or holds some, a {...} or [...], but this one begins with "
        f"{_shown(text.lstrip())}{broken}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_value(text: str, at: int) -> _Reading:
    """Read one value, without recursion: how deep it may go does not hang on who calls.

    Raises:
        _NotJson: it is none.
        InputError: it is nested too deep.
    """
    leaves: list[_Leaf] = []
    closing: list[str] = []  # brackets to come, the innermost last
    path: list[str | int] = []  # a step for each of them
    begun = False
    while True:
        # here stands a value, in an object behind its key, or the bracket that closes an empty list or object
        at = _end(_SPACE, text, at)
        if at == len(text):
            return _Reading(tuple(leaves), at, False)
        if closing and text[at] == closing[-1]:
            closing.pop()
            path.pop()
            at += 1
        else:
            if closing and closing[-1] == "}":
                key, at = _read_key(text, at, begun)
                begun = True
                if at == len(text):
                    return _Reading(tuple(leaves), at, False)
                path[-1] = key
            if text[at] in "{[":
                if len(path) == MAX_DEPTH:
                    raise InputError(
                        f"the JSON in the response is nested more than {MAX_DEPTH} deep at character {at}, expected less"
                    )
                closing.append("}" if text[at] == "{" else "]")
                path.append(0)
                at += 1
                continue
            leaf, at = _read_leaf(text, at, tuple(path), begun)
            if leaf is not None:
                leaves.append(leaf)
            if leaf is None or not leaf.complete:
                return _Reading(tuple(leaves), at, False)
        # behind a value: close what closes here, then another one or the end
        while closing:
            at = _end(_SPACE, text, at)
            if at == len(text):
                return _Reading(tuple(leaves), at, False)
            if text[at] == ",":
                if isinstance(path[-1], int):
                    path[-1] += 1
                begun = True
                at += 1
                break
            if text[at] != closing[-1]:
                raise _NotJson(at, f"a comma or {closing[-1]}", begun)
            closing.pop()
            path.pop()
            at += 1
        if not closing:
            return _Reading(tuple(leaves), at, True)


def _read_key(text: str, at: int, begun: bool) -> tuple[str, int]:
    """A key, and where its value begins; that is the end of the text where it does not come."""
    if text[at] != '"':
        raise _NotJson(at, 'a key in "', begun)
    stop = _string_stop(text, at, begun)
    if stop == len(text):
        return "", stop
    key = _decode(text[at + 1 : stop])
    at = _end(_SPACE, text, stop + 1)
    if at == len(text):
        return key, at
    if text[at] != ":":
        raise _NotJson(at, "a colon", begun)
    return key, _end(_SPACE, text, at + 1)


def _read_leaf(text: str, at: int, path: Path, begun: bool) -> tuple[_Leaf | None, int]:
    """A string, number or word, and the character behind it; None where too little of it is there to tell."""
    if text[at] == '"':
        stop = _string_stop(text, at, begun)
        complete = stop < len(text)
        letters = _decode(text[at + 1 : _end(_LETTERS, text, at + 1)])
        if not complete and "\ud800" <= letters[-1:] <= "\udbff":
            letters = letters[:-1]  # the first half of a character
        return _Leaf(path, letters, at + 1, stop, complete), stop + complete
    rest = text[at : at + _LONGEST_WORD + 1]
    for word, value in _WORDS.items():
        if rest.startswith(word):
            return _Leaf(path, value, at, at + len(word), True), at + len(word)
        if word.startswith(rest) and rest != "-":
            return _Leaf(path, value, at, len(text), False), len(text)
    number = _NUMBER.match(text, at)
    if number is None:
        if rest == "-":
            return None, len(text)
        raise _NotJson(at, "a value", begun)
    stop = number.end()
    if _NUMBER_CUT.match(text, stop):
        return _Leaf(path, _number(number), at, len(text), stop == len(text) and not path), len(text)
    return _Leaf(path, _number(number), at, stop, True), stop


def _string_stop(text: str, at: int, begun: bool) -> int:
    """Where the string that begins at `at` has its closing quote, or the end of the text."""
    stop = _end(_LETTERS, text, at + 1)
    if stop == len(text) or text[stop] == '"':
        return stop
    if _LETTER_CUT.match(text, stop):
        return len(text)
    raise _NotJson(stop, "an escape that JSON knows", begun)


def _decode(raw: str) -> str:
    return json.loads(f'"{raw}"', strict=False)


def _number(number: re.Match[str]) -> int | float:
    if number[1] or number[2]:
        return float(number[0])
    try:
        return int(number[0])
    except ValueError:  # Python turns no more than 4,300 digits into an int
        return float(number[0])


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
