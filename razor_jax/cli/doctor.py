"""`razor-jax doctor`: what runs on this device, whether it is right, and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import Report, Speeds, examine
from ..evals.provenance import write_json
from . import terminal
from .options import check_output
from .terminal import fail, note


def doctor(
    interpret: Annotated[
        bool, typer.Option("--interpret", help="On a CPU: also interpret the TPU and GPU kernels, on tiny shapes.")
    ] = False,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Time decode attention too.")] = True,
    report: Annotated[Path | None, typer.Option("--json", help="Write the report here, to send.")] = None,
) -> None:
    """Check the kernels that this device runs against float64, and time them. Exit code 1 if one is wrong."""
    if report is not None:
        check_output("--json", report, file=True)
    with terminal.working("examining") as progress:
        found = examine(interpret=interpret, timed=timed, progress=progress)
    show(found, Console())
    if report is not None:
        write_json(report, found.to_dict())
        note(f"written to {report}")
    if found.failed:
        names = sorted({each.implementation for each in found.failed})
        ask = "report it with this file" if report else "`razor-jax doctor --json report.json` writes a report to send"
        fail(f"{len(found.failed)} of {len(found.checks)} checks of {', '.join(names)} failed: {ask}")
        raise typer.Exit(1)


def show(found: Report, console: Console) -> None:
    """Print the tables of a report."""
    memory = found.machine["memory_bytes"]
    facts = found.machine | {"memory_bytes": memory and f"{memory / 2**30:,.2f} GiB"}
    _print(console, [(name, str(value)) for name, value in facts.items() if value is not None], ("machine", ""))
    _print(console, found.rows, found.header)
    reasons = {why: None for choice in found.choices if choice.implementation == "xla" for why in [choice.why]}
    for why in reasons:
        kernels = [f"{c.model} {c.kernel}" for c in found.choices if c.why == why]
        where = "everything" if len(kernels) == len(found.choices) else "; ".join(kernels)
        console.print(f"XLA runs {where}: {why}", markup=False, highlight=False)
    if found.speeds is not None:
        _print(console, [row.cells(found.speeds) for row in found.speeds.rows], found.speeds.header)
        console.print(found.speeds.setting, markup=False, highlight=False)
    right = len(found.checks) - len(found.failed)
    console.print(f"{right} of {len(found.checks)} checks are right", highlight=False)


def _print(console: Console, rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    table = Table(box=box.SIMPLE)
    for column in header:
        right = column in ("error", "limit", *Speeds.header[2:])
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
