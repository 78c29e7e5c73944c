"""The text of a response is what its tokenizer decodes, for every kind of tokenizer, and token spans cover it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastattr.adapters.model import BUNDLED
from fastattr.text import Decode, TextPieces, TokenText, decode_tokens, decode_with, show_ids

CORPUS = [
    "The red circle is at the top left.",
    "a blue square, isn't it?",
    "दीवार पर हिन्दी लाल",
    "မြန်မာဘာသာ",
    "一只猫在椅子上",
    "😀👩‍👩‍👧🇩🇪",
    "Круг красный",
] * 4


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3: merges of bytes, some of them parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def single_bytes() -> Tokenizer:
    """Every byte is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Gemma and Mistral: pieces with their leading space, bytes for what has none, and U+FFFD as a piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\ufffd"]
    pieces += sorted(set("Thredcirlatopf.,?'") | set("Кругасный"))
    merges = []
    for word in ("▁The", "▁red", "▁circle", "▁top"):
        for length in range(1, len(word)):
            merges.append((word[:length], word[length]))
            pieces += [word[: length + 1]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT; its decoder cleans up spaces around punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS = {each.__name__: each for each in (byte_level, single_bytes, byte_fallback, unigram, word_piece)}
KINDS = (*BUILDERS, "bundled")


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    if kind == "bundled":
        return AutoTokenizer.from_pretrained(BUNDLED["shapes"])
    return PreTrainedTokenizerFast(tokenizer_object=BUILDERS[kind]())


def whole(kind: str, ids: Sequence[int]) -> str:
    """The text that the tokenizer itself decodes."""
    return str(tokenizer_of(kind).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check_tiling(found: TokenText) -> None:
    """Spans are in order and cover the text, and no two share more than one character."""
    covered = 0
    for before, (start, stop), token in zip([(0, 0), *found.spans], found.spans, found.tokens, strict=False):
        assert start <= stop and before[0] <= start and before[1] <= stop
        assert covered - 1 <= start <= covered
        assert found.text[start:stop] == token
        covered = max(covered, stop)
    assert covered == len(found.text)
    assert len(found.spans) == len(found.tokens)


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids as a model might write them: of some text, or any at all."""
    tokenizer = tokenizer_of(kind)
    letters = st.sampled_from(sorted(set("".join(CORPUS) + "\n❄🏳️‍🌈ñ")))
    text = st.one_of(
        st.text(letters, max_size=60), st.text(max_size=20).map(lambda t: t.encode("utf-8", "ignore").decode())
    )
    encoded = text.map(lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]))
    drawn = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    return st.one_of(
        encoded, drawn, st.tuples(encoded, drawn, encoded).map(lambda parts: [*parts[0], *parts[1], *parts[2]])
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_text_is_what_the_tokenizer_decodes(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    found = decode_tokens(ids, decode_with(tokenizer_of(kind)))
    assert found.text == whole(kind, ids)
    assert len(found.tokens) == len(ids)
    check_tiling(found)


def test_a_space_between_bytes_belongs_to_its_own_token() -> None:
    """No token here is a word, so only the space itself can precede tokens that are decoded alone."""
    ids = [259, 227, 167, 169, 259, 51]
    found = decode_tokens(ids, decode_with(tokenizer_of("byte_fallback")))
    assert found.text == whole("byte_fallback", ids) == "\u0926 0"
    assert found.tokens[-2:] == (" ", "0")


def test_bytes_beside_a_token_that_is_the_replacement_character() -> None:
    ids = [259, 243, 147, 131, 131, 51, 260]  # four bytes of one character, the byte of 0, U+FFFD as a token
    found = decode_tokens(ids, decode_with(tokenizer_of("byte_fallback")))
    assert found.text == whole("byte_fallback", ids) == "\U000100000\ufffd"
    assert found.spans == ((0, 0), (0, 1), (0, 1), (0, 1), (0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_token_covers_what_it_adds(kind: str, data: st.DataObject) -> None:
    """Once all characters are complete, the tokens so far end where their own text ends."""
    ids = data.draw(ids_of(kind))
    text = whole(kind, ids)
    found = decode_tokens(ids, decode_with(tokenizer_of(kind)))
    for n in range(1, len(ids) + 1):
        before = whole(kind, ids[:n])
        if "\ufffd" not in text and text.startswith(before) and text != before:
            assert max(stop for _, stop in found.spans[:n]) == len(before)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_as_they_come_add_up_to_the_whole(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    pieces = TextPieces(decode_with(tokenizer_of(kind)))
    said = [pieces.add(token_id) for token_id in ids]
    text = whole(kind, ids)
    if kind == "byte_fallback" and "\ufffd" in text:  # its decoder takes whole characters back
        assert len("".join(said) + pieces.rest) <= len(text)
    else:
        assert "".join(said) + pieces.rest == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "bundled"])
def test_pieces_of_a_long_text(kind: str) -> None:
    """Longer than the ids that are decoded again: nothing is lost where earlier ones are dropped."""
    sentence = (
        "The red 一只猫 circle 😀👩‍👩‍👧 is at မြန်မာဘာသာ the top.\n"
        if kind != "bundled"
        else "a red circle at the top left. "
    )
    ids = list(tokenizer_of(kind)(sentence * 40, add_special_tokens=False)["input_ids"])
    pieces = TextPieces(decode_with(tokenizer_of(kind)))
    said = [pieces.add(token_id) for token_id in ids]
    assert "".join(said) + pieces.rest == whole(kind, ids)
    assert sum(map(bool, said)) > len(ids) / 4  # and it comes as it is written, not at the end


def decode_single(rows: Sequence[Sequence[int]]) -> list[str]:
    return decode_with(tokenizer_of("single_bytes"))(rows)


def single(text: str) -> list[int]:
    return list(tokenizer_of("single_bytes")(text, add_special_tokens=False)["input_ids"])


def test_bytes_of_one_character_share_its_span() -> None:
    decoded = decode_tokens(single("a😀b"), decode_single)
    assert decoded.tokens == ("a", "😀", "😀", "😀", "😀", "b")
    assert decoded.spans == ((0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3))


def test_a_character_cut_off_at_the_end_is_kept_as_it_decodes() -> None:
    ids = single("a😀")[:-1]
    decoded = decode_tokens(ids, decode_single)
    assert decoded.text == "a\ufffd"
    assert decoded.spans == ((0, 1), (1, 2), (1, 2), (1, 2))


def test_a_token_of_a_letter_and_half_a_character_carries_both() -> None:
    """Two tokens encode `x❄y`: the first ends within the snowflake, where the second begins."""
    bytes_of = {0: b"a", 1: b"x\xe2\x9d", 2: b"\x84y"}

    def decode(rows: Sequence[Sequence[int]]) -> list[str]:
        return [b"".join(bytes_of[id] for id in row).decode("utf-8", "replace") for row in rows]

    decoded = decode_tokens([0, 1, 2, 0], decode)
    assert decoded.text == "ax❄ya"
    assert decoded.tokens == ("a", "x❄", "❄y", "a")


def fallback(*pieces: str) -> list[int]:
    return [tokenizer_of("byte_fallback").convert_tokens_to_ids(piece) for piece in pieces]


def test_one_broken_byte_spoils_its_whole_run() -> None:
    """As in Llama's decoder: a replacement character for every byte, even of complete characters."""
    ids = fallback("▁red", "<0x0A>", "<0xE4>", "<0xB8>", "<0xAD>", "<0xE4>", "▁top")
    decoded = decode_tokens(ids, decode_with(tokenizer_of("byte_fallback")))
    assert decoded.text == whole("byte_fallback", ids) == "red" + "\ufffd" * 5 + " top"
    assert decoded.tokens == ("red", *["\ufffd"] * 5, " top")


@pytest.mark.parametrize("n", [3, 9, 17, 40])
def test_a_run_of_byte_tokens_of_any_length(n: int) -> None:
    snow = ("<0xE2>", "<0x9D>", "<0x84>")
    ids = fallback("▁red", *snow * n, "▁top")
    decoded = decode_tokens(ids, decode_with(tokenizer_of("byte_fallback")))
    assert decoded.text == "red" + "❄" * n + " top"
    assert decoded.spans[1:-1] == tuple((3 + i, 4 + i) for i in range(n) for _ in snow)


def test_a_piece_that_is_the_replacement_character() -> None:
    ids = fallback("▁red", "<0xE4>", "<0xB8>", "<0xAD>", "\ufffd", "▁top")
    decoded = decode_tokens(ids, decode_with(tokenizer_of("byte_fallback")))
    assert decoded.tokens == ("red", "中", "中", "中", "\ufffd", " top")


def test_special_tokens_stay_and_spaces_are_not_cleaned_up() -> None:
    tokenizer = tokenizer_of("byte_level")
    tokenizer.clean_up_tokenization_spaces = True  # as some tokenizers on the hub say
    try:
        ids = [*tokenizer("left .")["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
        assert decode_tokens(ids, decode_with(tokenizer)).text == "left .<|im_end|>"
    finally:
        tokenizer.clean_up_tokenization_spaces = False


def test_spaces_that_depend_on_the_token_before() -> None:
    """A made-up decoder that writes a space only after an odd id."""

    def decode(rows: Sequence[Sequence[int]]) -> list[str]:
        return [
            "".join(f"{id}" + (" " if id % 2 and k + 1 < len(row) else "") for k, id in enumerate(row)) for row in rows
        ]

    ids = [2, 4, 3, 5, 6, 8, 7, 7]
    decoded = decode_tokens(ids, decode)
    assert decoded.text == "243 5 687 7"
    check_tiling(decoded)
    assert [token.strip() for token in decoded.tokens] == ["2", "4", "3", "5", "6", "8", "7", "7"]


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", ["The red circle is at the top left. ", "မြန်မာဘာသာ", "一只猫在椅子上😀"])
def test_the_time_grows_with_the_length(kind: str, text: str) -> None:
    """Four times the tokens take about four times as long; quadratic cost would take sixteen times."""
    decode: Decode = decode_with(tokenizer_of(kind))
    ids = list(tokenizer_of(kind)(text * 4000, add_special_tokens=False)["input_ids"])[:16_000]
    quarter = min(seconds(lambda: decode_tokens(ids[: len(ids) // 4], decode)) for _ in range(3))
    full = min(seconds(lambda: decode_tokens(ids, decode)) for _ in range(3))
    assert full < 8 * quarter + 0.05


def test_ids_without_a_tokenizer() -> None:
    assert decode_tokens([3, 14], show_ids).tokens == ("<3>", "<14>")
    assert decode_tokens([], show_ids) == TokenText("", (), ())
