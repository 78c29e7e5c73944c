"""structlog: one event for each finished record, with what the request had bound.

python -m fastattr.log.recipes.structlog_events runs/attr
"""

from __future__ import annotations

import argparse

import structlog

import fastattr
from fastattr.log import AttributionLogger, Logged
from fastattr.log.recipes.answering import log_scenes

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(),
    ]
)
log = structlog.get_logger()


def report(record: Logged) -> None:
    """Called on the logger's thread when the record is durable; keep it quick, and it may raise without harm.

    What the request had bound lies in a context that is over by now. It travels in the metadata instead.
    """
    low = bool(record.low_evidence)
    (log.warning if low else log.info)(
        "explained",
        request_id=record.request_id,
        record_id=record.record_id,
        mean_evidence_nats=record.mean_evidence,
        low_evidence=record.low_evidence,
        n_tokens=record.n_tokens,
        **record.metadata,
    )


def main(destination: str, n: int) -> None:
    model = fastattr.load("shapes")
    with (
        AttributionLogger(destination, sample_rate=1.0, on_record=report) as logger,
        structlog.contextvars.bound_contextvars(session="s-42", tenant="acme"),
    ):
        log_scenes(model, logger, n, **structlog.contextvars.get_contextvars())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", help="directory or URL of the records")
    parser.add_argument("--n", type=int, default=3, help="answers to log")
    chosen = parser.parse_args()
    main(chosen.destination, chosen.n)
