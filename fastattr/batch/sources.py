"""Rows of Parquet, JSON lines and WebDataset shards: found in one pass before the work, read again where they are explained.

What has no id of its own could not be accounted for, so a file that holds such a row is refused as a whole, before any
work. Everything else that is wrong with a row is a fault of that row.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from fastattr.chat import Chat, Prompt
from fastattr.errors import DatasetError, FastattrError, ImageError, InputError
from fastattr.log.record import check_request_id
from fastattr.log.requests import pictures_of, prompt_of
from fastattr.storage import is_litter

Format = Literal["jsonl", "parquet", "tar"]

FORMATS: Mapping[str, Format] = {".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}
# suffixes within a WebDataset sample
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "mp4", "webm", "mkv", "mov", "avi")

_ROWS_AT_ONCE = 64  # of Parquet, decoded together


@dataclass(frozen=True)
class Fields:
    """Which field of a row holds what. Read beside them are `images` (a list), `messages` and `response_ids`.

    Attributes:
        id: a string or a whole number, not twice in all inputs. Of a WebDataset sample its key.
        image: a path from the input file, a URL that fsspec knows, a `data:` URL, bytes, or a mapping with `bytes`,
            `base64` or `path`. Left out where the parts of the messages hold their pictures.
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
    """A row that cannot be read: its number, id and place, and why."""

    number: int
    id: str
    place: str
    error: Exception


@dataclass(frozen=True)
class Input:
    """A file of rows as one pass over it found it.

    Attributes:
        path: local path or fsspec URL.
        n_rows: that are wanted of it.
        n_bytes: of the file.
        ids: SHA-256 of all their ids, in order.
        offsets: in bytes, where each shard of it begins; 0 where the format finds rows by number.
        n_litter: files in it that macOS or Windows left there, which are skipped.
    """

    path: str
    n_rows: int
    n_bytes: int
    ids: str
    offsets: tuple[int, ...]
    n_litter: int = 0

    @property
    def name(self) -> str:
        return _name(self.path)

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
                found += _shards_of_index(name, system.cat_file(path))
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
    """How many files of the inputs' folders `find_inputs` skips, because macOS or Windows left them there."""
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
        DatasetError: a file cannot be read, a row has no id, or an id is there twice.
    """
    inputs: list[Input] = []
    hashes: list[np.ndarray] = []
    left = limit
    for path in paths:
        if left is not None and left <= 0:
            break
        digest, offsets, ids = hashlib.sha256(), [], []
        litter: list[str] = []
        with _opened(path, storage_options) as (file, n_bytes):
            for row, (offset, id) in enumerate(islice(_ids(path, file, fields, litter), left)):
                if row % shard_rows == 0:
                    offsets.append(offset)
                encoded = id.encode() + b"\0"
                digest.update(encoded)
                ids.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"))
        inputs.append(Input(path, len(ids), n_bytes, digest.hexdigest(), tuple(offsets), len(litter)))
        hashes.append(np.array(ids, np.uint64))
        left = None if left is None else left - len(ids)
    if not any(each.n_rows for each in inputs):
        raise DatasetError(f"there are no rows in {', '.join(repr(each.name) for each in inputs)}")
    _refuse_duplicates(inputs, np.concatenate(hashes), fields, storage_options)
    return tuple(inputs)


def _refuse_duplicates(
    inputs: Sequence[Input], hashes: np.ndarray, fields: Fields, storage_options: Mapping[str, Any] | None
) -> None:
    """Eight bytes a row are held in memory; ids whose hashes meet are read once more to be compared themselves."""
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist())
    if not suspects:
        return
    seen: dict[str, str] = {}
    number = 0
    for each in inputs:
        with _opened(each.path, storage_options) as (file, _):
            for row, (_, id) in enumerate(islice(_ids(each.path, file, fields), each.n_rows)):
                if number in suspects:
                    if id in seen:
                        raise DatasetError(
                            f"the id {id!r} is there twice: {seen[id]} and {each.place(row)}; ids must be unique in all "
                            "inputs, so that every result has one row"
                        )
                    seen[id] = each.place(row)
                number += 1


def _ids(path: str, file: BinaryIO, fields: Fields, litter: list[str] | None = None) -> Iterator[tuple[int, str]]:
    """Where each row begins, in bytes or 0, and its id; the names of skipped files are added to `litter`."""
    name = _name(path)
    rows: Iterator[tuple[int, Any]]
    if _format(path) == "jsonl":
        rows = ((offset, values.get(fields.id)) for offset, values in _json_rows(name, file, 0))
    elif _format(path) == "parquet":
        rows = _parquet_ids(file, fields.id)
    else:
        rows = ((members[0].offset, key) for key, members in _samples(file, litter))
    for row, (offset, id) in enumerate(rows):
        yield offset, _check_id(id, fields.id, _place(name, row))


def _check_id(id: Any, field: str, place: str) -> str:
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise DatasetError(f"{place} has {id!r} as its {field!r}, expected a string or a whole number")
    try:
        return check_request_id(str(id))
    except InputError as error:
        raise DatasetError(f"{place}: {error}") from error


# --- at work: the rows of a shard ------------------------------------------------------------------


def read_rows(
    source: Input,
    start: int,
    stop: int,
    offset: int,
    first: int,
    fields: Fields,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[Row | Fault]:
    """Rows `start` to `stop` of a file; images stay where they are, unless they lie in the file itself.

    Args:
        offset: in bytes, where row `start` begins.
        first: the number of row `start` among all rows of the plan.

    Raises:
        DatasetError: the file cannot be read, or is not the one that was scanned.
    """
    n = stop - start
    with _opened(source.path, storage_options) as (file, _):
        raw: Iterator[Mapping[str, Any]]
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
            number, place = first + count - 1, source.place(start + count - 1)
            id = _check_id(values.get(fields.id), fields.id, place)
            try:
                if isinstance(values.get("json"), bytes):
                    values = {**_json_part(values["json"]), **values}
                yield to_row(values, fields, number=number, id=id, place=place, base=_folder(source.path))
            except FastattrError as error:
                yield Fault(number, id, place, error)
        if count < n:
            raise DatasetError(
                f"{source.path!r} ends after row {start + count}, it had {source.n_rows} when it was planned"
            )


def to_row(values: Mapping[str, Any], fields: Fields, *, number: int, id: str, place: str, base: str) -> Row:
    """A row from its fields.

    Args:
        base: folder or URL that paths of images start from; empty for paths as they are.

    Raises:
        InputError: a field is missing, there twice under two names, or of a wrong type; the message names it.
    """
    image, images = values.get(fields.image), values.get("images")
    prompt, messages = values.get(fields.prompt), values.get("messages")
    if image is None and images is None and messages is not None:
        images = pictures_of(list(messages)) or None
    if (image is None) == (images is None):
        raise InputError(_choice(values, fields.image, "images"))
    if images is not None and (not isinstance(images, list | tuple | np.ndarray) or len(images) == 0):
        raise InputError(f"images is {_short(images)}, expected a list of at least one")
    pictures = tuple(_image(each, base) for each in ([image] if images is None else images))
    if (prompt is None) == (messages is None):
        raise InputError(_choice(values, fields.prompt, "messages"))
    if messages is not None:
        if not isinstance(messages, list | tuple | np.ndarray):
            raise InputError(f"messages is {_short(messages)}, expected a list of messages")
        prompt = prompt_of(list(messages))
    if not isinstance(prompt, str | Chat):
        raise InputError(f"{fields.prompt} is {_short(prompt)}, expected text")
    if isinstance(prompt, Chat) and prompt.n_pictures != len(pictures):
        raise InputError(
            f"messages holds {prompt.n_pictures} image parts for {len(pictures)} images, expected one each, in their order"
        )
    return Row(number, id, place, pictures, prompt, _response(values, fields))


def read_image(image: bytes | str, storage_options: Mapping[str, Any] | None = None) -> bytes:
    """The encoded bytes of an image. Raises `ImageError`."""
    if isinstance(image, bytes):
        return image
    try:
        with fsspec.open(image, "rb", **_options(image, storage_options)) as file:
            return file.read()
    except Exception as error:  # each store has errors of its own
        raise ImageError(f"image {image[:200]!r} cannot be read: {_reason(error)}") from error


def _image(value: Any, base: str) -> bytes | str:
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
    if value.startswith("file://"):  # as parts of messages name files
        value = unquote(urlsplit(value).path)
    if value.startswith("data:"):
        head, comma, body = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InputError(f"the image is {_short(value)}, expected data:image/png;base64,... or a path")
        return _decode(body)
    if "://" in value or value.startswith("/") or not base:
        return value
    return f"{base}/{value}"


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


def _json_rows(name: str, file: BinaryIO, row: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every line from here on with the bytes before it; `row` is the number of the first."""
    offset = file.tell()
    for line in file:
        if not line.strip():
            if file.read().strip():
                raise DatasetError(f"{_place(name, row)} is empty, expected a JSON object on every line")
            return
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{_place(name, row)} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DatasetError(f"{_place(name, row)} is a {type(values).__name__}, expected a JSON object")
        yield offset, values
        offset += len(line)
        row += 1


def _parquet_ids(file: BinaryIO, field: str) -> Iterator[tuple[int, Any]]:
    table = pq.ParquetFile(file)
    if field not in table.schema_arrow.names:
        raise DatasetError(f"there is no column {field!r} in it, but {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[field]):
        for id in batch.column(0).to_pylist():
            yield 0, id


def _parquet_rows(file: BinaryIO, start: int, stop: int, fields: Fields) -> Iterator[Mapping[str, Any]]:
    table = pq.ParquetFile(file)
    wanted = {fields.id, fields.image, "images", fields.prompt, "messages", fields.response, "response_ids"}
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
            yield from batch.slice(max(0, -position)).to_pylist()
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
                # what editors put around a text: a mark of its encoding, and the end of the last line
                values[part.removesuffix(".txt")] = data.decode("utf-8-sig", "replace").rstrip("\r\n")
        if pictures:
            values |= {"images": [pictures[part] for part in sorted(pictures)], fields.image: None}
        yield {**values, fields.id: key}


def _json_part(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the json of the sample cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"the json of the sample is a {type(values).__name__}, expected an object")
    return values


def _read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _key(path: str) -> tuple[str, str]:
    folder, slash, name = path.rpartition("/")
    key, _, part = name.partition(".")
    return folder + slash + key, part


def _shards_of_index(name: str, data: bytes) -> list[str]:
    try:
        shards = [each["url"] for each in json.loads(data)["shardlist"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{name!r} is no index of WebDataset shards, expected {{'shardlist': [{{'url': ...}}]}}"
        ) from error
    return [url if "://" in url or url.startswith("/") else f"{_folder(name)}/{url}" for url in shards]


# --- files -----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: str, storage_options: Mapping[str, Any] | None) -> Iterator[tuple[BinaryIO, int]]:
    with _reading(path):
        system, inside = url_to_fs(path, **_options(path, storage_options))
        with system.open(inside, "rb") as file:
            n_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield file, n_bytes


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
