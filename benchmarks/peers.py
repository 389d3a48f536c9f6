"""Query-agnostic cache compression at equal bytes: the same checkpoint, documents and questions under every method.

    python -m benchmarks.peers --model FOLDER [--lengths 2048,4096] [--documents 64] [--facts 32] [--conversation]

A held-out document is compressed before any question is known; then each question is put to a copy of its cache, or
with --conversation all of them one after the other, every method's own answers staying in its cache.
Every method holds at least the bytes of our cache of that document, counted in bfloat16. Rows:

- dense attention, and RazorAttention as the checkpoint recommends;
- in our own cache StreamingLLM (every head windowed, no compensation token, the window made as large as the bytes) and
  a DuoAttention-style cache (our heads, a fixed window, no compensation token);
- NVIDIA kvpress through transformers (`benchmarks/peers_kvpress.py`), where it is installed.

First dense attention through transformers must give dense attention's answers here, word for word, or nothing runs.
Runs resume from the records beside the output.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import util
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import razor_jax
from razor_jax import HeadSplit, Params, RazorConfig
from razor_jax import cache as kv
from razor_jax.checkpoint.hub import find
from razor_jax.evals import needle as needles
from razor_jax.evals.conversation import Conversation
from razor_jax.evals.protocol import CachedModel, Example, System, dense, encode_example, run
from razor_jax.evals.provenance import provenance, write_results
from razor_jax.evals.table import Table
from razor_jax.params import with_heads

RESULTS = Path(__file__).parent / "results"
OURS = "Razor"
PARITY_DOCUMENTS, PARITY_QUESTIONS = 4, 8


def document_bytes(params: Params, razor: RazorConfig, tokens: int) -> int:
    """Return the bytes of a cache that holds exactly a document of `tokens` tokens, in bfloat16."""
    policy = dataclasses.replace(razor, kv_dtype="bfloat16", windowed_kv_dtype=None)
    return kv.make_spec(params.heads_or_all, params.config.head_dim, tokens, policy, "bfloat16").kv_bytes(1)


def kept_tokens(params: Params, razor: RazorConfig, tokens: int) -> float:
    """Return the tokens that each KV head could keep in those bytes, if all kept as many."""
    c = params.config
    return document_bytes(params, razor, tokens) / (c.num_layers * c.num_kv_heads * 4 * c.head_dim)


def own_settings(params: Params, razor: RazorConfig, tokens: int) -> list[CachedModel]:
    """Return dense, Razor, and the peers that our own cache can hold, at no fewer bytes, for documents of `tokens`
    tokens.
    """
    razor = dataclasses.replace(razor, kv_dtype="bfloat16", windowed_kv_dtype=None)
    none = HeadSplit.none(params.config.num_layers, params.config.num_kv_heads)
    window = max(1, math.ceil(kept_tokens(params, razor, tokens)) - razor.sinks)
    streaming = RazorConfig.compact(window, sinks=razor.sinks, compensation=False, kv_dtype="bfloat16")
    # The two float32 means of a head are worth two bfloat16 tokens.
    recent = int(kv.ring_length(razor, tokens)) + (2 if razor.compensation else 0)
    duo = RazorConfig.compact(recent, sinks=razor.sinks, compensation=False, kv_dtype="bfloat16")
    return [
        dense(params),
        CachedModel(OURS, params, razor),
        CachedModel("DuoAttention-style (ours)", params, duo),
        CachedModel("StreamingLLM (ours)", with_heads(params, none), streaming),
    ]


def asked(setting: CachedModel, conversation: bool) -> System:
    """Return the setting itself, each question put to a copy, or one growing conversation with it."""
    return Conversation(setting) if conversation else setting


def check_parity(ours: System, reference: System, examples: list[Example], max_new_tokens: int) -> int:
    """Return dense answers of both libraries to some questions, float32 caches; returns how many were compared.

    Raises RuntimeError with the first pair that differs: then nothing else can be compared.
    """
    part = [dataclasses.replace(e, questions=e.questions[:PARITY_QUESTIONS]) for e in examples[:PARITY_DOCUMENTS]]
    table = run([ours, reference], part, max_new_tokens=max_new_tokens)
    here, there = ([a for found in row.answered for a in found.answers] for row in table.rows)
    for (_, question), a, b in zip(table.questions, here, there, strict=True):
        if a.strip() != b.strip():
            raise RuntimeError(f"dense attention disagrees on {question.text!r}: {a!r} here, {b!r} by {reference.name}")
    return len(here)


def documents(params: Params, variant: needles.Variant, grid: needles.Grid) -> list[Example]:
    """Return the documents of one length. Raises ValueError where they cannot be made, or none of their tokens is
    dropped.
    """
    razor, examples = params.razor or RazorConfig(), needles.examples(params, variant, grid)
    longest = max(len(encode_example(params, e)[0]) for e in examples)
    if longest <= razor.sinks + kv.ring_length(razor, longest):
        raise ValueError(f"documents of {longest:,} tokens drop nothing under {razor.describe()}: use longer ones")
    return examples


def compare(
    params: Params,
    model: str,
    variant: needles.Variant,
    examples: list[Example],
    batch: int,
    journal: Path,
    only: str = "",
    conversation: bool = False,
) -> dict[str, Any]:
    """Return all methods at one length, of kvpress those whose name holds `only`: prints the table, returns it for
    JSON.
    """
    razor = params.razor or RazorConfig()
    new_tokens = needles.answer_tokens(variant)
    longest = max(len(encode_example(params, e)[0]) for e in examples)
    budget = document_bytes(params, razor, longest)
    systems = [asked(setting, conversation) for setting in own_settings(params, razor, longest)]
    compared, failed = None, {}
    if util.find_spec("kvpress") is not None:
        from benchmarks import peers_kvpress

        host = peers_kvpress.Host(find(model), params)
        reference, *peers = peers_kvpress.presses(host, lambda n: kept_tokens(params, razor, n), conversation)
        ours = asked(CachedModel("ours", params, None), conversation)
        compared = check_parity(ours, reference, examples, new_tokens)
        typer.echo(f"parity: {compared} dense answers equal transformers', word for word")
        for peer in (peer for peer in peers if only.lower() in peer.name.lower()):
            try:
                run([peer], [dataclasses.replace(examples[0], questions=examples[0].questions[:1])])
            except Exception as error:  # whatever a peer raises is its row
                failed[peer.name] = f"{type(error).__name__}: {error}"
            else:
                systems.append(peer)
    table = run(systems, examples, batch=batch, resume=journal, progress=_tell)
    result = {
        "variant": variant,
        "conversation": conversation,
        "document_tokens": longest,
        "bytes": budget,
        "parity_answers": compared,
    }
    rows = [_row(table, row.name, params, razor) for row in table.rows]
    Console().print(_render(rows, f"{longest:,} tokens, {budget:,} bytes, {len(table.rows[0].scores):,} questions"))
    for name, reason in failed.items():
        typer.echo(f"{name} did not run: {reason}")
    return {**result, "rows": rows, "not_run": failed, "table": table.to_dict()}


def _row(table: Table, name: str, params: Params, razor: RazorConfig) -> dict[str, Any]:
    row = table[name]
    ours = table.difference(OURS, reference=name)
    if row.kv.implementation == "transformers":
        held, how = row.bytes, row.answered[0].kv.setting
    elif row.dense:
        held, how = np.mean([f.tokens for f in row.answered]) * _token_bytes(params), "dense"
    else:
        policy = next(s for s in own_settings(params, razor, max(f.tokens for f in row.answered)) if s.name == name)
        assert policy.razor is not None
        held = np.mean([document_bytes(policy.params, policy.razor, f.tokens) for f in row.answered])
        how = "evicts"
    return {
        "method": name,
        **row.score._asdict(),
        "ours_minus_this": ours._asdict(),
        "bytes": float(held),
        "how": how,
        "seconds_a_document": row.seconds / len(row.answered),
    }


def _token_bytes(params: Params) -> int:
    c = params.config
    return c.num_layers * c.num_kv_heads * 4 * c.head_dim


def _render(rows: list[dict[str, Any]], title: str) -> RichTable:
    # Names and intervals wrap: the table fits 80 columns. The interval of the share itself is in the JSON.
    table = RichTable(title=title, box=box.SIMPLE, title_justify="left")
    for name in ("method", "right", "Razor minus it, points", "bytes", "how"):
        table.add_column(name, justify="left" if name in ("method", "how") else "right", no_wrap=name == "bytes")
    for row in sorted(rows, key=lambda r: -r["share"]):
        change, low, high = (100 * row["ours_minus_this"][name] for name in ("difference", "low", "high"))
        table.add_row(
            row["method"],
            f"{row['share']:.1%}",
            "" if row["method"] == OURS else f"{change:+.2f} ({low:+.2f} … {high:+.2f})",
            f"{row['bytes']:,.0f}",
            row["how"],
        )
    return table


def _tell(name: str, done: int, total: int) -> None:
    if done in (0, total):
        typer.echo(f"{name}: {done:,} of {total:,}", err=True)


def main(
    model: Annotated[str, typer.Option(help="razor-mini, a checkpoint folder, or a Hugging Face id.")] = "razor-mini",
    lengths: Annotated[str, typer.Option(help="Tokens of the documents, separated by commas.")] = "2048",
    count: Annotated[int, typer.Option("--documents", min=1)] = 64,
    facts: Annotated[int, typer.Option(min=1, max=64, help="Facts and questions of a document.")] = 32,
    variant: Annotated[needles.Variant, typer.Option(help="Which needle task.")] = "facts",
    conversation: Annotated[
        bool, typer.Option("--conversation", help="All questions of a document in one growing conversation.")
    ] = False,
    window: Annotated[int | None, typer.Option(min=1, help="Another window than the checkpoint recommends.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a call in our own cache.")] = 8,
    only: Annotated[str, typer.Option(help="Of kvpress only the methods whose name holds this.")] = "",
    output: Annotated[Path, typer.Option("--out", help="Folder of the JSON and the records.")] = RESULTS,
) -> None:
    """Compare at equal bytes, one table a length."""
    if not all(part.strip().isdigit() for part in lengths.split(",")):
        raise typer.BadParameter(f"{lengths!r} is not a list of token counts such as 2048,4096")
    # transformers runs in float32 on a CPU, so both do; caches are counted in bfloat16.
    params = razor_jax.load(model, dtype="float32")
    policy = params.razor or RazorConfig()
    if window is not None:
        policy = dataclasses.replace(policy, window=window)
    params = params.replace(razor=policy)
    packages = ("kvpress", "transformers", "torch")
    content: dict[str, Any] = {"about": provenance(params, model, packages), "policy": policy.describe(), "lengths": []}
    name = f"peers-{Path(model).name}" + ("-conversation" if conversation else "")
    for tokens in map(int, lengths.split(",")):
        grid = needles.Grid((tokens,), documents=count, facts=facts, seed=11)
        try:
            examples = documents(params, variant, grid)
        except ValueError as error:
            raise typer.BadParameter(f"{tokens}: {error}", param_hint="--lengths") from error
        journal = output / f"{name}.jsonl"
        found = compare(params, model, variant, examples, batch, journal, only, conversation)
        content["lengths"].append({"tokens": tokens, **found})
        typer.echo(f"wrote {write_results(output / f'{name}.json', content)}")


if __name__ == "__main__":
    typer.run(main)
