"""`fastattr log ls | show | query | export | doctor | serve`: look at what a logger wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattr.cli.output import Json, as_dict, check_output, print_attributions, print_table, printable, signed, write
from fastattr.errors import InputError, how_to_install

app = typer.Typer(help="Look at what a logger wrote.", no_args_is_help=True, rich_markup_mode=None)

Dest = Annotated[str, typer.Argument(help="The logger's destination: a directory or a URL.", metavar="DIR")]


class FormatName(str, Enum):
    jsonl = "jsonl"
    parquet = "parquet"
    html = "html"


@app.command()
def ls(
    dest: Dest,
    model: Annotated[str | None, typer.Option(help="Of this model only.")] = None,
    since: Annotated[str | None, typer.Option(help="From then on: 2026-11-22, 2026-11-22T09:30, 12h or 7d.")] = None,
    until: Annotated[str | None, typer.Option(help="Before then, written like --since.")] = None,
    lowest_evidence: Annotated[bool, typer.Option("--lowest-evidence", help="Lowest evidence first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    as_json: Json = False,
) -> None:
    """List responses, newest first."""
    with extras():
        from fastattr.log import reading
    filters = reading.Filters(model=model, since=_when("--since", since), until=_when("--until", until))
    log = reading.open_log(dest)
    found = reading.summaries(log, filters, order_by="lowest_evidence" if lowest_evidence else "newest", limit=limit)
    if as_json:
        print(json.dumps(reading.plain([vars(each) for each in found])))
        return
    names = ("TIME (UTC)", "EVIDENCE", "LOWEST", "TOKENS", "MODEL", "REQUEST", "RECORD")
    print_table(
        names,
        [
            (
                f"{each.time:%Y-%m-%d %H:%M:%S}",
                signed(each.mean_evidence),
                signed(each.min_evidence),
                each.n_tokens,
                each.model,
                each.request_id + (" (error)" if each.error else ""),
                each.record_id,
            )
            for each in found
        ],
    )
    total = reading.count(log, filters)
    if total > len(found):
        print(f"{total - len(found)} more; raise --limit, or narrow with --since and --model")


@app.command()
def show(
    dest: Dest,
    identity: Annotated[str, typer.Argument(help="A record id or a request id.", metavar="ID")],
    out: Annotated[Path | None, typer.Option(help="Also write x.html, x.safetensors, x.png or x.json.")] = None,
    as_json: Json = False,
) -> None:
    """Print one response, or turn it into a report."""
    with extras():
        from fastattr.log import reading
    if out is not None:
        check_output(out)
    log = reading.open_log(dest)
    same = reading.summaries(log, reading.Filters(request_id=identity), limit=None)  # newest first
    record = next(reading.read(log, record_id=identity), None)
    others: list[str] = []
    if record is None and same:
        record = next(reading.read(log, record_id=same[0].record_id), None)
        others = [each.record_id for each in same[1:]]
    if record is None:
        raise InputError(
            f"no record and no request has the id {identity!r} in {dest!r}; fastattr log ls lists what is there, and a "
            "record is published a little after it was logged"
        )
    about = reading.plain({name: value for name, value in vars(record.envelope).items() if name != "images"})
    if out is not None:
        write([record.attribution], out)
    if as_json:
        shown = {**about, **as_dict(record.attribution, maps=False), "same_request": others}
        print(json.dumps({**shown, "out": None if out is None else str(out)}))
        return
    for name, value in about.items():
        if value not in (None, {}, False):
            text = value if isinstance(value, str) else json.dumps(_rounded(value), ensure_ascii=False)
            print(f"{name:<16}{printable(text, lines=False)}")
    print()
    print_attributions([record.attribution], out, False)
    if others:
        more = " ..." if len(others) > 10 else ""
        print(f"\n{len(others)} older of the same request: {', '.join(map(printable, others[:10]))}{more}")


@app.command()
def query(
    dest: Dest,
    sql: Annotated[str, typer.Argument(help="DuckDB's SQL over the views records and tokens.", metavar="SQL")],
    as_json: Json = False,
) -> None:
    """Answer SQL over all records."""
    with extras():
        from fastattr.log import reading
    table = reading.query(dest, sql)
    rows = table.to_pylist()
    if as_json:
        print(json.dumps(reading.plain(rows)))
    else:
        print_table(table.column_names, [[_short(value) for value in row.values()] for row in rows])


@app.command()
def export(
    dest: Dest,
    out: Annotated[Path, typer.Argument(help="A file, or for html a folder.", metavar="OUT")],
    format: Annotated[
        FormatName | None,
        typer.Option(
            help="By default what OUT's suffix says: .jsonl (no maps), .parquet, none for a folder of reports."
        ),
    ] = None,
    where: Annotated[str | None, typer.Option(help="SQL condition, for example 'mean_evidence < 0.5'.")] = None,
) -> None:
    """Write records as JSON lines, Parquet or reports."""
    with extras():
        from fastattr.log import reading
    by_suffix = {".jsonl": FormatName.jsonl, ".parquet": FormatName.parquet, "": FormatName.html}
    chosen = format or by_suffix.get(out.suffix)
    if chosen is None:
        raise InputError(f"{str(out)!r} ends in {out.suffix!r}, expected .jsonl or .parquet; or say --format")
    if chosen is not FormatName.html:
        from fastattr.storage import check_writable

        check_writable(out)
    elif out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file, expected a folder for the reports; choose another, or delete it")
    n = reading.export(dest, out, chosen.value, where=where)
    print(f"{n} record{'' if n == 1 else 's'} in {out.resolve()}")


@app.command()
def doctor(
    dest: Dest,
    spool: Annotated[Path | None, typer.Option(help="Where the spool is, if the logger was told.")] = None,
    as_json: Json = False,
) -> None:
    """Say what is lost or damaged; exit code 1 if so."""
    with extras():
        from fastattr.log.doctor import examine
    diagnosis = examine(dest, spool)
    print(json.dumps(diagnosis.as_dict()) if as_json else printable(str(diagnosis)))
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command()
def serve(
    dest: Dest,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback need the token it prints.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
) -> None:
    """Serve the dashboard on this machine."""
    with extras():
        from fastattr.log.dashboard import serve as run
    run(dest, host=host, port=port)


@contextmanager
def extras() -> Iterator[None]:
    """Imports inside are of the optional packages. Raises `InputError` where one is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"fastattr log needs more packages ({error}); {how_to_install('log')}") from error


def _when(option: str, text: str | None) -> datetime | None:
    """A date, a time (UTC if it does not say), or how long ago."""
    if text is None:
        return None
    try:
        ago = re.fullmatch(r"(\d{1,5})([hd])", text)
        if ago:
            return datetime.now(timezone.utc) - int(ago[1]) * timedelta(**{{"h": "hours", "d": "days"}[ago[2]]: 1})
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return when.replace(tzinfo=timezone.utc) if when.tzinfo is None else when
    except ValueError as error:
        raise InputError(
            f"{option} is {text!r}, expected a date (2026-11-22), a time (2026-11-22T09:30, UTC unless it says) or how "
            "long ago (12h, 7d)"
        ) from error


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def _short(value: Any) -> Any:
    return f"{len(value)} bytes" if isinstance(value, bytes) else value
