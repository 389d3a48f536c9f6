"""`razor-jax heads`: find, import, compare and store a model's retrieval heads."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich import box
from rich.table import Table

from razor_jax import HeadSplit, Params, RazorConfig
from razor_jax.checkpoint import hub
from razor_jax.cli import terminal
from razor_jax.cli.options import Dtype, JsonOption, ModelName, ModelOptions, check_output, grouped
from razor_jax.cli.terminal import note, print_json
from razor_jax.config import check_split
from razor_jax.evals.bench import machine
from razor_jax.heads import (
    Calibration,
    HeadScores,
    alibi,
    find_heads,
    interchange,
    plots,
    promise,
    report,
    search,
    store,
    study,
)
from razor_jax.heads.find import LEARNED, Method
from razor_jax.params import architecture_fingerprint, weights_fingerprint, with_heads

app = typer.Typer(
    cls=terminal.Commands, no_args_is_help=True, help="Which KV heads keep everything: find, import, or study them."
)

_WINDOW = 256  # of learned and measured heads where neither the model nor the caller names one

Budget = partial(typer.Option, rich_help_panel="Budget")
Learn = partial(typer.Option, rich_help_panel="Questions")
Save = partial(typer.Option, rich_help_panel="Output")
Seeds = Annotated[int, typer.Option(min=1, help="Searches; scores are their mean.")]
MethodOption = Annotated[
    Method,
    typer.Option(
        help="probe: random tokens, seconds. needle: a fact twice in prose. gradient: of answers by gates, a minute. "
        "gates: learned, minutes. search: swaps at the budget. causal: every head alone, small models. random: chance."
    ),
]
Preset = Annotated[Literal["paper", "vendor"], typer.Option(help="Which probe.")]


@dataclasses.dataclass(frozen=True)
class BudgetOptions:
    """How many heads keep everything."""

    induction: Annotated[float | None, Budget(min=0, max=1, help="Share of KV heads kept by induction score.")] = None
    echo: Annotated[float | None, Budget(min=0, max=1, help="Share of KV heads kept by echo score.")] = None
    share: Annotated[float | None, Budget(min=0, max=1, help="Share kept in all, instead of the other two.")] = None
    size: Annotated[
        int | None, Budget("--bytes", min=1, help="Bytes that the cache may take, instead; with --capacity.")
    ] = None
    capacity: Annotated[int | None, Budget(min=1, help="Tokens per row of such a cache.")] = None
    batch: Annotated[int, Budget(min=1, help="Rows of such a cache.")] = 1
    window: Annotated[int | None, Budget(min=1, help="Newest tokens that its windowed heads keep.")] = None
    keep_layer: Annotated[list[int] | None, Budget(min=0, help="A layer that keeps every head; repeatable.")] = None
    balanced_over: Annotated[
        int, Budget(min=1, help="Round each layer's count up to a multiple of this many devices.")
    ] = 1

    def check(self) -> None:
        """Raise BadParameter where options contradict each other."""
        classes = self.induction is not None or self.echo is not None
        if self.share is not None and classes:
            raise typer.BadParameter("give --share, or --induction and --echo, not both")
        if (self.size is None) != (self.capacity is None) or (
            self.size is not None and (classes or self.share is not None)
        ):
            raise typer.BadParameter("--bytes goes with --capacity, and without --share, --induction and --echo")
        if self.size is None and self.batch != 1:
            raise typer.BadParameter(f"--batch {self.batch} goes with --bytes")

    def check_layers(self, params: Params) -> None:
        """Raise ValueError for a layer that the model does not have, before any search."""
        for layer in self.keep_layer or ():
            if layer >= params.config.num_layers:
                raise ValueError(f"--keep-layer {layer}: this model has layers 0 to {params.config.num_layers - 1}")

    @property
    def given(self) -> bool:
        """Whether any option was given."""
        return self != BudgetOptions()

    def policy(self, params: Params) -> RazorConfig:
        """Return the cache policy that bytes are counted under."""
        policy = params.razor or RazorConfig()
        return policy if self.window is None else dataclasses.replace(policy, window=self.window)

    def select(self, scores: HeadScores, policy: RazorConfig) -> HeadSplit:
        """Return the heads that fit the budget."""
        budget: dict[str, Any] = {"induction": self.induction, "echo": self.echo, "share": self.share}
        if self.size is not None:
            budget |= {"bytes": self.size, "capacity": self.capacity, "razor": policy, "batch": self.batch}
        return scores.select(**budget, always_layers=self.keep_layer or (), balanced_over=self.balanced_over)


@dataclasses.dataclass(frozen=True)
class SaveOptions:
    """Where the split goes."""

    save: Annotated[Path | None, Save(help="Write the split as razor.json here.")] = None
    save_duo: Annotated[Path | None, Save(help="Write it as DuoAttention's files into this folder.")] = None
    as_json: JsonOption = False

    def check(self, policy: RazorConfig) -> None:
        """Raise BadParameter for a policy that DuoAttention's files cannot hold, or a place that cannot be written."""
        if self.save_duo is not None and policy.window is None:
            raise typer.BadParameter("--save-duo writes a fixed window, this policy has none: give --window")
        for option, path in (("--save", self.save), ("--save-duo", self.save_duo)):
            if path is not None:
                check_output(option, path)

    def write(self, chosen: HeadSplit, policy: RazorConfig, kept: promise.Promise | None = None) -> None:
        """Write the files that were requested."""
        if self.save is not None:
            recommended = None if kept is None else policy
            note(f"saved {store.write(self.save, chosen, recommended, kept)}")
        if self.save_duo is not None:
            note(f"saved {interchange.write_duo(self.save_duo, chosen, policy)}")


@dataclasses.dataclass(frozen=True)
class LearnOptions:
    """Questions that heads are chosen by and judged by."""

    target: Annotated[
        float | None,
        Learn(min=0, max=100, help="Instead of a budget: the fewest heads that lose at most these points."),
    ] = None
    measure: Annotated[
        bool | None,
        Learn("--measure/--no-measure", help="Ask held-out questions, dense and compressed; on for learned heads."),
    ] = None
    documents: Annotated[int, Learn(min=1, help="Documents of eight questions that heads are chosen by.")] = 8
    held_out: Annotated[int, Learn(min=2, help="Documents of eight questions that --measure asks about.")] = 12
    tokens: Annotated[int, Learn(min=128, help="Tokens of a document that heads are judged by; half to choose.")] = 2048
    text: Annotated[Path | None, Learn(help="Folder of .txt files to ask about; the packaged text by default.")] = None
    state: Annotated[Path | None, Learn(help="Resume gates or search from this file, and save progress there.")] = None

    def calibration(self) -> Calibration:
        """Return the documents that heads are chosen by."""
        return Calibration(self.documents, max(128, self.tokens // 2), text=self.text)


@app.command()
@grouped
def find(
    model: ModelName = "razor-mini",
    method: MethodOption = "probe",
    preset: Preset = "paper",
    seeds: Seeds = 1,
    dtype: Dtype = "auto",
    *,
    budget: BudgetOptions,
    learn: LearnOptions,
    output: SaveOptions,
) -> None:
    """Find a model's retrieval heads: the scores of every KV head, and which to keep."""
    budget.check()
    _check_method(method, preset)
    learned = method in LEARNED
    measured = (learned or learn.target is not None) if learn.measure is None else learn.measure
    _check_learning(method, budget, learn, asks=learned or measured)
    if learned and seeds != 1:
        raise typer.BadParameter(f"--seeds: --method {method} takes one set of documents")
    windows = learned or measured or method == "causal"  # the search itself drops tokens
    uses_policy = budget.size is not None or output.save_duo is not None or windows
    if budget.window is not None and not uses_policy:
        names = ", ".join(("causal", *LEARNED))
        raise typer.BadParameter(f"--window goes with --bytes, --save-duo, --measure, or --method {names}")
    params = _load(model, dtype, uses_policy)
    if params.config.alibi:
        if budget.given or output.save_duo is not None or method != "probe":
            raise typer.BadParameter("an ALiBi model's scopes follow from its weights: only --save and --json apply")
        _scopes(params, model, output.save, output.as_json)
        return
    budget.check_layers(params)
    policy = _searched(budget.policy(params)) if windows else budget.policy(params)
    output.check(policy)
    scores = _scores(params, model, method, preset, seeds, policy, budget, learn)
    if learn.target is None:
        chosen = budget.select(scores, policy)
    else:
        with terminal.working(f"the fewest heads that lose at most {learn.target:g} points"):
            chosen = search.smallest_budget(params, scores, learn.target, razor=policy, calibration=learn.calibration())
    kept = None
    if measured:
        with terminal.working("asking held-out questions") as progress:
            sizes = {"documents": learn.held_out, "tokens": learn.tokens, "text": learn.text}
            asked = partial(progress, "asked")
            [kept] = promise.measure(params, chosen, policy, **sizes, progress=asked)
    _finish(model, scores, chosen, policy, output, kept)
    _compare_with_shipped(model, params, chosen)
    if method == "probe" and not measured:
        note(
            "these heads were only probed: --measure tells what they lose, --method gates learns better ones in minutes"
        )


def _searched(policy: RazorConfig) -> RazorConfig:
    """Return the policy that heads are judged under: a window that the documents of a search do not fit into."""
    if policy.window is not None:
        return policy
    note(f"--window {_WINDOW}: the documents of the search are shorter than the paper's window")
    return dataclasses.replace(policy, window=_WINDOW)


def _compare_with_shipped(model: str, params: Params, chosen: HeadSplit) -> None:
    """Say how the split that the model comes with differs from the one that was found, if there is one."""
    files = hub.beside_model(hub.find(model)), store.packaged_path(params)
    try:
        shipped = next((store.read(file).split for file in files if file.is_file()), None)
    except ValueError:  # `load` names what is wrong with it
        return
    if shipped is None or shipped.num_layers != chosen.num_layers or shipped.retrieval == chosen.retrieval:
        return
    common = sum(len(set(a) & set(b)) for a, b in zip(shipped.retrieval, chosen.retrieval, strict=True))
    note(
        f"{model} comes with a split of {sum(shipped.counts)} heads, {common} of them among these ({shipped.note}); "
        "it stays in use: --save this one and give it as --heads"
    )


@app.command("import")
@grouped
def import_heads(
    source: Annotated[Path, typer.Argument(help="A DuoAttention folder, or a vendor's JSON.")],
    model: ModelName = "razor-mini",
    numbered: Annotated[
        Literal["query", "kv"] | None, typer.Option(help="What a vendor's JSON numbers: query heads or KV heads.")
    ] = None,
    dtype: Dtype = "auto",
    *,
    budget: BudgetOptions,
    output: SaveOptions,
) -> None:
    """Take the heads of a DuoAttention folder, which a budget cuts, or of a vendor's JSON."""
    budget.check()
    vendor = source.suffix == ".json"
    if (numbered is not None) != vendor:
        raise typer.BadParameter("--numbered query or kv goes with a .json file, and is needed there")
    uses_policy = budget.size is not None or output.save_duo is not None
    if budget.window is not None and not uses_policy:
        raise typer.BadParameter("--window goes with --bytes or --save-duo")
    if vendor and dataclasses.replace(budget, window=None).given:
        raise typer.BadParameter("a vendor's JSON is a choice, not a ranking: leave out budgets and layers")
    params = _load(model, dtype, uses_policy)
    if params.config.alibi:
        raise typer.BadParameter("an ALiBi model's scopes follow from its weights: there is nothing to import")
    budget.check_layers(params)
    policy = budget.policy(params)
    output.check(policy)
    if numbered is not None:
        _finish(model, None, _named(params, _vendor(params, source, numbered)), policy, output)
        return
    scores, pattern = _duo(params, source)
    finished = not dataclasses.replace(budget, window=None).given and np.isin(pattern.gates, (0, 1)).all()
    # Gates of 0 and 1 are a choice, not a ranking: the default budget would cut it.
    chosen = pattern.split() if finished else budget.select(scores, policy)
    _finish(model, scores, _named(params, chosen), policy, output)


@app.command("report")
@grouped
def report_heads(
    folder: Annotated[Path, typer.Argument(help="Where the report, its figures and pictures go.")],
    model: ModelName = "razor-mini",
    method: MethodOption = "probe",
    preset: Preset = "paper",
    seeds: Seeds = 4,
    dtype: Dtype = "auto",
    as_json: JsonOption = False,
    *,
    budget: BudgetOptions,
) -> None:
    """Study a model's heads: stability, causal importance and pictures; minutes."""
    budget.check()
    _check_method(method, preset)
    if method == "search":
        raise typer.BadParameter("--method search finds the heads of one budget: a report compares rankings")
    if folder.is_file():
        raise typer.BadParameter(f"{folder} is a file: give a folder for the report")
    plots.require()
    params = _load(model, dtype, uses_policy=True)
    if params.config.alibi:
        raise typer.BadParameter("an ALiBi model's scopes follow from its weights: there is nothing to study")
    policy = _searched(budget.policy(params))
    chosen = budget.select(_scores(params, model, method, preset, seeds, policy, budget, LearnOptions()), policy)
    found = study.study(with_heads(params, chosen).replace(razor=policy), seeds=max(seeds, 4), say=_say)
    for path in report.write(found, folder, model=model, machine=machine()):
        note(f"saved {path}")
    if as_json:
        typer.echo((folder / "heads.json").read_text(encoding="utf-8"), nl=False)


def _check_learning(method: str, budget: BudgetOptions, learn: LearnOptions, *, asks: bool) -> None:
    """Raise BadParameter for options that this method or budget does not take; `asks`: whether questions are asked."""
    if learn.state is not None and method not in ("gates", "search"):
        raise typer.BadParameter(f"--state resumes --method gates or search, not {method}")
    if learn.target is not None and dataclasses.replace(budget, window=None).given:
        raise typer.BadParameter(
            "--target finds the budget: leave out --share, --induction, --echo, --bytes and layers"
        )
    if method == "search" and (learn.target is not None or dataclasses.replace(budget, window=None, share=None).given):
        raise typer.BadParameter("--method search needs its budget as --share")
    if method == "search" and budget.share is None:
        raise typer.BadParameter(
            "--method search finds the best heads of one budget: give --share, such as --share 0.2"
        )
    if not asks and learn != LearnOptions(measure=learn.measure):
        raise typer.BadParameter(
            f"--method {method} asks no questions: leave out --documents, --held-out, --tokens and --text, or add "
            "--measure"
        )


def _check_method(method: str, preset: str) -> None:
    if method != "probe" and preset != "paper":
        raise typer.BadParameter(f"--preset {preset} is for the probe: leave it out with --method {method}")


def _load(model: str, dtype: Any, uses_policy: bool) -> Params:
    """Load a model; with its split and policy only where the policy matters."""
    return ModelOptions(model, dtype=dtype).load(dense=not uses_policy)


def _say(phase: str) -> Any:
    note(phase)
    return lambda done, total: None


def _finish(
    model: str,
    scores: HeadScores | None,
    chosen: HeadSplit,
    policy: RazorConfig,
    output: SaveOptions,
    kept: promise.Promise | None = None,
) -> None:
    """Write and print scores and split."""
    output.write(chosen, policy, kept)
    if output.as_json:
        content = {"model": model, "scores": scores and scores.to_json(), "split": dataclasses.asdict(chosen)}
        print_json(content | ({} if kept is None else {"promise": kept.to_dict()}))
        return
    if scores is not None:
        for name, values in (("induction", scores.induction), ("echo", scores.echo)):
            terminal.print_table(_table(f"{name} score of each KV head, %", 100 * values, chosen))
    _print_split(chosen)
    if scores is not None and scores.meta.floor:
        signal, floor = scores.above_floor(chosen), scores.meta.floor
        rest = "" if signal == sum(chosen.counts) else "; the others are a guess"
        typer.echo(f"● {signal} of them score above the noise of this probe, {floor:.2%}{rest}")
    if kept is not None:
        typer.echo(f"● {kept}")


def _print_split(chosen: HeadSplit) -> None:
    total = chosen.num_layers * chosen.num_kv_heads
    typer.echo(f"● {sum(chosen.counts)} of {total} KV heads keep every token: {chosen.note}")


def _scores(
    params: Params,
    model: str,
    method: Method,
    preset: str,
    seeds: int,
    policy: RazorConfig,
    budget: BudgetOptions,
    learn: LearnOptions,
) -> HeadScores:
    options: dict[str, Any] = {}
    if method in LEARNED:
        options = {"razor": policy, "calibration": learn.calibration()}
        if method in ("gates", "search"):
            options["state"] = learn.state
        if method == "search":
            total = params.config.num_layers * params.config.num_kv_heads
            options["heads"] = max(1, round((budget.share or 0) * total))
    else:
        options["seeds"] = tuple(range(seeds))
        if method == "causal":
            options["razor"] = policy
        if method == "probe":
            options["preset"] = preset
    if method == "random":
        return find_heads(params, method=method, **options)
    with terminal.working(model) as progress:
        unit = {"gates": "learned", "gradient": "differentiated", "search": "searched"}.get(method, "probed")
        return find_heads(params, method=method, progress=partial(progress, unit), **options)


def _scopes(params: Params, model: str, save: Path | None, as_json: bool) -> None:
    """Print how far each head of an ALiBi model looks, and the split that follows."""
    chosen = alibi.split(params)
    if save is not None:
        note(f"saved {store.write(save, chosen)}")
    exact = alibi.scopes(params)
    if as_json:
        print_json({"model": model, "scopes": exact.tolist(), "split": dataclasses.asdict(chosen)})
        return
    terminal.print_table(_table("scope of each query head, tokens", exact, chosen, params.config.group_size))
    _print_split(chosen)


def _named(params: Params, split: HeadSplit) -> HeadSplit:
    """Return the split with the fingerprints of the model that it is for."""
    names = {"architecture": architecture_fingerprint(params.config), "weights": weights_fingerprint(params)}
    return dataclasses.replace(split, **names)


def _duo(params: Params, folder: Path) -> tuple[HeadScores, interchange.DuoPattern]:
    pattern = interchange.read_duo(folder)
    check_split(pattern.split(), params.config.num_layers, params.config.num_kv_heads)
    found = pattern.scores(params.config.group_size)
    return dataclasses.replace(found, meta=dataclasses.replace(found.meta, head_dim=params.config.head_dim)), pattern


def _vendor(params: Params, file: Path, numbered: Literal["query", "kv"]) -> HeadSplit:
    config = params.config
    return interchange.read_vendor(
        file,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        num_heads=config.num_heads,
        heads=numbered,
    )


def _table(title: str, scores: np.ndarray, chosen: HeadSplit, group_size: int = 1) -> Table:
    """Return a table of numbers [L, heads] with the chosen KV heads marked; narrow, because heads may be many."""
    table = Table(title=title, box=box.SIMPLE, padding=0, title_justify="left")
    for column in ("layer", *map(str, range(scores.shape[1]))):
        table.add_column(column, justify="right", min_width=5, no_wrap=True)
    for layer, row in enumerate(scores):
        kept = (head // group_size in chosen.retrieval[layer] for head in range(len(row)))
        cells = (f"{'[bold]●' if keeps else ''}{value:.0f}" for keeps, value in zip(kept, row, strict=True))
        table.add_row(str(layer), *cells)
    return table
