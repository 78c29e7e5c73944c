"""Every Triton kernel in the interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
INTERPRETED = Path(__file__).parent / "interpreted"
KERNELS = ROOT / "kernels" / "fastattr_kernels" / "gpu"
FILES = sorted(INTERPRETED.glob("test_*.py"))


def test_every_kernel_file_has_its_tests() -> None:
    kernels = {path.stem for path in KERNELS.glob("*.py")} - {"__init__"}
    assert {path.stem.removeprefix("test_") for path in FILES} == kernels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(path.relative_to(ROOT))]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
