"""Production logging of attributions: off the request's path, bounded, durable, and counted to the last response.

`AttributionLogger` takes responses in; `read` gives attributions back; `fastattr log` and `fastattr worker` are its
commands. Needs the packages of `pip install ".[log]"`, run in a clone of the repository.
"""

import logging

from fastattr.log.config import LogConfig
from fastattr.log.counting import LogStats
from fastattr.log.drift import Alert
from fastattr.log.logger import AttributionLogger
from fastattr.log.processing import Logged
from fastattr.log.reading import read
from fastattr.log.record import Envelope, Record
from fastattr.log.requests import Submission

logging.getLogger("fastattr").addHandler(logging.NullHandler())

__all__ = ["Alert", "AttributionLogger", "Envelope", "LogConfig", "LogStats", "Logged", "Record", "Submission", "read"]
