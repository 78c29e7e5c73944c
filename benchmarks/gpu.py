"""Every kernel on a GPU, against float64 and against what torch offers: one command, under nine minutes.

    python benchmarks/gpu.py             # needs a GPU; writes benchmarks/results/<gpu>.jsonl
    python benchmarks/gpu.py --dry-run   # the same on a CPU, tiny, in Triton's interpreter: its times mean nothing

Nothing needs to be installed but torch, triton and, for the last steps, what fastattr needs. A step is a process of its own
with a limit, so that one that crashes or hangs costs a line and no more. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
from torch import Tensor

from benchmarks.gpu_forms import (
    ROUNDING,
    Call,
    Inputs,
    Op,
    Row,
    against,
    batches,
    describe,
    measure,
    timed,
)
from benchmarks.gpu_goals import GOALS, gpu_table
from benchmarks.gpu_ops import (
    Bench,
    arc_weight,
    builders,
    context_mean,
    draw_head,
    lens,
    lm_head,
    multiscale,
    normal,
    product,
    rank_gaussian,
    rank_overlap,
    ranking_errors,
    remove_interference,
    road,
)
from benchmarks.record import RESULTS, machine

if TYPE_CHECKING:
    from fastattr.types import TokenLayout

LIMIT_S = 525  # for everything: a little under nine minutes
POSITIONS = (16, 32, 64, 128, 256, 512, 1024)
TINY_POSITIONS = (2, 3)
ORDER_ROWS = 1_000_000
ORDER_S = 80


# the steps


def library(bench: Bench) -> Iterator[Row]:
    """What the libraries reach here: a copy, products with and without float32 results, top-k of whole logits."""
    side = bench.size(8192, 16)
    large = bench.size(2**31, 2**10)

    def draw_copy(generator: torch.Generator) -> Inputs:
        source = torch.randint(256, (large,), dtype=torch.uint8, generator=generator, device=bench.device)
        return torch.empty_like(source), source

    def draw_square(generator: torch.Generator) -> Inputs:
        return normal(generator, side, side).to(bench.dtype), normal(generator, side, side).to(bench.dtype)

    yield plain(bench, "copy", "torch", {"bytes": large}, torch.Tensor.copy_, draw_copy, moved=2 * large)
    yield plain(bench, "product", "square", {"side": side}, torch.mm, draw_square, flops=2 * side**3)

    name = str(bench.dtype).removeprefix("torch.")
    itemsize = bench.dtype.itemsize
    for positions in TINY_POSITIONS if bench.dry_run else POSITIONS:
        shape = {"positions": positions, "dim": bench.dim, "vocab": bench.vocab}
        draw = draw_head(bench, positions)
        read = (positions + bench.vocab) * bench.dim * itemsize
        logits = positions * bench.vocab
        for form, call, written in (
            (f"{name} to {name}", lambda hidden, weight: hidden @ weight.T, itemsize),
            (f"{name} to float32", product, 4),
        ):
            work = {"moved": read + logits * written, "flops": 2 * logits * bench.dim}
            yield plain(bench, "product", form, shape, call, draw, **work)
        for dtype in (bench.dtype, torch.float32):
            yield whole_topk(bench, positions, dtype)


def whole_topk(bench: Bench, positions: int, dtype: torch.dtype) -> Row:
    """`torch.topk` of logits that are all in memory."""

    def draw(generator: torch.Generator) -> Inputs:
        return (normal(generator, positions, bench.vocab).to(dtype),)

    return plain(
        bench,
        "torch.topk",
        str(dtype).removeprefix("torch."),
        {"positions": positions, "vocab": bench.vocab, "k": bench.k},
        lambda logits: logits.topk(bench.k, dim=1),
        draw,
        moved=positions * bench.vocab * dtype.itemsize,
    )


def topk(bench: Bench) -> Iterator[Row]:
    """Both roads to the ordered top-k, at few and many positions."""
    goals = {128: ("G2",), 1024: ("G1", "G3")}
    for positions in TINY_POSITIONS[:1] if bench.dry_run else (1024, 128, 16, 512, 256, 64):
        yield from each_form(bench, partial(lm_head, bench, positions, goals=goals.get(positions, ())))
    yield from each_form(bench, partial(lm_head, bench, bench.size(128, 2), with_logsumexp=True))


def overlaps(bench: Bench) -> Iterator[Row]:
    """Rank-biased overlap, alone and with what ARC makes of it."""
    for build in (rank_overlap, arc_weight):
        yield from each_form(bench, partial(build, bench))


def interference(bench: Bench) -> Iterator[Row]:
    """What the context lights up, and maps without it."""
    for build in (context_mean, remove_interference):
        yield from each_form(bench, partial(build, bench))


def maps(bench: Bench) -> Iterator[Row]:
    """The rank-Gaussian filter, and several scales in one map."""
    yield from each_form(bench, partial(rank_gaussian, bench))
    for dtype in (torch.uint8, torch.float32, torch.float16):
        yield from each_form(bench, partial(multiscale, bench, dtype))
    yield from each_form(bench, partial(multiscale, bench, torch.float32, to_grid=True))


def lenses(bench: Bench) -> Iterator[Row]:
    """The gathered lens, and the full logits it stands in for."""
    for row in each_form(bench, partial(lens, bench)):
        # cuBLAS is the lens, there is no other form
        yield graded(bench, row, "G6") if row["form"] == "torch" else row
    positions = bench.size(1500, 6)
    shape = {"positions": positions, "dim": bench.dim, "vocab": bench.vocab}
    row = plain(
        bench,
        "product",
        "full logits of the image",
        shape,
        lambda hidden, weight: hidden @ weight.T,
        draw_head(bench, positions),
        moved=((positions + bench.vocab) * bench.dim + positions * bench.vocab) * bench.dtype.itemsize,
        flops=2 * positions * bench.vocab * bench.dim,
    )
    yield row | {"baseline_of": ["G6"]}


def postprocessing(bench: Bench) -> Iterator[Row]:
    """From hidden states to finished maps; its first call, with nothing compiled yet, comes first."""
    explain, draw = post_processing(bench)
    with cold_cache():
        row = first_call("explain_states", partial(explain, backend="triton"), draw(bench.generator()))
    yield graded(bench, row, "G11")

    layout = described_image(bench)
    op = Op(
        name="explain_states",
        shape={"image": layout.n_image, "text": len(layout.context), "dim": bench.dim, "vocab": bench.vocab},
        draw=draw,
        # in float32 throughout: bfloat16 states have float32 products, so only close ranks may swap
        error=against(lambda hidden, weight, ids: explain(hidden.float(), weight.float(), ids, backend="torch")),
        forms={name: partial(explain, backend=name) for name in ("torch", "triton")},
        tolerance=2e-2,
        rounding=2e-2,
        bytes=bench.vocab * bench.dim * bench.dtype.itemsize,
        goals=("G9 time", "G9 memory"),
    )
    yield from measure(op, bench.device, bench.seed)


def order(bench: Bench) -> Iterator[Row]:
    """A million rankings against the exact order, with duplicate rows and ascending logits among them."""
    import fastattr_kernels as kernels

    positions, k = bench.size(1024, 3), bench.k
    generator = bench.generator()
    weight = normal(generator, bench.vocab, bench.dim) / math.sqrt(bench.dim)
    upward = normal(generator, bench.dim)
    upward /= upward.norm()
    weight += torch.linspace(0, 1, bench.vocab, device=bench.device)[:, None] * upward
    weight[1::8] = weight[::8][: len(weight[1::8])]
    weight = weight.to(bench.dtype)
    exact_weight = weight.double()

    allowed, rows, wrong, unsteady, worst = 0.0, 0, 0, 0, 0.0
    began = time.monotonic()
    while rows == 0 or (not bench.dry_run and rows < ORDER_ROWS and time.monotonic() - began < ORDER_S):
        hidden = normal(generator, positions, bench.dim)
        hidden[-positions // 64 :] += math.sqrt(bench.dim) * upward  # each id beats almost all before it
        hidden = hidden.to(bench.dtype)
        exact = hidden, exact_weight
        if rows == 0:  # the library's rounding is what any float32 product may have
            values, ids = product(hidden, weight).sort(dim=1, descending=True, stable=True)
            allowed = float(ranking_errors(exact, (ids[:, :k], values[:, :k]), k).max()) + ROUNDING
        ids, values = kernels.lm_head_topk(hidden, weight, k, backend="triton")
        again = kernels.lm_head_topk(hidden, weight, k, backend="triton")
        errors = ranking_errors(exact, (ids, values), k)
        rows += positions
        wrong += int((errors > allowed).sum())
        unsteady += int(((ids != again[0]) | (values != again[1])).any(1).sum())
        worst = max(worst, float(errors.max()))
    row: Row = {"op": "lm_head_topk", "form": "triton, order", "shape": {"positions": rows, "k": k}, "fault": None}
    row |= {"rows": rows, "wrong_rows": wrong, "unsteady_rows": unsteady}
    row |= {"max_error": worst if math.isfinite(worst) else None, "allowed_error": allowed}
    if wrong or unsteady:
        row["fault"] = f"{wrong} of {rows} rows are out of order beyond rounding, {unsteady} changed when run again"
    if not bench.dry_run:
        row["goals"] = {"G4": row["fault"] is None and rows >= ORDER_ROWS}
    yield row


def cold(bench: Bench) -> Iterator[Row]:
    """The first call of every operation, with nothing compiled yet."""
    began = time.perf_counter()
    import triton

    row: Row = {"op": "import triton", "form": triton.__version__, "fault": None}
    yield row | {"first_call_s": time.perf_counter() - began}
    for build in builders(bench):
        try:
            op = build()
            with cold_cache():
                row = first_call(op.name, op.forms["triton"], op.draw(bench.generator())) | {"shape": dict(op.shape)}
        except Exception as exception:
            row = unbuilt(build, exception)
        yield row


def model(bench: Bench) -> Iterator[Row]:
    """The bundled model, end to end: answer, replay at three scales, explain."""
    from fastattr import adapters
    from fastattr.demo.scenes import make_scene
    from fastattr.images import read_visuals
    from fastattr.method import explain_states
    from fastattr.types import AttributionConfig

    loaded = adapters.load("shapes", device=bench.device)
    scales = (1.0,) if bench.dry_run else (1.0, 1.5, 2.0)
    visuals = read_visuals(make_scene(bench.seed, bench.size(192, 96)).image)
    encoded = adapters.encode_scales(loaded, visuals, "Describe the image.", scales)
    response = adapters.generate(loaded, encoded[0], max_new_tokens=bench.size(32, 2))
    readings = [adapters.replay(loaded, each, response) for each in encoded]

    def explain(backend: Literal["torch", "triton"]) -> list[Tensor]:
        found = explain_states(readings, loaded.head, AttributionConfig(scales=scales, filter=True, backend=backend))
        return [*found.image, found.context]

    shape = {"targets": len(response), "scales": len(scales)}
    stages: dict[str, Call] = {
        "generate": lambda: adapters.generate(loaded, encoded[0], max_new_tokens=bench.size(32, 2)),
        "replay": lambda: [adapters.replay(loaded, each, response) for each in encoded],
    }
    for name, call in stages.items():
        yield plain(bench, "bundled model", name, shape, call, lambda _: ())
    op = Op(
        name="bundled model",
        shape=shape,
        draw=lambda _: (),
        error=against(lambda: explain("torch")),
        forms={"explain, torch": partial(explain, "torch"), "explain, triton": partial(explain, "triton")},
        rounding=5e-3,
    )
    yield from measure(op, bench.device, bench.seed)


def sweep(bench: Bench) -> Iterator[Row]:
    """Other tiles for the fused road, so that a person can edit its table. The right ones are timed."""
    from fastattr_kernels.gpu.lm_head_topk import fused_summary, launch_on

    tiles = ((128, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8), (64, 256, 64, 4), (128, 128, 32, 4))
    for positions in TINY_POSITIONS[:1] if bench.dry_run else (128, 1024):
        op = lm_head(bench, positions)
        for rows, columns, dim, warps in ((16, 16, 16, 4),) if bench.dry_run else tiles:
            for stages in (3,) if bench.dry_run else (3, 4):
                launch = replace(
                    launch_on(bench.device),
                    product_rows=rows,
                    product_columns=columns,
                    product_dim=dim,
                    product_warps=warps,
                    product_stages=stages,
                )
                name = f"triton fused {rows}x{columns}x{dim}, {warps} warps, {stages} stages"
                form = road(bench, fused_summary, with_logsumexp=False, launch=launch)
                yield from measure(replace(op, forms={name: form}, baselines={}), bench.device, bench.seed)


def profile(bench: Bench) -> Iterator[Row]:
    """Where the GPU's time goes: the kernels of what is several of them."""
    explain, draw = post_processing(bench)
    ops = [rank_overlap(bench)] if bench.dry_run else [lm_head(bench, 128), lm_head(bench, 1024), rank_overlap(bench)]
    for op in ops:
        yield profiled(bench, op.name, op.shape, op.forms["triton"], op.draw(bench.generator()))
    shape = {"image": described_image(bench).n_image}
    yield profiled(bench, "explain_states", shape, partial(explain, backend="triton"), draw(bench.generator()))


STEPS: dict[str, tuple[Callable[[Bench], Iterator[Row]], int]] = {  # and the seconds each may take
    "library": (library, 60),
    "topk": (topk, 90),
    "overlaps": (overlaps, 45),
    "interference": (interference, 45),
    "maps": (maps, 90),
    "lens": (lenses, 45),
    "postprocessing": (postprocessing, 60),
    "cold": (cold, 60),
    "order": (order, ORDER_S + 30),
    "model": (model, 60),
    "profile": (profile, 45),
    "sweep": (sweep, 90),
}


# what steps are made of


def each_form(bench: Bench, build: partial[Op]) -> Iterator[Row]:
    """The rows of an operation; one row with the fault where it cannot even be set up."""
    try:
        op = build()
    except Exception as exception:
        yield unbuilt(build, exception)
        return
    yield from measure(op, bench.device, bench.seed)


def unbuilt(build: partial[Op], exception: Exception) -> Row:
    return {"op": build.func.__name__, "form": "set-up", "fault": describe(exception)}


def plain(
    bench: Bench,
    name: str,
    form: str,
    shape: Mapping[str, Any],
    call: Call,
    draw: Callable[[torch.Generator], Inputs],
    moved: int = 0,
    flops: int = 0,
) -> Row:
    """A row of something that is not ours to judge."""
    row: Row = {"op": name, "form": form, "shape": dict(shape), "fault": None}
    try:
        return row | timed(call, batches(draw, bench.device, bench.seed), moved, flops, half=True)
    except Exception as exception:
        return row | {"fault": describe(exception)}


@contextmanager
def cold_cache() -> Iterator[None]:
    """Nothing compiled earlier is found, unless this process did it."""
    with (
        tempfile.TemporaryDirectory(prefix="cold-triton-") as empty,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty),
    ):
        yield


def first_call(name: str, call: Call, inputs: Inputs) -> Row:
    """Seconds of the first call of an operation, on a GPU that is awake."""
    row: Row = {"op": name, "form": "triton, first call", "fault": None, "first_call_s": None}
    device = inputs[0].device if isinstance(inputs[0], Tensor) else inputs[0][0].device
    product(*torch.zeros(2, 16, 16, device=device).to(torch.bfloat16))  # wakes the library up
    synchronize()
    began = time.perf_counter()
    try:
        call(*inputs)
        synchronize()
    except Exception as exception:
        return row | {"fault": describe(exception)}
    return row | {"first_call_s": time.perf_counter() - began}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def post_processing(bench: Bench) -> tuple[Call, Callable[[torch.Generator], Inputs]]:
    """The engine on states, and made-up states of one image and its description."""
    from fastattr.method import explain_states
    from fastattr.types import AttributionConfig, OutputHead, ScaleStates

    layout = described_image(bench)
    stop = layout.response[1]

    def draw(generator: torch.Generator) -> Inputs:
        hidden, weight = draw_head(bench, stop - 1)(generator)
        # a shared direction makes neighbours predict alike, as they do in a real model
        hidden = hidden + normal(generator, bench.dim).to(hidden.dtype)
        return hidden, weight, torch.randint(bench.vocab, (stop,), generator=generator, device=bench.device)

    def explain(hidden: Tensor, weight: Tensor, ids: Tensor, *, backend: Literal["torch", "triton"]) -> list[Tensor]:
        config = AttributionConfig(method="arc", scales=(1.0,), top_k=bench.k, filter=True, backend=backend)
        found = explain_states([ScaleStates(hidden, ids, layout)], OutputHead(weight), config)
        assert found.relevance is not None
        return [*found.image, found.context, found.relevance]

    return explain, draw


def described_image(bench: Bench) -> TokenLayout:
    """1500 image tokens, then 30 of a prompt and 128 of a response."""
    from fastattr.types import TokenLayout

    height, width = bench.size(30, 3), bench.size(50, 4)
    start = height * width + bench.size(30, 1)
    return TokenLayout.from_spans(
        images=[(0, height * width, (1, height, width))],
        prompt=[(height * width, start)],
        response=(start, start + bench.size(128, 2)),
    )


def profiled(bench: Bench, name: str, shape: Mapping[str, Any], call: Call, inputs: Inputs) -> Row:
    """Microseconds a call on the GPU, waiting not included, and the twelve longest kernels."""
    from torch.profiler import ProfilerActivity

    kind, attribute = ProfilerActivity.CUDA, "self_device_time_total"
    if bench.dry_run:
        kind, attribute = ProfilerActivity.CPU, "self_cpu_time_total"
    calls = bench.size(5, 1)
    call(*inputs)
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(calls):
            call(*inputs)
        synchronize()
    events = sorted(profiler.key_averages(), key=lambda each: getattr(each, attribute), reverse=True)
    kernels = [
        {"kernel": each.key[:120], "launches": each.count / calls, "us": getattr(each, attribute) / calls}
        for each in events
    ]
    row: Row = {"op": name, "form": "triton, profile", "shape": dict(shape), "fault": None}
    return row | {"gpu_us": sum(each["us"] for each in kernels), "kernels": kernels[:12]}


def graded(bench: Bench, row: Row, *goals: str) -> Row:
    """The row with whether it meets its goals; a dry run meets none."""
    return row if bench.dry_run else row | {"goals": {name: GOALS[name].met(row) for name in goals}}


# running them


def run(names: Sequence[str], dry_run: bool, seed: int) -> Iterator[Row]:
    """The rows of the steps, within `LIMIT_S` altogether. On a GPU each step has a process of its own."""
    deadline = time.monotonic() + LIMIT_S
    for group in [names] if dry_run else [[name] for name in names]:
        limit_s = max(0.0, min(sum(STEPS[name][1] for name in group), deadline - time.monotonic()))
        for row in run_apart(group, dry_run, seed, limit_s):
            yield row | {"dry_run": dry_run}


def run_apart(names: Sequence[str], dry_run: bool, seed: int, limit_s: float) -> Iterator[Row]:
    """The rows of steps in one new process; the last has a `fault` where it crashed or was stopped."""
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(names, dry_run, seed, sender))
    deadline = time.monotonic() + limit_s
    process.start()
    sender.close()
    last = names[0]
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            row = receiver.recv()
            last = row["step"]
            yield row
    except EOFError:
        process.join(timeout=30)
        if process.exitcode:
            yield broken(last, f"the process ended with exit code {process.exitcode}")
    else:
        yield broken(last, f"stopped after {limit_s:.0f} s")
    finally:
        process.kill()
        process.join()


def work(names: Sequence[str], dry_run: bool, seed: int, sender: Connection) -> None:
    """Steps, in their own process."""
    torch.set_grad_enabled(False)
    bench = Bench(torch.device("cpu" if dry_run else "cuda"), seed)
    for name in names:
        try:
            for row in STEPS[name][0](bench):
                sender.send({"step": name} | row)
        except Exception as exception:
            sender.send(broken(name, describe(exception)))
    sender.close()


def broken(step: str, fault: str) -> Row:
    return {"step": step, "op": step, "form": "step", "fault": fault}


def gpu_header(command: str, dry_run: bool, seed: int) -> Row:
    """Where and with what the file is measured."""
    import triton

    try:
        header = machine(command)
    except OSError as exception:  # no git, for example
        header = {"record": "header", "command": command, "fault": describe(exception), "torch": torch.__version__}
    header |= {"triton": triton.__version__, "seed": seed, "dry_run": dry_run}
    if dry_run:
        return header
    properties = torch.cuda.get_device_properties(0)
    return header | {
        "gpu": properties.name,
        "driver": driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def driver() -> str | None:
    """Version of the GPU's driver, None where nobody tells."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def line(row: Mapping[str, Any]) -> str:
    """A row for someone who is watching; of a dry run without its times, which are those of an interpreter."""
    shape = " ".join(f"{name}={value}" for name, value in row.get("shape", {}).items())
    parts = [f"{row['op']} | {row['form']} | {shape}"]
    if row["fault"] is not None:
        parts.append(f"FAULT {row['fault']}")
    if row["dry_run"]:
        return ", ".join([*parts, "dry run"])
    for key, unit in (("median_ms", "ms"), ("first_call_s", "s"), ("gpu_us", "us on the GPU")):
        if row.get(key) is not None:
            parts.append(f"{row[key]:.4g} {unit}")
    if row.get("roofline") is not None:
        parts.append(f"{row['roofline']:.0%} of roofline")
    parts += [f"{name} {'met' if met else 'missed'}" for name, met in row.get("goals", {}).items()]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, help="results/<gpu>.jsonl, or a temporary file with --dry-run or --only")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, here and in every step
    elif not torch.cuda.is_available():
        print("there is no GPU that torch can use, expected one; --dry-run tries everything on a CPU", file=sys.stderr)
        return 2

    seed = 0 if options.dry_run else secrets.randbits(30)
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    header = gpu_header(command, options.dry_run, seed)
    rows, path, began = [], options.out or default_path(header, options.only), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as file:  # by lines: what is done survives
        file.write(json.dumps(header) + "\n")
        for row in run(options.only or tuple(STEPS), options.dry_run, seed):
            file.write(json.dumps(row, allow_nan=False) + "\n")
            rows.append(row)
            print(f"{time.monotonic() - began:4.0f} s  {row['step']}: {line(row)}", flush=True)
    if not options.dry_run:
        print(gpu_table(header, rows))
    print(path)
    # a tile that does not fit is a finding of the sweep, not a fault
    return int(any(row["fault"] is not None for row in rows if row["step"] != "sweep"))


def default_path(header: Mapping[str, Any], only: Sequence[str] | None) -> Path:
    """Where the rows go: into the results only when they are all of a GPU's."""
    if header["dry_run"] or only:
        return Path(tempfile.mkdtemp(prefix="gpu-")) / "rows.jsonl"
    return RESULTS / f"{header['gpu'].lower().replace(' ', '-')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
