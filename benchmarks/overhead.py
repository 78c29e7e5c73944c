"""What an explanation adds to the generation it explains, in CPU time and memory.

    python -m benchmarks.overhead

Two models: the bundled one, and the same with random weights and a full vocabulary. Generation runs plainly, with
`output_hidden_states=True` and inside `fastattr.capture`; then what it said is explained. All run in turn, so that a
busy machine slows all of them; memory comes from processes of their own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import fastattr
from benchmarks.cost import cpu_s, in_fresh_process, in_turn, one_thread, progress
from benchmarks.record import RESULTS, machine, write_jsonl
from fastattr import adapters
from fastattr.adapters.model import BUNDLED
from fastattr.demo.scenes import HELD_OUT, make_scene
from fastattr.images import read_visuals

PROMPT = "Describe the image."
N_NEW = 64
SCALES = (1.0, 1.5, 2.0)
PLAIN, HIDDEN, CAPTURE = "generate", "generate, output_hidden_states", "generate, captured"


def full_vocabulary(vocab: int = 152_064) -> fastattr.Model:
    """The bundled model's configuration with random weights and as many ids as a large model has."""
    bundled = fastattr.load("shapes")
    tokenizer = bundled.processor.tokenizer
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), vocab)])
    config = transformers.AutoConfig.from_pretrained(BUNDLED["shapes"])
    config.text_config.vocab_size = vocab
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False  # tied, it repeats one word
    torch.manual_seed(0)
    hf_model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    return fastattr.wrap(hf_model, bundled.processor, name=f"random, vocabulary {vocab:,}")


MODELS: Mapping[str, Callable[[], fastattr.Model]] = {
    "shapes": fastattr.load,
    "full vocabulary": full_vocabulary,
}


def calls(model: fastattr.Model, n_new: int = N_NEW) -> dict[str, Callable[[], Any]]:
    """Generation in three ways, and explanations of what it said."""
    image = make_scene(HELD_OUT).image
    encoded = adapters.encode(model, read_visuals(image), PROMPT)
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def generate(**options: Any) -> Any:
        return model.hf_model.generate(
            **inputs, do_sample=False, min_new_tokens=n_new, max_new_tokens=n_new, use_cache=True, **options
        )

    def captured() -> tuple[Any, Any]:
        with fastattr.capture(model) as states:
            return states, generate()

    states, out = captured()
    response_ids = out[0, len(encoded.input_ids) :]

    def attribute(scales: tuple[float, ...], evidence: bool) -> Any:
        return fastattr.attribute(model, image, PROMPT, response_ids, scales=scales, evidence=evidence)

    return {
        PLAIN: generate,
        HIDDEN: partial(generate, output_hidden_states=True, return_dict_in_generate=True),
        CAPTURE: captured,
        "explain what was captured": lambda: states.attribute(out, prompt=PROMPT, image=image),
        "explain, one scale": partial(attribute, (1.0,), False),
        "explain, one scale, evidence": partial(attribute, (1.0,), True),
        "explain, three scales": partial(attribute, SCALES, False),
        "explain, three scales, evidence": partial(attribute, SCALES, True),
    }


def timed(model_name: str, call: str, n_new: int) -> Callable[[], float]:
    """One call of one model, for a process of its own."""
    model = MODELS[model_name]()
    calls(model, 2)[call]()  # first uses load libraries
    return partial(cpu_s, calls(model, n_new)[call])


def measure(model_name: str, *, n_new: int = N_NEW, runs: int = 7, memory: bool = True) -> list[dict[str, Any]]:
    """Every call of one model; `memory` starts a process for each."""
    model = MODELS[model_name]()
    with one_thread():
        spent = in_turn(calls(model, n_new), runs)
    plain = spent[PLAIN]
    return [
        {
            "model": model_name,
            "call": call,
            "n_new": n_new,
            "runs": runs,
            "cpu_s": float(f"{statistics.median(seconds):.4g}"),
            "cpu_range_s": [float(f"{end:.4g}") for end in (min(seconds), max(seconds))],
            # pairs of neighbours in time: what slows one of them slows the other
            "over_generate": round(statistics.median(s / p for s, p in zip(seconds, plain, strict=True)), 4),
            "peak_bytes": in_fresh_process(timed, model_name, call, n_new).peak_bytes if memory else None,
        }
        for call, seconds in spent.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.jsonl")
    path = parser.parse_args().out
    rows = [row for name in progress(tuple(MODELS), str) for row in measure(name)]
    with one_thread():
        header = machine("python -m benchmarks.overhead")
    header["transformers"] = transformers.__version__
    print(write_jsonl(path, [header, *rows]))
    from benchmarks.table import overhead_table

    print(overhead_table(header, rows))


if __name__ == "__main__":
    main()
