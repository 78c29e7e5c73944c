"""What the bundled model is shown as a demonstration. Its training knew one picture at a time and no clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastattr.demo.scenes import make_clip, make_scene

PROMPT = "Describe the image."
N_FRAMES = 6


@dataclass(frozen=True)
class Example:
    """Pictures and what is asked about them, as `fastattr.attribute` takes both."""

    images: Sequence[Any]
    prompt: str | list[Mapping[str, Any]]


def scene(seed: int = 10_000_003) -> Example:
    """One picture."""
    return Example([make_scene(seed).image], PROMPT)


def images(seed: int = 10_000_003) -> Example:
    """Three pictures over two turns; the answer to the first is given, the second asks about the other two."""
    first, *others = [make_scene(seed + k, n_objects=1) for k in range(3)]
    (item,) = first.objects
    picture, words = {"type": "image"}, {"type": "text", "text": PROMPT}
    said = {"type": "text", "text": f"A {item.full_name} is {item.where}."}
    turns = [("user", [picture, words]), ("assistant", [said]), ("user", [picture, picture, words])]
    return Example(
        [each.image for each in (first, *others)], [{"role": role, "content": content} for role, content in turns]
    )


def clip(seed: int = 10_000_009) -> Example:
    """A short clip of one object that moves from left to right."""
    return Example([[frame.image for frame in make_clip(seed, N_FRAMES)]], PROMPT)


EXAMPLES = {"scene": scene, "images": images, "clip": clip}
