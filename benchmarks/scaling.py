"""How explaining scales: measured here, modelled, and projected to models and machines that are not here.

    python -m benchmarks.scaling

1. Throughput of the bundled model against batch size, response length and worker processes.
2. A cost model: how much each stage of an explanation has to do, in operations (`stage_work`). One rate a stage is fitted
   on half of the measured sizes and judged on the other half.
3. A projection, marked as one: the same operations for models of 7 and 70 billion parameters on GPUs, with stated rates.
   Nothing of it was measured.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastattr
from benchmarks.cases import Case
from benchmarks.cost import one_thread, progress
from benchmarks.overhead import MODELS
from benchmarks.record import RESULTS, machine, read_jsonl, write_jsonl
from benchmarks.sides import FILTER, INTERFERENCE, OVERLAP, PRODUCTS, SCALES, TOP_K, run_engine
from fastattr.demo.scenes import HELD_OUT, make_scene
from fastattr.types import AttributionConfig

Row = dict[str, Any]
PROMPT = "Describe the image."
STAGES = (PRODUCTS, OVERLAP, INTERFERENCE, SCALES, FILTER)
FITTED = (
    Case(n_targets=128, edge=16, dim=256, vocab=8192, scales=(1.0, 1.5)),
    Case(n_targets=512, edge=24, dim=256, vocab=8192, scales=(1.0, 1.5, 2.0)),
    Case(n_targets=256, edge=32, dim=512, vocab=32768, scales=(1.0,)),
    Case(n_targets=768, edge=16, dim=512, vocab=2048, scales=(1.0, 2.0)),
)
JUDGED = (
    Case(n_targets=256, edge=24, dim=256, vocab=8192, scales=(1.0, 2.0)),
    Case(n_targets=1024, edge=24, dim=256, vocab=8192, scales=(1.0, 1.5, 2.0)),
    Case(n_targets=512, edge=32, dim=512, vocab=32768, scales=(1.0,)),
    Case(n_targets=384, edge=16, dim=1024, vocab=8192, scales=(1.0, 1.5, 2.0)),
)


# --- the cost model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one explanation is made of.

    Attributes:
        targets, prompt: response tokens, tokens of the user's text.
        image: image tokens at each scale.
        dim, vocab: of the output embeddings.
        rankings: ids compared.
    """

    targets: int
    prompt: int
    image: tuple[int, ...]
    dim: int
    vocab: int
    rankings: int = TOP_K

    @property
    def pairs(self) -> float:
        """Pairs of a target and a context token before it."""
        return self.targets * (self.prompt + (self.targets - 1) / 2)


def stage_work(work: Work) -> dict[str, float]:
    """Operations of each stage. A multiply-add counts as two; a compared pair of ranks, a cell mixed or filtered as one.

    * products: classes at image positions of every scale, `2 C N d`; at context, `2 pairs d` a scale; rankings over the
      whole vocabulary, `2 C d V`; log-probabilities at the other scales, `2 T d V` each.
    * overlap: `pairs k`, one table look-up a shared rank.
    * interference: the mean of what context lights up, `2 pairs N` a scale.
    * scales, filter: cells of the finest grid, a scale each for mixing, once for the filter.
    """
    context, finest = work.prompt + work.targets, max(work.image)
    others = len(work.image) - 1
    return {
        PRODUCTS: 2.0 * work.dim * (context * sum(work.image) + work.pairs * len(work.image))
        + 2.0 * work.dim * work.vocab * (context + others * work.targets),
        OVERLAP: work.pairs * work.rankings,
        INTERFERENCE: 2.0 * work.pairs * sum(work.image),
        SCALES: float(work.targets * finest * len(work.image)),
        FILTER: float(work.targets * finest),
    }


def forward_flops(parameters: float, layers: int, dim: int, tokens: int) -> float:
    """Of one teacher-forced forward: every parameter once a token, and attention of each token with those before it."""
    return 2.0 * parameters * tokens + 2.0 * layers * dim * tokens**2


def work_of(case: Case) -> Work:
    sides = tuple(round(case.edge * scale) ** 2 for scale in case.scales)
    return Work(case.n_targets, case.n_prompt, sides, case.dim, case.vocab)


def fit_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds an operation of each stage, so that the largest relative errors balance (geometric mean of ratios)."""
    return {
        stage: math.exp(statistics.fmean(math.log(row["stage_s"][stage] / row["work"][stage]) for row in rows))
        for stage in STAGES
        if all(row["stage_s"].get(stage, 0) > 0 for row in rows)
    }


def predicted_s(rates: Mapping[str, float], work: Mapping[str, float]) -> float:
    return sum(rate * work[stage] for stage, rate in rates.items())


# --- measured here ----------------------------------------------------------------------------------------


def measure_stages(case: Case, repeats: int = 3) -> Row:
    """CPU seconds by stage; the median run."""
    readings, head = case.states()
    runs = [run_engine(readings, head, "arc").stage_s for _ in range(repeats)]
    middle = sorted(runs, key=lambda spent: sum(spent.values()))[len(runs) // 2]
    stages = {stage: middle.get(stage, 0.0) for stage in STAGES}
    return {"case": asdict(case), "work": stage_work(work_of(case)), "stage_s": stages}


def throughput_of_batches(name: str, sizes: Sequence[int], n: int) -> list[Row]:
    """Responses a second on one thread, the same ones in batches of different sizes, in turn.

    Args:
        name: the bundled model, or the one with random weights and a full vocabulary, of `overhead.MODELS`.
    """
    torch.set_num_threads(1)
    rows = _rows(fastattr.load("shapes"), n)
    model = MODELS[name]()
    config = AttributionConfig(scales=(1.0,))
    spent: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(3):
        for size in sizes:
            began = time.perf_counter()
            for start in range(0, n, size):
                fastattr.attribute_batch(model, rows[start : start + size], config)
            spent[size].append(time.perf_counter() - began)
    return [
        {"model": name, "batch": size, "responses_per_s": round(n / statistics.median(times), 2)}
        for size, times in spent.items()
    ]


def throughput_of_lengths(lengths: Sequence[int]) -> list[Row]:
    """Tokens a second of single responses on one thread, by length."""
    torch.set_num_threads(1)
    model = fastattr.load("shapes")
    image, _, ids = _rows(model, 1)[0]
    found = []
    for length in lengths:
        response = (list(ids) * (length // len(ids) + 1))[:length]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            fastattr.attribute(model, image, PROMPT, response, scales=(1.0,))
            times.append(time.perf_counter() - began)
        found.append({"length": length, "tokens_per_s": round(length / statistics.median(times), 1)})
    return found


def throughput_of_workers(counts: Sequence[int], n: int) -> list[Row]:
    """Responses a second of several processes, each with a model of its own."""
    found = []
    for count in counts:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_load) as pool:
            list(pool.map(_explain, range(count)))  # models are loaded
            began = time.perf_counter()
            list(pool.map(_explain, range(n), chunksize=2))
            found.append({"workers": count, "responses_per_s": round(n / (time.perf_counter() - began), 2)})
    return found


def _rows(model: fastattr.Model, n: int) -> list[tuple[Any, str, Any]]:
    """Scenes with what the model says about them, sorted by length."""
    images = [make_scene(HELD_OUT + seed).image for seed in range(n)]
    config = AttributionConfig(method="lens", scales=(1.0,), evidence=False, filter=False)
    said = [fastattr.attribute_batch(model, [(image, PROMPT, None)], config)[0].token_ids for image in images]
    return sorted(zip(images, [PROMPT] * n, said, strict=True), key=lambda row: len(row[2]))


_MODEL: list[fastattr.Model] = []


def _load() -> None:
    torch.set_num_threads(1)
    _MODEL.append(fastattr.load("shapes"))


def _explain(seed: int) -> int:
    why = fastattr.attribute(_MODEL[0], make_scene(HELD_OUT + seed % 16).image, PROMPT, scales=(1.0,))
    return len(why)


# --- the projection ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Large:
    """A model that is not here."""

    name: str
    parameters: float
    layers: int
    dim: int
    vocab: int = 152_064


@dataclass(frozen=True)
class Gpu:
    """Assumed rates: of the matrix units in a forward and in the products, and of memory in everything else.

    Attributes:
        flops: dense bfloat16 a second, as the maker states it.
        forward_share, product_share: reached of it.
        bytes_per_s: of memory, as stated; `memory_share` of it is reached.
    """

    name: str = "H100"
    flops: float = 989e12
    forward_share: float = 0.40
    product_share: float = 0.50
    bytes_per_s: float = 3.35e12
    memory_share: float = 0.60


LARGE = (Large("7B", 7.6e9, 28, 3584), Large("70B", 72.7e9, 80, 8192))
RESPONSE = Work(targets=200, prompt=100, image=(1024, 2304, 4096), dim=0, vocab=0)
WRITES_PER_S = 3500.0  # PUTs a second to one prefix of an object store, as commonly stated
SEGMENT_BYTES = 32 * 2**20


def project(model: Large, gpus: int, log_bytes: float, gpu: Gpu) -> Row:
    """GPU-seconds and bytes of a million responses. A projection: nothing of it was measured."""
    work = replace(RESPONSE, dim=model.dim, vocab=model.vocab)
    text = work.prompt + work.targets
    read = [n + text for n in (*work.image, work.image[0])]  # every scale, and the blank
    forward_s = sum(forward_flops(model.parameters, model.layers, model.dim, n) for n in read)
    forward_s /= gpu.flops * gpu.forward_share
    amount = stage_work(work)
    moved = 4.0 * (amount[INTERFERENCE] / 2 / 128 + 12 * amount[SCALES] + 12 * amount[FILTER] + 4 * work.pairs)
    stage_s = {
        "forwards": forward_s,
        "products and rankings": (amount[PRODUCTS] + amount[INTERFERENCE]) / (gpu.flops * gpu.product_share),
        "overlap": amount[OVERLAP] * 8 / (gpu.bytes_per_s * gpu.memory_share),
        "maps": moved / (gpu.bytes_per_s * gpu.memory_share),
    }
    total_s = sum(stage_s.values())
    rate = gpus / total_s
    return {
        "record": "projection",
        "model": model.name,
        "gpus": gpus,
        "gpu": gpu.name,
        "gpu_s_per_million": round(total_s * 1e6),
        "hours_per_million": round(total_s * 1e6 / gpus / 3600, 2),
        "shares": {name: round(spent / total_s, 4) for name, spent in stage_s.items()},
        "log_bytes_per_million": round(log_bytes * 1e6),
        "records_per_s": round(rate, 1),
        "writer_cores": math.ceil(rate * 0.006),  # 6 ms of CPU a record, see results/log_load.jsonl
        "puts_per_s": round(rate * log_bytes / SEGMENT_BYTES, 3),
        "share_of_puts": round(rate * log_bytes / SEGMENT_BYTES / WRITES_PER_S, 6),
    }


# --- all of it --------------------------------------------------------------------------------------------


def measure(
    fitted: Sequence[Case] = FITTED,
    judged: Sequence[Case] = JUDGED,
    *,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    lengths: Sequence[int] = (16, 64, 256),
    workers: Sequence[int] = (1, 2),
    n: int = 48,
) -> list[Row]:
    """Every row of the results but the header."""
    with one_thread():
        cases = [*fitted, *judged]
        stages = [measure_stages(case) for case in progress(cases, lambda case: f"{case.n_targets} targets")]
        rates = fit_rates(stages[: len(fitted)])
        rows: list[Row] = []
        for i, row in enumerate(stages):
            measured = sum(row["stage_s"][stage] for stage in rates)
            rows.append(
                {
                    "record": "stages",
                    "fitted": i < len(fitted),
                    **row,
                    "measured_s": round(measured, 4),
                    "predicted_s": round(predicted_s(rates, row["work"]), 4),
                }
            )
        rows.append({"record": "rates", "operations_per_s": {name: 1 / rate for name, rate in rates.items()}})
        for name in MODELS:  # a full vocabulary takes several times as long a response
            some = n if name == "shapes" else max(max(batches), n // 3)
            rows += [{"record": "batch", **row} for row in throughput_of_batches(name, batches, some)]
        rows += [{"record": "length", **row} for row in throughput_of_lengths(lengths)]
    rows += [{"record": "workers", **row} for row in throughput_of_workers(workers, n)]
    _, logged = read_jsonl(RESULTS / "log_load.jsonl")
    (records,) = (row for row in logged if row["case"] == "records")
    rows += [project(model, gpus, records["bytes_per_record"], Gpu()) for model in LARGE for gpus in (8, 512)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.jsonl")
    path = parser.parse_args().out
    rows = measure()
    with one_thread():
        header = {**machine("python -m benchmarks.scaling"), "assumed": asdict(Gpu()), "response": asdict(RESPONSE)}
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.scaling_report import scaling_table

    print(scaling_table(header, rows))


if __name__ == "__main__":
    main()
