"""`razor-jax generate` and `razor-jax prefill`: answer a message, or questions about a document."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import razor_jax
from razor_jax import KVReport, Params, Result

from ..text.logprobs import MAX_LOGPROBS
from ..text.lookup import MAX_DRAFT
from ..text.prompts import capacity_bucket, encode
from ..tokenizer.questions import split
from . import terminal
from .options import (
    Draws,
    JsonOption,
    ModelOptions,
    NewTokens,
    PolicyOptions,
    SamplingOptions,
    check_output,
    grouped,
    read_text,
)
from .terminal import note, print_json

Template = partial(typer.Option, rich_help_panel="Chat template")


@dataclasses.dataclass(frozen=True)
class TemplateOptions:
    """How text becomes a prompt."""

    raw: Annotated[bool, Template("--raw", help="Continue the text as it is, without the chat template.")] = False
    system: Annotated[str | None, Template(help="System message.")] = None
    template_var: Annotated[
        list[str] | None,
        Template(help="NAME=VALUE that the template reads, such as enable_thinking=false; repeatable."),
    ] = None

    def variables(self) -> dict[str, Any]:
        """Return the template's variables, values read as JSON where they are JSON. Raises BadParameter."""
        found = {}
        for text in self.template_var or ():
            name, sign, value = text.partition("=")
            if not sign or not name.isidentifier():
                raise typer.BadParameter(f"--template-var {text!r}: give NAME=VALUE, such as enable_thinking=false")
            try:
                found[name] = json.loads(value)
            except json.JSONDecodeError:
                found[name] = value
        if self.raw and (self.system is not None or found):
            raise typer.BadParameter("--raw uses no chat template: leave out --system and --template-var")
        return found

    def used(self, params: Params, name: str) -> bool:
        """Return whether the model `name` has a template to use. Raises ValueError for options that need one."""
        found = params.assets is not None and params.assets.chat_template is not None
        if (self.system is not None or self.template_var) and not found:
            raise ValueError(f"{name} has no chat template: leave out --system and --template-var")
        return found and not self.raw


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """What to answer: a message, or questions about a document."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Message to answer, or text to ask about; - for stdin.")
    ] = None
    prompt_file: Annotated[Path | None, typer.Option(help="The same from a UTF-8 file; - for stdin.")] = None
    cache: Annotated[Path | None, typer.Option(help="The same as a cache that `razor-jax prefill` saved.")] = None
    question: Annotated[
        list[str] | None,
        typer.Option("--question", "-Q", help="Asked about the prompt, which is compressed once, before; repeatable."),
    ] = None
    draft: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_DRAFT, help="Tokens to draft from the prompt per call: the same answer, faster if it quotes."
        ),
    ] = None

    def read(self, template: TemplateOptions, policy: PolicyOptions) -> str:
        """Return the prompt's text, "" with a cache. Raises BadParameter for options that contradict each other."""
        if sum(given is not None for given in (self.prompt, self.prompt_file, self.cache)) != 1:
            raise typer.BadParameter("give one of --prompt, --prompt-file and --cache")
        if self.question and template.system is not None:
            raise typer.BadParameter("with -Q the document is the system message: leave out --system")
        if self.cache is not None and not self.question:
            raise typer.BadParameter("--cache holds a document: ask about it with -Q")
        if self.cache is not None and self.draft is not None:
            raise typer.BadParameter(
                "--cache has no text to draft from: leave out --draft, or give --prompt-file instead"
            )
        if self.cache is not None and (policy.dense or policy.changes):
            raise typer.BadParameter(
                "--cache has its policy already: leave out --dense and the options of the cache policy"
            )
        file = Path("-") if self.prompt == "-" else self.prompt_file
        text = read_text(file) if file is not None else self.prompt
        if any(not each.strip() for each in (text, *(self.question or ())) if each is not None):
            raise typer.BadParameter("a prompt or question is blank: give it some text")
        return text or ""


@grouped
def prefill(
    document: Annotated[Path, typer.Argument(help="A UTF-8 file; - for stdin.")],
    save: Annotated[Path, typer.Option(help="Folder to write the compressed cache to.")],
    room: Annotated[int, typer.Option(min=1, help="Tokens to keep free for questions and answers.")] = 1024,
    raw: Annotated[bool, Template("--raw", help="Read the text as it is, without the chat template.")] = False,
    *,
    model: ModelOptions,
    policy: PolicyOptions,
) -> None:
    """Read a document once and save its compressed cache, for `generate --cache`."""
    policy.check()
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise typer.BadParameter(f"--save {save} already exists: choose another folder, or delete it")
    check_output("--save", save)
    text = read_text(document)
    if not text.strip():
        raise typer.BadParameter(f"{document} is blank: give it some text")
    params = model.load(dense=policy.dense)
    with terminal.working("reading the document"):
        read = encode(params, text, part="document", raw=raw, what="document")
        capacity = capacity_bucket(read.longest + room)
        cache = razor_jax.prefill(params, list(read.rows[0]), razor=policy.policy(params), capacity=capacity)
    razor_jax.save_cache(cache, params, save)
    note(f"saved {save}: {KVReport.of(cache, params.heads_or_all)}")
    note(f"ask with: razor-jax generate -m {model.model} --cache {save}{' --raw' if raw else ''} -Q '…'")


@grouped
def generate(
    *,
    asked: PromptOptions,
    max_new_tokens: NewTokens = 256,
    n: Annotated[int, Draws("--n", min=1, help="Answers per prompt, each drawn by itself.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_LOGPROBS, help="With --json: log probabilities, and this many likeliest tokens."),
    ] = None,
    model: ModelOptions,
    template: TemplateOptions,
    policy: PolicyOptions,
    draws: SamplingOptions,
    as_json: JsonOption = False,
) -> None:
    """Answer a message, continue a text (--raw), or answer questions about a document (-Q)."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs go into the JSON: add --json")
    if n > 1 and draws.sampling().greedy:
        raise typer.BadParameter(f"--n {n} without draws gives equal answers: add --temperature, such as 0.7")
    policy.check()
    variables = template.variables()
    text = asked.read(template, policy)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": draws.sampling(),
        "seed": draws.seed,
        "stop": draws.stop or (),
        "logprobs": logprobs,
        "draft": asked.draft,
    }
    params = model.load(dense=policy.dense)
    draws.tell_idle(params)
    templated = template.used(params, model.model)
    prompts: list[tuple[str, Any]]
    if asked.question:
        parts = split(params.assets, text or "-", asked.question, templated, variables)
        prompts = list(zip(asked.question, parts.questions, strict=True))
        options |= _document(params, asked, parts.document, policy)
    else:
        options |= {"razor": policy.policy(params), "template_kwargs": variables}
        messages = [{"role": "system", "content": template.system}, {"role": "user", "content": text}]
        prompts = [(text, messages if template.system is not None else text)]
    raw = template.raw or bool(asked.question)
    results: list[Result] = []
    for name, ids in prompts:
        if asked.question and not as_json:
            typer.echo(f"— {name}")
        if n > 1:
            results += _several(params, ids, n, show=not as_json, raw=raw, **options)
        else:
            results.append(terminal.answer(razor_jax.stream(params, ids, raw=raw, **options), show=not as_json))
        empty = [each for each in results[-n:] if not each.text.strip() and each.finish_reason != "error"]
        if empty:
            at_once = "met a stop string at once" if draws.stop else "ended its answer at once"
            did = at_once if empty[0].finish_reason == "stop" else "wrote special tokens and blanks only"
            often = f" in {len(empty)} of {n} answers" if n > 1 else ""
            terminal.warn(f"the model {did}{often}: rephrase the prompt" + ("" if raw else ", or try --raw"))
    _report(results[::n])
    if as_json:
        key = "question" if asked.question else "prompt"
        answers = [{key: prompts[at // n][0], **result.to_dict()} for at, result in enumerate(results)]
        print_json({"model": model.model, "results": answers})
    if any(result.finish_reason == "error" for result in results):
        raise typer.Exit(1)


def _document(params: Params, asked: PromptOptions, ids: Any, policy: PolicyOptions) -> dict[str, Any]:
    """Return the options of `generate` that ask about a document, read here or by `razor-jax prefill`."""
    if asked.cache is not None:
        return {"cache": razor_jax.load_cache(params, asked.cache)}
    with terminal.working("reading the document"):
        cache = razor_jax.prefill(params, ids, razor=policy.policy(params), raw=True)
    note(f"document: {KVReport.of(cache, params.heads_or_all)}")
    return {"cache": cache, "draft_from": None if asked.draft is None else ids}


def _several(params: Params, prompt: Any, n: int, show: bool, **options: Any) -> list[Result]:
    """Return n answers to one prompt, and print them with their numbers."""
    with terminal.working(f"{n} answers"):
        results = razor_jax.generate(params, prompt, n=n, **options)
    for number, result in enumerate(results, 1):
        if show:
            typer.echo(f"[{number}] {result.text}")
    return results


def _report(results: list[Result]) -> None:
    """Print, after the answers, what the cache kept and how long it took."""
    note(str(results[-1].kv))
    times = [result.timings for result in results]
    prompt_tokens, read = sum(t.prompt_tokens for t in times), sum(t.prefill_seconds for t in times)
    new, spent = sum(t.decoded_tokens for t in times), sum(t.decode_seconds for t in times)
    rate = f", {new / spent:,.1f} tokens/s" if spent else ""
    compiled = sum(t.compile_seconds for t in times)
    note(f"read {prompt_tokens:,} tokens in {read:.2f} s{rate}; compiled for {compiled:.1f} s")
