"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"fastattr.errors", "fastattr.types", "fastattr.config"}

# module or package -> what of ours it may import when it is imported, besides errors, types and config
ARROWS: dict[str, set[str]] = {
    "fastattr": {"fastattr.pipeline", "fastattr.adapters", "fastattr.chat", "fastattr.streaming"},
    "fastattr.__main__": {"fastattr.cli"},
    "fastattr.errors": set(),
    "fastattr.types": set(),
    "fastattr.config": set(),
    "fastattr.decoding": set(),
    "fastattr.video": {"fastattr.decoding"},
    "fastattr.images": {"fastattr.decoding", "fastattr.video"},
    "fastattr.parts": {"fastattr.images", "fastattr.video"},
    "fastattr.chat": {"fastattr.images", "fastattr.parts"},
    "fastattr.views": set(),
    "fastattr.regions": set(),
    "fastattr.descriptors": set(),
    "fastattr.text": {"fastattr.reasoning"},
    "fastattr.reasoning": set(),
    "fastattr.words": set(),
    "fastattr.calibration": set(),
    "fastattr.ops": {"fastattr_kernels"},
    "fastattr.maps": {"fastattr.ops"},
    "fastattr.arc": {"fastattr.ops"},
    "fastattr.msea": {"fastattr.ops", "fastattr.views"},
    "fastattr.compat": {"fastattr.ops", "fastattr.maps", "fastattr.msea"},
    "fastattr.memory": set(),
    "fastattr.method": {
        "fastattr.arc",
        "fastattr.compat",
        "fastattr.maps",
        "fastattr.memory",
        "fastattr.msea",
        "fastattr.ops",
    },
    "fastattr.pipeline": {
        "fastattr.adapters",
        "fastattr.calibration",
        "fastattr.chat",
        "fastattr.images",
        "fastattr.maps",
        "fastattr.method",
        "fastattr.msea",
        "fastattr.ops",
        "fastattr.regions",
        "fastattr.targets",
        "fastattr.text",
    },
    "fastattr.streaming": {
        "fastattr.adapters",
        "fastattr.arc",
        "fastattr.chat",
        "fastattr.images",
        "fastattr.maps",
        "fastattr.method",
        "fastattr.msea",
        "fastattr.ops",
        "fastattr.pipeline",
        "fastattr.text",
    },
    "fastattr.adapters": {
        "fastattr.calibration",
        "fastattr.chat",
        "fastattr.images",
        "fastattr.maps",
        "fastattr.parts",
        "fastattr.storage",
        "fastattr.text",
        "fastattr.video",
        "fastattr.views",
    },
    "fastattr.selection": {"fastattr.report", "fastattr.text", "fastattr.words"},
    "fastattr.fields": {"fastattr.selection", "fastattr.text"},
    "fastattr.targets": {"fastattr.fields", "fastattr.selection", "fastattr.text", "fastattr.words"},
    "fastattr.storage": {"fastattr.calibration", "fastattr.decoding"},
    "fastattr.metrics": set(),
    "fastattr.metrics.faithfulness": {"fastattr.images"},
    "fastattr.report": {"fastattr.fields", "fastattr.selection", "fastattr.storage", "fastattr.text"},
    "fastattr.demo": {"fastattr.adapters", "fastattr.images", "fastattr.pipeline"},
    "fastattr.datasets": {"fastattr.decoding", "fastattr.demo", "fastattr.images", "fastattr.storage", "fastattr.text"},
    "fastattr.evaluate": {
        "fastattr.adapters",
        "fastattr.calibration",
        "fastattr.datasets",
        "fastattr.descriptors",
        "fastattr.images",
        "fastattr.maps",
        "fastattr.method",
        "fastattr.metrics",
        "fastattr.metrics.faithfulness",
        "fastattr.pipeline",
        "fastattr.text",
    },
    "fastattr.log": {
        "fastattr.adapters",
        "fastattr.calibration",
        "fastattr.chat",
        "fastattr.descriptors",
        "fastattr.images",
        "fastattr.parts",
        "fastattr.pipeline",
        "fastattr.selection",
        "fastattr.storage",
        "fastattr.text",
        "fastattr.video",
        "fastattr.decoding",
    },
    "fastattr.log.dashboard": {"fastattr.log", "fastattr.report"},
    "fastattr.log.recipes": {"fastattr", "fastattr.demo", "fastattr.images", "fastattr.log"},
    "fastattr.batch": {
        "fastattr",
        "fastattr.adapters",
        "fastattr.chat",
        "fastattr.images",
        "fastattr.log",
        "fastattr.pipeline",
        "fastattr.storage",
    },
    "fastattr.cli": {
        "fastattr",
        "fastattr.adapters",
        "fastattr.batch",
        "fastattr.chat",
        "fastattr.demo",
        "fastattr.evaluate",
        "fastattr.log",
        "fastattr.parts",
        "fastattr.log.dashboard",
        "fastattr.storage",
        "fastattr.streaming",
        "fastattr.report",
    },
    "fastattr_kernels": {"fastattr_kernels.backend", "fastattr_kernels.reference", "fastattr_kernels.library"},
    "fastattr_kernels.backend": set(),
    "fastattr_kernels.reference": set(),
    "fastattr_kernels.library": {"fastattr_kernels.backend", "fastattr_kernels.reference", "fastattr_kernels.gpu"},
    "fastattr_kernels.gpu": {"fastattr_kernels.backend", "fastattr_kernels.reference"},
}
# methods of Attribution and CapturedStates are doors to these, opened only when one is called
LAZY_DOORS = {
    "fastattr.types": {
        "fastattr.calibration",
        "fastattr.descriptors",
        "fastattr.fields",
        "fastattr.selection",
        "fastattr.storage",
        "fastattr.report",
    },
    "fastattr.adapters": {"fastattr.pipeline"},
}
# outside packages that only some rooms may know
OUTSIDE = {
    "transformers": {"fastattr.adapters", "fastattr.demo"},
    "typer": {"fastattr.cli"},
    "matplotlib": {"fastattr.evaluate", "fastattr.report", "fastattr.types"},
    "pandas": {"fastattr.report", "fastattr.types"},
    "pycocotools": {"fastattr.datasets"},
    "inflect": {"fastattr.datasets"},
    "safetensors": {"fastattr.storage", "fastattr.adapters", "fastattr.log"},
    "tokenizers": {"fastattr.demo"},
    "pyarrow": {"fastattr.batch", "fastattr.log"},
    "fsspec": {"fastattr.batch", "fastattr.log"},
    "ray": {"fastattr.batch"},
    "duckdb": {"fastattr.log"},
    "opentelemetry": {"fastattr.log", "fastattr.log.recipes"},
    "starlette": {"fastattr.log.dashboard"},
    "jinja2": {"fastattr.adapters", "fastattr.log.dashboard"},
    "uvicorn": {"fastattr.log.dashboard", "fastattr.log.recipes"},
    "fastapi": {"fastattr.log.recipes"},
    "structlog": {"fastattr.log.recipes"},
    "prometheus_client": {"fastattr.log.recipes"},
    "triton": {"fastattr_kernels.gpu", "fastattr_kernels.backend"},
}


def modules() -> list[tuple[str, Path]]:
    found = [("fastattr" + _dotted(path, ROOT / "fastattr"), path) for path in (ROOT / "fastattr").rglob("*.py")]
    kernels = ROOT / "kernels" / "fastattr_kernels"
    return found + [("fastattr_kernels" + _dotted(path, kernels), path) for path in kernels.rglob("*.py")]


def _dotted(path: Path, top: Path) -> str:
    parts = [part for part in path.relative_to(top).with_suffix("").parts if part != "__init__"]
    return "".join(f".{part}" for part in parts)


def room(module: str) -> str:
    """The module or package of the table that `module` belongs to."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        name = ".".join(parts[:size])
        if name in ARROWS and (name != "fastattr" or len(parts) == 1):
            return name
    raise AssertionError(f"{module} is in no room of the table; say in ARROWS what it may import")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            known = {name for name, _ in modules()}
            found |= {name for name in submodules if name in known} or {module}
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_arrows(module: str, path: Path) -> None:
    here = room(module)
    allowed = LEAVES | ARROWS[here] | LAZY_DOORS.get(here, set()) | {here}
    for imported in imports(path):
        top = imported.split(".")[0]
        if top in ("fastattr", "fastattr_kernels"):
            assert room(imported) in allowed, f"{module} imports {imported}, which {here} may not"
        if top in OUTSIDE:
            assert here in OUTSIDE[top], f"{module} imports {top}, which only {sorted(OUTSIDE[top])} may"
        assert top not in ("benchmarks", "tests"), f"{module} imports {imported}"


def test_kernels_stand_alone() -> None:
    allowed = {"torch", "triton", "fastattr_kernels", "__future__"}
    for module, path in modules():
        if module.startswith("fastattr_kernels"):
            tops = {imported.split(".")[0] for imported in imports(path)} - set(sys.stdlib_module_names)
            assert tops <= allowed, f"{module} imports {tops - allowed}"


def test_importing_fastattr_is_light() -> None:
    """torch, transformers, drawing and web libraries are imported only when a name that needs them is used."""
    code = (
        "import sys, fastattr\n"
        "heavy = {'torch', 'transformers', 'typer', 'tokenizers', 'matplotlib', 'triton', 'pyarrow', 'fastattr.log'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
