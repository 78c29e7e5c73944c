"""Options of logging: the same from keywords and from a mapping, wrong ones named, and the same sampling everywhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr import AttributionConfig, InputError, SaveError
from fastattr.config import METHODS
from fastattr.log import AttributionLogger, LogConfig, inbox
from fastattr.log.config import make_config
from fastattr.log.sampling import rate_before, share_of

# every option with a value that is not its default, as a JSON or YAML file would hold it
OPTIONS: dict[str, Any] = {
    "destination": "memory://somewhere/attr",
    "spool": "/tmp/spool",
    "storage_options": {"skip_instance_cache": True},
    "sample_rate": 0.25,
    "error_rate": 0.5,
    "long_rate": 0.75,
    "long_tokens": 7,
    "low_evidence_rate": 0.125,
    "screen_rate": 0.5,
    "explain": "worker",
    "attribution": {"scales": [1.0, 2.0], "method": "tam", "evidence": False},
    "model_revision": "r2",
    "content": "text",
    "images": "store",
    "queue_bytes": 1001,
    "capture_bytes": 1002,
    "capture_to": "cpu",
    "spool_bytes": 1003,
    "segment_bytes": 1004,
    "segment_age_s": 1.5,
    "sync_s": 0.5,
    "retention_days": 3,
    "exit_timeout_s": 2.5,
    "telemetry": False,
    "redact": "json:loads",
    "on_record": "json:dumps",
    "on_alert": "os.path:join",
    "drift_limits": "/tmp/limits.json",
}


# --- mapping and keywords ---------------------------------------------------------------------------------


def test_every_option_is_tried_here() -> None:
    assert set(OPTIONS) == {each.name for each in fields(LogConfig)}
    default = LogConfig("somewhere")
    mapped = LogConfig.from_mapping(OPTIONS)
    assert [name for name in OPTIONS if getattr(default, name) == getattr(mapped, name)] == []


def test_a_mapping_says_the_same_as_keywords() -> None:
    keywords = {
        **OPTIONS,
        "attribution": AttributionConfig(scales=(1.0, 2.0), method="tam", evidence=False),
        "redact": json.loads,
        "on_record": json.dumps,
        "on_alert": os.path.join,
    }
    destination = keywords.pop("destination")
    # through JSON, as from a file
    assert LogConfig.from_mapping(json.loads(json.dumps(OPTIONS))) == make_config(destination, keywords)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"destination"}))
def test_one_option_alone_changes_nothing_else(name: str) -> None:
    default = LogConfig("somewhere")
    changed = LogConfig.from_mapping({"destination": "somewhere", name: OPTIONS[name]})
    assert [each.name for each in fields(LogConfig) if getattr(default, each.name) != getattr(changed, each.name)] == [
        name
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("best", METHODS["best"]),
        ("tam@1+1.5", AttributionConfig(method="tam", scales=(1.0, 1.5))),
        ({"method": "best", "evidence": False}, dataclasses.replace(METHODS["best"], evidence=False)),
        ({"top_k": 20}, AttributionConfig(scales=(1.0,), top_k=20)),
        ({"scales": [1.0, 2.0]}, AttributionConfig(scales=(1.0, 2.0))),
        ({"method": "arc", "scales": None}, AttributionConfig()),
    ],
)
def test_how_responses_are_explained_by_name(given: Any, expected: AttributionConfig, tmp_path: Path) -> None:
    """From a mapping, from keywords, and from the file the logger writes for a worker."""
    config = LogConfig.from_mapping({"destination": str(tmp_path), "attribution": given})
    assert config == LogConfig(str(tmp_path), attribution=given) == LogConfig(str(tmp_path), attribution=expected)
    assert config.explained_by == expected
    inbox.prepare(config)
    assert inbox.read_config(config.spool_path).explained_by == expected


def test_a_configuration_of_an_older_logger_is_read(tmp_path: Path) -> None:
    """It wrote `()` for the model's own scales."""
    config = LogConfig(str(tmp_path), attribution="arc")
    inbox.prepare(config)
    path = config.spool_path / inbox.CONFIG_FILE
    stored = json.loads(path.read_text())
    stored["attribution"] |= {"scales": [], "top_k": 50}
    path.write_text(json.dumps(stored))
    assert inbox.read_config(config.spool_path).explained_by == AttributionConfig(top_k=50)


def test_the_logger_takes_a_mapping_too(tmp_path: Path) -> None:
    with AttributionLogger.from_mapping({"destination": str(tmp_path), "sample_rate": 0.5}) as logger:
        assert logger.config == LogConfig(str(tmp_path), sample_rate=0.5)


@pytest.mark.parametrize("name", ["sample_rat", "Sample_rate", "", "model"])
def test_unknown_options_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown option {name}") as caught:
        LogConfig.from_mapping({"destination": "x", name: 1})
    assert "sample_rate" in str(caught.value)  # what there is instead
    with pytest.raises(InputError, match="attribution is wrong: unknown option sclaes; known are method"):
        LogConfig.from_mapping({"destination": "x", "attribution": {"sclaes": [1.0]}})


@pytest.mark.parametrize("mapping", [None, 3, "destination", ["destination"], [("destination", "x")]])
def test_what_is_no_mapping_is_refused(mapping: Any) -> None:
    with pytest.raises(InputError, match="expected a mapping"):
        LogConfig.from_mapping(mapping)


def test_a_destination_is_needed() -> None:
    with pytest.raises(InputError, match="names no destination"):
        LogConfig.from_mapping({"sample_rate": 1.0})


WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in ("sample_rate", "error_rate", "long_rate", "low_evidence_rate", "screen_rate")
      for value in (-0.1, 1.1, math.nan, "0.1", None, True)],
    *[(name, value) for name in ("long_tokens", "queue_bytes", "capture_bytes", "spool_bytes", "segment_bytes")
      for value in (0, -1, 1.5, "9", None, True)],
    *[(name, value) for name in ("segment_age_s", "sync_s", "exit_timeout_s")
      for value in (-1, math.inf, math.nan, "1", None, True)],
    *[("retention_days", value) for value in (0, -1, 1.5, "3", True)],
    *[(name, value) for name in ("explain", "content", "images", "capture_to") for value in ("all", None, 3, [])],
    *[("telemetry", value) for value in ("yes", None)],
    *[(name, value) for name in ("redact", "on_record", "on_alert")
      for value in (3, "json:no_such_thing", "no_such_package_:x", "json", "")],
    *[("attribution", value) for value in (None, "gradcam", 3, {"scales": [0]}, {"scales": []}, {"method": "tam", "compat": "tam", "scales": [1]})],
    *[("storage_options", value) for value in (None, "key", [1])],
    *[("destination", value) for value in ("", "  ", "a\0b")],
    ("spool", "s3://bucket/spool"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}"[:40] for name, value in WRONG])
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    mapping = {"destination": "somewhere", name: value}
    with pytest.raises(InputError, match=name):
        LogConfig.from_mapping(mapping)


# --- what is checked at construction ------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["below a file", "/proc/attr", "/dev/null"])
@pytest.mark.parametrize("option", ["destination", "spool"])
def test_places_that_cannot_be_written_to_are_told_at_once(tmp_path: Path, place: str, option: str) -> None:
    (tmp_path / "file").write_text("in the way")
    place = str(tmp_path / "file" / "attr") if place == "below a file" else place
    options = {"destination": str(tmp_path / "dest"), option: place}
    with pytest.raises(SaveError, match=place):
        AttributionLogger.from_mapping(options)


def test_a_folder_that_only_root_can_write_to_is_told_at_once(tmp_path: Path) -> None:
    """As an ordinary user, whoever runs this."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(SaveError, match="closed"):
            AttributionLogger(closed / "attr")
    finally:
        os.seteuid(user)


def test_a_store_of_an_unknown_kind_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nosuchstore"):
        AttributionLogger("nosuchstore://bucket/attr", spool=str(tmp_path))


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    with AttributionLogger(tmp_path / "dest"):
        found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["dest/spool/logger.json"]


def test_secrets_are_not_written_down(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    options = {"skip_instance_cache": True, "passphrase": "very secret"}
    with AttributionLogger("memory://secrets/attr", spool=str(spool), storage_options=options):
        pass
    held = b"".join(path.read_bytes() for path in spool.rglob("*") if path.is_file())
    assert b"destination" in held and b"very secret" not in held and b"passphrase" not in held


def test_a_relative_place_is_the_same_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daemons change to `/`, and a worker runs from wherever it is started."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = LogConfig("attr")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.spool_path.absolute() == tmp_path / "attr" / "spool"
    assert Path(config.destination).absolute() == tmp_path / "attr"


# --- sampling -----------------------------------------------------------------------------------------------

IDS = st.text(max_size=40)


@given(IDS)
def test_a_share_is_a_number_below_one(request_id: str) -> None:
    assert 0.0 <= share_of(request_id) < 1.0
    assert share_of(request_id) == share_of(request_id)


def test_the_same_id_has_the_same_share_in_another_process() -> None:
    ids = ["", "a", "r-1", "ü" * 300, "\ud800", *(str(i) for i in range(50))]
    code = "import json, sys; from fastattr.log.sampling import share_of; print(json.dumps([share_of(i) for i in json.loads(sys.argv[1])]))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ids)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [share_of(each) for each in ids]


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_as_many_are_kept_as_asked_for(rate: float) -> None:
    """Within five standard deviations of the binomial; ids as servers make them, one after the other."""
    n = 20_000
    kept = sum(share_of(f"chatcmpl-{i:08d}") < rate for i in range(n))
    assert abs(kept - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize(
    ("error", "n_tokens", "expected"),
    [(False, 3, 0.1), (True, 3, 0.4), (False, 10, 0.3), (True, 10, 0.4), (False, 9, 0.1), (False, 0, 0.1)],
)
def test_the_highest_rate_that_applies_counts(error: bool, n_tokens: int, expected: float) -> None:
    config = LogConfig("x", sample_rate=0.1, error_rate=0.4, long_rate=0.3, long_tokens=10)
    assert rate_before(config, error=error, n_tokens=n_tokens) == expected


def test_a_lower_rule_never_takes_away() -> None:
    config = LogConfig("x", sample_rate=0.5, error_rate=0.0, long_rate=0.1, long_tokens=1)
    assert rate_before(config, error=True, n_tokens=5) == 0.5
