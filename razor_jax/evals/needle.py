"""Needle accuracy with the document compressed before the questions are known.

    python -m razor_jax.evals.needle [--model razor-mini] [--tokens 2048] [--documents 64]

prints one line a setting: dense attention, the model's own split and policy, the same without the compensation
token, as many random heads, and every head windowed, on the same held-out documents and questions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from ..config import HeadSplit, RazorConfig
from ..generate import generate, prefill
from ..hub import load
from ..params import Params, with_heads
from ..questions import Split, split
from ..recipes.tasks import NeedleDocument, needle_document
from ..report import KVReport
from .bench import machine

NEW_TOKENS = 32  # an answer is a sentence of about 15 tokens


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Questions answered with the planted value, and the cache that they were answered from."""

    right: int
    asked: int
    kv: KVReport
    seconds: float

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def half_width(self) -> float:
        """Half of the 95 % normal interval of the share."""
        return 1.96 * math.sqrt(self.share * (1 - self.share) / self.asked)


def documents(params: Params, *, tokens: int, count: int, facts: int, seed: int) -> list[NeedleDocument]:
    """Held-out documents of `tokens` tokens with `facts` planted facts each, the same for every setting."""
    if params.assets is None or params.assets.tokenizer_json is None:
        raise ValueError("the needle test needs a model with a tokenizer.json")
    tokenizer = Tokenizer.from_str(params.assets.tokenizer_json)
    draws = (np.random.default_rng([seed, tokens, index]) for index in range(count))
    return [needle_document(rng, tokenizer, tokens=tokens, facts=facts) for rng in draws]


def measure(params: Params, razor: RazorConfig | None, haystacks: list[NeedleDocument], *, batch: int = 8) -> Accuracy:
    """Prefill documents in batches, then put each question of each document to a copy of its cache."""
    started, right, asked, kv = time.perf_counter(), 0, 0, None
    for first in range(0, len(haystacks), batch):
        part = haystacks[first : first + batch]
        cut = [split(params.assets, d.text, [f.question for f in d.facts], chat=True) for d in part]
        # A last batch that is short is filled up, so that it has the shape of the others.
        rows = [cut[i % len(cut)] for i in range(batch)]
        cache = prefill(params, [row.document for row in rows], razor=razor, capacity=_capacity(rows))
        for number in range(len(part[0].facts)):
            results = generate(params, [row.questions[number] for row in rows], cache=cache, max_new_tokens=NEW_TOKENS)
            kv = kv or results[0].kv
            right += sum(d.facts[number].value in r.text for d, r in zip(part, results, strict=False))
            asked += len(part)
    assert kv is not None
    return Accuracy(right, asked, kv, time.perf_counter() - started)


def settings(params: Params, policy: RazorConfig, seed: int) -> Iterator[tuple[str, Params, RazorConfig | None]]:
    """What is compared: name, params with their split, policy."""
    L, K = params.config.num_layers, params.config.num_kv_heads
    kept = sum(params.split.counts)
    chosen = np.random.default_rng(seed).permutation(L * K)[:kept]
    yield "dense", params, None
    yield "Razor", params, policy
    yield "  no compensation token", params, dataclasses.replace(policy, compensation=False)
    random = HeadSplit.of(L, K, [(int(i) // K, int(i) % K) for i in chosen])
    yield f"  {kept} random heads", with_heads(params, random), policy
    yield "  all heads windowed", with_heads(params, HeadSplit.none(L, K)), policy


def _capacity(rows: list[Split]) -> int:
    """Tokens of the longest document with its longest question and answer: no slack in the bytes."""
    longest = max(len(row.document) + max(len(q) for q in row.questions) for row in rows)
    return -(-(longest + NEW_TOKENS) // 64) * 64


def main(
    model: Annotated[str, typer.Option(help="razor-mini, a checkpoint folder, or a Hugging Face id.")] = "razor-mini",
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of a document.")] = 2048,
    count: Annotated[int, typer.Option("--documents", min=1, help="Documents.")] = 64,
    facts: Annotated[int, typer.Option(min=1, max=32, help="Facts, and questions, of each.")] = 4,
    window: Annotated[int | None, typer.Option(min=1, help="Another window than the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print needle accuracy, bytes and ratio of each setting."""
    params = load(model)
    policy = params.razor or RazorConfig()
    policy = policy if window is None else dataclasses.replace(policy, window=window)
    haystacks = documents(params, tokens=tokens, count=count, facts=facts, seed=seed)
    rows: list[dict[str, Any]] = []
    for name, variant, razor in settings(params, policy, seed):
        result = measure(variant, razor, haystacks)
        rows.append({"setting": name.strip(), **dataclasses.asdict(result), "kv": result.kv.to_dict()})
        if not as_json:
            typer.echo(
                f"{name:24s} {result.share:6.1%} ± {100 * result.half_width:.1f} of {result.asked}   "
                f"KV {result.kv.allocated_bytes:11,} bytes, {result.kv.ratio:.2f}×, "
                f"{result.kv.share:.0%} of heads kept{'' if result.kv.engaged or razor is None else ', not engaged'}"
            )
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    if as_json:
        typer.echo(json.dumps({"model": model, "tokens": tokens, "machine": machine(), "rows": rows}, indent=1))
    else:
        typer.echo(f"{tokens} tokens a document; {policy.describe()}; {where}")


if __name__ == "__main__":
    typer.run(main)
