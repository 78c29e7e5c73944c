"""The registered operators: what torch checks of them, what compiles whole, and which backend runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastattr_kernels as ops
import pytest
import torch
from fastattr_kernels import library
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


RANKED = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:6] for i in range(5)]).int()
COUNTS = torch.ones(3, 5, dtype=torch.bool)
SPAN = torch.tensor([[0.0, 1.0], [0.1, 0.9], [0.5, 0.5]])

# operator, arguments: every branch of a signature
OPERATORS: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("lm_head_topk", library._lm_head_operator, (rand(5, 8), rand(40, 8), 3, None, 1.0, None, None, False, "auto")),
    ("lm_head_summary", library._lm_head_operator, (rand(5, 8), rand(40, 8), 3, rand(40), 0.5, 9.0, 33, True, "torch")),
    ("rank_overlap", library._rank_overlap_operator, (RANKED[2:], RANKED, 0.9, None, "auto")),
    ("rank_overlap, causal", library._rank_overlap_operator, (RANKED[2:], RANKED, 0.9, 2, "auto")),
    ("arc_weight", library._arc_weight_operator, (RANKED[2:], RANKED, 0.9, COUNTS, rand(3, 5), 2, "auto")),
    ("arc_weight, no scores", library._arc_weight_operator, (RANKED[2:], RANKED, 0.9, COUNTS, None, None, "auto")),
    ("context_mean", library._context_mean_operator, (rand(5, 9), rand(3, 5).tril(1), 2, "auto")),
    ("remove_interference", library._remove_interference_operator, (rand(3, 9), rand(3, 9), "auto")),
    ("rank_gaussian", library._rank_gaussian_operator, (rand(3, 1, 4, 5), None, "auto")),
    ("rank_gaussian, span", library._rank_gaussian_operator, (rand(3, 1, 4, 5), SPAN, "auto")),
    (
        "multiscale",
        library._multiscale_operator,
        ([rand(3, 2, 4, 5), rand(3, 2, 6, 7)], rand(3, 2), [6, 7], torch.float32, None, "auto"),
    ),
    (
        "multiscale, uint8",
        library._multiscale_operator,
        ([rand(3, 2, 4, 5)], rand(3, 1), [9, 9], torch.uint8, SPAN, "auto"),
    ),
]


@pytest.mark.parametrize(("operator", "arguments"), [row[1:] for row in OPERATORS], ids=[row[0] for row in OPERATORS])
def test_operators_keep_torchs_rules(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, fake implementation (shapes, dtypes, strides), no aliasing, tracing with fixed and dynamic shapes."""
    torch.library.opcheck(operator, arguments)


def ranking_and_weight(hidden: Tensor, weight: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
    ids, values = ops.lm_head_topk(hidden, weight, 4)
    return ids, values, *ops.arc_weight(ids[2:], ids, 0.9, scores > 0, scores, n_before=2)


def interference(context: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return ops.remove_interference(context[2:], ops.context_mean(context, weight, n_before=2))


def maps(small: Tensor, large: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    summed, extremes = ops.multiscale([small, large], weights, (6, 7))
    return ops.rank_gaussian(summed, extremes), extremes


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ranking_and_weight, (rand(5, 8), rand(40, 8), rand(3, 5))),
        (interference, (rand(5, 9), rand(3, 5).tril(1))),
        (maps, (rand(3, 1, 3, 4), rand(3, 1, 6, 7), rand(3, 2))),
        (lambda hidden, rows: (ops.lens(hidden, rows),), (rand(5, 8), rand(3, 8))),
        (lambda h, w: (ops.lm_head_log_prob(h, w, torch.arange(5)),), (rand(5, 8), rand(40, 8))),
    ],
    ids=["rankings", "interference", "maps", "lens", "log_prob"],
)
def test_compiles_without_a_graph_break(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
    # the graph is captured and its fakes are checked; generating code for a CPU is not what is tested
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(*arguments), function(*arguments), strict=True):
        assert torch.equal(ours, plain)


def test_a_named_backend_explains_why_it_cannot_run() -> None:
    with pytest.raises(ops.BackendError, match="'triton' was asked for, but the tensors are on cpu"):
        ops.rank_gaussian(rand(3, 1, 4, 5), backend="triton")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of 'auto', 'triton', 'torch'"):
        ops.rank_gaussian(rand(3, 1, 4, 5), backend="cuda")


def test_auto_on_a_cpu_is_torch() -> None:
    assert ops.resolve("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        ("raise ImportError('no triton here')", "it cannot be imported"),
        ("__version__ = '3.1.0'", "triton 3.1.0 is older than 3.6"),
    ],
)
def test_a_gpu_without_a_fitting_triton_falls_back_or_explains(tmp_path: Path, triton: str, reason: str) -> None:
    (tmp_path / "triton.py").write_text(triton)
    code = (
        "import sys, torch\n"
        f"sys.path[:0] = [{str(tmp_path)!r}]\n"
        "import fastattr_kernels as ops\n"
        "gpu = torch.device('cuda')\n"
        "assert ops.resolve('auto', gpu) == 'torch'\n"
        "try:\n"
        "    ops.resolve('triton', gpu)\n"
        "except ops.BackendError as error:\n"
        "    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert reason in ran.stdout


def test_the_kernels_need_torch_and_triton_only() -> None:
    code = (
        "import sys\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import torch\n"
        "torchs = {name.split('.')[0] for name in sys.modules}\n"
        "from fastattr_kernels import lm_head_topk\n"
        "ids, values = lm_head_topk(torch.eye(3), torch.eye(3), 2)\n"
        "assert ids[:, 0].tolist() == [0, 1, 2], ids\n"
        "ours = {name.split('.')[0] for name in sys.modules} - torchs - set(sys.stdlib_module_names)\n"
        "assert ours == {'fastattr_kernels'}, ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
