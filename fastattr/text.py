"""Token ids to text, and which characters each token wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

_WINDOW = 8  # tokens decoded together, so that spaces and multi-token characters come out as in the text
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class TokenText:
    """A decoded response.

    Attributes:
        text: the whole of it.
        tokens: what each token adds; tokens that share one character all carry it.
        spans: half-open character ranges in `text`.
    """

    text: str
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


def decode_tokens(ids: Sequence[int], decode: Decode) -> TokenText:
    """Split a response into the text of its tokens, without tokenising anything again.

    Each token's text is the difference between two short decodes, which keeps the cost linear and is
    right for byte-level and sentence-piece tokenizers alike.
    """
    starts = [max(0, i - _WINDOW) for i in range(len(ids))]
    before = decode([list(ids[s:i]) for i, s in enumerate(starts)])
    upto = decode([list(ids[s : i + 1]) for i, s in enumerate(starts)])

    text = ""
    pieces: list[str] = [""] * len(ids)
    spans: list[tuple[int, int]] = [(0, 0)] * len(ids)
    open_tokens: list[int] = []  # tokens that so far hold only part of a character
    for i in range(len(ids)):
        open_tokens.append(i)
        if upto[i].endswith(_BROKEN) and i + 1 < len(ids) and len(open_tokens) < _WINDOW:
            continue
        first = open_tokens[0]
        known = before[first] if starts[i] == starts[first] else decode([list(ids[starts[i] : first])])[0]
        piece = upto[i][len(known) :] if upto[i].startswith(known) else decode([list(ids[first : i + 1])])[0]
        for token in open_tokens:
            pieces[token], spans[token] = piece, (len(text), len(text) + len(piece))
        text += piece
        open_tokens = []
    return TokenText(text, tuple(pieces), tuple(spans))


def show_ids(rows: Sequence[Sequence[int]]) -> list[str]:
    """Ids as text where no tokenizer is at hand: `<17>`."""
    return ["".join(f"<{i}>" for i in row) for row in rows]
