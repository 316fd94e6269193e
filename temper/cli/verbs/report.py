"""Build the report of a finished study again: CSV, LaTeX, figures and HTML."""

from temper.report.html import main

__all__ = ["main"]
