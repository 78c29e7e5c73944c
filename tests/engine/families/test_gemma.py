"""Gemma 3, with and without pan and scan, and PaliGemma."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattr
from fastattr import adapters
from fastattr.adapters.families import Shown
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, prove, read, wrap
from tests.engine.families.tiny_gemma import (
    gemma3_scanned,
    gemma3n,
    gemma4,
    gemma4_shared,
    paligemma,
    paligemma2,
    shieldgemma2,
)
from tests.engine.families.tiny_llava import captured
from tests.engine.family_models import ANSWER, PROMPT, Tiny, gemma3, picture

ROWS = [
    Row("gemma3", gemma3, [(4, 4)], (1, 4, 4), scales=(1.0,)),
    Row("gemma3", gemma3_scanned, [(4, 4)] * 3, (1, 4, 8), scales=(1.0,)),
    Row("shieldgemma2", shieldgemma2, [(4, 4)], (1, 4, 4), scales=(1.0,)),
    Row(
        "gemma3n",
        gemma3n,
        [(4, 4)],
        (1, 4, 4),
        scales=(1.0,),
        stood_in="the vision tower by one convolution (it needs timm); sound is left out",
    ),
    Row("gemma4", gemma4, [(7, 9)], (1, 7, 9), scales=(1.0,)),
    Row("gemma4", gemma4_shared, [(7, 9)], (1, 7, 9), scales=(1.0,)),
    Row("paligemma", paligemma, [(4, 4)], (1, 4, 4), scales=(1.0,)),
    Row("paligemma", paligemma2, [(4, 4)], (1, 4, 4), scales=(1.0,)),
]


FILTER = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of PaliGemmaProcessor


def row_of(make: Callable[[], Tiny]) -> Row:
    return next(row for row in ROWS if row.make is make)


@FILTER
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_family(row: Row) -> None:
    prove(row)


@FILTER
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.make.__name__)
def test_a_batch_and_a_decoder_read_what_a_replay_reads(row: Row) -> None:
    prove_other_ways(wrap(row), [picture(), picture(120, 40), picture(67, 91, seed=3)])


@FILTER
@pytest.mark.parametrize("make", [paligemma, paligemma2])
def test_the_prefix_of_paligemma_does_not_see_the_answer(make: Callable[[], Tiny]) -> None:
    """Its states are those of the prompt alone, which is what `generate` reads; and it is read in both directions."""
    held = make()
    model = fastattr.wrap(held.hf_model, held.processor)
    encoded, response = read(model)
    n = len(encoded.input_ids)
    whole = adapters.replay(model, encoded, response).hidden_states
    with torch.no_grad():
        alone = held.hf_model.model(input_ids=encoded.input_ids[None], **encoded.model_inputs).last_hidden_state[0]
    torch.testing.assert_close(whole[:n], alone, rtol=1e-4, atol=1e-4)
    changed = encoded.input_ids.clone()
    changed[encoded.prompt[-1]] = changed[encoded.prompt[0]]
    other = adapters.replay(model, replace(encoded, input_ids=changed), response).hidden_states
    assert (other[0] - whole[0]).norm() > 1e-3  # the first image token sees the last word of the prompt
    longer = adapters.replay(model, encoded, torch.cat([response, response])).hidden_states
    torch.testing.assert_close(longer[: len(whole)], whole, rtol=1e-4, atol=1e-4)


# --- pan and scan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(67, 91), (91, 67), (40, 130), (130, 40), (33, 97), (64, 64), (64, 70), (20, 200)])
def test_crops_lie_where_pan_and_scan_takes_them(size: tuple[int, int]) -> None:
    """Every crop of a picture whose pixels say where they are."""
    held = gemma3_scanned()
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    places = np.stack([rows, columns]).astype(float)
    crops = held.processor.image_processor.pan_and_scan(places, 16, 4, 1.2)
    expected = [
        (crop[1].min() / width, crop[0].min() / height, (crop[1].max() + 1) / width, (crop[0].max() + 1) / height)
        for crop in [places, *crops]
    ]
    model = fastattr.wrap(held.hf_model, held.processor)
    pixels = torch.zeros(len(expected), 3, 64, 64)
    (looks,) = model.family.look(Shown(model.config, model.processor, {"pixel_values": pixels}, [size]))
    np.testing.assert_allclose([look.box for look in looks], expected)


def test_several_pictures_of_which_some_are_scanned() -> None:
    model = wrap(ROWS[1])
    encoded, _ = read(model, [picture(), picture(64, 64), picture(120, 30)])
    assert [len(group.views) for group in encoded.groups] == [3, 0, 5]
    assert [group.grid for group in encoded.groups] == [(1, 4, 8), (1, 4, 4), (1, 16, 4)]


def test_capture_of_scanned_pictures() -> None:
    """Pan and scan is asked for in the call of the processor; its options are read from where they are set."""
    model = wrap(ROWS[1])
    states, out = captured(model, [picture()])
    with pytest.raises(
        fastattr.TokenLayoutError, match=r"more squares than one picture has.*pass the pictures, image="
    ):
        states.attribute(out)
    assert states.attribute(out, image=picture()).grids[0][0] == (1, 4, 8)
    model.processor.images_kwargs = {**model.processor.images_kwargs, "pan_and_scan_min_crop_size": 60}
    with pytest.raises(fastattr.TokenLayoutError, match=r"made 3 tiles, but Gemma3 makes \[1\]"):
        states.attribute(out, image=picture(), evidence=False)


def test_a_family_with_a_fixed_number_of_tokens_says_so() -> None:
    model = wrap(ROWS[0])
    with pytest.raises(fastattr.ScaleError, match=r"always uses 16 tokens a tile, so scale 1.5 .* use scales=\(1.0,\)"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0, 1.5))


@pytest.mark.parametrize("layer", [-1, -2])
def test_layers_that_share_keys_and_values_compute_every_position_and_logits_stay_few(layer: int) -> None:
    """transformers computes only the kept positions of such layers; reading states needs all of them."""
    model = wrap(row_of(gemma4_shared))
    encoded, response = read(model)
    head_rows: list[int] = []
    handle = model.hf_model.lm_head.register_forward_pre_hook(lambda _, args: head_rows.append(args[0].shape[1]))
    try:
        states = adapters.replay(model, encoded, response, layer=layer).hidden_states
        captured(model, [picture()])
        adapters.Decoder(model, encoded, layer=layer)
    finally:
        handle.remove()
    assert set(head_rows) == {1}
    fed = torch.cat([encoded.input_ids, response])[None, :-1]
    with torch.no_grad():
        out = model.hf_model(input_ids=fed, **padded(encoded, fed.shape[1]), output_hidden_states=True)
    assert model.hf_model.config.text_config.num_kv_shared_layers == 2
    expected = out.hidden_states[layer][0]
    norm = model.hf_model.model.language_model.norm
    torch.testing.assert_close(states, expected if layer == -1 else norm(expected), rtol=1e-4, atol=1e-4)


def padded(encoded: adapters.EncodedExample, n_tokens: int) -> dict[str, torch.Tensor]:
    """Model inputs of a sequence of `n_tokens`, whose last ones are text."""
    inputs = dict(encoded.model_inputs)
    n_more = n_tokens - len(encoded.input_ids)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, n_more))
    return inputs


def test_generate_beside_a_capture_computes_what_it_always_does() -> None:
    """Only forwards within the capturing context compute every position."""
    model = wrap(row_of(gemma4_shared))
    encoded, _ = read(model)
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    lengths: list[int] = []
    decoder = model.hf_model.model.language_model
    handle = decoder.register_forward_hook(lambda _module, _args, out: lengths.append(out[0].shape[1]))
    n_prompt = len(encoded.input_ids)
    try:
        with fastattr.capture(model), ThreadPoolExecutor(1) as other:
            other.submit(model.hf_model.generate, **inputs, do_sample=False, max_new_tokens=1).result()
            assert lengths == [1]
            model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=1)
            assert lengths == [1, n_prompt]
    finally:
        handle.remove()


def test_gemma4_keeps_the_form_of_a_picture() -> None:
    model = wrap(row_of(gemma4))
    encoded, _ = read(model, [picture(60, 60), picture(40, 120), picture(120, 40)])
    square, wide, tall = (group.grid for group in encoded.groups)
    assert square == (1, 8, 8) and wide == (1, 4, 14) and tall == (1, 14, 4)
    states, out = captured(model, [picture(60, 60), picture(40, 120)])
    assert states.attribute(out).grids[0] == (square, wide)  # without the pictures: their places are among the inputs


@FILTER
def test_paligemma_is_loaded_with_a_template_of_its_own(tmp_path: Path) -> None:
    """Its directories have none, since it was taught no turns."""
    held = paligemma()
    held.hf_model.save_pretrained(tmp_path)
    held.processor.chat_template = held.processor.tokenizer.chat_template = None
    held.processor.save_pretrained(tmp_path)
    encoded, _ = read(fastattr.load(tmp_path), [picture(), picture(120, 40)])
    tokens = held.processor.tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens[:33] == ["<image>"] * 32 + ["<bos>"]
    assert held.processor.tokenizer.decode(encoded.input_ids[33:]) == PROMPT + "\n"
