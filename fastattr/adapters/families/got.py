"""GOT-OCR2: a SAM tower, shrunk by convolutions to a quarter a side; a page is shown whole or, if asked for, cut."""

from __future__ import annotations

from fastattr.adapters.families.family import Config, Family, Looks, Shown, patch
from fastattr.adapters.families.tiles import read_nearest_tiles


def cell(config: Config) -> int:
    return 4 * patch(config)


def look(shown: Shown) -> list[Looks]:
    return read_nearest_tiles(GOT_OCR2.name, shown, cell(shown.config))


GOT_OCR2 = Family("GOT-OCR2", look, cell, None, resized=False, tiles=True)

FAMILIES = {"got_ocr2": GOT_OCR2}
