"""Which tokens of a response are to be explained, when not all of them are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from fastattr.errors import InputError, PhraseError
from fastattr.fields import field_targets
from fastattr.selection import token_targets
from fastattr.text import Span, TokenText, said_text
from fastattr.words import phrase_spans

Targets = Literal["fields"] | Sequence[str] | Sequence[int] | re.Pattern[str] | Callable[[str], bool]


def choose_targets(targets: Targets, said: TokenText) -> tuple[int, ...]:
    """Indices of the response tokens that `targets` asks for, ascending.

    Args:
        targets: `"fields"` for the values of a JSON answer; words and phrases, each wherever it occurs; a compiled
            regular expression; indices of tokens; or a function that is given each token's text.

    Raises:
        InputError: it is none of these, an index is not in the response, or the response is no JSON.
        PhraseError: a phrase does not occur, or nothing matches or is chosen.
    """
    if isinstance(targets, str):
        if targets != "fields":
            raise InputError(f"targets is {targets!r}, expected 'fields' or a list of words, for example [{targets!r}]")
        chosen = field_targets(said)
    elif isinstance(targets, re.Pattern):
        spans = [match.span() for match in targets.finditer(said.text) if match.end() > match.start()]
        if not spans:
            raise PhraseError(f"{targets.pattern!r} is not in the response {_short(said.text)}")
        chosen = _covered(said, spans)
    elif callable(targets):
        chosen = tuple(i for i, token in enumerate(said.tokens) if targets(token))
    elif isinstance(targets, Sequence) and all(isinstance(each, str) for each in targets) and targets:
        chosen = _covered(said, [span for phrase in targets for span in _occurrences(said, str(phrase))])
    elif isinstance(targets, Sequence) and all(type(each) is int for each in targets):
        chosen = tuple(sorted({int(each) for each in targets}))
        wrong = [i for i in chosen if not 0 <= i < len(said.tokens)]
        if wrong:
            raise InputError(f"targets holds {wrong[:5]}, expected indices from 0 to {len(said.tokens) - 1}")
    else:
        raise InputError(
            f"targets is a {type(targets).__name__}, expected 'fields', words, indices, a compiled pattern or a function "
            "of a token's text"
        )
    if not chosen:
        raise PhraseError(f"targets chooses none of the {len(said.tokens)} tokens of the response {_short(said.text)}")
    return chosen


def _occurrences(said: TokenText, phrase: str) -> tuple[Span, ...]:
    text = said_text(said)
    spans = phrase_spans(text, phrase) if phrase.strip() else ()
    if not spans:
        inside = bool(phrase.strip()) and phrase.casefold() in text.casefold()
        hint = f"; it is part of a word there: re.compile({re.escape(phrase)!r}) chooses parts of words"
        raise PhraseError(f"{phrase!r} is not in the response {_short(said.text)}{hint if inside else ''}")
    return spans


def _covered(said: TokenText, spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(sorted({i for found in token_targets(said.spans, spans) for i in found}))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
