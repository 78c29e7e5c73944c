"""`load` and `wrap`: a model, its processor and what fastattr knows of them, in one frozen value."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattr.adapters.families import Family, family_of
from fastattr.adapters.hooks import device_of, unwrap_peft
from fastattr.adapters.live import Live
from fastattr.calibration import Calibration
from fastattr.errors import InputError, UnsupportedModelError
from fastattr.storage import read_calibration
from fastattr.text import decode_with, special_ids_of
from fastattr.types import DEFAULT_SCALES, OutputHead

logger = logging.getLogger("fastattr")

BUNDLED = {"shapes": Path(__file__).parent.parent / "demo" / "shapes"}
_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
CALIBRATION_FILE = "calibration.json"  # beside the weights


@dataclass(frozen=True)
class Model:
    """A model that can be explained.

    Attributes:
        hf_model: the transformers model as it was given; its attention implementation is left alone.
        processor: anything with `apply_chat_template`, `__call__`, `tokenizer` and `batch_decode`.
        config: the model's configuration, inside any PEFT wrapper.
        live: what may change after `wrap`; updated before every explanation.
        name: for reports.
        calibration: which evidence is low for this model, found beside its weights; for a wrapped one,
            `dataclasses.replace(model, calibration=...)`.
    """

    hf_model: Any
    processor: Any
    config: Any
    family: Family
    live: Live
    name: str
    calibration: Calibration | None = None

    @property
    def head(self) -> OutputHead:
        """The output head, checked against the model's own logits when it was last read."""
        return self.live.head

    @property
    def states(self) -> Sequence[dict[str, Any]]:
        """The state dicts of its modules, for `hooks.undisturbed`."""
        return self.live.states

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

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the sizes in its configuration and of its vocabulary.

        The same wherever, in whatever dtype and by whatever version of transformers it is loaded. Fine-tuned models share
        it with their base.
        """
        text = self.config.get_text_config()
        sizes = [getattr(text, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")]
        held = [str(self.config.model_type), sizes, sorted(self.processor.tokenizer.get_vocab().items())]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """Ids and texts of tokens that mark something rather than say it, placeholders among them."""
        wanted = sorted({*special_ids_of(self.processor.tokenizer), *self.placeholder_ids})
        return dict(zip(wanted, self.decode([[id] for id in wanted]), strict=True))

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Ids of special tokens and end tokens, which are never words of a response."""
        ends = getattr(getattr(self.hf_model, "generation_config", None), "eos_token_id", None)
        return frozenset((*self.special_tokens, *([ends] if isinstance(ends, int) else ends or ())))

    @property
    def takes_videos(self) -> bool:
        """Whether a video is shown as one; otherwise as its frames."""
        named = inspect.signature(self.processor.__call__).parameters
        return self.family.watch is not None and "videos" in named

    @property
    def scales(self) -> tuple[float, ...]:
        """The default scales: `DEFAULT_SCALES`, or 1 alone for pictures in tiles and where no other size is possible."""
        several = self.family.enlarge is not None and not self.family.tiles
        return DEFAULT_SCALES if several else (1.0,)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of ids, special tokens kept."""
        return decode_with(self.processor)(rows)

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
        InputError: the processor lacks something, or the model is in training mode.
    """
    missing = [
        part
        for part in ("apply_chat_template", "__call__", "tokenizer", "batch_decode")
        if not hasattr(processor, part)
    ]
    if missing:
        raise InputError(f"the processor {type(processor).__name__} lacks {', '.join(missing)}")
    base = unwrap_peft(hf_model)
    parallel = {each.__name__ for each in type(base).__mro__} & _PARALLEL
    if parallel:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} spreads a model over devices or processes; pass the model inside, .module, with all of "
            "its weights"
        )
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
    live = Live(hf_model, config, processor.tokenizer)
    return Model(
        hf_model, processor, config, family, live, name or getattr(base, "name_or_path", "") or type(base).__name__
    )


def check_model(model: Any) -> None:
    """Check that this is a `Model` that can be explained as it is now, and read its head again if it changed.

    Raises:
        InputError: it is not wrapped, or in training mode.
        UnsupportedModelError, StatesError: see `Live.look`.
    """
    if not isinstance(model, Model):
        how = f"fastattr.load({model!r})" if isinstance(model, str | Path) else "fastattr.wrap(hf_model, processor)"
        raise InputError(f"the model is a {type(model).__name__}, expected a fastattr.Model; wrap it first: {how}")
    model.live.look()


@contextmanager
def explaining(model: Model) -> Iterator[None]:
    """The context in which everything is explained: checks the model, and turns off gradients and inference mode.

    Raises:
        InputError, UnsupportedModelError, StatesError: see `check_model`.
    """
    check_model(model)
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check_name(name: str) -> None:
    """Raises `InputError` for a misspelt bundled model or a missing directory, before the hub is asked."""
    if name in BUNDLED or Path(name).exists():
        return
    meant = get_close_matches(name, BUNDLED)
    if meant:
        raise InputError(f"there is no model {name!r}; did you mean {meant[0]!r}?")
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise InputError(
            f"no model can be loaded from {name!r}, expected {', '.join(BUNDLED)}, a directory written by save_pretrained, or a "
            "hub id: there is no such directory"
        )


def load(
    name: str | Path = "shapes",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Model:
    """Load the bundled model, a local directory or a hub id.

    A `calibration.json` in the directory is read with it; from the hub none is fetched.

    Args:
        name: `"shapes"`, a directory written by `save_pretrained`, or a hub id.
        device: where to put it; by default the current GPU if there is one, else the CPU. The choice is logged.
        dtype: weights' dtype; `"auto"` as saved, for the bundled model float32.
        device_map, quantization_config: as in transformers' `from_pretrained`; `device_map` in place of `device`.
        trust_remote_code: run the Python code that comes with the model, where transformers does not have its class.
            There is no prompt in the terminal.
        revision: a branch, tag or commit on the hub.

    Raises:
        UnsupportedModelError: the model has a form fastattr cannot explain, or reads no images.
        InputError: nothing can be loaded from `name`, its code is not trusted, its calibration is broken, or both
            `device` and `device_map` are given.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from fastattr.adapters.processors import load_processor

    if device is not None and device_map is not None:
        raise InputError(f"device is {str(device)!r} and device_map is {device_map!r}, expected one of them")
    source = BUNDLED.get(str(name), name)
    bundled = source is not name
    _check_name(str(name))
    measured = Path(source, CALIBRATION_FILE)
    calibration = read_calibration(measured) if measured.is_file() else None
    if device is None and device_map is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        logger.info("loading %s onto %s; device= or device_map= choose another", name, device)
    options: dict[str, Any] = {"dtype": torch.float32 if bundled and dtype == "auto" else dtype}
    if quantization_config is not None:  # quantised weights cannot be moved afterwards
        options["quantization_config"] = quantization_config
        device_map = {"": device} if device_map is None else device_map
    if device_map is not None:
        options["device_map"] = device_map
    # False rather than None, with which transformers asks in the terminal
    asked: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        asked["revision"] = revision
    try:
        family_of(AutoConfig.from_pretrained(source, **asked))
        hf_model = AutoModelForImageTextToText.from_pretrained(source, **options, **asked)
        processor = load_processor(source, **asked)
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise InputError(
                f"{str(name)!r} comes with Python code of its own, which runs on this machine when it is loaded; read it, and "
                "if you trust it pass trust_remote_code=True to fastattr.load"
            ) from error
        raise InputError(
            f"no model can be loaded from {str(name)!r}, expected {', '.join(BUNDLED)}, a directory written by "
            f"save_pretrained, or a hub id: {error}"
        ) from error
    hf_model = hf_model.eval()
    model = wrap(hf_model if device_map is not None else hf_model.to(device), processor, name=str(name))
    return replace(model, calibration=calibration)
