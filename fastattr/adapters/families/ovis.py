"""Ovis2: the whole picture, then its tiles, whose rows and columns are written between them."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Config, Family, Looks, Shown, patch
from fastattr.adapters.families.tiles import tile_grid, with_whole

# the visual indicators: begin of a picture, of its tiles, of the next column, of the next row, end of a picture
START, TILES, COLUMN, ROW, END = range(5)


def cell(config: Config) -> int:
    return patch(config) * int(config.vision_config.hidden_stride)


def look(shown: Shown) -> list[Looks]:
    """Rows and columns are counted in the text."""
    indicators = list(shown.config.visual_indicator_token_ids)
    grid = tile_grid(shown, cell(shown.config), rounded=math.ceil)  # the tower fills up what is missing
    looks = []
    rows = columns = 1
    for token in shown.inputs["input_ids"].flatten().tolist():
        kind = indicators.index(token) if token in indicators else None
        if kind == START:
            rows = columns = 1
        elif kind == ROW:
            rows += 1
        elif kind == COLUMN and rows == 1:
            columns += 1
        elif kind == END:
            looks.append(with_whole((rows, columns), grid, whole_first=True))
    return looks


OVIS2 = Family("Ovis2", look, cell, None, resized=False, tiles=True)

FAMILIES = {"ovis2": OVIS2}
