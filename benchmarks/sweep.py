"""Which choices of the method matter: every option, judged by masks and by hiding patches.

    python -m benchmarks.sweep --model shapes

`shapes` is made to say the true description of held-out scenes. Each row of the result is one configuration: its
plausibility and its deletion and insertion, with the difference to the base and to one-scale TAM, scenes drawn again.
A prettier map can be less causal, so both stand side by side.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import transformers

from benchmarks.record import RESULTS, machine, rounded, write_jsonl
from fastattr.evaluate import METHODS, Results, Settings, Task, run
from fastattr.evaluate.judging import MASK, RANDOM
from fastattr.evaluate.tables import hiding_gain, hiding_mean, plausibility_gain
from fastattr.metrics import pool
from fastattr.types import AttributionConfig, Method

THREE, LARGE, SMALL = (1.0, 1.5, 2.0), (1.0, 2.0, 3.0), (0.5, 1.0, 1.5, 2.0)
BASE = replace(METHODS["arc"], scales=THREE)
BEST = replace(METHODS["best"], scales=THREE)
EVERY: tuple[Method, ...] = ("lens", "tam", "arc")
CHANGES: Mapping[str, Sequence[Any]] = {
    "scale_mean": ("geometric",),
    "scale_weights": ((1.0, 1.0, 1.0), (1.0, 5.0, 16.0)),
    "aggregate": ("after",),
    "decision_weight": (True,),
    "arc_weight": ("relevance",),
    "context": ("prompt", "response"),
    "top_k": (5, 10, 20, 100, 200),
    "rbo_p": (0.5, 0.7, 0.8, 0.95, 0.98),
    "layer": (-2, -3),
    "filter": (None,),
    "regions": (6,),
}
BEST_CHANGES: Mapping[str, Sequence[Any]] = {
    "scale_mean": ("arithmetic",),
    "context": ("all",),
    "method": ("lens",),
    "scales": (LARGE,),
    "layer": (-2, -3),
    "regions": (0, 4, 8),
    "filter": (True,),
}


@dataclass(frozen=True)
class Variant:
    """One configuration and the choice it stands for."""

    factor: str
    value: str
    config: AttributionConfig

    @property
    def name(self) -> str:
        return f"{self.factor}: {self.value}"


def variants() -> list[Variant]:
    """Methods at scales, one change at a time to the base, then to the best."""
    listed = [
        Variant("method x scales", f"{method} {label(scales)}", replace(BASE, method=method, scales=scales))
        for scales, method in product(((1.0,), (2.0,), THREE, LARGE), EVERY)
    ]
    listed += [
        Variant("small scale too", "as given", replace(BASE, scales=SMALL)),
        Variant("small scale too", "decision_weight", replace(BASE, scales=SMALL, decision_weight=True)),
    ]
    listed += _changes("", BASE, CHANGES)
    listed.append(Variant("best", "best", BEST))
    return listed + _changes("best, ", BEST, BEST_CHANGES)


def _changes(prefix: str, base: AttributionConfig, changes: Mapping[str, Sequence[Any]]) -> list[Variant]:
    return [
        Variant(f"{prefix}{factor}", label(value), replace(base, **{factor: value}))
        for factor, values in changes.items()
        for value in values
    ]


def label(value: object) -> str:
    """A value as it stands in a table: `1 1.5 2` for several numbers."""
    return " ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def rows(listed: Sequence[Variant], masks: Results, hidden: Results) -> list[dict[str, Any]]:
    """A line for each variant, then the orders that need no method.

    Args:
        masks: judged by masks.
        hidden: judged by hiding patches as well; fewer scenes.
    """
    base, tam = (next(v.name for v in listed if v.config == config) for config in (BASE, METHODS["tam"]))
    lines = []
    for variant in listed:
        scores = pool([row.plausibility[variant.name] for row in masks.judged])
        lines.append(
            {
                "factor": variant.factor,
                "value": variant.value,
                **{
                    name: round(value, 6) if isinstance(value, float) else value
                    for name, value in asdict(scores).items()
                },
                "deletion": round(hiding_mean(hidden, variant.name, "deletion_auc"), 6),
                "insertion": round(hiding_mean(hidden, variant.name, "insertion_auc"), 6),
                "over_base": _gains(masks, hidden, variant.name, base),
                "over_tam": _gains(masks, hidden, variant.name, tam),
                "config": asdict(variant.config),
            }
        )
    for order in (RANDOM, MASK):
        means = {score: round(hiding_mean(hidden, order, f"{score}_auc"), 6) for score in ("deletion", "insertion")}
        lines.append({"factor": "control", "value": order, **means})
    return lines


def _gains(masks: Results, hidden: Results, name: str, base: str) -> dict[str, dict[str, float]]:
    gains = {
        "f1": plausibility_gain(masks, name, base),
        "deletion": hiding_gain(hidden, name, base, "deletion_auc"),
        "insertion": hiding_gain(hidden, name, base, "insertion_auc"),
    }
    return {name: rounded(gain) for name, gain in gains.items()}


def sweep(model: str, n: int, n_hidden: int, workers: int) -> list[dict[str, Any]]:
    """Judge every variant. The first row is the header."""
    listed = variants()
    settings = Settings({variant.name: variant.config for variant in listed}, words=0)
    with tempfile.TemporaryDirectory() as folder:
        masks = run(Task("scenes", model, n, None, settings), Path(folder) / "masks.jsonl", workers=workers)
        hiding = Task("scenes", model, n_hidden, None, replace(settings, words=1))
        hidden = run(hiding, Path(folder) / "hidden.jsonl", workers=workers)
    header = machine(f"python -m benchmarks.sweep --model {Path(model).name} --n {n} --n-hidden {n_hidden}")
    header |= {
        "model": Path(model).name,
        "transformers": transformers.__version__,
        "scenes": len(masks.judged),
        "hidden_words": sum(each.order == MASK for row in hidden.judged for each in row.hidings),
        "base": asdict(BASE),
        "best": asdict(BEST),
        "interval": "95 % paired bootstrap over scenes, 2000 resamples, seed 0",
    }
    return [header, *rows(listed, masks, hidden)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes", help="a bundled model or a local directory")
    parser.add_argument("--n", type=int, default=40, help="scenes judged by masks")
    parser.add_argument("--n-hidden", type=int, default=40, help="scenes judged by hiding patches, a word each")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="2 scenes, prints the table, writes nothing")
    args = parser.parse_args()
    if args.smoke:
        from benchmarks.table import sweep_table

        header, *lines = sweep(args.model, 2, 2, 1)
        print(sweep_table(header, lines))
        return
    result = sweep(args.model, args.n, args.n_hidden, args.workers)
    print(write_jsonl(args.out or RESULTS / f"sweep_{Path(args.model).name}.jsonl", result))


if __name__ == "__main__":
    main()
