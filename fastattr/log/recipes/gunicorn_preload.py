"""gunicorn that loads the model once and forks: workers share its memory, and each logs into a room of its own.

    gunicorn -c python:fastattr.log.recipes.gunicorn_conf "fastattr.log.recipes.gunicorn_preload:make_app('runs/attr')"
    curl --data-binary @picture.png http://127.0.0.1:8000/answer

The logger is made in the master. It starts no thread there: each worker's begins with its first answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import fastattr
from fastattr.errors import ImageError
from fastattr.images import read_image
from fastattr.log import AttributionLogger
from fastattr.log.recipes.answering import GREEDY, PROMPT, inputs_of, text_of

MAX_PICTURE_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Server:
    """A WSGI application. gunicorn's sync workers run one request at a time, so that no lock is needed."""

    model: fastattr.Model
    logger: AttributionLogger

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, body = self.answer(environ)
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(body).encode()]

    def answer(self, environ: dict[str, Any]) -> tuple[str, dict[str, str]]:
        n_bytes = int(environ.get("CONTENT_LENGTH") or 0)
        if n_bytes > MAX_PICTURE_BYTES:
            return "413 Content Too Large", {"error": f"the picture has more than {MAX_PICTURE_BYTES} bytes"}
        try:
            picture = read_image(environ["wsgi.input"].read(n_bytes))  # RGB and upright, as the model is to see it
        except ImageError:
            return "415 Unsupported Media Type", {"error": "the body is no picture that can be read"}
        request_id = environ.get("HTTP_X_REQUEST_ID") or uuid.uuid4().hex
        try:
            inputs = inputs_of(self.model, picture)
        except ValueError as error:
            return "422 Unprocessable Content", {"error": str(error)}
        with fastattr.capture(self.model, buffer=self.logger.buffer) as states:
            out = self.model.hf_model.generate(**inputs, **GREEDY)
        self.logger.submit(states, out, request_id=request_id, images=[picture], prompt=PROMPT)
        return "200 OK", {"request_id": request_id, "answer": text_of(self.model, inputs, out)}


def make_app(destination: str) -> Server:
    """Runs in the master, before it forks."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork; workers are the parallelism
    return Server(fastattr.load("shapes"), AttributionLogger(destination, sample_rate=1.0))
