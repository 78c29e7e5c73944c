"""Output heads of every form give the model's own logits as plain tensors, or are refused with a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastattr
from fastattr.adapters import head as head_module
from fastattr.maps import class_activations, log_prob_of
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture

VOCAB = 384


def logits_and_states(hf_model: Any) -> tuple[Tensor, Tensor]:
    """Logits `[seq vocab]` and what the head consumes `[seq dim]`, from an ordinary forward of other ids than wrap's."""
    torch.manual_seed(7)
    ids = torch.randint(20, 250, (1, 24))
    with torch.no_grad():
        out = hf_model(input_ids=ids, output_hidden_states=True)
    return out.logits[0], out.hidden_states[-1][0]


def check_head(held: Tiny, tolerance: float = 1e-5) -> fastattr.OutputHead:
    """Wrap, and compare classes and log-probabilities with the logits the model gives by itself."""
    head = fastattr.wrap(held.hf_model, held.processor).head
    logits, states = logits_and_states(held.hf_model)
    size = logits.abs().max().item()
    ours = class_activations(states, head, torch.arange(len(head.weight))).T.float()
    torch.testing.assert_close(ours, logits.float().relu(), rtol=0, atol=tolerance * size)

    ids = logits[:, : head.vocab].argmin(dim=1)  # negative ones too, which class activations cut off
    expected = logits[:, : head.vocab].double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    found = log_prob_of(states, head, ids).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * tolerance * size)
    return head


class BrokenQwen(transformers.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Raises what `mistake` raises."""

    mistake: Callable[[], Any]

    @functools.wraps(transformers.Qwen2VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.mistake()


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda: torch.zeros(1).image_outputs, "AttributeError: 'Tensor' object has no attribute 'image_outputs'"),
        (lambda: {}["image"], "KeyError: 'image'"),
        (lambda: nowhere, "NameError: name 'nowhere' is not defined"),  # type: ignore[name-defined]  # noqa: F821
        (lambda: len(), "TypeError: len\\(\\) takes exactly one argument"),  # type: ignore[call-arg]
    ],
)
def test_a_class_whose_forward_fails_is_refused_with_its_release(mistake: Callable[[], Any], told: str) -> None:
    held = tiny.qwen2_vl()
    held.hf_model.__class__ = BrokenQwen
    held.hf_model.mistake = mistake
    expected = f"BrokenQwen does not run with transformers {transformers.__version__}.* {told}.*another release"
    with pytest.raises(fastattr.UnsupportedModelError, match=expected):
        fastattr.wrap(held.hf_model, held.processor)


def test_running_out_of_memory_is_not_a_failure_of_the_class() -> None:
    def short() -> None:
        raise torch.OutOfMemoryError("not enough")

    held = tiny.qwen2_vl()
    held.hf_model.__class__ = BrokenQwen
    held.hf_model.mistake = short
    with pytest.raises(torch.OutOfMemoryError, match="not enough"):
        fastattr.wrap(held.hf_model, held.processor)


# --- scaled and capped ------------------------------------------------------------------------------------------------


class ShapedQwen(transformers.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Does to its logits what `shape` says, as Cohere (scale), Granite (division) and Gemma (soft-cap) do."""

    shape: Callable[[Tensor], Tensor]

    @functools.wraps(transformers.Qwen2VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.shape(output.logits)
        return output


def shaped(shape: Callable[[Tensor], Tensor], **text_config: float) -> Tiny:
    held = tiny.qwen2_vl()
    for name, value in text_config.items():
        setattr(held.hf_model.config.get_text_config(), name, value)
    held.hf_model.__class__ = ShapedQwen
    held.hf_model.shape = shape
    return held


def cap(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.tanh(logits / value) * value


@pytest.mark.parametrize(
    ("shape", "text_config", "scale", "softcap"),
    [
        (lambda x: x * 0.25, {"logit_scale": 0.25}, 0.25, None),
        (lambda x: x / 8.0, {"logits_scaling": 8.0}, 0.125, None),
        (lambda x: x * 3.0, {"lm_head_multiplier": 3.0}, 3.0, None),
        (cap(1.5), {"final_logit_softcapping": 1.5}, 1.0, 1.5),
        (lambda x: cap(2.0)(x * 3.0), {"final_logit_softcapping": 2.0, "logit_scale": 3.0}, 3.0, 2.0),
        (cap(1.5), {"final_logit_softcapping": 1.5, "logit_scale": 3.0}, 1.0, 1.5),
        (lambda x: x * 3.0, {"final_logit_softcapping": 1.5, "logit_scale": 3.0}, 3.0, None),
        (lambda x: x, {"final_logit_softcapping": 1.5, "logit_scale": 3.0}, 1.0, None),
    ],
    ids=["scale", "division", "multiplier", "cap", "scale and cap", "scale ignored", "cap ignored", "both ignored"],
)
def test_what_the_class_does_with_its_configuration(
    shape: Callable[[Tensor], Tensor], text_config: dict[str, float], scale: float, softcap: float | None
) -> None:
    head = check_head(shaped(shape, **text_config))
    assert (head.logit_scale, head.softcap) == (scale, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("applied", [True, False])
def test_a_mild_soft_cap_is_told_from_none_in_half_precision(dtype: torch.dtype, applied: bool) -> None:
    """A cap far above the logits changes them by little more than rounding does."""
    held = shaped(cap(30.0) if applied else lambda x: x, final_logit_softcapping=30.0)
    held.hf_model.to(dtype)
    assert check_head(held, tolerance=2e-2).softcap == (30.0 if applied else None)


@pytest.mark.parametrize("kind", list(tiny.TINY))
def test_every_family(kind: str) -> None:
    head = check_head(tiny.TINY[kind]())
    assert (head.logit_scale, head.softcap, head.bias) == (1.0, None, None)


def test_a_bias_a_scale_and_a_cap_together() -> None:
    held = shaped(lambda x: cap(3.0)(x * 2.0), final_logit_softcapping=3.0, logit_scale=2.0)
    torch.manual_seed(1)
    held.hf_model.lm_head = nn.Linear(tiny.DIM, VOCAB)
    assert check_head(held).bias is not None


# --- matrices in another form -------------------------------------------------------------------------------------


class Int8Buffers(nn.Module):
    """One byte a weight and a step for each id, all buffers and no parameter, as GPTQ and AWQ layers hold them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        steps = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", (weight / steps).round().to(torch.int8))
        self.register_buffer("steps", steps)
        self.register_buffer("bias", bias)
        self.rows: list[int] = []

    def matrix(self) -> Tensor:
        return self.codes.to(self.steps.dtype) * self.steps

    def forward(self, states: Tensor) -> Tensor:
        self.rows.append(states.shape[0] if states.ndim == 2 else 0)
        return nn.functional.linear(states, self.matrix().to(states.dtype), self.bias)


class FourBits(nn.Module):
    """Two weights a byte in a parameter of bytes, as bitsandbytes holds them, and a step for each 16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        groups = weight.unflatten(1, (-1, 16))
        self.steps = nn.Parameter(groups.abs().amax(dim=2, keepdim=True) / 7, requires_grad=False)
        codes = ((groups / self.steps).round() + 8).to(torch.uint8).flatten(1)
        self.packed = nn.Parameter(codes[:, ::2] * 16 + codes[:, 1::2], requires_grad=False)
        self._parameters = dict(reversed(self._parameters.items()))  # the bytes first

    def matrix(self) -> Tensor:
        codes = torch.stack([self.packed // 16, self.packed % 16], dim=2).flatten(1).unflatten(1, (-1, 16))
        return ((codes.float() - 8) * self.steps).flatten(1)

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.matrix().to(states.dtype))


class CodedTensor(Tensor):
    """A weight that only `linear` knows how to use, inside a plain `nn.Linear`, as torchao leaves it."""

    codes: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            states, weight, *rest = args
            return nn.functional.linear(states, weight.codes.to(states.dtype) * 0.01, *rest)
        if func in (torch.aminmax, Tensor.__getitem__, torch.matmul):
            raise NotImplementedError(f"{func} of a coded tensor")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.detach:
            result.codes = args[0].codes
        return result


def coded(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    held = torch.zeros_like(weight).as_subclass(CodedTensor)
    held.codes = (weight * 100).round().to(torch.int8)
    linear.weight = nn.Parameter(held, requires_grad=False)
    assert type(linear.weight) is CodedTensor
    return linear


def test_bytes_in_buffers() -> None:
    held = tiny.qwen2_vl()
    quantised = Int8Buffers(held.hf_model.lm_head.weight.detach())
    held.hf_model.lm_head = quantised
    head = check_head(held)
    torch.testing.assert_close(head.weight, quantised.matrix(), rtol=0, atol=1e-7)
    assert head.bias is None


def test_bytes_in_buffers_and_a_bias_in_half_precision() -> None:
    held = tiny.qwen2_vl()
    held.hf_model.to(torch.bfloat16)
    torch.manual_seed(1)
    held.hf_model.lm_head = Int8Buffers(held.hf_model.lm_head.weight.detach(), torch.randn(VOCAB, dtype=torch.bfloat16))
    head = check_head(held, tolerance=2e-2)
    assert head.weight.dtype == torch.bfloat16 and head.bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_in_a_parameter_of_bytes(dtype: torch.dtype) -> None:
    held = tiny.qwen2_vl()
    quantised = FourBits(held.hf_model.lm_head.weight.detach())
    held.hf_model.to(dtype)
    held.hf_model.lm_head = quantised
    assert next(quantised.parameters()).dtype == torch.uint8
    head = check_head(held, tolerance=1e-5 if dtype == torch.float32 else 2e-2)
    assert head.weight.dtype == dtype  # what the model computes in, not what holds the bytes
    torch.testing.assert_close(head.weight, quantised.matrix().to(dtype), rtol=0, atol=0)


def test_a_plain_layer_with_another_kind_of_tensor() -> None:
    held = tiny.qwen2_vl()
    weight = held.hf_model.lm_head.weight.detach().clone()
    held.hf_model.lm_head = coded(weight)
    head = check_head(held)
    assert type(head.weight) is Tensor
    torch.testing.assert_close(head.weight, (weight * 100).round() * 0.01, rtol=0, atol=1e-7)


def test_a_parametrised_weight() -> None:
    held = tiny.qwen2_vl()
    nn.utils.parametrizations.weight_norm(held.hf_model.lm_head)
    check_head(held)


def test_a_matrix_is_read_a_few_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity of a real model would make a second matrix beside the one that is read."""
    held = tiny.qwen2_vl()
    quantised = Int8Buffers(held.hf_model.lm_head.weight.detach())
    held.hf_model.lm_head = quantised
    monkeypatch.setattr(head_module, "COLUMNS_AT_ONCE", 12)  # 32 are no multiple
    head = check_head(held)
    assert [rows for rows in quantised.rows if rows > 1] == [12, 12, 8]
    torch.testing.assert_close(head.weight, quantised.matrix(), rtol=0, atol=1e-7)


# --- heads that do something else ---------------------------------------------------------------------------------


class Around(nn.Module):
    """A linear head with something before or after it."""

    def __init__(self, linear: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.linear, self.before, self.after = linear, before, after

    def forward(self, states: Tensor) -> Tensor:
        return self.after(self.linear(self.before(states)))


class Rounded(nn.Module):
    """Coarse activations, as a head that quantises them on the fly."""

    def forward(self, states: Tensor) -> Tensor:
        return (states * 2).round() / 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (nn.LayerNorm(tiny.DIM), nn.Identity()),
        (nn.Tanh(), nn.Identity()),
        (Rounded(), nn.Identity()),
        (nn.Identity(), nn.LogSoftmax(dim=-1)),
        (nn.Identity(), nn.Softsign()),
    ],
    ids=["norm", "tanh", "rounding", "log-softmax", "softsign"],
)
def test_a_head_that_is_not_linear(before: nn.Module, after: nn.Module) -> None:
    held = tiny.qwen2_vl()
    held.hf_model.lm_head = Around(held.hf_model.lm_head, before, after)
    with pytest.raises(
        fastattr.UnsupportedModelError, match="its head does more than a linear layer with bias, logit sc"
    ):
        fastattr.wrap(held.hf_model, held.processor)


def test_layers_that_stay_linear_together() -> None:
    held = tiny.qwen2_vl()
    torch.manual_seed(1)
    held.hf_model.lm_head = Around(held.hf_model.lm_head, nn.Linear(tiny.DIM, tiny.DIM), nn.Identity())
    assert check_head(held).bias is not None


def test_a_scale_that_the_configuration_does_not_tell() -> None:
    held = shaped(lambda x: x * 0.5)
    with pytest.raises(fastattr.UnsupportedModelError, match="its head does more than a linear layer"):
        fastattr.wrap(held.hf_model, held.processor)


def test_nan_in_a_matrix_of_another_form() -> None:
    held = tiny.qwen2_vl()
    quantised = Int8Buffers(held.hf_model.lm_head.weight.detach())
    quantised.steps[5] = torch.nan
    held.hf_model.lm_head = quantised
    with pytest.raises(fastattr.StatesError, match="holds NaN or Inf"):
        fastattr.wrap(held.hf_model, held.processor)


def test_maps_of_a_quantised_head_are_those_of_its_matrix() -> None:
    """The oracle is a model whose plain head holds what the quantised one stands for."""
    held, plain = tiny.qwen2_vl(), tiny.qwen2_vl()
    quantised = FourBits(held.hf_model.lm_head.weight.detach())
    plain.hf_model.lm_head.weight.data = quantised.matrix()
    held.hf_model.lm_head = quantised
    ours, expected = (
        fastattr.attribute(fastattr.wrap(each.hf_model, each.processor), picture(), PROMPT, ANSWER, scales=(1.0,))
        for each in (held, plain)
    )
    torch.testing.assert_close(ours.image[0], expected.image[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
