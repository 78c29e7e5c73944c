"""A feedback record in the form that MLflow, Langfuse and others share, as JSON lines. Neither is needed for it.

    python -m fastattr.log.recipes.trace_record runs/attr feedback.jsonl

One record: what was judged (trace and span), the name of the judgement, its value, a label, an explanation, who judged,
metadata. Map the fields in `to_feedback` to your product's call, for example `log_feedback` or `create_score`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import fastattr
from fastattr.log import AttributionLogger, Logged
from fastattr.log.recipes.answering import log_scenes


def to_feedback(record: Logged, destination: str) -> dict[str, Any]:
    """The one record, without maps: whoever wants those follows `metadata.record`."""
    low = record.low_evidence
    return {
        "id": record.record_id,
        "target": {"request_id": record.request_id},
        "name": "fastattr.evidence",
        "value": record.mean_evidence,
        "label": None if low is None else "low_evidence" if low else "seen",
        "explanation": f"{low} words of low evidence among {record.n_tokens} tokens; value is nats a token",
        "source": {"type": "CODE", "name": f"fastattr {record.model} {record.model_revision or ''}".rstrip()},
        "time": record.time.isoformat(),
        "metadata": {**record.metadata, "record": f"{destination}#{record.record_id}"},
    }


def main(destination: str, path: str, n: int) -> None:
    model = fastattr.load("shapes")
    with open(path, "a", encoding="utf-8") as file:

        def write(record: Logged) -> None:
            file.write(json.dumps(to_feedback(record, destination)) + "\n")

        # the logger is shut down before the file closes: its thread may call `write` until then
        with AttributionLogger(destination, sample_rate=1.0, model_revision="v1", on_record=write) as logger:
            log_scenes(model, logger, n, experiment="demo")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", help="directory or URL of the records")
    parser.add_argument("path", help="file of JSON lines to append to")
    parser.add_argument("--n", type=int, default=3, help="answers to log")
    chosen = parser.parse_args()
    main(chosen.destination, chosen.path, chosen.n)
