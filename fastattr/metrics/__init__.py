"""How a map is judged. Here are the figures that need only maps and masks; import the other modules by name."""

from fastattr.metrics.bootstrap import Interval, paired_bootstrap
from fastattr.metrics.plausibility import (
    LEVELS,
    Noun,
    NounScores,
    Plausibility,
    difference,
    f1_difference,
    f1_iou,
    func_iou,
    noun_scores,
    obj_iou,
    otsu_threshold,
    plausibility,
    pool,
    quantise,
)

__all__ = [
    "LEVELS",
    "Interval",
    "Noun",
    "NounScores",
    "Plausibility",
    "difference",
    "f1_difference",
    "f1_iou",
    "func_iou",
    "noun_scores",
    "obj_iou",
    "otsu_threshold",
    "paired_bootstrap",
    "plausibility",
    "pool",
    "quantise",
]
