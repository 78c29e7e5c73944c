"""Pictures with known truth, from the bundled scenes or a folder, one sample at a time."""

from fastattr.datasets.open import open_dataset
from fastattr.datasets.sample import Dataset, Mention, Sample
from fastattr.datasets.words import FUNCTION_WORDS, function_spans

__all__ = ["FUNCTION_WORDS", "Dataset", "Mention", "Sample", "function_spans", "open_dataset"]
