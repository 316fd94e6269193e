"""What a model will see, before any weights are loaded: rows, lengths, repeats, overlaps."""

from temper.preview.report import look
from temper.preview.rows import Preview
from temper.preview.terminal import print_preview, render_page

__all__ = ["Preview", "look", "print_preview", "render_page"]
