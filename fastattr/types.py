"""The frozen values that flow through fastattr, from token layout to finished attribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex, get_args

import numpy as np
import torch
from torch import Tensor

from fastattr.errors import InputError, TokenLayoutError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from fastattr.calibration import Calibration
    from fastattr.descriptors import Descriptors
    from fastattr.fields import Field
    from fastattr.selection import Selection

Method = Literal["lens", "tam", "arc"]
Grid = tuple[int, int, int]
Box = tuple[float, float, float, float]

WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)
MAX_SCALE = 8.0
MAX_REGIONS = 32
DEFAULT_SCALES = (1.0, 1.5, 2.0)  # of a model that can read pictures at several sizes
DEFAULT_TOP_K = 50


@dataclass(frozen=True)
class AttributionConfig:
    """Every choice the method leaves open. Defaults follow from `benchmarks/results/sweep_*.jsonl`.

    Attributes:
        method: `lens` (activation alone), `tam` (interference weighted by activation) or `arc`
            (interference weighted by how differently a context token predicts).
        scales: image sizes relative to the model's own; several of them make it MSEA. None leaves them to the model:
            `DEFAULT_SCALES`, or 1 alone where it reads pictures in tiles or always with the same number of tokens.
        scale_weights: one weight a scale; `scale^2`, the share of its image tokens, when None.
        decision_weight: weight each scale, per target, by how far the model still says the target there.
        scale_mean: `arithmetic` is MSEA's weighted sum; `geometric`, our own, is the weighted geometric mean, where a
            place that is dark at one scale stays dark.
        aggregate: bring the scales together `before` or `after` interference is removed.
        top_k: depth of the rankings compared (ARC); `DEFAULT_TOP_K`, or the whole vocabulary where that is smaller, when
            None.
        rbo_p: persistence of the rank-biased overlap; larger looks deeper (ARC).
        arc_weight: `product` is activation times `1 - relevance`; `relevance` is `1 - relevance` alone.
        context: which earlier tokens may count as interference.
        layer: -1 is the last; another one is read through the final norm. Predictions (rankings, probabilities,
            evidence) are always the model's own.
        regions: our own; weigh the maps by how much the words' probabilities fall when windows of an `n x n` partition of
            the picture are hidden, see `fastattr.regions`; 0 for none, else `(n + 1)^2` more forwards per image and one
            for all images: 50 for one image with 6.
        filter: apply the rank-Gaussian filter; None leaves it out where a grid has fewer than 16 cells a side. There it
            takes small things away, but with `context="all"` maps without it are less causal.
        evidence: run one more forward with the image blanked to middle grey.
        compat: `"tam"` reproduces the reference TAM with its quirks.
        backend: `auto` runs Triton kernels on a GPU and torch elsewhere; `triton` or `torch` run or explain.
    """

    method: Method = "arc"
    scales: tuple[float, ...] | None = None
    scale_weights: tuple[float, ...] | None = None
    decision_weight: bool = False
    scale_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    aggregate: Literal["before", "after"] = "before"
    top_k: int | None = None
    rbo_p: float = 0.9
    arc_weight: Literal["product", "relevance"] = "product"
    context: Literal["all", "prompt", "response"] = "all"
    layer: int = -1
    filter: bool | None = True
    regions: int = 0
    evidence: bool = True
    compat: Literal["tam"] | None = None
    backend: Literal["auto", "triton", "torch"] = "auto"

    def __post_init__(self) -> None:
        for name in ("scales", "scale_weights"):
            given = getattr(self, name)
            if given is None:
                continue
            try:
                if isinstance(given, str):  # "15" would be read as 1 and 5
                    raise TypeError
                object.__setattr__(self, name, tuple(float(number) for number in given))
            except (TypeError, ValueError) as error:
                raise InputError(f"{name} is {given!r}, expected numbers, for example (1.0, 1.5, 2.0)") from error
        for name, allowed in (
            ("method", get_args(Method)),
            ("scale_mean", ("arithmetic", "geometric")),
            ("aggregate", ("before", "after")),
            ("decision_weight", (True, False)),
            ("evidence", (True, False)),
            ("filter", (None, True, False)),
            ("arc_weight", ("product", "relevance")),
            ("context", ("all", "prompt", "response")),
            ("compat", (None, "tam")),
            ("backend", ("auto", "triton", "torch")),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(repr(value) for value in allowed)
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        self._check_scales()
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise InputError(f"top_k is {self.top_k!r}, expected a whole number of at least 1")
        if isinstance(self.regions, bool) or not isinstance(self.regions, int) or not 0 <= self.regions <= MAX_REGIONS:
            raise InputError(f"regions is {self.regions!r}, expected a whole number from 0 (none) to {MAX_REGIONS}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise InputError(f"layer is {self.layer!r}, expected a whole number, -1 for the last")
        if not isinstance(self.rbo_p, int | float) or not 0.0 < self.rbo_p < 1.0:
            raise InputError(f"rbo_p is {self.rbo_p!r}, expected a number between 0 and 1, both excluded")
        if self.compat == "tam" and (
            self.method != "tam" or self.scales is None or len(self.scales) != 1 or self.context != "all"
        ):
            raise InputError(
                f"compat='tam' reproduces one-scale TAM, but method is {self.method!r}, scales are {self.scales} and "
                f"context is {self.context!r}; use method='tam', scales=(1.0,), context='all'"
            )

    @property
    def known_scales(self) -> tuple[float, ...]:
        """`scales`. Raises `InputError` where they are left open."""
        if self.scales is None:
            raise InputError(
                "scales is None, the model's own, but there is no model here: name them, for example (1.0,)"
            )
        return self.scales

    @property
    def known_top_k(self) -> int:
        """`top_k`, or its default."""
        return DEFAULT_TOP_K if self.top_k is None else self.top_k

    def resolve(self, scales: Sequence[float], vocab: int) -> AttributionConfig:
        """The same configuration with nothing left open.

        Args:
            scales: of the model, `Model.scales`; used where this configuration names none.
            vocab: number of ids that the model can predict, `OutputHead.vocab`.

        Raises:
            InputError: `top_k` is larger than the vocabulary, or there are not as many `scale_weights` as scales.
        """
        if self.method == "arc" and self.top_k is not None and self.top_k > vocab:
            raise InputError(f"top_k is {self.top_k}, expected at most {vocab}, the size of the vocabulary")
        return replace(
            self,
            scales=tuple(scales) if self.scales is None else self.scales,
            top_k=min(DEFAULT_TOP_K, vocab) if self.top_k is None else self.top_k,
        )

    def _check_scales(self) -> None:
        weights = self.scale_weights
        if weights is not None and (
            not all(math.isfinite(w) and w >= 0 for w in weights) or not 0 < sum(weights) < math.inf
        ):
            raise InputError(f"scale_weights is {weights}, expected numbers of at least 0 with a positive sum")
        if self.scales is None:
            return
        if not self.scales:
            raise InputError(
                "scales is empty, expected at least one number, for example (1.0, 1.5, 2.0), or None for the model's own"
            )
        for scale in self.scales:
            if not math.isfinite(scale) or not 0.0 < scale <= MAX_SCALE:
                raise InputError(f"scales holds {scale}, expected numbers above 0 and at most {MAX_SCALE:g}")
        if len(set(self.scales)) != len(self.scales):
            raise InputError(f"scales {self.scales} holds a number twice, expected distinct scales")
        if weights is not None and len(weights) != len(self.scales):
            raise InputError(
                f"scale_weights holds {len(weights)} numbers for {len(self.scales)} scales, expected one each"
            )


@dataclass(frozen=True)
class View:
    """One look at a picture: a tile of it, its thumbnail, or all of it with padding around.

    Attributes:
        grid: `(h, w)` tokens, row by row.
        box: what they cover, `(left, top, right, bottom)` as shares of the picture's width and height; beyond 0 and 1
            is padding.
    """

    grid: tuple[int, int]
    box: Box

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if min(self.grid) < 1 or not (left < right and top < bottom):
            raise TokenLayoutError(
                f"a view has grid {self.grid} over the box {self.box}, expected at least 1 x 1 cells, left < right and "
                "top < bottom"
            )


@dataclass(frozen=True)
class ImageGroup:
    """The tokens of one image or video.

    Attributes:
        positions: where they stand in `input_ids`, in row-major order of `grid`, or of each view after the other.
        grid: `(t, h, w)` of its map; `t` is 1 for an image.
        extent: the part of the picture the grid covers, `(left, top, right, bottom)` as shares of its
            width and height; less than everything where a processor crops.
        views: how the tokens lie on the picture where they are not simply the grid, the same at every time step; see
            `fastattr.views`.
    """

    positions: tuple[int, ...]
    grid: Grid
    extent: Box = WHOLE_IMAGE
    views: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or any(side < 1 for side in self.grid):
            raise TokenLayoutError(
                f"an image group has grid {self.grid}, expected three numbers (t, h, w) of at least 1"
            )
        t, h, w = self.grid
        expected = t * (sum(math.prod(view.grid) for view in self.views) or h * w)
        if len(self.positions) != expected:
            shown = f"{len(self.views)} views need" if self.views else f"grid (t, h, w) = ({t}, {h}, {w}) needs"
            raise TokenLayoutError(f"an image group holds {len(self.positions)} positions but its {shown} {expected}")


@dataclass(frozen=True)
class TokenLayout:
    """Which positions of `input_ids` are image, user text and response.

    Positions that are none of these (chat template, special tokens) take no part in the method.

    Attributes:
        images: one group per image or video, in reading order.
        prompt: positions of user text, ascending.
        response: half-open range `(start, stop)` of the response; it ends the sequence.
    """

    images: tuple[ImageGroup, ...]
    prompt: tuple[int, ...]
    response: tuple[int, int]

    def __post_init__(self) -> None:
        start, stop = self.response
        if not self.images:
            raise TokenLayoutError("the layout has no image group, expected at least one: there is nothing to map onto")
        if start < 1 or stop <= start:
            raise TokenLayoutError(
                f"the response spans ({start}, {stop}), expected start >= 1 and stop > start: "
                "its first token is predicted at the position before it"
            )
        taken: set[int] = set()
        for name, positions in [("image", g.positions) for g in self.images] + [("prompt", self.prompt)]:
            for position in positions:
                if not 0 <= position < start:
                    raise TokenLayoutError(
                        f"{name} position {position} lies outside the prefill 0..{start - 1}; the response spans "
                        f"({start}, {stop})"
                    )
                if position in taken:
                    raise TokenLayoutError(
                        f"position {position} is claimed twice, expected disjoint image and prompt positions"
                    )
                taken.add(position)
        if list(self.prompt) != sorted(self.prompt):
            raise TokenLayoutError(f"prompt positions {self.prompt} are not ascending")

    @classmethod
    def from_spans(
        cls,
        *,
        images: Iterable[tuple[int, int, Grid]],
        prompt: Iterable[tuple[int, int]],
        response: tuple[int, int],
    ) -> TokenLayout:
        """Build a layout from half-open spans.

        >>> TokenLayout.from_spans(images=[(1, 7, (1, 2, 3))], prompt=[(7, 9)], response=(9, 12)).n_image
        6
        """
        groups = tuple(ImageGroup(tuple(range(start, stop)), grid) for start, stop, grid in images)
        positions = tuple(position for start, stop in prompt for position in range(start, stop))
        return cls(groups, positions, (int(response[0]), int(response[1])))

    @property
    def n_targets(self) -> int:
        return self.response[1] - self.response[0]

    @property
    def n_image(self) -> int:
        return sum(len(group.positions) for group in self.images)

    @property
    def image_positions(self) -> tuple[int, ...]:
        return tuple(chain.from_iterable(group.positions for group in self.images))

    @property
    def context(self) -> tuple[int, ...]:
        """Positions in `input_ids` of the context tokens: user text, then the response."""
        return (*self.prompt, *range(*self.response))

    @property
    def context_predictors(self) -> tuple[int, ...]:
        """Where each context token is read: its own position for user text, the predicting one for the response."""
        return (*self.prompt, *self.predictors)

    @property
    def predictors(self) -> tuple[int, ...]:
        """The position that predicts each response token."""
        return tuple(range(self.response[0] - 1, self.response[1] - 1))

    def causal(self, device: torch.device | str = "cpu") -> Tensor:
        """bool `[target context]`: whether the context token stands before the target."""
        order = torch.arange(len(self.prompt) + self.n_targets, device=device)
        return order < order[len(self.prompt) :, None]


@dataclass(frozen=True)
class OutputHead:
    """What turns a hidden state into logits: `softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap)`.

    Attributes:
        weight: `[vocab dim]`, the output embeddings.
        bias: `[vocab]` or None.
        valid_vocab: ids from here on are padding; None when all are real.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0] if self.valid_vocab is None else self.valid_vocab


@dataclass(frozen=True)
class ScaleStates:
    """One teacher-forced reading of prompt and response at one image scale.

    Attributes:
        hidden_states: `[seq dim]` with `seq >= response stop - 1`, through the final norm: where classes are read.
        input_ids: int `[seq]`.
        last_states: `[seq dim]`, exactly what the output head consumes, where `hidden_states` is of an
            earlier layer; None where it is the same.
    """

    hidden_states: Tensor
    input_ids: Tensor
    layout: TokenLayout
    scale: float = 1.0
    last_states: Tensor | None = None

    @property
    def target_ids(self) -> Tensor:
        """int `[target]`."""
        return self.input_ids[slice(*self.layout.response)]

    @property
    def predictions(self) -> Tensor:
        """`[context dim]`: what the model predicts with where each context token is read; the targets' come last."""
        states = self.hidden_states if self.last_states is None else self.last_states
        return states[torch.tensor(self.layout.context_predictors, device=states.device)]


@dataclass(frozen=True)
class TokenMaps:
    """What the method makes of states: everything about the targets that needs no text.

    Attributes:
        image: for each image `[target t h w]` in [0, 1].
        context: `[target context]` in [0, 1] on the same scale; 0 where the token is not before the target.
        relevance: `[target context]` in [0, 1], rank-biased overlap (ARC only, else None).
        log_prob: `[target]` in nats, at the scale nearest to 1.
        agreement: `[target scale]`, probability of the target relative to the scale nearest to 1.
        raw_range: `[target 2]`, minimum and maximum before normalisation.
        residual: `[target]`, share of the activation's norm that interference removal left.
        degenerate: bool `[target]`, whether all scores were equal, so that the map is all zero.
        backend: `triton` or `torch`, what ran.
    """

    image: tuple[Tensor, ...]
    context: Tensor
    relevance: Tensor | None
    log_prob: Tensor
    agreement: Tensor
    raw_range: Tensor
    residual: Tensor
    degenerate: Tensor
    backend: str


@dataclass(frozen=True, eq=False)
class Attribution:
    """Why each token of a response was said. Immutable, on the CPU, self-contained.

    `T` targets are the response tokens; the context is the user's text followed by the response.

    Attributes:
        response: the text; `spans[i]` are the characters of `tokens[i]` in it.
        image: one `[target t h w]` in [0, 1] per image or video.
        context: `[target context]` in [0, 1], jointly normalised with `image`.
        relevance: `[target context]` (ARC) or None.
        evidence: `[target]` nats, `log p(token | image) - log p(token | image blanked)`, or None.
        log_prob, agreement, raw_range, residual, degenerate: see `TokenMaps`.
        grids: for each scale and image the `(t, h, w)` that was read.
        extents: for each image the part its grid covers, see `ImageGroup.extent`.
        pictures: uint8 `[frame height width 3]` for display, possibly smaller than the source. A video may hold more
            frames than its map has time steps: frame `f` of `m` is of step `f * t // m`.
        picture_sizes: `(height, width)` of the sources in pixels; boxes are in these pixels.
        source: `replay`, `capture` or `states`.
        backend: `triton` or `torch`, what ran.
        notes: what a careful reader should know about this result.
        calibration: which evidence is low for this model and how far that can be trusted; None where nobody measured.
        explained: bool `[target]`, which tokens were asked for; the others have scores, but maps, context and relevance
            of zeros. None where all were.
        special: indices of special tokens, such as the end of a turn, which are never words.
        reasoning: half-open character ranges of `response` that are the model's reasoning before its answer, as between
            `<think>` and `</think>`; see `fastattr.reasoning`.
    """

    response: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    context_tokens: tuple[str, ...]
    image: tuple[Tensor, ...]
    context: Tensor
    relevance: Tensor | None
    evidence: Tensor | None
    log_prob: Tensor
    agreement: Tensor
    raw_range: Tensor
    residual: Tensor
    degenerate: Tensor
    config: AttributionConfig
    grids: tuple[tuple[Grid, ...], ...]
    extents: tuple[Box, ...]
    pictures: tuple[np.ndarray, ...] = ()
    picture_sizes: tuple[tuple[int, int], ...] = ()
    prompt: str = ""
    model: str = ""
    source: str = "states"
    backend: str = "torch"
    notes: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = field(default=())
    calibration: Calibration | None = None
    explained: Tensor | None = None
    special: tuple[int, ...] = ()
    reasoning: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        from fastattr.config import name_of

        shapes = ", ".join("x".join(map(str, m.shape[1:])) for m in self.image)
        text = self.response if len(self.response) <= 60 else self.response[:57] + "..."
        return f"Attribution({text!r}, {len(self)} tokens, {name_of(self.config)}, maps {shapes})"

    def __getitem__(self, asked: str | SupportsIndex | slice) -> Selection:
        """Select every occurrence of a word or phrase, the token of an index, or the tokens of a slice as one selection.

        `why["red circle"]`, `why[0]`, `why[-1]`, `why[2:5]`.

        Raises:
            PhraseError: the phrase does not occur.
            TokenIndexError: there is no token of this index, or the slice is empty.
            InputError: `asked` is none of these.
        """
        from fastattr.selection import select_phrase, select_tokens

        return select_phrase(self, asked) if isinstance(asked, str) else select_tokens(self, asked)

    def __iter__(self) -> Iterator[Selection]:
        """A selection for each token, in order."""
        return (self[i] for i in range(len(self)))

    def __contains__(self, phrase: object) -> bool:
        """Whether a word or phrase occurs, as whole words in any case."""
        from fastattr.errors import PhraseError

        if not isinstance(phrase, str):
            return False
        try:
            self[phrase]
        except PhraseError:
            return False
        return True

    def find(self, pattern: str) -> Selection:
        """Select every match of a regular expression. Raises `PhraseError` if there is none."""
        from fastattr.selection import select_pattern

        return select_pattern(self, pattern)

    def fields(self) -> tuple[Field, ...]:
        """Each value of a response that is JSON, with its place in the picture, see `read_fields`. Raises `InputError`."""
        from fastattr.fields import read_fields

        return read_fields(self)

    @property
    def low_evidence(self) -> tuple[Selection, ...]:
        """The words that the picture does not speak for, in order, see `select_low_evidence`. Raises `InputError`."""
        from fastattr.selection import select_low_evidence

        return select_low_evidence(self)

    @property
    def descriptors(self) -> Descriptors:
        """Image share, peak ratio, entropy and area of every target's map."""
        from fastattr.descriptors import describe_maps

        return describe_maps(self.image, self.context)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, whole or not at all. Raises `SaveError`."""
        from fastattr.storage import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read what `save` wrote. Raises `SaveError`."""
        from fastattr.storage import load

        return load(path)

    def html(self, *, others: Sequence[Attribution] = ()) -> str:
        """The interactive report as one self-contained page; `others` as for `to_html`. Raises `InputError`."""
        from fastattr.report import page_html

        return page_html((self, *others))

    def to_html(self, path: str | Path, *, others: Sequence[Attribution] = ()) -> Path:
        """Write the interactive report; `others` are the same response by other methods or scales. Raises `SaveError`."""
        from fastattr.report import write_html

        return write_html((self, *others), path)

    def to_png(self, path: str | Path) -> Path:
        """Write a grid of overlays, one a token; of a video a strip of frames, a row a token. Raises `SaveError`."""
        from fastattr.report import write_png

        return write_png(self, path)

    def to_frame(self) -> DataFrame:
        """A pandas table with one row per token.

        Columns: `token`, `id`, `start` and `end` (characters of the response), `log_prob` and `evidence` (nats; NaN
        without evidence), `agreement_1.5` for each scale, the four of `descriptors`, `degenerate`, `explained`, and
        for each image `box_0`: `(left, top, right, bottom)` in pixels, None where the map is zero or there are no
        pictures.

        Raises:
            InputError: pandas is not installed.
        """
        from fastattr.report import to_frame

        return to_frame(self)

    def plot(self, phrase: str | SupportsIndex | slice | None = None) -> Figure:
        """A matplotlib figure of overlays: a grid with one per token, or a single one of `why[phrase]`.

        Raises:
            InputError: matplotlib is not installed.
            PhraseError, TokenIndexError: as of `why[phrase]`.
        """
        from fastattr.report import plot, plot_tokens

        return plot_tokens(self) if phrase is None else plot([self[phrase]])

    def _repr_html_(self) -> str:
        from fastattr.report import notebook_html

        return notebook_html((self,))
