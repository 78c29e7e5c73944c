"""Use in notebooks: tokens by index, pictures of words, figures, tables."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastattr import InputError, PhraseError, TokenIndexError
from fastattr.report.picture import MAX_CELLS
from tests.engine.samples import make_attribution

WORDS = ("A", " red", " circle", ".")


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    matplotlib.use("agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


# --- tokens --------------------------------------------------------------------------------------------


def test_a_token_by_index_is_what_its_word_selects() -> None:
    why = make_attribution(("Red", " circle"))
    for index, word in enumerate(("red", "circle")):
        assert why[index].targets == why[word].targets == ((index,),)
        torch.testing.assert_close(why[index].map, why[word].map)
        assert why[index].box == why[word].box and why[index].score == why[word].score
        assert why[index].overlay().tobytes() == why[word].overlay().tobytes()


@given(st.lists(st.sampled_from(["a", " b", "cd", ".", " "]), min_size=1, max_size=12), st.data())
def test_tokens_are_indexed_and_sliced_as_a_list_is(words: list[str], data: st.DataObject) -> None:
    why = make_attribution(tuple(words))
    n = len(words)
    assert [token.text for token in why] == words and len(why) == n
    index = data.draw(st.integers(-n - 2, n + 1))
    if -n <= index < n:
        assert why[index].text == words[index] and why[np.int64(index)].text == words[index]
    else:
        with pytest.raises(IndexError, match=f"there is no token {index}: the response has {n}"):
            why[index]
    bounds = st.none() | st.integers(-n - 2, n + 2)
    chosen = slice(data.draw(bounds), data.draw(bounds))
    expected = list(range(n))[chosen]
    if expected:
        assert why[chosen].text == "".join(words[chosen]) and why[chosen].targets == (tuple(expected),)
        torch.testing.assert_close(why[chosen].map, why.image[0][expected].amax(dim=0))
    else:
        with pytest.raises(TokenIndexError):
            why[chosen]


@pytest.mark.parametrize("asked", [True, 1.0, None, (1, 2), slice(0, 3, 2), slice("a", "b")])
def test_wrong_selections_are_named_in_the_error(asked: object) -> None:
    with pytest.raises(InputError, match="select"):
        make_attribution(WORDS)[asked]  # type: ignore[index]


def test_whether_a_word_occurs() -> None:
    why = make_attribution(WORDS)
    assert "RED circle" in why and "circ" not in why and 0 not in why


# --- pictures ------------------------------------------------------------------------------------------


def _shown(page: str) -> list[np.ndarray]:
    """Pictures of an HTML cell."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_a_selection_is_shown_with_its_overlay() -> None:
    why = make_attribution(WORDS)
    cell = why["red"]._repr_html_()
    (shown,) = _shown(cell)
    expected = why["red"].overlay().resize((448, 299), Image.Resampling.LANCZOS)  # of 96 x 64 pixels
    np.testing.assert_array_equal(shown, np.asarray(expected))
    assert "<b>red</b>" in cell and f"{float(why.evidence[1]):+.2f} nats" in cell  # type: ignore[index]
    png = Image.open(io.BytesIO(why["red"]._repr_png_()))
    np.testing.assert_array_equal(np.asarray(png), shown)


def test_a_selection_of_several_pictures_videos_or_none() -> None:
    several = make_attribution(WORDS, grids=((1, 4, 6), (3, 4, 6)))
    assert len(_shown(several["red"]._repr_html_())) == 2
    assert Image.open(io.BytesIO(several["red"]._repr_png_())).width > 2 * 448
    dark = make_attribution(WORDS, pictures=False, evidence=False)
    (shown,) = _shown(dark["red"]._repr_html_())
    assert max(shown.shape[:2]) == 448


def test_text_in_a_cell_is_escaped() -> None:
    cell = make_attribution(("<script>alert(1)</script>",))[0]._repr_html_()
    assert "<script" not in cell and "&lt;script&gt;" in cell


def test_html_is_the_page_that_is_written(tmp_path: object) -> None:
    why = make_attribution(WORDS)
    path = why.to_html(f"{tmp_path}/x.html")
    assert why.html() == path.read_text(encoding="utf-8")


# --- figures -------------------------------------------------------------------------------------------


def test_a_figure_of_all_tokens_and_of_one_word() -> None:
    why = make_attribution(WORDS)
    grid = why.plot()
    titled = [axes.get_title() for axes in grid.axes if axes.get_images()]
    assert [title.split()[0] for title in titled] == ["A", "red", "circle", "."]
    (axes,) = why.plot("red circle").axes
    assert axes.get_title().startswith("red circle")
    shown = axes.get_images()[0].get_array()
    expected = why["red circle"].overlay().resize((512, 341), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))
    assert why.plot(-1).axes[0].get_title().startswith(".")
    with pytest.raises(PhraseError):
        why.plot("square")


def test_a_figure_of_a_long_response_says_what_it_leaves_out() -> None:
    figure = make_attribution(("x $y",) * (MAX_CELLS + 3)).plot()
    assert sum(bool(axes.get_images()) for axes in figure.axes) == MAX_CELLS
    assert figure._supxlabel.get_text() == "… and 3 more tokens"
    figure.canvas.draw()  # a dollar sign is no formula


def test_two_pictures_stay_in_one_row() -> None:
    figure = make_attribution(WORDS, grids=((1, 4, 6), (1, 4, 6))).plot()
    rows = [axes.get_subplotspec().rowspan.start for axes in figure.axes if axes.get_images()]
    assert rows[::2] == rows[1::2]


def test_without_matplotlib_or_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    why = make_attribution(WORDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'plot needs matplotlib; in a clone .*: pip install "\.\[eval\]"'):
        why.plot()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="to_frame needs pandas: pip install pandas"):
        why.to_frame()


# --- tables --------------------------------------------------------------------------------------------


def test_a_table_has_a_row_a_token() -> None:
    why = make_attribution(WORDS, grids=((1, 4, 6), (2, 4, 6)))
    table = why.to_frame()
    assert list(table.index) == [0, 1, 2, 3] and table.index.name == "index"
    assert list(table["token"]) == list(WORDS) and list(table["id"]) == list(why.token_ids)
    assert [why.response[start:end] for start, end in zip(table["start"], table["end"], strict=True)] == list(WORDS)
    np.testing.assert_allclose(table["log_prob"], why.log_prob)
    np.testing.assert_allclose(table["evidence"], why.evidence)
    np.testing.assert_allclose(table[["agreement_1", "agreement_2"]], why.agreement)
    np.testing.assert_allclose(table["image_share"], why.descriptors.image_share)
    for i, token in enumerate(why):
        assert (table["box_0"][i], table["box_1"][i]) == token.boxes


def test_a_table_without_evidence() -> None:
    table = make_attribution(WORDS, pictures=False, evidence=False).to_frame()
    assert table["evidence"].isna().all() and table["box_0"].isna().all() and table["explained"].all()
