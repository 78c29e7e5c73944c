"""However an answer was decoded, what was captured is a replay of the final ids, or an error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import PROMPT, picture

KINDS: dict[str, Callable[[], tiny.Tiny]] = {"qwen2_vl": tiny.qwen2_vl, "llava_clip": tiny.llava_clip}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> fastattr.Model:
    held = KINDS[kind]()
    return fastattr.wrap(held.hf_model, held.processor)


def prepared(model: fastattr.Model, seed: int = 0) -> dict[str, Tensor]:
    """The arguments that a user would pass to `generate`."""
    encoded = adapters.encode(model, read_visuals(picture(seed=seed)), PROMPT)
    ids = encoded.input_ids[None]
    return {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(inputs: dict[str, Tensor], left: int, right: int = 0) -> dict[str, Tensor]:
    """The same prompt in a longer row, as a batch would hold it."""
    n = inputs["input_ids"].shape[1]
    return {
        name: torch.nn.functional.pad(value, (left, right)) if value.ndim == 2 and value.shape[1] == n else value
        for name, value in inputs.items()
    }


def options(model: fastattr.Model, **changed: Any) -> dict[str, Any]:
    never = [model.image_token_id, *range(model.head.vocab, len(model.head.weight))]
    return {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": never, **changed}


def check_replay(
    model: fastattr.Model, states: Any, sequence: Tensor, start: int, source: str | None, *, evidence: bool = False
) -> None:
    """What the block explains of `sequence [1 seq]` is what `attribute` explains of its answer from the picture alone.

    `source` is None where both are right.
    """
    why = states.attribute(sequence, image=picture(), prompt=PROMPT, evidence=evidence)
    expected = fastattr.attribute(model, picture(), PROMPT, sequence[0, start:], scales=(1.0,), evidence=evidence)
    assert why.source == (source or why.source)
    assert any("read again in one forward" in note for note in why.notes) is (why.source == "replay")
    assert why.token_ids == expected.token_ids == tuple(sequence[0, start:].tolist())
    ours, theirs = (
        (*each.image, each.context, each.log_prob, *([each.evidence] if evidence else [])) for each in (why, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def generated(model: fastattr.Model, inputs: dict[str, Tensor], **changed: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, **options(model, **changed))
    return states, out if isinstance(out, Tensor) else out.sequences


# --- one row, fed a token at a time --------------------------------------------------------------------------------


def only_a_few(_batch: int, _ids: Tensor) -> list[int]:
    return [30, 31, 32]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"do_sample": True, "top_k": 20, "temperature": 1.5},
        {"do_sample": True, "top_p": 0.7, "min_p": 0.01, "typical_p": 0.9},
        {"prefix_allowed_tokens_fn": only_a_few},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[40]]},
        {"sequence_bias": [[[33], 8.0]]},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"prefill_chunk_size": 7},
    ],
    ids=["greedy", "top-k", "nucleus", "constrained", "penalties", "bias", "static cache", "all outputs", "chunks"],
)
def test_ways_that_feed_the_sequence_itself(model: fastattr.Model, changed: dict[str, Any]) -> None:
    inputs = prepared(model)
    start = inputs["input_ids"].shape[1]
    states, out = generated(model, inputs, **changed)
    if "prefix_allowed_tokens_fn" in changed:
        assert set(out[0, start:].tolist()) <= {30, 31, 32}
    check_replay(model, states, out, start, "capture")


class Upper(transformers.LogitsProcessor):  # type: ignore[misc]
    """A grammar that a user enforces: one id after the other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 20 + input_ids.shape[1] % 7] = 0.0
        return forced


def test_log_probabilities_are_the_models_own_under_a_grammar(model: fastattr.Model) -> None:
    """The grammar leaves one id at each step; what the model would have given it stays visible."""
    inputs = prepared(model)
    start = inputs["input_ids"].shape[1]
    states, out = generated(model, inputs, logits_processor=transformers.LogitsProcessorList([Upper()]))
    check_replay(model, states, out, start, "capture")
    why = states.attribute(out, prompt=PROMPT)
    assert [20 + n % 7 for n in range(start, start + 5)] == list(why.token_ids)
    assert (why.log_prob < -0.1).all()


# --- ways that feed other rows, too ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "length_penalty": 2.0},
        {"num_beams": 3, "prefix_allowed_tokens_fn": only_a_few},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=["beams", "beam sampling", "constrained beams", "prompt lookup", "no cache"],
)
def test_ways_that_feed_more_than_the_sequence(model: fastattr.Model, changed: dict[str, Any]) -> None:
    inputs = prepared(model)
    states, out = generated(model, inputs, **changed)
    check_replay(model, states, out, inputs["input_ids"].shape[1], "replay", evidence=True)


@pytest.mark.parametrize("agrees", [True, False])
def test_assisted_decoding(model: fastattr.Model, kind: str, agrees: bool) -> None:
    """Whether drafts are taken or thrown away. Where all are taken, what was fed may be the sequence itself."""
    assistant = KINDS[kind]().hf_model
    if not agrees:
        torch.manual_seed(5)
        assistant.lm_head.weight.data = torch.randn_like(assistant.lm_head.weight)
    inputs = prepared(model)
    start = inputs["input_ids"].shape[1]
    _, greedy = generated(model, inputs)
    states, out = generated(model, inputs, assistant_model=assistant)
    assert torch.equal(out, greedy)
    check_replay(model, states, out, start, None if agrees else "replay")


def test_several_sequences_of_one_prompt(model: fastattr.Model) -> None:
    inputs = prepared(model)
    start = inputs["input_ids"].shape[1]
    for changed in ({"do_sample": True}, {"num_beams": 3}):
        states, out = generated(model, inputs, num_return_sequences=3, **changed)
        assert len({tuple(row.tolist()) for row in out}) == 3
        with pytest.raises(
            fastattr.InputError, match=r"sequences \[3, \d+\], expected \[1 seq\]; explain them one at a t"
        ):
            states.attribute(out)
        for row in out:
            check_replay(model, states, row[None], start, "replay")


def contrastive(
    hf_model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **kwargs: Any
) -> Tensor:
    """Decoding of somebody's own: each step tries four ids at once and takes the one whose state is least like the last."""
    kwargs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and "mask" not in name}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("position_ids", "cache_position")}
    states = hf_model(input_ids=input_ids, **kwargs, output_hidden_states=True)
    for _ in range(generation_config.max_new_tokens):
        tried = logits_processor(input_ids, states.logits[:, -1]).topk(4).indices[0]
        last = states.hidden_states[-1][:, -1]
        ahead = []
        for each in tried:
            longer = torch.cat([input_ids, each.view(1, 1)], dim=1)
            again = {
                name: torch.nn.functional.pad(value, (0, longer.shape[1] - value.shape[1]))
                if name.endswith("token_type_ids")
                else value
                for name, value in kwargs.items()
            }
            ahead.append((longer, hf_model(input_ids=longer, **again, output_hidden_states=True)))
        likeness = [torch.cosine_similarity(last, out.hidden_states[-1][:, -1]).item() for _, out in ahead]
        input_ids, states = ahead[likeness.index(min(likeness))]
    return input_ids


def test_a_decoding_way_of_the_users_own(model: fastattr.Model) -> None:
    """Contrastive search and constrained beams are such functions since transformers 5: they live outside of it."""
    inputs = prepared(model)
    states, out = generated(model, inputs, custom_generate=contrastive)
    start = inputs["input_ids"].shape[1]
    assert out.shape[1] == start + 5
    check_replay(model, states, out, start, "replay")


def test_ways_that_transformers_no_longer_has(model: fastattr.Model) -> None:
    """transformers refuses them by itself; a block they failed in explains nothing, and leaves nothing behind."""
    inputs = prepared(model)
    for changed in ({"penalty_alpha": 0.6, "top_k": 4}, {"force_words_ids": [[30, 31]], "num_beams": 3}):
        with fastattr.capture(model) as states, pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
            model.hf_model.generate(**inputs, **options(model, **changed))
        with pytest.raises(fastattr.InputError, match="nothing was captured"):
            states.attribute(inputs["input_ids"])
    assert "generate" not in model.hf_model.__dict__


# --- padding and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "source"), [({}, "capture"), ({"num_beams": 3}, "replay")], ids=["greedy", "beams"]
)
def test_a_prompt_padded_in_front(model: fastattr.Model, changed: dict[str, Any], source: str) -> None:
    """Equal to the same answer without padding, also where it is read again, and where the picture is blanked."""
    inputs = padded(prepared(model), left=6)
    states, out = generated(model, inputs, **changed)
    check_replay(model, states, out, inputs["input_ids"].shape[1], source, evidence=True)


def test_a_full_buffer_and_a_padded_prompt(model: fastattr.Model) -> None:
    inputs = padded(prepared(model), left=6)
    with fastattr.capture(model, buffer=fastattr.StateBuffer(1)) as states:
        out = model.hf_model.generate(**inputs, **options(model))
    check_replay(model, states, out, inputs["input_ids"].shape[1], "replay", evidence=True)


def test_a_prompt_padded_behind(model: fastattr.Model) -> None:
    """The first token is predicted at padding then: there is nothing right to explain, captured or not."""
    inputs = padded(prepared(model), left=0, right=6)
    for changed in ({}, {"num_beams": 3}):
        states, out = generated(model, inputs, **changed)
        with pytest.raises(fastattr.InputError, match=r"was given a prompt padded behind its end.* pad in front"):
            states.attribute(out, image=picture(), prompt=PROMPT)


@pytest.mark.parametrize("left", [0, 6])
def test_several_prompts_at_once(model: fastattr.Model, left: int) -> None:
    """Their images come as one tensor, and nobody says whose is whose."""
    rows = [padded(prepared(model, seed), left) for seed in (0, 1)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    states, out = generated(model, inputs)
    for sequences in (out, out[:1], out[1:]):
        with pytest.raises(
            fastattr.InputError, match=r"expected \[1 seq\]|generate was given 2 prompts at once, expected o"
        ):
            states.attribute(sequences, image=picture(), prompt=PROMPT)
