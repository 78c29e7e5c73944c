"""Token ids to text, and which characters each token wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastattr.reasoning import find_reasoning

if TYPE_CHECKING:
    from fastattr.types import Attribution

# English words that say little a picture could bear out. Numbers, quantities, yes, no and not do, and are not here.
FUNCTION_WORDS = frozenset(
    word
    for words in (
        "a an the this that these those each every either neither some any all both another other such",
        "and or but nor so yet if because although though while whereas since unless until than as whether",
        "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself",
        "we us our ours ourselves they them their theirs themselves",
        "can could may might must shall should will would",
        "am is are was were be been being have has had having do does did doing done",
        "about above across after against along among around at before behind below beneath beside besides between",
        "beyond by down during for from in inside into near of off on onto out outside over through throughout to",
        "toward towards under underneath up upon via with within without",
        "what when where which who whom whose why how there",
        "i'm you're he's she's it's we're they're i've you've we've they've i'd you'd he'd she'd we'd they'd",
        "i'll you'll he'll she'll it'll we'll they'll that's there's here's what's who's where's",
    )
    for word in words.split()
)

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
Span = tuple[int, int]

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are not a whole character
_BLOCK = 8  # tokens of a run that are decoded at once, after as many before them
_PROMPT_END = 32  # last tokens of a prompt, in which a chat template may open the reasoning
_SETTLE = 32  # tokens that `TextPieces` decodes again at most before it drops the oldest


@dataclass(frozen=True)
class TokenText:
    """A decoded response.

    Attributes:
        text: all ids decoded together.
        tokens: the text of each token; tokens that encode parts of one character all have that character.
        spans: half-open character ranges in `text`, in order. Together they cover it, and two of them share at most one
            character. Empty for a token without text.
        special: indices of special tokens, such as the end of a turn.
        reasoning: half-open character ranges of the model's reasoning, see `fastattr.reasoning`.
    """

    text: str
    tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    special: tuple[int, ...] = ()
    reasoning: tuple[Span, ...] = ()


def decode_with(tokenizer: Any) -> Decode:
    """The `batch_decode` of a tokenizer or processor that keeps special tokens and does not clean up spaces."""
    parameters = inspect.signature(tokenizer.batch_decode).parameters.values()
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters}
    wanted = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    options = {name: value for name, value in wanted.items() if any_name or name in named}
    return lambda rows: list(tokenizer.batch_decode(rows, **options))


def special_ids_of(tokenizer: Any) -> frozenset[int]:
    """Ids of a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})  # rebuilt at every access
    special = (int(id) for id, token in added.items() if getattr(token, "special", False))
    return frozenset((*getattr(tokenizer, "all_special_ids", ()), *special))


def decode_tokens(ids: Sequence[int], decode: Decode) -> TokenText:
    """Decode a response as a whole, and find which characters of it belong to each token.

    The text of a response is not the concatenation of the texts of its tokens: several byte tokens may encode one
    character, one invalid byte breaks a whole run of byte tokens (`<0xE2>`), and some decoders drop the first space. So
    each distinct token is decoded once after an ordinary token, each run of tokens with parts of characters is decoded as
    a whole, and the results are matched along the text. The cost is linear in the length. Where they do not match, all
    tokens up to there are decoded again; known tokenizers need that only at special tokens.
    """
    ids = list(ids)
    if not ids:
        return TokenText("", (), ())
    (text,) = decode([ids])
    own = _OwnTexts(ids, decode)
    spans: list[Span] = []
    at = i = 0
    while i < len(ids):
        stop = own.run_end(i)
        piece = own.piece(i, stop)
        end = at + len(piece)
        if stop == len(ids):
            end = len(text)
        elif not text.startswith(piece, at):
            end = max(at, _common(decode([ids[:stop]])[0], text))
        spans += _share(own, i, stop, text[at:end], at)
        at, i = end, stop
    return TokenText(text, tuple(text[start:stop] for start, stop in spans), tuple(spans))


def decode_response(
    prompt_ids: Sequence[int], response_ids: Sequence[int], decode: Decode, special_ids: Collection[int]
) -> TokenText:
    """`decode_tokens` of a response, with its special tokens and reasoning.

    Args:
        prompt_ids: of the prompt, where a chat template may open the reasoning.
        special_ids: of tokens that are never words.
    """
    said = decode_tokens(response_ids, decode)
    special = tuple(i for i, id in enumerate(response_ids) if id in special_ids)
    (ending,) = decode(
        [[id for id in prompt_ids[-_PROMPT_END:] if id >= 0]]
    )  # some models have negative placeholder ids
    return replace(said, special=special, reasoning=find_reasoning(said.text, ending))


def said_text(why: TokenText | Attribution) -> str:
    """The response with special tokens replaced by white space of the same length."""
    return _blank(_text_of(why), [why.spans[i] for i in why.special])


def answer_text(why: TokenText | Attribution) -> str:
    """The response with special tokens and reasoning replaced by white space of the same length."""
    return _blank(said_text(why), why.reasoning)


def reasoning_tokens(why: TokenText | Attribution) -> tuple[int, ...]:
    """Indices of the tokens that belong to reasoning and not to the answer."""
    answer = answer_text(why)
    within = iter(sorted(why.reasoning))
    start, stop = next(within, (0, 0))
    found = []
    for i, (first, last) in enumerate(why.spans):
        while stop <= first and stop:
            start, stop = next(within, (0, 0))
        if start < last and first < stop and first < last and not answer[first:last].strip():
            found.append(i)
    return tuple(found)


def _text_of(why: TokenText | Attribution) -> str:
    return why.text if isinstance(why, TokenText) else why.response


def _blank(text: str, spans: Iterable[Span]) -> str:
    """`text` with line breaks in place of the characters of `spans`, which are in order."""
    pieces, end = [], 0
    for start, stop in spans:
        start = max(start, end)
        pieces += [text[end:start], "\n" * (stop - start)]
        end = max(end, stop)
    return "".join(pieces) + text[end:]


class _OwnTexts:
    """Texts of single tokens as they would be in the middle of a text."""

    def __init__(self, ids: Sequence[int], decode: Decode) -> None:
        self.ids, self.decode = ids, decode
        different = list(dict.fromkeys(ids))
        alone = dict(zip(different, decode([[id] for id in different]), strict=True))
        self.ahead = _ordinary(alone, decode)[:1]  # at the start some decoders drop a space
        self.texts = dict(zip(different, self.behind([], [[id] for id in different]), strict=True))
        self.partial = {id for id, text in self.texts.items() if _BROKEN in text}
        self.single = {id for id, text in self.texts.items() if text == _BROKEN or (len(text) == 1 and text.isascii())}
        if self.partial & self.single:  # an ASCII byte token is text alone, but broken next to broken ones
            broken = next(id for id in different if id in self.partial & self.single)
            ascii_ids = [id for id in self.single if id not in self.partial]
            among = self.behind([broken], [[id] for id in ascii_ids])
            self.partial |= {id for id, text in zip(ascii_ids, among, strict=True) if text != self.texts[id]}

    def behind(self, before: Sequence[int], rows: Sequence[Sequence[int]]) -> list[str]:
        """The text that rows of tokens add after an ordinary token and `before`."""
        start, *whole = self.decode([[*self.ahead, *before], *([*self.ahead, *before, *row] for row in rows)])
        return [text[len(start) :] if text.startswith(start) else text for text in whole]

    def run_end(self, start: int) -> int:
        """End of the run of tokens from `start` on that must be decoded together."""
        stop = start
        while stop < len(self.ids) and self.ids[stop] in self.partial:
            stop += 1
        return max(stop, start + 1)

    def piece(self, start: int, stop: int) -> str:
        """The text of such a run."""
        if start == 0:
            return self.decode([self.ids[:stop]])[0]
        if stop == start + 1:
            return self.texts[self.ids[start]]
        return self.behind([], [self.ids[start:stop]])[0]


def _share(own: _OwnTexts, start: int, stop: int, text: str, at: int) -> list[Span]:
    """The spans of the tokens `start` to `stop`, whose text together is `text`, at character `at`."""
    n = stop - start
    if n == 1:
        return [(at, at + len(text))]
    if all(id in own.single for id in own.ids[start:stop]):
        if len(text) == n:  # broken bytes
            return [(at + i, at + i + 1) for i in range(n)]
        if len(text.encode()) == n:  # whole characters
            places = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
            return [(at + first, at + last) for first, last in places]
    spans: list[Span] = []
    known = length = 0  # characters that agree with the text, and characters decoded so far
    for block in range(start, stop, _BLOCK):
        first, last = max(start, block - _BLOCK), min(stop, block + _BLOCK)
        before, *upto = own.behind([], [own.ids[first:i] for i in range(block, last + 1)])
        for decoded in upto:
            length += len(decoded) - len(before)
            before = decoded
            n_broken = len(decoded) - len(decoded.rstrip(_BROKEN))
            if n_broken > 1:  # some decoders write one for each byte of an incomplete character
                whole = length - n_broken
            else:
                end = decoded[-2:]
                whole = length - len(end) + _common(end, text[max(0, length - len(end)) : length])
            begun = whole < length
            whole = min(max(known, whole), len(text))
            span = (known, min(whole + begun, len(text)))
            if span[0] == span[1] and text[:known].endswith(_BROKEN):
                span = (known - 1, known)
            spans.append(span)
            known = max(known, whole)
    spans[-1] = (spans[-1][0], len(text))
    return [(at + first, at + last) for first, last in spans]


def _ordinary(alone: Mapping[int, str], decode: Decode) -> list[int]:
    """Ids of tokens whose text does not depend on what follows: words first, white space last."""
    found = [id for id, text in alone.items() if _BROKEN not in text]
    found.sort(key=lambda id: (not alone[id].strip().isalnum(), not alone[id].strip()))
    broken = next((id for id, text in alone.items() if _BROKEN in text), None)
    if broken is None:
        return found
    joint = decode([[id, broken] for id in found])
    return [id for id, text in zip(found, joint, strict=True) if text.startswith(alone[id])]


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


class TextPieces:
    """The text of a response that arrives token by token.

        pieces = TextPieces(model.decode)
        for token_id in token_ids:
            print(pieces.add(token_id), end="")
        print(pieces.rest)

    The pieces together are the text of all ids decoded at once. The exception is an invalid byte token, which makes
    decoders replace earlier characters of its run: those were already returned.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []  # those that the text of the next one may depend on
        self._given = 0  # characters of their text that were returned

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        (text,) = self._decode([self._ids])
        whole = text.rstrip(_BROKEN)
        piece = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._ids) >= _SETTLE:
            self._settle(text)
        return piece

    def _settle(self, text: str) -> None:
        """Drop ids that are not needed to decode what follows: keep those of the last whole character."""
        held = len(text) - self._given
        ends = [self._ids[-n:] for n in range(1, _BLOCK + 1)]
        for ids, end in zip(ends, self._decode(ends), strict=True):
            if len(end) > held and text.endswith(end) and end[: len(end) - held].strip() and end[0] != _BROKEN:
                self._ids, self._given = ids, len(end) - held
                return

    @property
    def rest(self) -> str:
        """What was not returned yet: a character that is still incomplete."""
        return self._decode([self._ids])[0][self._given :] if self._ids else ""


def show_ids(rows: Sequence[Sequence[int]]) -> list[str]:
    """Ids as text where no tokenizer is at hand: `<17>`."""
    return ["".join(f"<{i}>" for i in row) for row in rows]
