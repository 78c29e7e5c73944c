"""A result survives the round trip, and a failed save leaves nothing behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastattr import Attribution, SaveError
from fastattr.calibration import Calibration
from tests.engine.samples import make_attribution

MADE_UP = Calibration(
    0.1 + 0.2, n_true=900, n_false=3, true_marked=45, false_marked=3, words="content words", dataset="scenes", model="x"
)


@pytest.mark.parametrize("pictures", [True, False])
def test_round_trip(tmp_path: Path, pictures: bool) -> None:
    why = make_attribution(grids=((1, 4, 6), (3, 2, 2)), pictures=pictures, evidence=pictures)
    why = dataclasses.replace(why, calibration=MADE_UP if pictures else None)
    again = Attribution.load(why.save(tmp_path / "x.safetensors"))
    for field in dataclasses.fields(Attribution):
        ours, theirs = getattr(why, field.name), getattr(again, field.name)
        if field.name == "image":
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        elif field.name == "pictures":
            assert len(ours) == len(theirs)
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        elif isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name


def test_a_file_from_before_calibrations_is_read(tmp_path: Path) -> None:
    path = make_attribution().save(tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["fastattr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del manifest["calibration"]
    save_file(tensors, path, metadata={"fastattr": json.dumps(manifest)})
    again = Attribution.load(path)
    assert again.calibration is None
    assert again.response == make_attribution().response


def rewrite_config(path: Path, **changes: object) -> None:
    with safe_open(path, framework="pt") as file:
        manifest = json.loads(file.metadata()["fastattr"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    manifest["config"] |= changes
    save_file(tensors, path, metadata={"fastattr": json.dumps(manifest)})


def test_a_file_from_before_scales_could_be_none_is_read(tmp_path: Path) -> None:
    """It holds `()` for the model's own scales, and `top_k` as a number."""
    path = make_attribution().save(tmp_path / "x.safetensors")
    rewrite_config(path, scales=[], scale_weights=None, top_k=50)
    config = Attribution.load(path).config
    assert (config.scales, config.top_k) == (None, 50)


def test_a_configuration_of_a_newer_version_is_named(tmp_path: Path) -> None:
    path = make_attribution().save(tmp_path / "x.safetensors")
    rewrite_config(path, magic=1)
    with pytest.raises(SaveError, match=r"x.safetensors.*magic, which this version of fastattr does not know"):
        Attribution.load(path)


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    saved = make_attribution().save(tmp_path / "x.safetensors")
    assert saved.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = make_attribution(seed=1).save(tmp_path / "x.safetensors")
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveError, match=os.strerror(code)):
        make_attribution(seed=2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_attribution().save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_paths(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot be written: No such file or directory"):
        make_attribution().save(tmp_path / "missing" / "x.safetensors")
    with pytest.raises(SaveError, match="is a directory"):
        make_attribution().save(tmp_path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="is not a file"):
        Attribution.load(tmp_path / "nothing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(make_attribution().save(tmp_path / "x.safetensors").read_bytes()[:200])
    with pytest.raises(SaveError, match="cannot be read as an attribution"):
        Attribution.load(broken)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SaveError, match="has no 'fastattr' manifest"):
        Attribution.load(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "future.safetensors", metadata={"fastattr": '{"format": 99}'})
    with pytest.raises(SaveError, match="format 99, this version reads 2"):
        Attribution.load(tmp_path / "future.safetensors")
