"""Other ways to the states of a model than one forward of one picture: a batch of several, and a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.family_models import ANSWER, PROMPT


def prove_other_ways(model: fastattr.Model, pictures: Sequence[Any]) -> None:
    """Each gives what `replay` gives of every picture alone."""
    examples = [adapters.encode(model, read_visuals(each), PROMPT) for each in pictures]
    response = adapters.encode_response(model, ANSWER)
    responses = [response[: 3 + i] for i in range(len(pictures))]  # of different lengths
    alone = [adapters.replay(model, each, said) for each, said in zip(examples, responses, strict=True)]
    for one, other in zip(adapters.replay_batch(model, examples, responses), alone, strict=True):
        torch.testing.assert_close(one.hidden_states, other.hidden_states, rtol=1e-3, atol=1e-3)
    for example, said, expected in zip(examples, responses, alone, strict=True):
        decoder = adapters.Decoder(model, example)
        for token_id in said[:-1].tolist():
            decoder.feed(token_id)
        torch.testing.assert_close(decoder.hidden_states, expected.hidden_states, rtol=1e-3, atol=1e-3)


def prove_batch_of_attributions(model: fastattr.Model, pictures: Sequence[Any]) -> None:
    """Maps and evidence of a batch are those of every picture alone."""
    asked = [(each, PROMPT, ANSWER) for each in pictures]
    together = fastattr.attribute_batch(model, asked, fastattr.AttributionConfig(scales=(1.0,)))
    for why, each in zip(together, asked, strict=True):
        alone = fastattr.attribute(model, *each, scales=(1.0,))
        torch.testing.assert_close(why.image[0], alone.image[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(why.evidence, alone.evidence, rtol=1e-3, atol=1e-3)
