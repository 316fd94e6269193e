"""Print a plan in a terminal or a log."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.plan.advice import GIB, RESERVE, ChangeResult
from temper.plan.report import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan: shape, memory, step, and whether it fits."""
    console.rule(Text(f"{plan.objective} on {plan.shape}", "bold"))
    for line in _header(plan):
        console.print(Text(line))
    console.print()
    console.print(_memory_table(plan))
    for name, peaks in plan.choices.items():
        sizes = "; ".join(f"{str(on).lower()} {_size(peak)}" for on, peak in peaks.items())
        console.print(Text(f"Peak with {name}: {sizes}"))
    if plan.host:
        console.print(Text(f"Host memory per device: {_size(plan.host)}"))
    console.print()
    console.print(_step_table(plan))
    console.print()
    _print_verdict(plan, console)


def _header(plan: Plan) -> tuple[str, ...]:
    setup = plan.setup
    adapter = ""
    if setup.lora:
        adapter = f", adapter in {'bfloat16' if setup.trained_bytes == 2 else 'float32'}"
    share = 100 * plan.trainable / plan.parameters
    return (
        f"Shape from {plan.source}",
        f"{_devices(plan)}, precision {setup.precision}, weights in"
        f" {setup.quantization or setup.dtype}{adapter}",
        f"{plan.trainable:,} of {plan.parameters:,} parameters are trained ({share:.3g} %)",
        f"Sequences of {setup.sequence_length:,} tokens; {_batches(plan)}",
    )


def _devices(plan: Plan) -> str:
    setup = plan.setup
    plural = "s" if setup.devices > 1 else ""
    names = [name for name in ("optimizer", "parameters") if getattr(setup, f"offload_{name}")]
    offloaded = f", {' and '.join(names)} offloaded" if names else ""
    return f"{setup.devices} device{plural}, strategy {setup.strategy}{offloaded}"


def _batches(plan: Plan) -> str:
    setup = plan.setup
    streams = ", ".join(
        f"{rows} {stream or 'rows'}"
        for stream, rows in setup.batch_sizes.items()
        if stream or len(setup.batch_sizes) == 1
    )
    micro = "no micro-batches"
    if setup.micro_batch_size is not None:
        micro = f"micro-batches of {setup.micro_batch_size} per device"
    return f"{streams} per step over all devices, {micro}"


def _size(size: float | None) -> str:
    if size is None:
        return "impossible"
    if size >= GIB / 10:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / 2**20:,.1f} MiB"


def _memory_table(plan: Plan) -> Table:
    """Components by phases, the peak in bold; only the five largest phases."""
    largest = sorted(plan.phases, key=lambda phase: -phase.total)[:5]
    phases = [phase for phase in plan.phases if phase in largest]
    table = Table(title="Memory of a device, GiB", title_justify="left")
    table.add_column("component")
    for phase in phases:
        table.add_column(phase.name, justify="right", style="bold" if phase is plan.peak else "")
    components = dict.fromkeys(
        name for phase in phases for name, size in phase.components.items() if size
    )
    for name in components:
        table.add_row(name, *(f"{phase.components.get(name, 0) / GIB:,.3f}" for phase in phases))
    table.add_section()
    table.add_row("total", *(f"{phase.total / GIB:,.3f}" for phase in phases))
    return table


def _step_table(plan: Plan) -> Table:
    communication = plan.communication
    device = plan.device
    table = Table(title="An optimizer step", title_justify="left", show_header=False)
    rows = {
        "passes over a batch": f"{plan.work.passes:,.3g}",
        "tokens of all passes": f"{plan.work.tokens:,.0f}",
        "floating-point operations": f"{plan.work.flops:,.3g}",
        "time": (
            f"{plan.seconds:,.3g} s at {device.mfu:.0%} of {device.tflops:,.4g} TFLOP/s per device,"
            " communication overlapped"
        ),
        "gradient reductions": f"{communication.reductions:,.3g}",
        "gathers of weights": f"{communication.gathers:,.3g}",
        "sent by each device": _size(communication.bytes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    peak = (
        f"peak {_size(plan.peak.total)} ({plan.peak.name}) of {plan.device.gib:g} GiB, of which"
        f" {RESERVE:.0%} are kept in reserve"
    )
    if plan.fits:
        console.print(Text(f"Fits: {peak}.", "bold green"))
        return
    console.print(Text(f"Does not fit: {peak}.", "bold red"))
    if plan.changes and plan.changes[-1].fits:
        several = len(plan.changes) > 1
        console.print(Text("Change all of these, in this order:" if several else "Change:"))
        for change in plan.changes:
            console.print(Text(f"  {_describe(change)}"))
    else:
        console.print(Text("No known change makes it fit: use a smaller model or more devices."))
    others = [change for change in plan.tried if change not in plan.changes]
    if others:
        console.print(Text("Other changes, each on its own:"))
        for change in others:
            console.print(Text(f"  {_describe(change)}"))


def _describe(change: ChangeResult) -> str:
    fits = ", fits" if change.fits else ""
    result = "" if change.same_result else ", changes the result of training"
    return f"{change.setting}: {_size(change.peak)}{fits}{result}"
