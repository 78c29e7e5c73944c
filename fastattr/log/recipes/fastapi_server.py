"""FastAPI around `generate`, with every answer logged. A loopback server of one process and one model.

    python -m fastattr.log.recipes.fastapi_server runs/attr --port 8000
    curl --data-binary @picture.png "http://127.0.0.1:8000/answer?prompt=Describe+the+image."
    curl http://127.0.0.1:8000/healthz

Explaining shares the processor with answering, but never a request's path: `submit` only queues. SIGTERM lets running
requests finish, then the logger write and publish what it holds. After a `kill -9` the next start does that.
"""

from __future__ import annotations

import argparse
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request

import fastattr
from fastattr.errors import ImageError
from fastattr.images import read_image
from fastattr.log import AttributionLogger
from fastattr.log.recipes.answering import GREEDY, PROMPT, inputs_of, text_of

MAX_PICTURE_BYTES = 20 * 2**20

routes = APIRouter()


async def read_body(request: Request) -> bytes:
    """The body, read piece by piece, so that nobody can send more than fits."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_PICTURE_BYTES:
            raise HTTPException(413, f"the picture has more than {MAX_PICTURE_BYTES} bytes")
    return bytes(body)


# not `async def`: generate would hold up the event loop, so that FastAPI runs this in its pool of threads
@routes.post("/answer")
def answer(request: Request, body: Annotated[bytes, Depends(read_body)], prompt: str = PROMPT) -> dict[str, str]:
    state = request.app.state
    try:
        picture = read_image(body)  # RGB, EXIF orientation applied: the model sees the picture that is logged
    except ImageError as error:
        raise HTTPException(415, "the body is no picture that can be read") from error
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    try:
        inputs = inputs_of(state.model, picture, prompt)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    with state.one_at_a_time, fastattr.capture(state.model, buffer=state.logger.buffer) as states:
        out = state.model.hf_model.generate(**inputs, **GREEDY)
    cut_off = out.shape[1] - inputs["input_ids"].shape[1] >= GREEDY["max_new_tokens"]
    state.logger.submit(
        states,
        out,
        request_id=request_id,
        images=[picture],
        prompt=prompt,
        metadata={"route": "/answer", "cut_off": cut_off},
        error=cut_off,  # marks what you will want to look at: kept whatever the sample rate is
    )
    return {"request_id": request_id, "answer": text_of(state.model, inputs, out)}


@routes.get("/healthz")
def health(request: Request) -> dict[str, Any]:
    return asdict(request.app.state.logger.stats())


def make_app(destination: str, **options: Any) -> FastAPI:
    """The server; `options` are the logger's."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.model = fastattr.load("shapes")
        app.state.one_at_a_time = threading.Lock()
        app.state.logger = AttributionLogger(destination, **options)
        yield  # uvicorn comes back here on SIGTERM, after the last request
        app.state.logger.shutdown(timeout_s=20)

    app = FastAPI(lifespan=life)
    app.include_router(routes)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", help="directory or URL of the records")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sample-rate", type=float, default=1.0, help="share of the answers that is logged")
    chosen = parser.parse_args()
    uvicorn.run(make_app(chosen.destination, sample_rate=chosen.sample_rate), host="127.0.0.1", port=chosen.port)
