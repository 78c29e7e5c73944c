"""Token texts add up to the response and point at its characters."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastattr.text import decode_tokens, show_ids


def byte_tokenizer() -> Tokenizer:
    """Every byte is a token of its own: the hardest case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def decode(rows: Sequence[Sequence[int]]) -> list[str]:
    return TOKENIZER.decode_batch([list(row) for row in rows])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=40))
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    decoded = decode_tokens(ids, decode)
    assert decoded.text == text
    assert len(decoded.tokens) == len(decoded.spans) == len(ids)
    assert all(text[start:stop] == token for (start, stop), token in zip(decoded.spans, decoded.tokens, strict=True))
    assert decoded.spans[0][0] == 0 and decoded.spans[-1][1] == len(text)


def test_bytes_of_one_character_share_its_span() -> None:
    decoded = decode_tokens(TOKENIZER.encode("a😀b").ids, decode)
    assert decoded.tokens == ("a", "😀", "😀", "😀", "😀", "b")
    assert decoded.spans == ((0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3))


def test_a_character_cut_off_at_the_end_is_kept_as_it_decodes() -> None:
    ids = TOKENIZER.encode("a😀").ids[:-1]
    decoded = decode_tokens(ids, decode)
    assert decoded.text.startswith("a") and "\ufffd" in decoded.text
    assert len(decoded.tokens) == len(ids)


def test_ids_without_a_tokenizer() -> None:
    assert decode_tokens([3, 14], show_ids).tokens == ("<3>", "<14>")
