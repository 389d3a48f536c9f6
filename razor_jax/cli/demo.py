"""The demo: facts hidden in a long document, compressed before the questions are known, then asked for."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from tokenizers import Tokenizer

from ..config import HeadSplit, RazorConfig
from ..needles.facts import Fact, needle_document
from ..params import Params, with_heads
from ..text import prompts
from ..text.generate import prefill, stream
from ..text.result import KVReport
from ..tokenizer.questions import DocumentAndQuestions, split
from . import terminal
from .options import CompressedOptions, JsonOption, ModelName, ModelOptions, grouped
from .terminal import note, print_json

ANSWER_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class CacheResult:
    """One cache policy and its answers.

    Attributes:
      answers: one per fact, in order.
      right: number of answers with the fact's value.
      kv: the cache, with document and question.
      tokens_per_second: decode rate, without compilation.
    """

    name: str
    answers: tuple[str, ...]
    right: int
    kv: KVReport
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All policies on the same document and questions; `policy` describes that of the compressed ones."""

    policy: str
    document_tokens: int
    facts: tuple[Fact, ...]
    settings: tuple[CacheResult, ...]
    seconds: float

    def table(self) -> Table:
        """Return a table of settings: what they keep, cost and get right; fits 80 columns."""
        table = Table(
            title=f"{self.document_tokens:,} tokens read before the questions were known",
            caption=(
                "kept: KV heads that keep every token; ratio: a dense cache of the same type over this one; dropped: "
                f"tokens a windowed head folded away. {self.policy}. {self.seconds:.0f} s in all."
            ),
        )
        table.add_column("cache", no_wrap=True)
        for name in ("kept", "right", "KV bytes", "ratio", "tokens/s", "dropped"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.settings:
            kv = each.kv
            table.add_row(
                each.name,
                f"{kv.share:.0%}",
                f"{each.right} of {len(self.facts)}",
                f"{kv.allocated_bytes:,}",
                f"{kv.ratio:.2f}×",
                f"{each.tokens_per_second:,.0f}",
                f"{max(kv.dropped_tokens):,}" if kv.engaged else "off",
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        settings = [{**dataclasses.asdict(each), "kv": each.kv.to_dict()} for each in self.settings]
        return {**dataclasses.asdict(self), "settings": settings}


@grouped
def demo(
    model: ModelName = "razor-mini",
    tokens: Annotated[int, typer.Option(min=256, help="Length of the document.")] = 2000,
    facts: Annotated[int, typer.Option(min=1, max=32, help="Facts hidden in it.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of document and facts.")] = 0,
    *,
    policy: CompressedOptions,
    as_json: JsonOption = False,
) -> None:
    """Hide facts in a long document, compress it, then ask: dense, Razor and all-windowed side by side."""
    params = ModelOptions(model).load()
    compressed = policy.compressed(params)
    report = run(params, compressed, tokens=tokens, facts=facts, seed=seed, show=not as_json)
    if as_json:
        print_json({"model": model, **report.to_dict()})
    else:
        terminal.print_table(report.table())


def run(params: Params, policy: RazorConfig, *, tokens: int, facts: int, seed: int, show: bool) -> Report:
    """Build the document, then answer with Razor (streamed if `show`), dense and with every head windowed."""
    started = time.perf_counter()
    if params.assets is None or params.assets.tokenizer_json is None or params.assets.chat_template is None:
        raise ValueError("the demo asks by chat template: it needs a model with a tokenizer.json and a template")
    longest = params.config.max_position_embeddings
    if tokens > longest:
        raise ValueError(f"--tokens {tokens:,}: this model has {longest:,} positions")
    rng = np.random.default_rng(seed)
    document = needle_document(rng, Tokenizer.from_str(params.assets.tokenizer_json), tokens=tokens, facts=facts)
    asked = split(params.assets, document.text, [fact.question for fact in document.facts], chat=True)
    # The first words of the answer are given: a small model may know the value and not how to begin.
    begun = [params.assets.encode(_begun(fact), add_special=False) for fact in document.facts]
    questions = tuple([*ids, *words] for ids, words in zip(asked.questions, begun, strict=True))
    asked = dataclasses.replace(asked, questions=questions)
    depths = ", ".join(f"{fact.depth:.0%}" for fact in document.facts)
    note(f"a document of {document.tokens:,} tokens of text never trained on; {facts} facts hidden at {depths}")
    none = HeadSplit.none(params.config.num_layers, params.config.num_kv_heads)
    razor = _ask("Razor", params, policy, asked, document.facts, show)
    dense = _ask("dense", params, None, asked, document.facts, show=False)
    windowed = _ask("all windowed", with_heads(params, none), policy, asked, document.facts, show=False)
    seconds = time.perf_counter() - started
    return Report(policy.describe(), document.tokens, document.facts, (dense, razor, windowed), seconds)


def _ask(
    name: str,
    params: Params,
    policy: RazorConfig | None,
    asked: DocumentAndQuestions,
    facts: tuple[Fact, ...],
    show: bool,
) -> CacheResult:
    """Compress the document, then put every question to a copy of its cache."""
    longest = max(len(question) for question in asked.questions)
    capacity = prompts.capacity_bucket(len(asked.document) + longest + ANSWER_TOKENS)
    with terminal.working(f"{name}: reading the document"):
        cache = prefill(params, asked.document, razor=policy, capacity=capacity)
    if show:
        note(f"compressed: {KVReport.of(cache, params.heads_or_all)}\nnow the questions:")
    results = []
    for fact, question in zip(facts, asked.questions, strict=True):
        if show:
            typer.echo(f"\n{fact.question}\n{_begun(fact)} …")
        pieces = stream(params, question, cache=cache, max_new_tokens=ANSWER_TOKENS)
        results.append(terminal.answer(pieces, show))
        if show:
            typer.echo("✓ right" if fact.value in results[-1].text else f"✗ it is {fact.value}")
    seconds = sum(result.timings.decode_seconds for result in results)
    return CacheResult(
        name,
        tuple(result.text for result in results),
        sum(fact.value in result.text for fact, result in zip(facts, results, strict=True)),
        results[-1].kv,
        sum(result.timings.decoded_tokens for result in results) / max(seconds, 1e-9),
    )


def _begun(fact: Fact) -> str:
    """Return the answer's words before the value."""
    return fact.answer[: fact.answer.index(fact.value)].rstrip()
