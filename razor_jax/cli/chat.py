"""`razor-jax chat`: talk to a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from razor_jax import Chat, Params, RazorConfig, Sampling

from ..evals.provenance import write_json
from . import terminal
from .options import ModelOptions, NewTokens, PolicyOptions, SamplingOptions, check_output, grouped, read_text
from .terminal import note

COMMANDS = {
    "/help": "show this list",
    "/reset": "forget the conversation",
    "/system TEXT": "begin again with this system message",
    "/save FILE": "write the messages as JSON",
    "/exit": "leave; so does the end of the input",
}


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
    """Talk to a model; /help lists what else can be typed. Ctrl-C ends an answer, or leaves at the prompt."""
    sampling = draws.sampling()
    if system is not None and system_file is not None:
        raise typer.BadParameter("give --system or --system-file, not both")
    policy.check()
    text = read_text(system_file) if system_file else system
    params = model.load(dense=policy.dense)
    draws.tell_idle(params)
    conversation = Chat(params, system=text, razor=policy.policy(params))
    if params.assets is not None:
        # A template that is missing or broken fails here, not at the first line.
        params.assets.apply_chat([*conversation.messages, {"role": "user", "content": "hello"}])
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (line editing and history of input())
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": draws.seed, "stop": draws.stop or ()}
    note("/help lists the commands; Ctrl-C ends an answer")
    saved: set[Path] = set()
    while (line := _line()) != "/exit":
        if line.startswith("/"):
            conversation = _command(conversation, params, policy.policy(params), line, saved)
        elif line:
            _turn(conversation, line, **options)


def _command(conversation: Chat, params: Params, razor: RazorConfig | None, line: str, saved: set[Path]) -> Chat:
    """Run a line that begins with a slash, and return the conversation to go on with.

    `saved`: files that this program wrote, and may write again.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        for command, about in COMMANDS.items():
            note(f"{command:15s} {about}")
    elif name == "/reset" and not rest:
        conversation.reset()
        note("forgotten")
    elif name == "/system" and rest:
        note("a new conversation with this system message")
        return Chat(params, system=rest, razor=razor)
    elif name == "/save" and rest:
        file = Path(rest).expanduser()
        try:
            check_output("/save", file)
            if file.exists() and file not in saved:
                raise typer.BadParameter(f"/save {rest}: it exists; give the name of a new file")
            write_json(file, conversation.messages)
            saved.add(file)
            note(f"saved {len(conversation.messages)} messages to {rest}")
        except (typer.BadParameter, OSError, ValueError) as error:
            terminal.fail(f"not saved: {error}")
    else:
        usage = [command for command in COMMANDS if command.split()[0] == name]
        note(f"give {usage[0]}" if usage else f"{line!r} is not a command: {', '.join(COMMANDS)}")
    return conversation


def _turn(
    conversation: Chat, line: str, *, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
) -> None:
    """Run one turn. Ctrl-C ends the answer and keeps what was said; refused input changes nothing."""
    try:
        pieces = conversation.stream(line, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop)
        with contextlib.closing(pieces):  # type: ignore[type-var]
            result = terminal.answer(pieces)
        note(f"{result.timings.decode_tokens_per_second:,.1f} tokens/s; {result.kv}")
    except KeyboardInterrupt:
        typer.echo()
        note("interrupted")
    except (ValueError, MemoryError) as error:
        terminal.fail(str(error))


def _line() -> str:
    """Return the user's next line; /exit at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/exit"
