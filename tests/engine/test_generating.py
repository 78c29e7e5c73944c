"""Every entry point explains the same answer, that of the model's own `generate`."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from fastattr.types import AttributionConfig
from tests.engine import family_models as tiny
from tests.engine.family_models import PROMPT, picture

LENS = AttributionConfig(method="lens", scales=(1.0,), filter=False, evidence=False)
ONE = {"method": "lens", "scales": (1.0,), "filter": False, "evidence": False}
KINDS: dict[str, Callable[[], tiny.Tiny]] = {
    name: getattr(tiny, name) for name in ("qwen2_vl", "llava_clip", "gemma3", "idefics3")
}
N = 8  # tokens


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> fastattr.Model:
    held = KINDS[kind]()
    if kind == "gemma3":  # it would say one word over and over
        held.hf_model.generation_config.repetition_penalty = 2.0
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture
def qwen() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Warnings of transformers, including those it gives once per process."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler = Keep(logging.WARNING)
    transformers.utils.logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(before)


def prepared(model: fastattr.Model, seed: int = 0) -> dict[str, Tensor]:
    """The arguments that a user would pass to `generate`."""
    encoded = adapters.encode(model, read_visuals(picture(seed=seed)), PROMPT)
    ids = encoded.input_ids[None]
    return {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_hand(model: fastattr.Model, seed: int = 0, **options: Any) -> list[int]:
    """The greedy answer of transformers, without image placeholders and padding rows, cut at its first end token."""
    inputs, config = prepared(model, seed), model.hf_model.generation_config
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    never += options.pop("suppress_tokens", config.suppress_tokens) or []
    if config.stop_strings is not None:
        options["tokenizer"] = model.processor.tokenizer
    out = model.hf_model.generate(
        **inputs, **{"do_sample": False, "max_new_tokens": N, "suppress_tokens": never, **options}
    )
    sequences = out if isinstance(out, Tensor) else out.sequences
    said: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    eos = options.get("eos_token_id", config.eos_token_id)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    first = next((i for i, token_id in enumerate(said) if token_id in ends), len(said))
    return said[:first]


def answers(model: fastattr.Model, options: dict[str, Any] | None = None, seed: int = 0) -> list[list[int]]:
    """The answers of `attribute`, `stream` and the second row of `attribute_batch`."""

    def asked() -> dict[str, Any]:
        torch.manual_seed(0)
        return {"max_new_tokens": N, "generate_options": options}

    whole = fastattr.attribute(model, picture(seed=seed), PROMPT, **asked(), **ONE)
    streaming = fastattr.stream(model, picture(seed=seed), PROMPT, config=LENS, **asked())
    said = [step.token_id for step in streaming]
    assert list(streaming.attribution().token_ids) == said
    rows: list[Any] = [(picture(seed=seed), PROMPT, [30]), (picture(seed=seed), PROMPT, None)]
    batch = fastattr.attribute_batch(model, rows, LENS, **asked())
    assert no_thread()
    return [list(whole.token_ids), said, list(batch[1].token_ids)]


def no_thread() -> bool:
    return not any(each.name == "fastattr-generate" for each in threading.enumerate())


def another(plain: list[int]) -> int:
    """An id that is not in the plain answer."""
    return next(i for i in range(20, 60) if i not in plain)


def late(plain: list[int]) -> int:
    """The id whose first occurrence in the plain answer is the latest."""
    return max(set(plain), key=plain.index)


# --- the model's own configuration ------------------------------------------------------------------------


def sampling(_model: fastattr.Model, _plain: list[int]) -> dict[str, Any]:
    return {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "typical_p": 0.9}


# option -> its values, by the model and its plain answer, and whether they must change the answer
CONFIGS: dict[str, tuple[Callable[[fastattr.Model, list[int]], dict[str, Any]], bool]] = {
    "nothing": (lambda _, plain: {}, False),
    "repetition penalty": (lambda _, plain: {"repetition_penalty": 5.0}, False),
    "n-grams": (lambda _, plain: {"no_repeat_ngram_size": 1}, False),
    "suppressed": (lambda _, plain: {"suppress_tokens": [plain[0]]}, True),
    "suppressed at first": (lambda _, plain: {"begin_suppress_tokens": [plain[0]]}, True),
    "bad words": (lambda _, plain: {"bad_words_ids": [[plain[1]]]}, True),
    "bias": (lambda _, plain: {"sequence_bias": [[[another(plain)], 90.0]]}, True),
    "stop strings": (lambda model, plain: {"stop_strings": model.decode([plain[:3]])}, False),
    "one end": (lambda _, plain: {"eos_token_id": late(plain)}, True),
    "several ends": (lambda _, plain: {"eos_token_id": [another(plain), late(plain)], "pad_token_id": 0}, True),
    "ends too early": (lambda _, plain: {"eos_token_id": plain[0], "min_new_tokens": 3}, True),
    "forced end": (lambda _, plain: {"forced_eos_token_id": another(plain), "eos_token_id": another(plain)}, True),
    "forced last": (lambda _, plain: {"forced_eos_token_id": another(plain)}, True),
    "forced first": (lambda _, plain: {"forced_bos_token_id": another(plain)}, False),
    "decay": (lambda _, plain: {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": another(plain)}, False),
    "output": (lambda _, plain: {"return_dict_in_generate": True, "output_scores": True}, False),
    "short": (lambda _, plain: {"max_length": 5}, False),
    "shorter": (lambda _, plain: {"max_new_tokens": 2}, False),
    "sampling": (sampling, False),
    "beams": (lambda _, plain: {"num_beams": 3}, False),
    "several": (lambda _, plain: {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0}, False),
    "beams that stop": (lambda _, plain: {"num_beams": 2, "early_stopping": True, "eos_token_id": late(plain)}, False),
    "prompt lookup": (lambda _, plain: {"prompt_lookup_num_tokens": 3}, False),
    "static cache": (lambda _, plain: {"cache_implementation": "static"}, False),
    "no cache": (lambda _, plain: {"use_cache": False}, False),
    "prefill in parts": (lambda _, plain: {"prefill_chunk_size": 7}, False),
    "time": (lambda _, plain: {"max_time": 1000.0}, False),
    "renormalised": (lambda _, plain: {"renormalize_logits": True, "remove_invalid_values": True}, False),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_models_configuration_is_followed(model: fastattr.Model, name: str) -> None:
    plain = by_hand(model)
    make, differs = CONFIGS[name]
    for option, value in make(model, plain).items():
        setattr(model.hf_model.generation_config, option, value)
    expected = by_hand(model)
    assert answers(model) == [expected] * 3
    assert not differs or expected != plain


@pytest.mark.parametrize(("name", "value"), [("min_new_tokens", 10 * N), ("min_length", 10_000)])
def test_an_answer_whose_minimum_length_exceeds_its_maximum(model: fastattr.Model, name: str, value: int) -> None:
    """The answer has the maximum length, without a warning of transformers."""
    plain = by_hand(model)
    config = model.hf_model.generation_config
    config.eos_token_id = plain[0]
    expected = by_hand(model, min_new_tokens=N)
    assert len(expected) == N
    setattr(config, name, value)
    assert answers(model) == [expected] * 3


def test_one_answer_of_several(qwen: fastattr.Model) -> None:
    """The configuration asks for three samples; greedy decoding gives one."""
    expected = by_hand(qwen)
    qwen.hf_model.generation_config.do_sample = True
    qwen.hf_model.generation_config.num_return_sequences = 3
    assert answers(qwen) == [expected] * 3


@pytest.mark.parametrize("changed", [{"max_length": 4096}, {"max_length": 5, "max_new_tokens": 100}])
def test_transformers_gives_no_warning(model: fastattr.Model, told: list[str], changed: dict[str, Any]) -> None:
    expected = by_hand(model)
    told.clear()
    for option, value in {**sampling(model, []), **changed}.items():
        setattr(model.hf_model.generation_config, option, value)
    assert answers(model) == [expected] * 3
    assert told == []


def test_the_configuration_may_change_between_calls(qwen: fastattr.Model) -> None:
    plain = by_hand(qwen)
    assert answers(qwen) == [plain] * 3
    qwen.hf_model.generation_config.suppress_tokens = plain[:1]
    changed = by_hand(qwen)
    assert changed != plain and answers(qwen) == [changed] * 3
    qwen.hf_model.generation_config = transformers.GenerationConfig(eos_token_id=late(plain), pad_token_id=0)
    assert answers(qwen) == [plain[: plain.index(late(plain))]] * 3


# --- options of the call ----------------------------------------------------------------------------------


class Rising(transformers.LogitsProcessor):  # type: ignore[misc]
    """A grammar that allows one id at each step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 30 + input_ids.shape[1] % 7] = 0.0
        return forced


class AfterThree(transformers.StoppingCriteria):  # type: ignore[misc]
    def __init__(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.n_prompt + 3)


def a_few(_batch: int, _ids: Tensor) -> list[int]:
    return [30, 31, 32]


def second_best(hf_model: Any, input_ids: Tensor, generation_config: Any, **inputs: Any) -> Tensor:
    """A user's own decoding function, which does not support streamers."""
    names = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "mm_token_type_ids", "token_type_ids")
    shown = {name: value for name, value in inputs.items() if name in names}
    n_prompt = input_ids.shape[1]
    for n in range(generation_config.max_new_tokens):
        longer = {
            name: torch.nn.functional.pad(value, (0, n)) if name.endswith("type_ids") else value
            for name, value in shown.items()
        }
        logits = hf_model(input_ids=input_ids, **longer).logits[:, -1]
        logits[:, generation_config.suppress_tokens] = -torch.inf
        input_ids = torch.cat([input_ids, logits.topk(2).indices[:, 1:]], dim=1)
    assert input_ids.shape[1] == n_prompt + generation_config.max_new_tokens
    return input_ids


OPTIONS: dict[str, tuple[Callable[[fastattr.Model, list[int]], dict[str, Any]], bool]] = {
    "processor": (lambda _, plain: {"logits_processor": transformers.LogitsProcessorList([Rising()])}, True),
    "processors in a list": (lambda _, plain: {"logits_processor": [Rising()]}, True),
    "stopping": (
        lambda model, plain: {"stopping_criteria": [AfterThree(prepared(model)["input_ids"].shape[1])]},
        True,
    ),
    "prefix": (lambda _, plain: {"prefix_allowed_tokens_fn": a_few}, False),
    "own decoding": (lambda _, plain: {"custom_generate": second_best}, True),
    "sampling": (lambda _, plain: {"do_sample": True, "temperature": 3.0, "top_k": 20}, False),
    "beams": (lambda _, plain: {"num_beams": 3, "length_penalty": 0.5}, False),
    "suppressed": (lambda _, plain: {"suppress_tokens": plain[:1]}, True),
    "ends": (lambda _, plain: {"eos_token_id": [late(plain)]}, True),
    "stop strings": (
        lambda model, plain: {"stop_strings": model.decode([plain[:3]]), "tokenizer": model.processor.tokenizer},
        False,
    ),
    "configuration": (
        lambda _, plain: {
            "generation_config": transformers.GenerationConfig(eos_token_id=late(plain), do_sample=False)
        },
        True,
    ),
    "prompt lookup": (lambda _, plain: {"prompt_lookup_num_tokens": 2, "repetition_penalty": 1.5}, False),
    "quiet": (lambda _, plain: {"logits_processor": None, "return_dict_in_generate": True}, False),
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_are_passed_on(model: fastattr.Model, name: str) -> None:
    plain = by_hand(model)
    make, differs = OPTIONS[name]
    options = make(model, plain)
    torch.manual_seed(0)
    plainly = dict(options)
    config = plainly.pop("generation_config", None)
    expected = by_hand(model, **plainly, **({} if config is None else {"eos_token_id": config.eos_token_id}))
    assert answers(model, options) == [expected] * 3
    assert not differs or expected != plain


@pytest.mark.parametrize("agrees", [True, False])
def test_an_assistant(kind: str, model: fastattr.Model, agrees: bool) -> None:
    assistant = KINDS[kind]().hf_model
    if not agrees:
        torch.manual_seed(5)
        assistant.lm_head.weight.data = torch.randn_like(assistant.lm_head.weight)
    assert answers(model, {"assistant_model": assistant}) == [by_hand(model)] * 3


def test_an_option_takes_precedence_over_the_configuration(qwen: fastattr.Model) -> None:
    plain = by_hand(qwen)
    config = qwen.hf_model.generation_config
    config.suppress_tokens, config.eos_token_id = plain[:1], another(plain)
    assert answers(qwen, {"suppress_tokens": None}) == [plain] * 3
    config.suppress_tokens, config.eos_token_id = None, plain[0]
    assert answers(qwen, {"eos_token_id": None}) == [plain] * 3  # then it is an ordinary token


def test_options_that_fastattr_sets_itself_are_refused(qwen: fastattr.Model) -> None:
    ids = prepared(qwen)["input_ids"]
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"input_ids": ids},
            r"holds 'input_ids', which fastattr sets itself: it is made from the image and the prompt",
        ),
        ({"pixel_values": ids}, r"holds 'pixel_values', .*image and the prompt"),
        ({"max_new_tokens": 3}, r"holds 'max_new_tokens', .*pass max_new_tokens= beside generate_options"),
        ({"generation_config": transformers.GenerationConfig(max_length=3)}, r"holds 'max_length'"),
        ({"streamer": None}, r"holds 'streamer', .*iterate over fastattr.stream"),
        ({"num_return_sequences": 2}, r"holds 'num_return_sequences', .*one answer is explained"),
        ({"past_key_values": None}, r"holds 'past_key_values', .*begins with an empty one"),
        ({"temperature": 0.5, "top_k": 3}, r"holds temperature, top_k, which has no effect without do_sample=True"),
        ({"length_penalty": 2.0}, r"holds length_penalty, which has no effect without num_beams=2 or more"),
        ({"min_new_tokens": N + 1}, rf"holds min_new_tokens={N + 1}, expected at most max_new_tokens={N}"),
        ({"cache_implementation": "paged"}, r"batches continuously and reads no images"),
        ({"generation_config": {"do_sample": False}}, r"generation_config is a dict, expected transformers.Gen"),
        ([("do_sample", True)], r"generate_options is a list, expected a mapping"),  # type: ignore[list-item]
        ({"repetition_penaltie": 2.0}, r"cannot generate an answer: .*\['repetition_penaltie'\]"),
        ({"num_beams": 2, "cache_implementation": "no such"}, r"cannot generate an answer: Invalid `cache_impl"),
        ({"token_healing": True}, r"token_healing changes the end of the prompt"),
        (
            {"custom_generate": lambda _, input_ids, **__: input_ids[:, 3:]},
            r"that do not begin with the \d+ of the pro",
        ),
        ({"custom_generate": lambda _, input_ids, **__: input_ids.repeat(2, 1)}, r"returned \[2, \d+\], expected one"),
        ({"custom_generate": lambda *_, **__: "some text"}, r"returned str, expected one sequence"),
    ]
    for options, message in refused:
        asked: dict[str, Any] = {"max_new_tokens": N, "generate_options": options}
        with pytest.raises(fastattr.InputError, match=message):
            fastattr.attribute(qwen, picture(), PROMPT, **asked, **ONE)
        with pytest.raises(fastattr.InputError, match=message):
            next(fastattr.stream(qwen, picture(), PROMPT, config=LENS, **asked))
        with pytest.raises(fastattr.InputError, match=message):
            fastattr.attribute_batch(qwen, [(picture(), PROMPT, None)], LENS, **asked)
    assert no_thread()
    own: dict[str, Any] = {"generate_options": {"num_beams": 2}}
    with pytest.raises(fastattr.InputError, match=r"for the model's own answer, but every response was given"):
        fastattr.attribute(qwen, picture(), PROMPT, [30], **own, **ONE)
    with pytest.raises(fastattr.InputError, match=r"for the model's own answer, but every response was given"):
        fastattr.attribute_batch(qwen, [(picture(), PROMPT, [30])], LENS, **own)
    with pytest.raises(fastattr.InputError, match=r"for the model's own answer, but tokens were given"):
        fastattr.stream(qwen, picture(), PROMPT, [30], config=LENS, **own)


def test_logits_processors_that_generate_ignores_are_an_error(qwen: fastattr.Model) -> None:
    generate = qwen.hf_model.generate
    expected = by_hand(qwen)
    qwen.hf_model.generate = lambda logits_processor=None, **arguments: generate(**arguments)  # as that of Janus
    options: dict[str, Any] = {"max_new_tokens": N, "generate_options": {"logits_processor": [Rising()]}}
    with pytest.raises(fastattr.InputError, match="does not use logits_processor"):
        fastattr.attribute(qwen, picture(), PROMPT, **options, **ONE)
    with pytest.raises(fastattr.InputError, match="does not use logits_processor"):
        list(fastattr.stream(qwen, picture(), PROMPT, config=LENS, **options))
    assert answers(qwen) == [expected] * 3


def test_streamed_ids_must_be_those_that_generate_returns(qwen: fastattr.Model) -> None:
    generate = qwen.hf_model.generate

    def changed(**arguments: Any) -> Tensor:
        out = generate(**arguments).clone()
        out[0, -N] = 30
        return out

    qwen.hf_model.generate = changed
    with pytest.raises(fastattr.InputError, match=r"streamed the ids \[.*\] and returned \[30, "):
        list(fastattr.stream(qwen, picture(), PROMPT, config=LENS, max_new_tokens=N))
    assert no_thread()


class Picture(transformers.LogitsProcessor):  # type: ignore[misc]
    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.image_token_id] = 1e9
        return scores


def test_a_logits_processor_that_forces_the_placeholder(qwen: fastattr.Model) -> None:
    options = {"logits_processor": [Picture(qwen.image_token_id)]}
    with pytest.raises(fastattr.InputError, match=r"holds the image placeholder"):
        fastattr.attribute(qwen, picture(), PROMPT, generate_options=options, **ONE)
    with pytest.raises(fastattr.InputError, match=r"token 0 is the image placeholder"):
        next(fastattr.stream(qwen, picture(), PROMPT, config=LENS, generate_options=options))
    assert no_thread()


def test_an_empty_answer(qwen: fastattr.Model) -> None:
    qwen.hf_model.generation_config.eos_token_id = by_hand(qwen)[0]
    with pytest.raises(fastattr.InputError, match="answers nothing to this prompt"):
        fastattr.attribute(qwen, picture(), PROMPT, **ONE)
    assert list(fastattr.stream(qwen, picture(), PROMPT, config=LENS)) == []


# --- the thread -------------------------------------------------------------------------------------------


def parked(model: fastattr.Model, **options: Any) -> fastattr.streaming.Stream:
    """A stream that has given two tokens and waits."""
    streaming = fastattr.stream(model, picture(), PROMPT, config=LENS, max_new_tokens=N, **options)
    assert next(streaming).index == 0 and next(streaming).index == 1
    assert not no_thread()
    return streaming


def n_hooks(model: fastattr.Model) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.hf_model.modules())


def test_a_stream_that_is_left_ends_its_thread(model: fastattr.Model) -> None:
    expected, hooks, held = by_hand(model), n_hooks(model), set(vars(model.hf_model))

    def left() -> None:
        for step in fastattr.stream(model, picture(), PROMPT, config=LENS):
            if step.index == 1:
                break

    left()  # the last reference is gone
    assert no_thread()

    streaming = parked(model)
    streaming.close()
    assert no_thread()
    assert list(streaming) == []
    assert list(streaming.attribution().token_ids) == expected[:2]
    streaming.close()

    streaming = parked(model)
    circle: list[Any] = [streaming]
    circle.append(circle)
    del streaming, circle
    gc.collect()
    assert no_thread()

    with pytest.raises(RuntimeError, match="of the loop"):
        for _step in fastattr.stream(model, picture(), PROMPT, config=LENS):
            raise RuntimeError("of the loop")
    gc.collect()  # the traceback held it
    assert no_thread()

    unasked = fastattr.stream(model, picture(), PROMPT, config=LENS)
    unasked.close()
    assert list(unasked) == [] and no_thread()
    assert n_hooks(model) == hooks and set(vars(model.hf_model)) == held
    assert answers(model) == [expected] * 3


class Failing(transformers.LogitsProcessor):  # type: ignore[misc]
    """At the third token."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


@pytest.mark.parametrize(
    "error", [RuntimeError("of the user"), KeyboardInterrupt("of the user"), MemoryError("of the user")]
)
def test_an_error_of_generate_is_raised_where_the_token_is_waited_for(
    qwen: fastattr.Model, error: BaseException
) -> None:
    streaming = parked(qwen, generate_options={"logits_processor": [Failing(error)]})
    with pytest.raises(type(error), match="of the user"):
        next(streaming)
    assert no_thread()
    assert list(streaming.attribution().token_ids) == by_hand(qwen)[:2]
    assert list(streaming) == []


def test_the_two_threads_never_run_at_once(qwen: fastattr.Model) -> None:
    """Forwards of `generate` happen only while the caller waits for a token."""
    waiting = threading.Event()
    seen: list[bool] = []

    def look(*_: Any) -> None:
        here = threading.current_thread().name == "fastattr-generate"
        if here:
            seen.append(waiting.is_set())

    handle = qwen.hf_model.register_forward_pre_hook(look)
    streaming = fastattr.stream(qwen, picture(), PROMPT, config=LENS, max_new_tokens=N)
    for index in range(N):
        assert len(seen) == index  # one token ahead of nobody
        waiting.set()
        assert next(streaming).index == index
        waiting.clear()
    assert list(streaming) == [] and seen == [True] * N
    handle.remove()


def test_thread_local_modes_apply_in_the_thread_of_generate(qwen: fastattr.Model) -> None:
    mark: ContextVar[str] = ContextVar("mark", default="lost")
    seen: list[tuple[Any, ...]] = []

    class Look(transformers.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(
                (
                    mark.get(),
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                    torch.is_autocast_enabled("cpu"),
                    torch.get_autocast_dtype("cpu"),
                    torch.get_default_dtype(),
                    torch.get_default_device(),
                )
            )
            return scores

    encoded = adapters.encode(qwen, read_visuals(picture()), PROMPT)
    options: dict[str, Any] = {"max_new_tokens": 3, "options": {"logits_processor": [Look()]}}

    def both() -> None:
        seen.clear()
        whole = adapters.generate(qwen, encoded, **options).tolist()
        there, grad = [*seen], torch.is_grad_enabled()
        seen.clear()
        for index, token_id in enumerate(adapters.generate_steps(qwen, encoded, **options)):
            assert torch.is_grad_enabled() is grad
            assert index == len(seen) - 1 and token_id == whole[index]
        assert seen == there and len(seen) == 3

    mark.set("carried")
    both()
    assert seen[0][:4] == ("carried", False, False, False)
    with torch.inference_mode():
        both()
    assert seen[0][2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both()
    assert seen[0][3:5] == (True, torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        both()
        assert seen[0][5] == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu", 0):
        both()
        assert seen[0][6] == torch.device("cpu", 0)


def test_positions_of_other_sequences_stay_theirs(qwen: fastattr.Model) -> None:
    """Between two tokens the user generates for another picture and continues a decoding loop of their own."""
    expected, other = by_hand(qwen), by_hand(qwen, seed=7)
    inner = qwen.hf_model.model
    wide = picture(seed=3).resize((picture().width * 2, picture().height))
    kept = torch.tensor([[12345]])
    inner.rope_deltas = kept
    said = []
    streaming = fastattr.stream(qwen, picture(), PROMPT, config=LENS, max_new_tokens=N)
    for step in streaming:
        said.append(step.token_id)
        assert inner.rope_deltas is kept
        if step.index == 2:
            assert by_hand(qwen, seed=7) == other
            fastattr.attribute(qwen, wide, PROMPT, max_new_tokens=2, **ONE)
            inner.rope_deltas = kept
    assert said == expected and inner.rope_deltas is kept


def test_two_streams_of_one_model_take_turns(model: fastattr.Model) -> None:
    expected = [by_hand(model, seed) for seed in (0, 7)]
    streams = [fastattr.stream(model, picture(seed=seed), PROMPT, config=LENS, max_new_tokens=N) for seed in (0, 7)]
    said = [[next(each).token_id for each in streams] for _ in range(N)]
    assert [list(ids) for ids in zip(*said, strict=True)] == expected
    assert all(list(each) == [] for each in streams) and no_thread()


def test_a_program_ends_while_a_stream_waits() -> None:
    """The interpreter exits without waiting for the paused thread."""
    script = (
        "import fastattr\n"
        "from fastattr.demo.scenes import make_scene\n"
        "model = fastattr.load('shapes')\n"
        "config = fastattr.AttributionConfig(method='lens', scales=(1.0,), evidence=False)\n"
        "streaming = fastattr.stream(model, make_scene(5).image, 'Describe the image.', config=config)\n"
        "print(next(streaming).index)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "0\n"), ran.stderr


# --- what goes on at the same time ------------------------------------------------------------------------


def test_a_capture_sees_what_its_user_runs(qwen: fastattr.Model) -> None:
    """Forwards that fastattr runs inside the block are not captured."""
    inputs = prepared(qwen)
    start = inputs["input_ids"].shape[1]
    with fastattr.capture(qwen) as states:
        streaming = fastattr.stream(qwen, picture(seed=7), PROMPT, config=LENS, max_new_tokens=4)
        first = next(streaming)
        never = [*qwen.placeholder_ids, *range(qwen.head.vocab, len(qwen.head.weight))]
        out = qwen.hf_model.generate(**inputs, do_sample=False, max_new_tokens=5, suppress_tokens=never)
        said = [first.token_id, *(step.token_id for step in streaming)]
        whole = fastattr.attribute(qwen, picture(seed=7), PROMPT, max_new_tokens=4, **ONE)
        why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert said == list(whole.token_ids) == by_hand(qwen, seed=7)[:4]
    assert why.source == "capture" and list(why.token_ids) == out[0, start:].tolist()
    assert "generate" not in vars(qwen.hf_model) and no_thread()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft
def test_adapters_of_peft(qwen: fastattr.Model) -> None:
    plain = by_hand(qwen)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        qwen.hf_model,
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model = fastattr.wrap(adapted, qwen.processor)
    expected = by_hand(model)
    assert expected != plain and answers(model) == [expected] * 3
    adapted.generation_config.suppress_tokens = expected[:1]
    changed = by_hand(model)
    assert changed != expected and answers(model) == [changed] * 3
    parked(model).close()
    assert answers(model) == [changed] * 3


def test_a_compiled_model(qwen: fastattr.Model) -> None:
    expected = by_hand(qwen)
    qwen.hf_model.forward = torch.compile(qwen.hf_model.forward, backend="eager")
    assert answers(qwen) == [expected] * 3
    parked(qwen).close()


# --- where a response ends --------------------------------------------------------------------------------

END, PAD, WORD = 40, 41, 30


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ([30, 31], [30, 31]),
        ([30, 31, END], [30, 31]),
        ([30, END, END, PAD, PAD], [30]),
        ([30, END, PAD, END, PAD], [30]),
        ([30, PAD, PAD], [30, PAD, PAD]),  # no end before it: an ordinary token
        ([30, PAD, END], [30, PAD]),
        ([30, END, 31, END], [30, END, 31]),  # a word follows
        ([30, END, PAD, 31], [30, END, PAD, 31]),
        ([END, PAD], []),
        ([], []),
    ],
)
def test_one_rule_cuts_the_end(qwen: fastattr.Model, ids: list[int], left: list[int]) -> None:
    qwen.hf_model.generation_config.eos_token_id = [42, END]
    qwen.hf_model.generation_config.pad_token_id = PAD
    end = adapters.end_tokens(qwen)
    assert list(end.cut(ids)) == left and end.length(torch.tensor(ids, dtype=torch.long)) == len(left)
    if left:
        whole = fastattr.attribute(qwen, picture(), PROMPT, ids, **ONE)
        batch = fastattr.attribute_batch(qwen, [(picture(), PROMPT, torch.tensor(ids))], LENS)
        streaming = fastattr.stream(qwen, picture(), PROMPT, ids, config=LENS)
        said = [step.token_id for step in streaming]
        assert [*whole.token_ids] == [*batch[0].token_ids] == [*streaming.attribution().token_ids] == said == left
    elif ids:
        with pytest.raises(fastattr.InputError, match=r"holds only the end tokens \[40, 41\]"):
            fastattr.attribute(qwen, picture(), PROMPT, ids, **ONE)
        assert list(fastattr.stream(qwen, picture(), PROMPT, ids, config=LENS)) == []


@given(ids=st.lists(st.sampled_from([END, PAD, WORD]), max_size=12))
def test_the_rule_is_the_last_end_and_padding_behind_it(ids: list[int]) -> None:
    letters = "".join({END: "e", PAD: "p", WORD: "w"}[token_id] for token_id in ids)
    left = re.sub("e[ep]*$", "", letters)
    end = adapters.EndTokens(frozenset({END}), frozenset({PAD}))
    assert list(end.cut(ids)) == ids[: len(left)]


def test_ends_may_be_a_tensor_and_belong_to_the_call(qwen: fastattr.Model) -> None:
    config = qwen.hf_model.generation_config
    config.eos_token_id, config.pad_token_id = torch.tensor([1, 2]), None
    assert adapters.end_tokens(qwen) == adapters.EndTokens(frozenset({1, 2}), frozenset())
    assert adapters.end_tokens(qwen, {"eos_token_id": 3}).ends == {3}
    assert adapters.end_tokens(qwen, {"eos_token_id": None}).ends == frozenset()
    other = transformers.GenerationConfig(eos_token_id=[4], pad_token_id=5)
    assert adapters.end_tokens(qwen, {"generation_config": other}) == adapters.EndTokens(frozenset({4}), frozenset({5}))
    assert adapters.end_tokens(qwen, {"generation_config": transformers.GenerationConfig()}).ends == {1, 2}


@pytest.mark.parametrize("where", ["model", "argument", "configuration", "positional"])
def test_end_tokens_of_a_captured_answer_are_not_explained(model: fastattr.Model, where: str) -> None:
    """A captured answer is cut where `attribute` cuts it, wherever its end tokens are configured."""
    plain = by_hand(model)
    end = late(plain)
    expected = plain[: plain.index(end)]
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    own = model.hf_model.generation_config
    changed = transformers.GenerationConfig(
        eos_token_id=end, do_sample=False, max_new_tokens=N, suppress_tokens=never, pad_token_id=0
    )
    inputs = prepared(model)
    ids = inputs.pop("input_ids")
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": N, "suppress_tokens": never}
    with fastattr.capture(model) as states:
        if where == "positional":
            out = model.hf_model.generate(ids, changed, **inputs)
        elif where == "configuration":
            out = model.hf_model.generate(input_ids=ids, generation_config=changed, **inputs)
        elif where == "argument":
            out = model.hf_model.generate(input_ids=ids, eos_token_id=end, **asked, **inputs)
        else:
            own.eos_token_id = end
            out = model.hf_model.generate(input_ids=ids, **asked, **inputs)
    assert int(out[0, -1]) == end
    own.eos_token_id = None if where != "model" else end
    why = states.attribute(out, image=picture(), prompt=PROMPT, method="lens", filter=False, evidence=True)
    assert (list(why.token_ids), why.source) == (expected, "capture")
    whole = fastattr.attribute(model, picture(), PROMPT, expected, **{**ONE, "evidence": True})
    for name in ("context", "log_prob", "evidence"):
        torch.testing.assert_close(getattr(why, name), getattr(whole, name), rtol=1e-3, atol=1e-4)
    for one, other in zip(why.image, whole.image, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_an_empty_captured_answer(qwen: fastattr.Model) -> None:
    inputs, first = prepared(qwen), by_hand(qwen)[0]
    never = [*qwen.placeholder_ids, *range(qwen.head.vocab, len(qwen.head.weight))]
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": N, "suppress_tokens": never}
    with fastattr.capture(qwen) as states:
        out = qwen.hf_model.generate(**inputs, **asked, eos_token_id=first)
    with pytest.raises(fastattr.InputError, match=rf"answered nothing but the end tokens \[{first}\]"):
        states.attribute(out, image=picture(), prompt=PROMPT)


def test_tokens_of_a_streamer_end_where_the_answer_ends(qwen: fastattr.Model) -> None:
    plain = by_hand(qwen)
    qwen.hf_model.generation_config.eos_token_id = late(plain)
    tokens = fastattr.TokenStream()
    never = [*qwen.placeholder_ids, *range(qwen.head.vocab, len(qwen.head.weight))]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": N, "suppress_tokens": never, "streamer": tokens}
    qwen.hf_model.generate(**prepared(qwen), **options)
    said = [step.token_id for step in fastattr.stream(qwen, picture(), PROMPT, tokens, config=LENS)]
    assert said == plain[: plain.index(late(plain))]


# --- what a token costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lens", "tam", "arc"])
def test_one_pass_over_the_vocabulary_a_token(
    qwen: fastattr.Model, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scales and the blanked image share one matrix product with the output embeddings."""
    passes: list[tuple[str, int]] = []

    def count(name: str) -> None:
        run = getattr(fastattr.ops, name)

        def counted(states: Tensor, *args: Any, **options: Any) -> Any:
            passes.append((name, len(states)))
            return run(states, *args, **options)

        monkeypatch.setattr(fastattr.ops, name, counted)

    for name in ("lm_head_summary", "lm_head_log_prob", "lm_head_topk"):
        count(name)
    config = AttributionConfig(method=method, scales=(1.0, 1.5), evidence=True)
    streaming = fastattr.stream(qwen, picture(), PROMPT, [30, 31, 32], config=config)
    passes.clear()
    list(streaming)
    assert passes == [("lm_head_summary" if method == "arc" else "lm_head_log_prob", 3)] * 3


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "5", None])
def test_a_length_is_a_whole_number(qwen: fastattr.Model, n: Any) -> None:
    asked = (
        lambda: fastattr.attribute(qwen, picture(), PROMPT, max_new_tokens=n),
        lambda: fastattr.attribute_batch(qwen, [(picture(), PROMPT, None)], max_new_tokens=n),
        lambda: fastattr.stream(qwen, picture(), PROMPT, max_new_tokens=n),
    )
    for ask in asked:
        with pytest.raises(
            fastattr.InputError, match=rf"max_new_tokens is {n!r}, expected a whole number of at least 1"
        ):
            ask()
