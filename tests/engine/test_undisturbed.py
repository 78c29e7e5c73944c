"""Explaining leaves the model, its processor and the caller's own decoding loop as they were, in every family."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.families.proof import Row
from tests.engine.families.table import all_rows
from tests.engine.family_models import ANSWER, PROMPT, picture

ROWS = all_rows()
# set up once by transformers: hooks that record outputs on request
SET_UP = "_output_capturing_hooks_installed"
INSTALLED = "output_capturing_hook"


def plain(value: Any) -> Any:
    """A value that can be compared later: tensors copied, containers recursively, objects by identity."""
    if isinstance(value, Tensor):
        return "tensor", id(value), value._version, value.detach().clone()
    if isinstance(value, nn.Module) or callable(value):
        return "object", id(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray | int | float | str | set | bytes | None):
        return copy.deepcopy(value)
    return "object", id(value)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    return bool(one == other)


def state_of(held: Any) -> dict[str, Any]:
    """Everything of a model and its processor that a forward might change."""
    found: dict[str, Any] = {}
    for name, module in held.hf_model.named_modules():
        own = {key: value for key, value in vars(module).items() if key != SET_UP}
        hooks = own["_forward_hooks"].values()
        own["_forward_hooks"] = [hook for hook in hooks if INSTALLED not in getattr(hook, "__qualname__", "")]
        for side in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            own.pop(side)
        found[name] = plain(own)
    found["requires_grad"] = [each.requires_grad for each in held.hf_model.parameters()]
    found["config"] = held.hf_model.config.to_dict()
    found["generation_config"] = held.hf_model.generation_config.to_dict()
    found["processor"] = plain(vars(held.processor))
    for name, half in vars(held.processor).items():
        if hasattr(half, "__dict__") and not inspect.isroutine(half):
            found[f"processor.{name}"] = plain({k: v for k, v in vars(half).items() if k not in ("_tokenizer",)})
    found["random"] = torch.get_rng_state()
    found["grad"] = torch.is_grad_enabled()
    return found


def check_same(held: Any, before: dict[str, Any]) -> None:
    after = state_of(held)
    changed = [name for name in before if not same(before[name], after.get(name))]
    where = [(name, [key for key in before[name] if not same(before[name][key], after[name].get(key))])
             for name in changed if isinstance(before[name], dict)]  # fmt: skip
    assert not changed and before.keys() == after.keys(), where or changed


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of some processors, with NumPy 2
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model_type}-{row.make.__name__}")
def test_nothing_is_left_behind(row: Row) -> None:
    held = row.make()
    before = state_of(held)
    model = fastattr.wrap(held.hf_model, held.processor)
    check_same(held, before)
    fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=row.scales[:2])
    check_same(held, before)
    stream = fastattr.stream(model, picture(), PROMPT, encode(model, ANSWER)[:2])
    for _ in stream:
        check_same(held, before)


def encode(model: fastattr.Model, text: str) -> list[int]:
    return adapters.encode_response(model, text).tolist()


@torch.no_grad()
def decode(model: fastattr.Model, n: int) -> Iterator[Tensor]:
    """Logits of a user's own loop: the whole prompt with a cache, then token by token."""
    from transformers import DynamicCache

    hf_model = model.hf_model
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    cache = DynamicCache(config=hf_model.config.get_text_config(decoder=True))
    name = "cache" if "cache" in inspect.signature(hf_model.forward).parameters else "past_key_values"
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    if model.family.masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for _ in range(n):
        logits = hf_model(**inputs, **{name: cache}, use_cache=True).logits[:, -1]
        yield logits[0]
        inputs = {"input_ids": logits[:, : model.head.vocab].argmax(dim=1, keepdim=True)}


STATEFUL = [row for row in ROWS if row.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr", "llava",
            "gemma3", "hunyuan_vl", "paddleocr_vl")]  # fmt: skip


@pytest.mark.parametrize("row", STATEFUL, ids=lambda row: f"{row.model_type}-{row.make.__name__}")
def test_a_loop_that_is_interrupted_goes_on(row: Row) -> None:
    """Larger and smaller pictures, with other positions, are read in between."""
    held = row.make()
    model = fastattr.wrap(held.hf_model, held.processor)
    expected = list(decode(model, 4))
    others = (picture(120, 60), picture(50, 130))
    stream = fastattr.stream(
        model, others[1], PROMPT, encode(model, ANSWER), config=fastattr.AttributionConfig(scales=(1.0,))
    )
    found = []
    for logits in decode(model, 4):
        found.append(logits)
        fastattr.attribute(model, others[0], PROMPT, ANSWER, scales=(1.0,), regions=1)
        next(stream)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=0)


def test_explaining_a_capture_leaves_nothing_behind() -> None:
    for row in STATEFUL[:1]:
        held = row.make()
        model = fastattr.wrap(held.hf_model, held.processor)
        encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
        inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
        never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
        with fastattr.capture(model) as states:
            out = held.hf_model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=never)
        before = state_of(held)
        states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
        check_same(held, before)


def test_hooks_of_the_users_own_stay_and_run_in_order() -> None:
    held = next(row for row in ROWS if row.model_type == "qwen2_vl").make()
    model = fastattr.wrap(held.hf_model, held.processor)
    called: list[str] = []
    decoder = held.hf_model.get_decoder()
    handles = [decoder.register_forward_hook(lambda *_, n=name: called.append(n)) for name in ("first", "second")]
    before = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,), evidence=False)
    assert called == ["first", "second"]
    assert len(decoder._forward_hooks) >= len(handles)

    def louder(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    decoder.register_forward_hook(louder)  # what a hook makes of the states is what the head consumes
    after = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,), evidence=False, method="lens")
    plain_maps = before.raw_range
    assert called == ["first", "second"] * 2
    assert bool((after.raw_range[:, 1] > plain_maps[:, 1]).any())
