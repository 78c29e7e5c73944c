"""Parts of messages in every supported format: their sources are read, and sizes and times reach the model."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import fastattr
from fastattr import adapters
from fastattr.chat import Chat, read_prompt
from fastattr.log.requests import from_json, prompt_of, to_json
from tests.engine.families import tiny_qwen
from tests.engine.families.tiny_video import JOINT, real
from tests.engine.family_models import ANSWER, PROMPT, TINY, picture

CELL = 16  # pixels a token of the tiny models


def messages(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": PROMPT}]}]


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


PICTURE = picture(64, 96)
BYTES = encoded(PICTURE)
TEXT = base64.b64encode(BYTES).decode()
URL = f"data:image/png;base64,{TEXT}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pictures") / "a b.png"
    found.write_bytes(BYTES)
    return found


# --- sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": "PATH"},
        {"type": "image", "image": "FILE"},
        {"type": "image", "image": URL},
        {"type": "image", "image": BYTES},
        {"type": "image", "path": "PATH"},
        {"type": "image", "url": "PATH"},
        {"type": "image", "url": "FILE"},
        {"type": "image", "url": URL, "path": None, "text": None},  # as tables fill in what is missing
        {"type": "image", "base64": TEXT},
        {"type": "image", "base64": "\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76))},
        {"type": "image", "base64": URL},
        {"type": "image", "base64": TEXT.encode()},
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "FILE"}},
        {"type": "image_url", "image_url": URL},
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
        {"type": "image", "source": {"type": "url", "url": URL}, "cache_control": {"type": "ephemeral"}},
        {"type": "image", "image": PICTURE, "id": "a", "uuid": "b"},
    ],
    ids=lambda part: "-".join(str(part["type"] if key == "type" else key) for key in part),
)
def test_every_way_to_write_a_picture_is_the_same_picture(part: dict[str, Any], path: Path) -> None:
    named = {"PATH": str(path), "FILE": path.as_uri()}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return named.get(value, value) if isinstance(value, str) else value

    visuals, chat = read_prompt(None, messages(filled(part)))
    assert isinstance(chat, Chat) and chat.n_pictures == 1 and chat.texts == [PROMPT]
    ((frame,),) = (visual.frames for visual in visuals)
    np.testing.assert_array_equal(np.asarray(frame), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", ["input_text", "output_text"])
def test_texts_of_other_interfaces(kind: str) -> None:
    chat = Chat([{"role": "user", "content": [{"type": "image"}, {"type": kind, "text": "What?"}]}])
    assert chat.texts == ["What?"] and chat.parts[1]["type"] == "text"


def test_frames_arrays_and_files_of_videos() -> None:
    frames = [picture(32, 32, seed) for seed in range(4)]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    expected = np.stack([np.asarray(frame) for frame in frames])
    held = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
    for part in (
        {"type": "video", "video": frames},
        {"type": "video", "video": tuple(encoded(frame) for frame in frames)},
        {"type": "video", "video": expected},
        {"type": "video", "video": torch.tensor(expected)},
        {"type": "video", "video": stream.getvalue()},
        {"type": "video", "url": held},
        {"type": "video_url", "video_url": {"url": held}},
        {"type": "video_url", "video_url": held},
    ):
        ((visual,), _) = read_prompt(None, messages(part))
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in visual.frames]), expected)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image", "url": "https://example.org/a.png"}, "URLs are not fetched"),
        ({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}, "URLs are not fetched"),
        ({"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}, "URLs are not fetched"),
        ({"type": "video", "video": "https://example.org/a.mp4"}, "URLs are not fetched"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source is of type 'file', which is not known"),
        ({"type": "image", "source": URL}, "expected a mapping such as"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}, "expected 'data' in it"),
        ({"type": "image_url", "image_url": {"uri": URL}}, "expected 'url' in it"),
        ({"type": "image", "image": PICTURE, "path": "a.png"}, "with image and path, expected one image"),
        ({"type": "image", "url": URL, "base64": TEXT}, "with url and base64, expected one image"),
        ({"type": "input_image", "file_id": "f"}, "with the key 'file_id', which is not known here"),
        (
            {"type": "image", "image": PICTURE, "max_pixel": 100},
            "with the key 'max_pixel', which .* expected image, .*max_pixels",
        ),
        ({"type": "image", "image": PICTURE, "fps": 2}, "with the key 'fps'"),
        ({"type": "video", "video": [PICTURE], "total_pixels": 100}, "with the key 'total_pixels'"),
        ({"type": "image", "video": [PICTURE]}, "with the key 'video'"),
        (
            {"type": "image", "image": PICTURE, "max_pixels": "100"},
            "max_pixels is '100', expected a whole number above 0",
        ),
        ({"type": "image", "image": PICTURE, "max_pixels": 0}, "max_pixels is 0, expected a whole number above 0"),
        ({"type": "image", "image": PICTURE, "min_pixels": True}, "min_pixels is True"),
        ({"type": "image", "image": PICTURE, "resized_height": 32}, "belong together"),
        (
            {"type": "image", "image": PICTURE, "min_pixels": 9, "max_pixels": 4},
            "min_pixels is 9, expected at most max_pixels",
        ),
        ({"type": "video", "video": [PICTURE], "fps": float("nan")}, "fps is nan, expected a number above 0"),
        (
            {"type": "video", "video": [PICTURE], "fps": 2, "nframes": 4},
            "fps is 2 and nframes is 4, expected one of them",
        ),
        ({"type": "video", "video": [PICTURE], "nframes": 4, "num_frames": 4}, "mean the same"),
        (
            {"type": "video", "video": [PICTURE], "video_start": 2, "video_end": 1},
            "expected 0 <= video_start < video_end",
        ),
        ({"type": "video", "video": [PICTURE] * 4, "nframes": 2}, "a list of frames is given, of which all are shown"),
        (
            {"type": "video", "video": [PICTURE] * 4, "video_end": 2},
            "a list of frames is given, of which all are shown",
        ),
        (
            {"type": "audio", "audio": "a.wav"},
            r"holds the part \{'type': 'audio'.* of no known type, expected .*input_image",
        ),
        ({"image": PICTURE}, "of no known type"),
        ("a.png", "expected parts: mappings with a type"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_unsupported_keys_are_refused_by_name(part: Any, told: str) -> None:
    with pytest.raises(fastattr.InputError, match=told):
        read_prompt(None, messages(part))


# --- sizes -----------------------------------------------------------------------------------------------------


def wrapped(kind: str) -> fastattr.Model:
    held = getattr(tiny_qwen, kind)()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize(
    ("options", "size"),
    [  # by hand, of 64 x 96 (height x width) pixels in cells of 16
        ({"resized_height": 32, "resized_width": 32}, (32, 32)),
        ({"resized_height": 40, "resized_width": 100}, (32, 96)),  # to whole cells; halves to the even one
        ({"resized_height": 128, "resized_width": 64}, (128, 64)),
        ({"max_pixels": 32 * 48}, (32, 48)),
        ({"max_pixels": 32 * 48 - 1}, (16, 32)),
        ({"min_pixels": 128 * 192}, (128, 192)),
        ({"min_pixels": 16, "max_pixels": 10**6}, (64, 96)),
    ],
)
def test_a_picture_is_shown_at_the_size_its_part_asks_for(
    kind: str, options: dict[str, int], size: tuple[int, int]
) -> None:
    """Compared with the processor on the picture resized by hand; the other picture is not changed."""
    model = wrapped(kind)
    part = {"type": "image", "image": PICTURE, **options}
    visuals, chat = read_prompt(None, messages(part, {"type": "image", "image": picture(48, 48)}))
    example = adapters.encode(model, visuals, chat)
    resized = PICTURE.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    by_hand = adapters.encode(
        model, *read_prompt([resized, picture(48, 48)], messages({"type": "image"}, {"type": "image"}))
    )
    assert [group.grid for group in example.groups] == [(1, size[0] // CELL, size[1] // CELL), (1, 3, 3)]
    assert torch.equal(example.input_ids, by_hand.input_ids)
    for name, value in example.model_inputs.items():
        assert torch.equal(value, by_hand.model_inputs[name]), name


@pytest.mark.parametrize(
    "limits", [{"max_pixels": 5000}, {"min_pixels": 9000}, {"min_pixels": 2000, "max_pixels": 4000}]
)
@pytest.mark.parametrize("shape", [(67, 91), (33, 170), (120, 120)])
def test_sizes_are_those_of_smart_resize(limits: dict[str, int], shape: tuple[int, int]) -> None:
    model = wrapped("qwen2_5_vl")
    part = {"type": "image", "image": picture(*shape), **limits}
    least, most = limits.get("min_pixels", 4 * CELL**2), limits.get("max_pixels", 16_384 * CELL**2)
    height, width = smart_resize(*shape, CELL, least, most)
    (group,) = adapters.encode(model, *read_prompt(None, messages(part))).groups
    assert group.grid == (1, height // CELL, width // CELL)


def test_scales_are_relative_to_the_size_that_is_asked_for() -> None:
    model = wrapped("qwen2_5_vl")
    part = {"type": "image", "image": PICTURE, "resized_height": 32, "resized_width": 64}
    why = fastattr.attribute(model, None, messages(part), ANSWER, scales=(1.0, 2.0))
    assert why.grids == (((1, 2, 4),), ((1, 4, 8),))
    assert why.picture_sizes == ((64, 96),) and why.pictures[0].shape == (1, 64, 96, 3), "the picture itself is shown"
    resized = PICTURE.resize((64, 32), Image.Resampling.BICUBIC)
    plain = fastattr.attribute(model, resized, messages({"type": "image"}), ANSWER, scales=(1.0,))
    again = fastattr.attribute(model, None, messages(part), ANSWER, scales=(1.0,))
    assert torch.equal(plain.image[0], again.image[0])
    assert plain.evidence is not None and again.evidence is not None
    torch.testing.assert_close(plain.evidence, again.evidence)  # the blanked picture has that size too


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_are_shown_at_the_size_their_part_asks_for(kind: str) -> None:
    model, frames = wrapped(kind), [picture(64, 96, seed) for seed in range(4)]
    part = {"type": "video", "video": frames, "resized_height": 32, "resized_width": 48}
    (group,) = adapters.encode(model, *read_prompt(None, messages(part))).groups
    assert group.grid == (2, 2, 3)


def test_a_size_beyond_the_processors_limits_is_refused() -> None:
    """256 x 256 pixels are the tiny processor's limit."""
    part = {"type": "image", "image": PICTURE, "resized_height": 512, "resized_width": 512}
    with pytest.raises(
        fastattr.ImageError, match=r"asks for a picture of 512 x 512 pixels .* shows it at 256 x 256; raise"
    ):
        fastattr.attribute(wrapped("qwen2_5_vl"), None, messages(part), ANSWER)


@pytest.mark.parametrize("family", ["llava_clip", "mistral3", "idefics3", "gemma3"])
def test_families_that_size_pictures_otherwise_refuse(family: str) -> None:
    held = TINY[family]()
    model = fastattr.wrap(held.hf_model, held.processor)
    part = {"type": "image", "image": PICTURE, "max_pixels": 10_000}
    with pytest.raises(
        fastattr.ImageError, match="min_pixels, max_pixels, resized_height, resized_width of a message part"
    ):
        fastattr.attribute(model, None, messages(part), ANSWER)


def test_a_captured_picture_of_a_size_of_its_own() -> None:
    """The user resizes it to another aspect ratio, as the part says; without the part it would not fit the grid."""
    model = wrapped("qwen2_5_vl")
    part = {"type": "image", "resized_height": 64, "resized_width": 32}
    example = adapters.encode(model, *read_prompt(PICTURE, messages(part)))
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4, suppress_tokens=never)
    why = states.attribute(out, image=PICTURE, prompt=messages(part), evidence=True)
    assert why.grids == (((1, 4, 2),),) and why.evidence is not None
    with pytest.raises(fastattr.InputError, match="which is not its shape"):
        states.attribute(out, image=PICTURE, prompt=messages({"type": "image"}))


# --- times -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # GLM's own processor, of NumPy 2
@pytest.mark.parametrize("kind", list(JOINT))
@pytest.mark.parametrize(("n", "fps"), [(4, 2.0), (5, 0.5), (8, 29.97)])
def test_the_model_reads_the_seconds_that_transformers_processor_writes(kind: str, n: int, fps: float) -> None:
    """Compared with transformers' own processor, called by hand with the metadata of these frames."""
    held = getattr(tiny_qwen, kind)()
    joint = real(JOINT[kind], held.processor)
    frames = [picture(64, 96, seed) for seed in range(n)]
    part = {"type": "video", "video": frames, "fps": fps}
    text = joint.apply_chat_template(messages({"type": "video"}), add_generation_prompt=True, tokenize=False)
    known = [{"total_num_frames": n, "fps": fps, "frames_indices": list(range(n))}]
    by_hand = joint(text=[text], videos=[frames], return_tensors="pt", do_sample_frames=False, video_metadata=known)
    for processor in (held.processor, joint):
        model = fastattr.wrap(held.hf_model, processor)
        example = adapters.encode(model, *read_prompt(None, messages(part)))
        assert example.input_ids.tolist() == by_hand["input_ids"][0].tolist()
        if "second_per_grid_ts" in by_hand:
            told = torch.as_tensor(by_hand["second_per_grid_ts"], dtype=torch.float32)
            torch.testing.assert_close(example.model_inputs["second_per_grid_ts"], told)
    plain = adapters.encode(
        fastattr.wrap(held.hf_model, held.processor), *read_prompt([frames], messages({"type": "video"}))
    )
    if kind != "qwen2_vl":  # which is told no times
        same = torch.equal(plain.input_ids, example.input_ids)
        paced = "second_per_grid_ts" in example.model_inputs
        assert not same or paced or kind == "glm4v"  # GLM-4V writes whole seconds


def test_evidence_and_scales_keep_the_seconds() -> None:
    model = wrapped("qwen3_vl")
    frames = [picture(64, 96, seed) for seed in range(4)]
    visuals, chat = read_prompt(None, messages({"type": "video", "video": frames, "fps": 2.0}))
    examples = [
        *adapters.encode_scales(model, visuals, chat, (1.0, 2.0)),
        adapters.encode(model, [visual.blank() for visual in visuals], chat),
        adapters.encode(model, [visual.hide((0, 0, 0.5, 0.5)) for visual in visuals], chat),
    ]
    for example in examples:
        (text,) = model.decode([example.input_ids.tolist()])
        assert "<0.2 seconds>" in text and "<1.2 seconds>" in text


# --- log and batch ---------------------------------------------------------------------------------------------


def test_prompts_of_the_log_keep_what_parts_ask_for() -> None:
    """Sources are removed, since pictures are given separately; sizes and times are kept, also through JSON."""
    asked = messages(
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}, "max_pixels": 1000},
        {"type": "video", "video": ["a.png", "b.png"], "fps": 2.0},
        {"type": "image"},
    )
    prompt = prompt_of(asked)
    again = from_json(json.loads(json.dumps(to_json(prompt))))
    for each in (prompt, again):
        assert isinstance(each, Chat)
        assert [dict(part) for part in each.parts[:3]] == [
            {"type": "image", "max_pixels": 1000},
            {"type": "video", "fps": 2.0},
            {"type": "image"},
        ]
    with pytest.raises(fastattr.InputError, match="with the key 'max_pixel'"):
        prompt_of(messages({"type": "image", "max_pixel": 1000}))
