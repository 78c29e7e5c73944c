"""A request to its attribution, with the model's help where it is needed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fastattr.errors import InputError
from fastattr.log.config import LogConfig
from fastattr.log.requests import Captured, Made, Request, digest, to_png
from fastattr.pipeline import attribute, attribute_captured
from fastattr.types import Attribution, AttributionConfig

if TYPE_CHECKING:
    from fastattr.adapters import Model

_CAPTURED_OPTIONS = ("method", "top_k", "rbo_p", "arc_weight", "context", "filter", "backend")


@dataclass(frozen=True, eq=False)
class Explained:
    """An attribution, and its pictures as the configuration keeps them.

    Attributes:
        image_sha256: one for each picture, or None where they are masked.
        images: PNG of each picture's first frame, or None where they are not kept.
        mismatch: whether captured states had to be read again.
    """

    why: Attribution
    image_sha256: tuple[str, ...] | None
    images: tuple[bytes, ...] | None
    mismatch: bool


def explain(request: Request, config: LogConfig, model: Model | None) -> Explained:
    """Explain one request.

    Args:
        model: reads replays; captured states bring their own.

    Raises:
        InputError: there is no model for a replay, or it holds no image.
        FastattrError: as `attribute` and `attribute_captured`.
    """
    images = request.submission.images
    why = _attribution(request, list(images), config, model)
    mismatch = isinstance(request.job, Captured) and why.source == "replay"
    hashes = None if config.images == "none" else request.image_sha256 or tuple(digest(image) for image in images)
    kept = tuple(to_png(frames[0]) for frames in why.pictures) if config.images == "store" else None
    return Explained(why, hashes, kept, mismatch)


def _attribution(request: Request, images: list[object], config: LogConfig, model: Model | None) -> Attribution:
    job, prompt = request.job, request.submission.prompt
    if isinstance(job, Made):
        return job.why
    wanted = config.attribution
    if isinstance(job, Captured):
        return attribute_captured(
            job.states,
            job.out,
            image=images or None,
            prompt=prompt,
            evidence=wanted.evidence and bool(images),
            **{name: getattr(wanted, name) for name in _CAPTURED_OPTIONS},
        )
    if model is None:
        raise InputError(
            "a replay needs a model: pass model= to the logger, or explain='worker' and run fastattr worker"
        )
    if not images or prompt is None:
        raise InputError(
            f"a replay holds {len(images)} images and {'no ' if prompt is None else 'a '}prompt, expected both"
        )
    options = {each.name: getattr(wanted, each.name) for each in fields(AttributionConfig) if each.name != "compat"}
    return attribute(model, images, prompt, list(job.response_ids), prompt_ids=job.prompt_ids, **options)
