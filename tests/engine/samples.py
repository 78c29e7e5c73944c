"""Small attributions built by hand, for tests of what comes after the method."""

from __future__ import annotations

import numpy as np
import torch

from fastattr import Attribution, AttributionConfig
from fastattr.demo import scenes


def make_attribution(
    words: tuple[str, ...] = ("A", " red", " circle", " and", " a", " red", " circle", "."),
    *,
    grids: tuple[tuple[int, int, int], ...] = ((1, 4, 6),),
    pictures: bool = True,
    evidence: bool = True,
    seed: int = 0,
) -> Attribution:
    """An attribution of `words` with random maps, one image of 64 x 96 pixels for each grid."""
    generator = torch.Generator().manual_seed(seed)
    n, n_context = len(words), 2 + len(words)
    ends = np.cumsum([len(word) for word in words]).tolist()
    shown = np.asarray(scenes.make_scene(seed, 64, 96).image)
    return Attribution(
        response="".join(words),
        tokens=words,
        token_ids=tuple(range(n)),
        spans=tuple(zip([0, *ends[:-1]], ends, strict=True)),
        context_tokens=("What", "?", *words),
        image=tuple(torch.rand(n, *grid, generator=generator) for grid in grids),
        context=torch.rand(n, n_context, generator=generator),
        relevance=torch.rand(n, n_context, generator=generator),
        evidence=torch.randn(n, generator=generator) if evidence else None,
        log_prob=-torch.rand(n, generator=generator),
        agreement=torch.ones(n, 2),
        raw_range=torch.rand(n, 2, generator=generator),
        residual=torch.rand(n, generator=generator),
        degenerate=torch.zeros(n, dtype=torch.bool),
        config=AttributionConfig(scales=(1.0, 2.0), scale_weights=(0.25, 0.75)),
        grids=(grids, grids),
        extents=tuple((0.0, 0.0, 1.0, 1.0) for _ in grids),
        pictures=tuple(np.stack([shown] * grid[0]) for grid in grids) if pictures else (),
        picture_sizes=tuple((64, 96) for _ in grids) if pictures else (),
        prompt="What?",
        model="by hand",
        notes=("made up",),
        versions=(("fastattr", "0"),),
    )
