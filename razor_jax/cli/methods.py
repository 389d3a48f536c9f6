"""`razor-jax eval methods`: other cache methods beside Razor, at equal bytes."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from razor_jax.cli.evals import RunOptions, bad_method, check_methods, progress_bar, require_positions
from razor_jax.cli.options import CompressedOptions, ModelOptions, grouped
from razor_jax.cli.terminal import note, print_json, print_table
from razor_jax.evals import methods as study
from razor_jax.evals import plots
from razor_jax.evals.haystack import Haystack
from razor_jax.evals.journal import Journal
from razor_jax.evals.needle import Grid
from razor_jax.evals.provenance import provenance, write_results
from razor_jax.methods import METHODS


@grouped
def methods(
    budget: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=1.0, help="Share of a dense cache's bytes; by default that of Razor; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS)}, with fields as in snapkv:window=32; repeatable. "
            "By default all; of those that learn, the fitted ones."
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(study.TASKS)}.")] = ",".join(study.TASKS),
    tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of document, question and answer; long and agreement decode a quarter more."),
    ] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents per task (needle: and depth).")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts of a document, in the tasks with many.")] = 16,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    run: RunOptions,
) -> None:
    """Compare cache methods at equal bytes, by right answers and by agreement with dense attention."""
    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in study.TASKS:
            raise typer.BadParameter(f"{name!r}: use {', '.join(study.TASKS)}", param_hint="--tasks")
    check_methods(method or [])
    if run.out is not None:
        plots.require()
    params = model.load()
    grid, haystack = Grid((tokens,), documents=documents, facts=facts, seed=run.seed), Haystack.load(run.haystack)
    later = study.later_tokens(grid) if {"long", "agreement"} & set(names) else 0
    require_positions(params, "--tokens, and what is decoded after them", tokens + later)
    # At equal bytes, a recommended cache of another type would give Razor more or fewer tokens than the methods.
    razor = dataclasses.replace(policy.compressed(params), kv_dtype=policy.kv_dtype, windowed_kv_dtype=None)
    shares = list(dict.fromkeys(budget or [study.razor_share(params, razor, names, grid, haystack)]))  # type: ignore[arg-type]
    with bad_method():
        rows = {share: study.settings(params, razor, method or [], share) for share in shares}
    records, parts = Journal(None if run.out is None else run.out / "records.jsonl"), []
    for share in shares:
        found = study.compare(
            rows[share],
            names,  # type: ignore[arg-type]
            grid,
            haystack,
            batch=run.batch,
            records=records,
            progress=progress_bar,
        )
        settings = {row.name: "dense" if row.razor is None else row.razor.describe() for row in rows[share]}
        parts.append({"budget": share, "settings": settings, **found.to_dict()})
        if not run.as_json:
            print_table(found.render(f"{found.tokens:,} tokens a document, {share:.1%} of the dense cache's bytes"))
    content = {"eval": "methods", **provenance(params, model.model), "grid": dataclasses.asdict(grid), "budgets": parts}
    if run.out is not None:
        note(f"saved {write_results(run.out / 'methods.json', content)}")
        note(f"saved {plots.curves([content], run.out)}")
    if run.as_json:
        print_json(content)
