"""Requests on disk: handed over by servers, explained later by `fastattr worker`, each exactly once.

SPOOL/logger.json                    the configuration of whoever logs here, without secrets
SPOOL/inbox/<record>.<attempt>.request     waiting
SPOOL/inbox/claimed/<writer>/...     taken by the worker with that room; if it dies, another takes them over
SPOOL/inbox/given_up/...             crashed a worker MAX_ATTEMPTS times
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastattr.chat import read_prompt
from fastattr.config import from_saved
from fastattr.errors import InputError, SaveError
from fastattr.images import Visual
from fastattr.log.config import Images, LogConfig
from fastattr.log.requests import Captured, Made, Replay, Request, Submission, bytes_of, digest, from_json, to_json
from fastattr.log.spool import make_private_folder, sync_folder
from fastattr.log.telemetry import Caller
from fastattr.storage import whole_file
from fastattr.video import Timing

if TYPE_CHECKING:
    from fastattr.adapters import Model

MAX_ATTEMPTS = 3
SUFFIX = ".request"
CONFIG_FILE = "logger.json"
_UNWRITTEN = ("storage_options", "redact", "on_record", "on_alert")


def prepare(config: LogConfig) -> None:
    """Make the spool directory and leave the configuration there for a worker.

    Raises:
        SaveError: the directory cannot be written to.
    """
    spool = config.spool_path
    values = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _UNWRITTEN}
    values["attribution"] = asdict(config.explained_by)
    values["destination"] = _without_password(config.destination)
    try:
        if not spool.is_dir():  # one that is there may hold other things, and be read by others
            make_private_folder(spool)
        make_private_folder(inbox_of(spool))
    except OSError as error:
        raise SaveError(
            f"the spool {str(spool)!r} cannot be made: {error.strerror or error}; choose a local directory that is writable "
            "with spool="
        ) from error
    with whole_file(spool / CONFIG_FILE, private=True) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def read_config(spool: Path) -> LogConfig:
    """What `prepare` left.

    Raises:
        InputError: it is not there or broken.
    """
    path = spool / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "attribution" in values:
            values["attribution"] = from_saved(values["attribution"])
        return LogConfig.from_mapping(values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read: {error}; give the spool directory that a logger uses, or --config FILE"
        ) from error


def _without_password(url: str) -> str:
    """A worker of such a destination needs `--config`."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else url


def inbox_of(spool: Path) -> Path:
    return spool / "inbox"


# --- handing over ---------------------------------------------------------------------------------------


def put(config: LogConfig, request: Request) -> Path:
    """Write a request, whole and durable.

    Raises:
        InputError, ImageError: it cannot be written down.
        SaveError: the disk refuses.
    """
    tensors, job = _job_tensors(request)
    images = request.submission.images
    visuals = read_prompt(list(images), request.submission.prompt or "")[0] if images else ()
    for i, visual in enumerate(visuals):
        for t, frame in enumerate(visual.frames):
            tensors[f"image.{i}.{t}"] = torch.from_numpy(np.array(frame))
    caller = request.caller
    manifest = {
        "job": job,
        "record_id": request.record_id,
        "request_id": request.submission.request_id,
        "metadata": request.submission.metadata,
        "prompt": to_json(request.submission.prompt),
        "content": request.submission.content,
        "frames": [len(visual.frames) for visual in visuals],
        "timing": [None if visual.timing is None else asdict(visual.timing) for visual in visuals],
        "picture_notes": [visual.notes for visual in visuals],
        "keep_images": config.images,
        "image_sha256": [] if config.images == "none" else [digest(image) for image in images],
        "time_ns": request.time_ns,
        "caller": None if caller is None else asdict(caller),
        "error": request.error,
        "share": request.share,
        "rate": request.rate,
    }
    data = to_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"request": json.dumps(manifest)},
    )
    path = inbox_of(config.spool_path) / f"{request.record_id}.0{SUFFIX}"
    with whole_file(path, private=True) as file:
        file.write(data)
    try:
        sync_folder(path.parent)
    except OSError as error:
        try:
            path.unlink()  # what is reported as failed must not be found later
        except OSError:  # a worker has it already, or it cannot be taken back
            return path
        raise SaveError(f"{str(path)!r} cannot be made durable: {error.strerror or error}; check the disk") from error
    return path


def _job_tensors(request: Request) -> tuple[dict[str, Tensor], str]:
    job = request.job
    if isinstance(job, Replay):
        named = {"response_ids": job.response_ids, "prompt_ids": job.prompt_ids}
        tensors = {k: torch.tensor(v, dtype=torch.long, device="cpu") for k, v in named.items() if v is not None}
        return tensors, "replay"
    if isinstance(job, Made):
        raise InputError("an attribution that exists needs no worker")
    states = job.states
    if states.n_prompts > 1:
        raise InputError(f"generate was given {states.n_prompts} prompts at once, expected one")
    sequences = job.out if isinstance(job.out, Tensor) else getattr(job.out, "sequences", None)
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or len(sequences) != 1:
        raise InputError(f"generate returned {type(job.out).__name__}, expected one sequence [1 seq]")
    prompt_ids = states.prompt()
    sequence = sequences[0].to(prompt_ids.device)
    n = states.n_spoken(sequence)  # end tokens may be arguments of `generate`, which the worker does not have
    tensors = {"prompt_ids": prompt_ids.clone(), "sequence": sequence[:n]}
    tensors |= {f"input.{name}": value for name, value in states.model_inputs.items()}
    if states.matches(sequence):  # else the worker reads them again
        tensors["hidden"] = states.read(sequence)[0][: n - 1]
    return tensors, "captured"


# --- taking over ----------------------------------------------------------------------------------------


def waiting(spool: Path) -> Iterator[Path]:
    """Requests nobody has claimed, oldest writer's first and in their order."""
    yield from sorted(inbox_of(spool).glob(f"*{SUFFIX}"))


def claim(spool: Path, writer: str) -> Path | None:
    """Take one waiting request for `writer`, or None where there is none. Two workers never get the same."""
    folder = inbox_of(spool) / "claimed" / writer
    for path in waiting(spool):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(path, folder / path.name)
        except FileNotFoundError:  # another worker was faster
            continue
        return folder / path.name
    return None


def read_request(path: Path, model: Model) -> Request:
    """What `put` wrote.

    Raises:
        SaveError: the file is broken.
    """
    try:
        with safe_open(path, framework="pt") as file:
            manifest: dict[str, Any] = json.loads((file.metadata() or {})["request"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _from_manifest(manifest, tensors, model)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SaveError(f"{str(path)!r} cannot be read as a request: {error!r}") from error


def _from_manifest(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Model) -> Request:
    images = tuple(
        Visual(
            tuple(Image.fromarray(tensors[f"image.{i}.{t}"].numpy()) for t in range(n)),
            timing=None if timing is None else Timing(timing["fps"], tuple(timing["indices"]), timing["total"]),
            notes=tuple(notes),
        )
        for i, (n, timing, notes) in enumerate(
            zip(manifest["frames"], manifest["timing"], manifest["picture_notes"], strict=True)
        )
    )
    submission = Submission(
        manifest["request_id"], manifest["metadata"], from_json(manifest["prompt"]), images, manifest["content"]
    )
    keep_images = manifest.get("keep_images")  # requests of earlier versions go by the worker's configuration
    if keep_images not in (None, *get_args(Images)):
        raise ValueError(f"keep_images is {keep_images!r}")
    job = _read_job(manifest, tensors, model)
    caller = manifest["caller"]
    waited_s = max(0.0, (time.time_ns() - manifest["time_ns"]) / 1e9)
    return Request(
        record_id=manifest["record_id"],
        submission=submission,
        job=job,
        time_ns=manifest["time_ns"],
        queued_s=time.monotonic() - waited_s,
        caller=None if caller is None else Caller(**caller),
        error=manifest["error"],
        share=manifest["share"],
        rate=manifest["rate"],
        n_bytes=bytes_of(job, submission),
        image_sha256=tuple(manifest["image_sha256"]),
        keep_images=keep_images,
    )


def _read_job(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Model) -> Captured | Replay:
    from fastattr.adapters import CapturedStates

    if manifest["job"] == "replay":
        prompt_ids = tensors.get("prompt_ids")
        return Replay(
            tuple(tensors["response_ids"].tolist()), None if prompt_ids is None else tuple(prompt_ids.tolist())
        )
    states = CapturedStates(model)
    states.prompt_ids = tensors["prompt_ids"].to(model.device)
    sequence = tensors["sequence"].to(model.device)
    states.model_inputs = {
        name.removeprefix("input."): tensor.to(model.device)
        for name, tensor in tensors.items()
        if name.startswith("input.")
    }
    states.fed = [sequence[None, :-1]]
    if "hidden" in tensors:
        states.hidden = tensors["hidden"].to(model.device)
    return Captured(states, sequence[None])


def hand_back(path: Path, spool: Path) -> bool:
    """A claim of a worker that died goes back to the inbox, or is given up after `MAX_ATTEMPTS`.

    Returns:
        whether it waits again.
    """
    record, attempt = path.name.removesuffix(SUFFIX).rsplit(".", 1)
    tried = int(attempt) + 1
    folder = inbox_of(spool) if tried < MAX_ATTEMPTS else inbox_of(spool) / "given_up"
    folder.mkdir(parents=True, exist_ok=True)
    os.rename(path, folder / f"{record}.{tried}{SUFFIX}")
    return tried < MAX_ATTEMPTS
