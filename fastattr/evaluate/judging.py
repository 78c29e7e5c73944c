"""One sample through everything: its maps by every method, against masks, against the model, against the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastattr.adapters import Model, check_model, encode, encode_response, generate, log_probs_of_images
from fastattr.config import AnyConfig, configure
from fastattr.datasets import Mention, Sample
from fastattr.descriptors import describe_maps
from fastattr.evaluate.judgement import Hiding, Judgement, Said
from fastattr.images import Visual
from fastattr.maps import log_probs
from fastattr.method import explain_states
from fastattr.metrics import Noun, plausibility
from fastattr.metrics.faithfulness import Fill, cut_picture, faithfulness, map_order, mask_order, random_order
from fastattr.pipeline import read_states, regional_evidence, weigh_maps
from fastattr.text import TokenText, decode_tokens
from fastattr.types import AttributionConfig, Box, Grid, ScaleStates, TokenMaps

RANDOM, MASK = "random", "mask"  # orders of patches beside those of the methods


@dataclass(frozen=True)
class Settings:
    """How samples are judged.

    Attributes:
        methods: configurations, or names of them, by their name in the results. Their `evidence` is ignored: it is
            measured once for all methods.
        words: words a sample that are judged by hiding patches, drawn at random; 0 leaves faithfulness out.
        steps: equal shares of the patches, see `deletion`.
        fill: what stands where a patch is hidden, see `cut_picture`.
        max_new_tokens: longest answer where the model answers by itself.
        seed: together with the sample's id decides the words and the random order.
    """

    methods: Mapping[str, AnyConfig]
    words: int = 1
    steps: int = 10
    fill: Fill = "grey"
    max_new_tokens: int = 256
    seed: int = 0

    @property
    def configs(self) -> dict[str, AttributionConfig]:
        """The methods as configurations. Raises `InputError`."""
        return {name: replace(configure(config), evidence=False) for name, config in self.methods.items()}


@torch.no_grad()
def judge(model: Model, sample: Sample, settings: Settings) -> Judgement:
    """Explain a sample's response by every method and judge the maps.

    States are read once for each scale and layer and shared by the methods.

    Raises:
        FastattrError: the sample cannot be explained; it is the sample's fault, not the caller's, so a run may go on.
    """
    check_model(model)
    visual = Visual((sample.image,))
    if sample.response is None:
        encoded = encode(model, [visual], sample.prompt)
        response_ids = generate(model, encoded, max_new_tokens=settings.max_new_tokens)
    else:
        response_ids = encode_response(model, sample.response)
    text = decode_tokens(response_ids.tolist(), model.decode)
    mentions = [mention for mention in sample.mentions(text.text) if tokens_at(text, mention.span)]
    functions = [tokens_at(text, span) for span in sample.functions(text.text)]

    @cache
    def states(scale: float, layer: int) -> ScaleStates:
        return read_states(model, [visual], sample.prompt, response_ids, scale=scale, layer=layer)

    @cache
    def falls(n: int) -> tuple[Tensor, ...]:
        return regional_evidence(model, [visual], sample.prompt, states(1.0, -1), n)

    explained = {}
    for name, given in settings.configs.items():
        config = given.resolve(model.scales, model.head.vocab)
        maps = explain_states([states(scale, config.layer) for scale in config.known_scales], model.head, config)
        explained[name] = weigh_maps(maps, falls(config.regions)) if config.regions else maps
    extent = states(1.0, -1).layout.images[0].extent
    nouns = [Noun(tokens_at(text, each.span), crop(each.mask, extent)) for each in mentions if each.mask is not None]
    blanked = read_states(model, [visual.blank()], sample.prompt, response_ids)
    own = log_probs(states(1.0, -1), model.head).cpu()
    return Judgement(
        id=sample.id,
        response=text.text,
        n_tokens=len(response_ids),
        plausibility={name: plausibility(maps.image[0][:, 0], nouns, functions) for name, maps in explained.items()},
        hidings=tuple(_hide(model, sample, visual, extent, response_ids, text, mentions, explained, settings)),
        said=tuple(_said(text, mentions, explained, own, own - log_probs(blanked, model.head).cpu())),
    )


def tokens_at(text: TokenText, span: tuple[int, int]) -> tuple[int, ...]:
    """Tokens that wrote any of the characters of a half-open range."""
    return tuple(t for t, (start, stop) in enumerate(text.spans) if start < span[1] and stop > span[0])


def crop(mask: np.ndarray, extent: Box) -> np.ndarray:
    """The part of a mask that the maps cover; all of it unless the processor crops."""
    height, width = mask.shape
    left, top, right, bottom = (round(share * side) for share, side in zip(extent, (width, height) * 2, strict=True))
    return mask[top:bottom, left:right]


def _hide(
    model: Model,
    sample: Sample,
    visual: Visual,
    extent: Box,
    response_ids: Tensor,
    text: TokenText,
    mentions: Sequence[Mention],
    explained: Mapping[str, TokenMaps],
    settings: Settings,
) -> Iterable[Hiding]:
    """Judge some words by every method's order of patches, on the finest grid of any method."""
    visible = [mention for mention in mentions if mention.mask is not None and mention.mask.any()]
    rng = np.random.default_rng([settings.seed, *sample.id.encode()])
    drawn = rng.permutation(len(visible))[: settings.words]
    if not len(drawn):
        return
    t, h, w = max((maps.image[0].shape[1:] for maps in explained.values()), key=lambda shape: shape[1] * shape[2])
    grid = (t, h, w)
    patches = cut_picture(visual, grid, extent, fill=settings.fill)
    cases: list[tuple[str, Mention, Tensor]] = []
    for mention in (visible[index] for index in sorted(drawn)):
        targets = list(tokens_at(text, mention.span))
        cases.append((RANDOM, mention, random_order(len(patches), int(rng.integers(2**32)))))
        cases.append((MASK, mention, mask_order(patches, mention.mask)))
        for name, maps in explained.items():
            cases.append((name, mention, map_order(on_grid(maps.image[0][targets].amax(0), grid))))

    def score(versions: Iterable[Visual]) -> Tensor:
        return log_probs_of_images(model, ([version] for version in versions), sample.prompt, response_ids)

    judged = faithfulness(
        score,
        patches,
        [order for _, _, order in cases],
        [tokens_at(text, mention.span) for _, mention, _ in cases],
        steps=settings.steps,
    )
    for i, (order, mention, _) in enumerate(cases):
        yield Hiding(
            order=order,
            word=text.text[slice(*mention.span)],
            kind=mention.kind,
            deletion=tuple(judged.deletion.prob[i].tolist()),
            insertion=tuple(judged.insertion.prob[i].tolist()),
            deletion_auc=float(judged.deletion.auc[i]),
            insertion_auc=float(judged.insertion.auc[i]),
            sufficiency=float(judged.sufficiency[i]),
            necessity=float(judged.necessity[i]),
        )


def on_grid(heat: Tensor, grid: Grid) -> Tensor:
    """A map `[t h w]` on another grid, bilinear."""
    if heat.shape == tuple(grid):
        return heat
    return F.interpolate(heat[:, None], size=tuple(grid[1:]), mode="bilinear", align_corners=False)[:, 0]


def _said(
    text: TokenText,
    mentions: Sequence[Mention],
    explained: Mapping[str, TokenMaps],
    log_prob: Tensor,
    evidence: Tensor,
) -> Iterable[Said]:
    described = {name: vars(describe_maps(maps.image, maps.context)) for name, maps in explained.items()}
    for mention in mentions:
        targets = list(tokens_at(text, mention.span))
        yield Said(
            word=text.text[slice(*mention.span)],
            kind=mention.kind,
            true=mention.true,
            position=targets[0],
            log_prob=float(log_prob[targets].sum()),
            evidence=float(evidence[targets].sum()),
            agreement=min(float(maps.agreement[targets].min()) for maps in explained.values()),
            descriptors={
                name: {key: float(values[targets].mean()) for key, values in each.items()}
                for name, each in described.items()
            },
        )
