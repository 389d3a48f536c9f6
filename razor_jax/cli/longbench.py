"""`razor-jax eval longbench`: LongBench's tasks from its published files, dense and Razor on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table as RichTable

from razor_jax.cli import evals
from razor_jax.cli.options import CompressedOptions, ModelOptions, grouped
from razor_jax.cli.terminal import print_table
from razor_jax.evals import longbench as bench
from razor_jax.evals.table import Table


@grouped
def longbench(
    data: Annotated[
        list[Path], typer.Argument(help="LongBench's .jsonl files, v2's data.json, or folders of such files.")
    ],
    max_length: Annotated[
        int | None,
        typer.Option(min=16, help="Longest prompt; its middle is cut out. The model's positions by default."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Records per dataset, the first ones.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="By the chat template; where there is one, as published.")
    ] = None,
    ask: evals.Ask = "after",
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: evals.RowOptions,
    run: evals.RunOptions,
) -> None:
    """Run LongBench v1, LongBench-E and v2 from the published files, with the published prompts and metrics."""
    records = {name: found[:limit] for name, found in bench.read(data).items()}
    job = evals.prepare(model, policy, rows, run)
    params, settings = job.params, job.rows
    prepared = {name: bench.examples(params, name, found, max_length) for name, found in records.items()}
    results = []
    for inside in evals.columns(ask):
        where = "asked inside the prefill" if inside else "asked after compression"
        tables = {}
        for name, made in prepared.items():
            how = bench.options(params, name, chat) | {"question_inside_prefill": inside, "batch": run.batch}
            tables[name] = job.table(f"{name}, {where}", settings, made, **how)
            found = {row.name: bench.scores(tables[name], row.name) for row in settings}
            results.append({"dataset": name, "scores": found, **tables[name].to_dict()})
        if not run.as_json:
            print_table(_summary(tables, where))
    job.finish("longbench", {"max_length": max_length, "limit": limit, "tables": results})


def _summary(tables: dict[str, Table], where: str) -> RichTable:
    """Return points of 100 of each dataset and setting, and their mean over datasets."""
    names = [row.name for row in next(iter(tables.values())).rows]
    table = RichTable("dataset", "questions", *names, title=f"LongBench, {where}", box=box.SIMPLE, title_justify="left")
    found = {dataset: [bench.scores(each, name)["all"] for name in names] for dataset, each in tables.items()}
    for dataset, points in found.items():
        table.add_row(dataset, f"{len(tables[dataset].questions):,}", *(f"{value:.2f}" for value in points))
    if len(found) > 1:
        table.add_row("mean of datasets", "", *(f"{value:.2f}" for value in np.mean(list(found.values()), axis=0)))
    return table
