"""`razor-jax serve`: many prompts, or a person's, answered by one process or by many at once."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import razor_jax
from razor_jax import Params, Result
from razor_jax.checkpoint import hub
from razor_jax.cli import terminal
from razor_jax.cli.options import (
    ChunkOption,
    DenseOption,
    DtypeOption,
    HeadsOption,
    ImplementationOption,
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
from razor_jax.launch import worker
from razor_jax.serve import agreement, batch, interactive


def serve(
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines {"id": …, "prompt": … or "messages": …, "max_new_tokens": …}.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where answers go, in the same order; what it holds already stays.")
    ] = None,
    interactively: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from stdin, of process 0, until /exit.")
    ] = False,
    rows: Annotated[int, typer.Option("--batch", min=1, help="Prompts that are answered together.")] = 8,
    model: ModelOption = "razor-mini",
    mesh: MeshOption = None,
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
    weights: WeightsOption = None,
    implementation: ImplementationOption = None,
) -> None:
    """Answer a file of prompts, or a person; over many hosts with `python -m razor_jax.launch`."""
    if interactively == (prompts is not None) or (prompts is None) != (output is None):
        raise typer.BadParameter("give --prompts FILE and --output FILE, or --interactive")
    decisive = {
        "dense": dense,
        "window": window,
        "sinks": sinks,
        "prefill_chunk": prefill_chunk,
        "sampling": [temperature, top_k, top_p, min_p, repetition_penalty, seed],
        "stop": stop,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "weights": weights,
    }
    shape = {"batch": rows, "mesh": mesh, "max_new_tokens": max_new_tokens, "implementation": implementation}
    sampling = sampling_of(temperature, top_k, top_p, min_p, repetition_penalty)
    try:
        worker.tell(process=jax.process_index(), processes=jax.process_count())
        files = agreement.describe(hub.find(model))
        # By content: hosts may keep it in different places.
        split_file = {} if dense or heads == "auto" else {"--heads": agreement.heads_file(heads)}
        agreement.require(agreement.versions() | files | split_file | agreement.as_text(decisive | shape))
        with terminal.working(f"loading {model}") as progress:
            params = razor_jax.load(
                model,
                dtype=dtype,
                heads=None if dense else heads,
                implementation=implementation,
                mesh=mesh,
                weights=weights,
                progress=progress,
            )
        policy = policy_of(
            params, dense=dense, window=window, sinks=sinks, prefill_chunk=prefill_chunk, kv_dtype=kv_dtype
        )
        # The split may be one that each host remembers for itself, and a razor.json recommends a policy, too.
        kept = {
            "head split": json.dumps([params.heads_or_all.retrieval, params.heads_or_all.scopes]),
            "policy": json.dumps(None if policy is None else dataclasses.asdict(policy), sort_keys=True),
        }
        agreement.require(kept)
        options: dict[str, Any] = {"razor": policy, "sampling": sampling, "stop": stop or ()}
        if prompts is None or output is None:
            _converse(params, {**options, "max_new_tokens": max_new_tokens, "seed": seed})
            return
        # Draws depend on the row that a prompt takes in its batch.
        run = {
            "files": files,
            **kept,
            **decisive,
            **({} if sampling == razor_jax.Greedy().numbers() else {"batch": rows}),
        }
        _answer_file(params, prompts, output, rows, max_new_tokens, run, seed, options)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise typer.Exit(worker.code_of(error)) from None


def _answer_file(
    params: Params,
    prompts: Path,
    output: Path,
    rows: int,
    max_new_tokens: int,
    run: dict[str, Any],
    seed: int,
    options: dict[str, Any],
) -> None:
    latest: list[Result] = []

    def answer(texts: list[Any], limit: int, number: int) -> list[Result]:
        latest[:] = razor_jax.generate(params, texts, max_new_tokens=limit, seed=(seed + number) % 2**32, **options)
        return latest

    def progress(done: int, total: int) -> None:
        if jax.process_index() == 0:
            note(f"{done:,} of {total:,} prompts answered")

    batch.serve(prompts, output, answer, batch=rows, max_new_tokens=max_new_tokens, run=run, progress=progress)
    if latest and jax.process_index() == 0:
        note(str(latest[-1].kv))


def _converse(params: Params, options: dict[str, Any]) -> None:
    chat = params.assets is not None and params.assets.chat_template is not None
    first = jax.process_index() == 0

    def answer(line: str) -> None:
        try:
            prompt = [{"role": "user", "content": line}] if chat else line
            result = terminal.answer(razor_jax.stream(params, prompt, **options), show=first)
        except ValueError as error:
            if first:
                terminal.fail(str(error))
            return
        if first:
            note(str(result.kv))

    if first:
        note("one prompt a line; /exit leaves")
    interactive.serve(answer, sys.stdin)
