"""All knowledge of particular models. The only place that imports transformers.

`load` and `wrap` give a `Model`; `encode` turns pictures and text into a layout; `replay` and
`capture` read hidden states.
"""

from fastattr.adapters.buffer import StateBuffer
from fastattr.adapters.capturing import CapturedStates, capture, captured_reading
from fastattr.adapters.content import model_content
from fastattr.adapters.decoding import Decoder, Rows
from fastattr.adapters.encode import EncodedExample, encode, encode_response, encode_scales
from fastattr.adapters.exports import ExportedStates, read_sglang, read_vllm
from fastattr.adapters.families import (
    FAMILIES,
    REASONS,
    Family,
    Look,
    Looks,
    Shown,
    register_adapter,
    registered_family,
    registered_types,
)
from fastattr.adapters.model import Model, hide_loading_bars, load, wrap
from fastattr.adapters.states import generate, log_probs_of_images, replay, replay_batch

__all__ = [
    "FAMILIES",
    "REASONS",
    "CapturedStates",
    "Decoder",
    "EncodedExample",
    "ExportedStates",
    "Family",
    "Look",
    "Looks",
    "Model",
    "Rows",
    "Shown",
    "StateBuffer",
    "capture",
    "captured_reading",
    "encode",
    "encode_response",
    "encode_scales",
    "generate",
    "hide_loading_bars",
    "load",
    "log_probs_of_images",
    "model_content",
    "read_sglang",
    "read_vllm",
    "register_adapter",
    "registered_family",
    "registered_types",
    "replay",
    "replay_batch",
    "wrap",
]
