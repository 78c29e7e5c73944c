"""Chat templates that rewrite conversations, options that they read, and prompts compared with those of an engine."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

import fastattr
from fastattr import Chat, adapters
from fastattr.batch.reach import reach_of
from fastattr.batch.sources import Fields, to_row
from fastattr.images import read_visuals
from fastattr.log.requests import from_json, to_json
from tests.engine.family_models import ANSWER, TINY, picture

IMAGE = "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
PARTS = (
    "{% if m['content'] is string %}{{ X }}{% else %}{% for p in m['content'] %}"
    + IMAGE
    + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
)
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
WITHOUT_THOUGHTS = TURN + PARTS.replace("X", "m['content'].split('</think>')[-1].lstrip('\\n')") + END
KEEPS_THOUGHTS = TURN + PARTS.replace("X", "m['content']") + END
SHOUTING = KEEPS_THOUGHTS.replace("p['text']", "p['text'] | upper").replace(
    "{{ m['content'] }}", "{{ m['content'] | upper }}"
)
TRIMMED = KEEPS_THOUGHTS.replace("p['text']", "p['text'] | trim").replace(
    "{{ m['content'] }}", "{{ m['content'] | trim }}"
)
MERGED = (
    "<|im_start|>{% for m in messages %}{{ m['role'] }}: "
    + PARTS.replace("X", "m['content']")
    + " {% endfor %}<|im_end|>\n"
)
SYSTEM_LAST = (  # as Mistral writes it: into the last turn of the user
    "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{% if loop.last and s %}{{ s }}\n\n{% endif %}"
    + PARTS.replace("X", "m['content']")
    + END
)
NO_SYSTEM = KEEPS_THOUGHTS.replace("for m in messages", "for m in messages if m['role'] != 'system'")
THINKING = KEEPS_THOUGHTS.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the red circle?"}]}
THOUGHT = {"role": "assistant", "content": "<think>a blue square</think>\nThe red circle is at the top left."}
AGAIN = {"role": "user", "content": "  Describe the image. "}


def model_with(template: str) -> fastattr.Model:
    held = TINY["qwen2_vl"]()
    held.processor.tokenizer.chat_template = template
    return fastattr.wrap(held.hf_model, held.processor)


def context(model: fastattr.Model, chat: Any) -> str:
    encoded = adapters.encode(model, read_visuals(picture()), chat if isinstance(chat, Chat) else Chat(chat))
    return str(model.processor.tokenizer.decode(encoded.input_ids[list(encoded.prompt)]))


def explain(model: fastattr.Model, chat: Any, **options: Any) -> fastattr.Attribution:
    return fastattr.attribute(model, picture(), chat, ANSWER, scales=(1.0,), **{"evidence": False, **options})


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (WITHOUT_THOUGHTS, [ASKED, THOUGHT, AGAIN], "Where is the red circle?The red circle is at the top left.Describe the image."),
        (KEEPS_THOUGHTS, [ASKED, THOUGHT, AGAIN], "Where is the red circle?<think>a blue square</think>The red circle is at the top left.Describe the image."),
        (SHOUTING, [SYSTEM, ASKED, AGAIN], "BE BRIEF.WHERE IS THE RED CIRCLE?DESCRIBE THE IMAGE."),
        (TRIMMED, [SYSTEM, ASKED, AGAIN], "Be brief.Where is the red circle?Describe the image."),
        (MERGED, [SYSTEM, ASKED, AGAIN], "Be brief.Where is the red circle?Describe the image."),
        (SYSTEM_LAST, [SYSTEM, ASKED, THOUGHT, AGAIN], "Where is the red circle?<think>a blue square</think>The red circle is at the top left.Be brief.Describe the image."),
        (SYSTEM_LAST, [SYSTEM, ASKED], "Be brief.Where is the red circle?"),
        (NO_SYSTEM, [SYSTEM, ASKED], "Where is the red circle?"),
    ],
)  # fmt: skip
def test_context_is_what_the_model_reads(template: str, chat: list[Any], expected: str) -> None:
    model = model_with(template)
    assert "".join(context(model, chat).split()) == "".join(expected.split())


def test_only_the_words_between_the_templates_are_context() -> None:
    """Compared with the rendered prompt: everything that is not context is written by the template."""
    model = model_with(WITHOUT_THOUGHTS)
    chat = Chat([ASKED, THOUGHT, AGAIN])
    encoded = adapters.encode(model, read_visuals(picture()), chat)
    ids = encoded.input_ids.tolist()
    taken = {*encoded.prompt, *(position for group in encoded.groups for position in group.positions)}
    rest = "".join(model.decode([[id for i, id in enumerate(ids) if i not in taken]])).split()
    assert rest == [
        "<|im_start|>user", "<|vision_start|><|vision_end|><|im_end|>", "<|im_start|>assistant", "<|im_end|>",
        "<|im_start|>user", "<|im_end|>", "<|im_start|>assistant",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "chat", "told"),
    [
        (NO_SYSTEM, [SYSTEM, ASKED], ["the chat template leaves out what the system said, 'Be brief.', so it is not context"]),
        (WITHOUT_THOUGHTS, [ASKED, THOUGHT, AGAIN], ["the chat template writes what the assistant said"]),
        (WITHOUT_THOUGHTS, [ASKED, {"role": "assistant", "content": "<think>a</think>"}, AGAIN], ["leaves out what the assistant said"]),
        (SHOUTING, [SYSTEM, ASKED, AGAIN], []),
        (KEEPS_THOUGHTS, [ASKED, THOUGHT, AGAIN], []),
    ],
)  # fmt: skip
def test_notes_name_texts_that_the_template_leaves_out(template: str, chat: list[Any], told: list[str]) -> None:
    model = model_with(template)
    notes = [note for note in explain(model, chat).notes if "chat template" in note]
    assert len(notes) == len(told) and all(part in note for part, note in zip(told, notes, strict=True))
    config = fastattr.AttributionConfig(scales=(1.0,), evidence=False)
    stream = fastattr.stream(model, picture(), chat, adapters.encode_response(model, ANSWER).tolist(), config=config)
    assert list(stream)
    assert [note for note in stream.attribution().notes if "chat template" in note] == notes


@pytest.mark.parametrize(
    "template",
    [
        KEEPS_THOUGHTS.replace("for m in messages", "for m in messages[-1:]"),
        KEEPS_THOUGHTS.replace("m['content'] }}", "'' }}"),
    ],
)
def test_a_template_that_drops_a_text_of_the_user_is_refused(template: str) -> None:
    chat = [{"role": "user", "content": "What is blue?"}, ASKED]
    with pytest.raises(
        fastattr.TokenLayoutError, match=r"'What is blue\?' is not in the text the model reads: the chat"
    ):
        explain(model_with(template), chat)


# ---- options of the template -----------------------------------------------------------------------


def rendered(template: str, chat: list[Any], **options: Any) -> str:
    """By transformers alone."""
    ((text,), _) = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **options)
    return str(text)


def plain_log_probs(model: fastattr.Model, chat: list[Any], response: torch.Tensor, **options: Any) -> torch.Tensor:
    """`[target]` in nats, of one ordinary forward of the model on the prompt that transformers renders."""
    text = rendered(THINKING, chat, **options)
    inputs = dict(model.processor(text=[text], images=[picture()], return_tensors="pt"))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.image_token_id).int()
    with torch.no_grad():
        logits = model.hf_model(**inputs).logits[0].float()
    n = len(response)
    return logits[-n - 1 : -1, : model.head.vocab].log_softmax(-1)[torch.arange(n), response]


def test_an_answer_after_closed_reasoning() -> None:
    """In `attribute`, batch, stream and replay, with the log-probabilities of an ordinary forward."""
    model = model_with(THINKING)
    response = adapters.encode_response(model, ANSWER)
    closed = Chat([ASKED], template_options={"enable_thinking": False})
    opened = plain_log_probs(model, [ASKED], response)
    expected = plain_log_probs(model, [ASKED], response, enable_thinking=False)
    assert not torch.allclose(opened, expected, atol=1e-3), "the option changes the prompt"
    config = fastattr.AttributionConfig(scales=(1.0,))
    stream = fastattr.stream(model, picture(), closed, response.tolist(), config=config)
    list(stream)
    batch = fastattr.attribute_batch(model, [(picture(), closed, ANSWER), (picture(), [ASKED], ANSWER)], config)
    for why in (explain(model, closed, evidence=True), stream.attribution(), batch[0]):
        torch.testing.assert_close(why.log_prob, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch[1].log_prob, opened, rtol=1e-3, atol=1e-3)


def test_an_option_that_the_template_does_not_read_is_refused() -> None:
    chat = Chat([ASKED], template_options={"enable_thinkng": False})
    with pytest.raises(
        fastattr.InputError, match=r"holds enable_thinkng, which .* the options it reads: enable_thinking$"
    ):
        explain(model_with(THINKING), chat)
    with pytest.raises(fastattr.InputError, match="the options it reads: none"):
        explain(model_with(KEEPS_THOUGHTS), Chat([ASKED], template_options={"enable_thinking": False}))
    known = "{% generation %}{% endgeneration %}" + THINKING  # a tag that plain Jinja does not know
    assert adapters.encode(
        model_with(THINKING), read_visuals(picture()), Chat([ASKED], template_options={"enable_thinking": True})
    )
    from fastattr.adapters.wording import _variables

    assert "enable_thinking" in (_variables(known) or ())
    assert _variables("{% mystery %}") is None


def test_another_template_can_be_given() -> None:
    model = model_with(KEEPS_THOUGHTS)
    chat = Chat([SYSTEM, ASKED], template_options={"chat_template": SHOUTING})
    assert "".join(context(model, chat).split()) == "BEBRIEF.WHEREISTHEREDCIRCLE?"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"add_generation_prompt": False}, "holds 'add_generation_prompt'"),
        ({"tools": []}, "holds 'tools'"),
        ([("a", 1)], "expected a mapping with names as keys"),
        ({1: 2}, "expected a mapping with names as keys"),
    ],
)
def test_wrong_template_options_are_refused(options: Any, told: str) -> None:
    with pytest.raises(fastattr.InputError, match=told):
        Chat([ASKED], template_options=options)


def test_options_are_the_chats_own() -> None:
    given = {"enable_thinking": False, "levels": [1]}
    chat = Chat([ASKED], template_options=given)
    given["enable_thinking"] = True
    given["levels"].append(2)  # type: ignore[attr-defined]
    assert dict(chat.template_options) == {"enable_thinking": False, "levels": [1]}
    with pytest.raises(TypeError):
        chat.template_options["enable_thinking"] = True  # type: ignore[index]
    for same in (
        pickle.loads(pickle.dumps(chat)),
        copy.deepcopy(chat),
        replace(chat),
        from_json(json.loads(json.dumps(to_json(chat)))),
    ):
        assert same == chat and dict(same.template_options) == dict(chat.template_options)
    assert chat != replace(chat, template_options={})
    held = to_json(chat)
    del held["template_options"]  # as it was written before there were any
    assert from_json(held) == Chat([ASKED])
    with pytest.raises(fastattr.InputError, match="template_options cannot be written as JSON"):
        to_json(replace(chat, template_options={"when": {1, 2}}))


@pytest.mark.parametrize("written", [{"enable_thinking": False, "other": None}, '{"enable_thinking": false}'])
@pytest.mark.parametrize("asked", [{"prompt": "What is red?"}, {"messages": [ASKED]}])
def test_rows_hold_options(asked: dict[str, Any], written: Any) -> None:
    values = {"image": b"png", "response": ANSWER, "template_options": written, **asked}
    row = to_row(values, Fields(), number=0, id="a", place="here", reach=reach_of(None))
    assert isinstance(row.prompt, Chat) and dict(row.prompt.template_options) == {"enable_thinking": False}
    assert row.prompt.n_pictures == 1
    plain = to_row({**values, "template_options": None}, Fields(), number=0, id="a", place="here", reach=reach_of(None))
    assert not isinstance(plain.prompt, Chat) or not plain.prompt.template_options


@pytest.mark.parametrize(
    ("wrong", "told"), [("{", "which is not JSON"), ([1], "expected an object"), ("3", "expected an object")]
)
def test_rows_with_broken_options(wrong: Any, told: str) -> None:
    values = {"image": b"png", "prompt": "a", "template_options": wrong}
    with pytest.raises(fastattr.InputError, match=told):
        to_row(values, Fields(), number=0, id="a", place="here", reach=reach_of(None))


def test_messages_of_the_command_line(tmp_path: Path) -> None:
    from fastattr.cli.app import _read_messages

    file = tmp_path / "chat.json"
    file.write_text(
        json.dumps(
            {"messages": [ASKED], "tools": [{"name": "measure"}], "template_options": {"enable_thinking": False}}
        )
    )
    assert _read_messages(file) == Chat([ASKED], [{"name": "measure"}], {"enable_thinking": False})
    file.write_text(json.dumps([ASKED]))
    assert _read_messages(file) == Chat([ASKED])
    file.write_text(json.dumps({"messages": [ASKED], "options": {}}))
    with pytest.raises(fastattr.InputError, match="holds messages, options, expected messages"):
        _read_messages(file)


# ---- prompts of an engine --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking() -> fastattr.Model:
    return model_with(THINKING)


def prompt_of(model: fastattr.Model, collapsed: bool, **options: Any) -> list[int]:
    """The ids an engine would return, by transformers alone: with one placeholder a picture, or one a token."""
    text = rendered(THINKING, [ASKED], **options)
    if collapsed:
        return list(model.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(model.processor(text=[text], images=[picture()], return_tensors="pt")["input_ids"][0].tolist())


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_prompt_of_the_engine(thinking: fastattr.Model, collapsed: bool) -> None:
    ids = prompt_of(thinking, collapsed, enable_thinking=False)
    closed = Chat([ASKED], template_options={"enable_thinking": False})
    assert explain(thinking, closed, prompt_ids=ids).response == ANSWER
    assert explain(thinking, closed, prompt_ids=torch.tensor([ids])).response == ANSWER
    several = fastattr.attribute(thinking, picture(), closed, ANSWER, scales=(1.5, 1.0), evidence=False, prompt_ids=ids)
    assert several.response == ANSWER
    config = fastattr.AttributionConfig(scales=(1.0,), evidence=False)
    rows = [(picture(), closed, ANSWER), (picture(), [ASKED], ANSWER)]
    assert len(fastattr.attribute_batch(thinking, rows, config, prompt_ids=[ids, None])) == 2
    told = r"differ from token \d+ on .* prompt_ids holds '.*<think>.*' and the prompt here '.*assistant\\n'"
    with pytest.raises(fastattr.TokenLayoutError, match=told):
        explain(thinking, [ASKED], prompt_ids=ids)
    with pytest.raises(fastattr.TokenLayoutError, match=told):
        fastattr.attribute_batch(thinking, rows, config, prompt_ids=[None, ids])
    with pytest.raises(fastattr.TokenLayoutError, match=told):
        fastattr.stream(thinking, picture(), [ASKED], config=config, prompt_ids=ids)


def test_the_place_where_prompts_differ(thinking: fastattr.Model) -> None:
    ids = prompt_of(thinking, True)
    wrong = [*ids[:5], ids[5] + 1, *ids[6:]]
    with pytest.raises(fastattr.TokenLayoutError, match="differ from token 5 on"):
        explain(thinking, [ASKED], prompt_ids=wrong)
    with pytest.raises(fastattr.TokenLayoutError, match=f"differ from token {len(ids) - 1} on"):
        explain(thinking, [ASKED], prompt_ids=ids[:-1])
    with pytest.raises(fastattr.TokenLayoutError, match="differ from token 0 on"):
        explain(thinking, [ASKED], prompt_ids=[10**9])


@pytest.mark.parametrize("wrong", [[], "abc", [1.5], [True]])
def test_wrong_prompt_ids_are_refused(thinking: fastattr.Model, wrong: Any) -> None:
    with pytest.raises(fastattr.InputError, match="expected token ids"):
        explain(thinking, [ASKED], prompt_ids=wrong)


def test_a_batch_takes_as_many_prompts_as_rows(thinking: fastattr.Model) -> None:
    with pytest.raises(fastattr.InputError, match="got 2 prompt_ids for 1 rows"):
        fastattr.attribute_batch(thinking, [(picture(), [ASKED], ANSWER)], prompt_ids=[None, None])
