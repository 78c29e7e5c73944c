"""Requests on disk: handed over by servers, explained later by `fastattr worker`, each exactly once.

SPOOL/logger.json                    the configuration of whoever logs here, without secrets
SPOOL/inbox/<record>.<attempt>.request     waiting
SPOOL/inbox/claimed/<writer>/...     taken by the worker with that room; if it dies, another takes them over
SPOOL/inbox/given_up/...             crashed a worker MAX_ATTEMPTS times, or cannot be read or explained
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastattr.chat import read_prompt
from fastattr.config import from_saved
from fastattr.errors import FastattrError, InputError, SaveError
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
        InputError: the spool is in use for another destination.
        SaveError: the directory cannot be written to.
    """
    spool = config.spool_path
    check_destination(config)
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


def check_destination(config: LogConfig) -> None:
    """A spool belongs to one destination: what lies in it is published there, whoever recovers it.

    Raises:
        InputError: the spool was made for another destination.
    """
    path = config.spool_path / CONFIG_FILE
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        other, spool = str(held["destination"]), held.get("spool")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # new, or not to be read: then nobody can say
    moved = spool is None and config.spool_path == Path(config.destination) / "spool"  # together with its destination
    if not moved and _place(other) != _place(config.destination):
        raise InputError(
            f"the spool {str(config.spool_path)!r} belongs to the destination {other!r}, expected one for "
            f"{_without_password(config.destination)!r}; give each destination a spool= of its own"
        )


def _place(destination: str) -> str:
    place = _without_password(destination).rstrip("/")
    return place if "://" in place else os.path.realpath(place)


def _without_password(url: str) -> str:
    """A worker of such a destination needs `--config`."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else url


def inbox_of(spool: Path) -> Path:
    return spool / "inbox"


# --- handing over ---------------------------------------------------------------------------------------


def put(config: LogConfig, request: Request, model: Model | None) -> Path:
    """Write a request, whole and durable.

    Args:
        model: the logger's, which replays are of; None where it has none. Captured states know theirs.

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
    if isinstance(request.job, Captured):
        model = request.job.states.model
    manifest = {
        "job": job,
        "model": None if model is None else _identity(model),
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
    """Requests nobody has claimed, oldest writer's first and in their order. Raises `OSError`."""
    folder = inbox_of(spool)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    yield from (folder / name for name in sorted(names) if name.endswith(SUFFIX) and not name.startswith("."))


def claim(spool: Path, writer: str, but: Container[str] = ()) -> Path | None:
    """Take one waiting request for `writer`, or None where there is none. Two workers never get the same.

    Args:
        but: names of requests to leave.

    Raises:
        OSError: the folders cannot be used now.
    """
    folder = inbox_of(spool) / "claimed" / writer
    for path in waiting(spool):
        if path.name in but:
            continue
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
        InputError: it is of another model.
        SaveError: the file is broken.
        OSError: it cannot be read now.
    """
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise SaveError(f"{str(path)!r} is a folder, expected a request") from error
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        manifest: dict[str, Any] = json.loads(header["__metadata__"]["request"])
        tensors = from_safetensors(data)
        stranger = _of_another_model(manifest, tensors, model)
        if stranger is None:
            return _from_manifest(manifest, tensors, model)
    except (SafetensorError, FastattrError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SaveError(f"{str(path)!r} cannot be read as a request: {error!r}") from error
    raise InputError(f"request {manifest['request_id']!r} {stranger}; start a worker with --model for it")


def _identity(model: Model) -> dict[str, str]:
    return {"name": model.name, "fingerprint": model.fingerprint}


def _of_another_model(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Model) -> str | None:
    """Why a request cannot be of this model, or None."""
    asked = manifest.get("model")  # None where the logger knew of no model
    if asked is not None and asked["fingerprint"] != model.fingerprint:
        return f"is of the model {asked['name']!r}; that of {model.name!r} has other sizes or another vocabulary"
    n_embeddings = model.hf_model.get_input_embeddings().weight.shape[0]
    for name in ("response_ids", "prompt_ids", "sequence"):
        ids = tensors.get(name)
        if ids is not None and ids.numel() and int(ids.max()) >= n_embeddings:
            return f"holds the token id {int(ids.max())}, and the model {model.name!r} has {n_embeddings} tokens"
    return None


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
    record, attempt = parse_name(path)
    tried = attempt + 1
    folder = inbox_of(spool) if tried < MAX_ATTEMPTS else inbox_of(spool) / "given_up"
    folder.mkdir(parents=True, exist_ok=True)
    os.rename(path, folder / f"{record}.{tried}{SUFFIX}")
    return tried < MAX_ATTEMPTS


def parse_name(path: Path) -> tuple[str, int]:
    """Record id and attempts of a request; a name that somebody else gave it is its id, with no attempts."""
    name = path.name.removesuffix(SUFFIX)
    record, _, attempts = name.rpartition(".")
    return (record, int(attempts)) if record and attempts.isdecimal() and attempts.isascii() else (name, 0)


def put_back(path: Path, spool: Path) -> None:
    """A claim goes back to the inbox as it was, for another worker. Raises `OSError`."""
    os.rename(path, inbox_of(spool) / path.name)


def move_aside(path: Path, spool: Path) -> None:
    """Keep a request that cannot be explained, for a person to look at. Raises `OSError`."""
    folder = inbox_of(spool) / "given_up"
    folder.mkdir(parents=True, exist_ok=True)
    os.rename(path, folder / path.name)
