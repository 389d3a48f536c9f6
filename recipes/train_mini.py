"""Train razor-mini: `python -m recipes.train_mini --out runs/mini`.

The defaults are the recipe of the shipped model. You can interrupt it at any time: the same command resumes from the
last checkpoint with the same batches. On Linux,
`GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184`
keeps XLA's buffers mapped between steps and saves about a quarter of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from razor_jax.models.config import ModelConfig
from razor_jax.needles.facts import corpus

from . import training, vocabulary
from .batches import Rows, Stage
from .initial import add_layers, initial_params

# Two layers and short rows of repeated random ids only: previous-token and induction heads form from noise.
IGNITION = Stage(
    600,
    length=64,
    rows=64,
    copy=1.0,
    needle=0.0,
    max_facts=0,
    learning_rate=5e-3,
    layers=2,
    jumps=0,
    copy_prose=0.0,
    copy_gaps=0.0,
)
STAGES = (
    IGNITION,
    Stage(300, length=256, rows=16, copy=0.5, needle=0.5, max_facts=6, learning_rate=4e-3),
    Stage(300, length=512, rows=8, copy=0.2, needle=0.75, max_facts=12, learning_rate=4e-3),
    Stage(100, length=1024, rows=4, copy=0.15, needle=0.75, max_facts=24, learning_rate=4e-3, final_rate=1 / 300),
    Stage(100, length=1024, rows=4, copy=0.15, needle=0.75, max_facts=24, learning_rate=1 / 300, final_rate=2e-3),
    Stage(200, 512, 8, copy=0.1, needle=0.9, max_facts=8, learning_rate=3e-3, alike=0.5, repeated=0.6, groups=3),
    Stage(150, 2048, 2, 0.1, 0.75, 40, learning_rate=2e-3, final_rate=1e-3, repeated=0.5, groups=3),
    Stage(120, 512, 8, 0.1, 0.9, 12, learning_rate=1.5e-3, final_rate=1e-3, alike=0.6, repeated=0.7, groups=3),
    Stage(40, 4096, 1, 0.1, 0.85, 60, learning_rate=1e-3, final_rate=2e-4, alike=0.5, repeated=0.5, groups=3),
    Stage(60, 2048, 2, 0.1, 0.85, 40, learning_rate=4e-4, final_rate=0.0, alike=0.4, repeated=0.3, groups=3),
)
WARMUP = 50  # steps
REPORT_EVERY = 25  # steps


@dataclasses.dataclass
class Run:
    """State of a run between steps."""

    step: int
    params: Any
    state: Any


def schedule(stages: Sequence[Stage]) -> optax.Schedule:
    """Return the learning-rate schedule over all stages: a warm-up, then constant or linear within each stage."""
    parts, ends, total = [], [], 0
    for stage in stages:
        final = stage.learning_rate if stage.final_rate is None else stage.final_rate
        parts.append(optax.linear_schedule(stage.learning_rate, final, stage.steps))
        total += stage.steps
        ends.append(total)
    joined = optax.join_schedules(parts, ends[:-1])
    return lambda step: joined(step) * jnp.minimum(1.0, (step + 1) / WARMUP)


@functools.cache
def optimizer(stages: tuple[Stage, ...]) -> optax.GradientTransformation:
    """Return the optimizer of a recipe, always the same object, so that runs in a process share the compiled step."""
    return training.optimizer(schedule(stages))


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage of a global step."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError(f"step is past the last stage by {step}; the recipe has {sum(s.steps for s in stages)} steps")


def tokenizer_in(folder: pathlib.Path) -> Tokenizer:
    """Return the tokenizer of a run; the first call trains it on the train split and writes it."""
    path = folder / "tokenizer.json"
    if not path.exists():
        vocabulary.train(corpus()).save(str(path))
    return Tokenizer.from_file(str(path))


def config_at(config: ModelConfig, stage: Stage) -> ModelConfig:
    """Return the model config of a stage, with the stage's number of layers."""
    return dataclasses.replace(config, num_layers=stage.layers or config.num_layers)


def restore(
    manager: ocp.CheckpointManager,
    config: ModelConfig,
    stages: Sequence[Stage],
    update: optax.GradientTransformation,
    seed: int,
) -> Run:
    """Return the last saved run, or a new one. A checkpoint at the end of a stage has the depth of that stage."""
    step = manager.latest_step()
    params = initial_params(config_at(config, stage_at(stages, max(0, (step or 0) - 1))), seed)
    run = Run(0, params, update.init(params))
    if step is None:
        return run
    saved = manager.restore(step, args=ocp.args.StandardRestore({"params": run.params, "state": run.state}))
    return Run(step, saved["params"], saved["state"])


def deepen_run(run: Run, config: ModelConfig, update: optax.GradientTransformation, seed: int) -> Run:
    """Return the run with the depth of `config`. Added layers reset the optimizer's moments but not its step count."""
    if f"blocks_{config.num_layers - 1}" in run.params:
        return run
    params = add_layers(config, run.params, seed)

    def keep_step(x):
        return jnp.asarray(run.step, x.dtype) if jnp.issubdtype(x.dtype, jnp.integer) else x

    return Run(run.step, params, jax.tree.map(keep_step, update.init(params)))


def save(manager: ocp.CheckpointManager, run: Run) -> None:
    """Write a checkpoint and wait until it is on disk."""
    manager.save(run.step, args=ocp.args.StandardSave({"params": run.params, "state": run.state}), force=True)
    manager.wait_until_finished()


def train(
    folder: pathlib.Path,
    stages: Sequence[Stage] = STAGES,
    config: ModelConfig = training.MINI,
    seed: int = 0,
    save_every: int = 250,
    stop_at: int | None = None,
) -> Run:
    """Run the stages, from the last checkpoint in `folder` if it has one; write metrics to `folder/metrics.jsonl`."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(tokenizer_in(folder), config.max_position_embeddings)
    update = optimizer(tuple(stages))
    total = sum(s.steps for s in stages)
    end = total if stop_at is None else min(stop_at, total)
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        ocp.CheckpointManager(folder / "checkpoints", options=options) as manager,
        (folder / "metrics.jsonl").open("a") as log,
        Progress(*columns) as progress,
    ):
        run = restore(manager, config, stages, update, seed)
        bar = progress.add_task("training", total=end, completed=run.step)
        started, tokens = time.monotonic(), 0
        while run.step < end:
            stage = stage_at(stages, run.step)
            shape = config_at(config, stage)
            run = deepen_run(run, shape, update, seed)
            batch = rows.batch(stage, seed, run.step)
            arrays = {f.name: jnp.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
            run.params, run.state, metrics = training.train_step(shape, update, run.params, run.state, arrays)
            run.step, tokens = run.step + 1, tokens + batch.tokens.size
            if run.step % REPORT_EVERY == 0 or run.step == end:
                shown = {k: round(float(v), 4) for k, v in metrics.items()}
                spent = round(time.monotonic() - started, 1)
                record = {"step": run.step, "length": stage.length, "seconds": spent, "tokens": tokens, **shown}
                print(json.dumps(record), file=log, flush=True)
                text = f"T={stage.length} value {shown['value']:.3f} copy {shown['copy']:.3f} text {shown['text']:.2f}"
                progress.update(bar, completed=run.step, description=text)
            if run.step % save_every == 0 or run.step == end:
                save(manager, run)
    return run


def main(
    output: Annotated[pathlib.Path, typer.Option("--out", help="Folder of the run: tokenizer, checkpoints, metrics.")],
    family: Annotated[Literal["llama", "qwen3"], typer.Option(help="qwen3 adds QK-norm.")] = "llama",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    stop_at: Annotated[int | None, typer.Option(min=1, help="Stop after this step; a later run resumes.")] = None,
) -> None:
    """Train razor-mini by its recipe, resuming from the last checkpoint in OUTPUT."""
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file: name a folder", param_hint="--out")
    run = train(output, config=training.FAMILIES[family], seed=seed, save_every=save_every, stop_at=stop_at)
    typer.echo(f"step {run.step} of {sum(s.steps for s in STAGES)}, saved in {output / 'checkpoints'}")


if __name__ == "__main__":
    typer.run(main)
