"""`razor-jax needle | ruler | eval …`: accuracy with the document compressed before the question is known."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import razor_jax
from razor_jax import Params
from razor_jax.cli import terminal
from razor_jax.cli.options import (
    ChunkOption,
    HeadsOption,
    JsonOption,
    KvDtypeOption,
    ModelOption,
    SinksOption,
    WindowOption,
    policy_of,
)
from razor_jax.cli.terminal import note
from razor_jax.evals import agreement, conversation, long_generation, plots, ruler
from razor_jax.evals import needle as needles
from razor_jax.evals.haystack import Haystack
from razor_jax.evals.protocol import Example, Form, Setting, System, run
from razor_jax.evals.provenance import provenance, write_json
from razor_jax.evals.settings import settings
from razor_jax.evals.table import Table

app = typer.Typer(no_args_is_help=True, help="More evaluations: conversations, long generation, agreement.")


def register(parent: typer.Typer) -> None:
    """Put the commands into the program."""
    parent.command("needle")(needle)
    parent.command("ruler")(ruler_command)
    parent.add_typer(app, name="eval")


Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Type of the weights; the checkpoint's own by default. The dense cache is bfloat16 anyway."),
]
NoCompensation = Annotated[bool, typer.Option("--no-compensation", help="Also without the compensation token.")]
RandomHeads = Annotated[int, typer.Option(min=0, help="Also as many heads at random, so many draws.")]
AllWindowed = Annotated[bool, typer.Option("--all-windowed", help="Also with every head windowed.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of a call.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of documents and questions.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for JSON, pictures and records; run again, it goes on where it stood.")
]
Text = Annotated[Path | None, typer.Option("--haystack", help="Folder of .txt files to hide in; packaged text.")]
Ask = Annotated[
    Literal["after", "inside", "both"],
    typer.Option(help="Question after the document was compressed, inside its prefill, or a table of each."),
]
FormOption = Annotated[
    Literal["chat", "user", "plain", "raw"] | None, typer.Option(help="How the question is put; by the chat template.")
]
Lengths = partial(typer.Option, help="Tokens of prompt and answer, comma-separated.")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every command has: the model, the rows of its tables, and where results go."""

    params: Params
    model: str
    rows: list[Setting]
    out: Path | None
    as_json: bool

    @property
    def records(self) -> Path | None:
        return None if self.out is None else self.out / "records.jsonl"

    def table(self, name: str, systems: Sequence[System], examples: Sequence[Example], **options: Any) -> Table:
        """Run, with a bar on the terminal."""
        with _bar(name) as progress:
            table = run(systems, examples, resume=self.records, progress=progress, **options)
        if not self.as_json:
            Console().print(table.render(name))
        return table

    def finish(self, command: str, content: dict[str, Any]) -> None:
        """JSON to the folder and, if asked for, to stdout."""
        content = {"eval": command, **provenance(self.params, self.model), **content}
        if self.out is not None:
            note(f"saved {write_json(self.out / f'{command}.json', content)}")
        if self.as_json:
            typer.echo(json.dumps(content, indent=1))


def needle(
    model: ModelOption = "razor-mini",
    lengths: Annotated[str, Lengths()] = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Depths of the fact in %, comma-separated.")] = "0,25,50,75,100",
    documents: Annotated[int, typer.Option(min=1, help="Documents of each length (single: and depth).")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts of a document, in the variants with many.")] = 16,
    variant: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(needles.VARIANTS)}; repeatable. Single by default."),
    ] = None,
    ask: Ask = "after",
    haystack: Text = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    kv_dtype: KvDtypeOption = None,
    no_compensation: NoCompensation = False,
    random_heads: RandomHeads = 0,
    all_windowed: AllWindowed = False,
    form: FormOption = None,
    batch: Batch = 8,
    seed: Seed = 1,
    dtype: Dtype = None,
    heads: HeadsOption = "auto",
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """Hide facts in real text over length and depth, and ask: dense and Razor on the same questions."""
    grid = needles.Grid(_numbers("--lengths", lengths), _shares("--depths", depths), documents, facts, seed)
    if out is not None:
        plots.require()
    variants = variant or ["single"]
    policy = {"window": window, "sinks": sinks, "prefill_chunk": prefill_chunk, "kv_dtype": kv_dtype}
    extras = {
        "no_compensation": no_compensation,
        "random_heads": random_heads,
        "all_windowed": all_windowed,
        "seed": seed,
    }
    job = prepare(model, dtype, heads, policy, extras, out, as_json)
    text, tables = Haystack.load(haystack), []
    for name in variants:
        made = needles.examples(job.params, name, grid, haystack=text, form=form)  # type: ignore[arg-type]
        tokens = needles.answer_tokens(name)  # type: ignore[arg-type]
        for inside in columns(ask):
            options = {"question_inside_prefill": inside, "form": form, "batch": batch, "max_new_tokens": tokens}
            title = f"needle, {name}{', asked inside the prefill' if inside else ''}"
            table = job.table(title, job.rows, made, **options)
            tables.append({"variant": name, **table.to_dict()})
            if out is not None and name in ("single", "facts", "multi-key"):
                for path in plots.heat_maps(table, out, f"needle-{name}{'-inside' if inside else ''}"):
                    note(f"saved {path}")
    job.finish("needle", {"haystack": text.name, "grid": dataclasses.asdict(grid), "tables": tables})


def ruler_command(
    model: ModelOption = "razor-mini",
    lengths: Annotated[str, Lengths()] = "4096",
    tasks: Annotated[str, typer.Option(help="Comma-separated; all but qa without their files.")] = "",
    documents: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 8,
    squad: Annotated[Path | None, typer.Option(help="SQuAD's dev-v2.0.json, for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="hotpot_dev_distractor_v1.json, for qa_2.")] = None,
    ask: Ask = "after",
    haystack: Text = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    kv_dtype: KvDtypeOption = None,
    no_compensation: NoCompensation = False,
    random_heads: RandomHeads = 0,
    all_windowed: AllWindowed = False,
    form: FormOption = None,
    batch: Batch = 8,
    seed: Seed = 1,
    dtype: Dtype = None,
    heads: HeadsOption = "auto",
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """RULER's synthetic tasks (arXiv 2404.06654) at any length: dense and Razor on the same prompts."""
    files = {"qa_1": squad, "qa_2": hotpotqa}
    names = [t for t, about in ruler.TASKS.items() if about.needs is None or files[t] is not None]
    names = [name.strip() for name in tasks.split(",")] if tasks else names
    for name in names:
        if name not in ruler.TASKS:
            raise typer.BadParameter(f"{name!r}: use {', '.join(ruler.TASKS)}", param_hint="--tasks")
    sizes = _numbers("--lengths", lengths)
    policy = {"window": window, "sinks": sinks, "prefill_chunk": prefill_chunk, "kv_dtype": kv_dtype}
    extras = {
        "no_compensation": no_compensation,
        "random_heads": random_heads,
        "all_windowed": all_windowed,
        "seed": seed,
    }
    job = prepare(model, dtype, heads, policy, extras, out, as_json)
    chosen: Form = form or ("user" if job.params.assets and job.params.assets.chat_template else "raw")
    text, tables = Haystack.load(haystack), []
    for name in names:
        given: dict[str, Any] = {"seed": seed, "haystack": text, "questions": files.get(name), "form": chosen}
        made = [e for n in sizes for e in ruler.examples(job.params, name, tokens=n, count=documents, **given)]
        tokens = ruler.TASKS[name].new_tokens
        for inside in columns(ask):
            options = {"question_inside_prefill": inside, "form": chosen, "batch": batch, "max_new_tokens": tokens}
            title = f"RULER {name}{', asked inside the prefill' if inside else ''}"
            tables.append({"task": name, **job.table(title, job.rows, made, **options).to_dict()})
    job.finish("ruler", {"haystack": text.name, "lengths": sizes, "tables": tables})


@app.command("conversation")
def conversation_command(
    model: ModelOption = "razor-mini",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of document, one question and answer.")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts, and turns, of each.")] = 8,
    haystack: Text = None,
    window: WindowOption = None,
    kv_dtype: KvDtypeOption = None,
    all_windowed: AllWindowed = False,
    batch: Batch = 8,
    seed: Seed = 1,
    dtype: Dtype = None,
    heads: HeadsOption = "auto",
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a document's facts in one growing conversation, and each of a fresh copy of its cache."""
    grid = needles.Grid((tokens,), documents=documents, facts=facts, seed=seed)
    extras = {"all_windowed": all_windowed}
    job = prepare(model, dtype, heads, {"window": window, "kv_dtype": kv_dtype}, extras, out, as_json)
    made = needles.examples(job.params, "facts", grid, haystack=Haystack.load(haystack))
    turns = [conversation.Conversation(row) for row in job.rows]
    tables = [
        {"questions": name, **job.table(name, systems, made, batch=batch).to_dict()}
        for name, systems in (("a copy of the cache each", job.rows), ("one growing conversation", turns))
    ]
    job.finish("conversation", {"tables": tables})


@app.command("long-generation")
def long_generation_command(
    model: ModelOption = "razor-mini",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the reply.")] = 5120,
    every: Annotated[int, typer.Option(min=1, help="Ask after so many tokens of it, again and again.")] = 1024,
    facts: Annotated[int, typer.Option(min=1, help="Facts in a document, and in a reply.")] = 8,
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 8,
    haystack: Text = None,
    window: WindowOption = None,
    kv_dtype: KvDtypeOption = None,
    no_compensation: NoCompensation = False,
    all_windowed: AllWindowed = False,
    batch: Batch = 8,
    seed: Seed = 1,
    dtype: Dtype = None,
    heads: HeadsOption = "auto",
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """Decode thousands of tokens, ask for facts on the way; then free-running output, token by token."""
    extras = {"no_compensation": no_compensation, "all_windowed": all_windowed}
    job = prepare(model, dtype, heads, {"window": window, "kv_dtype": kv_dtype}, extras, out, as_json)
    text = Haystack.load(haystack)
    made = long_generation.examples(
        job.params,
        document=tokens,
        reply=new_tokens,
        every=every,
        facts=facts,
        count=documents,
        seed=seed,
        haystack=text,
    )
    table = job.table("long generation", [long_generation.LongReply(row) for row in job.rows], made, batch=batch)
    parts = _by_written(table)
    prompts = agreement.text_passages(job.params, text, prompt=tokens, following=new_tokens, count=documents, seed=seed)
    with terminal.working(f"generating {new_tokens:,} tokens"):
        passages = agreement.greedy_passages(job.rows[0], prompts, batch=batch)
    found = _agreement(job, "free-running output of the dense cache", passages, batch)
    job.finish("long-generation", {"tables": [table.to_dict()], "by_distance": parts, "greedy": found})


@app.command("agreement")
def agreement_command(
    model: ModelOption = "razor-mini",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are prefilled.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are predicted one by one.")] = 512,
    documents: Annotated[int, typer.Option(min=1, help="Passages.")] = 16,
    haystack: Text = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    prefill_chunk: ChunkOption = None,
    kv_dtype: KvDtypeOption = None,
    no_compensation: NoCompensation = False,
    random_heads: RandomHeads = 0,
    all_windowed: AllWindowed = False,
    batch: Batch = 8,
    seed: Seed = 1,
    dtype: Dtype = None,
    heads: HeadsOption = "auto",
    out: Out = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity and next-token agreement with dense, of tokens read from a cache that has dropped something."""
    extras = {
        "no_compensation": no_compensation,
        "random_heads": random_heads,
        "all_windowed": all_windowed,
        "seed": seed,
    }
    policy = {"window": window, "sinks": sinks, "prefill_chunk": prefill_chunk, "kv_dtype": kv_dtype}
    job = prepare(model, dtype, heads, policy, extras, out, as_json)
    text = Haystack.load(haystack)
    passages = agreement.text_passages(
        job.params, text, prompt=tokens, following=new_tokens, count=documents, seed=seed
    )
    job.finish("agreement", {"haystack": text.name, "text": _agreement(job, "running text", passages, batch)})


def _agreement(job: Job, name: str, passages: Sequence[agreement.Passage], batch: int) -> list[dict[str, Any]]:
    with _bar(name) as progress:
        rows = agreement.run(job.rows, passages, batch=batch, resume=job.records, progress=progress)
    if not job.as_json:
        Console().print(agreement.render(rows, f"agreement with {job.rows[0].name}, {name}"))
    return [row.to_dict() for row in rows]


def _by_written(table: Table) -> list[dict[str, Any]]:
    """Accuracy by tokens written and by where the fact stood."""
    places = sorted({(q.meta["where"], q.meta["written"]) for _, q in table.questions})
    found = []
    for where, written in places:
        part = table.where(lambda _, q, at=(where, written): (q.meta["where"], q.meta["written"]) == at)
        found.append({"where": where, "written": written, "right": {row.name: row.score for row in part.rows}})
    return found


def prepare(
    model: str,
    dtype: str | None,
    heads: str,
    policy: dict[str, Any],
    extras: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> Job:
    """Load the model; `policy` as of `policy_of`, `extras` as of `settings`."""
    with terminal.working(f"loading {model}") as progress:
        params = razor_jax.load(model, dtype=dtype, heads=heads, progress=progress)
    razor = policy_of(params, **policy)
    assert razor is not None
    return Job(params, model, settings(params, razor, **extras), out, as_json)


def columns(ask: str) -> tuple[bool, ...]:
    """Whether questions stand inside the prefill, for each table of `--ask`."""
    return {"after": (False,), "inside": (True,), "both": (False, True)}[ask]


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Questions answered, for each setting; nothing where no one looks."""
    off = not terminal.console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal.console, transient=True, disable=off) as progress:
        bars: dict[str, Any] = {}

        def told(setting: str, done: int, total: int) -> None:
            if setting not in bars:
                bars[setting] = progress.add_task(f"{name}: {setting}", total=total)
            progress.update(bars[setting], completed=done)

        yield told


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1024,2048", param_hint=option)
    return tuple(int(part) for part in text.split(","))


def _shares(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) / 100 for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,50,100", param_hint=option) from None
