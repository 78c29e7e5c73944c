"""Global settings of PyTorch: autocast, default dtype and device, inference mode, offloaded weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from fastattr_kernels import context_mean, lens, lm_head_log_prob, lm_head_topk, multiscale
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.buffer import StateBuffer
from fastattr.adapters.capturing import captured_reading
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, picture

KINDS = ("qwen2_vl", "llava_clip", "gemma3", "idefics3", "mistral3")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> fastattr.Model:
    held = tiny.TINY[request.param]()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture(scope="module")
def qwen() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def explain(model: fastattr.Model) -> fastattr.Attribution:
    scales = tuple(scale for scale in model.scales if scale < 2)
    return fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=scales)


def streamed(model: fastattr.Model) -> fastattr.Attribution:
    ids = adapters.encode_response(model, ANSWER).tolist()
    stream = fastattr.stream(model, picture(), PROMPT, ids, scales=(1.0,))
    for _ in stream:
        pass
    return stream.attribution()


def generated(model: fastattr.Model, n: int = 4, **options: Any) -> tuple[adapters.CapturedStates, Tensor]:
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    ids = encoded.input_ids[None]
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    inputs = {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with fastattr.capture(model, **options) as states:
        out = model.hf_model.generate(**inputs, max_new_tokens=n, do_sample=False, suppress_tokens=never)
    return states, out


def check_equal(one: fastattr.Attribution, other: fastattr.Attribution, tolerance: float = 1e-6) -> None:
    assert one.image[0].dtype == other.image[0].dtype == torch.float32
    for name in ("context", "log_prob", "agreement", "raw_range", "residual"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.image[0], other.image[0], rtol=tolerance, atol=tolerance)
    if other.evidence is not None:
        torch.testing.assert_close(one.evidence, other.evidence, rtol=tolerance, atol=tolerance)


# --- default dtype and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_changes_nothing(model: fastattr.Model, dtype: torch.dtype) -> None:
    right, right_stream = explain(model), streamed(model)
    with default_dtype(dtype):
        # models compute positions and masks in it, so their own rounding may differ
        check_equal(explain(model), right, 1e-5)
        check_equal(streamed(model), right_stream, 1e-5)


@pytest.mark.parametrize("method", ["lens", "tam", "best"])
def test_every_method_under_another_default_dtype(qwen: fastattr.Model, method: Any) -> None:
    def ask() -> fastattr.Attribution:
        if method == "best":
            return fastattr.attribute(
                qwen, picture(), PROMPT, ANSWER, scales=(1.0, 1.5), scale_mean="geometric", regions=2
            )
        return fastattr.attribute(
            qwen, picture(), PROMPT, ANSWER, method=method, scales=(1.0, 1.5), decision_weight=True
        )

    right = ask()
    with default_dtype(torch.float16):
        check_equal(ask(), right)


def test_wrap_under_another_default_dtype() -> None:
    held = tiny.qwen2_vl()
    with default_dtype(torch.bfloat16):
        model = fastattr.wrap(held.hf_model, held.processor)
    assert model.head.weight.dtype == torch.float32
    check_equal(explain(model), explain(fastattr.wrap(held.hf_model, held.processor)))


def test_another_default_device_changes_nothing() -> None:
    held = tiny.llava_clip()
    model = fastattr.wrap(held.hf_model, held.processor)
    right = explain(model)
    with default_device("meta"):
        check_equal(explain(model), right)


# --- autocast -------------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def test_products_ignore_autocast() -> None:
    hidden, weight = random(6, 32), random(90, 32)
    maps, weights = random(5, 1, 4, 4).abs(), random(5, 1).abs()
    lit, suspicion = random(7, 12).abs(), random(5, 7).abs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        activation = lens(hidden, weight)
        ids, values = lm_head_topk(hidden, weight, 5)
        log_prob = lm_head_log_prob(hidden, weight, ids[:, 0])
        fine, _ = multiscale([maps], weights, (9, 9))
        mean = context_mean(lit, suspicion)
    logits = hidden.double() @ weight.double().T
    torch.testing.assert_close(activation.double(), logits.relu().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.double(), logits.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), logits.log_softmax(1).amax(1), rtol=1e-5, atol=1e-5)
    expected = (
        nn.functional.interpolate(maps[:, 0, None].double(), size=(9, 9), mode="bilinear")[:, 0] * weights[:, :, None]
    )
    torch.testing.assert_close(fine[:, 0].double(), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, suspicion @ lit / suspicion.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_the_model_reads_under_autocast_as_it_generates() -> None:
    """States are those of the caller's autocast; products with the head are not rounded again."""
    held = tiny.qwen2_vl()
    model = fastattr.wrap(held.hf_model, held.processor)
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    said = adapters.encode_response(model, ANSWER)
    ids = torch.cat([encoded.input_ids, said])[None]
    n = len(said)
    inputs = {
        name: nn.functional.pad(value, (0, n)) if name.endswith("token_type_ids") else value
        for name, value in encoded.model_inputs.items()
    }
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = held.hf_model(input_ids=ids, **inputs, output_hidden_states=True).hidden_states[-1][0]
    logits = states[-n - 1 : -1].double() @ held.hf_model.lm_head.weight[: model.head.vocab].double().T
    expected = logits.log_softmax(-1).gather(1, said[:, None])[:, 0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,))
        states_of_generate, out = generated(model)
        captured = states_of_generate.attribute(out, prompt=PROMPT)
        again = fastattr.attribute(model, picture(), PROMPT, list(captured.token_ids), scales=(1.0,), evidence=False)
        through_stream = streamed(model)
    torch.testing.assert_close(ours.log_prob, expected, rtol=1e-4, atol=2e-2)  # as rounding falls in other shapes
    assert (ours.log_prob - explain(model).log_prob).abs().max() > 1e-4  # it was read in bfloat16
    torch.testing.assert_close(captured.log_prob, again.log_prob, rtol=0, atol=5e-2)
    torch.testing.assert_close(through_stream.log_prob, ours.log_prob, rtol=0, atol=5e-2)


def test_a_head_is_read_without_autocast() -> None:
    from tests.engine.test_heads import Int8Buffers

    held = tiny.qwen2_vl()
    held.hf_model.lm_head = Int8Buffers(held.hf_model.lm_head.weight.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = fastattr.wrap(held.hf_model, held.processor)
        head = model.head
        explain(model)
    assert head.weight.dtype == torch.float32
    explain(model)
    assert model.head is head  # not read anew because of the mode


# --- inference mode -------------------------------------------------------------------------------------------------------


def modes(inside: bool) -> AbstractContextManager[Any]:
    return torch.inference_mode() if inside else nullcontext()


@pytest.mark.parametrize("first", [True, False])
def test_pages_are_used_in_and_out_of_inference_mode(qwen: fastattr.Model, first: bool) -> None:
    buffer = StateBuffer(2**20)
    found = []
    for inside in (first, not first, first):
        with modes(inside):
            states, out = generated(qwen, buffer=buffer)
            for explained_inside in (True, False):
                with modes(explained_inside):
                    found.append(states.attribute(out.clone(), image=picture(), prompt=PROMPT, evidence=True))
        states.release()
    for each in found[1:]:
        check_equal(each, found[0])
    with modes(False):  # with gradients, as in a training step
        embedded = qwen.hf_model.get_input_embeddings()(out.clone())
        assert embedded.requires_grad


def test_results_can_be_changed_after_inference_mode(qwen: fastattr.Model) -> None:
    with torch.inference_mode():
        found = [explain(qwen), streamed(qwen)]
        states, out = generated(qwen)
        found.append(states.attribute(out, prompt=PROMPT))
    for why in found:
        why.image[0].mul_(2)
        why.log_prob.add_(1)


def test_a_stream_that_leaves_inference_mode(qwen: fastattr.Model) -> None:
    ids = adapters.encode_response(qwen, ANSWER).tolist()
    right = streamed(qwen)
    with torch.inference_mode():
        stream = fastattr.stream(qwen, picture(), PROMPT, ids, scales=(1.0,))
        next(stream)
    next(stream)
    with torch.inference_mode():
        next(stream)
    for _ in stream:
        pass
    check_equal(stream.attribution(), right)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        held = tiny.qwen2_vl()
    model = fastattr.wrap(held.hf_model, held.processor)
    other = tiny.qwen2_vl()
    check_equal(explain(model), explain(fastattr.wrap(other.hf_model, other.processor)))


# --- weights elsewhere ----------------------------------------------------------------------------------------------------


def test_weights_on_the_disk_are_read_when_they_are_needed(tmp_path: Path) -> None:
    held, plain = tiny.llava_clip(), tiny.llava_clip()
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    spread = accelerate.dispatch_model(held.hf_model, device_map, main_device="cpu", offload_dir=tmp_path)
    model = fastattr.wrap(spread, held.processor)
    right = explain(fastattr.wrap(plain.hf_model, plain.processor))
    head = model.head
    check_equal(explain(model), right, 1e-5)
    check_equal(streamed(model), streamed(fastattr.wrap(plain.hf_model, plain.processor)), 1e-5)
    states, out = generated(model)
    theirs, their_out = generated(fastattr.wrap(plain.hf_model, plain.processor))
    check_equal(states.attribute(out), theirs.attribute(their_out), 1e-5)
    assert model.head is head  # it did not change, and was not read again


def test_captured_states_go_where_the_head_is(qwen: fastattr.Model) -> None:
    """As with a device map that puts the embeddings on one GPU and the head on another."""
    states, out = generated(qwen)
    far = replace(qwen.head, weight=qwen.head.weight.to("meta"))
    states._reading = replace(states._reading, head=far)
    states.model.live._reading, kept = states._reading, states.model.live._reading
    try:
        reading, _ = captured_reading(states, out, visuals=(), prompt=None)
    finally:
        states.model.live._reading = kept
    assert reading.hidden_states.device == reading.input_ids.device == torch.device("meta")


def test_hooks_and_modes_are_removed() -> None:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        held = tiny.qwen2_vl()
        explain(fastattr.wrap(held.hf_model, held.processor))
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
