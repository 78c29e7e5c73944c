"""Other ways to ask which part of a picture a token comes from, each a function from a case and targets to maps.

A map is larger where the picture speaks for the token. Gradient rivals differentiate what the decoder says by the image
tokens that enter it; perturbation rivals hide cells of the image tokens' grid in middle grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients
from torch import Tensor

from benchmarks.rival_model import (
    BATCH,
    Case,
    Reading,
    blanked,
    decode,
    eager_attention,
    image_embeddings,
    log_probs_of_pixels,
    read,
    relevance_rules,
    target_log_probs,
    target_logits,
)
from fastattr.evaluate import method_of
from fastattr.pipeline import explain_readings, read_states
from fastattr.types import AttributionConfig

Explain = Callable[[Case, Sequence[int]], Tensor]  # maps [target h w] of the targets asked for

OWN = ("lens", "tam", "arc@1", "arc", "lens@1+1.5+2", "best")  # see `method_of`
LAST_LAYERS = 2
IG_STEPS = 20
SEARCH_BUDGET = 4
SEARCH_CANDIDATES = 10


@dataclass(frozen=True)
class Rival:
    """One method and how it is asked.

    Attributes:
        kind: `fastattr`, `attention`, `gradient` or `perturbation`.
        explain: what makes its maps.
        every_token: it explains all tokens of a response for the price of one, so it is asked for all of them.
    """

    name: str
    kind: str
    explain: Explain
    every_token: bool

    @property
    def normalised(self) -> bool:
        """Its maps come in [0, 1], normalised together with what the text scores; the others know the image alone."""
        return self.kind == "fastattr"


def own_maps(config: AttributionConfig, case: Case, targets: Sequence[int]) -> Tensor:
    """The maps of fastattr, `[target h w]` in [0, 1] on the grid of its largest scale."""
    config = config.resolve(case.model.scales, case.model.head.vocab)
    readings = [
        read_states(case.model, [case.visual], case.prompt, case.response_ids, scale=scale, layer=config.layer)
        for scale in config.known_scales
    ]
    return explain_readings(case.model, [case.visual], case.prompt, readings, config).image[0][list(targets), 0]


# --- attention -------------------------------------------------------------------------------------


@torch.no_grad()
def attention(case: Case, targets: Sequence[int]) -> Tensor:
    """Where the position that predicts the token looks in the last `LAST_LAYERS` layers, mean over heads."""
    reading = read(case)
    weights = _attentions(reading, image_embeddings(reading)[None])[-LAST_LAYERS:]
    return _from_predictors(reading, weights.mean(dim=(0, 1)), targets)


@torch.no_grad()
def attention_rollout(case: Case, targets: Sequence[int]) -> Tensor:
    """Attention followed down all layers of the decoder: see `rollout`."""
    reading = read(case)
    weights = _attentions(reading, image_embeddings(reading)[None])
    return _from_predictors(reading, rollout(weights.mean(dim=1)), targets)


def rollout(weights: Tensor) -> Tensor:
    """Share of every position's last state that comes from each position that entered (arXiv 2005.00928, section 3).

    Half of a layer's output is taken to be its residual connection.

    Args:
        weights: `[layer seq seq]`, first layer first; rows sum to 1.

    Returns:
        `[seq seq]`, rows sum to 1.
    """
    share = torch.eye(weights.shape[-1])
    for layer in weights:
        share = (0.5 * layer + 0.5 * torch.eye(len(layer))) @ share
    return share


def _attentions(reading: Reading, image: Tensor) -> Tensor:
    """`[layer head seq seq]` of one version of the image embeddings."""
    with eager_attention(reading.hf_model):
        return torch.cat(decode(reading, image, output_attentions=True).attentions)


def _from_predictors(reading: Reading, weights: Tensor, targets: Sequence[int]) -> Tensor:
    """Maps `[target h w]` from what every position has to do with every other, `[seq seq]`."""
    predictors = reading.predictors[list(targets)]
    return weights[predictors][:, reading.image_positions].unflatten(1, reading.grid)


# --- gradients -------------------------------------------------------------------------------------


def gradient_x_attention(case: Case, targets: Sequence[int]) -> Tensor:
    """Attention of the last `LAST_LAYERS` layers times how the token's log-probability depends on it (nats).

    The product is cut at 0 and averaged over heads, as arXiv 2103.15679 (equation 5) does in each layer; only what the
    predicting position looks at is kept.
    """
    reading = read(case)
    image = image_embeddings(reading)[None].requires_grad_()
    with eager_attention(reading.hf_model):
        output = decode(reading, image, output_attentions=True)
    weights = output.attentions[-LAST_LAYERS:]
    maps = []
    for target, gradients in _gradients(reading, output, targets, weights):
        relevance = torch.cat([(g * w).relu() for g, w in zip(gradients, weights, strict=True)]).mean(dim=(0, 1))
        maps.append(_from_predictors(reading, relevance.detach(), [target])[0])
    return torch.stack(maps)


def grad_cam(case: Case, targets: Sequence[int]) -> Tensor:
    """Image states weighted by the mean gradient of their channel over the image (arXiv 1610.02391), cut at 0.

    The states are those that enter the last `LAST_LAYERS` layers; what leaves the last one at an image position
    is read by nobody.
    """
    return _cam(case, targets, lambda gradient: gradient.mean(dim=0, keepdim=True))


def gradient_x_activation(case: Case, targets: Sequence[int]) -> Tensor:
    """As `grad_cam`, with every position's own gradient in place of the mean (HiResCAM, arXiv 2011.08891)."""
    return _cam(case, targets, lambda gradient: gradient)


def _cam(case: Case, targets: Sequence[int], weigh: Callable[[Tensor], Tensor]) -> Tensor:
    reading = read(case)
    image = image_embeddings(reading)[None].requires_grad_()
    output = decode(reading, image, output_hidden_states=True)
    entering = output.hidden_states[-1 - LAST_LAYERS : -1]
    at = reading.image_positions
    maps = []
    for _, gradients in _gradients(reading, output, targets, entering):
        layers = [(states[0, at] * weigh(g[0, at])).sum(-1) for states, g in zip(entering, gradients, strict=True)]
        maps.append(torch.stack(layers).sum(0).relu().detach().unflatten(0, reading.grid))
    return torch.stack(maps)


def _gradients(
    reading: Reading, output: Any, targets: Sequence[int], inner: Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each target and the gradients of its log-probability by the `inner` tensors: one backward a target."""
    log_probs = target_log_probs(reading, output.last_hidden_state)[0]
    for target in targets:
        yield target, torch.autograd.grad(log_probs[target], list(inner), retain_graph=True)


def input_x_gradient(case: Case, targets: Sequence[int]) -> Tensor:
    """Image embeddings times the gradient of the token's log-probability, summed over channels (nats)."""
    reading = read(case)
    image = image_embeddings(reading).repeat(len(targets), 1, 1).requires_grad_()
    relevance = InputXGradient(_of_embeddings(reading)).attribute(image, target=list(targets))
    return relevance.detach().sum(-1).unflatten(1, reading.grid)


def integrated_gradients(case: Case, targets: Sequence[int]) -> Tensor:
    """Gradients along `IG_STEPS` points from the grey picture's embeddings to the picture's (arXiv 1703.01365).

    With enough points a token's map sums to its log-probability less that with the grey picture's embeddings (nats);
    with these it can miss several nats where the token is all but certain on most of the way.
    """
    reading = read(case)
    image, grey = (image_embeddings(each)[None] for each in (reading, read(blanked(case))))
    method = IntegratedGradients(_of_embeddings(reading))
    maps = [method.attribute(image, grey, target=target, n_steps=IG_STEPS) for target in targets]
    return torch.cat(maps).detach().sum(-1).unflatten(1, reading.grid)


def attn_lrp(case: Case, targets: Sequence[int]) -> Tensor:
    """Relevance of the image embeddings for the token's logit: see `relevance_rules`."""
    reading = read(case)
    image = image_embeddings(reading)[None].requires_grad_()
    with relevance_rules(reading.hf_model):
        logits = target_logits(reading, decode(reading, image).last_hidden_state)[0]
    gradients = [torch.autograd.grad(logits[target], image, retain_graph=True)[0] for target in targets]
    return (torch.cat(gradients) * image).sum(-1).detach().unflatten(1, reading.grid)


def _of_embeddings(reading: Reading) -> Callable[[Tensor], Tensor]:
    """From image embeddings `[version image dim]` to log-probabilities `[version target]`."""
    return lambda image: target_log_probs(reading, decode(reading, image).last_hidden_state)


# --- perturbation ----------------------------------------------------------------------------------


def feature_ablation(case: Case, targets: Sequence[int]) -> Tensor:
    """What hiding each cell takes from the token's log-probability (nats); one version serves all tokens."""
    reading = read(case)
    loss = FeatureAblation(partial(log_probs_of_pixels, reading)).attribute(
        reading.pixels,
        read(blanked(case)).pixels,
        feature_mask=_cells(reading)[None, None],
        perturbations_per_eval=BATCH,
    )
    return _per_cell(reading, loss[list(targets)])


def greedy_regions(case: Case, targets: Sequence[int]) -> Tensor:
    """The cells that `greedy_search` takes, in its order, above all others by their score alone."""
    reading, grey = read(case), read(blanked(case)).pixels
    cells = _cells(reading)

    def score(visible: Tensor) -> Tensor:
        shown = torch.where(visible[:, None, cells], reading.pixels, grey)
        return log_probs_of_pixels(reading, shown)[:, list(targets)]

    h, w = reading.grid
    return greedy_search(score, h * w, SEARCH_BUDGET, SEARCH_CANDIDATES).unflatten(1, reading.grid)


def greedy_search(score: Callable[[Tensor], Tensor], n_cells: int, budget: int, candidates: int) -> Tensor:
    """Choose cells one after the other so that the words need them and nothing but them.

    The worth of a set of cells is `log p(word | only they are shown) - log p(word | they are hidden)`, in nats. Every
    cell is tried alone; from then on only the `candidates` that were worth most alone.

    Args:
        score: from visible cells, bool `[version cell]`, to log-probabilities `[version word]`; a version that several
            words ask for in one step is read once.
        budget: cells to choose for each word, at most `candidates`.

    Returns:
        `[word cell]`: for the chosen `1 + budget` down to 2, for the others their worth alone stretched to [0, 1].
    """
    single = torch.eye(n_cells, dtype=torch.bool)
    alone = _worth(score, single[None])[0].T  # [word cell]
    words = torch.arange(len(alone))
    best = alone.topk(candidates, dim=1).indices  # [word candidate]
    taken = single[best[:, 0]]
    low, high = alone.aminmax(dim=1, keepdim=True)
    heat = (alone - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    heat[words, best[:, 0]] = 1.0 + budget
    for rank in range(budget - 1, 0, -1):
        tried = taken[:, None] | single[best]  # [word candidate cell]
        worth = _worth(score, tried)[words, :, words]  # [word candidate]
        worth[taken.gather(1, best)] = -torch.inf
        chosen = best[words, worth.argmax(dim=1)]
        taken[words, chosen] = True
        heat[words, chosen] = 1.0 + rank
    return heat


def _worth(score: Callable[[Tensor], Tensor], sets: Tensor) -> Tensor:
    """`[... word]` of sets of cells, bool `[... cell]`."""
    versions, which = torch.stack([sets, ~sets]).flatten(0, -2).unique(dim=0, return_inverse=True)
    only, without = score(versions)[which].unflatten(0, (2, *sets.shape[:-1]))
    return only - without


def _cells(reading: Reading) -> Tensor:
    """int64 `[H W]`: the number of the cell that each pixel of the model's picture is in, row by row."""
    h, w = reading.grid
    height, width = reading.pixels.shape[-2:]
    rows, columns = torch.arange(height) * h // height, torch.arange(width) * w // width
    return rows[:, None] * w + columns


def _per_cell(reading: Reading, relevance: Tensor) -> Tensor:
    """`[target h w]` from `[target channel H W]` that is constant over cells."""
    h, w = reading.grid
    height, width = relevance.shape[-2:]
    return relevance[:, 0, :: height // h, :: width // w]


# --- all of them -----------------------------------------------------------------------------------

RIVALS = (
    *(Rival(f"fastattr {name}", "fastattr", partial(own_maps, method_of(name)), True) for name in OWN),
    Rival("attention", "attention", attention, True),
    Rival("attention rollout", "attention", attention_rollout, True),
    Rival("gradient x attention", "gradient", gradient_x_attention, False),
    Rival("Grad-CAM", "gradient", grad_cam, False),
    Rival("gradient x activation", "gradient", gradient_x_activation, False),
    Rival("input x gradient", "gradient", input_x_gradient, False),
    Rival("integrated gradients", "gradient", integrated_gradients, False),
    Rival("AttnLRP (our own form)", "gradient", attn_lrp, False),
    Rival("feature ablation", "perturbation", feature_ablation, True),
    Rival("greedy region search", "perturbation", greedy_regions, False),
)
