"""Functions of transformers modules that cannot be imported without torchvision, though the functions do not need it."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

NEEDED = {
    "math": math,
    "itertools": itertools,
    "torch": torch,
    "F": torch.nn.functional,
    "defaultdict": defaultdict,
    "lru_cache": lru_cache,
}


def borrow(module: str, *names: str, **given: Any) -> dict[str, Any]:
    """The functions (and methods) called `names` as they are written there, by name; they may call each other.

    Args:
        given: what else they use of their module, by its name there.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    chosen = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in chosen) == sorted(names)
    future = ast.parse("from __future__ import annotations").body  # annotations name types that are not here
    held: dict[str, Any] = {**NEEDED, **given}
    exec(compile(ast.Module([*future, *chosen], []), spec.origin, "exec"), held)
    return {name: held[name] for name in names}
