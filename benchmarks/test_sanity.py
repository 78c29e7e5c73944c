"""Ranks are ranks, regions lie where they should, and random models leave the given one alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import fastattr
from benchmarks import sanity
from benchmarks.record import read_jsonl, write_jsonl
from benchmarks.sanity import CASCADE, CHANGES, CONTROL, GRID, HEAD, NO_DECODER, OTHER_OBJECT, RANDOM, Compared
from fastattr.demo.scenes import make_scene
from fastattr.evaluate import METHODS

SEED = sanity.FIRST_SEED + 1_000_000  # of scenes that no result is about
SIDE = 192
SMALL_INTEGERS = arrays(np.int64, (3, 4), elements=st.integers(-6, 6))  # many ties


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.fixture(scope="module")
def scenes(model: fastattr.Model) -> list[list[Compared]]:
    """Two scenes through everything, the first with two objects."""
    assert [len(make_scene(seed).objects) for seed in (SEED, SEED + 1)] == [2, 1]
    return [sanity.compare_scene(model, seed) for seed in (SEED, SEED + 1)]


# --- rank correlation --------------------------------------------------------------------------------


def slow_ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def slow_spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's formula on `slow_ranks`, term by term; NaN for 0 / 0."""
    x, y = slow_ranks(a), slow_ranks(b)
    mean = (len(x) + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    below = sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y)
    return top / math.sqrt(below) if below else math.nan


def test_spearman_of_known_examples() -> None:
    assert sanity.average_ranks(np.array([7.0, 0.0, 7.0, 3.0, 9.0])).tolist() == [3.5, 1.0, 3.5, 2.0, 5.0]
    # without ties 1 - 6 sum d^2 / (n (n^2 - 1)); here d^2 sums to 194 over 10 pairs
    iq = np.array([106, 86, 100, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 0, 27, 50, 28, 29, 20, 12, 6, 17])
    assert sanity.spearman(iq, hours) == pytest.approx(1 - 6 * 194 / (10 * 99))
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert sanity.spearman(np.array([[0, 5], [5, 6]]), np.array([[1, 2], [3, 4]])) == pytest.approx(math.sqrt(0.9))


@given(SMALL_INTEGERS, SMALL_INTEGERS)
def test_spearman_against_its_formula(a: np.ndarray, b: np.ndarray) -> None:
    expected = slow_spearman(a.ravel().tolist(), b.ravel().tolist())
    assert sanity.spearman(a, b) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert sanity.spearman(b, a) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(SMALL_INTEGERS, SMALL_INTEGERS, st.integers(1, 9), st.integers(-9, 9))
def test_only_the_order_of_values_counts(a: np.ndarray, b: np.ndarray, factor: int, shift: int) -> None:
    rho = sanity.spearman(a, b)
    assert sanity.spearman(factor * a**3 + shift, b) == pytest.approx(rho, nan_ok=True)
    assert sanity.spearman(-a, b) == pytest.approx(-rho, abs=1e-12, nan_ok=True)
    assert sanity.spearman(a, a) == pytest.approx(1.0 if np.ptp(a) else math.nan, nan_ok=True)


# --- regions -----------------------------------------------------------------------------------------


def bump(x: float, y: float, region: sanity.Region, cells: int) -> torch.Tensor:
    """A map `[1 cells cells]` of a part of a picture, each cell the height of a hill at pixel `(x, y)`."""
    left, top, right, bottom = region
    xs = left + (np.arange(cells) + 0.5) * (right - left) / cells
    ys = top + (np.arange(cells) + 0.5) * (bottom - top) / cells
    height = np.exp(-((xs - x) ** 2 + (ys[:, None] - y) ** 2) / (2 * 20.0**2))
    return torch.from_numpy(height).float()[None]


@given(st.floats(70, SIDE - 70), st.floats(70, SIDE - 70), st.integers(0, 2**32 - 1), st.sampled_from([6, 12]))
def test_a_planted_peak_stays_on_its_pixel_when_the_picture_is_cropped(
    x: float, y: float, seed: int, cells: int
) -> None:
    size = (SIDE, SIDE)
    view = sanity.cropped(Image.new("RGB", size), np.random.default_rng(seed))
    before = sanity.on_region(bump(x, y, (0, 0, *size), cells), size, view.region)[0]
    after = sanity.on_region(bump(x, y, view.region, cells), view.image.size, (0, 0, *view.image.size))[0]
    left, top, right, bottom = view.region
    xs = left + (np.arange(GRID[1]) + 0.5) * (right - left) / GRID[1]
    ys = top + (np.arange(GRID[0]) + 0.5) * (bottom - top) / GRID[0]
    for found in (before, after):
        assert found.shape == GRID
        # the hill's middle, in pixels of the picture as it was; 8 of them were cut off
        assert (found.sum(0) * xs).sum() / found.sum() == pytest.approx(x, abs=1.0)
        assert (found.sum(1) * ys).sum() / found.sum() == pytest.approx(y, abs=1.0)


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 2**32 - 1))
def test_a_slope_is_read_exactly_inside_of_any_region(a: float, b: float, seed: int) -> None:
    size, cells = (SIDE, SIDE), 12
    region = sanity.cropped(Image.new("RGB", size), np.random.default_rng(seed)).region
    centers = (torch.arange(cells) + 0.5) * SIDE / cells
    found = sanity.on_region((a * centers + b * centers[:, None])[None], size, region)[0]
    left, top, right, bottom = region
    xs = left + (np.arange(GRID[1]) + 0.5) * (right - left) / GRID[1]
    ys = top + (np.arange(GRID[0]) + 0.5) * (bottom - top) / GRID[0]
    expected = a * xs + b * ys[:, None]
    inside = (xs >= 9) & (xs <= SIDE - 9) & ((ys >= 9) & (ys <= SIDE - 9))[:, None]  # beyond, the edge cell goes on
    assert inside.sum() >= 100
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)


def test_equal_values_stay_equal_on_other_cells() -> None:
    constant = torch.full((1, 7, 5), 0.1)
    assert np.ptp(sanity.on_region(constant, (150, 131), (0, 5, 150, 131))) == 0.0
    same = torch.rand(1, *GRID)
    flat = sanity.on_region(same, (SIDE, SIDE), (0, 0, SIDE, SIDE))
    np.testing.assert_allclose(flat, same, atol=0.07)  # pixels next to a cell's centre, 1/32 of a cell away each way


# --- random models -----------------------------------------------------------------------------------


def weights(model: fastattr.Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.hf_model.named_parameters(remove_duplicate=False)}


def test_random_parts_leave_the_given_model_and_all_other_parts_alone(model: fastattr.Model) -> None:
    before = weights(model)
    paths = [*CASCADE.values()][:5]
    after = weights(sanity.randomised(model, paths, 3))
    assert before.keys() == after.keys()
    for name, value in weights(model).items():
        assert torch.equal(value, before[name])
        inside = any(name.startswith(f"{path}.") for path in paths)
        assert torch.equal(after[name], value) is not inside
        if inside and value.ndim > 1:
            assert after[name].std().item() == pytest.approx(value.std().item(), rel=0.05)
            assert abs(after[name].mean().item()) < 0.05 * value.std().item()
        elif inside:
            assert bool((after[name] == 1).all())


def test_a_random_head_is_no_longer_tied_to_the_embeddings(model: fastattr.Model) -> None:
    other = sanity.randomised(model, ["lm_head"], 3)
    embeddings = model.hf_model.get_input_embeddings().weight
    assert torch.equal(other.hf_model.get_input_embeddings().weight, embeddings)
    assert torch.equal(other.head.weight, other.hf_model.lm_head.weight)
    assert abs(sanity.spearman(other.head.weight.numpy(), embeddings.detach().numpy())) < 0.02
    assert other.head.weight.std().item() == pytest.approx(embeddings.std().item(), rel=0.02)
    assert model.head.weight.data_ptr() == embeddings.data_ptr()


def test_seeds_decide_the_draws_and_earlier_modules_do_not_depend_on_later_ones(model: fastattr.Model) -> None:
    first, second = [*CASCADE.values()][:2]
    one, both, again, other = (
        weights(sanity.randomised(model, paths, seed))
        for paths, seed in (([first], 3), ([first, second], 3), ([first, second], 3), ([first, second], 4))
    )
    for name, value in both.items():
        assert torch.equal(value, again[name])
        if name.startswith(f"{first}."):
            assert torch.equal(value, one[name])
            assert value.ndim == 1 or not torch.equal(value, other[name])


def test_the_cascade_ends_with_everything_random_but_what_head_and_text_share(model: fastattr.Model) -> None:
    names = {name for name, _ in model.hf_model.named_parameters()}
    kept = {name for name in names if not any(name.startswith(f"{path}.") for path in CASCADE.values())}
    assert kept == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
    found = list(sanity.other_models(model, 3))
    assert [(part, name) for part, name, _ in found] == [
        (RANDOM, HEAD),
        *((RANDOM, name) for name in CASCADE),
        (CONTROL, NO_DECODER),
    ]


def test_without_its_decoder_the_model_reads_its_embeddings(model: fastattr.Model) -> None:
    ids = torch.tensor([[5, 70, 200]])
    embedded = model.hf_model.get_input_embeddings().weight.detach()[ids[0]]
    gains = model.hf_model.model.language_model.norm.weight.detach()
    normed = embedded / (embedded.square().mean(1, keepdim=True) + 1e-6).sqrt() * gains
    with torch.no_grad():
        logits = sanity.without_decoder(model).hf_model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits, normed @ model.head.weight.T, rtol=1e-4, atol=1e-4)
    assert len(model.hf_model.model.language_model.layers) == 4


# --- changed pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_picture_shows_what_it_says(name: str) -> None:
    image = make_scene(SEED, SIDE).image
    view, again = (CHANGES[name](image, np.random.default_rng(SEED)) for _ in range(2))
    assert view.region == again.region
    assert view.image.tobytes() == again.image.tobytes()
    left, top, right, bottom = view.region
    shown = np.asarray(image, np.float64)[top:bottom, left:right]
    changed = np.asarray(view.image, np.float64)
    assert changed.shape == shown.shape
    inner = (shown > 30) & (shown < 220)  # neither the noise nor the brightness is cut off
    if "cropped" in name:
        assert sorted((left, top, SIDE - right, SIDE - bottom)) == [0, 0, 0, 8]  # 4 % of 192
        np.testing.assert_array_equal(changed, shown)
    elif "brightness" in name:
        factor = float(name.split()[-1])
        np.testing.assert_allclose(changed, np.minimum(factor * shown, 255), atol=1)
    elif "noise" in name:
        assert (changed - shown)[inner].std() == pytest.approx(4.0, rel=0.02)
        assert abs((changed - shown)[inner].mean()) < 0.05
    else:
        assert 0 < np.abs(changed - shown).mean() < 5


def test_every_side_is_cropped_sometimes() -> None:
    image = Image.new("RGB", (100, 50))
    regions = {sanity.cropped(image, np.random.default_rng(seed)).region for seed in range(40)}
    assert regions == {(4, 0, 100, 50), (0, 2, 100, 50), (0, 0, 96, 50), (0, 0, 100, 48)}


# --- scenes and results ------------------------------------------------------------------------------


def test_words_are_colour_and_shape_of_every_object_in_order(model: fastattr.Model) -> None:
    for seed in range(SEED, SEED + 6):
        case = sanity.case_of(model, seed)
        spelled = [model.decode([case.response_ids[list(word)].tolist()])[0].strip() for word in case.words]
        assert spelled == [name for item in make_scene(seed).objects for name in (item.color, item.shape)]


def test_a_scene_is_compared_after_every_change_by_every_method(scenes: list[list[Compared]]) -> None:
    changes = [OTHER_OBJECT, HEAD, *CASCADE, NO_DECODER, *CHANGES]
    for compared, n_objects in zip(scenes, (2, 1), strict=True):
        assert [(each.change, each.method) for each in compared] == [(c, m) for c in changes for m in METHODS]
        for each in compared:
            pairs = 4 * math.comb(n_objects, 2)
            assert len(each.rho) == (pairs if each.change == OTHER_OBJECT else 2 * n_objects)
            assert np.isnan(each.rho).all() or np.nanmax(np.abs(each.rho)) <= 1 + 1e-12


def test_maps_follow_the_model_and_not_the_noise(scenes: list[list[Compared]]) -> None:
    for method in METHODS:
        mean = {
            each.change: np.nan_to_num(np.concatenate([each.rho, other.rho])).mean()
            for each, other in zip(*scenes, strict=True)
            if each.method == method
        }
        assert mean[f"noise of {sanity.NOISE:g} levels"] > 0.8
        assert mean[HEAD] < 0.5


def test_a_row_pools_words_and_counts_constant_maps_as_nothing() -> None:
    def compared(*rho: float, change: float) -> Compared:
        return Compared(RANDOM, HEAD, "lens", np.array(rho), np.full(len(rho), change))

    found = sanity.row([compared(0.8, math.nan, -0.4, change=-1.0), compared(0.6, change=-3.0)])
    assert found["correlation"]["mean"] == pytest.approx((0.8 + 0.0 - 0.4 + 0.6) / 4)
    # drawn twice, the first scene has (.8 - .4) / 3, the second .6
    assert found["correlation"]["low"] == pytest.approx(0.4 / 3, abs=1e-4)
    assert found["correlation"]["high"] == pytest.approx(0.6)
    assert found["magnitude"] == pytest.approx((0.8 + 0.4 + 0.6) / 4)
    assert (found["constant"], found["n"]) == (1, 4)
    assert found["log_prob_change"] == pytest.approx((3 * -1.0 - 3.0) / 4)

    empty = np.empty(0)
    floor = sanity.row([Compared(CONTROL, OTHER_OBJECT, "lens", rho, empty) for rho in (empty, np.array([0.25, 0.75]))])
    assert floor["correlation"] == {"mean": 0.5, "low": 0.5, "high": 0.5}  # a single object has no pair to draw
    assert floor["log_prob_change"] is None


def test_results_survive_the_file_and_table_and_picture_show_them(scenes: list[list[Compared]], tmp_path: Path) -> None:
    header = {"model": "shapes", "scenes": 2, "interval": "95 %", "methods": {name: {} for name in METHODS}}
    path = write_jsonl(tmp_path / "sanity.jsonl", [header, *(sanity.row(each) for each in zip(*scenes, strict=True))])
    header, rows = read_jsonl(path)
    table = sanity.sanity_table(header, rows)
    assert "shapes: 2 held-out scenes, 6 colour and shape words, 4 pairs of words" in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    for change in (HEAD, *CASCADE, OTHER_OBJECT, NO_DECODER, *CHANGES):
        (line,) = [line for line in lines if line.startswith(f"| {change} |")]
        for row in rows:
            if row["change"] == change:
                assert f"{row['correlation']['mean']:+.2f} [" in line
    drawn = sanity.draw(header, rows, tmp_path / "sanity.png")
    with Image.open(drawn) as picture:
        assert picture.width > picture.height > 500
