"""The readable torch forms against their definitions: the float64 oracle, hand-computed values, laws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fastattr_kernels import (
    context_mean,
    lens,
    lm_head_log_prob,
    lm_head_topk,
    multiscale,
    rank_gaussian,
    rank_overlap,
    reference,
    remove_interference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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


@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**20])
def test_topk_never_holds_more_logits_than_one_chunk(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, k = draw(0, 5, 8), draw(1, 123, 8), 7
    widths: list[int] = []
    plain: Callable[..., Tensor] = reference._logits

    def watched(hidden: Tensor, rows: Tensor, *rest: object) -> Tensor:
        widths.append(len(rows))
        return plain(hidden, rows, *rest)

    whole_ids, whole_values = lm_head_topk(hidden, weight, k)
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(reference, "_logits", watched)
    ids, values = lm_head_topk(hidden, weight, k)
    assert torch.equal(ids, whole_ids)
    torch.testing.assert_close(values, whole_values, atol=1e-6, rtol=1e-6)
    assert sum(widths) == 123 and max(widths) <= max(k, chunk_bytes // (4 * 5))


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
    torch.testing.assert_close(overlap, overlap.T)
    torch.testing.assert_close(overlap.diagonal(), torch.ones(n))
    strangers = rank_overlap(ranks, ranks + k + spare, p)
    assert torch.equal(strangers, torch.zeros(n, n))


@few
@given(st.integers(1, 40), persistence)
def test_a_longer_shared_prefix_overlaps_more(k: int, p: float) -> None:
    ranking = torch.arange(k)
    shares = torch.stack([torch.where(torch.arange(k) < shared, ranking, ranking + 1000) for shared in range(k + 1)])
    overlap = rank_overlap(ranking[None], shares, p)[0]
    assert (overlap.diff() >= 0).all() and overlap[0] == 0 and overlap[-1].item() == pytest.approx(1.0)
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


# --- interference --------------------------------------------------------------------------------


def test_interference_by_hand() -> None:
    """M = (3 [1 0 0] + 1 [0 4 0]) / 4 = [3/4 1 0]; <A M> = 1.5 + 1 = 2.5, <M M> = 25/16, lam = 1.6."""
    context = torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [9.0, 9.0, 9.0]])
    mean = context_mean(context, torch.tensor([[3.0, 1.0, 0.0]]))
    cleaned, scale = remove_interference(torch.tensor([[2.0, 1.0, 5.0]]), mean)
    assert mean.tolist() == [[0.75, 1.0, 0.0]]
    close(scale, np.array([1.6]))
    close(cleaned, np.array([[0.8, 0.0, 5.0]]))  # 2 - 1.2, 1 - 1.6 below zero, 5 untouched


@few
@given(seeds, st.integers(1, 5), st.integers(0, 6), st.integers(1, 30))
def test_interference_is_the_oracle(seed: int, targets: int, contexts: int, positions: int) -> None:
    activation, context = draw(seed, targets, positions).relu(), draw(seed + 1, contexts, positions).relu()
    weight = draw(seed + 2, targets, contexts).relu()
    cleaned, scale = remove_interference(activation, context_mean(context, weight))
    for t in range(targets):
        expected, lam = oracle.remove_interference(double(activation[t]), double(context), double(weight[t]).tolist())
        close(cleaned[t], expected, atol=1e-5)
        close(scale[t], np.array(lam), atol=1e-5)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40))
def test_what_is_left_is_orthogonal_to_what_was_removed(seed: int, targets: int, positions: int) -> None:
    activation, mean = draw(seed, targets, positions).relu(), draw(seed + 1, targets, positions).relu()
    cleaned, scale = remove_interference(activation, mean)
    left = double(activation) - double(scale)[:, None] * double(mean)
    np.testing.assert_allclose((left * double(mean)).sum(1), 0.0, atol=1e-5 * positions)
    close(cleaned, np.maximum(left, 0), atol=1e-5)
    assert (cleaned <= activation + 1e-6).all()


def test_context_that_does_not_count_gives_the_map_back() -> None:
    activation, context = draw(0, 3, 8).relu(), draw(1, 4, 8).relu()
    mean = context_mean(context, torch.zeros(3, 4))
    cleaned, scale = remove_interference(activation, mean)
    assert torch.equal(mean, torch.zeros(3, 8))
    assert torch.equal(cleaned, activation)
    assert scale.tolist() == [0.0, 0.0, 0.0]


def test_only_the_proportions_of_the_weights_count() -> None:
    context, weight = draw(1, 4, 8).relu(), draw(2, 3, 4).abs()
    torch.testing.assert_close(context_mean(context, 1000 * weight), context_mean(context, weight))


def test_a_map_that_is_all_interference_vanishes() -> None:
    mean = draw(0, 2, 9).relu()
    cleaned, scale = remove_interference(3 * mean, mean)
    torch.testing.assert_close(scale, torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(cleaned, torch.zeros(2, 9), atol=1e-5, rtol=0)


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
    torch.testing.assert_close(rank_gaussian(maps), maps, atol=0, rtol=1e-6)


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
    assert (filtered <= highest * (1 + 1e-5)).all() and (filtered >= lowest * (1 - 1e-5)).all()


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
    actual = multiscale([torch.tensor([[[[0.0, 1.0]]]])], torch.ones(1, 1), (1, 4))
    close(actual, np.array([[[[0.0, 0.25, 0.75, 1.0]]]]))


@few
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_multiscale_is_the_oracle(
    seed: int, targets: int, frames: int, grids: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    maps = [draw(seed + s, targets, frames, *grid) for s, grid in enumerate(grids)]
    weights = draw(seed + 99, targets, len(grids))
    expected = np.zeros((targets, frames, *size))
    for s, of_scale in enumerate(maps):
        for t in range(targets):
            for f in range(frames):
                expected[t, f] += float(weights[t, s]) * oracle.bilinear(double(of_scale[t, f]), *size)
    close(multiscale(maps, weights, size), expected, atol=1e-5)


def test_multiscale_is_linear_in_the_weights() -> None:
    maps = [draw(0, 2, 1, 3, 4), draw(1, 2, 1, 5, 2)]
    left, right = draw(2, 2, 2), draw(3, 2, 2)
    torch.testing.assert_close(
        multiscale(maps, 2 * left - right, (6, 7)), 2 * multiscale(maps, left, (6, 7)) - multiscale(maps, right, (6, 7))
    )


def test_multiscale_leaves_a_map_of_the_right_size_alone() -> None:
    maps = draw(0, 2, 3, 4, 5)
    assert torch.equal(multiscale([maps], torch.ones(2, 1), (4, 5)), maps)


@few
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.tuples(sides, sides))
def test_multiscale_keeps_constants_if_weights_sum_to_one(grids: list[tuple[int, int]], size: tuple[int, int]) -> None:
    maps = [torch.full((1, 1, *grid), 0.7) for grid in grids]
    weights = torch.full((1, len(grids)), 1 / len(grids))
    torch.testing.assert_close(multiscale(maps, weights, size), torch.full((1, 1, *size), 0.7))


def test_multiscale_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one scale"):
        multiscale([], torch.ones(2, 0), (3, 3))
