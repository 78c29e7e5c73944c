"""States, ids and layouts that cannot be explained are refused, in numbers; every floating dtype can."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattr
from fastattr.errors import FastattrError, InputError, StatesError, TokenLayoutError
from fastattr.types import OutputHead, TokenLayout

VOCAB, DIM, SEQ = 12, 6, 13
IMAGE, PROMPT, RESPONSE = (1, 7), (8, 10), (11, 13)
LAYOUT = TokenLayout.from_spans(images=[(*IMAGE, (1, 2, 3))], prompt=[PROMPT], response=RESPONSE)


@dataclass(frozen=True)
class Inputs:
    """Good ones by default: `[BOS, 6 image tokens, a template token, 2 prompt tokens, a template token, 2 answers]`."""

    hidden: Any
    weight: Any
    ids: Any
    layout: Any = LAYOUT

    def attribute(self, **options: Any) -> fastattr.Attribution:
        return fastattr.attribute_states(
            self.hidden, self.weight, self.ids, self.layout, **{"scales": (1.0,), **options}
        )


@pytest.fixture
def good() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQ - 1, DIM, generator=generator)
    weight = torch.randn(VOCAB, DIM, generator=generator)
    ids = torch.tensor([1, 0, 0, 0, 0, 0, 0, 2, 5, 6, 2, 7, 8])
    return Inputs(hidden, weight, ids)


def refuse(inputs: Inputs, error: type[FastattrError], *words: str, **options: Any) -> None:
    """Exactly this error, with all of `words` in the message."""
    with pytest.raises(error) as caught:
        inputs.attribute(**options)
    assert caught.type is error and isinstance(caught.value, ValueError)
    for word in words:
        whole = rf"(?<![\w.]){re.escape(word)}(?!\w)"
        assert re.search(whole, str(caught.value)), f"{word!r} is not in: {caught.value}"


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [IMAGE[0], IMAGE[1] - 1, PROMPT[0], RESPONSE[0] - 1, SEQ - 2])
def test_states_that_are_not_finite(good: Inputs, position: int, value: float) -> None:
    hidden = good.hidden.clone()
    hidden[position, 2] = value
    for method in ("lens", "tam", "arc"):
        refuse(replace(good, hidden=hidden), StatesError, "NaN or Inf at 1 of", method=method, top_k=3)


def test_the_message_counts_the_bad_positions(good: Inputs) -> None:
    hidden = good.hidden.clone()
    hidden[IMAGE[0] : IMAGE[0] + 3] = torch.nan
    refuse(replace(good, hidden=hidden), StatesError, "3 of 10")  # 6 image, 2 prompt and 2 predicting positions


@pytest.mark.parametrize(
    ("row", "value"),
    [(7, torch.nan), (7, torch.inf), (5, torch.nan), (5, -torch.inf), (3, torch.nan), (3, torch.inf)],
    ids=["target nan", "target inf", "context nan", "context inf", "unused nan", "unused inf"],
)
def test_output_embeddings_that_are_not_finite(good: Inputs, row: int, value: float) -> None:
    """Even a row that no token uses: every log-probability reads the whole vocabulary."""
    weight = good.weight.clone()
    weight[row, 0] = value
    for method in ("lens", "tam", "arc"):
        refuse(replace(good, weight=weight), StatesError, "NaN or Inf", method=method, top_k=3)


def test_activations_that_overflow_float32(good: Inputs) -> None:
    """Finite states and embeddings whose products are not."""
    refuse(replace(good, hidden=1e30 * good.hidden, weight=1e30 * good.weight), StatesError, "NaN or Inf")


def test_float16_states_that_overflowed(good: Inputs) -> None:
    hidden = (good.hidden * 1e5).to(torch.float16)
    assert not torch.isfinite(hidden).all()
    refuse(replace(good, hidden=hidden), StatesError, "NaN or Inf", "float16")


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, SEQ - 2, SEQ + 1])
def test_states_of_the_wrong_length(good: Inputs, length: int) -> None:
    hidden = torch.ones(length, DIM)
    refuse(replace(good, hidden=hidden), StatesError, str(length), str(SEQ - 1))


def test_states_may_end_with_the_last_token_fed_back(good: Inputs) -> None:
    """A forward over all ids gives one state more; it predicts nothing and is not read, not even if it is NaN."""
    longer = replace(good, hidden=torch.cat([good.hidden, torch.full((1, DIM), torch.nan)]))
    assert torch.equal(longer.attribute().image[0], good.attribute().image[0])


@pytest.mark.parametrize("shape", [(SEQ - 1, DIM + 1), (1, SEQ - 1, DIM), (SEQ - 1,)])
def test_states_of_the_wrong_shape(good: Inputs, shape: tuple[int, ...]) -> None:
    refuse(replace(good, hidden=torch.ones(shape)), StatesError, str(list(shape)))


@pytest.mark.parametrize("shape", [(VOCAB, DIM - 1), (DIM,), (1, VOCAB, DIM)])
def test_output_embeddings_of_the_wrong_shape(good: Inputs, shape: tuple[int, ...]) -> None:
    refuse(replace(good, weight=torch.ones(shape)), StatesError, str(list(shape)), str(DIM))


def test_states_of_whole_numbers(good: Inputs) -> None:
    refuse(replace(good, hidden=good.hidden.long()), StatesError, "torch.int64")


@pytest.mark.parametrize("shape", [(VOCAB - 1,), (VOCAB + 1,), (VOCAB, 1)])
def test_a_bias_that_does_not_fit(good: Inputs, shape: tuple[int, ...]) -> None:
    head = OutputHead(good.weight, bias=torch.zeros(shape))
    refuse(replace(good, weight=head), StatesError, str(list(shape)), str(VOCAB))


# --- ids and layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("position", [PROMPT[0], RESPONSE[0], SEQ - 1], ids=["prompt", "first", "last"])
@pytest.mark.parametrize("wrong", [VOCAB, 10**9, -1])
def test_ids_outside_the_vocabulary(good: Inputs, position: int, wrong: int) -> None:
    ids = good.ids.clone()
    ids[position] = wrong
    refuse(replace(good, ids=ids), InputError, str(wrong), str(VOCAB - 1))


def test_ids_in_the_padding_of_the_vocabulary(good: Inputs) -> None:
    ids = good.ids.clone()
    ids[-1] = 10
    refuse(replace(good, ids=ids, weight=OutputHead(good.weight, valid_vocab=10)), InputError, "10", "9")


def test_placeholder_ids_are_never_looked_up(good: Inputs) -> None:
    """Some models mark image positions with an id that has no row."""
    ids = good.ids.clone()
    ids[slice(*IMAGE)] = -200
    assert torch.equal(replace(good, ids=ids).attribute().image[0], good.attribute().image[0])


def test_compat_looks_up_the_last_prefill_id_too(good: Inputs) -> None:
    ids = good.ids.clone()
    ids[RESPONSE[0] - 1] = VOCAB + 3
    replace(good, ids=ids).attribute(method="tam")  # the method itself never reads it
    refuse(replace(good, ids=ids), InputError, str(VOCAB + 3), str(VOCAB - 1), method="tam", compat="tam")


def test_compat_without_a_prompt(good: Inputs) -> None:
    layout = TokenLayout.from_spans(images=[(*IMAGE, (1, 2, 3))], prompt=[], response=RESPONSE)
    refuse(replace(good, layout=layout), TokenLayoutError, "prompt", method="tam", compat="tam")


@pytest.mark.parametrize("length", [SEQ - 1, SEQ + 2])
def test_ids_of_another_length_than_the_layout(good: Inputs, length: int) -> None:
    ids = torch.zeros(length, dtype=torch.long)
    refuse(replace(good, ids=ids), TokenLayoutError, str(length), f"{RESPONSE}")


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(SEQ),
        torch.zeros(1, SEQ, dtype=torch.long),
        torch.zeros(SEQ, dtype=torch.bool),
        torch.ones(SEQ).byte(),
    ],
    ids=["floats", "a batch", "a mask", "bytes"],
)
def test_ids_of_the_wrong_kind(good: Inputs, ids: Tensor) -> None:
    """Masks and bytes would not look rows up but select them."""
    refuse(replace(good, ids=ids), TokenLayoutError, str(ids.dtype), str(list(ids.shape)))


def test_a_grid_that_does_not_fit_its_span() -> None:
    with pytest.raises(TokenLayoutError, match=r"6 positions .* \(1, 2, 4\) needs 8"):
        TokenLayout.from_spans(images=[(*IMAGE, (1, 2, 4))], prompt=[PROMPT], response=RESPONSE)


def test_image_positions_inside_the_response() -> None:
    with pytest.raises(TokenLayoutError, match=r"image position 11 .* 0\.\.10; the response spans \(11, 13\)"):
        TokenLayout.from_spans(images=[(6, 12, (1, 2, 3))], prompt=[], response=RESPONSE)


def test_a_position_claimed_twice() -> None:
    with pytest.raises(TokenLayoutError, match="position 6 is claimed twice"):
        TokenLayout.from_spans(images=[(*IMAGE, (1, 2, 3))], prompt=[(6, 9)], response=RESPONSE)


@pytest.mark.parametrize("response", [(11, 11), (13, 11), (0, 2)])
def test_a_response_that_is_empty_or_was_never_predicted(response: tuple[int, int]) -> None:
    with pytest.raises(TokenLayoutError, match=re.escape(f"the response spans {response}")):
        TokenLayout.from_spans(images=[(*IMAGE, (1, 2, 3))], prompt=[], response=response)


def test_a_layout_without_images() -> None:
    with pytest.raises(TokenLayoutError, match="no image group"):
        TokenLayout.from_spans(images=[], prompt=[PROMPT], response=RESPONSE)


# --- options -------------------------------------------------------------------------------------


def test_rankings_deeper_than_the_vocabulary(good: Inputs) -> None:
    refuse(good, InputError, str(VOCAB + 1), str(VOCAB), method="arc", top_k=VOCAB + 1)
    good.attribute(method="arc", top_k=VOCAB)
    good.attribute(method="tam", top_k=VOCAB + 1)  # no rankings, no limit


def test_rankings_deeper_than_the_valid_vocabulary(good: Inputs) -> None:
    inputs = replace(good, weight=OutputHead(good.weight, valid_vocab=9))
    refuse(inputs, InputError, "10", "9", method="arc", top_k=10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gradcam"}, ["'gradcam'", "lens, tam, arc, best"]),
        ({"compat": "tam", "method": "arc"}, ["'arc'"]),
        ({"top_k": 0, "method": "arc"}, ["0"]),
        ({"rbo_p": 1.0, "method": "arc"}, ["1.0"]),
        ({"scales": (0.0,)}, ["0.0"]),
        ({"scales": (-1.0,)}, ["-1.0"]),
        ({"scales": (float("nan"),)}, ["nan"]),
        ({"scales": (100.0,)}, ["100.0"]),
        ({"scales": (1.0, 1.0)}, ["(1.0, 1.0)"]),
        ({"scales": ()}, ["empty"]),
        ({"scale_weights": (1.0, 2.0)}, ["2", "1"]),
        ({"scale_weights": (-1.0,)}, ["(-1.0,)"]),
        ({"aggregate": "never"}, ["'never'"]),
        ({"context": "system"}, ["'system'"]),
        ({"arc_weight": "r"}, ["'r'"]),
    ],
)
def test_options_out_of_range(good: Inputs, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        good.attribute(**options)
    assert all(word in str(caught.value) for word in words)


# --- several scales that do not belong together --------------------------------------------------


def two_scales(first: Inputs, second: Inputs) -> Inputs:
    return Inputs([first.hidden, second.hidden], first.weight, [first.ids, second.ids], [first.layout, second.layout])


def test_one_reading_for_two_scales(good: Inputs) -> None:
    refuse(good, InputError, "1", "2", scales=(1.0, 2.0))


def test_scales_with_responses_of_different_length(good: Inputs) -> None:
    shorter = replace(good, hidden=good.hidden[:-1], ids=good.ids[:-1], layout=replace(LAYOUT, response=(11, 12)))
    refuse(two_scales(good, shorter), TokenLayoutError, "2", "1", scales=(1.0, 2.0))


def test_scales_with_different_responses(good: Inputs) -> None:
    """The method compares how the same words are read at two sizes."""
    ids = good.ids.clone()
    ids[-1] = 3
    refuse(two_scales(good, replace(good, ids=ids)), TokenLayoutError, "8", "3", scales=(1.0, 2.0))


def test_scales_with_different_images(good: Inputs) -> None:
    pair = TokenLayout.from_spans(images=[(1, 4, (1, 1, 3)), (4, 7, (1, 1, 3))], prompt=[PROMPT], response=RESPONSE)
    refuse(two_scales(good, replace(good, layout=pair)), TokenLayoutError, "[1]", "[1, 1]", scales=(1.0, 2.0))


def test_scales_with_different_frames(good: Inputs) -> None:
    video = TokenLayout.from_spans(images=[(*IMAGE, (2, 1, 3))], prompt=[PROMPT], response=RESPONSE)
    refuse(two_scales(good, replace(good, layout=video)), TokenLayoutError, "[1]", "[2]", scales=(1.0, 2.0))


def test_the_message_says_which_scale_is_bad(good: Inputs) -> None:
    hidden = good.hidden.clone()
    hidden[2] = torch.nan
    refuse(two_scales(good, replace(good, hidden=hidden)), StatesError, "scale 1.5", scales=(1.0, 1.5))


# --- devices and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hidden", "weight", "ids"])
def test_tensors_on_two_devices(good: Inputs, which: str) -> None:
    away = getattr(good, which).to("meta")
    refuse(replace(good, **{which: away}), StatesError, "meta", "cpu")


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["lens", "tam", "arc"])
def test_every_mixture_of_floating_dtypes(
    good: Inputs, dtype: torch.dtype, weight_dtype: torch.dtype, method: str
) -> None:
    """The maps are those of the same numbers in float32: precision is lost by the caller, never here."""
    mixed = replace(good, hidden=good.hidden.to(dtype), weight=good.weight.to(weight_dtype))
    plain = replace(good, hidden=mixed.hidden.float(), weight=mixed.weight.float())
    why, expected = mixed.attribute(method=method, top_k=5), plain.attribute(method=method, top_k=5)
    (maps,) = why.image
    assert maps.dtype == torch.float32 and torch.isfinite(maps).all() and ((maps >= 0) & (maps <= 1)).all()
    assert torch.isfinite(why.log_prob).all() and torch.isfinite(why.context).all()
    assert maps.max() > 0.1
    torch.testing.assert_close(maps, expected.image[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 200.0])
def test_half_precision_is_finite_at_any_size_of_activation(good: Inputs, dtype: torch.dtype, size: float) -> None:
    """Products that would overflow or vanish in half precision (200 * 200 * 6, 1e-4 * 1e-4) are made in float32."""
    scaled = replace(good, hidden=(size * good.hidden).to(dtype), weight=(size * good.weight).to(dtype))
    for method in ("lens", "tam", "arc"):
        why = scaled.attribute(method=method, top_k=5)
        assert torch.isfinite(why.image[0]).all() and why.image[0].max() > 0.1
        assert torch.isfinite(why.log_prob).all()


def test_ids_of_32_bits(good: Inputs) -> None:
    why = replace(good, ids=good.ids.int()).attribute(method="tam")
    assert torch.equal(why.image[0], good.attribute(method="tam").image[0])
