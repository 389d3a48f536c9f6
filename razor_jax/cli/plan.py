"""`razor-jax plan`: does a model fit, on devices that are not here?"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from razor_jax import RazorConfig, planner, sharding
from razor_jax.checkpoint import folder, gguf, hub
from razor_jax.cli.options import JsonOption, Policy, PolicyOptions, grouped
from razor_jax.cli.terminal import note, print_table
from razor_jax.config import HeadSplit, check_split
from razor_jax.heads import plots, store
from razor_jax.models.config import ModelConfig
from razor_jax.planner import GIB, Job, Plan, compiler, picture
from razor_jax.planner.compiler import Compiled

Model_ = functools.partial(typer.Option, rich_help_panel="Model")
Devices = functools.partial(typer.Option, rich_help_panel="Devices")


@grouped
def plan(
    model: Annotated[
        str,
        Model_(
            "--model", "-m", help="A Hugging Face id, a folder with a config.json, a .gguf file, razor-mini or smollm2."
        ),
    ],
    topology: Annotated[str, Devices("--topology", "-t", help="v5e:4x4 as libtpu names it, or a GPU: h100, h100:8.")],
    context: Annotated[int, Model_("--context", "-c", min=1, help="Tokens per row.")],
    batch: Annotated[int, Model_("--batch", "-b", min=1, help="Rows.")] = 1,
    weights: Annotated[
        Literal["bfloat16", "float16", "float32", "int8", "int4"], Model_(help="Type of the weights.")
    ] = "bfloat16",
    layers: Annotated[int | None, Model_(min=1, help="Plan only this many layers, from the first.")] = None,
    mesh: Annotated[str | None, Devices(help="Such as data=1,model=16; by default all devices are on model.")] = None,
    layout: Annotated[
        Literal["slot", "head"] | None, Devices(help="Layout of the cache on the mesh; chosen by default.")
    ] = None,
    share: Annotated[float | None, Policy(min=0, max=1, help="Share of KV heads that keep everything.")] = None,
    heads: Annotated[Path | None, Policy(help="The model's razor.json, in place of --share.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Ask the TPU compiler as well: minutes. Needs the extra aot.")
    ] = False,
    chart: Annotated[Path | None, typer.Option(help="Write a picture here. Needs the extra plots.")] = None,
    as_json: JsonOption = False,
    *,
    policy: PolicyOptions,
) -> None:
    """Check whether a model fits on a TPU slice or on GPUs, dense and compressed, and how much is missing.

    Without --kv-dtype, the compressed cache is shown in the weights' type and in int8.
    """
    if share is not None and heads is not None:
        raise typer.BadParameter("give --share or --heads, not both")
    policy.check(share=share, heads=heads)
    hardware = planner.find_hardware(topology)
    config = _config(model)
    if compile_:
        compiler.require(hardware)
    if chart is not None:
        plots.require()
    sizes = sharding.parse(mesh) if mesh else {"data": 1, "model": hardware.devices}
    if sizes["data"] * sizes["model"] != hardware.devices:
        raise ValueError(
            f"mesh={mesh!r} takes {sizes['data'] * sizes['model']} devices, {topology} has {hardware.devices}"
        )
    if layers is not None and layers > config.num_layers:
        raise typer.BadParameter(f"--layers {layers}: {model} has {config.num_layers}, give at most as many")
    split, recommended = (None, None) if policy.dense else _split(config, share, heads)
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers)
        split = split and dataclasses.replace(split, retrieval=split.retrieval[:layers], scopes=split.scopes[:layers])
    if split is not None and layout == "head":
        split = planner.balanced(split, sizes["model"])
    job = Job(
        config=config,
        hardware=hardware,
        **sizes,
        batch=batch,
        context=context,
        call=min(policy.prefill_chunk or context, context),
        split=split or HeadSplit.all(config.num_layers, config.num_kv_heads),
        razor=None if split is None else dataclasses.replace(recommended or RazorConfig(), **policy.changes),
        weights=weights,
        layout=layout,
    )
    made = planner.make_plan(model, job, compiled=planner.STEPS if compile_ else (), progress=note)
    if chart is not None:
        note(f"saved {picture.draw(made, chart)}")
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1))
    else:
        _show(made)


def _config(model: str) -> ModelConfig:
    """Return the config of what `load` takes without a download, or of a model that the planner knows."""
    if model in (*hub.PACKAGED, *hub.INSTALLED) or gguf.find_file(Path(model).expanduser()) is not None:
        return folder.read_config(hub.find(model))
    return planner.find_config(model)


def _split(config: ModelConfig, share: float | None, heads: Path | None) -> tuple[HeadSplit | None, RazorConfig | None]:
    """Return the split of a razor.json and the policy that it recommends, or a split as large as a search would make;
    no split where the weights alone decide."""
    if heads is not None:
        file = store.read(heads)
        check_split(file.split, config.num_layers, config.num_kv_heads)
        return file.split, file.recommended
    if config.alibi:
        note("an ALiBi model's scopes follow from its weights, which are not looked at: dense only, or give --heads")
        return None, None
    return planner.default_split(config, share), None


def _show(made: Plan) -> None:
    job = made.rows[-1].job
    tokens = "in one call" if job.call >= job.context else f"by {job.call:,} (dense in one call)"
    console = Console(highlight=False)
    console.print(job.hardware.describe())
    console.print(
        f"{made.model}: mesh data={job.data},model={job.model}, weights {job.weights}, {job.batch} × "
        f"{job.context:,} tokens, read {tokens}"
    )
    if job.razor is not None:
        console.print(f"Razor: {job.split.note}; {job.razor.describe()}")
    if job.context > job.config.max_position_embeddings:
        note(f"{job.context:,} tokens are more than the {job.config.max_position_embeddings:,} that it was trained for")
    print_table(_table(made))
    if made.layouts:
        sizes = "; ".join(f"by {name} {_gib(size)} GiB" for name, size in made.layouts.items())
        console.print(f"KV cache per device {sizes}{_balanced_note(made)}")
    for row in made.rows:
        for step, seen in row.compiled.items():
            console.print(f"{row.cache}, {step}: {_told(seen, row.error(step))}")


def _balanced_note(made: Plan) -> str:
    job = made.job
    reason = planner.why_not_by_head(job.split, job.model)
    if reason is not None:
        return f" (not by head over {job.model} devices: {reason})"
    split = planner.balanced(job.split, job.model)
    return f" (by head {split.share:.0%} of KV heads have to keep everything, so that each layer's divide)"


def _table(made: Plan) -> Table:
    """Return one row per policy, GiB per device."""
    table = Table(box=box.SIMPLE, padding=(0, 1), caption="GiB per device; left below 0: does not fit")
    for column in ("cache", "weights", "KV", "prefill", "decode", "left", "most rows", "most tokens"):
        name = column == "cache"
        table.add_column(column, justify="left" if name else "right", no_wrap=name, overflow="fold")
    for row in made.rows:
        m = row.memory
        left = _gib(row.headroom) if row.fits else f"[bold]{_gib(row.headroom)}"
        sizes = (m.weights, m.kv, m.prefill, m.decode)
        table.add_row(row.cache, *map(_gib, sizes), left, f"{row.batch:,}", f"{row.context:,}")
    return table


def _told(seen: Compiled, error: float | None) -> str:
    """Return the compiler's answer in one line."""
    difference = "" if error is None else f", {error:+.1%} against the arithmetic"
    if seen.refused:
        return f"the compiler refuses it, {_gib(seen.needed)} GiB needed{difference} ({seen.seconds:.0f} s)"
    parts = (
        f"arguments {_gib(seen.arguments)} + outputs {_gib(seen.outputs)} - aliased {_gib(seen.aliased)} + "
        f"temporaries {_gib(seen.temporaries)}"
    )
    said = f"{_gib(seen.needed)} GiB = {parts}{difference}; compiled in {seen.seconds:.0f} s"
    if seen.collectives is None:
        said += "; it cannot print this program, so collectives are not known"
    else:
        for looped, when in ((False, ""), (True, " per chunk of the prompt")):
            found = [c for c in seen.collectives if c["in_loop"] == looped]
            total = sum(c["count"] * c["bytes"] for c in found) / 2**20
            said += f"; {sum(c['count'] for c in found)} collectives, {total:.2f} MiB{when}" if found else ""
    return said


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
