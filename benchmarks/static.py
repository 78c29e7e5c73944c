"""Every Triton kernel, compiled for every GPU it should run on, and judged by what the compilers made of it.

    python -m benchmarks.static

No GPU is needed and nothing is launched: the workloads of `benchmarks.launches` call the launchers with tensors
that hold no data, and Triton's own just-in-time compiler is told to compile each launch for the target and to
stop there. So what is judged is what would run. Exits with 1 when there is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fastattr_kernels import backend
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_manager

from benchmarks.launches import Workload
from benchmarks.record import RESULTS, machine, write_jsonl

GRID_LIMIT = (2**31 - 1, 65_535, 65_535)  # programs along x, y, z
TENSOR_MEMORY_COLUMNS = 512  # sm_100


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what a kernel may use there."""

    compiler: GPUTarget
    shared_bytes: int  # for one program
    matrix: tuple[str, ...]  # instructions, one of which a half-precision product must become


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, ("mma.sync",)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, ("wgmma.mma_async",)),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, ("tcgen05.mma", "mma.sync")),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, ("v_mfma",)),
}


@dataclass(frozen=True)
class Report:
    """One kernel as compiled for one target, for every workload that launches it so."""

    target: str
    module: str
    kernel: str
    workloads: tuple[str, ...]
    grid: tuple[int, int, int] = (0, 0, 0)  # the largest along each axis
    config: str = ""
    signature: str = ""
    registers: int = 0
    spill_bytes: int = 0  # of each thread, as are the registers
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    half_products: bool = False  # multiplies float16 or bfloat16 matrices
    matrix_instruction: str = ""  # the first one on the matrix units
    tf32: bool = False  # rounds the factors of a float32 product to ten bits
    warnings: tuple[str, ...] = ()  # of the assembler, where they cost time
    instructions: int = 0
    mix: tuple[tuple[str, int], ...] = ()
    compile_s: float = 0.0  # from an empty cache, or near 0
    error: str = ""


def faults(report: Report) -> list[str]:
    """What speaks against running this kernel on its target, in words; empty where nothing does."""
    target = TARGETS[report.target]
    if report.error:
        return [f"fails: {report.error}"]
    found = []
    if report.spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes of registers to memory")
    elif report.stack_bytes:
        found.append(f"keeps {report.stack_bytes} bytes of a thread in memory")
    if report.shared_bytes > target.shared_bytes:
        found.append(f"needs {report.shared_bytes} bytes of shared memory, {report.target} has {target.shared_bytes}")
    if report.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"needs {report.tensor_memory_columns} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if report.half_products and not report.matrix_instruction:
        found.append(f"multiplies in half precision without {' or '.join(target.matrix)}")
    if report.tf32:
        found.append("rounds the factors of a float32 product to tf32")
    if any(programs > limit for programs, limit in zip(report.grid, GRID_LIMIT, strict=True)):
        found.append(f"launches a grid of {report.grid}, the limit is {GRID_LIMIT}")
    return found + [f"the assembler warns: {warning}" for warning in report.warnings]


def unlaunched(module: str, launched: set[str]) -> list[str]:
    """The kernels of a module that no workload launches and no other kernel calls."""
    members = vars(importlib.import_module(module)).items()
    kernels = {name: value for name, value in members if isinstance(value, JITFunction) and value.__module__ == module}
    return [
        name
        for name in kernels
        if name not in launched
        and not any(re.search(rf"\b{name}\b", other.src) for key, other in kernels.items() if key != name)
    ]


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[dict[str, Report]]:
    """Within it, a launch compiles for the target and launches nothing; yields a report of each distinct kernel."""
    reports: dict[str, Report] = {}
    compiler = TARGETS[name].compiler
    device = types.SimpleNamespace(
        get_current_target=lambda: compiler,
        get_current_device=lambda: name,  # Triton keeps compiled kernels by device
        get_current_stream=lambda device: 0,
    )
    compile_and_launch = JITFunction.run

    def run(kernel: JITFunction[Any], *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launched = Report(name, kernel.__module__, kernel.__name__, (), (*grid, 1, 1)[:3])
        if launched.kernel in reports:  # it failed
            return
        try:
            started = time.perf_counter()
            compiled, log = _compile(partial(compile_and_launch, kernel, *args, grid=grid, warmup=True, **options))
            if compiled.hash not in reports:
                launched = replace(launched, compile_s=round(time.perf_counter() - started, 2))
                reports[compiled.hash] = _inspect(launched, compiled, log)
            report = reports[compiled.hash]
            reports[compiled.hash] = replace(report, grid=tuple(map(max, report.grid, launched.grid)))
        except Exception as error:  # whatever the compilers raise is the finding; the other kernels go on
            reports[launched.kernel] = replace(launched, error=_gist(error))

    driver.set_active(device)  # for the rest of the process: without a GPU there is none to go back to
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(backend, "architecture", lambda device: name):
        yield reports


def _compile(compile_launch: Any) -> tuple[Any, str]:
    """The compiled kernel and what the assembler said, which is kept beside the kernel in Triton's cache."""
    printed = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = compile_launch()
    kept = get_cache_manager(compiled.hash)
    if printed.getvalue():
        kept.put(printed.getvalue(), "assembler.log", binary=False)
    log = kept.get_file("assembler.log")
    return compiled, Path(log).read_text(encoding="utf-8") if log else ""


def _inspect(launched: Report, compiled: Any, log: str) -> Report:
    metadata, asm = compiled.metadata, compiled.asm
    constants = {compiled.src.fn.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    config = {**constants, "num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
    arguments = [
        f"{name}:{kind}" + "".join(f":{value}" for _, value in compiled.src.attrs.get((index,), ()))
        for index, (name, kind) in enumerate(compiled.src.signature.items())
        if kind != "constexpr"
    ]
    text = asm["ptx" if "ptx" in asm else "amdgcn"]
    matrix = re.search(rf"^\s+(?:@\S+ )?((?:{'|'.join(TARGETS[launched.target].matrix)})\S*)", text, re.M)
    report = replace(
        launched,
        config=" ".join(f"{key}={value}" for key, value in config.items()),
        signature=" ".join(arguments),
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        half_products=bool(re.search(r"tt\.dot(?:_scaled)? .*: tensor<\d+x\d+x(?:f16|bf16)>", asm["ttir"])),
        matrix_instruction=matrix.group(1) if matrix else "",
        tf32=bool(re.search(r"tt\.dot .*inputPrecision = tf32 .*: tensor<\d+x\d+xf32>", asm["ttir"])),
    )
    return _inspect_nvidia(report, _sass(compiled), log) if "cubin" in asm else _inspect_amd(report, text)


def _inspect_nvidia(report: Report, sass: str, log: str) -> Report:
    if not log:
        raise RuntimeError(f"the assembler's log is missing, expected it in {triton.knobs.cache.dir}: empty this cache")
    used = {
        words: int(number)
        for number, words in re.findall(
            r"(\d+) (registers|bytes stack frame|bytes spill stores|bytes spill loads)", log
        )
    }
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?(?!NOP)([A-Z][\w.]*)", sass, re.M)
    return replace(
        report,
        registers=used["registers"],
        spill_bytes=max(used["bytes spill stores"], used["bytes spill loads"]),
        stack_bytes=used["bytes stack frame"],
        warnings=tuple(line.strip() for line in log.splitlines() if "serialized" in line or "warning" in line.lower()),
        instructions=len(names),
        mix=_mix(names, _SASS),
    )


def _inspect_amd(report: Report, assembly: str) -> Report:
    used = {key: int(number) for key, number in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.M)}
    names = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", assembly, re.M)
    return replace(
        report,
        registers=used["vgpr_count"],
        spill_bytes=4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"]),
        stack_bytes=used["private_segment_fixed_size"],
        instructions=len(names),
        mix=_mix(names, _AMDGCN),
    )


_SASS = {
    "matrix": r"\w*MMA\b",
    "global": r"(LDG|STG|LD|ST|LDGSTS|RED|REDG|ATOM|ATOMG)\b|UTMA|UBLKCP",
    "shared": r"(LDS|STS|LDSM|STSM|ATOMS|SHFL)\b",
    "local": r"(LDL|STL)\b",
    "float": r"F(ADD|MUL|FMA|MNMX|SET|SETP|SEL|CHK|2F|2FP|2I|RND)|[HD](ADD|MUL|FMA)|I2F|MUFU",
}
_AMDGCN = {
    "matrix": r"v_mfma",
    "global": r"(global|buffer|flat|s_load|s_buffer)_",
    "shared": r"ds_",
    "local": r"scratch_",
    "float": r"v_\w*_(f16|f32|bf16)",
}


def _mix(names: Iterable[str], kinds: dict[str, str]) -> tuple[tuple[str, int], ...]:
    """How many instructions are of each kind; the first kind that fits counts."""
    kind_of = cache(lambda name: next((kind for kind, form in kinds.items() if re.match(form, name)), "other"))
    counts = Counter(kind_of(name) for name in names)
    return tuple((kind, counts[kind]) for kind in (*kinds, "other"))


def _sass(compiled: Any) -> str:
    """The machine code in words; kept as well, because taking it apart is slow."""
    kept = get_cache_manager(compiled.hash)
    path = kept.get_file("kernel.sass")
    if path is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        path = kept.put(text, "kernel.sass", binary=False)
    return Path(path).read_text(encoding="utf-8")


def _gist(error: Exception) -> str:
    """The line of a compiler's message that says why: what was fatal to the assembler, or else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {next((line for line in lines if 'fatal' in line), lines[-1])}"


def _workloads(module: str) -> tuple[Workload, ...]:
    return importlib.import_module(module).WORKLOADS


def _prepare() -> None:
    """A process that compiles."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    torch.set_num_threads(1)
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "static")  # where every kernel has its log


def _run(module: str, index: int, target: str) -> list[Report]:
    workload = _workloads(module)[index]
    with compiling_for(target) as reports:
        try:
            workload.launch()
        except Exception as error:  # the launcher itself cannot do without a device
            reports[workload.op] = Report(target, workload.launch.func.__module__, workload.op, (), error=_gist(error))
    if not reports:
        reports[""] = Report(target, workload.launch.func.__module__, workload.op, (), error="launches no kernel")
    return [replace(report, workloads=(workload.name,)) for report in reports.values()]


def _merged(reports: Iterable[Report]) -> list[Report]:
    """Launches of the same compiled kernel, as one."""
    merged: dict[tuple[str, ...], Report] = {}
    for report in reports:
        key = (report.target, report.module, report.kernel, report.config, report.signature, report.error)
        before = merged.get(key, report)
        merged[key] = replace(
            before,
            workloads=tuple(dict.fromkeys(before.workloads + report.workloads)),
            grid=tuple(map(max, before.grid, report.grid)),
            compile_s=max(before.compile_s, report.compile_s),
        )
    return list(merged.values())


def compile_all(module: str, targets: Sequence[str], *, processes: int = 2) -> Iterator[list[Report]]:
    """Compile every workload of `module` for every target; yields the reports of each as they come.

    A target stays with one process: another one could find a kernel in the cache whose log is not there yet.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, _prepare)) for _ in range(processes)]
        tasks = [
            pools[number % processes].submit(_run, module, index, target)
            for number, target in enumerate(targets)
            for index in range(len(_workloads(module)))
        ]
        for task in as_completed(tasks):
            yield task.result()


def kernel_table(reports: Sequence[Report]) -> str:
    """What became of each kernel; the workload is the first that launches it."""
    columns = ("target", "kernel", "workload", "registers", "spills (B)", "shared (B)", "instructions", "matrix units")
    cells = (
        (
            report.target,
            report.module.rpartition(".")[2] + "." + report.kernel,
            report.workloads[0],
            report.registers,
            report.spill_bytes,
            report.shared_bytes,
            report.instructions,
            report.matrix_instruction.partition(".sync")[0] or "-",
        )
        for report in reports
    )
    return _markdown(columns, cells)


def workload_table(workloads: Sequence[Workload]) -> str:
    """The roofline of each workload on an H100."""
    models = (workload.model() for workload in workloads)
    cells = (
        (model["op"], model["shape"], f"{model['flops']:.3g}", f"{model['bytes']:.3g}", f"{model['modelled_ms']:.4f}")
        for model in models
    )
    return _markdown(("op", "shape", "FLOPs", "bytes", "ms (modelled, not measured)"), cells)


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--workloads", default="benchmarks.launches", help="a module that holds WORKLOADS")
    parser.add_argument("--out", type=Path, default=RESULTS / "static.jsonl")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")

    workloads = _workloads(options.workloads)
    total = len(workloads) * len(options.targets)
    started = time.perf_counter()
    reports: list[Report] = []
    for done, found in enumerate(compile_all(options.workloads, options.targets), start=1):
        reports += found
        names = ", ".join(dict.fromkeys(report.kernel for report in found))
        which = f"{found[0].target} {found[0].workloads[0]}"
        print(f"[{done}/{total}, {time.perf_counter() - started:.0f} s] {which}: {names}", flush=True)
    reports = sorted(_merged(reports), key=lambda each: (options.targets.index(each.target), each.module, each.kernel))
    rows = [{"record": "kernel", **asdict(report), "faults": faults(report)} for report in reports]
    idle = [
        {"record": "unlaunched", "module": module, "kernel": kernel, "faults": ["no workload launches it"]}
        for module in sorted({report.module for report in reports})
        for kernel in unlaunched(module, {report.kernel for report in reports if report.module == module})
    ]
    models = [{"record": "workload", **workload.model()} for workload in workloads]
    header = machine("python -m benchmarks.static") | {
        "triton": triton.__version__,
        "kind": "static: compiled, never run; times are modelled, not measured",
    }
    write_jsonl(options.out, [header, *models, *rows, *idle])

    print("\n" + workload_table(workloads) + "\n\n" + kernel_table(reports) + "\n")
    faulty = [row for row in (*rows, *idle) if row["faults"]]
    for row in faulty:
        print(f"FAULT {row.get('target', '')} {row['module']}.{row['kernel']}: {'; '.join(row['faults'])}")
        if row.get("config"):
            print(f"      {row['config']}")
    print(f"{len(reports)} kernels, {len(faulty)} faulty, {time.perf_counter() - started:.0f} s; wrote {options.out}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
