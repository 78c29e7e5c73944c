"""`attribute_states` as a whole: against the float64 oracle on random layouts, and by what the method promises."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattr
from fastattr.types import OutputHead, TokenLayout
from tests.oracles import method as oracle

# Activations here are multiples of 1/64 or so. A range far below that is what rounding left of a map that is all
# interference; stretched to [0, 1] it is noise in any implementation.
NOISE = 1e-3


# --- random prompts, images and states -----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The same prompt and response read at one or several scales, and the output head that read them."""

    head: OutputHead
    hidden: tuple[Tensor, ...]
    ids: tuple[Tensor, ...]
    layouts: tuple[TokenLayout, ...]
    scales: tuple[float, ...]

    def attribute(self, *, filter: bool | None = True, **options: Any) -> fastattr.Attribution:
        options["filter"] = filter
        several = (self.hidden, self.head, self.ids, self.layouts)
        single = (self.hidden[0], self.head, self.ids[0], self.layouts[0])
        return fastattr.attribute_states(*(several if len(self.scales) > 1 else single), scales=self.scales, **options)

    def expect(self, **options: Any) -> oracle.Explained:
        return oracle.explain(self.readings(), self.plain_head(), **options)

    def plain_head(self) -> oracle.Head:
        head = self.head
        bias = None if head.bias is None else head.bias.double().numpy()
        return oracle.Head(head.weight.double().numpy(), bias, head.logit_scale, head.softcap, head.valid_vocab)

    def readings(self) -> list[oracle.Reading]:
        return [
            oracle.Reading(
                hidden.double().numpy(),
                ids.tolist(),
                [(group.positions, group.grid) for group in layout.images],
                layout.prompt,
                layout.response,
                scale,
            )
            for hidden, ids, layout, scale in zip(self.hidden, self.ids, self.layouts, self.scales, strict=True)
        ]


def eighths(rng: np.random.Generator, *shape: int) -> Tensor:
    """Multiples of 1/8: logits are exact in float32, so that rankings and their ties are the same everywhere."""
    return torch.from_numpy(rng.integers(-12, 13, shape) / 8).float()


sides = st.integers(1, 4)
long_side = st.integers(2, 6)
grids = st.one_of(st.tuples(sides, sides), st.tuples(st.just(1), long_side), st.tuples(long_side, st.just(1)))


several_images = st.lists(st.sampled_from([1, 1, 2]), min_size=1, max_size=2)  # frames of each
one_image = st.just([1])


@st.composite
def cases(
    draw: st.DrawFn, max_scales: int = 3, images: st.SearchStrategy[list[int]] = several_images, min_prompt: int = 0
) -> Case:
    """Template, images, more template, user text in two runs, template, response; few ids, so that words repeat."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dim, vocab = draw(st.integers(2, 5)), draw(st.integers(3, 12))
    frames = draw(images)
    n_prompt, n_targets = draw(st.integers(min_prompt, 4)), draw(st.integers(1, 5))
    split = draw(st.integers(0, n_prompt))
    scales = tuple(draw(st.permutations([1.0, 1.5, 2.0])))[: draw(st.integers(1, max_scales))]
    padding = draw(st.sampled_from([0, 3]))

    text, response = rng.integers(0, vocab, n_prompt).tolist(), rng.integers(0, vocab, n_targets).tolist()
    hidden, ids, layouts = [], [], []
    for _ in scales:
        tokens: list[int] = [1]
        spans = []
        for t in frames:
            height, width = draw(grids)
            spans.append((len(tokens), len(tokens) + t * height * width, (t, height, width)))
            tokens += [0] * (t * height * width) + [1]
        start = len(tokens)
        tokens += [*text[:split], 2, *text[split:], 2]
        prompt = [(start, start + split), (start + split + 1, start + n_prompt + 1)]
        tokens += response
        end = len(tokens)
        layouts.append(TokenLayout.from_spans(images=spans, prompt=prompt, response=(end - n_targets, end)))
        ids.append(torch.tensor(tokens))
        hidden.append(eighths(rng, len(tokens) - 1, dim))
    head = OutputHead(
        eighths(rng, vocab + padding, dim),
        bias=eighths(rng, vocab + padding) if draw(st.booleans()) else None,
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        valid_vocab=vocab if padding else None,
    )
    return Case(head, tuple(hidden), tuple(ids), tuple(layouts), scales)


def agree(actual: fastattr.Attribution, expected: oracle.Explained) -> None:
    """Every field; maps and context of all targets whose range is more than rounding noise."""
    clear = np.diff(expected.raw_range)[:, 0] > NOISE
    np.testing.assert_allclose(actual.raw_range.numpy(), expected.raw_range, rtol=1e-4, atol=1e-5)
    assert not (actual.degenerate.numpy() & clear).any()
    for ours, theirs in zip(actual.image, expected.image, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert ((ours >= 0) & (ours <= 1)).all()
        np.testing.assert_allclose(ours.numpy()[clear], theirs[clear], atol=1e-3)
    np.testing.assert_allclose(actual.context.numpy()[clear], expected.context[clear], atol=1e-3)
    np.testing.assert_allclose(actual.log_prob.numpy(), expected.log_prob, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(actual.agreement.numpy(), expected.agreement, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(actual.residual.numpy(), expected.residual, atol=1e-3)
    assert (actual.relevance is None) == (expected.relevance is None)
    if actual.relevance is not None and expected.relevance is not None:
        np.testing.assert_allclose(actual.relevance.numpy(), expected.relevance, atol=1e-5)


# --- against the oracle --------------------------------------------------------------------------

contexts = st.sampled_from(["all", "prompt", "response"])
orders = st.sampled_from(["before", "after"])


@settings(max_examples=60)
@given(cases(max_scales=1), st.sampled_from(["lens", "tam"]), contexts, st.booleans(), st.sampled_from([None, 1.5]))
def test_lens_and_tam_at_one_scale(case: Case, method: str, context: str, smooth: bool, softcap: float | None) -> None:
    case = replace(case, head=replace(case.head, softcap=softcap))
    actual = case.attribute(method=method, context=context, filter=smooth)
    agree(actual, case.expect(method=method, context=context, smooth=smooth))


@settings(max_examples=60)
@given(cases(max_scales=1), st.data(), st.floats(0.6, 0.95), st.sampled_from(["product", "relevance"]), contexts)
def test_arc_at_one_scale(case: Case, data: st.DataObject, p: float, arc_weight: str, context: str) -> None:
    """Persistence is such that rankings of a dozen that differ at all differ by more than float32 can lose."""
    k = data.draw(st.integers(1, case.head.vocab), label="top_k")
    actual = case.attribute(method="arc", top_k=k, rbo_p=p, arc_weight=arc_weight, context=context)
    agree(actual, case.expect(method="arc", k=k, p=p, arc_weight=arc_weight, context=context))


@settings(max_examples=80)
@given(
    cases(),
    st.data(),
    st.sampled_from(["lens", "tam", "arc"]),
    orders,
    contexts,
    st.sampled_from(["product", "relevance"]),
    st.booleans(),
    st.sampled_from(["arithmetic", "geometric"]),
)
def test_several_scales(
    case: Case, data: st.DataObject, method: str, order: str, context: str, arc_weight: str, decision: bool, mean: str
) -> None:
    n = len(case.scales)
    positive = st.lists(st.floats(0.1, 3.0), min_size=n, max_size=n)
    given_weights = data.draw(st.one_of(st.none(), positive), label="scale_weights")
    k = min(3, case.head.vocab)
    actual = case.attribute(
        method=method,
        aggregate=order,
        context=context,
        arc_weight=arc_weight,
        decision_weight=decision,
        scale_mean=mean,
        scale_weights=None if given_weights is None else tuple(given_weights),
        top_k=k,
    )
    expected = case.expect(
        method=method,
        aggregate=order,
        context=context,
        arc_weight=arc_weight,
        decision_weight=decision,
        scale_mean=mean,
        scale_weights=given_weights,
        k=k,
    )
    agree(actual, expected)


# --- by hand: one scene small enough to do on paper ----------------------------------------------

# Classes are directions: cat = e0, dog = e1, and "kitten" = e0 + e1 lights up wherever either does.
CAT, DOG, KITTEN, OTHER, BLANK = range(5)
WORDS = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]])


def small_scene(prompt_state: list[float], target_state: list[float], prompt_word: int = DOG) -> Case:
    """A 1x4 image (cat 2, dog 1, nothing, nothing), one prompt word, a template token, and the response "kitten"."""
    image = [[2.0, 0, 0], [0, 1.0, 0], [0, 0, 0], [0, 0, 0]]
    hidden = torch.tensor([*image, prompt_state, target_state])
    ids = torch.tensor([BLANK] * 4 + [prompt_word, BLANK, KITTEN])
    layout = TokenLayout.from_spans(images=[(0, 4, (1, 1, 4))], prompt=[(4, 5)], response=(6, 7))
    return Case(OutputHead(WORDS), (hidden,), (ids,), (layout,), (1.0,))


def only_map(case: Case, **options: Any) -> list[float]:
    return [round(v, 6) for v in case.attribute(filter=False, **options).image[0].flatten().tolist()]


def test_tam_by_hand() -> None:
    """kitten sees [2 1 0 0]; dog is active (score 1/2) and explains [0 1 0 0]: [2 0 0 0], of 2, is left."""
    case = small_scene([0.0, 0.5, 0.0], [1.0, 1.0, 0.0])
    assert only_map(case, method="lens") == [1.0, 0.5, 0.0, 0.0]
    assert only_map(case, method="tam") == [1.0, 0.0, 0.0, 0.0]
    why = case.attribute(method="tam", filter=False)
    assert why.context.tolist() == [[0.25, 0.0]]
    assert why.raw_range.tolist() == [[0.0, 2.0]]
    assert why.residual.item() == pytest.approx(2 / 5**0.5)
    # logits 1, 1, 2, 0, 0
    assert why.log_prob.item() == pytest.approx(2 - np.log(2 * np.e + np.e**2 + 2))


def test_a_context_score_above_the_image_darkens_it() -> None:
    """The function-word case: the class is most active in the text (4), so the image reaches only 2/4."""
    case = small_scene([0.0, 4.0, 0.0], [1.0, 1.0, 0.0])
    assert only_map(case, method="tam") == [0.5, 0.0, 0.0, 0.0]
    assert case.attribute(method="tam").context.tolist() == [[1.0, 0.0]]


def test_a_repeat_of_the_target_is_no_interference() -> None:
    case = small_scene([0.0, 0.5, 0.0], [1.0, 1.0, 0.0], prompt_word=KITTEN)
    assert only_map(case, method="tam") == only_map(case, method="lens") == [1.0, 0.5, 0.0, 0.0]
    assert only_map(case, method="arc", top_k=3, arc_weight="relevance") == [1.0, 0.5, 0.0, 0.0]
    assert case.attribute(method="tam").context.tolist() == [[0.25, 0.0]]  # but its score is still shown


def test_arc_keeps_context_that_predicts_like_the_target() -> None:
    """The same prompt word, predicting what the target's position predicts, or nothing in common with it."""
    alike = small_scene([0.5, 0.5, 0.0], [1.0, 1.0, 0.0])
    assert alike.attribute(method="arc", top_k=2).relevance is not None
    assert only_map(alike, method="tam") == [1.0, 0.0, 0.0, 0.0]
    assert only_map(alike, method="arc", top_k=2) == [1.0, 0.5, 0.0, 0.0]

    unlike = small_scene([-0.5, 1.0, 2.0], [1.0, -0.5, 0.0])  # its top two: other, dog; the target's: cat, kitten
    why = unlike.attribute(method="arc", top_k=2)
    assert why.relevance is not None and why.relevance.tolist() == [[0.0, 0.0]]
    assert only_map(unlike, method="arc", top_k=2) == only_map(unlike, method="tam") == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("k", "p"), [(3, 0.34), (5, 0.5), (5, 0.9), (10, 0.95), (50, 0.5), (50, 0.9), (50, 0.95)])
@pytest.mark.parametrize("arc_weight", ["product", "relevance"])
def test_context_that_predicts_exactly_alike_is_kept_whole(k: int, p: float, arc_weight: str) -> None:
    """Weights are relative: a relevance that rounding leaves just short of 1 would count like one of 0."""
    case = small_scene([0.5, 0.5, 0.0], [1.0, 1.0, 0.0])
    case = replace(case, head=OutputHead(torch.cat([WORDS, torch.zeros(60, 3)])))
    assert only_map(case, method="arc", top_k=k, rbo_p=p, arc_weight=arc_weight) == [1.0, 0.5, 0.0, 0.0]


def test_a_map_that_is_all_interference_is_dark() -> None:
    """Cat lights one patch and dog, whose row is 0.7 of cat's, explains all of it: rounding is no map."""
    words = torch.tensor([[1.0, 0.0], [0.7, 0.0], [0.0, 1.0]])
    layout = TokenLayout.from_spans(images=[(0, 2, (1, 1, 2))], prompt=[(2, 3)], response=(4, 5))
    ids = torch.tensor([2, 2, 1, 2, 0])
    for lit in torch.linspace(0.1, 3.0, 50).tolist():
        hidden = torch.tensor([[lit, 0.0], [0.0, 0.0], [-1.0, 1.0], [1.0, 0.0]])
        case = Case(OutputHead(words), (hidden,), (ids,), (layout,), (1.0,))
        why = case.attribute(method="arc", arc_weight="relevance", top_k=2)
        assert why.image[0].flatten().tolist() == [0.0, 0.0]
        assert why.degenerate.tolist() == [True]


@pytest.mark.parametrize(("context", "cleaned"), [("all", True), ("prompt", True), ("response", False)])
def test_context_option_chooses_who_may_interfere(context: str, cleaned: bool) -> None:
    case = small_scene([0.0, 0.5, 0.0], [1.0, 1.0, 0.0])
    assert only_map(case, method="tam", context=context) == [1.0, 0.0 if cleaned else 0.5, 0.0, 0.0]


def test_nothing_active_gives_dark_maps_and_says_so() -> None:
    case = small_scene([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    case = replace(case, hidden=(torch.zeros(6, 3),))
    for method in ("lens", "tam", "arc"):
        why = case.attribute(method=method, top_k=2)
        assert why.degenerate.tolist() == [True]
        assert why.image[0].abs().max() == 0 and why.context.abs().max() == 0
        assert why.raw_range.tolist() == [[0.0, 0.0]]


def test_an_even_map_without_context_is_dark_too() -> None:
    """Bright everywhere says as little as dark everywhere; the raw range keeps how bright it was."""
    layout = TokenLayout.from_spans(images=[(0, 2, (1, 1, 2))], prompt=[], response=(3, 4))
    hidden = torch.tensor([[3.0], [3.0], [1.0]])
    case = Case(OutputHead(torch.tensor([[0.0], [1.0]])), (hidden,), (torch.tensor([0, 0, 0, 1]),), (layout,), (1.0,))
    why = case.attribute(method="tam")
    assert why.degenerate.tolist() == [True]
    assert why.image[0].flatten().tolist() == [0.0, 0.0]
    assert why.raw_range.tolist() == [[3.0, 3.0]]


# --- what must not matter ------------------------------------------------------------------------

methods = st.sampled_from(["lens", "tam", "arc"])


def same(left: fastattr.Attribution, right: fastattr.Attribution) -> None:
    """Equal maps of the targets both have, but for rounding."""
    shared = slice(min(len(left.log_prob), len(right.log_prob)))
    clear = left.raw_range.diff(dim=1)[shared, 0] > NOISE
    for ours, theirs in zip(left.image, right.image, strict=True):
        torch.testing.assert_close(ours[shared][clear], theirs[shared][clear], atol=1e-3, rtol=0)


def options(case: Case, method: str) -> dict[str, Any]:
    return {"method": method, "top_k": min(3, case.head.vocab)}


@settings(max_examples=25)
@given(cases(), methods, st.data())
def test_later_tokens_do_not_change_earlier_maps(case: Case, method: str, data: st.DataObject) -> None:
    n_targets = case.layouts[0].n_targets
    kept = data.draw(st.integers(1, n_targets), label="kept")
    shorter = replace(
        case,
        hidden=tuple(hidden[: len(hidden) - n_targets + kept] for hidden in case.hidden),
        ids=tuple(ids[: len(ids) - n_targets + kept] for ids in case.ids),
        layouts=tuple(replace(la, response=(la.response[0], la.response[0] + kept)) for la in case.layouts),
    )
    same(case.attribute(**options(case, method)), shorter.attribute(**options(case, method)))


@settings(max_examples=25)
@given(cases(), methods)
def test_template_tokens_do_not_matter(case: Case, method: str) -> None:
    hidden_states, input_ids = [], []
    for hidden, ids, layout in zip(case.hidden, case.ids, case.layouts, strict=True):
        read = {*layout.image_positions, *layout.context_predictors}
        unread = torch.tensor([p not in read for p in range(len(hidden))])
        wordless = torch.tensor([p not in layout.context for p in range(len(ids))])
        hidden_states.append(torch.where(unread[:, None], 7.0, hidden))
        input_ids.append(torch.where(wordless, 1, ids))
    other = replace(case, hidden=tuple(hidden_states), ids=tuple(input_ids))
    same(case.attribute(**options(case, method)), other.attribute(**options(case, method)))


@settings(max_examples=25)
@given(cases(), methods)
def test_twice_the_activation_is_the_same_map(case: Case, method: str) -> None:
    louder = replace(case, head=replace(case.head, logit_scale=2 * case.head.logit_scale))
    same(case.attribute(**options(case, method)), louder.attribute(**options(case, method)))


@settings(max_examples=25)
@given(cases(max_scales=1), methods, orders)
def test_a_scale_read_twice_adds_nothing(case: Case, method: str, order: str) -> None:
    twice = Case(case.head, case.hidden * 2, case.ids * 2, case.layouts * 2, (1.0, 2.0))
    one = replace(case, scales=(1.0,)).attribute(**options(case, method))
    both = twice.attribute(aggregate=order, decision_weight=True, **options(case, method))
    same(one, both)
    assert both.agreement.tolist() == [[1.0, 1.0]] * case.layouts[0].n_targets


@settings(max_examples=25)
@given(cases(max_scales=1), methods, orders)
def test_a_scale_of_weight_zero_does_not_count(case: Case, method: str, order: str) -> None:
    """All on one grid: a scale of no weight still has a say in which grid is the finest."""
    alone = replace(case, scales=(1.0,))
    other = eighths(np.random.default_rng(0), *case.hidden[0].shape)
    both = Case(case.head, (*case.hidden, other), case.ids * 2, case.layouts * 2, (1.0, 2.0))
    weighted = both.attribute(scale_weights=(1.0, 0.0), aggregate=order, **options(case, method))
    same(alone.attribute(**options(case, method)), weighted)


def test_decision_weight_follows_where_the_model_says_the_same() -> None:
    """At the second scale the model says the target e^-3 times as often: that scale's map all but disappears."""
    head = OutputHead(torch.eye(2))
    # the only word lights the left patch at scale 1 and the right patch at scale 2
    layout = TokenLayout.from_spans(images=[(0, 2, (1, 1, 2))], prompt=[], response=(3, 4))
    ids = torch.tensor([1, 1, 1, 0])
    sure = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    lost = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    case = Case(head, (sure, lost), (ids, ids), (layout, layout), (1.0, 2.0))

    even = case.attribute(method="lens", filter=False, scale_weights=(1.0, 1.0))
    assert even.image[0].flatten().tolist() == [0.0, 0.0]  # 1/2 and 1/2: nothing stands out
    assert even.degenerate.tolist() == [True]
    weighted = case.attribute(method="lens", filter=False, decision_weight=True, scale_weights=(1.0, 1.0))
    said = np.exp(-3)  # p = 1/(1+e^-3) at scale 1 and e^-3/(1+e^-3) at scale 2
    assert weighted.agreement.tolist()[0] == pytest.approx([1.0, said], rel=1e-5)
    assert weighted.raw_range.tolist()[0] == pytest.approx([said / (1 + said), 1 / (1 + said)], rel=1e-5)
    assert weighted.image[0].flatten().tolist() == [1.0, 0.0]


def test_a_geometric_mean_keeps_what_every_scale_lights() -> None:
    """Three patches: lit at both scales, at one, at none. The sum shows the second, the geometric mean nearly hides it."""
    head = OutputHead(torch.eye(2))
    layout = TokenLayout.from_spans(images=[(0, 3, (1, 1, 3))], prompt=[], response=(4, 5))
    ids = torch.tensor([1, 1, 1, 1, 0])
    one = torch.tensor([[4.0, 0.0], [4.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    case = Case(head, (one, other), (ids, ids), (layout, layout), (1.0, 2.0))

    summed = case.attribute(method="lens", filter=False, scale_weights=(1.0, 1.0)).image[0].flatten()
    assert summed.tolist() == pytest.approx([1.0, 0.8, 0.0])
    kept = case.attribute(method="lens", filter=False, scale_weights=(1.0, 1.0), scale_mean="geometric")
    floor = 0.04  # a hundredth of the highest activation
    both, single = np.sqrt((4 + floor) * (1 + floor)) - floor, np.sqrt((4 + floor) * floor) - floor
    assert kept.image[0].flatten().tolist() == pytest.approx([1.0, single / both, 0.0], rel=1e-4)
    assert kept.raw_range.tolist()[0] == pytest.approx([0.0, both], rel=1e-5)


@pytest.mark.parametrize(("grid", "filtered"), [((15, 16), False), ((16, 15), False), ((16, 16), True)])
def test_left_to_itself_the_filter_spares_coarse_grids(grid: tuple[int, int], filtered: bool) -> None:
    rng = np.random.default_rng(0)
    n = grid[0] * grid[1]
    layout = TokenLayout.from_spans(images=[(0, n, (1, *grid))], prompt=[(n, n + 1)], response=(n + 1, n + 3))
    ids = torch.tensor([0] * n + [1, 2, 1])
    case = Case(OutputHead(eighths(rng, 4, 3)), (eighths(rng, n + 2, 3),), (ids,), (layout,), (1.0,))
    itself, on, off = (case.attribute(method="lens", filter=asked).image[0] for asked in (None, True, False))
    assert not torch.equal(on, off)
    assert torch.equal(itself, on if filtered else off)


# --- compat="tam" on more than the golden inputs -------------------------------------------------


@settings(max_examples=40)
@given(cases(max_scales=1, images=one_image, min_prompt=1), st.booleans())
def test_compat_is_the_reference_on_other_layouts(case: Case, smooth: bool) -> None:
    case = replace(case, scales=(1.0,))
    slots = oracle.tam_slots(case.readings()[0], case.plain_head(), smooth=smooth)
    why = case.attribute(method="tam", compat="tam", filter=smooth)
    clear = why.raw_range.diff(dim=1)[:, 0].numpy() > NOISE
    np.testing.assert_allclose(why.image[0][:, 0].numpy()[clear], slots.maps[clear], atol=1e-3)


def test_by_default_every_image_token_counts_the_same() -> None:
    """At scale 2 an image has four times the tokens, so that scale weighs four times as much."""
    head = OutputHead(torch.eye(2))
    layout = TokenLayout.from_spans(images=[(0, 2, (1, 1, 2))], prompt=[], response=(3, 4))
    ids = torch.tensor([1, 1, 1, 0])
    left = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    right = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    case = Case(head, (left, right), (ids, ids), (layout, layout), (1.0, 2.0))
    why = case.attribute(method="lens", filter=False)
    low, high = why.raw_range[0].tolist()
    assert [round(low, 6), round(high, 6)] == [0.2, 0.8]
