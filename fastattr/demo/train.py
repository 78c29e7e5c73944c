"""Train `shapes` from nothing on a CPU: `python -m fastattr.demo.train --out DIR`.

Stage 1 teaches the vision tower alone: each merged patch is classified into the words of what it
shows (colour, shape, size, place), through the tied word embeddings. Without it the language model
settles on its template and learns shapes late. Stage 2 adds the language loss over descriptions and
questions and keeps a little of the dense loss. Images come in several sizes, so that the scales
1 to 2 used for explanations stay in distribution.

`--tower-from DIR` makes a control instead: the vision tower of a finished model, frozen, under a new projector and a
new language model that see the language loss alone. Nothing ties its image tokens to words but what it had to say.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import Mistral3ForConditionalGeneration

from fastattr.demo import scenes
from fastattr.demo.build import BASE_SIDE, MERGE, PATCH, build_model, build_processor

CELL = PATCH * MERGE
DENSE_SIDES = ((96, 96), (96, 96), (80, 96), (96, 80))
SIDES = ((96, 96), (96, 96), (96, 96), (80, 96), (96, 80), (128, 128), (144, 144), (144, 144), (192, 192))
SCENES_PER_BATCH = 32  # at BASE_SIDE; fewer for larger pictures, so that a batch holds as many patches
DENSE_WORDS = (("color", 0.35), ("shape", 0.35), ("size", 0.15), ("place", 0.15))
TEXT_TOKENS = 112
STREAM = 1_000_000  # seeds that a stage may draw


@dataclass(frozen=True)
class Batch:
    """One batch of equally sized pictures with a dialogue each."""

    pixel_values: torch.Tensor  # float [image 3 height width], normalised
    dense: torch.Tensor  # float [image cell vocab], rows sum to one
    dense_weight: torch.Tensor  # float [image cell]
    input_ids: torch.Tensor  # int [image seq], right-padded, text only
    labels: torch.Tensor  # int [image seq], -100 where nothing is learned


class SceneBatches(IterableDataset[Batch]):
    """An endless, seeded stream of batches."""

    def __init__(self, processor: Any, start: int, sides: tuple[tuple[int, int], ...]) -> None:
        self.tokenizer = processor.tokenizer
        image_processor = processor.image_processor
        self.mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(image_processor.image_std).view(3, 1, 1)
        self.start = start
        self.sides = sides
        self.word_id = {
            word: self.tokenizer.convert_tokens_to_ids("\u0120" + word)
            for words in scenes.CONTENT_WORDS.values()
            for word in words
        }

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.start)
        seed = self.start
        while True:
            height, width = self.sides[int(rng.integers(len(self.sides)))]
            count = max(4, round(SCENES_PER_BATCH * BASE_SIDE**2 / (height * width)))
            batch = [scenes.make_scene(seed + k, height, width) for k in range(count)]
            seed += count
            yield self._collate(batch, rng)

    def _collate(self, batch: list[scenes.Scene], rng: np.random.Generator) -> Batch:
        pixels = torch.stack([torch.from_numpy(np.array(scene.image)).permute(2, 0, 1) for scene in batch])
        targets, weights = zip(*(self._dense_target(scene) for scene in batch), strict=True)
        input_ids = torch.zeros(len(batch), TEXT_TOKENS, dtype=torch.long)
        labels = torch.full((len(batch), TEXT_TOKENS), -100)
        for row, scene in enumerate(batch):
            ids, learned = self._dialogue(scene, rng)
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(learned)
        normalised = (pixels / 255.0 - self.mean) / self.std
        return Batch(normalised, torch.stack(targets), torch.stack(weights), input_ids, labels)

    def _dense_target(self, scene: scenes.Scene) -> tuple[torch.Tensor, torch.Tensor]:
        masks = torch.from_numpy(scene.masks).float()
        coverage = F.avg_pool2d(masks, CELL).flatten(1)  # [object cell]
        share, owner = coverage.max(dim=0)
        target = torch.zeros(coverage.shape[1], len(self.tokenizer))
        background = share < 0.15
        target[background, self.word_id[scene.background]] = 1.0
        for index, item in enumerate(scene.objects):
            mine = ~background & (owner == index)
            for kind, weight in DENSE_WORDS:
                words = str(getattr(item, kind)).split()
                for word in words:
                    target[mine, self.word_id[word]] += weight / len(words)
        return target, torch.where(background, 0.1, 1.0)

    def _dialogue(self, scene: scenes.Scene, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """One description and questions, in random order, as many as fit."""
        description = (scenes.describe, scenes.describe_in_detail, scenes.list_objects)[
            int(rng.choice(3, p=(0.5, 0.35, 0.15)))
        ]
        said = scenes.questions(scene, rng)
        said.insert(int(rng.integers(3)), description(scene))
        special = self.tokenizer.convert_tokens_to_ids
        ids: list[int] = []
        learned: list[int] = []
        for exchange in said:
            question = [
                special("<user>"),
                *self.tokenizer.encode(exchange.prompt, add_special_tokens=False),
                special("<assistant>"),
            ]
            answer = [*self.tokenizer.encode(exchange.response, add_special_tokens=False), special("</s>")]
            if len(ids) + len(question) + len(answer) <= TEXT_TOKENS:
                ids += question + answer
                learned += [-100] * len(question) + answer
        return ids, learned


def image_embeddings(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Projected image tokens [image cell dim] of equally sized pictures.

    The library's tower packs a batch into one sequence under a dense block mask, quadratic in the
    batch. Here the batch stays a batch; `check_fast_path` compares the two.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    grid = tower.patch_conv(pixel_values)
    rows, columns = grid.shape[-2:]
    states = tower.ln_pre(grid.flatten(2).transpose(1, 2))
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    rotary = tower.patch_positional_embedding(states, positions)
    for layer in tower.transformer.layers:
        states = layer(states, None, position_embeddings=rotary)
    states = projector.norm(states)
    merged = F.unfold(states.transpose(1, 2).unflatten(2, (rows, columns)), MERGE, stride=MERGE).transpose(1, 2)
    merged = projector.patch_merger.merging_layer(merged)
    return projector.linear_2(projector.act(projector.linear_1(merged)))


def dense_loss(model: Any, embeddings: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each image token against the words of what it shows."""
    logits = embeddings.float() @ model.lm_head.weight.float().T
    loss = -(batch.dense * logits.log_softmax(-1)).sum(-1)
    return (loss * batch.dense_weight).sum() / batch.dense_weight.sum()


def language_loss(model: Any, embeddings: torch.Tensor, batch: Batch, start_id: int, user_id: int) -> torch.Tensor:
    """Next-token cross-entropy of the answers, given `<s><user>` image, text."""
    embed = model.get_input_embeddings()
    rows = batch.input_ids.shape[0]
    start = embed(torch.tensor([start_id, user_id])).expand(rows, 2, -1)
    # the first <user> stands before the image; the text row begins after it
    sequence = torch.cat([start, embeddings, embed(batch.input_ids[:, 1:])], dim=1)
    states = model.model.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    before = states[:, -labels.shape[1] - 1 : -1]
    logits = before @ model.lm_head.weight.T
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@torch.no_grad()
def check_fast_path(model: Any, processor: Any) -> None:
    """`image_embeddings` must equal the library's own path.

    Raises:
        RuntimeError: when they differ by more than rounding.
    """
    inputs = processor.image_processor([scenes.make_scene(1, 96, 80).image], return_tensors="pt")
    theirs = model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
    gap = (image_embeddings(model, inputs["pixel_values"])[0] - theirs).abs().max().item()
    if not gap <= 1e-4:  # NaN too
        raise RuntimeError(f"the fast vision path differs from transformers' by {gap:.2e}, expected at most 1e-4")


def optimizers(model: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and the patch convolution; frozen ones are left out."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if hidden else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def dense_accuracy(model: Any, embeddings: torch.Tensor, batch: Batch, word_id: dict[str, int]) -> dict[str, float]:
    """Share of object cells whose best word of each kind is right."""
    logits = embeddings.float() @ model.lm_head.weight.float().T
    cells = batch.dense_weight == 1.0
    result = {}
    for kind, words in (("color", scenes.COLORS), ("shape", scenes.SHAPES), ("size", scenes.SIZES)):
        ids = torch.tensor([word_id[word] for word in words])
        right = logits[cells][:, ids].argmax(-1) == batch.dense[cells][:, ids].argmax(-1)
        result[kind] = round(right.float().mean().item(), 3)
    return result


def borrow_tower(model: Any, source: str | Path) -> None:
    """Give a fresh model the frozen vision tower of a finished one."""
    finished = Mistral3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(finished.model.vision_tower.state_dict())
    model.model.vision_tower.requires_grad_(False)


def train(
    out: Path,
    *,
    dense_steps: int,
    language_steps: int,
    learning_rate: float,
    seed: int,
    dense_from: Path | None,
    tower_from: Path | None,
) -> None:
    """Both stages, then the weights in half precision with their processor.

    `dense_from` holds a saved stage 1, which is then not repeated. With `tower_from` there is no stage 1 and no dense
    loss, see the module.

    Raises:
        ValueError: `seed` would draw scenes that are held out.
    """
    most = scenes.HELD_OUT // (2 * STREAM) - 1
    if not 0 <= seed <= most:
        raise ValueError(f"seed is {seed}, expected 0 to {most}: later ones would train on held-out scenes")
    processor = build_processor()
    tokenizer = processor.tokenizer
    if dense_from is None:
        model = build_model(tokenizer, seed)
    else:
        model = Mistral3ForConditionalGeneration.from_pretrained(dense_from, dtype=torch.float32)
        dense_steps = 0
    if tower_from is not None:
        borrow_tower(model, tower_from)
        dense_steps = 0
    dense_share = 0.1 if tower_from is None else 0.0
    model.set_attn_implementation("eager")  # on a CPU its backward in bfloat16 is twice as fast as SDPA's
    check_fast_path(model, processor)
    torch._dynamo.config.cache_size_limit = 4 * len(set(SIDES))
    embed_images = torch.compile(image_embeddings, dynamic=False)
    predict = torch.compile(language_loss, dynamic=False)
    begun = time.monotonic()
    stages = (("dense", dense_steps, DENSE_SIDES), ("language", language_steps, SIDES))
    for number, (stage, steps, sides) in enumerate(stages):
        stream = SceneBatches(processor, (2 * seed + number) * STREAM, sides)
        batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8))
        steppers = optimizers(model, learning_rate)
        for step in range(steps):
            batch = next(batches)
            scale = min(1.0, (step + 1) / 100, 1.25 * (1 - step / steps))
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = learning_rate * max(scale, 0.01)
            with torch.autocast("cpu", torch.bfloat16):
                embeddings = embed_images(model, batch.pixel_values)
                dense = dense_loss(model, embeddings, batch)
                language = torch.zeros(())
                if stage == "language":
                    language = predict(
                        model, embeddings, batch, tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<user>")
                    )
            loss = dense if stage == "dense" else language + dense_share * dense
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss is {loss.item()} at {stage} step {step}; lower --learning-rate")
            if step % 50 == 0:
                print(
                    json.dumps(
                        {
                            "stage": stage,
                            "step": step,
                            "dense": round(dense.item(), 4),
                            "language": round(language.item(), 4),
                            "seconds": round(time.monotonic() - begun),
                            "image_tokens": dense_accuracy(model, embeddings, batch, stream.word_id),
                        }
                    ),
                    flush=True,
                )
            if step % 500 == 499:
                save(model, processor, out)
        save(model, processor, out / "dense" if stage == "dense" else out)


def save(model: Any, processor: Any, out: Path) -> None:
    """Weights as fp16, beside tokenizer, processor and chat template."""
    out.mkdir(parents=True, exist_ok=True)
    # the head is tied to the embeddings; in half precision they would no longer share their memory
    half = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(out, state_dict=half)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dense-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dense-from", type=Path, help="skip stage 1 and start from its saved result")
    parser.add_argument("--tower-from", type=Path, help="the control: the frozen tower of this model, all else new")
    arguments = parser.parse_args()
    train(
        arguments.out,
        dense_steps=arguments.dense_steps,
        language_steps=arguments.language_steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        dense_from=arguments.dense_from,
        tower_from=arguments.tower_from,
    )


if __name__ == "__main__":
    main()
