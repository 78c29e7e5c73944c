"""InternVL: a picture squeezed into tiles of one size, its thumbnail behind them; a frame of a video is one tile."""

from __future__ import annotations

from dataclasses import replace

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch
from fastattr.adapters.families.frames import watch_frames
from fastattr.adapters.families.qwen import EVERY_FRAME
from fastattr.adapters.families.tiles import Shape, nearest_shape, read_tiles, square_tile, tile_grid

NAME = "InternVL"


def cell(config: Config) -> int:
    return round(patch(config) / config.downsample_ratio)


def look(shown: Shown) -> list[Looks]:
    height, width = shown.inputs["pixel_values"].shape[-2:]

    def shape(size: Size) -> Shape:
        fewest, most = (image_option(shown, NAME, name) for name in ("min_patches", "max_patches"))
        return nearest_shape(size, (height, width), fewest, most)

    return read_tiles(NAME, shown, tile_grid(shown, cell(shown.config)), shape)


def watch(shown: Shown) -> list[Looks]:
    return watch_frames(NAME, shown, tile_grid(shown, cell(shown.config)))


QIANFAN = Family(NAME, look, cell, square_tile, resized=False, tiles=True)  # reads no videos
INTERNVL = replace(QIANFAN, watch=watch, film_token="image_token_id", filmed=EVERY_FRAME)

FAMILIES = {"internvl": INTERNVL, "qianfan_ocr": QIANFAN}
