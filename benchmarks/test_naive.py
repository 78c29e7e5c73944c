"""The naive loops give what the reference TAM gave, so that the benchmark compares with the real thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks import naive

GOLDEN = sorted((Path(__file__).parent.parent / "tests" / "data").glob("tam_*.safetensors"))


def read_golden(path: Path) -> tuple[dict[str, np.ndarray], naive.Reading, int]:
    """Tensors, the reading with the reference's quirks, and the number of prompt tokens."""
    with safe_open(path, "np") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    hidden, weight, ids = tensors["hidden_states"], tensors["lm_head_weight"], tensors["input_ids"].tolist()
    height, width = map(int, meta["grid"].split(","))
    image = range(*map(int, meta["image_span"].split(",")))
    prompt = range(*map(int, meta["prompt_span"].split(",")))
    prefill = int(meta["prefill_length"])
    slots = [naive.Slot(p, ids[p], ids[p]) for p in prompt]
    slots += [naive.Slot(p - 1, ids[p], ids[p]) for p in range(prefill, len(ids))]
    # quirks: the first slot's class is what the model predicts there, the first answer slot's is the last prefill token
    slots[0] = naive.Slot(prompt[0], int((weight @ hidden[prompt[0]]).argmax()), ids[prompt[0]])
    slots[len(prompt)] = naive.Slot(prefill - 1, ids[prefill - 1], ids[prefill])
    reading = naive.Reading(hidden, weight, np.array(image), (height, width), tuple(slots), prefill)
    return tensors, reading, len(prompt)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_naive_reproduces_the_reference(path: Path) -> None:
    golden, reading, n_prompt = read_golden(path)
    logits = naive.full_logits(reading)
    raw = [naive.activation(reading, logits, slot) for slot in reading.slots]
    cleaned = []
    for t in range(len(reading.slots)):
        weights = naive.tam_weights(reading, t, naive.scores(reading, logits, t))
        cleaned.append(naive.remove_interference(raw[t], raw[:t], weights))
    np.testing.assert_allclose(raw, golden["raw_maps"], atol=1e-5)
    np.testing.assert_allclose(cleaned, golden["eci_maps"], atol=1e-5)
    for answer, expected in enumerate(golden["maps_uint8"]):
        # quirk: the first map is that of the first prompt token, whose own score is the only one it has
        t = n_prompt + answer if answer else 0
        text_scores = golden["text_scores"][t, : max(t, 1)].tolist()
        shown = naive.finish(reading, cleaned[t], text_scores)
        assert np.abs((shown * 255).astype(np.uint8).astype(int) - expected).max() <= 1


def test_there_are_golden_vectors() -> None:
    assert len(GOLDEN) == 3


def test_rank_biased_overlap_by_hand() -> None:
    # prefixes share 0 of 1, 2 of 2 and 2 of 3 ids
    expected = 0.5 * (0.5 * 2 / 2 + 0.25 * 2 / 3)
    assert naive.rank_biased_overlap([1, 2, 3], [2, 1, 4], 0.5) == pytest.approx(expected)


def test_minimise_finds_the_bottom_of_a_parabola() -> None:
    assert naive.minimise(lambda x: (x - 0.3) ** 2, 0.0, 2.0) == pytest.approx(0.3, abs=1e-7)


def test_full_logits_are_those_of_one_product() -> None:
    rng = np.random.default_rng(0)
    hidden, weight = rng.standard_normal((2, 7, 5)).astype(np.float32)
    reading = naive.Reading(hidden, weight, np.arange(2), (1, 2), (), prefill=4)
    np.testing.assert_allclose(naive.full_logits(reading), hidden.astype(np.float64) @ weight.T, atol=1e-6)


def test_upsample_by_hand() -> None:
    # half-pixel centres: the outer quarters repeat the edge, the middle is shared 3 to 1
    np.testing.assert_allclose(naive.upsample(np.array([[0.0, 4.0]]), (1, 4)), [[0.0, 1.0, 3.0, 4.0]])
    np.testing.assert_allclose(naive.upsample(np.array([[0.0], [4.0]]), (4, 1)), [[0.0], [1.0], [3.0], [4.0]])


def test_log_prob_of_equal_logits() -> None:
    assert naive.log_prob(np.full((1, 8), 300.0, np.float32), naive.Slot(0, 3, 3)) == pytest.approx(-np.log(8))
