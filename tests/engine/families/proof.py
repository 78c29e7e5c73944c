"""What it takes for a family to count as proven: the same steps for every row of the table.

A row is a tiny random model of the real transformers class with its real processing. The oracles are the model's own
ordinary forward, its own `generate`, and its own input embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fastattr
from fastattr import adapters
from fastattr.adapters.hooks import decoder_of, interpolated_positions
from fastattr.chat import Chat
from fastattr.images import read_visuals
from fastattr.maps import class_activations
from fastattr.types import ImageGroup
from fastattr.views import place
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture

Views = list[tuple[int, int]]  # (h, w) of every look at one picture, in the order of the text


@dataclass(frozen=True)
class Row:
    """One family to prove.

    Attributes:
        model_type: of the configuration.
        make: the model and the processor that goes with it.
        views: by hand, of a picture of 67 x 91 (height x width) pixels.
        grid: by hand, the `(t, h, w)` of its map.
        scales: that can be shown.
        video: videos are read as videos.
        stood_in: a part that could not be built without more packages and was replaced, for the table.
        last_good: the last release of transformers whose class runs by itself, where the newest does not; the row is then
            proven with a mended one.
    """

    model_type: str
    make: Callable[[], Tiny]
    views: Views
    grid: tuple[int, int, int]
    scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    video: bool = False
    stood_in: str = ""
    last_good: str = ""


def wrap(row: Row) -> fastattr.Model:
    held = row.make()
    assert held.hf_model.config.model_type == row.model_type
    return fastattr.wrap(held.hf_model, held.processor)


def prove(row: Row) -> None:
    """Everything, of one model."""
    model = wrap(row)
    prove_layout(row, model)
    prove_states(row, model)
    prove_words(model)
    prove_capture(model)
    prove_other_ways(model, [picture(), picture(101, 58), picture(seed=3)])
    prove_maps(row, model)
    for height, width in ((67, 91), (101, 58)):
        for scale in row.scales:
            prove_places(model, height, width, scale)
    if row.video:
        prove_video(model)


def read(model: fastattr.Model, image: Any = None, scale: float = 1.0) -> tuple[adapters.EncodedExample, Tensor]:
    """An encoded example and response ids."""
    visuals = read_visuals(picture() if image is None else image)
    return adapters.encode(model, visuals, PROMPT, scale=scale), adapters.encode_response(model, ANSWER)


def prove_layout(row: Row, model: fastattr.Model) -> None:
    """As many tokens as the hand-made grids say, all of them placeholders; the prompt is the user's text and no more."""
    encoded, response = read(model)
    (group,) = encoded.groups
    found = [view.grid for view in group.views] or [group.grid[1:]]
    assert found == row.views
    assert group.grid == row.grid
    assert len(group.positions) == sum(math.prod(view) for view in row.views)
    assert (encoded.input_ids[list(group.positions)] == model.image_token_id).all()
    words = model.processor.tokenizer.decode(encoded.input_ids[list(encoded.prompt)])
    assert words.strip() == PROMPT
    assert encoded.layout(len(response)).response == (len(encoded.input_ids), len(encoded.input_ids) + len(response))


def prove_words(model: fastattr.Model) -> None:
    """Labels before pictures are found, although what is written for pictures holds the same characters."""
    for labels in (("1", "2"), ("image", "row"), ("a", "a")):
        parts: list[Any] = []
        for label in labels:
            parts += [{"type": "text", "text": label}, {"type": "image"}]
        chat = Chat([{"role": "user", "content": [*parts, {"type": "text", "text": PROMPT}]}])
        encoded = adapters.encode(model, read_visuals([picture(), picture(seed=1)]), chat)
        first, second = ((min(group.positions), max(group.positions)) for group in encoded.groups)
        between = [(-1, first[0]), (first[1], second[0]), (second[1], len(encoded.input_ids))]
        said = [[at for at in encoded.prompt if low < at < high] for low, high in between]
        words = ["".join(model.processor.tokenizer.decode(encoded.input_ids[each]).split()) for each in said]
        expected = [*labels, "".join(PROMPT.split())]
        # one processor puts all pictures first
        assert words in (expected, ["", "", "".join(expected)]), f"{labels}: {words}"
        special = {*model.processor.tokenizer.all_special_ids, *model.placeholder_ids}
        assert not special & set(encoded.input_ids[list(encoded.prompt)].tolist())


def prove_states(row: Row, model: fastattr.Model) -> None:
    """Replay reads what an ordinary forward gives, and states times output embeddings are the model's own logits."""
    for scale in row.scales:
        encoded, response = read(model, scale=scale)
        states = adapters.replay(model, encoded, response)
        fed = torch.cat([encoded.input_ids, response])[None, :-1]
        inputs = dict(encoded.model_inputs)
        for name in inputs:
            if name.endswith("token_type_ids"):
                inputs[name] = nn.functional.pad(inputs[name], (0, len(response) - 1), value=model.family.answer_type)
        scaled = model.family.interpolates and scale != 1.0
        with torch.no_grad(), interpolated_positions(model.hf_model, scaled):
            out = model.hf_model(
                input_ids=fed, attention_mask=torch.ones_like(fed), **inputs, output_hidden_states=True
            )
        last = out.hidden_states[-1]
        if last.ndim == 3:  # Gemma 3n keeps several streams a layer, which are joined behind the last one
            torch.testing.assert_close(states.hidden_states, last[0], rtol=1e-4, atol=1e-4)
        ours = class_activations(states.hidden_states, model.head, torch.arange(len(model.head.weight))).T
        torch.testing.assert_close(ours, out.logits[0].relu(), rtol=1e-4, atol=1e-4)


def prove_capture(model: fastattr.Model) -> None:
    """What is seen during the model's own `generate` is what replay of its answer gives."""
    encoded, _ = read(model)
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=6, suppress_tokens=never)
    why = states.attribute(out, image=picture(), prompt=PROMPT)
    assert why.source == "capture"
    again = fastattr.attribute(model, picture(), PROMPT, why.token_ids, scales=(1.0,), evidence=False)
    torch.testing.assert_close(why.image[0], again.image[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(why.log_prob, again.log_prob, rtol=1e-3, atol=1e-3)
    assert again.tokens == why.tokens and again.context_tokens == why.context_tokens


def prove_maps(row: Row, model: fastattr.Model) -> None:
    """Maps at every scale, as fine as the finest, in [0, 1] and not dark."""
    why = fastattr.attribute(model, picture(), PROMPT, ANSWER, scales=row.scales)
    (maps,) = why.image
    assert why.response == ANSWER
    assert maps.isfinite().all() and 0 <= maps.min() < maps.max() <= 1
    assert maps.shape[1:] == why.grids[-1][0]
    if row.scales[0] == 1.0:
        assert why.grids[0][0] == row.grid
    assert why.evidence is not None and why.evidence.isfinite().all()


def embeddings_at_image_tokens(model: fastattr.Model, image: Any, scale: float = 1.0) -> tuple[Tensor, ImageGroup]:
    """What the decoder is given at the positions of the image or video, `[position dim]`."""
    encoded, response = read(model, image, scale)
    given: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs["inputs_embeds"].detach())

    handle = decoder_of(model.hf_model).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        adapters.replay(model, encoded, response)
    finally:
        handle.remove()
    (group,) = encoded.groups
    return given[0][0, list(group.positions)], group


def prove_places(model: fastattr.Model, height: int, width: int, scale: float) -> None:
    """Pixels under one cell of the map change: in every view that shows them the token over them moves most, and on the
    whole map that very cell does."""
    plain = np.asarray(picture(height, width)) // 4 + 96
    before, group = embeddings_at_image_tokens(model, Image.fromarray(plain), scale)
    _, rows, columns = group.grid
    left, top, right, bottom = group.extent
    cells = {
        (0, 0),
        (0, columns - 1),
        (rows - 1, 0),
        (rows - 1, columns - 1),
        (1, columns - 2),
        (rows // 2, columns // 3),
    }
    for row, column in sorted(cell for cell in cells if 0 <= cell[0] < rows and 0 <= cell[1] < columns):
        across = inside(height, top, bottom, row, rows), inside(width, left, right, column, columns)
        planted = plain.copy()
        planted[across] = (255, 0, 255)
        after, _ = embeddings_at_image_tokens(model, Image.fromarray(planted), scale)
        moved = (after - before).norm(dim=1)
        told = f"{height} x {width} at scale {scale:g}, grid {group.grid}, cell {(row, column)}"
        on_map = place(moved[None], group)[0, 0]
        brightest = divmod(int(on_map.argmax()), columns)
        if group.views and brightest != (row, column):  # cells of the map may lie across those of its views
            assert max(abs(brightest[0] - row), abs(brightest[1] - column)) == 1, told
            assert on_map[row, column] > 0.9 * on_map.max(), told
        else:
            assert brightest == (row, column), told
        middle = top + (row + 0.5) / rows * (bottom - top), left + (column + 0.5) / columns * (right - left)
        start = 0
        for view in group.views:
            h, w = view.grid
            mine = moved[start : start + h * w].view(h, w)
            start += h * w
            x = (middle[1] - view.box[0]) / (view.box[2] - view.box[0]) * w
            y = (middle[0] - view.box[1]) / (view.box[3] - view.box[1]) * h
            if 0 < x < w and 0 < y < h:
                found = divmod(int(mine.argmax()), w)
                assert abs(found[0] + 0.5 - y) < 1 and abs(found[1] + 0.5 - x) < 1, f"{told}, view {view}"
            elif not (-1 < x < w + 1 and -1 < y < h + 1):  # resampling may reach one cell over the border
                assert mine.max() < moved.max() / 3, f"{told}: view {view} does not show it and moves"


def inside(length: int, low: float, high: float, index: int, count: int) -> slice:
    """The pixels well inside cell `index` of `count` between shares `low` and `high`: resampling blurs its border."""
    cell = length * (high - low) / count
    start = length * low + index * cell
    first, last = math.ceil(start + 0.2 * cell), math.floor(start + 0.8 * cell)
    return slice(first, max(last, first + 1))


def prove_video(model: fastattr.Model) -> None:
    """A change in one frame moves the tokens of its time step most, and those before it not at all or little."""
    assert model.takes_videos
    n = 4
    frames = [picture(64, 96, seed) for seed in range(n)]
    before, group = embeddings_at_image_tokens(model, [frames])
    steps = group.grid[0]
    assert 1 <= steps <= n
    for frame in range(n):
        changed = [picture(64, 96, 50) if i == frame else each for i, each in enumerate(frames)]
        after, _ = embeddings_at_image_tokens(model, [changed])
        moved = (after - before).norm(dim=1).view(steps, -1).amax(dim=1)
        assert int(moved.argmax()) == frame * steps // n, f"frame {frame} of {n}, steps moved by {moved.tolist()}"
    why = fastattr.attribute(model, [frames], PROMPT, ANSWER, scales=(1.0,))
    assert why.image[0].shape[1:] == group.grid
    assert why.image[0].max() > 0
