"""`load` and `wrap`: from a directory or from objects, and responses in every form, to maps at three scales."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import is_torchvision_available

import fastattr
from fastattr import adapters
from fastattr.adapters.processors import ComposedProcessor
from fastattr.errors import StatesError
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture

SCALES = (1.0, 1.5, 2.0)


def saved(directory: Path, held: Tiny, image_processor: Any, processor_class: str | None) -> Path:
    """A model's directory as on the hub: weights, image processor and tokenizer, which name a joint processor class."""
    held.hf_model.save_pretrained(directory)
    held.processor.tokenizer.save_pretrained(directory)
    image_processor.save_pretrained(directory)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        settings = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**settings, "processor_class": processor_class}))
    return directory


def half(directory: Path, **settings: Any) -> Any:
    """The image processor that transformers itself loads from there: torchvision's where it is installed."""
    return transformers.AutoImageProcessor.from_pretrained(directory, **settings)


def joined_by(model: fastattr.Model, joint: str) -> bool:
    """The processor is transformers' joint class, or its halves joined where that needs torchvision and has none."""
    if is_torchvision_available():
        return type(model.processor).__name__ == joint
    return isinstance(model.processor, ComposedProcessor)


@pytest.fixture(scope="module")
def qwen() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


# --- load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("processor_class", [None, "Qwen2VLProcessor"])
def test_load_composes_qwens_processor(tmp_path: Path, kind: str, processor_class: str | None) -> None:
    held = tiny.TINY[kind]()
    directory = saved(tmp_path, held, tiny.qwen_image_processor(96 * 96), processor_class)
    model = fastattr.load(directory)
    assert joined_by(model, processor_class or {"qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(kind, "Qwen2VLProcessor"))
    assert model.name == str(directory)
    unlimited = half(directory, size=tiny.qwen_image_processor(256 * 256).size)
    check_like(model, Tiny(held.hf_model, tiny.qwen_duck(unlimited)))


@pytest.mark.parametrize(("kind", "cell"), [("mistral3", 16), ("llava_pixtral", 8)])
@pytest.mark.parametrize("processor_class", [None, "PixtralProcessor"])
def test_load_composes_pixtrals_processor(tmp_path: Path, kind: str, cell: int, processor_class: str | None) -> None:
    """Rows are broken by `[IMG_BREAK]`, which takes no part; the patch size saved is the tower's, not the merged one."""
    held = tiny.TINY[kind]()
    directory = saved(tmp_path, held, tiny.pixtral_image_processor(tiny.PATCH, longest_edge=400), processor_class)
    said = {"processor_class": "PixtralProcessor", "patch_size": tiny.PATCH, "spatial_merge_size": cell // tiny.PATCH}
    (directory / "processor_config.json").write_text(json.dumps(said))
    model = fastattr.load(directory)
    assert joined_by(model, "PixtralProcessor")
    images = half(directory, patch_size={"height": cell, "width": cell})
    check_like(model, Tiny(held.hf_model, tiny.pixtral_duck(cell, images)))

    encoded = adapters.encode(model, fastattr.images.read_visuals(picture()), PROMPT)
    (group,) = encoded.groups
    _, height, width = group.grid
    first, last = group.positions[0], group.positions[-1]
    tokens = model.processor.tokenizer.convert_ids_to_tokens(encoded.input_ids[first : last + 2])
    assert tokens == [*(["[IMG]"] * width + ["[IMG_BREAK]"]) * (height - 1), *["[IMG]"] * width, "[IMG_END]"]


@pytest.mark.parametrize("processor_class", [None, "SmolVLMProcessor"])
def test_load_composes_smolvlms_processor(tmp_path: Path, processor_class: str | None) -> None:
    held = tiny.smolvlm()
    directory = saved(tmp_path, held, held.processor.images, processor_class)
    model = fastattr.load(directory)
    assert joined_by(model, "SmolVLMProcessor")
    check_like(model, Tiny(held.hf_model, replace(held.processor, images=half(directory))))


@pytest.mark.parametrize("processor_class", [None, "InternVLProcessor"])
def test_load_composes_internvls_processor(tmp_path: Path, processor_class: str | None) -> None:
    held = tiny.internvl()
    assert isinstance(held.processor.images, GotOcr2ImageProcessorPil)
    directory = saved(tmp_path, held, held.processor.images, processor_class)
    model = fastattr.load(directory)
    assert joined_by(model, "InternVLProcessor")
    check_like(model, Tiny(held.hf_model, replace(held.processor, images=half(directory))))


def test_load_completes_an_old_llava_processor(tmp_path: Path) -> None:
    """Directories from before transformers 4.46 do not say what the processor must know of its model."""
    held = tiny.llava_clip()
    directory = saved(tmp_path, held, held.processor.image_processor, "LlavaProcessor")
    check_like(fastattr.load(directory), Tiny(held.hf_model, tiny.installed_half(held.processor, directory)))


@pytest.mark.parametrize("kind", ["llava_clip", "idefics3"])
def test_load_takes_a_joint_processor_as_it_is(tmp_path: Path, kind: str) -> None:
    held = tiny.TINY[kind]()
    held.hf_model.save_pretrained(tmp_path)
    held.processor.save_pretrained(tmp_path)
    model = fastattr.load(tmp_path)
    assert type(model.processor) is type(held.processor)
    check_like(model, Tiny(held.hf_model, tiny.installed_half(held.processor, tmp_path)))


def check_like(model: fastattr.Model, held: Tiny) -> None:
    """What was loaded gives the maps that the objects give, and can answer by itself."""
    assert not model.hf_model.training
    ours = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=SCALES)
    expected = fastattr.attribute(
        fastattr.wrap(held.hf_model, held.processor), picture(), PROMPT, ANSWER, scales=SCALES
    )
    assert ours.grids == expected.grids and len(ours.grids) == 3
    assert ours.context_tokens == expected.context_tokens
    torch.testing.assert_close(ours.image[0], expected.image[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.evidence, expected.evidence, rtol=1e-4, atol=1e-4)
    assert len(fastattr.attribute(model, picture(), PROMPT, scales=SCALES, max_new_tokens=3)) == 3


def test_load_in_another_dtype(tmp_path: Path) -> None:
    held = tiny.qwen2_vl()
    saved(tmp_path, held, tiny.qwen_image_processor(96 * 96), None)
    model = fastattr.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert fastattr.attribute(model, picture(), PROMPT, ANSWER).image[0].isfinite().all()


def test_a_directory_that_holds_nothing(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            fastattr.InputError, match=r"no model can be loaded from .*expected shapes, a directory written by"
        ):
            fastattr.load(source)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    held = tiny.qwen2_vl()
    held.hf_model.config.save_pretrained(tmp_path)
    with pytest.raises(fastattr.InputError, match="no model can be loaded from"):
        fastattr.load(tmp_path)


def test_a_directory_without_a_processor(tmp_path: Path) -> None:
    held = tiny.qwen2_vl()
    held.hf_model.save_pretrained(tmp_path)
    with pytest.raises(fastattr.InputError, match="no model can be loaded from"):
        fastattr.load(tmp_path)


def test_a_directory_of_a_text_only_model(tmp_path: Path) -> None:
    transformers.LlamaConfig(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(fastattr.UnsupportedModelError, match="'llama' has no vision_config"):
        fastattr.load(tmp_path)


# --- wrap ----------------------------------------------------------------------------------------------------------


def test_somebodys_tiny_qwen_and_a_duck_typed_processor() -> None:
    held = tiny.qwen2_vl()
    why = fastattr.attribute(fastattr.wrap(held.hf_model, held.processor), picture(), PROMPT, ANSWER, scales=SCALES)
    assert why.grids == (((1, 4, 6),), ((1, 6, 9),), ((1, 8, 12),))
    assert why.image[0].shape == (len(why.tokens), 1, 8, 12)
    assert why.agreement.shape == (len(why.tokens), 3)
    assert why.tokens == ("The", " red", " circle", " is", " at", " the", " top", " left", ".")
    assert why.model == "Qwen2VLForConditionalGeneration"
    assert why.source == "replay"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_output_embeddings_are_not_finite(value: float) -> None:
    held = tiny.qwen2_vl()
    held.hf_model.get_output_embeddings().weight.data[5, 0] = value
    with pytest.raises(StatesError, match="holds NaN or Inf, expected finite numbers"):
        fastattr.wrap(held.hf_model, held.processor)


def test_wrap_names_the_model_as_asked() -> None:
    held = tiny.qwen2_vl()
    assert fastattr.wrap(held.hf_model, held.processor, name="mine").name == "mine"


# --- responses -----------------------------------------------------------------------------------------------------


def test_text_ids_and_tensors_are_one_response(qwen: fastattr.Model) -> None:
    ids = qwen.processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    forms = (ANSWER, ids, tuple(ids), torch.tensor(ids), torch.tensor([ids], dtype=torch.int32))
    results = [fastattr.attribute(qwen, picture(), PROMPT, form, scales=(1.0,)) for form in forms]
    for why in results:
        assert why.token_ids == tuple(ids)
        assert len(why.tokens) == len(ids) == len(why.image[0])
        torch.testing.assert_close(why.image[0], results[0].image[0])


def test_ids_are_never_tokenised_again(qwen: fastattr.Model) -> None:
    """Letters one by one are not how this text would be tokenised."""
    letters = qwen.processor.tokenizer.convert_tokens_to_ids(list("red"))
    assert len(qwen.processor.tokenizer("red")["input_ids"]) < 3
    why = fastattr.attribute(qwen, picture(), PROMPT, letters, scales=(1.0,))
    assert why.token_ids == tuple(letters) and why.response == "red" and why.tokens == ("r", "e", "d")


def test_a_text_response_gets_no_special_tokens() -> None:
    held = tiny.llava_clip()  # its tokenizer begins every text with <s>
    why = fastattr.attribute(fastattr.wrap(held.hf_model, held.processor), picture(), PROMPT, ANSWER, scales=(1.0,))
    assert why.response == ANSWER
    assert held.processor.tokenizer("a")["input_ids"][0] == held.processor.tokenizer.bos_token_id not in why.token_ids


@pytest.mark.parametrize("kind", list(tiny.TINY))
def test_the_model_answers_when_no_response_is_given(kind: str) -> None:
    held = tiny.TINY[kind]()
    model = fastattr.wrap(held.hf_model, held.processor)
    why = fastattr.attribute(model, picture(), PROMPT, scales=(1.0,), max_new_tokens=4)
    encoded = adapters.encode(model, fastattr.images.read_visuals(picture()), PROMPT)
    assert len(why.token_ids) == 4

    ids = encoded.input_ids  # greedy by hand, one full forward a token
    for said in why.token_ids:
        states = adapters.replay(model, encoded, torch.cat([ids[len(encoded.input_ids) :], torch.tensor([said])]))
        logits = states.hidden_states[-1] @ model.head.weight[: model.head.vocab].T
        logits[model.image_token_id] = -torch.inf
        assert int(logits.argmax()) == said
        ids = torch.cat([ids, torch.tensor([said])])


def test_the_end_token_is_no_part_of_the_answer(qwen: fastattr.Model) -> None:
    held = tiny.qwen2_vl()
    model = fastattr.wrap(held.hf_model, held.processor)
    three = fastattr.attribute(model, picture(), PROMPT, scales=(1.0,), max_new_tokens=3).token_ids
    assert three[2] not in three[:2]
    held.hf_model.generation_config.eos_token_id = three[2]
    assert fastattr.attribute(model, picture(), PROMPT, scales=(1.0,), max_new_tokens=9).token_ids == three[:2]


def test_a_model_that_answers_nothing(qwen: fastattr.Model) -> None:
    held = tiny.qwen2_vl()
    model = fastattr.wrap(held.hf_model, held.processor)
    (first,) = fastattr.attribute(model, picture(), PROMPT, scales=(1.0,), max_new_tokens=1).token_ids
    held.hf_model.generation_config.eos_token_id = [first]
    with pytest.raises(
        fastattr.InputError, match="answers nothing to this prompt, so there is nothing to explain; pass a resp"
    ):
        fastattr.attribute(model, picture(), PROMPT, scales=(1.0,))


@pytest.mark.parametrize("response", ["", "  \n", [], torch.zeros(0, dtype=torch.long), torch.zeros(1, 0)])
def test_an_empty_response(qwen: fastattr.Model, response: Any) -> None:
    with pytest.raises(fastattr.InputError, match="pass None to let the model generate one"):
        fastattr.attribute(qwen, picture(), PROMPT, response)


@pytest.mark.parametrize("ids", [[-1, 5], [5, 100_000]])
def test_ids_outside_the_vocabulary(qwen: fastattr.Model, ids: list[int]) -> None:
    wrong = next(i for i in ids if i != 5)
    with pytest.raises(
        fastattr.InputError, match=rf"ids \[{wrong}\], expected 0 to {qwen.head.vocab - 1}, the model's vocab"
    ):
        fastattr.attribute(qwen, picture(), PROMPT, ids)


def test_ids_in_the_padding_of_the_output_embeddings(qwen: fastattr.Model) -> None:
    assert qwen.head.vocab < len(qwen.head.weight)
    with pytest.raises(fastattr.InputError, match="expected 0 to"):
        fastattr.attribute(qwen, picture(), PROMPT, [len(qwen.head.weight) - 1])


def test_an_image_placeholder_in_the_response(qwen: fastattr.Model) -> None:
    for response in ("a <|image_pad|> b", [5, qwen.image_token_id]):
        with pytest.raises(fastattr.InputError, match=r"the response holds the image placeholder .* never said"):
            fastattr.attribute(qwen, picture(), PROMPT, response)


def test_responses_that_are_no_ids(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.InputError, match=r"the response ids are torch.float32, expected whole numbers"):
        fastattr.attribute(qwen, picture(), PROMPT, [0.5, 1.0])  # type: ignore[list-item]
    with pytest.raises(fastattr.InputError, match=r"the response ids are torch.bool"):
        fastattr.attribute(qwen, picture(), PROMPT, torch.tensor([True]))
    with pytest.raises(fastattr.InputError, match="the response is a list, expected text or token ids"):
        fastattr.attribute(qwen, picture(), PROMPT, ["The", "red"])  # type: ignore[list-item]


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt(qwen: fastattr.Model, prompt: str) -> None:
    with pytest.raises(fastattr.InputError, match=r"the prompt is .*, expected some text"):
        fastattr.attribute(qwen, picture(), prompt, ANSWER)


def test_a_prompt_with_white_space_around(qwen: fastattr.Model) -> None:
    why = fastattr.attribute(qwen, picture(), f"\n {PROMPT} ", ANSWER, scales=(1.0,))
    assert "".join(why.context_tokens[: -len(why.tokens)]).strip() == PROMPT


def test_a_prompt_that_says_what_the_template_says(qwen: fastattr.Model) -> None:
    """The word `user` also stands in the template; the user's own comes later."""
    why = fastattr.attribute(qwen, picture(), "user", ANSWER, scales=(1.0,))
    assert why.context_tokens[: -len(why.tokens)] == ("user",)
    encoded = adapters.encode(qwen, fastattr.images.read_visuals(picture()), "user")
    assert encoded.prompt[0] > encoded.groups[0].positions[-1]


def test_a_prompt_that_holds_a_placeholder(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.InputError, match="holds the image placeholder, which the chat template writes"):
        fastattr.attribute(qwen, picture(), "What is <|image_pad|>?", ANSWER)


def test_letters_of_several_tokens(qwen: fastattr.Model) -> None:
    """Byte-level tokens that share one letter all carry it."""
    why = fastattr.attribute(qwen, picture(), "Is it ü or 😀?", "ü 😀", scales=(1.0,))
    assert why.response == "ü 😀"
    assert all(why.response[start:stop] == token for token, (start, stop) in zip(why.tokens, why.spans, strict=True))
    assert "ü" in why.tokens and any("😀" in token for token in why.tokens)


# --- how a model is loaded -----------------------------------------------------------------------------------------


CODE = {
    "configuration_mine.py": """
from transformers import Qwen2VLConfig


class MineConfig(Qwen2VLConfig):
    model_type = "mine_vl"
""",
    "modeling_mine.py": """
from transformers import Qwen2VLForConditionalGeneration

from .configuration_mine import MineConfig


class MineForConditionalGeneration(Qwen2VLForConditionalGeneration):
    config_class = MineConfig
""",
    "processing_mine.py": """
from fastattr.adapters.processors import ComposedProcessor, grid_tokens
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class MineProcessor:
    @classmethod
    def from_pretrained(cls, source, **options):
        images = Qwen2VLImageProcessorPil.from_pretrained(source)
        token = "<|image_pad|>"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
        return ComposedProcessor(images, tokenizer, token, grid_tokens(images, token))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        pass
""",
}


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose class transformers does not have, as on the hub: weights and code."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked in the terminal"))
    held = tiny.qwen2_vl()
    directory = saved(tmp_path / "mine", held, tiny.qwen_image_processor(96 * 96), None)
    # weights under their names in memory: transformers renames those of its own classes
    save_file(dict(held.hf_model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    for name, text in CODE.items():
        (directory / name).write_text(text)
    config = json.loads((directory / "config.json").read_text())
    code = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModelForImageTextToText": "modeling_mine.MineForConditionalGeneration",
    }
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "mine_vl", "auto_map": code}))
    (directory / "processor_config.json").write_text(
        json.dumps({"auto_map": {"AutoProcessor": "processing_mine.MineProcessor"}})
    )
    monkeypatch.setitem(adapters.families.registry._registered, "mine_vl", adapters.FAMILIES["qwen2_vl"])
    return directory


def test_code_of_a_model_is_run_when_it_is_trusted(with_code: Path) -> None:
    model = fastattr.load(with_code, trust_remote_code=True)
    assert type(model.hf_model).__name__ == "MineForConditionalGeneration"
    held = tiny.qwen2_vl()
    ours = fastattr.attribute(model, picture(60, 80), PROMPT, ANSWER, scales=(1.0,))
    expected = fastattr.attribute(
        fastattr.wrap(held.hf_model, held.processor), picture(60, 80), PROMPT, ANSWER, scales=(1.0,)
    )
    torch.testing.assert_close(ours.log_prob, expected.log_prob)


def test_code_of_a_model_is_not_run_by_default(with_code: Path) -> None:
    with pytest.raises(
        fastattr.InputError, match=r"comes with Python code of its own.*pass trust_remote_code=True to fastattr\.load"
    ):
        fastattr.load(with_code)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_goes_through(tmp_path: Path, device_map: Any) -> None:
    directory = saved(tmp_path, tiny.qwen2_vl(), tiny.qwen_image_processor(96 * 96), None)
    model = fastattr.load(directory, device_map=device_map)
    expected = fastattr.load(directory)
    ours = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=(1.0,))
    right = fastattr.attribute(expected, picture(), PROMPT, ANSWER, scales=(1.0,))
    torch.testing.assert_close(ours.log_prob, right.log_prob)


def test_a_device_beside_a_device_map_is_refused() -> None:
    with pytest.raises(fastattr.InputError, match="device is 'cpu' and device_map is 'auto', expected one of them"):
        fastattr.load("shapes", device="cpu", device_map="auto")


def test_quantisation_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of `from_pretrained`: the weights are quantised on their device, not moved afterwards."""
    given: dict[str, Any] = {}
    loaded = fastattr.load("shapes")

    def from_pretrained(source: Any, **options: Any) -> Any:
        given.update(options)
        return loaded.hf_model

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    fastattr.load("shapes", quantization_config="int4", device="cpu", revision="main")
    assert given["quantization_config"] == "int4" and given["device_map"] == {"": "cpu"} and given["revision"] == "main"


def test_the_bundled_model_in_another_dtype() -> None:
    assert fastattr.load("shapes").hf_model.dtype == torch.float32
    assert fastattr.load("shapes", dtype=torch.bfloat16).hf_model.dtype == torch.bfloat16
    assert fastattr.load("shapes", dtype="float16").head.weight.dtype == torch.float16


def test_the_device_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fastattr"):
        model = fastattr.load("shapes")
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert model.device.type == where
    assert any(
        f"loading shapes onto {where}" in record.getMessage() and record.levelname == "INFO"
        for record in caplog.records
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="fastattr"):
        fastattr.load("shapes", device="cpu")
    assert not caplog.records


def test_a_gpu_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, device: moved.append(device) or self)
    fastattr.load("shapes")
    assert moved == [torch.device("cuda", 1)]
