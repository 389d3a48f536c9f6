"""`razor-jax generate`: continue a prompt, or answer questions about a document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import razor_jax
from razor_jax import Result

from ..tokenizer.questions import split
from . import terminal
from .options import (
    JsonOption,
    ModelOptions,
    NewTokens,
    PolicyOptions,
    SamplingOptions,
    grouped,
    read_text,
)
from .terminal import note, print_json


@grouped
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
    max_new_tokens: NewTokens = 256,
    *,
    model: ModelOptions,
    policy: PolicyOptions,
    draws: SamplingOptions,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, or answer questions about a document."""
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give --prompt or --prompt-file, one of the two")
    text = prompt if prompt_file is None else read_text(prompt_file)
    assert text is not None
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": draws.sampling(),
        "seed": draws.seed,
        "stop": draws.stop or (),
    }
    params = model.load(dense=policy.dense)
    razor = policy.policy(params)
    if question:
        has_template = params.assets is not None and params.assets.chat_template is not None
        asked = split(params.assets, text, question, has_template if chat is None else chat)
        with terminal.working("reading the document"):
            options["cache"] = razor_jax.prefill(params, asked.document, razor=razor)
        prompts: list[tuple[str, Any]] = list(zip(question, asked.questions, strict=True))
    else:
        options["razor"] = razor
        prompts = [(text, [{"role": "user", "content": text}] if chat else text)]
    results = []
    for name, ids in prompts:
        if question and not as_json:
            note(f"— {name}")
        results.append(terminal.answer(razor_jax.stream(params, ids, **options), show=not as_json))
    _report(results)
    if as_json:
        key = "question" if question else "prompt"
        answers = [{key: name, **result.to_dict()} for (name, _), result in zip(prompts, results, strict=True)]
        print_json({"model": model.model, "results": answers})


def _report(results: list[Result]) -> None:
    """Print, after the answers, what the cache kept and how long it took."""
    note(str(results[-1].kv))
    times = [result.timings for result in results]
    prompt_tokens, read = sum(t.prompt_tokens for t in times), sum(t.prefill_seconds for t in times)
    new, spent = sum(t.generated_tokens for t in times), sum(t.decode_seconds for t in times)
    rate = f", {new / spent:,.1f} tokens/s" if spent else ""
    compiled = sum(t.compile_seconds for t in times)
    note(f"read {prompt_tokens:,} tokens in {read:.2f} s{rate}; compiled for {compiled:.1f} s")
