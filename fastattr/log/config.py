"""Every option of logging, from keywords or from one mapping, checked before anything runs."""

from __future__ import annotations

import hashlib
import math
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

from fastattr.config import AnyConfig, configure, refuse_compat
from fastattr.errors import InputError
from fastattr.log.record import Content
from fastattr.types import AttributionConfig

Images = Literal["none", "hash", "store"]

_CALLBACKS = ("redact", "on_record", "on_alert")
_RATES = ("sample_rate", "error_rate", "long_rate", "low_evidence_rate", "screen_rate")
_COUNTS = ("long_tokens", "queue_bytes", "capture_bytes", "spool_bytes", "segment_bytes")
_TIMES = ("segment_age_s", "sync_s", "exit_timeout_s")


@dataclass(frozen=True)
class LogConfig:
    """What is logged, where to, and within which bounds.

    A response is kept with the highest rate that applies to it, decided by a hash of its request id: the same id is
    kept or not kept everywhere, and a higher rate keeps all that a lower one does.

    Attributes:
        destination: a local directory or an fsspec URL such as `s3://bucket/attr`.
        spool: local directory for what is not published yet; `destination/spool` where that is local, else
            a folder of its own under `~/.local/state/fastattr`.
        storage_options: for fsspec; never written to disk.
        sample_rate: share of all responses that is kept.
        error_rate: of those submitted with `error=True`.
        long_rate: of those with at least `long_tokens` response tokens.
        low_evidence_rate: of those explained that hold words of low evidence.
        screen_rate: share that is explained only to look for low evidence, and dropped where there is none.
        explain: in a `thread` of this process, or later in a `worker` process (`fastattr worker SPOOL`).
        attribution: how responses are explained: an `AttributionConfig`, the name of one (`"arc@1"`, `"best"`), or a
            mapping of options such as `{"method": "best", "evidence": False}`. Captured states are explained in the same
            way, but at the one scale the model saw, from the last layer and without `regions`, which needs no forward.
        model_revision: kept in each record, and what drift is measured within.
        content: `ids` keeps the response's token ids, `text` also texts of prompt and response, `none` neither.
        images: keep a SHA-256 of each (`hash`), also the pictures (`store`), or nothing (`none`).
        queue_bytes: what waits in memory; what does not fit is dropped and counted.
        capture_bytes: pages for captured states, see `fastattr.StateBuffer`.
        capture_to: where the pages are: on the `model`'s device, in `cpu` memory, or there and `pinned`.
        spool_bytes: what waits on disk for publication; beyond it submissions are dropped and counted.
        segment_bytes, segment_age_s: a segment is published when its spool file is this large or this old.
        sync_s: records are durable at most this long after they are explained.
        retention_days: whole days older than this are deleted from the destination; None keeps everything.
        exit_timeout_s: how long the end of the interpreter may wait.
        telemetry: OpenTelemetry events and metrics, where its API is installed and configured.
        drift_limits: a JSON file for the limits that `on_alert` goes by, learned from the first 500 responses of a model
            version and kept there for the next start; None learns them anew in every process.
        redact: called with a `Submission`, which see, before anything is queued; returns what may be queued, or None for nothing. An
            exception drops the submission.
        on_record: called with a `Logged` when a record is durable, on the logger's thread.
        on_alert: called with an `Alert` when evidence or maps of a model drift out of their limits, and when they return.
    """

    destination: str
    spool: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    sample_rate: float = 0.01
    error_rate: float = 1.0
    long_rate: float = 1.0
    long_tokens: int = 1024
    low_evidence_rate: float = 1.0
    screen_rate: float = 0.0
    explain: Literal["thread", "worker"] = "thread"
    attribution: AnyConfig = "arc@1"
    model_revision: str | None = None
    content: Content = "ids"
    images: Images = "hash"
    queue_bytes: int = 256 * 2**20
    capture_bytes: int = 256 * 2**20
    capture_to: Literal["model", "cpu", "pinned"] = "model"
    spool_bytes: int = 2**30
    segment_bytes: int = 32 * 2**20
    segment_age_s: float = 300.0
    sync_s: float = 1.0
    retention_days: int | None = None
    exit_timeout_s: float = 5.0
    telemetry: bool = True
    drift_limits: str | None = None
    redact: Callable[[Any], Any] | None = None
    on_record: Callable[[Any], None] | None = None
    on_alert: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "destination", _absolute(str(self.destination)))
        if not self.destination.strip() or "\0" in self.destination:
            raise InputError(
                f"destination is {self.destination!r}, expected a directory or a URL such as s3://bucket/attr"
            )
        if self.spool is not None:
            object.__setattr__(self, "spool", _absolute(str(self.spool)))
            if "://" in str(self.spool):
                raise InputError(
                    f"spool is {self.spool!r}, expected a local directory: it must survive a crash at once"
                )
        if self.drift_limits is not None:
            object.__setattr__(self, "drift_limits", _absolute(str(self.drift_limits)))
        for name in _RATES:
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value <= 1.0:
                raise InputError(f"{name} is {value!r}, expected a share from 0 (none) to 1 (all)")
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
        for name in _TIMES:
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}, expected seconds of at least 0")
        days = self.retention_days
        if days is not None and (isinstance(days, bool) or not isinstance(days, int) or days < 1):
            raise InputError(f"retention_days is {days!r}, expected a whole number of at least 1, or None for ever")
        for name, allowed in (
            ("explain", ("thread", "worker")),
            ("capture_to", ("model", "cpu", "pinned")),
            ("content", get_args(Content)),
            ("images", get_args(Images)),
            ("telemetry", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(repr(value) for value in allowed)
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {known}")
        for name in _CALLBACKS:
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InputError(f"{name} is a {type(getattr(self, name)).__name__}, expected a function or None")
        if self.attribution is None:
            raise InputError("attribution is None, expected an AttributionConfig, a name such as 'arc@1', or a mapping")
        try:
            config = configure(self.attribution, default="arc@1")
            refuse_compat(config)
        except InputError as error:
            raise InputError(f"attribution is wrong: {error}") from error
        object.__setattr__(self, "attribution", config)
        if not isinstance(self.storage_options, Mapping):
            raise InputError(f"storage_options is a {type(self.storage_options).__name__}, expected a mapping")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> LogConfig:
        """The options under their own names, as a JSON or YAML file holds them.

        `attribution` is a name or a mapping too; callbacks are written `package.module:function`.

        Raises:
            InputError: an option is unknown, missing or out of range, or a callback cannot be imported.
        """
        if not isinstance(mapping, Mapping):
            raise InputError(f"got a {type(mapping).__name__}, expected a mapping of options")
        values = _known(mapping, cls, "option")
        if "destination" not in values:
            raise InputError("the mapping names no destination, expected a directory or a URL")
        for name in _CALLBACKS:
            if isinstance(values.get(name), str):
                values[name] = _resolve(name, values[name])
        return cls(**values)

    @property
    def explained_by(self) -> AttributionConfig:
        """`attribution` as an `AttributionConfig`."""
        return configure(self.attribution)

    @property
    def spool_path(self) -> Path:
        if self.spool is not None:
            return Path(self.spool)
        if "://" not in self.destination:
            return Path(self.destination) / "spool"
        name = hashlib.sha256(self.destination.encode()).hexdigest()[:16]
        return Path.home() / ".local" / "state" / "fastattr" / name


def _absolute(place: str) -> str:
    """A local path that stays the same when the process changes its directory; other URLs as they are."""
    if place.startswith("file://"):
        place = unquote(urlsplit(place).path)
    return place if "://" in place or not place.strip() or "\0" in place else os.path.abspath(place)


def make_config(destination: object, options: Mapping[str, Any]) -> LogConfig:
    """`LogConfig` from keywords, with unknown ones named. Raises `InputError`."""
    return LogConfig(**_known({**options, "destination": destination}, LogConfig, "option"))


def _known(mapping: Mapping[str, Any], kind: type, what: str) -> dict[str, Any]:
    names = [each.name for each in fields(kind)]
    unknown = [str(name) for name in mapping if name not in names]
    if unknown:
        raise InputError(f"unknown {what} {', '.join(unknown)}; known are {', '.join(names)}")
    return dict(mapping)


def _resolve(name: str, reference: str) -> Any:
    try:
        return pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{name} is {reference!r}, expected package.module:function: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
