"""A model's own answer: one call of its `generate`, returned as a whole or token by token."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattr.adapters.encode import EncodedExample, check_response
from fastattr.adapters.ending import EndTokens, end_tokens, setting
from fastattr.adapters.hooks import OwnPositions, uncaptured, undisturbed
from fastattr.adapters.model import Model
from fastattr.adapters.states import named_failures
from fastattr.errors import FastattrError, InputError

_INPUTS = "it is made from the image and the prompt"
_LENGTH = "pass max_new_tokens= beside generate_options"
_CACHE = "every answer begins with an empty one; cache_implementation= chooses its kind"
SET_HERE = {
    "inputs": _INPUTS,
    "input_ids": _INPUTS,
    "inputs_embeds": _INPUTS,
    "attention_mask": _INPUTS,
    "position_ids": _INPUTS,
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "cache": _CACHE,
    "past_key_values": _CACHE,
    "num_return_sequences": "one answer is explained",
    "streamer": "iterate over fastattr.stream, or stream your own generate with fastattr.TokenStream",
}
_USER_CODE = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "custom_generate")
# options without effect unless the model samples, or searches with beams
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping")


@dataclass(frozen=True, eq=False)
class GenerateCall:
    """A call of a model's `generate`.

    Attributes:
        arguments: all of them except the streamer.
        end: the tokens that end its answer.
        streams: whether tokens can be streamed from a thread as they are chosen. Not with beams, which are chosen at the
            end; a static cache, which may use CUDA graphs that belong to one thread; `max_time`, which would include the
            time between tokens; or a `custom_generate`, of which nothing is known.
    """

    arguments: Mapping[str, Any]
    end: EndTokens
    streams: bool


def generate_call(
    model: Model, encoded: EncodedExample, *, max_new_tokens: int, options: Mapping[str, Any] | None = None
) -> GenerateCall:
    """The arguments for `generate`: the model's own `generation_config`, greedy unless the options set `do_sample=True`.

    Args:
        options: further arguments of `generate`; they take precedence over the `generation_config`.

    Raises:
        InputError: an option is one that fastattr sets itself, is not supported, or has no effect.
    """
    given = _checked(model, encoded, {} if options is None else options, max_new_tokens)

    def chosen(name: str) -> Any:
        return setting(model, given, name)

    n_prompt = len(encoded.input_ids)
    # never generated: padding rows of the output embeddings and image placeholders
    never = {*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))}
    arguments = {
        **encoded.model_inputs,
        "input_ids": encoded.input_ids[None],
        "attention_mask": torch.ones_like(encoded.input_ids)[None],
        **given,
        "do_sample": bool(given.get("do_sample")),
        "suppress_tokens": sorted(never.union(chosen("suppress_tokens") or ())),
    }
    if given.get("custom_generate") is not None:
        arguments["max_new_tokens"] = max_new_tokens
    else:
        # not max_new_tokens, of which transformers warns where the generation_config holds a max_length
        arguments |= {"max_length": n_prompt + max_new_tokens, "max_new_tokens": None}
        if given.get("logits_processor"):
            arguments["logits_processor"] = [*given["logits_processor"], _Witness()]
    if (chosen("num_return_sequences") or 1) > 1:
        arguments["num_return_sequences"] = 1
    for name, most in (("min_new_tokens", max_new_tokens), ("min_length", n_prompt + max_new_tokens)):
        if (chosen(name) or 0) > most:  # from the generation_config
            arguments[name] = most
    if chosen("stop_strings") is not None or "assistant_tokenizer" in given:
        arguments.setdefault("tokenizer", model.processor.tokenizer)
    streams = (
        (chosen("num_beams") or 1) == 1
        and "static" not in (chosen("cache_implementation") or "")
        and chosen("max_time") is None
        and given.get("custom_generate") is None
    )
    return GenerateCall(arguments, end_tokens(model, given), streams)


def generate(
    model: Model, encoded: EncodedExample, *, max_new_tokens: int, options: Mapping[str, Any] | None = None
) -> Tensor:
    """The model's answer without trailing end tokens, int `[target]`. Arguments as for `generate_call`.

    Raises:
        InputError: the answer is empty or holds an image placeholder, or the model does not accept an option.
        StatesError: `generate` fails.
    """
    call = generate_call(model, encoded, max_new_tokens=max_new_tokens, options=options)
    said = list(call.end.cut(_answer(model, encoded, call.arguments)))
    if not said:
        raise InputError(
            f"{model.name} answers nothing to this prompt, so there is nothing to explain; pass a response"
        )
    ids = torch.tensor(said, device=model.device)
    check_response(model, ids)
    return ids


def generate_steps(
    model: Model, encoded: EncodedExample, *, max_new_tokens: int, options: Mapping[str, Any] | None = None
) -> Generator[int, None, None]:
    """The ids of `generate`, one by one as they are chosen.

    `generate` runs in a thread of its own, but only while the caller waits for the next id. The thread ends when this
    iterator is exhausted, closed or garbage-collected. Exceptions of `generate` are raised here. Where tokens cannot be
    streamed (see `GenerateCall.streams`), `generate` runs in the caller's thread when the first id is asked for.
    """
    call = generate_call(model, encoded, max_new_tokens=max_new_tokens, options=options)
    if not call.streams:
        return call.end.cut(_later(lambda: _answer(model, encoded, call.arguments)))
    turns = _Turns(OwnPositions(model.hf_model))
    steps = _in_turns(model, encoded, call.arguments, turns)
    weakref.finalize(steps, turns.stop)  # also at interpreter exit, which would otherwise wait for the thread
    return call.end.cut(steps)


def _checked(model: Model, encoded: EncodedExample, options: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The options as arguments of `generate`, including those of a given `generation_config`. Raises `InputError`."""
    from transformers import GenerationConfig

    if not isinstance(options, Mapping):
        raise InputError(
            f"generate_options is a {type(options).__name__}, expected a mapping of names and values that generate takes"
        )
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config is a {type(config).__name__}, expected transformers.GenerationConfig")
    given = {**_differing(model, config), **options}
    given.pop("generation_config", None)  # transformers does not accept both
    for name in given:
        reason = SET_HERE.get(name) or (_INPUTS if name in encoded.model_inputs else None)
        if reason is not None:
            raise InputError(f"generate_options holds {name!r}, which fastattr sets itself: {reason}")
    if given.get("cache_implementation") == "paged":
        raise InputError("cache_implementation='paged' batches continuously and reads no images; choose another cache")
    if setting(model, given, "token_healing"):
        raise InputError("token_healing changes the end of the prompt, which is explained as it is; turn it off")
    for names, needed, missing in (
        (_SAMPLING, "do_sample=True", not given.get("do_sample")),
        (_BEAMS, "num_beams=2 or more", (setting(model, given, "num_beams") or 1) == 1),
    ):
        idle = [name for name in names if missing and given.get(name) is not None]
        if idle:
            raise InputError(
                f"generate_options holds {', '.join(idle)}, which has no effect without {needed}; add that, or leave it out"
            )
    least = given.get("min_new_tokens")
    if least is not None and least > max_new_tokens:
        raise InputError(
            f"generate_options holds min_new_tokens={least}, expected at most max_new_tokens={max_new_tokens}"
        )
    return given


def _differing(model: Model, config: Any) -> dict[str, Any]:
    """The values of a `generation_config` that differ from the model's own."""
    own = getattr(model.hf_model, "generation_config", None)
    return {
        name: value
        for name, value in ({} if config is None else vars(config)).items()
        if value is not None
        and not name.startswith("_")
        and name != "transformers_version"
        and value != getattr(own, name, None)
    }


class _Witness:
    """A logits processor that changes nothing and records that it was called: Janus's `generate` ignores them."""

    was_called = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.was_called = True
        return scores


def _later(answer: Callable[[], Iterable[int]]) -> Iterator[int]:
    """Iterate over what `answer` returns; it is called when the first item is asked for."""
    yield from answer()


@torch.no_grad()
def _answer(model: Model, encoded: EncodedExample, arguments: Mapping[str, Any]) -> list[int]:
    """The ids that `generate` returns after the prompt. Raises as `_call`."""
    with uncaptured(), undisturbed(model.states):
        return _call(model, encoded, arguments)


def _call(model: Model, encoded: EncodedExample, arguments: Mapping[str, Any]) -> list[int]:
    """Call `generate`, and return the ids after the prompt.

    Raises:
        InputError: it does not accept or ignores an argument, or does not return one sequence that begins with the prompt.
        StatesError: it fails. With code of the user among the arguments the failure is raised as it is, since it may be
            the user's own.
    """
    inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    has_user_code = any(arguments.get(name) is not None for name in _USER_CODE)
    with nullcontext() if has_user_code else named_failures(model, inputs):
        try:
            out = model.hf_model.generate(**arguments)
        except FastattrError:
            raise
        except ValueError as error:
            raise InputError(f"{model.name} cannot generate an answer: {error}") from error
    if any(isinstance(each, _Witness) and not each.was_called for each in arguments.get("logits_processor") or ()):
        raise InputError(
            f"generate of {type(model.hf_model).__name__} does not use logits_processor; leave it out of generate_options"
        )
    sequences = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
    prompt = encoded.input_ids
    n = len(prompt)
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or len(sequences) != 1:
        found = list(sequences.shape) if isinstance(sequences, Tensor) else type(out).__name__
        raise InputError(f"generate of {model.name} returned {found}, expected one sequence [1 seq]; pass a response")
    if not torch.equal(sequences[0, :n].to(prompt.device), prompt):
        raise InputError(
            f"generate of {model.name} returned {sequences.shape[1]} tokens that do not begin with the {n} of the prompt; "
            "pass a response"
        )
    said: list[int] = sequences[0, n:].tolist()
    return said


# --- generate in a thread, one token at a time ----------------------------------------------------------------


class _Stopped(BaseException):
    """Ends `generate` when no more tokens are wanted. Not an Exception, so that no error handler catches it."""


class _Turns:
    """A streamer that pauses `generate`, in a thread of its own, until the next token is asked for.

    Attributes:
        positions: the positions the model keeps for this sequence, removed from it while `generate` is paused.
    """

    def __init__(self, positions: OwnPositions) -> None:
        self.positions = positions
        self._asked = threading.Semaphore(0)
        self._given: queue.SimpleQueue[tuple[list[int], bool] | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._is_prompt = True

    # --- in the thread of `generate` ---

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first with the prompt, which is skipped, then with new ids (several in assisted decoding)."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.positions.__exit__()
        self._given.put((value.flatten().tolist(), False))
        self._asked.acquire()
        self.positions.__enter__()
        if self._is_stopped:
            raise _Stopped

    def end(self) -> None:
        """Called by `generate` at the end. Nothing to do: its return value marks the end."""

    def _run(self, answer: Callable[[], list[int]]) -> None:
        try:
            self._given.put((answer(), True))
        except BaseException as error:  # raised again by `take`
            self._given.put(error)

    # --- in the thread that asks for tokens ---

    def start(self, answer: Callable[[], list[int]]) -> None:
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._run, answer), name="fastattr-generate", daemon=True
        )
        self._thread.start()

    def take(self) -> tuple[list[int], bool]:
        """New ids and False, or the whole answer and True. Raises what `generate` raised."""
        found = self._given.get()
        if isinstance(found, BaseException):
            try:
                raise found
            finally:
                del found  # its traceback holds this frame
        return found

    def resume(self) -> None:
        self._asked.release()

    def stop(self) -> None:
        """End the thread and wait until it has ended."""
        self._is_stopped = True
        self._asked.release()
        if self._thread is not None:
            self._thread.join()


def _in_turns(model: Model, encoded: EncodedExample, arguments: Mapping[str, Any], turns: _Turns) -> Iterator[int]:
    """Ids as `generate` streams them, then those it returned without streaming.

    Raises:
        InputError: it returned other ids than it streamed, or see `_call`.
    """
    surroundings = _surroundings(model)

    @torch.no_grad()
    def answer() -> list[int]:
        with ExitStack() as stack:
            for each in (*surroundings, uncaptured(), turns.positions):
                stack.enter_context(each)
            return _call(model, encoded, {**arguments, "streamer": turns})

    streamed: list[int] = []
    turns.start(answer)
    try:
        found, is_whole = turns.take()
        while not is_whole:
            streamed += found
            yield from found
            turns.resume()
            found, is_whole = turns.take()
    finally:
        turns.stop()
    if found[: len(streamed)] != streamed:
        raise InputError(f"generate of {model.name} streamed the ids {streamed} and returned {found}; pass a response")
    yield from found[len(streamed) :]


def _surroundings(model: Model) -> list[AbstractContextManager[Any]]:
    """This thread's PyTorch modes, devices and streams as contexts for another thread. The default dtype is per process."""
    found: list[AbstractContextManager[Any]] = []
    if torch.is_inference_mode_enabled():
        found.append(torch.inference_mode())
    for kind in sorted({"cpu", model.device.type}):
        if torch.is_autocast_enabled(kind):
            cached = torch.is_autocast_cache_enabled()
            found.append(torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=cached))
    if torch.get_default_device() != torch.device("cpu"):
        found.append(torch.get_default_device())
    if model.device.type == "cuda":
        devices = {each.device for each in model.hf_model.parameters() if each.is_cuda}
        found += [torch.cuda.stream(torch.cuda.current_stream(each)) for each in devices]
        found.append(torch.cuda.device(torch.cuda.current_device()))
    return found
