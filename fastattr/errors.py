"""Everything fastattr raises on purpose.

FastattrError
|-- InputError (ValueError)          an argument is wrong
|   |-- ImageError                   an image cannot be read or used
|   |-- TokenLayoutError             positions, grids and token ids do not fit together
|   |-- StatesError                  hidden states or output embeddings are unusable
|   |-- DatasetError                 a dataset, or one sample of it, cannot be read
|   |-- PhraseError (KeyError)       a phrase is not in the response
|   |-- TokenIndexError (IndexError) the response has no token of this index
|   `-- ScaleError                   the image cannot be shown to the model at this scale
|-- UnsupportedModelError            the model's form is not one fastattr can explain
|-- BackendError (RuntimeError)      a backend was asked for by name and cannot run
`-- SaveError (OSError)              a result cannot be written or read
"""

from __future__ import annotations


class FastattrError(Exception):
    """Root of all errors of this package."""


def how_to_install(extra: str) -> str:
    """How to install an optional dependency group, as the end of an error message.

    fastattr is not on a package index, so `pip install fastattr` would fail or install another package.
    """
    return f'in a clone of the fastattr repository run: pip install ".[{extra}]"'


class InputError(FastattrError, ValueError):
    """An argument is wrong."""


class ImageError(InputError):
    """An image cannot be read or used."""


class TokenLayoutError(InputError):
    """Positions, grids and token ids do not fit together."""


class StatesError(InputError):
    """Hidden states or output embeddings are unusable."""


class DatasetError(InputError):
    """A dataset, or one sample of it, cannot be read."""


class PhraseError(InputError, KeyError):
    """A phrase is not in the response."""

    __str__ = Exception.__str__  # KeyError would show the message as a quoted key


class TokenIndexError(InputError, IndexError):
    """The response has no token of this index."""


class UnsupportedModelError(FastattrError):
    """The model's form is not one fastattr can explain."""


class BackendError(FastattrError, RuntimeError):
    """A backend was asked for by name and cannot run."""


class ScaleError(InputError):
    """The image cannot be shown to the model at this scale."""


class SaveError(FastattrError, OSError):
    """A result cannot be written or read."""
