"""`load` and `wrap`: a model, its processor and what fastattr knows of them, in one frozen value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattr.adapters.families import Family, family_of
from fastattr.adapters.head import read_head
from fastattr.adapters.hooks import device_of, unwrap_peft
from fastattr.calibration import Calibration
from fastattr.errors import InputError, UnsupportedModelError
from fastattr.storage import read_calibration
from fastattr.types import DEFAULT_SCALES, OutputHead

BUNDLED = {"shapes": Path(__file__).parent.parent / "demo" / "shapes"}
CALIBRATION_FILE = "calibration.json"  # beside the weights


@dataclass(frozen=True)
class Model:
    """A model that can be explained.

    Attributes:
        hf_model: the transformers model as it was given; its attention implementation is left alone.
        processor: anything with `apply_chat_template`, `__call__`, `tokenizer` and `batch_decode`.
        config: the model's configuration, inside any PEFT wrapper.
        head: its output head, proven against its own logits.
        name: for reports.
        calibration: which evidence is low for this model, found beside its weights; for a wrapped one,
            `dataclasses.replace(model, calibration=...)`.
    """

    hf_model: Any
    processor: Any
    config: Any
    family: Family
    head: OutputHead
    name: str
    calibration: Calibration | None = None

    @property
    def device(self) -> torch.device:
        return device_of(self.hf_model.get_input_embeddings())

    @property
    def image_token_id(self) -> int:
        return int(getattr(self.config, self.family.image_token))

    @property
    def video_token_id(self) -> int | None:
        found = getattr(self.config, "video_token_id", None)
        return None if found is None else int(found)

    @property
    def film_token_id(self) -> int | None:
        """What stands for a video where one is shown; in some families the placeholder of images."""
        found = getattr(self.config, self.family.film_token, None)
        return None if found is None else int(found)

    @property
    def placeholder_ids(self) -> list[int]:
        """Ids that stand for pictures and are never said: of images, then of videos."""
        return [self.image_token_id] + ([] if self.video_token_id is None else [self.video_token_id])

    @property
    def placeholders(self) -> list[str]:
        """What stands for pictures in a rendered chat."""
        return self.decode([[id] for id in self.placeholder_ids])

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """Ids and texts of tokens that mark something rather than say it, placeholders among them."""
        tokenizer = self.processor.tokenizer
        ids = {*getattr(tokenizer, "all_special_ids", ()), *self.placeholder_ids}
        added = getattr(tokenizer, "added_tokens_decoder", {})  # made anew at every call
        wanted = sorted(ids | {id for id, token in added.items() if getattr(token, "special", False)})
        return dict(zip(wanted, self.decode([[id] for id in wanted]), strict=True))

    @property
    def takes_videos(self) -> bool:
        """Whether a video is shown as one; otherwise as its frames."""
        named = inspect.signature(self.processor.__call__).parameters
        return self.family.watch is not None and "videos" in named

    @property
    def scales(self) -> tuple[float, ...]:
        """What pictures are shown at where nobody says: one scale where tiles show them finer already, or nothing else can."""
        several = self.family.enlarge is not None and not self.family.tiles
        return DEFAULT_SCALES if several else (1.0,)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of ids, special tokens kept."""
        wanted = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        options = {name: value for name, value in wanted.items() if accepts(self.processor.batch_decode, name)}
        return list(self.processor.batch_decode(rows, **options))

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.family.name}, {self.head.weight.shape[0]} ids)"


def accepts(call: Callable[..., Any], option: str) -> bool:
    """Whether `call` can be given `option` by name."""
    parameters = inspect.signature(call).parameters.values()
    return any(p.name == option or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def hide_loading_bars() -> None:
    """Keep transformers from drawing a progress bar of its own for every model this process loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def wrap(hf_model: nn.Module, processor: Any, *, name: str | None = None) -> Model:
    """Explain a model you already have.

    Args:
        hf_model: an image-text-to-text model of transformers, PEFT-wrapped or not, in `eval` mode.
        processor: its processor, or any object with `apply_chat_template(messages, add_generation_prompt=...,
            tokenize=False)`, `__call__(text=[...], images=[...], return_tensors="pt")`, `tokenizer`
            and `batch_decode`.

    Raises:
        UnsupportedModelError: the model has a form fastattr cannot explain, or reads no images.
        InputError: the processor lacks something.
    """
    missing = [
        part
        for part in ("apply_chat_template", "__call__", "tokenizer", "batch_decode")
        if not hasattr(processor, part)
    ]
    if missing:
        raise InputError(f"the processor {type(processor).__name__} lacks {', '.join(missing)}")
    base = unwrap_peft(hf_model)
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_output_embeddings"):
        raise UnsupportedModelError(
            f"{type(base).__name__} is not a transformers model: it has no config or no output embeddings"
        )
    family = family_of(config)
    if not isinstance(getattr(config, family.image_token, None), int):
        raise UnsupportedModelError(
            f"{type(config).__name__} has no {family.image_token}, the id that stands for an image in {family.name}; say in "
            "image_token= of the family what it is called"
        )
    if hf_model.training:
        raise InputError(
            f"{type(base).__name__} is in training mode, where dropout makes maps random; call .eval() first"
        )
    tokenizer = processor.tokenizer
    valid_vocab = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    head = read_head(base, config, valid_vocab)
    return Model(
        hf_model, processor, config, family, head, name or getattr(base, "name_or_path", "") or type(base).__name__
    )


def load(
    name: str | Path = "shapes", *, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> Model:
    """Load the bundled model, a local directory or a hub id.

    A `calibration.json` in the directory is read with it; from the hub none is fetched.

    Args:
        name: `"shapes"`, a directory written by `save_pretrained`, or a hub id.
        device: where to put it; the CPU by default.
        dtype: weights' dtype; `"auto"` as saved. The bundled model is read as float32.

    Raises:
        UnsupportedModelError: the model has a form fastattr cannot explain, or reads no images.
        InputError: nothing can be loaded from `name`, or its calibration is broken.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fastattr.adapters.processors import load_processor

    source = BUNDLED.get(str(name), name)
    bundled = source is not name
    measured = Path(source, CALIBRATION_FILE)
    calibration = read_calibration(measured) if measured.is_file() else None
    try:
        family_of(AutoConfig.from_pretrained(source))
        hf_model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32 if bundled else dtype)
        processor = load_processor(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no model can be loaded from {str(name)!r}, expected {', '.join(BUNDLED)}, a directory written by "
            f"save_pretrained, or a hub id: {error}"
        ) from error
    hf_model = hf_model.eval()
    model = wrap(hf_model.to(device) if device is not None else hf_model, processor, name=str(name))
    return replace(model, calibration=calibration)
