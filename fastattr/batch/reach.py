"""Which files the rows of a data set may name. Anybody may have written a row, so it gets at no more than its data set.

A row may name a regular file in the folder of the file it stands in, a URL of the same store, and what the operator
allows by prefix. It can chain no file systems, leave no folder by `..` or a symbolic link, and open no device or pipe.
Options that hold credentials go to the store they were given for and to no other.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urljoin, urlsplit

from fsspec.core import url_to_fs

from fastattr.errors import ImageError, InputError

MAX_ROW_BYTES = 1 << 28  # of all pictures that one row names, as they are encoded
MAX_READ_S = 120.0  # for one URL
_CHUNK_BYTES = 1 << 20
_LOCAL = ("file", "local")
_WEB = ("http", "https")
# whose host all parsers of URLs read alike
_PLAIN_URL = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9_.:@\[\]~-]*(?:[/?#][^\x00-\x1f\x7f]*)?", re.ASCII | re.IGNORECASE)

AllowUrls = Collection[str] | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Reach:
    """What the rows of one input file may read; see `reach_of`.

    Attributes:
        folder: of the file, a path or a URL; None where rows have none.
        options: for fsspec, of the store the folder is in.
        allowed: further URLs by their beginnings, and options for fsspec for each.
    """

    folder: str | None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    allowed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _web: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # file systems by origin


def reach_of(folder: str | None, options: Mapping[str, Any] | None = None, allow_urls: AllowUrls = ()) -> Reach:
    """What rows may read, as the operator says.

    Args:
        allow_urls: beginnings of URLs, such as `https://images.example.org/`, `s3://bucket/pictures/` or
            `file:///data/pictures/`; a mapping gives each its options for fsspec.

    Raises:
        InputError: one of them is no URL of a host or a local folder.
    """
    if isinstance(allow_urls, str):
        raise InputError(f"allow_urls is the text {allow_urls!r}, expected a list of URLs")
    allowed = dict(allow_urls) if isinstance(allow_urls, Mapping) else {url: {} for url in allow_urls}
    for url in allowed:
        parts = urlsplit(url) if isinstance(url, str) and "::" not in url else None
        named = parts is not None and parts.scheme and "://" in url
        if parts is None or not named or not (parts.path.startswith("/") if _is_local(url) else parts.netloc):
            raise InputError(
                f"allow_urls holds {url!r}, expected the beginning of a URL with its host, such as "
                "https://images.example.org/ or s3://bucket/, or a folder such as file:///data/pictures/"
            )
    return Reach(folder, dict(options or {}), allowed)


def locate(name: str, reach: Reach) -> str:
    """The path or URL that a row means by `name`. Nothing is opened.

    Raises:
        ImageError: a row may not name it.
    """
    if "\0" in name or "::" in name:
        raise _refusal(name, "it is no single path or URL")
    if _is_local(name):
        parts = urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise _refusal(name, "it names a host")
        name = unquote(parts.path)
    elif "://" in name:
        if _options_for(name, reach) is None:
            raise _refusal(name, "its host is not that of the data set")
        return name
    if not name.startswith("/"):
        if not reach.folder:
            raise _refusal(name, "rows have no folder here")
        if _climbs(name):
            raise _refusal(name, "it holds '..'")
        name = f"{reach.folder}/{name}"
    if "://" not in name or _is_local(name):
        _resolve(name, reach)
    return name


def read(address: str, reach: Reach, most_bytes: int = MAX_ROW_BYTES) -> bytes:
    """The content of what `locate` returned.

    Raises:
        ImageError: it cannot be read, a row may not name it, it is no regular file, larger than `most_bytes`, or takes
            longer than `MAX_READ_S`.
    """
    try:
        if "://" not in address or _is_local(address):
            with open_regular(_resolve(address, reach)) as file:
                data = file.read(most_bytes + 1)
        else:
            data = _within(MAX_READ_S, lambda: _download(address, reach, most_bytes + 1))
    except ImageError:
        raise
    except Exception as error:  # each store has errors of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ImageError(f"image {address[:200]!r} cannot be read: {reason}") from error
    if len(data) > most_bytes:
        raise ImageError(
            f"image {address[:200]!r} is larger than {most_bytes} bytes, with which the pictures of a row are more than "
            f"{MAX_ROW_BYTES >> 20} MiB; make them smaller"
        )
    return data


def open_regular(path: str) -> BinaryIO:
    """Open a local file for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path!r} is no regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def local_path(url: str) -> str | None:
    """The path of what is local, else None."""
    if "::" in url:
        return None
    return unquote(urlsplit(url).path) if _is_local(url) else None if "://" in url else url


def _is_local(url: str) -> bool:
    scheme, mark, _ = url.partition("://")
    return bool(mark) and scheme.lower() in _LOCAL


def _resolve(path: str, reach: Reach) -> str:
    """A local path without symbolic links. Raises `ImageError` where it is in none of the folders of `reach`."""
    path = cast(str, local_path(path))
    roots = [local_path(each) for each in (reach.folder or "", *reach.allowed) if each]
    try:
        real = os.path.realpath(path)
        inside = any(
            os.path.commonpath([real, os.path.realpath(root)]) == os.path.realpath(root) for root in roots if root
        )
    except (OSError, ValueError) as error:
        raise ImageError(f"image {path[:200]!r} cannot be a path: {error}") from error
    if not inside:
        raise _refusal(path, "it is not in the folder of the data set")
    return real


def _options_for(url: str, reach: Reach) -> Mapping[str, Any] | None:
    """The options to read a URL with; None where rows may not name it."""
    if _climbs(urlsplit(url).path):
        return None
    if reach.folder and url.startswith(f"{reach.folder}/"):
        return reach.options
    if not _PLAIN_URL.fullmatch(url):
        return None
    if reach.folder and "::" not in reach.folder and _is_below(url, _origin(reach.folder)):
        return reach.options
    matches = [prefix for prefix in reach.allowed if not _is_local(prefix) and _is_below(url, prefix)]
    return reach.allowed[max(matches, key=len)] if matches else None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _is_below(url: str, prefix: str) -> bool:
    named, allowed = urlsplit(url), urlsplit(prefix)
    if not allowed.scheme or (named.scheme, named.netloc.lower()) != (allowed.scheme, allowed.netloc.lower()):
        return False
    path = allowed.path.rstrip("/")
    return named.path == path or named.path.startswith(f"{path}/")


def _climbs(path: str) -> bool:
    for _ in range(3):  # `%252e` is `.` to who decodes twice
        if ".." in path.replace("\\", "/").split("/"):
            return True
        path = unquote(path)
    return False


def _download(url: str, reach: Reach, most_bytes: int) -> bytes:
    options = _options_for(url, reach)
    if options is None:
        raise _refusal(url, "its host is not that of the data set")
    until_s = time.monotonic() + MAX_READ_S
    chunks: list[bytes] = []
    n_bytes = 0
    if urlsplit(url).scheme in _WEB:
        opened = _web_system(url, reach, options).open(url, "rb", block_size=0, size=1)  # as a stream, asked for once
    else:
        system, inside = url_to_fs(url, **options)
        opened = system.open(inside, "rb")
    with closing(opened) as file:
        while n_bytes < most_bytes and time.monotonic() < until_s:
            chunk = file.read(min(_CHUNK_BYTES, most_bytes - n_bytes))
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
            n_bytes += len(chunk)
    if n_bytes < most_bytes:
        raise ImageError(f"image {url[:200]!r} takes longer than {MAX_READ_S:.0f} s to read")
    return b"".join(chunks)


def _web_system(url: str, reach: Reach, options: Mapping[str, Any]) -> Any:
    """A file system that is redirected only to where rows may go; with credentials, only within the same origin."""
    origin = _origin(url)
    if origin in reach._web:
        return reach._web[origin]
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    async def check(session: Any, context: Any, params: Any) -> None:
        headers = params.response.headers
        target = urljoin(str(params.url), headers.get("Location") or headers.get("URI") or "")
        may = _is_below(target, origin) if options else _options_for(target, reach) == {}
        if not may:
            raise _refusal(target, f"{url[:200]!r} redirects to it")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check)
    given = options.get("client_kwargs") or {}
    client = {"timeout": aiohttp.ClientTimeout(total=MAX_READ_S), **given}
    client["trace_configs"] = [*given.get("trace_configs", ()), trace]
    system = HTTPFileSystem(**{**options, "client_kwargs": client, "skip_instance_cache": True})
    reach._web[origin] = system
    return system


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """What `read` returns or raises; `ImageError` where it takes longer. Its thread is left to end by itself."""
    results: SimpleQueue[bytes | Exception] = SimpleQueue()

    def work() -> None:
        try:
            results.put(read())
        except Exception as error:
            results.put(error)

    threading.Thread(target=work, name="fastattr-read", daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except Empty:
        raise ImageError(f"an image takes longer than {seconds:.0f} s to read") from None
    if isinstance(result, Exception):
        raise result
    return result


def _refusal(name: str, reason: str) -> ImageError:
    shown = name if len(name) <= 200 else f"{name[:197]}..."
    return ImageError(
        f"a row names {shown!r}, which is not read: {reason}. Rows may name files in the folder of their data set; allow "
        "others by the beginning of their URL with allow_urls or --allow-url, such as https://images.example.org/ or "
        "file:///data/pictures/"
    )
