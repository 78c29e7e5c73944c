"""`compat="tam"` is the reference TAM, tensor by tensor: what it returned is kept in `tests/data`.

Each file holds its inputs (`hidden_states [seq-1 dim]`, `lm_head_weight`, `input_ids`) and what came out:
`raw_maps` and `eci_maps` `[slot image]` before and after interference removal, `text_scores [slot slot]`
with NaN where a slot had not been seen, and `maps_uint8 [answer h w]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fastattr
from fastattr.compat import tam_slots
from fastattr.types import OutputHead, ScaleStates, TokenLayout
from tests.oracles import method as oracle

DATA = Path(__file__).parents[1] / "data"
NAMES = ("tam_noise", "tam_square", "tam_wide")


@dataclass(frozen=True)
class Golden:
    tensors: dict[str, Tensor]
    grid: tuple[int, int, int]
    image: tuple[int, int]
    prompt: tuple[int, int]
    response: tuple[int, int]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.from_spans(images=[(*self.image, self.grid)], prompt=[self.prompt], response=self.response)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with safe_open(DATA / f"{request.param}.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
        numbers = {name: [int(n) for n in value.split(",")] for name, value in stored.metadata().items()}
    (height, width), (prefill,) = numbers["grid"], numbers["prefill_length"]
    image, prompt = numbers["image_span"], numbers["prompt_span"]
    end = len(tensors["input_ids"])
    return Golden(tensors, (1, height, width), (image[0], image[1]), (prompt[0], prompt[1]), (prefill, end))


def peak(values: Tensor) -> float:
    return float(values.abs().max())


def test_the_oracle_is_the_reference(golden: Golden) -> None:
    """What the other tests are measured against is itself measured against the reference."""
    reading = oracle.Reading(
        golden["hidden_states"].double().numpy(),
        golden["input_ids"].tolist(),
        [(range(*golden.image), golden.grid)],
        range(*golden.prompt),
        golden.response,
    )
    slots = oracle.tam_slots(reading, oracle.Head(golden["lm_head_weight"].double().numpy()))
    np.testing.assert_allclose(slots.raw, golden["raw_maps"], rtol=0, atol=1e-6 * peak(golden["raw_maps"]))
    np.testing.assert_allclose(slots.cleaned, golden["eci_maps"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(slots.text_scores, golden["text_scores"], rtol=0, atol=1e-5)
    assert np.array_equal((slots.maps * 255).astype(np.uint8), golden["maps_uint8"].numpy())


def test_every_intermediate_of_the_reference_is_reproduced(golden: Golden) -> None:
    states = ScaleStates(golden["hidden_states"], golden["input_ids"], golden.layout)
    slots = tam_slots(states, OutputHead(golden["lm_head_weight"]))
    torch.testing.assert_close(slots.raw, golden["raw_maps"], rtol=0, atol=1e-6 * peak(golden["raw_maps"]))
    torch.testing.assert_close(slots.cleaned, golden["eci_maps"], rtol=0, atol=1e-5)
    # above the diagonal the reference keeps the rest of the prefill, which nothing reads
    torch.testing.assert_close(slots.text_scores.tril(), golden["text_scores"].nan_to_num().tril(), rtol=0, atol=1e-5)


def test_the_maps_of_the_reference_are_reproduced(golden: Golden) -> None:
    why = fastattr.attribute_states(
        golden["hidden_states"],
        golden["lm_head_weight"],
        golden["input_ids"],
        golden.layout,
        method="tam",
        scales=(1.0,),
        compat="tam",
    )
    (maps,) = why.image
    assert maps.shape == (golden.response[1] - golden.response[0], *golden.grid)
    as_stored = (maps[:, 0] * 255).to(torch.uint8).int()
    assert (as_stored - golden["maps_uint8"].int()).abs().max() <= 1


def test_without_compat_the_first_token_is_explained_by_its_own_id(golden: Golden) -> None:
    """The quirks are the reference's alone: ours explains the first answer token where it puts a prompt token's map."""
    inputs = (golden["hidden_states"], golden["lm_head_weight"], golden["input_ids"], golden.layout)
    ours = fastattr.attribute_states(*inputs, method="lens", scales=(1.0,), filter=False)
    first = int(golden["input_ids"][golden.response[0]])
    states = golden["hidden_states"]
    raw = (states[slice(*golden.image)] @ golden["lm_head_weight"][first]).relu()
    scores = (states[slice(*golden.prompt)] @ golden["lm_head_weight"][first]).relu()
    low, high = torch.cat([raw, scores]).aminmax()
    torch.testing.assert_close(ours.image[0][0].flatten(), (raw - low) / (high - low), atol=1e-5, rtol=0)
