"""`fastattr worker`: explain what servers handed over."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fastattr.cli.loading import Device, Dtype, DtypeName, Trust, choose_device, load_model
from fastattr.cli.log import extras
from fastattr.errors import InputError


def worker(
    spool: Annotated[Path, typer.Argument(help="The spool of the loggers, by default DIR/spool.", metavar="SPOOL")],
    model: Annotated[
        str, typer.Option(help="The model the responses are of: a local directory, a hub id, or 'shapes'.")
    ],
    device: Device = None,
    dtype: Dtype = DtypeName.auto,
    trust_remote_code: Trust = False,
    config: Annotated[
        Path | None, typer.Option(help="The logger's options as JSON, where it takes secrets or a moved spool.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when nothing waits.")] = False,
) -> None:
    """Explain responses that wait in a spool.

    SIGTERM or Ctrl-C ends it cleanly.
    """
    with extras():
        from fastattr.log import LogConfig, inbox
        from fastattr.log.worker import work
    if config is None:
        options = inbox.read_config(spool)
    else:
        try:
            options = LogConfig.from_mapping({**json.loads(config.read_text(encoding="utf-8")), "spool": str(spool)})
        except (OSError, ValueError, TypeError) as error:  # a TypeError where the JSON is not a mapping
            raise InputError(f"{str(config)!r} cannot be read as options of a logger: {error}") from error
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    device = choose_device(device)
    _say(f"loading {model} on {device}")
    loaded = load_model(model, device, dtype, trust_remote_code)
    _say(f"explaining what waits in {spool}")
    stats = work(options, loaded, stop=stop, until_empty=once, said=_say)
    failed = ", ".join(f"{n} {reason}" for reason, n in stats.failed.items())
    _say(f"{stats.written} written, {sum(stats.failed.values())} failed{f' ({failed})' if failed else ''}")
    raise typer.Exit(1 if stats.failed else 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
