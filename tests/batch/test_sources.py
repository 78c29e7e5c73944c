"""Rows of every format come out the same, and every fault names its file and row."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.batch.sources import (
    Fault,
    Fields,
    Input,
    Row,
    find_inputs,
    litter_in_folders,
    read_image,
    read_rows,
    scan,
)
from fastattr.chat import Chat
from fastattr.errors import DatasetError, ImageError
from tests.batch.scenes import png, write_jsonl, write_parquet, write_tar

PICTURE = png()
IDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, min_size=1, max_size=20)


def read(
    path: Path | str, fields: Fields | None = None, *, shard_rows: int = 3, limit: int | None = None
) -> list[Row | Fault]:
    """All rows of a file, shard after shard."""
    fields = fields or Fields()
    (found,) = scan(find_inputs([str(path)]), fields, shard_rows, limit)
    rows: list[Row | Fault] = []
    for offset, start in zip(found.offsets, range(0, found.n_rows, shard_rows), strict=True):
        rows += read_rows(found, start, min(start + shard_rows, found.n_rows), offset, start, fields)
    return rows


def row(**values: Any) -> dict[str, Any]:
    return {"id": "a", "image": "a.png", "prompt": "What?", **values}


def plain(each: Row | Fault) -> tuple[Any, ...]:
    assert isinstance(each, Row), each
    return each.id, each.images, each.prompt, each.response


def test_formats_agree(tmp_path: Path) -> None:
    """The same seven rows as JSON lines, Parquet and a tar, in shards of three."""
    answers: list[Any] = ["A red circle.", None, "x" * 300, "ü\u2028", "", "b", "c"]
    encoded = base64.b64encode(PICTURE).decode()
    rows = [{"id": f"k/{i}", "prompt": f"What {i}?", "response": answer} for i, answer in enumerate(answers)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{**each, "image": {"base64": encoded}} for each in rows])
    parquet = write_parquet(tmp_path / "a.parquet", [{**each, "image": PICTURE} for each in rows], group=2)
    files = []
    for each in rows:
        files += [(f"{each['id']}.png", PICTURE), (f"{each['id']}.prompt.txt", each["prompt"].encode())]
        files += [(f"{each['id']}.json", json.dumps({"response": each["response"], "id": "not this one"}).encode())]
    tar = write_tar(tmp_path / "a.tar", files)
    expected = [(each["id"], (PICTURE,), each["prompt"], each["response"]) for each in rows]
    for path in (jsonl, parquet, tar):
        assert [plain(each) for each in read(path)] == expected
        assert [each.number for each in read(path)] == list(range(7))
        assert [each.id for each in read(path, limit=4)] == [f"k/{i}" for i in range(4)]


@given(ids=IDS, shard_rows=st.integers(1, 7), limit=st.none() | st.integers(1, 25), group=st.integers(1, 5))
def test_every_row_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], shard_rows: int, limit: int | None, group: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [row(id=id, prompt=f"What is {id}?") for id in ids]
    for path in (write_jsonl(folder / "a.jsonl", rows), write_parquet(folder / "a.parquet", rows, group=group)):
        found = read(path, shard_rows=shard_rows, limit=limit)
        assert [(each.id, each.place) for each in found] == [
            (id, f"{path.name} row {k + 1}") for k, id in enumerate(ids[:limit])
        ]
        assert [each.prompt for each in found if isinstance(each, Row)] == [each["prompt"] for each in rows[:limit]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image": "sub/a.png"}, "{folder}/sub/a.png"),
        ({"image": "/abs/a.png"}, "/abs/a.png"),
        ({"image": "memory://b/a.png"}, "memory://b/a.png"),
        ({"image": {"path": "a.png", "bytes": None}}, "{folder}/a.png"),
        ({"image": {"base64": base64.b64encode(PICTURE).decode()}}, PICTURE),
        ({"image": "data:image/png;base64," + base64.b64encode(PICTURE).decode()}, PICTURE),
    ],
)
def test_images_come_as(tmp_path: Path, values: dict[str, Any], expected: str | bytes) -> None:
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [row(**values)]))
    assert isinstance(found, Row)
    wanted = expected.format(folder=tmp_path) if isinstance(expected, str) else expected
    assert found.images == (wanted,)


def test_images_of_parquet_as_hugging_face_stores_them(tmp_path: Path) -> None:
    rows = [row(id="a", image={"bytes": PICTURE, "path": None}), row(id="b", image={"bytes": None, "path": "b.png"})]
    first, second = read(write_parquet(tmp_path / "a.parquet", rows))
    assert plain(first)[1] == (PICTURE,)
    assert plain(second)[1] == (f"{tmp_path}/b.png",)


def test_several_images_messages_and_token_ids(tmp_path: Path) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "Both?"}]}
    rows = [{"id": 7, "images": ["a.png", "b.png"], "messages": [message], "response_ids": [3, 1, 4]}]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        (found,) = read(path)
        assert plain(found) == ("7", (f"{tmp_path}/a.png", f"{tmp_path}/b.png"), "Both?", (3, 1, 4))


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    """Several turns, pictures between the words, as chats are stored: with URLs in their parts, which are not fetched."""
    url = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}, "text": None}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, url, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, url]},
    ]
    rows = [{"id": "a", "images": ["a.png", "b.png"], "messages": turns, "response": "A ring."}]
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert isinstance(found, Row) and isinstance(found.prompt, Chat)
    assert found.prompt.texts == ["Look:", "What is it?", "A star.", "And this?"]
    assert [part["type"] for part in found.prompt.parts] == ["text", "image", "text", "text", "text", "image"]
    assert "example.org" not in repr(found.prompt)
    (short,) = read(write_jsonl(tmp_path / "b.jsonl", [{**rows[0], "images": ["a.png"]}]))
    assert isinstance(short, Fault) and "holds 2 image parts for 1 images" in str(short.error)


def test_messages_that_hold_their_pictures(tmp_path: Path) -> None:
    """As OpenAI, transformers and Anthropic write them; what sizes a picture stays in the conversation."""
    encoded = base64.b64encode(PICTURE).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}, "max_pixels": 5000},
        {"type": "image", "path": "sub/a.png"},
        {"type": "image", "url": "file:///abs/a%20b.png"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
    ]
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "messages": asked}]))
    assert isinstance(found, Row) and isinstance(found.prompt, Chat)
    assert found.images == (PICTURE, f"{tmp_path}/sub/a.png", "/abs/a b.png", PICTURE)
    assert [dict(part) for part in found.prompt.parts[:2]] == [{"type": "image", "max_pixels": 5000}, {"type": "image"}]
    for bad, told in (
        ([parts[0], {"type": "image"}], "1 of 2 picture parts hold no picture"),
        ([{"type": "image"}], "neither image nor images"),
        ([{**parts[0], "max_pixel": 1}], "with the key 'max_pixel'"),
    ):
        asked = [{"role": "user", "content": [*bad, {"type": "text", "text": "What?"}]}]
        (fault,) = read(write_jsonl(tmp_path / "b.jsonl", [{"id": "a", "messages": asked}]))
        assert isinstance(fault, Fault) and told in str(fault.error)


LITTER = ("._{}", ".DS_Store", "__MACOSX/._{}", "Thumbs.db", "desktop.ini")


@pytest.mark.parametrize("shard_rows", [1, 2, 10])
def test_what_macos_and_windows_leave_in_archives_is_skipped_and_counted(tmp_path: Path, shard_rows: int) -> None:
    files: list[tuple[str, bytes]] = []
    for key in ("000", "001", "002"):
        for part, data in (("png", PICTURE), ("prompt.txt", b"What?"), ("json", b'{"response": "A ring."}')):
            files += [(each.format(f"{key}.{part}"), b"\0\5\x16\7") for each in LITTER]
            files += [(f"{key}.{part}", data)]
    path = write_tar(tmp_path / "a.tar", files)
    assert [plain(each) for each in read(path, shard_rows=shard_rows)] == [
        (key, (PICTURE,), "What?", "A ring.") for key in ("000", "001", "002")
    ]
    (found,) = scan(find_inputs([str(path)]), Fields(), shard_rows)
    assert found.n_litter == 9 * len(LITTER)


def test_what_they_leave_in_folders_is_skipped_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row()])
    for name in ("._a.jsonl", "._b.tar", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert find_inputs([str(tmp_path)]) == (str(tmp_path / "a.jsonl"),)
    assert litter_in_folders([str(tmp_path)]) == 4


@pytest.mark.parametrize(
    ("written", "read_as"),
    [
        (b"A ring.\n", "A ring."),
        (b"A ring.\r\n", "A ring."),
        (b"A ring.\n\n", "A ring."),
        (b"\xef\xbb\xbfA ring.", "A ring."),
        (b"  A\nring. ", "  A\nring. "),
    ],
)
def test_text_parts_lose_what_editors_put_around_them(tmp_path: Path, written: bytes, read_as: str) -> None:
    """A mark of the encoding and the end of the last line are no tokens of a response; in JSON they were meant."""
    files = [("s.png", PICTURE), ("s.prompt.txt", written), ("s.response.txt", written)]
    files += [("t.png", PICTURE), ("t.json", json.dumps({"prompt": "What?\n", "response": "A ring.\n"}).encode())]
    first, second = read(write_tar(tmp_path / "a.tar", files))
    assert plain(first) == ("s", (PICTURE,), read_as, read_as)
    assert plain(second) == ("t", (PICTURE,), "What?\n", "A ring.\n")


def test_pictures_of_a_sample_keep_the_order_of_their_names(tmp_path: Path) -> None:
    files = [("s.1.png", PICTURE), ("s.0.png", png(1)), ("s.prompt", b"Both?"), ("s.cls", b"3"), ("t.jpg", PICTURE)]
    first, second = read(write_tar(tmp_path / "a.tar", files))
    assert plain(first) == ("s", (png(1), PICTURE), "Both?", None)
    assert isinstance(second, Fault) and "neither prompt nor messages" in str(second.error)


def test_fields_by_other_names(tmp_path: Path) -> None:
    rows = [{"key": "a", "photo": "a.png", "question": "What?", "answer": [1, 2]}]
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", rows), Fields("key", "photo", "question", "answer"))
    assert plain(found) == ("a", (f"{tmp_path}/a.png",), "What?", (1, 2))


def test_long_names_in_a_tar(tmp_path: Path) -> None:
    """Their headers come before the file's own, and so does a shard that begins with one."""
    keys = [f"{'d' * 120}/{k}" for k in range(5)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for key in keys:
                for part, data in (("png", PICTURE), ("prompt", b"What?")):
                    member = tarfile.TarInfo(f"{key}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        assert [plain(each)[0] for each in read(path, shard_rows=2)] == keys


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"image": None}, "neither image nor images"),
        ({"images": ["a.png"]}, "both image and images"),
        ({"image": None, "images": []}, "images is []"),
        ({"image": 3}, "the image is 3"),
        ({"image": ""}, "the image is ''"),
        ({"image": {"base64": "###"}}, "not base64"),
        ({"image": {"url": "x"}}, "the image holds url"),
        ({"image": "data:image/png,x"}, "expected data:image/png;base64"),
        ({"prompt": None}, "neither prompt nor messages"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": None, "messages": "What?"}, "messages is 'What?'"),
        ({"prompt": None, "messages": [{"role": "system", "content": "x"}]}, "0 image parts for 1 images"),
        ({"prompt": None, "messages": [{"role": "assistant", "content": "x"}]}, "it is the assistant's"),
        ({"prompt": None, "messages": [{"role": "user", "content": []}]}, "the messages hold no text"),
        ({"response": "x", "response_ids": [1]}, "both response and response_ids"),
        ({"response": 3}, "response is 3"),
        ({"response_ids": "x"}, "response_ids is 'x'"),
        ({"response_ids": [1, "x"]}, "holds 'x'"),
        ({"response_ids": [1, -1]}, "holds -1"),
        ({"response_ids": [True]}, "holds True"),
    ],
)
def test_faults_of_a_row_are_its_own(tmp_path: Path, values: dict[str, Any], reason: str) -> None:
    before, found, after = read(write_jsonl(tmp_path / "a.jsonl", [row(id="0"), row(**values), row(id="2")]))
    assert isinstance(before, Row) and isinstance(after, Row)
    assert isinstance(found, Fault)
    assert (found.id, found.place, found.number) == ("a", "a.jsonl row 2", 1)
    assert reason in str(found.error)


def test_a_broken_json_part_of_a_sample_is_a_fault_of_the_row(tmp_path: Path) -> None:
    files = [
        ("a.png", PICTURE),
        ("a.json", b"{"),
        ("b.png", PICTURE),
        ("b.json", b"3"),
        ("c.png", PICTURE),
        ("c.prompt", b"?"),
    ]
    first, second, third = read(write_tar(tmp_path / "a.tar", files))
    assert isinstance(first, Fault) and "json of the sample cannot be read" in str(first.error)
    assert isinstance(second, Fault) and "is a int" in str(second.error)
    assert isinstance(third, Row)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b'{"id": "a"}\n{"id"\n', "a.jsonl row 2 is not JSON"),
        (b'{"id": "a"}\n[1]\n', "a.jsonl row 2 is a list"),
        (b'{"id": "a"}\n\n{"id": "b"}\n', "a.jsonl row 2 is empty"),
        (b'{"id": "a"}\n{"id": null}\n', "a.jsonl row 2 has None as its 'id'"),
        (b'{"id": "a"}\n{"id": 1.5}\n', "a.jsonl row 2 has 1.5"),
        (b'{"id": "a"}\n{"id": true}\n', "a.jsonl row 2 has True"),
        (b'{"id": "a"}\n{"id": ""}\n', "a.jsonl row 2 has ''"),
        (b'{"id": "a"}\n{"id": "%s"}\n' % (b"x" * 2000), "a.jsonl row 2: request_id"),
        (b'\xff\xfe\x00{"id"\n', "a.jsonl row 1 is not JSON"),
        (b"", "no rows in 'a.jsonl'"),
        (b'{"id": "a"}\n{"id": "b"}\n{"id": "a"}\n', "a.jsonl row 1 and a.jsonl row 3"),
        (b'{"id": "1"}\n{"id": 1}\n', "a.jsonl row 1 and a.jsonl row 2"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(tmp_path: Path, lines: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(DatasetError) as error:
        scan([str(tmp_path / "a.jsonl")], Fields(), 2)
    assert reason in str(error.value)


def test_an_id_in_two_files_names_both(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row(id=str(k)) for k in range(5)])
    write_parquet(tmp_path / "b.parquet", [row(id=str(k)) for k in (7, 3)])
    with pytest.raises(DatasetError, match=r"'3' is there twice: a\.jsonl row 4 and b\.parquet row 2"):
        scan(find_inputs([str(tmp_path)]), Fields(), 2)


def test_folders_and_indexes(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", PICTURE), (f"{name}.prompt", b"What?")])
    (tmp_path / "notes.txt").write_text("not an input")
    index = {"wids_version": 1, "shardlist": [{"url": "b.tar", "nsamples": 1}, {"url": "a.tar", "nsamples": 1}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert find_inputs([str(tmp_path)]) == (f"{tmp_path}/a.tar", f"{tmp_path}/b.tar")
    assert find_inputs([f"{tmp_path}/index.json"]) == (f"{tmp_path}/b.tar", f"{tmp_path}/a.tar")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("missing.jsonl", None, "No such file"),
        ("a.csv", b"id\n", "no known format"),
        ("a.jsonl.gz", b"", "unpack compressed files"),
        ("a.parquet", b"nonsense", "'{}' cannot be read"),
        ("a.tar", b"nonsense", "'{}' cannot be read"),
        ("a.json", b"{}", "no index of WebDataset shards"),
        ("folder", None, "holds no file"),
    ],
)
def test_files_that_are_no_input(tmp_path: Path, name: str, data: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(DatasetError) as error:
        scan(find_inputs([str(path)]), Fields(), 2)
    assert reason.format(path) in str(error.value) and str(path) in str(error.value)


def test_parquet_without_ids(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"image": "a.png", "prompt": "What?"}])
    with pytest.raises(DatasetError, match=r"no column 'id' in it, but image, prompt"):
        scan([str(path)], Fields(), 2)


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(id=str(k)) for k in range(4)])
    (found,) = scan([str(path)], Fields(), 4)
    write_jsonl(path, [row(id=str(k)) for k in range(2)])
    with pytest.raises(DatasetError, match="ends after row 2, it had 4"):
        list(read_rows(found, 0, 4, 0, 0, Fields()))
    other = Input(str(tmp_path / "gone.jsonl"), 1, 1, "", (0,))
    with pytest.raises(DatasetError, match="No such file"):
        list(read_rows(other, 0, 1, 0, 0, Fields()))


def test_images_from_a_store(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://bucket/rows/a.png", "wb") as file:
        file.write(PICTURE)
    with fsspec.open("memory://bucket/rows/in.jsonl", "wb") as file:
        file.write(json.dumps(row()).encode())
    (found,) = read("memory://bucket/rows/in.jsonl")
    assert plain(found)[1] == ("memory://bucket/rows/a.png",)
    assert read_image(plain(found)[1][0]) == PICTURE
    for missing in ("memory://bucket/none.png", str(tmp_path / "none.png"), "nothing://x"):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(missing)
