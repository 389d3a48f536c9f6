"""What the command line shows beside its answers: progress, log lines and errors, all on stderr."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..text.result import Result
from ..text.session import Piece

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells write it

_UNITS = {"read": "bytes", "probed": "layers"}

console = Console(stderr=True, highlight=False)


class Commands(typer.core.TyperGroup):
    """Commands whose failures are one line on stderr and exit code 1; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print()
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            # typer's own exceptions (usage, exit) bring their exit code
            if hasattr(error, "exit_code") or ctx.params.get("debug"):
                raise
            fail(f"{error}" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}")
            raise typer.Exit(1) from error


def fail(message: str) -> None:
    """The line on stderr that says what went wrong."""
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """A line on stderr beside the answers."""
    console.print(f"[dim]{escape(message)}[/]", soft_wrap=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def listen(quiet: bool) -> None:
    """Show the package's log lines as notes; only its warnings if `quiet`."""
    logger = logging.getLogger("razor_jax")
    logger.handlers[:] = [_Notes()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@contextlib.contextmanager
def working(message: str) -> Iterator[Callable[[str, int, int], None]]:
    """A spinner with the time passed while something long is under way; nothing where no one looks.

    Yields a function to call with (stage, done, to do), where the work can tell.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(message), total=None)

        def told(stage: str, done: int, total: int) -> None:
            words = escape(f"{message}: {stage} {done:,} of {total:,} {_UNITS[stage]}")
            progress.update(task, completed=done, total=total, description=words)

        yield told


def answer(pieces: Iterator[Piece], show: bool = True) -> Result:
    """Run one answer to its end, printing it to stdout as it comes."""
    text, result = "", None
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(working("reading"))
        for index, piece in enumerate(pieces):
            text, result = text + piece.text, piece.result
            # the first piece is the prefill's: the second also waits for the decode loop's compilation,
            # whose note would stand in the middle of the answer
            if show and text and (index or result):
                waiting.close()
                typer.echo(text, nl=False)
                text = ""
    assert result is not None
    if show:
        typer.echo()
    return result
