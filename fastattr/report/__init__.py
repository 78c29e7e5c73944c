"""An `Attribution` as something to look at: one HTML file, a notebook cell, a PNG, a single overlay."""

from fastattr.report.page import notebook_html, write_html
from fastattr.report.picture import overlay, write_png

__all__ = ["notebook_html", "overlay", "write_html", "write_png"]
