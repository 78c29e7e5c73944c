"""What the gallery shows: several pictures over two turns, and a clip, both explained by the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastattr
from fastattr.cli.app import main
from fastattr.demo.examples import N_FRAMES, PROMPT, clip, images
from fastattr.demo.scenes import make_clip


@pytest.fixture(scope="module")
def shapes() -> fastattr.Model:
    return fastattr.load("shapes")


def test_a_clip_moves_one_object_and_nothing_else() -> None:
    frames = make_clip(10_000_009, 6)
    centers = [np.argwhere(frame.masks[0]).mean(axis=0) for frame in frames]
    steps = np.diff([x for _, x in centers])
    assert (steps > 10).all() and steps.std() < 1, "to the right, evenly"
    assert np.ptp([y for y, _ in centers]) < 1
    assert [frame.objects[0].place for frame in frames] == ["left", "left", "center", "center", "right", "right"]
    pixels = np.stack([np.asarray(frame.image).astype(int) for frame in frames])
    still = ~np.stack([frame.masks[0] for frame in frames]).any(axis=0)
    near = np.zeros_like(still)  # the object's soft edge
    for frame in frames:
        rows, columns = np.nonzero(frame.masks[0])
        near[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3] = True
    assert np.ptp(pixels, axis=0)[still & ~near].max() == 0
    with pytest.raises(fastattr.InputError, match="expected at least 2: a clip moves"):
        make_clip(1, 1)


def test_when_the_word_is_true(shapes: fastattr.Model) -> None:
    """The model says where the heart goes, and each place lights the frames in which it is there."""
    shown = clip()
    why = fastattr.attribute(shapes, shown.images, shown.prompt, max_new_tokens=60)
    assert why.response == (
        "A large red heart is at the left. A large red heart is in the center. A large red heart is at the right."
    )
    assert why.image[0].shape[1] == N_FRAMES
    strongest = {word: int(why[word].map.amax(dim=(1, 2)).argmax()) for word in ("left", "center", "right")}
    assert strongest["left"] in (0, 1) and strongest["center"] in (2, 3) and strongest["right"] in (4, 5)
    assert any("videos were shown to the model as their frames" in note for note in why.notes)


def test_which_picture_the_word_is_about(shapes: fastattr.Model) -> None:
    """Asked about the last two of three pictures; each shape lights its own picture."""
    shown = images()
    why = fastattr.attribute(shapes, shown.images, shown.prompt, max_new_tokens=60)
    assert why.response == "A large blue diamond is at the top. A large green square is at the bottom left."
    assert why.prompt == f"{PROMPT}\nA large blue cross is at the right.\n{PROMPT}"
    for word, picture in (("diamond", 2), ("square", 1)):
        (place,) = (why.find(word).spans[0],)
        token = next(i for i, (start, stop) in enumerate(why.spans) if start <= place[0] < stop)
        peaks = [float(maps[token].max()) for maps in why.image]
        assert int(np.argmax(peaks)) == picture, word


@pytest.mark.parametrize("example", ["scene", "images", "clip"])
def test_each_is_one_command(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo.html"
    monkeypatch.setattr("sys.argv", ["fastattr", "demo", "--example", example, "--no-open", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = re.findall(r"data:image/(?:jpeg|png|webp);base64", out.read_text())
    assert len(shown) >= {"scene": 1, "images": 3, "clip": N_FRAMES}[example]


def test_a_folder_is_a_video_and_messages_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    clip = make_clip(10_000_009, 3)
    for k, frame in zip((2, 9, 10), clip, strict=True):
        frame.image.save(frames / f"frame_{k}.png")
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": PROMPT}]}]
    said = tmp_path / "chat.json"
    said.write_text(json.dumps(chat))
    out = tmp_path / "x.safetensors"
    argv = ["fastattr", "explain", str(frames), "--messages", str(said), "--response", "A heart.", "--scales", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert re.search(r"frame [123]/3", capsys.readouterr().out)
    why = fastattr.Attribution.load(out)
    assert why.image[0].shape[1] == 3
    assert np.array_equal(why.pictures[0], np.stack([np.asarray(frame.image) for frame in clip]))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read as a conversation in JSON"),
        ("{}", "holds nothing, expected messages"),
        ("3", "holds int, expected a list"),
        ("[1", "cannot be read"),
    ],
)
def test_broken_conversations_are_named(
    content: str | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = tmp_path / "chat.json"
    if content is not None:
        said.write_text(content)
    picture = tmp_path / "p.png"
    make_clip(1, 2)[0].image.save(picture)
    monkeypatch.setattr("sys.argv", ["fastattr", "explain", str(picture), "--messages", str(said)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_empty_folder_is_no_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "frames"
    empty.mkdir()
    monkeypatch.setattr("sys.argv", ["fastattr", "explain", str(empty)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "holds no files, expected the frames of a video" in capsys.readouterr().err


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """What a video tool writes without leading zeros: frame 10 comes behind frame 9."""
    from fastattr.cli.app import _frames

    names = [f"frame_{k}.png" for k in range(12)]
    for name in reversed(names):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in _frames(tmp_path)] == names


def test_messages_may_hold_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, said, out = tmp_path / "p.png", tmp_path / "chat.json", tmp_path / "x.safetensors"
    make_clip(10_000_009, 2)[0].image.save(picture)
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": PROMPT}]
    said.write_text(json.dumps([{"role": "user", "content": parts}]))
    argv = [
        "fastattr",
        "explain",
        "--messages",
        str(said),
        "--response",
        "A heart.",
        "--scales",
        "1",
        "--out",
        str(out),
    ]
    for arguments, code, told in (
        (argv, 0, ""),
        ([*argv, "--prompt", "x"], 2, "--prompt and --messages both say what is asked"),
        (["fastattr", "explain", "--out", str(out)], 2, "got no image, expected IMAGE... or --messages"),
    ):
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert told in capsys.readouterr().err


def test_an_overlay_is_of_the_picture_the_word_is_about(shapes: fastattr.Model) -> None:
    shown = images()
    why = fastattr.attribute(shapes, shown.images, shown.prompt, max_new_tokens=60, scales=(1.0,), evidence=False)
    diamond = why["diamond"]
    assert np.array_equal(np.asarray(diamond.overlay()), np.asarray(diamond.overlay(2)))
    assert not np.array_equal(np.asarray(diamond.overlay()), np.asarray(diamond.overlay(0)))
