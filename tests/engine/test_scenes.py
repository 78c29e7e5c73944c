"""Scenes are seeded, their masks exact, and what is said about them true."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.demo import scenes
from fastattr.errors import InputError

SEEDS = st.integers(0, 2**31)


@given(SEEDS)
def test_equal_seeds_give_equal_scenes(seed: int) -> None:
    one, other = scenes.make_scene(seed, 48), scenes.make_scene(seed, 48)
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert np.array_equal(one.masks, other.masks)
    assert one.objects == other.objects


@given(SEEDS, st.sampled_from([(96, 96), (64, 96), (120, 80)]))
def test_masks_are_disjoint_inside_and_where_the_object_is_said_to_be(seed: int, size: tuple[int, int]) -> None:
    scene = scenes.make_scene(seed, *size)
    assert 1 <= len(scene.objects) <= 4
    assert scene.masks.shape == (len(scene.objects), *size)
    assert scene.masks.sum(axis=0).max() <= 1
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        assert mask.any()
        rows, columns = np.nonzero(mask)
        x, y = scenes.PLACES[item.place]
        assert abs(columns.mean() / size[1] - x) < 0.12
        assert abs(rows.mean() / size[0] - y) < 0.12


@given(SEEDS)
def test_pixels_under_a_mask_have_the_named_color(seed: int) -> None:
    scene = scenes.make_scene(seed)
    pixels = np.asarray(scene.image).astype(float)
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        shown = np.median(pixels[mask], axis=0)
        distance = {name: np.abs(shown - rgb).sum() for name, rgb in scenes.COLORS.items()}
        assert min(distance, key=distance.__getitem__) == item.color


@given(SEEDS)
def test_large_objects_are_larger(seed: int) -> None:
    scene = scenes.make_scene(seed)
    extent = {"small": [], "large": []}  # type: dict[str, list[float]]
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        rows, _ = np.nonzero(mask)
        extent[item.size].append(np.ptp(rows) / scene.image.height)
    assert max(extent["small"], default=0.0) < min(extent["large"], default=1.0)


@given(SEEDS)
def test_what_is_said_is_true(seed: int) -> None:
    scene = scenes.make_scene(seed, 32)
    names = {item.name for item in scene.objects}
    for exchange in scenes.exchanges(scene, np.random.default_rng(seed)):
        said = exchange.response
        if said.startswith("No, there is no "):
            assert said.removeprefix("No, there is no ").rstrip(".") not in names
        elif said.startswith("Yes"):
            assert any(name in said for name in names)
        elif exchange.prompt == "How many objects are there?":
            assert scenes.NUMBERS[len(scene.objects)] in said
        elif exchange.prompt == "Describe the image.":
            assert [said.index(item.full_name) for item in scene.objects] == sorted(
                said.index(item.full_name) for item in scene.objects
            )


def test_shapes_are_told_apart_by_their_masks() -> None:
    """At equal radius no two shapes cover the same pixels, so that the words mean something."""
    covers = []
    for shape in scenes.SHAPES:
        item = scenes.SceneObject("red", shape, "large", "center", (0.5, 0.5), 0.16, (214, 38, 38))
        coverage, _ = scenes._coverage(item, 192, 192)
        covers.append(coverage >= 0.5)
    for i, one in enumerate(covers):
        for other in covers[i + 1 :]:
            assert (one & other).sum() / (one | other).sum() < 0.85


def test_an_unknown_shape_is_refused() -> None:
    item = scenes.SceneObject("red", "blob", "large", "center", (0.5, 0.5), 0.16, (214, 38, 38))
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        scenes._coverage(item, 64, 64)


# --- erasing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "height", "width", "n_objects", "picture", "masks", "objects"),
    [
        (0, 192, None, None, "6fd78b2824bcddda", "44e133932dd5ad71", "db63e02485759daf"),
        (7, 96, 64, None, "b4fd36f359b3ee60", "352c277091d781e3", "53b2e42fd9b5619c"),
        (123, 192, None, 4, "27e98c6601728077", "d0a6f0daf906ecf3", "bc3dc3cd80677b86"),
        (scenes.HELD_OUT, 192, None, None, "2f3a4524f6ab011c", "c00bf2a9593befe6", "377b6b0b6203d825"),
        (2**31, 120, 80, 3, "e4ea1da7a2d05230", "f03d115aa0c0e456", "ad341741288d1cc9"),
    ],
)
def test_pictures_stay_what_models_and_results_were_made_with(
    seed: int, height: int, width: int | None, n_objects: int | None, picture: str, masks: str, objects: str
) -> None:
    scene = scenes.make_scene(seed, height, width, n_objects=n_objects)
    assert digest(np.asarray(scene.image).tobytes()) == picture
    assert digest(scene.masks.tobytes()) == masks
    assert digest(repr(scene.objects).encode()) == objects


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@given(SEEDS, st.sampled_from([None, 2, 4]), st.data())
def test_an_erased_object_was_never_drawn(seed: int, n_objects: int | None, data: st.DataObject) -> None:
    """The oracle draws the same scene with a brush that leaves nothing where this object is."""
    scene = scenes.make_scene(seed, 48, 64, n_objects=n_objects)
    k = data.draw(st.integers(0, len(scene.objects) - 1))
    coverage = scenes._coverage

    def leave_out(item: scenes.SceneObject, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
        drawn, corner = coverage(item, height, width)
        return (drawn * 0 if item == scene.objects[k] else drawn), corner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_coverage", leave_out)
        never_drawn = scenes.make_scene(seed, 48, 64, n_objects=n_objects)
    erased = scenes.erase(scene, k)
    np.testing.assert_array_equal(np.asarray(erased.image), np.asarray(never_drawn.image))
    np.testing.assert_array_equal(erased.masks, np.delete(scene.masks, k, axis=0))
    assert erased.objects == (*scene.objects[:k], *scene.objects[k + 1 :])
    assert (erased.seed, erased.background) == (scene.seed, scene.background)


def test_all_objects_can_be_erased_in_any_order() -> None:
    scene = scenes.make_scene(3, 64, n_objects=3)
    one = scenes.erase(scenes.erase(scenes.erase(scene, 2), 0), 0)
    other = scenes.erase(scenes.erase(scenes.erase(scene, 0), 0), 0)
    assert one.objects == () == other.objects
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    with pytest.raises(InputError, match="there is no object 3 to erase; the scene has 3, counted from 0"):
        scenes.erase(scene, 3)
    with pytest.raises(InputError, match="no object -1"):
        scenes.erase(scene, -1)
