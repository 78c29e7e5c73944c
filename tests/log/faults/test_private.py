"""What waits in a spool is for its owner alone, whatever the umask; and nobody's umask is touched."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastattr.log import AttributionLogger
from fastattr.storage import check_writable, whole_file
from tests.engine.samples import make_attribution

PATIENCE_S = 60.0


@pytest.fixture(params=[0o022, 0o000, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def readable_by_others(folder: Path) -> list[str]:
    """Files that another user could open: their own bits, and those of every folder on the way."""
    found = []
    for path in folder.rglob("*"):
        way = [each for each in path.parents if each == folder or folder in each.parents]
        if path.is_file() and mode(path) & 0o044 and all(mode(each) & 0o011 for each in way):
            found.append(str(path.relative_to(folder)))
    return found


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("there", [False, True], ids=["new", "there before"])
def test_spool_and_inbox_are_the_owners_alone(tmp_path: Path, umask: int, there: bool) -> None:
    spool = tmp_path / "spool"
    if there:
        for name in ("inbox", "rooms"):
            (spool / name).mkdir(parents=True)
    handing_over = AttributionLogger(
        tmp_path / "dest", spool=spool, explain="worker", sample_rate=1.0, content="none", images="none"
    )
    assert handing_over.submit_replay("my secret prompt", [Image.new("RGB", (64, 64))], [1, 2, 3], request_id="a")
    assert handing_over.flush(PATIENCE_S)
    explaining = AttributionLogger(tmp_path / "dest", spool=spool, sample_rate=1.0, segment_age_s=600.0)
    assert explaining.submit_attribution(make_attribution(), request_id="b")
    assert explaining.flush(PATIENCE_S)
    suffixes = {path.suffix for path in files(spool)}
    assert suffixes >= {".request", ".json", ".spool"}
    assert all(mode(path) & 0o077 == 0 for path in files(spool))
    assert mode(spool / "inbox") == mode(spool / "rooms") == 0o700
    assert there or mode(spool) == 0o700
    assert readable_by_others(spool) == []
    handing_over.shutdown()
    explaining.shutdown()


def test_other_files_go_by_the_umask(tmp_path: Path, umask: int) -> None:
    """As `open` would make them; one that was there is replaced."""
    (tmp_path / "plain").write_bytes(b"")
    for _ in range(2):
        with whole_file(tmp_path / "whole") as file:
            file.write(b"x")
    assert mode(tmp_path / "whole") == mode(tmp_path / "plain") == 0o666 & ~umask
    with whole_file(tmp_path / "private", private=True) as file:
        file.write(b"x")
    assert mode(tmp_path / "private") == 0o600


def test_the_umask_of_the_process_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to all threads: 0 for a moment makes what another one creates writable for everybody."""
    touched: list[int] = []
    umask = os.umask

    def watched(mask: int) -> int:
        touched.append(mask)
        return umask(mask)

    monkeypatch.setattr(os, "umask", watched)

    def save(name: str) -> None:
        check_writable(tmp_path / name)
        for _ in range(20):
            with whole_file(tmp_path / name) as file:
                file.write(b"x")

    threads = [threading.Thread(target=save, args=(f"{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert touched == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
