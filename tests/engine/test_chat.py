"""Conversations: whose words are context, and where their pictures stand."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
from tokenizers.normalizers import NFC

import fastattr
from fastattr import Chat, adapters
from fastattr.chat import read_prompt
from fastattr.images import read_visuals
from tests.engine.family_models import ANSWER, PROMPT, TINY, picture

FAMILIES = ("qwen2_vl", "llava_clip", "mistral3", "idefics3", "gemma3")  # byte and word tokenizers, breaks, tiles


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> fastattr.Model:
    held = TINY[request.param]()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture(scope="module")
def qwen() -> fastattr.Model:
    held = TINY["qwen2_vl"]()
    return fastattr.wrap(held.hf_model, held.processor)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


IMAGE = {"type": "image"}
TURNS = [
    turn("user", "Look at this:", IMAGE, "and at this:", IMAGE, "What is red?"),
    turn("assistant", "The circle. Here it is again:", IMAGE),
    turn("user", "And what is blue?"),
]
PICTURES = (picture(), picture(40, 80, 1), picture(90, 50, 2))


def said(model: fastattr.Model, encoded: adapters.EncodedExample) -> str:
    return str(model.processor.tokenizer.decode(encoded.input_ids[list(encoded.prompt)]))


def test_what_everybody_said_is_context(model: fastattr.Model) -> None:
    """All texts of all turns, in order, and not a token of the chat template."""
    encoded = adapters.encode(model, read_visuals(list(PICTURES)), Chat(TURNS))
    words = said(model, encoded)
    expected = [part["text"] for message in TURNS for part in message["content"] if part["type"] == "text"]
    assert "".join(words.split()) == "".join("".join(expected).split())


def test_pictures_stand_where_the_messages_put_them(model: fastattr.Model) -> None:
    """Images lie between the words, in their order, each with the grid it has alone."""
    encoded = adapters.encode(model, read_visuals(list(PICTURES)), Chat(TURNS))
    alone = [adapters.encode(model, read_visuals(each), PROMPT).groups[0] for each in PICTURES]
    assert [group.grid for group in encoded.groups] == [group.grid for group in alone]
    assert [group.views for group in encoded.groups] == [group.views for group in alone]
    first, second, third = encoded.groups
    assert first.positions[-1] < second.positions[0] and second.positions[-1] < third.positions[0]
    texts = list(encoded.prompt)
    assert texts[0] < first.positions[0], "words before the first image"
    assert any(first.positions[-1] < place < second.positions[0] for place in texts), "words between two images"
    assert any(second.positions[-1] < place < third.positions[0] for place in texts)
    assert texts[-1] > third.positions[-1]


@pytest.mark.parametrize("word", ["user", "assistant", "model", "image", "end", ":", "USER", "1", "t"])
def test_words_of_the_template_are_not_the_users(model: fastattr.Model, word: str) -> None:
    """Both turns say a word that the template writes too; each is found once, directly before what ends its turn."""
    chat = Chat([turn("user", IMAGE, word), turn("assistant", "Yes."), turn("user", word)])
    plain = Chat([turn("user", IMAGE, "zebra"), turn("assistant", "Yes."), turn("user", "zebra")])
    encoded, other = (adapters.encode(model, read_visuals(picture()), each) for each in (chat, plain))
    assert "".join(said(model, encoded).split()) == f"{word}Yes.{word}"
    # counted from the end, the last word lies where the last zebra does, and so does the answer between
    assert len(encoded.input_ids) - encoded.prompt[-1] == len(other.input_ids) - other.prompt[-1]


def test_one_turn_is_what_a_text_is(model: fastattr.Model) -> None:
    """Text and messages that say the same are the same tokens, and the same explanation."""
    chat = [turn("user", IMAGE, PROMPT)]
    whys = [fastattr.attribute(model, picture(), each, ANSWER, scales=(1.0,)) for each in (PROMPT, chat, Chat(chat))]
    for why in whys[1:]:
        assert why.context_tokens == whys[0].context_tokens and why.prompt == PROMPT
        assert torch.equal(why.image[0], whys[0].image[0])


def test_pictures_within_the_messages(qwen: fastattr.Model) -> None:
    inline = [
        turn("user", {"type": "image", "image": PICTURES[0]}, "What is red?", {"type": "image", "image": PICTURES[1]})
    ]
    apart = [turn("user", IMAGE, "What is red?", IMAGE)]
    one = fastattr.attribute(qwen, None, inline, ANSWER, scales=(1.0,))
    two = fastattr.attribute(qwen, list(PICTURES[:2]), apart, ANSWER, scales=(1.0,))
    assert len(one.image) == 2
    for mine, theirs in zip(one.image, two.image, strict=True):
        assert torch.equal(mine, theirs)


def test_a_change_in_one_picture_does_not_move_those_before_it(qwen: fastattr.Model) -> None:
    """Three images over two turns: states of the first picture cannot know the last one."""
    whys = [
        fastattr.attribute(qwen, [*PICTURES[:2], last], TURNS, ANSWER, scales=(1.0,), method="lens", filter=False)
        for last in (PICTURES[2], picture(90, 50, 7))
    ]
    span = [why.raw_range[:, 1] - why.raw_range[:, 0] for why in whys]
    raw = [
        why.image[0] * scale[:, None, None, None] + why.raw_range[:, 0, None, None, None]
        for why, scale in zip(whys, span, strict=True)
    ]
    torch.testing.assert_close(raw[0], raw[1], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(whys[0].image[2], whys[1].image[2], atol=1e-3)


def test_system_prompt_and_tools() -> None:
    """What the system says is context; what a template writes of tools is in the sequence and no context."""
    held = TINY["qwen2_vl"]()
    held.processor.tokenizer.chat_template = (
        "{% if tools %}TOOLS{% for tool in tools %} {{ tool['name'] }}{% endfor %}\n{% endif %}"
        + held.processor.tokenizer.chat_template
    )

    class WithTools:
        """A processor passes tools on to its tokenizer."""

        tokenizer = held.processor.tokenizer
        batch_decode = held.processor.batch_decode

        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            return self.tokenizer.apply_chat_template(messages, **options)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return held.processor(*args, **options)

    model = fastattr.wrap(held.hf_model, WithTools())
    messages = [turn("system", "Be brief."), turn("user", IMAGE, "What is red?")]
    plain = adapters.encode(model, read_visuals(picture()), Chat(messages))
    tooled = adapters.encode(model, read_visuals(picture()), Chat(messages, tools=[{"name": "measure"}]))
    assert said(model, plain).split() == said(model, tooled).split() == ["Be", "brief.What", "is", "red?"]
    everything = model.processor.tokenizer.decode(tooled.input_ids)
    assert "TOOLS measure" in everything
    assert len(tooled.input_ids) > len(plain.input_ids)


def test_a_captured_conversation(qwen: fastattr.Model) -> None:
    encoded = adapters.encode(qwen, read_visuals(list(PICTURES)), Chat(TURNS))
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with fastattr.capture(qwen) as states:
        out = qwen.hf_model.generate(
            **inputs, do_sample=False, max_new_tokens=4, suppress_tokens=[*qwen.placeholder_ids]
        )
    seen = states.attribute(out, image=list(PICTURES), prompt=TURNS)
    again = fastattr.attribute(qwen, list(PICTURES), TURNS, seen.token_ids, scales=(1.0,), evidence=False)
    assert seen.context_tokens == again.context_tokens
    for mine, theirs in zip(seen.image, again.image, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    told = states.attribute(out, prompt=TURNS)  # without the pictures
    assert told.context_tokens == seen.context_tokens


def test_streams_and_batches_take_conversations(qwen: fastattr.Model) -> None:
    config = fastattr.AttributionConfig(scales=(1.0,))
    ids = adapters.encode_response(qwen, ANSWER).tolist()
    whole = fastattr.attribute(qwen, list(PICTURES), TURNS, ids, scales=(1.0,))
    stream = fastattr.stream(qwen, list(PICTURES), TURNS, ids, config=config)
    assert len(list(stream)) == len(ids)
    (row, other) = fastattr.attribute_batch(qwen, [(list(PICTURES), TURNS, ids), (picture(), PROMPT, ANSWER)], config)
    assert len(other.image) == 1
    for found in (stream.attribution(), row):
        assert found.prompt == whole.prompt
        for mine, theirs in zip(found.image, whole.image, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "messages", "told"),
    [
        (picture(), [], "the last message must be what the model answers to, but there is none"),
        (picture(), [turn("user", IMAGE, "a"), turn("assistant", "b")], "pass it as response= instead"),
        (picture(), [{"content": "a"}], "expected a mapping with a role and content"),
        (picture(), ["a"], "expected a mapping with a role and content"),
        (picture(), [turn("user", {"type": "audio"}, "a")], r"holds the part \{'type': 'audio'\}"),
        (picture(), [{"role": "user", "content": 5}], "expected text or parts"),
        (picture(), [turn("user", {"type": "text"})], "holds a text part without text"),
        (picture(), [turn("user", IMAGE, "  ")], "the messages hold no text"),
        (picture(), [turn("user", "a")], "got 1 images for messages with 0 image parts"),
        ([picture()] * 3, [turn("user", IMAGE, "a", IMAGE)], "got 3 images for messages with 2 image parts"),
        (None, [turn("user", IMAGE, "a")], "got no image; pass image=, or put the pictures into the parts"),
        (picture(), [turn("user", {"type": "image", "image": picture()}, "a")], "pass them in one of the two ways"),
        (
            None,
            [turn("user", {"type": "image", "image": picture()}, IMAGE, "a")],
            "1 of 2 picture parts hold no picture",
        ),
        (picture(), 5, "the messages are a int, expected a list of mappings"),
        (None, PROMPT, "image is a NoneType"),
        (
            [[picture()] * 2],
            [turn("user", IMAGE, "a")],
            "picture part 1 is an image, but a video of 2 frames was given",
        ),
    ],
)
def test_broken_conversations_say_what_is_wrong(image: Any, messages: Any, told: str) -> None:
    with pytest.raises((fastattr.InputError, fastattr.ImageError), match=told):
        read_prompt(image, messages)


BROKEN = "a cat \ud83d"  # as of JSON that was cut within an emoji


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: fastattr.attribute(model, picture(), BROKEN, ANSWER),
        lambda model: fastattr.attribute(model, picture(), [turn("user", {"type": "image"}, BROKEN)], ANSWER),
        lambda model: fastattr.attribute(model, picture(), PROMPT, BROKEN),
        lambda model: fastattr.attribute_batch(model, [(picture(), BROKEN, ANSWER)]),
        lambda model: fastattr.stream(model, picture(), BROKEN),
    ],
)
def test_text_with_half_a_character_is_refused(qwen: fastattr.Model, ask: Any) -> None:
    with pytest.raises(fastattr.InputError, match=r"holds '\\ud83d' at character 6, half of a character"):
        ask(qwen)


def test_the_same_word_in_every_turn(model: fastattr.Model) -> None:
    """Each is found in its own turn, in order, and not the template's."""
    chat = Chat([turn("user", IMAGE, "Yes"), turn("assistant", "Yes"), turn("user", "Yes")])
    encoded = adapters.encode(model, read_visuals(picture()), chat)
    other = adapters.encode(
        model, read_visuals(picture()), Chat([turn("user", IMAGE, "No"), turn("assistant", "Yes"), turn("user", "No")])
    )
    assert "".join(said(model, encoded).split()) == "YesYesYes"
    behind, theirs = (len(each.input_ids) - each.prompt[-1] for each in (encoded, other))
    assert behind == theirs


@pytest.mark.parametrize(
    "words", ["cafe\u0301 ou the\u0301 ?", "  two   spaces\tand\na line ", "\N{SNOWMAN} \N{PILE OF POO}"]
)
def test_text_that_a_tokenizer_normalises(qwen: fastattr.Model, words: str) -> None:
    """Qwen's tokenizers compose accents (NFC): the tokens of the text are found although its characters changed."""
    held = TINY["qwen2_vl"]()
    held.processor.tokenizer.backend_tokenizer.normalizer = NFC()
    model = fastattr.wrap(held.hf_model, held.processor)
    encoded = adapters.encode(model, read_visuals(picture()), words)
    expected = unicodedata.normalize("NFC", words).strip()
    assert said(model, encoded).strip() == expected


def test_special_tokens_alone_are_no_prompt(qwen: fastattr.Model) -> None:
    with pytest.raises(fastattr.InputError, match="holds special tokens alone"):
        fastattr.attribute(qwen, picture(), "<|im_end|>", ANSWER)


def test_a_word_of_the_template_does_not_stand_for_a_turn_that_it_leaves_out() -> None:
    held = TINY["qwen2_vl"]()
    template = held.processor.tokenizer.chat_template
    held.processor.tokenizer.chat_template = template.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}", 1
    )
    model = fastattr.wrap(held.hf_model, held.processor)
    chat = [turn("system", "user"), turn("user", IMAGE, "What is red?")]
    why = fastattr.attribute(model, picture(), chat, ANSWER, scales=(1.0,), evidence=False)
    plain = fastattr.attribute(model, picture(), chat[1:], ANSWER, scales=(1.0,), evidence=False)
    assert why.context_tokens == plain.context_tokens and torch.equal(why.image[0], plain.image[0])
    assert "the chat template leaves out what the system said, 'user', so it is not context" in why.notes


@pytest.mark.parametrize("tools", ["abc", {"a": 1}, 5])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(fastattr.InputError, match="expected a list of them"):
        Chat([turn("user", "a")], tools=tools)


def test_a_placeholder_in_an_earlier_turn_is_refused(qwen: fastattr.Model) -> None:
    chat = [turn("user", IMAGE, "<|image_pad|>"), turn("assistant", "b"), turn("user", "c")]
    with pytest.raises(fastattr.InputError, match="holds the image placeholder"):
        fastattr.attribute(qwen, picture(), chat, ANSWER)


def test_a_template_that_leaves_out_what_the_user_said_is_refused(qwen: fastattr.Model) -> None:
    held = TINY["qwen2_vl"]()
    held.processor.tokenizer.chat_template = held.processor.tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages %}{% if loop.index0 != 1 %}", 1
    ).replace("{% endfor %}{% if add_generation_prompt", "{% endif %}{% endfor %}{% if add_generation_prompt", 1)
    model = fastattr.wrap(held.hf_model, held.processor)
    chat = [turn("user", IMAGE, "What is red?"), turn("user", "Be brief."), turn("user", "What is blue?")]
    with pytest.raises(fastattr.TokenLayoutError, match=r"'Be brief\.' is not in the text the model reads"):
        fastattr.attribute(model, picture(), chat, ANSWER)
