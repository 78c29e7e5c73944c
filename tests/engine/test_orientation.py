"""The picture under the map is the picture the model saw, whatever its EXIF orientation and however it was given.

A magenta block is planted in a picture that is wider than high. What moves most at the model's image tokens must be the
cell that covers the block on the picture of the attribution.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from fastattr import AttributionConfig
from fastattr.datasets import open_dataset
from fastattr.log import AttributionLogger, inbox, read
from fastattr.log.worker import work
from tests.engine.families.proof import embeddings_at_image_tokens
from tests.engine.family_models import ANSWER, PROMPT, TINY, picture

HEIGHT, WIDTH, CELL = 64, 96, 16
BLOCK = (1, 5)  # row and column of the cell it lies in, as the camera wrote it down
ORIENTATIONS = range(1, 9)


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    held = TINY["qwen2_vl"]()
    return fastattr.wrap(held.hf_model, held.processor)


def photo(orientation: int, *, block: bool = True) -> bytes:
    pixels = np.asarray(picture(HEIGHT, WIDTH)) // 4 + 96
    if block:
        row, column = BLOCK
        pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = (255, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def as_path(data: bytes, folder: Path) -> Path:
    path = folder / f"{abs(hash(data))}.png"
    path.write_bytes(data)
    return path


FORMS: dict[str, Callable[[bytes, Path], Any]] = {
    "path": as_path,
    "bytes": lambda data, _: data,
    "data url": lambda data, _: "data:image/png;base64," + base64.b64encode(data).decode(),
    "PIL image": lambda data, _: Image.open(io.BytesIO(data)),
    "converted": lambda data, _: Image.open(io.BytesIO(data)).convert("RGB"),
    "array": lambda data, _: np.asarray(Image.open(io.BytesIO(data))),
}


def block_on(shown: np.ndarray) -> tuple[int, int]:
    """The cell of a picture `[H W 3]` that is magenta."""
    magenta = np.all(np.abs(shown.astype(int) - (255, 0, 255)) < 30, axis=-1)
    rows, columns = np.nonzero(magenta)
    assert len(rows) == CELL * CELL
    return int(rows.mean()) // CELL, int(columns.mean()) // CELL


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_cell_over_the_block_is_the_one_that_moves(
    model: fastattr.Model, form: str, orientation: int, tmp_path: Path
) -> None:
    given, plain = (FORMS[form](photo(orientation, block=block), tmp_path) for block in (True, False))
    why = fastattr.attribute(model, given, PROMPT, ANSWER, scales=(1.0,), evidence=False)
    shown = why.pictures[0][0]
    before, group = embeddings_at_image_tokens(model, plain)
    after, _ = embeddings_at_image_tokens(model, given)
    assert group.grid[1:] == why.image[0].shape[2:] == (shown.shape[0] // CELL, shown.shape[1] // CELL)
    moved = (after - before).norm(dim=1).view(group.grid[1:])
    assert divmod(int(moved.argmax()), moved.shape[1]) == block_on(shown)
    turned = form in ("path", "bytes", "data url") and orientation != 1
    assert any("EXIF orientation" in note for note in why.notes) == turned


def generated(model: fastattr.Model, image: Image.Image, **options: Any) -> tuple[Any, torch.Tensor]:
    """The user's own processor and `generate`, given the PIL image unchanged."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": content}]
    text = model.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = model.processor(text=[text], images=[image], return_tensors="pt")
    if model.family.token_types == "mm_token_type_ids":  # as the joint processor makes them
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.image_token_id).long()
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model, **options) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=4, suppress_tokens=never)
    return states, out


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_capture_is_explained_on_the_picture_the_processor_was_given(
    model: fastattr.Model, orientation: int, tmp_path: Path
) -> None:
    data = photo(orientation)
    given = Image.open(io.BytesIO(data))
    states, out = generated(model, given)
    why = states.attribute(out, image=given, prompt=PROMPT, evidence=True)
    assert why.image[0].shape[2:] == (4, 6) and why.pictures[0].shape == (1, HEIGHT, WIDTH, 3)
    assert block_on(why.pictures[0][0]) == BLOCK
    again = fastattr.attribute(model, given, PROMPT, why.token_ids, scales=(1.0,))
    torch.testing.assert_close(why.image[0], again.image[0], rtol=1e-3, atol=1e-3)
    if orientation < 5:  # the same shape; that the file says otherwise is noted
        noted = states.attribute(out, image=data, prompt=PROMPT)
        assert any("EXIF orientation" in note for note in noted.notes) == (orientation != 1)
    else:
        with pytest.raises(
            fastattr.InputError, match="6 x 4 cells, which is not its shape, but it is that of the picture"
        ):
            states.attribute(out, image=as_path(data, tmp_path), prompt=PROMPT)


@pytest.mark.parametrize("family", ["qwen2_vl", "mistral3"])
@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [
        (64, 96, True),
        (128, 192, True),
        (70, 90, True),
        (1000, 1500, True),
        (96, 64, False),
        (64, 64, False),
        (30, 96, False),
    ],
)
def test_a_picture_of_another_shape_is_refused(family: str, height: int, width: int, fits: bool) -> None:
    held = TINY[family]()
    model = fastattr.wrap(held.hf_model, held.processor)
    states, out = generated(model, picture(HEIGHT, WIDTH))
    other = picture(height, width)
    if fits:
        assert states.attribute(out, image=other, prompt=PROMPT).picture_sizes == ((height, width),)
    else:
        with pytest.raises(fastattr.InputError, match=f"picture 1 has {width} x {height} pixels"):
            states.attribute(out, image=other, prompt=PROMPT)


@pytest.mark.parametrize("family", ["qwen2_vl", "mistral3", "llava_clip"])
def test_every_picture_fits_its_own_grid(family: str) -> None:
    """Also long and small ones, which are rounded most, and families whose grid has a fixed shape."""
    held = TINY[family]()
    model = fastattr.wrap(held.hf_model, held.processor)
    for height, width in ((33, 47), (36, 200), (200, 36), (250, 260), (40, 300)):
        states, out = generated(model, picture(height, width))
        assert states.attribute(out, image=picture(height, width), prompt=PROMPT).picture_sizes == ((height, width),)


@pytest.mark.parametrize("explain", ["thread", "worker"])
def test_log_records_show_what_the_model_saw(model: fastattr.Model, explain: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sample_rate": 1.0, "images": "store", "explain": explain}
    logger = AttributionLogger(
        tmp_path / "log", model=model, attribution=AttributionConfig(scales=(1.0,), evidence=False), **options
    )
    expected = {}
    for orientation in ORIENTATIONS:
        data = photo(orientation)
        given = Image.open(io.BytesIO(data))
        states, out = generated(model, given, buffer=logger.buffer)
        answer = out[0].tolist()[states.n_prompt :]
        forms = {"pil": given, "bytes": data, "path": as_path(data, tmp_path)}
        assert logger.submit(states, out, request_id=f"captured {orientation}", images=[given], prompt=PROMPT)
        expected[f"captured {orientation}"] = (4, 6)
        for name, form in forms.items():
            assert logger.submit_replay(PROMPT, [form], answer, request_id=f"{name} {orientation}")
            expected[f"{name} {orientation}"] = (6, 4) if orientation >= 5 and name != "pil" else (4, 6)
    logger.shutdown()
    if explain == "worker":
        work(inbox.read_config(logger.config.spool_path), model, stop=threading.Event(), until_empty=True)
    found = {each.envelope.request_id: each.attribution for each in read(tmp_path / "log")}
    assert {id: tuple(why.image[0].shape[2:]) for id, why in found.items()} == expected
    for id, why in found.items():
        shown = why.pictures[0][0]
        assert (shown.shape[0] // CELL, shown.shape[1] // CELL) == expected[id]
        turned = int(id[-1]) != 1 and id.split()[0] in ("bytes", "path")
        assert any("EXIF orientation" in note for note in why.notes) == turned
        upright = np.asarray(Image.open(io.BytesIO(photo(1))))
        back = Image.fromarray(shown)
        if turned:  # undone by hand, EXIF 2.3
            undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose
            back = back.transpose(Image.Transpose(undo[int(id[-1])]))
        np.testing.assert_array_equal(np.asarray(back), upright)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_of_a_data_set_lie_on_the_upright_picture(orientation: int, tmp_path: Path) -> None:
    """Masks drawn on the turned picture, and masks with the same EXIF orientation as the picture."""
    for folder in ("images", "masks/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(photo(orientation))
    with Image.open(io.BytesIO(photo(orientation))) as opened:
        lies = np.all(np.asarray(opened) == (255, 0, 255), axis=-1)
        exif = opened.getexif()
    Image.fromarray(lies).save(tmp_path / "masks/a/camera.png", exif=exif)
    dataset = open_dataset(tmp_path)
    shown = np.asarray(dataset.read("a").image)
    upright = np.all(shown == (255, 0, 255), axis=-1)
    Image.fromarray(upright).save(tmp_path / "masks/a/upright.png")
    for name in ("camera", "upright"):
        (mention,) = dataset.read("a").mentions(f"A {name} there.")
        assert mention.mask is not None
        np.testing.assert_array_equal(mention.mask, upright)
