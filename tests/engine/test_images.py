"""Pictures in every form people have them, and a clear refusal of the rest."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps, PngImagePlugin
from transformers.image_utils import load_image

import fastattr
from fastattr.images import Visual, read_image, read_visual, read_visuals
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


def png(depth: int, color: int, row: bytes, clear: bytes = b"", *, width: int = 2) -> bytes:
    """A PNG of one row, written by hand (PNG specification, 3rd edition, chapters 5 and 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *([(b"tRNS", clear)] if clear else []),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "row", "clear", "grey"),
    [
        (1, b"\x40", 0, [255, 255]),  # pixels 0 and 1; the black one is clear, so white
        (2, b"\x10", 1, [0, 255]),
        (2, b"\x20", 1, [0, 170]),
        (4, b"\x0f", 0, [255, 255]),
        (4, b"\x3f", 15, [51, 255]),
        (8, b"\x07\x08", 7, [255, 8]),
        (16, struct.pack(">HH", 0x1234, 0x12FF), 0x1234, [255, 0x12]),  # one of two greys that are alike in 8 bits
        (16, struct.pack(">HH", 0, 0x12FF), 0, [255, 0x12]),
    ],
)
def test_a_transparent_grey_of_a_png(depth: int, row: bytes, clear: int, grey: list[int]) -> None:
    assert pixels(png(depth, 0, row, struct.pack(">H", clear)))[0, :, 0].tolist() == grey


def test_a_transparent_colour_of_sixteen_bits_is_refused() -> None:
    """Pillow keeps 8 bits of each channel, in which both pixels have the same colour."""
    row = struct.pack(">6H", 0x1234, 0, 0, 0x12FF, 0, 0)
    with pytest.raises(
        fastattr.ImageError, match="PNG of 16 bits a colour with a transparent colour; convert it to RGBA"
    ):
        read_image(png(16, 2, row, struct.pack(">3H", 0x1234, 0, 0)))
    assert pixels(png(16, 2, row)).tolist() == [[[0x12, 0, 0]] * 2]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_modes_of_sixteen_bits(mode: str) -> None:
    values = [0, 0x00FF, 0x7F80, 0xFFFF]
    image = Image.frombytes(mode, (4, 1), struct.pack(">4H" if mode == "I;16B" else "<4H", *values))
    assert pixels(image)[0].tolist() == [[0] * 3, [0] * 3, [0x7F] * 3, [0xFF] * 3]
    for order in ("<u2", ">u2"):  # arrays of the same content are the same picture
        np.testing.assert_array_equal(pixels(np.array([values], order)), pixels(image))


def test_a_ppm_of_sixteen_bits() -> None:
    assert pixels(b"P5 2 1 65535\n" + struct.pack(">HH", 0x7F80, 0xFFFF))[0, :, 0].tolist() == [0x7F, 0xFF]


def test_integers_without_a_known_range_are_refused() -> None:
    """The value of white is unknown in an integer array, in mode I and in a 32-bit TIFF."""
    values = np.full((4, 4), 200, np.int32)
    for form, told in (
        (values, "is int32, expected uint8"),
        (Image.fromarray(values), "the PIL image is of mode I \\(32-bit integers\\)"),
        (Image.new("L", (4, 4), 200).convert("I"), "mode I"),
        (encoded(Image.fromarray(values), "TIFF"), "mode I"),
    ):
        with pytest.raises(fastattr.ImageError, match=told):
            read_image(form)


COLOURS = np.array([[(250, 20, 30), (10, 200, 40), (30, 40, 220), (120, 130, 140)]], np.uint8)


@pytest.mark.parametrize(("mode", "error"), [("CMYK", 0), ("YCbCr", 2), ("HSV", 5), ("RGBX", 0), ("LAB", 12)])
def test_other_colour_spaces(mode: str, error: int) -> None:
    """Converting there and back gives the colours, up to rounding."""
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        converted = ImageCms.applyTransform(image, to_lab)
        assert converted is not None
    else:
        converted = image.convert(mode)
    assert converted.mode == mode
    np.testing.assert_allclose(pixels(converted).astype(int), COLOURS, rtol=0, atol=error)


def test_modes_with_transparency_over_white() -> None:
    """Half-transparent black is middle grey, with premultiplied alpha or not, in every mode."""
    for mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        colour = (0, 128) if mode in ("LA", "La", "PA") else (0, 0, 0, 128)
        assert pixels(Image.new(mode, (1, 1), colour))[0, 0].tolist() == [127] * 3, mode
    grey = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)))  # a fifth of it
    expected = round(100 * 0.2 + 255 * 0.8)
    for image in (grey, grey.convert("La"), grey.convert("RGBA").convert("RGBa")):
        np.testing.assert_allclose(pixels(image)[0, 0], expected, atol=2)  # premultiplied values are rounded


def test_one_bit() -> None:
    assert pixels(Image.fromarray(np.array([[False, True]])))[0].tolist() == [[0] * 3, [255] * 3]


def test_sixteen_bits_of_grey_become_eight() -> None:
    values = np.array([[0, 0x00FF, 0x7F80, 0xFFFF]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert pixels(data)[0, :, 0].tolist() == [0, 0, 0x7F, 0xFF]


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(pixels(encoded(image, "JPEG"))[4, 4], RED, atol=3)


def tiff(bits: int, photometric: int, row: bytes, *, width: int, sample_format: int = 1) -> bytes:
    """One uncompressed row of grey. Pillow cannot write these."""
    fields = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    fields += [(277, 3, 1), (278, 4, 1), (279, 4, len(row)), (339, 3, sample_format)]
    row += b"\0" * (len(row) % 2)
    tags = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I" if kind == 4 else "<Hxx", value)
        for tag, kind, value in fields
    )
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(fields)) + tags + b"\0" * 4


GREY = [0, 64, 128, 255]


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    ("bits", "sample_format", "row"),
    [
        (8, 1, bytes(GREY)),
        (12, 1, bytes([0x00, 0x04, 0x00, 0x80, 0x0F, 0xFF])),  # 0, 0x400, 0x800 and 0xfff
        (16, 1, struct.pack("<4H", 0, 0x4000, 0x8000, 0xFFFF)),
        (32, 3, struct.pack("<4f", 0, 64 / 255, 128 / 255, 1)),
    ],
)
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_of_a_tiff(white_is_zero: bool, bits: int, sample_format: int, row: bytes, opened: bool) -> None:
    data = tiff(bits, 0 if white_is_zero else 1, row, width=4, sample_format=sample_format)
    if white_is_zero and bits == 12:  # Pillow reads no such file
        with pytest.raises(fastattr.ImageError):
            read_image(data)
        return
    image = Image.open(io.BytesIO(data)) if opened else data
    expected = [255 - grey for grey in GREY] if white_is_zero else GREY
    for _ in range(2):  # Pillow forgets how a picture lies in its file once it is decoded
        assert np.abs(pixels(image)[0, :, 0].astype(int) - expected).max() <= 1


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
def test_exif_orientation(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (48, 16))
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    for form in (data, path, url, path.as_uri()):
        seen = pixels(form)
        assert seen.shape == ((48, 16, 3) if orientation >= 5 else (16, 48, 3))
        reddest = {(row, column): int(seen[row, column, 0]) for row in (0, -1) for column in (0, -1)}
        assert max(reddest, key=lambda at: reddest[at]) == corner
        np.testing.assert_array_equal(seen, np.asarray(load_image(str(path))))  # as transformers reads a path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_the_orientation_of_a_pil_image_is_ignored(orientation: int, kind: str) -> None:
    """transformers' processors read its pixels and ignore its tags, so the model sees them unturned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(tiny.picture(16, 48), kind, exif=exif)
    lies = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), lies)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data)).convert("RGB")), lies)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(pixels(data), turned)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(orientation: int) -> None:
    """Pillow itself turns it when it is loaded."""
    data = encoded(tiny.picture(16, 48), "TIFF", tiffinfo={0x0112: orientation})
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert expected.shape == ((48, 16, 3) if orientation >= 5 else (16, 48, 3))
    np.testing.assert_array_equal(pixels(data), expected)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), expected)


def exif_with(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF data of orientation 6 and another tag, which may be broken (TIFF 6.0, section 2)."""
    held = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 8 + 2 + 2 * 12 + 4)
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, count) + held
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + b"\0\0\0\0" + (value if len(value) > 4 else b"")


@pytest.mark.parametrize(
    "exif",
    [
        exif_with(0x011A, 10, 1, struct.pack("<ii", -1, 0)),
        exif_with(0x011A, 2, 3, b"72\0"),
        exif_with(0x8769, 2, 2, b"a\0"),
    ],
)
def test_a_broken_tag_beside_the_orientation(exif: bytes) -> None:
    assert pixels(encoded(Image.new("RGB", (9, 5)), "JPEG", exif=exif)).shape == (9, 5, 3)


# --- forms that are refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no picture at all", "the image of 17 bytes is not in an image format that is read here"),
        (b"", "the image of 0 bytes is not in an image format"),
        (encoded(tiny.picture())[:300], "cannot be decoded"),
        (encoded(tiny.picture(), "JPEG")[:-200], "the image of .* bytes cannot be decoded: "),
        ("no/such/file.png", "'no/such/file.png' is not a file"),
        ("https://example.org/cat.png", "URLs are not fetched, download it and pass the path or the bytes"),
        ("A" * 5000, "cannot be a path: .*; write base64 as a data: URL"),
        ("data:image/png;base64," + "A" * 5000, "image 'data:image/png;base64,AAA.* is not in an image format"),
        ("data:image/png;base64,A*", "is not base64"),
        ("data:image/png,abc", "expected data:image/png;base64,"),
        ("file:///no/such/file.png", "'/no/such/file.png' is not a file"),
        ("file://server/share/cat.png", "names a file of 'server', expected one of this machine"),
        ("file://cat.png", "names a file of 'cat.png', expected one of this machine"),
        ("S3://bucket/cat.png", "URLs are not fetched"),
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


DAMAGED = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "ICO",
    "TGA",
    "QOI",
    "PCX",
    "SGI",
    "DDS",
)


@pytest.mark.filterwarnings("ignore")  # of decoders, which go on after them
@pytest.mark.parametrize("kind", DAMAGED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_a_picture_or_an_image_error(kind: str, data: st.DataObject) -> None:
    """Bytes of pictures and animations are changed, cut off, removed and inserted."""
    modes = {"JPEG": ("RGB", "CMYK"), "MPO": ("RGB",), "GIF": ("P",), "QOI": ("RGB", "RGBA"), "AVIF": ("RGB", "RGBA")}
    mode = data.draw(st.sampled_from(modes.get(kind, ("RGB", "L"))))
    exif = (
        {"exif": exif_with(0x011A, 5, 1, struct.pack("<II", 72, 1))} if kind in ("JPEG", "PNG", "WEBP", "AVIF") else {}
    )
    more = (
        {"save_all": True, "append_images": [Image.new(mode, (20, 12))]}
        if kind in ("GIF", "WEBP", "TIFF", "MPO")
        else {}
    )
    whole = encoded(tiny.picture(12, 20).convert(mode), kind, **exif, **more)
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken) - 1))
        match data.draw(st.sampled_from(("change", "change", "cut", "leave out", "put in"))):
            case "change":
                broken[at] = data.draw(st.integers(0, 255))
            case "cut":
                del broken[max(1, at) :]
            case "leave out":
                del broken[at : at + min(4, len(broken) - 1)]
            case "put in":
                broken[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        broken = broken or bytearray(b"x")
    for wanted in ("image", "video"):
        try:
            visual = read_visual(bytes(broken), wanted)
        except fastattr.ImageError as error:
            assert str(error)
        else:
            assert all(frame.mode == "RGB" for frame in visual.frames)


def test_memory_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a MemoryError a batch tries smaller parts; an ImageError would fail the row."""

    def load(self: Any, *_: Any) -> None:
        raise MemoryError("no room")

    data = encoded(tiny.picture())
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(MemoryError, match="no room"):
        read_image(data)


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def ghostscript(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    with pytest.raises(fastattr.ImageError, match="is not in an image format that is read here"):
        read_image(encoded(tiny.picture(), "EPS"))


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
