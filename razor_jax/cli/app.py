"""The `razor-jax` program: one file per command.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import gc
import logging
import warnings
from typing import Annotated

import typer

import razor_jax

from . import (
    ablations,
    bench,
    cache,
    chat,
    demo,
    doctor,
    evals,
    fit,
    generate,
    heads,
    longbench,
    methods,
    plan,
    reproduce,
    serve,
    terminal,
)

app = typer.Typer(cls=terminal.Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


# Options that another program reads.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Answers and warnings only.")] = False,
    version: Annotated[bool | None, typer.Option("--version", is_eager=True, callback=lambda v: _version(v))] = None,
) -> None:
    """Run long-context inference with a KV cache that is really smaller (RazorAttention, in JAX)."""
    terminal.listen(quiet)


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(generate.prefill)
app.command()(chat.chat)
app.add_typer(heads.app, name="heads")
app.command()(fit.fit)
app.command()(plan.plan)
app.command()(serve.serve)
app.command()(bench.bench)
app.command()(doctor.doctor)
evals.app.command()(longbench.longbench)
evals.app.command()(ablations.ablations)
evals.app.command()(methods.methods)
evals.app.command(add_help_option=False, context_settings=_PASS_ON)(ablations.harness)
app.add_typer(evals.app, name="eval")
app.add_typer(cache.app, name="cache")
app.command()(reproduce.reproduce)


def main() -> None:
    """Run the `razor-jax` program."""
    warnings.showwarning = lambda message, *place: terminal.warn(str(message))
    logging.getLogger("razor_jax").propagate = False  # libraries set up the root logger: no line twice
    terminal.watch_interrupts()
    # Tracing makes many objects, and imports live to the end: collections took a tenth of a short command.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        app()
    except SystemExit as end:
        if end.code == terminal.INTERRUPTED:
            terminal.end_now(terminal.INTERRUPTED)
        raise
    finally:
        gc.freeze()  # Python looks at all objects when it ends


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(razor_jax.__version__)
        raise typer.Exit
