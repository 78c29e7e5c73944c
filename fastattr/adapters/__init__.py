"""All knowledge of particular models. The only place that imports transformers.

`load` and `wrap` give a `Model`; `encode` turns pictures and text into a layout; `replay` and
`capture` read hidden states.
"""

from fastattr.adapters.buffer import StateBuffer
from fastattr.adapters.capturing import CapturedStates, capture, captured_reading
from fastattr.adapters.content import model_content
from fastattr.adapters.decoding import Decoder, Rows
from fastattr.adapters.encode import EncodedExample, check_prompt, encode, encode_response, encode_scales
from fastattr.adapters.ending import EndTokens, end_tokens
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
from fastattr.adapters.generating import generate, generate_steps
from fastattr.adapters.live import acting
from fastattr.adapters.model import Model, check_model, explaining, hide_loading_bars, load, wrap
from fastattr.adapters.states import log_probs_of_images, replay, replay_batch
from fastattr.adapters.wording import template_notes

__all__ = [
    "FAMILIES",
    "REASONS",
    "CapturedStates",
    "Decoder",
    "EncodedExample",
    "EndTokens",
    "ExportedStates",
    "Family",
    "Look",
    "Looks",
    "Model",
    "Rows",
    "Shown",
    "StateBuffer",
    "acting",
    "capture",
    "captured_reading",
    "check_model",
    "check_prompt",
    "encode",
    "encode_response",
    "encode_scales",
    "end_tokens",
    "explaining",
    "generate",
    "generate_steps",
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
    "template_notes",
    "wrap",
]
