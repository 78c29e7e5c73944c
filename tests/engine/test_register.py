"""Families of others: registered in a program or brought by a package, as the documentation says."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import transformers

import fastattr
from fastattr.adapters.families import registry
from tests.engine import family_models as tiny
from tests.engine.families.proof import Row, prove
from tests.engine.family_models import picture

README = (Path(__file__).parents[2] / "fastattr" / "adapters" / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class MyConfig(transformers.LlavaConfig):
    model_type = "my_vlm"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let packages bring entry points."""

    def bring(*values: str) -> None:
        held = EntryPoints(EntryPoint("my_vlm", value, registry.GROUP) for value in values)
        monkeypatch.setattr(registry, "entry_points", lambda **wanted: held.select(**wanted))

    yield bring
    sys.modules.pop("somebody", None)


def mine() -> tiny.Tiny:
    held = tiny.llava_siglip()
    config = MyConfig(**{k: v for k, v in held.hf_model.config.to_dict().items() if k != "model_type"})
    held.hf_model.config = config
    return held


def example() -> dict[str, Any]:
    """The documented example, run as it stands."""
    held = mine()
    names: dict[str, Any] = {"hf_model": held.hf_model, "processor": held.processor, "picture": picture()}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(EXAMPLE, names)
    assert printed.getvalue() == "(((1, 4, 4),), ((1, 6, 6),), ((1, 8, 8),))\n"
    return names


def test_the_documented_example_runs_and_is_about_thirty_lines() -> None:
    names = example()
    assert names["why"].image[0].shape[1:] == (1, 8, 8)
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 30


def test_its_family_is_right() -> None:
    """What the documentation shows stands the proof of all families."""
    example()
    prove(Row("my_vlm", mine, [(4, 4)], (1, 4, 4)))


def test_nobody_knows_it_before() -> None:
    held = mine()
    with pytest.raises(fastattr.UnsupportedModelError, match=r"no adapter is known .*'my_vlm'.* register_adapter"):
        fastattr.wrap(held.hf_model, held.processor)


def test_a_package_brings_one(brought: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = example()["look"].__globals__
    monkeypatch.setattr(registry, "_registered", {})
    module = type(sys)("somebody")
    module.FAMILY = fastattr.Family("Theirs", family["look"], family["patch"], None)  # type: ignore[attr-defined]
    sys.modules["somebody"] = module
    brought("somebody:FAMILY")
    held = mine()
    assert fastattr.wrap(held.hf_model, held.processor).family.name == "Theirs"
    assert registry.registered_types() == ["my_vlm"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["nobody.at_home:FAMILY"], r"\(nobody.at_home:FAMILY\) cannot be loaded: ModuleNotFoundError"),
        (["os:getcwd"], r"what a package brings for 'my_vlm' \(os:getcwd\) is a .*, expected a fastattr.Family"),
        (["os:a", "sys:b"], "2 packages bring an adapter for 'my_vlm': os:a, sys:b; uninstall all but one"),
    ],
)
def test_broken_packages_are_named(brought: Any, values: list[str], told: str) -> None:
    brought(*values)
    held = mine()
    with pytest.raises(fastattr.UnsupportedModelError, match=told):
        fastattr.wrap(held.hf_model, held.processor)


def test_a_broken_package_does_not_stop_other_models(brought: Any) -> None:
    brought("nobody.at_home:FAMILY")
    held = tiny.llava_siglip()
    assert fastattr.wrap(held.hf_model, held.processor).family.name == "LLaVA-1.5"


def test_what_is_registered_comes_before_what_is_known() -> None:
    held = tiny.llava_siglip()
    known = fastattr.wrap(held.hf_model, held.processor).family
    fastattr.register_adapter("llava", fastattr.Family("Mine", known.look, known.cell, None))
    assert fastattr.wrap(held.hf_model, held.processor).family.name == "Mine"


@pytest.mark.parametrize(("model_type", "family"), [("", None), (5, None), ("my_vlm", None), ("my_vlm", "Family")])
def test_only_families_can_be_registered(model_type: Any, family: Any) -> None:
    with pytest.raises(fastattr.InputError, match="expected"):
        fastattr.register_adapter(model_type, family)


SQUARE = fastattr.Look((1, 4, 4))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda shown: shown.inputs["nothing"], "Mine reads its grids from 'nothing', but the model's inputs are"),
        (lambda shown: [][0], "Mine cannot tell where its image tokens lie: IndexError"),
        (lambda shown: None, "Mine says that its image tokens lie as None, expected a list"),
        (lambda shown: [SQUARE], "expected a list that holds for every image a tuple of Look"),
        (lambda shown: [()], "expected a list that holds for every image a tuple of Look"),
        (lambda shown: [((1, 4, 4),)], "expected a list that holds for every image a tuple of Look"),
        (lambda shown: [(SQUARE,)] * 2, "made 2 images and 0 videos of 1 and 0"),
        (lambda shown: [(fastattr.Look((1, 4)),)], r"a look has grid \(1, 4\)"),
        (lambda shown: [(fastattr.Look((1, 4, 0)),)], r"a look has grid \(1, 4, 0\)"),
        (lambda shown: [(fastattr.Look((1, 4.0, 4)),)], r"a look has grid \(1, 4.0, 4\)"),
        (lambda shown: [(fastattr.Look((1, 4, 4), (0.8, 0, 0.2, 1)),)], r"over the box \(0.8, 0, 0.2, 1\)"),
        (lambda shown: [(fastattr.Look((1, 4, 4), (0, 0, 1)),)], r"over the box \(0, 0, 1\)"),
        (lambda shown: [(fastattr.Look((1, 4, 4), (0, 0, float("nan"), 1)),)], "over the box"),
        (lambda shown: [(fastattr.Look((1, 4, 4), row_end=-1),)], "and no negative number"),
        (
            lambda shown: [(fastattr.Look((1, 4, 2), (0, 0, 0.4, 1)), fastattr.Look((1, 4, 2), (0.6, 0, 1, 1)))],
            "Mine: 4 of 20 cells of the picture are in none of its 2 views",
        ),
    ],
)
def test_families_that_say_nonsense_are_named(answer: Any, told: str) -> None:
    held = mine()
    fastattr.register_adapter("my_vlm", fastattr.Family("Mine", answer, lambda config: 8, None))
    model = fastattr.wrap(held.hf_model, held.processor)
    with pytest.raises(fastattr.TokenLayoutError, match=told):
        fastattr.attribute(model, picture(), "What is this?", "A circle.", scales=(1.0,))


def test_a_family_that_counts_other_tokens_than_the_model_is_named() -> None:
    held = mine()
    wrong = fastattr.Family("Mine", lambda shown: [(fastattr.Look((1, 3, 3)),)], lambda config: 8, None)
    fastattr.register_adapter("my_vlm", wrong)
    model = fastattr.wrap(held.hf_model, held.processor)
    with pytest.raises(fastattr.StatesError, match=r"\(Mine\) fails .* may count other tokens than the model has"):
        fastattr.attribute(model, picture(), "What is this?", "A circle.", scales=(1.0,))


def test_a_family_whose_model_has_no_such_token_is_named() -> None:
    held = mine()
    fastattr.register_adapter(
        "my_vlm", fastattr.Family("Mine", lambda shown: [], lambda config: 8, None, image_token="x")
    )
    with pytest.raises(
        fastattr.UnsupportedModelError, match="MyConfig has no x, the id that stands for an image in Mine"
    ):
        fastattr.wrap(held.hf_model, held.processor)


@pytest.mark.parametrize("part", ["look", "cell", "enlarge", "watch"])
def test_parts_of_a_family_are_functions(part: str) -> None:
    parts: dict[str, Any] = {"look": len, "cell": len, "enlarge": None, "watch": None, part: 8}
    with pytest.raises(fastattr.InputError, match=f"has {part}=8, expected a function"):
        fastattr.register_adapter("my_vlm", fastattr.Family("Mine", **parts))


def test_scales_that_nobody_chose() -> None:
    """Several where the model can show them; one where tiles are finer already, or the number of tokens is fixed."""
    config = fastattr.AttributionConfig(scales=(1.0,))
    for held, expected in ((tiny.qwen2_vl(), (1.0, 1.5, 2.0)), (tiny.gemma3(), (1.0,)), (tiny.idefics3(), (1.0,))):
        model = fastattr.wrap(held.hf_model, held.processor)
        assert model.scales == expected
        why = fastattr.attribute(model, picture(), "What is this?", "A circle.", evidence=False)
        assert why.config.scales == expected
        (row,) = fastattr.attribute_batch(model, [(picture(), "What is this?", "A circle.")])
        assert row.config.scales == expected
        assert len(list(fastattr.stream(model, picture(), "What is this?", [9, 10], config=config))) == 2
