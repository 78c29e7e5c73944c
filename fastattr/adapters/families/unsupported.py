"""Models whose form leaves nothing to map onto, or not yet, and why."""

from __future__ import annotations

from collections.abc import Mapping

_QUERIES = (
    "{} reads the image into learned queries, each of which looks at all of it, so that image tokens have no place on the "
    "picture; its attention over the patches would be needed"
)

_CROSSED = (
    "its image is read by cross-attention layers and has no tokens in the sequence, so there are no hidden states of image "
    "positions to read; the attention of those layers would be needed"
)
_ENCODER = (
    "it is an encoder with a decoder: the image is in the encoder, and the decoder that says the words has no image positions "
    "whose hidden states could be read; its cross-attention would be needed"
)

_SPEAKING = (
    "it is a thinker, which sees and says words, and models that speak them aloud; the thinker alone would be needed: "
    "wrap(hf_model.thinker, processor)"
)

REASONS: Mapping[str, str] = {
    "mllama": _CROSSED,
    "blip": _CROSSED,
    "blip-2": _QUERIES.format("a Q-Former"),
    "instructblip": _QUERIES.format("a Q-Former"),
    "instructblipvideo": _QUERIES.format("a Q-Former"),
    "aria": _QUERIES.format("its projector"),
    "florence2": _ENCODER,
    "git": (
        "its image tokens are put before the text inside the model and have no placeholders in input_ids, so they cannot be "
        "found; their hidden states can be explained with attribute_states"
    ),
    "chameleon": (
        "its image is made of words of the vocabulary that its output head forbids, so its logits are not hidden states "
        "times output embeddings; a head that says which ids it forbids would be needed"
    ),
    "fuyu": (
        "its image goes into the decoder as bare patches and its processor has no chat; an adapter that says how the patches "
        "lie and a processor with a chat template would be needed (register_adapter, wrap)"
    ),
    "emu3": (
        "its image is made of words of the vocabulary that the model finds by itself; nobody has proven yet how they lie on "
        "the picture, and an adapter that says so would be needed (register_adapter)"
    ),
    "idefics": _CROSSED,
    "idefics2": _QUERIES.format("its perceiver resampler"),
    "kosmos-2": _QUERIES.format("its image-to-text projection"),
    "kosmos-2.5": _QUERIES.format("its image-to-text projection"),
    "deepseek_ocr2": _QUERIES.format("its encoder"),
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
    "diffusion_gemma": (
        "it writes many tokens at once by denoising them, so no token is predicted from the state before it, which is what is "
        "read here; states of its denoising steps and what they mean would be needed"
    ),
    "qwen2_5_omni": _SPEAKING,
    "qwen3_omni_moe": _SPEAKING,
    "glm5_next": (
        "its processor shrinks and pads pictures to a number of tokens, and nobody has proven yet where they then lie on the "
        "picture; an adapter that says so would be needed (register_adapter)"
    ),
    "evolla": "it reads proteins, not pictures, so there is nothing to map onto",
    "pi0": "it says actions of a robot, which are numbers, so there are no words whose output embeddings could be read",
}
