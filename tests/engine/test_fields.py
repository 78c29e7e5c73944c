"""The values of JSON answers: where they stand, what they are, which tokens wrote them, and where they were seen."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fastattr import Attribution, InputError
from fastattr.fields import Field, Path, Value, path_name
from fastattr.selection import _region
from tests.engine.samples import make_attribution

WORD = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")  # every character belongs to one


def answer(text: str, words: tuple[str, ...] | None = None) -> Attribution:
    return make_attribution(words or tuple(WORD.findall(text)), grids=((1, 2, 3),))


def read(text: str) -> tuple[Field, ...]:
    return replace(make_attribution(), response=text).fields()  # what tokens it has does not matter to the parser


def seen(text: str) -> list[tuple[str, Value]]:
    return [(field.name, field.value) for field in read(text)]


# ---- against the json module -----------------------------------------------------------------------

scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(10**30, 10**60) | st.floats(allow_nan=False) | st.text()
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)
layouts = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 1, 2, "\t", " \r"]),
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([(",", ":"), (", ", ": "), (" \r\n,\t", " :\n ")]),
    }
)


def leaves_of(value: object, path: Path = ()) -> list[tuple[Path, Value]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves_of(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in leaves_of(inner, (*path, index))]
    return [(path, value)]  # type: ignore[list-item]


def same(one: Value, other: Value) -> bool:
    return type(one) is type(other) and (one == other or one != one) and str(one) == str(other)


@given(document=documents, layout=layouts, before=st.sampled_from(["", "\ufeff", "\r\n ", "\ufeff\t"]))
def test_every_leaf_is_found_in_order_and_its_span_holds_it(document: object, layout: dict, before: str) -> None:
    text = before + json.dumps(document, **layout) + "\n"
    fields = read(text)
    expected = leaves_of(json.loads(text.removeprefix("\ufeff")))
    assert [field.path for field in fields] == [path for path, _ in expected]
    for field, (_, value) in zip(fields, expected, strict=True):
        start, stop = field.span
        raw = text[start - 1 : stop + 1] if isinstance(value, str) else text[start:stop]
        assert same(field.value, value)
        assert same(json.loads(raw), value)
        assert field.complete


@given(document=st.lists(documents, min_size=1) | st.dictionaries(st.text(), documents), layout=layouts, data=st.data())
def test_a_cut_answer_keeps_all_that_stands_before_the_cut(document: object, layout: dict, data: st.DataObject) -> None:
    text = json.dumps(document, **layout)
    whole = read(text)
    for cut in data.draw(st.lists(st.integers(1, len(text)), max_size=20)):
        fields = read(text[:cut])
        assert [field.path for field in fields] == [field.path for field in whole[: len(fields)]]
        for field, original in zip(fields, whole, strict=False):
            if field.complete:
                assert field.span == original.span
                assert same(field.value, original.value)
            else:
                assert field is fields[-1]
                assert field.span == (original.span[0], cut)
                assert cut <= original.span[1]
                assert not isinstance(original.value, str) or original.value.startswith(str(field.value))
        finished = [field for field in whole if field.span[1] + isinstance(field.value, str) < cut]
        assert len(finished) <= len(fields)  # none that was written to its end, and something behind it, is lost


def test_every_cut_of_one_answer() -> None:
    text = '{"a": [10, "é\\n"], "b": true}'
    states = [  # what is known once so many characters are there
        (1, []),
        (8, [("a[0]", 1, False)]),
        (9, [("a[0]", 10, False)]),
        (10, [("a[0]", 10, True)]),
        (12, [("a[0]", 10, True), ("a[1]", "", False)]),
        (13, [("a[0]", 10, True), ("a[1]", "é", False)]),
        (15, [("a[0]", 10, True), ("a[1]", "é\n", False)]),
        (16, [("a[0]", 10, True), ("a[1]", "é\n", True)]),
        (25, [("a[0]", 10, True), ("a[1]", "é\n", True), ("b", True, False)]),
        (28, [("a[0]", 10, True), ("a[1]", "é\n", True), ("b", True, True)]),
    ]
    for cut in range(1, len(text) + 1):
        expected = next(known for begins, known in reversed(states) if begins <= cut)
        assert [(field.name, field.value, field.complete) for field in read(text[:cut])] == expected, text[:cut]


# ---- what models write besides ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "b": [2, 3,],}', [("a", 1), ("b[0]", 2), ("b[1]", 3)]),
        ('{"a": 1, "a": 2}', [("a", 1), ("a", 2)]),
        ('{"a": "one\ntwo\tthree"}', [("a", "one\ntwo\tthree")]),
        ('{"a": -0, "b": -0.0, "c": 1E2, "d": 1e400}', [("a", 0), ("b", -0.0), ("c", 100.0), ("d", math.inf)]),
        ('{"a": -Infinity, "b": Infinity}', [("a", -math.inf), ("b", math.inf)]),
        ('{"a": ' + "9" * 400 + "}", [("a", int("9" * 400))]),
        ('{"a": ' + "9" * 5000 + "}", [("a", math.inf)]),
        ('Sure! [as asked]\n{"a": 1}\nAnything else? {"b": 2}', [("a", 1)]),
        ('As [1] and [2] say: {"a": 1}', [("a", 1)]),
        ('- [ ] red\n- [x] blue\n["red"]', [("[0]", "red")]),
        ('Here it is:\n```json\n{"a": 1}\n```\nDone.', [("a", 1)]),
        ('Of [1, 2] in prose:\r\n```JSON\r\n{"a": 1,\r\n "b": 2}\r\n```', [("a", 1), ("b", 2)]),
        ('~~~\n[1, 2]\n~~~\n```json\n{"a": 1}\n```', [("[0]", 1), ("[1]", 2)]),
        ('```json\n{"a": oh no}\n```\n```json\n{"a": 1}\n```', [("a", 1)]),
        ('```json\n{"a": "cut he', [("a", "cut he")]),
        ('{"a": "```json\\n{}", "b": "\n```json\n{\'"}', [("a", "```json\n{}"), ("b", "\n```json\n{'")]),
        ('{"": 1, "un it": {"ß9": [true]}, "a.b": "\\"\\\\"}', None),
        ('"only one"', [("$", "only one")]),
        ("  -12.5\n", [("$", -12.5)]),
        ("{}", []),
        ("I found nothing: [ ]", []),
        ("[", []),
        ('{"a', []),
        ('{"a"', []),
        ('{"a": ', []),
        ('{"a": -', []),
    ],
)
def test_what_models_write(text: str, expected: list[tuple[str, Value]] | None) -> None:
    if expected is None:
        expected = [('[""]', 1), ('["un it"].ß9[0]', True), ('["a.b"]', '"\\')]
    found = seen(text)
    assert found == expected
    assert [str(value) for _, value in found] == [str(value) for _, value in expected]  # -0.0, 1 and True


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1),
        ("1.", 1),
        ("1.5e", 1.5),
        ("1.5e-", 1.5),
        ("tr", True),
        ("true", True),
        ("n", None),
        ("-I", -math.inf),
        ('"', ""),
        ('"a b', "a b"),
        ('"a\\', "a"),
        ('"a\\u00', "a"),
        ('"a\\ud83d', "a"),
        ('"a\\ud83d\\u', "a"),
        ('"a\\\\ud83d', "a\\ud83d"),
    ],
)
def test_the_last_value_of_a_cut_answer(written: str, value: Value) -> None:
    field = read('{"done": 0, "cut": ' + written)[-1]
    assert (field.name, field.value) == ("cut", value)
    assert type(field.value) is type(value)
    start, stop = field.span
    assert ('{"done": 0, "cut": ' + written)[start:stop] == written.removeprefix('"')
    assert field.complete == (written == "true")


def test_not_a_number_is_read_as_the_json_module_reads_it() -> None:
    (field,) = read("[NaN]")
    assert math.isnan(field.value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A red circle.", r"a \{\.\.\.\} or \[\.\.\.\], but this one begins with 'A red circle\.'$"),
        ("", "begins with ''$"),
        ("[1] says so", "begins with"),
        ('"half a string', "begins with"),
        ("{'a': 1}", 'begins at character 0 breaks at character 1: expected a key in ", found "\'a\': 1}"'),
        ('{"a": 1 kg, "b": {"c": 2}}', r"breaks at character 8: expected a comma or \}, found 'kg, "),
        ('{"a": 1]', r"breaks at character 7: expected a comma or \}"),
        ('so {"a" = 1}', "begins at character 3 breaks at character 8: expected a colon"),
        ('{"a": 1,, "b": 2}', "breaks at character 8: expected a key"),
        ("[1,, 2]", "breaks at character 3: expected a value"),
        ('["a", 007, {"b": 1}]', r"breaks at character 7: expected a comma or \]"),
        ('{"a": True}', "breaks at character 6: expected a value, found 'True}'"),
        ('{"a": "\\d+"}', "breaks at character 7: expected an escape that JSON knows"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(text)


@pytest.mark.parametrize("text", ["[" * 257 + "]" * 257, "[" * 100_000, '{"a":' * 100_000, "see " + "[ " * 100_000])
def test_too_deep(text: str) -> None:
    with pytest.raises(InputError, match="nested more than 256 deep at character"):
        read(text)


def test_the_deepest_that_is_read() -> None:
    (field,) = read("[" * 256 + "7" + "]" * 256)
    assert field.path == (0,) * 256
    assert field.value == 7


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        ("", "[" * 255 + "x"),
        ("", '["[x'),
        ("", '{"a" '),
        ("", '\n```\n{"a" '),
        ("", "[1] "),
        ("", '[["]'),
        ("", "{ "),
        ("[", " "),
        ("[", "1"),
        ("[", "1, "),
        ("[", '{"a": [-2.5e3]}, '),
        ("```", " "),
        ("```json", "n"),
        ("", "\n```"),
    ],
    ids=lambda text: repr(text[-8:]),
)
def test_hostile_text_costs_time_in_step_with_its_length(head: str, unit: str) -> None:
    def seconds(text: str) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            with pytest.raises(InputError):
                read(text)
            best = min(best, time.perf_counter() - began)
        return best

    short, long = (n // len(unit) for n in (4_000, 64_000))
    # sixteen times the text; a square would take 256 times as long
    assert seconds(f"{head}{unit * long}!") < 100 * seconds(f"{head}{unit * short}!") + 0.01


def test_token_ids_without_text_are_refused() -> None:
    why = make_attribution(("<0>", "<1>", "<2>"))
    with pytest.raises(InputError, match="token ids '<0><1><2>'; make the attribution with a tokenizer"):
        why.fields()


def test_names() -> None:
    assert path_name(("items", 2, "price")) == "items[2].price"
    assert path_name((0, "a", 'say "hi"', "ü_1", "1a", "")) == '[0].a["say \\"hi\\""].ü_1["1a"][""]'
    assert path_name(()) == "$"


# ---- tokens ----------------------------------------------------------------------------------------


def written_by(why: Attribution, name: str) -> list[str]:
    (field,) = (field for field in why.fields() if field.name == name)
    assert field.selection is not None
    (targets,) = field.selection.targets
    return [why.tokens[target] for target in targets]


def test_the_tokens_of_a_value() -> None:
    words = ('{"', "shop", '":', ' "', "Ac", "me", ' Corp."', ",", ' "n', '":', " 12", ".", "5}")
    why = answer("", words)
    assert why.response == '{"shop": "Acme Corp.", "n": 12.5}'
    assert written_by(why, "shop") == ["Ac", "me", ' Corp."']
    assert written_by(why, "n") == [" 12", ".", "5}"]  # what it shares with white space and brackets it needs


def test_a_token_that_holds_no_more_than_punctuation_of_a_value_is_left_out_where_others_hold_it() -> None:
    why = answer("", ('["', "Acme", '.",', ' "', '…", "', "5", '€"', "]"))
    assert written_by(why, "[0]") == ["Acme"]
    assert written_by(why, "[1]") == ['…", "']
    assert written_by(why, "[2]") == ["5", '€"']


def test_values_that_read_alike_have_their_own_place_and_map() -> None:
    why = answer('{"a": 7, "b": [7, 7]}')
    fields = why.fields()
    assert [field.value for field in fields] == [7, 7, 7]
    assert why.evidence is not None
    places = [match.start() for match in re.finditer("7", why.response)]
    tokens = [i for i, token in enumerate(why.tokens) if "7" in token]
    for field, place, token in zip(fields, places, tokens, strict=True):
        assert field.span == (place, place + 1)
        assert field.selection is not None and field.selection.targets == ((token,),)
        assert torch.equal(field.selection.map, why.image[0][token])
        assert field.score == pytest.approx(float(why.evidence[token]))
    assert len({field.score for field in fields}) == 3


def test_score_and_probability_are_sums_over_the_tokens() -> None:
    why = answer("", ('{"a":"', "one", " two", " three", '"}'))
    (field,) = why.fields()
    assert why.evidence is not None
    assert field.score == pytest.approx(float(sum(why.evidence[1:4])))
    assert field.log_prob == pytest.approx(float(sum(why.log_prob[1:4])))
    assert replace(why, evidence=None).fields()[0].score is None


def test_an_empty_string_was_written_by_no_token() -> None:
    why = answer('{"a": "", "b": 1}')
    empty, _ = why.fields()
    assert (empty.value, empty.span, empty.complete) == ("", (7, 7), True)
    assert (empty.selection, empty.box, empty.boxes, empty.score, empty.log_prob) == (None, None, (), None, None)


def test_escapes_count_as_written() -> None:
    why = answer("", ('{"a":"', "caf", "\\u00", "e9", '"}'))
    (field,) = why.fields()
    assert field.value == "café"
    assert why.response[slice(*field.span)] == "caf\\u00e9"
    assert written_by(why, "a") == ["caf", "\\u00", "e9"]


def test_several_images_and_none() -> None:
    why = make_attribution(('{"a":', " 7", "}"), grids=((1, 2, 2), (1, 3, 3)))
    (field,) = why.fields()
    assert len(field.boxes) == 2
    with pytest.raises(InputError, match=r"2 images; use \.boxes\[i\]"):
        _ = field.box
    (field,) = make_attribution(('{"a":', " 7", "}"), pictures=False).fields()
    with pytest.raises(InputError, match="made without; pass image="):
        _ = field.box


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False), st.floats(0.3, 0.9))
def test_the_region_of_a_peak_is_what_a_flood_reaches(height: int, width: int, random, share: float) -> None:
    inside = np.array([[random.random() < share for _ in range(width)] for _ in range(height)])
    row, column = random.randrange(height), random.randrange(width)
    inside[row, column] = True
    flooded = Image.fromarray(inside.astype(np.uint8) * 255).copy()
    ImageDraw.floodfill(flooded, (column, row), 128)
    assert _region(inside, row, column) == flooded.point([255 * (v == 128) for v in range(256)]).getbbox()
