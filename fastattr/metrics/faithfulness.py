"""Does the model need what a map shows? Patches of the picture are hidden or shown in the map's order (RISE, arXiv 1806.07421).

The model is a function here, `Score`, and a word is the tokens that spell it. For a model of `fastattr.load`:

    def score(versions):
        return log_probs_of_images(model, ([version] for version in versions), prompt, response_ids)

A good map beats a random order on deletion and insertion both. The reversed order shows how bad it can get, the
object's own mask how good. Orders are comparable only on one grid: finer patches, hidden at random, hurt more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm import tqdm

from fastattr.errors import InputError
from fastattr.images import Visual
from fastattr.types import WHOLE_IMAGE, Box, Grid

Fill = Literal["grey", "mean", "blur"]
Score = Callable[[Iterable[Visual]], Tensor]  # versions of one picture to log-probabilities [version target] in nats

BLUR_SHARE = 0.1  # standard deviation of the blur, of the picture's shorter side


@dataclass(frozen=True)
class Patches:
    """A picture cut by the grid of its maps, from `cut_picture`.

    Attributes:
        visual: the picture, or the frames of a video.
        hidden: the same sizes, what stands where a patch is hidden.
        grid: `(t, h, w)`; patches are numbered in row-major order.
        extent: the part of the picture the grid covers; what lies outside is never hidden.
    """

    visual: Visual
    hidden: Visual
    grid: Grid
    extent: Box

    def __len__(self) -> int:
        return math.prod(self.grid)

    @property
    def rows(self) -> np.ndarray:
        """int `[h + 1]`, where patches begin and end, in pixels from the top."""
        return _edges(self.extent[1], self.extent[3], self.grid[1], self.visual.size[0])

    @property
    def columns(self) -> np.ndarray:
        """int `[w + 1]`, in pixels from the left."""
        return _edges(self.extent[0], self.extent[2], self.grid[2], self.visual.size[1])

    def show(self, visible: Tensor) -> Visual:
        """The picture with every patch hidden that is not `visible`, bool `[patch]`."""
        rows, columns = self.rows, self.columns
        frames = []
        steps, n_frames = visible.view(self.grid).cpu().numpy(), len(self.visual.frames)
        for number, (frame, hidden) in enumerate(zip(self.visual.frames, self.hidden.frames, strict=True)):
            shown = steps[number * len(steps) // n_frames]  # several frames may share a time step
            seen = np.full(self.visual.size, 255, np.uint8)
            pixels = shown.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)
            seen[rows[0] : rows[-1], columns[0] : columns[-1]] = 255 * pixels
            frames.append(Image.composite(frame, hidden, Image.fromarray(seen)))
        return replace(self.visual, frames=tuple(frames))


@dataclass(frozen=True, eq=False)
class Curve:
    """What becomes of words as patches are hidden, or shown, in order.

    Attributes:
        share: float64 `[step + 1]` from 0 to 1, share of the patches hidden (deletion) or shown (insertion).
        log_prob: float64 `[word step + 1]` in nats.
        n_versions: different versions of the picture the model has to read for this.
    """

    share: Tensor
    log_prob: Tensor
    n_versions: int

    @property
    def prob(self) -> Tensor:
        """Probability of each word, `[word step + 1]`."""
        return self.log_prob.exp()

    @property
    def auc(self) -> Tensor:
        """Mean probability of each word along the curve, `[word]` in [0, 1].

        The area under `prob` over `share` by the trapezoid rule. The shares run from 0 to 1, so it is not divided by
        anything, neither by the picture's own probability nor by the number of steps.
        """
        return torch.trapezoid(self.prob, self.share, dim=1)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """All four judgements of the same orders.

    Attributes:
        deletion: less area is better.
        insertion: more area is better.
        sufficiency, necessity: float64 `[word]` in nats, more is better; see the functions of these names.
        n_versions: different versions of the picture the model read for all of it.
    """

    deletion: Curve
    insertion: Curve
    sufficiency: Tensor
    necessity: Tensor
    n_versions: int


# --- pictures and orders ---------------------------------------------------------------------------


def cut_picture(visual: Visual, grid: Grid, extent: Box = WHOLE_IMAGE, *, fill: Fill = "grey") -> Patches:
    """Cut a picture into the patches of a map.

    Args:
        grid: `(t, h, w)` of the map; `t` is the number of frames, or less where several frames share a time step.
        extent: see `ImageGroup.extent`.
        fill: what stands where a patch is hidden: middle grey, the frame's mean colour (which gives away its
            background), or the frame blurred by `BLUR_SHARE` of its shorter side (which leaves large things visible).

    Raises:
        InputError: the grid has more time steps than there are frames, a patch would hold no pixel, or `fill` is unknown.
    """
    if fill not in ("grey", "mean", "blur"):
        raise InputError(f"fill is {fill!r}, expected 'grey', 'mean' or 'blur'")
    if len(visual.frames) < grid[0]:
        raise InputError(
            f"the picture has {len(visual.frames)} frames but the grid (t, h, w) = {tuple(grid)} has {grid[0]} time steps; pass the "
            "picture the map was made of"
        )
    hidden = (
        visual.blank()
        if fill == "grey"
        else replace(visual, frames=tuple(_hidden(frame, fill) for frame in visual.frames))
    )
    patches = Patches(visual, hidden, (grid[0], grid[1], grid[2]), extent)
    if min(np.diff(patches.rows).min(), np.diff(patches.columns).min()) < 1:
        height, width = visual.size
        raise InputError(
            f"{width} x {height} pixels, of which the grid covers {tuple(extent)}, do not fill {grid[1]} rows of {grid[2]} "
            "patches with at least one pixel each; enlarge the picture first"
        )
    return patches


def map_order(heat: Tensor) -> Tensor:
    """Patches of a map `[h w]` or `[t h w]` from hottest to coldest, int64 `[patch]`; ties in row-major order.

    Raises:
        InputError: the map has no values, or some that are not numbers.
    """
    flat = heat.detach().flatten().cpu()
    if flat.numel() == 0 or bool(flat.isnan().any()):
        found = "NaN among its values" if flat.numel() else "no values"
        raise InputError(
            f"map_order got a map of shape {tuple(heat.shape)} with {found}, expected a number a patch; pass a map of an "
            "attribution"
        )
    return flat.argsort(descending=True, stable=True)


def mask_order(patches: Patches, mask: np.ndarray) -> Tensor:
    """The order of somebody who knows where the thing is: by the share of each patch inside its mask, most first.

    Args:
        mask: bool `[H W]` of the picture; in a video it counts for every frame.

    Returns:
        int64 `[patch]`, ties in row-major order.

    Raises:
        InputError: the mask is not bool, or not of the picture's size.
    """
    if mask.dtype != np.bool_ or mask.shape != patches.visual.size:
        raise InputError(
            f"mask_order got a mask of {mask.dtype} {mask.shape}, expected bool {patches.visual.size}, the picture's height "
            "and width"
        )
    rows, columns = patches.rows, patches.columns
    inside = mask[rows[0] : rows[-1], columns[0] : columns[-1]].astype(np.int64)
    starts = rows[:-1] - rows[0], columns[:-1] - columns[0]
    count = np.add.reduceat(np.add.reduceat(inside, starts[0], axis=0), starts[1], axis=1)
    share = count / (np.diff(rows)[:, None] * np.diff(columns))
    return map_order(torch.from_numpy(share).expand(patches.grid))


def random_order(n_patches: int, seed: int) -> Tensor:
    """int64 `[patch]`; equal seeds give equal orders."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n_patches))


def reversed_order(order: Tensor) -> Tensor:
    """The same patches from the last to the first: the worst that can be made of a map."""
    return order.flip(-1)


# --- judgements ------------------------------------------------------------------------------------


def deletion(
    score: Score, patches: Patches, orders: Sequence[Tensor], words: Sequence[Sequence[int]], *, steps: int = 10
) -> Curve:
    """Hide more and more of the patches, first ones first. A faithful order makes the words fall early.

    Args:
        score: the model; it is given every different version of the picture once, and a version that several words
            need is shared by them.
        orders: for each word its order, `[patch]`.
        words: the response tokens of each word; its log-probability is their sum.
        steps: number of equal shares, up to rounding to whole patches.

    Raises:
        InputError: orders, words or steps do not fit, or the model's scores do not.
    """
    by_word = _stack(patches, orders, words)
    counts = _counts(patches, steps)
    visible = ~_first(by_word, counts)
    return _curve(counts, _log_probs(score, patches, words, visible), visible)


def insertion(
    score: Score, patches: Patches, orders: Sequence[Tensor], words: Sequence[Sequence[int]], *, steps: int = 10
) -> Curve:
    """Show more and more patches of a hidden picture. A faithful order makes the words rise early.

    Arguments and errors as for `deletion`.
    """
    by_word = _stack(patches, orders, words)
    counts = _counts(patches, steps)
    visible = _first(by_word, counts)
    return _curve(counts, _log_probs(score, patches, words, visible), visible)


def sufficiency(
    score: Score, patches: Patches, orders: Sequence[Tensor], words: Sequence[Sequence[int]], *, top: float = 0.1
) -> Tensor:
    """`log p(first patches alone) - log p(picture)`, float64 `[word]` in nats: about 0 if they suffice, below if not.

    The same question as ERASER's sufficiency (arXiv 1911.03429), with logarithms and so that more is better.

    Args:
        top: share of the patches, rounded to at least one; the other arguments as for `deletion`.

    Raises:
        InputError: see `deletion`; or `top` is not above 0 and below 1.
    """
    by_word = _stack(patches, orders, words)
    alone, whole = _log_probs(score, patches, words, _with_whole(_first(by_word, _top(patches, top)))).unbind(1)
    return alone - whole


def necessity(
    score: Score, patches: Patches, orders: Sequence[Tensor], words: Sequence[Sequence[int]], *, top: float = 0.1
) -> Tensor:
    """`log p(picture) - log p(picture without the first patches)`, float64 `[word]` in nats: more is better.

    ERASER's comprehensiveness, with logarithms. Arguments and errors as for `sufficiency`.
    """
    by_word = _stack(patches, orders, words)
    without, whole = _log_probs(score, patches, words, _with_whole(~_first(by_word, _top(patches, top)))).unbind(1)
    return whole - without


def faithfulness(
    score: Score,
    patches: Patches,
    orders: Sequence[Tensor],
    words: Sequence[Sequence[int]],
    *,
    steps: int = 10,
    top: float = 0.1,
) -> Faithfulness:
    """All four at once, with what they share read once. Arguments and errors as for `deletion` and `sufficiency`."""
    by_word = _stack(patches, orders, words)
    counts, first = _counts(patches, steps), _first(by_word, _top(patches, top))
    inserted = _first(by_word, counts)
    visible = torch.cat([~inserted, inserted, ~first, first], dim=1)
    log_prob = _log_probs(score, patches, words, visible)
    n = len(counts)
    deleted, restored, without, alone = log_prob.split([n, n, 1, 1], dim=1)
    return Faithfulness(
        deletion=_curve(counts, deleted, ~inserted),
        insertion=_curve(counts, restored, inserted),
        sufficiency=(alone - deleted[:, :1])[:, 0],
        necessity=(deleted[:, :1] - without)[:, 0],
        n_versions=len(_distinct(visible)[0]),
    )


# --- which patches are visible ---------------------------------------------------------------------


def _first(orders: Tensor, counts: Tensor) -> Tensor:
    """bool `[word count patch]`: whether the patch is among the first `count` of the word's order."""
    place = orders.argsort(dim=1)  # of each patch in the order
    return place[:, None] < counts[:, None]


def _with_whole(visible: Tensor) -> Tensor:
    """`[word 1 patch]` with the whole picture beside it."""
    return torch.cat([visible, torch.ones_like(visible)], dim=1)


def _counts(patches: Patches, steps: int) -> Tensor:
    """int64 `[step + 1]`, number of patches at every step, from none to all."""
    if not 1 <= steps <= len(patches):
        raise InputError(
            f"steps is {steps}, expected 1 to {len(patches)}, the number of patches of the grid {patches.grid}"
        )
    return (torch.arange(steps + 1, device="cpu") * 2 * len(patches) + steps) // (2 * steps)  # rounded, halves up


def _top(patches: Patches, top: float) -> Tensor:
    """int64 `[1]`."""
    if not 0 < top < 1:
        raise InputError(f"top is {top}, expected a share above 0 and below 1")
    return torch.tensor([max(1, round(top * len(patches)))], device="cpu")


def _distinct(visible: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of `[word version patch]`, `[distinct patch]`, and which of them each one is, `[word version]`."""
    rows, which = visible.flatten(0, 1).unique(dim=0, return_inverse=True)
    return rows, which.view(visible.shape[:2])


# --- what the model says ---------------------------------------------------------------------------


def _log_probs(score: Score, patches: Patches, words: Sequence[Sequence[int]], visible: Tensor) -> Tensor:
    """float64 `[word version]`: log-probability of each word in its own versions `visible [word version patch]`."""
    rows, which = _distinct(visible)
    scores = score(_versions(patches, rows))
    if scores.ndim != 2 or len(scores) != len(rows) or bool(scores.isnan().any()):
        found = "NaN among them" if bool(scores.isnan().any()) else f"shape {list(scores.shape)}"
        raise InputError(
            f"the scores of {len(rows)} versions of the picture came with {found}, expected log-probabilities "
            f"[{len(rows)} target]"
        )
    n_targets = scores.shape[1]
    for word in words:
        if not word or any(not 0 <= target < n_targets for target in word):
            raise InputError(
                f"a word has target indices {tuple(word)}, expected at least one of 0 to {n_targets - 1}, the response's tokens"
            )
    scores = scores.detach().cpu().double()
    spoken = torch.stack([scores[:, list(word)].sum(dim=1) for word in words])  # [word distinct]
    return spoken.gather(1, which)


def _versions(patches: Patches, rows: Tensor) -> Iterator[Visual]:
    """One picture after the other, so that only those being read are in memory."""
    for visible in tqdm(rows, unit="picture", leave=False, delay=1.0, disable=None):
        yield patches.show(visible)


def _curve(counts: Tensor, log_prob: Tensor, visible: Tensor) -> Curve:
    return Curve(counts.double() / counts[-1], log_prob, len(_distinct(visible)[0]))


def _stack(patches: Patches, orders: Sequence[Tensor], words: Sequence[Sequence[int]]) -> Tensor:
    """Checked orders as one int64 `[word patch]`."""
    if len(orders) != len(words) or not words:
        raise InputError(f"got {len(orders)} orders for {len(words)} words, expected one each, and at least one")
    every = torch.arange(len(patches), device="cpu")
    for order in orders:
        if not torch.equal(order.cpu().sort().values, every):
            raise InputError(
                f"an order of shape {list(order.shape)} is not one of the {len(patches)} patches of the grid {patches.grid}, "
                "expected each number from 0 once; use map_order, mask_order or random_order"
            )
    return torch.stack([order.cpu() for order in orders]).long()


def _edges(start: float, stop: float, n: int, pixels: int) -> np.ndarray:
    """int64 `[n + 1]`: `n` equal parts of `start` to `stop`, shares of `pixels`, at whole pixels."""
    return np.rint(np.linspace(start, stop, n + 1) * pixels).astype(np.int64)


def _hidden(frame: Image.Image, fill: Fill) -> Image.Image:
    if fill == "blur":
        return frame.filter(ImageFilter.GaussianBlur(BLUR_SHARE * min(frame.size)))
    mean = np.asarray(frame).mean(axis=(0, 1))
    return Image.new("RGB", frame.size, tuple(int(channel) for channel in np.rint(mean)))
