"""`razor-jax bench`: time prefill and decode, dense beside Razor."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from ..evals.bench import Speed, machine, measure
from . import terminal
from .options import CompressedOptions, JsonOption, ModelOptions, grouped
from .terminal import note, print_json


@grouped
def bench(
    context: Annotated[list[int] | None, typer.Option(min=1, help="Prompt length in tokens; repeatable.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 32,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    as_json: JsonOption = False,
) -> None:
    """Time prefill and decode on a random prompt, dense beside Razor, without compilation."""
    params = model.load()
    compressed = policy.compressed(params)
    rows: list[tuple[str, Speed]] = []
    for length in context or [1024]:
        for name, razor in (("dense", None), ("Razor", compressed)):
            with terminal.working(f"{name}, {length:,} tokens"):
                rows.append((name, measure(params, razor, context=length, new_tokens=new_tokens)))
    if as_json:
        found = [{"cache": name, **row.to_dict()} for name, row in rows]
        print_json({"model": model.model, "machine": machine(), "rows": found})
        return
    terminal.print_table(_speed_table(rows))
    note(f"{compressed.describe()}; {', '.join(f'{k} {v}' for k, v in machine().items())}")


def _speed_table(rows: list[tuple[str, Speed]]) -> Table:
    """Return one row per policy and context: rates and bytes with their ratios to the dense row before."""
    table = Table(box=box.SIMPLE)
    for column in ("tokens", "cache", "prefill tok/s", "decode tok/s", "KV MiB", "compiling"):
        table.add_column(column, justify="right", no_wrap=True)
    dense = rows[0][1]
    for name, row in rows:
        dense = row if name == "dense" else dense
        table.add_row(
            f"{row.context:,}",
            name,
            f"{row.context / row.prefill_seconds:,.0f} ({dense.prefill_seconds / row.prefill_seconds:.2f}×)",
            f"{1 / row.decode_seconds:,.1f} ({dense.decode_seconds / row.decode_seconds:.2f}×)",
            f"{row.kv.allocated_bytes / 2**20:,.1f} ({dense.kv.allocated_bytes / row.kv.allocated_bytes:.2f}×)",
            f"{row.compile_seconds:.1f} s",
        )
    return table
