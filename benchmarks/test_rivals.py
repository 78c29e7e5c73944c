"""The rivals compute what they are named after: against finite differences, plain loops and planted truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from benchmarks import rival_maps
from benchmarks.record import read_jsonl, write_jsonl
from benchmarks.rival_maps import LAST_LAYERS, OWN, RIVALS, Rival, greedy_search, rollout
from benchmarks.rival_model import (
    Case,
    Reading,
    blanked,
    counted,
    decode,
    eager_attention,
    image_embeddings,
    log_probs_of_pixels,
    read,
    relevance_rules,
    target_log_probs,
    target_logits,
)
from benchmarks.rival_report import draw, rivals_table
from benchmarks.rivals import (
    FIRST_SEED,
    MASK,
    RANDOM,
    Price,
    Score,
    bundled,
    case_of,
    explain,
    row,
    score_scene,
    stretched,
)
from fastattr.adapters import encode_response, log_probs_of_images
from fastattr.adapters.hooks import decoder_of
from fastattr.demo.falsify import falsify
from fastattr.demo.scenes import describe, make_scene
from fastattr.evaluate import method_of
from fastattr.images import Visual
from fastattr.metrics import Plausibility
from fastattr.types import DEFAULT_SCALES

SIDE = 96  # pixels; the model takes a picture of this size as it is
NAMED = {rival.name: rival for rival in RIVALS}


@pytest.fixture(scope="module")
def case() -> Case:
    """A description with a false word: the model is not sure of it, so that gradients do not vanish."""
    scene = make_scene(FIRST_SEED + 2, SIDE, n_objects=2)
    said = falsify(scene)[0]
    made = Case(bundled(), Visual((scene.image,)), said.prompt, encode_response(bundled(), said.response))
    with eager_attention(bundled().hf_model), torch.no_grad():  # transformers leaves hooks of its own at first use
        decode(read(made), embeddings(made), output_attentions=True, output_hidden_states=True)
    return made


@cache
def embeddings(case: Case) -> Tensor:
    """`[1 image dim]`."""
    return image_embeddings(read(case))[None]


@pytest.fixture(scope="module")
def unsure(case: Case) -> list[int]:
    """The two targets that the model finds least likely."""
    return log_probs_of_pixels(read(case), read(case).pixels)[0].topk(2, largest=False).indices.tolist()


def said_of(case: Case, visuals: Sequence[Visual]) -> Tensor:
    """Log-probabilities by the engine's own path, `[visual target]`."""
    return log_probs_of_images(case.model, [[visual] for visual in visuals], case.prompt, case.response_ids)


# --- the model opened up ---------------------------------------------------------------------------


def test_pixels_and_embeddings_say_what_the_engine_says(case: Case) -> None:
    for each in (case, blanked(case)):
        reading = read(each)
        expected = said_of(each, [each.visual])
        torch.testing.assert_close(log_probs_of_pixels(reading, reading.pixels), expected, atol=1e-4, rtol=1e-4)
        states = decode(reading, image_embeddings(reading)[None]).last_hidden_state
        torch.testing.assert_close(target_log_probs(reading, states).detach(), expected, atol=1e-4, rtol=1e-4)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("change", [counted, eager_attention, relevance_rules])
def test_everything_is_put_back_also_after_an_error(case: Case, change: Callable[[nn.Module], Any]) -> None:
    hf_model = case.model.hf_model
    implementations = [m.config._attn_implementation for m in hf_model.modules() if hasattr(m, "config")]
    before = hooks_of(hf_model)
    with pytest.raises(KeyError), change(hf_model):
        assert hooks_of(hf_model) > before or decoder_of(hf_model).config._attn_implementation == "eager"
        raise KeyError
    assert hooks_of(hf_model) == before
    assert [m.config._attn_implementation for m in hf_model.modules() if hasattr(m, "config")] == implementations


def test_passes_are_counted_by_sequence(case: Case) -> None:
    reading = read(case)
    image = image_embeddings(reading).repeat(3, 1, 1).requires_grad_()
    with counted(case.model.hf_model) as passes:
        log_probs = target_log_probs(reading, decode(reading, image).last_hidden_state)
        assert (passes.forwards, passes.backwards) == (3, 0)
        torch.autograd.grad(log_probs[:, 0].sum(), image, retain_graph=True)
        torch.autograd.grad(log_probs[:, 1].sum(), image)
        log_probs_of_pixels(reading, reading.pixels.repeat(5, 1, 1, 1))
    decode(reading, image.detach())  # no longer counted
    assert (passes.forwards, passes.backwards) == (8, 6)


N_TARGETS = 3
WINDOWS = (6 + 1) ** 2 + 1  # of regional evidence, and the picture as it is
PASSES = {  # forwards and backwards for N_TARGETS targets
    **{f"fastattr {name}": (len(method_of(name).scales or DEFAULT_SCALES), 0) for name in OWN},
    "fastattr best": (3 + WINDOWS, 0),
    "attention": (1, 0),
    "attention rollout": (1, 0),
    "gradient x attention": (1, N_TARGETS),
    "Grad-CAM": (1, N_TARGETS),
    "gradient x activation": (1, N_TARGETS),
    "input x gradient": (N_TARGETS, N_TARGETS),
    "integrated gradients": (20 * N_TARGETS, 20 * N_TARGETS),
    "AttnLRP (our own form)": (1, N_TARGETS),
    "feature ablation": (37, 0),
    "greedy region search": None,  # see below
}


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_a_rival_gives_a_map_a_target_and_its_price(case: Case, rival: Rival, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_maps, "SEARCH_BUDGET", 2)
    monkeypatch.setattr(rival_maps, "SEARCH_CANDIDATES", 4)
    hf_model, targets = case.model.hf_model, [7, 2, 3]
    before = hooks_of(hf_model), decoder_of(hf_model).config._attn_implementation
    maps, price = explain(rival, case, targets)
    assert (hooks_of(hf_model), decoder_of(hf_model).config._attn_implementation) == before
    assert all(parameter.grad is None for parameter in hf_model.parameters())

    assert maps.shape[0] == len(case.response_ids) and maps.shape[1] == maps.shape[2]
    assert maps.isfinite().all() and not maps.requires_grad
    others = [t for t in range(len(maps)) if t not in targets]
    assert bool(maps[others].any()) == rival.every_token
    assert price.tokens == (len(maps) if rival.every_token else N_TARGETS)
    if PASSES[rival.name] is None:
        alone, step = 2 * 36, 2 * 4  # each cell alone serves all targets; then each target's own candidates
        assert alone < price.forwards <= alone + N_TARGETS * step
    else:
        assert (price.forwards, price.backwards) == PASSES[rival.name]
    assert price.cpu_s > 0
    # a target's map does not depend on which others are asked for
    torch.testing.assert_close(rival.explain(case, [3])[0], maps[3], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["attention", "integrated gradients", "AttnLRP (our own form)", "fastattr lens"])
def test_maps_lie_on_the_object_that_is_named(name: str) -> None:
    for seed in (FIRST_SEED + 1, FIRST_SEED + 2):
        case, words = case_of(seed)
        nouns = words.nouns[:4]
        maps = stretched(explain(NAMED[name], case, [t for noun in nouns for t in noun.targets])[0])
        inside, share = [], []
        for noun in nouns:
            heat = maps[noun.targets[0]]
            cells = noun.mask.reshape(len(heat), len(noun.mask) // len(heat), len(heat), -1).mean((1, 3))
            inside.append(float((heat.numpy() * (cells > 0)).sum() / heat.sum()))
            share.append(float((cells > 0).mean()))
        assert np.mean(inside) > 2 * np.mean(share)


# --- attention -------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
def test_rollout_follows_every_path(seed: int, layers: int, n: int) -> None:
    drawn = np.random.default_rng(seed).dirichlet(np.ones(n), size=(layers, n))
    share = rollout(torch.from_numpy(drawn).float())
    torch.testing.assert_close(share.sum(1), torch.ones(n))
    weights = drawn.tolist()
    for start, end in product(range(n), repeat=2):
        total = 0.0
        for between in product(range(n), repeat=layers - 1):
            path = (start, *between, end)  # from the last layer down
            steps = [0.5 * weights[layers - 1 - i][a][b] + 0.5 * (a == b) for i, (a, b) in enumerate(pairwise(path))]
            total += math.prod(steps)
        assert abs(total - float(share[start, end])) < 1e-5


def plain_weights(attention: Any, states: Tensor) -> Tensor:
    """`[head seq seq]` from a layer's normed input `[seq dim]`, by the formula."""
    seq, size = len(states), attention.head_dim
    query, key = (
        linear(states).view(1, seq, -1, size).transpose(1, 2) for linear in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation(seq))
    scores = (query @ key.transpose(2, 3))[0] * size**-0.5
    return scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf).softmax(-1)


def rotation(seq: int) -> tuple[Tensor, Tensor]:
    cos, sin = decoder_of(bundled().hf_model).rotary_emb(torch.zeros(1), torch.arange(seq)[None])
    return cos, sin


@torch.no_grad()
def test_attention_is_that_of_the_last_layers_at_the_predicting_position(case: Case) -> None:
    reading = read(case)
    decoder = decoder_of(case.model.hf_model)
    states = decode(reading, image_embeddings(reading)[None], output_hidden_states=True).hidden_states
    every = torch.stack(
        [
            plain_weights(layer.self_attn, layer.input_layernorm(entering)[0]).mean(0)
            for layer, entering in zip(decoder.layers, states, strict=False)
        ]
    )
    first, stop = case_layout(reading)
    targets = [0, 5, len(case.response_ids) - 1]
    for k, target in enumerate(targets):
        position = len(reading.encoded.input_ids) + target - 1
        looked = every[-LAST_LAYERS:].mean(0)[position, first:stop].view(6, 6)
        torch.testing.assert_close(NAMED["attention"].explain(case, targets)[k], looked, atol=1e-5, rtol=1e-3)
        followed = rollout(every)[position, first:stop].view(6, 6)
        torch.testing.assert_close(NAMED["attention rollout"].explain(case, targets)[k], followed, atol=1e-5, rtol=1e-3)


def case_layout(reading: Reading) -> tuple[int, int]:
    """Where the image tokens stand, read off the ids."""
    at = (reading.fed_ids == bundled().image_token_id).nonzero().flatten().tolist()
    assert at == list(range(at[0], at[0] + 36))
    return at[0], at[-1] + 1


# --- gradients, by finite differences --------------------------------------------------------------


def log_probs_with(case: Case, moved: Sequence[tuple[nn.Module, Tensor]]) -> Tensor:
    """`[target]`, with something added to the input `[seq dim]` of some modules."""
    reading = read(case)

    def adding(change: Tensor) -> Callable[..., Any]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] + change, *inputs[1:])

        return add

    with ExitStack() as hooks, torch.no_grad():
        for module, change in moved:
            hooks.callback(module.register_forward_pre_hook(adding(change)).remove)
        return target_log_probs(reading, decode(reading, embeddings(case)).last_hidden_state)[0]


def slope(case: Case, module: nn.Module, direction: Tensor, target: int, step: float = 2e-2) -> float:
    """How fast a target's log-probability changes as a module's input is moved."""
    ahead, back = (log_probs_with(case, [(module, sign * step * direction)])[target] for sign in (1, -1))
    return float(ahead - back) / (2 * step)


def entering(case: Case) -> tuple[Tensor, ...]:
    reading = read(case)
    with torch.no_grad():
        return decode(reading, embeddings(case), output_hidden_states=True).hidden_states


def hottest(maps: Tensor, n: int = 3) -> list[int]:
    return maps.abs().flatten().topk(n).indices.tolist()


def test_input_x_gradient_is_how_fast_a_token_falls_as_a_cell_fades(case: Case, unsure: list[int]) -> None:
    maps = NAMED["input x gradient"].explain(case, unsure)
    layer = decoder_of(case.model.hf_model).layers[0]
    states, (first, _) = entering(case)[0][0], case_layout(read(case))
    for k, target in enumerate(unsure):
        for cell in hottest(maps[k]):
            direction = torch.zeros_like(states)
            direction[first + cell] = states[first + cell]
            expected = slope(case, layer, direction, target)
            assert maps[k].flatten()[cell].item() == pytest.approx(expected, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("name", ["Grad-CAM", "gradient x activation"])
def test_cams_weigh_what_enters_the_last_layers(case: Case, unsure: list[int], name: str) -> None:
    maps = NAMED[name].explain(case, unsure)
    layers = decoder_of(case.model.hf_model).layers
    states, (first, stop) = entering(case), case_layout(read(case))
    for k, target in enumerate(unsure):
        for cell in hottest(maps[k]):
            expected = 0.0
            for back in range(1, LAST_LAYERS + 1):
                own = states[len(layers) - back][0]
                direction = torch.zeros_like(own)
                if name == "Grad-CAM":  # the mean gradient over the image: everywhere a 36th of the cell's state
                    direction[first:stop] = own[first + cell] / 36
                else:
                    direction[first + cell] = own[first + cell]
                expected += slope(case, layers[len(layers) - back], direction, target)
            assert maps[k].flatten()[cell].item() == pytest.approx(max(0.0, expected), rel=0.05, abs=2e-3)


def test_gradient_x_attention_is_what_more_attention_would_do(case: Case, unsure: list[int]) -> None:
    """A head that looks a little more at a cell adds the cell's value to what it gives to the output projection."""
    maps = NAMED["gradient x attention"].explain(case, unsure)
    decoder, states, (first, _) = decoder_of(case.model.hf_model), entering(case), case_layout(read(case))
    for k, target in enumerate(unsure):
        position = len(read(case).encoded.input_ids) + target - 1
        for cell in hottest(maps[k], 2):
            products = []
            for back in range(1, LAST_LAYERS + 1):
                layer = decoder.layers[len(decoder.layers) - back]
                attention = layer.self_attn
                with torch.no_grad():
                    normed = layer.input_layernorm(states[len(decoder.layers) - back])[0]
                    weights = plain_weights(attention, normed)[:, position, first + cell]
                    values = attention.v_proj(normed)[first + cell].view(len(weights), -1)
                for head, (weight, value) in enumerate(zip(weights, values, strict=True)):
                    direction = torch.zeros(len(normed), values.numel())
                    direction[position].view(values.shape)[head] = value
                    products.append(max(0.0, weight.item() * slope(case, attention.o_proj, direction, target)))
            assert maps[k].flatten()[cell].item() == pytest.approx(np.mean(products), rel=0.05, abs=1e-3)


def test_integrated_gradients_add_up_to_what_the_picture_adds(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival_maps, "IG_STEPS", 100)
    targets = [2, 3]  # the false word, which the picture speaks against, and the word after it
    whole, grey = said_of(case, [case.visual, case.visual.blank()])
    adds = (whole - grey)[targets]
    assert adds[0] < -5 and adds[1] > 1  # nats
    maps = NAMED["integrated gradients"].explain(case, targets)
    torch.testing.assert_close(maps.sum((1, 2)), adds, atol=0.05, rtol=0.0)


def test_relevance_is_handed_down_by_the_rules(case: Case) -> None:
    """AttnLRP of one decoder layer, layer by layer as written: every share is a product divided by its sum."""
    reading = read(case)
    decoder: Any = decoder_of(case.model.hf_model)
    depth, layer = decoder.config.num_hidden_layers, decoder.layers[0]
    target = 3
    image = image_embeddings(reading)[None].requires_grad_()
    try:
        decoder.config.num_hidden_layers = 1
        plain = target_logits(reading, decode(reading, image).last_hidden_state)[0].detach()
        with relevance_rules(case.model.hf_model):
            logits = target_logits(reading, decode(reading, image).last_hidden_state)[0]
        found = (torch.autograd.grad(logits[target], image)[0] * image).sum(-1)[0].detach()
    finally:
        decoder.config.num_hidden_layers = depth
    torch.testing.assert_close(logits.detach(), plain, atol=1e-4, rtol=1e-4)  # the rules change no value

    with torch.no_grad():
        states, p = entering(case)[0][0].double(), int(reading.predictors[target])
        attention, mlp, first = layer.self_attn, layer.mlp, case_layout(reading)[0]

        def norm_factor(norm: Any, x: Tensor) -> Tensor:
            return norm.weight.double() / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

        def matrix(linear: Any) -> Tensor:
            return linear.weight.double()

        into = states * norm_factor(layer.input_layernorm, states)
        weights = plain_weights(attention, into.float())[:, p, : p + 1].double()  # [head seen]
        heads, size = len(weights), attention.head_dim
        cos, sin = (each[0].double() for each in rotation(len(states)))

        def rotated(linear: Any, position: int) -> Tensor:
            """The projection and the rotation that follows it as one matrix, `[head size dim]`."""
            columns = matrix(linear).T.view(1, -1, heads, size).transpose(1, 2)  # [1 head dim size]
            turned, _ = apply_rotary_pos_emb(columns, columns, cos[position][None, None], sin[position][None, None])
            return turned[0].transpose(1, 2)

        query = rotated(attention.q_proj, p) @ into[p]  # [head size]
        values = (into[: p + 1] @ matrix(attention.v_proj).T).view(p + 1, heads, size)
        mixed = torch.einsum("hs,shd->hd", weights, values)
        after = states[p] + matrix(attention.o_proj) @ mixed.flatten()
        inner = after * norm_factor(layer.post_attention_layernorm, after)
        gate, up = matrix(mlp.gate_proj) @ inner, matrix(mlp.up_proj) @ inner
        product_ = gate * gate.sigmoid() * up
        out = after + matrix(mlp.down_proj) @ product_
        row_ = matrix(case.model.hf_model.get_output_embeddings())[reading.response_ids[target]]

        # from the logit down; a sum hands every term its own share
        per_unit = norm_factor(decoder.norm, out) * row_  # relevance of `out` over its value
        of_product = product_ * (matrix(mlp.down_proj).T @ per_unit)
        of_inner = sum(
            inner * (matrix(linear).T @ (of_product / 2 / value))
            for linear, value in ((mlp.gate_proj, gate), (mlp.up_proj, up))
        )
        per_unit = per_unit + of_inner / after
        per_mixed = (matrix(attention.o_proj).T @ per_unit).view(heads, size)  # relevance of `mixed` over its value
        expected = torch.zeros(36, dtype=torch.float64)
        scores = torch.stack([rotated(attention.k_proj, s) @ into[s] for s in range(p + 1)], 1)  # [head seen size]
        scores = torch.einsum("hd,hsd->hs", query, scores) * size**-0.5
        of_weights = weights * torch.einsum("shd,hd->hs", values, per_mixed) / 2
        of_scores = scores * (of_weights - weights * of_weights.sum(1, keepdim=True))
        for cell in range(36):
            s = first + cell
            through_values = into[s] * (matrix(attention.v_proj).T @ (weights[:, s, None] * per_mixed / 2).flatten())
            key = rotated(attention.k_proj, s)  # [head size dim]
            of_key = of_scores[:, s, None] / 2 * query * (key @ into[s]) * size**-0.5 / scores[:, s, None]
            through_keys = into[s] * torch.einsum("hd,hdx->x", of_key / (key @ into[s]), key)
            expected[cell] = (through_values + through_keys).sum()
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


# --- perturbation ----------------------------------------------------------------------------------


def test_ablation_is_what_painting_a_cell_grey_takes(case: Case) -> None:
    cell = SIDE // 6
    painted = []
    for y, x in product(range(6), repeat=2):
        picture = case.visual.frames[0].copy()
        picture.paste(Image.new("RGB", (cell, cell), (128, 128, 128)), (x * cell, y * cell))
        painted.append(Visual((picture,)))
    whole, *without = said_of(case, [case.visual, *painted])
    expected = (whole - torch.stack(without)).T.unflatten(1, (6, 6))
    found = NAMED["feature ablation"].explain(case, range(len(case.response_ids)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def slow_search(score: Callable[[Sequence[bool]], float], n: int, budget: int, candidates: int) -> list[float]:
    """The search for one word, a set at a time."""

    def worth(cells: set[int]) -> float:
        return score([i in cells for i in range(n)]) - score([i not in cells for i in range(n)])

    alone = [worth({i}) for i in range(n)]
    allowed = sorted(range(n), key=lambda i: -alone[i])[:candidates]
    low, high = min(alone), max(alone)
    heat = [(each - low) / (high - low) for each in alone]
    chosen: list[int] = [allowed[0]]
    while len(chosen) < budget:
        chosen.append(max((i for i in allowed if i not in chosen), key=lambda i: worth({*chosen, i})))
    for rank, cell in enumerate(chosen):
        heat[cell] = 1.0 + budget - rank
    return heat


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.data())
def test_the_search_is_greedy(seed: int, words: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(3, 6))
    candidates = data.draw(st.integers(1, n))
    budget = data.draw(st.integers(1, candidates))
    table = torch.from_numpy(np.random.default_rng(seed).normal(size=(2,) * n + (words,))).float()
    seen: list[Tensor] = []

    def score(visible: Tensor) -> Tensor:
        seen.append(visible)
        return table[tuple(visible.long().T)]

    found = greedy_search(score, n, budget, candidates)
    for word in range(words):
        expected = slow_search(lambda shown, w=word: float(table[(*map(int, shown), w)]), n, budget, candidates)
        torch.testing.assert_close(found[word], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert len(seen) == budget
    assert all(len(each.unique(dim=0)) == len(each) for each in seen)  # no version is read twice in a step


def test_the_search_finds_cells_that_only_count_together() -> None:
    """Neither half of a planted pair suffices; the first is a little needed, which is where the search begins."""
    pair = [20, 21]

    def score(visible: Tensor) -> Tensor:
        return (visible[:, pair].all(1) * 5.0 + visible[:, 20] * 0.5 + visible[:, 3] * 0.1)[:, None]

    assert greedy_search(score, 36, 4, 36)[0].topk(3).indices.tolist() == [20, 21, 3]


# --- results ---------------------------------------------------------------------------------------


def test_words_are_those_of_the_description_and_drawn_by_the_seed() -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + 5):
        case, words = case_of(seed)
        scene = make_scene(seed)
        tokens = [case.model.decode([[i]])[0].strip() for i in case.response_ids.tolist()]
        assert "".join(case.model.decode([case.response_ids.tolist()])) == describe(scene).response
        said = [[tokens[t] for t in noun.targets] for noun in words.nouns]
        assert said == [[word] for item in scene.objects for word in (item.color, item.shape)]
        for k, noun in enumerate(words.nouns):
            np.testing.assert_array_equal(noun.mask, scene.masks[k // 2])
        drawn = [tokens[t].lower() for targets in words.functions for t in targets]
        assert len(drawn) == 2 and {*drawn} <= {"a", "is", "at", "in", "the"}
        assert len({*words.judged}) == 2 and {*words.judged} <= {*range(len(words.nouns))}
        assert case_of(seed)[1].functions == words.functions


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_stretching_keeps_what_speaks_for_a_word(seed: int, shift: float) -> None:
    maps = torch.from_numpy(np.random.default_rng(seed).normal(shift, 1.0, size=(3, 4, 5))).float()
    for before, after in zip(maps, stretched(maps), strict=True):
        positive = [max(0.0, value) for value in before.flatten().tolist()]
        low, high = min(positive), max(positive)
        expected = [(value - low) / (high - low) if high > low else 0.0 for value in positive]
        assert after.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_scene_is_scored_for_methods_and_controls() -> None:
    def planted(case: Case, targets: Sequence[int]) -> Tensor:
        """The map of somebody who was told the scene: the mask of the object each target names."""
        _, words = case_of(FIRST_SEED + 1)
        maps = torch.zeros(len(case.response_ids), *words.nouns[0].mask.shape)
        for noun in words.nouns:
            maps[list(noun.targets)] = torch.from_numpy(noun.mask).float()
        return maps[list(targets)]

    told = Rival("told", "attention", planted, False)
    hidden = replace(told, name="hidden", explain=lambda case, targets: 1 - planted(case, targets))
    scores = score_scene(FIRST_SEED + 1, [told, hidden])
    assert [*scores] == [RANDOM, MASK, "told", "hidden"]
    assert scores["told"].plausibility is not None and scores["hidden"].plausibility is not None
    assert scores["told"].plausibility.obj == scores["told"].plausibility.pointing == 1.0
    assert scores["hidden"].plausibility.pointing == 0.0
    for better, worse in (("told", RANDOM), (RANDOM, "hidden"), (MASK, "hidden")):
        assert scores[better].deletion < scores[worse].deletion
        assert scores[better].insertion > scores[worse].insertion
    assert scores[MASK].price is None and scores["told"].price is not None
    assert scores["told"].price.forwards == 0


def planted_scores(rng: np.random.Generator, name: str, n: int) -> list[Score]:
    good = 0.1 if name == f"fastattr {OWN[1]}" else 0.0
    areas = [
        (float(d) - good, float(i) + good)
        for d, i in zip(rng.uniform(0.2, 0.4, n), rng.uniform(0.6, 0.8, n), strict=True)
    ]
    if name in (RANDOM, MASK):
        return [Score(*area) for area in areas]
    plausible = Plausibility(0.25 + good, 0.5, 0.0, 2, 1, 0, pointing=0.5)
    return [Score(*area, plausible, Price(10, 0.2, 30, 5)) for area in areas]


def test_results_survive_the_file_the_table_and_the_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = {rival.name: rival.kind for rival in RIVALS} | {RANDOM: "control", MASK: "control"}
    scores = {name: planted_scores(rng, name, 8) for name in kinds}
    reference = "fastattr tam"
    lines = [{"kind": kind} | row(name, scores, reference, 10**6) for name, kind in kinds.items()]
    header = {
        "scenes": 8,
        "judged": "2 nouns",
        "reference": reference,
        "interval": "95 %",
        "prices": "CPU",
        "normalisation": "apart",
        "left_out": {"X": "no reason"},
    }
    header, lines = read_jsonl(write_jsonl(tmp_path / "rivals.jsonl", [header, *lines]))
    for name, line in zip(kinds, lines, strict=True):
        mine = np.array([score.deletion for score in scores[name]])
        theirs = np.array([score.deletion for score in scores[reference]])
        assert line["deletion"]["mean"] == pytest.approx(mine.mean(), abs=1e-4)
        assert line["deletion_over_reference"]["mean"] == pytest.approx((mine - theirs).mean(), abs=1e-4)
        assert line["deletion"]["low"] < line["deletion"]["mean"] < line["deletion"]["high"]
    by_name = {line["method"]: line for line in lines}
    # F1 of (.35, .5) is .4118 and of (.25, .5) is .3333
    assert by_name["attention"]["f1_over_reference"]["mean"] == pytest.approx(1 / 3 - 0.35 / 0.85, abs=1e-4)
    assert by_name["attention"]["cpu_s_per_token"] == pytest.approx(0.02)
    assert (by_name["attention"]["forwards_per_token"], by_name["attention"]["backwards_per_token"]) == (3.0, 0.5)
    assert "f1" not in by_name[RANDOM]

    table = rivals_table(header, lines)
    assert "8 held-out scenes, 16 nouns, 8 function words" in table
    assert "| attention | 0.250 | 0.500 | 0.333 | 0.500 |" in table
    assert "| attention | 20 ms | 3 | 0.5 | 1 MB |" in table
    assert "Left out: X. no reason." in table
    with Image.open(draw(header, lines, tmp_path / "rivals.png")) as picture:
        assert picture.width > 1000
