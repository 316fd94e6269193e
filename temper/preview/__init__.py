"""Preview of training data before any weights are loaded: rows, lengths, repeats and overlaps."""

from temper.preview.report import build_preview
from temper.preview.rows import Preview
from temper.preview.terminal import print_preview, render_page

__all__ = ["Preview", "build_preview", "print_preview", "render_page"]
