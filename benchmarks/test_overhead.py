"""The calls compared are the same generation, and their explanations explain it."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastattr
from benchmarks.overhead import CAPTURE, HIDDEN, PLAIN, calls, full_vocabulary, measure
from benchmarks.record import machine
from benchmarks.table import overhead_table


@pytest.mark.parametrize("make", [fastattr.load, lambda: full_vocabulary(900)], ids=["shapes", "random"])
def test_every_call_is_about_the_same_words(make: object) -> None:
    every = calls(make(), n_new=5)
    sequence = every[PLAIN]()
    assert torch.equal(every[HIDDEN]().sequences, sequence)
    assert torch.equal(every[CAPTURE]()[1], sequence)
    said = tuple(sequence[0, -5:].tolist())
    for name, call in every.items():
        if name.startswith("explain"):
            why = call()
            assert why.token_ids == said
            assert (why.evidence is not None) == name.endswith("evidence")
            assert len(why.config.scales) == (3 if "three" in name else 1)


def test_the_random_model_ranks_its_whole_vocabulary() -> None:
    model = full_vocabulary(900)
    assert model.head.vocab == 900 == len(model.processor.tokenizer)


def test_measure_tells_shares_of_plain_generation() -> None:
    rows = measure("shapes", n_new=2, runs=1, memory=False)
    plain = next(row for row in rows if row["call"] == PLAIN)
    assert plain["over_generate"] == 1
    for row in rows:
        assert row["over_generate"] == pytest.approx(row["cpu_s"] / plain["cpu_s"], rel=1e-2)
    table = overhead_table({**machine("test"), "transformers": transformers.__version__}, rows)
    assert all(f"| shapes | {row['call']} |" in table for row in rows)
