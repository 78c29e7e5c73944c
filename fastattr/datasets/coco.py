"""A folder of COCO (arXiv 1405.0312), or one of its files of instances, drawn as masks from polygons and run lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastattr.datasets.files import check_size, digest, inside, read_json, read_picture
from fastattr.datasets.sample import Dataset, Sample
from fastattr.datasets.tam import CAPTION_PROMPT
from fastattr.datasets.words import function_spans, noun_mentions
from fastattr.errors import DatasetError, how_to_install

INSTANCES = "annotations/instances_*.json"

_PREFERRED = ("instances_val2017.json", "instances_val*.json", "instances_train*.json", "instances_*.json")
_FIELDS = {
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "segmentation"},
    "categories": {"id", "name"},
}


def open_coco(path: Path, prompt: str | None = None) -> Dataset:
    """Every picture with the union of each category's instances, crowds included; the model answers by itself.

    Args:
        path: a folder, of which validation comes before training, or a file of instances. The pictures are in the folder
            that the file is named after (`instances_val2017.json`: `val2017/`), or in `images/`.
        prompt: instead of that for captions in the protocol of TAM.

    Raises:
        DatasetError: there is no such file or several to choose from, or it is broken, or its pictures are missing, or
            `pycocotools` is not installed.
    """
    _masks()
    source = path if path.is_file() else _choose(path)
    root = source.parent.parent if source.parent.name == "annotations" else source.parent
    split = source.stem.removeprefix("instances_")
    folders = [root / split, root / "images"]
    pictures = next((folder for folder in folders if folder.is_dir()), None)
    if pictures is None:
        expected = " nor ".join(repr(str(folder)) for folder in folders)
        raise DatasetError(f"the pictures of {str(source)!r} are missing: neither {expected} is a folder")

    tables = _read_tables(source)
    categories = {str(each["id"]): str(each["name"]) for each in tables["categories"]}
    entries = {str(each["id"]): each for each in tables["images"]}
    instances = defaultdict(list)
    for each in tables["annotations"]:
        instances[str(each["image_id"])].append(each)

    def read(id: str) -> Sample:
        if id not in entries:
            raise DatasetError(f"{str(source)!r} has no picture {id!r}")
        entry = entries[id]
        image = read_picture(inside(pictures, str(entry["file_name"]), source))
        check_size(source, (entry["width"], entry["height"]), image)
        masks: dict[str, np.ndarray | None] = dict.fromkeys(categories.values())
        for instance in instances.get(id, ()):
            name = categories.get(str(instance["category_id"]))
            if name is None:
                raise DatasetError(
                    f"annotation {instance['id']} of {str(source)!r} is of category {instance['category_id']!r}, which is "
                    "not among `categories`"
                )
            drawn, before = _draw(instance, image, source), masks[name]
            masks[name] = drawn if before is None else before | drawn
        return Sample(id, image, prompt or CAPTION_PROMPT, None, partial(noun_mentions, masks=masks), function_spans)

    def content(id: str) -> str:
        entry = entries[id]
        # `read` refuses a path outside the folder; here it is only hashed
        picture = pictures / str(entry["file_name"])
        return digest([picture], entry, instances.get(id, ()), categories, prompt or CAPTION_PROMPT)

    return Dataset(f"{root.resolve().name} {split}", tuple(entries), read, content=content)


def _choose(folder: Path) -> Path:
    files = sorted(folder.glob(INSTANCES))
    for pattern in _PREFERRED:
        found = [file for file in files if file.match(pattern)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    names = ", ".join(file.name for file in files) or "none"
    raise DatasetError(f"{str(folder)!r} has the instances {names}, expected one file to choose; pass its own path")


def _read_tables(source: Path) -> dict[str, list[dict[str, Any]]]:
    tables = read_json(source)
    for key, fields in _FIELDS.items():
        rows = tables.get(key) if isinstance(tables, dict) else None
        if not isinstance(rows, list):
            raise DatasetError(f"{str(source)!r} has no list of `{key}`, expected instances in the format of COCO")
        for number, row in enumerate(rows):
            missing = sorted(fields.difference(row)) if isinstance(row, dict) else sorted(fields)
            if missing:
                raise DatasetError(f"entry {number} (from 0) of `{key}` in {str(source)!r} has no {', '.join(missing)}")
    return tables


# --- masks ------------------------------------------------------------------------------------------


def _draw(instance: Mapping[str, Any], image: Image.Image, source: Path) -> np.ndarray:
    """bool `[H W]` of one instance."""
    try:
        match instance["segmentation"]:
            case [_, *_] as polygons:
                return _fill(polygons, image.height, image.width)
            case {"size": [image.height, image.width], "counts": list() | str() as counts}:
                return _unroll(counts, image.height, image.width)
        raise ValueError("neither polygons nor run lengths of the picture's size")
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"annotation {instance['id']} of {str(source)!r} has no usable segmentation: {error}"
        ) from error


def _fill(polygons: list[Any], height: int, width: int) -> np.ndarray:
    outlines = [np.asarray(polygon, dtype=float) for polygon in polygons]
    for outline in outlines:
        if outline.ndim != 1 or outline.size < 6 or outline.size % 2:
            raise ValueError("a polygon is not a list of three corners or more, x and y in turn")
        if not (np.abs(outline) <= 2 * max(height, width)).all():  # pycocotools walks all the way there
            raise ValueError("a polygon reaches far out of the picture")
    coded = _masks().merge(_masks().frPyObjects([outline.tolist() for outline in outlines], height, width))
    return _unroll(coded["counts"].decode(), height, width)


def _unroll(counts: list[Any] | str, height: int, width: int) -> np.ndarray:
    # pycocotools trusts run lengths: where they are broken it reads whatever comes after them in memory
    lengths = np.asarray(_run_lengths(counts) if isinstance(counts, str) else counts)
    n = height * width
    if lengths.dtype.kind != "i" or not ((lengths >= 0) & (lengths <= n)).all() or lengths.sum() != n:
        raise ValueError(f"the run lengths do not add up to {height} x {width} pixels")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def _run_lengths(text: str) -> list[int]:
    """Run lengths from COCO's text for them: signed numbers of five bits a character, low bits first.

    From the fourth on they are differences to the last run of the same value.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"the run lengths hold the character {character!r}")
        value |= (bits & 0b11111) << shift
        shift += 5
        if not bits & 0b100000:  # no more of this number
            signed = value - (1 << shift) if bits & 0b10000 else value
            lengths.append(signed + lengths[-2] if len(lengths) > 2 else signed)
            value = shift = 0
    return lengths


@cache
def _masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DatasetError(f"to draw the masks of COCO fastattr needs pycocotools; {how_to_install('eval')}") from error
    return mask
