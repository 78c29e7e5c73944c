"""A whole dataset: samples in parallel, every judgement on the disk as soon as it is made, an interrupted run goes on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastattr.adapters import Model, hide_loading_bars, load, model_content
from fastattr.datasets import Dataset, open_dataset
from fastattr.errors import BackendError, FastattrError, SaveError, UnsupportedModelError
from fastattr.evaluate.judgement import Judgement, Skipped, from_line, to_line
from fastattr.evaluate.judging import Settings, judge

FORMAT = 1
NAMED_FAULTS = 5  # of the samples that could not be judged, shown by name
PLAIN_STEPS = 10  # lines of progress where there is no terminal


@dataclass(frozen=True)
class Task:
    """What to evaluate on what, by names, so that a worker process can open it for itself.

    Attributes:
        dataset: see `open_dataset`.
        model: see `load`.
        n: the first samples only; all when None.
        prompt: instead of the dataset's own.
        device, dtype, trust_remote_code: of the model, see `load`.
    """

    dataset: str
    model: str
    n: int | None
    prompt: str | None
    settings: Settings
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def open(self) -> Dataset:
        """The samples, none of them read yet."""
        return open_dataset(self.dataset, n=self.n, prompt=self.prompt)

    def load(self) -> Model:
        """The model. Raises as `load` of the adapters does."""
        return load(self.model, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Results:
    """An evaluation as it is on the disk.

    Attributes:
        header: the settings, versions and machine.
        judged: by id, whatever order they were finished in, so that equal results give equal intervals.
        skipped: samples that could not be judged.
    """

    header: dict[str, Any]
    judged: tuple[Judgement, ...]
    skipped: tuple[Skipped, ...]


def run(task: Task, out: Path, *, workers: int = 1) -> Results:
    """Judge every sample that `out` does not hold yet, and append it there.

    Samples that failed earlier are tried again, and samples whose picture, masks or caption have changed since are judged
    again; the contents of files are compared, not their times. Each worker is a process with one thread and a model of
    its own; with one worker everything happens in this process.

    Raises:
        DatasetError: there is no such dataset.
        SaveError: `out` cannot be written, or holds an evaluation of another dataset, model or settings, or of this model
            before its files changed.
        FastattrError: the model cannot be explained at all, or a worker process died.
    """
    dataset = task.open()
    if dataset.n_litter:
        print(f"skipped {dataset.n_litter} files of macOS or Windows (._*, .DS_Store, Thumbs.db)", file=sys.stderr)
    header = _header(task, dataset)
    done = _resume(out, header)
    changed = _changed(dataset, done)
    if changed:
        shown = ", ".join(changed[:NAMED_FAULTS]) + (", ..." if len(changed) > NAMED_FAULTS else "")
        several = f"{len(changed)} samples have" if len(changed) > 1 else "1 sample has"
        print(f"{several} changed since and will be judged again: {shown}", file=sys.stderr, flush=True)
    again = set(changed)
    waiting = [each for each in dataset.ids if each in again or not isinstance(done.get(each), Judgement)]
    if not out.exists() or out.stat().st_size == 0:
        _append(out, json.dumps(header))
    if waiting:
        place = "" if task.device is None else f" on {task.device}"
        print(f"judging {len(waiting)} samples with {task.model}{place}", file=sys.stderr, flush=True)
    for row in _progress(_rows(task, dataset, waiting, workers), len(waiting), len(dataset.ids)):
        line = to_line(row)
        _append(out, line)
        done[row.id] = from_line(line)  # as it will be read again, so that tables are those of the file
    return _ordered(header, {id: done[id] for id in dataset.ids if id in done})


def read(out: Path) -> Results:
    """What `run` wrote, complete or not.

    Raises:
        SaveError: there is no such file, or it is not an evaluation.
    """
    header, done = _read(out)
    return _ordered(header, done)


# --- the work --------------------------------------------------------------------------------------


def _rows(task: Task, dataset: Dataset, ids: Sequence[str], workers: int) -> Iterator[Judgement | Skipped]:
    """A row for every id, in the order they are finished."""
    if not ids:
        return
    if workers == 1:
        model = task.load()
        for each in ids:
            yield _judge(model, dataset, task.settings, each)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(ids)), context, _start_worker, (task,)) as pool:
        futures = [pool.submit(_work, each) for each in ids]
        try:
            yield from _finished(futures)
        finally:
            for future in futures:
                future.cancel()


def _finished(futures: Sequence[Future[Judgement | Skipped]]) -> Iterator[Judgement | Skipped]:
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise FastattrError(
            "a worker process died, perhaps for want of memory; what is judged is kept. Run the same command again to go "
            "on, with fewer workers"
        ) from error


_worker: Callable[[str], Judgement | Skipped] | None = None  # in a worker process, once it has started


def _start_worker(task: Task) -> None:
    global _worker
    torch.set_num_threads(1)
    hide_loading_bars()
    _worker = partial(_judge, task.load(), task.open(), task.settings)


def _work(id: str) -> Judgement | Skipped:
    assert _worker is not None
    return _worker(id)


def _judge(model: Model, dataset: Dataset, settings: Settings, id: str) -> Judgement | Skipped:
    try:
        content = dataset.content(id)  # before reading, so that a change in between is noticed by the next run
        return replace(judge(model, dataset.read(id), settings), content=content)
    except (UnsupportedModelError, BackendError):
        raise  # no other sample would fare better
    except FastattrError as error:
        return Skipped(id, f"{type(error).__name__}: {error}")


def _progress(rows: Iterator[Judgement | Skipped], n: int, total: int) -> Iterator[Judgement | Skipped]:
    """A bar on a terminal, a few plain lines elsewhere; the first faults by name."""
    plain = not sys.stderr.isatty()
    bar = tqdm(total=total, initial=total - n, unit="sample", disable=plain)
    faults = 0
    for count, row in enumerate(rows, start=1):
        bar.update()
        if isinstance(row, Skipped):
            faults += 1
            if faults <= NAMED_FAULTS:
                bar.write(f"skipped {row.id}: {row.reason}", file=sys.stderr)
        if plain and (count == n or count % max(1, n // PLAIN_STEPS) == 0):
            print(f"judged {total - n + count} of {total} samples", file=sys.stderr, flush=True)
        yield row
    bar.close()


# --- the file --------------------------------------------------------------------------------------


def _header(task: Task, dataset: Dataset) -> dict[str, Any]:
    settings = {**asdict(task.settings), "methods": {n: asdict(config) for n, config in task.settings.configs.items()}}
    header = {
        "fastattr_evaluation": FORMAT,
        "dataset": dataset.name,
        "samples": len(dataset.ids),
        "model": Path(task.model).name,
        "model_content": model_content(task.model),
        "dtype": task.dtype,
        "prompt": task.prompt,
        "settings": settings,
        "versions": {name: version(name) for name in ("fastattr", "torch", "transformers", "numpy")},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    return json.loads(json.dumps(header))


def _resume(out: Path, header: dict[str, Any]) -> dict[str, Judgement | Skipped]:
    """Rows that are there already; a line cut short by an interruption is taken off."""
    if not out.exists() or out.stat().st_size == 0:
        return {}
    found, done = _read(out)
    found = {"dtype": "auto", **found}  # earlier versions had no dtype
    for name in ("dataset", "model", "dtype", "prompt", "settings"):
        if found.get(name) != header[name]:
            raise SaveError(
                f"{str(out)!r} holds an evaluation with another {name}: {_short(found.get(name))} there, "
                f"{_short(header[name])} asked for; choose another --out, or delete it"
            )
    _check_model(out, found.get("model_content"), header)
    try:
        open(out, "ab").close()
    except OSError as error:  # before samples are judged whose results could not be written
        raise SaveError(f"{str(out)!r} cannot be written: {error.strerror or error}") from error
    whole = out.read_bytes()
    if not whole.endswith(b"\n"):
        with open(out, "r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
    return done


def _check_model(out: Path, then: dict[str, str] | None, header: dict[str, Any]) -> None:
    """Raises `SaveError` where the model of this name is not the one that was judged."""
    now = header["model_content"]
    if then is None:
        raise SaveError(
            f"{str(out)!r} was written by an earlier version, which did not record digests of the model's files, so it "
            "cannot be continued; choose another --out, or delete it"
        )
    if then != now:
        files = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        shown = ", ".join(files[:NAMED_FAULTS]) + (", ..." if len(files) > NAMED_FAULTS else "")
        raise SaveError(
            f"the model {header['model']!r} has changed since {str(out)!r} was begun: {shown}; choose another --out, or "
            "delete it"
        )


def _changed(dataset: Dataset, done: dict[str, Judgement | Skipped]) -> list[str]:
    """Ids of samples that were judged, but not as they are now."""
    judged = {id: row for id in dataset.ids if isinstance(row := done.get(id), Judgement)}
    return [id for id, row in judged.items() if row.content != dataset.content(id)]


def _read(out: Path) -> tuple[dict[str, Any], dict[str, Judgement | Skipped]]:
    try:
        lines = out.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line's end was cut short
    except OSError as error:
        raise SaveError(f"{str(out)!r} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(lines[0]) if lines else {}
        if header.get("fastattr_evaluation") != FORMAT:
            raise ValueError(f"its first line is not the header of an evaluation of format {FORMAT}")
        rows = [from_line(line) for line in lines[1:]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SaveError(f"{str(out)!r} does not hold an evaluation: {error}; choose another --out") from error
    return header, {row.id: row for row in rows}  # the last one counts


def _append(out: Path, line: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SaveError(f"{str(out)!r} cannot be written: {error.strerror or error}") from error


def _ordered(header: dict[str, Any], done: dict[str, Judgement | Skipped]) -> Results:
    rows = sorted(done.values(), key=lambda row: (len(row.id), row.id))  # numbers by size
    return Results(
        header,
        tuple(row for row in rows if isinstance(row, Judgement)),
        tuple(row for row in rows if isinstance(row, Skipped)),
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def processor() -> str:
    """What this machine computes with, for headers of results."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
