"""Every Triton kernel compiles into sound code for every GPU it should run on; no GPU takes part.

The compilers run in a process of their own, without the Triton interpreter that other tests use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import read_jsonl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers are for Linux")

ROOT = Path(__file__).parents[2]
KERNEL_FILES = sorted(
    path.stem for path in (ROOT / "kernels/fastattr_kernels/gpu").glob("*.py") if path.stem != "__init__"
)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Verdict:
    """What a run of the gate left behind."""

    exit_code: int
    output: str
    header: dict[str, Any]
    rows: list[dict[str, Any]]

    def kernels(self, **wanted: Any) -> list[dict[str, Any]]:
        rows = [row for row in self.rows if row["record"] == "kernel"]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def run_gate(out: Path, *options: str) -> Verdict:
    command = [sys.executable, "-m", "benchmarks.static", "--out", str(out), *options]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), finished.stdout + finished.stderr
    return Verdict(finished.returncode, finished.stdout, *read_jsonl(out))


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    return run_gate(tmp_path_factory.mktemp("static") / "static.jsonl")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    out = tmp_path_factory.mktemp("planted") / "static.jsonl"
    return run_gate(out, "--workloads", "tests.kernels.planted", "--targets", "sm_90", "gfx942")


def test_no_kernel_has_a_fault(verdict: Verdict) -> None:
    assert verdict.exit_code == 0, verdict.output
    assert [row for row in verdict.rows if row.get("faults")] == []


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_file_is_compiled(verdict: Verdict, target: str) -> None:
    modules = {row["module"] for row in verdict.kernels(target=target)}
    assert modules == {f"fastattr_kernels.gpu.{file}" for file in KERNEL_FILES}


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_the_vocabulary_product_runs_on_the_matrix_units(verdict: Verdict, target: str, instruction: str) -> None:
    products = verdict.kernels(target=target, half_products=True)
    assert {row["module"] for row in products} == {"fastattr_kernels.gpu.lm_head_topk"}
    assert all(row["matrix_instruction"].startswith(instruction) for row in products)
    assert all(dict(row["mix"])["matrix"] > 0 for row in products)


def test_all_instructions_are_told_apart(verdict: Verdict) -> None:
    for row in verdict.kernels():
        mix = dict(row["mix"])
        assert sum(mix.values()) == row["instructions"]
        assert mix["global"] >= 2, "a kernel reads and writes"
        assert mix["local"] == 0, "registers that are not spilled are not read back"


def test_nothing_can_pass_for_a_measurement(verdict: Verdict) -> None:
    assert verdict.header["kind"].startswith("static: compiled, never run")
    timed = {key for row in verdict.rows for key in row if key.endswith("_ms")}
    assert timed == {"modelled_ms"}


def test_models_agree_with_the_arithmetic(verdict: Verdict) -> None:
    (row,) = (
        row
        for row in verdict.rows
        if row["record"] == "workload" and row["op"] == "fused_summary" and row["shape"].startswith("N=1024")
    )
    assert row["bound"] == "compute"
    assert row["modelled_ms"] == pytest.approx(2 * 1024 * 3584 * 152_064 / 800e12 * 1e3)


@pytest.mark.parametrize(
    ("target", "kernel", "reason"),
    [
        ("sm_90", "_spilling", "spills"),
        ("gfx942", "_spilling", "spills"),
        ("sm_90", "_product", "bytes of shared memory, sm_90 has 232448"),
        ("gfx942", "_product", "bytes of shared memory, gfx942 has 65536"),
        ("sm_90", "_product", "multiplies in half precision without wgmma.mma_async"),
        ("sm_90", "_product", "rounds the factors of a float32 product to tf32"),
        ("sm_90", "_product", "wgmma.mma_async instructions are serialized"),
        ("sm_90", "_uncompilable", "fails: CompilationError: arange's range must be a power of 2"),
        ("sm_90", "_copy", "launches a grid of (1, 70000, 1)"),
        ("sm_90", "with_data", "fails: RuntimeError: Tensor.item() cannot be called on meta tensors"),
        ("sm_90", "nothing", "fails: launches no kernel"),
    ],
)
def test_a_planted_fault_is_named(planted: Verdict, target: str, kernel: str, reason: str) -> None:
    assert planted.exit_code == 1
    (row,) = (
        row for row in planted.kernels(target=target, kernel=kernel) if any(reason in fault for fault in row["faults"])
    )
    assert f"FAULT {target} {row['module']}.{kernel}: {'; '.join(row['faults'])}" in planted.output


def test_a_kernel_that_no_workload_launches_is_named(planted: Verdict) -> None:
    unlaunched = [row for row in planted.rows if row["record"] == "unlaunched"]
    assert [row["kernel"] for row in unlaunched] == ["_forgotten"]


def test_a_launch_is_specialised_as_at_run_time(planted: Verdict) -> None:
    (row,) = planted.kernels(target="sm_90", kernel="_copy")
    assert row["signature"] == "values_ptr:*fp32 out_ptr:*fp32:16 scale:i32"  # a view that starts off the 16 bytes
    assert row["config"].startswith("stride=1 BLOCK=8 ")  # a one is a constant


def test_what_speaks_against_a_kernel() -> None:
    from benchmarks.static import Report, faults

    sound = Report("sm_90", "module", "kernel", ("workload",), grid=(7, 1, 1), registers=64, shared_bytes=227 * 1024)
    assert faults(sound) == []
    assert faults(replace(sound, stack_bytes=16)) == ["keeps 16 bytes of a thread in memory"]
    assert faults(replace(sound, tensor_memory_columns=513)) == ["needs 513 columns of tensor memory of 512"]
    serialized = "wgmma.mma_async instructions are serialized"
    assert faults(replace(sound, warnings=(serialized,))) == [f"the assembler warns: {serialized}"]
    assert len(faults(replace(sound, spill_bytes=4, shared_bytes=227 * 1024 + 1))) == 2
