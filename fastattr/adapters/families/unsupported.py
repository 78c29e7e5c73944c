"""Models whose form leaves nothing to map onto, or not yet, and why."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "mllama": (
        "its image is read by cross-attention layers and has no tokens in the sequence, so there are no hidden states of "
        "image positions to read"
    ),
}
