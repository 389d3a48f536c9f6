"""`razor-jax eval …`: accuracy with the document compressed before the question is known."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from razor_jax import Params
from razor_jax.cli import terminal
from razor_jax.cli.options import CompressedOptions, JsonOption, ModelOptions, grouped
from razor_jax.cli.terminal import note
from razor_jax.evals import agreement, conversation, long_generation, plots, protocol, ruler
from razor_jax.evals import needle as needles
from razor_jax.evals.haystack import Haystack
from razor_jax.evals.methods import make, row_name
from razor_jax.evals.protocol import CachedModel, Example, Form, System
from razor_jax.evals.provenance import provenance, write_results
from razor_jax.evals.settings import settings
from razor_jax.evals.table import Table
from razor_jax.methods import METHODS, by_name

app = typer.Typer(
    cls=terminal.Commands,
    no_args_is_help=True,
    help="Does a compressed cache hold? Dense and Razor on the same questions.",
)

Rows = partial(typer.Option, rich_help_panel="Rows of the tables")
Run = partial(typer.Option, rich_help_panel="Run")


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Settings to compare beside dense and Razor."""

    no_compensation: Annotated[bool, Rows("--no-compensation", help="Also without the compensation token.")] = False
    random_heads: Annotated[int, Rows(min=0, help="Also the same number of heads at random: how many draws.")] = 0
    all_windowed: Annotated[bool, Rows("--all-windowed", help="Also with every head windowed.")] = False
    method: Annotated[list[str] | None, Rows(help=f"Also another cache method: {', '.join(METHODS)}; repeatable.")] = (
        None
    )
    budget: Annotated[float, Rows(min=0.001, max=1.0, help="Of these methods: share of the dense cache.")] = 0.2


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How an evaluation runs and where its results go."""

    batch: Annotated[int, Run(min=1, help="Rows of a call.")] = 8
    seed: Annotated[int, Run(min=0, help="Seed of documents and questions.")] = 1
    haystack: Annotated[Path | None, Run(help="Folder of .txt files to hide in; packaged text.")] = None
    out: Annotated[
        Path | None,
        Run(
            file_okay=False,
            help="Folder for JSON, pictures and records; a second run goes on where the first stopped.",
        ),
    ] = None
    as_json: JsonOption = False


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
    """A run: the model, the rows of its tables, and where results go."""

    params: Params
    model: str
    rows: list[CachedModel]
    out: Path | None
    as_json: bool

    @property
    def records(self) -> Path | None:
        return None if self.out is None else self.out / "records.jsonl"

    def table(self, name: str, systems: Sequence[System], examples: Sequence[Example], **options: Any) -> Table:
        """Run one table, with a progress bar."""
        with progress_bar(name) as progress:
            table = protocol.run(systems, examples, resume=self.records, progress=progress, **options)
        if not self.as_json:
            terminal.print_table(table.render(name))
        return table

    def finish(self, command: str, content: dict[str, Any]) -> None:
        """Write JSON to the folder and, if requested, to stdout."""
        content = {"eval": command, **provenance(self.params, self.model), **content}
        if self.out is not None:
            note(f"saved {write_results(self.out / f'{command}.json', content)}")
        if self.as_json:
            terminal.print_json(content)


def require_positions(params: Params, option: str, tokens: int) -> None:
    """Raise ValueError for sequences longer than the model was trained for: its answers would say nothing."""
    most = params.config.max_position_embeddings
    if tokens > most:
        raise ValueError(f"{option}: {tokens:,} tokens, but the model has {most:,} positions: give fewer")


@app.command()
@grouped
def needle(
    lengths: Annotated[str, Lengths()] = "1024,2048,4096",
    depths: Annotated[str, typer.Option(help="Depths of the fact in %, comma-separated.")] = "0,25,50,75,100",
    documents: Annotated[int, typer.Option(min=1, help="Documents per length (single: and depth).")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts of a document, in the variants with many.")] = 16,
    variant: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(needles.VARIANTS)}; repeatable. Single by default."),
    ] = None,
    ask: Ask = "after",
    form: FormOption = None,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: RowOptions,
    run: RunOptions,
) -> None:
    """Hide facts in real text over length and depth, and ask: dense and Razor on the same questions."""
    grid = needles.Grid(_numbers("--lengths", lengths), _shares("--depths", depths), documents, facts, run.seed)
    if run.out is not None:
        plots.require()
    variants = variant or ["single"]
    for name in variants:
        if name not in needles.VARIANTS:
            raise typer.BadParameter(f"{name!r}: use {', '.join(needles.VARIANTS)}", param_hint="--variant")
    job = prepare(model, policy, rows, run)
    require_positions(job.params, "--lengths", max(grid.lengths))
    text, tables = Haystack.load(run.haystack), []
    for name in variants:
        made = needles.examples(job.params, name, grid, haystack=text, form=form)  # type: ignore[arg-type]
        tokens = needles.answer_tokens(name)  # type: ignore[arg-type]
        for inside in columns(ask):
            options = {"question_inside_prefill": inside, "form": form, "batch": run.batch, "max_new_tokens": tokens}
            title = f"needle, {name}{', asked inside the prefill' if inside else ''}"
            table = job.table(title, job.rows, made, **options)
            tables.append({"variant": name, **table.to_dict()})
            if run.out is not None and name in ("single", "facts", "multi-key"):
                for path in plots.heat_maps(table, run.out, f"needle-{name}{'-inside' if inside else ''}"):
                    note(f"saved {path}")
    job.finish("needle", {"haystack": text.name, "grid": dataclasses.asdict(grid), "tables": tables})


@app.command("ruler")
@grouped
def ruler_command(
    lengths: Annotated[str, Lengths()] = "4096",
    tasks: Annotated[str, typer.Option(help="Comma-separated; all but qa without their files.")] = "",
    documents: Annotated[int, typer.Option(min=1, help="Prompts per task and length.")] = 8,
    squad: Annotated[Path | None, typer.Option(help="SQuAD's dev-v2.0.json, for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="hotpot_dev_distractor_v1.json, for qa_2.")] = None,
    ask: Ask = "after",
    form: FormOption = None,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: RowOptions,
    run: RunOptions,
) -> None:
    """Run RULER's synthetic tasks (arXiv 2404.06654) at any length: dense and Razor on the same prompts."""
    files = {"qa_1": squad, "qa_2": hotpotqa}
    names = [t for t, about in ruler.TASKS.items() if about.needs is None or files[t] is not None]
    names = [name.strip() for name in tasks.split(",")] if tasks else names
    for name in names:
        if name not in ruler.TASKS:
            raise typer.BadParameter(f"{name!r}: use {', '.join(ruler.TASKS)}", param_hint="--tasks")
        if name in files and files[name] is None:
            option = "--squad" if name == "qa_1" else "--hotpotqa"
            raise typer.BadParameter(f"--tasks {name} asks from {ruler.TASKS[name].needs}: give it as {option}")
    sizes = _numbers("--lengths", lengths)
    job = prepare(model, policy, rows, run)
    require_positions(job.params, "--lengths", max(sizes))
    chosen: Form = form or ("user" if job.params.assets and job.params.assets.chat_template else "raw")
    text, tables = Haystack.load(run.haystack), []
    for name in names:
        given: dict[str, Any] = {"seed": run.seed, "haystack": text, "questions": files.get(name), "form": chosen}
        made = [e for n in sizes for e in ruler.examples(job.params, name, tokens=n, count=documents, **given)]
        tokens = ruler.TASKS[name].new_tokens
        for inside in columns(ask):
            options = {"question_inside_prefill": inside, "form": chosen, "batch": run.batch, "max_new_tokens": tokens}
            title = f"RULER {name}{', asked inside the prefill' if inside else ''}"
            tables.append({"task": name, **job.table(title, job.rows, made, **options).to_dict()})
    job.finish("ruler", {"haystack": text.name, "lengths": sizes, "tables": tables})


@app.command("conversation")
@grouped
def conversation_command(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of document, one question and answer.")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts, and turns, per document.")] = 8,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: RowOptions,
    run: RunOptions,
) -> None:
    """Ask a document's facts in one growing conversation, and each of a fresh copy of its cache."""
    grid = needles.Grid((tokens,), documents=documents, facts=facts, seed=run.seed)
    job = prepare(model, policy, rows, run)
    require_positions(job.params, "--tokens", tokens)
    made = needles.examples(job.params, "facts", grid, haystack=Haystack.load(run.haystack))
    turns = [conversation.Conversation(row) for row in job.rows]
    tables = [
        {"questions": name, **job.table(name, systems, made, batch=run.batch).to_dict()}
        for name, systems in (("a copy of the cache each", job.rows), ("one growing conversation", turns))
    ]
    job.finish("conversation", {"tables": tables})


@app.command("long-generation")
@grouped
def long_generation_command(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the reply.")] = 5120,
    every: Annotated[int, typer.Option(min=1, help="Ask each time after this many tokens of it.")] = 1024,
    facts: Annotated[int, typer.Option(min=1, help="Facts in a document, and in a reply.")] = 8,
    documents: Annotated[int, typer.Option(min=1, help="Documents.")] = 8,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: RowOptions,
    run: RunOptions,
) -> None:
    """Decode thousands of tokens, ask for facts on the way; then free-running output, token by token."""
    job = prepare(model, policy, rows, run)
    require_positions(job.params, "--tokens and --new-tokens", tokens + new_tokens)
    text = Haystack.load(run.haystack)
    made = long_generation.examples(
        job.params,
        document=tokens,
        reply=new_tokens,
        every=every,
        facts=facts,
        count=documents,
        seed=run.seed,
        haystack=text,
    )
    table = job.table("long generation", [long_generation.LongReply(row) for row in job.rows], made, batch=run.batch)
    parts = _by_written(table)
    prompts = agreement.text_passages(
        job.params, text, prompt=tokens, following=new_tokens, count=documents, seed=run.seed
    )
    with terminal.working(f"generating {new_tokens:,} tokens"):
        passages = agreement.greedy_passages(job.rows[0], prompts, batch=run.batch)
    found = _agreement(job, "free-running output of the dense cache", passages, run.batch)
    job.finish("long-generation", {"tables": [table.to_dict()], "by_distance": parts, "greedy": found})


@app.command("agreement")
@grouped
def agreement_command(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are prefilled.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are predicted one by one.")] = 512,
    documents: Annotated[int, typer.Option(min=1, help="Passages.")] = 16,
    *,
    model: ModelOptions,
    policy: CompressedOptions,
    rows: RowOptions,
    run: RunOptions,
) -> None:
    """Measure perplexity and next-token agreement with dense, on tokens read from a cache that has dropped
    something.
    """
    job = prepare(model, policy, rows, run)
    require_positions(job.params, "--tokens and --new-tokens", tokens + new_tokens)
    text = Haystack.load(run.haystack)
    passages = agreement.text_passages(
        job.params, text, prompt=tokens, following=new_tokens, count=documents, seed=run.seed
    )
    job.finish("agreement", {"haystack": text.name, "text": _agreement(job, "running text", passages, run.batch)})


def _agreement(job: Job, name: str, passages: Sequence[agreement.Passage], batch: int) -> list[dict[str, Any]]:
    """Run, print and return the agreement of each row with dense."""
    with progress_bar(name) as progress:
        rows = agreement.run(job.rows, passages, batch=batch, resume=job.records, progress=progress)
    if not job.as_json:
        terminal.print_table(agreement.render(rows, f"agreement with {job.rows[0].name}, {name}"))
    return [row.to_dict() for row in rows]


def _by_written(table: Table) -> list[dict[str, Any]]:
    """Return accuracy by tokens written and by the fact's place."""
    places = sorted({(q.meta["where"], q.meta["written"]) for _, q in table.questions})
    found = []
    for where, written in places:
        part = table.where(lambda _, q, at=(where, written): (q.meta["where"], q.meta["written"]) == at)
        found.append({"where": where, "written": written, "right": {row.name: row.score for row in part.rows}})
    return found


def prepare(model: ModelOptions, policy: CompressedOptions, rows: RowOptions, run: RunOptions) -> Job:
    """Load the model and make the rows of its tables."""
    asked = dataclasses.asdict(rows)
    names, budget = asked.pop("method") or [], asked.pop("budget")
    check_methods(names)
    params = model.load()
    made = settings(params, policy.compressed(params), **asked, seed=run.seed)
    with bad_method():
        made += [CachedModel(row_name(name), params, make(params, name, budget)) for name in names]
    return Job(params, model.model, made, run.out, run.as_json)


def check_methods(names: Sequence[str]) -> None:
    """Raise BadParameter for an unknown method or field, or a method that is named twice. Needs no model."""
    with bad_method():
        for name in names:
            by_name(name, 1.0)
            if names.count(name) > 1:
                raise ValueError(f"{name} is named {names.count(name)} times: name it once")


@contextlib.contextmanager
def bad_method() -> Iterator[None]:
    """Turn a ValueError into a BadParameter of --method."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error


def columns(ask: str) -> tuple[bool, ...]:
    """Return, for each table of `--ask`, whether the question is inside the prefill."""
    return {"after": (False,), "inside": (True,), "both": (False, True)}[ask]


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show questions answered per setting; silent when stderr is not a terminal."""
    off = not terminal.console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal.console, transient=True, disable=off) as progress:
        bars: dict[str, Any] = {}

        def advance(setting: str, done: int, total: int) -> None:
            if setting not in bars:
                bars[setting] = progress.add_task(f"{name}: {setting}", total=total)
            progress.update(bars[setting], completed=done)

        yield advance


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1024,2048", param_hint=option)
    return tuple(int(part) for part in text.split(","))


def _shares(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) / 100 for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,50,100", param_hint=option) from None
