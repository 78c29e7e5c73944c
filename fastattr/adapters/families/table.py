"""What is known of every family, for people: `fastattr models`. What was proven comes from the tests, in `proven.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastattr.adapters.families import FAMILIES, registered_types

PROVEN = Path(__file__).with_name("proven.json")  # written by `python -m tests.engine.families.table`


@dataclass(frozen=True)
class Listed:
    """One line of the table.

    Attributes:
        model_type: of the configuration.
        family: what people call it.
        pictures: `any size`, `one square` or `tiles`.
        video: `time steps` where videos are read as such, else `frames`, one image each.
        scales: `any`, or `1` where the number of tokens is fixed.
        proven: the transformers release the proof ran with; empty where there is none (families that others bring).
        stood_in: what was replaced in the proof, if anything.
    """

    model_type: str
    family: str
    pictures: str
    video: str
    scales: str
    proven: str
    stood_in: str


def listed() -> list[Listed]:
    """Every family that is known here, in order of name, then those that were registered."""
    proven = {row["model_type"]: row for row in json.loads(PROVEN.read_text(encoding="utf-8"))}
    nothing = {"family": "", "pictures": "", "proven": "", "stood_in": ""}
    others = registered_types()
    rows = [
        Listed(
            model_type,
            shown["family"] or family.name,
            shown["pictures"],
            "time steps" if family.watch is not None else "frames",
            "any" if family.enlarge is not None else "1",
            shown["proven"],
            shown["stood_in"],
        )
        for model_type, family in FAMILIES.items()
        if model_type not in others
        for shown in [proven.get(model_type, nothing)]
    ]
    theirs = [Listed(model_type, "registered", "", "", "", "", "") for model_type in others]
    return [*sorted(rows, key=lambda row: (row.family.lower(), row.model_type)), *theirs]


def as_markdown() -> str:
    """The table of the documentation."""
    head = ("family", "model_type", "pictures", "video", "scales", "proven with transformers", "stood in")
    lines = [
        (row.family, f"`{row.model_type}`", row.pictures, row.video, row.scales, row.proven, row.stood_in)
        for row in listed()
        if row.proven
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *lines])
