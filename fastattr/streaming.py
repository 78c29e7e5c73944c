"""Explanations while a response is being written, token by token, equal to those of the whole."""

from __future__ import annotations

import operator
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattr import ops
from fastattr.arc import rank, rank_and_score
from fastattr.chat import Chat, Messages, Prompt, read_prompt, text_of
from fastattr.config import AnyConfig, ConfigChanges, configure, name_of, refuse_compat
from fastattr.errors import InputError
from fastattr.images import ImageLike, Visual
from fastattr.maps import check_finite, check_ids, image_activations, is_degenerate, log_prob_of
from fastattr.method import Block, Shared, explain_block
from fastattr.msea import base_scale, common_grids, scale_weights
from fastattr.pipeline import check_length, finish, notes_of
from fastattr.text import TextPieces
from fastattr.types import Attribution, AttributionConfig, ScaleStates, TokenMaps

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattr.adapters import Decoder, Model


@dataclass(frozen=True, eq=False)
class Step:
    """One token, explained when it was said.

    Attributes:
        index: in the response, from 0.
        text: what it adds; empty while a character is not complete.
        image: for each image `[t h w]` in [0, 1].
        context: `[context]` in [0, 1], the user's text and the response so far, this token included.
        relevance: `[context]`, or None but for ARC.
        log_prob: nats.
        evidence: nats, or None.
        agreement: `[scale]`.
    """

    index: int
    token_id: int
    text: str
    image: tuple[Tensor, ...]
    context: Tensor
    relevance: Tensor | None
    log_prob: float
    evidence: float | None
    agreement: Tensor


class TokenStream:
    """A `streamer=` for `generate` of transformers, whose tokens can be explained as they come.

        tokens = fastattr.TokenStream()
        threading.Thread(target=hf_model.generate, kwargs={**inputs, "streamer": tokens}).start()
        for step in fastattr.stream(model, image, prompt, tokens): ...

    One sequence at a time; beams and several sequences are refused by transformers itself.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first the prompt, which is left out, then every token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token_id in value.flatten().tolist():
            self._queue.put(token_id)

    def end(self) -> None:
        """Called by `generate` at the end; call it yourself where `generate` fails."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token_id := self._queue.get()) is not None:
            yield token_id


def stream(
    model: Model,
    image: ImageLike | Sequence[ImageLike] | None,
    prompt: str | Messages | Chat,
    tokens: Iterable[int] | None = None,
    config: AnyConfig = None,
    *,
    max_new_tokens: int = 256,
    generate_options: Mapping[str, Any] | None = None,
    prompt_ids: Sequence[int] | Tensor | None = None,
    **changes: Unpack[ConfigChanges],
) -> Stream:
    """Explain a response while it is being written.

        for step in fastattr.stream(model, image, prompt):
            print(step.text, step.evidence)

    Every scale, and the blanked image where evidence is asked for, is read on with the model's own cache: one forward of
    one token each. The rest is the work of one target: proportional to image tokens and context for its map, and to
    their product for what context is removed from it.

    The model's own answer is the one `attribute` explains. `generate` runs in a thread, and only while the next token is
    waited for; the thread ends when the stream is exhausted, closed or garbage-collected. With beams, a static cache,
    `max_time` or a `custom_generate` the whole answer is generated first, and then explained token by token.

    Args:
        tokens: ids from any engine, as they are generated; a `TokenStream` takes them from `generate`. Trailing end tokens
            are dropped. None lets the model answer, with at most `max_new_tokens`.
        config: an `AttributionConfig` or the name of one, as for `attribute`; without `regions` and `compat`, so not `best`.
        generate_options: as for `attribute`.
        prompt_ids: as for `attribute`.
        **changes: options that replace those of `config`, as for `attribute`.

    Raises:
        InputError: the configuration needs the whole response, `generate_options` are wrong, or tokens were given with
            them.
        ImageError, ScaleError, TokenLayoutError, UnsupportedModelError, BackendError: as `attribute`.
    """
    from fastattr import adapters

    adapters.check_model(model)
    chosen = configure(config, changes)
    check_streamable(chosen)
    chosen = chosen.resolve(model.scales, model.head.vocab)
    check_length(max_new_tokens)
    _check_tokens(tokens)
    if tokens is not None and generate_options is not None:
        raise InputError(
            "generate_options are for the model's own answer, but tokens were given; leave out one of them"
        )
    with torch.inference_mode(False), torch.no_grad():
        return Stream(model, *read_prompt(image, prompt), tokens, chosen, max_new_tokens, generate_options, prompt_ids)


def _check_tokens(tokens: Any) -> None:
    if isinstance(tokens, str) or not (tokens is None or isinstance(tokens, Iterable)):
        what = "text" if isinstance(tokens, str) else f"a {type(tokens).__name__}"
        raise InputError(f"tokens is {what}, expected token ids as they are said; attribute explains a whole response")


def _token_id(index: int, token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError as error:
        raise InputError(f"token {index} is {token!r}, expected a token id") from error


def check_streamable(config: AttributionConfig) -> None:
    """Raises `InputError` where a configuration needs the whole response, or is for `attribute_states` alone."""
    if config.regions:
        raise InputError(
            f"{name_of(config)} needs the whole response (regions={config.regions}), so it cannot be explained token by token; "
            "use another method, such as arc, or explain the finished response"
        )
    refuse_compat(config)


class Stream:
    """Iterates over the steps of a response; see `stream`. At any time `attribution()` is what came so far."""

    def __init__(
        self,
        model: Model,
        visuals: Sequence[Visual],
        prompt: Prompt,
        tokens: Iterable[int] | None,
        config: AttributionConfig,
        max_new_tokens: int,
        generate_options: Mapping[str, Any] | None,
        prompt_ids: Sequence[int] | Tensor | None,
    ) -> None:
        from fastattr.adapters import (
            Decoder,
            Rows,
            acting,
            check_prompt,
            encode,
            encode_scales,
            end_tokens,
            generate_steps,
        )

        self._acting = acting(model.hf_model, model.head)
        self._model, self._visuals, self._prompt, self._config = model, tuple(visuals), prompt, config
        self._backend = ops.resolve(config.backend, model.head.weight.device)
        self._scales = scales = config.known_scales
        self._base = base_scale(scales)
        encoded = encode_scales(model, visuals, prompt, scales)
        if prompt_ids is not None:
            check_prompt(model, encoded[0], prompt_ids)
        if tokens is None:
            plain = encoded[scales.index(1.0)] if 1.0 in scales else encode(model, visuals, prompt)
            self._tokens = generate_steps(model, plain, max_new_tokens=max_new_tokens, options=generate_options)
        else:
            self._tokens = end_tokens(model).cut(_token_id(i, each) for i, each in enumerate(tokens))
        self._decoders = [Decoder(model, each, layer=config.layer) for each in encoded]
        self._blank: Decoder | None = None
        if config.evidence:
            scale = scales[self._base]
            self._blank = Decoder(model, encode(model, [visual.blank() for visual in visuals], prompt, scale=scale))
        self._ids: list[int] = []
        self._pieces = TextPieces(model.decode)
        self._found: list[Block] = []
        self._evidence: list[float] = []
        self._unfed: int | None = None

        # what the user's text lights up and predicts; every token adds a row
        n_prompt = len(encoded[0].prompt)
        readings = self._readings(placeholder=True)
        self._grids = common_grids([reading.layout for reading in readings])
        head, before = model.head, slice(0, n_prompt)
        self._lit = [Rows(image_activations(reading, head, before)) for reading in readings]
        base_prompt = torch.tensor(encoded[self._base].prompt, dtype=torch.long, device=model.head.weight.device)
        last = self._decoders[self._base]
        states = last.hidden_states if last.last_states is None else last.last_states
        self._ranked = None
        if config.method == "arc":
            self._ranked = Rows(rank(states[base_prompt], head, config.known_top_k, self._backend)[0])
        self._log_prob: Rows | None = None
        self._weights: Rows | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        from fastattr.adapters import acting

        if acting(self._model.hf_model, self._model.head) != self._acting:
            raise InputError(
                "the model was changed since the stream began (training mode, adapter or weights), so that what it reads now "
                "does not belong to what it read before; stream anew, or change it between streams"
            )
        token_id = next(self._tokens)
        check_ids(torch.tensor([token_id], device="cpu"), self._model.head)
        if token_id in self._model.placeholder_ids:
            raise InputError(f"token {len(self._ids)} is the image placeholder (id {token_id}), which is never said")
        self._feed_last()
        self._ids.append(token_id)
        return self._explain(token_id)

    def close(self) -> None:
        """End the model's answer here. `attribution()` still returns what came so far."""
        self._tokens.close()

    @torch.inference_mode(False)
    @torch.no_grad()
    def attribution(self) -> Attribution:
        """Everything so far as one attribution.

        Raises:
            InputError: nothing was said yet.
        """
        from fastattr.adapters import template_notes

        if not self._ids or self._log_prob is None:
            raise InputError("nothing was said yet, so there is nothing to explain; iterate over the stream first")
        found, n_context = self._found, self._found[-1].context.shape[1]

        def square(rows: Sequence[Tensor]) -> Tensor:
            return torch.stack([torch.nn.functional.pad(row[0], (0, n_context - row.shape[1])) for row in rows]).cpu()

        log_prob = self._log_prob.all
        readings = self._readings()
        raw_range = torch.cat([each.raw_range for each in found]).cpu()
        relevances = [each.relevance for each in found if each.relevance is not None]
        maps = TokenMaps(
            image=tuple(torch.cat([each.image[i] for each in found]).cpu() for i in range(len(self._grids))),
            context=square([each.context for each in found]),
            relevance=square(relevances) if relevances else None,
            log_prob=log_prob[:, self._base].cpu(),
            agreement=(log_prob - log_prob[:, [self._base]]).exp().cpu(),
            raw_range=raw_range,
            residual=torch.cat([each.residual for each in found]).cpu(),
            degenerate=is_degenerate(raw_range),
            backend=self._backend,
        )
        return finish(
            maps,
            readings,
            self._config,
            decode=self._model.decode,
            evidence=torch.tensor(self._evidence, dtype=torch.float32, device="cpu") if self._config.evidence else None,
            visuals=self._visuals,
            prompt=text_of(self._prompt),
            model=self._model.name,
            calibration=self._model.calibration,
            source="replay",
            notes=notes_of(maps, readings[0].layout, self._config, self._visuals, takes_videos=self._model.takes_videos)
            + template_notes(self._model, self._prompt),
            special_ids=self._model.marker_ids,
        )

    # --- one token --------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _explain(self, token_id: int) -> Step:
        model, config, index = self._model, self._config, len(self._ids) - 1
        log_prob, ranking, blank_log_prob = self._predicted(token_id)
        agreement = (log_prob - log_prob[:, [self._base]]).exp()
        self._log_prob = self._grown(self._log_prob, log_prob)
        self._weights = self._grown(self._weights, scale_weights(agreement, config))
        if self._ranked is not None and ranking is not None:
            self._ranked.add(ranking)
        readings = self._readings()
        n_context = len(readings[0].layout.context)
        for lit, reading in zip(self._lit, readings, strict=True):
            lit.add(image_activations(reading, model.head, slice(n_context - 1, n_context)))
        shared = Shared(
            readings=readings,
            head=model.head,
            config=config,
            backend=self._backend,
            base=self._base,
            grids=self._grids,
            ranked=None if self._ranked is None else self._ranked.all,
            log_prob=self._log_prob.all,
            agreement=agreement,
            weights=self._weights.all,
            lit=tuple(lit.all for lit in self._lit),
        )
        found = explain_block(shared, slice(index, index + 1))
        check_finite(log_prob=log_prob, maps=found.raw_range)
        found = replace(
            found,
            image=tuple(each.cpu() for each in found.image),
            context=found.context.cpu(),
            relevance=None if found.relevance is None else found.relevance.cpu(),
        )
        self._found.append(found)
        evidence = None
        if blank_log_prob is not None:
            evidence = float(log_prob[0, self._base] - blank_log_prob)
            self._evidence.append(evidence)
        self._unfed = token_id
        return Step(
            index=index,
            token_id=token_id,
            text=self._pieces.add(token_id),
            image=tuple(each[0] for each in found.image),
            context=found.context[0],
            relevance=None if found.relevance is None else found.relevance[0],
            log_prob=float(log_prob[0, self._base]),
            evidence=evidence,
            agreement=agreement[0].cpu(),
        )

    def _feed_last(self) -> None:
        """Read on, once there is a next token to predict: the last one of a response is never fed."""
        if self._unfed is None:
            return
        for each in self._all_decoders:
            each.feed(self._unfed)
        self._unfed = None

    def _predicted(self, token_id: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the model predicted for the next token at every scale, in one pass over the vocabulary.

        Returns:
            log-probabilities of the token in nats `[1 scale]`; for ARC the ids ranked highest at the base scale `[1 k]`;
            and with evidence its log-probability with the images blanked, a scalar.
        """
        head, config = self._model.head, self._config
        states = torch.cat([each.next_state for each in self._all_decoders])
        ids = torch.full((len(states),), token_id, device=states.device)
        ranking = None
        if self._ranked is None:
            log_prob = log_prob_of(states, head, ids)
        else:
            ranked, log_prob = rank_and_score(states, head, ids, config.known_top_k, self._backend)
            ranking = ranked[[self._base]]
        n_scales = len(self._decoders)
        return log_prob[None, :n_scales], ranking, None if self._blank is None else log_prob[n_scales]

    # --- what it needs ------------------------------------------------------------------------------------

    @property
    def _all_decoders(self) -> list[Decoder]:
        """One for each scale, then the one of the blanked images if there is one."""
        return self._decoders if self._blank is None else [*self._decoders, self._blank]

    def _readings(self, *, placeholder: bool = False) -> tuple[ScaleStates, ...]:
        """The readings so far.

        Args:
            placeholder: as if one token had been said, for what concerns the prompt alone.
        """
        said = [0] if placeholder else self._ids
        readings = []
        for decoder, scale in zip(self._decoders, self._scales, strict=True):
            prompt = decoder.encoded.input_ids
            ids = torch.cat([prompt, torch.tensor(said, dtype=prompt.dtype, device=prompt.device)])
            stop = len(ids) - 1
            last = decoder.last_states
            readings.append(
                ScaleStates(
                    decoder.hidden_states[:stop],
                    ids,
                    decoder.encoded.layout(len(said)),
                    scale,
                    last_states=None if last is None else last[:stop],
                )
            )
        return tuple(readings)

    def _grown(self, rows: Any, new: Tensor) -> Any:
        from fastattr.adapters import Rows

        if rows is None:
            return Rows(new)
        rows.add(new)
        return rows
