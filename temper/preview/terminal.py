"""Output of a preview: printed in a terminal or a log, and rendered as an HTML page."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from temper.preview.rows import Histogram, Preview, Role, Row, Stream, TextSpan

# -- terminal

STYLES: dict[Role, str] = {
    "prompt": "cyan",
    "trained": "bold green",
    "masked": "magenta",
    "gap": "dim italic",
}
# Where there are no colours.
BRACKETS: dict[Role, tuple[str, str]] = {
    "prompt": ("", ""),
    "trained": ("«", "»"),
    "masked": ("‹", "›"),
    "gap": ("", ""),
}
LEGEND: dict[Role, str] = {
    "prompt": "prompt",
    "trained": "trained response",
    "masked": "masked after it",
}
BAR_WIDTH = 40  # columns of the longest bar


def print_preview(preview: Preview, console: Console) -> None:
    """Print a preview; roles are colours if the console has them, otherwise brackets."""
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    console.rule(Text(preview.title, "bold"))
    for fact in preview.facts:
        console.print(Text(fact))
    legend = [_spans_as_text([TextSpan(name, role)], coloured) for role, name in LEGEND.items()]
    if coloured:
        legend.append(Text("special token", "reverse"))
    console.print(Text.assemble("Shown as: ", Text(", ").join(legend)))
    for stream in preview.streams:
        _print_stream(stream, console, coloured)
    _print_section("Overlaps of prompts", preview.overlaps, console)
    _print_section("Reports of the data", preview.reports, console)


def _print_section(title: str, lines: tuple[tuple[str, str], ...], console: Console) -> None:
    if lines:
        console.rule(Text(title, "bold"))
    for name, description in lines:
        console.print(Text.assemble((name, "bold"), ": ", description))


def _print_stream(stream: Stream, console: Console, coloured: bool) -> None:
    console.print()
    console.rule(Text(stream.name, "bold"))
    for fact in stream.facts:
        console.print(Text(fact))
    for row in stream.rows:
        console.print()
        _print_row(row, console, coloured)
    for histogram in stream.histograms:
        console.print()
        console.print(_histogram_as_text(histogram))


def _print_row(row: Row, console: Console, coloured: bool) -> None:
    columns = f" ({row.columns})" if row.columns else ""
    console.print(Text(f"row {row.number}{columns}", "bold"))
    for sequence in row.sequences:
        name = f"{sequence.name}: " if sequence.name else ""
        trained = f", {sequence.n_trained} trained" if sequence.n_trained else ""
        console.print(Text(f"{name}{sequence.n_tokens} tokens{trained}", "dim"))
        console.print(_spans_as_text(sequence.spans, coloured), soft_wrap=True)


def _spans_as_text(spans: Sequence[TextSpan], coloured: bool) -> Text:
    # Text objects, so that brackets in a user's data are not read as rich's markup.
    if coloured:
        styled = (
            Text(span.text, STYLES[span.role] + (" reverse" if span.special else ""))
            for span in spans
        )
        return Text.assemble(*styled)
    text = ""
    for role, group in groupby(spans, lambda span: span.role):
        begin, end = BRACKETS[role]
        text += begin + "".join(span.text for span in group) + end
    return Text(text)


def _histogram_as_text(histogram: Histogram) -> Text:
    highest = max(count for _, count in histogram.bars)
    width = max(len(label) for label, _ in histogram.bars)
    lines = [f"{histogram.title}, mean {histogram.mean:.1f}"]
    for label, count in histogram.bars:
        bar = "█" * -(-count * BAR_WIDTH // highest)
        lines.append(f"{label:>{width}} {bar:<{BAR_WIDTH}} {count:,}")
    return Text("\n".join(lines))


# -- HTML page

HERE = Path(__file__).parent


def render_page(preview: Preview) -> str:
    """Render a preview as one self-contained HTML page; text from the data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(preview=preview, style=style)
