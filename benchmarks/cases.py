"""States of a made-up model, of any size, to compute the method from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattr.types import OutputHead, ScaleStates, TokenLayout


@dataclass(frozen=True)
class Case:
    """A response to one image at one or more scales; by default a long description.

    Attributes:
        edge: tokens along each edge of the image at scale 1.
    """

    n_targets: int = 512
    n_prompt: int = 30
    edge: int = 24
    dim: int = 256
    vocab: int = 2048
    scales: tuple[float, ...] = (1.0,)
    seed: int = 0

    @property
    def n_image(self) -> int:
        return self.edge**2

    def states(self) -> tuple[list[ScaleStates], OutputHead]:
        """States of every scale, and the output embeddings.

        Values are multiples of a power of two, so that products are exact in float32 whatever their order: all
        sides then rank alike, and where their maps differ it is not by luck.
        """
        rng = torch.Generator().manual_seed(self.seed)
        # a shared direction makes neighbours predict alike, as they do in a real model
        shared = torch.randn(self.dim, generator=rng)
        weight = on_steps(torch.randn(self.vocab, self.dim, generator=rng) / self.dim**0.5, 2**-6)
        text = torch.randint(self.vocab, (self.n_prompt + self.n_targets,), generator=rng)
        readings = []
        for scale in self.scales:
            side = round(self.edge * scale)
            start = side**2 + self.n_prompt
            stop = start + self.n_targets
            hidden = on_steps(torch.randn(stop - 1, self.dim, generator=rng) + shared, 2**-4)
            ids = torch.cat([torch.zeros(side**2, dtype=torch.int64), text])
            layout = TokenLayout.from_spans(
                images=[(0, side**2, (1, side, side))], prompt=[(side**2, start)], response=(start, stop)
            )
            readings.append(ScaleStates(hidden, ids, layout, scale))
        return readings, OutputHead(weight)


def on_steps(values: Tensor, step: float) -> Tensor:
    """Round to multiples of `step`."""
    return values.div_(step).round_().mul_(step)
