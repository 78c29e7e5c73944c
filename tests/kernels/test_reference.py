"""The readable torch forms against their definitions: the float64 oracle, hand-computed values, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fastattr_kernels import reference
from fastattr_kernels.reference import (
    arc_weight,
    context_mean,
    lens,
    lm_head_log_prob,
    lm_head_logit,
    lm_head_summary,
    lm_head_topk,
    multiscale,
    rank_gaussian,
    rank_overlap,
    remove_interference,
    stretch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles import method as oracle

few = settings(max_examples=40)
seeds = st.integers(0, 2**32 - 1)
HALF = (torch.bfloat16, torch.float16)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def whole(seed: int, *shape: int) -> Tensor:
    """Small whole numbers: their products are exact in float32, so that ties are ties everywhere."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, shape)).float()


def double(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def head_of(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> oracle.Head:
    return oracle.Head(double(weight), None if bias is None else double(bias), logit_scale, softcap, valid_vocab)


def largest_bytes(call: Callable[[], object]) -> int:
    """The largest tensor torch makes during a call."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, Tensor):
                    largest = max(largest, each.untyped_storage().nbytes())
            return result

    with Watch():
        call()
    return largest


def close(actual: Tensor, expected: np.ndarray, *, atol: float = 1e-6, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, atol=atol, rtol=rtol)


# --- lens ----------------------------------------------------------------------------------------


def test_lens_by_hand() -> None:
    hidden = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]])
    rows = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    assert lens(hidden, rows).tolist() == [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert lens(hidden, rows, torch.tensor([-1.0, 0.5]), logit_scale=2.0).tolist() == [[4.0, 0.0, 0.0], [1.0, 0.0, 1.0]]


@few
@given(
    seeds,
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 17),
    st.booleans(),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([None, 2.0]),
)
def test_lens_is_the_oracle(
    seed: int, positions: int, targets: int, dim: int, biased: bool, logit_scale: float, softcap: float | None
) -> None:
    hidden, rows = draw(seed, positions, dim), draw(seed + 1, targets, dim)
    bias = draw(seed + 2, targets) if biased else None
    head = head_of(rows, bias, logit_scale=logit_scale, softcap=softcap)
    expected = [[oracle.activation(head, double(state), target) for state in hidden] for target in range(targets)]
    close(lens(hidden, rows, bias, logit_scale=logit_scale, softcap=softcap), np.array(expected))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_upcast_before_anything_is_computed(dtype: torch.dtype) -> None:
    hidden, weight, bias = draw(0, 6, 33).to(dtype), draw(1, 40, 33).to(dtype), draw(2, 40).to(dtype)
    ids = torch.tensor([3, 39, 0, 7, 7, 20])
    up = (hidden.float(), weight.float(), bias.float())

    assert torch.equal(lens(hidden, weight, bias), lens(*up))
    for half, full in zip(lm_head_topk(hidden, weight, 9, bias), lm_head_topk(up[0], up[1], 9, up[2]), strict=True):
        assert torch.equal(half, full)
    assert torch.equal(lm_head_log_prob(hidden, weight, ids, bias), lm_head_log_prob(up[0], up[1], ids, up[2]))


# --- top-k ---------------------------------------------------------------------------------------


@st.composite
def exact_heads(draw_: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int, float]:
    """Hidden states, output embeddings with many equal logits, bias, k and logit scale, all exact in float32."""
    seed, dim = draw_(seeds), draw_(st.integers(1, 4))
    vocab = draw_(st.one_of(st.integers(1, 30), st.integers(31, 700)))
    weight = whole(seed, vocab, dim)
    twins = draw_(st.lists(st.tuples(st.integers(0, vocab - 1), st.integers(0, vocab - 1)), max_size=4))
    for left, right in twins:
        weight[right] = weight[left]
    bias = whole(seed + 1, vocab) if draw_(st.booleans()) else None
    hidden = whole(seed + 2, draw_(st.integers(1, 6)), dim)
    k = draw_(st.one_of(st.integers(1, min(vocab, 8)), st.integers(1, vocab)))
    return hidden, weight, bias, k, draw_(st.sampled_from([1.0, 0.5]))


@few
@given(exact_heads(), st.sampled_from([1, 64, reference.CHUNK_BYTES]))
def test_topk_is_a_full_sort_with_ties_by_lower_id(
    case: tuple[Tensor, Tensor, Tensor | None, int, float], chunk_bytes: int
) -> None:
    hidden, weight, bias, k, logit_scale = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        ids, values = lm_head_topk(hidden, weight, k, bias, logit_scale=logit_scale)
    head = head_of(weight, bias, logit_scale=logit_scale)
    for row, state in enumerate(hidden):
        logits = head.logits(double(state))
        expected = oracle.top_k(logits, k)
        assert ids[row].tolist() == expected
        assert values[row].tolist() == logits[expected].tolist()
    assert ids.dtype == torch.int32 and values.dtype == torch.float32


@pytest.mark.parametrize("vocab", [4, 11, 700])
def test_topk_of_equal_rows_is_the_lowest_ids_in_order(vocab: int) -> None:
    ids, values = lm_head_topk(torch.ones(2, 3), torch.full((vocab, 3), 0.5), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert values.tolist() == [[1.5] * 4] * 2


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_topk_of_sorted_logits(order: str) -> None:
    """The worst cases for anything that prunes: every next id is better, or all the best share one place."""
    weight = torch.arange(1000.0)[:, None]
    weight = weight if order == "ascending" else weight.flip(0)
    ids, values = lm_head_topk(torch.ones(1, 1), weight, 7)
    assert values.tolist() == [[999.0, 998.0, 997.0, 996.0, 995.0, 994.0, 993.0]]
    assert ids.tolist() == [list(range(999, 992, -1)) if order == "ascending" else list(range(7))]


def test_topk_of_a_large_vocabulary_is_the_order_of_float64() -> None:
    hidden, weight = draw(0, 6, 24), draw(1, 3001, 24)
    ids, values = lm_head_topk(hidden, weight, 20)
    for row, state in enumerate(hidden):
        logits = head_of(weight).logits(double(state))
        assert ids[row].tolist() == oracle.top_k(logits, 20)
        close(values[row], logits[ids[row].numpy()], atol=1e-5)


def test_topk_of_a_duplicated_row_lists_the_lower_id_first() -> None:
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0]])
    ids, values = lm_head_topk(torch.tensor([[1.0], [-1.0]]), weight, 4)
    assert ids.tolist() == [[1, 3, 2, 0], [0, 2, 1, 3]]
    assert values.tolist() == [[3.0, 3.0, 2.0, 1.0], [-1.0, -2.0, -3.0, -3.0]]


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**20])
def test_topk_does_not_depend_on_the_chunks(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = draw(0, 5, 8), draw(1, 634, 8)
    whole_ids, whole_values, whole_total = lm_head_summary(hidden, weight, 7)
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
    ids, values, total = lm_head_summary(hidden, weight, 7)
    assert torch.equal(ids, whole_ids)
    torch.testing.assert_close(values, whole_values, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(total, whole_total, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["random", "equal", "ascending"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_never_holds_more_than_a_chunk(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2**18)
    weight = {"random": draw(0, 8_000, 1), "equal": torch.ones(8_000, 1), "ascending": torch.arange(8_000)[:, None]}
    given = torch.ones(256, 1, dtype=dtype), weight[kind].to(dtype)
    assert largest_bytes(lambda: lm_head_summary(*given, 5)) <= 2**18


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_topk_is_a_float64_lexsort_whatever_the_logits(
    k: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of NaN, of -inf and of one value, zeros of both signs, infinities in between, ties everywhere."""
    logits = whole(0, 9, 100)
    logits[0], logits[1], logits[2] = torch.nan, -torch.inf, 3.0
    logits[3, ::2], logits[3, 1::2] = 0.0, -0.0
    logits[4, 7::9], logits[5, ::3], logits[6, 5::7] = torch.nan, -torch.inf, torch.inf
    logits[7, :50], logits[8, 50:] = torch.nan, -torch.inf
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
    handed_out = iter(range(0, 100, 32 if chunk_bytes == 1 else 100))

    def planted(hidden: Tensor, rows: Tensor, *rest: object, out: Tensor) -> Tensor:
        start = next(handed_out)
        return out.copy_(logits[:, start : start + len(rows)])

    monkeypatch.setattr(reference, "head_logits", planted)
    ids, values = lm_head_topk(torch.zeros(9, 1), torch.zeros(100, 1), k)
    for row in range(9):
        ranked = np.nan_to_num(double(logits[row]), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        expected = np.lexsort((np.arange(100), -ranked))[:k]
        assert ids[row].tolist() == expected.tolist()
        assert values[row].tolist() == ranked[expected].tolist()


@pytest.mark.parametrize("form", [lm_head_topk, lm_head_summary])
def test_topk_and_summary_repeat_bit_by_bit(form: Callable[..., tuple[Tensor, ...]]) -> None:
    hidden, weight = draw(0, 130, 16), draw(1, 3000, 16).bfloat16()
    first, *others = (form(hidden, weight, 20) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_topk_of_many_rows_is_that_of_each_row() -> None:
    hidden, weight = whole(0, 2 * reference.BLOCK + 1, 3), whole(1, 400, 3)
    ids, values = lm_head_topk(hidden, weight, 30)
    for row in (0, reference.BLOCK - 1, reference.BLOCK, 2 * reference.BLOCK):
        alone = lm_head_topk(hidden[row : row + 1], weight, 30)
        assert torch.equal(ids[row : row + 1], alone[0]) and torch.equal(values[row : row + 1], alone[1])


@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_padding_rows_take_part_in_nothing(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, bias = draw(0, 4, 5), draw(1, 20, 5), draw(2, 20)
    padded, padded_bias = torch.cat([weight, torch.full((4, 5), 99.0)]), torch.cat([bias, torch.full((4,), 999.0)])
    ids = torch.tensor([19, 0, 3, 3])

    top, values = lm_head_topk(hidden, padded, 20, padded_bias, valid_vocab=20)
    assert [sorted(row) for row in top.tolist()] == [list(range(20))] * 4
    bare = lm_head_topk(hidden, weight, 20, bias)
    assert torch.equal(top, bare[0])
    torch.testing.assert_close(values, bare[1])
    torch.testing.assert_close(
        lm_head_log_prob(hidden, padded, ids, padded_bias, valid_vocab=20), lm_head_log_prob(hidden, weight, ids, bias)
    )


@pytest.mark.parametrize(("k", "valid_vocab", "limit"), [(0, None, 12), (13, None, 12), (-1, None, 12), (11, 10, 10)])
def test_topk_refuses_k_outside_the_vocabulary(k: int, valid_vocab: int | None, limit: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to {limit}"):
        lm_head_topk(draw(0, 2, 3), draw(1, 12, 3), k, valid_vocab=valid_vocab)


def test_softcap_keeps_the_order_and_bounds_the_values() -> None:
    hidden, weight = draw(0, 5, 6), draw(1, 30, 6)
    ids, values = lm_head_topk(hidden, weight, 10, softcap=1.5)
    plain_ids, plain = lm_head_topk(hidden, weight, 10)
    assert torch.equal(ids, plain_ids)
    close(values, 1.5 * np.tanh(double(plain) / 1.5))


# --- log-probability -----------------------------------------------------------------------------


def test_log_prob_by_hand() -> None:
    """Two logits, 0 and log 3: probabilities 1/4 and 3/4."""
    weight = torch.tensor([[0.0], [math.log(3)]])
    close(lm_head_log_prob(torch.ones(2, 1), weight, torch.tensor([0, 1])), np.log([0.25, 0.75]))


@few
@given(
    seeds,
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.booleans(),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([None, 5.0]),
    st.sampled_from([1, 2**20]),
)
def test_log_prob_is_float64_log_softmax(
    seed: int,
    positions: int,
    vocab: int,
    spread: float,
    biased: bool,
    logit_scale: float,
    softcap: float | None,
    chunk_bytes: int,
) -> None:
    hidden, weight = spread * draw(seed, positions, 7), draw(seed + 1, vocab, 7)
    bias = draw(seed + 2, vocab) if biased else None
    ids = torch.from_numpy(np.random.default_rng(seed + 3).integers(0, vocab, positions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        actual = lm_head_log_prob(hidden, weight, ids, bias, logit_scale=logit_scale, softcap=softcap)

    logits = hidden.double() @ weight.double().T
    logits = (logits + (0 if bias is None else bias.double())) * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = torch.log_softmax(logits, dim=1)[torch.arange(positions), ids]
    torch.testing.assert_close(actual, expected.float(), atol=1e-5 * max(1.0, spread), rtol=1e-5)


def test_probabilities_sum_to_one() -> None:
    hidden, weight = draw(0, 1, 4), draw(1, 25, 4)
    each = lm_head_log_prob(hidden.expand(25, 4), weight, torch.arange(25), softcap=3.0)
    assert each.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@few
@given(seeds, st.integers(1, 6), st.integers(1, 90), st.sampled_from([0.1, 30.0, 1e4]), st.sampled_from([1, 2**20]))
def test_summary_is_topk_and_float64_logsumexp(
    seed: int, positions: int, vocab: int, spread: float, chunk_bytes: int
) -> None:
    hidden, weight, bias = spread * draw(seed, positions, 7), draw(seed + 1, vocab + 3, 7), draw(seed + 2, vocab + 3)
    options = {"logit_scale": 0.5, "softcap": 50.0, "valid_vocab": vocab}
    k = min(vocab, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
        ids, values, total = lm_head_summary(hidden, weight, k, bias, **options)
        top = lm_head_topk(hidden, weight, k, bias, **options)
    assert torch.equal(ids, top[0]) and torch.equal(values, top[1])
    logits = 50 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 100)
    expected = torch.logsumexp(logits[:, :vocab], dim=1)
    torch.testing.assert_close(total, expected.float(), atol=2e-5, rtol=2e-6)


def test_logsumexp_of_infinite_logits() -> None:
    weight = torch.tensor([[1.0], [2.0], [0.0]])
    state = torch.tensor([[torch.inf], [-torch.inf], [1.0]])
    _, _, total = lm_head_summary(state, weight[:2], 1)
    assert total[:2].tolist() == [torch.inf, -torch.inf]
    assert total[2].item() == pytest.approx(math.log(math.exp(1) + math.exp(2)))


def test_logit_of_one_id_is_that_of_the_ranking() -> None:
    hidden, weight, bias = whole(0, 6, 4), whole(1, 90, 4), whole(2, 90)
    ids, values = lm_head_topk(hidden, weight, 3, bias, logit_scale=0.5)
    assert torch.equal(lm_head_logit(hidden, weight, ids[:, 1].long(), bias, logit_scale=0.5), values[:, 1])


def test_huge_logits_stay_finite() -> None:
    weight = torch.tensor([[3e4], [0.0], [-3e4]])
    assert lm_head_log_prob(torch.ones(3, 1), weight, torch.arange(3)).tolist() == [0.0, -3e4, -6e4]


# --- rank-biased overlap -------------------------------------------------------------------------

persistence = st.floats(0.05, 0.99)


def rankings(seed: int, n: int, k: int, vocab: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.permutation(vocab)[:k] for _ in range(n)])).int()


def test_rank_overlap_by_hand() -> None:
    """k = 2, p = 1/2. A swapped pair shares nothing at depth 1 and all at depth 2: 1/2 (1/2 * 2/2) = 1/4, of 3/4."""
    actual = rank_overlap(torch.tensor([[5, 9]]), torch.tensor([[5, 9], [9, 5], [5, 1], [1, 2]]), 0.5)
    close(actual, np.array([[1.0, (1 / 4) / (3 / 4), (1 / 2 + 1 / 8) / (3 / 4), 0.0]]))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.integers(0, 12), persistence)
def test_rank_overlap_is_the_definition(seed: int, n: int, m: int, k: int, spare: int, p: float) -> None:
    left, right = rankings(seed, n, k, k + spare), rankings(seed + 1, m, k, k + spare)
    expected = [[oracle.relevance(a, b, p) for b in right.tolist()] for a in left.tolist()]
    close(rank_overlap(left, right, p), np.array(expected))


@few
@given(seeds, st.integers(1, 5), st.integers(1, 60), st.integers(0, 60), persistence)
def test_rank_overlap_laws(seed: int, n: int, k: int, spare: int, p: float) -> None:
    ranks = rankings(seed, n, k, k + spare)
    overlap = rank_overlap(ranks, ranks, p)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    assert torch.equal(overlap, overlap.T)
    assert torch.equal(overlap.diagonal(), torch.ones(n))
    strangers = rank_overlap(ranks, ranks + k + spare, p)
    assert torch.equal(strangers, torch.zeros(n, n))


@few
@given(st.integers(1, 40), persistence)
def test_a_longer_shared_prefix_overlaps_more(k: int, p: float) -> None:
    ranking = torch.arange(k)
    shares = torch.stack([torch.where(torch.arange(k) < shared, ranking, ranking + 1000) for shared in range(k + 1)])
    overlap = rank_overlap(ranking[None], shares, p)[0]
    assert (overlap.diff() >= 0).all() and overlap[0] == 0 and overlap[-1] == 1
    assert overlap[1] > 0


@pytest.mark.parametrize("k", [255, 256, 300])
def test_rankings_deeper_than_a_byte_can_count(k: int) -> None:
    left, right = rankings(0, 1, k, k + 20), rankings(1, 2, k, k + 20)
    expected = [[oracle.relevance(left[0].tolist(), b, 0.99) for b in right.tolist()]]
    close(rank_overlap(left, right, 0.99), np.array(expected))


def test_rank_overlap_knows_ids_of_large_vocabularies() -> None:
    last = 2**31 - 1
    left, right = torch.tensor([[last, 0]], dtype=torch.int32), torch.tensor([[last, 7]], dtype=torch.int32)
    close(rank_overlap(left, right, 0.5), np.array([[(1 / 2 + 1 / 8) / (3 / 4)]]))


@few
@given(seeds, st.integers(1, 9), st.integers(1, 30), st.integers(0, 30), st.integers(1, 20), persistence)
def test_rank_overlap_does_not_depend_on_the_blocks(
    seed: int, n: int, m: int, n_before: int, block: int, p: float
) -> None:
    left, right = rankings(seed, n, 7, 12), rankings(seed + 1, m, 7, 12)
    together = rank_overlap(left, right, p)
    before = torch.arange(m) < n_before + torch.arange(n)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", block)
        assert torch.equal(rank_overlap(left, right, p), together)
        assert torch.equal(rank_overlap(left, right, p, n_before=n_before), torch.where(before, together, 0.0))


def test_rank_overlap_of_a_large_vocabulary_holds_no_table_of_it() -> None:
    context = torch.arange(1200 * 50, dtype=torch.int32).view(1200, 50)
    assert largest_bytes(lambda: rank_overlap(context[600:], context, 0.9, n_before=600)) <= 4 * 2**20


@few
@given(seeds, st.integers(1, 6), st.integers(1, 12), st.integers(0, 12), st.booleans(), st.booleans())
def test_arc_weight_is_what_is_not_relevant_where_a_pair_counts(
    seed: int, n: int, m: int, n_before: int, scored: bool, causal: bool
) -> None:
    left, right = rankings(seed, n, 5, 9), rankings(seed + 1, m, 5, 9)
    counts, scores = draw(seed + 2, n, m) > 0, draw(seed + 3, n, m).abs()
    visible = [[not causal or j < n_before + t for j in range(m)] for t in range(n)]
    expected = np.array([[oracle.relevance(a, b, 0.9) for b in right.tolist()] for a in left.tolist()]) * visible
    relevance, weight = arc_weight(
        left, right, 0.9, counts, scores if scored else None, n_before=n_before if causal else None
    )
    close(relevance, expected)
    close(weight, np.where(counts.numpy(), (1 - expected) * (double(scores) if scored else 1.0), 0.0))


def test_arc_weight_of_a_twin_is_exactly_zero() -> None:
    ranks = rankings(0, 4, 50, 60)
    _, weight = arc_weight(ranks, ranks, 0.9, torch.ones(4, 4, dtype=torch.bool))
    assert weight.diagonal().tolist() == [0.0] * 4


def test_arc_weight_ignores_the_scores_of_pairs_that_do_not_count() -> None:
    ranks, scores = rankings(0, 2, 3, 9), torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]])
    _, weight = arc_weight(ranks, ranks, 0.9, torch.tensor([[False, True], [False, True]]), scores)
    assert weight[:, 0].tolist() == [0.0, 0.0]


# --- interference --------------------------------------------------------------------------------


def test_interference_by_hand() -> None:
    """M = (3 [1 0 0] + 1 [0 4 0]) / 4 = [3/4 1 0]; <A M> = 1.5 + 1 = 2.5, <M M> = 25/16, lam = 1.6."""
    context = torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [9.0, 9.0, 9.0]])
    mean = context_mean(context, torch.tensor([[3.0, 1.0, 0.0]]))
    cleaned, scale, span = remove_interference(torch.tensor([[2.0, 1.0, 5.0]]), mean)
    assert mean.tolist() == [[0.75, 1.0, 0.0]]
    close(scale, np.array([1.6]))
    close(span, np.array([[0.0, 5.0]]))
    close(cleaned, np.array([[0.8, 0.0, 5.0]]))  # 2 - 1.2, 1 - 1.6 below zero, 5 untouched


@few
@given(seeds, st.integers(1, 5), st.integers(0, 6), st.integers(1, 30))
def test_interference_is_the_oracle(seed: int, targets: int, contexts: int, positions: int) -> None:
    activation, context = draw(seed, targets, positions).relu(), draw(seed + 1, contexts, positions).relu()
    weight = draw(seed + 2, targets, contexts).relu()
    cleaned, scale, _ = remove_interference(activation, context_mean(context, weight))
    for t in range(targets):
        expected, lam = oracle.remove_interference(double(activation[t]), double(context), double(weight[t]).tolist())
        close(cleaned[t], expected, atol=1e-5)
        close(scale[t], np.array(lam), atol=1e-5)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40))
def test_what_is_left_is_orthogonal_to_what_was_removed(seed: int, targets: int, positions: int) -> None:
    activation, mean = draw(seed, targets, positions).relu(), draw(seed + 1, targets, positions).relu()
    cleaned, scale, _ = remove_interference(activation, mean)
    left = double(activation) - double(scale)[:, None] * double(mean)
    np.testing.assert_allclose((left * double(mean)).sum(1), 0.0, atol=1e-5 * positions)
    close(cleaned, np.maximum(left, 0), atol=1e-5)
    assert (cleaned <= activation + 1e-6).all()


def test_context_that_does_not_count_gives_the_map_back() -> None:
    activation, context = draw(0, 3, 8).relu(), draw(1, 4, 8).relu()
    mean = context_mean(context, torch.zeros(3, 4))
    cleaned, scale, _ = remove_interference(activation, mean)
    assert torch.equal(mean, torch.zeros(3, 8))
    assert torch.equal(cleaned, activation)
    assert scale.tolist() == [0.0, 0.0, 0.0]


@few
@given(seeds, st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_context_that_cannot_count_need_not_be_read(seed: int, targets: int, n_before: int, block: int) -> None:
    contexts = n_before + targets
    context, weight = whole(seed, contexts, 6), draw(seed + 1, targets, contexts).abs()
    weight = torch.where(torch.arange(contexts) < n_before + torch.arange(targets)[:, None], weight, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", block)
        torch.testing.assert_close(context_mean(context, weight, n_before=n_before), context_mean(context, weight))


@few
@given(seeds, st.integers(1, 9), st.integers(1, 30), st.integers(1, 4))
def test_the_span_of_a_cleaned_map_is_its_extremes(seed: int, targets: int, positions: int, block: int) -> None:
    activation, mean = draw(seed, targets, positions).relu(), draw(seed + 1, targets, positions).relu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", block)
        cleaned, _, span = remove_interference(activation, mean)
    assert span.tolist() == [[row.min().item(), row.max().item()] for row in cleaned]
    whole_cleaned, _, _ = remove_interference(activation, mean)
    assert torch.equal(cleaned, whole_cleaned)


def test_only_the_proportions_of_the_weights_count() -> None:
    context, weight = draw(1, 4, 8).relu(), draw(2, 3, 4).abs()
    torch.testing.assert_close(context_mean(context, 1000 * weight), context_mean(context, weight))


@pytest.mark.parametrize("poisoned", ["activation", "mean"])
def test_interference_does_not_swallow_nan(poisoned: str) -> None:
    """A map of zeros, or one that was not cleaned, would look like a right one."""
    maps = {
        name: torch.rand(3, 5, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(("activation", "mean"))
    }
    maps[poisoned][1, 2] = torch.nan
    cleaned, _, span = remove_interference(**maps)
    assert span.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert cleaned[1].isnan().all() and not cleaned[[0, 2]].isnan().any()


def test_a_map_that_is_all_interference_vanishes() -> None:
    mean = draw(0, 2, 9).relu()
    cleaned, scale, _ = remove_interference(3 * mean, mean)
    torch.testing.assert_close(scale, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(cleaned, torch.zeros(2, 9), atol=1e-5, rtol=0)


# --- stretch -------------------------------------------------------------------------------------


def test_stretch_by_hand() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[5.0, 5.0], [4.0, 6.0]]])
    actual = stretch(maps, torch.tensor([[2.0, 4.0], [5.0, 5.0]]))
    assert actual.tolist() == [[[0.0, 0.0], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]  # clamped; an empty span


@few
@given(seeds, st.integers(2, 30), st.floats(-5, 5, width=32), st.floats(0, 5, width=32))
def test_stretch_keeps_the_order_and_fills_the_span(seed: int, size: int, low: float, length: float) -> None:
    values = draw(seed, 1, size).mul(3).sort(dim=1).values
    stretched = stretch(values, torch.tensor([[low, low + length]]))
    assert (stretched.diff() >= 0).all() and ((stretched >= 0) & (stretched <= 1)).all()
    own = stretch(values, torch.tensor([[values.min().item(), values.max().item()]]))
    assert own[0, 0] == 0 and own[0, -1] == 1


# --- rank-Gaussian filter ------------------------------------------------------------------------

sides = st.integers(1, 6)


def test_filter_by_hand() -> None:
    """One lit pixel among nine: mean 1/9, std sqrt(8)/9, sigma^2 = 8; the lit value is rank 8, weight exp(-16/16)."""
    maps = torch.zeros(1, 1, 3, 3)
    maps[0, 0, 1, 1] = 1.0
    weights = [math.exp(-((rank - 4) ** 2) / 16) for rank in range(9)]
    assert rank_gaussian(maps)[0, 0, 1, 1].item() == pytest.approx(weights[8] / sum(weights), rel=1e-5)


def test_filter_pads_by_reflection() -> None:
    """The corner's window sees [0 1; 2 3] as 3 2 3 / 1 0 1 / 3 2 3, so the lone 0 is its lowest rank."""
    window = [0, 1, 1, 2, 2, 3, 3, 3, 3]
    sigma = np.std(window) / np.mean(window)
    weights = np.exp(-((np.arange(9) - 4) ** 2) / (2 * sigma**2))
    actual = rank_gaussian(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]))[0, 0, 0, 0].item()
    assert actual == pytest.approx((weights * window).sum() / weights.sum(), rel=1e-5)


@few
@given(seeds, st.integers(1, 3), st.integers(1, 2), sides, sides, st.sampled_from([1.0, 1e-6, 1e6]))
def test_filter_is_the_oracle(seed: int, targets: int, frames: int, height: int, width: int, size: float) -> None:
    maps = size * draw(seed, targets, frames, height, width).relu()
    expected = [[oracle.rank_gaussian(double(frame)) for frame in target] for target in maps]
    close(rank_gaussian(maps), np.array(expected), atol=1e-5 * size)


@few
@given(st.floats(0, 1e6, width=32), sides, sides)
def test_filter_keeps_constants(value: float, height: int, width: int) -> None:
    maps = torch.full((2, 1, height, width), value)
    assert torch.equal(rank_gaussian(maps), maps)


@pytest.mark.parametrize("smallest", [1.0, 1e-8, 1e-16, 1e-24])
def test_filter_keeps_constant_windows_beside_others(smallest: float) -> None:
    """Where a window is flat, the map is kept to the last bit, however its sums round or underflow."""
    sizes = torch.logspace(0, math.log10(smallest), 40)
    stripes = (draw(0, 1, 1, 1, 40).abs() * sizes).repeat_interleave(5, dim=3).repeat(1, 1, 3, 1)
    middle = torch.arange(200) % 5 == 2
    assert torch.equal(rank_gaussian(stripes)[..., middle], stripes[..., middle])


def test_filter_sorts_every_window_of_zeros_and_ones() -> None:
    """A network that sorts these sorts everything; a wrong one would give some value the weight of another rank."""
    windows = (torch.arange(512)[:, None] >> torch.arange(9) & 1).float().view(512, 1, 3, 3)
    expected = [oracle.rank_gaussian(double(window))[1, 1] for window in windows[:, 0]]
    close(rank_gaussian(windows)[:, 0, 1, 1], np.array(expected))


@pytest.mark.parametrize("spread", [0.3, 0.17, 0.1, 1e-2, 1e-3, 1e-5])
def test_filter_of_nearly_flat_windows(spread: float) -> None:
    """The variance is a difference of sums: where it drowns in rounding no weight depends on it any more."""
    maps = 1 + spread * draw(0, 3, 1, 12, 12).clamp(-3, 3)
    expected = [[oracle.rank_gaussian(double(frame)) for frame in target] for target in maps]
    close(rank_gaussian(maps), np.array(expected), atol=0, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-140, -126, -100, -40, 40, 100, 126])
def test_filter_commutes_with_powers_of_two(exponent: int) -> None:
    maps = draw(0, 2, 1, 6, 5).relu()
    scaled = torch.ldexp(maps.double(), torch.tensor(exponent)).float()
    expected = torch.ldexp(rank_gaussian(maps).double(), torch.tensor(exponent)).float()
    assert torch.isfinite(rank_gaussian(scaled)).all()
    if -100 <= exponent <= 100:  # below, float32 itself loses digits
        assert torch.equal(rank_gaussian(scaled), expected)


@few
@given(seeds, st.integers(1, 7), st.integers(1, 2), sides, sides, st.integers(1, 5))
def test_filter_does_not_depend_on_the_blocks(
    seed: int, targets: int, frames: int, height: int, width: int, block: int
) -> None:
    maps = draw(seed, targets, frames, height, width).relu()
    span = torch.stack([torch.zeros(targets), maps.flatten(1).amax(1)], dim=1)
    together, spanned = rank_gaussian(maps), rank_gaussian(maps, span)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_BYTES", block * 4 * 16 * height * (width + 2))  # maps at a time
        assert torch.equal(rank_gaussian(maps), together)
        assert torch.equal(rank_gaussian(maps, span), spanned)


@few
@given(seeds, st.integers(1, 4), st.integers(1, 2), sides, sides)
def test_filter_with_a_span_is_the_oracle_of_the_stretched_map(
    seed: int, targets: int, frames: int, height: int, width: int
) -> None:
    maps, span = draw(seed, targets, frames, height, width).relu(), draw(seed + 1, targets, 2).sort(dim=1).values
    span[0] = 1.0  # empty: nothing to show
    low, high = double(span)[:, :, None, None, None].transpose(1, 0, 2, 3, 4)
    stretched = np.clip((double(maps) - low) / np.where(high > low, high - low, np.inf), 0, 1)
    expected = [[oracle.rank_gaussian(frame) for frame in target] for target in stretched]
    actual = rank_gaussian(maps, span)
    close(actual, np.array(expected), atol=1e-5)
    assert not actual[0].any()


def test_filter_of_no_targets_is_nothing() -> None:
    assert rank_gaussian(torch.empty(0, 1, 4, 4)).shape == (0, 1, 4, 4)


@few
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.one_of(st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1.0 + 2**-23]), st.floats(0, 2.0**60, width=32)),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_filter_is_finite_and_stays_within_its_window(grid: list[list[float]]) -> None:
    maps = torch.tensor(grid)[None, None]
    filtered = rank_gaussian(maps)
    assert torch.isfinite(filtered).all()
    highest = torch.nn.functional.max_pool2d(maps, 3, stride=1, padding=1)
    lowest = -torch.nn.functional.max_pool2d(-maps, 3, stride=1, padding=1)
    rounding = 1e-37 * float(maps.amax())  # what is that much smaller than the map's greatest value loses digits
    assert (filtered <= highest * (1 + 1e-5) + rounding).all() and (filtered >= lowest * (1 - 1e-5) - rounding).all()


def test_filter_treats_frames_and_targets_apart() -> None:
    maps = draw(0, 2, 3, 4, 5).relu()
    together = rank_gaussian(maps)
    for target in range(2):
        for frame in range(3):
            alone = rank_gaussian(maps[target, frame][None, None])[0, 0]
            torch.testing.assert_close(together[target, frame], alone)


# --- multi-scale sum -----------------------------------------------------------------------------


def test_bilinear_by_hand() -> None:
    """Half-pixel centres: four pixels over two read at -1/4 (clamped), 1/4, 3/4 and 5/4 (clamped)."""
    actual, extremes = multiscale([torch.tensor([[[[0.0, 1.0]]]])], torch.ones(1, 1), (1, 4))
    close(actual, np.array([[[[0.0, 0.25, 0.75, 1.0]]]]))
    assert extremes.tolist() == [[0.0, 1.0]]


@few
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from([1, 2**21]),
)
def test_multiscale_is_the_oracle(
    seed: int, targets: int, frames: int, grids: list[tuple[int, int]], size: tuple[int, int], block_bytes: int
) -> None:
    maps = [draw(seed + s, targets, frames, *grid) for s, grid in enumerate(grids)]
    weights = draw(seed + 99, targets, len(grids))
    expected = np.zeros((targets, frames, *size))
    for s, of_scale in enumerate(maps):
        for t in range(targets):
            for f in range(frames):
                expected[t, f] += float(weights[t, s]) * oracle.bilinear(double(of_scale[t, f]), *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_BYTES", block_bytes)
        actual, extremes = multiscale(maps, weights, size)
    close(actual, expected, atol=1e-5)
    assert extremes.tolist() == [[each.min().item(), each.max().item()] for each in actual]


def test_multiscale_is_linear_in_the_weights() -> None:
    maps = [draw(0, 2, 1, 3, 4), draw(1, 2, 1, 5, 2)]
    left, right = draw(2, 2, 2), draw(3, 2, 2)
    mixed, of_left, of_right = (multiscale(maps, each, (6, 7))[0] for each in (2 * left - right, left, right))
    torch.testing.assert_close(mixed, 2 * of_left - of_right)


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_multiscale_leaves_a_map_of_the_right_size_alone(value: float) -> None:
    maps = draw(0, 2, 3, 4, 5)
    maps[0, 1, 2, 3] = value
    same, _ = multiscale([maps], torch.ones(2, 1), (4, 5))
    torch.testing.assert_close(same, maps, atol=0, rtol=0, equal_nan=True)


@few
@given(seeds, st.tuples(sides, sides), st.tuples(sides, sides), st.booleans())
def test_multiscale_in_bytes_is_the_stretched_sum(
    seed: int, grid: tuple[int, int], size: tuple[int, int], spanned: bool
) -> None:
    maps, weights = [draw(seed, 2, 1, *grid), draw(seed + 1, 2, 1, *size)], draw(seed + 2, 2, 2).abs()
    span = draw(seed + 3, 2, 2).sort(dim=1).values if spanned else None
    exact, extremes = multiscale(maps, weights, size)
    actual, same_extremes = multiscale(maps, weights, size, dtype=torch.uint8, span=span)
    low, high = double(extremes if span is None else span).T[:, :, None, None, None]
    expected = np.clip((double(exact) - low) / np.where(high > low, high - low, np.inf), 0, 1) * 255
    assert actual.dtype == torch.uint8 and torch.equal(extremes, same_extremes)
    assert np.abs(actual.numpy() - expected).max() <= 0.5 + 1e-3  # rounded, not cut off
    half, _ = multiscale(maps, weights, size, dtype=torch.float16)
    assert torch.equal(half, exact.half())


def test_multiscale_of_many_targets_holds_one_block_of_float32() -> None:
    maps, weights = [draw(0, 64, 1, 4, 4)], torch.ones(64, 1)
    result = 64 * 128 * 128
    assert largest_bytes(lambda: multiscale(maps, weights, (128, 128), dtype=torch.uint8)) <= max(result, 2 * 2**20)


@few
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.tuples(sides, sides))
def test_multiscale_keeps_constants_if_weights_sum_to_one(grids: list[tuple[int, int]], size: tuple[int, int]) -> None:
    maps = [torch.full((1, 1, *grid), 0.7) for grid in grids]
    weights = torch.full((1, len(grids)), 1 / len(grids))
    torch.testing.assert_close(multiscale(maps, weights, size)[0], torch.full((1, 1, *size), 0.7))


def test_multiscale_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one scale"):
        multiscale([], torch.ones(2, 0), (3, 3))


# --- devices --------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations that are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_is_given_few_operations(dtype: torch.dtype) -> None:
    """One token of a large model on the meta device: with a CPU's chunks it would be 132 chunks and 1,600 operations."""
    hidden = torch.empty(1, 3584, dtype=dtype, device="meta")
    weight = torch.empty(152_064, 3584, dtype=dtype, device="meta")
    with Operations() as seen:
        lm_head_log_prob(hidden, weight, torch.zeros(1, dtype=torch.long, device="meta"))
    chunks = 1 if dtype == torch.float32 else 17  # upcast into 128 MiB at a time
    assert chunks <= seen.count <= 20 + 20 * chunks


def test_a_device_that_multiplies_into_float32_takes_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_on_matrix_units", lambda hidden, rows: True)
    weight = torch.empty(152_064, 3584, dtype=torch.bfloat16, device="meta")
    for positions, chunks in ((1, 1), (220, 1), (1024, 5)):
        hidden = torch.empty(positions, 3584, dtype=torch.bfloat16, device="meta")
        assert -(-152_064 // reference._columns_at_once(hidden, weight)) == chunks


@few
@given(exact_heads(), st.sampled_from([1, 2**14, reference.DEVICE_CHUNK_BYTES]))
def test_log_probabilities_are_the_same_in_a_devices_chunks(
    case: tuple[Tensor, Tensor, Tensor | None, int, float], chunk_bytes: int
) -> None:
    hidden, weight, bias, _, logit_scale = case
    ids = torch.arange(len(hidden)) % len(weight)

    def columns(hidden: Tensor, weight: Tensor) -> int:  # as wide as a device takes them
        return max(reference.GROUP, chunk_bytes // (4 * len(hidden)) // reference.GROUP * reference.GROUP)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_columns_at_once", columns)
        found = lm_head_log_prob(hidden, weight, ids, bias, logit_scale=logit_scale)
    head = head_of(weight, bias, logit_scale=logit_scale)
    close(found, np.array([oracle.log_prob(head, double(hidden[row]), int(ids[row])) for row in range(len(ids))]))


class OnGpu(Tensor):
    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError, torch.OutOfMemoryError])
def test_where_mm_gives_no_float32_both_sides_are_upcast(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.8 has no `out_dtype`, and ROCm refuses it; running out of memory is neither."""
    mm = torch.mm

    def refusing(*args: Any, **kwargs: Any) -> Tensor:
        if "out_dtype" in kwargs:
            raise error("no out_dtype here")
        return mm(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", refusing)
    reference._mm_gives_float32.cache_clear()
    hidden, weight = (draw(seed, n, 16).bfloat16().as_subclass(OnGpu) for seed, n in ((1, 3), (2, 40)))
    try:
        if error is torch.OutOfMemoryError:
            with pytest.raises(error):
                lm_head_log_prob(hidden, weight, torch.tensor([1, 2, 3]))
            return
        found = lm_head_log_prob(hidden, weight, torch.tensor([1, 2, 3]))
    finally:
        reference._mm_gives_float32.cache_clear()
    logits = torch.from_numpy(double(hidden) @ double(weight).T)
    expected = logits.log_softmax(1)[range(3), [1, 2, 3]]
    torch.testing.assert_close(found.as_subclass(Tensor).double(), expected, rtol=1e-5, atol=1e-5)


def test_where_mm_gives_float32_nothing_is_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def widening(left: Tensor, right: Tensor, **kwargs: Any) -> Tensor:
        asked.append((left.dtype, right.dtype, kwargs))
        return left.float() @ right.float()

    monkeypatch.setattr(torch, "mm", widening)
    reference._mm_gives_float32.cache_clear()
    try:
        lens(*(draw(seed, n, 16).bfloat16().as_subclass(OnGpu) for seed, n in ((1, 3), (2, 40))))
    finally:
        reference._mm_gives_float32.cache_clear()
    assert asked == [(torch.bfloat16, torch.bfloat16, {"out_dtype": torch.float32})] * 2  # the trial, and the product


@pytest.mark.parametrize("valid_vocab", [0, 41])
def test_valid_ids_are_within_the_vocabulary(valid_vocab: int) -> None:
    hidden, weight = draw(1, 3, 8), draw(2, 40, 8)
    told = f"valid_vocab is {valid_vocab}, expected 1 to 40"
    for call in (
        lambda: lm_head_topk(hidden, weight, 1, valid_vocab=valid_vocab),
        lambda: lm_head_log_prob(hidden, weight, torch.arange(3), valid_vocab=valid_vocab),
    ):
        with pytest.raises(ValueError, match=told):
            call()
