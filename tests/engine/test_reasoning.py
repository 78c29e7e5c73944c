"""Reasoning before an answer is found, with the marks of each family."""

from __future__ import annotations

import pytest

import fastattr
from fastattr.reasoning import find_reasoning
from tests.engine.family_models import PROMPT, TINY, picture

JSON = '{"color": "red"}'
DRAFT = 'maybe {"color": "green"}, or the box [10, 20]? no'


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    held = TINY["qwen2_vl"]()
    return fastattr.wrap(held.hf_model, held.processor)


def fields(why: fastattr.Attribution) -> list[tuple[str, object]]:
    return [(field.name, field.value) for field in why.fields()]


MARKED = [
    f"<think>{DRAFT}</think>\n{JSON}",
    f"<think>\n{DRAFT}\n</think>\n\n```json\n{JSON}\n```",
    f"{DRAFT}\n</think>\n{JSON}",  # the template has opened it
    f"<think>{DRAFT}</think><answer>{JSON}</answer>",
    f"◁think▷{DRAFT}◁/think▷{JSON}",
    f"[THINK]{DRAFT}[/THINK]{JSON}",
    f"<reasoning>{DRAFT}</reasoning>{JSON}",
    f"<SUMMARY>the colour</SUMMARY>\n<REASONING>{DRAFT}</REASONING>\n<CONCLUSION>{JSON}</CONCLUSION>",
    f"<thinking>{DRAFT}</thinking>{JSON}",
    f"<seed:think>{DRAFT}</seed:think>{JSON}",
    f"<|START_THINKING|>{DRAFT}<|END_THINKING|>{JSON}",
    f"<|channel>thought\n{DRAFT}<channel|>{JSON}",
    f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{JSON}<|return|>",
    f"<think>{DRAFT}</think>\n<think>{DRAFT}</think>\n{JSON}",
]


@pytest.mark.parametrize("response", MARKED)
def test_fields_are_those_of_the_answer(model: fastattr.Model, response: str) -> None:
    why = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False)
    assert why.response == response
    assert fields(why) == [("color", "red")]
    (field,) = why.fields()
    assert why.response[slice(*field.span)] == "red" and field.span[0] == response.rindex("red")


@pytest.mark.parametrize(
    "response",
    ['{"html": "</think>"}', '{"html": "</think>x"}', "The tag </think> closes it.", 'It says "</think>", twice.'],
)
def test_a_closing_mark_that_is_only_mentioned(response: str) -> None:
    assert find_reasoning(response) == ()


@pytest.mark.parametrize("between", ["\n", "\n\n", "", " \n"])
def test_a_closing_mark_whose_opening_is_in_no_text(between: str) -> None:
    draft = f"{DRAFT}</think>"
    assert find_reasoning(f"{draft}{between}{JSON}") == ((0, len(draft)),)


@pytest.mark.parametrize("response", [MARKED[0], MARKED[2]])
def test_targets_are_the_fields_of_the_answer(model: fastattr.Model, response: str) -> None:
    why = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False, targets="fields")
    assert why.explained is not None
    chosen = why.explained.nonzero().flatten().tolist()
    whole = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False)
    assert tuple(chosen) == whole.fields()[0].selection.targets[0]  # type: ignore[union-attr]
    assert chosen[0] > response.index("</think>") / 4  # far behind the draft


@pytest.mark.parametrize("response", [f"<think>{DRAFT}", f"<think>{DRAFT}</think>\n"])
def test_a_response_that_is_reasoning_alone(model: fastattr.Model, response: str) -> None:
    why = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False)
    with pytest.raises(fastattr.InputError, match=r"ends with the model's reasoning.*larger max_new_tokens"):
        why.fields()
    with pytest.raises(fastattr.InputError, match="ends with the model's reasoning"):
        fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), targets="fields")


@pytest.mark.parametrize(
    ("opening", "response", "expected"),
    [
        ("<think>\n", f"{DRAFT}</think>{JSON}", f"{DRAFT}</think>"),
        ("<think>\n", DRAFT, DRAFT),  # cut off before the end, which the response alone cannot tell
        ("<think>\n\n</think>\n\n", JSON, ""),
        ("", JSON, ""),
    ],
)
def test_reasoning_that_the_template_opened(opening: str, response: str, expected: str) -> None:
    held = TINY["qwen2_vl"]()
    held.processor.tokenizer.chat_template += "{% if add_generation_prompt %}" + opening + "{% endif %}"
    model = fastattr.wrap(held.hf_model, held.processor)
    why = fastattr.attribute(model, picture(), PROMPT, response, scales=(1.0,), evidence=False)
    assert "".join(why.response[start:stop] for start, stop in why.reasoning) == expected
    streamed = fastattr.stream(
        model, picture(), PROMPT, why.token_ids, config=fastattr.AttributionConfig(scales=(1.0,), evidence=False)
    )
    assert "".join(step.text for step in streamed) == response
    assert streamed.attribution().reasoning == why.reasoning


@pytest.mark.parametrize(
    "text",
    [
        '{"html": "<think>a</think>"}',
        "The sign says <think>.",
        "a <reasoning> tag",
        "1 < 2 [THINK",
        "",
        "</thinker>",
        "a\n<think>no end",
    ],
)
def test_texts_that_are_not_reasoning(text: str) -> None:
    assert find_reasoning(text) == ()


def test_every_mark_of_a_family_is_part_of_the_reasoning() -> None:
    for response in MARKED:
        left, end = "", 0
        for start, stop in find_reasoning(response):
            left += response[end:start]
            end = stop
        left += response[end:]
        assert DRAFT not in left and JSON in left
        assert not any(mark in left.lower() for mark in ("think", "reasoning", "analysis", "final", "channel"))
