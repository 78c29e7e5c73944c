"""The backend is chosen in one place, runs or explains, and is written into the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastattr
from fastattr import Attribution, BackendError, TokenLayout


def explained(backend: str) -> Attribution:
    layout = TokenLayout.from_spans(images=[(0, 6, (1, 2, 3))], prompt=[(6, 8)], response=(8, 11))
    states, embeddings = torch.rand(10, 4), torch.rand(20, 4)
    return fastattr.attribute_states(states, embeddings, torch.arange(11), layout, backend=backend, top_k=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_what_ran_is_recorded_and_kept(tmp_path: Path, asked: str) -> None:
    why = explained(asked)
    assert why.backend == "torch"
    assert why.config.backend == asked
    loaded = Attribution.load(why.save(tmp_path / "x.safetensors"))
    assert (loaded.backend, loaded.config.backend) == ("torch", asked)


def test_triton_on_a_cpu_explains_itself() -> None:
    with pytest.raises(BackendError, match=r"'triton' was asked for, but the tensors are on cpu.* use backend='auto'"):
        explained("triton")
