"""How often `shapes` is right: `python -m fastattr.demo.evaluate --model shapes --out FILE.jsonl`.

Teacher forcing on held-out scenes: a content word counts as right when it is the model's first choice
at the place where it was predicted. Exact captions are greedy answers equal to the true description.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastattr.adapters import Model, encode, encode_response, generate, load, replay
from fastattr.demo import scenes
from fastattr.images import Visual

FIRST_SEED = scenes.HELD_OUT + 10_000_000  # apart from those of the sweep


def content_word_accuracy(model: Model, seeds: range, scale: float) -> dict[str, float]:
    """Share of content words that are the first choice, over all and by kind."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    kind_of = {word: kind for kind, words in scenes.CONTENT_WORDS.items() for word in words}
    for seed in tqdm(seeds, desc=f"scale {scale:g}", leave=False, disable=None):
        scene = scenes.make_scene(seed)
        rng = np.random.default_rng(seed)
        # a description and one question each, so that every kind of sentence is judged
        for exchange in (scenes.describe(scene), scenes.describe_in_detail(scene), scenes.questions(scene, rng)[0]):
            ids = encode_response(model, exchange.response)
            reading = replay(model, encode(model, [Visual((scene.image,))], exchange.prompt, scale=scale), ids)
            states = reading.hidden_states[list(reading.layout.predictors)]
            chosen = (states @ model.head.weight.T).argmax(dim=1)
            for token, choice in zip(ids.tolist(), chosen.tolist(), strict=True):
                kind = kind_of.get(model.decode([[token]])[0].strip())
                if kind is not None:
                    asked[kind] += 1
                    right[kind] += token == choice
    accuracy = {kind: right[kind] / asked[kind] for kind in sorted(asked)}
    return {"all": sum(right.values()) / sum(asked.values()), **accuracy}


def exact_captions(model: Model, seeds: range) -> float:
    """Share of scenes whose greedy description is word for word the true one."""
    hits = 0
    for seed in tqdm(seeds, desc="captions", leave=False, disable=None):
        scene = scenes.make_scene(seed)
        truth = scenes.describe(scene)
        encoded = encode(model, [Visual((scene.image,))], truth.prompt)
        hits += model.decode([generate(model, encoded, max_new_tokens=96).tolist()])[0] == truth.response
    return hits / len(seeds)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 0.67, 0.83, 1.0, 1.5, 2.0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model)
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.scenes)
    rows: list[dict[str, object]] = [
        {
            "figure": "content words right",
            "scenes": len(seeds),
            "scale": scale,
            **content_word_accuracy(model, seeds, scale),
        }
        for scale in arguments.scales
    ]
    rows.append({"figure": "exact captions", "scenes": len(seeds), "scale": 1.0, "all": exact_captions(model, seeds)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    print(lines, end="")
    if arguments.out is not None:
        arguments.out.write_text(lines)


if __name__ == "__main__":
    main()
