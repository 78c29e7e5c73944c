"""A dataset in, judgements on the disk: what they say is true of the maps, and no interruption loses or repeats one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastattr
from fastattr.adapters.model import BUNDLED
from fastattr.datasets import Dataset, Mention, Sample
from fastattr.datasets.scenes import open_scenes
from fastattr.errors import DatasetError, InputError, SaveError
from fastattr.evaluate import METHODS, Judgement, Settings, Task, judge, method_of, read, run, summary
from fastattr.evaluate.judging import crop, on_grid, tokens_at
from fastattr.evaluate.plots import draw
from fastattr.metrics import Noun, plausibility
from fastattr.text import TokenText

COMMAND = (sys.executable, "-c", "from fastattr.cli import main; main()")
QUICK = Settings({"tam": METHODS["tam"], "best": METHODS["best"]}, words=1, steps=4)


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


@pytest.fixture(scope="module")
def judged(model: fastattr.Model) -> tuple[Sample, Judgement]:
    dataset = open_scenes("scenes", 1, None)
    sample = dataset.read(dataset.ids[0])
    return sample, judge(model, sample, QUICK)


def test_method_names() -> None:
    assert method_of("arc") == METHODS["arc"]
    assert method_of("tam@1+1.5") == replace(METHODS["tam"], scales=(1.0, 1.5))
    with pytest.raises(InputError, match="there is no method 'gradcam', expected one of lens, tam, arc, best"):
        method_of("gradcam")
    with pytest.raises(InputError, match=r"the scales of 'tam@1,2' are '1,2', expected numbers joined by \+"):
        method_of("tam@1,2")


def test_words_are_found_by_characters() -> None:
    text = TokenText("A red ring.", ("A", " re", "d", " ring", "."), ((0, 1), (1, 4), (4, 5), (5, 10), (10, 11)))
    assert tokens_at(text, (2, 5)) == (1, 2)
    assert tokens_at(text, (6, 10)) == (3,)
    assert tokens_at(text, (11, 11)) == ()


def test_masks_are_cropped_to_what_the_maps_cover() -> None:
    mask = np.arange(200).reshape(10, 20) % 7 == 0
    np.testing.assert_array_equal(crop(mask, (0.25, 0.0, 0.75, 1.0)), mask[:, 5:15])
    np.testing.assert_array_equal(crop(mask, (0.0, 0.1, 1.0, 0.9)), mask[1:9])


def test_a_map_on_its_own_grid_stays_as_it_is() -> None:
    heat = torch.rand(1, 3, 4)
    assert on_grid(heat, (1, 3, 4)) is heat
    assert on_grid(heat, (1, 6, 8)).shape == (1, 6, 8)


def test_plausibility_is_that_of_the_engines_own_maps(model: fastattr.Model, judged: tuple[Sample, Judgement]) -> None:
    sample, judgement = judged
    assert sample.response is not None
    why = fastattr.attribute(
        model, sample.image, sample.prompt, sample.response, method="tam", scales=(1.0,), filter=True, evidence=True
    )
    words = [m for m in sample.mentions(why.response) if m.mask is not None]
    nouns = [Noun(why.find(why.response[slice(*m.span)]).targets[0], m.mask) for m in words]
    # a word that occurs twice is found once by its text: keep those that occur once
    once = [i for i, m in enumerate(words) if why.response.count(why.response[slice(*m.span)]) == 1]
    assert once
    mine = plausibility(why.image[0][:, 0], [nouns[i] for i in once], [])
    assert judgement.plausibility["tam"].n_nouns == len(words)
    if len(once) == len(words):
        assert judgement.plausibility["tam"].obj == pytest.approx(mine.obj, abs=1e-6)


def test_what_was_said_carries_the_engines_scores(model: fastattr.Model, judged: tuple[Sample, Judgement]) -> None:
    sample, judgement = judged
    why = fastattr.attribute(model, sample.image, sample.prompt, sample.response, method="tam", scales=(1.0,))
    assert why.evidence is not None
    assert judgement.response == why.response and judgement.n_tokens == len(why)
    assert {word.kind for word in judgement.said} == {"color", "shape", "size", "place"}
    for word in judgement.said:
        assert word.true
        assert why.tokens[word.position].strip() == word.word
        assert word.log_prob == pytest.approx(float(why.log_prob[word.position]), abs=1e-5)
        assert word.evidence == pytest.approx(float(why.evidence[word.position]), abs=1e-5)
        assert set(word.descriptors) == {"tam", "best"}


def test_patches_are_hidden_in_every_order_for_the_same_word(judged: tuple[Sample, Judgement]) -> None:
    _, judgement = judged
    assert [each.order for each in judgement.hidings] == ["random", "mask", "tam", "best"]
    assert len({each.word for each in judgement.hidings}) == 1
    for each in judgement.hidings:
        assert len(each.deletion) == len(each.insertion) == 5
        # nothing hidden and everything shown is the picture; nothing shown and everything hidden is the blank
        assert each.deletion[0] == pytest.approx(each.insertion[-1])
        assert each.insertion[0] == pytest.approx(each.deletion[-1])
        assert each.deletion[0] == pytest.approx(judgement.hidings[0].deletion[0])
    by_order = {each.order: each for each in judgement.hidings}
    assert by_order["mask"].deletion_auc < by_order["random"].deletion_auc
    assert by_order["best"].insertion_auc > by_order["random"].insertion_auc


# --- runs ------------------------------------------------------------------------------------------


def task(n: int, dataset: str = "scenes") -> Task:
    return Task(dataset, "shapes", n, None, replace(QUICK, words=0))


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = run(task(3), whole)
    kept = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:2]) + kept[2][: len(kept[2]) // 2])  # cut in the middle of the second sample
    assert len(read(out).judged) == 1
    resumed = run(task(3), out)
    assert resumed.judged == expected.judged
    assert [line["id"] for line in lines(out)[1:]] == list(task(3).open().ids)
    before = out.read_bytes()
    assert run(task(3), out).judged == expected.judged  # nothing left to do
    assert out.read_bytes() == before


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    alone = run(task(3), tmp_path / "alone.jsonl")
    together = run(task(3), tmp_path / "together.jsonl", workers=2)
    assert [row.id for row in together.judged] == [row.id for row in alone.judged]
    for ours, theirs in zip(together.judged, alone.judged, strict=True):
        assert ours.response == theirs.response
        for name, scores in theirs.plausibility.items():
            assert ours.plausibility[name].obj == pytest.approx(scores.obj, abs=1e-3)


def test_another_evaluation_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(task(1), out)
    before = out.read_bytes()
    with pytest.raises(SaveError, match=r"holds an evaluation with another settings: .* choose another --out"):
        run(Task("scenes", "shapes", 1, None, QUICK), out)
    with pytest.raises(SaveError, match='another dataset: "scenes" there, "scenes-erased" asked for'):
        run(task(1, "scenes-erased"), out)
    assert out.read_bytes() == before
    notes = tmp_path / "notes.txt"
    notes.write_text("shopping list\n")
    with pytest.raises(SaveError, match="does not hold an evaluation"):
        run(task(1), notes)
    assert notes.read_text() == "shopping list\n"
    with pytest.raises(SaveError, match="cannot be read: Is a directory"):
        run(task(1), tmp_path)


def faulty(names: dict[str, Callable[[], Sample]]) -> Dataset:
    return Dataset("faulty", tuple(names), lambda id: names[id]())


def test_faulty_samples_are_named_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = open_scenes("scenes", 1, None)
    good = scene.read(scene.ids[0])
    empty = replace(good, id="tiny", image=Image.new("RGB", (1, 1)))
    repaired = False

    def broken() -> Sample:
        if repaired:
            return replace(good, id="broken")
        raise DatasetError("masks/7.png is not a picture")

    dataset = faulty({"good": lambda: replace(good, id="good"), "broken": broken, "tiny": lambda: empty})
    monkeypatch.setattr(Task, "open", lambda self: dataset)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    settings = replace(QUICK, words=1)
    out = tmp_path / "out.jsonl"
    first = run(Task("faulty", "shapes", None, None, settings), out)
    assert [row.id for row in first.judged] == ["good"]
    reasons = {row.id: row.reason for row in first.skipped}
    assert reasons["broken"] == "DatasetError: masks/7.png is not a picture"
    assert set(reasons) == {"broken", "tiny"}
    told = capsys.readouterr().err
    assert "skipped broken: DatasetError: masks/7.png is not a picture" in told
    assert "judged 3 of 3 samples" in told
    repaired = True
    second = run(Task("faulty", "shapes", None, None, settings), out)
    assert [row.id for row in second.judged] == ["good", "broken"]
    assert [row.id for row in second.skipped] == ["tiny"]


def test_words_without_a_mask_are_judged_for_truth_alone(model: fastattr.Model) -> None:
    scene = open_scenes("scenes", 1, None)
    good = scene.read(scene.ids[0])
    assert good.response is not None
    start = good.response.index(" ")
    words = (Mention((0, start), None, "invented", False),)
    row = judge(model, replace(good, mentions=lambda text: words), QUICK)
    assert row.hidings == ()
    assert row.plausibility["tam"].n_nouns == 0
    assert [(word.kind, word.true) for word in row.said] == [("invented", False)]


def test_where_nothing_could_be_judged_the_reasons_are_all_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Sample:
        raise DatasetError("masks/7.png is not a picture")

    monkeypatch.setattr(Task, "open", lambda self: faulty({"7": broken}))
    results = run(Task("faulty", "shapes", None, None, QUICK), tmp_path / "out.jsonl")
    text = summary(results)
    assert "0 samples" in text and "Skipped: 1 (7: DatasetError: masks/7.png is not a picture)" in text
    assert "|" not in text
    assert draw(results, tmp_path / "out.jsonl") == []


def test_without_a_noun_there_is_no_table_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = open_scenes("scenes", 1, None)
    good = replace(scene.read(scene.ids[0]), mentions=lambda text: ())
    monkeypatch.setattr(Task, "open", lambda self: faulty({good.id: lambda: good}))
    results = run(Task("faulty", "shapes", None, None, QUICK), tmp_path / "out.jsonl")
    assert len(results.judged) == 1
    assert "|" not in summary(results) and draw(results, tmp_path / "out.jsonl") == []


def folder(root: Path, n: int) -> Path:
    """Pictures with masks and captions, in the layout of a user's folder."""
    for part in ("images", "captions"):
        (root / part).mkdir(parents=True)
    for k in range(n):
        picture = Image.new("RGB", (96, 96), "white")
        picture.paste("red", (10 + 5 * k, 10, 50 + 5 * k, 50))
        picture.save(root / "images" / f"p{k}.png")
        (root / "masks" / f"p{k}").mkdir(parents=True)
        picture.convert("L").point(lambda value: 255 * (value < 200)).save(root / "masks" / f"p{k}" / "square.png")
        (root / "captions" / f"p{k}.txt").write_text("A red square.")
    return root


def _mask(root: Path) -> None:
    Image.new("L", (96, 96), 255).save(root / "masks" / "p1" / "square.png")


def _another_mask(root: Path) -> None:
    Image.new("L", (96, 96), 255).save(root / "masks" / "p1" / "ring.png")


def _picture(root: Path) -> None:
    path = root / "images" / "p1.png"
    before = path.stat()
    picture = Image.open(path).convert("RGB")
    picture.putpixel((0, 0), (254, 255, 255))
    picture.save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its time tells nothing


def _caption(root: Path) -> None:
    (root / "captions" / "p1.txt").write_text("A red circle.")


@pytest.mark.parametrize("change", [_mask, _another_mask, _picture, _caption])
def test_a_changed_sample_is_judged_again_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    root, out = folder(tmp_path / "mine", 3), tmp_path / "out.jsonl"
    asked = Task(str(root), "shapes", None, None, replace(QUICK, words=0))
    first = run(asked, out)
    assert [row.id for row in first.judged] == ["p0", "p1", "p2"]
    for path in root.rglob("*.png"):
        path.touch()  # another time is no change
    before = out.read_bytes()
    assert run(asked, out).judged == first.judged and out.read_bytes() == before
    capsys.readouterr()
    change(root)
    again = run(asked, out)
    assert "1 sample has changed since and will be judged again: p1" in capsys.readouterr().err
    assert [line["id"] for line in lines(out)[4:]] == ["p1"]
    fresh = run(asked, tmp_path / "fresh.jsonl")
    assert again.judged == fresh.judged == read(out).judged
    assert [a == b for a, b in zip(again.judged, first.judged, strict=True)] == [True, False, True]


def test_a_changed_model_is_refused_with_the_files_that_changed(tmp_path: Path) -> None:
    model_folder, out = tmp_path / "mine", tmp_path / "out.jsonl"
    shutil.copytree(BUNDLED["shapes"], model_folder)
    asked = replace(task(1), model=str(model_folder))
    first = run(asked, out)
    moved = tmp_path / "elsewhere" / "mine"
    shutil.copytree(model_folder, moved)
    assert run(replace(asked, model=str(moved)), out) == first  # where it lies does not matter
    (model_folder / "calibration.json").unlink()
    assert run(asked, out) == first  # nor what is said of its evidence
    config = json.loads((model_folder / "generation_config.json").read_text())
    (model_folder / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(
        SaveError, match=r"the model 'mine' has changed since .* was begun: generation_config\.json; choose"
    ):
        run(asked, out)
    with pytest.raises(SaveError, match='another dtype: "auto" there, "float32" asked for'):
        run(replace(asked, dtype="float32"), out)


def test_a_folder_without_any_mask_is_refused_at_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "mine", 2)
    shutil.rmtree(root / "masks")
    (root / "masks").mkdir()
    with pytest.raises(
        DatasetError, match=r"holds no mask for any of the 2 pictures, .* for example p0/red_circle\.png"
    ):
        run(Task(str(root), "shapes", None, None, QUICK), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        run(task(1), tmp_path / "file" / "out.jsonl")


# --- the command -----------------------------------------------------------------------------------


def test_the_command_writes_draws_and_prints(tmp_path: Path) -> None:
    out, calibration = tmp_path / "results.jsonl", tmp_path / "calibration.json"
    command = [
        *COMMAND,
        *("eval", "scenes-erased", "--methods", "tam,best", "--n", "4", "--steps", "3"),
        *("--workers", "2", "--out", str(out), "--calibration", str(calibration)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| best |" in done.stdout and "| random |" in done.stdout and "over log-probability" in done.stdout
    assert "4 samples" in done.stdout
    for name in ("curves", "gains", "inventions"):
        picture = tmp_path / f"results_{name}.png"
        assert str(picture) in done.stdout
        with Image.open(picture) as opened:
            assert min(opened.size) > 200
    assert json.loads(calibration.read_text())["dataset"] == "scenes-erased"
    assert len(lines(out)) == 5


def test_the_command_refuses_with_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "eval", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fastattr: DatasetError: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()
