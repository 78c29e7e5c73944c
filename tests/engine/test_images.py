"""Pictures in every form people have them, and a clear refusal of the rest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from fastattr.images import Visual, read_image, read_visuals
from tests.engine import family_models as tiny
from tests.engine.family_models import ANSWER, PROMPT

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Any) -> np.ndarray:
    """`[h w 3]` of what was read."""
    read = read_image(image)
    assert read.mode == "RGB"
    return np.asarray(read)


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    held = tiny.qwen2_vl()
    return fastattr.wrap(held.hf_model, held.processor)


# --- forms that are read ------------------------------------------------------------------------------------


def test_path_bytes_picture_and_array_are_one_image(tmp_path: Path) -> None:
    image = tiny.picture()
    path = tmp_path / "a picture.png"
    image.save(path)
    data = path.read_bytes()
    expected = np.asarray(image)
    for form in (path, str(path), data, bytearray(data), memoryview(data), image, expected, torch.tensor(expected)):
        np.testing.assert_array_equal(pixels(form), expected)


def test_arrays_of_every_kind() -> None:
    grey = np.array([[0, 51], [102, 255]], dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for array in (
        grey,
        grey[..., None],
        rgb,
        grey.astype(np.uint16) * 257,
        (grey / 255).astype(np.float32),
        rgb / 255.0,
    ):
        np.testing.assert_array_equal(pixels(array), rgb)
    np.testing.assert_array_equal(pixels(grey > 60)[..., 0], [[0, 0], [255, 255]])


def test_transparency_shows_white() -> None:
    clear = Image.new("RGBA", (2, 1), (*RED, 255))
    clear.putpixel((1, 0), (0, 0, 255, 0))
    assert pixels(encoded(clear)).tolist() == [[list(RED), list(WHITE)]]
    assert pixels(np.asarray(clear)).tolist() == [[list(RED), list(WHITE)]]

    half = Image.new("RGBA", (1, 1), (*RED, 128))
    assert pixels(encoded(half))[0, 0].tolist() == [255, 127, 127]

    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert pixels(encoded(grey)).tolist() == [[list(BLACK), list(WHITE)]]


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLACK])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=1)
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert pixels(data).tolist() == [[list(RED), list(WHITE)]]


def test_sixteen_bits_of_grey_become_eight() -> None:
    values = np.array([[0, 0x00FF, 0x7F80, 0xFFFF]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert pixels(data)[0, :, 0].tolist() == [0, 0, 0x7F, 0xFF]


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(pixels(encoded(image, "JPEG"))[4, 4], RED, atol=3)


def test_float_tiff() -> None:
    image = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 255]
    bright = Image.fromarray(np.array([[0.0, 200.0]], dtype=np.float32))
    with pytest.raises(fastattr.ImageError, match=r"spans 0.0 to 200.0, expected finite values in \[0, 1\]"):
        read_image(encoded(bright, "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "corner"),  # where the camera's top left pixel (row, column) is to be seen; EXIF 2.3, tag 0x0112
    [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))],
)
def test_exif_orientation(orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (48, 16))
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    for form in (data, Image.open(io.BytesIO(data))):
        seen = pixels(form)
        assert seen.shape == ((48, 16, 3) if orientation >= 5 else (16, 48, 3))
        reddest = {(row, column): int(seen[row, column, 0]) for row in (0, -1) for column in (0, -1)}
        assert max(reddest, key=lambda at: reddest[at]) == corner


# --- forms that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no picture at all", "the image of 17 bytes is not in an image format that Pillow reads"),
        (b"", "the image of 0 bytes is not in an image format"),
        (encoded(tiny.picture())[:300], "cannot be decoded"),
        (encoded(tiny.picture(), "JPEG")[:-200], "the image of .* bytes cannot be decoded: "),
        ("no/such/file.png", "'no/such/file.png' is not a file"),
        ("https://example.org/cat.png", "URLs are not fetched, download it and pass the path or the bytes"),
        ("data:image/png;base64," + "A" * 5000, "cannot be a path"),
        (None, "image is a NoneType, expected a path, a PIL image, an array or encoded bytes"),
        (7, "image is a int, expected a path"),
        ([], "image is an empty list"),
        ([[]], "a video is an empty list"),
        (np.zeros((0, 4, 3), np.uint8), r"has shape \[0, 4, 3\], expected at least one pixel"),
        (np.zeros((4, 0), np.uint8), r"has shape \[4, 0\], expected at least one pixel"),
        (np.zeros((3, 8, 8), np.uint8), r"has shape \[3, 8, 8\], expected \[h w\], \[h w 3\] or \[h w 4\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"has shape \[1, 8, 8, 3\], expected"),
        (np.zeros(8, np.uint8), r"has shape \[8\], expected"),
        (np.zeros((8, 8), np.int64), "is int64, expected uint8, uint16, bool, or float"),
        (np.zeros((8, 8), complex), "is complex128, expected uint8"),
        (np.full((8, 8), 255.0), r"spans 255.0 to 255.0, expected finite values in \[0, 1\]"),
        (np.full((8, 8), np.nan), r"expected finite values in \[0, 1\]"),
        (np.full((8, 8), -0.1), r"spans -0.1 to -0.1"),
        (torch.zeros(8, 8, dtype=torch.bfloat16), "the Tensor cannot be read as an array"),
        (torch.zeros(8, 8, requires_grad=True), "the Tensor cannot be read as an array"),
    ],
)
def test_what_is_not_a_picture(image: Any, message: str) -> None:
    with pytest.raises(fastattr.ImageError, match=message):
        read_visuals(image)


def test_a_directory_is_not_a_picture(tmp_path: Path) -> None:
    with pytest.raises(fastattr.ImageError, match="is not a file"):
        read_image(tmp_path)


def test_a_truncated_picture_opened_by_the_user() -> None:
    lazy = Image.open(io.BytesIO(encoded(tiny.picture(), "JPEG")[:-200]))
    with pytest.raises(fastattr.ImageError, match="the PIL image cannot be decoded: "):
        read_image(lazy)


def test_a_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(fastattr.ImageError, match=r"cannot be decoded: Image size .* exceeds limit"):
        read_image(encoded(tiny.picture()))


def test_one_bad_picture_among_good_ones() -> None:
    with pytest.raises(fastattr.ImageError, match=r"'missing.png' is not a file"):
        read_visuals([tiny.picture(), "missing.png"])


# --- lists and videos ---------------------------------------------------------------------------------------------


def test_lists_are_images_and_nested_lists_are_videos() -> None:
    one, two = tiny.picture(20, 30), tiny.picture(40, 50)
    assert [len(visual.frames) for visual in read_visuals(one)] == [1]
    assert [visual.size for visual in read_visuals([one, two])] == [(20, 30), (40, 50)]
    assert [len(visual.frames) for visual in read_visuals([[one, one, one], two])] == [3, 1]


def test_frames_of_different_sizes() -> None:
    with pytest.raises(
        fastattr.ImageError, match=r"frames of sizes \[\(30, 20\), \(50, 40\)\] \(width, height\), expected one size"
    ):
        read_visuals([[tiny.picture(20, 30), tiny.picture(40, 50)]])


def test_blank_keeps_the_sizes_and_nothing_else() -> None:
    array = np.zeros((2, 3, 3), np.uint8)
    array[0] = (100, 200, 50)
    (visual,) = read_visuals([[array, 255 - array]])
    blank = visual.blank()
    assert [frame.size for frame in blank.frames] == [(3, 2), (3, 2)]
    assert {tuple(pixel) for frame in blank.frames for pixel in np.asarray(frame).reshape(-1, 3)} == {(128, 128, 128)}


def test_display_keeps_the_aspect_and_never_vanishes() -> None:
    assert Visual((Image.new("RGB", (4096, 2048)),)).display().shape == (1, 512, 1024, 3)
    assert Visual((Image.new("RGB", (20_000, 1)),)).display().shape == (1, 1, 1024, 3)
    small = tiny.picture(20, 30)
    np.testing.assert_array_equal(Visual((small,)).display()[0], np.asarray(small))


# --- through a model ------------------------------------------------------------------------------------------------


def test_one_pixel(model: fastattr.Model) -> None:
    why = fastattr.attribute(model, Image.new("RGB", (1, 1), RED), PROMPT, ANSWER)
    assert why.picture_sizes == ((1, 1),)
    assert why.image[0].isfinite().all()


def test_a_panorama_the_processor_refuses(model: fastattr.Model) -> None:
    with pytest.raises(
        fastattr.ImageError, match="refuses images of 20000 x 50 pixels: absolute aspect ratio must be smaller"
    ):
        fastattr.attribute(model, Image.new("RGB", (20_000, 50)), PROMPT, ANSWER)


def test_a_panorama_that_can_be_shown(model: fastattr.Model) -> None:
    wide = Image.new("RGB", (20_000, 200), WHITE)
    why = fastattr.attribute(model, wide, PROMPT, ANSWER, scales=(1.0,))
    ((_, height, width),) = why.grids[0]
    assert height * width <= 256  # the processor's limit of 256 x 256 pixels, in cells of 16 x 16
    assert width > 50 * height
    assert why.picture_sizes == ((200, 20_000),)
    assert why.pictures[0].shape == (1, 10, 1024, 3)


def test_more_image_tokens_than_anybody_has_memory_for(model: fastattr.Model) -> None:
    with pytest.raises(
        fastattr.ScaleError, match=r"scale 8 needs .* image tokens, expected at most 65536; use a smaller scale"
    ):
        fastattr.attribute(model, [tiny.picture(256, 256)] * 5, PROMPT, ANSWER, scales=(1.0, 8.0))
