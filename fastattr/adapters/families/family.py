"""What differs between model families: how image tokens lie on the picture, and how to show it larger.

A family is a few facts. `look` reads from what the processor made where the tokens of every image lie on its picture;
`watch` does it for videos. `cell` is the side in pixels of the square one image token covers, and `enlarge` gives the
processor options that show pictures at another size for one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastattr.errors import FastattrError, TokenLayoutError
from fastattr.types import WHOLE_IMAGE, Box, Grid

Config = Any  # a transformers configuration
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Look:
    """One look of the model at a picture, as its placeholders stand in the text: all of it, or a tile.

    Attributes:
        grid: `(t, h, w)` tokens, in reading order.
        box: what they cover, `(left, top, right, bottom)` as shares of the picture; beyond 0 and 1 is padding.
        row_end: placeholders behind each row that show nothing (line breaks of the picture).
        end: placeholders behind the last row that show nothing.
        start: placeholders before the first row that show nothing.
    """

    grid: Grid
    box: Box = WHOLE_IMAGE
    row_end: int = 0
    end: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        sides, box = tuple(self.grid), tuple(self.box)
        fits = len(sides) == 3 and all(isinstance(side, int) and side >= 1 for side in sides)
        fits &= len(box) == 4 and all(math.isfinite(edge) for edge in box) and box[0] < box[2] and box[1] < box[3]
        fits &= min(self.row_end, self.end, self.start) >= 0
        if not fits:
            raise TokenLayoutError(
                f"a look has grid {self.grid} over the box {self.box}, with {self.start}, {self.row_end} and {self.end} "
                "placeholders before, behind rows and at the end; expected three whole numbers (t, h, w) of at least 1, "
                "(left, top, right, bottom) with left < right and top < bottom, and no negative number"
            )

    @property
    def n_placeholders(self) -> int:
        t, h, w = self.grid
        return self.start + t * h * (w + self.row_end) + self.end

    def cells(self, placeholders: Sequence[int]) -> list[int]:
        """Those of its placeholders that show something, in row-major order."""
        t, h, w = self.grid
        line = w + self.row_end
        return [placeholders[self.start + row * line + column] for row in range(t * h) for column in range(w)]


Looks = tuple[Look, ...]  # at one picture, in the order of the text


@dataclass(frozen=True)
class Shown:
    """What a family may read to find the tokens of pictures.

    Attributes:
        config: of the model.
        processor: as it was given.
        inputs: what the model takes, as tensors.
        sizes: of the pictures the processor was given, in order; None where nobody knows (a captured `generate`).
        n_frames: of the videos, where `sizes` are theirs; None where pictures are images, or nobody knows.
    """

    config: Config
    processor: Any
    inputs: Mapping[str, Tensor]
    sizes: Sequence[Size] | None
    n_frames: Sequence[int] | None = None

    def sizes_for(self, family: str, what: str) -> Sequence[Size]:
        """The sizes, where they are needed.

        Raises:
            TokenLayoutError: they are not known.
        """
        if self.sizes is None:
            raise TokenLayoutError(
                f"{family} {what}, which cannot be told from the model's inputs alone; pass the pictures, image=..."
            )
        return self.sizes


@dataclass(frozen=True)
class Family:
    """How one kind of model sees pictures.

    Attributes:
        name: what people call it.
        look: what was shown, to the looks at every image, in order.
        cell: `config -> pixels`, the side of the square one image token covers.
        enlarge: `(processor, (height, width), scale) -> options` for showing pictures at `scale` times their size by
            default, which makes the largest one `height x width`; None if the number of tokens is fixed.
        watch: what was shown, to the looks at every video; None where videos are shown as their frames, one image each.
        image_token: the configuration's name of the id that stands for an image.
        film_token: the configuration's name of the id that stands for a video.
        film_cell: as `cell`, of videos where it differs.
        filmed: processor options used where a video is shown as one, for example so that no frame is left out.
        always: processor options used at every scale.
        resized: pictures are given to the processor at the size of their grid. Not where it cuts or crops them.
        interpolates: the vision tower must be told to interpolate its position embeddings.
        token_types: the name of the model input that marks image tokens, where the model needs it.
        answer_type: what these mark an answer with.
        tiles: large pictures are read in tiles.
        along_last: model inputs whose last axis counts patches; of others the first one does.
        stacks: several examples can be read in one forward. Not where their inputs hold indices into one another, or
            where the model counts on from one row to the next.
        nested: the processor is given the pictures of a prompt as a nested list, as its chat template does, because it
            shows several pictures of one prompt differently from a single one.
        masked: positions are computed only where an attention mask is given, so one of ones is given with the prompt.
        sized: a message part may set the size of its picture, by the rule of qwen-vl-utils.
        keeps_aspect: a grid has the aspect ratio of its picture, each side rounded to whole cells.
        joint: the tower's attention spans all images of a forward, so that its cost grows with their square.
    """

    name: str
    look: Callable[[Shown], list[Looks]]
    cell: Callable[[Config], int]
    enlarge: Callable[[Any, Size, float], dict[str, Any]] | None
    watch: Callable[[Shown], list[Looks]] | None = None
    image_token: str = "image_token_id"
    film_token: str = "video_token_id"
    film_cell: Callable[[Config], int] | None = None
    filmed: Mapping[str, Any] | None = None
    always: Mapping[str, Any] | None = None
    resized: bool = True
    interpolates: bool = False
    token_types: str | None = None
    answer_type: int = 0
    tiles: bool = False
    joint: bool = False
    sized: bool = False
    keeps_aspect: bool = False
    along_last: tuple[str, ...] = ()
    stacks: bool = True
    nested: bool = False
    masked: bool = False


def looks_of(family: Family, shown: Shown) -> list[Looks]:
    """The looks at every image, in order.

    Raises:
        TokenLayoutError: the inputs lack what they are read from.
    """
    return _read(family.look, family, shown)


def video_looks_of(family: Family, shown: Shown) -> list[Looks]:
    """The looks at every video, in order.

    Raises:
        TokenLayoutError: the inputs lack what they are read from.
    """
    return [] if family.watch is None else _read(family.watch, family, shown)


def _read(look: Callable[[Shown], list[Looks]], family: Family, shown: Shown) -> list[Looks]:
    try:
        found = look(shown)
    except FastattrError:
        raise
    except KeyError as missing:
        raise TokenLayoutError(
            f"{family.name} reads its grids from {missing}, but the model's inputs are {', '.join(shown.inputs) or 'empty'}: "
            "the processor must return what the model takes, as tensors, and the prompt must show an image"
        ) from missing
    except Exception as error:  # a family of somebody else's may raise anything
        raise TokenLayoutError(
            f"{family.name} cannot tell where its image tokens lie: {type(error).__name__}: {error}"
        ) from error
    looks = isinstance(found, list) and all(isinstance(each, tuple) and each for each in found)
    if not looks or not all(isinstance(look, Look) for each in found for look in each):
        raise TokenLayoutError(
            f"{family.name} says that its image tokens lie as {found!r:.80}, expected a list that holds for every image a "
            "tuple of Look"
        )
    return found


# --- facts that many families share ----------------------------------------------------------------------


def side(value: Any) -> int:
    """A patch or image size, which some configurations give as a pair."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def patch(config: Config) -> int:
    return side(config.vision_config.patch_size)


def merge(config: Config) -> int:
    """How many patches a side become one token."""
    holder = config if hasattr(config, "spatial_merge_size") else config.vision_config
    return int(getattr(holder, "spatial_merge_size", 1))


def merged_patch(config: Config) -> int:
    return patch(config) * merge(config)


def whole(grids: Sequence[Grid]) -> list[Looks]:
    """Pictures that are each looked at once."""
    return [(Look(grid),) for grid in grids]


def image_half(processor: Any) -> Any:
    return getattr(processor, "image_processor", None)
