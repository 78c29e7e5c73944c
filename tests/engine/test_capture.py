"""States read along with `generate` are those of a replay, or are replaced by it, and nothing stays behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fastattr
from fastattr import adapters
from fastattr.adapters.decoding import cache_name
from fastattr.adapters.hooks import decoder_of
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import PROMPT, TINY, picture


@pytest.fixture(scope="module", params=list(TINY))
def any_model(request: pytest.FixtureRequest) -> fastattr.Model:
    held = TINY[request.param]()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture
def model() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


def prepared(model: fastattr.Model, image: Any = None, prompt: str = PROMPT) -> dict[str, Tensor]:
    """The arguments that a user would pass to `generate`."""
    encoded = adapters.encode(model, read_visuals(picture() if image is None else image), prompt)
    ids = encoded.input_ids[None]
    return {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sampling(model: fastattr.Model) -> dict[str, Any]:
    """Options for a short random answer in words."""
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    return {"max_new_tokens": 6, "do_sample": True, "suppress_tokens": never}


def assert_same(ours: fastattr.Attribution, expected: fastattr.Attribution) -> None:
    assert ours.token_ids == expected.token_ids
    assert ours.context_tokens == expected.context_tokens
    for one, other in zip(
        (*ours.image, ours.context, ours.log_prob), (*expected.image, expected.context, expected.log_prob), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def explained(model: fastattr.Model, sequence: Tensor, start: int, image: Any = None) -> fastattr.Attribution:
    """The same response by `attribute`, which replays it."""
    shown = picture() if image is None else image
    return fastattr.attribute(model, shown, PROMPT, sequence[start:], scales=(1.0,), evidence=False)


def untouched(model: fastattr.Model) -> bool:
    """No hook of ours on any module, and `generate` is the class's own."""
    modules = list(model.hf_model.modules())
    every = [hook for m in modules for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()]
    return not any(hook.__module__.startswith("fastattr") for hook in every) and not any(
        "generate" in m.__dict__ for m in modules
    )


# --- capture is replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
def test_captured_states_are_those_of_a_replay(any_model: fastattr.Model, do_sample: bool) -> None:
    exact = fastattr.wrap(copy.deepcopy(any_model.hf_model).double(), any_model.processor)
    inputs = prepared(exact)
    start = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    with fastattr.capture(exact) as states:
        out = exact.hf_model.generate(**inputs, **{**sampling(exact), "do_sample": do_sample})
    hidden, source = states.read(out[0])
    assert source == "capture"
    assert len(hidden) == len(out[0]) - 1

    encoded = adapters.encode(exact, read_visuals(picture()), PROMPT)
    expected = adapters.replay(exact, encoded, out[0, start:])
    torch.testing.assert_close(hidden, expected.hidden_states, rtol=1e-6, atol=1e-7)  # the rotary angles are float32

    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "capture" and why.notes == explained(any_model, out[0], start).notes
    assert_same(why, explained(any_model, out[0], start))


def test_several_images_and_a_video_are_captured(model: fastattr.Model) -> None:
    images = [picture(), [picture(seed=1), picture(seed=2)]]
    inputs = prepared(model, images)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
    why = states.attribute(out, image=images, prompt=PROMPT)
    assert [tuple(maps.shape[1:]) for maps in why.image] == [(1, 4, 6), (2, 4, 6)]
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1], images))


def test_an_output_object_is_read_too(model: fastattr.Model) -> None:
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model), return_dict_in_generate=True)
    assert states.attribute(out, prompt=PROMPT).token_ids == tuple(
        out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    )


def test_chunked_prefill(model: fastattr.Model) -> None:
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model), prefill_chunk_size=16)
    assert len(states.fed) > len(inputs["input_ids"][0]) // 16 + 1
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "capture"
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))


def test_a_decoding_loop_of_the_users_own() -> None:
    held = tiny.llava_pixtral()
    model = fastattr.wrap(held.hf_model, held.processor)
    inputs = prepared(model)
    sequence = inputs["input_ids"]
    name = cache_name(held.hf_model)
    with fastattr.capture(model) as states, torch.no_grad():
        output = held.hf_model(**inputs, use_cache=True)
        for _ in range(4):
            sequence = torch.cat([sequence, output.logits[:, -1:, : model.head.vocab].argmax(-1)], dim=1)
            output = held.hf_model(sequence[:, -1:], **{name: getattr(output, name)}, use_cache=True)
        sequence = torch.cat([sequence, output.logits[:, -1:, : model.head.vocab].argmax(-1)], dim=1)
    why = states.attribute(sequence, image=picture(), prompt=PROMPT)
    assert why.source == "capture"
    assert_same(why, explained(model, sequence[0], inputs["input_ids"].shape[1]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft
def test_an_adapted_model_is_captured() -> None:
    held = tiny.qwen2_vl()
    adapted = peft.get_peft_model(
        held.hf_model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    model = fastattr.wrap(adapted, held.processor)
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = adapted.generate(**inputs, **sampling(model))
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "capture"
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))
    assert untouched(model)


# --- or replaced by it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"assistant_model": "itself", "do_sample": False},
    ],
    ids=["beams", "no cache", "prompt lookup", "assistant"],
)
def test_what_cannot_be_captured_is_replayed_and_says_so(
    model: fastattr.Model, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if "assistant_model" in options:
        options = {**options, "assistant_model": tiny.qwen2_vl().hf_model}
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **{**sampling(model), **options})
    with caplog.at_level(logging.WARNING, logger="fastattr"):
        why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "replay"
    assert any("read again in one forward" in note for note in why.notes)
    assert f"states where {len(out[0]) - 1} are expected" in caplog.text
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))


def test_an_edited_answer_is_replayed(model: fastattr.Model) -> None:
    """As many tokens as were captured, but not the same ones."""
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
    edited = out.clone()
    edited[0, -3] = 8 if edited[0, -3] != 8 else 9
    why = states.attribute(edited, image=picture(), prompt=PROMPT)
    assert why.source == "replay"
    assert_same(why, explained(model, edited[0], inputs["input_ids"].shape[1]))


def test_a_forward_before_generate_does_no_harm(model: fastattr.Model) -> None:
    """A warm-up on another picture, say: what generate was given is what counts."""
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        with torch.no_grad():
            model.hf_model(**prepared(model, picture(seed=5)))
        out = model.hf_model.generate(**inputs, **sampling(model))
    assert_same(
        states.attribute(out, image=picture(), prompt=PROMPT), explained(model, out[0], inputs["input_ids"].shape[1])
    )


# --- nothing stays behind ---------------------------------------------------------------------------------


def test_hooks_and_shim_are_gone(model: fastattr.Model) -> None:
    assert untouched(model)
    with fastattr.capture(model):
        assert not untouched(model)
    assert untouched(model)


def test_hooks_and_shim_are_gone_after_an_exception(model: fastattr.Model) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("out of memory")

    decoder: Any = decoder_of(model.hf_model)
    handle = decoder.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), fastattr.capture(model):
        model.hf_model.generate(**prepared(model), **sampling(model))
    handle.remove()
    assert untouched(model)


def test_a_generate_of_the_users_own_is_put_back(model: fastattr.Model) -> None:
    calls: list[str] = []
    plain = model.hf_model.generate

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append("own")
        return plain(*args, **kwargs)

    model.hf_model.generate = own
    with fastattr.capture(model) as outer, fastattr.capture(model) as inner:
        out = model.hf_model.generate(**prepared(model), **sampling(model))
    assert model.hf_model.generate is own
    assert calls == ["own"]
    assert_same(outer.attribute(out, prompt=PROMPT), inner.attribute(out, prompt=PROMPT))


# --- what is refused --------------------------------------------------------------------------------------


def test_one_block_captures_one_generate(model: fastattr.Model) -> None:
    """Otherwise the states of one picture could pass for those of another that got the same answer."""
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
        with pytest.raises(
            fastattr.InputError, match="ran twice in one capture block, expected once; open a block for each run"
        ):
            model.hf_model.generate(**prepared(model, picture(seed=1)), **sampling(model))
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))


def test_nothing_captured(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        pass
    with pytest.raises(fastattr.InputError, match="nothing was captured: call generate of the captured model inside"):
        states.attribute(torch.ones(1, 5, dtype=torch.long))


def test_another_models_generate_is_not_captured(model: fastattr.Model) -> None:
    other = tiny.qwen2_vl().hf_model
    with fastattr.capture(model) as states:
        out = other.generate(**prepared(model), **sampling(model))
    with pytest.raises(fastattr.InputError, match="nothing was captured"):
        states.attribute(out)


def test_several_sequences(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**prepared(model), **sampling(model), num_return_sequences=2)
    with pytest.raises(
        fastattr.InputError, match=r"sequences \[2, \d+\], expected \[1 seq\]; explain them one at a time"
    ):
        states.attribute(out)
    why = states.attribute(out[1:], image=picture(), prompt=PROMPT)  # rows of a batch can still be replayed
    assert why.source == "replay"
    assert_same(why, explained(model, out[1], prepared(model)["input_ids"].shape[1]))


def test_something_else_than_what_generate_returned(model: fastattr.Model) -> None:
    inputs = prepared(model)
    start = inputs["input_ids"].shape[1]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
    with pytest.raises(fastattr.InputError, match="out is a str, expected what generate returned"):
        states.attribute("a red circle")
    with pytest.raises(fastattr.InputError, match=f"out holds 6 tokens that do not begin with the {start} tokens"):
        states.attribute(out[:, start:])
    with pytest.raises(fastattr.TokenLayoutError, match="stop > start"):
        states.attribute(out[:, :start])


def test_another_number_of_pictures(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**prepared(model), **sampling(model))
    with pytest.raises(
        fastattr.InputError, match="image holds 2 images, but generate was given 1; pass the same, or none"
    ):
        states.attribute(out, image=[picture(), picture()], prompt=PROMPT)


def test_generate_from_embeddings(model: fastattr.Model) -> None:
    inputs = prepared(model)
    embeddings = model.hf_model.get_input_embeddings()(inputs["input_ids"])
    with (
        fastattr.capture(model),
        pytest.raises(fastattr.InputError, match=r"given inputs_embeds, .*expected input_ids"),
    ):
        model.hf_model.generate(inputs_embeds=embeddings, **sampling(model))


def test_generate_without_an_image(model: fastattr.Model) -> None:
    ids = model.processor.tokenizer([PROMPT], return_tensors="pt")["input_ids"]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling(model))
    with pytest.raises(fastattr.TokenLayoutError, match=r"reads its grids from 'image_grid_thw'.*must show an image"):
        states.attribute(out)


# --- which words are the user's ------------------------------------------------------------------------------


def test_the_prompt_is_found_in_the_captured_text(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**prepared(model), **sampling(model))
    why = states.attribute(out, prompt=PROMPT)
    n_prompt = len(why.context_tokens) - len(why.tokens)
    assert "".join(why.context_tokens[:n_prompt]).strip() == PROMPT
    assert not any("prompt" in note for note in why.notes)

    bare = states.attribute(out)
    assert any("the prompt was not given" in note for note in bare.notes)
    said = "".join(bare.context_tokens[: len(bare.context_tokens) - len(bare.tokens)])
    assert PROMPT in said and "user" in said and "<|im_start|>" not in said and "<|image_pad|>" not in said


def test_a_prompt_that_was_not_asked(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**prepared(model), **sampling(model))
    with pytest.raises(fastattr.TokenLayoutError, match="'What color is it' is not in the text the model reads"):
        states.attribute(out, prompt="What color is it")


def test_a_chat_written_by_hand() -> None:
    """A processor without a chat template is enough where the user renders the chat."""
    held = tiny.llava_clip()
    model = fastattr.wrap(held.hf_model, held.processor)
    inputs = prepared(model)
    held.processor.chat_template = None
    with fastattr.capture(model) as states:
        out = held.hf_model.generate(**inputs, **sampling(model))
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert "".join(why.context_tokens[: -len(why.tokens)]).strip() == PROMPT
    assert why.extents == ((0.5 - 67 / 91 / 2, 0.0, 0.5 + 67 / 91 / 2, 1.0),)


# --- evidence ---------------------------------------------------------------------------------------------


def test_captured_evidence_is_that_of_attribute(any_model: fastattr.Model) -> None:
    inputs = prepared(any_model)
    with fastattr.capture(any_model) as states:
        out = any_model.hf_model.generate(**inputs, **sampling(any_model))
    why = states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
    response = out[0, inputs["input_ids"].shape[1] :]
    expected = fastattr.attribute(any_model, picture(), PROMPT, response, scales=(1.0,))
    assert why.evidence is not None and expected.evidence is not None
    torch.testing.assert_close(why.evidence, expected.evidence, rtol=1e-4, atol=1e-4)


def test_evidence_needs_the_same_images(model: fastattr.Model) -> None:
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**prepared(model), **sampling(model))
    with pytest.raises(fastattr.InputError, match="pass the same as image= that generate was given"):
        states.attribute(out, prompt=PROMPT, evidence=True)
    larger = picture().resize((picture().width * 2, picture().height))
    with pytest.raises(
        fastattr.InputError,
        match=r"make other inputs than generate was given|generate was given a picture of 6 x 4 cells, which is not its shape",
    ):
        states.attribute(out, image=larger, prompt=PROMPT, evidence=True)


# --- several at a time, in bounded memory -----------------------------------------------------------------


def test_threads_capture_one_model_at_once(model: fastattr.Model) -> None:
    """Each block gets its own states, also while another thread generates without capturing."""
    n = 4
    together = threading.Barrier(n + 1)
    torch.manual_seed(0)
    pictures = [picture(seed=seed) for seed in range(n)]
    greedy = {**sampling(model), "do_sample": False}

    def captured(seed: int) -> fastattr.Attribution:
        together.wait()
        with fastattr.capture(model) as states:
            out = model.hf_model.generate(**prepared(model, pictures[seed]), **greedy)
        why = states.attribute(out, image=pictures[seed], prompt=PROMPT)
        assert why.source == "capture"
        return why

    def plain() -> None:
        together.wait()
        for _ in range(3):
            model.hf_model.generate(**prepared(model), **greedy)

    with ThreadPoolExecutor(n + 1) as pool:
        beside = pool.submit(plain)
        found = list(pool.map(captured, range(n)))
        beside.result()
    for seed, why in enumerate(found):
        expected = fastattr.attribute(model, pictures[seed], PROMPT, list(why.token_ids), scales=(1.0,), evidence=False)
        assert_same(why, expected)
    assert untouched(model)


def test_a_task_captures_what_its_thread_generates(model: fastattr.Model) -> None:
    async def serve(seed: int) -> tuple[fastattr.Attribution, int]:
        with fastattr.capture(model) as states:
            inputs = prepared(model, picture(seed=seed))
            out = await asyncio.to_thread(model.hf_model.generate, **inputs, **{**sampling(model), "do_sample": False})
        return states.attribute(out, prompt=PROMPT), inputs["input_ids"].shape[1]

    async def both() -> list[tuple[fastattr.Attribution, int]]:
        return await asyncio.gather(serve(1), serve(2))

    for seed, (why, _) in zip((1, 2), asyncio.run(both()), strict=True):
        assert why.source == "capture"
        expected = fastattr.attribute(
            model, picture(seed=seed), PROMPT, list(why.token_ids), scales=(1.0,), evidence=False
        )
        assert_same(why, expected)
    assert untouched(model)


@pytest.mark.parametrize("place", ["model", "cpu"])
def test_pages_are_bounded_and_used_again(model: fastattr.Model, place: Any) -> None:
    dim = model.head.weight.shape[1]
    page_bytes = 256 * dim * 4
    buffer = fastattr.StateBuffer(2 * page_bytes, place=place)
    inputs = prepared(model)
    for _ in range(5):
        with fastattr.capture(model, buffer=buffer) as states:
            out = model.hf_model.generate(**inputs, **sampling(model))
        assert states.attribute(out, prompt=PROMPT).source == "capture"
        assert buffer.free_bytes < buffer.held_bytes <= buffer.max_bytes
        states.release()
        assert buffer.free_bytes == buffer.held_bytes == page_bytes
    with pytest.raises(fastattr.InputError, match="nothing was captured"):
        states.attribute(out, prompt=PROMPT)


def test_pages_come_back_when_states_are_forgotten(model: fastattr.Model) -> None:
    buffer = fastattr.StateBuffer()
    with pytest.raises(RuntimeError, match="the client is gone"), fastattr.capture(model, buffer=buffer):
        model.hf_model.generate(**prepared(model), **sampling(model))
        raise RuntimeError("the client is gone")
    gc.collect()
    assert 0 < buffer.held_bytes == buffer.free_bytes


def test_a_full_buffer_is_replayed(model: fastattr.Model, caplog: pytest.LogCaptureFixture) -> None:
    buffer = fastattr.StateBuffer(1)
    inputs = prepared(model)
    with fastattr.capture(model, buffer=buffer) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "replay" and buffer.held_bytes == 0
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))


def test_outputs_written_into_the_same_place_are_kept(model: fastattr.Model) -> None:
    """As captured graphs do: every step's output is the same memory."""
    decoder = decoder_of(model.hf_model)
    place: dict[tuple[int, ...], Tensor] = {}

    def reuse(_module: Any, _inputs: Any, output: Any) -> Any:
        states = output[0]
        place.setdefault(tuple(states.shape), torch.empty_like(states)).copy_(states)
        output.last_hidden_state = place[tuple(states.shape)]
        return output

    handle: Any = decoder.register_forward_hook(reuse)
    inputs = prepared(model)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **sampling(model))
    handle.remove()
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "capture"
    assert_same(why, explained(model, out[0], inputs["input_ids"].shape[1]))


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 1.5}, {"place": "disk"}, {"pin_memory": True}])
def test_a_buffer_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(fastattr.InputError, match=r"expected|place='cpu'"):
        fastattr.StateBuffer(**options)
