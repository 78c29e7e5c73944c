"""Which choices of the method matter: plausibility on held-out scenes of the bundled model.

    python -m benchmarks.ablation --model shapes --scenes 300 --out benchmarks/results/ablation.jsonl

The model is taught the true description of each scene. The colour and shape word of an object are nouns, scored
against that object's exact mask; articles and the like are function words. The states of a scene are read once for
every scale and layer, and all configurations are computed from them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import fastattr
from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr.demo.scenes import HELD_OUT, Scene, describe, make_scene
from fastattr.images import read_visuals
from fastattr.method import explain_states
from fastattr.metrics import Noun, Plausibility, f1_difference, plausibility, pool
from fastattr.pipeline import read_states
from fastattr.types import AttributionConfig, Method, ScaleStates

FIRST_SEED = HELD_OUT
FUNCTION_WORDS = ("a", "the", "is", "at", "in", "there", "on")

ONE_SCALE_TAM = AttributionConfig(method="tam", scales=(1.0,), evidence=False)
BASE = AttributionConfig(method="arc", scales=(1.0, 1.5, 2.0), evidence=False)

METHODS: tuple[Method, ...] = ("lens", "tam", "arc")
SCALES = ((1.0,), (1.5,), (2.0,), (1.0, 1.5), (1.0, 2.0), (1.0, 1.5, 2.0), (1.0, 1.25, 1.5, 1.75, 2.0))
ONE_AT_A_TIME: Mapping[str, Sequence[Any]] = {
    "scale_weights": ((1.0, 1.0, 1.0), (3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (1.0, 4.0, 16.0)),
    "decision_weight": (True,),
    "aggregate": ("after",),
    "arc_weight": ("relevance",),
    "top_k": (5, 10, 20, 100, 200),
    "rbo_p": (0.5, 0.7, 0.8, 0.95, 0.98),
    "context": ("prompt", "response"),
    "layer": (-2, -3),
    "filter": (False,),
}


@dataclass(frozen=True)
class Variant:
    """One configuration and the choice it stands for in the table."""

    factor: str
    value: str
    config: AttributionConfig


def variants() -> list[Variant]:
    """Every method at every choice of scales, then one change at a time to the base."""
    table = [
        Variant("method x scales", f"{method} {label(scales)}", replace(BASE, method=method, scales=scales))
        for method, scales in product(METHODS, SCALES)
    ]
    changes = [
        Variant(factor, label(value), replace(BASE, **{factor: value}))
        for factor, values in ONE_AT_A_TIME.items()
        for value in values
    ]
    return table + changes


def label(value: object) -> str:
    """A value as it stands in a table: `1 1.5 2` for several numbers."""
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def words_of(
    scene: Scene, response: str, offsets: Sequence[tuple[int, int]]
) -> tuple[list[Noun], list[tuple[int, ...]]]:
    """The nouns and the function words of a true description that names the objects in their order.

    Args:
        offsets: half-open range of characters of each response token.
    """

    def targets(start: int, stop: int) -> tuple[int, ...]:
        return tuple(t for t, (first, last) in enumerate(offsets) if first < stop and last > start)

    nouns, end = [], 0
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        start = response.index(item.name, end)
        end = start + len(item.name)
        nouns.append(Noun(targets(start, start + len(item.color)), mask))
        nouns.append(Noun(targets(end - len(item.shape), end), mask))
    found = re.finditer(rf"\b({'|'.join(FUNCTION_WORDS)})\b", response, re.IGNORECASE)
    return nouns, [targets(*match.span()) for match in found]


def score_scene(model: fastattr.Model, scene: Scene, configs: Iterable[AttributionConfig]) -> list[Plausibility]:
    """The plausibility of every configuration on one scene."""
    exchange = describe(scene)
    encoded = model.processor.tokenizer(exchange.response, add_special_tokens=False, return_offsets_mapping=True)
    nouns, functions = words_of(scene, exchange.response, encoded["offset_mapping"])
    response_ids = torch.tensor(encoded["input_ids"])
    visuals = read_visuals(scene.image)
    read: dict[tuple[float, int], ScaleStates] = {}
    scores = []
    for config in configs:
        for scale in config.scales:
            if (scale, config.layer) not in read:
                read[scale, config.layer] = read_states(
                    model, visuals, exchange.prompt, response_ids, scale=scale, layer=config.layer
                )
        maps = explain_states([read[scale, config.layer] for scale in config.scales], model.head, config)
        scores.append(plausibility(maps.image[0][:, 0], nouns, functions))
    return scores


def row(variant: Variant, scores: Mapping[AttributionConfig, Sequence[Plausibility]]) -> dict[str, Any]:
    """One line of the results: the figures of a variant and its gains in F1 with 95 % intervals."""
    mine = scores[variant.config]
    pooled = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(pool(mine)).items()}
    return {
        "factor": variant.factor,
        "value": variant.value,
        **pooled,
        "scenes": len(mine),
        "gain_over_one_scale_tam": _gain(mine, scores[ONE_SCALE_TAM]),
        "gain_over_base": _gain(mine, scores[BASE]),
        "config": asdict(variant.config),
    }


def _gain(mine: Sequence[Plausibility], other: Sequence[Plausibility]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(f1_difference(mine, other)).items()}


def run(model_name: str, n_scenes: int) -> list[dict[str, Any]]:
    """Score every variant on held-out scenes. The first row is the header."""
    model = fastattr.load(model_name, dtype=torch.float32)
    asked = variants()
    configs = list(dict.fromkeys(variant.config for variant in asked))
    seeds = range(FIRST_SEED, FIRST_SEED + n_scenes)
    by_scene = [score_scene(model, make_scene(seed), configs) for seed in tqdm(seeds, unit="scene")]
    scores = dict(zip(configs, zip(*by_scene, strict=True), strict=True))
    header = machine(f"python -m benchmarks.ablation --model {Path(model_name).name} --scenes {n_scenes}")
    header |= {
        "model": Path(model_name).name,
        "transformers": transformers.__version__,
        "first_seed": FIRST_SEED,
        "scenes": n_scenes,
        "base": asdict(BASE),
        "one_scale_tam": asdict(ONE_SCALE_TAM),
        "interval": "95 % paired bootstrap over scenes, 2000 resamples, seed 0",
    }
    return [header, *(row(variant, scores) for variant in asked)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes", help="a bundled model or a local directory")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.jsonl")
    parser.add_argument("--smoke", action="store_true", help="4 scenes, prints the table, writes nothing")
    args = parser.parse_args()
    rows = run(args.model, 4 if args.smoke else args.scenes)
    if args.smoke:
        from benchmarks.table import ablation_table

        print(ablation_table(rows[0], rows[1:]))
    else:
        print(write_jsonl(args.out, rows))


if __name__ == "__main__":
    main()
