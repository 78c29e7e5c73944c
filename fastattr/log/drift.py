"""Do the explanations of a model still look as they did? Control limits for means of a few signals, and alerts.

A Shewhart chart: the mean of every `window` responses is compared with limits that the first responses of the same
model version set. Feed it a fair sample of responses: one that favours low evidence or errors drifts by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastattr.errors import InputError
from fastattr.log.counting import Complaints
from fastattr.storage import whole_file

MIN_VALUES = 20
MIN_DIFFERENT = 5
LIMIT_SIGMAS = 3.0
_ROUNDING = 1e-9
_MOST_ROUNDS = 20  # of learning that are remembered, so that memory is bounded


class Stream(NamedTuple):
    """What has limits of its own: one signal of one version of one model."""

    model: str
    model_revision: str
    signal: str


@dataclass(frozen=True)
class ControlLimits:
    """Where the mean of `window` responses lies when nothing has changed.

    Attributes:
        center: mean of the values.
        sigma: standard deviation of single values, above 0.
        n: how many values these were taken from.
        window: how many responses are averaged before they are compared.
        correlation: of one value with the next, in [0, 1); 0 where it is not above chance. Means of values that hang
            together vary more.

    Raises:
        InputError: a field is out of range.
    """

    center: float
    sigma: float
    n: int
    window: int
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if not _is_number(self.center):
            raise InputError(f"center is {self.center!r}, expected a finite number")
        if not _is_number(self.sigma) or self.sigma <= 0:
            raise InputError(f"sigma is {self.sigma!r}, expected a number above 0")
        if not _is_count(self.n, MIN_VALUES):
            raise InputError(f"n is {self.n!r}, expected a whole number of at least {MIN_VALUES}")
        if not _is_count(self.window, 1):
            raise InputError(f"window is {self.window!r}, expected a whole number of at least 1")
        if not _is_number(self.correlation) or not 0 <= self.correlation < 1:
            raise InputError(f"correlation is {self.correlation!r}, expected a number in [0, 1)")

    @property
    def spread(self) -> float:
        """Standard deviation of `mean of a window - center`: of the window's mean, and of the center, an estimate too."""
        together = (1 + self.correlation) / (1 - self.correlation)
        return self.sigma * math.sqrt(together * (1 / self.window + 1 / self.n))

    @property
    def lower(self) -> float:
        return self.center - LIMIT_SIGMAS * self.spread

    @property
    def upper(self) -> float:
        return self.center + LIMIT_SIGMAS * self.spread

    def sigmas(self, mean: float) -> float:
        """How far the mean of a window is from the center, in standard deviations of such means."""
        return (mean - self.center) / self.spread


def calibrate_limits(values: ArrayLike, window: int) -> ControlLimits:
    """Limits from responses of a time when all was well, in their order.

    Mean and standard deviation, not median and MAD: what is compared are means, and of a skewed signal they do not lie
    around the median. Most responses have no low evidence at all, so that median and MAD are both 0. An outlier among
    the values makes the limits wide, so it hides drift and raises no false alarm. Neighbours that are alike make means
    vary more; their correlation, where it is above chance, widens the limits as for an autoregressive process.
    Of a signal that is nearly always the same, five values must differ: fewer tell nothing of how often that happens.

    Args:
        values: `[response]`; ones that are not finite are left out.
        window: how many responses will be averaged.

    Raises:
        InputError: fewer than 20 finite values, fewer than 5 that differ from the most common one, no spread beyond
            rounding, or `window` is no whole number of at least 1.
    """
    try:
        given = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"values are not numbers: {error}; expected one number a response") from error
    if given.ndim != 1:
        raise InputError(f"values have shape {given.shape}, expected [response]")
    kept = given[np.isfinite(given)]
    if len(kept) < MIN_VALUES:
        raise InputError(
            f"got {len(kept)} finite values and {len(given) - len(kept)} others, expected at least {MIN_VALUES} finite "
            "ones; calibrate on more responses"
        )
    different = len(kept) - int(np.unique(kept, return_counts=True)[1].max())
    if different < MIN_DIFFERENT:
        raise InputError(
            f"only {different} of {len(kept)} values differ from the most common one, expected at least {MIN_DIFFERENT}; "
            "calibrate on more responses"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        center, sigma = float(kept.mean()), float(kept.std(ddof=1))
    if not math.isfinite(sigma) or sigma <= _ROUNDING * abs(center):
        raise InputError(
            f"{len(kept)} values around {center:g} have a standard deviation of {sigma:g}, expected a finite one above "
            "rounding; calibrate on values that vary"
        )
    away = kept - center
    correlation = float((away[1:] * away[:-1]).sum() / (away**2).sum())
    by_chance = 2 / math.sqrt(len(kept))
    return ControlLimits(center, sigma, len(kept), window, min(correlation, 0.99) if correlation > by_chance else 0.0)


@dataclass(frozen=True)
class Alert:
    """A signal has left its limits, or is back.

    Attributes:
        state: `entered` when it begins, `left` when it is over.
        value: mean of the window that decided.
        sigmas: how far it is from the center, see `ControlLimits.sigmas`.
        time: UTC, when it was decided.
    """

    stream: Stream
    state: Literal["entered", "left"]
    value: float
    sigmas: float
    limits: ControlLimits
    time: datetime


@dataclass
class _Course:
    """What is known of one stream: values to learn from, or limits and the sum of the window under way."""

    limits: ControlLimits | None
    values: list[float] = field(default_factory=list)
    total: float = 0.0
    count: int = 0
    alarm: bool = False
    calm: int = 0


class DriftMonitor:
    """Compares windows of responses with limits, and calls `on_alert` once when a signal leaves them and once when it is back.

    At 3 standard deviations one window in 370 is outside by chance, in each signal: with six signals and windows of 100
    about one alert in 6,000 responses. A shift of one standard deviation of single responses is 9 of those of a window
    of 100, so the first whole window after it finds it. Signals that are rare need a window that holds about five.

    Not for several threads at once: a logger calls it from its one worker. Each process learns and alerts by itself.

    Args:
        limits: known ones; a stream without is learned from its first `learn` responses, or a multiple
            of that until enough of them differ.
        on_alert: called with an `Alert`. Its exceptions are counted and logged, at most once a minute.
        learn: responses to learn from, at least 20.
        window: responses to a window, for limits that are learned here; given limits have their own.
        enter: standard deviations at which an alert begins.
        leave: standard deviations within which `patience` windows in a row end it.

    Attributes:
        ignored: values that were not finite.
        hook_failures: exceptions of `on_alert`.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        limits: Mapping[Stream, ControlLimits] | None = None,
        *,
        on_alert: Callable[[Alert], object],
        learn: int = 500,
        window: int = 100,
        enter: float = LIMIT_SIGMAS,
        leave: float = 1.5,
        patience: int = 3,
    ) -> None:
        if not callable(on_alert):
            raise InputError(f"on_alert is a {type(on_alert).__name__}, expected a function of an Alert")
        for name, value, least in (("learn", learn, MIN_VALUES), ("window", window, 1), ("patience", patience, 1)):
            if not _is_count(value, least):
                raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")
        if not _is_number(enter) or not _is_number(leave) or not 0 < leave <= enter:
            raise InputError(f"enter is {enter!r} and leave is {leave!r}, expected 0 < leave <= enter")
        self.ignored = 0
        self.hook_failures = 0
        self._on_alert = on_alert
        self._learn, self._window, self._patience = learn, window, patience
        self._enter, self._leave = enter, leave
        self._courses = {Stream(*stream): _Course(known) for stream, known in (limits or {}).items()}
        self._complaints = Complaints()

    def observe(self, model: str, model_revision: str | None, signals: Mapping[str, float]) -> None:
        """Take in one response."""
        for signal, value in signals.items():
            if not math.isfinite(value):
                self.ignored += 1
                continue
            stream = Stream(model, model_revision or "", signal)
            course = self._courses.setdefault(stream, _Course(None))
            if course.limits is None:
                course.values.append(float(value))
                self._learn_limits(course)
                continue
            course.total += float(value)
            course.count += 1
            if course.count == course.limits.window:
                self._judge(stream, course, course.limits)

    @property
    def limits(self) -> dict[Stream, ControlLimits]:
        """The limits in use, given or learned; `write_limits` keeps them for the next start."""
        return {stream: course.limits for stream, course in self._courses.items() if course.limits is not None}

    @property
    def alarms(self) -> tuple[Stream, ...]:
        """What is outside of its limits now."""
        return tuple(stream for stream, course in self._courses.items() if course.alarm)

    def _learn_limits(self, course: _Course) -> None:
        if len(course.values) % self._learn:
            return
        try:
            course.limits = calibrate_limits(course.values, self._window)
            course.values.clear()
        except InputError:  # too much alike so far, such as hardly any low evidence: wait for as many again
            if len(course.values) >= _MOST_ROUNDS * self._learn:
                del course.values[: self._learn]

    def _judge(self, stream: Stream, course: _Course, limits: ControlLimits) -> None:
        mean = course.total / course.count
        course.total, course.count = 0.0, 0
        sigmas = limits.sigmas(mean)
        course.calm = course.calm + 1 if abs(sigmas) <= self._leave else 0
        if not course.alarm and abs(sigmas) > self._enter:
            course.alarm = True
            self._tell(Alert(stream, "entered", mean, sigmas, limits, datetime.now(timezone.utc)))
        elif course.alarm and course.calm >= self._patience:
            course.alarm = False
            self._tell(Alert(stream, "left", mean, sigmas, limits, datetime.now(timezone.utc)))

    def _tell(self, alert: Alert) -> None:
        try:
            self._on_alert(alert)
        except Exception as error:
            self.hook_failures += 1
            self._complaints.say("on_alert", "on_alert failed: %r on %s", error, alert)


def write_limits(limits: Mapping[Stream, ControlLimits], path: str | Path) -> Path:
    """Write limits as JSON, whole or not at all.

    Raises:
        SaveError: the file cannot be written; nothing is left behind.
    """
    rows = [{**Stream(*stream)._asdict(), **asdict(each)} for stream, each in limits.items()]
    with whole_file(path) as file:
        file.write((json.dumps(rows, indent=2) + "\n").encode())
    return Path(path)


def read_limits(path: str | Path) -> dict[Stream, ControlLimits]:
    """Read what `write_limits` wrote.

    Raises:
        InputError: the file cannot be read, is no JSON, or does not hold exactly the fields of limits.
    """
    expected = {*Stream._fields, *(each.name for each in fields(ControlLimits))}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise InputError(f"it holds a {type(rows).__name__}, expected a list")
        limits: dict[Stream, ControlLimits] = {}
        for row in rows:
            if not isinstance(row, dict) or set(row) != expected:
                held = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
                raise InputError(f"an entry holds {held or 'nothing'}, expected {', '.join(sorted(expected))}")
            stream = Stream(*(row.pop(name) for name in Stream._fields))
            if not all(isinstance(name, str) for name in stream):
                raise InputError(f"{stream} does not name a model, a revision and a signal, expected three texts")
            limits[stream] = ControlLimits(**row)
        return limits
    except (OSError, ValueError, RecursionError) as error:  # InputError, JSON and UTF-8 errors are ValueErrors
        raise InputError(
            f"{str(path)!r} cannot be read as control limits: {error}; take it away to learn them again"
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
