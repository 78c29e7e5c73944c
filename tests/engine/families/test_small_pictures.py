"""Pictures of a few pixels and very long ones are either explained or refused with an error about their size."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import fastattr
from fastattr.cli.app import main
from fastattr.errors import ImageError, ScaleError
from tests.engine.families.table import all_rows
from tests.engine.family_models import ANSWER, PROMPT, picture

SIZES = [(1, 1), (8, 8), (16, 16), (1, 200), (10, 4000)]  # height x width
MAKERS = {row.make.__name__: row.make for row in all_rows()}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of processors, of NumPy 2
@pytest.mark.parametrize("name", MAKERS)
def test_every_family_explains_or_refuses_by_size(name: str) -> None:
    held = MAKERS[name]()
    model = fastattr.wrap(held.hf_model, held.processor)
    for height, width in SIZES:
        try:
            why = fastattr.attribute(model, picture(height, width), PROMPT, ANSWER)
        except ImageError as error:
            assert f"{width} x {height} pixels" in str(error)
            cell = model.family.cell(model.config)
            assert cell == 1 or f"{cell} x {cell} pixels" in str(error)
        except ScaleError as error:
            assert "limits the image size" in str(error)
            assert name == "mistral3"  # whose processor takes no options, so that its limit stays
        else:
            assert len(why.grids) == len(model.scales)
            assert all(maps.isfinite().all() for maps in why.image)


def test_mistral_cannot_read_a_single_image_token() -> None:
    """Two pictures of one token each are read."""
    model = fastattr.load("shapes")
    with pytest.raises(
        ImageError,
        match=r"16 x 16 pixels becomes a single image token, of 16 x 16 pixels, .* expected more than 16 pixels",
    ):
        fastattr.attribute(model, picture(16, 16), "Describe the image.", "a circle")
    why = fastattr.attribute(
        model, [picture(16, 16), picture(16, 16)], "Describe the image.", "a circle", scales=(1.0,)
    )
    assert why.grids == (((1, 1, 1), (1, 1, 1)),)


def test_a_picture_that_the_processor_refuses_is_named_with_its_size_and_the_expected_one() -> None:
    with pytest.raises(ImageError, match=r"refuses images of 200 x 1 pixels: .* covers 16 x 16 pixels: once a picture"):
        fastattr.attribute(fastattr.load("shapes"), picture(1, 200), "Describe the image.")


@pytest.mark.parametrize("size", SIZES)
def test_the_command_line_prints_one_line(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    height, width = size
    Image.new("RGB", (width, height)).save(tmp_path / "picture.png")
    monkeypatch.setattr("sys.argv", ["fastattr", "explain", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{width} x {height} pixels" in said and "Traceback" not in said
