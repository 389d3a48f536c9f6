"""`razor-jax heads`: find, import, compare and store a model's retrieval heads."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import razor_jax
from razor_jax import HeadSplit, Params, RazorConfig
from razor_jax.cli import terminal
from razor_jax.cli.options import DtypeOption, JsonOption, ModelOption
from razor_jax.cli.terminal import note
from razor_jax.config import check_split
from razor_jax.evals.bench import machine
from razor_jax.heads import HeadScores, alibi, causal, find_heads, interchange, needle, plots, report, store, study

Share = partial(typer.Option, min=0, max=1)


def heads(
    model: ModelOption = "razor-mini",
    induction: Annotated[float | None, Share(help="Share of KV heads kept by induction score.")] = None,
    echo: Annotated[float | None, Share(help="Share of KV heads kept by echo score.")] = None,
    share: Annotated[float | None, Share(help="Share kept in all, instead of the other two.")] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", min=1, help="Bytes that the cache may take, instead; with --capacity.")
    ] = None,
    capacity: Annotated[int | None, typer.Option(min=1, help="Tokens that such a cache is to hold.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of such a cache.")] = 1,
    window: Annotated[int | None, typer.Option(min=1, help="Newest tokens that its windowed heads keep.")] = None,
    keep_layer: Annotated[
        list[int] | None, typer.Option(min=0, help="A layer that keeps every head; repeatable.")
    ] = None,
    balanced_over: Annotated[
        int, typer.Option(min=1, help="Round each layer's count up, so that so many devices hold as much.")
    ] = 1,
    scorer: Annotated[
        Literal["probe", "needle", "causal", "random"],
        typer.Option(help="Random tokens, a fact twice in prose, trying every head (small models), or chance."),
    ] = "probe",
    preset: Annotated[Literal["paper", "vendor"], typer.Option(help="Which probe.")] = "paper",
    seeds: Annotated[int, typer.Option(min=1, help="Searches; scores are their mean.")] = 1,
    source: Annotated[
        Path | None,
        typer.Option("--import", help="Take the heads of a DuoAttention folder, or of a vendor's JSON, instead."),
    ] = None,
    numbered: Annotated[
        Literal["query", "kv"] | None, typer.Option(help="What a vendor's JSON numbers: query heads or KV heads.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the split as razor.json here.")] = None,
    save_duo: Annotated[Path | None, typer.Option(help="Write it as DuoAttention's files into this folder.")] = None,
    report_to: Annotated[
        Path | None,
        typer.Option("--report", help="Write stability, causal importance and pictures into this folder; minutes."),
    ] = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find a model's retrieval heads: the scores of every KV head, and which to keep."""
    classes = induction is not None or echo is not None
    if share is not None and classes:
        raise typer.BadParameter("give --share, or --induction and --echo, not both")
    if (size is None) != (capacity is None) or (size is not None and (classes or share is not None)):
        raise typer.BadParameter("--bytes goes with --capacity, and without --share, --induction and --echo")
    if (numbered is None) != (source is None or source.suffix != ".json"):
        raise typer.BadParameter("--numbered query or kv goes with --import FILE.json, and is needed there")
    if scorer != "probe" and preset != "paper":
        raise typer.BadParameter(f"--preset {preset} is a probe's: leave it out with --scorer {scorer}")
    if source is not None and (scorer != "probe" or preset != "paper" or seeds > 1):
        raise typer.BadParameter("--import searches nothing: leave out --scorer, --preset and --seeds")
    if report_to is not None:
        plots.require()
    # These depend on the policy that stands beside the model, with its split.
    uses_policy = any(x is not None for x in (size, report_to, save_duo))
    if window is not None and not uses_policy:
        raise typer.BadParameter("--window goes with --bytes, --report or --save-duo")
    beside = "auto" if uses_policy else None
    with terminal.working(f"loading {model}") as progress:
        params = razor_jax.load(model, dtype=dtype, heads=beside, progress=progress)
    if params.config.alibi:
        asked = (induction, echo, share, size, window, source, save_duo, report_to)
        if any(value is not None for value in asked) or keep_layer or balanced_over > 1 or scorer != "probe":
            raise typer.BadParameter("an ALiBi model's scopes follow from its weights: only --save and --json apply")
        _scopes(params, model, save, as_json)
        return
    policy = params.razor or RazorConfig()
    if window is not None:
        policy = dataclasses.replace(policy, window=window)
    if save_duo is not None and policy.window is None:
        raise typer.BadParameter("--save-duo writes a fixed window, this policy has none: give --window")
    budget: dict[str, Any] = {"induction": induction, "echo": echo, "share": share}
    if size is not None:
        budget |= {"bytes": size, "capacity": capacity, "razor": policy, "batch": batch}
    extras: dict[str, Any] = {"always_layers": keep_layer or (), "balanced_over": balanced_over}
    scores, chosen = None, None
    if source is not None and numbered is not None:
        given = any(value is not None for value in budget.values()) or keep_layer or balanced_over > 1
        if given:
            raise typer.BadParameter("a vendor's JSON is a choice, not a ranking: leave out budgets and layers")
        chosen = _vendor(params, source, numbered)
    else:
        scores = _scores(params, model, scorer, preset, seeds) if source is None else _duo(params, source)
        chosen = scores.select(**budget, **extras)
    if save is not None:
        note(f"saved {store.write(save, chosen)}")
    if save_duo is not None:
        note(f"saved {interchange.write_duo(save_duo, chosen, policy)}")
    if report_to is not None:
        _report(params.replace(heads=chosen, razor=policy), report_to, model, seeds)
    if as_json:
        content = {"model": model, "scores": scores and scores.to_json(), "split": dataclasses.asdict(chosen)}
        typer.echo(json.dumps(content, indent=1))
        return
    if scores is not None:
        for name, values in (("induction", scores.induction), ("echo", scores.echo)):
            Console().print(_table(f"{name} score of each KV head, %", 100 * values, chosen))
    total = chosen.num_layers * chosen.num_kv_heads
    typer.echo(f"● {sum(chosen.counts)} of {total} KV heads keep every token: {chosen.note}")


def _scores(params: Params, model: str, scorer: str, preset: str, seeds: int) -> HeadScores:
    draws = tuple(range(seeds))
    if scorer == "random":
        return needle.random_heads(params, seeds=draws)
    with terminal.working(model) as progress:
        probed = partial(progress, "probed")
        if scorer == "needle":
            return needle.needle_heads(params, seeds=draws, progress=probed)
        if scorer == "causal":
            return causal.causal_heads(params, seeds=draws)
        return find_heads(params, seeds=draws, preset=preset, progress=probed)


def _scopes(params: Params, model: str, save: Path | None, as_json: bool) -> None:
    """An ALiBi model's heads: how far each looks, and the split that follows."""
    chosen = alibi.split(params)
    if save is not None:
        note(f"saved {store.write(save, chosen)}")
    exact = alibi.scopes(params)
    if as_json:
        content = {"model": model, "scopes": exact.tolist(), "split": dataclasses.asdict(chosen)}
        typer.echo(json.dumps(content, indent=1))
        return
    Console().print(_table("scope of each query head, tokens", exact, chosen, params.config.group_size))
    total = chosen.num_layers * chosen.num_kv_heads
    typer.echo(f"● {sum(chosen.counts)} of {total} KV heads keep every token: {chosen.note}")


def _duo(params: Params, folder: Path) -> HeadScores:
    pattern = interchange.read_duo(folder)
    check_split(pattern.split(), params.config.num_layers, params.config.num_kv_heads)
    found = pattern.scores(params.config.group_size)
    return dataclasses.replace(found, meta=dataclasses.replace(found.meta, head_dim=params.config.head_dim))


def _vendor(params: Params, file: Path, numbered: Literal["query", "kv"]) -> HeadSplit:
    config = params.config
    return interchange.read_vendor(
        file,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        num_heads=config.num_heads,
        heads=numbered,
    )


def _report(params: Params, folder: Path, model: str, seeds: int) -> None:
    def say(phase: str) -> Any:
        note(phase)
        return lambda done, total: None

    found = study.study(params, seeds=max(seeds, 4), say=say)
    for path in report.write(found, folder, model=model, machine=machine()):
        note(f"saved {path}")


def _table(title: str, scores: np.ndarray, chosen: HeadSplit, group_size: int = 1) -> Table:
    """Layers × heads of one number [L, heads], the chosen KV heads marked; narrow, for there may be many."""
    table = Table(title=title, box=box.SIMPLE, padding=0, title_justify="left")
    for column in ("layer", *map(str, range(scores.shape[1]))):
        table.add_column(column, justify="right", min_width=5, no_wrap=True)
    for layer, row in enumerate(scores):
        kept = (head // group_size in chosen.retrieval[layer] for head in range(len(row)))
        cells = (f"{'[bold]●' if keeps else ''}{value:.0f}" for keeps, value in zip(kept, row, strict=True))
        table.add_row(str(layer), *cells)
    return table
