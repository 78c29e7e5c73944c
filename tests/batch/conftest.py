"""One model for all tests that need no process of their own."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import pytest

import fastattr
from fastattr.adapters import Model
from fastattr.batch.output import open_output
from fastattr.batch.running import Engine
from fastattr.batch.shards import Job, ShardResult, Task, Underway, run_shard


@pytest.fixture(scope="session")
def model() -> Model:
    return fastattr.load("shapes")


@pytest.fixture
def inline(model: Model) -> Engine:
    """Shards one after the other, in this process."""

    def engine(
        job: Job, tasks: Sequence[Task], *, stop: threading.Event
    ) -> Generator[ShardResult | Underway, None, None]:
        for task in tasks:
            yield run_shard(model, job, task, open_output(job.out))

    return engine
