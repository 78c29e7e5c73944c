"""Rows of Parquet, JSON lines and WebDataset shards: listed in one pass before the work, read again to be explained.

What is wrong with one row makes that row alone fail: a line that is not JSON, an id that is missing or repeated, a field
of the wrong type. A file is refused before any work where it cannot be read in its format, or where a field is missing
in all of its first rows: then the field has another name, or it is the wrong file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from fastattr.batch.reach import MAX_ROW_BYTES, Reach, local_path, locate, open_regular, reach_of
from fastattr.chat import Chat, Prompt, as_chat
from fastattr.errors import DatasetError, ImageError, InputError
from fastattr.log.record import check_request_id
from fastattr.log.requests import pictures_of, prompt_of
from fastattr.storage import is_litter

Format = Literal["jsonl", "parquet", "tar"]

FORMATS: Mapping[str, Format] = {".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
# suffixes within a WebDataset sample
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "mp4", "webm", "mkv", "mov", "avi")

_ROWS_AT_ONCE = 64  # of Parquet, decoded together
_FIRST_ROWS = 1000  # that are checked for the fields every row needs
_SHOWN_FIELDS = 40


@dataclass(frozen=True)
class Fields:
    """Which field of a row holds what.

    The fields `images` (a list), `messages`, `response_ids` and `template_options` (an object, or its JSON as text) are
    read too.

    Attributes:
        id: a string or a whole number, unique in all inputs: of rows with the same id only the first is explained. For a
            WebDataset sample its key.
        image: a path within the folder of the input file, a URL of its store or of those that are allowed (see `reach`),
            a `data:` URL, bytes, or a mapping with `bytes`, `base64` or `path`. Not needed where the parts of the
            messages hold the pictures.
        prompt: the user's text.
        response: text or token ids; where it is missing the model answers.
    """

    id: str = "id"
    image: str = "image"
    prompt: str = "prompt"
    response: str = "response"


@dataclass(frozen=True)
class Row:
    """A response to explain, or to be made first.

    Attributes:
        number: among all rows of a plan, from 0.
        id: the caller's.
        place: file and row in words, rows from 1.
        images: encoded bytes, or addresses of what is read later.
        response: None lets the model answer.
    """

    number: int
    id: str
    place: str
    images: tuple[bytes | str, ...]
    prompt: Prompt
    response: str | tuple[int, ...] | None


@dataclass(frozen=True)
class Fault:
    """A row that cannot be read: its number, id and place, and why. The id is None where the row has no valid one."""

    number: int
    id: str | None
    place: str
    error: Exception


@dataclass(frozen=True)
class Input:
    """A file of rows as one pass over it found it.

    Attributes:
        path: local path or fsspec URL.
        n_rows: that are wanted of it.
        n_bytes: of the file.
        ids: SHA-256 of all their ids, in order; a row without one counts as an empty id.
        offsets: in bytes, where each shard of it begins; 0 where the format finds rows by number.
        n_litter: number of files of macOS or Windows in it, which are skipped.
        repeats: rows that repeat the id of an earlier row, of this or another file, each with the place of that row.
    """

    path: str
    n_rows: int
    n_bytes: int
    ids: str
    offsets: tuple[int, ...]
    n_litter: int = 0
    repeats: tuple[tuple[int, str], ...] = ()

    @property
    def name(self) -> str:
        return _name(self.path)

    @property
    def folder(self) -> str:
        """Where it lies, a path or a URL."""
        return _folder(self.path)

    def place(self, row: int) -> str:
        """In words; `row` counts from 0."""
        return _place(self.name, row)


# --- before the work: which rows are there ---------------------------------------------------------


def find_inputs(inputs: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The files behind names: files as they are, folders as the files in them by name, a WebDataset index as its shards.

    Raises:
        DatasetError: there is no such file, or none of a known format.
    """
    found: list[str] = []
    for name in inputs:
        with _reading(name):
            system, path = url_to_fs(name, **_options(name, storage_options))
            if system.isdir(path):
                inside = sorted(
                    each
                    for each in system.ls(path, detail=False)
                    if _suffix(each) in FORMATS and not is_litter(_name(each))
                )
                if not inside:
                    raise DatasetError(f"{name!r} holds no file that ends in {', '.join(FORMATS)}")
                found += [system.unstrip_protocol(each) if "://" in name else each for each in inside]
            elif _suffix(name) == ".json":
                with _opened(name, storage_options) as (file, n_bytes):
                    if n_bytes > MAX_ROW_BYTES:
                        raise DatasetError(f"{name!r} is larger than {MAX_ROW_BYTES >> 20} MiB, which is no index")
                    found += _shards_of_index(name, file.read(MAX_ROW_BYTES))
            elif _suffix(name) in FORMATS:
                found.append(name if "://" in name else path)
            else:
                raise DatasetError(
                    f"{name!r} is of no known format, expected a folder, a file that ends in {', '.join(FORMATS)}, or the "
                    ".json index of WebDataset shards; unpack compressed files"
                )
    if not found:
        raise DatasetError("no input was given, expected at least one file or folder")
    return tuple(found)


def litter_in_folders(inputs: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> int:
    """Number of files of macOS or Windows in the inputs' folders, which `find_inputs` skips. Raises `DatasetError`."""
    found = 0
    for name in inputs:
        with _reading(name):
            system, path = url_to_fs(name, **_options(name, storage_options))
            if system.isdir(path):
                found += sum(is_litter(_name(each)) for each in system.ls(path, detail=False))
    return found


def scan(
    paths: Sequence[str],
    fields: Fields,
    shard_rows: int,
    limit: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Input, ...]:
    """Read the id of every row, and nothing else of what can be left unread.

    Args:
        shard_rows: most rows of a shard; a shard is of one file.
        limit: the first rows only.

    Raises:
        DatasetError: a file cannot be read, none of its first rows has a field that every row needs, or more than half of
            all rows repeat the id of an earlier row.
    """
    inputs: list[Input] = []
    hashes: list[np.ndarray] = []  # 8 bytes of hash per row; 0 for a row without an id
    left = limit
    for path in paths:
        if left is not None and left <= 0:
            break
        digest, offsets, ids = hashlib.sha256(), [], []
        litter: list[str] = []
        with _opened(path, storage_options) as (file, n_bytes):
            entries = _entries(path, file, fields, litter)
            for row, (offset, id) in enumerate(islice(_checked(path, entries, fields), left)):
                if row % shard_rows == 0:
                    offsets.append(offset)
                encoded = (b"" if id is None else id.encode()) + b"\0"
                digest.update(encoded)
                hashed = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
                ids.append(0 if id is None else hashed or 1)
        inputs.append(Input(path, len(ids), n_bytes, digest.hexdigest(), tuple(offsets), len(litter)))
        hashes.append(np.array(ids, np.uint64))
        left = None if left is None else left - len(ids)
    if not any(each.n_rows for each in inputs):
        raise DatasetError(f"there are no rows in {', '.join(repr(each.name) for each in inputs)}")
    return _with_repeats(inputs, np.concatenate(hashes), fields, storage_options)


def _with_repeats(
    inputs: Sequence[Input], hashes: np.ndarray, fields: Fields, storage_options: Mapping[str, Any] | None
) -> tuple[Input, ...]:
    """The inputs with their `repeats`. Rows with equal hashes are read again and their ids compared. Raises `DatasetError`."""
    values, counts = np.unique(hashes[hashes > 0], return_counts=True)
    suspects = np.isin(hashes, values[counts > 1])
    if not suspects.any():
        return tuple(inputs)
    seen: dict[str, str] = {}
    number = n_repeats = 0
    found: list[Input] = []
    for each in inputs:
        repeats = []
        with _opened(each.path, storage_options) as (file, _):
            for row, entry in enumerate(islice(_entries(each.path, file, fields), each.n_rows)):
                if suspects[number] and isinstance(entry.id, str):
                    if entry.id in seen:
                        repeats.append((row, seen[entry.id]))
                    else:
                        seen[entry.id] = each.place(row)
                number += 1
        n_repeats += len(repeats)
        if 2 * n_repeats > len(hashes):
            raise DatasetError(
                f"more than half of the {len(hashes)} rows repeat the id of an earlier row: {each.place(repeats[-1][0])} "
                f"that of {repeats[-1][1]}; is {fields.id!r} the field that identifies a row?"
            )
        found.append(replace(each, repeats=tuple(repeats)))
    return tuple(found)


class _Broken(NamedTuple):
    """A row that cannot be read at all, and why."""

    error: DatasetError


class _Entry(NamedTuple):
    """A row as the first pass sees it.

    Attributes:
        offset: where it begins, in bytes; 0 where the format finds rows by number.
        id: of the row, or why the row is broken.
        fields: names of the fields it has.
    """

    offset: int
    id: str | _Broken
    fields: Set[str]


def _checked(path: str, entries: Iterator[_Entry], fields: Fields) -> Iterator[tuple[int, str | None]]:
    """Offsets and ids, after the first rows were checked for the fields that every row needs.

    Raises:
        DatasetError: none of the first rows can be read, or has a field that every row needs.
    """
    first = list(islice(entries, _FIRST_ROWS))
    held = frozenset[str]().union(*(entry.fields for entry in first))
    if first and not held:
        reason = next(entry.id.error for entry in first if isinstance(entry.id, _Broken))
        raise DatasetError(f"none of the first {len(first)} rows of {_name(path)!r} can be read: {reason}")
    needed = [(fields.id,), (fields.image, "images"), (fields.prompt, "messages")]
    if fields.response != Fields.response:  # with the default name the field may be absent: the model answers
        needed.append((fields.response, "response_ids"))
    for names in needed if first else ():
        if names == (fields.image, "images") and "messages" in held:  # whose parts may hold the images
            continue
        if held.isdisjoint(names):
            raise DatasetError(
                f"none of the first {len(first)} rows of {_name(path)!r} has {' or '.join(map(repr, names))}; they have "
                f"{', '.join(sorted(held)[:_SHOWN_FIELDS])}; name the right field"
            )
    for entry in chain(first, entries):
        yield entry.offset, None if isinstance(entry.id, _Broken) else entry.id


def _entries(path: str, file: BinaryIO, fields: Fields, litter: list[str] | None = None) -> Iterator[_Entry]:
    """Every row of a file; the names of skipped files are added to `litter`."""
    name = _name(path)
    rows: Iterator[tuple[int, Any, Set[str]]]
    if _format(path) == "jsonl":
        rows = (
            (offset, values if isinstance(values, _Broken) else values.get(fields.id), _keys(values))
            for offset, values in _json_rows(name, file, 0)
        )
    elif _format(path) == "parquet":
        rows = _parquet_ids(file, fields.id)
    else:
        rows = ((members[0].offset, key, _parts(members, fields)) for key, members in _samples(file, litter))
    for row, (offset, id, held) in enumerate(rows):
        yield _Entry(offset, id if isinstance(id, _Broken) else _check_id(id, fields.id, _place(name, row)), held)


def _keys(values: Mapping[str, Any] | _Broken) -> Set[str]:
    return frozenset() if isinstance(values, _Broken) else values.keys()


def _parts(members: Sequence[tarfile.TarInfo], fields: Fields) -> Set[str]:
    """The fields that the files of a sample provide; a JSON file may hold any."""
    parts = {_key(member.name)[1].lower() for member in members}
    held = {fields.id, *(part.removesuffix(".txt") for part in parts)}
    if "json" in parts:
        held |= {fields.image, fields.prompt, fields.response}
    if any(part.rsplit(".", 1)[-1] in PICTURES for part in parts):
        held.add("images")
    return held


def _check_id(id: Any, field: str, place: str) -> str | _Broken:
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        return _Broken(DatasetError(f"{place} has {_short(id)} as its {field!r}, expected a string or a whole number"))
    try:
        return check_request_id(str(id))
    except (InputError, ValueError) as error:  # ValueError: a number with thousands of digits
        return _Broken(DatasetError(f"{place}: {error}"))


# --- at work: the rows of a shard ------------------------------------------------------------------


def read_rows(
    source: Input,
    start: int,
    stop: int,
    offset: int,
    first: int,
    fields: Fields,
    storage_options: Mapping[str, Any] | None = None,
    reach: Reach | None = None,
) -> Iterator[Row | Fault]:
    """Rows `start` to `stop` of a file; images stay where they are, unless they lie in the file itself.

    Args:
        offset: in bytes, where row `start` begins.
        first: the number of row `start` among all rows of the plan.
        reach: what rows may name; by default the folder and the store of the file.

    Raises:
        DatasetError: the file cannot be read, or is not the one that was scanned.
    """
    n = stop - start
    repeats = dict(source.repeats)
    reach = reach_of(source.folder, storage_options) if reach is None else reach
    with _opened(source.path, storage_options) as (file, _):
        raw: Iterator[Mapping[str, Any] | _Broken]
        if _format(source.path) == "jsonl":
            file.seek(offset)
            raw = (values for _, values in _json_rows(source.name, file, start))
        elif _format(source.path) == "parquet":
            raw = _parquet_rows(file, start, stop, fields)
        else:
            file.seek(offset)
            raw = _sample_rows(file, fields)
        count = 0
        for count, values in enumerate(islice(raw, n), start=1):
            row, number, place = start + count - 1, first + count - 1, source.place(start + count - 1)
            if isinstance(values, _Broken):
                yield Fault(number, None, place, values.error)
                continue
            id = _check_id(values.get(fields.id), fields.id, place)
            if isinstance(id, _Broken):
                yield Fault(number, None, place, id.error)
                continue
            if row in repeats:
                yield Fault(number, id, place, DatasetError(f"the id {id!r} is already that of {repeats[row]}"))
                continue
            try:
                if _format(source.path) == "tar":
                    values = _read_parts(values, ("json", fields.prompt, fields.response))
                yield to_row(values, fields, number=number, id=id, place=place, reach=reach)
            except Exception as error:  # a field may hold anything, however deep and large
                yield Fault(number, id, place, error)
        if count < n:
            raise DatasetError(
                f"{source.path!r} ends after row {start + count}, it had {source.n_rows} when it was planned"
            )


def to_row(values: Mapping[str, Any], fields: Fields, *, number: int, id: str, place: str, reach: Reach) -> Row:
    """A row from its fields.

    Args:
        reach: which images it may name.

    Raises:
        InputError: a field is missing, there twice under two names, or of a wrong type; the message names it.
        ImageError: it names an image that it may not.
    """
    image, images = values.get(fields.image), values.get("images")
    prompt, messages = values.get(fields.prompt), values.get("messages")
    if image is None and images is None and messages is not None:
        images = pictures_of(list(messages)) or None
    if (image is None) == (images is None):
        raise InputError(_choice(values, fields.image, "images"))
    if images is not None and (not isinstance(images, list | tuple | np.ndarray) or len(images) == 0):
        raise InputError(f"images is {_short(images)}, expected a list of at least one")
    pictures = tuple(_image(each, reach) for each in ([image] if images is None else images))
    if (prompt is None) == (messages is None):
        raise InputError(_choice(values, fields.prompt, "messages"))
    if messages is not None:
        if not isinstance(messages, list | tuple | np.ndarray):
            raise InputError(f"messages is {_short(messages)}, expected a list of messages")
        prompt = prompt_of(list(messages))
    if not isinstance(prompt, str | Chat):
        raise InputError(f"{fields.prompt} is {_short(prompt)}, expected text")
    options = _template_options(values.get("template_options"))
    if options:
        prompt = replace(as_chat(prompt, len(pictures)), template_options=options)
    if isinstance(prompt, Chat) and prompt.n_pictures != len(pictures):
        raise InputError(
            f"messages holds {prompt.n_pictures} image parts for {len(pictures)} images, expected one each, in their order"
        )
    return Row(number, id, place, pictures, prompt, _response(values, fields))


def _template_options(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"template_options is {_short(value)}, which is not JSON: {error}") from error
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"template_options is {_short(value)}, expected an object")
    # a Parquet column of structs holds every option in every row, None where it is not set
    return {name: each for name, each in (value or {}).items() if each is not None}


def _image(value: Any, reach: Reach) -> bytes | str:
    if isinstance(value, Mapping):  # as the Image feature of Hugging Face datasets is stored, or base64 in JSON
        given = {name: each for name, each in value.items() if each is not None}
        if "bytes" in given:
            value = given["bytes"]
        elif "base64" in given:
            return _decode(given["base64"])
        elif "path" in given:
            value = given["path"]
        else:
            raise InputError(f"the image holds {', '.join(given) or 'nothing'}, expected bytes, base64 or path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise InputError(f"the image is {_short(value)}, expected a path, a URL or bytes")
    if value[:5].lower() == "data:":
        head, comma, body = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InputError(f"the image is {_short(value)}, expected data:image/png;base64,... or a path")
        return _decode(body)
    return locate(value, reach)


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode("".join(text.split()) if isinstance(text, str) else text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(f"the image is {_short(text)}, which is not base64: {error}") from error


def _response(values: Mapping[str, Any], fields: Fields) -> str | tuple[int, ...] | None:
    response, ids = values.get(fields.response), values.get("response_ids")
    if response is not None and ids is not None:
        raise InputError(_choice(values, fields.response, "response_ids"))
    given = response if ids is None else ids
    if given is None or (isinstance(given, str) and ids is None):
        return given
    named = fields.response if ids is None else "response_ids"
    if not isinstance(given, list | tuple | np.ndarray):
        raise InputError(f"{named} is {_short(given)}, expected {'text or ' if ids is None else ''}a list of token ids")
    wrong = [each for each in given if isinstance(each, bool) or not isinstance(each, int | np.integer) or each < 0]
    if wrong:
        raise InputError(f"{named} holds {_short(wrong[0])}, expected token ids")
    return tuple(int(each) for each in given)


def _choice(values: Mapping[str, Any], one: str, other: str) -> str:
    given = [name for name in (one, other) if values.get(name) is not None]
    held = ", ".join(str(name) for name, value in values.items() if value is not None) or "nothing"
    what = f"the row has both {one} and {other}" if given else f"the row has neither {one} nor {other}"
    return f"{what}, expected one of them; it holds {held}"


# --- the formats -----------------------------------------------------------------------------------


def _json_rows(name: str, file: BinaryIO, row: int) -> Iterator[tuple[int, Mapping[str, Any] | _Broken]]:
    """Every line from here on with its offset in bytes; `row` is the number of the first. Trailing empty lines are skipped."""
    offset = file.tell()
    empty: list[int] = []  # their offsets, until another line follows
    for line in file:
        begin, offset = offset, offset + len(line)
        if not line.strip():
            empty.append(begin)
            continue
        for at in empty:
            yield at, _Broken(DatasetError(f"{_place(name, row)} is empty, expected a JSON object on every line"))
            row += 1
        empty.clear()
        yield begin, _json_object(line, _place(name, row))
        row += 1


def _json_object(line: bytes, place: str) -> Mapping[str, Any] | _Broken:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return _Broken(DatasetError(f"{place} is not JSON: {error}"))
    if not isinstance(values, dict):
        return _Broken(DatasetError(f"{place} is a {type(values).__name__}, expected a JSON object"))
    return values


def _parquet_ids(file: BinaryIO, field: str) -> Iterator[tuple[int, Any, Set[str]]]:
    table = pq.ParquetFile(file)
    held = frozenset(table.schema_arrow.names)
    if field not in held:
        raise DatasetError(f"there is no column {field!r} in it, but {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[field]):
        for values in _plain_rows(batch):
            yield 0, values if isinstance(values, _Broken) else values[field], held


def _plain_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | _Broken]:
    """Rows as Python values. A row that cannot be converted, such as text that is not UTF-8, does not affect the others."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, pa.ArrowException):
        pass
    for row in range(batch.num_rows):
        try:
            (values,) = batch.slice(row, 1).to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            yield _Broken(DatasetError(f"a value of the row cannot be read: {error}"))
        else:
            yield values


def _parquet_rows(file: BinaryIO, start: int, stop: int, fields: Fields) -> Iterator[Mapping[str, Any] | _Broken]:
    table = pq.ParquetFile(file)
    beside = {"images", "messages", "response_ids", "template_options"}
    wanted = {fields.id, fields.image, fields.prompt, fields.response, *beside}
    columns = [name for name in table.schema_arrow.names if name in wanted]
    groups: list[int] = []
    begin = skipped = 0
    for group in range(table.num_row_groups):
        n = table.metadata.row_group(group).num_rows
        if begin < stop and begin + n > start:
            if not groups:
                skipped = start - begin
            groups.append(group)
        begin += n
    position = -skipped
    for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns):
        end = position + batch.num_rows
        if end > 0:
            yield from _plain_rows(batch.slice(max(0, -position)))
        position = end


def _samples(file: BinaryIO, litter: list[str] | None = None) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbouring files of one key, as WebDataset has it: the path up to the first dot of its last part."""

    def is_wanted(member: tarfile.TarInfo) -> bool:
        if member.isfile() and is_litter(member.name) and litter is not None:
            litter.append(member.name)
        return member.isfile() and not is_litter(member.name)

    with tarfile.open(fileobj=file, mode="r:") as tar:
        files = filter(is_wanted, tar)
        for key, members in groupby(files, lambda member: _key(member.name)[0]):
            yield key, list(members)


def _sample_rows(file: BinaryIO, fields: Fields) -> Iterator[Mapping[str, Any]]:
    for key, members in _samples(file):
        values: dict[str, Any] = {}
        pictures: dict[str, bytes] = {}
        for member in members:
            part = _key(member.name)[1].lower()
            data = _read_member(file, member)
            if part.rsplit(".", 1)[-1] in PICTURES:
                pictures[part] = data
            elif part == "json":
                values[part] = data  # is read where a fault of it is the row's
            elif part.removesuffix(".txt") in (fields.prompt, fields.response):
                values[part.removesuffix(".txt")] = data
        if pictures:
            values |= {"images": [pictures[part] for part in sorted(pictures)], fields.image: None}
        yield {**values, fields.id: key}


def _read_parts(values: Mapping[str, Any], parts: Sequence[str]) -> Mapping[str, Any]:
    """A sample with these files decoded to text and the fields of its JSON added. Raises `InputError`."""
    texts: dict[str, str] = {}
    held: Any = {}
    for part in parts:
        if not isinstance(values.get(part), bytes):
            continue
        try:
            text = values[part].decode("utf-8-sig")
            if part == "json":
                held = json.loads(text)
            else:
                texts[part] = text.rstrip("\r\n")  # editors add a line break at the end
        except (ValueError, RecursionError) as error:
            raise InputError(f"the {part} of the sample cannot be read: {error}") from error
    if not isinstance(held, dict):
        raise InputError(f"the json of the sample is a {type(held).__name__}, expected an object")
    return {**held, **values, **texts}


def _read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(min(member.size, MAX_ROW_BYTES + 1))  # one that is larger is refused where its row is read


def _key(path: str) -> tuple[str, str]:
    folder, slash, name = path.rpartition("/")
    key, _, part = name.partition(".")
    return folder + slash + key, part


def _shards_of_index(name: str, data: bytes) -> list[str]:
    try:
        shards = [each["url"] for each in json.loads(data)["shardlist"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{name!r} is no index of WebDataset shards, expected {{'shardlist': [{{'url': ...}}]}}"
        ) from error
    try:  # an index gets at no more than a row does
        return [locate(url, reach_of(_folder(name))) for url in shards]
    except (ImageError, TypeError) as error:
        raise DatasetError(
            f"{name!r} names a shard that is not in its folder or its store: {shards}; name the shards themselves"
        ) from error


# --- files -----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, storage_options: Mapping[str, Any] | None) -> Iterator[tuple[BinaryIO, int]]:
    with _reading(path):
        local = local_path(path)
        with open_regular(local) if local is not None else _open_url(path, storage_options) as file:
            n_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield file, n_bytes


def _open_url(url: str, storage_options: Mapping[str, Any] | None) -> Any:
    system, inside = url_to_fs(url, **(storage_options or {}))
    return system.open(inside, "rb")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except DatasetError as error:
        if path in str(error) or path.rsplit("/", 1)[-1] in str(error):
            raise
        raise DatasetError(f"{path!r} cannot be read: {error}") from error
    except (OSError, ValueError, ImportError, tarfile.TarError, pa.ArrowException) as error:
        raise DatasetError(f"{path!r} cannot be read: {_reason(error)}") from error


def _options(path: str, storage_options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return storage_options or {} if "://" in path else {}


def _format(path: str) -> Format:
    return FORMATS[_suffix(path)]


def _suffix(path: str) -> str:
    name = _name(path)
    return f".{name.rsplit('.', 1)[-1].lower()}" if "." in name else ""


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _place(name: str, row: int) -> str:
    return f"{name} row {row + 1}"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    text = repr(value[:40] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else text[:57] + "..."
