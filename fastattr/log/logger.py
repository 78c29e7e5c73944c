"""`AttributionLogger`: what a server holds on to. Submitting takes microseconds and never raises; all else is elsewhere."""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import operator
import os
import queue
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from fastattr.chat import Chat, Messages
from fastattr.errors import FastattrError, InputError, SaveError
from fastattr.log import inbox
from fastattr.log.config import LogConfig, make_config
from fastattr.log.counting import Change, Complaints, Counts, LogStats
from fastattr.log.processing import Processor
from fastattr.log.record import Content, check_metadata, check_request_id
from fastattr.log.recorder import Recorder, new_writer
from fastattr.log.requests import (
    Captured,
    Made,
    Replay,
    Request,
    Submission,
    as_images,
    bytes_of,
    prompt_of,
    release,
    response_length,
)
from fastattr.log.sampling import rate_before, share_of
from fastattr.log.segments import open_destination
from fastattr.log.telemetry import Telemetry, caller
from fastattr.types import Attribution

if TYPE_CHECKING:
    from fastattr.adapters import CapturedStates, Model, StateBuffer

logger = logging.getLogger("fastattr")

BACK_OFF_S = (0.05, 5.0)  # first and longest pause after unexpected exceptions on the thread
OUTAGE_S = 10.0  # requests for a worker wait this long for a disk that refuses them

_GIVEN_WHOLE = (Captured, Made)  # written once: a union takes longer to make than to ask


class AttributionLogger:
    """Logs why a model said what it said.

        logger = AttributionLogger("runs/attr", sample_rate=0.01)
        with fastattr.capture(model) as states:
            out = hf_model.generate(**inputs)
        logger.submit(states, out, request_id="r-1", images=[picture], prompt="What is it?")

    For threads, tasks and forked processes alike: each process has a worker thread, a room in the spool and counts of
    its own. What is lost when a process is killed: what waits in memory, which is what the last `sync_s` seconds and
    the queue hold. What is durable is published by the next process that logs there.

    Args:
        destination: a directory or an fsspec URL.
        model: reads replays (`submit_replay`); without one they wait for `fastattr worker`.
        options: as in `LogConfig`, which documents each.

    Raises:
        InputError: an option is unknown or out of range, or the model is not wrapped.
        SaveError: the destination or the spool cannot be written to.
    """

    def __init__(self, destination: str | Path, *, model: Model | None = None, **options: Any) -> None:
        self._open(make_config(destination, options), model)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, model: Model | None = None) -> AttributionLogger:
        """The same from one mapping, as a configuration file holds it, see `LogConfig.from_mapping`."""
        made = cls.__new__(cls)
        made._open(LogConfig.from_mapping(mapping), model)
        return made

    def _open(self, config: LogConfig, model: Model | None) -> None:
        if model is not None:
            from fastattr.adapters import check_model

            check_model(model)
        self.config = config
        self._model = model
        self._destination = open_destination(config.destination, config.storage_options)
        self._destination.check()
        inbox.prepare(config)
        self._buffer: StateBuffer | None = None
        self._reset(closed=False)
        _loggers.add(self)
        atexit.register(_at_exit, weakref.ref(self))

    def _reset(self, *, closed: bool) -> None:
        """A process begins: nothing counted, nothing queued, no thread."""
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._last = _Mark(threading.Event(), last=True, until_s=-math.inf)
        self._counts = Counts()
        self._queue: queue.SimpleQueue[str | _Mark] = queue.SimpleQueue()
        self._queued: dict[str, Request] = {}  # by record id; whoever takes one out settles it
        self._numbers = itertools.count()
        self._starting = threading.RLock()  # a signal handler may shut down in the middle of the start
        self._thread: threading.Thread | None = None
        self._processor: Processor | None = None
        self._telemetry: Telemetry | None = None
        self._writer = new_writer()
        self._complaints = Complaints()
        self._refused_s = math.inf  # when the inbox began to refuse requests

    @property
    def buffer(self) -> StateBuffer:
        """Pages of `capture_bytes` for `fastattr.capture(model, buffer=logger.buffer)`."""
        if self._buffer is None:
            from fastattr.adapters import StateBuffer

            to = self.config.capture_to
            self._buffer = StateBuffer(
                self.config.capture_bytes, place="model" if to == "model" else "cpu", pin_memory=to == "pinned"
            )
        return self._buffer

    # --- submitting: on the request's path -------------------------------------------------------------

    def submit(
        self,
        states: CapturedStates,
        out: Any,
        *,
        request_id: str,
        images: Any = None,
        prompt: str | Messages | Chat | None = None,
        metadata: Mapping[str, Any] | None = None,
        error: bool = False,
    ) -> bool:
        """Queue what `generate` returned and `capture` saw. The states belong to the logger from here on.

        Args:
            out: the sequence `[1 seq]` or the output object of `generate`.
            request_id: yours; decides whether the response is kept.
            images: the pictures, for evidence, boxes in pixels and hashes. They must not be changed afterwards.
            prompt: the user's text or the messages, to tell them from the chat template.
            metadata: JSON values, at most 64 KiB.
            error: something was wrong with this response.

        Returns:
            whether it was queued; where not, `stats()` counts why. Never raises.
        """
        job = Captured(states, out)
        accepted = self._submit(job, request_id, images, prompt, metadata, error)
        if not accepted:
            release(job)
        return accepted

    def submit_replay(
        self,
        messages: str | Messages | Chat,
        images: Any,
        response_ids: Sequence[int],
        *,
        request_id: str,
        prompt_ids: Sequence[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        error: bool = False,
    ) -> bool:
        """Queue what some engine answered, to be explained by a forward of the logger's model, or later by a worker.

        Args:
            messages: the user's text, or a conversation whose image parts stand where `images` belong; a `fastattr.Chat`
                if the engine passed tools or options to its chat template.
            images: the pictures the model was shown.
            response_ids: token ids of the answer, never re-tokenised.
            prompt_ids: ids of the engine's prompt; a replay of any other prompt fails, see `attribute`.
            request_id, metadata, error: as in `submit`.

        Returns:
            whether it was queued. Never raises.
        """
        return self._submit(response_ids, request_id, images, messages, metadata, error, prompt_ids)

    def submit_attribution(
        self,
        why: Attribution,
        *,
        request_id: str,
        images: Any = None,
        metadata: Mapping[str, Any] | None = None,
        error: bool = False,
    ) -> bool:
        """Queue an attribution that exists already. As `submit`."""
        return self._submit(Made(why), request_id, images, None, metadata, error)

    def _submit(
        self, job: Any, request_id: Any, images: Any, prompt: Any, metadata: Any, error: Any, prompt_ids: Any = None
    ) -> bool:
        counts = self._counts
        change, record_id = None, ""
        try:
            if self._closed.is_set():
                counts.refuse("shutdown")
                return False
            given = check_request_id(request_id)
            if not isinstance(job, _GIVEN_WHOLE):
                job = Replay(_ids(job), None if prompt_ids is None else _ids(prompt_ids))
            rate = rate_before(self.config, error=bool(error), n_tokens=response_length(job))
            share = share_of(given) if rate < 1.0 else 0.0  # where all are kept it decides nothing
            if share >= max(rate, self.config.screen_rate):
                counts.refuse("not_sampled")
                return False
            if self._processor is not None and self._processor.recorder.full:
                counts.refuse("spool_full")
                return False
            if metadata:
                check_metadata(metadata)
            if isinstance(job, Made):
                prompt = job.why.prompt
            prompt = prompt if prompt is None else prompt_of(prompt)
            submission = Submission(given, dict(metadata or {}), prompt, as_images(images), self.config.content)
            if self.config.redact is not None:
                redacted = _redacted(self.config, submission, job)
                if not isinstance(redacted, Submission):
                    counts.refuse("redacted" if redacted is None else "redaction_failed")
                    if redacted is not None:
                        self._complaints.say("redact", "a response was dropped: redact failed: %r", redacted)
                    return False
                submission = redacted
            n_bytes = bytes_of(job, submission)
            if self._thread is None and not self._start():
                counts.refuse("shutdown")
                return False
            record_id = f"{self._writer}-{next(self._numbers):010d}"
            request = Request(  # by place: half the time
                record_id,
                submission,
                job,
                time.time_ns(),
                time.monotonic(),
                caller() if self.config.telemetry else None,
                bool(error),
                share,
                rate,
                n_bytes,
            )
            change = Change(submitted=1, in_flight=1, queue_bytes=n_bytes)
            self._queued[record_id] = request
            if not counts.accept(change, self.config.queue_bytes):
                self._queued.pop(record_id, None)
                return False
            self._queue.put(record_id)
            if self._closed.is_set() and not self._is_working():  # shut down while this was on its way
                self._drain()
                return False
            return True
        except BaseException as problem:  # a request must not fail because its log did
            reason = "invalid" if isinstance(problem, FastattrError) else type(problem).__name__
            accepted = False
            with suppress(Exception):  # a stack without room for one more call, for example
                accepted = self._take_back(record_id, change, reason)
                if not accepted:
                    named = request_id[:80] if isinstance(request_id, str) else type(request_id).__name__
                    self._complaints.say(reason, "response %r was not logged: %s", named, problem)
            if isinstance(problem, Exception):
                return accepted
            raise  # Ctrl-C and the end of the process, which are not ours to keep

    def _take_back(self, record_id: str, change: Change | None, reason: str) -> bool:
        """Settle a submission that was interrupted, perhaps by a signal handler. Returns whether it is queued anyway."""
        mine = self._queued.pop(record_id, None)
        if change is None or not self._counts.has(change):
            self._counts.refuse(reason)
        elif mine is not None:
            self._counts.drop(reason, mine.n_bytes)
        else:
            return True
        return False

    def _is_working(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    # --- the worker thread ------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Begin to work, unless it has begun. Returns False after shutdown.

        Raises:
            SaveError, RuntimeError: the room or the thread cannot be made now; the next submission tries again.
        """
        with self._starting:
            if self._thread is not None:
                return True
            if self._closed.is_set():
                return False
            if self.config.telemetry:
                self._telemetry = Telemetry(self.stats, self.config.destination)
            recorder = Recorder(self.config, self._destination, self._writer, self._counts)
            try:
                processor = Processor(self.config, recorder, self._counts, self._telemetry, self._model)
                thread = threading.Thread(target=self._work, args=(processor,), name="fastattr-log", daemon=True)
                thread.start()
            except BaseException:
                recorder.close(0.0, publish=False)
                raise
            self._processor, self._thread = processor, thread
            if self._closed.is_set():  # by a signal handler meanwhile, which found no thread to wait for
                self._finish(self._last, time.monotonic() + self.config.exit_timeout_s, publish=True)
                return False
            return True

    def _work(self, processor: Processor) -> None:
        """Work until shutdown, whatever is raised meanwhile."""
        waiting: list[_Mark] = []
        pause_s = BACK_OFF_S[0]
        while True:
            try:
                if self._step(processor, waiting):
                    return
                pause_s = BACK_OFF_S[0]
            except BaseException as error:
                with suppress(BaseException):  # memory may be short
                    self._counts.thread_failed()
                    self._complaints.say("thread", "the logger goes on after an unexpected %r", error)
                    time.sleep(pause_s)
                pause_s = min(2 * pause_s, BACK_OFF_S[1])

    def _step(self, processor: Processor, waiting: list[_Mark]) -> bool:
        """Take what is queued next, and make durable what is due. Returns whether this was the last step."""
        due_s = processor.due_s
        item: str | _Mark | None
        try:
            item = self._queue.get(timeout=min(due_s, 1.0)) if due_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            item = None
        if isinstance(item, str):
            request = self._queued.pop(item, None)
            if request is not None:  # else the submitter was interrupted and took it back
                self._take(processor, request)
        elif item is not None:
            waiting.append(item)
        elif self._closed.is_set() and self._queue.empty() and not waiting:  # shutdown gave up waiting for this thread
            processor.commit()
            processor.abandon("shutdown")
            processor.recorder.close(0.0, publish=False)
            return True
        if waiting or item is None or processor.due_s <= 0:
            done = processor.commit()
            if done:
                for mark in waiting:
                    mark.done.set()
                if any(mark.last for mark in waiting):
                    return True
                waiting.clear()
            elif waiting:  # the disk refuses; try again while there is time
                waiting[:] = [mark for mark in waiting if not mark.expired]
                time.sleep(0.05)
        return False

    def _take(self, processor: Processor, request: Request) -> None:
        if self._for_worker(request):
            self._hand_over(request)
            release(request.job)
        else:
            processor.process(request)

    def _hand_over(self, request: Request) -> None:
        """Write a request for the worker, again and again where the disk refuses, but not for ever: others wait."""
        pause_s = BACK_OFF_S[0]
        while True:
            now_s = time.monotonic()
            last_try = self._closed.is_set() or now_s - min(self._refused_s, now_s) > OUTAGE_S
            try:
                inbox.put(self.config, request, self._model)
                self._refused_s = math.inf
                break
            except BaseException as error:
                self._refused_s = min(self._refused_s, now_s)
                self._complaints.say("inbox", "a request for the worker could not be written: %s", error)
                if last_try or not isinstance(error, OSError | SaveError | MemoryError):
                    self._counts.fail(type(error).__name__, request.n_bytes)
                    return
            self._closed.wait(pause_s)
            pause_s = min(2 * pause_s, BACK_OFF_S[1])
        self._counts.wrote(1, request.n_bytes, handed_over=True)

    def _for_worker(self, request: Request) -> bool:
        if isinstance(request.job, Made):
            return False
        return self.config.explain == "worker" or (isinstance(request.job, Replay) and self._model is None)

    # --- waiting and ending -----------------------------------------------------------------------------

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything submitted before is durable. Returns whether it is, in time."""
        if not self._is_working():
            return self._counts.stats().in_flight == 0
        mark = _Mark(threading.Event(), last=False, until_s=time.monotonic() + timeout_s)
        self._queue.put(mark)
        return mark.done.wait(timeout_s)

    def shutdown(self, timeout_s: float = 30.0) -> bool:
        """Stop accepting, make everything durable and publish it.

        Returns:
            whether all of it is published in time; what is not stays in the spool for the next start, and what is not
            durable yet is dropped and counted as `shutdown`. A second call does nothing.
        """
        return self._shut(timeout_s, publish=True)

    def _shut(self, timeout_s: float, *, publish: bool) -> bool:
        until_s = time.monotonic() + timeout_s
        with self._starting:
            if self._closed.is_set():
                return True
            self._last = _Mark(threading.Event(), last=True, until_s=until_s)
            self._queue.put(self._last)  # before: a thread that finds the queue empty after shutdown ends by itself
            self._closed.set()
        return self._finish(self._last, until_s, publish=publish)

    def _finish(self, mark: _Mark, until_s: float, *, publish: bool) -> bool:
        """Wait for the thread's end, if it runs. Returns whether everything is published."""
        done = True
        thread, processor = self._thread, self._processor
        if thread is not None and processor is not None:
            done = mark.done.wait(max(0.0, until_s - time.monotonic()))
            if not done:
                self._drain()
            thread.join(max(0.1, until_s - time.monotonic()))
            if not thread.is_alive():  # else it is in the middle of something that takes longer, and ends by itself
                self._drain()
                processor.abandon("shutdown")
                done = processor.recorder.close(max(0.5, until_s - time.monotonic()), publish=publish) and done
        if self._telemetry is not None:
            self._telemetry.close()
        return done

    def _drain(self) -> None:
        """Drop what is still queued."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            request = self._queued.pop(item, None) if isinstance(item, str) else None
            if request is not None:
                self._counts.drop("shutdown", request.n_bytes)
                release(request.job)

    def stats(self) -> LogStats:
        """What became of all submissions of this process, at one moment."""
        return self._counts.stats()

    def __enter__(self) -> AttributionLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"AttributionLogger({self.config.destination!r}, {self.stats()})"


def _ids(given: Any) -> tuple[int, ...]:
    return tuple(given.tolist() if hasattr(given, "tolist") else given)


@dataclass(frozen=True, eq=False)
class _Mark:
    """Something to be told when everything queued before is durable."""

    done: threading.Event
    last: bool
    until_s: float

    @property
    def expired(self) -> bool:
        return time.monotonic() > self.until_s


def _redacted(
    config: LogConfig, submission: Submission, job: Captured | Replay | Made
) -> Submission | Exception | None:
    """What the callback leaves, or what it raised, or what is wrong with what it returned."""
    try:
        left = config.redact(submission) if config.redact is not None else submission
        if left is None:
            return None
        if not isinstance(left, Submission):
            raise InputError(f"redact returned a {type(left).__name__}, expected a Submission or None")
        levels = get_args(Content)
        if left.content not in levels or levels.index(left.content) > levels.index(config.content):
            raise InputError(f"redact returned content={left.content!r}, expected at most {config.content!r}")
        check_metadata(left.metadata)
        images = tuple(left.images)
        same_images = len(images) == len(submission.images) and all(map(operator.is_, images, submission.images))
        if isinstance(job, Replay) and (left.prompt != submission.prompt or not same_images):
            raise InputError("redact changed what the model is to be asked again; the map would be of another answer")
        left = replace(left, request_id=check_request_id(left.request_id), images=images)
        if left.prompt == submission.prompt:
            return left
        # the texts of the context would still tell the prompt
        return replace(left, prompt=None, content="ids" if left.content == "text" else left.content)
    except Exception as error:
        return error


# --- processes ------------------------------------------------------------------------------------------

_loggers: weakref.WeakSet[AttributionLogger] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has no thread of ours, and what is queued or counted is the parent's."""
    for each in list(_loggers):
        if each._processor is not None:
            each._processor.recorder.forget()
        if each._buffer is not None:
            each._buffer.after_fork()
        each._reset(closed=each._closed.is_set())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _at_exit(reference: weakref.ref[AttributionLogger]) -> None:
    """The interpreter ends without `shutdown`: write the local disk, leave remote stores to the next start."""
    each = reference()
    if each is None or each._closed.is_set():
        return
    each._shut(each.config.exit_timeout_s, publish=each._destination.is_local)
    left = each.stats()
    if left.in_flight or left.dropped.get("shutdown"):
        logger.warning("the interpreter ended before shutdown(): %s", left)
