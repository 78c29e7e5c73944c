"""Hidden states read along with the user's own `generate`."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattr.adapters.buffer import Pages, StateBuffer
from fastattr.adapters.encode import encode, group_images
from fastattr.adapters.ending import end_tokens
from fastattr.adapters.families import Shown, looks_of, video_looks_of
from fastattr.adapters.hooks import all_positions, decoder_of, is_uncaptured, unwrap_peft
from fastattr.adapters.live import adapters_of, version_of
from fastattr.adapters.model import Model, check_model
from fastattr.adapters.states import forward
from fastattr.adapters.wording import text_positions
from fastattr.chat import Chat, Messages, Prompt, as_chat
from fastattr.config import AnyConfig, ConfigChanges
from fastattr.errors import FastattrError, InputError
from fastattr.images import ImageLike, Visual
from fastattr.types import Attribution, ImageGroup, OutputHead, ScaleStates, TokenLayout

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("fastattr")

SHARED_BUFFER = StateBuffer()


class CapturedStates:
    """Last-layer states of one `generate` call, filled while it runs.

    Attributes:
        model: what was captured.
        model_inputs: what the model was given besides `input_ids`.
        prompt_ids: `[n]`, what it was given; None until it runs. Of several prompts the first.
        n_prompts: how many it was given at once.
        n_cached: tokens already in its cache before the first step; no states of them are captured.
        fed: ids of every step, `[1 n]` each.
        hidden: states `[n dim]` read from a file by a worker, used in place of captured ones; None otherwise.
        end_tokens: what ends a response, from the arguments of `generate` and the model's `generation_config`.
    """

    def __init__(self, model: Model, buffer: StateBuffer = SHARED_BUFFER) -> None:
        self.model = model
        self.model_inputs: dict[str, Tensor] = {}
        self.prompt_ids: Tensor | None = None
        self.n_prompts = self.n_cached = 0
        self.fed: list[Tensor] = []
        self.hidden: Tensor | None = None
        self._reading = model.live.reading
        self._adapters: frozenset[Any] | None = None
        self._head_then: tuple[Tensor, int] | None = None  # its weight and the version of that, when `generate` ran
        self._embedded = False
        self.end_tokens = end_tokens(model)
        self._pages = Pages(buffer)
        self._runs = self._input_bytes = 0
        self._is_full = False
        self._ready: Any = None
        self._device: torch.device | None = None
        # also where the user forgets them, or an exception takes them away
        self._give_back = weakref.finalize(self, buffer.give_back, self._pages.borrowed)
        self._give_back.atexit = False

    # --- while generate runs ---

    def begin(self, ids: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """`generate` was called with these. It may encode the images before the first forward, so they are what counts.

        Raises:
            InputError: for the second time, or without ids.
        """
        self._runs += 1
        if self._runs > 1:
            raise InputError("generate ran twice in one capture block, expected once; open a block for each run")
        if ids is None:
            raise InputError(
                f"generate was given {', '.join(kwargs) or 'nothing'}, expected input_ids: fastattr reads ids"
            )
        self._keep_given(ids, kwargs)
        self.end_tokens = end_tokens(self.model, kwargs)

    def feed(self, ids: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """One forward of the model begins."""
        if ids is None:
            self._embedded = self._embedded or kwargs.get("inputs_embeds") is not None
            return
        if not self.fed:
            self._adapters = adapters_of(unwrap_peft(self.model.hf_model))
            self._head_then = (self.head.weight, version_of(self.head.weight))
            self.n_cached = _n_cached(kwargs.get("cache", kwargs.get("past_key_values")))  # renamed in transformers 5
        if self.prompt_ids is None:  # a decoding loop of the user's own
            self._keep_given(ids, kwargs)
        mask = kwargs.get("attention_mask")
        if not self.fed and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == self.n_prompt:
            self.model_inputs.setdefault("attention_mask", mask[:1])  # generate finds out by itself what is padding
        self.fed.append(ids.detach())

    def keep(self, states: Tensor) -> None:
        """One forward made these, `[batch n dim]`. Of several rows the first: they will have to be read again anyway."""
        with torch.no_grad():
            self._is_full = not self._pages.keep(states) or self._is_full
            self._device = states.device

    def end(self) -> None:
        """The block is over; on a GPU, remember when the copies will be there."""
        if self._device is not None and self._device.type == "cuda":  # may not be the current device
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._device))

    def _keep_given(self, ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        self.prompt_ids, self.n_prompts = ids[0].detach(), len(ids)
        self.model_inputs = {
            name: value
            for name, value in kwargs.items()
            if isinstance(value, Tensor)
            and name not in ("input_ids", "position_ids", "cache_position", "labels")
            and (name != "attention_mask" or value.ndim == 2)  # which tokens are padding
        }
        self._input_bytes = sum(value.nbytes for value in self.model_inputs.values())

    @property
    def n_prompt(self) -> int:
        """Tokens it was given."""
        return 0 if self.prompt_ids is None else len(self.prompt_ids)

    # --- afterwards ---

    @property
    def n_bytes(self) -> int:
        """What these states and inputs hold in memory."""
        return self._pages.n_bytes + self._input_bytes

    def attribute(
        self,
        out: Any,
        config: AnyConfig = None,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        prompt: str | Messages | Chat | None = None,
        **changes: Unpack[ConfigChanges],
    ) -> Attribution:
        """Explain what `generate` returned, see `fastattr.pipeline.attribute_captured`."""
        from fastattr.pipeline import attribute_captured

        return attribute_captured(self, out, config, image=image, prompt=prompt, **changes)

    def prompt(self) -> Tensor:
        """Ids `[n]` that the model was given.

        Raises:
            InputError: nothing was captured, it was released, or the model was given `inputs_embeds` or a cache of
                tokens whose ids are unknown.
        """
        if self._embedded:
            raise InputError(
                "the model was fed inputs_embeds, as adapters with virtual tokens (prompt tuning, p-tuning) make them, "
                "expected input_ids: states are read against ids"
            )
        if self.prompt_ids is None or not self.fed:
            raise InputError("nothing was captured: call generate of the captured model inside the with block")
        first = self.fed[0].shape[1]
        if self.n_cached and self.n_cached + first > self.n_prompt:
            raise InputError(
                f"the model's first step read {first} tokens after {self.n_cached} in its cache, but generate was given "
                f"{self.n_prompt} ids: the cache holds tokens that are not known (an earlier turn, or virtual tokens of prefix "
                "tuning); give generate the ids of the whole conversation, or pass it to attribute"
            )
        return self.prompt_ids

    def matches(self, sequence: Tensor) -> bool:
        """Whether the captured steps are exactly `sequence [seq]` without its last token."""
        if any(each.shape[0] != 1 for each in self.fed) or not self.fed:
            return False
        fed = torch.cat(self.fed, dim=1)[0]
        complete = len(fed) == self.n_states == len(sequence) - 1 and not self._is_full
        return complete and torch.equal(fed, sequence[:-1])

    def n_spoken(self, sequence: Tensor) -> int:
        """Length of `sequence [seq]` without the end tokens of its response.

        Raises:
            InputError: the response holds only end tokens.
        """
        start = self.n_prompt
        n = start + self.end_tokens.length(sequence[start:])
        if n == start < len(sequence):
            raise InputError(
                f"{self.model.name} answered nothing but the end tokens {sequence[start:][:5].tolist()}, so there is nothing "
                "to explain"
            )
        return n

    @property
    def head(self) -> OutputHead:
        """The output head that `generate` ran with."""
        return self._reading.head

    def check_head(self) -> None:
        """Check that the model still has the output head that `generate` ran with.

        Raises:
            InputError: it has another one now.
        """
        base = unwrap_peft(self.model.hf_model)
        is_another = self._reading is not self.model.live.reading and not self._reading.holds(base, self.model.config)
        is_written = self._head_then is not None and version_of(self._head_then[0]) != self._head_then[1]
        if is_another or is_written:
            raise InputError(
                "the model's output head changed after generate ran (its weights, adapter, dtype or device), so the captured "
                "states do not belong to it; explain an answer before the model is changed"
            )

    @property
    def n_states(self) -> int:
        """States that were kept."""
        return self._pages.n_rows if self.hidden is None else len(self.hidden)

    def read(self, sequence: Tensor) -> tuple[Tensor, str]:
        """`hidden_states [seq - 1, dim]` of `sequence [seq]`, and `capture` or `replay`.

        Falls back to one forward where the captured steps are not exactly the sequence (beams, assisted decoding, no
        cache, a hook lost to compilation, a full buffer).
        """
        if self._ready is not None:
            self._ready.synchronize()
        if self.matches(sequence):
            hidden = self._pages.read() if self.hidden is None else self.hidden
            return hidden.to(self.head.weight.device), "capture"
        logger.warning(
            "captured %d states where %d are expected; reading them again in one forward",
            self.n_states,
            len(sequence) - 1,
        )
        return self._forward(sequence, self.model_inputs), "replay"

    def read_blank(self, sequence: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """`hidden_states [seq - 1, dim]` of the same tokens with the images blanked to middle grey: one forward.

        Args:
            visuals: the images `generate` was given.

        Raises:
            InputError: images of this size are not what `generate` was given.
        """
        model = self.model
        if (
            model.family.nested and len(self.model_inputs.get("batch_num_images", ())) > 1
        ):  # not given to the processor as one nested list
            model = replace(model, family=replace(model.family, nested=False))
        blank = encode(model, [visual.blank() for visual in visuals], "What is it?").model_inputs
        changed = {  # pixels; a number for each video, as the seconds between its steps, stays what it was
            name: value
            for name, value in blank.items()
            if value.is_floating_point() and value.ndim > 1 and name in self.model_inputs
        }
        differing = [name for name, value in changed.items() if value.shape != self.model_inputs[name].shape]
        if differing or not changed:
            held = ", ".join(f"{name} {list(value.shape)}" for name, value in self.model_inputs.items())
            raise InputError(
                f"blank images of the sizes {[visual.size for visual in visuals]} (height, width) make other inputs than "
                f"generate was given ({held or 'nothing but ids'}); pass the same images, or evidence=False"
            )
        return self._forward(sequence, {**self.model_inputs, **changed})

    def _forward(self, sequence: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """`hidden_states [seq - 1, dim]` of a sequence, on the head's device.

        Raises:
            InputError: other adapters are active than when `generate` ran.
        """
        if self._adapters is not None and self._adapters != adapters_of(unwrap_peft(self.model.hf_model)):
            raise InputError(
                "other adapters are active than when generate ran, or their weights changed, so another forward would give "
                "the states of another model; explain the answer before changing adapters, or set the same adapter again"
            )
        # tensors made under inference mode cannot be written to outside of it
        given = {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}
        last, _ = forward(self.model, sequence[None, :-1], given, -1, interpolate=False)
        return last[0].to(self.head.weight.device)

    def release(self) -> None:
        """Give the memory back; nothing can be read any more."""
        self.hidden, self.fed, self.model_inputs = None, [], {}
        self._give_back()


def _n_cached(cache: Any) -> int:
    """Number of tokens in a cache that is passed to a model."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) else 0  # tuples of keys and values


def captured_reading(
    states: CapturedStates, out: Any, *, visuals: Sequence[Visual], prompt: Prompt | None
) -> tuple[ScaleStates, str]:
    """States and layout of a captured generation, and where they come from (`capture` or `replay`).

    Without `prompt`, every token before the response that is no image and no special token counts as user text.

    Raises:
        InputError: nothing was captured, `out` is not one sequence that begins with the captured prompt, the
            number of images differs from what was captured or some were read into an earlier cache, or the model has
            changed.
        TokenLayoutError: the captured inputs do not fit the model's grids.
    """
    model = states.model
    sequences = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
    if not isinstance(sequences, Tensor):
        raise InputError(f"out is a {type(out).__name__}, expected what generate returned: sequences [1 seq]")
    if sequences.ndim != 2 or sequences.shape[0] != 1:
        raise InputError(
            f"generate returned sequences {list(sequences.shape)}, expected [1 seq]; explain them one at a time"
        )
    prefill = states.prompt()
    if states.n_prompts > 1:
        raise InputError(
            f"generate was given {states.n_prompts} prompts at once, expected one: their images cannot be told apart; use "
            "attribute_batch, or capture one prompt at a time"
        )
    mask = states.model_inputs.get("attention_mask")
    if mask is not None and not bool(mask[0, -1]):
        raise InputError(
            "generate was given a prompt padded behind its end, so that its first token was predicted at padding; pad in "
            "front (padding_side='left')"
        )
    sequence = sequences[0].to(prefill.device)
    start = len(prefill)
    if not torch.equal(sequence[:start], prefill):
        raise InputError(
            f"out holds {len(sequence)} tokens that do not begin with the {start} tokens the captured model was given; "
            "pass what generate returned, with the prompt in front"
        )
    states.check_head()
    try:
        groups, counts = _captured_groups(states, prefill, visuals)
    except FastattrError as error:
        if not states.n_cached:
            raise
        held = ", ".join(f"{name} {list(value.shape)}" for name, value in states.model_inputs.items())
        raise InputError(
            f"generate was given a cache of {states.n_cached} tokens (past_key_values) and {held or 'nothing but ids'}, but not "
            "the pixels of every image in its prompt, which were read in an earlier turn; pass the whole conversation to "
            "fastattr.attribute (messages with all images, and the response ids), or capture a generate that is given all of it and no cache"
        ) from error
    n = states.n_spoken(sequence)
    hidden, source = states.read(sequence)
    sequence, hidden = sequence[:n], hidden[: n - 1]
    if prompt is None:
        special = {*model.processor.tokenizer.all_special_ids, *model.placeholder_ids}
        positions = tuple(i for i, token in enumerate(prefill.tolist()) if token not in special)
    else:
        positions = text_positions(model, as_chat(prompt, len(visuals) or len(counts)), prefill, groups)
    home = sequence.to(states.head.weight.device)  # with a device map it may be another than the embeddings'
    return ScaleStates(hidden, home, TokenLayout(groups, positions, (start, len(sequence)))), source


def _captured_groups(
    states: CapturedStates, prefill: Tensor, visuals: Sequence[Visual]
) -> tuple[tuple[ImageGroup, ...], list[tuple[bool, int]]]:
    """Groups of image tokens of the prompt, and for each image or video whether it is a video and its number of frames.

    Raises:
        InputError: the number or the shape of the images differs from what was captured.
        TokenLayoutError: the captured inputs do not fit the model's grids.
    """
    model = states.model
    ids = prefill.tolist()
    alike = model.film_token_id == model.image_token_id  # then only the processor's inputs tell images from videos
    has_films = model.film_token_id in ids and model.family.watch is not None and (model.takes_videos or not alike)
    films = [has_films and len(visual.frames) > 1 for visual in visuals]
    inputs = {**states.model_inputs, "input_ids": prefill[None]}

    def shown(of_films: bool) -> Shown:
        mine = [visual for visual, film in zip(visuals, films, strict=True) if film == of_films]
        sizes = [visual.size for visual in mine for _ in range(1 if of_films else len(visual.frames))]
        n_frames = [len(visual.frames) for visual in mine] if of_films and visuals else None
        return Shown(model.config, model.processor, inputs, sizes if visuals else None, n_frames)

    videos = video_looks_of(model.family, shown(True)) if has_films and (any(films) or not visuals) else []
    has_images = not all(films) if visuals else model.image_token_id in ids or not videos
    images = looks_of(model.family, shown(False)) if has_images else []
    counts = [(False, 1)] * len(images) + [(True, 0)] * len(videos)
    if visuals:
        counts = [(film, 0 if film else len(v.frames)) for v, film in zip(visuals, films, strict=True)]
        n_images, n_videos = sum(n for _, n in counts), sum(film for film, _ in counts)
        if (n_images, n_videos) != (len(images), len(videos)):
            given = [
                f"{n} images" + (f" and {m} videos" if videos else "")
                for n, m in ((n_images, n_videos), (len(images), len(videos)))
            ]
            raise InputError(
                f"image holds {given[0]}, but generate was given {given[1].removesuffix(' images')}; pass the same, or none"
            )
    groups = group_images(prefill, model, counts, images, videos)
    if model.family.keeps_aspect:
        for number, (visual, group) in enumerate(zip(visuals, groups, strict=False), start=1):
            _check_aspect(number, visual, group)
    return groups, counts


def _check_aspect(number: int, visual: Visual, group: ImageGroup) -> None:
    """Raises `InputError` unless the grid has the aspect ratio of the picture, each side rounded to whole cells."""
    sizing, (height, width) = visual.sizing, visual.size
    if sizing is not None and sizing.height is not None and sizing.width is not None:
        height, width = sizing.height, sizing.width
    _, h, w = group.grid
    if not _has_aspect(h, w, height, width):
        turned = ", but it is that of the picture turned by 90 degrees" if _has_aspect(w, h, height, width) else ""
        raise InputError(
            f"picture {number} has {width} x {height} pixels (width x height), but generate was given a picture of {w} x {h} "
            f"cells, which is not its shape{turned}; pass exactly the picture that the processor was given (fastattr applies the "
            "EXIF orientation of files, as transformers' load_image does and PIL.Image.open does not)"
        )


def _has_aspect(h: int, w: int, height: int, width: int) -> bool:
    """Whether `height x width` scaled by one factor can round, up or down, to `h x w` cells; a side has at least one."""
    sides = ((h, height), (w, width))
    least = max((n - 1) / side if n > 1 else 0.0 for n, side in sides)  # of the factor, in cells per pixel
    most = min((n + 1) / side for n, side in sides)
    return least < most


@contextmanager
def capture(model: Model, *, buffer: StateBuffer = SHARED_BUFFER) -> Iterator[CapturedStates]:
    """Read last-layer states along with the user's own `generate`.

        with fastattr.capture(model) as states:
            out = hf_model.generate(**inputs)
        why = states.attribute(out)

    One block captures one `generate`, so that states can never be those of another image. Threads and tasks may
    capture the same model at the same time: each block sees only what runs in its own context (which
    `asyncio.to_thread` carries along and a bare executor does not). When the last block of a model ends, also by an
    exception, no hook is left behind.

    Args:
        buffer: whose pages the states are copied to; one of 256 MiB on the model's device, shared by the process, if
            not given. Where it is full, states are read again in one forward when they are needed.

    Raises:
        InputError, UnsupportedModelError, StatesError: the model is not wrapped, or cannot be explained as it is now.
    """
    check_model(model)
    base = unwrap_peft(model.hf_model)
    states = CapturedStates(model, buffer)
    outer = _open.get()
    _tap(base)
    _open.set((*outer, (base, states)))
    try:
        yield states
    finally:
        _open.set(outer)
        _untap(base)
        states.end()


# --- hooks on the model, for as long as anyone captures it ------------------------------------------------

_open: ContextVar[tuple[tuple[Any, CapturedStates], ...]] = ContextVar("fastattr_captures", default=())
_taps: dict[int, _Tap] = {}
_lock = threading.Lock()


@dataclass
class _Tap:
    """What was put onto one model.

    Attributes:
        own: the `generate` of the instance that was there before, if any.
        users: blocks that capture it now.
    """

    own: Any
    users: int = 0
    handles: list[Any] = field(default_factory=list)


def _capturing(base: Any) -> list[CapturedStates]:
    """The blocks of this context that capture `base`; none while fastattr itself runs the model."""
    if is_uncaptured():
        return []
    return [states for captured, states in _open.get() if captured is base]


def _tap(base: Any) -> None:
    with _lock:
        tap = _taps.get(id(base))
        if tap is None:
            decoder = decoder_of(base)
            tap = _taps[id(base)] = _Tap(own=base.__dict__.get("generate"))
            generate = base.generate

            def recording(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
                given = {"generation_config": args[0], **kwargs} if args else kwargs
                for states in _capturing(base):
                    states.begin(kwargs.get("input_ids") if inputs is None else inputs, given)
                return generate(inputs, *args, **kwargs)

            def feed(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                for states in _capturing(base):
                    states.feed(kwargs.get("input_ids", args[0] if args else None), kwargs)

            def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
                return (args, all_positions(kwargs)) if _capturing(base) else None

            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                for states in _capturing(base):
                    states.keep(output if isinstance(output, Tensor) else output[0])

            base.generate = recording
            tap.handles = [
                base.register_forward_pre_hook(feed, with_kwargs=True),
                decoder.register_forward_pre_hook(ask, with_kwargs=True),
                decoder.register_forward_hook(keep),
            ]
        tap.users += 1


def _after_fork() -> None:
    """Another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()
    SHARED_BUFFER.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _untap(base: Any) -> None:
    with _lock:
        tap = _taps[id(base)]
        tap.users -= 1
        if tap.users:
            return
        del _taps[id(base)]
        if tap.own is None:
            del base.generate
        else:
            base.generate = tap.own
        for handle in tap.handles:
            handle.remove()
