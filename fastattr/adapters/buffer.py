"""Memory that captures borrow and give back: bounded, and used again instead of allocated anew for every request."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastattr.errors import InputError

PAGE_ROWS = 256


class StateBuffer:
    """Pages of hidden states, shared by the captures of one process.

    States are copied into pages as they are made, on the stream that makes them, so that nothing that runs later, not
    even a captured graph that writes its outputs into the same place, can change them.

    Args:
        max_bytes: all pages together, borrowed and free.
        place: `model`, the device the states are on, or `cpu`.
        pin_memory: pages on the CPU that a GPU can write to while it computes.

    Raises:
        InputError: an argument is out of range, or memory of the model's device was to be pinned.
    """

    def __init__(
        self, max_bytes: int = 256 * 2**20, *, place: Literal["model", "cpu"] = "model", pin_memory: bool = False
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes!r}, expected a whole number of bytes of at least 1")
        if place not in ("model", "cpu"):
            raise InputError(f"place is {place!r}, expected 'model' or 'cpu'")
        if pin_memory and place != "cpu":
            raise InputError("pin_memory=True pins memory of the CPU; pass place='cpu' with it")
        self.max_bytes, self.place, self.pin_memory = max_bytes, place, pin_memory
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all pages, borrowed and free."""
        return self._held_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the pages nobody borrows now."""
        with self._lock:
            return sum(page.nbytes for page in self._free)

    def borrow(self, like: Tensor) -> Tensor | None:
        """A page `[row dim]` for states `[1 n dim]` of this kind, or None where all are taken."""
        dim, device = like.shape[-1], like.device if self.place == "model" else torch.device("cpu")
        size = PAGE_ROWS * dim * like.element_size()
        with self._lock:
            for i, page in enumerate(self._free):
                if page.shape[1] == dim and page.dtype == like.dtype and page.device == device:
                    return self._free.pop(i)
            while self._free and self._held_bytes + size > self.max_bytes:  # another model's pages make room
                self._held_bytes -= self._free.pop().nbytes
            if self._held_bytes + size > self.max_bytes:
                return None
            self._held_bytes += size
        with torch.inference_mode(False):  # it is also written to outside inference mode
            return torch.empty(PAGE_ROWS, dim, dtype=like.dtype, device=device, pin_memory=self.pin_memory)

    def give_back(self, pages: Sequence[Tensor]) -> None:
        with self._lock:
            self._free.extend(pages)

    def after_fork(self) -> None:
        """In a child process: a lock of its own. Pages borrowed by the parent's captures stay counted."""
        self._lock = threading.Lock()


class Pages:
    """What one capture has borrowed."""

    def __init__(self, buffer: StateBuffer) -> None:
        self.buffer = buffer
        self.borrowed: list[Tensor] = []
        self.n_bytes = 0
        self._used_rows = PAGE_ROWS  # of the last page

    def keep(self, states: Tensor) -> bool:
        """Copy states `[1 n dim]`; of several rows in a batch the first. False where the buffer is full."""
        done, n = 0, states.shape[1]
        while done < n:
            if self._used_rows == PAGE_ROWS:
                page = self.buffer.borrow(states)
                if page is None:
                    return False
                self.borrowed.append(page)
                self.n_bytes += page.nbytes
                self._used_rows = 0
            rows = min(n - done, PAGE_ROWS - self._used_rows)
            place = self.borrowed[-1][self._used_rows : self._used_rows + rows]
            place.copy_(states[0] if rows == n else states[0, done : done + rows], non_blocking=True)
            self._used_rows, done = self._used_rows + rows, done + rows
        return True

    @property
    def n_rows(self) -> int:
        """States kept so far."""
        return max(0, len(self.borrowed) - 1) * PAGE_ROWS + (self._used_rows if self.borrowed else 0)

    def read(self) -> Tensor:
        """All of them, `[n dim]`."""
        return torch.cat([*self.borrowed[:-1], self.borrowed[-1][: self._used_rows]])
