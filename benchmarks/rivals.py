"""fastattr beside other attribution methods on the same model, scenes and words.

    python -m benchmarks.rivals --n 100

The bundled model is taught the true description of each scene. Maps of the colour and shape words are judged against
the exact mask of their object, maps of some function words by how dark they stay, and some of the nouns by hiding and
showing the picture in the map's order, on one grid of patches for all. Prices are what a method takes for its maps,
the encoding of the picture included.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import fastattr
from benchmarks.cost import cpu_s, in_fresh_process, one_thread, progress
from benchmarks.record import RESULTS, machine, rounded, write_jsonl
from benchmarks.rival_maps import RIVALS, Rival
from benchmarks.rival_model import Case, counted
from fastattr.adapters import encode_response, log_probs_of_images
from fastattr.datasets import function_spans
from fastattr.datasets.scenes import FUNCTION_WORDS, scene_mentions
from fastattr.demo.scenes import HELD_OUT, describe, make_scene
from fastattr.evaluate.judging import MASK, RANDOM, on_grid, tokens_at
from fastattr.images import Visual
from fastattr.metrics import Noun, Plausibility, difference, paired_bootstrap, plausibility, pool
from fastattr.metrics.faithfulness import cut_picture, faithfulness, map_order, mask_order, random_order
from fastattr.text import decode_tokens

FIRST_SEED = HELD_OUT + 20_000_000  # apart from the scenes on which options of fastattr were compared
REFERENCE = "fastattr best"  # fixed before any of these scenes was looked at
N_FUNCTIONS = 2  # a scene, drawn at random
N_JUDGED = 2  # a scene, drawn at random, whose maps are judged by hiding patches
GRID = (1, 12, 12)  # of the patches
STEPS = 10
WORKERS = 2
LEFT_OUT = {
    "AttnLRP as its authors' package computes it": "lxt 2.1 cannot be imported beside transformers 5, of which it needs "
    "functions that are gone, and has no map for Mistral; our own form stands in"
}
HANDICAP = (
    "fastattr's maps are normalised together with what the text scores; the others know the image alone and are stretched "
    "to [0, 1] word by word, what speaks against a word cut off, so that each of their function words lights up somewhere"
)


@dataclass(frozen=True)
class Words:
    """What is explained in one scene.

    Attributes:
        nouns: colour and shape word of every object.
        functions: the target indices of the drawn function words.
        judged: indices into `nouns`, those judged by hiding patches.
    """

    nouns: tuple[Noun, ...]
    functions: tuple[tuple[int, ...], ...]
    judged: tuple[int, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """Every response token that some method is asked about, ascending."""
        return tuple(sorted({t for each in (*(noun.targets for noun in self.nouns), *self.functions) for t in each}))


@dataclass(frozen=True)
class Price:
    """What a method took for the maps of one scene.

    Attributes:
        tokens: response tokens it explained.
        forwards, backwards: sequences through the decoder.
    """

    tokens: int
    cpu_s: float
    forwards: int
    backwards: int


@dataclass(frozen=True)
class Score:
    """One method, or one control, on one scene.

    Attributes:
        deletion, insertion: mean areas of the judged nouns, see `Curve.auc`.
        plausibility, price: None for a control, which has an order and no map.
    """

    deletion: float
    insertion: float
    plausibility: Plausibility | None = None
    price: Price | None = None


# --- one scene -------------------------------------------------------------------------------------


@cache
def bundled() -> fastattr.Model:
    """The model, once in each process."""
    return fastattr.load("shapes")


def case_of(seed: int) -> tuple[Case, Words]:
    """The true description of a scene, and which of its words are explained; the seed decides the draws."""
    model, scene = bundled(), make_scene(seed)
    exchange = describe(scene)
    case = Case(model, Visual((scene.image,)), exchange.prompt, encode_response(model, exchange.response))
    text = decode_tokens(case.response_ids.tolist(), model.decode)
    mentions = scene_mentions(scene, text.text)
    nouns = tuple(Noun(tokens_at(text, each.span), each.mask) for each in mentions if each.mask is not None)
    spans = function_spans(text.text, FUNCTION_WORDS)
    rng = np.random.default_rng(seed)
    drawn, judged = (
        np.sort(rng.permutation(len(each))[:n]).tolist() for each, n in ((spans, N_FUNCTIONS), (nouns, N_JUDGED))
    )
    return case, Words(nouns, tuple(tokens_at(text, spans[k]) for k in drawn), tuple(judged))


def explain(rival: Rival, case: Case, targets: Sequence[int]) -> tuple[Tensor, Price]:
    """The maps of a method as it gives them, `[target h w]`, and what they took.

    Tokens that it was not asked about have maps of zeros.
    """
    asked = range(len(case.response_ids)) if rival.every_token else targets
    with counted(case.model.hf_model) as passes:
        found: list[Tensor] = []
        spent = cpu_s(lambda: found.append(rival.explain(case, asked)))
    (maps,) = found
    every = torch.zeros(len(case.response_ids), *maps.shape[1:])
    every[list(asked)] = maps
    return every, Price(len(asked), spent, passes.forwards, passes.backwards)


def stretched(maps: Tensor) -> Tensor:
    """What speaks for each token, `[target h w]` cut at 0 and stretched to [0, 1]; a map of one value gives zeros."""
    low, high = maps.relu().flatten(1).aminmax(dim=1)
    span = (high - low)[:, None, None]
    return torch.where(span > 0, (maps.relu() - low[:, None, None]) / torch.where(span > 0, span, 1.0), 0.0)


def score_scene(seed: int, methods: Sequence[Rival]) -> dict[str, Score]:
    """Every method and both controls on the scene of `seed`. Versions of the picture are read once for all of them."""
    case, words = case_of(seed)
    explained = {rival.name: explain(rival, case, words.targets) for rival in methods}
    judged = [words.nouns[k] for k in words.judged]
    patches = cut_picture(case.visual, GRID)
    orders = {
        name: [map_order(on_grid(maps[list(noun.targets)].amax(0, keepdim=True), GRID)) for noun in judged]
        for name, (maps, _) in explained.items()
    }
    orders[RANDOM] = [random_order(len(patches), seed + k) for k in range(len(judged))]
    orders[MASK] = [mask_order(patches, noun.mask) for noun in judged]
    faithful = faithfulness(
        lambda versions: log_probs_of_images(case.model, ([v] for v in versions), case.prompt, case.response_ids),
        patches,
        [order for each in orders.values() for order in each],
        [noun.targets for noun in judged] * len(orders),
        steps=STEPS,
    )
    deletion, insertion = (
        curve.auc.view(len(orders), len(judged)).mean(1).tolist() for curve in (faithful.deletion, faithful.insertion)
    )
    areas = dict(zip(orders, zip(deletion, insertion, strict=True), strict=True))
    scores = {name: Score(*areas[name]) for name in (RANDOM, MASK)}
    for rival in methods:
        maps, price = explained[rival.name]
        plausible = plausibility(maps if rival.normalised else stretched(maps), words.nouns, words.functions)
        scores[rival.name] = Score(*areas[rival.name], plausible, price)
    return scores


# --- all scenes ------------------------------------------------------------------------------------


def row(name: str, scores: Mapping[str, Sequence[Score]], reference: str, peak_bytes: int | None) -> dict[str, Any]:
    """One line of the results: figures, prices, and differences to the reference with 95 % intervals."""
    mine, other = scores[name], scores[reference]
    line: dict[str, Any] = {"method": name, "scenes": len(mine)}
    for figure in ("deletion", "insertion"):
        values, others = (np.array([getattr(score, figure) for score in each]) for each in (mine, other))
        line[figure] = rounded(paired_bootstrap(values, np.zeros_like(values)))
        line[f"{figure}_over_reference"] = rounded(paired_bootstrap(values, others))
    plausible = [score.plausibility for score in mine if score.plausibility is not None]
    prices = [score.price for score in mine if score.price is not None]
    if not plausible:
        return line
    pooled = pool(plausible)
    referred = [score.plausibility for score in other if score.plausibility is not None]
    for figure in ("obj", "func", "f1", "pointing"):
        line[figure] = round(getattr(pooled, figure), 4)
        line[f"{figure}_over_reference"] = rounded(difference(plausible, referred, figure))
    tokens = sum(price.tokens for price in prices)
    return line | {
        "n_nouns": pooled.n_nouns,
        "n_functions": pooled.n_functions,
        "n_dropped": pooled.n_dropped,
        "tokens": tokens,
        "cpu_s_per_token": float(f"{sum(price.cpu_s for price in prices) / tokens:.4g}"),
        "forwards_per_token": round(sum(price.forwards for price in prices) / tokens, 3),
        "backwards_per_token": round(sum(price.backwards for price in prices) / tokens, 3),
        "peak_bytes": peak_bytes,
    }


def one_call(name: str) -> Callable[[], float]:
    """One method's maps of the scene with most objects among the first ten, for a process of its own."""
    rival = next(each for each in RIVALS if each.name == name)
    case, words = max((case_of(seed) for seed in range(FIRST_SEED, FIRST_SEED + 10)), key=lambda it: len(it[1].nouns))
    explain(rival, case, words.targets[:1])  # the first call loads libraries
    return lambda: explain(rival, case, words.targets)[1].cpu_s


def score_scenes(n: int) -> dict[str, list[Score]]:
    """Every method and both controls on `n` scenes, in their order, in `WORKERS` processes."""
    seeds = range(FIRST_SEED, FIRST_SEED + n)
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), _start) as workers:
        by_scene = list(tqdm(workers.map(partial(score_scene, methods=RIVALS), seeds), total=n, unit="scene"))
    return {name: [scene[name] for scene in by_scene] for name in by_scene[0]}


def _start() -> None:
    """One thread a process, and first uses, which load libraries, before anything is priced."""
    torch.set_num_threads(1)
    case, words = case_of(FIRST_SEED - 1)
    for rival in (RIVALS[0], RIVALS[-1]):
        rival.explain(case, words.targets[:1])


def peak_bytes() -> dict[str, int | None]:
    """Memory that each method's maps of one scene take over the loaded model, each in a process of its own."""
    named = progress(RIVALS, lambda rival: rival.name)
    return {rival.name: in_fresh_process(one_call, rival.name).peak_bytes for rival in named}


def run(n: int, *, memory: bool = True) -> list[dict[str, Any]]:
    """Score every method on `n` scenes. The first row is the header.

    Args:
        memory: whether to start a process for each method to see its peak.
    """
    scores = score_scenes(n)
    peaks = peak_bytes() if memory else {}
    with one_thread():
        header = machine(f"python -m benchmarks.rivals --n {n}")
    header |= {
        "model": "shapes",
        "transformers": transformers.__version__,
        "captum": version("captum"),
        "first_seed": FIRST_SEED,
        "scenes": n,
        "explained": f"every noun; {N_FUNCTIONS} function words a scene, drawn at random",
        "judged": f"{N_JUDGED} nouns a scene, drawn at random, {GRID[1]} x {GRID[2]} patches, {STEPS} steps, grey",
        "reference": REFERENCE,
        "interval": "95 % paired bootstrap over scenes, 2000 resamples, seed 0",
        "normalisation": HANDICAP,
        "prices": "CPU seconds of all scenes, one thread a process; peak memory of a scene with many objects, over "
        "the loaded model; a token is one that the method explained, a forward is one sequence through the decoder",
        "left_out": LEFT_OUT,
    }
    kinds = {rival.name: rival.kind for rival in RIVALS} | dict.fromkeys((RANDOM, MASK), "control")
    return [header, *({"kind": kind} | row(name, scores, REFERENCE, peaks.get(name)) for name, kind in kinds.items())]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="scenes")
    parser.add_argument("--out", type=Path, default=RESULTS / "rivals.jsonl")
    parser.add_argument("--smoke", action="store_true", help="2 scenes, prints the table, writes nothing")
    args = parser.parse_args()
    from benchmarks.rival_report import draw, rivals_table

    rows = run(2, memory=False) if args.smoke else run(args.n)
    print(rivals_table(rows[0], rows[1:]))
    if not args.smoke:
        print(write_jsonl(args.out, rows), draw(rows[0], rows[1:], args.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
