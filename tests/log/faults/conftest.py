"""Faults are counted over the whole run; `--fault-counts FILE` writes the numbers down."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.log.faults.counting import FaultCounts

_COUNTS = pytest.StashKey[FaultCounts]()


def pytest_addoption(parser: pytest.Parser) -> None:
    # known only where this folder is named on the command line
    parser.addoption("--fault-counts", metavar="FILE", help="write the numbers of the fault suite as JSON lines")


@pytest.fixture(scope="session")
def fault_counts(request: pytest.FixtureRequest) -> FaultCounts:
    return request.config.stash.setdefault(_COUNTS, FaultCounts())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash.get(_COUNTS, None)
    if counts is None or not counts.kinds:
        return
    terminalreporter.section("faults")
    for line in counts.table():
        terminalreporter.write_line(line)
    file = config.getoption("--fault-counts", default=None)
    if file is not None:
        counts.write(Path(file))
