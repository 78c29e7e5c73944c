"""GOT-OCR2: a SAM tower, shrunk by convolutions to a quarter a side; a page is shown whole or, if asked for, cut."""

from __future__ import annotations

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, nearest_shape, read_tiles, tile_grid


def cell(config: Config) -> int:
    return 4 * patch(config)


def look(shown: Shown) -> list[Looks]:
    height, width = shown.inputs["pixel_values"].shape[-2:]

    def shape(size: Size) -> Shape:
        fewest, most = (image_option(shown, GOT_OCR2.name, name) for name in ("min_patches", "max_patches"))
        return nearest_shape(size, (height, width), fewest, most)

    return read_tiles(GOT_OCR2.name, shown, tile_grid(shown, cell(shown.config)), shape)


GOT_OCR2 = Family("GOT-OCR2", look, cell, None, resized=False, tiles=True)

FAMILIES = {"got_ocr2": GOT_OCR2}
