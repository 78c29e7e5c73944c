"""A folder of COCO: masks are those that were encoded, by pycocotools itself or drawn by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from fastattr.datasets import open_dataset
from fastattr.datasets.coco import _masks, _unroll
from fastattr.errors import DatasetError

HEIGHT, WIDTH = 14, 22
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
DOG = (ROWS - 6) ** 2 + (COLUMNS - 7) ** 2 < 20
OTHER_DOG = (ROWS > 8) & (COLUMNS > 12)
CROWD = (ROWS + COLUMNS) % 3 == 0
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 88, "name": "teddy bear"}]


def text_of(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as the text that pycocotools makes of them."""
    coded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(coded["size"]), "counts": coded["counts"].decode()}


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs in columns, from the first that is not in the mask."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def instance(id: int, category: int, segmentation: Any, image: int = 5) -> dict[str, Any]:
    return {"id": id, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0}


def instances() -> dict[str, Any]:
    """Two dogs as text, a square person as a polygon and a crowd of persons as run lengths; a second picture of nothing."""
    square = [[3, 2, 10, 2, 10, 8, 3, 8], [14.0, 9.0, 18.0, 9.0, 18.0, 12.0, 14.0, 12.0]]
    crowd = {"size": [HEIGHT, WIDTH], "counts": runs_of(CROWD)}
    return {
        "images": [
            {"id": id, "file_name": f"{id:04d}.png", "width": WIDTH, "height": HEIGHT, "license": 1} for id in (5, 9)
        ],
        "categories": list(CATEGORIES),
        "annotations": [
            instance(1, 18, text_of(DOG)),
            instance(2, 1, square),
            instance(3, 18, text_of(OTHER_DOG)),
            instance(4, 1, crowd) | {"iscrowd": 1},
        ],
    }


def build(root: Path, content: Any = None, name: str = "instances_val2017.json", pictures: str = "val2017") -> Path:
    for folder in (root / "annotations", root / pictures):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(instances() if content is None else content))
    for id in (5, 9):
        Image.new("RGB", (WIDTH, HEIGHT), (id, 0, 0)).save(root / pictures / f"{id:04d}.png")
    return root


def test_masks_are_unions_over_instances(tmp_path: Path) -> None:
    dataset = open_dataset(build(tmp_path / "coco"))
    assert (dataset.name, dataset.ids) == ("coco val2017", ("5", "9"))
    sample = dataset.read("5")
    assert (sample.prompt, sample.response) == ("Write a one-sentence caption for this image:", None)
    assert sample.image.getpixel((0, 0)) == (5, 0, 0)
    response = "People and dogs with a teddy bear, a toy and a cell phone"
    people, dogs, bear = sample.mentions(response)
    assert [response[slice(*each.span)] for each in (people, dogs, bear)] == ["People", "dogs", "teddy bear"]
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[2:8, 3:10] = square[9:12, 14:18] = True
    np.testing.assert_array_equal(people.mask, square | CROWD)
    np.testing.assert_array_equal(dogs.mask, DOG | OTHER_DOG)
    assert (bear.mask, bear.true, people.true) == (None, False, True)
    assert sample.functions(response) == ((7, 10), (21, 22), (35, 36), (41, 44), (45, 46))
    assert [each.true for each in dataset.read("9").mentions(response)] == [False] * 3


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_run_lengths_in_both_forms(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(_unroll(text_of(mask)["counts"], *mask.shape), mask)
    np.testing.assert_array_equal(_unroll(runs_of(mask), *mask.shape), mask)


def test_long_run_lengths_take_several_characters() -> None:
    mask = np.zeros((700, 600), bool)
    mask[13:, 500:] = mask[:2, 3] = True
    np.testing.assert_array_equal(_unroll(text_of(mask)["counts"], *mask.shape), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
def test_broken_text_is_refused_or_fits(text: str) -> None:
    try:
        assert _unroll(text, HEIGHT, WIDTH).shape == (HEIGHT, WIDTH)
    except ValueError as error:
        assert "run lengths" in str(error)


# --- which file and folder --------------------------------------------------------------------------------------


def test_validation_comes_before_training(tmp_path: Path) -> None:
    for split in ("train2014", "train2017", "val2014", "val2017"):
        build(tmp_path, name=f"instances_{split}.json", pictures=split)
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    assert open_dataset(tmp_path).name.endswith("val2017")
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    assert open_dataset(tmp_path).name.endswith("val2014")
    (tmp_path / "annotations" / "instances_val2014.json").unlink()
    message = "has the instances instances_train2014.json, instances_train2017.json, expected one .*; pass its own path"
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path)
    chosen = open_dataset(tmp_path / "annotations" / "instances_train2017.json")
    assert chosen.name.endswith("train2017")
    assert chosen.read("9").image.getpixel((0, 0)) == (9, 0, 0)


def test_any_file_of_instances_with_pictures_beside_it(tmp_path: Path) -> None:
    build(tmp_path, name="instances_mine.json", pictures="images")
    assert open_dataset(tmp_path).read("5").image.size == (WIDTH, HEIGHT)
    (tmp_path / "annotations" / "instances_mine.json").rename(tmp_path / "things.json")
    dataset = open_dataset(tmp_path / "things.json", n=1, prompt="What is there?")
    assert (dataset.ids, dataset.read("5").prompt) == (("5",), "What is there?")


def test_missing_pictures(tmp_path: Path) -> None:
    build(tmp_path, pictures="elsewhere")
    with pytest.raises(DatasetError, match=r"instances_val2017.json' are missing: neither '.*val2017' nor '.*images'"):
        open_dataset(tmp_path)


def test_without_pycocotools_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _masks.cache_clear()
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DatasetError, match=r'needs pycocotools; in a clone .*: pip install "\.\[eval\]"'):
        open_dataset(build(tmp_path))


# --- faults -----------------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = instances()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list of `images`"),
        (changed(lambda each: each.pop("annotations")), "has no list of `annotations`, expected instances in the format"),
        (changed(lambda each: each["images"][1].pop("file_name")), r"entry 1 \(from 0\) of `images` .* has no file_name"),
        (changed(lambda each: each["annotations"].append(3)), "entry 4 .* `annotations` .* no category_id, id, image_id, se"),
        (changed(lambda each: each["categories"].insert(0, {"id": 1})), "entry 0 .* of `categories` .* has no name"),
    ],
)  # fmt: skip
def test_faults_of_the_file(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(build(tmp_path, content))


SIZE = [HEIGHT, WIDTH]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "neither polygons nor run lengths of the picture's size"),
        (None, "neither polygons"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "neither polygons nor run lengths of the picture's size"),
        ({"size": SIZE}, "neither polygons"),
        ({"size": SIZE, "counts": [5, 5]}, "the run lengths do not add up to 14 x 22 pixels"),
        ({"size": SIZE, "counts": [-1, HEIGHT * WIDTH + 1]}, "do not add up"),
        ({"size": SIZE, "counts": [HEIGHT * WIDTH / 1]}, "do not add up"),
        ({"size": SIZE, "counts": [10**30]}, "do not add up"),
        ({"size": SIZE, "counts": []}, "do not add up"),
        ({"size": SIZE, "counts": [[1], [2, 3]]}, "inhomogeneous"),
        ({"size": SIZE, "counts": ""}, "do not add up"),
        ({"size": SIZE, "counts": "oooooooooooooooooo"}, "do not add up"),
        ({"size": SIZE, "counts": "é"}, "the run lengths hold the character 'é'"),
        ([[1, 1, 5, 5]], "a polygon is not a list of three corners or more"),
        ([[1, 1, 5, 5, 9, 9, 3]], "three corners or more"),
        ([[1, 1, 5, 5, 9, 9], 3], "three corners or more"),
        ([["x"] * 6], "could not convert string to float"),
        ([[1, 1, 5, 5, 9, None]], "far out of the picture|float"),
        ([[1, 1, 5, 5, 9, 1e9]], "a polygon reaches far out of the picture"),
        ([[1, 1, 5, 5, 9, float("nan")]], "far out of the picture"),
    ],
)  # fmt: skip
def test_faults_of_a_segmentation(tmp_path: Path, segmentation: Any, message: str) -> None:
    content = instances()
    content["annotations"].append(instance(77, 1, segmentation))
    dataset = open_dataset(build(tmp_path, content))
    with pytest.raises(DatasetError, match=f"annotation 77 of .*instances_val2017.json' .*({message})"):
        dataset.read("5")
    assert dataset.read("9").id == "9"


def test_faults_of_a_picture(tmp_path: Path) -> None:
    content = instances()
    content["annotations"][0]["category_id"] = 3
    content["images"][1]["file_name"] = "../0009.png"
    content["images"] += [
        {"id": 10, "file_name": "missing.png", "width": WIDTH, "height": HEIGHT},
        {"id": 11, "file_name": "0009.png", "width": HEIGHT, "height": WIDTH},
    ]
    dataset = open_dataset(build(tmp_path, content))
    faults = {
        "5": "annotation 1 of .*val2017.json' is of category 3, which is not among `categories`",
        "9": r"names the file '\.\./0009.png', expected a path inside",
        "10": "missing.png' is not a file",
        "11": "val2017.json' is about 14 x 22 pixels but the picture has 22 x 14",
        "12": "has no picture '12'",
    }
    for id, message in faults.items():
        with pytest.raises(DatasetError, match=message):
            dataset.read(id)
