"""Geometry of the dashboard's drawings: numbers in, coordinates out; the templates make SVG of them.

Coordinates are in a box of `WIDTH` x `HEIGHT` that the page stretches, so nothing in it may be round or hold text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise

from fastattr.errors import InputError
from fastattr.log import reading
from fastattr.log.drift import ControlLimits, calibrate_limits

WIDTH, HEIGHT = 1000.0, 100.0
BARS, FEWEST_BARS = 48, 12  # of a sparkline: so many at most, and room for so many at least
CLIP_NATS = 8.0  # evidence beyond is drawn as this
CALIBRATED_ON = 200  # responses: the first of a model version

_BINS = 72  # at most so many, as few as half
_LABELS = 4
_MINUTE, _HOUR, _DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
_WIDTHS = (
    *(n * _MINUTE for n in (1, 2, 5, 10, 20, 30)),
    *(n * _HOUR for n in (1, 2, 3, 6, 12)),
    *(n * _DAY for n in (1, 2, 7, 14, 28)),
)


def kind(evidence: float | None) -> str:
    """What the report calls it: the picture makes a token at least twice as likely, or half, or neither."""
    if evidence is None or math.isnan(evidence):
        return "unknown"
    return "seen" if evidence >= math.log(2) else "against" if evidence <= -math.log(2) else "even"


# --- sparklines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A rectangle; `y` grows downwards."""

    x: float
    y: float
    width: float
    height: float
    kind: str


def sparkline(evidence: Sequence[float | None]) -> tuple[Bar, ...]:
    """Evidence along a response: a bar a token, or where there are many, the lowest of each few. Empty without any."""
    if not any(value is not None and math.isfinite(value) for value in evidence):
        return ()
    n = min(BARS, len(evidence))
    pitch = WIDTH / max(n, FEWEST_BARS)
    edges = [round(i * len(evidence) / n) for i in range(n + 1)]
    bars = []
    for i, (begin, end) in enumerate(pairwise(edges)):
        known = [value for value in evidence[begin:end] if value is not None and math.isfinite(value)]
        if known:
            lowest = min(known)
            size = max(min(abs(lowest), CLIP_NATS) / CLIP_NATS * HEIGHT / 2, 3.0)
            top = HEIGHT / 2 - (size if lowest >= 0 else 0)
            bars.append(Bar(round(i * pitch, 1), round(top, 1), round(0.8 * pitch, 1), round(size, 1), kind(lowest)))
    return tuple(bars)


# --- trends ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One stretch of time in a chart.

    Attributes:
        x, width: its column.
        y: of the value; None where there is none.
        band: top and bottom of the control limits, or None.
        outside: the value lies beyond the limits.
        title: what pointing at it tells.
    """

    x: float
    width: float
    y: float | None
    title: str
    band: tuple[float, float] | None = None
    outside: bool = False

    @property
    def middle(self) -> float:
        return round(self.x + self.width / 2, 2)


@dataclass(frozen=True)
class Chart:
    """A line of means over time.

    Attributes:
        ticks: labels from top to bottom, at equal distances.
        times: labels at the left end of each quarter.
        line: an SVG path through neighbouring values.
        center: y of the centre line, or None.
        n_outside: how many values lie beyond the limits.
    """

    name: str
    unit: str
    slots: tuple[Slot, ...]
    ticks: tuple[str, ...]
    times: tuple[str, ...]
    line: str = ""
    center: float | None = None
    n_outside: int = 0
    mean: float | None = None
    limits: ControlLimits | None = None


@dataclass(frozen=True)
class Trends:
    """All charts of a page; `note` says where the limits come from, or why there are none."""

    charts: tuple[Chart, ...]
    counts: Chart
    errors: tuple[Bar, ...]
    note: str
    n: int
    n_errors: int
    width: str


def trends(log: reading.Log, filters: reading.Filters, model: str) -> Trends | None:
    """Draw what `filters` leave; limits are those of `model`'s newest version, none if it is empty. None without records.

    Raises:
        SaveError: the log cannot be read.
    """
    span = reading.time_span(log, filters)
    if span is None:
        return None
    width = _bin_width(span[1] - span[0])
    bins = reading.trend(log, filters, width)
    limits, note = _limits(log, model)
    counts, errors = _counts(bins, width)
    return Trends(
        charts=(
            _line(
                "Evidence", "nats", bins, width, lambda b: b.evidence, lambda b: b.n_evidence, limits.get("evidence")
            ),
            _line("Image share", "", bins, width, lambda b: b.image_share, lambda b: b.n, limits.get("image_share")),
        ),
        counts=counts,
        errors=errors,
        note=note,
        n=sum(b.n for b in bins),
        n_errors=sum(b.errors for b in bins),
        width=_duration(width),
    )


def _limits(log: reading.Log, model: str) -> tuple[dict[str, ControlLimits], str]:
    if not model:
        return {}, "Control limits belong to one model: choose one to see them."
    first = reading.baseline(log, model, CALIBRATED_ON)
    found, missing = {}, []
    for name, values in (("evidence", first.evidence), ("image_share", first.image_share)):
        try:
            found[name] = calibrate_limits(values, 1)
        except InputError:  # too few responses, or all alike
            missing.append(name.replace("_", " "))
    version = f"{model}, revision {first.revision}" if first.revision else model
    note = f"from the first {first.n} responses of {version}; a mean of n responses lies within them 99.7 % of the time"
    if not found:
        return {}, f"No control limits yet: {first.n} responses of {version} are too few, or too much alike."
    return found, f"Centre and limits {note}." + (f" None for {', '.join(missing)} yet." if missing else "")


def _bin_width(span: timedelta) -> timedelta:
    for width in _WIDTHS:
        if span <= _BINS * width:
            return width
    return math.ceil(span / _BINS / _DAY) * _DAY


def _line(
    name: str,
    unit: str,
    bins: Sequence[reading.Bin],
    width: timedelta,
    value_of: Callable[[reading.Bin], float | None],
    count_of: Callable[[reading.Bin], int],
    limits: ControlLimits | None,
) -> Chart:
    values = [value_of(b) for b in bins]
    known = [value for value in values if value is not None]
    weights = [count_of(b) for b in bins]
    own = [replace(limits, window=n) if limits and n else None for n in weights]  # few responses: wide limits
    typical = replace(limits, window=max(sorted(weights)[len(weights) // 2], 1)) if limits else None
    shown = [*known, *([typical.lower, typical.upper] if typical else [])] or [0.0]
    ticks, digits = _ticks(min(shown), max(shown))
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return round(HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low)), 2)

    slots, path = [], []
    before: int | None = None
    for b, value, limit, n, (place, x, w) in zip(bins, values, own, weights, _columns(bins, width), strict=True):
        title = f"{_clock(b.start)} UTC, {_duration(width)}: {n} response{'' if n == 1 else 's'}"
        if value is not None:
            title += f", mean {value:.3f}{' ' + unit if unit else ''}"
        outside = False
        if limit is not None and value is not None:
            outside = not limit.lower <= value <= limit.upper
            title += f", limits {limit.lower:.3f} to {limit.upper:.3f}" + (", outside" if outside else "")
        band = None if limit is None else (y(limit.upper), y(limit.lower))
        slot = Slot(x, w, None if value is None else y(value), title, band, outside)
        if slot.y is not None:
            path.append(f"{'L' if before == place - 1 else 'M'}{slot.middle} {slot.y}")
            before = place
        slots.append(slot)
    total = sum(weights)
    return Chart(
        name=name,
        unit=unit,
        slots=tuple(slots),
        ticks=tuple(f"{tick:.{digits}f}".replace("-", "\N{MINUS SIGN}") for tick in reversed(ticks)),
        times=_times(bins, width),
        line=" ".join(path),
        center=y(limits.center) if limits else None,
        n_outside=sum(slot.outside for slot in slots),
        mean=sum(v * n for v, n in zip(values, weights, strict=True) if v is not None) / total if known else None,
        limits=limits,
    )


def _counts(bins: Sequence[reading.Bin], width: timedelta) -> tuple[Chart, tuple[Bar, ...]]:
    ticks, _ = _ticks(0, max(b.n for b in bins), whole=True)
    high = ticks[-1]
    slots, errors = [], []
    for b, (_, x, w) in zip(bins, _columns(bins, width), strict=True):
        title = f"{_clock(b.start)} UTC, {_duration(width)}: {b.n} response{'' if b.n == 1 else 's'}"
        title += f", {b.errors} of them errors" if b.errors else ""
        slots.append(Slot(x, w, round(HEIGHT * (1 - b.n / high), 2), title))
        if b.errors:
            size = round(HEIGHT * b.errors / high, 2)
            errors.append(Bar(x, round(HEIGHT - size, 2), w, size, "against"))
    chart = Chart("Responses", "", tuple(slots), tuple(f"{t:.0f}" for t in reversed(ticks)), _times(bins, width))
    return chart, tuple(errors)


def _columns(bins: Sequence[reading.Bin], width: timedelta) -> list[tuple[int, float, float]]:
    """For each bin its place counted in widths, and its left end and width in the drawing."""
    n = _n_slots(bins, width)
    places = [(b.start - bins[0].start) // width for b in bins]
    return [(place, round(place * WIDTH / n, 2), round(WIDTH / n, 2)) for place in places]


def _n_slots(bins: Sequence[reading.Bin], width: timedelta) -> int:
    """A lone bin stands in the middle of nothing: a few slots at least."""
    return max((bins[-1].start - bins[0].start) // width + 1, _LABELS)


def _times(bins: Sequence[reading.Bin], width: timedelta) -> tuple[str, ...]:
    span = _n_slots(bins, width) * width
    starts = [bins[0].start + i * span / _LABELS for i in range(_LABELS)]
    return tuple(f"{at.day} {at:%b}" if span > 20 * _DAY else f"{at.day} {at:%b %H:%M}" for at in starts)


def _ticks(low: float, high: float, *, whole: bool = False) -> tuple[list[float], int]:
    """Round numbers at equal distances around `low` to `high`, and how many decimals they need."""
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = (low, low + 1) if whole else (low - 0.5, high + 0.5)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def _clock(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"


def _duration(width: timedelta) -> str:
    for unit, name in ((_DAY, "day"), (_HOUR, "hour"), (_MINUTE, "minute")):
        if width >= unit:
            n = width // unit
            return f"{n} {name}" + ("" if n == 1 else "s")
    return f"{width.total_seconds():g} seconds"


# --- losses ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Sums over all writers, by reason, most first."""

    submitted: int
    written: int
    in_flight: int
    dropped: tuple[tuple[str, int], ...]
    failed: tuple[tuple[str, int], ...]


def losses(tallies: Sequence[reading.Tally]) -> Losses:
    dropped: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for tally in tallies:
        dropped.update(tally.dropped)
        failed.update(tally.failed)
    return Losses(
        submitted=sum(t.submitted for t in tallies),
        written=sum(t.written for t in tallies),
        in_flight=sum(t.in_flight for t in tallies),
        dropped=tuple(dropped.most_common()),
        failed=tuple(failed.most_common()),
    )
