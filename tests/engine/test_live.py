"""Models that change after `wrap`: the right result, or a refusal before anything is computed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.decoding import cache_name
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT


def explain(model: fastattr.Model) -> fastattr.Attribution:
    return fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,), evidence=True)


@torch.no_grad()
def log_probs(model: fastattr.Model) -> Tensor:
    """Log-probabilities of the answer, from the logits of one ordinary forward."""
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    said = adapters.encode_response(model, ANSWER)
    ids = torch.cat([encoded.input_ids, said])[None]
    n = len(said)
    inputs = {
        name: nn.functional.pad(value, (0, n)) if name.endswith("token_type_ids") else value
        for name, value in encoded.model_inputs.items()
    }
    logits = model.hf_model(input_ids=ids, **inputs).logits[0].float()
    return logits[-n - 1 : -1, : model.head.vocab].log_softmax(-1).gather(1, said[:, None])[:, 0]


def check(model: fastattr.Model, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(explain(model).log_prob, log_probs(model), rtol=0, atol=tolerance)


def wrapped(held: Tiny) -> fastattr.Model:
    return fastattr.wrap(held.hf_model, held.processor)


def lora(held: Tiny, *targets: str, seed: int = 3) -> Any:
    """Adapters whose weights change the output, in eval mode."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, lora_alpha=32)
    return peft.get_peft_model(held.hf_model, config).eval()


# --- weights ----------------------------------------------------------------------------------------------------------


def assign(hf_model: Any) -> None:
    state = {name: value + 0.3 * torch.randn_like(value) for name, value in hf_model.state_dict().items()}
    hf_model.load_state_dict(state, assign=True)


def copy_in(hf_model: Any) -> None:
    hf_model.load_state_dict({name: 1.5 * value for name, value in hf_model.state_dict().items()})


def step(hf_model: Any) -> None:
    with torch.no_grad():
        hf_model.lm_head.weight.mul_(1.7)


def swap_data(hf_model: Any) -> None:
    for each in hf_model.parameters():
        each.data = each.data + 0.2


def another_head(hf_model: Any) -> None:
    hf_model.lm_head = nn.Linear(tiny.DIM, 384)


def tie_again(hf_model: Any) -> None:
    hf_model.lm_head.weight = hf_model.get_input_embeddings().weight


def enlarge(hf_model: Any) -> None:
    hf_model.resize_token_embeddings(400, mean_resizing=False)


def double(hf_model: Any) -> None:
    hf_model.to(torch.float64)


CHANGES = [assign, copy_in, step, swap_data, another_head, tie_again, enlarge, double]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_changed_after_wrap(change: Callable[[Any], None]) -> None:
    torch.manual_seed(1)
    held = tiny.qwen2_vl()
    model = wrapped(held)
    before = explain(model)
    change(held.hf_model)
    check(model)
    if change is enlarge:  # by rows of no tokens
        assert len(model.head.weight) == 400
        torch.testing.assert_close(explain(model).log_prob, before.log_prob)
    else:
        assert (explain(model).log_prob - before.log_prob).abs().max() > 1e-6
    fresh = explain(wrapped(held))
    torch.testing.assert_close(explain(model).image[0], fresh.image[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_and_back(dtype: torch.dtype) -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    held.hf_model.to(dtype)
    why = explain(model)
    assert model.head.weight.dtype == dtype
    torch.testing.assert_close(why.log_prob, log_probs(model), rtol=0, atol=0.1)
    held.hf_model.float()  # rounded
    check(model)


def test_a_soft_cap_set_later_is_proven_again() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    held.hf_model.config.get_text_config().final_logit_softcapping = 1.0  # this class ignores it
    check(model)
    assert model.head.softcap is None


def test_a_head_that_turns_into_something_else_is_refused() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    held.hf_model.lm_head = nn.Sequential(held.hf_model.lm_head, nn.Tanh())
    with pytest.raises(fastattr.UnsupportedModelError, match="its head does more than a linear layer"):
        explain(model)


def test_weights_that_became_nan_are_refused() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    held.hf_model.lm_head.weight = nn.Parameter(torch.full_like(held.hf_model.lm_head.weight, torch.nan))
    with pytest.raises(fastattr.StatesError, match="holds NaN or Inf"):
        explain(model)


def test_the_head_of_an_unchanged_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for held in (tiny.qwen2_vl(), Tiny(lora(tiny.qwen2_vl(), "lm_head"), tiny.qwen2_vl().processor)):
        model = wrapped(held)
        head = model.head
        explain(model)
        with fastattr.capture(model):
            pass
        assert model.head is head


def test_old_weights_are_not_held_when_the_model_has_others() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    old = weakref.ref(held.hf_model.lm_head.weight.untyped_storage())
    another_head(held.hf_model)
    explain(model)
    gc.collect()
    assert old() is None


# --- training mode ------------------------------------------------------------------------------------------------------


def entries(model: fastattr.Model) -> dict[str, Callable[[], Any]]:
    def captured() -> None:
        with fastattr.capture(model):
            raise AssertionError("the block began")

    return {
        "attribute": lambda: explain(model),
        "attribute_batch": lambda: fastattr.attribute_batch(model, [(picture(), PROMPT, ANSWER)]),
        "stream": lambda: fastattr.stream(model, picture(), PROMPT, [5]),
        "capture": captured,
    }


@pytest.mark.parametrize("entry", ["attribute", "attribute_batch", "stream", "capture"])
def test_training_mode_is_refused_everywhere(entry: str) -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    held.hf_model.train()
    with pytest.raises(fastattr.InputError, match=r"is in training mode, .*call \.eval\(\)"):
        entries(model)[entry]()
    held.hf_model.eval()
    explain(model)


def test_a_part_in_training_mode_counts_where_it_drops_something() -> None:
    held = tiny.llava_clip()
    model = wrapped(held)
    right = explain(model)
    tower = held.hf_model.model.vision_tower
    tower.train()
    torch.testing.assert_close(explain(model).log_prob, right.log_prob)  # nothing is dropped there
    for module in tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    with pytest.raises(fastattr.InputError, match=r"is in training mode in .* of its modules"):
        explain(model)
    tower.eval()
    torch.testing.assert_close(explain(model).log_prob, right.log_prob)


@pytest.mark.parametrize("entry", ["attribute", "attribute_batch", "stream", "capture"])
@pytest.mark.parametrize("raw", [True, False], ids=["a transformers model", "a name"])
def test_models_that_are_not_wrapped_are_refused(entry: str, raw: bool) -> None:
    given: Any = tiny.qwen2_vl().hf_model if raw else "shapes"
    how = r"fastattr.wrap\(hf_model, processor\)" if raw else r"fastattr.load\('shapes'\)"
    with pytest.raises(fastattr.InputError, match=f"expected a fastattr.Model; wrap it first: {how}"):
        entries(given)[entry]()


# --- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "v_proj"), ("lm_head", "q_proj")])
def test_adapters_merged_switched_and_disabled(targets: tuple[str, ...]) -> None:
    held = tiny.qwen2_vl()
    adapted = lora(held, *targets)
    model = fastattr.wrap(adapted, held.processor)
    first = explain(model).log_prob
    check(model)
    torch.manual_seed(9)
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    adapted.eval()
    adapted.set_adapter("other")
    adapted.eval()
    check(model)
    assert (explain(model).log_prob - first).abs().max() > 1e-3
    with adapted.disable_adapter():
        check(model)
    adapted.set_adapter("default")
    adapted.merge_adapter()
    check(model)
    torch.testing.assert_close(explain(model).log_prob, first, rtol=0, atol=1e-3)
    adapted.unmerge_adapter()
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.mul_(2)  # trained on
    check(model)
    for name, each in adapted.named_parameters():
        if "lora_B" in name:
            each.data *= 2  # as some optimisers do, unseen by version counters
    check(model)


def test_an_adapter_added_to_a_wrapped_model() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    lora(held, "lm_head", "q_proj")  # puts its layers into the same model
    check(model)


CACHE = cache_name(tiny.qwen2_vl().hf_model)  # renamed in transformers 5.24
PROMPT_LEARNING = [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
]


def prompt_tuned(config: Any) -> tuple[Tiny, Any]:
    held = tiny.llava_clip()
    text = held.hf_model.config.text_config
    sizes = {
        "token_dim": tiny.DIM,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_key_value_heads,
    }
    config = copy.deepcopy(config)
    for name, value in sizes.items():
        setattr(config, name, value)
    if isinstance(config, peft.PrefixTuningConfig):
        config.token_dim = tiny.DIM // text.num_attention_heads * text.num_key_value_heads
    return held, peft.get_peft_model(held.hf_model, config).eval()


@pytest.mark.parametrize("config", PROMPT_LEARNING, ids=lambda config: config.peft_type.value)
def test_virtual_tokens_are_refused(config: Any) -> None:
    held, tuned = prompt_tuned(config)
    with pytest.raises(
        fastattr.UnsupportedModelError, match=rf"{config.peft_type.value}\) puts 3 virtual tokens in fron"
    ):
        fastattr.wrap(tuned, held.processor)
    model = fastattr.wrap(tuned.get_base_model(), held.processor)
    check(model)
    with tuned.disable_adapter():
        check(fastattr.wrap(tuned, held.processor))


def generated(model: fastattr.Model, hf_model: Any, **more: Any) -> tuple[Any, Tensor]:
    encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
    ids = encoded.input_ids[None]
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    inputs = {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    with fastattr.capture(model) as states:
        out = hf_model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=never)
    return states, out


# --- between generate and its explanation -------------------------------------------------------------------------------


def test_an_adapter_that_is_switched_after_generate() -> None:
    held = tiny.qwen2_vl()
    adapted = lora(held, "q_proj", "v_proj")
    model = fastattr.wrap(adapted, held.processor)
    torch.manual_seed(9)
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    states, out = generated(model, adapted)
    right = states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
    adapted.set_adapter("other")
    adapted.eval()
    assert torch.equal(states.attribute(out, prompt=PROMPT).log_prob, right.log_prob)  # needs no forward
    with pytest.raises(fastattr.InputError, match="other adapters are active than when generate ran"):
        states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
    adapted.set_adapter("default")
    adapted.eval()
    again = states.attribute(out, image=picture(), prompt=PROMPT, evidence=True)
    torch.testing.assert_close(again.evidence, right.evidence, rtol=0, atol=1e-6)


def test_an_optimizer_step_after_generate() -> None:
    """It writes into the same memory."""
    held = tiny.qwen2_vl()
    model = wrapped(held)
    states, out = generated(model, held.hf_model)
    states.attribute(out, prompt=PROMPT)
    optimizer = torch.optim.AdamW(held.hf_model.parameters(), lr=0.1)
    for weights in held.hf_model.parameters():
        weights.grad = torch.ones_like(weights)
    optimizer.step()
    with pytest.raises(fastattr.InputError, match="output head changed after generate ran"):
        states.attribute(out, prompt=PROMPT)
    states, out = generated(model, held.hf_model)
    states.attribute(out, prompt=PROMPT)


@pytest.mark.parametrize("change", ["adapter", "training", "step"])
def test_a_model_that_changes_while_it_streams(change: str) -> None:
    held = tiny.qwen2_vl()
    adapted = lora(held, "q_proj", "v_proj")
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.eval()
    model = fastattr.wrap(adapted, held.processor)
    steps = fastattr.stream(model, picture(), PROMPT, [113, 236, 6], "lens@1", evidence=False)
    next(steps)
    if change == "adapter":
        adapted.set_adapter("other")
        adapted.eval()
    elif change == "training":
        adapted.train()
    else:
        with torch.no_grad():
            held.hf_model.get_output_embeddings().weight.mul_(2)
    with pytest.raises(fastattr.InputError, match="the model was changed since the stream began"):
        next(steps)


def test_a_head_that_is_replaced_after_generate() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    states, out = generated(model, held.hf_model)
    another_head(held.hf_model)
    with pytest.raises(fastattr.InputError, match="output head changed after generate ran"):
        states.attribute(out)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of PEFT
@pytest.mark.parametrize("config", PROMPT_LEARNING[:2], ids=lambda config: config.peft_type.value)
def test_a_capture_sees_virtual_tokens(config: Any) -> None:
    """The base model is wrapped and the tuned one generates, so that `wrap` cannot notice."""
    held, tuned = prompt_tuned(config)
    model = wrapped(held)
    states, out = generated(model, tuned)
    with pytest.raises(fastattr.InputError, match="fed inputs_embeds, as adapters with virtual tokens"):
        states.attribute(out)


def test_a_capture_sees_a_cache_of_unknown_tokens() -> None:
    """As in prefix tuning, or in a user's own loop that continues from an earlier turn."""
    held = tiny.qwen2_vl()
    model = wrapped(held)
    prefix, ids = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    cache = transformers.DynamicCache(config=held.hf_model.config.get_text_config())
    with torch.no_grad():
        held.hf_model(input_ids=prefix, **{CACHE: cache}, use_cache=True)
        with fastattr.capture(model) as states:
            logits = held.hf_model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits
    out = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    with pytest.raises(fastattr.InputError, match="read 2 tokens after 3 in its cache, but generate was given 2 ids"):
        states.attribute(out)


def test_a_second_turn_on_a_cache() -> None:
    for held in (tiny.qwen2_vl(), tiny.llava_clip()):
        model = wrapped(held)
        encoded = adapters.encode(model, read_visuals(picture()), PROMPT)
        never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
        options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": never}
        inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
        first = held.hf_model.generate(**inputs, **options, return_dict_in_generate=True)
        cache = first[CACHE]
        more = torch.tensor([held.processor.tokenizer("Describe the image.", add_special_tokens=False)["input_ids"]])
        ids = torch.cat([first.sequences, more], dim=1)
        bare = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with fastattr.capture(model) as states:
            out = held.hf_model.generate(**bare, **{CACHE: copy.deepcopy(cache)}, **options)
        with pytest.raises(
            fastattr.InputError, match=r"was given a cache of \d+ tokens .* pass the whole conversation to fas"
        ):
            states.attribute(out)
        with pytest.raises(fastattr.InputError, match=r"was given a cache of \d+ tokens"):
            states.attribute(out, image=picture())


# --- models in wrappers -------------------------------------------------------------------------------------------------


def test_data_parallel_is_refused_with_what_to_pass() -> None:
    held = tiny.qwen2_vl()
    parallel = nn.DataParallel(held.hf_model)
    with pytest.raises(
        fastattr.UnsupportedModelError, match=r"DataParallel spreads a model .*pass the model inside, \.mod"
    ):
        fastattr.wrap(parallel, held.processor)
    check(fastattr.wrap(parallel.module, held.processor))


def test_a_tokenizer_whose_ids_have_gaps() -> None:
    held = tiny.qwen2_vl()
    tokenizer = held.processor.tokenizer
    full = len(tokenizer)

    class Sparse:
        """The same tokens without a fifth of them; the texts here use none of those."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

        def get_vocab(self) -> dict[str, int]:
            return {token: id for token, id in tokenizer.get_vocab().items() if id % 5 or id == full - 1}

        def __len__(self) -> int:
            return len(self.get_vocab())

    object.__setattr__(held.processor, "tokenizer", Sparse())
    model = wrapped(held)
    assert model.head.vocab == full > len(model.processor.tokenizer)
    check(model)


def test_tokens_that_are_added_after_wrap() -> None:
    held = tiny.qwen2_vl()
    model = wrapped(held)
    before = model.head.vocab
    held.processor.tokenizer.add_tokens(["<mine>"])
    explain(model)
    assert model.head.vocab == before + 1
    assert isinstance(held.hf_model, transformers.PreTrainedModel)
