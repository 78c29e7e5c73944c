"""One door to every dataset: the name of a bundled one, or a path whose layout says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastattr.datasets.coco import INSTANCES, open_coco
from fastattr.datasets.folder import IMAGES, MASKS, open_folder
from fastattr.datasets.sample import Dataset
from fastattr.datasets.scenes import SCENES, open_scenes
from fastattr.datasets.tam import CAPTIONED, DESCRIBED, LABELS, open_captioned, open_described
from fastattr.datasets.words import english
from fastattr.errors import DatasetError


def open_dataset(spec: str | Path, n: int | None = None, prompt: str | None = None) -> Dataset:
    """Find out what `spec` is and list its samples; none is read yet.

    Args:
        spec: one of `SCENES`, or a folder as `tam`, `coco` or `folder` describe it, or a file of COCO's instances. A name
            comes before a folder that is called so; write `./scenes` for that.
        n: only the first `n` samples.
        prompt: what to ask instead of the dataset's own question.

    Raises:
        DatasetError: there is no such dataset, or the list of its samples is broken, or a package it needs is missing.
    """
    if n is not None and n < 1:
        raise DatasetError(f"n is {n}, expected at least one sample, or None for all")
    if isinstance(spec, str) and spec in SCENES:
        return open_scenes(spec, n, prompt)
    english()  # names of things are looked for once the model has answered: too late to find out
    dataset = _open_path(Path(spec), prompt)
    return replace(dataset, ids=dataset.ids[:n])


def _open_path(path: Path, prompt: str | None) -> Dataset:
    if path.is_file() and path.suffix == ".json":
        return open_coco(path, prompt)
    if (path / DESCRIBED).is_file():
        return open_described(path, prompt)
    if (path / CAPTIONED).is_file() and (path / LABELS).is_dir():
        return open_captioned(path, prompt)
    if any(path.glob(INSTANCES)):
        return open_coco(path, prompt)
    if (path / IMAGES).is_dir() and (path / MASKS).is_dir():
        return open_folder(path, prompt)
    raise DatasetError(
        f"there is no dataset {str(path)!r}; expected one of {', '.join(SCENES)}, a file of COCO's instances that ends in "
        f".json, or a folder with {DESCRIBED}, with {CAPTIONED} and {LABELS}/, with {INSTANCES}, or with {IMAGES}/ and "
        f"{MASKS}/"
    )
