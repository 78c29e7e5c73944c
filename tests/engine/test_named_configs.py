"""A name is the same configuration everywhere, and unsupported ones are refused before a model runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastattr
from fastattr import AttributionConfig, InputError
from fastattr.cli import main
from fastattr.config import ConfigChanges, configure, from_saved, name_of
from fastattr.datasets import Sample
from fastattr.demo.scenes import make_scene
from fastattr.evaluate import Settings, judge, judging
from tests.engine import family_models

PROMPT = "Describe the image."
SEED = 10_000_003
ANSWER = "A large blue star."
SCENE = make_scene(SEED)

# the options that the names stand for
EXPLICIT: dict[str, dict[str, Any]] = {
    "lens": {"method": "lens", "scales": (1.0,), "filter": False},
    "tam": {"method": "tam", "scales": (1.0,)},
    "arc": {"scales": (1.0, 1.5, 2.0)},
    "best": {"scale_mean": "geometric", "context": "prompt", "filter": None, "regions": 6, "scales": (1.0, 1.5, 2.0)},
    "tam@1+1.5": {"method": "tam", "scales": (1.0, 1.5)},
}


@pytest.fixture(scope="module")
def shapes() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.fixture(scope="module")
def expected(shapes: fastattr.Model) -> dict[str, fastattr.Attribution]:
    """The attributions by the options that the names stand for."""
    return {
        name: fastattr.attribute(shapes, SCENE.image, PROMPT, ANSWER, AttributionConfig(**options))
        for name, options in EXPLICIT.items()
    }


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    SCENE.image.save(path)
    return path


@pytest.fixture
def unread(shapes: fastattr.Model) -> Iterator[fastattr.Model]:
    """A model that fails when it is run."""

    def run(_module: nn.Module, _args: Any) -> None:
        raise AssertionError("the model ran")

    handle = shapes.hf_model.register_forward_pre_hook(run)
    yield shapes
    handle.remove()


def same(ours: fastattr.Attribution, theirs: fastattr.Attribution, atol: float = 0.0) -> None:
    assert ours.token_ids == theirs.token_ids
    for mine, other in zip(ours.image, theirs.image, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)
    assert replace(ours.config, evidence=True) == replace(theirs.config, evidence=True)


# --- names ------------------------------------------------------------------------------------------------


def test_changes_are_the_fields_of_a_configuration() -> None:
    ours, theirs = get_type_hints(ConfigChanges), get_type_hints(AttributionConfig)
    assert ours.keys() == theirs.keys()
    differing = {name: ours[name] for name in ours if ours[name] != theirs[name]}
    lists = Sequence[float] | None
    assert differing == {"method": str, "scales": lists, "scale_weights": lists}


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_name_is_its_options(name: str) -> None:
    config = configure(name)
    assert config == configure(None, {"method": name}) == configure({"method": name})
    assert config.resolve((1.0, 1.5, 2.0), 1000) == AttributionConfig(**EXPLICIT[name], top_k=50)
    assert name_of(config) == name_of(AttributionConfig(**EXPLICIT[name])) == name
    assert config.evidence


def test_changes_are_named() -> None:
    assert name_of(configure("arc@1")) == "arc@1"
    assert name_of(configure("arc", {"top_k": 20})) == "arc, top_k=20"
    assert name_of(configure("arc", {"top_k": 50, "evidence": False, "backend": "torch"})) == "arc"
    assert name_of(configure("best", {"regions": 4})) == "best, regions=4"
    assert name_of(configure("best", {"regions": 0, "scales": [1]})) == "best@1, regions=0"
    assert name_of(configure("tam", {"scales": None})) == "tam, scales=None"
    assert name_of(configure("lens", {"filter": True})) == "lens, filter=True"
    weighted = configure("arc@1+2", {"scale_weights": (1, 3)})
    assert name_of(weighted) == "arc@1+2, scale_weights=1+3"


CONFIGS = st.builds(
    AttributionConfig,
    method=st.sampled_from(["lens", "tam", "arc"]),
    scales=st.sampled_from([None, (1.0,), (1.0, 1.5, 2.0), (2.0, 1.0)]),
    scale_mean=st.sampled_from(["arithmetic", "geometric"]),
    context=st.sampled_from(["all", "prompt"]),
    filter=st.sampled_from([None, True, False]),
    regions=st.sampled_from([0, 6]),
    top_k=st.sampled_from([None, 20, 50]),
    evidence=st.booleans(),
)


@given(CONFIGS, CONFIGS)
def test_names_are_equal_where_the_maps_are(one: AttributionConfig, other: AttributionConfig) -> None:
    def decisive(config: AttributionConfig) -> AttributionConfig:
        scales = (1.0, 1.5, 2.0) if config.scales is None and config.method == "arc" else config.scales
        return replace(config, evidence=True, top_k=config.top_k or 50, scales=scales)

    assert (name_of(one) == name_of(other)) == (decisive(one) == decisive(other))


@given(CONFIGS)
def test_a_configuration_is_returned_unchanged(config: AttributionConfig) -> None:
    assert configure(config) == config
    stored = json.loads(json.dumps({each.name: getattr(config, each.name) for each in fields(config)}))
    assert from_saved(stored) == config


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("gradcam", {}, "there is no method 'gradcam', expected one of lens, tam, arc, best"),
        (None, {"method": "gradcam"}, "there is no method 'gradcam'"),
        ("tam@1,5", {}, "the scales of 'tam@1,5' are '1,5'"),
        ("tam@0", {}, "scales holds 0.0, expected numbers above 0"),
        ("best", {"method": "arc"}, "got config='best' and method='arc', expected one of them"),
        (AttributionConfig(), {"method": "arc"}, "expected one of them"),
        ("tam@1+2", {"scales": (1.0,)}, "'tam@1\\+2' names its scales, but scales=\\(1.0,\\) is given too"),
        ("arc", {"scale": (1.0,)}, "unknown option scale; known are method, scales, "),
        ({"tpo_k": 3}, {}, "unknown option tpo_k; known are method, scales, "),
        ({"top_k": 3}, {"top_k": 3}, "top_k is given in the configuration and beside it"),
        ({"method": "best"}, {"method": "best"}, "method is given in the configuration and beside it"),
        (3, {}, "the configuration is a int, expected an AttributionConfig or a name: lens, tam, arc, best"),
        ("arc", {"scales": ()}, "scales is empty, expected at least one number"),
    ],
)
def test_wrong_configurations_are_named_in_the_error(
    config: Any, changes: Any, message: str, unread: fastattr.Model
) -> None:
    with pytest.raises(InputError, match=message):
        configure(config, changes)
    with pytest.raises(InputError, match=message):
        fastattr.attribute(unread, SCENE.image, PROMPT, ANSWER, config, **changes)


def test_the_depth_of_rankings_is_at_most_the_vocabulary() -> None:
    small = AttributionConfig(scales=(1.0,)).resolve((1.0,), 9)
    assert small.top_k == 9
    assert AttributionConfig(top_k=9).resolve((1.0,), 9).top_k == 9
    with pytest.raises(InputError, match="top_k is 50, expected at most 9"):
        AttributionConfig(top_k=50).resolve((1.0,), 9)
    layout = fastattr.TokenLayout.from_spans(images=[(0, 4, (1, 2, 2))], prompt=[(4, 5)], response=(5, 8))
    states, head = torch.randn(7, 6), torch.randn(9, 6)
    default, deep = (
        fastattr.attribute_states(states, head, torch.arange(8), layout, "arc@1", **changes)
        for changes in ({}, {"top_k": 9})
    )
    same(default, deep)


# --- one name, the same maps ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPLICIT)
def test_attribute_and_batch(shapes: fastattr.Model, expected: dict[str, fastattr.Attribution], name: str) -> None:
    same(fastattr.attribute(shapes, SCENE.image, PROMPT, ANSWER, method=name), expected[name])
    same(fastattr.attribute(shapes, SCENE.image, PROMPT, ANSWER, name, evidence=False), expected[name])
    rows = [(SCENE.image, PROMPT, ANSWER)]
    same(fastattr.attribute_batch(shapes, rows, name)[0], expected[name])
    assert f", {name}, maps" in repr(expected[name])


@pytest.mark.parametrize("name", sorted(EXPLICIT.keys() - {"best"}))
def test_stream(shapes: fastattr.Model, expected: dict[str, fastattr.Attribution], name: str) -> None:
    said = expected[name].token_ids
    for streaming in (
        fastattr.stream(shapes, SCENE.image, PROMPT, said, name),
        fastattr.stream(shapes, SCENE.image, PROMPT, said, method=name),
    ):
        list(streaming)
        same(streaming.attribution(), expected[name], atol=5e-3)


def test_eval(
    shapes: fastattr.Model, expected: dict[str, fastattr.Attribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps that are judged."""
    judged: list[torch.Tensor] = []
    original = judging.plausibility

    def keep(maps: torch.Tensor, *rest: Any) -> Any:
        judged.append(maps)
        return original(maps, *rest)

    monkeypatch.setattr(judging, "plausibility", keep)
    settings = Settings({name: name for name in EXPLICIT}, words=0)
    assert {config.evidence for config in settings.configs.values()} == {False}
    judge(shapes, _sample(), settings)
    for name, maps in zip(EXPLICIT, judged, strict=True):
        torch.testing.assert_close(maps, expected[name].image[0][:, 0], rtol=0, atol=1e-5)


def _sample() -> Sample:
    return Sample(
        id="one",
        image=SCENE.image,
        prompt=PROMPT,
        response=ANSWER,
        mentions=lambda _: (),
        functions=lambda _: (),
    )


@pytest.mark.parametrize("name", ["best", "tam@1+1.5"])
def test_command_line(
    expected: dict[str, fastattr.Attribution], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "x.safetensors"
    assert run(monkeypatch, "explain", picture, "--response", ANSWER, "--method", name, "--out", out) == 0
    same(fastattr.Attribution.load(out), expected[name])


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `fastattr WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["fastattr", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.mark.parametrize("family", ["gemma3", "idefics3"])
@pytest.mark.parametrize("name", ["arc", "best"])
def test_models_of_one_scale(family: str, name: str) -> None:
    """Their only scale is 1, in `attribute`, batches and evaluation."""
    held = family_models.TINY[family]()
    model = fastattr.wrap(held.hf_model, held.processor)
    assert model.scales == (1.0,)
    whole = fastattr.attribute(model, SCENE.image, PROMPT, ANSWER, name)
    same(whole, fastattr.attribute(model, SCENE.image, PROMPT, ANSWER, name, scales=(1.0,)))
    same(whole, fastattr.attribute_batch(model, [(SCENE.image, PROMPT, ANSWER)], name)[0])
    assert name_of(whole.config) == f"{name}@1"
    assert set(judge(model, _sample(), Settings({name: name}, words=0)).plausibility) == {name}


# --- refused before a model runs --------------------------------------------------------------------------


def test_configurations_that_a_stream_refuses(unread: fastattr.Model) -> None:
    with pytest.raises(InputError, match=r"best needs the whole response \(regions=6\)"):
        fastattr.stream(unread, SCENE.image, PROMPT, [5], "best")
    with pytest.raises(InputError, match="compat='tam' is for attribute_states"):
        fastattr.stream(unread, SCENE.image, PROMPT, [5], "tam", compat="tam")


def test_configurations_that_attribute_refuses(unread: fastattr.Model) -> None:
    with pytest.raises(InputError, match="regions=6 weighs all maps at once; leave memory_limit out"):
        fastattr.attribute(unread, SCENE.image, PROMPT, ANSWER, "best", memory_limit=10**9)
    with pytest.raises(InputError, match="compat='tam' is for attribute_states"):
        fastattr.attribute(unread, SCENE.image, PROMPT, ANSWER, "tam", compat="tam")
    with pytest.raises(InputError, match="top_k is 100000, expected at most"):
        fastattr.attribute(unread, SCENE.image, PROMPT, ANSWER, top_k=100_000)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("best", {}, "regions=6 hides parts of the images and needs more forwards of the model; use attribute"),
        ("arc@1+2", {}, r"scales are \(1.0, 2.0\), but only the scale that the model saw, 1, was captured"),
        ("tam@2", {}, r"scales are \(2.0,\)"),
        ("arc", {"layer": -2}, "layer=-2, but the states are those of the last layer"),
        ("tam", {"compat": "tam"}, "compat='tam' is for attribute_states"),
    ],
)
def test_configurations_that_captured_states_refuse(
    unread: fastattr.Model, config: str, changes: Any, message: str
) -> None:
    from fastattr.adapters.capturing import CapturedStates

    with pytest.raises(InputError, match=message):
        CapturedStates(unread).attribute(torch.ones(1, 3, dtype=torch.long), config, **changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("arc", {}, "scales is None, the model's own, but there is no model here.*config='arc@1' or scales=\\(1.0,\\)"),
        ("best@1", {}, "regions=6 hides parts of the images"),
        ("tam", {"evidence": True}, "evidence=True needs a forward of the model with the images blanked"),
        ("tam", {"layer": 3}, "layer=3, but the states are those of the last layer"),
        ("tam@1+2", {}, r"got 1 hidden_states, 1 input_ids and 1 layouts for 2 scales \(1.0, 2.0\)"),
    ],
)
def test_configurations_that_attribute_states_refuses(config: str, changes: Any, message: str) -> None:
    layout = fastattr.TokenLayout.from_spans(images=[(0, 4, (1, 2, 2))], prompt=[(4, 5)], response=(5, 8))
    with pytest.raises(InputError, match=message):
        fastattr.attribute_states(torch.randn(7, 6), torch.randn(9, 6), torch.arange(8), layout, config, **changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "{picture}", "--scales", "0"), "scales holds 0.0, expected numbers above 0"),
        (
            ("explain", "{picture}", "--method", "gradcam"),
            "there is no method 'gradcam', expected one of lens, tam, arc",
        ),
        (("explain", "{picture}", "--method", "arc", "--method", "tam@x"), "the scales of 'tam@x' are 'x'"),
        (("explain", "{picture}", "--method", "tam@1", "--scales", "1"), "'tam@1' names its scales"),
        (("explain", "{picture}", "--live", "--method", "best"), "best needs the whole response (regions=6)"),
        (("eval", "scenes", "--methods", "tam,gradcam"), "there is no method 'gradcam'"),
        (("batch", "in.jsonl", "--out", "out", "--method", "gradcam"), "there is no method 'gradcam'"),
        (("batch", "in.jsonl", "--out", "out", "--scales", "0"), "scales holds 0.0"),
    ],
)
def test_the_command_line_checks_first(
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastattr, "load", load, raising=False)
    assert run(monkeypatch, *(word.format(picture=picture) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_the_command_line_prints_the_name_of_the_configuration(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("explain", picture, "--response", "A star.", "--out", tmp_path / "x.html")
    assert run(monkeypatch, *words, "--method", "tam@1+1.5", "--method", "lens") == 0
    assert "\nmethod: tam@1+1.5; also in the report: lens\n" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--scales", "1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["configuration"], shown["method"], shown["scales"]) == ("arc@1", "arc", [1.0])
    assert run(monkeypatch, *words, "--method", "tam", "--scales", "own", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["configuration"], shown["scales"]) == ("tam@1+1.5+2", [1.0, 1.5, 2.0])
