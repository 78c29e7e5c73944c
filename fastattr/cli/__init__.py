"""The command line: `fastattr COMMAND`."""

from fastattr.cli.app import app, main

__all__ = ["app", "main"]
