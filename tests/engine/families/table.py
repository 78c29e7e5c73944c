"""The table of families, from the rows that the tests prove: `python -m tests.engine.families.table` writes it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

from fastattr.adapters.families import FAMILIES
from fastattr.adapters.families.table import PROVEN, as_markdown
from tests.engine.families.proof import Row

README = Path(__file__).parents[3] / "fastattr" / "adapters" / "README.md"


def all_rows() -> list[Row]:
    """Of every test module in this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    modules = [importlib.import_module(f"tests.engine.families.{name}") for name in names]
    return [row for module in modules for row in getattr(module, "ROWS", [])]


def table(version: str) -> list[dict[str, Any]]:
    """What `proven.json` holds."""
    rows = all_rows()
    found = []
    for model_type in sorted({row.model_type for row in rows}):
        mine = [row for row in rows if row.model_type == model_type]
        family = FAMILIES[model_type]
        found.append(
            {
                "model_type": model_type,
                "family": family.name,
                "pictures": _pictures(family.tiles, family.resized, mine),
                "proven": min((row.last_good or version for row in mine), key=Version),
                "stood_in": "; ".join(sorted({row.stood_in for row in mine if row.stood_in})),
            }
        )
    return found


def _pictures(tiles: bool, resized: bool, rows: list[Row]) -> str:
    if tiles:
        return "tiles"
    square = all(height == width for row in rows for height, width in row.views)
    return "one square" if square or not resized else "any size"


def main() -> None:
    PROVEN.write_text(json.dumps(table(transformers.__version__), indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- families -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    README.write_text(f"{before}<!-- families -->\n{as_markdown()}\n<!-- end -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
