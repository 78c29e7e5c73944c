"""Words of a response that are judged: its function words, and names of things in singular or plural (English)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import regex

from fastattr import text
from fastattr.datasets.sample import Mention
from fastattr.errors import DatasetError, how_to_install

if TYPE_CHECKING:
    import inflect

Span = tuple[int, int]

# The classes that count in the protocol of TAM (arXiv 2506.23270, section 4.1). Prepositions and numbers do not.
FUNCTION_WORDS = frozenset(
    word
    for words in (
        "and but either neither nor or plus versus yet",  # conjunctions
        "a all an another any both each every no some such that the these this those",  # determiners
        "there",
        "can could may might must ought shall should will would",  # modals
        "he her hers herself him himself his i it its itself me mine my myself our ours ourselves she their theirs",
        "them themselves they us we you your yours yourself yourselves",  # pronouns
        "ah aha hello hey hi oh okay oops ouch please wow yeah yes",  # interjections
        "how what whatever when whenever where wherever which whichever who whoever whom whose why",  # wh-words
    )
    for word in words.split()
)

_NEVER_ALONE = FUNCTION_WORDS | text.FUNCTION_WORDS  # of the words of a longer name
_WORD = regex.compile(r"[^\W_]+(?:-[^\W_]+)*")  # unlike re, counts accents and vowel signs as part of words


def function_spans(response: str, words: Collection[str] = FUNCTION_WORDS) -> tuple[Span, ...]:
    """Half-open ranges of characters of the function words, in order.

    Args:
        words: which count, in lower case; they are found as whole words in any case.
    """
    return tuple(match.span() for match in _WORD.finditer(response) if match.group().lower() in words)


def noun_mentions(response: str, masks: Mapping[str, np.ndarray | None], *, parts: bool = False) -> tuple[Mention, ...]:
    """The words of a response that name things, in order.

    Args:
        masks: by name, bool `[H W]`, where such things are; None where the picture shows none, which makes the word an
            invention.
        parts: whether a word of a longer name stands for the whole, see `find_names`; it does so only where the picture
            shows the thing, since "light" in "a light brown couch" is no invented traffic light.
    """
    mentions = []
    whole = {span for span, _ in find_names(response, masks)}
    for span, names in find_names(response, masks, parts=parts):
        shown = [mask for name in names if (mask := masks[name]) is not None]
        if not shown and span not in whole:
            continue
        mask = np.logical_or.reduce(shown) if shown else None
        mentions.append(Mention(span, mask, "noun", true=mask is not None))
    return tuple(mentions)


def find_names(response: str, names: Iterable[str], *, parts: bool = False) -> tuple[tuple[Span, frozenset[str]], ...]:
    """Where a response says any of the names.

    Names are found as whole words in any case, in singular or plural. Hyphens do not matter (`t-shirt`, `tshirt`). The
    longest name wins where names overlap, and adjacent words of one name are found as one.

    Args:
        parts: whether a single word of a longer name stands for it too, as in the protocol of TAM; function words and
            prepositions never do.

    Returns:
        a half-open range of characters and what is named there, in order. A word may belong to several names: `baseball`
        to `baseball bat` and `baseball glove`.

    Raises:
        DatasetError: `inflect` is not installed, or a name has no letter.
    """
    spoken = _ways_to_say(names, parts)
    found: list[tuple[Span, frozenset[str]]] = []
    for start, stop, said in sorted(_longest_first(response, spoken)):
        (first, last), before = found[-1] if found else ((0, 0), frozenset())
        if before & said and response[last:start].isspace():
            found[-1] = (first, stop), before & said
        else:
            found.append(((start, stop), said))
    return tuple(found)


@cache
def english() -> inflect.engine:
    """The rules of English plurals.

    Raises:
        DatasetError: `inflect` is not installed.
    """
    try:
        import inflect
    except ImportError as error:
        raise DatasetError(
            f"to find the nouns of a response fastattr needs inflect; {how_to_install('eval')}"
        ) from error
    return inflect.engine()


def _longest_first(response: str, spoken: Mapping[str, frozenset[str]]) -> Iterator[tuple[int, int, frozenset[str]]]:
    """Start, stop and names of what is said, without overlaps."""
    words = list(_WORD.finditer(response))
    longest = max((len(_WORD.findall(key)) for key in spoken), default=0)
    taken: set[int] = set()
    for size in range(longest, 0, -1):
        for i in range(len(words) - size + 1):
            start, stop = words[i].start(), words[i + size - 1].end()
            phrase = " ".join(response[start:stop].lower().split())  # with its commas, which no name has
            keys = [key for key in _unhyphened(phrase) if key in spoken]
            if keys and taken.isdisjoint(range(i, i + size)):
                taken.update(range(i, i + size))
                yield start, stop, spoken[keys[0]]


def _ways_to_say(names: Iterable[str], parts: bool) -> dict[str, frozenset[str]]:
    """Names by what may be said for them. What is a whole name is never part of another: a `bear` is no `teddy bear`."""
    whole: defaultdict[str, set[str]] = defaultdict(set)
    partly: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        for key in _forms(name):
            whole[key].add(name)
        for word in name.lower().split() if parts else ():
            if word not in _NEVER_ALONE:
                for key in _forms(word):
                    partly[key].add(name)
    return {key: frozenset(said) for key, said in (partly | whole).items()}


@lru_cache(maxsize=4096)
def _forms(name: str) -> frozenset[str]:
    """A name in singular and plural, in lower case, without hyphens."""
    words = " ".join(name.lower().split())
    if not _WORD.search(words):
        raise DatasetError(f"a thing is called {name!r}, expected a name with a letter, to be found in a response")
    forms = {words, english().plural_noun(words), english().singular_noun(words) or words}
    return frozenset(key for form in forms for key in _unhyphened(form))


def _unhyphened(phrase: str) -> tuple[str, str]:
    return phrase.replace("-", ""), phrase.replace("-", " ")
