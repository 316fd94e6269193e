"""A preview in a terminal, or in a log."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from temper.preview.rows import Histogram, Piece, Preview, Role, Row, Stream

STYLES: dict[Role, str] = {
    "prompt": "cyan",
    "trained": "bold green",
    "masked": "magenta",
    "gap": "dim italic",
}
# Where there are no colours.
MARKS: dict[Role, tuple[str, str]] = {
    "prompt": ("", ""),
    "trained": ("«", "»"),
    "masked": ("‹", "›"),
    "gap": ("", ""),
}
WORDS: dict[Role, str] = {
    "prompt": "prompt",
    "trained": "trained response",
    "masked": "masked after it",
}
BAR = 40  # columns of the longest bar


def print_preview(preview: Preview, console: Console) -> None:
    """Print everything; colours where the console has them, else brackets."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    console.rule(Text(preview.title, "bold"))
    for fact in preview.facts:
        console.print(Text(fact))
    legend = [_text([Piece(words, role)], coloured) for role, words in WORDS.items()]
    if coloured:
        legend.append(Text("special token", "reverse"))
    console.print(Text.assemble("Shown as: ", Text(", ").join(legend)))
    for stream in preview.streams:
        _print_stream(stream, console, coloured)
    for title, lines in (
        ("Overlaps of prompts", preview.overlaps),
        ("Reports of the data", preview.reports),
    ):
        if lines:
            console.rule(Text(title, "bold"))
        for name, words in lines:
            console.print(Text.assemble((name, "bold"), ": ", words))


def _print_stream(stream: Stream, console: Console, coloured: bool) -> None:
    console.print()
    console.rule(Text(stream.name, "bold"))
    for fact in stream.facts:
        console.print(Text(fact))
    for row in stream.rows:
        console.print()
        _print_row(row, console, coloured)
    for bars in stream.histograms:
        console.print()
        console.print(_bars(bars))


def _print_row(row: Row, console: Console, coloured: bool) -> None:
    console.print(Text(f"row {row.number}" + (f" ({row.marks})" if row.marks else ""), "bold"))
    for shown in row.sequences:
        trained = f", {shown.n_trained} trained" if shown.n_trained else ""
        head = Text(
            f"{shown.name}{': ' if shown.name else ''}{shown.n_tokens} tokens{trained}", "dim"
        )
        console.print(head)
        console.print(_text(shown.pieces, coloured), soft_wrap=True)


def _text(parts: Sequence[Piece], coloured: bool) -> Text:
    # Text objects: what stands in brackets in a user's text is no markup.
    if coloured:
        return Text.assemble(
            *(
                Text(piece.text, STYLES[piece.role] + (" reverse" if piece.special else ""))
                for piece in parts
            )
        )
    runs = (
        (MARKS[role], "".join(piece.text for piece in run))
        for role, run in groupby(parts, lambda piece: piece.role)
    )
    return Text("".join(f"{begin}{text}{end}" for (begin, end), text in runs))


def _bars(bars: Histogram) -> Text:
    highest, width = max(count for _, count in bars.bars), max(len(words) for words, _ in bars.bars)
    lines = [f"{bars.title}, mean {bars.mean:.1f}"]
    lines += [
        f"{words:>{width}} {'█' * -(-count * BAR // highest):<{BAR}} {count:,}"
        for words, count in bars.bars
    ]
    return Text("\n".join(lines))


# MERGED from temper.preview.terminal: A preview as one page that needs nothing from outside.


HERE = Path(__file__).parent


def render_page(preview: Preview) -> str:
    """Write the page; everything that comes from the data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(preview=preview, style=style)
