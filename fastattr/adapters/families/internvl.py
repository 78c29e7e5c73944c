"""InternVL: a picture squeezed into tiles of one size, its thumbnail behind them; a frame of a video is one tile."""

from __future__ import annotations

from dataclasses import replace

from fastattr.adapters.families.family import Config, Family, Looks, Shown, patch
from fastattr.adapters.families.frames import watch_frames
from fastattr.adapters.families.qwen import EVERY_FRAME
from fastattr.adapters.families.tiles import read_nearest_tiles, square_tile, tile_grid

NAME = "InternVL"


def cell(config: Config) -> int:
    return round(patch(config) / config.downsample_ratio)


def look(shown: Shown) -> list[Looks]:
    return read_nearest_tiles(NAME, shown, cell(shown.config))


def watch(shown: Shown) -> list[Looks]:
    return watch_frames(NAME, shown, tile_grid(shown, cell(shown.config)))


QIANFAN = Family(NAME, look, cell, square_tile, resized=False, tiles=True)  # reads no videos
INTERNVL = replace(QIANFAN, watch=watch, film_token="image_token_id", filmed=EVERY_FRAME)

FAMILIES = {"internvl": INTERNVL, "qianfan_ocr": QIANFAN}
