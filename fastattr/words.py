"""Where words begin and end, in any script: the default boundaries of Unicode (UAX 29)."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import regex

Span = tuple[int, int]

_BORDER = regex.compile(r"(?w)\b")
_HOLDS_LETTER = regex.compile(r"[\p{L}\p{N}]")
_SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=Complex_Context}]")  # Thai, Lao, Khmer, ...
_HYPHENS = ("-", "\u2010", "\u2011")
_EDGE = r"(?:\b|(?<=['’])|(?=['’])|(?<=\b_+)|(?=_+\b))"  # the dog in dog's and in _dog_ is a word


def word_spans(text: str) -> tuple[Span, ...]:
    """Half-open ranges of the words, in order.

    A segment between Unicode word boundaries is a word if it holds a letter or a digit; words joined by hyphens are one.
    In scripts without spaces (Chinese, Japanese, Thai, ...) these boundaries do not separate words, and a run of letters
    is one word. Underscores around a word are not part of it.

    >>> [text[start:stop] for text in ("It's a T-shirt, 3.50 €",) for start, stop in word_spans(text)]
    ["It's", 'a', 'T-shirt', '3.50']
    """
    found: list[Span] = []
    spaceless = False  # whether the previous word is in such a script
    for start, stop in pairwise(match.start() for match in _BORDER.finditer(text)):
        if not _HOLDS_LETTER.search(text, start, stop):
            continue
        segment = text[start:stop]  # Unicode counts underscores as letters; around a word they are Markdown
        start, stop = stop - len(segment.lstrip("_")), start + len(segment.rstrip("_"))
        before, spaceless = spaceless, bool(_SPACELESS.match(text, start))
        between = text[found[-1][1] : start] if found else " "
        if between in _HYPHENS or (not between and before and spaceless):
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def phrase_spans(text: str, phrase: str) -> tuple[Span, ...]:
    """Half-open ranges where a phrase occurs as whole words, in any case, composed or decomposed (NFC, NFD).

    Its ends must be word boundaries of Unicode, apostrophes, or underscores around a word. In scripts without spaces there is one between any two
    characters, so a phrase is found wherever it occurs, but letters are not separated from vowel signs and accents.
    """
    words = r"\s+".join(_written(word) for word in phrase.split())
    pattern = regex.compile(rf"(?wif){_EDGE}{words}{_EDGE}")
    return tuple(match.span() for match in pattern.finditer(text))


def _written(word: str) -> str:
    forms = dict.fromkeys([word, *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))])
    return f"(?:{'|'.join(regex.escape(form) for form in forms)})"
