"""Models whose videos are frame after frame: in one tile each, written as an image is, or as patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, embeddings_at_image_tokens, inside, prove
from tests.engine.families.tiny_frames import gemma4, internvl, smolvlm, video_llama_3
from tests.engine.families.tiny_tiles import internvl_tiles
from tests.engine.family_models import PROMPT, Tiny, picture

STOOD_IN = "the video processor, which needs torchvision"

ROWS = [
    Row("internvl", internvl, [(2, 2)] * 7, (1, 4, 6), scales=(1.0, 2.0), video=True, stood_in=STOOD_IN),
    Row(
        "smolvlm",
        smolvlm,
        [(2, 2)] * 10,
        (1, 6, 6),
        scales=(1.0, 2.0),
        video=True,
        stood_in=f"{STOOD_IN}, and num2words",
    ),
    Row("gemma4", gemma4, [(7, 9)], (1, 7, 9), scales=(1.0,), video=True, stood_in=STOOD_IN),
    Row("video_llama_3", video_llama_3, [(8, 11)], (1, 8, 11), video=True, stood_in=STOOD_IN),
]
MAKES = (internvl, smolvlm)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_family(row: Row) -> None:
    prove(row)


def wrapped(held: Tiny) -> fastattr.Model:
    return fastattr.wrap(held.hf_model, held.processor)


def encoded(model: fastattr.Model, pictures: Any) -> adapters.EncodedExample:
    return adapters.encode(model, read_visuals(pictures), PROMPT)


def film(n: int, height: int = 48, width: int = 64) -> list[Image.Image]:
    return [picture(height, width, seed) for seed in range(n)]


def captured(model: fastattr.Model, example: adapters.EncodedExample) -> tuple[adapters.CapturedStates, torch.Tensor]:
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4, suppress_tokens=never)
    return states, out


@pytest.mark.parametrize("make", MAKES)
def test_every_frame_is_shown_in_one_tile(make: Callable[[], Tiny]) -> None:
    held = make()
    (group,) = encoded(wrapped(held), [film(5, 96, 200)]).groups
    assert group.grid == (5, 2, 2) and not group.views
    assert held.processor.video_processor.calls == [False]


@pytest.mark.parametrize("make", MAKES)
def test_a_patch_in_a_frame_moves_its_cell_at_its_time(make: Callable[[], Tiny]) -> None:
    model = wrapped(make())
    plain = [np.asarray(frame) // 4 + 96 for frame in film(4)]
    before, group = embeddings_at_image_tokens(model, [[Image.fromarray(frame) for frame in plain]])
    assert group.grid == (4, 2, 2)
    for frame, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1), (3, 0, 0)):
        changed = [each.copy() for each in plain]
        changed[frame][inside(48, 0, 1, row, 2), inside(64, 0, 1, column, 2)] = (255, 0, 255)
        after, _ = embeddings_at_image_tokens(model, [[Image.fromarray(each) for each in changed]])
        moved = (after - before).norm(dim=1).view(4, 2, 2)
        found = np.unravel_index(int(moved.argmax()), moved.shape)
        assert tuple(int(each) for each in found) == (frame, row, column)


def test_videos_of_different_lengths() -> None:
    """The shorter one is padded with frames that the model leaves out."""
    model = wrapped(smolvlm())
    example = encoded(model, [film(2), film(4)])
    short, long = example.groups
    assert (short.grid, long.grid) == ((2, 2, 2), (4, 2, 2))
    assert short.positions[-1] < long.positions[0]
    every = (example.input_ids == model.image_token_id).nonzero().flatten().tolist()
    assert [*short.positions, *long.positions] == every
    why = fastattr.attribute(model, [film(2), film(4)], PROMPT, "a blue square", scales=(1.0,))
    assert [each.shape[1:] for each in why.image] == [(2, 2, 2), (4, 2, 2)]


@pytest.mark.parametrize("make", [*MAKES, gemma4, video_llama_3])
def test_a_batch_and_a_decoder_read_what_a_replay_reads(make: Callable[[], Tiny]) -> None:
    prove_other_ways(wrapped(make()), [[film(2)], [film(3)], picture()])


@pytest.mark.parametrize("make", MAKES)
def test_capture_of_a_video_is_its_replay(make: Callable[[], Tiny]) -> None:
    model = wrapped(make())
    states, out = captured(model, encoded(model, [film(3)]))
    why = states.attribute(out, image=[film(3)], prompt=PROMPT)
    again = fastattr.attribute(model, [film(3)], PROMPT, why.token_ids, scales=(1.0,), evidence=False)
    assert why.source == "capture"
    assert why.grids[0][0] == again.grids[0][0] == (3, 2, 2)
    torch.testing.assert_close(why.image[0], again.image[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(why.log_prob, again.log_prob, rtol=1e-3, atol=1e-3)


def test_a_captured_video_must_be_named() -> None:
    """Nothing in the inputs tells a video from the tiles of an image."""
    model = wrapped(internvl())
    states, out = captured(model, encoded(model, [film(3)]))
    with pytest.raises(fastattr.TokenLayoutError, match="pass the pictures, image="):
        states.attribute(out)


@pytest.mark.parametrize("make", MAKES)
def test_other_frames_than_were_shown_are_refused(make: Callable[[], Tiny]) -> None:
    model = wrapped(make())
    states, out = captured(model, encoded(model, [film(3)]))
    with pytest.raises(fastattr.TokenLayoutError, match=r"shows \[2\] frames in 4 tokens each.*3 runs of \[4\]"):
        states.attribute(out, image=[film(2)])
    states, out = captured(model, encoded(model, film(2, 64, 96)))  # as images, so in tiles
    with pytest.raises(fastattr.TokenLayoutError, match=r"shown as images \(pass them as such\)"):
        states.attribute(out, image=[film(2, 64, 96)])
    assert len(states.attribute(out, image=film(2, 64, 96)).grids[0]) == 2


def test_a_processor_without_videos_shows_frames_as_images() -> None:
    """In tiles, and capture reads them so too."""
    model = wrapped(internvl_tiles())
    (group,) = encoded(model, [film(2, 64, 96)]).groups
    assert group.grid[0] == 2 and len(group.views) == 7
    states, out = captured(model, encoded(model, [film(2, 64, 96)]))
    assert states.attribute(out, image=[film(2, 64, 96)]).grids[0] == (group.grid,)


@pytest.mark.parametrize("make", MAKES)
def test_images_beside_a_video_are_refused(make: Callable[[], Tiny]) -> None:
    with pytest.raises(fastattr.InputError, match="one placeholder for images and for videos"):
        encoded(wrapped(make()), [picture(), film(2)])


# --- Gemma 4 ------------------------------------------------------------------------------------------------


def test_gemma4s_videos_beside_an_image() -> None:
    """Of different lengths and forms, told by the model's inputs alone."""
    model = wrapped(gemma4())
    shown = [film(2, 48, 96), picture(), film(3, 96, 48)]
    example = encoded(model, shown)
    wide, image, tall = example.groups
    assert image.grid == (1, 7, 9)
    assert (wide.grid[0], tall.grid[0]) == (2, 3) and wide.grid[1:] == tall.grid[:0:-1] and wide.grid[2] > wide.grid[1]
    assert wide.positions[-1] < image.positions[0] < image.positions[-1] < tall.positions[0]
    films = [*wide.positions, *tall.positions]
    assert (example.input_ids == model.film_token_id).nonzero().flatten().tolist() == films
    states, out = captured(model, example)
    why = states.attribute(out)
    again = fastattr.attribute(model, shown, PROMPT, why.token_ids, scales=(1.0,), evidence=False)
    torch.testing.assert_close(why.log_prob, again.log_prob, rtol=1e-3, atol=1e-3)
    assert sorted(why.grids[0]) == sorted(again.grids[0])


# --- VideoLLaMA 3 -------------------------------------------------------------------------------------------


def test_no_token_of_a_video_is_left_out() -> None:
    held = video_llama_3()
    example = encoded(wrapped(held), [film(5)])
    assert example.groups[0].grid == (5, 3, 4)  # 48 x 64 pixels in cells of 16
    assert held.processor.video_processor.calls == [(False, False)]
    (text,) = wrapped(held).decode([example.input_ids.tolist()])
    assert "Time 0.0s:" + "<|video_pad|>" * 12 + ",Time 1.0s:" in text


def test_videos_are_shown_at_every_scale_beside_images() -> None:
    """Tokens of videos cover four times as much as those of images."""
    why = fastattr.attribute(
        wrapped(video_llama_3()), [picture(64, 96), film(3, 64, 96)], PROMPT, "a blue square", scales=(0.5, 1.0, 2.0)
    )
    assert [grids[0] for grids in why.grids] == [(1, 4, 6), (1, 8, 12), (1, 16, 24)]
    assert [grids[1] for grids in why.grids] == [(3, 2, 3), (3, 4, 6), (3, 8, 12)]


def test_a_video_with_tokens_left_out_is_refused() -> None:
    held = video_llama_3()
    model = wrapped(held)
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": PROMPT}]}]
    text = held.processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = held.processor(text=[text], videos=[film(3)], do_sample_frames=False, return_tensors="pt")
    inputs.pop("video_metadata", None)
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=2)
    with pytest.raises(fastattr.TokenLayoutError, match=r"left out 2 of 36 tokens.*use_token_compression=False"):
        states.attribute(out, image=[film(3)])
