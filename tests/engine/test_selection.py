"""Phrases, patterns, boxes and scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastattr import Attribution, InputError, PhraseError
from fastattr.selection import peak_box
from tests.engine.samples import make_attribution


def test_a_phrase_selects_every_occurrence_as_whole_words() -> None:
    selection = make_attribution()["RED  circle"]
    assert selection.text == "red circle"
    assert selection.spans == ((2, 12), (19, 29))
    assert selection.targets == ((1, 2), (5, 6))


def test_a_word_inside_another_is_not_found() -> None:
    with pytest.raises(PhraseError, match="'ed' is not in the response; its words are: A, red, circle, and, a"):
        make_attribution()["ed"]


def test_the_map_is_the_maximum_and_the_score_the_sum_of_each_occurrence() -> None:
    why = make_attribution()
    selection = why["red circle"]
    assert torch.equal(selection.map, why.image[0][[1, 2, 5, 6]].amax(dim=0))
    assert why.evidence is not None
    first, second = why.evidence[[1, 2]].sum(), why.evidence[[5, 6]].sum()
    assert selection.score == pytest.approx(float((first + second) / 2))
    assert "2 occurrences" in repr(selection)


def test_patterns() -> None:
    why = make_attribution(("It", " costs", " 1", "2", ".", "50"))
    found = why.find(r"\d+(\.\d+)?")
    assert found.text == "12.50"
    assert found.targets == ((2, 3, 4, 5),)
    with pytest.raises(PhraseError, match=r"a match of 'x\+' is not in the response"):
        why.find("x+")
    with pytest.raises(InputError, match="not a regular expression"):
        why.find("(")


@pytest.mark.parametrize("phrase", ["", "  ", 3.5])
def test_nothing_to_select(phrase: object) -> None:
    with pytest.raises(InputError, match="select by a word or phrase"):
        make_attribution()[phrase]  # type: ignore[index]


def test_the_message_of_a_missing_phrase_is_readable() -> None:
    with pytest.raises(PhraseError) as caught:
        make_attribution()["zebra"]
    assert str(caught.value).startswith("'zebra' is not in the response")
    assert isinstance(caught.value, KeyError)


def test_box_of_one_hot_cell() -> None:
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    # cell (1, 2) covers pixels 40..60 x 20..40 of an 80 x 80 picture; half of a bilinear peak is half a cell further
    left, top, right, bottom = peak_box(maps, (0.0, 0.0, 1.0, 1.0), (80, 80)) or (0, 0, 0, 0)
    assert (left + right) / 2 == pytest.approx(50, abs=1.5)
    assert (top + bottom) / 2 == pytest.approx(30, abs=1.5)
    assert 10 <= right - left <= 30


def test_box_ignores_a_second_weaker_peak_and_respects_the_extent() -> None:
    maps = torch.zeros(1, 2, 8)
    maps[0, :, 0], maps[0, :, 6] = 1.0, 0.8
    # the grid covers the right half of a picture 200 wide
    left, top, right, bottom = peak_box(maps, (0.5, 0.0, 1.0, 1.0), (50, 200)) or (0, 0, 0, 0)
    assert left == pytest.approx(100, abs=1)
    assert right < 130
    assert (top, bottom) == (0, 50)


def test_a_dark_map_has_no_box() -> None:
    assert peak_box(torch.zeros(1, 3, 3), (0.0, 0.0, 1.0, 1.0), (30, 30)) is None


def test_several_images_are_asked_for_by_number() -> None:
    selection = make_attribution(grids=((1, 4, 6), (3, 2, 2)))["red"]
    with pytest.raises(InputError, match=r"2 images; use \.maps\[i\] instead of \.map"):
        _ = selection.map
    assert [tuple(maps.shape) for maps in selection.maps] == [(1, 4, 6), (3, 2, 2)]
    assert len(selection.boxes) == 2
    assert selection.overlay(1).size == (96, 64)
    with pytest.raises(InputError, match="image is 2, but this attribution holds 2 pictures"):
        selection.overlay(2)


def video(n_frames: int, n_steps: int, **peaks: float) -> Attribution:
    """A video whose frames are greys of 10 times their number, for `red`, lit at step k's own cell: `step_1=0.5`."""
    why = make_attribution(grids=((n_steps, 4, 6),))
    maps = torch.zeros_like(why.image[0])
    for name, height in peaks.items():
        step = int(name.removeprefix("step_"))
        maps[1, step, 1, step] = height
    pictures = np.stack([np.full((64, 96, 3), 10 * f, np.uint8) for f in range(n_frames)])
    return dataclasses.replace(why, image=(maps,), pictures=(pictures,))


@pytest.mark.parametrize(
    ("n_frames", "n_steps", "first_frames"),
    [
        (4, 4, [0, 1, 2, 3]),
        (8, 4, [0, 2, 4, 6]),
        (7, 4, [0, 2, 4, 6]),  # the last frame was repeated to fill its step
        (5, 3, [0, 2, 4]),
        (2, 4, [0, 0, 1, 1]),
    ],
)
def test_frame_box_and_overlay_of_a_video_are_of_the_step_where_it_peaks(
    n_frames: int, n_steps: int, first_frames: list[int]
) -> None:
    for step, frame in enumerate(first_frames):
        found = video(n_frames, n_steps, **{f"step_{step}": 0.5})["red circle"]
        assert found.frames == (frame,) and found.frame == frame
        assert found.box is not None
        left, _, right, _ = found.box
        assert (left + right) / 2 == pytest.approx(16 * (step + 0.5), abs=8)  # each step lights a cell of its own
        drawn = np.asarray(found.overlay())
        assert (drawn[-1, -1] == 10 * frame).all()  # a corner without heat shows the frame
        assert (drawn[24, 16 * step + 8] != 10 * frame).any()


def test_a_step_is_chosen_by_its_peak_and_not_by_its_mass() -> None:
    why = video(3, 3, step_2=0.9)
    why.image[0][1, 0] = 0.5  # lit all over
    found = why["red"]
    assert found.map.sum(dim=(1, 2)).argmax() == 0
    assert found.frame == 2
    assert found.box is not None and found.box[0] > 16
    assert np.asarray(found.overlay())[-1, -1, 0] == 20


def test_of_equal_peaks_the_first_counts_and_a_dark_video_has_no_frame() -> None:
    assert video(3, 3, step_1=0.5, step_2=0.5)["red"].frame == 1
    dark = video(3, 3)["red"]
    assert dark.frame is None and dark.box is None
    assert (np.asarray(dark.overlay()) == 0).all()  # the first frame, as it is


def test_frames_of_images_are_nought_and_several_are_asked_for_by_number() -> None:
    assert make_attribution()["red"].frame == 0
    both = make_attribution(grids=((1, 4, 6), (3, 2, 2)))["red"]
    assert both.frames == (0, int(both.maps[1].flatten(1).amax(1).argmax()))
    with pytest.raises(InputError, match=r"2 images; use \.frames\[i\] instead of \.frame"):
        _ = both.frame
    with pytest.raises(InputError, match="frames are counted in the pictures, but this attribution was made without"):
        _ = make_attribution(pictures=False)["red"].frame


def test_without_evidence_and_pictures() -> None:
    selection = make_attribution(evidence=False, pictures=False)["red"]
    assert selection.score is None
    with pytest.raises(InputError, match="made without; pass image="):
        _ = selection.box


def test_tokens_that_share_characters_are_all_selected() -> None:
    why = make_attribution(("see", " ", "é", "é"))
    why = dataclasses.replace(why, response="see é", spans=((0, 3), (3, 4), (4, 5), (4, 5)))
    assert why["é"].targets == ((2, 3),)
