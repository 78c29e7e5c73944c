"""What logging costs a server, and how much a logger takes.

    python -m benchmarks.log_load

Each question in a process of its own, so that nothing is warm from the one before:

* `submit`: how long does `submit` hold up a request? Captured responses come ten times as fast as they can be explained,
  so that the worker thread is busy throughout and most of them are dropped. They come in bursts, one right behind the
  other, or one by one after a pause and a capture, when the processor has forgotten the code: `json` is what a plain
  `json.dumps` of a small mapping takes at the same moments, to tell what of it is ours.
* `records`: how many records a second, of 200 tokens, 24 x 24 cells and 300 context tokens, go from `submit_attribution`
  to published Parquet, without any dropped?
* `capture`: what does `fastattr.capture` add to `generate` of the bundled model? Pairs in turn.
* `server`: what does it cost a process that does nothing but generate, capturing all of it and explaining 5 % beside it
  on a thread of its own? Wall time of blocks of responses with and without a logger, in turn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastattr
from benchmarks.cost import cpu_s, progress
from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr import adapters
from fastattr.adapters import CapturedStates
from fastattr.demo.scenes import HELD_OUT, make_scene
from fastattr.images import read_visuals
from fastattr.log import AttributionLogger, LogStats
from fastattr.types import Attribution, AttributionConfig

PROMPT = "Describe the image."
N_NEW = 32
SMALL = {"request_id": "r-12345", "tenant": "a", "route": "/answer", "tokens": 64}
Row = dict[str, Any]


def made_attribution(n_tokens: int = 200, side: int = 24, n_prompt: int = 100, seed: int = 0) -> Attribution:
    """Random maps that are as dark as maps are: most cells near zero, one bright region a token."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre = torch.rand(n_tokens, 2, 1, 1, generator=generator) * side
    distance = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2
    noise = 0.1 * torch.rand(n_tokens, side, side, generator=generator)
    maps = (0.9 * torch.exp(-distance / 12) + noise)[:, None]
    words = tuple(f" w{i % 50}" for i in range(n_tokens))
    ends = np.cumsum([len(word) for word in words]).tolist()
    relevance = torch.rand(n_tokens, n_prompt + n_tokens, generator=generator)
    return Attribution(
        response="".join(words),
        tokens=words,
        token_ids=tuple(i % 50 for i in range(n_tokens)),
        spans=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        context_tokens=(*(f" p{i}" for i in range(n_prompt)), *words),
        image=(maps,),
        context=0.1 * relevance,
        relevance=relevance,
        evidence=torch.randn(n_tokens, generator=generator),
        log_prob=-torch.rand(n_tokens, generator=generator),
        agreement=torch.ones(n_tokens, 1),
        raw_range=torch.rand(n_tokens, 2, generator=generator),
        residual=torch.rand(n_tokens, generator=generator),
        degenerate=torch.zeros(n_tokens, dtype=torch.bool),
        config=AttributionConfig(scales=(1.0,)),
        grids=(((1, side, side),),),
        extents=((0.0, 0.0, 1.0, 1.0),),
        model="made up",
    )


def submit_latency(n: int, burst: int, factor: float = 10.0) -> Row:
    """Time on the caller's thread of `n` submissions in bursts, at `factor` times the rate they can be explained at."""
    torch.set_num_threads(1)
    model = fastattr.load("shapes")
    scene = make_scene(HELD_OUT)
    inputs = _inputs(model, scene.image)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, min_new_tokens=N_NEW, max_new_tokens=N_NEW)
    hidden = states.read(out[0])[0][None]
    given: Row = {"images": [scene.image], "prompt": PROMPT}
    with tempfile.TemporaryDirectory() as folder:
        options: Row = {"sample_rate": 1.0, "queue_bytes": 64 * 2**20}
        with AttributionLogger(Path(folder) / "alone", **options) as logger:
            began = time.perf_counter()
            for i in range(20):
                logger.submit(_captured(model, inputs, out, hidden), out, request_id=f"a{i}", **given)
            logger.flush()
            explain_s = (time.perf_counter() - began) / 20
        logger = AttributionLogger(Path(folder) / "load", **options)
        spent, json_spent = np.empty(n), np.empty(n)
        due = time.perf_counter()
        for first in range(0, n, burst):
            due += min(burst, n - first) * explain_s / factor
            time.sleep(max(0.0, due - time.perf_counter()))
            coming = [_captured(model, inputs, out, hidden) for _ in range(min(burst, n - first))]
            for i, states in enumerate(coming, start=first):
                began_ns = time.perf_counter_ns()
                json.dumps(SMALL)
                json_spent[i] = time.perf_counter_ns() - began_ns
                began_ns = time.perf_counter_ns()
                logger.submit(states, out, request_id=f"r{i}", **given)
                spent[i] = time.perf_counter_ns() - began_ns
        logger.shutdown(120)
        stats = logger.stats()
    return {
        "case": "submit",
        "n": n,
        "burst": burst,
        "load": factor,
        **_quantiles("submit", spent),
        **_quantiles("json", json_spent),
        **_counts(stats),
    }


def records_rate(n: int) -> Row:
    """Records a second from submission to published segments."""
    torch.set_num_threads(1)
    attributions = [made_attribution(seed=seed) for seed in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        logger = AttributionLogger(folder, sample_rate=1.0, queue_bytes=2**30)
        spent = np.empty(n)
        cpu, began = time.process_time(), time.perf_counter()
        for i in range(n):
            while logger.stats().in_flight > 256:  # as a bounded server would: no drops wanted here
                time.sleep(0.002)
            start = time.perf_counter_ns()
            logger.submit_attribution(attributions[i % 64], request_id=f"r{i}")
            spent[i] = time.perf_counter_ns() - start
        durable = logger.flush(120)
        durable_s = time.perf_counter() - began
        published = logger.shutdown(120)
        whole_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        n_bytes = sum(path.stat().st_size for path in Path(folder).glob("date=*/*.parquet"))
        stats = logger.stats()
    if not durable or not published or stats.written != n:
        raise RuntimeError(f"of {n} records not all were written: {stats}")
    return {
        "case": "records",
        "n": n,
        "tokens": 200,
        "durable_per_s": round(n / durable_s, 1),
        "published_per_s": round(n / whole_s, 1),
        "cpu_ms_per_record": round(1e3 * cpu_s / n, 3),
        "bytes_per_record": round(n_bytes / n),
        **_quantiles("submit", spent),
        **_counts(stats),
    }


def capture_overhead(runs: int) -> Row:
    """CPU time of `generate` inside `capture` over that of `generate`, in neighbouring pairs of both orders."""
    torch.set_num_threads(1)
    model = fastattr.load("shapes")
    inputs = _inputs(model, make_scene(HELD_OUT).image)
    options: Row = {"do_sample": False, "min_new_tokens": N_NEW, "max_new_tokens": N_NEW}
    generate = partial(model.hf_model.generate, **inputs, **options)

    def captured() -> None:
        with fastattr.capture(model) as states:
            model.hf_model.generate(**inputs, **options)
        states.release()

    calls: dict[str, Callable[[], object]] = {"plain": generate, "captured": captured}
    for call in calls.values():  # first calls load libraries and fill caches
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs):
        for name in sorted(calls, reverse=bool(run % 2)):  # in either order, so that what drifts falls on both
            spent[name].append(cpu_s(calls[name]))
    ratios = [c / p for c, p in zip(spent["captured"], spent["plain"], strict=True)]
    return {
        "case": "capture",
        "runs": len(ratios),
        "n_new": N_NEW,
        "generate_ms": round(1e3 * statistics.median(spent["plain"]), 2),
        "over_generate": round(statistics.median(ratios), 4),
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
    }


def server_overhead(pairs: int, block: int = 20, sample_rate: float = 0.05) -> Row:
    """Wall time of blocks of responses with capture and a logger over those without, in neighbouring pairs."""
    torch.set_num_threads(1)
    model = fastattr.load("shapes")
    scene = make_scene(HELD_OUT)
    inputs = _inputs(model, scene.image)
    options: Row = {"do_sample": False, "min_new_tokens": 2 * N_NEW, "max_new_tokens": 2 * N_NEW}

    def plain() -> None:
        for _ in range(block):
            model.hf_model.generate(**inputs, **options)

    def logged(first: int) -> None:
        for i in range(first, first + block):
            with fastattr.capture(model) as states:
                out = model.hf_model.generate(**inputs, **options)
            logger.submit(states, out, request_id=f"r{i}", images=[scene.image], prompt=PROMPT)

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        with AttributionLogger(folder, sample_rate=sample_rate) as logger:
            plain()
            for pair in range(pairs):
                began = time.perf_counter()
                plain()
                between = time.perf_counter()
                logged(pair * block)
                ratios.append((time.perf_counter() - between) / (between - began))
                logger.flush()
        stats = logger.stats()
    return {
        "case": "server",
        "pairs": pairs,
        "block": block,
        "sample_rate": sample_rate,
        "over_generate": round(statistics.median(ratios), 4),
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        **_counts(stats),
    }


def _inputs(model: fastattr.Model, image: Any) -> Row:
    encoded = adapters.encode(model, read_visuals(image), PROMPT)
    ids = encoded.input_ids[None]
    return {**encoded.model_inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _captured(model: fastattr.Model, inputs: Row, out: torch.Tensor, hidden: torch.Tensor) -> CapturedStates:
    """A capture of a generation as if it had just run: what its hooks would have been given."""
    states = CapturedStates(model)
    states.begin(inputs["input_ids"], inputs)
    states.feed(out[:, :-1], {})
    states.keep(hidden)
    return states


def _quantiles(name: str, spent_ns: np.ndarray) -> Row:
    p50, p99, p999 = (round(float(q) / 1e3, 2) for q in np.quantile(spent_ns, [0.5, 0.99, 0.999]))
    return {f"{name}_p50_us": p50, f"{name}_p99_us": p99, f"{name}_p999_us": p999}


def _counts(stats: LogStats) -> Row:
    return {name: value for name, value in asdict(stats).items() if value}


def _in_process(work: Callable[..., Row], *arguments: Any) -> Row:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure(
    *, n_submit: int = 4000, n_records: int = 3000, runs: int = 240, block: int = 20, processes: bool = True
) -> list[Row]:
    """Every case, one after the other."""
    call: Callable[..., Row] = _in_process if processes else lambda work, *arguments: work(*arguments)
    cases: Sequence[tuple[Callable[..., Row], tuple[Any, ...]]] = (
        (submit_latency, (n_submit, 32)),
        (submit_latency, (n_submit, 1)),
        (records_rate, (n_records,)),
        (capture_overhead, (runs,)),
        (server_overhead, (max(1, runs // 24), block)),
    )
    return [call(work, *arguments) for work, arguments in progress(cases, lambda case: case[0].__name__)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_load", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "log_load.jsonl")
    path = parser.parse_args().out
    rows = measure()
    header = {**machine("python -m benchmarks.log_load"), "threads": 1}
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.table import log_table

    print(log_table(header, rows))


if __name__ == "__main__":
    main()
