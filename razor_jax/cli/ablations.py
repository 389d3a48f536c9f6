"""`razor-jax eval ablations` and `razor-jax eval harness`: the worth of each part, and EleutherAI's benchmarks."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from razor_jax.cli import terminal
from razor_jax.cli.options import JsonOption, ModelOptions, grouped
from razor_jax.cli.terminal import note
from razor_jax.config import RazorConfig
from razor_jax.evals import ablations as study
from razor_jax.evals.journal import Journal
from razor_jax.evals.provenance import provenance, write_results


@grouped
def ablations(
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="Documents per task.")] = 16,
    questions: Annotated[int, typer.Option(min=1, max=64, help="Facts, or copied segments, per document.")] = 8,
    window: Annotated[int | None, typer.Option(min=1, help="Another window than the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents read at once.")] = 8,
    causal: Annotated[
        bool, typer.Option("--causal/--no-causal", help="Also heads found by trying each: small models only.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder for JSON and records; a second run resumes from it.")] = Path("."),
    as_json: JsonOption = False,
    *,
    model: ModelOptions,
) -> None:
    """Change one part of RazorAttention at a time, and measure each on the same held-out tokens; 10 minutes."""
    params = model.load()
    razor = dataclasses.replace(params.razor or RazorConfig(), kv_dtype="bfloat16", windowed_kv_dtype=None)
    razor = razor if window is None else dataclasses.replace(razor, window=window)
    sizes = {"tokens": tokens, "documents": documents, "questions": questions}
    records = Journal(out / "ablations.jsonl")
    lines = study.run(params, razor, records, **sizes, batch=batch, causal=causal, progress=note)
    policy = f"{razor.describe()}; {sum(params.heads_or_all.counts)} heads: {params.heads_or_all.note}"
    content = {"eval": "ablations", **provenance(params, model.model), **sizes, "policy": policy, "summary": lines}
    note(f"saved {write_results(out / 'ablations.json', content)}")
    if as_json:
        terminal.print_json(content)
    else:
        terminal.print_table(
            study.render(lines, f"{tokens:,} tokens a document, {documents} documents a task; {policy}")
        )


def harness(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness on a compressed cache, with all of its own options (extra `evals`).

    Example: razor-jax eval harness --model_args pretrained=FOLDER,window=4096 --tasks hellaswag
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import razor_jax.evals.harness  # noqa: F401  (registers the model)
    except ImportError as error:
        raise ValueError(f'the harness is not installed ({error}): pip install -e ".[evals]"') from error
    given = context.args if "--model" in context.args else ["--model", "razor_jax", *context.args]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
