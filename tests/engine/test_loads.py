"""However a model was loaded, adapted, moved or compiled, its maps are those of the plain model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.hooks import record_output
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture


def explained(hf_model: nn.Module, processor: Any) -> fastattr.Attribution:
    """At one scale, with evidence: two readings."""
    return fastattr.attribute(fastattr.wrap(hf_model, processor), picture(), PROMPT, ANSWER, scales=(1.0,))


def check_same(ours: fastattr.Attribution, expected: fastattr.Attribution) -> None:
    assert ours.token_ids == expected.token_ids
    assert ours.evidence is not None and expected.evidence is not None
    for one, other in zip(
        (*ours.image, ours.context, ours.log_prob, ours.evidence),
        (*expected.image, expected.context, expected.log_prob, expected.evidence),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def answered(model: fastattr.Model) -> tuple[Tensor, fastattr.Attribution, fastattr.Attribution]:
    """A captured `generate` of three tokens, what it explains, and what `attribute` explains of the same answer."""
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    ids = encoded.input_ids[None]
    never = [model.image_token_id, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(
            **encoded.model_inputs,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            suppress_tokens=never,
        )
    captured = states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
    return out, captured, fastattr.attribute(model, picture(), PROMPT, out[0, ids.shape[1] :].cpu(), scales=(1.0,))


@pytest.fixture(scope="module")
def plain() -> fastattr.Attribution:
    held = tiny.qwen2_vl()
    return explained(held.hf_model, held.processor)


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA = {"body": ["q_proj", "down_proj"], "head": ["lm_head"], "both": ["q_proj", "down_proj", "lm_head"]}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft


def adapted(target: str) -> tuple[Any, Tiny]:
    """A model under LoRA, and a plain one whose weights are `W + B A scale`, computed here."""
    held, by_hand = tiny.qwen2_vl(), tiny.qwen2_vl()
    torch.manual_seed(3)
    options = peft.LoraConfig(target_modules=LORA[target], r=4, lora_alpha=8, init_lora_weights=False)
    lora = peft.get_peft_model(held.hf_model, options).eval()
    modules = dict(by_hand.hf_model.named_modules())
    n_changed = 0
    for name, module in held.hf_model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight * (8 / 4)
            modules[name].weight.data += change.detach()
            n_changed += 1
    assert n_changed == {"body": 2 + 2, "head": 1, "both": 2 + 2 + 1}[target]
    return lora, by_hand


@pytest.mark.parametrize("target", list(LORA))
def test_lora_beside_and_merged(target: str, plain: fastattr.Attribution) -> None:
    lora, by_hand = adapted(target)
    processor = by_hand.processor
    expected = explained(by_hand.hf_model, processor)
    assert not torch.allclose(expected.log_prob, plain.log_prob, atol=0.1)
    check_same(explained(lora, processor), expected)
    lora.merge_adapter()
    check_same(explained(lora, processor), expected)
    lora.unmerge_adapter()
    check_same(explained(lora, processor), expected)
    with lora.disable_adapter():
        check_same(explained(lora, processor), plain)
    check_same(explained(lora.merge_and_unload(), processor), expected)


def test_an_adapter_that_is_switched_after_wrapping_its_head() -> None:
    """A head is read once: what was wrapped is the adapted one, and must be wrapped again when it changes."""
    lora, by_hand = adapted("head")
    head = fastattr.wrap(lora, by_hand.processor).head
    torch.testing.assert_close(head.weight, by_hand.hf_model.lm_head.weight.detach(), rtol=1e-5, atol=1e-5)
    with lora.disable_adapter():
        head = fastattr.wrap(lora, by_hand.processor).head
    torch.testing.assert_close(head.weight, tiny.qwen2_vl().hf_model.lm_head.weight.detach(), rtol=1e-5, atol=1e-5)


# --- quantised bodies -------------------------------------------------------------------------------------------------


class Bytes(nn.Module):
    """A linear layer in 8 bits; its `weight` cannot be multiplied by."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        steps = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / steps).round().to(torch.int8), requires_grad=False)
        self.register_buffer("steps", steps)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.steps, self.bias)


def test_eight_bits_everywhere() -> None:
    """Language model and head, against a plain model that holds the rounded weights."""
    held, by_hand = tiny.qwen2_vl(), tiny.qwen2_vl()
    rounded = dict(by_hand.hf_model.named_modules())
    for name, module in list(held.hf_model.named_modules()):
        if isinstance(module, nn.Linear) and "visual" not in name:
            coded = Bytes(module)
            parent, _, last = name.rpartition(".")
            setattr(held.hf_model.get_submodule(parent), last, coded)
            rounded[name].weight.data = coded.weight.float() * coded.steps
    assert isinstance(held.hf_model.lm_head, Bytes)
    check_same(explained(held.hf_model, held.processor), explained(by_hand.hf_model, by_hand.processor))


# --- weights elsewhere ------------------------------------------------------------------------------------------------


def to_cpu(hf_model: nn.Module, _directory: Path) -> None:
    accelerate.cpu_offload(hf_model, "cpu")


def to_disk(hf_model: nn.Module, directory: Path) -> None:
    accelerate.disk_offload(hf_model, str(directory), "cpu")


def to_both(hf_model: nn.Module, directory: Path) -> None:
    device_map = {
        "model.visual": "disk",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "lm_head": "disk",
    }
    accelerate.dispatch_model(hf_model, device_map, main_device="cpu", offload_dir=str(directory))


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_weights_that_come_when_they_are_needed(
    offload: Callable[[nn.Module, Path], None], tmp_path: Path, plain: fastattr.Attribution
) -> None:
    held = tiny.qwen2_vl()
    weight = held.hf_model.lm_head.weight.detach().clone()
    offload(held.hf_model, tmp_path)
    assert held.hf_model.lm_head.weight.is_meta
    model = fastattr.wrap(held.hf_model, held.processor)
    assert model.device == torch.device("cpu")
    torch.testing.assert_close(model.head.weight, weight, rtol=0, atol=0)
    check_same(explained(held.hf_model, held.processor), plain)
    _, captured, expected = answered(model)
    assert captured.source == "capture"
    check_same(captured, expected)
    assert held.hf_model.lm_head.weight.is_meta  # and they went again


def test_a_tied_head_that_is_elsewhere(tmp_path: Path) -> None:
    held, plain = tiny.qwen2_vl(tie_word_embeddings=True), tiny.qwen2_vl(tie_word_embeddings=True)
    to_disk(held.hf_model, tmp_path)
    check_same(explained(held.hf_model, held.processor), explained(plain.hf_model, plain.processor))


def test_weights_that_nobody_will_bring() -> None:
    held = tiny.qwen2_vl()
    held.hf_model.lm_head.to("meta")
    with pytest.raises(
        fastattr.UnsupportedModelError, match=r"Linear has no weights \(device meta\), and no hook .* load the weights"
    ):
        fastattr.wrap(held.hf_model, held.processor)


# --- compiled ---------------------------------------------------------------------------------------------------------


@dataclass
class Compiler:
    """A backend that counts the graphs it was given and how often they ran."""

    graphs: int = 0
    runs: int = 0

    def __call__(self, graph: Any, _examples: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    yield Compiler()
    torch.compiler.reset()


def compile_layers(hf_model: Any, compiler: Compiler) -> Any:
    for layer in hf_model.model.language_model.layers:
        layer.mlp.compile(backend=compiler)
    return hf_model


def compile_forward(hf_model: Any, compiler: Compiler) -> Any:
    hf_model.forward = torch.compile(hf_model.forward, backend=compiler)
    return hf_model


def compile_decoder(hf_model: Any, compiler: Compiler) -> Any:
    hf_model.model.language_model = torch.compile(hf_model.model.language_model, backend=compiler)
    return hf_model


def compile_model(hf_model: Any, compiler: Compiler) -> Any:
    return torch.compile(hf_model, backend=compiler)


def compile_module(hf_model: Any, compiler: Compiler) -> Any:
    hf_model.compile(backend=compiler)
    return hf_model


def compile_adapted(hf_model: Any, compiler: Compiler) -> Any:
    lora = peft.get_peft_model(hf_model, peft.LoraConfig(target_modules=["q_proj"])).eval()  # changes nothing yet
    return torch.compile(lora, backend=compiler)


@pytest.mark.parametrize(
    "compiling", [compile_layers, compile_forward, compile_decoder, compile_model, compile_module, compile_adapted]
)
def test_compiled_models_are_read_as_they_are_written(
    compiling: Callable[[Any, Compiler], Any], compiler: Compiler, plain: fastattr.Attribution
) -> None:
    held = tiny.qwen2_vl()
    check_same(explained(compiling(held.hf_model, compiler), held.processor), plain)
    assert (compiler.graphs, compiler.runs) == (0, 0)  # hooks that come and go would have it compile each time


def test_reading_leaves_what_was_compiled_alone(compiler: Compiler) -> None:
    held = tiny.llava_clip()
    compile_layers(held.hf_model, compiler)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        before = held.hf_model(input_ids=ids).logits
        made = compiler.graphs
        assert made > 0 and compiler.runs == 2  # one for each layer
        explained(held.hf_model, held.processor)
        assert compiler.runs == 2
        after = held.hf_model(input_ids=ids).logits
    assert compiler.runs == 4 and compiler.graphs == made
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_compiled_generate_is_captured(compiler: Compiler) -> None:
    held = tiny.llava_clip()
    compile_layers(held.hf_model, compiler)
    _, captured, expected = answered(fastattr.wrap(held.hf_model, held.processor))
    assert compiler.runs == 2 * 3  # layers and steps
    assert captured.source == "capture"
    check_same(captured, expected)


def test_readings_that_overlap_end_with_the_last(compiler: Compiler) -> None:
    """The compiler's stance belongs to the process; whoever leaves first must not end it for the other."""
    module = nn.Linear(2, 2)
    compiled = torch.compile(nn.Linear(2, 2), backend=compiler)
    inside, leave = threading.Event(), threading.Event()

    def read() -> None:
        with record_output(module):
            inside.set()
            assert leave.wait(30)

    thread = threading.Thread(target=read)
    with torch.no_grad():
        with record_output(module):
            thread.start()
            assert inside.wait(30)
            compiled(torch.ones(1, 2))
        compiled(torch.ones(1, 2))  # the other one is still reading
        assert compiler.runs == 0
        leave.set()
        thread.join()
        compiled(torch.ones(1, 2))
    assert compiler.runs == 1


def test_a_reading_that_fails_gives_the_stance_back(compiler: Compiler) -> None:
    module = nn.Linear(2, 2)
    compiled = torch.compile(nn.Linear(2, 2), backend=compiler)
    with pytest.raises(RuntimeError, match="odd"), record_output(module):
        raise RuntimeError("odd")
    with torch.no_grad():
        compiled(torch.ones(1, 2))
    assert compiler.runs == 1
    assert not module._forward_hooks
