"""Words in any script: which there are, which are selected, and which are judged."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattr
from fastattr.log.record import Content, from_batch, to_batch
from fastattr.text import answer_text, said_text
from fastattr.words import phrase_spans, word_spans
from tests.engine.family_models import PROMPT, TINY, picture
from tests.engine.samples import make_attribution
from tests.log.records import make_record


def words(text: str) -> list[str]:
    return [text[start:stop] for start, stop in word_spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी में लाल गोला है।", ["हिन्दी", "में", "लाल", "गोला", "है"]),
        ("தமிழ் நாடு", ["தமிழ்", "நாடு"]),
        ("عَرَبِيّ كِتَاب", ["عَرَبِيّ", "كِتَاب"]),
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
        ("cafe\u0301 déjà", ["cafe\u0301", "déjà"]),
        ("It's a T-shirt, dog’s", ["It's", "a", "T-shirt", "dog’s"]),
        ("3.50 €, 1,000 and 2010-2012", ["3.50", "1,000", "and", "2010-2012"]),
        ("한국어 단어입니다", ["한국어", "단어입니다"]),
        ("这个dog是黑色的。好", ["这个", "dog", "是黑色的", "好"]),
        ("赤い丸はカメラの左", ["赤い丸はカメラの左"]),
        ("แมวสีแดง อยู่บนโต๊ะ", ["แมวสีแดง", "อยู่บนโต๊ะ"]),
        ("👩‍👩‍👧 🇩🇪 ok!", ["ok"]),
        ("  \n--- ...", []),
        ("", []),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("一只猫在椅子上。", "猫", ["猫"]),
        ("这个dog是黑色的", "dog", ["dog"]),
        ("赤い丸は左上にあります", "丸", ["丸"]),
        ("แมวสีแดงอยู่บนโต๊ะ", "แดง", ["แดง"]),
        ("हिन्दी में ह", "ह", ["ह"]),
        ("कमल काम", "क", []),
        ("Red, red and RED reddish", "red", ["Red", "red", "RED"]),
        ("the dog's tail", "dog", ["dog"]),
        ("the dog's tail", "dog's tail", ["dog's tail"]),
        ("3.14 and 3", "3", ["3"]),
        ("a cafe\u0301 café", "CAFÉ", ["cafe\u0301", "café"]),
        ("die Straße", "STRASSE", ["Straße"]),
        ("top\n  left", "Top Left", ["top\n  left"]),
        ("👩‍👩‍👧 and 👩", "👩", ["👩"]),
        ("🇩🇪🇫🇷", "🇫🇷", ["🇫🇷"]),
        ("(red)", "red", ["red"]),
        ("a (red) b", "(red)", ["(red)"]),
        ("red_circle", "red", []),
        ("a _red_ b", "red", ["red"]),
        ("a __red circle__", "red circle", ["red circle"]),
        ("T-shirt", "shirt", ["shirt"]),
    ],
)
def test_phrases_are_found_as_whole_words(text: str, phrase: str, expected: list[str]) -> None:
    assert [text[start:stop] for start, stop in phrase_spans(text, phrase)] == expected


@given(st.text(max_size=40))
def test_no_word_ends_before_an_accent(text: str) -> None:
    for start, stop in word_spans(text):
        assert 0 <= start < stop <= len(text)
        assert stop == len(text) or not unicodedata.combining(text[stop])


@given(st.text(st.characters(categories=["Lu", "Ll", "Lo", "Mn", "Mc", "Nd", "Zs", "Po"]), max_size=40))
def test_every_word_is_found_as_a_phrase(text: str) -> None:
    for start, stop in word_spans(text):
        if "-" not in text[start:stop]:
            assert any(first <= start and stop <= last for first, last in phrase_spans(text, text[start:stop]))


def test_a_part_of_a_word_is_told_from_what_is_not_there() -> None:
    why = make_attribution(("The", " reddish", " circle"))
    with pytest.raises(fastattr.PhraseError, match=r"find\('red'\) selects parts of words"):
        why["red"]
    assert why.find("red").text == "red"
    with pytest.raises(fastattr.PhraseError) as missing:
        why["blue"]
    assert "find(" not in str(missing.value)


# ---- tokens and words that are no answer ------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    held = TINY["qwen2_vl"]()
    return fastattr.wrap(held.hf_model, held.processor)


def explain(model: fastattr.Model, response: object) -> fastattr.Attribution:
    why = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False)  # type: ignore[arg-type]
    return replace(why, evidence=torch.full((len(why),), -1.0))


def test_special_tokens_are_not_words(model: fastattr.Model) -> None:
    tokenizer = model.processor.tokenizer
    ids = [*tokenizer("The red circle", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    why = explain(model, ids)
    assert why.response == tokenizer.decode(ids) == f"The red circle{tokenizer.eos_token}"
    assert why.special == (len(ids) - 1,)
    assert [word.text for word in why.low_evidence] == ["red", "circle"]
    assert said_text(why) == "The red circle" + "\n" * len(tokenizer.eos_token)
    with pytest.raises(fastattr.PhraseError, match=r"its words are: The, red, circle$"):
        why["im_end"]
    assert why.find(r"<\|im_end\|>").targets == ((len(ids) - 1,),)


def test_the_end_token_is_no_word_though_the_tokenizer_does_not_call_it_special(model: fastattr.Model) -> None:
    ids = model.processor.tokenizer("The red circle", add_special_tokens=False)["input_ids"]
    before = model.hf_model.generation_config.eos_token_id
    try:
        end = ids[-2]  # followed by a word, so that it is explained
        model.hf_model.generation_config.eos_token_id = [end, 1]
        fresh = fastattr.wrap(model.hf_model, model.processor)
        assert explain(fresh, ids).special == tuple(i for i, id in enumerate(ids) if id == end)
    finally:
        model.hf_model.generation_config.eos_token_id = before


def test_words_of_reasoning_are_not_judged_but_can_be_selected(model: fastattr.Model) -> None:
    why = explain(model, "<think>maybe a green square</think>\nThe red circle")
    assert [word.text for word in why.low_evidence] == ["red", "circle"]
    assert why["green"].text == "green"
    assert answer_text(why).strip() == "The red circle"
    with pytest.raises(fastattr.PhraseError):
        explain(model, "<think>so</think>The red circle").find("blue")


@pytest.mark.parametrize("content", ["text", "ids"])
def test_a_record_keeps_special_tokens_and_reasoning(model: fastattr.Model, content: Content) -> None:
    tokenizer = model.processor.tokenizer
    text = "<think>a green square</think>\nThe red circle"
    why = explain(model, [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    _, envelope = make_record()
    batch = to_batch(why, envelope, content)
    assert batch.column("low_evidence")[0].as_py() == len(why.low_evidence) == 2
    read = from_batch(batch)[0].attribution
    assert read.special == why.special
    if content == "text":
        assert read.reasoning == why.reasoning == ((0, text.index("\n")),)
        assert [word.text for word in read.low_evidence] == ["red", "circle"]


def test_files_keep_special_tokens_and_reasoning(model: fastattr.Model, tmp_path: Path) -> None:
    why = explain(model, "<think>a green square</think>\nThe red circle<|im_end|>")
    again = fastattr.Attribution.load(why.save(tmp_path / "why.safetensors"))
    assert (again.special, again.reasoning) == (why.special, why.reasoning)
    assert why.special and why.reasoning
