"""Hidden states that serving engines write for a request, read for `attribute_states`.

Experimental: neither engine promises its layout. Nothing here imports them.

    exported = read_vllm(path, [*output.prompt_token_ids, *output.outputs[0].token_ids], norm=final_norm)
    why = fastattr.attribute_states(exported.hidden_states, head, exported.input_ids, layout)

An engine leaves out what it did not compute (prefix caching) or did not keep (chunked prefill, the answer), and a map of
shifted states looks like a map. So every state must have its token, and every token its state. Whether the states are
those of the last layer cannot be seen in them: compare `why.log_prob` with the log-probabilities of the engine once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastattr.errors import InputError, StatesError

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportedStates:
    """What an engine computed for one request.

    Attributes:
        hidden_states: `[seq - 1 dim]`, last layer through the final norm.
        input_ids: int64 `[seq]`, prompt then response, on the same device.
    """

    hidden_states: Tensor
    input_ids: Tensor


def read_vllm(
    path: str | Path, input_ids: Sequence[int] | Tensor, *, norm: Norm, layer_index: int | None = None
) -> ExportedStates:
    """Read the safetensors file of vLLM's `ExampleHiddenStatesConnector` (`method="extract_hidden_states"`).

    Start the engine with the number of layers as the one id in `eagle_aux_hidden_state_layer_ids` (what the last layer
    gives), without prefix caching and chunked prefill, and ask with
    `kv_transfer_params={"include_output_tokens": True}`; or send prompt and response together as a prompt, with
    `max_tokens=1`. The file is complete when its `.lock` is free.

    Args:
        path: `kv_transfer_params["hidden_states_path"]` of the output.
        input_ids: int `[seq]`, prompt and response as the engine numbers them, image placeholders expanded
            (`prompt_token_ids` and `token_ids` of its output).
        norm: the final norm, which the file is before: the module of the model, or a function such as
            `functools.partial(torch.nn.functional.rms_norm, normalized_shape=(dim,), weight=weight, eps=1e-6)`.
        layer_index: which of the saved layers is the last of the model, where several were saved.

    Raises:
        StatesError: the file is no such file, leaves tokens out, is of other tokens, or holds NaN, Inf or rows never written.
        InputError: `input_ids` are no sequence of ids, or several layers were saved and none is named.
    """
    ids = _sequence("input_ids", input_ids, at_least=2)
    try:
        held = load_file(path)
        states, tokens = held["hidden_states"], held["token_ids"]
    except (SafetensorError, OSError) as error:
        raise StatesError(
            f"{str(path)!r} cannot be read: {error}; expected the safetensors file of vLLM's hidden states connector, "
            "complete (its .lock is free)"
        ) from error
    except KeyError as missing:
        raise StatesError(
            f"{str(path)!r} holds {', '.join(held) or 'nothing'} and lacks {missing}: it was not written by vLLM's hidden "
            "states connector"
        ) from missing
    if states.ndim != 3 or not states.is_floating_point() or tokens.ndim != 1:
        raise StatesError(
            f"{str(path)!r} holds hidden_states {states.dtype} {list(states.shape)} and token_ids {list(tokens.shape)}, "
            "expected floating point [seq layer dim] and [seq]"
        )
    n_layers = states.shape[1]
    if layer_index is None and n_layers != 1:
        raise InputError(
            f"{str(path)!r} holds {n_layers} layers; say which of them is the last of the model, layer_index=0 to "
            f"{n_layers - 1}, in the order of eagle_aux_hidden_state_layer_ids"
        )
    if layer_index is not None and not 0 <= layer_index < n_layers:
        raise InputError(f"layer_index is {layer_index}, expected 0 to {n_layers - 1}: so many layers were saved")
    if len(states) != len(tokens):
        raise StatesError(
            f"{str(path)!r} holds {len(states)} states of {len(tokens)} tokens, {_difference(len(states), len(tokens))}: prefix "
            "caching or chunked prefill leaves positions out; turn both off (--no-enable-prefix-caching, "
            "--no-enable-chunked-prefill)"
        )
    needed = ids[:-1]
    shared = min(len(tokens), len(needed))
    _check_tokens(tokens[:shared], needed[:shared], f"{str(path)!r} holds")
    if len(tokens) < len(needed):
        raise StatesError(
            f"{str(path)!r} holds states of the first {len(tokens)} tokens, {len(needed) - len(tokens)} fewer than the "
            f"{len(needed)} that are fed to say {len(ids)}: ask with kv_transfer_params={{'include_output_tokens': True}}"
        )
    return _exported(states[: len(needed), layer_index or 0], ids, norm, repr(str(path)))


def read_sglang(
    response: Mapping[str, Any], input_ids: Sequence[int] | Tensor, *, norm: Norm | None = None
) -> ExportedStates:
    """Read one response of SGLang to a request with `return_hidden_states=True` (`/generate`, or `Engine.generate`).

    Start the engine with `--enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1`. It deals the
    states of a batch out by the full lengths of its prompts, so one request whose prefix was cached shifts those of the
    others, which cannot be seen in their responses.

    Args:
        response: the parsed JSON: `meta_info` with `hidden_states` (the prompt's states, then those of each step),
            `prompt_tokens`, `completion_tokens` and `cached_tokens`, and `output_ids` where the engine gives them.
        input_ids: int `[seq]`, prompt and response, image placeholders expanded as the engine counts them.
        norm: the final norm, where the model hands its states to the logits before it; None where it is applied.

    Raises:
        StatesError: the response is no such response, leaves tokens out, is of other tokens, or holds NaN or Inf.
        InputError: `input_ids` are no sequence of ids.
    """
    ids = _sequence("input_ids", input_ids, at_least=2)
    if not isinstance(response, Mapping):
        raise StatesError(f"the response is a {type(response).__name__}, expected one response of SGLang, a mapping")
    try:
        told = response["meta_info"]
        steps = told["hidden_states"]
        n_prompt, n_said = int(told["prompt_tokens"]), int(told["completion_tokens"])
        cached = int(told.get("cached_tokens") or 0)
    except (KeyError, TypeError, ValueError, OverflowError) as missing:
        raise StatesError(
            f"the response holds {', '.join(map(str, response)) or 'nothing'} and lacks {missing}, expected meta_info with "
            "hidden_states, prompt_tokens and completion_tokens; ask with return_hidden_states=True"
        ) from missing
    if cached:
        raise StatesError(
            f"{cached} of {n_prompt} prompt tokens came from SGLang's prefix cache, so their states are missing and the "
            "others may be another request's; start it with --disable-radix-cache"
        )
    try:
        states = torch.cat(
            [torch.atleast_2d(torch.as_tensor(step, dtype=torch.float32, device="cpu")) for step in steps]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise StatesError(
            f"hidden_states of the response are not rows of one width: {error}; expected the prompt's rows, then one a step"
        ) from error
    fed = n_prompt + n_said - 1  # the last token is said and never fed
    if states.ndim != 2 or len(states) != fed:
        raise StatesError(
            f"the response holds states {list(states.shape)} where {n_prompt} prompt and {n_said} response tokens need "
            f"{fed}, {_difference(len(states), fed)}; the prefix cache, chunked prefill and return_hidden_states='last' leave "
            "positions out (--disable-radix-cache --chunked-prefill-size -1)"
        )
    if not n_prompt < len(ids) <= fed + 1:
        raise StatesError(
            f"input_ids holds {len(ids)} tokens but the response has {n_prompt} of the prompt and {n_said} of the answer; "
            "pass both, with as many image placeholders as the engine counts"
        )
    if "output_ids" in response:
        said = _sequence("output_ids", response["output_ids"], at_least=1)
        said_there = ids[n_prompt:]
        _check_tokens(said[: len(said_there)], said_there, "the response's output_ids hold", n_prompt)
    return _exported(states[: len(ids) - 1], ids, norm, "the response")


# --- what both must hold to -----------------------------------------------------------------------------------


def _sequence(name: str, value: Sequence[int] | Tensor, at_least: int) -> Tensor:
    """int64 `[seq]` on the CPU."""
    try:
        ids = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(value).__name__}, expected whole numbers [seq]: {error}") from error
    if ids.ndim != 1 or len(ids) < at_least or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{name} is {ids.dtype} {list(ids.shape)}, expected {at_least} or more whole numbers [seq]")
    return ids.long().cpu()


def _check_tokens(theirs: Tensor, ours: Tensor, who: str, start: int = 0) -> None:
    if len(theirs) != len(ours):
        raise StatesError(f"{who} {len(theirs)} tokens from position {start}, but input_ids hold {len(ours)} there")
    wrong = (theirs.long() != ours).nonzero().flatten().tolist()
    if wrong:
        first = wrong[0]
        raise StatesError(
            f"{who} id {int(theirs[first])} at position {start + first}, but input_ids hold {int(ours[first])} there "
            f"({len(wrong)} of {len(ours)} differ): they are of another request, or image placeholders are not expanded alike"
        )


def _difference(found: int, expected: int) -> str:
    return f"{abs(found - expected)} {'are missing' if found < expected else 'too many'}"


def _exported(states: Tensor, ids: Tensor, norm: Norm | None, where: str) -> ExportedStates:
    """States `[seq-1 dim]` through the norm, after the last checks."""
    bad = int((~states.isfinite()).any(dim=1).sum())
    if bad:
        raise StatesError(f"{where} holds NaN or Inf in {bad} of {len(states)} states; run the engine in bfloat16")
    empty = int((states == 0).all(dim=1).sum())
    if empty:
        raise StatesError(f"{where} holds {empty} of {len(states)} states that are all zero: they were never written")
    if norm is not None:
        states = _normed(states, norm, where)
    return ExportedStates(states, ids.to(states.device))


@torch.no_grad()
def _normed(states: Tensor, norm: Norm, where: str) -> Tensor:
    weight = next(norm.parameters(), None) if isinstance(norm, nn.Module) else None
    try:
        normed = norm(states if weight is None else states.to(weight.device, weight.dtype))
    except (RuntimeError, ValueError, TypeError) as error:
        raise StatesError(f"the norm does not take states {list(states.shape)} of {where}: {error}") from error
    if not isinstance(normed, Tensor) or normed.shape != states.shape:
        shape = list(normed.shape) if isinstance(normed, Tensor) else type(normed).__name__
        raise StatesError(
            f"the norm turns states {list(states.shape)} of {where} into {shape}, expected the same shape"
        )
    return normed
