"""Small files that would cost a machine its memory or time, or start another program, are refused by their headers."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from fastattr.errors import FastattrError, ImageError, SaveError
from fastattr.images import read_image, read_visual
from fastattr.storage import load
from tests.engine.samples import make_attribution

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, alpha: bool = False, before: bytes = b"", rows: int | None = None) -> bytes:
    """A black PNG, with chunks before its pixels, and perhaps fewer rows than it says."""
    row = bytes(1 + width * (4 if alpha else 3))
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(row) for _ in range(height if rows is None else rows)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 6 if alpha else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def webp(width: int, height: int) -> bytes:
    return encode(Image.new("RGB", (width, height)), "WEBP", lossless=True, quality=0, method=0)


def pages(*sizes: tuple[int, int]) -> bytes:
    first, *others = (Image.new("1", size) for size in sizes)
    return encode(first, "TIFF", save_all=True, append_images=others, compression="group4")


def packed(n_bytes: int, kind: bytes) -> bytes:
    return png(8, 8, before=chunk(kind, b"a\0\0" + zlib.compress(bytes(n_bytes), 9)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: webp(9_000, 8_000), "decoding it would take"),
        (lambda: png(12_000, 12_000, rows=1), "decoding it would take"),
        (lambda: png(9_000, 9_000, alpha=True, rows=1), "decoding it would take"),
        (lambda: pages((12_000, 12_000)), "decoding it would take"),
        (lambda: png(60_000, 60_000, rows=1), "cannot be decoded"),
        (lambda: packed(100_000_000, b"zTXt"), "cannot be decoded"),
        (lambda: packed(100_000_000, b"iCCP"), "cannot be decoded"),
    ],
    ids=["webp", "rgb", "rgba", "tiff", "header", "text", "profile"],
)
def test_bombs_are_refused_before_they_are_decoded(make: Callable[[], bytes], reason: str) -> None:
    data = make()
    before_kib = _peak_kib()
    with pytest.raises(ImageError, match=reason):
        read_image(data)
    assert _peak_kib() - before_kib < 100_000


def _peak_kib() -> int:
    """The most that this process has ever held since it was asked before."""
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1])


def test_photographs_of_large_cameras_are_read() -> None:
    """102 million pixels, with no warning; and as large a WEBP as phones make."""
    assert read_image(encode(Image.new("RGB", (11_648, 8_736)), "JPEG")).size == (11_648, 8_736)
    assert read_image(webp(8_160, 6_120)).size == (8_160, 6_120)


def test_a_later_page_or_frame_is_measured_as_the_first() -> None:
    data = pages((8, 8), (12_000, 12_000))
    assert read_image(data).size == (8, 8)
    with pytest.raises(ImageError, match="decoding it would take"):
        read_visual(data, "video")


def test_a_long_animation_is_counted_before_it_is_decoded() -> None:
    """An animation control chunk that says there are 2^31 frames, and one that has a million for real."""
    claimed = png(8, 8, before=chunk(b"acTL", struct.pack(">II", 2**31, 0)))
    began_s = time.monotonic()
    with pytest.raises(ImageError, match="too much to decode"):
        read_visual(claimed, "video")
    assert read_image(claimed).size == (8, 8)
    assert time.monotonic() - began_s < 5


def test_many_frames_take_time_that_grows_as_they_do() -> None:
    frames = [Image.fromarray(np.full((2, 2), k % 256, np.uint8)) for k in range(600)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=20)
    assert len(read_visual(data, "video").frames) == 600


def test_no_bytes_start_another_program(tmp_path: Path) -> None:
    """Neither as a picture, nor where a result says that they are one."""
    marker, fake = tmp_path / "was run", tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    fake.chmod(0o755)
    path = tampered(tmp_path, pictures=torch.frombuffer(bytearray(EPS), dtype=torch.uint8))
    code = (
        "import sys\nfrom fastattr.errors import ImageError, SaveError\nfrom fastattr.images import read_image\n"
        "from fastattr.storage import load\n"
        f"for read, given in ((read_image, {EPS!r}), (load, {str(path)!r})):\n"
        "    try:\n        read(given)\n        sys.exit(1)\n"
        "    except (ImageError, SaveError):\n        pass\n"
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert not marker.exists()


def tampered(folder: Path, pictures: torch.Tensor | None = None, **changes: Any) -> Path:
    """A saved result, with entries of its manifest or its pictures replaced."""
    path = folder / "a.safetensors"
    make_attribution().save(path)
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["fastattr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if pictures is not None:
        tensors = {name: pictures if name.startswith("picture.") else each for name, each in tensors.items()}
    save_file(tensors, path, metadata={"fastattr": json.dumps({**manifest, **changes})})
    return path


@pytest.mark.parametrize(
    "picture", [b"rubbish", EPS, png(60_000, 60_000, rows=1), webp(8, 8)], ids=["rubbish", "eps", "bomb", "webp"]
)
def test_pictures_of_a_result_are_png_of_a_reasonable_size(tmp_path: Path, picture: bytes) -> None:
    with pytest.raises(SaveError, match="cannot be read as an attribution"):
        load(tampered(tmp_path, pictures=torch.frombuffer(bytearray(picture), dtype=torch.uint8)))


@pytest.mark.parametrize(
    "changes",
    [
        {"frames": [10**9]},
        {"frames": ["x"]},
        {"frames": [-1]},
        {"images": 10**9},
        {"images": -1},
        {"config": None},
        {"tokens": None},
        {"tokens": 5},
        {"tokens": []},
        {"spans": [["a", "b"]]},
        {"spans": [[0, 10**12]]},
        {"response": 5},
        {"calibration": {"a": 1}},
        {"calibration": [1]},
        {"extents": [[float("nan")] * 4]},
        {"extents": [["a"] * 4]},
        {"versions": 5},
        {"special": [10**9]},
        {"reasoning": [[5, 1]]},
        {"notes": [[]]},
    ],
    ids=str,
)
def test_a_result_whose_parts_do_not_fit_is_a_save_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SaveError, match="cannot be read as an attribution"):
        load(tampered(tmp_path, **changes))


@pytest.mark.parametrize("manifest", ["[" * 100_000, "[1]", "null", "1", "{"], ids=lambda text: text[:3])
def test_a_manifest_that_is_none_is_a_save_error(tmp_path: Path, manifest: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"fastattr": manifest})
    with pytest.raises(SaveError):
        load(tmp_path / "a.safetensors")


def test_a_result_that_is_whole_is_read(tmp_path: Path) -> None:
    assert load(tampered(tmp_path)).response == make_attribution().response
    with pytest.raises(FastattrError):
        load(tmp_path / "none.safetensors")
