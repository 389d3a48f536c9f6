"""`razor-jax`: the library from a shell. Commands of their own size stand in files of their own, `cli_*.py`.

Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import razor_jax
from razor_jax import Chat, Params, Result, Sampling
from razor_jax.cli import (
    demo,
    terminal,
)
from razor_jax.cli import (
    evals as cli_evals,
)
from razor_jax.cli import (
    heads as cli_heads,
)
from razor_jax.cli import (
    longbench as cli_longbench,
)
from razor_jax.cli import (
    plan as cli_plan,
)
from razor_jax.cli import (
    reproduce as cli_reproduce,
)
from razor_jax.cli import (
    serve as cli_serve,
)
from razor_jax.cli.options import (
    ChunkOption,
    DenseOption,
    DtypeOption,
    HeadsOption,
    ImplementationOption,
    JsonOption,
    KvDtypeOption,
    MeshOption,
    MinPOption,
    ModelOption,
    NewTokensOption,
    PenaltyOption,
    SeedOption,
    SinksOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
    WindowOption,
    policy_of,
    sampling_of,
)
from razor_jax.cli.terminal import note
from razor_jax.evals.bench import Speed, machine, measure
from razor_jax.tokenizer.questions import split

app = typer.Typer(cls=terminal.Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Answers and warnings only.")] = False,
    version: Annotated[bool | None, typer.Option("--version", is_eager=True, callback=lambda v: _version(v))] = None,
) -> None:
    """Long-context inference with a really compressed KV cache (RazorAttention, in JAX)."""
    terminal.listen(quiet)


@app.command("demo")
def demo_command(
    model: ModelOption = "razor-mini",
    tokens: Annotated[int, typer.Option(min=256, help="Length of the document.")] = 2000,
    facts: Annotated[int, typer.Option(min=1, max=32, help="Facts hidden in it.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of document and facts.")] = 0,
    window: WindowOption = None,
    sinks: SinksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hide facts in a long document, compress it, then ask: dense, Razor and all-windowed side by side."""
    params = _load(model, None, "auto")
    policy = policy_of(params, window=window, sinks=sinks)
    assert policy is not None
    report = demo.run(params, policy, tokens=tokens, facts=facts, seed=seed, show=not as_json)
    if as_json:
        _print_json({"model": model, **report.to_dict()})
    else:
        Console().print(report.table())


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text to continue, or to ask about.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="The same from a UTF-8 file; - for stdin.")] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-Q", help="Asked about the prompt, which is compressed once, before; repeatable."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template. Default: for questions, if there is one."),
    ] = None,
    model: ModelOption = "razor-mini",
    max_new_tokens: NewTokensOption = 256,
    dense: DenseOption = False,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    heads: HeadsOption = "auto",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    implementation: ImplementationOption = None,
    mesh: MeshOption = None,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, or answer questions about a document."""
    text = _prompt(prompt, prompt_file)
    sampling = sampling_of(temperature, top_k, top_p, min_p, repetition_penalty)
    params = _load(model, dtype, None if dense else heads, implementation, mesh, weights)
    policy = policy_of(params, dense=dense, window=window, sinks=sinks, prefill_chunk=prefill_chunk, kv_dtype=kv_dtype)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "stop": stop or ()}
    if question:
        has_template = params.assets is not None and params.assets.chat_template is not None
        asked = split(params.assets, text, question, has_template if chat is None else chat)
        with terminal.working("reading the document"):
            options["cache"] = razor_jax.prefill(params, asked.document, razor=policy)
        prompts = list(zip(question, asked.questions, strict=True))
    else:
        options["razor"] = policy
        prompts = [(text, [{"role": "user", "content": text}] if chat else text)]
    results = []
    for name, ids in prompts:
        if question and not as_json:
            note(f"— {name}")
        results.append(terminal.answer(razor_jax.stream(params, ids, **options), show=not as_json))
    _report(results)
    if as_json:
        key = "question" if question else "prompt"
        answers = [{key: name, **_plain(result)} for (name, _), result in zip(prompts, results, strict=True)]
        _print_json({"model": model, "results": answers})


@app.command("chat")
def chat_command(
    model: ModelOption = "razor-mini",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    system_file: Annotated[Path | None, typer.Option(help="The same from a UTF-8 file, such as a document.")] = None,
    max_new_tokens: NewTokensOption = 512,
    dense: DenseOption = False,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    heads: HeadsOption = "auto",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    implementation: ImplementationOption = None,
    mesh: MeshOption = None,
    weights: WeightsOption = None,
) -> None:
    """Talk to a model. /reset forgets, /exit leaves; Ctrl-C ends an answer, or leaves at the prompt."""
    sampling = sampling_of(temperature, top_k, top_p, min_p, repetition_penalty)
    if system is not None and system_file is not None:
        raise typer.BadParameter("give --system or --system-file, not both")
    params = _load(model, dtype, None if dense else heads, implementation, mesh, weights)
    policy = policy_of(params, dense=dense, window=window, sinks=sinks, prefill_chunk=prefill_chunk, kv_dtype=kv_dtype)
    conversation = Chat(params, system=_read(system_file) if system_file else system, razor=policy)
    if params.assets is not None:
        # a template that is missing or broken fails here, not at the first line
        params.assets.apply_chat([*conversation.messages, {"role": "user", "content": "hello"}])
    note("/reset forgets the conversation, /exit leaves; Ctrl-C ends an answer")
    while (line := _line()) != "/exit":
        if line == "/reset":
            conversation.reset()
            note("forgotten")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is no command: /reset or /exit")
        elif line:
            _turn(
                conversation,
                line,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                stop=stop or (),
            )


app.command("heads")(cli_heads.heads)
app.command("plan")(cli_plan.plan)
app.command("serve")(cli_serve.serve)
cli_evals.register(app)
app.command("longbench")(cli_longbench.longbench)
app.command("reproduce")(cli_reproduce.reproduce)


@app.command("bench")
def bench_command(
    model: ModelOption = "razor-mini",
    context: Annotated[list[int] | None, typer.Option(min=1, help="Prompt length in tokens; repeatable.")] = None,
    new_tokens: NewTokensOption = 32,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    heads: HeadsOption = "auto",
    dtype: DtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    implementation: ImplementationOption = None,
    mesh: MeshOption = None,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time prefill and decode on a random prompt, dense beside Razor, compilation apart."""
    params = _load(model, dtype, heads, implementation, mesh, weights)
    policy = policy_of(params, window=window, sinks=sinks, prefill_chunk=prefill_chunk, kv_dtype=kv_dtype)
    rows: list[tuple[str, Speed]] = []
    for length in context or [1024]:
        for name, razor in (("dense", None), ("Razor", policy)):
            with terminal.working(f"{name}, {length:,} tokens"):
                rows.append((name, measure(params, razor, context=length, new_tokens=new_tokens)))
    if as_json:
        _print_json({"model": model, "machine": machine(), "rows": [{"cache": n, **r.to_dict()} for n, r in rows]})
        return
    Console().print(_speed_table(rows))
    note(f"{policy.describe() if policy else ''}; {', '.join(f'{k} {v}' for k, v in machine().items())}")


def main() -> None:
    """Entry point of the `razor-jax` program."""
    warnings.showwarning = lambda message, *place: note(f"warning: {message}")
    logging.getLogger("razor_jax").propagate = False  # libraries set up the root logger: no line twice
    app()


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(razor_jax.__version__)
        raise typer.Exit


def _load(
    model: str,
    dtype: str | None,
    heads: str | None,
    implementation: Any = None,
    mesh: str | None = None,
    weights: Literal["int8"] | None = None,
) -> Params:
    with terminal.working(f"loading {model}") as progress:
        return razor_jax.load(
            model,
            dtype=dtype,
            heads=heads,
            implementation=implementation,
            mesh=mesh,
            weights=weights,
            progress=progress,
        )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give --prompt or --prompt-file, one of the two")
    return prompt if file is None else _read(file)  # type: ignore[return-value]


def _read(file: Path) -> str:
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it first") from error


def _turn(
    conversation: Chat, line: str, *, max_new_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
) -> None:
    """One turn; Ctrl-C ends the answer, and what was said stays said. Refused input changes nothing."""
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
    """The user's next line; /exit at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/exit"


def _report(results: list[Result]) -> None:
    """What the cache held and how long it took, after the answers."""
    note(str(results[-1].kv))
    times = [result.timings for result in results]
    prompt_tokens, read = sum(t.prompt_tokens for t in times), sum(t.prefill_seconds for t in times)
    new, spent = sum(t.generated_tokens for t in times), sum(t.decode_seconds for t in times)
    rate = f", {new / spent:,.1f} tokens/s" if spent else ""
    compiled = sum(t.compile_seconds for t in times)
    note(f"read {prompt_tokens:,} tokens in {read:.2f} s{rate}; compiled for {compiled:.1f} s")


def _plain(result: Result) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "kv": result.kv.to_dict(),
        "timings": result.timings.to_dict(),
    }


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))


def _speed_table(rows: list[tuple[str, Speed]]) -> Table:
    """One row a policy and context, rates and bytes with their ratios to the dense row before it."""
    table = Table(box=box.SIMPLE)
    for column in ("tokens", "cache", "prefill tok/s", "decode tok/s", "KV MiB", "compiling"):
        table.add_column(column, justify="right", no_wrap=True)
    dense = rows[0][1]
    for name, row in rows:
        dense = row if name == "dense" else dense
        table.add_row(
            f"{row.context:,}",
            name,
            f"{row.context / row.prefill_seconds:,.0f} ({dense.prefill_seconds / row.prefill_seconds:.2f}×)",
            f"{1 / row.decode_seconds:,.1f} ({dense.decode_seconds / row.decode_seconds:.2f}×)",
            f"{row.kv.allocated_bytes / 2**20:,.1f} ({dense.kv.allocated_bytes / row.kv.allocated_bytes:.2f}×)",
            f"{row.compile_seconds:.1f} s",
        )
    return table
