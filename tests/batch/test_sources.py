"""Rows of every format come out the same, and every fault names its file and row."""

from __future__ import annotations

import base64
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.batch.reach import reach_of
from fastattr.batch.reach import read as read_named
from fastattr.batch.sources import (
    Fault,
    Fields,
    Input,
    Row,
    find_inputs,
    litter_in_folders,
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
        ({"image": "{folder}/abs/a.png"}, "{folder}/abs/a.png"),
        ({"image": "file://{folder}/a%20b.png"}, "{folder}/a b.png"),
        ({"image": {"path": "a.png", "bytes": None}}, "{folder}/a.png"),
        ({"image": {"base64": base64.b64encode(PICTURE).decode()}}, PICTURE),
        ({"image": "data:image/png;base64," + base64.b64encode(PICTURE).decode()}, PICTURE),
    ],
)
def test_images_come_as(tmp_path: Path, values: dict[str, Any], expected: str | bytes) -> None:
    named = {
        key: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in values.items()
    }
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [row(**named)]))
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
    """In the formats of OpenAI, transformers and Anthropic; keys for the size stay in the conversation."""
    encoded = base64.b64encode(PICTURE).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}, "max_pixels": 5000},
        {"type": "image", "path": "sub/a.png"},
        {"type": "image", "url": f"file://{tmp_path}/abs/a%20b.png"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
    ]
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "messages": asked}]))
    assert isinstance(found, Row) and isinstance(found.prompt, Chat)
    assert found.images == (PICTURE, f"{tmp_path}/sub/a.png", f"{tmp_path}/abs/a b.png", PICTURE)
    assert [dict(part) for part in found.prompt.parts[:2]] == [{"type": "image", "max_pixels": 5000}, {"type": "image"}]
    for bad, told in (
        ([parts[0], {"type": "image"}], "1 of 2 picture parts hold no picture"),
        ([{"type": "image"}], "neither image nor images"),
        ([{**parts[0], "max_pixel": 1}], "with the key 'max_pixel'"),
        ([{"type": "image", "url": "file://server/b.png"}], "it names a host"),
    ):
        asked = [{"role": "user", "content": [*bad, {"type": "text", "text": "What?"}]}]
        (fault,) = read(write_jsonl(tmp_path / "b.jsonl", [{"id": "a", "messages": asked}]))
        assert isinstance(fault, Fault) and told in str(fault.error)


LITTER = ("._{}", ".DS_Store", "__MACOSX/._{}", "Thumbs.db", "desktop.ini")


@pytest.mark.parametrize("shard_rows", [1, 2, 10])
def test_files_of_macos_and_windows_in_archives_are_skipped_and_counted(tmp_path: Path, shard_rows: int) -> None:
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


def test_files_of_macos_and_windows_in_folders_are_skipped_and_counted(tmp_path: Path) -> None:
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
def test_text_parts_lose_byte_order_marks_and_trailing_line_breaks(
    tmp_path: Path, written: bytes, read_as: str
) -> None:
    """A byte order mark and the last line break are not part of a response; within JSON they are."""
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


GOOD = b'{"id": "good", "image": "a.png", "prompt": "What?"}\n'


@pytest.mark.parametrize(
    ("line", "id", "reason"),
    [
        (b'{"id"', None, "a.jsonl row 2 is not JSON"),
        (b"[1]", None, "a.jsonl row 2 is a list"),
        (b"", None, "a.jsonl row 2 is empty"),
        (b'{"id": "\xff"}', None, "a.jsonl row 2 is not JSON: 'utf-8' codec"),
        (b"\xff\xfe{\x00}\x00", None, "a.jsonl row 2 is not JSON"),
        (b'{"prompt": "x"}', None, "a.jsonl row 2 has None as its 'id'"),
        (b'{"id": null}', None, "a.jsonl row 2 has None as its 'id'"),
        (b'{"id": 1.5}', None, "a.jsonl row 2 has 1.5"),
        (b'{"id": 1e999}', None, "a.jsonl row 2 has inf"),
        (b'{"id": true}', None, "a.jsonl row 2 has True"),
        (b'{"id": ""}', None, "a.jsonl row 2 has ''"),
        (b'{"id": ["x"]}', None, "a.jsonl row 2 has ['x']"),
        (b'{"id": "%s"}' % (b"x" * 2000), None, "a.jsonl row 2: request_id"),
        (b'{"id": %s}' % (b"1" * 5000), None, "a.jsonl row 2 is not JSON"),
        (b'{"id": "a", "prompt": %s}' % (b"[" * 100_000), None, "a.jsonl row 2 is not JSON"),
        (b'{"id": "a", "image": "a.png", "prompt": %s}' % (b"[" * 900 + b"]" * 900), "a", ""),
        (b'{"id": "good", "image": "b.png", "prompt": "Another?"}', "good", "already that of a.jsonl row 1"),
    ],
)
def test_a_broken_line_is_a_fault_of_its_row(tmp_path: Path, line: bytes, id: str | None, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + b"\n" + GOOD.replace(b"good", b"last"))
    for shard_rows in (1, 2, 3):
        before, found, after = read(tmp_path / "a.jsonl", shard_rows=shard_rows)
        assert isinstance(before, Row) and isinstance(after, Row) and after.id == "last"
        assert isinstance(found, Fault)
        assert (found.id, found.place, found.number) == (id, "a.jsonl row 2", 1)
        assert reason in str(found.error)


def test_equal_ids_of_text_and_number_are_equal(tmp_path: Path) -> None:
    first, second = read(write_jsonl(tmp_path / "a.jsonl", [row(id="1"), row(id=1)]))
    assert isinstance(first, Row) and isinstance(second, Fault) and "already that of a.jsonl row 1" in str(second.error)


def test_an_id_in_two_files_is_a_fault_of_the_second(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row(id=str(k)) for k in range(5)])
    write_parquet(tmp_path / "b.parquet", [row(id=str(k)) for k in (7, 3)])
    first, second = scan(find_inputs([str(tmp_path)]), Fields(), 2)
    assert first.repeats == () and second.repeats == ((1, "a.jsonl row 4"),)


@pytest.mark.parametrize(
    ("rows", "fields", "reason"),
    [
        ([{"key": "a", "image": "a.png", "prompt": "?"}], Fields(), "has 'id'; they have image, key, prompt"),
        (
            [{"id": "a", "photo": "a.png", "prompt": "?"}],
            Fields(),
            "has 'image' or 'images'; they have id, photo, prompt",
        ),
        ([{"id": "a", "image": "a.png", "ask": "?"}], Fields(), "has 'prompt' or 'messages'; they have ask, id, image"),
        ([row(answer="x")], Fields(response="answr"), "has 'answr' or 'response_ids'; they have answer, id"),
    ],
)
def test_a_missing_field_is_named_at_once_with_those_that_exist(
    tmp_path: Path, rows: list[dict[str, Any]], fields: Fields, reason: str
) -> None:
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), write_parquet(tmp_path / "a.parquet", rows)):
        with pytest.raises(DatasetError) as error:
            scan([str(path)], fields, 2)
        expected = "there is no column 'id'" if path.suffix == ".parquet" and "'id'; " in reason else reason
        assert expected in str(error.value) and path.name in str(error.value)


def test_samples_without_any_picture_or_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has 'image' or 'images'"):
        scan([str(write_tar(tmp_path / "a.tar", [("s.prompt", b"?"), ("t.cls", b"1")]))], Fields(), 2)
    with pytest.raises(DatasetError, match="has 'prompt' or 'messages'"):
        scan([str(write_tar(tmp_path / "b.tar", [("s.png", PICTURE)]))], Fields(), 2)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b"", "no rows in 'a.jsonl'"),
        (b"\x00\x01\n[1]\n", "none of the first 2 rows of 'a.jsonl' can be read: a.jsonl row 1 is not JSON"),
        (GOOD * 4, "more than half of the 4 rows repeat the id of an earlier row"),
    ],
)
def test_files_that_are_refused_as_a_whole(tmp_path: Path, lines: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(DatasetError) as error:
        scan([str(tmp_path / "a.jsonl")], Fields(), 2)
    assert reason in str(error.value)


def test_text_of_parquet_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    """In a column of type string, as some writers produce it."""
    values = [b"What?", b"\xff\xfe", b"What?"]
    text = pa.array(values, pa.binary()).view(pa.string())
    table = pa.table({"id": ["a", "b", "c"], "image": ["a.png"] * 3, "prompt": text})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet")
    assert isinstance(first, Row) and isinstance(third, Row) and third.id == "c"
    assert isinstance(second, Fault) and second.number == 1 and "cannot be read" in str(second.error)


def test_text_of_a_sample_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    files = [("a.png", PICTURE), ("a.prompt", b"\xff"), ("b.png", PICTURE), ("b.prompt", b"What?\n")]
    first, second = read(write_tar(tmp_path / "a.tar", files))
    assert (
        isinstance(first, Fault) and first.id == "a" and "the prompt of the sample cannot be read" in str(first.error)
    )
    assert plain(second)[2] == "What?"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner, max_size=2)
    ),
    max_leaves=5,
)
LINES = (
    st.binary(max_size=30).filter(lambda line: b"\n" not in line)
    | st.dictionaries(
        st.sampled_from(["id", "image", "images", "prompt", "messages", "response", "response_ids"]), JSON_VALUES
    ).map(lambda values: json.dumps(values).encode())
    | st.sampled_from(["a", "b", "c", 1, 2]).map(lambda id: json.dumps(row(id=id)).encode())
)


@given(lines=st.lists(LINES, max_size=12), shard_rows=st.integers(1, 5), ended=st.booleans())
def test_every_line_is_accounted_for_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], shard_rows: int, ended: bool
) -> None:
    """Whatever the lines hold: each is a row or a fault, in order, and no id belongs to two rows."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    good = [json.dumps(row(id=f"good {k}")).encode() for k in range(len(lines) + 1)]
    written = [*good, *lines]
    path.write_bytes(b"\n".join(written) + (b"\n" if ended else b""))
    while not written[-1].strip():  # empty lines at the end are none
        written.pop()
    found = read(path, shard_rows=shard_rows)
    assert [each.number for each in found] == list(range(len(written)))
    assert [each.place for each in found] == [f"a.jsonl row {k + 1}" for k in range(len(written))]
    rows = [each for each in found if isinstance(each, Row)]
    assert len({each.id for each in rows}) == len(rows)
    for each, line in zip(found, written, strict=True):
        if isinstance(each, Row):
            assert str(json.loads(line)["id"]) == each.id
        else:
            assert str(each.error)


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
    reach = reach_of("memory://bucket/rows")
    assert read_named(plain(found)[1][0], reach) == PICTURE
    with pytest.raises(ImageError, match="cannot be read"):
        read_named("memory://bucket/none.png", reach)
    with pytest.raises(ImageError, match="cannot be read"):
        read_named(str(tmp_path / "none.png"), reach_of(str(tmp_path)))


@pytest.mark.parametrize("url", ["../../outside.tar", "/etc/x.tar", "https://example.org/a.tar", "x::file:///a.tar", 5])
def test_an_index_names_only_what_lies_beside_it(tmp_path: Path, url: object) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"shardlist": [{"url": url}]}))
    with pytest.raises(DatasetError, match="names a shard that is not in its folder"):
        find_inputs([str(tmp_path / "index.json")])


def test_a_pipe_that_has_the_name_of_an_input_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DatasetError, match="no regular file"):
        scan(find_inputs([str(tmp_path)]), Fields(), 2)
