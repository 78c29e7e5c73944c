"""An `Attribution` as something to look at: one HTML file, a notebook cell, a figure, a table, a PNG, a single overlay."""

from fastattr.report.notebook import plot, plot_tokens, selection_html, selection_png, to_frame
from fastattr.report.page import notebook_html, page_html, write_html
from fastattr.report.picture import overlay, write_png

__all__ = [
    "notebook_html",
    "overlay",
    "page_html",
    "plot",
    "plot_tokens",
    "selection_html",
    "selection_png",
    "to_frame",
    "write_html",
    "write_png",
]
