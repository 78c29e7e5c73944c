"""Folders of pictures with label maps or masks: what is read is what was written, and every fault is named."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastattr.datasets import Mention, Sample, open_dataset
from fastattr.datasets.tam import COCO_LABELS
from fastattr.datasets.words import english
from fastattr.errors import DatasetError

HEIGHT, WIDTH = 12, 20
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


DOG, BALL = box(2, 8, 1, 9), box(8, 12, 15, 20)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(path, **options)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def said(sample: Sample, response: str) -> dict[str, Mention]:
    """Mentions by the words they are about."""
    return {response[slice(*mention.span)]: mention for mention in sample.mentions(response)}


def captioned(folder: Path) -> Path:
    """Two pictures of COCO captions."""
    write(folder / "annotations" / "instances_minival2014.json", {"images": [{"id": 42}, {"id": 7}], "annotations": []})
    labels = np.where(DOG, 18, np.where(BALL, 37, 0)).astype(np.uint8)
    for name in ("000000000042", "000000000007"):
        save(folder / "image" / f"{name}.jpg", PIXELS)
        save(folder / "seg_label" / f"{name}.png", labels)
    return folder


def described(folder: Path) -> Path:
    """Two entries of GranDf; the second label map has a palette."""
    labels = np.where(DOG, 3, np.where(BALL, 255, 0)).astype(np.uint8)
    coloured = Image.fromarray(labels)
    coloured.putpalette([value for k in range(256) for value in (k, 255 - k, 7)])
    save(folder / "pictures" / "a.png", PIXELS)
    save(folder / "labels" / "a.png", labels)
    save(folder / "labels" / "b.png", coloured)
    names = {"brown dog": 3, "ball": 255, "cat": 4}
    write(
        folder / "anno.json",
        [["pictures/a.png", "A dog.", "labels/a.png", names], ["pictures/a.png", "A dog.", "labels/b.png", names]],
    )
    return folder


def plain(folder: Path) -> Path:
    """Two pictures; the masks of the first come in every form, the second is forced to say something."""
    save(folder / "images" / "b.webp", PIXELS, lossless=True)
    save(folder / "images" / "a.PNG", PIXELS)
    (folder / "images" / "notes.txt").write_text("not a picture")
    save(folder / "masks" / "a" / "brown_dog.png", DOG.astype(np.uint8))
    save(folder / "masks" / "a" / "ball.png", Image.fromarray(BALL))
    save(folder / "masks" / "a" / "x-ray.png", np.where(DOG[..., None], (0, 0, 9), 0).astype(np.uint8))
    save(folder / "masks" / "a" / "sky.png", Image.fromarray(np.where(BALL, 300, 0).astype(np.uint16)))
    save(folder / "masks" / "a" / "cat.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    save(folder / "masks" / "b" / "dog.png", DOG)
    write(folder / "captions" / "b.txt", " A dog.\n")
    return folder


# --- what is read -----------------------------------------------------------------------------------------------


def test_files_of_macos_and_windows_in_a_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = plain(tmp_path / "mine")
    clean = open_dataset(folder)
    litter = ("images/._a.PNG", "images/._b.webp", "images/Thumbs.db", "masks/.DS_Store", "masks/a/._ball.png")
    for name in litter:
        (folder / name).write_bytes(b"\0\5\x16\7")
    found = open_dataset(folder)
    assert (found.ids, clean.n_litter, found.n_litter) == (clean.ids, 0, len(litter))
    response = "A brown dog and a ball."
    assert said(found.read("a"), response).keys() == said(clean.read("a"), response).keys()


def test_coco_captions(tmp_path: Path) -> None:
    dataset = open_dataset(captioned(tmp_path / "coco2014"))
    assert (dataset.name, dataset.ids) == ("coco2014", ("42", "7"))
    sample = dataset.read("7")
    assert (sample.id, sample.response) == ("7", None)
    assert sample.prompt == "Write a one-sentence caption for this image:"
    assert sample.image.size == (WIDTH, HEIGHT) and sample.image.mode == "RGB"
    words = said(sample, "Two dogs, people and a sports ball.")
    assert list(words) == ["dogs", "people", "ball"]
    np.testing.assert_array_equal(words["dogs"].mask, DOG)
    np.testing.assert_array_equal(words["ball"].mask, BALL)
    assert words["people"].mask is None
    assert [(word.kind, word.true) for word in words.values()] == [("noun", True), ("noun", False), ("noun", True)]
    assert sample.functions("A dog at the left") == ((0, 1), (9, 12))


def test_the_labels_of_coco_captions() -> None:
    assert len(COCO_LABELS) == 80
    known = {"person": 1, "fire hydrant": 11, "stop sign": 13, "zebra": 24, "backpack": 27, "handbag": 31, "ball": 37}
    known |= {"bottle": 44, "glass": 46, "bed": 65, "dining table": 67, "toilet": 70, "tv": 72, "book": 84}
    assert known.items() <= COCO_LABELS.items()
    assert COCO_LABELS["toothbrush"] == 90


@pytest.mark.parametrize(("name", "number"), [("GranDf", "two"), ("my_OpenPSG_val", "three")])
def test_descriptions(tmp_path: Path, name: str, number: str) -> None:
    dataset = open_dataset(str(described(tmp_path / name)))
    assert (dataset.name, dataset.ids) == (name, ("0", "1"))
    for id in dataset.ids:
        sample = dataset.read(id)
        assert sample.prompt == f"Write a description for this image using around {number} sentences:"
        assert sample.response is None
        np.testing.assert_array_equal(np.asarray(sample.image), PIXELS)
        words = said(sample, "A dog, balls, a cat. The brown dog.")
        assert list(words) == ["dog", "balls", "cat", "brown dog"]
        np.testing.assert_array_equal(words["dog"].mask, DOG)
        np.testing.assert_array_equal(words["brown dog"].mask, DOG)
        np.testing.assert_array_equal(words["balls"].mask, BALL)
        assert (words["cat"].mask, words["cat"].true) == (None, False)


def test_an_unknown_folder_of_descriptions_needs_a_prompt(tmp_path: Path) -> None:
    folder = described(tmp_path / "mine")
    with pytest.raises(DatasetError, match=r"the folder 'mine' is neither of GranDf and OpenPSG, .*; pass prompt="):
        open_dataset(folder)
    assert open_dataset(folder, prompt="What is there?").read("1").prompt == "What is there?"


def test_a_plain_folder(tmp_path: Path) -> None:
    dataset = open_dataset(plain(tmp_path / "mine"))
    assert (dataset.name, dataset.ids) == ("mine", ("a", "b"))
    free, forced = dataset.read("a"), dataset.read("b")
    np.testing.assert_array_equal(np.asarray(free.image), PIXELS)
    assert (free.prompt, free.response, forced.response) == ("Describe the image.", None, "A dog.")
    words = said(free, "Brown dogs and a dog, a ball, an X-ray, sky, a cat.")
    assert list(words) == ["Brown dogs", "ball", "X-ray", "sky", "cat"]
    truth = {"Brown dogs": DOG, "ball": BALL, "X-ray": DOG, "sky": BALL}
    for name, mask in truth.items():
        np.testing.assert_array_equal(words[name].mask, mask)
    assert [word.true for word in words.values()] == [True, True, True, True, False]
    assert words["cat"].mask is None


def test_a_plain_folder_may_have_its_own_prompt(tmp_path: Path) -> None:
    folder = plain(tmp_path)
    write(folder / "prompt.txt", "What is this?\n")
    assert open_dataset(folder).read("a").prompt == "What is this?"
    assert open_dataset(folder, prompt="And this?").read("a").prompt == "And this?"


def test_the_first_samples(tmp_path: Path) -> None:
    assert open_dataset(described(tmp_path / "GranDf"), n=1).ids == ("0",)
    assert open_dataset(captioned(tmp_path / "coco"), n=1).ids == ("42",)
    assert open_dataset(plain(tmp_path / "mine"), n=9).ids == ("a", "b")
    with pytest.raises(DatasetError, match="n is 0, expected at least one sample"):
        open_dataset(tmp_path / "mine", n=0)


# --- faults of the whole ----------------------------------------------------------------------------------------


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        open_dataset(tmp_path)
    for looked_for in ("scenes-erased", "anno.json", "instances_minival2014.json", "seg_label/", "images/", "masks/"):
        assert looked_for in str(caught.value)
    with pytest.raises(DatasetError, match="there is no dataset 'scenery'"):
        open_dataset("scenery")


def test_a_bundled_name_comes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path / "scenes")
    monkeypatch.chdir(tmp_path)
    assert open_dataset("scenes", n=1).ids == ("10000000",)
    assert open_dataset("./scenes").ids == open_dataset(Path("scenes")).ids == ("a", "b")


def test_folders_need_inflect_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english.cache_clear()
    monkeypatch.setitem(sys.modules, "inflect", None)
    with pytest.raises(DatasetError, match="inflect"):
        open_dataset(plain(tmp_path))
    assert len(open_dataset("scenes", n=2).ids) == 2


@pytest.mark.parametrize(
    ("build", "damage", "message"),
    [
        (described, lambda at: write(at / "anno.json", '[\n ["a", }]'), r"anno.json' is not JSON: .* in line 2, column 8"),
        (described, lambda at: (at / "anno.json").write_bytes(b"\xff[]"), "anno.json' cannot be read: .*utf-8"),
        (described, lambda at: write(at / "anno.json", {}), "anno.json' holds a dict, expected a list of entries"),
        (captioned, lambda at: write(at / "annotations/instances_minival2014.json", "{"), "is not JSON: .* line 1"),
        (captioned, lambda at: write(at / "annotations/instances_minival2014.json", [1]), "has no list of `images`"),
        (captioned, lambda at: write(at / "annotations/instances_minival2014.json", {"images": [{"id": "7"}]}), "number"),
        (plain, lambda at: write(at / "prompt.txt", " \n"), "prompt.txt' is empty, expected some text"),
        (plain, lambda at: save(at / "images/b.jpg", PIXELS), "b.webp' and 'b.jpg' have one name"),
        (plain, lambda at: [path.unlink() for path in (at / "images").iterdir()], "images' holds no picture, expected .*webp"),
    ],
)  # fmt: skip
def test_faults_of_the_whole(
    tmp_path: Path, build: Callable[[Path], Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = build(tmp_path / "GranDf")
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        open_dataset(folder)


# --- faults of one sample ---------------------------------------------------------------------------------------


def entry(*values: Any) -> Callable[[Path], None]:
    """Puts these values in place of the first entry of anno.json."""

    def damage(folder: Path) -> None:
        first: Any = list(values) if len(values) != 1 else values[0]
        write(folder / "anno.json", [first, *json.loads((folder / "anno.json").read_text())[1:]])

    return damage


PICTURE, LABELS = "pictures/a.png", "labels/a.png"
TORN = "image/000000000042.jpg"
MAP = "seg_label/000000000042.png"
FORM = r"entry 0 of .*anno.json' \(from 0\) is not \[picture, description, label map, \{category: label\}\]"


@pytest.mark.parametrize(
    ("build", "damage", "message"),
    [
        (captioned, lambda at: (at / TORN).unlink(), f"{TORN}' is not a file"),
        (captioned, lambda at: (at / TORN).write_bytes((at / TORN).read_bytes()[:200]), f"{TORN}' cannot be decoded"),
        (captioned, lambda at: (at / TORN).write_text("no picture"), f"{TORN}' is not in an image format"),
        (captioned, lambda at: (at / MAP).unlink(), f"{MAP}' is not a file, expected a map"),
        (captioned, lambda at: (at / MAP).write_bytes((at / MAP).read_bytes()[:-30]), f"{MAP}' cannot be decoded"),
        (captioned, lambda at: (at / MAP).write_text("no picture"), f"{MAP}' is not in an image format"),
        (captioned, lambda at: save(at / MAP, PIXELS), f"{MAP}' has pixels of mode RGB, expected L or P"),
        (captioned, lambda at: save(at / MAP, DOG), f"{MAP}' has pixels of mode 1, expected L or P"),
        (captioned, lambda at: save(at / MAP, PIXELS[:, :5, 0]), f"{MAP}' is about 5 x 12 pixels but .* has 20 x 12"),
        (captioned, lambda at: save(at / MAP, PIXELS[:5, :, 0]), f"{MAP}' is about 20 x 5 pixels but .* has 20 x 12"),
        (described, entry(PICTURE, "", LABELS), FORM),
        (described, entry("pictures"), FORM),
        (described, entry(PICTURE, "", None, {}), FORM),
        (described, entry(PICTURE, "", LABELS, {"dog": 0}), FORM),
        (described, entry(PICTURE, "", LABELS, {"dog": 256}), FORM),
        (described, entry(PICTURE, "", LABELS, {"dog": "3"}), FORM),
        (described, entry(PICTURE, "", LABELS, {"dog": True}), FORM),
        (described, entry("pictures/b.png", "", LABELS, {}), "b.png' is not a file"),
        (described, entry("../a.png", "", LABELS, {}), "anno.json' names the file '../a.png', expected a path inside"),
        (described, entry(PICTURE, "", "labels/../../a.png", {}), "names the file 'labels/../../a.png'"),
        (described, entry(PICTURE, "", "/a.png", {}), "names the file '/a.png'"),
        (plain, lambda at: (at / "images/a.PNG").write_bytes(b""), "a.PNG' is not in an image format"),
        (plain, lambda at: [each.unlink() for each in (at / "masks/a").iterdir()], "masks/a' holds no mask"),
        (plain, lambda at: (at / "masks/a").rename(at / "masks/c"), "masks/a' holds no mask"),
        (plain, lambda at: save(at / "masks/a/ball.png", Image.new("RGBA", (WIDTH, HEIGHT))), "ball.png' .* mode RGBA"),
        (plain, lambda at: save(at / "masks/a/ball.png", DOG.T), "ball.png' is about 12 x 20 pixels"),
        (plain, lambda at: write(at / "captions/a.txt", ""), "captions/a.txt' is empty"),
    ],
)  # fmt: skip
def test_faults_of_a_sample(
    tmp_path: Path, build: Callable[[Path], Path], damage: Callable[[Path], object], message: str
) -> None:
    """The damaged sample cannot be read and says why; the next one still can."""
    folder = build(tmp_path / "GranDf")
    damage(folder)
    dataset = open_dataset(folder)
    with pytest.raises(DatasetError, match=message):
        dataset.read(dataset.ids[0])
    assert dataset.read(dataset.ids[1]).image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(("build", "id"), [(captioned, "8"), (described, "2"), (described, "-1"), (plain, "c")])
def test_unknown_ids(tmp_path: Path, build: Callable[[Path], Path], id: str) -> None:
    with pytest.raises(DatasetError, match=re.escape(repr(id))):
        open_dataset(build(tmp_path / "GranDf")).read(id)
