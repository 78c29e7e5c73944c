"""The dashboard: `fastattr log serve DIR`, a small local web app that only reads."""

from fastattr.log.dashboard.app import create_app, serve

__all__ = ["create_app", "serve"]
