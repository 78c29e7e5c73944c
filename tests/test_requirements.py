"""The locked releases satisfy pyproject.toml, and can be installed from any index."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINES = (Path(__file__).parents[1] / "requirements" / "test.txt").read_text().splitlines()


def test_every_line_is_one_release() -> None:
    for line in LINES:
        assert line.startswith("# ") or re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line), line
    assert "torch==2.13.0" in LINES


def test_what_is_declared_is_locked() -> None:
    locked = dict(line.split("==") for line in LINES if "==" in line)
    declared = [Requirement(each) for each in requires("fastattr") or ()]
    wanted = [
        each
        for each in declared
        if any(
            each.marker is None or each.marker.evaluate({"extra": extra}) for extra in ("test", "log", "ray", "video")
        )
    ]
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name not in ("fastattr", "triton"):  # each build of torch brings its own Triton
            assert requirement.specifier.contains(locked[name]), requirement
