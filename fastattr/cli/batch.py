"""`fastattr batch`: explain a whole data set."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from fastattr.cli.loading import Dtype, DtypeName, Trust, choose_device
from fastattr.cli.output import SCALES_HELP, chosen_config, printable
from fastattr.errors import InputError, how_to_install

if TYPE_CHECKING:
    from fastattr.batch import Progress, Summary

SHOWN_REASONS = 5
LONGEST_REASON = 300  # characters
LINE_EVERY_S = 10.0  # where there is no terminal


class ContentName(str, Enum):
    none = "none"
    ids = "ids"
    text = "text"


class ImagesName(str, Enum):
    none = "none"
    hash = "hash"
    store = "store"


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(help=".jsonl, .parquet, .tar or a WebDataset index, folders of them, or URLs.", metavar="IN..."),
    ],
    out: Annotated[str, typer.Option(help="A directory or URL, of this batch alone.")],
    model: Annotated[str, typer.Option(help="'shapes', a local directory, a hub id, or module:function.")] = "shapes",
    method: Annotated[str, typer.Option(help="lens, tam, arc or best, with scales as in tam@1+1.5+2.")] = "arc",
    scales: Annotated[str | None, typer.Option(help=SCALES_HELP)] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence/--no-evidence", help="One more forward with the image blanked.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a row without one, in tokens.")] = 256,
    id_field: Annotated[str, typer.Option(help="Which field names a row; its values are unique.")] = "id",
    image_field: Annotated[str, typer.Option(help="Which holds the image, beside 'images'.")] = "image",
    prompt_field: Annotated[str, typer.Option(help="Which holds the prompt, beside 'messages'.")] = "prompt",
    response_field: Annotated[
        str, typer.Option(help="Which holds the response, beside 'response_ids'; the model answers without.")
    ] = "response",
    content: Annotated[ContentName, typer.Option(help="What of a response is kept.")] = ContentName.ids,
    images: Annotated[ImagesName, typer.Option(help="What of its pictures is kept.")] = ImagesName.hash,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Where rows may have images besides the folder or store of IN: the beginning of a URL, also file:///DIR/; "
            "may be repeated.",
            metavar="URL",
        ),
    ] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows that are published together.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows only.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default a GPU or a core each.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; by default GPUs where there are some.")
    ] = None,
    dtype: Dtype = DtypeName.auto,
    trust_remote_code: Trust = False,
    max_error_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Give up when a larger share of the rows fails.")
    ] = 0.05,
    ray: Annotated[
        str | None, typer.Option(help="Work on a Ray cluster: its address, auto, or local.", metavar="ADDRESS")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(min=0.0, help="CPUs of a Ray worker.")] = 1.0,
    ray_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of a Ray worker.")] = 0.0,
    json_progress: Annotated[bool, typer.Option("--json-progress", help="Progress and summary as JSON lines.")] = False,
) -> None:
    """Explain every row of a data set into a log.

    Read the log with fastattr log. Run the same command again to continue after an interruption.
    """
    attribution = chosen_config(method, scales, {"evidence": evidence})
    engine, run, fields = _imports(ray)
    if ray is None:
        if device is not None:
            choose_device(device)
        engine = partial(engine, workers=workers)
    else:
        engine = partial(engine, address=ray, workers=workers, num_cpus=ray_cpus, num_gpus=ray_gpus)
    began_s = time.monotonic()
    with _stopping() as (stop, caught), _reporting(json_progress) as tell:
        summary = run(
            inputs,
            out,
            model=model,
            attribution=attribution,
            fields=fields(id_field, image_field, prompt_field, response_field),
            content=content.value,
            images=images.value,
            max_new_tokens=max_new_tokens,
            shard_rows=shard_rows,
            limit=limit,
            max_error_rate=max_error_rate,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            allow_urls=allow_url or (),
            engine=engine,
            stop=stop,
            tell=tell,
        )
    took_s = time.monotonic() - began_s
    if json_progress:
        print(json.dumps({"event": "end", "took_s": round(took_s, 1), **asdict(summary)}), flush=True)
    else:
        print("\n".join(_words(summary, out, took_s, max_error_rate)), file=sys.stderr, flush=True)
    if summary.outcome == "too_many_failures":
        raise typer.Exit(1)
    if summary.outcome == "stopped":
        raise typer.Exit(128 + caught[0] if caught else 1)


def _imports(ray: str | None) -> tuple[Any, Any, Any]:
    """An engine, and `run` and `Fields` of `fastattr.batch`. Raises `InputError` where an optional package is missing."""
    try:
        from fastattr.batch import Fields, local, run

        if ray is None:
            return local.run, run, Fields
        from fastattr.batch import ray_engine

        return ray_engine.run, run, Fields
    except ImportError as error:
        extra = "ray" if ray is not None and (error.name or "").startswith("ray") else "log"
        raise InputError(f"fastattr batch needs more packages ({error}); {how_to_install(extra)}") from error


@contextmanager
def _stopping() -> Iterator[tuple[threading.Event, list[int]]]:
    """An event that the first SIGTERM or Ctrl-C sets, and which it was; the second one ends the process as ever."""
    stop = threading.Event()
    caught: list[int] = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    before: dict[int, Any] = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    for each in before:
        signal.signal(each, catch)
    try:
        yield stop, caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _reporting(json_progress: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; elsewhere a line now and then, of JSON where that is wanted."""
    if json_progress or not sys.stderr.isatty():
        said, said_s = None, -math.inf

        def tell(progress: Progress) -> None:
            nonlocal said, said_s
            ended = progress.shards_done == progress.shards
            if progress == said or not (ended or time.monotonic() - said_s >= LINE_EVERY_S):
                return
            said, said_s = progress, time.monotonic()
            if json_progress:
                print(json.dumps({"event": "progress", **asdict(progress)}), flush=True)
            else:
                print(
                    f"{progress.done} of {progress.total} rows, {progress.failed} failed", file=sys.stderr, flush=True
                )

        yield tell
        return
    with tqdm(unit="row", dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            bar.total, bar.initial = progress.total, progress.earlier
            bar.set_postfix(failed=progress.failed, refresh=False)
            bar.update(progress.done - bar.n)  # may go back, where a worker died

        yield show


def _words(summary: Summary, out: str, took_s: float, max_error_rate: float) -> list[str]:
    worked = summary.total - summary.left - summary.earlier
    lines = []
    if summary.earlier == summary.total:
        lines.append("nothing to do: every row was done before")
    elif summary.earlier:
        lines.append(f"{summary.earlier} rows were done before")
    if worked:
        lines.append(f"{worked} rows in {took_s:.0f} s, {worked / took_s:.2f} a second")
    if summary.litter:
        lines.append(f"skipped {summary.litter} files of macOS or Windows in the inputs (._*, .DS_Store, Thumbs.db)")
    lines.append(
        f"{summary.total} rows: {summary.written} written, {summary.failed} failed, {summary.left} left"
        + (f"; see {out}/failed" if summary.failed else "")
    )
    for reason in summary.reasons[:SHOWN_REASONS]:
        example = reason.example
        named = example.row if example.id is None else f"id {example.id!r}, {example.row}"
        lines.append(
            printable(f"  {reason.count} x {example.error_type}: {_short(example.error)} ({named})", lines=False)
        )
    if len(summary.reasons) > SHOWN_REASONS:
        rest = sum(reason.count for reason in summary.reasons[SHOWN_REASONS:])
        lines.append(f"  {rest} for {len(summary.reasons) - SHOWN_REASONS} other reasons")
    if summary.outcome == "too_many_failures":
        lines.append(
            f"GIVEN UP: more than {max_error_rate:.1%} of the rows fail. What is written stays; fix the causes listed above, or "
            "raise --max-error-rate, and run the same command again"
        )
    elif summary.outcome == "stopped":
        lines.append(f"stopped with {summary.left} rows left; run the same command again to go on")
    return lines


def _short(error: str) -> str:
    return error if len(error) <= LONGEST_REASON else error[: LONGEST_REASON - 3] + "..."
