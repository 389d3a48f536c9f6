"""`razor-jax chat`: talk to a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from razor_jax import Chat, Sampling

from . import terminal
from .options import ModelOptions, NewTokens, PolicyOptions, SamplingOptions, grouped, read_text
from .terminal import note


@grouped
def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    system_file: Annotated[Path | None, typer.Option(help="The same from a UTF-8 file, such as a document.")] = None,
    max_new_tokens: NewTokens = 512,
    *,
    model: ModelOptions,
    policy: PolicyOptions,
    draws: SamplingOptions,
) -> None:
    """Talk to a model. /reset forgets, /exit leaves; Ctrl-C ends an answer, or leaves at the prompt."""
    sampling = draws.sampling()
    if system is not None and system_file is not None:
        raise typer.BadParameter("give --system or --system-file, not both")
    params = model.load(dense=policy.dense)
    text = read_text(system_file) if system_file else system
    conversation = Chat(params, system=text, razor=policy.policy(params))
    if params.assets is not None:
        # A template that is missing or broken fails here, not at the first line.
        params.assets.apply_chat([*conversation.messages, {"role": "user", "content": "hello"}])
    note("/reset forgets the conversation, /exit leaves; Ctrl-C ends an answer")
    while (line := _line()) != "/exit":
        if line == "/reset":
            conversation.reset()
            note("forgotten")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is not a command: /reset or /exit")
        elif line:
            _turn(
                conversation,
                line,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=draws.seed,
                stop=draws.stop or (),
            )


def _turn(
    conversation: Chat, line: str, *, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
) -> None:
    """Run one turn. Ctrl-C ends the answer and keeps what was said; refused input changes nothing."""
    try:
        pieces = conversation.stream(line, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop)
        with contextlib.closing(pieces):  # type: ignore[type-var]
            note(str(terminal.answer(pieces).kv))
    except KeyboardInterrupt:
        typer.echo()
        note("interrupted")
    except ValueError as error:
        terminal.fail(str(error))


def _line() -> str:
    """Return the user's next line; /exit at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/exit"
