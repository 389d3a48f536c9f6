"""Choose razor-mini's head split and cache policy on training documents: `python -m recipes.choose`.

The paper's probe ranks the heads. Every number of kept heads with every window then answers needle questions about
training documents. The smallest cache that answers as well as dense attention is written to razor.json.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from razor_jax.checkpoint import folder as checkpoint
from razor_jax.config import HeadSplit, RazorConfig
from razor_jax.heads import HeadScores, find_heads, store
from razor_jax.heads.causal import Ablation, Outcome, Task
from razor_jax.heads.select import Memory
from razor_jax.needles.facts import family_document
from razor_jax.needles.text import ASSETS
from razor_jax.params import Params
from razor_jax.text import prompts
from razor_jax.tokenizer.questions import split as ask

WINDOWS = (128, 256, 512)
FAMILIES = ("needle", "alike")
CAPACITY = 8192  # tokens at which bytes are compared
SLACK = 0.002  # allowed increase of the loss (natural log) over dense attention
_SEED = 500  # gives documents that neither training nor an evaluation uses


@dataclasses.dataclass(frozen=True)
class Choice:
    """One tried combination of heads and window."""

    heads: int
    window: int
    saved: float  # share of a dense cache's bytes at CAPACITY tokens
    outcome: Outcome
    split: HeadSplit


def tasks(params: Params, tokens: int, documents: int, facts: int) -> list[Task]:
    """Make training documents with a question per fact; in every other document, facts differ in one word only."""
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("the params have no tokenizer.json: load a folder that recipes.export wrote")
    tokenizer = Tokenizer.from_str(assets.tokenizer_json)
    found = []
    for index in range(documents):
        rng = np.random.default_rng([_SEED, tokens, index])
        document = family_document(rng, tokenizer, FAMILIES[index % 2], tokens, facts, split="train")
        cut = ask(assets, document.text, [q.question for q in document.questions], True)
        answers = [tuple(assets.encode(q.answer, add_special=False)) for q in document.questions]
        (text,) = prompts.encode(params, cut.document).rows
        questions = prompts.encode(params, list(cut.questions), part="question", raw=True).rows
        found.append(Task(text, tuple(zip(questions, answers, strict=True))))
    return found


def try_choices(params: Params, scores: HeadScores, asked: list[Task], most: int) -> tuple[Outcome, list[Choice]]:
    """Answer the questions with dense attention, and with every window and 1 to `most` kept heads."""
    L, K = params.config.num_layers, params.config.num_kv_heads
    dense, choices = None, []
    for window in WINDOWS:
        policy = RazorConfig.compact(window)
        ablation = Ablation(params, asked, policy)
        dense = dense or ablation(np.ones((L, K), bool))
        memory = Memory(CAPACITY, policy, params.config.head_dim)
        whole = memory.bytes(HeadSplit.of(L, K, [(l, k) for l in range(L) for k in range(K)]))
        for heads in range(1, most + 1):
            split = scores.select(share=heads / (L * K))
            saved = 1 - memory.bytes(split) / whole
            choices.append(Choice(heads, window, saved, ablation(split), split))
    assert dense is not None
    return dense, choices


def best(dense: Outcome, choices: list[Choice]) -> Choice:
    """Return the choice that saves most among those as good as dense attention, or the one with the least loss."""
    good = [c for c in choices if c.outcome.accuracy >= dense.accuracy and c.outcome.loss <= dense.loss + SLACK]
    if good:
        return max(good, key=lambda c: c.saved)
    return min(choices, key=lambda c: c.outcome.loss)


def main(
    folder: Annotated[pathlib.Path, typer.Option(help="Model folder; razor.json is written here.")] = ASSETS
    / "razor-mini",
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens per document.")] = 4096,
    documents: Annotated[int, typer.Option(min=2, help="Documents.")] = 8,
    facts: Annotated[int, typer.Option(min=1, help="Facts and questions per document; more are harder.")] = 8,
    block: Annotated[int, typer.Option(min=16, help="Token ids per block of the probe.")] = 1023,
    most: Annotated[int, typer.Option(min=1, help="Largest number of kept heads.")] = 10,
) -> None:
    """Choose split and policy, print all candidates, and write razor.json."""
    params = checkpoint.read(folder)
    scores = find_heads(params, seeds=(0, 1, 2), block=block)
    dense, choices = try_choices(params, scores, tasks(params, tokens, documents, facts), most)
    typer.echo(f"dense: loss {dense.loss:.4f}, right {dense.accuracy:.1%} of {len(dense.right)}")
    for c in choices:
        typer.echo(
            f"{c.heads:2d} heads, window {c.window}: {c.saved:.1%} saved at {CAPACITY}, "
            f"loss {c.outcome.loss:.4f}, right {c.outcome.accuracy:.1%}"
        )
    chosen = best(dense, choices)
    store.write(folder, chosen.split, RazorConfig.compact(chosen.window, kv_dtype="bfloat16"))
    typer.echo(f"{chosen.heads} heads {chosen.split.retrieval}, window {chosen.window}, {chosen.saved:.1%} saved")


if __name__ == "__main__":
    typer.run(main)
