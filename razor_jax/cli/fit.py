"""`razor-jax fit`: fit a cache method that learns to a model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from razor_jax.cli import terminal
from razor_jax.cli.evals import require_positions
from razor_jax.cli.options import JsonOption, ModelOptions, check_output, grouped
from razor_jax.methods import METHODS, stored_path
from razor_jax.methods import fit as fit_method
from razor_jax.methods.fitting import RECIPES


@grouped
def fit(
    method: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}.")],
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="File of the fitted parts; by default where `--method` of evaluations looks."
        ),
    ] = None,
    documents: Annotated[int, typer.Option(min=2, help="Documents to fit on; a quarter of them only measures.")] = 16,
    tokens: Annotated[
        int, typer.Option(min=32, help="Tokens of each, about 500 or more: they hold eight questions.")
    ] = 1024,
    text: Annotated[Path | None, typer.Option(help="Folder of .txt files to make them of.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the documents.")] = 0,
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
) -> None:
    """Fit a cache method that learns to a model. After Ctrl-C, the same command goes on where it was."""
    if method not in RECIPES:
        raise typer.BadParameter(f"{method!r}: use {', '.join(RECIPES)}", param_hint="--method")
    if out is not None:
        check_output("--out", out, file=True)
    params = model.load(dense=True)
    require_positions(params, "--tokens", tokens)
    out = out or stored_path(params, method)
    state = out.with_name(f"{out.name}.progress")
    with terminal.working(model.model) as progress:
        learned = fit_method(
            params,
            method,
            documents=documents,
            tokens=tokens,
            seed=seed,
            text=text,
            state=state,
            progress=functools.partial(progress, "learned"),
        )
    learned.save(out)
    state.unlink(missing_ok=True)
    if as_json:
        fields = {"method": method, "note": learned.note, "loss": learned.loss, "bytes": learned.nbytes}
        terminal.print_json(fields | {"file": str(out)})
        return
    before, after = learned.loss
    typer.echo(f"● {METHODS[method].name}, fitted on {learned.note}: loss {before:.4g} before, {after:.4g} after")
    typer.echo(f"● {learned.nbytes:,} bytes in {out}")
