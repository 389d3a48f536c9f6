"""`razor-jax reproduce`: confirm or refute the paper on a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table

import razor_jax
from razor_jax.checkpoint.hub import find
from razor_jax.cli import terminal
from razor_jax.cli.options import Dtype, JsonOption, ModelName, check_output
from razor_jax.cli.terminal import note
from razor_jax.evals import reproduce as steps
from razor_jax.evals.journal import Journal
from razor_jax.evals.provenance import provenance, write_json


def reproduce(
    model: ModelName = "razor-mini",
    preset: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: a minute of razor-mini. full: an 8B, an hour of a GPU or TPU."),
    ] = "quick",
    tokens: Annotated[int | None, typer.Option(min=256, help="Tokens of a document, instead of the preset's.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents, instead of the preset's.")] = None,
    dtype: Dtype = "auto",
    output: Annotated[
        Path, typer.Option("--out", help="JSON; records beside it, from which a run that was stopped goes on.")
    ] = Path("reproduce.json"),
    as_json: JsonOption = False,
) -> None:
    """Measure the paper's claims on a checkpoint: heads, needle, memory, speed, and a verdict for each claim.

    Exit code 0 whatever the verdicts; 1 if a stage could not be run.
    """
    check_output("--out", output, file=True)
    records = output.with_suffix(".jsonl")
    if records == output:
        raise typer.BadParameter(
            f"--out {output}: the records are there; give another name, such as {output.stem}.json"
        )
    size = steps.PRESETS[preset]
    given = {name: value for name, value in (("tokens", tokens), ("documents", documents)) if value is not None}
    size = dataclasses.replace(size, **given)
    folder = find(model)
    with terminal.working(f"loading {model}") as progress:
        params = razor_jax.load(folder, dtype=dtype, heads=None, progress=progress)
    if params.config.alibi:
        raise ValueError("these claims are about models with rotary embedding: an ALiBi model has scopes, not heads")
    if size.tokens > params.config.max_position_embeddings:
        raise ValueError(
            f"documents of {size.tokens:,} tokens, but the model has {params.config.max_position_embeddings:,} "
            "positions: give --tokens"
        )
    found = steps.reproduce(params, folder, size, Journal(records), note)
    content = {"about": provenance(params, model), **found}
    note(f"saved {write_json(output, content)}")
    if as_json:
        terminal.print_json(content)
    else:
        _show(found["claims"])
    if found["failed"]:
        raise RuntimeError("; ".join(f"{stage} could not be run: {why}" for stage, why in found["failed"].items()))


def _show(claims: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="RazorAttention's claims on this checkpoint", box=box.SIMPLE, title_justify="left")
    for column in ("claim", "asked for", "measured", "verdict", "why"):
        table.add_column(column)
    for claim in claims:
        measured = claim["measured"]
        interval = "" if claim["low"] == claim["high"] else f" ({claim['low']:.1f}…{claim['high']:.1f})"
        table.add_row(
            claim["says"],
            f"{claim['threshold']:g} {claim['measure']}",
            "" if measured is None else f"{measured:.1f}{interval}",
            claim["verdict"],
            claim["why"],
        )
    terminal.print_table(table)
