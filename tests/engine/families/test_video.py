"""True videos: what the model is given, where its tokens lie in space and time, and scales."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as size_of_all
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as size_of_one
from transformers.utils import is_torchvision_available

import fastattr
from fastattr import adapters
from fastattr.adapters.films import film_patches, frame_size, step_seconds
from fastattr.adapters.processors import QWEN3_FILMS, FilmProcessor
from fastattr.images import read_visuals
from tests.engine.families import tiny_qwen
from tests.engine.families.proof import embeddings_at_image_tokens, inside
from tests.engine.families.tiny_video import JOINT, patches_by_hand, real
from tests.engine.family_models import ANSWER, PATCH, PROMPT, Tiny, picture, qwen_image_processor


def film(n: int, height: int = 64, width: int = 96) -> list[Image.Image]:
    return [picture(height, width, seed) for seed in range(n)]


def tiny(kind: str) -> Tiny:
    made: Tiny = getattr(tiny_qwen, kind)()
    return made


def wrapped(kind: str) -> fastattr.Model:
    held = tiny(kind)
    return fastattr.wrap(held.hf_model, held.processor)


def encoded(model: fastattr.Model, pictures: Any, prompt: Any = PROMPT) -> adapters.EncodedExample:
    return adapters.encode(model, read_visuals(pictures), prompt)


# --- patches, sizes, times -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_patches_hold_two_frames_each(n: int) -> None:
    images = qwen_image_processor(256 * 256)
    frames = film(n, 70, 90)
    patches, grid = film_patches(images, frames, (64, 96))
    resized = [frame.resize((96, 64), Image.Resampling.BICUBIC) for frame in frames]
    assert grid == [(n + 1) // 2, 8, 12]
    expected = patches_by_hand(resized, images.image_mean, images.image_std)
    np.testing.assert_allclose(patches.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (67, 91), (9, 200), (500, 20), (720, 1280), (7, 7)])
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_frames_are_sized_as_transformers_sizes_them(size: tuple[int, int], n: int) -> None:
    for limits in ((256, 65536), (40_000, 80_000), (1, 2**40), (200_000, 10**6)):
        ours = frame_size(size, n, 16, limits, counts_all=False)
        assert ours == size_of_one(*size, 16, *limits)
        ours = frame_size(size, n, 16, limits, counts_all=True)
        assert ours == size_of_all(n, *size, 2, 16, *limits)


def test_frames_that_transformers_refuses_are_refused() -> None:
    with pytest.raises(ValueError, match="absolute aspect ratio"):
        size_of_one(1, 201, 16)
    with pytest.raises(ValueError, match="201 x 1 pixels is more than 200 times"):
        frame_size((1, 201), 2, 16, (1, 2**40), counts_all=False)
    assert frame_size((1, 200), 2, 16, (1, 2**40), counts_all=False) == size_of_one(1, 200, 16, 1, 2**40)
    with pytest.raises(fastattr.ImageError, match="FilmProcessor refuses images of 201 x 1"):
        encoded(wrapped("qwen2_vl"), [film(2, 1, 201)])


def test_seconds_of_time_steps() -> None:
    assert step_seconds([0.0, 0.5, 1.0, 1.5, 2.0], 2) == [(0.0, 0.5), (1.0, 1.5), (2.0, 2.0)]
    assert step_seconds([0.0, 0.25], 1) == [(0.0, 0.0), (0.25, 0.25)]
    assert step_seconds([0.0, 0.1, 3.0], 2) == [(0.0, 0.1), (3.0, 3.0)]


# --- the same as transformers' own processors -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's own processor, of NumPy 2
@pytest.mark.parametrize("kind", list(JOINT))
@pytest.mark.parametrize("n", [4, 5])
def test_composed_and_joint_processors_give_the_model_the_same(kind: str, n: int) -> None:
    """Text with its times, patches and grids. That none of the frames is left out holds for both."""
    held = tiny(kind)
    ours = fastattr.wrap(held.hf_model, held.processor)
    joint = real(JOINT[kind], held.processor)
    theirs = fastattr.wrap(held.hf_model, joint)
    assert theirs.takes_videos
    a, b = encoded(ours, [film(n, 67, 91)]), encoded(theirs, [film(n, 67, 91)])
    assert ours.decode([a.input_ids.tolist()]) == theirs.decode([b.input_ids.tolist()])
    assert a.groups == b.groups
    assert set(a.model_inputs) == set(b.model_inputs)
    for name, value in a.model_inputs.items():
        torch.testing.assert_close(value, b.model_inputs[name], rtol=0, atol=1e-5)
    assert joint.video_processor.calls == [{"do_sample_frames": False, "size": None}]


def test_pictures_alone_need_no_option_for_videos() -> None:
    held = tiny("qwen3_vl")
    joint = real(JOINT["qwen3_vl"], held.processor)
    given: list[dict[str, Any]] = []

    class Watched(type(joint)):  # type: ignore[misc]
        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> Any:
            given.append({**options, "videos": videos})
            return super().__call__(images=images, text=text, videos=videos, **options)

    joint.__class__ = Watched
    encoded(fastattr.wrap(held.hf_model, joint), picture())
    assert given == [{"return_tensors": "pt", "videos": None}]


def test_times_in_the_text() -> None:
    """Of 5 frames at 2 a second: Qwen3-VL writes the middle of each step, GLM its beginning."""
    shown = {}
    for kind in ("qwen3_vl", "glm4v", "glm46v"):
        held = tiny(kind)
        slow = FilmProcessor(**{**vars(held.processor), "frames_per_second": 2.0})
        model = fastattr.wrap(held.hf_model, slow)
        (text,) = model.decode([encoded(model, [film(5)]).input_ids.tolist()])
        shown[kind] = text
    step = "<|vision_start|>" + "<|video_pad|>" * 24 + "<|vision_end|>"
    assert f"<0.2 seconds>{step}<1.2 seconds>{step}<2.0 seconds>{step}" in shown["qwen3_vl"]
    step = "<|begin_of_image|>" + "<|image|>" * 24 + "<|end_of_image|>"
    assert f"{step}0{step}1{step}2<|end_of_video|>" in shown["glm4v"]
    assert f"{step}0.0 seconds{step}1.0 seconds{step}2.0 seconds<|end_of_video|>" in shown["glm46v"]


# --- where tokens lie -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_patch_in_a_frame_moves_its_cell_at_its_time(kind: str) -> None:
    model = wrapped(kind)
    plain = [np.asarray(frame) // 4 + 96 for frame in film(5)]
    before, group = embeddings_at_image_tokens(model, [[Image.fromarray(frame) for frame in plain]])
    assert group.grid == (3, 4, 6)
    for frame, row, column in ((0, 0, 5), (1, 3, 0), (2, 1, 4), (3, 2, 2), (4, 0, 1)):
        changed = [each.copy() for each in plain]
        changed[frame][inside(64, 0, 1, row, 4), inside(96, 0, 1, column, 6)] = (255, 0, 255)
        after, _ = embeddings_at_image_tokens(model, [[Image.fromarray(each) for each in changed]])
        moved = (after - before).norm(dim=1).view(3, 4, 6)
        found = np.unravel_index(int(moved.argmax()), moved.shape)
        assert tuple(int(each) for each in found) == (frame // 2, row, column)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_5"])
def test_images_and_videos_in_one_conversation(kind: str) -> None:
    model = wrapped(kind)
    words = [
        {"type": "image"},
        {"type": "text", "text": "Is this"},
        {"type": "video"},
        {"type": "text", "text": "in that?"},
        {"type": "video"},
    ]
    chat = fastattr.Chat([{"role": "user", "content": words}])
    example = encoded(model, [picture(), film(3, 48, 64), film(2, 32, 32)], chat)
    image, first, second = example.groups
    assert (image.grid, first.grid, second.grid) == ((1, 4, 6), (2, 3, 4), (1, 2, 2))
    assert image.positions[-1] < first.positions[0] < first.positions[-1] < second.positions[0]
    ids = example.input_ids
    assert set(ids[list(image.positions)].tolist()) == {model.image_token_id}
    assert set(ids[[*first.positions, *second.positions]].tolist()) == {model.video_token_id}
    said = model.processor.tokenizer.decode(ids[list(example.prompt)])
    assert said == "Is thisin that?"
    types = example.model_inputs["mm_token_type_ids"][0]
    assert types.bincount().tolist() == [len(ids) - 24 - 24 - 4, 24, 24 + 4]


def test_glm_reads_images_or_a_video() -> None:
    """One token stands for either, and the types of tokens tell which."""
    model = wrapped("glm4v")
    shown = encoded(model, [film(4)])
    assert shown.model_inputs["mm_token_type_ids"][0].bincount().tolist() == [len(shown.input_ids) - 48, 0, 48]
    assert (shown.input_ids[list(shown.groups[0].positions)] == model.image_token_id).all()
    with pytest.raises(fastattr.InputError, match="one placeholder for images and for videos"):
        encoded(model, [picture(), film(4)])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm46v"])
def test_capture_of_a_video_is_its_replay(kind: str) -> None:
    model = wrapped(kind)
    example = encoded(model, [film(3)])
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=5, suppress_tokens=never)
    why = states.attribute(out, image=[film(3)], prompt=PROMPT, evidence=True)
    blind = states.attribute(out)
    again = fastattr.attribute(model, [film(3)], PROMPT, why.token_ids, scales=(1.0,))
    assert why.source == blind.source == "capture"
    assert why.grids[0][0] == blind.grids[0][0] == (2, 4, 6)
    torch.testing.assert_close(why.image[0], again.image[0], rtol=1e-3, atol=1e-3)
    assert why.evidence is not None and again.evidence is not None
    torch.testing.assert_close(why.evidence, again.evidence, rtol=1e-3, atol=1e-3)
    assert again.context_tokens == why.context_tokens


def test_evidence_of_a_captured_video_keeps_its_pace() -> None:
    """Blanking takes the pixels away and leaves the seconds between time steps as generate was given them."""
    model = wrapped("qwen2_5_vl")
    frames = film(4)
    example = encoded(model, [frames])
    inputs: dict[str, torch.Tensor] = {**example.model_inputs, "input_ids": example.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["second_per_grid_ts"] = torch.full_like(inputs["second_per_grid_ts"], 3.0)
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4, suppress_tokens=never)
    why = states.attribute(out, image=[frames], prompt=PROMPT, evidence=True)

    n, grey = len(example.input_ids), adapters.encode(model, [v.blank() for v in read_visuals([frames])], PROMPT)
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, out.shape[1] - 1 - n))

    def log_probs(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            seen = model.hf_model(input_ids=out[:, :-1], **{**given, "pixel_values_videos": pixels})
        rows = seen.logits[0, n - 1 :, : model.head.vocab].log_softmax(dim=-1)
        return rows.gather(1, out[0, n:, None])[:, 0]

    lost = log_probs(given["pixel_values_videos"]) - log_probs(grey.model_inputs["pixel_values_videos"])
    assert why.evidence is not None
    torch.testing.assert_close(why.evidence, lost, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_videos_in_one_batch_are_read_as_alone(kind: str) -> None:
    """Sequences of different lengths: nothing looks behind their end, and linear attention neither."""
    model = wrapped(kind)
    examples = [encoded(model, [film(4)]), encoded(model, [film(3, 32, 32)], "Describe the image.")]
    responses = [adapters.encode_response(model, ANSWER), adapters.encode_response(model, "a blue square")]
    together = adapters.replay_batch(model, examples, responses)
    for both, example, response in zip(together, examples, responses, strict=True):
        alone = adapters.replay(model, example, response)
        assert torch.equal(both.input_ids, alone.input_ids) and both.layout == alone.layout
        torch.testing.assert_close(both.hidden_states, alone.hidden_states, rtol=1e-4, atol=1e-4)


# --- scales ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_video_at_other_scales_keeps_its_time_steps(kind: str) -> None:
    """Also where the limits on its size, which count every frame, would not have it."""
    held = tiny(kind)
    tight = FilmProcessor(**{**vars(held.processor), "limits": (4 * 64, 64 * 96 * 4)})
    model = fastattr.wrap(held.hf_model, tight)
    why = fastattr.attribute(model, [film(4)], PROMPT, ANSWER, scales=(0.5, 1.0, 2.0))
    assert [grid[0] for grid in why.grids] == [(2, 2, 3), (2, 4, 6), (2, 8, 12)]
    assert why.image[0].shape[1:] == (2, 8, 12) and why.image[0].isfinite().all() and why.image[0].max() > 0
    assert any("4 frames is read in 2 time steps" in note for note in why.notes)


def test_joint_processors_are_told_to_lift_their_limits() -> None:
    held = tiny("qwen3_vl")
    joint = real(JOINT["qwen3_vl"], held.processor)
    why = fastattr.attribute(
        fastattr.wrap(held.hf_model, joint), [film(4, 128, 192)], PROMPT, ANSWER, scales=(1.0, 2.0), evidence=False
    )
    # 4 x 128 x 192 pixels are more than 256 x 256: shown at 99 x 149 and less, in whole cells
    assert [grid[0] for grid in why.grids] == [(2, 6, 9), (2, 12, 18)]
    assert {call["do_sample_frames"] for call in joint.video_processor.calls} == {False}


# --- refusals and loading -------------------------------------------------------------------------------------


def test_a_processor_that_is_asked_to_sample_refuses() -> None:
    processor = tiny_qwen.qwen_processor(QWEN3_FILMS)
    with pytest.raises(ValueError, match="all frames are shown"):
        processor(["<|video_pad|>"], videos=[film(2)], do_sample_frames=True)


def test_text_that_does_not_show_the_videos_is_refused() -> None:
    processor = tiny_qwen.qwen_processor(QWEN3_FILMS)
    with pytest.raises(ValueError, match=r"holds 0 placeholders <\|video_pad\|> for 1 videos"):
        processor(["Where?"], videos=[film(2)])
    with pytest.raises(ValueError, match=r"holds 2 placeholders <\|image_pad\|> for 1 images"):
        processor(["<|image_pad|><|image_pad|>"], images=[picture()])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "glm46v"])
@pytest.mark.parametrize(
    "said", [None, {"size": {"shortest_edge": 512, "longest_edge": 8 * 64 * 96}}, {"min_pixels": 512}]
)
def test_load_reads_videos_as_the_directory_says(tmp_path: Path, kind: str, said: dict[str, Any] | None) -> None:
    held = tiny(kind)
    held.hf_model.save_pretrained(tmp_path)
    held.processor.tokenizer.save_pretrained(tmp_path)
    held.processor.image_processor.save_pretrained(tmp_path)
    if said is not None:
        cells = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**cells, **said}))
    model = fastattr.load(tmp_path)
    least, most = held.processor.style.limits
    if said is None:  # all that is said is said of images
        size = held.processor.image_processor.size
        least, most = size["shortest_edge"], size["longest_edge"]
    elif "size" in said:
        least, most = 512, 8 * 64 * 96
    elif kind == "qwen2_vl":  # the video processors of the others do not know `min_pixels`
        least = 512
    if is_torchvision_available():  # transformers' own joint class
        assert type(model.processor) is JOINT["qwen3_vl" if kind == "qwen3_5" else kind]
        found = model.processor.video_processor.size
        assert (found["shortest_edge"], found["longest_edge"]) == (least, most)
    else:
        assert isinstance(model.processor, FilmProcessor)
        assert model.processor.style == held.processor.style or kind.startswith("glm")  # those hold a closure
        assert model.processor.limits == (least, most)
    whole = fastattr.wrap(held.hf_model, replace(held.processor, limits=(least, most)))
    ours, theirs = encoded(model, [film(4)]), encoded(whole, [film(4)])
    assert ours.groups == theirs.groups and torch.equal(ours.input_ids, theirs.input_ids)
