"""Every option from one file. JSON here; a YAML file is the same mapping.

    python -m fastattr.log.recipes.with_config_file logging.json

where logging.json holds, for example:

    {
      "destination": "runs/attr",
      "sample_rate": 0.01,
      "error_rate": 1.0,
      "content": "ids",
      "images": "hash",
      "model_revision": "2026-11-22",
      "retention_days": 30,
      "attribution": {"method": "arc", "scales": [1.0]},
      "redact": "fastattr.log.recipes.with_config_file:redact"
    }

An option that is unknown or out of range stops the start with a message that says what is expected.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import fastattr
from fastattr.log import AttributionLogger, Submission
from fastattr.log.recipes.answering import log_scenes

KEPT = {"route", "tenant"}
MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


def redact(submission: Submission) -> Submission | None:
    """Runs before anything is queued. An exception drops the response, so that a fault here leaks nothing."""
    if submission.metadata.get("opted_out"):
        return None
    metadata = {name: value for name, value in submission.metadata.items() if name in KEPT}
    prompt = submission.prompt
    if isinstance(prompt, str):
        prompt = MAIL.sub("<mail>", prompt)
    elif prompt is not None and any(MAIL.search(text) for text in prompt.texts):  # a conversation
        prompt = None
    return replace(submission, metadata=metadata, prompt=prompt)


def main(path: str, n: int) -> None:
    mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    model = fastattr.load("shapes")
    with AttributionLogger.from_mapping(mapping, model=model) as logger:
        log_scenes(model, logger, n, route="/answer", user="someone@example.com")
    print(logger.stats())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file with the options")
    parser.add_argument("--n", type=int, default=3, help="answers to log")
    chosen = parser.parse_args()
    main(chosen.path, chosen.n)
