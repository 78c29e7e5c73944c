"""What the bundled model is trained on is what transformers feeds it later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastattr
from fastattr.adapters.model import BUNDLED
from fastattr.demo import scenes
from fastattr.demo.build import VOCABULARY, build_model, build_processor
from fastattr.demo.train import (
    CELL,
    TEXT_TOKENS,
    Batch,
    SceneBatches,
    borrow_tower,
    check_fast_path,
    dense_loss,
    image_embeddings,
    language_loss,
    optimizers,
    train,
)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def batch(processor: Any) -> Batch:
    return next(iter(SceneBatches(processor, 7, ((80, 96),))))


def test_every_word_of_the_scenes_is_one_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= VOCABULARY
    for words in scenes.CONTENT_WORDS.values():
        for word in words:
            assert tokenizer.tokenize(f"a {word}")[1:] == [f"\u0120{word}"]
    assert tokenizer.decode(tokenizer("Grüße 🦊")["input_ids"]) == "Grüße 🦊"


def test_a_batch_holds_what_the_scene_shows(processor: Any, batch: Batch) -> None:
    images = len(batch.pixel_values)
    assert batch.pixel_values.shape[1:] == (3, 80, 96)
    assert batch.dense.shape[:2] == (images, 80 * 96 // CELL**2)
    torch.testing.assert_close(batch.dense.sum(-1), torch.ones(batch.dense.shape[:2]))
    assert batch.input_ids.shape == (images, TEXT_TOKENS)
    learned = batch.labels != -100
    assert learned.any(dim=1).all()
    assert torch.equal(batch.labels[learned], batch.input_ids[learned])


def test_the_fast_vision_path_is_the_librarys(processor: Any) -> None:
    model = build_model(processor.tokenizer)
    check_fast_path(model, processor)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="differs from transformers"):
        check_fast_path(model, processor)


@torch.no_grad()
def test_the_language_loss_is_the_librarys_on_the_chat_template(processor: Any) -> None:
    """One exchange through the training path and through processor, template and `labels`."""
    torch.manual_seed(0)
    model = build_model(processor.tokenizer)
    scene = scenes.make_scene(3, 96)
    exchange = scenes.describe(scene)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": exchange.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": exchange.response}]},
    ]
    inputs = processor(text=[processor.apply_chat_template(messages)], images=[scene.image], return_tensors="pt")
    ids = inputs["input_ids"][0]
    assistant = processor.tokenizer.convert_tokens_to_ids("<assistant>")
    user = processor.tokenizer.convert_tokens_to_ids("<user>")
    answer = int((ids == assistant).nonzero()[0]) + 1
    labels = ids.clone()
    labels[:answer] = -100
    theirs = model(**inputs, labels=labels[None]).loss

    text = ids[ids != model.config.image_token_id][1:]  # from <user> on, as the stream writes it
    learned = labels[ids != model.config.image_token_id][1:]
    nothing = torch.zeros(0)
    ours = Batch(inputs["pixel_values"], nothing, nothing, text[None], learned[None])
    embeddings = image_embeddings(model, inputs["pixel_values"])
    torch.testing.assert_close(
        language_loss(model, embeddings, ours, processor.tokenizer.bos_token_id, user), theirs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("seed", [-1, 5])
def test_held_out_scenes_are_never_trained_on(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}, expected 0 to 4"):
        train(
            tmp_path, dense_steps=1, language_steps=1, learning_rate=1e-3, seed=seed, dense_from=None, tower_from=None
        )


def test_both_losses_fall(processor: Any, batch: Batch) -> None:
    model = build_model(processor.tokenizer)
    tokenizer = processor.tokenizer
    few = Batch(*(value[:4] for value in vars(batch).values()))
    seen = []
    steppers = optimizers(model, 3e-3)
    for _ in range(12):
        embeddings = image_embeddings(model, few.pixel_values)
        dense = dense_loss(model, embeddings, few)
        user = tokenizer.convert_tokens_to_ids("<user>")
        language = language_loss(model, embeddings, few, tokenizer.bos_token_id, user)
        seen.append((dense.item(), language.item()))
        (dense + language).backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    assert seen[-1][0] < 0.8 * seen[0][0]
    assert seen[-1][1] < 0.8 * seen[0][1]


def test_a_borrowed_tower_is_the_finished_one_and_stays_as_it_is() -> None:
    fresh = build_model(build_processor().tokenizer, seed=3)
    finished = fastattr.load("shapes").hf_model
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    borrow_tower(fresh, BUNDLED["shapes"])
    for name, value in fresh.state_dict().items():
        same_as = finished.state_dict()[name] if "vision_tower" in name else before[name]
        torch.testing.assert_close(value, same_as)
    learned = {id(p) for stepper in optimizers(fresh, 1e-3) for group in stepper.param_groups for p in group["params"]}
    for name, parameter in fresh.named_parameters():
        assert (id(parameter) in learned) == ("vision_tower" not in name), name
