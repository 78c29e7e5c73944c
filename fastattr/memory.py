"""How much memory an explanation may take: what is kept, what is computed again, and what lies on disk."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattr.errors import InputError, SaveError

# of one block of targets' maps, of which a few live at once: on a CPU they should stay in its cache
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 2**21, 2**26
CONTEXT_BLOCKS = 16  # scores of a block may take as many times that
_CHUNK_BYTES = 8  # of one context token's activations at one image token, as product and as result
_MAPS, _SCORES = 6, 8  # arrays of float32 of a block of maps, and of its scores, that live at once


@dataclass(frozen=True)
class Shape:
    """How large an explanation is.

    Attributes:
        targets, context: tokens that are explained, and tokens they are compared with.
        pixels: cells of the finished maps of one target.
        image: image tokens of all scales together.
        rankings: ids kept for each context token.
        dim: of the hidden states.
    """

    targets: int
    context: int
    pixels: int
    image: int
    rankings: int
    dim: int

    @property
    def results_bytes(self) -> int:
        """Finished maps, context and relevance."""
        return 4 * self.targets * (self.pixels + 2 * self.context)

    @property
    def lit_bytes(self) -> int:
        """What every context token lights up at every scale."""
        return 4 * self.context * self.image

    @property
    def fixed_bytes(self) -> int:
        """What grows with the length alone: states that are read, rankings and their scratch."""
        return 4 * self.context * (2 * self.dim + 6 * self.rankings + 64) + 2**26

    def block_bytes(self, targets: int) -> int:
        """What lives at once while a block of targets is worked on."""
        return 4 * targets * (_MAPS * (self.pixels + self.image) + _SCORES * self.context)


@dataclass(frozen=True)
class Plan:
    """How an explanation is cut up.

    Attributes:
        block: targets worked on together.
        chunk: context tokens whose activations are computed together and again for every block; None keeps all.
        on_disk: whether results lie in an unlinked temporary file.
    """

    block: int
    chunk: int | None
    on_disk: bool


def plan(shape: Shape, device: torch.device, limit_bytes: int | None) -> Plan:
    """Cut an explanation up so that it stays within `limit_bytes`, or for speed alone where there is no limit.

    Raises:
        InputError: the limit is less than the least it takes.
    """
    cache = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    block = max(1, min(cache // (4 * shape.pixels), CONTEXT_BLOCKS * cache // (4 * shape.context)))
    block = min(block, shape.targets)
    if limit_bytes is None:
        return Plan(_even(shape.targets, block), None, on_disk=False)
    least = shape.fixed_bytes + 2 * (shape.block_bytes(1) + _CHUNK_BYTES * shape.image)
    if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < least:
        raise InputError(
            f"memory_limit is {limit_bytes!r} bytes, expected at least {least:,}: what {shape.context:,} context tokens "
            "need however they are cut up"
        )
    free = (limit_bytes - shape.fixed_bytes) // 2  # an allocator cannot use again all that was freed
    if shape.results_bytes + 2 * shape.lit_bytes + shape.block_bytes(block) <= free:
        return Plan(_even(shape.targets, block), None, on_disk=False)
    keeps = 2 * shape.lit_bytes + shape.block_bytes(1) <= free  # twice while they are made
    left = free - 2 * shape.lit_bytes if keeps else free // 2
    block = max(1, min(block, left // shape.block_bytes(1)))
    chunk = (
        None if keeps else max(1, min(shape.context, (free - shape.block_bytes(block)) // (_CHUNK_BYTES * shape.image)))
    )
    return Plan(_even(shape.targets, block), chunk, on_disk=True)


def _even(length: int, most: int) -> int:
    """The size of as few blocks as it takes, all about the same."""
    return math.ceil(length / math.ceil(length / most))


class Disk:
    """Results that are written once and do not fit into memory: zeros of an unlinked file, mapped.

    The file lies where `tempfile` puts it (`TMPDIR`), which should not be memory itself.
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def zeros(self, *shape: int) -> Tensor:
        """float32 `shape`, with its place on the disk reserved. Raises `SaveError`."""
        size = 4 * math.prod(shape)
        try:
            with tempfile.TemporaryFile(prefix="fastattr-") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise SaveError(
                f"{size:,} bytes of results cannot be laid down in {tempfile.gettempdir()!r}: {error.strerror or error}; "
                "make room, let TMPDIR name another folder, or raise memory_limit"
            ) from error
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=torch.float32).view(shape)

    def settle(self) -> None:
        """Give up the memory of what was written; it stays in the file."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
