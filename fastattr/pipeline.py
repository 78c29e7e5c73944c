"""The path of one datum, top to bottom: images, prompt and response in, `Attribution` out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattr import ops
from fastattr.chat import PICTURES, Chat, Messages, Prompt, read_prompt, text_of
from fastattr.config import AnyConfig, ConfigChanges, configure, refuse_compat
from fastattr.errors import InputError
from fastattr.images import ImageLike, Visual, read_visuals
from fastattr.maps import check_head, check_states, log_probs, log_probs_of_all
from fastattr.method import explain_responses, explain_states
from fastattr.msea import base_scale
from fastattr.regions import spread, weigh, windows
from fastattr.targets import Targets, choose_targets
from fastattr.text import Decode, decode_response, decode_tokens, decode_with, show_ids, special_ids_of
from fastattr.types import Attribution, AttributionConfig, OutputHead, ScaleStates, TokenLayout, TokenMaps

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattr.adapters import CapturedStates, Model
    from fastattr.calibration import Calibration

LOW_AGREEMENT = 0.1


def attribute(
    model: Model,
    image: ImageLike | Sequence[ImageLike] | None,
    prompt: str | Messages | Chat,
    response: str | Sequence[int] | Tensor | None = None,
    config: AnyConfig = None,
    *,
    max_new_tokens: int = 256,
    generate_options: Mapping[str, Any] | None = None,
    targets: Targets | None = None,
    memory_limit: int | None = None,
    prompt_ids: Sequence[int] | Tensor | None = None,
    **changes: Unpack[ConfigChanges],
) -> Attribution:
    """Explain every token of a response: where in the images, from which words, seen or made up.

    Args:
        model: from `load` or `wrap`.
        image: a path, PIL image, array or encoded bytes; a list of them for several images; a list
            that holds lists of frames for videos. The path or bytes of a movie (mp4, webm, ...) are a video too, read
            with PyAV. URLs are not fetched. None where the messages hold them. The EXIF orientation is applied to files
            and bytes, and ignored for PIL images and arrays.
        prompt: the user's text, with all images before it. For several turns, images between words, a system prompt or
            tools: messages as chat templates take them, or a `fastattr.Chat`. The texts of all turns are context.
            See `fastattr.parts` for what a part of a message may hold.
        response: text, or token ids that are never re-tokenised; trailing end tokens are dropped. None lets the model
            answer with its own `generate` and `generation_config`, but greedily, with at most `max_new_tokens`.
        config: an `AttributionConfig` or the name of one: `lens`, `tam`, `arc` (the default) or `best`, at other scales as
            in `"tam@1+1.5+2"`. `best` has the most exact maps and takes 50 more forwards per picture.
        generate_options: further arguments of `generate` for the model's own answer: `logits_processor`,
            `stopping_criteria`, `num_beams`, `do_sample=True`, ... What fastattr sets itself is refused.
        targets: explain these tokens alone: `"fields"` for the values of a JSON answer, words, indices, a compiled
            pattern or a function, see `fastattr.targets`. The others keep their scores and have maps of zeros.
        memory_limit: bytes that maps and work may take beside the model and its states, for long answers; maps that do
            not fit lie in a temporary file, see `fastattr.memory`. Not with `regions`.
        prompt_ids: token ids of the prompt, from the engine that generated the response. It is an error if the prompt here
            differs, for example because the engine passed other options to its chat template. A run of image
            placeholders counts as one, since some engines return one per picture.
        **changes: options of `AttributionConfig` that replace those of `config`; `method="best"` is `config="best"`.

    Returns:
        one map per response token and image, on the CPU.

    Raises:
        ImageError, InputError, ScaleError, TokenLayoutError, StatesError, UnsupportedModelError, BackendError.
    """
    from fastattr import adapters

    with adapters.explaining(model):
        chosen = _for_model(configure(config, changes), model)
        return _attribute_rows(
            model,
            [(image, prompt, response)],
            chosen,
            max_new_tokens=max_new_tokens,
            generate_options=generate_options,
            targets=targets,
            memory_limit=memory_limit,
            prompt_ids=[prompt_ids],
        )[0]


def attribute_batch(
    model: Model,
    rows: Iterable[
        tuple[ImageLike | Sequence[ImageLike] | None, str | Messages | Chat, str | Sequence[int] | Tensor | None]
    ],
    config: AnyConfig = None,
    *,
    max_new_tokens: int = 256,
    generate_options: Mapping[str, Any] | None = None,
    targets: Targets | None = None,
    prompt_ids: Sequence[Sequence[int] | Tensor | None] | None = None,
    **changes: Unpack[ConfigChanges],
) -> list[Attribution]:
    """Explain several responses at once: one forward a scale reads all of them, whatever their lengths.

    The results are those of `attribute`, but for the rounding of a forward with others beside it. Give rows of about
    one length together: shorter ones are padded to the longest.

    Args:
        rows: image or images, prompt and response of each, as for `attribute`.
        config: an `AttributionConfig` or the name of one, as for `attribute`.
        generate_options: as for `attribute`, used for every row without a response; the same objects are used for all.
        targets: as for `attribute`, of every row.
        prompt_ids: as for `attribute`, one for each row.
        **changes: options that replace those of `config`, as for `attribute`.

    Returns:
        one attribution a row, in order.

    Raises:
        InputError: there are no rows, or the configuration asks for `compat`.
        ImageError, ScaleError, TokenLayoutError, StatesError, UnsupportedModelError, BackendError: as `attribute`, for
            the first row that is at fault.
    """
    from fastattr import adapters

    with adapters.explaining(model):
        chosen = _for_model(configure(config, changes), model)
        given = list(rows)
        if not given:
            raise InputError("got no rows, expected at least one (image, prompt, response)")
        expected = [None] * len(given) if prompt_ids is None else list(prompt_ids)
        if len(expected) != len(given):
            raise InputError(f"got {len(expected)} prompt_ids for {len(given)} rows, expected one each, or None")
        return _attribute_rows(
            model,
            given,
            chosen,
            max_new_tokens=max_new_tokens,
            generate_options=generate_options,
            targets=targets,
            memory_limit=None,
            prompt_ids=expected,
        )


def _for_model(config: AttributionConfig, model: Model) -> AttributionConfig:
    """The configuration with what it leaves open taken from the model. Raises `InputError`."""
    refuse_compat(config)
    return config.resolve(model.scales, model.head.vocab)


def _attribute_rows(
    model: Model,
    rows: Sequence[tuple[Any, Any, Any]],
    config: AttributionConfig,
    *,
    max_new_tokens: int,
    generate_options: Mapping[str, Any] | None,
    targets: Targets | None,
    memory_limit: int | None,
    prompt_ids: Sequence[Sequence[int] | Tensor | None],
) -> list[Attribution]:
    from fastattr import adapters

    _check_rows(rows, config, max_new_tokens, generate_options, memory_limit)
    ops.resolve(config.backend, model.head.weight.device)  # before the model runs
    given = [read_prompt(image, prompt) for image, prompt, _ in rows]
    visuals, prompts = [seen for seen, _ in given], [prompt for _, prompt in given]
    scales = config.known_scales
    encoded = [adapters.encode_scales(model, seen, prompt, scales) for seen, prompt in given]
    for each, ids in zip(encoded, prompt_ids, strict=True):
        if ids is not None:
            adapters.check_prompt(model, each[0], ids)
    responses = []
    for (seen, prompt), each, (_, _, response) in zip(given, encoded, rows, strict=True):
        if response is None:
            plain = adapters.encode(model, seen, prompt) if 1.0 not in scales else each[scales.index(1.0)]
            responses.append(adapters.generate(model, plain, max_new_tokens=max_new_tokens, options=generate_options))
        else:
            responses.append(adapters.encode_response(model, response))
    chosen: list[tuple[int, ...] | None] = [None] * len(rows)
    if targets is not None:
        decode, special = model.decode, model.marker_ids
        chosen = [
            choose_targets(targets, decode_response(each[0].input_ids.tolist(), ids.tolist(), decode, special))
            for each, ids in zip(encoded, responses, strict=True)
        ]

    by_scale = [
        adapters.replay_batch(model, [each[s] for each in encoded], responses, layer=config.layer)
        for s in range(len(scales))
    ]
    blanked = _blanked(model, visuals, prompts, responses, config) if config.evidence else [None] * len(rows)
    readings = [[read[i] for read in by_scale] for i in range(len(rows))]
    explained = explain_responses(readings, model.head, config, targets=chosen, memory_limit=memory_limit)
    found = []
    for maps, mine, seen, prompt, asked, without in zip(
        explained, readings, visuals, prompts, chosen, blanked, strict=True
    ):
        if config.regions:
            maps = weigh_maps(maps, regional_evidence(model, seen, prompt, mine[0], config.regions))
        found.append(
            finish(
                maps,
                mine,
                config,
                decode=model.decode,
                evidence=None if without is None else maps.log_prob - without,
                visuals=seen,
                prompt=text_of(prompt),
                model=model.name,
                calibration=model.calibration,
                source="replay",
                notes=notes_of(maps, mine[0].layout, config, seen, asked, takes_videos=model.takes_videos)
                + adapters.template_notes(model, prompt),
                targets=asked,
                special_ids=model.marker_ids,
            )
        )
    return found


def _check_rows(
    rows: Sequence[tuple[Any, Any, Any]],
    config: AttributionConfig,
    max_new_tokens: int,
    generate_options: Mapping[str, Any] | None,
    memory_limit: int | None,
) -> None:
    """Raises `InputError` for options that are out of range or do not fit the rows."""
    check_length(max_new_tokens)
    wrong = [len(row) for row in rows if len(row) != 3]
    if wrong:
        raise InputError(f"a row holds {wrong[0]} values, expected three: image, prompt and response (or None)")
    if config.regions and memory_limit is not None:
        raise InputError(f"regions={config.regions} weighs all maps at once; leave memory_limit out, or use regions=0")
    if generate_options is not None and all(response is not None for _, _, response in rows):
        raise InputError(
            "generate_options are for the model's own answer, but every response was given; leave generate_options out, or "
            "pass None as a response"
        )


def check_length(max_new_tokens: int) -> None:
    """Raises `InputError` unless this can be the length of an answer."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}, expected a whole number of at least 1")


def attribute_states(
    hidden_states: Tensor | Sequence[Tensor],
    output_embeddings: Tensor | OutputHead,
    input_ids: Tensor | Sequence[Tensor],
    layout: TokenLayout | Sequence[TokenLayout],
    config: AnyConfig = None,
    *,
    memory_limit: int | None = None,
    tokenizer: Any = None,
    image: ImageLike | Sequence[ImageLike] | None = None,
    **changes: Unpack[ConfigChanges],
) -> Attribution:
    """Explain from the tensors of any engine, without its model, and so without evidence.

    Args:
        hidden_states: `[seq - 1 dim]` (or `[seq dim]`), last layer after the final norm, exactly what the
            output head consumes; one for each scale where there are several.
        output_embeddings: `[vocab dim]`, or an `OutputHead` with bias, scale and soft-cap.
        input_ids: int `[seq]`, prompt then response; one for each scale.
        layout: which positions are what; one for each scale.
        config: an `AttributionConfig` or the name of one, `tam` by default. It must name the scales of the states, as
            `arc@1` does.
        tokenizer: for token texts; ids are shown without one.
        image: pictures for overlays; maps are the same without them.
        **changes: options that replace those of `config`, as for `attribute`. `compat="tam"` reproduces the reference
            implementation with its quirks.

    Raises:
        StatesError, TokenLayoutError, InputError: something does not fit, or the configuration needs the model; the
            message says what.
    """
    chosen = replace(configure(config, changes, default="tam"), evidence=False)
    if changes.get("evidence"):
        raise InputError("evidence=True needs a forward of the model with the images blanked; use attribute")
    _refuse_without_model(chosen, "use attribute, or leave it out")
    if chosen.scales is None:
        raise InputError(
            "scales is None, the model's own, but there is no model here; name the scales of the states, for one scale "
            "config='arc@1' or scales=(1.0,)"
        )
    scales = chosen.scales
    every = [_as_list(value) for value in (hidden_states, input_ids, layout)]
    if {len(each) for each in every} != {len(scales)}:
        raise InputError(
            f"got {len(every[0])} hidden_states, {len(every[1])} input_ids and {len(every[2])} layouts for "
            f"{len(scales)} scales {scales}, expected one of each a scale"
        )
    readings = [ScaleStates(h, i, la, s) for h, i, la, s in zip(*every, scales, strict=True)]
    head = output_embeddings if isinstance(output_embeddings, OutputHead) else OutputHead(output_embeddings)
    check_states(readings[0], head)  # shapes and devices first
    check_head(head)
    chosen = chosen.resolve(scales, head.vocab)
    maps = explain_states(readings, head, chosen, memory_limit=memory_limit)
    visuals = () if image is None else read_visuals(image)
    if visuals and len(visuals) != len(maps.image):
        raise InputError(
            f"got {len(visuals)} images for a layout with {len(maps.image)} image groups, expected one each"
        )
    decode = show_ids if tokenizer is None else decode_with(tokenizer)
    return finish(
        maps,
        readings,
        chosen,
        decode=decode,
        visuals=visuals,
        source="states",
        notes=notes_of(maps, readings[0].layout, chosen, visuals),
        special_ids=() if tokenizer is None else special_ids_of(tokenizer),
    )


def attribute_captured(
    states: CapturedStates,
    out: Any,
    config: AnyConfig = None,
    *,
    image: ImageLike | Sequence[ImageLike] | None = None,
    prompt: str | Messages | Chat | None = None,
    **changes: Unpack[ConfigChanges],
) -> Attribution:
    """Explain what a captured `generate` returned, at the one scale the model saw, without another forward.

    For several scales, call `attribute` with the image, the prompt and the response ids.

    Args:
        states: from `capture`.
        out: the sequence `[1 seq]` or the output object of `generate`; its end tokens are not explained.
        image: pictures for overlays and evidence, exactly as the processor was given them: `PIL.Image.open` ignores the
            EXIF orientation of a file, while fastattr applies it to a path.
        prompt: the user's text, or the messages, to tell them from the chat template.
        config: an `AttributionConfig` or the name of one, `arc@1` by default; scales left open mean the captured
            one. Its `evidence` is ignored, since that takes a forward: pass `evidence=True` as an option.
        **changes: options that replace those of `config`, as for `attribute`. `evidence=True` runs one forward of the
            same tokens with the image blanked and needs `image`.

    Raises:
        InputError: nothing was captured, `out` holds several sequences, `image` is not what `generate` was given, or the
            configuration asks for more than was captured (other scales, another layer, `regions` or `compat`), or the
            model has changed since.
        TokenLayoutError: the captured inputs do not fit the model's grids.
    """
    from fastattr.adapters import captured_reading, explaining, template_notes

    evidence = bool(changes.get("evidence", False))
    chosen = replace(configure(config, changes, default="arc@1"), evidence=evidence)
    instead = "use attribute with the image, the prompt and the response ids, or leave it out"
    refuse_compat(chosen)
    _refuse_without_model(chosen, instead)
    chosen = chosen.resolve((1.0,), states.model.head.vocab)
    if chosen.scales != (1.0,):
        raise InputError(
            f"scales are {chosen.scales}, but only the scale that the model saw, 1, was captured; {instead}"
        )
    visuals, said = _captured_prompt(image, prompt)
    if evidence and not visuals:
        raise InputError("evidence=True blanks the images, so pass the same as image= that generate was given")
    with explaining(states.model):
        reading, source = captured_reading(states, out, visuals=visuals, prompt=said)
        maps = explain_states([reading], states.head, chosen)
        seen = None
        if evidence:
            blanked = replace(reading, hidden_states=states.read_blank(reading.input_ids, visuals))
            seen = maps.log_prob - log_probs(blanked, states.head).cpu()
    notes = notes_of(maps, reading.layout, chosen, visuals, takes_videos=states.model.takes_videos)
    notes += () if said is None else template_notes(states.model, said)
    if not visuals and not states.model.family.resized:
        notes += (
            "the images were not given, so where their processor crops, the part that the maps cover is not known",
        )
    if said is None:
        notes += ("the prompt was not given, so every word of the chat template counts as context",)
    if source == "replay":
        notes += ("the captured steps were not exactly the sequence, so its states were read again in one forward",)
    return finish(
        maps,
        [reading],
        chosen,
        decode=states.model.decode,
        evidence=seen,
        visuals=visuals,
        prompt="" if said is None else text_of(said),
        model=states.model.name,
        calibration=states.model.calibration,
        source=source,
        notes=notes,
        special_ids=states.model.marker_ids,
    )


def _refuse_without_model(config: AttributionConfig, instead: str) -> None:
    """Raises `InputError` where the configuration needs another layer's states or more forwards."""
    if config.regions:
        raise InputError(
            f"regions={config.regions} hides parts of the images and needs more forwards of the model; {instead}"
        )
    if config.layer != -1:
        raise InputError(f"layer={config.layer}, but the states are those of the last layer, -1; {instead}")


def _captured_prompt(image: Any, prompt: Any) -> tuple[tuple[Visual, ...], Prompt | None]:
    """Pictures and prompt of a captured `generate`, of which neither need be given."""
    if prompt is None or (image is None and isinstance(prompt, str)):
        return () if image is None else read_visuals(image), prompt
    if image is None:  # messages may tell what was said and not hold the pictures
        chat = prompt if isinstance(prompt, Chat) else Chat(tuple(prompt))
        if not any(part.get(part["type"]) is not None for part in chat.parts if part["type"] in PICTURES):
            return (), chat
    return read_prompt(image, prompt)


def read_states(
    model: Model, images: Sequence[Visual], prompt: Prompt, response_ids: Tensor, *, scale: float = 1.0, layer: int = -1
) -> ScaleStates:
    """Encode and replay once: the states of one scale and layer."""
    from fastattr import adapters

    return adapters.replay(model, adapters.encode(model, images, prompt, scale=scale), response_ids, layer=layer)


def explain_readings(
    model: Model,
    visuals: Sequence[Visual],
    prompt: Prompt,
    readings: Sequence[ScaleStates],
    config: AttributionConfig,
) -> TokenMaps:
    """`explain_states`, and the model asked again where the configuration says so (`regions`).

    Args:
        readings: one for each scale of `config.scales`, of these images, this prompt and one response.
    """
    maps = explain_states(readings, model.head, config)
    if not config.regions:
        return maps
    return weigh_maps(maps, regional_evidence(model, visuals, prompt, readings[0], config.regions))


def weigh_maps(maps: TokenMaps, falls: Sequence[Tensor]) -> TokenMaps:
    """The same maps, weighed by what `regional_evidence` found."""
    grids = [(t, h, w) for _, t, h, w in (each.shape for each in maps.image)]
    return replace(maps, image=weigh(maps.image, [spread(each, grid) for each, grid in zip(falls, grids, strict=True)]))


def regional_evidence(
    model: Model, visuals: Sequence[Visual], prompt: Prompt, reading: ScaleStates, n: int
) -> tuple[Tensor, ...]:
    """What every target falls by as windows of each image are hidden, the other images left as they are.

    Args:
        reading: any reading of these images, for its response and what its grids cover.
        n: cells a side, see `fastattr.regions`.

    Returns:
        for each image `[target window]` in nats, at least 0, on the CPU.
    """
    from fastattr import adapters

    hidden = (  # one after the other, so that few of them are in memory
        [*visuals[:i], visuals[i].hide(box), *visuals[i + 1 :]]
        for i, group in enumerate(reading.layout.images)
        for box in windows(n, group.extent)
    )
    log_prob = adapters.log_probs_of_images(model, chain([visuals], hidden), prompt, reading.target_ids)
    falls = (log_prob[0] - log_prob[1:]).clamp_(min=0).T  # [target image*window]
    return falls.contiguous().split((n + 1) ** 2, dim=1)


# --- the last steps --------------------------------------------------------------------------------


def _blanked(
    model: Model,
    visuals: Sequence[Sequence[Visual]],
    prompts: Sequence[Prompt],
    responses: Sequence[Tensor],
    config: AttributionConfig,
) -> list[Tensor]:
    """Log-probability in nats of every target of each row with its images blanked, `[target]`: one more forward."""
    from fastattr import adapters

    scales = config.known_scales
    scale = scales[base_scale(scales)]  # the scale maps.log_prob was read at
    encoded = [
        adapters.encode(model, [visual.blank() for visual in seen], prompt, scale=scale)
        for seen, prompt in zip(visuals, prompts, strict=True)
    ]
    return [each.cpu() for each in log_probs_of_all(adapters.replay_batch(model, encoded, responses), model.head)]


def finish(
    maps: TokenMaps,
    readings: Sequence[ScaleStates],
    config: AttributionConfig,
    *,
    decode: Decode,
    visuals: Sequence[Visual],
    source: str,
    notes: tuple[str, ...],
    evidence: Tensor | None = None,
    prompt: str = "",
    model: str = "",
    calibration: Calibration | None = None,
    targets: Sequence[int] | None = None,
    special_ids: Collection[int] = (),
) -> Attribution:
    layout, ids = readings[0].layout, readings[0].input_ids.tolist()
    start, stop = layout.response
    response = decode_response(ids[:start], ids[start:stop], decode, special_ids)
    prompt_tokens = decode_tokens([ids[position] for position in layout.prompt], decode).tokens
    return Attribution(
        response=response.text,
        tokens=response.tokens,
        token_ids=tuple(ids[start:stop]),
        spans=response.spans,
        context_tokens=prompt_tokens + response.tokens,
        image=maps.image,
        context=maps.context,
        relevance=maps.relevance,
        evidence=evidence,
        log_prob=maps.log_prob,
        agreement=maps.agreement,
        raw_range=maps.raw_range,
        residual=maps.residual,
        degenerate=maps.degenerate,
        config=config,
        grids=tuple(tuple(group.grid for group in reading.layout.images) for reading in readings),
        extents=tuple(group.extent for group in layout.images),
        pictures=tuple(visual.display() for visual in visuals),
        picture_sizes=tuple(visual.size for visual in visuals),
        prompt=prompt,
        model=model,
        source=source,
        backend=maps.backend,
        notes=notes,
        versions=_versions(maps.backend),
        calibration=calibration,
        explained=None if targets is None else _mask(targets, stop - start),
        special=response.special,
        reasoning=response.reasoning,
    )


def _mask(targets: Sequence[int], n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[list(targets)] = True
    return mask


def _versions(backend: str) -> tuple[tuple[str, str], ...]:
    names = ("fastattr", "torch", "triton") if backend == "triton" else ("fastattr", "torch")
    return tuple((name, _version(name)) for name in names)


@cache
def _version(name: str) -> str:  # reading a package's metadata takes milliseconds
    try:
        return version(name)
    except PackageNotFoundError:  # imported from a source tree
        return "not installed"


def notes_of(
    maps: TokenMaps,
    layout: TokenLayout,
    config: AttributionConfig,
    visuals: Sequence[Visual],
    targets: Sequence[int] | None = None,
    *,
    takes_videos: bool = False,
) -> tuple[str, ...]:
    notes: list[str] = []
    if targets is not None:
        notes.append(f"{len(targets)} of {len(maps.log_prob)} tokens were asked for; the others have no map")
    notes += dict.fromkeys(note for visual in visuals for note in visual.notes)
    shown = list(zip(visuals, layout.images, strict=True)) if visuals else []
    films = [(len(visual.frames), group.grid[0]) for visual, group in shown if len(visual.frames) > 1]
    if films and not takes_videos:
        notes.append("videos were shown to the model as their frames, one image each")
    notes += [f"a video of {frames} frames is read in {steps} time steps" for frames, steps in films if steps < frames]
    for i, group in enumerate(layout.images, start=1):
        if len(group.views) > 1:
            which = "the picture" if len(layout.images) == 1 else f"picture {i}"
            notes.append(f"the model reads {which} in {len(group.views)} views, tiles and the whole, put together here")
    for s, scale in enumerate(config.known_scales):
        low = int((maps.agreement[:, s] < LOW_AGREEMENT).sum())
        if low:
            notes.append(
                f"at scale {scale:g} the model is less than {LOW_AGREEMENT:.0%} as likely to say {low} of the tokens"
            )
    flat = int(maps.degenerate.sum())
    if flat:
        notes.append(f"{flat} tokens have no map: all their scores are equal")
    return tuple(notes)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
