"""Are the maps right, are they causal, and does anything catch invention? A dataset in, figures with intervals out."""

from fastattr.config import METHODS, method_of
from fastattr.evaluate.judgement import Hiding, Judgement, Said, Skipped
from fastattr.evaluate.judging import Settings, judge
from fastattr.evaluate.running import Results, Task, read, run
from fastattr.evaluate.tables import summary

__all__ = [
    "METHODS",
    "Hiding",
    "Judgement",
    "Results",
    "Said",
    "Settings",
    "Skipped",
    "Task",
    "judge",
    "method_of",
    "read",
    "run",
    "summary",
]
