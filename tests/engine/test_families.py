"""Every family on its real transformers classes: where image tokens lie, what is read, and that nothing is left behind."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.hooks import decoder_of, interpolated_positions, record_output
from fastattr.images import read_visuals
from fastattr.maps import class_activations
from tests.engine import family_models as tiny
from tests.engine.families.proof import embeddings_at_image_tokens, inside
from tests.engine.family_models import ANSWER, PROMPT, TINY, picture

FIXED = ("gemma3",)  # families whose number of image tokens cannot be changed
GRIDS = {  # of a 91 x 67 picture with 8-pixel patches, by hand: merged 2 x 2, limited, cropped or squeezed
    "qwen2_vl": (1, 4, 6),
    "qwen2_5_vl": (1, 4, 6),
    "llava_clip": (1, 4, 4),
    "llava_siglip": (1, 4, 4),
    "llava_pixtral": (1, 6, 8),
    "mistral3": (1, 5, 6),
    "idefics3": (1, 4, 4),
    "smolvlm": (1, 4, 4),
    "internvl": (1, 4, 4),
    "gemma3": (1, 4, 4),
}


@pytest.fixture(scope="module", params=list(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> fastattr.Model:
    held = TINY[family]()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture(scope="module")
def qwen() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


def read(model: fastattr.Model, image: Any = None, **options: Any) -> tuple[adapters.EncodedExample, Tensor]:
    """An encoded example and response ids."""
    visuals = read_visuals(picture() if image is None else image)
    return adapters.encode(model, visuals, PROMPT, **options), adapters.encode_response(model, ANSWER)


def forward(model: fastattr.Model, encoded: adapters.EncodedExample, response: Tensor) -> Any:
    """An ordinary forward of prompt and response that keeps everything: the oracle of `replay`."""
    fed = torch.cat([encoded.input_ids, response])[None, :-1]
    inputs = dict(encoded.model_inputs)
    for name in inputs:
        if name.endswith("token_type_ids"):
            inputs[name] = torch.cat([inputs[name], inputs[name].new_zeros(1, len(response) - 1)], dim=1)
    scaled = model.family.interpolates and encoded.scale != 1.0
    with torch.no_grad(), interpolated_positions(model.hf_model, scaled):
        return model.hf_model(input_ids=fed, attention_mask=torch.ones_like(fed), **inputs, output_hidden_states=True)


# --- the layout --------------------------------------------------------------------------------------


def test_layout_of_one_image(family: str, model: fastattr.Model) -> None:
    encoded, response = read(model)
    layout = encoded.layout(len(response))
    (group,) = layout.images
    assert group.grid == GRIDS[family]
    assert len(group.positions) == math.prod(group.grid)
    assert (encoded.input_ids[list(group.positions)] == model.image_token_id).all()
    assert int((encoded.input_ids == model.image_token_id).sum()) == len(group.positions)
    assert layout.response == (len(encoded.input_ids), len(encoded.input_ids) + len(response))

    words = model.processor.tokenizer.decode(encoded.input_ids[list(layout.prompt)])
    assert words.strip() == PROMPT
    assert list(layout.prompt) == list(range(layout.prompt[0], layout.prompt[0] + len(layout.prompt)))


@pytest.mark.parametrize("prompt", ["assistant", "ASSISTANT:", "model", "user", "end", "INST", "image", ":"])
def test_a_prompt_that_the_template_writes_too(model: fastattr.Model, prompt: str) -> None:
    """The user's own words are meant, not the same ones of the template before or after them."""
    closing = len(read(model)[0].input_ids) - read(model)[0].prompt[-1]
    encoded = adapters.encode(model, read_visuals(picture()), prompt)
    assert len(encoded.input_ids) - encoded.prompt[-1] == closing
    assert model.processor.tokenizer.decode(encoded.input_ids[list(encoded.prompt)]).strip() == prompt


def test_template_and_tokenizer_do_not_both_begin_the_sequence(model: fastattr.Model) -> None:
    bos = model.processor.tokenizer.bos_token_id
    if bos is None:  # Qwen and InternVL have none
        assert model.family.name.startswith(("Qwen2", "InternVL"))
    else:
        assert read(model)[0].input_ids.tolist().count(bos) == 1


def test_several_images_and_a_video(model: fastattr.Model) -> None:
    """Every image is a group of its own; a video is one group whose frames follow each other."""
    encoded, _ = read(model, [picture(), [picture(40, 80, seed) for seed in (1, 2, 3)], picture(90, 50)])
    first, video, last = encoded.groups
    alone = [read(model, image)[0].groups[0].grid for image in (picture(), picture(40, 80), picture(90, 50))]
    assert first.grid == alone[0]
    assert video.grid == (3, *alone[1][1:])
    assert last.grid == alone[2]
    assert first.positions[-1] < video.positions[0] <= video.positions[-1] < last.positions[0]
    assert last.positions[-1] < encoded.prompt[0]

    why = fastattr.attribute(
        model, [picture(), [picture(40, 80, seed) for seed in (1, 2, 3)]], PROMPT, ANSWER, scales=(1.0,)
    )
    assert [maps.shape[1:] for maps in why.image] == [first.grid, video.grid]
    assert any("video" in note for note in why.notes)


# --- what is read --------------------------------------------------------------------------------------


def scales_of(family: str) -> tuple[float, ...]:
    return (1.0,) if family in FIXED else (1.0, 1.5, 2.0)


def test_replay_reads_what_an_ordinary_forward_gives(family: str, model: fastattr.Model) -> None:
    for scale in scales_of(family):
        encoded, response = read(model, scale=scale)
        states = adapters.replay(model, encoded, response)
        expected = forward(model, encoded, response)
        torch.testing.assert_close(states.hidden_states, expected.hidden_states[-1][0], rtol=1e-5, atol=1e-5)

        ids = torch.arange(len(model.head.weight))
        ours = class_activations(states.hidden_states, model.head, ids).T
        torch.testing.assert_close(ours, expected.logits[0].relu(), rtol=1e-4, atol=1e-5)


def test_other_layers_are_read_through_the_final_norm(model: fastattr.Model) -> None:
    encoded, response = read(model)
    every = forward(model, encoded, response).hidden_states
    decoder: Any = decoder_of(model.hf_model)
    for layer in (-2, 1):  # two layers: the same one, counted from both ends
        with torch.no_grad():
            expected = decoder.norm(every[layer][0])
        states = adapters.replay(model, encoded, response, layer=layer)
        torch.testing.assert_close(states.hidden_states, expected, rtol=1e-5, atol=1e-5)
    last = adapters.replay(model, encoded, response, layer=2)
    torch.testing.assert_close(last.hidden_states, every[-1][0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(every[1][0], every[-1][0], atol=1e-2)


@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_layer_that_is_not_there(qwen: fastattr.Model, layer: int) -> None:
    encoded, response = read(qwen)
    with pytest.raises(fastattr.InputError, match="expected 1 to 2 or -1 to -2"):
        adapters.replay(qwen, encoded, response, layer=layer)


def test_maps_at_every_scale_the_family_can_show(family: str, model: fastattr.Model) -> None:
    scales = scales_of(family)
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=scales)
    (maps,) = why.image
    assert why.response == ANSWER
    assert maps.shape[0] == len(why.tokens) and maps.isfinite().all()
    assert 0 <= maps.min() < maps.max() <= 1
    _, height, width = GRIDS[family]
    assert [grid[0] for grid in why.grids] == [(1, round(height * s), round(width * s)) for s in scales]
    assert maps.shape[1:] == why.grids[-1][0]  # the finest
    assert why.evidence is not None and why.evidence.isfinite().all()


def test_a_family_with_a_fixed_number_of_tokens_says_so() -> None:
    held = tiny.gemma3()
    model = fastattr.wrap(held.hf_model, held.processor)
    with pytest.raises(fastattr.ScaleError, match=r"always uses 16 tokens a tile, so scale 1.5 .* use scales=\(1.0,\)"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0, 1.5))


def test_a_limit_that_cannot_be_lifted_is_an_error_and_not_another_scale() -> None:
    held = tiny.qwen2_vl()
    stubborn = tiny.qwen_duck(tiny.qwen_image_processor(longest_edge=96 * 96))  # takes no options
    model = fastattr.wrap(held.hf_model, stubborn)
    with pytest.raises(fastattr.ScaleError, match=r"grids \[\(4, 7\)\] where scale 1.5 asks for \[\(6, 9\)\]"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0, 1.5))


# --- where image tokens lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(67, 91), (101, 58)], ids=["wide", "tall"])
def test_a_changed_patch_moves_the_token_at_its_cell(family: str, model: fastattr.Model, size: tuple[int, int]) -> None:
    """Pixels under one grid cell change; among all image tokens the one at that cell must move most."""
    height, width = size
    plain = np.asarray(picture(height, width)) // 4 + 96
    for scale in scales_of(family):
        before, group = embeddings_at_image_tokens(model, Image.fromarray(plain), scale)
        _, rows, columns = group.grid
        left, top, right, bottom = group.extent
        cells = [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1), (1, columns - 2), (rows - 2, 0)]
        for row, column in cells:
            planted = plain.copy()
            planted[inside(height, top, bottom, row, rows), inside(width, left, right, column, columns)] = (255, 0, 255)
            after, _ = embeddings_at_image_tokens(model, Image.fromarray(planted), scale)
            moved = (after - before).norm(dim=1)
            assert divmod(int(moved.argmax()), columns) == (row, column), f"scale {scale:g}, grid {group.grid}"
            second = moved.sort(descending=True).values[1]
            assert moved.max() > 3 * second, f"scale {scale:g}, grid {group.grid}: no token stands out"


def test_what_llava_crops_away_is_not_seen() -> None:
    """The extent is right from outside too: pixels beyond it move nothing."""
    held = tiny.llava_clip()
    model = fastattr.wrap(held.hf_model, held.processor)
    plain = np.asarray(picture(64, 128))
    before, group = embeddings_at_image_tokens(model, Image.fromarray(plain), 1.0)
    left, top, right, bottom = group.extent
    assert (left, top, right, bottom) == (0.25, 0.0, 0.75, 1.0)
    planted = plain.copy()
    planted[:, : round(128 * left) - 4] = planted[:, round(128 * right) + 4 :] = 0  # 4: the reach of the resampling
    after, _ = embeddings_at_image_tokens(model, Image.fromarray(planted), 1.0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_frames_of_a_video_keep_their_order(qwen: fastattr.Model) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    before, group = embeddings_at_image_tokens(qwen, [frames])
    assert group.grid == (3, 4, 6)
    frames[1] = picture(seed=9)
    after, _ = embeddings_at_image_tokens(qwen, [frames])
    moved = (after - before).norm(dim=1).view(3, -1).amax(dim=1)
    assert moved[1] > 1e-3
    assert moved[[0, 2]].max() == 0


# --- what is left behind -----------------------------------------------------------------------------------


def hooks(hf_model: nn.Module) -> list[str]:
    """Where our hooks come from; transformers has some of its own."""
    every = [
        each for m in hf_model.modules() for kind in (m._forward_hooks, m._forward_pre_hooks) for each in kind.values()
    ]
    return [hook.__module__ for hook in every if hook.__module__.startswith("fastattr")]


@contextmanager
def failing(module: nn.Module, error: Exception) -> Iterator[None]:
    """Let the module raise in its forward."""

    def fail(_module: nn.Module, _inputs: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_no_hook_is_left_behind(family: str, model: fastattr.Model) -> None:
    with record_output(decoder_of(model.hf_model)):
        assert hooks(model.hf_model) == ["fastattr.adapters.hooks"] * 2  # before and behind the forward
    fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=scales_of(family)[:2])
    assert hooks(model.hf_model) == []

    scaled, response = read(model, scale=scales_of(family)[-1])
    decoder: Any = decoder_of(model.hf_model)
    memory = torch.OutOfMemoryError("out of memory")  # the caller may want to retry: it passes as it is
    with failing(decoder.layers[-1], memory), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        adapters.replay(model, scaled, response)
    assert hooks(model.hf_model) == []

    with failing(decoder.layers[-1], IndexError("odd")), pytest.raises(fastattr.StatesError, match=r"fails on .*: odd"):
        adapters.replay(model, scaled, response)
    assert hooks(model.hf_model) == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_used_as_it_is(family: str, implementation: str) -> None:
    held = TINY[family]()
    held.hf_model.set_attn_implementation(implementation)
    model = fastattr.wrap(held.hf_model, held.processor)
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=scales_of(family))
    assert why.image[0].isfinite().all()
    configs = (held.hf_model.config, held.hf_model.config.get_text_config(), held.hf_model.config.vision_config)
    assert {config._attn_implementation for config in configs} == {implementation}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_maps(family: str, dtype: torch.dtype) -> None:
    held = TINY[family]()
    model = fastattr.wrap(held.hf_model.to(dtype), held.processor)
    assert model.head.weight.dtype == dtype
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=scales_of(family))
    assert why.image[0].isfinite().all() and why.context.isfinite().all() and why.log_prob.isfinite().all()
    assert why.image[0].max() > 0


# --- output heads ------------------------------------------------------------------------------------------


def check_head(hf_model: nn.Module, processor: Any) -> fastattr.Model:
    """Wrap, and compare the head with the model's own logits of an image prompt."""
    model = fastattr.wrap(hf_model, processor)
    encoded, response = read(model)
    states = adapters.replay(model, encoded, response)
    ours = class_activations(states.hidden_states, model.head, torch.arange(len(model.head.weight))).T
    torch.testing.assert_close(ours, forward(model, encoded, response).logits[0].relu(), rtol=1e-4, atol=1e-5)
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,))
    assert why.image[0].max() > 0
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tied: bool) -> None:
    held = tiny.qwen2_vl(tie_word_embeddings=tied)
    model = check_head(held.hf_model, held.processor)
    assert model.head.weight.data_ptr() == held.hf_model.lm_head.weight.data_ptr()  # a plain head is not copied
    assert (model.head.weight.data_ptr() == held.hf_model.get_input_embeddings().weight.data_ptr()) is tied


def test_padding_rows_of_the_head_are_known(qwen: fastattr.Model) -> None:
    assert qwen.head.vocab == len(qwen.processor.tokenizer) < len(qwen.head.weight)


def test_a_bias() -> None:
    held = tiny.qwen2_vl()
    torch.manual_seed(1)
    biased = nn.Linear(tiny.DIM, len(held.hf_model.lm_head.weight))
    held.hf_model.lm_head = biased
    model = check_head(held.hf_model, held.processor)
    assert model.head.bias is not None
    torch.testing.assert_close(model.head.bias, biased.bias.detach())


class ScaledQwen(transformers.Qwen2VLForConditionalGeneration):  # type: ignore[misc]
    """Multiplies its logits, as Cohere's models do."""

    @functools.wraps(transformers.Qwen2VLForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output


def test_a_logit_scale_of_the_configuration() -> None:
    held = tiny.qwen2_vl()
    held.hf_model.config.get_text_config().logit_scale = 0.25
    scaled = ScaledQwen(held.hf_model.config).eval()
    assert check_head(scaled, held.processor).head.logit_scale == 0.25


class CappedGemma(transformers.Gemma3ForConditionalGeneration):  # type: ignore[misc]
    """Applies the soft-cap of its configuration, as the text-only class of Gemma 3 does."""

    @functools.wraps(transformers.Gemma3ForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        cap = self.config.get_text_config().final_logit_softcapping
        output.logits = torch.tanh(output.logits / cap) * cap
        return output


def test_a_soft_cap_counts_where_the_class_applies_it() -> None:
    held = tiny.gemma3(softcap=1.0)
    torch.manual_seed(0)
    capped = CappedGemma(held.hf_model.config).eval()
    assert check_head(capped, held.processor).head.softcap == 1.0
    assert check_head(held.hf_model, held.processor).head.softcap is None  # Gemma3ForConditionalGeneration ignores it


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked for by peft
@pytest.mark.parametrize(
    "target", [["q_proj", "v_proj"], ["lm_head"], ["q_proj", "lm_head"]], ids=["body", "head", "both"]
)
def test_lora(target: list[str]) -> None:
    held = tiny.qwen2_vl()
    plain = read_states(fastattr.wrap(held.hf_model, held.processor))
    weight = held.hf_model.lm_head.weight.detach().clone()
    options = peft.LoraConfig(target_modules=target, r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(held.hf_model, options).eval()
    model = check_head(adapted, held.processor)
    assert model.hf_model is adapted
    assert torch.allclose(model.head.weight, weight) is ("lm_head" not in target)
    assert torch.allclose(read_states(model), plain, atol=1e-4) is (target == ["lm_head"])
    assert hooks(adapted) == []


def read_states(model: fastattr.Model) -> Tensor:
    return adapters.replay(model, *read(model)).hidden_states


class Quantised(nn.Linear):
    """A linear layer that holds its matrix in another form, as quantised ones do."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight * 0.5)


def test_a_linear_layer_that_is_not_plain() -> None:
    held = tiny.qwen2_vl()
    head = Quantised(tiny.DIM, 384, bias=False)
    held.hf_model.lm_head = head
    model = check_head(held.hf_model, held.processor)
    torch.testing.assert_close(model.head.weight, head.weight.detach() * 0.5)


class Bent(nn.Linear):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.sin())


def test_a_head_that_does_something_else_is_refused() -> None:
    held = tiny.qwen2_vl()
    held.hf_model.lm_head = Bent(tiny.DIM, 384, bias=False)
    with pytest.raises(fastattr.UnsupportedModelError, match="its head does more than a linear layer"):
        fastattr.wrap(held.hf_model, held.processor)


def test_a_hook_that_alters_logits_is_noticed() -> None:
    held = tiny.qwen2_vl()
    held.hf_model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + 1.0)
    with pytest.raises(fastattr.UnsupportedModelError, match="its head does more than a linear layer"):
        fastattr.wrap(held.hf_model, held.processor)


# --- what is refused -----------------------------------------------------------------------------------------


def llama() -> transformers.LlamaForCausalLM:
    options = tiny._llama(384)
    options.pop("model_type")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()


def test_a_text_only_model_is_refused(qwen: fastattr.Model) -> None:
    with pytest.raises(
        fastattr.UnsupportedModelError, match=r"'llama' has no vision_config.*Known families: qwen2_vl, "
    ):
        fastattr.wrap(llama(), qwen.processor)


class Stranger(nn.Module):
    """Built like a transformers model, of a family without an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.CLIPConfig()

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(2, 2)


def test_a_family_nobody_knows_is_refused(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.UnsupportedModelError, match=r"'clip', expected one of qwen2_vl, .*attribute_states"):
        fastattr.wrap(Stranger().eval(), qwen.processor)


def test_something_that_is_no_transformers_model_is_refused(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.UnsupportedModelError, match="Linear is not a transformers model"):
        fastattr.wrap(nn.Linear(2, 2), qwen.processor)


def test_a_model_without_a_head_is_refused(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.UnsupportedModelError, match="Qwen2VLModel has no output embeddings"):
        fastattr.wrap(qwen.hf_model.model, qwen.processor)


def test_training_mode_is_refused() -> None:
    held = tiny.qwen2_vl()
    with pytest.raises(fastattr.InputError, match=r"training mode.*call .eval\(\) on it first"):
        fastattr.wrap(held.hf_model.train(), held.processor)


def test_a_processor_that_lacks_members_is_refused(qwen: fastattr.Model) -> None:
    with pytest.raises(
        fastattr.InputError, match=r"PreTrainedTokenizerFast lacks tokenizer$|TokenizersBackend lacks tokenizer$"
    ):
        fastattr.wrap(qwen.hf_model, qwen.processor.tokenizer)
    with pytest.raises(
        fastattr.InputError, match="object lacks apply_chat_template, __call__, tokenizer, batch_decode"
    ):
        fastattr.wrap(qwen.hf_model, object())


def test_a_processor_without_a_chat_template() -> None:
    held = tiny.llava_clip()
    held.processor.chat_template = None
    model = fastattr.wrap(held.hf_model, held.processor)
    with pytest.raises(fastattr.InputError, match="LlavaProcessor cannot render the chat"):
        fastattr.attribute(model, picture(), PROMPT, ANSWER)


def test_a_processor_that_returns_no_grids(qwen: fastattr.Model) -> None:
    def half(pictures: Any) -> Any:
        return {"pixel_values": torch.zeros(96, 384)}

    duck = tiny.DuckProcessor(
        qwen.processor.tokenizer, half, "<|image_pad|>", lambda _seen, _index: "<|image_pad|>" * 24
    )
    with pytest.raises(fastattr.TokenLayoutError, match=r"reads its grids from 'image_grid_thw', but .* pixel_values"):
        fastattr.attribute(fastattr.wrap(qwen.hf_model, duck), picture(), PROMPT, ANSWER)


def test_a_processor_that_returns_no_ids(qwen: fastattr.Model) -> None:
    class Wordless(tiny.DuckProcessor):
        def __call__(self, text: Any, images: Any, return_tensors: str = "pt") -> dict[str, Any]:
            return {"pixel_values": torch.zeros(96, 384)}

    duck = qwen.processor
    wordless = Wordless(duck.tokenizer, duck.read_images, duck.placeholder, duck.expand)
    with pytest.raises(fastattr.TokenLayoutError, match="Wordless returned pixel_values, expected input_ids"):
        fastattr.attribute(fastattr.wrap(qwen.hf_model, wordless), picture(), PROMPT, ANSWER)


def test_a_template_that_rewrites_the_prompt(qwen: fastattr.Model) -> None:
    held = tiny.qwen2_vl()
    held.processor.tokenizer.chat_template = tiny.QWEN_CHAT.replace("part['text']", "part['text'] | upper")
    model = fastattr.wrap(held.hf_model, held.processor)
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,), evidence=False)
    said = why.context_tokens[: -len(why)]
    assert "".join(said).strip() == PROMPT.upper()  # context is what the model reads


def test_a_processor_that_reads_something_else(qwen: fastattr.Model) -> None:
    """It ignores the template's text, so the prompt is not among the tokens."""

    class Deaf(tiny.DuckProcessor):
        def __call__(self, text: Any, images: Any, return_tensors: str = "pt") -> dict[str, Any]:
            heard = [each.replace("red circle", "blue square") for each in text]
            return super().__call__(text=heard, images=images, return_tensors=return_tensors)

    duck = qwen.processor
    deaf = Deaf(duck.tokenizer, duck.read_images, duck.placeholder, duck.expand)
    with pytest.raises(fastattr.TokenLayoutError, match=r"is not in the text the model reads, .*blue square"):
        fastattr.attribute(fastattr.wrap(qwen.hf_model, deaf), picture(), PROMPT, ANSWER)
