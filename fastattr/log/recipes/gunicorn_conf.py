"""Settings of gunicorn for `gunicorn_preload`. A file of its own: gunicorn imports it before the application."""

from __future__ import annotations

from typing import Any

bind = "127.0.0.1:8000"
preload_app = True  # the model and the logger are made once, then workers are forked
workers = 2
graceful_timeout = 30  # seconds for the last request, and for the logger to publish


def worker_exit(server: Any, worker: Any) -> None:
    """A forked worker may skip `atexit`, so that its logger is shut down here."""
    if worker.booted:
        worker.wsgi.logger.shutdown(timeout_s=20)
