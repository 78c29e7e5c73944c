"""States in the layouts of vLLM and SGLang give the maps of `attribute`, or are refused with what is missing."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.exports import ExportedStates, read_sglang, read_vllm
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, picture


@dataclass(frozen=True)
class Request:
    """One request as an engine computes it, by an ordinary forward of transformers.

    Attributes:
        ids: int `[seq]`, of which the first `n_prompt` are the prompt.
        layers: `[seq layer dim]`, what each of the two layers gives, before the final norm.
        normed: `[seq dim]`, what the head consumes.
    """

    model: fastattr.Model
    layout: fastattr.TokenLayout
    ids: Tensor
    n_prompt: int
    layers: Tensor
    normed: Tensor

    @property
    def norm(self) -> nn.Module:
        return self.model.hf_model.model.language_model.norm


@pytest.fixture(scope="module")
def request_() -> Request:
    held = tiny.qwen2_vl()
    norm = held.hf_model.model.language_model.norm
    norm.weight.data = torch.rand(tiny.DIM) + 0.5  # or leaving it out would show in the scale alone
    model = fastattr.wrap(held.hf_model, held.processor)
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    said = torch.tensor(held.processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    ids = torch.cat([encoded.input_ids, said])
    outputs: list[Tensor] = []
    layers = held.hf_model.model.language_model.layers
    handles = [layer.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for layer in layers]
    inputs = dict(encoded.model_inputs)
    inputs.update({n: nn.functional.pad(v, (0, len(said))) for n, v in inputs.items() if n.endswith("token_type_ids")})
    with torch.no_grad():
        out = held.hf_model(input_ids=ids[None], **inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return Request(
        model,
        encoded.layout(len(said)),
        ids,
        len(encoded.input_ids),
        torch.stack([output[0] for output in outputs], dim=1),
        out.hidden_states[-1][0],
    )


def check_maps(request: Request, exported: ExportedStates) -> fastattr.Attribution:
    """Compare with `attribute` of the same response; returns it."""
    said = exported.input_ids[request.n_prompt :]
    expected = fastattr.attribute(request.model, picture(), PROMPT, said, scales=(1.0,), evidence=False)
    start = request.n_prompt
    layout = fastattr.TokenLayout(request.layout.images, request.layout.prompt, (start, start + len(said)))
    assert exported.hidden_states.shape == (len(exported.input_ids) - 1, tiny.DIM)
    ours = fastattr.attribute_states(
        exported.hidden_states, request.model.head, exported.input_ids, layout, method="arc@1"
    )
    assert ours.token_ids == expected.token_ids
    for one, other in zip(
        (*ours.image, ours.context, ours.log_prob), (*expected.image, expected.context, expected.log_prob), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return ours


# --- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_file(directory: Path, states: Tensor, tokens: Tensor) -> Path:
    path = directory / "request-0.safetensors"
    save_file({"hidden_states": states.contiguous(), "token_ids": tokens.contiguous()}, path)
    return path


@pytest.mark.parametrize("fed", [-1, None], ids=["include_output_tokens", "prompt and response sent as a prompt"])
def test_vllms_last_layer(request_: Request, tmp_path: Path, fed: int | None) -> None:
    path = vllm_file(tmp_path, request_.layers[:fed, -1:], request_.ids[:fed])
    check_maps(request_, read_vllm(path, request_.ids, norm=request_.norm))
    check_maps(request_, read_vllm(str(path), request_.ids.tolist(), norm=request_.norm))


def test_a_norm_as_weight_and_epsilon(request_: Request, tmp_path: Path) -> None:
    path = vllm_file(tmp_path, request_.layers[:-1, -1:], request_.ids[:-1])
    norm: Any = request_.norm
    rms_norm = functools.partial(
        nn.functional.rms_norm, normalized_shape=(tiny.DIM,), weight=norm.weight.detach(), eps=norm.variance_epsilon
    )
    exported = read_vllm(path, request_.ids, norm=rms_norm)
    torch.testing.assert_close(exported.hidden_states, request_.normed[:-1], rtol=1e-5, atol=1e-5)
    assert not exported.hidden_states.requires_grad


def test_a_file_in_half_precision(request_: Request, tmp_path: Path) -> None:
    """As engines write them; the norm is computed in its own precision."""
    path = vllm_file(tmp_path, request_.layers[:-1, -1:].bfloat16(), request_.ids[:-1])
    exported = read_vllm(path, request_.ids, norm=request_.norm)
    assert exported.hidden_states.dtype == torch.float32
    torch.testing.assert_close(exported.hidden_states, request_.normed[:-1], rtol=2e-2, atol=2e-2)


def test_of_several_layers_the_last_must_be_named(request_: Request, tmp_path: Path) -> None:
    path = vllm_file(tmp_path, request_.layers[:-1].flip(1), request_.ids[:-1])  # in the order they were asked for
    with pytest.raises(
        fastattr.InputError, match=r"holds 2 layers; say which .* layer_index=0 to 1, in the order of ea"
    ):
        read_vllm(path, request_.ids, norm=request_.norm)
    check_maps(request_, read_vllm(path, request_.ids, norm=request_.norm, layer_index=0))
    first = read_vllm(path, request_.ids, norm=request_.norm, layer_index=1)
    assert not torch.allclose(first.hidden_states, request_.normed[:-1], atol=0.1)
    for index in (2, -1):
        with pytest.raises(fastattr.InputError, match=f"layer_index is {index}, expected 0 to 1"):
            read_vllm(path, request_.ids, norm=request_.norm, layer_index=index)


def test_the_end_token_may_be_left_out(request_: Request, tmp_path: Path) -> None:
    """What was computed beyond the response that is asked about does no harm."""
    path = vllm_file(tmp_path, request_.layers[:-1, -1:], request_.ids[:-1])
    why = check_maps(request_, read_vllm(path, request_.ids[:-2], norm=request_.norm))
    assert len(why) == len(request_.ids) - request_.n_prompt - 2


def test_states_of_the_prompt_alone(request_: Request, tmp_path: Path) -> None:
    """What vLLM writes when it is not asked for more."""
    n = request_.n_prompt
    path = vllm_file(tmp_path, request_.layers[:n, -1:], request_.ids[:n])
    missing = len(request_.ids) - 1 - n
    with pytest.raises(
        fastattr.StatesError, match=f"of the first {n} tokens, {missing} fewer than .*'include_output_tokens': True"
    ):
        read_vllm(path, request_.ids, norm=request_.norm)


def test_a_cached_prefix_left_states_out(request_: Request, tmp_path: Path) -> None:
    path = vllm_file(tmp_path, request_.layers[16:-1, -1:], request_.ids[:-1])
    with pytest.raises(
        fastattr.StatesError, match=r"states of \d+ tokens, 16 are missing: prefix caching .*turn both off"
    ):
        read_vllm(path, request_.ids, norm=request_.norm)


def test_states_of_another_request(request_: Request, tmp_path: Path) -> None:
    path = vllm_file(tmp_path, request_.layers[:-1, -1:], request_.ids[:-1])
    other = request_.ids.clone()
    other[[7, 9]] += 1
    with pytest.raises(
        fastattr.StatesError,
        match=rf"id {int(request_.ids[7])} at position 7, but input_ids hold {int(other[7])} there \(2 of ",
    ):
        read_vllm(path, other, norm=request_.norm)
    placeholder = request_.model.image_token_id
    once = [i for n, i in enumerate(request_.ids.tolist()) if i != placeholder or request_.ids[n - 1] != placeholder]
    with pytest.raises(fastattr.StatesError, match="image placeholders are not expanded alike"):
        read_vllm(path, once, norm=request_.norm)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "NaN or Inf in 2 of"), (torch.inf, "NaN or Inf in 2 of"), (0.0, "holds 2 of .* all zero")],
)
def test_states_that_were_never_computed(request_: Request, tmp_path: Path, value: float, message: str) -> None:
    states = request_.layers[:-1, -1:].clone()
    states[[3, 11]] = value
    path = vllm_file(tmp_path, states, request_.ids[:-1])
    with pytest.raises(fastattr.StatesError, match=message):
        read_vllm(path, request_.ids, norm=request_.norm)


def test_files_of_another_form(request_: Request, tmp_path: Path) -> None:
    states, tokens = request_.layers[:-1, -1:], request_.ids[:-1]
    with pytest.raises(fastattr.StatesError, match=r"missing.safetensors' cannot be read: .*complete"):
        read_vllm(tmp_path / "missing.safetensors", request_.ids, norm=request_.norm)
    path = vllm_file(tmp_path, states, tokens)
    path.write_bytes(path.read_bytes()[:-100])  # the engine is still writing
    with pytest.raises(fastattr.StatesError, match=r"cannot be read: .*complete"):
        read_vllm(path, request_.ids, norm=request_.norm)
    save_file({"hidden_states": states.contiguous()}, path)
    with pytest.raises(fastattr.StatesError, match="holds hidden_states and lacks 'token_ids'"):
        read_vllm(path, request_.ids, norm=request_.norm)
    with pytest.raises(
        fastattr.StatesError, match=r"hidden_states torch.float32 \[\d+, 32\] and .*expected floating poi"
    ):
        read_vllm(vllm_file(tmp_path, states[:, 0], tokens), request_.ids, norm=request_.norm)
    with pytest.raises(fastattr.StatesError, match=r"hidden_states torch.int64"):
        read_vllm(vllm_file(tmp_path, states.long(), tokens), request_.ids, norm=request_.norm)


def test_a_norm_of_another_model(request_: Request, tmp_path: Path) -> None:
    path = vllm_file(tmp_path, request_.layers[:-1, -1:], request_.ids[:-1])
    with pytest.raises(fastattr.StatesError, match=r"the norm does not take states \[\d+, 32\] of "):
        read_vllm(path, request_.ids, norm=nn.RMSNorm(64))
    with pytest.raises(
        fastattr.StatesError, match=r"the norm turns states \[\d+, 32\] of .* into \[\d+\], expected the s"
    ):
        read_vllm(path, request_.ids, norm=lambda states: states.sum(1))


@pytest.mark.parametrize("ids", [[1.5, 2.0], [], [5], "5 6", [[5, 6]]])
def test_ids_that_are_none(request_: Request, tmp_path: Path, ids: Any) -> None:
    path = vllm_file(tmp_path, request_.layers[:-1, -1:], request_.ids[:-1])
    with pytest.raises(fastattr.InputError, match="input_ids is"):
        read_vllm(path, ids, norm=request_.norm)
    with pytest.raises(fastattr.InputError, match="input_ids is"):
        read_sglang(sglang_response(request_), ids)


# --- SGLang -------------------------------------------------------------------------------------------------------


def sglang_response(request: Request, **meta: Any) -> dict[str, Any]:
    """Through JSON, as it comes over HTTP: the prompt's rows at once, then one row for each token that was fed."""
    n = request.n_prompt
    steps = [request.normed[:n].tolist(), *request.normed[n:-1].tolist()]
    response = {
        "text": ANSWER,
        "output_ids": request.ids[n:].tolist(),
        "meta_info": {
            "id": "0",
            "prompt_tokens": n,
            "completion_tokens": len(request.ids) - n,
            "cached_tokens": 0,
            "hidden_states": steps,
            **meta,
        },
    }
    return dict(json.loads(json.dumps(response)))


def test_sglangs_last_layer(request_: Request) -> None:
    check_maps(request_, read_sglang(sglang_response(request_), request_.ids))
    check_maps(request_, read_sglang(sglang_response(request_), request_.ids[:-1].tolist()))
    older = sglang_response(request_)
    del older["output_ids"], older["meta_info"]["cached_tokens"]
    check_maps(request_, read_sglang(older, request_.ids))


def test_sglangs_states_before_the_norm(request_: Request) -> None:
    n, last = request_.n_prompt, request_.layers[:, -1]
    response = sglang_response(request_, hidden_states=[last[:n].tolist(), *last[n:-1].tolist()])
    check_maps(request_, read_sglang(response, request_.ids, norm=request_.norm))
    bare = read_sglang(response, request_.ids)
    assert not torch.allclose(bare.hidden_states, request_.normed[:-1], atol=0.1)


def test_a_prefix_from_sglangs_cache(request_: Request) -> None:
    """Refused also where the number of rows is right: they were dealt out wrongly then."""
    with pytest.raises(
        fastattr.StatesError, match=rf"16 of {request_.n_prompt} prompt tokens came from .*--disable-radix-cache"
    ):
        read_sglang(sglang_response(request_, cached_tokens=16), request_.ids)


@pytest.mark.parametrize(
    ("rows", "difference"),
    [(slice(16, -1), "16 are missing"), (slice(-1, None), r"\d+ are missing"), (slice(None), "1 too m")],
)
def test_rows_that_do_not_fit_the_tokens(request_: Request, rows: slice, difference: str) -> None:
    response = sglang_response(request_, hidden_states=[request_.normed[rows].tolist()])
    with pytest.raises(fastattr.StatesError, match=rf"{difference}.*--disable-radix-cache --chunked-prefill-size -1"):
        read_sglang(response, request_.ids)


def test_an_answer_of_another_request(request_: Request) -> None:
    other = request_.ids.clone()
    other[-1] += 1
    last = len(other) - 1
    with pytest.raises(fastattr.StatesError, match=rf"output_ids hold id \d+ at position {last}, but input_ids hold"):
        read_sglang(sglang_response(request_), other)
    for ids in (request_.ids[: request_.n_prompt], torch.cat([request_.ids, request_.ids[-1:]])):
        with pytest.raises(
            fastattr.StatesError,
            match=rf"input_ids holds {len(ids)} tokens but the response has {request_.n_prompt} of",
        ):
            read_sglang(sglang_response(request_), ids)
    partial = sglang_response(request_)
    partial["output_ids"] = partial["output_ids"][-2:]  # of a stream
    with pytest.raises(fastattr.StatesError, match="output_ids hold 2 tokens from position"):
        read_sglang(partial, request_.ids)


def test_responses_of_another_form(request_: Request) -> None:
    with pytest.raises(fastattr.StatesError, match="the response is a list, expected one response"):
        read_sglang([sglang_response(request_)], request_.ids)  # type: ignore[arg-type]
    with pytest.raises(fastattr.StatesError, match="holds nothing and lacks 'meta_info'"):
        read_sglang({}, request_.ids)
    with pytest.raises(fastattr.StatesError, match=r"the response holds .* and lacks invalid literal for int"):
        read_sglang(sglang_response(request_, prompt_tokens="many"), request_.ids)
    plain = sglang_response(request_)
    del plain["meta_info"]["hidden_states"]
    with pytest.raises(fastattr.StatesError, match=r"lacks 'hidden_states', .* ask with return_hidden_states=True"):
        read_sglang(plain, request_.ids)
    for steps in ([[[0.5, 1.0]], [0.5]], [], None, ["abc"], [[0.5, None]]):
        with pytest.raises(fastattr.StatesError, match="are not rows of one width"):
            read_sglang(sglang_response(request_, hidden_states=steps), request_.ids)


def test_sglangs_nan(request_: Request) -> None:
    response = sglang_response(request_)
    response["meta_info"]["hidden_states"][0][5][0] = float("nan")
    with pytest.raises(fastattr.StatesError, match="the response holds NaN or Inf in 1 of"):
        read_sglang(response, request_.ids)
