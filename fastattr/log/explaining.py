"""A request to its attribution, with the model's help where it is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastattr.errors import InputError
from fastattr.log.config import LogConfig
from fastattr.log.requests import Captured, Made, Request, digest, to_png
from fastattr.pipeline import attribute, attribute_captured
from fastattr.types import Attribution

if TYPE_CHECKING:
    from fastattr.adapters import Model


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
    keep = request.keep_images or config.images
    hashes = None if keep == "none" else request.image_sha256 or tuple(digest(image) for image in images)
    kept = tuple(to_png(frames[0]) for frames in why.pictures) if keep == "store" else None
    return Explained(why, hashes, kept, mismatch)


def _attribution(request: Request, images: list[object], config: LogConfig, model: Model | None) -> Attribution:
    job, prompt = request.job, request.submission.prompt
    if isinstance(job, Made):
        return job.why
    wanted = config.explained_by
    if isinstance(job, Captured):
        captured = replace(wanted, scales=(1.0,), scale_weights=None, layer=-1, regions=0)
        evidence = wanted.evidence and bool(images)
        return attribute_captured(job.states, job.out, captured, image=images or None, prompt=prompt, evidence=evidence)
    if model is None:
        raise InputError(
            "a replay needs a model: pass model= to the logger, or explain='worker' and run fastattr worker"
        )
    if not images or prompt is None:
        raise InputError(
            f"a replay holds {len(images)} images and {'no ' if prompt is None else 'a '}prompt, expected both"
        )
    return attribute(model, images, prompt, list(job.response_ids), wanted, prompt_ids=job.prompt_ids)
