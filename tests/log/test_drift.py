"""Alerts come as often as theory says, when something changed, and once."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.errors import InputError, SaveError
from fastattr.log.drift import (
    Alert,
    ControlLimits,
    DriftMonitor,
    Stream,
    calibrate_limits,
    read_limits,
    write_limits,
)

NORMAL = statistics.NormalDist()
STREAM = Stream("shapes", "v1", "evidence")
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(3.0, 2.0, n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.exponential(2.0, n)


def mostly_zero(rng: np.random.Generator, n: int) -> np.ndarray:
    """Like the share of low evidence: none in 9 of 10 responses."""
    return np.where(rng.random(n) < 0.1, rng.uniform(0.02, 0.2, n), 0.0)


def alike(rng: np.random.Generator, n: int) -> np.ndarray:
    """Neighbours resemble each other, correlation 0.5, variance 1."""
    values = rng.normal(0, math.sqrt(1 - 0.25), n)
    values[0] = rng.normal()
    for i in range(1, n):
        values[i] += 0.5 * values[i - 1]
    return values


def share_outside(
    draw: Draw,
    judge: Callable[[np.ndarray], tuple[float, float]],
    *,
    runs: int = 200,
    learn: int = 500,
    windows: int = 40,
    window: int = 100,
) -> float:
    """Share of windows outside of 3 sigma while nothing changes, over many calibrations; fixed seed."""
    outside = 0
    for seed in range(runs):
        values = draw(np.random.default_rng(seed), learn + windows * window)
        lower, upper = judge(values[:learn])
        means = values[learn:].reshape(windows, window).mean(axis=1)
        outside += int(((means < lower) | (means > upper)).sum())
    return outside / (runs * windows)


def ours(values: np.ndarray) -> tuple[float, float]:
    limits = calibrate_limits(values, 100)
    return limits.lower, limits.upper


def median_and_mad(values: np.ndarray) -> tuple[float, float]:
    center = float(np.median(values))
    reach = 3 * 1.4826 * float(np.median(np.abs(values - center))) * math.sqrt(1 / 100 + 1 / len(values))
    return center - reach, center + reach


def textbook(values: np.ndarray) -> tuple[float, float]:
    """The center taken as known, and responses as independent."""
    reach = 3 * float(values.std(ddof=1)) / math.sqrt(100)
    return float(values.mean()) - reach, float(values.mean()) + reach


def calm(alerts: Iterable[Alert]) -> list[str]:
    return [alert.state for alert in alerts]


def monitor(*, limits: ControlLimits | None = None, **options: object) -> tuple[DriftMonitor, list[Alert]]:
    alerts: list[Alert] = []
    known = {} if limits is None else {STREAM: limits}
    return DriftMonitor(known, on_alert=alerts.append, **options), alerts  # type: ignore[arg-type]


def feed(watch: DriftMonitor, values: Iterable[float]) -> None:
    for value in values:
        watch.observe("shapes", "v1", {"evidence": float(value)})


# --- limits ----------------------------------------------------------------------------------------------


def test_limits_by_hand() -> None:
    values = [1.0, 2.0, 3.0, 4.0] * 5 + [1.0, 4.0, 2.0, 3.0] * 5
    limits = calibrate_limits(values, 10)
    assert limits.center == 2.5
    assert limits.sigma == pytest.approx(statistics.stdev(values))
    assert (limits.n, limits.window, limits.correlation) == (40, 10, 0.0)  # they alternate, which makes means vary less
    spread = limits.sigma * math.sqrt(1 / 10 + 1 / 40)
    assert limits.upper == pytest.approx(2.5 + 3 * spread)
    assert limits.lower == pytest.approx(2.5 - 3 * spread)
    assert limits.sigmas(2.5 - 2 * spread) == pytest.approx(-2)


# 8,000 windows, 21.6 expected outside. A binomial count would vary by 4.6; windows of one run share an estimate, so more
EXPECTED = 2 * NORMAL.cdf(-3)


def test_false_alarms_are_as_rare_as_theory_says() -> None:
    found = share_outside(normal, ours)
    print(f"normal: {found:.3%} of windows outside, theory {EXPECTED:.3%}")
    assert 0.5 * EXPECTED < found < 2 * EXPECTED


def test_limits_that_take_the_center_as_known_would_alarm_more() -> None:
    expected = 2 * NORMAL.cdf(-3 / math.sqrt(1 + 100 / 500))  # the center's own error is in every window
    found = share_outside(normal, textbook)
    assert 0.7 * expected < found < 1.5 * expected
    assert found > 1.5 * share_outside(normal, ours)


@pytest.mark.parametrize("draw", [skewed, mostly_zero])
def test_skewed_signals_alarm_a_little_more_and_median_and_mad_would_always(draw: Draw) -> None:
    assert 0.5 * EXPECTED < share_outside(draw, ours) < 4 * EXPECTED
    assert share_outside(draw, median_and_mad, runs=20) > 0.5


def test_neighbours_that_are_alike_widen_the_limits() -> None:
    # the variance of a long mean is 3 times that of independent values with this correlation: 3 sigmas are 1.7
    expected = 2 * NORMAL.cdf(-3 / math.sqrt((1 + 0.5) / (1 - 0.5)))
    careless = share_outside(alike, lambda values: textbook(values), runs=50)
    assert expected < careless < 3 * expected  # and the center is uncertain
    found = share_outside(alike, ours)
    print(f"correlated: {found:.3%} of windows outside, {careless:.1%} for limits that know nothing of it")
    assert found < 3 * EXPECTED
    limits = calibrate_limits(alike(np.random.default_rng(0), 5000), 100)
    assert limits.correlation == pytest.approx(0.5, abs=0.05)


def test_independent_values_are_seldom_taken_for_alike() -> None:
    found = [calibrate_limits(normal(np.random.default_rng(seed), 500), 100).correlation for seed in range(200)]
    taken = sum(each > 0 for each in found)
    assert taken <= 12  # one side of 2 standard errors: 2.3 %, 4.6 of 200 expected
    assert max(found) < 0.2


def test_an_outlier_hides_and_does_not_alarm() -> None:
    values = normal(np.random.default_rng(0), 500)
    clean = calibrate_limits(values, 100)
    values[100] = 500.0
    dirty = calibrate_limits(values, 100)
    assert dirty.lower < clean.lower and dirty.upper > clean.upper


def test_what_is_not_finite_is_left_out() -> None:
    values = normal(np.random.default_rng(0), 100)
    holes = np.insert(values, [0, 50, 100], [math.nan, math.inf, -math.inf])
    assert calibrate_limits(holes, 10) == calibrate_limits(values, 10)


@pytest.mark.parametrize(
    ("values", "window", "message"),
    [
        ([1.0, 2.0] * 9 + [3.0], 10, "got 19 finite values and 0 others, expected at least 20"),
        ([1.0, 2.0] * 9 + [math.nan] * 9, 10, "got 18 finite values and 9 others"),
        ([0.5] * 100, 10, "only 0 of 100 values differ"),
        ([0.0] * 96 + [0.1, 0.2, 0.3, 0.4], 10, "only 4 of 100 values differ"),
        ([1.0 + i * 1e-15 for i in range(100)], 10, "expected a finite one above rounding"),
        ([1e308, -1e308] * 50, 10, "expected a finite one above rounding"),
        (np.zeros((5, 20)), 10, "shape (5, 20), expected [response]"),
        (["much"] * 30, 10, "values are not numbers"),
        ([None] * 30, 10, "got 0 finite values and 30 others"),
        (range(30), 0, "window is 0"),
        (range(30), 2.5, "window is 2.5"),
        (range(30), True, "window is True"),
    ],
)
def test_values_that_set_no_limits(values: object, window: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        calibrate_limits(values, window)  # type: ignore[arg-type]
    assert message in str(caught.value)


# --- the monitor -----------------------------------------------------------------------------------------


def test_a_shift_of_one_sigma_is_found_within_two_windows() -> None:
    """200 runs: limits from 500 responses, 20 windows of calm, then everything one sigma lower."""
    needed = []
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        watch, alerts = monitor(window=100, learn=500)
        feed(watch, normal(rng, 500 + 50))  # the change comes in the middle of a window
        assert not alerts
        for n in range(1, 1000):
            feed(watch, rng.normal(3.0 - 2.0, 2.0, 1))
            if alerts:
                needed.append(n)
                assert alerts[0].value < alerts[0].limits.lower and alerts[0].sigmas < -3
                break
    assert len(needed) == 200
    print(f"a shift of one sigma was found after {statistics.mean(needed):.0f} responses, at most {max(needed)}")
    assert max(needed) <= 150


def test_an_alert_comes_once_and_ends_once() -> None:
    limits = ControlLimits(center=0.0, sigma=1.0, n=10**9, window=1)
    watch, alerts = monitor(limits=limits, patience=3)
    feed(watch, [0, 2.9, -2.9])
    assert alerts == [] and watch.alarms == ()
    feed(watch, [3.1])
    assert calm(alerts) == ["entered"] and watch.alarms == (STREAM,)
    first = alerts[0]
    assert (first.stream, first.value, first.limits) == (STREAM, 3.1, limits)
    assert first.sigmas == pytest.approx(3.1) and first.time.utcoffset() is not None
    feed(watch, [50, -50, -50, -50, 3.1, 1.4, 1.4, 1.6, 1.4, 1.4])  # back, but never for three windows in a row
    assert calm(alerts) == ["entered"]
    feed(watch, [-1.4])
    assert calm(alerts) == ["entered", "left"] and watch.alarms == ()
    feed(watch, [-3.1])
    assert calm(alerts) == ["entered", "left", "entered"]


def test_flapping_at_the_border_is_one_alert() -> None:
    """A signal that has settled on the limit itself: half of the windows are outside."""
    rng = np.random.default_rng(0)
    limits = ControlLimits(center=0.0, sigma=1.0, n=10**9, window=25)
    means = rng.normal(3.0 * limits.spread, limits.spread, 500)
    crossings = int((np.diff(np.abs(means) > 3 * limits.spread) != 0).sum())
    watch, alerts = monitor(limits=limits, patience=3)
    feed(watch, np.repeat(means, 25))
    print(f"{crossings} crossings of the limit, {len(alerts)} alerts")
    assert crossings > 200
    assert len(alerts) <= 3


def test_each_version_learns_limits_of_its_own() -> None:
    rng = np.random.default_rng(0)
    alerts: list[Alert] = []
    watch = DriftMonitor(on_alert=alerts.append, learn=100, window=50)
    for _ in range(300):
        watch.observe("m", "v1", {"evidence": rng.normal(3, 1), "area": rng.normal(0.2, 0.02)})
        watch.observe("m", "v2", {"evidence": rng.normal(-3, 1)})
        watch.observe("m", None, {"evidence": rng.normal(9, 1)})
    assert alerts == []  # other versions lie elsewhere, and that is no drift
    assert {(each.model_revision, each.signal): round(limits.center) for each, limits in watch.limits.items()} == {
        ("v1", "evidence"): 3,
        ("v1", "area"): 0,
        ("v2", "evidence"): -3,
        ("", "evidence"): 9,
    }
    assert {limits.n for limits in watch.limits.values()} == {100}


def test_a_signal_that_never_varies_waits_and_is_learned_when_it_does() -> None:
    watch, alerts = monitor(learn=50, window=10)
    feed(watch, [0.0] * 5000)
    assert watch.limits == {} and alerts == []
    feed(watch, [0.0, 0.1] * 50)
    assert set(watch.limits) == {STREAM}
    assert watch.limits[STREAM].n <= 20 * 50  # and memory was bounded
    feed(watch, [0.9] * 20)
    assert calm(alerts) == ["entered"]


def test_values_that_are_not_finite_are_counted_and_change_nothing() -> None:
    limits = ControlLimits(center=0.0, sigma=1.0, n=1000, window=2)
    watch, alerts = monitor(limits=limits)
    feed(watch, [0.0, math.nan, math.inf, 0.1, -math.inf])
    assert watch.ignored == 3 and alerts == []
    feed(watch, [100.0, 100.0])
    assert alerts[0].value == 100.0


def test_a_failing_hook_is_counted_and_does_not_flood(caplog: pytest.LogCaptureFixture) -> None:
    def fail(alert: Alert) -> None:
        raise RuntimeError("pager is off")

    watch = DriftMonitor({STREAM: ControlLimits(0.0, 1.0, 10**9, 1)}, on_alert=fail, patience=1)
    with caplog.at_level(logging.WARNING, "fastattr"):
        feed(watch, [9.0, 0.0] * 50)
    assert watch.hook_failures == 100
    (record,) = caplog.records
    assert record.getMessage().startswith("on_alert failed: RuntimeError('pager is off') on Alert(")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_alert": None}, "on_alert is a NoneType"),
        ({"learn": 19}, "learn is 19"),
        ({"window": 0}, "window is 0"),
        ({"patience": 1.5}, "patience is 1.5"),
        ({"enter": 1.0, "leave": 2.0}, "0 < leave <= enter"),
        ({"enter": math.nan}, "0 < leave <= enter"),
        ({"leave": 0.0}, "0 < leave <= enter"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DriftMonitor(**{"on_alert": print, **options})  # type: ignore[arg-type]
    assert message in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False)
some_limits = st.builds(
    ControlLimits,
    center=numbers,
    sigma=st.floats(min_value=1e-300, max_value=1e300),
    n=st.integers(20, 10**12),
    window=st.integers(1, 10**12),
    correlation=st.floats(0, 1, exclude_max=True),
)
streams = st.builds(Stream, *[st.text(st.characters(codec="utf-8"), max_size=8)] * 3)


@given(limits=st.dictionaries(streams, some_limits, max_size=5))
def test_limits_come_back_as_they_were(
    limits: dict[Stream, ControlLimits], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("limits") / "limits.json"
    assert read_limits(write_limits(limits, path)) == limits


def test_a_restart_with_stored_limits_alarms_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before, _ = monitor(learn=100, window=20)
    feed(before, normal(rng, 100))
    known = read_limits(write_limits(before.limits, tmp_path / "limits.json"))
    alerts: list[Alert] = []
    feed(DriftMonitor(known, on_alert=alerts.append), rng.normal(-3.0, 2.0, 20))
    assert calm(alerts) == ["entered"]


ROW = {
    "model": "m",
    "model_revision": "",
    "signal": "area",
    "center": 0.2,
    "sigma": 0.1,
    "n": 100,
    "window": 10,
    "correlation": 0.0,
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "cannot be read as control limits"),
        ("[", "cannot be read as control limits"),
        ("{}", "it holds a dict, expected a list"),
        ("[3]", "an entry holds int"),
        ("[{}]", "an entry holds nothing"),
        (json.dumps([{**ROW, "more": 1}]), "an entry holds center, correlation, model, model_revision, more"),
        (json.dumps([{**ROW, "model": 3}]), "expected three texts"),
        (json.dumps([{**ROW, "sigma": 0}]), "sigma is 0"),
        (json.dumps([{**ROW, "sigma": "wide"}]), "sigma is 'wide'"),
        (json.dumps([{**ROW, "center": math.nan}]), "center is nan"),
        (json.dumps([{**ROW, "n": 3}]), "n is 3"),
        (json.dumps([{**ROW, "window": 1e3}]), "window is 1000.0"),
        (json.dumps([{**ROW, "correlation": 1}]), "correlation is 1"),
        (b"\xff\xfe\x00", "cannot be read as control limits"),
    ],
)
def test_files_that_are_no_limits(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "limits.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_limits(path)
    assert message in str(caught.value) and "limits.json" in str(caught.value)


def test_limits_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(SaveError):
        write_limits({STREAM: ControlLimits(0.0, 1.0, 100, 10)}, tmp_path / "nowhere" / "limits.json")
    assert list(tmp_path.iterdir()) == []
