"""Patterns and texts made to take for ever do not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastattr
from fastattr import selection
from fastattr.errors import InputError, PhraseError
from fastattr.types import AttributionConfig


def said(*tokens: str) -> fastattr.Attribution:
    """One cell a map, and the tokens as they are."""
    n, spans, at = len(tokens), [], 0
    for token in tokens:
        spans.append((at, at + len(token)))
        at += len(token)
    scores = torch.zeros(n)
    return fastattr.Attribution(
        response="".join(tokens), tokens=tokens, token_ids=tuple(range(n)), spans=tuple(spans), context_tokens=tokens,
        image=(torch.rand(n, 1, 1, 1),), context=torch.zeros(n, n), relevance=None, evidence=None, log_prob=scores,
        agreement=torch.zeros(n, 1), raw_range=torch.zeros(n, 2), residual=scores, degenerate=scores.bool(),
        config=AttributionConfig(scales=(1.0,)), grids=(((1, 1, 1),),), extents=((0.0, 0.0, 1.0, 1.0),),
    )  # fmt: skip


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(a|a?)+$", r"^(\w+\s?)*$", r"(.*a){20}$"])
def test_a_catastrophic_pattern_ends(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_PATTERN_S", 0.5)
    began_s = time.monotonic()
    with pytest.raises((InputError, PhraseError)):
        said("a" * 60 + "!").find(pattern)
    assert time.monotonic() - began_s < 20


def test_a_pattern_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_PATTERN_S", 0.2)
    with pytest.raises(InputError, match=r"takes longer than 0.2 s on a response of 301 characters"):
        said("a" * 300 + "!").find(r"(.*)(.*)(.*)(.*)\1\2\3[bc]$")


@given(
    text=st.text("ab 1\n", min_size=1, max_size=30),
    pattern=st.sampled_from([r"a+b", r"\d+", r"\bb", r"(?m)^a.*$", r"[^a]"]),
)
def test_patterns_find_what_the_standard_library_finds(text: str, pattern: str) -> None:
    expected = tuple(match.span() for match in re.finditer(pattern, text) if match.group())
    if expected:
        assert said(text).find(pattern).spans == expected
    else:
        with pytest.raises(PhraseError):
            said(text).find(pattern)


def test_a_caption_takes_no_longer_for_a_longer_token(tmp_path: Path) -> None:
    began_s = time.monotonic()
    said("x" * 1_000_000, "\x1b\u202e" * 1000).to_png(tmp_path / "a.png")
    assert time.monotonic() - began_s < 10
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width < 4000
