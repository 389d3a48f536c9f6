"""`razor-jax serve`: many prompts, or a person's, answered by one process or by many at once; or HTTP."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import razor_jax
from razor_jax import Params, RazorConfig, Result
from razor_jax.checkpoint import hub
from razor_jax.cli import terminal
from razor_jax.cli.options import ModelOptions, NewTokens, PolicyOptions, SamplingOptions, grouped
from razor_jax.cli.serve_http import HttpOptions, refuse, require_packages, serve_http
from razor_jax.cli.terminal import note
from razor_jax.launch import worker
from razor_jax.serve import agreement, batch, interactive
from razor_jax.text.prompts import encode

_BATCH = 8


@grouped
def serve(
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines {"id": …, "prompt": … or "messages": …, "max_new_tokens": …}.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="Where answers go, in the same order; answers already there stay.")
    ] = None,
    interactively: Annotated[
        bool, typer.Option("--interactive", help="Read prompts from stdin, of process 0, until /exit.")
    ] = False,
    rows: Annotated[int, typer.Option("--batch", min=1, help="Prompts that are answered together.")] = _BATCH,
    max_new_tokens: NewTokens = 256,
    *,
    http: HttpOptions,
    model: ModelOptions,
    policy: PolicyOptions,
    draws: SamplingOptions,
) -> None:
    """Serve HTTP (--port); or answer a file of prompts, or a person, over many hosts (`python -m razor_jax.launch`)."""
    if http.port is not None:
        _refuse_files(prompts, output, interactively, rows, draws)
        require_packages()
    elif http.given:
        raise typer.BadParameter(f"{', '.join(http.given)}: only HTTP has it, give --port")
    elif interactively == (prompts is not None) or (prompts is None) != (output is None):
        raise typer.BadParameter("give --port PORT, --prompts FILE and --out FILE, or --interactive")
    policy.check()
    decisive = _decisive(model, policy, draws)
    shape = {
        "batch": rows,
        "mesh": model.mesh,
        "max_new_tokens": max_new_tokens,
        "implementation": model.implementation,
    }
    sampling = draws.sampling()
    try:
        params, razor, files, kept = _load(model, policy, decisive | shape | http.shape)
        if http.port is not None:
            serve_http(http, params, razor, model.model, max_new_tokens)
            return
        options: dict[str, Any] = {"razor": razor, "sampling": sampling, "stop": draws.stop or ()}
        if prompts is None or output is None:
            _converse(params, {**options, "max_new_tokens": max_new_tokens, "seed": draws.seed})
            return
        # Draws depend on the row that a prompt takes in its batch.
        run = {"files": files, **kept, **decisive, **({} if sampling.greedy else {"batch": rows})}
        _answer_file(params, prompts, output, rows, max_new_tokens, run, draws.seed, options)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise typer.Exit(worker.exit_code(error)) from None


def _load(
    model: ModelOptions, policy: PolicyOptions, options: dict[str, Any]
) -> tuple[Params, RazorConfig | None, dict[str, str], dict[str, str]]:
    """Return the params, the policy, digests of the model's files, and the split and policy as text.

    Raises ValueError, on every process, if the processes differ in one of these or in `options`.
    """
    worker.notify_launcher(process=jax.process_index(), processes=jax.process_count())
    files = agreement.describe(hub.find(model.model))
    # By content: hosts may keep it in different places.
    ours = policy.dense or model.heads == "auto"
    split_file = {} if ours else {"--heads": agreement.heads_file(model.heads)}
    agreement.require(agreement.versions() | files | split_file | agreement.as_text(options))
    params = model.load(dense=policy.dense)
    razor = policy.policy(params)
    # Each host may remember its own split, and a razor.json recommends a policy, too.
    kept = {
        "head split": json.dumps([params.heads_or_all.retrieval, params.heads_or_all.scopes]),
        "policy": json.dumps(None if razor is None else dataclasses.asdict(razor), sort_keys=True),
    }
    agreement.require(kept)
    return params, razor, files, kept


def _refuse_files(
    prompts: Path | None, output: Path | None, interactively: bool, rows: int, draws: SamplingOptions
) -> None:
    """Raise BadParameter for options that HTTP does not have."""
    files = {"prompts": (prompts, None), "out": (output, None), "interactive": (interactively, False)}
    refuse("not with --port, which serves HTTP", files)
    refuse("HTTP has --slots instead", {"batch": (rows, _BATCH)})
    plain = SamplingOptions()
    names = [field.name for field in dataclasses.fields(draws)]
    given = {name: (getattr(draws, name) or None, getattr(plain, name) or None) for name in names}
    refuse("over HTTP each request brings its own", given)


def _decisive(model: ModelOptions, policy: PolicyOptions, draws: SamplingOptions) -> dict[str, Any]:
    """Return the options that decide what the answers are."""
    return {
        "dense": policy.dense,
        "window": policy.window,
        "sinks": policy.sinks,
        "prefill_chunk": policy.prefill_chunk,
        "sampling": [draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.repetition_penalty, draws.seed],
        "stop": draws.stop,
        "dtype": model.dtype,
        "kv_dtype": policy.kv_dtype,
        "weights": model.weights,
    }


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

    def answer(texts: list[Any], limit: int, number: int) -> list[Result | str]:
        refused = {index: why for index, text in enumerate(texts) if (why := _refusal(params, text))}
        # A refused prompt keeps its row, so that the others are drawn as without it.
        given = [[0] if index in refused else text for index, text in enumerate(texts)]
        latest[:] = razor_jax.generate(
            params, given, max_new_tokens=limit, seed=(seed + number) % 2**32, raw=True, **options
        )
        return [refused.get(index, result) for index, result in enumerate(latest)]

    def progress(done: int, total: int) -> None:
        if jax.process_index() == 0:
            note(f"{done:,} of {total:,} prompts answered")

    batch.serve(prompts, output, answer, batch=rows, max_new_tokens=max_new_tokens, run=run, progress=progress)
    if latest and jax.process_index() == 0:
        note(str(latest[-1].kv))


def _refusal(params: Params, prompt: Any) -> str | None:
    """Return why the model cannot take a prompt, None if it can."""
    try:
        encode(params, [prompt], raw=True)
    except (ValueError, TypeError) as error:
        return str(error).removeprefix("prompt 0 ")
    return None


def _converse(params: Params, options: dict[str, Any]) -> None:
    first = jax.process_index() == 0

    def answer(line: str) -> None:
        try:
            result = terminal.answer(razor_jax.stream(params, line, **options), show=first)
        except ValueError as error:
            if first:
                terminal.fail(str(error))
            return
        if first:
            note(str(result.kv))

    if first:
        note("one prompt a line; /exit leaves")
    interactive.serve(answer, sys.stdin)
