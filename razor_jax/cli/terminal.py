"""Output of the command line: progress, log lines and errors on stderr, JSON on stdout."""

from __future__ import annotations

import _thread
import contextlib
import difflib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..text.result import Result
from ..text.session import Piece

EVERY = 5.0  # seconds between lines of progress in a log
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells write it
PATIENCE = 1.5  # seconds from Ctrl-C to the end of the program

_UNITS = {
    "read": "bytes",
    "probed": "layers",
    "learned": "steps",
    "differentiated": "documents",
    "searched": "rounds",
    "asked": "documents",
    "checked": "kernels",
    "timed": "caches",
}

_quiet = False  # set once, by the options of the program

console = Console(stderr=True, highlight=False)


# Commands that moved, and where to.
MOVED = {
    "needle": "eval needle",
    "ruler": "eval ruler",
    "longbench": "eval longbench",
    "agreement": "eval agreement",
    "conversation": "eval conversation",
    "long-generation": "eval long-generation",
}
EVERYWHERE = ("-q", "--quiet", "--debug")
_WORDS = ("prompt", "model")  # what users of other programs give without an option
TAKE_TEXT = (["-p"], ["--prompt"], ["-Q"], ["--question"], ["--system"], ["--stop"])  # what follows is no option


class Commands(typer.core.TyperGroup):
    """Commands whose failures are one line on stderr and exit code 1; a traceback only with --debug."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name in MOVED and ctx.parent is None:
            ctx.fail(f"'{name}' is now 'razor-jax {MOVED[name]}'.")
        near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
        if near and near[0] != name:
            ctx.fail(f"No such command '{name}'. Did you mean '{near[0]}'?")
        if name and not near and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'. There are: {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)

    def main(self, args: Any = None, **options: Any) -> Any:
        """Run a command line. -q and --debug count wherever they are."""
        given = list(sys.argv[1:] if args is None else args)
        if not self.name and "harness" not in given:  # the program itself, and not another program's options
            moved = [at for at, word in enumerate(given) if word in EVERYWHERE and given[at - 1 : at] not in TAKE_TEXT]
            given = [given[at] for at in moved] + [word for at, word in enumerate(given) if at not in moved]
        return super().main(given, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.print()
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            # typer's exceptions (usage, exit) have an exit code.
            if hasattr(error, "exit_code") or ctx.find_root().params.get("debug"):
                _say_more(error)
                raise
            fail(_sentence(error))
            raise typer.Exit(1) from error


def end_now(code: int) -> NoReturn:
    """End the program without Python's own end, which waits for threads that compile, or crashes under them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def watch_interrupts() -> None:
    """Make Ctrl-C end the program within `PATIENCE` seconds, also in the middle of a compilation.

    Python raises KeyboardInterrupt between two of its own steps, so a call into a compiler delays it to its end. A
    thread ends the program if nothing has handled the signal by then. What is raised inside a finalizer or a callback
    of the garbage collector is lost, so it is raised again.
    """
    raised = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def interrupt(*_: Any) -> None:
        raised.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while signals := os.read(reader, 4096):
            if signal.SIGINT not in signals:
                continue
            if not raised.wait(PATIENCE):
                os._exit(INTERRUPTED)
            # Python calls `interrupt` once for all signals that came before.
            os.set_blocking(reader, False)
            with contextlib.suppress(BlockingIOError):
                os.read(reader, 4096)
            os.set_blocking(reader, True)
            raised.clear()

    tell = sys.unraisablehook

    def again(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()  # after this call, where it would be lost too
        else:
            tell(lost)

    sys.unraisablehook = again
    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True, name="interrupts").start()


def _say_more(error: Any) -> None:
    """Complete messages of wrong usage: the value of a range or type error, options for words that have none."""
    cause = error.__cause__
    if extra := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", getattr(error, "message", ""), re.S):
        known = {name: "/".join(param.opts) for param in error.ctx.command.params if (name := param.name) in _WORDS}
        places = " and ".join(f"a {name} with {options}" for name, options in known.items())
        error.message = f"Unexpected {extra[1]!r}: this command takes options only{f'; give {places}' * bool(known)}."
    if hasattr(cause, "errors"):
        value, message = cause.errors()[0]["input"], error.message.removeprefix("Value error, ")
        error.message = message.replace("Input", repr(value), 1) if message.startswith("Input ") else message


def _sentence(error: Exception) -> str:
    """Return what to print of an error: no errno, no type where the message says all."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return f"{error}" if isinstance(error, ValueError | OSError | MemoryError) else f"{type(error).__name__}: {error}"


def fail(message: str) -> None:
    """Print on stderr what went wrong."""
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


def note(message: str) -> None:
    """Print a line on stderr, unless the program is quiet."""
    if not _quiet:
        _print(message)


def warn(message: str) -> None:
    """Print a warning on stderr, quiet or not."""
    _print(f"warning: {message}")


def _print(message: str) -> None:
    console.print(f"[dim]{escape(message)}[/]", soft_wrap=True)


def print_table(table: Any) -> None:
    """Print a table of rich on stdout: as wide as it needs where that is no terminal, so that no number is cut."""
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(content, indent=1))


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(self.format(record))


def listen(quiet: bool) -> None:
    """Show the package's log lines as notes; only its warnings, and no notes, if `quiet`."""
    global _quiet
    _quiet = quiet
    logger = logging.getLogger("razor_jax")
    logger.handlers[:] = [_Notes()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


@contextlib.contextmanager
def working(message: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show a spinner, or a line every few seconds where stderr is not a terminal.

    Yields a function to call with (stage, done, total).
    """
    begun = said = time.monotonic()
    ended = threading.Event()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(message), total=None)

        def advance(stage: str, done: int, total: int) -> None:
            words = f"{message}: {stage} {done:,} of {total:,} {_UNITS[stage]}"
            progress.update(task, completed=done, total=total, description=escape(words))
            say(words)

        def say(words: str) -> None:
            nonlocal said
            if not console.is_terminal and time.monotonic() - said > EVERY:
                said = time.monotonic()
                note(words)

        def wait() -> None:
            """Say that work goes on where nothing calls `advance`: one program may compile or run for minutes."""
            while not ended.wait(EVERY):
                say(f"{message}: {time.monotonic() - begun:.0f} s")

        heart = threading.Thread(target=wait, daemon=True)
        try:
            heart.start()
            yield advance
        finally:
            ended.set()
            if heart.ident is not None:
                heart.join(1)  # so that no line comes later


def answer(pieces: Iterator[Piece], show: bool = True) -> Result:
    """Run one answer to its end and print it to stdout as it comes."""
    text, result = "", None
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(working("answering"))
        for index, piece in enumerate(pieces):
            text, result = text + piece.text, piece.result
            # The second piece waits for the decode loop to compile, whose note would interrupt the answer.
            if show and text and (index or result):
                waiting.close()
                typer.echo(text, nl=False)
                text = ""
    assert result is not None
    if show:
        typer.echo()
    return result
