"""Whole data sets: every row explained once, whatever dies meanwhile.

The shard is the unit of work and of commit: one Parquet object in the log's schema, published in one step. `run` goes on
where an earlier call ended; `fastattr log` reads the output. Needs the packages of `pip install ".[log]"`, run in a clone
of the repository; on a cluster those of `".[ray]"`.
"""

from fastattr.batch.output import Failure, Reason
from fastattr.batch.ray_data import RayExplainer
from fastattr.batch.running import Progress, Summary, run
from fastattr.batch.sources import Fields

__all__ = ["Failure", "Fields", "Progress", "RayExplainer", "Reason", "Summary", "run"]
