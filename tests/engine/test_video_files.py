"""Animated pictures and movies: which frames are shown, their times, and notes on skipped frames."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

import fastattr
from fastattr import adapters, video
from fastattr.images import read_image, read_visual, read_visuals
from fastattr.video import Sampling, choose_frames, is_movie
from tests.engine import family_models as tiny
from tests.engine.families import tiny_qwen
from tests.engine.family_models import ANSWER, PROMPT

# colour of frame k of a made-up video: distinct even after compression
SHADES = [(16 * k, 255 - 16 * k, 128) for k in range(16)]


def animated(kind: str, n: int = 5, **options: Any) -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (32, 24), shade) for shade in SHADES[:n]]
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], **lossless, **options)
    return stream.getvalue()


def movie(
    path: Path, n: int = 16, fps: int = 4, *, size: tuple[int, int] = (32, 48), turn: int = 0, codec: str = "mpeg4"
) -> Path:
    """Frames of `size` (height, width), each of its own shade, with a white corner at the top left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        stream.time_base = Fraction(1, fps)
        if turn:
            stream.set_display_rotation(turn)
        for k in range(n):
            pixels = np.full((*size, 3), SHADES[k % len(SHADES)], np.uint8)
            pixels[:8, :8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def which(frame: Image.Image) -> int:
    """The number of a frame, by its shade."""
    shade = np.asarray(frame).astype(int)[-4:, -4:].mean(axis=(0, 1))
    distance = np.abs(np.array(SHADES) - shade).sum(axis=1)
    assert distance.min() < 24, f"{shade} is no shade"
    return int(distance.argmin())


@pytest.fixture(scope="module")
def qwen3() -> fastattr.Model:
    held = tiny_qwen.qwen3_vl()
    return fastattr.wrap(held.hf_model, held.processor)


def ask(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": PROMPT}]}]


# --- animated pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_an_animated_picture_is_its_first_frame_and_says_so(kind: str, tmp_path: Path) -> None:
    data = animated(kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(data)
    one = "page 1 of the 5 pages" if kind == "TIFF" else "frame 1 of the 5 frames"
    for form in (data, path, Image.open(io.BytesIO(data))):
        visual = read_visual(form)
        assert [which(frame) for frame in visual.frames] == [0]
        assert len(visual.notes) == 1 and f"only {one} of a {kind} is shown" in visual.notes[0]
    assert which(read_image(data)) == 0
    single = animated(kind, 1)
    assert read_visual(single).notes == ()


def test_a_frame_that_the_user_chose_is_shown() -> None:
    image = Image.open(io.BytesIO(animated("GIF")))
    image.seek(3)
    visual = read_visual(image)
    assert which(visual.frames[0]) == 3 and "only frame 4 of the 5" in visual.notes[0]
    read_visual(image, "video")
    assert image.tell() == 3, "what was given is left as it was"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_as_a_video_all_frames_are_shown_with_their_times(kind: str) -> None:
    for form in (animated(kind, duration=250), Image.open(io.BytesIO(animated(kind, duration=250)))):
        visual = read_visual(form, "video")
        assert [which(frame) for frame in visual.frames] == [0, 1, 2, 3, 4]
        assert visual.timing is not None and visual.notes == ()
        np.testing.assert_allclose(visual.timing.seconds, [0, 0.25, 0.5, 0.75, 1.0])
        assert visual.timing.sampled_fps == pytest.approx(4.0)


def test_frames_of_different_lengths_keep_their_seconds() -> None:
    visual = read_visual(animated("GIF", duration=[100, 300, 100, 500, 200]), "video")
    assert visual.timing is not None
    np.testing.assert_allclose(visual.timing.seconds, [0, 0.1, 0.4, 0.5, 1.0])
    assert visual.timing.sampled_fps == pytest.approx(5 / 1.2)
    assert "different durations" in visual.notes[0]


def test_pages_of_a_tiff_are_frames_of_a_second() -> None:
    visual = read_visual(animated("TIFF", 3), "video")
    assert visual.timing is not None and visual.timing.seconds == (0.0, 1.0, 2.0)


def test_a_stretch_and_a_number_of_an_animation() -> None:
    data = animated("GIF", 16, duration=500)
    chosen = read_visual(data, "video", sampling=Sampling(n_frames=4))
    assert [which(frame) for frame in chosen.frames] == [0, 5, 10, 15]
    assert chosen.timing is not None and chosen.timing.seconds == (0.0, 2.5, 5.0, 7.5)
    assert "4 of the 16 frames" in chosen.notes[0]
    chosen = read_visual(data, "video", sampling=Sampling(start_s=2.0, end_s=4.0))
    assert [which(frame) for frame in chosen.frames] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("way", ["attribute", "batch", "stream"])
def test_the_note_is_in_every_result(way: str) -> None:
    held = tiny.qwen2_vl()
    model, data = fastattr.wrap(held.hf_model, held.processor), animated("GIF")
    config = fastattr.AttributionConfig(scales=(1.0,), evidence=False)
    if way == "attribute":
        why = fastattr.attribute(model, data, PROMPT, ANSWER, scales=(1.0,), evidence=False)
    elif way == "batch":
        (why,) = fastattr.attribute_batch(model, [(data, PROMPT, ANSWER)], config)
    else:
        ids = adapters.encode_response(model, ANSWER).tolist()
        streaming = fastattr.stream(model, data, PROMPT, ids, config=config)
        assert len(list(streaming)) == len(ids)
        why = streaming.attribution()
    assert any("only frame 1 of the 5 frames of a GIF is shown" in note for note in why.notes)


# --- movies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "avi", "webm"])
def test_a_movie_is_a_video_wherever_a_picture_may_stand(suffix: str, tmp_path: Path) -> None:
    """16 frames in 4 seconds: two a second, evenly from the first to the last."""
    path = movie(tmp_path / f"clip.{suffix}", codec="libvpx" if suffix == "webm" else "mpeg4")
    data = path.read_bytes()
    for form in (path, str(path), data, path.as_uri()):
        (visual,) = read_visuals(form)
        assert [which(frame) for frame in visual.frames] == [0, 2, 4, 6, 9, 11, 13, 15]
        assert visual.timing is not None
        np.testing.assert_allclose(visual.timing.seconds, [k / 4 for k in (0, 2, 4, 6, 9, 11, 13, 15)])
        assert "8 of the 16 frames of a video are shown" in visual.notes
    assert read_visual(path, "video").size == (32, 48)


def test_frames_are_those_that_transformers_decodes(tmp_path: Path) -> None:
    path = movie(tmp_path / "clip.mp4")
    theirs, metadata = read_video_pyav(str(path), default_sample_indices_fn, num_frames=None, fps=None)
    ours = read_visual(path, "video", sampling=Sampling(n_frames=16))
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in ours.frames]), theirs)
    assert isinstance(metadata, VideoMetadata) and ours.timing is not None
    assert list(ours.timing.seconds) == metadata.timestamps and ours.timing.sampled_fps == metadata.sampled_fps


@pytest.mark.parametrize(
    ("total", "fps", "sampling", "expected"),
    [  # by hand, by the rule of qwen-vl-utils' smart_nframes and its linspace
        (16, 4.0, Sampling(), (0, 2, 4, 6, 9, 11, 13, 15)),
        (300, 30.0, Sampling(), tuple(round(k * 299 / 19) for k in range(20))),
        (30, 30.0, Sampling(), (0, 10, 19, 29)),  # one second: at least four
        (3, 30.0, Sampling(), (0, 2)),  # of fewer an even number
        (1, 30.0, Sampling(), (0,)),
        (100, 10.0, Sampling(fps=1.0), tuple(11 * k for k in range(10))),
        (100, 10.0, Sampling(fps=100.0), tuple(range(100))),
        (100, 10.0, Sampling(n_frames=3), (0, 50, 99)),
        (100, 10.0, Sampling(start_s=2.0, end_s=4.0), (20, 27, 33, 40)),
        (100, 10.0, Sampling(start_s=9.5, n_frames=2), (95, 99)),
    ],
)
def test_the_rule_of_sampling(total: int, fps: float, sampling: Sampling, expected: tuple[int, ...]) -> None:
    assert choose_frames(total, fps, sampling, "clip") == expected


def test_a_long_movie_is_cut_down_and_what_is_asked_beyond_is_refused() -> None:
    assert len(choose_frames(100_000, 30.0, Sampling(), "clip")) == 768  # an hour
    for sampling, told in (
        (Sampling(fps=2.0), "6666 frames are asked for, expected at most 768; ask for fewer with nframes or fps"),
        (Sampling(n_frames=1000), "1000 frames are asked for"),
        (Sampling(n_frames=200_000), "holds 100000 frames there, but nframes asks for 200000"),
        (Sampling(start_s=5000.0), "ends after 3333.33 s, but video_start is 5000 s"),
    ):
        with pytest.raises(fastattr.ImageError, match=told):
            choose_frames(100_000, 30.0, sampling, "clip")


def test_a_movie_that_needs_too_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = movie(tmp_path / "clip.mp4")
    monkeypatch.setattr(video, "MAX_VIDEO_BYTES", 8 * 32 * 48 * 3 - 1)
    with pytest.raises(
        fastattr.ImageError, match=r"8 frames of 1536 pixels need .* MiB, expected at most .*; ask for fewer"
    ):
        read_visual(path)
    assert len(read_visual(path, sampling=Sampling(n_frames=7)).frames) == 7


@pytest.mark.parametrize(("turn", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_phone_movie_is_turned_upright(turn: int, corner: tuple[int, int], tmp_path: Path) -> None:
    """Degrees counterclockwise: the white corner of the top left moves to where players show it."""
    visual = read_visual(movie(tmp_path / "clip.mp4", turn=turn))
    assert visual.size == ((48, 32) if abs(turn) == 90 else (32, 48))
    shown = np.asarray(visual.frames[0]).astype(int).min(axis=-1)
    assert shown[4 if corner[0] == 0 else -4, 4 if corner[1] == 0 else -4] > 200
    assert sum(shown[y, x] > 200 for y in (4, -4) for x in (4, -4)) == 1


def test_what_is_a_movie_and_what_a_picture() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000"):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, kind)
        assert not is_movie(stream.getvalue()[:12]), kind


def test_a_damaged_movie_is_an_image_error(tmp_path: Path) -> None:
    data = movie(tmp_path / "clip.mp4").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for at in random.integers(8, len(data), 3):
            broken[at] = random.integers(256)
        if random.random() < 0.3:
            broken = broken[: random.integers(12, len(data))]
        try:
            assert read_visual(bytes(broken)).frames
        except fastattr.ImageError as error:
            assert str(error)


def test_a_movie_where_an_image_is_expected(tmp_path: Path) -> None:
    path = movie(tmp_path / "clip.mp4")
    with pytest.raises(fastattr.ImageError, match=r'is a video, but an image is expected; write \{"type": "video"'):
        fastattr.Chat(ask({"type": "image", "image": str(path)}))
        read_visual(path, "image")


def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = movie(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(fastattr.ImageError, match=r"install PyAV to read it: .*pip install \"\.\[video\]\""):
        read_visual(path)


# --- through models -------------------------------------------------------------------------------------------


def test_a_model_reads_the_seconds_of_a_movie(qwen3: fastattr.Model, tmp_path: Path) -> None:
    """Frames 0, 2, 4, ... of 4 a second, in pairs: the model reads the middle of each."""
    path = movie(tmp_path / "clip.mp4")
    why = fastattr.attribute(qwen3, None, ask({"type": "video", "video": str(path)}), ANSWER, scales=(1.0,))
    assert why.image[0].shape[1] == 4 and why.pictures[0].shape[0] == 8
    taken = [k / 4 for k in (0, 2, 4, 6, 9, 11, 13, 15)]
    expected = [f"<{(first + last) / 2:.1f} seconds>" for first, last in zip(taken[::2], taken[1::2], strict=True)]
    text = rendered(qwen3, path)
    assert [piece for piece in expected if piece in text] == expected
    plain = fastattr.attribute(qwen3, path, PROMPT, ANSWER, scales=(1.0,))
    np.testing.assert_array_equal(plain.image[0], why.image[0])


def rendered(model: fastattr.Model, image: Any) -> str:
    (text,) = model.decode([adapters.encode(model, read_visuals(image), PROMPT).input_ids.tolist()])
    return text


def test_where_videos_are_shown_as_images_a_movie_is_too(tmp_path: Path) -> None:
    held = tiny.TINY["mistral3"]()
    model = fastattr.wrap(held.hf_model, held.processor)
    why = fastattr.attribute(model, movie(tmp_path / "clip.mp4"), PROMPT, ANSWER, scales=(1.0,), evidence=False)
    assert why.image[0].shape[1] == 8
    assert any("as their frames" in note for note in why.notes)
