"""A plan in a terminal, or in a log."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.plan.report import RESERVE, Plan, Tried, gib


def print_plan(plan: Plan, console: Console) -> None:
    """Print everything."""
    setup = plan.setup
    console.rule(Text(f"{plan.objective} on {plan.shape}", "bold"))
    adapter = ""
    if setup.lora:
        adapter = f", adapter in {'bfloat16' if setup.trained_bytes == 2 else 'float32'}"
    for words in (
        f"Shape from {plan.source}",
        (
            f"{_devices(plan)}, precision {setup.precision}, weights in"
            f" {setup.quantization or setup.dtype}{adapter}"
        ),
        (
            f"{plan.trainable:,} of {plan.parameters:,} parameters learn"
            f" ({100 * plan.trainable / plan.parameters:.3g} %)"
        ),
        f"Rows of {setup.sequence_length:,} tokens; {_rows(plan)}",
    ):
        console.print(Text(words))
    console.print()
    console.print(_memory(plan))
    for name, found in plan.choices.items():
        console.print(
            Text(
                f"Peak with {name}: "
                + "; ".join(f"{str(on).lower()} {_size(size)}" for on, size in found.items())
            )
        )
    if plan.host:
        console.print(Text(f"In the host's memory, per device: {_size(plan.host)}"))
    console.print()
    console.print(_figures(plan))
    console.print()
    _print_verdict(plan, console)


def _devices(plan: Plan) -> str:
    setup = plan.setup
    offload = [name for name in ("optimizer", "parameters") if getattr(setup, f"offload_{name}")]
    away = f", {' and '.join(offload)} offloaded" if offload else ""
    return (
        f"{setup.devices} device{'s' if setup.devices > 1 else ''}, strategy {setup.strategy}{away}"
    )


def _rows(plan: Plan) -> str:
    setup = plan.setup
    streams = ", ".join(
        f"{rows} {stream or 'rows'}"
        for stream, rows in setup.batch_sizes.items()
        if stream or len(setup.batch_sizes) == 1
    )
    micro = (
        "all at once" if setup.micro_batch_size is None else f"{setup.micro_batch_size} at a time"
    )
    return f"in a step {streams} over all devices, on each {micro}"


def _size(size: float | None) -> str:
    return (
        "impossible"
        if size is None
        else f"{gib(size):,.2f} GiB"
        if size >= 2**30 / 10
        else f"{size / 2**20:,.1f} MiB"
    )


def _memory(plan: Plan) -> Table:
    """Parts by moments; the fullest in bold. Moments that are nowhere near it are left out where
    there are many.
    """
    shown = sorted(plan.moments, key=lambda moment: -moment.total)[:5]
    moments = [moment for moment in plan.moments if moment in shown]
    table = Table(title="Memory of a device, GiB", title_justify="left")
    table.add_column("part")
    for moment in moments:
        table.add_column(moment.name, justify="right", style="bold" if moment is plan.peak else "")
    parts = dict.fromkeys(part for moment in moments for part, size in moment.parts.items() if size)
    for part in parts:
        table.add_row(part, *(f"{gib(moment.parts.get(part, 0)):,.3f}" for moment in moments))
    table.add_section()
    table.add_row("all", *(f"{gib(moment.total):,.3f}" for moment in moments))
    return table


def _figures(plan: Plan) -> Table:
    talk, device = plan.communication, plan.device
    table = Table(title="An optimizer step", title_justify="left", show_header=False)
    rows = {
        "passes over a batch": f"{plan.work.passes:,.3g}",
        "tokens of all passes": f"{plan.work.tokens:,.0f}",
        "floating-point operations": f"{plan.work.flops:,.3g}",
        "time": (
            f"{plan.seconds:,.3g} s at {device.mfu:.0%} of {device.tflops:,.4g} TFLOP/s per device,"
            " communication hidden"
        ),
        "gradient reductions": f"{talk.reductions:,.3g}",
        "gathers of weights": f"{talk.gathers:,.3g}",
        "sent by a device": _size(talk.bytes),
    }
    for name, words in rows.items():
        table.add_row(name, words)
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    device = plan.device
    found = (
        f"{_size(plan.peak.total)} at its peak ({plan.peak.name}), and a device has {device.gib:g}"
        f" GiB, of which {RESERVE:.0%} stay free"
    )
    if plan.fits:
        console.print(Text(f"Fits: {found}.", "bold green"))
        return
    console.print(Text(f"Does not fit: {found}.", "bold red"))
    if plan.changes and plan.changes[-1].fits:
        console.print(
            Text("Change: " if len(plan.changes) == 1 else "Change, one after the other:")
        )
        for change in plan.changes:
            console.print(Text(f"  {_words(change)}"))
    else:
        console.print(
            Text(
                "No change that is known here makes it fit: take a smaller model, or more devices."
            )
        )
    others = [change for change in plan.tried if change not in plan.changes]
    if others:
        console.print(Text("Others, each on its own:"))
        for change in others:
            console.print(Text(f"  {_words(change)}"))


def _words(change: Tried) -> str:
    result = "" if change.keeps else ", which changes the result"
    return f"{change.words}: {_size(change.peak)}{', fits' if change.fits else ''}{result}"
